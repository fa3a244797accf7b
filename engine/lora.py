"""LoRA (arXiv 2106.09685) on the language model: y = W x + scale B (A x), with W frozen.

With the adapters off the model is the one that training started from: the reference of the KL.
"""

import contextlib

import torch
from torch import nn


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank adapter, made of a stock one; its own weights keep their
    names."""

    scale = 2.0  # alpha / rank
    on = True

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        # Adapters are float32, also where all else is bf16.
        a = self.lora_a.to(x.dtype)
        b = self.lora_b.to(x.dtype)
        return y + self.scale * (x @ a.T @ b.T)


def add_adapters(model, rank, seed):
    """Adapters on the linear layers of the language model; nothing else is trained.

    B starts at 0: the model is unchanged at first.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # the same on every rank
    for layer in model.model.language_model.layers.modules():
        if type(layer) is not nn.Linear:
            continue
        bound = layer.in_features**-0.5
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        a = a.to(layer.weight.device)
        layer.__class__ = LoRALinear
        layer.lora_a = nn.Parameter(a)  # (rank, in)
        layer.lora_b = nn.Parameter(a.new_zeros(layer.out_features, rank))  # (out, rank)
    return model


def has_adapters(model):
    return any(isinstance(module, LoRALinear) for module in model.modules())


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is as it was before its adapters. Nothing happens to a model without
    any."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def merge_adapters(weights):
    """A state dict with W + scale B A in the place of its adapters."""
    adapted = [name for name in weights if name.endswith(".lora_a")]
    for name in adapted:
        layer = name.removesuffix("lora_a")
        a = weights.pop(f"{layer}lora_a")
        b = weights.pop(f"{layer}lora_b")
        weights[f"{layer}weight"] = weights[f"{layer}weight"].to(a.dtype) + LoRALinear.scale * b @ a
    return weights
