"""Rows with several images, files of any length, the check of files and the choice of the path, against plain loops,
hand values and the standard library's readers.

    python -m pytest -q test_instances.py                              # half a minute on one core
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import collections
import io
import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    REALDATA,
    ROOT,
    encoded,
    make_learner,
    needs_real,
    process_group,  # noqa: F401  (at work in every test)
    with_advantages,
)
from PIL import Image
from test_model import NEVER, gradients, make_model, make_processor, make_tokenizer, one_by_one

import data
import eval
import grpo
import rewards
import sft
from engine.shared_prefix import rollout, token_logprobs
from formats import files, instances
from formats.errors import BadRow
from model import token_rules
from tools import check
from world import sources

PAIRS = REALDATA / "multiview" / "pairs.jsonl"
CPU, SIZES = torch.device("cpu"), [(48, 64), (32, 48), (64, 32)]  # height, width
PATCH, MERGE = 8, 2


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def metres(seed, size):
    return np.random.default_rng(seed).uniform(1, 6, size).astype(np.float32)


def three_images(**more):
    """An instance with pictures of three sizes, depth for two of them, and four regions in mixed order."""
    frames = {"0": {"center_cam": [0, 0, 2]}, "2": {"center_cam": [0, 1, 3]}}
    row = {
        "source": "file: row 7",
        "image": [picture(i, size) for i, size in enumerate(SIZES)],
        "depth": [metres(0, SIZES[0]), None, metres(2, SIZES[2])],
        "intrinsics": [[60.0, 60.0, 32.0, 24.0], None, [50.0, 50.0, 16.0, 32.0]],
        "bbox": {
            "0": [[3, 5, 30, 41]],
            "1": [[0, 0, 9, 7], [16, 8, 48, 32]],
            "2": [[31, 63, 32, 64]],
        },
        "mask_idx": {"0": [1, 1], "1": [2, 0], "2": [0, 0], "3": [1, 0]},
        "red_bbox": [[100, 100, 500, 600]],
        "blue_point": [[500, 500]],
        "green_bbox": [[250, 250, 750, 750]],
        "bbox_img_idx": [[2, 0]],
        "point_img_idx": [[1]],
        "conversations": talk(
            "Of <mask>, the red bbox <mask>, <mask> and <mask>, which is near?", "red bbox"
        ),
        "3d_pos": {"red_bbox": {"current_frame": 2, "all_frame_3d": frames}},
    }
    return {**row, **more}


# ---------------------------------------------------------------------------------------------------------------------
# several images


def test_masks_across_images_have_the_weights_of_a_plain_loop(tokenizer):
    row = three_images()
    sample = data.encode(row, tokenizer, make_processor(), train=False)
    boxes = [
        (1, (16, 8, 48, 32)),
        (2, (31, 63, 32, 64)),
        (0, (3, 5, 30, 41)),
        (1, (0, 0, 9, 7)),
    ]  # by mask_idx
    for weights, (image, (x1, y1, x2, y2)) in zip(sample["regions"], boxes, strict=True):
        expected = []
        for i, (h, w) in enumerate(SIZES):
            for top, left in np.ndindex(h // 16, w // 16):  # patches in blocks of 2 x 2
                for v, u in np.ndindex(MERGE, MERGE):
                    y, x = top * 16 + v * 8, left * 16 + u * 8
                    pixels = sum(
                        x1 <= b < x2 and y1 <= a < y2
                        for a in range(y, y + 8)
                        for b in range(x, x + 8)
                    )
                    expected.append(pixels if i == image else 0)
        np.testing.assert_allclose(weights, np.array(expected) / sum(expected), atol=1e-6)


def test_depth_and_intrinsics_of_each_image_are_its_own(tokenizer):
    row, processor = three_images(), make_processor()
    sample = data.encode(row, tokenizer, processor, train=False)
    ends = np.cumsum([h * w // 64 for h, w in SIZES])
    for i in range(3):
        alone = {"source": "x", "image": row["image"][i], "conversations": talk("?", "1")}
        if i != 1:
            alone |= {"depth": row["depth"][i], "intrinsics": row["intrinsics"][i]}
        points = data.encode(alone, tokenizer, processor, train=False)["points"]
        assert torch.equal(
            sample["points"][ends[i] - len(points) : ends[i]].nan_to_num(9), points.nan_to_num(9)
        )
    shared = data.encode(
        three_images(intrinsics=[60.0, 60.0, 32.0, 24.0]), tokenizer, processor, train=False
    )
    assert torch.equal(shared["points"][:48], sample["points"][:48])
    assert not torch.allclose(shared["points"][72:], sample["points"][72:], atol=0.1)


def test_marks_are_drawn_on_the_image_they_belong_to():
    for places in ([[2, 0]], [[2], [0]]):  # one image a field, in the order of the fields
        row = three_images(
            image=[np.zeros((*size, 3), np.uint8) for size in SIZES], bbox_img_idx=places
        )
        drawn = [
            np.asarray(instances.draw_marks(instances.open_image(row, i), row, i)) for i in range(3)
        ]
        assert [set(map(tuple, d.reshape(-1, 3).tolist())) - {(0, 0, 0)} for d in drawn] == [
            {(0, 255, 0)},
            {(0, 0, 255)},
            {(255, 0, 0)},
        ]
        assert tuple(drawn[2][round(0.1 * 64), round(0.3 * 32)]) == (255, 0, 0)  # its upper edge
        assert tuple(drawn[1][16, 24]) == (0, 0, 255) and tuple(drawn[0][12, 32]) == (0, 255, 0)


@pytest.mark.parametrize(
    "point, box",
    [
        ([500, 400], [95, 90, 105, 102]),
        ([10, 995], [0, 232.8, 7, 240]),
        ([1000, 0], [195, 0, 200, 6]),
    ],
)
def test_a_point_is_a_region_of_50_thousandths_around_it_clamped(point, box):
    row = {
        "source": "x",
        "image": "a.png",
        "blue_point": [point],
        "3d_pos": {},
        "conversations": talk("How far is the blue point?", "2"),
    }
    ((image, found),) = instances.regions_of(row, [(200, 240)])  # 5 and 6 pixels each side
    assert image == 0 and found == pytest.approx(box)
    assert instances.question_of(row) == "How far is the blue point <mask>?"


def test_the_reference_frame_is_that_of_the_first_mark_or_the_first_image():
    row = three_images()
    frame = lambda **more: instances.reference_frame({**row, **more})
    first = talk(
        "Seen from the first image, where is the red bbox <mask> <mask> <mask> <mask>?", "2"
    )
    assert frame() == 2 and frame(conversations=first) == 0 and frame(bbox_img_idx=[[1, 0]]) == 1
    unmarked = {key: value for key, value in row.items() if key not in instances.mark_fields(row)}
    assert instances.reference_frame({**unmarked, "main_frame_idx": 1}) == 1
    assert instances.reference_frame(unmarked) == 0 and frame(image="a.png") == 0


def test_frames_in_prompt_truth_and_reward_against_hand_values(tokenizer):
    row = three_images(answer="B")
    assert instances.centers_of(row) == {"red bbox": {0: (0, 0, 2), 2: (0, 1, 3)}}
    prompt = tokenizer.decode(data.encode(row, tokenizer, make_processor(), train=False)["prompt"])
    assert (
        "in the camera frame of image 2 (" in prompt
        and "After aligning to the reference frame 2, find" in prompt
    )
    example = prompt[prompt.index("<detect>") : prompt.index("</answer>") + 9]
    assert rewards.format_reward(example, "dtr", images=3) == 1 and "{K}" not in prompt

    def score(frame, center, **more):
        text = (
            f"<detect>After aligning to the reference frame {frame}, find 1 relevant objects:\n<3d_box "
            f'center="{center}">chair (red bbox)</3d_box></detect>\n<think>It is.</think>\n<answer>B</answer>'
        )
        return data.score({**row, **more}, text)

    assert score(2, "0,1,3") == {
        "accuracy": 1,
        "format": 1,
        "reward": 1,
        "detection": 1,
        "center_errors_m": [0],
    }
    assert score(2, "0,1,3.25")["detection"] == 0.6 and score(0, "0,0,2")["detection"] == 1
    assert score(0, "0,1,3") | {"center_errors_m": 0} == {
        "accuracy": 1,
        "format": 1,
        "reward": 0.9,
        "detection": 0,
        "center_errors_m": 0,
    }  # sqrt 2 away in frame 0
    assert score(1, "0,1,3")["center_errors_m"] == [None]  # no truth in frame 1
    first = talk("In the first image: <mask> <mask> <mask> <mask>?", "B")
    assert score(2, "0,1,3", conversations=first)["detection"] == 0
    assert score(0, "0,0,2", conversations=first)["reward"] == pytest.approx(1)
    assert (
        data.score(
            row,
            '<detect>Find 1 relevant objects:\n<3d_box center="0,1,3">a (red bbox)</3d_box></detect>'
            "<think>It is.</think><answer>B</answer>",
        )["format"]
        == 0
    )  # no frame announced


def test_images_stand_where_the_text_says(tokenizer):
    pad = lambda h, w: "<|vision_start|>" + "<|image_pad|>" * (h * w // 256) + "<|vision_end|>"
    pads = [pad(*size) for size in SIZES]
    row = {
        key: value
        for key, value in three_images().items()
        if key not in ("3d_pos", "bbox", "mask_idx")
    }

    def prompt(question, target="2"):
        rows = {**row, "conversations": talk(question, target)}
        return tokenizer.decode(
            data.encode(rows, tokenizer, make_processor(), train=True)["prompt"]
        )

    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    assert (
        prompt("Which?")
        == prompt("<image>\n<image><image>\nWhich?")
        == chat("".join(pads) + "Which?")
    )
    assert prompt("<image>\nIs <image> after <image>?") == chat(
        f"{pads[0]}Is {pads[1]} after {pads[2]}?"
    )
    with_template = data.LOR_PROMPT.replace("{Q}", f"Is {pads[1]} after {pads[2]}?")
    trace = "<think>So.</think><answer>2</answer>"
    assert prompt("<image>\nIs <image> after <image>?", trace) == chat(pads[0] + with_template)
    with pytest.raises(BadRow, match="conversations"):
        prompt("<image> Is <image>?")


def test_one_image_in_a_list_is_one_image(tokenizer):
    one = {
        "source": "x",
        "image": picture(0, (48, 64)),
        "depth": metres(0, (48, 64)),
        "bbox": [[3, 5, 30, 41]],
        "red_bbox": [[100, 100, 500, 600]],
        "intrinsics": [60.0, 60.0, 32.0, 24.0],
        "conversations": talk(
            "How far is the red bbox <mask>?", "<think>So.</think>\n<answer>2</answer>"
        ),
        "3d_pos": {"red_bbox": {"center_cam": [0, 0, 2]}},
    }
    listed = {
        **one,
        "image": [one["image"]],
        "depth": [one["depth"]],
        "intrinsics": [one["intrinsics"]],
        "bbox": {"0": one["bbox"]},
        "mask_idx": {"0": [0, 0]},
        "bbox_img_idx": [[0]],
        "main_frame_idx": 0,
        "3d_pos": {
            "red_bbox": {"current_frame": 0, "all_frame_3d": {"0": {"center_cam": [0, 0, 2]}}}
        },
    }
    model, stop = make_model(tokenizer), torch.arange(20, 60)
    for train in (True, False):
        samples = [data.encode(row, tokenizer, make_processor(), train) for row in (one, listed)]
        for key, value in samples[0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(samples[1][key])), key
        batches = [data.collate([sample], tokenizer) for sample in samples]
        if train:  # the same loss, the same responses
            losses = [sft.target_loss(model, batch).item() for batch in batches]
            assert losses[0] == losses[1] > 0
        else:
            tokens = [
                rollout(model, batch, 3, 9, stop, NEVER, 1.0, torch.Generator().manual_seed(0))[0]
                for batch in batches
            ]
            assert torch.equal(*tokens)
    assert instances.centers_of(one) == instances.centers_of(listed)


def several_rows():
    """Rows with 3, 1 and 2 images, with 4, 1 and 0 regions."""
    one = {
        "source": "one",
        "image": picture(5, (32, 32)),
        "bbox": [[3, 5, 30, 31]],
        "3d_pos": {},
        "conversations": talk("How far is <mask>?", "<answer>3</answer>"),
    }
    two = {
        "source": "two",
        "image": [picture(6, (32, 48)), picture(7, (48, 32))],
        "conversations": talk("How far?", "<answer>3</answer>"),
    }
    return [three_images(), one, two]


def test_T13_rollout_features_and_gradients_of_several_images_equal_a_plain_forward(tokenizer):
    rows, group, stop = several_rows(), 3, torch.arange(20, 60)
    settings = grpo.Settings(
        group_size=group, max_new_tokens=8, temperature=0.9, checkpointing=False
    )
    model, banned = (
        make_model(tokenizer),
        token_rules(make_model(tokenizer), tokenizer, CPU)[1],
    )
    generator = torch.Generator().manual_seed(0)
    learner = make_learner(model, tokenizer, make_processor(), (stop, banned), generator)
    rows = encoded(rows, tokenizer, learner.processor)
    groups = with_advantages(grpo.sample_groups(learner, rows, settings, grpo.whole_reward))
    assert [len(g["features"]["merged"]) for g in groups] == [3, 1, 2]
    model.train()
    for order in ([0, 1, 2], [2, 0], [1]):
        parts = [groups[i] for i in order]
        prompts, features, tokens, mask, old, _ = grpo.collate_groups(parts, tokenizer, CPU)
        scored, _ = token_logprobs(model, prompts, features, tokens, mask, banned, 0.9)
        expected, loss = torch.zeros_like(scored), 0
        for n, length in enumerate(mask.sum(1).tolist()):
            sample = parts[n // group]["sample"]
            logprobs, _ = one_by_one(model, sample, tokens[n, :length], tokenizer, banned, 0.9)
            expected[n, :length], loss = logprobs.detach(), loss + (logprobs * (n + 1)).sum()
        assert (scored - expected)[mask.bool()].abs().max() < 1e-7
        assert (old - expected)[mask.bool()].abs().max() < 1e-5  # the sampler's own
        wanted = gradients(model, loss)
        scored, _ = token_logprobs(
            model, prompts, None, tokens, mask, banned, 0.9
        )  # the vision side, too
        got = gradients(model, (scored * mask * torch.arange(1, len(mask) + 1)[:, None]).sum())
        for name in wanted:
            assert (got[name] - wanted[name]).norm() <= 1e-6 * wanted[name].norm() + 1e-12, name


FOUR = "<mask> <mask> <mask> <mask>"
ORDER = {"0": [1, 1], "1": [2, 0], "2": [0, 0], "3": [1, 0]}
in_frame = lambda frame, center: {
    "3d_pos": {"red_bbox": {"all_frame_3d": {frame: {"center_cam": center}}}}
}
BAD = {  # what is wrong with a row of three images: (the fields that differ, the field that the message must name)
    "no image": ({"image": []}, "image"),
    "two depth maps": ({"depth": [None, None]}, "depth"),
    "one depth map": ({"depth": metres(0, SIZES[0])}, "depth"),
    "two cameras": ({"intrinsics": [None] * 2}, "intrinsics"),
    "camera in words": ({"intrinsics": [None, None, ["a"] * 4]}, "intrinsics"),
    "regions without an image": ({"bbox": [[0, 0, 9, 9]] * 4}, "bbox"),
    "no order": ({"mask_idx": None}, "mask_idx"),
    "box that is not there": ({"mask_idx": {**ORDER, "0": [1, 2]}}, "mask_idx"),
    "box counted from the end": ({"mask_idx": {**ORDER, "0": [1, -1]}}, "mask_idx"),
    "image that is not there": ({"mask_idx": {**ORDER, "0": [3, 0]}}, "mask_idx"),
    "gap in the order": (
        {"mask_idx": {"0": [0, 0], "2": [2, 0], "3": [1, 0], "4": [1, 1]}},
        "mask_idx",
    ),
    "too few regions": ({"mask_idx": {"0": [0, 0]}}, "bbox"),
    "region outside its image": (
        {
            "bbox": {
                "0": [[3, 5, 30, 41]],
                "1": [[0, 0, 9, 7], [16, 8, 60, 32]],
                "2": [[31, 63, 32, 64]],
            }
        },
        "bbox",
    ),
    "mark without an image": ({"bbox_img_idx": [[2]]}, "bbox_img_idx"),
    "mark in image 3": ({"bbox_img_idx": [[3, 0]]}, "bbox_img_idx"),
    "mark in words": ({"point_img_idx": "one"}, "point_img_idx"),
    "mark nowhere": ({"point_img_idx": [[None]]}, "point_img_idx"),
    "mark in pixels": ({"red_bbox": [[100, 100, 1920, 1080]]}, "red_bbox"),
    "mark of x, y, w, h": ({"red_bbox": [[500, 500, 90, 90]]}, "red_bbox"),
    "main frame": ({"main_frame_idx": 3}, "main_frame_idx"),
    "two <image>": ({"conversations": talk("<image><image>" + FOUR, "2")}, "conversations"),
    "centre in image 3": (in_frame("3", [0, 0, 2]), "3d_pos.red_bbox"),
    "half a centre": (in_frame("0", [0, 2]), "3d_pos.red_bbox"),
    "size": ({"image_hw": [64, 48]}, "image_hw"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_of_several_images_is_one_line_with_row_and_field(case):
    change, field = BAD[case]
    instances.check_instance(three_images())
    with pytest.raises(BadRow) as error:
        instances.check_instance(three_images(**change))
    assert (
        "\n" not in str(error.value)
        and "file: row 7" in str(error.value)
        and f"field '{field}" in str(error.value)
    )


# ---------------------------------------------------------------------------------------------------------------------
# files


NASTY = ['{"', '"}', "\\", '\\"', "}{", "[", "]", "\n", "ä\u2028\U0001f600", "", "{{[[", '"' * 5]


def nasty_rows(count):
    """Rows of nested objects whose strings are full of braces, quotes and backslashes."""
    rng = random.Random(0)
    text = lambda: "".join(rng.choices(NASTY, k=rng.randint(0, 6)))
    return [
        {"id": text(), text(): [{text(): text()}, [text(), 1.5, None, {}]], "n": i}
        for i in range(count)
    ]


@pytest.mark.parametrize("indent, ascii", [(None, True), (None, False), (2, False)])
def test_rows_are_those_of_the_standard_reader(indent, ascii, tmp_path):
    rows, path, lines = nasty_rows(200), tmp_path / "rows.json", tmp_path / "rows.jsonl"
    path.write_text(
        " \n" + json.dumps(rows, indent=indent, ensure_ascii=ascii) + "\n", encoding="utf-8"
    )
    body = "\n".join(
        json.dumps(row, ensure_ascii=ascii) + "\n" * (i % 3) for i, row in enumerate(rows)
    )
    lines.write_text(body, encoding="utf-8-sig")  # with a byte order mark and blank lines
    for file in (path, lines):
        found = files.Rows(str(file))
        assert len(found) == 200
        for i in random.Random(1).sample(range(200), 200):
            row = found.read(i)
            assert (row.pop("source"), row.pop("folder")) == (
                f"{file}: row {i}",
                str(tmp_path),
            ) and row == rows[i]


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1} {"a": 2}]',
        '[{"a": 1}, 2, {"a": 3}]',
        '[{"a": 1}',
        '[{"a": "1}]',
        "[1]",
        "[]",
        '[{"a": 1}] x',
        '[,{"a": 1}]',
        "",
        " \n",
        '"text',
        "[" + '"' * 5001,
    ],
)
def test_a_file_that_is_no_list_of_rows_is_an_error_that_names_it(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(BadRow, match="rows.json"):
        files.Rows(f"{tmp_path}/rows.json").read(0)


def memory():
    """This process's own memory, without mapped files, in MiB."""
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        )
        / 1024
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_long_file_is_neither_held_in_memory_nor_slow_at_its_end(kind, tmp_path):
    count, path = 200_000, tmp_path / f"rows.{kind}"
    row = json.dumps(
        {
            "id": 0,
            "conversations": talk("How far is the red bbox <mask>?", "<answer>2.0</answer>" * 9),
            "3d_pos": {"red_bbox": {"center_cam": [0.1, 0.2, 2.0]}},
        }
    )
    with open(path, "w") as file:
        file.write("[" * (kind == "json"))
        file.writelines(
            "," * (i > 0 and kind == "json") + f"\n{row[:7]}{i}{row[8:]}" for i in range(count)
        )
        file.write("]" * (kind == "json"))
    assert path.stat().st_size > 6e7
    before, start = memory(), time.process_time()
    rows = files.Rows(str(path))
    indexed = time.process_time() - start
    assert len(rows) == count and indexed < 12 and memory() - before < 25  # the index: 3 MiB

    def cost(places):
        start = time.process_time()
        assert [rows.read(i)["id"] for i in places] == list(places)
        return time.process_time() - start

    cost(range(500))
    assert (
        cost(range(count - 1000, count)) < 5 * cost(range(1000)) + 0.05 and memory() - before < 25
    )


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_parquet_rows_with_embedded_pictures(tokenizer, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "rows.parquet")
    depth = np.full((32, 48), 2000, np.uint16)
    rows = [
        {
            "id": str(i),
            "image": [{"bytes": png(picture(i, (32, 48))), "path": None}] * (1 + i % 2),
            "depth": [{"bytes": png(depth + i), "path": "d.png"}] + [None] * (i % 2),
            "answer": "2",
            "conversations": talk("How far is the red bbox?", "2"),
            "red_bbox": [[100, 100, 500, 600]],
            "bbox_img_idx": [[0]],
            "bbox": json.dumps({"0": [[0, 0, 9, 9]], "1": []}) if i % 3 == 0 else None,
            "mask_idx": '{"0": [0, 0]}' if i % 3 == 0 else None,
            "3d_pos": None
            if i % 4 == 1
            else {"red_bbox": {"center_cam": [0.0, 0.0, 2.0]} if i % 4 else None},
        }
        for i in range(25)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    found = files.Rows(path)
    assert len(found) == 25
    for i in random.Random(0).sample(range(25), 25):
        row = found[i]
        assert row["id"] == str(i) and len(instances.images_of(row)) == 1 + i % 2
        assert np.array_equal(np.asarray(instances.open_image(row)), picture(i, (32, 48)))
        assert instances.open_depth(row, 48, 32)[0, 0] == pytest.approx(2 + i / 1000)
        centers = {"red bbox": (0, 0, 2) if i % 2 == 0 else {0: (0, 0, 2)}}
        assert instances.centers_of(row) == (None if i % 4 == 1 else centers if i % 4 else {})
        regions = instances.regions_of(row, [(48, 32)] * 2)
        box = [0, 0, 9, 9] if i % 3 == 0 else pytest.approx([4.8, 3.2, 24, 19.2])
        expected = [] if i % 4 == 1 else [(0, box)]
        assert regions == expected
        assert len(data.encode(row, tokenizer, make_processor(), train=True)["regions"]) == len(
            expected
        )


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(BadRow, match="rows.parquet"):
        files.Rows(f"{tmp_path}/rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadRow, match="pip install pyarrow"):
        files.Rows(f"{tmp_path}/rows.parquet")


GOOD = {
    "image": "a.png",
    "depth": "d.png",
    "intrinsics": [60, 60, 32, 24],
    "bbox": [[4, 4, 20, 20]],
    "conversations": talk("How far is the red bbox <mask>?", "2.0"),
    "red_bbox": [[62, 83, 313, 417]],
    "3d_pos": {"red_bbox": {"center_cam": [-0.67, -0.4, 2.0]}},
}  # pixel (12, 12)


@pytest.fixture
def write(tmp_path):
    """Writes rows into a file beside a picture and its depth map -> path."""
    Image.fromarray(picture(0, (48, 64))).save(tmp_path / "a.png")
    Image.fromarray(np.full((48, 64), 2000, np.uint16)).save(tmp_path / "d.png")

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write


def test_rows_are_checked_on_use_and_skipped_ones_counted_and_listed(write, capsys):
    rows = [{**GOOD, "id": i} for i in range(60)]
    rows[30], rows[40], rows[59] = {**GOOD, "image": "b.png"}, "{nonsense", {**GOOD, "bbox": []}
    path = write(rows)
    _, lazy, _ = data.file_source(path)  # the first rows are good
    assert lazy[29]["id"] == 29
    for place, field in ((30, "image"), (40, "not readable"), (59, "bbox")):
        with pytest.raises(BadRow, match=rf"row {place}: .*{field}.*skip_bad_rows"):
            lazy[place]
    _, lazy, _ = data.file_source(path, skip_bad_rows=True)
    blend = data.Blend([("rows", lazy, 1.0)], 0)
    seen = collections.Counter(blend[p]["id"] for p in range(60))
    good = set(range(60)) - {30, 40, 59}
    assert set(seen) == good and seen[31] == seen[41] == seen[0] == 2  # the next good row instead
    assert [row["id"] for row in lazy] == sorted(good)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(
        sum(f"row {i}: " in line for line in lines) == 1 for i in (30, 40, 59)
    )
    with pytest.raises(BadRow, match="no usable row"):
        data.file_source(write([{**GOOD, "image": "b.png"}] * 3), skip_bad_rows=True)


def test_loader_processes_change_neither_order_nor_content(write, tokenizer):
    rows = files.Rows(write([{**GOOD, "id": str(i)} for i in range(7)]))
    dataset = data.EncodedRows(rows, tokenizer, make_processor(), train=True)
    positions = [5, 0, 6, 2, 2, 1]
    alone = list(data.load_ahead(dataset, positions))
    ahead = list(data.load_ahead(dataset, positions, workers=2, ahead=3))
    assert [row["id"] for row, _ in alone] == [str(position) for position in positions]
    for (row, sample), (same_row, same_sample) in zip(alone, ahead, strict=True):
        assert row == same_row
        for key, value in sample.items():
            assert np.array_equal(value, same_sample[key], equal_nan=key == "points")
    without_end = data.load_ahead(dataset, itertools.cycle([3, 4]), workers=1, ahead=2)
    assert [next(without_end)[0]["id"] for _ in range(5)] == ["3", "4", "3", "4", "3"]


def run_alone(script, cwd):
    """A Python program in a process group of its own -> what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ROWS_OF_TENSORS = """
import os, resource, signal, time, torch
import data

class Rows(torch.utils.data.Dataset):
    def __getitem__(self, position):
        time.sleep(0.005)
        return {}, {name: torch.full((3,), position) for name in "abcdef"}
"""


def test_loader_processes_take_no_open_file_per_row(tmp_path):
    script = f"""{ROWS_OF_TENSORS}
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
rows = data.load_ahead(Rows(), range(100), workers=2, ahead=100)
first = next(rows)
time.sleep(1.5)  # by now all others are waiting
print(sum(int(sample["f"][0]) for _, sample in rows))
"""
    assert run_alone(script, tmp_path) == f"{sum(range(100))}\n"


def test_a_signal_to_the_group_leaves_the_loader_processes_at_work(tmp_path):
    script = f"""{ROWS_OF_TENSORS}
seen = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: seen.append(number))
rows = data.load_ahead(Rows(), range(300), workers=2, ahead=4)
total = int(next(rows)[1]["a"][0])
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
total += sum(int(sample["a"][0]) for _, sample in rows)
print(total, len(seen))
"""
    assert run_alone(script, tmp_path) == f"{sum(range(300))} 2\n"


def test_a_bad_row_that_a_loader_process_meets_is_one_line(write, tokenizer):
    rows = files.Rows(write([GOOD] * 3 + [{**GOOD, "image": "b.png"}]))
    dataset = data.EncodedRows(rows, tokenizer, make_processor(), train=True)
    with pytest.raises(BadRow) as error:
        list(data.load_ahead(dataset, [0, 1, 2, 3], workers=1))
    assert "\n" not in str(error.value) and "row 3: field 'image'" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# the check of files


def truth(x, y, z):
    return {"3d_pos": {"red_bbox": {"center_cam": [x, y, z]}}}


def trace(center, said, **more):
    text = (
        f'<detect>Find 1 relevant objects:\n<3d_box center="{center}">chair (red bbox)</3d_box></detect>\n'
        f"<think>The depth is z.</think>\n<answer>{said}</answer>"
    )
    return {"conversations": talk("How far is the red bbox <mask>?", text), **more}


FAULTS = {  # what is planted: (the fields that differ from GOOD, field and words of the problem; None: all is well)
    "nothing": ({}, None, ""),
    "a good trace": (trace("-0.7,-0.4,2.0", "2.0", answer="2.04"), None, ""),
    "y up": (truth(-0.67, 0.4, 2), "3d_pos.red_bbox", "y points up"),
    "x left": (truth(0.67, -0.4, 2), "3d_pos.red_bbox", "x points left"),
    "OpenGL": (
        truth(-0.67, 0.4, -2),
        "3d_pos.red_bbox",
        "behind the camera.*y points up and z backward",
    ),
    "z up": (truth(-0.67, 2, 0.4), "3d_pos.red_bbox", "z points up"),
    "elsewhere": (truth(0.9, 0.5, 2), "3d_pos.red_bbox", "does not project into its 2D box"),
    "millimetres": (truth(-670, -400, 2000), "3d_pos.red_bbox", "millimetres"),
    "depth in other units": ({"depth_scale": 0.01}, "3d_pos.red_bbox", "'depth' measures 20 m"),
    "y up, no camera": (
        {**truth(-0.67, 0.4, 1), "intrinsics": None, "depth": None},
        "3d_pos.red_bbox",
        "y points up.*no intrinsics",
    ),
    "no picture": ({"image": "b.png"}, "image", "no such file"),
    "another answer": (trace("-0.7,-0.4,2.0", "2.5", answer="2.04"), "answer", "ends in '2.5'"),
    "no boxes": (trace("", "2.0"), "conversations", "not in the format"),
    "two answers": (
        trace("-0.7,-0.4,2.0", "2.0</answer><answer>3"),
        "conversations",
        "exactly once",
    ),
    "other centres": (trace("0.7,-0.4,4.0", "2.0"), "3d_pos", "no centre of the trace"),
}


@pytest.fixture(scope="module")
def texts():
    return check.load_texts("")


@pytest.fixture(autouse=True)
def made_once(texts, monkeypatch):
    monkeypatch.setattr(check, "load_texts", lambda model: texts)


@pytest.mark.parametrize("case", FAULTS)
def test_the_check_finds_each_planted_fault(case, write, capsys):
    change, field, words = FAULTS[case]
    row = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    path = write([GOOD, row, GOOD])
    count = check.check([path])
    out = capsys.readouterr().out
    if field is None:
        assert count == 0 and "0 problems" in out
    else:
        (problem,) = [line for line in out.splitlines() if ": row " in line]
        assert count == 1 and problem.startswith(f"{path}: row 1: field '{field}'")
        assert re.search(words, problem), problem


def test_the_check_reports_counts_lengths_and_the_first_twenty_problems(
    write, capsys, texts, monkeypatch
):
    lor = {key: value for key, value in GOOD.items() if key not in ("3d_pos", "bbox")} | {
        "task": "depth",
        "conversations": talk("How far?", "2"),
    }
    rows = (
        [GOOD] * 2
        + [{**GOOD, "3d_pos": {}}]
        + [lor] * 4
        + [{**GOOD, **truth(0.67, -0.4, 2)}] * 23
        + ["{"]
    )
    path, (words, processor) = write(rows), texts
    monkeypatch.setattr(
        torch.distributed, "destroy_process_group", lambda: None
    )  # the other tests need it
    monkeypatch.setattr(sys, "argv", ["check.py", path])
    with pytest.raises(SystemExit) as end:
        check.main()
    out = capsys.readouterr().out
    table = {
        tuple(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line.strip()
    }
    assert table["rows.jsonl", "dtr"] == "25" and table["depth", "lor"] == "4"
    assert table["rows.jsonl", "dtr,", "no", "centres"] == "1"
    assert end.value.code == 1 and "24 problems, the first 20" in out and out.count(": row ") == 20
    place = {"source": "", "folder": os.path.dirname(path)}
    samples = [data.encode({**row, **place}, words, processor, train=True) for row in (lor, GOOD)]
    lengths = [len(sample["prompt"]) + len(sample["target"]) for sample in samples]
    (tokens,) = [line.split()[1:] for line in out.splitlines() if line.startswith("  tokens")]
    assert tokens == [str(min(lengths)), str(max(lengths)), str(max(lengths)), "30"]
    assert "depth, median of an image, m" in out and "        2" in out
    monkeypatch.setattr(sys, "argv", ["check.py", write([GOOD])])
    with pytest.raises(SystemExit) as end:
        check.main()
    assert end.value.code == 0


# ---------------------------------------------------------------------------------------------------------------------
# the choice of the path


@pytest.mark.parametrize(
    "question, marks, path",
    [
        ("How far is the red bbox from the camera?", True, "dtr"),
        ("What color is the red bbox?", True, "lor"),
        ("How far is the chair?", False, "lor"),
        ("Which is nearer to the red bbox?", True, "dtr"),
        ("Is the red bbox to the left of the lamp?", True, "dtr"),
        ("What is in the region: red bbox?", True, "lor"),
        ("How many chairs are there?", False, "lor"),
        ("What is the height of the red bbox in meters?", True, "dtr"),
    ],
)
def test_auto_takes_dtr_where_there_are_regions_and_geometry(question, marks, path):
    row = {"source": "x", "image": "a.png", "conversations": talk(question, "B")}
    row |= {"red_bbox": [[0, 0, 9, 9]]} if marks else {}
    assert instances.best_path(row) == path
    for there in ("lor", "dtr"):  # the same from either of its two versions
        twin = instances.on_path(row, there)
        assert instances.path_of(twin) == there and instances.best_path(twin) == path
        assert instances.answer_of(twin) == instances.answer_of({**twin, "answer": None}) == "B"
        assert instances.question_of(twin).count("<mask>") == (there == "dtr" and marks)
        assert instances.question_of(instances.on_path(twin, "lor")) == question


def test_on_paths_asks_each_question_once_a_path():
    rows = sources.held_out(11, 96)
    assert [id(row) for row in instances.on_paths(rows, "both")] == [
        id(row) for row in rows
    ]  # twins already
    assert [id(row) for row in instances.on_paths(rows, "lor")] == [id(row) for row in rows[::2]]
    assert len(instances.on_paths(rows + rows, "both")) == 44  # no row is lost
    auto = instances.on_paths(rows, "auto")
    assert [(row["task"], instances.path_of(row)) for row in auto] == [
        (row["task"], "dtr" if "red_bbox" in row else "lor") for row in rows[::2]
    ]
    only = [row for row in rows if instances.path_of(row) == "lor"]
    both = instances.on_paths(only, "both")  # the other path's row is made
    assert [instances.question_of(row) for row in both] == [
        instances.question_of(row) for row in rows
    ]
    made = [instances.regions_of(row, [(96, 96)]) for row in both[1::2]]
    for one, row in zip(made, rows[1::2]):  # from the marks: to a thousandth of the picture
        assert np.allclose(
            [box for _, box in one],
            [box for _, box in instances.regions_of(row, [(96, 96)])],
            atol=0.1,
        )


def test_agreement_and_oracle_by_hand():
    answer = "<think>a</think><answer>{}</answer>".format
    result = lambda said, accuracy, auto="lor": {
        "response": answer(said),
        "accuracy": accuracy,
        "auto": auto,
    }
    lor = [
        result("B", 1),
        result("(A) left", 0, "dtr"),
        result("2.0", 0.5, "dtr"),
        result("a red  chair", 1),
    ]
    dtr = [result("B", 1), result("A", 0), result("2.5", 0.9), result("A red chair.", 0)]
    means = {name: mean for name, (mean, _) in eval.path_choice(lor, dtr).items()}
    assert means == pytest.approx(
        {"lor": 2.5 / 4, "dtr": 1.9 / 4, "auto": 2.9 / 4, "oracle": 2.9 / 4, "agreement": 3 / 4}
    )
    assert eval.same_answer(answer("2.0"), answer("2.1")) and not eval.same_answer(
        answer("0"), answer("0.1")
    )
    assert not eval.same_answer(answer("B"), answer("A")) and not eval.same_answer(
        answer("B"), answer("Because")
    )


# ---------------------------------------------------------------------------------------------------------------------
# real pictures


@needs_real("multiview/pairs.jsonl")
def test_two_real_views_give_one_instance_whose_truth_fits_both(tmp_path, texts):
    rows = []
    for line in PAIRS.read_text().splitlines():
        pair = json.loads(line)
        views, (fx, _, cx), (_, fy, cy) = [pair["source"], pair["target"]], *pair["K"][:2]
        depth = np.asarray(Image.open(PAIRS.parent / views[0]["depth"])) / 1000
        depth[depth > 20] = 0  # 65535: no measurement

        def around(v, u, depth=depth):
            return depth[v - 9 : v + 9, u - 9 : u + 9]

        spots = [
            (v, u)
            for v in range(120, 360, 20)
            for u in range(160, 480, 20)
            if (around(v, u) > 0).all()
        ]
        v, u = min(spots, key=lambda at: around(*at).std())
        z = float(depth[v, u])
        point = np.array([(u - cx) / fx * z, (v - cy) / fy * z, z, 1])
        here, there = (np.array(view["cam_to_world"]) for view in views)
        moved = np.linalg.inv(there) @ here @ point
        mark = [
            1000 * (u - 9) / 640,
            1000 * (v - 9) / 480,
            1000 * (u + 9) / 640,
            1000 * (v + 9) / 480,
        ]
        frames = {
            str(i): {"center_cam": [round(float(c), 4) for c in at[:3]]}
            for i, at in enumerate((point, moved))
        }
        rows.append(
            {
                "id": pair["id"],
                "image": [str(PAIRS.parent / view["image"]) for view in views],
                "depth": [str(PAIRS.parent / view["depth"]) for view in views],
                "intrinsics": [fx, fy, cx, cy],
                "red_bbox": [mark],
                "bbox_img_idx": [[0]],
                "answer": f"{z:.2f}",
                "conversations": talk(
                    "How far is the red bbox from the camera, in meters?", f"{z:.2f}"
                ),
                "3d_pos": {"red_bbox": {"current_frame": 0, "all_frame_3d": frames}},
            }
        )
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    assert check.check([f"{tmp_path}/pairs.json"]) == 0
    for row, read in zip(rows, files.Rows(f"{tmp_path}/pairs.json"), strict=True):
        sample = data.encode(read, *texts, train=False)
        assert len(sample["image_grid_thw"]) == 2 and sample["regions"].shape[0] == 1
        first = int(sample["image_grid_thw"][0].prod())
        assert (
            sample["regions"][0, :first].sum() == pytest.approx(1)
            and sample["regions"][0, first:].sum() == 0
        )
        assert (
            instances.question_of(read)
            == "How far is the red bbox <mask> from the camera, in meters?"
        )
        for frame, at in row["3d_pos"]["red_bbox"]["all_frame_3d"].items():
            center, said = ",".join(f"{c:.2f}" for c in at["center_cam"]), row["answer"]
            text = (
                f"<detect>After aligning to the reference frame {frame}, find 1 relevant objects:\n<3d_box "
                f'center="{center}">spot (red bbox)</3d_box></detect>\n<think>z.</think>\n<answer>{said}</answer>'
            )
            assert data.score(read, text)["reward"] == pytest.approx(1)
        read["3d_pos"]["red_bbox"]["all_frame_3d"]["0"]["center_cam"][1] *= -1
        (problem,) = check.problems_of(read, [(640, 480)] * 2)
        assert "y points up" in problem
