"""The report: one HTML page about one or more evaluations.

    python eval.py --model out/grpo --report out/report.html
    python eval.py --compare out/before.json out/after.json --report out/report.html

grpo.py leaves one beside its model. The page holds accuracy by task and path, the tables, the
distances of predicted centres, the curves of metrics.jsonl, and examples to browse: picture, true
and predicted centres, depth, responses, reward parts. It is a single file: style, script and
pictures are in it. Its own content policy forbids it to load anything else, and to run any script
but that one: whatever a model or a file writes is text.

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D centres first).

In this order: the page; its tables and bars, curves, examples; its style and script. Throughout,
`evaluations` are [(title, table, results), ...], of eval.make_table and eval.answer. A colour is a
class of the style sheet, "p0" to "p3"; later evaluations are more opaque than earlier ones.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
from html import escape

import numpy as np
from PIL import Image

from data import METRICS
from engine import distributed
from engine.output import whole_file
from formats.errors import UserError
from formats.instances import (
    MARK_COLORS,
    centers_of,
    draw_marks,
    intrinsics_of,
    open_depth,
    open_image,
    path_of,
    question_of,
    reference_frame,
)
from formats.scenes import project
from formats.values import are_numbers, is_number
from rewards import parse_boxes
from world.questions import ask_questions
from world.sources import cached_scene
from world.tiny import SIZES

EXAMPLES = 200  # most examples on a page
EXAMPLE_BYTES = 8e6  # most bytes of them together
RIGHT = 0.5  # least accuracy of an answer that counts as right
PATHS = {"lor": "LOR: reasoning in words", "dtr": "DTR: 3D centres first, then reasoning"}
NEAR_TO_FAR = [(250, 230, 140), (220, 110, 80), (110, 40, 110), (20, 15, 50)]  # colours of depth
WHITE = (255, 255, 255)
BAR = 10  # pixels from one accuracy bar to the next
MOST_POINTS = 2000  # of a curve: more points than pixels only make the page heavy

# ----------------------------------------------------------------------------------------------
# the page


def write(path, evaluations, rows=(), runs=()):
    """Write the page to a file, on rank 0. UserError if it can't be written.

    rows: the instances that were asked, where they are at hand; runs: folders with a metrics.jsonl.
    """
    if distributed.rank() > 0:
        return
    page = page_of(evaluations, rows, runs)
    with whole_file(path, "--report") as file:
        file.write(page)
    distributed.say(f"report: {path}, {os.path.getsize(path) / 1e6:.1f} MB")


def page_of(evaluations, rows, runs):
    """The page as a text."""
    training = training_section(runs)  # before the slow parts: a broken log ends the program
    paths = list(dict.fromkeys(line["path"] for _, table, _ in evaluations for line in table))
    counts = "; ".join(f"{title}: {len(results)} responses" for title, _, results in evaluations)
    sections = [
        HEAD,
        f"<h1>Evaluation</h1><p>{escape(counts)}</p>",
        "<h2>Accuracy by task and path</h2>",
        "<p>Bars end at the mean, lines are 95 % intervals.</p>",
        accuracy_bars(evaluations, paths),
        "<h2>Results</h2>",
        "<p>Means ± half a 95 % interval over questions; ",
        "centre error: median over the asked-for objects and its 95 % interval.</p>",
        *(path_table(evaluations, path) for path in paths),
        error_chart(evaluations, paths),
        training,
        examples(evaluations, rows),
        f"<script>{SCRIPT}</script></body></html>\n",
    ]
    return "".join(sections)


# ----------------------------------------------------------------------------------------------
# tables and bars


def lines_of_tables(evaluations):
    """The lines of all tables: {(path, task, index of the evaluation): line}, in their order."""
    lines = {}
    for k, (_, table, _) in enumerate(evaluations):
        for line in table:
            lines[line["path"], line["task"], k] = line
    return lines


def path_table(evaluations, path):
    """The table of a path: a row per task and evaluation."""
    lines = lines_of_tables(evaluations)
    tasks = dict.fromkeys(task for of_path, task, _ in lines if of_path == path)
    body = ""
    for task in tasks:
        for k, (title, _, _) in enumerate(evaluations):
            if (path, task, k) in lines:  # not every evaluation has every task
                body += table_row(title, lines[path, task, k])
    heads = ""
    for head in ("task", "evaluation", "n", *METRICS, "centre error, m"):
        heads += f"<th>{head}</th>"
    caption = escape(PATHS.get(path, path))
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def table_row(title, line):
    """A line of a table, as a row of the page's."""
    cells = [escape(title), escape(str(line["n"]))]
    for key in METRICS:
        cells.append(mean_cell(line[key], line[f"{key}_ci"]))
    cells.append(error_cell(line["center_error_m"], line["center_error_m_ci"]))
    row_class = ' class="pool"' if line["task"] in ("region", "general", "all") else ""
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr{row_class}><th>{escape(line['task'])}</th>{columns}</tr>\n"


def mean_cell(mean, half):
    """A mean and half of its interval; None: the evaluation lacks this part of the reward."""
    return "–" if mean is None else f"{mean:.3f} ±{half:.3f}"


def error_cell(median, interval):
    """The median centre error and its interval; None: infinite, most centres are missing."""
    if median is None:
        return "–"
    low, high = ("∞" if end is None else f"{end:.3f}" for end in interval)
    return f"{median:.3f} [{low}, {high}]"


def legend(entries):
    """What the colours stand for: [(text, colour, opacity), ...]."""
    html = ""
    for text, color, opacity in entries:
        html += f'<span><s class="{color}" style="opacity:{opacity:.2f}"></s>{escape(text)}</span>'
    return f'<p class="legend">{html}</p>'


def accuracy_bars(evaluations, paths):
    """Accuracy with 95 % intervals: a row per task, in it a bar per path and evaluation."""
    lines = lines_of_tables(evaluations)
    kinds = []  # of the bars in a row: path, index of the evaluation, colour, opacity
    for path in paths:
        for k in range(len(evaluations)):
            kinds.append((path, k, path_color(path, paths), (k + 1) / len(evaluations)))
    rows = ""
    for task in dict.fromkeys(task for _, task, _ in lines):
        bars = ""
        for i, (path, k, color, opacity) in enumerate(kinds):
            line = lines.get((path, task, k))
            if line is not None and line["accuracy"] is not None:
                bars += accuracy_bar(evaluations[k][0], line, BAR * i, color, opacity)
        rows += (
            f'<span>{escape(task)}</span><svg height="{BAR * len(kinds)}" role="img" '
            f'aria-label="accuracy, {escape(task)}">{bars}</svg>\n'
        )
    names = []
    for path, k, color, opacity in kinds:
        names.append((f"{path.upper()}, {evaluations[k][0]}", color, opacity))
    scale = "".join(f"<b>{accuracy:g}</b>" for accuracy in (0, 0.25, 0.5, 0.75, 1))
    return (
        f'{legend(names)}<div class="bars">{rows}'
        f'<span></span><div class="scale">{scale}</div></div>\n'
    )


def accuracy_bar(title, line, y, color, opacity):
    """The bar of a line of a table, y pixels from the top, with its interval and a tooltip."""
    mean = line["accuracy"]
    half = line["accuracy_ci"]
    text = f"{line['path'].upper()} {line['task']}, {title}: {mean_cell(mean, half)}, n {line['n']}"
    return (
        f"<g><title>{escape(text)}</title>"
        f'<rect class="{color}" style="opacity:{opacity:.2f}" y="{y}" '
        f'width="{100 * mean:.2f}%" height="8"/>'
        f'<line y1="{y + 4}" y2="{y + 4}" '
        f'x1="{100 * max(mean - half, 0):.2f}%" x2="{100 * min(mean + half, 1):.2f}%"/></g>'
    )


def path_color(path, paths):
    return f"p{paths.index(path) % 4}" if path in paths else "p0"


# ----------------------------------------------------------------------------------------------
# curves


def line_chart(title, x_name, series, top=np.inf, least=0.0, smooth=True):
    """A chart of series, [(text, colour, opacity, xs, ys), ...].

    top: the y axis ends there; least: its smallest height; smooth: the points are drawn thin, and
    over them their running mean.
    """
    xs = np.concatenate([x for _, _, _, x, _ in series])
    ys = np.concatenate([y for _, _, _, _, y in series])
    left, right = xs.min(), xs.max()
    low, high = y_axis(ys, top, least)
    drawn = ""
    for y in ticks(low, high):
        drawn += f'<line x1="{left:g}" x2="{right:g}" y1="{y:.6g}" y2="{y:.6g}"/>'
    for _, color, opacity, x, y in series:
        if smooth:
            drawn += polyline(f"{color} raw", opacity, x, y)
            drawn += polyline(color, opacity, x, running_mean(y))
        else:
            drawn += polyline(color, opacity, x, y)
    # The drawing is stretched to its frame, and texts must not be: the labels are HTML beside it.
    # In SVG y points down, so the drawing is turned over, and its view begins at -high.
    view = f"{left:g} {-high:.6g} {right - left:g} {high - low:.6g}"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot">'
        f'<svg viewBox="{view}" role="img" aria-label="{escape(title)}" preserveAspectRatio="none">'
        f'<g transform="scale(1,-1)">{drawn}</g></svg>{tick_labels(left, right, low, high)}</div>'
        f'<p class="axis">{x_name}</p>{legend(line[:3] for line in series)}</figure>\n'
    )


def y_axis(ys, top, least):
    """The ends of the y axis: a little beyond the values, cut at `top`, at least `least` apart."""
    low = ys.min()
    high = max(low, min(ys.max(), top))
    pad = max(least - (high - low), 0.1 * (high - low), 1e-6) / 2
    return low - pad, high + pad


def ticks(low, high):
    """Round values in [low, high], three to eight of them."""
    tenth = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    steps = (factor * tenth for factor in (1, 2, 5, 10, 20, 50))
    step = next(step for step in steps if (high - low) / step <= 7)
    lowest = math.ceil(low / step - 1e-9)
    highest = math.floor(high / step + 1e-9)
    return [k * step for k in range(lowest, highest + 1)]


def tick_labels(left, right, low, high):
    """The numbers at the axes, placed in per cent of the frame."""
    labels = ""
    for y in ticks(low, high):
        labels += f'<i style="top:{100 * (high - y) / (high - low):.1f}%">{y:.4g}</i>'
    for x in ticks(left, right):
        labels += f'<b style="left:{100 * (x - left) / (right - left):.1f}%">{x:.6g}</b>'
    return labels


def polyline(style, opacity, xs, ys):
    every = -(-len(xs) // MOST_POINTS)
    points = " ".join(f"{x:.6g},{y:.6g}" for x, y in zip(xs[::every], ys[::every]))
    return f'<polyline class="{style}" style="opacity:{opacity:.2f}" points="{points}"/>'


def running_mean(values):
    """Mean of a twentieth of the values around each, of those that there are at the ends."""
    window = np.ones(max(1, len(values) // 20))
    sums = np.convolve(values, window, "same")
    counts = np.convolve(np.ones(len(values)), window, "same")
    return sums / counts


def error_chart(evaluations, paths):
    """Share of the asked-for objects whose predicted centre is within a distance of the true one.

    An object without a prediction never is.
    """
    errors = []  # per evaluation: metres, sorted, infinite without a prediction
    for _, _, results in evaluations:
        listed = [error for result in results for error in result["center_errors_m"]]
        errors.append(np.sort([np.inf if error is None else error for error in listed]))
    predicted = np.concatenate([of_one[of_one < np.inf] for of_one in errors])
    if not len(predicted):
        return ""
    distances = np.linspace(0, max(1.2, np.percentile(predicted, 90)), 121)  # metres
    color = path_color("dtr", paths)
    series = []
    for k, (title, _, _) in enumerate(evaluations):
        count = len(errors[k])
        if count:
            missing = np.isinf(errors[k]).sum()
            text = (
                f"{title}: median {np.median(errors[k]):.3f} m, "
                f"no prediction for {missing} of {count}"
            )
            share = np.searchsorted(errors[k], distances, side="right") / count
            series.append((text, color, (k + 1) / len(evaluations), distances, share))
    title = "Share of the asked-for objects whose predicted centre is within a distance"
    return f"<h2>Centre error</h2>{line_chart(title, 'distance, metres', series, smooth=False)}"


def training_section(runs):
    """The curves of some folders of sft.py and grpo.py, each folder once."""
    charts = "".join(run_charts(folder) for folder in dict.fromkeys(runs))
    return f"<h2>Training</h2>{charts}" if charts else ""


def run_charts(folder):
    """The curves of one folder, against the steps."""
    lines = read_log(folder)
    charts = loss_charts(lines) + reward_charts(lines)
    return f'<h3>{escape(folder)}</h3><div class="charts">{charts}</div>' if charts else ""


def loss_charts(lines):
    """The loss in each phase of sft.py."""
    charts = ""
    for phase in dict.fromkeys(str(line["phase"]) for line in lines if "phase" in line):
        of_phase = [line for line in lines if str(line.get("phase")) == phase]
        loss = curve(of_phase, "loss", "loss", "p2")
        if loss:
            top = 4 * np.median(loss[-1])  # the first losses are far above all others
            charts += line_chart(f"{phase}: loss", "step", [loss], top=top)
    return charts


def reward_charts(lines):
    """The reward of grpo.py and its parts, both paths in one chart."""
    charts = ""
    for key in METRICS:
        curves = []
        for i, path in enumerate(PATHS):
            of_path = curve(lines, f"{path}_{key}", path.upper(), f"p{i}")
            if of_path:
                curves.append(of_path)
        if curves:
            charts += line_chart(f"GRPO: {key}", "step", curves, least=0.1)
    return charts


def curve(lines, key, name, color):
    """A series of a chart, named with the means of its first and last tenth.

    None where there are no two steps with finite values.
    """
    points = []
    for line in lines:
        point = [line["step"], line.get(key)]
        if are_numbers(point, 2):
            points.append(point)
    if len({step for step, _ in points}) < 2:
        return None
    steps, values = np.array(points, float).T
    tenth = -(-len(values) // 10)
    text = f"{name} {values[:tenth].mean():.3f} → {values[-tenth:].mean():.3f}"
    return text, color, 1, steps, values


def read_log(folder):
    """The lines of folder/metrics.jsonl; without that file none, and it says so."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.isfile(path):
        distributed.say(
            f"report: no {path}, so no curves of that run "
            "(--runs names folders of sft.py and grpo.py)"
        )
        return []
    return log_lines(path)


def check_logs(runs):
    """UserError where the log of a folder cannot be read; before the work that a page is about."""
    for folder in runs:
        path = os.path.join(folder, "metrics.jsonl")
        if os.path.isfile(path):
            log_lines(path)


def log_lines(path):
    """The lines of a metrics.jsonl, a dict per step. UserError for a line that is none."""
    lines = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                lines.append(log_line(text, f"{path}: line {number}"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return lines


def log_line(text, where):
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    step = line.get("step") if isinstance(line, dict) else None
    if not isinstance(step, int) or not is_number(step):
        raise UserError(f"{where}: no JSON object with a 'step', a number; remove the line")
    return line


# ----------------------------------------------------------------------------------------------
# examples


def examples(evaluations, rows):
    """Filters, and a card per chosen question."""
    results = evaluations[-1][2]
    cards = example_cards(evaluations, rows)
    earlier = ", + by an earlier evaluation" if len(evaluations) > 1 else ""
    return (
        f"<h2>Examples</h2><p>{len(cards)} of {len(results)} responses, in turn from each task, "
        f"path, right and wrong. Right is an accuracy of {RIGHT} or more: a number within 35 % "
        f"of the truth. ○ true centre, × predicted{earlier}.</p>"
        f"<form>{filters(cards, len(evaluations))}<output></output></form>\n"
        f"{''.join(html for _, _, _, html in cards)}"
        "<nav hidden><button>Back</button><button>Next</button></nav>"
    )


def example_cards(evaluations, rows):
    """The cards of the chosen questions, as they were asked: [(index, task, path, HTML), ...]."""
    row_of = {}
    for i, row in enumerate(rows):
        row_of[str(row.get("id", i)), path_of(row), question_of(row)] = row
    answers_of = []  # per evaluation: title, {question: result}
    for title, _, results in evaluations:
        answers_of.append((title, {question_key(result): result for result in results}))
    cards = []
    size = 0
    for result in chosen(evaluations[-1][2])[:EXAMPLES]:
        key = question_key(result)
        answers = [(title, known[key]) for title, known in answers_of if key in known]
        html = card(answers, row_of.get(key) or embedded_row(result))
        size += len(html.encode(errors="replace"))
        if size > EXAMPLE_BYTES:
            break
        cards.append((result["index"], result["task"], result["path"], html))
    return sorted(cards)


def question_key(result):
    """What tells two questions apart."""
    return str(result["id"]), result["path"], result["question"]


def chosen(results):
    """The results in turn from each kind: task, path, right or wrong."""
    counts = {}
    turns = []
    for index, result in enumerate(results):
        kind = (result["task"], result["path"], verdict(result))
        counts[kind] = counts.get(kind, 0) + 1
        turns.append((counts[kind], index))
    return [results[index] for _, index in sorted(turns)]


def verdict(result):
    return "right" if result["accuracy"] >= RIGHT else "wrong"


def filters(cards, evaluation_count):
    """What the examples can be filtered by; what changed, only if there are several evaluations."""
    values_of = {
        "task": [task for _, task, _, _ in cards],
        "path": [path for _, _, path, _ in cards],
        "answer": ["right", "wrong"],
    }
    if evaluation_count > 1:
        values_of["change"] = ["gained", "lost"]
    html = ""
    for name, values in values_of.items():
        options = "".join(f"<option>{escape(value)}</option>" for value in dict.fromkeys(values))
        html += (
            f'<label>{name} <select name="{name}"><option value="">any</option>{options}'
            "</select></label> "
        )
    return html


def card(answers, row):
    """One example: answers to a question, [(title, result), ...], and its row or None.

    The last answer counts. What changed is its verdict against that of the earliest.
    """
    _, earliest = answers[0]
    _, result = answers[-1]
    change = "none"
    if verdict(earliest) != verdict(result):
        change = "gained" if verdict(result) == "right" else "lost"
    pictures = "no picture at hand"
    if row:
        pictures = figures(row, [answer["response"] for _, answer in answers])
    name = " · ".join([result["path"].upper(), result["task"], str(result["id"])])
    texts = "".join(answer_text(title, answer) for title, answer in answers)
    return (
        f'<article data-task="{escape(result["task"])}" data-path="{escape(result["path"])}" '
        f'data-answer="{verdict(result)}" data-change="{change}">'
        f'<div class="pictures">{pictures}</div>'
        f'<div><p class="soft">{escape(name)}</p><h3>{escape(result["question"])}</h3>'
        f"<p>truth: <strong>{escape(result['answer'])}</strong></p>{texts}</div></article>\n"
    )


def answer_text(title, result):
    """One evaluation's response to a question, with its verdict and its parts of the reward."""
    scores = []
    for key in METRICS:
        if result[key] is not None:
            scores.append(f"{key} {result[key]:.2f}")
    for error in result["center_errors_m"]:
        scores.append("centre not predicted" if error is None else f"centre {error:.2f} m off")
    tags = r"(&lt;/?(?:detect|think|answer)&gt;)"  # escaped, as the whole response is
    response = re.sub(tags, r"<u>\1</u>", escape(result["response"]))
    mark = "✓" if verdict(result) == "right" else "✗"
    return (
        f'<p>{escape(title)} <em class="{verdict(result)}">{mark} {verdict(result)}</em></p>'
        f'<pre tabindex="0">{response}</pre><p class="soft">{" · ".join(scores)}</p>'
    )


def embedded_row(result):
    """The embedded world's question that was answered, drawn again; None if it is another's."""
    made = re.fullmatch(r"synthetic_([0-9]{1,12})/(\w+)/\w+", str(result["id"]))
    if not made:
        return None
    seed = int(made[1])
    wanted = [result["id"], result["question"], result["answer"]]
    for side in sorted(plan["image"] for plan in SIZES.values()):  # the side is not saved
        for row in ask_questions(cached_scene(seed, side), seed, tasks=[made[2]]):
            if [row["id"], question_of(row), row["answer"]] == wanted:
                return row
    return None


# ----------------------------------------------------------------------------------------------
# pictures of an example


def figures(row, responses):
    """The marked picture, true and predicted centres over it; and the depth, if there is one."""
    frame = reference_frame(row)
    image = open_image(row, frame)
    depth = open_depth(row, *image.size, frame)
    centers = centers_drawing(row, responses, image.size)
    marked = draw_marks(image, row, frame)
    few_pixels = max(image.size) < 200
    html = figure(marked, "the picture with its marks", few_pixels, centers)
    if depth is not None:
        html += figure(*depth_picture(depth), few_pixels)
    return html


def figure(picture, words, few_pixels, over=""):
    """A picture, made smaller where it is large, with its caption; over: SVG to lie over it."""
    picture.thumbnail((384, 384))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    encoded = base64.b64encode(file.getvalue()).decode()
    image_class = ' class="few"' if few_pixels else ""  # shown as pixels, not smoothed
    return (
        f'<figure><div class="picture"><img{image_class} src="data:image/jpeg;base64,{encoded}" '
        f'alt="{words}" loading="lazy">{over}</div><figcaption>{words}</figcaption></figure>'
    )


def centers_drawing(row, responses, size):
    """SVG of the centres: o true, x predicted by the last response, + by earlier ones."""
    width, height = size
    arm = max(size) / 32  # pixels
    cross = f"m-{arm:g},-{arm:g}l{2 * arm:g},{2 * arm:g}m0,-{2 * arm:g}l-{2 * arm:g},{2 * arm:g}"
    plus = f"m-{arm:g},0h{2 * arm:g}m-{arm:g},-{arm:g}v{2 * arm:g}"
    shapes = ""
    for number, response in enumerate(responses, 1):
        last = number == len(responses)
        for rgb, true, predicted in center_points(row, response, size):
            if true and last:
                u, v = true
                shapes += with_halo(f'circle cx="{u:.1f}" cy="{v:.1f}" r="{arm:g}"', rgb)
            if predicted:
                u, v = predicted
                shapes += with_halo(f'path d="M{u:.1f},{v:.1f}{cross if last else plus}"', rgb)
    return f'<svg viewBox="0 0 {width} {height}">{shapes}</svg>'


def with_halo(shape, rgb):
    """A shape twice, white below its colour, to be seen on any picture."""
    return f'<{shape} class="halo"/><{shape} stroke="rgb{rgb}"/>'


def center_points(row, response, size):
    """Asked-for centres in the picture: [(rgb of the mark, true, predicted), ...].

    Each is (u, v) in pixels, or None where there is none. size: (width, height) of the picture.
    """
    frame = reference_frame(row)  # the only picture that centres belong to
    camera = intrinsics_of(row, *size, frame)
    predictions = {}
    for _, mark, center in parse_boxes(response):
        predictions.setdefault(mark, center)  # the first box of a mark counts
    points = []
    for mark, center in (centers_of(row) or {}).items():
        if isinstance(center, dict):  # several images: by frame
            center = center.get(frame)
        rgb = MARK_COLORS.get(mark.split()[0], WHITE)
        points.append((rgb, pixel(center, camera), pixel(predictions.get(mark), camera)))
    return points


def pixel(center, camera):
    """Where the camera sees a centre: (u, v); None without a centre in front of it."""
    if center is None or center[2] < 1e-3:
        return None
    u, v = map(float, project(center, camera))
    return (u, v) if max(abs(u), abs(v)) < 1e6 else None  # a drawing bears no larger numbers


def depth_picture(depth):
    """Depth (H, W), metres -> picture, and its range in words.

    Near is light, far is dark; no measurement (NaN) is grey.
    """
    near, far = 0, 1
    if np.isfinite(depth).any():
        near, far = np.nanpercentile(depth, [2, 98])
    share = np.clip((depth - near) / max(far - near, 1e-6), 0, 1)  # 0 near, 1 far
    level = np.nan_to_num(share) * (len(NEAR_TO_FAR) - 1)  # (H, W), index into the colours
    levels = range(len(NEAR_TO_FAR))
    channels = [np.interp(level, levels, channel) for channel in zip(*NEAR_TO_FAR)]
    colors = np.stack(channels, -1)  # (H, W, 3)
    colors[np.isnan(depth)] = 128
    picture = Image.fromarray(colors.astype(np.uint8))
    return picture, f"depth: {near:.1f} m (light) to {far:.1f} m (dark)"


# ----------------------------------------------------------------------------------------------
# style and script. A backslash joins a line with the next one.

SCRIPT = """
const form = document.querySelector("form"), \
fields = [...form.querySelectorAll("select")], size = 10;
const cards = [...document.querySelectorAll("article")], \
[back, next] = document.querySelectorAll("button");
let page;
function show() {                                           \
/* the filters and the page are in the address */
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const f of fields) f.value = \
[...f.options].some(o => o.value === asked.get(f.name)) ? asked.get(f.name) : "";
  const found = cards.filter(card => \
fields.every(f => !f.value || card.dataset[f.name] === f.value));
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
"""
STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59616b; --line: #dde1e6; \
--page: #fff; --card: #f6f7f9;
 --p0: #1a6fc9; --p1: #c2541a; --p2: #47772a; --p3: #7b4fb5; --right: #18733f; --wrong: #b0302b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa3ad; --line: #343a42; \
--page: #14171a;
 --card: #1c2025; --p0: #62aaf2; --p1: #f0935a; --p2: #93c26f; --p3: #b795e6; --right: #6cc992; \
--wrong: #f08a84; } }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--page); \
color: var(--ink);
 font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } \
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; } \
figure { margin: 0; }
h3 { font-size: 1rem; margin: .25rem 0; } \
p { margin: .35rem 0; } \
em { font-style: normal; }
figcaption, .soft, .legend, .axis, i, b { color: var(--soft); \
font: normal .8125rem/1.5 system-ui, sans-serif; }
.p0 { --c: var(--p0) } \
.p1 { --c: var(--p1) } \
.p2 { --c: var(--p2) } \
.p3 { --c: var(--p3) }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; }
.legend s { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; \
background: var(--c); }
.bars { display: grid; grid-template-columns: fit-content(35%) 1fr; gap: .6rem .75rem; \
align-items: center; }
.bars svg { width: 100%; background: repeating-linear-gradient(to right, var(--line) 0 1px, \
transparent 1px 25%); }
.bars rect { fill: var(--c); } \
.bars line { stroke: var(--ink); stroke-width: 1.5px; }
.scale { display: flex; justify-content: space-between; }
.scroll { overflow-x: auto; margin: 1rem 0; } \
table { border-collapse: collapse; font-size: .875rem; min-width: 100%; }
caption { text-align: left; font-weight: 600; } \
.pool { font-weight: 600; } \
thead { color: var(--soft); }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; white-space: nowrap; \
font-weight: inherit;
 border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
tbody th { position: sticky; left: 0; background: var(--page); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); \
gap: 1.5rem; }
.plot { position: relative; height: 12rem; margin: .5rem 1rem 1.4rem 2.8rem; }
.plot svg { width: 100%; height: 100%; border-left: 1px solid var(--line); }
.plot line { stroke: var(--line); } \
.plot polyline { fill: none; stroke: var(--c); stroke-width: 2px; }
.plot .raw { stroke-width: 1px; stroke-opacity: .35; } \
.axis { text-align: center; margin: 0; }
.plot i, .plot b { position: absolute; white-space: nowrap; }
.plot i { right: calc(100% + .4rem); transform: translateY(-50%); } \
.plot b { top: 100%; transform: translateX(-50%); }
form, nav { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; \
margin: 1rem 0; }
select, button { font: inherit; color: inherit; background: var(--card); \
border: 1px solid var(--line);
 border-radius: 6px; padding: .3rem .6rem; } \
button:disabled { opacity: .4; }
article { background: var(--card); border-radius: 10px; padding: 1rem; margin: 1rem 0; \
display: grid; gap: 1rem; }
@media (min-width: 48rem) { article { grid-template-columns: 24rem 1fr; } }
nav[hidden], article[hidden] { display: none; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; align-content: start; }
.picture { position: relative; } \
.picture img { width: 100%; display: block; } \
.few { image-rendering: pixelated; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; fill: none; }
.picture svg * { stroke-width: 2px; } \
.picture svg .halo { stroke: #fff; stroke-width: 4.5px; }
.plot svg *, .picture svg * { vector-effect: non-scaling-stroke; } \
.right { color: var(--right); }
.wrong { color: var(--wrong); } \
pre { white-space: pre-wrap; font: .8125rem/1.5 ui-monospace, monospace;
 margin: .25rem 0; max-height: 24rem; overflow: auto; } \
pre u { color: var(--soft); text-decoration: none; }
"""


def head(title, script, style):
    """The top of a page. Its policy names the only script by its hash, so that no other one runs."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<title>{escape(title)}</title>\
<style>
{style}</style></head><body>
"""


HEAD = head("Evaluation", SCRIPT, STYLE)
