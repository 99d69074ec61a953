"""``kxexplain neighbors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch.utils.data import Subset

from kxexplain.cli.console import Data, Json, Model, Out, Queries, Run, Target, emit, folder, numbers, target_of
from kxexplain.cli.specs import NamedData, OpenRun
from kxexplain.plots import plot_neighbors
from kxexplain.search import GradientIndex, Neighbors


def command(
    run: Run,
    queries: Queries = "0",
    target: Target = "predicted",
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Examples a list.")] = 10,
    dim: Annotated[int, typer.Option(help="Length of an example's feature vector.")] = 2048,
    index: Annotated[Path | None, typer.Option(help="Folder of the index: loaded if it is there, else built.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random projection.")] = 0,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Find each query's nearest training examples, proponents and opponents by search, without a full bill.

    The first call builds an index of the training examples' updates; with --index it is kept for the next call.

    **Examples**

        kxexplain neighbors runs/digits --queries 0,5,9
        kxexplain neighbors runs/digits --queries 0-99 --index runs/digits-index --json > neighbours.json
    """
    opened = OpenRun.open(run, model, data)
    chosen = numbers(queries, len(opened.data.test))
    if out is not None:
        folder(out)
    parts = (opened.trajectory, opened.model, opened.data.train)
    if index is not None and index.is_dir() and any(index.iterdir()):
        found_index = GradientIndex.load(index, *parts)
    else:
        if index is not None:
            folder(index, "--index")
        found_index = GradientIndex.build(*parts, dim=dim, seed=seed)
        if index is not None:
            found_index.save(index)
    found = found_index.search(Subset(opened.data.test, chosen), k, target_of(target))
    files = [] if out is None else draw(found, out, chosen, opened.data)
    values = {**found.facts, "queries": [hits(found, at, n) for at, n in enumerate(chosen)], "files": files}
    shown: list[Any] = []
    for at, number in enumerate(chosen):
        shown += [f"test example {number}", found.table(at), ""]
    emit(json, values, *shown, *(f"wrote {file}" for file in files))


def draw(found: Neighbors, out: Path, chosen: list[int], data: NamedData) -> list[Path]:
    """A picture for every query."""
    files = []
    for at, number in enumerate(chosen):
        files.append(out / f"neighbors-{number}.png")
        name = f"test example {number}"
        plot_neighbors(found, found.dataset, found.queries, at, name=name, **data.looks).savefig(files[-1])
    return files


def hits(found: Neighbors, query: int, number: int) -> dict[str, Any]:
    """One query's three lists as plain values."""
    values: dict[str, Any] = {"query": number}
    for name in ("nearest", "proponents", "opponents"):
        part = getattr(found, name)
        labels = [None] * part.ids.shape[1] if part.labels is None else part.labels[query].tolist()
        measure = "cosine" if name == "nearest" else "contribution"
        values[name] = [
            {"example": i, "label": label, measure: value}
            for i, label, value in zip(part.ids[query].tolist(), labels, part.values[query].tolist(), strict=True)
        ]
    return values
