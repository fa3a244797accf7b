"""Depth maps for pictures without depth, by a depth model of transformers.

python -m tools.depth *.jpg --model apple/DepthPro-hf --out depth
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine.settings import parse, run_main, setting
from formats.errors import BadRow
from formats.scenes import read_lines
from tools.build import whole
from tools.convert import picture_size


def is_metric(config):
    """Does the model's depth come in metres? Others give depth up to an unknown scale and shift."""
    if config.model_type not in ("depth_pro", "depth_anything", "dpt", "glpn"):
        raise BadRow(
            f"--model: {config.model_type} is not supported; use a depth_pro, depth_anything, dpt or glpn"
        )
    return (
        config.model_type in ("depth_pro", "glpn")
        or getattr(config, "depth_estimation_type", "") == "metric"
    )


def depth_pro_pixels(images, settings):
    """DepthPro's stock image processor needs torchvision, so its three steps are here: normalise, then resize."""
    import torch

    size, mean, std = (
        (settings.get("size") or {"height": 1536, "width": 1536}),
        settings.get("image_mean", [0.5] * 3),
        settings.get("image_std", [0.5] * 3),
    )
    pixels = [
        torch.from_numpy((np.asarray(i, np.float32) / 255 - mean) / std).float().permute(2, 0, 1)
        for i in images
    ]
    return torch.nn.functional.interpolate(
        torch.stack(pixels), size=(size["height"], size["width"]), mode="bilinear"
    )


def predict(model, processor, images):
    """RGB pictures of one size -> the model's own numbers (B, H, W), focal lengths in pixels (B,) or Nones.

    DepthPro gives inverse depth for a camera whose focal length is the width of the picture, and a field of view."""
    import torch

    width, height = images[0].size
    pixels = (
        depth_pro_pixels(images, processor)
        if model.config.model_type == "depth_pro"
        else processor(images=images, return_tensors="pt")["pixel_values"]
    )
    with torch.inference_mode():
        output = model(pixel_values=pixels.to(model.device, model.dtype))
    depth, focal = output.predicted_depth.float(), [None] * len(images)  # (B, h, w)
    if model.config.model_type == "depth_pro":
        angle = output.field_of_view.float().reshape(-1)  # degrees, horizontal
        focal = width / 2 / torch.tan(torch.deg2rad(angle) / 2)
        depth, focal = depth * (width / focal)[:, None, None], focal.tolist()
    depth = torch.nn.functional.interpolate(depth[:, None], size=(height, width), mode="bilinear")[
        :, 0
    ]
    depth = 1 / depth.clamp(1e-4, 1e4) if model.config.model_type == "depth_pro" else depth
    return depth.cpu().numpy(), focal


def save_depth(depth, path, metric):
    """Metres -> 16-bit PNG in millimetres, 0 = none or beyond 65.535 m; relative depth -> 8-bit PNG, 0 to 255."""
    if metric:
        units = np.round(1000 * depth)
        image = Image.fromarray(
            np.where((units >= 1) & (units <= 65535), units, 0).astype(np.uint16)
        )
    else:
        image = Image.fromarray(
            np.round(255 * (depth - depth.min()) / max(np.ptp(depth), 1e-9)).astype(np.uint8)
        )
    image.save(f"{path}.partial", format="PNG")
    os.replace(f"{path}.partial", path)


def load_depth_model(name):
    """-> model in evaluation mode, on the GPU if there is one, and its image processor (DepthPro: its settings); all
    without torchvision."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForDepthEstimation,
        DPTImageProcessorPil,
        GLPNImageProcessorPil,
    )
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config = AutoConfig.from_pretrained(name)
        is_metric(config)
        if config.model_type == "depth_pro" and not config.use_fov_model:
            raise BadRow(f"--model {name}: a DepthPro without field of view gives no metres")
        stock = {"depth_pro": None, "glpn": GLPNImageProcessorPil}.get(
            config.model_type, DPTImageProcessorPil
        )
        processor = (
            stock.from_pretrained(name)
            if stock
            else ImageProcessingMixin.get_image_processor_dict(name)[0]
        )
        model = AutoModelForDepthEstimation.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise (
            error
            if isinstance(error, BadRow)
            else BadRow(f"--model {name}: {str(error).splitlines()[0]}")
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def depth(args):
    """Write OUT/NAME.png for each picture, and OUT/depth.jsonl beside: a metric model's lines are lines of a
    scenes.jsonl (intrinsics only where the model estimates its focal length); a relative model's say "relative" and
    have no depth_scale, and its 8-bit maps are refused as depth by every reader here. Finished pictures are skipped."""
    lines, done = os.path.join(args.out, "depth.jsonl"), {}
    os.makedirs(args.out, exist_ok=True)
    maps = {path: os.path.join(args.out, Path(path).stem + ".png") for path in args.images}
    if len(set(maps.values())) < len(maps):
        raise BadRow(
            "depth: two of the pictures have one name: their maps would overwrite each other"
        )
    if any(os.path.abspath(path) == os.path.abspath(out) for path, out in maps.items()):
        raise BadRow(
            f"--out {args.out}: holds the pictures themselves, their maps would overwrite them"
        )
    if os.path.isfile(lines):
        for row, where in read_lines(lines):
            if row.get("model") != args.model:
                raise BadRow(
                    f"{where}: made by {row.get('model')}: give --model {args.model} a folder of its own"
                )
            if os.path.isfile(os.path.join(args.out, row["depth"])):
                done[row["depth"]] = row
        with whole(lines) as file:  # a map that was deleted is made and listed again
            file.writelines(json.dumps(row) + "\n" for row in done.values())
    todo = [path for path in maps if os.path.basename(maps[path]) not in done]
    sizes = {path: picture_size(path) for path in todo}
    todo.sort(key=sizes.get)
    print(f"{len(todo):,} pictures to do, {len(maps) - len(todo):,} finished before")
    if not todo:
        return
    model, processor = load_depth_model(args.model)
    metric = is_metric(model.config)
    print(
        f"{args.model}: "
        + (
            "metric, written in millimetres"
            if metric
            else "RELATIVE depth, no metres: for those take a metric model, such as apple/DepthPro-hf"
        )
    )
    bar = tqdm(total=len(todo), desc="depth", unit="")
    while todo:
        size = sizes[todo[0]]
        batch = [path for path in todo[: args.batch] if sizes[path] == size]
        todo = todo[len(batch) :]
        with_focal = predict(model, processor, [Image.open(path).convert("RGB") for path in batch])
        for path, z, focal in zip(batch, *with_focal):
            save_depth(z, maps[path], metric)
            row = {
                "id": Path(path).stem,
                "image": os.path.relpath(path, args.out),
                "objects": [],
                "model": args.model,
                "depth": os.path.basename(maps[path]),
                "width": size[0],
                "height": size[1],
            }
            row.update({"depth_scale": 0.001} if metric else {"relative": True})
            row.update({"intrinsics": [focal, focal, size[0] / 2, size[1] / 2]} if focal else {})
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        bar.update(len(batch))
    bar.close()
    if metric and model.config.model_type != "depth_pro":
        print(
            "this model estimates no focal length: add your camera's intrinsics, or 60 degrees are assumed"
        )


@dataclass
class Settings:
    images: list = setting([], "pictures", positional=True)
    out: str = setting(None, "folder for the maps and depth.jsonl")
    model: str = setting("apple/DepthPro-hf", "a depth model of transformers, hub name or folder")
    batch: int = setting(4, "pictures of one size in a forward pass")


def main():
    depth(parse(Settings, __doc__))


if __name__ == "__main__":
    run_main(main)
