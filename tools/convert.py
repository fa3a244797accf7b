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
with their full paths, objects with "bbox_2d" in pixels, None where the data set has no 2D box.

Pictures without depth get it from tools/depth.py; --depth takes the folder that it writes.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.output import check_outputs, whole_file
from engine.settings import parse, run_main, setting
from formats import pictures
from formats.errors import BadRow
from formats.scenes import corners, project

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
    check_outputs({"--out": args.out}, [args.path])
    folder = os.path.dirname(os.path.abspath(args.out))
    read = READERS[args.format]
    dropped = Counter()  # {reason: objects}
    maps = set()  # depth maps that were found
    pictures = 0
    objects = 0
    with whole_file(args.out, "--out") as file:
        try:
            for scene in tqdm(read(args.path, args.images), desc=args.format, unit=""):
                scene["objects"] = usable_objects(scene, dropped)
                add_depth(scene, args, maps)
                scene["image"] = os.path.relpath(scene["image"], folder)
                file.write(json.dumps(scene) + "\n")
                pictures += 1
                objects += len(scene["objects"])
        except BadRow:
            raise
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadRow(
                f"{args.path}: picture {pictures} is not as {args.format} writes it ({error!r})"
            ) from error
        if not pictures:
            raise BadRow(
                f"{args.path}: no annotated picture of {args.format} there; "
                "see `python -m tools.convert --help`"
            )
    for reason, count in dropped.items():
        print(f"left out {count:,} objects: {reason}")
    print(f"{pictures:,} pictures ({len(maps):,} with depth), {objects:,} objects -> {args.out}")


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
            objects.append({**obj, "bbox_2d": box})
    return objects


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


def read_omni3d(path, images):
    """Omni3D_*.json: one file of images and annotations.

    --images is the folder that their file_path starts from.
    """
    with open_text(path, "omni3d needs one Omni3D_*.json") as file:
        data = json.load(file)
    objects = {}
    for annotation in data["annotations"]:
        if omni3d_is_usable(annotation):
            box = omni3d_box(annotation)
            obj = {**omni3d_object(annotation), "bbox_2d": box}
            objects.setdefault(annotation["image_id"], []).append(obj)
    for image in data["images"]:
        yield {
            "id": image["id"],
            "image": os.path.join(images or os.path.dirname(path), image["file_path"]),
            "width": image["width"],
            "height": image["height"],
            "K": image["K"],
            "objects": objects.get(image["id"], []),
        }


def omni3d_is_usable(annotation):
    """Has it a 3D box, before the camera, of an object that can be seen?"""
    if not annotation["valid3D"] or annotation.get("behind_camera"):
        return False
    visibility = annotation.get("visibility", -1)  # -1: not known
    return not 0 <= visibility < HIDDEN


def omni3d_box(annotation):
    """The 2D box, the one that a person drew before the projected one; None without either."""
    for key in ("bbox2D_tight", "bbox2D_trunc"):
        box = annotation.get(key, -1)
        if box != -1 and max(box) > 0:  # -1, or four of them: there is none
            return box
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


def read_kitti(path, images):
    """The folder "training" with label_2, calib and image_2. DontCare regions are left out."""
    hint = "kitti needs the folder with label_2, calib and image_2"
    for label in sorted(Path(path, "label_2").glob("*.txt")):
        projection = number_lines(Path(path, "calib", label.name), hint)["P2"].reshape(3, 4)
        objects = []
        for line in label.read_text().splitlines():
            fields = line.split()
            if fields and fields[0] != "DontCare":
                obj = kitti_object(fields, projection)
                box = [float(value) for value in fields[4:8]]
                objects.append({**obj, "bbox_2d": box})
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


def read_sunrgbd(path, images):
    """A folder with label and calib, text files, and image.

    The extract_rgbd_data_v*.m of VoteNet and MMDetection3D write them from SUNRGBDMeta3DBB_v2.mat.
    calib holds Rtilt and K, each column by column. Depth: the data set's own PNGs have their bits
    rotated, millimetres = d >> 3 | d << 13; undo that first.
    """
    hint = "sunrgbd needs the folder with label, calib and image"
    for label in sorted(Path(path, "label").glob("*.txt")):
        tilt, camera = number_lines(Path(path, "calib", label.name), hint).values()
        tilt = tilt.reshape(3, 3).T
        camera = camera.reshape(3, 3).T
        objects = [sunrgbd_line(line, tilt) for line in label.read_text().splitlines()]
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


def sunrgbd_line(line, tilt):
    """A label line: class, 2D box x y w h, centroid, coeffs, orientation x y.

    The second coeff lies along the orientation, the first across it, the third up.
    """
    name, *values = line.split()
    left, top, width, height, *values = map(float, values)
    centroid = values[:3]
    coeffs = values[3:6]
    orientation = values[6:8]
    x, y = np.array(orientation) / np.hypot(*orientation)
    basis = [(y, -x, 0), (x, y, 0), (0, 0, 1)]
    return {
        **sunrgbd_object(name, centroid, basis, coeffs, tilt),
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


def read_nuscenes(path, images):
    """The folder of the json tables, such as v1.0-mini; the pictures start from its parent.

    Key frames of all cameras. Objects of the lowest visibility (below 40 %) are left out; 2D boxes
    are projections.
    """
    egos = nuscenes_table(path, "ego_pose")
    sensors = nuscenes_table(path, "calibrated_sensor")
    instances = nuscenes_table(path, "instance")
    categories = nuscenes_table(path, "category")
    annotations = {}  # by sample: the same moment in all cameras
    for row in nuscenes_rows(path, "sample_annotation"):
        if row["visibility_token"] != "1":
            annotations.setdefault(row["sample_token"], []).append(row)
    root = images or os.path.dirname(os.path.abspath(path))
    for frame in nuscenes_rows(path, "sample_data"):
        sensor = sensors[frame["calibrated_sensor_token"]]
        if not frame["is_key_frame"] or not sensor["camera_intrinsic"]:  # [] of a lidar or radar
            continue
        ego = egos[frame["ego_pose_token"]]
        objects = []
        for row in annotations.get(frame["sample_token"], []):
            instance = instances[row["instance_token"]]
            label = nuscenes_label(categories[instance["category_token"]]["name"])
            objects.append({**nuscenes_object(row, ego, sensor, label), "bbox_2d": None})
        yield {
            "id": frame["token"],
            "image": os.path.join(root, frame["filename"]),
            "width": frame["width"],
            "height": frame["height"],
            "K": sensor["camera_intrinsic"],
            "objects": objects,
        }


def nuscenes_label(category):
    """ "pedestrian" of "human.pedestrian.adult"; all of "animal", which has no second word."""
    words = category.split(".")
    return words[1] if len(words) > 1 else category


def nuscenes_table(path, name):
    """{token: row}."""
    return {row["token"]: row for row in nuscenes_rows(path, name)}


def nuscenes_rows(path, name):
    file_path = os.path.join(path, f"{name}.json")
    with open_text(file_path, "nuscenes needs the folder of tables, such as v1.0-mini") as file:
        return json.load(file)


READERS = {
    "omni3d": read_omni3d,
    "kitti": read_kitti,
    "sunrgbd": read_sunrgbd,
    "nuscenes": read_nuscenes,
}

# ----------------------------------------------------------------------------------------------
# files


def open_text(path, hint):
    """A file to read; hint: what the user may have mixed up if it cannot be opened."""
    try:
        return open(path, encoding="utf-8")
    except OSError as error:
        raise BadRow(f"{path}: {error.strerror}; {hint}") from None


def number_lines(path, hint):
    """Lines such as "P2: 1 2 3" or "1 2 3" -> {name, or number of the line: array}."""
    values = {}
    with open_text(path, hint) as file:
        for line in file:
            if line.strip():
                name, _, numbers = line.rpartition(":")
                values[name or len(values)] = np.array(numbers.split(), float)
    return values


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
