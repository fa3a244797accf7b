"""GRPO on both reasoning paths at once (SR-REAL, arXiv 2606.17539, stage 2), after the cold start of sft.py.

    torchrun --nproc_per_node 2 grpo.py                # embedded world, two CPU cores: cold start, GRPO, evaluation
    python grpo.py --model out/sft --data rl.json --lora 16 --checkpointing --rollout_prompts 16         # one card
    torchrun --nproc_per_node 8 grpo.py --model out/sft --data rl.json --checkpointing --rollout_prompts 16 --resume
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 grpo.py ...

    G responses to one prompt, rewards r     A = (r - mean r) / (std r + 1e-6), the same for each token
    ratio of a token                         w = exp(log p - log p_old)
    clipped objective                        J = min(w A, clip(w, 1 - 0.2, 1 + 0.3) A), and J >= 3 A where A < 0
    KL to the frozen cold start              k3 = p_ref/p - log(p_ref/p) - 1
    loss                                     - sum(J - kl k3) / tokens of the optimizer step, over all ranks

Differences from the paper's release:
1. Token mean over all tokens of the optimizer step, across ranks and micro-batches. (There: over micro-batches of two.)
2. A group is kept if its rewards differ; --filter mean is the paper's rule, 0.2 < mean < 0.99, which keeps ties.
3. The sampled distribution is the scored one: temperature 1, no top-p, the same placeholders suppressed in both.
4. Old log-probabilities come from the sampler itself; the log shows their distance to the training forward (about 0).
5. The vision side is frozen and its features are computed once a step, for rollout, policy and reference. No warm-up.
"""
import copy
import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

import checkpoint
import data
import eval
import plan
import rewards
import run
import sft
import watch
from model import add_adapters, adapters_off, join_features, rollout, select_features, token_logprobs
from run import setting


@dataclass
class Settings:
    out: str = setting("out/grpo", "folder for the model, metrics.jsonl and the evaluations")
    model: str = setting("out/sft", "cold start; made first when it is missing and --data is not given")
    size: str = setting("tiny", "size of a new model: tiny (1.2 M parameters), small, base")
    data: list = setting([], "instance files, FILE or FILE*weight; empty: the embedded world")
    scenes: str = setting("", "scenes.jsonl: train on questions about these pictures")
    skip_bad_rows: bool = setting(False, "count and list bad rows instead of stopping at the first")
    path: str = setting("both", "embedded world: train lor, dtr or both (the paper: both)", ("lor", "dtr", "both"))
    detection: str = setting("shared", "DTR's detection reward: shared: divided by objects or boxes (the more); "
                                       "boxes: by boxes, as the release does; none: 0.8 accuracy + 0.2 format",
                             ("shared", "boxes", "none"))
    seed: int = setting(0, "seed of data order and sampling")
    steps: int = setting(80, "rollout steps (paper: 600)")
    prompts: int = setting(0, "prompts a step, all ranks together; 0: by --size, tiny 48 (paper: 512)")
    group_size: int = setting(8, "responses a prompt, G (paper: n = 5)")
    minibatches: int = setting(4, "optimizer steps a rollout step, one pass over the responses (paper: 4)")
    temperature: float = setting(1.0, "of sampling and of the scored distribution (paper: 1.0)")
    max_new_tokens: int = setting(160, "longest response (paper: 2048)")
    lr: float = setting(0.0, "constant learning rate; 0: 4e-5; 1e-6 above 0.3 B parameters, the paper's; with --lora "
                             "1e-5")
    weight_decay: float = setting(0.01, "of AdamW (paper: 0.01)")
    clip: float = setting(1.0, "largest gradient norm (paper: 1.0)")
    clip_low: float = setting(0.2, "ratio is clipped at 1 - this (paper: 0.2)")
    clip_high: float = setting(0.3, "and at 1 + this (paper: 0.3)")
    dual_clip: float = setting(3.0, "a negative advantage costs at most this many times itself (paper: 3.0)")
    kl: float = setting(0.02, "weight of the KL to the cold start; 0: no reference model (paper: 0.01)")
    filter: str = setting("spread", "groups to keep: spread: rewards differ; mean: the paper's 0.2 < mean < 0.99; none",
                          ("spread", "mean", "none"))
    min_std: float = setting(0.01, "spread: smallest standard deviation of a group's rewards; less is a tie, no signal")
    rollout_prompts: int = setting(0, "prompts of a rank that are rolled out at once; 0: all; bounds the KV cache")
    rounds: int = setting(1, "most rollout rounds a step, to replace dropped groups (paper: 30)")
    lora: int = setting(0, "rank of adapters on the language model's linear layers; 0: train all its weights")
    train_vision: bool = setting(False, "also train the vision side (paper: frozen)")
    micro_tokens: int = setting(6144, "most tokens, with padding, of one training pass on a rank; bounds memory")
    checkpointing: bool = setting(False, "recompute activations in the backward pass (paper: on); a third slower")
    attention: str = setting("auto", "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed")
    questions: int = setting(-1, "held-out questions of the embedded world to evaluate on, on both paths; 0: no "
                                 "evaluation; -1: 1320, or none with --data or --scenes")
    show_every: int = setting(10, "steps between printed responses")
    save_every: int = setting(20, "steps between checkpoints, and one at the end; 0: only when stopped by a signal")
    keep: int = setting(2, "checkpoints to keep, the newest ones")
    resume: bool = setting(False, "go on from the newest whole checkpoint in --out; from the start if there is none")
    tensorboard: bool = setting(False, "also write the metrics for TensorBoard")
    wandb: bool = setting(False, "also send the metrics to wandb")


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


def trained_reward(row, text, parts, detection):
    """The reward that is optimized: the whole one, or with --detection an ablation. Logs always show the whole one."""
    if parts["detection"] is None or detection == "shared":
        return parts["reward"]
    if detection == "none":
        return rewards.weighted({**parts, "detection": None})
    boxes = len(rewards.parse_boxes(text))
    surplus = max(len(data.centers_of(row)), boxes) / max(boxes, 1)                          # objects left out: free
    return rewards.weighted({**parts, "detection": parts["detection"] * surplus})


def sample_groups(model, rows, tokenizer, processor, rules, settings, generator, device):
    """Roll out and score the rows. -> one dict a group: prompt, features, tokens, mask, old log-probs, rewards, .."""
    watch.lap("rollout")
    stop, banned = rules
    samples = [data.encode(row, tokenizer, processor, train=False) for row in rows]
    prompts = data.to(data.collate(samples, tokenizer), device)
    tokens, mask, old, features = rollout(model, prompts, settings.group_size, settings.max_new_tokens, stop, banned,
                                          settings.temperature, generator)
    watch.lap("reward")
    texts, ended = eval.decode(tokenizer, tokens, mask, set(stop.tolist()))
    groups, first, seen = [], 0, 0
    for i, (row, sample) in enumerate(zip(rows, samples)):
        mine = slice(i * settings.group_size, (i + 1) * settings.group_size)
        parts = [eval.score(row, text) for text in texts[mine]]
        regions = slice(first, first := first + len(sample["regions"]))
        images = range(seen, seen := seen + len(sample["image_grid_thw"]))
        groups.append({"row": row, "sample": sample, "features": select_features(features, images, regions),
                       "tokens": tokens[mine], "mask": mask[mine], "old": old[mine], "texts": texts[mine],
                       "rewards": torch.tensor([trained_reward(row, text, part, settings.detection)
                                                for text, part in zip(texts[mine], parts)]), "parts": parts,
                       "cut": ended[mine].count(False)})
    return groups


def keep_group(group, settings):
    """Does the group carry a signal? spread: its rewards differ. mean: the paper's rule, which also keeps ties."""
    mean, std = group["rewards"].mean().item(), group["rewards"].std().item()
    return {"spread": std > settings.min_std, "mean": 0.2 < mean < 0.99, "none": True}[settings.filter]


def mini_batches(groups, count):
    """Groups in `count` runs of neighbours. The blend interleaves its sources evenly, so that each run holds all of
    them; every count-th group would not."""
    return [groups[len(groups) * k // count:len(groups) * (k + 1) // count] for k in range(count)]


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


def optimizer_step(model, reference, optimizer, groups, filler, tokenizer, banned, settings, device,
                   finite=lambda loss, norm, rows: math.isfinite(loss + norm)):
    """One step on this rank's groups (maybe none: then `filler` takes part in the collectives with weight 0).

    -> means over the tokens of all ranks, for the log; None if no rank has a token or `finite` (see Keeper) says no.
    """
    tokens = run.total(sum(g["mask"].sum().item() for g in groups))                          # the denominator, first
    if tokens == 0:
        return None
    parts = micro_batches(groups, settings.micro_tokens)
    rounds = run.most(len(parts))                           # every rank runs as many passes, or the collectives hang
    sums, rows, worst = {}, [], 0.0
    for i in range(rounds):
        real = i < len(parts)
        batch = collate_groups(parts[i] if real else [filler], tokenizer, device)
        prompts, features, ids, mask, old, advantages = batch
        features = None if settings.train_vision else features
        ref = None
        if reference is not None:
            watch.lap("reference")
            with torch.no_grad(), adapters_off(reference):  # with adapters the reference is the model without them
                ref, _ = token_logprobs(reference, prompts, features, ids, mask, banned, settings.temperature)
            watch.lap("update")
        run.sync_gradients(model, i == rounds - 1)
        logprobs, entropy = token_logprobs(model, prompts, features, ids, mask, banned, settings.temperature)
        loss, stats = grpo_loss(logprobs, old, ref, advantages, mask, settings.clip_low, settings.clip_high,
                                settings.dual_clip, settings.kl)
        (loss * real * run.world() / tokens).backward()     # FSDP averages over the ranks, hence their number
        if real:
            stats |= {"loss": loss.detach(), "entropy": entropy[mask.bool()].sum()}
            worst = max(worst, (logprobs.detach() - old)[mask.bool()].abs().max().item())
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in stats.items()}
            rows += [(g["row"].get("id") or g["row"]["source"], stats["loss"].item()) for g in parts[i]]
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip).full_tensor().item()
    names = ["loss", "ratio", "clipped", "mismatch", "entropy"] + ["kl"] * (reference is not None)
    means = {name: run.total(sums.get(name, 0.0)) / tokens for name in names}
    sound = finite(means["loss"], norm, rows)               # a non-finite loss or gradient skips the step
    if sound:
        optimizer.step()
    optimizer.zero_grad()
    means |= {"mismatch_max": run.most(worst), "grad_norm": norm, "tokens": tokens}
    return means if sound else None


# ---------------------------------------------------------------------------------------------------------------------
# the loop


def train(settings, model, tokenizer, processor, rows, device):
    """The whole RL stage on a blend of rows. -> the trained (sharded) model"""
    local, reference = settings.prompts // run.world(), None
    settings.lr = settings.lr or (4e-5 if not run.is_large(model) else 1e-5 if settings.lora else 1e-6)
    if settings.kl > 0 and not settings.lora:
        reference = run.shard(run.freeze(copy.deepcopy(model), device), device).eval()
        reference.set_reshard_after_forward(True)           # the root's unit, too: no backward pass would free it
    if settings.lora:
        add_adapters(run.freeze(model, device), settings.lora, settings.seed)
    elif not settings.train_vision:
        for part in (model.model.visual, model.point_embed, model.region_proj):
            part.requires_grad_(False)
    prompt = max(len(data.encode(rows[i], tokenizer, processor, train=False)["prompt"]) for i in range(8))
    plan.check(model, settings, device, prompt)
    model = run.shard(model, device, settings.checkpointing)
    reference = model if settings.kl > 0 and settings.lora else reference
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.999), weight_decay=settings.weight_decay,
                                  fused=True)
    run.say(f"GRPO: {settings.steps} steps of {settings.prompts} prompts x {settings.group_size} responses ({local} "
            f"prompts a rank), {settings.minibatches} optimizer steps each; "
            f"{sum(p.numel() for p in trained):,} trained parameters")
    rules = eval.token_rules(model, tokenizer, device)
    generator = torch.Generator(device).manual_seed(settings.seed * 1000 + run.rank())       # no two ranks sample alike
    keeper = checkpoint.Keeper(settings, model, tokenizer, processor, generator)
    first, position = keeper.begin("GRPO", settings.steps, optimizer)                        # 0, 0 unless resumed
    bar = tqdm(range(first, settings.steps), desc="GRPO", initial=first, total=settings.steps, disable=run.rank() > 0,
               mininterval=2)
    at_once = settings.rollout_prompts or local
    for step in bar:
        kept, seen = [], []
        with run.gathered(model):
            for round_ in range(settings.rounds):           # the same number on every rank: decided on sums
                mine = [rows[position + run.rank() * local + i] for i in range(local)]
                position += settings.prompts
                groups = []
                for i in range(0, local, at_once):
                    groups += sample_groups(model, mine[i:i + at_once], tokenizer, processor, rules, settings,
                                            generator, device)
                seen += groups
                kept = (kept + [g for g in groups if keep_group(g, settings)])[:local]
                if run.total(len(kept)) == settings.prompts:
                    break
        watch.lap("update")
        model_steps = []
        model.train()
        for part in mini_batches(kept, settings.minibatches):
            stats = optimizer_step(model, reference, optimizer, part, seen[0], tokenizer, rules[1], settings, device,
                                   keeper.finite)
            model_steps += [stats] if stats else []
        report(step, seen, kept, model_steps, keeper.log, bar, settings)
        keeper.after(step + 1, position)
    keeper.close()
    run.save_model(model, tokenizer, processor, settings.out)
    return model


def report(step, seen, kept, model_steps, log, bar, settings):
    """Rank-averaged metrics of a step: one JSON line, the bar, and now and then one whole response."""
    line = {}
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
    log.write(step, line["length"] * responses, **line)
    shown = [key for key in ("lor_reward", "dtr_reward", "dtr_detection", "kl") if key in line]
    bar.set_postfix({key: f"{line[key]:.3f}" for key in shown}, refresh=False)
    if run.rank() == 0 and settings.show_every and step % settings.show_every == 0:
        group = seen[step % len(seen)]
        reward = ", ".join(f"{k} {group['parts'][0][k]:.2f}" for k in eval.METRICS if group["parts"][0][k] is not None)
        bar.write(f"--- step {step}: {data.question_of(group['row'])}\n{group['texts'][0]}\n"
                  f"    truth {data.answer_of(group['row'])}; {reward}")
        if not line["kept"]:
            bar.write(f"    no optimizer step: every group was dropped, {line['dropped_low']:.0%} as too hard, "
                      f"{line['dropped_high']:.0%} as too easy. Too hard for all: needs a cold start with traces")


def cold_start(settings, device):
    """Make settings.model with the code and the settings of sft.py."""
    run.say(f"no cold start in {settings.model}: making one first (sft.py)")
    if settings.size == "tiny" and device.type == "cpu":
        run.say("the whole run takes about half an hour on two cores: cold start 22 to 26 min, GRPO 5, evaluation 1")
    made = sft.Settings(out=settings.model, size=settings.size, seed=settings.seed, attention=settings.attention,
                        resume=settings.resume)
    model, tokenizer, processor = run.new_model(made.size, made.seed, made.attention)
    sft.train(made, model, tokenizer, processor, sft.sources_of(made, run.image_side(processor)), device)


def sources_of(settings, side):
    """The blend of --data and --scenes, or fresh questions of the embedded world, none twice."""
    count = settings.prompts * settings.steps * settings.rounds
    world = data.rl_blend(count, 10**9 + settings.seed * 10**7, side, settings.path)      # above the held-out scenes
    return data.user_sources(settings) or world


def main():
    settings = run.parse(Settings, __doc__)
    device = run.setup(settings.seed)
    run.by_size(settings, prompts="prompts")
    if settings.prompts % run.world():
        raise run.UserError(f"--prompts {settings.prompts}: not divisible by {run.world()} processes; use a multiple")
    if min(settings.steps, settings.minibatches, settings.rounds, settings.max_new_tokens) < 1:
        raise run.UserError("--steps, --minibatches, --rounds and --max_new_tokens need at least 1")
    if settings.group_size < 2 or settings.temperature <= 0:
        raise run.UserError("--group_size needs at least 2, --temperature more than 0: equal responses teach nothing")
    if settings.questions < 0:
        settings.questions = 0 if settings.data or settings.scenes else 1320
    if settings.lora and settings.train_vision:
        raise run.UserError("--lora trains adapters of the language model only; leave --train_vision out")
    if not settings.resume:
        checkpoint.state_in(settings)                       # refuses to write over a run, before any work
    if not os.path.isfile(os.path.join(settings.model, "config.json")) and settings.model == "out/sft":
        if settings.data:
            raise run.UserError("--model: is needed with --data, a model that sft.py made with --data")
        cold_start(settings, device)
    model, tokenizer, processor = run.load_model(settings.model, settings.attention)
    if settings.size != "tiny" and model.config.text_config.hidden_size != run.plan_of(settings.size)["text"][0]:
        raise run.UserError(f"--size {settings.size}: {settings.model} is of another size; make one by sft.py --size "
                            f"{settings.size} --out DIR, and give it with --model DIR")
    blend = data.Blend(sources_of(settings, run.image_side(processor)), settings.seed)
    held_out = eval.held_out(settings.questions, run.image_side(processor)) if settings.questions else []
    asked = eval.Settings(max_new_tokens=settings.max_new_tokens)
    if held_out:
        file = os.path.join(settings.out, "eval_cold_start.json")
        before = eval.read_json(file) if settings.resume and os.path.isfile(file) else []
        if len(before) != len(held_out):
            before = eval.answer(run.shard(copy.deepcopy(model), device), tokenizer, processor, held_out, device, asked,
                                 "cold start")              # that copy is not kept
            eval.write_json(file, before)
    model = train(settings, model, tokenizer, processor, blend, device)
    if held_out:
        after = eval.answer(model, tokenizer, processor, held_out, device, asked, "after GRPO")
        eval.write_json(os.path.join(settings.out, "eval.json"), after)
        named = [(title, eval.make_table(results), results) for title, results in (("cold start", before),
                                                                                   ("GRPO", after))]
        eval.show_table(*(part[:2] for part in named))
        for title, _, results in named:
            eval.show_paths(title, results)
        eval.show_changes("GRPO against the cold start", before, after)
        eval.report.write(os.path.join(settings.out, "report.html"), named, held_out, [settings.model, settings.out])


if __name__ == "__main__":
    run.main(main)
