"""flash-attn by plain float math on the CPU: a pytest plugin that puts a run of tests on its path.

    PYTHONPATH=tests python -m pytest -p flash_stub tests/test_model.py tests/test_training.py

flash-attn runs on CUDA alone. But most of what can go wrong around it is not in its kernels: which
rows and keys transformers hands over, where the padding goes, and which way the causal mask is
aligned. With this plugin all of that runs as it does on a GPU. Two functions stand for flash-attn's
own (`flash_attn_func`, `flash_attn_varlen_func`), with the meaning that its README gives them since
version 2.1; every Qwen3-VL that the tests make attends by them, and responses are scored as they
are on CUDA, by stock attention (engine/shared_prefix.py, `takes_copies`).

A run in which no model called them fails. The end of the output counts the calls of each kind and
the tests that made none, which -v names. Processes that a test starts are not on the path: they use
torch's attention. tests/test_flash.py runs the tests that matter most.
"""

import collections

import pytest
import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.modeling_flash_attention_utils as flash_loader
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration

CALLS = collections.Counter()  # kind of call -> how often
WITHOUT_CALLS = []  # tests in which there was none

# ----------------------------------------------------------------------------------------------
# the two functions


def attend(query, key, value, causal, scale):
    """One sequence: query (T, H, D), key and value (S, K, D) -> (T, H, D).

    causal: the last query sees all keys, the one before it all but the last key, and so on. (Before
    version 2.1 the first query saw the first key alone.) A query that sees no key gets 0.
    """
    queries, heads, width = query.shape
    keys, kv_heads, _ = key.shape
    if scale is None:
        scale = width**-0.5
    key = key.repeat_interleave(heads // kv_heads, 1)  # (S, H, D)
    value = value.repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("thd,shd->hts", query, key) * scale
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if causal:
        hidden = torch.ones_like(hidden).triu_(keys - queries + 1)
    # Not -inf: a row of nothing else would have the slope NaN.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("hts,shd->thd", weights, value)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
):
    """Rows of one length: q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D)."""
    assert k.shape == v.shape and len(q) == len(k)
    assert_plain(dropout_p, window_size, softcap)
    count("plain", causal, q.shape[1], k.shape[1])
    rows = [attend(*row, causal, softmax_scale) for row in zip(q, k, v)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """Sequences of many lengths end to end: q (all T, H, D), k and v (all S, K, D) -> like q.

    cu_seqlens (B + 1,), int32: where each sequence begins, and the end; max_seqlen: the longest.
    """
    assert k.shape == v.shape and len(cu_seqlens_q) == len(cu_seqlens_k)
    assert_plain(dropout_p, window_size, softcap)
    for tokens, starts, longest in (
        (q, cu_seqlens_q, max_seqlen_q),
        (k, cu_seqlens_k, max_seqlen_k),
    ):
        assert starts.dtype == torch.int32 and isinstance(longest, int)
        assert starts[0] == 0 and starts[-1] == len(tokens)
        lengths = starts.diff()
        assert lengths.min() >= 0 and lengths.max() <= longest
    count("varlen", causal, max_seqlen_q, max_seqlen_k)
    q_lengths = cu_seqlens_q.diff().tolist()
    k_lengths = cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    return torch.cat([attend(*sequence, causal, softmax_scale) for sequence in sequences])


def assert_plain(dropout, window_size, softcap):
    """What this project must not ask for, and `attend` does not compute."""
    assert dropout == 0 and tuple(window_size) == (-1, -1) and softcap == 0


def count(function, causal, queries, keys):
    """Note a call. kind: as many queries as keys, one query, or some that stand behind others."""
    shape = "one query" if queries == 1 else "all" if queries == keys else "behind"
    CALLS[f"{function} {'causal' if causal else 'full'} {shape}"] += 1


# ----------------------------------------------------------------------------------------------
# the plugin


def install():
    """Put every Qwen3-VL of this process on the path."""
    import model
    from engine import shared_prefix

    padding = (flash_loader._pad_input, flash_loader._unpad_input)  # those of transformers itself
    functions = (flash_attn_func, flash_attn_varlen_func, None, *padding)
    flash_loader._lazy_imports = lambda *args, **kwargs: functions
    flash_integration._use_top_left_mask = False
    PreTrainedModel._flash_attn_can_dispatch = lambda self, *args, **kwargs: True

    stock_init = Qwen3VLForConditionalGeneration.__init__

    def init(self, config):
        stock_init(self, config)
        self.set_attn_implementation("flash_attention_2")

    def use_attention(model, name):
        model.set_attn_implementation("flash_attention_2")
        return "flash_attention_2", ""

    Qwen3VLForConditionalGeneration.__init__ = init
    model.use_attention = use_attention
    shared_prefix.takes_copies = lambda model, tokens: True


def pytest_configure(config):
    install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    before = CALLS.total()
    result = yield
    if CALLS.total() == before:
        WITHOUT_CALLS.append(item.nodeid)
    return result


def pytest_sessionfinish(session, exitstatus):
    if not CALLS and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("flash-attn")
    for kind, calls in sorted(CALLS.items()):
        terminalreporter.write_line(f"{kind}: {calls} calls")
    if not CALLS:
        terminalreporter.write_line("no test called flash-attn: nothing was tested")
    terminalreporter.write_line(f"tests without a call: {len(WITHOUT_CALLS)}")
    if config.get_verbosity() > 0:
        for name in WITHOUT_CALLS:
            terminalreporter.write_line(f"  {name}")
