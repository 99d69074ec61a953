"""The commands: ``kxexplain demo``, ``train``, ``import``, ``explain``, ``index`` …: listed at the end of this file.

Each one parses its options, calls the library, and prints: a table to read, or one JSON document with ``--json``.
"""

from __future__ import annotations

import typer

from kxexplain.cli.comparing import command as compare
from kxexplain.cli.console import Commands
from kxexplain.cli.demo import command as demo
from kxexplain.cli.explaining import command as explain
from kxexplain.cli.importing import command as import_
from kxexplain.cli.increment import command as increment
from kxexplain.cli.indexing import app as index
from kxexplain.cli.info import command as info
from kxexplain.cli.neighbors import command as neighbors
from kxexplain.cli.training import command as train
from kxexplain.cli.verifying import command as verify

HELP = """Why a trained PyTorch model predicts what it predicts: a bill over the training examples that adds up.

**Start here**

    kxexplain demo --out runs/demo

**With a model and data of your own**: functions without arguments in mine.py of the present folder

    kxexplain train --model mine:model --data mine:data --out runs/mine
    kxexplain explain runs/mine --queries 0,5,9 --out runs/mine-why

Every command has --json: one JSON document on stdout and nothing else. Exit codes: 0 done, 1 failed with a message on
stderr, 2 wrong usage, 130 stopped by Ctrl-C.
"""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=HELP,
)
app.command("demo")(demo)
app.command("train")(train)
app.command("import")(import_)
app.command("explain")(explain)
app.add_typer(index, name="index")
app.command("neighbors")(neighbors)
app.command("compare")(compare)
app.command("increment")(increment)
app.command("verify")(verify)
app.command("info")(info)

__all__ = ["app"]
