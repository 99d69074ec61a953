"""What all commands share: options, printing for people or for machines, and errors in one line."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from kxexplain.errors import IncompleteWarning, KxError, TrajectoryError, UnattributedWarning

Run = Annotated[Path, typer.Argument(help="Folder of a recorded training.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write files to.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option("--model", help="package.module:function giving the model; by default the recorded one."),
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="A data set's name or package.module:function; by default the recorded one."),
]
Queries = Annotated[str, typer.Option("--queries", help="Test examples, such as 0,5,9 or 0-4.", metavar="NUMBERS")]
Target = Annotated[str, typer.Option("--target", help="An output's number, predicted, label, margin, loss or all.")]


class Commands(TyperGroup):
    """A group of commands whose expected errors become one line on stderr and exit code 1; Ctrl-C ends with 130.

    The library's own warning becomes a line on stderr, too.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with warnings_in_one_line():
                return super().invoke(ctx)
        except BrokenPipeError:  # `kxexplain … | head`: nobody reads on
            raise
        except (KxError, OSError) as error:
            typer.echo("kxexplain: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("kxexplain: stopped", err=True)
            raise typer.Exit(130) from None


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Inside the block the library's own warning is a line on stderr, without the place in the code that gave it."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, (IncompleteWarning, UnattributedWarning)):
                typer.echo(f"kxexplain: note: {message}", err=True)
            else:
                shown(message, category, *rest, **options)

        for kind in (IncompleteWarning, UnattributedWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = show
        yield


def emit(as_json: bool, values: Mapping[str, Any], *shown: Any) -> None:
    """Print the values as JSON, or else what is to be shown to people."""
    if as_json:
        typer.echo(json.dumps(plain(values), allow_nan=False))
    else:
        console = Console()
        for item in shown:
            console.print(item, highlight=False)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors as lists, numbers that are not finite as null.

    >>> plain({"a": torch.tensor([1.0, float("nan")]), "b": Path("runs")})
    {'a': [1.0, None], 'b': 'runs'}
    """
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def numbers(text: str, count: int, option: str = "--queries") -> list[int]:
    """The numbers that ``0,5,9`` or ``0-4`` stands for, each below ``count``.

    >>> numbers("7,0-2", 10)
    [7, 0, 1, 2]
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"{text!r}: expected numbers such as 0,5,9 or 0-4", param_hint=option)
        if dash and int(last) < int(first):
            raise typer.BadParameter(f"{text!r}: {first}-{last} goes backward; give {last}-{first}", param_hint=option)
        found.extend(range(int(first), int(last if dash else first) + 1))
    if not found or max(found) >= count:
        raise typer.BadParameter(f"{text!r}: there are examples 0 to {count - 1}", param_hint=option)
    return found


def target_of(text: str) -> int | str:
    """A target as the library takes it: an output's number, or a name."""
    return int(text) if text.lstrip("-").isdecimal() else text


def folder(path: Path, option: str = "--out") -> Path:
    """The folder, made if it is not there; called before work begins, so that its results can be kept.

    Raises:
        TrajectoryError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except FileExistsError as error:
        raise TrajectoryError(f"{option} {path} is a file; give a folder") from error
    except OSError as error:
        raise TrajectoryError(
            f"{option} {path} cannot be written to: {error}; give a folder that can be made or written to"
        ) from error
