"""Redoing recorded training steps, and checking that they arrive where training arrived."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kxexplain.errors import ArgumentError, ReplayError
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import rng
from kxexplain.trajectory.batches import fetch
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.forward import PLAIN, Forward, Shares, assign, descend, forward, private_copy
from kxexplain.trajectory.log import Modes
from kxexplain.trajectory.objective import Objective
from kxexplain.trajectory.observe import gradient_norm
from kxexplain.trajectory.records import StepRecord
from kxexplain.trajectory.states import State, load_model, load_optimizer, set_rates
from kxexplain.trajectory.trajectory import Trajectory

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest drift between two recorded states, by the parameters' dtype (others: 2e-2)."""

SMALL = 1e-3
"""Tensors smaller than this part of the largest one are compared on that scale."""


@runtime_checkable
class Watch(Protocol):
    """Looks on while a step is redone."""

    def forward(self, inputs: Inputs) -> AbstractContextManager[None]:
        """Entered around the model's forward pass on these inputs."""
        ...

    def edges(self, outputs: Tensor, losses: Tensor, total: Tensor) -> Sequence[GradientEdge]:
        """Where gradients of ``total`` are wanted; called before the backward pass."""
        ...

    def collect(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradients of ``total`` at those edges, in their order."""
        ...


@dataclass(frozen=True)
class ReplayedStep:
    """A redone step: its record, outputs, losses ``(n,)`` and the reduced loss' gradients.

    ``gradients`` are those before clipping, and lack parameters without one in this step, which the optimiser leaves
    alone. ``penalty`` is what a penalty on them added.
    """

    record: StepRecord
    outputs: Tensor
    losses: Tensor
    gradients: Tensors
    penalty: Tensors


class Replayer:
    """Walks along a trajectory with a private copy of the model; a context manager.

    The caller's model, and on leaving the block the random number generators, are as before.
    ``ModelError`` or ``DatasetError`` if model or dataset are not the trajectory's.

    >>> def replayed(trajectory: Trajectory, model: nn.Module, dataset: Any) -> float:
    ...     with Replayer(trajectory, model, dataset) as replayer:
    ...         replayer.seek(0)
    ...         for _ in range(len(trajectory)):
    ...             replayer.advance()
    ...     return replayer.drift  # 0.0 on the machine that trained
    """

    def __init__(self, trajectory: Trajectory, model: nn.Module, dataset: Any) -> None:
        Trajectory.required(trajectory).check_model(model)
        trajectory.check_dataset(dataset)
        self.trajectory = trajectory
        self.dataset = dataset
        self.model = private_copy(model)
        self.optimizer = trajectory.build_optimizer(dict(self.model.named_parameters()))
        self._look_up()
        self.device = next(iter(self.parameters.values())).device
        self.position = -1
        self.drift = 0.0
        self._loss = trajectory.loss
        self._clipping = Clipping.noted(trajectory.manifest.settings)
        self.objective = Objective.noted(trajectory.manifest.settings)
        self._bare = self.objective == PLAIN
        self._shares = Shares(trajectory.manifest.reduction)
        self._recorded = {state.step for state in trajectory.states}
        self.generators: rng.RngState = {}
        """Their states at the present step's beginning."""
        self._stack = ExitStack()

    def __enter__(self) -> Replayer:
        self._stack.enter_context(rng.fork(self.device))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def seek(self, step: int) -> None:
        """Go to a recorded state: parameters, buffers, optimiser, generators and modes."""
        self._load(self.trajectory.state(step))

    def advance(self, watch: Watch | None = None, indices: Sequence[int] | None = None) -> ReplayedStep:
        """Redo the step at ``position``.

        With ``indices``, on these examples instead of the recorded batch: what would have been, which arrives at no
        recorded state. ``ReplayError`` if a state is recorded behind the step and it does not arrive there.
        """
        record = self._next_record()
        if indices is not None:
            record = replace(record, indices=np.asarray(indices, dtype=np.int64))
        self._restore(record.step)
        trained = [p for p in self._optimized if p.requires_grad]
        inputs, targets = fetch(self.dataset, record.indices, self.device)
        with torch.enable_grad():
            result = self._forward(inputs, targets, watch)
            edges = [] if watch is None else list(watch.edges(result.outputs, result.losses, result.total))
            if self._bare:  # the same to the last bit, with less to compute
                descent = descend(result.losses, trained, edges=edges, weights=self._shares.of(result.losses))
            else:
                descent = descend(result.total, trained, self.objective, edges)
        if watch is not None:
            watch.collect(descent.edges)
        factor = record.sign * record.clip
        for parameter in self._optimized:  # also those frozen since the last step
            parameter.grad = None
        assign(trained, self._clipping.applied(descent.found, factor))
        set_rates(self.optimizer, record.rates)
        self._take_step()
        self.generators = rng.capture(self.device)
        self.position += 1
        if self.position in self._recorded and indices is None:
            self._arrive()
        named, penalty = (
            {self._names[id(p)]: _whole(g) for p, g in zip(trained, part, strict=True) if g is not None}
            for part in (descent.examples, descent.penalty)
        )
        return ReplayedStep(record, result.outputs.detach(), result.losses.detach(), named, penalty)

    def twin(self) -> Replayer:
        """Another replayer at the same position, which can run ahead without moving this one."""
        twin = copy.copy(self)
        twin.model = private_copy(self.model)
        twin.optimizer = self.trajectory.build_optimizer(dict(twin.model.named_parameters()))
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin._look_up()
        return twin

    def copy_state(self) -> Tensors:
        """Detached copies of all parameters and floating-point buffers, by name."""
        return {name: value.clone() for name, value in self._values().items()}

    def _values(self) -> Tensors:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}

    def _look_up(self) -> None:
        """The parameters of this replayer's model and optimiser, which every step asks for."""
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._take_step = unprofiled(self.optimizer)
        self._optimized = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _next_record(self) -> StepRecord:
        if self.position < 0:
            raise ArgumentError("call seek(step) with a recorded state before advance()")
        if self.position >= len(self.trajectory):
            raise ArgumentError(f"the trajectory ends after step {self.position}")
        return self.trajectory.steps[self.position]

    def _restore(self, step: int) -> None:
        """Modes and generators as they were when this step of training began."""
        if step in self.trajectory.modes:
            _set_modes(self.model, self.trajectory.modes[step])
        if step in self.trajectory.rng_steps:
            self.generators = self.trajectory.rng(step)
        rng.restore(self.generators, self.device)

    def _forward(self, inputs: Any, targets: Tensor, watch: Watch | None) -> Forward:
        return forward(
            self.model,
            inputs,
            targets,
            loss=self._loss,
            reduction=None if self._bare and watch is None else self.trajectory.manifest.reduction,
            objective=self.objective,
            around=None if watch is None else watch.forward(inputs),
        )

    def _load(self, state: State) -> None:
        load_model(state, self.model)
        load_optimizer(state, self.optimizer, self.trajectory.manifest.optimizer)
        self.generators = state.rng
        modes = self.trajectory.modes
        _set_modes(self.model, modes[max(step for step in modes if step <= max(state.step, 0))])
        self.position = state.step

    def _arrive(self) -> None:
        """Compare with the recorded state, then go on from that one."""
        state = self.trajectory.state(self.position)
        name, drift = _drift(self._values(), {**state.parameters, **state.buffers})
        self.drift = max(self.drift, drift)
        tolerance = TOLERANCE.get(next(iter(self.parameters.values())).dtype, 2e-2)
        if not drift <= tolerance:
            raise ReplayError(
                f"replaying to step {self.position} ended {drift:.1e} (relative) away from the "
                f"recorded state, in {name!r}; at most {tolerance:.0e} is rounding. Likely causes: "
                "the dataset's order or values changed, dropout or augmentation drawn from another generator "
                "than torch's global one, another number of threads or another machine, another thread that drew "
                "random numbers meanwhile (one at a time may replay), gradients zeroed in place (use "
                "zero_grad(set_to_none=True)) of parameters that a step does not use, or gradients "
                "clipped or changed without telling the recorder (by norm: recorder.step(clip=factor); by value: "
                "record(clip_value=...)); recording more states shortens replay"
            )
        self._load(state)


def gradient_norms(trajectory: Trajectory, model: nn.Module, dataset: Any) -> list[float]:
    """The norm of the gradient that the optimiser was given in every step (after clipping), found by replay.

    What :attr:`StepRecord.gradient_norm` is of a run recorded with ``norms=True``, to the last bit where replay is.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples.
        ReplayError: the log does not lead to the recorded states.
        ArgumentError: imported checkpoints, between which no step is known.

    >>> import tempfile, kxexplain as kx
    >>> data, model = kx.datasets.toy(20), nn.Linear(2, 2)
    >>> trajectory = kx.train(model, data.train, epochs=2, out=tempfile.mkdtemp(), norms=True)
    >>> gradient_norms(trajectory, model, data.train) == [step.gradient_norm for step in trajectory.steps]
    True
    """
    if not Trajectory.required(trajectory).manifest.logged:
        raise ArgumentError(f"{trajectory.path} was made of checkpoints: the steps between them are not known")
    norms = []
    with Replayer(trajectory, model, dataset) as replayer:
        replayer.seek(0)
        for _ in range(len(trajectory)):
            replayer.advance()
            norms.append(gradient_norm([p.grad for p in replayer._optimized if p.grad is not None]))
    return norms


def _whole(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def unprofiled(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The optimiser's step without what torch wraps around it for profiling and hooks, if it has no hooks."""
    step: Any = type(optimizer).step
    if "step" in vars(optimizer) or not (getattr(step, "hooked", False) and hasattr(step, "__wrapped__")):
        return optimizer.step
    own, everyones = vars(optimizer), step.__globals__
    hooks = [own.get(f"_optimizer_step_{when}_hooks") for when in ("pre", "post")]
    hooks += [everyones.get(f"_global_optimizer_{when}_hooks") for when in ("pre", "post")]
    if any(found is None or len(found) for found in hooks):  # or this version of torch keeps them elsewhere
        return optimizer.step
    return partial(step.__wrapped__, optimizer)


def _set_modes(model: nn.Module, modes: Modes) -> None:
    training, frozen = set(modes.training), set(modes.frozen)
    for name, module in model.named_modules():
        module.training = name in training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _drift(ours: Tensors, recorded: Tensors) -> tuple[str, float]:
    """The tensor that differs most, and by how much: max |a − b| / scale, per tensor.

    The scale is a tensor's largest recorded value, but at least ``SMALL`` times the largest of all:
    rounding in a tensor that is almost zero comes from its larger neighbours.
    """
    if all(torch.equal(tensor.cpu(), recorded[name]) for name, tensor in ours.items()):
        return "", 0.0
    scales = {k: float(recorded[k].abs().max()) if recorded[k].numel() else 0.0 for k in ours}
    floor = SMALL * max(scales.values())
    worst, drift = "", 0.0
    for name, tensor in ours.items():
        if tensor.numel() == 0:
            continue
        gap = float((tensor.cpu() - recorded[name]).abs().max())
        relative = gap / (max(scales[name], floor) or 1.0)
        if not relative <= drift:
            worst, drift = name, relative
    return worst, drift
