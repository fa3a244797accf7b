"""Cold start: supervised fine-tuning on the blended mixture (SR-REAL, arXiv 2606.17539, stage 1).

    python sft.py                                                      # embedded world, one process, CPU or one GPU
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct --data cot.json*2 grounding.json
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 sft.py ...

Cross-entropy on the tokens of the target, up to and with the end of turn, as a mean over the target tokens of the
*global* batch: the denominator is summed over ranks and micro-batches before the first backward.

Differences from the paper: rows are sorted by length into micro-batches, not packed. Without --model there is no
pretrained VLM to start from, so a small new one first learns perception (short questions, no reasoning). The embedded
cold start is imperfect in the way that real ones are: few annotated scenes, centres as a depth sensor sees them, small
objects overlooked.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
import plan
import run
import watch
from run import setting


@dataclass
class Settings:
    out: str = setting("out/sft", "folder for the model and metrics.jsonl")
    model: str = setting("", "stock Qwen3-VL or a folder; empty: a small new model (paper: NVILA-Lite-8B)")
    size: str = setting("tiny", "size of a new model: tiny (1.2 M parameters), small, base")
    data: list = setting([], "instance files, FILE or FILE*weight; empty: the embedded world")
    skip_bad_rows: bool = setting(False, "count and list bad rows instead of stopping at the first")
    scenes: str = setting("", "scenes.jsonl: train on traces made from these annotated pictures")
    world_scenes: int = setting(4000, "embedded world: number of scenes")
    traces: int = setting(1000, "embedded world: scenes with annotated reasoning traces (real ones are scarce too)")
    blend: str = setting("all", "embedded world: all; cot: only traces; grounding: only the rest; none: no cold start",
                         ("all", "cot", "grounding", "none"))
    seed: int = setting(0, "seed of weights, data order and sampling")
    pretrain: int = setting(1050, "steps of perception for a new model, in place of a stock VLM's pretraining")
    steps: int = setting(1300, "optimizer steps of the cold start (paper: 2 epochs)")
    batch: int = setting(0, "rows an optimizer step, all ranks together; 0: by --size, tiny 64 (paper: 512)")
    micro_tokens: int = setting(2048, "most tokens, with padding, of one forward pass on a rank; bounds memory")
    lr: float = setting(0.0, "peak learning rate, cosine to 0; 0: by --size, tiny 2e-3; 5e-6 above 0.3 B parameters, "
                             "the paper's")
    warmup: float = setting(0.03, "share of the steps (paper: 0.03)")
    weight_decay: float = setting(0.0, "of AdamW (paper: 0)")
    beta2: float = setting(0.98, "of AdamW; short runs forget gradients sooner (paper: 0.999)")
    clip: float = setting(1.0, "largest gradient norm (paper: 1.0)")
    checkpointing: bool = setting(False, "recompute activations in the backward pass (paper: on); a third slower")
    attention: str = setting("auto", "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed")
    workers: int = setting(0, "loader processes a rank")
    save_every: int = setting(100, "steps between checkpoints, and one at the end; 0: only when stopped by a signal")
    keep: int = setting(2, "checkpoints to keep, the newest ones")
    resume: bool = setting(False, "go on from the newest whole checkpoint in --out; from the start if there is none")
    tensorboard: bool = setting(False, "also write the metrics for TensorBoard")
    wandb: bool = setting(False, "also send the metrics to wandb")


class Encoded(torch.utils.data.Dataset):
    """Positions of a blend -> encoded samples."""

    def __init__(self, blend, tokenizer, processor):
        self.blend, self.tokenizer, self.processor = blend, tokenizer, processor

    def __getitem__(self, position):
        row = self.blend[position]
        return {"id": row.get("id", row["source"]), **data.encode(row, self.tokenizer, self.processor, train=True)}


def micro_batches(samples, max_tokens):
    """Samples sorted by length, cut where rows x longest row would exceed max_tokens (a longer row goes alone)."""
    parts, samples = [[]], sorted(samples, key=lambda s: len(s["prompt"]) + len(s["target"]))
    for sample in samples:
        if parts[-1] and (len(parts[-1]) + 1) * (len(sample["prompt"]) + len(sample["target"])) > max_tokens:
            parts.append([])
        parts[-1].append(sample)
    return parts


def target_loss(model, batch):
    """Summed cross-entropy of the target tokens (a scalar); logits are made at those positions only."""
    batch = dict(batch)
    is_target = batch.pop("loss_mask")[:, 1:].bool()                                         # (B, L - 1)
    keep = F.pad(is_target, (0, 1))                         # the token before predicts it
    logits = model(**batch, logits_to_keep=keep).logits                                      # (targets, V)
    return F.cross_entropy(logits.float(), batch["input_ids"][:, 1:][is_target], reduction="sum")


def learning_rate(settings, step, steps):
    warm = max(1, settings.warmup * steps)
    return settings.lr * min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(settings, model, tokenizer, processor, sources, steps, device, keeper, title):
    """Train a sharded model on a blend of sources for some steps; one cosine of the learning rate."""
    blend, local = data.Blend(sources, settings.seed), settings.batch // run.world()
    run.say(f"{title}: {steps} steps of {settings.batch} rows ({local} a rank) from {len(blend):,} rows: " +
            ", ".join(f"{name} {count:,}" for (name, _, _), count in zip(sources, blend.counts)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, settings.beta2),
                                  weight_decay=settings.weight_decay, fused=True)
    first, position = keeper.begin(title, steps, optimizer)                                  # 0, 0 unless resumed
    starts = range(position + run.rank() * local, position + (steps - first) * settings.batch, settings.batch)
    mine = [start + i for start in starts for i in range(local)]
    loader = DataLoader(Encoded(blend, tokenizer, processor), batch_size=local, sampler=mine, collate_fn=list,
                        num_workers=settings.workers)
    bar = tqdm(loader, desc=title, initial=first, total=steps, disable=run.rank() > 0, mininterval=2)
    model.train()
    for step, samples in enumerate(bar, first):
        watch.lap("update")
        parts = micro_batches(samples, settings.micro_tokens)
        batches = [data.to(data.collate(part, tokenizer), device) for part in parts]
        tokens = run.total(sum(batch["loss_mask"].sum().item() for batch in batches))        # of the global batch
        rounds = run.most(len(batches))                     # every rank runs as many passes: collectives stay in step
        loss_sum, rows = 0.0, []
        for i in range(rounds):
            run.sync_gradients(model, i == rounds - 1)
            loss = target_loss(model, batches[min(i, len(batches) - 1)]) * (i < len(batches))
            (loss * run.world() / tokens).backward()        # FSDP averages over the ranks, hence their number
            loss_sum += loss.item()
            rows += [(sample["id"], loss.item()) for sample in (parts[i] if i < len(parts) else [])]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip).full_tensor().item()
        loss = run.total(loss_sum) / tokens
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        if keeper.finite(loss, norm, rows):
            optimizer.step()
        optimizer.zero_grad()
        keeper.log.write(step, tokens, phase=title, loss=loss, grad_norm=norm, lr=group["lr"], tokens=int(tokens))
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        keeper.after(step + 1, position + (step + 1 - first) * settings.batch)
        watch.lap("data")


def train(settings, model, tokenizer, processor, sources, device):
    """The whole stage: for a new model some perception first, then the cold start. -> the trained (sharded) model"""
    settings.lr = settings.lr or (5e-6 if run.is_large(model) else 0.0)
    run.by_size(settings, batch="batch", lr="sft_lr")
    if settings.steps < 1:
        raise run.UserError("--steps: needs at least 1")
    if settings.batch % run.world():
        raise run.UserError(f"--batch {settings.batch}: not divisible by {run.world()} processes; use a multiple")
    plan.check(model, settings, device)
    model = run.shard(model, device, settings.checkpointing)
    keeper = checkpoint.Keeper(settings, model, tokenizer, processor)
    if not settings.model and settings.pretrain:
        stages = data.perception_stages(settings.world_scenes, settings.seed * 10**6, run.image_side(processor))
        for i, (end, perception) in enumerate(stages):
            steps = round(end * settings.pretrain) - round((stages[i - 1][0] if i else 0) * settings.pretrain)
            fit(settings, model, tokenizer, processor, perception, steps, device, keeper, f"pretraining {i + 1}")
    if sources:
        fit(settings, model, tokenizer, processor, sources, settings.steps, device, keeper, "cold start")
    keeper.close()
    run.save_model(model, tokenizer, processor, settings.out)
    return model


def sources_of(settings, size):
    """The blend of --data and --scenes, or the embedded world's, or what --blend takes of that."""
    world = data.cold_start_blend(settings.traces, settings.world_scenes, settings.seed * 10**6, size)
    is_trace = lambda name: name.startswith(("lor_", "dtr_"))
    wanted = {"all": world, "cot": [source for source in world if is_trace(source[0])], "none": [],
              "grounding": [source for source in world if not is_trace(source[0])]}
    return data.user_sources(settings) or wanted[settings.blend]


def main():
    settings = run.parse(Settings, __doc__)
    device = run.setup(settings.seed)
    made = run.load_model(settings.model, settings.attention) if settings.model else \
        run.new_model(settings.size, settings.seed, settings.attention)
    model, tokenizer, processor = made
    train(settings, model, tokenizer, processor, sources_of(settings, run.image_side(processor)), device)


if __name__ == "__main__":
    run.main(main)
