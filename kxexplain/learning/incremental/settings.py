"""How an incremental model learns: its options, checked, and the rule that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.encoding import positive
from kxexplain.learning.incremental.features import TangentFeatures
from kxexplain.learning.incremental.held import Held
from kxexplain.learning.incremental.logistic import LogisticRule
from kxexplain.learning.incremental.optimum import SOLVERS
from kxexplain.learning.incremental.ridge import RidgeRule
from kxexplain.learning.incremental.rules import GradientRule, Rule
from kxexplain.trajectory.losses import LOSSES, LossFunction

RULES = ("gradient", "ridge", "logistic")


@dataclass(frozen=True)
class Settings:
    """The options of :class:`IncrementalModel`, which documents them.

    Raises:
        ArgumentError: an unknown rule or solver, or a number out of range.
    """

    rule: str
    damping: float | None
    rate: float
    margin: float
    remember: int
    solver: str
    parameters: Sequence[str] | None

    def __post_init__(self) -> None:
        if self.rule not in RULES or self.solver not in SOLVERS:
            raise ArgumentError(
                f"got rule={self.rule!r}, solver={self.solver!r}; expected one of {RULES}, {tuple(SOLVERS)}"
            )
        if isinstance(self.remember, bool) or not isinstance(self.remember, int) or self.remember < 1:
            raise ArgumentError(f"got remember={self.remember!r}; expected a whole number of at least 1")
        if isinstance(self.parameters, str):
            raise ArgumentError(f"got parameters={self.parameters!r}; expected a list of names")
        if self.damping is not None:
            positive(self.damping, "damping", zero=self.rule == "ridge")
        positive(self.rate, "rate")
        positive(self.margin, "margin")

    def engine(self, features: TangentFeatures, held: Held, loss: LossFunction | None) -> Rule:
        """The rule, with nothing learnt."""
        if self.rule == "ridge":
            return RidgeRule(features, held, self.damping)
        if self.rule == "logistic":
            return LogisticRule(features, held, self.damping, self.solver)
        return GradientRule(features, held, self.damping, _losses(features, loss), self.rate)


def _losses(features: TangentFeatures, loss: LossFunction | None) -> LossFunction:
    """One loss per example from outputs [m, C]: the one given, or what fits the targets."""

    def given(outputs: Tensor, targets: Tensor) -> Tensor:
        assert loss is not None
        shape = (-1, *features.shape)  # which may want outputs in the shape that the model gives them
        return loss(outputs.reshape(shape), targets.reshape(shape) if targets.is_floating_point() else targets)

    def fitting(outputs: Tensor, targets: Tensor) -> Tensor:
        single = "logistic" if outputs.shape[1] == 1 else "cross_entropy"
        return LOSSES["mse" if targets.is_floating_point() else single](outputs, targets)

    return fitting if loss is None else given
