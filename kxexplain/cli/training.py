"""``kxexplain train``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from kxexplain.cli.console import Json, emit
from kxexplain.cli.specs import (
    DEFAULT_DATA,
    DEFAULT_MODEL,
    NamedData,
    Specs,
    build_data,
    build_model,
    recall,
    remember,
    resolve,
)
from kxexplain.datasets import NAMES
from kxexplain.errors import ArgumentError, TrainingError, TrajectoryError
from kxexplain.learning.rates import COORDINATES, HINDSIGHT
from kxexplain.learning.rates import NAMES as SCHEDULES
from kxexplain.learning.schedules import Schedule
from kxexplain.learning.trainer import MakeOptimizer, train
from kxexplain.trajectory import LOSSES, Objective, Trajectory, call, fetch, outputs_2d
from kxexplain.trajectory.store import MANIFEST, is_trajectory

DATA = (
    f"One of {', '.join(NAMES)}, or package.module:function giving a dataset or a pair (train, test). "
    f"\\[default: {DEFAULT_DATA}]"
)
MODEL = f"mlp-WIDTH-WIDTH…, or package.module:function giving an nn.Module. \\[default: {DEFAULT_MODEL}]"


SCHEDULE = (
    f"Sets the rate from the measured gradient: one of {', '.join(SCHEDULES)}; the last three "
    "look at no gradient, but multiply --lr."
)
DEFAULT_OPTIMIZER = "sgd"


def command(
    out: Annotated[Path, typer.Option("--out", help="A new or empty folder for the trajectory.", show_default=False)],
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "cross_entropy",
    optimizer: Annotated[
        str, typer.Option(help="A class of torch.optim, in any case: sgd, adam, adamw …")
    ] = DEFAULT_OPTIMIZER,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="For optimisers that have it.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="For optimisers that have it.")] = 0.0,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of a step's gradient.")] = None,
    clip_value: Annotated[float | None, typer.Option(help="Largest size of a gradient's element.")] = None,
    schedule: Annotated[str | None, typer.Option(help=SCHEDULE)] = None,
    radius: Annotated[
        float | None, typer.Option(help="How far the optimum is, for --schedule; estimated if left out.")
    ] = None,
    earlier: Annotated[
        Path | None, typer.Option(help=f"A recorded run as long, for --schedule {' and '.join(HINDSIGHT)}.")
    ] = None,
    flooding: Annotated[float | None, typer.Option(help="Level of the loss below which steps ascend.")] = None,
    ascent: Annotated[
        float | None, typer.Option(help="Every second step ascends, this times as far: between 0 and 1.")
    ] = None,
    parameter_penalty: Annotated[float, typer.Option(help="Times the squared gradient by the parameters.")] = 0.0,
    input_penalty: Annotated[float, typer.Option(help="Times the squared gradient by the inputs.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 32,
    seed: Annotated[int, typer.Option(help="Of initialisation, order and dropout.")] = 0,
    keep: Annotated[
        str, typer.Option(help="States to keep: step, epoch, a number of steps, or a size: 200MB.")
    ] = "epoch",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trajectory in --out.")] = False,
    json: Json = False,
) -> None:
    """Train a model and record how, so that its predictions can be explained.

    Ctrl-C leaves a good trajectory, once training has begun; the same command with --resume goes on to the same result.

    A user's own functions take no arguments and are found from the present folder. They are remembered in the run
    for later commands, which call them without being told only if this user trained the run (a key in the
    configuration folder shows that).

    **Examples**

        kxexplain train --out runs/digits
        kxexplain train --data mnist5k --model mlp-128-64 --epochs 15 --batch-size 64 --out runs/mnist
        kxexplain train --schedule warmup_decay --flooding 0.05 --out runs/flooded
        kxexplain train --model mine:model --data mine:data --optimizer adamw --lr 1e-3 --keep 200MB --out runs/mine
    """
    if resume and overwrite:
        raise typer.BadParameter("give --resume or --overwrite, not both")
    if is_trajectory(out) and not (resume or overwrite):
        raise TrajectoryError(
            f"{out} already holds a trajectory; go on with it by --resume, replace it by --overwrite, "
            "or give a new folder"
        )
    known = resume and recall(out)[0] is not None
    specs = resolve(out, model, data) if known else Specs(model or DEFAULT_MODEL, data or DEFAULT_DATA)
    built = build_data(specs.data)
    network = build_model(specs.model, built, seed)
    wanted = make_schedule(schedule, radius, earlier)
    objective = Objective(flooding, ascent, parameter_penalty, input_penalty)
    if schedule == COORDINATES and optimizer == DEFAULT_OPTIMIZER:
        optimizer = COORDINATES
    maker = make_optimizer(optimizer, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
    begun = _recording_since(out, resume=resume)
    try:
        trajectory = train(
            network, built.train, loss, maker, epochs=epochs, batch_size=batch_size, seed=seed, out=out,
            keep=int(keep) if keep.isdecimal() else keep, clip_norm=clip_norm, clip_value=clip_value,
            schedule=wanted, objective=objective, resume=resume, overwrite=overwrite, progress=not json,
        )  # fmt: skip
    except (KeyboardInterrupt, TrainingError) as error:
        recorded = begun()
        if recorded and not known:
            remember(out, specs)
        if isinstance(error, TrainingError):
            raise
        advice = f"go on with the same command and --resume, into {out}" if recorded else "nothing was recorded"
        typer.echo(f"kxexplain: stopped; {advice}", err=True)
        raise typer.Exit(130) from None
    remember(out, specs)
    facts = _facts(trajectory, network.eval(), built)
    emit(json, facts, _table(facts), f"Next: kxexplain explain {out} --queries 0,1,2 --out {out}-why")


def _recording_since(out: Path, *, resume: bool) -> Callable[[], bool]:
    """A function that says whether this call's recording has begun in the folder, and not only an older one's."""

    def written() -> int | None:
        with suppress(OSError):
            return (out / MANIFEST).stat().st_mtime_ns
        return None

    before = written()
    return lambda: is_trajectory(out) and (resume or written() != before)


def make_schedule(name: str | None, radius: float | None, earlier: Path | None) -> Schedule | None:
    """The schedule asked for.

    Raises:
        ArgumentError: there is none of that name, or a radius or an earlier run without a schedule.
    """
    if name is None:
        if radius is not None or earlier is not None:
            raise ArgumentError("--radius and --earlier belong to a --schedule; give one")
        return None
    return Schedule(name, radius, None if earlier is None else Trajectory.open(earlier))


def make_optimizer(name: str, options: Mapping[str, float]) -> MakeOptimizer:
    """A function from parameters to the optimiser of that name; options that are 0 are left out.

    Raises:
        ArgumentError: torch has no such optimiser, or it has no such option.
    """
    known = {kind.lower(): getattr(torch.optim, kind) for kind in dir(torch.optim) if kind[0].isupper()}
    kind = known.get(name.lower())
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
        raise ArgumentError(f"torch.optim has no optimizer {name!r}; give for instance sgd, adam or adamw")
    given: dict[str, Any] = {key: value for key, value in options.items() if value != 0 or key == "lr"}

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            return kind(parameters, **given)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"torch.optim.{kind.__name__} does not take these options: {error}") from error

    return make


def accuracy(model: nn.Module, dataset: Any) -> float | None:
    """Share of right predictions; None where targets are no class numbers."""
    inputs, targets = fetch(dataset, range(len(dataset)))
    if targets.is_floating_point() or targets.dim() != 1:
        return None
    with torch.no_grad():
        outputs = outputs_2d(call(model, inputs))
    predicted = (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
    return float((predicted == targets).double().mean())


def _facts(trajectory: Trajectory, model: nn.Module, data: NamedData) -> dict[str, Any]:
    last = trajectory.steps[len(trajectory) - 1].epoch if len(trajectory) else 0
    losses = [step.loss for step in trajectory.steps if step.epoch == last]
    return {
        "path": trajectory.path,
        "steps": len(trajectory),
        "states": len(trajectory.states),
        "bytes": sum(state.bytes for state in trajectory.states),
        "loss": sum(losses) / max(1, len(losses)),
        "train_accuracy": accuracy(model, data.train),
        "test_accuracy": None if data.test is data.train else accuracy(model, data.test),
    }


def _table(facts: dict[str, Any]) -> Table:
    table = Table(title="Trained and recorded", title_justify="left", show_header=False)
    table.add_row("trajectory", str(facts["path"]))
    table.add_row("steps", f"{facts['steps']:,}")
    table.add_row("states", f"{facts['states']:,} ({facts['bytes'] / 1e6:.1f} MB)")
    table.add_row("loss, last epoch", f"{facts['loss']:.4g}")
    for part in ("train", "test"):
        if facts[f"{part}_accuracy"] is not None:
            table.add_row(f"{part} accuracy", f"{facts[f'{part}_accuracy']:.2%}")
    return table
