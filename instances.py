"""Instances in the format of the authors' published sets (see README, "Your own data"): reading and checking of rows."""
import json
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError

from rewards import extract_answer, total_reward

REGION = "<mask>"
DEFAULT_FOV = 60                                            # degrees, horizontal: for pictures without intrinsics
MARK_COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0)}


class BadRow(ValueError):
    """A user's row that cannot be used; the message names file, row and field."""


def load_instances(path):
    """A JSON list (or JSON lines) of instances -> dicts that know their "source" and the "folder" of their files."""
    if not os.path.isfile(path):
        raise BadRow(f"{path}: no such file (give a JSON list of instances)")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise BadRow(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadRow(f"{path}: needs a list of rows, each a JSON object")
    folder = os.path.dirname(os.path.abspath(path))
    return [{**row, "source": f"{path}: row {i}", "folder": folder} for i, row in enumerate(rows)]


def finite(values, count):
    """Is this a list of so many finite numbers?"""
    return isinstance(values, (list, tuple)) and len(values) == count and all(
        isinstance(v, (int, float)) and abs(v) < 1e9 for v in values)                        # false for NaN too


def boxes_of(row, field, count=4):
    """A field that holds a list of boxes (or, with count 2, points)."""
    boxes = row.get(field, [])
    if not isinstance(boxes, list) or not all(finite(box, count) for box in boxes):
        raise BadRow(f"{row['source']}: field '{field}': needs a list of lists of {count} finite numbers, not {boxes}")
    return boxes


def path_of(row):
    """The rule of the published sets: "3d_pos" present -> DTR (even when empty), absent -> LOR."""
    return "dtr" if "3d_pos" in row else "lor"


def question_of(row):
    return turns(row)[0].replace("<image>\n", "").replace("<image>", "").strip()


def turns(row):
    talk = row.get("conversations")
    if not isinstance(talk, list) or len(talk) != 2 or not all(
            isinstance(turn, dict) and str(turn.get("value", "")).strip() for turn in talk):
        raise BadRow(f"{row['source']}: field 'conversations': needs one question and one non-empty answer")
    return talk[0]["value"], talk[1]["value"]


def answer_of(row):
    """The ground-truth answer: "answer", else the <answer> of the target, else the whole target."""
    target = turns(row)[1]
    answer = row["answer"] if "answer" in row else extract_answer(target) or target
    if not str(answer).strip():
        raise BadRow(f"{row['source']}: field 'answer': empty")
    return str(answer).strip()


def centers_of(row):
    """Ground-truth centres by mark, {"red bbox": (x, y, z)}; None for LOR, {} for DTR without detection reward."""
    if path_of(row) == "lor":
        return None
    if not isinstance(row["3d_pos"], dict):
        raise BadRow(f"{row['source']}: field '3d_pos': needs {{mark: {{'center_cam': [x, y, z]}}}}")
    centers = {}
    for mark, truth in row["3d_pos"].items():
        point = truth.get("center_cam") if isinstance(truth, dict) else None
        if not finite(point, 3):
            raise BadRow(f"{row['source']}: field '3d_pos.{mark}.center_cam': needs three finite numbers, metres")
        centers[mark.replace("_", " ")] = tuple(map(float, point))
    return centers


def open_image(row, field="image"):
    """-> RGB picture of a path (relative to the row's file) or an array."""
    value = row.get(field)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if not isinstance(value, str):
        raise BadRow(f"{row['source']}: field '{field}': needs a path (several images are not supported here)")
    path = os.path.join(row.get("folder", "."), value)
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise BadRow(f"{row['source']}: field '{field}': no such file {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise BadRow(f"{row['source']}: field '{field}': unreadable image {path} ({error})") from None
    return image


def open_depth(row, width, height):
    """-> depth (H, W) float32 metres, NaN = no measurement, or None where the row has none."""
    depth = row.get("depth")
    if depth is None:
        return None
    if isinstance(depth, str):
        image = open_image(row, "depth")
        if image.mode in ("L", "P", "RGB") and "depth_scale" not in row:
            raise BadRow(f"{row['source']}: field 'depth': 8-bit pictures hold relative depth; add 'depth_scale' "
                         "(metres per unit) or leave the depth out")
        if not finite([row.get("depth_scale", 0.001)], 1):
            raise BadRow(f"{row['source']}: field 'depth_scale': needs a number, metres per unit")
        depth = np.asarray(image, np.float32) * row.get("depth_scale", 0.001)
        depth = np.where(depth > 0, depth, np.nan).astype(np.float32)
    if not isinstance(depth, np.ndarray):
        raise BadRow(f"{row['source']}: field 'depth': needs the path of a 16-bit PNG")
    if depth.shape != (height, width):
        size = "x".join(map(str, depth.shape[::-1]))
        raise BadRow(f"{row['source']}: field 'depth': {size} pixels, the image has {width}x{height}")
    return depth


def intrinsics_of(row, width, height):
    given = row.get("intrinsics")
    if given is None:
        focal = width / 2 / math.tan(math.radians(DEFAULT_FOV / 2))
        return focal, focal, width / 2, height / 2
    if not finite(given, 4) or min(given[:2]) <= 0:
        raise BadRow(f"{row['source']}: field 'intrinsics': needs [fx, fy, cx, cy], pixels, finite, focal lengths > 0")
    return tuple(map(float, given))


def region_masks(row, width, height):
    """"bbox" (absolute pixels, one for each <mask>) -> masks (R, H, W), 1 = inside."""
    boxes = boxes_of(row, "bbox") if path_of(row) == "dtr" or REGION in question_of(row) else []
    count = question_of(row).count(REGION)
    if count != len(boxes):
        raise BadRow(f"{row['source']}: field 'bbox': {len(boxes)} boxes for {count} <mask> in the question")
    masks = torch.zeros(len(boxes), height, width)
    for mask, box in zip(masks, boxes):
        if not (-1 <= box[0] < box[2] <= width + 1 and -1 <= box[1] < box[3] <= height + 1):
            raise BadRow(f"{row['source']}: field 'bbox': {box} is empty or outside the image ({width}x{height}); "
                         "needs x1,y1,x2,y2")
        x1, y1, x2, y2 = max(0, math.floor(box[0])), max(0, math.floor(box[1])), math.ceil(box[2]), math.ceil(box[3])
        mask[min(y1, height - 1):max(y2, y1 + 1), min(x1, width - 1):max(x2, x1 + 1)] = 1
    return masks


def draw_marks(image, row):
    """Coloured boxes (5 px a 1000 px of width, 2 at least) and points (radius 20 px a 1000 px) on a copy."""
    image, (w, h) = image.convert("RGB"), image.size
    pen = ImageDraw.Draw(image)
    for color, rgb in MARK_COLORS.items():
        for x1, y1, x2, y2 in boxes_of(row, f"{color}_bbox"):
            right, bottom = x2 * w / 1000 - 1, y2 * h / 1000 - 1
            corners = [min(x1 * w / 1000, right), min(y1 * h / 1000, bottom), right, bottom]
            pen.rectangle(corners, outline=rgb, width=max(2, round(w / 200)))
        for x, y in boxes_of(row, f"{color}_point", 2):
            r = max(1, w / 50)
            pen.ellipse([x * w / 1000 - r, y * h / 1000 - r, x * w / 1000 + r, y * h / 1000 + r], fill=rgb)
    return image


def check_row(row):
    """Raise BadRow if the row cannot be used; reads its pictures."""
    width, height = draw_marks(open_image(row), row).size
    for part in (region_masks, open_depth, intrinsics_of):
        part(row, width, height)
    answer, centers = answer_of(row), centers_of(row)
    try:
        total_reward("", answer, path_of(row), centers, question=question_of(row))
    except ValueError as error:                             # wrong ground truth
        raise BadRow(f"{row['source']}: field {error}") from None
