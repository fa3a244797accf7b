"""`rollout` and `token_logprobs` with every prompt computed once for its G responses.

Both take and return the same as the plain ones of model.py, where each response is a row of its own
that computes the whole prompt again. But the G responses to a prompt attend to the same keys and
values of that prompt, and these do not depend on the response. So they are computed once:

    prefill     one forward of the B prompts leaves their keys and values in a PromptCache
    sampling    DecodeKV: the prompt's keys and values, once, and beside them those of each
                response, which grow by a token per step
    training    BranchKV: one forward of the N responses, each behind its prompt's keys and values;
                the gradients of G responses add up there and flow back into the one prefill

Stock attention takes keys and values row by row, so that a shared prompt would have to be copied
for each response, and with some kernels for each query head. Here a query is multiplied with the
prompt's keys and with its own response's keys in two products, and one softmax spans both. The
first product is done for all G responses at once: it reads the prompt's keys once per group and
copies nothing.

In training, stock attention with copies is used after all in two cases (BranchKV, `copies`): on
CUDA, where its fused kernels gain more than the copies cost; and with activation checkpointing,
where the backward pass runs the layers again, after the attention of this file was taken off.

Dimensions: B prompts, G responses per prompt, N = B G, L prompt tokens, T response tokens,
V vocabulary, H query heads, K key-value heads, D width of a head.
"""

import contextlib
import functools
import math

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from engine.head import score_tokens
from formats.errors import UserError
from model import (
    allowed_logits,
    check_logprobs,
    choose_tokens,
    encode_prompts,
    enough_have_ended,
)


@torch.no_grad()
def rollout(
    model, prompts, group, max_new_tokens, stop_ids, banned, temperature=1.0, generator=None
):
    """Sample `group` responses per prompt, token by token; temperature 0 is greedy.

    prompts: a collated batch (data.py), left-padded; banned: token ids that are never sampled.
    -> tokens (N, T); mask (N, T), 1 = sampled, up to and including the stop token;
       logprobs (N, T) of the sampled tokens; the features of the images.
    The responses to a prompt are neighbours. A response without a stop token at its end was cut
    off.
    """
    model.eval()  # nothing is recomputed: activation checkpointing is for training
    features = encode_prompts(model, prompts)
    layers, logits, next_position = forward_prompts(model, prompts, features)
    cache = DecodeCache(layers, group, max_new_tokens, prompts["attention_mask"])
    position = next_position.repeat_interleave(group, 0)  # (N, 1)
    logits = logits[:, -1].repeat_interleave(group, 0)  # (N, V)
    tokens = position.new_zeros(len(logits), max_new_tokens)
    mask = torch.zeros_like(tokens)
    logprobs = torch.zeros(tokens.shape, device=tokens.device)
    # Responses that have ended are dropped from the batch now and then: `rows` of the N are left.
    rows = torch.arange(len(logits), device=logits.device)
    alive = torch.ones_like(rows, dtype=torch.bool)  # (rows,), 1 = has not ended yet
    run_token = TokenStep(model, cache)
    # Inference mode takes less time per operation than no_grad. What is made in it can never take
    # part in training, as the features will: they are made outside.
    with torch.inference_mode(), sharing(model):
        for t in range(max_new_tokens):
            new, chosen = sample_tokens(logits, banned, temperature, generator)  # (rows,)
            tokens[rows, t] = new * alive
            mask[rows, t] = alive.long()
            logprobs[rows, t] = chosen * alive
            alive = alive & ~torch.isin(new, stop_ids)
            if not alive.any() or t + 1 == max_new_tokens:
                break
            # A response that has ended costs as much as one that goes on; but to drop it, the keys
            # and values of those that go on are copied. So several are dropped at once.
            if enough_have_ended(alive):
                cache.keep_rows(alive)
                rows = rows[alive]
                new = new[alive]
                position = position[alive]
                alive = torch.ones_like(rows, dtype=torch.bool)
            logits = run_token(new, position)
            position = position + 1
    length = int(mask.sum(1).max())
    try:
        check_logprobs(logprobs)
    except ValueError as error:
        raise UserError(str(error)) from None
    return tokens[:, :length], mask[:, :length], logprobs[:, :length], features


def sample_tokens(logits, banned, temperature, generator):
    """One token per row of logits (rows, V) -> tokens (rows,), their log-probabilities (rows,)."""
    scores = allowed_logits(logits, banned, temperature or 1.0).log_softmax(-1)
    tokens = choose_tokens(scores, temperature, generator)
    return tokens, scores.gather(1, tokens[:, None])[:, 0].float()


def token_logprobs(model, prompts, features, tokens, mask, banned, temperature=1.0):
    """Log-probabilities of sampled tokens and entropies of their distributions, with gradient.

    One forward of the prompts and one of the responses. The distribution is that of `rollout`.
    features: of the prompts' images, or None: encode them, with gradient.
    tokens, mask (N, T) -> logprobs (N, T), entropy (N, T), both 0 where mask is 0. Every response
    has a first token: mask[:, 0] is 1.
    """
    prompt_count = len(prompts["input_ids"])
    group = len(tokens) // prompt_count
    length = tokens.shape[1]

    def score_first(lm_head, hidden):
        """hidden (B, 1, D): the prompt's last token predicts the first token of all responses."""
        first_tokens = tokens[:, 0].view(prompt_count, group)
        return score_tokens(hidden[:, 0], lm_head.weight, first_tokens, banned, temperature)

    layers, (first_logprobs, first_entropy), next_position = forward_prompts(
        model, prompts, features, head=score_first
    )
    first_logprobs = backward_by_itself(layers, first_logprobs)
    # Each token of a response predicts the next, so that the last one need not be run. Where all
    # responses are a single token, one is run nevertheless and predicts nothing: ranks must run
    # equally many forwards, or they wait for each other for ever.
    steps = max(1, length - 1)
    next_tokens = nn.functional.pad(tokens, (0, 1))[:, 1 : steps + 1]  # (N, steps)
    wanted = nn.functional.pad(mask, (0, 1))[:, 1 : steps + 1].bool()  # (N, steps), 1 = has a next

    def score_next(lm_head, hidden):
        """hidden (wanted, D)"""
        return score_tokens(
            hidden, lm_head.weight, next_tokens[wanted][:, None], banned, temperature
        )

    later_logprobs, later_entropy = forward_responses(
        model,
        prompts,
        layers,
        next_position,
        tokens[:, :steps],
        mask[:, :steps],
        wanted,
        score_next,
    )
    first_entropy = first_entropy.repeat_interleave(group)
    logprobs = join_scores(first_logprobs.flatten(), later_logprobs[:, 0], wanted)
    entropy = join_scores(first_entropy, later_entropy, wanted)
    return logprobs[:, :length], entropy[:, :length]


def forward_responses(model, prompts, layers, next_position, tokens, mask, wanted, head):
    """Run response tokens (N, T) behind the keys and values of their prompts, with gradient.

    layers, next_position: what `forward_prompts` returned; mask (N, T), 1 = token of a response;
    wanted (N, T), 1 = the hidden state is wanted -> what `head` makes of these, (wanted, D).
    """
    group = len(tokens) // len(next_position)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    positions = next_position.repeat_interleave(group, 0) + steps  # (N, T)
    copies = takes_copies(model, tokens)
    cache = BranchCache(layers, group, prompts["attention_mask"], copies)
    inputs = {
        "position_ids": positions.expand(3, -1, -1),
        "past_key_values": cache,
        "text_only": True,
        "logits_to_keep": wanted,
        "head": head,
    }
    if copies:
        prompt_mask = prompts["attention_mask"].repeat_interleave(group, 0)
        attention_mask = torch.cat([prompt_mask, mask], 1)  # (N, L + T)
        return model(tokens, attention_mask, **inputs).logits
    with sharing(model):
        return model(tokens, None, cache=cache, **inputs).logits


def takes_copies(model, tokens):
    """Are responses scored by stock attention, with copies of their prompts' keys? (BranchKV)"""
    recomputes = getattr(model.model.language_model, "gradient_checkpointing", False)
    return tokens.is_cuda or recomputes


def backward_by_itself(layers, logprobs):
    """Give the prompts a backward pass of their own, which begins when that of the responses ends.

    The responses meet the prompts in two things alone: the keys and values of the layers, which are
    replaced in place, and the first tokens' logprobs, which are returned. In one backward pass
    through both, every weight would be waiting for its second gradient: FSDP can pass on none
    before the last layer of the prompts is done, and each rank holds the whole gradient of all
    layers. In two, it holds that of one layer at a time.
    """
    if not torch.is_grad_enabled():
        return logprobs
    states = [logprobs]
    for layer in layers:
        states += [layer.keys, layer.values]
    anchor = torch.zeros((), device=logprobs.device, requires_grad=True)
    logprobs, *rest = BackwardByItself.apply(anchor, states)
    for i, layer in enumerate(layers):
        layer.keys, layer.values = rest[2 * i : 2 * i + 2]
    return logprobs


class BackwardByItself(torch.autograd.Function):
    """The same tensors, cut off from what made them; the way back leads through `backward` alone.

    states: a list, so that autograd does not see the tensors in it; anchor: anything that it does
    see and that wants a gradient.
    """

    @staticmethod
    def forward(ctx, anchor, states):
        ctx.states = states
        ctx.set_materialize_grads(False)
        return tuple(state.detach() for state in states)

    @staticmethod
    def backward(ctx, *slopes):
        pairs = []
        for state, slope in zip(ctx.states, slopes):
            if state.requires_grad and slope is not None:
                pairs.append((state, slope))
        ctx.states = None
        if pairs:  # else nothing in the prompts is trained
            torch.autograd.backward(*zip(*pairs))
        return None, None


def join_scores(first, later, wanted):
    """Values of the first tokens (N,) and of the wanted later ones (wanted,) -> (N, 1 + steps)."""
    rows = later.new_zeros(wanted.shape).masked_scatter(wanted, later)  # (N, steps)
    return torch.cat([first[:, None], rows], 1)


# ----------------------------------------------------------------------------------------------
# prefill: each prompt once


def forward_prompts(model, prompts, features, head=None):
    """Run each prompt once, with gradient unless the caller says otherwise.

    features: of the prompts' images, or None: encode them.
    -> the layers of a PromptCache; logits (B, 1, V) of the last token, or what `head` makes of its
       hidden state (B, 1, D); the next position (B, 1)
    """
    layers = model.model.language_model.layers
    for layer in layers:
        # A layer that recomputes its activations in the backward pass ignores its cache unless this
        # says that a second write does no harm. It does none to a PromptKV.
        layer._can_checkpoint_with_cache = True
    last_token_only(layers[-1])
    cache = PromptCache(len(layers))
    positions = prompts["position_ids"]  # (3, B, L)
    next_position = positions.amax((0, 2))[:, None] + 1  # (B, 1)
    images = {}
    if features is None:
        for name in ("pixel_values", "image_grid_thw", "points", "regions"):
            images[name] = prompts[name]
    out = model(
        prompts["input_ids"],
        prompts["attention_mask"],
        positions,
        past_key_values=cache,
        features=features,
        logits_to_keep=1,
        head=head,
        **images,
    )
    return cache.layers, out.logits, next_position


class PromptKV(DynamicLayer):
    """Holds the prompts' keys and values (B, K, L, D) of a layer, with gradient.

    Each write replaces what was there: activation checkpointing writes once more, the same.
    """

    before = None  # keys and values of all tokens in front of those of the next write

    def update(self, keys, values, *args, **kwargs):
        if self.before:
            keys_before, values_before = self.before
            keys = torch.cat([keys_before, keys], 2)
            values = torch.cat([values_before, values], 2)
            self.before = None
        self.keys = keys
        self.values = values
        self.is_initialized = True
        return keys, values


class PromptCache(Cache):
    """The prompts' keys and values of all layers. A LastTokenOnly layer that is
    given this cache computes only its last token."""

    def __init__(self, layers):
        super().__init__(layers=[PromptKV() for _ in range(layers)])


class LastTokenOnly:
    """A decoder layer that, where its cache is a PromptCache, is computed for the last token only.

    The responses need the keys and values of all prompt tokens; but the output of the last layer is
    needed of the last token alone, for its logits. The others are 0. That saves four fifths of the
    layer and nearly all of its attention: a quarter of the prefill in a model of three layers.
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
        # All tokens but the last: keys and values, as Qwen3VLTextAttention makes them.
        attention = self.self_attn
        others = self.input_layernorm(hidden_states[:, :-1])  # (B, L - 1, width)
        heads = (*others.shape[:2], -1, attention.head_dim)
        keys = attention.k_norm(attention.k_proj(others).view(heads)).transpose(1, 2)
        values = attention.v_proj(others).view(heads).transpose(1, 2)  # (B, K, L - 1, D)
        angles = [angle[:, :-1] for angle in position_embeddings]
        no_queries = keys[:, :0]
        _, keys = apply_rotary_pos_emb(no_queries, keys, *angles)  # (B, K, L - 1, D)
        past_key_values.layers[attention.layer_idx].before = (keys, values)
        # The last token: the whole layer.
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = attention_mask[:, :, -1:]  # by query and key; flash-attn's is (B, L)
        if position_ids is not None:
            position_ids = position_ids[..., -1:]
        last = super().forward(
            hidden_states[:, -1:],
            tuple(angle[:, -1:] for angle in position_embeddings),
            attention_mask,
            position_ids,
            past_key_values,
            **kwargs,
        )  # (B, 1, width)
        return nn.functional.pad(last, (0, 0, hidden_states.shape[1] - 1, 0))  # (B, L, width)


def last_token_only(layer):
    """Make a decoder layer a LastTokenOnly, in place.

    It gets a subclass of its own class, as FSDP2 does it: parameters, their names and hooks stay,
    and so do checkpoints and optimizers; only `forward` is another.
    """
    if not isinstance(layer, LastTokenOnly):
        stock = type(layer)
        layer.__class__ = type(f"LastTokenOnly{stock.__name__}", (LastTokenOnly, stock), {})


def padding_scores(attention_mask, dtype):
    """What is added to the scores of prompt tokens: -inf at padding, else 0 (B, L).

    None where no prompt is padded.
    """
    if attention_mask.all():
        return None
    scores = torch.zeros_like(attention_mask, dtype=dtype)
    return scores.masked_fill_(attention_mask == 0, -torch.inf)


# ----------------------------------------------------------------------------------------------
# training: whole responses behind their prompts, with gradient
#
# Here and in sampling, far scores are those of a response's queries with the keys of the prompt,
# and near scores those with the keys of the response itself.


class BranchCache(Cache):
    """The caches of all layers for whole responses. attention_mask (B, L) of the prompts, 1 =
    token.

    layers: of a PromptCache; copies: see BranchKV.
    """

    def __init__(self, layers, group, attention_mask, copies):
        super().__init__(layers=[BranchKV(layer, group, copies) for layer in layers])
        keys = layers[0].keys
        padding = padding_scores(attention_mask, keys.dtype)  # (B, L)
        if padding is not None:
            padding = padding.repeat_interleave(keys.shape[1], 0)[:, None, None]
        self.padding = padding  # (B K, 1, 1, L) or None, added to the far scores


class BranchKV(DynamicLayer):
    """A layer's keys and values of the prompts (B, K, L, D), which G responses each attend to.

    copies: whether stock attention is to see them, in front of those of each response. It is only
    read, so that a layer may be run again. Gradients flow back into the prompts.
    """

    def __init__(self, prompt, group, copies):
        super().__init__()
        self.keys = prompt.keys
        self.values = prompt.values
        self.is_initialized = True
        self.group = group
        self.copies = copies

    def update(self, keys, values, *args, **kwargs):
        if not self.copies:
            return keys, values  # `attend` has the prompts' beside them
        # Copies are made while a layer runs: with activation checkpointing only its own exist.
        return self.behind_prompt(self.keys, keys), self.behind_prompt(self.values, values)

    def behind_prompt(self, prompt, own):
        """(B, K, L, D) and (N, K, T, D) -> (N, K, L + T, D)."""
        copies = prompt[:, None].expand(-1, self.group, -1, -1, -1).flatten(0, 1)  # (N, K, L, D)
        return torch.cat([copies, own], 2)

    def attend(self, cache, query, key, value, scaling):
        """query (N, H, T, D), key and value (N, K, T, D) -> (N, T, H, D); cache: all layers'."""
        count, heads, length, head_dim = query.shape
        prompts, kv_heads = self.keys.shape[:2]
        out = BranchAttention.apply(
            self.by_prompt(query * scaling),
            self.by_prompt(key),
            self.by_prompt(value),
            self.keys.flatten(0, 1),  # (B K, L, D)
            self.values.flatten(0, 1),
            cache.padding,
        )
        out = out.view(prompts, kv_heads, self.group, heads // kv_heads, length, head_dim)
        return out.permute(0, 2, 4, 1, 3, 5).reshape(count, length, heads, head_dim)

    def by_prompt(self, states):
        """(N, H, T, D) -> (B K, G, H/K T, D): the query heads of a key-value head one by one."""
        prompts, kv_heads, _, head_dim = self.keys.shape
        length = states.shape[2]
        states = states.view(prompts, self.group, kv_heads, -1, length, head_dim)
        return states.transpose(1, 2).reshape(prompts * kv_heads, self.group, -1, head_dim)


class BranchAttention(torch.autograd.Function):
    """softmax([far, near]) [values of the prompt, own values]; near scores are causal.

    A key-value head of a prompt is a prompt of its own here: P = B K prompts, and for each response
    M = H/K T queries, those of all tokens and of all query heads that share the key-value head.
    query (P, G, M, D), scaled; key, value (P, G, T, D); prompt_key, prompt_value (P, L, D);
    padding (P, 1, 1, L), added to the far scores, or None -> (P, G, M, D).

    The scores are computed piece by piece, so that they stay in the processor's cache, and again in
    the backward pass: only the log of their sum of exp is kept, as in flash attention.
    """

    @staticmethod
    def forward(ctx, query, key, value, prompt_key, prompt_value, padding):
        out = torch.empty_like(query)
        norm = query.new_empty(*query.shape[:-1], 1)  # log of the sum of exp(score) of a query
        later = later_tokens(query, key)
        parts = pieces(query, prompt_key)
        (buffer,) = score_buffers(parts, query, prompt_key, 1)
        for prompts, responses in parts:
            far, near = branch_scores(
                query, key, prompt_key, padding, later, prompts, responses, buffer
            )
            highest = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True))
            far.sub_(highest).exp_()
            near.sub_(highest).exp_()
            total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
            weighted = times_prompt(far, prompt_value[prompts]) + near @ value[responses]
            out[responses] = weighted.div_(total)
            norm[responses] = total.log_().add_(highest)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, padding, out, norm)
        return out

    @staticmethod
    def backward(ctx, slope):
        query, key, value, prompt_key, prompt_value, padding, out, norm = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key = torch.empty_like(key)
        d_value = torch.empty_like(value)
        d_prompt_key = torch.zeros_like(prompt_key.mT)  # (P, D, L): products are faster this way
        d_prompt_value = torch.zeros_like(prompt_value.mT)
        later = later_tokens(query, key)
        parts = pieces(query, prompt_key)
        buffer, second_buffer = score_buffers(parts, query, prompt_key, 2)
        for prompts, responses in parts:
            far, near = branch_scores(
                query, key, prompt_key, padding, later, prompts, responses, buffer
            )
            far.sub_(norm[responses]).exp_()  # from here on: weights
            near.sub_(norm[responses]).exp_()
            d_prompt_value[prompts] += for_prompt(slope[responses], far)
            d_value[responses] = near.mT @ slope[responses]
            # d score = weight (d weight - the mean of d weight), by the slope of a softmax
            mean = (slope[responses] * out[responses]).sum(-1, keepdim=True)
            d_far = times_prompt(slope[responses], prompt_value[prompts].mT, second_buffer)
            d_far.sub_(mean).mul_(far)
            d_near = (slope[responses] @ value[responses].mT).sub_(mean).mul_(near)
            d_query[responses] = times_prompt(d_far, prompt_key[prompts]) + d_near @ key[responses]
            d_prompt_key[prompts] += for_prompt(query[responses], d_far)
            d_key[responses] = d_near.mT @ query[responses]
        return d_query, d_key, d_value, d_prompt_key.mT, d_prompt_value.mT, None


def pieces(query, prompt_key, scores=2**19):
    """The work of BranchAttention in pieces of at most about so many far scores.

    So few stay in the processor's cache; so many still make a fast product. A piece is some
    responses to one prompt, or all responses to some prompts.
    -> [(prompts, responses), ...]: prompts indexes tensors (P, ...), responses tensors (P, G, ...).
    """
    prompts, group = query.shape[:2]
    per_response = query.shape[2] * prompt_key.shape[1]  # M L
    prompts_at_once = min(max(1, scores // (per_response * group)), prompts)
    responses_at_once = min(max(1, scores // per_response), group)
    parts = []
    for first_prompt in range(0, prompts, prompts_at_once):
        some_prompts = slice(first_prompt, first_prompt + prompts_at_once)
        for first_response in range(0, group, responses_at_once):
            some_responses = slice(first_response, first_response + responses_at_once)
            parts.append((some_prompts, (some_prompts, some_responses)))
    return parts


def score_buffers(parts, query, prompt_key, count):
    """Memory for the far scores of a piece, `count` times; every piece writes over the one before.

    New memory for each piece would take longer than the product that fills it.
    """
    _, responses = parts[0]  # no piece is larger than the first
    queries = query[responses][..., 0].numel()
    return query.new_empty(count, queries * prompt_key.shape[1])


def branch_scores(query, key, prompt_key, padding, later, prompts, responses, buffer):
    """The scores of a piece: far (P, G, M, L), written into `buffer`, and near (P, G, M, T).

    -inf at keys that a query must not attend to.
    """
    far = times_prompt(query[responses], prompt_key[prompts].mT, buffer)
    near = query[responses] @ key[responses].mT
    if padding is not None:
        far += padding[prompts]
    return far, near.masked_fill_(later, -torch.inf)


def later_tokens(query, key):
    """(M, T), 1 = the key's token comes after the query's; M: heads times tokens."""
    length = key.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu_(1)
    return later.repeat(query.shape[2] // length, 1)


def times_prompt(states, matrix, buffer=None):
    """states (P, G, M, X) times the matrix (P, X, Y) of their prompt -> (P, G, M, Y).

    One product per prompt, for all its responses together; written into `buffer` if there is one.
    """
    rows = states.flatten(1, 2)  # (P, G M, X)
    out = None
    if buffer is not None:
        shape = (*rows.shape[:2], matrix.shape[-1])
        out = buffer[: math.prod(shape)].view(shape)
    return torch.bmm(rows, matrix, out=out).view(*states.shape[:-1], -1)


def for_prompt(states, scores):
    """states (P, G, M, D), scores (P, G, M, L) -> (P, D, L), summed over all queries to a
    prompt."""
    return states.flatten(1, 2).mT @ scores.flatten(1, 2)


# ----------------------------------------------------------------------------------------------
# sampling: one token of each response at a time, without gradient


class DecodeCache(Cache):
    """The caches of all layers while responses are sampled, and where the rows stand in them.

    layers: of a PromptCache; attention_mask (B, L) of the prompts, 1 = token.

    On CUDA the tensors of a token have the shapes of the token before, so that its kernels can be
    recorded and replayed (TokenStep): it looks at the first `visible` places for own tokens, 64 or
    128 or 256 .., and those that are not filled yet are hidden. Elsewhere it looks at those that
    are filled.
    """

    first_visible = 64

    def __init__(self, layers, group, max_new_tokens, attention_mask):
        steps = max(1, max_new_tokens - 1)  # the last token is sampled, but not run
        super().__init__(layers=[DecodeKV(layer, group, steps) for layer in layers])
        padding = padding_scores(attention_mask, torch.float32)  # (B, L)
        if padding is not None:
            padding = padding[:, None, None, None]
        self.padding = padding  # (B, 1, 1, 1, L) or None, added to the far scores
        device = attention_mask.device
        self.fixed_shapes = takes_fixed_shapes(device)
        self.places = Places(torch.arange(len(attention_mask), device=device), group)
        self.length = 0  # tokens of a response up to now
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # where the next one is written
        self.steps = torch.arange(steps, device=device)
        self.visible = 0
        self.hidden = None  # (visible,), 1 = not filled yet; None: all are
        self.reshaped = True  # since the token before

    def next_token(self):
        """Before a token is run: where it is written, and what it sees."""
        self.step.fill_(self.length)
        self.length += 1
        if not self.fixed_shapes:
            self.visible = self.length
            return
        if self.length > self.visible:
            self.visible = min(max(self.first_visible, 2 * self.visible), len(self.steps))
            self.hidden = torch.empty(self.visible, dtype=torch.bool, device=self.step.device)
            self.reshaped = True
        torch.gt(self.steps[: self.visible], self.step, out=self.hidden)

    def keep_rows(self, alive):
        """Drop the responses that have ended; alive (rows,), 1 = goes on."""
        prompt = self.places.prompt[alive]
        slot = self.places.slot[alive]
        prompts_left, new_prompt = prompt.unique(return_inverse=True)
        if self.padding is not None:
            self.padding = self.padding[prompts_left]
        self.places = Places(new_prompt)
        for layer in self.layers:
            layer.keep_rows(prompts_left, prompt, slot, self.places)
        self.reshaped = True


def takes_fixed_shapes(device):
    return device.type == "cuda"


class DecodeKV(DynamicLayer):
    """A layer's keys and values: of the prompts, and of each response's own tokens up to now.

    prompt: [keys, values], each (B, K, L, D). own: [keys, values], each (B, K, width, steps, D),
    with a slot for each of the `width` responses of a prompt (`Places`) and memory for all tokens
    that are run, from the start, which is filled token by token.
    """

    def __init__(self, prompt, group, steps):
        super().__init__()
        # As the layers leave them they are not contiguous, and every product, at each token, would
        # copy them. PromptKV gets the contiguous ones, too, so that there are not two.
        self.prompt = [prompt.keys.contiguous(), prompt.values.contiguous()]
        prompt.keys, prompt.values = self.prompt
        self.keys, self.values = self.prompt  # where methods of transformers look for them
        self.is_initialized = True
        prompts, kv_heads, _, head_dim = prompt.keys.shape
        shape = (prompts, kv_heads, group, steps, head_dim)
        self.own = [prompt.keys.new_zeros(shape) for _ in range(2)]

    def update(self, keys, values, *args, **kwargs):
        return keys, values  # of one token (rows, K, 1, D); `attend` stores them

    def attend(self, cache, query, key, value, scaling):
        """One token: query (rows, H, 1, D), key and value (rows, K, 1, D) -> (rows, 1, H, D).

        cache: all layers', which knows where the rows and the token stand.
        """
        places = cache.places
        rows, heads, _, head_dim = query.shape
        prompt_keys, prompt_values = self.prompt
        kv_heads, prompt_length = prompt_keys.shape[1:3]
        own_keys, own_values = self.own
        own_keys.index_copy_(3, cache.step, places.to_slots(key))
        own_values.index_copy_(3, cache.step, places.to_slots(value))
        own_keys = own_keys[..., : cache.visible, :]  # (B, K, width, t, D), t = visible
        own_values = own_values[..., : cache.visible, :]

        by_kv_head = (query * scaling).view(rows, kv_heads, heads // kv_heads, head_dim)
        queries = places.to_slots(by_kv_head)  # (B, K, width, H/K, D)
        far = float32_product(queries.flatten(2, 3), prompt_keys.mT)  # (B, K, width H/K, L)
        far = far.view(*queries.shape[:4], prompt_length)  # (B, K, width, H/K, L)
        if cache.padding is not None:
            far += cache.padding
        near = float32_product(queries, own_keys.mT)  # (B, K, width, H/K, t)
        if cache.hidden is not None:
            near.masked_fill_(cache.hidden, -torch.inf)
        scores = torch.cat([far, near], -1)  # (B, K, width, H/K, L + t)
        weights = scores.softmax(-1).to(query.dtype)
        far = weights[..., :prompt_length].flatten(2, 3)  # (B, K, width H/K, L)
        near = weights[..., prompt_length:]  # (B, K, width, H/K, t)
        out = (far @ prompt_values).view_as(queries) + near @ own_values
        return places.to_rows(out).reshape(rows, 1, heads, head_dim)

    def keep_rows(self, prompts_left, prompt, slot, places):
        """Keep these prompts, and move the responses that stand at (prompt, slot) to `places`."""
        if len(prompts_left) < len(self.prompt[0]):
            self.prompt = [states[prompts_left] for states in self.prompt]
        self.own = [places.to_slots(states[prompt, :, slot]).contiguous() for states in self.own]


def float32_product(a, b):
    """a @ b, its numbers in float32 where those of a and b are bf16 (float64 stays float64).

    Scores that are rounded to bf16 are off by up to 0.4 %, and so is what is sampled; the kernels
    that score the sample keep float32.
    """
    if a.dtype != torch.bfloat16:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return product.view(*a.shape[:-1], b.shape[-1])


class Places:
    """Where the rows of a batch, one per response, stand in the tensors of a DecodeKV.

    These have `width` slots per prompt, as many as the prompt with most responses needs. The
    responses to a prompt fill its slots from the front; where it has fewer, the last slots are
    empty: they are computed as well, from zeros, and no row reads them.

    prompt (rows,): of each row, ascending; slot (rows,): of each row. At the start each prompt has
    `group` rows.
    """

    def __init__(self, prompt, group=1):
        prompt = prompt.repeat_interleave(group)
        self.prompt = prompt
        responses = torch.bincount(prompt)  # (B,), of each prompt
        first_row = responses.cumsum(0) - responses  # (B,), of each prompt
        self.slot = torch.arange(len(prompt), device=prompt.device) - first_row[prompt]
        self.shape = (len(responses), int(responses.max()))  # B, width
        self.full = len(prompt) == math.prod(self.shape)  # no slot is empty: a view will do

    def to_slots(self, states):
        """states of rows (rows, K, ...) -> (B, K, width, ...), 0 in empty slots."""
        if self.full:
            return states.unflatten(0, self.shape).transpose(1, 2)
        prompts, width = self.shape
        slots = states.new_zeros(prompts, states.shape[1], width, *states.shape[2:])
        slots[self.prompt, :, self.slot] = states
        return slots

    def to_rows(self, slots):
        """The way back: (B, K, width, ...) -> (rows, K, ...)."""
        if self.full:
            return slots.transpose(1, 2).flatten(0, 1)
        return slots[self.prompt, :, self.slot]


class TokenStep:
    """Runs one token of every response through the model.

    On CUDA that takes some 2,000 kernels, each shorter than its launch: so they are recorded once,
    in a CUDA graph, and replayed for token after token, until a shape changes. A recording runs
    nothing and takes about as long as a token without it.
    """

    def __init__(self, model, cache):
        self.model = model
        self.cache = cache
        self.graph = None

    def __call__(self, tokens, positions):
        """tokens (rows,), positions (rows, 1) -> logits (rows, V), valid until the next call."""
        self.cache.next_token()
        if self.cache.reshaped:
            self.graph = None
            self.cache.reshaped = False
            logits = self.run(tokens, positions)
            if self.cache.fixed_shapes:
                self.record(tokens, positions)
            return logits
        if self.graph is None:
            return self.run(tokens, positions)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits

    def run(self, tokens, positions):
        out = self.model(
            tokens[:, None],
            None,
            positions.expand(3, -1, -1),
            past_key_values=self.cache,
            text_only=True,
            cache=self.cache,
        )
        return out.logits[:, -1]

    def record(self, tokens, positions):
        """Record `run` on fixed inputs and outputs: self.tokens, self.positions -> self.logits."""
        self.tokens = tokens.clone()
        self.positions = positions.clone()
        self.graph = torch.cuda.CUDAGraph()
        stream = recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads, such as NCCL's, may go on.
            self.graph.capture_begin(capture_error_mode="thread_local")
            self.logits = self.run(self.tokens, self.positions)
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def recording_stream():
    """A stream, since the default one cannot be recorded; always the same one, since cuBLAS takes
    32 MB for each."""
    return torch.cuda.Stream()


# ----------------------------------------------------------------------------------------------
# how the model comes to attend this way


def shared_attention(module, query, key, value, attention_mask, scaling, cache, **kwargs):
    """What the layers call inside `sharing`, as an attention function of transformers."""
    layer = cache.layers[module.layer_idx]
    return layer.attend(cache, query, key, value, scaling), None


AttentionInterface.register("shared_prompt", shared_attention)


@contextlib.contextmanager
def sharing(model):
    """Inside, the language model attends through the `cache` that its forward is given.

    That is a BranchCache without copies or a DecodeCache, given also as past_key_values.
    """
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "shared_prompt"
    try:
        yield
    finally:
        config._attn_implementation = before
