"""Key-value caches in which a prompt is computed once for all of its responses, in training and in sampling.

training    PromptKV remembers the prompt's keys and values, BranchKV shows them to its G responses, with gradient.
sampling    DecodeKV keeps the prompt's keys and values once and each response's own beside them. A step multiplies the
            queries of the whole group with the prompt's keys: they are read once a group, not once a response, and
            never copied. Stock attention would copy them for each response and each query head, at every token.

Dimensions: B prompts, G responses per prompt, L prompt tokens, H heads, K key-value heads, D head width.
"""
import contextlib

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer


class PromptKV(DynamicLayer):
    """Remembers the prompt's keys and values. Writing twice is harmless: activation checkpointing may replay it."""

    def update(self, keys, values, *args, **kwargs):
        self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class BranchKV(DynamicLayer):
    """A prompt's keys and values seen by its G responses, read-only; gradients flow back into the prompt."""

    def __init__(self, prompt, group):
        super().__init__()
        self.keys, self.values, self.group, self.is_initialized = prompt.keys, prompt.values, group, True

    def update(self, keys, values, *args, **kwargs):        # the wide copies are made here, a layer at a time
        return tuple(torch.cat([prompt[:, None].expand(-1, self.group, -1, -1, -1).flatten(0, 1), new], 2)
                     for prompt, new in ((self.keys, keys), (self.values, values)))


class DecodeKV(DynamicLayer):
    """A prompt's keys and values (B, K, L, D), and each response's own (B, K, width, room, D), written in place.

    width: the most responses that a prompt still has; the others of a prompt are holes, computed and not looked at.
    """

    def __init__(self, prompt, group, room):
        super().__init__()
        self.prompt, self.length = [prompt.keys, prompt.values], 0
        self.keys, self.values, self.is_initialized = prompt.keys, prompt.values, True       # for the cache's own eyes
        prompts, kv, _, depth = prompt.keys.shape
        self.own = [prompt.keys.new_zeros(prompts, kv, group, room, depth) for _ in range(2)]

    def update(self, keys, values, *args, **kwargs):
        return keys, values                                 # one token (rows, K, 1, D): attend takes it from here

    def attend(self, where, query, key, value, scaling):
        """Attention of one token a response: query (rows, H, 1, D), key and value (rows, K, 1, D) -> (rows, 1, H, D)"""
        rows, heads, _, depth = query.shape
        prompts, kv, length, _ = self.prompt[0].shape
        for own, new in zip(self.own, (key, value)):
            own[where.prompt, :, where.slot, self.length] = new[:, :, 0]
        self.length += 1
        wide = query.new_zeros(prompts, kv, where.width, heads // kv, depth)
        wide[where.prompt, :, where.slot] = (query * scaling).view(rows, kv, heads // kv, depth)
        keys, values = (own[..., :self.length, :] for own in self.own)
        far = (wide.flatten(2, 3) @ self.prompt[0].mT).view(*wide.shape[:4], length)         # (B, K, width, H/K, L)
        if where.hidden is not None:
            far = far + where.hidden
        exact = torch.promote_types(query.dtype, torch.float32)
        weights = torch.cat([far, wide @ keys.mT], -1).softmax(-1, exact).to(query.dtype)
        out = (weights[..., :length].flatten(2, 3) @ self.prompt[1]).view_as(wide) + weights[..., length:] @ values
        return out[where.prompt, :, where.slot].reshape(rows, 1, heads, depth)

    def keep(self, prompts, old, new):
        """Keep these prompts, and move their responses from the places old (prompt, slot) to the places `new`."""
        if len(prompts) < len(self.prompt[0]):
            self.prompt = [x[prompts] for x in self.prompt]
        for i, own in enumerate(self.own):
            self.own[i] = own.new_zeros(len(prompts), own.shape[1], new.width, *own.shape[3:])
            self.own[i][new.prompt, :, new.slot] = own[old[0], :, old[1]]


class Places:
    """Where each response, a row of the batch, stands in a DecodeKV: its prompt (rows,), ascending, and its slot there.

    hidden: (B, 1, 1, 1, L), -inf at the padding of the prompts, or None.
    """

    def __init__(self, prompt, hidden):
        count = torch.bincount(prompt)
        self.prompt, self.hidden, self.width = prompt, hidden, int(count.max())
        self.slot = torch.arange(len(prompt), device=prompt.device) - (count.cumsum(0) - count)[prompt]


class DecodeCache(Cache):
    """The caches of all layers while responses are sampled. `attention_mask` (B, L): of the prompts."""

    def __init__(self, layers, group, room, attention_mask):
        super().__init__(layers=[DecodeKV(layer, group, room) for layer in layers])
        hidden = None
        if not attention_mask.all():                        # without padding nothing is to be hidden
            hidden = torch.zeros_like(attention_mask, dtype=layers[0].keys.dtype)
            hidden = hidden.masked_fill(attention_mask == 0, -torch.inf)[:, None, None, None]
        prompt = torch.arange(len(attention_mask), device=attention_mask.device).repeat_interleave(group)
        self.where = Places(prompt, hidden)

    def keep_rows(self, alive):
        """Drop responses that have ended; alive (rows,), 1 = goes on."""
        old, hidden = (self.where.prompt[alive], self.where.slot[alive]), self.where.hidden
        prompts, number = old[0].unique(return_inverse=True)
        self.where = Places(number, hidden if hidden is None else hidden[prompts])
        for layer in self.layers:
            layer.keep(prompts, old, self.where)


def shared_attention(module, query, key, value, attention_mask, scaling, decode, **kwargs):
    """What transformers calls for each layer inside `decoding`."""
    return decode.layers[module.layer_idx].attend(decode.where, query, key, value, scaling), None


AttentionInterface.register("shared_prompt", shared_attention)


@contextlib.contextmanager
def decoding(model):
    """Inside, the language model attends through a DecodeCache, passed to its forward as `decode`."""
    config = model.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, "shared_prompt"
    try:
        yield
    finally:
        config._attn_implementation = before


def forward_prompts(model, prompts, features):
    """Prompts once -> (keys and values per layer, logits (B, 1, V) after the last token, next positions (B, 1))."""
    layers = model.model.language_model.layers
    for layer in layers:                                    # else checkpointing layers silently drop the cache
        layer._can_checkpoint_with_cache = True
    cache = Cache(layers=[PromptKV() for _ in layers])
    positions, after = model.positions(prompts["input_ids"], prompts["attention_mask"], prompts["mm_token_type_ids"],
                                       prompts["image_grid_thw"])
    images = {} if features else {k: prompts[k] for k in ("pixel_values", "image_grid_thw", "points", "regions")}
    out = model(prompts["input_ids"], prompts["attention_mask"], positions, past_key_values=cache, features=features,
                logits_to_keep=1, **images)
    return cache.layers, out.logits, after
