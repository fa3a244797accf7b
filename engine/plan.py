"""The memory of a run, per rank: printed and checked against the device before the first step of sft.py and grpo.py.

    python plan.py                                      # a table: three sizes, three ways to train, four machines

Weights, gradients, Adam's moments and caches are counted exactly; activations and logits are an estimate (a third).
"""

import copy
import os
from types import SimpleNamespace

import torch
from transformers import Qwen3VLConfig

from engine import distributed
from engine.lora import add_adapters
from formats.errors import UserError
from model import RegionVLM

DEVICES = {"1 x 24 GB": (1, 24), "1 x 80 GB": (1, 80), "1 x 141 GB": (1, 141), "8 x 80 GB": (8, 80)}
STOCK = {  # text: width, layers, heads, key-value heads, MLP, tied embeddings; vision: width, layers, MLP, deepstack
    "Qwen3-VL-2B": (2048, 28, 16, 8, 6144, True, 1024, 24, 4096, [5, 11, 17]),
    "Qwen3-VL-4B": (2560, 36, 32, 8, 9728, True, 1024, 24, 4096, [5, 11, 17]),
    "Qwen3-VL-8B": (4096, 36, 32, 8, 12288, False, 1152, 27, 4304, [8, 16, 24]),
}


def memory(model, settings, world, cuda, prompt=0):
    """Bytes on each rank by what they hold, {"always": {..}, "rollout": {..}, "update": {..}}; the peak is the first
    and the larger of the others. model: not yet sharded, what is not trained frozen; prompt: tokens of a prompt."""
    text, vision, rl = (
        model.config.text_config,
        model.config.vision_config,
        hasattr(settings, "group_size"),
    )
    compute = 2 if cuda else 4  # bytes of a number in a forward pass
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    always = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / world,
        "gradients": 4
        * trained
        * (1 / world + (not distributed.is_large(model))),  # see run.sync_gradients
        "optimizer": 8 * trained / world,
        "reference": compute * total / world if rl and settings.kl and not settings.lora else 0,
    }

    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    rest = total - layer * text.num_hidden_layers  # the root's unit and the vision side
    tokens = settings.micro_tokens
    if rl:
        group = settings.group_size * settings.max_new_tokens
        tokens = max(tokens, prompt + group)  # a group is never cut
    heads, keys = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    norms = 8 + compute  # of one number: a norm computes in float32
    inner = (
        2 * text.hidden_size * (norms + compute)
        + (heads + keys) * (norms + 2 * compute)
        + (4 * compute * text.intermediate_size)
    )  # what one token leaves in one layer for the backward pass
    outer = compute * text.hidden_size
    kept = (
        text.num_hidden_layers * outer + inner
        if settings.checkpointing
        else text.num_hidden_layers * inner
    )
    if not rl or settings.train_vision:  # about half the tokens are pictures, merge^2 patches each
        patch = compute * (
            vision.hidden_size
            if settings.checkpointing
            else 14 * vision.hidden_size + 2 * vision.intermediate_size
        )
        kept += vision.depth * patch * vision.spatial_merge_size**2 / 2
    answers = tokens * group / (prompt + group) if rl else tokens / 2
    update = {
        "layers in use": compute * (rest + 2 * layer if layer > distributed.LARGE_LAYER else total),
        "activations": tokens * kept,
        "logits": answers * text.vocab_size * (16 + 2 * compute),
    }
    rollout = {}
    if rl:
        prompts = settings.rollout_prompts or settings.prompts // world
        cache = (
            2 * keys * compute * text.num_hidden_layers * prompts * (prompt + group)
        )  # a prompt's only once
        rollout = {
            "whole weights": compute * total,
            "KV cache": cache,
            "logits": 12 * prompts * settings.group_size * text.vocab_size,
        }
    return {"always": always, "rollout": rollout, "update": update}


def peak(parts):
    always, rollout, update = (sum(part.values()) for part in parts.values())
    return always + max(rollout, update)


def available(device):
    """Bytes that this rank may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1]
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def advice(parts, settings, limit, world):
    """What to change so that a run fits, the largest part first."""
    always = sum(parts["always"].values())
    rl, tips = hasattr(settings, "group_size"), []
    if always > 0.7 * limit:
        tips += ["--lora 16"] * (rl and not settings.lora) + ["--kl 0"] * (
            parts["always"]["reference"] > 0
        )
        tips += [f"more processes than {world}"]
    if always + sum(parts["update"].values()) > 0.95 * limit:
        tips += ["--checkpointing"] * (not settings.checkpointing)
        tips += [f"--micro_tokens {settings.micro_tokens // 2}"] + [
            "a smaller --max_new_tokens or --group_size"
        ] * rl
    if always + sum(parts["rollout"].values()) > 0.95 * limit:
        tips += [
            f"--rollout_prompts {max(1, (settings.rollout_prompts or settings.prompts // world) // 2)}"
        ]
    return ", ".join(tips)


def check(model, settings, device, prompt=0):
    """Print the plan; end the run if what it always holds is more than the device has, warn if the peak is."""
    parts, limit = (
        memory(model, settings, distributed.world_size(), device.type == "cuda", prompt),
        available(device),
    )
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{key} {value / 1e9:.3g}" for key, value in part.items() if value)
        for name, part in parts.items()
        if part
    )
    distributed.say(
        f"memory plan, GB a rank: {shown}; peak {peak(parts) / 1e9:.3g} of {limit / 1e9:.3g}"
    )
    if sum(parts["always"].values()) > limit:
        raise UserError(
            f"{peak(parts) / 1e9:.0f} GB a rank do not fit into {limit / 1e9:.0f}: "
            f"{advice(parts, settings, limit, distributed.world_size())}"
        )
    if peak(parts) > 0.95 * limit:
        distributed.say(
            f"this will probably not fit; try {advice(parts, settings, limit, distributed.world_size())}"
        )


def stock_model(width, layers, heads, keys, mlp, tied, vision, depth, vision_mlp, deepstack):
    """A Qwen3-VL without memory."""
    config = Qwen3VLConfig(
        vision_config=dict(
            hidden_size=vision,
            depth=depth,
            intermediate_size=vision_mlp,
            num_heads=16,
            patch_size=16,
            spatial_merge_size=2,
            out_hidden_size=width,
            deepstack_visual_indexes=deepstack,
        ),
        text_config=dict(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=151936,
            num_key_value_heads=keys,
            intermediate_size=mlp,
            head_dim=128,
            tie_word_embeddings=tied,
        ),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return RegionVLM(config)


def main():
    rl = dict(
        checkpointing=True,
        train_vision=False,
        micro_tokens=4096,
        group_size=8,
        max_new_tokens=512,
        kl=0.01,
        rollout_prompts=16,
        lora=0,
    )
    ways = {
        "SFT": dict(checkpointing=True, micro_tokens=4096),
        "GRPO": rl,
        "GRPO --lora 16": {**rl, "lora": 16},
    }
    print(
        "GB a rank, bold where it fits: --checkpointing --micro_tokens 4096; GRPO with --group_size 8\n"
        "--max_new_tokens 512 --rollout_prompts 16, prompts of 700 tokens\n"
    )
    print(f"| model | parameters | | {' | '.join(DEVICES)} |\n|---|---|---|{'---|' * len(DEVICES)}")
    for name, sizes in STOCK.items():
        stock = stock_model(*sizes)
        for way, values in ways.items():
            model, settings = copy.deepcopy(stock), SimpleNamespace(**values)
            if way == "GRPO":
                model.model.visual.requires_grad_(False)
            if way == "GRPO --lora 16":
                add_adapters(distributed.freeze(model, torch.device("cuda")), 16, 0)
            cells = []
            for world, size in DEVICES.values():
                need = peak(memory(model, settings, world, True, 700)) / 1e9
                cells.append(f"**{need:.0f}**" if need < 0.95 * size else f"{need:.0f}")
            count = sum(p.numel() for p in stock.parameters()) / 1e9
            print(f"| {name} | {count:.1f} B | {way} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
