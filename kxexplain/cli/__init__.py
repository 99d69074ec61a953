"""The commands: ``kxexplain demo | train | explain | neighbors | compare | verify | info``.

Each one parses its options, calls the library, and prints: a table to read, or one JSON document with ``--json``.
"""

from __future__ import annotations

import typer

from kxexplain.cli import comparing, demo, explaining, info, neighbors, training, verifying
from kxexplain.cli.console import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Why a trained PyTorch model predicts what it predicts: a bill over the training examples that adds up.\n\n"
        "[bold]Start here[/bold]\n\n"
        "  kxexplain demo --out runs/demo\n\n"
        "[bold]With a model and data of your own[/bold] (functions in mine.py of the present folder)\n\n"
        "  kxexplain train --model mine:model --data mine:data --out runs/mine\n\n"
        "  kxexplain explain runs/mine --queries 0,5,9 --out runs/mine-why\n\n"
        "Every command has --json: one JSON document on stdout and nothing else. Exit codes: 0 done, 1 failed with a "
        "message on stderr, 2 wrong usage."
    ),
)
app.command("demo")(demo.command)
app.command("train")(training.command)
app.command("explain")(explaining.command)
app.command("neighbors")(neighbors.command)
app.command("compare")(comparing.command)
app.command("verify")(verifying.command)
app.command("info")(info.command)

__all__ = ["app"]
