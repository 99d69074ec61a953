"""A retrieval index's bytes on disk: ``manifest.json``, arrays (``*.npy``) and, unless "Flat", FAISS' own files.

``units.npy`` and ``norms.npy`` hold the features as :class:`kxexplain.search.sketches.Sketches` keeps them, ``ids.npy``
and ``labels.npy`` whose they are. Arrays are opened memory-mapped, so that several processes share one copy, and
opening one runs no code. Every file is written under a temporary name and renamed, the manifest last; it holds the
others' sizes and SHA-256 sums, and one of itself. Reading checks them before anything else looks at a byte. The sums
tell damage, not malice: take FAISS files (``*.faiss``) only from people whose code you would run, or rebuild them from
the features by opening a "Flat" index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kxexplain.errors import IndexFileError
from kxexplain.search.sketches import DTYPES, Sketches
from kxexplain.trajectory import Trajectory

FORMAT, FORMAT_VERSION = "kxexplain-index", 2
"""Raise the version when an old reader would misread the new folder, and keep a reader of the old one."""

MANIFEST, PARTS = "manifest.json", "parts"
UNITS, NORMS, IDS, LABELS = "units.npy", "norms.npy", "ids.npy", "labels.npy"
ARRAYS = (UNITS, NORMS, IDS, LABELS)
FAISS_FILES = ("influence.faiss", "nearest.faiss")
FIELDS: dict[str, type] = {
    "trajectory": str, "dataset": dict, "examples": int, "dim": int, "segments": int, "blocks": int, "seed": int,
    "dtype": str, "factory": str, "files": dict,
}  # fmt: skip
PIECE = 1 << 24
"""Bytes read at a time."""


def identity(trajectory: Trajectory) -> str:
    """A SHA-256 over the recorded states: what an index was made from."""
    states = [[state.step, state.sha256] for state in trajectory.states]
    return digest(json.dumps(states).encode())


def check_free(folder: Path) -> None:
    """``IndexFileError`` if the folder holds anything but an index, whole or begun."""
    with storage(folder):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise IndexFileError(f"{folder} is a file; give a new or empty folder")
        if any(file.name != PARTS for file in folder.iterdir()) and not is_index(folder):
            raise IndexFileError(f"{folder} holds something that is no index; give a new or empty folder")


@contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[Any]:
    """An array on disk to be filled, in its place once it is; never as a whole in memory."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        if 0 in shape:
            array = np.zeros(shape, dtype)
            yield array
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        else:
            mapped = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            yield mapped
            mapped.flush()
            del mapped
        os.replace(temporary, path)


def put_array(path: Path, values: Tensor) -> None:
    """Write an array."""
    array = values.detach().cpu().contiguous().numpy()
    with new_array(path, array.shape, array.dtype) as room:
        room[...] = array


def put_bytes(path: Path, data: bytes) -> None:
    """Write a file: under a temporary name, flushed, renamed."""
    with storage(path):
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write(folder: Path, facts: dict[str, Any], sketches: Sketches, blobs: dict[str, bytes]) -> None:
    """Write an index, over one that the folder may hold.

    Raises:
        IndexFileError: the folder cannot be written, or holds something else.
    """
    check_free(folder)
    kind = np.dtype(str(sketches.units.dtype).removeprefix("torch."))
    with new_array(folder / UNITS, tuple(sketches.units.shape), kind) as room:
        for place in sketches.chunks():
            room[place] = sketches.units[place].numpy()
    put_array(folder / NORMS, sketches.norms)
    close(folder, facts, sketches.ids, sketches.labels, blobs)


def close(folder: Path, facts: dict[str, Any], ids: Tensor, labels: Tensor | None, blobs: dict[str, bytes]) -> None:
    """Write all but the features, which are there, and last the manifest."""
    put_array(folder / IDS, ids)
    if labels is not None:
        put_array(folder / LABELS, labels)
    for name, data in blobs.items():
        put_bytes(folder / name, data)
    with storage(folder):
        names = [UNITS, NORMS, IDS, *([] if labels is None else [LABELS]), *blobs]
        for name in {*ARRAYS, *FAISS_FILES} - set(names):
            (folder / name).unlink(missing_ok=True)
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts}
        manifest["files"] = {name: measured(folder / name) for name in names}
        manifest["checksum"] = own_sum(manifest)
    put_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def read(folder: Path, *, verify: bool = True) -> tuple[dict[str, Any], Sketches, dict[str, bytes]]:
    """The manifest, the features (memory-mapped) and FAISS' files, all checked.

    Args:
        folder: of the index.
        verify: read all features once, for their checksum and for numbers that are not finite; without it only their
            size and shape are checked. FAISS' files are checked always.

    Raises:
        IndexFileError: something is missing, damaged, or of another format.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    for name, expected in files.items():
        if name not in (*ARRAYS, *FAISS_FILES) or not isinstance(expected, dict):
            raise IndexFileError(f"{folder / MANIFEST} names a file {name!r} that no index has")
        check_sum(folder / name, expected, verify=verify or name != UNITS)
    missing = [name for name in (UNITS, NORMS, IDS) if name not in files]
    if missing:
        raise IndexFileError(f"{folder / MANIFEST} names no {missing[0]}")
    n, dim, blocks = manifest["examples"], manifest["dim"], manifest["blocks"]
    if manifest["dtype"] not in DTYPES or not 1 <= blocks <= dim:
        raise IndexFileError(f"{folder / MANIFEST}: dtype {manifest['dtype']!r} with {blocks} blocks is no index's")
    ids = open_array(folder / IDS, (n,), torch.int64)
    labels = open_array(folder / LABELS, (n,), None) if LABELS in files else None
    sketches = mapped(folder, ids, labels, (dim, blocks), DTYPES[manifest["dtype"]])
    count = manifest["dataset"].get("count")
    if n and not (isinstance(count, int) and int(ids.min()) >= 0 and int(ids.max()) < count):
        raise IndexFileError(f"{folder / IDS}: dataset indices run from {int(ids.min())} to {int(ids.max())}")
    if verify and not sketches.finite():
        raise IndexFileError(f"{folder}: features hold NaN or infinite values; build the index again")
    with storage(folder):
        blobs = {name: (folder / name).read_bytes() for name in files if name in FAISS_FILES}
    return manifest, sketches, blobs


def mapped(
    folder: Path, ids: Tensor, labels: Tensor | None, sizes: tuple[int, int], dtype: torch.dtype | None = None
) -> Sketches:
    """The features in a folder, memory-mapped; ``sizes`` are their length and the number of blocks."""
    units = open_array(folder / UNITS, (len(ids), sizes[0]), dtype)
    norms = open_array(folder / NORMS, (len(ids), sizes[1]), torch.float32)
    return Sketches(units, norms, ids, labels)


def open_array(path: Path, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """An array of this shape and type (``None``: any number's), memory-mapped; changes would stay in memory."""
    with storage(path):
        try:
            mode: Any = None if 0 in shape else "c"
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
            values = torch.from_numpy(np.asarray(array))
        except (ValueError, EOFError, TypeError) as error:
            raise IndexFileError(f"{path} is no array: {error}") from error
    if tuple(values.shape) != shape or dtype not in (None, values.dtype):
        raise IndexFileError(f"{path} holds {values.dtype} of shape {tuple(values.shape)}, expected {dtype} {shape}")
    return values


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked; ``IndexFileError`` if it is missing, damaged or foreign."""
    path = folder / MANIFEST
    with storage(path):
        text = path.read_text("utf-8")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IndexFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise IndexFileError(f"{path} does not describe an index ({FORMAT!r})")
    if manifest.get("format_version") != FORMAT_VERSION:
        got = manifest.get("format_version")
        raise IndexFileError(f"{path} has format version {got!r}, this version reads {FORMAT_VERSION}; build it again")
    for name, kind in FIELDS.items():
        if type(manifest.get(name)) is not kind:
            raise IndexFileError(f"{path}: field {name!r} is {manifest.get(name)!r}, expected {kind.__name__}")
    if manifest.get("checksum") != own_sum(manifest):
        raise IndexFileError(f"{path} was altered: its checksum is not its own")
    return manifest


def is_index(folder: Path) -> bool:
    """Whether a folder's manifest says that it holds an index."""
    try:
        return f'"{FORMAT}"' in (folder / MANIFEST).read_text("utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        return False


def digest(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


def measured(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, read piece by piece."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return {"sha256": total.hexdigest(), "bytes": path.stat().st_size}


def check_sum(path: Path, expected: dict[str, Any], *, verify: bool = True) -> None:
    """``IndexFileError`` unless a file is what was noted about it."""
    with storage(path):
        right = path.stat().st_size == expected.get("bytes") and (not verify or measured(path) == expected)
    if not right:
        raise IndexFileError(f"{path} was truncated or altered: its checksum is not the recorded one")


def own_sum(manifest: dict[str, Any]) -> str:
    """A manifest's checksum of itself."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return digest(json.dumps(rest, sort_keys=True).encode())


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the errors of files into ``IndexFileError`` that names the file."""
    try:
        yield
    except IndexFileError:
        raise
    except FileNotFoundError as error:
        raise IndexFileError(f"{path} is missing; this is no complete index") from error
    except (OSError, UnicodeDecodeError) as error:
        raise IndexFileError(f"{path} cannot be read or written: {error}") from error
