"""Processes, devices and sharding: what a stage needs to run on one CPU core or on eight GPUs.

One code path for `python sft.py`, `torchrun --nproc_per_node 8 sft.py` and several nodes: FSDP2 on
a mesh of all ranks, also of one; gloo on CPU, NCCL on CUDA; float32 weights, bf16 compute on CUDA,
float32 reduction of gradients.
"""

import contextlib
import copy
import datetime
import os
import random

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import logging as hf_logging

import model as model_file
from engine.lora import has_adapters
from engine.output import guard_streams
from formats.errors import UserError

TIMEOUT = 1800  # seconds that a rank waits for the others in a collective
MOST_SEEDS = 900  # a larger seed would reach into the held-out scenes (world/sources.py)
LARGE_LAYER = 1e6  # parameters from which a layer is gathered by itself: smaller buffers
LARGE_MODEL = 3e8  # trained parameters from which a rank can't afford whole gradients

# ----------------------------------------------------------------------------------------------
# processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(seed):
    """Join the processes (one without torchrun), seed every generator -> this rank's device."""
    if not 0 <= seed < MOST_SEEDS:
        raise UserError(f"--seed {seed}: needs 0 to {MOST_SEEDS - 1}")
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        alone = {}
        if "RANK" not in os.environ:  # torchrun sets it
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        timeout = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, **alone)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def loader_workers(workers, device):
    """--workers: loader processes of this rank; -1: enough that a GPU needs not wait for them.

    A picture takes one core a quarter of a second.
    """
    if workers >= 0:
        return workers
    return 4 if device.type == "cuda" else 0


def say(*words):
    """Print on rank 0."""
    if rank() == 0:
        guard_streams()  # also where no program of this project runs
        print(*words, flush=True)


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
    if world_size() == 1:
        return list(rows)
    of_ranks = [None] * world_size()
    dist.all_gather_object(of_ranks, rows)
    return [row for rows in of_ranks for row in rows]


def even_out(items, device):
    """Items of the ranks, shared out evenly: as many on each rank, give or take one.

    items: this rank's list of dicts and lists of tensors and other values. A rank that has too many
    sends its last ones; what arrives stands at the end, its tensors on this device.
    """
    items = list(items)
    for giver, taker in moves_to_even(gather([len(items)])):
        if rank() == giver:
            dist.send_object_list([moved_to(items.pop(), torch.device("cpu"))], taker)
        elif rank() == taker:
            arrived = [None]
            dist.recv_object_list(arrived, giver)
            items.append(moved_to(arrived[0], device))
    return items


def moves_to_even(counts):
    """Items of each rank -> the fewest moves [(from, to)] that make them even."""
    least, more = divmod(sum(counts), len(counts))
    fullest_first = sorted(range(len(counts)), key=lambda rank: -counts[rank])
    givers = []
    takers = []
    for place, rank in enumerate(fullest_first):
        surplus = counts[rank] - least - (place < more)
        givers += [rank] * surplus
        takers += [rank] * -surplus
    return list(zip(givers, takers, strict=True))


def moved_to(value, device):
    """A value with all its tensors, in dicts and lists, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved_to(one, device) for key, one in value.items()}
    if isinstance(value, list):
        return [moved_to(one, device) for one in value]
    return value


@contextlib.contextmanager
def together(what):
    """Around work with files or packages that every rank does for itself.

    What fails on one rank ends the run on all, with `what` and the reason in one line.
    """
    problem = ""
    try:
        yield
    except (OSError, SafetensorError, ImportError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        problem = f"{what} ({reason})"
    stop_together(problem)


def stop_together(problem):
    """UserError on all ranks if one of them has a problem, a line; called on all of them."""
    problems = [problem for problem in gather([problem]) if problem]
    if problems:
        raise UserError(problems[0] if rank() == 0 else "")  # one rank tells it


# ----------------------------------------------------------------------------------------------
# models over the ranks


def use_attention(model, name):
    """--attention: choose the kernels (model.use_attention), say which, and why not flash-attn."""
    try:
        chosen, problem = model_file.use_attention(model, name)
    except ValueError as error:
        raise UserError(f"--attention {name}: {error}") from None
    kernels = "SDPA" if chosen == "sdpa" else "flash-attn"
    say(f"attention: {kernels} ({problem})" if problem else f"attention: {kernels}")


def shard(model, device, checkpointing=False, source=None):
    """FSDP2 over all ranks, in place: each large layer is gathered by itself, all the rest at once.

    The weights are those of rank 0, which sends them one by one: the other ranks' models may be
    mere shapes, on the meta device. source: another model of the same shapes, whose weights are
    copied; default: those of `model` itself, which are freed on the way.

    FSDP leaves alone what it would only hold twice: see `left_whole`.
    """
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        # Inputs are not cast: the rotary angles stay float32.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    sources = {}  # parameter of the model -> where its weights come from
    for parameter, weights in zip(model.parameters(), (source or model).parameters(), strict=True):
        sources[parameter] = weights
    for unit in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        is_root = unit is model
        if not is_root and sum(p.numel() for p in unit.parameters()) <= LARGE_LAYER:
            continue
        take_weights(unit, sources, device, copy=source is not None)
        whole = left_whole(model, unit.parameters(), world_size(), device.type == "cuda")
        if is_root or whole != set(unit.parameters()):
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = from_rank_0(buffer, device)
    register_fsdp_forward_method(model, "encode_images")  # rollout calls it by itself
    return model


def left_whole(model, parameters, world, cuda):
    """Those of the parameters that every rank holds whole, and in which it computes, at all times.

    That is all that is frozen if the model has adapters, since each rollout gathers it, or if there
    is a single rank; and what a single rank trains, unless it computes in bf16 from float32
    weights. (Adapters see to that themselves.)
    """
    adapted = has_adapters(model)
    if world > 1 and not adapted:
        return set()
    if world == 1 and (adapted or not cuda):
        return set(parameters)
    return {p for p in parameters if not p.requires_grad}


def clip_gradients(parameters, most):
    """Clip the norm of the gradient over all ranks -> what it was, a number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def take_weights(unit, sources, device, copy):
    """Give the parameters of a unit the weights of `sources`, on this device; some may be done."""
    taken = {}  # parameter -> its successor, which tied layers share
    for module in unit.modules():
        for name, parameter in module._parameters.items():
            if parameter in sources:
                weights = from_rank_0(sources.pop(parameter), device, parameter.dtype, copy)
                taken[parameter] = torch.nn.Parameter(weights, parameter.requires_grad)
            if parameter in taken:
                module._parameters[name] = taken[parameter]


def from_rank_0(tensor, device, dtype=None, copy=False):
    """A tensor of rank 0 on all ranks; elsewhere only its shape and dtype count."""
    dtype = dtype or tensor.dtype
    if rank() == 0:
        tensor = tensor.detach().to(device, dtype, copy=copy).contiguous()
    else:
        tensor = torch.empty(tensor.shape, dtype=dtype, device=device)
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def shapes_of(model):
    """A copy of a model without its weights: parameters on the meta device, for `shard`."""
    memo = {}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def freeze(model, device):
    """Train nothing of the model, or of a part of one.

    On CUDA its weights become bf16, which computes with bf16 anyway.
    """
    for parameter in model.requires_grad_(False).parameters():  # not the buffers
        if device.type == "cuda":
            parameter.data = parameter.data.bfloat16()
    return model


def is_large(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad) > LARGE_MODEL


def sync_gradients(model, last):
    """Before a micro-batch: will its backward pass sum the gradients over the ranks?

    Small models do so once, in the last micro-batch. Until then a rank holds the gradient of every
    parameter, 4 bytes each; large models can't afford that and do it each time.
    """
    model.set_requires_gradient_sync(last or is_large(model))


@contextlib.contextmanager
def gathered(model):
    """Inside, every rank holds whole weights, so that ranks may run different numbers of forwards.

    That is so in rollouts and evaluations. FSDP's hooks on forward have nothing to do there and
    cost 0.1 to 0.2 ms per unit and token: they are taken off. (`encode_images` keeps its own.)
    Inside, make no state dict and no second `gathered`.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [h for unit in units for h in (unit._forward_pre_hooks, unit._forward_hooks)]
    saved = [dict(one) for one in hooks]
    for unit in units:
        unit.unshard()
    for one in hooks:
        one.clear()
    try:
        yield
    finally:
        for one, before in zip(hooks, saved):
            one.update(before)
        for unit in units:
            unit.reshard()
