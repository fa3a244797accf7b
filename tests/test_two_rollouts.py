"""The plain rollout and token_logprobs of model.py against the fast ones of engine/shared_prefix.py.

Same arguments, same results: tokens, log-probabilities, entropies, gradients; with left padding,
several images, regions and depth, ragged ends, several stop ids, and activation checkpointing.

python -m pytest -q tests/test_two_rollouts.py
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons need the CPU

import pytest
import torch
from common import process_group  # noqa: F401  (at work in every test)
from test_instances import several_rows
from test_model import (
    NEVER,
    ROWS,
    gradients,
    make_model,
    make_processor,
    make_tokenizer,
)

import data
import model as plain
from engine import shared_prefix as fast
from model import encode_prompts, token_rules

GROUP, LENGTH = 3, 9
MANY_STOPS = torch.arange(20, 60)  # responses of a random model end at many lengths


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=["one image", "several images", "no padding"])
def prompts(request, tokenizer):
    """Prompts of different lengths: left-padded; with 2, 0, 1, 3 regions, or with 3, 1, 2 images.

    no padding: one prompt alone.
    """
    rows = several_rows() if request.param == "several images" else ROWS
    if request.param == "no padding":
        rows = rows[:1]
    samples = [data.encode(row, tokenizer, make_processor(), train=False) for row in rows]
    batch = data.collate(samples, tokenizer)
    assert batch["attention_mask"].all() == (request.param == "no padding")
    return batch


@pytest.fixture(scope="module")
def banned(tokenizer):
    return token_rules(make_model(tokenizer), tokenizer, "cpu")[1]


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["as on CPU", "as on CUDA"])
@pytest.mark.parametrize("stop_ids", [NEVER, MANY_STOPS], ids=["cut off", "ragged"])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_two_rollouts_sample_the_same(
    temperature, stop_ids, fixed_shapes, prompts, tokenizer, banned, monkeypatch
):
    if fixed_shapes:  # all that CUDA does but to record a token's kernels
        monkeypatch.setattr(fast, "takes_fixed_shapes", lambda device: True)
        monkeypatch.setattr(fast.TokenStep, "record", lambda *args: None)
        monkeypatch.setattr(fast.DecodeCache, "first_visible", 2)  # so that the window grows
    model = make_model(tokenizer)
    results = []
    for sampler in (plain, fast):
        generator = torch.Generator().manual_seed(1)
        results.append(
            sampler.rollout(model, prompts, GROUP, LENGTH, stop_ids, banned, temperature, generator)
        )
    (tokens, mask, logprobs, features), other = results
    lengths = mask.sum(1).tolist()
    assert len(lengths) == GROUP * len(prompts["input_ids"])
    if stop_ids is NEVER:
        assert set(lengths) == {LENGTH}
    elif temperature > 0 or len(prompts["input_ids"]) > 1:  # else all responses are the same one
        assert len(set(lengths)) > 1
    assert torch.equal(tokens, other[0]) and torch.equal(mask, other[1])
    torch.testing.assert_close(logprobs, other[2], rtol=0, atol=1e-6)
    for key in ("merged", "deepstack", "regions"):
        torch.testing.assert_close(features[key], other[3][key], rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stop_ids", [NEVER, MANY_STOPS], ids=["cut off", "ragged"])
@pytest.mark.parametrize("with_features", [True, False], ids=["frozen vision", "trained vision"])
def test_the_two_scorers_give_the_same_gradients(
    with_features, stop_ids, checkpointing, prompts, tokenizer, banned
):
    model = make_model(tokenizer)
    tokens, mask, _, _ = plain.rollout(
        model, prompts, GROUP, LENGTH, stop_ids, banned, 1.0, torch.Generator().manual_seed(1)
    )
    assert mask.all() == (stop_ids is NEVER)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    results = []
    for scorer in (plain, fast):
        given = encode_prompts(model, prompts) if with_features else None
        logprobs, entropy = scorer.token_logprobs(model, prompts, given, tokens, mask, banned, 0.7)
        weight = torch.arange(1.0, 1 + logprobs.numel()).view_as(logprobs) / logprobs.numel()
        results.append((logprobs, entropy, gradients(model, (weight * logprobs).sum())))
    (logprobs, entropy, slopes), (other_logprobs, other_entropy, other_slopes) = results
    assert not logprobs[mask == 0].any() and not entropy[mask == 0].any()
    assert logprobs.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(logprobs, other_logprobs, rtol=0, atol=1e-9)
    torch.testing.assert_close(entropy, other_entropy, rtol=0, atol=1e-9)
    assert set(slopes) == set(other_slopes)
    for name, slope in slopes.items():
        gap = (slope - other_slopes[name]).norm()
        assert gap <= 1e-6 * slope.norm(), name  # the rotary angles are float32


def test_without_regions_the_features_have_none(prompts, tokenizer, banned):
    model = make_model(tokenizer)
    bare = {**prompts, "regions": None}
    text = bare["input_ids"].clone()
    text[text == model.config.region_token_id] = tokenizer.convert_tokens_to_ids("a")
    bare["input_ids"] = text
    for sampler in (plain, fast):
        *_, features = sampler.rollout(model, bare, 1, 2, NEVER, banned, 0)
        assert features["regions"] is None
