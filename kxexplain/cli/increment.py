"""``kxexplain increment``: must I retrain?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from torch.utils.data import Subset

from kxexplain import datasets
from kxexplain.cli.console import Data, Json, Model, Out, Run, emit, folder
from kxexplain.cli.specs import NamedData, OpenRun, build_data
from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.alternatives import ROWS, compare_updates


def command(
    run: Run,
    new: Annotated[
        str | None, typer.Option(help="package.module:function giving new examples, or (new examples, their test set).")
    ] = None,
    rotate: Annotated[
        float | None, typer.Option(help="Without --new: turn the pictures of the test set by so many degrees.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="New examples to learn, at most.")] = 50,
    memory: Annotated[int, typer.Option(min=1, help="Old examples that the rows with a memory protect.")] = 50,
    rows: Annotated[str, typer.Option(help="Kernel terms to compare, separated by semicolons.")] = ";".join(ROWS),
    damping: Annotated[float | None, typer.Option(help="ρ; by default as each rule chooses.")] = None,
    seed: Annotated[int, typer.Option(help="Of the memory and the batches' order.")] = 0,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Take new examples in as kernel terms, by fine-tuning and by retraining: accuracy on new, on old, and time.

    The new examples are the first of the test set, which is then measured on the others, if --new names none. With
    --out, updates.png is written there.

    **Examples**

        kxexplain increment runs/digits --rotate 30
        kxexplain increment runs/digits --new mine:fresh --count 100 --out runs/fresh --json
    """
    opened = OpenRun.open(run, model, data)
    fresh, fresh_test, old_test = _new(new, rotate, count, opened.data, opened.specs.data)
    if out is not None:
        folder(out)
    found = compare_updates(
        opened.trajectory, opened.model, opened.data.train, fresh, old_test, fresh_test, memory=memory,
        rows=[row.strip() for row in rows.split(";") if row.strip()], seed=seed, progress=not json,
        options={} if damping is None else {"damping": damping},
    )  # fmt: skip
    files = []
    if out is not None:
        files.append(out / "updates.png")
        found.plot(files[0])
    values = {"new_examples": len(fresh), "updates": found.summary(), "files": files}
    emit(json, values, found.table(), *(f"wrote {file}" for file in files))


def _new(new: str | None, rotate: float | None, count: int, data: NamedData, name: str) -> tuple[Any, Any, Any]:
    """New examples, a test set like them, and one like the old."""
    if new is not None:
        given = build_data(new)
        if rotate is not None:
            raise typer.BadParameter("--rotate is for the test set; leave it out with --new", param_hint="--rotate")
        size = min(count, len(given.train))
        return Subset(given.train, range(size)), given.test, data.test
    size = min(count, len(data.test) // 2)
    if size < 1:
        raise ArgumentError(f"the test set has {len(data.test)} example(s); expected two, or new ones by --new")
    test = data.test
    if rotate is not None:
        if data.image_shape is None:
            raise ArgumentError(f"the inputs of {name} are no pictures; leave out --rotate")
        classes = tuple(data.classes or ())
        test = datasets.rotated(datasets.Split(data.train, data.test, name, classes, data.image_shape), rotate).test
    rest = range(size, len(data.test))
    return Subset(test, range(size)), Subset(test, rest), Subset(data.test, rest)
