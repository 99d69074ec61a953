"""Contacts of algebra written out by hand: products of any shape, einsum, elementwise operations, look-ups."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kxexplain.gradients import nested
from kxexplain.gradients.contacts import (
    REARRANGEMENTS,
    Made,
    Sources,
    _placed,
    assemble_broadcast,
    rows_first,
    source_of,
    stacked,
)
from kxexplain.gradients.factors import Factors
from kxexplain.gradients.uses import Axis, Use

ELEMENTWISE = frozenset(
    "add sub rsub mul div add_ sub_ mul_ div_ pow maximum minimum where lerp addcmul addcdiv atan2 hypot xlogy".split()
)
"""Operations whose every output element depends on the elements that broadcasting puts in its place."""

LOOK_UPS = REARRANGEMENTS | frozenset("gather take take_along_dim repeat tile repeat_interleave broadcast_to".split())


def look_up(name: str, func: Any, sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """Elements of a parameter given to the examples: expanded over them, or picked by indices of theirs."""
    source = source_of(sources, args[0] if args else None)
    others = nested.leaves((args[1:], kwargs))
    if source is None or name not in LOOK_UPS or any(source_of(sources, value) is not None for value in others):
        return None
    return "look_up", {"weight": source}, {"positions": source.moved(func, args, kwargs).long()}


def _assemble_look_up(use: Use, gradients: Tensor) -> Factors:
    """Each element's gradient goes back to where it came from."""
    source, n, c = use.sources["weight"], use.rows, gradients.shape[0]
    g = stacked(use, gradients).reshape(n, c, -1)
    places = rows_first(use.held["positions"], use.axis, n).reshape(n, 1, -1)
    values = g.new_zeros(n, c, source.size).scatter_add_(2, places.expand_as(g), g)
    return [_placed(replace(source, index=None), values)]


def elementwise(func: Any, sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """Any elementwise operation: its own derivative, with the parameter written out as broadcasting does."""
    used = {}
    for place, value in enumerate(args):
        source = source_of(sources, value)
        if source is None:
            continue
        missing = output.dim() - value.dim()
        if axis.axis >= missing and value.shape[axis.axis - missing] != 1:
            return None
        used[str(place)] = source
    others = nested.leaves((list(args), kwargs))
    if not used or sum(source_of(sources, value) is not None for value in others) != len(used):
        return None
    return "elementwise", used, {"func": func, "args": args, "kwargs": kwargs}


def _assemble_elementwise(use: Use, gradients: Tensor) -> Factors:
    held, wide = use.held, {}
    for role, source in use.sources.items():
        wide[int(role)] = source.tensor.detach().expand(use.shape).requires_grad_()
    still = lambda value: value.detach() if isinstance(value, Tensor) else value  # noqa: E731
    args = [wide.get(place, still(value)) for place, value in enumerate(held["args"])]
    with torch.enable_grad():
        output = _OUT_OF_PLACE.get(held["func"], held["func"])(*args, **nested.change(held["kwargs"], still))
    columns = [torch.autograd.grad(output, list(wide.values()), g, retain_graph=True) for g in gradients]
    made: Factors = []
    for source, column in zip(use.sources.values(), zip(*columns, strict=True), strict=True):
        each = replace(use, sources={"weight": source}, held={"factor": 1.0})
        made += assemble_broadcast(each, torch.stack(column))
    return made


_OUT_OF_PLACE: dict[Any, Callable[..., Tensor]] = {
    getattr(torch.Tensor, name): getattr(torch, name.strip("_").removeprefix("i"))
    for name in ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__")
} | {torch.Tensor.__itruediv__: torch.div, torch.Tensor.__idiv__: torch.div}


def _einsum(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """Two operands, one of them a parameter."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    dots = [operand.dim() - len(term.replace("...", "")) for term, operand in zip(terms, operands, strict=True)]
    rest = "".join(spare[: max(dots)])
    terms = [term.replace("...", rest[len(rest) - d :]) for term, d in zip(terms, dots, strict=True)]
    return _contraction(sources, operands, terms, out.replace("...", rest), axis)


def _product(sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis) -> Made:
    """A matrix product of any shapes, the parameter on either side."""
    if len(args) != 2 or kwargs or not all(isinstance(t, Tensor) for t in args):
        return None
    left, right = args
    batch = string.ascii_lowercase[: max(left.dim(), right.dim(), 2) - 2]
    terms = [batch[len(batch) - max(t.dim() - 2, 0) :] for t in args]
    terms[0] += "YZ" if left.dim() > 1 else "Z"
    terms[1] += "ZX" if right.dim() > 1 else "Z"
    out = batch + ("Y" if left.dim() > 1 else "") + ("X" if right.dim() > 1 else "")
    return _contraction(sources, [left, right], terms, out, axis)


def _contraction(sources: Sources, operands: list[Any], terms: list[str], out: str, axis: Axis) -> Made:
    """The gradient at a parameter W in ``x, W -> y`` is ``y, x -> W``, the examples' letter kept."""
    found = [source_of(sources, operand) for operand in operands]
    if (found[0] is None) == (found[1] is None) or axis.inner > 1:
        return None
    at = 0 if found[0] is not None else 1
    source, x, kept = found[at], operands[1 - at], []
    assert source is not None
    letters = "".join(letter for letter, size in zip(terms[at], source.tensor.shape, strict=True) if size > 1)
    data = []
    for d, letter in enumerate(terms[1 - at]):
        if x.shape[d] > 1 or letter not in out + terms[at]:
            kept.append(letter)
        else:
            data.append(d)
    example, met = out[axis.axis], "".join(kept)
    if example in letters or len({*letters}) < len(letters) or not {*letters} <= {*out, *met}:
        return None
    x = x.detach().reshape([size for d, size in enumerate(x.shape) if d not in data])
    return "contraction", {"weight": source}, {"x": x, "gradient": out, "met": met, "example": example, "made": letters}


def _assemble_contraction(use: Use, gradients: Tensor) -> Factors:
    held = use.held
    column = next(letter for letter in string.ascii_letters if letter not in held["gradient"] + held["met"])
    equation = f"{column}{held['gradient']},{held['met']}->{held['example']}{column}{held['made']}"
    values = torch.einsum(equation, gradients, held["x"])
    return [_placed(use.sources["weight"], values.flatten(2) if values.dim() > 2 else values.unsqueeze(2))]


CONTACTS: dict[str, Callable[..., Made]] = {
    "einsum": _einsum, "matmul": _product, "mm": _product, "mv": _product, "bmm": _product,
}  # fmt: skip
ASSEMBLY: dict[str, Callable[[Use, Tensor], Factors]] = {
    "look_up": _assemble_look_up, "elementwise": _assemble_elementwise, "contraction": _assemble_contraction,
}  # fmt: skip
