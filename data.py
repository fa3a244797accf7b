"""Blended data: instances (from files or from the embedded world) -> model inputs.

An instance is a dict in the format of the authors' published sets (formats/instances.py): pictures,
optional depth maps and intrinsics, a question, a target, coloured marks, region boxes, and
"3d_pos". A row with "3d_pos" is on the path DTR (detect-then-reason: 3D coordinates first), a row
without is on LOR (language-only reasoning). Marks are drawn on the pictures for both paths; only
DTR questions carry `<mask>` placeholders, one per region.

In this order: the prompts; `encode` (instance -> tensors), `collate` (-> batch) and `load_ahead`;
the score of a response; the sources; `Blend`, which interleaves them.

Differences from the authors' release (the method is SR-REAL, arXiv 2606.17539):
1. A bad row is an error that names file, row and field; --skip_bad_rows counts and lists them.
   (There: another row is drawn in its place.)
2. Depth is metric and has intrinsics. Without intrinsics a field of view of 60 degrees is assumed;
   without depth there is no 3D position embedding at all.
3. The prompt's own example of the DTR format earns the full format reward.

Dimensions: B prompts, L tokens, R regions, P patches, H x W pixels.
"""

import math
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import torch

import rewards
from formats.errors import BadRow
from formats.files import Rows
from formats.instances import (
    IMAGE_PLACEHOLDER,
    REGION_PLACEHOLDER,
    answer_of,
    centers_of,
    check_instance,
    draw_marks,
    images_of,
    intrinsics_of,
    open_depth,
    open_image,
    path_of,
    question_of,
    reference_frame,
    region_mask,
    regions_of,
    text_of,
    turns,
)
from formats.scenes import load_scenes
from model import (
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    POINT_DIM,
    REGION_TOKEN,
    encode_points,
    mrope_positions,
    point_map,
    region_weights,
    to_patches,
)
from world.questions import ask_questions

# ----------------------------------------------------------------------------------------------
# the prompts; {Q} is the question
# (Released checkpoints of the authors would need the authors' wording: change these constants.)

FIRST_SENTENCE = "You are a helpful assistant. The user asks a question, and then you solve it. "
LOR_PROMPT = FIRST_SENTENCE + (
    "First think about it, then answer: the reasoning inside <think> </think>, the answer inside "
    "<answer> </answer>.\n{Q}"
)
DTR_PROMPT = FIRST_SENTENCE + (
    "First detect the 3D centers of the relevant objects in meters (x right, y down, z forward), "
    "then think, then answer, like this:\n<detect>Find 1 relevant objects:\n"
    '<3d_box center="0.3,-0.8,3.3">chair (red bbox)</3d_box></detect>\n'
    "<think>The depth is z:3.3.</think>\n<answer>3.3</answer>\n{Q}"
)
PROMPTS = {"lor": LOR_PROMPT, "dtr": DTR_PROMPT}
# DTR with several images: the centres are in the camera frame of one of them, {K}.
DTR_IMAGES_PROMPT = DTR_PROMPT.replace(
    "in meters (", "in the camera frame of image {K} (0 is the first), in meters ("
).replace("<detect>Find 1", "<detect>After aligning to the reference frame {K}, find 1")
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

# ----------------------------------------------------------------------------------------------
# instance -> tensors -> batch


def encode(row, tokenizer, processor, train):
    """One instance -> a dict of tensors and token lists; train: with its target.

    prompt, target: lists of token ids; position_ids (3, L) of both; pixel_values, image_grid_thw:
    what the image processor makes; points (P, POINT_DIM), NaN without depth; regions (R, P), a row
    of weights per `<mask>`, 0 over the patches of other images. P counts the patches of all images
    of the row. BadRow if it can't be.
    """
    images = [open_image(row, i) for i in range(len(images_of(row)))]
    sizes = [image.size for image in images]
    patches = patches_of(row, sizes, processor)
    prompt, target = token_ids(row, patches, tokenizer, processor, train)
    marked = [draw_marks(image, row, i) for i, image in enumerate(images)]
    vision = processor(images=marked, return_tensors="pt")
    merge_size = processor.merge_size
    grids = [tuple(grid) for grid in vision["image_grid_thw"][:, 1:].tolist()]  # (rows, columns)

    points = torch.cat(
        [image_points(row, i, sizes[i], grid, merge_size) for i, grid in enumerate(grids)]
    )
    regions = regions_of(row, sizes)
    weights = torch.zeros(len(regions), len(points))  # (R, P)
    for row_weights, (i, box) in zip(weights, regions):
        mask = region_mask(box, *sizes[i])  # (H, W)
        own_patches = row_weights.split(patches)[i]
        own_patches.copy_(region_weights(mask[None], grids[i], merge_size)[0])

    is_image = torch.tensor(prompt + target) == tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    return {
        "prompt": prompt,
        "target": target,
        "position_ids": mrope_positions(is_image, grids, merge_size),
        "pixel_values": vision["pixel_values"],
        "image_grid_thw": vision["image_grid_thw"],
        "points": points,
        "regions": weights,
    }


def patches_of(row, sizes, processor):
    """The number of patches of each image; sizes: (W, H) in pixels. BadRow for a thin strip."""
    patches = []
    for width, height in sizes:
        try:
            patches.append(processor.get_number_of_image_patches(height, width, {}))
        except ValueError as error:
            raise BadRow(
                f"{row['source']}: field 'image': {width}x{height} pixels ({error})"
            ) from None
    return patches


def token_ids(row, patches, tokenizer, processor, train):
    """The prompt and the target as lists of token ids; patches: the number of each image.

    The row's own words stay words: none becomes a special token, whatever it spells. BadRow for
    more tokens than the model's context has.
    """
    # A training target without <answer> (a caption, a bare box) follows the bare question.
    _, target = turns(row)
    with_template = not train or rewards.extract_answer(target) is not None
    front, text = prompt_text(row, with_template, len(patches))

    def words(text):
        """Plain text -> ids."""
        found = tokenizer(text, split_special_tokens=True, add_special_tokens=False, verbose=False)
        return found["input_ids"]

    def special(token):
        return [tokenizer.convert_tokens_to_ids(token)]

    counts = iter([count // processor.merge_size**2 for count in patches])
    prompt = special(TURN_START) + words("user\n")
    for part in re.split(f"({IMAGE_PLACEHOLDER}|{REGION_PLACEHOLDER})", front + text):
        if part == IMAGE_PLACEHOLDER:
            prompt += special(IMAGE_START) + special(IMAGE_PAD) * next(counts) + special(IMAGE_END)
        elif part == REGION_PLACEHOLDER:
            prompt += special(REGION_TOKEN)
        else:
            prompt += words(part)
    prompt += special(TURN_END) + words("\n") + special(TURN_START) + words("assistant\n")
    target = words(target) + [tokenizer.eos_token_id] if train else []
    length = len(prompt) + len(target)
    if length > tokenizer.model_max_length:
        raise BadRow(
            f"{row['source']}: field 'conversations': {length:,} tokens with its images; the "
            f"model's context has {tokenizer.model_max_length:,}"
        )
    return prompt, target


def prompt_text(row, with_template, images):
    """The placeholders of images in front of the question, and the text that follows them.

    An image stands where the text says `<image>`, else in front. Images in front of the question
    stay in front of the template, too.
    """
    text = text_of(row)
    if IMAGE_PLACEHOLDER not in text:
        text = IMAGE_PLACEHOLDER * images + text
    if text.count(IMAGE_PLACEHOLDER) != images:
        raise BadRow(
            f"{row['source']}: field 'conversations': {images} images need as many <image>, or none"
        )
    front = re.match(rf"(\s*{IMAGE_PLACEHOLDER})*", text)[0]
    text = text.removeprefix(front).strip()
    if with_template:
        if path_of(row) == "dtr" and images > 1:
            template = DTR_IMAGES_PROMPT.replace("{K}", str(reference_frame(row)))
        else:
            template = PROMPTS[path_of(row)]
        text = template.replace("{Q}", text)
    return IMAGE_PLACEHOLDER * front.count(IMAGE_PLACEHOLDER), text


def check_row(row, tokenizer, processor):
    """BadRow unless the row encodes, as a row of training and as a prompt to be answered."""
    check_instance(row)
    sizes = [open_image(row, i).size for i in range(len(images_of(row)))]
    patches = patches_of(row, sizes, processor)
    for train in (True, False):
        token_ids(row, patches, tokenizer, processor, train)


def check_with(sources, tokenizer, processor):
    """From now on rows of files are good if they encode for this model; says so of the first 20."""
    for name, rows, _ in sources:
        if isinstance(rows, Rows):
            rows.check_with(partial(check_row, tokenizer=tokenizer, processor=processor))
            check_first(name, rows)


def image_points(row, index, size, grid, merge_size):
    """Encoded 3D points (P, POINT_DIM) of one image; NaN without depth."""
    depth = open_depth(row, *size, index)
    if depth is None:
        return torch.full((grid[0] * grid[1], POINT_DIM), math.nan)
    intrinsics = intrinsics_of(row, *size, index)
    if not isinstance(row["depth"], np.ndarray):
        # Not cached: a file's row is used once per epoch.
        return patch_points(depth, intrinsics, grid, merge_size)
    key = (row["source"], index, depth.shape, intrinsics)
    return cached_patch_points(DepthOfScene(key, depth), intrinsics, grid, merge_size)


def patch_points(depth, intrinsics, grid, merge_size):
    """Depth (H, W) metres -> encoded points averaged over each patch (P, POINT_DIM)."""
    points = encode_points(point_map(torch.from_numpy(depth), intrinsics))
    return to_patches(points, grid, merge_size)


@dataclass(frozen=True)
class DepthOfScene:
    """A depth map that a cache knows by its key: many questions are asked about one scene."""

    key: tuple
    depth: np.ndarray = field(compare=False)


@lru_cache(maxsize=2048)
def cached_patch_points(scene, intrinsics, grid, merge_size):
    return patch_points(scene.depth, intrinsics, grid, merge_size)


def collate(samples, tokenizer):
    """Encoded samples -> a batch.

    With targets (SFT) rows are prompt + target, padded on the right; without (rollout) they are
    prompts, padded on the left. All (B, L): input_ids, attention_mask, mm_token_type_ids (1 = image
    token), loss_mask (1 = target, up to and including its end of turn). position_ids (3, B, L), 0
    where padded. regions (R, P) over all images.
    """
    rows = [sample["prompt"] + sample["target"] for sample in samples]
    length = max(map(len, rows))
    pad_left = not samples[0]["target"]
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(ids)
    loss_mask = torch.zeros_like(ids)
    position_ids = ids.new_zeros(3, *ids.shape)
    for i, (row, sample) in enumerate(zip(rows, samples)):
        start = length - len(row) if pad_left else 0
        end = start + len(row)
        ids[i, start:end] = torch.tensor(row)
        attention_mask[i, start:end] = 1
        position_ids[:, i, start:end] = sample["position_ids"][:, : len(row)]
        loss_mask[i, start + len(sample["prompt"]) : end] = 1
    is_image = ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "mm_token_type_ids": is_image.long(),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "image_grid_thw": torch.cat([sample["image_grid_thw"] for sample in samples]),
        "points": torch.cat([sample["points"] for sample in samples]),
        "regions": torch.block_diag(*(sample["regions"] for sample in samples)),
    }


# What RegionVLM.encode_images takes; a picture takes 14 MB.
PICTURES = ("pixel_values", "image_grid_thw", "points", "regions")


def to(batch, device):
    """A batch on a device. Pictures stay on the CPU: encode_images fetches them when it runs."""
    return {key: value if key in PICTURES else value.to(device) for key, value in batch.items()}


class EncodedRows(torch.utils.data.Dataset):
    """Positions of rows or of a blend -> (row, encoded sample)."""

    def __init__(self, rows, tokenizer, processor, train):
        self.rows = rows
        self.tokenizer = tokenizer
        self.processor = processor
        self.train = train

    def __getitem__(self, position):
        row = self.rows[position]
        return row, encode(row, self.tokenizer, self.processor, self.train)


def load_ahead(rows, positions, workers=0, ahead=1):
    """(row, encoded sample) of each of these positions, one after the other.

    rows: EncodedRows; positions: any iterable, without an end if need be; workers: processes that
    encode about `ahead` rows ahead while this one trains (0: none, each row when it is asked for).
    """
    loader = torch.utils.data.DataLoader(
        rows,
        sampler=positions,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=math.ceil(ahead / workers) if workers else None,
        collate_fn=tensors_to_arrays,
        worker_init_fn=leave_signals_alone,
        generator=torch.Generator(),  # else it would take a number from everybody's
    )
    for row, sample in loader:
        for key, value in sample.items():
            if isinstance(value, np.ndarray):
                sample[key] = torch.from_numpy(value)
        yield row, sample


def tensors_to_arrays(item):
    """A row and its sample, without tensors: one that crosses from a loader process would cost an
    open file until it is used up, and a process may have 1,024."""
    row, sample = item
    plain = {}
    for key, value in sample.items():
        plain[key] = value.numpy() if isinstance(value, torch.Tensor) else value
    return row, plain


def leave_signals_alone(worker):
    """In a loader process: signals to the program's group are for the program alone.

    It ends its loaders itself, when it has saved its work.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------
# the score of a response

# The parts of a score, and the total: what logs, tables and charts show.
METRICS = [*rewards.WEIGHTS_WITH_CENTERS, "reward"]


def score(row, response):
    """Reward parts of one response to a row, and the distances of its centres from the true ones.

    -> {"reward": the total, "accuracy", "format", "detection" (None where it does not apply),
        "center_errors_m": metres, per asked-for object, None without a prediction}
    """
    centers = centers_of(row)
    images = len(images_of(row))
    question = question_of(row)
    try:
        parts = rewards.total_reward(
            response, answer_of(row), path_of(row), centers, images, question
        )
    except ValueError as error:
        raise BadRow(f"{row['source']}: {error}") from None
    errors = []
    if centers:
        errors = list(rewards.center_errors(response, centers, images, question).values())
    return {"reward": parts.pop("total"), **parts, "center_errors_m": errors}


# ----------------------------------------------------------------------------------------------
# sources: (name, rows, weight); those of the embedded world are in world/sources.py


MOST_ROWS = 10**8  # of a source in an epoch; a blend of so many takes 5 GB


def user_sources(settings):
    """The sources of --data and --scenes; an empty list without either."""
    sources = [file_source(spec, settings.skip_bad_rows) for spec in settings.data]
    if settings.scenes:
        sources.append(scenes_source(settings.scenes))
    return sources


def user_files(settings):
    """The paths that --data and --scenes name, without weights; "" where --scenes is not given."""
    return [*(spec.partition("*")[0] for spec in settings.data), settings.scenes]


def file_source(spec, skip_bad_rows=False):
    """ "FILE" or "FILE*weight" -> a source. The first 20 rows are checked now, all others on
    use."""
    path, _, weight = spec.partition("*")
    try:
        weight = float(weight or 1)
    except ValueError:
        raise BadRow(f"--data {spec}: needs FILE or FILE*weight, weight a number") from None
    if not 0 < weight < math.inf:
        raise BadRow(f"--data {spec}: needs a weight above 0, and a finite one")
    rows = Rows(path, skip_bad_rows)
    if len(rows) * weight > MOST_ROWS:
        raise BadRow(
            f"--data {spec}: an epoch of {len(rows) * weight:.3g} rows; {MOST_ROWS:,} are the most"
        )
    check_first(path, rows)
    return os.path.basename(path), rows, weight


def check_first(name, rows):
    """BadRow if one of the first 20 rows is bad, or, with --skip_bad_rows, if none is good."""
    if not list(islice(rows, 20)):
        raise BadRow(f"--data {name}: no usable row")


def scenes_source(path):
    """The questions of both paths about every scene of a scenes.jsonl."""
    try:
        scenes = load_scenes(path)
    except ValueError as error:
        raise BadRow(str(error)) from None
    rows = [row for scene in scenes for row in ask_questions(scene, 0)]
    if not rows:
        raise BadRow(f"--scenes {path}: no scene has an annotated object to ask about")
    return os.path.basename(path), rows, 1.0


# ----------------------------------------------------------------------------------------------
# the blend: this block needs numpy and lru_cache, and nothing else of this file


class Blend:
    """Sources [(name, rows, weight)], evenly interleaved: every stretch has the global proportions.

    Weight w repeats a source w times per epoch (w < 1: takes that share of it). A position, counted
    over all epochs and ranks, fixes the row: to resume, go on at the position; to shard, give each
    rank its own positions (sft.py and grpo.py: a block of neighbours per step).
    """

    def __init__(self, sources, seed):
        self.sources = sources
        self.seed = seed
        self.counts = [max(1, round(len(rows) * weight)) for _, rows, weight in sources]
        # Row n of a source with c rows per epoch stands at (n + 1/2) / c of the epoch.
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        order = np.argsort(place, kind="stable")
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        nth = np.concatenate([np.arange(count) for count in self.counts])
        self.source_of = source[order]  # of each position of an epoch: its source,
        self.nth_of = nth[order]  # and which row of that source it is

    def __len__(self):
        return len(self.source_of)

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self))
        source = int(self.source_of[place])
        rows = self.sources[source][1]
        nth = epoch * self.counts[source] + int(self.nth_of[place])
        # A new shuffle each time that the source is used up.
        times_used, index = divmod(nth, len(rows))
        shuffled = shuffle(len(rows), self.seed + 1000 * times_used + source)
        return rows[int(shuffled[index])]


@lru_cache(maxsize=64)
def shuffle(length, seed):
    return np.random.default_rng(seed).permutation(length)


# ----------------------------------------------------------------------------------------------

if __name__ == "__main__":
    sys.exit("error: data.py is no program; to check instance files: python -m tools.check FILE...")
