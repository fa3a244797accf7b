"""Evaluations of several seeds side by side, with error bars over seeds and questions; the figure.

    python -m tools.findings "cold start=out/grpo_?/eval_cold_start.json" \\
        "GRPO=out/grpo_?/eval.json" --curves "out/grpo_?/metrics.jsonl" --figure figure1.svg

Each NAME=PATTERN is a column: JSON files of eval.py or grpo.py on the same questions, one per seed,
in sorted order. The first table holds the means. The second holds each column minus the first
column, question by question and averaged over the seeds; the third does so for each seed, with the
interval of the questions only. --course adds how each GRPO run went, from the metrics.jsonl that
lies beside each file. Files of older versions may lack a part of the reward: its rows are left out.
The dash "–" stands for a median over mostly missing centres, and for a mean over steps of which
some lack the value.

The half width of a 95 % interval adds two independent parts: that of the seeds, Student's t on the
seeds' means, and that of the questions, 1.96 standard errors of the questions' means over the
seeds. A median has only the first part.

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D coordinates first).
"""

import glob
import os
from dataclasses import dataclass
from html import escape

import numpy as np

from engine.output import check_outputs, whole_file
from engine.report import log_lines
from engine.settings import parse, run_main, setting
from eval import load_json
from formats.errors import UserError
from world.questions import GENERAL_FAMILIES, REGION_FAMILIES

ALL_FAMILIES = {**REGION_FAMILIES, **GENERAL_FAMILIES}
# The rows of the tables: name, path, tasks, what is averaged (of the centre errors: the median).
ROWS = [
    ("LOR region: accuracy", "lor", REGION_FAMILIES, "accuracy"),
    ("LOR depths: accuracy", "lor", ["depth", "move"], "accuracy"),
    ("LOR general: accuracy", "lor", GENERAL_FAMILIES, "accuracy"),
    ("LOR all: reward", "lor", ALL_FAMILIES, "reward"),
    ("LOR all: format", "lor", ALL_FAMILIES, "format"),
    ("DTR region: accuracy", "dtr", REGION_FAMILIES, "accuracy"),
    ("DTR depths: accuracy", "dtr", ["depth", "move"], "accuracy"),
    ("DTR general: accuracy", "dtr", GENERAL_FAMILIES, "accuracy"),
    ("DTR all: reward", "dtr", ALL_FAMILIES, "reward"),
    ("DTR all: format", "dtr", ALL_FAMILIES, "format"),
    ("DTR region: detection reward", "dtr", REGION_FAMILIES, "detection"),
    ("DTR region: centre error, m", "dtr", REGION_FAMILIES, "center_errors_m"),
]
# Student's t, two-sided 95 %, by degrees of freedom: 0, 1, 2, ...
T95 = [np.inf, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
COLORS = ["#9aa3ad", "#e0a458", "#1a6fc9", "#7b4fb5", "#47772a", "#c2541a"]  # of the columns
CURVES = [  # key in metrics.jsonl, name, colour
    ("lor_reward", "LOR reward", "#1a6fc9"),
    ("dtr_reward", "DTR reward", "#c2541a"),
    ("dtr_detection", "DTR detection reward", "#47772a"),
]


@dataclass
class Settings:
    columns: list = setting([], "NAME=PATTERN: evaluations, one file per seed", positional=True)
    curves: str = setting(
        "", "metrics.jsonl of the GRPO runs, a pattern; for the figure", only_with=("figure",)
    )
    figure: str = setting("", "SVG file to draw")
    course: bool = setting(False, "also how each GRPO run went")


def show():
    """Print the tables, and draw the figure if it is asked for."""
    settings = parse(Settings, __doc__)
    if not all("=" in column for column in settings.columns):
        raise UserError('columns: need NAME=PATTERN, such as "GRPO=out/grpo_*/eval.json"')
    check_outputs({"--figure": settings.figure})
    heads, patterns = zip(*(column.split("=", 1) for column in settings.columns))
    columns = [load(pattern) for pattern in patterns]
    counts = [f"{head} {len(seeds)}" for head, seeds in zip(heads, columns)]
    print("seeds: " + ", ".join(counts))
    rows = rows_of(columns)
    means = with_intervals(rows)
    show_table("mean", heads, means)
    if len(columns) > 1:
        show_differences(heads, columns, rows)
    if settings.course:
        show_course(heads, patterns, seed_count=len(columns[0]))
    for head, seeds in zip(heads, columns):
        show_path_gaps(head, seeds)
    if settings.figure:
        draw(settings.figure, heads, means, settings.curves)


# ----------------------------------------------------------------------------------------------
# values and their intervals


def load(pattern):
    """The responses of each seed's evaluation: a list per file."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"{pattern}: no such file; make it with grpo.py, or with eval.py --json")
    return [load_json(file)["responses"] for file in files]


def rows_of(columns):
    """The rows of ROWS that every column has values for: [(name, questions, values), ...].

    values: an array (seeds, questions) per column.
    """
    rows = []
    for name, path, tasks, key in ROWS:
        of_columns = [values(seeds, path, tasks, key) for seeds in columns]
        if all(x.size for x in of_columns):
            asked = answers(columns[0][0], path, tasks)
            rows.append((name, len(asked), of_columns))
    return rows


def answers(results, path, tasks):
    """The results of one path and some tasks."""
    return [result for result in results if result["path"] == path and result["task"] in tasks]


def values(seeds, path, tasks, key):
    """(seeds, questions) of a metric; of the centre errors: (seeds, 1), their median in metres.

    Empty where a seed's file is of an older version that lacked this part of the reward.
    """
    of_seeds = []
    lacking = False
    for results in seeds:
        asked = answers(results, path, tasks)
        # Also today, questions without centres have no detection reward and no centre errors.
        known = [result[key] for result in asked if result[key] not in (None, [])]
        if asked and not known:
            lacking = True
        of_seeds.append(known)
    if key == "center_errors_m":
        of_seeds = [[median_error(errors)] for errors in of_seeds]
    elif lacking:
        return np.empty((len(seeds), 0))
    if len({len(known) for known in of_seeds}) > 1:
        raise UserError(f"{key} of {path}: the seeds were asked different questions")
    return np.array(of_seeds, float)


def median_error(errors_of_questions):
    """The median over all objects, infinite without a prediction; NaN without any object."""
    errors = []
    for of_question in errors_of_questions:
        errors += [np.inf if error is None else error for error in of_question]
    return np.median(errors) if errors else np.nan


def interval(x):
    """Mean of x (seeds, questions), and the half width of its 95 % interval (see the top).

    One seed: the interval of the questions only.
    """
    seeds, questions = x.shape
    if not np.isfinite(x).all():  # a median over mostly missing centres
        return np.nan, np.nan
    of_seeds = 0.0
    if seeds > 1:
        degrees = min(seeds, len(T95)) - 1
        of_seeds = T95[degrees] * x.mean(1).std(ddof=1) / seeds**0.5
    of_questions = 0.0
    if questions > 1:
        of_questions = 1.96 * x.mean(0).std(ddof=1) / questions**0.5
    return x.mean(), np.hypot(of_seeds, of_questions)


def with_intervals(rows):
    """Rows of values -> lines of a table: [(name, questions, [(mean, half width), ...]), ...]."""
    lines = []
    for name, count, of_columns in rows:
        lines.append((name, count, [interval(x) for x in of_columns]))
    return lines


def differences(rows):
    """Rows of values -> rows of each later column minus the first column, seed by seed."""
    changes = []
    for name, count, (base, *others) in rows:
        sound = all(x.shape == base.shape and np.isfinite(x).all() for x in (base, *others))
        if sound:
            changes.append((name, count, [x - base for x in others]))
    return changes


# ----------------------------------------------------------------------------------------------
# tables in Markdown


def show_table(title, heads, lines):
    """Print a table of lines, [(name, questions, [(mean, half width), ...]), ...]."""
    print(f"\n| {title} | n | " + " | ".join(heads) + " |")
    print("|" + "---|" * (len(heads) + 2))
    sign = "+" if title.startswith("minus") else ""
    for name, count, cells in lines:
        texts = [number(mean, half, sign) for mean, half in cells]
        print(f"| {name} | {count} | " + " | ".join(texts) + " |")


def number(mean, half, sign="+"):
    if not np.isfinite(mean):
        return "–"
    if not half:  # such as the median of one run
        return f"{mean:{sign}.3f}"
    return f"{mean:{sign}.3f} ± {half:.3f}"


def show_differences(heads, columns, rows):
    """The tables of each column minus the first one, where all answer the same questions."""
    asked = set()
    for seeds in columns:
        for results in seeds:
            asked.add(tuple((result["path"], result["id"]) for result in results))
    if len(asked) > 1:
        print("\nthe columns answer different questions: no differences")
        return
    changes = differences(rows)
    show_table(f"minus {heads[0]}", heads[1:], with_intervals(changes))
    if len(columns[0]) > 1:
        show_seeds(heads, changes)


def show_seeds(heads, changes):
    """The changes of the rewards and of the centre error, seed by seed."""
    print(f"\n| seed by seed, minus {heads[0]} | " + " | ".join(heads[1:]) + " |")
    print("|" + "---|" * len(heads))
    for name, _, of_columns in changes:
        if name.endswith(("reward", "error, m")):
            cells = []
            for x in of_columns:
                cells.append(", ".join(number(*interval(of_seed[None])) for of_seed in x))
            print(f"| {name} | " + " | ".join(cells) + " |")


def show_path_gaps(head, seeds):
    """The accuracy of DTR minus that of LOR, where both paths were asked the same."""
    gaps = ""
    for pool, tasks in (("region", REGION_FAMILIES), ("general", GENERAL_FAMILIES)):
        lor = values(seeds, "lor", tasks, "accuracy")
        dtr = values(seeds, "dtr", tasks, "accuracy")
        if lor.size and lor.shape == dtr.shape:
            mean, half = interval(dtr - lor)
            gaps += f"  {pool} {mean:+.3f} ± {half:.3f}"
    print(f"{head}: accuracy of DTR minus LOR{gaps}")


# ----------------------------------------------------------------------------------------------
# how the runs went: the rewards of sampled responses, from metrics.jsonl


def show_course(heads, patterns, seed_count):
    """The table of --course.

    A cold start has no column: the log beside its file is that of GRPO, which came after it.
    """
    course_of = {}
    for head, pattern in zip(heads, patterns):
        if not pattern.endswith("eval_cold_start.json"):
            course_of[head] = course(pattern)
    lines = []
    for name in next(iter(course_of.values()), []):
        cells = [interval(of_runs[name]) for of_runs in course_of.values()]
        lines.append((name, seed_count, cells))
    show_table("during GRPO", list(course_of), lines)


def course(pattern):
    """How the GRPO runs beside the files of a pattern went: {what: (runs, 1)}."""
    found = {}
    for file in sorted(glob.glob(pattern)):
        log = os.path.join(os.path.dirname(file), "metrics.jsonl")
        lines = log_lines(log) if os.path.isfile(log) else []
        if not any("kept" in line for line in lines):
            raise UserError(f"--course: {log} is not of grpo.py; give only its eval.json")
        for name, value in course_of_run(lines).items():
            found.setdefault(name, []).append([value])
    return {name: np.array(of_runs) for name, of_runs in found.items()}


def course_of_run(lines):
    """How one run went: {what: number}, NaN where a step of it has no value.

    The deepest fall is that of the reward, averaged over both paths and ten steps, below its
    highest value before.
    """
    found = {}
    for path in ("lor", "dtr"):
        for key in ("reward", "format"):
            steps = per_step(lines, f"{path}_{key}")
            found[f"{path.upper()}: {key}, first 10 steps"] = steps[:10].mean()
            found[f"{path.upper()}: {key}, last 10 steps"] = steps[-10:].mean()
    reward = np.nanmean([per_step(lines, "lor_reward"), per_step(lines, "dtr_reward")], 0)
    if len(reward) >= 10:
        reward = running_mean(reward, 10)
    found["deepest fall of the reward"] = (np.maximum.accumulate(reward) - reward).max()
    found["groups kept"] = per_step(lines, "kept").mean()
    found["responses cut off"] = per_step(lines, "cut").mean()
    return found


def per_step(lines, key):
    """The values of a key, NaN in the steps that lack it."""
    return np.array([line.get(key, np.nan) for line in lines], float)


def running_mean(steps, window):
    return np.convolve(steps, np.ones(window) / window, "valid")


# ----------------------------------------------------------------------------------------------
# the figure: SVG, without a library


@dataclass
class Panel:
    """A chart's frame on the page, in pixels, and the values at its lower and upper edge."""

    x: float
    y: float
    width: float
    height: float
    low: float = 0
    high: float = 1

    def height_of(self, value):
        """Where a value lies on the page; y points down."""
        return self.y + self.height * (self.high - value) / (self.high - self.low)


def draw(path, heads, lines, curves_pattern):
    """Write the figure: the accuracies and rewards of the table as bars, beside them the curves."""
    shown = [line for line in lines if not line[0].endswith(("format", "m"))]
    if curves_pattern:
        width = 980
        body = bars(heads, shown, Panel(400, 50, 560, 220))
        body += curves(curves_pattern, Panel(50, 50, 290, 220))
    else:
        width = 630
        body = bars(heads, shown, Panel(50, 50, 560, 220))
    with whole_file(path, "--figure") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 340" '
            f'font-family="sans-serif"><rect width="{width}" height="340" fill="white"/>'
            f"{body}</svg>\n"
        )
    print(f"\nfigure: {path}")


def bars(heads, lines, panel):
    """Means with their intervals: a group of bars per line of the table, a bar per column."""
    out = frame(panel, "greedy answers to held-out questions, 95 % intervals")
    step = panel.width / len(lines)
    bottom = panel.y + panel.height
    for i, (name, _, cells) in enumerate(lines):
        out += group_of_bars(cells, panel, panel.x + step * (i + 0.1), 0.8 * step / len(heads))
        for row, words in enumerate(name.split(": ")):
            middle = panel.x + step * (i + 0.5)
            out += text(middle, bottom + 16 + 13 * row, words, 11, "middle")
    for k, (head, color) in enumerate(zip(heads, COLORS)):
        out += legend_entry(panel.x + 130 * k, bottom + 44, head, color)
    return out


def group_of_bars(cells, panel, x, step):
    """The bars of one line of the table, from x on, a step apart."""
    out = ""
    for k, ((mean, half), color) in enumerate(zip(cells, COLORS)):
        left = x + k * step
        top = panel.height_of(mean)
        out += (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.9 * step:.1f}" '
            f'height="{panel.height_of(0) - top:.1f}" fill="{color}"/>'
        )
        middle = left + 0.45 * step
        low = panel.height_of(max(mean - half, 0))
        high = panel.height_of(min(mean + half, 1))
        out += (
            f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
            'stroke="#222" stroke-width="1.5"/>'
        )
    return out


def curves(pattern, panel):
    """The rewards against the steps: mean over the seeds, in a band from the least to the most."""
    runs = [log_lines(file) for file in sorted(glob.glob(pattern))]
    if not runs:
        raise UserError(f"--curves {pattern}: no such file")
    length = min(len(lines) for lines in runs)
    rewards = []  # per curve: (runs, steps)
    for key, _, _ in CURVES:
        of_runs = [per_step(lines[:length], key) for lines in runs]
        window = max(1, length // 8)
        rewards.append(np.array([running_mean(steps, window) for steps in of_runs]))
    panel.low = np.floor(10 * min(np.nanmin(of_runs) for of_runs in rewards)) / 10
    panel.high = np.ceil(10 * max(np.nanmax(of_runs) for of_runs in rewards)) / 10
    out = frame(panel, "sampled rewards during GRPO, running mean")
    bottom = panel.y + panel.height
    for i, ((_, name, color), of_runs) in enumerate(zip(CURVES, rewards)):
        out += curve(of_runs, color, panel)
        out += legend_entry(panel.x + 95 * i, bottom + 26, name, color)
    out += text(panel.x, bottom + 16, "step 0", 11)
    out += text(panel.x + panel.width, bottom + 16, str(length), 11, "end")
    return out


def curve(of_runs, color, panel):
    """One curve with its band; of_runs (runs, steps)."""
    xs = panel.x + panel.width * np.linspace(0, 1, of_runs.shape[1])
    # The band's outline: along its upper edge, and back along its lower one.
    upper = points(panel, xs, of_runs.max(0))
    lower = points(panel, xs[::-1], of_runs.min(0)[::-1])
    middle = points(panel, xs, of_runs.mean(0))
    return (
        f'<polygon points="{upper} {lower}" fill="{color}" opacity="0.18"/>'
        f'<polyline points="{middle}" fill="none" stroke="{color}" stroke-width="2"/>'
    )


def points(panel, xs, heights):
    """The points attribute of a line; xs in pixels, heights as values of the panel."""
    return " ".join(f"{x:.1f},{panel.height_of(value):.1f}" for x, value in zip(xs, heights))


def frame(panel, title):
    """The title, grid and labels of a panel."""
    out = text(panel.x, panel.y - 12, title, 13)
    for value in np.linspace(panel.low, panel.high, 5):
        y = panel.height_of(value)
        out += (
            f'<line x1="{panel.x}" x2="{panel.x + panel.width}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#e3e6ea"/>'
        )
        label = f"{value:.2f}".rstrip("0").rstrip(".")
        out += text(panel.x - 6, y + 4, label, 11, "end", "#666")
    return out


def legend_entry(x, y, words, color):
    square = f'<rect x="{x}" y="{y}" width="10" height="10" fill="{color}"/>'
    return square + text(x + 14, y + 9, words)


def text(x, y, words, size=12, anchor="start", color="#333"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{color}">{escape(words)}</text>'
    )


def main():
    """The command; what is wrong with it ends in one line and exit code 2."""
    run_main(show)


if __name__ == "__main__":
    main()
