"""A recorded trajectory, opened for reading."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, TrajectoryError
from kxexplain.trajectory.fingerprints import fingerprint
from kxexplain.trajectory.log import Modes, Reader, Steps
from kxexplain.trajectory.losses import OWN, LossFunction, resolve
from kxexplain.trajectory.records import Manifest, StateRecord, TensorRecord
from kxexplain.trajectory.rng import RngState
from kxexplain.trajectory.signature import MakeOptimizer, build_optimizer, compare_models
from kxexplain.trajectory.states import State, decode
from kxexplain.trajectory.store import MANIFEST, STATES, storage


class Trajectory:
    """The steps and states that training went through, as recorded in a folder.

    ``len(trajectory)`` counts the steps up to the last recorded state; ``tail`` those logged after
    it (an interrupted run may have some), which nothing can be explained with.

    >>> import tempfile, torch
    >>> from torch.utils.data import TensorDataset
    >>> from kxexplain.trajectory import record
    >>> data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> model = nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with record(model, optimizer, "cross_entropy", data, out=tempfile.mkdtemp()) as recorder:
    ...     nn.functional.cross_entropy(model(torch.eye(2)), torch.tensor([0, 1])).backward()
    ...     optimizer.step()
    ...     recorder.step([0, 1])
    >>> trajectory = Trajectory.open(recorder.trajectory.path)
    >>> len(trajectory), [state.step for state in trajectory.states], trajectory.steps[0].rates
    (1, [0, 1], (0.1,))
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        reader: Reader,
        loss: LossFunction | None,
        optimizer: MakeOptimizer | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.states = reader.states()
        if not self.states:
            raise TrajectoryError(f"{path} has no recorded state; record again")
        logged, last = reader.count(), self.states[-1].step
        if logged < last:
            raise TrajectoryError(f"{reader.path} lacks steps: {logged} of {last} are logged")
        self.tail = 0 if whole else logged - last
        self.steps = Steps(reader, logged if whole else last)
        self._reader = reader
        self._loss = loss
        self._own_optimizer = optimizer
        self._files = {state.step: state for state in self.states}

    @staticmethod
    def required(value: Any) -> Trajectory:
        """``value`` if it is a trajectory; ``ArgumentError`` if it is something else, such as its folder."""
        if isinstance(value, Trajectory):
            return value
        raise ArgumentError(f"got {value!r} as the trajectory; expected one that is open: kx.Trajectory.open(folder)")

    @classmethod
    def open(
        cls, path: str | PathLike[str], loss: LossFunction | None = None, optimizer: MakeOptimizer | None = None
    ) -> Trajectory:
        """Open a folder; ``loss`` is needed again only if it was the caller's own function.

        So is ``optimizer`` if its class was the caller's own: that class, or a function that makes one from parameter
        groups (dicts with "params" and every option).

        ``TrajectoryError`` if it is no trajectory, or a file is missing, truncated or altered.
        States are checked against their checksums when loaded, or all by :meth:`check_files`.
        """
        if not isinstance(path, (str, PathLike)):
            raise ArgumentError(f"got {path!r} as a trajectory's folder; expected its path")
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise TrajectoryError(f"{folder} is no trajectory: it has no {MANIFEST}")
        with storage(folder / MANIFEST):
            data = (folder / MANIFEST).read_bytes()
            manifest = Manifest.from_json(data.decode("utf-8"))
        reader = Reader(folder)
        reader.check_manifest(data)
        if optimizer is not None and not manifest.optimizer.own:
            raise ArgumentError(
                f"the trajectory was trained with torch.optim.{manifest.optimizer.name}; leave out optimizer="
            )
        trajectory = cls(folder, manifest, reader, _loss(manifest.loss, loss), optimizer)
        for state in trajectory.states:
            trajectory._check_size(state)
        return trajectory

    def again(self, *, whole: bool = False) -> Trajectory:
        """The same folder as it is now; with ``whole`` the steps after the last state are among the others."""
        return Trajectory(self.path, self.manifest, self._reader, self._loss, self._own_optimizer, whole=whole)

    @property
    def loss_name(self) -> str:
        """The recorded name of the loss."""
        return self.manifest.loss

    @property
    def loss(self) -> LossFunction:
        """The loss per example; ``ArgumentError`` if it was a function that was not given again."""
        if self._loss is None:
            name = self.loss_name.removeprefix(OWN)
            raise ArgumentError(
                f"this trajectory was trained with a loss of its own, {name!r}; pass that "
                "function: Trajectory.open(path, loss=...)"
            )
        return self._loss

    def build_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser as in training.

        ``ArgumentError`` if its class was the caller's own and not given again, or nobody knows what it was.
        """
        if not self.manifest.logged:
            raise ArgumentError(
                f"{self.path} was made of checkpoints: no step of the training was logged, so none can be replayed"
            )
        return build_optimizer(self.manifest.optimizer, parameters, self._own_optimizer)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        tail = f" (+{self.tail} after the last state)" if self.tail else ""
        size = sum(state.bytes for state in self.states)
        steps = "steps" if self.manifest.logged else "chords"
        return (
            f"Trajectory({str(self.path)!r}: {self.manifest.model.name}, "
            f"{self.manifest.optimizer.title}, {self.loss_name}, {len(self)} {steps}{tail}, "
            f"{len(self.states)} states, {size / 1e6:.1f} MB)"
        )

    def state(self, step: int) -> State:
        """The state after ``step`` steps, checked against its checksum; tensors on the CPU."""
        if step not in self._files:
            steps = [state.step for state in self.states]
            below = steps[max(0, bisect_right(steps, step) - 1)]
            raise ArgumentError(f"no state recorded at step {step}; the nearest before is {below}")
        record = self._files[step]
        path = self.path / STATES / record.file
        self._check_size(record)
        with storage(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise TrajectoryError(f"{path} was altered: its checksum is not the recorded one")
        try:
            state = decode(data)
            self._check_state(state, step)
        except TrajectoryError as error:
            raise TrajectoryError(f"{path}: {error}") from error
        return state

    def norms(self) -> list[float]:
        """Every step's gradient norm; ``ArgumentError`` if they were not logged."""
        norms = [step.gradient_norm for step in self.steps]
        if any(map(math.isnan, norms)):
            raise ArgumentError(
                f"{self.path} was recorded without gradient norms; record with norms=True, or find them by "
                "kx.gradient_norms(trajectory, model, dataset)"
            )
        return norms

    def check_model(self, model: nn.Module) -> None:
        """``ModelError`` saying what differs, unless ``model`` has the trained model's parameters."""
        compare_models(self.manifest.model, model)

    def check_dataset(self, dataset: Any) -> None:
        """``DatasetError`` saying what differs, unless these are the examples of training."""
        difference = self.manifest.dataset.difference(fingerprint(dataset))
        if difference:
            raise DatasetError(
                f"this is not the dataset the trajectory was trained on: {difference}; an "
                "example's identity is its index, so give the same examples in the same order"
            )

    def check_files(self) -> None:
        """Read every file whole; ``TrajectoryError`` names the first that is damaged."""
        with storage(self.path / MANIFEST):
            self._reader.check_manifest((self.path / MANIFEST).read_bytes())
        self._reader.check()
        for start in range(0, len(self), 1024):
            self._reader.steps(start, start + 1024)
        for record in self.states:
            self.state(record.step)

    @cached_property
    def modes(self) -> Mapping[int, Modes]:
        """From which step on which modules trained and which parameters were frozen."""
        frozen = tuple(t.name for t in self.manifest.model.parameters if not t.requires_grad)
        return {0: Modes(self.manifest.model.training, frozen)} | self._reader.modes()

    @cached_property
    def rng_steps(self) -> frozenset[int]:
        """The steps that began with a generator state of their own."""
        return self._reader.rng_steps()

    def rng(self, step: int) -> RngState:
        """The generator states with which a step of :attr:`rng_steps` began."""
        return self._reader.rng(step)

    def fact(self, key: str) -> str | None:
        """A named value of the log, such as the stride that a byte budget has led to."""
        return self._reader.fact(key)

    def _check_size(self, record: StateRecord) -> None:
        path = self.path / STATES / record.file
        with storage(path):
            size = path.stat().st_size
        if size != record.bytes:
            what = "truncated" if size < record.bytes else "altered"
            raise TrajectoryError(
                f"{path} was {what}: it has {size} bytes instead of {record.bytes}; restore it from a copy, or "
                "record again"
            )

    def _check_state(self, state: State, step: int) -> None:
        signature = self.manifest.model
        if state.step != step:
            raise TrajectoryError(f"holds step {state.step}, expected {step}")
        if len(state.rates) != len(self.manifest.optimizer.groups):
            raise TrajectoryError("has another number of learning rates than the manifest")
        _check_tensors(signature.parameters, state.parameters)
        _check_tensors(signature.buffers, state.buffers)


def _check_tensors(expected: tuple[TensorRecord, ...], tensors: Mapping[str, Tensor]) -> None:
    for record in expected:
        shape = tuple(tensors[record.name].shape) if record.name in tensors else None
        if shape != record.shape:
            raise TrajectoryError(f"{record.name!r} has shape {shape}, expected {record.shape}")


def _loss(name: str, given: LossFunction | None) -> LossFunction | None:
    """The loss function of a trajectory, if it can be known."""
    if name.startswith(OWN):
        return given
    if given is not None and resolve(given)[0] != name:
        raise ArgumentError(f"the trajectory was trained with {name!r}; leave out loss=")
    return resolve(name)[1]
