"""The memory of a run, per rank: printed and checked against the device before the first step.

sft.py and grpo.py call `check`. As a program it prints a table of three published sizes, three ways
to train them and four machines:

    python -m engine.plan

Weights, gradients, Adam's moments and caches are counted exactly. Activations and logits are an
estimate, which may be a third off.
"""

import copy
import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import Qwen3VLConfig

from engine import distributed
from engine.lora import add_adapters
from engine.settings import parse, run_main
from formats.errors import UserError
from model import RegionVLM

USABLE = 0.95  # share of a device's memory that a plan may fill

# ----------------------------------------------------------------------------------------------
# the check before the first step


def check(model, settings, device, prompt=0):
    """Print the plan of a run on this device; model, settings and prompt as `memory` takes them.

    UserError if what a rank always holds is more than its device has; a warning if the peak is.
    """
    world = distributed.world_size()
    needed = memory(model, settings, world, device.type == "cuda", prompt)
    limit = available(device)
    gb = f"{peak(needed) / 1e9:.3g} of {limit / 1e9:.3g}"
    distributed.say(f"memory plan, GB a rank: {in_words(needed)}; peak {gb}")
    if sum(needed["always"].values()) > limit:
        raise UserError(
            f"{peak(needed) / 1e9:.0f} GB a rank do not fit into {limit / 1e9:.0f}: "
            f"{advice(needed, settings, limit, world)}"
        )
    if peak(needed) > USABLE * limit:
        tips = advice(needed, settings, limit, world)
        distributed.say(f"this will probably not fit; try {tips}")


def available(device):
    """Bytes that this rank may use."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info()
        return total
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    kilobytes = int(lines["MemAvailable"].split()[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return kilobytes * 1024 / ranks_here


def in_words(needed):
    """What `memory` returns as text, in GB; what is 0 is left out."""
    phases = []
    for phase, part in needed.items():
        amounts = [f"{name} {value / 1e9:.3g}" for name, value in part.items() if value]
        if part:
            phases.append(f"{phase}: {', '.join(amounts)}")
    return "; ".join(phases)


def advice(needed, settings, limit, world):
    """What to change so that a run fits into `limit` bytes per rank, as text.

    In this order: what shrinks that which is always held, the update, the rollout.
    """
    grpo = is_grpo(settings)
    always = sum(needed["always"].values())
    update = sum(needed["update"].values())
    rollout = sum(needed["rollout"].values())
    tips = []
    if always > 0.7 * limit:  # the rest would be too little for an update
        if grpo and not settings.lora:
            tips.append("--lora 16")
        if needed["always"]["reference"] > 0:
            tips.append("--kl 0")
        tips.append(f"more processes than {world}")
    if always + update > USABLE * limit:
        if not settings.checkpointing:
            tips.append("--checkpointing")
        tips.append(f"--micro_tokens {settings.micro_tokens // 2}")
        if grpo:
            tips.append("a smaller --max_new_tokens or --group_size")
    if grpo and always + rollout > USABLE * limit:  # an SFT has no rollout
        tips.append(f"--rollout_prompts {max(1, prompts_at_once(settings, world) // 2)}")
    return ", ".join(tips)


# ----------------------------------------------------------------------------------------------
# the count


def memory(model, settings, world, cuda, prompt=0):
    """Bytes on each rank, by when and for what: {"always": {..}, "rollout": {..}, "update": {..}}.

    model: not yet sharded, what is not trained already frozen; settings: of sft.py or grpo.py;
    world: number of ranks; prompt: tokens of a prompt of GRPO.
    """
    compute = 2 if cuda else 4  # bytes of a number in a forward pass: bf16 or float32
    rollout = {}
    if is_grpo(settings):
        rollout = rollout_memory(model, settings, world, compute, prompt)
    return {
        "always": constant_memory(model, settings, world, compute),
        "rollout": rollout,
        "update": update_memory(model, settings, compute, prompt),
    }


def peak(needed):
    """Bytes of what is always held and the larger of rollout and update."""
    always = sum(needed["always"].values())
    rollout = sum(needed["rollout"].values())
    update = sum(needed["update"].values())
    return always + max(rollout, update)


def is_grpo(settings):
    return hasattr(settings, "group_size")


def constant_memory(model, settings, world, compute):
    """Bytes that a rank holds all the time."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Small models also keep whole gradients on each rank: see distributed.sync_gradients.
    whole_gradients = not distributed.is_large(model)
    reference = 0
    if is_grpo(settings) and settings.kl and not settings.lora:
        reference = compute * total / world
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters) / world,
        "gradients": 4 * trained * (1 / world + whole_gradients),
        "optimizer": 8 * trained / world,
        "reference": reference,
    }


def rollout_memory(model, settings, world, compute, prompt):
    """Bytes that a rank holds while it samples the responses to its prompts."""
    text = model.config.text_config
    prompts = prompts_at_once(settings, world)
    tokens = prompt + response_tokens(settings)  # the cache holds a prompt once for its whole group
    keys_and_values = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    logits = prompts * settings.group_size * text.vocab_size
    return {
        "whole weights": compute * sum(p.numel() for p in model.parameters()),
        "KV cache": keys_and_values * compute * prompts * tokens,
        "logits": 12 * logits,  # three float32 numbers each
    }


def prompts_at_once(settings, world):
    """Prompts that a rank rolls out at once."""
    return settings.rollout_prompts or settings.prompts // world


def response_tokens(settings):
    """Most tokens of all responses to one prompt."""
    return settings.group_size * settings.max_new_tokens


def update_memory(model, settings, compute, prompt):
    """Bytes that a rank holds at the height of one training pass."""
    text = model.config.text_config
    if is_grpo(settings):
        responses = response_tokens(settings)
        tokens = max(settings.micro_tokens, prompt + responses)  # a group is never cut
        scored = tokens * responses / (prompt + responses)
    else:
        tokens = settings.micro_tokens
        scored = tokens / 2  # about half the tokens are targets
    per_token = text_activations(text, settings, compute)
    if not is_grpo(settings) or settings.train_vision:
        per_token += vision_activations(model.config.vision_config, settings, compute)
    return {
        "layers in use": compute * gathered_parameters(model),
        "activations": tokens * per_token,
        "logits": scored * text.vocab_size * (16 + 2 * compute),
    }


def gathered_parameters(model):
    """Parameters that a rank holds whole at the same time.

    Large layers are gathered one by one, the next while one is at work (distributed.shard); the
    layers of a small model all at once.
    """
    total = sum(p.numel() for p in model.parameters())
    layers = model.model.language_model.layers
    layer = sum(p.numel() for p in layers[0].parameters())
    if layer <= distributed.LARGE_LAYER:
        return total
    rest = total - layer * len(layers)  # the root's unit and the vision side
    return rest + 2 * layer


def text_activations(text, settings, compute):
    """Bytes that one token leaves in the language model for the backward pass."""
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    norm = 8 + compute  # of one number: a norm computes in float32
    inner = 2 * text.hidden_size * (norm + compute)
    inner += (queries + keys) * (norm + 2 * compute)
    inner += 4 * text.intermediate_size * compute  # inside one layer
    if not settings.checkpointing:
        return text.num_hidden_layers * inner
    between = text.hidden_size * compute  # from one layer to the next
    return text.num_hidden_layers * between + inner  # one layer at a time is computed again


def vision_activations(vision, settings, compute):
    """Bytes that one token leaves in the vision side; about half the tokens are of pictures."""
    if settings.checkpointing:
        patch = compute * vision.hidden_size
    else:
        patch = compute * (14 * vision.hidden_size + 2 * vision.intermediate_size)
    patches = vision.spatial_merge_size**2  # per token of a picture
    return vision.depth * patch * patches / 2


# ----------------------------------------------------------------------------------------------
# the table

DEVICES = {"1 x 24 GB": (1, 24), "1 x 80 GB": (1, 80), "1 x 141 GB": (1, 141), "8 x 80 GB": (8, 80)}
# Text: width, layers, heads, key-value heads, MLP, tied embeddings; vision: width, layers, MLP, and
# the layers whose features also go to the language model ("deepstack").
STOCK = {
    "Qwen3-VL-2B": (2048, 28, 16, 8, 6144, True, 1024, 24, 4096, [5, 11, 17]),
    "Qwen3-VL-4B": (2560, 36, 32, 8, 9728, True, 1024, 24, 4096, [5, 11, 17]),
    "Qwen3-VL-8B": (4096, 36, 32, 8, 12288, False, 1152, 27, 4304, [8, 16, 24]),
}
SFT = {"checkpointing": True, "micro_tokens": 4096}
GRPO = {
    **SFT,
    "train_vision": False,
    "group_size": 8,
    "max_new_tokens": 512,
    "kl": 0.01,
    "rollout_prompts": 16,
    "lora": 0,
}
WAYS = {"SFT": SFT, "GRPO": GRPO, "GRPO --lora 16": {**GRPO, "lora": 16}}
PROMPT = 700  # tokens of a prompt


def stock_model(width, layers, heads, kv_heads, mlp, tied, vision, depth, vision_mlp, deepstack):
    """A Qwen3-VL of some size (see STOCK) on the meta device: shapes without memory."""
    vision_config = {
        "hidden_size": vision,
        "depth": depth,
        "intermediate_size": vision_mlp,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "out_hidden_size": width,
        "deepstack_visual_indexes": deepstack,
    }
    text_config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": mlp,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }
    config = Qwen3VLConfig(
        vision_config=vision_config, text_config=text_config, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        return RegionVLM(config)


def row_of_table(stock, way):
    """GB per rank of a model and a way to train it, one cell per machine, bold where it fits."""
    model = copy.deepcopy(stock)
    settings = SimpleNamespace(**WAYS[way])
    if way == "GRPO":
        model.model.visual.requires_grad_(False)
    if way == "GRPO --lora 16":
        model = distributed.freeze(model, torch.device("cuda"))
        add_adapters(model, settings.lora, seed=0)
    cells = []
    for world, size in DEVICES.values():
        gb = peak(memory(model, settings, world, cuda=True, prompt=PROMPT)) / 1e9
        fits = gb < USABLE * size
        cells.append(f"**{gb:.0f}**" if fits else f"{gb:.0f}")
    return cells


@dataclass
class Settings:
    """The command line of this program has no flags but --help."""


def main():
    parse(Settings, __doc__)
    print(
        "GB a rank, bold where it fits: --checkpointing --micro_tokens 4096; "
        "GRPO with --group_size 8\n--max_new_tokens 512 --rollout_prompts 16, "
        "prompts of 700 tokens\n"
    )
    print(f"| model | parameters | | {' | '.join(DEVICES)} |")
    print(f"|---|---|---|{'---|' * len(DEVICES)}")
    for name, sizes in STOCK.items():
        stock = stock_model(*sizes)
        billions = sum(p.numel() for p in stock.parameters()) / 1e9
        for way in WAYS:
            cells = row_of_table(stock, way)
            print(f"| {name} | {billions:.1f} B | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_main(main)
