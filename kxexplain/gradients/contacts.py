"""Where parameters meet data: for each operation, what to keep and how it becomes per-example gradients.

A contact is a line in :data:`CONTACTS` (what to keep when the call is seen) and one in :data:`ASSEMBLY` (how
the gradient at the call's output turns into :class:`~kxexplain.gradients.factors.Outer` or ``Dense``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kxexplain.gradients.factors import Dense, Factors, Outer, compact, worth_writing
from kxexplain.gradients.sources import Source
from kxexplain.gradients.uses import Axis, Use

FIRST = Axis(0)

Sources = Mapping[int, Source]
Made = tuple[str, dict[str, Source], dict[str, Any]] | None

REARRANGEMENTS = frozenset(
    """
    getitem view reshape t transpose permute flatten unflatten squeeze unsqueeze expand expand_as narrow select
    index_select split split_with_sizes chunk unbind movedim contiguous embedding get:T get:mT view_as
    """.split()
)
"""Operations that only pick or move elements, so that the same call on positions tells which went where."""


def argument(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    """An operand, by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def source_of(sources: Sources, tensor: Any) -> Source | None:
    """The parameter that a value is, if it is one."""
    return sources.get(id(tensor)) if isinstance(tensor, Tensor) else None


def used_as(**found: Source | None) -> dict[str, Source]:
    """The parameters found, by role."""
    return {role: source for role, source in found.items() if source is not None}


def _linear(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
    bias = argument(args, kwargs, 2, "bias")
    if source_of(sources, x) is not None or axis.axis == output.dim() - 1:
        return None
    return "linear", used_as(weight=source_of(sources, weight), bias=source_of(sources, bias)), {"x": x}


def _matmul(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    x, weight = args[0], argument(args, kwargs, 1, "other")
    if source_of(sources, x) is not None or weight.dim() != 2 or x.dim() < 2 or axis.axis == output.dim() - 1:
        return None
    return "matmul", used_as(weight=source_of(sources, weight)), {"x": x}


def _convolution(dimensions: int) -> Callable[..., Made]:
    def contact(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        defaults = (None, None, None, 1, 0, 1, 1)
        x, weight, bias, stride, padding, dilation, groups = (
            argument(args, kwargs, i, name, default)
            for i, (name, default) in enumerate(zip(names, defaults, strict=True))
        )
        if axis != Axis(0) or source_of(sources, x) is not None or x.dim() != dimensions + 2:
            return None
        each = [v if isinstance(v, str) else _tuple(v, dimensions) for v in (stride, padding, dilation)]
        held = {
            "x": x,
            "kernel": tuple(weight.shape[2:]),
            "stride": each[0],
            "padding": each[1],
            "dilation": each[2],
        }
        return (
            "conv",
            used_as(weight=source_of(sources, weight), bias=source_of(sources, bias)),
            {**held, "groups": groups},
        )

    return contact


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * length if len(value) == 1 else tuple(value)


def _embedding(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """``torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)``."""
    weight, indices = args[:2]
    padding = argument(args, kwargs, 2, "padding_idx", -1)
    if argument(args, kwargs, 3, "scale_grad_by_freq", False) or axis.axis >= indices.dim():
        return None
    return "embedding", used_as(weight=source_of(sources, weight)), {"indices": indices, "padding": padding}


def _norm(normalise: Callable[..., Tensor], weight_at: int, channels: bool) -> Callable[..., Made]:
    def contact(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
        if kwargs or (axis != Axis(0) and channels):
            return None
        weight = source_of(sources, args[weight_at] if len(args) > weight_at else None)
        bias = source_of(sources, args[weight_at + 1] if len(args) > weight_at + 1 else None)
        with torch.no_grad():
            x = normalise(*args)
        return "affine", used_as(weight=weight, bias=bias), {"x": x, "channels": channels}

    return contact


def _layer_normalised(
    x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return F.layer_norm(x, shape, None, None, eps)


def _group_normalised(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, *_: Any) -> Tensor:
    return F.group_norm(x, groups, None, None, eps)


def _batch_normalised(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    if training:
        return F.batch_norm(x, None, None, None, None, True, 0.0, eps)
    return F.batch_norm(x, mean, var, None, None, False, 0.0, eps)


def _instance_normalised(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    if not use_input:
        return F.batch_norm(x, mean, var, None, None, False, 0.0, eps)
    return F.instance_norm(x, eps=eps)


def _elementwise(kind: str) -> Callable[..., Made]:
    def contact(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
        if kwargs or len(args) != 2:
            return None
        left, right = (source_of(sources, a) for a in args)
        if (left is None) == (right is None):
            return None
        source, other = (left, args[1]) if left is not None else (right, args[0])
        assert source is not None
        missing = output.dim() - source.tensor.dim()
        if axis.axis >= missing and source.tensor.shape[axis.axis - missing] != 1:
            return None
        sign = -1.0 if (kind == "sub" and right is not None) or (kind == "rsub" and left is not None) else 1.0
        return "broadcast", {"weight": source}, {"factor": other if kind == "mul" else sign}

    return contact


CONTACTS: dict[str, Callable[..., Made]] = {
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "conv1d": _convolution(1), "conv2d": _convolution(2),
    "conv3d": _convolution(3), "embedding": _embedding, "layer_norm": _norm(_layer_normalised, 2, False),
    "group_norm": _norm(_group_normalised, 2, True), "batch_norm": _norm(_batch_normalised, 1, True),
    "instance_norm": _norm(_instance_normalised, 1, True), "add": _elementwise("add"), "sub": _elementwise("sub"),
    "rsub": _elementwise("rsub"), "mul": _elementwise("mul"), "add_": _elementwise("add"),
    "sub_": _elementwise("sub"),
}  # fmt: skip


def rows_first(value: Tensor, axis: Axis, rows: int) -> Tensor:
    """The example axis first, [n, …]; entries that share it follow as a second axis."""
    moved = value.movedim(axis.axis, 0)
    if axis.inner == 1:
        return moved
    if axis.outermost:
        return moved.reshape(rows, axis.inner, *moved.shape[1:])
    return moved.reshape(axis.inner, rows, *moved.shape[1:]).transpose(0, 1)


def stacked(use: Use, gradients: Tensor) -> Tensor:
    """Gradients [c, …output] with examples first: [n, c, …]; no copy where the output has them first."""
    if use.axis == FIRST:
        return gradients.transpose(0, 1)
    if gradients.shape[0] == 1:
        return rows_first(gradients[0], use.axis, use.rows)[:, None]
    return torch.stack([rows_first(g, use.axis, use.rows) for g in gradients], 1)


def is_rearranged(use: Use) -> bool:
    """Whether a parameter is used otherwise than as it is stored: a slice or a transpose of it, say."""
    return any(source.index is not None for source in use.sources.values())


def is_plain(use: Use) -> bool:
    """Whether it is a linear layer, as stored, that meets one vector of each example: the commonest use, by far."""
    return (
        use.kind in ("linear", "matmul")
        and "weight" in use.sources
        and use.axis == FIRST
        and use.held["x"].dim() == 2
        and not is_rearranged(use)
    )


def assemble_linear(use: Use, gradients: Tensor) -> Factors:
    """``linear`` and ``x @ w``: one outer product per position."""
    weight, bias = use.sources.get("weight"), use.sources.get("bias")
    x, transposed = use.held["x"].detach(), use.kind == "matmul"
    name = None if bias is None else bias.name
    if weight is not None and is_plain(use):
        one = gradients.shape[0] == 1
        g = gradients.reshape(len(x), 1, 1, -1) if one else stacked(use, gradients).unsqueeze(2)
        return [Outer(weight.name, name, x.unsqueeze(1), g, transposed)]
    a = rows_first(x, use.axis, use.rows).reshape(use.rows, -1, x.shape[-1])
    g = stacked(use, gradients).reshape(use.rows, gradients.shape[0], -1, gradients.shape[-1])
    if weight is not None and not is_rearranged(use):
        return compact(Outer(weight.name, name, a, g, transposed))
    made: Factors = [] if bias is None else [_placed(bias, g.sum(2))]
    if weight is not None:
        made.append(_placed(weight, Outer("", None, a, g, transposed).dense()[0].values))
    return made


def _assemble_conv(use: Use, gradients: Tensor) -> Factors:
    """Unfold the input into patches; each example's gradient is then a product over positions.

    All c outputs of an example are multiplied with its patches in one matrix product, and on maps of few positions
    the product is not taken at all (:func:`~kxexplain.gradients.factors.compact`).
    """
    held, groups = use.held, use.held["groups"]
    weight, bias = use.sources.get("weight"), use.sources.get("bias")
    g = stacked(use, gradients).flatten(3)  # [n, c, out, r]
    n, c, out, positions = g.shape
    if weight is None:
        return [] if bias is None else [_placed(bias, g.sum(3))]
    patches = _patches(held["x"].detach(), held["kernel"], held["stride"], held["padding"], held["dilation"])
    if groups == 1 and weight.index is None and (bias is None or bias.index is None):
        a, name = patches.transpose(1, 2), None if bias is None else bias.name
        if not worth_writing(positions, a.shape[2], out):
            return [Outer(weight.name, name, a.contiguous(), g.transpose(2, 3).contiguous())]
        values = g.reshape(n, c * out, positions) @ a
        written: Factors = [Dense(weight.name, values.view(n, c, -1))]
        return written if name is None else [*written, Dense(name, g.sum(3))]
    columns = patches.reshape(n, groups, -1, positions).transpose(2, 3)  # [n, G, r, in·k]
    grouped = g.reshape(n, c, groups, -1, positions).transpose(1, 2).reshape(n, groups, -1, positions)
    values = (grouped @ columns).view(n, groups, c, -1).transpose(1, 2)
    made: Factors = [_placed(weight, values.reshape(n, c, -1))]
    return made if bias is None else [*made, _placed(bias, g.sum(3))]


def _patches(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """[n, channel, …] → [n, channel · kernel element, position], in the order in which kernels are stored."""
    dimensions = len(kernel)
    if padding == "valid":
        padding = (0,) * dimensions
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in padding]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for d in range(dimensions):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    where = range(2, 2 + dimensions)
    return x.permute(0, 1, *(d + dimensions for d in where), *where).flatten(1, 1 + dimensions).flatten(2)


def _assemble_embedding(use: Use, gradients: Tensor) -> Factors:
    """Add each token's gradient to its row of the table."""
    n, c = use.rows, gradients.shape[0]
    weight = use.sources["weight"]
    vocabulary, width = weight.tensor.shape
    indices = rows_first(use.held["indices"], use.axis, n).reshape(n, 1, -1, 1)
    g = stacked(use, gradients).reshape(n, c, -1, width)
    g = g * (indices != use.held["padding"]) if use.held["padding"] >= 0 else g
    values = g.new_zeros(n, c, vocabulary, width).scatter_add_(2, indices.expand_as(g), g)
    return [_placed(weight, values.flatten(2))]


def assemble_affine(use: Use, gradients: Tensor) -> Factors:
    """Gain and shift of a norm: per channel, or over the normalised trailing dimensions."""
    n, c = use.rows, gradients.shape[0]
    g, x = stacked(use, gradients), rows_first(use.held["x"], use.axis, n)[:, None]
    if use.held["channels"]:
        g, x = g.movedim(2, -1), x.movedim(2, -1)
    made: Factors = []
    for role, value in (("weight", g * x), ("bias", g)):
        if role in use.sources:
            source = use.sources[role]
            made.append(_placed(source, value.reshape(n, c, -1, source.tensor.numel()).sum(2)))
    return made


def assemble_broadcast(use: Use, gradients: Tensor) -> Factors:
    """A parameter broadcast against data: sum the gradient over the axes it was broadcast along."""
    source, c = use.sources["weight"], gradients.shape[0]
    factor = use.held["factor"]
    full = (1,) * (len(use.shape) - source.tensor.dim()) + tuple(source.tensor.shape)
    scaled = gradients * (factor.detach() if isinstance(factor, Tensor) else factor)
    dims = [d + 1 for d in range(len(full)) if full[d] == 1 and d != use.axis.axis]
    summed = scaled.sum(dims, keepdim=True) if dims else scaled
    values = torch.stack([rows_first(g, use.axis, use.rows) for g in summed], 1)
    if use.axis.inner > 1:
        values = values.sum(2)
    return [_placed(source, values.reshape(use.rows, c, -1))]


def _placed(source: Source, values: Tensor) -> Dense:
    """Gradients of a rearrangement, put back at their places in the parameter."""
    if source.index is None:
        return Dense(source.name, values)
    n, c, _ = values.shape
    placed = values.new_zeros(n, c, source.size)
    return Dense(source.name, placed.index_add_(2, source.index.flatten(), values))


ASSEMBLY: dict[str, Callable[[Use, Tensor], Factors]] = {
    "linear": assemble_linear, "matmul": assemble_linear, "conv": _assemble_conv, "embedding": _assemble_embedding,
    "affine": assemble_affine, "broadcast": assemble_broadcast,
}  # fmt: skip
