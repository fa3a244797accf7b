"""Around every stage: settings from the command line, processes and devices, sharding, models on disk.

One code path for `python sft.py`, `torchrun --nproc_per_node 8 sft.py` and several nodes: FSDP2 on a mesh of all
ranks, also of one; gloo on CPU, NCCL on CUDA; float32 weights, bf16 compute on CUDA, float32 reduction of gradients.
"""
import argparse
import contextlib
import dataclasses
import datetime
import os
import random
import shutil
import sys

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLConfig, logging as hf_logging

import data
import questions
from model import RegionVLM, merge

# ---------------------------------------------------------------------------------------------------------------------
# settings: one dataclass a script; a field is setting(default, reason)


class UserError(ValueError):
    """Something that the user can mend: printed as one line, exit code 2."""


def setting(default, reason, choices=()):
    return dataclasses.field(default_factory=lambda: default,
                             metadata={"help": reason, "default": default, "choices": choices})


def parse(settings, description, argv=None):
    """Command line -> settings object. `--name value`; a list takes several values; a bool is a switch. A value that is
    not among the setting's choices is a UserError."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for field in dataclasses.fields(settings):
        default, reason = field.metadata["default"], field.metadata["help"].replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else \
            {"nargs": "+", "metavar": "X"} if isinstance(default, list) else \
            {"type": type(default) if default is not None else str, "metavar": "X"}
        names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        parser.add_argument(*names, default=default, help=f"{reason} [default: {default}]", **kind)
    given = settings(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(settings):
        value, choices = getattr(given, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{field.name} {value}: needs one of {', '.join(filter(None, choices))}")
    return given


def main(function):
    """Run a stage; a mistake of the user ends in one line on standard error and exit code 2."""
    try:
        function()
    except (UserError, data.BadRow) as error:              # every rank prints: the fault may be one rank's alone
        if str(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:                               # outside of the training, which ends on its own terms
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


@contextlib.contextmanager
def together(what):
    """Around work with files or packages that every rank does for itself: what fails on one ends the run on all."""
    problem = ""
    try:
        yield
    except (OSError, SafetensorError, ImportError) as error:
        problem = f"{what} ({getattr(error, 'strerror', None) or str(error).splitlines()[0]})"
    problems = [problem for problem in gather([problem]) if problem]
    if problems:
        raise UserError(problems[0] if rank() == 0 else "")  # one rank tells it


# ---------------------------------------------------------------------------------------------------------------------
# processes

TIMEOUT = 1800                                              # seconds that a rank waits for the others in a collective

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(seed):
    """Join the processes (one without torchrun), pick this rank's device, seed every generator. -> device"""
    if not 0 <= seed < 900:                                 # more would reach into the held-out scenes (eval.held_out)
        raise UserError(f"--seed {seed}: needs 0 to 899")
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # or torchrun
        patience = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, **alone)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def total(value):
    """Sum of a number over the ranks."""
    tensor = torch.tensor(float(value), dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    return tensor.item()


def most(value):
    """Largest value over the ranks."""
    return max(gather([value]))


def gather(rows):
    """Concatenate each rank's list, in rank order, on every rank."""
    parts = [None] * world()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


# ---------------------------------------------------------------------------------------------------------------------
# sharding


LARGE_LAYER = 1e6                                           # parameters from which a layer is a unit: small buffers


def shard(model, device, checkpointing=False):
    """FSDP2 over all ranks, a unit a large layer, the root's unit for the rest."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":                               # inputs as they are: the rotary angles stay float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in [*model.model.visual.blocks, *model.model.language_model.layers]:
        if sum(p.numel() for p in layer.parameters()) > LARGE_LAYER:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    model = fully_shard(model.to(device), mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode_images")    # a forward of its own: rollout calls it first
    return model


def freeze(model, device):
    """Train nothing of the model; bf16 on CUDA, where bf16 computes with it anyway (buffers stay as they are)."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.bfloat16() if device.type == "cuda" else parameter.data
    return model


def sync_gradients(model, last):
    """Before a micro-batch: reduce its gradients over the ranks? Small models do so at the last one only; unreduced
    gradients are whole, 4 bytes a parameter on each rank, which large models can't afford."""
    model.set_requires_gradient_sync(last or is_large(model))


def is_large(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad) > 3e8


@contextlib.contextmanager
def gathered(model):
    """Whole weights on every rank, so that ranks may run different numbers of forward passes (rollouts, evaluation).

    All forward hooks of the units rest: FSDP's cost .1 to .2 ms a unit and token, and have nothing to do (only
    encode_images still calls the root's). Inside, no state dict, no second `gathered`, and no root that reshards.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    saved = [(hooks, dict(hooks)) for unit in units for hooks in (unit._forward_pre_hooks, unit._forward_hooks)]
    for unit in units:
        unit.unshard()
    for hooks, _ in saved:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in saved:
            hooks.update(before)
        for unit in units:
            unit.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# models

# The embedded default models: picture side, patch, merge; vision and text (width, layers, MLP, heads); and what goes
# with them unless a flag says otherwise: rows and learning rate of an SFT step, prompts of a GRPO step.
SIZES = {
    "tiny": dict(image=96, patch=8, merge=3, vision=(64, 3, 160, 2), text=(128, 3, 352, 4),
                 batch=64, sft_lr=2e-3, prompts=48),
    "small": dict(image=128, patch=8, merge=2, vision=(256, 6, 768, 4), text=(384, 8, 1024, 6),
                  batch=128, sft_lr=6e-4, prompts=128),
    "base": dict(image=224, patch=14, merge=2, vision=(512, 8, 1536, 8), text=(768, 12, 2048, 12),
                 batch=256, sft_lr=3e-4, prompts=256),
}


def by_size(settings, **names):
    """Fill settings that are 0 with what goes with --size: by_size(settings, lr="sft_lr")."""
    for field, name in names.items():
        setattr(settings, field, getattr(settings, field) or plan_of(settings.size)[name])


def plan_of(size):
    if size not in SIZES:
        raise UserError(f"--size {size}: needs one of {', '.join(SIZES)}")
    return SIZES[size]


def use_attention(model, name):
    """--attention: flash (flash-attn on CUDA, compute capability 8 or more), sdpa (torch's), auto (flash if it can)."""
    try:
        from flash_attn import flash_attn_func              # flash-attn-4 has the package, but not this function
        flash = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    except ImportError:
        flash = False
    if name not in ("auto", "sdpa", "flash") or (name == "flash" and not flash):
        raise UserError(f"--attention {name}: needs auto, sdpa, or flash with flash-attn and an Ampere or later GPU")
    flash = flash and name != "sdpa"
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    say(f"attention: {'flash-attn' if flash else 'SDPA'}")
    return model


def new_model(size, seed, attention="auto"):
    """The embedded default: a small Qwen3-VL from a config, with a tokenizer trained on the embedded world's texts."""
    plan, scenes = plan_of(size), [data.cached_scene(s, 96) for s in range(150)]
    rows = [r for i, scene in enumerate(scenes) for r in questions.questions(scene, i) + questions.grounding(scene, i)]
    tokenizer = data.train_tokenizer([turn["value"] for row in rows for turn in row["conversations"]])
    ids = tokenizer.convert_tokens_to_ids
    vision, text = plan["vision"], plan["text"]
    head = text[0] // text[3]
    rope = dict(rope_type="default", rope_theta=1e4, mrope_interleaved=True,
                mrope_section=[head // 2 - 2 * (head // 6), head // 6, head // 6])
    config = Qwen3VLConfig(
        vision_config=dict(
            hidden_size=vision[0], depth=vision[1], intermediate_size=vision[2], num_heads=vision[3],
            patch_size=plan["patch"], spatial_merge_size=plan["merge"], temporal_patch_size=1, out_hidden_size=text[0],
            deepstack_visual_indexes=[], num_position_embeddings=(plan["image"] // plan["patch"]) ** 2,
            initializer_range=0.8 * vision[0] ** -0.5),     # the stock 0.02 suits widths of thousands
        text_config=dict(
            hidden_size=text[0], num_hidden_layers=text[1], intermediate_size=text[2], num_attention_heads=text[3],
            num_key_value_heads=text[3] // 2, head_dim=head, vocab_size=len(tokenizer), max_position_embeddings=4096,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, rope_parameters=rope,
            initializer_range=0.8 * text[0] ** -0.5),
        tie_word_embeddings=True, image_token_id=ids(data.IMAGE_PAD), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids(data.IMAGE_START), vision_end_token_id=ids(data.IMAGE_END),
        region_token_id=ids(data.REGION))
    torch.manual_seed(seed)
    model = RegionVLM(config)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
    torch.nn.init.normal_(model.point_embed.fc2.weight, std=0.1)                             # no stock model to protect
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = data.tiny_image_processor(plan["image"], plan["patch"], plan["merge"])
    return use_attention(model, attention), tokenizer, processor


def image_side(processor):
    """Side, in pixels, of the pictures that the embedded world draws for a model."""
    return min(224, round(processor.size["longest_edge"] ** 0.5))


def load_model(name, attention="auto"):
    """A folder of this project or a stock Qwen3-VL (hub name or folder) -> model (float32), tokenizer, processor."""
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(f"--model {name}: no config.json there; give a folder of sft.py or grpo.py, or a Qwen3-VL")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "qwen3_vl":
            raise UserError(f"--model {name}: a {config.model_type} model; only Qwen3-VL is supported")
        tokenizer, processor = AutoTokenizer.from_pretrained(name), Qwen2VLImageProcessorPil.from_pretrained(name)
        config.text_config.attention_dropout = 0.0          # scoring runs in train mode and must not drop anything
        if not hasattr(config, "region_token_id"):          # a stock checkpoint: its embedding has spare rows
            tokenizer.add_tokens([data.REGION], special_tokens=True)
            config.region_token_id = tokenizer.convert_tokens_to_ids(data.REGION)
        model, loaded = RegionVLM.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:                    # not found, cut off, other
        raise UserError(f"--model {name}: {str(error).splitlines()[0]}") from None
    missing = [key for key in loaded["missing_keys"] if not key.startswith(("point_embed", "region_proj"))]
    if missing:
        raise UserError(f"--model {name}: the weights lack {len(missing)} tensors, first {missing[0]}; file cut off?")
    return use_attention(model, attention), tokenizer, processor


def whole_weights(model):
    """The weights of a sharded model, whole, on the CPU of rank 0; adapters are merged into their layers."""
    return merge(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))


def write_model(model, weights, tokenizer, processor, folder):
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(model, tokenizer, processor, out):
    """Whole weights in `out`, readable by from_pretrained. Written beside and renamed: nobody sees half a model."""
    weights, partial = whole_weights(model), f"{out}.partial"
    with together(f"--out {out}: cannot write the model"):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            write_model(model, weights, tokenizer, processor, partial)
            os.makedirs(out, exist_ok=True)
            for name in sorted(os.listdir(partial), key="config.json".__eq__):               # that one last: it says
                os.replace(os.path.join(partial, name), os.path.join(out, name))             # that all is there
            os.rmdir(partial)
