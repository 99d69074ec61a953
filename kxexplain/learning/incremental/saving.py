"""What was learnt as one safetensors file: arrays and plain facts, so that opening it runs no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import count as counting
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kxexplain.errors import KxError, ModelError, TrajectoryError
from kxexplain.learning.incremental.growing import resume
from kxexplain.learning.incremental.held import Batch
from kxexplain.learning.incremental.intake import grown_features
from kxexplain.learning.incremental.rules import Learnt
from kxexplain.shapes import Inputs
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.batches import leaves
from kxexplain.trajectory.losses import OWN, resolve

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel

FORMAT = "kxexplain-incremental-1"
SETTINGS = ("rule", "damping", "rate", "margin", "remember", "solver", "parameters")


def save(learner: IncrementalModel, path: str | PathLike[str]) -> Path:
    """Write the file; whole or not at all."""
    target = Path(path)
    if target.is_dir():
        raise TrajectoryError(f"{target} is a folder; give the name of a file to write to")
    learnt = learner.engine.learnt()
    tensors = {f"vector.{name}": value for name, value in (learnt.vector or {}).items()}
    tensors |= {f"system.{name}": value for name, value in learnt.system.items()}
    if learnt.a is not None:
        tensors["a"] = learnt.a
    for i, row in enumerate(learner.held.rows):
        tensors |= {f"input.{i}{name}": leaf for name, leaf in leaves(row.inputs)}
        if row.targets is not None:
            tensors[f"target.{i}"] = row.targets
    rows = learner.held.rows
    facts = {
        **{name: getattr(learner.settings, name) for name in SETTINGS},
        "loss": None if learner.loss is None else resolve(learner.loss)[0],
        "regression": learner.regression,
        "ids": learner.held.ids,
        "protected": learner.held.protected,
        "chosen": learnt.damping,
        "released": learnt.released,
        "has_vector": learnt.vector is not None,
        "structure": _structure(rows[0].inputs) if rows else None,
        "growth": learner.growth,
        "next": next(learner.numbers),
        "digest": learner.origin or learner.features.digest(),
    }
    learner.numbers = counting(facts["next"])
    kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        save_file(kept, unfinished, {"format": FORMAT, "facts": json.dumps(facts)})
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{target} cannot be written: {error}; give a file in a folder that can be") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return target


def load(
    cls: type[IncrementalModel],
    path: str | PathLike[str],
    model: nn.Module | Trajectory,
    architecture: nn.Module | None,
    **own: Any,
) -> IncrementalModel:
    """Read the file, and go on from it."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{path} is not a readable file of an incremental model: {error}") from error
    if about.get("format") != FORMAT:
        raise TrajectoryError(f"{path} is no incremental model of format {FORMAT}: got {about.get('format')!r}")
    try:
        facts = json.loads(about["facts"])
        loss = own.pop("loss", None)
        if loss is None and facts["loss"] and not facts["loss"].startswith(OWN):
            loss = facts["loss"]
        settings = {name: facts[name] for name in SETTINGS}
        learner = cls(model, architecture, loss=loss, **settings, **own)
        digest = learner.features.digest()
        if digest == facts["digest"]:
            _restore(learner, facts, tensors)
    except KxError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise TrajectoryError(f"{path} is damaged ({type(error).__name__}: {error}); save it anew") from error
    if digest != facts["digest"]:
        raise ModelError(f"{path} was saved with a model of other weights; give the model it was made with, as it was")
    return learner


def _restore(learner: IncrementalModel, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    device = learner.features.like.device
    tensors = {name: t.to(device) for name, t in tensors.items()}
    rows = [_row(facts, tensors, i) for i in range(len(facts["ids"]))]
    for extra, bias in facts["growth"]:
        features = grown_features(learner.features, extra, bias, rows[0].inputs, learner.settings.parameters)
        learner.start(features)
        learner.growth.append((extra, bias))
        learner.origin = facts["digest"]
    vector = {name.removeprefix("vector."): t for name, t in tensors.items() if name.startswith("vector.")}
    system = {name.removeprefix("system."): t for name, t in tensors.items() if name.startswith("system.")}
    expected = {name: p.shape for name, p in learner.features.nothing().items()}
    if facts["has_vector"] and {name: t.shape for name, t in vector.items()} != expected:
        raise ValueError("vector of other parameters")
    kept = vector if facts["has_vector"] else None
    learnt = Learnt(facts["chosen"], kept, tensors.get("a"), facts["released"], system)
    learner.regression, learner.numbers = facts["regression"], counting(facts["next"])
    resume(learner, rows, facts["protected"], learnt)


def _row(facts: dict[str, Any], tensors: dict[str, Tensor], i: int) -> Batch:
    inputs, nothing = _inputs(facts["structure"], tensors, f"input.{i}"), torch.empty(1, 0)
    return Batch([facts["ids"][i]], inputs, tensors.get(f"target.{i}"), [], nothing, nothing, nothing)


def _structure(inputs: Inputs) -> Any:
    """How inputs are nested: a list for a tuple, an object for a dict, null for a tensor."""
    if isinstance(inputs, Tensor):
        return None
    if isinstance(inputs, Mapping):
        return {key: _structure(value) for key, value in inputs.items()}
    return [_structure(value) for value in inputs]


def _inputs(structure: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if structure is None:
        return tensors[path]
    if isinstance(structure, dict):
        return {key: _inputs(value, tensors, f"{path}.{key}") for key, value in structure.items()}
    return tuple(_inputs(value, tensors, f"{path}.{i}") for i, value in enumerate(structure))
