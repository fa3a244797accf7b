"""Depth maps for pictures that have none, by a depth model of transformers.

    python -m tools.depth pictures/*.jpg --out depth                # DepthPro: metres, focal length
    python -m tools.depth pictures/*.jpg --out depth --model MODEL  # name on the hub, or a folder

The kinds of models, by the "model_type" of their config.json:

    depth_pro        DepthPro: metric, and estimates the focal length
    glpn             GLPN: metric
    depth_anything   Depth Anything: metric if its depth_estimation_type is "metric", else relative
    dpt              DPT: relative

Metric is z in metres, which training needs: questions, rewards and the 3D position embedding are
about metres. Relative is inverse depth up to an unknown scale and shift, larger is nearer; it is to
be looked at.

What is written for a picture NAME.jpg:

    OUT/NAME.png      metric: 16 bits, millimetres, 0 where there is none or it is beyond 65.535 m;
                      relative: 8 bits, 0 to 255, which every reader of depth here refuses
    OUT/depth.jsonl   a line per picture, as in a scenes.jsonl, without objects; it names the model.
                      metric: with "depth_scale", and with "intrinsics" if the model estimates the
                      focal length; relative: "relative" instead

To annotated pictures of other data sets `python -m tools.convert --depth OUT` adds the maps. A run
that was stopped goes on: pictures with a map and a line in depth.jsonl are skipped. One folder
holds the maps of one model, and no other pictures.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForDepthEstimation,
    DPTImageProcessorPil,
    GLPNImageProcessorPil,
)
from transformers.image_processing_base import ImageProcessingMixin

from engine.output import is_same_file, try_folder, whole_file
from engine.settings import parse, run_main, setting
from formats.errors import BadRow, quote
from formats.pictures import open_picture, picture_size
from formats.scenes import check, read_lines


@dataclass
class Settings:
    images: list = setting([], "pictures", positional=True)
    out: str = setting(None, "folder for the maps and depth.jsonl")
    model: str = setting("apple/DepthPro-hf", "a depth model of transformers, hub name or folder")
    batch: int = setting(4, "pictures of one size in a forward pass", at_least=1)


def depth(args):
    """Write the maps of all pictures that have none yet, and their lines of depth.jsonl."""
    try_folder("--out", args.out, os.path.realpath(args.out))
    check_names(args)
    done = finished_maps(args)
    paths = list(dict.fromkeys(args.images))  # each once
    todo = [path for path in paths if map_name(path) not in done]
    sizes = {path: picture_size(path) for path in todo}  # (width, height)
    print(f"{len(todo):,} pictures to do, {len(paths) - len(todo):,} finished before")
    if not todo:
        return
    model, processor = load_depth_model(args.model)
    metric = is_metric(model.config)
    kind = "RELATIVE depth, no metres: for those take a metric model, such as apple/DepthPro-hf"
    if metric:
        kind = "metric, written in millimetres"
    print(f"{args.model}: {kind}")
    add_lines([], args)  # from here on the folder holds maps
    with tqdm(total=len(todo), desc="depth", unit="") as bar:
        for batch in batches_of_one_size(todo, sizes, args.batch):
            depths, focals = predict(model, processor, [open_picture(path) for path in batch])
            for path, z, focal in zip(batch, depths, focals):
                save_depth(z, os.path.join(args.out, map_name(path)), metric)
                add_lines([line_of(path, sizes[path], focal, metric, args)], args)
            bar.update(len(batch))
    if metric and model.config.model_type != "depth_pro":
        print(
            "this model estimates no focal length: "
            "add your camera's intrinsics, or 60 degrees are assumed"
        )


def batches_of_one_size(paths, sizes, most):
    """The pictures sorted by size, in runs of at most `most` that have the same."""
    batches = []
    for path in sorted(paths, key=sizes.get):
        fits = batches and len(batches[-1]) < most and sizes[batches[-1][0]] == sizes[path]
        if not fits:
            batches.append([])
        batches[-1].append(path)
    return batches


# ----------------------------------------------------------------------------------------------
# the models


def is_metric(config):
    """Does the model's depth come in metres? BadRow for a model that is not supported."""
    if config.model_type not in ("depth_pro", "depth_anything", "dpt", "glpn"):
        raise BadRow(
            f"--model: {config.model_type} is not supported; "
            "use a depth_pro, depth_anything, dpt or glpn"
        )
    if config.model_type in ("depth_pro", "glpn"):
        return True
    return getattr(config, "depth_estimation_type", "") == "metric"


def load_depth_model(name):
    """-> the model in evaluation mode, on the GPU if there is one, and its image processor.

    Of DepthPro the settings of its image processor. All work without torchvision. No code of a
    folder is ever run, and no pickle is read.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        is_metric(config)  # refuses models that are not supported
        if config.model_type == "depth_pro" and not config.use_fov_model:
            raise BadRow(f"--model {name}: a DepthPro without field of view gives no metres")
        processor = load_processor(name, config.model_type)
        model = AutoModelForDepthEstimation.from_pretrained(
            name, config=config, use_safetensors=True, trust_remote_code=False
        )
    except BadRow:
        raise
    # A damaged file can raise anything in the depths of transformers.
    except Exception as error:  # noqa: BLE001
        reason = quote(str(error).strip().partition("\n")[0], 150)
        raise BadRow(
            f"--model {name}: cannot be loaded ({type(error).__name__}: {reason})"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), processor


def load_processor(name, model_type):
    if model_type == "depth_pro":
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return settings
    if model_type == "glpn":
        return GLPNImageProcessorPil.from_pretrained(name)
    return DPTImageProcessorPil.from_pretrained(name)


def predict(model, processor, images):
    """B pictures of one size, W x H -> depths (B, H, W), focal lengths in pixels (B,).

    Depth is in metres or relative, as the model gives it. Focal lengths are None for all but
    DepthPro. That model gives inverse depth as seen by a camera whose focal length is the width of
    the picture, and the field of view, from which the true focal length follows.
    """
    width, height = images[0].size
    is_depth_pro = model.config.model_type == "depth_pro"
    if is_depth_pro:
        pixels = depth_pro_pixels(images, processor)
    else:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        output = model(pixel_values=pixels.to(model.device, model.dtype))
    depths = output.predicted_depth.float()  # (B, h, w), of the model's own size
    focals = [None] * len(images)
    if is_depth_pro:
        angle = output.field_of_view.float().reshape(-1)  # (B,) degrees, horizontal
        focal = width / 2 / torch.tan(torch.deg2rad(angle) / 2)  # (B,)
        depths = depths * (width / focal)[:, None, None]
        focals = focal.tolist()
        if not all(0 < focal < math.inf for focal in focals):
            raise BadRow(f"--model {model.name_or_path}: gives no field of view, {angle.tolist()}")
    depths = interpolate(depths[:, None], size=(height, width), mode="bilinear")[:, 0]  # (B, H, W)
    if not depths.isfinite().all():
        raise BadRow(f"--model {model.name_or_path}: gives depth that is not finite")
    if is_depth_pro:
        depths = 1 / depths.clamp(1e-4, 1e4)
    return depths.cpu().numpy(), focals


def depth_pro_pixels(images, settings):
    """Pictures -> pixel values (B, 3, h, w) for DepthPro.

    Its stock image processor needs torchvision, so its three steps are here: to 0..1, normalise,
    resize.
    """
    size = settings.get("size") or {"height": 1536, "width": 1536}
    mean = settings.get("image_mean", [0.5] * 3)
    std = settings.get("image_std", [0.5] * 3)
    pixels = []
    for image in images:
        normalised = (np.asarray(image, np.float32) / 255 - mean) / std  # (H, W, 3)
        pixels.append(torch.from_numpy(normalised).float().permute(2, 0, 1))
    return interpolate(torch.stack(pixels), size=(size["height"], size["width"]), mode="bilinear")


# ----------------------------------------------------------------------------------------------
# files


def map_name(path):
    """The file name of a picture's map in --out."""
    return Path(path).stem + ".png"


def check_names(args):
    """BadRow where the maps would overwrite each other, or another picture."""
    taken = {}  # {name of a map: its picture}
    is_new = not os.path.isfile(os.path.join(args.out, "depth.jsonl"))
    for path in dict.fromkeys(args.images):
        name = map_name(path)
        target = os.path.join(args.out, name)
        if name in taken:
            raise BadRow(f"{path}: {taken[name]} has the same name: their maps would be one file")
        if is_same_file(path, target) or (is_new and os.path.lexists(target)):
            raise BadRow(f"--out {args.out}: holds a picture {name} already; name another folder")
        taken[name] = path


def finished_maps(args):
    """The maps of an earlier run that are still there: {map_name: line of depth.jsonl}."""
    path = os.path.join(args.out, "depth.jsonl")
    done = {}
    if not os.path.isfile(path):
        return done
    for row, where in read_lines(path):
        name = row.get("depth")
        check(
            isinstance(name, str) and name, where, "depth", "must be a map's name; delete the line"
        )
        check(
            row.get("model") == args.model,
            where,
            "model",
            f"is {quote(row.get('model'))}: give --model {args.model} a folder of its own",
        )
        if os.path.isfile(os.path.join(args.out, name)):
            done[name] = row
    # A map that was deleted is made again and gets a new line: the old one has to go.
    with whole_file(path, "--out") as file:
        file.writelines(json.dumps(row) + "\n" for row in done.values())
    return done


def save_depth(z, path, metric):
    """Depth (H, W) -> PNG: of 16 bits in millimetres if metric, else of 8 bits, 0 to 255."""
    if metric:
        units = np.round(1000 * z)
        fits = (units >= 1) & (units <= 65535)
        pixels = np.where(fits, units, 0).astype(np.uint16)  # 0: none
    else:
        spread = max(np.ptp(z), 1e-9)
        pixels = np.round(255 * (z - z.min()) / spread).astype(np.uint8)
    with whole_file(path, "--out", binary=True) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def line_of(path, size, focal, metric, args):
    """The line of depth.jsonl for a picture, whose map is written."""
    width, height = size
    row = {
        "id": Path(path).stem,
        "image": os.path.relpath(path, args.out),
        "objects": [],
        "model": args.model,
        "depth": map_name(path),
        "width": width,
        "height": height,
    }
    if metric:
        row["depth_scale"] = 0.001
    else:
        row["relative"] = True
    if focal:
        row["intrinsics"] = [focal, focal, width / 2, height / 2]
    return row


def add_lines(rows, args):
    """Add lines to depth.jsonl, which may be new."""
    try:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, "depth.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise BadRow(f"--out {args.out}: cannot write there ({error.strerror})") from None


def main():
    depth(parse(Settings, __doc__))


if __name__ == "__main__":
    run_main(main)
