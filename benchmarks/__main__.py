"""Published benchmarks: their files -> instances of both paths -> responses -> a table per type, level, and overall.

    python -m benchmarks blink --model out/grpo --data BLINK                  # a folder, or the files themselves
    torchrun --nproc_per_node 8 -m benchmarks spar --model out/grpo --data SPAR-Bench --path lor
    python -m benchmarks spar --data SPAR-Bench --score responses.jsonl     # only score {"id": .., "response": ..}

Greedy decoding. Questions with boxes are asked on the DTR path too, with a region token for each box. Responses are
appended to out/bench_NAME.jsonl (with --json FILE.json to FILE.jsonl) batch by batch, a later run asks only what is
missing there. SAT's choices are shuffled by row number: nothing depends on the number of processes or the batch size.
"""

import base64
import binascii
import glob
import json
import os
import random
import re
import zlib
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

import data
import eval
from benchmarks.scoring import ASK, OVERALL, level_of, make_table, rule_of, score
from benchmarks.tables import parquet_rows, tfrecord_rows
from engine import distributed
from engine.checkpoint import load_model
from engine.settings import parse, run_main, setting
from engine.shared_prefix import rollout
from formats import instances
from formats.errors import BadRow, UserError
from formats.files import Rows
from formats.instances import boxes_of, mark_fields
from model import decode, token_rules
from rewards import read_choice

NAMES = (
    "spar",
    "embspatial",
    "sat",
    "blink",
    "cvbench",
    "vsi",
    "realworldqa",
    "erqa",
    "spatialrgpt",
)


@dataclass
class Settings:
    name: str = setting("", f"benchmark: {', '.join(NAMES)}", NAMES, positional=True)
    model: str = setting("out/grpo", "folder of this project or a stock Qwen3-VL")
    data: list = setting([], "files of the benchmark, or the folder that holds them")
    score: str = setting("", "only score this JSON-lines file of {id, response}; nothing is run")
    json: str = setting(
        "", "file for the table and every response; empty: out/bench_NAME.json, none with --score"
    )
    skip_bad_rows: bool = setting(False, "count and list bad rows instead of stopping at the first")
    path: str = setting(
        "both",
        "lor, dtr, both, or auto: dtr for regions and geometry, lor otherwise",
        ("lor", "dtr", "both", "auto"),
    )
    max_new_tokens: int = setting(160, "longest response (paper: 2048)")
    batch: int = setting(240, "prompts at once on a rank")
    seed: int = setting(0, "seed of the processes; decoding is greedy")
    attention: str = setting(
        "auto",
        "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed",
        ("auto", "sdpa", "flash"),
    )


SEED = 0  # of SAT's shuffled choices


def get(row, field, kind=str):
    """A field that must be there; numbers count as text."""
    value = row.get(field)
    value = str(value) if kind is str and isinstance(value, (int, float)) else value
    if not isinstance(value, kind) or kind in (str, list) and not value:
        name = {str: "text", list: "a list", dict: "an object", int: "a whole number"}[kind]
        raise BadRow(f"{row['source']}: field '{field}': needs {name}, not {str(value)[:60]!r}")
    return value


def spar(row):
    """-RGBD has depth (metres) and intrinsics. Marks ("red_bbox", see instances.py) are regions where there are any."""
    question = get(row, "question")
    kept = {
        field: row[field]
        for field in [*mark_fields(row), "bbox_img_idx", "point_img_idx"]
        if row.get(field)
    }
    named = any(field.replace("_", " ") in question for field in kept)
    return {
        **kept,
        "id": row.get("id"),
        "type": get(row, "task"),
        "question": question,
        "answer": get(row, "answer"),
        "image": row.get("image"),
        "depth": row.get("depth"),
        "intrinsics": row.get("intrinsic_depth"),
        "dtr": {"3d_pos": {}} if named else None,
    }


def embspatial(row):
    objects, question, encoded = row.get("objects") or [], get(row, "question"), get(row, "image")
    try:
        image = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise BadRow(f"{row['source']}: field 'image': needs a base64 picture") from None
    try:
        marks = {
            color: [x, y, x + w, y + h]
            for color, (x, y, w, h) in zip(instances.MARK_COLORS, (one["bbox"] for one in objects))
        }
        names = ", ".join(
            f"{one['name']} ({color} bbox <mask>)" for color, one in zip(marks, objects)
        )
    except (TypeError, KeyError, ValueError):
        raise BadRow(
            f"{row['source']}: field 'objects': needs a list of {{'name', 'bbox': [x, y, w, h]}}"
        ) from None
    choices, index = get(row, "answer_options", list), get(row, "answer", int)
    if not 0 <= index < len(choices):
        raise BadRow(f"{row['source']}: field 'answer': {index} must be 0 to {len(choices) - 1}")
    return {
        "id": row.get("question_id"),
        "type": get(row, "relation"),
        "question": question,
        "image": image,
        "answer": chr(65 + index),
        "choices": choices,
        "dtr": {"question": f"{question}\nObjects: {names}.", "draw": marks, "3d_pos": {}}
        if marks
        else None,
    }


def sat(row):
    choices, answer = get(row, "answers", list), get(row, "correct_answer")
    shuffled = random.Random(f"{SEED} {row['index']}").sample(choices, len(choices))
    if shuffled.count(answer) != 1:
        raise BadRow(
            f"{row['source']}: field 'correct_answer': {answer!r} must be one of the answers {choices}"
        )
    return {
        "type": get(row, "question_type"),
        "question": get(row, "question"),
        "choices": shuffled,
        "answer": chr(65 + shuffled.index(answer)),
        "image": row.get("image_bytes"),
    }


def blink(row):
    return {
        "id": row.get("idx"),
        "type": get(row, "sub_task"),
        "prompt": get(row, "prompt"),
        "answer": get(row, "answer"),
        "choices": row.get("choices"),
        "image": [row.get(f"image_{i}") for i in range(1, 5)],
    }


def cvbench(row):
    if row["group"] not in (
        "ADE20K",
        "COCO",
        "Omni3D",
    ):  # its column "source", which the overall score goes by
        raise BadRow(
            f"{row['source']}: field 'source': needs ADE20K, COCO or Omni3D, not {row['group']!r}"
        )
    return {
        "id": row.get("idx"),
        "type": get(row, "task"),
        "prompt": get(row, "prompt"),
        "answer": get(row, "answer"),
        "choices": row.get("choices"),
        "group": row["group"],
        "image": row.get("image"),
    }


def realworldqa(row):
    return {
        "type": "question",
        "prompt": get(row, "question"),
        "answer": get(row, "answer"),
        "image": row.get("image"),
    }


def erqa(row):
    """visual_indices: before which character of the question each picture belongs."""
    row = {
        **row,
        **{
            field: b"".join(row.get(field) or []).decode(errors="replace")
            for field in ("question", "answer", "question_type")
        },
    }
    question, pictures, places = (
        get(row, "question"),
        row.get("image/encoded") or [],
        row.get("visual_indices") or [],
    )
    if len(places) == len(pictures):
        pictures = [pictures[i] for i in np.argsort(places, kind="stable")]
        for place in sorted(places, reverse=True):
            question = f"{question[:place]}<image>{question[place:]}"
    return {
        "type": get(row, "question_type"),
        "prompt": question,
        "answer": get(row, "answer"),
        "image": pictures,
    }


def spatialrgpt(row):
    """Region [i] is the i-th box (of "rle" where "bbox" is missing). The first four are drawn, for both paths."""
    boxes = row.get("bbox") or [rle_box(row, rle) for rle in row.get("rle") or []]
    draw = dict(zip(instances.MARK_COLORS, boxes_of(row, "bbox", boxes)))
    lor = dtr = get(row, "text_q")
    named = {int(i) for i in re.findall(r"Region \[(\d)\]", lor)}
    if boxes and named and len(boxes) <= max(named):
        raise BadRow(
            f"{row['source']}: field 'bbox': {len(boxes)} boxes, and a question about Region [{max(named)}]"
        )
    for i, color in enumerate(draw):
        lor = lor.replace(f"Region [{i}]", f"Region [{i}] ({color} bbox)", 1)
        dtr = dtr.replace(f"Region [{i}]", f"Region [{i}] ({color} bbox <mask>)", 1)
    return {
        "id": row.get("id"),
        "type": get({**row, **get(row, "qa_info", dict)}, "category"),
        "question": lor,
        "answer": instances.turns(row)[1].strip(),
        "draw": draw,
        "image": row.get("image") or (row.get("image_info") or {}).get("file_path"),
        "dtr": {"question": dtr, "3d_pos": {}} if boxes and named else None,
    }


def rle_box(row, rle):
    """Bounding box of a COCO run-length mask: columns first; "counts" a list, or text of 5-bit groups, a delta to the
    run before last from the fourth on."""
    try:
        height, width = rle["size"]
        counts = rle["counts"]
        if isinstance(counts, str):
            runs, value, shift = [], 0, 0
            for group in (ord(char) - 48 for char in counts):
                value, shift = value | (group & 31) << shift, shift + 5
                if not group & 32:
                    value -= (1 << shift) if group & 16 else 0
                    runs, value, shift = [*runs, value + (runs[-2] if len(runs) > 2 else 0)], 0, 0
            counts = runs
        ys, xs = np.nonzero(np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T)
        return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    except (TypeError, KeyError, ValueError):
        raise BadRow(
            f"{row['source']}: field 'rle': needs COCO masks {{'size', 'counts'}}, none empty"
        ) from None


def vsi(row):
    options = [str(option).split(". ", 1)[-1] for option in row.get("options") or []]
    return {
        "id": row.get("id"),
        "type": get(row, "question_type"),
        "question": get(row, "question"),
        "answer": get(row, "ground_truth"),
        "choices": options,
        "image": [],
    }


BENCHMARKS = {  # what a folder is searched for; how a row is read
    "spar": ("*.parquet", spar),
    "embspatial": ("embspatial*.json", embspatial),
    "sat": ("*test*.parquet", sat),
    "blink": ("val-*.parquet", blink),
    "cvbench": ("test*.parquet", cvbench),
    "vsi": ("test-*.parquet", vsi),
    "realworldqa": ("*.parquet", realworldqa),
    "erqa": ("*.tfrecord", erqa),
    "spatialrgpt": ("*.jsonl", spatialrgpt),
}


def json_rows(path):
    rows = Rows(path)
    return [rows.read(i) for i in range(len(rows))]


def raw_rows(bench, paths):
    """The rows of files and folders, in the order of their names."""
    rows = []
    for path in paths:
        files = [path]
        if os.path.isdir(path):
            files = sorted(
                glob.glob(
                    os.path.join(glob.escape(path), "**", BENCHMARKS[bench][0]), recursive=True
                )
            )
        if not files or not os.path.exists(files[0]):
            raise BadRow(
                f"--data {path}: no such file, or no {BENCHMARKS[bench][0]} in that folder"
            )
        for file in files:
            read = {".parquet": parquet_rows, ".tfrecord": tfrecord_rows}.get(
                os.path.splitext(file)[1], json_rows
            )
            folder = os.path.dirname(os.path.abspath(file))
            rows += [
                {**row, "source": f"{file}: row {i}", "folder": folder, "group": row.get("source")}
                for i, row in enumerate(read(file))
            ]
    return rows


def graded(bench, row):
    """The row with its "level"; its answer must earn the full score by the benchmark's own rule."""
    try:
        rule, level = rule_of(bench, row["type"], row["answer"]), level_of(bench, row["type"])
    except KeyError:
        raise BadRow(
            f"{row['source']}: {row['type']!r} is no type of question of {bench}"
        ) from None
    letter = read_choice(row["answer"]) if row.get("choices") else None
    if score(bench, row["answer"], row) != 1 or letter and ord(letter) - 65 >= len(row["choices"]):
        raise BadRow(
            f"{row['source']}: field 'answer': {row['answer']!r} is no answer of the kind '{rule}' (a split "
            "whose answers are hidden cannot be scored)"
        )
    return {**row, "level": level}


def instances_of(bench, row):
    """One row -> its instance on the LOR path and, where it has regions, on the DTR path."""
    given = {"choices": None, "group": None, **BENCHMARKS[bench][1](row)}
    given = graded(bench, {**given, **{key: row[key] for key in ("index", "source", "folder")}})
    different, both = given.pop("dtr", None), []
    for one in [given, {**given, **different}] if different else [given]:
        listed = [f"({chr(65 + i)}) {words}" for i, words in enumerate(one["choices"] or [])]
        text = one["prompt"] if "prompt" in one else "\n".join([one["question"], *listed])
        text = f"{text}\n{ASK[rule_of(bench, one['type'], one['answer'])]}".strip()
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": one["answer"]}]
        both.append({**one, "conversations": turns})
    return both


def read(bench, paths, skip_bad_rows=False):
    """Files and folders -> instances of both paths, in the order of the rows; "id" is the benchmark's, or the row's
    number over all files where it has none or they repeat. Pictures are read when they are needed: see load."""
    rows, bad = [], []
    for index, row in enumerate(raw_rows(bench, paths)):
        try:
            rows.append(instances_of(bench, {**row, "index": index}))
        except BadRow as error:
            if not skip_bad_rows:
                raise BadRow(f"{error} (--skip_bad_rows leaves such rows out)") from None
            bad.append(f"skipped: {error}")
    if bad:
        distributed.say(
            "\n".join([*bad[:20], f"{len(bad)} of {len(rows) + len(bad)} rows skipped"])
        )
    if not rows:
        raise BadRow(f"--data {' '.join(paths)}: no usable row")
    ids = [str(both[0].get("id")) for both in rows]
    unique = len(set(ids)) == len(ids)
    return [
        {**row, "id": name if unique else str(row["index"])}
        for name, both in zip(ids, rows)
        for row in both
    ]


def load(row):
    """The instance as data.py takes it: cells of parquet files read, boxes to draw turned into marks (thousandths)."""
    read_now = lambda value: value() if isinstance(value, partial) else value
    row = {key: read_now(value) for key, value in row.items()}
    images = [
        read_now(value)
        for value in (row["image"] if isinstance(row["image"], list) else [row["image"]])
    ]
    images = [
        value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        for value in images
    ]
    images = [value for value in images if value is not None]
    if not images:
        raise BadRow(
            f"{row['source']}: field 'image': no picture; without pictures there is only --score"
        )
    row["image"] = images[0] if len(images) == 1 else images
    sizes = [instances.open_image(row, i).size for i in range(len(images))]
    for color, box in row.pop("draw", {}).items():
        row[f"{color}_bbox"] = [
            [min(max(v / side, 0), 1) * 1000 for v, side in zip(box, sizes[0] * 2)]
        ]
    return with_depth(row, sizes)


def with_depth(row, sizes):
    """Depth maps (metres, 0 = none) and their 4x4 intrinsics, both brought to the size of the pictures."""
    maps, cameras = [], []
    try:
        for depth, camera, (w, h) in zip(
            row.pop("depth", None) or [], row.pop("intrinsics", None) or [], sizes
        ):
            depth, camera = np.asarray(depth, np.float32), np.reshape(camera, (4, 4))
            x, y = w / depth.shape[1], h / depth.shape[0]
            depth = depth[((np.arange(h) + 0.5) / y).astype(int)][
                :, ((np.arange(w) + 0.5) / x).astype(int)
            ]
            maps.append(np.where(depth > 0, depth, np.nan).astype(np.float32))
            cameras.append(
                [
                    float(v)
                    for v in (
                        camera[0, 0] * x,
                        camera[1, 1] * y,
                        camera[0, 2] * x,
                        camera[1, 2] * y,
                    )
                ]
            )
    except (TypeError, ValueError, IndexError) as error:
        raise BadRow(
            f"{row['source']}: field 'depth': needs maps in metres, and 4x4 intrinsics ({error})"
        ) from None
    one = len(sizes) == 1
    found = (
        {"depth": maps[0] if one else maps, "intrinsics": cameras[0] if one else cameras}
        if maps
        else {}
    )
    return {**row, **found}


def record(row, response, path=None):
    kept = {key: row[key] for key in ("index", "id", "type", "level", "group", "choices", "answer")}
    question = instances.question_of(row) if "conversations" in row else row["question"]
    return {
        **kept,
        "path": path or instances.path_of(row),
        "question": question,
        "response": response,
    }


def resume(file, about, rows):
    """What earlier runs left in the file: {(id, path): record}. The half line of a killed run does not count."""
    if not os.path.exists(file):
        return {}
    with open(file, encoding="utf-8", errors="replace") as handle:
        lines = handle.read().split("\n")[:-1]
    if not lines:
        return {}
    try:
        first, *records = map(json.loads, lines)
        done = {(r["id"], r["path"]): r for r in records}
        changed = [key for key in about if first["run"].get(key) != about[key]]
        changed += [
            f"question {row['id']}"
            for row in rows
            if (row["id"], instances.path_of(row)) in done
            and done[row["id"], instances.path_of(row)]["question"] != instances.question_of(row)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        changed = ["it cannot be read"]
    if changed:
        raise UserError(
            f"{file}: holds the responses of another run (differs: {changed[0]}); remove it, or name "
            "another --json"
        )
    return done


def fingerprint(model):
    """Checksum of the small weights (norms, biases): another training, another number."""
    crc = 0
    for weight in model.parameters():
        if weight.ndim == 1:
            crc = zlib.crc32(weight.detach().cpu().numpy().tobytes(), crc)
    return crc


def answer(model, tokenizer, processor, rows, device, settings, file, about):
    """Greedy responses to the rows as records, in their order, on every rank; appended to the file as they are made."""
    done = resume(file, about, rows)
    distributed.gather([])  # all ranks have read it before one writes
    if distributed.rank() == 0:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        with open(file, "ab+") as handle:  # whole lines only, the first says what this is
            handle.seek(0)
            handle.truncate(handle.read().rfind(b"\n") + 1)
            handle.write(b"" if handle.seek(0, 2) else json.dumps({"run": about}).encode() + b"\n")
    todo = [row for row in rows if (row["id"], instances.path_of(row)) not in done]
    distributed.say(
        f"{settings.name}: {len(rows)} questions, {len(rows) - len(todo)} of them answered before in {file}"
    )
    mine, longest = (
        todo[distributed.rank() :: distributed.world_size()],
        -(-len(todo) // distributed.world_size()),
    )
    stop, banned = token_rules(model, tokenizer, device)
    with distributed.gathered(model):
        bar = tqdm(
            range(0, longest, settings.batch),
            desc=settings.name,
            disable=distributed.rank() > 0,
            mininterval=2,
        )
        for start in bar:
            part, new = mine[start : start + settings.batch], []
            if part:
                samples = [
                    data.encode(load(row), tokenizer, processor, train=False) for row in part
                ]
                prompts = data.to(data.collate(samples, tokenizer), device)
                tokens, mask, *_ = rollout(
                    model, prompts, 1, settings.max_new_tokens, stop, banned, 0.0
                )
                new = map(record, part, decode(tokenizer, tokens, mask, set(stop.tolist()))[0])
            new = distributed.gather(list(new))  # the ranks go in step: one of them writes for all
            if distributed.rank() == 0:
                with open(file, "a") as handle:
                    handle.write("".join(json.dumps(one) + "\n" for one in new))
            done.update({(one["id"], one["path"]): one for one in new})
    return [record(row, done[row["id"], instances.path_of(row)]["response"]) for row in rows]


def read_responses(settings):
    """--score: responses made elsewhere, or here, as records. With --data every question of a path counts, one without
    a response as wrong; without, each line holds its own "answer" and "type"."""
    rows = read(settings.name, settings.data, settings.skip_bad_rows) if settings.data else []
    known, found = {(row["id"], instances.path_of(row)): row for row in rows}, {}
    for number, line in enumerate(line for line in json_rows(settings.score) if "run" not in line):
        key = (
            str(line.get("id", line.get("idx", number))),
            "dtr" if line.get("path") == "dtr" else "lor",
        )
        if not isinstance(line.get("response"), str):
            raise BadRow(
                f"{line['source']}: field 'response': needs text, not {str(line.get('response'))[:60]!r}"
            )
        if key in found or rows and key not in known:
            raise BadRow(
                f"{line['source']}: field 'id': {key[0]!r} on the path {key[1]!r} is "
                f"{'there twice' if key in found else 'not in --data'}"
            )
        if rows:
            found[key] = record(reordered(known[key], line), line["response"], key[1])
        else:
            alone = {
                "type": "question",
                "index": number,
                "question": "",
                "choices": None,
                "group": None,
                **line,
            }
            alone = {**alone, "id": key[0], "answer": get(line, "answer")}
            alone["group"] = get(line, "group") if settings.name == "cvbench" else None
            found[key] = record(graded(settings.name, alone), line["response"], key[1])
    asked = {path for _, path in found}
    missing = [
        row
        for row in rows
        if instances.path_of(row) in asked and (row["id"], instances.path_of(row)) not in found
    ]
    if missing:
        distributed.say(
            f"{len(missing)} of {len(missing) + len(found)} questions have no response: they count as wrong"
        )
    records = [*found.values(), *(record(row, "", instances.path_of(row)) for row in missing)]
    return sorted(records, key=lambda r: (r["index"], r["path"] != "lor"))


def reordered(row, line):
    """The row with its choices in the order in which the line says that they were shown."""
    shown, choices = line.get("choices"), row["choices"]
    if not shown or not choices or shown == choices:
        return row
    if not isinstance(shown, list) or sorted(map(str, shown)) != sorted(map(str, choices)):
        raise BadRow(
            f"{line['source']}: field 'choices': needs the choices of --data in any order, {choices}"
        )
    return {
        **row,
        "choices": shown,
        "answer": chr(65 + shown.index(choices[ord(row["answer"].strip("()")) - 65])),
    }


def main():
    settings = parse(Settings, __doc__)
    bench = settings.name
    path = settings.json or f"out/bench_{bench}.json"
    if settings.score:
        results = read_responses(settings)
    elif bench == "vsi":
        raise UserError("vsi: questions about videos are only scored, with --score FILE.jsonl")
    elif not settings.data:
        raise UserError(
            f"{bench}: needs --data, its files or the folder with {BENCHMARKS[bench][0]}"
        )
    else:
        results = run_benchmark(settings, path)
    if not results:
        raise UserError("nothing to score: no response, or no question of this path")
    results = [{**r, "score": score(bench, r["response"], r)} for r in results]
    paths = ("auto",) if settings.path == "auto" else ("lor", "dtr")
    table = make_table(bench, results, eval.mean_interval, paths)
    for line in table:
        distributed.say("{path:<4} {kind:<8}{name:<32}{n:>6} {score:6.3f} ±{ci:.3f}".format(**line))
    overall = OVERALL.get(bench, ["the mean over all questions"])[0]
    distributed.say(f"± is half a 95 % interval; overall is {overall}")
    if distributed.rank() == 0 and (settings.json or not settings.score):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.partial", "w") as file:
            json.dump({"bench": bench, "table": table, "responses": results}, file)
        os.replace(f"{path}.partial", path)


def run_benchmark(settings, path):
    """Ask the model -> records of all questions, on every rank."""
    device = distributed.setup(settings.seed)
    rows = read(settings.name, settings.data, settings.skip_bad_rows)
    best = {}
    for row in rows:  # the DTR row of a question comes after its LOR row
        best[row["id"]] = instances.best_path(row) if instances.path_of(row) == "dtr" else "lor"
    wanted = []
    for row in rows:
        path_of_row = instances.path_of(row)
        if settings.path in ("both", path_of_row) or settings.path == "auto" and best[row["id"]] == path_of_row:
            wanted.append(row)
    model, tokenizer, processor = load_model(settings.model)
    distributed.use_attention(model, settings.attention)
    about = {
        "bench": settings.name,
        "weights": fingerprint(model),
        "max_new_tokens": settings.max_new_tokens,
    }
    model = distributed.shard(model, device)
    file = os.path.splitext(path)[0] + ".jsonl"
    return answer(model, tokenizer, processor, wanted, device, settings, file, about)


if __name__ == "__main__":
    run_main(main)
