"""From pictures to training data: instances built from scenes and from pairs of views, annotation of other data sets,
depth maps. Each against a computation of its own: a wall whose depth is known, corners written out by hand, the model's
formula. Tests on real pictures skip when those are not there.

    python -m pytest -q test_scenes.py
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from common import REALDATA, needs_real
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DepthProConfig,
    DepthProForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
)

import data
import rewards
import sft
from engine import distributed
from engine.settings import run_main
from formats import scenes
from formats.errors import BadRow
from tools import build, convert, depth
from world import raycast

real = needs_real(".")


def command(monkeypatch, *words):
    """python -m tools.build ... (or convert, depth), in this process; words: the tool, its flags."""
    tool, *flags = map(str, words)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *flags])
    run_main({"build": build, "convert": convert, "depth": depth}[tool].main)


def write_scenes(folder, seeds=(1, 2)):
    """Synthetic scenes on disk, as somebody's own annotated RGB-D pictures -> their scenes.jsonl."""
    (folder / "pictures").mkdir(parents=True)
    with open(folder / "scenes.jsonl", "w") as file:
        for seed in seeds:
            scene = raycast.make_scene(seed)
            Image.fromarray(scene.image).save(folder / "pictures" / f"{seed}.png")
            units = np.nan_to_num(scene.depth * 500).round().astype(np.uint16)  # 2 mm a unit
            Image.fromarray(units).save(folder / "pictures" / f"{seed}_d.png")
            objects = [
                {
                    "label": o["label"],
                    "bbox_2d": list(map(float, o["box"])),
                    "center_cam": list(o["center"]),
                    "size_3d": list(o["size"]),
                    "R_cam": o["rotation"].tolist(),
                }
                for o in scene.objects
            ]
            file.write(
                json.dumps(
                    {
                        "id": f"room {seed}",
                        "image": f"pictures/{seed}.png",
                        "objects": objects,
                        "depth": f"pictures/{seed}_d.png",
                        "depth_scale": 0.002,
                        "intrinsics": scene.intrinsics,
                    }
                )
                + "\n"
            )
    return folder / "scenes.jsonl"


def truth_of(path):
    """{(id, label, 2D box in thousandths): centre} straight from a scenes.jsonl."""
    centers = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        width, height = Image.open(path.parent / row["image"]).size
        for o in row["objects"]:
            box = tuple(
                round(1000 * min(max(v, 0), s) / s)
                for v, s in zip(o["bbox_2d"], (width, height) * 2)
            )
            centers[row["id"], box] = o["center_cam"]
    return centers


def check_rows(rows, centers):
    """Every trace again, with the centres looked up in the annotation by the mark's 2D box."""
    for row in rows:
        question, target = (turn["value"] for turn in row["conversations"])
        if "<answer>" not in target:
            continue
        marks = {
            mark: centers[row["id"].split("/")[0], tuple(row[mark][0])]
            for mark in row
            if mark.endswith("_bbox")
        }
        path = "dtr" if "3d_pos" in row else "lor"
        reward = rewards.total_reward(
            target, row["answer"], path, {k.replace("_", " "): v for k, v in marks.items()}
        )
        assert (
            reward["format"] == 1 and reward["accuracy"] > 0.9 and reward["detection"] in (None, 1)
        ), (row, reward)
        assert (
            question.count("<mask>")
            == len(row.get("bbox", []))
            == (len(marks) if path == "dtr" else 0)
        )
        if row["task"] == "depth":
            assert abs(float(row["answer"]) - marks["red_bbox"][2]) < 0.006
        if row["task"] == "distance":
            assert abs(float(row["answer"]) - math.dist(*marks.values())) < 0.006


# ---------------------------------------------------------------------------------------------------------------------
# instances from annotated scenes


def test_build_writes_instances_that_load_and_whose_traces_hold(tmp_path, monkeypatch, capsys):
    source, out = write_scenes(tmp_path / "set"), tmp_path / "out" / "cot.json"
    command(monkeypatch, "build", "--scenes", source, "--out", out, "--rounds", 2)
    rows = data.file_source(str(out))[1]  # opens and checks every picture
    assert (
        len(rows)
        == len(json.loads(out.read_text()))
        == int(capsys.readouterr().out.split()[-4].replace(",", ""))
    )
    assert {row["depth_scale"] for row in rows} == {0.002} and len(
        {row["id"] for row in rows}
    ) == len(rows)
    asked = [
        json.dumps([row["conversations"], row.get("red_bbox"), row.get("blue_bbox")])
        for row in rows
    ]
    assert len(set(asked)) == len(asked)  # two rounds ask some things twice
    assert not any(Path(row["image"]).is_absolute() for row in rows) and {"center", "axis"} < {
        r["task"] for r in rows
    }
    check_rows(rows, truth_of(source))
    kept = out.read_bytes()
    command(monkeypatch, "build", "--scenes", source, "--out", out, "--rounds", 2)
    assert out.read_bytes() == kept
    command(monkeypatch, "build", "--scenes", source, "--out", out, "--rounds", 2, "--seed", 1)
    assert out.read_bytes() != kept and [f.name for f in out.parent.iterdir()] == ["cot.json"]


def test_build_for_rl_has_answers_only_and_pictures_travel(tmp_path, monkeypatch):
    source, out, pictures = (
        write_scenes(tmp_path / "set"),
        tmp_path / "rl.jsonl",
        tmp_path / "pictures",
    )
    command(monkeypatch, "build", "--scenes", source, "--out", out, "--rl", "--pictures", pictures)
    for file in (tmp_path / "set" / "pictures").iterdir():
        file.unlink()
    rows = data.file_source(str(out))[1]
    assert rows and all("<answer>" in row["conversations"][1]["value"] for row in rows)
    assert {row["image"] for row in rows} == {"pictures/000000.png", "pictures/000001.png"}
    assert len(list(pictures.iterdir())) == 4


def test_build_with_sensor_centres_says_what_the_depth_says(tmp_path, monkeypatch):
    source, out = write_scenes(tmp_path / "set", seeds=[3]), tmp_path / "cot.json"
    command(monkeypatch, "build", "--scenes", source, "--out", out, "--sensor")
    scene, seen = scenes.load_scenes(source)[0], 0
    for row in json.loads(out.read_text()):
        for truth in row.get("3d_pos", {}).values():
            x1, y1, x2, y2 = (v * 96 / 1000 for v in truth["bbox_2d"])
            patch = scene.depth[
                int((3 * y1 + y2) / 4) : math.ceil((y1 + 3 * y2) / 4),
                int((3 * x1 + x2) / 4) : math.ceil((x1 + 3 * x2) / 4),
            ]
            assert np.nanmin(patch) <= truth["center_cam"][2] <= np.nanmax(patch)
            seen += min(abs(truth["center_cam"][2] - o["center"][2]) for o in scene.objects) > 0.05
    assert seen


def test_a_build_that_fails_leaves_the_old_file_and_says_where(tmp_path, monkeypatch, capsys):
    source, out = write_scenes(tmp_path / "set"), tmp_path / "cot.json"
    source.write_text(source.read_text().replace('"center_cam": [', '"center_cam": ["near", ', 1))
    out.write_text("old")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "build", "--scenes", source, "--out", out)
    assert stop.value.code == 2 and out.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"error: {source}:1: field 'objects[0].center_cam'")
    )
    empty, row = tmp_path / "set" / "empty.jsonl", json.loads(source.read_text().splitlines()[1])
    empty.write_text(json.dumps({**row, "objects": []}))
    for words in (["--scenes", tmp_path / "no.jsonl"], [], ["--scenes", empty]):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, "build", *words, "--out", out)
        assert stop.value.code == 2 and out.read_text() == "old"


def test_faulty_traces_are_dropped():
    target = (
        '<detect>Find 1 relevant objects:\n<3d_box center="0.0,1.0,2.0">bed (red bbox)</3d_box></detect>\n'
        "<think>z:2.0</think>\n<answer>2.0</answer>"
    )

    def bad(old, new, answer="2.04"):
        talk = [{"value": "How far is the red bbox <mask>?"}, {"value": target.replace(old, new)}]
        return build.fault(
            {
                "image": "a.png",
                "answer": answer,
                "conversations": talk,
                "3d_pos": {"red_bbox": {"center_cam": [0.04, 1, 2.04]}},
            }
        )

    assert bad("", "") is None
    assert "grammar" in bad("Find 1", "Find 2") and "grammar" in bad("<think>z:2.0</think>", "")
    assert "coarse" in bad("", "", answer="2.15") and "wrong" in bad("", "", answer="B")
    assert "centres" in bad("0.0,1.0,2.0", "0.0,1.0,1.9") and "centres" in bad(
        "red bbox)", "blue bbox)"
    )


@real
def test_real_scenes_build_and_train(tmp_path, monkeypatch):
    from test_model import make_model, make_processor, make_tokenizer

    source, out = REALDATA / "scenes" / "scenes.jsonl", tmp_path / "cot.json"
    command(monkeypatch, "build", "--scenes", source, "--out", out, "--rounds", 1)
    rows = json.loads(out.read_text())
    check_rows(rows, truth_of(source))
    assert {"depth", "distance", "axis", "center", "box3d"} < {row["task"] for row in rows}
    distributed.setup(0)
    settings = dataclasses.replace(
        sft.Settings(), out=str(tmp_path / "sft"), steps=2, batch=4, pretrain=0
    )
    sft.train(
        settings,
        make_model(make_tokenizer()),
        make_tokenizer(),
        make_processor(),
        [data.file_source(str(out))],
        torch.device("cpu"),
    )
    dist.destroy_process_group()
    log = [
        json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(log) == 2 and all(math.isfinite(line["loss"]) and line["tokens"] > 0 for line in log)


# ---------------------------------------------------------------------------------------------------------------------
# pairs of views

CAMERA = [100.0, 110.0, 79.0, 62.0]


def wall_depth(pose, size=(160, 120)):
    """Depth of the wall z = 4 + x / 4 (world frame) from a camera with this pose: ray by ray."""
    depth = np.zeros(size[::-1])
    for y in range(size[1]):
        for x in range(size[0]):
            ray = pose[:3, :3] @ (
                (x + 0.5 - CAMERA[2]) / CAMERA[0],
                (y + 0.5 - CAMERA[3]) / CAMERA[1],
                1,
            )
            depth[y, x] = (4 + pose[0, 3] / 4 - pose[2, 3]) / (ray[2] - ray[0] / 4)
    return depth


def write_pair(folder):
    """Two cameras before a slanted wall -> pairs.jsonl, the poses. The second: right .5, up .2, forward 1, 10 degrees
    to the right, in the frame of the first, which itself is somewhere and turned."""
    turn = math.radians(10)
    second = np.array(
        [
            [math.cos(turn), 0, math.sin(turn), 0.5],
            [0, 1, 0, -0.2],
            [-math.sin(turn), 0, math.cos(turn), 1.0],
            [0, 0, 0, 1],
        ]
    )
    tip = math.radians(-15)
    first = np.array(
        [
            [1, 0, 0, 0.3],
            [0, math.cos(tip), -math.sin(tip), 1.2],
            [0, math.sin(tip), math.cos(tip), -0.4],
            [0, 0, 0, 1],
        ]
    )
    poses, row = (
        [first, first @ second],
        {"id": "wall", "intrinsics": CAMERA, "depth_scale": 0.0002},
    )
    folder.mkdir()
    for side, pose in zip(("source", "target"), poses):
        Image.fromarray((wall_depth(pose) / 0.0002).round().astype(np.uint16)).save(
            folder / f"{side}_depth.png"
        )
        Image.new("RGB", (160, 120), "gray").save(folder / f"{side}.png")
        row[side] = {
            "image": f"{side}.png",
            "depth": f"{side}_depth.png",
            "cam_to_world": pose.tolist(),
        }
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    return folder / "pairs.jsonl", poses


def test_pairs_of_views_become_questions_whose_points_lie_on_the_wall(tmp_path, monkeypatch):
    source, poses = write_pair(tmp_path / "pairs")
    command(
        monkeypatch, "build", "--pairs", source, "--out", tmp_path / "views.json", "--rounds", 6
    )
    rows = json.loads((tmp_path / "views.json").read_text())
    motion = [row for row in rows if row["task"] == "motion"]
    assert [row["answer"] for row in motion] == [
        "move_right:0.50,move_up:0.20,move_forward:1.00,rotate_right:10"
    ] * 2
    assert motion[1]["3d_pos"] == {} and "3d_pos" not in motion[0]
    used, frames = set(), set()
    for row in rows:
        question, target = (turn["value"] for turn in row["conversations"])
        path = "dtr" if "3d_pos" in row else "lor"
        assert (
            rewards.format_reward(target, path, images=2) == 1
            and len(row["image"]) == len(row["depth"]) == 2
        )
        assert rewards.accuracy_reward(target, row["answer"]) > 0.9
        if row["task"] == "motion" or path == "lor":
            assert "<mask>" not in question and not any(row.get("bbox", {}).values())
            continue
        frame, world, mentioned = row["main_frame_idx"], {}, []
        assert f"{['first', 'second'][frame]} image" in question
        marks = [key for key in row if key.endswith("_point")]
        for mark, view in zip(marks, row["point_img_idx"][0]):
            truth = row["3d_pos"][mark]
            assert truth["current_frame"] == view
            for k in (0, 1):  # each frame's centre, taken to the world: on the wall
                x, y, z = (
                    poses[k][:3, :3] @ truth["all_frame_3d"][str(k)]["center_cam"] + poses[k][:3, 3]
                )
                assert abs(z - 4 - x / 4) < 0.01
                world.setdefault(mark, []).append((x, y, z))
            assert math.dist(*world[mark]) < 0.001
            x, y, z = truth["all_frame_3d"][str(view)]["center_cam"]  # it is where it is drawn
            u, v = CAMERA[0] * x / z + CAMERA[2], CAMERA[1] * y / z + CAMERA[3]
            assert (
                abs(row[mark][0][0] - 1000 * u / 160) < 1
                and abs(row[mark][0][1] - 1000 * v / 120) < 1
            )
            mentioned.append((question.index(mark.replace("_", " ") + " <mask>"), view, (u, v)))
        assert row["3d_pos"][marks[0]]["current_frame"] == frame or frame == 0
        assert list(row["mask_idx"]) == [str(i) for i in range(len(marks))] and question.count(
            "<mask>"
        ) == len(marks)
        for (view, index), (_, seen_in, (u, v)) in zip(row["mask_idx"].values(), sorted(mentioned)):
            x1, y1, x2, y2 = row["bbox"][str(view)][index]
            assert view == seen_in and abs((x1 + x2) / 2 - u) < 0.1 and abs((y1 + y2) / 2 - v) < 0.1
            assert (x2 - x1, y2 - y1) == (8, 6)  # 50/1000 of 160 x 120
        centers = {
            m.replace("_", " "): {
                k: row["3d_pos"][m]["all_frame_3d"][str(k)]["center_cam"] for k in (0, 1)
            }
            for m in marks
        }
        assert rewards.detection_reward(target, centers, images=2, question=question) == 1
        if row["task"] == "distance_views":
            assert (
                abs(float(row["answer"]) - math.dist(world[marks[0]][0], world[marks[1]][0])) < 0.01
            )
        if row["task"] == "depth_views":
            assert abs(float(row["answer"]) - centers["red point"][frame][2]) < 0.006
        used.add(row["task"])
        frames.add((frame, row["3d_pos"][marks[0]]["current_frame"]))
    assert len(used) == 6 and frames == {(0, 0), (0, 1), (1, 1)}


def test_a_point_that_the_other_view_does_not_see_is_not_marked(tmp_path):
    source, _ = write_pair(tmp_path / "pairs")
    views, poses = build.read_pair(json.loads(source.read_text()), "here", tmp_path / "pairs")
    assert len(build.spots(np.random.default_rng(0), views, poses)) == build.SPOTS
    views[1].depth[:] = 1.0  # something stands before the second camera
    assert build.spots(np.random.default_rng(0), views, poses) == []


@real
def test_motion_of_real_pairs_is_what_their_authors_say(tmp_path):
    """7-Scenes; metadata: t, and angles of R = Rz(psi) Ry(phi) Rx(theta), degrees, y down."""
    for line in (REALDATA / "multiview" / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        _, poses = build.read_pair(row, "here", REALDATA / "multiview")
        said, (right, up, forward, yaw, pitch) = row["metadata"], build.camera_motion(poses[0, 1])
        np.testing.assert_allclose(
            (right, -up, forward), (said["tx"], said["ty"], said["tz"]), atol=1e-4
        )
        assert abs(yaw - said["phi"]) < 1 and abs(pitch - said["theta"]) < 1


# ---------------------------------------------------------------------------------------------------------------------
# annotation of other data sets: a box of 1 x 2 x 4 m, its corners in the camera frame written out by hand


def corner_set(obj):
    made = {
        "center": np.array(obj["center_cam"]),
        "size": np.array(obj["size_3d"]),
        "rotation": np.array(obj["R_cam"]),
    }
    assert np.linalg.det(made["rotation"]) > 0.99
    return {tuple(np.round(c, 2) + 0.0) for c in scenes.corners(made)}


def box(x, y, z):
    """Corners of an axis-aligned box from its ranges."""
    return {(float(a), float(b), float(c)) for a in x for b in y for c in z}


def test_omni3d_axes():
    """R = a quarter turn about y, z -> x: width (along the box's z) comes to lie along x, length along z."""
    annotation = {
        "category_name": "sofa",
        "center_cam": [1, 0.5, 6],
        "dimensions": [1, 2, 4],
        "R_cam": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    }
    assert corner_set(convert.omni3d_object(annotation)) == box((0.5, 1.5), (-0.5, 1.5), (4, 8))
    straight = convert.omni3d_object({**annotation, "R_cam": np.eye(3).tolist()})
    assert (
        corner_set(straight) == box((-1, 3), (-0.5, 1.5), (5.5, 6.5))
        and straight["label"] == "sofa"
    )


def test_kitti_bottom_centre_turn_and_camera_shift():
    """h 2, w 1, l 4, standing on y = 1.5; the picture's camera is 0.06 m to the right: all moves 0.06 m to its left."""
    projection = np.array([[700, 0, 600, -700 * 0.06], [0, 700, 180, 0], [0, 0, 1, 0]], float)
    fields = ["Car", "0", "0", "0", "0", "0", "9", "9", "2", "1", "4", "1", "1.5", "10"]
    ahead = convert.kitti_object([*fields, "0"], projection)
    assert corner_set(ahead) == box((-1.06, 2.94), (-0.5, 1.5), (9.5, 10.5))
    turned = convert.kitti_object([*fields, str(math.pi / 2)], projection)
    assert corner_set(turned) == box((0.44, 1.44), (-0.5, 1.5), (8, 12))
    nose = convert.kitti_object([*fields, str(math.radians(30))], projection)[
        "R_cam"
    ]  # clockwise seen from above
    np.testing.assert_allclose(
        np.array(nose)[:, 0], (math.cos(math.radians(30)), 0, -0.5), atol=1e-6
    )


def test_sunrgbd_half_sizes_flip_and_tilt():
    """Upright depth coordinates are x right, y forward, z up. Without tilt: camera = (x, -z, y). With the camera
    looking straight down, depth forward is upright down and depth up is upright forward."""
    basis, coeffs = [[0, -1, 0], [0, 0, 1], [1, 0, 0]], [-0.5, 1, 2]  # left-handed, a sign
    level = convert.sunrgbd_object("bed", [1, 6, -0.5], basis, coeffs, np.eye(3))
    assert corner_set(level) == box((-1, 3), (-0.5, 1.5), (5.5, 6.5))
    down = np.array(
        [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    )  # columns: upright coordinates of depth x, y, z
    below = convert.sunrgbd_object("bed", [1, 0.5, -6], basis, coeffs, down)
    assert corner_set(below) == box((-1, 3), (-1, 0), (5, 7))


def test_nuscenes_poses_and_quaternions():
    """The vehicle at (100, 50, 0) drives along global +y; its camera 1.5 m up looks forward. A car 10 m ahead, 2 m to
    the right, on the ground, across the road: in the picture its length lies along x."""
    half = math.sqrt(0.5)
    ego = {"translation": [100, 50, 0], "rotation": [half, 0, 0, half]}  # 90 degrees about z
    sensor = {
        "translation": [0, 0, 1.5],
        "rotation": [0.5, -0.5, 0.5, -0.5],
    }  # camera z = vehicle x
    car = {"translation": [102, 60, 1], "size": [1, 4, 2], "rotation": [1, 0, 0, 0]}
    assert corner_set(convert.nuscenes_object(car, ego, sensor, "car")) == box(
        (0, 4), (-0.5, 1.5), (9.5, 10.5)
    )
    along = convert.nuscenes_object({**car, "rotation": [half, 0, 0, half]}, ego, sensor, "car")
    assert corner_set(along) == box((1.5, 2.5), (-0.5, 1.5), (8, 12))


def write_sets(folder):
    """One picture of each data set in its own files, every time with the same box of 4 x 2 x 1 m -> {name: path}."""

    def text(path, content):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))

    camera = [[100, 0, 80], [0, 100, 60], [0, 0, 1]]
    for name in ("k/image_2/1.png", "s/image/1.jpg", "n/samples/1.png", "o/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (160, 120)).save(folder / name)
    text("k/calib/1.txt", "P2: 100 0 80 0 0 100 60 0 0 0 1 0\n\nR0_rect: 1 0 0 0 1 0 0 0 1\n")
    text(
        "k/label_2/1.txt",
        "Car 0 0 0 60 56 100 72 2 1 4 1 1.5 10 0\n"
        "DontCare -1 -1 -10 5 5 9 9 -1 -1 -1 -1 -1 -1 -10\nVan 0 0 0 60 56 100 72 2 1 4 1 1.5 -10 0\n",
    )
    text("s/calib/1.txt", "1 0 0 0 1 0 0 0 1\n100 0 0 0 100 0 80 60 1\n")
    text("s/label/1.txt", "car 60 56 40 16 1 10 -0.5 0.5 2 1 1 0\n")
    image = {"id": 7, "file_path": "o/1.png", "width": 160, "height": 120, "K": camera}
    text(
        "o.json",
        {
            "images": [image],
            "annotations": [
                {
                    "image_id": 7,
                    "category_name": "car",
                    "valid3D": valid,
                    "dimensions": [1, 2, 4],
                    "center_cam": [1, 0.5, 10],
                    "R_cam": np.eye(3).tolist(),
                    "bbox2D_tight": [-1] * 4,
                    "bbox2D_trunc": [-1] * 4,
                    "visibility": seen,
                }
                for valid, seen in ((True, -1), (False, 1), (True, 0.1))
            ],
        },
    )
    still = {"translation": [0, 0, 0], "rotation": [1, 0, 0, 0]}
    frame = {
        "token": "f",
        "sample_token": "a",
        "width": 160,
        "height": 120,
        "filename": "samples/1.png",
    }
    rows = [
        {
            "sample_token": "a",
            "instance_token": "i",
            "visibility_token": seen,
            "translation": [10, -1, -0.5],
            "rotation": [math.sqrt(0.5), 0, 0, math.sqrt(0.5)],
            "size": [1, 4, 2],
        }
        for seen in ("4", "1")
    ]
    tables = {
        "ego_pose": [{"token": "e", **still}],
        "instance": [{"token": "i", "category_token": "c"}],
        "category": [{"token": "c", "name": "vehicle.car"}],
        "sample_annotation": rows,
        "calibrated_sensor": [
            {"token": "s", **still, "rotation": [0.5, -0.5, 0.5, -0.5], "camera_intrinsic": camera},
            {"token": "lidar", **still, "camera_intrinsic": []},
        ],
        "sample_data": [
            {**frame, "calibrated_sensor_token": sensor, "ego_pose_token": "e", "is_key_frame": key}
            for sensor, key in (("s", True), ("s", False), ("lidar", True))
        ],
    }
    for name, content in tables.items():
        text(f"n/v1.0-mini/{name}.json", content)
    return {
        "kitti": folder / "k",
        "sunrgbd": folder / "s",
        "omni3d": folder / "o.json",
        "nuscenes": folder / "n" / "v1.0-mini",
    }


@pytest.mark.parametrize("name", ["kitti", "sunrgbd", "omni3d", "nuscenes"])
def test_convert_reads_the_files_of_each_data_set(name, tmp_path, monkeypatch, capsys):
    source, out = write_sets(tmp_path / "sets")[name], tmp_path / "out" / "scenes.jsonl"
    (tmp_path / "depth").mkdir()
    Image.fromarray(np.full((120, 160), 4750, np.uint16)).save(tmp_path / "depth" / "1.png")
    command(
        monkeypatch,
        "convert",
        "--from",
        name,
        source,
        "--out",
        out,
        "--depth",
        tmp_path / "depth",
        "--depth_scale",
        0.002,
    )
    (scene,) = scenes.load_scenes(out)
    (car,) = scene.objects  # DontCare, behind the camera, hidden, no 3D: left out
    assert (
        car["label"] == "car"
        and scene.intrinsics == (100, 100, 80, 60)
        and scene.depth[5, 5] == np.float32(9.5)
    )
    corners = {tuple(np.round(c, 2) + 0.0) for c in scenes.corners(car)}
    assert corners == box((-1, 3), (-0.5, 1.5), (9.5, 10.5))
    expected = (
        [60, 56, 100, 72]
        if name in ("kitti", "sunrgbd")
        else [80 - 100 / 9.5, 60 - 50 / 9.5, 80 + 300 / 9.5, 60 + 150 / 9.5]
    )  # projected by hand
    np.testing.assert_allclose(car["box"], expected, atol=0.01)
    assert "1 pictures (1 with depth), 1 objects" in capsys.readouterr().out


def test_convert_names_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    sets = write_sets(tmp_path / "sets")
    (tmp_path / "sets/k/calib/1.txt").write_text("P0: 1 2 3\n")
    (tmp_path / "sets/s/image/1.jpg").unlink()
    (tmp_path / "sets/n/v1.0-mini/category.json").unlink()
    for name, words in {"kitti": "'P2'", "sunrgbd": "1.jpg", "nuscenes": "category.json"}.items():
        with pytest.raises(SystemExit) as stop:
            command(
                monkeypatch,
                "convert",
                "--from",
                name,
                sets[name],
                "--out",
                tmp_path / "scenes.jsonl",
            )
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("scenes*"))


@real
def test_kitti_labels_give_the_published_boxes():
    """Three lines of the original label file of picture 000008, and its P2."""
    projection = np.array(
        [
            [721.5377, 0, 609.5593, 44.85728],
            [0, 721.5377, 172.854, 0.2163791],
            [0, 0, 1, 0.002745884],
        ]
    )
    lines = [
        "Car 0.88 3 -0.69 0.00 192.37 402.31 374.00 1.60 1.57 3.23 -2.70 1.74 3.68 -1.29",
        "Car 0.00 1 2.04 334.85 178.94 624.50 372.04 1.57 1.50 3.68 -1.17 1.65 7.86 1.90",
        "Car 0.00 0 1.74 741.18 168.83 792.25 208.43 1.70 1.63 4.08 7.24 1.55 33.20 1.95",
    ]
    published = [
        row
        for row in map(json.loads, (REALDATA / "scenes" / "scenes.jsonl").read_text().splitlines())
        if row["id"] == "kitti_000008"
    ]
    for line in lines:
        made = convert.kitti_object(line.split(), projection)
        (given,) = [o for o in published[0]["objects"] if o["bbox_2d"][0] == float(line.split()[4])]
        for field in ("center_cam", "size_3d", "R_cam"):
            np.testing.assert_allclose(made[field], given[field], atol=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# depth models, with random weights


@pytest.fixture(scope="module")
def depth_models(tmp_path_factory):
    """Tiny models of the real classes on disk, as from_pretrained finds them -> {kind: folder}."""
    torch.manual_seed(0)
    vit = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
    }
    eye = dict(model_type="dinov2", image_size=16, **vit)
    pro = DepthProForDepthEstimation(
        DepthProConfig(
            patch_size=16,
            fusion_hidden_size=16,
            intermediate_hook_ids=[1, 0],
            intermediate_feature_dims=[8, 8],
            scaled_images_ratios=[0.5, 1.0],
            scaled_images_overlap_ratios=[0.0, 0.2],
            scaled_images_feature_dims=[8, 8],
            num_fov_head_layers=0,
            use_fov_model=True,
            image_model_config=dict(eye),
            patch_model_config=dict(eye),
            fov_model_config=dict(eye),
        )
    )
    heads = [module for module in pro.modules() if isinstance(module, torch.nn.Conv2d)]
    next(
        m for m in reversed(heads) if m.out_channels == 1 and m in list(pro.fov_model.modules())
    ).bias.data.fill_(60)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("pro", "metric", "relative")}
    pro.save_pretrained(folders["pro"])
    (folders["pro"] / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "DepthProImageProcessor",
                "size": {"height": 64, "width": 64},
                "image_mean": [0.5] * 3,
                "image_std": [0.25] * 3,
            }
        )
    )
    for kind in ("metric", "relative"):
        DepthAnythingForDepthEstimation(
            DepthAnythingConfig(
                backbone_config=Dinov2Config(
                    image_size=32, out_indices=[1, 2], reshape_hidden_states=False, **vit
                ),
                patch_size=4,
                reassemble_hidden_size=16,
                reassemble_factors=[2, 1],
                neck_hidden_sizes=[8, 8],
                max_depth=20,
                fusion_hidden_size=8,
                head_hidden_size=8,
                depth_estimation_type=kind,
            )
        ).save_pretrained(folders[kind])
        DPTImageProcessorPil(
            size={"height": 32, "width": 32}, ensure_multiple_of=4, keep_aspect_ratio=True
        ).save_pretrained(folders[kind])
    return folders


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "in").mkdir()
    for i, size in enumerate([(64, 64), (48, 32), (64, 64), (48, 32), (64, 64)]):
        noise = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{i}.png")
    return sorted((tmp_path / "in").iterdir())


def test_depth_pro_writes_metres_and_its_focal_length(
    depth_models, pictures, tmp_path, monkeypatch
):
    out = tmp_path / "depth"
    command(
        monkeypatch, "depth", *pictures, "--model", depth_models["pro"], "--out", out, "--batch", 2
    )
    rows = {
        row["id"]: row for row in map(json.loads, (out / "depth.jsonl").read_text().splitlines())
    }
    assert len(rows) == 5 == len(list(out.glob("*.png")))
    model = DepthProForDepthEstimation.from_pretrained(depth_models["pro"]).eval()
    for i in (0, 4):  # pictures of the model's own size: no resizing before it
        image = np.asarray(Image.open(pictures[i])).astype(np.float32)
        pixels = torch.tensor((image / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
        with torch.no_grad():
            output = model(pixel_values=pixels)
        focal = 32 / math.tan(math.radians(output.field_of_view.item()) / 2)
        inverse = torch.nn.functional.interpolate(
            output.predicted_depth[None], size=(64, 64), mode="bilinear"
        )[0, 0]
        metres = 1 / np.clip(inverse.numpy() * 64 / focal, 1e-4, 1e4)
        written = np.asarray(Image.open(out / rows[str(i)]["depth"]))
        assert written.dtype == np.uint16 and 40 < focal < 70
        np.testing.assert_allclose(rows[str(i)]["intrinsics"], (focal, focal, 32, 32), rtol=1e-4)
        near = (metres > 0.002) & (metres < 65)
        assert near.mean() > 0.02
        np.testing.assert_allclose(written[near], 1000 * metres[near], rtol=1e-3, atol=1)
        assert (written[metres > 66] == 0).all()
    scene = scenes.load_scenes(out / "depth.jsonl")[0]  # and the list is a scenes.jsonl
    assert scene.depth.shape == scene.image.shape[:2] and scene.objects == []


def test_depth_resumes_and_keeps_models_apart(
    depth_models, pictures, tmp_path, monkeypatch, capsys
):
    out, words = tmp_path / "depth", ("--out", tmp_path / "depth", "--batch", 2)
    command(monkeypatch, "depth", *pictures[:3], "--model", depth_models["metric"], *words)
    assert np.asarray(Image.open(out / "0.png")).mean() == pytest.approx(
        10000, rel=0.01
    )  # sigmoid(~0) of 20 m
    assert Image.open(out / "1.png").size == (48, 32)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "1.png").unlink()
    capsys.readouterr()
    command(monkeypatch, "depth", *pictures, "--model", depth_models["metric"], *words)
    assert capsys.readouterr().out.startswith("3 pictures to do, 2 finished before")
    assert all(
        path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "1.png"
    )
    rows = [json.loads(line) for line in (out / "depth.jsonl").read_text().splitlines()]
    assert sorted(row["depth"] for row in rows) == [f"{i}.png" for i in range(5)]
    assert all(
        row["depth_scale"] == 0.001 and "intrinsics" not in row for row in rows
    )  # no focal length known
    for more, model in ((), "pro"), ((pictures[0].with_suffix(".jpg"),), "metric"):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, "depth", *pictures, *more, "--model", depth_models[model], *words)
        assert stop.value.code == 2
    assert not list(out.glob("*.partial"))


def test_relative_depth_says_so_and_is_refused_as_metres(
    depth_models, pictures, tmp_path, monkeypatch, capsys
):
    command(
        monkeypatch,
        "depth",
        pictures[0],
        "--model",
        depth_models["relative"],
        "--out",
        tmp_path / "depth",
    )
    row = json.loads((tmp_path / "depth" / "depth.jsonl").read_text())
    assert (
        "RELATIVE" in capsys.readouterr().out
        and row["relative"] is True
        and "depth_scale" not in row
    )
    assert Image.open(tmp_path / "depth" / row["depth"]).mode == "L"
    with pytest.raises(BadRow, match="holds no metres"):
        scenes.load_scenes(tmp_path / "depth" / "depth.jsonl")
    talk = [{"value": "Where is it?"}, {"value": "Here."}]
    instance = {"image": row["image"], "depth": row["depth"], "conversations": talk}
    (tmp_path / "depth" / "rows.json").write_text(json.dumps([instance]))
    with pytest.raises(BadRow, match="relative"):
        data.file_source(str(tmp_path / "depth" / "rows.json"))
