"""One step of GRPO on a page: what is sampled, how it is paid, what the update makes of it.

    python grpo.py --explain step.html                  # with the other flags of a run

grpo.py makes the first step of the run. Of one group on each path the page shows the prompt with
its picture, the G responses with their rewards and advantages, and every token with its numbers.
They are the step's own: grpo.py hands them over where it has computed them (`record_tokens`,
`record_step`); nothing of the loss is computed here. Only groups that `mark` has chosen are
recorded, so that a run without --explain does no more than look for the mark.

It is one file, with the style and the content policy of the report (report.py): whatever a model or
a file writes is text. It reads from top to bottom without its script, which adds the numbers of
single tokens, other colours, and the choice of the path.

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D centres first).
Dimensions: G responses per prompt, N responses of all groups shown, T response tokens.

In this order: what grpo.py calls; what is shown of a group; the page; its style and script.
"""

import math
import os
import statistics
from html import escape

import data
import rewards
from engine import distributed, report
from engine.output import whole_file
from formats.instances import (
    answer_of,
    draw_marks,
    images_of,
    open_image,
    path_of,
    reference_frame,
    text_of,
)

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
CLEAR = 0.15  # a group whose rewards deviate by so much is a clear example
RESPONSES = 16  # most responses of a group that are shown: the best and the worst ones
TOKENS = 1500  # most tokens of a response that are shown
# The numbers of a token, in the order in which the page holds them; see `numbers_of`.
COLUMNS = ("old", "now", "ref", "new", "ratio", "clipped", "k3", "loss", "share")

# ----------------------------------------------------------------------------------------------
# what grpo.py calls


class Witness:
    """Stands where a Keeper does (checkpoint.py) in the one step that is shown: keeps nothing."""

    def __init__(self, settings):
        self.settings = settings

    def begin(self, phase, steps, optimizer):
        """-> the first step and the position in the data."""
        return 0, 0

    def finite(self, loss, norm, rows):
        """Is an update sound?"""
        return math.isfinite(loss) and math.isfinite(norm)


def mark(batches, sampled):
    """Choose and mark what is shown: an instructive group of each path, DTR first.

    batches: the groups of each optimizer step; sampled: all groups. Where none was kept, one that
    was dropped is shown. -> the chosen groups, at least one
    """
    best = {}  # path -> (how instructive, group, optimizer steps before its own)
    for step, groups in enumerate(batches):
        for group in groups:
            path = path_of(group["row"])
            value = instructive(group, step)
            if path not in best or value > best[path][0]:
                best[path] = (value, group, sum(map(bool, batches[:step])))
    shown = []
    for path in ("dtr", "lor"):
        if path in best:
            _, group, earlier = best[path]
            group["record"] = {"earlier": earlier}
            shown.append(group)
    if not shown:
        shown = sampled[:1]
        shown[0]["record"] = {}
    return shown


def instructive(group, step):
    """How much a group has to show, to be compared: clear rewards, several good and several bad
    responses, centres, a later update.

    Before the first optimizer step the policy is the one that sampled: all ratios are 1, and the
    KL is 0. Later there is something to see.
    """
    group_rewards = group["rewards"]
    spread = group_rewards.std().item()
    above = (group_rewards > group_rewards.mean()).sum().item()
    is_mixed = len(group_rewards) <= 4 * min(above, len(group_rewards) - above)
    has_centers = group["parts"][0]["detection"] is not None
    return spread >= CLEAR, is_mixed, has_centers, step, spread


def record_tokens(groups, terms):
    """Keep what an update computed of the tokens of marked groups.

    terms: {name: (N, T) over these groups, or None}. A later pass replaces an earlier one, which
    had weight 0, until `record_step` says that the group's own update is done.
    """
    start = 0
    for group in groups:
        end = start + len(group["mask"])
        if "step" not in group.get("record", {"step": None}):
            for name, values in terms.items():
                if values is not None:
                    group["record"][name] = values[start:end].detach().cpu()
        start = end


def record_step(groups, means, sound):
    """Keep what the optimizer step of marked groups logged; sound: was the update made?"""
    for group in groups:
        if "record" in group:
            group["record"]["step"] = {**means, "sound": sound}


def write(settings, tokenizer, shown, new_logprobs, counts):
    """Write the page to settings.explain, on rank 0. UserError if it can't be written.

    shown: the marked groups; new_logprobs (N, T): of their tokens, after all updates; counts:
    groups sampled and kept, and updates made, of all ranks.
    """
    if distributed.rank() > 0:
        return
    views = []
    start = 0
    for group in shown:
        end = start + len(group["mask"])
        views.append(view_of(group, new_logprobs[start:end].cpu(), tokenizer))
        start = end
    page = page_of(settings, views, counts)
    with whole_file(settings.explain, "--explain") as file:
        file.write(page)
    size = os.path.getsize(settings.explain)
    distributed.say(f"one step, whole: {settings.explain}, {size / 1e6:.1f} MB")


# ----------------------------------------------------------------------------------------------
# what is shown of a group


def view_of(group, new_logprobs, tokenizer):
    """A group as plain Python numbers and texts, its responses from the best to the worst.

    new_logprobs (G, T)
    """
    record = group["record"]
    step = record.get("step")  # None: the group was dropped, no update has seen it
    columns = {"old": group["old_logprobs"].cpu(), "new": new_logprobs}
    if step:
        columns["now"] = record["logprobs"]
        columns["ref"] = record.get("ref_logprobs")
        columns["ratio"] = record["ratio"]
        columns["clipped"] = record["clipped"]
        columns["k3"] = record.get("kl")
        columns["loss"] = record["loss"]
        columns["share"] = record["loss"].double() / step["tokens"]
    responses = []
    for i, text in enumerate(group["texts"]):
        ids = group["tokens"][i][group["mask"][i].bool()].tolist()
        tokens = []
        for t, piece in enumerate(pieces(tokenizer, ids)):
            numbers = {}
            for name, values in columns.items():
                numbers[name] = None if values is None else values[i, t].item()
            tokens.append({"piece": piece, **numbers})
        responses.append(
            {
                "number": i + 1,
                "text": text,
                "parts": group["parts"][i],
                "reward": group["rewards"][i].item(),
                "advantage": group["advantages"][i].item(),
                "tokens": tokens,
            }
        )
    responses.sort(key=lambda response: -response["advantage"])
    return {
        "row": group["row"],
        "path": path_of(group["row"]),
        "step": step,
        "earlier": record.get("earlier", 0),  # optimizer steps before that of the group
        "mean": group["rewards"].mean().item(),
        "deviation": group["rewards"].std().item(),
        "responses": responses,
    }


def pieces(tokenizer, ids):
    """The text of each token. A character of several tokens is written at the last of them."""
    found = []
    waiting = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        # "\ufffd" stands for bytes that are no character yet: four tokens at most.
        is_whole = not text.endswith("\ufffd") or len(waiting) == 4
        found.append(text if is_whole else "")
        if is_whole:
            waiting = []
    return found


def extremes(items, most):
    """The first and the last of a list, in its order; `most` together."""
    if len(items) <= most:
        return items
    return items[: most // 2] + items[len(items) - most // 2 :]


def total(response, name):
    """The sum of a number over the tokens of a response."""
    return sum(token[name] for token in response["tokens"])


def values_of(view, name):
    """A number of every token of a group."""
    return [token[name] for response in view["responses"] for token in response["tokens"]]


def kl_part(view, settings):
    """What the KL adds to the loss of the optimizer step, over the tokens of a group."""
    if view["responses"][0]["tokens"][0]["k3"] is None:
        return 0.0
    return settings.kl * sum(values_of(view, "k3")) / view["step"]["tokens"]


# ----------------------------------------------------------------------------------------------
# numbers in words


def signed(value, digits=2):
    """A number with its sign, and the minus that is as wide as the plus."""
    text = f"{value:+.{digits}f}"
    return plain(0.0, digits) if float(text) == 0 else text.replace("-", "−")


def plain(value, digits=2):
    return f"{value:.{digits}f}".replace("-", "−")


def short(value):
    """A number of any size in three digits: 0.00665, 1.9 × 10⁻⁷."""
    digits, _, power = f"{value:.3g}".partition("e")
    if power:
        digits += f" × 10{str(int(power)).translate(SUPERSCRIPTS)}"
    return digits.replace("-", "−")


def direction(value):
    """What an advantage does: the class of its colour."""
    return "up" if value > 0 else "down" if value < 0 else "still"


ARROWS = {"up": "▲", "down": "▼", "still": "■"}
PUSHES = {"up": "pushed up", "down": "pushed down", "still": "not pushed"}


# ----------------------------------------------------------------------------------------------
# the page


def page_of(settings, views, counts):
    """The page as a text."""
    sections = []
    for k, view in enumerate(views):
        sections.append(group_section(settings, view, f"group{k}"))
    return "".join(
        [
            report.head("One step of GRPO", SCRIPT, report.STYLE + STYLE),
            "<h1>One step of GRPO, whole</h1>",
            lead(settings),
            course(settings, counts),
            choice(views),
            *sections,
            formulas(settings),
            PANEL,
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def lead(settings):
    return (
        f'<p class="lead">The model answers each question {settings.group_size} times. Rules pay '
        "each response. What was paid better than its siblings is made likelier, what was paid "
        "worse is made less likely, and a leash keeps the model near the one that it started "
        "from. This page follows one training step down to the single token; all numbers are "
        "those that the step computed.</p>"
    )


def course(settings, counts):
    """What the whole step did, in four boxes."""
    groups = counts["sampled"]
    G = settings.group_size
    dropped = groups - counts["kept"]
    reason = "too easy or too hard" if settings.filter == "mean" else "rewards all alike"
    boxes = [
        ("Sample", f"{groups * G:,} responses", f"{groups:,} questions × {G}, each a group"),
        ("Score", f"{groups * G:,} rewards", "by rules, from 0 to 1"),
        ("Filter", f"{counts['kept']:,} groups kept", f"{dropped:,} dropped: {reason}"),
        ("Update", f"{counts['updates']} optimizer steps", "each on its share of the groups"),
    ]
    items = ""
    for head, number, words in boxes:
        items += f"<li><b>{head}</b><strong>{number}</strong><span>{words}</span></li>"
    return f'<ol class="course">{items}</ol>'


def choice(views):
    """Buttons, one per group; without the script all groups are there, one below the other."""
    if len(views) < 2:
        return ""
    buttons = ""
    for k, view in enumerate(views):
        name, _, words = report.PATHS[view["path"]].partition(":")
        buttons += f'<button data-group="group{k}" aria-pressed="false">{name}'
        buttons += f"<span>:{words}</span></button>"
    return f'<nav hidden aria-label="Which group?"><span>Follow a group:</span>{buttons}</nav>'


def group_section(settings, view, name):
    """Everything about one group, from the question to what the update changed."""
    steps = [
        question_part(view),
        responses_part(settings, view, name),
        compare_part(settings, view),
    ]
    if view["step"]:
        steps += [push_part(settings, view), hold_part(settings, view)]
    steps.append(after_part(view))
    parts = ""
    for number, (title, body) in enumerate(steps, 1):
        parts += f"<h2><small>{number}</small> {title}</h2>{body}\n"
    tokens = view["step"]["tokens"] if view["step"] else 0
    return (
        f'<section id="{name}" data-tokens="{tokens:.0f}" data-kl="{settings.kl:g}" '
        f'data-low="{1 - settings.clip_low:.6g}" data-high="{1 + settings.clip_high:.6g}" '
        f'data-dual="{settings.dual_clip:g}">'
        f'<p class="path">{report.PATHS[view["path"]]}</p>{parts}</section>\n'
    )


def question_part(view):
    """The picture and the prompt."""
    row = view["row"]
    front, text = data.prompt_text(row, True, len(images_of(row)))
    prompt = escape(front + text)
    question = escape(text_of(row).strip())
    prompt = prompt.replace(question, f"<strong>{question}</strong>")
    for placeholder in ("&lt;image&gt;", "&lt;mask&gt;"):
        prompt = prompt.replace(placeholder, f"<mark>{placeholder}</mark>")
    masks = ""
    if "&lt;mask&gt;" in prompt:
        masks = (
            " <mark>&lt;mask&gt;</mark> is a region token: the picture's features and 3D points "
            "under a mark."
        )
    body = (
        f'<div class="ask"><div class="pictures">{pictures(view)}</div><div>'
        f"<p>The model reads the picture and this prompt.{masks}</p>"
        f'<pre tabindex="0">{prompt}</pre>'
        f"<p>The truth is <strong>{escape(answer_of(row))}</strong>. "
        "The model is not told; only the reward knows.</p></div></div>"
    )
    return "The question", body


def pictures(view):
    """The pictures with their marks; over the reference frame, all written centres."""
    row = view["row"]
    frame = reference_frame(row)
    html = ""
    for i in range(len(images_of(row))):
        image = open_image(row, i)
        over = ""
        words = "the picture, with its marks"
        if i == frame:
            over = centers_drawing(view, image.size)
        if over:
            words = "○ true centre, × where a response puts it: "
            words += "blue is pushed up, orange is pushed down"
        few_pixels = max(image.size) < 200
        html += report.figure(draw_marks(image, row, i), words, few_pixels, over)
    return html


def centers_drawing(view, size):
    """SVG of the true centres, and of those of all responses, in the colour of their advantage."""
    width, height = size
    arm = max(size) / 40  # pixels
    cross = f"m-{arm:g},-{arm:g}l{2 * arm:g},{2 * arm:g}m0,-{2 * arm:g}l-{2 * arm:g},{2 * arm:g}"
    circles = ""
    crosses = ""
    best = view["responses"][0]
    for response in reversed(view["responses"]):  # the best one on top
        color = direction(response["advantage"])
        for rgb, true, predicted in report.center_points(view["row"], response["text"], size):
            if true and response is best:  # the same for all
                u, v = true
                circle = f'circle cx="{u:.1f}" cy="{v:.1f}" r="{1.5 * arm:g}"'
                circles += report.with_halo(circle, rgb)
            if predicted:
                u, v = predicted
                path = f'd="M{u:.1f},{v:.1f}{cross}"'
                number = response["number"]
                crosses += f'<path {path} class="halo"/>'
                crosses += f'<path {path} class="{color}" data-response="{number}"/>'
    if not circles + crosses:
        return ""
    return f'<svg viewBox="0 0 {width} {height}">{circles}{crosses}</svg>'


MODES = {  # what the tokens can be coloured by: {name: (words, what the colour says)}
    "chance": (
        "how unlikely",
        "The stronger the colour, the less likely the token was when it was drawn.",
    ),
    "change": (
        "change",
        "What the whole step made of the token: blue is likelier now, orange is less likely, "
        + "full colour by a tenth or more.",
    ),
    "share": (
        "share of the loss",
        "The token's share of the loss, against the largest of the group: blue is pushed up, "
        + "orange is pushed down.",
    ),
    "k3": (
        "KL",
        "k3, the estimate of the distance to the reference, against the largest of the group.",
    ),
}


def responses_part(settings, view, name):
    """The responses side by side."""
    responses = extremes(view["responses"], RESPONSES)
    count = len(view["responses"])
    of_all = f" Shown are {len(responses)}, the best and the worst." * (count > len(responses))
    radios = ""
    hints = ""
    for mode, (words, hint) in MODES.items():
        if view["step"] is None and mode in ("share", "k3"):
            continue
        if mode == "k3" and not settings.kl:
            continue
        is_first = mode == "chance"
        checked = " checked" * is_first
        radios += (
            f'<label><input type="radio" name="{name}" value="{mode}"{checked}>{words}</label>'
        )
        hints += f'<span data-mode="{mode}"{"" if is_first else " hidden"}>{hint}</span>'
    body = (
        f"<p>At temperature {settings.temperature:g} every token is drawn by the model's own "
        "probabilities, so the responses differ. Most tokens were nearly certain; at the coloured "
        "ones the responses part. The rules then pay each response; from the best to the worst:"
        f"{of_all}</p>"
        f'<fieldset hidden><legend>Colour the tokens by</legend>{radios}<p class="soft">{hints} '
        "Point at a token, tap it, or walk with Tab and the arrow keys: its numbers "
        "appear below.</p></fieldset>"
        f'<div class="cards">{"".join(card(view, response) for response in responses)}</div>'
    )
    return f"{count} responses, and what each is paid", body


def card(view, response):
    """One response: its advantage, its reward, its tokens."""
    color = direction(response["advantage"])
    tokens = response["tokens"]
    shown = "".join(token_html(token, i == 0) for i, token in enumerate(tokens[:TOKENS]))
    if len(tokens) > TOKENS:
        shown += f'<span class="soft"> … and {len(tokens) - TOKENS:,} more tokens</span>'
    number = response["number"]
    return (
        f'<article data-response="{number}" data-advantage="{response["advantage"]:.9g}" '
        f'data-reward="{response["reward"]:.9g}" class="{color}">'
        f"<h3>Response {number} <em>{ARROWS[color]} {PUSHES[color]}</em></h3>"
        f'<p class="paid"><span>reward <b>{plain(response["reward"])}</b></span>'
        f"<span>advantage <b>{signed(response['advantage'])}</b></span></p>"
        f"{reward_bar(response)}"
        f'<div class="tokens" role="group" aria-label="tokens of response {number}">{shown}</div>'
        "</article>\n"
    )


def reward_bar(response):
    """The parts of a reward: a bar, and the sum with its weights."""
    parts = response["parts"]
    bars = ""
    terms = []
    for k, (name, weight) in enumerate(weights_of(response).items()):
        width = 100 * weight * parts[name]
        bars += f'<i class="r{k}" style="width:{width:.2f}%"></i>'
        terms.append(f'<span><s class="r{k}"></s>{name} {weight:g} × {plain(parts[name])}</span>')
    other = ""
    if abs(parts["reward"] - response["reward"]) > 1e-6:  # --detection, or a reward of one's own
        other = f"<span>these add up to {plain(parts['reward'])}; the run's own rule pays "
        other += f"{plain(response['reward'])}</span>"
    return f'<div class="reward">{bars}</div><p class="terms">{" ".join(terms)}{other}</p>'


def token_html(token, is_first):
    """A token with its numbers; the script reads them from data-n."""
    numbers = " ".join(number_text(token.get(name)) for name in COLUMNS)
    chance = math.exp(min(token["old"], 0.0))
    kind = ""
    if not token["piece"]:
        kind = " part"  # of a character
    elif "\n" in token["piece"] and not token["piece"].strip():
        kind = " n"
    # One stop of the Tab key per response, at its first token; arrow keys go on from there.
    stop = 0 if is_first else -1
    return (
        f'<span class="t{kind}" role="button" tabindex="{stop}" data-n="{numbers}" '
        f'style="--x:{80 * (1 - chance):.0f}">{escape(token["piece"])}</span>'
    )


def number_text(value):
    return "-" if value is None else f"{value:.9g}"


def compare_part(settings, view):
    """Mean, deviation, advantages: the formula with its numbers, and a line of rewards."""
    responses = view["responses"]
    mean = view["mean"]
    each = settings.normalize == "each"
    rows = ""
    for r in extremes(responses, RESPONSES):
        color = direction(r["advantage"])
        rows += (
            f"<tr><th>{r['number']}</th><td>{plain(r['reward'], 3)}</td>"
            f"<td>{signed(r['reward'] - mean, 3)}</td>"
            f'<td class="{color}">{signed(r["advantage"], 3)} {ARROWS[color]}</td></tr>'
        )
    tie = ""
    if not any(r["advantage"] for r in responses):
        tie = "<p>All rewards are alike, so every advantage is 0: nothing tells good from bad.</p>"
    dropped = ""
    if not view["step"]:
        dropped = (
            "<p><strong>The filter dropped this group, as every other one of this process:</strong>"
            " no update has seen it. A model with a better cold start, or easier questions, "
            "shows more.</p>"
        )
    body = (
        "<p>A reward alone does not say whether a response was good <em>for this question</em>. "
        f"Its {len(responses) - 1} siblings do: the group's mean is the yardstick, its standard "
        "deviation the unit. No second network has to guess the value of a question.</p>"
        f"{reward_line(view)}"
        f'<div class="formulas">{part_formulas(view) if each else sum_formulas(view)}</div>'
        '<div class="scroll" tabindex="0"><table><thead><tr><th>response</th><th>reward</th>'
        f"<th>− mean</th><th>{'A' if each else '/ deviation = A'}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{tie}{dropped}"
    )
    return "Compared with its siblings", body


def sum_formulas(view):
    """--normalize sum: how the advantages come from the rewards, in numbers."""
    G = len(view["responses"])
    mean = plain(view["mean"])
    some = sorted(view["responses"], key=lambda response: response["number"])[:8]
    dots = " + …" * (G > len(some))
    total_of = " + ".join(plain(r["reward"]) for r in some) + dots
    squares = " + ".join(f"({plain(r['reward'])} − {mean})²" for r in some) + dots
    return (
        f"<p><b>mean</b>({total_of}) / {G} = <strong>{plain(view['mean'], 4)}</strong></p>"
        f"<p><b>deviation</b>√[({squares}) / ({G} − 1)] = "
        f"<strong>{plain(view['deviation'], 4)}</strong></p>"
        "<p><b>advantage</b>A = (reward − mean) / (deviation + 0.000001)</p>"
    )


def part_formulas(view):
    """--normalize each: how the advantages come from the parts of the rewards, in numbers."""
    lines = ""
    for name, weight in weights_of(view["responses"][0]).items():
        values = [r["parts"][name] for r in view["responses"]]
        lines += (
            f"<p><b>{name}</b>weight {weight:g}, mean {plain(statistics.mean(values), 4)}, "
            f"deviation {plain(statistics.stdev(values), 4)}</p>"
        )
    return (
        f"{lines}<p><b>advantage</b>A = Σ weight × (part − mean) / (deviation + 0.000001), the sum "
        "over the parts, then divided by the deviation of these sums over all groups kept</p>"
    )


def weights_of(response):
    """The weights of the parts that a reward has."""
    has_centers = response["parts"]["detection"] is not None
    return rewards.WEIGHTS_WITH_CENTERS if has_centers else rewards.WEIGHTS


def reward_line(view):
    """The rewards on a line, with the mean and one deviation to either side.

    It reaches from 0 to 1, or as far as the rewards of a rule of one's own.
    """
    by_number = sorted(view["responses"], key=lambda response: response["number"])
    low = min([0.0] + [r["reward"] for r in by_number])
    high = max([1.0] + [r["reward"] for r in by_number])

    def place(reward):
        """-> per cent of the line"""
        return 100 * (min(max(reward, low), high) - low) / (high - low)

    dots = ""
    heights = {}  # stretch of the line -> dots that stand there, one above the other
    for r in by_number:
        stretch = round(place(r["reward"]) / 7)
        level = heights.get(stretch, 0)
        heights[stretch] = level + 1
        dots += (
            f'<b class="{direction(r["advantage"])}" style="left:{place(r["reward"]):.2f}%;'
            f'bottom:{1.5 * min(level, 7):.1f}rem">{r["number"]}</b>'
        )
    rem = 1.5 * min(max(heights.values()), 8)
    left = place(view["mean"] - view["deviation"])
    width = place(view["mean"] + view["deviation"]) - left
    return (
        f'<div class="line" role="img" aria-label="rewards from {low:g} to {high:g}">'
        f'<div style="height:{rem:.1f}rem">'
        f'<i class="band" style="left:{left:.2f}%;width:{width:.2f}%"></i>'
        f'<i class="mean" style="left:{place(view["mean"]):.2f}%"></i>{dots}</div>'
        f'<p class="scale"><span>{plain(low, 0)}</span><span>reward; the line is the mean, the '
        f"band one deviation to either side</span><span>{plain(high, 0)}</span></p></div>"
    )


def push_part(settings, view):
    """Why the best goes up and the worst goes down, and what a token adds to the loss."""
    best = view["responses"][0]
    worst = view["responses"][-1]
    tokens = view["step"]["tokens"]
    ratios = values_of(view, "ratio")
    clipped = int(sum(values_of(view, "clipped")))
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    words = ""
    if best["advantage"] > worst["advantage"]:
        words = f"<p>{because(view, best)}</p><p>{because(view, worst)}</p>"
    nothing = "so nothing is clipped here" if not clipped else f"so {clipped} are clipped here"
    moved = (
        "This group is in the first optimizer step, where the model is still the one that sampled"
    )
    if view["earlier"]:
        before = (
            "one optimizer step" if view["earlier"] == 1 else f"{view['earlier']} optimizer steps"
        )
        moved = f"Since it sampled, the model has moved by {before}"
    cost = f"(J − {settings.kl:g} k3)" if settings.kl else "J"
    share = sum(values_of(view, "share"))
    body = (
        f"{words}"
        "<p>Every token of a response carries its A, also the harmless ones. Tokens that good and "
        "bad responses share are pulled both ways and stay; what remains is pushed where the "
        "responses differ. For each token, with w = p / p<sub>old</sub>:</p>"
        '<div class="formulas"><p><b>objective</b> '
        f"J = min(w A, clip(w, {low:g}, {high:g}) A)"
        f"{f', at least {settings.dual_clip:g} A where A is negative'}</p>"
        f"<p><b>loss</b> −{cost} / {tokens:,.0f}, "
        "the tokens of this optimizer step</p></div>"
        "<p>The clip is the seat belt: once a token has become "
        f"{high:g} times as likely (or, going down, {low:g} times), more of it earns nothing, "
        f"until new responses are sampled. {moved}: the ratios of this group lie between "
        f"{plain(min(ratios), 3)} and {plain(max(ratios), 3)}, {nothing}.</p>"
        f"<p>This group's {len(ratios):,} tokens add "
        f'<strong data-group-loss="{share:.9g}">{short(share)}</strong> to the optimizer step\'s '
        f'loss of <strong data-step-loss="{view["step"]["loss"]:.9g}">'
        f"{short(view['step']['loss'])}</strong>. "
        "Do not read progress from it: the advantages of a group sum to 0, and so, nearly, does "
        "the loss. Its slope is what trains.</p>"
    )
    return "Who is pushed up, who down", body


def because(view, response):
    """Why a response has its advantage: the part of the reward that sets it apart."""
    parts = response["parts"]
    siblings = view["responses"]
    gaps = {}  # part -> how far its weighted value is above the group's mean
    means = {}
    for name, weight in weights_of(response).items():
        means[name] = sum(r["parts"][name] for r in siblings) / len(siblings)
        gaps[name] = weight * (parts[name] - means[name])
    name = max(gaps, key=lambda part: abs(gaps[part]))
    above = response["reward"] >= view["mean"]
    color = direction(response["advantage"])
    gap = abs(response["reward"] - view["mean"])
    said = rewards.extract_answer(response["text"])
    answer = f"answers “{escape(said[:80])}”" if said else "gives no answer that can be read"
    return (
        f'<b class="{color}">{ARROWS[color]} Response {response["number"]}</b> {answer} '
        f"(truth: {escape(answer_of(view['row']))}). "
        f"It is paid {plain(response['reward'])}, that is {plain(gap)} "
        f"{'above' if above else 'below'} the mean; "
        f"what sets it apart most is its {name}, {plain(parts[name])} where the group has "
        f"{plain(means[name])} on average. So A = {signed(response['advantage'])}: each of its "
        f"{len(response['tokens'])} tokens is {PUSHES[color]}."
    )


def hold_part(settings, view):
    """What the KL holds."""
    if not settings.kl:
        body = (
            "<p>This run has no reference (<code>--kl 0</code>): nothing but the clip and the "
            "learning rate keeps the model near its start.</p>"
        )
        return "What the KL holds", body
    k3 = values_of(view, "k3")
    held = kl_part(view, settings)
    pushed = sum(abs(share) for share in values_of(view, "share"))
    body = (
        "<p>Rewards see little of a response. Left alone, the model would drift to whatever they "
        "overlook. So each token also pays for its distance to the frozen cold start, the "
        "reference, measured with that one token:</p>"
        '<div class="formulas"><p><b>KL estimate</b> '
        "k3 = p<sub>ref</sub> / p − log(p<sub>ref</sub> / p) − 1, never below 0</p></div>"
        "<p>In this first step of a run the model <em>is</em> the reference until its first "
        f"optimizer step: k3 starts at 0 and is {short(sum(k3) / len(k3))} on average by now, "
        f"{short(max(k3))} at most. With its weight of {settings.kl:g} it adds {short(held)} "
        f"to the loss, where the shares of single tokens come to {short(pushed)} without their "
        "signs. The leash is slack; it tightens as the model walks away, since k3 grows with the "
        "square of the distance.</p>"
    )
    return "What the KL holds", body


def after_part(view):
    """What the updates have changed, response by response."""
    shown = extremes(view["responses"], RESPONSES)
    changes = [total(r, "new") - total(r, "old") for r in shown]
    largest = max([abs(change) for change in changes] + [1e-9])
    rows = ""
    agree = 0
    for response, change in zip(shown, changes):
        color = direction(change)
        agree += change * response["advantage"] > 0
        width = 50 * abs(change) / largest
        left = 50 if change > 0 else 50 - width
        pushed = direction(response["advantage"])
        rows += (
            f'<span>{response["number"]} <b class="{pushed}">{ARROWS[pushed]} '
            f"{signed(response['advantage'])}</b></span>"
            f'<div><i class="{color}" style="left:{left:.2f}%;width:{width:.2f}%"></i></div>'
            f'<span data-change="{change:.9g}">× {factor(change)}</span>'
        )
    verdict = ""
    if view["step"] and view["step"]["sound"]:
        verdict = (
            f"{agree} of {len(shown)} responses moved the way their advantage points. "
            "Not all have to: a response shares tokens with better and worse siblings, and the "
            "same weights serve all questions, so that every other group of the step pulled at "
            "them too. One step moves little; a run has hundreds."
        )
    elif view["step"]:
        verdict = (
            "This group's update was not finite and was left out; any change is of the others."
        )
    else:
        verdict = "Any change comes from groups of other processes."
    body = (
        "<p>The same tokens, scored once more after all optimizer steps of this step: how many "
        "times as likely is each whole response now? (Which tokens moved, the colours of “change” "
        "show above.)</p>"
        '<div class="after"><span>response, A</span><div></div><span>probability</span>'
        f"{rows}</div><p>{verdict}</p>"
    )
    return "What the step changed", body


def factor(change):
    """A change of a log-probability, as the factor of the probability."""
    return f"{math.exp(max(-20.0, min(20.0, change))):.3g}"


def formulas(settings):
    """Where all of this is written, for who wants to go on reading."""
    places = [
        ("sampling", "engine/shared_prefix.py", "rollout"),
        ("rewards", "rewards.py", "total_reward"),
        ("filter", "grpo.py", "keep_group"),
        ("advantages", "grpo.py", "group_advantages"),
        ("ratio, clip, k3, loss", "grpo.py", "grpo_loss"),
        ("optimizer step", "grpo.py", "optimizer_step"),
    ]
    rows = ""
    for what, file, function in places:
        rows += f"<tr><th>{what}</th><td><code>{file} {function}</code></td></tr>"
    return (
        "<h2>Where this is written</h2>"
        f'<div class="scroll" tabindex="0"><table><tbody>{rows}</tbody></table></div>'
        f'<p class="soft">Model {escape(settings.model)}, seed {settings.seed}, learning rate '
        f"{settings.lr:g}, {settings.minibatches} optimizer steps per rollout at most. The groups "
        "shown were chosen for what there is to see: rewards that differ clearly, known centres, a "
        "late optimizer step.</p>"
    )


# ----------------------------------------------------------------------------------------------
# panel, script and style. A backslash joins a line with the next one.

PANEL = """
<aside hidden aria-live="polite">
<p><b data-cell="token"></b> <span class="soft" data-cell="where"></span>\
<button aria-label="Close">×</button></p>
<dl>
<div><dt>sampled</dt><dd data-cell="old"></dd></div>
<div><dt>ratio</dt><dd data-cell="ratio"></dd></div>
<div><dt>objective</dt><dd data-cell="objective"></dd></div>
<div><dt>KL</dt><dd data-cell="k3"></dd></div>
<div><dt>loss share</dt><dd data-cell="share"></dd></div>
<div><dt>after</dt><dd data-cell="new"></dd></div>
</dl></aside>
"""

SCRIPT = (
    "const names = "
    + str(list(COLUMNS)).replace("'", '"')
    + """;
const all = (what, where = document) => [...where.querySelectorAll(what)];
const panel = document.querySelector("aside"), cells = {};
for (const cell of all("[data-cell]", panel)) cells[cell.dataset.cell] = cell;
const tokens = all(".t");
let pinned = null, current = null;
function numbers(token) {
  const values = token.dataset.n.split(" ").map(text => text === "-" ? NaN : Number(text));
  return Object.fromEntries(names.map((name, i) => [name, values[i]]));
}
function text(x, digits) {                                  \
/* with the minus of the page */
  const tiny = x !== 0 && Math.abs(x) < 0.5 * 10 ** -digits;
  return (tiny ? x.toExponential(1) : x.toFixed(digits)).replaceAll("-", "\\u2212");
}
function chance(log) { return text(100 * Math.exp(log), 1) + " %"; }
function fill(token) {
  const n = numbers(token), card = token.closest("article");
  const group = token.closest("section").dataset, piece = token.textContent;
  const a = Number(card.dataset.advantage), place = all(".t", card);
  const kl = Number(group.kl), count = Number(group.tokens).toLocaleString("en");
  cells.token.textContent = piece.trim() || (piece.includes("\\n") ? "new line" : \
piece ? "space" : "part of a character");
  cells.where.textContent = "token " + (place.indexOf(token) + 1) + " of " + place.length + \
", response " + card.dataset.response + ", A = " + text(a, 2);
  cells.old.textContent = "p old = " + chance(n.old) + ", log " + text(n.old, 3);
  cells.new.textContent = chance(n.old) + " \\u2192 " + chance(n.new) + ", log " + \
(n.new > n.old ? "+" : "") + text(n.new - n.old, 4);
  if (Number.isNaN(n.ratio)) {
    for (const name of ["ratio", "objective", "k3", "share"]) \
cells[name].textContent = "no update has seen it";
    return;
  }
  const j = (Number.isNaN(n.k3) ? 0 : kl * n.k3) - n.loss;
  const floored = a < 0 && n.ratio > Number(group.dual);
  cells.ratio.textContent = "w = exp(" + text(n.now, 3) + " + " + text(-n.old, 3) + ") = " + \
text(n.ratio, 4) + ", " + (n.clipped ? "clipped: no push" : floored ? "bounded: no push" \
: "not clipped");
  cells.objective.textContent = "J = " + (n.clipped || floored ? "bound" : text(n.ratio, 4)) + \
" \\u00d7 A = " + text(j, 3);
  cells.k3.textContent = Number.isNaN(n.k3) ? "no reference" : "p ref " + chance(n.ref) + \
", k3 = " + text(n.k3, 5);
  cells.share.textContent = "\\u2212(" + text(j, 3) + \
(kl ? " \\u2212 " + kl + " k3" : "") + ") / " + count + " = " + text(n.share, 6);
}
function show(token) {
  if (current) current.classList.remove("now");
  current = token;
  panel.hidden = !token;
  document.body.classList.toggle("open", !!token);
  const card = token && token.closest("article");
  for (const cross of all("[data-response]", document)) {
    if (cross.tagName === "path") cross.classList.toggle("chosen", !!card && \
cross.closest("section") === card.closest("section") && \
cross.dataset.response === card.dataset.response);
  }
  if (!token) return;
  token.classList.add("now");
  fill(token);
}
function pin(token) {
  pinned = token;
  for (const other of all(".t", token.parentNode)) other.tabIndex = other === token ? 0 : -1;
  show(token);
  token.scrollIntoView({block: "nearest"});                 \
/* not below the panel: scroll-margin */
}
function close() { pinned = null; show(null); }
document.addEventListener("pointerover", event => {
  const token = event.target.closest(".t");
  if (event.pointerType === "mouse" && token) show(token);
});
document.addEventListener("pointerout", event => {
  if (event.pointerType === "mouse" && event.target.closest(".t")) show(pinned);
});
document.addEventListener("click", event => {
  const token = event.target.closest(".t");
  if (token) { if (token === pinned) close(); else pin(token); }
});
document.addEventListener("focusin", event => {
  if (event.target.matches(".t:focus-visible")) pin(event.target);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") close();
  const token = event.target.closest(".t");
  if (!token) return;
  const siblings = all(".t", token.parentNode), at = siblings.indexOf(token);
  const to = {ArrowRight: at + 1, ArrowDown: at + 10, ArrowLeft: at - 1, ArrowUp: at - 10, \
Home: 0, End: siblings.length - 1}[event.key];
  if (event.key === "Enter" || event.key === " ") pin(token);
  else if (to === undefined) return;
  else {
    const next = siblings[Math.max(0, Math.min(siblings.length - 1, to))];
    next.focus();
    pin(next);
  }
  event.preventDefault();
});
panel.querySelector("button").addEventListener("click", close);
function paint(section, mode) {
  const found = all(".t", section), values = found.map(token => {
    const n = numbers(token);
    return mode === "chance" ? 1 - Math.exp(Math.min(n.old, 0)) : \
mode === "change" ? (n.new - n.old) * 10 : n[mode];
  });
  const most = mode === "share" || mode === "k3" ? Math.max(1e-30, ...values.map(Math.abs)) : 1;
  found.forEach((token, i) => {
    const x = values[i] / most;
    token.style.setProperty("--x", Math.round(80 * Math.min(1, Math.abs(x))));
    const sign = mode === "share" ? -x : x, two = mode === "share" || mode === "change";
    token.classList.toggle("up", two && sign > 0);
    token.classList.toggle("down", two && sign < 0);
  });
  for (const hint of all("[data-mode]", section)) hint.hidden = hint.dataset.mode !== mode;
}
for (const field of all("fieldset")) {
  field.hidden = false;
  field.addEventListener("change", event => paint(field.closest("section"), event.target.value));
  paint(field.closest("section"), "chance");
  all("input", field)[0].checked = true;
}
const buttons = all("nav button");
function choose(name) {
  close();
  for (const button of buttons) {
    const chosen = button.dataset.group === name;
    button.setAttribute("aria-pressed", chosen);
    document.getElementById(button.dataset.group).hidden = !chosen;
  }
}
for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.group));
if (buttons.length) {
  document.querySelector("nav").hidden = false;
  choose(buttons[0].dataset.group);
}
"""
)

STYLE = """
:root { --up: var(--p0); --down: var(--p1); }
body { max-width: 78rem; } \
body.open { padding-bottom: 18rem; }
section[hidden], aside[hidden], fieldset[hidden], [data-mode][hidden] { display: none; }
.lead { font-size: 1.1rem; max-width: 50rem; } \
section > p, .ask p { max-width: 50rem; }
.up { --c: var(--up); } \
.down { --c: var(--down); } \
.still { --c: var(--soft); }
h2 small { display: inline-block; min-width: 1.7em; height: 1.7em; font: 600 .95rem/1.7 system-ui; \
text-align: center;
 border-radius: 1em; background: var(--ink); color: var(--page); margin-right: .3rem; }
.course { list-style: none; padding: 0; display: grid; gap: .5rem; \
grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); }
.course li { background: var(--card); border-radius: 10px; padding: .6rem .9rem; display: grid; }
.course strong { font-size: 1.2rem; } \
.course span { color: var(--soft); font-size: .875rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); padding: .5rem 0; }
nav button { cursor: pointer; } \
nav button[aria-pressed=true] { background: var(--ink); color: var(--page); }
.path { color: var(--soft); } \
nav:not([hidden]) ~ section .path { display: none; } \
sub { line-height: 0; } \
mark { background: color-mix(in srgb, var(--p3) 25%, transparent); color: inherit; \
border-radius: 3px; }
.ask { display: grid; gap: 1.25rem; } \
.ask .pictures { grid-template-columns: 1fr; max-width: 24rem; }
@media (min-width: 48rem) { .ask { grid-template-columns: 22rem 1fr; } }
.picture svg .up, .picture svg .down, .picture svg .still { stroke: var(--c); } \
.picture svg .chosen { stroke-width: 5px; }
fieldset { border: 1px solid var(--line); border-radius: 10px; display: flex; flex-wrap: wrap; \
gap: .25rem 1.25rem; margin: 1rem 0; padding: .4rem 1rem .6rem; }
fieldset p { flex-basis: 100%; } \
label { cursor: pointer; padding: .2rem 0; } \
legend { color: var(--soft); font-size: .8125rem; padding: 0 .4rem; }
.cards { display: grid; gap: .9rem; \
grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.cards article { display: block; margin: 0; padding: .8rem .9rem; border-top: 4px solid var(--c); }
.cards h3 { display: flex; justify-content: space-between; gap: .5rem; margin: 0; } \
.cards em { color: var(--c); font-weight: 600; font-size: .875rem; }
.paid { display: flex; justify-content: space-between; } \
.paid b { font: 600 1.05rem system-ui; color: var(--ink); }
.reward { height: .6rem; background: var(--line); border-radius: 3px; overflow: hidden; \
display: flex; }
.reward i { background: var(--c); } \
.r0 { --c: var(--p2); } \
.r1 { --c: color-mix(in srgb, var(--p2) 35%, var(--card)); } \
.r2 { --c: color-mix(in srgb, var(--p2) 70%, var(--ink)); }
.terms { display: flex; flex-wrap: wrap; gap: 0 .7rem; color: var(--soft); font-size: .75rem; }
.terms s { display: inline-block; width: .6rem; height: .6rem; background: var(--c); \
margin-right: .25rem; }
.tokens { font: .875rem/1.75 ui-monospace, monospace; white-space: pre-wrap; margin-top: .5rem; \
max-height: 26rem; overflow: auto; }
.t { --c: var(--p3); background: color-mix(in srgb, var(--c) calc(var(--x) * 1%), transparent); \
border-radius: 3px; cursor: pointer; padding: .1rem 0; scroll-margin: 5rem 0 17rem; }
.t.up { --c: var(--up); } \
.t.down { --c: var(--down); } \
.t:hover, .t.now { outline: 2px solid var(--ink); outline-offset: 0; } \
.t:focus-visible { outline: 3px solid var(--ink); }
.n::before { content: "\\21b5"; color: var(--soft); } \
.part::before { content: "\\00b7"; color: var(--soft); }
.formulas { background: var(--card); border-radius: 10px; padding: .6rem 1rem; margin: .75rem 0; \
font-variant-numeric: tabular-nums; }
.formulas p { padding-left: 6.5rem; text-indent: -6.5rem; } \
.formulas b { display: inline-block; width: 6.5rem; text-indent: 0; } \
td.up, td.down, b.up, b.down, b.still { color: var(--c); font-weight: 600; font-size: inherit; }
.line { margin: 1.5rem 1rem 1rem; } \
.line > div { position: relative; border-bottom: 2px solid var(--soft); }
.line div b { position: absolute; transform: translateX(-50%); width: 1.4rem; height: 1.4rem; \
border-radius: 1rem; background: var(--c);
 color: var(--page); font: 600 .8rem/1.4rem system-ui; text-align: center; }
.line .band, .line .mean { position: absolute; bottom: 0; top: -.5rem; } \
.line .band { background: var(--line); opacity: .6; }
.line .mean { border-left: 2px solid var(--ink); } \
.line .scale { color: var(--soft); font-size: .8125rem; gap: 1rem; text-align: center; }
.after { display: grid; grid-template-columns: auto 1fr auto; gap: .35rem .9rem; \
align-items: center; max-width: 50rem; font-variant-numeric: tabular-nums; }
.after > div { position: relative; height: 1.1rem; } \
.after > div:not(:nth-child(2)) { background: linear-gradient(var(--soft), var(--soft)) center / \
1px 100% no-repeat, var(--card); }
.after i { position: absolute; top: 0; bottom: 0; background: var(--c); border-radius: 2px; }
aside { position: fixed; z-index: 3; inset: auto 0 0; margin: 0 auto; max-width: 78rem; \
background: var(--page); color: var(--ink);
 border: 2px solid var(--ink); border-bottom: 0; border-radius: 12px 12px 0 0; \
padding: .6rem 1rem .8rem; box-shadow: 0 -4px 24px #0004; }
aside p { display: flex; gap: .25rem .75rem; align-items: baseline; flex-wrap: wrap; \
padding-right: 2.5rem; }
aside p b { font: 600 1rem ui-monospace, monospace; color: var(--ink); \
background: var(--card); border-radius: 4px; padding: 0 .4rem; } \
aside button { position: absolute; right: .6rem; top: .5rem; min-width: 2.4rem; }
aside dl { margin: 0; display: grid; gap: .25rem 1.25rem; font-variant-numeric: tabular-nums; \
grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
aside dt { color: var(--soft); font-size: .8125rem; } \
aside dd { margin: 0; }
@media (max-width: 40rem) { aside dl div { display: grid; grid-template-columns: 5rem 1fr; } \
nav button { flex: 1; } \
nav button span { display: none; } \
.formulas p { padding: 0; text-indent: 0; } \
.formulas b { display: block; }
aside dl, aside dd { font-size: .875rem; gap: .1rem; } }
"""
