"""Instances: one row in the format of the authors' published sets, and what its fields mean.

    {"image": "a.jpg", "depth": "a.png", "intrinsics": [fx, fy, cx, cy],
     "conversations": [{"from": "human", "value": "How far is the red bbox <mask>?"},
                       {"from": "gpt", "value": "3.4"}],
     "red_bbox": [[x1, y1, x2, y2]], "bbox": [[x1, y1, x2, y2]],
     "3d_pos": {"red_bbox": {"center_cam": [x, y, z]}}}

conversations  the question, with `<image>` and `<mask>` placeholders, and the target of training
answer         the true answer; without it, the <answer> of the target, or the whole target
image          a path beside the row's file, the encoded bytes that parquet embeds, or an array. It
               is turned upright by its EXIF: sizes, boxes and depth are those of the upright picture
image_hw       optional, [H, W]: must be the picture's, as regions are in its pixels
depth          a 16-bit PNG as large as the picture, 0 = no measurement, depth_scale metres per unit
               (default 0.001); a float TIFF in metres; or an array in metres, NaN = no measurement
intrinsics     in pixels; without them a horizontal field of view of 60 degrees is assumed
red_bbox ...   marks that are drawn on the picture, in thousandths of its width and height: boxes
               x1, y1, x2, y2, or points x, y in red_point ...; red, blue, green or yellow
bbox           the regions, boxes in pixels, one per `<mask>` of the question, in text order;
               without this field each `<mask>` stands for the mark that is named before it
3d_pos         centres of the marked objects in metres, x right, y down, z forward. A row with this
               field is on the path DTR (detect-then-reason: 3D coordinates first), {} is DTR
               without detection reward; a row without it is on LOR (language-only reasoning)

A row with several pictures:
image, depth   lists, one entry per picture (depth: or None)
intrinsics     a list, one entry per picture (or None), or one camera for all
bbox_img_idx   the picture of each of the row's box marks; point_img_idx: of its point marks
bbox           by picture, {"0": [box, ...], "1": []}, and with it
mask_idx       {"0": [picture, which of its boxes], ...}, one entry per `<mask>`, in text order
3d_pos         {"red_bbox": {"current_frame": the picture of the mark,
                             "all_frame_3d": {"0": {"center_cam": [x, y, z]}, ...}}}, the
               centre in the camera frame of each picture
main_frame_idx the picture whose camera frame the centres are in, where the row has no marks

The reader (formats/files.py) adds "source", file and row for messages, and "folder", of the file.
Whatever is wrong with a row is a BadRow: file, row, field, and what it should be.
"""

import math
import os
import re

import numpy as np
import torch
from PIL import Image, ImageDraw

from formats import pictures
from formats.errors import BadRow, quote
from formats.values import are_numbers, has_text, is_index
from rewards import extract_answer, total_reward

IMAGE_PLACEHOLDER = "<image>"
REGION_PLACEHOLDER = "<mask>"
# A region, and the mark that its question names before it: "the red bbox <mask>".
MARK_AND_PLACEHOLDER = rf"(\w+ (?:bbox|point))?\s*{REGION_PLACEHOLDER}"
DEFAULT_FOV = 60  # degrees, horizontal: for pictures without intrinsics
SHORTEST_FOCAL = 0.1  # pixels
SHARES = 10  # a focal length up to this, with a centre in 0 to 1, is in shares of the image
LONGEST_TEXT = 10**6  # characters of a question or of a target
MARK_COLORS = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
}
MARK_FIELDS = {f"{color}_{kind}" for color in MARK_COLORS for kind in ("bbox", "point")}
POINT_REGION = 50  # thousandths of width and height: sides of the region around a point
DTR_FIELDS = ("3d_pos", "bbox", "mask_idx")  # what a LOR row does not have
# Words of a question that asks for geometry: there DTR's coordinates help, elsewhere reasoning in
# words does.
GEOMETRY = re.compile(
    r"\b(?:how (?:far|close|deep|tall|high|wide|long|big|large)|distances?|depth|met(?:er|re)s?|"
    r"closer|closest|nearer|nearest|farther|farthest|further|left|right|above|below|behind|"
    r"in front|height|width|size|taller|larger|smaller|angle|degrees?|rotat\w+|mov\w+|position)\b",
    re.IGNORECASE,
)

# ----------------------------------------------------------------------------------------------
# path, question and answer


def path_of(row):
    """The path of a row, "dtr" or "lor".

    The rule of the published sets: a row with "3d_pos" is DTR, even where it is empty.
    """
    return "dtr" if "3d_pos" in row else "lor"


def turns(row):
    """The question and the target of training, as they stand in the row."""
    conversation = row.get("conversations")
    values = []
    if isinstance(conversation, list):
        check_speakers(row, conversation)
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in conversation]
    if len(values) != 2 or not all(map(has_text, values)):
        raise BadRow(
            f"{row['source']}: field 'conversations': needs one question and one non-empty answer"
        )
    question, target = (str(value) for value in values)
    longest = max(len(question), len(target))
    if longest > LONGEST_TEXT:
        raise BadRow(
            f"{row['source']}: field 'conversations': a text of {longest:,} characters; "
            f"{LONGEST_TEXT:,} are the most"
        )
    return question, target


def check_speakers(row, conversation):
    """BadRow where the model speaks first, or the human second; other words say nothing."""
    for turn, other in zip(conversation, ("gpt", "human")):
        if isinstance(turn, dict) and turn.get("from") == other:
            raise BadRow(
                f"{row['source']}: field 'conversations': the question, from human, comes first, "
                f"then the answer, from gpt; not {quote(turn.get('from'))}"
            )


def answer_of(row):
    """The ground-truth answer: "answer", or the target; of either what its <answer> holds, if any."""
    _, target = turns(row)
    answer = row.get("answer")
    if answer is None:
        answer = target
    if isinstance(answer, str):
        tagged = extract_answer(answer)
        answer = answer.strip() if tagged is None else tagged.strip()
    if not has_text(answer):
        raise BadRow(
            f"{row['source']}: field 'answer': needs a text or a number, not {quote(answer)!r}"
        )
    return str(answer).strip()


def text_of(row):
    """The question with its placeholders.

    Where a DTR question has no `<mask>` at all, the first mention of each mark gets one.
    """
    text, _ = turns(row)
    if path_of(row) == "dtr" and REGION_PLACEHOLDER not in text:
        for field in mark_fields(row):
            mention = rf"\b{mark_name(field)}\b"
            text = re.sub(mention, rf"\g<0> {REGION_PLACEHOLDER}", text, count=1)
    return text


def question_of(row):
    """The question without the placeholders of images."""
    text = text_of(row)
    return text.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()


# ----------------------------------------------------------------------------------------------
# pictures, depth and intrinsics


def images_of(row):
    """The pictures of a row as they stand there; a list also where there is one."""
    images = row.get("image")
    if not isinstance(images, list):
        return [images]
    if not images:
        raise BadRow(f"{row['source']}: field 'image': an empty list")
    return images


def of_image(row, field, index):
    """The value of a field for one image, None where the row lacks the field.

    A list holds one value per image; intrinsics may also be given once for all images.
    """
    values = row.get(field)
    count = len(images_of(row))
    if values is None or field == "intrinsics" and is_one_camera(values):
        values = [values] * count
    elif not isinstance(values, list):
        values = [values]
    if len(values) != count:
        one = " ([fx, fy, cx, cy])" if field == "intrinsics" else ""
        raise BadRow(
            f"{row['source']}: field '{field}': {len(values)} for {count} images; needs one"
            f"{one} per image"
        )
    return values[index]


def is_one_camera(intrinsics):
    """Is this [fx, fy, cx, cy], and not a list of one such list, or None, per image?"""
    if not isinstance(intrinsics, list):
        return True
    return not all(value is None or isinstance(value, list) for value in intrinsics)


def open_image(row, index=0):
    """A picture of the row, in RGB and upright. It may be shared: not to be changed."""
    value = of_image(row, "image", index)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    try:
        return pictures.open_picture(file_in(row, "image", value))
    except pictures.BadPicture as error:
        raise BadRow(f"{row['source']}: field 'image': {error}") from None


def file_in(row, field, value):
    """What a field holds of a picture -> its path, or its encoded bytes."""
    if isinstance(value, dict):  # as published in parquet: {"bytes": ..., "path": ...}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return os.path.join(row.get("folder", "."), value)
    if isinstance(value, bytes):
        return value
    raise BadRow(f"{row['source']}: field '{field}': needs a path")


def open_depth(row, width, height, index=0):
    """Depth (H, W) float32 metres of one image, NaN = no measurement; None where it has no depth.

    width, height: of the image; depth of another size is an error.
    """
    depth = of_image(row, "depth", index)
    if depth is None:
        return None
    if isinstance(depth, np.ndarray):
        depth = pictures.measured(depth)
    elif isinstance(depth, (str, bytes, dict)):
        depth = read_depth(row, depth)
    else:
        raise BadRow(f"{row['source']}: field 'depth': needs the path of a 16-bit PNG")
    if depth.shape != (height, width):
        size = "x".join(map(str, depth.shape[::-1]))
        upright = " upright" if depth.shape == (width, height) else ""
        raise BadRow(
            f"{row['source']}: field 'depth': {size} pixels, the image has "
            f"{width}x{height}{upright}"
        )
    return depth


def read_depth(row, depth):
    """What the field "depth" holds for one image -> (H, W) float32 metres, NaN = none."""
    scale = row.get("depth_scale")
    if scale is not None and not pictures.is_scale(scale):
        raise BadRow(
            f"{row['source']}: field 'depth_scale': {quote(scale)}, needs metres per unit, "
            "such as 0.001"
        )
    try:
        return pictures.open_depth(file_in(row, "depth", depth), scale)
    except pictures.BadPicture as error:
        raise BadRow(f"{row['source']}: field 'depth': {error}") from None


def intrinsics_of(row, width, height, index=0):
    """(fx, fy, cx, cy) of one image, in pixels; those of DEFAULT_FOV where the row has none."""
    given = of_image(row, "intrinsics", index)
    if given is None:
        focal = width / 2 / math.tan(math.radians(DEFAULT_FOV / 2))
        return focal, focal, width / 2, height / 2
    if not are_numbers(given, 4) or min(given[:2]) < SHORTEST_FOCAL:
        raise BadRow(
            f"{row['source']}: field 'intrinsics': needs [fx, fy, cx, cy], pixels, finite, "
            "focal lengths > 0"
        )
    if max(given) <= SHARES and 0 < min(given[2:]) <= max(given[2:]) <= 1 and width > SHARES:
        raise BadRow(
            f"{row['source']}: field 'intrinsics': {quote(given)} are shares of the image? "
            f"Needs pixels of {width}x{height}"
        )
    return tuple(map(float, given))


def check_turned_camera(row, width, height, index):
    """BadRow for intrinsics of a picture as it lies in its file, which EXIF turns upright."""
    value = of_image(row, "image", index)
    if of_image(row, "intrinsics", index) is None or isinstance(value, np.ndarray):
        return
    if not pictures.lies_sideways(file_in(row, "image", value)):
        return
    _, _, x, y = intrinsics_of(row, width, height, index)
    from_upright = abs(x - width / 2) + abs(y - height / 2)
    from_sideways = abs(x - height / 2) + abs(y - width / 2)
    if from_sideways < from_upright:
        raise BadRow(
            f"{row['source']}: field 'intrinsics': of the picture as it lies in its file; upright "
            f"by its EXIF it has {width}x{height} pixels: turn them, too"
        )


# ----------------------------------------------------------------------------------------------
# marks: coloured boxes and points


def mark_fields(row):
    """The fields with coloured marks, in the order of the row: ["red_bbox", "blue_point", ...]."""
    return [field for field in row if field in MARK_FIELDS]


def mark_name(field):
    """What texts call the mark of a field: "red bbox" for "red_bbox"."""
    return field.replace("_", " ")


def marks_of(row):
    """The marks of a row: [(field, boxes or points in thousandths, index of their image), ...].

    The boxes come before the points, each in the order of the row.
    """
    marks = []
    for kind in ("bbox", "point"):
        fields = [field for field in mark_fields(row) if field.endswith(kind)]
        for field, image in zip(fields, images_of_marks(row, kind, fields)):
            marks.append((field, mark_shapes(row, field), int(image)))
    return marks


def images_of_marks(row, kind, fields):
    """The image of each of the fields of one kind of mark, "bbox" or "point".

    "bbox_img_idx" and "point_img_idx" give it, else the "current_frame" in "3d_pos".
    """
    count = len(images_of(row))
    given = row.get(f"{kind}_img_idx")
    if count == 1:
        images = [0] * len(fields)
    elif fields and f"{kind}_img_idx" in row:
        images = flat(given)
    else:
        images = [current_frame(row, field) for field in fields]
    if len(images) != len(fields) or not all(is_index(image, count) for image in images):
        raise BadRow(
            f"{row['source']}: field '{kind}_img_idx': needs the image, 0 to {count - 1}, of "
            f"each of {fields}, not {quote(given)}"
        )
    return images


def flat(values):
    """[[0, 1]], [[0], [1]] or [0, 1] -> [0, 1]; anything that is no list -> [None]."""
    if not isinstance(values, list):
        return [None]
    found = []
    for value in values:
        found += value if isinstance(value, list) else [value]
    return found


def current_frame(row, field):
    """The image that "3d_pos" names for the mark of a field, or None."""
    truth = row.get("3d_pos")
    mark = truth.get(field) if isinstance(truth, dict) else None
    return mark.get("current_frame") if isinstance(mark, dict) else None


def mark_shapes(row, field):
    """The boxes or points of one field of marks, in thousandths, checked."""
    if field.endswith("bbox"):
        shapes = boxes_of(row, field, row[field])
        ordered = all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in shapes)
        wanted = "x1,y1,x2,y2"
    else:
        shapes = boxes_of(row, field, row[field], 2)
        ordered = True
        wanted = "x,y"
    # A thousandth beside the image is let pass.
    inside = all(-1 <= value <= 1001 for shape in shapes for value in shape)
    if not inside or not ordered:
        raise BadRow(
            f"{row['source']}: field '{field}': {quote(shapes)} must be "
            f"{wanted} in thousandths of the image, 0 to 1000"
        )
    if ordered and shapes and field.endswith("bbox") and max(map(max, shapes)) <= 1:
        raise BadRow(
            f"{row['source']}: field '{field}': {quote(shapes)} are shares of the image, 0 to 1? "
            "Needs thousandths, 0 to 1000"
        )
    return shapes


def boxes_of(row, field, boxes, count=4):
    """Boxes (with count 2: points) as they stand in a field, checked."""
    if not isinstance(boxes, list) or not all(are_numbers(box, count) for box in boxes):
        raise BadRow(
            f"{row['source']}: field '{field}': needs a list of lists of {count} finite numbers, "
            f"not {quote(boxes)}"
        )
    return boxes


def draw_marks(image, row, index=0):
    """The marks of one image of a row, drawn on a copy of that image.

    Per 1000 pixels of the image's width, the outline of a box is 5 pixels wide, and a point has a
    radius of 20. An outline is at least 2 pixels wide.
    """
    image = image.convert("RGB")  # a copy
    pen = ImageDraw.Draw(image)
    for field, shapes, mark_image in marks_of(row):
        if mark_image != index:
            continue
        rgb = MARK_COLORS[field.split("_")[0]]
        for shape in shapes:
            if len(shape) == 4:
                draw_box(pen, to_pixels(shape, *image.size), rgb, image.width)
            else:
                draw_point(pen, to_pixels(shape, *image.size), rgb, image.width)
    return image


def draw_box(pen, box, rgb, image_width):
    """The outline of a box in pixels, whose x2 and y2 lie just outside of it."""
    x1, y1, x2, y2 = box
    right = x2 - 1
    bottom = y2 - 1
    corners = [min(x1, right), min(y1, bottom), right, bottom]
    pen.rectangle(corners, outline=rgb, width=max(2, round(image_width / 200)))


def draw_point(pen, point, rgb, image_width):
    """A disc around a point in pixels."""
    x, y = point
    radius = max(1, image_width / 50)
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=rgb)


def to_pixels(shape, width, height):
    """A box or a point in thousandths of an image -> in pixels."""
    return [value * side / 1000 for value, side in zip(shape, (width, height) * 2)]


# ----------------------------------------------------------------------------------------------
# regions: one box per `<mask>` of the question


def regions_of(row, sizes):
    """The regions of a question: [(image, box in its pixels), ...], one per `<mask>`.

    They are in text order: the boxes of "bbox" or, without that field, the marks that the question
    names. sizes: (W, H) of each image.
    """
    question = question_of(row)
    count = question.count(REGION_PLACEHOLDER)
    if count == 0 and path_of(row) == "lor":
        return []
    boxes = row.get("bbox")
    if "bbox" not in row:
        regions = regions_of_marks(row, question, sizes)
    elif isinstance(boxes, dict):
        regions = regions_by_image(row, boxes, len(sizes))
    elif len(sizes) > 1 and boxes:
        raise BadRow(
            f"{row['source']}: field 'bbox': several images need "
            "{'0': [[x1,y1,x2,y2], ...], '1': ...}"
        )
    else:
        regions = [(0, box) for box in boxes_of(row, "bbox", boxes)]
    if count != len(regions):
        raise BadRow(
            f"{row['source']}: field 'bbox': {len(regions)} boxes for {count} <mask> "
            "in the question"
        )
    for image, box in regions:
        check_region(row, box, *sizes[image])
    return regions


def regions_of_marks(row, question, sizes):
    """The regions without "bbox": each `<mask>` follows the name of a mark, "red bbox <mask>"."""
    marks = {}
    for field, shapes, image in marks_of(row):
        if shapes:
            marks[mark_name(field)] = (image, shapes[0])
    names = re.findall(MARK_AND_PLACEHOLDER, question)
    if not set(names) <= set(marks):
        raise BadRow(
            f"{row['source']}: field 'bbox': missing, and not every <mask> follows a mark "
            "of the row"
        )
    regions = []
    for name in names:
        image, shape = marks[name]
        regions.append((image, mark_box(shape, *sizes[image])))
    return regions


def regions_by_image(row, boxes, images):
    """The regions of boxes by image, {"0": [box, ...], ...}, in the order of "mask_idx"."""
    by_image = {}
    for image, own_boxes in boxes.items():
        by_image[image] = boxes_of(row, f"bbox.{image}", own_boxes)
    order = row.get("mask_idx")
    regions = []
    try:
        for k in range(len(order)):
            image, index = order[str(k)]
            if not is_index(image, images):
                raise IndexError
            own_boxes = by_image[str(int(image))]
            if not is_index(index, len(own_boxes)):
                raise IndexError
            regions.append((int(image), own_boxes[int(index)]))
    except (KeyError, IndexError, TypeError, ValueError):
        raise BadRow(
            f"{row['source']}: field 'mask_idx': needs {{'0': [image, index of its box in "
            "'bbox'], ...}, one for each <mask> in text order"
        ) from None
    return regions


def check_region(row, box, width, height):
    """BadRow for a box that is empty or more than a pixel outside its image."""
    x1, y1, x2, y2 = box
    if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1):
        raise BadRow(
            f"{row['source']}: field 'bbox': {quote(box)} is empty or outside the image "
            f"({width}x{height}); needs x1,y1,x2,y2"
        )
    if max(box) <= 1 and min(width, height) > 2:
        raise BadRow(
            f"{row['source']}: field 'bbox': {quote(box)} are shares of the image, 0 to 1? "
            f"Needs pixels of {width}x{height}"
        )


def mark_box(shape, width, height):
    """A mark in thousandths -> its box in pixels.

    Of a point it is the POINT_REGION around it, clamped to the image.
    """
    if len(shape) == 2:
        x, y = shape
        half = POINT_REGION / 2
        shape = [max(0, x - half), max(0, y - half), min(1000, x + half), min(1000, y + half)]
    return to_pixels(shape, width, height)


def region_mask(box, width, height):
    """Box in pixels -> mask (H, W), 1 = inside; at least one pixel is, also of a box on the rim."""
    left = max(0, math.floor(box[0]))
    top = max(0, math.floor(box[1]))
    right = max(math.ceil(box[2]), left + 1)
    bottom = max(math.ceil(box[3]), top + 1)
    mask = torch.zeros(height, width)  # (H, W)
    mask[min(top, height - 1) : bottom, min(left, width - 1) : right] = 1
    return mask


# ----------------------------------------------------------------------------------------------
# true centres


def reference_frame(row):
    """The image whose camera frame the centres are in: that of the first mark.

    Where the question speaks of the "first image" it is image 0; without marks, "main_frame_idx".
    """
    count = len(images_of(row))
    marks = marks_of(row)
    main = row.get("main_frame_idx", 0)
    if not is_index(main, count):
        raise BadRow(
            f"{row['source']}: field 'main_frame_idx': {quote(main)} must be 0 to {count - 1}"
        )
    if count == 1 or "first image" in question_of(row).lower():
        return 0
    if marks:
        _, _, image = marks[0]
        return image
    return int(main)


def centers_of(row):
    """The true centres by mark, in metres: {"red bbox": (x, y, z)}.

    With several images they are given by frame, {"red bbox": {frame: (x, y, z)}}. None for LOR,
    {} for DTR without detection reward.
    """
    if path_of(row) == "lor":
        return None
    if not isinstance(row["3d_pos"], dict):
        raise BadRow(
            f"{row['source']}: field '3d_pos': needs {{mark: {{'center_cam': [x, y, z]}}}}"
        )
    several = len(images_of(row)) > 1
    centers = {}
    for mark, truth in row["3d_pos"].items():
        by_frame = centers_by_frame(row, mark, truth)
        if not several and not by_frame:
            raise BadRow(f"{row['source']}: field '3d_pos.{mark}.all_frame_3d': empty")
        centers[mark_name(mark)] = by_frame if several else by_frame[0]
    return centers


def centers_by_frame(row, mark, truth):
    """The centre of one mark, {frame: (x, y, z) in the camera frame of that image}.

    truth: what "3d_pos" holds of this mark.
    """
    count = len(images_of(row))
    frames = truth.get("all_frame_3d") if isinstance(truth, dict) else None
    if not isinstance(frames, dict):
        frames = {own_frame(row, mark): truth}
    centers = {}
    for frame, entry in frames.items():
        point = entry.get("center_cam") if isinstance(entry, dict) else None
        if not are_numbers(point, 3) or str(frame) not in map(str, range(count)):
            raise BadRow(
                f"{row['source']}: field '3d_pos.{mark}.center_cam': needs three finite "
                f"numbers, metres, in the frame of an image, 0 to {count - 1}; "
                f"not {quote(point)} in frame {quote(frame)}"
            )
        centers[int(frame)] = tuple(map(float, point))
    return centers


def own_frame(row, mark):
    """The frame of a centre that is given without one: its mark's image, else the reference."""
    if len(images_of(row)) == 1:
        return 0
    image_of_mark = {field: image for field, _, image in marks_of(row)}
    return image_of_mark.get(mark, reference_frame(row))


# ----------------------------------------------------------------------------------------------
# the same question on the other path


def on_paths(rows, path):
    """Each question of some rows on path "lor", "dtr", "both", or "auto" (the better one)."""
    chosen = []
    for twins in twins_of(rows):
        row = next(iter(twins.values()))
        if path == "both":
            paths = ["lor", "dtr"]
        elif path == "auto":
            paths = [best_path(row)]
        else:
            paths = [path]
        for wanted in paths:
            chosen.append(twins.get(wanted) or on_path(row, wanted))
    return chosen


def twins_of(rows):
    """The rows by question: [{path: row}, ...], in the order in which the questions come up.

    A LOR and a DTR row with the same pictures, marks and words are one question. A third such row
    opens another one: no row is lost.
    """
    asked = []
    latest = {}
    for row in rows:
        key = question_key(row)
        path = path_of(row)
        if key not in latest or path in latest[key]:
            latest[key] = {}
            asked.append(latest[key])
        latest[key][path] = row
    return asked


def question_key(row):
    """What a LOR and a DTR row of one question share: pictures, words, marks."""
    pictures = []
    for image in images_of(row):
        # An array is known by the scene that it comes from.
        pictures.append(row["source"] if isinstance(image, np.ndarray) else str(image))
    words = question_of(row).replace(f" {REGION_PLACEHOLDER}", "")
    marks = str([row[field] for field in mark_fields(row)])
    return *pictures, words, marks


def on_path(row, path):
    """The same question on a path: its own row, or one made from that of the other path.

    A DTR row that is made has no detection reward.
    """
    if path_of(row) == path:
        return row
    question = text_of(row)
    if path == "dtr":
        other = {**row, "3d_pos": {}}
    else:
        other = {key: value for key, value in row.items() if key not in DTR_FIELDS}
        question = question.replace(f" {REGION_PLACEHOLDER}", "").replace(REGION_PLACEHOLDER, "")
    other["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer_of(row)},
    ]
    return other


def best_path(row):
    """The path by the paper's own use: DTR where regions and geometry meet, LOR everywhere else."""
    has_regions = mark_fields(row) or REGION_PLACEHOLDER in text_of(row)
    return "dtr" if has_regions and GEOMETRY.search(question_of(row)) else "lor"


# ----------------------------------------------------------------------------------------------
# the check of a whole row


def check_instance(row):
    """BadRow if the row can be used by no model. Reads its pictures and depth.

    (data.check_row asks a model's tokenizer and image processor, too.)
    """
    count = len(images_of(row))
    sizes = []  # (W, H)
    for i in range(count):
        image = draw_marks(open_image(row, i), row, i)
        sizes.append(image.size)
    check_given_size(row, sizes)
    placeholders = text_of(row).count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, count):
        raise BadRow(
            f"{row['source']}: field 'conversations': {placeholders} <image> for {count} images"
        )
    regions_of(row, sizes)
    for i, size in enumerate(sizes):
        open_depth(row, *size, i)
        intrinsics_of(row, *size, i)
        check_turned_camera(row, *size, i)
    answer = answer_of(row)
    centers = centers_of(row)
    reference_frame(row)
    try:
        total_reward("", answer, path_of(row), centers, count, question_of(row))
    except ValueError as error:  # the ground truth is wrong
        field = "answer" if str(error).startswith("answer") else "3d_pos"
        raise BadRow(f"{row['source']}: field '{field}': {error}") from None


def check_given_size(row, sizes):
    """BadRow where "image_hw" is not the size of any picture."""
    if "image_hw" not in row or row["image_hw"] in [[height, width] for width, height in sizes]:
        return
    width, height = sizes[0]
    raise BadRow(
        f"{row['source']}: field 'image_hw': {quote(row['image_hw'])}, but the image is [H, W] = "
        f"{[height, width]}: boxes in pixels would not fit"
    )
