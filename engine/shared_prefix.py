"""Key-value caches in which a prompt is computed once for all of its responses, in training and in sampling.

training    PromptKV remembers the prompt's keys and values, BranchKV shows them to its G responses, with gradient.
sampling    DecodeKV keeps the prompt's keys and values once and each response's own beside them.

Both multiply the queries of the whole group with the prompt's keys: they are read once a group, not once a response,
and never copied. Stock attention needs copies, one for each response and each query head. In training its kernels are
worth that on CUDA; and with activation checkpointing, whose second pass calls stock attention.

Of the prompt's last layer only the keys and values are needed, and the rest for the last token: LastLayer.

Dimensions: B prompts, G responses per prompt, N = B G, L prompt tokens, T response tokens, H heads, K key-value heads,
D head width.
"""

import contextlib
import math

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from model import allowed_logits, choose_tokens, encode_prompts, float_of


@torch.no_grad()
def rollout(
    model, prompts, group, max_new_tokens, stop_ids, banned, temperature=1.0, generator=None
):
    """Sample `group` responses a prompt (temperature 0: greedy): vision tower once an image, prompt once a group.

    prompts: a collated batch, left-padded. banned: token ids that are never sampled (image pads, `<mask>`).
    -> tokens (B*G, T), mask (B*G, T) 1 = sampled, up to and including the stop token, logprobs (B*G, T), features.
    The rows of a prompt are neighbours. A row whose last mask is 1 and that holds no stop id at its end was cut off.
    """
    model.eval()  # in train mode checkpointing layers drop the cache
    features = encode_prompts(model, prompts)
    layers, logits, position = forward_prompts(model, prompts, features)
    cache = DecodeCache(layers, group, max_new_tokens, prompts["attention_mask"])
    position, logits = (
        position.repeat_interleave(group, 0),
        logits[:, -1].repeat_interleave(group, 0),
    )
    rows = torch.arange(len(logits), device=logits.device)  # which responses the batch still holds
    alive = torch.ones_like(rows, dtype=torch.bool)
    tokens = position.new_zeros(len(rows), max_new_tokens)
    mask, logprobs = torch.zeros_like(tokens), torch.zeros(tokens.shape, device=tokens.device)
    with (
        torch.inference_mode(),
        sharing(model),
    ):  # saves time; not above: training goes on with features
        for t in range(max_new_tokens):
            scores = allowed_logits(logits, banned, temperature or 1.0).log_softmax(-1)  # (rows, V)
            new = choose_tokens(scores, temperature, generator)
            picked = scores.gather(1, new[:, None])[:, 0].float()
            tokens[rows, t], mask[rows, t], logprobs[rows, t] = (
                new * alive,
                alive.long(),
                picked * alive,
            )
            alive = alive & ~torch.isin(new, stop_ids)
            left = int(alive.sum())
            if t + 1 == max_new_tokens or not left:
                break
            if left < 0.8 * len(rows):  # finished rows cost as much as others; dropping copies
                cache.keep_rows(alive)
                rows, new, position, alive = (x[alive] for x in (rows, new, position, alive))
            out = model(
                new[:, None],
                None,
                position.expand(3, -1, -1),
                past_key_values=cache,
                text_only=True,
                cache=cache,
            )
            logits, position = out.logits[:, -1], position + 1
    length = int(mask.sum(1).max())
    return tokens[:, :length], mask[:, :length], logprobs[:, :length], features


class TokenScores(torch.autograd.Function):
    """logits (N, V), tokens (N,) -> log-probabilities and entropies (N,), in float32, a slice of rows at a time.

    The gradient is written over the logits: no second tensor of that size, the biggest of the step, is ever made.
    """

    @staticmethod
    def forward(ctx, logits, tokens, banned, temperature):
        logprobs, norm, entropy = torch.empty(
            3, len(tokens), device=logits.device, dtype=float_of(logits)
        ).unbind()
        for part in slices(logits):
            scores = allowed_logits(logits[part], banned, temperature)
            norm[part] = scores.logsumexp(-1)
            logprobs[part] = scores.gather(1, tokens[part, None])[:, 0] - norm[part]
            mean = (
                (scores - norm[part, None]).exp() * scores.clamp_min(torch.finfo(scores.dtype).min)
            ).sum(-1)
            entropy[part] = norm[part] - mean  # 0 x -inf would be NaN, hence the clamp
        ctx.save_for_backward(logits, tokens, banned, norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, slope, _):
        logits, tokens, banned, norm = ctx.saved_tensors
        for part in slices(logits):  # d log p(token) / d logit = (1 if token) - p
            scores = allowed_logits(logits[part], banned, ctx.temperature)
            scores = scores.sub_(norm[part, None]).exp_().mul_(-slope[part, None])
            logits[part] = scores.scatter_add_(1, tokens[part, None], slope[part, None]).div_(
                ctx.temperature
            )
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
    scores = TokenScores.apply(
        first[:, -1].repeat_interleave(group, 0), tokens[:, 0], banned, temperature
    )
    steps = max(1, tokens.shape[1] - 1)  # never no pass: ranks must run as many, or they hang
    here = nn.functional.pad(mask, (0, 1))[:, 1 : steps + 1].bool()  # (B*G, steps), 1 = wanted
    position = position.repeat_interleave(group, 0) + torch.arange(steps, device=tokens.device)
    copies = tokens.is_cuda or getattr(model.model.language_model, "gradient_checkpointing", False)
    cache = BranchCache(layers, group, prompts["attention_mask"], copies)
    seen = (
        torch.cat([prompts["attention_mask"].repeat_interleave(group, 0), mask[:, :steps]], 1)
        if copies
        else None
    )
    with contextlib.nullcontext() if copies else sharing(model):
        logits = model(
            tokens[:, :steps],
            seen,
            position.expand(3, -1, -1),
            text_only=True,
            logits_to_keep=here,
            past_key_values=cache,
            **({} if copies else {"cache": cache}),
        ).logits
    rest = TokenScores.apply(
        logits, tokens[:, 1:][here[:, : tokens.shape[1] - 1]], banned, temperature
    )
    spread = (
        one.new_zeros(here.shape).masked_scatter(here, one) for one in rest
    )  # back to (B*G, steps)
    return tuple(
        torch.cat([one[:, None], more], 1)[:, : tokens.shape[1]]
        for one, more in zip(scores, spread)
    )


class PromptKV(DynamicLayer):
    """Remembers the prompt's keys and values. Writing twice is harmless: activation checkpointing may replay it."""

    before = None  # keys and values of the tokens in front of those to come

    def update(self, keys, values, *args, **kwargs):
        if self.before:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.before, (keys, values)))
            self.before = None
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class PromptCache(Cache):
    """The caches of all layers for prompts, of which only the last token's output will be looked at."""

    def __init__(self, layers):
        super().__init__(layers=[PromptKV() for _ in range(layers)])


class LastTokenOnly:
    """A decoder layer that, into a PromptCache, writes all keys and values and computes the last token only.

    (B, L, width), 0 for all other tokens. Mixed into the class of a model's last layer by `prepare`.

    Saves four fifths of the layer, and its attention: in a model of three layers about a quarter of the prompt.
    """

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        if not isinstance(past_key_values, PromptCache):
            return super().forward(
                hidden_states,
                position_embeddings,
                attention_mask,
                position_ids,
                past_key_values,
                **kwargs,
            )
        attention, length = self.self_attn, hidden_states.shape[1]
        rest = self.input_layernorm(hidden_states[:, :-1])
        heads = (*rest.shape[:2], -1, attention.head_dim)
        keys = attention.k_norm(attention.k_proj(rest).view(heads)).transpose(
            1, 2
        )  # (B, K, L - 1, D)
        values = attention.v_proj(rest).view(heads).transpose(1, 2)
        _, keys = apply_rotary_pos_emb(
            keys[:, :0], keys, *(angle[:, :-1] for angle in position_embeddings)
        )
        past_key_values.layers[attention.layer_idx].before = keys, values
        if attention_mask is not None and attention_mask.dim() == 4:  # else (B, L), flash-attn's
            attention_mask = attention_mask[:, :, -1:]
        last = super().forward(
            hidden_states[:, -1:],
            tuple(angle[:, -1:] for angle in position_embeddings),
            attention_mask,
            None if position_ids is None else position_ids[..., -1:],
            past_key_values,
            **kwargs,
        )
        return torch.nn.functional.pad(last, (0, 0, length - 1, 0))


class BranchKV(DynamicLayer):
    """A prompt's keys and values (B, K, L, D), read-only for its G responses; gradients flow back into the prompt."""

    def __init__(self, prompt, group, copies):
        super().__init__()
        self.keys, self.values, self.is_initialized = prompt.keys, prompt.values, True
        self.group, self.copies = group, copies

    def update(self, keys, values, *args, **kwargs):
        if not self.copies:
            return keys, values  # `attend` finds the prompt's by itself
        return tuple(
            torch.cat([prompt[:, None].expand(-1, self.group, -1, -1, -1).flatten(0, 1), new], 2)
            for prompt, new in ((self.keys, keys), (self.values, values))
        )  # a layer at a time

    def attend(self, hidden, query, key, value, scaling):
        """Attention of whole responses: query (N, H, T, D), key and value (N, K, T, D) -> (N, T, H, D)"""
        prompts, kv, _, depth = self.keys.shape
        count, heads, length, _ = query.shape
        own = (
            x.view(prompts, self.group, kv, -1, length, depth)
            .transpose(1, 2)
            .reshape(prompts * kv, self.group, -1, depth)
            for x in (query * scaling, key, value)
        )  # heads of the same keys
        out = BranchAttention.apply(
            *own, self.keys.flatten(0, 1), self.values.flatten(0, 1), hidden
        )
        out = out.view(prompts, kv, self.group, heads // kv, length, depth)
        return out.permute(0, 2, 4, 1, 3, 5).reshape(count, length, heads, depth)


class BranchAttention(torch.autograd.Function):
    """softmax([far, near]) [values of the prompt, own values]; far: query . the prompt's keys, near: own keys, causal.

    A piece at a time, whose scores stay in the processor's cache, and again in the backward pass: only their logsumexp
    is kept. query (P, G, M, D) with P = B K and M = H/K T; key, value (P, G, T, D); the prompt's (P, L, D).
    """

    @staticmethod
    def forward(ctx, query, key, value, prompt_key, prompt_value, hidden):
        out, norm = torch.empty_like(query), query.new_empty(*query.shape[:-1], 1)
        parts, (room,) = pieces(query, prompt_key, 1)
        later = later_tokens(query, key)
        for p, i in parts:
            far, near = branch_scores(query[i], key[i], prompt_key[p], hidden, later, p, room)
            top = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
            far, near = far.sub_(top).exp_(), near.sub_(top).exp_()
            mass = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
            out[i] = (through(far, prompt_value[p]) + near @ value[i]).div_(mass)
            norm[i] = mass.log_().add_(top)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, hidden, out, norm)
        return out

    @staticmethod
    def backward(ctx, slope):
        query, key, value, prompt_key, prompt_value, hidden, out, norm = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        d_keys, d_values = (
            torch.zeros_like(x.mT) for x in (prompt_key, prompt_value)
        )  # (P, D, L), faster so
        parts, (room, more) = pieces(query, prompt_key, 2)
        later = later_tokens(query, key)
        for p, i in parts:
            far, near = branch_scores(query[i], key[i], prompt_key[p], hidden, later, p, room)
            far, near = far.sub_(norm[i]).exp_(), near.sub_(norm[i]).exp_()  # weights
            d_values[p] += slope[i].flatten(1, 2).mT @ far.flatten(1, 2)
            d_value[i] = near.mT @ slope[i]
            mean = (slope[i] * out[i]).sum(-1, keepdim=True)
            far = (
                through(slope[i], prompt_value[p].mT, more).sub_(mean).mul_(far)
            )  # gradients of the scores
            near = (slope[i] @ value[i].mT).sub_(mean).mul_(near)
            d_query[i] = through(far, prompt_key[p]) + near @ key[i]
            d_keys[p] += query[i].flatten(1, 2).mT @ far.flatten(1, 2)
            d_key[i] = near.mT @ query[i]
        return d_query, d_key, d_value, d_keys.mT, d_values.mT, None


def pieces(query, prompt_key, rooms, scores=2**19):
    """-> [(slice of P, slices of P and G), ..] of about so many scores each, few enough for a cache and many enough for
    a product; and this many rooms for the scores: memory that is new each time would take longer than the product."""
    one = query.shape[2] * prompt_key.shape[1]  # of a response
    group = min(max(1, scores // one), query.shape[1])
    prompts = min(max(1, scores // (one * query.shape[1])), len(query))
    parts = [
        (slice(p, p + prompts), (slice(p, p + prompts), slice(g, g + group)))
        for p in range(0, len(query), prompts)
        for g in range(0, query.shape[1], group)
    ]
    return parts, query.new_empty(rooms, prompts * group * one)


def through(x, matrix, room=None):
    """x (P, G, M, .) @ matrix (P, ., .): one product for all responses to a prompt, written into `room`."""
    shape = len(x), x.shape[1] * x.shape[2], matrix.shape[-1]
    out = None if room is None else room[: math.prod(shape)].view(shape)
    return torch.bmm(x.flatten(1, 2), matrix, out=out).view(*x.shape[:-1], -1)


def branch_scores(query, key, prompt_key, hidden, later, p, room):
    """Scores of some responses: far (P, G, M, L), in `room`, and near (P, G, M, T)."""
    far, near = through(query, prompt_key.mT, room), query @ key.mT
    if hidden is not None:
        far += hidden[p]
    return far, near.masked_fill_(later, -torch.inf)


def later_tokens(query, key):
    """(M, T) of the queries' heads and tokens: which keys of a response are behind the query's own token."""
    later = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu_(1)
    return later.repeat(query.shape[2] // len(later), 1)


class DecodeKV(DynamicLayer):
    """A prompt's keys and values (B, K, L, D), and each response's own (B, K, width, room, D), written in place.

    width: the most responses that a prompt still has; the others of a prompt are holes, computed and not looked at.
    """

    def __init__(self, prompt, group, room):
        super().__init__()
        self.prompt = [
            prompt.keys.contiguous(),
            prompt.values.contiguous(),
        ]  # else products copy them,
        prompt.keys, prompt.values = self.prompt  # each token anew; held only once
        self.keys, self.values, self.is_initialized, self.length = (
            *self.prompt,
            True,
            0,
        )  # for the cache's own eyes
        prompts, kv, _, depth = prompt.keys.shape
        self.own = [prompt.keys.new_zeros(prompts, kv, group, room, depth) for _ in range(2)]

    def update(self, keys, values, *args, **kwargs):
        return keys, values  # one token (rows, K, 1, D): attend takes it from here

    def attend(self, where, query, key, value, scaling):
        """Attention of one token a response: query (rows, H, 1, D), key and value (rows, K, 1, D) -> (rows, 1, H, D)"""
        rows, heads, _, depth = query.shape
        prompts, kv, length, _ = self.prompt[0].shape
        for own, new in zip(self.own, (key, value)):
            own[..., self.length, :] = where.spread(new[:, :, 0])
        self.length += 1
        wide = where.spread(
            (query * scaling).view(rows, kv, heads // kv, depth)
        )  # (B, K, width, H/K, D)
        keys, values = (own[..., : self.length, :] for own in self.own)
        far = (wide.flatten(2, 3) @ self.prompt[0].mT).view(
            *wide.shape[:4], length
        )  # (B, K, width, H/K, L)
        if where.hidden is not None:
            far = far + where.hidden
        exact = torch.promote_types(query.dtype, torch.float32)
        weights = torch.cat([far, wide @ keys.mT], -1).softmax(-1, exact).to(query.dtype)
        out = (weights[..., :length].flatten(2, 3) @ self.prompt[1]).view_as(wide) + weights[
            ..., length:
        ] @ values
        return where.collect(out).reshape(rows, 1, heads, depth)

    def keep(self, prompts, old, new):
        """Keep these prompts, and move their responses from the places old (prompt, slot) to the places `new`."""
        if len(prompts) < len(self.prompt[0]):
            self.prompt = [x[prompts] for x in self.prompt]
        self.own = [new.spread(own[old[0], :, old[1]]).contiguous() for own in self.own]


class Places:
    """Where each response, a row of the batch, stands in a DecodeKV: its prompt (rows,), ascending, and its slot there.

    hidden: (B, 1, 1, 1, L), -inf at the padding of the prompts, or None.
    """

    def __init__(self, prompt, hidden):
        count = torch.bincount(prompt)
        self.prompt, self.hidden, self.shape = (
            prompt,
            hidden,
            (len(count), int(count.max())),
        )  # B, width
        self.slot = (
            torch.arange(len(prompt), device=prompt.device) - (count.cumsum(0) - count)[prompt]
        )
        self.holes = len(prompt) < math.prod(
            self.shape
        )  # without any no index is needed, only another view

    def spread(self, x):
        """Rows (rows, K, ..) -> at their places (B, K, width, ..), 0 in the holes."""
        if not self.holes:
            return x.unflatten(0, self.shape).transpose(1, 2)
        wide = x.new_zeros(self.shape[0], x.shape[1], self.shape[1], *x.shape[2:])
        wide[self.prompt, :, self.slot] = x
        return wide

    def collect(self, x):
        """The way back, to the rows."""
        return x[self.prompt, :, self.slot] if self.holes else x.transpose(1, 2).flatten(0, 1)


class BranchCache(Cache):
    """The caches of all layers for whole responses. `attention_mask` (B, L): of the prompts."""

    def __init__(self, layers, group, attention_mask, copies):
        super().__init__(layers=[BranchKV(layer, group, copies) for layer in layers])
        hidden = hide_padding(attention_mask, layers[0].keys.dtype)
        self.where = (
            hidden
            if hidden is None
            else hidden.repeat_interleave(layers[0].keys.shape[1], 0)[:, None, None]
        )


class DecodeCache(Cache):
    """The caches of all layers while responses are sampled. `attention_mask` (B, L): of the prompts."""

    def __init__(self, layers, group, room, attention_mask):
        super().__init__(layers=[DecodeKV(layer, group, room) for layer in layers])
        hidden = hide_padding(attention_mask, layers[0].keys.dtype)
        prompt = torch.arange(len(attention_mask), device=attention_mask.device).repeat_interleave(
            group
        )
        self.where = Places(prompt, hidden if hidden is None else hidden[:, None, None, None])

    def keep_rows(self, alive):
        """Drop responses that have ended; alive (rows,), 1 = goes on."""
        old, hidden = (self.where.prompt[alive], self.where.slot[alive]), self.where.hidden
        prompts, number = old[0].unique(return_inverse=True)
        self.where = Places(number, hidden if hidden is None else hidden[prompts])
        for layer in self.layers:
            layer.keep(prompts, old, self.where)


def hide_padding(attention_mask, dtype):
    """-> (B, L), -inf at the padding of the prompts, else 0; None if there is none."""
    if attention_mask.all():
        return None
    return torch.zeros_like(attention_mask, dtype=dtype).masked_fill_(
        attention_mask == 0, -torch.inf
    )


def shared_attention(module, query, key, value, attention_mask, scaling, cache, **kwargs):
    """What transformers calls for each layer inside `sharing`."""
    return cache.layers[module.layer_idx].attend(cache.where, query, key, value, scaling), None


AttentionInterface.register("shared_prompt", shared_attention)


@contextlib.contextmanager
def sharing(model):
    """Inside, the language model attends through a BranchCache or DecodeCache, passed to its forward as `cache`."""
    config = model.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, "shared_prompt"
    try:
        yield
    finally:
        config._attn_implementation = before


def forward_prompts(model, prompts, features):
    """Prompts once -> (keys and values per layer, logits (B, 1, V) after the last token, next positions (B, 1))."""
    layers = model.model.language_model.layers
    for layer in layers:  # else checkpointing layers silently drop the cache
        layer._can_checkpoint_with_cache = True
    if not isinstance(layers[-1], LastTokenOnly):
        stock = type(layers[-1])
        layers[-1].__class__ = type(f"LastTokenOnly{stock.__name__}", (LastTokenOnly, stock), {})
    cache = PromptCache(len(layers))
    positions, after = model.positions(
        prompts["input_ids"],
        prompts["attention_mask"],
        prompts["mm_token_type_ids"],
        prompts["image_grid_thw"],
    )
    images = (
        {}
        if features
        else {k: prompts[k] for k in ("pixel_values", "image_grid_thw", "points", "regions")}
    )
    out = model(
        prompts["input_ids"],
        prompts["attention_mask"],
        positions,
        past_key_values=cache,
        features=features,
        logits_to_keep=1,
        **images,
    )
    return cache.layers, out.logits, after
