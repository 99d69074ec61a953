"""A recorded state in memory, its bytes, and putting it back into a model and an optimiser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kxexplain.errors import TrainingError, TrajectoryError
from kxexplain.shapes import Tensors
from kxexplain.trajectory.records import OptimizerRecord
from kxexplain.trajectory.rng import RngState


@dataclass(frozen=True)
class State:
    """Everything that the steps after number ``step`` depend on.

    ``optimizer`` has, per parameter name, the optimiser's own values (tensors, numbers or None);
    ``rates`` one learning rate per group; ``rng`` the generators' states; ``extra`` what the
    trainer adds.
    """

    step: int
    parameters: Tensors
    buffers: Tensors
    optimizer: dict[str, dict[str, Any]]
    rng: RngState
    rates: tuple[float, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def capture_state(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rng: RngState,
    buffers: Mapping[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> State:
    """The present state, sharing memory with the model; ``buffers`` replaces the model's own.

    ``TrainingError`` for moments kept as sparse tensors, which a file of states has no form for.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        if any(isinstance(v, Tensor) and v.layout is not torch.strided for v in values.values()):
            raise TrainingError(
                f"the optimizer keeps a sparse tensor for {names[id(parameter)]}, which cannot be recorded; use "
                "sparse=False, or an optimizer without momentum"
            )
    return State(
        step=step,
        parameters={name: p.detach() for name, p in model.named_parameters()},
        buffers=dict(model.named_buffers()) if buffers is None else dict(buffers),
        optimizer={names[id(p)]: dict(values) for p, values in optimizer.state.items()},
        rng=rng,
        rates=rates(optimizer),
        extra=extra or {},
    )


def finite(state: State) -> bool:
    """Whether every parameter and optimiser value is finite."""
    tensors = [*state.parameters.values(), *(v for _, _, v in _optimizer_tensors(state))]
    # a sum is quick, and finite unless a value is not, or the sum itself overflows
    return all(math.isfinite(t.sum().item()) or bool(t.isfinite().all()) for t in tensors)


def owned(state: State) -> State:
    """The state with memory of its own, so that it can be encoded while training goes on."""
    copies = lambda tensors: {name: t.detach().clone() for name, t in tensors.items()}  # noqa: E731
    moments = {
        name: {key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in values.items()}
        for name, values in state.optimizer.items()
    }
    return replace(state, parameters=copies(state.parameters), buffers=copies(state.buffers), optimizer=moments)


def encode(state: State) -> bytes:
    """The state as the bytes of a safetensors file."""
    tensors = {f"parameters/{name}": t for name, t in state.parameters.items()}
    tensors |= {f"buffers/{name}": t for name, t in state.buffers.items()}
    tensors |= {f"optimizer/{key}/{name}": t for name, key, t in _optimizer_tensors(state)}
    tensors |= {f"rng/{device}": t for device, t in state.rng.items()}
    rest = {
        "step": state.step,
        "rates": state.rates,
        "optimizer": {
            name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            for name, values in state.optimizer.items()
        },
        "extra": state.extra,
    }
    seen: set[int] = set()
    return safetensors.torch.save({k: _own(t, seen) for k, t in tensors.items()}, {"rest": json.dumps(rest)})


def decode(data: bytes) -> State:
    """Read what :func:`encode` wrote; ``TrajectoryError`` if it is anything else."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        rest = json.loads(header["__metadata__"]["rest"])
        optimizer = {str(name): dict(values) for name, values in rest["optimizer"].items()}
        step, extra = int(rest["step"]), dict(rest["extra"])
        rates = tuple(float(rate) for rate in rest["rates"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrajectoryError(f"not a recorded state: {error}") from error
    parts: dict[str, Tensors] = {"parameters": {}, "buffers": {}, "optimizer": {}, "rng": {}}
    for path, tensor in tensors.items():
        part, _, name = path.partition("/")
        if part not in parts:
            raise TrajectoryError(f"not a recorded state: it holds {path!r}")
        parts[part][name] = tensor
    for path, tensor in parts["optimizer"].items():
        key, _, name = path.partition("/")
        optimizer.setdefault(name, {})[key] = tensor
    return State(step, parts["parameters"], parts["buffers"], optimizer, parts["rng"], rates, extra)


def load_model(state: State, model: nn.Module) -> None:
    """Copy parameters and buffers into ``model``, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.parameters[name])
        for name, buffer in model.named_buffers():
            value = state.buffers[name].to(buffer.device, buffer.dtype)
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def load_optimizer(state: State, optimizer: torch.optim.Optimizer, record: OptimizerRecord) -> None:
    """Give ``optimizer`` the state's moments and rates; whatever it held before is dropped."""
    names = [name for group in record.groups for name in group.names]
    values = optimizer.state_dict()
    values["state"] = {
        position: state.optimizer[name] for position, name in enumerate(names) if name in state.optimizer
    }
    optimizer.load_state_dict(values)
    set_rates(optimizer, state.rates)


def rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The learning rate of each parameter group."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


def set_rates(optimizer: torch.optim.Optimizer, values: Sequence[float]) -> None:
    """Set the learning rate of each parameter group."""
    for group, rate in zip(optimizer.param_groups, values, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _optimizer_tensors(state: State) -> Iterator[tuple[str, str, Tensor]]:
    for name, values in state.optimizer.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                yield name, key, value


def _own(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor, contiguous, on the CPU; a copy if it shares its memory, which the format refuses."""
    here = tensor.detach().cpu().contiguous()
    whole = here.untyped_storage().nbytes() == here.nbytes
    if whole and here.data_ptr() not in seen:
        seen.add(here.data_ptr())
        return here
    return here.clone()
