"""Blended data: instances (files or the embedded world) -> model inputs.

    python data.py check FILE...                                       # what is in the files, and what is wrong there

An instance is a dict in the format of the authors' published sets (instances.py): pictures, optional depth maps and
intrinsics, a question, a target, coloured marks, region boxes, and "3d_pos" for the DTR path. Marks are drawn on the
pictures for both paths; only DTR questions carry `<mask>` placeholders, one for each region.

Differences from the paper's release (SR-REAL, arXiv 2606.17539):
1. A bad row is an error that names file, row and field; `--skip_bad_rows` counts and lists them. (There: resampled.)
2. Depth is metric and has intrinsics. Without intrinsics a field of view of 60 degrees is assumed; without depth there
   is no 3D position embedding at all.
3. The prompt's own example of the DTR format earns the full format reward.
"""
import math
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

import questions
from files import Rows
from instances import (IMAGE, MARK_COLORS, REGION, BadRow, answer_of, best_path, centers_of, check_row, draw_marks,
                       images_of, intrinsics_of, on_paths, open_depth, open_image, path_of, question_of,
                       reference_frame, region_mask, regions_of, text_of, turns)
from model import POINT_DIM, encode_points, point_map, region_weights, to_patches
from rewards import extract_answer
from scenes import load_scenes, make_scene

# Released checkpoints of the authors would need the authors' wording: change these constants, nothing else.
FIRST = "You are a helpful assistant. The user asks a question, and then you solve it. "
LOR_PROMPT = FIRST + ("First think about it, then answer: the reasoning inside <think> </think>, the answer inside "
                      "<answer> </answer>.\n{Q}")
DTR_PROMPT = FIRST + ("First detect the 3D centers of the relevant objects in meters (x right, y down, z forward), "
                      "then think, then answer, like this:\n<detect>Find 1 relevant objects:\n"
                      '<3d_box center="0.3,-0.8,3.3">chair (red bbox)</3d_box></detect>\n'
                      "<think>The depth is z:3.3.</think>\n<answer>3.3</answer>\n{Q}")
PROMPTS = {"lor": LOR_PROMPT, "dtr": DTR_PROMPT}
# DTR with several images: the centres are in the camera frame of one of them, K.
DTR_IMAGES_PROMPT = (DTR_PROMPT.replace("in meters (", "in the camera frame of image {K} (0 is the first), in meters (")
                     .replace("<detect>Find 1", "<detect>After aligning to the reference frame {K}, find 1"))

IMAGE_START, IMAGE_PAD, IMAGE_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
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
# instance -> tensors -> batch


def encode(row, tokenizer, processor, train):
    """One instance -> dict of tensors. train: with its target, and without a template where that has no <answer>.

    points (P, POINT_DIM) and regions (R, P) are over the patches of all images of the row.
    """
    images, target = [open_image(row, i) for i in range(len(images_of(row)))], turns(row)[1]
    vision = processor(images=[draw_marks(image, row, i) for i, image in enumerate(images)], return_tensors="pt")
    grids, merge = [tuple(grid) for grid in vision["image_grid_thw"][:, 1:].tolist()], processor.merge_size
    sizes, patches = [image.size for image in images], [rows * columns for rows, columns in grids]
    points = torch.cat([image_points(row, i, sizes[i], grid, merge) for i, grid in enumerate(grids)])
    regions = regions_of(row, sizes)
    weights = torch.zeros(len(regions), len(points))
    for weight, (i, box) in zip(weights, regions):          # 0 over the patches of the other images
        mask = region_mask(box, *sizes[i])
        weight.split(patches)[i].copy_(region_weights(mask[None], grids[i], merge)[0])
    template = not train or extract_answer(target) is not None
    pads = [IMAGE_START + IMAGE_PAD * (count // merge**2) + IMAGE_END for count in patches]
    return {"prompt": tokenizer(prompt_text(row, template, pads))["input_ids"],
            "target": tokenizer(target + tokenizer.eos_token)["input_ids"] if train else [],
            "pixel_values": vision["pixel_values"], "image_grid_thw": vision["image_grid_thw"], "points": points,
            "regions": weights}


def prompt_text(row, template, pads):
    """The chat up to the response. An image (its run of pads) stands where the text says `<image>`, else in front."""
    text = text_of(row)
    if IMAGE not in text:
        text = IMAGE * len(pads) + text
    front = re.match(rf"(\s*{IMAGE})*", text)[0]            # in front of the template, too
    text, count = text.removeprefix(front).strip(), front.count(IMAGE)
    if count + text.count(IMAGE) != len(pads):
        raise BadRow(f"{row['source']}: field 'conversations': {len(pads)} images need as many <image>, or none")
    if template:
        several = path_of(row) == "dtr" and len(pads) > 1
        prompt = DTR_IMAGES_PROMPT.replace("{K}", str(reference_frame(row))) if several else PROMPTS[path_of(row)]
        text = prompt.replace("{Q}", text)
    for pad in pads[count:]:
        text = text.replace(IMAGE, pad, 1)
    return CHAT.format(images="".join(pads[:count]), text=text)


def image_points(row, index, size, grid, merge):
    """Encoded 3D points (P, POINT_DIM) of one image; NaN without depth."""
    depth = open_depth(row, *size, index)
    if depth is None:
        return torch.full((grid[0] * grid[1], POINT_DIM), math.nan)
    camera = intrinsics_of(row, *size, index)
    key = Depth((row["source"], index, depth.shape, camera), depth)
    cached = isinstance(row["depth"], np.ndarray)           # in memory anyway; a file's rows are used once an epoch
    return (patch_points if cached else patch_points.__wrapped__)(key, camera, grid, merge)


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
def cached_scene(seed, size, overlooked=False):
    """overlooked: as an annotator leaves it. In three of five scenes the smallest object of the picture is missing from
    scene.objects (it stays in the picture and in the depth)."""
    scene = make_scene(seed, size)
    if overlooked and np.random.default_rng([seed, 5]).random() < 0.6:
        del scene.objects[int(np.argmin([questions.box_area(o) for o in scene.objects]))]
    return scene


def file_source(spec, skip_bad_rows=False):
    """"FILE" or "FILE*weight" (instances) -> (name, rows, weight). The first 20 rows are checked now, all on use."""
    path, _, weight = spec.partition("*")
    try:
        weight = float(weight or 1)
    except ValueError:
        raise BadRow(f"--data {spec}: needs FILE or FILE*weight, weight a number") from None
    rows = Rows(path, skip_bad_rows)
    if not list(islice(rows, 20)) or not weight > 0:
        raise BadRow(f"--data {spec}: no usable row, or a weight of 0")
    return os.path.basename(path), rows, weight


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
    annotated: made from an imperfect annotation, with centres as a depth sensor sees them and objects overlooked.
    """

    def __init__(self, kind, tasks, first, scenes, per, size, annotated=False):
        self.kind, self.tasks, self.first, self.scenes, self.per = kind, list(tasks), first, scenes, per
        self.size, self.annotated = size, annotated

    def __len__(self):
        return self.scenes * self.per

    def __getitem__(self, index):
        k, place = divmod(index % len(self), self.scenes)
        for turn in range(self.scenes * len(self.tasks)):   # where a scene does not allow a question, try the next
            seed = self.first + (place + turn // len(self.tasks)) % self.scenes
            scene = cached_scene(seed, self.size, self.annotated)
            rows = self.ask(scene, k, self.tasks[(place + k + turn) % len(self.tasks)])
            if rows:
                return rows[(place + k) % len(rows)]
        raise ValueError(f"no scene allows a question of {self.tasks}")

    def ask(self, scene, k, task):
        if self.kind == "grounding":
            return questions.grounding(scene, k, self.annotated, [task])
        return [r for r in questions.questions(scene, k, self.annotated, [task]) if path_of(r) == self.kind]


def perception_stages(scenes, first, size):
    """Short questions without reasoning, in place of a stock VLM's pretraining, easy before hard: what a region token
    holds, and to look up a word in a list; what the picture shows, and in its marks; where things are, and how to
    compute with that. From the imperfect annotation. [(share of the steps that are done, sources), ..]"""
    stages = [(0.2, [("region_qa", 3), ("lookup", 2)]),
              (0.5, [("region_qa", 1), ("listing", 3), ("mark_qa", 3), ("lookup", 1), ("measure", 2)]),
              (1.0, [("region_qa", 1), ("listing", 3), ("mark_qa", 4), ("center", 5), ("ground2d", 1), ("derive", 4),
                     ("lookup", 1), ("measure", 6)])]
    return [(end, [(task, World("grounding", [task], first, scenes, per, size, annotated=True), 1.0)
                   for task, per in parts]) for end, parts in stages]


def cold_start_blend(traces, scenes, first, size):
    """The cold-start mixture, from the imperfect annotation: [(name, rows, weight), ...]. Scenes with reasoning traces
    are few (`traces`); grounding and VQA, which need no reasoning, come from all `scenes`."""
    region, general = questions.REGION, questions.GENERAL
    parts = [("lor_region", "lor", region, 6), ("lor_general", "lor", general, 5), ("dtr_region", "dtr", region, 8),
             ("dtr_general", "dtr", general, 2)]
    parts += [(task, "grounding", [task], per) for task, per in (
        ("center", 2), ("box3d", 1), ("ground2d", 1), ("region_qa", 2), ("mark_qa", 3), ("listing", 5), ("vqa", 1),
        ("derive", 2), ("lookup", 1), ("measure", 3))]
    blend = []
    for name, kind, tasks, per in parts:
        count = scenes if kind == "grounding" else traces
        blend.append((name, World(kind, tasks, first, count, per, size, annotated=True), traces / count))
    return blend


def rl_blend(count, first, size, path="both"):
    """Fresh questions with exact answers for GRPO, none twice, for one path or both."""
    region, general = questions.REGION, questions.GENERAL
    parts = [("lor_region", "lor", region, 3), ("lor_general", "lor", general, 2), ("dtr_region", "dtr", region, 3),
             ("dtr_general", "dtr", general, 2)]
    apart = max(10**6, 4 * count)                           # no two sources ask about the same scene
    return [(name, World(kind, tasks, first + apart * i, count * share, 1, size), 1.0)
            for i, (name, kind, tasks, share) in enumerate(parts) if path in (kind, "both")]


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


if __name__ == "__main__":
    import check                                            # here, because it builds on this file
    check.main()
