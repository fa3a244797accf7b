"""The embedded default models: a small new Qwen3-VL, its tokenizer and image processor, made on the
spot.

Nothing is downloaded: the weights are random, the tokenizer is trained on the embedded world's
texts.
"""

import json
import os

import torch
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen3VLConfig

from formats.errors import UserError
from model import IMAGE_END, IMAGE_PAD, IMAGE_START, REGION_TOKEN, SPECIAL_TOKENS, RegionVLM
from world.questions import ask_questions, grounding
from world.sources import cached_scene

# image: side of the pictures, pixels; patch: side of a vision patch; merge: patches per side of an
# image token; vision and text: (width, layers, MLP width, heads). And what goes with a size unless
# a flag says otherwise: rows and learning rate of an SFT step, prompts of a GRPO step.
CONTEXT = 4096  # tokens that a new model is made for
SIZES = {
    "tiny": {
        "image": 96,
        "patch": 8,
        "merge": 3,
        "vision": (64, 3, 160, 2),
        "text": (128, 3, 352, 4),
        "batch": 64,
        "sft_lr": 2e-3,
        "prompts": 48,
    },
    "small": {
        "image": 128,
        "patch": 8,
        "merge": 2,
        "vision": (256, 6, 768, 4),
        "text": (384, 8, 1024, 6),
        "batch": 128,
        "sft_lr": 6e-4,
        "prompts": 128,
    },
    "base": {
        "image": 224,
        "patch": 14,
        "merge": 2,
        "vision": (512, 8, 1536, 8),
        "text": (768, 12, 2048, 12),
        "batch": 256,
        "sft_lr": 3e-4,
        "prompts": 256,
    },
}
# Pieces of the responses that are one token each, so that a laptop spends no time on boilerplate.
RESPONSE_PIECES = [
    "<detect>Find ",
    " relevant objects:\n",
    '<3d_box center="',
    '">',
    "</3d_box>",
    "</3d_box>\n",
    "</detect>\n",
    "<think>",
    "</think>\n<answer>",
    "</answer>",
    *(f".{digit}" for digit in range(10)),
]


def size_plan(size):
    """The entry of SIZES; UserError where there is none."""
    if size not in SIZES:
        raise UserError(f"--size {size}: needs one of {', '.join(SIZES)}")
    return SIZES[size]


def check_size(settings):
    """UserError where the model in --model is not of the size that --size asks for."""
    try:
        with open(os.path.join(settings.model, "config.json")) as file:
            width = json.load(file)["text_config"]["hidden_size"]
    except OSError:  # a name on the hub, or a folder without a model, which load_model tells
        width = None
    except (ValueError, KeyError, TypeError):  # load_model tells it, too
        return
    if width is None and os.path.isdir(settings.model):
        return
    if width != size_plan(settings.size)["text"][0]:
        raise UserError(
            f"--size {settings.size}: is of a new model, and {settings.model} is of another size; "
            f"leave one out, or make a model by sft.py --size {settings.size} --out DIR"
        )


def fill_by_size(settings, **names):
    """Fill settings that are 0 with what goes with --size: fill_by_size(settings, lr="sft_lr")."""
    for field, name in names.items():
        if not getattr(settings, field):
            setattr(settings, field, size_plan(settings.size)[name])


def train_tokenizer(texts, prompts=(), vocab_size=1024):
    """A small byte-level BPE trained on texts; prompts: templates that are one token each."""
    texts = [*texts, *["user assistant\n"] * 100]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.add_tokens([*(prompt.format(Q="") for prompt in prompts), *RESPONSE_PIECES])
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def tiny_image_processor(side, patch, merge_size):
    """For pictures of up to side x side pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge_size,
        temporal_patch_size=1,
        size={"shortest_edge": (patch * merge_size) ** 2, "longest_edge": side * side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def world_texts(scenes=150):
    """Questions and targets about some scenes, for the tokenizer."""
    rows = []
    for seed in range(scenes):
        scene = cached_scene(seed, 96)
        rows += ask_questions(scene, seed) + grounding(scene, seed)
    return [turn["value"] for row in rows for turn in row["conversations"]]


def new_config(plan, tokenizer):
    """The configuration of a small Qwen3-VL."""
    ids = tokenizer.convert_tokens_to_ids
    vision_width, vision_layers, vision_mlp, vision_heads = plan["vision"]
    width, layers, mlp, heads = plan["text"]
    head_dim = width // heads
    rotary = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_interleaved": True,
        "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
    }
    return Qwen3VLConfig(
        vision_config={
            "hidden_size": vision_width,
            "depth": vision_layers,
            "intermediate_size": vision_mlp,
            "num_heads": vision_heads,
            "patch_size": plan["patch"],
            "spatial_merge_size": plan["merge"],
            "temporal_patch_size": 1,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [],
            "num_position_embeddings": (plan["image"] // plan["patch"]) ** 2,
            "initializer_range": 0.8 * vision_width**-0.5,  # the stock 0.02 suits wide models
        },
        text_config={
            "hidden_size": width,
            "num_hidden_layers": layers,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": head_dim,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": rotary,
            "initializer_range": 0.8 * width**-0.5,
        },
        tie_word_embeddings=True,
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids(IMAGE_START),
        vision_end_token_id=ids(IMAGE_END),
        region_token_id=ids(REGION_TOKEN),
    )


def new_model(size, seed, prompts):
    """The embedded default, untrained -> model, tokenizer, processor; prompts: data.PROMPTS."""
    plan = size_plan(size)
    tokenizer = train_tokenizer(world_texts(), prompts)
    tokenizer.model_max_length = CONTEXT
    config = new_config(plan, tokenizer)
    torch.manual_seed(seed)
    model = RegionVLM(config)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
    # There is no stock model to protect: the 3D position embedding need not start at 0.
    torch.nn.init.normal_(model.point_embed.fc2.weight, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = tiny_image_processor(plan["image"], plan["patch"], plan["merge"])
    return model, tokenizer, processor


def image_side(processor):
    """Side, in pixels, of the pictures that the embedded world draws for a model."""
    return min(224, round(processor.size["longest_edge"] ** 0.5))
