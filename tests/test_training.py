"""GRPO and the cold start as training: the maths by hand values, and one optimizer step against the plain formula (one
token of one response at a time) for any micro-batching, on one and two processes. T and a number in a name: the silent
trap that the test closes.

    python -m pytest -q test_training.py                               # half a minute on two cores
"""

import dataclasses
import datetime
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import (
    encoded,
    make_learner,
    process_group,  # noqa: F401  (at work in every test)
    with_advantages,
)
from test_model import (
    NEVER,
    ROWS,
    gradients,
    make_model,
    make_processor,
    make_row,
    make_tokenizer,
    one_by_one,
    responses,
    whole,
)

import data
import grpo
import sft
from engine import distributed
from formats.errors import UserError
from model import encode_prompts, split_features, token_rules
from tools import bench
from world.sources import rl_blend

CPU, GROUP = torch.device("cpu"), 4
BASE = dataclasses.replace(
    grpo.Settings(),
    group_size=GROUP,
    temperature=0.9,
    max_new_tokens=9,
    clip=1e9,
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    kl=0.05,
    filter="none",
    rounds=1,
    micro_tokens=10**9,
    train_vision=False,
    show_every=0,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# ---------------------------------------------------------------------------------------------------------------------
# the maths


def test_T6_advantages_are_normalised_by_the_unbiased_standard_deviation():
    one = grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0], [2, 0, 2, 0]], dtype=torch.float64))
    high = 3**0.5 / 2  # standard deviations: 1/2 and sqrt(4/3)
    expected = torch.tensor(
        [[1.5, -0.5, -0.5, -0.5], [high, -high, high, -high]], dtype=torch.float64
    )
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=0)
    assert (one[0, 0] - 0.75 / (0.5 + 1e-6)).abs() < 1e-12


def test_T6_ties_have_exactly_no_advantage():
    rounding = 0
    for value in (0.1, 0.2, 0.7, 0.36, 0.9999999):
        for size in range(2, 17):
            rewards = torch.full((1, size), value)
            rounding += bool((rewards != rewards.mean()).any())
            assert torch.equal(grpo.group_advantages(rewards), torch.zeros(1, size))
    assert rounding > 0  # the case that makes this test worth while does occur


# Reward parts of four groups of GROUP responses: accuracy, format, detection; the third ties in all.
PARTS = [
    [(1.0, 1, 0.4), (0.2, 1, 0.5), (0.0, 0, 0.0), (0.7, 1, 0.4)],
    [(1.0, 1, None), (0.0, 1, None), (0.0, 1, None), (1.0, 0, None)],
    [(0.5, 1, 0.2), (0.5, 1, 0.2), (0.5, 1, 0.2), (0.5, 1, 0.2)],
    [(0.3, 1, 1.0), (0.3, 1, 0.8), (0.3, 1, 0.8), (0.3, 1, 0.8)],
]


def scored_groups():
    names = ("accuracy", "format", "detection")
    return [{"parts": [dict(zip(names, parts)) for parts in group]} for group in PARTS]


def decoupled_plainly(kept):
    """GDPO of the groups PARTS, one number at a time; kept: those that the batch consists of."""
    summed = []
    for group in PARTS:
        weights = (0.8, 0.2) if group[0][2] is None else (0.8, 0.1, 0.1)
        of_group = [0.0] * GROUP
        for k, weight in enumerate(weights):
            values = [parts[k] for parts in group]
            for i, value in enumerate(values):
                spread = statistics.stdev(values) + 1e-6
                of_group[i] += weight * (value - statistics.mean(values)) / spread
        summed.append(of_group)
    scale = statistics.stdev([value for k in kept for value in summed[k]]) + 1e-6
    return [[value / scale for value in group] for group in summed]


@pytest.mark.parametrize("kept", [[0, 1, 3], [1], [0, 1, 2, 3]])
def test_each_reward_part_is_normalised_by_itself_and_then_the_batch(kept):
    groups = scored_groups()
    settings = dataclasses.replace(BASE, normalize="each")
    grpo.add_advantages(groups, [groups[k] for k in kept], settings)
    for group, expected in zip(groups, decoupled_plainly(kept)):
        torch.testing.assert_close(
            group["advantages"], torch.tensor(expected), rtol=1e-5, atol=1e-6
        )
    assert torch.equal(groups[2]["advantages"], torch.zeros(GROUP))
    detection = groups[3]["advantages"]  # the part that differs weighs 0.1, as much as any other's
    assert detection[0] > 0 > detection[1]


def test_without_a_group_that_is_kept_all_advantages_stay_finite():
    groups = scored_groups()
    grpo.add_advantages(groups, [], dataclasses.replace(BASE, normalize="each"))
    assert all(group["advantages"].isfinite().all() for group in groups)


def test_a_reward_of_ones_own_has_no_parts_to_normalise(tokenizer):
    settings = dataclasses.replace(BASE, normalize="each")
    with pytest.raises(UserError, match="--normalize each: .* reward function of your own"):
        grpo.train(
            settings,
            make_model(tokenizer),
            tokenizer,
            make_processor(),
            Same(),
            CPU,
            reward_function=lambda row, response, parts: parts["reward"],
        )


@pytest.mark.parametrize(
    "boxes, off, parts",
    [  # boxes written about two objects; metres off; expected
        (["red"], 0.05, {"shared": 0.5, "boxes": 1.0}),
        (["red"], 0.25, {"shared": 0.3, "boxes": 0.6}),
        (["red", "blue"], 0.05, {"shared": 1.0, "boxes": 1.0}),
        ([], 0.0, {"shared": 0.0, "boxes": 0.0}),
        (["red", "blue", "green", "yellow"], 0.05, {"shared": 0.5, "boxes": 0.5}),
    ],
)
def test_the_ablations_of_the_detection_reward_change_that_part_only(boxes, off, parts):
    at = {
        "red": (1.0, 0.2, 3.0),
        "blue": (-1.0, 0.2, 4.0),
        "green": (0.0, 0.0, 1.0),
        "yellow": (0.0, 0.0, 2.0),
    }
    row = {
        "source": "test",
        "3d_pos": {f"{color}_bbox": {"center_cam": at[color]} for color in ("red", "blue")},
        "conversations": [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "3.0"}],
        "image": "a.png",
    }
    lines = [
        f'<3d_box center="{at[c][0] + off:.2f},{at[c][1]},{at[c][2]}">cube ({c} bbox)</3d_box>'
        for c in boxes
    ]
    found = "\n".join([f"Find {len(boxes)} relevant objects:", *lines])
    text = f"<detect>{found}</detect>\n<think>z.</think>\n<answer>3.0</answer>"
    scored = data.score(row, text)
    assert scored["accuracy"] == scored["format"] == 1
    for name, detection in parts.items():
        trained = grpo.REWARD_FUNCTIONS[name](row, text, scored)
        assert trained == pytest.approx(0.9 + 0.1 * detection, abs=1e-12)
    trained = grpo.REWARD_FUNCTIONS["none"](row, text, scored)
    assert trained == pytest.approx(1, abs=1e-12)
    del row["3d_pos"]  # LOR: no detection, whatever the setting
    scored = data.score(row, text)
    assert set(grpo.REWARD_FUNCTIONS) == {"shared", "boxes", "none"}
    for reward_function in grpo.REWARD_FUNCTIONS.values():
        assert reward_function(row, text, scored) == scored["reward"]


@pytest.mark.parametrize(
    "rewards, spread, mean",
    [
        ([0.5, 0.5, 0.5, 0.5], False, True),
        ([0.5, 0.5, 0.5, 0.51], False, True),
        ([0.5, 0.5, 0.5, 0.6], True, True),
        ([0.0, 0.0, 0.0, 0.4], True, False),
        ([1.0, 1.0, 1.0, 0.99], False, False),
        ([0.1, 0.1, 0.1, 0.1], False, False),
    ],
)
def test_T7_T22_what_the_filters_keep(rewards, spread, mean):
    settings = [
        dataclasses.replace(BASE, filter=rule, min_std=0.01) for rule in ("spread", "mean", "none")
    ]
    decisions = [grpo.keep_group(torch.tensor(rewards), rule) for rule in settings]
    assert decisions == [spread, mean, True]  # mean: the paper's rule, which keeps ties


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (1, 0.5, -0.5, -0.5),
        (1, 1.0, -1.0, -1.0),
        (1, 1.29, -1.29, -1.29),
        (1, 1.31, -1.3, 0),
        (1, 40, -1.3, 0),
        (-1, 0.5, 0.8, 0),
        (-1, 0.79, 0.8, 0),
        (-1, 0.81, 0.81, 0.81),
        (-1, 1.31, 1.31, 1.31),
        (-1, 2.9, 2.9, 2.9),
        (-1, 3.1, 3, 0),
        (2, 1.5, -2.6, 0),
        (-2, 0.1, 1.6, 0),
        (-2, 2, 4, 4),
        (-2, 10, 6, 0),
        (0, 5, 0, 0),
    ],
)
def test_T20_clip_on_both_sides_and_dual_clip(advantage, ratio, loss, slope):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1)
    got, _ = grpo.grpo_loss(
        logprobs,
        zero,
        None,
        torch.tensor([float(advantage)]),
        one,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
    )
    got.backward()
    assert got.item() == pytest.approx(loss) and logprobs.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [100.0, -100.0, 1e4, -1e4])
def test_T21_extreme_log_probabilities_stay_finite(gap, advantage):
    logprobs = torch.full((1, 2), -1e4, requires_grad=True)
    old, reference = torch.tensor([[-1e4 - gap, -1e4]]), torch.tensor([[-1e4, -1e4 - gap]])
    loss, stats = grpo.grpo_loss(
        logprobs, old, reference, torch.tensor([advantage]), torch.ones(1, 2), kl=0.01
    )
    loss.backward()
    assert all(value.isfinite().all() for value in (loss, logprobs.grad, *stats.values()))


def test_T5_every_token_weighs_the_same_in_long_and_short_responses():
    logprobs = torch.randn(2, 7, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    loss, _ = grpo.grpo_loss(logprobs, logprobs.detach(), None, torch.tensor([1.5, 1.5]), mask)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -1.5 * mask.double())


def test_what_stands_behind_the_mask_is_not_in_the_loss():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    results = []
    for junk in (0.0, -math.inf, math.nan):
        logprobs = (
            torch.linspace(-3, -1, 6).view(2, 3).masked_fill(mask == 0, junk).requires_grad_()
        )
        old, reference = logprobs.detach() - 0.1, logprobs.detach() + 0.2
        loss, stats = grpo.grpo_loss(logprobs, old, reference, torch.tensor([1.0, -1.0]), mask)
        loss.backward()
        results.append(
            [
                loss.item(),
                logprobs.grad.tolist(),
                {name: value.item() for name, value in stats.items()},
            ]
        )
    assert results[0] == results[1] == results[2] and results[0][1][1][1:] == [0, 0]


def test_T19_the_kl_term_is_k3_whose_expected_gradient_is_that_of_KL_from_reference_to_policy():
    scores = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64).requires_grad_()
    policy, reference = (
        torch.log_softmax(scores, 0),
        torch.log_softmax(torch.tensor([-0.5, 0.4, 0.1]).double(), 0),
    )
    slopes = torch.zeros(3, dtype=torch.float64)
    for action in range(3):  # the expectation over the policy, action by action
        new, ref = policy[action].view(1, 1), reference[action].view(1, 1)
        loss, _ = grpo.grpo_loss(new, new.detach(), ref, torch.zeros(1), torch.ones(1, 1), kl=1.0)
        ratio = math.exp(float((reference - policy).detach()[action]))
        assert loss.item() == pytest.approx(ratio - math.log(ratio) - 1) and loss.item() >= 0
        slopes += (
            policy[action].exp().detach() * torch.autograd.grad(loss, scores, retain_graph=True)[0]
        )
    wanted = torch.autograd.grad(
        (reference.exp() * (reference - policy)).sum(), scores, retain_graph=True
    )[0]
    torch.testing.assert_close(slopes, wanted)
    k1 = torch.autograd.grad((policy.exp().detach() * (policy - reference)).sum(), scores)[0]
    assert k1.abs().max() < 1e-12 < wanted.abs().max()  # a KL term k1 would do nothing on average


# ---------------------------------------------------------------------------------------------------------------------
# one optimizer step


class Capture:
    """Stands for the optimizer: keeps the gradients of the step."""

    def __init__(self, model):
        self.model, self.gradients = model, {}

    def step(self):
        trained = [
            (name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None
        ]
        self.gradients = {name: whole(grad).clone() for name, grad in trained}

    def zero_grad(self):
        self.model.zero_grad()


def freeze(model, settings):
    for part in (model.model.visual, model.point_embed, model.region_proj):
        part.requires_grad_(settings.train_vision)
    return model


def make_reference(tokenizer):
    """Another language model behind the same vision side."""
    model, policy = make_model(tokenizer, 9).requires_grad_(False), make_model(tokenizer)
    for name in ("model.visual", "point_embed", "region_proj"):
        model.get_submodule(name).load_state_dict(policy.get_submodule(name).state_dict())
    return model


def take_step(tokenizer, groups, filler, settings):
    """grpo.optimizer_step with the models of `make_groups` -> (what it returns, gradients)."""
    model = distributed.shard(
        freeze(make_model(tokenizer), settings), CPU, settings.checkpointing
    ).train()
    reference = distributed.shard(make_reference(tokenizer), CPU) if settings.kl else None
    optimizer = Capture(model)
    learner = make_learner(
        model, tokenizer, None, rules(tokenizer), reference=reference, optimizer=optimizer
    )
    *groups, filler = with_advantages([*groups, filler])
    stats = grpo.optimizer_step(learner, groups, filler, settings)
    return stats, optimizer.gradients


def rules(tokenizer):
    """Many stop ids, so that a random model's responses end at many lengths; what is never sampled."""
    return torch.arange(20, 60), token_rules(make_model(tokenizer), tokenizer, CPU)[1]


def sample(model, tokenizer, the_rules, generator):
    """grpo.sample_groups of all rows."""
    learner = make_learner(model, tokenizer, make_processor(), the_rules, generator)
    with distributed.gathered(model):
        rows = encoded(ROWS, tokenizer, learner.processor)
        return grpo.sample_groups(learner, rows, BASE, grpo.whole_reward)


def make_groups(tokenizer):
    """Four groups, for 2, 0, 1 and 3 regions; random rewards, and old log-probabilities far enough for the clip."""
    model, generator = (
        distributed.shard(make_model(tokenizer), CPU),
        torch.Generator().manual_seed(1),
    )
    groups = sample(model, tokenizer, rules(tokenizer), generator)
    for group in groups:
        group["rewards"] = torch.rand(GROUP, generator=generator)
        old = group["old_logprobs"]
        group["old_logprobs"] = old + 0.6 * torch.randn(old.shape, generator=generator)
    return groups


@pytest.fixture(scope="module")
def groups(tokenizer):
    return make_groups(tokenizer)


def plain_step(tokenizer, groups, settings):
    """The step's loss and gradients by the formula: group by group, response by response, token by token."""
    model, reference = freeze(make_model(tokenizer), settings), make_reference(tokenizer)
    total, count, outside, banned = 0, 0, 0, rules(tokenizer)[1]
    for group in groups:
        rewards = group["rewards"].tolist()
        for n, reward in enumerate(rewards):
            advantage = (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6)
            length = int(group["mask"][n].sum())
            inputs = (
                group["sample"],
                group["tokens"][n, :length],
                tokenizer,
                banned,
                settings.temperature,
            )
            logprobs, (fixed, _) = one_by_one(model, *inputs)[0], one_by_one(reference, *inputs)
            for new, old, ref in zip(logprobs, group["old_logprobs"][n], fixed.detach()):
                ratio, gap = (new - old).exp(), ref - new
                objective = min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
                if advantage < 0:
                    objective = max(objective, torch.tensor(3 * advantage).double())
                total, count = total - objective + settings.kl * (gap.exp() - gap - 1), count + 1
                outside += int(not 0.8 < ratio < 1.3)
    assert outside > 5  # the clip takes part
    return (total / count).item(), count, gradients(model, total / count)


@pytest.fixture(scope="module")
def plain(tokenizer, groups):
    variants = {vision: dataclasses.replace(BASE, train_vision=vision) for vision in (False, True)}
    return {
        vision: plain_step(tokenizer, groups, settings) for vision, settings in variants.items()
    }


def assert_same_step(got, expected, trained):
    (stats, slopes), (loss, tokens, wanted) = got, expected
    assert set(slopes) == set(wanted) and len(wanted) == trained
    for name in wanted:
        assert (slopes[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name
    assert stats["tokens"] == tokens and stats["loss"] == pytest.approx(
        loss, rel=1e-5
    )  # T26: the whole step's
    assert stats["grad_norm"] == pytest.approx(norm_of(wanted), rel=1e-5)


def norm_of(slopes):
    return torch.cat([slope.flatten() for slope in slopes.values()]).norm().item()


def budget(groups, passes):
    """A number of tokens that cuts the groups into so many passes."""
    return next(
        tokens
        for tokens in range(1, 10**5, 25)
        if len(grpo.micro_batches(groups, tokens)) == passes
    )


def number_of_parameters(tokenizer, vision):
    model = freeze(make_model(tokenizer), dataclasses.replace(BASE, train_vision=vision))
    return sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("vision, checkpointing", [(False, False), (True, False), (False, True)])
def test_T3_T29_any_micro_batching_gives_the_plain_gradient(
    vision, checkpointing, tokenizer, groups, plain
):
    for passes in (1, 2, 4):
        settings = dataclasses.replace(
            BASE,
            micro_tokens=budget(groups, passes),
            train_vision=vision,
            checkpointing=checkpointing,
        )
        step = take_step(tokenizer, groups, groups[0], settings)
        assert_same_step(step, plain[vision], number_of_parameters(tokenizer, vision))


def full_logprobs(model, prompts, tokens, mask, rows, banned):
    """Log-probabilities (rows, T) of some responses (indices) by the stock forward of whole sequences."""
    which = rows // (len(tokens) // len(prompts["input_ids"]))  # prompt of each response
    pictures = prompts["pixel_values"].split(prompts["image_grid_thw"].prod(-1).tolist())
    types = torch.zeros_like(tokens[rows])
    logits = model(
        input_ids=torch.cat([prompts["input_ids"][which], tokens[rows]], 1),
        attention_mask=torch.cat([prompts["attention_mask"][which], mask[rows]], 1),
        mm_token_type_ids=torch.cat([prompts["mm_token_type_ids"][which], types], 1),
        pixel_values=torch.cat([pictures[i] for i in which.tolist()]),
        image_grid_thw=prompts["image_grid_thw"][which],
        use_cache=False,
    ).logits  # (rows, L + T, V)
    logits = logits[:, prompts["input_ids"].shape[1] - 1 : -1].index_fill(-1, banned, -torch.inf)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[rows][..., None])[..., 0]
    return logprobs.masked_fill(mask[rows] == 0, 0)


def full_backward(model, reference, prompts, tokens, mask, old, rewards, banned, kl):
    """Gradients of the loss, written down a second time, over all responses at once -> loss."""
    spread = rewards.std(1, keepdim=True) + 1e-6
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).view(-1, 1)
    rows = torch.arange(len(tokens))
    logprobs = full_logprobs(model, prompts, tokens, mask, rows, banned)
    fixed = full_logprobs(reference, prompts, tokens, mask, rows, banned).detach()
    ratio = (logprobs - old).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    gain = torch.where(advantages < 0, torch.max(gain, 3 * advantages), gain)
    gain = gain - kl * ((fixed - logprobs).exp() - (fixed - logprobs) - 1)
    loss = -(gain * mask).sum() / mask.sum()
    loss.backward()
    return loss.item()


def gradients_of(model):
    """The gradients that a backward pass has left, taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("micro", [1, 2 * GROUP, 0])
def test_T3_the_step_and_the_naive_loop_of_the_bench_give_the_loss_and_gradients_of_full_forwards(
    micro, tokenizer
):
    rows = [
        make_row(1, (48, 64), 0, depth=False),
        make_row(2, (48, 48), 0, " it, red or blue", depth=False),
    ]
    samples = [data.encode(row, tokenizer, make_processor(), train=False) for row in rows]
    tokens, mask, noise = responses(tokenizer, 0, 2 * GROUP, 9)
    model, reference = freeze(make_model(tokenizer), BASE), make_reference(tokenizer)
    prompts = data.collate(samples, tokenizer)
    banned = rules(tokenizer)[1]
    rewards = torch.rand(2, GROUP)
    all_rows = torch.arange(2 * GROUP)
    with torch.no_grad():
        features = encode_prompts(model, prompts)
        old = 0.3 * noise + full_logprobs(model, prompts, tokens, mask, all_rows, banned)
    loss = full_backward(model, reference, prompts, tokens, mask, old, rewards, banned, BASE.kl)
    wanted = gradients_of(model)

    batch = (prompts, features, tokens, mask, old)
    naive = bench.naive_backward(model, reference, batch, rewards, banned, BASE.kl, micro)
    assert naive == pytest.approx(loss, rel=1e-9)
    slopes = gradients_of(model)
    assert set(slopes) == set(wanted)
    for name in wanted:
        assert (slopes[name] - wanted[name]).norm() < 1e-9 * wanted[name].norm(), name

    features = split_features(features, prompts["input_ids"], model.config)
    groups = bench.make_groups(
        samples, features, rewards, tokens=tokens, mask=mask, old_logprobs=old
    )
    groups = [{**group, "rewards": of_group} for group, of_group in zip(groups, rewards)]
    step = take_step(tokenizer, groups, groups[0], dataclasses.replace(BASE, temperature=1.0))
    assert 0.01 < step[0]["clipped"] < 0.9 and step[0]["kl"] > 0.01
    assert_same_step(step, (loss, mask.sum(), wanted), number_of_parameters(tokenizer, False))


@pytest.mark.parametrize("seed", [0, 80, 899])
def test_no_seed_trains_on_a_held_out_scene(seed):
    used = [
        range(rows.first_scene, rows.first_scene + rows.scenes)
        for _, rows, _ in grpo.sources_of(grpo.Settings(seed=seed), 96)
    ]
    made = sft.Settings(seed=seed)
    used += [
        range(rows.first_scene, rows.first_scene + rows.scenes)
        for _, rows, _ in sft.sources_of(made, 96)
    ]
    held_out = range(9 * 10**8, 9 * 10**8 + 100 * 10**4)  # of 10,000 questions
    assert all(scenes.stop <= held_out.start or scenes.start >= held_out.stop for scenes in used)


@pytest.mark.parametrize("kept", [48, 37, 3, 0])
def test_mini_batches_take_each_group_once_and_hold_the_mixture(kept):
    blend = rl_blend(48, 0, 96)
    sources = [
        data.Blend([(name, [name] * len(rows), 1.0) for name, rows, _ in blend], 0)[i]
        for i in range(kept)
    ]
    parts = grpo.mini_batches(list(enumerate(sources)), 4)
    assert len(parts) == 4 and [one for part in parts for one in part] == list(enumerate(sources))
    assert kept < 48 or all(
        {source for _, source in part} == {name for name, *_ in blend} for part in parts
    )


def test_micro_batches_bound_the_padded_size():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: int(torch.randint(1, 200, (), generator=generator))

    def group(prompt, longest):
        lengths = torch.tensor([longest] + [1] * (GROUP - 1))
        return {
            "sample": {"prompt": [0] * prompt},
            "mask": (torch.arange(200) < lengths[:, None]).long(),
        }

    odd = [group(190, 1), group(10, 46)]  # alike in size, but padded to each other twice as large
    for groups in (odd, [group(draw(), draw()) for _ in range(50)]):
        for budget in (400, 1500, 10**5):
            parts = grpo.micro_batches(groups, budget)
            assert sorted(map(id, groups)) == sorted(id(g) for part in parts for g in part)
            for part in parts:
                longest = max(int(g["mask"].sum(1).max()) for g in part)
                prompts = len(part) * max(len(g["sample"]["prompt"]) for g in part)
                assert len(part) == 1 or prompts + len(part) * GROUP * longest <= budget


def test_T18_the_first_inner_step_has_ratio_one_and_no_divergence(tokenizer):
    model, reference, the_rules = (
        *(distributed.shard(make_model(tokenizer), CPU) for _ in range(2)),
        rules(tokenizer),
    )
    groups = sample(model, tokenizer, the_rules, torch.Generator())
    groups[0]["rewards"] = torch.tensor([1.0, 0, 0, 0])
    groups = with_advantages(groups)
    learner = make_learner(
        model.train(), tokenizer, None, the_rules, reference=reference, optimizer=Capture(model)
    )
    stats = grpo.optimizer_step(learner, groups, groups[0], BASE)
    assert abs(stats["ratio"] - 1) < 1e-6 and stats["clipped"] == 0 and stats["mismatch"] < 1e-6
    assert stats["mismatch"] <= stats["mismatch_max"] < 1e-5
    assert stats["kl"] < 1e-12 and stats["grad_norm"] > 1e-3


def test_T17_a_batch_where_all_responses_are_cut_off_is_trained_as_it_is(tokenizer):
    model, never_stop = distributed.shard(make_model(tokenizer), CPU), (NEVER, rules(tokenizer)[1])
    groups = sample(model, tokenizer, never_stop, torch.Generator())
    assert all(group["cut"] == GROUP and group["mask"].all() for group in groups)
    groups[0]["rewards"] = torch.tensor([1.0, 0, 0, 0])
    stats, slopes = take_step(tokenizer, groups, groups[0], BASE)
    assert stats["tokens"] == 4 * GROUP * BASE.max_new_tokens and all(
        g.isfinite().all() for g in slopes.values()
    )


def test_the_log_has_the_largest_distance_to_the_sampler(tokenizer, groups, tmp_path):
    moved = [{**group, "old_logprobs": group["old_logprobs"].clone()} for group in groups]
    gaps = []
    for group in moved:
        here = group["mask"].bool()
        fresh = one_by_one(
            make_model(tokenizer),
            group["sample"],
            group["tokens"][0, : here[0].sum()],
            tokenizer,
            rules(tokenizer)[1],
            BASE.temperature,
        )[0].detach()
        group["old_logprobs"][0, : len(fresh)] = fresh
        group["mask"] = (
            group["mask"] * (torch.arange(GROUP) == 0).long()[:, None]
        )  # the first response alone
        gaps.append(len(fresh))
    moved[2]["old_logprobs"][0, 0] += 0.75  # one token of one group
    stats, _ = take_step(tokenizer, moved, groups[0], dataclasses.replace(BASE, micro_tokens=1))
    assert stats["mismatch_max"] == pytest.approx(0.75, abs=1e-5)
    assert stats["mismatch"] == pytest.approx(0.75 / sum(gaps), abs=1e-5)


@pytest.mark.parametrize("reward, rule", [(1.0, "spread"), (0.0, "spread"), (0.1, "mean")])
def test_T22_steps_without_a_group_that_differs_end_and_say_why(
    reward, rule, tokenizer, tmp_path, capsys
):
    def constant(row, response, parts):
        return reward

    settings = dataclasses.replace(
        BASE,
        out=str(tmp_path),
        steps=2,
        prompts=1,
        minibatches=2,
        filter=rule,
        rounds=3,
        show_every=1,
    )
    model = grpo.train(
        settings, make_model(tokenizer), tokenizer, make_processor(), Same(), CPU, constant
    )
    assert (
        capsys.readouterr().out.count(
            f"dropped, {'0% as too hard, 100' if reward == 1 else '100% as too hard, 0'}% "
            "as too easy"
        )
        == 2
    )
    before = dict(make_model(tokenizer).named_parameters())
    assert all(torch.equal(whole(p.detach()), before[name]) for name, p in model.named_parameters())
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["kept"] == 0 and line["rounds"] == 3 and "loss" not in line
        assert (line["dropped_high"], line["dropped_low"]) == ((1, 0) if reward == 1 else (0, 1))


def test_a_step_without_any_group_changes_nothing_and_a_non_finite_gradient_is_skipped(
    tokenizer, groups
):
    assert take_step(tokenizer, [], groups[0], BASE) == (None, {})
    broken = [{**groups[0], "rewards": groups[0]["rewards"] * math.nan}]
    assert take_step(tokenizer, broken, groups[0], BASE)[1] == {}


# ---------------------------------------------------------------------------------------------------------------------
# the cold start


def start_rows():
    long = "<think>" + "red blue green " * 9 + "</think>\n<answer>B</answer>"
    return [
        {**row, "conversations": [row["conversations"][0], {"from": "gpt", "value": text}]}
        for row, text in zip(
            ROWS, ["0.5", long, "<think>It is near.</think>\n<answer>0.4</answer>", long]
        )
    ]


def cold_start(tokenizer, folder, micro_tokens):
    """Five steps of sft.train on all four rows -> its log lines."""
    settings = dataclasses.replace(
        sft.Settings(),
        out=str(folder),
        steps=5,
        batch=4,
        micro_tokens=micro_tokens,
        lr=1e-3,
        clip=1e9,
        pretrain=0,
    )
    sft.train(
        settings,
        make_model(tokenizer),
        tokenizer,
        make_processor(),
        [("rows", start_rows(), 1.0)],
        CPU,
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "large, lora, cold, rl", [(False, 0, 2e-3, 4e-5), (True, 0, 5e-6, 1e-6), (True, 16, 5e-6, 1e-5)]
)
def test_without_lr_a_large_model_learns_at_the_rates_of_the_paper(
    large, lora, cold, rl, tokenizer, monkeypatch
):
    class Sharding(Exception):
        pass

    def stop(*args, **kwargs):
        raise Sharding

    monkeypatch.setattr(distributed, "is_large", lambda model: large)
    monkeypatch.setattr(distributed, "shard", stop)
    rows = 2 * start_rows()
    for module, settings, trained_on, wanted in (
        (sft, sft.Settings(), [("rows", rows, 1.0)], cold),
        (grpo, grpo.Settings(prompts=4, lora=lora), rows, rl),
    ):
        with pytest.raises(Sharding):
            module.train(
                settings, make_model(tokenizer), tokenizer, make_processor(), trained_on, CPU
            )
        assert settings.lr == wanted


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    return cold_start(tokenizer, tmp_path_factory.mktemp("start"), 10**9)


def test_T3_cold_start_loss_is_the_mean_over_target_tokens_of_the_whole_batch(
    tokenizer, start, tmp_path
):
    model, total, count = make_model(tokenizer), 0, 0
    for row in start_rows():
        sample = data.encode(row, tokenizer, make_processor(), train=True)
        assert sample["target"][-1] == tokenizer.eos_token_id
        total = total - one_by_one(model, sample, sample["target"], tokenizer, NEVER)[0].sum()
        count += len(sample["target"])
    norm = norm_of(gradients(model, total / count))
    for lines in (start, cold_start(tokenizer, tmp_path, 1)):  # one pass, four passes
        assert lines[0]["loss"] == pytest.approx(total.item() / count, rel=1e-5)
        assert (
            lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-4) and lines[0]["tokens"] == count
        )
        assert [line["loss"] for line in lines] == pytest.approx(
            [line["loss"] for line in start], rel=1e-5
        )
    assert len({line["loss"] for line in start}) == 5


# ---------------------------------------------------------------------------------------------------------------------
# two processes. Every split of the four groups must give the same gradient; a hang ends after two minutes.

SPLITS = {  # groups of rank 0, groups of rank 1, most passes of a rank, is the vision side trained?
    "T1_T4_two_and_two": ([0, 1], [2, 3], 1, False),
    "T22_three_passes_and_one": ([0, 2, 3], [1], 3, False),
    "T22_all_groups_of_a_rank_dropped": ([0, 1, 2, 3], [], 2, False),
    "T23_no_region_on_one_rank": ([0, 2, 3], [1], 1, True),
}


class Same:
    """A blend in which every position holds the same row; remembers what was asked for."""

    def __init__(self):
        self.positions = []

    def __getitem__(self, position):
        self.positions.append(position)
        return ROWS[0]


def train_unevenly(tokenizer, folder):
    """grpo.train; rank 1 samples longer responses and its groups are ties -> (first tokens, positions, weights)."""
    original, seen, blend = grpo.sample_groups, [], Same()
    calls = itertools.count()

    def ties_on_rank_1(row, response, parts):
        return float(next(calls) % GROUP) * (1 - distributed.rank())

    def sample_groups(learner, rows, settings, reward_function):
        settings = dataclasses.replace(settings, max_new_tokens=4 + 7 * distributed.rank())
        learner = dataclasses.replace(learner, stop_ids=NEVER)
        groups = original(learner, rows, settings, reward_function)
        seen.append(groups[0]["tokens"])
        return groups

    grpo.sample_groups = sample_groups
    settings = dataclasses.replace(
        BASE,
        out=f"{folder}/out",
        steps=2,
        prompts=4,
        minibatches=2,
        filter="spread",
        rounds=2,
        lr=1e-3,
    )
    model = grpo.train(
        settings,
        make_model(tokenizer),
        tokenizer,
        make_processor(),
        blend,
        CPU,
        reward_function=ties_on_rank_1,
    )
    # the first eight were for the memory plan
    return (
        seen[0],
        blend.positions[8:],
        {name: whole(p.detach()) for name, p in model.named_parameters()},
    )


def worker(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    distributed.setup(0)
    torch.set_num_threads(1)
    tokenizer, groups = torch.load(f"{folder}/in.pt", weights_only=False)
    out = {"start": cold_start(tokenizer, Path(folder) / "start", 100)}
    usual = distributed.LARGE_LAYER
    for limit in (usual, 0):  # 0: each layer is gathered by itself, as in large models
        distributed.LARGE_LAYER = limit
        for name, (*split, passes, vision) in SPLITS.items():
            first, mine = ([groups[i] for i in split[r]] for r in (0, rank))
            settings = dataclasses.replace(
                BASE, micro_tokens=budget(first, passes), train_vision=vision
            )
            out[name, distributed.LARGE_LAYER > 0] = take_step(
                tokenizer, mine, groups[rank], settings
            )
    out["groups"] = make_groups(tokenizer)
    out["each"] = scored_groups()[2 * rank : 2 * rank + 2]
    grpo.add_advantages(out["each"], out["each"], dataclasses.replace(BASE, normalize="each"))
    out["train"] = train_unevenly(tokenizer, folder)
    torch.save(out, f"{folder}/out{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tokenizer, groups, tmp_path_factory):
    """What two processes computed, rank by rank."""
    folder = tmp_path_factory.mktemp("two")
    torch.save((tokenizer, groups), folder / "in.pt")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"out{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("one_unit", [True, False])
@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_give_the_gradient_of_one(name, one_unit, two, plain, tokenizer):
    vision = SPLITS[name][3]
    for results in two[1]:
        assert_same_step(
            results[name, one_unit], plain[vision], number_of_parameters(tokenizer, vision)
        )


def test_the_batch_that_advantages_are_normalised_over_is_that_of_all_ranks(two):
    groups = [group for results in two[1] for group in results["each"]]
    for group, expected in zip(groups, decoupled_plainly(range(4))):
        torch.testing.assert_close(
            group["advantages"], torch.tensor(expected), rtol=1e-5, atol=1e-6
        )


def test_layers_that_are_units_of_their_own_sample_the_same(two, groups):
    for results in two[1]:  # the vision layers are used before the whole model is
        for group, same in zip(results["groups"], groups):
            assert torch.equal(group["tokens"], same["tokens"]) and torch.equal(
                group["mask"], same["mask"]
            )
            torch.testing.assert_close(group["old_logprobs"], same["old_logprobs"])


def test_T4_cold_start_on_two_processes_equals_one(two, start):
    assert len(start) == len(two[1][0]["start"]) == 5
    for one, other in zip(start, two[1][0]["start"]):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_T24_ranks_sample_differently_and_T22_T28_train_together_on_unequal_groups(two, tokenizer):
    (first, asked, weights), (second, also, same) = (results["train"] for results in two[1])
    assert sorted(asked + also) == list(
        range(2 * 2 * 4)
    )  # no position of the blend twice, none left out
    assert (
        first.shape == (GROUP, 4)
        and second.shape == (GROUP, 11)
        and not torch.equal(first, second[:, :4])
    )
    before = dict(make_model(tokenizer).named_parameters())
    assert all(
        torch.equal(weights[name], same[name]) for name in weights
    )  # the ranks did not drift
    assert not any(
        torch.equal(weights[name], before[name]) for name in weights if "layernorm" in name
    )
    lines = [
        json.loads(line) for line in (two[0] / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)
    assert all(line["kept"] == 2 / 8 for line in lines)  # of four prompts in each of two rounds
    assert all(
        (line["rounds"], line["dropped_low"], line["dropped_high"]) == (2, 4 / 8, 0)
        for line in lines
    )
    assert all(line["first_ratio"] == pytest.approx(1, abs=1e-6) for line in lines)
    assert all(line["first_mismatch"] <= line["first_mismatch_max"] < 1e-5 for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# groups, shared out evenly


@pytest.mark.parametrize(
    "counts, even",
    [
        ([5, 1], [3, 3]),
        ([0, 7], [3, 4]),
        ([4, 4, 4], [4, 4, 4]),
        ([9, 0, 0, 1], [3, 2, 2, 3]),
        ([2, 1], [2, 1]),
        ([1, 2], [1, 2]),
        ([0, 0], [0, 0]),
    ],
)
def test_ranks_get_as_many_groups_by_the_fewest_moves(counts, even):
    moves = distributed.moves_to_even(counts)
    after = list(counts)
    for giver, taker in moves:
        after[giver] -= 1
        after[taker] += 1
    assert sorted(after) == sorted(even) and max(after) - min(after) <= 1
    assert len(moves) == sum(max(0, a - b) for a, b in zip(counts, after))


def even_worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/even", rank=rank, world_size=3)
    own = [3, 0, 1][rank]
    items = [
        {"name": (rank, i), "features": {"levels": [torch.full((2,), rank + i / 10)], "none": None}}
        for i in range(own)
    ]
    torch.save(distributed.even_out(items, CPU), f"{folder}/even{rank}.pt")
    dist.destroy_process_group()


def test_groups_arrive_whole_on_other_ranks(tmp_path):
    torch.multiprocessing.spawn(even_worker, args=(str(tmp_path),), nprocs=3)
    ranks = [torch.load(tmp_path / f"even{rank}.pt", weights_only=False) for rank in range(3)]
    assert [[item["name"] for item in items] for items in ranks] == [
        [(0, 0), (0, 1)],
        [(0, 2)],
        [(2, 0)],
    ]
    (moved,) = ranks[1]
    assert torch.equal(moved["features"]["levels"][0], torch.full((2,), 0.2))
