"""The one door for pictures, depth and values of rows, and the check that means what training does.

python -m pytest -q tests/test_door.py
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import io
import json
import math
import random
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from common import ROOT
from PIL import Image
from test_model import make_processor, make_tokenizer

import data
from formats import instances, pictures
from formats.cache import ByteCache
from formats.errors import BadRow, UserError, quote
from formats.files import Rows
from formats.scenes import load_scenes
from tools import check
from world import tiny

RED = (255, 0, 0)


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROW = {
    "image": "a.png",
    "depth": "d.png",
    "intrinsics": [80, 80, 40, 30],
    "conversations": talk(
        "How far is the red bbox <mask>?",
        '<detect>Find 1 relevant objects:\n<3d_box center="0.0,0.0,2.0">chair (red bbox)</3d_box>'
        "</detect>\n<think>z:2.0</think>\n<answer>2.0</answer>",
    ),
    "red_bbox": [[250, 250, 750, 750]],
    "bbox": [[20, 15, 60, 45]],
    "3d_pos": {"red_bbox": {"center_cam": [0, 0, 2]}},
}


@pytest.fixture(scope="module")
def texts():
    """Tokenizer and image processor of the embedded model."""
    _, tokenizer, processor = tiny.new_model("tiny", 0, data.PROMPTS.values())
    return tokenizer, processor


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture of 80 x 60 and its depth, 2 m everywhere."""
    Image.new("RGB", (80, 60), (90, 120, 90)).save(tmp_path / "a.png")
    Image.fromarray(np.full((60, 80), 2000, np.uint16)).save(tmp_path / "d.png")
    return tmp_path


def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def problem(folder, texts, **change):
    """What is wrong with ROW after a change, said alike by the check and by a run; "" if nothing."""
    row = {**ROW, **change}
    path = write(folder, row)
    _, _, found = check.check_file(path, *texts)
    source = data.file_source(path, skip_bad_rows=True)[1] if not found else None
    if source is not None:
        data.check_with([("rows", source, 1.0)], *texts)
        assert not source.problems
        return ""
    assert len(found) == 1 and "\n" not in found[0] and len(found[0]) <= 300
    assert found[0].startswith(path) and "row 0" in found[0]
    return found[0]


def refused(folder, texts, field, **change):
    """A run refuses ROW after a change, in the words of the check; --skip_bad_rows leaves it out."""
    path = write(folder, {**ROW, **change}, ROW)
    _, _, found = check.check_file(path, *texts)
    assert len(found) == 1 and f"field '{field}" in found[0], found
    try:
        sources = [data.file_source(path)]
        data.check_with(sources, *texts)
    except BadRow as error:
        assert str(error).startswith(found[0][:120])
    else:
        raise AssertionError(f"a run takes what the check refuses: {found[0]}")
    rows = Rows(path, skip_bad_rows=True)
    data.check_with([("rows", rows, 1.0)], *texts)
    assert list(rows.problems) == [0] and rows[0]["source"].endswith("row 1")
    return found[0]


# ----------------------------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_by_its_exif(kind, orientation):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :10] = RED  # the upper left corner
    # How the camera has it: what PIL's own transpose brings back to upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **more)
    image = pictures.open_picture(file)
    assert image.size == pictures.picture_size(file) == (30, 20)
    assert np.abs(np.asarray(image).astype(int) - upright)[2:8, 2:8].max() < 30
    assert np.asarray(image)[12:, 14:].max() < 60


def test_more_bits_are_scaled_and_what_is_transparent_is_white():
    deep = np.array([[0, 65535], [32768, 257]], np.uint16)
    assert np.asarray(pictures.open_picture(encoded(Image.fromarray(deep))))[..., 0].tolist() == [
        [0, 255],
        [128, 1],
    ]
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        image = pictures.open_picture(encoded(Image.new(mode, (4, 4), color)))
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    image = pictures.open_picture(encoded(palette, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0), b"tRNS\0\0"]
    chunks += [b"IDAT" + zlib.compress(b"\0" + struct.pack(">HH", 0, 257)), b"IEND"]
    grey = b"\x89PNG\r\n\x1a\n"  # of 16 bits, whose 0 is transparent
    for chunk in chunks:
        grey += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert np.asarray(pictures.open_picture(grey))[0].tolist() == [[255] * 3, [1] * 3]
    half = pictures.open_picture(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)
    with pytest.raises(pictures.BadPicture, match="at most 16 bits"):
        pictures.open_picture(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_only_regular_files_of_raster_formats_are_opened(tmp_path):
    marker = tmp_path / "ran"
    script = tmp_path / "x.png"
    script.write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file\n")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("no picture")
    whole = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    )
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    (tmp_path / "bomb.png").write_bytes(bomb)
    names = ["x.png", "pipe.png", "empty.png", "words.png", "cut.png", "bomb.png", "none.png"]
    files = [str(tmp_path / name) for name in names]
    files += [
        "/dev/zero",
        str(tmp_path),
        "a\0b",
        "data:image/png;base64," + "A" * 500_000,
        whole[:9],
    ]
    start = time.monotonic()
    for file in files:
        for opened in (pictures.open_picture, pictures.open_depth):
            with pytest.raises(pictures.BadPicture) as caught:
                opened(file)
            assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()
    assert not marker.exists() and time.monotonic() - start < 10


def test_the_cache_counts_bytes_and_knows_a_file_that_changed(tmp_path):
    cache = ByteCache(10)
    made = []
    for key, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("d", 40), ("d", 40), ("a", 4)):
        cache.get(key, lambda key=key: made.append(key), lambda _, size=size: size)
    assert made == ["a", "b", "c", "d", "a"] and cache.total == 4  # d took more than there is
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    assert pictures.open_picture(str(path)).size == (4, 4)
    Image.new("RGB", (5, 5)).save(path)
    assert pictures.open_picture(str(path)).size == (5, 5)
    for seed in range(40):
        noise = np.random.default_rng(seed).integers(0, 255, (1000, 1500, 3), np.uint8)
        pictures.open_picture(encoded(Image.fromarray(noise), "BMP"))
    assert pictures.cache.total <= 128 * 2**20


def test_depth_and_camera_are_those_of_the_upright_picture(folder, texts):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 80), (90, 120, 90)).save(
        folder / "turned.png", exif=exif
    )  # upright 80x60
    turned = {"image": "turned.png", "image_hw": [60, 80]}
    assert problem(folder, texts, **turned) == ""
    refused(folder, texts, "image_hw", image="turned.png", image_hw=[80, 60])
    refused(folder, texts, "intrinsics", **turned, intrinsics=[80, 80, 30, 40])
    Image.fromarray(np.full((80, 60), 2000, np.uint16)).save(folder / "side.png")
    assert "upright" in refused(folder, texts, "depth", **turned, depth="side.png")


# ----------------------------------------------------------------------------------------------
# depth


def test_depth_is_metres_by_rule():
    def read(array, kind="PNG", scale=None):
        return pictures.open_depth(encoded(Image.fromarray(array), kind), scale)

    whole = read(np.array([[0, 1500, 65535]], np.uint16))
    assert np.isnan(whole[0, 0]) and whole[0, 1:].tolist() == pytest.approx([1.5, 65.535])
    assert read(np.array([[1500]], np.uint16), scale=0.01)[0, 0] == pytest.approx(15)
    metres = np.array([[1.5, np.inf, np.nan, -2, 0, 1e30]], np.float32)
    assert read(metres, "TIFF")[0, 0] == 1.5 and np.isnan(read(metres, "TIFF")[0, 1:]).all()
    assert read(np.array([[2]], np.uint8), scale=1)[0, 0] == 2
    for array in (np.array([[2]], np.uint8), np.zeros((2, 2), bool), np.zeros((2, 2, 3), np.uint8)):
        with pytest.raises(pictures.BadPicture, match="metres"):
            read(array)


@pytest.mark.parametrize(
    "header, values",
    [
        (b"P5 2 1 10000\n", struct.pack(">HH", 1500, 2000)),
        (b"P5 2 1 100\n", bytes([50, 60])),
        (b"P2 2 1 10000\n", b"1500 2000\n"),
    ],
)
def test_depth_whose_values_would_be_stretched_is_refused(header, values):
    assert pictures.open_picture(header + values).size == (2, 1)
    with pytest.raises(pictures.BadPicture, match="stretched"):
        pictures.open_depth(header + values, 0.001)
    whole = b"P5 2 1 65535\n" + struct.pack(">HH", 1500, 2000)
    assert pictures.open_depth(whole)[0].tolist() == pytest.approx([1.5, 2.0])


@pytest.mark.parametrize("scale", [0, -0.001, True, "0.001", [0.001], math.nan, math.inf, 1e9])
def test_a_scale_of_depth_is_a_number_above_0(scale, folder, texts):
    refused(folder, texts, "depth_scale", depth_scale=scale)
    scene = {"id": "a", "image": "a.png", "depth": "d.png", "objects": []}
    scene.update(intrinsics=[80, 80, 40, 30], depth_scale=scale)
    with pytest.raises(BadRow, match="depth_scale"):
        load_scenes(write(folder, scene))


def test_the_sky_is_no_measurement_and_depth_of_nothing_is_checked(folder, texts):
    far = np.full((60, 80), 2, np.float32)
    far[:20] = np.inf
    Image.fromarray(far).save(folder / "far.tiff")
    assert problem(folder, texts, depth="far.tiff") == ""
    row = {**ROW, "source": "x: row 0", "folder": str(folder), "depth": "far.tiff"}
    sample = data.encode(row, *texts, train=True)
    assert np.isnan(instances.open_depth(row, 80, 60)[:20]).all()
    assert sample["points"].isfinite().any() and not sample["points"].isinf().any()
    Image.fromarray(np.zeros((60, 80), np.uint16)).save(folder / "none.png")
    assert problem(folder, texts, depth="none.png") == ""


# ----------------------------------------------------------------------------------------------
# boxes


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bbox": [[20, 15, 40, 30]]}, "x, y, width, height"),
        ({"bbox": [[15, 20, 45, 60]]}, "y before x"),
        ({"bbox": [[2, 2, 9, 8]]}, "not at its mark"),
        ({"bbox": [[0.25, 0.25, 0.75, 0.75]]}, "shares"),
        ({"red_bbox": [[0.25, 0.25, 0.75, 0.75]]}, "shares"),
        ({"bbox": [[65, 50, 80, 60]]}, "not at its mark"),
    ],
)
def test_boxes_of_other_conventions_are_named(change, words, folder, texts):
    assert words in problem(folder, texts, **change)


def test_points_in_shares_of_the_image_are_named(folder, texts):
    row = {key: value for key, value in ROW.items() if key not in ("bbox", "red_bbox", "3d_pos")}
    row.update(conversations=talk("What is at the red point?", "a chair"), red_point=[[0.5, 0.25]])
    _, _, found = check.check_file(write(folder, row, row), *texts)
    assert len(found) == 1 and "shares" in found[0] and len(found[0]) <= 300
    row["red_point"] = [[500, 250]]
    assert not check.check_file(write(folder, row, row), *texts)[2]


# ----------------------------------------------------------------------------------------------
# values of rows


def test_null_means_absent_in_every_optional_field(folder, texts):
    null = dict.fromkeys(
        ["task", "answer", "image_hw", "depth_scale", "blue_bbox", "red_point", "mask_idx", "id"]
    )
    assert problem(folder, texts, **null, main_frame_idx=None, bbox_img_idx=None) == ""
    assert problem(folder, texts, depth=None, intrinsics=None) == ""
    assert problem(folder, texts, bbox=None) == ""  # that of the mark
    assert problem(folder, texts, image={"bytes": None, "path": "a.png"}) == ""
    lor = {**ROW, "3d_pos": None, "conversations": talk("How far is the red bbox?", "2.0")}
    row = Rows(write(folder, lor))[0]
    assert instances.path_of(row) == "lor" and "bbox" in row and "3d_pos" not in row


@pytest.mark.parametrize("answer", [True, {"a": 1}, ["2"], math.nan, math.inf, " "])
def test_an_answer_is_a_text_or_a_number(answer, folder, texts):
    refused(folder, texts, "answer", answer=answer)


@pytest.mark.parametrize(
    "intrinsics",
    [
        [1e-300, 80, 40, 30],
        [80, 80, 40],
        [80, 80, 40, "30"],
        [True, 80, 40, 30],
        {"fx": 80},
        "80",
        [[80, 80, 40, 30]] * 2,
        [80, 80, 40, 10**400],
        [1.0, 1.33, 0.5, 0.5],
        [[80, 0, 40], [0, 80, 30], [0, 0, 1]],
    ],
)
def test_a_camera_is_four_numbers(intrinsics, folder, texts):
    refused(folder, texts, "intrinsics", intrinsics=intrinsics)


def test_half_a_character_is_replaced_where_rows_are_read(folder, texts):
    half = "\ud83d"
    for change in (
        {"conversations": talk(f"How far is the red bbox <mask>{half}?", "2.0")},
        {"conversations": talk("How far is the red bbox <mask>?", f"about {half}")},
        {f"of{half}": 1},
    ):
        assert problem(folder, texts, **change) == ""
    assert "\ufffd.png" in refused(folder, texts, "image", image=f"{half}.png")


@pytest.mark.parametrize(
    "name", ["a\nb.png", "\x1b]0;x\x07.png", "x" * 5000, "iVBORw0KGgo" * 50_000, ""]
)
def test_names_that_no_file_has_are_one_line_with_their_place(name, folder, texts):
    refused(folder, texts, "image", image=name)


def test_values_and_messages_are_quoted_in_a_line():
    assert quote("a\nb\x1b[31m") == "a\\nb\\x1b[31m" and len(quote("x" * 10**6)) == 80
    assert quote([1, "a"]) == "[1, 'a']" and quote("grün") == "grün"
    error = UserError("rows.json: row 7: field 'image': " + "x" * 10_000 + " (mend it)")
    assert len(str(error)) == 300 and "row 7: field 'image'" in str(error)
    assert str(error).endswith("(mend it)")
    assert "\n" not in str(BadRow("a\nb"))
    caught = "Caught BadRow in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    error = BadRow(f'{caught}  File "x"\nformats.errors.BadRow: f: row 1: no\n')
    assert str(error) == "f: row 1: no"


def test_the_question_comes_first(folder, texts):
    question, answer = ROW["conversations"]
    assert "comes first" in refused(
        folder, texts, "conversations", conversations=[answer, question]
    )
    refused(folder, texts, "conversations", conversations=[question, {**answer, "from": "human"}])
    other = [{"value": question["value"]}, {"from": "assistant", "value": answer["value"]}]
    assert problem(folder, texts, conversations=other) == ""


def test_a_field_that_is_there_twice_is_a_bad_row(folder):
    for text in (
        '{"image": "b.png", ' + json.dumps(ROW)[1:],
        json.dumps(ROW).replace('"center_cam"', '"center_cam": [0, 0, 9], "center_cam"'),
    ):
        (folder / "twice.jsonl").write_text(text)
        with pytest.raises(BadRow, match=r"row 0: .*field '(image|center_cam)' is there twice"):
            Rows(str(folder / "twice.jsonl"))[0]


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_codes_than_utf_8_are_named(code, folder):
    (folder / "rows.json").write_text(json.dumps([ROW, ROW], indent=1), encoding=code)
    with pytest.raises(BadRow, match="save it in UTF-8"):
        Rows(str(folder / "rows.json"))


def test_an_answer_in_tags_is_what_they_hold(folder, texts):
    row = {**ROW, "source": "x", "answer": " <answer> 2.0</answer>"}
    assert instances.answer_of(row) == "2.0"
    refused(folder, texts, "answer", answer="<answer> </answer>")
    words = talk("How far is the red bbox <mask>?", "<think>far</think><answer></answer>")
    refused(folder, texts, "answer", conversations=words)


def test_indices_may_be_whole_numbers_with_a_fraction_of_0(folder, texts):
    order = {"bbox": {"0": ROW["bbox"]}, "mask_idx": {"0": [0.0, 0.0]}}
    assert problem(folder, texts, **order) == ""
    refused(folder, texts, "mask_idx", **{**order, "mask_idx": {"0": [0, 0.5]}})


def test_files_are_known_by_their_names_whatever_the_case(folder):
    lines = json.dumps(ROW)
    for name, text in (
        ("bom.jsonl", "\ufeff" + lines),
        ("blank.jsonl", "\ufeff\r\n\n" + lines + "\r\n"),
        ("list.json", "\ufeff \n[" + lines + "]"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        assert len(Rows(str(folder / name))) == len(list(Rows(str(folder / name)))) == 1
    (folder / "name.PARQUET").write_text(lines)
    with pytest.raises(BadRow, match="pyarrow|not a parquet"):
        Rows(str(folder / "name.PARQUET"))


# ----------------------------------------------------------------------------------------------
# a row is good when it encodes


SPELLED = [
    "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\nB",
    "<|endoftext|>",
    "<|video_pad|>",
]


@pytest.mark.parametrize("words", SPELLED)
def test_words_of_a_row_never_become_special_tokens(words, folder, texts):
    tokenizer, _ = texts
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))
    plain = f"How far is the red bbox <mask>, and what is {words}?"
    row = {**ROW, "source": "x: row 0", "folder": str(folder)}
    as_it_was = data.encode(row, *texts, train=True)
    row["conversations"] = talk(plain, f"{words} is 2.0, not <mask>")
    sample = data.encode(row, *texts, train=True)
    count = [token for token in as_it_was["prompt"] if token in special]
    assert [token for token in sample["prompt"] if token in special] == count
    assert [token for token in sample["target"] if token in special] == [tokenizer.eos_token_id]
    assert words in tokenizer.decode(sample["prompt"]) and words in tokenizer.decode(
        sample["target"]
    )
    assert problem(folder, texts, conversations=row["conversations"], answer="2.0") == ""


def test_other_words_encode_as_the_whole_chat_does(folder, texts):
    """Against the tokenizer on the chat as one text."""
    tokenizer, processor = texts
    row = {**ROW, "source": "x: row 0", "folder": str(folder)}
    sample = data.encode(row, tokenizer, processor, train=True)
    tokens = sample["image_grid_thw"].prod().item() // processor.merge_size**2
    image = "<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>"
    question, target = (turn["value"] for turn in ROW["conversations"])
    text = image + data.DTR_PROMPT.replace("{Q}", question)
    chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert sample["prompt"] == tokenizer(chat)["input_ids"]
    assert sample["target"] == tokenizer(target + "<|im_end|>")["input_ids"]


@pytest.mark.parametrize("size", [(402, 2), (1, 1000), (1000, 1), (201, 1)])
def test_a_picture_too_thin_for_the_processor_is_a_bad_row(size, folder, texts):
    Image.new("RGB", size).save(folder / "thin.png")
    words = talk("What is this?", "a line")
    row = {"image": "thin.png", "conversations": words}
    whole = {key: None for key in ROW} | row
    assert f"{size[0]}x{size[1]}" in refused(folder, texts, "image", **whole)
    refused(folder, texts, "image", **{**whole, "image": ["a.png", "thin.png"]})
    Image.new("RGB", (200, 1)).save(folder / "thin.png")
    assert problem(folder, texts, **whole) == ""


def test_a_row_longer_than_the_context_is_a_bad_row(folder, texts):
    tokenizer, _ = texts
    assert tokenizer.model_max_length == tiny.CONTEXT
    long = "far " * tiny.CONTEXT
    text = refused(folder, texts, "conversations", conversations=talk("How far?", long), bbox=[])
    assert f"{tiny.CONTEXT:,}" in text
    refused(folder, texts, "conversations", conversations=talk(f"How {long}?", "2"), bbox=[])
    start = time.monotonic()
    refused(folder, texts, "conversations", conversations=talk("a" * 10**7, "2"), bbox=[])
    assert time.monotonic() - start < 5


def test_patches_are_counted_as_the_processor_makes_them():
    tokenizer = make_tokenizer()
    for processor in (make_processor(), tiny.tiny_image_processor(96, 8, 3)):
        for width, height in ((64, 48), (7, 900), (300, 200), (1, 1), (33, 95)):
            row = {"source": "x", "image": np.zeros((height, width, 3), np.uint8)}
            row["conversations"] = talk("What is it?", "a chair")
            sample = data.encode(row, tokenizer, processor, train=True)
            counted = data.patches_of(row, [(width, height)], processor)
            assert [len(sample["pixel_values"])] == counted


# ----------------------------------------------------------------------------------------------
# whatever stands in a row


VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    math.nan,
    math.inf,
    1e300,
    10**400,
    "",
    " ",
    "a",
    "\ud83d",
    "\x1b[2J",
]
VALUES += [[], {}, [[]], [None], [[1, 2, 3, 4]], {"0": [[1, 2, 3, 4]]}, ["a.png", "d.png"], "d.png"]
VALUES += [
    ["a"] * 3,
    [{}],
    {"red_bbox": None},
    {"red_bbox": {"center_cam": [0, 0, "2"]}},
    "<mask>" * 9,
]


def damaged(rng):
    """ROW with one to three of its fields, or of fields that it lacks, replaced at random."""
    row = json.loads(json.dumps(ROW))
    others = ["image_hw", "mask_idx", "blue_point", "bbox_img_idx", "main_frame_idx", "depth_scale"]
    for field in rng.sample([*ROW, *others, "answer", "task", "id"], rng.randint(1, 3)):
        value = rng.choice(VALUES)
        place = rng.random()
        if place < 0.2 and isinstance(row.get(field), list) and row[field]:
            row[field][0] = value
        elif place < 0.3 and field == "conversations":
            row[field][rng.randint(0, 1)]["value"] = value
        else:
            row[field] = value
    return row


def test_any_row_encodes_or_is_a_bad_row_alike_for_check_and_run(folder, texts):
    rng = random.Random(0)
    rows = [damaged(rng) for _ in range(int(os.environ.get("FUZZ", "300")))]
    path = write(folder, *rows)
    _, _, found = check.check_file(path, *texts)
    source = Rows(path, skip_bad_rows=True)
    data.check_with([("rows", source, 1.0)], *texts)
    for row in source:
        sample = data.encode(row, *texts, train=True)
        assert len(sample["prompt"]) > 10 and sample["pixel_values"].isfinite().all()
        assert not sample["points"].isinf().any() and sample["regions"].isfinite().all()
    assert 20 < len(source.problems) < len(rows)
    for text in [*found, *source.problems.values()]:
        assert len(text) <= 300 and text.isprintable()
        assert text.startswith(path) and ("field '" in text or "not readable" in text), text
    by_check = {text.split(": ")[1] for text in found}
    assert {f"row {i}" for i in source.problems} <= by_check


def test_the_check_of_any_file_ends_in_a_line(folder):
    write(folder, {**ROW, "image": "a\nb.png"}, name="one.jsonl")
    write(folder, {**ROW, "conversations": talk("\ud83d \x1b[2J<mask>", "2")}, name="two.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "tools.check", folder / "one.jsonl", folder / "two.jsonl"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )
    out = done.stdout.decode("ascii")
    assert done.returncode == 1 and not done.stderr.strip(), done.stderr
    assert "row 0" in out and "\x1b" not in out and "1 problems" in out
