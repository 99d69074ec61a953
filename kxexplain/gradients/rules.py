r"""For each operation, the linear map J with J(u'−u) = v'−v exactly: the rules of the discrete gradient.

A rule is a line in :data:`RULES`: the operation's name and one of a few kinds.

* *quadratic* (all linear and bilinear operations): the ordinary derivative at the middle of the operation's
  own inputs, exact because W'h'−Wh = ΔW·h̄ + W̄·Δh;
* *elementwise*: the secant slope (:mod:`kxexplain.gradients.secant`);
* *composite*: written in the above (:mod:`kxexplain.gradients.composites`);
* everything else: :func:`secant`, the midpoint Jacobian plus Gonzalez' rank-one correction
  J + (v'−v−JΔu) Δuᵀ/‖Δu‖², per example. So no model is refused because of an unknown operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from kxexplain.gradients.interception import name_of
from kxexplain.gradients.secant import kinked_slope, rank_one_residual, relu_slope, slope
from kxexplain.gradients.two_point import (
    Trace,
    TwoPoint,
    Untraceable,
    at,
    both_ends,
    in_middle,
    two_points,
)

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def quadratic(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations of degree at most two in their two-point inputs: the derivative at the middle is exact."""
    inputs = two_points((args, kwargs))
    if any(not t.is_floating_point() for t in inputs) or (func in _ANY_DEGREE and len(inputs) > 2):
        return secant(func, args, kwargs)
    starts, ends = both_ends(func, args, kwargs)
    linear = len(inputs) == 1 and name_of(func) not in ("square", "pow")
    return _join(starts, ends, in_middle(func, args, kwargs), inputs[0].trace, settled=linear)


def _join(starts: Any, ends: Any, middles: Any, trace: Trace, *, settled: bool = False) -> Any:
    """Pair the outputs of a call leaf by leaf; unless settled, the middle's value becomes the mean of the ends."""
    start_leaves, shape = tree_flatten(starts)
    end_leaves, middle_leaves = tree_flatten(ends)[0], tree_flatten(middles)[0]
    if not len(start_leaves) == len(end_leaves) == len(middle_leaves):
        raise Untraceable("an operation returned different structures at the two ends")
    pairs = zip(start_leaves, end_leaves, middle_leaves)
    return tree_unflatten([_pair(*leaves, trace, settled) for leaves in pairs], shape)


def _pair(start: Any, end: Any, middle: Any, trace: Trace, settled: bool) -> Any:
    if not isinstance(start, Tensor):
        if start != end:
            raise Untraceable(f"the forward code reads a value that changes along training: {start!r}, {end!r}")
        return start
    if start.shape != end.shape:
        raise Untraceable(f"an operation returned {tuple(start.shape)} at one end and {tuple(end.shape)} at the other")
    if not start.is_floating_point():
        return start if torch.equal(start, end) else TwoPoint(start, end, middle.detach(), trace)
    return TwoPoint(start, end, middle if settled else settle(middle, start, end, trace), trace)


def settle(middle: Tensor, start: Tensor, end: Tensor, trace: Trace) -> Tensor:
    """The middle's graph with the mean of the ends for value, on which later midpoint derivatives rely."""
    with trace.watching():
        return middle + ((start + end) / 2 - middle.detach())


def same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations that return their first argument's value: detach, contiguous …"""
    return args[0]


def elementwise(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kinks: Sequence[float] | None = None
) -> Any:
    """φ(u) for one two-point tensor u: its secant slope. ``kinks``: where φ' jumps; () for smooth."""
    (u, *rest) = two_points((args, kwargs))
    starts, ends = both_ends(func, args, kwargs)
    if rest or starts.shape != u.shape or u is not args[0]:
        return secant(func, args, kwargs)

    def function(point: Tensor) -> Tensor:
        value: Tensor = func(point, *args[1:], **kwargs)
        return value

    with torch.no_grad():
        if kinks is None:
            gain = slope(function, u.start, u.end, (starts, ends))
        else:
            gain = kinked_slope(function, u.start, u.end, (starts, ends), kinks)
    return scaled(u, gain, starts, ends)


def relu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> TwoPoint:
    """ReLU, in closed form."""
    u = args[0]
    with torch.no_grad():
        return scaled(u, relu_slope(u.start, u.end), u.start.clamp_min(0), u.end.clamp_min(0))


def scaled(u: TwoPoint, gain: Tensor, start: Tensor, end: Tensor) -> TwoPoint:
    """The two-point output whose middle depends on u through ``gain``."""
    with u.trace.watching():
        middle = u.middle * gain
    return TwoPoint(start, end, settle(middle, start, end, u.trace), u.trace)


def secant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operation: midpoint Jacobian plus rank-one correction, per example where there is an example axis.

    Source: O. Gonzalez, "Time integration and discrete Hamiltonian systems", 1996, eq. 2.7.
    """
    inputs = two_points((args, kwargs))
    moved, trace = [t for t in inputs if t.is_floating_point()], inputs[0].trace
    starts, ends = both_ends(func, args, kwargs)
    middles, shape = tree_flatten(in_middle(func, args, kwargs))
    pushed = _pushforward(func, args, kwargs, moved)
    leaves = zip(middles, tree_flatten(starts)[0], tree_flatten(ends)[0], pushed)
    corrected = [_corrected(middle, start, end, push, moved, trace) for middle, start, end, push in leaves]
    return _join(starts, ends, tree_unflatten(corrected, shape), trace)


def _corrected(middle: Any, start: Any, end: Any, push: Tensor | None, inputs: list[TwoPoint], trace: Trace) -> Any:
    """The middle output with r ⟨Δu, ū⟩/‖Δu‖² added to its graph, where r = v'−v−JΔu."""
    if not isinstance(middle, Tensor) or not middle.is_floating_point() or start.shape != end.shape:
        return middle
    residual = end - start if push is None else end - start - push
    middle = middle.detach() if push is None else middle
    rows = _rows(middle, trace)
    if rows == 1 and trace.rows > 1:
        trace.mixed = True
    residual = residual.reshape(rows, -1)
    step_norm, along = residual.new_zeros(rows, 1), residual.new_zeros(rows, 1)
    with trace.watching():
        for u in inputs:
            width = u.end - u.start
            per_row = _rows(u, trace) if rows > 1 else 1
            step_norm = step_norm + width.reshape(per_row, -1).square().sum(1, keepdim=True)
            along = along + (width * u.middle).reshape(per_row, -1).sum(1, keepdim=True)
        if bool(((step_norm == 0) & (residual != 0)).any()):
            trace.inexact = True
        return middle + (rank_one_residual(residual, step_norm) * along).reshape(middle.shape)


def _rows(value: Tensor, trace: Trace) -> int:
    return trace.rows if value.dim() > 0 and value.shape[0] == trace.rows else 1


def _pushforward(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[TwoPoint]
) -> list[Tensor | None]:
    """JΔu at the middle for every output, by differentiating the backward pass (Townsend's trick).

    ``None`` where the operation has no derivative, or none of its derivative: the rank-one part alone is then
    the whole map, still exact.
    """
    points = {id(u): u.middle.detach().requires_grad_() for u in inputs}
    with torch.enable_grad():
        swapped = tree_map_only(TwoPoint, lambda t: points.get(id(t), t.middle), (args, kwargs))
        outputs = tree_flatten(func(*swapped[0], **swapped[1]))[0]
        widths = [u.end - u.start for u in inputs]
        return [_push(value, list(points.values()), widths) for value in outputs]


def _push(value: Any, points: list[Tensor], widths: list[Tensor]) -> Tensor | None:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    cotangent = torch.zeros_like(value, requires_grad=True)
    try:
        pulled = torch.autograd.grad(value, points, cotangent, create_graph=True, allow_unused=True)
        pairs = [(g, w) for g, w in zip(pulled, widths) if g is not None and g.requires_grad]
        if not pairs:
            return None
        (push,) = torch.autograd.grad([g for g, _ in pairs], cotangent, [w for _, w in pairs])
    except (RuntimeError, NotImplementedError):
        return None
    return push.detach()


def assign(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``x[index] = value``: linear in x and value, done on copies so that nothing shared changes."""

    def copied(target: Tensor, index: Any, value: Any) -> Tensor:
        result = target.clone()
        result[index] = value
        return result

    if not isinstance(args[0], TwoPoint):
        raise Untraceable("a two-point value is written into a plain tensor")
    args[0].become(quadratic(copied, args, kwargs))


QUADRATIC = """
    add sub rsub neg mul matmul mm bmm mv dot inner outer addmm addbmm baddbmm addmv addr einsum tensordot kron
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc
    view reshape view_as reshape_as transpose t permute movedim flatten unflatten squeeze unsqueeze expand expand_as
    getitem select narrow index_select gather take take_along_dim chunk split split_with_sizes unbind tensor_split
    hsplit vsplit cat stack hstack vstack dstack repeat tile repeat_interleave roll flip rot90 diagonal diag diag_embed
    tril triu unfold im2col col2im pad constant_pad_nd sum mean cumsum diff trace lerp addcmul square atleast_1d
    atleast_2d atleast_3d broadcast_to broadcast_tensors meshgrid scatter_add index_add index_copy masked_fill
    masked_select masked_scatter scatter slice_scatter select_scatter float double half bfloat16 to type type_as clone
    contiguous cpu cuda mT get:T get:mT get:H get:mH get:real avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle cross vdot embedding_bag fold as_strided new_tensor iter
    reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d _pad_circular _pad fft_rfft alias
""".split()
SMOOTH = """
    tanh sigmoid exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan sinh cosh asin acos atan asinh acosh atanh
    erf erfc erfinv reciprocal gelu silu mish softplus logsigmoid softsign tanhshrink lgamma digamma special_erf
    special_expit special_ndtr logit sinc
""".split()
KINKED: dict[str, tuple[float, ...]] = {
    "elu": (0.0,), "selu": (0.0,), "celu": (0.0,), "hardswish": (-3.0, 3.0), "abs": (0.0,),
}  # fmt: skip
PIECEWISE_LINEAR = """
    leaky_relu rrelu relu6 hardtanh hardsigmoid clamp clamp_min clamp_max threshold softshrink hardshrink sign round
    floor ceil trunc frac heaviside
""".split()
"""Elementwise and of constant slope between kinks: the plain quotient, which cannot lose digits."""


def piecewise_linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Quotient wherever the ends differ; autograd's derivative where they meet."""
    (u, *rest) = two_points((args, kwargs))
    starts, ends = both_ends(func, args, kwargs)
    if rest or starts.shape != u.shape or u is not args[0]:
        return secant(func, args, kwargs)
    with torch.no_grad():
        width = u.end - u.start
        still = width == 0
        gain = (ends - starts) / width.masked_fill(still, 1.0)
    if bool(still.any()):
        with torch.enable_grad():
            point = u.start.detach().requires_grad_()
            value = func(point, *args[1:], **kwargs)
            (local,) = torch.autograd.grad(value.sum(), point)
        gain = torch.where(still, local, gain)
    return scaled(u, gain, starts, ends)


_ANY_DEGREE = {torch.einsum, torch._VF.einsum}
RULES: dict[str, Rule] = (
    dict.fromkeys(QUADRATIC, quadratic)
    | dict.fromkeys(SMOOTH, elementwise)
    | {name: partial(elementwise, kinks=kinks) for name, kinks in KINKED.items()}
    | dict.fromkeys(PIECEWISE_LINEAR, piecewise_linear)
    | {"relu": relu, "setitem": assign, "detach": same, "get:data": same, "requires_grad_": same}
)
"""Operation name → rule. :mod:`kxexplain.gradients.composites` adds the composite ones."""

__all__ = ["RULES", "Rule", "at", "elementwise", "quadratic", "scaled", "secant"]
