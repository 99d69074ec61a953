"""Which states to keep: every step, every k steps, every epoch, or as many as a budget allows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kxexplain.errors import ArgumentError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Keep:
    """A parsed ``keep``: "steps" with a stride, "epoch", or "budget" with bytes.

    The first and the last state are kept in any case. Under a budget the stride starts at one, and
    doubles, dropping every second state between the first and the last, whenever the states
    together exceed the budget.
    """

    kind: Literal["steps", "epoch", "budget"]
    stride: int = 1
    budget: int = 0

    def wants(self, step: int, *, epoch_ended: bool) -> bool:
        """Whether the state after ``step`` steps is to be kept for good."""
        return epoch_ended if self.kind == "epoch" else step % self.stride == 0


def noted(keep: str, stride: str | None) -> Keep:
    """What a manifest notes, with the stride that a budget has led to.

    >>> noted("5", None).stride, noted("1MB", "4").stride
    (5, 4)
    """
    found = parse(int(keep) if keep.isdecimal() else keep)
    return Keep("budget", int(stride or 1), found.budget) if found.kind == "budget" else found


def parse(keep: str | int) -> Keep:
    """``ArgumentError`` for anything but "step", "epoch", an int >= 1 or a size like "200MB".

    >>> parse(5), parse("1.5 GB").budget
    (Keep(kind='steps', stride=5, budget=0), 1500000000)
    """
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return Keep("steps", stride=keep)
    if keep == "step":
        return Keep("steps")
    if keep == "epoch":
        return Keep("epoch")
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", str(keep), re.IGNORECASE)
    if size and isinstance(keep, str) and float(size[1]) > 0:
        return Keep("budget", budget=int(float(size[1]) * UNITS[size[2].upper()]))
    raise ArgumentError(
        f"unknown keep={keep!r}; expected 'step', 'epoch', a number of steps >= 1, or a size such as '200MB'"
    )
