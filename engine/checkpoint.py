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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from engine import distributed, watch
from engine.lora import merge_adapters
from formats.errors import UserError
from model import RegionVLM


def load_model(name):
    """--model: RegionVLM.load -> model (float32), tokenizer, processor; UserError if it can't be loaded."""
    try:
        return RegionVLM.load(name)
    except (
        OSError,
        RuntimeError,
        ValueError,
        SafetensorError,
    ) as error:  # not found, cut off, other
        raise UserError(f"--model {name}: {str(error).splitlines()[0]}") from None


def whole_weights(model):
    """The weights of a sharded model, whole, on the CPU of rank 0; adapters are merged into their layers."""
    return merge_adapters(
        get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    )


def write_model(model, weights, tokenizer, processor, folder):
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(model, tokenizer, processor, out):
    """Whole weights in `out`, readable by from_pretrained. Written beside and renamed: nobody sees half a model."""
    weights, partial = whole_weights(model), f"{out}.partial"
    with distributed.together(f"--out {out}: cannot write the model"):
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            write_model(model, weights, tokenizer, processor, partial)
            os.makedirs(out, exist_ok=True)
            for name in sorted(
                os.listdir(partial), key="config.json".__eq__
            ):  # that one last: it says
                os.replace(
                    os.path.join(partial, name), os.path.join(out, name)
                )  # that all is there
            os.rmdir(partial)


FIXED = ("seed", "size", "lora", "train_vision")  # with another value the weights would not fit
FREE = (
    "out",
    "resume",
    "save_every",
    "keep",
    "questions",
    "show_every",
    "wandb",
    "tensorboard",
    "workers",
)
BAD_STEPS = 3  # so many in a row that are not finite end the run


def rng_states(sampler):
    name, keys, place, *_ = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*keys.tolist(), place]),
    }
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
        distributed.say(f"{folder}: {broken[0]} is missing or cut off; this checkpoint is skipped")
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
    if len(files) == distributed.world_size():
        return files[distributed.rank()].get_tensor(name)
    whole = torch.cat([file.get_tensor(name) for file in files])
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).to_local()


def resumable_state(settings):
    """State of the newest whole checkpoint in --out, {} if there is none; without --resume there must be none."""
    state = distributed.gather([newest(settings.out) if distributed.rank() == 0 else None])[0]
    if state and not settings.resume:
        raise UserError(
            f"--out {settings.out}: holds a run of {state['done']} steps; --resume goes on with it, "
            f"another --out (or removing {settings.out}/checkpoints) starts anew"
        )
    return state


class Keeper:
    """Keeps a run: `begin` a phase, ask if a step is `finite`, tell what is done `after` it; `close` at the end."""

    def __init__(self, settings, model, tokenizer, processor, sampler=None):
        self.settings, self.model, self.parts, self.sampler = (
            settings,
            model,
            (tokenizer, processor),
            sampler,
        )
        self.root, self.done, self.skipped, self.in_row, self.signal = (
            f"{settings.out}/checkpoints",
            0,
            0,
            0,
            0,
        )
        self.state = resumable_state(settings)
        if self.state:
            self.check()
        elif settings.resume:
            distributed.say(f"no checkpoint in {self.root}: starting at the first step")
        self.log = watch.Log(settings, self.state)
        if distributed.rank() == 0:
            for partial in glob.glob(
                f"{glob.escape(self.root)}/*.partial"
            ):  # of a save that was killed
                shutil.rmtree(partial)
        self.handlers = {
            s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)
        }
        self.stop_watch = watch.watch_ranks(distributed.TIMEOUT / 6)
        distributed.say(
            f"a checkpoint every {settings.save_every} steps; Ctrl-C, or kill {os.getpid()}, saves one and stops"
        )

    def check(self):
        """Compare the settings with the checkpoint's."""
        settings, before = vars(self.settings), self.state["settings"]
        other = {
            name: f"--{name} {before.get(name)} (now {value})"
            for name, value in settings.items()
            if name not in FREE and value != before.get(name)
        }
        for name in FIXED:
            if name in other:
                raise UserError(
                    f"{self.state['folder']}: was made with {other[name]}; resume with that"
                )
        if other:
            distributed.say(
                f"other settings than the checkpoint's, from here on another run: {', '.join(other.values())}"
            )
        if (self.state["world"], self.state["device"]) != (distributed.world_size(), self.device()):
            distributed.say(
                f"the checkpoint is of {self.state['world']} processes ({self.state['device']}), this run has "
                f"{distributed.world_size()} ({self.device()}): it goes on, no longer bit-identical to one that never stopped"
            )

    def device(self):
        return next(self.model.parameters()).device.type

    def on_signal(self, number, frame):
        self.signal = number
        if distributed.rank() == 0:
            os.write(2, b"\nstopping at the end of this step\n")  # print might be at work

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
        state, trained = (
            self.state,
            {n: p for n, p in self.model.named_parameters() if p.requires_grad},
        )
        with distributed.together(
            f"{state['folder']}: cannot be read; remove it to resume from the one before"
        ):
            files = [
                safe_open(f"{state['folder']}/rank_{rank}.safetensors", "pt")
                for rank in range(state["world"])
            ]
            saved = [key.partition(":") for key in files[0].keys()]
            if {name for kind, _, name in saved if kind == "weight"} != set(trained):
                raise UserError(
                    f"{state['folder']}: holds other parameters than this model trains; "
                    "--model is another one"
                )
            for kind, _, name in saved:
                if kind == "rng":
                    continue
                parameter, key = trained[name], f"{kind}:{name}"
                if kind == "step":
                    self.optimizer.state[parameter][kind] = (
                        files[0].get_tensor(key).to(parameter.device)
                    )  # fused
                    continue
                target = parameter.detach() if kind == "weight" else torch.zeros_like(parameter)
                target.to_local().copy_(shard_of(key, files, parameter))
                if kind != "weight":
                    self.optimizer.state[parameter][kind] = target
            if distributed.rank() < state["world"] and state["device"] == self.device():
                mine = files[distributed.rank()]
                set_rng_states(
                    {n: mine.get_tensor(f"rng:{n}") for k, _, n in saved if k == "rng"},
                    self.sampler,
                )
        self.done, self.skipped, self.in_row = state["done"], state["skipped"], state["in_row"]
        distributed.say(
            f"resumed from {state['folder']}: {self.phase}, step {state['step']} of {self.steps}"
        )

    def finite(self, loss, norm, rows):
        """Is the update of this step sound? If not, it has to be left out; the third in a row ends the run.

        loss, norm of the gradient: of all ranks; rows: (id, loss of the pass that held it) of each row of this rank.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_row = 0
            return True
        odd = distributed.gather(
            [row for row, value in rows if not math.isfinite(value)]
        ) or distributed.gather([r for r, _ in rows])
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        self.log.notes |= {
            "skipped": self.skipped,
            "skipped_ids": self.log.notes.get("skipped_ids", []) + odd,
        }
        names = ", ".join(map(str, odd[:8])) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
        what = f"{self.phase}, step {watch.now['step']}: loss {loss}, gradient norm {norm}; rows {names}"
        distributed.say(f"update left out: {what}")
        if self.in_row == BAD_STEPS:
            raise UserError(
                ""
                if distributed.rank()
                else f"{BAD_STEPS} updates in a row not finite, the last: {what}. "
                f"Look at these rows or lower --lr; the last checkpoint in {self.root} is whole"
            )
        return False

    def after(self, step, position):
        """So many steps of the phase are done: save if it is time; after a signal save, and the program ends here."""
        self.done, watch.now["step"] = self.done + 1, step
        stop = (
            distributed.total(self.signal) > 0
        )  # a signal to one rank stops all, at the same step
        if (
            stop
            or self.settings.save_every
            and (step == self.steps or self.done % self.settings.save_every == 0)
        ):
            watch.lap("save")
            self.save(step, position)
        if stop:
            distributed.say(
                f"stopped after step {step} of {self.steps} ({self.phase}); --resume goes on"
            )
            sys.exit(0)

    def save(self, step, position):
        folder = f"{self.root}/step_{self.done:06d}"
        partial, weights = f"{folder}.partial", whole_weights(self.model)
        tensors = {f"rng:{name}": state for name, state in rng_states(self.sampler).items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                values = {"weight": parameter.detach(), **self.optimizer.state.get(parameter, {})}
                for kind, value in values.items():
                    value = value.to_local() if isinstance(value, DTensor) else value
                    tensors[f"{kind}:{name}"] = value.cpu().contiguous()
        try:
            with distributed.together(
                f"{folder}: cannot be written; the checkpoint before is whole"
            ):
                os.makedirs(partial, exist_ok=True)
                save_file(tensors, f"{partial}/rank_{distributed.rank()}.safetensors")
                sync(f"{partial}/rank_{distributed.rank()}.safetensors")
                if distributed.rank() == 0:
                    write_model(self.model, weights, *self.parts, partial)
            with distributed.together(
                f"{folder}: cannot be written; the checkpoint before is whole"
            ):
                if distributed.rank() == 0:
                    self.finish(folder, partial, step, position)
        except UserError:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise

    def finish(self, folder, partial, step, position):
        """On rank 0, when all files are there: state.json, to the disk, rename, remove the oldest."""
        sizes = {name: os.path.getsize(f"{partial}/{name}") for name in os.listdir(partial)}
        state = {
            "phase": self.phase,
            "step": step,
            "position": position,
            "done": self.done,
            "skipped": self.skipped,
            "in_row": self.in_row,
            "world": distributed.world_size(),
            "device": self.device(),
            "settings": vars(self.settings),
            "files": sizes,
            "metrics_bytes": os.path.getsize(self.log.path),
            "seconds": time.time() - self.log.start,
        }
        with open(f"{partial}/state.json", "w") as file:
            json.dump(state, file, indent=1)
        for path in [self.log.path, *glob.glob(f"{glob.escape(partial)}/*"), partial]:
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of that number
        os.rename(partial, folder)
        sync(self.root)
        for old in sorted(glob.glob(f"{glob.escape(self.root)}/step_*[0-9]"))[
            : -max(1, self.settings.keep)
        ]:
            shutil.rmtree(old)

    def close(self):
        """The training is over: signals do what they always do."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.stop_watch()
        if self.state:
            raise UserError(f"{self.state['folder']}: is of a phase that these settings leave out")
