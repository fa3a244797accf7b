"""Flags, settings, model folders and checkpoints at random: it works, or one line says what is wrong.

Each input ends in finite weights and whole outputs, or in a UserError: one line of at most 300
characters that names the flag or the file. (Rows at random: tests/test_door.py.)

python -m pytest -q tests/test_fuzz.py                                   # under a minute
FUZZ=2000 python -m pytest -q tests/test_fuzz.py                         # as many inputs of each kind
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import copy
import dataclasses
import importlib
import json
import math
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from common import process_group  # noqa: F401  (at work in every test)
from safetensors.torch import load_file
from test_model import ROWS, make_model, make_processor, make_tokenizer

import data
import grpo
import sft
from engine.checkpoint import load_model
from engine.settings import parse
from formats.errors import UserError
from model import token_rules

CPU = torch.device("cpu")


def count(usual):
    """How many inputs are drawn."""
    return int(os.environ.get("FUZZ", usual))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def one_line(error, *names):
    """The message of a UserError: one line that holds one of these names."""
    line = str(error)
    assert line.isprintable() and len(line) <= 300, line
    assert any(name in line for name in names), line
    return line


def contents(folder):
    """{name: bytes} of all files of a folder."""
    folder = Path(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ----------------------------------------------------------------------------------------------
# flags

PROGRAMS = ["sft", "grpo", "eval", "benchmarks.__main__"]
PROGRAMS += [
    f"tools.{name}" for name in ("build", "check", "convert", "depth", "bench", "findings")
]
WORDS = ["", " ", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "1e20", "-0.0", "0x10", "1_0", "٣"]
WORDS += [
    "true",
    "None",
    "a b",
    "\x1b[2J",
    "\ud83d",
    "x" * 5000,
    "--",
    "-",
    "--steps",
    "../..",
    "f*nan",
]
WORDS += ["f*inf", "f*-1", "*", "8.5", "lor", "tiny", "all", "none", "sdpa", "out/x", "9" * 400]


def command(rng, settings):
    """A few flags of a program, or words that are none, with values at random."""
    words = []
    for _ in range(rng.randint(1, 4)):
        field = rng.choice(dataclasses.fields(settings))
        name = field.metadata["flag"] or field.name
        if rng.random() < 0.1:
            name = rng.choice([name[:-1], name.upper(), f"no-{name}", "nothing"])
        if not field.metadata["positional"]:
            words.append(f"--{name}")
        if rng.random() < 0.9:
            words += rng.choices(WORDS, k=rng.choice([1, 1, 1, 2]))
    return words


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_command_line_is_settings_in_range_or_one_line(program):
    module = importlib.import_module(program)
    settings = module.Settings
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(count(150)):
        words = command(rng, settings)
        try:
            given = parse(settings, "", words, check=getattr(module, "check_flags", None))
        except UserError as error:
            names = [flag for flag in ("--", "arguments") if flag in str(error)]
            positional = [f.name for f in dataclasses.fields(settings) if f.metadata["positional"]]
            one_line(error, *names, *positional)
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            if type(value) in (int, float):
                assert math.isfinite(value) and value in field.metadata["range"], (
                    field.name,
                    words,
                )
    assert outcomes[False] > 20, outcomes


# ----------------------------------------------------------------------------------------------
# settings in range


class Endless:
    """A blend of the rows."""

    def __getitem__(self, position):
        return ROWS[position % len(ROWS)]


def extremes(rng, settings, names):
    """Settings of these names at the ends of their ranges, or between."""
    chosen = {}
    for field in dataclasses.fields(settings):
        if field.name not in rng.sample(names, rng.randint(1, 3)):
            continue
        range_of = field.metadata["range"]
        low = range_of.at_least if range_of.at_least is not None else (range_of.above or 0) + 1e-12
        high = range_of.at_most if range_of.at_most is not None else range_of.below - 1e-9
        kind = type(field.metadata["default"])
        value = rng.choice([low, high, low + (high - low) * rng.random() ** 4])
        chosen[field.name] = kind(value)
    return chosen


SFT_NUMBERS = ["lr", "warmup", "weight_decay", "beta2", "clip", "micro_tokens"]
GRPO_NUMBERS = ["lr", "weight_decay", "clip", "clip_low", "clip_high", "dual_clip", "kl", "min_std"]
GRPO_NUMBERS += ["temperature", "micro_tokens", "rollout_prompts"]


@pytest.fixture
def any_reward(monkeypatch):
    """Rewards that differ from response to response, so that there is something to learn."""

    def score(row, text):
        reward = zlib.crc32(text.encode()) % 7 / 6
        parts = {"accuracy": reward, "format": 0.0, "detection": None, "center_errors_m": []}
        return {"reward": reward, **parts}

    monkeypatch.setattr(data, "score", score)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_any_settings_train_to_finite_weights_or_end_in_one_line(
    stage, tokenizer, any_reward, tmp_path, capsys
):
    rng = random.Random(1)
    finished = 0
    for i in range(count(12)):
        out = tmp_path / str(i)
        parts = make_model(tokenizer, dtype=torch.float32), tokenizer, make_processor()
        common = {"out": str(out), "steps": 3, "seed": rng.randint(0, 99), "save_every": 1}
        try:
            if stage == "sft":
                numbers = extremes(rng, sft.Settings, SFT_NUMBERS)
                settings = sft.Settings(batch=4, pretrain=0, **common, **numbers)
                sft.train(settings, *parts, [("rows", list(ROWS), 1.0)], CPU)
            else:
                numbers = extremes(rng, grpo.Settings, GRPO_NUMBERS)
                small = {"prompts": 4, "group_size": 2, "max_new_tokens": 4, "minibatches": 2}
                settings = grpo.Settings(**small, **common, **numbers)
                grpo.train(settings, *parts, Endless(), CPU)
            finished += 1
            assert (out / "model.safetensors").is_file(), numbers
        except UserError as error:
            one_line(error, "finite", "--")
            assert not (out / "model.safetensors").exists(), numbers
        for path in out.rglob("*.safetensors"):
            for name, tensor in load_file(path).items():
                assert tensor.isfinite().all(), (numbers, path, name)
        assert not list(out.rglob("*.partial")), numbers
    assert finished > count(12) // 3


# ----------------------------------------------------------------------------------------------
# model folders

JUNK = [None, True, 0, -1, 1.5, 10**30, "", "x", [], {}, [[]], {"a": 1}, "../../x", math.nan]


def shake(rng, value):
    """JSON with one of its values, at any depth, replaced, removed or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.7:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.15:
            del value[key]
        else:
            value[key] = shake(rng, value[key])
        return value
    return copy.deepcopy(rng.choice(JUNK))


def harm(rng, path):
    """One damage of a file."""
    way = rng.choice(
        ["cut", "flip", "empty", "remove", "folder", "shake", "shake", "shake", "shake"]
    )
    if way == "shake" and path.suffix == ".json":
        path.write_text(json.dumps(shake(rng, json.loads(path.read_text()))))
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "remove":
        path.unlink()
    elif way == "folder":
        path.unlink()
        path.mkdir()
    elif way == "cut":
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in (make_model(tokenizer, dtype=torch.float32), tokenizer, make_processor()):
        part.save_pretrained(folder)
    return folder


def test_any_damaged_model_folder_works_or_is_one_line(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked a question"))
    rng = random.Random(2)
    refused = 0
    for i in range(count(60)):
        folder = tmp_path / str(i)
        shutil.copytree(model_folder, folder)
        harm(rng, folder / rng.choice(sorted(os.listdir(folder))))
        before = contents(folder)
        try:
            model, its_tokenizer, processor = load_model(str(folder))
            answer(model, its_tokenizer, processor)
        except UserError as error:
            one_line(error, "--model", "not finite")
            refused += 1
        assert contents(folder) == before
        shutil.rmtree(folder)
    assert refused > count(60) // 4


def answer(model, tokenizer, processor):
    """Responses of two tokens to a row, and the loss of its target."""
    sample = data.encode(ROWS[0], tokenizer, processor, train=True)
    sft.target_loss(model, data.collate([sample], tokenizer))
    sample = data.encode(ROWS[0], tokenizer, processor, train=False)
    prompts = data.collate([sample], tokenizer)
    stop, banned = token_rules(model, tokenizer, "cpu")
    _, _, logprobs, _ = grpo.rollout(model, prompts, 2, 2, stop, banned, 1.0)
    assert logprobs.isfinite().all()


# ----------------------------------------------------------------------------------------------
# checkpoints


def train(tokenizer, out, **more):
    settings = sft.Settings(
        out=str(out), batch=4, pretrain=0, steps=4, save_every=1, lr=1e-3, **more
    )
    parts = make_model(tokenizer, dtype=torch.float32), tokenizer, make_processor()
    sft.train(settings, *parts, [("rows", list(ROWS), 1.0)], CPU)


def test_any_damaged_checkpoint_resumes_to_the_same_weights_or_is_one_line(
    tokenizer, tmp_path, capsys
):
    whole = tmp_path / "whole"
    train(tokenizer, whole)
    wanted = load_file(whole / "model.safetensors")
    rng = random.Random(3)
    resumed = 0
    for i in range(count(25)):
        out = tmp_path / str(i)
        shutil.copytree(whole, out)
        files = [path for path in (out / "checkpoints").rglob("*") if path.is_file()]
        files.append(out / "metrics.jsonl")
        harm(rng, rng.choice(sorted(files)))
        try:
            train(tokenizer, out, resume=True)
        except UserError as error:
            one_line(error, "--out", str(out)[:100])
            continue
        resumed += 1
        for name, tensor in load_file(out / "model.safetensors").items():
            assert torch.equal(tensor, wanted[name]), name
        shutil.rmtree(out)
    assert resumed > count(25) // 2
