"""The rewards, by example: what pays, what does not, and what can't happen whatever the model writes.

    python -m pytest -q test_rewards.py        about ten seconds on one core
    python test_rewards.py                     prints the time for 1,000 adversarial responses of 100 kB

1. Right responses of every kind score exactly 1.
2. The 22 flaws of the released reward, each with the response that exploits it; four are the paper's choices and kept.
3. Wrong ground truth is an error.
4. The classes behind the flaws: seeded random mutations of right responses, judged by a second, strict reader that
   shares no code with rewards.py.
5. The embedded world's traces earn everything on their own question and chance on another.
"""

import doctest
import math
import random
import re
import time
from decimal import Decimal, InvalidOperation

import pytest

import rewards
from rewards import accuracy_reward, detection_reward, format_reward, total_reward

RED, BLUE = (0.3, -0.81, 3.32), (1.5, 0.2, 4.0)
TWO = {"red bbox": RED, "blue bbox": BLUE}


def answer(text):
    return f"<answer>{text}</answer>"


def lor(text, think="The chair stands behind the table."):
    return f"<think>{think}</think>\n{answer(text)}"


def numbers(xyz):
    return ",".join(f"{v:.2f}" for v in xyz)


def box(tag, center, name="wooden chair"):
    """One line of a <detect> block; a center that is no tuple is written as it stands."""
    center = numbers(center) if isinstance(center, tuple) else center
    return f'<3d_box center="{center}">{name} ({tag})</3d_box>'


def detect(*boxes, n=None, frame=None):
    find = "Find" if frame is None else f"After aligning to the reference frame {frame}, find"
    return (
        "<detect>"
        + "\n".join([f"{find} {len(boxes) if n is None else n} relevant objects:", *boxes])
        + "</detect>"
    )


def dtr(*boxes, text="B", think="4.00 - 3.32 = 0.68, so it is nearer.", **header):
    return f"{detect(*boxes, **header)}\n{lor(text, think)}"


BOTH = [box("red bbox", RED), box("blue bbox", BLUE)]


# ---------------------------------------------------------------------------------------------------------------------
# 1. right responses


KINDS = {
    "choice": "B",
    "number": "2.35",
    "text": "none of these",
    "motion": "move_right:0.4,move_up:0.4,move_forward:2.4,rotate_up:5,rotate_right:60",
}


@pytest.mark.parametrize("kind", KINDS)
def test_right_responses_of_every_kind_score_exactly_one(kind):
    truth = KINDS[kind]
    assert rewards.kind_of(truth) == kind
    full = {"total": 1.0, "accuracy": 1.0, "format": 1.0, "detection": 1.0}
    assert total_reward(lor(truth), truth, "lor") == {**full, "detection": None}
    assert total_reward(lor(truth), truth, "lor", images=3) == {**full, "detection": None}
    assert total_reward(dtr(*BOTH, text=truth), truth, "dtr", TWO) == full
    assert total_reward(dtr(*BOTH, text=truth), truth, "dtr", {}) == {**full, "detection": None}
    frames = {tag: {0: (9.0, 9.0, 9.0), 1: center} for tag, center in TWO.items()}
    assert total_reward(dtr(*BOTH, text=truth, frame=1), truth, "dtr", frames, images=2) == full


def test_a_dtr_response_may_list_boxes_without_marks_or_none_at_all():
    plain = '<3d_box center="0.3,-0.81,3.32">wooden chair</3d_box>'
    assert format_reward(dtr(plain, plain), "dtr") == format_reward(dtr(), "dtr") == 1
    assert detection_reward(dtr(plain), {"red bbox": RED}) == 0  # but only a mark can be matched


def test_total_is_the_weighted_sum_of_its_parts():
    half = dtr(box("red bbox", RED), text="A")
    parts = {"total": 0.1 + 0.1 * 0.5, "accuracy": 0, "format": 1, "detection": 0.5}
    assert total_reward(half, "B", "dtr", TWO) == parts
    assert total_reward(half, "A", "dtr")["total"] == 1
    assert total_reward("chair " + half, "A", "dtr", TWO)["total"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    "distance, paid",
    [
        (0, 1),
        (0.09, 1),
        (0.11, 0.8),
        (0.19, 0.8),
        (0.21, 0.6),
        (0.29, 0.6),
        (0.31, 0.4),
        (0.39, 0.4),
        (0.41, 0.2),
        (0.59, 0.2),
        (0.61, 0.1),
        (0.99, 0.1),
        (1.01, 0),
        (50, 0),
    ],
)
def test_detection_bins(distance, paid):
    assert (
        detection_reward(detect(box("red point", (0, 0, 3 + distance))), {"red point": (0, 0, 3)})
        == paid
    )


def test_rounding_to_the_two_decimals_of_the_grammar_costs_nothing():
    rng = random.Random(0)
    for _ in range(1000):
        truth = tuple(rng.uniform(-80, 80) for _ in range(3))
        assert detection_reward(detect(box("red bbox", truth)), {"red bbox": truth}) == 1


def test_examples_in_the_docstrings():
    failed, tried = doctest.testmod(rewards)
    assert failed == 0 and tried >= 8


def test_readers_that_other_files_use():
    response = dtr(
        box("red bbox", (0.0, 0.0, 3.0)), '<3d_box center="1,2,3">lamp</3d_box>', text=" 3.5 "
    )
    assert rewards.extract_answer(response) == "3.5"
    assert rewards.parse_boxes(response) == [
        ("wooden chair", "red bbox", (0, 0, 3)),
        ("lamp", None, (1, 2, 3)),
    ]
    assert rewards.parse_header(response) == (2, 0)
    truth = {"red bbox": (0, 3, 7), "blue bbox": BLUE}
    assert rewards.center_errors(response, truth) == {"red bbox": 5, "blue bbox": None}


# ---------------------------------------------------------------------------------------------------------------------
# 2. the flaws of the released reward


def test_flaw_01_leaving_out_the_hard_object_costs_its_share():
    assert detection_reward(detect(BOTH[0]), TWO) == 0.5  # released: 1.0
    assert detection_reward(detect(*BOTH, box("green bbox", RED)), TWO) == pytest.approx(2 / 3)
    assert detection_reward(detect(), TWO) == detection_reward(lor("B"), TWO) == 0
    assert detection_reward(detect(*BOTH, *["<3d_box>"] * 398), TWO) == 2 / 400


def test_flaw_02_a_box_with_several_tags_has_none():
    here = {"red bbox": RED, "blue bbox": RED, "green bbox": RED, "yellow bbox": RED}
    for name in (
        "red bbox blue bbox green bbox yellow bbox",
        "chair (red bbox blue bbox)",
        "red bbox",
        "chair (red bbox, blue bbox)",
        "chair (red bbox) (blue bbox)",
        "(red bbox) chair (blue bbox)",
    ):
        one = f'<3d_box center="{numbers(RED)}">{name}</3d_box>'
        assert detection_reward(detect(one), here) == 0, name  # released: up to 4.0
        assert detection_reward(detect(one, box("red bbox", RED)), here) == 0.25, name


@pytest.mark.parametrize(
    "tag",
    [
        "infrared bbox",
        "red bboxes",
        "Red bbox",
        "red  bbox",
        " red bbox",
        "red_bbox",
        "red",
        "red point",
        "red bbox) big (",
        "r\u0435d bbox",
        "red\u200b bbox",
        "red\u00a0bbox",
    ],
)
def test_flaw_03_a_tag_matches_exactly(tag):
    assert detection_reward(detect(box(tag, RED)), {"red bbox": RED}) == 0


@pytest.mark.parametrize(
    "center",
    [
        "0.5",
        "",
        "0.3,-0.81",
        "0.3,-0.81,3.32,1",
        "0.3,-0.81,3.32,0,0",
        "0.3,-0.81,3.32,",
        ",0.3,-0.81,3.32",
        "0.3,,3.32",
        "0.3;-0.81;3.32",
        "0.3 -0.81 3.32",
        "(0.3,-0.81,3.32)",
        "0.3,-0.81,3.32m",
    ],
)
def test_flaw_04_a_centre_is_exactly_three_numbers(center):
    response = dtr(box("red bbox", center), BOTH[1])
    assert detection_reward(response, TWO) == 0.5 and format_reward(response, "dtr") == 0
    assert (
        detection_reward(detect(box("red bbox", center), BOTH[1]), {"blue bbox": BLUE}) == 0.5
    )  # it counts as a box


def test_flaw_05_of_boxes_with_one_tag_only_the_first_counts():
    assert detection_reward(detect(*[BOTH[0]] * 4), {"red bbox": RED}) == 0.25
    assert detection_reward(detect(BOTH[0], BOTH[1], BOTH[0]), TWO) == pytest.approx(2 / 3)


def test_flaw_06_the_first_counts_whatever_comes_later():
    far = box("red bbox", (9.0, 9.0, 9.0))
    assert detection_reward(detect(BOTH[0], far), {"red bbox": RED}) == 0.5
    assert detection_reward(detect(far, BOTH[0]), {"red bbox": RED}) == 0
    unreadable = box("red bbox", "0.3,x,3.32")  # no second try after a centre that is no centre
    assert detection_reward(detect(unreadable, BOTH[0]), {"red bbox": RED}) == 0


@pytest.mark.parametrize(
    "broken",
    [
        "<3d_box",
        "<3d_box>",
        '<3d_box center="1,2,3">',
        '<3d_box center="1,2,3>chair</3d_box>',
        '<3d_box center="a,b,c">chair (green bbox)</3d_box>',
        '<3D_box center="1,2,3">chair</3d_box>',
    ],
)
def test_flaw_07_a_broken_box_does_not_spoil_the_others(broken):
    boxes = 3 if "<3d_box" in broken else 2  # what is no box at all costs the format only
    for lines in ([broken, *BOTH], [BOTH[0], broken, BOTH[1]], [*BOTH, broken]):
        assert detection_reward(detect(*lines), TWO) == 2 / boxes
        assert format_reward(dtr(*lines), "dtr") == format_reward(dtr(*lines, n=2), "dtr") == 0


FRAMES = {"red bbox": {i: (float(i), 0.0, 3.0) for i in range(11)}}


def test_flaw_08_the_first_image_is_frame_0():
    question = "Seen from the First image, how deep is the red bbox?"
    right, other = (
        detect(box("red bbox", (0, 0, 3)), frame=0),
        detect(box("red bbox", (1, 0, 3)), frame=1),
    )
    assert detection_reward(right, FRAMES, 11, question) == 1  # released: 0
    assert detection_reward(other, FRAMES, 11, question) == 0
    assert detection_reward(other, FRAMES, 11, "How deep is the red bbox?") == 1


def test_flaw_09_the_frame_is_a_whole_number_that_names_an_image():
    ten = detect(box("red bbox", (10.0, 0, 3)), frame=10)
    assert detection_reward(ten, FRAMES, 11) == 1  # released: reads frame 1
    for frame in ("11", "-1", "1.0", "01", "+1", "\u0661", "one", "", "1" * 5000):
        response = dtr(box("red bbox", (1.0, 0, 3)), frame=frame)
        assert detection_reward(response, FRAMES, 11) == format_reward(response, "dtr", 11) == 0
    assert (
        detection_reward(detect(box("red bbox", (1.0, 0, 3))), FRAMES, 11) == 0
    )  # no frame at all
    assert (
        format_reward(dtr(BOTH[0], frame=0), "dtr") == 0
    )  # a single image has no frames to choose from
    assert detection_reward(ten, {"red bbox": {0: (10.0, 0, 3)}}, 11) == 0  # no truth in frame 10


def test_flaw_10_the_grammar_as_the_prompt_shows_it_is_well_formed():
    shown = """<detect>Find 2 relevant objects:
<3d_box center="0.3,-0.81,3.32">wooden chair (red bbox)</3d_box>
<3d_box center="1.5,0.2,4">table (blue bbox)</3d_box></detect>
<think>The chair is at a depth of 3.32 and the table of 4.</think>
<answer>0.68</answer>"""
    assert format_reward(shown, "dtr") == 1
    assert format_reward(shown.replace("</3d_box></detect>", "</3d_box>\n</detect>"), "dtr") == 1
    assert (
        format_reward(shown.replace("\n", "\r\n"), "dtr")
        == format_reward(shown.replace("\n", ""), "dtr")
        == 1
    )
    assert (
        format_reward(shown.replace("</detect>", "</detect>,"), "dtr") == 0
    )  # as the released prompt shows it
    assert (
        format_reward(shown, "lor") == format_reward(lor("B"), "dtr") == 0
    )  # the other path's grammar


@pytest.mark.parametrize(
    "think", ["", " ", "\n\t\r\n", "\u00a0\u3000", "\u200b\u200d\ufeff", "\u3164", "\u0301"]
)
def test_flaw_11_empty_reasoning_is_no_reasoning(think):
    assert (
        format_reward(lor("B", think), "lor") == format_reward(dtr(*BOTH, think=think), "dtr") == 0
    )
    assert format_reward(lor(think), "lor") == 0  # nor is an empty answer an answer
    assert format_reward(dtr(f'<3d_box center="1,2,3">{think} (red bbox)</3d_box>'), "dtr") == 0


def test_flaw_12_an_answer_on_its_own_line_counts():
    for truth in KINDS.values():
        assert accuracy_reward(lor(f"\n{truth}\n"), truth) == 1  # released: 0, with format 1
        assert accuracy_reward(lor(f"\r\n {truth}\r\n"), truth) == 1
    assert accuracy_reward(lor("The chair.\nB"), "B") == 0


def test_flaw_13_camera_motion_is_read_by_signed_axis():
    truth = "move_right:0.4,rotate_up:5"
    both_ways = "move_right:0.4,move_left:0.4,rotate_up:5,rotate_down:5"
    assert accuracy_reward(answer(both_ways), truth) == 0  # released: 1.0
    assert accuracy_reward(answer("move_right:0.4,move_right:0.4,rotate_up:5"), truth) == 0.5
    assert accuracy_reward(answer(" rotate_up : 5 , move_right: 0.4"), truth) == 1  # released: 0
    assert accuracy_reward(answer("move_left:-0.4,rotate_down:-5"), truth) == 1
    assert accuracy_reward(answer("move_left:0.4,rotate_up:5"), truth) == pytest.approx(
        0.5 + math.exp(-1.6 / 0.41) / 2
    )
    assert accuracy_reward(answer(truth + ",move_up:0"), truth) == pytest.approx(
        2 / 3
    )  # an axis too many
    assert accuracy_reward(answer("move_right:0.4"), truth) == 0.5  # an axis too few
    for broken in (
        "rotate_up:nan",
        "rotate_up:",
        "rotate_up",
        "rotate_up:5 degrees",
        "rotate_up:1e999",
    ):
        assert accuracy_reward(answer("move_right:0.4," + broken), truth) in (0.5, 1 / 3), broken
    assert accuracy_reward(answer("move_right:0,4,rotate_up:5"), truth) < 0.5  # a comma ends a part
    every_axis = ",".join(f"{name}:0" for name in rewards.MOTIONS)
    assert (
        accuracy_reward(answer(every_axis), truth)
        == accuracy_reward(answer("move_right"), truth)
        == 0
    )


def test_flaw_14_rotation_text_and_late_options_can_be_right():
    for truth in (
        "rotate_left:30",
        "rotate_up:5,rotate_right:60",
        "none of these",
        "Yes",
        "F",
        "Z",
    ):
        assert accuracy_reward(lor(truth), truth) == 1  # released: 0
    for said in ("None of  these.", "NONE OF THESE", " none\nof these "):
        assert accuracy_reward(lor(said), "none of these") == 1
    for said in (
        "none",
        "none of these or all",
        "none of these..",
        "not none of these",
        "noneofthese",
        "",
    ):
        assert accuracy_reward(lor(said), "none of these") == 0
    assert accuracy_reward(lor("E"), "F") == 0


NO_NUMBERS = [
    "nan",
    "-nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "1e999",
    "-1e400",
    "1_5",
    "\uff11\uff15",
    "\u0661\u0665",
    "1\u200b5",
    "\u221215",
    "\u00b2",
    "0x1F",
    "1 5",
    "--15",
    "15m",
    "1.5.0",
    "1e",
    "e5",
    ".",
    "+",
    "",
    "fifteen",
    "15/1",
    "15." + "0" * 100_000,
]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_flaw_15_only_a_finite_ascii_decimal_is_a_number(text):
    assert rewards.read_number(text) is None
    assert accuracy_reward(lor(text), "15") == 0  # released: NaN for some of them
    assert accuracy_reward(lor(f"move_up:{text}"), "move_up:15") == 0
    response = dtr(box("red bbox", f"0.3,{text},3.32"), BOTH[1])
    assert detection_reward(response, {"red bbox": (0.3, 15, 3.32), "blue bbox": BLUE}) == 0.5
    assert format_reward(response, "dtr") == 0


@pytest.mark.parametrize(
    "text, value",
    [
        ("15", 15),
        ("+15", 15),
        ("-1.50", -1.5),
        (".5", 0.5),
        ("5.", 5),
        ("1.5e1", 15),
        ("15E-1", 1.5),
        (" 15\n", 15),
        ("015", 15),
        ("1e-999", 0),
    ],
)
def test_flaw_15_and_these_are_numbers(text, value):
    assert rewards.read_number(text) == value


def test_flaw_16_kept_the_constant_answer_0_earns_exp_minus_2():
    for truth in ("2.5", "60", "-3"):
        assert accuracy_reward(lor("0"), truth) == pytest.approx(math.exp(-2), rel=0.01)
    assert accuracy_reward(lor("3"), "2") == pytest.approx(math.exp(-2 / 2.01))


@pytest.mark.parametrize("tag", ["detect", "think", "answer"])
def test_flaw_17_every_tag_stands_once(tag):
    right = dtr(*BOTH)
    inside, lost = (
        rewards.section(right, tag),
        {"detect": "detection", "answer": "accuracy"}.get(tag, "format"),
    )
    for extra in (f"<{tag}>{inside}</{tag}>", f"<{tag}>", f"</{tag}>"):
        for spoiled in (
            right + extra,
            extra + right,
            right.replace("\n<think>", f"\n{extra}<think>"),
            right.replace("so it", extra),
            right.replace("wooden", extra),
        ):
            assert format_reward(spoiled, "dtr") == 0  # released: 1 with two <detect> blocks
            assert total_reward(spoiled, "B", "dtr", TWO)[lost] == 0
    for old, new in ((f"<{tag}>", ""), (f"</{tag}>", ""), (f"</{tag}>", f"<{tag}>")):
        assert format_reward(right.replace(old, new), "dtr") == 0
    assert format_reward(f"{lor('B')}\n{detect(*BOTH)}", "dtr") == 0  # right parts, wrong order
    assert (
        format_reward(right.replace("so it", BOTH[0]), "dtr")
        == format_reward(lor("B", BOTH[0]), "lor")
        == 0
    )


@pytest.mark.parametrize("n", [0, 1, 3, "02", "2.0", "two", "", "\u0662", "9" * 5000])
def test_flaw_17_the_announced_number_of_boxes_is_the_number_of_boxes(n):
    assert format_reward(dtr(*BOTH, n=n), "dtr") == 0
    assert (
        detection_reward(dtr(*BOTH, n=n), TWO) == 1
    )  # with one image the header is form, no content


def test_flaw_18_kept_text_around_the_tags_costs_the_format_part_only():
    right = dtr(*BOTH)
    for response in (
        "Sure! " + right,
        right + " I hope that helps.",
        right.replace("\n<think>", " and <think>"),
    ):
        assert total_reward(response, "B", "dtr", TWO)["total"] == pytest.approx(0.9)


def test_flaw_19_kept_skipping_detection_still_earns_the_accuracy_part():
    assert total_reward(lor("B"), "B", "dtr", TWO)["total"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "text", ["A", "(A)", "A.", "A)", "A. left", "(A) left", "A) left", " (A)\nleft", "(A) A is"]
)
def test_flaw_20_ways_to_write_the_letter_a(text):
    assert accuracy_reward(lor(text), "A") == 1
    assert accuracy_reward(lor(text), "B") == 0


@pytest.mark.parametrize(
    "text",
    [
        "Option A",
        "the answer is A",
        "A or B",
        "AB",
        "Because",
        "a",
        "(a)",
        "A left",
        "A, left",
        "A B",
        "(A",
        "A..",
        "((A))",
        "(AB)",
        "(A) or (B)",
        "A. and B.",
        "(A) (B)",
        "A) B)",
        "A/B",
        "(A)(B)(C)",
        "ABCDEF",
        "**A**",
        "",
        "\u0410",
        "\uff21",
        "A\u200b",
    ],
)
def test_flaw_20_no_letter(text):
    for truth in "ABCDEFO":
        assert accuracy_reward(lor(text), truth) == 0


def test_flaw_21_spelling_of_the_centre_attribute():
    for attribute in (
        'center = "0.3,-0.81,3.32"',
        "center='0.3,-0.81,3.32'",
        'center=" 0.3, -0.81 ,3.32 "',
        'center="0.30,-.81,3.32" ',
        'center="3e-1,-0.810,+3.32"',
        '\ncenter="0.3,-0.81,3.32"',
    ):
        same = f"<3d_box {attribute}>wooden chair (red bbox)</3d_box>"
        assert total_reward(dtr(same, BOTH[1]), "B", "dtr", TWO)["total"] == 1, attribute
    for attribute in (
        'size="0.3,-0.81,3.32"',
        'Center="0.3,-0.81,3.32"',
        "center=0.3,-0.81,3.32",
        'center="0.3,-0.81,3.32" id="1"',
        'id="1" center="0.3,-0.81,3.32"',
        """center="0.3,-0.81,3.32'""",
        'center:"0.3,-0.81,3.32"',
        "",
    ):
        other = f"<3d_box {attribute}>wooden chair (red bbox)</3d_box>"
        assert detection_reward(dtr(other, BOTH[1]), TWO) == 0.5, attribute
        assert format_reward(dtr(other, BOTH[1]), "dtr") == 0, attribute
    glued = '<3d_boxcenter="0.3,-0.81,3.32">wooden chair (red bbox)</3d_box>'
    assert detection_reward(detect(glued), {"red bbox": RED}) == 0


def test_flaw_22_kept_the_bins_do_not_grow_with_the_depth():
    for depth in (2.0, 80.0):
        assert (
            detection_reward(
                detect(box("red bbox", (0, 0, depth + 0.5))), {"red bbox": (0, 0, depth)}
            )
            == 0.2
        )


# ---------------------------------------------------------------------------------------------------------------------
# 3. wrong ground truth


@pytest.mark.parametrize(
    "truth",
    [
        "",
        "  ",
        ".",
        "\u200b",
        None,
        3,
        ["A"],
        "nan",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "1_5",
        "\uff11",
        "1.2.3",
        "move_right",
        "move_right:",
        "move_right:nan",
        "move_right:inf",
        "move_right:0.4,",
        "move_right:0.4;move_up:1",
        "move_sideways:1",
        "left,move_right:0.4",
        "move_right:0.4,move_left:0.4",
        "rotate_up:5,rotate_up:5",
    ],
)
def test_a_wrong_answer_in_the_data_is_an_error_whatever_the_response(truth):
    for response in (lor("B"), "", lor(str(truth))):
        with pytest.raises(ValueError, match="answer"):
            total_reward(response, truth, "lor")


@pytest.mark.parametrize(
    "centers, images, where",
    [
        ({"red bbox": (1, 2)}, 1, "red bbox"),
        ({"red bbox": (1, 2, 3, 4)}, 1, "red bbox"),
        ({"red bbox": None}, 1, "red bbox"),
        ({"red bbox": (1, 2, math.nan)}, 1, "red bbox"),
        ({"red bbox": RED, "blue bbox": (1, 2, math.inf)}, 1, "blue bbox"),
        ({"red bbox": "1,2,3"}, 1, "red bbox"),
        ({"red bbox": ("1", "2", "3")}, 1, "red bbox"),
        ({"red_bbox": RED}, 1, "red_bbox"),
        ({"chair": RED}, 1, "chair"),
        ({3: RED}, 1, "3"),
        ([RED], 1, "dict"),
        ({"red bbox": {0: RED}}, 1, "red bbox"),
        ({"red bbox": RED}, 2, "red bbox"),
        ({"red bbox": {}}, 2, "red bbox"),
        ({"red bbox": {2: RED}}, 2, "frames 0 to 1"),
        ({"red bbox": {"0": RED}}, 2, "frames 0 to 1"),
        ({"red bbox": {0: RED, 1: (1, 2)}}, 2, "frame 1"),
    ],
)
def test_wrong_centres_in_the_data_are_an_error_whatever_the_response(centers, images, where):
    for response in (dtr(*BOTH), "", lor("B")):
        with pytest.raises(ValueError, match="centers.*" + where):
            total_reward(response, "B", "dtr", centers, images)


def test_an_unknown_path_or_no_image_is_an_error():
    for path, images in (("DTR", 1), ("", 1), (None, 1), ("dtr", 0)):
        with pytest.raises(ValueError, match="path.*images"):
            format_reward(lor("B"), path, images)


# ---------------------------------------------------------------------------------------------------------------------
# 4. the classes behind the flaws: a strict second reader, by hand and character by character


class Rejected(Exception):
    pass


def demand(condition):
    if not condition:
        raise Rejected


class Reader:
    """A cursor over text: take a literal, skip white space, or read up to a literal; anything else is Rejected."""

    def __init__(self, text):
        self.text, self.at = text, 0

    def take(self, literal):
        demand(self.text.startswith(literal, self.at))
        self.at += len(literal)

    def space(self, least=0):
        start, self.at = self.at, len(self.text) - len(self.text[self.at :].lstrip())
        demand(self.at - start >= least)

    def until(self, literal):
        end = self.text.find(literal, self.at)
        demand(end >= 0)
        text, self.at = self.text[self.at : end], end + len(literal)
        return text

    def count(self, literal):
        """A whole number without sign or leading zero, then the literal."""
        digits = self.until(literal)
        demand(
            0 < len(digits) < 5
            and all(c in "0123456789" for c in digits)
            and (digits == "0" or digits[0] != "0")
        )
        return int(digits)


def strict_text(text):
    """Something printed, and none of the grammar's tags."""
    demand(
        any(c.isalnum() and c not in "\u115f\u1160\u3164\uffa0" or "!" <= c <= "~" for c in text)
    )
    demand(
        not any(
            t in text for name in ("detect", "think", "answer") for t in (f"<{name}>", f"</{name}>")
        )
    )
    demand("<3d_box" not in text and "</3d_box" not in text)
    return text


def strict_number(text):
    text = text.strip()
    demand(0 < len(text) <= 100 and all(c in "0123456789.+-eE" for c in text))
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise Rejected
    demand(abs(value) < Decimal("1.7e308"))
    return float(value)


def strict_tag(name):
    """The mark at the end of a box's name; Rejected if there is none, or more than one, or nothing else."""

    def mark(text):
        color, _, kind = text.partition(" ")
        return kind in ("bbox", "point") and color.isascii() and color.isalpha() and color.islower()

    demand(name.endswith(")") and "<" not in name and ">" not in name)
    *before, last = name[:-1].split("(")
    closed = [text for part in before for text in part.split(")")[:-1]]
    demand(mark(last) and not any(text.endswith((" bbox", " point")) for text in closed))
    strict_text("(".join(before))
    return last


def strict_detection(read, centers, images, question):
    """The cursor stands behind <detect>: every object once, within 0.1 m, and nothing else."""
    frame = 0
    read.space()
    if images > 1:
        read.take("After aligning to the reference frame ")
        frame = read.count(", find ")
        demand(frame < images and (frame == 0 or "first image" not in question))
    else:
        read.take("Find ")
    left = dict(centers)
    for _ in range(read.count(" relevant objects:")):
        read.space()
        read.take("<3d_box")
        read.space(least=1)
        read.take("center")
        read.space()
        read.take("=")
        read.space()
        quote = read.text[read.at : read.at + 1]
        demand(quote in ("'", '"'))
        read.take(quote)
        center = [strict_number(part) for part in read.until(quote).split(",")]
        read.space()
        read.take(">")
        tag = strict_tag(read.until("</3d_box>").strip())
        demand(len(center) == 3 and tag in left)
        truth = left.pop(tag)
        demand(math.dist(center, truth[frame] if images > 1 else truth) < 0.1)
    demand(not left)
    read.space()
    read.take("</detect>")


def strict_motion(text):
    ways = {"right": ("right", 1), "left": ("right", -1), "up": ("up", 1), "down": ("up", -1)}
    depth = {"forward": ("forward", 1), "back": ("forward", -1), "backward": ("forward", -1)}
    known, axes = {"move": {**ways, **depth}, "rotate": ways}, {}
    for part in text.split(","):
        demand(part.count(":") == 1 and part.strip().count("_") == 1)
        verb, way = part.split(":")[0].strip().split("_")
        demand(way in known.get(verb, ()))
        axis, sign = known[verb][way]
        demand((verb, axis) not in axes)
        axes[verb, axis] = sign * strict_number(part.split(":")[1])
    return axes


def strict_answer(said, truth, kind):
    def near(a, b):
        return abs(a - b) <= 1e-12 * (abs(b) + 0.01)

    said = said.strip()
    if kind == "number":
        demand(near(strict_number(said), float(truth)))
    elif kind == "motion":
        said, truth = strict_motion(said), strict_motion(truth)
        demand(said.keys() == truth.keys() and all(near(said[axis], truth[axis]) for axis in truth))
    elif kind == "text":
        words = [" ".join(text.casefold().split()) for text in (said, truth)]
        demand(len({(w.removesuffix(".")).strip() for w in words}) == 1)
    elif said != truth:
        marked = [f"{truth}.", f"{truth})", f"({truth})"]
        form, *rest = said.split(maxsplit=1)
        demand(form in marked)
        other = rest[0].split()[0] + " " if rest else " "
        demand(
            not any(
                other == m.replace(truth, c) + " "
                for m in marked
                for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            )
        )
        for word in ("or", "and"):
            after = other[len(word) :][:1]
            demand(not other.startswith(word) or after.isalnum() or after == "_")


def deserves_one(response, truth, kind, path, centers, images, question):
    read = Reader(response)
    try:
        read.space()
        if path == "dtr":
            read.take("<detect>")
            strict_detection(read, centers, images, question)
            read.space()
        read.take("<think>")
        strict_text(read.until("</think>"))
        read.space()
        read.take("<answer>")
        strict_answer(strict_text(read.until("</answer>")), truth, kind)
        demand(not read.text[read.at :].strip())
        return True
    except Rejected:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# seeded random responses


MARKS = [
    f"{color} {kind}" for color in ("red", "blue", "green", "yellow") for kind in ("bbox", "point")
]
LOOK_ALIKE = {
    "a": "\u0430",
    "e": "\u0435",
    "o": "\u043e",
    "i": "\u0456",
    "A": "\u0391",
    "B": "\u0392",
    "1": "\uff11",
    "2": "\u0662",
    "-": "\u2212",
    ",": "\uff0c",
    "<": "\uff1c",
    ">": "\uff1e",
    '"': "\u201d",
    " ": "\u00a0",
    "(": "\uff08",
    ".": "\u3002",
    ":": "\uff1a",
}
TOKEN = re.compile(r"</?(?:detect|think|answer)>|<3d_box|</3d_box>")
DECIMAL = re.compile(r"-?\d+\.?\d*")
COLOR, SORT = re.compile("red|blue|green|yellow"), re.compile("bbox|point")
PLAIN, JOINT = re.compile("[" + re.escape("".join(LOOK_ALIKE)) + "]"), re.compile(r"[\s=\",>(]")


def right_response(rng):
    """-> (response, everything that a reward is given beside it); scores 1."""
    kind = rng.choice(list(KINDS))
    path = rng.choice(["lor", "dtr", "dtr"])
    images = rng.choice([1, 1, 2, 12])
    if kind == "choice":
        truth = rng.choice("ABCDEF")
    elif kind == "number":
        truth = rng.choice(
            [f"{rng.uniform(0, 9):.2f}", f"{rng.uniform(-180, 180):.1f}", str(rng.randrange(12))]
        )
    elif kind == "motion":
        pairs = [
            ("move_right", "move_left"),
            ("move_up", "move_down"),
            ("move_forward", "move_back"),
            ("rotate_up", "rotate_down"),
            ("rotate_right", "rotate_left"),
        ]
        truth = ",".join(
            f"{rng.choice(p)}:{rng.uniform(0, 60):.1f}"
            for p in rng.sample(pairs, rng.randint(1, 5))
        )
    else:
        truth = rng.choice(["yes", "none of these", "The wooden chair", "left and above"])
    question = rng.choice(["How far is it?", "Seen from the first image, how far is it?"])
    frame = 0 if images == 1 or "first image" in question else rng.randrange(images)
    centers, lines = {}, []
    for mark in rng.sample(MARKS, rng.randint(1, 4)):
        frames = {i: tuple(rng.uniform(-9, 9) for _ in range(3)) for i in range(images)}
        centers[mark] = frames if images > 1 else frames[0]
        lines.append(
            box(mark, frames[frame], rng.choice(["chair", "tall lamp (oak)", "TV", "red box"]))
        )
    forms = (
        ["{}", "({})", "{}.", "{})", "{}. left", "({}) in front of it"]
        if kind == "choice"
        else ["{}"]
    )
    said = rng.choice(forms).format(truth)
    think = rng.choice(["It is 3.2 < 4.0 away.", "First (A),\nthen (B).", "\u692d\u5b50", "x"])
    frame = frame if images > 1 else None
    response = (
        lor(said, think) if path == "lor" else dtr(*lines, text=said, think=think, frame=frame)
    )
    return response, {
        "truth": truth,
        "kind": kind,
        "path": path,
        "centers": centers,
        "images": images,
        "question": question,
    }


def mutate(rng, text):
    """One random change; some are harmless, most are not."""

    def spot():
        return rng.randrange(len(text) + 1)

    def replace_one(pattern, new):
        found = list(pattern.finditer(text))
        if not found:
            return text
        m = rng.choice(found)
        return text[: m.start()] + new(m[0]) + text[m.end() :]

    at, end = sorted((spot(), spot()))
    change = rng.randrange(18)
    if change == 0:  # tags: drop, repeat, swap, nest
        return replace_one(TOKEN, lambda tag: "")
    if change == 1:
        return replace_one(TOKEN, lambda tag: tag * 2)
    if change == 2:
        others = ["<think>", "</think>", "<answer>", "</detect>", "<3d_box"]
        return replace_one(TOKEN, lambda tag: rng.choice([*others, tag.upper()]))
    if change == 3:
        name = rng.choice(["detect", "think", "answer"])
        return f"{text[:at]}<{name}>{text[at:end]}</{name}>{text[end:]}"
    if change == 4:  # truncate at either end, cut, repeat
        return text[: spot()] if rng.random() < 0.5 else text[spot() :]
    if change == 5:
        return text[:at] + text[min(end, at + 30) :]
    if change == 6:
        return text[:end] + text[at:end] + text[end:]
    if change == 7:  # names
        return replace_one(COLOR, lambda _: rng.choice(["red", "blue", "green", "infrared", ""]))
    if change == 8:
        return replace_one(
            SORT,
            lambda sort: rng.choice(["bbox", "point", sort + " red bbox", sort + ") (red bbox"]),
        )
    if change in (9, 10):  # numbers
        return replace_one(
            DECIMAL,
            lambda n: rng.choice(
                [
                    "",
                    n * 2,
                    f"{float(n) + rng.gauss(0, 0.1):.3f}",
                    f"{float(n) * 10:.2f}",
                    n + "0",
                    f" {n} ",
                    f"{n},{n}",
                    "-" + n,
                    "+" + n,
                    n + "e0",
                    "nan",
                    "inf",
                    "1e999",
                    "1_5",
                    "1e-999",
                    "\uff11",
                    "\u0661",
                ]
            ),
        )
    if change == 11:  # look-alikes, invisible characters, line ends
        return replace_one(PLAIN, LOOK_ALIKE.get)
    if change == 12:
        return text[:at] + rng.choice("\u200b\u200d\ufeff\u00a0\x00\u202e\u3164\u0301") + text[at:]
    if change == 13:
        return text.replace("\n", rng.choice(["\r\n", "\r", "", "\n\n", " \n", "\u2028"]))
    if change == 14:
        return replace_one(
            JOINT, lambda c: rng.choice([c + " ", " " + c, c + "\n", c.replace('"', "'"), c * 2])
        )
    if change == 15 and rng.random() < 0.02:
        return text[:at] + rng.choice('a1.,-_ \n<>"(\u200b\u0661') * 100_000 + text[at:]
    if change == 15:
        return text[:at] + chr(rng.randrange(32, 127)) + text[at:]
    if change == 16:  # lines: repeat one, or another order
        lines = text.split("\n")
        return "\n".join(
            rng.sample(lines, len(lines)) if rng.random() < 0.5 else lines + [rng.choice(lines)]
        )
    return text.replace('"', "'").swapcase() if rng.random() < 0.2 else text.replace('"', "'")


def test_whatever_the_model_writes_rewards_stay_in_range_and_one_is_deserved():
    rng, seen, beside = (
        random.Random(20),
        {True: 0, False: 0},
        ("path", "centers", "images", "question"),
    )
    while sum(seen.values()) < 20_000:
        response, given = right_response(rng)
        for step in range(8):  # the right one, then ever more wrong ones
            deserved = deserves_one(response, **given)
            assert deserved or step, response
            parts = total_reward(response, given["truth"], *[given[k] for k in beside])
            for part in parts.values():
                assert part is None or type(part) is float and 0 <= part <= 1, (
                    response[:500],
                    given,
                    parts,
                )
            assert (parts["total"] > 1 - 1e-9) == deserved, (response[:500], given, parts)
            seen[deserved] += 1
            response = mutate(rng, response)
            if len(response) > 150_000:
                break
    assert min(seen.values()) > 3_000, seen  # both sides are well covered


def test_text_that_never_was_a_response_scores_nothing_and_raises_nothing():
    rng = random.Random(21)
    pieces = [
        "<detect>",
        "</detect>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<3d_box",
        "</3d_box>",
        "\x00",
        "Find 1 relevant objects:",
        "(red bbox)",
        ' center="',
        '1,2,3">',
        "B",
        "3.2",
        "\n",
        "\ud800",
        "move_up:1",
    ]
    for _ in range(3000):
        response = "".join(rng.choices(pieces, k=rng.randrange(30)))
        for truth in KINDS.values():
            parts = total_reward(response, truth, "dtr", {"red bbox": (1, 2, 3)})
            assert all(0 <= part <= 1 for part in parts.values()) and parts["total"] < 1


def detection_case(rng):
    """-> ([(tag, centre)], truth): a tag at most once, right, near and far boxes, and some that match nothing."""
    marks = rng.sample(MARKS, rng.randint(1, 6))
    truth = {
        mark: tuple(rng.uniform(-5, 5) for _ in range(3))
        for mark in marks[: rng.randint(1, len(marks))]
    }
    boxes = []
    for mark in rng.sample(marks, rng.randint(0, len(marks))):
        spread = rng.choice([0, 0.05, 0.2, 1])
        boxes.append((mark, tuple(v + rng.gauss(0, spread) for v in truth.get(mark, (0, 0, 0)))))
    boxes += [("pink bbox" if rng.random() < 0.5 else "no mark", (1.0, 1.0, 1.0))] * rng.choice(
        [0, 0, 0, 1, 3]
    )
    return rng.sample(boxes, len(boxes)), truth


def score(boxes, truth):
    return detection_reward(detect(*(box(*b) for b in boxes)), truth)


def test_detection_cannot_be_raised_by_listing_less_more_or_in_another_order():
    rng = random.Random(22)
    for _ in range(5000):
        boxes, truth = detection_case(rng)
        now = score(boxes, truth)
        assert score(rng.sample(boxes, len(boxes)), truth) == now  # order (no tag is there twice)
        for i, (tag, center) in enumerate(boxes):
            fewer = score(boxes[:i] + boxes[i + 1 :], truth)
            assert (
                fewer <= now + 1e-12 or tag not in truth or math.dist(center, truth[tag]) > 0.09
            )  # a correct box
        two = "red bbox) (blue bbox"
        spare = rng.choice(
            [("no mark", RED), ("pink bbox", RED), ("pink bbox", "nan,1,2"), (two, RED)]
        )
        at = rng.randrange(len(boxes) + 1)
        assert score(boxes[:at] + [spare] + boxes[at:], truth) <= now  # a box that no object needs
        named = [tag for tag, _ in boxes if tag in truth]
        if named:  # a second guess at an object
            tag = rng.choice(named)
            assert score(boxes + [(tag, truth[tag])], truth) <= now
        if len(named) == len(truth):  # complete: any box is one too many
            anything = (rng.choice(MARKS), tuple(rng.uniform(-5, 5) for _ in range(3)))
            assert score(boxes + [anything], truth) <= now


def test_detection_cannot_be_raised_by_moving_a_centre_away():
    rng = random.Random(23)
    for _ in range(5000):
        boxes, truth = detection_case(rng)
        for i, (tag, center) in enumerate(boxes):
            if tag in truth:
                factor = rng.choice(
                    [1.5, 3, 10, 1e6]
                )  # along the ray from the truth, past rounding
                away = tuple(
                    t + factor * (c - t) + math.copysign(0.02, c - t)
                    for c, t in zip(center, truth[tag])
                )
                assert score(boxes[:i] + [(tag, away)] + boxes[i + 1 :], truth) <= score(
                    boxes, truth
                )


# ---------------------------------------------------------------------------------------------------------------------
# 5. the embedded world: what a perfect annotator writes earns everything, what belongs to another question does not


@pytest.fixture(scope="module")
def world():
    """(task, path) -> [(trace, answer, centres, question), ...] of 60 scenes with exact labels."""
    import data
    from world.questions import ask_questions
    from world.raycast import make_scene

    family = {}
    for seed in range(60):
        for row in ask_questions(make_scene(seed), seed):
            question, trace = data.turns(row)
            item = (trace, data.answer_of(row), data.centers_of(row), question)
            family.setdefault((row["task"], data.path_of(row)), []).append(item)
    return family


def test_traces_made_from_exact_labels_earn_full_reward(world):
    assert len(world) == 22  # eleven families on both paths
    for (task, path), items in world.items():
        parts = [
            total_reward(trace, truth, path, centers, question=text)
            for trace, truth, centers, text in items
        ]
        assert {p["format"] for p in parts} == {1.0}
        assert {p["detection"] for p in parts} == {1.0 if items[0][2] else None}
        assert sum(p["accuracy"] for p in parts) / len(parts) >= 0.95, (
            task,
            path,
        )  # what rounding costs


def test_traces_of_other_questions_score_near_chance(world):
    for (task, path), items in world.items():
        parts = [
            total_reward(items[i - step][0], truth, path, centers, question=text)
            for i, (_, truth, centers, text) in enumerate(items)
            for step in (1, 2, 3)
        ]
        guess = 1 / items[0][3].count(". ") if ". " in items[0][3] else 0.6  # options, or a number
        assert sum(p["accuracy"] for p in parts) / len(parts) < guess + 0.15, (task, path)
        assert sum(p["detection"] or 0 for p in parts) / len(parts) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# time: linear in the length of the response (printed, not asserted: a slow machine is no fault)


def adversarial(size):
    """{name: response of `size` characters}: long runs that a backtracking pattern would try in every split."""

    def fill(before, unit, after=""):
        return before + unit * (size // len(unit)) + after

    one = "<detect>Find 1 relevant objects:\n"
    tail = "</detect>\n" + lor("B")
    cases = {
        f"<think> of {unit!r}": fill("<think>", unit, f"</think>{answer('B')}")
        for unit in (
            "a",
            " ",
            "\n",
            "<",
            "<think>",
            "<answer>",
            "\u200b",
            "\u3164",
            "</think",
            "<3d_bo",
        )
    }
    cases |= {
        f"<answer> of {unit!r}{end}": lor(fill("", unit, end))
        for end in ("", "x")
        for unit in (
            "1",
            "9",
            "1.",
            "1e",
            "-",
            "_",
            ".",
            ",",
            "\u0661",
            " ",
            "a ",
            "A",
            "(A) ",
            "move_up:1,",
            "move_up:",
        )
    }
    cases |= {
        f"<detect> of {unit!r}": fill(one, unit, tail)
        for unit in (
            "<",
            " ",
            "<3d_box",
            "<3d_box ",
            '<3d_box center="',
            '<3d_box center="1,2,3">a</3d_box>',
            BOTH[0],
        )
    }
    cases |= {
        f"centre of {unit!r}{end}": fill(
            f'{one}<3d_box center="', unit, f'{end}">a (red bbox)</3d_box>{tail}'
        )
        for unit in ("1", "1,", ",", " ", "1.", "-", "e")
        for end in ("", "x", ",1,1")
    }
    cases |= {
        f"name of {unit!r}": fill(
            f'{one}<3d_box center="1,2,3">', unit, f" (red bbox)</3d_box>{tail}"
        )
        for unit in ("a", " ", "(", ")", "(a", "(red bbox)", "(a ", "bbox ")
    }
    cases |= {
        f"attribute of {unit!r}": fill(f"{one}<3d_box", unit, tail)
        for unit in (" ", "\n", " center", " center=", " center ")
    }
    cases |= {
        f"header of {unit!r}": fill("<detect>After aligning to the reference frame ", unit, tail)
        for unit in ("1", " ", "0", "find ")
    }
    return cases


def test_adversarial_responses_stay_in_range():
    for name, response in adversarial(100_000).items():
        for truth in KINDS.values():
            parts = total_reward(response, truth, "dtr", TWO)
            assert all(0 <= part <= 1 for part in parts.values()) and parts["total"] < 1, name


def benchmark():
    def milliseconds(response, truth):
        start = time.process_time()
        total_reward(response, truth, "dtr", TWO)
        return 1000 * (time.process_time() - start)

    cases, twice, took = adversarial(100_000), adversarial(200_000), []
    while len(took) < 1000:
        took += [
            (milliseconds(r, truth), name, truth)
            for name, r in cases.items()
            for truth in KINDS.values()
        ]
    took.sort(reverse=True)
    slowest, median = took[0][0], took[len(took) // 2][0]
    print(
        f"{len(took)} adversarial responses of 100 kB: slowest {slowest:.2f} ms, median {median:.2f} ms"
    )
    print("the slowest, best of 5; and how many times that for twice the length (2 is linear)")
    for name, truth in list({name: truth for _, name, truth in took[:100]}.items())[:10]:
        once, double = (min(milliseconds(c[name], truth) for _ in range(5)) for c in (cases, twice))
        print(f"{once:7.2f} ms  x {double / once:.1f}  {name}, truth {truth[:13]!r}")


if __name__ == "__main__":
    benchmark()
