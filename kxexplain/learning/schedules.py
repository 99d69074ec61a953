"""Learning rates that follow the measured gradient: which, and with what radius."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kxexplain.errors import ArgumentError
from kxexplain.learning.rates import FLOOR, HINDSIGHT, HORIZON, LEAST_FLOOR, NAMES, PLAIN
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.observe import gradient_norm


@dataclass(frozen=True)
class Schedule:
    """How a run's learning rate is set; for ``kx.train(schedule=...)``.

    Attributes:
        name: one of :data:`NAMES`; the formulas stand in :mod:`kxexplain.learning.rates`.
        radius: R, the distance from the initial parameters to the optimum (for ``"adagrad"``: of the coordinate that is
            farthest). ``None`` estimates it by the largest distance travelled so far (for ``"adagrad"``: by the root
            mean square over the coordinates), or in hindsight by the earlier run's.
        earlier: for the schedules in hindsight, the recorded run whose gradient norms are used, or those norms.
        floor: where norms are inverted, one counts as at least this part of the largest.
        smooth: an earlier run's norms are replaced by their median over this part of the run, which takes the noise of
            batches out of them (Defazio et al. 2023 use 0.1); 0 takes them as they are.

    Raises:
        ArgumentError: no such schedule, a radius or floor that is no positive number, or norms of an earlier run
            missing, unusable, or given to a schedule that does not look at any.

    >>> Schedule("warmup_decay", radius=2.0).name
    'warmup_decay'
    """

    name: str
    radius: float | None = None
    earlier: Trajectory | Sequence[float] | None = field(default=None, repr=False)
    floor: float = FLOOR
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ArgumentError(f"unknown schedule {self.name!r}; expected one of {', '.join(NAMES)}")
        for what, value in (("radius", self.radius), ("floor", self.floor)):
            if value is not None and not _positive(value):
                raise ArgumentError(f"{what} must be a positive number, got {value!r}")
        if not LEAST_FLOOR <= self.floor <= 1:
            raise ArgumentError(f"floor is a part of the largest norm, from {LEAST_FLOOR:g} to 1, got {self.floor!r}")
        if isinstance(self.smooth, bool) or not isinstance(self.smooth, int | float) or not 0 <= self.smooth <= 1:
            raise ArgumentError(f"smooth is a part of the run, from 0 to 1, got {self.smooth!r}")
        if self.name in HINDSIGHT and self.earlier is None:
            raise ArgumentError(
                f"{self.name} is made of the gradient norms of an earlier run; give earlier=, a recorded trajectory"
            )
        if self.name not in HINDSIGHT and self.earlier is not None:
            raise ArgumentError(f"{self.name} does not look at an earlier run; leave out earlier=")
        if self.name in PLAIN and self.radius is not None:
            raise ArgumentError(f"{self.name} multiplies the optimizer's own rate; leave out radius=")

    @classmethod
    def asked(cls, schedule: Any) -> Schedule | None:
        """From a name, a schedule or ``None``."""
        if schedule is None or isinstance(schedule, Schedule):
            return schedule
        if not isinstance(schedule, str):
            raise ArgumentError(f"schedule is {schedule!r}, expected a name or a kx.Schedule")
        return cls(schedule)

    @property
    def norms(self) -> list[float] | None:
        """The earlier run's gradient norms, step by step."""
        if isinstance(self.earlier, Trajectory):
            return self.earlier.norms()
        return None if self.earlier is None else [float(norm) for norm in self.earlier]

    def settings(self, steps: int) -> dict[str, Any]:
        """What a manifest notes, so that a run is gone on with only by the same rates."""
        noted: dict[str, Any] = {"name": self.name, "radius": self.radius, "floor": self.floor}
        if self.name in HORIZON:
            noted["steps"] = steps
        if self.earlier is not None:
            noted["smooth"] = self.smooth
            noted["earlier"] = hashlib.sha256(np.asarray(self.norms).tobytes()).hexdigest()
        return noted


def distance_travelled(trajectory: Trajectory) -> float:
    """The largest distance of a recorded state from the first, ‖θ_s − θ_0‖, over the optimiser's parameters."""
    names = [name for group in trajectory.manifest.optimizer.groups for name in group.names]
    start = trajectory.state(trajectory.states[0].step).parameters
    later = (trajectory.state(record.step).parameters for record in trajectory.states[1:])
    distances = [gradient_norm([state[name] - start[name] for name in names]) for state in later]
    largest = max(distances, default=0.0)
    if not largest > 0:
        raise ArgumentError(f"the parameters of {trajectory.path} did not move, so they tell no radius; give radius=")
    return largest


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


__all__ = ["Schedule", "distance_travelled"]
