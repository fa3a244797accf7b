"""Other worlds than the trained one, to ask what a model carries over without training.

    python eval.py --world view

view      field of view of 85 to 100 degrees; trained on 50 to 80
tilt      camera looking down by 30 to 40 degrees; trained on 8 to 28
crowd     six objects, always; trained on three to six
wording   the same questions in other words
shades    each color a quarter darker
"""

from world.raycast import COLORS

DARKER_COLORS = {name: tuple(0.75 * value for value in rgb) for name, rgb in COLORS.items()}
# What make_scene (world/raycast.py) is told; "wording": see reword in world/questions.py.
VARIANTS = {
    "view": {"fov": (85, 100)},
    "tilt": {"pitch": (30, 40)},
    "crowd": {"objects": (6, 6)},
    "wording": {},
    "shades": {"colors": DARKER_COLORS},
}
