"""GRPO on both reasoning paths at once (SR-REAL, arXiv 2606.17539, stage 2), after the cold start of sft.py.

    torchrun --nproc_per_node 2 grpo.py                # embedded world, two CPU cores: cold start, GRPO, evaluation
    torchrun --nproc_per_node 8 grpo.py --model out/sft --data rl.json --size base
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 grpo.py ...

    G responses to one prompt, rewards r     A = (r - mean r) / (std r + 1e-6), the same for each token
    ratio of a token                         w = exp(log p - log p_old)
    clipped objective                        J = min(w A, clip(w, 1 - 0.2, 1 + 0.3) A), and J >= 3 A where A < 0
    KL to the frozen cold start              k3 = p_ref/p - log(p_ref/p) - 1
    loss                                     - sum(J - 0.01 k3) / tokens of the optimizer step, over all ranks

Differences from the paper's release:
1. Token mean over all tokens of the optimizer step, across ranks and micro-batches. (There: over micro-batches of two.)
2. A group is kept if its rewards differ; --filter mean is the paper's rule, 0.2 < mean < 0.99, which keeps ties.
3. The sampled distribution is the scored one: temperature 1, no top-p, the same placeholders suppressed in both.
4. Old log-probabilities come from the sampler itself; the log shows their distance to the training forward (about 0).
5. The vision side is frozen and its features are computed once a step, for rollout, policy and reference. No warm-up.
"""
import copy
import os
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import eval
import run
import sft
from model import join_features, rollout, select_features, token_logprobs
from run import setting


@dataclass
class Settings:
    out: str = setting("out/grpo", "folder for the model, metrics.jsonl and the evaluations")
    model: str = setting("out/sft", "cold start; made first when it is missing and --data is not given")
    size: str = setting("tiny", "size of a new model: tiny (1.2 M parameters), small, base")
    data: list = setting([], "instance files, FILE or FILE*weight; empty: the embedded world")
    scenes: str = setting("", "scenes.jsonl: train on questions about these pictures")
    skip_bad_rows: bool = setting(False, "count and list bad rows instead of stopping at the first")
    seed: int = setting(0, "seed of data order and sampling")
    steps: int = setting(120, "rollout steps (paper: 600)")
    prompts: int = setting(0, "prompts a step, all ranks together; 0: by --size, tiny 48 (paper: 512)")
    group_size: int = setting(8, "responses a prompt, G (paper: n = 5)")
    minibatches: int = setting(4, "optimizer steps a rollout step, one pass over the responses (paper: 4)")
    temperature: float = setting(1.0, "of sampling and of the scored distribution (paper: 1.0)")
    max_new_tokens: int = setting(160, "longest response (paper: 2048)")
    lr: float = setting(1.5e-4, "constant learning rate (paper: 1e-6 at 8 B parameters)")
    weight_decay: float = setting(0.01, "of AdamW (paper: 0.01)")
    clip: float = setting(1.0, "largest gradient norm (paper: 1.0)")
    clip_low: float = setting(0.2, "ratio is clipped at 1 - this (paper: 0.2)")
    clip_high: float = setting(0.3, "and at 1 + this (paper: 0.3)")
    dual_clip: float = setting(3.0, "a negative advantage costs at most this many times itself (paper: 3.0)")
    kl: float = setting(0.01, "weight of the KL to the cold start; 0: no reference model (paper: 0.01)")
    filter: str = setting("spread", "groups to keep: spread: rewards differ; mean: the paper's 0.2 < mean < 0.99; none")
    min_std: float = setting(0.01, "spread: smallest standard deviation of a group's rewards; less is a tie, no signal")
    rounds: int = setting(1, "most rollout rounds a step, to replace dropped groups (paper: 30)")
    train_vision: bool = setting(False, "also train the vision side (paper: frozen)")
    micro_tokens: int = setting(6144, "most tokens, with padding, of one training pass on a rank; bounds memory")
    checkpointing: bool = setting(False, "recompute activations in the backward pass (paper: on); a third slower")
    attention: str = setting("auto", "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed")
    questions: int = setting(1320, "held-out questions of the evaluation, each on both paths; 0: no evaluation")
    show_every: int = setting(10, "steps between printed responses")


# ---------------------------------------------------------------------------------------------------------------------
# the maths (tensors in, tensors out)


def group_advantages(rewards):
    """Group-normalised advantages of rewards (B, G): (r - mean) / (std + 1e-6), unbiased std; exactly 0 for ties."""
    centered = rewards - rewards.mean(1, keepdim=True)
    tie = (rewards == rewards[:, :1]).all(1, keepdim=True)  # the mean of ties can be off by a rounding error
    return torch.where(tie, 0.0, centered / (rewards.std(1, keepdim=True) + 1e-6))


def grpo_loss(logprobs, old, reference, advantages, mask, clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl=0.01):
    """Summed token loss, to be divided by the tokens of the optimizer step; and sums for the log.

    logprobs, old, reference (or None), mask (1 = token of the response, with its stop token): (N, T); advantages (N,).
    """
    advantages = advantages[:, None]
    ratio = (logprobs - old).clamp(-20, 20).exp()           # (N, T); exp(20) is finite, exp(100) is not
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(plain, clipped)
    objective = torch.where(advantages < 0, objective.maximum(dual_clip * advantages), objective)
    loss = -objective
    stats = {"ratio": ratio, "clipped": (clipped < plain).float(), "mismatch": (logprobs - old).abs()}
    if reference is not None:
        gap = (reference - logprobs).clamp(-20, 20)         # log p_ref / p
        k3 = gap.exp() - gap - 1                            # its gradient is that of KL(p_ref, p), not of KL(p, p_ref)
        loss = loss + kl * k3
        stats["kl"] = k3
    keep = mask.bool()
    return loss[keep].sum(), {name: value.detach()[keep].sum() for name, value in stats.items()}


# ---------------------------------------------------------------------------------------------------------------------
# rollout -> reward -> groups


def sample_groups(model, rows, tokenizer, processor, rules, settings, generator, device):
    """Roll out and score the rows. -> one dict a group: prompt, features, tokens, mask, old log-probs, rewards, .."""
    stop, banned = rules
    samples = [data.encode(row, tokenizer, processor, train=False) for row in rows]
    prompts = data.to(data.collate(samples, tokenizer), device)
    tokens, mask, old, features = rollout(model, prompts, settings.group_size, settings.max_new_tokens, stop, banned,
                                          settings.temperature, generator)
    texts, ended = eval.decode(tokenizer, tokens, mask, set(stop.tolist()))
    groups, first = [], 0
    for i, (row, sample) in enumerate(zip(rows, samples)):
        mine = slice(i * settings.group_size, (i + 1) * settings.group_size)
        parts = [eval.score(row, text) for text in texts[mine]]
        regions = slice(first, first := first + len(sample["regions"]))
        groups.append({"row": row, "sample": sample, "features": select_features(features, [i], regions),
                       "tokens": tokens[mine], "mask": mask[mine], "old": old[mine], "texts": texts[mine],
                       "rewards": torch.tensor([p["reward"] for p in parts]), "parts": parts,
                       "cut": ended[mine].count(False)})
    return groups


def keep_group(group, settings):
    """Does the group carry a signal? spread: its rewards differ. mean: the paper's rule, which also keeps ties."""
    mean, std = group["rewards"].mean().item(), group["rewards"].std().item()
    return {"spread": std > settings.min_std, "mean": 0.2 < mean < 0.99, "none": True}[settings.filter]


def micro_batches(groups, max_tokens):
    """Groups sorted by length, cut where a pass would exceed max_tokens with its padding. A group is never split."""
    prompt, response = lambda g: len(g["sample"]["prompt"]), lambda g: g["mask"].sum(1).max().item()
    padded = lambda part: len(part) * (max(map(prompt, part)) + len(part[0]["mask"]) * max(map(response, part)))
    parts = []
    for group in sorted(groups, key=lambda g: padded([g])):
        if not parts or padded(parts[-1] + [group]) > max_tokens:
            parts.append([])
        parts[-1].append(group)
    return parts


def collate_groups(groups, tokenizer, device):
    """Groups -> prompts, features, tokens, mask, old (N, T), cut to the longest response, and advantages (N,)."""
    prompts = data.to(data.collate([g["sample"] for g in groups], tokenizer), device)
    length = max(int(g["mask"].sum(1).max()) for g in groups)
    pad = lambda x: torch.nn.functional.pad(x[:, :length], (0, length - min(length, x.shape[1])))
    tokens, mask, old = (torch.cat([pad(g[key]) for g in groups]) for key in ("tokens", "mask", "old"))
    advantages = torch.cat([group_advantages(g["rewards"][None])[0] for g in groups]).to(device)
    return prompts, join_features([g["features"] for g in groups]), tokens, mask, old, advantages


# ---------------------------------------------------------------------------------------------------------------------
# one optimizer step


def optimizer_step(model, reference, optimizer, groups, filler, tokenizer, banned, settings, device):
    """One step on this rank's groups (maybe none: then `filler` takes part in the collectives with weight 0).

    -> sums over tokens and ranks, for the log; None if no rank has a token.
    """
    tokens = run.total(sum(g["mask"].sum().item() for g in groups))                          # the denominator, first
    if tokens == 0:
        return None
    parts = micro_batches(groups, settings.micro_tokens)
    rounds = run.most(len(parts))                           # every rank runs as many passes, or the collectives hang
    sums, worst = {}, 0.0
    for i in range(rounds):
        real = i < len(parts)
        batch = collate_groups(parts[i] if real else [filler], tokenizer, device)
        prompts, features, ids, mask, old, advantages = batch
        features = None if settings.train_vision else features
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref, _ = token_logprobs(reference, prompts, features, ids, mask, banned, settings.temperature)
        model.set_requires_gradient_sync(i == rounds - 1)
        logprobs, entropy = token_logprobs(model, prompts, features, ids, mask, banned, settings.temperature)
        loss, stats = grpo_loss(logprobs, old, ref, advantages, mask, settings.clip_low, settings.clip_high,
                                settings.dual_clip, settings.kl)
        (loss * real * run.world() / tokens).backward()     # FSDP averages over the ranks, hence their number
        if real:
            stats |= {"loss": loss.detach(), "entropy": entropy[mask.bool()].sum()}
            worst = max(worst, (logprobs.detach() - old)[mask.bool()].abs().max().item())
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in stats.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip).full_tensor().item()
    if norm == norm and norm < float("inf"):                # a non-finite gradient skips the step
        optimizer.step()
    optimizer.zero_grad()
    names = ["loss", "ratio", "clipped", "mismatch", "entropy"] + ["kl"] * (reference is not None)
    return {**{name: run.total(sums.get(name, 0.0)) / tokens for name in names}, "mismatch_max": run.most(worst),
            "grad_norm": norm, "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def train(settings, model, tokenizer, processor, rows, device):
    """The whole RL stage on a blend of rows. -> the trained (sharded) model"""
    local, log = settings.prompts // run.world(), run.Log(settings.out)
    reference = run.shard(copy.deepcopy(model).requires_grad_(False), device).eval() if settings.kl > 0 else None
    if not settings.train_vision:
        for part in (model.model.visual, model.point_embed, model.region_proj):
            part.requires_grad_(False)
    model = run.shard(model, device, settings.checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.999), weight_decay=settings.weight_decay)
    run.say(f"GRPO: {settings.steps} steps of {settings.prompts} prompts x {settings.group_size} responses ({local} "
            f"prompts a rank), {settings.minibatches} optimizer steps each; "
            f"{sum(p.numel() for p in trained):,} trained parameters")
    rules = eval.token_rules(model, tokenizer, device)
    generator = torch.Generator(device).manual_seed(settings.seed * 1000 + run.rank())       # no two ranks sample alike
    bar, position = tqdm(range(settings.steps), desc="GRPO", disable=run.rank() > 0, mininterval=2), 0
    for step in bar:
        start, kept, seen = time.time(), [], []
        with run.gathered(model):
            for round_ in range(settings.rounds):           # the same number on every rank: decided on sums
                mine = [rows[position + run.rank() * local + i] for i in range(local)]
                position += settings.prompts
                groups = sample_groups(model, mine, tokenizer, processor, rules, settings, generator, device)
                seen += groups
                kept = (kept + [g for g in groups if keep_group(g, settings)])[:local]
                if run.total(len(kept)) == settings.prompts:
                    break
        rolled, model_steps = time.time(), []
        model.train()
        for k in range(settings.minibatches):
            stats = optimizer_step(model, reference, optimizer, kept[k::settings.minibatches], seen[0], tokenizer,
                                   rules[1], settings, device)
            model_steps += [stats] if stats else []
        report(step, seen, kept, model_steps, log, bar, settings, rolled - start, time.time() - rolled)
    run.save_model(model, tokenizer, processor, settings.out)
    return model


def report(step, seen, kept, model_steps, log, bar, settings, rollout_s, update_s):
    """Rank-averaged metrics of a step: one JSON line, the bar, and now and then one whole response."""
    line = {"step": step, "rollout_s": round(rollout_s, 2), "update_s": round(update_s, 2)}
    for path in ("lor", "dtr"):
        parts = [p for g in seen if data.path_of(g["row"]) == path for p in g["parts"]]
        for key in eval.METRICS:
            values = [p[key] for p in parts if p[key] is not None]
            count = run.total(len(values))
            if count:
                line[f"{path}_{key}"] = run.total(sum(values)) / count
    responses = run.total(sum(len(g["parts"]) for g in seen))
    dropped = [g["rewards"].mean().item() for g in seen if not keep_group(g, settings)]
    groups, low = run.total(len(seen)), run.total(sum(mean < 0.5 for mean in dropped))
    line["rounds"], line["kept"] = len(seen) // (settings.prompts // run.world()), run.total(len(kept)) / groups
    line["dropped_low"] = low / groups                      # no signal because too hard (mean reward below 0.5)
    line["dropped_high"] = (run.total(len(dropped)) - low) / groups                          # .. because too easy
    line["cut"] = run.total(sum(g["cut"] for g in seen)) / responses
    line["length"] = run.total(sum(g["mask"].sum().item() for g in seen)) / responses
    for key in model_steps[0] if model_steps else []:
        line[key] = sum(s[key] for s in model_steps) / len(model_steps)
    if model_steps:
        line["mismatch_max"] = max(s["mismatch_max"] for s in model_steps)
        line |= {f"first_{key}": model_steps[0][key] for key in ("ratio", "mismatch", "mismatch_max")}
    log.write(**line)
    shown = [key for key in ("lor_reward", "dtr_reward", "dtr_detection", "kl") if key in line]
    bar.set_postfix({key: f"{line[key]:.3f}" for key in shown}, refresh=False)
    if run.rank() == 0 and settings.show_every and step % settings.show_every == 0:
        group = seen[step % len(seen)]
        reward = ", ".join(f"{k} {group['parts'][0][k]:.2f}" for k in eval.METRICS if group["parts"][0][k] is not None)
        bar.write(f"--- step {step}: {data.question_of(group['row'])}\n{group['texts'][0]}\n"
                  f"    truth {data.answer_of(group['row'])}; {reward}")


def cold_start(settings, device):
    """Make settings.model with the code and the settings of sft.py."""
    run.say(f"no cold start in {settings.model}: making one first (sft.py)")
    if settings.size == "tiny" and device.type == "cpu":
        run.say("the whole run takes about 26 minutes on two cores: cold start 15, GRPO 9, evaluation 2")
    made = sft.Settings(out=settings.model, size=settings.size, seed=settings.seed, attention=settings.attention)
    model, tokenizer, processor = run.new_model(made.size, made.seed, made.attention)
    sft.train(made, model, tokenizer, processor, sft.sources_of(made, run.image_side(processor)), device)


def sources_of(settings, side):
    """The blend of --data and --scenes, or fresh questions of the embedded world, none twice."""
    count = settings.prompts * settings.steps * settings.rounds
    return data.user_sources(settings) or data.rl_blend(count, 10**8 + settings.seed * 10**7, side)


def main():
    settings = run.parse(Settings, __doc__)
    device = run.setup(settings.seed)
    run.by_size(settings, prompts="prompts")
    if settings.prompts % run.world():
        raise run.UserError(f"--prompts {settings.prompts}: not divisible by {run.world()} processes; use a multiple")
    if settings.steps < 1 or settings.minibatches < 1 or settings.group_size < 2:
        raise run.UserError("--steps and --minibatches need at least 1, --group_size at least 2")
    if not os.path.isfile(os.path.join(settings.model, "config.json")) and settings.model == "out/sft":
        cold_start(settings, device)
    model, tokenizer, processor = run.load_model(settings.model, settings.attention)
    blend = data.Blend(sources_of(settings, run.image_side(processor)), settings.seed)
    held_out = eval.held_out(settings.questions, run.image_side(processor)) if settings.questions else []
    asked = eval.Settings(max_new_tokens=settings.max_new_tokens)
    if held_out:
        start = run.shard(copy.deepcopy(model), device)
        before = eval.answer(start, tokenizer, processor, held_out, device, asked, "cold start")
        eval.write_json(os.path.join(settings.out, "eval_cold_start.json"), before)
    model = train(settings, model, tokenizer, processor, blend, device)
    if held_out:
        after = eval.answer(model, tokenizer, processor, held_out, device, asked, "after GRPO")
        eval.write_json(os.path.join(settings.out, "eval.json"), after)
        eval.show_table(("cold start", eval.make_table(before)), ("GRPO", eval.make_table(after)))
        eval.show_paths("cold start", before)
        eval.show_paths("GRPO", after)
        eval.show_changes("GRPO against the cold start", before, after)


if __name__ == "__main__":
    run.main(main)
