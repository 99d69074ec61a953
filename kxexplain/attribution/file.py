"""An explanation's file: tensors by name and facts in one safetensors file, looked through before they are believed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kxexplain.errors import TrajectoryError
from kxexplain.shapes import Tensors

FORMAT = "kxexplain-explanation-1"
LINES = ("baseline", "contributions", "regularizer", "penalty", "buffers", "unattributed", "remainder", "prediction")
AXES = {
    "contributions": "qnc", **dict.fromkeys((n for n in LINES if n != "contributions"), "qc"), "path_kernel": "qncc",
    "output": "q", "timeline.steps": "S", "timeline.examples": "qk", "timeline.bins": "B", "timeline.shares": "bqkc",
    **{f"totals.{name}": "sqc" for name in LINES[1:6]}, "added": "qac",
}  # fmt: skip
"""A file's tensors: query, example n, output c (if all are explained), segment s, bin b, their borders S and B, and
terms a that were added after training."""
WHOLE_NUMBERS = ("output", "timeline.steps", "timeline.examples", "timeline.bins")
OPTIONAL = ("path_kernel", "output", "added")


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor | None], facts: dict[str, Any]) -> Path:
    """Write the tensors that there are; whole or not at all.

    Raises:
        TrajectoryError: the folder cannot be written to, or the path is a folder itself.
    """
    target = Path(path)
    if target.is_dir():
        raise TrajectoryError(f"{target} is a folder; give the name of a file to write the explanation to")
    kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items() if value is not None}
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        save_file(kept, unfinished, {"format": FORMAT, "facts": json.dumps(facts)})
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(
            f"{target} cannot be written: {error}; give the name of a file in a folder that can be written to"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return target


def read(path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and facts of a file; runs no code of its.

    Raises:
        TrajectoryError: missing, damaged, or no explanation.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{path} is not a readable explanation: {error}") from error
    if "contributions" in tensors and "regularizer" in tensors:  # files from before there were penalties
        tensors.setdefault("penalty", torch.zeros_like(tensors["regularizer"]))
    if "totals.regularizer" in tensors:
        tensors.setdefault("totals.penalty", torch.zeros_like(tensors["totals.regularizer"]))
    facts = _facts(about)
    problem = "facts that are missing or no JSON object" if facts is None else _misfit(tensors)
    if about.get("format") != FORMAT:
        problem = f"format {about.get('format')!r}"
    if facts is None or problem:
        raise TrajectoryError(f"{path} is no explanation of format {FORMAT}: got {problem}; save it anew")
    return tensors, facts


def _facts(about: dict[str, str]) -> dict[str, Any] | None:
    """The facts in a file's metadata."""
    try:
        facts = json.loads(about["facts"])
    except (KeyError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _misfit(tensors: dict[str, Tensor]) -> str | None:
    """In words, what is wrong with a file's tensors."""
    sizes: dict[str, int] = {}
    for name, axes in AXES.items():
        if name not in tensors:
            if name in OPTIONAL:
                continue
            return f"no {name}"
        found = tensors[name]
        letters = axes if tensors["contributions"].dim() == 3 else axes.replace("c", "")
        fits = found.dim() == len(letters) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(letters, found.shape, strict=True)
        )
        if not fits or found.is_floating_point() == (name in WHOLE_NUMBERS):
            return f"{name} of type {found.dtype} and shape {tuple(found.shape)}, where {sizes} are known"
    for name in ("labels", "queries"):
        if name in tensors and tensors[name].shape[:1] != (sizes["q"],):
            return f"{name} of shape {tuple(tensors[name].shape)} for {sizes['q']} queries"
    if sizes["S"] != sizes["s"] + 1 or sizes["B"] != sizes["b"] + 1:
        return f"timeline borders that do not fit its segments or bins: {sizes}"
    examples = tensors["timeline.examples"]
    if bool(((examples < 0) | (examples >= sizes["n"])).any()):
        return f"timeline.examples that are not among the {sizes['n']} examples"
    return None
