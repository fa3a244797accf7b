"""What a run tells while it runs: metrics.jsonl, where its time goes, which rank is stuck.

    watch.lap("rollout")                # from here on the time of this rank counts as "rollout"
    log = watch.Log(settings, {})       # OUT/metrics.jsonl; TensorBoard and wandb if asked for
    watch.report_step(..., log, ...)    # one line, from what all ranks did in a step of GRPO
    end = watch.watch_ranks(300)        # names the ranks that make no progress for 300 seconds

The paths are LOR (language-only reasoning) and DTR (detect-then-reason: 3D coordinates first).
"""

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
from formats.errors import UserError
from formats.instances import answer_of, path_of, question_of

# ----------------------------------------------------------------------------------------------
# the metrics of a step of GRPO


def report_step(step, sampled, kept, updates, log, bar, settings):
    """One line of metrics.jsonl, averaged over the ranks; the bar; now and then a whole response.

    sampled: the groups that this rank sampled (grpo.sample_groups); kept: those of them that were
    trained on; updates: what grpo.optimizer_step returned, for each update that was made. Called on
    all ranks.
    """
    responses = distributed.total(sum(len(group["parts"]) for group in sampled))
    line = {
        **reward_means(sampled),
        **filter_shares(sampled, kept, settings),
        **response_means(sampled, responses),
        **update_means(updates),
    }
    log.write(step, line["length"] * responses, **line)
    on_bar = [key for key in ("lor_reward", "dtr_reward", "dtr_detection", "kl") if key in line]
    bar.set_postfix({key: f"{line[key]:.3f}" for key in on_bar}, refresh=False)
    if distributed.rank() == 0 and settings.show_every and step % settings.show_every == 0:
        bar.write(example(step, sampled[step % len(sampled)]))
        if not line["kept"]:
            bar.write(
                "    no optimizer step: every group was dropped, "
                f"{line['dropped_low']:.0%} as too hard, {line['dropped_high']:.0%} as too easy. "
                "Too hard for all: needs a cold start with traces"
            )


def reward_means(sampled):
    """Mean of each reward part, over the responses on each path that have it: "lor_reward", ..."""
    means = {}
    for path in ("lor", "dtr"):
        groups = [group for group in sampled if path_of(group["row"]) == path]
        scores = [score for group in groups for score in group["parts"]]  # one per response
        for key in METRICS:
            values = [score[key] for score in scores if score[key] is not None]
            count = distributed.total(len(values))
            if count:
                means[f"{path}_{key}"] = distributed.total(sum(values)) / count
    return means


def filter_shares(sampled, kept, settings):
    """Rounds of rollouts, and the shares of the groups that were kept and dropped."""
    groups = distributed.total(len(sampled))
    dropped = [group["rewards"].mean().item() for group in sampled if not group["kept"]]
    too_hard = distributed.total(sum(mean < 0.5 for mean in dropped))
    prompts = settings.prompts // distributed.world_size()  # of this rank, per round
    return {
        "rounds": len(sampled) // prompts,
        "kept": distributed.total(len(kept)) / groups,
        "dropped_low": too_hard / groups,  # no signal, and a mean reward below 0.5
        "dropped_high": (distributed.total(len(dropped)) - too_hard) / groups,  # or above: too easy
    }


def response_means(sampled, responses):
    """Share of the responses that did not end, mean length in tokens; responses: their number."""
    cut = distributed.total(sum(group["cut"] for group in sampled))
    tokens = distributed.total(sum(group["mask"].sum().item() for group in sampled))
    return {"cut": cut / responses, "length": tokens / responses}


def update_means(updates):
    """Means over the updates of a step, and some values of its first one; {} without updates.

    Before its first update the policy is still the one that sampled: ratio 1, mismatch about 0.
    """
    if not updates:
        return {}
    first_update = updates[0]
    means = {key: sum(update[key] for update in updates) / len(updates) for key in first_update}
    means["mismatch_max"] = max(update["mismatch_max"] for update in updates)
    for key in ("ratio", "mismatch", "mismatch_max"):
        means[f"first_{key}"] = first_update[key]
    return means


def example(step, group):
    """A group as text: the question, its first response, the true answer, the reward parts."""
    score = group["parts"][0]
    rewards = [f"{key} {score[key]:.2f}" for key in METRICS if score[key] is not None]
    return (
        f"--- step {step}: {question_of(group['row'])}\n{group['texts'][0]}\n"
        f"    truth {answer_of(group['row'])}; {', '.join(rewards)}"
    )


# ----------------------------------------------------------------------------------------------
# where the time goes

# What this rank does now, since when (seconds), and how many phases it has begun.
now = {"phase": "start", "step": 0, "since": time.monotonic(), "laps": 0}
spent = {}  # phase -> seconds since the last line of metrics.jsonl


def lap(phase):
    """From here on the time of this rank counts as `phase`."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # kernels lag behind: each phase pays for its own
    moment = time.monotonic()
    spent[now["phase"]] = spent.get(now["phase"], 0.0) + moment - now["since"]
    now["phase"] = phase
    now["since"] = moment
    now["laps"] += 1


def peak_memory():
    """Most memory that any rank has used so far, GB: of its GPU, else of its process."""
    if torch.cuda.is_initialized():
        return distributed.most(torch.cuda.max_memory_allocated()) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return distributed.most(kilobytes * 1024) / 1e9


# ----------------------------------------------------------------------------------------------
# metrics.jsonl


class Log:
    """OUT/metrics.jsonl, one JSON object per step, written by rank 0; TensorBoard and wandb.

    Fields that are times or memory end in _s or _gb or are "seconds"; all others can be reproduced.
    """

    def __init__(self, settings, checkpoint):
        """checkpoint: the state that the run goes on from (checkpoint.newest); {} for a new run."""
        self.path = os.path.join(settings.out, "metrics.jsonl")
        self.notes = {}  # what others add to the next line
        self.sinks = []  # functions (numbers of a line, step) that send them elsewhere
        self.start = time.time() - checkpoint.get("seconds", 0.0)
        with distributed.together(f"--out {settings.out}: cannot write there"):
            if distributed.rank() == 0:
                os.makedirs(settings.out, exist_ok=True)
                self.cut_off(checkpoint.get("metrics_bytes", 0))
        if settings.tensorboard:
            self.add_tensorboard(settings, checkpoint.get("done", 0))
        if settings.wandb:
            self.add_wandb(settings)

    def cut_off(self, size):
        """Remove the lines after the checkpoint: these steps are made again."""
        with open(self.path, "a") as file:
            file.truncate(min(file.tell(), size))  # a larger size would fill the file with zeros

    def add_tensorboard(self, settings, done):
        """done: steps up to the checkpoint; what TensorBoard holds after them is hidden."""
        with distributed.together("--tensorboard: pip install tensorboard first"):
            from torch.utils.tensorboard import SummaryWriter
        if distributed.rank() > 0:
            return
        board = SummaryWriter(settings.out, purge_step=done + 1)

        def send(numbers, step):
            for key, value in numbers.items():
                board.add_scalar(key, value, step)

        self.sinks.append(send)

    def add_wandb(self, settings):
        with distributed.together("--wandb: pip install wandb first"):
            import wandb
        if distributed.rank() > 0:
            return
        wandb.init(project="sr-real", group=settings.out, config=vars(settings))

        def send(numbers, step):
            wandb.log(numbers, step=step)

        self.sinks.append(send)

    def begin(self, first_step, steps, done):
        """A phase begins: its first step and number of steps, for the time left.

        done: steps made so far, in all phases; TensorBoard and wandb count all phases together.
        """
        self.first_step = first_step
        self.steps = steps
        self.steps_before = done - first_step
        self.began = time.time()
        self.last = self.began  # when the last line was written
        spent.clear()

    def write(self, step, processed, **values):
        """One line; called on all ranks.

        processed: tokens that the step trained or sampled, on all ranks, for tokens_per_s.
        """
        lap("log")
        moment = time.time()
        memory = peak_memory()
        seconds_per_step = (moment - self.began) / (step + 1 - self.first_step)
        line = {
            **values,
            **self.notes,
            **{f"{phase}_s": round(seconds, 3) for phase, seconds in spent.items()},
            "tokens_per_s": round(processed / (moment - self.last)),
            "memory_gb": round(memory, 3),
            "eta_s": round(seconds_per_step * (self.steps - step - 1)),
            "seconds": round(moment - self.start, 2),
        }
        line = {"step": step, **{key: value for key, value in line.items() if is_json(value)}}
        self.notes = {}
        self.last = moment
        spent.clear()
        if distributed.rank() == 0:
            self.append(line)
            numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
            for send in self.sinks:
                send(numbers, self.steps_before + step + 1)

    def append(self, line):
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot write ({error.strerror})") from None


def is_json(value):
    """JSON has no NaN and no Infinity."""
    return not isinstance(value, float) or math.isfinite(value)


# ----------------------------------------------------------------------------------------------
# which rank is stuck

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of the project


def watch_ranks(limit):
    """Name the ranks that are behind the others and make no progress for `limit` seconds.

    That is long before a collective gives up (distributed.TIMEOUT). A thread on each rank does it,
    through the store of the process group. -> a function that ends it.
    """
    stop = threading.Event()
    if distributed.world_size() == 1:
        return stop.set
    store = dist.distributed_c10d._get_default_store()
    thread = threading.Thread(target=compare_beats, args=(store, stop, limit), daemon=True)

    def end():
        stop.set()
        thread.join(timeout=10)

    thread.start()
    atexit.register(end)  # a thread inside the store would abort the exit
    return end


def compare_beats(store, stop, limit):
    """The thread of `watch_ranks`: a rank whose beat stays the same makes no progress."""
    laps_of = {}  # rank -> its laps
    changed = {}  # rank -> when its laps were new here
    last_told = -limit
    while not stop.wait(limit / 10):
        try:
            beats = exchange_beats(store)
        except (RuntimeError, ValueError):  # the processes are taking leave
            return
        if not beats:
            continue
        moment = time.monotonic()
        for rank, (laps, _) in enumerate(beats):
            if laps_of.get(rank) != laps:
                laps_of[rank] = laps
                changed[rank] = moment
        least = min(laps_of.values())
        behind = [rank for rank, laps in laps_of.items() if laps == least]
        waiting = [rank for rank, laps in laps_of.items() if laps > least]
        silent = min(moment - changed[rank] for rank in behind)
        teller = min(waiting, default=0)  # one rank tells it, and not one that may be stuck itself
        if distributed.rank() == teller and silent > limit and moment - last_told > limit:
            tell(behind, beats, silent)
            last_told = moment


def exchange_beats(store):
    """Set this rank's beat, [laps, what it does]. -> those of all ranks; [] until each has one."""
    keys = [f"beat{rank}" for rank in range(distributed.world_size())]
    beat = [now["laps"], f"'{now['phase']}' of step {now['step']}, {current_line()}"]
    store.set(keys[distributed.rank()], json.dumps(beat))
    if not store.check(keys):  # store.get would wait for it
        return []
    return [json.loads(store.get(key)) for key in keys]


def tell(behind, beats, silent):
    names = "; ".join(f"rank {rank} in {beats[rank][1]}" for rank in behind[:4])
    minutes = distributed.TIMEOUT // 60
    print(
        f"no progress for {silent:.0f} s: {names} (the others wait, {minutes} minutes at most)",
        file=sys.stderr,
        flush=True,
    )


def current_line():
    """The line of this project that the main thread is at, such as "grpo.py:300"; "?" outside."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        path = path_in_project(frame.f_code.co_filename)
        if path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def path_in_project(file):
    """The path of a source file relative to ROOT; "" if it is not a file of the project.

    Packages of a virtual environment inside ROOT are not of the project.
    """
    if file.startswith("<"):  # generated code has no file: "<string>"
        return ""
    path = os.path.relpath(os.path.abspath(file), ROOT)
    folders = path.split(os.sep)
    if folders[0] == os.pardir or "site-packages" in folders:
        return ""
    return path
