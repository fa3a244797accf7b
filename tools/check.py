"""The check of instance files before a run: python -m tools.check FILE... [--model MODEL] [--rows N]

Prints rows per family and path, lengths in tokens, sizes of the regions, depths, and the first problems with file, row
and field. Exit code 1 if there is any, else 0. What a run would refuse is a problem; and so is what it could not see:
a centre in another convention than metres, x right, y down, z forward (it does not project into its own 2D box, and
the detection reward stays dead), a depth map in other units, a trace that does not end in its own answer.
"""

import collections
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

import data
from engine.settings import parse, run_main, setting
from formats.errors import BadRow, UserError
from formats.files import Rows
from formats.instances import (
    answer_of,
    centers_of,
    check_row,
    finite,
    images_of,
    intrinsics_of,
    mark_box,
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
from model import REGION_TOKEN
from rewards import accuracy_reward, extract_answer, kind_of, read_number, total_reward
from world import tiny

SHOWN = 20  # problems that are printed
LONGEST = 200  # metres; farther centres are in millimetres
SLACK = 0.25  # of its size that a 2D box is widened by: it may be covered
MISTAKES = {  # where a centre lands in its box if it is turned like this
    "y points up here": lambda x, y, z: (x, -y, z),
    "x points left here": lambda x, y, z: (-x, y, z),
    "y points up and z backward here": lambda x, y, z: (x, -y, -z),
    "z points up here": lambda x, y, z: (x, -z, y),
}


def lands(center, box, camera, slack):
    """Does a centre project into a box (pixels), widened by `slack` pixels (x, y)?"""
    if center[2] <= 0:
        return False
    u, v = project(center, camera)
    return (
        box[0] - slack[0] <= u <= box[2] + slack[0] and box[1] - slack[1] <= v <= box[3] + slack[1]
    )


def measured(depth, box):
    """Median depth of the central half of a box (pixels); None where there is no measurement."""
    x1, y1, x2, y2 = box
    x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 4, (y2 - y1) / 4
    part = depth[max(0, int(y - h)) : int(y + h) + 1, max(0, int(x - w)) : int(x + w) + 1]
    return float(np.nanmedian(part)) if np.isfinite(part).any() else None


def center_problems(row, sizes):
    """(field, what is wrong) of each centre that is not in metres, x right, y down, z forward."""
    marks, frame = (
        {field: (shapes, image) for field, shapes, image in marks_of(row)},
        reference_frame(row),
    )
    for mark, found in (centers_of(row) or {}).items():
        field, frames = mark.replace(" ", "_"), found if len(sizes) > 1 else {0: found}
        where = f"3d_pos.{field}"
        if frame not in frames:
            yield (
                where,
                f"no centre in the reference frame, image {frame}: its detection reward cannot be earned",
            )
        shapes, image = marks.get(field, ([], frame))
        own = row["3d_pos"][field if field in row["3d_pos"] else mark]
        shape = shapes[0] if shapes else own.get("bbox_2d")
        if image not in frames:
            continue
        x, y, z = frames[image]
        size, told = sizes[image], of_image(row, "intrinsics", image) is not None
        camera = intrinsics_of(row, *size, image)
        box = mark_box(shape, *size) if finite(shape, 2) or finite(shape, 4) else None
        if abs(z) > LONGEST:
            yield (
                where,
                f"center_cam {x, y, z} is {abs(z):.0f} m away: in millimetres? Needs metres",
            )
            continue
        slack = (
            [SLACK * (box[k + 2] - box[k]) + 2 if told else size[k] / 4 for k in (0, 1)]
            if box
            else None
        )
        if z <= 0 or box and not lands((x, y, z), box, camera, slack):
            seen = [
                name
                for name, turn in MISTAKES.items()
                if box and lands(turn(x, y, z), box, camera, slack)
            ]
            what = "is behind the camera" if z <= 0 else "does not project into its 2D box"
            yield (
                where,
                f"center_cam {x, y, z} {what} {'' if box is None else [round(v) for v in box]}"
                + f"{': ' + seen[0] if seen else ''}; needs x right, y down, z forward"
                + f"{'' if told else ' (no intrinsics: a field of view of 60 degrees assumed)'}",
            )
            continue
        depth = open_depth(row, *size, image)
        far = measured(depth, box) if box and depth is not None else None
        if far and not 1 / 3 < z / far < 3:
            yield (
                where,
                f"z = {z:g} m, but 'depth' measures {far:.3g} m there: other units? ('depth_scale')",
            )


def trace_problems(row):
    """(field, what is wrong) of a chain of thought: its format, its answer, its centres."""
    target, answer = turns(row)[1], answer_of(row)
    said, centers, count = extract_answer(target), centers_of(row), len(images_of(row))
    if said is None and "<answer>" in target:
        yield "conversations", "<answer>..</answer> is not there exactly once"
    if said is None or "<think>" not in target:
        return
    parts = total_reward(target, answer, path_of(row), centers, count, question_of(row))
    if parts["format"] == 0:
        yield "conversations", f"the target is not in the format of its path ({path_of(row)})"
    number, truth = read_number(said), read_number(answer)
    near = (
        abs(number - truth) <= 0.1 + 0.1 * abs(truth)
        if None not in (number, truth)
        else kind_of(answer) == "motion" or accuracy_reward(target, answer) == 1
    )
    if not near:
        yield "answer", f"the trace ends in {said!r}, the answer is {answer!r}"
    if parts["detection"] == 0 and parts["format"] == 1:
        yield "3d_pos", "no centre of the trace is within a metre of its truth"


def problems_of(row, sizes):
    """What a run would not notice: lines "file: row: field: what is wrong"."""
    found = [*center_problems(row, sizes), *trace_problems(row)]
    return [f"{row['source']}: field '{field}': {text}" for field, text in found]


def check_file(path, tokenizer, processor, limit=0):
    """-> (counts by (family, path), {name: values}, problems), over all rows or `limit` evenly spread ones."""
    counts, values, problems = collections.Counter(), collections.defaultdict(list), []
    try:
        rows = Rows(path)
    except BadRow as error:
        return counts, values, [str(error)]
    picked = np.unique(
        np.linspace(0, len(rows) - 1, min(limit or len(rows), len(rows))).astype(int)
    ).tolist()
    for i in tqdm(picked, desc=os.path.basename(path), mininterval=2, disable=len(picked) < 100):
        try:
            row = rows.read(i)
            check_row(row)
            sample = data.encode(row, tokenizer, processor, train=True)
        except BadRow as error:
            problems.append(str(error))
            continue
        sizes = [open_image(row, k).size for k in range(len(images_of(row)))]
        path_name = "dtr, no centres" if row.get("3d_pos") == {} else path_of(row)
        counts[str(row.get("task", os.path.basename(path))), path_name] += 1
        values["tokens"].append(len(sample["prompt"]) + len(sample["target"]))
        values["images"].append(len(sizes))
        for image, (x1, y1, x2, y2) in regions_of(row, sizes):
            values["region, % of its image"].append(
                100 * (x2 - x1) * (y2 - y1) / math.prod(sizes[image])
            )
        for k, size in enumerate(sizes):
            depth = open_depth(row, *size, k)
            if depth is not None:
                known = np.isfinite(depth)
                values["depth measured, % of the pixels"].append(100 * known.mean())
                values["depth, median of an image, m"] += (
                    [float(np.nanmedian(depth))] if known.any() else []
                )
        problems += problems_of(row, sizes)
    return counts, values, problems


def load_texts(model):
    """Tokenizer and image processor of --model, without its weights; of the embedded default model without one."""
    if not model:
        return tiny.new_model("tiny", 0, data.PROMPTS.values())[1:]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([REGION_TOKEN], special_tokens=True)
        return tokenizer, Qwen2VLImageProcessorPil.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: {str(error).splitlines()[0]}") from None


@dataclass
class Settings:
    files: list = setting([], "JSON list, JSON lines or parquet of instances", positional=True)
    model: str = setting("", "lengths by this model's tokenizer; empty: the embedded one's")
    rows: int = setting(0, "check so many rows, evenly spread; 0: all")


def check(argv=None):
    """The program. -> number of problems"""
    settings = parse(Settings, __doc__, argv)
    tokenizer, processor = load_texts(settings.model)
    problems = []
    for path in settings.files:
        counts, values, found = check_file(path, tokenizer, processor, settings.rows)
        problems += found
        print(f"\n{path}: {sum(counts.values()):,} usable rows, {len(found)} problems")
        print(f"  {'family':<32}{'path':<18}rows")
        for (family, path_name), count in sorted(counts.items()):
            print(f"  {family:<32}{path_name:<18}{count:,}")
        print(f"  {'':<32}{'min':>10}{'median':>10}{'max':>10}{'n':>10}")
        for name, of in values.items():
            print(
                f"  {name:<32}{min(of):>10.4g}{np.median(of):>10.4g}{max(of):>10.4g}{len(of):>10,}"
            )
    print(
        f"\n{len(problems)} problems" + (f", the first {SHOWN}:" if len(problems) > SHOWN else "")
    )
    print("\n".join(problems[:SHOWN]))
    return len(problems)


def main():
    run_main(lambda: sys.exit(1 if check() else 0))


if __name__ == "__main__":
    main()
