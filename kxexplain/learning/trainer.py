"""The bundled training loop: :func:`train` records while it trains, and can be interrupted."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.learning.interrupts import interrupts
from kxexplain.learning.progress import Progress
from kxexplain.learning.resume import restored
from kxexplain.search.recording import FeatureRecorder
from kxexplain.trajectory import LossFunction, Recorder, Trajectory, rng
from kxexplain.trajectory import keep as keeping
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.describe import check_budget, describe
from kxexplain.trajectory.forward import assign, forward, gradients
from kxexplain.trajectory.losses import resolve
from kxexplain.trajectory.sameness import check_same
from kxexplain.trajectory.signature import describe_model, own_class
from kxexplain.trajectory.states import load_model, load_optimizer
from kxexplain.trajectory.store import check_free, folder, is_trajectory
from kxexplain.trajectory.trial import rehearse

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def train(
    model: nn.Module,
    dataset: Any,
    loss: str | LossFunction = "cross_entropy",
    optimizer: Optimizer | MakeOptimizer | None = None,
    *,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
    out: str | PathLike[str],
    keep: str | int = "epoch",
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    features: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Trajectory:
    """Train ``model`` in place and record how, in the folder ``out``.

    Args:
        model: any module; it ends with the trained weights, and in the mode it came in.
        dataset: a map-style dataset of (input, target) whose order is fixed. It may augment at random, from torch's
            global generator only (not numpy's or Python's): replay then draws the same.
        loss: a name of :data:`kxexplain.trajectory.LOSSES`, or a function giving one loss per
            example; the mean over the batch is minimised. Weights of examples or classes, and label smoothing, belong
            into that function; a sample's own weight can be part of its target, see :func:`kxexplain.record`.
        optimizer: over the model's parameters, of ``torch.optim`` or a class of your own; or a function that makes
            one from parameters. Default: SGD with learning rate 0.1.
        epochs: passes over the dataset, each in an order that (seed, epoch) determines.
        batch_size: examples per step; the last batch of an epoch may be smaller.
        seed: of the order, and of torch's generators (dropout) while training.
        out: a new or empty folder.
        keep: the states to keep: "step", "epoch", a number of steps, or a size like "200MB".
        scheduler: of torch, over the same optimiser; stepped once an epoch.
        clip_norm: largest norm of a step's gradient over the optimiser's parameters, clipped as torch's
            ``clip_grad_norm_`` does; the factor is logged, and the bill stays itemised.
        clip_value: largest size of an element of a step's gradient, clamped as torch's ``clip_grad_value_`` does. A
            clamp is no sum over the examples: their shares are those of the gradient as it was before, and what the
            clamp took away from it is the bill's line "unattributed".
        features: collect gradient features of so many dimensions while training, so that the retrieval index needs no
            pass of its own: it is written to ``out``/index, for ``kx.GradientIndex.load``. For SGD without momentum;
            of other optimisers ``GradientIndex.build`` makes an index afterwards. Not with a budget of bytes.
        resume: go on from the last state in ``out``, to the result of an uninterrupted run; start
            if there is none, and return a finished run as it is.
        overwrite: replace a trajectory that ``out`` holds.
        progress: show a bar with loss and rate, if this is a terminal.

    Ctrl-C finishes the step, saves the state and raises ``KeyboardInterrupt``. A loss or gradient
    that is not finite, or a step that fails, raises ``TrainingError``; in both cases ``out`` holds a
    trajectory that is good up to its last state. ``ModelError``, ``DatasetError``, ``ArgumentError``
    and ``TrajectoryError`` come before any work: a step on the first batch is tried with a copy of
    the model before ``out`` is touched.

    >>> import tempfile
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
    >>> trajectory = train(nn.Linear(8, 2), data, epochs=3, batch_size=4, out=tempfile.mkdtemp())
    >>> len(trajectory), [state.step for state in trajectory.states]
    (6, [0, 2, 4, 6])
    """
    _check_numbers(epochs=epochs, batch_size=batch_size, seed=seed)
    if resume and overwrite:
        raise ArgumentError("resume=True and overwrite=True exclude each other; choose one")
    if clip_norm is not None and clip_value is not None:
        raise ArgumentError("clip_norm and clip_value exclude each other; choose one")
    clipping = Clipping.asked(clip_norm, clip_value)
    path, policy = folder(out), keeping.parse(keep)
    describe_model(model)
    check_budget(policy, model)
    ready = _optimizer(optimizer, model)
    settings = {"loop": "train", "epochs": epochs, "batch_size": batch_size, **clipping.settings}
    settings["scheduler"] = _check_scheduler(scheduler, ready)
    with _training_mode(model):
        manifest = describe(
            model, ready, loss, dataset,
            keep=keep, reduction="mean", seed=seed, settings=settings,
        )  # fmt: skip
        recorder = Recorder(model, ready, manifest, policy, path=path, loss=loss, dataset=dataset, overwrite=overwrite)
        run = _Run(model, ready, scheduler, recorder, loss=resolve(loss)[1])
        if features is not None:
            run.features = FeatureRecorder(model, manifest, policy, dataset, features, run.batches)
        if resume and is_trajectory(path):
            old = Trajectory.open(path, loss if callable(loss) else None)
            old.check_model(model)
            check_same(old.manifest, manifest, stepped=scheduler is not None)
            if run.restore(old):
                if run.features is not None:
                    run.features.complete(recorder.path, loss, own_class(ready))
                return Trajectory.open(path, loss if callable(loss) else None, own_class(ready))
        else:
            check_free(path, overwrite=overwrite)
            rehearse(model, manifest, dataset, run.sizes(), run.loss, own_class(ready))
        run.train(progress=progress)
        if run.features is not None:
            run.features.complete(recorder.path, loss, own_class(ready))
    return recorder.trajectory


class _Run:
    """One call of :func:`train`: where it is, and the loop."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        recorder: Recorder,
        *,
        loss: LossFunction,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.recorder, self.loss = recorder, loss
        manifest = recorder.manifest
        self.seed = 0 if manifest.seed is None else manifest.seed
        self.epochs: int = manifest.settings["epochs"]
        self.batch_size: int = manifest.settings["batch_size"]
        self.examples = manifest.dataset.count
        self.clipping = Clipping.noted(manifest.settings)
        self.features: FeatureRecorder | None = None
        self.clip = 1.0
        """What the present step's gradient was multiplied by."""
        self.batches = math.ceil(self.examples / self.batch_size)
        self.device = next(model.parameters()).device
        self.parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        self.start = 0
        self.rng: rng.RngState = {}  # to begin with, if not the seed's
        self.losses: list[float] = []  # of the present epoch
        self.ended = 0  # epochs, their scheduler's step included
        recorder.extra = self._extra

    def restore(self, old: Trajectory) -> bool:
        """Take over the last recorded state; whether the run was finished already."""
        self.start, total = len(old), self.epochs * self.batches
        if self.start > total:
            whole, rest = divmod(self.start, self.batches)
            more = f" and {rest} of {self.batches} steps of the next" if rest else ""
            raise ArgumentError(
                f"epochs: {self.epochs} asked for, but the run already has {whole}{more}; ask for at least "
                f"{whole + bool(rest)}"
            )
        state = old.state(self.start)
        load_model(state, self.model)
        load_optimizer(state, self.optimizer, old.manifest.optimizer)
        if self.start == total:
            return True
        self.rng = state.rng
        if self.scheduler is not None:
            template = self.scheduler.state_dict()
            self.scheduler.load_state_dict(restored(template, state.extra["scheduler"]))
        within = self.start % self.batches or min(self.start, self.batches)
        self.losses = [step.loss for step in old.steps[self.start - within : self.start]]
        self.ended = state.extra.get("ended", self.start // self.batches)
        if self.ended < self.start // self.batches:  # the state was taken at once after the last batch
            with warnings.catch_warnings():  # torch only looks at steps of this very optimizer
                warnings.filterwarnings("ignore", "Detected call of", UserWarning)
                self._end_epoch()
        self.recorder.resume(old)
        return False

    def sizes(self) -> list[Tensor]:
        """One batch of each size: the first, and the first epoch's last if that is smaller."""
        batches = torch.split(_permutation(self.examples, self.seed, 0), self.batch_size)
        return [batches[0], *batches[1:][-1:]] if self.examples % self.batch_size else [batches[0]]

    def train(self, *, progress: bool) -> None:
        """All steps that are left to do."""
        with ExitStack() as stack:
            stack.enter_context(rng.fork(self.device))
            torch.manual_seed(self.seed)
            rng.restore(self.rng, self.device)
            bar = Progress(self.epochs * self.batches, self.start, shown=progress)
            stack.enter_context(bar)
            interrupted = stack.enter_context(interrupts())
            stack.enter_context(self.recorder)
            for epoch in range(self.start // self.batches, self.epochs):
                for indices in self._left(epoch):
                    self._step(indices, epoch)
                    bar.step(epoch, self.losses[-1], self.optimizer.param_groups[0]["lr"])
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                self._end_epoch()

    def _left(self, epoch: int) -> Iterator[Tensor]:
        """The epoch's batches of indices that are still to come."""
        order = _permutation(self.examples, self.seed, epoch)
        done = max(0, self.start - epoch * self.batches)
        return iter(torch.split(order, self.batch_size)[done:])

    def _step(self, indices: Tensor, epoch: int) -> None:
        try:
            value = self._advance(indices)
        except TrainingError:
            raise
        except Exception as error:
            raise TrainingError(
                f"step {self.recorder.position} failed: {type(error).__name__}: {error}; training stopped there, and "
                "the trajectory is good up to its last state. Mend the cause and go on with resume=True"
            ) from error
        self.losses.append(value)
        self.recorder.step(indices, value, epoch=epoch, clip=self.clip)

    def _advance(self, indices: Tensor) -> float:
        """Make a step; returns its loss."""
        inputs, targets = self.recorder.fetch(indices)
        watch = None if self.features is None else self.features.watch(inputs)
        around = None if watch is None else watch.forward(inputs)
        result = forward(self.model, inputs, targets, loss=self.loss, reduction="mean", around=around)
        value = result.total.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss at step {self.recorder.position} is {value}; training stopped there, and the trajectory is "
                "good up to its last state. Lower the learning rate, or check the data"
            )
        found, at_edges = gradients(result.total, self.parameters, [] if watch is None else watch.edges(*result))
        self.clip = self.clipping.factor(found)
        if watch is not None and self.features is not None:
            watch.collect(at_edges)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.features.take(watch, self.recorder.position, indices, [float(r) for r in rates], self.clip)
        assign(self.parameters, self.clipping.applied(found, self.clip))
        self.optimizer.step()
        return value

    def _end_epoch(self) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(math.fsum(self.losses) / len(self.losses))
        elif self.scheduler is not None:
            self.scheduler.step()
        self.losses = []
        self.ended += 1

    def _extra(self) -> dict[str, Any]:
        if self.scheduler is None:
            return {}
        return {"scheduler": self.scheduler.state_dict(), "ended": self.ended}


def _permutation(examples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's examples: a function of its arguments alone."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(examples, generator=torch.Generator().manual_seed(int(mixed)))


def _optimizer(given: Any, model: nn.Module) -> Optimizer:
    if isinstance(given, Optimizer):
        return given
    if given is None:
        return torch.optim.SGD(model.parameters(), lr=0.1)
    if not callable(given):
        raise ArgumentError(
            f"optimizer is {given!r}, expected an optimizer of torch.optim, or a function that makes one from "
            "parameters, like lambda p: torch.optim.SGD(p, lr=0.1)"
        )
    made = given(model.parameters())
    if not isinstance(made, Optimizer):
        raise ArgumentError(f"optimizer= returned a {type(made).__name__}, expected an optimizer of torch.optim")
    return made


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 0 if name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_scheduler(scheduler: Any, optimizer: Optimizer) -> str | None:
    """The scheduler's name for the manifest; its state must fit into a recorded state."""
    if scheduler is None:
        return None
    if not isinstance(scheduler, LRScheduler):
        raise ArgumentError(f"scheduler is {scheduler!r}, expected one of torch.optim.lr_scheduler")
    if scheduler.optimizer is not optimizer:
        raise ArgumentError("the scheduler belongs to another optimizer; build it from this one")
    try:
        json.dumps(scheduler.state_dict())
    except TypeError as error:
        raise ArgumentError(
            f"the state of {type(scheduler).__name__} cannot be recorded ({error}); use a "
            "scheduler of numbers, or your own loop with kx.record"
        ) from error
    return type(scheduler).__name__


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the whole model is in training mode; afterwards each module as before."""
    before = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
