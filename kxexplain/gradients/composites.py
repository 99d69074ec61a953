r"""Composite operations written in elementary ones, so that each part has its own exact linear map.

Softmax has a closed form of its own. With p = softmax(u), p' = softmax(u') and L the elementwise
logarithmic mean of p and p', log p'−log p = Δu − Δlse·1 and p'−p = L⊙(log p'−log p); summing to zero gives
Δlse = ⟨L, Δu⟩/ΣL, hence the exact maps

    softmax: J = diag(L) − L Lᵀ/ΣL      log_softmax: J = I − 1 Lᵀ/ΣL      logsumexp: J = Lᵀ/ΣL

which are the ordinary Jacobians with L in the place of p: symmetric, positive semi-definite, and free of
overflow for logits of any size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kxexplain.gradients.rules import quadratic, secant, settle
from kxexplain.gradients.secant import logarithmic_mean
from kxexplain.gradients.two_point import TwoPoint, Untraceable, is_two_point


def _log_softmaxes(u: TwoPoint, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log p, log p' and L along ``dim``."""
    with torch.no_grad():
        start, end = u.start.log_softmax(dim), u.end.log_softmax(dim)
        return start, end, logarithmic_mean(start, end)


def softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TwoPoint:
    """Softmax along a dimension, by the closed form above.

    J = P diag(L) with P m = m − w Σm and w = L/ΣL. P P = P, and the second P removes the rounding of the first: J·1 = 0
    then holds far below the rounding of J, and a shift common to all logits costs no digits.
    """
    u, dim = _input_and_dim(args, kwargs)
    start, end, mean = _log_softmaxes(u, dim)
    start, end = start.exp(), end.exp()
    weights = mean / mean.sum(dim, keepdim=True)
    with u.tracer.watching():
        finite = u.middle.masked_fill(~u.middle.isfinite(), 0.0)  # masked out: L = 0 there
        middle = mean * finite
        for _ in range(2):
            middle = middle - weights * middle.sum(dim, keepdim=True)
    return TwoPoint(start, end, settle(middle, start, end, u.tracer), u.tracer)


def logsumexp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TwoPoint:
    """Log-sum-exp along a dimension: the weights L/ΣL applied to u."""
    u, dim = _input_and_dim(args, kwargs)
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    start, end, mean = _log_softmaxes(u, dim)
    weights = mean / mean.sum(dim, keepdim=True)
    with torch.no_grad():
        start, end = u.start.logsumexp(dim, keepdim), u.end.logsumexp(dim, keepdim)
    with u.tracer.watching():
        middle = (weights * u.middle.masked_fill(~u.middle.isfinite(), 0.0)).sum(dim, keepdim=keepdim)
    return TwoPoint(start, end, settle(middle, start, end, u.tracer), u.tracer)


def log_softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Log-softmax along a dimension, by the closed form above."""
    u, dim = _input_and_dim(args, kwargs)
    start, end, mean = _log_softmaxes(u, dim)
    weights = mean / mean.sum(dim, keepdim=True)
    with u.tracer.watching():
        finite = u.middle.masked_fill(~u.middle.isfinite(), 0.0)
        middle = u.middle - (weights * finite).sum(dim, keepdim=True)
    return TwoPoint(start, end, settle(middle, start, end, u.tracer), u.tracer)


def _input_and_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TwoPoint, int]:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    u = args[0] if args else kwargs["input"]
    if not isinstance(dim, int) or not is_two_point(u):
        raise Untraceable(f"softmax along {dim!r}")
    return u, dim


def embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A look-up, linear in the table. A padding row gets no gradient in training, but the outputs depend on it."""
    return quadratic(func, args[:2], {})


def divide(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A / b = a · (1/b); linear where b is plain."""
    a, b = args[:2]
    if kwargs.get("rounding_mode") is not None:
        return secant(func, args, kwargs)
    return a * torch.reciprocal(b) if is_two_point(b) else quadratic(func, args, kwargs)


def power(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """uᵏ for a plain k: quadratic for k = 2, else elementwise; two-point exponents by secant."""
    base, exponent = args[:2]
    if is_two_point(exponent) or (isinstance(exponent, Tensor) and exponent.dim() > 0):
        return secant(func, args, kwargs)
    if float(exponent) in (1.0, 2.0):
        return quadratic(func, args, kwargs)
    if float(exponent) == 3.0:
        return base * base * base
    from kxexplain.gradients.rules import elementwise

    return elementwise(func, args, kwargs)


def maximum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """max(a, b) = a + relu(b − a)."""
    a, b = args
    return a + torch.relu(b - a)


def minimum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """min(a, b) = a − relu(a − b)."""
    a, b = args
    return a - torch.relu(a - b)


def prelu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """relu(x) − w relu(−x), w along axis 1."""
    x, weight = args if len(args) == 2 else (args[0], kwargs["weight"])
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    return torch.relu(x) - weight * torch.relu(-x)


def glu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A · sigmoid(b) for the two halves."""
    a, b = args[0].chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))
    return a * torch.sigmoid(b)


def bilinear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y_o = x₁ᵀ W_o x₂ + b: a linear layer applied to x₁ ⊗ x₂."""
    x1, x2, weight, *rest = args
    pairs = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
    return F.linear(pairs, weight.flatten(1), rest[0] if rest else kwargs.get("bias"))


def embedding_bag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sums and means are linear in the table; a maximum is taken by secant."""
    mode = args[4] if len(args) > 4 else kwargs.get("mode", 0)
    return (secant if mode == 2 else quadratic)(func, args, kwargs)


def dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The identity when evaluating."""
    if (args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))) and args[1] > 0:
        raise Untraceable("dropout is active while evaluating")
    return args[0]


def attention(
    func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Scaled-dot-product attention: softmax(QKᵀ/√d + mask) V."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(query.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask.clamp_min(torch.finfo(query.dtype).min)
    return torch.softmax(scores, -1) @ value


def cross_entropy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """log_softmax, which is exact, then an operation linear in it; at once for plain classes."""
    names = ("target", "weight", "reduction", "ignore_index", "label_smoothing")
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    target, smoothing, weight = given["target"], given.get("label_smoothing") or 0.0, given.get("weight")
    reduction, ignored = given.get("reduction", 1), given.get("ignore_index", -100)
    if weight is None and not smoothing and reduction == 0 and _are_classes(args[0], target, ignored):
        return _of_classes(args[0], target)
    logarithms = torch.log_softmax(args[0], 1)
    if not smoothing and not target.is_floating_point():
        return torch._C._nn.nll_loss_nd(logarithms, target, weight, reduction, ignored)
    classes = logarithms.shape[1]
    along = (1, classes, *[1] * (logarithms.dim() - 2))
    weighted = logarithms if weight is None else logarithms * weight.view(along)
    if target.is_floating_point():
        losses = -(weighted * ((1 - smoothing) * target + smoothing / classes)).sum(1)
        return _reduced(losses, reduction, losses.numel())
    kept = target != ignored
    index = target.masked_fill(~kept, 0).unsqueeze(1)
    losses = -(1 - smoothing) * weighted.gather(1, index).squeeze(1) - smoothing * weighted.mean(1)
    shares = kept.to(losses.dtype) if weight is None else weight[index.squeeze(1)] * kept
    return _reduced(losses * kept, reduction, shares.sum())


def _are_classes(u: Any, target: Tensor, ignored: int) -> bool:
    """Whether these are logits [n, C] and the classes of every example."""
    plain = is_two_point(u) and u.start.dim() == 2 and not is_two_point(target) and target.dtype == torch.int64
    return plain and int(target.min()) >= 0 and (ignored < 0 or not bool((target == ignored).any()))


def _of_classes(u: TwoPoint, target: Tensor) -> TwoPoint:
    """Losses −log p_y = logsumexp(u) − u_y, whose map is L/ΣL less one at y."""
    start, end, mean = _log_softmaxes(u, 1)
    with torch.no_grad():
        classes = target[:, None]
        pull = (mean / mean.sum(1, keepdim=True)).scatter_add_(1, classes, -torch.ones_like(mean[:, :1]))
        first, last = (-logarithms.gather(1, classes)[:, 0] for logarithms in (start, end))
    with u.tracer.watching():
        middle = (pull * u.middle.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)).sum(1)
    return TwoPoint(first, last, settle(middle, first, last, u.tracer), u.tracer)


def _reduced(losses: Any, reduction: int, count: Any) -> Any:
    return losses if reduction == 0 else losses.sum() / count if reduction == 1 else losses.sum()


def mse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(a − b)², then the reduction asked for."""
    squares = (args[0] - args[1]).square()
    return _reduced(squares, args[2] if len(args) > 2 else kwargs.get("reduction", 1), squares.numel())


def read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A value leaves torch (``item``, ``bool``, ``numpy``): fine if it is the same at both ends."""
    import numpy as np

    from kxexplain.gradients.two_point import both_ends

    starts, ends = both_ends(func, args, kwargs)
    if isinstance(starts, Tensor):
        return quadratic(func, args, kwargs) if starts.is_floating_point() else secant(func, args, kwargs)
    if not np.array_equal(starts, ends):
        raise Untraceable("the forward code reads a value that changes along training")
    return starts
