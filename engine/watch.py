"""What a run tells while it runs: metrics.jsonl (TensorBoard, wandb), where its time goes, which rank is stuck."""

import atexit
import json
import math
import os
import resource
import sys
import threading
import time

import torch
import torch.distributed as dist

from data import METRICS
from engine import distributed
from formats import instances
from formats.errors import UserError

now, spent = {"phase": "start", "step": 0, "since": time.monotonic(), "laps": 0}, {}


def lap(phase):
    """From here on the time of this rank counts as `phase`."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # kernels lag behind: each phase pays for its own
    moment = time.monotonic()
    spent[now["phase"]] = spent.get(now["phase"], 0.0) + moment - now["since"]
    now.update(phase=phase, since=moment, laps=now["laps"] + 1)


def peak_memory():
    """Most memory that any rank has used so far, GB."""
    if torch.cuda.is_initialized():
        return distributed.most(torch.cuda.max_memory_allocated()) / 1e9
    return distributed.most(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


class Log:
    """OUT/metrics.jsonl, one JSON object a step, written by rank 0. Of a resumed run the steps behind the checkpoint
    are cut off. Fields that are times or memory end in _s or _gb or are "seconds"; all others can be reproduced."""

    def __init__(self, settings, checkpoint):
        self.path, self.notes, self.sinks = os.path.join(settings.out, "metrics.jsonl"), {}, []
        self.start = time.time() - checkpoint.get("seconds", 0.0)
        with distributed.together(f"--out {settings.out}: cannot write there"):
            if distributed.rank() == 0:
                os.makedirs(settings.out, exist_ok=True)
                with open(self.path, "a") as file:
                    file.truncate(min(file.tell(), checkpoint.get("metrics_bytes", 0)))
        if settings.tensorboard:
            with distributed.together("--tensorboard: pip install tensorboard first"):
                from torch.utils.tensorboard import SummaryWriter
            if distributed.rank() == 0:
                board = SummaryWriter(settings.out, purge_step=checkpoint.get("done", 0) + 1)
                self.sinks.append(
                    lambda line, step: [board.add_scalar(key, line[key], step) for key in line]
                )
        if settings.wandb:
            with distributed.together("--wandb: pip install wandb first"):
                import wandb
            if distributed.rank() == 0:
                wandb.init(project="sr-real", group=settings.out, config=vars(settings))
                self.sinks.append(lambda line, step: wandb.log(line, step=step))

    def begin(self, first, steps, done):
        """Steps of a phase, for the time left; `done`: steps of the phases before, for the sinks' common axis."""
        self.first, self.steps, self.before, self.began = first, steps, done - first, time.time()
        self.last = self.began
        spent.clear()

    def write(self, step, processed, **values):
        """One line. processed: tokens that the step trained or sampled, on all ranks, for tokens_per_s."""
        lap("log")
        moment, memory = time.time(), peak_memory()
        left = (moment - self.began) / (step + 1 - self.first) * (self.steps - step - 1)
        times = {f"{phase}_s": round(seconds, 3) for phase, seconds in spent.items()}
        line = {
            **values,
            **self.notes,
            **times,
            "tokens_per_s": round(processed / (moment - self.last)),
            "memory_gb": round(memory, 3),
            "eta_s": round(left),
            "seconds": round(moment - self.start, 2),
        }
        line = {"step": step, **{key: value for key, value in line.items() if not_nan(value)}}
        self.notes, self.last = {}, moment
        spent.clear()
        if distributed.rank() == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot write ({error.strerror})") from None
            numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
            for sink in self.sinks:
                sink(numbers, self.before + step + 1)


def not_nan(value):
    """NaN and Infinity are not JSON."""
    return not isinstance(value, float) or math.isfinite(value)


def place():
    """The line of this project that the main thread is at."""
    frame, here = (
        sys._current_frames().get(threading.main_thread().ident),
        os.path.dirname(os.path.abspath(__file__)),
    )
    while frame and os.path.dirname(os.path.abspath(frame.f_code.co_filename)) != here:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "?"


def watch_ranks(limit):
    """Name the ranks that are behind the others and make no progress for `limit` seconds, long before a collective
    gives up (run.TIMEOUT). A thread on each rank beats through the store of the process group. -> stops it."""
    stop, store = threading.Event(), dist.distributed_c10d._get_default_store()
    keys = [f"beat{rank}" for rank in range(distributed.world_size())]

    def loop():
        seen, told = {}, -limit  # rank -> its laps, and when they were new here
        while not stop.wait(limit / 10):
            mine = [now["laps"], f"'{now['phase']}' of step {now['step']}, {place()}"]
            try:
                store.set(keys[distributed.rank()], json.dumps(mine))
                if not store.check(keys):  # get would wait for it
                    continue
                beats = [json.loads(store.get(key)) for key in keys]
            except (RuntimeError, ValueError):  # the processes are taking leave
                return
            moment = time.monotonic()
            for rank, (laps, _) in enumerate(beats):
                if rank not in seen or seen[rank][0] != laps:
                    seen[rank] = (laps, moment)
            behind = [
                rank
                for rank, (laps, _) in enumerate(beats)
                if laps == min(laps for laps, _ in beats)
            ]
            silent = min(moment - seen[rank][1] for rank in behind)
            teller = min(set(range(distributed.world_size())) - set(behind), default=0)
            if silent > limit and moment - told > limit and distributed.rank() == teller:
                names = "; ".join(f"rank {rank} in {beats[rank][1]}" for rank in behind[:4])
                print(
                    f"no progress for {silent:.0f} s: {names} (the others wait, {distributed.TIMEOUT // 60} minutes at most)",
                    file=sys.stderr,
                    flush=True,
                )
                told = moment

    def end():
        stop.set()
        thread.join(timeout=10)

    thread = threading.Thread(target=loop, daemon=True)
    if distributed.world_size() == 1:
        return stop.set
    thread.start()
    atexit.register(end)  # a thread inside the store would abort the exit
    return end


def report_step(step, sampled, kept, updates, log, bar, settings):
    """Rank-averaged metrics of a step: one JSON line, the bar, and now and then one whole response."""
    line = {}
    for path in ("lor", "dtr"):
        parts = [p for g in sampled if instances.path_of(g["row"]) == path for p in g["parts"]]
        for key in METRICS:
            values = [p[key] for p in parts if p[key] is not None]
            count = distributed.total(len(values))
            if count:
                line[f"{path}_{key}"] = distributed.total(sum(values)) / count
    responses = distributed.total(sum(len(g["parts"]) for g in sampled))
    dropped = [g["rewards"].mean().item() for g in sampled if not g["kept"]]
    groups, low = (
        distributed.total(len(sampled)),
        distributed.total(sum(mean < 0.5 for mean in dropped)),
    )
    line["rounds"], line["kept"] = (
        len(sampled) // (settings.prompts // distributed.world_size()),
        distributed.total(len(kept)) / groups,
    )
    line["dropped_low"] = low / groups  # no signal because too hard (mean reward below 0.5)
    line["dropped_high"] = (distributed.total(len(dropped)) - low) / groups  # .. because too easy
    line["cut"] = distributed.total(sum(g["cut"] for g in sampled)) / responses
    line["length"] = distributed.total(sum(g["mask"].sum().item() for g in sampled)) / responses
    for key in updates[0] if updates else []:
        line[key] = sum(s[key] for s in updates) / len(updates)
    if updates:
        line["mismatch_max"] = max(s["mismatch_max"] for s in updates)
        line |= {f"first_{key}": updates[0][key] for key in ("ratio", "mismatch", "mismatch_max")}
    log.write(step, line["length"] * responses, **line)
    shown = [key for key in ("lor_reward", "dtr_reward", "dtr_detection", "kl") if key in line]
    bar.set_postfix({key: f"{line[key]:.3f}" for key in shown}, refresh=False)
    if distributed.rank() == 0 and settings.show_every and step % settings.show_every == 0:
        group = sampled[step % len(sampled)]
        reward = ", ".join(
            f"{k} {group['parts'][0][k]:.2f}" for k in METRICS if group["parts"][0][k] is not None
        )
        bar.write(
            f"--- step {step}: {instances.question_of(group['row'])}\n{group['texts'][0]}\n"
            f"    truth {instances.answer_of(group['row'])}; {reward}"
        )
        if not line["kept"]:
            bar.write(
                f"    no optimizer step: every group was dropped, {line['dropped_low']:.0%} as too hard, "
                f"{line['dropped_high']:.0%} as too easy. Too hard for all: needs a cold start with traces"
            )
