"""Evaluation: greedy answers on both reasoning paths, scored by the rewards, with 95 % intervals.

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D coordinates first).

    python eval.py --model out/grpo                        # held-out scenes of the embedded world
    python eval.py --ask photo.jpg "How far is the red bbox from the blue bbox in meters?" \\
        --box 120,80,300,260 --box 400,90,520,200          # one picture of your own; boxes in pixels
    python eval.py --ask 7 --show out/ask                  # one of the embedded world, by a seed
    torchrun --nproc_per_node 8 eval.py --model out/grpo --scenes scenes.jsonl --json out.json
    python eval.py --compare out/grpo/eval_cold_start.json out/grpo/eval.json --report out/r.html

Every question is asked on both paths. The table has, per path and task, the means of accuracy,
format, detection and total reward, and the centre error: the median over the asked-for objects, in
metres, where an object without a box of its own counts as infinitely far. Published benchmarks are
a command of their own, `python -m benchmarks`.
"""

import glob
import json
import math
import os
import re
import reprlib
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import rewards
from data import METRICS
from engine import distributed, report
from engine.checkpoint import load_model
from engine.output import check_outputs, try_folder, whole_file
from engine.settings import parse, run_main, setting
from engine.shared_prefix import rollout
from formats.errors import UserError
from formats.instances import (
    MARK_COLORS,
    answer_of,
    best_path,
    check_region,
    draw_marks,
    on_paths,
    open_image,
    path_of,
    question_of,
    reference_frame,
)
from formats.values import are_numbers, is_number
from model import decode, token_rules
from world.questions import GENERAL_FAMILIES, REGION_FAMILIES, ask_questions
from world.sources import HELD_OUT, MOST_QUESTIONS, cached_scene, held_out
from world.tiny import image_side
from world.transfer import VARIANTS

PATHS = ("lor", "dtr")
BENCHMARKS_COMMAND = "python -m benchmarks NAME --model M --data PATH"
MOVED = {"--bench": BENCHMARKS_COMMAND, "--score": f"{BENCHMARKS_COMMAND} --score FILE"}
POOLS = ("region", "general", "all")  # lines of a table that pool several tasks
MOST_LINES = 200  # of text below a picture of --show
# Files of a --model folder that are read: the model's own, and the log that a report draws.
MODEL_FILES = ("*config.json", "*.safetensors*", "*token*", "chat_template*", "vocab.json")
MODEL_FILES += ("merges.txt", "metrics.jsonl")


@dataclass
class Settings:
    # who is asked what
    model: str = setting(
        "out/grpo", "folder of this project or a stock Qwen3-VL", not_with=("compare",)
    )
    data: list = setting([], "instance files to answer instead of the embedded world")
    scenes: str = setting("", "scenes.jsonl: ask every question that these pictures allow")
    ask: list = setting(
        [],
        "PICTURE QUESTION: ask about one picture; or SEED [WORDS]: about one of the embedded world, "
        "a question with these words",
        not_with=("data", "scenes", "compare"),
    )
    box: list = setting(
        [],
        "of --ask: x1,y1,x2,y2 in pixels, once per box; the first is red, then blue, green, yellow",
        only_with=("ask",),
    )
    depth: str = setting(
        "", "of --ask: depth of the picture, a 16-bit PNG in millimetres", only_with=("ask",)
    )
    intrinsics: str = setting(
        "",
        "of --ask: fx,fy,cx,cy in pixels; without it a field of view of 60 degrees",
        only_with=("ask",),
    )
    skip_bad_rows: bool = setting(
        False, "count and list bad rows instead of stopping at the first", only_with=("data",)
    )
    questions: int = setting(
        1320,
        "embedded world: held-out questions; each is asked on both paths",
        at_least=1,
        at_most=MOST_QUESTIONS,
        not_with=("data", "scenes", "ask", "compare"),
    )
    world: str = setting(
        "",
        "another embedded world than the trained one: view, tilt, crowd, shades, wording "
        "(world/transfer.py)",
        ("", *VARIANTS),
        not_with=("data", "scenes", "ask", "compare"),
    )
    path: str = setting(
        "both",
        "lor, dtr, both, or auto: dtr for regions and geometry, lor otherwise",
        ("lor", "dtr", "both", "auto"),
        not_with=("compare",),
    )
    # how
    temperature: float = setting(
        0.0,
        "0 is greedy (paper: 0.5 in validation)",
        at_least=0.01,
        at_most=100,
        also=0,
        not_with=("compare",),
    )
    max_new_tokens: int = setting(
        160,
        "longest response, tokens (paper: 2048)",
        at_least=1,
        at_most=100_000,
        not_with=("compare",),
    )
    batch: int = setting(240, "prompts at once on a rank", at_least=1, not_with=("compare",))
    seed: int = setting(
        0,
        "seed of the sampling at temperatures above 0",
        at_least=0,
        below=distributed.MOST_SEEDS,
        not_with=("compare",),
    )
    attention: str = setting(
        "auto",
        "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed",
        ("auto", "sdpa", "flash"),
        not_with=("compare",),
    )
    # what comes out
    json: str = setting(
        "", "file for the table and every response with its reward parts", not_with=("compare",)
    )
    show: str = setting(
        "", "folder for a picture per question: regions, centres, response", not_with=("compare",)
    )
    compare: list = setting(
        [], "JSON files of earlier evaluations: only print them side by side, and what changed"
    )
    report: str = setting("", "HTML file for tables, charts and examples; also of --compare")
    runs: list = setting(
        [],
        "report: folders whose metrics.jsonl it draws; empty: the model's, or the compared files'",
        only_with=("report",),
    )


# ----------------------------------------------------------------------------------------------
# answers


def answer(model, tokenizer, processor, rows, device, settings, title="evaluation"):
    """Responses of a sharded model to the rows, scored -> results, on every rank, in order.

    A result is a dict: RESPONSE_FIELDS, the reward parts, "center_errors_m" (data.score), and
    "auto", the path that the rule of `best_path` would choose.
    """
    stop_ids, banned = token_rules(model, tokenizer, device)
    generator = torch_generator(device, settings.seed)
    mine = range(distributed.rank(), len(rows), distributed.world_size())
    # Neighbours of similar length waste less padding.
    mine = sorted(mine, key=lambda i: (path_of(rows[i]), len(question_of(rows[i]))))
    results = []
    with distributed.gathered(model):
        bar = tqdm(
            range(0, len(mine), settings.batch),
            desc=title,
            disable=distributed.rank() > 0,
            mininterval=2,
        )
        for start in bar:
            batch = mine[start : start + settings.batch]
            samples = [data.encode(rows[i], tokenizer, processor, train=False) for i in batch]
            prompts = data.to(data.collate(samples, tokenizer), device)
            tokens, mask, _, _ = rollout(
                model,
                prompts,
                1,
                settings.max_new_tokens,
                stop_ids,
                banned,
                settings.temperature,
                generator,
            )
            texts, _ = decode(tokenizer, tokens, mask, set(stop_ids.tolist()))
            results += [result_of(i, rows[i], text) for i, text in zip(batch, texts)]
    return sorted(distributed.gather(results), key=lambda result: result["index"])


def torch_generator(device, seed):
    generator = torch.Generator(device)
    return generator.manual_seed(seed * 1000 + distributed.rank())


def result_of(index, row, response):
    return {
        "index": index,
        "id": str(row.get("id", index)),
        "path": path_of(row),
        "task": task_of(row),
        "question": question_of(row),
        "auto": best_path(row),
        "answer": answer_of(row),
        "response": response,
        **data.score(row, response),
    }


def task_of(row):
    """The task of a row as a name on one line, other than those of the pooled lines."""
    task = row.get("task")
    name = "" if task is None else " ".join(str(task).split())
    return f"{name} (task)" if name in POOLS else name or "question"


# ----------------------------------------------------------------------------------------------
# means and their intervals


def mean_interval(values):
    """Mean, and the half width of its 95 % interval (normal approximation)."""
    values = np.asarray(values, float)
    half = 0.0
    if len(values) > 1:
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def median_interval(values):
    """Median, and the ends of its distribution-free 95 % interval (order statistics)."""
    values = np.sort(np.asarray(values, float))
    n = len(values)
    half = 0.98 * n**0.5
    low = values[max(0, int(n / 2 - half))]
    high = values[min(n - 1, int(np.ceil(n / 2 + half)))]
    return float(np.median(values)), float(low), float(high)


def finite_errors(result):
    """The centre errors of a result; infinite where there is no prediction."""
    return [np.inf if error is None else error for error in result["center_errors_m"]]


def pools(results):
    """Tasks that are also reported together: {name: tasks}."""
    tasks = {result["task"] for result in results}
    of_pools = (tasks & set(REGION_FAMILIES), tasks & set(GENERAL_FAMILIES), tasks)
    return {name: of_pool for name, of_pool in zip(POOLS, of_pools) if of_pool}


def make_table(results):
    """Results -> a line, a dict, per path and task; "region", "general" and "all" pool tasks."""
    table = []
    for path in PATHS:
        of_path = [result for result in results if result["path"] == path]
        pooled = pools(of_path)
        tasks = dict.fromkeys(result["task"] for result in of_path)
        for task in [*tasks, *pooled]:
            wanted = pooled.get(task, {task})
            part = [result for result in of_path if result["task"] in wanted]
            table.append(table_line(path, task, part))
    return table


def table_line(path, task, results):
    line = {"path": path, "task": task, "n": len(results)}
    for key in METRICS:
        values = [result[key] for result in results if result[key] is not None]
        line[key], line[f"{key}_ci"] = mean_interval(values) if values else (None, None)
    errors = [error for result in results for error in finite_errors(result)]
    median, low, high = median_interval(errors) if errors else (None, None, None)
    line["center_error_m"] = not_infinite(median)
    line["center_error_m_ci"] = [not_infinite(low), not_infinite(high)]
    return line


def not_infinite(value):
    """Infinity is not JSON."""
    return None if value == np.inf else value


# ----------------------------------------------------------------------------------------------
# what changed between two evaluations of the same questions


def paired(before, after, key, tasks):
    """Mean of after - before over the same questions, and half of its 95 % interval; None
    without."""
    differences = []
    for b, a in zip(before, after):
        if b["task"] in tasks and b[key] is not None and a[key] is not None:
            differences.append(a[key] - b[key])
    return mean_interval(differences) if differences else None


@np.errstate(invalid="ignore")  # inf - inf, where most centres are missing
def paired_error(before, after, draws=1000):
    """Change of the median centre error, metres, and its 95 % interval; None without centres.

    The interval is bootstrapped over questions.
    """
    pairs = []
    for b, a in zip(before, after):
        if b["center_errors_m"]:
            pairs.append((finite_errors(b), finite_errors(a)))

    def medians(picked):
        of_before = [error for errors, _ in picked for error in errors]
        of_after = [error for _, errors in picked for error in errors]
        return np.array([np.median(of_before), np.median(of_after)])

    if not pairs or not np.isfinite(medians(pairs)).all():
        return None
    random = np.random.default_rng(0)
    resamples = random.integers(len(pairs), size=(draws, len(pairs)))
    changes = [np.diff(medians([pairs[i] for i in picked]))[0] for picked in resamples]
    low, high = np.percentile(changes, [2.5, 97.5])
    return float(np.diff(medians(pairs))[0]), float(low), float(high)


def show_changes(title, before, after):
    """Print what changed, path by path, with paired intervals."""
    distributed.say(f"{title}: change over the same questions")
    for path in PATHS:
        of_before = [result for result in before if result["path"] == path]
        of_after = [result for result in after if result["path"] == path]
        same = [b["id"] for b in of_before] == [a["id"] for a in of_after]
        if not of_before or not same:
            continue
        for name, tasks in pools(of_before).items():
            text = ""
            for key in METRICS:
                change = paired(of_before, of_after, key, tasks)
                if change:
                    text += f"  {key} {change[0]:+.3f} ±{change[1]:.3f}"
            distributed.say(f"  {path} {name:<8}{text}")
        error = paired_error(of_before, of_after)
        if error:
            change, low, high = error
            distributed.say(
                f"  {path} median centre error {change:+.3f} m, "
                f"95 % interval [{low:+.3f}, {high:+.3f}]"
            )


# ----------------------------------------------------------------------------------------------
# which path?


def same_answer(one, other):
    """Do two responses give the same answer? A letter, a number (to a tenth of itself) or a
    text."""
    said = [rewards.extract_answer(text) or text for text in (one, other)]
    letters = [rewards.read_choice(text) for text in said]
    if None not in letters:
        return letters[0] == letters[1]
    numbers = [rewards.read_number(text) for text in said]
    if None not in numbers:
        return numbers[0] == numbers[1] or math.isclose(*numbers, rel_tol=0.1)
    return rewards.plain(said[0]) == rewards.plain(said[1])


def path_choice(lor, dtr):
    """Results of the same questions on the two paths -> {name: (mean, half of its interval)}:

    accuracy of LOR, of DTR, of the automatic choice between them, of the best choice (an oracle);
    and the share of the questions to which both paths answer the same.
    """
    columns = {"lor": [], "dtr": [], "auto": [], "oracle": [], "agreement": []}
    for in_words, by_detection in zip(lor, dtr):
        chosen = by_detection if in_words["auto"] == "dtr" else in_words
        both = (in_words["accuracy"], by_detection["accuracy"])
        agree = same_answer(in_words["response"], by_detection["response"])
        columns["lor"].append(both[0])
        columns["dtr"].append(both[1])
        columns["auto"].append(chosen["accuracy"])
        columns["oracle"].append(max(both))
        columns["agreement"].append(float(agree))
    return {name: mean_interval(values) for name, values in columns.items()}


def show_paths(title, results):
    """Print the accuracy of DTR minus that of LOR over the same questions, and what a choice is
    worth."""
    lor = [result for result in results if result["path"] == "lor"]
    dtr = [result for result in results if result["path"] == "dtr"]
    if not lor or [result["answer"] for result in lor] != [result["answer"] for result in dtr]:
        return
    text = ""
    for name, tasks in pools(lor).items():
        if name != "all":
            gap, half = paired(lor, dtr, "accuracy", tasks)
            text += f"  {name} {gap:+.3f} ±{half:.3f}"
    distributed.say(f"{title}: accuracy of DTR minus LOR{text}")
    if all("auto" in result for result in lor):  # not in the JSON of earlier versions
        text = ""
        for name, (mean, half) in path_choice(lor, dtr).items():
            text += f"  {name} {mean:.3f} ±{half:.3f}"
        distributed.say(f"{title}: choice of the path{text}")


# ----------------------------------------------------------------------------------------------
# printing, files, pictures


def show_table(*named):
    """Print tables side by side; named: (title, table), ..."""
    width = 13 * len(METRICS) + 11
    titles = "".join(f"| {title:^{width}}" for title, _ in named)
    heads = "".join(f"{name:>13}" for name in METRICS) + f"{'error m':>9}"
    tables = [{(line["path"], line["task"]): line for line in table} for _, table in named]
    keys = dict.fromkeys(key for table in tables for key in table)
    most = min(max((len(task) for _, task in keys), default=0), 40)  # characters of a name
    name_width = max(10, most + 1)
    distributed.say(f"\n{'':{name_width + 12}}{titles}")
    distributed.say(f"{'path task':<{name_width + 5}}{'n':>6} " + f"|{heads} " * len(named))
    for path, task in keys:
        lines = [table.get((path, task), {}) for table in tables]  # not every one has every task
        n = max(line.get("n", 0) for line in lines)
        name = task if len(task) <= most else f"{task[: most - 1]}…"
        text = f"{path:<4} {name:<{name_width}}{n:>6} "
        for line in lines:
            cells = [cell(line.get(key), line.get(f"{key}_ci")) for key in METRICS]
            error = line.get("center_error_m")
            error = "" if error is None else f"{error:.3f}"
            text += "|" + "".join(f"{one:>13}" for one in cells) + f"{error:>9} "
        distributed.say(text)
    distributed.say(
        "± is half a 95 % interval over questions; "
        "error is the median distance of the predicted centres\n"
    )


def cell(value, half):
    return "      -     " if value is None else f"{value:6.3f} ±{half:.3f}"


def write_json(path, results, **more):
    """The table, the responses, and what else is given; whole or not at all. On rank 0."""
    if distributed.rank() == 0:
        with whole_file(path) as file:
            json.dump({"table": make_table(results), "responses": results, **more}, file)


def is_number_or_null(value):
    return value is None or is_number(value)


def is_list_of_numbers(value):
    return isinstance(value, list) and all(map(is_number_or_null, value))


# What a field of the JSON may hold: in words, and the test of it.
TEXT = ("text", lambda value: isinstance(value, str))
NAME = ("text or a number", lambda value: isinstance(value, str) or is_number(value))
PATH = ("lor or dtr", lambda value: value in PATHS)
COUNT = ("a whole number", lambda value: isinstance(value, int) and is_number(value))
NUMBER = ("a number", is_number)
PART = ("a number or null", is_number_or_null)
ERRORS = ("a list of numbers, in metres, or null", is_list_of_numbers)
ENDS = ("two numbers or nulls", lambda value: is_list_of_numbers(value) and len(value) == 2)
# The fields that must be there, and those that earlier versions lacked.
LINE_FIELDS = {"path": PATH, "task": TEXT, "n": COUNT, "accuracy": PART, "reward": PART}
LINE_EXTRAS = {
    **dict.fromkeys([*METRICS, *(f"{key}_ci" for key in METRICS), "center_error_m"], PART),
    "center_error_m_ci": ENDS,
}
RESPONSE_FIELDS = {
    **dict.fromkeys(("task", "question", "answer", "response"), TEXT),
    **dict.fromkeys(("accuracy", "reward"), NUMBER),
    "index": COUNT,
    "id": NAME,
    "path": PATH,
}
RESPONSE_EXTRAS = {**dict.fromkeys(METRICS, PART), "center_errors_m": ERRORS}


def load_json(path):
    """What write_json wrote, checked; parts of the reward that an older version lacked are None."""
    found = None
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(0, "no such file")  # also not a device, which might not end
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        fault = fault_of(found)
    except OSError as error:
        fault = error.strerror
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise UserError(f"{path}: not the JSON of an evaluation ({fault})")
    for line in found["table"]:
        for key in METRICS:
            line.setdefault(key, None)
            line.setdefault(f"{key}_ci", None)
            if (line[key] is None) != (line[f"{key}_ci"] is None):
                raise UserError(f"{path}: table: needs '{key}' and '{key}_ci', or neither")
        line.setdefault("center_error_m", None)
        line.setdefault("center_error_m_ci", [None, None])
    for result in found["responses"]:
        for key in METRICS:
            result.setdefault(key, None)
        result.setdefault("center_errors_m", [])
        result["id"] = str(result["id"])
    return found


def fault_of(found):
    """What is wrong with the content of a JSON file, in words; "" if nothing is."""
    for name, needed, extra in (
        ("table", LINE_FIELDS, LINE_EXTRAS),
        ("responses", RESPONSE_FIELDS, RESPONSE_EXTRAS),
    ):
        if not isinstance(found, dict) or not isinstance(found.get(name), list):
            return f"needs an object with a list '{name}'"
        for number, one in enumerate(found[name]):
            lacking = set(needed) - set(one) if isinstance(one, dict) else set(needed)
            if lacking:
                return f"{name}, number {number}: without {', '.join(sorted(lacking))}"
            for field, (words, fits) in {**extra, **needed}.items():
                if field in one and not fits(one[field]):
                    value = reprlib.repr(one[field])
                    return f"{name}, number {number}, field '{field}': needs {words}, not {value}"
    return ""


def show_pictures(folder, rows, results):
    """A PNG per question: marks, true (circle) and predicted (cross) centres, and the response."""
    os.makedirs(folder, exist_ok=True)
    for row, result in zip(rows, results):
        task = re.sub(r"[^A-Za-z0-9_.-]+", "_", result["task"])[:40]  # a part of a file's name
        name = f"{result['index']:05d}_{result['path']}_{task}.png"
        picture_of(row, result).save(os.path.join(folder, name))


def picture_of(row, result):
    frame = reference_frame(row)
    image = draw_marks(open_image(row, frame), row, frame)
    centers = report.center_points(row, result["response"], image.size)
    scale = max(1, round(640 / image.width))
    image = image.resize((image.width * scale, image.height * scale))
    width = max(image.width, 640)
    text = (
        f"{result['question']}\ntruth {result['answer']}   reward {result['reward']:.2f}\n"
        f"{result['response']}"
    )
    lines = []
    for line in text.encode(errors="replace").decode().splitlines():  # no half characters
        lines += textwrap.wrap(line, width // 6)
    del lines[MOST_LINES:]
    canvas = Image.new("RGB", (width, image.height + 20 + 14 * len(lines)), "white")
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    pen.text((6, image.height + 6), "\n".join(lines), fill="black")
    for color, true, predicted in centers:
        if true is not None:
            x, y = scale * np.array(true)
            pen.ellipse([x - 6, y - 6, x + 6, y + 6], outline=color, width=2)
        if predicted is not None:
            x, y = scale * np.array(predicted)
            pen.line([x - 6, y - 6, x + 6, y + 6], fill=color, width=2)
            pen.line([x - 6, y + 6, x + 6, y - 6], fill=color, width=2)
    return canvas


# ----------------------------------------------------------------------------------------------
# one question (--ask)

UNKNOWN = "unknown"  # in place of the answer to a question of the user


def asked_rows(settings, processor):
    """The row of --ask: of the user's picture, or of the embedded world on both paths."""
    picture = settings.ask[0]
    if picture.isdecimal() and not os.path.exists(picture):
        return rows_of_seed(settings, image_side(processor))
    _, question = settings.ask
    row = {
        "source": f"--ask {picture}",
        "folder": "",
        "image": picture,
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": UNKNOWN},
        ],
        "3d_pos": {},
    }
    if settings.depth:
        row["depth"] = settings.depth
    if settings.intrinsics:
        row["intrinsics"] = numbers_of("--intrinsics", settings.intrinsics)
    width, height = open_image(row).size
    for color, words in zip(MARK_COLORS, settings.box):
        box = numbers_of("--box", words)
        check_region(row, box, width, height)
        sides = (width, height, width, height)
        row[f"{color}_bbox"] = [[1000 * value / side for value, side in zip(box, sides)]]
    return [row]


def rows_of_seed(settings, side):
    """A question of the embedded world about a picture that no training uses, on both paths."""
    seed = HELD_OUT + int(settings.ask[0])
    words = settings.ask[1] if len(settings.ask) > 1 else ""
    asked = ask_questions(cached_scene(seed, side), seed)
    fitting = [row for row in asked if words.lower() in question_of(row).lower()]
    if not fitting:
        known = {question_of(row) for row in asked if path_of(row) == "lor"}
        raise UserError(
            f"--ask {settings.ask[0]} {words}: no question of that picture has these words; "
            f"there are {len(known)}, such as: {min(known)}"
        )
    return [row for row in asked if row["task"] == fitting[0]["task"]]


def numbers_of(flag, text):
    """Four numbers that a flag holds."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not are_numbers(values, 4):
        raise UserError(f"{flag} {text}: needs four numbers with commas, such as 120,80,300,260")
    return values


def check_ask(settings):
    """UserError for --ask without a question, and for a question and boxes that do not fit."""
    picture, *words = settings.ask
    if picture.isdecimal() and not os.path.exists(picture):
        for flag in ("box", "depth", "intrinsics"):
            if getattr(settings, flag):
                raise UserError(f"--{flag}: has no effect on a picture of the embedded world")
    elif len(words) != 1:
        raise UserError(
            f"--ask {picture}: needs a picture and a question in quotes, or the seed of a picture "
            "of the embedded world"
        )
    colors = list(MARK_COLORS)
    if len(settings.box) > len(colors):
        raise UserError(f"--box: {len(settings.box)} boxes, at most {len(colors)} have a color")
    for number, color in enumerate(colors):
        named = any(re.search(rf"\b{color} bbox\b", text) for text in words)
        if named and not picture.isdecimal() and number >= len(settings.box):
            raise UserError(
                f"--ask: the question names the {color} bbox, which is the box of --box number "
                f"{number + 1}; {len(settings.box)} given"
            )


def show_answers(results):
    """Question, truth where it is known, responses and their reward parts, as text."""
    truth = results[0]["answer"]
    known = "" if truth == UNKNOWN else f"   (truth: {truth})"
    distributed.say(f"\nquestion   {results[0]['question']}{known}")
    for result in results:
        lines = result["response"].splitlines() or ["(nothing)"]
        parts = [f"format {result['format']:g}"]
        if known:
            parts = [f"accuracy {result['accuracy']:.2f}", *parts]
            if result["detection"] is not None:
                parts.append(f"detection {result['detection']:.2f}")
            parts.append(f"reward {result['reward']:.2f}")
        name = result["path"].upper()
        distributed.say(f"\n{name:<11}" + f"\n{'':<11}".join([*lines, ", ".join(parts)]))


# ----------------------------------------------------------------------------------------------
# the program


def compare(files):
    """Earlier evaluations side by side, and each against the first -> the evaluations."""
    evaluations = [load_json(file) for file in files]
    show_table(*((file, one["table"]) for file, one in zip(files, evaluations)))
    for file, one in zip(files, evaluations):
        show_paths(file, one["responses"])
    before = evaluations[0]["responses"]
    for file, one in zip(files[1:], evaluations[1:]):
        show_changes(f"{file} against {files[0]}", before, one["responses"])
    return evaluations


def report_comparison(settings, evaluations, rows):
    """--report of --compare."""
    titles = [os.path.splitext(os.path.basename(file))[0] for file in settings.compare]
    if len(set(titles)) < len(titles):
        titles = settings.compare
    named = [(title, one["table"], one["responses"]) for title, one in zip(titles, evaluations)]
    runs = settings.runs or [os.path.dirname(file) for file in settings.compare]
    report.write(settings.report, named, rows, runs)


def evaluate(settings, sources):
    """Ask, score, and tell."""
    device = distributed.setup(settings.seed)
    model, tokenizer, processor = load_model(settings.model)
    distributed.use_attention(model, settings.attention)
    data.check_with(sources, tokenizer, processor)
    if settings.ask:
        rows = asked_rows(settings, processor)
    else:
        rows = rows_of(sources) or held_out_rows(settings, processor)
    rows = on_paths(rows, settings.path)
    if settings.ask:
        for row in rows:
            data.check_row(row, tokenizer, processor)
    if not rows:
        raise UserError("nothing to answer: no question asked for")
    model = distributed.shard(distributed.freeze(model, device), device)
    results = answer(model, tokenizer, processor, rows, device, settings)
    try:
        if settings.json:
            write_json(settings.json, results)
    finally:  # told also where it can't be written
        tell(settings, rows, results)


def held_out_rows(settings, processor):
    side = image_side(processor)
    return held_out(settings.questions, side, world=settings.world)


def rows_of(sources):
    return [row for _, rows, _ in sources for row in rows]


def tell(settings, rows, results):
    """Tables, page and pictures of an evaluation; of --ask the responses."""
    table = make_table(results)
    if settings.ask:
        show_answers(results)
    else:
        show_table((settings.model, table))
        show_paths(settings.model, results)
    if settings.report:
        named = [(settings.model, table, results)]
        report.write(settings.report, named, rows, settings.runs or [settings.model])
    if settings.show and distributed.rank() == 0:
        show_pictures(settings.show, rows, results)


def check_files(settings):
    """UserError where an output can't be written, or would replace what is read; before any work."""
    inputs = data.user_files(settings)
    inputs += [*settings.compare, *settings.ask[:1], settings.depth]
    for folder in (settings.model, *settings.runs):
        inputs += files_of_model(folder)
    check_outputs({"--json": settings.json, "--report": settings.report}, inputs)
    if settings.show:
        try_folder("--show", settings.show, os.path.realpath(settings.show))
    if settings.report and not settings.compare:
        report.check_logs(settings.runs or [settings.model])


def files_of_model(folder):
    """The files of a --model folder that are read."""
    found = []
    for pattern in MODEL_FILES:
        found += glob.glob(os.path.join(glob.escape(folder), pattern))
    return found


def check_flags(settings, asked):
    """UserError for flags that do not go together; asked: see engine.settings.parse."""
    for name in ("data", "scenes"):
        if name in asked and settings.compare and not settings.report:
            raise UserError(f"--{name}: has no effect with --compare, but for --report")
    if settings.ask:
        check_ask(settings)


def main():
    settings = parse(Settings, __doc__, moved=MOVED, check=check_flags)
    check_files(settings)
    sources = data.user_sources(settings)
    if settings.compare:
        evaluations = compare(settings.compare)
        if settings.report:
            report_comparison(settings, evaluations, rows_of(sources))
    else:
        evaluate(settings, sources)


if __name__ == "__main__":
    run_main(main)
