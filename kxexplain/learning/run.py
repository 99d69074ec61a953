"""The loop of :func:`kxexplain.train`: every step, recorded or not, from wherever it was interrupted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.gradients.ordinary import StepGradients
from kxexplain.learning.interrupts import interrupts
from kxexplain.learning.progress import Progress
from kxexplain.learning.resume import restored
from kxexplain.learning.scheduler import GradientSchedule
from kxexplain.learning.unrecorded import Unrecorded
from kxexplain.search.recording import FeatureRecorder
from kxexplain.shapes import Inputs
from kxexplain.trajectory import LossFunction, Recorder, Trajectory, rng
from kxexplain.trajectory.batches import Fetcher, call
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.forward import Shares, assign, descend, forward, gradients, losses_of
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.recorder import ONE, PLUS
from kxexplain.trajectory.states import load_model, load_optimizer

KNOWN = ("origin", "fixed")
"""Parts of a schedule's state that need not stand in every recorded state."""


class Run:
    """One call of :func:`kxexplain.train`: where it is, and the loop."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        recorder: Recorder | Unrecorded,
        *,
        dataset: Any,
        loss: LossFunction,
        schedule: GradientSchedule | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.schedule = model, optimizer, scheduler, schedule
        self.recorder, self.loss = recorder, loss
        manifest = recorder.manifest
        self.objective = Objective.noted(manifest.settings)
        self.seed = 0 if manifest.seed is None else manifest.seed
        self.epochs: int = manifest.settings["epochs"]
        self.batch_size: int = manifest.settings["batch_size"]
        self.examples = manifest.dataset.count
        self.clipping = Clipping.noted(manifest.settings)
        self.bare = self.objective == Objective() and self.clipping == Clipping()
        """Whether the optimiser is given the loss' gradient as it is."""
        self.shares = Shares("mean")
        self.features: FeatureRecorder | None = None
        self.sign, self.clip = PLUS, ONE
        """What the present step's gradient was multiplied by."""
        self.batches = math.ceil(self.examples / self.batch_size)
        self.device = next(model.parameters()).device
        self._fetch = Fetcher(dataset, self.device)
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
        if self.schedule is not None:
            self._restore_schedule(old, state.extra["schedule"])
        within = self.start % self.batches or min(self.start, self.batches)
        self.losses = [step.loss for step in old.steps[self.start - within : self.start]]
        self.ended = state.extra.get("ended", self.start // self.batches)
        if self.ended < self.start // self.batches:  # the state was taken at once after the last batch
            with warnings.catch_warnings():  # torch only looks at steps of this very optimizer
                warnings.filterwarnings("ignore", "Detected call of", UserWarning)
                self._end_epoch()
        self.recorder.resume(old)
        return False

    def _restore_schedule(self, old: Trajectory, kept: dict[str, Any]) -> None:
        """What a state does not keep, the run's arguments and its first state give again."""
        assert self.schedule is not None
        state = {**self.schedule.state_dict(), **kept}
        if "origin" in state:
            start = old.state(0).parameters
            state["origin"] = [start[name] for group in old.manifest.optimizer.groups for name in group.names]
        self.schedule.load_state_dict(state)

    def sizes(self) -> list[Tensor]:
        """One batch of each size: the first, and the first epoch's last if that is smaller."""
        batches = torch.split(permutation(self.examples, self.seed, 0), self.batch_size)
        return [batches[0], *batches[1:][-1:]] if self.examples % self.batch_size else [batches[0]]

    def train(self, *, progress: bool) -> None:
        """All steps that are left to do."""
        with ExitStack() as stack:
            stack.enter_context(rng.fork(self.device))
            rng.seed(self.seed, self.device)
            rng.restore(self.rng, self.device)
            bar = Progress(self.epochs * self.batches, self.start, shown=progress)
            stack.enter_context(bar)
            interrupted = stack.enter_context(interrupts())
            stack.enter_context(self.recorder)
            for epoch in range(self.start // self.batches, self.epochs):
                for indices, numbers in self._left(epoch):
                    self._step(indices, numbers, epoch)
                    bar.step(epoch, self.losses[-1], self.optimizer.param_groups[0]["lr"])
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                self._end_epoch()

    def _left(self, epoch: int) -> Iterator[tuple[Tensor, list[int]]]:
        """The epoch's batches that are still to come: indices to look examples up by, and the same to be logged."""
        order = permutation(self.examples, self.seed, epoch)
        done = max(0, self.start - epoch * self.batches) * self.batch_size
        numbers = order.tolist()
        for start in range(done, self.examples, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield order[rows], numbers[rows]

    def _step(self, indices: Tensor, numbers: list[int], epoch: int) -> None:
        try:
            value = self._advance(indices)
        except TrainingError:
            raise
        except Exception as error:
            raise TrainingError(
                f"step {self.recorder.position} failed: {type(error).__name__}: {error}; training stopped there, and "
                f"{self.recorder.kept}. Mend the cause and go on with resume=True"
            ) from error
        self.losses.append(value)
        self.recorder.step(numbers, value, epoch=epoch, sign=self.sign, clip=self.clip)

    def _advance(self, indices: Tensor) -> float:
        """Make a step; returns its loss."""
        inputs, targets = self._fetch(indices)
        if self.bare and self.features is None:
            return self._descend(inputs, targets)
        watch = None if self.features is None else self.features.watch(inputs)
        around = None if watch is None else watch.forward(inputs)
        result = forward(
            self.model, inputs, targets,
            loss=self.loss, reduction="mean", objective=self.objective, around=around,
        )  # fmt: skip
        value = self._finite(result.plain.item())
        edges = [] if watch is None else watch.edges(result.outputs, result.losses, result.total)
        descent = descend(result.total, self.parameters, self.objective, edges)
        found = descent.found
        self.clip = self.clipping.factor(found)
        if self.objective.directed:
            self.sign, factor = self.objective.direction(self.recorder.position, descent.value.item())
            self.clip *= factor
        if watch is not None:
            watch.collect(descent.edges)
        assign(self.parameters, self.clipping.applied(found, self.sign * self.clip))
        if watch is None or self.features is None:
            self.optimizer.step()
        else:
            self.features.before()
            self.optimizer.step()
            self._collect(watch, indices, descent.examples)
        return value

    def _descend(self, inputs: Inputs, targets: Tensor) -> float:
        """A step on nothing but the loss: what :meth:`_advance` would do, to the last bit, with less around it."""
        losses = losses_of(call(self.model, inputs), targets, self.loss)
        value = self._finite(losses.detach().mean().item())
        assign(self.parameters, gradients(losses, self.parameters, weights=self.shares.of(losses))[0])
        self.optimizer.step()
        return value

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss at step {self.recorder.position} is {value}; training stopped there, and "
                f"{self.recorder.kept}. Lower the learning rate, or check the data"
            )
        return value

    def _collect(self, watch: StepGradients, indices: Tensor, gradients: list[Tensor | None]) -> None:
        """Hand the examples' shares of the step just made to the features."""
        assert self.features is not None
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        named = {
            self.features.names[id(p)]: g for p, g in zip(self.parameters, gradients, strict=True) if g is not None
        }
        self.features.take(
            self.recorder.position, indices, watch.factors, named, rates=rates, factor=self.sign * self.clip
        )

    def _end_epoch(self) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(math.fsum(self.losses) / len(self.losses))
        elif self.scheduler is not None:
            self.scheduler.step()
        self.losses = []
        self.ended += 1

    def _extra(self) -> dict[str, Any]:
        if self.schedule is not None:
            state = self.schedule.state_dict()
            return {"schedule": {key: value for key, value in state.items() if key not in KNOWN}}
        if self.scheduler is None:
            return {}
        return {"scheduler": self.scheduler.state_dict(), "ended": self.ended}


NO_EPOCH = 1 << 31
"""Stands for an epoch's number where examples are drawn for something else than training."""


def permutation(examples: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's examples: a function of its arguments alone."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(examples, generator=torch.Generator().manual_seed(int(mixed)))
