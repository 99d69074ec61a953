r"""The additive guess f_{m+n} = f_m + f_n − f_0, for models trained on two parts of the data, and how wrong it is.

Were the kernel the same along both trainings, and α as well, kernel terms of both parts could simply be added. They
are not: θ(t), and with it both, depends on all the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.attribution.queries import evaluate
from kxexplain.errors import ArgumentError
from kxexplain.learning.labels import predicted_classes
from kxexplain.shapes import Inputs
from kxexplain.trajectory import State, Trajectory
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model


@dataclass(frozen=True, eq=False)
class AdditiveGuess:
    """Outputs of the models trained on the parts, of the guess, and of the model trained on everything.

    Axes: query, output.

    Attributes:
        baseline: f_0, the model that all three trainings began with.
        first, second: of the models trained on the parts.
        whole: of the model trained on everything.
    """

    baseline: Float[Tensor, "query output"]
    first: Float[Tensor, "query output"]
    second: Float[Tensor, "query output"]
    whole: Float[Tensor, "query output"]

    @property
    def guess(self) -> Float[Tensor, "query output"]:
        """f_m + f_n − f_0."""
        return self.first + self.second - self.baseline

    @property
    def error(self) -> float:
        """‖guess − f‖ / ‖f − f_0‖: 0 for a perfect guess, 1 for one no better than the initial model."""
        return float((self.guess - self.whole).norm() / (self.whole - self.baseline).norm())

    @property
    def scaled_error(self) -> float:
        """The error left when the guess' change may be multiplied by the best number."""
        change, wanted = self.guess - self.baseline, self.whole - self.baseline
        best = float((change * wanted).sum() / change.square().sum())
        return float((best * change - wanted).norm() / wanted.norm())

    @property
    def agreement(self) -> float:
        """Share of the queries for which the guess and the model trained on everything name the same class."""
        return float((predicted_classes(self.guess) == predicted_classes(self.whole)).double().mean())

    def summary(self, labels: Tensor | None = None) -> dict[str, Any]:
        """The numbers; with labels [query], accuracies as well."""
        told: dict[str, Any] = {
            "error": self.error, "scaled_error": self.scaled_error, "agreement": self.agreement,
        }  # fmt: skip
        if labels is not None:
            for name in ("first", "second", "guess", "whole"):
                right = predicted_classes(getattr(self, name)) == labels
                told[f"{name}_accuracy"] = float(right.double().mean())
        return told


def additive_guess(
    first: Trajectory, second: Trajectory, whole: Trajectory, model: nn.Module, inputs: Inputs
) -> AdditiveGuess:
    """Compare models trained on two parts of the data, added, with the model trained on all of it.

    Args:
        first, second: recorded trainings on the parts.
        whole: that on everything, all three from the same initial parameters.
        model: of the recorded architecture; not changed.
        inputs: the queries.

    Raises:
        ArgumentError: the trainings did not begin with the same parameters.
        ModelError: another architecture.

    Source: measured here; Domingos 2020, arXiv 2012.00152, for the sum over examples that suggests it.

    >>> import tempfile, kxexplain as kx
    >>> data, model = kx.datasets.toy(20).train, nn.Linear(2, 2)
    >>> start = {name: value.clone() for name, value in model.state_dict().items()}
    >>> runs = []
    >>> for rows in (range(10), range(10, 20), range(20)):
    ...     _ = model.load_state_dict(start)
    ...     part = torch.utils.data.Subset(data, rows)
    ...     runs.append(kx.train(model, part, epochs=1, out=tempfile.mkdtemp(), progress=False))
    >>> additive_guess(*runs, model, torch.zeros(3, 2)).guess.shape
    torch.Size([3, 2])
    """
    private = private_copy(model).eval()
    starts = [run.state(run.states[0].step) for run in (first, second, whole)]
    for run in (first, second, whole):
        run.check_model(private)
    if not all(_same(starts[0], other) for other in starts[1:]):
        raise ArgumentError(
            "the trainings began with different parameters; train all three from the same initial model"
        )
    ends = [run.state(run.states[-1].step) for run in (first, second, whole)]
    found = []
    with torch.random.fork_rng(devices=[]):
        for state in (starts[0], *ends):
            load_model(state, private)
            found.append(evaluate(private, inputs))
    return AdditiveGuess(*found)


def _same(one: State, other: State) -> bool:
    return all(torch.equal(value, other.parameters[name]) for name, value in one.parameters.items())


__all__ = ["AdditiveGuess", "additive_guess"]
