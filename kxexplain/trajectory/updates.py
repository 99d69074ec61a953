"""How a step of plain SGD splits into the examples' updates and a regulariser, each a number times a vector.

Such steps can be itemised forward in time, as they are replayed; what a step does beyond that is for the recursions of
:mod:`kxexplain.trajectory.optimizers`.

What a rule here does not account for is not lost: whoever sums up compares with the parameters'
actual movement and reports the difference as unattributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kxexplain.trajectory.optimizers import RECURSIONS
from kxexplain.trajectory.records import OptimizerRecord, StepRecord


@dataclass(frozen=True)
class Split:
    """Factors per parameter name: Δp = gradient[name] · ∇p + decay[name] · p.

    ∇p is the reduced loss' gradient and p the parameter, both before the step.
    """

    gradient: dict[str, float]
    decay: dict[str, float]

    @cached_property
    def common(self) -> float | None:
        """The factor of all gradients, if they have one in common."""
        factors = set(self.gradient.values())
        return factors.pop() if len(factors) == 1 else None

    @cached_property
    def decays(self) -> bool:
        """Whether any parameter decays."""
        return any(self.decay.values())


def split(optimizer: OptimizerRecord, step: StepRecord) -> Split | None:
    """The factors of one step, or ``None`` for anything but SGD without momentum.

    A parameter whose gradient is None (frozen, or unused in the step) does not move at all: torch
    skips it, decay included.

    >>> import numpy as np
    >>> from kxexplain.trajectory.records import GroupRecord
    >>> group = GroupRecord(("weight",), {"weight_decay": 0.1})
    >>> step = StepRecord(0, 0, (0.5,), np.array([3]), loss=1.0, gradient_norm=1.0)
    >>> split(OptimizerRecord("SGD", (group,)), step)
    Split(gradient={'weight': -0.5}, decay={'weight': -0.05})
    """
    if optimizer.name != "SGD":
        return None
    gradient: dict[str, float] = {}
    decay: dict[str, float] = {}
    for group, rate in zip(optimizer.groups, step.rates, strict=True):
        by = RECURSIONS["SGD"].rule(group.options, rate, {}, {})
        if by.applied or isinstance(by.direct, Tensor):
            return None
        gradient |= dict.fromkeys(group.names, -by.direct * by.sign * step.sign * step.clip)
        decay |= dict.fromkeys(group.names, -by.direct * by.l2)
    return Split(gradient, decay)
