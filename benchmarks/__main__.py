"""Nine published benchmarks: their files -> questions on both paths -> responses -> a table.

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D coordinates first).

    python -m benchmarks blink --model out/grpo --data BLINK     # a folder, or the files themselves
    torchrun --nproc_per_node 8 -m benchmarks spar --model out/grpo --data SPAR-Bench --path lor
    python -m benchmarks spar --data SPAR-Bench --score responses.jsonl     # nothing is run

Decoding is greedy. Questions with boxes are asked on the DTR path too, with a region token per box.
The table has the mean score per path and type, per level, and overall (benchmarks/scoring.py).

Responses are appended to out/bench_NAME.jsonl (with --json FILE.json: to FILE.jsonl) batch by
batch, and a later run asks only what is missing there. A file for --score has on each line
{"id": .., "response": ..}; without --data also "answer" and "type". SAT's choices are shuffled by
row number: nothing depends on the number of processes or on the batch size.
"""

import base64
import filecmp
import glob
import json
import math
import os
import random
import re
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
from tqdm import tqdm

import data
from benchmarks.scoring import (
    HOW_TO_ANSWER,
    index_of,
    letter_of,
    level_of,
    listed_choices,
    make_table,
    overall_rule,
    rule_of,
    score,
)
from benchmarks.tables import parquet_rows, tfrecord_rows
from engine import distributed
from engine.checkpoint import fingerprint, load_model
from engine.output import check_outputs, whole_file
from engine.settings import parse, run_main, setting
from engine.shared_prefix import rollout
from eval import mean_interval
from formats.errors import BadRow, UserError
from formats.files import Rows
from formats.instances import (
    MARK_COLORS,
    best_path,
    boxes_of,
    mark_fields,
    open_image,
    path_of,
    question_of,
    turns,
)
from model import decode, token_rules
from rewards import read_choice

# ----------------------------------------------------------------------------------------------
# a published row of each benchmark -> what its instance is made of:
#
# type, answer, image; question, or prompt, which lists the choices itself; where there are any: id,
# choices, group (of the overall score), marks, depth, intrinsics; draw: boxes in pixels by the
# colour of their mark; dtr: what differs on the DTR path, None for a row without regions.

SHUFFLE_SEED = 0  # of the order of SAT's choices
KINDS = {str: "text", list: "a list", dict: "an object", int: "a whole number"}


def get(row, field, kind=str):
    """A field that must be there and be of this kind, not empty.

    Numbers count as text, and JSON text as the list or the object that it holds.
    """
    value = row.get(field)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if kind in (list, dict) and isinstance(value, str):
        value = parsed(value)
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or (kind in (str, list) and not value):
        raise BadRow(
            f"{row['source']}: field '{field}': needs {KINDS[kind]}, not {short(row.get(field))}"
        )
    return value


def parsed(text):
    """What a JSON text holds; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def short(value):
    """The beginning of a value, as an error quotes it: one line, whatever it holds."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choices_of(row, field, needed=False):
    """The choices in a field as a list of texts; None for a row without, where none are needed."""
    if row.get(field) is None and not needed:
        return None
    choices = get(row, field, list)
    if not all(isinstance(choice, (str, int, float)) for choice in choices):
        raise BadRow(
            f"{row['source']}: field '{field}': needs a list of texts, not {short(choices)}"
        )
    return [str(choice) for choice in choices]


def choices_in(prompt, answer):
    """The choices that a prompt lists itself, where the answer is a letter of one of them."""
    choices = listed_choices(prompt) or []
    letter = read_choice(answer)
    return choices if letter and index_of(letter) < len(choices) else None


def from_spar(row):
    """SPAR-Bench, also -RGBD, which has depth (metres) and intrinsics.

    Marks ("red_bbox", see formats/instances.py) are regions where the question names any of them.
    """
    question = get(row, "question")
    marks = {}
    for field in [*mark_fields(row), "bbox_img_idx", "point_img_idx"]:
        if row.get(field):
            marks[field] = row[field]
    named = any(field.replace("_", " ") in question for field in marks)
    return {
        **marks,
        "id": row.get("id"),
        "type": get(row, "task"),
        "question": question,
        "answer": get(row, "answer"),
        "image": row.get("image"),
        "depth": row.get("depth"),
        "intrinsics": row.get("intrinsic_depth"),
        "dtr": {"3d_pos": {}} if named else None,
    }


def from_embspatial(row):
    """EmbSpatial-Bench: the DTR path names its objects, each by the mark around its box."""
    objects = row.get("objects") or []
    question = get(row, "question")
    encoded = get(row, "image")
    try:
        image = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise BadRow(f"{row['source']}: field 'image': needs a base64 picture") from None
    boxes = {}
    names = []
    try:
        for color, thing in zip(MARK_COLORS, objects):
            x, y, width, height = thing["bbox"]
            boxes[color] = [x, y, x + width, y + height]
            names.append(f"{thing['name']} ({color} bbox <mask>)")
    except (TypeError, KeyError, ValueError):
        raise BadRow(
            f"{row['source']}: field 'objects': needs a list of {{'name', 'bbox': [x, y, w, h]}}"
        ) from None
    choices = choices_of(row, "answer_options", needed=True)
    index = get(row, "answer", int)
    if not 0 <= index < len(choices):
        raise BadRow(f"{row['source']}: field 'answer': {index} must be 0 to {len(choices) - 1}")
    dtr = None
    if boxes:
        with_objects = f"{question}\nObjects: {', '.join(names)}."
        dtr = {"question": with_objects, "draw": boxes, "3d_pos": {}}
    return {
        "id": row.get("question_id"),
        "type": get(row, "relation"),
        "question": question,
        "image": image,
        "answer": letter_of(index),
        "choices": choices,
        "dtr": dtr,
    }


def from_sat(row):
    """SAT; its choices are shuffled, in the same way in every run."""
    choices = choices_of(row, "answers", needed=True)
    answer = get(row, "correct_answer")
    generator = random.Random(f"{SHUFFLE_SEED} {row['index']}")
    shuffled = generator.sample(choices, len(choices))
    if shuffled.count(answer) != 1:
        raise BadRow(
            f"{row['source']}: field 'correct_answer': {short(answer)} must be one of the answers "
            f"{short(choices)}"
        )
    return {
        "type": get(row, "question_type"),
        "question": get(row, "question"),
        "choices": shuffled,
        "answer": letter_of(shuffled.index(answer)),
        "image": row.get("image_bytes"),
    }


def from_blink(row):
    return {
        "id": row.get("idx"),
        "type": get(row, "sub_task"),
        "prompt": get(row, "prompt"),
        "answer": get(row, "answer"),
        "choices": choices_of(row, "choices"),
        "image": [row.get(f"image_{i}") for i in range(1, 5)],
    }


def from_cvbench(row):
    """CV-Bench; "group" is its column "source", which the overall score goes by.

    In JSON lines the picture is the file in "filename".
    """
    return {
        "id": row.get("idx"),
        "type": get(row, "task"),
        "prompt": get(row, "prompt"),
        "answer": get(row, "answer"),
        "choices": choices_of(row, "choices"),
        "group": group_of(row),
        "image": row.get("image") or row.get("filename"),
    }


def group_of(row):
    """Which data set a question of CV-Bench is made from."""
    if row.get("group") not in ("ADE20K", "COCO", "Omni3D"):
        raise BadRow(
            f"{row['source']}: field 'source' or 'group': needs ADE20K, COCO or Omni3D, "
            f"not {short(row.get('group'))}"
        )
    return row["group"]


def from_realworldqa(row):
    prompt = get(row, "question")
    answer = get(row, "answer")
    return {
        "type": "question",
        "prompt": prompt,
        "answer": answer,
        "choices": choices_in(prompt, answer),
        "image": row.get("image"),
    }


def from_erqa(row):
    """ERQA as TFRecord, parquet or JSON lines.

    visual_indices: before which character of the question each picture belongs.
    """
    row = {**row}
    for field in ("question", "answer", "question_type", "question_id"):
        if is_feature(row.get(field)):
            row[field] = b"".join(row[field]).decode(errors="replace")
    question = get(row, "question")
    answer = get(row, "answer")
    images_field = "image/encoded" if "image/encoded" in row else "images"
    images = get(row, images_field, list) if row.get(images_field) else []
    positions = row.get("visual_indices") or []
    if not isinstance(positions, list) or not all(isinstance(place, int) for place in positions):
        raise BadRow(
            f"{row['source']}: field 'visual_indices': needs whole numbers, not {short(positions)}"
        )
    prompt = question
    if len(positions) == len(images) and "<image>" not in question:
        images = [images[i] for i in np.argsort(positions, kind="stable")]
        for position in sorted(positions, reverse=True):  # from the end: the others stay in place
            prompt = f"{prompt[:position]}<image>{prompt[position:]}"
    return {
        "id": row.get("question_id"),
        "type": get(row, "question_type"),
        "prompt": prompt,
        "answer": answer,
        "choices": choices_in(question, answer),
        "image": images,
    }


def is_feature(value):
    """Is this a text as TFRecord files hold it, a list of bytes?"""
    return isinstance(value, list) and all(isinstance(part, bytes) for part in value)


def from_spatialrgpt(row):
    """SpatialRGPT-Bench: Region [i] is box i, of "rle" where "bbox" is missing.

    The first four are drawn, for both paths.
    """
    row = {**row}
    for field, kind in (
        ("bbox", list),
        ("rle", list),
        ("conversations", list),
        ("image_info", dict),
    ):
        if row.get(field):
            row[field] = get(row, field, kind)
    boxes = row.get("bbox")
    if not boxes:
        boxes = [rle_box(row, rle) for rle in row.get("rle") or []]
    draw = dict(zip(MARK_COLORS, boxes_of(row, "bbox", boxes)))
    question = get(row, "text_q")
    named = {int(digit) for digit in re.findall(r"Region \[(\d)\]", question)}
    if boxes and named and len(boxes) <= max(named):
        raise BadRow(
            f"{row['source']}: field 'bbox': {len(boxes)} boxes, "
            f"and a question about Region [{max(named)}]"
        )
    dtr_question = question
    for i, color in enumerate(draw):
        region = f"Region [{i}]"
        question = question.replace(region, f"{region} ({color} bbox)", 1)
        dtr_question = dtr_question.replace(region, f"{region} ({color} bbox <mask>)", 1)
    return {
        "id": row.get("id"),
        "type": get({**row, **get(row, "qa_info", dict)}, "category"),
        "question": question,
        "answer": turns(row)[1].strip(),
        "draw": draw,
        "image": row.get("image") or (row.get("image_info") or {}).get("file_path"),
        "dtr": {"question": dtr_question, "3d_pos": {}} if boxes and named else None,
    }


def rle_box(row, rle):
    """Box in pixels around a COCO run-length mask.

    Its counts are the lengths of runs of 0 and 1 in turn, column by column: a list, or text. The
    mask itself is never made: a few bytes can say that it has ten billion pixels.
    """
    try:
        height, width = rle["size"]
        counts = rle["counts"]
        if isinstance(counts, str):
            counts = read_counts(counts)
        whole = all(type(count) is int and count >= 0 for count in [height, width, *counts])
        if not whole or sum(counts) != height * width:
            raise ValueError
        ends = list(accumulate(counts))
        runs = [(end - count, end - 1) for end, count in zip(ends[1::2], counts[1::2]) if count]
        x1, y1 = width, height
        x2, y2 = 0, 0
        for first, last in runs:  # pixels
            x1 = min(x1, first // height)
            x2 = max(x2, last // height + 1)
            one_column = first // height == last // height  # else it goes over an edge
            y1 = min(y1, first % height if one_column else 0)
            y2 = max(y2, last % height + 1 if one_column else height)
        if not runs:
            raise ValueError
        return [x1, y1, x2, y2]
    except (TypeError, KeyError, ValueError):
        raise BadRow(
            f"{row['source']}: field 'rle': needs COCO masks {{'size', 'counts'}}, none empty"
        ) from None


def read_counts(text):
    """COCO's text of run lengths -> a list of ints; ValueError for a number of 60 bits or more.

    A character holds 5 bits, the lowest ones of a number first, and a bit that says whether more
    follow. From the fourth number on it is the difference to the number two before, in two's
    complement.
    """
    counts = []
    value = 0
    shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError
        if bits & 32:  # more follow
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    return counts


def from_vsi(row):
    """VSI-Bench asks about videos, which are not read here; its options are "A. chair", ..."""
    options = choices_of(row, "options") if row.get("options") else []
    options = [option.split(". ", 1)[-1] for option in options]
    return {
        "id": row.get("id"),
        "type": get(row, "question_type"),
        "question": get(row, "question"),
        "answer": get(row, "ground_truth"),
        "choices": options,
        "image": [],
    }


# Which files of a folder are read, and how a row is read. The first pattern that a file of the
# folder has counts: the others are the same questions in another format. Where training data or
# another benchmark may lie beside, the pattern says the name.
BENCHMARKS = {
    "spar": (("*.parquet",), from_spar),
    "embspatial": (("embspatial_bench*.json",), from_embspatial),
    "sat": (("*test*.parquet",), from_sat),
    "blink": (("val-*.parquet",), from_blink),
    "cvbench": (("test*.parquet", "test*.jsonl"), from_cvbench),
    "vsi": (("test-*.parquet", "test.parquet", "test.jsonl"), from_vsi),
    "realworldqa": (("*.parquet",), from_realworldqa),
    "erqa": (("*.tfrecord", "*.parquet", "*.jsonl"), from_erqa),
    "spatialrgpt": (("*.parquet", "SpatialRGPT-Bench*.json", "*.jsonl"), from_spatialrgpt),
}
# data set/snapshots/revision/file, as the hub's downloads lie in their cache
SNAPSHOT = re.compile(r"(.*/snapshots)/([^/]+)/.*")
TRAINING_FILE = re.compile(r"(?:^|[^a-z])(?:train|sft)(?:[^a-z]|$)", re.IGNORECASE)

# ----------------------------------------------------------------------------------------------
# settings


@dataclass
class Settings:
    # who is asked what
    name: str = setting(
        "", f"benchmark: {', '.join(BENCHMARKS)}", tuple(BENCHMARKS), positional=True
    )
    model: str = setting(
        "out/grpo", "folder of this project or a stock Qwen3-VL", not_with=("score",)
    )
    data: list = setting([], "files of the benchmark, or the folder that holds them")
    skip_bad_rows: bool = setting(
        False, "count and list bad rows instead of stopping at the first", only_with=("data",)
    )
    path: str = setting(
        "both",
        "lor, dtr, both, or auto: dtr for regions and geometry, lor otherwise",
        ("lor", "dtr", "both", "auto"),
    )
    score: str = setting("", "only score this JSON-lines file of {id, response}; nothing is run")
    # how
    max_new_tokens: int = setting(
        160,
        "longest response, tokens (paper: 2048)",
        at_least=1,
        at_most=100_000,
        not_with=("score",),
    )
    batch: int = setting(240, "prompts at once on a rank", at_least=1, not_with=("score",))
    seed: int = setting(
        0,
        "seed of the processes; decoding is greedy",
        at_least=0,
        below=distributed.MOST_SEEDS,
        not_with=("score",),
    )
    attention: str = setting(
        "auto",
        "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed",
        ("auto", "sdpa", "flash"),
        not_with=("score",),
    )
    # what comes out
    json: str = setting(
        "", "file for the table and every response; empty: out/bench_NAME.json, none with --score"
    )


# ----------------------------------------------------------------------------------------------
# files -> instances


def read(benchmark, paths, skip_bad_rows=False):
    """Files and folders -> instances of both paths, in the order of the rows.

    "id" is the benchmark's; the row's number over all files where it has none, or where ids repeat.
    Pictures are read when they are needed: see `load`.
    """
    questions = []  # one or two instances each
    bad = []
    for index, row in enumerate(raw_rows(benchmark, paths)):
        try:
            questions.append(instances_of(benchmark, {**row, "index": index}))
        except BadRow as error:
            if not skip_bad_rows:
                raise BadRow(f"{error} (--skip_bad_rows leaves such rows out)") from None
            bad.append(f"skipped: {error}")
    if bad:
        count = f"{len(bad)} of {len(questions) + len(bad)} rows skipped"
        distributed.say("\n".join([*bad[:20], count]))
    if not questions:
        raise BadRow(f"--data {' '.join(paths)}: no usable row")
    ids = [str(instances[0].get("id")) for instances in questions]
    unique = len(set(ids)) == len(ids)
    rows = []
    for published_id, instances in zip(ids, questions):
        for row in instances:
            rows.append({**row, "id": published_id if unique else str(row["index"])})
    return rows


def raw_rows(benchmark, paths):
    """The rows of files and folders as they are published, in the order of the files' names.

    Each has its "source" (file and row), and the "folder" of its file; a "source" of its own, which
    CV-Bench has, becomes its "group".
    """
    rows = []
    files = [file for path in paths for file in files_of(benchmark, path)]
    for file in each_once(files):
        folder = os.path.dirname(os.path.abspath(file))
        for i, row in enumerate(rows_of(file)):
            own = {"source": f"{file}: row {i}", "folder": folder}
            rows.append({"group": row.get("source"), **row, **own})
    return rows


def files_of(benchmark, path):
    """A file, or those of the benchmark in a folder, without files of training data."""
    if os.path.isfile(path):
        return [path]
    patterns, _ = BENCHMARKS[benchmark]
    for pattern in patterns:
        files = files_in(path, pattern)
        files = [file for file in files if not TRAINING_FILE.search(os.path.basename(file))]
        if files:
            return files
    others = [file for kind in ROWS_OF for file in files_in(path, f"*{kind}")]
    names = [os.path.relpath(file, path) for file in others[:3]]
    way_out = f"; to read another file of it, name that one: {', '.join(names)}" if names else ""
    raise BadRow(
        f"--data {path}: no such file, or no {' or '.join(patterns)} in that folder{way_out}"
    )


def files_in(folder, pattern):
    """The files in a folder, at any depth, whose names have this pattern, sorted."""
    anywhere = os.path.join(glob.escape(folder), "**", pattern)
    return sorted(filter(os.path.isfile, glob.glob(anywhere, recursive=True)))


def each_once(files):
    """The files without those that are another one over again: a link to it, or a copy.

    UserError for files of two revisions in a download cache, since only one of them can count.
    """
    kept = []
    for file in files:
        same = [other for other in kept if is_same(file, other)]
        if same:
            distributed.say(f"{file}: the same as {same[0]}, read once")
            continue
        kept.append(file)
    revisions = {}  # by data set
    for file in kept:
        found = SNAPSHOT.fullmatch(os.path.abspath(file))
        if found and revisions.setdefault(found[1], found[2]) != found[2]:
            raise UserError(
                f"--data: {found[1]} holds two revisions, {revisions[found[1]]} and {found[2]}, "
                "with different files: name the folder of one"
            )
    return kept


def is_same(file, other):
    """Is it one file, or two of the same content?"""
    return os.path.samefile(file, other) or (
        os.path.getsize(file) == os.path.getsize(other) and filecmp.cmp(file, other, shallow=False)
    )


class JsonRows(Rows):
    """Rows that keep a "source" of their own, as "group": the reader's takes its place."""

    def read_json(self, i):
        row = super().read_json(i)
        return {"group": row.get("source"), **row} if isinstance(row, dict) else row


def json_rows(file):
    rows = JsonRows(file)
    return [rows.read(i) for i in range(len(rows))]


ROWS_OF = {  # by the extension of a file's name
    ".parquet": parquet_rows,
    ".tfrecord": tfrecord_rows,
    ".jsonl": json_rows,
    ".json": json_rows,
}


def rows_of(file):
    extension = os.path.splitext(file)[1].lower()
    return ROWS_OF.get(extension, json_rows)(file)


def instances_of(benchmark, row):
    """A row -> its instance on the LOR path and, where it has regions, that on the DTR path."""
    _, from_row = BENCHMARKS[benchmark]
    own = {key: row[key] for key in ("index", "source", "folder")}
    lor = {"choices": None, "group": None, **from_row(row), **own}
    lor = graded(benchmark, lor)
    different = lor.pop("dtr", None)
    instances = [with_turns(benchmark, lor)]
    if different:
        instances.append(with_turns(benchmark, {**lor, **different}))
    return instances


def graded(benchmark, row):
    """The row with its "level"; its answer must earn the full score by the benchmark's own rule."""
    try:
        rule = rule_of(benchmark, row["type"], row["answer"])
        level = level_of(benchmark, row["type"])
    except KeyError:
        raise BadRow(
            f"{row['source']}: {short(row['type'])} is no type of question of {benchmark}"
        ) from None
    right = score(benchmark, row["answer"], row) == 1
    if row.get("choices"):
        letter = read_choice(row["answer"])
        right = right and (letter is None or index_of(letter) < len(row["choices"]))
    if not right:
        raise BadRow(
            f"{row['source']}: field 'answer': {short(row['answer'])} is no answer of the kind "
            f"'{rule}' (a split whose answers are hidden cannot be scored)"
        )
    return {**row, "level": level}


def with_turns(benchmark, row):
    """The row with its "conversations": the question with choices and how to answer; the answer."""
    if "prompt" in row:
        text = row["prompt"]
    else:
        choices = row["choices"] or []
        listed = [f"({letter_of(i)}) {words}" for i, words in enumerate(choices)]
        text = "\n".join([row["question"], *listed])
    rule = rule_of(benchmark, row["type"], row["answer"])
    text = f"{text}\n{HOW_TO_ANSWER[rule]}".strip()
    conversations = [
        {"from": "human", "value": text},
        {"from": "gpt", "value": row["answer"]},
    ]
    return {**row, "conversations": conversations}


# ----------------------------------------------------------------------------------------------
# an instance as data.py takes it


def load(row):
    """The instance with its pictures and depth maps; boxes to draw become marks, in thousandths."""
    row = {key: read_now(value) for key, value in row.items()}
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    images = [path_or_bytes(image) for image in images]
    images = [image for image in images if image is not None]
    if not images:
        raise BadRow(
            f"{row['source']}: field 'image': no picture; without pictures there is only --score"
        )
    row["image"] = images[0] if len(images) == 1 else images
    sizes = [open_image(row, i).size for i in range(len(images))]
    for color, box in row.pop("draw", {}).items():
        sides = sizes[0] * 2  # width, height, width, height
        inside = [min(max(value / side, 0), 1) for value, side in zip(box, sides)]
        row[f"{color}_bbox"] = [[value * 1000 for value in inside]]
    return with_depth(row, sizes)


def read_now(value):
    """A cell of a parquet file that was left there; any other value as it is."""
    return value() if isinstance(value, partial) else value


def path_or_bytes(image):
    """An image as a file holds it: in parquet {"bytes": .., "path": ..}, else a path or bytes."""
    image = read_now(image)
    if isinstance(image, dict):
        return image.get("bytes") or image.get("path")
    return image


def with_depth(row, sizes):
    """The row with depth and intrinsics brought to the size of its pictures, where it has any."""
    given_maps = row.pop("depth", None) or []
    given_cameras = row.pop("intrinsics", None) or []
    maps = []
    cameras = []
    try:
        for depth, camera, size in zip(given_maps, given_cameras, sizes):
            depth, camera = resize_depth(depth, camera, size)
            maps.append(depth)
            cameras.append(camera)
    except (TypeError, ValueError, IndexError) as error:
        raise BadRow(
            f"{row['source']}: field 'depth': needs maps in metres, and 4x4 intrinsics ({error})"
        ) from None
    if not maps:
        return row
    if len(sizes) == 1:
        return {**row, "depth": maps[0], "intrinsics": cameras[0]}
    return {**row, "depth": maps, "intrinsics": cameras}


def resize_depth(depth, camera, size):
    """A depth map (metres, 0 = none) and 4x4 intrinsics, both brought to a size (W, H) in pixels.

    -> depth (H, W) with NaN = none, nearest neighbours; [fx, fy, cx, cy]
    """
    width, height = size
    depth = np.asarray(depth, np.float32)
    camera = np.reshape(camera, (4, 4))
    x_scale = width / depth.shape[1]
    y_scale = height / depth.shape[0]
    rows = ((np.arange(height) + 0.5) / y_scale).astype(int)
    columns = ((np.arange(width) + 0.5) / x_scale).astype(int)
    depth = depth[rows][:, columns]  # (H, W)
    depth = np.where(depth > 0, depth, np.nan).astype(np.float32)
    fx = camera[0, 0] * x_scale
    fy = camera[1, 1] * y_scale
    cx = camera[0, 2] * x_scale
    cy = camera[1, 2] * y_scale
    return depth, [float(fx), float(fy), float(cx), float(cy)]


# ----------------------------------------------------------------------------------------------
# records: responses that the model gives here


def record_of(row, response, path):
    """What is kept of a response; with "score" it is a result."""
    return {
        "index": row["index"],
        "id": row["id"],
        "type": row["type"],
        "level": row["level"],
        "group": row["group"],
        "choices": row["choices"],
        "answer": row["answer"],
        "path": path,
        "question": question_of(row) if "conversations" in row else row["question"],
        "response": response,
    }


def key_of(row):
    """What a question's record is found by."""
    return row["id"], path_of(row)


def ask_model(settings, file):
    """Greedy responses of --model -> records, on every rank; also appended to the file."""
    device = distributed.setup(settings.seed)
    rows = read(settings.name, settings.data, settings.skip_bad_rows)
    rows = rows_on_path(rows, settings.path)
    model, tokenizer, processor = load_model(settings.model)
    distributed.use_attention(model, settings.attention)
    about = {
        "bench": settings.name,
        "weights": fingerprint(model),
        "max_new_tokens": settings.max_new_tokens,
    }
    model = distributed.shard(distributed.freeze(model, device), device)
    return answer(model, tokenizer, processor, rows, device, settings, file, about)


def rows_on_path(rows, path):
    """The rows of --path. With "auto" each question is asked on the path that `best_path` chooses.

    A question without a DTR row is asked on LOR.
    """
    if path == "both":
        return rows
    if path != "auto":
        return [row for row in rows if path_of(row) == path]
    best = {}
    for row in rows:  # the DTR row of a question comes after its LOR row
        best[row["id"]] = best_path(row) if path_of(row) == "dtr" else "lor"
    return [row for row in rows if path_of(row) == best[row["id"]]]


def answer(model, tokenizer, processor, rows, device, settings, file, about):
    """Greedy responses to the rows -> records, in their order, on every rank.

    They are appended to the file as they are made. about: a dict that tells this run from others.
    """
    done = resume(file, about, rows)
    distributed.gather([])  # all ranks have read the file before one writes to it
    if distributed.rank() == 0:
        begin_file(file, about)
    todo = [row for row in rows if key_of(row) not in done]
    distributed.say(
        f"{settings.name}: {len(rows)} questions, "
        f"{len(rows) - len(todo)} of them answered before in {file}"
    )
    mine = todo[distributed.rank() :: distributed.world_size()]
    most_of_a_rank = math.ceil(len(todo) / distributed.world_size())
    rules = token_rules(model, tokenizer, device)
    with distributed.gathered(model):
        bar = tqdm(
            range(0, most_of_a_rank, settings.batch),
            desc=settings.name,
            disable=distributed.rank() > 0,
            mininterval=2,
        )
        for start in bar:
            batch = mine[start : start + settings.batch]
            new = []
            if batch:  # also a rank that has nothing left to ask takes part in `gather`
                samples = [
                    data.encode(load(row), tokenizer, processor, train=False) for row in batch
                ]
                prompts = data.to(data.collate(samples, tokenizer), device)
                texts = respond(model, tokenizer, prompts, settings.max_new_tokens, rules)
                new = [record_of(row, text, path_of(row)) for row, text in zip(batch, texts)]
            new = distributed.gather(new)
            if distributed.rank() == 0:  # one writes for all
                append(file, new)
            for record in new:
                done[record["id"], record["path"]] = record
    return [record_of(row, done[key_of(row)]["response"], path_of(row)) for row in rows]


def respond(model, tokenizer, prompts, max_new_tokens, rules):
    """Greedy responses to a batch of prompts, one per prompt; rules: see model.token_rules."""
    stop_ids, banned = rules
    tokens, mask, _, _ = rollout(
        model, prompts, 1, max_new_tokens, stop_ids, banned, temperature=0.0
    )
    texts, _ = decode(tokenizer, tokens, mask, set(stop_ids.tolist()))
    return texts


# ----------------------------------------------------------------------------------------------
# the file of records, from which a later run goes on: the first line says which run it is of


def resume(file, about, rows):
    """What earlier runs left in the file -> {(id, path): record}.

    UserError where the file is of another model, of other settings or of other questions.
    """
    if not os.path.exists(file):
        return {}
    with open(file, encoding="utf-8", errors="replace") as handle:
        *lines, cut_off = handle.read().split("\n")
    if not lines and not cut_off:
        return {}
    try:
        head, *records = map(json.loads, lines)
        done = {(record["id"], record["path"]): record for record in records}
        changed = [key for key in about if head["run"].get(key) != about[key]]
        for row in rows:
            if key_of(row) in done and done[key_of(row)]["question"] != question_of(row):
                changed.append(f"question {row['id']}")
    except (ValueError, KeyError, TypeError, AttributeError):
        changed = ["it cannot be read"]
    if changed:
        raise UserError(
            f"{file}: holds the responses of another run (differs: {changed[0]}); "
            "remove it, or name another --json"
        )
    return done


def begin_file(file, about):
    """Cut off the half line that a killed run left; write the first line where there is none."""
    os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
    with open(file, "ab+") as handle:
        handle.seek(0)
        whole_lines = handle.read().rfind(b"\n") + 1  # bytes
        handle.truncate(whole_lines)
        if whole_lines == 0:
            handle.write(json.dumps({"run": about}).encode() + b"\n")


def append(file, records):
    try:
        with open(file, "a") as handle:
            handle.write("".join(json.dumps(record) + "\n" for record in records))
    except OSError as error:
        raise UserError(
            f"{file}: cannot write ({error.strerror}); the same command goes on from what is there"
        ) from None


# ----------------------------------------------------------------------------------------------
# records: responses that were made before, here or elsewhere (--score)


def read_responses(settings):
    """The lines of --score as records, sorted by row.

    With --data every question of a path counts, and one without a response is wrong. Without it
    each line holds its own "answer" and "type".
    """
    rows = []
    if settings.data:
        rows = read(settings.name, settings.data, settings.skip_bad_rows)
    known = {key_of(row): row for row in rows}
    found = {}
    lines = json_rows(settings.score)
    lines = [line for line in lines if "response" in line or "run" not in line]
    for number, line in enumerate(lines):
        key = checked_key(line, number, known, found)
        if rows:
            row = reordered(known[key], line)
        else:
            row = row_of_line(settings.name, line, number, key)
        found[key] = record_of(row, line["response"], key[1])
    asked_paths = {path for _, path in found}
    missing = [row for row in rows if path_of(row) in asked_paths and key_of(row) not in found]
    if missing:
        distributed.say(
            f"{len(missing)} of {len(missing) + len(found)} questions have no response: "
            "they count as wrong"
        )
    records = list(found.values())
    records += [record_of(row, "", path_of(row)) for row in missing]
    return sorted(records, key=lambda record: (record["index"], record["path"] != "lor"))


ID_FIELDS = ("id", "idx", "question_id")  # as the benchmarks call it


def checked_key(line, number, known, found):
    """The key of the question that a line answers; BadRow without a response or such a question.

    known: the rows of --data by key, or none at all; found: the records of earlier lines.
    """
    fields = [field for field in ID_FIELDS if line.get(field) is not None]
    line_id = get(line, fields[0]) if fields else str(number)
    path = "dtr" if line.get("path") == "dtr" else "lor"
    if not isinstance(line.get("response"), str):  # an empty one is a response, too
        raise BadRow(
            f"{line['source']}: field 'response': needs text, not {short(line.get('response'))}"
        )
    problem = ""
    if (line_id, path) in found:
        problem = "there twice"
    elif known and (line_id, path) not in known:
        problem = "not in --data"
    if problem:
        raise BadRow(
            f"{line['source']}: field 'id': {short(line_id)} on the path '{path}' is {problem}"
        )
    return line_id, path


def reordered(row, line):
    """The row with its choices in the order in which the line says that they were shown."""
    shown = choices_of(line, "choices") or []
    choices = row["choices"] or []
    if not shown or not choices or shown == choices:
        return row
    if sorted(shown) != sorted(choices):
        raise BadRow(
            f"{line['source']}: field 'choices': needs the choices of --data in any order, "
            f"{short(choices)}"
        )
    letter = read_choice(row["answer"])
    if letter is None:  # the answer is the words of a choice, in any order
        return {**row, "choices": shown}
    right = choices[index_of(letter)]
    return {**row, "choices": shown, "answer": letter_of(shown.index(right))}


def row_of_line(benchmark, line, number, key):
    """A line that holds its own answer -> a row to score it by."""
    row = {
        "id": key[0],
        "answer": get(line, "answer"),
        "choices": choices_of(line, "choices"),
        "group": group_of(line) if benchmark == "cvbench" else None,
        "source": line["source"],
    }
    for field, kind, default in (
        ("type", str, "question"),
        ("question", str, ""),
        ("index", int, number),
    ):
        row[field] = default if line.get(field) in (None, "") else get(line, field, kind)
    return graded(benchmark, row)


# ----------------------------------------------------------------------------------------------
# the program


def run_benchmark(settings):
    """Get the records, score them, print and write the table."""
    file = settings.json or f"out/bench_{settings.name}.json"
    inputs = [settings.score]
    for path in settings.data:
        inputs += files_of(settings.name, path)
    if settings.score:
        check_outputs({"--json": settings.json}, inputs)
        records = read_responses(settings)
    else:
        check(settings)
        responses = os.path.splitext(file)[0] + ".jsonl"
        check_outputs({"--json": file, "responses of --json:": responses}, inputs)
        records = ask_model(settings, responses)
    if not records:
        raise UserError("nothing to score: no response, or no question of this path")
    results = []
    for record in records:
        value = score(settings.name, record["response"], record)
        results.append({**record, "score": value})
    paths = ("auto",) if settings.path == "auto" else ("lor", "dtr")
    table = make_table(settings.name, results, mean_interval, paths)
    try:
        if settings.json or not settings.score:
            write_json(file, {"bench": settings.name, "table": table, "responses": results})
    finally:  # shown also where it can't be written
        show_table(settings.name, table)


def check_flags(settings, asked):
    """UserError for flags that do not go together; asked: see engine.settings.parse."""
    if settings.score and settings.path in ("lor", "dtr"):
        raise UserError(f"--path {settings.path}: has no effect with --score, whose lines name it")


def check(settings):
    """UserError for settings with which no model can be asked."""
    if settings.name == "vsi":
        raise UserError("vsi: questions about videos are only scored, with --score FILE.jsonl")
    if not settings.data:
        patterns, _ = BENCHMARKS[settings.name]
        raise UserError(
            f"{settings.name}: needs --data, its files or the folder with {' or '.join(patterns)}"
        )


def show_table(benchmark, table):
    for line in table:
        name = line["name"] if line["name"].isprintable() else ascii(line["name"])
        distributed.say(
            f"{line['path']:<4} {line['kind']:<8}{name[:31]:<32}{line['n']:>6} "
            f"{line['score']:6.3f} ±{line['ci']:.3f}"
        )
    in_words, _ = overall_rule(benchmark)
    distributed.say(f"± is half a 95 % interval; overall is {in_words}")


def write_json(file, content):
    if distributed.rank() == 0:
        with whole_file(file, "--json") as handle:
            json.dump(content, handle)


def main():
    run_benchmark(parse(Settings, __doc__, check=check_flags))


if __name__ == "__main__":
    run_main(main)
