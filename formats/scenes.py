"""Scenes: a picture, its depth, the camera, and the 3D box of every object, in one record.

Questions and rewards are made from scenes. In this order: the record `Scene`; its geometry; the
reader `load_scenes("scenes.jsonl")` of RGB-D pictures with annotated 3D boxes. Synthetic scenes,
in the same record, come from world/raycast.py. Instance files are made by tools/build.py:

    python -m tools.build --scenes scenes.jsonl --out cot.json

A line of scenes.jsonl, one picture:

    {"id": "room 7", "image": "7.jpg", "depth": "7.png", "K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]],
     "objects": [{"label": "night_stand", "bbox_2d": [x1, y1, x2, y2], "center_cam": [x, y, z],
                  "size_3d": [sx, sy, sz], "R_cam": 3 x 3}]}

Files are relative to the folder of the jsonl. depth is optional: a 16-bit PNG of the image's size,
0 = no measurement, depth_scale metres per unit (default 0.001). intrinsics, [fx, fy, cx, cy], may
stand in place of K. R_cam is optional: without it the box's axes are those of the camera.

Coordinates: metres in the camera frame, x right, y down, z forward. Depth is z, not the length of
the ray. Pixels: column i covers [i, i + 1) and its ray goes through i + 0.5; a box x1, y1, x2, y2
ends before x2 and y2.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats import pictures
from formats.errors import BadRow, quote
from formats.values import is_number, tidy

# Share of its side by which a 2D box may leave the image, to be clipped to it; more is an error.
STICK_OUT = 0.05


@dataclass
class Scene:
    """One picture and what is in it.

    An object is a dict: label ("sphere", "night stand"); color, a name or None; box, x1, y1, x2, y2
    of the visible part in pixels; center (3,) of the 3D box, not of its surface; size (3,), full
    lengths along the box's own axes; rotation (3, 3), these axes as columns; surface (3,), the mean
    or median of the points that a depth sensor sees of the object, or None.
    """

    id: str
    image: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray | None  # (H, W) float32 metres, NaN = no measurement; None = no depth at all
    intrinsics: tuple  # fx, fy, cx, cy in pixels
    objects: list
    source: str  # "seed 7" or "scenes.jsonl:3", for error messages
    # (H, W) int8, index of the object seen, -1 = none; synthetic scenes only.
    instances: np.ndarray | None = None


# ----------------------------------------------------------------------------------------------
# geometry


def project(point, intrinsics):
    """Point or points (..., 3) with z > 0 -> pixel coordinates (u, v), each (...)."""
    fx, fy, cx, cy = intrinsics
    x, y, z = np.moveaxis(np.asarray(point, float), -1, 0)
    return fx * x / z + cx, fy * y / z + cy


def unproject(depth, intrinsics, left=0, top=0):
    """Depth (h, w) of a window of the image -> points (h, w, 3) in metres, NaN where depth is.

    left, top: the pixel where the window starts.
    """
    fx, fy, cx, cy = intrinsics
    height, width = depth.shape
    u, v = np.meshgrid(left + np.arange(width) + 0.5, top + np.arange(height) + 0.5)  # (h, w)
    return np.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], -1)  # (h, w, 3)


def corners(obj):
    """The 8 corners of an object's 3D box, (8, 3) metres."""
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return obj["center"] + signs * obj["size"] / 2 @ obj["rotation"].T


# ----------------------------------------------------------------------------------------------
# the reader of scenes.jsonl


def load_scenes(path):
    """The scenes of a scenes.jsonl, as a list; all in memory, 7 bytes per pixel.

    BadRow names file, line and field of what is wrong.
    """
    folder = Path(path).parent
    return [read_scene(row, where, folder) for row, where in read_lines(path)]


def read_lines(path):
    """The rows of a JSON lines file, one by one, each with its place: (row, "scenes.jsonl:3")."""
    if not Path(path).is_file():
        raise BadRow(
            f"{path}: no such file: give the path of a JSON lines file, such as scenes.jsonl"
        )
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield read_line(line, where), where


def read_line(line, where):
    """One line of JSON lines -> its object, a dict."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not JSON ({error}): write one object {{...}} per line") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: not a JSON object: write one object {{...}} per line")
    return tidy(row)


def read_scene(row, where, folder):
    """One line of a scenes.jsonl -> Scene. where: its place, for messages; folder: of its files."""
    check(isinstance(row.get("id"), (str, int)), where, "id", "must be a name or a number")
    image = read_picture(row, where, folder)  # (H, W, 3)
    height, width = image.shape[:2]
    depth = None
    if row.get("depth") is not None:
        depth = read_depth(row, where, folder, width, height)
    intrinsics = read_intrinsics(row, where)
    entries = row.get("objects")
    check(
        isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries),
        where,
        "objects",
        "must be a list of {label, bbox_2d, center_cam, size_3d}, [] if nothing is annotated",
    )
    objects = []
    for i, entry in enumerate(entries):
        prefix = f"objects[{i}]."
        objects.append(read_object(entry, prefix, where, depth, intrinsics, width, height))
    return Scene(str(row["id"]), image, depth, intrinsics, objects, where)


def read_picture(row, where, folder):
    """The picture of a row, (H, W, 3) uint8."""
    file = file_of(row, "image", where, folder)
    try:
        return np.asarray(pictures.open_picture(file))
    except pictures.BadPicture as error:
        raise BadRow(f"{where}: field 'image': {error}") from None


def read_depth(row, where, folder, width, height):
    """The depth of a row, (H, W) float32 metres, NaN = no measurement; width, height: of the
    image."""
    file = file_of(row, "depth", where, folder)
    scale = row.get("depth_scale")  # metres per unit
    check(
        scale is None or pictures.is_scale(scale),
        where,
        "depth_scale",
        f"is {quote(scale)}, must be above 0: 0.001 for millimetres",
    )
    try:
        depth = pictures.open_depth(file, scale)
    except pictures.BadPicture as error:
        raise BadRow(f"{where}: field 'depth': {error}") from None
    check(
        depth.shape == (height, width),
        where,
        "depth",
        f"{quote(row['depth'])} is {depth.shape[1]} x {depth.shape[0]}, "
        f"the image {width} x {height}: resample it (nearest) to the image",
    )
    return depth


def file_of(row, field, where, folder):
    """The path of the file that a field names."""
    name = row.get(field)
    check(
        isinstance(name, str) and name,
        where,
        field,
        "must be a file name relative to the folder of the jsonl",
    )
    return folder / name


def read_intrinsics(row, where):
    """(fx, fy, cx, cy) of a row, in pixels: from its K or its intrinsics."""
    check(
        "K" in row or "intrinsics" in row,
        where,
        "K",
        "is missing: give K, 3 x 3, or intrinsics [fx, fy, cx, cy]",
    )
    if "K" not in row:
        intrinsics = tuple(numbers(row, "intrinsics", (4,), where).tolist())
        check_focal_lengths(intrinsics, where, "intrinsics")
        return intrinsics
    matrix = numbers(row, "K", (3, 3), where)
    intrinsics = tuple(matrix[[0, 1, 0, 1], [0, 1, 2, 2]].tolist())
    check_focal_lengths(intrinsics, where, "K")
    bottom = matrix[2]
    check((bottom == (0, 0, 1)).all(), where, "K", "must end in the row 0, 0, 1: transpose it")
    return intrinsics


def check_focal_lengths(intrinsics, where, field):
    fx, fy, _, _ = intrinsics
    check(min(fx, fy) > 0, where, field, "must have focal lengths above 0, in pixels")


def read_object(entry, prefix, where, depth, intrinsics, width, height):
    """One annotation of a picture -> an object of a Scene.

    prefix: "objects[2].", for messages; depth: (H, W) or None; width, height: of the image.
    """
    label = entry.get("label")
    check(
        isinstance(label, str) and label.strip(" _"),
        where,
        prefix + "label",
        "must be a name, such as night_stand",
    )
    box = read_box(entry, prefix, where, width, height)
    center = numbers(entry, "center_cam", (3,), where, prefix)
    size = numbers(entry, "size_3d", (3,), where, prefix)
    check(
        center[2] > 0,
        where,
        prefix + "center_cam",
        f"{center.tolist()} is behind the camera: z must point forward",
    )
    check(
        (size > 0).all(),
        where,
        prefix + "size_3d",
        f"{size.tolist()} must be full lengths above 0, in metres",
    )
    return {
        "label": label.replace("_", " ").strip().lower(),
        "color": None,
        "box": tuple(box.tolist()),
        "center": center,
        "size": size,
        "rotation": read_rotation(entry, prefix, where),
        "surface": None if depth is None else surface_point(box, depth, intrinsics),
    }


def read_box(entry, prefix, where, width, height):
    """The 2D box of an annotation, (4,) pixels, clipped to the image."""
    box = numbers(entry, "bbox_2d", (4,), where, prefix)
    border = np.array([width, height, width, height])
    inside = np.clip(box, 0, border)
    near = (abs(box - inside) <= STICK_OUT * border).all()
    large = (inside[2:] - inside[:2] >= 1).all()
    check(
        near and large,
        where,
        prefix + "bbox_2d",
        f"{box.tolist()} must be x1, y1, x2, y2 with x1 < x2 and y1 < y2, at least one pixel, "
        f"in pixels of the {width} x {height} image",
    )
    return inside


def read_rotation(entry, prefix, where):
    """The rotation (3, 3) of an annotation's 3D box, its axes as columns."""
    if entry.get("R_cam") is None:
        return np.eye(3)
    rotation = numbers(entry, "R_cam", (3, 3), where, prefix)
    orthogonal = np.allclose(rotation @ rotation.T, np.eye(3), atol=0.01)
    check(orthogonal, where, prefix + "R_cam", "must be a rotation")
    return rotation


def surface_point(box, depth, intrinsics):
    """The median (3,) of the points that are measured in the middle of a box; None without any.

    The middle is half as wide and half as high as the box. Over the whole box of a pedestrian the
    median would lie on the wall behind.
    """
    middle = (box[:2] + box[2:]) / 2
    quarter = (box[2:] - box[:2]) / 4
    left, top = np.floor(middle - quarter).astype(int)
    right, bottom = np.ceil(middle + quarter).astype(int)
    points = unproject(depth[top:bottom, left:right], intrinsics, left, top)  # (h, w, 3)
    points = points[np.isfinite(points[..., 2])]  # (N, 3)
    return np.median(points, 0) if len(points) else None


def numbers(row, field, shape, where, prefix=""):
    """row[field] as a float array of this shape; BadRow for anything but finite numbers.

    Numbers in quotes are an error, too. prefix: of the field's name, for messages.
    """
    value = np.array(row.get(field), object)  # object: keeps ragged lists and types as they came
    finite = all(map(is_number, value.flat))
    wanted = " x ".join(map(str, shape)) + " finite numbers" if shape else "a finite number"
    given = quote(json.dumps(row[field])) if field in row else "missing"
    check(
        value.shape == shape and finite,
        where,
        prefix + field,
        f"is {given}, must be {wanted}",
    )
    return value.astype(float)


def check(ok, where, field, problem):
    """BadRow unless ok; where: file and line."""
    if not ok:
        raise BadRow(f"{where}: field '{field}': {problem}")
