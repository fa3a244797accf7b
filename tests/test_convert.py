"""tools.convert, tools.build and tools.depth on annotation that is odd or broken.

Each file of each data set is changed, by hand and at random. A command either writes a whole file
of finite numbers that its reader takes, or ends in one line that names the file. The right values
of good files: tests/test_scenes.py.

    python -m pytest -q tests/test_convert.py
"""

import json
import re

import numpy as np
import pytest
from test_scenes import command, write_sets

from formats import scenes

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
