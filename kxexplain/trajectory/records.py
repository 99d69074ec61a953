"""The values a trajectory is made of: steps, states, and the manifest that says where they come from.

Each is immutable, and the manifest turns into JSON and back with every field's type checked, since
a trajectory may come from a stranger or from a text editor.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast

import numpy as np

from kxexplain.errors import TrajectoryError
from kxexplain.trajectory.fingerprints import Fingerprint
from kxexplain.trajectory.losses import OWN

FORMAT = "kxexplain-trajectory"
FORMAT_VERSION = 1
"""Raise it when a reader of the old version would misread the new one, and keep the old reader."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One optimiser step: step number, the batch and what the step was made of.

    ``rates`` has one learning rate per parameter group; ``indices`` are dataset indices, int64;
    ``loss`` is NaN when the loop did not tell it, ``gradient_norm`` where it was not measured (which makes no other
    step of it: two records are equal without); the gradient was multiplied by ``sign · clip``.
    """

    step: int
    epoch: int
    rates: tuple[float, ...]
    indices: np.ndarray
    loss: float
    gradient_norm: float
    sign: int = 1
    clip: float = 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepRecord) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        loss = None if math.isnan(self.loss) else self.loss
        return (self.step, self.epoch, self.rates, self.indices.tobytes(), loss, self.sign, self.clip)


@dataclass(frozen=True)
class StateRecord:
    """A recorded state: after ``step`` steps, in ``file`` under the folder's ``states``."""

    step: int
    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class GroupRecord:
    """One parameter group of the optimiser: its parameters' names and its options."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class OptimizerRecord:
    """An optimiser: the name of its class (of ``torch.optim``, unless it begins with ``OWN``), and parameter groups."""

    name: str
    groups: tuple[GroupRecord, ...]

    @property
    def own(self) -> bool:
        """Whether its class is the caller's own, which nothing on disk can give back."""
        return self.name.startswith(OWN)

    @property
    def title(self) -> str:
        """The class' name for people."""
        return self.name.removeprefix(OWN)


class TensorRecord(NamedTuple):
    """What a parameter or buffer looks like; ``dtype`` is torch's name without ``torch.``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool


@dataclass(frozen=True)
class ModelSignature:
    """What a model looks like; ``training`` names the modules in training mode ('' is the model)."""

    name: str
    parameters: tuple[TensorRecord, ...]
    buffers: tuple[TensorRecord, ...]
    training: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Where a trajectory comes from; ``settings`` is free-form (the trainer's epochs, batch size).

    ``logged`` is false for imported checkpoints: the log's rows then are the chords between them, each as one step over
    all examples, and not steps that training made.
    """

    model: ModelSignature
    dataset: Fingerprint
    optimizer: OptimizerRecord
    loss: str
    reduction: Literal["mean", "sum"]
    seed: int | None
    keep: str
    versions: dict[str, str]
    device: str
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)
    logged: bool = True
    format_version: int = FORMAT_VERSION

    @property
    def scheduled(self) -> str | None:
        """What set the rates of a run of :func:`kxexplain.train`, with a state of its own, if anything did."""
        return next((name for name in ("scheduler", "schedule") if self.settings.get(name) is not None), None)

    def to_json(self) -> str:
        """The manifest as JSON text, one field a line; ``from_json`` reads it back."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest; ``TrajectoryError`` names the first field that is missing or wrong."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TrajectoryError(f"manifest.json is not valid JSON: {error}") from error
        fields = _Fields(values, "manifest.json")
        if fields.get("format", str) != FORMAT:
            raise TrajectoryError(f"manifest.json does not describe a trajectory ({FORMAT!r})")
        version = fields.get("format_version", int)
        if version != FORMAT_VERSION:
            raise TrajectoryError(
                f"the trajectory has format {version}, this version reads {FORMAT_VERSION}; "
                "update kxexplain" + (" or record again" if version < FORMAT_VERSION else "")
            )
        reduction = fields.get("reduction", str)
        if reduction not in ("mean", "sum"):
            fields.fail("reduction", f"{reduction!r}, expected 'mean' or 'sum'")
        return cls(
            model=_signature(fields.inner("model")),
            dataset=_fingerprint(fields.inner("dataset")),
            optimizer=_optimizer(fields.inner("optimizer")),
            loss=fields.get("loss", str),
            reduction=cast(Literal["mean", "sum"], reduction),
            seed=fields.optional("seed", int),
            keep=fields.get("keep", str),
            versions=fields.table("versions", str),
            device=fields.get("device", str),
            threads=fields.get("threads", int),
            settings=fields.table("settings", object),
            logged=fields.get("logged", bool) if "logged" in fields.values else True,
            format_version=version,
        )


class _Fields:
    """A JSON object or list whose fields are asked for by type, with errors that say where they are."""

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if isinstance(values, list):
            values = dict(enumerate(values))
        if not isinstance(values, Mapping):
            raise TrajectoryError(f"{where}: expected an object, got {_kind(values)}")
        self.values: Mapping[Any, object] = values

    def fail(self, key: str | int, problem: str) -> NoReturn:
        raise TrajectoryError(f"{self.where}: field {key!r} is {problem}")

    def get(self, key: str | int, kind: type[T]) -> T:
        if key not in self.values:
            self.fail(key, "missing")
        value = self.values[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(key, f"{_kind(value)}, expected {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if key in self.values and self.values[key] is None else self.get(key, kind)

    def inner(self, key: str | int, kind: type[object] = dict) -> _Fields:
        return _Fields(self.get(key, kind), f"{self.where}: {key}")

    def table(self, key: str, kind: type[T]) -> dict[str, T]:
        inner = self.inner(key)
        return {name: inner.get(name, kind) for name in inner.values}

    def rows(self, key: str, read: Callable[[_Fields], T], kind: type[object] = dict) -> tuple[T, ...]:
        inner = self.inner(key, list)
        return tuple(read(inner.inner(i, kind)) for i in inner.values)

    def items(self, key: str | int, kind: type[T]) -> tuple[T, ...]:
        inner = self.inner(key, list)
        return tuple(inner.get(i, kind) for i in inner.values)


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _signature(fields: _Fields) -> ModelSignature:
    return ModelSignature(
        name=fields.get("name", str),
        parameters=fields.rows("parameters", _tensor, list),
        buffers=fields.rows("buffers", _tensor, list),
        training=fields.items("training", str),
    )


def _tensor(row: _Fields) -> TensorRecord:
    return TensorRecord(row.get(0, str), row.items(1, int), row.get(2, str), row.get(3, bool))


def _fingerprint(fields: _Fields) -> Fingerprint:
    random = "random" in fields.values and fields.get("random", bool)  # older manifests lack it
    return Fingerprint(fields.get("count", int), fields.get("ordered", str), fields.get("unordered", str), random)


def _optimizer(fields: _Fields) -> OptimizerRecord:
    return OptimizerRecord(fields.get("name", str), fields.rows("groups", _group))


def _group(fields: _Fields) -> GroupRecord:
    return GroupRecord(fields.items("names", str), fields.table("options", object))
