"""Checkpoints, exact resume, a clean end on Ctrl-C: what a training loop needs to be left alone over a weekend.

    OUT/checkpoints/step_000120/
        config.json, model.safetensors, tokenizer ..   the whole model, adapters merged: for from_pretrained and --model
        rank_0.safetensors, ..                         shards of what is trained and of Adam's moments; RNG states
        state.json                                     step, position in the data, settings, size of every file

A checkpoint is written beside, brought to the disk and renamed, so that a kill at any moment leaves the one before.
Nothing in it is code: safetensors and JSON. On the CPU a resumed run is bit-identical to one that never stopped; with
another number of ranks it goes on, on other random numbers and with other roundings. Several nodes share OUT.
"""
import glob
import json
import math
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

import run
import watch

FIXED = ("seed", "size", "lora", "train_vision")            # with another value the weights would not fit
FREE = ("out", "resume", "save_every", "keep", "questions", "show_every", "wandb", "tensorboard", "workers")
BAD_STEPS = 3                                               # so many in a row that are not finite end the run

# ---------------------------------------------------------------------------------------------------------------------
# random number generators of a rank, as tensors


def rng_states(sampler):
    name, keys, place, *_ = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1]),
              "numpy": torch.tensor([*keys.tolist(), place])}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | ({"sampler": sampler.get_state()} if sampler else {})


def set_rng_states(states, sampler):
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, place = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), place))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    if sampler:
        sampler.set_state(states["sampler"])


# ---------------------------------------------------------------------------------------------------------------------
# files


def newest(out):
    """State of the newest whole checkpoint of a run, {} if there is none; tells which ones are damaged."""
    for folder in sorted(glob.glob(f"{glob.escape(out)}/checkpoints/step_*[0-9]"), reverse=True):
        try:
            with open(f"{folder}/state.json") as file:
                state = json.load(file)
            sizes = {name: os.path.getsize(f"{folder}/{name}") for name in state["files"]}
            broken = [name for name in sizes if sizes[name] != state["files"][name]]
        except FileNotFoundError as error:
            broken = [os.path.basename(error.filename)]
        except (OSError, ValueError, KeyError, TypeError):
            broken = ["state.json"]
        if not broken:
            return {**state, "folder": folder}
        run.say(f"{folder}: {broken[0]} is missing or cut off; this checkpoint is skipped")
    return {}


def sync(path):
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_of(name, files, like):
    """This rank's shard of a tensor, from the shards of so many ranks: FSDP2 cuts along the first dimension."""
    if len(files) == run.world():
        return files[run.rank()].get_tensor(name)
    whole = torch.cat([file.get_tensor(name) for file in files])
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


def state_in(settings):
    """State of the newest whole checkpoint in --out, {} if there is none; without --resume there must be none."""
    state = run.gather([newest(settings.out) if run.rank() == 0 else None])[0]
    if state and not settings.resume:
        raise run.UserError(f"--out {settings.out}: holds a run of {state['done']} steps; --resume goes on with it, "
                            f"another --out (or removing {settings.out}/checkpoints) starts anew")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# what a training loop talks to


class Keeper:
    """Keeps a run: `begin` a phase, ask if a step is `finite`, tell what is done `after` it; `close` at the end."""

    def __init__(self, settings, model, tokenizer, processor, sampler=None):
        self.settings, self.model, self.parts, self.sampler = settings, model, (tokenizer, processor), sampler
        self.root, self.done, self.skipped, self.in_row, self.signal = f"{settings.out}/checkpoints", 0, 0, 0, 0
        self.state = state_in(settings)
        if self.state:
            self.check()
        elif settings.resume:
            run.say(f"no checkpoint in {self.root}: starting at the first step")
        self.log = watch.Log(settings, self.state)
        if run.rank() == 0:
            for partial in glob.glob(f"{glob.escape(self.root)}/*.partial"):                 # of a save that was killed
                shutil.rmtree(partial)
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.stop_watch = watch.watch_ranks(run.TIMEOUT / 6)
        run.say(f"a checkpoint every {settings.save_every} steps; Ctrl-C, or kill {os.getpid()}, saves one and stops")

    def check(self):
        """Compare the settings with the checkpoint's."""
        settings, before = vars(self.settings), self.state["settings"]
        other = {name: f"--{name} {before.get(name)} (now {value})" for name, value in settings.items()
                 if name not in FREE and value != before.get(name)}
        for name in FIXED:
            if name in other:
                raise run.UserError(f"{self.state['folder']}: was made with {other[name]}; resume with that")
        if other:
            run.say(f"other settings than the checkpoint's, from here on another run: {', '.join(other.values())}")
        if (self.state["world"], self.state["device"]) != (run.world(), self.device()):
            run.say(f"the checkpoint is of {self.state['world']} processes ({self.state['device']}), this run has "
                    f"{run.world()} ({self.device()}): it goes on, no longer bit-identical to one that never stopped")

    def device(self):
        return next(self.model.parameters()).device.type

    def on_signal(self, number, frame):
        self.signal = number
        if run.rank() == 0:
            os.write(2, b"\nstopping at the end of this step\n")                             # print might be at work

    def begin(self, phase, steps, optimizer):
        """-> first step of a phase, position in its data: 0, 0, or those of the checkpoint if it is of this phase. If
        the checkpoint is of a later phase: `steps`, so that this one has nothing left to do."""
        self.phase, self.steps, self.optimizer, first, position = phase, steps, optimizer, 0, 0
        if self.state:
            first, position = steps, 0
            if self.state["phase"] == phase:
                self.load()
                first, position, self.state = self.state["step"], self.state["position"], {}
        self.log.begin(first, steps, self.done)
        watch.now["step"] = first
        return first, position

    def load(self):
        """Weights, moments, generators and counters of the checkpoint into the model and the optimizer."""
        state, trained = self.state, {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with run.together(f"{state['folder']}: cannot be read; remove it to resume from the one before"):
            files = [safe_open(f"{state['folder']}/rank_{rank}.safetensors", "pt") for rank in range(state["world"])]
            saved = [key.partition(":") for key in files[0].keys()]
            if {name for kind, _, name in saved if kind == "weight"} != set(trained):
                raise run.UserError(f"{state['folder']}: holds other parameters than this model trains; "
                                    "--model is another one")
            for kind, _, name in saved:
                if kind == "rng":
                    continue
                parameter, key = trained[name], f"{kind}:{name}"
                if kind == "step":
                    self.optimizer.state[parameter][kind] = files[0].get_tensor(key).to(parameter.device)    # fused
                    continue
                target = parameter.detach() if kind == "weight" else torch.zeros_like(parameter)
                target.to_local().copy_(shard_of(key, files, parameter))
                if kind != "weight":
                    self.optimizer.state[parameter][kind] = target
            if run.rank() < state["world"] and state["device"] == self.device():
                mine = files[run.rank()]
                set_rng_states({n: mine.get_tensor(f"rng:{n}") for k, _, n in saved if k == "rng"}, self.sampler)
        self.done, self.skipped, self.in_row = state["done"], state["skipped"], state["in_row"]
        run.say(f"resumed from {state['folder']}: {self.phase}, step {state['step']} of {self.steps}")

    def finite(self, loss, norm, rows):
        """Is the update of this step sound? If not, it has to be left out; the third in a row ends the run.

        loss, norm of the gradient: of all ranks; rows: (id, loss of the pass that held it) of each row of this rank.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_row = 0
            return True
        odd = run.gather([row for row, value in rows if not math.isfinite(value)]) or run.gather([r for r, _ in rows])
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        self.log.notes |= {"skipped": self.skipped, "skipped_ids": self.log.notes.get("skipped_ids", []) + odd}
        names = ", ".join(map(str, odd[:8])) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
        what = f"{self.phase}, step {watch.now['step']}: loss {loss}, gradient norm {norm}; rows {names}"
        run.say(f"update left out: {what}")
        if self.in_row == BAD_STEPS:
            raise run.UserError("" if run.rank() else f"{BAD_STEPS} updates in a row not finite, the last: {what}. "
                                f"Look at these rows or lower --lr; the last checkpoint in {self.root} is whole")
        return False

    def after(self, step, position):
        """So many steps of the phase are done: save if it is time; after a signal save, and the program ends here."""
        self.done, watch.now["step"] = self.done + 1, step
        stop = run.total(self.signal) > 0                   # a signal to one rank stops all, at the same step
        if stop or self.settings.save_every and (step == self.steps or self.done % self.settings.save_every == 0):
            watch.lap("save")
            self.save(step, position)
        if stop:
            run.say(f"stopped after step {step} of {self.steps} ({self.phase}); --resume goes on")
            sys.exit(0)

    def save(self, step, position):
        folder = f"{self.root}/step_{self.done:06d}"
        partial, weights = f"{folder}.partial", run.whole_weights(self.model)
        tensors = {f"rng:{name}": state for name, state in rng_states(self.sampler).items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = {"weight": parameter.detach(), **self.optimizer.state.get(parameter, {})}
                for kind, value in values.items():
                    value = value.to_local() if isinstance(value, DTensor) else value
                    tensors[f"{kind}:{name}"] = value.cpu().contiguous()
        try:
            with run.together(f"{folder}: cannot be written; the checkpoint before is whole"):
                os.makedirs(partial, exist_ok=True)
                save_file(tensors, f"{partial}/rank_{run.rank()}.safetensors")
                sync(f"{partial}/rank_{run.rank()}.safetensors")
                if run.rank() == 0:
                    run.write_model(self.model, weights, *self.parts, partial)
            with run.together(f"{folder}: cannot be written; the checkpoint before is whole"):
                if run.rank() == 0:
                    self.finish(folder, partial, step, position)
        except run.UserError:
            if run.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise

    def finish(self, folder, partial, step, position):
        """On rank 0, when all files are there: state.json, to the disk, rename, remove the oldest."""
        sizes = {name: os.path.getsize(f"{partial}/{name}") for name in os.listdir(partial)}
        state = {"phase": self.phase, "step": step, "position": position, "done": self.done, "skipped": self.skipped,
                 "in_row": self.in_row, "world": run.world(), "device": self.device(),
                 "settings": vars(self.settings), "files": sizes,
                 "metrics_bytes": os.path.getsize(self.log.path), "seconds": time.time() - self.log.start}
        with open(f"{partial}/state.json", "w") as file:
            json.dump(state, file, indent=1)
        for path in [self.log.path, *glob.glob(f"{glob.escape(partial)}/*"), partial]:
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)           # a damaged one of that number
        os.rename(partial, folder)
        sync(self.root)
        for old in sorted(glob.glob(f"{glob.escape(self.root)}/step_*[0-9]"))[:-max(1, self.settings.keep)]:
            shutil.rmtree(old)

    def close(self):
        """The training is over: signals do what they always do."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.stop_watch()
        if self.state:
            raise run.UserError(f"{self.state['folder']}: is of a phase that these settings leave out")
