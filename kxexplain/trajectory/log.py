"""Reading a step log that anybody may have written: every value's type is checked."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from kxexplain.errors import TrajectoryError
from kxexplain.trajectory.records import StateRecord, StepRecord
from kxexplain.trajectory.rng import RngState
from kxexplain.trajectory.store import LOG, MANIFEST, STEPS_DIGEST, digest_of, state_file, storage

BLOCK = 1024
"""Steps read, and cached, at once."""


class Modes(NamedTuple):
    """Names of the modules in training mode and of frozen parameters."""

    training: tuple[str, ...]
    frozen: tuple[str, ...]


class Reader:
    """The step log of a folder; connections are short-lived, so nothing is held open."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self.manifest = folder / MANIFEST
        if not self.path.is_file():
            raise TrajectoryError(f"{self.path} is missing; the trajectory is incomplete")

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of one query; ``TrajectoryError`` if the file is damaged."""
        with storage(self.path), self._connect() as log:
            return log.execute(query, values).fetchall()

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=30)) as log:
            log.execute("PRAGMA trusted_schema=OFF")
            yield log

    def count(self) -> int:
        """Number of steps logged; ``TrajectoryError`` if any between them is missing."""
        rows = self.rows("SELECT COUNT(*), MIN(step), MAX(step) FROM steps")
        total, first, last = rows[0]
        if total and (first, last) != (0, total - 1):
            raise TrajectoryError(f"{self.path} lacks steps: {total} rows for {first} to {last}")
        return int(total)

    def states(self) -> tuple[StateRecord, ...]:
        """The recorded states by step."""
        rows = self.rows("SELECT step, sha256, bytes FROM states ORDER BY step")
        for step, sha256, size in rows:
            if not (_is_count(step) and _is_count(size) and isinstance(sha256, str)):
                raise TrajectoryError(f"{self.path} describes a state wrongly: step {step!r}")
        return tuple(StateRecord(s, state_file(s), sha256, size) for s, sha256, size in rows)

    def steps(self, start: int, stop: int) -> list[StepRecord]:
        """The steps from ``start`` to before ``stop``."""
        query = "SELECT * FROM steps WHERE step >= ? AND step < ? ORDER BY step"
        return [self._step(row) for row in self.rows(query, start, stop)]

    def _step(self, row: tuple[Any, ...]) -> StepRecord:
        try:
            step, epoch, rates, indices, loss, norm, sign, clip = row
            return StepRecord(
                step=int(step),
                epoch=int(epoch),
                rates=tuple(np.frombuffer(rates, "<f8").tolist()),
                indices=np.frombuffer(indices, "<i8").astype(np.int64),
                loss=float("nan") if loss is None else float(loss),
                gradient_norm=float("nan") if norm is None else float(norm),
                sign=int(sign),
                clip=float(clip),
            )
        except (TypeError, ValueError) as error:
            raise TrajectoryError(f"{self.path}: step {row[0]!r} is damaged: {error}") from error

    def modes(self) -> dict[int, Modes]:
        """The steps at which modules changed their mode or parameters were (un)frozen."""
        rows = self.rows("SELECT step, training, frozen FROM modes")
        return {step: Modes(self._names(training), self._names(frozen)) for step, training, frozen in rows}

    def _names(self, text: object) -> tuple[str, ...]:
        try:
            names = json.loads(str(text))
        except ValueError as error:
            raise TrajectoryError(f"{self.path}: table modes is damaged: {error}") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TrajectoryError(f"{self.path}: table modes is damaged")
        return tuple(names)

    def rng_steps(self) -> frozenset[int]:
        """The steps that began with another generator state than the one before ended with."""
        return frozenset(step for (step,) in self.rows("SELECT DISTINCT step FROM rng"))

    def rng(self, step: int) -> RngState:
        """The generator states with which a step of :meth:`rng_steps` began."""
        return {
            str(device): torch.frombuffer(bytearray(state), dtype=torch.uint8)
            for device, state in self.rows("SELECT device, state FROM rng WHERE step = ?", step)
        }

    def fact(self, key: str) -> str | None:
        """A value of the table ``facts``."""
        rows = self.rows("SELECT value FROM facts WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def check_manifest(self, text: bytes) -> None:
        """``TrajectoryError`` if the manifest is not the one that was written here."""
        if self.fact(f"manifest:{hashlib.sha256(text).hexdigest()}") is None:
            raise TrajectoryError(
                f"{self.manifest} was altered after it was written; restore it from a copy, or record again"
            )

    def check(self) -> None:
        """The database's own integrity check, and the checksum of all steps."""
        problem = self.rows("PRAGMA integrity_check")[0][0]
        if problem != "ok":
            raise TrajectoryError(f"{self.path} is damaged: {problem}")
        expected = self.rows("PRAGMA page_count")[0][0] * self.rows("PRAGMA page_size")[0][0]
        live = self.path.with_name(f"{LOG}-wal").exists()  # then some pages are there, not here
        if self.path.stat().st_size < expected and not live:
            raise TrajectoryError(f"{self.path} is truncated: it should have {expected} bytes")
        with storage(self.path), self._connect() as log:
            log.execute("BEGIN")  # both from the same moment, while training may go on
            digest = digest_of(log, self.path)
            recorded = log.execute("SELECT value FROM facts WHERE key = ?", (STEPS_DIGEST,)).fetchone()
        if (recorded or (hashlib.sha256().hexdigest(),))[0] != digest.hexdigest():
            raise TrajectoryError(f"{self.path} was altered: its steps do not have their checksum")


class Steps(Sequence[StepRecord]):
    """The step records, read when asked for and cached in blocks."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader = reader
        self._count = count
        self._blocks: dict[int, list[StepRecord]] = {}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        position = index + self._count if index < 0 else index
        if not 0 <= position < self._count:
            raise IndexError(f"step {index} of a trajectory of {self._count} steps")
        return self._block(position // BLOCK)[position % BLOCK]

    def _block(self, number: int) -> list[StepRecord]:
        if number not in self._blocks:
            start = number * BLOCK
            stop = min(start + BLOCK, self._count)
            steps = self._reader.steps(start, stop)
            if [step.step for step in steps] != list(range(start, stop)):
                raise TrajectoryError(f"{self._reader.path} lacks steps of {start} to {stop}")
            self._blocks[number] = steps
        return self._blocks[number]

    def __repr__(self) -> str:
        return f"<{self._count} steps of {self._reader.path.parent}>"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0
