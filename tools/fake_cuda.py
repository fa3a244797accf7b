"""A CUDA card that computes nothing, on a computer without one: for tools.dryrun.

A program runs on fake tensors: they have shape, dtype and device and take part in autograd and
FSDP2, but hold no numbers. So a model of any size fits, and every branch, cast and device of the
CUDA path is taken as in earnest. What is asked of the numbers themselves is answered like this:

    integers and booleans    keep their values on the CPU, beside the fake: masks, `.item()`,
                             `unique` and shapes that depend on data are as in earnest
    sampled tokens           are made up, by a function that the caller gives
    a float                  that the program asks for is 1

    install()                                        # once, before anything touches torch.cuda
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    card = FakeCard(sampled, vocabulary)
    patch(card)
    with card:
        ...
    card.peak, card.at_peak                          # bytes on the card; {kind: bytes}

It reaches into the insides of torch, which is why it works with one version of it (TORCH) alone.

What it does not see: wrong numbers, an index out of range, alignment, races between streams, NCCL,
fragmentation, and what the CUDA context, NCCL and cuBLAS take for themselves (2 to 3 GB).
"""

import collections
import contextlib
import ctypes
import functools
import os
import weakref

import torch
import transformers.utils.import_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import _sharding_prop
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

TORCH = "2.13"
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

# The fake kernels let operands of several dtypes pass; those of a card do not.
OF_ONE_DTYPE = {
    *("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    *("layer_norm", "native_layer_norm", "searchsorted"),
}
# Operations whose result has a shape that depends on the values of its operands.
SHAPED_BY_DATA = {"nonzero", "_unique2", "bincount", "repeat_interleave"}
MOST_VALUES = 2**20  # larger integer tensors keep no values
MOST_FLOAT_VALUES = 2**12  # floats keep theirs while they are small: constants, positions, shares


def is_supported():
    return torch.__version__.startswith(TORCH)


# ----------------------------------------------------------------------------------------------
# what a build of torch without CUDA lacks


def install():
    """Make torch believe in a CUDA device: a device guard, an accelerator, streams and events."""
    if not torch.backends.cuda.is_built():
        add_device_guard()
        add_accelerator()
    add_streams()


def library(name):
    return ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))


def constant_function(answer):
    """A C function that returns `answer` whatever it is given; never freed."""
    function = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: answer)
    keep_for_ever(function)
    return ctypes.cast(function, ctypes.c_void_p).value


def keep_for_ever(thing):
    """C++ will hold its address until the process ends, longer than Python would."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def add_device_guard():
    """Registers a guard that says "0 devices": torch then puts a fake guard in its place itself."""
    registry_name = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * 21).in_dll(library("libc10.so"), registry_name)
    methods = (ctypes.c_void_p * 99)(*[constant_function(0)] * 99)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(methods))  # an object: its table of methods
    keep_for_ever(methods)
    keep_for_ever(guard)
    registry[1] = ctypes.addressof(guard)  # 1: DeviceType::CUDA
    torch._C._ensureCUDADeviceGuardSet()


def add_accelerator():
    """The autograd engine asks CUDA's hooks whether CUDA was built in: let them say yes."""
    get_hooks = library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())
    methods = (ctypes.c_void_p * 60)(*(ctypes.c_void_p * 60).from_address(hooks.value))
    methods[2] = constant_function(1)  # isBuilt
    methods[4] = constant_function(1)  # hasPrimaryContext
    keep_for_ever(methods)
    hooks.value = ctypes.addressof(methods)


class Stream:
    """Stands for a stream or an event: there is nothing to wait for."""

    def wait(self, *args):
        return self

    wait_stream = wait_event = record = record_event = synchronize = wait


def add_streams():
    the_stream = Stream()
    torch.accelerator.current_stream = lambda *args: the_stream
    torch.cuda.Stream = torch.cuda.Event = lambda *args, **kwargs: the_stream
    torch.cuda.current_stream = lambda device=None: the_stream
    torch.cuda.stream = contextlib.nullcontext
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # of a Hopper card
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.mem_get_info = lambda device=None: (1e12, 1e12)
    torch.cuda.max_memory_allocated = lambda device=None: 0


# ----------------------------------------------------------------------------------------------
# the card


def value_of(tensor):
    """The values of a tensor on the CPU; None for a fake one that has none."""
    if isinstance(tensor, FakeTensor):
        return tensor.__dict__.get("value", tensor.constant)
    return tensor


class FakeCard(FakeTensorMode):
    """Inside, tensors are fake; the bytes of those on the card are counted, by kind.

    sampled(tensor): made-up values for the result of a sampling operation, like the tensor given;
    vocabulary: a tensor whose last dimension is that long counts as "logits".
    """

    def __init__(self, sampled, vocabulary):
        super().__init__()
        self.sampled = sampled
        self.vocabulary = vocabulary
        self.depth = 0  # of operations that are made of others: the outermost one counts
        self.kind = "other"  # of what is allocated now
        self.weight_shapes = set()  # shapes of the matrices of the model
        self.blocks = {}  # storage -> (bytes, kind)
        self.now = 0  # bytes
        self.peak = 0
        self.by_kind = collections.Counter()
        self.at_peak = {}  # by_kind, when the peak was reached

    # What an operation does.

    def dispatch(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        flat, spec = tree_flatten((args, kwargs or {}))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        known = all(value_of(x) is not None for x in tensors)

        if name in OF_ONE_DTYPE:
            dtypes = {x.dtype for x in tensors if x.dtype.is_floating_point}
            if len(dtypes) > 1:
                raise RuntimeError(f"{name} of {' and '.join(sorted(map(str, dtypes)))}")

        def compute():
            """The operation on the values, on the CPU."""
            values = []
            for x in flat:
                if isinstance(x, torch.Tensor):
                    values.append(value_of(x))
                else:
                    values.append(CPU if isinstance(x, torch.device) else x)
            with no_dispatch():
                real_args, real_kwargs = tree_unflatten(values, spec)
                return func(*real_args, **real_kwargs)

        if name in ("_local_scalar_dense", "item"):
            return value_of(tensors[0]).item() if known else 1
        if name == "is_nonzero" and known:  # inference mode does not take it apart
            return bool(value_of(tensors[0]))
        if name == "masked_select":
            states, mask = args[:2]
            selected = int(value_of(mask).sum()) * states.numel() // mask.numel()
            return self.new(states, [selected])
        if name in SHAPED_BY_DATA and known:
            return tree_map(lambda value: self.new(args[0], value.shape, value), compute())

        self.depth += 1
        try:
            out = super().dispatch(func, types, args, kwargs or {})
        finally:
            self.depth -= 1
        results = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if results and known and not random and "empty" not in name and self.small(results):
            for result, value in zip(results, tree_leaves(compute())):
                result.value = value
        else:
            for result in results:  # perhaps written with something unknown
                result.__dict__.pop("value", None)
            if name in ("searchsorted", "argmax"):
                out.value = self.sampled(out)
        if self.depth == 0:
            for result in results:
                self.count(result)
        return out

    def small(self, tensors):
        """Are they small enough to keep values?"""
        for x in tensors:
            most = MOST_FLOAT_VALUES if x.dtype.is_floating_point else MOST_VALUES
            if x.numel() >= most:
                return False
        return True

    def new(self, like, shape, value=None, device=None):
        """A fake tensor, with values if they are integers."""
        dtype = like.dtype if value is None else value.dtype
        with self:
            out = torch.empty(shape, dtype=dtype, device=device or like.device)
        if value is not None and not dtype.is_floating_point:
            out.value = value_of(value)
        return out

    # The bytes.

    def count(self, tensor):
        """Count the storage of a tensor on the card, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.fake_device.type != "cuda" or key in self.blocks:
            return
        kind = self.kind
        if tensor.dim() and tensor.shape[-1] == self.vocabulary:
            kind = "logits"
        elif kind == "activations" and self.in_update and tensor.shape in self.weight_shapes:
            kind = "whole gradients"
        self.blocks[key] = 0, kind
        self.resize(key, storage.nbytes())
        weakref.finalize(storage, self.free, key)

    in_update = False

    def resize(self, key, size):
        old, kind = self.blocks[key]
        self.blocks[key] = size, kind
        self.now += size - old
        self.by_kind[kind] += size - old
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = dict(self.by_kind)

    def free(self, key):
        self.resize(key, 0)
        del self.blocks[key]

    def relabel(self, value, kind):
        """From now on, the tensors in this value, in dicts and lists, are of this kind."""
        for tensor in tree_leaves(value):
            key = tensor.untyped_storage()._cdata if isinstance(tensor, FakeTensor) else None
            if key in self.blocks:
                size, _ = self.blocks[key]
                self.resize(key, 0)
                self.blocks[key] = 0, kind
                self.resize(key, size)

    def restart_peak(self):
        self.peak = self.now
        self.at_peak = dict(self.by_kind)

    def tag(self, owner, name, kind):
        """From now on, what the function `owner.name` allocates is of this kind."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def tagged(*args, **kwargs):
            before = self.kind
            self.kind = kind
            try:
                return function(*args, **kwargs)
            finally:
                self.kind = before

        setattr(owner, name, tagged)


# ----------------------------------------------------------------------------------------------
# what fake tensors need of torch and transformers


def patch(card):
    """Mend the places in which torch and transformers do not expect fake tensors with values."""
    patch_storage(card)
    patch_tensors()
    torch.nn.Module._apply = apply_to_data
    torch.nn.functional.scaled_dot_product_attention = attention
    # DTensor tries its rules on whole tensors, in whatever mode is active: not in the counted one.
    _sharding_prop.detect_fake_mode = lambda *args: None
    # transformers would not look at the masks of fake tensors.
    transformers.utils.import_utils.is_fake_tensor = lambda x: False
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator()


def patch_storage(card):
    """FSDP frees and fills its buffers by resizing their storage: count that, too."""
    resize_storage = torch.UntypedStorage.resize_

    def resize(storage, size):
        resize_storage(storage, size)
        if storage._cdata in card.blocks:
            card.resize(storage._cdata, size)

    torch.UntypedStorage.resize_ = resize


def patch_tensors():
    """Assignment to `.data` across devices, deepcopy, tolist, and torch.tensor of fake numbers."""
    data = torch._C.TensorBase.data
    make_tensor = torch.tensor

    def set_data(tensor, new):
        data.__set__(tensor, new)
        tensor.fake_device = new.fake_device

    def deepcopy(tensor, memo):
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        return memo.setdefault(id(tensor), copied)

    def real_number(x):
        return x.item() if isinstance(x, FakeTensor) else x

    FakeTensor.data = property(data.__get__, set_data)
    FakeTensor.__deepcopy__ = deepcopy
    FakeTensor.tolist = lambda tensor: value_of(tensor).tolist()
    torch.tensor = lambda x, *args, **kwargs: make_tensor(tree_map(real_number, x), *args, **kwargs)


def apply_to_data(module, function, recurse=True):
    """Module._apply, as of `.to`: torch's would swap tensors, which fake ones refuse."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if isinstance(parameter, FakeTensor):
                parameter.data = function(parameter.data)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """scaled_dot_product_attention by a kernel that CUDA takes.

    That is the flash kernel for bf16 without a mask, else the memory-efficient one; on the latest
    cards cuDNN's, which takes as little memory. (A build without CUDA would take the plain one,
    with all scores in memory.)
    """
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = bias.masked_fill_(~attn_mask, -torch.inf)
        # The kernel wants rows whose length is a multiple of 16.
        bias = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : key.shape[2]]
        attn_mask = bias.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
