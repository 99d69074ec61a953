"""The manifest of a run that is about to begin, and the checks that come before any work."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from kxexplain.errors import ArgumentError
from kxexplain.trajectory.fingerprints import fingerprint
from kxexplain.trajectory.keep import Keep
from kxexplain.trajectory.losses import LossFunction, resolve
from kxexplain.trajectory.records import Manifest
from kxexplain.trajectory.signature import describe_model, describe_optimizer


def check_budget(keep: Keep, model: nn.Module) -> None:
    """``ArgumentError`` if a byte budget cannot hold the first and the last state."""
    least = 2 * sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if keep.kind == "budget" and keep.budget < least:
        raise ArgumentError(
            f"keep: {keep.budget} bytes are too few, since the first and the last state are always "
            f"kept and take more than {least}; give a larger size"
        )


def describe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: str | LossFunction,
    dataset: Any,
    *,
    keep: str | int,
    reduction: Literal["mean", "sum"],
    seed: int | None,
    settings: dict[str, Any] | None = None,
) -> Manifest:
    """The manifest of a run with these parts; raises as ``kx.record`` does."""
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f"unknown reduction {reduction!r}; expected 'mean' or 'sum'")
    return Manifest(
        model=describe_model(model),
        dataset=fingerprint(dataset),
        optimizer=describe_optimizer(optimizer, model),
        loss=resolve(loss)[0],
        reduction=reduction,
        seed=seed,
        keep=str(keep),
        versions=versions(),
        device=str(next(model.parameters()).device),
        threads=torch.get_num_threads(),
        settings=settings or {},
    )


def versions() -> dict[str, str]:
    """Versions of what a run depends on, by name."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"kxexplain": _own_version(), "torch": torch.__version__, "python": python, "numpy": np.__version__}


@cache
def _own_version() -> str:
    """What the installed package says it is; looking it up takes a while."""
    try:
        return version("kxexplain")
    except PackageNotFoundError:
        return "unknown"
