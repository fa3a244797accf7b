"""The report: one HTML page about one or more evaluations (eval.py --report).

Accuracy by task and path, the tables, the distances of predicted centres, the curves of metrics.jsonl, and examples to
browse: picture, true and predicted centres, depth, responses, reward parts. The page is one file: style, script and
pictures are in it, and its own content policy forbids it to load anything else.
"""

import base64
import io
import json
import math
import os
import re
from html import escape

import numpy as np
from PIL import Image

import rewards
from data import METRICS
from engine import distributed
from formats import instances
from formats.errors import UserError
from formats.instances import finite
from formats.scenes import project
from world import questions, sources, tiny

EXAMPLES, EXAMPLE_BYTES = 200, 8e6  # most examples on a page, and most bytes of them together
RIGHT = 0.5  # least accuracy of an answer that counts as right
PATHS = {"lor": "LOR: reasoning in words", "dtr": "DTR: 3D centres first, then reasoning"}
NEAR_TO_FAR = [(250, 230, 140), (220, 110, 80), (110, 40, 110), (20, 15, 50)]  # colours of depth


def cell(value, half):
    return "–" if value is None else f"{value:.3f} ±{half:.3f}"


def path_table(named, path):
    """The table of a path: a line a task and evaluation."""
    lines = {
        (line["task"], k): line
        for k, (_, table, _) in enumerate(named)
        for line in table
        if line["path"] == path
    }
    body = ""
    for task, k in [
        (task, k) for task in dict.fromkeys(task for task, _ in lines) for k in range(len(named))
    ]:
        line, error = lines.get((task, k)), "–"
        if line is None:
            continue
        if line["center_error_m"] is not None:
            low, high = ("∞" if v is None else f"{v:.3f}" for v in line["center_error_m_ci"])
            error = f"{line['center_error_m']:.3f} [{low}, {high}]"
        cells = [
            escape(named[k][0]),
            line["n"],
            *(cell(line[key], line[f"{key}_ci"]) for key in METRICS),
            error,
        ]
        pool = ' class="pool"' if task in ("region", "general", "all") else ""
        body += f"<tr{pool}><th>{escape(task)}</th>{''.join(f'<td>{value}</td>' for value in cells)}</tr>\n"
    heads = "".join(
        f"<th>{head}</th>" for head in ("task", "evaluation", "n", *METRICS, "centre error, m")
    )
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(PATHS.get(path, path))}</caption><thead><tr>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def legend(entries):
    """entries: (text, colour class, opacity), ..."""
    return (
        '<p class="legend">'
        + "".join(
            f'<span><s class="{color}" style="opacity:{opacity:.2f}"></s>{escape(text)}</span>'
            for text, color, opacity in entries
        )
        + "</p>"
    )


def accuracy_bars(named, paths):
    """Accuracy with 95 % intervals: a row a task, in it a bar a path and evaluation."""
    lines = {
        (line["task"], line["path"], k): line
        for k, (_, table, _) in enumerate(named)
        for line in table
    }
    kinds = [
        (path, k, f"p{i % 4}", (k + 1) / len(named))
        for i, path in enumerate(paths)
        for k in range(len(named))
    ]
    rows = ""
    for task in dict.fromkeys(task for task, _, _ in lines):
        bars = ""
        for i, (path, k, color, opacity) in enumerate(kinds):
            line, y = lines.get((task, path, k)), 10 * i
            if line is None or line["accuracy"] is None:
                continue
            mean, half = line["accuracy"], line["accuracy_ci"]
            text = f"{path.upper()} {task}, {named[k][0]}: {cell(mean, half)}, n {line['n']}"
            bars += (
                f'<g><title>{escape(text)}</title><rect class="{color}" style="opacity:{opacity:.2f}" y="{y}" '
                f'width="{100 * mean:.2f}%" height="8"/><line y1="{y + 4}" y2="{y + 4}" '
                f'x1="{100 * max(mean - half, 0):.2f}%" x2="{100 * min(mean + half, 1):.2f}%"/></g>'
            )
        rows += (
            f'<span>{escape(task)}</span><svg height="{10 * len(kinds)}" role="img" '
            f'aria-label="accuracy, {escape(task)}">{bars}</svg>\n'
        )
    scale = "".join(f"<b>{v:g}</b>" for v in (0, 0.25, 0.5, 0.75, 1))
    names = (
        (f"{path.upper()}, {named[k][0]}", color, opacity) for path, k, color, opacity in kinds
    )
    return f'{legend(names)}<div class="bars">{rows}<span></span><div class="scale">{scale}</div></div>\n'


def ticks(low, high):
    """Round values in [low, high], three to eight of them."""
    tenth = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    step = next(m * tenth for m in (1, 2, 5, 10, 20, 50) if (high - low) / (m * tenth) <= 7)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def running_mean(values):
    """Mean of a twentieth of the values around each, of those that there are at the ends."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def line_chart(title, x_name, series, top=np.inf, least=0.0, smooth=True):
    """series: [(text, colour class, opacity, xs, ys), ...]; top: y is cut there; least: smallest height of the y axis;
    smooth: the points are drawn thin and their running mean over them."""
    xs, ys = (np.concatenate([line[k] for line in series]) for k in (3, 4))
    left, right, low, high = xs.min(), xs.max(), ys.min(), min(ys.max(), top)
    pad = max(least - (high - low), 0.1 * (high - low), 1e-6) / 2
    low, high = low - pad, high + pad
    drawn = "".join(
        f'<line x1="{left:g}" x2="{right:g}" y1="{t:.6g}" y2="{t:.6g}"/>' for t in ticks(low, high)
    )
    for _, color, opacity, x, y in series:
        every = -(-len(x) // 2000)  # more points than pixels only make the page heavy
        for kind, values in ((" raw", y), ("", running_mean(y))) if smooth else (("", y),):
            points = " ".join(f"{a:.6g},{b:.6g}" for a, b in zip(x[::every], values[::every]))
            drawn += (
                f'<polyline class="{color}{kind}" style="opacity:{opacity:.2f}" points="{points}"/>'
            )
    width, height = right - left, high - low
    labels = "".join(
        f'<i style="top:{100 * (high - t) / height:.1f}%">{t:.4g}</i>' for t in ticks(low, high)
    )
    labels += "".join(
        f'<b style="left:{100 * (t - left) / width:.1f}%">{t:.6g}</b>' for t in ticks(left, right)
    )
    view = f"{left:g} {-high:.6g} {width:g} {height:.6g}"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot"><svg viewBox="{view}" role="img" '
        f'aria-label="{escape(title)}" preserveAspectRatio="none"><g transform="scale(1,-1)">{drawn}</g></svg>'
        f'{labels}</div><p class="axis">{x_name}</p>{legend(line[:3] for line in series)}</figure>\n'
    )


def error_chart(named, color):
    """Share of the asked-for objects whose predicted centre is within a distance; without a prediction it never is."""
    errors = [
        np.sort([np.inf if e is None else e for r in results for e in r["center_errors_m"]])
        for _, _, results in named
    ]
    known, series = np.concatenate([e[e < np.inf] for e in errors]), []
    if not len(known):
        return ""
    limits = np.linspace(0, max(1.2, np.percentile(known, 90)), 121)
    for k, e in enumerate(errors):
        if len(e):
            text = f"{named[k][0]}: median {np.median(e):.3f} m, no prediction for {np.isinf(e).sum()} of {len(e)}"
            share = np.searchsorted(e, limits, side="right") / len(e)
            series.append((text, color, (k + 1) / len(named), limits, share))
    title = "Share of the asked-for objects whose predicted centre is within a distance"
    return f"<h2>Centre error</h2>{line_chart(title, 'distance, metres', series, smooth=False)}"


def read_log(folder):
    """The lines of folder/metrics.jsonl; without that file none, and it says so."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        distributed.say(
            f"report: no {path}, so no curves of that run (--runs names folders of sft.py and grpo.py)"
        )
        return []
    return log_lines(path)


def log_lines(path):
    """The steps of a metrics.jsonl."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                lines.append(json.loads(text))
                float(lines[-1]["step"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: line {number}: no JSON object with a 'step'; remove the line"
                ) from None
    return lines


def curve(lines, key, name, color):
    """A series of a chart, named with the means of its first and last tenth; None without two steps."""
    found = [
        (line["step"], line[key]) for line in lines if finite([line["step"], line.get(key)], 2)
    ]
    if len({step for step, _ in found}) < 2:
        return None
    x, y = np.array(found, float).T
    tenth = -(-len(y) // 10)
    return f"{name} {y[:tenth].mean():.3f} → {y[-tenth:].mean():.3f}", color, 1, x, y


def run_charts(folder):
    """Loss of each phase of sft.py; reward and its parts, of both paths, of grpo.py; against the steps."""
    lines, charts = read_log(folder), ""
    for phase in dict.fromkeys(str(line["phase"]) for line in lines if "phase" in line):
        loss = curve(
            [line for line in lines if str(line.get("phase")) == phase], "loss", "loss", "p2"
        )
        charts += (
            line_chart(f"{phase}: loss", "step", [loss], top=4 * np.median(loss[-1]))
            if loss
            else ""
        )
    for key in METRICS:
        both = [
            curve(lines, f"{path}_{key}", path.upper(), f"p{i}") for i, path in enumerate(PATHS)
        ]
        charts += (
            line_chart(f"GRPO: {key}", "step", [one for one in both if one], least=0.1)
            if any(both)
            else ""
        )
    return f'<h3>{escape(folder)}</h3><div class="charts">{charts}</div>' if charts else ""


def center_points(row, response, size):
    """Asked-for centres in the picture, size (width, height): [(rgb of the mark, true, predicted), ...], each place
    (u, v) in pixels, or None where there is none."""
    k = instances.reference_frame(row)  # the only picture that centres belong to
    camera = instances.intrinsics_of(row, *size, k)
    centers = {
        mark: at.get(k) if isinstance(at, dict) else at
        for mark, at in (instances.centers_of(row) or {}).items()
    }
    said = {
        mark: center for _, mark, center in reversed(rewards.parse_boxes(response))
    }  # the first box counts

    def place(center):
        if center is None or center[2] < 1e-3:  # not in front of the camera
            return None
        u, v = map(float, project(center, camera))
        return (u, v) if max(abs(u), abs(v)) < 1e6 else None

    return [
        (
            instances.MARK_COLORS.get(mark.split()[0], (255, 255, 255)),
            place(center),
            place(said.get(mark)),
        )
        for mark, center in centers.items()
    ]


def depth_picture(depth):
    """Depth (H, W) metres -> picture, light near, dark far, grey where there is none; and its range in words."""
    near, far = np.nanpercentile(depth, [2, 98]) if np.isfinite(depth).any() else (0, 1)
    place = np.nan_to_num(np.clip((depth - near) / max(far - near, 1e-6), 0, 1)) * (
        len(NEAR_TO_FAR) - 1
    )
    colors = np.stack(
        [np.interp(place, range(len(NEAR_TO_FAR)), c) for c in zip(*NEAR_TO_FAR)], -1
    )  # (H, W, 3)
    colors[np.isnan(depth)] = 128
    return Image.fromarray(
        colors.astype(np.uint8)
    ), f"depth: {near:.1f} m (light) to {far:.1f} m (dark)"


def figures(row, responses):
    """The marked picture with true (o) and predicted centres, x for the last response, + for earlier ones; the depth.
    Each shape is drawn twice, white below its colour, to be seen on any picture."""
    k = instances.reference_frame(row)
    image = instances.open_image(row, k)
    (width, height), depth, shapes = image.size, instances.open_depth(row, *image.size, k), ""
    r, d = max(width, height) / 32, max(width, height) / 16
    cross, plus = (
        f"m-{r:g},-{r:g}l{d:g},{d:g}m0,-{d:g}l-{d:g},{d:g}",
        f"m-{r:g},0h{d:g}m-{r:g},-{r:g}v{d:g}",
    )
    for k, response in enumerate(responses, 1):
        for rgb, true, said in center_points(row, response, image.size):
            last = k == len(responses)
            found = (
                [f'circle cx="{true[0]:.1f}" cy="{true[1]:.1f}" r="{r:g}"'] if true and last else []
            )
            found += (
                [f'path d="M{said[0]:.1f},{said[1]:.1f}{cross if last else plus}"'] if said else []
            )
            shapes += "".join(
                f'<{shape} class="halo"/><{shape} stroke="rgb{rgb}"/>' for shape in found
            )
    pictures = [
        (
            instances.draw_marks(image, row, k),
            "the picture with its marks",
            f'<svg viewBox="0 0 {width} {height}">{shapes}</svg>',
        )
    ]
    html = ""
    for picture, words, over in pictures + (
        [(*depth_picture(depth), "")] if depth is not None else []
    ):
        picture.thumbnail((384, 384))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=88, subsampling=0)
        few = ' class="few"' if max(image.size) < 200 else ""  # few pixels, shown as such
        html += (
            f'<figure><div class="picture"><img{few} src="data:image/jpeg;base64,'
            f'{base64.b64encode(file.getvalue()).decode()}" alt="{words}" loading="lazy">{over}</div>'
            f"<figcaption>{words}</figcaption></figure>"
        )
    return html


def world_row(result):
    """The embedded world's question that a saved response answers, drawn again; None if it is from elsewhere."""
    made = re.fullmatch(r"synthetic_([0-9]{1,12})/(\w+)/\w+", str(result["id"]))
    for side in (
        sorted(plan["image"] for plan in tiny.SIZES.values()) if made else ()
    ):  # which one is not saved
        for row in questions.ask_questions(
            sources.cached_scene(int(made[1]), side), int(made[1]), tasks=[made[2]]
        ):
            if [row["id"], instances.question_of(row), row["answer"]] == [
                result[k] for k in ("id", "question", "answer")
            ]:
                return row
    return None


def verdict(result):
    return "right" if result["accuracy"] >= RIGHT else "wrong"


def card(answers, row):
    """One example: answers [(title, result), ...] of the evaluations to one question; the last one's verdict counts."""
    (_, first), (_, result) = answers[0], answers[-1]
    change = {("wrong", "right"): "gained", ("right", "wrong"): "lost"}.get(
        (verdict(first), verdict(result)), "none"
    )
    html = (
        f'<article data-task="{escape(result["task"])}" data-path="{escape(result["path"])}" '
        f'data-answer="{verdict(result)}" data-change="{change}"><div class="pictures">'
        f"{figures(row, [answer['response'] for _, answer in answers]) if row else 'no picture at hand'}</div><div>"
        f'<p class="soft">{escape(" · ".join([result["path"].upper(), result["task"], str(result["id"])]))}</p>'
        f"<h3>{escape(result['question'])}</h3><p>truth: <strong>{escape(result['answer'])}</strong></p>"
    )
    for title, answer in answers:
        parts = [f"{key} {answer[key]:.2f}" for key in METRICS if answer[key] is not None]
        parts += [
            "centre not predicted" if e is None else f"centre {e:.2f} m off"
            for e in answer["center_errors_m"]
        ]
        response = re.sub(
            r"(&lt;/?(?:detect|think|answer)&gt;)", r"<u>\1</u>", escape(answer["response"])
        )
        mark = "✓✗"[verdict(answer) == "wrong"]
        html += (
            f'<p>{escape(title)} <em class="{verdict(answer)}">{mark} {verdict(answer)}</em></p>'
            f'<pre tabindex="0">{response}</pre><p class="soft">{" · ".join(parts)}</p>'
        )
    return f"{html}</div></article>\n"


def chosen(results):
    """Results in turn from each task, path, right and wrong."""
    seen, turns = {}, []
    for place, result in enumerate(results):
        kind = result["task"], result["path"], verdict(result)
        seen[kind] = seen.get(kind, 0) + 1
        turns.append((seen[kind], place))
    return [results[place] for _, place in sorted(turns)]


def examples(named, rows):
    """Filters, and a card for each chosen question; its row is one of rows, or of the embedded world."""
    at_hand = {
        (str(row.get("id", i)), instances.path_of(row), instances.question_of(row)): row
        for i, row in enumerate(rows)
    }
    key_of = lambda result: (str(result["id"]), result["path"], result["question"])
    known, cards, size = (
        [(title, {key_of(r): r for r in results}) for title, _, results in named],
        [],
        0,
    )
    for result in chosen(named[-1][2])[:EXAMPLES]:
        key = key_of(result)
        made = card(
            [(title, of[key]) for title, of in known if key in of],
            at_hand.get(key) or world_row(result),
        )
        size += len(made.encode(errors="replace"))
        if size > EXAMPLE_BYTES:
            break
        cards.append((result["index"], result["task"], result["path"], made))
    cards, choices = sorted(cards), ""
    fields = {
        "task": [c[1] for c in cards],
        "path": [c[2] for c in cards],
        "answer": ["right", "wrong"],
        "change": ["gained", "lost"],
    }
    for name in list(fields)[: 3 + (len(named) > 1)]:
        options = "".join(
            f"<option>{escape(value)}</option>" for value in dict.fromkeys(fields[name])
        )
        choices += f'<label>{name} <select name="{name}"><option value="">any</option>{options}</select></label> '
    earlier = ", + by an earlier evaluation" if named[1:] else ""
    return (
        f"<h2>Examples</h2><p>{len(cards)} of {len(named[-1][2])} responses, in turn from each task, path, right "
        f"and wrong. Right is an accuracy of {RIGHT} or more: a number within 35 % of the truth. ○ true centre, "
        f"× predicted{earlier}.</p><form>{choices}<output></output></form>\n{''.join(c[3] for c in cards)}"
        "<nav hidden><button>Back</button><button>Next</button></nav>"
    )


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Evaluation</title><style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59616b; --line: #dde1e6; --page: #fff; --card: #f6f7f9;
 --p0: #1a6fc9; --p1: #c2541a; --p2: #47772a; --p3: #7b4fb5; --right: #18733f; --wrong: #b0302b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa3ad; --line: #343a42; --page: #14171a;
 --card: #1c2025; --p0: #62aaf2; --p1: #f0935a; --p2: #93c26f; --p3: #b795e6; --right: #6cc992; --wrong: #f08a84; } }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--page); color: var(--ink);
 font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; } figure { margin: 0; }
h3 { font-size: 1rem; margin: .25rem 0; } p { margin: .35rem 0; } em { font-style: normal; }
figcaption, .soft, .legend, .axis, i, b { color: var(--soft); font: normal .8125rem/1.5 system-ui, sans-serif; }
.p0 { --c: var(--p0) } .p1 { --c: var(--p1) } .p2 { --c: var(--p2) } .p3 { --c: var(--p3) }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; }
.legend s { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; background: var(--c); }
.bars { display: grid; grid-template-columns: fit-content(35%) 1fr; gap: .6rem .75rem; align-items: center; }
.bars svg { width: 100%; background: repeating-linear-gradient(to right, var(--line) 0 1px, transparent 1px 25%); }
.bars rect { fill: var(--c); } .bars line { stroke: var(--ink); stroke-width: 1.5px; }
.scale { display: flex; justify-content: space-between; }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-size: .875rem; min-width: 100%; }
caption { text-align: left; font-weight: 600; } .pool { font-weight: 600; } thead { color: var(--soft); }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; white-space: nowrap; font-weight: inherit;
 border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
tbody th { position: sticky; left: 0; background: var(--page); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
.plot { position: relative; height: 12rem; margin: .5rem 1rem 1.4rem 2.8rem; }
.plot svg { width: 100%; height: 100%; border-left: 1px solid var(--line); }
.plot line { stroke: var(--line); } .plot polyline { fill: none; stroke: var(--c); stroke-width: 2px; }
.plot .raw { stroke-width: 1px; stroke-opacity: .35; } .axis { text-align: center; margin: 0; }
.plot i, .plot b { position: absolute; white-space: nowrap; }
.plot i { right: calc(100% + .4rem); transform: translateY(-50%); } .plot b { top: 100%; transform: translateX(-50%); }
form, nav { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: 1rem 0; }
select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
 border-radius: 6px; padding: .3rem .6rem; } button:disabled { opacity: .4; }
article { background: var(--card); border-radius: 10px; padding: 1rem; margin: 1rem 0; display: grid; gap: 1rem; }
@media (min-width: 48rem) { article { grid-template-columns: 24rem 1fr; } }
nav[hidden], article[hidden] { display: none; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; align-content: start; }
.picture { position: relative; } .picture img { width: 100%; display: block; } .few { image-rendering: pixelated; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; fill: none; }
.picture svg * { stroke-width: 2px; } .picture svg .halo { stroke: #fff; stroke-width: 4.5px; }
.plot svg *, .picture svg * { vector-effect: non-scaling-stroke; } .right { color: var(--right); }
.wrong { color: var(--wrong); } pre { white-space: pre-wrap; font: .8125rem/1.5 ui-monospace, monospace;
 margin: .25rem 0; max-height: 24rem; overflow: auto; } pre u { color: var(--soft); text-decoration: none; }
</style></head><body>
"""
SCRIPT = """<script>
const form = document.querySelector("form"), fields = [...form.querySelectorAll("select")], size = 10;
const cards = [...document.querySelectorAll("article")], [back, next] = document.querySelectorAll("button");
let page;
function show() {                                           /* the filters and the page are in the address */
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const f of fields) f.value = [...f.options].some(o => o.value === asked.get(f.name)) ? asked.get(f.name) : "";
  const found = cards.filter(card => fields.every(f => !f.value || card.dataset[f.name] === f.value));
  page = Math.max(1, Math.min(parseInt(asked.get("page")) || 1, Math.ceil(found.length / size)));
  const shown = found.slice((page - 1) * size, page * size);
  for (const card of cards) card.hidden = !shown.includes(card);
  document.querySelector("output").textContent = "page " + page + ", " + found.length + " examples";
  back.disabled = page === 1;
  next.disabled = page * size >= found.length;
}
function go(to) { location.hash = new URLSearchParams([...new FormData(form), ["page", to]]); }
form.addEventListener("change", () => go(1));
back.addEventListener("click", () => { go(page - 1); form.scrollIntoView(); });
next.addEventListener("click", () => { go(page + 1); form.scrollIntoView(); });
addEventListener("hashchange", show);
document.querySelector("nav").hidden = false;
show();
</script></body></html>
"""


def write(path, named, rows=(), runs=()):
    """The page at path. named: [(title, table, results), ...] of eval.make_table and eval.answer; rows: the instances
    that were asked, where they are at hand; runs: folders with a metrics.jsonl."""
    if distributed.rank():
        return
    paths = list(dict.fromkeys(line["path"] for _, table, _ in named for line in table))
    charts = "".join(map(run_charts, dict.fromkeys(runs)))
    color = f"p{paths.index('dtr') % 4}" if "dtr" in paths else "p0"
    counts = "; ".join(f"{title}: {len(results)} responses" for title, _, results in named)
    page = (
        f"{HEAD}<h1>Evaluation</h1><p>{escape(counts)}</p><h2>Accuracy by task and path</h2><p>Bars end at the "
        f"mean, lines are 95 % intervals.</p>{accuracy_bars(named, paths)}<h2>Results</h2><p>Means ± half a 95 % "
        "interval over questions; centre error: median over the asked-for objects and its 95 % interval.</p>"
        f"{''.join(path_table(named, path) for path in paths)}{error_chart(named, color)}"
        f"{'<h2>Training</h2>' if charts else ''}{charts}{examples(named, rows)}{SCRIPT}"
    ).encode(errors="replace")
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.partial", "wb") as file:
            file.write(page)
        os.replace(f"{path}.partial", path)
    except OSError as error:
        raise UserError(f"--report {path}: cannot write there ({error.strerror})") from None
    distributed.say(f"report: {path}, {len(page) / 1e6:.1f} MB")
