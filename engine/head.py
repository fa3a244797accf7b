"""The head in slices: log-probabilities of tokens without ever holding all logits.

A vocabulary is large: at 8 B parameters the logits of 4,096 tokens take 1.2 GB in bf16, and a plain
cross-entropy makes several float32 copies of them. Only one number per token is wanted, its
log-probability. So the hidden states go through the head a slice of rows at a time, forward and
backward, and the backward pass computes a slice's logits once more. (The idea is that of Liger's
fused linear cross-entropy, arXiv 2410.10989.)

Dimensions: M rows (positions whose next token is scored), K tokens scored per row, D width,
V vocabulary.
"""

import torch

from model import allowed_logits, float_of

SLICE = 2**27  # most logits at a time: 256 MB in bf16
PIECE = 2**23  # most of them in float32 at a time: 32 MB


def score_tokens(hidden, weight, tokens, banned, temperature=1.0, with_entropy=True):
    """Log-probabilities of tokens, with gradient, and entropies of their distributions, without.

    hidden (M, D), weight (V, D) of the head, tokens (M, K): K tokens that may follow each row
    -> logprobs (M, K); entropy (M,), 0 without `with_entropy`. The distribution is that of
    model.allowed_logits, in float32.
    """
    return HeadScores.apply(hidden, weight, tokens, banned, temperature, with_entropy)


class HeadScores(torch.autograd.Function):
    """See `score_tokens`. Of a row of logits only `norm` is kept, the log of its sum of exp."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, banned, temperature, with_entropy):
        dtype = float_of(hidden)
        logprobs = torch.empty(tokens.shape, device=hidden.device, dtype=dtype)
        entropy = logprobs.new_zeros(len(hidden))
        norm = logprobs.new_empty(len(hidden), 1)
        parts = slices(len(hidden), len(weight), SLICE)
        ctx.logits = None
        for part in parts:
            logits = hidden[part] @ weight.T
            for piece in slices(len(logits), len(weight), PIECE):
                rows = slice(part.start + piece.start, part.start + piece.stop)
                scores = allowed_logits(logits[piece], banned, temperature)
                norm[rows] = scores.logsumexp(-1, keepdim=True)
                logprobs[rows] = scores.gather(1, tokens[rows]) - norm[rows]
                if with_entropy:
                    probabilities = (scores - norm[rows]).exp()
                    finite = scores.clamp_min(torch.finfo(dtype).min)  # 0 x -inf would be NaN
                    entropy[rows] = norm[rows, 0] - (probabilities * finite).sum(-1)
            if len(parts) == 1:  # few enough to be kept
                ctx.logits = logits
            del logits  # before those of the next slice are made
        ctx.save_for_backward(hidden, weight, tokens, banned, norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, slope, _):
        hidden, weight, tokens, banned, norm = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in slices(len(hidden), len(weight), SLICE):
            logits = hidden[part] @ weight.T if ctx.logits is None else ctx.logits
            for piece in slices(len(logits), len(weight), PIECE):
                rows = slice(part.start + piece.start, part.start + piece.stop)
                scores = allowed_logits(logits[piece], banned, ctx.temperature)
                # d log p(token) / d score = (1 for the token itself, else 0) - p
                total = slope[rows].sum(-1, keepdim=True)
                gradient = scores.sub_(norm[rows]).exp_().mul_(-total)
                gradient.scatter_add_(1, tokens[rows], slope[rows])
                logits[piece] = gradient.div_(ctx.temperature)  # no second tensor of this size
            d_hidden[part] = logits @ weight
            if d_weight is not None:
                d_weight.addmm_(logits.T, hidden[part])
            ctx.logits = None
            del logits
        return d_hidden, d_weight, None, None, None, None


def slices(rows, vocabulary, most):
    """Slices of so many rows, each of at most `most` logits (but at least a row)."""
    size = max(1, most // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
