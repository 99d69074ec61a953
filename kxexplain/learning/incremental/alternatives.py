"""Must I retrain? Kernel terms beside no update, fine-tuning and full retraining: accuracy on new and old, and time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kxexplain.errors import ArgumentError, DatasetError
from kxexplain.kernels import tangent_kernel
from kxexplain.kernels.budget import progress_bar
from kxexplain.learning.incremental.model import IncrementalModel
from kxexplain.trajectory import Trajectory, count, fetch
from kxexplain.trajectory.batches import call, take
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model, set_rates

ROWS: dict[str, dict[str, Any]] = {
    "gradient": {"rule": "gradient"},
    "gradient, memory": {"rule": "gradient", "memory": True},
    "ridge": {"rule": "ridge"},
    "ridge, memory": {"rule": "ridge", "memory": True},
    "logistic": {"rule": "logistic"},
    "logistic, memory": {"rule": "logistic", "memory": True},
}
"""The kernel terms compared by default: options of :class:`IncrementalModel`."""

FACTORS = (0.1, 0.3, 1.0)
EPOCHS = (1, 3, 10)
"""What fine-tuning is tuned over: parts of training's learning rate, and passes over the new examples."""


@dataclass(frozen=True)
class Update:
    """One way to take new examples in.

    Attributes:
        name: what it is called.
        new: accuracy on test examples like the new ones.
        old: accuracy on test examples like the old ones.
        seconds: wall time; that of finding fine-tuning's settings is not counted.
        processor: seconds of the processor's time, which do not depend on what else the machine does.
        moved: ‖δ‖ / ‖θ‖, how far the weights would move.
        kernel_moved: how far the tangent kernel moves if δ is folded into the weights, ‖K' − K‖ / ‖K‖ on new test
            examples: where it is large, the kernel that was learnt with is not the network's any more.
        settings: the damping or rate in use.
    """

    name: str
    new: float
    old: float
    seconds: float
    processor: float
    moved: float | None = None
    kernel_moved: float | None = None
    settings: str = ""

    @property
    def both(self) -> float:
        """The mean of both accuracies."""
        return (self.new + self.old) / 2


@dataclass(frozen=True)
class Updates:
    """The table of all ways; the last one is full retraining."""

    rows: tuple[Update, ...]

    def __getitem__(self, name: str) -> Update:
        return next(row for row in self.rows if row.name == name)

    def table(self) -> Table:
        """To print."""
        table = Table("update", *(c for c in ("new", "old", "mean", "seconds", "weights moved", "kernel moved")))
        for row in self.rows:
            moved = ["" if v is None else f"{v:.2%}" for v in (row.moved, row.kernel_moved)]
            table.add_row(row.name, *(f"{v:.1%}" for v in (row.new, row.old, row.both)), f"{row.seconds:.3f}", *moved)
        return table

    def summary(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [asdict(row) | {"mean": row.both} for row in self.rows]

    def to_json(self) -> str:
        """The rows as JSON text."""
        return json.dumps(self.summary())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Mean accuracy against seconds: a figure, also saved to ``path``."""
        from kxexplain.plots import plot_updates

        figure = plot_updates(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        with open(os.devnull, "w") as nowhere:
            console = Console(width=100, file=nowhere, record=True, force_jupyter=False)
            console.print(self.table())
            return console.export_text().rstrip()


def compare_updates(
    trajectory: Trajectory,
    model: nn.Module,
    old: Any,
    new: Any,
    old_test: Any,
    new_test: Any,
    *,
    memory: int = 50,
    rows: Sequence[str] | None = None,
    whole: Any = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Updates:
    """Take new examples in by every means, and measure.

    Args:
        trajectory: the recorded training on the old examples; fine-tuning and retraining go by its optimiser, batch
            size, loss and number of epochs.
        model: a model of its architecture, with outputs for all classes; not changed.
        old: the old examples, as trained on: (input, class number).
        new: the new ones.
        old_test: test examples like the old ones.
        new_test: test examples like the new ones.
        memory: how many old examples the rows "… memory" protect, and fine-tuning mixes in.
        rows: which kernel terms; all of :data:`ROWS` if ``None``.
        whole: what retraining trains on; old and new if ``None``.
        options: further options of :class:`IncrementalModel`, for every row.
        seed: of the choice of the memory and of the order of batches.
        progress: show a bar over the ways.

    Raises:
        ArgumentError: an unknown row, no classes, or a run without a log.
        ModelError: not the recorded architecture.
        DatasetError: the old examples are not those recorded.
    """
    chosen = list(ROWS) if rows is None else list(rows)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise ArgumentError(f"got rows {unknown!r}; expected some of {list(ROWS)}")
    trajectory.check_model(model)
    trajectory.check_dataset(old)
    parts = {name: _whole(data) for name, data in
             {"old": old, "new": new, "old_test": old_test, "new_test": new_test}.items()}  # fmt: skip
    final, initial = private_copy(model).eval(), private_copy(model)
    load_model(trajectory.state(trajectory.states[-1].step), final)
    load_model(trajectory.state(trajectory.states[0].step), initial)
    draw = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(parts["old"][1]), generator=draw)[:memory]
    past = TensorDataset(take(parts["old"][0], kept), parts["old"][1][kept])  # type: ignore[arg-type]
    recipe = _Recipe.of(trajectory, seed)
    measure = _Measure(parts["new_test"], parts["old_test"])
    if chosen:  # what torch prepares at the first call of a process is nobody's time
        IncrementalModel(final).learn(take(parts["new"][0], slice(0, 2)), parts["new"][1][:2])
    found = [measure("no update", lambda: final)]
    with progress_bar(progress, len(chosen) + 2, "updating") as tick:
        for name in chosen:
            found.append(_kernel_row(name, final, past, parts["new"], measure, options or {}, recipe))
            tick()
        found.append(_fine_tuned(final, past, parts["new"], measure, recipe))
        tick()
        everything = _joined(parts["old"], parts["new"]) if whole is None else _whole(whole)
        found.append(measure("retraining", lambda: recipe.fit(initial, *everything, epochs=recipe.epochs)))
        tick()
    return Updates(tuple(found))


@dataclass(frozen=True)
class _Recipe:
    """How the run was trained, as far as a plain loop needs it."""

    trajectory: Trajectory
    batch: int
    epochs: int
    rates: tuple[float, ...]
    seed: int

    @classmethod
    def of(cls, trajectory: Trajectory, seed: int) -> _Recipe:
        if not len(trajectory) or not trajectory.manifest.logged:
            raise ArgumentError(f"{trajectory.path} has no log of steps to train by; record a training")
        first, last = trajectory.steps[0], trajectory.steps[len(trajectory) - 1]
        return cls(trajectory, len(first.indices), last.epoch + 1, first.rates, seed)

    def fit(self, start: nn.Module, inputs: Any, targets: Tensor, *, epochs: int, factor: float = 1.0) -> nn.Module:
        """A copy trained for so many epochs, in a seeded order of its own."""
        model = private_copy(start).train()
        optimizer = self.trajectory.build_optimizer(dict(model.named_parameters()))
        set_rates(optimizer, [factor * rate for rate in self.rates])
        draw = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(targets), generator=draw).split(self.batch):
                    optimizer.zero_grad()
                    self.trajectory.loss(call(model, take(inputs, rows)), targets[rows]).mean().backward()
                    optimizer.step()
        return model.eval()


@dataclass(frozen=True)
class _Measure:
    """Times the making of a predictor, and takes its accuracies."""

    new: tuple[Any, Tensor]
    old: tuple[Any, Tensor]

    def __call__(self, name: str, make: Callable[[], nn.Module], settings: str = "") -> Update:
        began, used = time.perf_counter(), time.process_time()
        predictor = make()
        seconds, processor = time.perf_counter() - began, time.process_time() - used
        new, old = (accuracy(predictor, *part) for part in (self.new, self.old))
        return Update(name, new, old, seconds, processor, settings=settings)


def accuracy(model: nn.Module, inputs: Any, targets: Tensor) -> float:
    """Share of the examples whose largest output is their class'."""
    with torch.no_grad():
        return float((call(model, inputs).argmax(1) == targets).double().mean())


def _kernel_row(
    name: str,
    final: nn.Module,
    past: TensorDataset,
    new: Any,
    measure: _Measure,
    options: dict[str, Any],
    recipe: _Recipe,
) -> Update:
    given = {**ROWS[name], **options, "remember": max(500, len(new[1]))}
    if given["rule"] == "gradient":  # one step on all new examples at the rate of training
        given.setdefault("rate", recipe.rates[0])
    memory = past if given.pop("memory", False) else None
    learner = IncrementalModel(final, memory=memory, **given)

    def make() -> nn.Module:
        learner.learn(*new)
        learner.vector()
        return learner

    found = measure(name, make)
    some = take(measure.new[0], slice(0, 20))
    merged = learner.merge(some)
    before, after = (tangent_kernel(m, some) for m in (final, merged.model))
    damping = learner.chosen_damping
    settings = f"rate {given['rate']:g}" if given["rule"] == "gradient" else f"damping {damping:.3g}"
    moved = float((after - before).norm() / before.norm())
    return replace(found, moved=merged.distance, kernel_moved=moved, settings=settings)


def _fine_tuned(final: nn.Module, past: TensorDataset, new: Any, measure: _Measure, recipe: _Recipe) -> Update:
    """On the new examples and the memory; rate and epochs by accuracy on a fifth of either that is kept back."""
    old = _whole(past)
    check = [torch.arange(0, len(y), 5) for _, y in (new, old)]
    learn = [torch.tensor([i for i in range(len(y)) if i % 5], dtype=torch.int64) for _, y in (new, old)]
    trial = _joined(*((take(x, rows), y[rows]) for (x, y), rows in zip((new, old), learn, strict=True)))

    def score(factor: float, epochs: int) -> float:
        tried = recipe.fit(final, *trial, epochs=epochs, factor=factor)
        pairs = zip((new, old), check, strict=True)
        return sum(accuracy(tried, take(x, rows), y[rows]) for (x, y), rows in pairs)

    factor, epochs = max(((f, e) for f in FACTORS for e in EPOCHS), key=lambda pair: score(*pair))
    settings = f"{factor:g} × rate, {epochs} epochs"
    make = lambda: recipe.fit(final, *_joined(new, old), epochs=epochs, factor=factor)  # noqa: E731
    return measure("fine-tuning", make, settings)


def _joined(*parts: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    if not all(isinstance(x, Tensor) for x, _ in parts):
        raise DatasetError("the comparison takes examples whose input is one tensor")
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _whole(data: Any) -> tuple[Any, Tensor]:
    inputs, targets = fetch(data, range(len(data)))
    if not isinstance(inputs, Tensor):
        raise DatasetError("the comparison takes examples whose input is one tensor")
    if targets.dim() != 1 or targets.is_floating_point() or count(inputs) != len(targets):
        raise DatasetError(f"got targets of {targets.dtype} and shape {tuple(targets.shape)}; expected class numbers")
    return inputs, targets


__all__ = ["ROWS", "Update", "Updates", "accuracy", "compare_updates"]
