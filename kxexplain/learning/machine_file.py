"""A kernel machine in training, as one file: coefficients, the best so far, and what it belongs to. No code in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kxexplain.errors import TrajectoryError
from kxexplain.trajectory.store import folder, storage, write_atomically

FORMAT = "kxexplain-kernel-machine-1"


@dataclass
class Progressed:
    """How far a training is.

    Attributes:
        coefficients: as they stand, [n, c] over examples or [d, c] over features.
        best: those of the epoch with the lowest validation loss; the last without validation.
        history: per epoch its training loss, and validation loss if there is one.
        stopped: whether training ended early.
    """

    coefficients: Tensor
    best: Tensor
    history: list[dict[str, float]]
    stopped: bool = False


def new_file(out: Any) -> Path:
    """``out`` as a path whose folder is there.

    Raises:
        ArgumentError: no path.
        TrajectoryError: the folder cannot be made.
    """
    path = folder(out)
    with storage(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_progress(path: Path, progressed: Progressed, settings: dict[str, Any]) -> None:
    """Write it, whole or not at all."""
    about = {
        "format": FORMAT,
        "settings": json.dumps(settings, sort_keys=True),
        "history": json.dumps(progressed.history),
        "stopped": json.dumps(progressed.stopped),
    }
    tensors = {"coefficients": progressed.coefficients, "best": progressed.best}
    write_atomically(path, save({name: t.cpu().clone() for name, t in tensors.items()}, about))


def load_progress(path: Path, settings: dict[str, Any]) -> Progressed:
    """Read it back.

    Raises:
        TrajectoryError: missing, damaged, or of another training: what differs is named.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("coefficients", "best")}
        if about.get("format") != FORMAT:
            raise TrajectoryError(f"{path} has format {about.get('format')!r}, expected {FORMAT}; give another file")
        found = json.loads(about["settings"])
        differing = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        if differing:
            told = ", ".join(f"{k}: {found.get(k)!r}, now {settings.get(k)!r}" for k in differing)
            raise TrajectoryError(f"{path} is of another training ({told}); give the same settings or another file")
        return Progressed(**tensors, history=json.loads(about["history"]), stopped=json.loads(about["stopped"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, TrajectoryError):
            raise
        raise TrajectoryError(f"{path} is no readable kernel machine: {error!r}; give another file") from error


__all__ = ["Progressed", "load_progress", "new_file", "save_progress"]
