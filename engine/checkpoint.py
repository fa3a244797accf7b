"""Models in and out, checkpoints, exact resume, a clean end on Ctrl-C.

    OUT/checkpoints/step_000120/
        config.json, model.safetensors, tokenizer   the whole model, adapters merged: for --model
        rank_0.safetensors, rank_1.safetensors      per rank: its shards of the trained weights and
                                                    of Adam's moments, states of its generators
        state.json                                  step, position in the data, settings, file sizes

A checkpoint is written under another name, brought to the disk and renamed, so that a kill at any
moment leaves the one before. Nothing in it is code: safetensors and JSON. On the CPU a resumed run
is bit-identical to one that never stopped. With another number of ranks it goes on with other
random numbers and other roundings. Several nodes need a common OUT.

How a stage uses it:

    keeper = Keeper(settings, model, tokenizer, processor, sampler)
    first_step, position = keeper.begin("GRPO", steps, optimizer)  # 0, 0, or where the run stopped
    for step in range(first_step, steps):
        ...  # gradients of this step
        if keeper.finite(loss, norm, rows):
            optimizer.step()
        keeper.after(step + 1, position)  # may save, may end the program
    keeper.close()
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

BAD_STEPS = 3  # so many in a row that are not finite end the run
# Settings that a resumed run can't change: the weights would not fit.
FIXED = ("seed", "size", "lora", "train_vision")
# Settings that it may change without becoming another run.
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

# ----------------------------------------------------------------------------------------------
# models in and out


def load_model(name):
    """--model -> model (float32), tokenizer, processor. UserError if it can't be loaded.

    Rank 0 reads the weights, so that a node holds them once; distributed.shard sends them. On the
    other ranks the model is mere shapes, on the meta device.
    """
    loaded = None
    problem = ""
    try:
        loaded = RegionVLM.load(name, shapes_only=distributed.rank() > 0)
    # It may not be there, be cut off, or be a model of another kind.
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        problem = f"--model {name}: {str(error).splitlines()[0]}"
    distributed.stop_together(problem)
    return loaded


def save_model(model, tokenizer, processor, out):
    """Write a sharded model to `out`, whole, for from_pretrained. Called on all ranks.

    It is written to another folder and moved, so that nobody sees half a model.
    """
    weights = whole_weights(model)
    partial = f"{out}.partial"
    with distributed.together(f"--out {out}: cannot write the model"):
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            write_model(model, weights, tokenizer, processor, partial)
            move_files(partial, out)


def whole_weights(model):
    """The whole weights of a sharded model, on the CPU of rank 0; adapters are merged into them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return merge_adapters(get_model_state_dict(model, options=options))


def write_model(model, weights, tokenizer, processor, folder):
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def move_files(source, target):
    """Move all files of a folder; config.json last, since it says that the model is all there."""
    os.makedirs(target, exist_ok=True)
    for name in sorted(os.listdir(source), key=lambda name: name == "config.json"):
        os.replace(os.path.join(source, name), os.path.join(target, name))
    os.rmdir(source)


# ----------------------------------------------------------------------------------------------
# what keeps a run


class Keeper:
    """Keeps a run: `begin` a phase, ask if a step is `finite`, save `after` it, `close` at the end.

    A run has one phase (GRPO) or several (pretraining, cold start). All ranks call these methods.
    """

    def __init__(self, settings, model, tokenizer, processor, sampler=None):
        """model: sharded; sampler: the generator of the sampling, whose state is kept too."""
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.sampler = sampler
        self.root = f"{settings.out}/checkpoints"
        self.done = 0  # steps, of all phases
        self.skipped = 0  # updates that were left out
        self.in_row = 0  # of these, since the last sound update
        self.stop_signal = 0  # number of the signal that asked this rank to stop
        self.state = resumable_state(settings)  # of a checkpoint to be loaded, else {}
        if self.state:
            self.compare_settings()
        elif settings.resume:
            distributed.say(f"no checkpoint in {self.root}: starting at the first step")
        self.log = watch.Log(settings, self.state)
        if distributed.rank() == 0:
            for partial in glob.glob(f"{glob.escape(self.root)}/*.partial"):
                shutil.rmtree(partial)  # of a save that was killed
        self.handlers = {}  # signal -> what handled it before
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.on_signal)
        self.stop_watch = watch.watch_ranks(distributed.TIMEOUT / 6)
        distributed.say(
            f"a checkpoint every {settings.save_every} steps; "
            f"Ctrl-C, or kill {os.getpid()}, saves one and stops"
        )

    def compare_settings(self):
        """Tell what differs from the checkpoint's settings; UserError if the weights won't fit."""
        state = self.state
        before = state["settings"]
        other = {}
        for name, value in vars(self.settings).items():
            if name not in FREE and value != before.get(name):
                other[name] = f"--{name} {before.get(name)} (now {value})"
        for name in FIXED:
            if name in other:
                raise UserError(f"{state['folder']}: was made with {other[name]}; resume with that")
        if other:
            distributed.say(
                "other settings than the checkpoint's, from here on another run: "
                f"{', '.join(other.values())}"
            )
        ranks = distributed.world_size()
        if state["world"] != ranks or state["device"] != self.device():
            distributed.say(
                f"the checkpoint is of {state['world']} processes ({state['device']}), "
                f"this run has {ranks} ({self.device()}): "
                "it goes on, no longer bit-identical to one that never stopped"
            )

    def device(self):
        return next(self.model.parameters()).device.type

    def on_signal(self, number, frame):
        self.stop_signal = number
        if distributed.rank() == 0:
            # Not print, which might be at work at this moment.
            os.write(2, b"\nstopping at the end of this step\n")

    def begin(self, phase, steps, optimizer):
        """-> the first step of a phase and the position in its data: 0, 0, or the checkpoint's.

        If the checkpoint is of a later phase: steps, 0, so that nothing is left to do in this one.
        """
        self.phase = phase
        self.steps = steps
        self.optimizer = optimizer
        first_step = 0
        position = 0
        if self.state and self.state["phase"] == phase:
            self.load()
            first_step = self.state["step"]
            position = self.state["position"]
            self.state = {}
        elif self.state:
            first_step = steps
        self.log.begin(first_step, steps, self.done)
        watch.now["step"] = first_step
        return first_step, position

    def load(self):
        """Weights, moments, generators and counters of the checkpoint into model and optimizer."""
        state = self.state
        folder = state["folder"]
        rank = distributed.rank()
        with distributed.together(
            f"{folder}: cannot be read; remove it to resume from the one before"
        ):
            files = []
            for saved_rank in range(state["world"]):
                files.append(safe_open(f"{folder}/rank_{saved_rank}.safetensors", "pt"))
            self.load_tensors(files)
            if rank < state["world"] and state["device"] == self.device():
                set_rng_states(saved_rng_states(files[rank]), self.sampler)
        self.done = state["done"]
        self.skipped = state["skipped"]
        self.in_row = state["in_row"]
        distributed.say(
            f"resumed from {folder}: {self.phase}, step {state['step']} of {self.steps}"
        )

    def load_tensors(self, files):
        """Weights and moments; files: one per rank that saved, keys as in `tensors_of_rank`."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        keys = list(files[0].keys())
        weights = {key.removeprefix("weight:") for key in keys if key.startswith("weight:")}
        if weights != set(trained):
            raise UserError(
                f"{self.state['folder']}: holds other parameters than this model trains; "
                "--model is another one"
            )
        for key in keys:
            kind, _, name = key.partition(":")
            if kind == "rng":
                continue
            parameter = trained[name]
            if kind == "weight":
                of_this_rank(parameter.detach()).copy_(shard_of(key, files, parameter))
            elif kind == "step":
                # A number, the same on all ranks. Fused AdamW wants it beside the parameter.
                step = files[0].get_tensor(key).to(parameter.device)
                self.optimizer.state[parameter]["step"] = step
            else:
                moment = torch.zeros_like(parameter)
                of_this_rank(moment).copy_(shard_of(key, files, parameter))
                self.optimizer.state[parameter][kind] = moment

    def finite(self, loss, norm, rows):
        """Is the update of this step sound? If not, it must be left out.

        loss, norm of the gradient: of all ranks; rows: (id, loss of the pass that held it) of each
        row of this rank. UserError at the third one in a row that is not.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_row = 0
            return True
        bad = distributed.gather([row for row, value in rows if not math.isfinite(value)])
        if not bad:  # only the norm is not finite: any row may be the cause
            bad = distributed.gather([row for row, _ in rows])
        self.skipped += 1
        self.in_row += 1
        self.log.notes["skipped"] = self.skipped
        self.log.notes["skipped_ids"] = self.log.notes.get("skipped_ids", []) + bad
        names = ", ".join(map(str, bad[:8]))
        if len(bad) > 8:
            names += f" and {len(bad) - 8} more"
        step = watch.now["step"]
        what = f"{self.phase}, step {step}: loss {loss}, gradient norm {norm}; rows {names}"
        distributed.say(f"update left out: {what}")
        if self.in_row == BAD_STEPS:
            message = (
                f"{BAD_STEPS} updates in a row not finite, the last: {what}. "
                f"Look at these rows or lower --lr; the last checkpoint in {self.root} is whole"
            )
            raise UserError(message if distributed.rank() == 0 else "")  # one rank tells it
        return False

    def after(self, step, position):
        """So many steps of the phase are done: save if it is time.

        After a signal to any rank: save, and end the program here, all ranks at the same step.
        """
        self.done += 1
        watch.now["step"] = step
        stop = distributed.total(self.stop_signal) > 0
        if stop or self.is_time_to_save(step):
            watch.lap("save")
            self.save(step, position)
        if stop:
            distributed.say(
                f"stopped after step {step} of {self.steps} ({self.phase}); --resume goes on"
            )
            sys.exit(0)

    def is_time_to_save(self, step):
        if not self.settings.save_every:
            return False
        return step == self.steps or self.done % self.settings.save_every == 0

    def save(self, step, position):
        """Write a checkpoint: each rank its shards, rank 0 the whole model and all that is left."""
        folder = f"{self.root}/step_{self.done:06d}"
        partial = f"{folder}.partial"
        shards = f"{partial}/rank_{distributed.rank()}.safetensors"
        problem = f"{folder}: cannot be written; the checkpoint before is whole"
        weights = whole_weights(self.model)
        tensors = self.tensors_of_rank()
        try:
            with distributed.together(problem):
                os.makedirs(partial, exist_ok=True)
                save_file(tensors, shards)
                sync(shards)
                if distributed.rank() == 0:
                    write_model(self.model, weights, self.tokenizer, self.processor, partial)
            with distributed.together(problem):  # by now the files of all ranks are there
                if distributed.rank() == 0:
                    self.finish(folder, partial, step, position)
        except UserError:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise

    def tensors_of_rank(self):
        """What this rank saves, on the CPU: "kind:name" -> tensor.

        kind: "rng" with the name of a generator; "weight" or a key of Adam's state ("exp_avg",
        "exp_avg_sq", "step") with the name of a parameter that is trained.
        """
        tensors = {}
        for name, state in rng_states(self.sampler).items():
            tensors[f"rng:{name}"] = state
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            values = {"weight": parameter.detach(), **self.optimizer.state.get(parameter, {})}
            for kind, value in values.items():
                tensors[f"{kind}:{name}"] = of_this_rank(value).cpu().contiguous()
        return tensors

    def finish(self, folder, partial, step, position):
        """On rank 0, when all files are there: state.json, rename, remove old checkpoints."""
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
        keep = max(1, self.settings.keep)
        for old in whole_folders(self.root)[:-keep]:
            shutil.rmtree(old)

    def close(self):
        """The training is over: signals do again what they did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.stop_watch()
        if self.state:
            raise UserError(f"{self.state['folder']}: is of a phase that these settings leave out")


# ----------------------------------------------------------------------------------------------
# files


def resumable_state(settings):
    """State of the newest whole checkpoint in --out, {} if there is none, on all ranks.

    UserError if there is one and --resume is not given.
    """
    found = newest(settings.out) if distributed.rank() == 0 else None
    state = distributed.gather([found])[0]
    if state and not settings.resume:
        raise UserError(
            f"--out {settings.out}: holds a run of {state['done']} steps; "
            "--resume goes on with it, "
            f"another --out (or removing {settings.out}/checkpoints) starts anew"
        )
    return state


def newest(out):
    """state.json of the newest whole checkpoint of a run, with its "folder"; {} if there is none.

    Tells which ones are damaged.
    """
    for folder in reversed(whole_folders(f"{out}/checkpoints")):
        state, damaged = read_state(folder)
        if not damaged:
            return {**state, "folder": folder}
        distributed.say(f"{folder}: {damaged} is missing or cut off; this checkpoint is skipped")
    return {}


def whole_folders(root):
    """The checkpoints in a folder that were renamed, oldest first; files may be damaged since."""
    return sorted(glob.glob(f"{glob.escape(root)}/step_*[0-9]"))


def read_state(folder):
    """-> state.json of a checkpoint, and the name of a file that is missing or cut off, or ""."""
    try:
        with open(f"{folder}/state.json") as file:
            state = json.load(file)
        sizes = {name: os.path.getsize(f"{folder}/{name}") for name in state["files"]}
        damaged = [name for name in sizes if sizes[name] != state["files"][name]]
    except FileNotFoundError as error:
        return {}, os.path.basename(error.filename)
    except (OSError, ValueError, KeyError, TypeError):
        return {}, "state.json"
    return state, damaged[0] if damaged else ""


def sync(path):
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def of_this_rank(tensor):
    """The shard of a sharded tensor; of a single rank, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(key, files, like):
    """This rank's shard of a tensor, from the files of the ranks that saved it.

    With another number of ranks the whole is put together and cut anew, as the parameter `like` is.
    FSDP2 cuts along the first dimension.
    """
    if len(files) == distributed.world_size():
        return files[distributed.rank()].get_tensor(key)
    whole = torch.cat([file.get_tensor(key) for file in files]).to(like.device)
    if not isinstance(like, DTensor):
        return whole
    # src_data_rank None: each rank cuts its own copy, nothing is sent.
    cut = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return cut.to_local()


# ----------------------------------------------------------------------------------------------
# random generators: PyTorch's (CPU, CUDA, the sampling's own), Python's and NumPy's


def rng_states(sampler):
    """The states of all generators of this process, name -> tensor."""
    _, keys, position, *_ = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1]),
        "numpy": torch.tensor([*keys.tolist(), position]),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if sampler:
        states["sampler"] = sampler.get_state()
    return states


def set_rng_states(states, sampler):
    """The inverse of `rng_states`."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))  # 3: version of the format
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    if sampler:
        sampler.set_state(states["sampler"])


def saved_rng_states(file):
    """The states in the file of a rank, name -> tensor."""
    states = {}
    keys = file.keys()
    for key in keys:
        if key.startswith("rng:"):
            states[key.removeprefix("rng:")] = file.get_tensor(key)
    return states
