"""The queries' side of the bill: what is asked about, and its gradient along every segment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.attribution.targets import ResolvedTarget, TargetSpec, resolve_target
from kxexplain.errors import DatasetError, KxError, ModelError, TargetError
from kxexplain.gradients.discrete import DiscreteGradient, Secant
from kxexplain.gradients.factors import size
from kxexplain.kernels.quadrature import Rule
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import State, Trajectory
from kxexplain.trajectory.batches import call, copied, count, fetch, leaves, outputs_2d, take
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model


@dataclass
class QuerySide:
    """The queries and how their gradients along a segment are formed."""

    inputs: Inputs
    target: ResolvedTarget
    rule: Rule
    budget: int
    gradient: DiscreteGradient
    names: list[str]
    buffers: set[str]
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
        trajectory: Trajectory,
        model: nn.Module,
        queries: Any,
        target: TargetSpec,
        rule: Rule,
        budget: int,
    ) -> QuerySide:
        """Check everything about the queries before any work starts.

        Raises:
            ModelError: not the recorded architecture, or one whose outputs are not the same twice.
            DatasetError: no queries, values that are not finite, or queries that the model cannot take.
            TargetError: the target does not exist.
        """
        Trajectory.required(trajectory).check_model(model)
        private = private_copy(model).eval()
        device = next(private.parameters()).device
        inputs, labels = query_batch(queries, device)
        first, last = (trajectory.state(trajectory.states[i].step) for i in (0, -1))
        with torch.random.fork_rng(devices=[]):
            load_model(first, private)
            before = first_outputs(private, inputs)
            load_model(last, private)
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
        names = moving_names(trajectory, first, last)
        buffers = {name for name, _ in private.named_buffers()}
        with torch.no_grad():
            baseline, prediction = (resolved.select(values, slice(None)) for values in (before, after))
        for which, values in (("first", baseline), ("trained", prediction)):
            if not bool(values.isfinite().all()):
                raise TargetError(
                    f"the target {resolved.name!r} of the {which} model is not finite for some queries; choose another"
                )
        side = cls(
            inputs, resolved, rule, budget, DiscreteGradient(private, names), names, buffers & set(names),
            baseline, prediction, labels, shaped.shape[1:],
        )  # fmt: skip
        side._choose_portions(first, last, device)
        side.steady = side._steady(private, first, last)
        return side

    def chunks(self) -> list[slice]:
        """Queries in portions whose gradients fit the budget."""
        return [slice(at, min(at + self.chunk, self.rows)) for at in range(0, self.rows, self.chunk)]

    def secants(self, start: Tensors, end: Tensors, rows: slice) -> list[tuple[float, Secant]]:
        """The gradients that stand for some queries between two states, with their weights."""
        start, end = ({name: state[name] for name in self.names} for state in (start, end))
        inputs, select = take(self.inputs, rows), self.target.select
        target = lambda values, within: select(values, _within(rows, within))  # noqa: E731
        if self.rule.exact:
            return [(1.0, self.gradient(start, end, inputs, target))]
        made = []
        for position, weight in self.rule.nodes:
            at = {name: torch.lerp(start[name], end[name], position) for name in self.names}
            made.append((weight, self.gradient(at, at, inputs, target)))
        return made

    def _steady(self, model: nn.Module, first: State, last: State) -> Tensor | None:
        """Buffers that are no floating-point numbers change at once, at the beginning: there is nothing in between."""
        counters = {name: b for name, b in last.buffers.items() if not b.is_floating_point()}
        if not counters:
            return None
        load_model(replace(first, buffers={**first.buffers, **counters}), model)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self.target.select(evaluate(model, self.inputs), slice(None))

    def _choose_portions(self, first: State, last: State, device: torch.device) -> None:
        """Measure a query's gradient and choose how many fit the budget at a time."""
        few = slice(0, min(2, self.rows))
        ends = [{k: v.to(device) for k, v in {**s.parameters, **s.buffers}.items()} for s in (first, last)]
        with torch.random.fork_rng(devices=[]):
            made = self.secants(ends[0], ends[1], few)
        each = sum(size(secant.factors) for _, secant in made) // (few.stop or 1)
        self.chunk = max(1, min(self.rows, self.budget // 8 // max(1, each)))


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
        inputs, labels = _to(queries, device), None
    if count(inputs) == 0:
        raise DatasetError("there are no queries; give at least one input")
    for path, leaf in leaves(inputs):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise DatasetError(f"the queries{path} hold NaN or infinite values; clean them first")
    return inputs, labels


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {k: _to(v, device) for k, v in inputs.items()}
    return tuple(_to(v, device) for v in inputs)


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
    try:
        together = evaluate(model, inputs)
        alone, again = (evaluate(model, take(inputs, slice(0, 1))) for _ in range(2))
    except (KxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DatasetError(f"the model cannot take the queries ({type(error).__name__}: {error}); {advice}") from error
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
