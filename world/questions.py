"""Questions about a scene, their exact answers, and a chain of thought for each of the two paths.

    rows = ask_questions(make_scene(7), 0)   # about the scene of seed 7 (world/raycast.py)
    rows = grounding(make_scene(7), 0)       # the same scene, without chains of thought

A row is a dict in the published format (formats/instances.py). One question becomes two rows: LOR
(language-only reasoning) thinks in words without coordinates, DTR (detect-then-reason) first writes
the 3D centres of the objects and then computes with the coordinates as written. Six families of
questions ask about regions, the marked objects, five general ones about the whole image. Grounding
tasks (where is it, what is it) have no chain of thought.

Everything is made from the annotation of a Scene (formats/scenes.py), of a synthetic or of a real
picture. The paper has its traces written by an expert model and does not check them. Here they
follow from the annotation, so each ends in its own answer and its arithmetic is right as written.

Lengths in a trace are whole tenths of a metre, kept as integers: one decimal is enough, and the
arithmetic is exact.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from formats.errors import UserError
from world.raycast import COLORS, SHAPES

RED = "red bbox"
BLUE = "blue bbox"
GREEN = "green bbox"
MARKS = [RED, BLUE, GREEN]  # in the order in which a question uses them
MARGIN = 0.3  # metres; nearer ties are not asked about
LARGER = 1.3  # times as large in the picture; nearer ties are not asked about
# Per axis x, y, z: what an object with the smaller coordinate is called, and one with the larger.
AXES = [
    ("to the left of", "to the right of"),
    ("above", "below"),
    ("in front of", "behind"),
]
# Tasks of `grounding` that need no picture, only a text: practice of one step of a response.
TEXT_ONLY = [
    "derive",  # a question and what its response would first find -> what follows
    "measure",  # the same for distances, whose derivations are long
    "lookup",  # a list and some colors -> what stands beside each color
]
# All tasks of `grounding`.
GROUNDING = [
    "center",  # regions -> their 3D centres
    "region_qa",  # regions -> what is in them
    "mark_qa",  # marks in the picture -> what is in them, and where it is, in words
    "box3d",  # one region -> its 3D box
    "ground2d",  # a name -> its 2D box
    "listing",  # all that the image holds
    "vqa",  # a question of a general family -> its answer at once
    *TEXT_ONLY,
]
# Numbers of a scene's random streams. Where families draw, the n-th adds n to the number.
STREAMS = {
    "questions": 0,
    "vqa": 50,
    "text_only": 70,
    "lookup": 98,
    "grounding": 99,
}


@dataclass
class Ask:
    """One question about a scene, as a family makes it."""

    text: str  # the question; a mark is written as its name, "red bbox"
    answer: str  # exact, from the annotated centres
    marked: list  # objects that carry MARKS[0], MARKS[1], ...; empty: about the whole image
    words: str  # LOR: reasoning without coordinates
    # DTR: centres in tenths, x y z per marked object -> (derivation, answer), or None where the
    # rounded centres leave no answer.
    solve: Callable


def ask_questions(scene, seed, sensor=False, tasks=None):
    """One question of each family that the scene allows -> two rows each: LOR, then DTR.

    sensor: centres, and the answers that follow, are what a depth camera sees, the mean of the
    visible surface: the imperfect annotation of the cold start. tasks: names of families, default
    all. The field "answer" is exact; the trace ends in the answer that follows from its own,
    rounded, coordinates.
    """
    rows = []
    objects = objects_of(scene, sensor)
    for number, task in enumerate(FAMILIES):
        if tasks and task not in tasks:
            continue
        rng = random_stream(scene, seed, STREAMS["questions"] + number)
        solved = solved_question(task, rng, objects)
        if solved:
            ask, derivation, answer = solved
            rows.append(lor_row(scene, task, ask))
            rows.append(dtr_row(scene, task, ask, objects, derivation, answer))
    return rows


def solved_question(task, rng, objects):
    """A question of one family -> (Ask, derivation, derived answer); None where it has none."""
    if not can_ask(task, objects):
        return None
    ask = FAMILIES[task](rng, objects)
    if ask is None:
        return None
    solution = ask.solve(centers_in_tenths(ask.marked))
    if solution is None:
        return None
    derivation, answer = solution
    return ask, derivation, answer


def can_ask(task, objects):
    """Does a family have enough objects, and a general one their colors?

    Objects of real pictures have no color.
    """
    if len(objects) < NEEDS.get(task, 1):
        return False
    return task in REGION_FAMILIES or all_colored(objects)


def all_colored(objects):
    return all(obj["color"] for obj in objects)


def objects_of(scene, sensor):
    """The scene's objects, largest 2D box first; sensor: centres are means of visible surfaces."""
    field = "surface" if sensor else "center"
    objects = []
    for obj in scene.objects:
        if obj[field] is not None:  # a real object without depth has no surface
            center = np.asarray(obj[field], float)
            objects.append({**obj, "center": center})
    return sorted(objects, key=box_area, reverse=True)


def box_area(obj):
    """Pixels of an object's 2D box: how large it is in the picture."""
    left, top, right, bottom = obj["box"]
    return (right - left) * (bottom - top)


def random_stream(scene, seed, number):
    """A random stream of this scene's own; number: what it is for, see STREAMS."""
    scene_number = crc32(scene.id.encode())
    return np.random.default_rng([scene_number, seed, number])


# ----------------------------------------------------------------------------------------------
# the families
#
# To add a family, whose name becomes the "task" of its rows:
# 1. Its function, here: ask_NAME(rng, objects) -> Ask, or None where there is nothing to ask, as in
#    a near tie. The objects come largest 2D box first; all randomness comes from rng.
#    A region family marks one to three objects. It uses their "center" and what `describe` says of
#    them, nothing else: tools/build.py asks the same families about mere points.
#    A general family marks none and returns `about_image`.
#    `solve` gets the centres as the response wrote them, and nothing else of an object; it returns
#    None where rounding has made a tie. An option is answered by its letter. A length is written in
#    metres, with two decimals in Ask.answer and with one in the trace.
# 2. Its entry at the end of REGION_FAMILIES or of GENERAL_FAMILIES, below. Random streams count the
#    families, region before general: the questions of those behind a new one change, too.
# 3. Its entry in NEEDS, below, if it needs more than one object.
# 4. Its entry in WORDING, below: the question in other words. Without it,
#    `eval.py --world wording` stops with an error.
# 5. tests/test_data.py reads every question a second time: teach it what the right answer is.
# The blends, the evaluation and its tables find a family by these dicts.
#
# First the region families, about marked objects.


def ask_depth(rng, objects):
    (a,) = rng.choice(objects, 1)

    def solve(centers):
        depth = meters(centers[0][2])
        return f"The depth is z:{depth}.", depth

    return Ask(
        text="How far is the red bbox from the camera in depth, in meters?",
        answer=f"{a['center'][2]:.2f}",
        marked=[a],
        words=describe(a, RED),
        solve=solve,
    )


def ask_move(rng, objects):
    (a,) = rng.choice(objects, 1)
    step = int(rng.integers(5, 16))  # tenths
    if a["center"][2] < step / 10 + 0.5:  # the camera would stand in the object
        return None

    def solve(centers):
        before = centers[0][2]
        after = meters(before - step)
        return f"{meters(before)}-{meters(step)}={after}", after

    return Ask(
        text=f"If the camera moves forward by {meters(step)} meters, "
        "what is the depth of the red bbox in meters?",
        answer=f"{a['center'][2] - step / 10:.2f}",
        marked=[a],
        words=describe(a, RED),
        solve=solve,
    )


def ask_distance(rng, objects):
    a, b = rng.choice(objects, 2, replace=False)
    gap = distance_between(a, b)
    if gap < 0.5:  # a tenth of a metre is too coarse for things on a table top
        return None

    def solve(centers):
        derivation, square = squared_distance(centers[0], centers[1])
        # The square is in tenths, too: ten times it is in hundredths, the squares of tenths.
        root = meters(round((10 * square) ** 0.5))
        return f"{derivation}\nroot:{root}", root

    return Ask(
        text="What is the distance between the red bbox and the blue bbox in meters?",
        answer=f"{gap:.2f}",
        marked=[a, b],
        words=f"{describe(a, RED)} {describe(b, BLUE)} They are {how_far_apart(gap)}.",
        solve=solve,
    )


def ask_nearer(rng, objects):
    a, b, c = rng.choice(objects, 3, replace=False)
    gap_b = distance_between(a, b)
    gap_c = distance_between(a, c)
    if abs(gap_b - gap_c) < MARGIN:
        return None
    options = [BLUE, GREEN]
    nearer = GREEN if gap_c < gap_b else BLUE

    def solve(centers):
        to_blue, blue_square = squared_distance(centers[0], centers[1])
        to_green, green_square = squared_distance(centers[0], centers[2])
        if blue_square == green_square:
            return None
        found = GREEN if green_square < blue_square else BLUE
        derivation = f"blue:{to_blue}\ngreen:{to_green}\n{found} is nearer."
        return derivation, letter(options, found)

    return Ask(
        text="Which is nearer to the red bbox?" + lettered(options),
        answer=letter(options, nearer),
        marked=[a, b, c],
        words=f"{describe(a, RED)} "
        f"{describe(b, BLUE)} They are {how_far_apart(gap_b)}. "
        f"{describe(c, GREEN)} They are {how_far_apart(gap_c)}. "
        f"{nearer} is nearer.",
        solve=solve,
    )


def ask_axis(rng, objects):
    a, b = rng.choice(objects, 2, replace=False)
    axis = int(rng.integers(3))
    at_a = a["center"][axis]
    at_b = b["center"][axis]
    if abs(at_a - at_b) < MARGIN:
        return None
    smaller, larger = AXES[axis]
    options = [smaller, larger]
    side = larger if at_a > at_b else smaller

    def solve(centers):
        p = centers[0][axis]
        q = centers[1][axis]
        if p == q:
            return None
        found = larger if p > q else smaller
        return f"{comparison(axis, p, q)}, {found}.", letter(options, found)

    return Ask(
        text="Where is the red bbox relative to the blue bbox?" + lettered(options),
        answer=letter(options, side),
        marked=[a, b],
        words=f"{describe(a, RED)} {describe(b, BLUE)} The red bbox is {side} it.",
        solve=solve,
    )


def ask_closer(rng, objects):
    a, b = rng.choice(objects, 2, replace=False)
    depth_a = a["center"][2]
    depth_b = b["center"][2]
    if abs(depth_a - depth_b) < MARGIN:
        return None
    options = [RED, BLUE]
    closer = BLUE if depth_a > depth_b else RED

    def solve(centers):
        p = centers[0][2]
        q = centers[1][2]
        if p == q:
            return None
        found = BLUE if p > q else RED
        return f"{comparison(2, p, q)}, {found}.", letter(options, found)

    return Ask(
        text="Which is closer to the camera?" + lettered(options),
        answer=letter(options, closer),
        marked=[a, b],
        words=f"{describe(a, RED)} {describe(b, BLUE)} {closer} is closer.",
        solve=solve,
    )


# The general families, about the whole image.


def about_image(objects, text, answer, words):
    """A question without marks: both paths list the objects, then say the same words."""

    def solve(centers):
        return words, answer

    return Ask(
        text=text,
        answer=answer,
        marked=[],
        words=f"{listing(objects)} {words}",
        solve=solve,
    )


def ask_count(rng, objects):
    count = str(len(objects))
    return about_image(objects, "How many objects are in the image?", count, f"Count {count}.")


def ask_exist(rng, objects):
    shape_of = {obj["color"]: obj["label"] for obj in objects}
    absent = [color for color in COLORS if color not in shape_of]
    there = bool(rng.integers(2)) or not absent
    color = str(rng.choice(list(shape_of) if there else absent))
    options = ["yes", "no"]
    verdict = "yes" if there else "no"
    text = f"Is anything {color} in the image?" + lettered(options)
    words = f"Look: {color} {shape_of.get(color, 'none')}, {verdict}."
    return about_image(objects, text, letter(options, verdict), words)


def ask_color(rng, objects):
    areas = [box_area(obj) for obj in objects]  # descending
    if len(areas) > 1 and areas[0] < LARGER * areas[1]:
        return None
    options = list(COLORS)
    color = objects[0]["color"]
    text = "What color is the largest one in the image?" + lettered(options)
    return about_image(objects, text, letter(options, color), f"The largest: {color}.")


def ask_shape(rng, objects):
    obj = rng.choice(objects)
    options = list(SHAPES)
    color = obj["color"]
    shape = obj["label"]
    text = f"What shape is the {color} one?" + lettered(options)
    return about_image(objects, text, letter(options, shape), f"Look: {color} {shape}.")


def ask_more(rng, objects):
    labels = [obj["label"] for obj in objects]
    counts = [labels.count(shape) for shape in SHAPES]
    if counts.count(max(counts)) > 1:
        return None
    options = [f"{shape}s" for shape in SHAPES]
    most = options[int(np.argmax(counts))]
    text = "Which are there most of?" + lettered(options)
    tally = ", ".join(f"{option} {count}" for option, count in zip(options, counts))
    return about_image(objects, text, letter(options, most), f"{tally}: {most}.")


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
FAMILIES = {**REGION_FAMILIES, **GENERAL_FAMILIES}
NEEDS = {  # objects; the others need 1
    "distance": 2,
    "nearer": 3,
    "axis": 2,
    "closer": 2,
}

# The questions in other words, for `eval.py --world wording`: an entry per family, (pattern, other
# words). A mark may have its `<mask>` behind it. What stands behind a match, the options, stays; and
# so does the order of the marks, since the regions stand in the order of the text.
WORDING = [
    (
        r"How far is (.*) from the camera in depth, in meters\?",
        r"In meters, what is the depth of \1?",
    ),
    (
        r"If the camera moves forward by (.*) meters, what is the depth of (.*) in meters\?",
        r"The camera goes \1 meters forward. How deep is \2 then, in meters?",
    ),
    (
        r"What is the distance between (.*) and (.*) in meters\?",
        r"How many meters are between \1 and \2?",
    ),
    (
        r"Which is nearer to (.*?)\?",
        r"What is the closest to \1?",
    ),
    (
        r"Where is (.*) relative to (.*)\? A\.",
        r"Where does \1 stand with respect to \2? A.",
    ),
    (
        r"Which is closer to the camera\?",
        r"What does the camera have nearest to it?",
    ),
    (
        r"How many objects are in the image\?",
        r"Count the objects in the image.",
    ),
    (
        r"Is anything (\w+) in the image\?",
        r"Does the image show something \1?",
    ),
    (
        r"What color is the largest one in the image\?",
        r"The largest one in the image has which color?",
    ),
    (
        r"What shape is the (\w+) one\?",
        r"The \1 one has which shape?",
    ),
    (
        r"Which are there most of\?",
        r"Of which are there most?",
    ),
]


def reword(question):
    """The question in other words, with its marks, `<mask>` and options.

    UserError where WORDING has no other words.
    """
    for pattern, words in WORDING:
        if re.match(pattern, question):
            return re.sub(pattern, words, question, count=1)
    raise UserError(f"no other words for {question!r}")


# ----------------------------------------------------------------------------------------------
# what questions and traces are made of: words, options, numbers


def name(obj):
    """ "cyan cube", or "night stand" where no color is known."""
    return f"{obj['color']} {obj['label']}" if obj["color"] else obj["label"]


def describe(obj, mark):
    """What a mark holds, in words: the evidence of the language-only path."""
    x, _, z = obj["center"]
    sides = ["on the left", "in the middle", "on the right"]
    side = word_for(x / z, sides, [-0.15, 0.15])
    return f"The {mark} holds a {name(obj)} {side}, {how_far(z)}."


def how_far(depth):
    """A depth in metres, in words."""
    words = ["very near", "near", "at middle range", "far", "very far"]
    return word_for(depth, words, [2.2, 3.5, 5, 6.3])


def how_far_apart(gap):
    """A distance in metres, in words."""
    words = ["almost touching", "close together", "some way apart", "far apart"]
    return word_for(gap, words, [0.8, 1.5, 2.8])


def word_for(value, words, limits):
    """The word for a value's range; limits: where each range but the first begins, ascending."""
    passed = sum(value >= limit for limit in limits)
    return words[passed]


def listing(objects):
    """What the image holds, from large to small: what catches the eye comes first."""
    return f"I see {len(objects)}: " + ", ".join(map(name, objects)) + "."


def lettered(options):
    """ " A. yes B. no": the options behind a question, always in the same order.

    So a letter means one thing within a family. To look letters up among shuffled options is a
    skill of its own, which costs a model of 1 M parameters more than the geometry.
    """
    return " " + " ".join(f"{letter(options, option)}. {option}" for option in options)


def letter(options, choice):
    """The letter of one of up to six options."""
    return "ABCDEF"[options.index(choice)]


def tenths(point):
    """A point in metres -> whole tenths, as the traces write it."""
    return [round(10 * float(value)) for value in point]


def centers_in_tenths(objects):
    return [tenths(obj["center"]) for obj in objects]


def meters(tenth):
    """-12 -> "-1.2": a number of tenths as a trace writes it."""
    sign = "-" if tenth < 0 else ""
    return f"{sign}{abs(tenth) // 10}.{abs(tenth) % 10}"


def rounded(answer):
    """An answer as a trace writes it: lengths with one decimal."""
    return f"{float(answer):.1f}" if "." in answer else answer


def distance_between(a, b):
    """Metres between the centres of two objects."""
    return float(np.linalg.norm(a["center"] - b["center"]))


def squared_distance(a, b):
    """The squared distance of two points in tenths -> (derivation, the square in tenths of m^2).

    Every number is rounded to one decimal as written. The coordinates are written again,
    p~q=|p - q|: to find and to subtract them in one step is beyond a tiny model.
    """
    steps = [abs(p - q) for p, q in zip(a, b)]
    squares = [(step * step + 5) // 10 for step in steps]  # hundredths, rounded to tenths
    total = sum(squares)
    differences = []
    for p, q, step in zip(a, b, steps):
        differences.append(f"{meters(p)}~{meters(q)}={meters(step)}")
    addition = "+".join(map(meters, squares))
    return " ".join(differences) + f"\n{addition}={meters(total)}", total


def comparison(axis, p, q):
    """ "z:1.2<3.4": two coordinates, in tenths, compared."""
    sign = ">" if p > q else "<"
    return f"{'xyz'[axis]}:{meters(p)}{sign}{meters(q)}"


def detect_block(objects, with_marks):
    """The detections of a DTR response; with_marks: the objects carry MARKS[0], MARKS[1], ..."""
    labels = [name(obj) for obj in objects]
    if with_marks:
        labels = [f"{label} ({mark})" for label, mark in zip(labels, MARKS)]
    lines = [f"Find {len(objects)} relevant objects:"]
    for obj, label in zip(objects, labels):
        lines.append(box_line(tenths(obj["center"]), label))
    return "<detect>" + "\n".join(lines) + "</detect>\n"


def box_line(point, label, attributes=""):
    """One detection; point: its centre in tenths."""
    center = ",".join(meters(value) for value in point)
    return f'<3d_box center="{center}"{attributes}>{label}</3d_box>'


def finish(think, answer):
    """The end of a response on both paths."""
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


# ----------------------------------------------------------------------------------------------
# rows: dicts of the published format, with picture and depth in memory instead of on disk


def lor_row(scene, task, ask):
    """A question with the trace of the language-only path."""
    target = finish(ask.words, rounded(ask.answer))
    return instance(scene, "lor", task, ask.text, target, ask.marked, answer=ask.answer)


def dtr_row(scene, task, ask, objects, derivation, answer):
    """A question with the trace of the path that detects first, and the true centres ("3d_pos")."""
    if ask.marked:
        detections = detect_block(ask.marked, with_marks=True)
    else:
        detections = detect_block(objects, with_marks=False)
    target = detections + finish(derivation, answer)
    truth = {}
    for mark, obj in zip(MARKS, ask.marked):
        truth[field_of(mark)] = {
            "bbox_2d": thousandths(obj["box"], scene.image),
            "label": obj["label"],
            "center_cam": [round(float(value), 4) for value in obj["center"]],
            "instance_name": name(obj),
        }
    more = {"answer": ask.answer, "bbox": [], "3d_pos": truth}
    return instance(scene, "dtr", task, ask.text, target, ask.marked, **more)


def instance(scene, key, task, question, target, marked=(), **more):
    """One row; marked: the objects that carry MARKS[0], MARKS[1], ...; more: further fields.

    key: tells the rows of one scene and task apart. Where `more` holds "bbox", the first mention of
    each mark in the question gets its `<mask>`, the place of a region token, and "bbox" becomes the
    boxes of these regions, in the order of the text.
    """
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
        row[field_of(mark)] = [thousandths(obj["box"], scene.image)]
    if "bbox" in more:
        in_text_order = sorted(zip(MARKS, marked), key=lambda pair: question.find(pair[0]))
        more["bbox"] = [[float(value) for value in obj["box"]] for _, obj in in_text_order]
        for mark, _ in in_text_order:
            question = question.replace(mark, f"{mark} <mask>", 1)
    row["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": target},
    ]
    return {**row, **more}


def field_of(mark):
    """The field of a row that holds a mark's boxes: "red_bbox"."""
    return mark.replace(" ", "_")


def thousandths(box, image):
    """A 2D box in pixels -> in thousandths of the picture's width and height."""
    height, width = image.shape[:2]
    sides = (width, height, width, height)
    return [round(1000 * value / side) for value, side in zip(box, sides)]


# ----------------------------------------------------------------------------------------------
# grounding: rows without a chain of thought


def grounding(scene, seed, sensor=False, tasks=GROUNDING):
    """Rows without a chain of thought: those of `tasks` that the scene allows.

    sensor: as in `ask_questions`.
    """
    objects = objects_of(scene, sensor)
    if not objects:
        return []
    rng = random_stream(scene, seed, STREAMS["grounding"])
    several = list(rng.permutation(objects)[: len(MARKS)])
    count = rng.choice([1, 1, 1, 2, 3])
    marked = several[:count]
    rows = [
        center_row(scene, marked),
        region_row(scene, several),
        mark_row(scene, marked),
        box3d_row(scene, marked[0]),
        *box2d_rows(scene, marked, objects),
    ]
    if all_colored(objects):
        target = listing(objects)
        rows.append(instance(scene, "listing", "listing", "What is in the image?", target))
        if "vqa" in tasks:
            rows += vqa_rows(scene, seed, objects)
    rows += text_only_rows(scene, seed, objects, tasks)
    return [row for row in rows if row["task"] in tasks]


def center_row(scene, marked):
    lines = [box_line_of(obj, mark) for obj, mark in zip(marked, MARKS)]
    question = f"Give the 3D center: {marks_of(marked)}."
    return instance(scene, "center", "center", question, "\n".join(lines), marked, bbox=[])


def region_row(scene, marked):
    question = f"What is in each region: {marks_of(marked)}?"
    names = ", ".join(map(name, marked))
    return instance(scene, "region", "region_qa", question, names, marked, bbox=[])


def mark_row(scene, marked):
    question = f"What is in the region: {marks_of(marked)}?"
    target = " ".join(describe(obj, mark) for obj, mark in zip(marked, MARKS))
    return instance(scene, "mark", "mark_qa", question, target, marked)


def box3d_row(scene, obj):
    size = ",".join(meters(value) for value in tenths(obj["size"]))
    angles = ",".join(map(str, euler_angles(obj["rotation"])))
    target = box_line_of(obj, RED, f' size="{size}" angles="{angles}"')
    return instance(scene, "box3d", "box3d", f"Give the 3D box: {RED}.", target, [obj], bbox=[])


def box2d_rows(scene, marked, objects):
    """One per marked object whose name no other object has."""
    names = [name(obj) for obj in objects]
    rows = []
    for obj in marked:
        if names.count(name(obj)) == 1:
            box = ",".join(map(str, thousandths(obj["box"], scene.image)))
            rows.append(instance(scene, "box2d", "ground2d", f"Where is the {name(obj)}?", box))
    return rows


def vqa_rows(scene, seed, objects):
    rows = []
    for number, (task, family) in enumerate(GENERAL_FAMILIES.items()):
        rng = random_stream(scene, seed, STREAMS["vqa"] + number)
        ask = family(rng, objects)
        if ask:
            rows.append(instance(scene, task, "vqa", ask.text, ask.answer))
    return rows


def marks_of(marked):
    """ "red bbox, blue bbox": the marks that some objects carry, as a question names them."""
    return ", ".join(MARKS[: len(marked)])


def box_line_of(obj, mark, attributes=""):
    return box_line(tenths(obj["center"]), f"{name(obj)} ({mark})", attributes)


def euler_angles(rotation):
    """Box axes in the camera frame -> rotations about y, x and z in whole degrees.

    The rotation is Ry Rx Rz.
    """
    matrix = np.asarray(rotation)
    about_y = np.arctan2(matrix[0, 2], matrix[2, 2])
    about_x = np.arcsin(np.clip(-matrix[1, 2], -1, 1))
    about_z = np.arctan2(matrix[1, 0], matrix[1, 1])
    return [round(float(np.degrees(angle))) for angle in (about_y, about_x, about_z)]


# ----------------------------------------------------------------------------------------------
# text only: grounding rows that give what a response would first find, and ask for what follows


def text_only_rows(scene, seed, objects, tasks):
    """The rows of those of `tasks` that are in TEXT_ONLY.

    Every row of the format has a picture; theirs is a small blank one.
    """
    rows = []
    black = np.zeros((16, 16, 3), np.uint8)
    blank = replace(scene, image=black, depth=None)
    for number, family in enumerate(FAMILIES):
        task = "measure" if family in ("distance", "nearer") else "derive"
        if task not in tasks:
            continue
        rng = random_stream(scene, seed, STREAMS["text_only"] + number)
        solved = solved_question(family, rng, objects)
        if solved:
            ask, derivation, _ = solved
            if ask.marked:
                given = detect_block(ask.marked, with_marks=True)
            else:
                given = listing(objects)
            question = f"{ask.text}\n{given}"
            target = f"<think>{derivation}</think>"
            rows.append(instance(blank, family, task, question, target))
    if "lookup" in tasks and all_colored(objects):
        rng = random_stream(scene, seed, STREAMS["lookup"])
        question, target = lookup_question(rng, objects)
        rows.append(instance(blank, "lookup", "lookup", question, target))
    return rows


def lookup_question(rng, objects):
    """Colors to look up in a given listing or in given detections -> (question, target).

    What is found stands right behind its color, as it stands in the list: with a colon between them
    a tiny model needs many times as long to learn it.
    """
    objects = list(rng.permutation(objects))
    if rng.integers(4) > 0:  # three times of four
        given = listing(objects)
    else:
        given = detect_block(objects, with_marks=False)
    beside = dict.fromkeys(COLORS, "none")
    for obj in objects:
        beside[obj["color"]] = obj["label"]
    colors = rng.permutation(list(beside))[:4]
    pairs = ", ".join(f"{color} {beside[color]}" for color in colors)
    question = f"Look up: {', '.join(colors)}\n{given}"
    return question, f"<think>Look: {pairs}.</think>"
