"""Scores of the published benchmarks: a response and a row's answer in, a number in [0, 1] out.

Needs the standard library and rewards.py. The answer of a response is the first
<answer>..</answer>, else the whole response. What differs from the released scorers:
1. No substring, prefix or letter case makes an answer right: "", "Because" and the article "a" name
   no choice, "(A)" does. Where the choices are known, the exact words of one are its letter.
2. Camera motion is scored by the truth's axes. An axis that the truth lacks and one that cannot be
   read are one more axis each in the mean, and wrong; one that is named twice is wrong. (The
   released scorer paid 0.66 for "move_right:0" as the answer to a motion on five axes, and 0.6 for
   ten times the true motion.)
3. SpatialRGPT-Bench is scored by rules, not by GPT-4: yes or no; the one region named; the one
   length (m, cm, mm, feet, inches; without a unit metres) within 25 %; the clock direction within
   one hour.

In this order: the score of a response; which rule a question has; the rules; what they read in a
text; the table.
"""

import math
import re
from functools import partial

from rewards import NUMBER, plain, read_choice, read_motion, read_number


def score(benchmark, response, row):
    """Score of one response; row: "answer", "type", and "choices" where it has them."""
    rule = rule_of(benchmark, row["type"], row["answer"])
    said = first_answer(response)
    if rule == "choice":
        return choice(said, row["answer"], row.get("choices"))
    return SCORERS[rule](said, row["answer"])


def first_answer(response):
    """The text of the first <answer>..</answer>, else the whole response.

    (rewards.extract_answer wants exactly one answer.)
    """
    text, found, _ = response.partition("<answer>")[2].partition("</answer>")
    return (text if found else response).strip()


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


def choice(text, letter, choices=()):
    """1 for the letter (see rewards.read_choice), or for the exact words of that choice alone."""
    said = read_choice(text)
    if said is None:
        same = [i for i, words in enumerate(choices or ()) if plain(words) == plain(text)]
        said = letter_of(same[0]) if len(same) == 1 else None
    return float(said is not None and said == read_choice(letter))


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
# what the rules read in a text

METRES = {
    "m": 1,
    "meter": 1,
    "metre": 1,
    "cm": 0.01,
    "centimeter": 0.01,
    "centimetre": 0.01,
    "mm": 0.001,
    "millimeter": 0.001,
    "millimetre": 0.001,
    "foot": 0.3048,
    "feet": 0.3048,
    "ft": 0.3048,
    "inch": 0.0254,
    "inches": 0.0254,
}
LENGTH = re.compile(
    rf"(?<![\w.+-])({NUMBER.pattern})\s{{0,3}}({'|'.join(METRES)})s?(?![a-z])", re.IGNORECASE
)
HOUR = re.compile(r"(?<![\w.+-])(1[0-2]|[1-9])\s{0,3}o['’]?\s?clock", re.IGNORECASE)
YES = {"yes", "correct", "indeed", "true"}
NO = {"no", "incorrect", "actually", "false", "in fact"}


def number(text):
    """The number that the text begins with, a unit after it or not; None if there is none.

    "2.3 meters" -> 2.3; None for "2.3m" and "about 2".
    """
    words = text.split(maxsplit=1)
    if not words:
        return None
    return read_number(words[0].removesuffix(".").removesuffix(","))


def length(text):
    """The one length in the text, metres; None if there are two.

    Without any unit it is the number that the text begins with.
    """
    found = set()
    for digits, unit in LENGTH.findall(text):
        value = read_number(digits)
        if value:
            found.add(value * METRES[unit.lower()])
    if not found:
        return number(text)
    return found.pop() if len(found) == 1 else None


def hour(text):
    """The one hour (o'clock) in the text, 1 to 12; None if there are two.

    Without "o'clock" it is the number that the text begins with.
    """
    found = {int(digits) for digits in HOUR.findall(text)}
    if len(found) > 1:
        return None
    value = found.pop() if found else number(text)
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
    "text": partial(reads_the_same, plain),
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
