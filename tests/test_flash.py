"""flash-attn without a GPU: when it is taken, and that the models compute the same by it.

    python -m pytest -q tests/test_flash.py                            # half a minute on one core

The plugin tests/flash_stub.py puts a run of tests on flash-attn's path. `ON_THE_PATH` are those run
so here: the fast and the plain rollout and scorer are equal, with and without padding, ragged ends
and recomputed activations; both equal one sequence at a time; steps of GRPO and of the cold start
equal their formulas. All others run on it like this:

    PYTHONPATH=tests python -m pytest -p flash_stub tests/test_model.py tests/test_training.py
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons need the CPU; for child processes too

import importlib.machinery
import re
import subprocess
import sys
import types

import pytest
import torch
from common import ROOT
from flash_stub import flash_attn_func, flash_attn_varlen_func
from test_model import make_model, make_tokenizer

import model as model_file
from engine import distributed
from formats.errors import UserError

ON_THE_PATH = {  # file -> its tests, without "test_" in front; none: all of them
    "test_two_rollouts": [],
    "test_instances": [
        "T13_rollout_features_and_gradients_of_several_images_equal_a_plain_forward",
    ],
    "test_model": [
        "T32_a_stock_checkpoint_loads_as_the_stock_model",
        "T12_left_padding_equals_one_by_one",
        "T2_T12_T13_greedy_rollout_equals_rerunning_each_sequence",
        "greedy_rollout_equals_stock_generate",
        "T15_T16_T17_several_stop_ids_ragged_ends_and_cut_responses",
        "T8_T10_T18_the_sampler_and_the_scorer_agree",
        "T11_scored_probabilities_sum_to_one_in_every_precision",
        "T29_shared_prefix_equals_one_full_forward_a_response",
        "the_last_layer_of_a_prompt_runs_for_its_last_token_and_keeps_the_keys_of_all",
        "T28_scoring_runs_as_many_passes_for_responses_of_one_token",
    ],
    "test_training": [
        "T3_T29_any_micro_batching_gives_the_plain_gradient",
        "T3_the_step_and_the_naive_loop_of_the_bench_give_the_loss_and_gradients_of_full_forwards",
        "T18_the_first_inner_step_has_ratio_one_and_no_divergence",
        "T17_a_batch_where_all_responses_are_cut_off_is_trained_as_it_is",
        "the_log_has_the_largest_distance_to_the_sampler",
        "T3_cold_start_loss_is_the_mean_over_target_tokens_of_the_whole_batch",
    ],
}

# What transformers must have asked of flash-attn in them. (It never asks for full attention of rows
# of one length: the vision tower's images always come end to end.)
KINDS = {
    "plain causal all",  # prompts without padding
    "plain causal one query",  # their last token, in the last layer
    "plain causal behind",  # responses without ragged ends, behind such a prompt
    "varlen causal all",  # the same with padding
    "varlen causal one query",
    "varlen causal behind",
    "varlen full all",  # images
}


def run_on_the_path(*tests):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "flash_stub", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_on_the_path_of_flash_attn_the_tests_of_rollout_scoring_and_training_pass():
    tests = []
    for file, names in ON_THE_PATH.items():
        tests += [f"tests/{file}.py::test_{name}" for name in names] or [f"tests/{file}.py"]
    done = run_on_the_path(*tests)
    assert done.returncode == 0, done.stdout[-5000:]
    calls = dict(re.findall(r"^(.+): (\d+) calls$", done.stdout, re.MULTILINE))
    assert set(calls) >= KINDS
    assert "tests without a call: 0\n" in done.stdout


def test_a_run_that_never_comes_to_flash_attn_fails():
    done = run_on_the_path("tests/test_training.py::test_T6_ties_have_exactly_no_advantage")
    assert done.returncode == 1
    assert " 1 passed" in f" {done.stdout}".replace("\n", " ")
    assert "nothing was tested" in done.stdout and "tests without a call: 1\n" in done.stdout


@pytest.mark.parametrize("function", ["plain", "varlen"])
@pytest.mark.parametrize(
    "queries, keys, causal, seen",
    [  # the two masks are those in the README of flash-attn
        (2, 5, True, ["11110", "11111"]),
        (5, 2, True, ["00", "00", "00", "10", "11"]),
        (2, 3, False, ["111", "111"]),
    ],
)
def test_the_stub_has_the_masks_of_flash_attn(function, queries, keys, causal, seen):
    """Two rows of two query heads and one key-value head. Each key's value is a unit vector."""
    query = torch.randn(2, queries, 2, keys)
    key = torch.randn(2, keys, 1, keys)
    value = torch.eye(keys)[None, :, None].expand(2, -1, -1, -1)
    if function == "plain":
        weights = flash_attn_func(query, key, value, causal=causal)
    else:
        flat = [part.flatten(0, 1) for part in (query, key, value)]
        starts = [torch.arange(3, dtype=torch.int32) * length for length in (queries, keys)]
        weights = flash_attn_varlen_func(*flat, *starts, queries, keys, causal=causal)
        weights = weights.view_as(query)
    scores = torch.einsum("bthd,bsd->bths", query, key[:, :, 0]) / keys**0.5
    for t, row in enumerate(seen):
        visible = torch.tensor([mark == "1" for mark in row])
        expected = scores[:, t].masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
        torch.testing.assert_close(weights[:, t], expected)


# ----------------------------------------------------------------------------------------------
# --attention

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
