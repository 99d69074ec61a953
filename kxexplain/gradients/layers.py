"""Contacts of rarer layers: transposed convolutions, bilinear layers, bags of embeddings, PReLU, RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kxexplain.gradients.contacts import (
    Made,
    Sources,
    _patches,
    _placed,
    _tuple,
    argument,
    rows_first,
    source_of,
    used_as,
)
from kxexplain.gradients.factors import Factors
from kxexplain.gradients.uses import Axis, Use


def _transposed(dimensions: int) -> Callable[..., Made]:
    def contact(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        defaults = (None, None, None, 1, 0, 0, 1, 1)
        x, weight, bias, stride, padding, _, groups, dilation = (
            argument(args, kwargs, i, name, default)
            for i, (name, default) in enumerate(zip(names, defaults, strict=True))
        )
        if axis != Axis(0) or source_of(sources, x) is not None or x.dim() != dimensions + 2:
            return None
        held = {"x": x, "kernel": tuple(weight.shape[2:]), "groups": groups}
        held |= {
            k: _tuple(v, dimensions) for k, v in (("stride", stride), ("padding", padding), ("dilation", dilation))
        }
        return "conv_transpose", used_as(weight=source_of(sources, weight), bias=source_of(sources, bias)), held

    return contact


def _assemble_transposed(use: Use, gradients: Tensor) -> Factors:
    """A convolution with input and output exchanged: patches of the gradient meet the input, position by position."""
    held, groups = use.held, use.held["groups"]
    x, g = held["x"].detach(), torch.stack(list(gradients), 1)
    (n, channels), c = x.shape[:2], g.shape[1]
    made: Factors = []
    if "weight" in use.sources:
        kernel, stride, dilation = held["kernel"], held["stride"], held["dilation"]
        pads = []  # so that there are as many patches as input positions, whatever the output's padding
        for d, before in reversed(list(enumerate(held["padding"]))):
            reach = (x.shape[2 + d] - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + 1
            pads += [before, reach - before - g.shape[3 + d]]
        padded = F.pad(g.flatten(0, 1), pads)
        patches = _patches(padded, kernel, stride, (0,) * len(kernel), dilation)  # [n·c, out·k, r]
        patches = patches.reshape(n, c, groups, -1, patches.shape[-1]).transpose(3, 4)
        values = x.reshape(n, 1, groups, channels // groups, -1) @ patches  # [n, c, G, in, out·k]
        made.append(_placed(use.sources["weight"], values.reshape(n, c, -1)))
    if "bias" in use.sources:
        made.append(_placed(use.sources["bias"], g.flatten(3).sum(3)))
    return made


def _bilinear(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """y_o = x₁ᵀ W_o x₂ + b_o: a linear layer applied to x₁ ⊗ x₂, its matrix W stored as (o, d₁, d₂)."""
    left, right, weight, bias = (
        argument(args, kwargs, place, name) for place, name in enumerate(("input1", "input2", "weight", "bias"))
    )
    if any(source_of(sources, x) is not None for x in (left, right)) or axis.axis == output.dim() - 1:
        return None
    with torch.no_grad():
        pairs = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
    return "linear", used_as(weight=source_of(sources, weight), bias=source_of(sources, bias)), {"x": pairs}


def embedding_bag(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis, leaf: int = 0) -> Made:
    """The bags, the first of the outputs of ``torch.embedding_bag``.

    The weights of the bags' members (``per_sample_weights``) are data here; as parameters they have no contact.
    """
    names = ("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
             "include_last_offset", "padding_idx")  # fmt: skip
    weight, indices, offsets, by_frequency, mode, _, weights, last, padding = (
        argument(args, kwargs, place, name) for place, name in enumerate(names)
    )
    if leaf or by_frequency or axis.axis or source_of(sources, weights) is not None:
        return None
    with torch.no_grad():
        if mode == 2:
            _, _, sizes, places = torch.embedding_bag(*args, **kwargs)
            held = {"indices": places, "share": (sizes > 0).to(weight.dtype)}
        else:
            starts = offsets[:-1] if last else offsets
            bag = torch.bucketize(torch.arange(len(indices), device=indices.device), starts, right=True) - 1
            kept = torch.ones_like(indices) if padding is None else (indices != padding % len(weight)).to(indices.dtype)
            share = kept.to(weight.dtype) if weights is None else kept * weights
            if mode == 1:
                share = share / torch.zeros_like(starts).index_add_(0, bag, kept)[bag].clamp_min(1)
            held = {"bag": bag, "indices": indices, "share": share}
    return "embedding_bag", used_as(weight=source_of(sources, weight)), held


def _assemble_bag(use: Use, gradients: Tensor) -> Factors:
    """Each bag's gradient goes to the rows it was made of: in the shares they had, or to each feature's largest."""
    source, held, (c, bags, width) = use.sources["weight"], use.held, gradients.shape
    vocabulary, share = source.tensor.shape[0], held["share"][:, None, None]
    if "bag" in held:
        g = gradients[:, held["bag"]].transpose(0, 1) * share  # [index, c, d]
        rows = held["bag"] * vocabulary + held["indices"]
        table = g.new_zeros(bags * vocabulary, c, width).index_add_(0, rows, g).view(bags, vocabulary, c, width)
    else:
        g = (gradients.transpose(0, 1) * share).unsqueeze(1)  # [bag, 1, c, d]
        rows = held["indices"].to(torch.int64)[:, None, None].expand_as(g)
        table = g.new_zeros(bags, vocabulary, c, width).scatter_add_(1, rows, g)
    values = rows_first(table.transpose(1, 2), use.axis, use.rows)
    return [_placed(source, (values.sum(1) if use.axis.inner > 1 else values).flatten(2))]


def _prelu(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """Relu(x) − w relu(−x): w meets the negative part of x, along axis 1."""
    x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
    source = source_of(sources, weight)
    if source is None or source_of(sources, x) is not None or axis != Axis(0):
        return None
    return "affine", {"weight": source}, {"x": x.detach().clamp_max(0), "channels": weight.numel() > 1}


def _rms_norm(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """Only the gain: an RMS norm has no shift."""
    x, shape, weight, eps = (
        argument(args, kwargs, place, name) for place, name in enumerate(("input", "normalized_shape", "weight", "eps"))
    )
    source = source_of(sources, weight)
    if source is None or source_of(sources, x) is not None or axis.axis >= output.dim() - len(shape):
        return None
    with torch.no_grad():
        return "affine", {"weight": source}, {"x": F.rms_norm(x, shape, None, eps), "channels": False}


def _addmm(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """Bias + x @ w, as Hugging Face's ``Conv1D`` computes it."""
    if len(args) != 3 or any(value != 1 for value in kwargs.values()) or axis.axis != 0:
        return None
    bias, x, weight = args
    if source_of(sources, x) is not None or (source_of(sources, bias) is not None and bias.dim() != 1):
        return None
    return "matmul", used_as(weight=source_of(sources, weight), bias=source_of(sources, bias)), {"x": x}


CONTACTS: dict[str, Callable[..., Made]] = {
    "conv_transpose1d": _transposed(1), "conv_transpose2d": _transposed(2), "conv_transpose3d": _transposed(3),
    "bilinear": _bilinear, "prelu": _prelu, "rms_norm": _rms_norm, "addmm": _addmm,
}  # fmt: skip
ASSEMBLY: dict[str, Callable[[Use, Tensor], Factors]] = {
    "conv_transpose": _assemble_transposed, "embedding_bag": _assemble_bag,
}  # fmt: skip
