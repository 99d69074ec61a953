"""Norm layers and variances, written in elementary operations; arguments are those of the torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kxexplain.gradients.rules import secant


def _centred(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """(x − mean)/√(var + ε) over ``dims``."""
    shifted = x - x.mean(dims, keepdim=True)
    return shifted * torch.rsqrt(shifted.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled_x = x if weight is None else x * weight
    return scaled_x if bias is None else scaled_x + bias


def layer_norm(
    func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """Layer norm over the trailing dimensions."""
    return _affine(_centred(input, list(range(-len(shape), 0)), eps), weight, bias)


def rms_norm(func: Any, input: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """x/√(mean(x²)+ε) over the trailing dimensions."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    dims = list(range(-len(shape), 0))
    return _affine(input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps), weight, None)


def _channels(parameter: Any, like: Any) -> Any:
    return None if parameter is None else parameter.reshape(-1, *[1] * (like.dim() - 2))


def group_norm(
    func: Any, input: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """Group norm: centred within groups of channels."""
    grouped = input.reshape(input.shape[0], groups, -1)
    centred = _centred(grouped, [-1], eps).reshape(input.shape)
    return _affine(centred, _channels(weight, input), _channels(bias, input))


def batch_norm(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """Batch norm; when evaluating, the running statistics are themselves known at two points."""
    if training:
        centred = _centred(input, [d for d in range(input.dim()) if d != 1], eps)
    else:
        centred = (input - _channels(mean, input)) * torch.rsqrt(_channels(var, input) + eps)
    return _affine(centred, _channels(weight, input), _channels(bias, input))


def instance_norm(
    func: Any,
    input: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """Instance norm over the spatial dimensions."""
    if not use_input:
        return batch_norm(func, input, weight, bias, mean, var, False, momentum, eps)
    centred = _centred(input, list(range(2, input.dim())), eps)
    return _affine(centred, _channels(weight, input), _channels(bias, input))


def variance(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Variance over all or some dimensions, with Bessel's correction unless told otherwise."""
    x = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else None)
    unbiased = kwargs.get("unbiased", args[2] if len(args) > 2 else None)
    if isinstance(dim, bool) or (len(args) > 1 and isinstance(args[1], bool)):
        dim, unbiased = None, args[1]
    correction = kwargs.get("correction", 1 if unbiased in (None, True) else 0)
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    size = 1
    for d in dims:
        size *= x.shape[d]
    shifted = x - x.mean(dims, keepdim=True)
    return shifted.square().sum(dims, keepdim=bool(kwargs.get("keepdim", False))) / (size - (correction or 0))


def deviation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Square root of the variance."""
    return variance(func, args, kwargs).sqrt()


def vector_norm(
    func: Any, input: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """Euclidean norm as √Σx²; other orders by secant."""
    if ord not in (2, 2.0, "fro", None):
        return secant(func, (input, ord, dim, keepdim), {"dtype": dtype})
    dims = list(range(input.dim())) if dim is None else dim
    return torch.sqrt(input.square().sum(dims, keepdim=keepdim))
