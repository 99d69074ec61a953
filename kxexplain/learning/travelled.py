"""How far training has come: the radius R, where nobody gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kxexplain.trajectory.observe import gradient_norm

START = 1e-2
"""The first guess of the radius is this times 1 + ‖θ_0‖."""


class Travelled:
    """R ≈ max_{k≤t} ‖θ_k − θ_0‖, but at least ``START`` (1 + ‖θ_0‖); Ivgi, Hinder & Carmon 2023 (arXiv 2302.12022).

    With ``coordinates`` norms are divided by the root of the number of coordinates, for a rate per coordinate. (The
    coordinate that is farthest drives itself: as an estimate it led every run on digits astray.)

    >>> point = torch.zeros(2)
    >>> travelled = Travelled([point])
    >>> point += torch.tensor([3.0, 4.0])
    >>> travelled.radius([point])
    5.0
    """

    def __init__(self, parameters: Sequence[Tensor], *, coordinates: bool = False) -> None:
        self.coordinates = coordinates
        self.origin = [p.detach().clone() for p in parameters]
        self.largest = START * (1 + self._norm(self.origin))

    def radius(self, parameters: Sequence[Tensor]) -> float:
        """The estimate, once the parameters have come to be these."""
        with torch.no_grad():
            distance = self._norm(torch._foreach_sub([p.detach() for p in parameters], self.origin))
        if math.isfinite(distance):
            self.largest = max(self.largest, distance)
        return self.largest

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        size = sum(t.numel() for t in tensors) if self.coordinates else 1
        return gradient_norm(tensors) / math.sqrt(size)
