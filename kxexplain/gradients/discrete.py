r"""The discrete gradient of a model between two parameter vectors: ⟨D(x), θ'−θ⟩ = f(x;θ')−f(x;θ), exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kxexplain.errors import KxError
from kxexplain.gradients.capture import Capture
from kxexplain.gradients.factors import Dense, Factors, concatenate
from kxexplain.gradients.measuring import measure
from kxexplain.gradients.ordinary import checked, differentiate, layout_of
from kxexplain.gradients.products import dot
from kxexplain.gradients.secant import rank_one_residual
from kxexplain.gradients.two_point import Extent, Place, Substitution, Trace, TwoPoint
from kxexplain.gradients.uses import Layout
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory.batches import call, copied, count, leaves, outputs_2d, take

Target = Callable[[Tensor, Tensor | slice], Tensor]
"""From outputs [n, C] and the rows they belong to, to the quantities explained, [n, c]."""


@dataclass(frozen=True)
class Secant:
    """Discrete gradients of n quantities with c components each.

    Attributes:
        start: f(x; θ), [n, c].
        end: f(x; θ'), [n, c].
        factors: D, but for the correction.
        correction: r/‖Δ‖², [n, c], where the model as a whole needed Gonzalez' rank-one term; else ``None``.
            The full gradient is D + correction · Δ.
        direction: Δ = θ'−θ.
    """

    start: Tensor
    end: Tensor
    factors: Factors
    correction: Tensor | None
    direction: Tensors

    def along(self, direction: Tensors) -> Tensor:
        """⟨D, direction⟩, [n, c]; parameters that ``direction`` lacks count as 0."""
        found = dot(self.factors, direction)
        if self.correction is None:
            return found
        shared = [(self.direction[n] * d).sum() for n, d in direction.items() if n in self.direction]
        return found + self.correction * torch.stack(shared).sum() if shared else found


@dataclass(frozen=True)
class Change:
    """A change of parameters and buffers, by name; made once for all queries asked about it.

    Attributes:
        start: θ.
        end: θ'.
        middle: (θ+θ')/2, leaves of autograd graphs.
        direction: Δ = θ'−θ.
    """

    start: Tensors
    end: Tensors
    middle: Tensors
    direction: Tensors

    @classmethod
    def between(cls, start: Tensors, end: Tensors, names: Sequence[str]) -> Change:
        """The change of these names' values."""
        start, end = ({name: state[name] for name in names} for state in (start, end))
        middle = {name: ((start[name] + end[name]) / 2).requires_grad_() for name in start}
        return cls(start, end, middle, {name: end[name] - start[name] for name in start})


class DiscreteGradient:
    """Makes discrete gradients of one model; measures once where the model keeps its examples.

    Args:
        model: in evaluation mode; its own values are not used, only its code.
        names: the parameters and buffers that training moves.

    Where the forward code cannot be followed (it leaves torch, or branches on a value that changes) the model
    as a whole counts as one operation: gradient at the midpoint plus rank-one correction.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        variables = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.variables = {name: variables[name] for name in names}
        self.layout: Layout | None = None
        self.extents: dict[tuple[Place, int], Extent] = {}
        self.one_by_one = False
        self.traceable = False
        self.like: list[tuple[str, torch.dtype, torch.Size]] = []
        self.examples = 0

    def __call__(self, start: Tensors, end: Tensors, inputs: Inputs, target: Target) -> Secant:
        """Discrete gradients from ``start`` to ``end`` (values by name) for a batch of n inputs."""
        return self.along(Change.between(start, end, self.names), inputs, target)

    def along(self, change: Change, inputs: Inputs, target: Target) -> Secant:
        """As called, for a change of :attr:`names` that others may be asked about, too."""
        self._look_at(change, inputs)
        rows = count(inputs)
        if not self.one_by_one or rows == 1:
            made, mixed = self._whole(change, inputs, target, slice(None))
            if not mixed or rows == 1:
                return made
            self.one_by_one, self.layout = True, None
        singles = [
            self._whole(change, take(inputs, at), target, at)[0] for at in (slice(i, i + 1) for i in range(rows))
        ]
        return _joined(singles)

    def _look_at(self, change: Change, inputs: Inputs) -> None:
        """Forget what was measured on inputs of another length or kind, or on too few of them to tell them apart."""
        like, examples = [(path, leaf.dtype, leaf.shape[1:]) for path, leaf in leaves(inputs)], min(3, count(inputs))
        if like != self.like or examples > self.examples:
            self.like, self.examples, self.layout, self.one_by_one = like, examples, None, False
            self.traceable = self._agrees(change, inputs)

    def _whole(self, change: Change, inputs: Inputs, target: Target, rows: Tensor | slice) -> tuple[Secant, bool]:
        """The gradients, and whether examples were mixed on the way."""
        if self.traceable:
            try:
                values, factors, trace = self._trace(change, inputs, target, rows)
                secant = self._finish(change, values, factors, trace.inexact)
                if trace.inexact or trace.mixed or _adds_up(secant):
                    return secant, trace.mixed
            except (KxError, torch.OutOfMemoryError):
                raise
            except Exception:  # a branch that this segment crosses, a target that leaves torch
                pass
        return self._at_midpoint(change, inputs, target, rows), False

    def _at_midpoint(self, change: Change, inputs: Inputs, target: Target, rows: Tensor | slice) -> Secant:
        """The whole model as one operation: its ordinary gradient halfway, and the correction."""
        values = tuple(target(self._plain(where, inputs), rows) for where in (change.start, change.end))
        self._set(change.middle)
        parameters = {name: v for name, v in self.variables.items() if v.requires_grad}
        layout = layout_of(self.model, inputs, parameters)
        capture, inputs = Capture(parameters, layout, count(inputs)), copied(inputs)
        with torch.enable_grad():
            with capture.around():
                outputs = outputs_2d(call(self.model, inputs))
            middle = target(outputs, rows)
            factors = differentiate(middle, capture, parameters)
        return self._finish(change, values, factors, correct=True)

    def _finish(self, change: Change, values: tuple[Tensor, ...], factors: Factors, correct: bool) -> Secant:
        direction = change.direction
        if not factors:  # nothing that autograd can see: the correction, if any, is the whole gradient
            name, moved = next(iter(direction.items()))
            factors = [Dense(name, values[0].new_zeros(*values[0].shape, moved.numel()))]
        correction = None
        if correct:
            norm = torch.stack([d.square().sum() for d in direction.values()]).sum()
            residual = values[1] - values[0] - dot(factors, direction)
            correction = rank_one_residual(residual, norm)
        return Secant(values[0], values[1], factors, correction, direction)

    def _trace(
        self, change: Change, inputs: Inputs, target: Target, rows: Tensor | slice
    ) -> tuple[tuple[Tensor, Tensor], Factors, Trace]:
        if self.layout is None:
            self.layout = self._measure(change, inputs)
        capture = Capture(change.middle, self.layout, count(inputs))
        outputs, trace = self._run(change, inputs, capture)
        with torch.enable_grad():
            values = target(outputs, rows)
            if not isinstance(values, TwoPoint):
                return (values, values), differentiate(values, capture, change.middle), trace
            factors = differentiate(values.middle, capture, change.middle)
        return (values.start, values.end), factors, trace

    def _run(self, change: Change, inputs: Inputs, capture: Capture) -> tuple[Tensor, Trace]:
        trace = Trace(count(inputs), capture, self.extents)
        pairs = {}
        for name in self.names:
            pair = TwoPoint(change.start[name], change.end[name], change.middle[name], trace)
            pair.extent = Extent.FIXED
            pairs[id(self.variables[name])] = pair
        inputs = copied(inputs)
        with torch.enable_grad(), Substitution(pairs, trace):
            return outputs_2d(call(self.model, inputs)), trace

    def _measure(self, change: Change, inputs: Inputs) -> Layout:
        size = 1 if self.one_by_one else count(inputs)
        traces: dict[int, Trace] = {}
        self.extents = {}

        def run(order: Tensor, capture: Capture) -> Tensor:
            outputs, trace = self._run(change, take(inputs, order % size), capture)
            traces.setdefault(len(order), trace)
            return outputs.middle if isinstance(outputs, TwoPoint) else outputs

        with torch.enable_grad():
            layout = measure(run, change.middle)
            self.extents = _extents(traces[2].shapes, traces[3].shapes)
            if traces[3].asked:  # operations without a rule are taken by example only now that the examples are found
                layout = measure(run, change.middle)
            return checked(layout, run, change.middle)

    def _set(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, variable in self.variables.items():
                variable.copy_(values[name])

    def _plain(self, values: Tensors, inputs: Inputs) -> Tensor:
        self._set(values)
        with torch.no_grad():
            return outputs_2d(call(self.model, copied(inputs)))

    def _agrees(self, change: Change, inputs: Inputs) -> bool:
        """Whether following the code gives the model's own outputs at both ends."""
        batch = take(inputs, slice(0, 2))
        try:
            outputs, _ = self._run(change, batch, Capture({}, Layout({}, {}), count(batch)))
        except (KxError, torch.OutOfMemoryError):
            raise
        except Exception:  # Untraceable, or whatever the model's own code raises when it is followed
            return False
        if not isinstance(outputs, TwoPoint):
            return True
        tolerance = torch.finfo(outputs.start.dtype).eps ** 0.5
        pairs = ((outputs.start, self._plain(change.start, batch)), (outputs.end, self._plain(change.end, batch)))
        return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())) for a, b in pairs)


def _adds_up(secant: Secant) -> bool:
    """Whether ⟨D, θ'−θ⟩ is f(θ')−f(θ) but for rounding.

    It is not where part of the model computes out of sight: again, while going backward (checkpointing).
    """
    change = secant.end - secant.start
    parts = torch.stack([change - secant.along(secant.direction), change, secant.start, secant.end]).flatten(1)
    missing, moved, first, last = torch.linalg.vector_norm(parts, dim=1).tolist()
    eps = torch.finfo(secant.start.dtype).eps
    return bool(missing <= math.sqrt(eps) * moved + 1e3 * eps * (first + last))


def _extents(
    two: dict[tuple[Place, int], torch.Size], three: dict[tuple[Place, int], torch.Size]
) -> dict[tuple[Place, int], Extent]:
    """What every operation's outputs hold, from their shapes for two and for three examples."""
    found = {}
    for key, shape in two.items():
        if shape == three.get(key):
            found[key] = Extent.FIXED
        elif key in three and shape[0] == 2 and (3, *shape[1:]) == tuple(three[key]):
            found[key] = Extent.EXAMPLES
    return found


def _joined(parts: list[Secant]) -> Secant:
    corrections = [p.correction for p in parts]
    correction = None
    if any(c is not None for c in corrections):
        correction = torch.cat([torch.zeros_like(p.start) if p.correction is None else p.correction for p in parts])
    return Secant(
        torch.cat([p.start for p in parts]),
        torch.cat([p.end for p in parts]),
        concatenate([p.factors for p in parts]),
        correction,
        parts[0].direction,
    )
