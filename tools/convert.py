"""The annotation of other data sets -> scenes.jsonl, in the coordinates of this project.

    python -m tools.convert --from kitti training --out scenes.jsonl
    python -m tools.convert --from omni3d Omni3D_val.json --images datasets --out scenes.jsonl
    python -m tools.convert --from sunrgbd sunrgbd_trainval --out scenes.jsonl
    python -m tools.convert --from nuscenes v1.0-mini --out scenes.jsonl

An object of a scenes.jsonl has its coordinates in the camera frame: metres, x right, y down,
z forward. center_cam is the centre of the 3D box, size_3d its full lengths along its own axes,
R_cam (3, 3) has these axes as columns: corner = center_cam + R_cam @ (+-size_3d / 2).

Each data set has two functions here. NAME_object is a pure function from one annotated object to
{"label", "center_cam", "size_3d", "R_cam"}; its docstring says what the data set's numbers mean
and where that is written. read_NAME walks the files and yields lines of a scenes.jsonl: pictures
with their full paths, objects with "bbox_2d" in pixels, None where the data set has no 2D box, and
"where" they stand, for messages. What the picture does not show, by the data set's own fields, is
left out and counted (NAME_unseen).

Pictures without depth get it from tools/depth.py; --depth takes the folder that it writes.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.output import check_outputs, is_same_file, whole_file
from engine.settings import parse, run_main, setting
from formats import pictures
from formats.errors import BadRow, UserError, quote
from formats.scenes import check, corners, numbers, project, read_intrinsics
from formats.values import LARGEST, is_number, tidy

HIDDEN = 1 / 3  # objects with less of them visible are left out: nobody can be asked about them
NEAR = 0.1  # metres; a box that reaches nearer to the camera, or behind it, cannot be projected
LEAST_PIXELS = 2  # width and height of a 2D box inside the picture


@dataclass
class Settings:
    path: str = setting(
        "",
        "omni3d: the json; kitti, sunrgbd: folder; nuscenes: folder of the json tables",
        positional=True,
    )
    format: str = setting(
        None,
        "omni3d, kitti, sunrgbd or nuscenes",
        ("omni3d", "kitti", "sunrgbd", "nuscenes"),
        flag="from",
    )
    out: str = setting(None, "scenes.jsonl to write")
    images: str = setting("", "folder of the pictures, if elsewhere")
    depth: str = setting(
        "", "folder of depth PNGs named as the pictures, such as tools.depth writes"
    )
    depth_scale: float = setting(
        0.001,
        "metres per unit of those; KITTI's own: 0.00390625",
        above=0,
        at_most=1000,
        only_with=("depth",),
    )


def convert(args):
    """Write a scenes.jsonl; print how many pictures and objects, and what was left out."""
    check_paths(args)
    folder = os.path.dirname(os.path.abspath(args.out))
    read, _ = READERS[args.format]
    dropped = Counter()  # {reason: objects}
    maps = set()  # depth maps that were found
    pictures = 0
    objects = 0
    with whole_file(args.out, "--out") as file:
        for scene in tqdm(read(args.path, args.images, dropped), desc=args.format, unit=""):
            scene["objects"] = usable_objects(scene, dropped)
            add_depth(scene, args, maps)
            keep_pictures(scene, args.out)
            scene["image"] = os.path.relpath(scene["image"], folder)
            file.write(json.dumps(scene, allow_nan=False) + "\n")
            pictures += 1
            objects += len(scene["objects"])
        if not pictures:
            raise BadRow(
                f"{args.path}: no annotated picture of {args.format} there; "
                "see `python -m tools.convert --help`"
            )
    for reason, count in dropped.items():
        print(f"left out {count:,} objects: {reason}")
    print(f"{pictures:,} pictures ({len(maps):,} with depth), {objects:,} objects -> {args.out}")


def check_paths(args):
    """UserError for folders that are not there, and for an --out that is one of the inputs."""
    for flag, folder in (("--images", args.images), ("--depth", args.depth)):
        if folder and not os.path.isdir(folder):
            raise UserError(f"{flag} {folder}: no such folder")
    _, patterns = READERS[args.format]
    inputs = [args.path]
    for pattern in patterns:
        inputs += Path(args.path).glob(pattern)
    check_outputs({"--out": args.out}, inputs)


def keep_pictures(scene, out):
    """UserError where --out would replace a picture; its depth map is relative to --out."""
    depth = os.path.join(os.path.dirname(out), scene.get("depth", ""))
    if is_same_file(scene["image"], out) or is_same_file(depth, out):
        raise UserError(f"--out {out}: is a picture of these data; name another file")


def add_depth(scene, args, maps):
    """Name the depth map of a picture, if --depth has one; maps: those of the pictures before."""
    path = os.path.join(args.depth, Path(scene["image"]).stem + ".png")
    if path in maps:
        raise BadRow(
            f"{path}: two pictures have this name, {scene['image']} is one; convert them apart"
        )
    if args.depth and os.path.isfile(path):
        scene["depth"] = os.path.relpath(path, os.path.dirname(os.path.abspath(args.out)))
        scene["depth_scale"] = args.depth_scale
        maps.add(path)


def usable_objects(scene, dropped):
    """The objects of a scene that can be asked about, with their 2D boxes inside the picture.

    dropped: a Counter of the reasons why others are left out.
    """
    objects = []
    for obj in scene["objects"]:
        box, reason = box_in_picture(obj, scene)
        if reason:
            dropped[reason] += 1
        else:
            kept = {**obj, "bbox_2d": box}
            check_object(kept, kept.pop("where"))
            objects.append(kept)
    return objects


def check_object(obj, where):
    """BadRow for an object that no reader of a scenes.jsonl would take."""
    check_text(obj, "label", where)
    for field, shape in (("center_cam", (3,)), ("size_3d", (3,)), ("bbox_2d", (4,))):
        numbers(obj, field, shape, where)
    check_rotation(obj, "R_cam", where)


def box_in_picture(obj, scene):
    """-> (the 2D box of an object, clipped to the picture, None), or (None, why it has none)."""
    camera = np.array(scene["K"])  # (3, 3)
    if obj["center_cam"][2] < NEAR or min(obj["size_3d"]) <= 0:
        return None, "behind the camera, or without size"
    box = obj["bbox_2d"]
    if box is None:
        points = box_corners(obj)
        if points[:, 2].min() < NEAR:
            return None, "2D box unknown: the 3D box reaches behind the camera"
        u, v = project(points, camera[[0, 1, 0, 1], [0, 1, 2, 2]])  # fx, fy, cx, cy
        box = [u.min(), v.min(), u.max(), v.max()]
    inside = np.clip(box, 0, [scene["width"], scene["height"]] * 2)
    if (inside[2:] - inside[:2] < LEAST_PIXELS).any():
        return None, "not in the picture"
    return np.round(inside, 2).tolist(), None


def box_corners(obj):
    """The corners (8, 3) of an object's 3D box in the camera frame, metres."""
    return corners(
        {
            "center": np.array(obj["center_cam"]),
            "size": np.array(obj["size_3d"]),
            "rotation": np.array(obj["R_cam"]),
        }
    )


def object_of(label, center, size, rotation):
    """An object of a scenes.jsonl; rotation (3, 3): its axes as columns, in the camera frame."""
    rotation = np.array(rotation, float)
    if np.linalg.det(rotation) < 0:
        # The axes were given left-handed. A box looks the same with one of them turned round.
        rotation[:, 2] *= -1
    return {
        "label": label,
        "center_cam": np.round(center, 4).tolist(),
        "size_3d": np.round(size, 4).tolist(),
        "R_cam": np.round(rotation, 6).tolist(),
    }


# ----------------------------------------------------------------------------------------------
# Omni3D


def omni3d_object(annotation):
    """center_cam and R_cam are as ours. dimensions: width, height, length, along the box's z, y, x.

    github.com/facebookresearch/omni3d: DATA.md (fields, axes) and cubercnn/util/math_util.py
    (get_cuboid_verts_faces: x = +-l/2, y = +-h/2, z = +-w/2).
    """
    width, height, length = annotation["dimensions"]
    return object_of(
        annotation["category_name"],
        annotation["center_cam"],
        (length, height, width),
        annotation["R_cam"],
    )


def read_omni3d(path, images, dropped):
    """Omni3D_*.json: one file of images and annotations.

    --images is the folder that their file_path starts from.
    """
    data = read_json(path, "omni3d needs one Omni3D_*.json")
    check(isinstance(data, dict), path, "images", "is missing; omni3d needs one Omni3D_*.json")
    pictures = {}  # {id: picture}
    for image, where in rows_of(data.get("images"), path, "images"):
        check(is_identity(image.get("id")), where, "id", "must be a number or a name")
        check(image["id"] not in pictures, where, "id", "is the id of an earlier image, too")
        check_text(image, "file_path", where)
        check_size(image, where)
        check_camera(image.get("K"), where)
        pictures[image["id"]] = {
            "id": image["id"],
            "image": os.path.join(images or os.path.dirname(path), image["file_path"]),
            "width": image["width"],
            "height": image["height"],
            "K": image["K"],
            "objects": [],
        }
    for annotation, where in rows_of(data.get("annotations"), path, "annotations"):
        check(is_identity(annotation.get("image_id")), where, "image_id", "must be an image's id")
        picture = pictures.get(annotation["image_id"])
        reason = omni3d_unseen(annotation, where) if picture else "of an image that is not listed"
        if reason:
            dropped[reason] += 1
            continue
        for field, shape in (("dimensions", (3,)), ("center_cam", (3,)), ("R_cam", (3, 3))):
            numbers(annotation, field, shape, where)
        obj = omni3d_object(annotation)
        box = omni3d_box(annotation, where)
        picture["objects"].append({**obj, "bbox_2d": box, "where": where})
    yield from pictures.values()


def omni3d_unseen(annotation, where):
    """Why an annotated object is left out; None where it can be seen and its 3D box is reliable.

    The rules are those of the data set's authors (cubercnn/data/datasets.py, is_ignore); their
    least visibility is a setting, here it is HIDDEN. DATA.md: -1 stands for what is not known.
    """
    check_text(annotation, "category_name", where)
    valid = annotation.get("valid3D")
    check(valid in (True, False), where, "valid3D", "must be true or false")

    def known(field):
        value = annotation.get(field, -1)
        ok = isinstance(value, bool) or is_number(value)
        check(ok, where, field, "must be a number, -1 where it is not known")
        return value

    rules = {
        "without a reliable 3D box (valid3D)": not valid,
        "partly behind the camera (behind_camera)": known("behind_camera") == 1,
        "hidden by more than two thirds (visibility)": 0 <= known("visibility") < HIDDEN,
        "outside of the picture (truncation)": known("truncation") >= 0.99,
        "no point of the lidar on it (lidar_pts)": known("lidar_pts") == 0,
        "no pixel of the segmentation on it (segmentation_pts)": known("segmentation_pts") == 0,
        "not where the depth map has it (depth_error)": known("depth_error") > 0.5,
        "to be ignored (ignore)": known("ignore") == 1 or known("ignore3D") == 1,
        "several in one box (iscrowd)": known("iscrowd") == 1,
        "to be ignored (category_name)": annotation["category_name"] in OMNI3D_IGNORED,
    }
    return first_that_holds(rules)


# The names of regions that hold no annotated object.
OMNI3D_IGNORED = ("dontcare", "ignore", "void")


def omni3d_box(annotation, where):
    """The 2D box, the one that a person drew before the projected one; None without either."""
    for key in ("bbox2D_tight", "bbox2D_trunc"):
        if annotation.get(key, -1) == -1:
            continue
        box = numbers(annotation, key, (4,), where)
        if max(box) > 0:  # four times -1: there is none
            return box.tolist()
    return None


# ----------------------------------------------------------------------------------------------
# KITTI


def kitti_object(fields, projection):
    """One label line, split at its spaces; projection (3, 4): P2 of the calibration.

    dimensions are height, width, length; location is the middle of the box's *bottom* face;
    rotation_y turns about the camera's y axis, at 0 the length lies along x. Location is in the
    frame of camera 0: P2 also shifts it to camera 2, which took the picture (6 cm).
    KITTI object development kit: readme.txt (fields), matlab/computeBox3D.m (corners: x +-l/2,
    y 0 to -h, z +-w/2).
    """
    height, width, length, x, y, z, turn = map(float, fields[8:15])
    center = np.array([x, y - height / 2, z])
    shift = np.linalg.solve(projection[:, :3], projection[:, 3])
    rotation = [
        [np.cos(turn), 0, np.sin(turn)],
        [0, 1, 0],
        [-np.sin(turn), 0, np.cos(turn)],
    ]
    return object_of(fields[0], center + shift, (length, height, width), rotation)


def read_kitti(path, images, dropped):
    """The folder "training" with label_2, calib and image_2."""
    for label in sorted(Path(path, "label_2").glob("*.txt")):
        projection = kitti_projection(Path(path, "calib", label.name))
        objects = []
        for line, where in text_lines(label):
            name, values = name_and_numbers(line, (14, 15), where)  # the 15th would be a score
            reason = kitti_unseen(name, *values[:2])
            if reason:
                dropped[reason] += 1
            else:
                obj = kitti_object([name, *values], projection)
                objects.append({**obj, "bbox_2d": values[3:7], "where": where})
        picture = Path(images or Path(path, "image_2"), label.stem + ".png")
        width, height = picture_size(picture, "; is --images right?")
        yield {
            "id": f"kitti_{label.stem}",
            "image": str(picture),
            "width": width,
            "height": height,
            "K": projection[:, :3].tolist(),
            "objects": objects,
        }


def kitti_projection(path):
    """P2 (3, 4), the projection to the camera of image_2, from a file of calib."""
    for line, where in text_lines(path, "kitti needs the folder with label_2, calib and image_2"):
        name, _, values = line.partition(":")
        if name.strip() == "P2":
            projection = np.array(to_numbers(values.split(), 12, where)).reshape(3, 4)
            check_camera(projection[:, :3].tolist(), f"{where}: P2")
            return projection
    raise BadRow(f"{path}: has no line 'P2' of 12 numbers")


def kitti_unseen(name, truncated, occluded):
    """Why an annotated object is left out; None where it can be seen.

    Left out is what the benchmark leaves out even at its level "hard": see its page and
    cpp/evaluate_object.cpp (MAX_OCCLUSION, MAX_TRUNCATION) of the development kit.
    """
    rules = {
        "regions without annotation (DontCare)": name == "DontCare",
        "more than half of it outside of the picture (truncated)": truncated > 0.5,
        "hidden, nobody knows how much (occluded 3)": occluded > 2,
    }
    return first_that_holds(rules)


# ----------------------------------------------------------------------------------------------
# SUN RGB-D

# Depth coordinates (x right, y forward, z up) -> camera frame.
FLIP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


def sunrgbd_object(label, centroid, basis, coeffs, tilt):
    """One groundtruth3DBB, in upright depth coordinates: x right, y forward, z up against gravity.

    basis: the box's axes as rows; coeffs: *half* lengths along them, of any sign; tilt (3, 3):
    Rtilt, from depth coordinates to upright ones.
    SUNRGBDtoolbox (corners = centroid +- basis rows * coeffs); camera = (x, -z, y) of Rtilt' p, as
    in github.com/facebookresearch/votenet, sunrgbd/sunrgbd_utils.py.
    """
    to_camera = FLIP @ np.asarray(tilt).T
    rotation = to_camera @ np.asarray(basis).T
    return object_of(label, to_camera @ centroid, 2 * np.abs(coeffs), rotation)


def read_sunrgbd(path, images, dropped):
    """A folder with label and calib, text files, and image.

    The extract_rgbd_data_v*.m of VoteNet and MMDetection3D write them from SUNRGBDMeta3DBB_v2.mat.
    Depth: the data set's own PNGs have their bits rotated, millimetres = d >> 3 | d << 13; undo
    that first.
    """
    for label in sorted(Path(path, "label").glob("*.txt")):
        tilt, camera = sunrgbd_calibration(Path(path, "calib", label.name))
        objects = []
        for line, where in text_lines(label):
            name, values = name_and_numbers(line, (12,), where)
            if any(values[10:12]):
                obj = sunrgbd_labelled(name, values, tilt)
                objects.append({**obj, "where": where})
            else:
                dropped["which way it is turned is not known (orientation 0 0)"] += 1
        picture = Path(images or Path(path, "image"), label.stem + ".jpg")
        width, height = picture_size(picture, "; is --images right?")
        yield {
            "id": f"sunrgbd_{label.stem}",
            "image": str(picture),
            "width": width,
            "height": height,
            "K": camera.tolist(),
            "objects": objects,
        }


def sunrgbd_calibration(path):
    """A file of calib: Rtilt and K, a line each, column by column -> two arrays (3, 3)."""
    lines = text_lines(path, "sunrgbd needs the folder with label, calib and image")
    if len(lines) != 2:
        raise BadRow(f"{path}: needs two lines, Rtilt and K, has {len(lines)}")
    tilt, camera = [
        np.array(to_numbers(line.split(), 9, where)).reshape(3, 3).T for line, where in lines
    ]
    (_, tilt_where), (_, camera_where) = lines
    check_rotation({"Rtilt": tilt.tolist()}, "Rtilt", tilt_where)
    check_camera(camera.tolist(), camera_where)
    return tilt, camera


def sunrgbd_labelled(name, values, tilt):
    """A label line: class; 2D box x y w h, centroid, coeffs, orientation x y, twelve numbers.

    The second coeff lies along the orientation, the first across it, the third up.
    """
    left, top, width, height = values[:4]
    orientation = values[10:12]
    x, y = np.array(orientation) / np.hypot(*orientation)
    basis = [(y, -x, 0), (x, y, 0), (0, 0, 1)]
    return {
        **sunrgbd_object(name, values[4:7], basis, values[7:10], tilt),
        "bbox_2d": [left, top, left + width, top + height],
    }


# ----------------------------------------------------------------------------------------------
# nuScenes


def nuscenes_object(annotation, ego, sensor, label):
    """A sample_annotation: translation (the centre) and rotation in the global frame, and size.

    size is width, length, height; the box's x axis points along its length, y along its width,
    z up. ego (ego_pose) and sensor (calibrated_sensor of the camera) have translation and rotation:
    vehicle -> global, camera -> vehicle. Rotations are quaternions w, x, y, z.
    github.com/nutonomy/nuscenes-devkit, docs/schema_nuscenes.md and
    nuscenes/utils/data_classes.py (Box.corners).
    """
    width, length, height = annotation["size"]
    center = np.array(annotation["translation"])
    rotation = rotation_of(*annotation["rotation"])
    for frame in (ego, sensor):  # global -> vehicle -> camera: each pose is undone
        turn = rotation_of(*frame["rotation"]).T
        center = turn @ (center - frame["translation"])
        rotation = turn @ rotation
    return object_of(label, center, (length, width, height), rotation)


def rotation_of(w, x, y, z):
    """Unit quaternion, scalar first, -> rotation (3, 3)."""
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def read_nuscenes(path, images, dropped):
    """The folder of the json tables, such as v1.0-mini; the pictures start from its parent.

    Key frames of all cameras; 2D boxes are projections.
    """
    egos = nuscenes_table(path, "ego_pose")
    sensors = nuscenes_table(path, "calibrated_sensor")
    instances = nuscenes_table(path, "instance")
    categories = nuscenes_table(path, "category")
    annotations = {}  # by sample: the same moment in all cameras
    for row, where in nuscenes_rows(path, "sample_annotation"):
        check_text(row, "sample_token", where)
        numbers(row, "size", (3,), where)
        check_pose(row, where)
        instance, place = looked_up(instances, row, "instance_token", where)
        category, place = looked_up(categories, instance, "category_token", place)
        check_text(category, "name", place)
        label = nuscenes_label(category["name"])
        annotations.setdefault(row["sample_token"], []).append((row, label, where))
    root = images or os.path.dirname(os.path.abspath(path))
    for frame, where in nuscenes_rows(path, "sample_data"):
        sensor, sensor_where = looked_up(sensors, frame, "calibrated_sensor_token", where)
        if not frame.get("is_key_frame") or not sensor.get("camera_intrinsic"):
            continue  # [] of a lidar or radar
        ego, ego_where = looked_up(egos, frame, "ego_pose_token", where)
        check_pose(ego, ego_where)
        check_pose(sensor, sensor_where)
        check_camera(sensor["camera_intrinsic"], f"{sensor_where}: camera_intrinsic")
        for field in ("token", "sample_token", "filename"):
            check_text(frame, field, where)
        check_size(frame, where)
        objects = []
        for row, label, row_where in annotations.get(frame["sample_token"], []):
            reason = nuscenes_unseen(row, row_where)
            if reason:
                dropped[reason] += 1
            else:
                obj = nuscenes_object(row, ego, sensor, label)
                objects.append({**obj, "bbox_2d": None, "where": row_where})
        yield {
            "id": frame["token"],
            "image": os.path.join(root, frame["filename"]),
            "width": frame["width"],
            "height": frame["height"],
            "K": sensor["camera_intrinsic"],
            "objects": objects,
        }


def nuscenes_unseen(row, where):
    """Why an annotated object is left out; None where it can be seen.

    Without points is what the benchmark leaves out, too (nuscenes/eval/common/loaders.py,
    filter_eval_boxes). Both counts are over the moment, not of one camera.
    """
    seen = row.get("visibility_token")
    check(isinstance(seen, str), where, "visibility_token", 'must be a text, "1" to "4"')
    points = [row.get("num_lidar_pts"), row.get("num_radar_pts")]
    for field, count in zip(("num_lidar_pts", "num_radar_pts"), points):
        check(count is None or is_number(count), where, field, "must be a number")
    rules = {
        "hidden by more than 60 % (visibility_token 1)": seen == "1",
        "no point of lidar or radar on it (num_lidar_pts, num_radar_pts)": points == [0, 0],
    }
    return first_that_holds(rules)


def nuscenes_label(category):
    """ "pedestrian" of "human.pedestrian.adult"; all of "animal", which has no second word."""
    words = category.split(".")
    return words[1] if len(words) > 1 else category


def nuscenes_table(path, name):
    """{token: (row, its place)}."""
    table = {}
    for row, where in nuscenes_rows(path, name):
        check_text(row, "token", where)
        table[row["token"]] = row, where
    return table


def looked_up(table, row, field, where):
    """The row of another table that a field of a row names, and its place."""
    token = row.get(field)
    found = table.get(token) if isinstance(token, str) else None
    check(found, where, field, "must be the token of a row in its table")
    return found


def nuscenes_rows(path, name):
    file_path = os.path.join(path, f"{name}.json")
    rows = read_json(file_path, "nuscenes needs the folder of tables, such as v1.0-mini")
    return rows_of(rows, file_path)


def check_pose(row, where):
    """BadRow for a translation in metres or a rotation, a unit quaternion, that is none."""
    numbers(row, "translation", (3,), where)
    length = np.linalg.norm(numbers(row, "rotation", (4,), where))
    check(abs(length - 1) < 0.01, where, "rotation", "must be a quaternion of length 1")


# {--from: (its reader, what it reads in its folder besides pictures)}
READERS = {
    "omni3d": (read_omni3d, []),
    "kitti": (read_kitti, ["label_2/*.txt", "calib/*.txt"]),
    "sunrgbd": (read_sunrgbd, ["label/*.txt", "calib/*.txt"]),
    "nuscenes": (read_nuscenes, ["*.json"]),
}


def first_that_holds(rules):
    """rules: {reason: does it hold?} -> the first reason that does; None where none does."""
    return next((reason for reason, holds in rules.items() if holds), None)


# ----------------------------------------------------------------------------------------------
# files


def read_text(path, hint=""):
    """The text of a file; hint: what the user may have mixed up if it cannot be opened."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise BadRow(f"{path}: {error.strerror}; {hint}".removesuffix("; ")) from None
    except UnicodeDecodeError as error:
        raise BadRow(f"{path}: byte {error.start} is no UTF-8: save it as UTF-8 text") from None


def text_lines(path, hint=""):
    """The lines of a text file that are not blank, each with its place: [(line, "a.txt:3")]."""
    lines = enumerate(read_text(path, hint).split("\n"), 1)
    return [(line, f"{path}:{number}") for number, line in lines if line.strip()]


def name_and_numbers(line, counts, where):
    """A line such as "night stand 1.5 2" -> its name, of any words, and its numbers, a list.

    counts: how many numbers there may be.
    """
    words = line.split()
    count = 0
    while count < len(words) and number_of(words[-1 - count]) is not None:
        count += 1
    if count not in counts or count == len(words):
        raise BadRow(
            f"{where}: needs a name and {counts[0]} numbers, "
            f"has {count} numbers at its end: {quote(line)}"
        )
    return " ".join(words[:-count]), to_numbers(words[-count:], count, where)


def to_numbers(words, count, where):
    """Words -> so many finite numbers, a list; BadRow for anything else."""
    values = [number_of(word) for word in words]
    for k, value in enumerate(values):
        if not is_number(value):
            raise BadRow(f"{where}: number {k + 1} is {quote(words[k])}, must be finite")
    if len(values) != count:
        raise BadRow(f"{where}: needs {count} numbers, has {len(values)}")
    return values


def number_of(word):
    """The number that a word says; None where it says none."""
    try:
        return float(word)
    except ValueError:
        return None


def read_json(path, hint):
    try:
        return tidy(json.loads(read_text(path, hint)))
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{path}: not JSON ({error})") from None


def rows_of(rows, path, field=""):
    """A list of JSON objects, one by one, each with its place: (row, "a.json: images[3]")."""
    if not isinstance(rows, list):
        raise BadRow(f"{path}: {field or 'it'} must be a list of JSON objects")
    for i, row in enumerate(rows):
        where = f"{path}: {field}[{i}]" if field else f"{path}: row {i}"
        if not isinstance(row, dict):
            raise BadRow(f"{where}: must be a JSON object")
        yield row, where


def is_identity(value):
    return type(value) in (int, str)


def check_text(row, field, where):
    """BadRow unless a field is a text that says something; the underscore stands for a space."""
    value = row.get(field)
    check(isinstance(value, str) and value.strip(" _"), where, field, "must be a text")


def check_size(row, where):
    """BadRow unless width and height are those of a picture."""
    for field in ("width", "height"):
        value = row.get(field)
        ok = type(value) is int and 0 < value < LARGEST
        check(ok, where, field, "must be a whole number above 0, in pixels")


def check_camera(matrix, where):
    """BadRow for a camera matrix, 3 x 3, that no reader of a scenes.jsonl would take."""
    read_intrinsics({"K": matrix}, where)
    check(matrix[1][0] == 0, where, "K", "must be 0 below its diagonal")


def check_rotation(row, field, where):
    """BadRow unless a field is a rotation, 3 x 3, up to rounding, or a mirrored one."""
    matrix = numbers(row, field, (3, 3), where)
    orthogonal = np.allclose(matrix @ matrix.T, np.eye(3), atol=0.01)
    check(orthogonal, where, field, "must be a rotation")


def picture_size(path, hint=""):
    """-> (width, height) of a picture."""
    try:
        return pictures.picture_size(path)
    except pictures.BadPicture as error:
        raise BadRow(f"{error}{hint}") from None


def main():
    convert(parse(Settings, __doc__))


if __name__ == "__main__":
    run_main(main)
