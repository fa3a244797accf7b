"""The region-token model: stock Qwen3-VL with a 3D position embedding and region tokens.

    depth -> point map -> sin/cos of xyz, averaged over each patch -> MLP -> + vision features
    region mask -> mask-weighted mean of those features -> Linear -> embedding of a `<mask>` token

The first line is the 3D position embedding, the second the region token. Below the model stand the
two functions that reinforcement learning needs, written plainly: `rollout` samples responses,
`token_logprobs` scores them. engine/shared_prefix.py has both again, several times as fast.

    from model import RegionVLM           # this file needs torch and transformers, no other file
    model, tokenizer, processor = RegionVLM.load("Qwen/Qwen3-VL-4B-Instruct")

Differences from the authors' release (the method is SR-REAL, arXiv 2606.17539):
1. Depth is unprojected with the camera's intrinsics, in metres; without depth there is no
   embedding.
   (There: relative depth and no intrinsics.)
2. Region masks are area-averaged onto the patch grid, so that a thin mask keeps its weight.
   (There it can vanish.)

Dimensions: B prompts, G responses per prompt, N = B G, L prompt tokens, T response tokens, V
vocabulary, R regions, P patches, D width.
"""

import math
import os

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

UNIT = 4.0  # metres; brings the coordinates of a room to the paper's range, about -1 to 1
BANDS = 8  # sin and cos of 2^k x for k = 0..7: wavelengths of 25 m to 0.2 m
POINT_DIM = 3 * (1 + 2 * BANDS)  # the coordinate itself, its sines and cosines, for x, y and z

IMAGE_START = "<|vision_start|>"
IMAGE_PAD = "<|image_pad|>"
IMAGE_END = "<|vision_end|>"
REGION_TOKEN = "<mask>"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    IMAGE_START,
    IMAGE_END,
    IMAGE_PAD,
    "<|video_pad|>",
    REGION_TOKEN,
]

# ----------------------------------------------------------------------------------------------
# geometry: pure functions


def point_map(depth, intrinsics):
    """Unproject a depth map: the camera coordinates of every pixel, x right, y down, z forward.

    depth (H, W) metres, NaN where nothing was measured; intrinsics (fx, fy, cx, cy) pixels
    -> (3, H, W) metres.
    """
    fx, fy, cx, cy = intrinsics
    height, width = depth.shape
    u = torch.arange(width, dtype=torch.float32) + 0.5  # (W,) pixel centres
    v = torch.arange(height, dtype=torch.float32) + 0.5  # (H,)
    x = (u - cx) / fx * depth
    y = (v[:, None] - cy) / fy * depth
    return torch.stack([x, y, depth])


def encode_points(xyz):
    """[x, sin(2^k x), cos(2^k x)] of each coordinate, with x in UNITs. NaN stays NaN.

    (3, H, W) metres -> (POINT_DIM, H, W).
    """
    xyz = xyz / UNIT
    frequencies = 2.0 ** torch.arange(BANDS).view(1, -1, 1, 1)
    angles = xyz[:, None] * frequencies  # (3, BANDS, H, W)
    return torch.cat([xyz[:, None], angles.sin(), angles.cos()], 1).flatten(0, 1)


def to_patches(maps, grid, merge_size):
    """Area-average pixel maps onto the vision patches, in the order of Qwen3-VL.

    That order goes through blocks of merge_size x merge_size patches, which become one image token.
    maps (C, H, W), NaN in all channels where there is no value, which is left out of the mean (the
    first channel decides); grid (rows, columns) of patches -> (P, C), NaN where a patch holds no
    value at all.
    Encode points first and average then: averaging xyz first triples the error of the centres.
    """
    known = maps[:1].isfinite().float()
    total = nn.functional.adaptive_avg_pool2d(maps.nan_to_num(), grid)
    mean = total / nn.functional.adaptive_avg_pool2d(known, grid)  # 0 / 0 = NaN
    rows, columns = grid
    blocks = mean.view(-1, rows // merge_size, merge_size, columns // merge_size, merge_size)
    return blocks.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


def region_weights(masks, grid, merge_size):
    """Weights of a mean over the patches: masks (R, H, W), 1 = inside -> (R, P), rows sum to 1."""
    weights = to_patches(masks, grid, merge_size).T
    return weights / weights.sum(1, keepdim=True)


def mrope_positions(is_image, grids, merge_size):
    """M-RoPE positions of a row of tokens: time, height and width, as Qwen3-VL numbers them.

    A text token has three equal numbers, one more than the largest before it. The tokens of an
    image lie on its grid: all at the same time, height and width counted from where it begins.
    is_image (L,), 1 = image token; grids: (rows, columns) of patches of each image -> (3, L).
    (arXiv 2502.13923; equal to get_rope_index of transformers, which takes its numbers from the
    GPU one by one.)
    """
    positions = torch.zeros(3, len(is_image), dtype=torch.long)
    start = 0  # the next token
    number = 0  # the next position
    for rows, columns in grids:
        rows, columns = rows // merge_size, columns // merge_size
        before = int(is_image[start:].long().argmax())  # text tokens in front of the image
        positions[:, start : start + before] = torch.arange(number, number + before)
        start += before
        number += before
        end = start + rows * columns
        if not is_image[start:end].all():
            raise ValueError(f"{rows * columns} image tokens are not where the text has them")
        positions[0, start:end] = number
        positions[1, start:end] = number + torch.arange(rows).repeat_interleave(columns)
        positions[2, start:end] = number + torch.arange(columns).repeat(rows)
        start = end
        number += max(rows, columns)
    positions[:, start:] = number + torch.arange(len(is_image) - start)
    return positions


# ----------------------------------------------------------------------------------------------
# the patch of the stock model


class PointEmbedding(nn.Module):
    """3D position embedding: patch-averaged points (P, POINT_DIM) -> (P, D), 0 without depth."""

    def __init__(self, width):
        super().__init__()
        hidden = 3 * width
        self.fc1 = nn.Linear(POINT_DIM, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.fc2.zero_init = True  # training starts from the stock model's features

    def forward(self, points):
        has_depth = points.isfinite().all(-1, keepdim=True)  # (P, 1)
        hidden = self.fc1(points.nan_to_num().to(self.fc1.weight.dtype))
        return self.fc2(nn.functional.gelu(self.norm(hidden))) * has_depth


class RegionVLM(Qwen3VLForConditionalGeneration):
    """Stock Qwen3-VL with two more inputs, `points` and `regions`; without them bit-identical to
    it.

    points (P, POINT_DIM): encoded 3D points of the patches of all images, NaN without depth.
    regions (R, P): weights over the patches of all images, a row per `<mask>` in text order.
    """

    def __init__(self, config):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.point_embed = PointEmbedding(width)
        self.region_proj = nn.Linear(width, config.text_config.hidden_size)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        # The mark is on the Linear itself: transformers does not call this for custom containers.
        if getattr(module, "zero_init", False):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @classmethod
    def load(cls, name, shapes_only=False):
        """A Qwen3-VL, stock or with regions, by hub name or folder -> model, tokenizer, processor.

        The model is in float32; shapes_only: on the meta device, no weights are read. ValueError
        where its parts do not fit together; other errors of transformers where it can't be read.
        No code of a folder is ever run, and no pickle is read.
        """
        config, tokenizer, processor = load_processing(name)
        if shapes_only:
            with torch.device("meta"):
                model = cls(config)
            try:
                model.generation_config = GenerationConfig.from_pretrained(name)
            except OSError:  # it has none
                pass
        else:
            model, report = cls.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are named below
                trust_remote_code=False,
                output_loading_info=True,
            )
            check_weights(model, report)
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:  # most embeddings have spare rows: this one has none for <mask>
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return model, tokenizer, processor

    def encode_images(self, pixel_values, image_grid_thw, points=None, regions=None):
        """Vision tower, once per image -> features: all that the language model takes from images.

        pixel_values: the patches of all images; image_grid_thw (images, 3). On any device: they are
        moved to the model's.
        -> {"merged": a list of (tokens, D) per image, "deepstack": such a list per level,
            "regions": (R, D) or None}
        """
        tower = self.model.visual
        sizes = (image_grid_thw.prod(-1) // tower.spatial_merge_unit).tolist()
        grid = image_grid_thw.to(tower.device)
        pixels = pixel_values.to(tower.device, tower.dtype)
        vision = tower(pixels, grid_thw=grid, return_dict=True)
        patches = vision.last_hidden_state  # (P, vision width)
        merged = vision.pooler_output  # (image tokens, D)
        if points is not None:
            patches = patches + self.point_embed(points.to(patches.device))
            merged = tower.merger(patches)
        region_tokens = None
        if regions is not None:
            weights = regions.to(patches)
            region_tokens = self.region_proj(weights @ patches)  # (R, D)
        return {
            "merged": list(merged.split(sizes)),
            "regions": region_tokens,
            "deepstack": [list(level.split(sizes)) for level in vision.deepstack_features],
        }

    def positions(self, input_ids, attention_mask, mm_token_type_ids, image_grid_thw):
        """M-RoPE positions (3, B, L) of prompts, and the position of the token after each (B,
        1)."""
        positions, delta = self.model.get_rope_index(
            input_ids, mm_token_type_ids, image_grid_thw, attention_mask=attention_mask
        )
        return positions, attention_mask.sum(1, keepdim=True) + delta

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        pixel_values=None,
        image_grid_thw=None,
        mm_token_type_ids=None,
        points=None,
        regions=None,
        features=None,
        text_only=False,
        logits_to_keep=0,
        head=None,
        **kwargs,
    ):
        """The stock forward, or, with one of the arguments that are not stock, `patched_forward`.

        points, regions: see the class; they need pixel_values and image_grid_thw. features: what
        `encode_images` made of the images, instead of pixel_values, points and regions.
        text_only: no images; those of the prompt are in past_key_values. head: see
        `patched_forward`.
        """
        if features is None and not text_only:
            if points is None and regions is None and head is None:
                return super().forward(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    pixel_values=pixel_values,
                    image_grid_thw=image_grid_thw,
                    mm_token_type_ids=mm_token_type_ids,
                    logits_to_keep=logits_to_keep,
                    **kwargs,
                )
            # Not self.encode_images: under FSDP that is an entry of its own, which would gather and
            # free the weights of the forward that we are in.
            features = RegionVLM.encode_images(self, pixel_values, image_grid_thw, points, regions)
        if position_ids is None:
            position_ids, _ = self.positions(
                input_ids, attention_mask, mm_token_type_ids, image_grid_thw
            )
        return self.patched_forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            features,
            logits_to_keep,
            head,
            **kwargs,
        )

    def patched_forward(
        self,
        input_ids,
        attention_mask,
        position_ids,
        past_key_values,
        features,
        logits_to_keep,
        head=None,
        **kwargs,
    ):
        """The language model on tokens (B, L), with features (a dict or None) at their
        placeholders.

        logits_to_keep: the last so many positions, 0 = all -> logits (B, positions, V); or a mask
        (B, L), 1 = wanted -> logits (wanted, V). head(lm_head, hidden): makes something else of the
        hidden states than logits, and returns it in their place. kwargs: for the attention
        function.
        """
        embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        images = {}
        if features is not None:
            is_image = input_ids == self.config.image_token_id  # (B, L), 1 = image token
            embeds = fill(embeds, is_image, torch.cat(features["merged"]), "image tokens")
            images["visual_pos_masks"] = is_image
            images["deepstack_visual_embeds"] = [
                torch.cat(level) for level in features["deepstack"]
            ]
            if features["regions"] is not None:
                is_region = input_ids == self.config.region_token_id  # (B, L), 1 = region token
                embeds = fill(embeds, is_region, features["regions"], "<mask> tokens")
        out = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **images,
            **kwargs,
        )
        hidden = out.last_hidden_state  # (B, L, D)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:]
        else:
            hidden = hidden[logits_to_keep]  # (wanted, D)
        logits = head(self.lm_head, hidden) if head else self.lm_head(hidden)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


def read_config(name):
    """The configuration of a Qwen3-VL; ValueError if it is another model, or can't be trained."""
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError("no config.json there; give a folder of sft.py or grpo.py, or a Qwen3-VL")
    fields, _ = Qwen3VLConfig.get_config_dict(name)
    kind = fields.get("model_type")
    if kind != "qwen3_vl":
        raise ValueError(f"a {kind} model; only Qwen3-VL is supported")
    if fields.get("quantization_config"):
        raise ValueError("its weights are quantized (quantization_config); give the original ones")
    config = Qwen3VLConfig.from_dict(fields)
    for part, names in (
        (
            config.text_config,
            (
                *("vocab_size", "hidden_size", "num_hidden_layers", "head_dim"),
                "max_position_embeddings",
            ),
        ),
        (config.vision_config, ("depth", "hidden_size", "patch_size", "spatial_merge_size")),
    ):
        for field in names:
            value = getattr(part, field, None)
            if type(value) is not int or value < 1:
                raise ValueError(f"config.json: {field} is {value}; needs a whole number above 0")
    config.text_config.attention_dropout = 0.0  # scoring in train mode must not drop anything
    return config


def load_processing(name):
    """All of a model but its weights -> config, tokenizer, processor; errors: see RegionVLM.load."""
    config = read_config(name)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    if not hasattr(config, "region_token_id"):  # a stock checkpoint
        tokenizer.add_tokens([REGION_TOKEN], special_tokens=True)
        config.region_token_id = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
    check_tokenizer(tokenizer, config)
    check_processor(processor, config)
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    return config, tokenizer, processor


def check_tokenizer(tokenizer, config):
    """ValueError if it is not the whole tokenizer of this model."""
    probe = "The red chair (2.5 m) is left of it: yes?\n"
    if tokenizer.decode(tokenizer(probe)["input_ids"]) != probe:
        raise ValueError("its tokenizer loses text; is tokenizer.json missing or cut off?")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    for token, number in ids.items():
        if number is None or tokenizer(token)["input_ids"] != [number]:
            raise ValueError(f"its tokenizer has no token {token}; is it of another model?")
    for token, field in (
        (IMAGE_PAD, "image_token_id"),
        (IMAGE_START, "vision_start_token_id"),
        (REGION_TOKEN, "region_token_id"),
    ):
        if ids[token] != getattr(config, field):
            raise ValueError(
                f"its tokenizer has {token} as {ids[token]}, "
                f"config.json says {field} {getattr(config, field)}"
            )
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no pad_token or no eos_token")


def check_processor(processor, config):
    """ValueError if it cuts pictures in other patches than the vision tower takes."""
    for field, of_tower in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        has = getattr(processor, field)
        needs = getattr(config.vision_config, of_tower)
        if has != needs:
            raise ValueError(
                f"preprocessor_config.json: {field} is {has}, the vision tower has {needs}"
            )


def check_weights(model, report):
    """ValueError if weights are missing, of another shape, or not finite; report: of loading."""
    new_parts = ("point_embed", "region_proj")
    missing = [key for key in report["missing_keys"] if not key.startswith(new_parts)]
    if missing == ["lm_head.weight"]:
        raise ValueError("it has no lm_head.weight; config.json should say tie_word_embeddings")
    if missing:
        raise ValueError(f"the weights lack {len(missing)} tensors, first {missing[0]}")
    for name, has, needs in report["mismatched_keys"]:
        raise ValueError(f"{name} has the shape {tuple(has)}, config.json wants {tuple(needs)}")
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"{name} is not finite")


def fill(embeds, here, features, what):
    """Put features (K, D) where `here` (B, L) is 1, in order. ValueError unless it is 1 K times.

    masked_scatter alone says nothing when there are too many features.
    """
    places = int(here.sum())
    if places != len(features):
        raise ValueError(f"{places} {what} in the text but {len(features)} features for them")
    return embeds.masked_scatter(here[..., None], features.to(embeds.dtype))


def split_features(features, input_ids, config):
    """Features of a batch of prompts (B, L) -> a list of B, the features of each prompt."""
    images_per_prompt = (input_ids == config.vision_start_token_id).sum(1).tolist()
    regions_per_prompt = (input_ids == config.region_token_id).sum(1).tolist()
    prompts = []
    first_image = 0
    first_region = 0
    for images, regions in zip(images_per_prompt, regions_per_prompt):
        of_images = slice(first_image, first_image + images)
        of_regions = slice(first_region, first_region + regions)
        tokens = features["regions"]
        prompts.append(
            {
                "merged": features["merged"][of_images],
                "regions": None if tokens is None else tokens[of_regions],
                "deepstack": [level[of_images] for level in features["deepstack"]],
            }
        )
        first_image += images
        first_region += regions
    return prompts


def join_features(prompts):
    """The way back: the features of several prompts as those of one batch."""
    joined = {"merged": [], "regions": None, "deepstack": []}
    for features in prompts:
        joined["merged"] += features["merged"]
    if prompts[0]["regions"] is not None:
        joined["regions"] = torch.cat([features["regions"] for features in prompts])
    for levels in zip(*(features["deepstack"] for features in prompts)):
        joined["deepstack"].append([image for level in levels for image in level])
    return joined


def use_attention(model, name):
    """Choose the attention kernels: "sdpa" (torch's), "flash" (flash-attn) or "auto" (flash if it
    can be used).

    ValueError where flash is asked for and cannot be used.
    -> the name that transformers uses for what was chosen; and a line that says why it is not
       flash-attn where that is installed and "auto", else ""
    """
    if name not in ("auto", "sdpa", "flash"):
        raise ValueError("needs auto, sdpa or flash")
    problem = ""
    if name != "sdpa":
        try:
            take_flash(model)
            return "flash_attention_2", ""
        except (ImportError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"flash-attn is installed but cannot be used: {reason}"
            if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
                problem = "" if name == "auto" else "flash-attn is not installed"
    # After a refusal, too: a part of the model may have been set to flash-attn before it came.
    model.set_attn_implementation("sdpa")
    if name == "flash":
        raise ValueError(problem)
    return "sdpa", problem


def take_flash(model):
    """Let a model attend by flash-attn. ImportError or ValueError, with the reason, if it cannot.

    It needs CUDA of compute capability 8 or more. What else it needs, transformers knows: it
    refuses an old version, for one.
    """
    from flash_attn import flash_attn_func  # noqa: F401  flash-attn-4 lacks this function

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("it needs a GPU of compute capability 8 or more")
    model.set_attn_implementation("flash_attention_2")


# ----------------------------------------------------------------------------------------------
# the distribution over the next token: the same one is sampled and scored


def token_rules(model, tokenizer, device):
    """-> stop ids, and banned ids: those that are never sampled.

    Banned are special tokens, since a sampled image pad or `<mask>` would stand for an image or a
    region that is not there; and the spare rows of the embedding, which are no token at all: they
    would earn the reward of a text in which they do not show.
    """
    stop = model.generation_config.eos_token_id
    stop = set(stop) if isinstance(stop, list) else {stop}
    stop = (stop | {tokenizer.eos_token_id}) - {None}
    banned = set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    banned |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    banned |= set(range(model.config.text_config.vocab_size)) - set(tokenizer.get_vocab().values())
    banned -= stop
    stop_ids = torch.tensor(sorted(stop), device=device)
    banned_ids = torch.tensor(sorted(banned), device=device)
    return stop_ids, banned_ids


def allowed_logits(logits, banned, temperature):
    """float32 logits / temperature with the banned ids at -inf (float64 stays float64)."""
    logits = logits.to(float_of(logits)) / temperature
    return logits.index_fill_(-1, banned, -math.inf)


def float_of(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def choose_tokens(scores, temperature, generator):
    """One token per row: log-probabilities (rows, V) -> (rows,); temperature 0: the most likely."""
    if temperature == 0:
        return scores.argmax(-1)
    # The inverse of the cumulative distribution at a random point: on a CPU this takes a sixth of
    # the time of torch.multinomial. A few rows at a time, since it is in float64.
    points = torch.rand(
        len(scores), 1, dtype=torch.float64, device=scores.device, generator=generator
    )
    at_once = max(1, 2**22 // scores.shape[1])
    chosen = []
    for some, point in zip(scores.split(at_once), points.split(at_once)):
        mass = some.to(torch.float64, copy=True).exp_().cumsum_(-1)  # (rows, V)
        chosen.append(torch.searchsorted(mass, point * mass[:, -1:], right=True)[:, 0])
    # Beyond the last one: the scores are not finite, which `check_logprobs` tells.
    return torch.cat(chosen).clamp_max(scores.shape[1] - 1)


def check_logprobs(logprobs):
    """ValueError if those of sampled tokens are not finite."""
    if not logprobs.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are broken, or too large")


def enough_have_ended(alive):
    """Have more than a fifth of the rows ended, so that it is time to leave them out?

    alive (rows,), 1 = has not ended.

    Both rollouts go by this rule, so that they use up their random numbers alike and sample
    the same from the same seed. (The fast one also drops the rows from its batch.)
    """
    return int(alive.sum()) < 0.8 * len(alive)


def decode(tokenizer, tokens, mask, stop):
    """-> texts without the stop token, and whether each response ended by itself.

    tokens, mask (N, T) as `rollout` returns them; stop: a set of ids.
    """
    texts = []
    ended = []
    for row, sampled in zip(tokens.cpu(), mask.cpu()):
        ids = row[sampled.bool()].tolist()
        ends = bool(ids) and ids[-1] in stop
        texts.append(tokenizer.decode(ids[:-1] if ends else ids))
        ended.append(ends)
    return texts, ended


# ----------------------------------------------------------------------------------------------
# sampling and scoring, plainly: every response is a row of its own, with the whole prompt
# (engine/shared_prefix.py: the same functions, each prompt computed once for its G responses)


@torch.no_grad()
def rollout(
    model, prompts, group, max_new_tokens, stop_ids, banned, temperature=1.0, generator=None
):
    """Sample `group` responses per prompt, token by token; temperature 0 is greedy.

    prompts: a collated batch (data.py), left-padded; banned: token ids that are never sampled.
    -> tokens (N, T); mask (N, T), 1 = sampled, up to and including the stop token;
       logprobs (N, T) of the sampled tokens; the features of the images.
    The responses to a prompt are neighbours. A response without a stop token at its end was cut
    off.
    """
    model.eval()  # in train mode, layers that recompute their activations would drop the cache
    features = encode_prompts(model, prompts)
    ids, attention_mask, positions, next_position, repeated = repeat_prompts(
        model, prompts, features, group
    )
    tokens = ids.new_zeros(len(ids), max_new_tokens)
    mask = torch.zeros_like(tokens)
    logprobs = torch.zeros(tokens.shape, device=ids.device)
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)  # 1 = has not ended yet
    drawn = alive  # 1 = a token is drawn; rows that have ended are left out now and then
    cache = DynamicCache()
    logits = model(
        ids,
        attention_mask,
        positions,
        past_key_values=cache,
        features=repeated,
        logits_to_keep=1,
    ).logits
    for t in range(max_new_tokens):
        scores = allowed_logits(logits[:, -1], banned, temperature or 1.0).log_softmax(-1)  # (N, V)
        new = torch.zeros_like(ids[:, 0])  # (N,)
        new[drawn] = choose_tokens(scores[drawn], temperature, generator)
        chosen = scores.gather(1, new[:, None])[:, 0].float()
        tokens[:, t] = new * alive
        mask[:, t] = alive
        logprobs[:, t] = chosen.masked_fill(~alive, 0)
        alive = alive & ~torch.isin(new, stop_ids)
        if not alive.any() or t + 1 == max_new_tokens:
            break
        if enough_have_ended(alive[drawn]):
            drawn = alive
        # Rows that have ended are computed on; nothing looks at them.
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)[:, None]], 1)
        position = (next_position + t).expand(3, -1, -1)  # (3, N, 1)
        logits = model(
            new[:, None], attention_mask, position, past_key_values=cache, text_only=True
        ).logits
    length = int(mask.sum(1).max())
    check_logprobs(logprobs)
    return tokens[:, :length], mask[:, :length], logprobs[:, :length], features


def token_logprobs(model, prompts, features, tokens, mask, banned, temperature=1.0):
    """Log-probabilities of sampled tokens and entropies of their distributions, with gradient.

    One forward, in which each row is a whole prompt with one response. The distribution is that of
    `rollout`.
    features: of the prompts' images, or None: encode them, with gradient.
    tokens, mask (N, T) -> logprobs (N, T), entropy (N, T), both 0 where mask is 0.
    """
    group = len(tokens) // len(prompts["input_ids"])
    length = tokens.shape[1]
    if features is None:
        features = encode_prompts(model, prompts)
    ids, attention_mask, positions, next_position, repeated = repeat_prompts(
        model, prompts, features, group
    )
    steps = next_position + torch.arange(length, device=tokens.device)  # (N, T)
    logits = model(
        torch.cat([ids, tokens], 1),
        torch.cat([attention_mask, mask], 1),
        torch.cat([positions, steps.expand(3, -1, -1)], 2),
        features=repeated,
        logits_to_keep=length + 1,
    ).logits
    # The token before predicts each token, so that the last position predicts nothing.
    scores = allowed_logits(logits[:, :-1], banned, temperature).log_softmax(-1)  # (N, T, V)
    logprobs = scores.gather(2, tokens[..., None])[..., 0]
    with torch.no_grad():
        finite = scores.clamp_min(torch.finfo(scores.dtype).min)  # 0 x -inf would be NaN
        entropy = -(scores.exp() * finite).sum(-1)
    outside = mask == 0
    return logprobs.masked_fill(outside, 0), entropy.masked_fill(outside, 0)


def encode_prompts(model, prompts):
    """The features of the images of a batch of prompts."""
    return model.encode_images(
        prompts["pixel_values"], prompts["image_grid_thw"], prompts["points"], prompts["regions"]
    )


def repeat_prompts(model, prompts, features, group):
    """Each prompt `group` times, as neighbouring rows.

    -> input_ids (N, L), attention_mask (N, L), positions (3, N, L), the position after (N, 1),
       and the features of all rows.
    """
    positions, next_position = model.positions(
        prompts["input_ids"],
        prompts["attention_mask"],
        prompts["mm_token_type_ids"],
        prompts["image_grid_thw"],
    )
    split = split_features(features, prompts["input_ids"], model.config)
    return (
        prompts["input_ids"].repeat_interleave(group, 0),
        prompts["attention_mask"].repeat_interleave(group, 0),
        positions.repeat_interleave(group, 1),
        next_position.repeat_interleave(group, 0),
        join_features([one for one in split for _ in range(group)]),
    )
