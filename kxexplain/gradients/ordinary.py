"""Per-example gradients at one parameter vector: of a model's outputs, or of its losses while training replays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kxexplain.errors import KxError
from kxexplain.gradients.capture import Capture
from kxexplain.gradients.factors import Dense, Factors, Outer, merge
from kxexplain.gradients.measuring import Run, measure
from kxexplain.gradients.positions import joined
from kxexplain.gradients.registry import ASSEMBLY
from kxexplain.gradients.uses import Axis, Layout, Use
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory.batches import call, copied, count, leaves, outputs_2d, take

Select = Callable[[Tensor], Tensor]
"""From outputs [n, C] to the quantities differentiated, [n, c]; each row depends on its own row only."""


def trainable(model: nn.Module) -> Tensors:
    """The parameters that training moves, by name; a shared one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layout_of(model: nn.Module, inputs: Inputs, parameters: Tensors) -> Layout:
    """Measure where the model keeps its examples, and check it (:func:`measure`, :func:`checked`).

    A model that does not bear being watched (it checkpoints, or is compiled) gets a blind layout.
    """
    size = count(inputs)

    def run(order: Tensor, capture: Capture) -> Tensor:
        batch = copied(take(inputs, order % size))
        with capture.around():
            return outputs_2d(call(model, batch))

    with torch.enable_grad():
        try:
            return checked(measure(run, parameters), run, parameters)
        except (KxError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever the model's own code raises when it is watched
            return Layout({}, {}, blind=True)


def checked(layout: Layout, run: Run, parameters: Tensors) -> Layout:
    """The layout, with those parameters made loose whose examples' gradients do not add up to the gradient.

    A use can be out of sight: inside a function that defines its own derivative, or written into a view.
    """
    capture = Capture(parameters, layout, 3)
    outputs = run(torch.arange(3), capture)
    free = {name: p for name, p in parameters.items() if p.requires_grad}
    if not outputs.requires_grad or not free:
        return layout
    values = outputs.sum(1, keepdim=True)
    found: Tensors = {}
    for f in differentiate(values, capture, parameters, keep_graph=True):
        for name, sums in f.total().items():
            found[name] = found[name] + sums if name in found else sums
    whole = torch.autograd.grad(values.sum(), list(free.values()), allow_unused=True)
    size = {name: _largest(g) for name, g in zip(free, whole, strict=True)}
    missed = set()
    for (name, parameter), gradient in zip(free.items(), whole, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        gap = _largest(wanted.flatten() - found[name] if name in found else wanted)
        limit = 10 * torch.finfo(wanted.dtype).eps ** 0.5 * max(size[name], 1e-3 * max(size.values()))
        if not gap <= limit and math.isfinite(gap):
            missed.add(name)
    return replace(layout, loose=frozenset(missed))


def _largest(values: Tensor | None) -> float:
    return float(values.to_dense().abs().max()) if values is not None and values.numel() else 0.0


def differentiate(values: Tensor, capture: Capture, parameters: Tensors, *, keep_graph: bool = False) -> Factors:
    """Gradients of ``values`` [n, c] with respect to the captured parameters, example by example.

    One backward pass for each of the c columns, plus one for each example and column if some parameters are
    used in a way that no contact describes.
    """
    loose = loose_gradients(values, {n: p for n, p in parameters.items() if n in capture.loose})
    if not capture.uses or not values.requires_grad or values.shape[1] == 0:
        return merge(loose)
    rooms = Rooms(capture.uses, values.shape[1])
    for column, passed in enumerate(passes(values, capture.edges(), keep_graph=keep_graph)):
        rooms.put(column, passed)
    return assemble(capture, rooms.gathered(), loose)


def passes(
    values: Tensor, edges: Sequence[GradientEdge], *, keep_graph: bool = False
) -> Iterator[tuple[Tensor | None, ...]]:
    """One backward pass for each column of ``values`` [n, c]: the gradients at the edges."""
    columns = values.shape[1]
    for column in range(columns):
        chosen = torch.zeros_like(values)
        chosen[:, column] = 1
        kept = column < columns - 1 or keep_graph
        yield torch.autograd.grad(values, edges, chosen, retain_graph=kept, allow_unused=True)


class Rooms:
    """Gradients at some uses, gathered column by column: a pass' memory is free for the next one."""

    def __init__(self, uses: Sequence[Use], columns: int) -> None:
        self._uses, self._columns = uses, columns
        self._rooms: list[Tensor] = []
        self._met: set[int] = set()

    def put(self, column: int, passed: Sequence[Tensor | None]) -> None:
        """The gradients that one column's pass has left at the uses, ``None`` for zero."""
        self._met.update(i for i, g in enumerate(passed) if g is not None)
        found = [_or_zero(g, use) for g, use in zip(passed, self._uses, strict=True)]
        if self._columns == 1:
            self._rooms = [g[None] for g in found]
            return
        if column == 0:
            self._rooms = [_room(g, use, self._columns) for g, use in zip(found, self._uses, strict=True)]
        for room, gradient in zip(self._rooms, found, strict=True):
            room[column] = gradient

    def gathered(self) -> list[Tensor | None]:
        """Every use's gradients, [c, …output]; ``None`` of a use without any."""
        return [
            room if _counts(use, i in self._met) else None
            for i, (room, use) in enumerate(zip(self._rooms, self._uses, strict=True))
        ]


def _room(gradient: Tensor, use: Use, columns: int) -> Tensor:
    """Room for such gradients of all columns, [c, …]; in memory the examples come first, as products need them."""
    if use.axis == Axis(0):
        return gradient.new_empty(gradient.shape[0], columns, *gradient.shape[1:]).transpose(0, 1)
    return gradient.new_empty(columns, *gradient.shape)


def loose_gradients(values: Tensor, parameters: Tensors) -> Factors:
    """Gradients of these parameters whatever they are used for: one backward pass per example and column."""
    names = [name for name, p in parameters.items() if p.requires_grad]
    if not names or not values.requires_grad:
        return []
    rows, columns = values.shape
    tensors = list(parameters.values())
    written = [t.new_zeros(rows, columns, t.numel()) for t in tensors]
    for row in range(rows):
        for column in range(columns):
            found = torch.autograd.grad(values[row, column], tensors, retain_graph=True, allow_unused=True)
            for target, gradient in zip(written, found, strict=True):
                if gradient is not None:
                    target[row, column] = gradient.flatten()
    return [Dense(name, value) for name, value in zip(names, written, strict=True)]


def assemble(capture: Capture, gradients: Sequence[Tensor | None], loose: Factors) -> Factors:
    """Factors of all uses from the gradients at their edges, [c, …output] each; of a use without one, none."""
    made: Factors = []
    for use, gradient in zip(capture.uses, gradients, strict=True):
        if gradient is not None:
            made += ASSEMBLY[use.kind](use, gradient)
    return merge([*_without(capture.derivations.carried(joined(made)), capture.loose), *loose])


def _written_out(factors: Factors) -> Factors:
    """The gradients of those parameters all of whose uses are written out."""
    kept = {name for f in factors if isinstance(f, Outer) for name in f.names}
    return [f for f in factors if isinstance(f, Dense) and f.weight not in kept]


def _counts(use: Use, met: bool) -> bool:
    """Whether a use has factors: one of several outputs has none if nothing was made of it."""
    return met or not use.held.get("leaf")


def _or_zero(gradient: Tensor | None, use: Use) -> Tensor:
    if gradient is not None:
        return gradient
    source = next(iter(use.sources.values())).tensor
    return source.new_zeros(use.shape)


def _without(factors: Factors, names: set[str]) -> Factors:
    """The factors less those parameters whose gradients were taken whole."""
    if not names:
        return factors
    return [
        part for f in factors for part in (f.dense() if names & set(f.names) else [f]) if not names & set(part.names)
    ]


def output_gradients(
    model: nn.Module, inputs: Inputs, layout: Layout, select: Select | None = None
) -> tuple[Tensor, Factors]:
    """Outputs and per-example output gradients of a model as it stands.

    Args:
        model: evaluated in the mode it is in.
        inputs: a batch of n.
        layout: from :func:`layout_of` on inputs of the same kind.
        select: the quantities to differentiate; every output if ``None``.

    Returns:
        The quantities, [n, c], without graph, and their gradients.
    """
    with torch.enable_grad():
        values, capture = watched(model, copied(inputs), layout, select)
        factors = differentiate(values, capture, trainable(model))
    return values.detach(), factors


def watched(model: nn.Module, inputs: Inputs, layout: Layout, select: Select | None = None) -> tuple[Tensor, Capture]:
    """The quantities to differentiate, [n, c], with their graph, and the uses of the model's parameters on the way.

    The model may change the inputs in place.
    """
    capture = Capture(trainable(model), layout, count(inputs))
    with capture.around():
        outputs = outputs_2d(call(model, inputs))
    return outputs if select is None else select(outputs), capture


@dataclass
class StepGradients:
    """Watches one replayed training step (:class:`kxexplain.trajectory.replay.Watch`).

    After the step: ``factors`` are the examples' shares of the batch gradient, ``pull`` = ∂total/∂f, [n, C], and
    ``jacobian`` the output gradients, if asked for. ``steady`` says that the dataset serves an example alike every
    time; one that augments at random does not, and then no factor is marked as raw. With ``whole`` the examples' losses
    are differentiated one by one, since they use the parameters for more than the outputs. ``dtype`` is what all this
    is given in, if not in the model's own: products and sums of it then lose nothing that the gradients have.
    """

    layout: Layout
    parameters: Tensors
    rows: int
    with_jacobian: bool = False
    steady: bool = True
    whole: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.capture = Capture(self.parameters, self.layout, self.rows)
        self.factors: Factors = []
        self.jacobian: Factors | None = None
        self.pull: Tensor
        self._loose: Factors = []

    def renewed(self, rows: int) -> StepGradients:
        """Itself, for another step on so many examples; what the last one gave is forgotten."""
        self.rows = rows
        self.capture.begin(rows)
        self.factors, self.jacobian, self._loose = [], None, []
        return self

    def forward(self, inputs: Inputs) -> AbstractContextManager[Any]:
        """Entered around the forward pass on these inputs, fresh from the dataset."""
        self._inputs = {leaf.data_ptr(): (i, leaf, leaf._version) for i, (_, leaf) in enumerate(leaves(inputs))}
        return self.capture.around()

    def edges(self, outputs: Tensor, losses: Tensor, total: Tensor) -> list[GradientEdge]:
        """What the backward pass must return, once the loose parameters and the Jacobian are taken."""
        if self.with_jacobian:
            found = differentiate(outputs_2d(outputs), self.capture, self.parameters, keep_graph=True)
            self.jacobian = self._given(found)
        chosen = {
            n: p for n, p in self.parameters.items() if n in self.capture.loose or (self.whole and p.requires_grad)
        }
        if chosen:
            share = torch.autograd.grad(total, losses, retain_graph=True)[0]
            self._loose = loose_gradients((losses * share)[:, None], chosen)
        return [*([] if self.whole else self.capture.edges()), get_gradient_edge(outputs)]

    def collect(self, gradients: Sequence[Tensor | None]) -> None:
        """Turn the gradients at the edges into factors."""
        *uses, pull = gradients
        assert pull is not None
        if self.whole:
            self.factors = self._given(merge(self._loose))
        else:
            found = [
                _or_zero(g, use).unsqueeze(0) if _counts(use, g is not None) else None
                for g, use in zip(uses, self.capture.uses, strict=True)
            ]
            self.factors = self._given(assemble(self.capture, found, self._loose))
        self.pull = outputs_2d(pull).to(self.dtype or pull.dtype)

    def accounted(self, gradients: Tensors) -> Tensors:
        """What the examples' shares add up to, for the batch's gradients by parameter.

        Where examples nearly cancel (under batch norm) autograd's own sum over the batch rounds by more than what is
        left: that part of a step belongs to no example. Shares that are not written out are taken to add up, but where
        another ``dtype`` was asked for.
        """
        parts = self.factors if self.dtype is not None else _written_out(self.factors)
        if not parts:
            return gradients
        sums: Tensors = {}
        for f in parts:
            for name, own in f.total().items():
                sums[name] = sums[name] + own if name in sums else own
        return {n: (sums[n].view_as(g) if n in sums else g).to(self.dtype or g.dtype) for n, g in gradients.items()}

    def _given(self, factors: Factors) -> Factors:
        """The factors, those whose ``a`` is the batch itself marked as raw, if it is the same in every epoch."""
        if self.dtype is not None:
            return [f.cast(self.dtype) for f in factors]
        if not self.steady:
            return factors
        return [f.marked(self._input(f.a)) if isinstance(f, Outer) else f for f in factors]

    def _input(self, a: Tensor) -> int | None:
        """The number of the input that ``a`` is, if it is one."""
        number, leaf, version = self._inputs.get(a.data_ptr(), (0, None, 0))
        if leaf is None or leaf._version != version or not (a.is_contiguous() and leaf.is_contiguous()):
            return None
        return number if a.dtype == leaf.dtype and len(a) == len(leaf) and a.numel() == leaf.numel() > 0 else None
