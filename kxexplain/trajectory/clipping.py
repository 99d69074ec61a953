"""Clipping of gradients, which training does and replay repeats.

By norm, the whole gradient is multiplied by one number, which the step log keeps. By value, each element is clamped:
no number per example says what that did, so the run's value is noted in the manifest, and what the clamping took away
is nobody's share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kxexplain.errors import ArgumentError, TrajectoryError

CLIP_NORM, CLIP_VALUE = "clip_norm", "clip_value"
"""The names of both in a manifest's settings, and as arguments."""


@dataclass(frozen=True)
class Clipping:
    """How a run clips; ``None`` is not at all.

    Attributes:
        norm: the largest norm of a gradient.
        value: the largest size of a gradient's element.
    """

    norm: float | None = None
    value: float | None = None

    @classmethod
    def asked(cls, norm: Any = None, value: Any = None) -> Clipping:
        """As a caller asks for; ``ArgumentError`` for limits that are no positive numbers.

        >>> Clipping.asked(norm=1)
        Clipping(norm=1.0, value=None)
        """
        for name, limit in ((CLIP_NORM, norm), (CLIP_VALUE, value)):
            if limit is not None and not _is_limit(limit):
                raise ArgumentError(f"{name} must be a positive number, got {limit!r}; leave it out not to clip")
        return cls(None if norm is None else float(norm), None if value is None else float(value))

    @classmethod
    def noted(cls, settings: Mapping[str, Any]) -> Clipping:
        """As a manifest's settings say; ``TrajectoryError`` if they say something impossible."""
        limits = [settings.get(name) for name in (CLIP_NORM, CLIP_VALUE)]
        for name, limit in zip((CLIP_NORM, CLIP_VALUE), limits, strict=True):
            if limit is not None and not _is_limit(limit):
                raise TrajectoryError(f"manifest.json: settings: {name} is {limit!r}, expected a positive number")
        return cls(*limits)

    @property
    def settings(self) -> dict[str, float]:
        """What a manifest's settings note."""
        both = {CLIP_NORM: self.norm, CLIP_VALUE: self.value}
        return {name: limit for name, limit in both.items() if limit is not None}

    def factor(self, gradients: Iterable[Tensor | None]) -> float:
        """What torch's ``clip_grad_norm_`` multiplies the gradients by, min(1, limit / (‖g‖ + 1e-6)), to the last bit.

        >>> Clipping(norm=1.0).factor([torch.tensor([3.0, 4.0]), None])
        0.19999995827674866
        """
        if self.norm is None:
            return 1.0
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        return torch.clamp(self.norm / (norm + 1e-6), max=1.0).item()

    def clamped(self, gradient: Tensor) -> Tensor:
        """The gradient with each element in [−value, value]; itself if that is not asked for.

        >>> Clipping(value=0.5).clamped(torch.tensor([0.25, -3.0]))
        tensor([ 0.2500, -0.5000])
        """
        return gradient if self.value is None else gradient.clamp(-self.value, self.value)

    def applied(self, gradients: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
        """The gradients times the factor (a clip factor, or −1 where the loss is ascended), then clamped.

        >>> Clipping(value=0.5).applied([torch.tensor([0.25, -3.0]), None], 0.5)
        [tensor([ 0.1250, -0.5000]), None]
        """
        return [g if g is None else self.clamped(g if factor == 1 else g * factor) for g in gradients]


def _is_limit(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
