"""What a data set lacks to be a scenes.jsonl: its annotation in our coordinates (`python scenes.py convert`), and depth
maps for pictures without (`python scenes.py depth`).

Ours: camera frame, metres, x right, y down, z forward; center_cam is the centre of the 3D box, size_3d its full lengths
along its own axes, R_cam (3, 3) has these axes as columns: corner = center_cam + R_cam @ (+-size_3d / 2).
Each converter is a pure function from one annotated object to {"label", "center_cam", "size_3d", "R_cam"}, and a reader
that walks the data set's files and yields lines of a scenes.jsonl, pictures as full paths.
"""
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from build import whole
from scenes import BadInput, corners, project, read_lines

HIDDEN = 1 / 3              # objects annotated as less visible than this are left out: nobody can be asked about them
NEAR = 0.1                  # metres; a box that reaches behind this cannot be projected
FLIP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])       # depth frame (x right, y forward, z up) -> camera frame


# ---- one object ------------------------------------------------------------------------------------------------------
def boxed(label, center, size, rotation):
    rotation = np.array(rotation, float)
    if np.linalg.det(rotation) < 0:                         # axes given left-handed: a box does not mind a turned axis
        rotation[:, 2] *= -1
    return {"label": label, "center_cam": np.round(center, 4).tolist(), "size_3d": np.round(size, 4).tolist(),
            "R_cam": np.round(rotation, 6).tolist()}


def omni3d_object(annotation):
    """center_cam and R_cam are ours already. dimensions are width, height, length, and lie along the box's z, y, x:
    github.com/facebookresearch/omni3d, DATA.md (fields, axes) and cubercnn/util/math_util.py (get_cuboid_verts_faces:
    x = +-l/2, y = +-h/2, z = +-w/2)."""
    width, height, length = annotation["dimensions"]
    return boxed(annotation["category_name"], annotation["center_cam"], (length, height, width), annotation["R_cam"])


def kitti_object(fields, projection):
    """One label line, split. dimensions are height, width, length; location is the middle of the box's *bottom* face;
    rotation_y turns about the camera's y axis, at 0 the length lies along x. Location is in the frame of camera 0;
    `projection` (3, 4), P2 of the calibration, also shifts to camera 2, which took the picture (6 cm).
    KITTI object development kit: readme.txt (fields), matlab/computeBox3D.m (corners: x +-l/2, y 0 to -h, z +-w/2)."""
    height, width, length, x, y, z, turn = map(float, fields[8:15])
    shift = np.linalg.solve(projection[:, :3], projection[:, 3])
    rotation = [[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]]
    return boxed(fields[0], np.array([x, y - height / 2, z]) + shift, (length, height, width), rotation)


def sunrgbd_object(label, centroid, basis, coeffs, tilt):
    """SUN RGB-D's groundtruth3DBB, in upright depth coordinates (x right, y forward, z up against gravity): basis has
    the box's axes as rows, coeffs are *half* lengths along them, of any sign. tilt (3, 3), Rtilt, takes depth
    coordinates to upright ones. SUNRGBDtoolbox (corners = centroid +- basis rows * coeffs); camera = (x, -z, y) of
    Rtilt' p as in github.com/facebookresearch/votenet, sunrgbd/sunrgbd_utils.py."""
    to_camera = FLIP @ np.asarray(tilt).T
    return boxed(label, to_camera @ centroid, 2 * np.abs(coeffs), to_camera @ np.asarray(basis).T)


def quaternion(w, x, y, z):
    """Unit quaternion, scalar first, -> rotation (3, 3)."""
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def nuscenes_object(annotation, ego, sensor, label):
    """A sample_annotation: translation (centre), rotation (quaternion w, x, y, z) in the global frame; size is width,
    length, height, the box's x axis points along its length, y along its width, z up. ego (ego_pose) and sensor
    (calibrated_sensor of the camera) have translation and rotation: vehicle -> global, camera -> vehicle.
    github.com/nutonomy/nuscenes-devkit, docs/schema_nuscenes.md and nuscenes/utils/data_classes.py (Box.corners)."""
    width, length, height = annotation["size"]
    center, rotation = np.array(annotation["translation"]), quaternion(*annotation["rotation"])
    for frame in (ego, sensor):                             # global -> vehicle -> camera: undo each pose
        turn = quaternion(*frame["rotation"]).T
        center, rotation = turn @ (center - frame["translation"]), turn @ rotation
    return boxed(label, center, (length, width, height), rotation)


# ---- data sets -------------------------------------------------------------------------------------------------------
def picture_size(path):
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise BadInput(f"{path}: cannot read the picture ({error}); is --images right?") from None


def opened(path, hint):
    try:
        return open(path, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; {hint}") from None


def number_lines(path, hint):
    """"P2: 1 2 3" or "1 2 3" lines -> {name or line number: array}."""
    with opened(path, hint) as file:
        pairs = [line.rpartition(":") for line in file if line.strip()]
    return {name or i: np.array(values.split(), float) for i, (name, _, values) in enumerate(pairs)}


def read_omni3d(path, images):
    """Omni3D_*.json: one file of images and annotations. --images is the folder that file_path starts from."""
    with opened(path, "omni3d needs one Omni3D_*.json") as file:
        data = json.load(file)
    objects = {}
    for annotation in data["annotations"]:
        seen = annotation.get("visibility", -1)             # -1: not known
        if annotation["valid3D"] and not annotation.get("behind_camera") and not 0 <= seen < HIDDEN:
            box = next((annotation[key] for key in ("bbox2D_tight", "bbox2D_trunc")
                        if annotation.get(key, -1) != -1 and max(annotation[key]) > 0), None)
            objects.setdefault(annotation["image_id"], []).append({**omni3d_object(annotation), "bbox_2d": box})
    for image in data["images"]:
        yield {"id": image["id"], "image": os.path.join(images or os.path.dirname(path), image["file_path"]),
               "width": image["width"], "height": image["height"], "K": image["K"],
               "objects": objects.get(image["id"], [])}


def read_kitti(path, images):
    """The folder "training" with label_2, calib and image_2. DontCare regions are left out."""
    hint = "kitti needs the folder with label_2, calib and image_2"
    for label in sorted(Path(path, "label_2").glob("*.txt")):
        projection = number_lines(Path(path, "calib", label.name), hint)["P2"].reshape(3, 4)
        picture = Path(images or Path(path, "image_2"), label.stem + ".png")
        lines = [line.split() for line in label.read_text().splitlines() if line.strip()]
        objects = [{**kitti_object(line, projection), "bbox_2d": [float(v) for v in line[4:8]]}
                   for line in lines if line[0] != "DontCare"]
        width, height = picture_size(picture)
        yield {"id": f"kitti_{label.stem}", "image": str(picture), "width": width, "height": height,
               "K": projection[:, :3].tolist(), "objects": objects}


def read_sunrgbd(path, images):
    """The text files that the extract_rgbd_data_v*.m of VoteNet and MMDetection3D write from SUNRGBDMeta3DBB_v2.mat:
    label, calib, image. A label line: class, 2D box x y w h, centroid, coeffs, orientation x y. The second coeff lies
    along the orientation, the first across, the third up; calib holds Rtilt and K, each column by column.
    Depth: the data set's own PNGs have their bits rotated, millimetres = d >> 3 | d << 13; undo that first."""
    hint = "sunrgbd needs the folder with label, calib and image"
    for label in sorted(Path(path, "label").glob("*.txt")):
        tilt, camera = (v.reshape(3, 3).T for v in number_lines(Path(path, "calib", label.name), hint).values())
        picture, objects = Path(images or Path(path, "image"), label.stem + ".jpg"), []
        for line in label.read_text().splitlines():
            name, *values = line.split()
            left, top, w, h, *values = map(float, values)
            ahead = np.array(values[6:8]) / np.hypot(*values[6:8])
            basis = [(ahead[1], -ahead[0], 0), (*ahead, 0), (0, 0, 1)]
            objects.append({**sunrgbd_object(name, values[:3], basis, values[3:6], tilt),
                            "bbox_2d": [left, top, left + w, top + h]})
        width, height = picture_size(picture)
        yield {"id": f"sunrgbd_{label.stem}", "image": str(picture), "width": width, "height": height,
               "K": camera.tolist(), "objects": objects}


def read_nuscenes(path, images):
    """The folder of the json tables, such as v1.0-mini; the pictures start from its parent. Key frames of all cameras;
    objects of the lowest visibility (below 40 %) are left out; 2D boxes are projections."""
    def table(name):
        with opened(os.path.join(path, f"{name}.json"), "nuscenes needs the folder of tables, such as v1.0-mini") as f:
            return json.load(f)

    by_token = {name: {row["token"]: row for row in table(name)}
                for name in ("ego_pose", "calibrated_sensor", "instance", "category")}
    annotations = {}
    for row in table("sample_annotation"):
        if row["visibility_token"] != "1":
            annotations.setdefault(row["sample_token"], []).append(row)
    for frame in table("sample_data"):
        sensor = by_token["calibrated_sensor"][frame["calibrated_sensor_token"]]
        if frame["is_key_frame"] and sensor["camera_intrinsic"]:
            ego, objects = by_token["ego_pose"][frame["ego_pose_token"]], []
            for row in annotations.get(frame["sample_token"], []):
                category = by_token["category"][by_token["instance"][row["instance_token"]]["category_token"]]["name"]
                label = (category.split(".") + [category])[1]                                # human.pedestrian.adult
                objects.append({**nuscenes_object(row, ego, sensor, label), "bbox_2d": None})
            yield {"id": frame["token"], "image": os.path.join(images or os.path.dirname(os.path.abspath(path)),
                                                               frame["filename"]),
                   "width": frame["width"], "height": frame["height"], "K": sensor["camera_intrinsic"],
                   "objects": objects}


def usable(obj, scene, dropped):
    """The object with its 2D box inside the picture, or None: behind the camera, or not in the picture."""
    camera, box = np.array(scene["K"]), obj["bbox_2d"]
    if obj["center_cam"][2] < NEAR or min(obj["size_3d"]) <= 0:
        dropped["behind the camera, or without size"] += 1
        return None
    if box is None:
        points = corners({"center": np.array(obj["center_cam"]), "size": np.array(obj["size_3d"]),
                          "rotation": np.array(obj["R_cam"])})
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


READERS = {"omni3d": read_omni3d, "kitti": read_kitti, "sunrgbd": read_sunrgbd, "nuscenes": read_nuscenes}


def convert(args):
    """Write a scenes.jsonl; print how many pictures and objects, and what was left out."""
    folder, count, dropped, kept, maps = os.path.dirname(os.path.abspath(args.out)), 0, Counter(), 0, set()
    with whole(args.out) as file:
        try:
            for scene in tqdm(READERS[args.format](args.path, args.images), desc=args.format, unit=""):
                scene["objects"] = [o for o in (usable(o, scene, dropped) for o in scene["objects"]) if o]
                depth = os.path.join(args.depth, Path(scene["image"]).stem + ".png")
                if depth in maps:
                    raise BadInput(f"{depth}: two pictures have this name, {scene['image']} is one; convert them apart")
                if args.depth and os.path.isfile(depth):
                    scene["depth"], scene["depth_scale"] = os.path.relpath(depth, folder), args.depth_scale
                    maps.add(depth)
                scene["image"] = os.path.relpath(scene["image"], folder)
                file.write(json.dumps(scene) + "\n")
                count, kept = count + 1, kept + len(scene["objects"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{args.path}: picture {count} is not as {args.format} writes it ({error!r})") from error
        if not count:
            raise BadInput(f"{args.path}: no annotated picture of {args.format} there; see `scenes.py convert --help`")
    for reason, n in dropped.items():
        print(f"left out {n:,} objects: {reason}")
    print(f"{count:,} pictures ({len(maps):,} with depth), {kept:,} objects -> {args.out}")


# ---- depth -----------------------------------------------------------------------------------------------------------
def is_metric(config):
    """Does the model's depth come in metres? Others give depth up to an unknown scale and shift."""
    if config.model_type not in ("depth_pro", "depth_anything", "dpt", "glpn"):
        raise BadInput(f"--model: {config.model_type} is not supported; use a depth_pro, depth_anything, dpt or glpn")
    return config.model_type in ("depth_pro", "glpn") or getattr(config, "depth_estimation_type", "") == "metric"


def depth_pro_pixels(images, settings):
    """DepthPro's stock image processor needs torchvision, so its three steps are here: normalise, then resize."""
    import torch
    size, mean, std = ((settings.get("size") or {"height": 1536, "width": 1536}),
                       settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3))
    pixels = [torch.from_numpy((np.asarray(i, np.float32) / 255 - mean) / std).float().permute(2, 0, 1) for i in images]
    return torch.nn.functional.interpolate(torch.stack(pixels), size=(size["height"], size["width"]), mode="bilinear")


def predict(model, processor, images):
    """RGB pictures of one size -> the model's own numbers (B, H, W), focal lengths in pixels (B,) or Nones.

    DepthPro gives inverse depth for a camera whose focal length is the width of the picture, and a field of view."""
    import torch
    width, height = images[0].size
    pixels = depth_pro_pixels(images, processor) if model.config.model_type == "depth_pro" else \
        processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        output = model(pixel_values=pixels.to(model.device, model.dtype))
    depth, focal = output.predicted_depth.float(), [None] * len(images)                      # (B, h, w)
    if model.config.model_type == "depth_pro":
        angle = output.field_of_view.float().reshape(-1)                                     # degrees, horizontal
        focal = width / 2 / torch.tan(torch.deg2rad(angle) / 2)
        depth, focal = depth * (width / focal)[:, None, None], focal.tolist()
    depth = torch.nn.functional.interpolate(depth[:, None], size=(height, width), mode="bilinear")[:, 0]
    depth = 1 / depth.clamp(1e-4, 1e4) if model.config.model_type == "depth_pro" else depth
    return depth.cpu().numpy(), focal


def save_depth(depth, path, metric):
    """Metres -> 16-bit PNG in millimetres, 0 = none or beyond 65.535 m; relative depth -> 8-bit PNG, 0 to 255."""
    if metric:
        units = np.round(1000 * depth)
        image = Image.fromarray(np.where((units >= 1) & (units <= 65535), units, 0).astype(np.uint16))
    else:
        image = Image.fromarray(np.round(255 * (depth - depth.min()) / max(np.ptp(depth), 1e-9)).astype(np.uint8))
    image.save(f"{path}.partial", format="PNG")
    os.replace(f"{path}.partial", path)


def load_depth_model(name):
    """-> model in evaluation mode, on the GPU if there is one, and its image processor (DepthPro: its settings); all
    without torchvision."""
    import torch
    from transformers import AutoConfig, AutoModelForDepthEstimation, DPTImageProcessorPil, GLPNImageProcessorPil
    from transformers.image_processing_base import ImageProcessingMixin
    try:
        config = AutoConfig.from_pretrained(name)
        is_metric(config)
        if config.model_type == "depth_pro" and not config.use_fov_model:
            raise BadInput(f"--model {name}: a DepthPro without field of view gives no metres")
        stock = {"depth_pro": None, "glpn": GLPNImageProcessorPil}.get(config.model_type, DPTImageProcessorPil)
        processor = stock.from_pretrained(name) if stock else ImageProcessingMixin.get_image_processor_dict(name)[0]
        model = AutoModelForDepthEstimation.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, BadInput) else BadInput(f"--model {name}: {str(error).splitlines()[0]}")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def depth(args):
    """Write OUT/NAME.png for each picture, and OUT/depth.jsonl beside: a metric model's lines are lines of a
    scenes.jsonl (intrinsics only where the model estimates its focal length); a relative model's say "relative" and
    have no depth_scale, and its 8-bit maps are refused as depth by every reader here. Finished pictures are skipped."""
    lines, done = os.path.join(args.out, "depth.jsonl"), {}
    os.makedirs(args.out, exist_ok=True)
    maps = {path: os.path.join(args.out, Path(path).stem + ".png") for path in args.images}
    if len(set(maps.values())) < len(maps):
        raise BadInput("depth: two of the pictures have one name: their maps would overwrite each other")
    if any(os.path.abspath(path) == os.path.abspath(out) for path, out in maps.items()):
        raise BadInput(f"--out {args.out}: holds the pictures themselves, their maps would overwrite them")
    if os.path.isfile(lines):
        for row, where in read_lines(lines):
            if row.get("model") != args.model:
                raise BadInput(f"{where}: made by {row.get('model')}: give --model {args.model} a folder of its own")
            if os.path.isfile(os.path.join(args.out, row["depth"])):
                done[row["depth"]] = row
        with whole(lines) as file:                          # a map that was deleted is made and listed again
            file.writelines(json.dumps(row) + "\n" for row in done.values())
    todo = [path for path in maps if os.path.basename(maps[path]) not in done]
    sizes = {path: picture_size(path) for path in todo}
    todo.sort(key=sizes.get)
    print(f"{len(todo):,} pictures to do, {len(maps) - len(todo):,} finished before")
    if not todo:
        return
    model, processor = load_depth_model(args.model)
    metric = is_metric(model.config)
    print(f"{args.model}: " + ("metric, written in millimetres" if metric else
                               "RELATIVE depth, no metres: for those take a metric model, such as apple/DepthPro-hf"))
    bar = tqdm(total=len(todo), desc="depth", unit="")
    while todo:
        size = sizes[todo[0]]
        batch = [path for path in todo[:args.batch] if sizes[path] == size]
        todo = todo[len(batch):]
        with_focal = predict(model, processor, [Image.open(path).convert("RGB") for path in batch])
        for path, z, focal in zip(batch, *with_focal):
            save_depth(z, maps[path], metric)
            row = {"id": Path(path).stem, "image": os.path.relpath(path, args.out), "objects": [], "model": args.model,
                   "depth": os.path.basename(maps[path]), "width": size[0], "height": size[1]}
            row.update({"depth_scale": 0.001} if metric else {"relative": True})
            row.update({"intrinsics": [focal, focal, size[0] / 2, size[1] / 2]} if focal else {})
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        bar.update(len(batch))
    bar.close()
    if metric and model.config.model_type != "depth_pro":
        print("this model estimates no focal length: add your camera's intrinsics, or 60 degrees are assumed")
