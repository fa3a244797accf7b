"""Stage 1, the cold start: supervised fine-tuning on a blend of reasoning traces and grounding.

    python sft.py                                          # embedded world, one process, CPU or GPU
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct --data cot.json*2 more.json
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 sft.py ...

It teaches both reasoning paths, LOR (language-only reasoning) and DTR (detect-then-reason: 3D
coordinates first). The loss is the cross-entropy of the target's tokens, up to and including the
end of turn, as a mean over the target tokens of the *global* batch: its denominator is summed over
ranks and micro-batches before the first backward pass.

Differences from the paper (SR-REAL, arXiv 2606.17539):
1. Rows are sorted by length into micro-batches; the paper packs them into sequences.
2. Without --model there is no pretrained VLM to start from, so a small new one first learns
   perception from short questions without reasoning.
3. The embedded cold start is imperfect as real ones are: few annotated scenes, centres as a depth
   sensor sees them, small objects overlooked (world/sources.py).

Dimensions: B rows of a micro-batch, L tokens, V vocabulary.
"""

import math
import os
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from engine import distributed, plan, watch
from engine.checkpoint import Keeper, hold, load_model, origin_of, save_model
from engine.head import score_tokens
from engine.settings import parse, run_main, setting
from formats.errors import UserError
from world.sources import SCENES_OF_SEED, cold_start_blend, perception_stages
from world.tiny import SIZES, check_size, fill_by_size, image_side, new_model


@dataclass
class Settings:
    # what is trained, on what
    out: str = setting("out/sft", "folder for the model and metrics.jsonl")
    model: str = setting(
        "", "stock Qwen3-VL or a folder; empty: a small new model (paper: NVILA-Lite-8B)"
    )
    size: str = setting("tiny", "size of a new model; tiny: 1.2 M parameters", tuple(SIZES))
    data: list = setting([], "instance files, FILE or FILE*weight; empty: the embedded world")
    skip_bad_rows: bool = setting(
        False, "count and list bad rows instead of stopping at the first", only_with=("data",)
    )
    scenes: str = setting("", "scenes.jsonl: train on traces made from these annotated pictures")
    world_scenes: int = setting(
        4000, "embedded world: number of scenes", at_least=1, at_most=SCENES_OF_SEED
    )
    traces: int = setting(
        1000,
        "embedded world: scenes with reasoning traces (real ones are scarce too)",
        at_least=1,
        at_most=SCENES_OF_SEED,
        not_with=("data", "scenes", "blend=none"),
    )
    blend: str = setting(
        "all",
        "embedded world: all; cot: only traces; grounding: only the rest; none: no cold start",
        ("all", "cot", "grounding", "none"),
        not_with=("data", "scenes"),
    )
    seed: int = setting(
        0, "seed of weights, data order and sampling", at_least=0, below=distributed.MOST_SEEDS
    )
    # how long, how fast
    pretrain: int = setting(
        1050,
        "steps of perception for a new model, in place of a stock VLM's pretraining",
        at_least=0,
        not_with=("model",),
    )
    steps: int = setting(
        1300,
        "optimizer steps of the cold start (paper: 2 epochs)",
        at_least=1,
        not_with=("blend=none",),
    )
    batch: int = setting(
        0,
        "rows per optimizer step, all ranks together; 0: by --size, tiny 64 (paper: 512)",
        at_least=0,
        at_most=10**6,
    )
    micro_tokens: int = setting(
        2048, "most tokens, with padding, of one forward pass on a rank; bounds memory", at_least=1
    )
    lr: float = setting(
        0.0,
        "peak learning rate, cosine to 0; 0: by --size, tiny 2e-3; above 0.3 B parameters 5e-6, "
        "the paper's",
        at_least=0,
        at_most=1,
    )
    warmup: float = setting(0.03, "share of the steps (paper: 0.03)", at_least=0, at_most=1)
    weight_decay: float = setting(0.0, "of AdamW (paper: 0)", at_least=0, at_most=1)
    beta2: float = setting(
        0.98, "of AdamW; short runs forget gradients sooner (paper: 0.999)", at_least=0, below=1
    )
    clip: float = setting(1.0, "largest gradient norm (paper: 1.0)", above=0)
    # the machine
    checkpointing: bool = setting(
        False, "recompute activations in the backward pass (paper: on); a third slower"
    )
    attention: str = setting(
        "auto",
        "sdpa: torch's kernels; flash: flash-attn (CUDA); auto: flash if installed",
        ("auto", "sdpa", "flash"),
    )
    workers: int = setting(
        -1, "loader processes per rank; -1: 4 on CUDA, else none", at_least=-1, at_most=256
    )
    # keeping and telling
    save_every: int = setting(
        100,
        "steps between checkpoints, and one at the end; 0: only when stopped by a signal",
        at_least=0,
    )
    keep: int = setting(2, "checkpoints to keep, the newest ones", at_least=1)
    resume: bool = setting(
        False, "go on from the newest whole checkpoint in --out; from the start if there is none"
    )
    tensorboard: bool = setting(
        False, "also write the metrics for TensorBoard", package="tensorboard"
    )
    wandb: bool = setting(False, "also send the metrics to wandb", package="wandb")


# ----------------------------------------------------------------------------------------------
# the loss


def target_loss(model, batch):
    """Summed cross-entropy of the target tokens of a batch (data.collate): a scalar.

    Logits are made only where they are needed, at the positions before the target tokens, and only
    a slice of them at a time (engine/head.py).
    """
    inputs = {key: value for key, value in batch.items() if key != "loss_mask"}
    is_target = batch["loss_mask"][:, 1:].bool()  # (B, L - 1), 1 = token of the target
    predicts_target = F.pad(is_target, (0, 1))  # (B, L), 1 = the next token is a target
    targets = batch["input_ids"][:, 1:][is_target]  # (targets,)

    def score_targets(lm_head, hidden):
        """hidden (targets, D) -> log-probabilities (targets,)"""
        logprobs, _ = score_tokens(
            hidden, lm_head.weight, targets[:, None], banned=targets[:0], with_entropy=False
        )
        return logprobs[:, 0]

    logprobs = model(**inputs, logits_to_keep=predicts_target, head=score_targets).logits
    return -logprobs.sum()


def micro_batches(samples, max_tokens):
    """Samples sorted by length, cut where rows x longest row would exceed max_tokens.

    A row that is longer than that goes alone.
    """
    batches = [[]]
    for sample in sorted(samples, key=sample_length):
        rows = len(batches[-1]) + 1
        if batches[-1] and rows * sample_length(sample) > max_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def sample_length(sample):
    return len(sample["prompt"]) + len(sample["target"])


def learning_rate(settings, step, steps):
    """Linear warm-up, then one cosine to 0."""
    warm = max(1, settings.warmup * steps)
    return settings.lr * min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ----------------------------------------------------------------------------------------------
# data


def positions_of_rank(settings, first, steps):
    """Positions in the blend of this rank's rows, for so many steps; first: where they begin."""
    local = settings.batch // distributed.world_size()
    for step in range(steps):
        start = first + step * settings.batch + distributed.rank() * local
        yield from range(start, start + local)


def sources_of(settings, side):
    """Those of --data and --scenes if given, else what --blend names of the embedded world.

    side: of the embedded world's pictures, pixels.
    """
    first_scene = settings.seed * SCENES_OF_SEED
    world = cold_start_blend(settings.traces, settings.world_scenes, first_scene, side)
    traces = [source for source in world if source[0].startswith(("lor_", "dtr_"))]
    others = [source for source in world if source not in traces]
    wanted = {"all": world, "cot": traces, "grounding": others, "none": []}
    return data.user_sources(settings) or wanted[settings.blend]


# ----------------------------------------------------------------------------------------------
# the loop


def fit(settings, model, tokenizer, processor, sources, steps, device, keeper, title):
    """Train a sharded model on a blend of sources for some steps; one cosine of the learning
    rate."""
    blend = data.Blend(sources, settings.seed)
    counts = [f"{name} {count:,}" for (name, _, _), count in zip(sources, blend.counts)]
    distributed.say(
        f"{title}: {steps} steps of {settings.batch} rows "
        f"({settings.batch // distributed.world_size()} per rank) "
        f"from {len(blend):,} rows: {', '.join(counts)}"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(0.9, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    first_step, position = keeper.begin(title, steps, optimizer)  # 0, 0 unless resumed
    local = settings.batch // distributed.world_size()
    loaded = data.load_ahead(
        data.EncodedRows(blend, tokenizer, processor, train=True),
        positions_of_rank(settings, position, steps - first_step),
        distributed.loader_workers(settings.workers, device),
        ahead=2 * local,
    )
    bar = tqdm(
        range(first_step, steps),
        desc=title,
        initial=first_step,
        total=steps,
        disable=distributed.rank() > 0,
        mininterval=2,
    )
    model.train()
    for step in bar:
        watch.lap("data")
        rows = list(islice(loaded, local))
        watch.lap("update")
        lr = learning_rate(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, norm, tokens, losses = gradients(model, rows, tokenizer, settings, device)
        if keeper.finite(loss, norm, losses):  # else this step is left out
            optimizer.step()
        optimizer.zero_grad()
        position += settings.batch
        keeper.log.write(
            step, tokens, phase=title, loss=loss, grad_norm=norm, lr=lr, tokens=int(tokens)
        )
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        keeper.after(step + 1, position)


def gradients(model, rows, tokenizer, settings, device):
    """The gradients of the mean loss over the target tokens of all ranks, in micro-batches.

    rows: [(row, encoded sample)] of this rank -> loss, norm of the gradient, target tokens, all of all ranks; [(id, loss of the pass that held
    it)] of this rank's rows.
    """
    samples = [{"id": row.get("id", row["source"]), **sample} for row, sample in rows]
    micro = micro_batches(samples, settings.micro_tokens)
    batches = [data.to(data.collate(part, tokenizer), device) for part in micro]
    # The denominator first, over the whole global batch.
    tokens = distributed.total(sum(batch["loss_mask"].sum().item() for batch in batches))
    # Every rank runs as many passes as the others, or the collectives would hang.
    passes = distributed.most(len(batches))
    loss_sum = 0.0
    losses = []
    for i in range(passes):
        distributed.sync_gradients(model, last=i == passes - 1)
        is_real = i < len(batches)  # else: the last batch once more, with weight 0
        loss = target_loss(model, batches[min(i, len(batches) - 1)]) * is_real
        # FSDP averages the gradients over the ranks, hence their number.
        (loss * distributed.world_size() / tokens).backward()
        loss_sum += loss.item()
        if is_real:
            losses += [(sample["id"], loss.item()) for sample in micro[i]]
    norm = distributed.clip_gradients(model.parameters(), settings.clip)
    return distributed.total(loss_sum) / tokens, norm, tokens, losses


def train(settings, model, tokenizer, processor, sources, device):
    """The whole stage -> the trained, sharded model. A new model learns some perception first."""
    if not settings.lr and distributed.is_large(model):
        settings.lr = 5e-6  # the paper's
    check(settings)
    fill_by_size(settings, lr="sft_lr")
    plan.check(model, settings, device)
    data.check_with(sources, tokenizer, processor)
    origin = origin_of(model, sources)
    model = distributed.shard(model, device, settings.checkpointing)
    keeper = Keeper(settings, model, tokenizer, processor, origin)
    if not settings.model and settings.pretrain:
        first_scene = settings.seed * SCENES_OF_SEED
        stages = perception_stages(settings.world_scenes, first_scene, image_side(processor))
        done = 0
        for i, (share_done, perception) in enumerate(stages, 1):
            steps = round(share_done * settings.pretrain) - done
            done += steps
            title = f"pretraining {i}"
            fit(settings, model, tokenizer, processor, perception, steps, device, keeper, title)
    if sources:
        title = "cold start"
        fit(settings, model, tokenizer, processor, sources, settings.steps, device, keeper, title)
    keeper.close()
    save_model(model, tokenizer, processor, settings.out)
    return model


def check_flags(settings, asked):
    """UserError for flags that do not go together; asked: see engine.settings.parse."""
    if settings.model and "size" in asked:
        check_size(settings)
    check_folders(settings)
    if settings.blend == "none" and settings.model:
        raise UserError(f"--blend none: leaves nothing to train {settings.model} on")
    learns_perception = settings.pretrain and not settings.model
    of_user = settings.data or settings.scenes
    of_all_scenes = not of_user and settings.blend in ("all", "grounding")
    if "world_scenes" in asked and not learns_perception and not of_all_scenes:
        raise UserError("--world_scenes: has no effect, nothing is trained on the embedded world")


def check_folders(settings):
    """UserError where the new model would replace the one that it starts from."""
    if settings.model and os.path.realpath(settings.model) == os.path.realpath(settings.out):
        raise UserError(f"--out {settings.out}: is the folder of --model; give another one")


def check(settings):
    """Fill in what goes with the size; UserError for a batch that the processes can't share."""
    fill_by_size(settings, batch="batch")
    ranks = distributed.world_size()
    if settings.batch % ranks:
        raise UserError(
            f"--batch {settings.batch}: not divisible by {ranks} processes; use a multiple"
        )


def main():
    settings = parse(Settings, __doc__, check=check_flags)
    device = distributed.setup(settings.seed)
    check(settings)  # before any work
    hold(settings.out)
    if settings.model:
        model, tokenizer, processor = load_model(settings.model)
    else:
        model, tokenizer, processor = new_model(settings.size, settings.seed, data.PROMPTS.values())
    distributed.use_attention(model, settings.attention)
    sources = sources_of(settings, image_side(processor))
    train(settings, model, tokenizer, processor, sources, device)


if __name__ == "__main__":
    run_main(main)
