"""tools.convert, tools.build and tools.depth on annotation that is odd or broken.

Each file of each data set is changed, by hand and at random. A command either writes a whole file
of finite numbers that its reader takes, or ends in one line that names the file. The right values
of good files: tests/test_scenes.py.

    python -m pytest -q tests/test_convert.py
"""

import copy
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import command, depth_models, pictures, write_pair, write_scenes, write_sets

from engine.output import whole_file
from formats import scenes
from formats.errors import UserError
from tools import build, depth
from tools import convert as converter

__all__ = ["depth_models", "pictures"]  # fixtures
FORMATS = ["kitti", "sunrgbd", "omni3d", "nuscenes"]


def convert(monkeypatch, capsys, name, source, out):
    """Run tools.convert -> (the objects of its scenes, what it printed)."""
    command(monkeypatch, "convert", "--from", name, source, "--out", out)
    said = capsys.readouterr().out
    return [obj for scene in scenes.load_scenes(out) for obj in scene.objects], said


def refused(monkeypatch, capsys, *words):
    """The one line with which a command ends in exit code 2."""
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *words)
    lines = capsys.readouterr().err.split("error: ")
    assert end.value.code == 2 and len(lines) == 2
    assert lines[1].count("\n") == 1 and len(lines[1]) <= 300
    return lines[1]


def change(path, make):
    """Change what a JSON file holds; make(content) works in place."""
    content = json.loads(path.read_text())
    make(content)
    path.write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------------
# what the picture does not show


OMNI3D = [
    ({"lidar_pts": 0}, "lidar_pts"),
    ({"segmentation_pts": 0}, "segmentation_pts"),
    ({"depth_error": 0.51}, "depth_error"),
    ({"truncation": 0.99}, "truncation"),
    ({"truncation": 1}, "truncation"),
    ({"visibility": 0}, "visibility"),
    ({"visibility": 0.33}, "visibility"),
    ({"behind_camera": True}, "behind_camera"),
    ({"valid3D": False, "dimensions": [-1] * 3, "R_cam": -1}, "valid3D"),
    ({"ignore": 1}, "ignore"),
    ({"ignore3D": True}, "ignore"),
    ({"iscrowd": 1}, "iscrowd"),
    ({"category_name": "dontcare"}, "category_name"),
    ({"image_id": 8}, "not listed"),
    ({"dimensions": [1, 0, 4]}, "without size"),
]
UNKNOWN = {
    **dict.fromkeys(["lidar_pts", "segmentation_pts", "depth_error", "truncation"], -1),
    "visibility": -1,
    "behind_camera": -1,
}


@pytest.mark.parametrize("fields, reason", OMNI3D)
def test_omni3d_objects_that_cannot_be_seen_are_left_out(
    fields, reason, tmp_path, monkeypatch, capsys
):
    source = write_sets(tmp_path)["omni3d"]

    def add(data):
        good = data["annotations"][0]
        data["annotations"] = [{**good, **UNKNOWN}, {**good, **UNKNOWN, **fields}]

    change(source, add)
    objects, said = convert(monkeypatch, capsys, "omni3d", source, tmp_path / "s.jsonl")
    assert len(objects) == 1
    assert re.search(rf"left out 1 objects: .*{reason}", said)


@pytest.mark.parametrize(
    "fields",
    [
        UNKNOWN,
        dict.fromkeys(UNKNOWN),
        {"lidar_pts": 1, "segmentation_pts": 1, "depth_error": 0.5},
        {"truncation": 0.98, "visibility": 0.34, "behind_camera": False, "ignore": 0},
    ],
)
def test_omni3d_objects_that_can_be_seen_are_kept(fields, tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)["omni3d"]
    change(source, lambda data: data["annotations"][0].update(fields))
    objects, said = convert(monkeypatch, capsys, "omni3d", source, tmp_path / "s.jsonl")
    assert len(objects) == 1 and said.count("left out 1 objects") == 2  # as without the fields


@pytest.mark.parametrize(
    "line, kept",
    [
        ("Car 0.5 2 0 60 56 100 72 2 1 4 1 1.5 10 0", True),
        ("Car -1 -1 0 60 56 100 72 2 1 4 1 1.5 10 0", True),  # not known: results have no such
        ("Car 0 0 0 60 56 100 72 2 1 4 1 1.5 10 0 0.9", True),  # with a score
        ("Person sitting 0 0 0 60 56 100 72 2 1 4 1 1.5 10 0", True),
        ("Car 0.51 0 0 60 56 100 72 2 1 4 1 1.5 10 0", "truncated"),
        ("Car 0 3 0 60 56 100 72 2 1 4 1 1.5 10 0", "occluded 3"),
        ("DontCare -1 -1 -10 5 5 9 9 -1 -1 -1 -1000 -1000 -1000 -10", "DontCare"),
    ],
)
def test_kitti_keeps_what_its_benchmark_counts(line, kept, tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)["kitti"]
    (source / "label_2" / "1.txt").write_text(line)
    objects, said = convert(monkeypatch, capsys, "kitti", source, tmp_path / "s.jsonl")
    if kept is True:
        (obj,) = objects
        assert obj["label"] == " ".join(re.findall("[A-Za-z]+", line)).lower()
        np.testing.assert_allclose(obj["center"], (1, 0.5, 10))
        assert "left out" not in said
    else:
        assert not objects and re.search(rf"left out 1 objects: .*{kept}", said)


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({"num_lidar_pts": 0, "num_radar_pts": 0}, False),
        ({"num_lidar_pts": 0, "num_radar_pts": 1}, True),
        ({"num_lidar_pts": 1, "num_radar_pts": 0}, True),
        ({"num_lidar_pts": 0}, True),  # the other is not known
        ({"visibility_token": "1"}, False),
        ({"visibility_token": "2"}, True),
    ],
)
def test_nuscenes_objects_without_points_are_left_out(fields, kept, tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)["nuscenes"]
    change(source / "sample_annotation.json", lambda rows: (rows.pop(), rows[0].update(fields)))
    objects, said = convert(monkeypatch, capsys, "nuscenes", source, tmp_path / "s.jsonl")
    assert len(objects) == kept and ("left out 1 objects" in said) != kept


# ----------------------------------------------------------------------------------------------
# files as they are found


SUN_LINE = "car 60 56 40 16 1 10 -0.5 0.5 2 1 1 0\n"


@pytest.mark.parametrize(
    "text",
    [
        SUN_LINE,
        f"\n  \n{SUN_LINE}\n\n",
        SUN_LINE.replace("\n", "\r\n"),
        f"\ufeff{SUN_LINE}",
        f"\ufeff\n{SUN_LINE}",
        SUN_LINE.strip(),
        SUN_LINE.replace(" ", "\t"),
        SUN_LINE.replace("car", "night  stand"),
        SUN_LINE.replace("car", "2 seater"),
    ],
)
def test_sunrgbd_lines_are_read_however_they_are_written(text, tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)["sunrgbd"]
    (source / "label" / "1.txt").write_bytes(text.encode())
    (obj,), _ = convert(monkeypatch, capsys, "sunrgbd", source, tmp_path / "s.jsonl")
    assert obj["label"] in ("car", "night stand", "2 seater")
    np.testing.assert_allclose(obj["center"], (1, 0.5, 10))
    np.testing.assert_allclose(obj["box"], (60, 56, 100, 72))


def test_a_box_without_heading_is_left_out(tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)["sunrgbd"]
    label = source / "label" / "1.txt"
    label.write_text(SUN_LINE + SUN_LINE.replace(" 1 0\n", " 0 0\n"))
    objects, said = convert(monkeypatch, capsys, "sunrgbd", source, tmp_path / "s.jsonl")
    assert len(objects) == 1 and "left out 1 objects" in said and "orientation 0 0" in said


def test_a_picture_without_objects_is_a_scene(tmp_path, monkeypatch, capsys):
    sets = write_sets(tmp_path)
    for name, label in (("kitti", "label_2/1.txt"), ("sunrgbd", "label/1.txt")):
        (sets[name] / label).write_text("")
        objects, said = convert(monkeypatch, capsys, name, sets[name], tmp_path / "s.jsonl")
        assert objects == [] and "1 pictures" in said


BROKEN = [
    ("sunrgbd", "label/1.txt", "car 60 56 40 16 1 10 -0.5 0.5 2 1 1", "label/1.txt:1"),
    ("sunrgbd", "label/1.txt", f"{SUN_LINE}car 1 {SUN_LINE[4:]}", "label/1.txt:2"),
    ("sunrgbd", "label/1.txt", SUN_LINE[4:], "label/1.txt:1"),
    ("sunrgbd", "label/1.txt", SUN_LINE.replace("56", "nan"), "label/1.txt:1"),
    ("sunrgbd", "label/1.txt", SUN_LINE.replace("2", "1e400"), "label/1.txt:1"),
    ("sunrgbd", "label/1.txt", b"\xff\xfec\x00a\x00r\x00", "label/1.txt"),
    ("sunrgbd", "calib/1.txt", "", "calib/1.txt"),
    ("sunrgbd", "calib/1.txt", "1 0 0 0 1 0 0 0 1\n", "calib/1.txt"),
    ("sunrgbd", "calib/1.txt", "1 0 0 0 1 0 0 0 1\n1 0 0\n", "calib/1.txt:2"),
    ("sunrgbd", "calib/1.txt", "2 0 0 0 1 0 0 0 1\n100 0 0 0 100 0 80 60 1\n", "calib/1.txt:1"),
    ("sunrgbd", "calib/1.txt", "1 0 0 0 1 0 0 0 1\n100 0 80 0 100 60 0 0 1\n", "calib/1.txt:2"),
    ("kitti", "label_2/1.txt", "\nCar 0 0 x 60 56 100 72 2 1 4 1 1.5 10 0", "label_2/1.txt:2"),
    ("kitti", "label_2/1.txt", "Car 0 0 0 60 56 100 72 2 1 4 1 1.5 10", "label_2/1.txt:1"),
    ("kitti", "label_2/1.txt", "Car 0 0 0 60 56 100 72 2 1 4 1 1.5 inf 0", "label_2/1.txt:1"),
    ("kitti", "calib/1.txt", "P2: 1 2 3\n", "calib/1.txt:1"),
    ("kitti", "calib/1.txt", "P2: 100 100 80 0 100 100 60 0 0 0 1 0", "calib/1.txt:1"),
    ("kitti", "calib/1.txt", "P2: 1e-300 0 80 9 0 100 60 0 0 0 1 0", "label_2/1.txt:1"),
    ("omni3d", "o.json", "", "o.json"),
    ("omni3d", "o.json", "[]", "o.json"),
    ("omni3d", "o.json", "[" * 99_999, "o.json"),
    ("omni3d", "o.json", '{"images": {}, "annotations": []}', "images"),
    ("omni3d", "o.json", '{"images": [7], "annotations": []}', "images[0]"),
    ("omni3d", "o.json", '{"images": [], "annotations": [{}]}', "annotations[0]"),
    ("nuscenes", "category.json", "{}", "category.json"),
    ("nuscenes", "category.json", "[[]]", "category.json: row 0"),
    (
        "nuscenes",
        "instance.json",
        '[{"token": "i", "category_token": "x"}]',
        "instance.json: row 0",
    ),
]


@pytest.mark.parametrize("name, file, content, place", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(
    name, file, content, place, tmp_path, monkeypatch, capsys
):
    source = write_sets(tmp_path / "sets")[name]
    content = content if isinstance(content, bytes) else content.encode()
    (source if name == "omni3d" else source / file).write_bytes(content)
    out = tmp_path / "s.jsonl"
    line = refused(monkeypatch, capsys, "convert", "--from", name, source, "--out", out)
    assert f"{place}" in line and [path.name for path in tmp_path.iterdir()] == ["sets"]


@pytest.mark.parametrize("name", FORMATS)
def test_convert_replaces_nothing_that_it_reads(name, tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)[name]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    mine = [path for path in files if source in (path, *path.parents)]
    mine += tmp_path.glob("n/samples/*") if name == "nuscenes" else []
    mine += tmp_path.glob("o/*") if name == "omni3d" else []
    for path in mine:
        refused(monkeypatch, capsys, "convert", "--from", name, source, "--out", path)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


def test_folders_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    source = write_sets(tmp_path)["omni3d"]
    for flag in ("--images", "--depth"):
        words = ("convert", "--from", "omni3d", source, "--out", tmp_path / "s.jsonl", flag, "no")
        assert f"{flag} no: no such folder" in refused(monkeypatch, capsys, *words)


# ----------------------------------------------------------------------------------------------
# tools.build


@pytest.mark.parametrize("name, value", [("id", "\ud800"), ("id", "a\nb"), ("id", "")])
@pytest.mark.parametrize("kind", ["scenes", "pairs"])
def test_an_id_may_be_any_text(kind, name, value, tmp_path, monkeypatch):
    source = write_scenes(tmp_path / "set", [1]) if kind == "scenes" else None
    source = source or write_pair(tmp_path / "pairs")[0]
    row = {**json.loads(source.read_text().splitlines()[0]), name: value}
    source.write_text(json.dumps(row))
    command(monkeypatch, "build", f"--{kind}", source, "--out", tmp_path / "o.json")
    rows = json.loads((tmp_path / "o.json").read_text())
    shown = value.replace("\ud800", "\ufffd")
    assert rows and all(made["id"].startswith(f"{shown}/") for made in rows)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 20), (40, 30)])
def test_views_may_be_tiny(size, tmp_path, monkeypatch):
    source, _ = write_pair(tmp_path / "pairs")
    for path in (tmp_path / "pairs").glob("*.png"):
        Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)
    out = tmp_path / "o.json"
    command(monkeypatch, "build", "--pairs", source, "--out", out, "--rounds", 9)
    assert {"motion"} <= {row["task"] for row in json.loads(out.read_text())}


def test_build_replaces_no_picture(tmp_path, monkeypatch, capsys):
    source = write_scenes(tmp_path / "set", [1])
    for name in ("1.png", "1_d.png"):
        path = tmp_path / "set" / "pictures" / name
        before = path.read_bytes()
        refused(monkeypatch, capsys, "build", "--scenes", source, "--out", path)
        assert path.read_bytes() == before
    copy_of = tmp_path / "copies" / "000000.png"
    words = ("build", "--scenes", source, "--pictures", copy_of.parent, "--out", copy_of)
    refused(monkeypatch, capsys, *words)
    assert sorted(os.listdir(tmp_path)) == ["copies", "set"]


def test_a_copy_that_was_stopped_leaves_no_half_picture(tmp_path, monkeypatch):
    source = write_scenes(tmp_path / "set", [1])

    def stopped(picture, file):
        file.write(picture.read(10))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", stopped)
    args = build.Settings(str(tmp_path / "o.json"), str(source), pictures=str(tmp_path / "copies"))
    with pytest.raises(KeyboardInterrupt):
        build.build(args)
    assert not list((tmp_path / "copies").iterdir()) and not (tmp_path / "o.json").exists()
    monkeypatch.undo()
    build.build(args)  # and the next run goes through
    made = (tmp_path / "copies" / "000000.png").read_bytes()
    assert made == (tmp_path / "set" / "pictures" / "1.png").read_bytes()


def test_a_binary_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    with whole_file(path, binary=True) as file:
        file.write(b"\xff\n")
        assert not path.exists()
    with pytest.raises(KeyError), whole_file(path, binary=True) as file:
        raise KeyError
    assert path.read_bytes() == b"\xff\n" and os.listdir(tmp_path) == ["a.png"]


# ----------------------------------------------------------------------------------------------
# tools.depth


def depth_words(pictures, model, folder):
    return ("depth", *pictures, "--model", model, "--out", folder)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "nothing",
        '{"depth": 7, "model": "M"}',
        '{"depth": null, "model": "M"}',
        '{"depth": "0.png"}',
        '{"depth": "0.png", "model": ["M"]}',
        '{"depth": "0.png", "model": "another"}',
    ],
)
def test_a_broken_list_of_maps_is_one_line(
    line, depth_models, pictures, tmp_path, monkeypatch, capsys
):
    model, out = depth_models["metric"], tmp_path / "depth"
    command(monkeypatch, *depth_words(pictures[:1], model, out))
    listed = out / "depth.jsonl"
    whole = listed.read_text() + line.replace('"M"', json.dumps(str(model)))
    listed.write_text(whole)
    said = refused(monkeypatch, capsys, *depth_words(pictures, model, out))
    assert "depth.jsonl:2" in said and listed.read_text() == whole
    assert len(list(out.iterdir())) == 2


def test_maps_replace_no_picture(depth_models, pictures, tmp_path, monkeypatch, capsys):
    model = depth_models["metric"]
    (tmp_path / "more").mkdir()
    twin = tmp_path / "more" / f"{pictures[0].stem}.jpg"
    Image.new("RGB", (9, 9)).save(twin)
    before = pictures[0].read_bytes()
    # Beside the picture lies another with the name of its map.
    said = refused(monkeypatch, capsys, *depth_words([twin], model, pictures[0].parent))
    assert pictures[0].name in said
    said = refused(monkeypatch, capsys, *depth_words([pictures[0], twin], model, tmp_path / "d"))
    assert str(twin) in said and str(pictures[0]) in said
    refused(monkeypatch, capsys, *depth_words(pictures, model, twin))
    assert pictures[0].read_bytes() == before and not (tmp_path / "d").exists()


def test_a_map_that_was_stopped_leaves_no_half_file(
    depth_models, pictures, tmp_path, monkeypatch, capsys
):
    words = depth_words(pictures[:2], depth_models["metric"], tmp_path / "depth")

    def stopped(image, file, format):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stopped)
        with pytest.raises(SystemExit) as end:
            command(patch, *words)
    assert end.value.code == 130
    assert os.listdir(tmp_path / "depth") == ["depth.jsonl"]
    command(monkeypatch, *words)
    assert len(os.listdir(tmp_path / "depth")) == 3


def spoil(folder, how):
    """Make a model's folder one that cannot be used."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "pickle":
        weights.unlink()
        torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    elif how == "code":
        (folder / "mine.py").write_text("open('ran', 'w')\nclass Config: pass\n")
        auto = {"AutoConfig": "mine.Config", "AutoModelForDepthEstimation": "mine.Config"}
        change(config, lambda content: content.update(model_type="mine", auto_map=auto))
    elif how == "another kind":
        change(config, lambda content: content.update(model_type="bert"))
    elif how == "no config":
        config.unlink()
    elif how == "no JSON":
        config.write_text("{")
    elif how == "another shape":
        change(config, lambda content: content.update(head_hidden_size=16))


@pytest.mark.parametrize(
    "how", ["cut off", "pickle", "code", "another kind", "no config", "no JSON", "another shape"]
)
def test_a_model_that_cannot_be_used_is_one_line(
    how, depth_models, pictures, tmp_path, monkeypatch, capsys
):
    model, out = tmp_path / "model", tmp_path / "depth"
    shutil.copytree(depth_models["metric"], model)
    spoil(model, how)
    monkeypatch.chdir(tmp_path)
    assert "--model" in refused(monkeypatch, capsys, *depth_words(pictures, model, out))
    assert not (tmp_path / "ran").exists() and not out.exists()


def test_depth_that_is_not_finite_is_not_written(depth_models, pictures):
    model, processor = depth.load_depth_model(str(depth_models["metric"]))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        depth.predict(model, processor, [Image.open(pictures[0]).convert("RGB")])


# ----------------------------------------------------------------------------------------------
# at random: one or two changes of one file


ODD = [
    *(None, True, False, 0, -1, 1, 3, 0.5, 1e-300, 1e300, 10**400, float("nan"), float("inf")),
    *("", " ", "1", "x", "\ud800", "a\nb\0", "x" * 200),
    *([], [1], [[1, 2], [3]], [[[1, 2]], [3, 4]], {}, {"a": 1}),
]
WORDS = [
    *("", "nan", "-inf", "1e400", "1e-320", "x", "\n\n", "\r", "0", "-1", "1e8", "3", "\0"),
    *("\u2028", "1 1 1 1", "é", "0x1", ":"),
]


def places(value, place=()):
    """The places of all values in nested lists and dicts: ("images", 0, "K")."""
    keys = ()
    if isinstance(value, dict):
        keys = value.keys()
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield (*place, key)
        yield from places(value[key], (*place, key))


def changed_json(text, rng):
    """JSON with a value dropped, doubled or replaced."""
    content = json.loads(text)
    *parents, key = rng.choice(list(places(content)) or [()]) or [None]
    if key is None:
        return json.dumps(rng.choice(ODD))
    parent = content
    for step in parents:
        parent = parent[step]
    how = rng.choice(["drop", "double", "replace", "replace"])
    if how == "drop":
        del parent[key]
    elif how == "double" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(content)


def changed_words(text, rng):
    """Text with a word dropped, replaced or one more."""
    words = text.replace("\n", " \n ").split(" ")
    place = rng.randrange(len(words))
    words[place : place + rng.randint(0, 1)] = [rng.choice(WORDS)]
    return " ".join(words)


def change_file(path, rng):
    """Change a file at random, as by hand, by a program that was stopped, or by a broken disk."""
    content = path.read_bytes()
    how = rng.choice(["gone", "folder", "empty", "cut", "byte", "mark", *["value"] * 24])
    if how in ("gone", "folder"):
        path.unlink()
    if how == "folder":
        path.mkdir()
    if how in ("gone", "folder"):
        return
    place = rng.randrange(len(content))
    if how == "empty":
        content = b""
    elif how == "cut":
        content = content[:place]
    elif how == "byte":
        content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    elif how == "mark":
        content = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    else:
        change_text = changed_words if path.suffix == ".txt" else changed_json
        for _ in range(rng.randint(1, 2)):
            content = change_text(content.decode(), rng).encode()
    path.write_bytes(content)


def refuse_constant(name):
    raise AssertionError(f"{name} was written")


@pytest.mark.parametrize("name", [*FORMATS, "scenes", "pairs"])
def test_any_input_ends_in_a_whole_file_or_in_one_line(name, tmp_path):
    good, work, out = tmp_path / "good", tmp_path / "work", tmp_path / "out.jsonl"
    if name in FORMATS:
        source = write_sets(good)[name]
    else:
        source = write_scenes(good, [1]) if name == "scenes" else write_pair(good)[0]
    texts = [source] if source.is_file() else sorted(source.rglob("*"))
    texts = [path for path in texts if path.suffix in (".txt", ".json", ".jsonl")]
    folder = source.parent if source.is_file() else source
    source = work / source.relative_to(folder)
    done = {True: 0, False: 0}
    for seed in range(120):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        rng = random.Random(seed)
        change_file(work / rng.choice(texts).relative_to(folder), rng)
        before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        try:
            if name in FORMATS:
                converter.convert(converter.Settings(str(source), name, str(out)))
            else:
                build.build(build.Settings(str(out), rounds=1, **{name: str(source)}))
        except UserError as error:
            line = str(error).replace(str(tmp_path), "")
            assert str(work) in str(error) and "\n" not in line and len(line) <= 280, seed
            assert not out.exists(), seed
            done[False] += 1
        else:
            for line in out.read_text().splitlines():
                json.loads(line, parse_constant=refuse_constant)
            done[True] += 1
            out.unlink()
        assert before == {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        assert not list(tmp_path.rglob("*.partial")), seed
    assert all(done.values())
