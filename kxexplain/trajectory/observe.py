"""Watching a training loop through hooks, so that nothing it does goes unlogged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.shapes import Tensors
from kxexplain.trajectory import rng
from kxexplain.trajectory.draws import Draws
from kxexplain.trajectory.log import Modes

RATES = ("params", "lr", "initial_lr")
"""Options of a parameter group that may change while training goes on."""

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
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, random: bool = False, norms: bool = True
    ) -> None:
        self.model = model
        self.random, self.norms = random, norms
        self._fetched: list[tuple[list[int], rng.RngState]] = []  # since the last logged step
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = next(model.parameters()).device
        self.step = 0
        self.pending = False
        self.completed = False
        self.rates: tuple[float, ...] = ()
        self.norm = math.nan
        self.draws = Draws(self.device)
        self._forward_hook: RemovableHandle | None = None
        self._buffers: Tensors | None = None
        self._has_buffers = any(True for _ in model.buffers())
        self._groups = [Held.of(group) for group in optimizer.param_groups]
        self._by_size = sorted((p for p in self.parameters if p.numel()), key=Tensor.numel)
        self._read = next((p for p in self._by_size[:1] if p.dim() == 1 and len(p) <= FEW and p.dtype in WIDE), None)
        self._plain = is_plain(optimizer)
        self._names = [name for name, _ in model.named_modules()]
        self._modules = list(model.modules())
        self._named = dict(model.named_parameters())
        self._parameters = list(self._named.values())
        self._flags: tuple[list[bool], list[bool]] = ([], [])
        self._told = self._flags

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the model and the optimiser inside the block."""

        def before_step(*_: Any) -> None:
            self._before_step()

        def after_step(*_: Any) -> None:
            self.completed = True

        self._watch_forward()
        handles = [
            self.optimizer.register_step_pre_hook(before_step),
            self.optimizer.register_step_post_hook(after_step),
        ]
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
            self.draws.began(state)
            rest = rest[: -len(fetched)]
            if not rest:
                return
        raise ArgumentError(
            f"step {self.step} was made of other examples than recorder.fetch() gave last, or of those in another "
            "order; the dataset draws at random, so replay must fetch the same ones: give recorder.step() the indices "
            "that recorder.fetch() was given"
        )

    def check_one_step(self) -> None:
        """``TrainingError`` unless the optimiser stepped once since the last logged step."""
        if not (self.pending and self.completed):
            raise TrainingError(
                "recorder.step() was called without an optimizer.step() before it; call it once "
                "after each step of the optimizer that was given to record()"
            )

    def logged(self) -> rng.RngState | None:
        """The pending step is logged; returns the generator states that a replay must be told it began with."""
        told = self.draws.logged()
        if self.draws.quiet:
            if self._forward_hook is not None and not self._has_buffers:
                self._leave_forward()
        elif self._forward_hook is None:
            self._watch_forward()
        self.step += 1
        self.pending = self.completed = False
        self._buffers, self._fetched = None, []
        return told

    def new_modes(self) -> Modes | None:
        """Training modes and frozen parameters at the pending step, if they changed since the last call."""
        if self._flags == self._told:
            return None
        self._told = self._flags
        self.draws.steps_without = 0
        self._watch_forward()
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
        self.draws.began()
        if self._has_buffers and self._buffers is None and not self.pending:
            self._buffers = {name: b.clone() for name, b in self.model.named_buffers()}

    def _before_step(self) -> None:
        if self.pending:
            raise TrainingError(
                f"a second optimizer.step() at step {self.step} without recorder.step(indices) "
                "after the first: training went past the recorder, and cannot be explained"
            )
        if self.random and not self._fetched:
            raise TrainingError(
                f"the dataset draws at random, but the batch of step {self.step} was not fetched by "
                "recorder.fetch(indices), so replay could not draw the same; nothing was changed. Write "
                "inputs, targets = recorder.fetch(indices) in the loop"
            )
        rates = self._rates()
        free = list(map(FREE, self._parameters))
        if not all(free):
            self._check_frozen()
        self._flags = (list(map(TRAINING, self._modules)), free)
        size = self._size()
        if not math.isfinite(size):
            raise TrainingError(
                f"the gradient at step {self.step} is not finite ({size}); this step was not taken, and the trajectory "
                "is good up to its last state. Lower the learning rate, or check the inputs"
            )
        if self.norms:
            self.norm = size
        self.rates = rates
        self.pending = True

    def _rates(self) -> tuple[float, ...]:
        """Each group's learning rate; ``TrainingError`` if anything else of the groups is not as it was."""
        groups, found = self.optimizer.param_groups, []
        for group, held in zip(groups, self._groups, strict=False):
            try:
                rate, *options, parameters = held.read(group)
            except KeyError as error:
                raise TrainingError(
                    f"the optimizer's option {error} is gone by step {self.step}; leave it in"
                ) from error
            if len(parameters) != held.size:
                break
            if options != held.options:
                raise TrainingError(
                    f"the optimizer's {held.changed(options)} by step {self.step}; nothing was changed. Only learning "
                    "rates may change while recording (schedulers that cycle the momentum as well: "
                    "cycle_momentum=False)"
                )
            found.append(float(rate))
        if not len(found) == len(groups) == len(self._groups):
            raise TrainingError(
                f"the optimizer was given more parameters, or fewer, by step {self.step}; nothing was changed. Give it "
                "all parameters before record(), and free them later with requires_grad_(True)"
            )
        return tuple(found)

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


class Held(NamedTuple):
    """What a parameter group was like at the start of the recording; read again in every step at once."""

    keys: list[str]
    read: Callable[[dict[str, Any]], Any]
    """Gives the learning rate, the options of these names, and the parameters."""
    options: list[Any]
    size: int

    @classmethod
    def of(cls, group: dict[str, Any]) -> Held:
        """The group as it is now."""
        keys = [key for key in group if key not in RATES]
        read = itemgetter("lr", *keys, "params")
        return cls(keys, read, list(read(group)[1:-1]), len(group["params"]))

    def changed(self, options: list[Any]) -> str:
        """Which of these options is another, in words."""
        pairs = zip(self.keys, self.options, options, strict=True)
        return next(f"{key} changed from {before} to {now}" for key, before, now in pairs if now != before)


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
