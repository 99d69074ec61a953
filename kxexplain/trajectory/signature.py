"""Descriptions of models and optimisers, comparing them, and building an optimiser from one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kxexplain.errors import ArgumentError, ModelError
from kxexplain.trajectory.losses import OWN
from kxexplain.trajectory.records import (
    GroupRecord,
    ModelSignature,
    OptimizerRecord,
    TensorRecord,
)

MakeOptimizer: TypeAlias = Callable[..., torch.optim.Optimizer]
"""An optimiser's class, or a function that makes one: (parameter groups with all their options) -> optimiser."""


def describe_model(model: Any) -> ModelSignature:
    """Names, shapes and dtypes of a model's parameters and buffers; tied ones appear once.

    ``ModelError`` if it has nothing to train or parameters without a shape yet.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ModelError(f"got {got} as model, expected a torch.nn.Module; build it and pass the object")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ModelError(f"parameter {lazy[0]!r} has no shape yet; call the model once first")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameters; set requires_grad=True on those "
            "that training may change"
        )
    return ModelSignature(
        name=type(model).__qualname__,
        parameters=_describe(model.named_parameters()),
        buffers=_describe(model.named_buffers()),
        training=tuple(name for name, module in model.named_modules() if module.training),
    )


def compare_models(expected: ModelSignature, model: nn.Module) -> None:
    """``ModelError`` naming the first parameter or buffer in which ``model`` differs."""
    got = describe_model(model)
    for kind, ours, theirs in (
        ("parameter", expected.parameters, got.parameters),
        ("buffer", expected.buffers, got.buffers),
    ):
        by_name = {tensor.name: tensor for tensor in theirs}
        for tensor in ours:
            problem = _difference(tensor, by_name.pop(tensor.name, None))
            if problem:
                raise ModelError(
                    f"this {got.name} is not the model of the trajectory ({expected.name}): "
                    f"{kind} {tensor.name!r} {problem}; build it as it was built for training"
                )
        if by_name:
            raise ModelError(
                f"this {got.name} is not the model of the trajectory ({expected.name}): {kind} "
                f"{next(iter(by_name))!r} was not there in training"
            )


def describe_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerRecord:
    """Class name, and per group the parameters' names and the options as JSON-able values.

    ``ArgumentError`` if its steps cannot be replayed (they need a closure, or a class of the caller's own cannot be
    built again from the groups), or it holds parameters that are not the model's.
    """
    kind = type(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) or _required(kind.step)[1:]:  # without self
        raise ArgumentError(
            f"steps of {kind.__module__}.{kind.__qualname__} cannot be replayed; use an optimizer "
            "whose step() takes no closure (SGD, AdamW, …)"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if unknown:
            raise ArgumentError(
                f"the optimizer holds a parameter of shape {unknown[0]} that is not the model's; "
                "build it from model.parameters(), after any copying of the model"
            )
        members = tuple(names[id(p)] for p in group["params"])
        _check_precise(group)
        groups.append(GroupRecord(members, group_options(group)))
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError("the optimizer holds no trainable parameter of the model")
    own = own_class(optimizer)
    record = OptimizerRecord(kind.__name__ if own is None else OWN + kind.__qualname__, tuple(groups))
    build_optimizer(record, dict(model.named_parameters()), own)
    return record


def _check_precise(group: Mapping[str, Any]) -> None:
    """``ArgumentError`` for options that torch rounds to fewer digits than the parameters have."""
    for key, value in group.items():
        narrow = isinstance(value, Tensor) and value.dtype == torch.float32
        if narrow and any(p.dtype == torch.float64 for p in group["params"]):
            raise ArgumentError(
                f"the optimizer's {key} is a float32 tensor, but its parameters are float64: what it computes cannot "
                f"be repeated from numbers; give {key}={float(value):g}, or a float64 tensor"
            )


def own_class(optimizer: torch.optim.Optimizer) -> MakeOptimizer | None:
    """The optimiser's class, if it is none of ``torch.optim``: then nothing on disk can give it back."""
    kind = type(optimizer)
    return None if getattr(torch.optim, kind.__name__, None) is kind else kind


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's options as JSON would give them back; ``ArgumentError`` if it cannot."""
    options = {key: value for key, value in group.items() if key != "params"}
    try:
        text = json.dumps(options, default=_plain)
    except TypeError as error:
        raise ArgumentError(f"optimizer option cannot be recorded: {error}; use numbers, strings or tuples") from error
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def build_optimizer(
    record: OptimizerRecord, parameters: Mapping[str, nn.Parameter], own: MakeOptimizer | None = None
) -> torch.optim.Optimizer:
    """A fresh optimiser as described, over the given parameters; ``own`` makes one whose class is the caller's own.

    A folder never says which code to run: a class is looked up in ``torch.optim``, or has to be given.
    """
    kind = own if record.own else getattr(torch.optim, record.name, None)
    if kind is None and record.own:
        raise ArgumentError(
            f"this trajectory was trained with an optimizer of its own, {record.title!r}; pass that class: "
            "Trajectory.open(path, optimizer=...)"
        )
    known = record.own or (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
    if not callable(kind) or not known:
        raise ArgumentError(f"torch {torch.__version__} has no optimizer {record.name!r}")
    groups: list[dict[str, Any]] = []
    for group in record.groups:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in group.options.items()}
        groups.append({"params": [parameters[name] for name in group.names], **options})
    if not record.own:
        return kind(groups)
    first = {key: value for key, value in groups[0].items() if key != "params"}
    try:  # an argument that must be given is looked up among the options, where an optimiser keeps its defaults
        built = kind(groups, **{name: first[name] for name in _required(kind)[1:]})
    except Exception as error:
        raise ArgumentError(
            f"the optimizer {record.title!r} cannot be built from its parameter groups ({type(error).__name__}: "
            f"{error}); give each argument that its constructor needs a default, or a place in the groups' options"
        ) from error
    if not isinstance(built, torch.optim.Optimizer) or OWN + type(built).__qualname__ != record.name:
        raise ArgumentError(
            f"optimizer= made a {type(built).__qualname__}, but this trajectory was trained with {record.title!r}; "
            "pass that class, or a function that makes one from parameter groups"
        )
    return built


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a call must give by position or name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # one that does not say
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r}")


def _describe(tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad) for name, t in tensors
    )


def _difference(expected: TensorRecord, got: TensorRecord | None) -> str | None:
    if got is None:
        return "is missing"
    if got.shape != expected.shape:
        return f"has shape {got.shape}, expected {expected.shape}"
    if got.dtype != expected.dtype:
        return f"has dtype {got.dtype}, expected {expected.dtype}"
    return None
