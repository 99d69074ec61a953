"""A retrieval index's bytes on disk: ``manifest.json``, ``features.safetensors`` and, unless "Flat", FAISS' own files.

Every file is written under a temporary name and renamed, the manifest last; it holds the others' sizes and SHA-256
sums, and one of itself. Reading checks them before anything else looks at a byte. The sums tell damage, not malice:
take FAISS files (``*.faiss``) only from people whose code you would run, or rebuild them from the features by
opening a "Flat" index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kxexplain.errors import IndexFileError
from kxexplain.trajectory import Trajectory

FORMAT, FORMAT_VERSION = "kxexplain-index", 1
"""Raise the version when an old reader would misread the new folder, and keep a reader of the old one."""

MANIFEST, FEATURES = "manifest.json", "features.safetensors"
FAISS_FILES = ("influence.faiss", "nearest.faiss")
FIELDS: dict[str, type] = {
    "trajectory": str, "dataset": dict, "examples": int, "dim": int, "seed": int, "factory": str, "files": dict,
}  # fmt: skip


def identity(trajectory: Trajectory) -> str:
    """A SHA-256 over the recorded states: what an index was made from."""
    states = [[state.step, state.sha256] for state in trajectory.states]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def write(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], blobs: dict[str, bytes]) -> None:
    """Write an index, over one that the folder may hold.

    Raises:
        IndexFileError: the folder cannot be written, or holds something else.
    """
    with _storage(folder):
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_index(folder))):
            raise IndexFileError(f"{folder} holds something that is no index; give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        contents = {FEATURES: safetensors.torch.save(tensors), **blobs}
        files = {name: {"sha256": _sum(data), "bytes": len(data)} for name, data in contents.items()}
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts, "files": files}
        manifest["checksum"] = _own_sum(manifest)
        for name in {FEATURES, *FAISS_FILES} - contents.keys():
            (folder / name).unlink(missing_ok=True)
        for name, data in contents.items():
            _replace(folder / name, data)
        _replace(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """The manifest, the tensors and FAISS' files, all checked.

    Raises:
        IndexFileError: something is missing, damaged, or of another format.
    """
    manifest = _manifest(folder)
    contents = {}
    for name, expected in manifest["files"].items():
        if name not in (FEATURES, *FAISS_FILES) or not isinstance(expected, dict):
            raise IndexFileError(f"{folder / MANIFEST} names a file {name!r} that no index has")
        with _storage(folder / name):
            data = (folder / name).read_bytes()
        if len(data) != expected.get("bytes") or _sum(data) != expected.get("sha256"):
            raise IndexFileError(f"{folder / name} was truncated or altered: its checksum is not the recorded one")
        contents[name] = data
    if FEATURES not in contents:
        raise IndexFileError(f"{folder / MANIFEST} names no {FEATURES}")
    try:
        tensors = safetensors.torch.load(contents.pop(FEATURES))
    except SafetensorError as error:
        raise IndexFileError(f"{folder / FEATURES} is no safetensors file: {error}") from error
    _check_tensors(folder / FEATURES, tensors, manifest["examples"], manifest["dim"])
    return manifest, tensors, contents


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    with _storage(path):
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
    if manifest.get("checksum") != _own_sum(manifest):
        raise IndexFileError(f"{path} was altered: its checksum is not its own")
    return manifest


def _check_tensors(path: Path, tensors: dict[str, Tensor], examples: int, dim: int) -> None:
    features, labels = tensors.get("features"), tensors.get("labels")
    if features is None or features.dtype != torch.float32 or features.shape != (examples, dim):
        got = None if features is None else (features.dtype, tuple(features.shape))
        raise IndexFileError(f"{path}: features are {got}, expected float32 of shape {(examples, dim)}")
    if not bool(features.isfinite().all()):
        raise IndexFileError(f"{path}: features hold NaN or infinite values; build the index again")
    if labels is not None and labels.shape != (examples,):
        raise IndexFileError(f"{path}: labels have shape {tuple(labels.shape)}, expected {(examples,)}")


def _is_index(folder: Path) -> bool:
    try:
        return f'"{FORMAT}"' in (folder / MANIFEST).read_text("utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        return False


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _own_sum(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return _sum(json.dumps(rest, sort_keys=True).encode())


def _replace(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to the disk, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Turn the errors of files into ``IndexFileError`` that names the file."""
    try:
        yield
    except IndexFileError:
        raise
    except FileNotFoundError as error:
        raise IndexFileError(f"{path} is missing; this is no complete index") from error
    except (OSError, UnicodeDecodeError) as error:
        raise IndexFileError(f"{path} cannot be read or written: {error}") from error
