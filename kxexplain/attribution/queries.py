"""The queries' side of the bill: what is asked about, and its gradient along every segment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.attribution.targets import ResolvedTarget, TargetSpec, resolve_target
from kxexplain.errors import DatasetError, KxError, ModelError, TargetError
from kxexplain.gradients.discrete import Change, DiscreteGradient, Secant
from kxexplain.gradients.factors import size
from kxexplain.kernels.quadrature import Rule
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import State, Trajectory
from kxexplain.trajectory.batches import call, copied, count, fetch, leaves, mapped, outputs_2d, take
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model


@dataclass
class Ends:
    """A training's first and last state with a copy of the model to ask there: what all queries have in common.

    Attributes:
        dtype: in which the copy computes, if not in the recorded model's own type.
        model: a private copy, in evaluation mode; holds whichever state was asked last.
        names: the parameters and buffers that training moves.
        buffers: which of these are buffers.
        gradient: makes the discrete gradients, and remembers how the model keeps its examples.
        sizes: bytes that one query's gradient was found to take, by what a query looks like.
    """

    trajectory: Trajectory
    dtype: torch.dtype | None
    model: nn.Module
    first: State
    last: State
    names: list[str]
    buffers: set[str]
    gradient: DiscreteGradient
    sizes: dict[tuple[Any, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectory: Trajectory, model: nn.Module, dtype: torch.dtype | None = None) -> Ends:
        """Read the two states; ``ModelError`` for a model that is not of the recorded architecture."""
        Trajectory.required(trajectory).check_model(model)
        private = private_copy(model).eval().to(dtype)
        first, last = (trajectory.state(trajectory.states[i].step) for i in (0, -1))
        names = moving_names(trajectory, first, last)
        buffers = {name for name, _ in private.named_buffers()} & set(names)
        return cls(trajectory, dtype, private, first, last, names, buffers, DiscreteGradient(private, names))

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    def values(self) -> tuple[Tensors, Tensors]:
        """Parameters and buffers at both ends, on the model's device."""
        first, last = (
            {name: self.placed(value) for name, value in {**state.parameters, **state.buffers}.items()}
            for state in (self.first, self.last)
        )
        return first, last

    def placed(self, value: Tensor) -> Tensor:
        """The value as the model computes with it: on its device, and in its type if it is no whole number."""
        return value.to(self.device, self.dtype if value.is_floating_point() else None)


@dataclass
class QuerySide:
    """The queries and how their gradients along a segment are formed."""

    ends: Ends
    inputs: Inputs
    given: Inputs
    """The inputs in the type that they came in."""
    target: ResolvedTarget
    rule: Rule
    budget: int
    baseline: Tensor
    prediction: Tensor
    labels: Tensor | None
    shape: torch.Size
    """One query's outputs as the model gives them."""
    chunk: int = 0
    steady: Tensor | None = None
    """The initial model's quantities with the trained model's counters, where these matter, [q, c]."""

    @property
    def rows(self) -> int:
        """Q."""
        return self.prediction.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.prediction.dtype

    @classmethod
    def prepare(
        cls,
        ends: Ends,
        queries: Any,
        target: TargetSpec,
        rule: Rule,
        budget: int,
    ) -> QuerySide:
        """Check everything about the queries before any work starts.

        Raises:
            ModelError: outputs that are not the same twice.
            DatasetError: no queries, values that are not finite, or queries that the model cannot take.
            TargetError: the target does not exist.
        """
        private, trajectory = ends.model, ends.trajectory
        given, labels = query_batch(queries, ends.device)
        inputs = mapped(given, ends.placed)
        labels = None if labels is None else ends.placed(labels)
        with torch.random.fork_rng(devices=[]):
            load_model(ends.first, private)
            before = first_outputs(private, inputs)
            load_model(ends.last, private)
            shaped = outputs_of(private, inputs)
            after = outputs_2d(shaped)
            if not torch.equal(after, evaluate(private, inputs)):
                raise ModelError(
                    "the model gives different outputs for the same inputs in evaluation mode; something random "
                    "(dropout called as a function?) is left on: make it depend on self.training"
                )
        resolved = resolve_target(
            target, after, labels, trajectory.loss if target == "loss" else None, shaped.shape[1:]
        )
        with torch.no_grad():
            baseline, prediction = (resolved.select(values, slice(None)) for values in (before, after))
        for which, values in (("first", baseline), ("trained", prediction)):
            if not bool(values.isfinite().all()):
                raise TargetError(
                    f"the target {resolved.name!r} of the {which} model is not finite for some queries; choose another"
                )
        side = cls(ends, inputs, given, resolved, rule, budget, baseline, prediction, labels, shaped.shape[1:])
        side.chunk = side._portions()
        side.steady = side._steady()
        return side

    @property
    def names(self) -> list[str]:
        """The parameters and buffers that training moves."""
        return self.ends.names

    @property
    def buffers(self) -> set[str]:
        """Which of these names are buffers."""
        return self.ends.buffers

    def chunks(self) -> list[slice]:
        """Queries in portions whose gradients fit the budget."""
        return [slice(at, min(at + self.chunk, self.rows)) for at in range(0, self.rows, self.chunk)]

    def secants(self, change: Change, rows: slice) -> list[tuple[float, Secant]]:
        """The gradients that stand for some queries along a change, with their weights."""
        gradient, inputs, select = self.ends.gradient, take(self.inputs, rows), self.target.select
        target = lambda values, within: select(values, _within(rows, within))  # noqa: E731
        if self.rule.exact:
            return [(1.0, gradient.along(change, inputs, target))]
        made = []
        for position, weight in self.rule.nodes:
            at = {name: torch.lerp(change.start[name], change.end[name], position) for name in self.names}
            made.append((weight, gradient(at, at, inputs, target)))
        return made

    def _steady(self) -> Tensor | None:
        """Buffers that are no floating-point numbers change at once, at the beginning: there is nothing in between."""
        model, first = self.ends.model, self.ends.first
        counters = {name: b for name, b in self.ends.last.buffers.items() if not b.is_floating_point()}
        if not counters:
            return None
        load_model(replace(first, buffers={**first.buffers, **counters}), model)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self.target.select(evaluate(model, self.inputs), slice(None))

    def _portions(self) -> int:
        """How many queries' gradients fit the budget at a time, from the size of one."""
        one = (self.baseline.shape[1], *((path, leaf.dtype, leaf.shape[1:]) for path, leaf in leaves(self.inputs)))
        if one not in self.ends.sizes:
            few = slice(0, min(3, self.rows))
            with torch.random.fork_rng(devices=[]):
                made = self.secants(Change.between(*self.ends.values(), self.names), few)
            self.ends.sizes[one] = sum(size(secant.factors) for _, secant in made) // (few.stop or 1)
        return max(1, min(self.rows, self.budget // 8 // max(1, self.ends.sizes[one])))


def _within(outer: slice, inner: Tensor | slice) -> slice:
    assert isinstance(inner, slice)
    start = outer.start + (inner.start or 0)
    stop = outer.stop if inner.stop is None else outer.start + inner.stop
    return slice(start, stop)


def query_batch(queries: Any, device: torch.device) -> tuple[Inputs, Tensor | None]:
    """Queries as a batch of inputs, with targets where they were given.

    Raises:
        DatasetError: there are none, or their values are not finite.
    """
    plain = isinstance(queries, (Tensor, dict)) or (
        isinstance(queries, (tuple, list)) and len(queries) > 0 and all(isinstance(q, Tensor) for q in queries)
    )
    if not plain:
        if not hasattr(queries, "__getitem__") or not hasattr(queries, "__len__"):
            raise DatasetError(f"got queries of type {type(queries).__name__}; expected a tensor or a dataset")
        if len(queries) == 0:
            raise DatasetError("there are no queries; give at least one input")
        with torch.random.fork_rng(devices=[]):
            inputs, labels = fetch(queries, range(len(queries)), device)
    else:
        inputs, labels = mapped(queries, lambda leaf: leaf.to(device)), None
    if count(inputs) == 0:
        raise DatasetError("there are no queries; give at least one input")
    for path, leaf in leaves(inputs):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise DatasetError(f"the queries{path} hold NaN or infinite values; clean them first")
    return inputs, labels


def moving_names(trajectory: Trajectory, first: State, last: State) -> list[str]:
    """The parameters that train and the floating-point buffers that change, by name."""
    optimized = {name for group in trajectory.manifest.optimizer.groups for name in group.names}
    names = [
        t.name
        for t in trajectory.manifest.model.parameters
        if (t.requires_grad and t.name in optimized) or _differ(first, last, t.name)
    ]
    return names + [
        name for name, value in first.buffers.items() if value.is_floating_point() and _differ(first, last, name)
    ]


def _differ(first: State, last: State, name: str) -> bool:
    a, b = ({**state.parameters, **state.buffers}[name] for state in (first, last))
    return not torch.equal(a, b)


def evaluate(model: nn.Module, inputs: Inputs) -> Tensor:
    """Outputs [n, C] of a model as it stands, without graph."""
    return outputs_2d(outputs_of(model, inputs))


def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Outputs of a model as it stands, in the shape it gives them, without graph."""
    with torch.no_grad():
        return call(model, copied(inputs))


def first_outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """As :func:`evaluate`, of queries not tried before: the model must give each a row, together and alone.

    Raises:
        DatasetError: it does not; the shape or type is another than in training, or the batch axis is missing.
    """
    given = ", ".join(f"{path.lstrip('.')} {leaf.dtype} {tuple(leaf.shape)}".strip() for path, leaf in leaves(inputs))
    advice = (
        f"got queries {given}; expected a batch of inputs like the training examples': the same types, the same axes "
        "after the first, which counts the queries (a single one is x[None])"
    )
    failing = "the model cannot take the queries"
    try:
        together = evaluate(model, inputs)
        failing = "the model takes the queries together, but not one alone (batch norm needs track_running_stats=True)"
        single = count(inputs) == 1
        alone, again = (together if single else evaluate(model, take(inputs, slice(0, 1))) for _ in range(2))
    except (KxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DatasetError(f"{failing}: {type(error).__name__}: {error}; {advice}") from error
    if len(alone) != 1 or together.shape != (count(inputs), alone.shape[1]):
        found = f"{tuple(together.shape)}, and for the first alone {tuple(alone.shape)}"
        raise DatasetError(f"the model's outputs for {count(inputs)} queries have shape {found}; {advice}")
    close = torch.finfo(together.dtype).eps ** 0.5
    scale = close * float(alone.abs().max())
    if torch.equal(alone, again) and not torch.allclose(together[:1], alone, rtol=close, atol=scale, equal_nan=True):
        raise ModelError(
            "the model's output for the first query depends on the other queries (in evaluation mode, too): what is "
            "predicted is not one query's alone; explain the queries one at a time"
        )
    return together
