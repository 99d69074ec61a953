"""What a training loop calls: :func:`record` checks everything, the :class:`Recorder` writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, KxError, TrainingError
from kxexplain.shapes import Inputs
from kxexplain.trajectory import keep as keeping
from kxexplain.trajectory import rng
from kxexplain.trajectory.batches import fetch
from kxexplain.trajectory.beside import Beside
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.deferral import Deferral
from kxexplain.trajectory.describe import check_budget, describe
from kxexplain.trajectory.epochs import Epochs
from kxexplain.trajectory.log import Modes
from kxexplain.trajectory.losses import LossFunction
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.observe import Observer
from kxexplain.trajectory.records import Manifest
from kxexplain.trajectory.sameness import check_same
from kxexplain.trajectory.signature import own_class
from kxexplain.trajectory.states import State, capture_state, encode, finite, load_model, load_optimizer, owned
from kxexplain.trajectory.store import Row, Writer, check_free, folder, is_trajectory, prepare
from kxexplain.trajectory.trajectory import Trajectory

T = TypeVar("T")

PLUS, ONE = 1, 1.0
"""The factors of a gradient that the loop leaves as it is."""

OUTSIDE = "the recorder works inside its `with` block only"

GATHERED, GATHERED_SECONDS = 8, 0.2
"""So many steps, or those of so long, are logged together, which takes less time than one by one."""

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def record(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: str | LossFunction,
    dataset: Any,
    *,
    out: str | PathLike[str],
    keep: str | int = "epoch",
    reduction: Literal["mean", "sum"] = "mean",
    seed: int | None = None,
    clip_value: float | None = None,
    objective: Objective | None = None,
    norms: bool = False,
    beside: Callable[[Recorder], Beside] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Recorder:
    """A recorder for a loop of one's own: everything is checked, nothing is written yet.

    :func:`kxexplain.record` says what the arguments mean. ``beside`` makes what the recorder takes along, before model
    and optimiser are set to the state of a run that is resumed. Raises
    ``ModelError``, ``DatasetError``, ``ArgumentError``, or ``TrajectoryError`` if ``out`` cannot be used.

    >>> import tempfile
    >>> from torch.utils.data import TensorDataset
    >>> model, data = nn.Linear(4, 1), TensorDataset(torch.eye(4), torch.arange(4.0))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with record(model, optimizer, "mse", data, out=tempfile.mkdtemp()) as recorder:
    ...     loss = model(data.tensors[0])[:, 0].sub(data.tensors[1]).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     recorder.step(range(4), loss)
    >>> len(recorder.trajectory)
    1
    """
    if resume and overwrite:
        raise ArgumentError("resume=True and overwrite=True exclude each other; choose one")
    path, policy = folder(out), keeping.parse(keep)
    settings: dict[str, Any] = {**Clipping.asked(value=clip_value).settings, **(objective or Objective()).settings}
    manifest = describe(
        model, optimizer, loss, dataset, keep=keep, reduction=reduction, seed=seed, settings=settings
    )  # fmt: skip
    check_budget(policy, model)
    recorder = Recorder(
        model, optimizer, manifest, policy, path=path, loss=loss, dataset=dataset, norms=norms, overwrite=overwrite
    )
    recorder.beside = None if beside is None else beside(recorder)
    if resume and is_trajectory(path):
        old = Trajectory.open(path, loss if callable(loss) else None)
        old.check_model(model)
        check_same(old.manifest, manifest, stepped=True)
        state = old.state(len(old))
        load_model(state, model)
        load_optimizer(state, optimizer, old.manifest.optimizer)
        recorder.resume(old)
    else:
        check_free(path, overwrite=overwrite)
    return recorder


class Recorder:
    """Writes a trajectory while a loop trains; made by :func:`record`.

    ``own`` says that the loop is :func:`kxexplain.train`'s: nothing in it draws random numbers but its steps, from the
    fetching of their examples to the optimiser's, so that a replay draws the same without being told; and what it says
    of a step need not be checked.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        manifest: Manifest,
        keep: keeping.Keep,
        *,
        path: Path,
        loss: str | LossFunction,
        dataset: Any,
        norms: bool = False,
        own: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self._dataset = dataset
        self._norms, self._own, self._overwrite = norms, own, overwrite
        self.manifest = manifest
        self.extra: Callable[[], dict[str, Any]] = dict
        """Gives JSON-able values to store in every state; the trainer keeps its scheduler there."""
        self.beside: Beside | None = None
        """Looks on while the loop trains."""
        self._model = model
        self._optimizer = optimizer
        self.keep = keep
        """Which states are kept."""
        self._loss = loss if callable(loss) else None
        self._count = manifest.dataset.count
        self._epochs = Epochs(self._count)
        self._resumed: Trajectory | None = None
        self._stack = ExitStack()
        self._observer: Observer | None = None
        self._writer: Writer | None = None
        self._done: Trajectory | None = None
        self._deferral = Deferral()
        self._gathered: list[tuple[Row, Modes | None, rng.RngState | None, rng.RngState]] = []
        """Steps not yet logged: row, modes if they are new, and the generators' states before (if known) and after."""
        self._logged = 0.0  # when that was last empty

    @property
    def kept(self) -> str:
        """What a loop that had to stop leaves behind, in words."""
        good = "the trajectory is good up to its last state"
        return good if self.manifest.scheduled else f"{good}, and by kx.recover() up to the last good step"

    @property
    def position(self) -> int:
        """Number of steps logged so far."""
        return _entered(self._observer).step

    @property
    def trajectory(self) -> Trajectory:
        """The recorded trajectory; ``TrainingError`` before the block has ended."""
        if self._done is None:
            if self._observer is None or self._writer is not None:
                raise TrainingError("the trajectory is complete when the `with` block has ended")
            self._done = Trajectory.open(self.path, self._loss, own_class(self._optimizer))
        return self._done

    def resume(self, trajectory: Trajectory) -> None:
        """Go on after the last state of ``trajectory``, which model and optimiser already hold.

        :func:`record` calls it; a trainer that restores more than that calls it itself.
        """
        self._resumed = trajectory
        if self.keep.kind == "budget":
            stride = int(trajectory.fact("stride") or 1)
            self.keep = keeping.Keep("budget", stride, self.keep.budget)

    def __enter__(self) -> Recorder:
        if self._observer is not None:
            raise TrainingError("a recorder records one run; call record() again")
        self._deferral.busy = True
        self._deferral.begin()
        try:
            self._begin()
            self._deferral.busy = False
            self._deferral.deliver()
        except BaseException:
            self._stack.close()
            try:
                if self._writer is not None:
                    self._writer.close()
            finally:
                self._writer = None
                self._deferral.end()
            raise
        return self

    def _begin(self) -> None:
        observer = Observer(
            self._model,
            self._optimizer,
            random=self.manifest.dataset.random and not self._own,
            norms=self._norms,
            steps_only=self._own,
        )
        self._observer = observer
        if self._resumed is None:
            self._capture()  # weights that cannot be recorded are refused before an old run is removed
            prepare(self.path, overwrite=self._overwrite)
            self._writer = Writer.create(self.path, self.manifest.to_json())
        else:
            self._writer = self._reopen(self._resumed, observer)
        self._stack.enter_context(observer.attached())
        if self.beside is not None:
            self._stack.enter_context(self.beside.attached())
        if self._resumed is None:
            self._save(kept=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._deferral.busy = True
        try:
            self._end(error)
        finally:
            self._deferral.end()
        if kind is None and self.beside is not None:
            self.beside.complete(self.trajectory)

    def _end(self, error: BaseException | None) -> None:
        observer, writer = _entered(self._observer), _entered(self._writer)
        unlogged = observer.pending
        try:
            try:
                self._log()
            finally:
                self._stack.close()
            if not unlogged and max(writer.states) < observer.step:
                self._save(kept=False)
        except KxError as problem:
            if error is None:
                raise
            error.add_note(f"the last state was not recorded: {problem}")
        finally:
            writer.close()
            self._writer = None
        if unlogged and error is None:
            raise TrainingError(
                f"the last optimizer.step(), at step {observer.step}, was not followed by "
                f"recorder.step(indices), so it is not in the log; {self.kept}"
            )

    def fetch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Inputs, Tensor]:
        """The examples at ``indices`` as a batch (inputs, targets) on the model's device.

        A loop need not use it, unless the dataset draws at random: then replay draws the same from the generator state
        noted here. Nothing else may draw between this and the forward pass. ``ArgumentError`` for indices that are no
        examples; ``DatasetError`` if they cannot be put in one batch.
        """
        observer = _entered(self._observer)
        batch = _checked(indices, self._count)
        observer.fetching(batch)
        return fetch(self._dataset, indices if isinstance(indices, Tensor) else batch, observer.device)

    def step(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        loss: float | Tensor | None = None,
        *,
        epoch: int | None = None,
        sign: int = PLUS,
        clip: float = ONE,
    ) -> None:
        """Log the step that the optimiser has just made.

        ``indices`` are the batch's dataset indices. An epoch ends each time as many examples as
        the dataset has were used; where ``epoch`` numbers are given, also when a new one begins
        (its first step included). ``sign`` and ``clip`` are factors that the loop has multiplied
        the gradient by. ``TrainingError`` if there was no optimiser step to log, or the loss is not
        finite; ``ArgumentError`` for indices that are no examples, an epoch below zero, a loss that is
        no number, a sign other than 1 and -1, and a clip that is not finite or negative. A Ctrl-C
        that comes meanwhile takes effect when the step is logged.
        """
        deferral, observer = self._deferral, self._observer
        deferral.busy = True
        try:
            if observer is None or self._writer is None:
                raise TrainingError(OUTSIDE)
            if not (observer.pending and observer.completed):
                raise TrainingError(
                    "recorder.step() was called without an optimizer.step() before it; call it once "
                    "after each step of the optimizer that was given to record()"
                )
            batch: Any = indices
            value: Any = loss
            if not self._own:
                batch = indices.tolist() if type(indices) is Tensor else None
                usual = type(batch) is list and batch and type(batch[0]) is int
                if not usual or min(batch) < 0 or max(batch) >= self._count:
                    batch = _checked(indices, self._count)
                if observer.random:
                    observer.check_fetched(batch)
                if type(loss) is Tensor and loss.dim() == 0:
                    value = loss.item()
                if type(value) is not float:
                    value = math.nan if loss is None else _number(value)
                if not math.isfinite(value) and loss is not None:
                    raise TrainingError(
                        f"the loss at step {observer.step} is {value}; training stopped, and {self.kept}. Lower the "
                        "learning rate, or check the data"
                    )
                if epoch is not None:
                    epoch = _epoch(epoch)
                if sign is not PLUS or clip is not ONE:
                    sign, clip = _factors(sign, clip)
            number, ended = self._epochs.step(epoch, len(batch))
            row = (observer.step, number, observer.rates, batch, value, observer.norm, sign, clip)
            modes = observer.modes() if observer.changed else None
            self._gathered.append((row, modes, observer.begun, observer.next()))
            due = self.keep.wants(observer.step, epoch_ended=ended)
            if (
                not observer.draws.quiet
                or len(self._gathered) >= GATHERED
                or ended
                or due
                or modes is not None
                or time.monotonic() - self._logged > GATHERED_SECONDS
            ):
                self._log(epoch_ended=ended)
            if self.beside is not None:
                self.beside.logged(row[0], batch, observer.rates, sign * clip)
            if due:
                self._save(kept=True)
                self._thin()
        finally:
            deferral.busy = False
            if deferral.noted:
                deferral.deliver()

    def _log(self, *, epoch_ended: bool = False) -> None:
        """Hand the steps gathered to the writer."""
        observer, writer = _entered(self._observer), _entered(self._writer)
        draws, gathered = observer.draws, self._gathered
        while gathered:
            row, modes, begun, now = gathered.pop(0)  # a row is the writer's, even if it cannot write just then
            if modes is not None:
                draws.steps_without = 0
            writer.append(row, modes=modes, rng=draws.logged(begun, now))
        draws.expected = epoch_ended
        observer.follow()
        self._logged = time.monotonic()

    def _save(self, *, kept: bool) -> None:
        observer, writer = _entered(self._observer), _entered(self._writer)
        settled = owned(self._capture())
        writer.put_state(observer.step, lambda: encode(settled), kept=kept)
        observer.draws.recorded()
        if self.beside is not None:
            self.beside.saved(observer.step)

    def _capture(self) -> State:
        """The present state; ``TrainingError`` if it is not finite."""
        observer = _entered(self._observer)
        state = capture_state(
            observer.step,
            self._model,
            self._optimizer,
            rng=observer.draws.state,
            buffers=observer.buffers(),
            extra={**self.extra(), **self._epochs.noted},
        )
        if not finite(state):
            raise TrainingError(
                f"a parameter is not finite after {observer.step} steps; {self.kept}. Lower the learning rate, or "
                "check the initial weights"
            )
        return state

    def _thin(self) -> None:
        """Double the stride until the states fit the budget, or only first and last are left."""
        writer = _entered(self._writer)
        if self.keep.kind != "budget":
            return
        writer.settle()
        while sum(state.bytes for state in writer.states.values()) > self.keep.budget:
            inner = sorted(writer.states)[1:-1]
            if not inner:
                break
            stride = 2 * self.keep.stride
            self.keep = keeping.Keep("budget", stride, self.keep.budget)
            writer.set_fact("stride", str(stride))
            for step in inner:
                if step % stride:
                    writer.drop_state(step)
            if max(writer.states) % stride:
                writer.release(max(writer.states))

    def _reopen(self, trajectory: Trajectory, observer: Observer) -> Writer:
        position = len(trajectory)
        state = trajectory.state(position)
        rng.restore(state.rng, observer.device)
        observer.begin(position, state.rng)
        self._epochs = Epochs.after(trajectory, state)
        writer = Writer.reopen(self.path, trajectory.states, position)
        writer.replace_manifest(self.manifest.to_json())
        return writer


def _checked(indices: Any, count: int) -> list[int]:
    """The indices as a list of at least one integer, each in [0, count)."""
    plain = type(indices) is Tensor and indices.dtype is torch.int64 and indices.dim() == 1
    values: list[int] = indices.tolist() if plain else _listed(indices)
    if not values or min(values) < 0 or max(values) >= count:
        found = f"run from {min(values)} to {max(values)}" if values else "are none"
        raise ArgumentError(
            f"indices {found}, but the dataset has examples 0 to {count - 1}; "
            "give dataset indices, not positions in a loader's order"
        )
    return values


def _listed(indices: Any) -> list[int]:
    """As a list of integers, whatever they come as."""
    if not isinstance(indices, Tensor):
        try:
            indices = np.asarray(indices)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"indices must be a list of dataset indices, got {indices!r}: {error}") from error
        integers = indices.dtype.kind in "iu"
    else:
        integers = indices.dtype in INTEGERS
    if indices.ndim != 1 or not integers:
        raise ArgumentError(
            f"indices must be a list of dataset indices, got shape {tuple(indices.shape)} of {indices.dtype}"
        )
    listed: list[int] = indices.tolist()
    return listed


def _number(value: Any, name: str = "loss") -> float:
    """A number, or a tensor of one, as a float."""
    found = value.item() if type(value) is Tensor and value.dim() == 0 else value
    if type(found) is float:
        return found
    try:
        if isinstance(value, str):
            raise TypeError("it is a string")
        return float(value.item() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ArgumentError(f"{name} must be one number, got {got}: {error}") from error


def _epoch(epoch: object) -> int:
    """An epoch's number, which must fit into a column of the log."""
    if not isinstance(epoch, int | np.integer) or isinstance(epoch, bool) or not 0 <= epoch < 2**63:
        raise ArgumentError(f"epoch must be an integer >= 0, got {epoch!r}; number the epochs, or leave it out")
    return int(epoch)


def _factors(sign: object, clip: object) -> tuple[int, float]:
    """What the loop multiplied the gradient by: 1 or -1, and a finite factor >= 0."""
    direction, factor = _number(sign, "sign"), _number(clip, "clip")
    if direction not in (1, -1):
        raise ArgumentError(f"sign must be 1 or -1, got {sign!r}; give the size of a factor as clip")
    if not (math.isfinite(factor) and factor >= 0):
        raise ArgumentError(f"clip must be a finite factor >= 0, got {clip!r}; give its sign as sign")
    return int(direction), factor


def _entered(value: T | None) -> T:
    if value is None:
        raise TrainingError(OUTSIDE)
    return value
