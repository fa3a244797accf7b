"""Scores of the published benchmarks: a response and a row's answer in, a number in [0, 1] out; standard library only.

The answer is the first <answer>..</answer>, else the whole response. What differs from the released scorers:
1. No substring, prefix or letter case makes an answer right: "", "Because" and the article "a" name no choice, "(A)"
   does. Where the choices are known, the exact words of one choice are its letter.
2. Camera motion: relative to the truth's axes; an axis that the truth lacks, one named twice or one that cannot be read
   is one more axis in the mean, and wrong. (There: "move_right:0" earned 0.66, ten times the truth 0.6.)
3. SpatialRGPT-Bench by rule and not by GPT-4: yes or no, the one region named, the one length (m, cm, mm, feet, inches;
   without a unit metres) within 25 %, the clock direction within one hour.
"""

import math
import re
from functools import partial
from itertools import product

from rewards import NUMBER, plain, read_choice, read_motion, read_number

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
YES, NO = {"yes", "correct", "indeed", "true"}, {"no", "incorrect", "actually", "false", "in fact"}


def first_answer(response):
    """The text of the first <answer>..</answer>, else the whole response (rewards.extract_answer wants exactly one)."""
    text, found, _ = response.partition("<answer>")[2].partition("</answer>")
    return (text if found else response).strip()


def number(text):
    """The number that the text begins with, a unit after it or not: "2.3 meters" -> 2.3; None for "2.3m", "about 2"."""
    return read_number((text.split() or [""])[0].removesuffix(".").removesuffix(","))


def mra(value, truth):
    """Mean relative accuracy: the share of t = .50, .55, .. .95 at which the relative error is at most 1 - t."""
    if value is None:
        return 0.0
    error = abs(value - truth) / abs(truth) if truth else math.inf if value else 0.0
    return sum(error <= k / 20 + 1e-9 for k in range(1, 11)) / 10


def motion(text, truth):
    """Mean of mra over the truth's axes (not 0) and, as 0, every other axis that the text names with a value not 0."""
    truth = {axis: value for axis, value in read_motion(truth) if value}
    said = [
        (axis, value) for axis, value in read_motion(text) if value != 0
    ]  # None, unreadable, stays
    named = truth.keys() | {axis for axis, _ in said}
    score = 0.0
    for axis, value in truth.items():
        values = [v for name, v in said if name == axis]
        score += mra(values[0], value) if len(values) == 1 else 0.0
    return score / len(named) if named else 1.0


def choice(text, letter, choices=()):
    """1 for the letter (see rewards.read_choice), or for the exact words of that choice and no other."""
    said = read_choice(text)
    if said is None:
        same = [chr(65 + i) for i, words in enumerate(choices or ()) if plain(words) == plain(text)]
        said = same[0] if len(same) == 1 else None
    return float(said is not None and said == read_choice(letter))


def length(text):
    """The one length in the text, metres; without any unit the number that it begins with; None if there are two."""
    found = {
        read_number(value) * METRES[unit.lower()]
        for value, unit in LENGTH.findall(text)
        if read_number(value)
    }
    return found.pop() if len(found) == 1 else None if found else number(text)


def hour(text):
    """The one hour in the text (o'clock), 1 to 12, else the number that it begins with."""
    found = set(map(int, HOUR.findall(text)))
    value = found.pop() if len(found) == 1 else None if found else number(text)
    return value if value in range(1, 13) else None


def verdict(text):
    """True for "Yes", "Correct", "Indeed", "That is true", False for "No", "Incorrect", "Actually", "In fact", .."""
    words = re.findall("[a-z]+", text.lower())
    words = words[2:] if words[:2] == ["that", "is"] else words
    first = {words[0], " ".join(words[:2])} if words and not {"yes", "no"} <= set(words) else set()
    return True if first & YES else False if first & NO else None


def region(text):
    """The only region number in the text, as text: "Region [1] is taller." -> "1"; None if there are two or none."""
    found = set(re.findall("[0-9]+", text))
    return found.pop() if len(found) == 1 else None


def within_quarter(text, truth):
    value, truth = length(text), length(truth)
    return float(value is not None and abs(value - truth) <= 0.25 * truth + 1e-9)


def within_hour(text, truth):
    value, truth = hour(text), hour(truth)
    return float(value is not None and min((value - truth) % 12, (truth - value) % 12) <= 1)


def same(parse, text, truth):
    return float(parse(text) is not None and parse(text) == parse(truth))


SCORERS = {
    "number": lambda text, truth: mra(number(text), number(truth)),
    "motion": motion,
    "length": within_quarter,
    "clock": within_hour,
    "text": partial(same, plain),
    "verdict": partial(same, verdict),
    "region": partial(same, region),
}
ASK = {
    "choice": "Answer with the letter of the choice.",
    "number": "Answer with a number.",
    "motion": "",
    "text": "",
    "length": "Answer with a number and its unit.",
    "clock": "Answer with the hour on a clock.",
    "verdict": "Answer with yes or no.",
    "region": "Answer with the region.",
}


def score(bench, response, row):
    """Score of one response; row: "answer", "type", and "choices" where it has them."""
    rule = rule_of(bench, row["type"], row["answer"])
    said = first_answer(response)
    return (
        choice(said, row["answer"], row.get("choices"))
        if rule == "choice"
        else SCORERS[rule](said, row["answer"])
    )


SPAR_LEVELS = {
    "low": [
        f"{what}_prediction_{pair}{views}"
        for what, pair, views in product(("depth", "distance"), ("oc", "oo"), ("", "_mv"))
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
RGPT_RULES = {"predicate": "verdict", "choice": "region", "data": "length", "direction": "clock"}


def level_of(bench, type):
    """Level of a type, None where the benchmark has none. KeyError for a type that the benchmark does not have."""
    if bench == "spatialrgpt":
        return (
            "qualitative"
            if RGPT_RULES[type.split("_")[-1]] in ("verdict", "region")
            else "quantitative"
        )
    levels = {"spar": SPAR_LEVELS, "vsi": VSI_LEVELS, "cvbench": CV_LEVELS}.get(bench)
    return levels and {name: level for level, names in levels.items() for name in names}[type]


def rule_of(bench, type, answer):
    if bench == "spatialrgpt":
        return RGPT_RULES[type.split("_")[-1]]
    if bench in ("realworldqa", "erqa"):  # letters, and here and there a word
        return "choice" if read_choice(answer) else "text"
    if level_of(bench, type) in ("low", "number"):
        return "number"
    return "motion" if type == "view_change_infer" else "choice"


OVERALL = {  # unweighted means of means: groups, and groups in them
    "spar": ("the mean of its types", lambda r: (r["type"],)),
    "blink": ("the mean of its types", lambda r: (r["type"],)),
    "cvbench": ("(mean(ADE20K, COCO) + Omni3D) / 2", lambda r: (r["level"], r["group"])),
    "vsi": (
        "the mean of its types, the three of direction as one",
        lambda r: (re.sub("_(easy|medium|hard)$", "", r["type"]), r["type"]),
    ),
}


def mean_of(results, keys, mean_interval):
    """Mean score and the half width of its 95 % interval; keys: a tuple a result, means of means over each place."""
    if not keys[0]:
        return mean_interval([r["score"] for r in results])
    parts = {}
    for result, (name, *key) in zip(results, keys):
        parts.setdefault(name, []).append((result, key))
    means = [mean_of(*zip(*part), mean_interval) for part in parts.values()]
    return sum(mean for mean, _ in means) / len(means), math.hypot(
        *(half for _, half in means)
    ) / len(means)


def make_table(bench, results, mean_interval, paths=("lor", "dtr")):
    """Scored results -> one dict a path and type, level, and overall: n, score, ci (half a 95 % interval).
    The path "auto" is all results."""
    table, pooled = [], lambda r: ()
    groups_of = OVERALL.get(bench, ("", pooled))[1]
    for path in paths:
        of_path = [r for r in results if path in ("auto", r["path"])]
        parts = [("type", name, pooled) for name in sorted({r["type"] for r in of_path})]
        parts += [
            ("level", name, groups_of)
            for name in dict.fromkeys(r["level"] for r in of_path)
            if name
        ]
        for kind, name, groups in parts + [("overall", "overall", groups_of)] * bool(of_path):
            part = [r for r in of_path if kind == "overall" or r[kind] == name]
            mean, half = mean_of(part, [groups(r) for r in part], mean_interval)
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
