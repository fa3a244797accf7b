"""Long runs: killed anywhere and resumed they must equal a run that never stopped, bit by bit; signals, steps that are
not finite, full disks, ranks that stall; adapters; the memory plan. A run is a forked process with a tiny model.

    python -m pytest -q test_resume.py                                 # two minutes on one core
"""

import dataclasses
import gc
import glob
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import types
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import encoded, make_learner, with_advantages
from test_model import ROWS, make_config, make_model, make_processor, make_tokenizer
from tqdm import tqdm

import data
import grpo
import sft
from engine import checkpoint, distributed, plan, shared_prefix
from engine.checkpoint import load_model
from engine.lora import LoRALinear, adapters_off, add_adapters, merge_adapters
from engine.settings import run_main
from engine.shared_prefix import token_logprobs
from model import REGION_TOKEN, RegionVLM, token_rules
from tools import bench

CPU = torch.device("cpu")
SMALL = {
    "sft": {
        "pretrain": 3,
        "steps": 5,
        "batch": 4,
        "lr": 1e-3,
        "micro_tokens": 300,
        "save_every": 2,
    },
    "grpo": {
        "steps": 4,
        "prompts": 4,
        "group_size": 2,
        "minibatches": 2,
        "max_new_tokens": 7,
        "lr": 1e-3,
        "filter": "none",
        "kl": 0.05,
        "save_every": 1,
        "show_every": 0,
    },
}
TEXTS = [
    "0.5",
    "<think>red blue green</think>\n<answer>B</answer>",
    "<think>It is near.</think>\n<answer>0.4</answer>",
]


class Endless:
    """A blend of the four rows, each step in another order."""

    def __getitem__(self, position):
        return ROWS[(position + position // 4) % 4]


@pytest.fixture(scope="module")
def tokenizer():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it is used before and after forks
    torch.set_num_threads(1)
    return make_tokenizer()


def start(program, tokenizer, out, more):
    """What main() of a program does, with a tiny model and a few rows; "both": that of grpo.py, which cold-starts."""
    parts = make_model(tokenizer, dtype=torch.float32), tokenizer, make_processor()
    rows = [
        {
            **row,
            "id": i,
            "conversations": [row["conversations"][0], {"from": "gpt", "value": TEXTS[i % 3]}],
        }
        for i, row in enumerate(ROWS * 5)
    ]
    sft.cold_start_blend = lambda *_, **__: [("all", rows, 1.0)]
    grpo.rl_blend = lambda *_, **__: [("all", ROWS, 1.0)]
    sft.perception_stages = lambda *_: [(share, [("all", rows[:9], 1.0)]) for share in (0.3, 1.0)]
    data.score = lambda row, text: {
        "reward": zlib.crc32(text.encode()) % 7 / 6,
        "accuracy": 0.0,
        "format": 0.0,
        "detection": None,
        "center_errors_m": [],
    }
    if program == "both":
        cold = sft.Settings
        grpo.new_model = lambda *_: parts
        distributed.setup = lambda seed: CPU  # it was called, threads set
        sft.Settings = lambda **given: dataclasses.replace(cold(), **given, **SMALL["sft"])
        os.makedirs(out, exist_ok=True)
        os.chdir(out)
        words = [f"--{name}={value}" for name, value in {**SMALL["grpo"], "questions": 0}.items()]
        sys.argv = ["grpo.py", *words, "--resume" if more["resume"] else "--no-resume"]
        return grpo.main()
    module = {"sft": sft, "grpo": grpo}[program]
    settings = dataclasses.replace(module.Settings(), out=str(out), **{**SMALL[program], **more})
    return module.train(
        settings, *parts, Endless() if program == "grpo" else sft.cold_start_blend(), CPU
    )


def fork():
    """os.fork. A process group that another test has left, collected in the child, would wait for threads that only the
    parent has: what is garbage goes before, the rest stays. And tqdm's lock is one for all forks: a run that is killed
    while it holds it would stop all later ones."""
    gc.collect()
    pid = os.fork()
    if pid == 0:
        gc.freeze()
        tqdm.set_lock(threading.RLock())
    return pid


def launch(program, tokenizer, out, before=lambda: None, rank=0, world=1, **more):
    """Start a run in a process of its own, its output in OUT.log. -> process id"""
    pid = fork()
    if pid:
        return pid
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | (os.O_APPEND if rank else os.O_TRUNC))
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))

    def stage():
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{out}.store", rank=rank, world_size=world
            )
        distributed.setup(0)
        torch.set_num_threads(1)
        before()
        start(program, tokenizer, out, more)

    code = 99
    try:
        run_main(stage)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  a child process tells of everything, then ends
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid, seconds=200):
    """-> exit code of a process, minus the signal that killed it."""
    until = time.time() + seconds
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError


def finish(program, tokenizer, out, world=1, **more):
    """Run to the end. -> exit code of each rank"""
    Path(f"{out}.store").unlink(missing_ok=True)
    pids = [
        launch(program, tokenizer, out, rank=rank, world=world, **more) for rank in range(world)
    ]
    codes = [wait(pid) for pid in pids]
    return codes[0] if len(set(codes)) == 1 else codes


def metrics(out):
    """Lines of metrics.jsonl without what a clock or a memory gauge says."""
    lines = [json.loads(line) for line in Path(f"{out}/metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.endswith(("_s", "_gb", "seconds"))}
        for line in lines
    ]


def result(out):
    return metrics(out), (Path(out) / "model.safetensors").read_bytes()


def said(out):
    return Path(f"{out}.log").read_text()


@pytest.fixture(scope="module")
def unbroken(tokenizer, tmp_path_factory):
    """Runs that nothing happened to: program -> (metrics, weights), and how long one takes."""
    folder, found = tmp_path_factory.mktemp("unbroken"), {}
    for program in SMALL:
        began = time.time()
        assert finish(program, tokenizer, folder / program) == 0, said(folder / program)
        found[program] = (*result(folder / program), time.time() - began)
    return folder, found


def assert_equal(out, program, unbroken):
    lines, weights = result(out)
    assert lines == unbroken[1][program][0]
    assert weights == unbroken[1][program][1]


def test_a_run_trains_and_leaves_the_newest_checkpoints(unbroken):
    for program, folders in (
        ("sft", ["step_000006", "step_000008"]),
        ("grpo", ["step_000003", "step_000004"]),
    ):
        lines = unbroken[1][program][0]
        assert len({line["loss"] for line in lines}) == len(lines) == (8 if program == "sft" else 4)
        assert sorted(os.listdir(unbroken[0] / program / "checkpoints")) == folders
        model, _, _ = load_model(str(unbroken[0] / program / "checkpoints" / folders[1]))
        final, _, _ = load_model(str(unbroken[0] / program))
        pairs = list(zip(model.parameters(), final.parameters()))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# kills


@pytest.mark.parametrize("program", SMALL)
def test_T27_killed_at_random_moments_and_resumed_equals_never_stopped(
    program, tokenizer, unbroken, tmp_path
):
    out, dice, kills = tmp_path / "out", random.Random(7), 0
    for _ in range(40):
        pid = launch(program, tokenizer, out, resume=True)
        time.sleep(dice.uniform(0.3, 1) * unbroken[1][program][2] if kills < 4 else 0)
        if kills < 4:
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    assert kills and code == 0, said(out)
    assert_equal(out, program, unbroken)


def killers():
    """Moments of a save: name -> what to put in place of a function, so that the process is killed there."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def half(write):  # the file is written, and only its first half is there
        def cut(tensors, path):
            write(tensors, path)
            os.truncate(path, os.path.getsize(path) // 2)
            die()

        return cut

    def partly(remove):
        def cut(folder, **options):
            if not os.path.exists(f"{folder}/rank_0.safetensors") or str(folder).endswith(
                ".partial"
            ):
                return remove(folder, **options)
            os.remove(f"{folder}/rank_0.safetensors")
            die()

        return cut

    def after(function):
        return lambda *words: (function(*words), die())

    def text_half(dump):
        return lambda state, file, **_: (file.write('{"phase": "co'), file.flush(), die())

    return {
        "shards half written": (checkpoint, "save_file", half),
        "model written": (checkpoint, "write_model", after),
        "state half written": (json, "dump", text_half),
        "before the rename": (os, "rename", lambda f: lambda *_: die()),
        "after the rename": (os, "rename", after),
        "old one half removed": (shutil, "rmtree", partly),
        "last files moved": (os, "replace", after),
    }


def test_T27_killed_inside_a_save_and_resumed_equals_never_stopped(tokenizer, unbroken, tmp_path):
    def kill_at(module, function, make):
        setattr(module, function, make(getattr(module, function)))

    out = tmp_path / "out"
    for name, (module, function, make) in killers().items():
        code = wait(
            launch(
                "sft",
                tokenizer,
                out,
                resume=True,
                before=partial(kill_at, module, function, make),
            )
        )
        assert code == -signal.SIGKILL, (name, said(out))
    assert finish("sft", tokenizer, out, resume=True) == 0, said(out)
    assert_equal(out, "sft", unbroken)
    assert not glob.glob(f"{out}/checkpoints/*.partial")


@pytest.mark.parametrize(
    "file, size",
    [
        ("rank_0.safetensors", 1000),
        ("model.safetensors", 1000),
        ("state.json", 50),
        ("state.json", None),
        ("rank_0.safetensors", None),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_line(file, size, tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "sft", out)
    harmed = out / "checkpoints" / "step_000008" / file
    harmed.unlink() if size is None else os.truncate(harmed, size)
    assert finish("sft", tokenizer, out, resume=True) == 0
    assert f"step_000008: {file} is missing or damaged" in said(out) and "resumed from" in said(out)
    assert_equal(out, "sft", unbroken)


def test_a_finished_run_resumes_to_its_end_and_nothing_is_overwritten_by_accident(
    tokenizer, unbroken, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "grpo", out)
    assert finish("grpo", tokenizer, out) == 2 and "--resume" in said(out)
    assert finish("grpo", tokenizer, out, resume=True) == 0
    assert_equal(out, "grpo", unbroken)


def test_the_one_command_that_cold_starts_and_trains_resumes_in_either_stage(tokenizer, tmp_path):
    outs = [tmp_path / "unbroken", tmp_path / "killed"]
    assert finish("both", tokenizer, outs[0], resume=False) == 0, said(outs[0])
    stages = set()
    for count in (3, 7, 10):  # lines that are there when the kill comes: 8 + 4 in the end
        pid, lines = launch("both", tokenizer, outs[1], resume=True), 0
        while lines < count:
            time.sleep(0.002)
            logs = [outs[1] / "out" / stage / "metrics.jsonl" for stage in ("sft", "grpo")]
            lines = sum(log.read_text().count("\n") for log in logs if log.exists())
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        stages.add((outs[1] / "out" / "grpo" / "metrics.jsonl").exists())
    assert stages == {False, True} and finish("both", tokenizer, outs[1], resume=True) == 0, said(
        outs[1]
    )
    for stage in ("sft", "grpo"):
        assert result(outs[0] / "out" / stage) == result(outs[1] / "out" / stage)


# ---------------------------------------------------------------------------------------------------------------------
# other settings, other numbers of ranks


def test_other_settings_are_named_and_those_that_cannot_be_changed_refused(
    tokenizer, unbroken, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "grpo", out)
    assert finish("grpo", tokenizer, out, resume=True, seed=3) == 2 and "--seed 0 (now 3)" in said(
        out
    )
    assert finish("grpo", tokenizer, out, resume=True, lora=2) == 2 and "--lora 0 (now 2)" in said(
        out
    )
    assert finish("grpo", tokenizer, out, resume=True, keep=1, steps=5, kl=0.1) == 0
    (line,) = [line for line in said(out).splitlines() if "other settings" in line]
    assert "--steps 4 (now 5), " in line and "--kl 0.05 (now 0.1)" in line and "keep" not in line
    assert [line["step"] for line in metrics(out)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "program, more",
    [("sft", {}), ("grpo", {}), ("grpo", {"lora": 2})],
    ids=["sft", "grpo", "adapters"],
)
def test_T27_two_ranks_killed_and_resumed_equal_two_that_never_stopped(
    program, more, tokenizer, tmp_path
):
    outs = tmp_path / "unbroken", tmp_path / "killed"
    assert finish(program, tokenizer, outs[0], world=2, **more) == 0, said(outs[0])
    pids = [launch(program, tokenizer, outs[1], rank=rank, world=2, **more) for rank in (0, 1)]
    while not glob.glob(f"{outs[1]}/checkpoints/step_*[0-9]"):
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [wait(pid) for pid in pids] == [-signal.SIGKILL] * 2
    assert finish(program, tokenizer, outs[1], world=2, resume=True, **more) == 0, said(outs[1])
    assert "resumed from" in said(outs[1]) and result(outs[0]) == result(outs[1])


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_another_number_of_ranks_resumes_and_says_so(first, then, tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"
    assert finish("sft", tokenizer, out, world=first, before=lambda: stop_after(5)) == 0, said(out)
    assert finish("sft", tokenizer, out, world=then, resume=True) == 0, said(out)
    assert (
        f"of {first} processes (cpu), this run has {then} (cpu): it goes on, no longer bit-identical"
        in said(out)
    )
    lines, expected = (
        metrics(out),
        unbroken[1]["sft"][0],
    )  # the cold start does not depend on the number of ranks
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def stop_after(steps):
    """SIGTERM to this process, when it has made so many steps; on two ranks to the second alone."""
    after = checkpoint.Keeper.after

    def also(self, step, position):
        if self.done + 1 == steps and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, step, position)

    checkpoint.Keeper.after = also


@pytest.mark.parametrize("program, number", [("sft", signal.SIGINT), ("grpo", signal.SIGTERM)])
def test_a_signal_saves_and_exits_0(program, number, tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"
    pid = launch(program, tokenizer, out)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.002)
    os.kill(pid, number)
    assert wait(pid) == 0 and "stopped after step" in said(out), said(out)
    assert 0 < len(metrics(out)) < len(unbroken[1][program][0])
    assert finish(program, tokenizer, out, resume=True) == 0
    assert_equal(out, program, unbroken)


# ---------------------------------------------------------------------------------------------------------------------
# what goes wrong in the middle


def poison(*steps):
    """The loss of these steps of the cold start (all phases counted) is NaN in one micro-batch."""
    loss, real, calls = sft.target_loss, sft.micro_batches, [-1]

    def parts(samples, tokens):
        calls[:] = [calls[0] + 1]
        return real(samples, tokens)

    def broken(model, batch):
        value = loss(model, batch)
        if calls[0] in steps and len(calls) == 1:
            calls.append("once a step")
            return value * math.nan
        return value

    sft.micro_batches, sft.target_loss = parts, broken


def test_a_step_that_is_not_finite_is_left_out_and_counted(tokenizer, tmp_path):
    outs = [tmp_path / name for name in ("one", "all")]
    more = {"pretrain": 0, "steps": 1, "save_every": 0}
    assert finish("sft", tokenizer, outs[0], before=lambda: poison(0), **more) == 0
    (line,) = metrics(outs[0])
    assert "loss" not in line and line["skipped"] == 1 and 0 < len(line["skipped_ids"]) < 4
    model, untrained = load_model(str(outs[0]))[0], make_model(tokenizer, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untrained.parameters()))
    assert finish("sft", tokenizer, outs[1], before=lambda: poison(1, 2, 4, 5, 6)) == 2
    *_, last = said(outs[1]).splitlines()
    assert last.startswith("error: 3 updates in a row not finite") and "cold start, step 3" in last
    assert [line.get("skipped") for line in metrics(outs[1])] == [None, 1, 2, None, 3, 4]
    assert checkpoint.newest(str(outs[1]), False)["done"] == 4  # none is saved in a bad streak


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"

    def fill():
        save = checkpoint.Keeper.save

        def full(self, step, position):
            if self.done == 4:  # no file may grow beyond this, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            save(self, step, position)

        checkpoint.Keeper.save = full

    assert finish("sft", tokenizer, out, before=fill) == 2
    errors = [line for line in said(out).splitlines() if line.startswith("error")]
    assert (
        len(errors) == 1
        and "step_000004: cannot be written" in errors[0]
        and "Traceback" not in said(out)
    )
    assert sorted(os.listdir(out / "checkpoints")) == ["step_000002", "step_000003"]
    assert finish("sft", tokenizer, out, resume=True) == 0
    assert_equal(out, "sft", unbroken)


def test_time_memory_and_speed_are_in_every_line(unbroken):
    both = {"update", "save"}
    for program, phases in (
        ("sft", {"data", *both}),
        ("grpo", {"rollout", "reward", "reference", *both}),
    ):
        lines = [
            json.loads(line)
            for line in (unbroken[0] / program / "metrics.jsonl").read_text().splitlines()
        ]
        assert phases <= {key[:-2] for line in lines for key in line if key.endswith("_s")}
        assert all(line["tokens_per_s"] > 0 and 0.05 < line["memory_gb"] < 50 for line in lines)
        assert lines[-1]["eta_s"] == 0
        for before, line in itertools.pairwise(lines):
            took = sum(
                line[key]
                for key in line
                if key.endswith("_s") and key not in ("tokens_per_s", "eta_s")
            )
            if line["step"]:  # the phases of a step make up its time
                assert took == pytest.approx(line["seconds"] - before["seconds"], abs=0.1)


def test_wandb_and_tensorboard_are_imported_only_when_asked_for(tokenizer, unbroken, tmp_path):
    def without(*names):
        sys.modules.update({name: None for name in names})  # import raises ImportError

    def fake():
        def log(line, step):
            with open(tmp_path / "sent", "a") as file:
                print(step, line["loss"], file=file)

        sys.modules["wandb"] = types.SimpleNamespace(init=lambda **_: None, log=log)

    missing = lambda: without("wandb", "tensorboard", "torch.utils.tensorboard")
    for name in ("wandb", "tensorboard"):
        assert finish("sft", tokenizer, tmp_path / name, before=missing, **{name: True}) == 2
        assert f"error: --{name}: pip install {name} first" in said(tmp_path / name)
    assert finish("sft", tokenizer, tmp_path / "with", before=fake, wandb=True) == 0
    expected = [f"{i + 1} {line['loss']}" for i, line in enumerate(unbroken[1]["sft"][0])]
    assert (tmp_path / "sent").read_text().splitlines() == expected


def test_a_rank_that_stalls_is_named(tokenizer, tmp_path):
    out, encode = tmp_path / "out", data.encode

    def stall():
        distributed.TIMEOUT, calls = 3, []  # named after a sixth of it

        def slow(*words, **options):
            calls.append(1)
            if distributed.rank() == 1 and len(calls) == 5:
                time.sleep(2)
            return encode(*words, **options)

        data.encode = slow

    assert finish("sft", tokenizer, out, world=2, before=stall) == 0
    named = [
        line for line in said(out).splitlines() if "no progress for" in line
    ]  # maybe others too: busy
    assert any(
        "rank 1 in 'data' of step 1" in line
        and "test_resume.py" in line
        and "rank 0 in" not in line
        for line in named
    )


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.fixture(scope="module")
def scored(tokenizer):
    """A model, and a function: model -> log-probabilities of some responses."""
    samples = [data.encode(row, tokenizer, make_processor(), train=False) for row in ROWS]
    prompts = data.collate(samples, tokenizer)
    tokens = torch.randint(0, 100, (8, 6), generator=torch.Generator().manual_seed(3))
    banned = torch.tensor([101])
    return lambda model: token_logprobs(
        model, prompts, None, tokens, torch.ones_like(tokens), banned
    )[0]


def adapted(tokenizer, seed=0):
    """A model with adapters that do something."""
    model = add_adapters(make_model(tokenizer, dtype=torch.float32), 3, 0)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_new_adapters_change_nothing_and_only_they_are_trained(tokenizer, scored):
    base = make_model(tokenizer, dtype=torch.float32)
    plain = scored(base)
    model = add_adapters(base, 3, 0)
    logprobs = scored(model)
    torch.testing.assert_close(
        logprobs, plain, rtol=0, atol=5e-6
    )  # frozen weights: another product
    logprobs.sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    linear = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(linear) == 3 * 7  # q, k, v, o, gate, up, down of each layer
    assert names == {f"{name}.lora_{x}" for name in linear for x in "ab"}


def test_adapters_off_is_the_base_and_merged_is_unmerged(tokenizer, scored):
    base, model = make_model(tokenizer, dtype=torch.float32), adapted(tokenizer)
    with_adapters = scored(model)
    with adapters_off(model):
        torch.testing.assert_close(scored(model), scored(base), rtol=0, atol=5e-6)
    assert (with_adapters - scored(base)).abs().max() > 0.1
    merged = make_model(tokenizer, dtype=torch.float32)
    merged.load_state_dict(
        merge_adapters(model.state_dict())
    )  # strict: the names are those of the stock model
    torch.testing.assert_close(scored(merged), with_adapters, rtol=1e-4, atol=1e-4)


def test_LoRA_training_takes_the_base_as_its_reference_and_saves_merged_weights(
    tokenizer, tmp_path
):
    outs = [tmp_path / "whole", tmp_path / "killed"]
    for out in outs:
        more = {"lora": 3, "before": lambda: stop_after(2)} if out == outs[1] else {"lora": 3}
        assert finish("grpo", tokenizer, out, **more) == 0, said(out)
    assert finish("grpo", tokenizer, outs[1], lora=3, resume=True) == 0
    assert result(outs[0]) == result(outs[1])
    lines = metrics(outs[0])
    assert lines[0]["kl"] < 0.1 * lines[-1]["kl"] and lines[0]["first_ratio"] == pytest.approx(
        1, abs=1e-5
    )
    model, base = load_model(str(outs[0]))[0], make_model(tokenizer, dtype=torch.float32)
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), base.parameters())
        if not torch.equal(a, b)
    }
    assert changed and all("language_model.layers" in name and "proj" in name for name in changed)


def test_LoRA_kl_is_that_of_a_separate_copy(tokenizer, tmp_path):
    distributed.setup(0)
    try:
        rules = token_rules(make_model(tokenizer), tokenizer, CPU)
        settings = dataclasses.replace(grpo.Settings(), **SMALL["grpo"])
        policy, base = (
            distributed.shard(adapted(tokenizer), CPU),
            distributed.shard(make_model(tokenizer, dtype=torch.float32), CPU),
        )
        optimizer = types.SimpleNamespace(step=lambda: None, zero_grad=policy.zero_grad)
        learner = make_learner(
            policy, tokenizer, make_processor(), rules, reference=policy, optimizer=optimizer
        )
        with distributed.gathered(policy):
            rows = encoded(ROWS, tokenizer, learner.processor)
            groups = grpo.sample_groups(learner, rows, settings, grpo.whole_reward)
        groups = with_advantages(groups)
        policy.train()
        own = grpo.optimizer_step(learner, groups, groups[0], settings)
        learner.reference = base
        other = grpo.optimizer_step(learner, groups, groups[0], settings)
        assert own["kl"] == pytest.approx(other["kl"], rel=1e-5) and own["kl"] > 1e-3
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# the memory plan


def peak_of(function):
    """Most memory that a forked process takes while it runs the function, above what it has at the start. -> bytes"""
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            distributed.setup(0)
            torch.set_num_threads(1)
            step = function()  # builds what is there before
            bench.restart_peak()  # else the step would fill blocks freed earlier, unseen
            before = bench.resident("VmRSS")
            step()
            os.write(writing, str(bench.resident("VmHWM") - before).encode())
        finally:
            os._exit(0)
    wait(pid)
    return int(os.read(reading, 100))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_near_the_measured_peak(checkpointing, tokenizer):
    config = make_config(tokenizer, region_token_id=tokenizer.convert_tokens_to_ids(REGION_TOKEN))
    for name, value in {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 768,
        "vocab_size": 4000,
    }.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = 256
    settings = dataclasses.replace(
        grpo.Settings(),
        **{
            **SMALL["grpo"],
            "group_size": 8,
            "max_new_tokens": 100,
            "kl": 0,
            "checkpointing": checkpointing,
        },
    )
    sample = data.encode(ROWS[0], tokenizer, make_processor(), train=False)
    prompt = len(sample["prompt"])
    settings.micro_tokens = 3 * (prompt + 8 * 100)  # three groups in one pass

    def update():
        model, batch = RegionVLM(config), data.collate([sample], tokenizer)
        with torch.no_grad():
            features = model.encode_images(
                *map(batch.get, ("pixel_values", "image_grid_thw", "points", "regions"))
            )
        model = distributed.shard(model, CPU, checkpointing).train()
        group = {
            "row": ROWS[0],
            "sample": sample,
            "features": features,
            "tokens": torch.ones(8, 100).long(),
            "mask": torch.ones(8, 100).long(),
            "old_logprobs": torch.zeros(8, 100),
            "rewards": torch.arange(8.0),
        }
        optimizer = types.SimpleNamespace(step=lambda: None, zero_grad=model.zero_grad)
        groups = with_advantages([group] * 3)
        rules = (torch.tensor([]), torch.tensor([3]))
        learner = make_learner(model, tokenizer, None, rules, optimizer=optimizer)
        return lambda: grpo.optimizer_step(learner, groups, groups[0], settings)

    image = sample["prompt"].count(config.image_token_id)
    parts = plan.memory(RegionVLM(config), settings, 1, False, prompt, image)
    planned = sum(parts["update"].values())
    measured = peak_of(update)
    print(f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB", parts["update"])
    assert 0.6 < planned / measured < 1.6


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_plan_counts_what_is_there(tokenizer):
    settings = dataclasses.replace(grpo.Settings(), **SMALL["grpo"])
    model = make_model(tokenizer, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    parts = plan.memory(model, settings, 1, False, 50, 20)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    always = parts["always"]
    assert always["weights"] == always["reference"] == size_of(model.parameters())
    assert parts["update"]["gradients"] == size_of(p.grad for p in trained)
    assert not parts["update"].get("gathered weights")  # a single rank computes in its weights
    moments = size_of(
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    assert always["optimizer"] == moments
    half = plan.memory(model, settings, 2, False, 50, 20)
    assert half["always"]["optimizer"] == moments / 2
    assert half["always"]["weights"] == size_of(model.parameters()) / 2
    # Two ranks gather all weights, and keep whole gradients beside their shards of them.
    assert half["rollout"]["gathered weights"] == size_of(model.parameters())
    assert half["update"]["gradients"] >= 1.5 * size_of(p.grad for p in trained)

    text, prompt = model.config.text_config, shared_prefix.PromptKV()
    shape = (2, settings.prompts, 50, text.num_key_value_heads, text.head_dim)
    prompt.update(*torch.zeros(shape).transpose(2, 3))  # as they come
    cache = shared_prefix.DecodeCache(
        [prompt] * text.num_hidden_layers,
        settings.group_size,
        settings.max_new_tokens,
        torch.ones(settings.prompts, 50),
    )
    sampling = plan.rollout_moments(plan.Size(model, 1, False), settings, 50, 20)[-1]
    assert sampling["KV cache"] == size_of(
        x for layer in cache.layers for x in layer.prompt + layer.own
    )
    assert prompt.keys is cache.layers[0].keys is cache.layers[0].prompt[0]  # held once


def test_the_plan_of_the_computers_own_memory(tokenizer):
    model = make_model(tokenizer, dtype=torch.float32)
    size = size_of(model.parameters())
    needed = plan.host_memory(model, ranks_here=4, world=8)
    # The weights once, on rank 0; in a checkpoint, shards of weights and two moments besides.
    assert needed == {"while loading": size, "while saving": size + 3 * size * 4 / 8}


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(version, tmp_path):
    assert plan.cgroup_room(tmp_path) == []
    folder = tmp_path if version == 2 else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    limit, used, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    (folder / limit).write_text("8000\n")
    (folder / used).write_text("5000\n")
    (folder / "memory.stat").write_text(f"anon 3000\n{cached} 1500\n")
    assert plan.cgroup_room(tmp_path) == [4500]  # cached files give way
    (folder / limit).write_text("max\n")
    assert plan.cgroup_room(tmp_path) == []


def test_the_plan_of_a_known_size_and_what_it_advises():
    model = plan.stock_model(*plan.STOCK["Qwen3-VL-8B"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        8.77e9, rel=0.002
    )  # the published 8.77 B
    settings = types.SimpleNamespace(
        micro_tokens=4096,
        checkpointing=False,
        group_size=8,
        max_new_tokens=512,
        kl=0.01,
        prompts=64,
        rollout_prompts=0,
        train_vision=False,
        lora=0,
    )
    parts = plan.memory(model, settings, 1, True, 700, 576)
    assert 120e9 < sum(parts["always"].values()) < 145e9  # 12 bytes a parameter, and the reference
    advice = plan.advice(parts, settings, 80e9, 1)
    assert all(
        tip in advice
        for tip in ("--lora 16", "--checkpointing", "--rollout_prompts 32", "--micro_tokens 2048")
    )


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints that say what they are


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def take_another_steps_file(path):
    shutil.copy(str(path).replace("step_000008", "step_000006"), path)


@pytest.mark.parametrize("harm", [flip_a_bit, take_another_steps_file])
def test_a_file_that_is_not_the_one_that_was_saved_is_noticed(harm, tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "sft", out)
    harm(out / "checkpoints" / "step_000008" / "rank_0.safetensors")
    assert finish("sft", tokenizer, out, resume=True) == 0
    assert "step_000008: rank_0.safetensors is missing or damaged" in said(out)
    assert_equal(out, "sft", unbroken)


STATES = {
    "no field": lambda state: state.pop("position"),
    "another type": lambda state: state.update(done="8"),
    "a truth value": lambda state: state.update(step=True),
    "below zero": lambda state: state.update(step=-1),
    "a list of settings": lambda state: state.update(settings=[]),
    "of another step": lambda state: state.update(done=7),
    "no ranks": lambda state: state.update(world=0),
    "too many ranks": lambda state: state.update(world=10**12),
    "a file elsewhere": lambda state: state["files"].update({"../../metrics.jsonl": 1}),
    "not finite": lambda state: state.update(seconds=math.inf),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_no_run_wrote_is_damage(name, unbroken, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "sft", out)
    file = out / "checkpoints" / "step_000008" / "state.json"
    state = json.loads(file.read_text())
    STATES[name](state)
    file.write_text(json.dumps(state))
    for stray in ("step_000009.txt", "step_x", "notes", "step_00001"):
        (out / "checkpoints" / stray).mkdir()
    assert checkpoint.newest(str(out), True)["done"] == 6
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "sft", out)
    os.rename(out / "checkpoints" / "step_000008", out / "checkpoints" / "step_000300")
    assert finish("sft", tokenizer, out, resume=True, keep=1) == 0
    folders = sorted(os.listdir(out / "checkpoints"))
    assert folders == ["step_000008", "step_000300"]  # the new one, and the one that is damaged
    assert checkpoint.newest(str(out), True)["done"] == 8


@pytest.mark.parametrize("what", ["weights", "rows"])
def test_a_run_that_started_from_something_else_is_not_resumed(what, tokenizer, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "sft", out)

    def change():
        global make_model, ROWS
        if what == "weights":
            first = make_model
            make_model = lambda *args, **kwargs: first(args[0], 1, **kwargs)
        else:
            ROWS = ROWS[::-1]

    assert finish("sft", tokenizer, out, resume=True, before=change) == 2
    (line,) = [line for line in said(out).splitlines() if line.startswith("error")]
    name = "--model" if what == "weights" else "data all"
    assert f"{name} is not what this run started from" in line
    assert result(out) == result(unbroken[0] / "sft")  # nothing was changed


def test_a_fingerprint_changes_with_any_weight_and_with_nothing_else(tokenizer, tmp_path):
    model = make_model(tokenizer, dtype=torch.float32)
    first = checkpoint.fingerprint(model)
    for part in (model, tokenizer, make_processor()):
        part.save_pretrained(tmp_path)
    assert checkpoint.fingerprint(load_model(str(tmp_path))[0]) == first
    for parameter in model.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.001).add_(1e-3)
        assert checkpoint.fingerprint(model) != first
        parameter.data = before
    assert checkpoint.fingerprint(model) == first


def test_weights_that_are_not_finite_are_never_saved(tokenizer, tmp_path):
    distributed.setup(0)
    try:
        model = distributed.shard(make_model(tokenizer, dtype=torch.float32), CPU)
        with torch.no_grad():
            model.model.language_model.norm.weight[3] = math.nan
        with pytest.raises(ValueError, match=r"language_model.norm.weight is not finite"):
            checkpoint.save_model(model, tokenizer, make_processor(), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    finally:
        dist.destroy_process_group()


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    out, lock = tmp_path / "out", tmp_path / "out" / ".lock"
    ready, told = os.pipe()
    other = fork()
    if other == 0:
        try:
            checkpoint.hold(str(out))
            os.write(told, b"1")
            time.sleep(60)
        finally:
            os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ValueError, match=rf"another run writes there \(pid {other} on "):
        checkpoint.hold(str(out))
    os.kill(other, signal.SIGKILL)
    os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)  # dead, though nobody has been told
    checkpoint.hold(str(out))
    checkpoint.hold(str(out))  # and by the same run again
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    wait(other)

    elsewhere = {"host": "elsewhere", "pid": 1, "began": 1}
    lock.write_text(json.dumps(elsewhere))
    with pytest.raises(ValueError, match="pid 1 on elsewhere"):
        checkpoint.hold(str(out))
    hours_ago = time.time() - 2 * checkpoint.LOCK_HOLDS
    os.utime(lock, (hours_ago, hours_ago))
    checkpoint.hold(str(out))
    for nonsense in ("", "{}", "[1]", '{"host": 1, "pid": "x", "began": null}'):
        lock.write_text(nonsense)
        checkpoint.hold(str(out))


def test_a_folder_of_the_user_beside_the_output_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    assert finish("sft", tokenizer, tmp_path / "out", pretrain=0, steps=1, save_every=0) == 0
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out" / ".partial").exists()


def test_a_checkpoint_beyond_the_steps_that_are_asked_for_is_one_line(
    tokenizer, unbroken, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(unbroken[0] / "grpo", out)
    assert finish("grpo", tokenizer, out, resume=True, steps=2) == 2
    assert "is of step 4 of the GRPO, which has 2 now" in said(out)
