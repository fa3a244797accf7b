"""One step of GRPO or SFT at the real size, on fake CUDA: no GPU, no weights, a minute.

    python -m tools.dryrun --size 8B --world 8             # GRPO, the rank 0 of 8
    python -m tools.dryrun --size 4B --world 1 --lora 16   # does it fit on a card of 24 GB?
    python -m tools.dryrun --size 8B --world 8 --stage sft
    python -m tools.dryrun --size 8B --layers 2            # only two layers of these widths: 12 s

The stage's own train() runs on tensors that have shape, dtype and device but no numbers
(tools/fake_cuda.py), so that an operation that CUDA would refuse is refused here. The bytes of all
tensors on the card are counted. Printed, per phase of a step: what was on the card at its peak, by
kind, beside what engine/plan.py says of it. A real card needs 2 to 3 GB more: the CUDA context,
NCCL's buffers, fragmentation.
"""

import contextlib
import functools
import json
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

import data
import grpo
import model as model_file
import sft
from engine import checkpoint, distributed, plan, shared_prefix, watch
from engine.output import check_outputs, whole_file
from engine.settings import parse, run_main, setting
from formats.errors import UserError
from tools import bench, fake_cuda
from tools.fake_cuda import CPU, CUDA

SIZES = ("2B", "4B", "8B")
ROWS = 4  # instances that differ; the rows of a run are these, again and again
SHOWN = 0.1  # GB; smaller amounts are not listed


@dataclass
class Settings:
    size: str = setting("8B", "the shapes of Qwen3-VL", SIZES)
    world: int = setting(8, "ranks; this is the first of them", at_least=1, at_most=10_000)
    stage: str = setting("grpo", "what is run", ("grpo", "sft"))
    lora: int = setting(
        0,
        "rank of adapters; 0: all weights of the language model are trained",
        at_least=0,
        at_most=1024,
        not_with=("stage=sft",),
    )
    kl: float = setting(
        0.02,
        "weight of the KL; 0: no reference model",
        at_least=0,
        at_most=1000,
        not_with=("stage=sft",),
    )
    layers: int = setting(
        0, "layers of the language model and of the vision tower; 0: all", at_least=0, at_most=100
    )
    image: int = setting(768, "side of the pictures, pixels", at_least=32, at_most=4096)
    words: int = setting(40, "words of a question", at_least=0, at_most=100_000)
    prompts: int = setting(
        16, "GRPO: prompts per rank and step; SFT: rows", at_least=1, at_most=10_000
    )
    group_size: int = setting(
        8, "responses per prompt", at_least=2, at_most=1024, not_with=("stage=sft",)
    )
    max_new_tokens: int = setting(
        512, "tokens of every response", at_least=1, at_most=100_000, not_with=("stage=sft",)
    )
    target_words: int = setting(
        650, "SFT: words of a target", at_least=1, at_most=100_000, only_with=("stage=sft",)
    )
    micro_tokens: int = setting(4096, "most tokens of one training pass", at_least=1)
    checkpointing: bool = setting(True, "recompute activations in the backward pass")
    json: str = setting("", "file for the numbers")


# ----------------------------------------------------------------------------------------------
# what is trained on what


def make_row(seed, settings):
    rng = np.random.default_rng(seed)
    side = settings.image
    question = "How far is red bbox <mask> from blue bbox <mask>" + " x" * (settings.words + seed)
    return {
        "source": f"row {seed}",
        "image": rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        "depth": rng.uniform(1, 6, (side, side)).astype(np.float32),
        "intrinsics": [500.0, 500.0, side / 2, side / 2],
        "bbox": [[0, 0, side // 4, side // 4], [side // 2, 0, side, side // 2]],
        "3d_pos": {},
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": " x" * settings.target_words + "<answer>3</answer>"},
        ],
    }


class EndlessRows:
    """A source of as many rows as a stage may ask for."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return 10**6

    def __getitem__(self, position):
        return self.rows[position % len(self.rows)]


def sizes_with_layers(size, layers):
    """The entry of bench.SIZES with fewer layers, of the same widths."""
    vision, text, sections = bench.SIZES[size]
    if not layers:
        return vision, text, sections
    return (layers, *vision[1:4], [0], vision[5]), (text[0], layers, *text[2:]), sections


# ----------------------------------------------------------------------------------------------
# the run


class Recorder:
    """The peak of every phase that a stage begins (watch.lap): {phase: (bytes, {kind: bytes})}."""

    def __init__(self, card):
        self.card = card
        self.phases = {}

    def lap(self, phase):
        """Stands for watch.lap."""
        card = self.card
        ended = watch.now["phase"]
        peak, _ = self.phases.get(ended, (-1, {}))
        if card.peak > peak:
            self.phases[ended] = card.peak, card.at_peak
        watch.now["phase"] = phase
        card.kind = "activations"
        card.in_update = phase == "update"
        card.restart_peak()


def name_kinds(card):
    """Whose allocations count as what; all others are "activations"."""
    for owner, name, kind in (
        (FSDPParamGroup, "unshard", "gathered weights"),
        (FSDPParamGroup, "wait_for_unshard", "gathered weights"),
        (FSDPParamGroup, "post_backward", "gradients"),
        (torch.optim.AdamW, "step", "optimizer"),
        (shared_prefix.DecodeCache, "__init__", "KV cache"),
    ):
        card.tag(owner, name, kind)
    shard = distributed.shard
    encode_images = model_file.RegionVLM.encode_images

    def tagged_encode_images(*args):
        features = encode_images(*args)
        card.relabel(features, "features")
        return features

    def tagged_shard(*args, source=None, **kwargs):
        card.kind = "weights" if source is None else "reference"
        sharded = shard(*args, source=source, **kwargs)
        card.kind = "activations"
        for parameter in sharded.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter: card.relabel(parameter.grad, "gradients")
                )
        return sharded

    distributed.shard = tagged_shard
    model_file.RegionVLM.encode_images = tagged_encode_images


def stand_ins(card, settings, rows, tokenizer, processor):
    """Replace what needs real numbers or other ranks: collectives of objects, pictures, scores."""
    distributed.total = lambda value: float(value) * settings.world
    distributed.most = lambda value: value
    distributed.gather = lambda values: list(values) * settings.world

    collate = data.collate
    encoded = {}
    for row in rows:
        for train in (False, True):
            encoded[row["source"], train] = data.encode(row, tokenizer, processor, train)

    def fake_batch(samples, tokenizer):
        with _disable_current_modes():
            batch = collate(samples, tokenizer)
        return {key: card.new(value, value.shape, value, CPU) for key, value in batch.items()}

    data.collate = fake_batch
    data.encode = lambda row, tokenizer, processor, train: dict(encoded[row["source"], train])
    data.load_ahead = lambda rows, positions, *args, **kwargs: (rows[i] for i in positions)
    distributed.even_out = lambda items, device: items
    checkpoint.fingerprint = lambda model: "of weights without numbers"

    scores = iter(range(10**9))

    def score(row, response):
        """Rewards that differ within a group."""
        parts = dict.fromkeys(data.METRICS, 0.5)
        return {**parts, "detection": None, "reward": next(scores) % 7 / 7, "center_errors_m": []}

    data.score = score


def full_length(card, groups, settings):
    """Groups as if every response had --max_new_tokens tokens: only a few were really sampled."""

    def filled(like, number):
        values = torch.full((settings.group_size, settings.max_new_tokens), number)
        return card.new(like, values.shape, values)

    long_groups = []
    for group in groups:
        longer = {
            "tokens": filled(group["tokens"], 30),
            "mask": filled(group["mask"], 1),
            "old_logprobs": filled(group["tokens"], 0).float(),
        }
        long_groups.append({**group, **longer})
    return long_groups


def run_grpo(card, settings, model, tokenizer, processor, rows, common):
    """Two steps, each a rollout of three tokens and an optimizer step on two groups of full length.

    The second step is that of a run that goes on: Adam's moments are there.
    """
    sample_groups = grpo.sample_groups
    grpo.sample_groups = lambda *args: full_length(card, sample_groups(*args), settings)
    grpo.mini_batches = lambda groups, count: [groups[:2]]
    of_grpo = grpo.Settings(
        **common,
        steps=2,
        prompts=settings.prompts * settings.world,
        group_size=settings.group_size,
        kl=settings.kl,
        lora=settings.lora,
        filter="none",
        max_new_tokens=settings.max_new_tokens,
        show_every=0,
    )
    grpo.train(of_grpo, model, tokenizer, processor, rows, CUDA)
    return of_grpo


def run_sft(settings, model, tokenizer, processor, rows, common):
    of_sft = sft.Settings(
        **common, model="x", steps=2, pretrain=0, batch=settings.prompts * settings.world
    )
    sft.train(of_sft, model, tokenizer, processor, [("rows", rows, 1.0)], CUDA)
    return of_sft


def dry_run(settings):
    """-> {"peak_gb", "phases": {name: {"peak_gb", "tracked": {kind: gb}, "plan": {term: gb}}}}

    It changes this process for good: torch is not to be used for anything else after it.
    """
    if not fake_cuda.is_supported():
        raise UserError(
            f"tools.dryrun reaches into the insides of torch {fake_cuda.TORCH}; "
            f"this is torch {torch.__version__}"
        )
    fake_cuda.install()
    dist.init_process_group("fake", rank=0, world_size=settings.world, store=FakeStore())
    bench.SIZES[settings.size] = sizes_with_layers(settings.size, settings.layers)
    of_bench = bench.Settings(model_size=settings.size, image=settings.image)
    tokenizer, processor = bench.make_tools(of_bench)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    steps = 0
    choose_tokens = shared_prefix.choose_tokens

    def counted_choose_tokens(*args):
        nonlocal steps
        steps += 1
        return choose_tokens(*args)

    shared_prefix.choose_tokens = counted_choose_tokens
    shared_prefix.TokenStep.record = lambda *args: None  # a CUDA graph needs a real card

    def sampled(like):
        """Sampled tokens: the third one ends all responses."""
        if steps % 3 == 0:
            return torch.full(like.shape, stop)
        return torch.randint(20, 500, like.shape)

    vocabulary = bench.SIZES[settings.size][1][-2]
    card = fake_cuda.FakeCard(sampled, vocabulary)
    fake_cuda.patch(card)
    rows = [make_row(seed, settings) for seed in range(ROWS)]
    stand_ins(card, settings, rows, tokenizer, processor)
    name_kinds(card)
    recorder = Recorder(card)
    watch.lap = recorder.lap
    for stage in (sft, grpo):
        stage.save_model = lambda *args: None
    plans = {}
    memory = plan.memory
    plan.memory = lambda *args: plans.setdefault("plan", memory(*args))
    common = {
        "out": tempfile.mkdtemp(),
        "checkpointing": settings.checkpointing,
        "micro_tokens": settings.micro_tokens,
        "save_every": 0,
        "workers": 0,
    }
    with card:
        model = bench.make_model(of_bench, tokenizer, CPU).requires_grad_(True)
        model.generation_config.eos_token_id = stop
        card.weight_shapes = {p.shape for p in model.parameters() if p.dim() == 2}
        stage = functools.partial(run_grpo, card) if settings.stage == "grpo" else run_sft
        stage(settings, model, tokenizer, processor, EndlessRows(rows), common)
    recorder.lap("end")
    return report(recorder.phases, plans["plan"])


# ----------------------------------------------------------------------------------------------
# the report


def in_gb(amounts):
    """{name: GB}, largest first, without the small ones."""
    gb = {name: value / 1e9 for name, value in amounts.items() if value / 1e9 >= SHOWN}
    return dict(sorted(gb.items(), key=lambda item: -item[1]))


def report(phases, planned):
    out = {}
    for phase, (peak, kinds) in phases.items():
        terms = {}
        if planned.get(phase):
            terms = {**planned["always"], **planned[phase]}
        out[phase] = {"peak_gb": peak / 1e9, "tracked": in_gb(kinds), "plan": in_gb(terms)}
    return {"peak_gb": max(line["peak_gb"] for line in out.values()), "phases": out}


def show(settings, numbers, seconds):
    what = f"Qwen3-VL-{settings.size}, {settings.stage}, {settings.world} ranks"
    if settings.lora:
        what += f", LoRA {settings.lora}"
    print(f"\n{what}: GB per rank, as tracked and as planned")
    for phase, line in numbers["phases"].items():
        total = f"{sum(line['plan'].values()):.2f}" if line["plan"] else ""
        print(f"\n{phase:24}{line['peak_gb']:10.2f}{total:>10}")
        for kind in {**line["tracked"], **line["plan"]}:
            tracked = line["tracked"].get(kind)
            term = line["plan"].get(kind)
            cells = ["" if x is None else f"{x:.2f}" for x in (tracked, term)]
            print(f"    {kind:20}{cells[0]:>10}{cells[1]:>10}")
    print(f"\npeak {numbers['peak_gb']:.1f} GB per rank; {seconds:.0f} s")


def main():
    settings = parse(Settings, __doc__)
    check_outputs({"--json": settings.json})
    start = time.monotonic()
    with contextlib.redirect_stdout(None):  # of the stage
        numbers = dry_run(settings)
    try:
        if settings.json:
            with whole_file(settings.json, "--json") as file:
                json.dump(numbers, file, indent=1)
    finally:  # shown also where it can't be written
        show(settings, numbers, time.monotonic() - start)


if __name__ == "__main__":
    run_main(main)
