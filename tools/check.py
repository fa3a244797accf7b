"""The check of instance files before a run: what is in them, and what is wrong there.

    python -m tools.check FILE...                                 # every row
    python -m tools.check FILE... --model out/sft --rows 1000     # 1000 rows, a model's own tokens

Prints rows per family and path, lengths in tokens, sizes of the regions, depths, and the first
problems with file, row and field. Exit code 1 if there is any problem, else 0.

What a run would refuse is a problem, and so is what a run could not see:
- a centre that is not in metres, x right, y down, z forward. It does not project into its own 2D
  box, and the detection reward could never be earned.
- a region that is not where the mark is that its <mask> follows, or marks that are all in the
  corner: boxes of another convention. Region tokens would be of other pixels.
- a depth map in other units.
- a chain of thought (trace) that does not end in its own answer.
"""

import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import data
from engine.settings import parse, run_main, setting
from formats.errors import BadRow, UserError, quote
from formats.files import Rows
from formats.instances import (
    MARK_AND_PLACEHOLDER,
    answer_of,
    centers_of,
    images_of,
    intrinsics_of,
    mark_box,
    mark_name,
    marks_of,
    of_image,
    open_depth,
    open_image,
    path_of,
    question_of,
    reference_frame,
    regions_of,
    turns,
)
from formats.scenes import project
from formats.values import are_numbers
from model import load_processing
from rewards import accuracy_reward, extract_answer, kind_of, read_number, total_reward
from world import tiny

SHOWN = 20  # problems that are printed
FARTHEST = 200  # metres; a farther centre is taken for one in millimetres
SLACK = 0.25  # of its size: a 2D box may be partly covered, and the centre beside what is seen
OVERLAP = 0.3  # of a region and its mark, intersection over union; less is another place,
SAME_BOX = 0.8  # and so much is the same box
OTHER_UNITS = 3  # times as far or as near as 'depth' measures


@dataclass
class Settings:
    files: list = setting([], "JSON list, JSON lines or parquet of instances", positional=True)
    model: str = setting("", "lengths by this model's tokenizer; empty: the embedded one's")
    rows: int = setting(0, "check so many rows, evenly spread; 0: all", at_least=0)


def check(argv=None):
    """The program -> number of problems."""
    settings = parse(Settings, __doc__, argv)
    tokenizer, processor = load_texts(settings.model)
    problems = []
    for path in settings.files:
        counts, values, found = check_file(path, tokenizer, processor, settings.rows)
        print(f"\n{path}: {counts.total():,} usable rows, {len(found)} problems")
        print_tables(counts, values)
        problems += found
    limited = f", the first {SHOWN}:" if len(problems) > SHOWN else ""
    print(f"\n{len(problems)} problems{limited}")
    print("\n".join(problems[:SHOWN]))
    return len(problems)


def print_tables(counts, values):
    """The rows of a file by family and path, and the spread of what was measured."""
    print(f"  {'family':<32}{'path':<18}rows")
    for (family, path), count in sorted(counts.items()):
        print(f"  {family:<32}{path:<18}{count:,}")
    print(f"  {'':<32}{'min':>10}{'median':>10}{'max':>10}{'n':>10}")
    for name, numbers in values.items():
        if numbers:
            spread = [min(numbers), np.median(numbers), max(numbers)]
            columns = "".join(f"{number:>10.4g}" for number in spread)
            print(f"  {name:<32}{columns}{len(numbers):>10,}")


def load_texts(model):
    """-> tokenizer and image processor of --model (without its weights), or of the embedded one."""
    if not model:
        _, tokenizer, processor = tiny.new_model("tiny", 0, data.PROMPTS.values())
        return tokenizer, processor
    try:
        _, tokenizer, processor = load_processing(model)
        return tokenizer, processor
    # A damaged folder can raise anything in the depths of transformers.
    except Exception as error:  # noqa: BLE001
        raise UserError(f"--model {model}: {quote(str(error), 150)}") from None


# ----------------------------------------------------------------------------------------------
# one file


def check_file(path, tokenizer, processor, limit=0):
    """All rows of a file, or `limit` evenly spread ones -> counts, values, problems.

    counts: {(family, path): usable rows}; values: {what was measured: list of numbers}; problems: a
    line each.
    """
    counts = Counter()
    values = defaultdict(list)
    problems = []
    try:
        rows = Rows(path)
    except BadRow as error:
        return counts, values, [str(error)]
    picked = spread_indices(len(rows), limit)
    name = os.path.basename(path)
    for i in tqdm(picked, desc=name, mininterval=2, disable=len(picked) < 100):
        try:
            row = rows.read(i)
            data.check_row(row, tokenizer, processor)
            sample = data.encode(row, tokenizer, processor, train=True)
        except BadRow as error:
            problems.append(str(error))
            continue
        sizes = [open_image(row, k).size for k in range(len(images_of(row)))]
        row_path = "dtr, no centres" if row.get("3d_pos") == {} else path_of(row)
        counts[str(row.get("task", name)), row_path] += 1
        measure(row, sample, sizes, values)
        problems += problems_of(row, sizes)
    if values["largest mark, thousandths"] and max(values["largest mark, thousandths"]) <= 1:
        problems.append(
            f"{path}: field 'red_point' ..: no mark of the file is beyond 1: shares of the image? "
            "Needs thousandths, 0 to 1000"
        )
    return counts, values, problems


def spread_indices(length, limit):
    """The indices of `limit` evenly spread rows of so many; limit 0: of all."""
    count = min(limit or length, length)
    return np.unique(np.linspace(0, length - 1, count).astype(int)).tolist()


def measure(row, sample, sizes, values):
    """Add to `values` what a usable row has: tokens, images, regions, depths.

    sizes: (W, H) of each image.
    """
    values["tokens"].append(len(sample["prompt"]) + len(sample["target"]))
    values["images"].append(len(sizes))
    for _, shapes, _ in marks_of(row):
        values["largest mark, thousandths"] += map(max, shapes)
    for image, (x1, y1, x2, y2) in regions_of(row, sizes):
        share = 100 * (x2 - x1) * (y2 - y1) / math.prod(sizes[image])
        values["region, % of its image"].append(share)
    for k, size in enumerate(sizes):
        depth = open_depth(row, *size, k)  # (H, W)
        if depth is None:
            continue
        known = np.isfinite(depth)
        values["depth measured, % of the pixels"].append(100 * known.mean())
        medians = values["depth, median of an image, m"]
        if known.any():
            medians.append(float(np.nanmedian(depth)))


# ----------------------------------------------------------------------------------------------
# one row: what a run would not notice


def problems_of(row, sizes):
    """The problems of a usable row as lines "file: row: field: what is wrong"."""
    found = [*region_problems(row, sizes), *center_problems(row, sizes), *trace_problems(row)]
    return [f"{row['source']}: field '{field}': {text}" for field, text in found]


def region_problems(row, sizes):
    """(field, what is wrong) of each region that is not where its own mark is.

    sizes: (W, H) of each image.
    """
    marks = {}
    for field, shapes, image in marks_of(row):
        if shapes:
            marks[mark_name(field)] = (shapes[0], image)
    names = re.findall(MARK_AND_PLACEHOLDER, question_of(row))  # "" for a <mask> without a mark
    for name, (image, box) in zip(names, regions_of(row, sizes)):
        shape, image_of_mark = marks.get(name, (None, image))
        if shape is None:
            continue
        if image != image_of_mark:
            yield (
                "mask_idx",
                f"{name}: its <mask> is a box of image {image}, its mark in {image_of_mark}",
            )
            continue
        problem = region_problem(box, shape, sizes[image])
        if problem:
            yield "bbox", f"{name}: {problem}; needs x1, y1, x2, y2 in pixels"


def region_problem(box, shape, size):
    """Why a region (pixels) is not where its mark is, or None.

    shape: the mark, a box or a point in thousandths; size: (W, H).
    """
    marked = mark_box(shape, *size)  # in pixels
    if len(shape) == 2:
        x, y = (marked[0] + marked[2]) / 2, (marked[1] + marked[3]) / 2
        if box[0] - 2 <= x <= box[2] + 2 and box[1] - 2 <= y <= box[3] + 2:
            return None
    rounding = 2 + max(size) / 500  # pixels; a thousandth may be more than a small box
    if all(abs(side - other) <= rounding for side, other in zip(box, marked)):
        return None
    fit = overlap(box, marked)
    for convention, turned in other_boxes(box, *size).items():
        if fit < SAME_BOX <= overlap(turned, marked):
            return f"the region {quote(box)} fits its mark as {convention}"
    if fit < OVERLAP:
        return f"the region {quote(box)} is not at its mark, pixels {rounded(marked)}"
    return None


def overlap(one, other):
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0, width) * max(0, height)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return common / max(sum(areas) - common, 1e-9)


def other_boxes(box, width, height):
    """A box that was given in another convention, in ours: {what was other: box in pixels}."""
    a, b, c, d = box
    return {
        "x, y, width, height": (a, b, a + c, b + d),
        "thousandths": (
            a * width / 1000,
            b * height / 1000,
            c * width / 1000,
            d * height / 1000,
        ),
        "shares of the image": (a * width, b * height, c * width, d * height),
        "y before x": (b, a, d, c),
        "centre, width, height": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    }


def rounded(box):
    return [round(value) for value in box]


def center_problems(row, sizes):
    """(field, what is wrong) of each centre that is not in metres, x right, y down, z forward.

    sizes: (W, H) of each image.
    """
    reference = reference_frame(row)
    marks = {field: (shapes, image) for field, shapes, image in marks_of(row)}
    for mark, center in (centers_of(row) or {}).items():
        field = mark.replace(" ", "_")
        frames = center if len(sizes) > 1 else {0: center}  # {image: centre in its camera's frame}
        if reference not in frames:
            text = f"no centre in the reference frame, image {reference}"
            yield f"3d_pos.{field}", f"{text}: its detection reward cannot be earned"
        shapes, image = marks.get(field, ([], reference))
        truth = row["3d_pos"][field if field in row["3d_pos"] else mark]
        shape = shapes[0] if shapes else truth.get("bbox_2d")
        if image in frames:
            problem = center_problem(row, frames[image], shape, image, sizes[image])
            if problem:
                yield f"3d_pos.{field}", problem


def center_problem(row, center, shape, image, size):
    """What is wrong with a centre (x, y, z) in the frame of an image, or None.

    shape: its 2D box or point in that image, in thousandths, if there is one; size: (W, H).
    """
    camera = intrinsics_of(row, *size, image)
    box = None
    if are_numbers(shape, 2) or are_numbers(shape, 4):
        box = mark_box(shape, *size)  # in pixels
    z = center[2]
    if abs(z) > FARTHEST:
        return f"center_cam {center} is {abs(z):.0f} m away: in millimetres? Needs metres"
    given = of_image(row, "intrinsics", image) is not None
    problem = projection_problem(center, box, camera, size, given)
    if problem:
        return problem
    depth = open_depth(row, *size, image)
    measured_z = measured(depth, box) if box and depth is not None else None
    if measured_z and not 1 / OTHER_UNITS < z / measured_z < OTHER_UNITS:
        return (
            f"z = {z:g} m, but 'depth' measures {measured_z:.3g} m there: "
            "other units? ('depth_scale')"
        )
    return None


def projection_problem(center, box, camera, size, given):
    """Why a centre is not where its 2D box is, or None; given: the row has intrinsics."""
    slack = None
    if box:
        slack = slack_of(box, size, given)
    if center[2] <= 0:
        text = "is behind the camera"
    elif box and not lands(center, box, camera, slack):
        text = "does not project into its 2D box"
    else:
        return None
    where = "" if box is None else rounded(box)
    text = f"center_cam {center} {text} {where}"
    if box:
        for convention, turned in other_conventions(*center).items():
            if lands(turned, box, camera, slack):
                text += f": {convention}"
                break
    text += "; needs x right, y down, z forward"
    if not given:
        text += " (no intrinsics: a field of view of 60 degrees assumed)"
    return text


def slack_of(box, size, given):
    """Pixels (x, y) that a centre may lie beside its box; more where the intrinsics are a guess."""
    x1, y1, x2, y2 = box
    width, height = size
    if given:
        return SLACK * (x2 - x1) + 2, SLACK * (y2 - y1) + 2
    return width / 4, height / 4


def other_conventions(x, y, z):
    """A centre that was given in another convention, turned to ours: {what was other: centre}."""
    return {
        "y points up here": (x, -y, z),
        "x points left here": (-x, y, z),
        "y points up and z backward here": (x, -y, -z),
        "z points up here": (x, -z, y),
    }


def lands(center, box, camera, slack):
    """Does a centre project into a box (pixels), widened by `slack` pixels (x, y)?"""
    if center[2] <= 0:
        return False
    u, v = project(center, camera)
    x1, y1, x2, y2 = box
    return x1 - slack[0] <= u <= x2 + slack[0] and y1 - slack[1] <= v <= y2 + slack[1]


def measured(depth, box):
    """Median depth of the central half of a box (pixels); None where there is no measurement."""
    x1, y1, x2, y2 = box
    x = (x1 + x2) / 2
    y = (y1 + y2) / 2
    half_width = (x2 - x1) / 4
    half_height = (y2 - y1) / 4
    rows = slice(max(0, int(y - half_height)), int(y + half_height) + 1)
    columns = slice(max(0, int(x - half_width)), int(x + half_width) + 1)
    middle = depth[rows, columns]
    return float(np.nanmedian(middle)) if np.isfinite(middle).any() else None


def trace_problems(row):
    """(field, what is wrong) of a chain of thought: its format, its answer, its centres."""
    _, target = turns(row)
    answer = answer_of(row)
    said = extract_answer(target)
    if said is None and "<answer>" in target:
        yield "conversations", "<answer>..</answer> is not there exactly once"
    if said is None or "<think>" not in target:
        return
    path = path_of(row)
    rewards = total_reward(
        target, answer, path, centers_of(row), len(images_of(row)), question_of(row)
    )
    if rewards["format"] == 0:
        yield "conversations", f"the target is not in the format of its path ({path})"
    if not is_near(said, answer, target):
        yield "answer", f"the trace ends in {said!r}, the answer is {answer!r}"
    if rewards["detection"] == 0 and rewards["format"] == 1:
        yield "3d_pos", "no centre of the trace is within a metre of its truth"


def is_near(said, answer, target):
    """Does a target end in its answer? Numbers may be rounded; camera motion is not compared."""
    number = read_number(said)
    truth = read_number(answer)
    if number is not None and truth is not None:
        return abs(number - truth) <= 0.1 + 0.1 * abs(truth)
    return kind_of(answer) == "motion" or accuracy_reward(target, answer) == 1


def main():
    sys.exit(1 if check() else 0)


if __name__ == "__main__":
    run_main(main)
