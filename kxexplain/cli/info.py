"""``kxexplain info``."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from kxexplain.cli.console import Json, Run, emit
from kxexplain.cli.specs import recall
from kxexplain.trajectory import Trajectory


def command(run: Run, json: Json = False) -> None:
    """Tell what a recorded training is: model, data, optimiser, steps and states.

    Only reads the folder: needs neither model nor data, and calls no code of the run's.

    **Example**

        kxexplain info runs/digits
    """
    facts = describe(Trajectory.open(run))
    table = Table(title=str(run), title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _text(value))
    emit(json, facts, table)


def describe(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory's facts, from its manifest and step log."""
    manifest, specs = trajectory.manifest, recall(trajectory.path)[0]
    losses = [step.loss for step in trajectory.steps]
    return {
        "path": trajectory.path,
        "model": manifest.model.name,
        "parameters": sum(math.prod(p.shape) for p in manifest.model.parameters),
        "examples": manifest.dataset.count,
        "model_spec": specs.model if specs else None,
        "data_spec": specs.data if specs else None,
        "step_log": manifest.logged,
        "optimizer": manifest.optimizer.title,
        "options": [{k: v for k, v in g.options.items() if v} for g in manifest.optimizer.groups],
        "loss": manifest.loss,
        "reduction": manifest.reduction,
        "settings": manifest.settings,
        "seed": manifest.seed,
        "keep": manifest.keep,
        "steps": len(trajectory),
        "steps_after_the_last_state": trajectory.tail,
        "states": len(trajectory.states),
        "bytes": sum(state.bytes for state in trajectory.states),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "device": manifest.device,
        "threads": manifest.threads,
        "versions": manifest.versions,
        "format": manifest.format_version,
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None)
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
