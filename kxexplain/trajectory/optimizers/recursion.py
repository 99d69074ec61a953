"""What a step of an optimiser is made of: linear in the gradient, once its own values are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Coefficient: TypeAlias = float | Tensor
"""A number, or one for each element of the parameter."""


@dataclass(frozen=True)
class Recursion:
    """One parameter's step, made of its gradient and its moment.

    With g = sign · ∇p + l2 · p, the gradient that the optimiser goes by,

        m ← memory · m + intake ⊙ g          Δp = − direct ⊙ g − applied ⊙ m − shrink · p

    ∇p is the reduced loss' gradient and p the parameter, both before the step; m is the moment after it. Where the
    step adapts to earlier gradients (Adam), the coefficients hold what it has adapted to: seen from one example's
    share of the gradient they are constants, so that shares add up to the step exactly.

    Attributes:
        direct: what the gradient itself moves.
        intake: how much of the gradient enters the moment.
        memory: how much of the moment is kept from step to step.
        applied: what the moment moves.
        shrink: decoupled weight decay.
        l2: weight decay in the gradient.
        sign: −1 where the loss is maximised.
    """

    direct: Coefficient = 0.0
    intake: Coefficient = 0.0
    memory: float = 0.0
    applied: Coefficient = 0.0
    shrink: float = 0.0
    l2: float = 0.0
    sign: float = 1.0

    def cast(self, dtype: torch.dtype) -> Recursion:
        """The same with coefficients of another type, where they are tensors."""
        turned = lambda value: value.to(dtype) if isinstance(value, Tensor) else value  # noqa: E731
        return replace(self, direct=turned(self.direct), intake=turned(self.intake), applied=turned(self.applied))


STILL = Recursion(memory=1.0)
"""A parameter without a gradient in this step: torch leaves it alone, moment and decay included."""

Values: TypeAlias = Mapping[str, Any]

Rule = Callable[[Values, float, Values, Values], Recursion]
"""(options of the group, learning rate, the optimiser's values of the parameter before the step, and after it)."""


@dataclass(frozen=True)
class Itemised:
    """An optimiser whose steps are itemised: its rule, and the name of m among its own values, if it has one."""

    rule: Rule
    moment: str | None = None
