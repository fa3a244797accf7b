"""Rewards for GRPO: how good is a response? Standard library only.

Text and plain dicts in, numbers in [0, 1] out. The paths are LOR (language-only reasoning) and DTR
(detect-then-reason: 3D coordinates first).

    LOR, or DTR without centres    total = 0.8 accuracy + 0.2 format
    DTR with centres               total = 0.8 accuracy + 0.1 format + 0.1 detection

The formulas are the paper's (SR-REAL, arXiv 2606.17539). What differs from the released reward;
test_rewards.py lists every case:
1. An object left out, a spare box, a box named twice, a box with two names: all cost detection,
   none pays.
2. "nan", "1e999", "1_5" and look-alike digits are no numbers. No reward is NaN, none is outside
   [0, 1].
3. Wrong ground truth raises ValueError, which names the field; a wrong response never raises, it
   scores 0.
4. Time is linear in the response's length: no pattern here can match one text in two ways. Keep
   that.

In this order: the total; accuracy; format; detection; how numbers, letters, motions and boxes are
read.
"""

import math
import re
from numbers import Real

# One more reward: a function below, its name and weight in both of these, its value in total_reward
WEIGHTS = {"accuracy": 0.8, "format": 0.2}
WEIGHTS_WITH_CENTERS = {"accuracy": 0.8, "format": 0.1, "detection": 0.1}

# ----------------------------------------------------------------------------------------------
# the total


def total_reward(response, answer, path, centers=None, images=1, question=""):
    """The sum, with the paper's weights, and its parts.

    -> {"total", "accuracy", "format", "detection"}; detection is None where it does not apply: on
    path "lor", or without centres.
    Known weakness: text around the tags costs the format part only, and a DTR response that skips
    detection still earns 0.8 of its accuracy.

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


def weighted(parts):
    """The total of reward parts {name: value}, detection None where it does not apply."""
    weights = WEIGHTS if parts["detection"] is None else WEIGHTS_WITH_CENTERS
    return sum(weight * parts[name] for name, weight in weights.items())


# ----------------------------------------------------------------------------------------------
# accuracy


def accuracy_reward(response, answer):
    """Is the answer right? The kind of the ground truth gives the rule.

    0 unless <answer> is there exactly once.
    choice  1 if the letter is the same, else 0
    number  exp(-2 |x - truth| / (|truth| + 0.01))
    motion  mean of the number rule over the ground truth's axes (right and left are one, signed);
            an axis named twice is wrong, and one that the ground truth lacks is one more axis in
            the mean, and wrong
    text    1 if equal up to case, white space and a final period, else 0
            (ours: the released reward pays 0)
    Known weakness: the constant answer 0 earns exp(-2) = 0.14 by the number rule; close to 0 the
    rule forgives nothing.

    >>> accuracy_reward("<answer>(B) left</answer>", "B")
    1.0
    >>> accuracy_reward("<answer>2.5</answer>", "2.50")
    1.0
    >>> accuracy_reward("<answer>A or B</answer>", "B")
    0.0
    >>> accuracy_reward("<answer>nan</answer>", "2.50")
    0.0
    """
    kind = kind_of(answer)
    truth = answer.strip()
    said = extract_answer(response)
    if said is None:
        return 0.0
    if kind == "choice":
        return float(read_choice(said) == truth.strip("(.)"))
    if kind == "number":
        return closeness(read_number(said), float(truth))
    if kind == "motion":
        return motion_accuracy(read_motion(said), dict(read_motion(truth)))
    return float(plain(said) == plain(truth))


def kind_of(answer):
    """The kind of a ground truth: "choice", "number", "motion" or "text".

    ValueError if it is wrong itself.
    """
    text = answer.strip() if isinstance(answer, str) else ""
    if not VISIBLE.search(plain(text)):
        raise ValueError(f"answer: {answer!r} is empty or no text")
    if NUMBER_LIKE.fullmatch(text):
        if read_number(text) is None:
            raise ValueError(f"answer: {answer!r} is not a finite ASCII decimal number")
        return "number"
    if "move_" in text or "rotate_" in text:
        axes, values = zip(*read_motion(text))
        if None in axes + values or len(set(axes)) < len(axes):
            raise ValueError(
                f"answer: {answer!r} is no camera motion 'move_right:0.4,rotate_up:5' with each "
                "axis once"
            )
        return "motion"
    return "choice" if LETTER.fullmatch(text) else "text"


def closeness(x, truth):
    """The paper's number rule, exp(-2 |x - truth| / (|truth| + 0.01)); 0 where there is no x."""
    if x is None:
        return 0.0
    return math.exp(-2 * abs(x - truth) / (abs(truth) + 0.01))


def motion_accuracy(said, truth):
    """Mean of the number rule over axes; said: [(axis, value), ...], truth: {axis: value}."""
    score = 0.0
    for axis, value in truth.items():
        values = [v for name, v in said if name == axis]
        if len(values) == 1:
            score += closeness(values[0], value)
    # All that could not be read is the axis None: one more, and wrong.
    axes = truth.keys() | {axis for axis, _ in said}
    return score / len(axes)


def plain(text):
    """Text as it is compared: without case, extra white space and a period at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


# ----------------------------------------------------------------------------------------------
# format

SECTIONS = {"lor": ("think", "answer"), "dtr": ("detect", "think", "answer")}
SECTION_TAG = re.compile(r"(</?(?:detect|think|answer)>)")
# What prints: ASCII, or a letter or digit of any script, less four letters that are blank (the
# Hangul fillers).
VISIBLE = re.compile(r"[!-~]|[^\W\u115f\u1160\u3164\uffa0]")


def format_reward(response, path, images=1):
    """1 if the whole response is the path's grammar, every tag once, in order, none empty; else 0.

    LOR is <think>..</think> <answer>..</answer>; DTR has <detect>..</detect> before it, which
    announces N boxes (with several images: and the frame they are in) and lists N. White space
    between the sections is free. Known weakness: only form counts.

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
    # outside, <tag>, inside, </tag>, outside, ...
    pieces = SECTION_TAG.split(response, maxsplit=len(tags) + 1)
    outside = pieces[0::4]
    inside = pieces[2::4]
    if pieces[1::2] != tags or any(text.strip() for text in outside):
        return 0.0
    if not all(VISIBLE.search(text) for text in inside):
        return 0.0
    think_and_answer = inside[-2:]  # no box may stand there
    if any("<3d_box" in text or "</3d_box" in text for text in think_and_answer):
        return 0.0
    if path == "lor":
        return 1.0
    return float(detect_is_whole(response, inside[0], images))


def detect_is_whole(response, detect, images):
    """Does the <detect> block announce as many boxes as it lists, all whole, nothing between?"""
    header = parse_header(response, images)
    boxes = parse_boxes(response)
    if header is None or header[0] != len(boxes):
        return False
    if not all(VISIBLE.search(name) and center for name, _, center in boxes):
        return False
    _, start, listed = detect.partition("<3d_box")
    return not BOX.sub("", start + listed).strip()


# ----------------------------------------------------------------------------------------------
# detection

# (closer than, metres; what that pays)
BINS = ((0.1, 1.0), (0.2, 0.8), (0.3, 0.6), (0.4, 0.4), (0.6, 0.2), (1.0, 0.1))


def detection_reward(response, centers, images=1, question=""):
    """What the centres earn by BINS, divided by the number of objects or boxes, the larger one.

    The bins are the paper's; the release divides by the number of boxes.
    centers: {"red bbox": (x, y, z)} or, with several images, {"red bbox": {frame: (x, y, z)}};
    metres, x right, y down, z forward. With several images the written centres are in the frame
    that the response announces; an object without truth in that frame is missed, and where the
    question says "first image" only frame 0 pays.
    Known weakness: absolute bins make far (outdoor) objects hard to score; a metre is a metre at a
    depth of 2 m and of 80 m.

    >>> box = '<3d_box center="1,0,2.5">oak (red bbox)</3d_box>'
    >>> one = f'<detect>Find 1 relevant objects:{box}</detect>'
    >>> detection_reward(one, {"red bbox": (1.04, 0, 2.46)})
    1.0
    >>> detection_reward(one, {"red bbox": (1, 0, 2.5), "blue bbox": (0, 0, 4)})  # one is left out
    0.5
    """
    errors = center_errors(response, centers, images, question)
    paid = sum(pay_for(error) for error in errors.values() if error is not None)
    return paid / max(len(errors), len(parse_boxes(response)))


def pay_for(error):
    """What a centre earns that is so many metres off."""
    for limit, pay in BINS:
        if error < limit:
            return pay
    return 0.0


def center_errors(response, centers, images=1, question=""):
    """{tag: metres from the predicted to the true centre, None where there is no prediction}.

    The arguments are those of `detection_reward`.
    """
    truth = checked_centers(centers, images)
    frame = frame_of(response, images, question)
    said = {}
    for _, tag, xyz in parse_boxes(response):
        # The first box speaks for its tag, even if its centre is unreadable.
        said.setdefault(tag, xyz)
    errors = {}
    for tag, frames in truth.items():
        errors[tag] = None
        if said.get(tag) and frame in frames:
            errors[tag] = math.dist(said[tag], frames[frame])
    return errors


def frame_of(response, images, question):
    """The image whose camera the written centres are in; None where the response may not say so."""
    if images == 1:
        return 0
    header = parse_header(response, images)
    if header is None:
        return None
    # Any image may be the reference, unless the question names one.
    if "first image" in question.lower() and header[1] != 0:
        return None
    return header[1]


def checked_centers(centers, images):
    """Ground truth as {tag: {frame: (x, y, z)}}, with frame 0 for a single image.

    ValueError names what is wrong.
    """
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
                f"centers[{tag!r}]: {frames!r} must be {{frame: (x, y, z)}}, frames 0 to "
                f"{images - 1}"
            )
        for frame, xyz in frames.items():
            if not is_point(xyz):
                raise ValueError(
                    f"centers[{tag!r}], frame {frame}: {xyz!r} must be three finite numbers "
                    "(metres)"
                )
    return truth


def is_point(xyz):
    """Three finite numbers?"""
    if not isinstance(xyz, (list, tuple)) or len(xyz) != 3:
        return False
    return all(isinstance(value, Real) and math.isfinite(value) for value in xyz)


# ----------------------------------------------------------------------------------------------
# reading a response

# float() also takes nan, inf, 1_5 and the digits of other scripts (\d does too; [0-9] is ASCII).
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
UNREADABLE_BOX = ("", None, None)


def section(response, name):
    """The text inside <name>..</name>; None unless both tags are there once, in this order."""
    if response.count(f"<{name}>") != 1 or response.count(f"</{name}>") != 1:
        return None  # of two answers, no rule could pick one without being gamed
    text, found, _ = response.partition(f"<{name}>")[2].partition(f"</{name}>")
    return text if found else None


def extract_answer(response):
    """The only answer, without white space around it; None if there is none or more than one."""
    text = section(response, "answer")
    return None if text is None else text.strip()


def read_number(text):
    """A finite ASCII decimal, sign and exponent optional -> float.

    None for anything else, such as "3 m", "nan", "1e999".
    """
    text = text.strip()
    # 100 characters are enough for a number and too few for an attack.
    if len(text) > 100 or not NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def read_choice(text):
    """The letter of "A", "A.", "A)", "(A)", "A. left", "(A) left".

    None for "a", "AB", "A or B", "Because".
    """
    head, *rest = text.split(maxsplit=1) or [""]
    if not LETTER.fullmatch(head):
        return None
    if rest and (len(head) == 1 or HEDGE.match(rest[0])):
        return None
    return head.strip("(.)")


def read_motion(text):
    """ "move_right:0.4,rotate_up:5" -> [(axis, signed value), ...]

    The axis or the value is None where it cannot be read.
    """
    motions = []
    # There are five axes: more is no answer, and the rest becomes one unreadable part.
    for part in text.split(",", 10):
        name, _, number = part.partition(":")
        axis, sign = MOTIONS.get(name.strip(), (None, 1))
        value = read_number(number)
        motions.append((axis, None if value is None else sign * value))
    return motions


def parse_header(response, images=1):
    """(number of boxes, reference frame) that the <detect> block announces.

    None where it is not in the grammar.
    """
    detect = section(response, "detect") or ""
    match = HEADER.fullmatch(detect.partition("<3d_box")[0].strip())
    if not match:
        return None
    frame, boxes = match.groups()
    # One image: no frame is named; several: one of them.
    if (frame is None) != (images == 1) or int(frame or 0) >= images:
        return None
    return int(boxes), int(frame or 0)


def parse_boxes(response):
    """The boxes of the only <detect> block: [(name, tag or None, (x, y, z) or None), ...].

    There is one entry for every "<3d_box". A box that cannot be read is ("", None, None), and so is
    each after the hundredth: counted, but not worth the time.

    >>> boxes = '<3d_box center="1,0,2.5">oak (red bbox)</3d_box><3d_box>'
    >>> parse_boxes(f'<detect>Find 2 relevant objects:{boxes}</detect>')
    [('oak', 'red bbox', (1.0, 0.0, 2.5)), ('', None, None)]
    """
    pieces = (section(response, "detect") or "").split("<3d_box")[1:]
    boxes = [UNREADABLE_BOX] * len(pieces)
    for i, piece in enumerate(pieces[:100]):
        match = BOX.match("<3d_box" + piece)
        if match:
            in_double, in_single, words = match.groups()
            boxes[i] = (*split_tag(words.strip()), read_center(in_double or in_single or ""))
    return boxes


def read_center(text):
    """ "1,0,2.5" -> (x, y, z), None unless it is three numbers."""
    center = tuple(read_number(number) for number in text.split(",", 3))
    return center if len(center) == 3 and None not in center else None


def split_tag(words):
    """ "oak (red bbox)" -> name, tag. The tag stands at the end; of two tags neither counts."""
    name, _, last = words.rpartition("(")
    if " bbox)" in name or " point)" in name:
        return words, None
    mark = MARK.fullmatch("(" + last)
    if not mark:
        return words, None
    return name.strip(), mark[1]
