"""Reading checkpoints that a training of somebody's left behind: which files, in which order, and what is in them.

A file may come from a stranger: tensors are read from it, and nothing in it is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, ModelError, TrainingError, TrajectoryError
from kxexplain.shapes import Tensors
from kxexplain.trajectory.states import State, finite

Checkpoints: TypeAlias = str | PathLike[str] | Iterable[str | PathLike[str]]
"""A folder of checkpoint files, or the files in their order."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
INSIDE = ("state_dict", "model_state_dict", "model")
"""Where a checkpoint of a whole training has the model's state."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def files(checkpoints: Checkpoints) -> list[Path]:
    """The checkpoint files in order; of a folder, by the numbers in their names: epoch_2 before epoch_10.

    Raises:
        ArgumentError: fewer than two, one given twice, or names that differ in more than numbers, so that nothing
            tells their order.
        TrajectoryError: a file is not there.
    """
    if isinstance(checkpoints, (str, PathLike)):
        found = _within(Path(checkpoints))
    else:
        try:
            found = [Path(file) for file in checkpoints]
        except TypeError as error:
            raise ArgumentError(f"checkpoints is {checkpoints!r}, expected a folder or a list of files") from error
    if len(found) < 2:
        raise ArgumentError(
            f"got {len(found)} checkpoint{'' if len(found) == 1 else 's'}; expected at least two, the first of them "
            "from before the training to be explained"
        )
    for file in found:
        if not file.is_file():
            raise TrajectoryError(f"there is no checkpoint file {file}")
    if len({file.resolve() for file in found}) < len(found):
        twice = next(file for place, file in enumerate(found) if file.resolve() in {f.resolve() for f in found[:place]})
        raise ArgumentError(f"the checkpoint {twice} is given twice; expected each once, in the order of training")
    return found


def _within(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TrajectoryError(f"{folder} is no folder; give a folder of checkpoints, or a list of files in their order")
    found = [file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
    if not found:
        raise ArgumentError(f"{folder} holds no checkpoints: no file there ends with {', '.join(SUFFIXES)}")
    kinds = {re.sub(r"\d+", "#", file.name) for file in found}
    if len(kinds) > 1 or len({tuple(_numbers(file)) for file in found}) < len(found):
        raise ArgumentError(
            f"the order of the checkpoints in {folder} cannot be told from their names, which differ in more than "
            f"numbers: {', '.join(sorted(file.name for file in found)[:4])} …; give a list of files in their order"
        )
    return sorted(found, key=_numbers)


def _numbers(file: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", file.name)]


def read(file: Path, model: nn.Module, step: int) -> State:
    """One checkpoint as state number ``step`` of this model, on the CPU.

    Raises:
        TrajectoryError: the file cannot be read as tensors.
        ModelError: it is of another model.
        TrainingError: its parameters are not finite.
    """
    values = _unwrapped(_contents(file), model)
    parameters = _matched(file, values, dict(model.named_parameters(remove_duplicate=False)), model)
    buffers = _matched(file, values, dict(model.named_buffers(remove_duplicate=False)), model)
    foreign = values.keys() - {name for name, _ in _named(model)} - model.state_dict().keys()
    if foreign:
        raise ModelError(
            f"{file} is no checkpoint of this {type(model).__name__}: it holds {min(foreign)!r}, which the model "
            "lacks; build the model as it was built for training"
        )
    state = State(step, parameters, buffers, {}, {}, rates=(0.0,))
    if not finite(state):
        raise TrainingError(f"{file} holds parameters that are not finite; leave that checkpoint out")
    return state


def _contents(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the formats' own; what they say may go on for pages
        words = (str(error).splitlines() or [""])[0][:200]
        raise TrajectoryError(
            f"{file} cannot be read as a checkpoint ({type(error).__name__}: {words}); expected a state dict of "
            "tensors, as torch.save(model.state_dict(), file) or safetensors write it; objects that need code to be "
            "read are refused"
        ) from error


def _unwrapped(values: Any, model: nn.Module) -> dict[str, Any]:
    """The model's own state out of what a file holds."""
    for key in INSIDE:
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
            break
    found = {str(name): value for name, value in values.items()} if isinstance(values, Mapping) else {}
    for wrapper in WRAPPERS:
        if (
            found
            and all(n.startswith(wrapper) for n in found)
            and not any(n.startswith(wrapper) for n, _ in _named(model))
        ):
            found = {name.removeprefix(wrapper): value for name, value in found.items()}
    return found


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _matched(file: Path, values: Mapping[str, Any], own: Mapping[str, Tensor], model: nn.Module) -> Tensors:
    """Values for the model's own tensors, each under its first name and in its type; a tied one may have any name.

    A buffer that a model does not save is taken from the model.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    saved, found = model.state_dict().keys(), {}
    for first, *others in names.values():
        tensor, given = own[first], [values[name] for name in (first, *others) if name in values]
        if not given and saved.isdisjoint((first, *others)):
            given = [tensor]
        if not given or not all(isinstance(value, Tensor) and value.shape == tensor.shape for value in given):
            problem = "lacks it" if not given else f"has {_described(given)}"
            holds = ", ".join(list(values)[:4]) or "no named tensors"
            raise ModelError(
                f"{file} is no checkpoint of this {type(model).__name__}: the model's {first!r} has shape "
                f"{tuple(tensor.shape)}, the file {problem} (it holds {holds} …); build the model as it was built for "
                "training"
            )
        if not all(torch.equal(value, given[0]) for value in given[1:]):
            raise ModelError(
                f"{file}: {first!r} and {others} are one tensor in the model, but have different values here"
            )
        found[first] = given[0].detach().to("cpu", tensor.dtype).clone()
    return found


def _described(values: list[Any]) -> str:
    return ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values)
