"""Watching a training loop through hooks, so that nothing it does goes unlogged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.shapes import Tensors
from kxexplain.trajectory import rng
from kxexplain.trajectory.draws import Draws
from kxexplain.trajectory.groups import Groups
from kxexplain.trajectory.log import Modes

WIDE = frozenset({torch.float32, torch.float64})
"""Types in which a sum of squares neither overflows nor loses its digits."""

FREE, TRAINING = attrgetter("requires_grad"), attrgetter("training")

FEW = 64
"""So many numbers are read faster than a kernel is called."""


class Observer:
    """What model and optimiser did since the last logged step.

    The optimiser's step is seen before it happens, so that a gradient that is not finite stops
    training while the parameters are still good. The model's forward pass is looked at only while
    steps draw random numbers, or where there are buffers to keep: hooks on a model cost time.

    What is done in every step of somebody's loop is kept short: between two steps the processor's caches hold other
    things, and a line of Python or a call into torch takes many times what it takes in a loop of its own.

    Args:
        model: the model in training.
        optimizer: its optimiser.
        random: the dataset draws from the generator, so that a step begins where its batch is fetched.
        norms: measure the gradient's norm in every step; else :attr:`norm` is NaN, and only the smallest parameter's
            gradient is looked at, which a loss that is not finite reaches, too.
        steps_only: nothing draws random numbers but the steps, their fetching included.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        random: bool = False,
        norms: bool = False,
        steps_only: bool = False,
    ) -> None:
        self.model = model
        self.random, self.norms = random, norms
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = next(model.parameters()).device
        self.step = 0
        """Number of the present step."""
        self.pending = self.completed = False
        """Whether the optimiser has begun the present step, and made it."""
        self.rates: tuple[float, ...] = ()
        self.norm = math.nan
        self.begun: rng.RngState | None = None
        """The generator states with which the present step began, if somebody looked."""
        self.changed = False
        """Whether the present step's modes are others than those of the step before."""
        self.draws = Draws(rng.capture(self.device), steps_only=steps_only)
        self._fetched: list[tuple[list[int], rng.RngState]] = []  # since the last logged step
        self._forward_hook: RemovableHandle | None = None
        self._buffers: Tensors | None = None
        self._has_buffers = any(True for _ in model.buffers())
        self._groups = Groups(optimizer)
        self._by_size = sorted((p for p in self.parameters if p.numel()), key=Tensor.numel)
        self._read = next((p for p in self._by_size[:1] if p.dim() == 1 and len(p) <= FEW and p.dtype in WIDE), None)
        self._plain = is_plain(optimizer)
        self._names = [name for name, _ in model.named_modules()]
        self._named = dict(model.named_parameters())
        self._flags: tuple[list[bool], list[bool]] = ([], [])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the model and the optimiser inside the block."""

        def after_step(*_: Any) -> None:
            self.completed = True

        handles = [
            self.optimizer.register_step_pre_hook(self._before_step()),
            self.optimizer.register_step_post_hook(after_step),
        ]
        self._watch_forward()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._leave_forward()

    def begin(self, step: int, state: rng.RngState) -> None:
        """Observe from ``step`` on, which begins with this generator state."""
        self.step = step
        self.draws.begin(state)

    def fetching(self, indices: list[int]) -> None:
        """These examples are about to be fetched."""
        if self.random:
            self._fetched.append((indices, rng.capture(self.device)))

    def check_fetched(self, indices: list[int]) -> None:
        """``ArgumentError`` unless the last fetches were of these examples."""
        rest = indices
        for fetched, state in reversed(self._fetched):
            if not fetched or rest[-len(fetched) :] != fetched:
                break
            self.begun = state
            rest = rest[: -len(fetched)]
            if not rest:
                return
        raise ArgumentError(
            f"step {self.step} was made of other examples than recorder.fetch() gave last, or of those in another "
            "order; the dataset draws at random, so replay must fetch the same ones: give recorder.step() the indices "
            "that recorder.fetch() was given"
        )

    def next(self) -> rng.RngState:
        """The present step is over; returns the generator states that it left behind."""
        self.step += 1
        self.pending = self.completed = self.changed = False
        self.begun = self._buffers = None
        if self.random:
            self._fetched = []
        return rng.capture(self.device)

    def follow(self) -> None:
        """Look at forward passes, or leave them alone, as the steps so far ask for."""
        if not self.draws.quiet:
            self._watch_forward()
        elif not self._has_buffers:
            self._leave_forward()

    def modes(self) -> Modes:
        """Training modes and frozen parameters at the last step that began."""
        training, free = self._flags
        return Modes(
            tuple(name for name, on in zip(self._names, training, strict=True) if on),
            tuple(name for name, on in zip(self._named, free, strict=True) if not on),
        )

    def buffers(self) -> Tensors | None:
        """The buffers before a forward pass that belongs to no logged step, if there was one."""
        return self._buffers

    def _watch_forward(self) -> None:
        # A plain function: a copy of the model made meanwhile keeps it, and must not report here.
        def before_forward(module: nn.Module, *_: Any) -> None:
            if module is self.model and torch.is_grad_enabled():
                self._before_forward()

        if self._forward_hook is None:
            self._forward_hook = self.model.register_forward_pre_hook(before_forward)

    def _leave_forward(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    def _before_forward(self) -> None:
        check_precision(self.device)
        self.begun = rng.capture(self.device)
        if self._has_buffers and self._buffers is None and not self.pending:
            self._buffers = {name: b.clone() for name, b in self.model.named_buffers()}

    def _before_step(self) -> Callable[..., None]:
        """What the optimiser calls before a step: all that can be refused is refused here, and else noted."""
        rates, size, norms = self._groups.rates, self._size, self.norms
        parameters, modules = list(self._named.values()), list(self.model.modules())

        def before_step(*_: Any) -> None:
            if self.pending or (self.random and not self._fetched):
                self._refuse()
            now = rates(self.step)
            free = list(map(FREE, parameters))
            if False in free:
                self._check_frozen()
            flags = (list(map(TRAINING, modules)), free)
            measured = size()
            if not math.isfinite(measured):
                raise TrainingError(
                    f"the gradient at step {self.step} is not finite ({measured}); this step was not taken, and the "
                    "trajectory is good up to its last state. Lower the learning rate, or check the inputs"
                )
            if flags != self._flags:
                self._flags, self.changed = flags, True
            if norms:
                self.norm = measured
            self.rates = now
            self.pending = True

        return before_step

    def _refuse(self) -> None:
        """``TrainingError`` for a step that must not be made, saying why."""
        if self.pending:
            raise TrainingError(
                f"a second optimizer.step() at step {self.step} without recorder.step(indices) "
                "after the first: training went past the recorder, and cannot be explained"
            )
        raise TrainingError(
            f"the dataset draws at random, but the batch of step {self.step} was not fetched by "
            "recorder.fetch(indices), so replay could not draw the same; nothing was changed. Write "
            "inputs, targets = recorder.fetch(indices) in the loop"
        )

    def _size(self) -> float:
        """The gradient's norm; where that is not asked for, of the smallest parameter with one the sum or norm."""
        if self.norms:
            return gradient_norm([p.grad for p in self.parameters if p.grad is not None])
        if self._read is not None and self._read.grad is not None:
            return float(sum(self._read.grad.tolist()))
        return gradient_norm([p.grad for p in self._by_size if p.grad is not None][:1])

    def _check_frozen(self) -> None:
        """``TrainingError`` where the optimiser is about to move a frozen parameter, which replay would not."""
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is not None and not parameter.requires_grad and not (self._plain and not gradient.any()):
                name = next(name for name, p in self._named.items() if p is parameter)
                raise TrainingError(
                    f"{name} is frozen, but still has a gradient at step {self.step}, with which the optimizer would "
                    "move it; nothing was changed. Use zero_grad(set_to_none=True), or set its .grad to None"
                )


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient of zero changes nothing: SGD without momentum and decay."""
    groups = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and not any(g["momentum"] or g["weight_decay"] for g in groups)


def check_precision(device: torch.device) -> None:
    """``TrainingError`` under autocast."""
    if torch.is_autocast_enabled(device.type):
        raise TrainingError(
            "the model is called under autocast, which replay cannot repeat; train in one "
            "precision, for instance model.to(torch.bfloat16)"
        )


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """The 2-norm of all gradients together.

    >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    5.0
    """
    if not gradients:
        return 0.0
    if WIDE.issuperset([g.dtype for g in gradients]):
        try:  # this runs in every step of somebody's loop: a product has the least around it
            return math.sqrt(sum([g.dot(g).item() for g in [g if g.dim() == 1 else g.view(-1) for g in gradients]]))
        except RuntimeError:  # sparse, not contiguous
            pass
    dense = [g.detach().coalesce().values() if g.is_sparse else g.detach() for g in gradients]
    halves = (torch.float16, torch.bfloat16)
    return float(torch.nn.utils.get_total_norm([g.float() if g.dtype in halves else g for g in dense]))
