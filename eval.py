"""Evaluation: greedy answers of both paths, scored by the rewards, with 95 % intervals.

    python eval.py --model out/grpo                                    # held-out scenes of the embedded world
    torchrun --nproc_per_node 8 eval.py --model out/grpo --scenes scenes.jsonl --json out.json --show out/pictures
    python eval.py --model out/grpo --bench blink --data BLINK         # published benchmarks: see benchmarks.py

Every question is asked on both paths. Per path and task: accuracy, format, total and detection reward (means) and the
centre error (median over the asked-for objects, metres; an object without a box of its own counts as infinitely far).
"""
import json
import math
import os
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import questions
import report
import rewards
import run
from model import rollout
from run import setting
from scenes import make_scene
from transfer import WORLDS, reword

METRICS = report.METRICS
FIELDS = {"table": {"path", "task", "n", "center_error_m", "center_error_m_ci", *METRICS},    # of an evaluation's JSON
          "responses": {"index", "id", "path", "task", "question", "answer", "response", "center_errors_m", *METRICS}}


@dataclass
class Settings:
    model: str = setting("out/grpo", "folder of this project or a stock Qwen3-VL")
    data: list = setting([], "instance files to answer instead of the embedded world")
    scenes: str = setting("", "scenes.jsonl: ask the region questions about these pictures (real ones too)")
    skip_bad_rows: bool = setting(False, "count and list bad rows instead of stopping at the first")
    questions: int = setting(1320, "embedded world: number of held-out questions; each is asked on both paths")
    world: str = setting("", "another embedded world than the trained one: view, tilt, crowd, shades, wording "
                             "(transfer.py)", ("", *WORLDS))
    path: str = setting("both", "lor, dtr, both, or auto: dtr for regions and geometry, lor otherwise",
                        ("lor", "dtr", "both", "auto"))
    temperature: float = setting(0.0, "0 is greedy (paper: 0.5 during training)")
    max_new_tokens: int = setting(160, "longest response (paper: 2048)")
    batch: int = setting(240, "prompts at once on a rank")
    attention: str = setting("auto", "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed")
    compare: list = setting([], "JSON files of earlier evaluations: only print them side by side, and what changed")
    json: str = setting("", "file for the table and every response with its reward parts")
    show: str = setting("", "folder for one picture a question: regions, predicted and true centres, response")
    report: str = setting("", "HTML file for tables, charts and examples to browse; also of --compare")
    runs: list = setting([], "report: folders whose metrics.jsonl it draws; empty: the model's, or the compared files'")
    bench: str = setting("", "answer a published benchmark, its files in --data: spar, embspatial, sat, blink, "
                             "cvbench, realworldqa, erqa, spatialrgpt or (only --score) vsi")
    score: str = setting("", "with --bench: only score this JSON-lines file of {id, response}; nothing is run")
    seed: int = setting(0, "seed of the sampling at temperatures above 0")


# ---------------------------------------------------------------------------------------------------------------------
# questions


def held_out(count, size, first=9 * 10**8, world=""):
    """`count` questions about scenes that no training uses, as many of each family, each for both paths."""
    scene = lambda seed: make_scene(seed, size, **WORLDS[world]) if world else data.cached_scene(seed, size)
    tasks = [*questions.REGION, *questions.GENERAL]
    per_task = -(-count // len(tasks))
    rows = {task: [] for task in tasks}
    for seed in range(first, first + 100 * count):
        open_tasks = [task for task in tasks if len(rows[task]) < 2 * per_task]
        if not open_tasks:
            break
        asked = questions.questions(scene(seed), seed, tasks=open_tasks)
        if not asked:
            continue
        task = asked[2 * (seed % (len(asked) // 2))]["task"]     # one question a scene
        rows[task] += [row for row in asked if row["task"] == task]
    rows = [row for task in tasks for row in rows[task]]
    for row in rows if world == "wording" else ():
        row["conversations"][0]["value"] = reword(row["conversations"][0]["value"])
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# answers


def token_rules(model, tokenizer, device):
    """-> stop ids; ids that are never sampled: an image pad or <mask> would stand for a picture that is not there."""
    stop = model.generation_config.eos_token_id
    stop = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    banned = set(tokenizer.convert_tokens_to_ids(data.SPECIAL)) - stop
    return torch.tensor(sorted(stop), device=device), torch.tensor(sorted(banned), device=device)


def decode(tokenizer, tokens, mask, stop):
    """-> (text without the stop token, whether the response ended by itself) for each row."""
    ids = [row[keep.bool()].tolist() for row, keep in zip(tokens.cpu(), mask.cpu())]
    ended = [bool(row) and row[-1] in stop for row in ids]
    return [tokenizer.decode(row[:-1] if end else row) for row, end in zip(ids, ended)], ended


def score(row, response):
    """Reward parts of one response, and the distance (metres) of each asked-for centre from its prediction."""
    centers, images, question = data.centers_of(row), len(data.images_of(row)), data.question_of(row)
    try:
        parts = rewards.total_reward(response, data.answer_of(row), data.path_of(row), centers, images, question)
    except ValueError as error:
        raise data.BadRow(f"{row['source']}: {error}") from None
    errors = list(rewards.center_errors(response, centers, images, question).values()) if centers else []
    return {"reward": parts.pop("total"), **parts, "center_errors_m": errors}


def answer(model, tokenizer, processor, rows, device, settings, title="evaluation"):
    """Responses of a (sharded) model to the rows, scored; on every rank, in the order of the rows."""
    stop, banned = token_rules(model, tokenizer, device)
    generator = torch.Generator(device).manual_seed(settings.seed * 1000 + run.rank())
    mine = range(run.rank(), len(rows), run.world())
    mine = sorted(mine, key=lambda i: (data.path_of(rows[i]), len(data.question_of(rows[i]))))
    results = []
    with run.gathered(model):
        bar = tqdm(range(0, len(mine), settings.batch), desc=title, disable=run.rank() > 0, mininterval=2)
        for start in bar:
            part = mine[start:start + settings.batch]
            samples = [data.encode(rows[i], tokenizer, processor, train=False) for i in part]
            prompts = data.to(data.collate(samples, tokenizer), device)
            tokens, mask, *_ = rollout(model, prompts, 1, settings.max_new_tokens, stop, banned, settings.temperature,
                                       generator)
            for i, text in zip(part, decode(tokenizer, tokens, mask, set(stop.tolist()))[0]):
                results.append({"index": i, "id": rows[i].get("id", str(i)), "path": data.path_of(rows[i]),
                                "task": rows[i].get("task", "question"), "question": data.question_of(rows[i]),
                                "auto": data.best_path(rows[i]), "answer": data.answer_of(rows[i]), "response": text,
                                **score(rows[i], text)})
    return sorted(run.gather(results), key=lambda r: r["index"])


# ---------------------------------------------------------------------------------------------------------------------
# the table


def mean_interval(values):
    """Mean and the half width of its 95 % interval (normal approximation)."""
    values = np.asarray(values, float)
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), float(half)


def median_interval(values):
    """Median and its distribution-free 95 % interval (order statistics)."""
    values, n = np.sort(np.asarray(values, float)), len(values)
    half = 0.98 * n**0.5
    low, high = values[max(0, int(n / 2 - half))], values[min(n - 1, int(np.ceil(n / 2 + half)))]
    return float(np.median(values)), float(low), float(high)


def pools(results):
    """Tasks that are also reported together: name -> tasks."""
    tasks = {r["task"] for r in results}
    named = {"region": tasks & set(questions.REGION), "general": tasks & set(questions.GENERAL), "all": tasks}
    return {name: of for name, of in named.items() if of}


def make_table(results):
    """Results -> one dict a path and task; "region", "general" and "all" pool tasks."""
    table = []
    for path in ("lor", "dtr"):
        of_path = [r for r in results if r["path"] == path]
        pooled = pools(of_path)
        for task in [*dict.fromkeys(r["task"] for r in of_path), *pooled]:
            part = [r for r in of_path if r["task"] in pooled.get(task, {task})]
            line = {"path": path, "task": task, "n": len(part)}
            for key in METRICS:
                values = [r[key] for r in part if r[key] is not None]
                line[key], line[f"{key}_ci"] = mean_interval(values) if values else (None, None)
            errors = [np.inf if e is None else e for r in part for e in r["center_errors_m"]]
            median = median_interval(errors) if errors else (None, None, None)
            median = [None if v == np.inf else v for v in median]                            # inf is not JSON
            line["center_error_m"], line["center_error_m_ci"] = median[0], median[1:]
            table.append(line)
    return table


def paired(before, after, key, tasks):
    """Mean of after - before over the same questions, and the half width of its 95 % interval."""
    known = [(b[key], a[key]) for b, a in zip(before, after) if b["task"] in tasks and None not in (b[key], a[key])]
    return mean_interval([a - b for b, a in known]) if known else None


@np.errstate(invalid="ignore")                              # inf - inf, where most centres are missing
def paired_error(before, after, draws=1000):
    """Change of the median centre error (metres) and its 95 % interval, bootstrapped over questions; None without
    centres."""
    finite = lambda result: [np.inf if e is None else e for e in result["center_errors_m"]]
    pairs = [(finite(b), finite(a)) for b, a in zip(before, after) if b["center_errors_m"]]
    medians = lambda picked: np.array([np.median(sum((pair[k] for pair in picked), [])) for k in (0, 1)])
    if not pairs or not np.isfinite(medians(pairs)).all():
        return None
    random = np.random.default_rng(0)
    resamples = random.integers(len(pairs), size=(draws, len(pairs)))
    change = [np.diff(medians([pairs[i] for i in picked]))[0] for picked in resamples]
    return float(np.diff(medians(pairs))[0]), *map(float, np.percentile(change, [2.5, 97.5]))


def show_changes(title, before, after):
    """Print what changed between two evaluations of the same questions, path by path, with paired intervals."""
    run.say(f"{title}: change over the same questions")
    for path in ("lor", "dtr"):
        b, a = ([r for r in results if r["path"] == path] for results in (before, after))
        if not b or [r["id"] for r in b] != [r["id"] for r in a]:
            continue
        for name, tasks in pools(b).items():
            changes = {key: paired(b, a, key, tasks) for key in METRICS}
            text = "".join(f"  {key} {change[0]:+.3f} ±{change[1]:.3f}" for key, change in changes.items() if change)
            run.say(f"  {path} {name:<8}{text}")
        error = paired_error(b, a)
        if error:
            run.say(f"  {path} median centre error {error[0]:+.3f} m, 95 % interval [{error[1]:+.3f}, {error[2]:+.3f}]")


def same_answer(one, other):
    """Do two responses give the same answer? A letter, a number (to a tenth of itself) or a text."""
    said = [rewards.extract_answer(text) or text for text in (one, other)]
    for read in (rewards.read_choice, rewards.read_number):
        values = [read(text) for text in said]
        if None not in values:
            return values[0] == values[1] or read is rewards.read_number and math.isclose(*values, rel_tol=0.1)
    return rewards.plain(said[0]) == rewards.plain(said[1])


def path_choice(lor, dtr):
    """Results of the same questions on the two paths -> accuracy of LOR, DTR, the automatic choice between them and the
    best one (an oracle), with intervals; and the share of the questions to which the paths answer the same."""
    pairs = list(zip(lor, dtr))
    columns = {"lor": [a["accuracy"] for a, _ in pairs], "dtr": [b["accuracy"] for _, b in pairs],
               "auto": [(b if a["auto"] == "dtr" else a)["accuracy"] for a, b in pairs],
               "oracle": [max(a["accuracy"], b["accuracy"]) for a, b in pairs],
               "agreement": [float(same_answer(a["response"], b["response"])) for a, b in pairs]}
    return {name: mean_interval(values) for name, values in columns.items()}


def show_paths(title, results):
    """Print the accuracy of DTR minus that of LOR over the same questions, and what a choice between them is worth."""
    lor, dtr = ([r for r in results if r["path"] == path] for path in ("lor", "dtr"))
    if lor and len(lor) == len(dtr) and [r["answer"] for r in lor] == [r["answer"] for r in dtr]:
        gaps = {name: paired(lor, dtr, "accuracy", tasks) for name, tasks in pools(lor).items() if name != "all"}
        text = "".join(f"  {name} {gap[0]:+.3f} ±{gap[1]:.3f}" for name, gap in gaps.items())
        run.say(f"{title}: accuracy of DTR minus LOR{text}")
        if all("auto" in r for r in lor):                   # not in the JSON of earlier versions
            text = "".join(f"  {name} {mean:.3f} ±{half:.3f}" for name, (mean, half) in path_choice(lor, dtr).items())
            run.say(f"{title}: choice of the path{text}")


def show_table(*named):
    """Print tables side by side: named is (title, table), ..."""
    cell = lambda value, ci: "      -     " if value is None else f"{value:6.3f} ±{ci:.3f}"
    run.say("\n" + " " * 22 + "".join(f"| {title:^{13 * len(METRICS) + 11}}" for title, _ in named))
    heads = "".join(f"{h:>13}" for h in METRICS) + f"{'error m':>9}"
    run.say(f"{'path task':<15}{'n':>6} " + f"|{heads} " * len(named))
    lines = [{(line["path"], line["task"]): line for line in table} for _, table in named]
    for path, task in dict.fromkeys(key for one in lines for key in one):
        found = [one.get((path, task), {}) for one in lines]   # not every evaluation has every path and task
        text = f"{path:<4} {task:<10}{max(line.get('n', 0) for line in found):>6} "
        for line in found:
            error = "" if line.get("center_error_m") is None else f"{line['center_error_m']:.3f}"
            text += "|" + "".join(f"{cell(line.get(k), line.get(f'{k}_ci')):>13}" for k in METRICS) + f"{error:>9} "
        run.say(text)
    run.say("± is half a 95 % interval over questions; error is the median distance of the predicted centres\n")


def read_json(path):
    """Responses of an earlier evaluation."""
    with open(path) as file:
        return json.load(file)["responses"]


def write_json(path, results):
    if run.rank() == 0:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.partial", "w") as file:
            json.dump({"table": make_table(results), "responses": results}, file)
        os.replace(f"{path}.partial", path)


def show_pictures(folder, rows, results):
    """One PNG a question: marks, true (circle) and predicted (cross) centres projected into it, the response below."""
    os.makedirs(folder, exist_ok=True)
    for row, result in zip(rows, results):
        k = data.reference_frame(row)
        image = data.draw_marks(data.open_image(row, k), row, k)
        points = report.center_points(row, result["response"], image.size)
        scale = max(1, round(640 / image.width))
        image = image.resize((image.width * scale, image.height * scale))
        text = f"{result['question']}\ntruth {result['answer']}   reward {result['reward']:.2f}\n{result['response']}"
        width = max(image.width, 640)
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width // 6)]
        canvas = Image.new("RGB", (width, image.height + 20 + 14 * len(lines)), "white")
        canvas.paste(image)
        pen = ImageDraw.Draw(canvas)
        pen.text((6, image.height + 6), "\n".join(lines), fill="black")
        for color, *places in points:
            true, said = (place and scale * np.array(place) for place in places)
            if true is not None:
                pen.ellipse([*(true - 6), *(true + 6)], outline=color, width=2)
            if said is not None:
                pen.line([*(said - 6), *(said + 6)], fill=color, width=2)
                pen.line([*(said + (-6, 6)), *(said + (6, -6))], fill=color, width=2)
        canvas.save(os.path.join(folder, f"{result['index']:05d}_{result['path']}_{result['task']}.png"))


def load_json(file):
    """What write_json wrote."""
    try:
        with open(file) as handle:
            found = json.load(handle)
        lacking = [FIELDS[name] - set(one) for name in FIELDS for one in found[name] if FIELDS[name] - set(one)]
        if lacking:
            raise ValueError(f"without {', '.join(sorted(lacking[0]))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise run.UserError(f"--compare {file}: not the JSON of an evaluation ({error})") from None
    return found


def compare(files):
    """Tables of earlier evaluations side by side, and each against the first. -> the evaluations"""
    found = [load_json(file) for file in files]
    show_table(*((file, one["table"]) for file, one in zip(files, found)))
    for file, one in zip(files, found):
        show_paths(file, one["responses"])
    for file, one in zip(files[1:], found[1:]):
        show_changes(f"{file} against {files[0]}", found[0]["responses"], one["responses"])
    return found


def main():
    settings = run.parse(Settings, __doc__)
    if settings.bench or settings.score:
        import benchmarks                                   # here, as it imports this file
        return benchmarks.main(settings)
    rows = [row for _, part, _ in data.user_sources(settings) for row in part]
    runs = settings.runs or [os.path.dirname(file) for file in settings.compare] or [settings.model]
    if settings.compare:
        found = compare(settings.compare)
        if settings.report:
            titles = [os.path.splitext(os.path.basename(file))[0] for file in settings.compare]
            titles = titles if len({*titles}) == len(titles) else settings.compare
            named = [(title, one["table"], one["responses"]) for title, one in zip(titles, found)]
            report.write(settings.report, named, rows, runs)
        return
    device = run.setup(settings.seed)
    model, tokenizer, processor = run.load_model(settings.model, settings.attention)
    rows = rows or held_out(settings.questions, run.image_side(processor), world=settings.world)
    rows = data.on_paths(rows, settings.path)
    if not rows:
        raise run.UserError("nothing to answer: no question asked for")
    results = answer(run.shard(model, device), tokenizer, processor, rows, device, settings)
    show_table((settings.model, make_table(results)))
    show_paths(settings.model, results)
    if settings.json:
        write_json(settings.json, results)
    if settings.show and run.rank() == 0:
        show_pictures(settings.show, rows, results)
    if settings.report:
        report.write(settings.report, [(settings.model, make_table(results), results)], rows, runs)


if __name__ == "__main__":
    run.main(main)
