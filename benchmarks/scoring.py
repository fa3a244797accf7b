"""Scores of the published benchmarks: a response and a row's answer in, a number in [0, 1] out.

Needs the standard library and rewards.py. The answer of a response is the first
<answer>..</answer> after its reasoning, else all that stands there. What differs from the released
scorers:
1. No substring, prefix or letter case makes an answer right: "", "Because" and the article "a" name
   no choice; "(A)", "**A**" and "The answer is A." do. Where the choices are known, also where a
   prompt lists them, the exact words of one are its letter.
2. Camera motion is scored by the truth's axes. An axis that the truth lacks and one that cannot be
   read are one more axis each in the mean, and wrong; one that is named twice is wrong. (The
   released scorer paid 0.66 for "move_right:0" as the answer to a motion on five axes, and 0.6 for
   ten times the true motion.)
3. SpatialRGPT-Bench is scored by rules, not by GPT-4: yes or no; the one region named; the one
   length within 25 %; the clock direction within one hour.
4. Mean relative accuracy counts an error of exactly 0.1 as within 0.1. (The released scorer of
   VSI-Bench rounds some of them the other way: it pays 0.6 for 4 where 5 is true, this one 0.7.)

In this order: the score of a response; which rule a question has; the rules; what they read in a
text, kind by kind; the table.
"""

import math
import re
from collections import deque
from functools import partial
from itertools import islice

from rewards import HEDGE, NUMBER, plain, read_choice, read_motion, read_number


def score(benchmark, response, row):
    """Score of one response; row: "answer", "type", and "choices" where it has them."""
    rule = rule_of(benchmark, row["type"], row["answer"])
    said = undressed(first_answer(response))
    if rule == "choice":
        return choice(said, row["answer"], row.get("choices"))
    return SCORERS[rule](without_lead_in(said), row["answer"])


def first_answer(response):
    """The text of the first <answer>..</answer> after the reasoning, else all that stands there.

    (rewards.extract_answer wants exactly one answer.)
    """
    rest = after_reasoning(response)
    text, found, _ = rest.partition("<answer>")[2].partition("</answer>")
    return (text if found else rest).strip()


REASONING_TAG = re.compile(r"[<◁](/?)(?:think|thinking|reasoning)[>▷]", re.IGNORECASE)


def after_reasoning(response):
    """What follows the last </think>: a draft of the answer may stand before it.

    Nothing where the response was cut off inside of a <think>.
    """
    tags = deque(REASONING_TAG.finditer(response), maxlen=1)
    if not tags:
        return response
    last = tags.pop()
    return response[last.end() :] if last[1] else ""


# ----------------------------------------------------------------------------------------------
# which rule a question has

# The published types by level. Here oc is between an object and the camera, oo between two objects,
# mv is about several views.
SPAR_LEVELS = {
    "low": [
        "depth_prediction_oc",
        "depth_prediction_oc_mv",
        "depth_prediction_oo",
        "depth_prediction_oo_mv",
        "distance_prediction_oc",
        "distance_prediction_oc_mv",
        "distance_prediction_oo",
        "distance_prediction_oo_mv",
    ],
    "middle": ["position_matching", "camera_motion_infer", "view_change_infer"],
    "high": [
        "distance_infer_center_oo",
        "distance_infer_center_oo_mv",
        "obj_spatial_relation_oo",
        "obj_spatial_relation_oc_mv",
        "obj_spatial_relation_oo_mv",
        "spatial_imagination_oc",
        "spatial_imagination_oc_mv",
        "spatial_imagination_oo",
        "spatial_imagination_oo_mv",
    ],
}
VSI_LEVELS = {
    "number": [
        "object_counting",
        "object_abs_distance",
        "object_size_estimation",
        "room_size_estimation",
    ],
    "choice": [
        "object_rel_distance",
        "object_rel_direction_easy",
        "object_rel_direction_medium",
        "object_rel_direction_hard",
        "route_planning",
        "obj_appearance_order",
    ],
}
CV_LEVELS = {"2D": ["Count", "Relation"], "3D": ["Depth", "Distance"]}
LEVELS = {"spar": SPAR_LEVELS, "vsi": VSI_LEVELS, "cvbench": CV_LEVELS}
# SpatialRGPT-Bench: the last word of a type ("left_predicate", "width_data") says which rule.
RGPT_RULES = {"predicate": "verdict", "choice": "region", "data": "length", "direction": "clock"}


def rule_of(benchmark, question_type, answer):
    """ "choice", or a key of SCORERS. KeyError for a type that the benchmark does not have."""
    if benchmark == "spatialrgpt":
        return RGPT_RULES[question_type.split("_")[-1]]
    if benchmark in ("realworldqa", "erqa"):  # their answers are letters, and here and there a word
        return "choice" if read_choice(answer) else "text"
    if level_of(benchmark, question_type) in ("low", "number"):
        return "number"
    return "motion" if question_type == "view_change_infer" else "choice"


def level_of(benchmark, question_type):
    """Level of a type, None where the benchmark has none.

    KeyError for a type that the benchmark does not have.
    """
    if benchmark == "spatialrgpt":
        rule = RGPT_RULES[question_type.split("_")[-1]]
        return "qualitative" if rule in ("verdict", "region") else "quantitative"
    if benchmark not in LEVELS:
        return None
    for level, types in LEVELS[benchmark].items():
        if question_type in types:
            return level
    raise KeyError(question_type)


# ----------------------------------------------------------------------------------------------
# the rules: what was said, and the truth, as text -> a score


def choice(text, truth, choices=()):
    """1 for the letter of the truth (see `letter`), or for the exact words of that choice alone."""
    said = letter(text, choices) or letter_of_words(text, choices)
    right = letter(truth, choices) or letter_of_words(truth, choices)
    return float(said is not None and said == right)


def letter_of_words(text, choices=()):
    """The letter of the only choice with these words; None if there is none, or two."""
    words = plain(without_lead_in(text))
    same = [i for i, choice in enumerate(choices or ()) if plain(choice) == words]
    return letter_of(same[0]) if len(same) == 1 else None


def letter_of(index):
    """Choice 0 is "A"."""
    return chr(ord("A") + index)


def index_of(letter):
    """ "A" is choice 0."""
    return ord(letter) - ord("A")


def relative_accuracy(text, truth):
    return mra(number(text), number(truth))


def mra(value, truth):
    """Mean relative accuracy of a number, 0 for None.

    It is the share of t = 0.50, 0.55, ..., 0.95 at which the relative error is at most 1 - t.
    """
    if value is None:
        return 0.0
    if truth:
        error = abs(value - truth) / abs(truth)
    else:
        error = math.inf if value else 0.0
    passed = [error <= k / 20 + 1e-9 for k in range(1, 11)]  # 1 - t = 0.05, ..., 0.50
    return sum(passed) / 10


def motion(text, truth):
    """Mean of `mra` over the axes on which the truth moves.

    Any other axis that the text names, and any that cannot be read, is one more in the mean, worth
    0; but to name such an axis with the value 0 is true, and costs nothing.
    """
    true_values = {axis: value for axis, value in read_motion(truth) if value}
    # An axis or a value that cannot be read is None, which is not 0 either.
    said = [(axis, value) for axis, value in read_motion(text) if value != 0]
    named = {axis for axis, _ in said}
    total = 0.0
    for axis, true_value in true_values.items():
        values = [value for name, value in said if name == axis]
        if len(values) == 1:
            total += mra(values[0], true_value)
    axes = true_values.keys() | named
    return total / len(axes) if axes else 1.0


def within_quarter(text, truth):
    value = length(text)
    truth = length(truth)
    return float(value is not None and abs(value - truth) <= 0.25 * truth + 1e-9)


def within_hour(text, truth):
    value = hour(text)
    truth = hour(truth)
    return float(value is not None and min((value - truth) % 12, (truth - value) % 12) <= 1)


def reads_the_same(read, text, truth):
    """Does `read` find something in the text, and the same as in the truth?"""
    return float(read(text) is not None and read(text) == read(truth))


# ----------------------------------------------------------------------------------------------
# what an answer is wrapped in

# What is written around an answer: emphasis, code, formulas.
MARKUP = re.compile(r"\*\*|`|\$|(?m:^#+\s)|\\[()]|<\|(?:begin|end)_of_box\|>")
STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
QUOTES = "\"'“”‘’"
# "So the correct answer is: "; no gap is longer than three characters: the time stays linear.
LEAD_IN = (
    r"(?:(?:(?:so|thus|hence|therefore),?\s)?(?:i (?:think|believe)(?: that)?\s)?(?:(?:the|my)\s)?"
    r"(?:(?:correct|right|final|best)\s){0,2}(?:answer|option|choice)(?: to (?:the|this) question)?"
    r"\s{0,3}(?:is\b|would be\b|:|\n)\s{0,3}:?\s{0,3}){1,2}"
)
BEGINS_WITH_LEAD_IN = re.compile(LEAD_IN, re.IGNORECASE)
STATEMENT = re.compile(rf"(?:^|(?<=[.!?,;:\n]))\s{{0,3}}{LEAD_IN}", re.IGNORECASE)


def undressed(text):
    """The text without what marks it up: "**B**", "`B`", "$\\text{B}$" -> "B"."""
    text = MARKUP.sub("", STYLED.sub(r"\1", text)).strip().strip("*")
    if len(text) > 2 and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1]
    return text.strip()


def without_lead_in(text):
    """ "The answer is: 2 m" -> "2 m"; also without the box of "\\boxed{2} m"."""
    text = BOXED.sub(r"\1", text).strip()
    lead_in = BEGINS_WITH_LEAD_IN.match(text)
    return text[lead_in.end() :] if lead_in else text


# ----------------------------------------------------------------------------------------------
# letters and choices

# A letter, what closes it, and the rest of its line.
NAMED = re.compile(
    r"""(?:(?i:option|choice)\s)?[(\["'“]?([A-Z])([)\]"'”]?[.:,;]?)(?=\s|$)(.{0,200})"""
)
CONFIRMED = re.compile(r"(?:because|since|is (?:the )?(?:correct|right|best))\b")
DENIED = re.compile(r"(?:is|was)(?:n['’]t| not| wrong| incorrect| false)\b|can(?:not|['’]t)\b")
LONE_CAPITAL = re.compile(r"\b[A-HJ-Z]\b")  # not the word "I"


def letter(text, choices=()):
    """The letter that a text names, as nobody would misread it; None if there is none, or two.

    It is what the text begins with, what its statements "the answer is .." say, and what it puts
    in a box.
    """
    whole = BOXED.sub(r"\1", text)
    named = {letter_at_start(words, choices) for words in BOXED.findall(text)}
    for statement in STATEMENT.finditer(whole):
        named.add(letter_at_start(whole[statement.end() : statement.end() + 300], choices))
    at_start = letter_at_start(whole, choices)
    if at_start or not named:
        named = named - {None} | {at_start}
    return named.pop() if len(named) == 1 else None


def letter_at_start(text, choices=()):
    """The letter of "B", "(B).", "B. left", "B: left", "Option B", "B is correct".

    None for "A chair", "A or B", "B, A", "(B) is wrong".
    """
    found = NAMED.match(text)
    if not found:
        return None
    said, closing, rest = found.groups()
    rest = rest.strip()
    if not rest:
        another = NAMED.match(text[found.end() :].lstrip())
        return None if another else said
    if not closing and rest[0] in "-–—":
        closing = ":"
        rest = rest[1:].strip()
    if not closing and not CONFIRMED.match(rest):
        return None
    if HEDGE.match(rest) or DENIED.match(rest):
        return None
    if closing[-1:] in (":", ",", ";"):  # "B, A" names two letters, "B: A chair" maybe a choice
        others = set(LONE_CAPITAL.findall(rest)) - {said}
        if others and letter_of_words(rest, choices) != said:
            return None
    return said


def listed_choices(prompt):
    """ "Which? A. left B. right" -> ["left", "right"]; None where a prompt lists no choices."""
    _, *pieces = re.split(r"(?:^|\s)\(?([A-Z])[.)]\s{1,3}", prompt)
    letters = pieces[0::2]
    if len(letters) < 2 or letters != [letter_of(i) for i in range(len(letters))]:
        return None
    # The last one ends with its line, or where the prompt says how to answer.
    words = [*pieces[1:-1:2], re.split(r"\n|\bPlease\b", pieces[-1])[0]]
    return [text.strip() for text in words]


# ----------------------------------------------------------------------------------------------
# lengths

METRES = {  # by unit; an "s" may follow, but for "m"
    **dict.fromkeys(("m", "meter", "metre"), 1),
    **dict.fromkeys(("dm", "decimeter", "decimetre"), 0.1),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 0.01),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 0.001),
    **dict.fromkeys(("km", "kilometer", "kilometre"), 1000),
    **dict.fromkeys(("in", "inch", "inche", '"', "″", "”", "''", "’’"), 0.0254),
    **dict.fromkeys(("ft", "foot", "feet", "'", "′", "’"), 0.3048),
    **dict.fromkeys(("yd", "yard"), 0.9144),
    **dict.fromkeys(("mi", "mile"), 1609.344),
}
VULGAR_FRACTIONS = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
# 1 1/2, 1/2, 1,200 or a number as rewards.NUMBER.
AMOUNT = (
    r"(?:(?:[0-9]{1,9}\s{1,2})?[0-9]{1,9}/[0-9]{1,9}(?![0-9.])"
    rf"|[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?|{NUMBER.pattern})"
)
UNIT = "|".join(sorted(map(re.escape, METRES), key=len, reverse=True))
# "1 to 2 m" and "2 ± 1 m": then a length has two numbers.
OTHER_NUMBER = (
    rf"{AMOUNT}(?:\s{{0,3}}(?:to|or|and|by|x|[-–—~×±]|\+/-)\s{{0,3}}|\s{{1,3}}(?![0-9]+/))"
)
# A unit of letters ends where a word does, and is no area or speed; 6'7" goes on.
END_OF_UNIT = r"(?:(?<=[a-z][a-z])s)?(?:(?<=[a-z])(?![\w^/])|(?<![a-z]))"
# "2 in the picture" holds no inches.
NO_PLACE = (
    r"(?!(?<=in)\s(?:the|an?|this|that|its|all|total|front|size|height|width|length|depth)\b)"
)
LENGTH = re.compile(
    rf"(?<![\w.,/+–—−-])({OTHER_NUMBER})?({AMOUNT})[\s-]{{0,3}}({UNIT}){END_OF_UNIT}{NO_PLACE}",
    re.IGNORECASE,
)
BETWEEN_PARTS = re.compile(r"\.?,?\s{0,3}(?:and\s)?")  # of "3 feet 2 inches"
SAME = 1.02  # two lengths this close are one, in two units
MOST_LENGTHS = 10  # a text with more of them is no answer, and not worth the time


def length(text):
    """The one length in the text, metres; None if there are two, or a range.

    A text that is nothing but a number is in metres. "6 feet 7 inches" is one length, and so are
    two that agree: "2 m (6.56 ft)".
    """
    text = text.translate(VULGAR_FRACTIONS).strip()
    matches = list(islice(LENGTH.finditer(text), MOST_LENGTHS + 1))
    if len(matches) > MOST_LENGTHS:
        return None
    if not matches:
        bare = text.removesuffix(".")
        return amount(bare) if re.fullmatch(AMOUNT, bare) else None
    found = []
    last = None  # match and unit of the length before
    for match in matches:
        other_end_of_range, digits, unit_name = match.groups()
        value = amount(digits)
        if other_end_of_range or value is None:
            return None
        unit = METRES[unit_name.lower()]
        if last and is_next_part(text, *last, match, value * unit):
            found[-1] += value * unit
        else:
            found.append(value * unit)
        last = match, unit
    smallest = min(found)
    return found[0] if smallest >= 0 and max(found) <= SAME * smallest else None


def is_next_part(text, last_match, last_unit, match, metres):
    """Is this length the inches of the feet right before it, the centimetres of the metres, ...?"""
    between = text[last_match.end() : match.start()]
    return metres < last_unit and bool(BETWEEN_PARTS.fullmatch(between))


def amount(digits):
    """ "1 1/2", "1,200" or "2.5" -> a number; None if it is none, such as "1/0"."""
    if "/" not in digits:
        return read_number(digits.replace(",", ""))
    *whole, fraction = digits.split()
    above, below = map(int, fraction.split("/"))
    return sum(map(int, whole)) + above / below if below else None


# ----------------------------------------------------------------------------------------------
# numbers, hours, regions and words

HOUR = re.compile(r"(?<![\w.+-])(1[0-2]|[1-9])\s{0,3}o['’]?\s?clock", re.IGNORECASE)
YES = {"yes", "correct", "indeed", "true"}
NO = {"no", "incorrect", "actually", "false", "in fact"}
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"


def number(text):
    """The number that the text begins with, a unit after it or not; None if there is none.

    "2.3 meters" -> 2.3; None for "2.3m" and "about 2".
    """
    words = text.split(maxsplit=1)
    if not words:
        return None
    return read_number(words[0].removesuffix(".").removesuffix(","))


def short_text(text):
    """Text as it is compared: see rewards.plain; "Two" is "2"."""
    text = plain(text)
    words = NUMBER_WORDS.split()
    return str(words.index(text)) if text in words else text


def hour(text):
    """The one hour (o'clock) in the text, 1 to 12; None if there are two.

    Without "o'clock" it is a number that is the whole text.
    """
    found = {int(digits) for digits in HOUR.findall(text)}
    if len(found) > 1:
        return None
    value = found.pop() if found else read_number(text.removesuffix("."))
    return value if value in range(1, 13) else None


def verdict(text):
    """Does the text begin with "Yes", "Correct", "Indeed", "That is true", ...? -> True

    False for "No", "Incorrect", "In fact", ...; None for neither, and for a text with yes and no.
    """
    words = re.findall("[a-z]+", text.lower())
    if words[:2] == ["that", "is"]:
        words = words[2:]
    if not words or {"yes", "no"} <= set(words):
        return None
    beginnings = {words[0], " ".join(words[:2])}
    if beginnings & YES:
        return True
    return False if beginnings & NO else None


def region(text):
    """The only region number in the text, as text; None if there are two or none.

    "Region [1] is taller." -> "1"
    """
    found = set(re.findall("[0-9]+", text))
    return found.pop() if len(found) == 1 else None


SCORERS = {  # of every rule but "choice", which also needs the choices
    "number": relative_accuracy,
    "motion": motion,
    "length": within_quarter,
    "clock": within_hour,
    "text": partial(reads_the_same, short_text),
    "verdict": partial(reads_the_same, verdict),
    "region": partial(reads_the_same, region),
}
HOW_TO_ANSWER = {  # by the rule: what a question ends with
    "choice": "Answer with the letter of the choice.",
    "number": "Answer with a number.",
    "motion": "",
    "text": "",
    "length": "Answer with a number and its unit.",
    "clock": "Answer with the hour on a clock.",
    "verdict": "Answer with yes or no.",
    "region": "Answer with the region.",
}

# ----------------------------------------------------------------------------------------------
# the table
#
# The overall score of some benchmarks is an unweighted mean of means. These functions give the key
# of a result: the group that it counts in, then the group inside of that group, and so on.


def all_together(result):
    return ()


def by_type(result):
    return (result["type"],)


def by_level_and_group(result):
    return result["level"], result["group"]


def by_type_with_direction_as_one(result):
    general_type = re.sub("_(easy|medium|hard)$", "", result["type"])
    return general_type, result["type"]


OVERALL = {
    "spar": ("the mean of its types", by_type),
    "blink": ("the mean of its types", by_type),
    "cvbench": ("(mean(ADE20K, COCO) + Omni3D) / 2", by_level_and_group),
    "vsi": (
        "the mean of its types, the three of direction as one",
        by_type_with_direction_as_one,
    ),
}


def overall_rule(benchmark):
    """What the overall score is -> in words, and the function that gives the key of a result."""
    return OVERALL.get(benchmark, ("the mean over all questions", all_together))


def make_table(benchmark, results, mean_interval, paths=("lor", "dtr")):
    """Scored results -> a line, a dict, per path and type, level, and overall.

    A line has n, score, and ci, half of the score's 95 % interval. The path "auto" is all results.
    mean_interval: scores -> their mean, and half of its interval (eval.mean_interval).
    """
    _, key_of = overall_rule(benchmark)
    table = []
    for path in paths:
        of_path = [result for result in results if path in ("auto", result["path"])]
        if not of_path:
            continue
        lines = []  # kind, name, results, key of a result
        for name in sorted({result["type"] for result in of_path}):
            of_type = [result for result in of_path if result["type"] == name]
            lines.append(("type", name, of_type, all_together))
        for name in dict.fromkeys(result["level"] for result in of_path):
            if name:
                of_level = [result for result in of_path if result["level"] == name]
                lines.append(("level", name, of_level, key_of))
        lines.append(("overall", "overall", of_path, key_of))
        for kind, name, part, key_of_part in lines:
            keys = [key_of_part(result) for result in part]
            mean, half = mean_of_means(part, keys, mean_interval)
            table.append(
                {
                    "path": path,
                    "kind": kind,
                    "name": name,
                    "n": len(part),
                    "score": mean,
                    "ci": half,
                }
            )
    return table


def mean_of_means(results, keys, mean_interval):
    """Mean score, and half of its 95 % interval; keys: a tuple per result, all of the same length.

    Results are grouped by the first item of their keys, in a group by the next one, and so on. The
    score is the mean of the groups' scores, however many results they hold.
    """
    if not keys[0]:
        return mean_interval([result["score"] for result in results])
    groups = {}
    for result, (name, *inner_key) in zip(results, keys):
        of_group, inner_keys = groups.setdefault(name, ([], []))
        of_group.append(result)
        inner_keys.append(inner_key)
    means = []
    halves = []
    for of_group, inner_keys in groups.values():
        mean, half = mean_of_means(of_group, inner_keys, mean_interval)
        means.append(mean)
        halves.append(half)
    # The groups are independent: the squares of their intervals add up.
    return sum(means) / len(means), math.hypot(*halves) / len(halves)
