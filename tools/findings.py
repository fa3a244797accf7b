"""Evaluations of several seeds side by side, with error bars over seeds and questions, and Figure 1 of the README.

    python findings.py "cold start=out/grpo_*/eval_cold_start.json" "GRPO=out/grpo_*/eval.json" \
        --curves "out/grpo_*/metrics.jsonl" --figure figure1.svg

Each NAME=PATTERN is a column: JSON files of eval.py or grpo.py on the same questions, one a seed, in sorted order. The
second table holds each column minus the first, question by question and averaged over the seeds; the third the seeds
themselves, with the interval of the questions only. --course adds how each GRPO run went, from the metrics.jsonl that
lies beside each file.

The half width of a 95 % interval adds two independent parts: that of the seeds, Student's t on the seeds' means, and
that of the questions, 1.96 standard errors of the questions' means over the seeds. A median has only the first.
"""

import argparse
import glob
import os
from html import escape

import numpy as np

import eval
from engine import report
from engine.settings import run_main
from formats.errors import UserError
from world import questions

T95 = [
    np.inf,
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
]  # Student's t, 1, 2, .. free
ROWS = [
    (f"{path.upper()} {pool}: {key}", path, tasks, key)
    for path in ("lor", "dtr")
    for pool, tasks, key in (
        ("region", questions.REGION_FAMILIES, "accuracy"),
        ("depths", ["depth", "move"], "accuracy"),
        ("general", questions.GENERAL_FAMILIES, "accuracy"),
        ("all", {**questions.REGION_FAMILIES, **questions.GENERAL_FAMILIES}, "reward"),
        ("all", {**questions.REGION_FAMILIES, **questions.GENERAL_FAMILIES}, "format"),
    )
]
ROWS += [
    ("DTR region: detection reward", "dtr", questions.REGION_FAMILIES, "detection"),
    ("DTR region: centre error, m", "dtr", questions.REGION_FAMILIES, "center_errors_m"),
]
COLORS = ["#9aa3ad", "#e0a458", "#1a6fc9", "#7b4fb5", "#47772a", "#c2541a"]  # of the columns


def load(pattern):
    """The responses of each seed's evaluation: a list a file."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"{pattern}: no such file; make it with grpo.py, or with eval.py --json")
    return [eval.load_json(file)["responses"] for file in files]


def values(seeds, path, tasks, key):
    """(seeds, questions) of a metric; of the centre errors: (seeds, 1), their median."""
    rows = [
        [
            r[key]
            for r in one
            if r["path"] == path and r["task"] in tasks and r[key] not in (None, [])
        ]
        for one in seeds
    ]
    if key == "center_errors_m":
        rows = [
            [np.median([np.inf if e is None else e for errors in row for e in errors])]
            for row in rows
        ]
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"{key} of {path}: the seeds were asked different questions")
    return np.array(rows, float)


def interval(x):
    """Mean of x (seeds, questions) and the half width of its 95 % interval (see above); one seed: of the questions."""
    seeds, count = x.shape
    if not np.isfinite(x).all():  # a median over mostly missing centres
        return np.nan, np.nan
    of_seeds = (
        T95[min(seeds, len(T95)) - 1] * x.mean(1).std(ddof=1) / seeds**0.5 if seeds > 1 else 0.0
    )
    of_questions = 1.96 * x.mean(0).std(ddof=1) / count**0.5 if count > 1 else 0.0
    return x.mean(), np.hypot(of_seeds, of_questions)


def course(pattern):
    """How the GRPO runs beside the files of a pattern went: {what: (runs, 1)}, of sampled responses.

    The deepest fall is that of the reward, averaged over both paths and ten steps, below its highest value before.
    """
    found = {}
    for file in sorted(glob.glob(pattern)):
        log = os.path.join(os.path.dirname(file), "metrics.jsonl")
        lines = report.log_lines(log) if os.path.isfile(log) else []
        if not any("kept" in line for line in lines):
            raise UserError(f"--course: {log} is not of grpo.py; give only its eval.json")
        steps = lambda key: np.array([line.get(key, np.nan) for line in lines], float)
        both = np.nanmean([steps("lor_reward"), steps("dtr_reward")], 0)
        smooth = np.convolve(both, np.ones(10) / 10, "valid") if len(both) >= 10 else both
        row = {
            f"{path.upper()}: {key}, {name} 10 steps": steps(f"{path}_{key}")[part].mean()
            for path in ("lor", "dtr")
            for key in ("reward", "format")
            for name, part in (("first", slice(10)), ("last", slice(-10, None)))
        }
        row |= {
            "deepest fall of the reward": (np.maximum.accumulate(smooth) - smooth).max(),
            "groups kept": steps("kept").mean(),
            "responses cut off": steps("cut").mean(),
        }
        for name, value in row.items():
            found.setdefault(name, []).append([value])
    return {name: np.array(value) for name, value in found.items()}


def table(title, heads, lines):
    """A table in Markdown. lines: (name, n, [(mean, half width), ...])"""
    print(f"\n| {title} | n | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 2))
    for name, count, cells in lines:
        texts = [number(*cell, "+" * title.startswith("minus")) for cell in cells]
        print(f"| {name} | {count} | " + " | ".join(texts) + " |")


def number(mean, width, sign="+"):
    if not np.isfinite(mean):
        return "–"
    return f"{mean:{sign}.3f}" + (f" ± {width:.3f}" if width else "")  # one run has no width


def seed_by_seed(heads, changes):
    """The changes of the rewards and of the centre error, a seed at a time: (name, [x (seeds, questions), ...])."""
    print(
        f"\n| seed by seed, minus {heads[0]} | "
        + " | ".join(heads[1:])
        + " |\n|"
        + "---|" * len(heads)
    )
    for name, columns in changes:
        cells = [", ".join(number(*interval(one[None])) for one in column) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def text(x, y, words, size=12, anchor="start", color="#333"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{escape(words)}'
        "</text>"
    )


def panel(x, y, width, height, low, high, title):
    """Frame, grid and labels of a panel; and the function from a value to its height on the page."""
    place = lambda value: y + height * (high - value) / (high - low)
    out = text(x, y - 12, title, 13)
    for tick in np.linspace(low, high, 5):
        out += f'<line x1="{x}" x2="{x + width}" y1="{place(tick):.1f}" y2="{place(tick):.1f}" stroke="#e3e6ea"/>'
        out += text(
            x - 6, place(tick) + 4, f"{tick:.2f}".rstrip("0").rstrip("."), 11, "end", "#666"
        )
    return out, place


def curves(pattern, x, y, width, height):
    """Reward of both paths and the detection reward against the steps: mean over the seeds, band from least to most."""
    runs = [report.log_lines(file) for file in sorted(glob.glob(pattern))]
    if not runs:
        raise UserError(f"--curves {pattern}: no such file")
    length = min(map(len, runs))
    lines = {}
    for key, name, color in (
        ("lor_reward", "LOR reward", "#1a6fc9"),
        ("dtr_reward", "DTR reward", "#c2541a"),
        ("dtr_detection", "DTR detection reward", "#47772a"),
    ):
        raw = [[line.get(key, np.nan) for line in one[:length]] for one in runs]
        window = max(1, length // 8)
        lines[name] = (
            color,
            np.array([np.convolve(one, np.ones(window) / window, "valid") for one in raw]),
        )
    low = np.floor(10 * min(np.nanmin(v) for _, v in lines.values())) / 10
    high = np.ceil(10 * max(np.nanmax(v) for _, v in lines.values())) / 10
    out, place = panel(x, y, width, height, low, high, "sampled rewards during GRPO, running mean")
    for i, (name, (color, v)) in enumerate(lines.items()):
        xs = x + width * np.linspace(0, 1, v.shape[1])
        points = lambda ys: " ".join(f"{a:.1f},{place(b):.1f}" for a, b in ys)
        band = [*zip(xs, v.max(0)), *zip(xs[::-1], v.min(0)[::-1])]
        out += f'<polygon points="{points(band)}" fill="{color}" opacity="0.18"/>'
        out += f'<polyline points="{points(zip(xs, v.mean(0)))}" fill="none" stroke="{color}" stroke-width="2"/>'
        out += (
            f'<rect x="{x + 95 * i}" y="{y + height + 26}" width="10" height="10" fill="{color}"/>'
        )
        out += text(x + 14 + 95 * i, y + height + 35, name)
    return (
        out
        + text(x, y + height + 16, "step 0", 11)
        + text(x + width, y + height + 16, str(length), 11, "end")
    )


def bars(heads, lines, x, y, width, height):
    """Means with their intervals: a group of bars a line of the table, a bar a column."""
    out, place = panel(
        x, y, width, height, 0, 1, "greedy answers to held-out questions, 95 % intervals"
    )
    step = width / len(lines)
    each = 0.8 * step / len(heads)
    for i, (name, _, cells) in enumerate(lines):
        for k, ((mean, half), color) in enumerate(zip(cells, COLORS)):
            left, top = x + step * (i + 0.1) + k * each, place(mean)
            out += (
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.9 * each:.1f}" height="{place(0) - top:.1f}" '
                f'fill="{color}"/>'
            )
            middle, ends = (
                left + 0.45 * each,
                (place(max(mean - half, 0)), place(min(mean + half, 1))),
            )
            out += (
                f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="#222" '
                'stroke-width="1.5"/>'
            )
        for row, words in enumerate(name.split(": ")):
            out += text(x + step * (i + 0.5), y + height + 16 + 13 * row, words, 11, "middle")
    for k, (head, color) in enumerate(zip(heads, COLORS)):
        out += (
            f'<rect x="{x + 130 * k}" y="{y + height + 44}" width="10" height="10" fill="{color}"/>'
        )
        out += text(x + 14 + 130 * k, y + height + 53, head)
    return out


def draw(path, heads, lines, pattern):
    shown = [line for line in lines if not line[0].endswith(("format", "m"))]
    body = bars(heads, shown, 400 if pattern else 50, 50, 560, 220)
    body += curves(pattern, 50, 50, 290, 220) if pattern else ""
    width = 980 if pattern else 630
    with open(path, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 340" font-family="sans-serif">'
            f'<rect width="{width}" height="340" fill="white"/>{body}</svg>\n'
        )
    print(f"\nfigure: {path}")


def show():
    """The command line: the tables, and the figure if asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "columns", nargs="+", metavar="NAME=PATTERN", help="evaluations, one file a seed"
    )
    parser.add_argument("--curves", default="", help="metrics.jsonl of the GRPO runs, a pattern")
    parser.add_argument("--figure", default="", help="SVG file to draw")
    parser.add_argument("--course", action="store_true", help="also how each GRPO run went")
    args = parser.parse_args()
    if not all("=" in column for column in args.columns):
        raise UserError('columns: need NAME=PATTERN, such as "GRPO=out/grpo_*/eval.json"')
    heads, patterns = zip(*(column.split("=", 1) for column in args.columns))
    found, lines, changes = [load(pattern) for pattern in patterns], [], []
    same = len({tuple((r["path"], r["id"]) for r in one) for seeds in found for one in seeds}) == 1
    print("seeds: " + ", ".join(f"{head} {len(seeds)}" for head, seeds in zip(heads, found)))
    for name, *what in ROWS:
        all_values = [values(seeds, *what) for seeds in found]
        if not all(x.size for x in all_values):
            continue
        count = sum(r["path"] == what[0] and r["task"] in what[1] for r in found[0][0])
        lines.append((name, count, [interval(x) for x in all_values]))
        if same and all(
            x.shape == all_values[0].shape and np.isfinite(x).all() for x in all_values
        ):
            changes.append((name, count, [x - all_values[0] for x in all_values[1:]]))
    table("mean", heads, lines)
    if heads[1:] and not same:
        print("\nthe columns answer different questions: no differences")
    elif heads[1:]:
        table(
            f"minus {heads[0]}",
            heads[1:],
            [(name, n, [interval(x) for x in minus]) for name, n, minus in changes],
        )
        if len(found[0]) > 1:
            seed_by_seed(
                heads,
                [
                    (name, minus)
                    for name, _, minus in changes
                    if name.endswith(("reward", "error, m"))
                ],
            )
    if args.course:
        runs = {
            head: course(pattern)
            for head, pattern in zip(heads, patterns)
            if not pattern.endswith("eval_cold_start.json")
        }  # beside GRPO's, before it
        table(
            "during GRPO",
            list(runs),
            [
                (name, len(found[0]), [interval(one[name]) for one in runs.values()])
                for name in next(iter(runs.values()), [])
            ],
        )
    for head, seeds in zip(heads, found):
        both = [
            (pool, *(values(seeds, path, tasks, "accuracy") for path in ("lor", "dtr")))
            for pool, tasks in (
                ("region", questions.REGION_FAMILIES),
                ("general", questions.GENERAL_FAMILIES),
            )
        ]
        print(
            f"{head}: accuracy of DTR minus LOR"
            + "".join(
                "  {} {:+.3f} ± {:.3f}".format(pool, *interval(dtr - lor))
                for pool, lor, dtr in both
                if lor.size and lor.shape == dtr.shape
            )
        )
    if args.figure:
        draw(args.figure, heads, lines, args.curves)


def main():
    run_main(show)


if __name__ == "__main__":
    main()
