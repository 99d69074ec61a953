r"""A trained model that goes on learning without being retrained: new examples enter as kernel terms.

f_new(x) = f(x) + Σ_j K(x, x_j) a_j, with K the tangent kernel of the model as it was trained, which is, with one vector
δ = Σ_j ∇f(x_j) a_j, the linearised model f(x) + ⟨∇f(x), δ⟩: its cost does not grow with what it has absorbed.
Source: the kernel form, Domingos 2020 (arXiv 2012.00152); the linearised model, Lee et al. 2019 (arXiv 1902.06720).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count as counting
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.attribution.result import Explanation
from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental import explaining, growing, merging, saving
from kxexplain.learning.incremental.encoding import checked_labels, positive
from kxexplain.learning.incremental.features import TangentFeatures
from kxexplain.learning.incremental.held import Batch, Held, Identity
from kxexplain.learning.incremental.intake import batch_of, named, trained
from kxexplain.learning.incremental.logistic import SOLVERS, LogisticRule
from kxexplain.learning.incremental.ridge import RidgeRule
from kxexplain.learning.incremental.rules import GradientRule, Rule
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.batches import fetch, take
from kxexplain.trajectory.losses import LOSSES, LossFunction, resolve

RULES = ("gradient", "ridge", "logistic")


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
            :meth:`learn` (see :meth:`tune`); the others take 1 % of the kernel's mean diagonal.
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
        if rule not in RULES or solver not in SOLVERS:
            raise ArgumentError(f"got rule={rule!r}, solver={solver!r}; expected one of {RULES}, {tuple(SOLVERS)}")
        if isinstance(remember, bool) or not isinstance(remember, int) or remember < 1:
            raise ArgumentError(f"got remember={remember!r}; expected a whole number of at least 1")
        if isinstance(parameters, str):
            raise ArgumentError(f"got parameters={parameters!r}; expected a list of names")
        if damping is not None:
            positive(damping, "damping", zero=rule == "ridge")
        # A tuple, so that the architecture is no part of this module.
        self.recorded = (model, architecture) if isinstance(model, Trajectory) and architecture is not None else None
        self.rule, self.solver, self.damping = rule, solver, None if damping is None else float(damping)
        self.rate, self.margin = positive(rate, "rate"), positive(margin, "margin")
        self.remember, self.parameters_taken = remember, None if parameters is None else list(parameters)
        self.loss = resolve(loss)[1] if loss is not None else model.loss if isinstance(model, Trajectory) else None
        self.start(TangentFeatures(trained(model, architecture), self.parameters_taken))
        if memory is not None:
            self._protect(memory)

    def start(self, features: TangentFeatures) -> None:
        """Begin with nothing learnt, from this model."""
        self.features, self.base = features, features.model
        self.held = Held()
        self.engine = self._engine()
        self.regression = self.loss is LOSSES["mse"]
        self.growth: list[tuple[int, float]] = []  # outputs added, and what they began at
        self.origin: str | None = None  # checksum of the model before it grew
        self.numbers = counting()
        self._vector: Tensors | None = None

    def _engine(self) -> Rule:
        if self.rule == "ridge":
            return RidgeRule(self.features, self.held, self.damping)
        if self.rule == "logistic":
            return LogisticRule(self.features, self.held, self.damping, self.solver)
        return GradientRule(self.features, self.held, self.damping, self._losses, self.rate)

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss is not None:  # which may want outputs in the shape that the model gives them
            shape = (-1, *self.features.shape)
            return self.loss(outputs.reshape(shape), targets.reshape(shape) if targets.is_floating_point() else targets)
        single = "logistic" if outputs.shape[1] == 1 else "cross_entropy"
        return LOSSES["mse" if targets.is_floating_point() else single](outputs, targets)

    # What it predicts.

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Outputs, called as the model is; without graph.

        In kernel form, f(x) + Σ_j K(x, x_j) a_j, while that takes fewer numbers than the vector δ; else
        f(x) + ⟨∇f(x), δ⟩.
        """
        batch: Inputs = named or (inputs[0] if len(inputs) == 1 else inputs)
        with torch.no_grad():
            outputs = self._predicted(batch)
        return outputs.reshape(-1, *self.features.shape)

    def _predicted(self, inputs: Inputs) -> Float[Tensor, "n c"]:
        if self.learnt and self.form == "vector":
            return self.features.linearised(inputs, self.vector())
        outputs = self.features.outputs(inputs)
        if not self.learnt:
            return outputs
        gram = self.features.gram(self.features.factors(inputs), self.held.factors())
        moved = (gram @ self.engine.coefficients().flatten()).view(outputs.shape)
        return outputs + moved.to(outputs)

    def predict(self, inputs: Inputs) -> Tensor:
        """Class numbers [n]; of a model that learnt targets which are numbers, its outputs [n, C].

        Raises:
            DatasetError: inputs that the model cannot take.
        """
        self.features.checked(inputs)
        with torch.no_grad():
            outputs = self._predicted(inputs)
        if self.regression:
            return outputs
        return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)

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
        labels = targets if isinstance(targets, Tensor) else torch.as_tensor(targets)
        labels = (labels[None] if labels.dim() == 0 else labels).to(outputs.device)
        labels = checked_labels(labels, len(outputs), outputs.shape[1], grow=new_classes)
        names = named(ids, len(outputs), self.held.ids, self.numbers)
        if not labels.is_floating_point() and int(labels.max()) >= max(2, outputs.shape[1]):
            self._grow(int(labels.max()) + 1 - outputs.shape[1], inputs)
        step = len(labels) if self.rule == "gradient" else self.remember
        for at in range(0, len(labels), step):
            rows = slice(at, at + step)
            self._enter(self.batch(names[rows], take(inputs, rows), labels[rows]))
        return names

    def _enter(self, batch: Batch) -> None:
        self.engine.learn(batch, self._outputs(batch))
        self.held.add(batch)
        self.regression = self.regression or (batch.targets is not None and batch.targets.is_floating_point())
        while len(self.held) - self.held.protected > self.remember:
            self.engine.release(self.held.protected)
            self.held.drop(self.held.protected)
        self._vector = None

    def _outputs(self, batch: Batch) -> Tensor:
        """The outputs that a gradient is taken at."""
        if self.rule != "gradient" or not self.learnt:
            return batch.base
        return batch.base + self.features.along(batch.factors, self.vector())

    def batch(self, names: list[Identity], inputs: Inputs, targets: Tensor | None) -> Batch:
        """Examples as the rule takes them, with their gradients."""
        return batch_of(self.features, names, inputs, targets, self.engine.frozen, rule=self.rule, margin=self.margin)

    def forget(self, name: Identity) -> None:
        """Undo what one example put in, exactly: the others' solve without it, or its part of its step taken back.

        Raises:
            ArgumentError: it is not held: never learnt, forgotten, or one of those that ``remember`` has no room for.
        """
        place = self.held.place(name)
        if place is None or place < self.held.protected:
            known = self.ids
            shown = f"{known[:5]!r}"[:-1] + (", …]" if len(known) > 5 else "]")
            raise ArgumentError(
                f"id {name!r} cannot be forgotten: held are {len(known)} examples, {shown}; of those learnt longer ago "
                f"the terms stay (remember={self.remember})"
            )
        self.engine.forget(place)
        self.held.drop(place)
        self._vector = None

    def tune(self) -> float:
        """Choose the ridge rule's damping anew, by leaving one out of the examples held, and solve with it.

        Returns:
            ρ.

        Raises:
            ArgumentError: another rule, nothing held, or terms of examples that are no longer held.
        """
        engine = self.engine
        if not isinstance(engine, RidgeRule) or not len(self.held) or engine.released:
            raise ArgumentError(
                f"the damping of rule={self.rule!r} with {len(self.held)} examples held cannot be chosen by leaving "
                "one out: that takes the ridge rule, and every example of its system"
            )
        engine.damping = None
        engine.rebuild()
        self._vector = None
        assert engine.damping is not None
        return engine.damping

    def _protect(self, memory: Any) -> None:
        """Hold past examples for good."""
        plain = isinstance(memory, (Tensor, dict))
        device = self.features.like.device
        inputs, targets = (memory, None) if plain else fetch(memory, range(len(memory)), device)
        outputs = self.features.checked(inputs)
        if targets is not None:
            targets = checked_labels(targets, len(outputs), outputs.shape[1], grow=False)
        names: list[Identity] = [f"memory {i}" for i in range(len(outputs))]
        self.held.add(self.batch(names, inputs, targets))
        self.held.protected = len(self.held)
        self.engine.rebuild()

    def _grow(self, extra: int, inputs: Inputs) -> None:
        """More outputs; the examples held are differentiated anew."""
        if isinstance(self.engine, RidgeRule) and self.engine.released:
            raise ArgumentError(
                f"classes cannot be added once more examples were learnt than are held (remember={self.remember}); "
                "go on from merge().model, or with a larger remember="
            )
        lowest = float(self.features.outputs(inputs).min(1).values.mean())
        growing.grow(self, extra, lowest, inputs)

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
        if not len(self.held):
            return self.features.outputs(inputs)[:, None][:, :0]
        gram = self.features.gram(self.features.factors(inputs), self.held.factors())
        a = self.engine.coefficients()
        m, c = a.shape
        return torch.einsum("ncmk,mk->nmc", gram.view(-1, c, m, c), a)

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

    def __repr__(self) -> str:
        damping = "" if self.chosen_damping is None else f", damping {self.chosen_damping:.3g}"
        memory = f", {self.held.protected} in memory" if self.held.protected else ""
        return (
            f"IncrementalModel({type(self.base).__name__}, {self.rule}{damping}, {len(self.ids)} examples held"
            f"{memory}, {self.form} form)"
        )
