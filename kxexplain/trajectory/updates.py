"""How an optimiser's step splits into the examples' updates and a regulariser.

What a rule here does not account for is not lost: whoever sums up compares with the parameters'
actual movement and reports the difference as unattributed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kxexplain.trajectory.records import GroupRecord, OptimizerRecord, StepRecord


@dataclass(frozen=True)
class Split:
    """Factors per parameter name: Δp = gradient[name] · ∇p + decay[name] · p.

    ∇p is the reduced loss' gradient and p the parameter, both before the step.
    """

    gradient: dict[str, float]
    decay: dict[str, float]


Rule = Callable[[GroupRecord, float, StepRecord], tuple[float, float] | None]


def split(optimizer: OptimizerRecord, step: StepRecord) -> Split | None:
    """The factors of one step, or ``None`` where this optimiser's split is not known.

    A parameter whose gradient is None (frozen, or unused in the step) does not move at all: torch
    skips it, decay included.

    >>> import numpy as np
    >>> group = GroupRecord(("weight",), {"weight_decay": 0.1})
    >>> step = StepRecord(0, 0, (0.5,), np.array([3]), loss=1.0, gradient_norm=1.0)
    >>> split(OptimizerRecord("SGD", (group,)), step)
    Split(gradient={'weight': -0.5}, decay={'weight': -0.05})
    """
    rule = RULES.get(optimizer.name)
    if rule is None:
        return None
    gradient: dict[str, float] = {}
    decay: dict[str, float] = {}
    for group, rate in zip(optimizer.groups, step.rates, strict=True):
        factors = rule(group, rate, step)
        if factors is None:
            return None
        gradient |= dict.fromkeys(group.names, factors[0])
        decay |= dict.fromkeys(group.names, factors[1])
    return Split(gradient, decay)


def _sgd(group: GroupRecord, rate: float, step: StepRecord) -> tuple[float, float] | None:
    """Without momentum torch does p ← p − rate · (sign · clip · ∇p + λp).

    Dampening and Nesterov act on the momentum buffer alone, so without momentum they do nothing.
    """
    options = group.options
    if options.get("momentum", 0) != 0 or options.get("maximize", False):
        return None
    return -rate * step.sign * step.clip, -rate * _number(options, "weight_decay")


def _number(options: Mapping[str, Any], key: str) -> float:
    return float(options.get(key, 0.0))


RULES: dict[str, Rule] = {"SGD": _sgd}
"""The optimisers whose split is known, by class name."""
