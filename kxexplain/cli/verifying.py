"""``kxexplain verify``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.utils.data import Subset

from kxexplain.attribution import explain
from kxexplain.cli.console import Data, Json, Model, Run, emit
from kxexplain.cli.specs import OpenRun
from kxexplain.errors import KxError
from kxexplain.trajectory import Replayer, Trajectory

LIMITS = {torch.float64: 1e-11}
LIMIT = 1e-5
"""Largest remainder of a bill relative to prediction − baseline, for float32 (and for float64 above)."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it passed, and what was seen; ``None`` if it could not be looked at."""

    name: str
    passed: bool | None
    seen: str


def command(
    run: Run,
    examples: Annotated[int, typer.Option(min=1, help="Test examples whose bill is checked.")] = 5,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Check a recorded training: files, checksums, replay, and that bills add up. Exit code 1 if anything fails.

    Replays the whole training, which takes about as long as training did.

    **Examples**

        kxexplain verify runs/digits
        kxexplain verify runs/digits --json | jq .passed
    """
    checks = verify(run, model, data, examples=examples)
    passed = not any(check.passed is False for check in checks)
    table = Table("check", "", "seen", title=str(run), title_justify="left")
    words = {True: "[green]pass[/green]", False: "[bold red]FAIL[/bold red]", None: "[yellow]skipped[/yellow]"}
    for check in checks:
        table.add_row(check.name, words[check.passed], check.seen)
    emit(json, {"path": run, "passed": passed, "checks": [asdict(check) for check in checks]}, table)
    if not passed:
        raise typer.Exit(1)


def verify(path: Path, model: str | None, data: str | None, *, examples: int = 5) -> list[Check]:
    """All checks, in order; once one that others need has failed, those are skipped."""
    checks: list[Check] = []
    opened: list[OpenRun] = []
    trajectory: list[Trajectory] = []

    def look(name: str, what: Callable[[], str], *, needs: bool = True) -> None:
        if not needs:
            checks.append(Check(name, None, "needs what failed above"))
            return
        try:
            checks.append(Check(name, True, what()))
        except (KxError, OSError) as error:
            checks.append(Check(name, False, " ".join(str(error).split())))

    look("opens", lambda: _open(path, trajectory))
    look("files and checksums", lambda: _files(trajectory[0]), needs=bool(trajectory))
    good = all(check.passed for check in checks)
    look("model and data", lambda: _build(path, model, data, into=opened), needs=bool(trajectory))
    ready = good and bool(opened)
    if trajectory and not trajectory[0].manifest.logged:
        checks.append(Check("replay", None, "made of checkpoints: there is no step to redo"))
    else:
        look("replay", lambda: _replay(opened[0]), needs=ready)
    look("bills add up", lambda: _bills(opened[0], examples), needs=ready and checks[-1].passed is not False)
    return checks


def _open(path: Path, into: list[Trajectory]) -> str:
    into.append(Trajectory.open(path))
    return f"{len(into[0]):,} steps, {len(into[0].states):,} states"


def _files(trajectory: Trajectory) -> str:
    trajectory.check_files()
    return f"{sum(state.bytes for state in trajectory.states) / 1e6:.1f} MB read, all as recorded"


def _build(path: Path, model: str | None, data: str | None, *, into: list[OpenRun]) -> str:
    made = OpenRun.open(path, model, data)
    made.trajectory.check_model(made.model)
    made.trajectory.check_dataset(made.data.train)
    into.append(made)
    return f"{made.specs.model}, {made.specs.data}: as recorded"


def _replay(run: OpenRun) -> str:
    with Replayer(run.trajectory, run.model, run.data.train) as replayer:
        replayer.seek(run.trajectory.states[0].step)
        for _ in range(len(run.trajectory)):
            replayer.advance()
    return f"{len(run.trajectory):,} steps redone, drift at most {replayer.drift:.1e}"


def _bills(run: OpenRun, examples: int) -> str:
    few = Subset(run.data.test, range(min(examples, len(run.data.test))))
    explanation = explain(run.trajectory, run.model, run.data.train, few, kernel=False)
    change = (explanation.prediction - explanation.baseline).double().norm()
    relative = float(explanation.remainder.double().norm() / change) if change > 0 else 0.0
    hidden = float(explanation.unattributed.double().norm() / change) if change > 0 else 0.0
    limit = LIMITS.get(explanation.prediction.dtype, LIMIT)
    seen = f"remainder {relative:.1e} of the change, for {len(few)} queries; unattributed {hidden:.1e}"
    if not relative <= limit:
        raise KxError(f"{seen}; at most {limit:.0e} is rounding")
    return seen
