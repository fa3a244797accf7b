"""The memory of a run, per rank: printed and checked against the device before the first step.

sft.py and grpo.py call `check`. As a program it prints a table of three published sizes, three ways
to train them and four machines:

    python -m engine.plan

Weights, gradients, Adam's moments and caches are counted; activations follow from what a layer
keeps. `python -m tools.dryrun` runs a step on fake CUDA and prints its own count beside this one,
term by term. Not in it: what the CUDA context, NCCL and fragmentation take, 2 to 3 GB.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Qwen3VLConfig

from engine import distributed, head
from engine.lora import add_adapters
from engine.settings import parse, run_main
from formats.errors import UserError
from model import RegionVLM

USABLE = 0.95  # share of a device's memory that a plan may fill
CGROUPS = Path("/sys/fs/cgroup")

# ----------------------------------------------------------------------------------------------
# the check before the first step


def check(model, settings, device, prompt=0, image=0):
    """Print the plan of a run on this device; the arguments but the device as `memory` takes them.

    UserError if what a rank always holds is more than its device has; a warning if the peak is, or
    if a checkpoint needs more of the computer's memory than there is.
    """
    world = distributed.world_size()
    cuda = device.type == "cuda"
    needed = memory(model, settings, world, cuda, prompt, image)
    limit = available(device)
    gb = f"{peak(needed) / 1e9:.3g} of {limit / 1e9:.3g}"
    distributed.say(f"memory plan, GB per rank: {in_words(needed)}; peak {gb}")
    if sum(needed["always"].values()) > limit:
        raise UserError(
            f"{peak(needed) / 1e9:.0f} GB per rank do not fit into {limit / 1e9:.0f}: "
            f"{advice(needed, settings, limit, world)}"
        )
    if peak(needed) > USABLE * limit:
        tips = advice(needed, settings, limit, world)
        distributed.say(f"this will probably not fit; try {tips}")
    if cuda:
        check_host(model, settings)


def check_host(model, settings):
    """Print what rank 0's node needs of the computer's own memory."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = host_memory(model, ranks_here, distributed.world_size())
    limit = room_in_memory()
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in needed.items())
    distributed.say(f"memory plan of the computer, GB: {parts}; of {limit / 1e9:.3g}")
    if needed["while saving"] > USABLE * limit:
        distributed.say(
            "a checkpoint will probably not fit into the computer's memory: "
            "--save_every 0 writes the model alone, at the end"
        )


def available(device):
    """Bytes that this rank may use."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info()
        return total
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return room_in_memory() / ranks_here


def room_in_memory():
    """Bytes that are left of the computer's memory, or of the share that a container may use."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    room = int(lines["MemAvailable"].split()[0]) * 1024
    return min([room, *cgroup_room(CGROUPS)])


def cgroup_room(root):
    """Bytes that are left under the limit of the control group, version 2 or 1; [] without one."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = int((folder / limit).read_text())
            now = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        return [most - now + cached]  # cached files give way
    return []


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
        if not (grpo and settings.lora):  # adapters leave nothing to be sharded
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


def memory(model, settings, world, cuda, prompt=0, image=0):
    """Bytes on each rank, by when and for what: {"always": {..}, "rollout": {..}, "update": {..}}.

    model: not yet sharded, what is not trained already frozen; settings: of sft.py or grpo.py;
    world: number of ranks; prompt: tokens of a prompt of GRPO; image: of these, tokens of images.
    A phase has several moments at which its memory may peak: given is the highest one.
    """
    size = Size(model, world, cuda)
    rollout = {}
    if is_grpo(settings):
        rollout = highest(rollout_moments(size, settings, prompt, image))
    return {
        "always": constant_memory(size, settings),
        "rollout": rollout,
        "update": highest(update_moments(size, settings, prompt, image)),
    }


def peak(needed):
    """Bytes of what is always held and the larger of rollout and update."""
    always = sum(needed["always"].values())
    rollout = sum(needed["rollout"].values())
    update = sum(needed["update"].values())
    return always + max(rollout, update)


def highest(moments):
    return max(moments, key=lambda moment: sum(moment.values()))


def host_memory(model, ranks_here, world):
    """Bytes of the computer's own memory on the node of rank 0: {"while loading", "while saving"}.

    Rank 0 reads the weights in float32 and sends them; a checkpoint is gathered on the CPU, whole
    on rank 0 and each rank's shards of the trained weights and their two moments.
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shards = 12 * trained * ranks_here / world
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"while loading": 4 * total, "while saving": whole + shards}


def is_grpo(settings):
    return hasattr(settings, "group_size")


class Size:
    """How many parameters of a model are where: see distributed.shard."""

    def __init__(self, model, world, cuda):
        self.text = model.config.text_config
        self.vision = model.config.vision_config
        self.world = world
        self.cuda = cuda
        self.compute = 2 if cuda else 4  # bytes of a number in a forward pass: bf16 or float32
        self.parameters = list(model.parameters())
        self.whole = distributed.left_whole(model, self.parameters, world, cuda)
        self.trained = sum(p.numel() for p in self.parameters if p.requires_grad)
        self.total = sum(p.numel() for p in self.parameters)
        self.large = distributed.is_large(model)
        self.trains_head = model.lm_head.weight.requires_grad
        self.trains_vision = any(p.requires_grad for p in model.model.visual.parameters())
        self.tied = model.lm_head.weight is model.get_input_embeddings().weight
        self.head = model.lm_head.weight.numel()
        self.layer = 0  # sharded parameters of a layer that is gathered by itself
        self.gathered = sum(p.numel() for p in self.parameters if p not in self.whole)
        self.root = self.gathered  # of these, all that is gathered at once
        for layer in [*model.model.visual.blocks, *model.model.language_model.layers]:
            parameters = list(layer.parameters())
            if sum(p.numel() for p in parameters) > distributed.LARGE_LAYER:
                own = sum(p.numel() for p in parameters if p not in self.whole)
                self.layer = max(self.layer, own)
                self.root -= own


def constant_memory(size, settings):
    """Bytes that a rank holds all the time."""
    reference = 0
    if is_grpo(settings) and settings.kl and not settings.lora:
        reference = size.compute * size.total / size.world
    weights = 0
    for parameter in size.parameters:
        ranks = 1 if parameter in size.whole else size.world
        weights += parameter.numel() * parameter.element_size() / ranks
    return {
        "weights": weights,
        "optimizer": 8 * size.trained / size.world,
        "reference": reference,
    }


# Rollout.


def rollout_moments(size, settings, prompt, image):
    """Bytes that a rank holds while it samples responses: at three moments, one of which is the
    highest."""
    text = size.text
    local = settings.prompts // size.world
    prompts = prompts_at_once(settings, size.world)
    responses = prompts * settings.group_size
    everywhere = {
        "gathered weights": size.compute * size.gathered,
        "features": features(size, local * image),
    }
    keys_and_values = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    per_token = size.compute * keys_and_values
    encoding = vision_forward(size, prompts * image)
    width = 4 * text.hidden_size + 3 * text.intermediate_size
    prefill = prompts * prompt * (per_token + size.compute * width)
    own_tokens = responses * max(1, settings.max_new_tokens - 1)  # the last one is not run
    earlier = features(size, (local - prompts) * image)
    return [
        {
            **everywhere,
            "features": earlier,
            "activations": encoding + features(size, prompts * image),
        },
        {**everywhere, "activations": prefill},
        {
            **everywhere,
            "KV cache": per_token * (prompts * prompt + own_tokens),
            # The head's logits, in float32, and their log-probabilities.
            "logits": responses * text.vocab_size * (size.compute + 4 + 4),
        },
    ]


def prompts_at_once(settings, world):
    """Prompts that a rank rolls out at once."""
    return settings.rollout_prompts or settings.prompts // world


def features(size, image_tokens):
    """Bytes of what the language model takes from images: of the last level and of the others."""
    levels = 1 + len(size.vision.deepstack_visual_indexes)
    return size.compute * image_tokens * levels * size.text.hidden_size


def vision_forward(size, image_tokens):
    """Bytes of a forward pass of the vision tower, without what it leaves for a backward pass."""
    patches = image_tokens * size.vision.spatial_merge_size**2
    channels = 3 * size.vision.temporal_patch_size * size.vision.patch_size**2
    pixels = channels * (4 + size.compute)  # as they come, and cast
    return patches * (pixels + 18 * size.compute * size.vision.hidden_size)


# Update.


def update_moments(size, settings, prompt, image):
    """Bytes that a rank holds in a training pass: at the moments one of which is the highest.

    That is from the second pass of a step on, when the gradients of the first one are there.
    """
    c = size.compute
    prompts, responses = tokens_of_a_pass(settings, prompt)
    tokens = prompts + responses
    share = image / prompt if prompt else 0.5  # of the prompt that is images
    sums = 4 * size.trained / size.world  # summed gradients, float32
    if size.gathered and not size.large:  # whole ones, until the last pass of a step
        sums += 4 * size.trained  # see distributed.sync_gradients
    images = (prompts if is_grpo(settings) else tokens) * share
    if is_grpo(settings) and not settings.train_vision:
        images = settings.prompts // size.world * image  # the features of all groups
    base = {"features": features(size, images)}
    of_head = size.head * size.trains_head
    between = activations_between(size, settings, tokens)
    if size.trains_vision:
        between += vision_activations(size, settings, tokens * share)
    scored = min(head.SLICE, responses * size.text.vocab_size)
    at_the_head = {
        **base,
        "gathered weights": c * (size.root + size.layer),
        "gradients": sums,
        "whole gradients": c * of_head,
        "activations": between,
        "logits": c * scored + 5 * 4 * min(head.PIECE, scored),  # a slice, and pieces in float32
    }
    in_a_layer = {
        **base,
        "gathered weights": c * (size.root + 2 * size.layer),  # the one at work, and the next
        "gradients": sums + 4 * size.layer * (1 + 1 / size.world),
        "whole gradients": c * (of_head + size.layer / 2),
        "activations": between + activations_inside(size, settings, prompts, responses),
    }
    # At the end all that is gathered at once is summed at once: copied to float32, then summed.
    copying = {
        **base,
        "gradients": sums + 4 * size.root,
        "whole gradients": c * size.root,
    }
    summing = {
        **base,
        "gradients": sums + 4 * size.root * (1 + 1 / size.world),
    }
    moments = [at_the_head, in_a_layer, copying, summing]
    if size.tied and size.trains_head:
        # The embedding gets its gradients from both ends, in GRPO those of two passes.
        moments.append(
            {
                **base,
                "gathered weights": c * size.root,
                "gradients": sums + 4 * size.layer,
                "whole gradients": (4 if is_grpo(settings) else 3) * c * size.head,
                "activations": 8 * c * tokens * size.text.hidden_size,
            }
        )
    return moments


def tokens_of_a_pass(settings, prompt):
    """-> tokens of the prompts of a training pass, and of what follows them: of responses or
    targets."""
    if not is_grpo(settings):
        return settings.micro_tokens / 2, settings.micro_tokens / 2  # about half are targets
    responses = settings.group_size * settings.max_new_tokens
    groups = max(1, settings.micro_tokens // (prompt + responses))  # a group is never cut
    return groups * prompt, groups * responses


def activations_between(size, settings, tokens):
    """Bytes that tokens leave between the layers for the backward pass, or in all of them.

    With checkpointing that is what goes from one layer to the next; and the prompts' keys and
    values, which the responses attend to.
    """
    text = size.text
    if not settings.checkpointing:
        return tokens * text.num_hidden_layers * kept_by_a_layer(size)
    return tokens * text.num_hidden_layers * size.compute * text.hidden_size


def kept_by_a_layer(size):
    """Bytes that one token leaves in one layer."""
    text = size.text
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    norm = 8 + size.compute  # of one number: a norm computes in float32
    kept = 2 * text.hidden_size * (norm + size.compute)
    kept += (queries + keys) * (norm + 2 * size.compute)
    return kept + 4 * text.intermediate_size * size.compute


def activations_inside(size, settings, prompts, responses):
    """Bytes in the one layer whose backward pass runs, at the height of its MLP.

    prompts, responses: tokens. With checkpointing the layer's own forward pass is run again.
    """
    text = size.text
    if not settings.checkpointing:
        return responses * 4 * size.compute * text.intermediate_size  # gradients
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    per_token = 8 * text.intermediate_size * size.compute  # kept, and their gradients
    per_token += 4 * text.hidden_size * (size.compute + 2) + 4 * queries * size.compute
    inside = (responses if is_grpo(settings) else prompts + responses) * per_token
    if is_grpo(settings):
        # Keys and values of the prompts, in all layers; copies of them for each query head.
        inside += prompts * text.num_hidden_layers * 2 * keys * size.compute
        attended = settings.group_size * prompts + responses
        inside += attended * 2 * queries * size.compute
    return inside


def vision_activations(size, settings, image_tokens):
    """Bytes that images leave in the vision side for the backward pass."""
    vision = size.vision
    per_patch = size.compute * vision.hidden_size
    if not settings.checkpointing:
        per_patch = size.compute * (14 * vision.hidden_size + 2 * vision.intermediate_size)
    return vision.depth * per_patch * image_tokens * vision.spatial_merge_size**2


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
    "kl": 0.02,
    "rollout_prompts": 0,
    "lora": 0,
}
WAYS = {"SFT": SFT, "GRPO": GRPO, "GRPO --lora 16": {**GRPO, "lora": 16}}
PROMPTS = 16  # per rank and step
PROMPT, IMAGE = 700, 576  # tokens of a prompt; of these, of its picture of 768 x 768 pixels


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
    cuda = torch.device("cuda")
    if way == "GRPO":
        for part in (model.model.visual, model.point_embed, model.region_proj):
            distributed.freeze(part, cuda)
    if way == "GRPO --lora 16":
        add_adapters(distributed.freeze(model, cuda), WAYS[way]["lora"], seed=0)
    cells = []
    for world, size in DEVICES.values():
        settings = SimpleNamespace(**WAYS[way], prompts=PROMPTS * world)
        gb = peak(memory(model, settings, world, True, PROMPT, IMAGE)) / 1e9
        fits = gb < USABLE * size
        cells.append(f"**{gb:.0f}**" if fits else f"{gb:.0f}")
    return cells


@dataclass
class Settings:
    """The command line of this program has no flags but --help."""


def main():
    parse(Settings, __doc__)
    print(
        "GB per rank, bold where it fits: --checkpointing --micro_tokens 4096; GRPO with "
        "--group_size 8\n--max_new_tokens 512, 16 prompts per rank, of 700 tokens\n"
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
