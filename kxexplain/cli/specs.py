"""Models and data by name: built-in ones, or ``package.module:function`` of the user's own.

What a run was trained with is remembered in ``run.json`` beside its trajectory, so that later commands can build it
again. That file may come from a stranger, and calling a function it names would run code of the stranger's choice;
it therefore carries a seal made with a key that never leaves the user's own configuration folder, and functions are
called from it only where the seal fits. Otherwise they have to be named on the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from kxexplain import datasets
from kxexplain.errors import ArgumentError, DatasetError, ModelError, TrajectoryError
from kxexplain.trajectory import Trajectory, count, fetch
from kxexplain.trajectory.states import load_model

RUN = "run.json"
DEFAULT_MODEL, DEFAULT_DATA = "mlp-64-32", "digits"


@dataclass(frozen=True)
class Specs:
    """What a run's model and data are called."""

    model: str
    data: str


@dataclass(frozen=True)
class NamedData:
    """Training and test examples with what is known about them; ``test`` is ``train`` where there is only one set."""

    train: Any
    test: Any
    classes: Sequence[str] | None = None
    image_shape: tuple[int, int, int] | None = None

    @property
    def looks(self) -> dict[str, Any]:
        """Options for the pictures."""
        return {"classes": self.classes, "image_shape": self.image_shape}


def build_data(spec: str) -> NamedData:
    """A built-in data set by name, or what a function gives: a dataset, (train, test), or a ``datasets.Split``.

    Raises:
        ArgumentError: no such data set.
        DatasetError: the function gives something else.
    """
    made = _call(spec, "--data") if ":" in spec else datasets.load(spec)
    if isinstance(made, datasets.Split):
        return NamedData(made.train, made.test, made.classes, made.image_shape)
    pair = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, made)
    for part in pair:
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise DatasetError(
                f"{spec} gave a {type(part).__name__}; expected a dataset, a pair (train, test), or a datasets.Split"
            )
    return NamedData(*pair)


def build_model(spec: str, data: NamedData, seed: int = 0) -> nn.Module:
    """``mlp-64-32`` (a ReLU network with those hidden widths), or what a function gives; initialised from the seed.

    Raises:
        ArgumentError: no such model.
        ModelError: the function gives no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" not in spec:
            return _mlp(spec, data)
        model = _call(spec, "--model")
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _mlp(spec: str, data: NamedData) -> nn.Module:
    kind, *widths = spec.split("-")
    if kind != "mlp" or not widths or not all(w.isdecimal() and int(w) > 0 for w in widths):
        raise ArgumentError(
            f"there is no model {spec!r}; give mlp-64-32 (any hidden widths) or package.module:function"
        )
    inputs, targets = fetch(data.train, range(len(data.train)))
    if not isinstance(inputs, torch.Tensor) or targets.dim() != 1 or not inputs.is_floating_point():
        raise ModelError(f"{spec} takes one tensor of floats an example; give a model of your own with --model")
    outputs = 1 if targets.is_floating_point() else max(len(data.classes or ()), int(targets.max()) + 1)
    sizes = [inputs.numel() // count(inputs), *map(int, widths)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def _call(spec: str, option: str) -> Any:
    """Import ``package.module:function``, with the present folder importable, and call it."""
    module, _, function = spec.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        raise typer.BadParameter(f"{spec!r}: expected package.module:function", param_hint=option)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{spec!r}: {error} (looked in {here} too)", param_hint=option) from error
    except AttributeError as error:
        raise typer.BadParameter(f"{spec!r}: {error}", param_hint=option) from error
    except Exception as error:
        raise ArgumentError(f"{option} {spec}: importing it failed: {type(error).__name__}: {error}") from error
    try:
        return found()
    except Exception as error:
        raise ArgumentError(f"{option} {spec}: calling it failed: {type(error).__name__}: {error}") from error


def remember(run: Path, specs: Specs) -> None:
    """Write ``run.json`` into a trajectory's folder."""
    values = {"model": specs.model, "data": specs.data, "seal": _seal(specs)}
    (run / RUN).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def recall(run: Path) -> tuple[Specs | None, bool]:
    """What ``run.json`` says, if anything, and whether functions that it names may be called."""
    try:
        values = json.loads((run / RUN).read_text(encoding="utf-8"))
        specs, seal = Specs(str(values["model"]), str(values["data"])), str(values.get("seal", ""))
    except FileNotFoundError:
        return None, False
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise TrajectoryError(
            f"{run / RUN} cannot be read: {error!r}; delete it and give --model and --data"
        ) from error
    own = _seal(specs)
    return specs, own is not None and hmac.compare_digest(own.encode(), seal.encode())


def resolve(run: Path, model: str | None, data: str | None) -> Specs:
    """The options where given, else what the run remembers.

    Raises:
        ArgumentError: neither says it, or it names code that was not sealed by this user.
    """
    specs, sealed = (None, False) if model and data else recall(run)
    wanted = Specs(model or (specs.model if specs else ""), data or (specs.data if specs else ""))
    if not wanted.model or not wanted.data:
        raise ArgumentError(f"{run} has no {RUN} that says what it was trained with; give --model and --data")
    foreign = [
        f"--{name} {spec}"
        for name, given, spec in (("model", model, wanted.model), ("data", data, wanted.data))
        if ":" in spec and not given and not sealed
    ]
    if foreign:
        raise ArgumentError(
            f"{run / RUN} names code to call and was not written by you on this machine; if you trust that code, "
            f"say so: {' '.join(foreign)}"
        )
    return wanted


def _seal(specs: Specs) -> str | None:
    """A keyed hash of the names; None where they name no code, or no key can be kept."""
    if ":" not in specs.model + specs.data:
        return None
    path = Path(typer.get_app_dir("kxexplain")) / "run-key"
    with contextlib.suppress(OSError):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(secrets.token_bytes(32))
        key = path.read_bytes()
        if len(key) >= 32:
            return hmac.new(key, json.dumps([specs.model, specs.data]).encode(), hashlib.sha256).hexdigest()
    return None


@dataclass(frozen=True)
class OpenRun:
    """A recorded training with its model's code and its data."""

    trajectory: Trajectory
    model: nn.Module
    data: NamedData
    specs: Specs

    @classmethod
    def open(cls, path: Path, model: str | None, data: str | None) -> OpenRun:
        """Open a trajectory and build what it was trained with."""
        trajectory = Trajectory.open(path)
        specs = resolve(path, model, data)
        built = build_data(specs.data)
        return cls(trajectory, build_model(specs.model, built), built, specs)

    def trained(self) -> nn.Module:
        """The model, with the last recorded state's parameters and buffers."""
        self.trajectory.check_model(self.model)
        load_model(self.trajectory.state(self.trajectory.states[-1].step), self.model)
        return self.model.eval()
