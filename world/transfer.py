"""Other worlds than the trained one, to ask what a model carries over without training.

    python eval.py --world view

view      field of view of 85 to 100 degrees; trained on 50 to 80
tilt      camera looking down by 30 to 40 degrees; trained on 8 to 28
crowd     six objects, always; trained on three to six
wording   the same questions in other words
shades    each color a quarter darker
"""

import re

from formats.errors import UserError
from world.raycast import COLORS

DARKER_COLORS = {name: tuple(0.75 * value for value in rgb) for name, rgb in COLORS.items()}
# What make_scene (world/raycast.py) is told.
VARIANTS = {
    "view": {"fov": (85, 100)},
    "tilt": {"pitch": (30, 40)},
    "crowd": {"objects": (6, 6)},
    "wording": {},
    "shades": {"colors": DARKER_COLORS},
}
# An entry per family of world/questions.py: (pattern, other words). A mark may have its `<mask>`
# behind it. What stands behind a match, the options, stays.
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
