"""Annotated scenes and pairs of views -> instance files for sft.py and grpo.py.

    python -m tools.build --scenes scenes.jsonl --out cot.json              # traces, for sft.py
    python -m tools.build --scenes scenes.jsonl --out rl.json --rl          # only answers, for grpo.py
    python -m tools.build --pairs pairs.jsonl --out views.json              # two views of a place


The paper has its chains of thought written by a paid expert model. Here they follow from the annotation (questions.py),
for both paths, and each is checked before it is written (see `fault`).

A line of pairs.jsonl: {"id", "K", "source": {"image", "depth", "cam_to_world"}, "target": {...}}: two RGB-D views of
one place. They become questions about camera motion and about points, marked in one view and seen in both.
"""

import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

from engine.settings import parse, run_main, setting
from formats.errors import BadRow
from formats.scenes import check, numbers, project, read_lines, read_scene, unproject
from rewards import accuracy_reward, detection_reward, extract_answer, format_reward
from world.questions import (
    MARKS,
    NEEDS,
    REGION_FAMILIES,
    TEXT_ONLY,
    ask_questions,
    box_line,
    finish,
    grounding,
    rounded,
    tenths,
)


@dataclass
class Settings:
    out: str = setting(None, "instance file: a JSON list, or JSON lines if it ends in .jsonl")
    scenes: str = setting("", "annotated pictures, scenes.jsonl")
    pairs: str = setting("", "two views each, pairs.jsonl")
    rounds: int = setting(3, "most questions of each family about a picture")
    seed: int = setting(0, "of the questions")
    sensor: bool = setting(False, "centres as a depth sensor sees them, on the visible surface")
    rl: bool = setting(False, "only rows with an answer, for grpo.py: no captions, no bare boxes")
    pictures: str = setting(
        "", "copy pictures and depth there, so that the file can travel with them"
    )


POINT_REGION = 50 / 1000  # of the image's width and height: the region of a marked point
RIM = 0.06  # of the image: marked points keep this far from its border
FLAT = 0.03  # most relative change of depth in the 5 x 5 pixels of a marked point: none on an edge
AGREE = (
    0.05  # most relative difference of a point's depth in the two views: more is hidden or moved
)
LEAST = (0.05, 2)  # metres, degrees: smaller camera motion is neither asked for nor answered
SPOTS = 6  # points to choose from, a pair and round


@contextmanager
def whole(path):
    """A text file that appears under its name only when it is complete."""
    partial = f"{path}.partial"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = open(partial, "w", encoding="utf-8")
    except OSError as error:
        raise BadRow(f"--out {path}: cannot write there ({error.strerror})") from None
    try:
        with file:
            yield file
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def link(name, folder, copy, args):
    """A picture as the instances name it, relative to the folder of --out. With --pictures it is a copy, `copy`."""
    path = os.path.join(folder, name)
    if args.pictures:
        os.makedirs(args.pictures, exist_ok=True)
        path = shutil.copyfile(path, os.path.join(args.pictures, copy + os.path.splitext(name)[1]))
    return os.path.relpath(path, os.path.dirname(os.path.abspath(args.out)))


def rows_of(args):
    """All instances of --scenes and --pairs, one picture (pair) after the other: memory does not grow with them."""
    for path, made in ((args.scenes, scene_rows), (args.pairs, pair_rows)):
        for number, (line, where) in enumerate(
            tqdm(read_lines(path), desc=path, unit="") if path else ()
        ):
            seen = set()
            for row in made(line, where, number, args):
                key = json.dumps(
                    [
                        row["conversations"],
                        [v for k, v in row.items() if k.endswith(("bbox", "point"))],
                    ]
                )
                if key not in seen:  # another round may ask the same again
                    yield {**row, "id": f"{row['id']}/{len(seen)}"}
                seen.add(key)


def build(args):
    """Write the checked instances to --out; print how many of each family and path, what was dropped, and why."""
    if not args.scenes and not args.pairs or args.rounds < 1:
        raise BadRow(
            "build: needs --scenes scenes.jsonl or --pairs pairs.jsonl, and --rounds of at least 1"
        )
    kept, dropped, as_list = Counter(), Counter(), not args.out.endswith(".jsonl")
    with whole(args.out) as file:
        for row in rows_of(args):
            trace = extract_answer(row["conversations"][1]["value"]) is not None
            column = "no trace" if not trace else "dtr" if "3d_pos" in row else "lor"
            if reason := fault(row) if trace else None:
                dropped[row["task"], column, reason] += 1
                continue
            file.write(
                (",\n" if kept else "[\n") * as_list + json.dumps(row) + "\n" * (not as_list)
            )
            kept[row["task"], column] += 1
        file.write("\n]\n" * as_list)
        if not kept:
            raise BadRow(
                f"{args.scenes or args.pairs}: no question could be made: nothing annotated, or all dropped"
            )
    columns = ["lor", "dtr", "no trace"]
    print(f"{'':16}" + "".join(f"{c:>10}" for c in columns))
    for task in [*dict.fromkeys(task for task, _ in kept), "all"]:
        counts = (
            sum(n for (t, c), n in kept.items() if c == column and task in (t, "all"))
            for column in columns
        )
        print(f"{task:16}" + "".join(f"{n:10,}" for n in counts))
    for (task, path, reason), n in dropped.items():
        print(f"dropped {n:,} of {task} ({path}): {reason}")
    print(f"{sum(kept.values()):,} instances -> {args.out}")


def fault(row):
    """Why a trace must not be trained on, or None. It must be the whole grammar of its path; its own answer must be the
    right letter or score above 0.9 (lengths are written in tenths of a metre: too coarse for some below 1 m); and its
    centres must earn the full detection reward (rounding to tenths moves a centre by 0.087 m at most, 0.1 m is paid in
    full)."""
    question, target = (turn["value"] for turn in row["conversations"])
    images = len(row["image"]) if isinstance(row["image"], list) else 1
    score = accuracy_reward(target, row["answer"])
    if format_reward(target, "dtr" if "3d_pos" in row else "lor", images) < 1:
        return "not the grammar of its path"
    if score <= 0.9:
        return (
            "its own answer scores 0.9 or less: tenths of a metre are too coarse"
            if score
            else "its answer is wrong"
        )
    centers = {
        mark.replace("_", " "): {
            int(k): frame["center_cam"] for k, frame in truth["all_frame_3d"].items()
        }
        if images > 1
        else truth["center_cam"]
        for mark, truth in row.get("3d_pos", {}).items()
    }
    if centers and detection_reward(target, centers, images, question) < 1:
        return "its centres are off"
    return None


def scene_rows(line, where, number, args):
    """Questions about one annotated picture: --rounds of each family, but for those that need no picture."""
    folder = Path(args.scenes).parent
    scene = read_scene(line, where, folder)
    files = {
        field: link(line[field], folder, f"{number:06d}{end}", args)
        for field, end in (("image", ""), ("depth", "_depth"))
        if line.get(field)
    }
    files["image_hw"] = list(
        scene.image.shape[:2]
    )  # of the file, whatever picture a row was made with
    if "depth" in files and "depth_scale" in line:
        files["depth_scale"] = line["depth_scale"]
    for k in range(args.rounds):
        seed = 1000 * args.seed + k
        more = [] if args.rl else grounding(scene, seed, args.sensor)
        for row in ask_questions(scene, seed, args.sensor) + [
            row for row in more if row["task"] not in TEXT_ONLY
        ]:
            yield {
                **{key: value for key, value in row.items() if key not in ("source", "depth")},
                **files,
            }


def read_pair(line, where, folder):
    """A line of pairs.jsonl -> two Scenes without objects; poses (2, 2, 4, 4), [k, i] takes view i's points to k's."""
    views, poses = [], []
    for side in ("source", "target"):
        given = line.get(side)
        check(
            isinstance(given, dict) and given.get("depth"),
            where,
            side,
            "must be {image, depth, cam_to_world}",
        )
        shared = {key: line[key] for key in ("id", "K", "intrinsics", "depth_scale") if key in line}
        views.append(read_scene({**shared, **given, "objects": []}, f"{where}: {side}", folder))
        pose = numbers(given, "cam_to_world", (4, 4), where, f"{side}.")
        rigid = (
            np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=0.01)
            and (pose[3] == (0, 0, 0, 1)).all()
        )
        check(
            rigid,
            where,
            f"{side}.cam_to_world",
            "must be a rotation and a position in metres, last row 0, 0, 0, 1",
        )
        poses.append(pose)
    return views, np.array([[np.linalg.inv(to) @ of for of in poses] for to in poses])


def camera_motion(second):
    """Pose (4, 4) of the second camera in the frame of the first -> metres right, up, forward, degrees right, up.
    Rotation is where the second camera looks; its roll is no part of the answer."""
    (x, y, z), (look_x, look_y, look_z) = second[:3, 3], second[:3, 2]
    return [
        x,
        -y,
        z,
        np.degrees(np.arctan2(look_x, look_z)),
        np.degrees(np.arcsin(np.clip(-look_y, -1, 1))),
    ]


def aligned(frame, lines):
    """The <detect> block of several images: centres in the frame of one of them."""
    header = f"After aligning to the reference frame {frame}, find {len(lines)} relevant objects:"
    return "<detect>" + "\n".join([header, *lines]) + "</detect>\n"


def motion_rows(second, row):
    """How the camera moved, as signed axes; the trace of LOR names the directions, that of DTR the new pose."""
    named = []
    for i, value in enumerate(camera_motion(second)):
        plus, minus = [
            ("move_right", "move_left"),
            ("move_up", "move_down"),
            ("move_forward", "move_back"),
            ("rotate_right", "rotate_left"),
            ("rotate_up", "rotate_down"),
        ][i]
        if abs(value) >= LEAST[i > 2]:
            named.append(f"{plus if value > 0 else minus}:{abs(value):.{0 if i > 2 else 2}f}")
    if not named:
        return
    question = (
        "How did the camera move from the first image to the second? Name motion of at least "
        f"{LEAST[0]} meters or {LEAST[1]} degrees, like this: move_left:0.30,rotate_up:5"
    )
    words = [
        part.partition(":")[0].replace("move_", "moves ").replace("rotate_", "turns ")
        for part in named
    ]
    at, look = (
        ",".join(f"{name}:{v:.2f}" for name, v in zip("xyz", second[:3, c])) for c in (3, 2)
    )
    derived = f"In the frame of the first camera the second one is at {at} and looks along {look}."
    for path, target in (
        ("lor", finish(f"The camera {', '.join(words)}.", ",".join(named))),
        ("dtr", aligned(0, []) + finish(derived, ",".join(named))),
    ):
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": target}]
        more = (
            {"bbox": {"0": [], "1": []}, "mask_idx": {}, "3d_pos": {}, "main_frame_idx": 0}
            if path == "dtr"
            else {}
        )
        yield {
            **row,
            "id": f"{row['id']}/motion/{path}",
            "task": "motion",
            "conversations": talk,
            "answer": ",".join(named),
            **more,
        }


def spots(rng, views, poses):
    """Points of one view that the other sees too: [{view, pixel, frames: (2, 3) metres in each camera's frame}]."""
    found = []
    for _ in range(50 * SPOTS):
        i = int(rng.integers(2))
        (h, w), other = views[i].depth.shape, views[1 - i]
        x, y = int(rng.uniform(RIM, 1 - RIM) * w), int(rng.uniform(RIM, 1 - RIM) * h)
        patch = views[i].depth[y - 2 : y + 3, x - 2 : x + 3]
        if not np.isfinite(patch).all() or np.ptp(patch) > FLAT * patch.mean():
            continue
        here = unproject(views[i].depth[y : y + 1, x : x + 1], views[i].intrinsics, x, y)[0, 0]
        there = poses[1 - i, i, :3, :3] @ here + poses[1 - i, i, :3, 3]
        if there[2] < 0.1:
            continue
        (u, v), (h, w) = project(there, other.intrinsics), other.depth.shape
        if not (RIM * w < u < (1 - RIM) * w and RIM * h < v < (1 - RIM) * h):
            continue
        if abs(other.depth[int(v), int(u)] - there[2]) <= AGREE * there[2]:  # false for NaN
            found.append(
                {
                    "view": i,
                    "pixel": (x + 0.5, y + 0.5),
                    "label": "spot",
                    "color": None,
                    "frames": np.array([here, there] if i == 0 else [there, here]),
                }
            )
            if len(found) == SPOTS:
                break
    return found


def spoken(text):
    """What questions.py says of a box that holds an object, about a point."""
    return text.replace(" holds a spot ", " is ").replace("bbox", "point")


def point_rows(rng, views, poses, row):
    """The region families about points. Reference frame: the image of the first mark, or the first if that is named."""
    points = spots(rng, views, poses)
    for task, family in REGION_FAMILIES.items():
        for k in map(int, rng.permutation(2)):
            objects = [{**p, "center": p["frames"][k]} for p in points]
            ask = family(rng, objects) if len(objects) >= NEEDS.get(task, 1) else None
            solved = ask and ask.solve([tenths(p["center"]) for p in ask.marked])
            if solved and (k == 0 or ask.marked[0]["view"] == 1):
                break
        else:
            continue
        marks = [mark.replace("bbox", "point") for mark in MARKS[: len(ask.marked)]]
        size = [(view.image.shape[1], view.image.shape[0]) for view in views]
        drawn = {
            mark.replace(" ", "_"): [
                [round(1000 * v / s) for v, s in zip(p["pixel"], size[p["view"]])]
            ]
            for mark, p in zip(marks, ask.marked)
        }
        base = {
            **row,
            **drawn,
            "task": f"{task}_views",
            "answer": ask.answer,
            "point_img_idx": [[p["view"] for p in ask.marked]],
        }
        question = f"Seen from the {['first', 'second'][k]} image: {spoken(ask.text)}"
        target = finish(spoken(ask.words), rounded(ask.answer))
        yield {
            **base,
            "id": f"{row['id']}/{task}/lor",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": target},
            ],
        }

        lines = [
            box_line(tenths(p["center"]), f"point ({mark})") for p, mark in zip(ask.marked, marks)
        ]
        target = aligned(k, lines) + finish(*map(spoken, solved))
        boxes, index = {"0": [], "1": []}, {}
        for mark, p in sorted(zip(marks, ask.marked), key=lambda pair: question.find(pair[0])):
            reach = [POINT_REGION / 2 * s for s in size[p["view"]]]
            boxes[str(p["view"])].append(
                [
                    float(np.clip(c + sign * r, 0, s))
                    for sign in (-1, 1)
                    for c, r, s in zip(p["pixel"], reach, size[p["view"]])
                ]
            )
            index[str(len(index))] = [p["view"], len(boxes[str(p["view"])]) - 1]
            question = question.replace(mark, f"{mark} <mask>", 1)
        truth = {
            mark.replace(" ", "_"): {
                "current_frame": p["view"],
                "instance_name": "point",
                "all_frame_3d": {
                    str(i): {"center_cam": [round(float(v), 4) for v in p["frames"][i]]}
                    for i in (0, 1)
                },
            }
            for mark, p in zip(marks, ask.marked)
        }
        yield {
            **base,
            "id": f"{row['id']}/{task}/dtr",
            "bbox": boxes,
            "mask_idx": index,
            "3d_pos": truth,
            "main_frame_idx": k,
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": target},
            ],
        }


def pair_rows(line, where, number, args):
    """Questions about one pair of views: its camera motion, and --rounds of each family about points."""
    folder = Path(args.pairs).parent
    views, poses = read_pair(line, where, folder)
    names = [
        (line[side][field], f"pair{number:06d}_{side}{end}")
        for field, end in (("image", ""), ("depth", "_depth"))
        for side in ("source", "target")
    ]
    files = [link(name, folder, copy, args) for name, copy in names]
    row = {
        "id": views[0].id,
        "image": files[:2],
        "depth": files[2:],
        "intrinsics": [list(v.intrinsics) for v in views],
        "image_hw": list(views[0].image.shape[:2]),
    }
    scales = [{**line, **line[side]}.get("depth_scale", 0.001) for side in ("source", "target")]
    check(scales[0] == scales[1], where, "depth_scale", "must be the same for both views")
    row.update({"depth_scale": scales[0]} if scales[0] != 0.001 else {})
    yield from motion_rows(poses[0, 1], row)
    for k in range(args.rounds):
        yield from point_rows(
            np.random.default_rng([crc32(views[0].id.encode()), args.seed, k]), views, poses, row
        )


def main():
    build(parse(Settings, __doc__))


if __name__ == "__main__":
    run_main(main)
