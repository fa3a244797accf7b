"""Stage 2, reinforcement learning: GRPO on both reasoning paths at once, after the cold start.

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D coordinates first).

    torchrun --nproc_per_node 2 grpo.py       # embedded world, two CPU cores: cold start and GRPO
    python grpo.py --model out/sft --data rl.json --lora 16 --checkpointing --rollout_prompts 16
    torchrun --nproc_per_node 8 grpo.py --model out/sft --data rl.json --checkpointing --resume
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 grpo.py
    python grpo.py --explain step.html        # no run: its first step, on a page with every number

For G responses to one prompt with rewards r:

    advantage                      A = (r - mean r) / (std r + 1e-6), the same for every token
    ratio of a token               w = exp(log p - log p_old)
    clipped objective              J = min(w A, clip(w, 1 - 0.2, 1 + 0.3) A); J >= 3 A where A < 0
    KL to the frozen cold start    k3 = p_ref / p - log(p_ref / p) - 1
    loss                           - sum(J - kl k3) / tokens of the optimizer step, over all ranks

Differences from the authors' release (the method is SR-REAL, arXiv 2606.17539):
1. The token mean is over all tokens of the optimizer step, across ranks and micro-batches.
   (There: over micro-batches of two responses.)
2. A group is kept if its rewards differ (by more than --min_std). --filter mean is the paper's
   rule, 0.2 < mean < 0.99, which keeps ties.
3. The sampled distribution is the scored one: temperature 1, no top-p, the same tokens banned
   in both.
4. Old log-probabilities come from the sampler itself; the log shows their distance to the training
   forward before the first update ("first_mismatch", about 0).
5. The vision side is frozen (unless --train_vision) and its features are computed once per step,
   for rollout, policy and reference. The learning rate has no warm-up.

Dimensions: B prompts, G responses per prompt, N = B G, T response tokens.
"""

import itertools
import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import eval
import rewards
import sft
from engine import distributed, explain, plan, report, watch
from engine.checkpoint import (
    Keeper,
    fingerprint,
    hold,
    load_model,
    origin_of,
    resumable_state,
    save_model,
)
from engine.lora import adapters_off, add_adapters
from engine.output import check_outputs
from engine.settings import parse, run_main, setting
from engine.shared_prefix import rollout, token_logprobs  # as in model.py, several times as fast
from formats.errors import UserError
from formats.instances import centers_of
from model import decode, join_features, split_features, token_rules
from world.sources import FRESH, MOST_FRESH, MOST_QUESTIONS, held_out, rl_blend
from world.tiny import SIZES, check_size, fill_by_size, image_side, new_model

COLD_START = "out/sft"  # the folder of the model that this program makes where there is none


@dataclass
class Settings:
    # what is trained, on what
    out: str = setting("out/grpo", "folder for the model, metrics.jsonl and the evaluations")
    model: str = setting(
        COLD_START, "cold start; made first where it is missing and --data not given"
    )
    size: str = setting("tiny", "size of a new model; tiny: 1.2 M parameters", tuple(SIZES))
    data: list = setting([], "instance files, FILE or FILE*weight; empty: the embedded world")
    scenes: str = setting("", "scenes.jsonl: train on questions about these pictures")
    skip_bad_rows: bool = setting(
        False, "count and list bad rows instead of stopping at the first", only_with=("data",)
    )
    path: str = setting(
        "both",
        "embedded world: train lor, dtr or both (paper: both)",
        ("lor", "dtr", "both"),
        not_with=("data", "scenes"),
    )
    detection: str = setting(
        "shared",
        "DTR's detection reward; shared: divided by objects or boxes, the more; boxes: by boxes, "
        "as the release does; none: 0.8 accuracy + 0.2 format",
        ("shared", "boxes", "none"),
        not_with=("path=lor",),
    )
    seed: int = setting(
        0, "seed of data order and sampling", at_least=0, below=distributed.MOST_SEEDS
    )
    # a step
    steps: int = setting(80, "rollout steps (paper: 600)", at_least=1)
    prompts: int = setting(
        0,
        "prompts per step, all ranks; 0: by --size, tiny 48 (paper: 512)",
        at_least=0,
        at_most=10**6,
    )
    group_size: int = setting(8, "responses per prompt, G (paper: n = 5)", at_least=2, at_most=1024)
    minibatches: int = setting(
        4, "optimizer steps per rollout, one pass over it (paper: 4)", at_least=1, at_most=1000
    )
    temperature: float = setting(
        1.0, "of sampling and of the scored distribution (paper: 1.0)", at_least=0.01, at_most=100
    )
    max_new_tokens: int = setting(
        160, "longest response, tokens (paper: 2048)", at_least=1, at_most=100_000
    )
    filter: str = setting(
        "spread",
        "groups to keep; spread: rewards differ; mean: the paper's 0.2 < mean < 0.99; none: all",
        ("spread", "mean", "none"),
    )
    min_std: float = setting(
        0.01,
        "spread: least standard deviation of a group's rewards",
        at_least=0,
        at_most=1,
    )
    rounds: int = setting(
        1,
        "most rollout rounds per step, to replace dropped groups (paper: 30)",
        at_least=1,
        at_most=1000,
        not_with=("filter=none",),
    )
    # the update
    normalize: str = setting(
        "sum",
        "advantages; sum: of the weighted reward; each: every reward part is normalised in its "
        "group, then weighted (GDPO)",
        ("sum", "each"),
        not_with=("detection=boxes", "detection=none"),
    )
    lr: float = setting(
        0.0,
        "constant; 0: 4e-5; above 0.3 B parameters 1e-6, the paper's; with --lora 1e-5",
        at_least=0,
        at_most=1,
    )
    weight_decay: float = setting(0.01, "of AdamW (paper: 0.01)", at_least=0, at_most=1)
    clip: float = setting(1.0, "largest gradient norm (paper: 1.0)", above=0)
    clip_low: float = setting(
        0.2, "ratio is clipped at 1 - this (paper: 0.2)", at_least=0, at_most=1
    )
    clip_high: float = setting(0.3, "and at 1 + this (paper: 0.3)", at_least=0)
    dual_clip: float = setting(
        3.0, "a negative advantage costs at most this times it (paper: 3.0)", at_least=1
    )
    kl: float = setting(
        0.02,
        "weight of the KL to the cold start; 0: no reference (paper: 0.01)",
        at_least=0,
        at_most=1000,
    )
    lora: int = setting(
        0,
        "rank of adapters on the language model; 0: train all its weights",
        at_least=0,
        at_most=1024,
    )
    train_vision: bool = setting(False, "also train the vision side (paper: frozen)")
    # the machine
    rollout_prompts: int = setting(
        0, "prompts of a rank that are rolled out at once; 0: all; bounds the KV cache", at_least=0
    )
    micro_tokens: int = setting(
        6144, "most tokens of one training pass on a rank; bounds memory", at_least=1
    )
    checkpointing: bool = setting(False, "recompute activations in backward; a third slower")
    attention: str = setting(
        "auto",
        "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed",
        ("auto", "sdpa", "flash"),
    )
    workers: int = setting(
        -1, "loader processes per rank; -1: 4 on CUDA, else none", at_least=-1, at_most=256
    )
    # keeping and telling
    questions: int = setting(
        -1,
        "held-out questions of the embedded world to evaluate on, on both paths; 0: no evaluation; "
        "-1: 1320, or none with --data or --scenes",
        at_least=-1,
        at_most=MOST_QUESTIONS,
    )
    show_every: int = setting(10, "steps between printed responses; 0: none", at_least=0)
    save_every: int = setting(
        20, "steps between checkpoints, and one at the end; 0: only at a signal", at_least=0
    )
    keep: int = setting(2, "checkpoints to keep, the newest ones", at_least=1)
    resume: bool = setting(
        False,
        "go on from the newest whole checkpoint in --out, if there is one",
        not_with=("explain",),
    )
    explain: str = setting(
        "",
        "HTML file: make the first step of this run, write a page that shows it token by token, "
        "and end; nothing is written to --out (a missing cold start is made, as in a run)",
    )
    tensorboard: bool = setting(
        False, "also write the metrics for TensorBoard", package="tensorboard"
    )
    wandb: bool = setting(False, "also send the metrics to wandb", package="wandb")


# ----------------------------------------------------------------------------------------------
# the maths: tensors in, tensors out. This block needs torch and nothing else of this file.


def group_advantages(rewards):
    """Group-normalised advantages of rewards (B, G): (r - mean) / (std + 1e-6), 0 for ties.

    The standard deviation is the unbiased one.
    """
    centered = rewards - rewards.mean(1, keepdim=True)
    advantages = centered / (rewards.std(1, keepdim=True) + 1e-6)
    tie = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (B, 1)
    return torch.where(tie, 0.0, advantages)  # exactly: the mean of ties can be off by a rounding


def decoupled_advantages(parts, weights):
    """Advantages with every reward part on its own scale: parts (B, G, K), weights (K,) -> (B, G).

    A part that varies little in a group then counts by its weight, not by how much it varies. To
    be divided by the deviation over the whole batch (`deviation`). GDPO, arXiv 2601.05242.
    """
    advantages = [group_advantages(part) for part in parts.unbind(-1)]
    return sum(weight * part for weight, part in zip(weights, advantages))


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    kl=0.02,
    terms=None,
):
    """The token loss, summed: to be divided by the tokens of the optimizer step.

    logprobs, old_logprobs, ref_logprobs (or None) and mask (N, T), 1 = token of a response, up to
    and including its stop token; advantages (N,). -> the sum, and {name: sum over tokens} to log
    terms: a dict that is given the same of each token, {name: (N, T)}, and its "loss".
    """
    advantages = advantages[:, None]  # (N, 1)
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # exp(20) is finite, exp(100) is not
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(plain, clipped)
    floored = objective.maximum(dual_clip * advantages)
    objective = torch.where(advantages < 0, floored, objective)
    loss = -objective
    stats = {
        "ratio": ratio,
        "clipped": (clipped < plain).float(),
        "mismatch": (logprobs - old_logprobs).abs(),
    }
    if ref_logprobs is not None:
        gap = (ref_logprobs - logprobs).clamp(-20, 20)  # log(p_ref / p)
        k3 = (
            gap.exp() - gap - 1
        )  # its expected gradient is that of KL(p_ref, p), not of KL(p, p_ref)
        loss = loss + kl * k3
        stats["kl"] = k3
    if terms is not None:
        terms.update(stats, loss=loss)
    in_response = mask.bool()
    sums = {name: value.detach()[in_response].sum() for name, value in stats.items()}
    return loss[in_response].sum(), sums


# ----------------------------------------------------------------------------------------------
# what a run consists of


@dataclass
class Learner:
    """What `set_up` makes and the loop uses."""

    model: torch.nn.Module  # the policy, sharded
    reference: torch.nn.Module | None  # the frozen cold start; with --lora the policy itself
    optimizer: torch.optim.Optimizer
    tokenizer: object
    processor: object
    device: torch.device
    stop_ids: torch.Tensor
    banned: torch.Tensor  # token ids that are never sampled
    generator: torch.Generator | None = None  # of the sampling; no two ranks sample alike


def set_up(settings, model, tokenizer, processor, rows, device):
    """Reference, freezing, memory plan, sharding, optimizer -> Learner."""
    if not settings.lr:
        settings.lr = default_lr(model, settings)
    reference = None
    if settings.kl > 0 and not settings.lora:
        shapes = distributed.freeze(distributed.shapes_of(model), device)
        reference = distributed.shard(shapes, device, source=model).eval()
        # Also the weights that are gathered at the root: no backward pass would free them.
        reference.set_reshard_after_forward(True)
    if settings.lora:
        add_adapters(distributed.freeze(model, device), settings.lora, settings.seed)
    elif not settings.train_vision:
        for part in (model.model.visual, model.point_embed, model.region_proj):
            distributed.freeze(part, device)
    samples = [data.encode(rows[i], tokenizer, processor, train=False) for i in range(8)]
    longest = max(samples, key=lambda sample: len(sample["prompt"]))
    image_tokens = longest["prompt"].count(model.config.image_token_id)
    plan.check(model, settings, device, len(longest["prompt"]), image_tokens)
    model = distributed.shard(model, device, settings.checkpointing)
    if settings.kl > 0 and settings.lora:
        reference = model  # without its adapters it is the cold start
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.lr,
        betas=(0.9, 0.999),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    distributed.say(
        f"GRPO: {settings.steps} steps of {settings.prompts} prompts x {settings.group_size} "
        f"responses ({settings.prompts // distributed.world_size()} prompts per rank), "
        f"{settings.minibatches} optimizer steps each; "
        f"{sum(p.numel() for p in trained):,} trained parameters"
    )
    stop_ids, banned = token_rules(model, tokenizer, device)
    generator = torch.Generator(device)
    generator.manual_seed(settings.seed * 1000 + distributed.rank())
    return Learner(
        model, reference, optimizer, tokenizer, processor, device, stop_ids, banned, generator
    )


def default_lr(model, settings):
    if not distributed.is_large(model):
        return 4e-5
    return 1e-5 if settings.lora else 1e-6


# ----------------------------------------------------------------------------------------------
# the loop


def train(settings, model, tokenizer, processor, rows, device, reward_function=None):
    """The whole stage on a blend of rows -> the trained, sharded model.

    reward_function(row, response, parts) -> what is optimized; parts: the reward parts of
    data.score, which the log always shows. Default: parts["reward"], their weighted sum.
    """
    reward_function = reward_function or whole_reward
    if settings.normalize == "each" and reward_function is not whole_reward:
        raise UserError(
            "--normalize each: normalises the parts of rewards.py, which a reward function of "
            "your own does not go through; use --normalize sum"
        )
    sources = getattr(rows, "sources", [])
    data.check_with(sources, tokenizer, processor)
    origin = origin_of(model, sources)
    learner = set_up(settings, model, tokenizer, processor, rows, device)
    if settings.explain:
        keeper = explain.Witness(settings)  # of one step: nothing is kept
    else:
        keeper = Keeper(settings, learner.model, tokenizer, processor, origin, learner.generator)
    first_step, position = keeper.begin("GRPO", settings.steps, learner.optimizer)  # 0, 0: fresh
    bar = tqdm(
        range(first_step, settings.steps),
        desc="GRPO",
        initial=first_step,
        total=settings.steps,
        disable=distributed.rank() > 0 or bool(settings.explain),
        mininterval=2,
    )
    local = settings.prompts // distributed.world_size()  # prompts per rank
    loaded = data.load_ahead(
        data.EncodedRows(rows, tokenizer, processor, train=False),
        positions_of_rank(position, settings.prompts),
        distributed.loader_workers(settings.workers, device),
        ahead=local,
    )
    for step in bar:
        # Sample, score, filter; again in up to --rounds rounds, to replace groups that were
        # dropped.
        sampled = []
        kept = []
        with distributed.gathered(learner.model):
            for _ in range(settings.rounds):
                watch.lap("data")
                prompts = list(itertools.islice(loaded, local))
                position += settings.prompts
                groups = sample_groups(learner, prompts, settings, reward_function)
                sampled += groups
                kept = (kept + [group for group in groups if group["kept"]])[:local]
                if distributed.total(len(kept)) == settings.prompts:  # the same on every rank
                    break
        # Advantages; also of groups that were dropped, since one may stand in as a filler.
        add_advantages(sampled, kept, settings)
        # Update. Ranks keep different numbers of groups: evened out, or all would wait for one.
        watch.lap("update")
        learner.model.train()
        updates = []
        mine = distributed.even_out(kept, device)
        batches = mini_batches(mine, settings.minibatches)
        if settings.explain:
            shown = explain.mark(batches, sampled)
        for groups in batches:
            stats = optimizer_step(learner, groups, sampled[0], settings, keeper.finite)
            if stats is not None:
                updates.append(stats)
        if settings.explain:
            explain_step(learner, shown, sampled, kept, updates, settings)
            return learner.model
        # Log and keep.
        watch.report_step(step, sampled, kept, updates, keeper.log, bar, settings)
        keeper.after(step + 1, position)
        del groups, batches, mine, kept, sampled  # the features, before others are made
    keeper.close()
    save_model(learner.model, tokenizer, processor, settings.out)
    return learner.model


def positions_of_rank(first, prompts):
    """Positions of this rank's rows, for as many rounds as may come, of so many prompts each."""
    local = prompts // distributed.world_size()
    for round_start in itertools.count(first, prompts):
        start = round_start + distributed.rank() * local
        yield from range(start, start + local)


# ----------------------------------------------------------------------------------------------
# sample, score, filter


def sample_groups(learner, rows, settings, reward_function):
    """Roll out and score some rows -> a list with one group, a dict, per row.

    rows: [(row, encoded sample)]. A group holds:

    row, sample: the instance, as it is and encoded; features: of its images;
    tokens, mask, old_logprobs (G, T); texts: the G responses; cut: how many of them did not end;
    parts: their reward parts (data.score); rewards (G,): what is optimized; kept: by the filter.
    """
    groups = []
    at_once = settings.rollout_prompts or len(rows)
    for start in range(0, len(rows), at_once):
        watch.lap("rollout")
        part = rows[start : start + at_once]
        groups += rollout_groups(learner, part, settings)
        watch.lap("reward")
        for group in groups[start:]:
            row = group["row"]
            group["parts"] = [data.score(row, text) for text in group["texts"]]
            group["rewards"] = torch.tensor(
                [
                    reward_function(row, text, parts)
                    for text, parts in zip(group["texts"], group["parts"])
                ]
            )
            group["kept"] = keep_group(group["rewards"], settings)
    return groups


def rollout_groups(learner, rows, settings):
    """Sample G responses to each row -> groups without rewards; see `sample_groups`."""
    samples = [sample for _, sample in rows]
    prompts = data.to(data.collate(samples, learner.tokenizer), learner.device)
    tokens, mask, old_logprobs, features = rollout(
        learner.model,
        prompts,
        settings.group_size,
        settings.max_new_tokens,
        learner.stop_ids,
        learner.banned,
        settings.temperature,
        learner.generator,
    )  # tokens, mask, old_logprobs: (N, T)
    stop = set(learner.stop_ids.tolist())
    texts, ended = decode(learner.tokenizer, tokens, mask, stop)
    features_of = split_features(features, prompts["input_ids"], learner.model.config)
    groups = []
    for i, (row, sample) in enumerate(rows):
        mine = slice(i * settings.group_size, (i + 1) * settings.group_size)
        groups.append(
            {
                "row": row,
                "sample": sample,
                "features": features_of[i],
                "tokens": tokens[mine],
                "mask": mask[mine],
                "old_logprobs": old_logprobs[mine],
                "texts": texts[mine],
                "cut": ended[mine].count(False),
            }
        )
    return groups


def add_advantages(sampled, kept, settings):
    """Advantages (G,) of the groups of this rank, by --normalize."""
    if settings.normalize == "sum":
        for group in sampled:
            group["advantages"] = group_advantages(group["rewards"][None])[0]
        return
    for group in sampled:
        group["advantages"] = decoupled_advantages(*parts_and_weights(group["parts"]))[0]
    scale = deviation(kept)
    for group in sampled:
        group["advantages"] /= scale + 1e-6


def parts_and_weights(scores):
    """The reward parts of a group's G responses as tensors (1, G, K), and their weights (K,)."""
    with_centers = scores[0]["detection"] is not None
    weights = rewards.WEIGHTS_WITH_CENTERS if with_centers else rewards.WEIGHTS
    parts = [[score[name] for name in weights] for score in scores]
    return torch.tensor([parts]), torch.tensor(list(weights.values()))


def deviation(groups):
    """Standard deviation of the advantages of all ranks' groups, whose mean is 0 in each group."""
    squares = sum(group["advantages"].square().sum().item() for group in groups)
    count = sum(len(group["advantages"]) for group in groups)
    return math.sqrt(distributed.total(squares) / max(distributed.total(count) - 1, 1))


def keep_group(rewards, settings):
    """Do the rewards (G,) of a group carry a signal? By --filter."""
    if settings.filter == "spread":
        return rewards.std().item() > settings.min_std
    if settings.filter == "mean":  # the paper's rule, which also keeps ties
        return 0.2 < rewards.mean().item() < 0.99
    return True


# ----------------------------------------------------------------------------------------------
# update


def optimizer_step(learner, groups, filler, settings, finite=None):
    """One optimizer step on this rank's groups, in micro-batches.

    filler: a group that stands in, with weight 0, where this rank has fewer micro-batches than
    others, or none. finite(loss, norm, losses): is the update sound? (Keeper.finite; default: is it
    finite?) -> means over the tokens of all ranks, to log; None where nothing was updated.
    """
    # The denominator first: the tokens of the whole step, over all ranks and micro-batches.
    tokens = distributed.total(sum(group["mask"].sum().item() for group in groups))
    if tokens == 0:
        return None
    micro = micro_batches(groups, settings.micro_tokens)
    # Every rank runs as many passes as the others, or the collectives would hang.
    passes = distributed.most(len(micro))
    sums = {}
    losses = []  # (id, loss of the pass that held it) of each group
    largest_mismatch = 0.0
    for i in range(passes):
        is_real = i < len(micro)  # else the filler, with weight 0
        distributed.sync_gradients(learner.model, last=i == passes - 1)
        loss, stats, mismatch = micro_batch_loss(
            learner, micro[i] if is_real else [filler], settings
        )
        # FSDP averages the gradients over the ranks, hence their number.
        (loss * is_real * distributed.world_size() / tokens).backward()
        if is_real:
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            losses += [(group_name(group), stats["loss"].item()) for group in micro[i]]
            largest_mismatch = max(largest_mismatch, mismatch)
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    norm = distributed.clip_gradients(trained, settings.clip)

    names = ["loss", "ratio", "clipped", "mismatch", "entropy"]
    if learner.reference is not None:
        names.append("kl")
    means = {name: distributed.total(sums.get(name, 0.0)) / tokens for name in names}
    if finite is None:
        sound = math.isfinite(means["loss"] + norm)
    else:
        sound = finite(means["loss"], norm, losses)
    if sound:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    means["mismatch_max"] = distributed.most(largest_mismatch)
    means["grad_norm"] = norm
    means["tokens"] = tokens
    explain.record_step(groups, means, sound)
    return means if sound else None


def micro_batch_loss(learner, groups, settings):
    """Forward passes and loss of some groups -> summed loss, sums to log, largest mismatch."""
    prompts, features, tokens, mask, old_logprobs, advantages = collate_groups(
        groups, learner.tokenizer, learner.device
    )
    if settings.train_vision:
        features = None  # encoded anew, with gradient
    inputs = (prompts, features, tokens, mask, learner.banned, settings.temperature)
    ref_logprobs = None
    if learner.reference is not None:
        watch.lap("reference")
        with torch.no_grad(), adapters_off(learner.reference):
            ref_logprobs, _ = token_logprobs(learner.reference, *inputs)
        watch.lap("update")
    logprobs, entropy = token_logprobs(learner.model, *inputs)  # (N, T)
    terms = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    loss, stats = grpo_loss(
        logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        mask,
        settings.clip_low,
        settings.clip_high,
        settings.dual_clip,
        settings.kl,
        terms,
    )
    explain.record_tokens(groups, terms)
    in_response = mask.bool()
    stats["loss"] = loss.detach()
    stats["entropy"] = entropy[in_response].sum()
    mismatch = (logprobs.detach() - old_logprobs)[in_response].abs().max().item()
    return loss, stats, mismatch


def collate_groups(groups, tokenizer, device):
    """Groups -> prompts, features, tokens, mask, old_logprobs (N, T) and advantages (N,).

    T: tokens of the longest response of these groups.
    """
    prompts = data.to(data.collate([group["sample"] for group in groups], tokenizer), device)
    features = join_features([group["features"] for group in groups])
    length = max(int(group["mask"].sum(1).max()) for group in groups)

    def join(key):
        cut = [group[key][:, :length] for group in groups]
        pad = torch.nn.functional.pad
        return torch.cat([pad(x, (0, length - x.shape[1])) for x in cut])

    advantages = torch.cat([group["advantages"] for group in groups]).to(device)
    return prompts, features, join("tokens"), join("mask"), join("old_logprobs"), advantages


def mini_batches(groups, count):
    """Groups in `count` runs of neighbours, one per optimizer step.

    The blend interleaves its sources evenly: each run holds all of them; every count-th group may
    not.
    """
    ends = [len(groups) * k // count for k in range(count + 1)]
    return [groups[start:end] for start, end in itertools.pairwise(ends)]


def micro_batches(groups, max_tokens):
    """Groups sorted by size, cut where a pass would exceed max_tokens with its padding.

    A group is never split.
    """
    batches = []
    for group in sorted(groups, key=lambda group: padded_tokens([group])):
        if not batches or padded_tokens(batches[-1] + [group]) > max_tokens:
            batches.append([])
        batches[-1].append(group)
    return batches


def padded_tokens(groups):
    """Tokens of a pass over some groups: each prompt once, each of its G responses."""
    prompt = max(len(group["sample"]["prompt"]) for group in groups)
    response = max(group["mask"].sum(1).max().item() for group in groups)
    responses_per_prompt = len(groups[0]["mask"])
    return len(groups) * (prompt + responses_per_prompt * response)


def group_name(group):
    return group["row"].get("id") or group["row"]["source"]


def explain_step(learner, shown, sampled, kept, updates, settings):
    """--explain: the page about a step that was made; see engine/explain.py. On all ranks.

    shown: the groups that `explain.mark` chose; the others: what the step sampled, kept and did.
    """
    prompts, features, tokens, mask, _, _ = collate_groups(shown, learner.tokenizer, learner.device)
    if settings.train_vision:
        features = None  # they have changed
    with torch.no_grad():
        new_logprobs, _ = token_logprobs(
            learner.model, prompts, features, tokens, mask, learner.banned, settings.temperature
        )  # (N, T), after the updates
    counts = {
        "sampled": int(distributed.total(len(sampled))),
        "kept": int(distributed.total(len(kept))),
        "updates": len(updates),
    }
    explain.write(settings, learner.tokenizer, shown, new_logprobs, counts)


# ----------------------------------------------------------------------------------------------
# the reward that is optimized: the whole one, or an ablation of its detection part (--detection)


def whole_reward(row, response, parts):
    return parts["reward"]


def reward_per_box(row, response, parts):
    """Detection divided by the boxes that are written: an object left out costs nothing."""
    if parts["detection"] is None:
        return parts["reward"]
    boxes = len(rewards.parse_boxes(response))
    # Undoes the division by the objects, where they are more than the boxes.
    factor = max(len(centers_of(row)), boxes) / max(boxes, 1)
    return rewards.weighted({**parts, "detection": parts["detection"] * factor})


def reward_without_detection(row, response, parts):
    return rewards.weighted({**parts, "detection": None})


REWARD_FUNCTIONS = {
    "shared": whole_reward,
    "boxes": reward_per_box,
    "none": reward_without_detection,
}


# ----------------------------------------------------------------------------------------------
# the program


def check_flags(settings, asked):
    """UserError for flags that do not go together; asked: see engine.settings.parse."""
    if settings.lora and settings.train_vision:
        raise UserError(
            "--lora trains adapters of the language model only; leave --train_vision out"
        )
    if settings.explain:
        inputs = data.user_files(settings) + eval.files_of_model(settings.model)
        check_outputs({"--explain": settings.explain}, inputs)
    if settings.data and is_made_first(settings):
        raise UserError("--model: is needed with --data, a model that sft.py made with --data")
    if "size" in asked and not is_made_first(settings):
        check_size(settings)
    if not settings.explain:
        sft.check_folders(settings)


def is_made_first(settings):
    """Is there no cold start yet where this program would make one?"""
    missing = not os.path.isfile(os.path.join(settings.model, "config.json"))
    return missing and settings.model == COLD_START


def check(settings):
    """Fill in the settings that depend on others; UserError where they can't be met."""
    fill_by_size(settings, prompts="prompts")
    ranks = distributed.world_size()
    if settings.prompts % ranks:
        raise UserError(
            f"--prompts {settings.prompts}: not divisible by {ranks} processes; use a multiple"
        )
    of_world = not settings.data and not settings.scenes
    if of_world and questions_of_run(settings) > MOST_FRESH:
        raise UserError(
            f"--prompts {settings.prompts} --steps {settings.steps} --rounds {settings.rounds}: "
            f"{questions_of_run(settings):,} questions of the embedded world; "
            f"{MOST_FRESH:,} are the most"
        )
    if settings.questions < 0:
        settings.questions = 0 if settings.data or settings.scenes else 1320
    if not settings.resume and not settings.explain:
        resumable_state(settings)  # refuses to write over a run, before any work


def cold_start(settings, device):
    """Make settings.model with the code and the settings of sft.py."""
    distributed.say(f"no cold start in {settings.model}: making one first (sft.py)")
    if settings.size == "tiny" and device.type == "cpu":
        distributed.say(
            "the whole run takes about half an hour on two cores: "
            "cold start 22 to 26 min, GRPO 5, evaluation 1"
        )
    made = sft.Settings(
        out=settings.model,
        size=settings.size,
        seed=settings.seed,
        attention=settings.attention,
        resume=settings.resume,
    )
    model, tokenizer, processor = new_model(made.size, made.seed, data.PROMPTS.values())
    distributed.use_attention(model, made.attention)
    sources = sft.sources_of(made, image_side(processor))
    sft.train(made, model, tokenizer, processor, sources, device)


def questions_of_run(settings):
    """The most that a run may ask."""
    return settings.prompts * settings.steps * settings.rounds


def sources_of(settings, side):
    """The sources of --data and --scenes, or fresh questions of the embedded world, none twice."""
    count = questions_of_run(settings)
    first_scene = FRESH + settings.seed * 10**7
    world = rl_blend(count, first_scene, side, settings.path)
    return data.user_sources(settings) or world


def load_start(settings, device):
    """The model to start from -> model, tokenizer, processor; made first where there is none."""
    if is_made_first(settings):
        cold_start(settings, device)
    model, tokenizer, processor = load_model(settings.model)
    distributed.use_attention(model, settings.attention)
    return model, tokenizer, processor


def evaluate_start(settings, model, tokenizer, processor, questions, device):
    """Greedy answers of the cold start; those of an earlier run where this one is resumed."""
    file = os.path.join(settings.out, "eval_cold_start.json")
    origin = {"model": fingerprint(model), "max_new_tokens": settings.max_new_tokens}
    if settings.resume and os.path.isfile(file):
        earlier = earlier_evaluation(file, origin)
        if len(earlier) == len(questions):
            return earlier
    shapes = distributed.freeze(distributed.shapes_of(model), device)
    model = distributed.shard(shapes, device, source=model)  # a copy that is not kept
    asked = eval.Settings(max_new_tokens=settings.max_new_tokens)
    results = eval.answer(model, tokenizer, processor, questions, device, asked, title="cold start")
    eval.write_json(file, results, origin=origin)
    return results


def earlier_evaluation(file, origin):
    """The responses in a file of `evaluate_start`; UserError where they are of another model."""
    try:
        found = eval.load_json(file)
    except UserError as error:
        raise UserError(f"{error}; remove it, and it is made again") from None
    if found.get("origin", origin) != origin:  # files of earlier versions have none
        raise UserError(
            f"{file}: of another --model or --max_new_tokens than those of this run; remove it, "
            "and it is made again"
        )
    return found["responses"]


def evaluate_end(settings, model, tokenizer, processor, questions, device, before):
    """Greedy answers after GRPO, beside those of the cold start: tables, changes, report.html."""
    asked = eval.Settings(max_new_tokens=settings.max_new_tokens)
    after = eval.answer(model, tokenizer, processor, questions, device, asked, title="after GRPO")
    eval.write_json(os.path.join(settings.out, "eval.json"), after)
    evaluations = []
    for title, results in (("cold start", before), ("GRPO", after)):
        evaluations.append((title, eval.make_table(results), results))
    eval.show_table(*((title, table) for title, table, _ in evaluations))
    for title, _, results in evaluations:
        eval.show_paths(title, results)
    eval.show_changes("GRPO against the cold start", before, after)
    page = os.path.join(settings.out, "report.html")
    report.write(page, evaluations, questions, [settings.model, settings.out])


def main():
    settings = parse(Settings, __doc__, check=check_flags)
    device = distributed.setup(settings.seed)
    check(settings)
    if not settings.explain:
        hold(settings.out)
    model, tokenizer, processor = load_start(settings, device)
    side = image_side(processor)
    blend = data.Blend(sources_of(settings, side), settings.seed)
    reward_function = REWARD_FUNCTIONS[settings.detection]
    if settings.explain:
        train(settings, model, tokenizer, processor, blend, device, reward_function)
        return
    questions = held_out(settings.questions, side) if settings.questions else []
    if questions:
        before = evaluate_start(settings, model, tokenizer, processor, questions, device)
    model = train(settings, model, tokenizer, processor, blend, device, reward_function)
    if questions:
        evaluate_end(settings, model, tokenizer, processor, questions, device, before)


if __name__ == "__main__":
    run_main(main)
