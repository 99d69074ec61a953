"""An optimiser's parameter groups while it is recorded: their rates may change, but no other option."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch

from kxexplain.errors import TrainingError

RATES = ("params", "lr", "initial_lr")
"""Options of a parameter group that may change while training goes on."""

FIXED = (int, float, str, type(None))
"""Types of values that cannot change without being replaced."""


class Groups:
    """An optimiser's parameter groups, compared with what they were at the start: options, and how many parameters.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> groups = Groups(optimizer)
    >>> optimizer.param_groups[0]["lr"] = 0.2
    >>> groups.rates(3)
    (0.2,)
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._held = [_Held(group) for group in optimizer.param_groups]
        self._rates: tuple[float, ...] = ()
        self._seen: tuple[Any, ...] | None = None

    def rates(self, step: int) -> tuple[float, ...]:
        """Each group's learning rate; ``TrainingError`` if anything else of the groups is not as it was."""
        groups = self._optimizer.param_groups
        pairs = zip(self._held, groups, strict=False)
        try:
            seen = (len(groups), *[(held.read(group), len(group["params"])) for held, group in pairs])
        except KeyError as error:
            raise TrainingError(f"the optimizer's option {error} is gone by step {step}; leave it in") from error
        if seen != self._seen:  # else nothing is another than in the step before, as in most steps
            self._rates = self._checked(step)
            self._seen = seen if _fixed(seen) else None
        return self._rates

    def _checked(self, step: int) -> tuple[float, ...]:
        groups = self._optimizer.param_groups
        if [len(group["params"]) for group in groups] != [held.size for held in self._held]:
            raise TrainingError(
                f"the optimizer was given more parameters, or fewer, by step {step}; nothing was changed. Give it "
                "all parameters before record(), and free them later with requires_grad_(True)"
            )
        for held, group in zip(self._held, groups, strict=True):
            changed = held.changed(group)
            if changed is not None:
                raise TrainingError(
                    f"the optimizer's {changed} by step {step}; nothing was changed. Only learning "
                    "rates may change while recording (schedulers that cycle the momentum as well: "
                    "cycle_momentum=False)"
                )
        return tuple([float(group["lr"]) for group in groups])


class _Held:
    """What a parameter group was like at the start of the recording."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.keys = [key for key in group if key not in RATES]
        self.options = [group[key] for key in self.keys]
        self.size = len(group["params"])
        self.read = itemgetter("lr", "lr", *self.keys)  # of one name it would give no tuple
        """Gives the rate, twice, and the options."""

    def changed(self, group: dict[str, Any]) -> str | None:
        """Which option is another now, in words."""
        for key, before in zip(self.keys, self.options, strict=True):
            if group[key] != before:
                return f"{key} changed from {before} to {group[key]}"
        return None


def _fixed(value: Any) -> bool:
    """Whether this is the same for as long as it is equal."""
    return isinstance(value, FIXED) or (isinstance(value, tuple) and all(map(_fixed, value)))
