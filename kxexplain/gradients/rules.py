r"""For each operation, the linear map J with J(u'−u) = v'−v exactly: the rules of the discrete gradient.

Which rule an operation has stands in :mod:`kxexplain.gradients.table`: its name and one of a few kinds.

* *quadratic* (all linear and bilinear operations): the ordinary derivative at the middle of the operation's
  own inputs, exact because W'h'−Wh = ΔW·h̄ + W̄·Δh;
* *elementwise*: the secant slope (:mod:`kxexplain.gradients.secant`);
* *composite*: written in the above (:mod:`kxexplain.gradients.composites`);
* everything else: :func:`secant`, the midpoint Jacobian plus Gonzalez' rank-one correction
  J + (v'−v−JΔu) Δuᵀ/‖Δu‖², per example. So no model is refused because of an unknown operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kxexplain.gradients import nested
from kxexplain.gradients.interception import name_of
from kxexplain.gradients.secant import kinked_slope, rank_one_residual, relu_slope, slope
from kxexplain.gradients.two_point import (
    Extent,
    Place,
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
    if any(not t.start.is_floating_point() for t in inputs) or (name_of(func) in _ANY_DEGREE and len(inputs) > 2):
        return secant(func, args, kwargs)
    starts, ends = both_ends(func, args, kwargs)
    linear = len(inputs) == 1 and name_of(func) not in ("square", "pow")
    middles, own = in_middle(func, args, kwargs), {id(u.middle) for u in inputs}
    if not linear and any(id(t) in own for t in nested.leaves(middles)):  # type_as, say, may return its input itself
        with inputs[0].tracer.watching():
            middles = nested.change(middles, lambda t: t.view_as(t) if id(t) in own else t)
    return _join(starts, ends, middles, inputs[0].tracer, settled=linear)


def _join(starts: Any, ends: Any, middles: Any, trace: Trace, *, settled: bool = False) -> Any:
    """Pair the outputs of a call leaf by leaf; unless settled, the middle's value becomes the mean of the ends."""
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        return _pair(starts, ends, middles, trace, settled)
    parts = [nested.leaves(values) for values in (starts, ends, middles)]
    if len({len(leaves) for leaves in parts}) > 1:
        raise Untraceable("an operation returned different structures at the two ends")
    pairs = (_pair(start, end, middle, trace, settled) for start, end, middle in zip(*parts, strict=True))
    return nested.change(starts, lambda _: next(pairs))


def _pair(start: Any, end: Any, middle: Any, trace: Trace, settled: bool) -> Any:
    if not isinstance(start, Tensor):
        if start != end:
            raise Untraceable(f"the forward code reads a value that changes along training: {start!r}, {end!r}")
        return start
    if start.is_complex():
        raise Untraceable("complex numbers are not followed; the model counts as one operation")
    if start.shape != end.shape:
        raise Untraceable(f"an operation returned {tuple(start.shape)} at one end and {tuple(end.shape)} at the other")
    if not start.is_floating_point():
        return start if torch.equal(start, end) else TwoPoint(start, end, middle.detach(), trace)
    return TwoPoint(start, end, middle if settled else settle(middle, start, end, trace), trace)


def settle(middle: Tensor, start: Tensor, end: Tensor, trace: Trace) -> Tensor:
    """The middle's graph with the mean of the ends for value, on which later midpoint derivatives rely."""
    with torch.no_grad():
        shift = torch.lerp(start, end, 0.5).sub_(middle).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return trace.watch.shifted(middle, shift)


def same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations that return their first argument's value, such as detach."""
    return args[0]


def constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """New tensors that take only shape and type from a value: the same at both ends."""
    return at("start", func, args, kwargs)


def elementwise(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kinks: Sequence[float] | None = None,
) -> Any:
    """The value φ(u) for one two-point tensor u: its secant slope. ``kinks``: where φ' jumps; () for smooth."""
    (u, *rest) = two_points((args, kwargs))
    starts, ends = both_ends(func, args, kwargs)
    if rest or starts.shape != u.start.shape or u is not args[0]:
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
        start, end = u.start.clamp_min(0), u.end.clamp_min(0)
        return scaled(u, relu_slope(u.start, u.end, (start, end)), start, end)


def scaled(u: TwoPoint, gain: Tensor, start: Tensor, end: Tensor) -> TwoPoint:
    """The two-point output whose middle depends on u through ``gain``."""
    with u.tracer.watching():
        middle = u.middle * gain
    return TwoPoint(start, end, settle(middle, start, end, u.tracer), u.tracer)


def secant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operation: midpoint Jacobian plus rank-one correction, per example where there is an example axis.

    Source: O. Gonzalez, "Time integration and discrete Hamiltonian systems", 1996, eq. 2.7.
    """
    inputs = two_points((args, kwargs))
    moved = list({id(t): t for t in inputs if t.start.is_floating_point()}.values())
    trace = inputs[0].tracer
    place = trace.place
    starts, ends = both_ends(func, args, kwargs)
    middles = in_middle(func, args, kwargs)
    pushed = _pushforward(func, args, kwargs, moved)
    leaves = zip(*(nested.leaves(values) for values in (middles, starts, ends)), pushed, strict=True)
    corrected = (
        _corrected(middle, start, end, push, moved, (place, leaf), trace)
        for leaf, (middle, start, end, push) in enumerate(leaves)
    )
    return _join(starts, ends, nested.change(middles, lambda _: next(corrected)), trace)


def _corrected(
    middle: Any,
    start: Any,
    end: Any,
    push: Tensor | None,
    inputs: list[TwoPoint],
    which: tuple[Place, int],
    trace: Trace,
) -> Any:
    """The middle output with r ⟨Δu, ū⟩/‖Δu‖² added to its graph, where r = v'−v−JΔu."""
    if not isinstance(middle, Tensor) or not middle.is_floating_point() or start.shape != end.shape:
        return middle
    residual = end - start if push is None else end - start - push
    middle = middle.detach() if push is None else middle
    rows = trace.rows if trace.per_example(*which, inputs) else 1
    residual = residual.reshape(rows, -1)
    step_norm, along = residual.new_zeros(rows, 1), residual.new_zeros(rows, 1)
    with trace.watching():
        for u in inputs:
            width = u.end - u.start
            per_row = rows if u.extent is Extent.EXAMPLES else 1
            step_norm = step_norm + width.reshape(per_row, -1).square().sum(1, keepdim=True)
            along = along + (width * u.middle).reshape(per_row, -1).sum(1, keepdim=True)
        if bool(((step_norm == 0) & (residual != 0)).any()):
            trace.inexact = True
        return middle + (rank_one_residual(residual, step_norm) * along).reshape(middle.shape)


def _pushforward(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[TwoPoint]
) -> list[Tensor | None]:
    """JΔu at the middle for every output, by differentiating the backward pass (Townsend's trick).

    ``None`` where the operation has no derivative, or none of its derivative: the rank-one part alone is then
    the whole map, still exact.
    """
    points = {id(u): u.middle.detach().requires_grad_() for u in inputs}
    with torch.enable_grad():
        swap = lambda t: points.get(id(t), t.middle) if isinstance(t, TwoPoint) else t  # noqa: E731
        outputs = func(*nested.change(args, swap), **nested.change(kwargs, swap))
        widths = [u.end - u.start for u in inputs]
        return [_push(value, list(points.values()), widths) for value in nested.leaves(outputs)]


def _push(value: Any, points: list[Tensor], widths: list[Tensor]) -> Tensor | None:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    cotangent = torch.ones_like(value, requires_grad=True)
    try:
        pulled = torch.autograd.grad(value, points, cotangent, create_graph=True, allow_unused=True)
        pairs = [(g, w) for g, w in zip(pulled, widths, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return None
        (push,) = torch.autograd.grad([g for g, _ in pairs], cotangent, [w for _, w in pairs])
    except (RuntimeError, NotImplementedError):
        return None
    return push.detach() if bool(push.isfinite().all()) else None


def assign(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``x[index] = value``: linear in x and value, done on copies so that nothing shared changes."""

    def copied(target: Tensor, index: Any, value: Any) -> Tensor:
        result = target.clone()
        result[index] = value
        return result

    if not isinstance(args[0], TwoPoint):
        raise Untraceable("a two-point value is written into a plain tensor")
    args[0].become(quadratic(copied, args, kwargs))


def piecewise_linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Quotient wherever the ends differ; autograd's derivative where they meet."""
    (u, *rest) = two_points((args, kwargs))
    starts, ends = both_ends(func, args, kwargs)
    if rest or starts.shape != u.start.shape or u is not args[0]:
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


_ANY_DEGREE = frozenset({"einsum"})
