"""Models in and out, checkpoints, exact resume, a clean end on Ctrl-C.

    OUT/checkpoints/step_000120/
        config.json, model.safetensors, tokenizer   the whole model, adapters merged: for --model
        rank_0.safetensors, rank_1.safetensors      per rank: its shards of the trained weights and
                                                    of Adam's moments, states of its generators
        state.json                                  step, position in the data, settings, sizes and
                                                checksums of the files, what the run started from

A checkpoint is written under another name, brought to the disk and renamed, so that a kill at any
moment leaves the one before. Nothing in it is code: safetensors and JSON. On the CPU a resumed run
is bit-identical to one that never stopped. With another number of ranks it goes on with other
random numbers and other roundings. Several nodes need a common OUT. One run at a time writes there
(`hold`).

How a stage uses it:

    origin = origin_of(model, sources)  # before anything is trained
    keeper = Keeper(settings, model, tokenizer, processor, origin, sampler)
    first_step, position = keeper.begin("GRPO", steps, optimizer)  # 0, 0, or where the run stopped
    for step in range(first_step, steps):
        ...  # gradients of this step
        if keeper.finite(loss, norm, rows):
            optimizer.step()
        keeper.after(step + 1, position)  # may save, may end the program
    keeper.close()
"""

import atexit
import glob
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import zlib

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from engine import distributed, watch
from engine.lora import merge_adapters
from formats.errors import UserError
from formats.files import Rows
from model import RegionVLM

LOCK_HOLDS = 3600  # seconds; see `hold`
BAD_STEPS = 3  # so many in a row that are not finite end the run
# Settings that a resumed run can't change: the weights would not fit.
FIXED = ("seed", "size", "lora", "train_vision")
# Settings that it may change without becoming another run.
FREE = (
    "out",
    "resume",
    "explain",
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
    # It may not be there, be cut off, or be something else altogether: a damaged file can raise
    # anything in the depths of transformers.
    except Exception as error:  # noqa: BLE001
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        if type(error) is not ValueError:
            line = f"cannot be loaded ({type(error).__name__}: {line[:150]})"
        problem = f"--model {name}: {line}"
    distributed.stop_together(problem)
    return loaded


def save_model(model, tokenizer, processor, out):
    """Write a sharded model to `out`, whole, for from_pretrained. Called on all ranks.

    It is written to a folder inside and moved, so that nobody sees half a model.
    """
    weights = whole_weights(model)
    partial = os.path.join(out, ".partial")
    try:
        with distributed.together(f"--out {out}: cannot write the model"):
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                write_model(model, weights, tokenizer, processor, partial)
                move_files(partial, out)
    except UserError:
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise


def whole_weights(model):
    """The whole weights of a sharded model, on the CPU of rank 0; adapters are merged into them.

    UserError if any of them is not finite: such a model is never saved.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = merge_adapters(get_model_state_dict(model, options=options))
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    problem = ""
    if broken:
        problem = f"{broken[0]} is not finite, as {len(broken)} tensors of the model: not saved"
    distributed.stop_together(problem)
    return weights


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
# what a run starts from


def origin_of(model, sources):
    """What a run starts from, to be known again when it is resumed: {"--model": text, ..}.

    model: not yet trained nor sharded; sources: [(name, rows, weight)]. Rows of the embedded world
    follow from the settings, and are left out.
    """
    origin = {"--model": fingerprint(model)}
    for name, rows, _ in sources:
        found = describe(rows)
        if found:
            origin[f"data {name}"] = found
    return distributed.gather([origin])[0]


def fingerprint(model):
    """A checksum of some numbers of every weight: another training, another text."""
    crc = 0
    for name, weight in model.named_parameters():
        if distributed.rank() == 0:  # where they were read
            numbers = weight.detach().flatten()
            some = numbers[:: max(1, len(numbers) // 256)].float().cpu().numpy()
            crc = zlib.crc32(f"{name}{tuple(weight.shape)}".encode() + some.tobytes(), crc)
    return f"{distributed.gather([crc])[0]:08x}"


def describe(rows):
    """Rows of a file, or in a list: their number, and a checksum of the first and the last ones."""
    if isinstance(rows, Rows):
        size = os.path.getsize(rows.path)
        with open(rows.path, "rb") as file:
            crc = zlib.crc32(file.read(2**16))
            file.seek(max(0, size - 2**16))
            crc = zlib.crc32(file.read(), crc)
        return f"{len(rows)} rows in {size} bytes, {crc:08x}"
    if isinstance(rows, list) and rows:
        texts = [json.dumps(row.get("conversations")) for row in (rows[0], rows[-1])]
        return f"{len(rows)} rows, {zlib.crc32(''.join(texts).encode()):08x}"
    return ""


# ----------------------------------------------------------------------------------------------
# one run at a time


def hold(out):
    """Keep other runs from writing to a folder until this process ends; called on all ranks.

    UserError if another run holds it. The lock of a process that has died is taken over; that of
    another computer is believed for an hour after its last step.
    """
    problem = ""
    with distributed.together(f"--out {out}: cannot write there"):
        if distributed.rank() == 0:
            problem = take_lock(out)
    distributed.stop_together(problem)


def take_lock(out):
    """-> "", or who has the lock of this folder, a line."""
    path = os.path.join(out, ".lock")
    mine = {"host": socket.gethostname(), **this_process()}
    os.makedirs(out, exist_ok=True)
    other = read_lock(path)
    if other and other != mine and is_alive(other, path):
        return (
            f"--out {out}: another run writes there (pid {other['pid']} on {other['host']}); "
            f"wait for it, or give another --out; if it is dead, remove {path}"
        )
    with open(path, "w") as file:
        json.dump(mine, file)
    atexit.register(give_lock_back, path, mine)
    return ""


def this_process():
    return {"pid": os.getpid(), "began": began_at(os.getpid())}


def began_at(pid):
    """When a process of this computer began, in ticks; None if there is none, or if it is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])  # Z: dead, its parent does not know yet


def read_lock(path):
    """The process that took the lock; None if there is none, or nothing that can be read."""
    try:
        with open(path) as file:
            lock = json.load(file)
        return {"host": str(lock["host"]), "pid": int(lock["pid"]), "began": lock["began"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_alive(lock, path):
    if lock["host"] == socket.gethostname():
        return lock["began"] is not None and began_at(lock["pid"]) == lock["began"]
    return time.time() - os.path.getmtime(path) < LOCK_HOLDS


def give_lock_back(path, mine):
    if read_lock(path) == mine:
        os.remove(path)


# ----------------------------------------------------------------------------------------------
# what keeps a run


class Keeper:
    """Keeps a run: `begin` a phase, ask if a step is `finite`, save `after` it, `close` at the end.

    A run has one phase (GRPO) or several (pretraining, cold start). All ranks call these methods.
    """

    def __init__(self, settings, model, tokenizer, processor, origin, sampler=None):
        """model: sharded; origin: what the run started from (`origin_of`); sampler: the generator
        of the sampling, whose state is kept too."""
        hold(settings.out)
        self.settings = settings
        self.origin = origin
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.sampler = sampler
        self.root = f"{settings.out}/checkpoints"
        self.done = 0  # steps, of all phases
        self.skipped = 0  # updates that were left out
        self.in_row = 0  # of these, since the last sound update
        self.stop_signal = 0  # number of the signal that asked this rank to stop
        self.last_saved = ""  # folder of the last checkpoint of this run
        self.state = resumable_state(settings)  # of a checkpoint to be loaded, else {}
        if self.state:
            self.compare_settings()
        elif settings.resume:
            distributed.say(f"no checkpoint in {self.root}: starting at the first step")
        self.log = watch.Log(settings, self.state)
        if distributed.rank() == 0:
            for partial in glob.glob(f"{glob.escape(self.root)}/step_*.partial"):
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
        for name, found in self.origin.items():
            if name in state["origin"] and state["origin"][name] != found:
                raise UserError(
                    f"{state['folder']}: {name} is not what this run started from, "
                    "or has changed since; bring it back, or start anew with another --out"
                )
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
            first_step = self.state["step"]
            if first_step > steps:
                raise UserError(
                    f"{self.state['folder']}: is of step {first_step} of the {phase}, "
                    f"which has {steps} now; give more steps, or start anew with another --out"
                )
            self.load()
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
        self.last_saved = folder
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
                "Look at these rows or lower --lr"
            )
            if self.last_saved:
                message += f"; {self.last_saved} is whole"
            raise UserError(message if distributed.rank() == 0 else "")  # one rank tells it
        return False

    def after(self, step, position):
        """So many steps of the phase are done: save if it is time.

        After a signal to any rank: save, and end the program here, all ranks at the same step.
        """
        self.done += 1
        watch.now["step"] = step
        stop = distributed.total(self.stop_signal) > 0
        if distributed.rank() == 0:
            os.utime(os.path.join(self.settings.out, ".lock"))  # this run is alive
        if stop or self.is_time_to_save(step):
            watch.lap("save")
            self.save(step, position)
        if stop:
            self.stop(step)

    def stop(self, step):
        distributed.say(
            f"stopped after step {step} of {self.steps} ({self.phase}); --resume goes on"
        )
        sys.exit(0)

    def is_time_to_save(self, step):
        if not self.settings.save_every:
            return False
        if self.in_row and step < self.steps:  # in a bad streak, the last good one is kept
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
        checksums = {}
        try:
            with distributed.together(problem):
                os.makedirs(partial, exist_ok=True)
                save_file(tensors, shards)
                sync(shards)
                checksums[os.path.basename(shards)] = checksum(shards)
                if distributed.rank() == 0:
                    write_model(self.model, weights, self.tokenizer, self.processor, partial)
            for of_rank in distributed.gather([checksums]):
                checksums.update(of_rank)
            with distributed.together(problem):  # by now the files of all ranks are there
                if distributed.rank() == 0:
                    self.finish(folder, partial, step, position, checksums)
        except UserError:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise
        self.last_saved = folder

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

    def finish(self, folder, partial, step, position, checksums):
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
            "checksums": checksums,
            "origin": self.origin,
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
        whole = [folder for folder in folders_of(self.root) if not read_state(folder)[1]]
        for old in whole[:-keep]:
            shutil.rmtree(old)

    def close(self):
        """The training is over: signals do again what they did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.stop_watch()
        if distributed.total(self.stop_signal) > 0:  # it came while the last one was saved
            self.stop(self.steps)
        if self.state:
            raise UserError(f"{self.state['folder']}: is of a phase that these settings leave out")


# ----------------------------------------------------------------------------------------------
# files


def resumable_state(settings):
    """State of the newest whole checkpoint in --out, {} if there is none, on all ranks.

    UserError if there is one and --resume is not given.
    """
    state = newest(settings.out, with_checksums=settings.resume)
    if state and not settings.resume:
        raise UserError(
            f"--out {settings.out}: holds a run of {state['done']} steps; "
            "--resume goes on with it, "
            f"another --out (or removing {settings.out}/checkpoints) starts anew"
        )
    return state


def newest(out, with_checksums):
    """state.json of the newest whole checkpoint of a run, with its "folder"; {} if there is none.

    Tells which ones are damaged. Called on all ranks, which share the work of reading the files.
    """
    for folder in reversed(distributed.gather([folders_of(f"{out}/checkpoints")])[0]):
        state, damaged = read_state(folder)
        if not damaged and with_checksums:
            damaged = wrong_file(folder, state["checksums"])
        damages = [damaged for damaged in distributed.gather([damaged]) if damaged]
        if not damages:
            return {**state, "folder": folder}
        distributed.say(f"{folder}: {damages[0]} is missing or damaged; this checkpoint is skipped")
    return {}


def folders_of(root):
    """The checkpoints in a folder that were renamed, oldest first; files may be damaged since."""
    folders = []
    for path in glob.glob(f"{glob.escape(root)}/step_*"):
        if re.fullmatch(r"step_\d{6,9}", os.path.basename(path)) and os.path.isdir(path):
            folders.append(path)
    return sorted(folders, key=lambda path: int(path.rpartition("_")[2]))


# What state.json holds; numbers are not negative.
STATE = {
    "phase": str,
    "step": int,
    "position": int,
    "done": int,
    "skipped": int,
    "in_row": int,
    "world": int,
    "device": str,
    "settings": dict,
    "files": dict,
    "checksums": dict,
    "origin": dict,
    "metrics_bytes": int,
    "seconds": float,
}


def read_state(folder):
    """-> state.json of a checkpoint, and the name of a file that is missing or damaged, or ""."""
    try:
        with open(f"{folder}/state.json") as file:
            state = json.load(file)
        if not is_state(state, folder):
            return {}, "state.json"
        for name, size in state["files"].items():
            if os.path.getsize(os.path.join(folder, os.path.basename(name))) != size:
                return {}, name
    except FileNotFoundError as error:
        return {}, os.path.basename(error.filename)
    except (OSError, ValueError, RecursionError):
        return {}, "state.json"
    return state, ""


def is_state(state, folder):
    """Is it what `Keeper.finish` writes, of this very checkpoint?"""
    if not isinstance(state, dict):
        return False
    for name, kind in STATE.items():
        value = state.get(name)
        if type(value) is not kind:
            return False
        if kind in (int, float) and not 0 <= value < 1e15:
            return False
    shards = {f"rank_{rank}.safetensors" for rank in range(min(state["world"], 10**5))}
    of_folder = int(folder.rpartition("_")[2])
    return (
        state["done"] == of_folder
        and 0 < state["world"] == len(shards)
        and set(state["checksums"]) == shards <= set(state["files"])
    )


def wrong_file(folder, checksums):
    """The first of this rank's share of the files whose checksum is not the one given; or ""."""
    for i, (name, expected) in enumerate(sorted(checksums.items())):
        if i % distributed.world_size() != distributed.rank():
            continue
        try:
            found = checksum(os.path.join(folder, name))
        except OSError:
            found = None
        if found != expected:
            return name
    return ""


def checksum(path):
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


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
