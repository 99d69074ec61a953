"""``kxexplain import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kxexplain.cli.console import Json, emit
from kxexplain.cli.specs import Specs, build_data, build_model, remember
from kxexplain.trajectory import LOSSES, import_checkpoints


def command(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="A folder of checkpoints, or files in their order.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="A new or empty folder for the trajectory.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="mlp-WIDTH-WIDTH…, or package.module:function giving the model.", show_default=False)
    ],
    data: Annotated[
        str, typer.Option(help="A data set's name, or package.module:function giving it.", show_default=False)
    ],
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "cross_entropy",
    lr: Annotated[float | None, typer.Option(help="Learning rate, with --steps; by default found.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from one checkpoint to the next.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trajectory in --out.")] = False,
    json: Json = False,
) -> None:
    """Make a trajectory of checkpoints (.safetensors, .pt) that an unrecorded training left, to explain by.

    Bills then add up as ever; what checkpoints cannot tell is their line "unattributed".

    **Examples**

        kxexplain import checkpoints --model mine:model --data mine:data --out runs/old
        kxexplain import first.pt second.pt last.pt --model mine:model --data mine:data --out runs/old
    """
    given = checkpoints[0] if len(checkpoints) == 1 and not checkpoints[0].is_file() else checkpoints
    built = build_data(data)
    trajectory = import_checkpoints(
        given, build_model(model, built), built.train, loss, out=out, rate=lr, steps=steps, overwrite=overwrite
    )  # fmt: skip
    remember(out, Specs(model, data))
    names = trajectory.manifest.settings["checkpoints"]
    losses = [step.loss for step in trajectory.steps]
    table = Table("from", "to", "loss", "learning rate × steps", title=str(out), title_justify="left")
    for start, end, step in zip(names[:-1], names[1:], trajectory.steps, strict=True):
        table.add_row(start, end, f"{step.loss:.4g}", f"{step.rates[0]:.4g}")
    facts = {"path": out, "checkpoints": names, "losses": losses, "rates": [step.rates[0] for step in trajectory.steps]}
    emit(json, facts, table, f"Next: kxexplain explain {out} --queries 0,1,2 --out {out}-why")
