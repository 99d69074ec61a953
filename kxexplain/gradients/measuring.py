"""Where a model keeps its examples, found by running it on a few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kxexplain.gradients.capture import Capture
from kxexplain.gradients.uses import Axis, Layout, Place

Run = Callable[[Tensor, Capture], Tensor]
"""Runs the forward pass on the examples of these numbers inside the capture given; returns the outputs, [n, c]."""

ORDERS = ((1, 2, 0), (1, 0, 2))
"""Rearrangements of three examples; only what leaves every example in its place commutes with both."""


def measure(run: Run, parameters: Mapping[str, Tensor]) -> Layout:
    """Find the example axis of every call by running 2 and 3 examples.

    An axis is believed if its rows follow the examples when these are rearranged: code may sort its batch or turn it
    round. Where the code draws at random and no two runs agree, every output must depend on its own row. Where
    examples share an axis with something else (n·r rows after a reshape), the rows that stay as they are when a third
    example joins show the order; where examples influence each other (batch norm), their outputs' gradients do.
    """

    def outputs_of(order: Sequence[int]) -> dict[Place, Any]:
        capture = Capture(parameters, None, 3)
        with torch.no_grad():
            run(torch.tensor(order), capture)
        return capture.outputs

    two, three = Capture(parameters, None, 2), Capture(parameters, None, 3)
    with torch.enable_grad():
        outputs = run(torch.arange(2), two)
        with torch.no_grad():
            run(torch.arange(3), three)
    again, rearranged = outputs_of((0, 1, 2)), [(torch.tensor(order), outputs_of(order)) for order in ORDERS]
    axes: dict[Place, Axis] = {}
    fixed: dict[Place, torch.Size] = {}
    for place, a in two.outputs.items():
        b = three.outputs.get(place)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        found = _axis(a, b, outputs)
        if found is not None and found.inner == 1:
            moved = [(order, run_outputs.get(place)) for order, run_outputs in rearranged]
            settled = _same(b, again.get(place))
            if not (all(_follows(b, c, order, found) for order, c in moved) if settled else _own(a, outputs, found)):
                continue
        if found is not None:
            axes[place] = found
        elif a.shape == b.shape:
            fixed[place] = a.shape
    return Layout(axes, fixed, {call: n for call, n in two.lengths.items() if three.lengths.get(call) == n})


def _axis(two: Tensor, three: Tensor, outputs: Tensor) -> Axis | None:
    if two.dim() != three.dim():
        return None
    grown = [d for d in range(two.dim()) if two.shape[d] != three.shape[d]]
    if len(grown) != 1:
        return None
    (axis,) = grown
    inner = three.shape[axis] - two.shape[axis]
    if two.shape[axis] != 2 * inner or three.shape[axis] != 3 * inner:
        return None
    if inner == 1:
        return Axis(axis)
    for fits in (_values_fit, _gradients_fit):
        orders = [outermost for outermost in (True, False) if fits(two, three, outputs, Axis(axis, inner, outermost))]
        if len(orders) == 1:
            return Axis(axis, inner, orders[0])
    return None


def _same(a: Tensor, b: Any) -> bool:
    """Whether two runs on the same examples agree."""
    return isinstance(b, Tensor) and a.shape == b.shape and _close(a, b)


def _follows(before: Tensor, after: Any, order: Tensor, at: Axis) -> bool:
    """Whether the rows followed the examples when these were rearranged."""
    if not isinstance(after, Tensor) or after.shape != before.shape:
        return False
    return _close(before.detach().index_select(at.axis, order.to(before.device)), after)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.dtype == b.dtype and torch.equal(a, b):  # told at once, and mostly so
        return True
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a.detach(), b.detach()))
    a, b = (torch.nan_to_num(t.to(torch.float64)) for t in (a, b))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) if a.numel() else 0.0)


def _own(two: Tensor, outputs: Tensor, at: Axis) -> bool:
    """No output depends more on the other example's row than on its own."""
    if not two.requires_grad:
        return True
    for example in (0, 1):
        (gradient,) = torch.autograd.grad(outputs[example].sum(), two, retain_graph=True, allow_unused=True)
        if gradient is not None:
            own, other = (_split(gradient, at, 2)[row].norm() for row in (example, 1 - example))
            if float(own) < 0.5 * float(other):
                return False
    return True


def _split(value: Tensor, at: Axis, rows: int) -> Tensor:
    """The shared axis taken apart, [example, inner, rest]."""
    flat = value.detach().movedim(at.axis, 0).reshape(rows * at.inner, -1)
    if at.outermost:
        return flat.view(rows, at.inner, -1)
    return flat.view(at.inner, rows, -1).transpose(0, 1)


def _values_fit(two: Tensor, three: Tensor, outputs: Tensor, at: Axis) -> bool:
    """The first two examples' rows are the same whether or not a third is there."""
    return _close(_split(two, at, 2)[:2], _split(three, at, 3)[:2])


def _gradients_fit(two: Tensor, three: Tensor, outputs: Tensor, at: Axis) -> bool:
    """No example's output depends on the other's rows."""
    if not two.requires_grad:
        return False
    for example in (0, 1):
        (gradient,) = torch.autograd.grad(outputs[example].sum(), two, retain_graph=True, allow_unused=True)
        if gradient is None or bool(_split(gradient, at, 2)[1 - example].any()):
            return False
    return True
