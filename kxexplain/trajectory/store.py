"""A trajectory's bytes on disk: ``manifest.json``, ``steps.sqlite`` and ``states/<step>.safetensors``.

Every file is replaced as a whole or appended to in transactions, so that a process killed at any
moment leaves a folder that opens. No object is stored that would run code, and file names come from step numbers alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeAlias

from kxexplain.errors import ArgumentError, TrajectoryError
from kxexplain.trajectory.records import StateRecord
from kxexplain.trajectory.rng import RngState

MANIFEST, LOG, STATES = "manifest.json", "steps.sqlite", "states"
FLUSH_ROWS, FLUSH_EXAMPLES, FLUSH_SECONDS = 256, 1 << 15, 0.5

SCHEMA = """
CREATE TABLE steps (step INTEGER PRIMARY KEY, epoch INTEGER, rates BLOB, indices BLOB, loss REAL,
                    gradient_norm REAL, sign INTEGER, clip REAL);
CREATE TABLE states (step INTEGER PRIMARY KEY, sha256 TEXT, bytes INTEGER, kept INTEGER);
CREATE TABLE rng (step INTEGER, device TEXT, state BLOB, PRIMARY KEY (step, device));
CREATE TABLE modes (step INTEGER PRIMARY KEY, training TEXT, frozen TEXT);
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT);
"""
"""``rng``: generator states where a step did not go on from the one before it. ``modes``: names of
modules in training mode and of frozen parameters, from a step on. ``facts``: checksums of the
manifest ("manifest:<sha256>") and of the rows of ``steps`` ("steps"), and the stride of a byte
budget ("stride")."""


NUMBERS = struct.Struct("<4q2dqd")
"""A row's numbers, and the lengths of what else it has."""

SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?,?)"
STEPS_DIGEST = "steps"


def row_bytes(row: tuple[Any, ...]) -> bytes:
    """A row of the table ``steps`` as the bytes that its checksum is of."""
    step, epoch, rates, indices, loss, norm, sign, clip = row
    loss, norm = math.nan if loss is None else loss, math.nan if norm is None else norm
    packed: bytes = NUMBERS.pack(step, epoch, len(rates), len(indices), loss, norm, sign, clip) + rates + indices
    return packed


def digest_of(log: sqlite3.Connection, path: Path) -> Any:
    """The checksum of all steps in the log, to go on with; ``TrajectoryError`` if one of them can be no step."""
    digest = hashlib.sha256()
    for row in log.execute("SELECT * FROM steps ORDER BY step"):
        try:
            digest.update(row_bytes(row))
        except (struct.error, TypeError, ValueError) as error:
            raise TrajectoryError(f"{path}: step {row[0]!r} is damaged: {error}") from error
    return digest


def state_file(step: int) -> str:
    """A state's file name below ``states``."""
    return f"{step:08d}.safetensors"


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the errors of files and databases into ``TrajectoryError`` that names the file."""
    try:
        yield
    except TrajectoryError:
        raise
    except FileNotFoundError as error:
        raise TrajectoryError(f"{path} is missing; the trajectory is incomplete") from error
    except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
        raise TrajectoryError(f"{path} cannot be read or written: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to the disk, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    with storage(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_trajectory(path: Path) -> bool:
    """Whether the folder holds a manifest of this library (whatever else is in it)."""
    try:
        return '"kxexplain-trajectory"' in (path / MANIFEST).read_text("utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        return False


def folder(out: Any) -> Path:
    """``out`` as a path; ``ArgumentError`` if it is none.

    >>> folder("runs/one").name
    'one'
    """
    try:
        path = Path(out)
    except TypeError as error:
        raise ArgumentError(f"out is {out!r}, expected the path of a folder, like 'runs/first'") from error
    if "\0" in str(path):
        raise ArgumentError(f"out is {out!r}, but a path cannot hold a null character; give one like 'runs/first'")
    return path


def check_free(path: Path, *, overwrite: bool) -> None:
    """``TrajectoryError`` unless ``path`` can take a new trajectory; nothing is changed."""
    with storage(path):
        if path.exists() and not path.is_dir():
            raise TrajectoryError(f"{path} is a file; give a folder for the trajectory")
        if path.is_dir() and any(path.iterdir()) and not (overwrite and is_trajectory(path)):
            what = "a trajectory" if is_trajectory(path) else "files that are no trajectory"
            hint = "overwrite=True" if is_trajectory(path) and not overwrite else "a new folder"
            raise TrajectoryError(f"{path} already holds {what}; give {hint}")


def prepare(path: Path, *, overwrite: bool) -> None:
    """Make the folder ``path`` ready for a new trajectory; with ``overwrite`` clear an old one.

    Only files that belong to a trajectory are removed. ``TrajectoryError`` if the folder has other
    contents, or cannot be written.
    """
    check_free(path, overwrite=overwrite)
    with storage(path):
        if path.is_dir():
            _clear(path)
        try:
            (path / STATES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrajectoryError(f"the folder {path} cannot be made: {error}; give one that can be written") from error


def _clear(path: Path) -> None:
    for pattern in (f"{LOG}*", f"{STATES}/*.safetensors", f"{STATES}/*.tmp", f"{MANIFEST}*"):
        for file in path.glob(pattern):
            file.unlink()


Row: TypeAlias = tuple[int, int, tuple[float, ...], list[int], float, float, int, float]
"""A step about to be logged: the fields of a ``StepRecord`` in their order."""

Columns: TypeAlias = tuple[int, int, bytes, bytes, float | None, float | None, int, float]
"""The columns of the table ``steps``."""


def columns(row: Row) -> Columns:
    """A step as the log holds it: smaller, so that rows waiting to be written leave the caches to the training."""
    step, epoch, rates, indices, loss, norm, sign, clip = row
    return (
        step,
        epoch,
        struct.pack(f"<{len(rates)}d", *rates),
        struct.pack(f"<{len(indices)}q", *indices),
        None if math.isnan(loss) else loss,
        None if math.isnan(norm) else norm,
        sign,
        float(clip),
    )


class Writer:
    """Appends to a trajectory. Rows are gathered and written every half second, 256 steps, or 32,768 examples.

    A state's file is written beside training, in a thread; its row, which makes it part of the trajectory, follows
    when the file is safely on the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: dict[int, StateRecord] = {}
        self.kept: set[int] = set()
        self._rows: list[Columns] = []
        self._gathered = 0  # examples in these rows
        self._side: list[tuple[str, tuple[Any, ...]]] = []
        self._flushed = time.monotonic()
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "kxexplain-states")
        self._writing: tuple[Future[StateRecord], bool] | None = None
        with storage(path / LOG):
            self._log = sqlite3.connect(path / LOG, isolation_level=None, timeout=30)
            self._log.execute("PRAGMA journal_mode=WAL")
            self._log.execute("PRAGMA synchronous=NORMAL")

    @classmethod
    def create(cls, path: Path, manifest: str) -> Writer:
        """Start a trajectory in a prepared folder."""
        write_atomically(path / MANIFEST, manifest.encode())
        writer = cls(path)
        with storage(path / LOG):
            writer._log.executescript(f"BEGIN; {SCHEMA} COMMIT;")
        writer.set_fact(_manifest_key(manifest.encode()), "")
        return writer

    @classmethod
    def reopen(cls, path: Path, states: Sequence[StateRecord], last: int) -> Writer:
        """Go on after step ``last``: whatever was logged later is dropped."""
        writer = cls(path)
        with storage(path / LOG), writer._transaction():
            for table in ("steps", "rng", "modes"):
                writer._log.execute(f"DELETE FROM {table} WHERE step >= ?", (last,))
            rows = writer._log.execute("SELECT step FROM states WHERE kept").fetchall()
            writer._digest = digest_of(writer._log, path / LOG)
            writer._log.execute(SET_FACT, (STEPS_DIGEST, writer._digest.hexdigest()))
        writer.states = {state.step: state for state in states}
        writer.kept = {int(step) for (step,) in rows}
        known = {state.file for state in states}
        for file in (path / STATES).glob("*.safetensors"):  # written, but killed before its row
            if file.name not in known:
                file.unlink()
        return writer

    def replace_manifest(self, manifest: str) -> None:
        """Write another manifest; both its checksum and the old one's are accepted."""
        self.set_fact(_manifest_key(manifest.encode()), "")
        write_atomically(self.path / MANIFEST, manifest.encode())

    def append(
        self,
        row: Row,
        *,
        modes: tuple[Sequence[str], Sequence[str]] | None = None,
        rng: RngState | None = None,
    ) -> None:
        """Log a step; ``modes`` (training, frozen) where they differ from before.

        ``rng`` are the generator states with which it began, where it did not go on from the step before.
        """
        self._rows.append(columns(row))
        self._gathered += len(row[3])
        for device, state in (rng or {}).items():
            self._side.append(("INSERT INTO rng VALUES (?,?,?)", (row[0], device, state.numpy().tobytes())))
        if modes is not None:
            values = (row[0], json.dumps(list(modes[0])), json.dumps(list(modes[1])))
            self._side.append(("INSERT INTO modes VALUES (?,?,?)", values))
        many = len(self._rows) >= FLUSH_ROWS or self._gathered > FLUSH_EXAMPLES
        if many or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows gathered so far, in one transaction, and the row of a state whose file is there."""
        self._flushed = time.monotonic()
        if self._writing is not None and self._writing[0].done():
            self.settle()
        if not self._rows and not self._side:
            return
        digest = self._digest.copy()  # a transaction that is rolled back must leave no trace
        with storage(self.path / LOG), self._transaction():
            digest.update(b"".join(map(row_bytes, self._rows)))
            self._log.executemany("INSERT INTO steps VALUES (?,?,?,?,?,?,?,?)", self._rows)
            self._log.execute(SET_FACT, (STEPS_DIGEST, digest.hexdigest()))
            for statement, values in self._side:
                self._log.execute(statement, values)
        self._digest, self._rows, self._side, self._gathered = digest, [], [], 0

    def put_state(self, step: int, encode: Callable[[], bytes], *, kept: bool) -> None:
        """Write a state, encoded in the thread. One that is not ``kept`` is dropped when a later one is written."""
        self.settle()
        self._writing = (self._thread.submit(self._write_state, step, encode), kept)
        self.states[step] = StateRecord(step, state_file(step), "", 0)
        (self.kept.add if kept else self.kept.discard)(step)
        if len(self.states) == 1:  # without a state there is no trajectory to open
            self.flush_all()

    def _write_state(self, step: int, encode: Callable[[], bytes]) -> StateRecord:
        data = encode()
        record = StateRecord(step, state_file(step), hashlib.sha256(data).hexdigest(), len(data))
        write_atomically(self.path / STATES / record.file, data)
        return record

    def settle(self) -> None:
        """Wait for the state being written, then give it its row and drop those it replaces."""
        if self._writing is None:
            return
        job, kept = self._writing
        wait((job,))  # interrupted here, it is still the state being written
        self._writing = None
        record = job.result()
        self.states[record.step] = record
        row = (record.step, record.sha256, record.bytes, int(kept))
        self._side.append(("INSERT OR REPLACE INTO states VALUES (?,?,?,?)", row))
        for other in [s for s in self.states if s not in self.kept and s < record.step]:
            self.drop_state(other)

    def flush_all(self) -> None:
        """Everything appended so far is on the disk when this returns."""
        self.settle()
        self.flush()

    def drop_state(self, step: int) -> None:
        """Forget a state, once later ones have their rows: first its row, then its file."""
        self.flush_all()
        record = self.states.pop(step, None)
        if record is None:  # it was replaced by the state just settled
            return
        self.kept.discard(step)
        with storage(self.path / LOG):
            self._log.execute("DELETE FROM states WHERE step = ?", (step,))
        with storage(self.path / STATES / record.file):
            (self.path / STATES / record.file).unlink(missing_ok=True)

    def release(self, step: int) -> None:
        """Keep a state only until a later one is written."""
        self.flush_all()
        self.kept.discard(step)
        with storage(self.path / LOG):
            self._log.execute("UPDATE states SET kept = 0 WHERE step = ?", (step,))

    def set_fact(self, key: str, value: str) -> None:
        """Store one of the named values of the table ``facts``."""
        with storage(self.path / LOG):
            self._log.execute(SET_FACT, (key, value))

    def close(self) -> None:
        """Flush and close; without other readers the log becomes one plain file."""
        try:
            self.flush_all()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(sqlite3.Error):  # a reader holds it: it stays in WAL mode
                self._log.execute("PRAGMA busy_timeout=0")
                self._log.execute("PRAGMA journal_mode=DELETE")
            self._log.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._log.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._log.execute("ROLLBACK")
            raise
        self._log.execute("COMMIT")


def _manifest_key(manifest: bytes) -> str:
    return f"manifest:{hashlib.sha256(manifest).hexdigest()}"
