"""The bundled training loop: :func:`train` records while it trains, and can be interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from kxexplain.errors import ArgumentError
from kxexplain.learning.rates import COORDINATES
from kxexplain.learning.run import Run
from kxexplain.learning.scheduler import GradientSchedule
from kxexplain.learning.schedules import Schedule
from kxexplain.learning.unrecorded import Unrecorded
from kxexplain.search.recording import FeatureRecorder, borders_of
from kxexplain.trajectory import LossFunction, Recorder, Trajectory
from kxexplain.trajectory import keep as keeping
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.describe import check_budget, describe
from kxexplain.trajectory.fingerprints import fingerprint
from kxexplain.trajectory.losses import resolve
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.records import Manifest
from kxexplain.trajectory.sameness import check_same
from kxexplain.trajectory.signature import describe_model, own_class
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
    schedule: str | Schedule | None = None,
    objective: Objective | None = None,
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    norms: bool | None = None,
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
        schedule: sets the rate before every step, from the gradient: a name, the radius then being estimated, or a
            :class:`kxexplain.Schedule`. Default optimiser then: SGD, or Adagrad for ``"adagrad"``.
        objective: flooding, alternating descent and ascent, penalties on gradients: a :class:`kxexplain.Objective`.
        scheduler: of torch, over the same optimiser; stepped once an epoch.
        clip_norm: largest norm of a step's gradient over the optimiser's parameters, clipped as torch's
            ``clip_grad_norm_`` does; the factor is logged, and the bill stays itemised.
        clip_value: largest size of an element of a step's gradient, clamped as torch's ``clip_grad_value_`` does. A
            clamp is no sum over the examples: their shares are those of the gradient as it was before, and what the
            clamp took away from it is the bill's line "unattributed".
        norms: log the norm of every step's gradient, which takes up to a tenth of a short step's time. By default where
            there is a ``schedule``, which is made of them; :func:`kxexplain.gradient_norms` finds them otherwise. It
            also looks at every gradient before the optimiser moves: without it one that is not finite, in a step whose
            loss is, stops training there only if it reaches the smallest parameter, as most do; else the next step's
            loss does, the model's weights are spoilt, and :func:`kxexplain.recover` gets the run up to before.
        features: collect gradient features of so many dimensions while training, so that the retrieval index needs no
            pass of its own: it is written to ``out``/index, for ``kx.GradientIndex.load``. Under momentum and Adam a
            step's gradients wait until nothing is left of them in the moment (some 200 steps at 0.9, in memory); where
            those take more than 1 GB the index is made by a replay instead, and a warning says so. Not with a budget
            of bytes.
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
    if resume and overwrite:
        raise ArgumentError("resume=True and overwrite=True exclude each other; choose one")
    path, policy = folder(out), keeping.parse(keep)
    describe_model(model)
    check_budget(policy, model)
    with ExitStack() as stack:
        plan = _plan(
            stack, model, dataset, loss, optimizer, epochs=epochs, batch_size=batch_size, seed=seed, keep=keep,
            schedule=schedule, objective=objective, scheduler=scheduler, clip_norm=clip_norm, clip_value=clip_value,
        )  # fmt: skip
        own = own_class(plan.optimizer)
        recorder = Recorder(
            model, plan.optimizer, plan.manifest, policy,
            path=path, loss=loss, dataset=dataset,
            norms=schedule is not None if norms is None else norms, own=True, overwrite=overwrite,
        )  # fmt: skip
        run = Run(
            model, plan.optimizer, scheduler, recorder,
            dataset=dataset, loss=resolve(loss)[1], schedule=plan.schedule,
        )  # fmt: skip
        if features is not None:
            borders = borders_of(policy, epochs * run.batches, run.batches)
            run.features = FeatureRecorder(
                model, plan.optimizer, plan.manifest, policy, dataset, features, borders=borders
            )  # fmt: skip
        if resume and is_trajectory(path):
            old = Trajectory.open(path, loss if callable(loss) else None)
            old.check_model(model)
            check_same(old.manifest, plan.manifest, stepped=not (scheduler is None and schedule is None))
            if run.restore(old):
                finished = Trajectory.open(path, loss if callable(loss) else None, own)
                if run.features is not None:
                    run.features.complete(finished, progress=progress)
                return finished
        else:
            check_free(path, overwrite=overwrite)
            rehearse(model, plan.manifest, dataset, run.sizes(), run.loss, own)
        run.train(progress=progress)
        if run.features is not None:
            run.features.complete(recorder.trajectory, progress=progress)
    return recorder.trajectory


def fit(
    model: nn.Module,
    dataset: Any,
    loss: str | LossFunction = "cross_entropy",
    optimizer: Optimizer | MakeOptimizer | None = None,
    *,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
    schedule: str | Schedule | None = None,
    objective: Objective | None = None,
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    progress: bool = True,
) -> list[float]:
    """Train ``model`` in place as :func:`train` does, to the last bit, without recording; returns each step's loss.

    Arguments and errors are those of :func:`train`.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
    >>> losses = fit(nn.Linear(8, 2), data, epochs=20, batch_size=4, schedule="adagrad_norm")
    >>> len(losses), sum(losses[-2:]) < sum(losses[:2])
    (40, True)
    """
    describe_model(model)
    with ExitStack() as stack:
        plan = _plan(
            stack, model, dataset, loss, optimizer, epochs=epochs, batch_size=batch_size, seed=seed, keep="epoch",
            schedule=schedule, objective=objective, scheduler=scheduler, clip_norm=clip_norm, clip_value=clip_value,
        )  # fmt: skip
        unrecorded = Unrecorded(plan.manifest)
        run = Run(
            model, plan.optimizer, scheduler, unrecorded,
            dataset=dataset, loss=resolve(loss)[1], schedule=plan.schedule,
        )  # fmt: skip
        rehearse(model, plan.manifest, dataset, run.sizes(), run.loss, own_class(plan.optimizer))
        run.train(progress=progress)
    return unrecorded.losses


class _Plan(NamedTuple):
    """What a run is made with, checked."""

    manifest: Manifest
    optimizer: Optimizer
    schedule: GradientSchedule | None


def _plan(
    stack: ExitStack,
    model: nn.Module,
    dataset: Any,
    loss: str | LossFunction,
    optimizer: Any,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    keep: str | int,
    **choices: Any,
) -> _Plan:
    """Check a run's arguments; until the stack closes the model is in training mode, and the schedule attached."""
    _check_numbers(epochs=epochs, batch_size=batch_size, seed=seed)
    for one, other in (("clip_norm", "clip_value"), ("schedule", "scheduler")):
        if choices[one] is not None and choices[other] is not None:
            raise ArgumentError(f"{one} and {other} exclude each other; choose one")
    clipping = Clipping.asked(choices["clip_norm"], choices["clip_value"])
    wanted, objective = Schedule.asked(choices["schedule"]), choices["objective"]
    if not isinstance(objective, Objective | None):
        raise ArgumentError(f"objective is {objective!r}, expected a kx.Objective")
    ready = _optimizer(optimizer, model, wanted)
    settings = {"loop": "train", "epochs": epochs, "batch_size": batch_size, **clipping.settings}
    settings |= {} if objective is None else objective.settings
    settings["scheduler"] = _check_scheduler(choices["scheduler"], ready)
    stack.enter_context(_training_mode(model))
    attached = None
    if wanted is not None:
        steps = epochs * max(1, math.ceil(_count(dataset) / batch_size))
        attached = GradientSchedule(ready, wanted, steps)
        stack.callback(attached.detach)
        settings["schedule"] = wanted.settings(steps)
    manifest = describe(
        model, ready, loss, dataset,
        keep=keep, reduction="mean", seed=seed, settings=settings,
    )  # fmt: skip
    return _Plan(manifest, ready, attached)


def _count(dataset: Any) -> int:
    """The number of examples; ``DatasetError`` where they cannot be counted."""
    return len(dataset) if hasattr(dataset, "__len__") else fingerprint(dataset).count


def _optimizer(given: Any, model: nn.Module, schedule: Schedule | None) -> Optimizer:
    if isinstance(given, Optimizer):
        return given
    if given is None and schedule is not None and schedule.name == COORDINATES:
        return torch.optim.Adagrad(model.parameters(), lr=1.0)
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
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
            raise ArgumentError(f"{name} must be an integer >= {least} of at most 63 bits, got {value!r}")


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
