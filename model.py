"""The region-token model: stock Qwen3-VL + 3D position embedding + region tokens; sampling and scoring of responses.

    depth -> point map -> sin/cos of xyz, averaged over each patch -> MLP -> + vision features (3D position embedding)
    region mask -> mask-weighted mean of those features -> Linear -> embedding of a `<mask>` token (region token)

Differences from the paper's release (method: SR-REAL, arXiv 2606.17539):
1. True unprojection with intrinsics, in metres; no depth = no embedding. (There: relative depth, no intrinsics.)
2. Region masks are area-averaged onto the patch grid, so a thin mask keeps its weight. (There: it can vanish.)
3. A prompt is computed once for its whole group of responses, in `rollout` and in `token_logprobs`.

Dimensions: B prompts, G responses per prompt, T response tokens, L prompt tokens, R regions, P patches, D width.
"""
import contextlib
import math

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

from prefix import BranchCache, DecodeCache, LastLayer, forward_prompts, sharing

UNIT = 4.0                                                  # metres: brings rooms to the paper's range, about -1 to 1
BANDS = 8                                                   # sin, cos of 2^k x, k = 0..7: wavelengths 25 m to 0.2 m
POINT_DIM = 3 * (1 + 2 * BANDS)                             # x itself, sines, cosines, for each of the 3 coordinates

# ---------------------------------------------------------------------------------------------------------------------
# geometry (pure functions)


def point_map(depth, intrinsics):
    """Unproject a depth map: camera coordinates of every pixel, metres, x right, y down, z forward.

    depth (H, W) metres, NaN = none there; intrinsics (fx, fy, cx, cy) pixels -> (3, H, W).
    """
    fx, fy, cx, cy = intrinsics
    h, w = depth.shape
    u = torch.arange(w, dtype=torch.float32) + 0.5          # pixel centres
    v = torch.arange(h, dtype=torch.float32) + 0.5
    return torch.stack([(u - cx) / fx * depth, (v[:, None] - cy) / fy * depth, depth])


def encode_points(xyz):
    """[x, sin(2^k x), cos(2^k x)] of each coordinate, x in UNITs: (3, H, W) -> (POINT_DIM, H, W). NaN stays NaN."""
    xyz = xyz / UNIT
    angle = xyz[:, None] * 2.0 ** torch.arange(BANDS).view(1, -1, 1, 1)                      # (3, BANDS, H, W)
    return torch.cat([xyz[:, None], angle.sin(), angle.cos()], 1).flatten(0, 1)


def to_patches(maps, grid, merge):
    """Area-average pixel maps onto the vision patches, in the order of Qwen3-VL (merge x merge blocks).

    maps (C, H, W), NaN = no value there (left out of the mean); grid (rows, columns) of patches -> (P, C), NaN where a
    patch holds no value at all. Encode first and average then: averaging xyz first triples the error of the centres.
    """
    known = maps[:1].isfinite().float()
    total = nn.functional.adaptive_avg_pool2d(maps.nan_to_num(), grid)
    mean = total / nn.functional.adaptive_avg_pool2d(known, grid)                             # 0 / 0 = NaN
    rows, columns = grid
    blocks = mean.view(-1, rows // merge, merge, columns // merge, merge)
    return blocks.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


def region_weights(masks, grid, merge):
    """Masks (R, H, W), 1 = inside -> (R, P) weights over the patches, each row sums to 1."""
    weights = to_patches(masks, grid, merge).T
    return weights / weights.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# the patch of the stock model


class PointEmbedding(nn.Module):
    """Patch-averaged encoding of 3D points (P, POINT_DIM) -> (P, D); 0 where a patch has no depth (NaN)."""

    def __init__(self, width):
        super().__init__()
        hidden = 3 * width
        self.fc1, self.norm, self.fc2 = nn.Linear(POINT_DIM, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)
        self.fc2.zero_init = True                           # training starts from the stock model's features

    def forward(self, points):
        seen = points.isfinite().all(-1, keepdim=True)
        hidden = self.fc1(points.nan_to_num().to(self.fc1.weight.dtype))
        return self.fc2(nn.functional.gelu(self.norm(hidden))) * seen


class RegionVLM(Qwen3VLForConditionalGeneration):
    """Stock Qwen3-VL with `points` and `regions`; without them bit-identical to it. See `encode_images`."""

    def __init__(self, config):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.point_embed = PointEmbedding(width)
        self.region_proj = nn.Linear(width, config.text_config.hidden_size)
        self.model.language_model.layers[-1].__class__ = LastLayer
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "zero_init", False):             # set on the leaf: transformers skips custom containers
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def encode_images(self, pixel_values, image_grid_thw, points=None, regions=None):
        """Vision tower once: everything that the language model takes from the images.

        points (P, POINT_DIM) over the patches of all images; regions (R, P), one row per `<mask>` in text order.
        -> {"merged": one (tokens, D) an image, "deepstack": one such list a level, "regions": (R, D) or None}
        """
        tower = self.model.visual
        vision = tower(pixel_values.type(tower.dtype), grid_thw=image_grid_thw, return_dict=True)
        features, merged = vision.last_hidden_state, vision.pooler_output                    # (P, vision width)
        if points is not None:
            features = features + self.point_embed(points)
            merged = tower.merger(features)
        sizes = (image_grid_thw.prod(-1) // tower.spatial_merge_unit).tolist()
        tokens = None if regions is None else self.region_proj(regions.to(features.dtype) @ features)
        return {"merged": list(merged.split(sizes)), "regions": tokens,
                "deepstack": [list(level.split(sizes)) for level in vision.deepstack_features]}

    def positions(self, input_ids, attention_mask, mm_token_type_ids, image_grid_thw):
        """M-RoPE positions (3, B, L) of the prompts, and the position of the token after each (B, 1)."""
        positions, delta = self.model.get_rope_index(input_ids, mm_token_type_ids, image_grid_thw,
                                                     attention_mask=attention_mask)
        return positions, attention_mask.sum(1, keepdim=True) + delta

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, pixel_values=None,
                image_grid_thw=None, mm_token_type_ids=None, points=None, regions=None, features=None, logits_to_keep=0,
                cache=None, **kwargs):
        """The stock forward; with `points`, `regions` or the `features` of `encode_images`, the patched one.

        features {}: no pictures, those of the prompt are in the cache. logits_to_keep: the last so many positions, or
        a mask (B, L), 1 = wanted -> logits (wanted, V). cache: what to attend through inside `sharing` (prefix.py).
        """
        if points is None and regions is None and features is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                                   past_key_values=past_key_values, pixel_values=pixel_values,
                                   image_grid_thw=image_grid_thw, mm_token_type_ids=mm_token_type_ids,
                                   logits_to_keep=logits_to_keep, **kwargs)
        if features is None:
            # not self.encode_images: run.shard makes that a forward of FSDP's own, and this is inside one
            features = RegionVLM.encode_images(self, pixel_values, image_grid_thw, points, regions)
        if position_ids is None:
            position_ids, _ = self.positions(input_ids, attention_mask, mm_token_type_ids, image_grid_thw)
        embeds, pictures = self.get_input_embeddings()(input_ids), {}                        # (B, L, D)
        if features:
            is_image = input_ids == self.config.image_token_id                               # (B, L), 1 = image token
            embeds = fill(embeds, is_image, torch.cat(features["merged"]), "image tokens")
            pictures = {"visual_pos_masks": is_image,
                        "deepstack_visual_embeds": [torch.cat(level) for level in features["deepstack"]]}
        if features and features["regions"] is not None:
            embeds = fill(embeds, input_ids == self.config.region_token_id, features["regions"], "<mask> tokens")
        out = self.model.language_model(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
                                        past_key_values=past_key_values, **pictures,
                                        **({} if cache is None else {"cache": cache}))
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:] if isinstance(logits_to_keep, int)
                              else out.last_hidden_state[logits_to_keep])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


def fill(embeds, here, features, what):
    """Put features (N, D) where `here` (B, L) is 1, in order. masked_scatter alone says nothing when N is too large."""
    if int(here.sum()) != len(features):
        raise ValueError(f"{int(here.sum())} {what} in the text but {len(features)} features for them")
    return embeds.masked_scatter(here[..., None], features.to(embeds.dtype))


def select_features(features, images, regions):
    """The features of some images and regions (lists of their indices), for instance of one prompt of a batch."""
    return {"merged": [features["merged"][i] for i in images], "regions": features["regions"][regions],
            "deepstack": [[level[i] for i in images] for level in features["deepstack"]]}


def join_features(parts):
    """The features of several prompts as those of one batch."""
    return {"merged": sum((p["merged"] for p in parts), []), "regions": torch.cat([p["regions"] for p in parts]),
            "deepstack": [sum(levels, []) for levels in zip(*(p["deepstack"] for p in parts))]}


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: y = W x + scale B (A x), W frozen. With the adapters off the model is the one that training started from


class LoRALinear(nn.Linear):
    """A linear layer that became a low-rank adapter on itself; the names of its own weights do not change."""
    scale, on = 2.0, True                                   # scale: alpha / rank

    def forward(self, x):
        y = super().forward(x)
        return y + self.scale * (x @ self.lora_a.T @ self.lora_b.T) if self.on else y


def add_adapters(model, rank, seed):
    """Adapters on the linear layers of the language model; nothing else is trained. B starts at 0: no change yet."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)         # the same on every rank
    for layer in model.model.language_model.layers.modules():
        if type(layer) is nn.Linear:
            bound = layer.in_features ** -0.5
            a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            layer.__class__, layer.lora_a = LoRALinear, nn.Parameter(a.to(layer.weight.device))  # float32, as the base
            layer.lora_b = nn.Parameter(a.new_zeros(layer.out_features, rank))                   # may be bf16
    return model


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before its adapters: the reference for the KL. Nothing happens to a model without any."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def merge(weights):
    """A state dict without its adapters: W + scale B A in their place."""
    for name in [name for name in weights if name.endswith(".lora_a")]:
        a, b, layer = weights.pop(name), weights.pop(name[:-1] + "b"), name.removesuffix("lora_a") + "weight"
        weights[layer] = weights[layer].to(a.dtype) + LoRALinear.scale * b @ a
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# sampling and scoring


def allowed_logits(logits, banned, temperature):
    """float32 logits / temperature, `banned` token ids at -inf: the one distribution that is sampled *and* scored."""
    return (logits.to(float_of(logits)) / temperature).index_fill_(-1, banned, -math.inf)


def float_of(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.no_grad()
def rollout(model, prompts, group, max_new_tokens, stop_ids, banned, temperature=1.0, generator=None):
    """Sample `group` responses a prompt (temperature 0: greedy): vision tower once an image, prompt once a group.

    prompts: a collated batch, left-padded. banned: token ids that are never sampled (image pads, `<mask>`).
    -> tokens (B*G, T), mask (B*G, T) 1 = sampled, up to and including the stop token, logprobs (B*G, T), features.
    The rows of a prompt are neighbours. A row whose last mask is 1 and that holds no stop id at its end was cut off.
    """
    model.eval()                                            # in train mode checkpointing layers drop the cache
    features = model.encode_images(*(prompts[k] for k in ("pixel_values", "image_grid_thw", "points", "regions")))
    layers, logits, position = forward_prompts(model, prompts, features)
    cache = DecodeCache(layers, group, max_new_tokens, prompts["attention_mask"])
    position, logits = position.repeat_interleave(group, 0), logits[:, -1].repeat_interleave(group, 0)
    rows = torch.arange(len(logits), device=logits.device)  # which responses the batch still holds
    alive = torch.ones_like(rows, dtype=torch.bool)
    tokens = position.new_zeros(len(rows), max_new_tokens)
    mask, logprobs = torch.zeros_like(tokens), torch.zeros(tokens.shape, device=tokens.device)
    with torch.inference_mode(), sharing(model):            # saves time; not above: training goes on with features
        for t in range(max_new_tokens):
            scores = allowed_logits(logits, banned, temperature or 1.0).log_softmax(-1)      # (rows, V)
            if temperature == 0:
                new = scores.argmax(-1)
            else:
                mass = scores.double().exp().cumsum(-1)     # a sixth of the time of torch.multinomial on a CPU
                point = torch.rand(len(mass), 1, dtype=mass.dtype, device=mass.device, generator=generator)
                new = torch.searchsorted(mass, point * mass[:, -1:], right=True)[:, 0]
            picked = scores.gather(1, new[:, None])[:, 0].float()
            tokens[rows, t], mask[rows, t], logprobs[rows, t] = new * alive, alive.long(), picked * alive
            alive = alive & ~torch.isin(new, stop_ids)
            left = int(alive.sum())
            if t + 1 == max_new_tokens or not left:
                break
            if left < 0.8 * len(rows):                      # finished rows cost as much as others; dropping copies
                cache.keep_rows(alive)
                rows, new, position, alive = (x[alive] for x in (rows, new, position, alive))
            out = model(new[:, None], None, position.expand(3, -1, -1), past_key_values=cache, features={},
                        cache=cache)
            logits, position = out.logits[:, -1], position + 1
    length = int(mask.sum(1).max())
    return tokens[:, :length], mask[:, :length], logprobs[:, :length], features


class TokenScores(torch.autograd.Function):
    """logits (N, V), tokens (N,) -> log-probabilities and entropies (N,), in float32, a slice of rows at a time.

    The gradient is written over the logits: no second tensor of that size, the biggest of the step, is ever made.
    """

    @staticmethod
    def forward(ctx, logits, tokens, banned, temperature):
        logprobs, norm, entropy = torch.empty(3, len(tokens), device=logits.device, dtype=float_of(logits)).unbind()
        for part in slices(logits):
            scores = allowed_logits(logits[part], banned, temperature)
            norm[part] = scores.logsumexp(-1)
            logprobs[part] = scores.gather(1, tokens[part, None])[:, 0] - norm[part]
            mean = ((scores - norm[part, None]).exp() * scores.clamp_min(torch.finfo(scores.dtype).min)).sum(-1)
            entropy[part] = norm[part] - mean               # 0 x -inf would be NaN, hence the clamp
        ctx.save_for_backward(logits, tokens, banned, norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, slope, _):
        logits, tokens, banned, norm = ctx.saved_tensors
        for part in slices(logits):                         # d log p(token) / d logit = (1 if token) - p
            scores = allowed_logits(logits[part], banned, ctx.temperature)
            scores = scores.sub_(norm[part, None]).exp_().mul_(-slope[part, None])
            logits[part] = scores.scatter_add_(1, tokens[part, None], slope[part, None]).div_(ctx.temperature)
        return logits, None, None, None


def slices(logits):
    """Rows of logits (N, V) in parts of 32 MB of float32."""
    size = max(1, 2**23 // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def token_logprobs(model, prompts, features, tokens, mask, banned, temperature=1.0):
    """Log-probabilities (B*G, T) of sampled tokens and the entropy (B*G, T) of their distributions, with gradient.

    The prompt is computed once, its keys and values branch to the G responses. Same distribution as in `rollout`.
    0 where mask is 0.
    """
    group = len(tokens) // len(prompts["input_ids"])
    layers, first, position = forward_prompts(model, prompts, features)
    scores = TokenScores.apply(first[:, -1].repeat_interleave(group, 0), tokens[:, 0], banned, temperature)
    steps = max(1, tokens.shape[1] - 1)                     # never no pass: ranks must run as many, or they hang
    here = nn.functional.pad(mask, (0, 1))[:, 1:steps + 1].bool()                            # (B*G, steps), 1 = wanted
    position = position.repeat_interleave(group, 0) + torch.arange(steps, device=tokens.device)
    copies = tokens.is_cuda or getattr(model.model.language_model, "gradient_checkpointing", False)
    cache = BranchCache(layers, group, prompts["attention_mask"], copies)
    seen = torch.cat([prompts["attention_mask"].repeat_interleave(group, 0), mask[:, :steps]], 1) if copies else None
    with contextlib.nullcontext() if copies else sharing(model):
        logits = model(tokens[:, :steps], seen, position.expand(3, -1, -1), features={}, logits_to_keep=here,
                       past_key_values=cache, cache=None if copies else cache).logits
    rest = TokenScores.apply(logits, tokens[:, 1:][here[:, :tokens.shape[1] - 1]], banned, temperature)
    spread = (one.new_zeros(here.shape).masked_scatter(here, one) for one in rest)           # back to (B*G, steps)
    return tuple(torch.cat([one[:, None], more], 1)[:, :tokens.shape[1]] for one, more in zip(scores, spread))
