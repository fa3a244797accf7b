"""Instances in the format of the authors' published sets (README, "Your own data"): one row, what its fields mean.

A row has one picture or several ("image": a list); a picture is a path beside the row's file, the encoded bytes that
parquet embeds, or an array. Whatever is wrong with a row is a BadRow: file, row, field, and what it should be.
"""

import io
import math
import os
import re
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw

from formats.errors import BadRow
from rewards import extract_answer, total_reward

IMAGE_PLACEHOLDER, REGION_PLACEHOLDER = "<image>", "<mask>"  # placeholders in a question
DEFAULT_FOV = 60  # degrees, horizontal: for pictures without intrinsics
MARK_COLORS = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
}
POINT_REGION = 50  # thousandths of width and height: the region of a point
# What asks for geometry: DTR's computed coordinates help there, elsewhere words do.
GEOMETRY = re.compile(
    r"\b(?:how (?:far|close|deep|tall|high|wide|long|big|large)|distances?|depth|met(?:er|re)s?|"
    r"closer|closest|nearer|nearest|farther|farthest|further|left|right|above|below|behind|in front|"
    r"height|width|size|taller|larger|smaller|angle|degrees?|rotat\w+|mov\w+|position)\b",
    re.IGNORECASE,
)


def path_of(row):
    """The rule of the published sets: "3d_pos" present -> DTR (even when empty), absent -> LOR."""
    return "dtr" if "3d_pos" in row else "lor"


def turns(row):
    talk = row.get("conversations")
    values = (
        [turn.get("value") if isinstance(turn, dict) else None for turn in talk]
        if isinstance(talk, list)
        else []
    )
    if len(values) != 2 or not all(
        isinstance(v, (str, int, float)) and str(v).strip() for v in values
    ):
        raise BadRow(
            f"{row['source']}: field 'conversations': needs one question and one non-empty answer"
        )
    return tuple(map(str, values))


def answer_of(row):
    """The ground-truth answer: "answer", else the <answer> of the target, else the whole target."""
    target = turns(row)[1]
    answer = row["answer"] if row.get("answer") is not None else extract_answer(target) or target
    if not str(answer).strip():
        raise BadRow(f"{row['source']}: field 'answer': empty")
    return str(answer).strip()


def text_of(row):
    """The question with its placeholders. DTR: where it has no `<mask>`, the first mention of each mark gets one."""
    text = turns(row)[0]
    if path_of(row) == "dtr" and REGION_PLACEHOLDER not in text:
        for field in mark_fields(row):
            text = re.sub(
                rf"\b{field.replace('_', ' ')}\b",
                lambda mark: f"{mark[0]} {REGION_PLACEHOLDER}",
                text,
                count=1,
            )
    return text


def question_of(row):
    return text_of(row).replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()


def on_path(row, path):
    """The same question on this path: its own row, or one made from the other path's (without detection reward)."""
    if path_of(row) == path:
        return row
    other = {
        key: value
        for key, value in row.items()
        if path == "dtr" or key not in ("3d_pos", "bbox", "mask_idx")
    }
    question = (
        text_of(row)
        if path == "dtr"
        else text_of(row).replace(f" {REGION_PLACEHOLDER}", "").replace(REGION_PLACEHOLDER, "")
    )
    other["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer_of(row)},
    ]
    return other | ({"3d_pos": {}} if path == "dtr" else {})


def best_path(row):
    """The path by the paper's own use: DTR where the question has regions and asks for geometry, LOR otherwise."""
    regions = mark_fields(row) or REGION_PLACEHOLDER in text_of(row)
    return "dtr" if regions and GEOMETRY.search(question_of(row)) else "lor"


def on_paths(rows, path):
    """Each question on path "lor", "dtr", "both", or "auto" (the better one). A LOR and a DTR row with the same
    pictures, marks and words are one question."""
    asked, last = [], {}
    for row in rows:
        pictures = [row["source"] if isinstance(v, np.ndarray) else str(v) for v in images_of(row)]
        key = (
            *pictures,
            question_of(row).replace(f" {REGION_PLACEHOLDER}", ""),
            str([row[field] for field in mark_fields(row)]),
        )
        if key not in last or path_of(row) in last[key]:
            last[key] = {}
            asked.append(last[key])
        last[key][path_of(row)] = row
    wanted = lambda twins: {"both": ["lor", "dtr"], "auto": [best_path([*twins.values()][0])]}.get(
        path, [path]
    )
    return [
        twins.get(p) or on_path([*twins.values()][0], p) for twins in asked for p in wanted(twins)
    ]


def images_of(row):
    """The pictures of a row, a list also for one."""
    images = row.get("image")
    if isinstance(images, list) and not images:
        raise BadRow(f"{row['source']}: field 'image': an empty list")
    return images if isinstance(images, list) else [images]


def of_image(row, field, index):
    """The value of a field for one image: a list holds one for each; intrinsics may be given once for all."""
    values, count = row.get(field), len(images_of(row))
    one = (
        not isinstance(values, list)
        or field == "intrinsics"
        and not all(v is None or isinstance(v, list) for v in values)
    )
    values = [values] * (count if values is None or field == "intrinsics" else 1) if one else values
    if len(values) != count:
        raise BadRow(f"{row['source']}: field '{field}': {len(values)} for {count} images")
    return values[index]


def mark_fields(row):
    """The fields that hold coloured marks, in the order of the row: ["red_bbox", "blue_point", ...]."""
    kinds = {f"{color}_{kind}" for color in MARK_COLORS for kind in ("bbox", "point")}
    return [field for field in row if field in kinds]


def marks_of(row):
    """[(field, boxes or points in thousandths, image that they are in), ...], in the order of the row."""
    found, count, truth = [], len(images_of(row)), row.get("3d_pos")
    for kind, size in (("bbox", 4), ("point", 2)):
        fields = [field for field in mark_fields(row) if field.endswith(kind)]
        places = [0] * len(fields)
        if (
            fields and count > 1 and f"{kind}_img_idx" in row
        ):  # [[0, 1]] and [[0], [1]]: one image a field
            places = row[f"{kind}_img_idx"] if isinstance(row[f"{kind}_img_idx"], list) else [None]
            places = [i for part in places for i in (part if isinstance(part, list) else [part])]
        elif count > 1:
            of = lambda field: (truth.get(field) if isinstance(truth, dict) else None) or {}
            places = [
                of(field).get("current_frame") if isinstance(of(field), dict) else None
                for field in fields
            ]
        if len(places) != len(fields) or not all(i in range(count) for i in places):
            raise BadRow(
                f"{row['source']}: field '{kind}_img_idx': needs the image, 0 to {count - 1}, of each of "
                f"{fields}, not {row.get(f'{kind}_img_idx')}"
            )
        for field, image in zip(fields, places):
            shapes = boxes_of(row, field, row[field], size)
            if (
                not all(-1 <= v <= 1001 for shape in shapes for v in shape)
                or kind == "bbox"
                and not all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in shapes)
            ):
                raise BadRow(
                    f"{row['source']}: field '{field}': {shapes} must be "
                    f"{'x1,y1,x2,y2' if kind == 'bbox' else 'x,y'} in thousandths of the image, 0 to 1000"
                )
            found.append((field, shapes, int(image)))
    return found


def reference_frame(row):
    """The image whose camera the centres are in: that of the first mark; the first where the question says so."""
    count, marks, main = len(images_of(row)), marks_of(row), row.get("main_frame_idx", 0)
    if main not in range(count):
        raise BadRow(f"{row['source']}: field 'main_frame_idx': {main} must be 0 to {count - 1}")
    return (
        0
        if count == 1 or "first image" in question_of(row).lower()
        else marks[0][2]
        if marks
        else int(main)
    )


def centers_of(row):
    """Ground-truth centres by mark: {"red bbox": (x, y, z)}; several images: {"red bbox": {frame: (x, y, z)}}.
    None for LOR, {} for DTR without detection reward."""
    if path_of(row) == "lor":
        return None
    if not isinstance(row["3d_pos"], dict):
        raise BadRow(
            f"{row['source']}: field '3d_pos': needs {{mark: {{'center_cam': [x, y, z]}}}}"
        )
    centers, count = {}, len(images_of(row))
    for mark, truth in row["3d_pos"].items():
        frames = truth.get("all_frame_3d") if isinstance(truth, dict) else None
        if not isinstance(frames, dict):
            own = {field: image for field, _, image in marks_of(row)} if count > 1 else {}
            frames = {own.get(mark, reference_frame(row)) if count > 1 else 0: truth}
        found = {}
        for frame, at in frames.items():
            point = at.get("center_cam") if isinstance(at, dict) else None
            if not finite(point, 3) or str(frame) not in map(str, range(count)):
                raise BadRow(
                    f"{row['source']}: field '3d_pos.{mark}.center_cam': needs three finite numbers, metres, "
                    f"in the frame of an image, 0 to {count - 1}; not {point} in frame {frame}"
                )
            found[int(frame)] = tuple(map(float, point))
        if count == 1 and not found:
            raise BadRow(f"{row['source']}: field '3d_pos.{mark}.all_frame_3d': empty")
        centers[mark.replace("_", " ")] = found if count > 1 else found[0]
    return centers


def finite(values, count):
    """Is this a list of so many finite numbers?"""
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in values)
    )  # false for NaN too


def boxes_of(row, field, boxes, count=4):
    """Boxes (with count 2: points) as they stand in a field, checked."""
    if not isinstance(boxes, list) or not all(finite(box, count) for box in boxes):
        raise BadRow(
            f"{row['source']}: field '{field}': needs a list of lists of {count} finite numbers, not {boxes}"
        )
    return boxes


@lru_cache(maxsize=16)  # a row is checked and then encoded: read its pictures once
def read_picture(file):
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    image.load()
    return image


def open_image(row, index=0, field="image"):
    """-> picture of a path (relative to the row's file), of encoded bytes or of an array."""
    value = of_image(row, field, index)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, dict):  # as published in parquet: {"bytes": ..., "path": ...}
        value = value.get("bytes", value.get("path"))
    if not isinstance(value, (str, bytes)):
        raise BadRow(f"{row['source']}: field '{field}': needs a path")
    path = os.path.join(row.get("folder", "."), value) if isinstance(value, str) else value
    name = path if isinstance(value, str) else f"{len(value)} embedded bytes"
    try:
        return read_picture(path)
    except FileNotFoundError:
        raise BadRow(f"{row['source']}: field '{field}': no such file {name}") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError: a broken PNG
        raise BadRow(
            f"{row['source']}: field '{field}': unreadable image {name} ({error})"
        ) from None


def open_depth(row, width, height, index=0):
    """-> depth (H, W) float32 metres, NaN = no measurement, or None where the image has none."""
    depth = of_image(row, "depth", index)
    if depth is None:
        return None
    if isinstance(depth, (str, bytes, dict)):
        image = open_image(row, index, "depth")
        if image.mode in ("L", "P", "RGB") and "depth_scale" not in row:
            raise BadRow(
                f"{row['source']}: field 'depth': 8-bit pictures hold relative depth; add 'depth_scale' "
                "(metres per unit) or leave the depth out"
            )
        if not finite([row.get("depth_scale", 0.001)], 1):
            raise BadRow(f"{row['source']}: field 'depth_scale': needs a number, metres per unit")
        depth = np.asarray(image, np.float32) * row.get("depth_scale", 0.001)
        depth = np.where(depth > 0, depth, np.nan).astype(np.float32)
    if not isinstance(depth, np.ndarray):
        raise BadRow(f"{row['source']}: field 'depth': needs the path of a 16-bit PNG")
    if depth.shape != (height, width):
        size = "x".join(map(str, depth.shape[::-1]))
        raise BadRow(
            f"{row['source']}: field 'depth': {size} pixels, the image has {width}x{height}"
        )
    return depth


def intrinsics_of(row, width, height, index=0):
    given = of_image(row, "intrinsics", index)
    if given is None:
        focal = width / 2 / math.tan(math.radians(DEFAULT_FOV / 2))
        return focal, focal, width / 2, height / 2
    if not finite(given, 4) or min(given[:2]) <= 0:
        raise BadRow(
            f"{row['source']}: field 'intrinsics': needs [fx, fy, cx, cy], pixels, finite, focal lengths > 0"
        )
    return tuple(map(float, given))


def mark_box(shape, width, height):
    """A mark in thousandths -> its box in pixels; a point: POINT_REGION around it, clamped to the image."""
    x, y, half = shape[0], shape[1], POINT_REGION / 2
    if len(shape) == 2:
        shape = [max(0, x - half), max(0, y - half), min(1000, x + half), min(1000, y + half)]
    return [v * side / 1000 for v, side in zip(shape, (width, height) * 2)]


def regions_of(row, sizes):
    """[(image, box in its pixels), ...], one for each `<mask>` of the question, in text order; sizes: (W, H) of each
    image. "bbox" holds them (several images: by image, and "mask_idx" their order), else they are the marks named."""
    question, boxes = question_of(row), row.get("bbox")
    count = question.count(REGION_PLACEHOLDER)
    if count == 0 and path_of(row) == "lor":
        return []
    if "bbox" not in row:
        marks = {
            field.replace("_", " "): (image, shapes)
            for field, shapes, image in marks_of(row)
            if shapes
        }
        named = re.findall(rf"(\w+ (?:bbox|point))?\s*{REGION_PLACEHOLDER}", question)
        if not set(named) <= set(marks):
            raise BadRow(
                f"{row['source']}: field 'bbox': missing, and not every <mask> follows a mark of the row"
            )
        found = [
            (image, mark_box(shapes[0], *sizes[image])) for image, shapes in map(marks.get, named)
        ]
    elif isinstance(boxes, dict):
        by_image = {image: boxes_of(row, f"bbox.{image}", part) for image, part in boxes.items()}
        order = row.get("mask_idx")
        try:
            pairs = [order[str(k)] for k in range(len(order))]
            if not all(image in range(len(sizes)) and k >= 0 for image, k in pairs):
                raise IndexError
            found = [(image, by_image[str(image)][k]) for image, k in pairs]
        except (KeyError, IndexError, TypeError, ValueError):
            raise BadRow(
                f"{row['source']}: field 'mask_idx': needs {{'0': [image, index of its box in 'bbox'], ...}}, "
                "one for each <mask> in text order"
            ) from None
    elif len(sizes) > 1 and boxes:
        raise BadRow(
            f"{row['source']}: field 'bbox': several images need {{'0': [[x1,y1,x2,y2], ...], '1': ...}}"
        )
    else:
        found = [(0, box) for box in boxes_of(row, "bbox", boxes)]
    if count != len(found):
        raise BadRow(
            f"{row['source']}: field 'bbox': {len(found)} boxes for {count} <mask> in the question"
        )
    for image, box in found:
        width, height = sizes[image]
        if not (-1 <= box[0] < box[2] <= width + 1 and -1 <= box[1] < box[3] <= height + 1):
            raise BadRow(
                f"{row['source']}: field 'bbox': {box} is empty or outside the image ({width}x{height}); "
                "needs x1,y1,x2,y2"
            )
    return found


def region_mask(box, width, height):
    """Box in pixels -> mask (H, W), 1 = inside."""
    mask = torch.zeros(height, width)
    x1, y1, x2, y2 = (
        max(0, math.floor(box[0])),
        max(0, math.floor(box[1])),
        math.ceil(box[2]),
        math.ceil(box[3]),
    )
    mask[min(y1, height - 1) : max(y2, y1 + 1), min(x1, width - 1) : max(x2, x1 + 1)] = 1
    return mask


def draw_marks(image, row, index=0):
    """One image's boxes (5 px a 1000 px of width, 2 at least) and points (radius 20 px a 1000 px), on a copy."""
    image, (w, h) = image.convert("RGB"), image.size
    pen = ImageDraw.Draw(image)
    for field, shapes, place in marks_of(row):
        rgb = MARK_COLORS[field.split("_")[0]]
        for shape in shapes if place == index else []:
            if len(shape) == 4:
                right, bottom = shape[2] * w / 1000 - 1, shape[3] * h / 1000 - 1
                corners = [
                    min(shape[0] * w / 1000, right),
                    min(shape[1] * h / 1000, bottom),
                    right,
                    bottom,
                ]
                pen.rectangle(corners, outline=rgb, width=max(2, round(w / 200)))
            else:
                x, y, r = shape[0] * w / 1000, shape[1] * h / 1000, max(1, w / 50)
                pen.ellipse([x - r, y - r, x + r, y + r], fill=rgb)
    return image


def check_row(row):
    """Raise BadRow if the row cannot be used; reads its pictures."""
    count = len(images_of(row))
    sizes = [draw_marks(open_image(row, i), row, i).size for i in range(count)]
    if "image_hw" in row and row["image_hw"] not in [[h, w] for w, h in sizes]:
        raise BadRow(
            f"{row['source']}: field 'image_hw': {row['image_hw']}, but the image is [H, W] = "
            f"{[sizes[0][1], sizes[0][0]]}: boxes in pixels would not fit"
        )
    if text_of(row).count(IMAGE_PLACEHOLDER) not in (0, count):
        raise BadRow(
            f"{row['source']}: field 'conversations': {text_of(row).count(IMAGE_PLACEHOLDER)} <image> for {count} images"
        )
    regions_of(row, sizes)
    for i, size in enumerate(sizes):
        open_depth(row, *size, i)
        intrinsics_of(row, *size, i)
    answer, centers, _ = answer_of(row), centers_of(row), reference_frame(row)
    try:
        total_reward("", answer, path_of(row), centers, count, question_of(row))
    except ValueError as error:  # wrong ground truth
        raise BadRow(f"{row['source']}: field {error}") from None
