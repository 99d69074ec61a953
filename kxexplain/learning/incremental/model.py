r"""A trained model that goes on learning without being retrained: new examples enter as kernel terms.

f_new(x) = f(x) + Σ_j K(x, x_j) a_j, with K the tangent kernel of the model as it was trained, which is, with one vector
δ = Σ_j ∇f(x_j) a_j, the linearised model f(x) + ⟨∇f(x), δ⟩: its cost does not grow with what it has absorbed.
Source: the kernel form, Domingos 2020 (arXiv 2012.00152); the linearised model, Lee et al. 2019 (arXiv 1902.06720).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count as counting
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.attribution.result import Explanation
from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental import explaining, growing, merging, predicting, saving
from kxexplain.learning.incremental.encoding import as_targets, checked_labels
from kxexplain.learning.incremental.features import TangentFeatures
from kxexplain.learning.incremental.held import Batch, Held, Identity
from kxexplain.learning.incremental.intake import batch_of, named, trained
from kxexplain.learning.incremental.settings import Settings
from kxexplain.learning.incremental.undoing import unchanged_on_error
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.batches import take
from kxexplain.trajectory.losses import LOSSES, LossFunction, resolve


class IncrementalModel(nn.Module):
    r"""A model and the kernel terms of what it learns after its training: a drop-in for the model itself.

    Rules, with J the examples held, ρ the damping, and f the model as trained:

    * ``"ridge"``: (K_JJ + ρI) a = y − f(X_J). Of class numbers, y are the nearest outputs at which the label leads by
      ``margin``; of targets that are numbers, these. Kept up by changes of a Cholesky factor.
    * ``"logistic"``: min_a Σ cross-entropy + (ρ/2) aᵀKa, by Newton's method or gradient descent in a.
    * ``"gradient"``: a = −rate · ∂(mean loss)/∂f for each call of :meth:`learn`: an SGD step of the linearised model.

    The ``remember`` latest examples are held: they can be forgotten, corrected and seen in a bill. The terms of earlier
    ones stay, as one vector.

    Args:
        model: a trained module, or a :class:`kxexplain.Trajectory`, whose last state is taken (and which
            :meth:`explain` then itemises, too).
        architecture: with a trajectory, a model of the recorded architecture; only its code is used.
        rule: ``"ridge"``, ``"logistic"`` or ``"gradient"``.
        damping: ρ. If ``None``, the ridge rule chooses it by leaving one out, in closed form, at the first
            :meth:`learn`; the others take 1 % of the kernel's mean diagonal. :meth:`tune` chooses it anew, for the
            logistic rule too.
        rate: of the gradient rule.
        margin: of the ridge rule.
        loss: of the gradient rule, by name or a function (outputs, targets) to one loss per example; by default the
            trajectory's, or what fits the targets: cross-entropy, logistic (one output) or mse (targets that are
            numbers).
        memory: past examples whose outputs are to stay, inputs or a dataset of (input, target); a dataset's targets
            are aimed at, as new ones are. They take part in every rule's solve, and are not forgotten.
        remember: how many new examples are held at most.
        parameters: take the tangent kernel of these parameters only (names, or what names begin with, such as
            ``["4"]`` for the last layer of a sequential model).
        solver: of the logistic rule, ``"newton"`` or ``"descent"``.

    Raises:
        ModelError: nothing trainable, or not the trajectory's architecture.
        ArgumentError: an unknown rule, solver, loss or parameter; a number out of range.
        DatasetError: memory that the model cannot take.

    >>> model = torch.nn.Linear(2, 2)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> learner = IncrementalModel(model, damping=1.0)
    >>> learner.learn(torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 0.0]]))  # K(x, x) = x·x + 1 = 3
    [0]
    >>> learner(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))  # 4 K / (K + ρ)
    tensor([[3., 0.],
            [2., 0.]])
    >>> learner.forget(0)
    >>> learner(torch.tensor([[1.0, 1.0]]))
    tensor([[0., 0.]])
    """

    def __init__(
        self,
        model: nn.Module | Trajectory,
        architecture: nn.Module | None = None,
        *,
        rule: str = "ridge",
        damping: float | None = None,
        rate: float = 0.1,
        margin: float = 4.0,
        loss: str | LossFunction | None = None,
        memory: Any = None,
        remember: int = 500,
        parameters: Sequence[str] | None = None,
        solver: str = "newton",
    ) -> None:
        super().__init__()
        self.settings = Settings(rule, damping, rate, margin, remember, solver, parameters)
        # A tuple, so that the architecture is no part of this module.
        self.recorded = (model, architecture) if isinstance(model, Trajectory) and architecture is not None else None
        self.loss = resolve(loss)[1] if loss is not None else model.loss if isinstance(model, Trajectory) else None
        self.start(TangentFeatures(trained(model, architecture), parameters))
        if memory is not None:
            growing.protect(self, memory)

    def start(self, features: TangentFeatures) -> None:
        """Begin with nothing learnt, from this model."""
        self.features, self.base = features, features.model
        self.held = Held()
        self.engine = self.settings.engine(features, self.held, self.loss)
        self.regression = self.loss is LOSSES["mse"]
        self.growth: list[tuple[int, float]] = []  # outputs added, and what they began at
        self.origin: str | None = None  # checksum of the model before it grew
        self.numbers = counting()
        self._vector: Tensors | None = None

    # What it predicts.

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Outputs, called as the model is; without graph.

        In kernel form, f(x) + Σ_j K(x, x_j) a_j, while that takes fewer numbers than the vector δ; else
        f(x) + ⟨∇f(x), δ⟩.
        """
        batch: Inputs = named or (inputs[0] if len(inputs) == 1 else inputs)
        with torch.no_grad():
            outputs = predicting.outputs(self, batch)
        return outputs.reshape(-1, *self.features.shape)

    def predict(self, inputs: Inputs) -> Tensor:
        """Class numbers [n]; of a model that learnt targets which are numbers, its outputs [n, C].

        Raises:
            DatasetError: inputs that the model cannot take.
        """
        self.features.checked(inputs)
        with torch.no_grad():
            outputs = predicting.outputs(self, inputs)
        return outputs if self.regression else predicting.classes(outputs)

    def vector(self) -> Tensors:
        """δ by parameter, in float64: everything that was learnt."""
        if self._vector is None:
            self._vector = self.engine.vector()
        return self._vector

    @property
    def learnt(self) -> bool:
        """Whether there is anything to add to the model's own outputs."""
        return bool(len(self.held)) or not self.engine.exact

    @property
    def form(self) -> Literal["kernel", "vector"]:
        """How predictions are made: by the examples held, or by δ, whichever takes fewer numbers."""
        return "kernel" if self.engine.exact and self.held.elements < self.features.size else "vector"

    @property
    def ids(self) -> list[Identity]:
        """The examples that can be forgotten, in the order they came."""
        return self.held.ids[self.held.protected :]

    @property
    def chosen_damping(self) -> float | None:
        """ρ in use: as given, or as chosen."""
        return self.engine.damping

    # What it learns.

    def learn(
        self, inputs: Inputs, targets: Any, *, ids: Iterable[Any] | None = None, new_classes: bool = False
    ) -> list[Identity]:
        """Take in one or many labelled examples.

        Args:
            inputs: a batch of m, as the model takes it.
            targets: class numbers [m] (for one example, a number will do), or numbers [m, C].
            ids: names for them, whole numbers or texts; by default, numbers in the order of learning.
            new_classes: let the model grow outputs for class numbers that it has none for. Its last layer must be
                linear; a new output begins at a constant as low as the lowest there are.

        Returns:
            The examples' ids.

        Raises:
            DatasetError: no examples, NaN, inputs or targets of another shape, an unknown label.
            ArgumentError: an id that is taken, or a singular system (with the damping that mends it).
            ModelError: new classes, where the model does not end in a linear layer.
            TrainingError: the logistic rule's optimum was not found.
        """
        outputs = self.features.checked(inputs)
        labels = checked_labels(as_targets(targets, outputs), len(outputs), outputs.shape[1], grow=new_classes)
        names = named(ids, len(outputs), self.held.ids, self.numbers)
        step = len(labels) if self.settings.rule == "gradient" else self.settings.remember
        with unchanged_on_error(self):
            if not labels.is_floating_point() and int(labels.max()) >= max(2, outputs.shape[1]):
                growing.grow(self, int(labels.max()) + 1 - outputs.shape[1], inputs)
            for at in range(0, len(labels), step):
                rows = slice(at, at + step)
                self._enter(names[rows], take(inputs, rows), labels[rows])
        return names

    def _enter(self, names: list[Identity], inputs: Inputs, labels: Tensor) -> None:
        """Make room first, which changes no prediction, so that what comes can be taken back exactly."""
        self._release(self.settings.remember - len(names))
        batch = self.batch(names, inputs, labels)
        self.engine.learn(batch, self._outputs(batch))
        self.held.add(batch)
        self._release(self.settings.remember)  # of a gradient step on more than that
        self.regression = self.regression or labels.is_floating_point()
        self._vector = None

    def _release(self, room: int) -> None:
        """Let go of the oldest examples until so many are held."""
        while len(self.held) - self.held.protected > max(0, room):
            self.engine.release(self.held.protected)
            self.held.drop(self.held.protected)

    def _outputs(self, batch: Batch) -> Tensor:
        """The outputs that a gradient is taken at."""
        if self.settings.rule != "gradient" or not self.learnt:
            return batch.base
        return batch.base + self.features.along(batch.factors, self.vector())

    def batch(self, names: list[Identity], inputs: Inputs, targets: Tensor | None) -> Batch:
        """Examples as the rule takes them, with their gradients."""
        own = self.settings
        return batch_of(self.features, names, inputs, targets, self.engine.frozen, rule=own.rule, margin=own.margin)

    def forget(self, name: Identity) -> None:
        """Undo what one example put in, exactly: the others' solve without it, or its part of its step taken back.

        Raises:
            ArgumentError: it is not held: never learnt, forgotten, or one of those that ``remember`` has no room for.
        """
        place = self.held.place(name, self.settings.remember)
        with unchanged_on_error(self):
            self.engine.forget(place)
            self.held.drop(place)
            self._vector = None

    def tune(self) -> float:
        """Choose the damping anew by leaving one out of the examples held, the memory's too, and solve with it.

        For the ridge rule that is in closed form. Kernel logistic regression has none: its left-out outputs are one
        Newton step from the optimum of all.

        Returns:
            ρ.

        Raises:
            ArgumentError: the gradient rule, nothing held, or a system with terms of examples that are no longer held.
        """
        if not self.ids:
            raise ArgumentError("no examples are held that could be left out; learn some first")
        with unchanged_on_error(self):
            found = self.engine.tune()
            self._vector = None
        return found

    # What can be done with it.

    def merge(self, inputs: Inputs | None = None) -> merging.Merged:
        """Fold δ into the weights, θ + δ, and say how much the predictions then change: this model stays as it is.

        The linearised model is not the network at θ + δ; the two part as δ grows.

        Args:
            inputs: where to measure; the examples held if ``None``.

        Raises:
            ArgumentError: nothing to measure on.
        """
        return merging.merge(self, inputs)

    def explain(self, dataset: Any, queries: Any, target: Any = "predicted", **options: Any) -> Explanation:
        """The bill of this model's predictions: training's contributions, and the added examples as lines.

        Args:
            dataset: the training examples, as recorded.
            queries: as for :func:`kxexplain.explain`.
            target: ``"predicted"``, ``"label"``, an output's number or ``"all"``.
            options: others of :func:`kxexplain.explain`.

        Raises:
            ArgumentError: it was not made from a trajectory.
            TargetError: a target that is no output.
        """
        return explaining.explain(self, dataset, queries, target, **options)

    def contributions(self, inputs: Inputs) -> Float[Tensor, "n m c"]:
        """K(x, x_j) a_j of every example held, memory first, in the order of ``held.ids``."""
        return predicting.contributions(self, inputs)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything but the model's own weights to one safetensors file.

        Raises:
            TrajectoryError: it cannot be written.
        """
        return saving.save(self, path)

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: nn.Module | Trajectory, architecture: nn.Module | None = None, **own: Any
    ) -> IncrementalModel:
        """Read a saved state; runs no code of the file's.

        Args:
            path: the file.
            model: the model (or trajectory) that it was saved with.
            architecture: with a trajectory, a model of its architecture.
            own: ``loss=``, if it was a function of the caller's.

        Raises:
            TrajectoryError: missing, damaged, or something else.
            ModelError: another model.
        """
        return saving.load(cls, path, model, architecture, **own)

    def train(self, mode: bool = True) -> IncrementalModel:
        """The model stays in evaluation mode: its outputs and their gradients are those it was trained to."""
        super().train(mode)
        self.base.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IncrementalModel:
        """What ``to``, ``cuda``, ``double`` and the like call: what was learnt goes along."""
        super()._apply(fn, recurse)
        growing.moved(self, fn)
        return self

    def __repr__(self) -> str:
        damping = "" if self.chosen_damping is None else f", damping {self.chosen_damping:.3g}"
        memory = f", {self.held.protected} in memory" if self.held.protected else ""
        return (
            f"IncrementalModel({type(self.base).__name__}, {self.settings.rule}{damping}, {len(self.ids)} examples held"
            f"{memory}, {self.form} form)"
        )
