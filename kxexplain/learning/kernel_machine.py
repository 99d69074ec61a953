r"""Kernel machines trained by gradient descent, for training sets whose Gram matrix does not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, TrainingError, TrajectoryError
from kxexplain.kernels.budget import parse_bytes, progress_bar
from kxexplain.learning.arrays import digest, whole
from kxexplain.learning.machine_file import Progressed, load_progress, new_file, save_progress
from kxexplain.learning.run import NO_EPOCH, permutation
from kxexplain.learning.spaces import FeatureSpace, KernelSpace, Space
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import LossFunction, check_losses, count, fingerprint, resolve

CURVATURE: dict[str, Callable[[int], float]] = {
    "mse": lambda c: 2 / c,
    "logistic": lambda c: 0.25,
    "cross_entropy": lambda c: 0.5,
}
"""The largest second derivative of a loss in c outputs, which the step size is divided by."""


class KernelMachine:
    r"""f(x) = Σ_j a_j K(x, x_j), trained by preconditioned minibatch gradient descent.

    Only a batch's rows of the Gram matrix exist at a time. Plain gradient descent in a kernel's function space takes
    as many steps as the eigenvalues spread, which for n examples is thousands of epochs; the steepest directions,
    found on a subsample, are flattened first (EigenPro), after which a few epochs do. Training begins at f = 0.

    Args:
        kernel: a module, for its tangent kernel as it stands; or a function k(X, Y) giving [b, n]; or
            :class:`kxexplain.TangentFeatures`, over which f = φ(·) W is trained.
        loss: a name of :data:`kxexplain.trajectory.LOSSES`, or a function giving one loss per example. With "mse",
            class numbers are made into indicator vectors.
        epochs: passes over the examples, at most.
        batch_size: examples a step.
        directions: how many directions are flattened; 0 for plain gradient descent.
        subsample: examples that they are found on.
        rate: of the steps; by default the largest that is safe for the loss' curvature.
        patience: stop after so many epochs without a lower validation loss; never if ``None``.
        memory: for a module's gradients, as a number or like ``"2GB"``; coefficients are not among it.
        seed: of subsample and order.

    Attributes:
        coefficients: a, [n, c], or W, [d, c]: with validation, those of the best epoch.
        history: per epoch, "loss" (mean over its batches, each before its step) and "validation".

    Raises:
        ArgumentError: a number out of range; a loss whose curvature is unknown, without a rate.

    Source: Ma & Belkin 2019, arXiv 1806.06144.

    >>> from torch.utils.data import TensorDataset
    >>> x = torch.linspace(-1, 1, 40)[:, None]
    >>> rbf = lambda a, b: torch.exp(-4 * torch.cdist(a, b) ** 2)
    >>> machine = KernelMachine(rbf, epochs=20, batch_size=10, directions=5).fit(TensorDataset(x, x.sin()))
    >>> bool((machine(x) - x.sin()).abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        kernel: Any,
        *,
        loss: str | LossFunction = "mse",
        epochs: int = 10,
        batch_size: int = 1000,
        directions: int = 100,
        subsample: int = 2000,
        rate: float | None = None,
        patience: int | None = None,
        memory: str | int = "1GB",
        seed: int = 0,
    ) -> None:
        if not callable(kernel) and not hasattr(kernel, "transform"):
            raise ArgumentError(f"got kernel={kernel!r}; expected a module, a function k(X, Y) or kx.TangentFeatures")
        at_least = {"epochs": 1, "batch_size": 1, "directions": 0, "subsample": 2, "seed": 0}
        given: dict[str, Any] = {
            "epochs": epochs, "batch_size": batch_size, "directions": directions, "subsample": subsample, "seed": seed,
        }  # fmt: skip
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < at_least[name]:
                raise ArgumentError(f"got {name}={value!r}; expected a whole number of at least {at_least[name]}")
        if patience is not None and (not isinstance(patience, int) or patience < 1):
            raise ArgumentError(f"got patience={patience!r}; expected a whole number of at least 1, or None")
        if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise ArgumentError(f"got rate={rate!r}; expected a positive number, or None")
        self.loss_name, self._loss = resolve(loss)
        if rate is None and self.loss_name not in CURVATURE:
            raise ArgumentError(f"the curvature of loss {self.loss_name!r} is unknown; give rate=")
        parse_bytes(memory)
        self.kernel, self.epochs, self.batch_size, self.directions = kernel, epochs, batch_size, directions
        self.subsample, self.rate, self.patience, self.memory, self.seed = subsample, rate, patience, memory, seed
        self.history: list[dict[str, float]] = []
        self._space: Space | None = None

    def fit(
        self,
        train: Examples,
        validation: Examples | None = None,
        *,
        out: str | PathLike[str] | None = None,
        resume: bool = False,
        progress: bool = False,
    ) -> KernelMachine:
        """Train.

        Args:
            train: (input, target) pairs.
            validation: examples that decide when to stop, and which epoch's coefficients are kept.
            out: a file that the state is written to after every epoch.
            resume: go on from that file if it is there, to the result of an uninterrupted training.
            progress: show a bar over the steps.

        Raises:
            ArgumentError: a kernel that gives no matrices, or is not positive; patience without validation; targets
                that do not fit the loss.
            DatasetError: no examples.
            TrainingError: the loss grows or is not finite.
            TrajectoryError: ``out`` is of another training, or cannot be written.
        """
        if self.patience is not None and validation is None:
            raise ArgumentError("patience needs validation examples; give validation=, or leave patience out")
        if resume and out is None:
            raise ArgumentError("resume=True needs the file to go on from; give out=")
        path = None if out is None else new_file(out)
        inputs, targets = self._examples(train, "training")
        columns = _columns(self.loss_name, targets)
        self._try(columns, targets[:1])
        held = None if validation is None else self._examples(validation, "validation", columns)
        settings = self._settings(train) if path is not None else {}
        there = path is not None and path.exists()
        if there and not resume:
            raise TrajectoryError(f"{path} is there already; go on with resume=True, or give another file")
        space = self._made(inputs, columns)
        state = Progressed(space.coefficients, space.coefficients.clone(), [])
        if there and path is not None:
            state = load_progress(path, settings)
            space.coefficients = state.coefficients.to(space.coefficients)
        steps = math.ceil(len(targets) / self.batch_size)
        left = max(0, self.epochs - len(state.history)) * steps
        with progress_bar(progress, left, "kernel machine") as tick, torch.no_grad():
            for epoch in range(len(state.history), self.epochs):
                if state.stopped:
                    break
                self._epoch(space, targets, epoch, state, tick)
                self._judge(space, held, state)
                if path is not None:
                    state.coefficients = space.coefficients
                    save_progress(path, state, settings)
        space.coefficients = state.best.to(space.coefficients)
        self.history, self._space = state.history, space
        return self

    @property
    def coefficients(self) -> Tensor:
        """A over the training examples, or W over features."""
        return self._fitted().coefficients

    def __call__(self, inputs: Inputs) -> Tensor:
        """f(x), [n, c].

        Raises:
            TrainingError: it has not been trained.
        """
        space = self._fitted()
        with torch.no_grad():
            return torch.cat(list(space.predict(inputs)))

    def __repr__(self) -> str:
        return f"KernelMachine({self._kind()}, {self.loss_name}, {len(self.history)} of {self.epochs} epochs)"

    def _device(self) -> torch.device | None:
        """Where the kernel is computed, if it is a module's; the examples stay where they are otherwise."""
        return next(self.kernel.parameters()).device if isinstance(self.kernel, nn.Module) else None

    def _kind(self) -> str:
        if hasattr(self.kernel, "transform"):
            return "sketched features"
        return f"tangent kernel of {type(self.kernel).__name__}" if isinstance(self.kernel, nn.Module) else "a function"

    def _fitted(self) -> Space:
        if self._space is None:
            raise TrainingError("this kernel machine has not been trained; call fit first")
        return self._space

    def _examples(self, dataset: Examples, name: str, columns: int | None = None) -> tuple[Inputs, Tensor]:
        """Inputs and targets; class numbers as indicator vectors where the loss is a squared one."""
        inputs, targets = whole(dataset, name, self._device())
        if self.loss_name != "mse" or targets.dim() != 1 or targets.is_floating_point():
            return inputs, targets
        classes = int(targets.max()) + 1 if columns is None else columns
        if int(targets.min()) < 0 or int(targets.max()) >= classes:
            reach = f"{int(targets.min())} to {int(targets.max())}"
            raise DatasetError(f"class numbers reach from {reach}, but there are {classes} classes")
        return inputs, F.one_hot(targets.long(), classes).float()

    def _made(self, inputs: Inputs, columns: int) -> Space:
        n = count(inputs)
        sample = permutation(n, self.seed, NO_EPOCH)[: self.subsample].sort().values.to(self._device())
        directions = min(self.directions, len(sample) - 1)
        space: Space
        if hasattr(self.kernel, "transform"):
            space = FeatureSpace(self.kernel, inputs, sample, directions=directions, batch=self.batch_size)
        else:
            space = KernelSpace(
                self.kernel, inputs, sample, directions=directions, batch=self.batch_size, memory=self.memory
            )
        space.coefficients = space.coefficients.new_zeros(len(space.coefficients), columns)
        return space

    def _epoch(self, space: Space, targets: Tensor, epoch: int, state: Progressed, tick: Callable[[], None]) -> None:
        total, n = 0.0, len(targets)
        for rows in permutation(n, self.seed, epoch).to(targets.device).split(self.batch_size):
            losses, pull = self._pull(space.values(rows), targets[rows])
            total += float(losses.double().sum())
            rate = self.rate
            if rate is None:
                rate = space.preconditioner.rate(len(rows)) / CURVATURE[self.loss_name](pull.shape[1])
            space.step(rows, pull, rate)
            tick()
        state.history.append({"loss": total / n})
        first = state.history[0]["loss"]
        if not math.isfinite(total) or total / n > 10 * first:
            raise TrainingError(
                f"the loss grew from {first:.3g} in the first epoch to {total / n:.3g} in epoch {epoch + 1}; give a "
                "smaller rate=, fewer directions, or a larger subsample"
            )

    def _try(self, columns: int, targets: Tensor) -> None:
        """``ArgumentError`` before work starts if the targets do not fit the loss."""
        try:
            self._pull(torch.zeros(len(targets), columns, device=targets.device), targets)
        except (RuntimeError, TypeError, IndexError) as error:
            raise ArgumentError(
                f"targets of shape {tuple(targets.shape[1:])} each do not fit loss {self.loss_name!r}: {error}"
            ) from error

    def _pull(self, values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [b] and their derivatives by f, [b, c]."""
        with torch.enable_grad():
            values = values.detach().requires_grad_()
            losses = self._loss(values, targets)
            check_losses(losses, len(values))
            return losses.detach(), torch.autograd.grad(losses.sum(), values)[0]

    def _judge(self, space: Space, held: tuple[Inputs, Tensor] | None, state: Progressed) -> None:
        """Note the validation loss, keep the best coefficients, decide whether to stop."""
        if held is None:
            state.best = space.coefficients.clone()
            return
        losses = self._pull(torch.cat(list(space.predict(held[0]))), held[1])[0]
        state.history[-1]["validation"] = float(losses.double().mean())
        course = [entry["validation"] for entry in state.history]
        best = course.index(min(course))
        if best == len(course) - 1:
            state.best = space.coefficients.clone()
        state.stopped = self.patience is not None and len(course) - 1 - best >= self.patience

    def _settings(self, train: Examples) -> dict[str, Any]:
        """What a file must agree with; more epochs may be asked for later."""
        return {
            "examples": fingerprint(train).ordered, "loss": self.loss_name, "batch_size": self.batch_size,
            "directions": self.directions, "subsample": self.subsample, "rate": self.rate, "seed": self.seed,
            "kernel": self._kind(), "weights": self._weights(),
        }  # fmt: skip

    def _weights(self) -> str:
        """What the kernel's values depend on, as far as it can be seen: of a function nothing can."""
        if isinstance(self.kernel, nn.Module):
            return _short(self.kernel)
        chosen = self.kernel.get_params(deep=False) if hasattr(self.kernel, "get_params") else {}
        return ", ".join(f"{k}={_short(v) if isinstance(v, nn.Module) else repr(v)}" for k, v in chosen.items())


def _short(network: nn.Module) -> str:
    """A fingerprint of a network's parameters and buffers."""
    return digest(network.state_dict().values()).hex()[:12]


def _columns(loss: str, targets: Tensor) -> int:
    """How many outputs such targets ask for."""
    if targets.dim() == 2:
        return targets.shape[1]
    if loss == "cross_entropy" and not targets.is_floating_point():
        return int(targets.max()) + 1
    return 1


__all__ = ["KernelMachine"]
