"""One GRPO step three ways, on the same work: ours, a naive loop, and TRL's GRPOTrainer if
installed.

    python -m tools.bench --model-size 1.4M --image 448              # CPU, one thread: a minute
    python -m tools.bench --model-size 23M --prompt-tokens 1350 --prompts 1 --new-tokens 150
    python -m tools.bench --model-size 2B --image 960 --prompt-tokens 1000 --prompts 1 --new-tokens 512

The last line is for a GPU (bf16). The work: --prompts prompts with a picture each, --group
responses per prompt, of exactly --new-tokens tokens (or --ragged), then one AdamW step on the
language model. Weights are random, the vision side is frozen. On CUDA weights and moments are bf16
for all contenders, so that 8 B fits on one card.

naive   the plain `rollout` and `token_logprobs` of model.py: every response is a row of its own with
        the whole prompt, in sampling and in training, as hand-written loops do it.
ours    the same two functions of engine/shared_prefix.py and grpo.optimizer_step, under FSDP2.
trl     GRPOTrainer, in tools/bench_trl.py.

A turn is a process: one step to warm up, then those whose time counts, then one whose memory
counts; turns in the order A B B A. Seconds are medians: of CPU time with one thread on the CPU,
which other programs disturb little, else of the clock. Peak memory is what a phase adds to the
libraries (weights, moments, activations): on the CPU the kernel's high-water mark of the resident
set, which is set back before each phase, on CUDA the allocator's. On the CPU, freed blocks go back
to the system for that, which slows the phase; hence a step of its own.
"""

import contextlib
import copy
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig

import data
import grpo
import model as plain
from engine import distributed
from engine.output import check_outputs, whole_file
from engine.settings import parse, run_main, setting
from engine.shared_prefix import rollout
from formats.errors import UserError
from model import (
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    REGION_TOKEN,
    SPECIAL_TOKENS,
    RegionVLM,
    join_features,
    split_features,
)
from world.tiny import train_tokenizer

ROOT = Path(__file__).parent.parent
PHASES = ("rollout", "update", "step")
WORDS = [
    "the",
    "chair",
    "is",
    "left",
    "of",
    "a",
    "table",
    "behind",
    "lamp",
    "away",
    "from",
    "camera",
    "sofa",
    "which",
    "object",
    "closer",
    "door",
    "window",
    "wall",
]  # each is one token

VISION_FIELDS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "deepstack_visual_indexes",
    "num_position_embeddings",
)
TEXT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
# {name: (VISION_FIELDS, TEXT_FIELDS, sections of M-RoPE)}; the last three are the published
# Qwen3-VL.
SIZES = {
    "1.4M": (
        (3, 64, 128, 4, [0, 1, 2], 256),
        (128, 4, 320, 4, 2, 32, 1024, True),
        [6, 5, 5],
    ),
    "23M": (
        (6, 256, 768, 4, [1, 2, 3], 256),
        (384, 8, 1024, 6, 2, 64, 1024, True),
        [12, 10, 10],
    ),
    "2B": (
        (24, 1024, 4096, 16, [5, 11, 17], 2304),
        (2048, 28, 6144, 16, 8, 128, 151936, True),
        [24, 20, 20],
    ),
    "4B": (
        (24, 1024, 4096, 16, [5, 11, 17], 2304),
        (2560, 36, 9728, 32, 8, 128, 151936, True),
        [24, 20, 20],
    ),
    "8B": (
        (27, 1152, 4304, 16, [8, 16, 24], 2304),
        (4096, 36, 12288, 32, 8, 128, 151936, False),
        [24, 20, 20],
    ),
}


@dataclass
class Settings:
    model_size: str = setting(
        "1.4M",
        f"random weights of this size: {', '.join(SIZES)}; the last three: Qwen3-VL",
        tuple(SIZES),
    )
    image: int = setting(
        448,
        "side of the square pictures, pixels; 32 x 32 pixels are a token",
        at_least=32,
        at_most=4096,
    )
    prompt_tokens: int = setting(
        0,
        "tokens of a prompt with its picture; 0: the picture's and 60 more",
        at_least=0,
        at_most=100_000,
    )
    prompts: int = setting(2, "prompts of the step", at_least=1, at_most=10_000)
    group: int = setting(8, "responses per prompt", at_least=2, at_most=1024)
    new_tokens: int = setting(100, "tokens per response", at_least=1, at_most=100_000)
    ragged: bool = setting(
        False, "responses of 30 % to 100 % of --new-tokens instead, evenly spread in each group"
    )
    kl: bool = setting(False, "with a reference model, weight 0.01")
    repeats: int = setting(
        5, "least number of steps that count, of each contender", at_least=1, at_most=1000
    )
    micro: int = setting(
        0,
        "responses per training pass of naive and TRL, 0: all; it divides --group or is a multiple. "
        "Ours: grpo.py's --micro_tokens",
        at_least=0,
    )
    threads: int = setting(1, "CPU threads", at_least=1, at_most=1024)
    json: str = setting("", "file for the numbers")
    turn: str = setting(
        "",
        "used by the bench itself: one contender's turn in this process, its steps as JSON",
        ("", "naive", "ours", "trl"),
    )


# ----------------------------------------------------------------------------------------------
# the work


def prompt_length(settings):
    return settings.prompt_tokens or (settings.image // 32) ** 2 + 60


def response_lengths(settings):
    """Tokens of each response (N,)."""
    least = 0.3 * settings.new_tokens if settings.ragged else settings.new_tokens
    of_group = torch.linspace(least, settings.new_tokens, settings.group).round().long()
    return of_group.repeat(settings.prompts)


def make_tools(settings):
    """-> tokenizer, image processor"""
    tokenizer = train_tokenizer([" ".join(["", *WORDS])] * 50, data.PROMPTS.values(), 600)
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32**2, "longest_edge": settings.image**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return tokenizer, processor


def make_config(settings, tokenizer):
    vision, text, sections = SIZES[settings.model_size]
    ids = tokenizer.convert_tokens_to_ids
    vision_config = dict(zip(VISION_FIELDS, vision))
    text_config = dict(zip(TEXT_FIELDS, text))
    vision_config["patch_size"] = 16
    vision_config["out_hidden_size"] = text_config["hidden_size"]
    text_config["max_position_embeddings"] = 262144
    text_config["pad_token_id"] = tokenizer.pad_token_id
    text_config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_interleaved": True,
        "mrope_section": sections,
    }
    return Qwen3VLConfig(
        vision_config=vision_config,
        text_config=text_config,
        tie_word_embeddings=text_config["tie_word_embeddings"],
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids(IMAGE_START),
        vision_end_token_id=ids(IMAGE_END),
        region_token_id=ids(REGION_TOKEN),
    )


def make_model(settings, tokenizer, device, kind=RegionVLM):
    """Random weights, float32 on the CPU and bf16 on CUDA; the vision side is frozen."""
    config = make_config(settings, tokenizer)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return freeze(model)


def freeze(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.language_model", "lm_head")))
    return model


def make_rows(settings, tokenizer, processor, count):
    """Instances with pictures of noise; every prompt has the same number of tokens."""
    rng = np.random.default_rng(0)

    def make_row(words):
        side = settings.image
        question = "".join(f" {word}" for word in words)
        return {
            "source": "bench",
            "image": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "1"}],
        }

    one_word = data.encode(make_row(["the"]), tokenizer, processor, train=False)
    frame = len(one_word["prompt"]) - 1  # tokens of a prompt without any word
    wanted = prompt_length(settings)
    if settings.image % 32 or wanted <= frame:
        raise UserError(
            f"--image {settings.image} --prompt-tokens {wanted}: needs a multiple of 32 pixels, and "
            f"more than {frame} tokens"
        )
    return [make_row(rng.choice(WORDS, wanted - frame)) for _ in range(count)]


@contextlib.contextmanager
def ending_at(model, settings, stop_ids):
    """--ragged: inside, each response samples a stop id as its last token.

    That holds in any sampler, also in one that drops rows that have ended.
    """
    if not settings.ragged:
        yield
        return
    lengths = response_lengths(settings).to(model.device)  # of the rows that the sampler still has
    step = 0

    def force(module, inputs, logits):
        nonlocal lengths, step
        if step and len(logits) < len(lengths):  # exactly the rows that had ended were dropped
            lengths = lengths[lengths > step]
        step += 1
        logits[..., stop_ids] = -1e4
        if step > 1:  # the first call is that of the prompts
            only_stop = torch.full_like(logits[0, -1], -1e4).index_fill_(0, stop_ids, 1e4)
            logits[lengths == step, -1] = only_stop

    hook = model.lm_head.register_forward_hook(force)
    try:
        yield
    finally:
        hook.remove()


def rewards_of(tokens, group):
    """Something that differs within a group: the share of odd tokens. (N, T) -> (B, G)"""
    return (tokens % 2).float().mean(1).view(-1, group)


# ----------------------------------------------------------------------------------------------
# time and memory


def resident(key):
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `restart_peak`."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[key].split()[0]) * 1024


def restart_peak():
    """Sets VmHWM to VmRSS, after the C library has given back the freed blocks that it holds."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Meter:
    """Seconds of the phases of each step, and peak bytes in the last one.

    It is made before the model: the memory at that time is the zero.
    """

    def __init__(self, device, threads, steps):
        self.cuda = device.type == "cuda"
        self.steps = steps
        self.base = resident("VmRSS")
        self.seconds = []  # of each step: {phase: seconds}
        self.memory = {}  # {phase: bytes}
        one_thread = threads == 1 and not self.cuda
        self.clock = time.process_time if one_thread else time.perf_counter

    @contextlib.contextmanager
    def phase(self, name):
        if name == "rollout":  # a step begins
            self.seconds.append({})
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif len(self.seconds) == self.steps:
            restart_peak()
        start = self.clock()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[-1][name] = self.clock() - start
        if self.cuda:
            self.memory[name] = torch.cuda.max_memory_allocated()
        else:
            self.memory[name] = resident("VmHWM") - self.base

    def result(self):
        """The times that count, and the memory of the last step."""
        steps = [{**step, "step": sum(step.values())} for step in self.seconds[1:-1]]
        return {"steps": steps, "memory": {**self.memory, "step": max(self.memory.values())}}


# ----------------------------------------------------------------------------------------------
# naive: every response by itself, with the plain functions of model.py


def naive_turn(settings, samples, tokenizer, device, meter, banned, stop_ids):
    model = make_model(settings, tokenizer, device)
    reference = None
    if settings.kl:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    for batch in samples:
        prompts = data.to(data.collate(batch, tokenizer), device)
        with meter.phase("rollout"), ending_at(model, settings, stop_ids):
            tokens, mask, old_logprobs, features = plain.rollout(
                model, prompts, settings.group, settings.new_tokens, stop_ids, banned
            )
        assert mask.sum(1).tolist() == response_lengths(settings).tolist()
        with meter.phase("update"):
            rewards = rewards_of(tokens, settings.group)
            naive_backward(
                model.train(),
                reference,
                (prompts, features, tokens, mask, old_logprobs),
                rewards,
                banned,
                0.01,
                settings.micro,
            )
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def naive_backward(model, reference, batch, rewards, banned, kl, micro):
    """Gradients of the GRPO loss, in passes of `micro` responses -> loss.

    batch: prompts, features, tokens, mask, old_logprobs (N, T); rewards (B, G).
    """
    prompts, features, tokens, mask, old_logprobs = batch
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    advantages = advantages.view(-1, 1)  # (N, 1)
    total = 0.0
    for part, rows in passes(prompts, features, rewards.shape[1], micro, model.config):
        scored = (*part, tokens[rows], mask[rows], banned)
        logprobs, _ = plain.token_logprobs(model, *scored)
        ratio = (logprobs - old_logprobs[rows]).exp()
        clipped = ratio.clamp(0.8, 1.3) * advantages[rows]
        gain = torch.min(ratio * advantages[rows], clipped)
        floored = torch.max(gain, 3 * advantages[rows])
        gain = torch.where(advantages[rows] < 0, floored, gain)
        if reference is not None:
            with torch.no_grad():
                ref_logprobs, _ = plain.token_logprobs(reference, *scored)
            gap = ref_logprobs - logprobs
            gain = gain - kl * (gap.exp() - gap - 1)
        loss = -(gain * mask[rows]).sum() / mask.sum()
        loss.backward()
        total += loss.item()
    return total


def passes(prompts, features, group, micro, config):
    """The work in passes of `micro` responses: ((prompts, features), rows of their responses),
    ..."""
    count = len(prompts["input_ids"])
    micro = micro or count * group
    per_pass = max(1, micro // group)  # prompts
    width = min(micro, group)  # responses per prompt
    of_prompts = split_features(features, prompts["input_ids"], config)
    for first in range(0, count, per_pass):
        some = slice(first, first + per_pass)
        keys = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        part = {key: prompts[key][some] for key in keys}
        for start in range(0, group, width):
            end = first * group + start + width * len(part["input_ids"])
            rows = slice(first * group + start, end)
            yield (part, join_features(of_prompts[some])), rows


# ----------------------------------------------------------------------------------------------
# ours


def make_groups(samples, features, rewards, **rows):
    """What grpo.sample_groups returns, as far as grpo.optimizer_step reads it.

    features: a list, one per prompt; rewards (B, G); rows: tokens, mask, old_logprobs (N, T).
    """
    advantages = grpo.group_advantages(rewards)
    groups = []
    for i, sample in enumerate(samples):
        group = {"row": {"id": str(i)}, "sample": sample, "features": features[i]}
        group["advantages"] = advantages[i]
        for key, value in rows.items():
            group[key] = value.split(rewards.shape[1])[i]
        groups.append(group)
    return groups


def ours_turn(settings, samples, tokenizer, device, meter, banned, stop_ids):
    model = make_model(settings, tokenizer, device)
    reference = None
    if settings.kl:
        shapes = distributed.shapes_of(model).requires_grad_(False)
        reference = distributed.shard(shapes, device, source=model).eval()
    model = distributed.shard(model, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    learner = grpo.Learner(model, reference, optimizer, tokenizer, None, device, stop_ids, banned)
    of_grpo = dataclasses.replace(grpo.Settings(), kl=0.01 * settings.kl)
    for batch in samples:
        prompts = data.to(data.collate(batch, tokenizer), device)
        with (
            meter.phase("rollout"),
            distributed.gathered(model),
            ending_at(model, settings, stop_ids),
        ):
            tokens, mask, old_logprobs, features = rollout(
                model, prompts, settings.group, settings.new_tokens, stop_ids, banned
            )
        assert mask.sum(1).tolist() == response_lengths(settings).tolist()
        with meter.phase("update"):
            features = split_features(features, prompts["input_ids"], model.config)
            rewards = rewards_of(tokens, settings.group)
            groups = make_groups(
                batch, features, rewards, tokens=tokens, mask=mask, old_logprobs=old_logprobs
            )
            model.train()
            grpo.optimizer_step(learner, groups, groups[0], of_grpo)


# ----------------------------------------------------------------------------------------------
# turns


def take_turn(settings):
    """One contender's steps, in a process of its own; printed as JSON."""
    device = distributed.setup(0)
    torch.set_num_threads(settings.threads)
    tokenizer, processor = make_tools(settings)
    steps = 1 + max(1, (settings.repeats + 1) // 2) + 1  # to warm up, for the time, for the memory
    settings.rows = make_rows(settings, tokenizer, processor, settings.prompts * steps)
    samples = [data.encode(row, tokenizer, processor, train=False) for row in settings.rows]
    stop_ids = torch.tensor([tokenizer.eos_token_id], device=device)
    never = set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    if settings.ragged:
        never -= set(stop_ids.tolist())
    banned = torch.tensor(sorted(never), device=device)
    if settings.turn == "trl":
        contender = importlib.import_module("tools.bench_trl").turn
    else:
        contender = {"naive": naive_turn, "ours": ours_turn}[settings.turn]
    meter = Meter(device, settings.threads, steps)
    of_steps = [samples[i::steps] for i in range(steps)]
    contender(settings, of_steps, tokenizer, device, meter, banned, stop_ids)
    print(json.dumps({**meter.result(), "rates": machine_rates(device, meter.clock)}))


def machine_rates(device, clock):
    """The machine's best: FLOP/s of a matrix product, bytes/s that a copy reads."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    dtype = torch.bfloat16 if cuda else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    block = torch.ones(2**26, device=device)
    other = block.clone()

    def seconds(work):
        start = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    best_product = min(seconds(lambda: matrix @ matrix) for _ in range(5))
    best_copy = min(seconds(lambda: other.copy_(block)) for _ in range(5))
    return 2 * size**3 / best_product, 4 * len(block) / best_copy


def run_turns(names, settings):
    """Each contender twice, in the order A B B A: a drift of the machine's speed cancels out."""
    turns = {name: [] for name in names}
    for name in names + names[::-1]:
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench", *sys.argv[1:], "--turn", name],
            text=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(settings.threads)},
            check=False,
        )
        if done.returncode:
            raise UserError(f"the turn of {name} failed, see above")
        turns[name].append(json.loads(done.stdout.splitlines()[-1]))
        seconds = ", ".join(f"{step['step']:.3f}" for step in turns[name][-1]["steps"])
        print(f"{name}: {seconds} s per step", flush=True)
    return turns


# ----------------------------------------------------------------------------------------------
# the report


def summary(turns, tokens):
    """{contender: {phase: median seconds, tokens per second, peak bytes}}"""
    out = {}
    for name, of_name in turns.items():
        line = {}
        steps = [step for turn in of_name for step in turn["steps"]]
        for phase in PHASES:
            line[phase] = statistics.median(step[phase] for step in steps)
            line[f"{phase}_tokens_per_s"] = tokens / line[phase]
            line[f"{phase}_memory"] = max(turn["memory"][phase] for turn in of_name)
        out[name] = line
    return out


def least_seconds(settings, rates, size):
    """Seconds of our rollout and update if the machine did nothing but its best.

    That is its matrix products, or in decoding the bytes that are read if they take longer: a
    decoding step reads the language model's weights and every row's keys and values. rates: see
    machine_rates; size: bytes per number.
    """
    flops, bandwidth = rates
    depth, vision_width, vision_mlp, *_ = SIZES[settings.model_size][0]
    width, layers, mlp, heads, kv_heads, head_dim, vocabulary, _ = SIZES[settings.model_size][1]
    prompt = prompt_length(settings)
    tokens = int(response_lengths(settings).sum())
    patches = settings.image**2 // 256
    weights = layers * (2 * width * head_dim * (heads + kv_heads) + 3 * width * mlp)
    head = width * vocabulary
    attended = prompt + settings.new_tokens / 2  # keys of a response's token, on average

    per_patch = 8 * vision_width**2 + 4 * vision_width * vision_mlp + 4 * vision_width * patches
    vision = settings.prompts * depth * patches * per_patch
    # Of the prompt's last layer only keys and values are made.
    per_token = 2 * weights + 2 * prompt * heads * head_dim * layers
    per_token = per_token * (layers - 1) / layers + 4 * width * head_dim * kv_heads
    prefill = settings.prompts * prompt * per_token
    respond = tokens * (2 * (weights + head) + 4 * attended * heads * head_dim * layers)
    cache = tokens * attended * 2 * kv_heads * head_dim * layers
    read = size * (settings.new_tokens * (weights + head) + cache)
    decode = max(respond / flops, read / bandwidth)
    return {
        "rollout": (vision + prefill) / flops + decode,
        "update": (3 + settings.kl) * (prefill + respond) / flops,
    }


def show(settings, out, rates):
    """Print the table, the ratios, and how far ours is from the machine's best."""
    tokens = int(response_lengths(settings).sum())
    heads = "".join(f"{phase:>12} s  tokens/s   peak MB" for phase in PHASES)
    print(
        f"\n{settings.model_size}, {settings.prompts} x {settings.group} responses to prompts of "
        f"{prompt_length(settings)} tokens, {tokens} tokens\n      {heads}"
    )
    for name, line in out.items():
        if name == "ratio":
            continue
        cells = ""
        for phase in PHASES:
            cells += f"{line[phase]:14.3f}{line[f'{phase}_tokens_per_s']:10.0f}"
            cells += f"{line[f'{phase}_memory'] / 1e6:10.0f}"
        print(f"{name:6}{cells}")
    ratios = ", ".join(f"{phase} {out['ratio'][phase]:.2f}" for phase in PHASES)
    print(f"seconds naive / ours: {ratios}; peak memory ours / naive {out['ratio']['memory']:.2f}")
    least = least_seconds(settings, rates, 2 if torch.cuda.is_available() else 4)
    shares = ", ".join(
        f"{name} {value:.3f} s ({value / out['ours'][name]:.0%})" for name, value in least.items()
    )
    print(
        f"ours at the machine's best, {rates[0] / 1e9:.0f} GFLOP/s and {rates[1] / 1e9:.1f} GB/s: "
        f"{shares}"
    )


def main():
    settings = parse(Settings, __doc__)
    if settings.micro and settings.group % settings.micro and settings.micro % settings.group:
        raise UserError(f"--micro {settings.micro}: must divide --group, or be a multiple of it")
    if settings.turn:
        take_turn(settings)
        return
    check_outputs({"--json": settings.json})
    names = ["naive", "ours"]
    if importlib.util.find_spec("trl") is not None:
        names.append("trl")
    turns = run_turns(names, settings)
    out = summary(turns, int(response_lengths(settings).sum()))
    ratio = {phase: out["naive"][phase] / out["ours"][phase] for phase in PHASES}
    ratio["memory"] = out["ours"]["step_memory"] / out["naive"]["step_memory"]
    out["ratio"] = ratio
    try:
        if settings.json:
            with whole_file(settings.json, "--json") as file:
                json.dump(out, file, indent=1)
    finally:  # shown also where it can't be written
        show(settings, out, turns["ours"][-1]["rates"])


if __name__ == "__main__":
    run_main(main)
