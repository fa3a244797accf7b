"""Questions about a scene, their exact answers, and a chain of thought for each path, all made from the annotation.

One question becomes two instances (data.py reads the format): LOR reasons in words without coordinates, DTR first
writes the 3D centres of the objects and then computes with the coordinates as written. Six region-metric families ask
about marked objects, five general ones about the whole image; the grounding families have no chain of thought.

The paper has its traces written by an expert model and does not check them. Here they follow from the annotation, so
each ends in its own answer and its arithmetic is right as written.
"""

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from world import raycast
from world.raycast import COLORS

SHAPES = list(raycast.SHAPES)
MARKS = ["red bbox", "blue bbox", "green bbox"]  # in the order in which a question uses them
MARGIN = 0.3  # metres; nearer ties are not asked about
LARGER = 1.3  # times as large in the picture, likewise
AXES = [
    ("to the left of", "to the right of"),
    ("above", "below"),
    ("in front of", "behind"),
]  # smaller, larger


@dataclass
class Ask:
    text: str  # the question; a mark is written as its name, "red bbox"
    answer: str  # exact, from the annotated centres
    marked: list  # objects that carry MARKS[0], MARKS[1], ..; empty for a question about the whole image
    words: str  # LOR: reasoning without coordinates
    solve: object  # DTR: (tenths of the centres, one xyz a marked object) -> (derivation, answer) or None


def tenths(point):
    """A point in metres -> whole tenths, as the traces write it."""
    return [int(round(10 * float(v))) for v in point]


def meters(tenth):
    return f"{'-' if tenth < 0 else ''}{abs(tenth) // 10}.{abs(tenth) % 10}"


def name(obj):
    return f"{obj['color']} {obj['label']}" if obj["color"] else obj["label"]


def box_area(obj):
    """Pixels of an object's 2D box: how large it is in the picture."""
    left, top, right, bottom = obj["box"]
    return (right - left) * (bottom - top)


def letter(options, choice):
    return "ABCDEF"[options.index(choice)]


def show(options):
    """Options in a fixed order, so that a letter means one thing in a family: to look letters up among shuffled options
    is a skill of its own, which costs a model of 1 M parameters more than the geometry."""
    return " " + " ".join(f"{letter(options, o)}. {o}" for o in options)


def pick(words, limits, value):
    return words[sum(value >= limit for limit in limits)]


def how_far(depth):
    return pick(
        ["very near", "near", "at middle range", "far", "very far"], [2.2, 3.5, 5, 6.3], depth
    )


def apart(gap):
    return pick(
        ["almost touching", "close together", "some way apart", "far apart"], [0.8, 1.5, 2.8], gap
    )


def place(obj, mark):
    """What a mark holds, in words: the evidence of the language-only path."""
    x, y, z = obj["center"]
    side = pick(["on the left", "in the middle", "on the right"], [-0.15, 0.15], x / z)
    return f"The {mark} holds a {name(obj)} {side}, {how_far(z)}."


def squared_distance(a, b):
    """Derivation of |a - b|^2 in tenths, every number rounded to one decimal as written; and the sum.

    The coordinates are written again, p~q=|p - q|: to find and to subtract them in one step is beyond a tiny model."""
    d = [abs(p - q) for p, q in zip(a, b)]
    squares = [(v * v + 5) // 10 for v in d]
    text = " ".join(f"{meters(p)}~{meters(q)}={meters(v)}" for p, q, v in zip(a, b, d))
    return text + "\n" + "+".join(meters(v) for v in squares) + "=" + meters(sum(squares)), sum(
        squares
    )


def ask_depth(rng, objects):
    (a,) = rng.choice(objects, 1)
    return Ask(
        "How far is the red bbox from the camera in depth, in meters?",
        f"{a['center'][2]:.2f}",
        [a],
        place(a, MARKS[0]),
        lambda c: (f"The depth is z:{meters(c[0][2])}.", meters(c[0][2])),
    )


def ask_move(rng, objects):
    (a,) = rng.choice(objects, 1)
    step = int(rng.integers(5, 16))
    if a["center"][2] < step / 10 + 0.5:  # the camera would stand in the object
        return None
    return Ask(
        f"If the camera moves forward by {meters(step)} meters, what is the depth of the red bbox in meters?",
        f"{a['center'][2] - step / 10:.2f}",
        [a],
        place(a, MARKS[0]),
        lambda c: (
            f"{meters(c[0][2])}-{meters(step)}={meters(c[0][2] - step)}",
            meters(c[0][2] - step),
        ),
    )


def ask_distance(rng, objects):
    a, b = rng.choice(objects, 2, replace=False)
    gap = float(np.linalg.norm(a["center"] - b["center"]))
    if gap < 0.5:  # a tenth of a metre is too coarse for a table top
        return None

    def solve(c):
        text, total = squared_distance(c[0], c[1])
        root = meters(int(round((10 * total) ** 0.5)))
        return f"{text}\nroot:{root}", root

    return Ask(
        "What is the distance between the red bbox and the blue bbox in meters?",
        f"{gap:.2f}",
        [a, b],
        f"{place(a, MARKS[0])} {place(b, MARKS[1])} They are {apart(gap)}.",
        solve,
    )


def ask_nearer(rng, objects):
    a, b, c = rng.choice(objects, 3, replace=False)
    gaps = [float(np.linalg.norm(a["center"] - o["center"])) for o in (b, c)]
    if abs(gaps[0] - gaps[1]) < MARGIN:
        return None
    options = MARKS[1:]
    best = MARKS[1 + int(gaps[1] < gaps[0])]

    def solve(p):
        (one, s), (two, t) = squared_distance(p[0], p[1]), squared_distance(p[0], p[2])
        if s == t:
            return None
        win = MARKS[1 + (t < s)]
        return f"blue:{one}\ngreen:{two}\n{win} is nearer.", letter(options, win)

    words = place(a, MARKS[0]) + "".join(
        f" {place(o, mark)} They are {apart(gap)}." for o, mark, gap in zip((b, c), MARKS[1:], gaps)
    )
    return Ask(
        "Which is nearer to the red bbox?" + show(options),
        letter(options, best),
        [a, b, c],
        f"{words} {best} is nearer.",
        solve,
    )


def ask_axis(rng, objects):
    a, b = rng.choice(objects, 2, replace=False)
    axis = int(rng.integers(3))
    if abs(a["center"][axis] - b["center"][axis]) < MARGIN:
        return None
    options = AXES[axis]
    best = AXES[axis][int(a["center"][axis] > b["center"][axis])]

    def solve(c):
        p, q = c[0][axis], c[1][axis]
        if p == q:
            return None
        side = AXES[axis][int(p > q)]
        return f"{'xyz'[axis]}:{meters(p)}{'<>'[p > q]}{meters(q)}, {side}.", letter(options, side)

    return Ask(
        "Where is the red bbox relative to the blue bbox?" + show(options),
        letter(options, best),
        [a, b],
        f"{place(a, MARKS[0])} {place(b, MARKS[1])} The red bbox is {best} it.",
        solve,
    )


def ask_closer(rng, objects):
    a, b = rng.choice(objects, 2, replace=False)
    if abs(a["center"][2] - b["center"][2]) < MARGIN:
        return None
    options = MARKS[:2]
    best = MARKS[int(a["center"][2] > b["center"][2])]

    def solve(c):
        p, q = c[0][2], c[1][2]
        if p == q:
            return None
        win = MARKS[int(p > q)]
        return f"z:{meters(p)}{'<>'[p > q]}{meters(q)}, {win}.", letter(options, win)

    words = f"{place(a, MARKS[0])} {place(b, MARKS[1])} {best} is closer."
    return Ask(
        "Which is closer to the camera?" + show(options),
        letter(options, best),
        [a, b],
        words,
        solve,
    )


def listing(objects):
    """What the image holds in words, from large to small in the picture: what catches the eye comes first."""
    return f"I see {len(objects)}: " + ", ".join(map(name, objects)) + "."


def ask_count(rng, objects):
    n = str(len(objects))
    words = f"Count {n}."
    return Ask(
        "How many objects are in the image?",
        n,
        [],
        f"{listing(objects)} {words}",
        lambda c: (words, n),
    )


def general(text, options, best, words, objects):
    """A multiple-choice question about the whole image."""
    right = letter(options, best)
    return Ask(
        text + show(options), right, [], f"{listing(objects)} {words}", lambda c: (words, right)
    )


def ask_exist(rng, objects):
    shapes = {o["color"]: o["label"] for o in objects}
    unseen = [color for color in COLORS if color not in shapes]
    there = bool(rng.integers(2)) or not unseen
    color = str(rng.choice(list(shapes) if there else unseen))
    verdict = "yes" if there else "no"
    words = f"Look: {color} {shapes.get(color, 'none')}, {verdict}."
    return general(f"Is anything {color} in the image?", ["yes", "no"], verdict, words, objects)


def ask_color(rng, objects):
    if len(objects) > 1 and box_area(objects[0]) < LARGER * box_area(objects[1]):
        return None
    color = objects[0]["color"]
    text = "What color is the largest one in the image?"
    return general(text, list(COLORS), color, f"The largest: {color}.", objects)


def ask_shape(rng, objects):
    a = rng.choice(objects)
    return general(
        f"What shape is the {a['color']} one?",
        SHAPES,
        a["label"],
        f"Look: {a['color']} {a['label']}.",
        objects,
    )


def ask_more(rng, objects):
    counts = [sum(o["label"] == shape for o in objects) for shape in SHAPES]
    if counts.count(max(counts)) > 1:
        return None
    options = [f"{shape}s" for shape in SHAPES]
    best = options[int(np.argmax(counts))]
    words = ", ".join(f"{o} {n}" for o, n in zip(options, counts))
    return general("Which are there most of?", options, best, f"{words}: {best}.", objects)


# A new family: a function above and its name here, with what it needs in NEEDS. `solve` gets the centres as written and
# nothing else of an object. Random streams count the families: the questions of those behind a new one change, too.
REGION_FAMILIES = {
    "depth": ask_depth,
    "move": ask_move,
    "distance": ask_distance,
    "nearer": ask_nearer,
    "axis": ask_axis,
    "closer": ask_closer,
}
GENERAL_FAMILIES = {
    "count": ask_count,
    "exist": ask_exist,
    "color": ask_color,
    "shape": ask_shape,
    "more": ask_more,
}
NEEDS = {"distance": 2, "nearer": 3, "axis": 2, "closer": 2}  # objects; the others 1
TEXT_ONLY = ["derive", "measure", "lookup"]  # practice of the embedded world, needs no picture
GROUNDING = ["center", "region_qa", "mark_qa", "box3d", "ground2d", "listing", "vqa", *TEXT_ONLY]


def box_line(point, label):
    return f'<3d_box center="{",".join(meters(v) for v in point)}">{label}</3d_box>'


def detect_block(objects, marked):
    """The detections of a DTR response; `marked`: the objects carry MARKS[0], MARKS[1], .."""
    tags = [f" ({mark})" for mark in MARKS] if marked else [""] * len(objects)
    lines = [box_line(tenths(o["center"]), name(o) + tag) for o, tag in zip(objects, tags)]
    return "<detect>" + "\n".join([f"Find {len(lines)} relevant objects:", *lines]) + "</detect>\n"


def finish(think, answer):
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


def thousandths(box, image):
    h, w = image.shape[:2]
    return [round(1000 * v / s) for v, s in zip(box, (w, h, w, h))]


def instance(scene, key, task, question, target, marked=(), **more):
    """One row. The first mention of each mark gets its `<mask>` (region token) where `more` holds "bbox"."""
    row = {
        "id": f"{scene.id}/{task}/{key}",
        "source": scene.source,
        "task": task,
        "image": scene.image,
        "depth": scene.depth,
        "intrinsics": list(scene.intrinsics),
        "image_hw": list(scene.image.shape[:2]),
    }
    for mark, obj in zip(MARKS, marked):
        row[mark.replace(" ", "_")] = [thousandths(obj["box"], scene.image)]
    order = sorted(range(len(marked)), key=lambda i: question.find(MARKS[i]))
    if "bbox" in more:  # region masks, one per <mask>, in text order
        more["bbox"] = [[float(v) for v in marked[i]["box"]] for i in order]
        for i in order:
            question = question.replace(MARKS[i], f"{MARKS[i]} <mask>", 1)
    row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": target}]
    return {**row, **more}


def stream(scene, *numbers):
    """A random stream of this scene's own."""
    return np.random.default_rng([crc32(scene.id.encode()), *numbers])


def annotated(scene, sensor):
    """The scene's objects, largest 2D box first; with `sensor`, centres are means of visible surfaces."""
    seen = [o for o in scene.objects if not sensor or o["surface"] is not None]
    objects = [
        {**o, "center": np.asarray(o["surface" if sensor else "center"], float)} for o in seen
    ]
    return sorted(objects, key=box_area, reverse=True)


def ask_questions(scene, seed, sensor=False, tasks=None):
    """-> instances: one question of each family that the scene allows, once for each path, with its trace as target.

    sensor: centres (and the answers that follow) are what a depth camera sees, the mean of the visible surface: the
    imperfect annotation of the cold start. The exact answer is in "answer"; the trace ends in the answer that follows
    from its own, rounded, coordinates.
    """
    rows, objects = [], annotated(scene, sensor)
    for index, (task, family) in enumerate({**REGION_FAMILIES, **GENERAL_FAMILIES}.items()):
        if tasks and task not in tasks or not can_ask(task, objects):
            continue
        ask = family(stream(scene, seed, index), objects)
        solved = ask and ask.solve(tenths_of(ask.marked))
        if not solved:
            continue
        rows.append(
            instance(
                scene,
                "lor",
                task,
                ask.text,
                finish(ask.words, rounded(ask.answer)),
                ask.marked,
                answer=ask.answer,
            )
        )
        found = detect_block(ask.marked or objects, ask.marked)
        truth = {
            mark.replace(" ", "_"): {
                "bbox_2d": thousandths(o["box"], scene.image),
                "label": o["label"],
                "center_cam": [round(float(v), 4) for v in o["center"]],
                "instance_name": name(o),
            }
            for mark, o in zip(MARKS, ask.marked)
        }
        rows.append(
            instance(
                scene,
                "dtr",
                task,
                ask.text,
                found + finish(*solved),
                ask.marked,
                answer=ask.answer,
                bbox=[],
                **{"3d_pos": truth},
            )
        )
    return rows


def can_ask(task, objects):
    """Enough objects for this family? And colors, which objects of real pictures have none of?"""
    return len(objects) >= NEEDS.get(task, 1) and (
        task in REGION_FAMILIES or all(o["color"] for o in objects)
    )


def tenths_of(objects):
    return [tenths(o["center"]) for o in objects]


def rounded(answer):
    """An answer as a trace writes it: lengths with one decimal."""
    return f"{float(answer):.1f}" if "." in answer else answer


def grounding(scene, seed, sensor=False, tasks=GROUNDING):
    """-> instances without a chain of thought: regions -> 3D centres or box, 2D grounding, region QA, VQA, text only:
    those of `tasks`."""
    rows, objects = [], annotated(scene, sensor)
    if not objects:
        return rows
    rng = stream(scene, seed, 99)
    several = list(rng.permutation(objects)[: len(MARKS)])
    marked = several[: rng.choice([1, 1, 1, 2, 3])]
    marks = ", ".join(MARKS[: len(marked)])
    lines = [box_line(tenths(o["center"]), f"{name(o)} ({mark})") for o, mark in zip(marked, MARKS)]
    names = ", ".join(map(name, several))
    rows.append(
        instance(
            scene,
            "center",
            "center",
            f"Give the 3D center: {marks}.",
            "\n".join(lines),
            marked,
            bbox=[],
        )
    )
    rows.append(
        instance(
            scene,
            "region",
            "region_qa",
            f"What is in each region: {', '.join(MARKS[: len(several)])}?",
            names,
            several,
            bbox=[],
        )
    )
    seen = " ".join(place(o, mark) for o, mark in zip(marked, MARKS))
    rows.append(
        instance(scene, "mark", "mark_qa", f"What is in the region: {marks}?", seen, marked)
    )
    size = ",".join(meters(v) for v in tenths(marked[0]["size"]))
    angles = ",".join(str(v) for v in euler(marked[0]["rotation"]))
    rows.append(
        instance(
            scene,
            "box3d",
            "box3d",
            f"Give the 3D box: {MARKS[0]}.",
            lines[0].replace('">', f'" size="{size}" angles="{angles}">'),
            marked[:1],
            bbox=[],
        )
    )
    for obj in marked:
        if sum(name(o) == name(obj) for o in objects) == 1:
            box = ",".join(map(str, thousandths(obj["box"], scene.image)))
            rows.append(instance(scene, "box2d", "ground2d", f"Where is the {name(obj)}?", box))
    if all(o["color"] for o in objects):
        rows.append(
            instance(scene, "listing", "listing", "What is in the image?", listing(objects))
        )
        for index, (task, family) in enumerate(GENERAL_FAMILIES.items() if "vqa" in tasks else ()):
            ask = family(stream(scene, seed, 50 + index), objects)
            rows += [instance(scene, task, "vqa", ask.text, ask.answer)] if ask else []
    rows += text_only(scene, seed, objects, tasks)
    return [row for row in rows if row["task"] in tasks]


def text_only(scene, seed, objects, tasks):
    """-> instances of these tasks, in which the text gives what a response would first find, coordinates or a listing,
    and only the conclusion is asked for. Every instance has a picture; theirs is a small blank one."""
    rows, blank = [], replace(scene, image=np.zeros((16, 16, 3), np.uint8), depth=None)
    for index, (task, family) in enumerate({**REGION_FAMILIES, **GENERAL_FAMILIES}.items()):
        kind = "measure" if task in ("distance", "nearer") else "derive"  # the long ones
        if kind not in tasks or not can_ask(task, objects):
            continue
        ask = family(stream(scene, seed, 70 + index), objects)
        solved = ask and ask.solve(tenths_of(ask.marked))
        if solved:
            given = detect_block(ask.marked, True) if ask.marked else listing(objects)
            rows.append(
                instance(blank, task, kind, f"{ask.text}\n{given}", f"<think>{solved[0]}</think>")
            )
    if "lookup" in tasks and all(o["color"] for o in objects):
        rows.append(instance(blank, "lookup", "lookup", *lookup(stream(scene, seed, 98), objects)))
    return rows


def lookup(rng, objects):
    """-> (question, target): colors to look up in a given listing or in given detections. What is found stands right
    behind the color, as it stands in the list; with a colon between them it takes a tiny model many times as long."""
    objects = list(rng.permutation(objects))
    given = listing(objects) if rng.integers(4) else detect_block(objects, [])
    found = {color: "none" for color in COLORS} | {o["color"]: o["label"] for o in objects}
    asked = rng.permutation(list(found))[:4]
    said = ", ".join(f"{color} {found[color]}" for color in asked)
    return f"Look up: {', '.join(asked)}\n{given}", f"<think>Look: {said}.</think>"


def euler(rotation):
    """Box axes in the camera frame -> rotations about y, x and z in whole degrees (R = Ry Rx Rz)."""
    r = np.asarray(rotation)
    return [
        round(float(np.degrees(v)))
        for v in (
            np.arctan2(r[0, 2], r[2, 2]),
            np.arcsin(np.clip(-r[1, 2], -1, 1)),
            np.arctan2(r[1, 0], r[1, 1]),
        )
    ]
