"""Training that nobody records: what the loop needs of a recorder, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kxexplain.shapes import Inputs
from kxexplain.trajectory import Trajectory, fetch
from kxexplain.trajectory.records import Manifest


class Unrecorded:
    """Stands where a :class:`kxexplain.Recorder` would, counts the steps, and writes nothing."""

    kept = "the model holds the weights from before it"

    def __init__(self, model: nn.Module, manifest: Manifest, dataset: Any) -> None:
        self.manifest = manifest
        self.losses: list[float] = []
        self.extra: Callable[[], dict[str, Any]] = dict
        self._dataset, self._device = dataset, next(model.parameters()).device
        self._ready = type(dataset) is TensorDataset and [t.device for t in dataset.tensors] == [self._device] * 2

    @property
    def position(self) -> int:
        """Number of steps made so far."""
        return len(self.losses)

    def __enter__(self) -> Unrecorded:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def fetch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """The examples at ``indices`` as a batch on the model's device."""
        if self._ready:  # this runs in every step: no more than the two look-ups
            inputs, targets = self._dataset.tensors
            indices = indices.to(self._device)
            return inputs.index_select(0, indices), targets.index_select(0, indices)
        return fetch(self._dataset, indices, self._device)

    def step(self, indices: Tensor, loss: float, **facts: Any) -> None:
        """Count the step."""
        self.losses.append(loss)

    def resume(self, trajectory: Trajectory) -> None:
        """Nothing was recorded, so there is nothing to go on with."""
