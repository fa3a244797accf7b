"""The model, the sampler and the scorer against computations that are obviously right: one sequence at a time, without
cache or padding, in float64, by plain loops. T and a number in a name: the silent trap of GRPO on a VLM that it closes.

    python -m pytest -q test_model.py                                  # half a minute on one core

The models are random, with all that Qwen3-VL has (deepstack, M-RoPE, two frames a patch, tied embeddings), and their
weights are large: at the usual initialisation attention is so flat that a wrong mask or position would hardly show.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact comparisons need the CPU; for child processes too

import math

import numpy as np
import pytest
import torch
from common import process_group  # noqa: F401  (at work in every test)
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import data
from engine import checkpoint, distributed, head, shared_prefix
from engine.checkpoint import load_model
from engine.shared_prefix import rollout, token_logprobs
from model import (
    BANDS,
    POINT_DIM,
    REGION_TOKEN,
    SPECIAL_TOKENS,
    UNIT,
    RegionVLM,
    decode,
    join_features,
    mrope_positions,
    point_map,
    region_weights,
    split_features,
    to_patches,
)

PATCH, MERGE, NEVER = 8, 2, torch.tensor([], dtype=torch.long)
MARKS = ["red bbox", "blue bbox", "green bbox"]


def make_tokenizer(special=tuple(SPECIAL_TOKENS)):
    texts = [
        *data.PROMPTS.values(),
        "red bbox, blue bbox and green bbox. 0123456789 How far is it? user assistant\n",
    ]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts * 20, 400, new_special_tokens=list(special), show_progress=False
    )
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return tokenizer


def make_processor():
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    )


def make_config(tokenizer, **more):
    ids = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        vision_config={
            "hidden_size": 32,
            "depth": 3,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 36,
        },
        text_config={
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": len(tokenizer) + 8,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_interleaved": True,
                "mrope_section": [4, 2, 2],
            },
        },
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        **more,
    )


def randomize(model, seed):
    """Weights large enough that every input matters."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.2 / math.prod(parameter.shape[1:]) ** 0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_model(tokenizer, seed=0, dtype=torch.float64):
    config = make_config(tokenizer, region_token_id=tokenizer.convert_tokens_to_ids(REGION_TOKEN))
    model = randomize(RegionVLM(config), seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(dtype).eval()


def make_row(seed, size, regions, words="", depth=True):
    """An instance with a random picture, a depth map with holes, and that many regions in the question."""
    rng, (h, w) = np.random.default_rng(seed), size
    metres = rng.uniform(1, 6, size).astype(np.float32)
    metres[: h // 4, w // 3 :] = np.nan
    corners = rng.integers(0, min(h, w) - 20, (regions, 2)).tolist()
    boxes = [[x, y, x + int(rng.integers(1, 20)), y + int(rng.integers(1, 20))] for x, y in corners]
    question = (
        "How far is " + " and ".join(f"{mark} <mask>" for mark in MARKS[:regions]) + words + "?"
    )
    row = {
        "source": f"row {seed}",
        "image": rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
        "intrinsics": [60.0, 62.0, w / 2, h / 2],
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": "<answer>3</answer>"},
        ],
    }
    row |= {"depth": metres} if depth else {}
    return row | ({"bbox": boxes, "3d_pos": {}} if regions else {})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


ROWS = [
    make_row(1, (48, 64), 2),
    make_row(2, (48, 48), 0, " it, red or blue", depth=False),
    make_row(3, (64, 32), 1, " 0.5"),
    make_row(4, (32, 32), 3),
]


@pytest.fixture(scope="module")
def samples(tokenizer):
    """Prompts of many lengths and pictures of many sizes, with 2, 0, 1 and 3 regions; the second without depth."""
    return [data.encode(row, tokenizer, make_processor(), train=False) for row in ROWS]


@pytest.fixture(scope="module")
def banned(tokenizer):
    return torch.tensor(
        tokenizer.convert_tokens_to_ids(
            ["<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<mask>"]
        )
    )


@pytest.fixture(scope="module")
def exact(tokenizer):
    return make_model(tokenizer)


def stock_inputs(batch):
    return {
        key: value
        for key, value in batch.items()
        if key not in ("loss_mask", "position_ids", "points", "regions")
    }


def full_logits(model, sample, response, tokenizer):
    """Logits (T + 1, V) that predict the response and one token more: one sequence, one pass, no cache, no padding."""
    inputs = data.collate([{**sample, "target": []}], tokenizer)
    inputs.pop("loss_mask")
    inputs.pop("position_ids")  # the stock model numbers them itself
    inputs["input_ids"] = torch.tensor([sample["prompt"] + list(map(int, response))])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(response)))
    return model(**inputs).logits[0, len(sample["prompt"]) - 1 :]


def one_by_one(model, sample, response, tokenizer, banned, temperature=1.0):
    """Log-probabilities (T,) of the response among the allowed tokens, and the entropies (T,) of the distributions."""
    logits = full_logits(model, sample, response, tokenizer)[:-1]
    allowed = [i for i in range(logits.shape[1]) if i not in set(banned.tolist())]
    logprobs = torch.log_softmax(logits[:, allowed] / temperature, -1)
    chosen = logprobs[
        torch.arange(len(response)), [allowed.index(int(token)) for token in response]
    ]
    return chosen, -(logprobs.exp() * logprobs).sum(1)


def greedy(model, sample, tokenizer, banned, steps):
    """The most likely response, by running the whole sequence again for each token."""
    response = []
    with torch.no_grad():
        for _ in range(steps):
            last = full_logits(model, sample, response, tokenizer)[-1].clone()
            last[banned] = -math.inf
            response.append(int(last.argmax()))
    return response


# ---------------------------------------------------------------------------------------------------------------------
# the stock model


def test_T18_a_checkpoint_that_trained_with_dropout_is_scored_without(tmp_path):
    tokenizer = make_tokenizer()
    config = make_config(tokenizer, region_token_id=tokenizer.convert_tokens_to_ids(REGION_TOKEN))
    config.text_config.attention_dropout = 0.5
    for part in (randomize(RegionVLM(config), 0), tokenizer, make_processor()):
        part.save_pretrained(tmp_path)
    model, ids = load_model(str(tmp_path))[0], torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_T32_a_stock_checkpoint_loads_as_the_stock_model(tmp_path):
    tokenizer = make_tokenizer(
        [token for token in SPECIAL_TOKENS if token != REGION_TOKEN]
    )  # stock: has no <mask>
    stock = randomize(Qwen3VLForConditionalGeneration(make_config(tokenizer)), 0).eval()
    for part in (stock, tokenizer, make_processor()):
        part.save_pretrained(tmp_path)
    ours, tokenizer, processor = load_model(str(tmp_path))
    for parameter in ours.point_embed.fc2.parameters():
        assert torch.equal(parameter, torch.zeros_like(parameter))
    assert ours.region_proj.weight.std() > 0.01 and ours.point_embed.fc1.weight.std() > 0.01
    ours.eval()
    assert all(
        torch.equal(weight, ours.state_dict()[name]) for name, weight in stock.state_dict().items()
    )
    assert ours.lm_head.weight is ours.model.language_model.embed_tokens.weight

    rows = [make_row(s, (48, 32 + 16 * s), 0) for s in range(3)]
    batch = data.collate(
        [data.encode(row, tokenizer, processor, train=False) for row in rows], tokenizer
    )
    assert batch["points"].isfinite().any() and not batch["attention_mask"].all()
    with torch.no_grad():
        expected = stock(**stock_inputs(batch)).logits
        assert torch.equal(ours(**stock_inputs(batch)).logits, expected)  # no depth, no region
        with_depth = lambda points: ours(**stock_inputs(batch), points=points).logits
        assert torch.equal(with_depth(batch["points"]), expected)  # depth, at initialisation
        torch.nn.init.normal_(ours.point_embed.fc2.weight)
        assert not torch.allclose(with_depth(batch["points"]), expected, atol=0.1)
        assert torch.equal(
            with_depth(torch.full_like(batch["points"], math.nan)), expected
        )  # trained, but no depth


@pytest.mark.parametrize("way", ["save_pretrained", "run.save_model"])
def test_a_saved_model_loads_bit_identical(way, tokenizer, samples, tmp_path):
    model = make_model(tokenizer, 5, torch.float32)
    if way == "run.save_model":
        checkpoint.save_model(model, tokenizer, make_processor(), str(tmp_path))
        loaded, again, _ = load_model(str(tmp_path))
        assert again.get_vocab() == tokenizer.get_vocab()
    else:
        model.save_pretrained(tmp_path)
        loaded = RegionVLM.from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())  # T30
    assert all(
        torch.equal(weight, loaded.state_dict()[name])
        for name, weight in model.state_dict().items()
    )
    batch = data.collate(samples, tokenizer)
    batch.pop("loss_mask")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


# ---------------------------------------------------------------------------------------------------------------------
# geometry and regions


def test_point_map_is_the_inverse_of_projection_at_pixel_centres():
    fx, fy, cx, cy = camera = (50.0, 55.0, 9.5, 6.0)
    depth = torch.rand(12, 20) * 5 + 1
    depth[3, 4] = math.nan
    points = point_map(depth, camera)
    assert points[:, 3, 4].isnan().any()  # no depth: not a point at the camera
    for v in range(12):
        for u in range(20):
            if (v, u) != (3, 4):
                x, y, z = points[:, v, u].tolist()
                assert z == depth[v, u]  # metres along the axis, not along the ray
                assert (
                    abs(fx * x / z + cx - (u + 0.5)) < 1e-4
                    and abs(fy * y / z + cy - (v + 0.5)) < 1e-4
                )


def test_to_patches_has_the_patch_order_of_the_stock_image_processor():
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (6, 4, 3)), np.ones((PATCH, PATCH, 1))).astype(
        np.uint8
    )  # a colour a patch
    out = make_processor()(images=[picture], return_tensors="pt")
    rows, columns = out["image_grid_thw"][0, 1:].tolist()
    assert (rows, columns) == (6, 4)
    colors = out["pixel_values"].view(24, 3, 2, PATCH, PATCH)[:, :, 0, 0, 0] * 127.5 + 127.5
    ours = to_patches(torch.tensor(picture).permute(2, 0, 1).float(), (rows, columns), MERGE)
    torch.testing.assert_close(ours, colors, rtol=0, atol=1e-3)


def hand_encoding(depth, camera):
    """x, sin 2^k x, cos 2^k x of a pixel's three coordinates, in UNITs, float64 -> (H, W, POINT_DIM)."""
    (fx, fy, cx, cy), bands = camera, range(BANDS)
    out = np.full((*depth.shape, POINT_DIM), np.nan)
    for v, u in zip(*np.nonzero(np.isfinite(depth))):
        z = float(depth[v, u]) / UNIT
        out[v, u] = [
            f
            for x in ((u + 0.5 - cx) / fx * z, (v + 0.5 - cy) / fy * z, z)
            for f in (x, *(math.sin(2**k * x) for k in bands), *(math.cos(2**k * x) for k in bands))
        ]
    return out


def test_the_feature_of_a_patch_depends_on_its_own_pixels(tokenizer, samples):
    """A tower whose features come in another order, such as by windows, would fail here."""
    model = make_model(tokenizer)
    model.model.visual.blocks = torch.nn.ModuleList()  # no attention, so that patches do not mix
    pixels = samples[0]["pixel_values"]
    grid = samples[0]["image_grid_thw"]
    every_patch = torch.eye(len(pixels), dtype=torch.float64)  # a region per patch
    with torch.no_grad():
        before = model.encode_images(pixels, grid, None, every_patch)["regions"]
        for patch in range(len(pixels)):
            other = pixels.clone()
            other[patch] += 1
            after = model.encode_images(other, grid, None, every_patch)["regions"]
            changed = (after - before).abs().amax(1) > 1e-6
            assert changed.nonzero().flatten().tolist() == [patch]


def test_points_are_encoded_per_pixel_then_averaged_over_the_known_pixels_of_a_patch(samples):
    row, points = ROWS[0], samples[0]["points"]
    encoded = hand_encoding(row["depth"], row["intrinsics"])
    place = 0
    for block in np.ndindex(3, 4):  # 6 x 8 patches in blocks of 2 x 2
        for inner in np.ndindex(MERGE, MERGE):
            v, u = (PATCH * (MERGE * b + i) for b, i in zip(block, inner))
            pixels = encoded[v : v + PATCH, u : u + PATCH].reshape(PATCH * PATCH, -1)
            pixels = pixels[np.isfinite(pixels[:, 0])]
            if len(pixels):
                np.testing.assert_allclose(
                    points[place], pixels.mean(0), atol=2e-4
                )  # sin(128 x) in float32
            else:
                assert points[place].isnan().all()
            place += 1
    assert place == len(points) and 0 < points[:, 0].isnan().sum() < 12
    assert samples[1]["points"].isnan().all()  # no depth map: no embedding at all


@pytest.mark.parametrize(
    "h, w", [(48, 64), (50, 75)]
)  # 50 x 75: patches do not divide it, the processor resizes
def test_thin_masks_keep_their_weight(h, w):
    masks = torch.zeros(3, h, w)
    masks[0, :, 37], masks[1, h - 1, w - 1], masks[2, : h // 3, : w // 4] = 1, 1, 1
    weights = region_weights(masks, (6, 8), MERGE)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    columns = [
        2 * block + inner
        for _ in range(3)
        for block in range(4)
        for _ in range(2)
        for inner in range(2)
    ]
    column = torch.tensor(columns)  # of each patch, in the order of the merged blocks
    under = (column >= 37 * 8 // w) & (
        column < 38 * 8 / w
    )  # columns of patches that hold pixel column 37
    assert weights[0, under].sum() > 0.99 and weights[1, 47] > 0.99
    if w == 64:  # 16 x 16 pixels: exactly the first block of 2 x 2 patches
        torch.testing.assert_close(weights[2], F.pad(torch.full((4,), 0.25), (0, 44)))


def test_T14_region_tokens_are_weighted_means_in_text_order(exact, samples, tokenizer):
    batch, seen = data.collate(samples, tokenizer), []
    batch.pop("loss_mask")
    keep = lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"])
    hook = exact.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        exact(**batch)
        hook.remove()
        expected = []
        for sample in samples:  # picture by picture, region by region, patch by patch
            out = exact.model.visual(
                sample["pixel_values"].double(), grid_thw=sample["image_grid_thw"]
            )
            features = out.last_hidden_state
            for p, point in enumerate(sample["points"]):
                if point.isfinite().all():
                    features[p] += exact.point_embed(point[None])[0]
            for weights in sample["regions"]:
                mean = sum(float(weight) * feature for weight, feature in zip(weights, features))
                expected.append(exact.region_proj.weight @ mean + exact.region_proj.bias)
    assert len(expected) == 6
    here = batch["input_ids"] == tokenizer.convert_tokens_to_ids("<mask>")
    torch.testing.assert_close(seen[0][here], torch.stack(expected), rtol=0, atol=1e-9)
    assert (
        samples[0]["regions"][0].argmax() != samples[0]["regions"][1].argmax()
    )  # the order does show


@pytest.mark.parametrize("change", ["fewer", "more", "fewer images"])
def test_T14_a_count_mismatch_raises(change, exact, samples, tokenizer):
    batch = data.collate(samples, tokenizer)
    batch.pop("loss_mask")
    mask, pad = tokenizer.convert_tokens_to_ids(["<mask>", "<|image_pad|>"])
    where = (batch["input_ids"] == (pad if "images" in change else mask)).nonzero()[0]
    batch["input_ids"][tuple(where)] = tokenizer.convert_tokens_to_ids("e")
    if change == "more":
        batch["input_ids"][:, -1] = mask
    with pytest.raises(ValueError, match="image tokens" if "images" in change else "<mask>"):
        exact(**batch)


# ---------------------------------------------------------------------------------------------------------------------
# batches


def test_T12_left_padding_equals_one_by_one(exact, samples, tokenizer):
    batch = data.collate(samples, tokenizer)
    batch.pop("loss_mask")
    assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"] == 0).sum(
        1
    ).max() > 10
    with torch.no_grad():
        logits = exact(**batch).logits
        for i, sample in enumerate(samples):
            one = data.collate([sample], tokenizer)
            one.pop("loss_mask")
            alone = exact(**one).logits[0]
            torch.testing.assert_close(logits[i, -len(alone) :], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_T2_T12_T13_greedy_rollout_equals_rerunning_each_sequence(
    checkpointing, tokenizer, samples, banned
):
    model = make_model(tokenizer)
    trained = distributed.shard(make_model(tokenizer), torch.device("cpu"), checkpointing).train()
    with distributed.gathered(trained):
        tokens, mask, *_ = rollout(
            trained, data.collate(samples, tokenizer), 2, 8, NEVER, banned, temperature=0
        )
    assert mask.all() and tokens.shape == (8, 8)
    for i, sample in enumerate(samples):
        assert (
            tokens[2 * i].tolist()
            == tokens[2 * i + 1].tolist()
            == greedy(model, sample, tokenizer, banned, 8)
        )
    assert len(tokens.unique()) > 8  # not one token for ever, which any cache would repeat


def test_greedy_rollout_equals_stock_generate(tokenizer, banned):
    model = make_model(tokenizer, 1)
    stock = Qwen3VLForConditionalGeneration(model.config).double().eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    rows = [make_row(s, (48, 32 + 16 * s), 0, " it" * s, depth=False) for s in range(3)]
    batch = data.collate(
        [data.encode(row, tokenizer, make_processor(), train=False) for row in rows], tokenizer
    )
    expected = stock.generate(
        **stock_inputs(batch),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=banned.tolist(),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokens, *_ = rollout(model, batch, 1, 12, NEVER, banned, temperature=0)
    assert torch.equal(tokens, expected[:, batch["input_ids"].shape[1] :])


# ---------------------------------------------------------------------------------------------------------------------
# stopping, sampling


def test_T15_T16_T17_several_stop_ids_ragged_ends_and_cut_responses(
    exact, samples, tokenizer, banned
):
    full, end = (
        [greedy(exact, sample, tokenizer, banned, 10) for sample in samples],
        tokenizer.eos_token_id,
    )
    assert all(end in sample["prompt"] for sample in samples)  # there it must not matter
    until = lambda stops: [
        next((t + 1 for t, token in enumerate(row) if token in stops), 11) for row in full
    ]
    pairs = ({one, other, end} for one in full[0] for other in full[3])
    stops = next(
        pair
        for pair in pairs
        if len(set(until(pair))) >= 3
        and 11 in until(pair)  # ragged, one cut off
        and until(pair).count(min(until(pair))) == 1
    )
    once = until(stops).index(
        min(until(stops))
    )  # the first to end is one row of ten: not dropped at once
    rows = [i for i in range(len(samples)) for _ in range(1 if i == once else 3)]
    full, samples = ([each[i] for i in rows] for each in (full, samples))
    lengths = [min(length, 10) for length in until(stops)]
    batch, stop_ids = data.collate(samples, tokenizer), torch.tensor(sorted(stops))
    tokens, mask, logprobs, _ = rollout(exact, batch, 1, 10, stop_ids, banned, temperature=0)
    for i, (response, length) in enumerate(zip(full, lengths)):
        assert mask[i].tolist() == [1] * length + [0] * (10 - length)  # 1: up to and with it
        assert tokens[i, :length].tolist() == response[:length]
        expected, _ = one_by_one(exact, samples[i], response[:length], tokenizer, banned)
        torch.testing.assert_close(logprobs[i, :length].double(), expected, rtol=0, atol=1e-5)
    texts, ended = decode(tokenizer, tokens, mask, stops)
    assert ended == [response[length - 1] in stops for response, length in zip(full, lengths)]
    assert texts == [tokenizer.decode(r[: n - end]) for r, n, end in zip(full, lengths, ended)]


def test_T14_banned_ids_are_never_sampled_and_T9_the_rest_as_the_softmax_says(
    exact, samples, tokenizer
):
    with torch.no_grad():
        logits = full_logits(exact, samples[0], [], tokenizer)[0] / 0.7
    order = logits.argsort(descending=True)
    keep, banned = order[20:28], torch.cat([order[:20], order[28:]])  # not even the likeliest 20
    assert logits.softmax(0)[order[:20]].sum() > 0.1
    generator, count = torch.Generator().manual_seed(0), 1500
    batch = data.collate(samples[:1], tokenizer)
    tokens, _, logprobs, _ = rollout(exact, batch, count, 1, NEVER, banned, 0.7, generator)
    wanted = logits[keep].softmax(0)
    seen = torch.tensor([(tokens == token).sum() for token in keep])
    assert seen.sum() == count
    assert ((seen - count * wanted).abs() < 4 * (count * wanted * (1 - wanted)).sqrt()).all()
    expected = torch.stack([wanted.log()[keep == token].float() for token in tokens[:, 0]])
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_T8_T10_T18_the_sampler_and_the_scorer_agree(
    temperature, dtype, tolerance, tokenizer, samples, banned
):
    model = make_model(tokenizer, 2, dtype)
    batch, generator = data.collate(samples, tokenizer), torch.Generator().manual_seed(0)
    stop_ids = torch.arange(20, 60)  # about every tenth token: many lengths
    tokens, mask, sampled, features = rollout(
        model, batch, 6, 12, stop_ids, banned, temperature, generator
    )
    assert len(set(mask.sum(1).tolist())) > 4
    for mode in (model.train(), model.eval()):  # training is scored in train mode
        for given in (features, None):
            scored, _ = token_logprobs(mode, batch, given, tokens, mask, banned, temperature)
            ratio = (scored.detach() - sampled).exp()[mask.bool()]
            assert (ratio - 1).abs().max() < tolerance
    other, _ = token_logprobs(model, batch, features, tokens, mask, banned, 1.7 - temperature)
    assert (other - sampled)[mask.bool()].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_T11_scored_probabilities_sum_to_one_in_every_precision(dtype, tokenizer, samples, banned):
    model = make_model(tokenizer, 2, dtype)
    allowed = [
        i for i in range(model.config.text_config.vocab_size) if i not in set(banned.tolist())
    ]
    tokens = torch.tensor(allowed)[:, None]  # every one-token response to the prompt
    batch = data.collate(samples[:1], tokenizer)
    logprobs, _ = token_logprobs(model, batch, None, tokens, torch.ones_like(tokens), banned, 0.7)
    assert (
        abs(logprobs.double().exp().sum() - 1) < 1e-5
    )  # a log-softmax in bfloat16 is off by a hundred times that


# ---------------------------------------------------------------------------------------------------------------------
# scoring


def responses(tokenizer, seed, count, length):
    """Random tokens, ragged masks, and the coefficients of a random loss, each (N, T)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 200, (count, length), generator=generator)
    mask = (
        torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=generator)
    ).long()
    mask[0] = 1
    return tokens, mask, torch.randn(count, length, generator=generator).double()


def gradients(model, loss):
    loss.backward()
    found = {
        name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()  # now: between the passes FSDP would hide the shards from it
    return found


def whole(tensor):
    """The tensor itself, or that of which it is a shard."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_T29_shared_prefix_equals_one_full_forward_a_response(
    dtype, tolerance, tokenizer, samples, banned
):
    group, model = 3, make_model(tokenizer, 3, dtype).train()
    tokens, mask, weight = responses(tokenizer, 0, group * len(samples), 9)
    weight = weight.to(dtype)
    expected, entropies, loss = torch.zeros_like(weight), torch.zeros_like(weight), 0
    for n, keep in enumerate(mask.sum(1).tolist()):
        logprobs, entropy = one_by_one(
            model, samples[n // group], tokens[n, :keep], tokenizer, banned, 0.9
        )
        expected[n, :keep], entropies[n, :keep] = logprobs.detach(), entropy.detach()
        loss = loss + (logprobs * weight[n, :keep]).sum()
    wanted = gradients(model, loss)
    assert len(wanted) == len(list(model.named_parameters()))  # deepstack, depth, regions
    for checkpointing in (False, True):
        trained = distributed.shard(
            make_model(tokenizer, 3, dtype), torch.device("cpu"), checkpointing
        ).train()
        for junk in (0, banned[0]):  # what stands behind the mask must not matter
            batch = data.collate(samples, tokenizer)
            given = tokens.masked_fill(mask == 0, junk)
            logprobs, entropy = token_logprobs(trained, batch, None, given, mask, banned, 0.9)
            keep = mask.bool()
            assert (logprobs.detach() - expected)[keep].abs().max() < tolerance
            assert (entropy - entropies)[keep].abs().max() < 10 * tolerance
            got = gradients(trained, (logprobs * weight)[keep].sum())
            for name in wanted:
                error = (got[name] - wanted[name]).norm() / wanted[name].norm()
                assert error < 10 * tolerance, (name, checkpointing, float(error))


@pytest.mark.parametrize(
    "scores", [1, 150, 500, 10**6]
)  # a response, several, a prompt, all at a time
@pytest.mark.parametrize("padding", [False, True])
def test_attention_of_branches_equals_softmax_over_prompt_and_past(scores, padding, monkeypatch):
    monkeypatch.setattr(shared_prefix.pieces, "__defaults__", (scores,))
    torch.manual_seed(0)
    prompts, kv, group, share, steps, length, depth = 2, 2, 3, 2, 5, 7, 4
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    query = draw(prompts * group, kv * share, steps, depth)
    key, value = draw(prompts * group, kv, steps, depth), draw(prompts * group, kv, steps, depth)
    layer = shared_prefix.PromptKV()
    layer.update(draw(prompts, kv, length, depth), draw(prompts, kv, length, depth))
    mask = torch.ones(prompts, length, dtype=torch.long)
    mask[0, : 3 * padding] = 0
    cache = shared_prefix.BranchCache([layer], group, mask, copies=False)
    out = cache.layers[0].attend(cache, query, key, value, 0.3)
    expected = torch.empty_like(out)
    for n in range(prompts * group):
        real = mask[n // group].bool()
        for h in range(kv * share):
            for t in range(steps):
                keys, values = (
                    torch.cat([past[n // group, h // share][real], own[n, h // share, : t + 1]])
                    for past, own in ((layer.keys, key), (layer.values, value))
                )
                expected[n, t, h] = (0.3 * keys @ query[n, h, t]).softmax(0) @ values
    torch.testing.assert_close(out, expected)
    weight, inputs = torch.randn_like(out), (query, key, value, layer.keys, layer.values)
    for got, wanted in zip(
        *(torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    ):
        torch.testing.assert_close(got, wanted)


def test_the_last_layer_of_a_prompt_runs_for_its_last_token_and_keeps_the_keys_of_all(
    tokenizer, samples
):
    model, batch, seen = make_model(tokenizer), data.collate(samples, tokenizer), []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_hook(
            lambda module, inputs, output: seen.append(inputs[0].shape[1])
        )
    layers, logits, _ = shared_prefix.forward_prompts(model, batch, None)
    length = batch["input_ids"].shape[1]
    assert seen == [length] * (len(seen) - 1) + [1] and len(seen) > 1
    pictures = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "points", "regions")}
    stock = model(
        batch["input_ids"],
        batch["attention_mask"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        past_key_values=DynamicCache(),
        **pictures,
    )
    torch.testing.assert_close(logits[:, -1], stock.logits[:, -1])
    real = batch["attention_mask"].bool()  # (B, L)
    for mine, other in zip(layers, stock.past_key_values.layers, strict=True):
        for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
            torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real])


def test_in_bf16_the_sampler_is_near_the_scorer_since_its_scores_are_float32(
    tokenizer, samples, banned, monkeypatch
):
    """The mean distance of log-probabilities, per token, at large norms of queries and keys."""

    def mismatch(seed):
        model = make_model(tokenizer, seed, torch.float32)
        for layer in model.model.language_model.layers:
            torch.nn.init.constant_(layer.self_attn.q_norm.weight, 4)
            torch.nn.init.constant_(layer.self_attn.k_norm.weight, 4)
        model.bfloat16()
        prompts = data.collate(samples, tokenizer)
        generator = torch.Generator().manual_seed(seed)
        tokens, mask, sampled, features = rollout(
            model, prompts, 8, 24, NEVER, banned, 1.0, generator
        )
        model.gradient_checkpointing_enable({"use_reentrant": False})  # then by stock attention
        with torch.no_grad():
            scored, _ = token_logprobs(model.train(), prompts, features, tokens, mask, banned)
        return (scored - sampled).abs().mean().item()

    kept = [mismatch(seed) for seed in range(3)]
    monkeypatch.setattr(shared_prefix, "float32_product", lambda a, b: (a @ b).float())
    rounded = [mismatch(seed) for seed in range(3)]
    print(f"float32 scores {np.mean(kept):.4f}, scores rounded to bf16 {np.mean(rounded):.4f}")
    assert np.mean(kept) < 0.6 * np.mean(rounded)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_T28_scoring_runs_as_many_passes_for_responses_of_one_token(
    length, tokenizer, samples, banned
):
    model, calls = make_model(tokenizer), []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    tokens, mask, _ = responses(tokenizer, 0, len(samples), length)
    logprobs, entropy = token_logprobs(
        model, data.collate(samples, tokenizer), None, tokens, mask, banned
    )
    assert (
        len(calls) == 2 and logprobs.shape == entropy.shape == tokens.shape
    )  # else ranks wait for ever
    (logprobs * mask).sum().backward()
    for n, sample in enumerate(samples):
        expected, _ = one_by_one(model, sample, tokens[n, : mask[n].sum()], tokenizer, banned)
        torch.testing.assert_close(logprobs[n][mask[n].bool()], expected, rtol=0, atol=1e-9)
    assert not logprobs[mask == 0].any() and not entropy[mask == 0].any()


def test_positions_are_those_of_the_stock_model(tokenizer):
    model, random = make_model(tokenizer), np.random.default_rng(0)
    merge = model.config.vision_config.spatial_merge_size
    pad, text = model.config.image_token_id, 100
    for _ in range(50):
        ids, grids = [], []
        for _ in range(random.integers(0, 4)):  # images, with no or some text in front
            rows, columns = random.integers(1, 6, size=2).tolist()
            grids.append((rows * merge, columns * merge))
            # Between two images there always is the mark of an image's start.
            ids += [text] * int(random.integers(1, 5)) + [pad] * (rows * columns)
        ids += [text] * int(random.integers(1, 9))
        is_image = torch.tensor(ids) == pad
        grid = torch.tensor([(1, *grid) for grid in grids]) if grids else None
        row = torch.tensor([ids])
        stock, after = model.positions(row, torch.ones_like(row), is_image[None].long(), grid)
        ours = mrope_positions(is_image, grids, merge)
        assert torch.equal(ours, stock[:, 0])
        assert int(ours.max()) + 1 == int(after)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_the_head_in_slices_scores_as_a_log_softmax_does(rows_at_once, with_entropy, monkeypatch):
    rows, width, vocabulary, per_row, temperature = 11, 8, 40, 3, 0.7
    monkeypatch.setattr(head, "SLICE", rows_at_once * vocabulary)
    monkeypatch.setattr(head, "PIECE", 2 * vocabulary)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True)
    banned = torch.tensor([3, 17])
    tokens = torch.randint(18, vocabulary, (rows, per_row))
    tokens[:, 1] = tokens[:, 0]  # two responses that begin alike
    slope = torch.randn(rows, per_row, dtype=torch.float64)

    def plain():
        logits = (hidden @ weight.T / temperature).index_fill(-1, banned, -math.inf)
        scores = logits.log_softmax(-1)
        entropy = -(scores.exp() * scores.clamp_min(-1e9)).sum(-1)
        return scores.gather(1, tokens), entropy * with_entropy

    def sliced():
        return head.score_tokens(hidden, weight, tokens, banned, temperature, with_entropy)

    for got, wanted in zip(sliced(), plain()):
        torch.testing.assert_close(got, wanted)
    of_both = []
    for function in (sliced, plain):
        of_both.append(torch.autograd.grad((function()[0] * slope).sum(), (hidden, weight)))
    for got, wanted in zip(*of_both):
        torch.testing.assert_close(got, wanted)


def test_scoring_holds_a_slice_of_rows_as_wide_as_the_vocabulary(
    tokenizer, samples, banned, monkeypatch
):
    model = make_model(tokenizer, 0, torch.float32)
    tokens, mask, _ = responses(tokenizer, 0, 2 * len(samples), 9)
    width = model.config.text_config.vocab_size
    monkeypatch.setattr(head, "SLICE", 8 * width)
    rows = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (width,) and out.dim() == 2:
                weight = out.shape[0] == model.lm_head.weight.shape[1]  # its transpose
                rows.append(0 if weight else out.shape[0])
            return out

    with Watch():
        logprobs, _ = token_logprobs(
            model, data.collate(samples, tokenizer), None, tokens, mask, banned
        )
        logprobs.sum().backward()
    assert max(rows) == 8 < int(mask.sum())


def test_T26_entropy_of_uniform_logits_is_the_log_of_the_number_of_allowed_tokens(
    tokenizer, samples, banned
):
    model = make_model(tokenizer)
    torch.nn.init.zeros_(model.model.language_model.norm.weight)
    tokens, mask, _ = responses(tokenizer, 0, len(samples), 5)
    logprobs, entropy = token_logprobs(
        model, data.collate(samples, tokenizer), None, tokens, mask, banned
    )
    size = math.log(model.config.text_config.vocab_size - len(banned))
    torch.testing.assert_close(entropy, size * mask.double())
    torch.testing.assert_close(logprobs.detach(), -size * mask.double())


def test_features_of_some_prompts_are_those_of_a_batch_of_these_prompts(exact, samples, tokenizer):
    with torch.no_grad():
        keys = ("pixel_values", "image_grid_thw", "points", "regions")
        batch = data.collate(samples, tokenizer)
        together = exact.encode_images(*(batch[k] for k in keys))
        of_prompts = split_features(together, batch["input_ids"], exact.config)
        assert [len(one["regions"]) for one in of_prompts] == [2, 0, 1, 3]
        picked = join_features([of_prompts[i] for i in (3, 0, 1)])
        alone = exact.encode_images(
            *(data.collate([samples[i] for i in (3, 0, 1)], tokenizer)[k] for k in keys)
        )
    flat = lambda features: [
        *features["merged"],
        *(image for level in features["deepstack"] for image in level),
        features["regions"],
    ]
    assert len(flat(picked)) == len(flat(alone)) == 3 + 2 * 3 + 1
    for a, b in zip(flat(picked), flat(alone)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
