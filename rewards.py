"""Rewards for GRPO: how good is a response? Standard library only.

Text and plain dicts in, numbers in [0, 1] out. The paths are LOR (language-only reasoning) and DTR
(detect-then-reason: 3D coordinates first).

    LOR, or DTR without centres    total = 0.8 accuracy + 0.2 format
    DTR with centres               total = 0.8 accuracy + 0.1 format + 0.1 detection

The formulas are the paper's. What differs from the released reward (test_rewards.py lists every
case):
1. An object left out, a spare box, a box named twice, a box with two names: all cost detection,
   none pays.
2. "nan", "1e999", "1_5" and look-alike digits are no numbers. No reward is NaN, none is outside
   [0, 1].
3. Wrong ground truth raises ValueError, which names the field; a wrong response never raises, it
   scores 0.
4. Time is linear in the response's length: no pattern here can match one text in two ways. Keep
   that.
"""

import math
import re
from numbers import Real

# One more reward: a function below, its name and weight in both of these, its value in
# total_reward.
WEIGHTS = {"accuracy": 0.8, "format": 0.2}
WEIGHTS_WITH_CENTERS = {"accuracy": 0.8, "format": 0.1, "detection": 0.1}
SECTIONS = {"lor": ("think", "answer"), "dtr": ("detect", "think", "answer")}
SECTION_TAG = re.compile(r"(</?(?:detect|think|answer)>)")
# What prints: ASCII, or a letter or digit of any script, less four letters that are blank (the
# Hangul fillers).
VISIBLE = re.compile(r"[!-~]|[^\W\u115f\u1160\u3164\uffa0]")
# float() also takes nan, inf, 1_5 and the digits of other scripts (\d does too; [0-9] is ASCII
# only).
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
NUMBER_LIKE = re.compile(r"[+-]?(?:nan|inf(?:inity)?|[\d_.]+(?:e[+-]?\d+)?)", re.IGNORECASE)
LETTER = re.compile(r"[A-Z][.)]?|\([A-Z]\)")
HEDGE = re.compile(r"(?:or|and)\b|(?:[A-Z][.)]|\([A-Z]\))(?:\s|$)")  # "(A) or (B)" names no letter
MOTIONS = {
    "move_right": ("x", 1),
    "move_left": ("x", -1),
    "move_up": ("y", 1),
    "move_down": ("y", -1),
    "move_forward": ("z", 1),
    "move_backward": ("z", -1),
    "move_back": ("z", -1),
    "rotate_right": ("yaw", 1),
    "rotate_left": ("yaw", -1),
    "rotate_up": ("pitch", 1),
    "rotate_down": ("pitch", -1),
}
# Four digits at most: int() raises on more than 4300.
HEADER = re.compile(
    r"(?:Find|After aligning to the reference frame (0|[1-9][0-9]{0,3}), find)"
    r" (0|[1-9][0-9]{0,3}) relevant objects:"
)
# No < inside, so that a match ends before the next box begins.
BOX = re.compile(r"""<3d_box\s+center\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)')\s*>([^<>]*)</3d_box>""")
MARK = re.compile(r"\(([a-z]+ (?:bbox|point))\)")
BINS = (
    (0.1, 1.0),
    (0.2, 0.8),
    (0.3, 0.6),
    (0.4, 0.4),
    (0.6, 0.2),
    (1.0, 0.1),
)  # closer than (metres) -> reward


def section(response, name):
    """The text inside <name>..</name>; None unless both tags are there exactly once, in this
    order."""
    if response.count(f"<{name}>") != 1 or response.count(f"</{name}>") != 1:
        return None  # of two answers, no rule could pick one without being gamed
    text, found, _ = response.partition(f"<{name}>")[2].partition(f"</{name}>")
    return text if found else None


def extract_answer(response):
    """The only answer, without white space around it; None if there is none or more than one."""
    text = section(response, "answer")
    return None if text is None else text.strip()


def read_number(text):
    """A finite ASCII decimal, sign and exponent optional -> float; None for anything else ("3 m",
    "nan", "1e999")."""
    text = text.strip()  # 100 characters are enough for a number and too few for an attack
    value = float(text) if len(text) <= 100 and NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def read_choice(text):
    """The letter of "A", "A.", "A)", "(A)", "A. left", "(A) left"; None for "a", "AB", "A or B",
    "Because"."""
    head, *rest = text.split(maxsplit=1) or [""]
    if not LETTER.fullmatch(head) or rest and (len(head) == 1 or HEDGE.match(rest[0])):
        return None
    return head.strip("(.)")


def read_motion(text):
    """ "move_right:0.4,rotate_up:5" -> [(axis, signed value), ...]; None for an axis or a value
    that cannot be read."""
    parts = []
    for part in text.split(
        ",", 10
    ):  # five axes: more is no answer, the rest is one unreadable part
        name, _, number = part.partition(":")
        (axis, sign), value = MOTIONS.get(name.strip(), (None, 1)), read_number(number)
        parts.append((axis, None if value is None else sign * value))
    return parts


def parse_header(response, images=1):
    """(number of boxes, reference frame) that the <detect> block announces; None where it is not in
    the grammar."""
    match = HEADER.fullmatch((section(response, "detect") or "").partition("<3d_box")[0].strip())
    if not match or (match[1] is None) != (images == 1) or int(match[1] or 0) >= images:
        return None
    return int(match[2]), int(match[1] or 0)


def parse_boxes(response):
    """[(name, tag or None, (x, y, z) or None), ...]: one entry for every "<3d_box" in the only
    <detect> block.

    The tag ("red bbox", "blue point") stands in parentheses at the end; of two tags in a name
    neither counts. A box that cannot be read is ("", None, None), and so is each after the
    hundredth: counted, but not worth the time.

    >>> parse_boxes('<detect>Find 2 relevant objects:<3d_box center="1,0,2.5">oak (red bbox)</3d_box><3d_box></detect>')
    [('oak', 'red bbox', (1.0, 0.0, 2.5)), ('', None, None)]
    """
    pieces = (section(response, "detect") or "").split("<3d_box")[1:]
    boxes = [("", None, None)] * len(pieces)
    for i, piece in enumerate(pieces[:100]):
        if match := BOX.match("<3d_box" + piece):
            center = tuple(map(read_number, (match[1] or match[2] or "").split(",", 3)))
            name, _, last = match[3].strip().rpartition("(")
            mark = None if " bbox)" in name or " point)" in name else MARK.fullmatch("(" + last)
            boxes[i] = (
                name.strip() if mark else match[3].strip(),
                mark and mark[1],
                center if len(center) == 3 and None not in center else None,
            )
    return boxes


def format_reward(response, path, images=1):
    """1 if the whole response is the path's grammar, every tag once, in order, nothing in it empty;
    else 0.

    LOR <think>..</think> <answer>..</answer>; DTR has <detect>..</detect> before it, which
    announces N boxes (several images: and the frame they are in) and lists N. White space between
    the parts is free. Weak: only form counts.

    >>> format_reward("<think>It is behind the table.</think><answer>B</answer>", "lor")
    1.0
    >>> format_reward("<think> </think><answer>B</answer>", "lor")                   # no reasoning
    0.0
    """
    if path not in SECTIONS or images < 1:
        raise ValueError(
            f"path: {path!r} must be one of {list(SECTIONS)}, and images: {images!r} at least 1"
        )
    tags = [tag for name in SECTIONS[path] for tag in (f"<{name}>", f"</{name}>")]
    parts = SECTION_TAG.split(
        response, maxsplit=len(tags) + 1
    )  # outside, <tag>, inside, </tag>, outside, ...
    outside, inside = parts[0::4], parts[2::4]
    if (
        parts[1::2] != tags
        or any(text.strip() for text in outside)
        or not all(map(VISIBLE.search, inside))
    ):
        return 0.0
    if any("<3d_box" in text or "</3d_box" in text for text in inside[-2:]):
        return 0.0  # a box outside <detect>
    if path == "lor":
        return 1.0
    header, boxes = parse_header(response, images), parse_boxes(response)
    _, start, listed = inside[0].partition("<3d_box")
    return float(
        header is not None
        and header[0] == len(boxes)
        and all(VISIBLE.search(name) and center for name, _, center in boxes)
        and not BOX.sub("", start + listed).strip()
    )  # nothing between the boxes


def kind_of(answer):
    """ "choice", "number", "motion" or "text": the rule for this ground truth. ValueError if it is
    wrong itself."""
    text = answer.strip() if isinstance(answer, str) else ""
    number, motion = NUMBER_LIKE.fullmatch(text), "move_" in text or "rotate_" in text
    axes, values = zip(*read_motion(text))
    if not VISIBLE.search(plain(text)):
        raise ValueError(f"answer: {answer!r} is empty or no text")
    if number and read_number(text) is None:
        raise ValueError(f"answer: {answer!r} is not a finite ASCII decimal number")
    if motion and (None in axes + values or len(set(axes)) < len(axes)):
        raise ValueError(
            f"answer: {answer!r} is no camera motion 'move_right:0.4,rotate_up:5' with each axis once"
        )
    return (
        "choice"
        if LETTER.fullmatch(text)
        else "number"
        if number
        else "motion"
        if motion
        else "text"
    )


def plain(text):
    """Text as it is compared: without case, extra white space and a period at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def closeness(x, truth):
    """The paper's number rule, exp(-2 |x - truth| / (|truth| + 0.01)); 0 where there is no x."""
    return 0.0 if x is None else math.exp(-2 * abs(x - truth) / (abs(truth) + 0.01))


def accuracy_reward(response, answer):
    """Is the answer right? The kind of the ground truth gives the rule; 0 unless <answer> is there
    exactly once.

    choice  1 if the letter is the same, else 0        number  exp(-2 |x - truth| / (|truth| + 0.01))
    motion  mean of the number rule over the ground truth's axes (right and left are one, signed); an axis named twice
            is wrong, one that the ground truth lacks is one more axis in the mean, and wrong
    text    1 if equal up to case, white space and a final period, else 0 (ours: the released reward pays 0)
    Weak: the constant answer 0 earns exp(-2) = 0.14 by the number rule; close to 0 the rule
    forgives nothing.

    >>> accuracy_reward("<answer>(B) left</answer>", "B"), accuracy_reward("<answer>2.5</answer>", "2.50")
    (1.0, 1.0)
    >>> accuracy_reward("<answer>A or B</answer>", "B"), accuracy_reward("<answer>nan</answer>", "2.50")
    (0.0, 0.0)
    """
    kind, truth, said = kind_of(answer), answer.strip(), extract_answer(response)
    if said is None:
        return 0.0
    if kind == "choice":
        return float(read_choice(said) == truth.strip("(.)"))
    if kind == "number":
        return closeness(read_number(said), float(truth))
    if kind == "text":
        return float(plain(said) == plain(truth))
    truth, said, score = dict(read_motion(truth)), read_motion(said), 0.0
    for axis, value in truth.items():
        values = [v for name, v in said if name == axis]
        score += closeness(values[0], value) if len(values) == 1 else 0.0
    return score / len(
        truth.keys() | {axis for axis, _ in said}
    )  # None, the unreadable, is one wrong axis


def checked_centers(centers, images):
    """Ground truth as {tag: {frame: (x, y, z)}}, frame 0 for a single image. ValueError names what
    is wrong."""
    if not isinstance(centers, dict) or not centers:
        raise ValueError(f"centers: {centers!r} must be a dict with at least one object")
    truth = {tag: given if images > 1 else {0: given} for tag, given in centers.items()}
    for tag, frames in truth.items():
        if not MARK.fullmatch(f"({tag})"):
            raise ValueError(
                f"centers[{tag!r}]: the key must be a mark such as 'red bbox' or 'blue point'"
            )
        if not isinstance(frames, dict) or not frames or not set(frames) <= set(range(images)):
            raise ValueError(
                f"centers[{tag!r}]: {frames!r} must be {{frame: (x, y, z)}}, frames 0 to {images - 1}"
            )
        for frame, xyz in frames.items():
            numbers = isinstance(xyz, (list, tuple)) and all(
                isinstance(v, Real) and math.isfinite(v) for v in xyz
            )
            if not numbers or len(xyz) != 3:
                raise ValueError(
                    f"centers[{tag!r}], frame {frame}: {xyz!r} must be three finite numbers (metres)"
                )
    return truth


def center_errors(response, centers, images=1, question=""):
    """{tag: metres from the predicted to the true centre, None where there is no prediction}; see
    detection_reward."""
    truth, frame, said = checked_centers(centers, images), 0, {}
    if images > 1:  # any image may be the reference, unless the question names one
        frame = (parse_header(response, images) or (None, None))[1]
        frame = None if "first image" in question.lower() and frame != 0 else frame
    for _, tag, xyz in parse_boxes(response):
        said.setdefault(
            tag, xyz
        )  # the first box speaks for its tag, even if its centre is unreadable
    return {
        tag: math.dist(said[tag], frames[frame]) if said.get(tag) and frame in frames else None
        for tag, frames in truth.items()
    }


def detection_reward(response, centers, images=1, question=""):
    """Sum over the objects of 1 | .8 | .6 | .4 | .2 | .1 for a centre within .1 | .2 | .3 | .4 | .6
    | 1 m, divided by max(number of objects, number of boxes). The bins are the paper's; the release
    divides by the number of boxes.

    centers: {"red bbox": (x, y, z)} or, several images, {"red bbox": {frame: (x, y, z)}}; metres, x
    right, y down, z forward. Several images: the centres are in the frame that the response
    announces; an object without truth in that frame is missed, and where the question says "first
    image" only frame 0 pays. Weak: absolute bins make far (outdoor) objects hard to score; a metre
    is a metre at a depth of 2 m and of 80 m.

    >>> one = '<detect>Find 1 relevant objects:<3d_box center="1,0,2.5">oak (red bbox)</3d_box></detect>'
    >>> detection_reward(one, {"red bbox": (1.04, 0, 2.46)})
    1.0
    >>> detection_reward(one, {"red bbox": (1, 0, 2.5), "blue bbox": (0, 0, 4)})      # one of two objects left out
    0.5
    """
    errors = center_errors(response, centers, images, question)
    paid = [
        next((pay for limit, pay in BINS if d < limit), 0.0)
        for d in errors.values()
        if d is not None
    ]
    return sum(paid) / max(len(errors), len(parse_boxes(response)))


def weighted(parts):
    """The total of reward parts {name: value}, detection None where it does not apply."""
    weights = WEIGHTS if parts["detection"] is None else WEIGHTS_WITH_CENTERS
    return sum(weight * parts[name] for name, weight in weights.items())


def total_reward(response, answer, path, centers=None, images=1, question=""):
    """{"total", "accuracy", "format", "detection"}: the sum, with the paper's weights, and its
    parts; detection is None where it does not apply (path "lor", or no centres). Weak: text around
    the tags costs the format part only, and a DTR response that skips detection still earns 0.8 of
    its accuracy.

    >>> total_reward("<think>Two chairs, one table.</think><answer>3</answer>", "3", "lor")
    {'total': 1.0, 'accuracy': 1.0, 'format': 1.0, 'detection': None}
    >>> total_reward("<think>Two chairs, one table.</think><answer>3</answer>", "3", "dtr")
    {'total': 0.8, 'accuracy': 1.0, 'format': 0.0, 'detection': None}
    """
    parts = {
        "accuracy": accuracy_reward(response, answer),
        "format": format_reward(response, path, images),
        "detection": None,
    }
    if path == "dtr" and centers:
        parts["detection"] = detection_reward(response, centers, images, question)
    return {"total": weighted(parts), **parts}
