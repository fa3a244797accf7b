"""One GRPO step three ways, on the same work: ours, a naive loop, and TRL's GRPOTrainer where it is installed.

    python -m tools.bench --model-size 1.4M --image 448                      # CPU, one thread: a minute
    python -m tools.bench --model-size 23M --prompt-tokens 1350 --prompts 1 --new-tokens 150 --json out.json
    python -m tools.bench --model-size 2B --image 960 --prompt-tokens 1000 --prompts 1 --new-tokens 512     # on a GPU, bf16

The work: --prompts prompts with a picture each, --group responses a prompt, of exactly --new-tokens tokens (or
--ragged), then one AdamW step on the language model. Random weights, the vision side frozen; on CUDA weights and
moments are bf16 for all contenders, so that 8 B fits on one card.

naive   stock generate(num_return_sequences=G), then the full forward of prompt and response for each response, with
        all logits: what hand-written loops do. It shares no code with ours, and is its oracle in test_training.py.
ours    model.rollout and grpo.optimizer_step under FSDP2, as in training.
trl     GRPOTrainer, in bench_trl.py.

A turn is a process: one step to warm up, then those whose time counts, then one whose memory counts; turns in the order
A B B A. Seconds are medians, of CPU time with one thread on the CPU (other programs disturb it little), else of the
clock. Peak memory is what a phase adds to the libraries (weights, moments, activations): on the CPU the kernel's
high-water mark of the resident set, set back before each phase, on CUDA the allocator's. On the CPU, freed blocks go
back to the system for that, which slows the phase: hence a step of its own.
"""

import contextlib
import copy
import ctypes
import dataclasses
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
from engine import distributed
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
    split_features,
)
from world import tiny

VISION = [
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "deepstack_visual_indexes",
    "num_position_embeddings",
]
TEXT = [
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
]
SIZES = {  # VISION, TEXT, M-RoPE sections; the last three are the published Qwen3-VL
    "1.4M": ((3, 64, 128, 4, [0, 1, 2], 256), (128, 4, 320, 4, 2, 32, 1024, True), [6, 5, 5]),
    "23M": ((6, 256, 768, 4, [1, 2, 3], 256), (384, 8, 1024, 6, 2, 64, 1024, True), [12, 10, 10]),
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
WORDS = ["the", "chair", "is", "left", "of", "a", "table", "behind", "lamp", "away", "from", "camera", "sofa", "which", "object", "closer", "door", "window", "wall"]
ROOT = Path(__file__).parent.parent
PHASES = ("rollout", "update", "step")


@dataclass
class Settings:
    model_size: str = setting(
        "1.4M", f"random weights of this size: {', '.join(SIZES)}; the last three: Qwen3-VL"
    )
    image: int = setting(448, "side of the square pictures, pixels; 32 x 32 pixels are a token")
    prompt_tokens: int = setting(
        0, "tokens of a prompt with its picture; 0: the picture's and 60 more"
    )
    prompts: int = setting(2, "prompts of the step")
    group: int = setting(8, "responses a prompt")
    new_tokens: int = setting(100, "tokens a response")
    ragged: bool = setting(
        False, "responses of 30 % to 100 % of --new-tokens instead, evenly spread in each group"
    )
    kl: bool = setting(False, "with a reference model, weight 0.01")
    repeats: int = setting(5, "least number of steps that count, of each contender")
    micro: int = setting(
        0, "responses of one training pass of naive and TRL; 0: all. Ours: grpo.py's --micro_tokens"
    )
    threads: int = setting(1, "CPU threads")
    json: str = setting("", "file for the numbers")
    turn: str = setting(
        "", "used by the bench itself: one contender's turn in this process, its steps as JSON"
    )


def prompt_length(settings):
    return settings.prompt_tokens or (settings.image // 32) ** 2 + 60


def response_lengths(settings):
    """(B*G,) tokens of each response."""
    least = 0.3 * settings.new_tokens if settings.ragged else settings.new_tokens
    return (
        torch.linspace(least, settings.new_tokens, settings.group)
        .round()
        .long()
        .repeat(settings.prompts)
    )


def make_tools(settings):
    """-> tokenizer, image processor"""
    pixels = {"shortest_edge": 32**2, "longest_edge": settings.image**2}
    return tiny.train_tokenizer([" ".join(["", *WORDS])] * 50, 600), Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size=pixels,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def make_model(settings, tokenizer, device, kind=RegionVLM):
    """Random weights, float32 on the CPU and bf16 on CUDA; the vision side frozen."""
    vision, text, sections = SIZES[settings.model_size]
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        vision_config=dict(zip(VISION, vision)) | dict(patch_size=16, out_hidden_size=text[0]),
        text_config=dict(zip(TEXT, text))
        | dict(
            max_position_embeddings=262144,
            pad_token_id=tokenizer.pad_token_id,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=sections
            ),
        ),
        tie_word_embeddings=text[-1],
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids(IMAGE_START),
        vision_end_token_id=ids(IMAGE_END),
        region_token_id=ids(REGION_TOKEN),
    )
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

    def row(words):
        picture = rng.integers(0, 256, (settings.image, settings.image, 3), dtype=np.uint8)
        turns = [
            {"from": "human", "value": "".join(f" {word}" for word in words)},
            {"from": "gpt", "value": "1"},
        ]
        return {"source": "bench", "image": picture, "conversations": turns}

    wanted = prompt_length(settings)
    frame = (
        len(data.encode(row(["the"]), tokenizer, processor, train=False)["prompt"]) - 1
    )  # a word is a token
    if settings.image % 32 or wanted <= frame:
        raise UserError(
            f"--image {settings.image} --prompt-tokens {wanted}: needs a multiple of 32 pixels, and "
            f"more than {frame} tokens"
        )
    return [row(rng.choice(WORDS, wanted - frame)) for _ in range(count)]


@contextlib.contextmanager
def ending_at(model, settings, stop):
    """--ragged: each response samples `stop` as its last token, in any sampler, also one that drops finished rows."""
    left, step = response_lengths(settings).to(model.device), 0

    def force(module, inputs, logits):
        nonlocal left, step
        if step and len(logits) < len(left):  # dropped: exactly the rows that had ended
            left = left[left > step]
        step += 1
        logits[..., stop] = -1e4
        if step > 1:  # the first call is that of the prompts
            logits[left == step, -1] = torch.full_like(logits[0, -1], -1e4).index_fill_(
                0, stop, 1e4
            )

    hook = (
        model.lm_head.register_forward_hook(force) if settings.ragged else contextlib.nullcontext()
    )
    with hook:
        yield


def rewards_of(tokens, group):
    """Something that differs within a group: the share of odd tokens. (B*G, T) -> (B, G)"""
    return (tokens % 2).float().mean(1).view(-1, group)


def resident(key):
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `restart_peak`."""
    return next(
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key)
    )


def restart_peak():
    ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the C library still holds
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM = VmRSS


class Meter:
    """Seconds of the phases of each step, and peak bytes in the last one. Made before the model: its memory is the
    zero."""

    def __init__(self, device, threads, steps):
        self.cuda, self.steps, self.base = device.type == "cuda", steps, resident("VmRSS")
        self.seconds, self.memory = [], {}  # of each step: {phase: seconds}; {phase: bytes}
        self.clock = time.process_time if threads == 1 and not self.cuda else time.perf_counter

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
        self.memory[name] = (
            torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM") - self.base
        )

    def result(self):
        """The times that count, and the memory of the last step."""
        return {
            "steps": [{**step, "step": sum(step.values())} for step in self.seconds[1:-1]],
            "memory": {**self.memory, "step": max(self.memory.values())},
        }


def naive_logprobs(model, prompts, tokens, mask, rows, banned):
    """Log-probabilities (rows, T) of some responses (indices) by the full forward of their whole sequences."""
    which = rows // (len(tokens) // len(prompts["input_ids"]))  # prompt of each response
    pictures = prompts["pixel_values"].split(prompts["image_grid_thw"].prod(-1).tolist())
    types = torch.cat([prompts["mm_token_type_ids"][which], torch.zeros_like(tokens[rows])], 1)
    logits = model(
        input_ids=torch.cat([prompts["input_ids"][which], tokens[rows]], 1),
        attention_mask=torch.cat([prompts["attention_mask"][which], mask[rows]], 1),
        pixel_values=torch.cat([pictures[i] for i in which.tolist()]),
        mm_token_type_ids=types,
        image_grid_thw=prompts["image_grid_thw"][which],
        use_cache=False,
    ).logits  # (rows, L + T, V)
    logits = logits[:, prompts["input_ids"].shape[1] - 1 : -1]
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logprobs = (
        logits.index_fill(-1, banned, -torch.inf)
        .log_softmax(-1)
        .gather(-1, tokens[rows][..., None])[..., 0]
    )
    return logprobs.masked_fill(mask[rows] == 0, 0)  # -inf where padding is a banned token


def naive_backward(model, reference, prompts, tokens, mask, old, rewards, banned, kl, micro):
    """Gradients of the GRPO loss; old None: the step's own log-probabilities. -> loss"""
    advantages = (
        (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    ).view(-1, 1)
    total = 0.0
    for rows in torch.arange(len(tokens), device=tokens.device).split(micro or len(tokens)):
        logprobs = naive_logprobs(model, prompts, tokens, mask, rows, banned)
        ratio = (logprobs - (logprobs.detach() if old is None else old[rows])).exp()
        gain = torch.min(ratio * advantages[rows], ratio.clamp(0.8, 1.3) * advantages[rows])
        gain = torch.where(advantages[rows] < 0, torch.max(gain, 3 * advantages[rows]), gain)
        if reference is not None:
            with torch.no_grad():
                fixed = naive_logprobs(reference, prompts, tokens, mask, rows, banned)
            gain = gain - kl * ((fixed - logprobs).exp() - (fixed - logprobs) - 1)
        loss = -(gain * mask[rows]).sum() / mask.sum()
        loss.backward()
        total += loss.item()
    return total


def naive_turn(settings, samples, tokenizer, device, meter, banned, stop):
    model = make_model(settings, tokenizer, device)
    reference = copy.deepcopy(model).requires_grad_(False).eval() if settings.kl else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    for batch in samples:
        prompts = data.to(data.collate(batch, tokenizer), device)
        stock = {
            key: value
            for key, value in prompts.items()
            if key not in ("loss_mask", "points", "regions")
        }
        with meter.phase("rollout"), ending_at(model, settings, stop):
            tokens = model.eval().generate(
                **stock,
                num_return_sequences=settings.group,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=settings.new_tokens,
                suppress_tokens=banned.tolist(),
                eos_token_id=stop.tolist() if settings.ragged else None,
            )[:, prompts["input_ids"].shape[1] :]
        with meter.phase("update"):
            mask = (
                (torch.arange(tokens.shape[1]) < response_lengths(settings)[:, None])
                .long()
                .to(device)
            )
            naive_backward(
                model.train(),
                reference,
                prompts,
                tokens,
                mask,
                None,
                rewards_of(tokens, settings.group),
                banned,
                0.01,
                settings.micro,
            )
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def make_groups(batch, features, rewards, **rows):
    """What grpo.sample_groups returns, as far as grpo.optimizer_step reads it; rows: tokens, mask, old (B*G, T)."""
    cut = {key: value.split(rewards.shape[1]) for key, value in rows.items()}
    advantages = grpo.group_advantages(rewards)
    return [
        {
            "row": {"id": str(i)},
            "sample": sample,
            "features": features[i],
            "advantages": advantages[i],
            **{key: value[i] for key, value in cut.items()},
        }
        for i, sample in enumerate(batch)
    ]


def ours_turn(settings, samples, tokenizer, device, meter, banned, stop):
    model = make_model(settings, tokenizer, device)
    reference = (
        distributed.shard(copy.deepcopy(model).requires_grad_(False), device).eval()
        if settings.kl
        else None
    )
    model = distributed.shard(model, device)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True
    )
    learner = grpo.Learner(model, reference, optimizer, tokenizer, None, device, stop, banned)
    rules = dataclasses.replace(grpo.Settings(), kl=0.01 * settings.kl)
    for batch in samples:
        prompts = data.to(data.collate(batch, tokenizer), device)
        with meter.phase("rollout"), distributed.gathered(model), ending_at(model, settings, stop):
            tokens, mask, old_logprobs, features = rollout(
                model, prompts, settings.group, settings.new_tokens, stop, banned
            )
        assert mask.sum(1).tolist() == response_lengths(settings).tolist()
        with meter.phase("update"):
            rewards = rewards_of(tokens, settings.group)
            features = split_features(features, prompts["input_ids"], model.config)
            groups = make_groups(
                batch, features, rewards, tokens=tokens, mask=mask, old_logprobs=old_logprobs
            )
            model.train()
            grpo.optimizer_step(learner, groups, groups[0], rules)


def turn(settings):
    """One contender's steps, in a process of its own; printed as JSON."""
    device = distributed.setup(0)
    torch.set_num_threads(settings.threads)
    tokenizer, processor = make_tools(settings)
    steps = 1 + max(1, (settings.repeats + 1) // 2) + 1  # to warm up, for the time, for the memory
    settings.rows = make_rows(settings, tokenizer, processor, settings.prompts * steps)
    samples = [data.encode(row, tokenizer, processor, train=False) for row in settings.rows]
    stop = torch.tensor([tokenizer.eos_token_id], device=device)
    never = set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)) - (
        set(stop.tolist()) if settings.ragged else set()
    )
    meter = Meter(device, settings.threads, steps)
    contender = {"naive": naive_turn, "ours": ours_turn}.get(
        settings.turn
    ) or importlib.import_module("tools.bench_trl").turn
    contender(
        settings,
        [samples[i::steps] for i in range(steps)],
        tokenizer,
        device,
        meter,
        torch.tensor(sorted(never), device=device),
        stop,
    )
    print(json.dumps({**meter.result(), "rates": machine_rates(device, meter.clock)}))


def machine_rates(device, clock):
    """The machine's best: FLOP/s of a matrix product, bytes/s that a copy reads."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix, block = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.ones(2**26, device=device),
    )
    other = block.clone()
    best = [float("inf")] * 2
    for i, work in [(0, lambda: matrix @ matrix), (1, lambda: other.copy_(block))] * 5:
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best[i] = min(best[i], clock() - start)
    return 2 * size**3 / best[0], 4 * len(block) / best[1]


def least_seconds(settings, rates, size):
    """Seconds of our rollout and update at these rates: matrix products, or in decoding the bytes read if that is more.

    A decoding step reads the language model's weights and every row's keys and values; `size`: bytes a number.
    """
    (depth, vwidth, vmlp, *_), (width, layers, mlp, heads, kv, head, vocabulary, _), _ = SIZES[
        settings.model_size
    ]
    prompt, tokens, patches = (
        prompt_length(settings),
        int(response_lengths(settings).sum()),
        settings.image**2 // 256,
    )
    weights = layers * (2 * width * head * (heads + kv) + 3 * width * mlp)
    seen = prompt + settings.new_tokens / 2  # keys of a response's token, on average
    vision = (
        settings.prompts
        * depth
        * patches
        * (8 * vwidth**2 + 4 * vwidth * vmlp + 4 * vwidth * patches)
    )
    prefill = (
        settings.prompts
        * prompt
        * (
            (2 * weights + 2 * prompt * heads * head * layers) * (layers - 1) / layers
            + 4 * width * head * kv
        )
    )  # last layer: keys, values
    respond = tokens * (2 * (weights + width * vocabulary) + 4 * seen * heads * head * layers)
    read = size * (
        settings.new_tokens * (weights + width * vocabulary)
        + tokens * seen * 2 * kv * head * layers
    )
    return {
        "rollout": (vision + prefill) / rates[0] + max(respond / rates[0], read / rates[1]),
        "update": (3 + settings.kl) * (prefill + respond) / rates[0],
    }


def main():
    settings = parse(Settings, __doc__)
    if settings.model_size not in SIZES:
        raise UserError(f"--model-size {settings.model_size}: needs one of {', '.join(SIZES)}")
    if settings.turn:
        return turn(settings)
    names = ["naive", "ours"] + ["trl"] * (importlib.util.find_spec("trl") is not None)
    turns, tokens = {name: [] for name in names}, int(response_lengths(settings).sum())
    for name in names + names[::-1]:  # a drift of the machine's speed cancels out
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench", *sys.argv[1:], "--turn", name],
            text=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(settings.threads)},
        )
        if done.returncode:
            raise UserError(f"the turn of {name} failed, see above")
        result = json.loads(done.stdout.splitlines()[-1])
        turns[name].append(result)
        print(
            f"{name}: "
            + ", ".join(f"{step['step']:.3f}" for step in result["steps"])
            + " s a step",
            flush=True,
        )
    out = {}
    print(
        f"\n{settings.model_size}, {settings.prompts} x {settings.group} responses to prompts of "
        f"{prompt_length(settings)} tokens, {tokens} tokens\n"
        + " " * 6
        + "".join(f"{phase:>12} s  tokens/s   peak MB" for phase in PHASES)
    )
    for name in names:
        out[name] = {
            phase: statistics.median(step[phase] for one in turns[name] for step in one["steps"])
            for phase in PHASES
        }
        out[name] |= {f"{phase}_tokens_per_s": tokens / out[name][phase] for phase in PHASES}
        out[name] |= {
            f"{phase}_memory": max(one["memory"][phase] for one in turns[name]) for phase in PHASES
        }
        print(
            f"{name:6}"
            + "".join(
                f"{out[name][p]:14.3f}{out[name][p + '_tokens_per_s']:10.0f}"
                f"{out[name][p + '_memory'] / 1e6:10.0f}"
                for p in PHASES
            )
        )
    naive, ours, rates = out["naive"], out["ours"], result["rates"]
    out["ratio"] = {
        **{phase: naive[phase] / ours[phase] for phase in PHASES},
        "memory": ours["step_memory"] / naive["step_memory"],
    }
    print(
        "seconds naive / ours: "
        + ", ".join(f"{phase} {out['ratio'][phase]:.2f}" for phase in PHASES)
        + f"; peak memory ours / naive {out['ratio']['memory']:.2f}"
    )
    least = least_seconds(settings, rates, 2 if torch.cuda.is_available() else 4)
    print(
        f"ours at the machine's best, {rates[0] / 1e9:.0f} GFLOP/s and {rates[1] / 1e9:.1f} GB/s: "
        + ", ".join(
            f"{name} {value:.3f} s ({value / ours[name]:.0%})" for name, value in least.items()
        )
    )
    if settings.json:
        with open(settings.json, "w") as file:
            json.dump(out, file, indent=1)


if __name__ == "__main__":
    run_main(main)
