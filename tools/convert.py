"""What a data set lacks to be a scenes.jsonl: its annotation in our coordinates (`python -m tools.convert`), and depth
maps for pictures without (`python -m tools.depth`).

Ours: camera frame, metres, x right, y down, z forward; center_cam is the centre of the 3D box, size_3d its full lengths
along its own axes, R_cam (3, 3) has these axes as columns: corner = center_cam + R_cam @ (+-size_3d / 2).
Each converter is a pure function from one annotated object to {"label", "center_cam", "size_3d", "R_cam"}, and a reader
that walks the data set's files and yields lines of a scenes.jsonl, pictures as full paths.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.settings import parse, run_main, setting
from formats.errors import BadRow
from formats.scenes import corners, project
from tools.build import whole

HIDDEN = (
    1 / 3
)  # objects annotated as less visible than this are left out: nobody can be asked about them
NEAR = 0.1  # metres; a box that reaches behind this cannot be projected
FLIP = np.array(
    [[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]
)  # depth frame (x right, y forward, z up) -> camera frame


def boxed(label, center, size, rotation):
    rotation = np.array(rotation, float)
    if np.linalg.det(rotation) < 0:  # axes given left-handed: a box does not mind a turned axis
        rotation[:, 2] *= -1
    return {
        "label": label,
        "center_cam": np.round(center, 4).tolist(),
        "size_3d": np.round(size, 4).tolist(),
        "R_cam": np.round(rotation, 6).tolist(),
    }


def omni3d_object(annotation):
    """center_cam and R_cam are ours already. dimensions are width, height, length, and lie along the box's z, y, x:
    github.com/facebookresearch/omni3d, DATA.md (fields, axes) and cubercnn/util/math_util.py (get_cuboid_verts_faces:
    x = +-l/2, y = +-h/2, z = +-w/2)."""
    width, height, length = annotation["dimensions"]
    return boxed(
        annotation["category_name"],
        annotation["center_cam"],
        (length, height, width),
        annotation["R_cam"],
    )


def kitti_object(fields, projection):
    """One label line, split. dimensions are height, width, length; location is the middle of the box's *bottom* face;
    rotation_y turns about the camera's y axis, at 0 the length lies along x. Location is in the frame of camera 0;
    `projection` (3, 4), P2 of the calibration, also shifts to camera 2, which took the picture (6 cm).
    KITTI object development kit: readme.txt (fields), matlab/computeBox3D.m (corners: x +-l/2, y 0 to -h, z +-w/2)."""
    height, width, length, x, y, z, turn = map(float, fields[8:15])
    shift = np.linalg.solve(projection[:, :3], projection[:, 3])
    rotation = [[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]]
    return boxed(
        fields[0], np.array([x, y - height / 2, z]) + shift, (length, height, width), rotation
    )


def sunrgbd_object(label, centroid, basis, coeffs, tilt):
    """SUN RGB-D's groundtruth3DBB, in upright depth coordinates (x right, y forward, z up against gravity): basis has
    the box's axes as rows, coeffs are *half* lengths along them, of any sign. tilt (3, 3), Rtilt, takes depth
    coordinates to upright ones. SUNRGBDtoolbox (corners = centroid +- basis rows * coeffs); camera = (x, -z, y) of
    Rtilt' p as in github.com/facebookresearch/votenet, sunrgbd/sunrgbd_utils.py."""
    to_camera = FLIP @ np.asarray(tilt).T
    return boxed(label, to_camera @ centroid, 2 * np.abs(coeffs), to_camera @ np.asarray(basis).T)


def quaternion(w, x, y, z):
    """Unit quaternion, scalar first, -> rotation (3, 3)."""
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def nuscenes_object(annotation, ego, sensor, label):
    """A sample_annotation: translation (centre), rotation (quaternion w, x, y, z) in the global frame; size is width,
    length, height, the box's x axis points along its length, y along its width, z up. ego (ego_pose) and sensor
    (calibrated_sensor of the camera) have translation and rotation: vehicle -> global, camera -> vehicle.
    github.com/nutonomy/nuscenes-devkit, docs/schema_nuscenes.md and nuscenes/utils/data_classes.py (Box.corners)."""
    width, length, height = annotation["size"]
    center, rotation = np.array(annotation["translation"]), quaternion(*annotation["rotation"])
    for frame in (ego, sensor):  # global -> vehicle -> camera: undo each pose
        turn = quaternion(*frame["rotation"]).T
        center, rotation = turn @ (center - frame["translation"]), turn @ rotation
    return boxed(label, center, (length, width, height), rotation)


def picture_size(path):
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise BadRow(f"{path}: cannot read the picture ({error}); is --images right?") from None


def opened(path, hint):
    try:
        return open(path, encoding="utf-8")
    except OSError as error:
        raise BadRow(f"{path}: {error.strerror}; {hint}") from None


def number_lines(path, hint):
    """ "P2: 1 2 3" or "1 2 3" lines -> {name or line number: array}."""
    with opened(path, hint) as file:
        pairs = [line.rpartition(":") for line in file if line.strip()]
    return {name or i: np.array(values.split(), float) for i, (name, _, values) in enumerate(pairs)}


def read_omni3d(path, images):
    """Omni3D_*.json: one file of images and annotations. --images is the folder that file_path starts from."""
    with opened(path, "omni3d needs one Omni3D_*.json") as file:
        data = json.load(file)
    objects = {}
    for annotation in data["annotations"]:
        seen = annotation.get("visibility", -1)  # -1: not known
        if annotation["valid3D"] and not annotation.get("behind_camera") and not 0 <= seen < HIDDEN:
            box = next(
                (
                    annotation[key]
                    for key in ("bbox2D_tight", "bbox2D_trunc")
                    if annotation.get(key, -1) != -1 and max(annotation[key]) > 0
                ),
                None,
            )
            objects.setdefault(annotation["image_id"], []).append(
                {**omni3d_object(annotation), "bbox_2d": box}
            )
    for image in data["images"]:
        yield {
            "id": image["id"],
            "image": os.path.join(images or os.path.dirname(path), image["file_path"]),
            "width": image["width"],
            "height": image["height"],
            "K": image["K"],
            "objects": objects.get(image["id"], []),
        }


def read_kitti(path, images):
    """The folder "training" with label_2, calib and image_2. DontCare regions are left out."""
    hint = "kitti needs the folder with label_2, calib and image_2"
    for label in sorted(Path(path, "label_2").glob("*.txt")):
        projection = number_lines(Path(path, "calib", label.name), hint)["P2"].reshape(3, 4)
        picture = Path(images or Path(path, "image_2"), label.stem + ".png")
        lines = [line.split() for line in label.read_text().splitlines() if line.strip()]
        objects = [
            {**kitti_object(line, projection), "bbox_2d": [float(v) for v in line[4:8]]}
            for line in lines
            if line[0] != "DontCare"
        ]
        width, height = picture_size(picture)
        yield {
            "id": f"kitti_{label.stem}",
            "image": str(picture),
            "width": width,
            "height": height,
            "K": projection[:, :3].tolist(),
            "objects": objects,
        }


def read_sunrgbd(path, images):
    """The text files that the extract_rgbd_data_v*.m of VoteNet and MMDetection3D write from SUNRGBDMeta3DBB_v2.mat:
    label, calib, image. A label line: class, 2D box x y w h, centroid, coeffs, orientation x y. The second coeff lies
    along the orientation, the first across, the third up; calib holds Rtilt and K, each column by column.
    Depth: the data set's own PNGs have their bits rotated, millimetres = d >> 3 | d << 13; undo that first."""
    hint = "sunrgbd needs the folder with label, calib and image"
    for label in sorted(Path(path, "label").glob("*.txt")):
        tilt, camera = (
            v.reshape(3, 3).T for v in number_lines(Path(path, "calib", label.name), hint).values()
        )
        picture, objects = Path(images or Path(path, "image"), label.stem + ".jpg"), []
        for line in label.read_text().splitlines():
            name, *values = line.split()
            left, top, w, h, *values = map(float, values)
            ahead = np.array(values[6:8]) / np.hypot(*values[6:8])
            basis = [(ahead[1], -ahead[0], 0), (*ahead, 0), (0, 0, 1)]
            objects.append(
                {
                    **sunrgbd_object(name, values[:3], basis, values[3:6], tilt),
                    "bbox_2d": [left, top, left + w, top + h],
                }
            )
        width, height = picture_size(picture)
        yield {
            "id": f"sunrgbd_{label.stem}",
            "image": str(picture),
            "width": width,
            "height": height,
            "K": camera.tolist(),
            "objects": objects,
        }


def read_nuscenes(path, images):
    """The folder of the json tables, such as v1.0-mini; the pictures start from its parent. Key frames of all cameras;
    objects of the lowest visibility (below 40 %) are left out; 2D boxes are projections."""

    def table(name):
        with opened(
            os.path.join(path, f"{name}.json"),
            "nuscenes needs the folder of tables, such as v1.0-mini",
        ) as f:
            return json.load(f)

    by_token = {
        name: {row["token"]: row for row in table(name)}
        for name in ("ego_pose", "calibrated_sensor", "instance", "category")
    }
    annotations = {}
    for row in table("sample_annotation"):
        if row["visibility_token"] != "1":
            annotations.setdefault(row["sample_token"], []).append(row)
    for frame in table("sample_data"):
        sensor = by_token["calibrated_sensor"][frame["calibrated_sensor_token"]]
        if frame["is_key_frame"] and sensor["camera_intrinsic"]:
            ego, objects = by_token["ego_pose"][frame["ego_pose_token"]], []
            for row in annotations.get(frame["sample_token"], []):
                category = by_token["category"][
                    by_token["instance"][row["instance_token"]]["category_token"]
                ]["name"]
                label = (category.split(".") + [category])[1]  # human.pedestrian.adult
                objects.append({**nuscenes_object(row, ego, sensor, label), "bbox_2d": None})
            yield {
                "id": frame["token"],
                "image": os.path.join(
                    images or os.path.dirname(os.path.abspath(path)), frame["filename"]
                ),
                "width": frame["width"],
                "height": frame["height"],
                "K": sensor["camera_intrinsic"],
                "objects": objects,
            }


def usable(obj, scene, dropped):
    """The object with its 2D box inside the picture, or None: behind the camera, or not in the picture."""
    camera, box = np.array(scene["K"]), obj["bbox_2d"]
    if obj["center_cam"][2] < NEAR or min(obj["size_3d"]) <= 0:
        dropped["behind the camera, or without size"] += 1
        return None
    if box is None:
        points = corners(
            {
                "center": np.array(obj["center_cam"]),
                "size": np.array(obj["size_3d"]),
                "rotation": np.array(obj["R_cam"]),
            }
        )
        if points[:, 2].min() < NEAR:
            dropped["2D box unknown: the 3D box reaches behind the camera"] += 1
            return None
        u, v = project(points, camera[[0, 1, 0, 1], [0, 1, 2, 2]])
        box = [u.min(), v.min(), u.max(), v.max()]
    inside = np.clip(box, 0, [scene["width"], scene["height"]] * 2)
    if (inside[2:] - inside[:2] < 2).any():
        dropped["not in the picture"] += 1
        return None
    return {**obj, "bbox_2d": np.round(inside, 2).tolist()}


READERS = {
    "omni3d": read_omni3d,
    "kitti": read_kitti,
    "sunrgbd": read_sunrgbd,
    "nuscenes": read_nuscenes,
}


def convert(args):
    """Write a scenes.jsonl; print how many pictures and objects, and what was left out."""
    folder, count, dropped, kept, maps = (
        os.path.dirname(os.path.abspath(args.out)),
        0,
        Counter(),
        0,
        set(),
    )
    with whole(args.out) as file:
        try:
            for scene in tqdm(
                READERS[args.format](args.path, args.images), desc=args.format, unit=""
            ):
                scene["objects"] = [
                    o for o in (usable(o, scene, dropped) for o in scene["objects"]) if o
                ]
                depth = os.path.join(args.depth, Path(scene["image"]).stem + ".png")
                if depth in maps:
                    raise BadRow(
                        f"{depth}: two pictures have this name, {scene['image']} is one; convert them apart"
                    )
                if args.depth and os.path.isfile(depth):
                    scene["depth"], scene["depth_scale"] = (
                        os.path.relpath(depth, folder),
                        args.depth_scale,
                    )
                    maps.add(depth)
                scene["image"] = os.path.relpath(scene["image"], folder)
                file.write(json.dumps(scene) + "\n")
                count, kept = count + 1, kept + len(scene["objects"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, BadRow):
                raise
            raise BadRow(
                f"{args.path}: picture {count} is not as {args.format} writes it ({error!r})"
            ) from error
        if not count:
            raise BadRow(
                f"{args.path}: no annotated picture of {args.format} there; see `-m tools.convert --help`"
            )
    for reason, n in dropped.items():
        print(f"left out {n:,} objects: {reason}")
    print(f"{count:,} pictures ({len(maps):,} with depth), {kept:,} objects -> {args.out}")


@dataclass
class Settings:
    path: str = setting(
        "",
        "omni3d: the json; kitti, sunrgbd: folder; nuscenes: folder of the json tables",
        positional=True,
    )
    format: str = setting(None, "omni3d, kitti, sunrgbd or nuscenes", tuple(READERS), flag="from")
    out: str = setting(None, "scenes.jsonl to write")
    images: str = setting("", "folder of the pictures, if elsewhere")
    depth: str = setting(
        "", "folder of depth PNGs named as the pictures, such as tools.depth writes"
    )
    depth_scale: float = setting(0.001, "metres per unit of those; KITTI's own: 0.00390625")


def main():
    convert(parse(Settings, __doc__))


if __name__ == "__main__":
    run_main(main)
