"""Blended data: instances (JSON files or the embedded world) -> model inputs.

An instance is a dict in the format of the authors' published sets (see README, "Your own data"): picture, optional
depth map and intrinsics, a question, a target, coloured marks, region boxes, and "3d_pos" for the DTR path. Marks are
drawn on the picture for both paths; only DTR questions carry `<mask>` placeholders, one for each region.

Differences from the paper's release (SR-REAL, arXiv 2606.17539):
1. A bad row is an error that names file, row and field; `--skip_bad_rows` counts and lists them. (There: resampled.)
2. Depth is metric and has intrinsics. Without intrinsics a field of view of 60 degrees is assumed; without depth there
   is no 3D position embedding at all.
3. The prompt's own example of the DTR format earns the full format reward.
"""
import json
import math
import os
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

import questions
from model import POINT_DIM, encode_points, point_map, region_weights, to_patches
from rewards import extract_answer, total_reward
from scenes import load_scenes, make_scene

DEFAULT_FOV = 60                                            # degrees, horizontal: for pictures without intrinsics
MARK_COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0)}

# Released checkpoints of the authors would need the authors' wording: these two constants are the only place to change.
FIRST = "You are a helpful assistant. The user asks a question, and then you solve it. "
LOR_PROMPT = FIRST + ("First think about it, then answer: the reasoning inside <think> </think>, the answer inside "
                      "<answer> </answer>.\n{Q}")
DTR_PROMPT = FIRST + ("First detect the 3D centers of the relevant objects in meters (x right, y down, z forward), "
                      "then think, then answer, like this:\n<detect>Find 1 relevant objects:\n"
                      '<3d_box center="0.3,-0.8,3.3">chair (red bbox)</3d_box></detect>\n'
                      "<think>The depth is z:3.3.</think>\n<answer>3.3</answer>\n{Q}")
PROMPTS = {"lor": LOR_PROMPT, "dtr": DTR_PROMPT}

IMAGE_START, IMAGE_PAD, IMAGE_END, REGION = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<mask>"
CHAT = "<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_START, IMAGE_END, IMAGE_PAD, "<|video_pad|>", REGION]

# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and image processor of the embedded default model: made on the spot, nothing is downloaded


def train_tokenizer(texts, vocab_size=1024):
    """A small byte-level BPE. Frequent fixed pieces (the two prompts, the tags, decimals) are one plain-text token
    each, so that a laptop does not spend its time on boilerplate."""
    texts = [*texts, *["user assistant\n"] * 100]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, new_special_tokens=SPECIAL,
                                                         show_progress=False)
    tokenizer.add_tokens([
        *(prompt.format(Q="") for prompt in PROMPTS.values()), "<detect>Find ", " relevant objects:\n",
        '<3d_box center="', '">', "</3d_box>", "</3d_box>\n", "</detect>\n", "<think>", "</think>\n<answer>",
        "</answer>", *(f".{digit}" for digit in range(10))])
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return tokenizer


def tiny_image_processor(size, patch, merge):
    pixels = {"shortest_edge": (patch * merge) ** 2, "longest_edge": size * size}
    return Qwen2VLImageProcessorPil(patch_size=patch, merge_size=merge, temporal_patch_size=1, size=pixels,
                                    image_mean=[0.5] * 3, image_std=[0.5] * 3)


# ---------------------------------------------------------------------------------------------------------------------
# reading instances


class BadRow(ValueError):
    """A user's row that cannot be used; the message names file, row and field."""


def load_instances(path):
    """A JSON list (or JSON lines) of instances -> dicts that know their "source" and the "folder" of their files."""
    if not os.path.isfile(path):
        raise BadRow(f"{path}: no such file (give a JSON list of instances)")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise BadRow(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadRow(f"{path}: needs a list of rows, each a JSON object")
    folder = os.path.dirname(os.path.abspath(path))
    return [{**row, "source": f"{path}: row {i}", "folder": folder} for i, row in enumerate(rows)]


def finite(values, count):
    """Is this a list of so many finite numbers?"""
    return isinstance(values, (list, tuple)) and len(values) == count and all(
        isinstance(v, (int, float)) and abs(v) < 1e9 for v in values)                        # false for NaN too


def boxes_of(row, field, count=4):
    """A field that holds a list of boxes (or, with count 2, points)."""
    boxes = row.get(field, [])
    if not isinstance(boxes, list) or not all(finite(box, count) for box in boxes):
        raise BadRow(f"{row['source']}: field '{field}': needs a list of lists of {count} finite numbers, not {boxes}")
    return boxes


def path_of(row):
    """The rule of the published sets: "3d_pos" present -> DTR (even when empty), absent -> LOR."""
    return "dtr" if "3d_pos" in row else "lor"


def question_of(row):
    return turns(row)[0].replace("<image>\n", "").replace("<image>", "").strip()


def turns(row):
    talk = row.get("conversations")
    if not isinstance(talk, list) or len(talk) != 2 or not all(
            isinstance(turn, dict) and str(turn.get("value", "")).strip() for turn in talk):
        raise BadRow(f"{row['source']}: field 'conversations': needs one question and one non-empty answer")
    return talk[0]["value"], talk[1]["value"]


def answer_of(row):
    """The ground-truth answer: "answer", else the <answer> of the target, else the whole target."""
    target = turns(row)[1]
    answer = row["answer"] if "answer" in row else extract_answer(target) or target
    if not str(answer).strip():
        raise BadRow(f"{row['source']}: field 'answer': empty")
    return str(answer).strip()


def centers_of(row):
    """Ground-truth centres by mark, {"red bbox": (x, y, z)}; None for LOR, {} for DTR without detection reward."""
    if path_of(row) == "lor":
        return None
    if not isinstance(row["3d_pos"], dict):
        raise BadRow(f"{row['source']}: field '3d_pos': needs {{mark: {{'center_cam': [x, y, z]}}}}")
    centers = {}
    for mark, truth in row["3d_pos"].items():
        point = truth.get("center_cam") if isinstance(truth, dict) else None
        if not finite(point, 3):
            raise BadRow(f"{row['source']}: field '3d_pos.{mark}.center_cam': needs three finite numbers, metres")
        centers[mark.replace("_", " ")] = tuple(map(float, point))
    return centers


def open_image(row, field="image"):
    """-> RGB picture of a path (relative to the row's file) or an array."""
    value = row.get(field)
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if not isinstance(value, str):
        raise BadRow(f"{row['source']}: field '{field}': needs a path (several images are not supported here)")
    path = os.path.join(row.get("folder", "."), value)
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise BadRow(f"{row['source']}: field '{field}': no such file {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise BadRow(f"{row['source']}: field '{field}': unreadable image {path} ({error})") from None
    return image


def open_depth(row, width, height):
    """-> depth (H, W) float32 metres, NaN = no measurement, or None where the row has none."""
    depth = row.get("depth")
    if depth is None:
        return None
    if isinstance(depth, str):
        image = open_image(row, "depth")
        if image.mode in ("L", "P", "RGB") and "depth_scale" not in row:
            raise BadRow(f"{row['source']}: field 'depth': 8-bit pictures hold relative depth; add 'depth_scale' "
                         "(metres per unit) or leave the depth out")
        if not finite([row.get("depth_scale", 0.001)], 1):
            raise BadRow(f"{row['source']}: field 'depth_scale': needs a number, metres per unit")
        depth = np.asarray(image, np.float32) * row.get("depth_scale", 0.001)
        depth = np.where(depth > 0, depth, np.nan).astype(np.float32)
    if not isinstance(depth, np.ndarray):
        raise BadRow(f"{row['source']}: field 'depth': needs the path of a 16-bit PNG")
    if depth.shape != (height, width):
        size = "x".join(map(str, depth.shape[::-1]))
        raise BadRow(f"{row['source']}: field 'depth': {size} pixels, the image has {width}x{height}")
    return depth


def intrinsics_of(row, width, height):
    given = row.get("intrinsics")
    if given is None:
        focal = width / 2 / math.tan(math.radians(DEFAULT_FOV / 2))
        return focal, focal, width / 2, height / 2
    if not finite(given, 4) or min(given[:2]) <= 0:
        raise BadRow(f"{row['source']}: field 'intrinsics': needs [fx, fy, cx, cy], pixels, finite, focal lengths > 0")
    return tuple(map(float, given))


def region_masks(row, width, height):
    """"bbox" (absolute pixels, one for each <mask>) -> masks (R, H, W), 1 = inside."""
    boxes = boxes_of(row, "bbox") if path_of(row) == "dtr" or REGION in question_of(row) else []
    count = question_of(row).count(REGION)
    if count != len(boxes):
        raise BadRow(f"{row['source']}: field 'bbox': {len(boxes)} boxes for {count} <mask> in the question")
    masks = torch.zeros(len(boxes), height, width)
    for mask, box in zip(masks, boxes):
        if not (-1 <= box[0] < box[2] <= width + 1 and -1 <= box[1] < box[3] <= height + 1):
            raise BadRow(f"{row['source']}: field 'bbox': {box} is empty or outside the image ({width}x{height}); "
                         "needs x1,y1,x2,y2")
        x1, y1, x2, y2 = max(0, math.floor(box[0])), max(0, math.floor(box[1])), math.ceil(box[2]), math.ceil(box[3])
        mask[min(y1, height - 1):max(y2, y1 + 1), min(x1, width - 1):max(x2, x1 + 1)] = 1
    return masks


def draw_marks(image, row):
    """Coloured boxes (5 px a 1000 px of width, 2 at least) and points (radius 20 px a 1000 px) on a copy."""
    image, (w, h) = image.convert("RGB"), image.size
    pen = ImageDraw.Draw(image)
    for color, rgb in MARK_COLORS.items():
        for x1, y1, x2, y2 in boxes_of(row, f"{color}_bbox"):
            right, bottom = x2 * w / 1000 - 1, y2 * h / 1000 - 1
            corners = [min(x1 * w / 1000, right), min(y1 * h / 1000, bottom), right, bottom]
            pen.rectangle(corners, outline=rgb, width=max(2, round(w / 200)))
        for x, y in boxes_of(row, f"{color}_point", 2):
            r = max(1, w / 50)
            pen.ellipse([x * w / 1000 - r, y * h / 1000 - r, x * w / 1000 + r, y * h / 1000 + r], fill=rgb)
    return image


# ---------------------------------------------------------------------------------------------------------------------
# instance -> tensors -> batch


def encode(row, tokenizer, processor, train):
    """One instance -> dict of tensors. train: with its target, and without a template where that has no <answer>."""
    image = open_image(row)
    width, height = image.size
    question, target = question_of(row), turns(row)[1]
    masks, depth = region_masks(row, width, height), open_depth(row, width, height)
    vision = processor(images=[draw_marks(image, row)], return_tensors="pt")
    grid, merge = tuple(vision["image_grid_thw"][0, 1:].tolist()), processor.merge_size
    points = torch.full((grid[0] * grid[1], POINT_DIM), math.nan)
    if depth is not None:
        camera = intrinsics_of(row, width, height)
        points = patch_points(Depth((row["source"], depth.shape, camera), depth), camera, grid, merge)
    text = question if train and extract_answer(target) is None else PROMPTS[path_of(row)].replace("{Q}", question)
    pads = IMAGE_START + IMAGE_PAD * (len(points) // merge**2) + IMAGE_END
    return {"prompt": tokenizer(CHAT.format(images=pads, text=text))["input_ids"],
            "target": tokenizer(target + tokenizer.eos_token)["input_ids"] if train else [],
            "pixel_values": vision["pixel_values"], "image_grid_thw": vision["image_grid_thw"], "points": points,
            "regions": region_weights(masks, grid, merge) if len(masks) else torch.zeros(0, len(points))}


@dataclass(frozen=True)
class Depth:
    """A depth map that the cache knows by its key: many questions are asked of one scene."""
    key: tuple
    map: np.ndarray = field(compare=False)


@lru_cache(maxsize=2048)
def patch_points(depth, intrinsics, grid, merge):
    return to_patches(encode_points(point_map(torch.from_numpy(depth.map), intrinsics)), grid, merge)


def collate(samples, tokenizer):
    """-> batch: prompts left-padded when there is no target (rollout), prompt + target right-padded otherwise (SFT).

    All (B, L): input_ids, attention_mask, mm_token_type_ids (1 = image token), loss_mask (1 = target, up to and with
    its end of turn).
    """
    rows = [s["prompt"] + s["target"] for s in samples]
    length, left = max(map(len, rows)), not samples[0]["target"]
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    batch = {"attention_mask": torch.zeros_like(ids), "loss_mask": torch.zeros_like(ids)}
    for i, (row, sample) in enumerate(zip(rows, samples)):
        start = length - len(row) if left else 0
        ids[i, start:start + len(row)] = torch.tensor(row)
        batch["attention_mask"][i, start:start + len(row)] = 1
        batch["loss_mask"][i, start + len(sample["prompt"]):start + len(row)] = 1
    batch["input_ids"] = ids
    batch["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)).long()
    for key in ("pixel_values", "image_grid_thw", "points"):
        batch[key] = torch.cat([s[key] for s in samples])
    batch["regions"] = torch.block_diag(*(s["regions"] for s in samples))                    # (R, P) over all images
    return batch


def to(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# sources: the embedded world and files, blended


@lru_cache(maxsize=4096)
def cached_scene(seed, size):
    return make_scene(seed, size)


def check_row(row):
    """Raise BadRow if the row cannot be used; reads its pictures."""
    width, height = draw_marks(open_image(row), row).size
    for part in (region_masks, open_depth, intrinsics_of):
        part(row, width, height)
    answer, centers = answer_of(row), centers_of(row)
    try:
        total_reward("", answer, path_of(row), centers, question=question_of(row))
    except ValueError as error:                             # wrong ground truth
        raise BadRow(f"{row['source']}: field {error}") from None


def file_source(spec, skip_bad_rows=False):
    """"FILE" or "FILE*weight" (JSON instances), all rows checked -> (name, rows, weight)."""
    path, _, weight = spec.partition("*")
    try:
        weight = float(weight or 1)
    except ValueError:
        raise BadRow(f"--data {spec}: needs FILE or FILE*weight, weight a number") from None
    good, bad = [], []
    for row in load_instances(path):
        try:
            check_row(row)
            good.append(row)
        except BadRow as error:
            if not skip_bad_rows:
                raise BadRow(f"{error} (--skip_bad_rows leaves such rows out)") from None
            bad.append(str(error))
    for line in bad[:20]:
        print(f"skipped: {line}", flush=True)
    if bad:
        print(f"{path}: {len(bad)} of {len(good) + len(bad)} rows skipped", flush=True)
    if not good or not weight > 0:
        raise BadRow(f"--data {spec}: no usable row, or a weight of 0")
    return os.path.basename(path), good, weight


def scenes_source(path):
    """The questions of both paths about every scene of a scenes.jsonl -> (name, rows, weight)."""
    try:
        rows = [row for scene in load_scenes(path) for row in questions.questions(scene, 0)]
    except ValueError as error:
        raise BadRow(str(error)) from None
    if not rows:
        raise BadRow(f"--scenes {path}: no scene has an annotated object to ask about")
    return os.path.basename(path), rows, 1.0


def user_sources(settings):
    """The sources of --data and --scenes: [(name, rows, weight), ...], empty without either."""
    sources = [file_source(spec, settings.skip_bad_rows) for spec in settings.data]
    return sources + ([scenes_source(settings.scenes)] if settings.scenes else [])


class World:
    """The embedded world as a list of instances of one kind: "lor", "dtr", or "grounding" (see questions.py).

    Item i is question k = i // scenes, of `per`, about scene s = i % scenes, of kind `tasks[(s + k) % len(tasks)]`.
    """

    def __init__(self, kind, tasks, first, scenes, per, size, sensor=False):
        self.kind, self.tasks, self.first, self.scenes, self.per = kind, list(tasks), first, scenes, per
        self.size, self.sensor = size, sensor

    def __len__(self):
        return self.scenes * self.per

    def __getitem__(self, index):
        k, place = divmod(index % len(self), self.scenes)
        for turn in range(self.scenes * len(self.tasks)):   # where a scene does not allow a question, try the next
            scene = cached_scene(self.first + (place + turn // len(self.tasks)) % self.scenes, self.size)
            rows = self.ask(scene, k, self.tasks[(place + k + turn) % len(self.tasks)])
            if rows:
                return rows[(place + k) % len(rows)]
        raise ValueError(f"no scene allows a question of {self.tasks}")

    def ask(self, scene, k, task):
        if self.kind == "grounding":
            return [r for r in questions.grounding(scene, k, self.sensor) if r["task"] == task]
        return [r for r in questions.questions(scene, k, self.sensor, [task]) if path_of(r) == self.kind]


def perception_stages(scenes, first, size):
    """Short questions without reasoning, in place of a stock VLM's pretraining, easy before hard: what a region token
    holds; what the picture shows, and in its marks; where things are, and how to compute with that. 3D centres are the
    depth sensor's own. [(share of the steps, sources), ..]"""
    stages = [(0.2, [("region_qa", 1)]), (0.3, [("region_qa", 1), ("listing", 3), ("mark_qa", 3)]),
              (0.5, [("region_qa", 1), ("listing", 3), ("mark_qa", 4), ("center", 5), ("ground2d", 1), ("derive", 8)])]
    return [(share, [(task, World("grounding", [task], first, scenes, per, size, sensor=True), 1.0)
                     for task, per in parts]) for share, parts in stages]


def cold_start_blend(traces, scenes, first, size):
    """The cold-start mixture, centres as a sensor sees them: [(name, rows, weight), ...]. Scenes with reasoning traces
    are few (`traces`); grounding and VQA, which need no reasoning, come from all `scenes`."""
    region, general = questions.REGION, questions.GENERAL
    parts = [("lor_region", "lor", region, 6), ("lor_general", "lor", general, 5), ("dtr_region", "dtr", region, 8),
             ("dtr_general", "dtr", general, 1)]
    parts += [(task, "grounding", [task], per) for task, per in (
        ("center", 2), ("box3d", 1), ("ground2d", 1), ("region_qa", 2), ("mark_qa", 3), ("listing", 5), ("vqa", 1),
        ("derive", 4))]
    blend = []
    for name, kind, tasks, per in parts:
        count = scenes if kind == "grounding" else traces
        blend.append((name, World(kind, tasks, first, count, per, size, sensor=True), traces / count))
    return blend


def rl_blend(count, first, size):
    """Fresh questions with exact answers for GRPO, none twice; DTR is asked about regions, as in the paper's data."""
    region, general = questions.REGION, questions.GENERAL
    parts = [("lor_region", "lor", region, 3), ("lor_general", "lor", general, 2), ("dtr_region", "dtr", region, 5)]
    return [(name, World(kind, tasks, first + 10**6 * i, count * share, 1, size), 1.0)
            for i, (name, kind, tasks, share) in enumerate(parts)]


class Blend:
    """Sources [(name, rows, weight)] evenly interleaved: every stretch holds them in the global proportions.

    Weight w repeats a source w times an epoch (w < 1: takes that share of it). A position, counted over all epochs and
    ranks, fixes the row: to resume, continue at the position; to shard, take every world-th.
    """

    def __init__(self, sources, seed):
        self.sources, self.seed = sources, seed
        counts = [max(1, round(len(rows) * weight)) for _, rows, weight in sources]
        when = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        which = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(when, kind="stable")
        self.which = which[order]                           # source of each position of an epoch
        self.nth = np.concatenate([np.arange(n) for n in counts])[order]
        self.counts = counts

    def __len__(self):
        return len(self.which)

    def __getitem__(self, position):
        epoch, step = divmod(position, len(self))
        source, nth = self.which[step], epoch * self.counts[self.which[step]] + self.nth[step]
        rows = self.sources[source][1]
        round_, index = divmod(int(nth), len(rows))         # a new shuffle each time that the source is used up
        return rows[int(shuffle(len(rows), self.seed + 1000 * round_ + int(source))[index])]


@lru_cache(maxsize=64)
def shuffle(length, seed):
    return np.random.default_rng(seed).permutation(length)
