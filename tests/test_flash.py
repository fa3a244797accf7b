"""--attention: when flash-attn is taken, and what is said where it is not.

python -m pytest -q tests/test_flash.py
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons need the CPU; for child processes too

import importlib.machinery
import sys
import types

import pytest
import torch
from test_model import make_model, make_tokenizer

import model as model_file
from engine import distributed
from formats.errors import UserError

TOO_OLD = "FlashAttention2 cannot be used: it requires at least version `2.3.3`."


class Model:
    """Stands for a model; remembers what it was set to. refusal: what it answers to flash-attn."""

    def __init__(self, refusal=None):
        self.refusal = refusal
        self.chosen = []

    def set_attn_implementation(self, name):
        self.chosen.append(name)
        if self.refusal is not None and name == "flash_attention_2":
            raise self.refusal


@pytest.fixture
def package(monkeypatch):
    """A flash-attn that is installed, on a machine with a GPU that can run it."""
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func = print
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    return package


def lines_of_auto(model, capsys):
    distributed.use_attention(model, "auto")
    return capsys.readouterr().out.splitlines()


def error_of_flash(model):
    with pytest.raises(UserError) as caught:
        distributed.use_attention(model, "flash")
    return str(caught.value)


@pytest.mark.parametrize(
    "name, chosen, said",
    [
        ("auto", "flash_attention_2", "flash-attn"),
        ("flash", "flash_attention_2", "flash-attn"),
        ("sdpa", "sdpa", "SDPA"),
    ],
)
def test_flash_attn_is_taken_where_it_can_run(name, chosen, said, package, capsys):
    model = Model()
    distributed.use_attention(model, name)
    assert model.chosen == [chosen]
    assert capsys.readouterr().out == f"attention: {said}\n"


@pytest.mark.parametrize("kind", [ImportError, ValueError])
def test_where_transformers_refuses_flash_attn_auto_takes_sdpa_and_says_why(kind, package, capsys):
    reason = f"flash-attn is installed but cannot be used: {TOO_OLD}"
    model = Model(kind(f"{TOO_OLD}\nMore lines."))
    assert lines_of_auto(model, capsys) == [f"attention: SDPA ({reason})"]
    assert model.chosen == ["flash_attention_2", "sdpa"]
    assert error_of_flash(model) == f"--attention flash: {reason}"
    assert model.chosen[-1] == "sdpa"
    assert model_file.use_attention(Model(kind()), "auto")[1].endswith(kind.__name__)


def test_a_model_whose_flash_attn_is_refused_is_whole(package, capsys):
    """By transformers itself, for which a module without files is no installed package."""
    model = make_model(make_tokenizer())
    (line,) = lines_of_auto(model, capsys)
    assert line.startswith("attention: SDPA (flash-attn is installed but cannot be used: ")
    for part in model.modules():
        if hasattr(part, "config"):
            assert part.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "lack, reason",
    [("function", "cannot import name 'flash_attn_func'"), ("capability", "a GPU of compute")],
)
def test_auto_takes_sdpa_where_flash_attn_is_not_whole_or_the_card_too_old(
    lack, reason, package, monkeypatch, capsys
):
    if lack == "function":  # flash-attn-4 has the package without it
        del package.flash_attn_func
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    model = Model()
    (line,) = lines_of_auto(model, capsys)
    assert line.startswith("attention: SDPA (flash-attn is installed") and reason in line
    assert reason in error_of_flash(model)
    assert set(model.chosen) == {"sdpa"}


def test_without_flash_attn_auto_takes_sdpa_and_flash_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # its import fails as if it were not there
    model = Model()
    assert lines_of_auto(model, capsys) == ["attention: SDPA"]
    assert error_of_flash(model) == "--attention flash: flash-attn is not installed"
    with pytest.raises(UserError, match="--attention fast: needs auto, sdpa or flash"):
        distributed.use_attention(model, "fast")
