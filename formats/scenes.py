"""Scenes: a picture, its depth, the camera, and the 3D box of every object. Questions and rewards are made from these.

make_scene(seed)            synthetic: cubes, spheres and cylinders on a checkered ground, ray-cast with exact geometry
load_scenes("scenes.jsonl") real RGB-D pictures with annotated 3D boxes, as the same record: later code takes either

    python scenes.py build --scenes scenes.jsonl --out cot.json             # questions with checked traces: build.py
    python scenes.py build --scenes scenes.jsonl --out rl.json --rl
    python scenes.py build --pairs pairs.jsonl --out views.json             # about two views of a place
    python scenes.py convert --from kitti training --out scenes.jsonl       # omni3d, sunrgbd, nuscenes: convert.py
    python scenes.py depth *.jpg --model apple/DepthPro-hf --out depth      # pictures without depth: convert.py

Coordinates: metres in the camera frame, x right, y down, z forward. Depth is z, not the length of the ray.
Pixels: column i covers [i, i + 1) and its ray goes through i + 0.5; a box x1, y1, x2, y2 ends before x2 and y2.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from formats.errors import BadRow

STICK_OUT = 0.05  # real boxes may leave the image by this share of its side and are clipped; more is an error


def check(ok, where, field, problem):
    if not ok:
        raise BadRow(f"{where}: field '{field}': {problem}")


def numbers(row, field, shape, where, prefix=""):
    """row[field] as a float array of this shape; anything but finite numbers is an error, numbers in quotes too."""
    value = np.array(row.get(field), object)  # object: keeps ragged lists and types as they came
    good = value.shape == shape and all(
        type(x) in (int, float) and abs(x) < 1e9 for x in value.flat
    )
    wanted = " x ".join(map(str, shape)) + " finite numbers" if shape else "a finite number"
    given = json.dumps(row[field])[:80] if field in row else "missing"
    check(good, where, prefix + field, f"is {given}, must be {wanted}")
    return value.astype(float)


def read_picture(row, field, folder, where):
    check(
        isinstance(row.get(field), str),
        where,
        field,
        "must be a file name relative to the folder of the jsonl",
    )
    try:
        with Image.open(folder / row[field]) as picture:
            picture.load()
            return picture
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError: a broken PNG
        raise BadRow(
            f"{where}: field '{field}': cannot read {row[field]!r} ({error}): give a readable image, "
            "relative to the folder of the jsonl"
        ) from None


def read_object(entry, prefix, where, depth, intrinsics, width, height):
    """One annotation -> an object of a Scene. surface: median of the points measured in the central half of the box;
    over the whole box of a pedestrian it would lie on the wall behind."""
    label = entry.get("label")
    check(
        isinstance(label, str) and label.strip(" _"),
        where,
        prefix + "label",
        "must be a name, such as night_stand",
    )
    box, border = (
        numbers(entry, "bbox_2d", (4,), where, prefix),
        np.array([width, height, width, height]),
    )
    inside = np.clip(box, 0, border)
    check(
        (abs(box - inside) <= STICK_OUT * border).all() and (inside[2:] - inside[:2] >= 1).all(),
        where,
        prefix + "bbox_2d",
        f"{box.tolist()} must be x1, y1, x2, y2 with x1 < x2 and y1 < y2, at least one pixel, "
        f"in pixels of the {width} x {height} image",
    )
    center, size = (
        numbers(entry, "center_cam", (3,), where, prefix),
        numbers(entry, "size_3d", (3,), where, prefix),
    )
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
    rotation = (
        np.eye(3) if entry.get("R_cam") is None else numbers(entry, "R_cam", (3, 3), where, prefix)
    )
    check(
        np.allclose(rotation @ rotation.T, np.eye(3), atol=0.01),
        where,
        prefix + "R_cam",
        "must be a rotation",
    )
    surface = None
    if depth is not None:
        middle, quarter = (inside[:2] + inside[2:]) / 2, (inside[2:] - inside[:2]) / 4
        left, top, right, bottom = (
            *np.floor(middle - quarter).astype(int),
            *np.ceil(middle + quarter).astype(int),
        )
        points = unproject(depth[top:bottom, left:right], intrinsics, left, top)
        points = points[np.isfinite(points[..., 2])]  # (N, 3)
        surface = np.median(points, 0) if len(points) else None
    return {
        "label": label.replace("_", " ").strip().lower(),
        "color": None,
        "box": tuple(inside.tolist()),
        "center": center,
        "size": size,
        "rotation": rotation,
        "surface": surface,
    }


def read_lines(path):
    """The rows of a JSON lines file, one at a time, each with its place: (row, "scenes.jsonl:3")."""
    if not Path(path).is_file():
        raise BadRow(
            f"{path}: no such file: give the path of a JSON lines file, such as scenes.jsonl"
        )
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise BadRow(
                        f"{path}:{number}: not JSON ({error}): write one object {{...}} per line"
                    ) from None
                if not isinstance(row, dict):
                    raise BadRow(
                        f"{path}:{number}: not a JSON object: write one object {{...}} per line"
                    )
                yield row, f"{path}:{number}"


def read_scene(row, where, folder):
    check(isinstance(row.get("id"), (str, int)), where, "id", "must be a name or a number")
    image = np.asarray(read_picture(row, "image", folder, where).convert("RGB"))
    height, width = image.shape[:2]
    depth = None
    if row.get("depth") is not None:
        picture = read_picture(row, "depth", folder, where)
        scale = numbers({"depth_scale": 0.001, **row}, "depth_scale", (), where)  # metres per unit
        check(scale > 0, where, "depth_scale", "must be above 0: 0.001 for millimetres")
        check(
            picture.mode[0] == "I",
            where,
            "depth",
            f"{row['depth']} holds no metres: write a 16-bit grey PNG",
        )
        check(
            picture.size == (width, height),
            where,
            "depth",
            f"{row['depth']} is {picture.width} x {picture.height}, "
            f"the image {width} x {height}: resample it (nearest) to the image",
        )
        units = np.asarray(picture).astype(np.float32)
        depth = np.where(units > 0, units * np.float32(scale), np.float32(np.nan))
    check(
        "K" in row or "intrinsics" in row,
        where,
        "K",
        "is missing: give K, 3 x 3, or intrinsics [fx, fy, cx, cy]",
    )
    field = "K" if "K" in row else "intrinsics"
    camera = numbers(row, field, (3, 3) if field == "K" else (4,), where)
    intrinsics = tuple((camera[[0, 1, 0, 1], [0, 1, 2, 2]] if field == "K" else camera).tolist())
    check(min(intrinsics[:2]) > 0, where, field, "must have focal lengths above 0, in pixels")
    check(
        field != "K" or (camera[2] == (0, 0, 1)).all(),
        where,
        field,
        "must end in the row 0, 0, 1: transpose it",
    )
    objects = row.get("objects")
    check(
        isinstance(objects, list) and all(isinstance(o, dict) for o in objects),
        where,
        "objects",
        "must be a list of {label, bbox_2d, center_cam, size_3d}, [] if nothing is annotated",
    )
    return Scene(
        str(row["id"]),
        image,
        depth,
        intrinsics,
        [
            read_object(o, f"objects[{i}].", where, depth, intrinsics, width, height)
            for i, o in enumerate(objects)
        ],
        where,
    )


def load_scenes(path):
    """A jsonl of pictures -> list of Scene, all in memory (7 bytes per pixel). Raises ValueError: file, line, field.
    Each line: id, image, depth (optional: 16-bit PNG, 0 = none; depth_scale metres per unit, default 0.001), K 3x3 or
    intrinsics [fx, fy, cx, cy], objects with label, bbox_2d, center_cam, size_3d, R_cam (optional)."""
    return [read_scene(row, where, Path(path).parent) for row, where in read_lines(path)]


@dataclass
class Scene:
    """One picture. objects: dicts with label ("sphere", "night stand"), color (name or None), box (x1, y1, x2, y2 of
    the visible part, pixels), center (3,) of the 3D box, not of its surface, size (3,) full lengths along its own axes,
    rotation (3, 3) with these axes as columns, surface (3,) the mean point that the depth sensor sees, or None."""

    id: str
    image: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray | None  # (H, W) float32 metres, NaN = no measurement; None = no depth at all
    intrinsics: tuple  # fx, fy, cx, cy in pixels
    objects: list
    source: str  # "seed 7" or "scenes.jsonl:3", for error messages
    instances: np.ndarray | None = (
        None  # (H, W) int8 index of the object seen, -1 = none; synthetic scenes only
    )


def project(point, intrinsics):
    """Point or points (..., 3) with z > 0 -> pixel coordinates (u, v), each (...)."""
    fx, fy, cx, cy = intrinsics
    x, y, z = np.moveaxis(np.asarray(point, float), -1, 0)
    return fx * x / z + cx, fy * y / z + cy


def unproject(depth, intrinsics, left=0, top=0):
    """Depth (h, w) of the window that starts at pixel (left, top) -> points (h, w, 3) metres, NaN where depth is."""
    fx, fy, cx, cy = intrinsics
    u, v = np.meshgrid(
        left + np.arange(depth.shape[1]) + 0.5, top + np.arange(depth.shape[0]) + 0.5
    )
    return np.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], -1)


def corners(obj):
    """The 8 corners of an object's 3D box, (8, 3) metres."""
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return obj["center"] + signs * obj["size"] / 2 @ obj["rotation"].T
