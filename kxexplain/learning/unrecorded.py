"""Training that nobody records: what the loop needs of a recorder, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.records import Manifest


class Unrecorded:
    """Stands where a :class:`kxexplain.Recorder` would, counts the steps, and writes nothing."""

    kept = "the model holds the weights from before it"

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.losses: list[float] = []
        self.extra: Callable[[], dict[str, Any]] = dict

    @property
    def position(self) -> int:
        """Number of steps made so far."""
        return len(self.losses)

    def __enter__(self) -> Unrecorded:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def step(self, indices: list[int], loss: float, **facts: Any) -> None:
        """Count the step."""
        self.losses.append(loss)

    def resume(self, trajectory: Trajectory) -> None:
        """Nothing was recorded, so there is nothing to go on with."""
