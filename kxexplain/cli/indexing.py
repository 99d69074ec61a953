"""``kxexplain index build | search | info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch.utils.data import Subset

from kxexplain.cli.console import (
    Commands,
    Data,
    Json,
    Model,
    Out,
    Queries,
    Run,
    Target,
    emit,
    folder,
    numbers,
    target_of,
)
from kxexplain.cli.neighbors import draw, hits
from kxexplain.cli.specs import OpenRun
from kxexplain.search import GradientIndex, dim_for_recall, files
from kxexplain.search.sketches import DTYPES

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="The retrieval index: features of every training example's updates. **build | search | info**",
)
Index = Annotated[Path, typer.Argument(help="Folder of an index.", show_default=False)]


def shard_of(text: str | None) -> tuple[int, int] | None:
    """``0/4`` as a pair; ``BadParameter`` for anything else.

    >>> shard_of("0/4")
    (0, 4)
    """
    if text is None:
        return None
    which, slash, of = text.partition("/")
    if not (slash and which.isdecimal() and of.isdecimal()):
        raise typer.BadParameter(f"{text!r}: expected which of how many, such as 0/4", param_hint="--shard")
    return int(which), int(of)


@app.command("build")
def build(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="Folder for the index.", show_default=False)],
    dim: Annotated[int, typer.Option(help="Length of an example's feature vector.")] = 2048,
    recall: Annotated[
        float | None,
        typer.Option(help="Instead of --dim: the part of the exact top 10 wanted among 100 candidates, such as 0.95."),
    ] = None,
    factory: Annotated[
        str, typer.Option(help="FAISS' description of the index: auto, Flat, HNSW32, IVF64,Flat, IVF1024,PQ32 …")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    memory: Annotated[str, typer.Option(help="What FAISS may take, with --factory auto.")] = "4GB",
    seed: Annotated[int, typer.Option(help="Of the random projection.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option(help="Only one worker's share, such as 0/4; without it, finished shares in --out are put to use."),
    ] = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Index what every training example put into the parameters; an interrupted build goes on where it was.

    **Examples**

        kxexplain index build runs/digits --out runs/digits-index --recall 0.95
        kxexplain index build runs/digits --out runs/digits-index --shard 1/4
    """
    share = shard_of(shard)
    opened = OpenRun.open(run, model, data)
    parts = (opened.trajectory, opened.model, opened.data.train)
    folder(out)
    if recall is not None:
        few = Subset(opened.data.test, range(min(50, len(opened.data.test))))
        dim = dim_for_recall(*parts, few, recall, seed=seed)
    if share is not None:
        GradientIndex.build_shard(*parts, dim, shard=share, out=out, seed=seed, progress=not json)
        emit(json, {"index": str(out), "shard": list(share), "dim": dim}, f"share {share[0]} of {share[1]} is in {out}")
        return
    index = GradientIndex.build(
        *parts, dim, seed=seed, factory=factory, dtype=dtype, memory=memory, out=out, progress=not json
    )
    values = {"index": str(out), "examples": len(index), "dim": dim, "factory": index.factory, "bytes": size(out)}
    emit(json, values, f"{index!r} is in {out}")


@app.command("search")
def search(
    index: Index,
    run: Run,
    queries: Queries = "0",
    target: Target = "predicted",
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Examples a list.")] = 10,
    rerank: Annotated[
        int, typer.Option(min=0, help="Candidates ordered by their exact contributions, in a replay; 0 for none.")
    ] = 100,
    label: Annotated[str | None, typer.Option(help="Only among examples with these labels, such as 3,5.")] = None,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Find each query's proponents, opponents and nearest training examples in an index.

    **Example**

        kxexplain index search runs/digits-index runs/digits --queries 0,5 --rerank 0 --label 7
    """
    opened = OpenRun.open(run, model, data)
    chosen = numbers(queries, len(opened.data.test))
    labels = None if label is None else numbers(label, 1 << 31, "--label")
    if out is not None:
        folder(out)
    loaded = GradientIndex.load(index, opened.trajectory, opened.model, opened.data.train)
    found = loaded.search(Subset(opened.data.test, chosen), k, target_of(target), rerank=rerank, labels=labels)
    pictures = [] if out is None else draw(found, out, chosen, opened.data)
    values = {**found.facts, "queries": [hits(found, at, n) for at, n in enumerate(chosen)], "files": pictures}
    shown: list[Any] = []
    for at, number in enumerate(chosen):
        shown += [f"test example {number}", found.table(at), ""]
    emit(json, values, *shown, *(f"wrote {file}" for file in pictures))


@app.command("info")
def info(index: Index, json: Json = False) -> None:
    """Check an index' files, and tell what it was made from."""
    manifest, sketches, _ = files.read(index)
    facts = {name: manifest[name] for name in files.FIELDS if name not in ("files", "dataset")}
    facts |= {"dataset": manifest["dataset"].get("count"), "bytes": size(index)}
    facts["bytes_an_example"] = round(sketches.nbytes / max(1, len(sketches)))
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    emit(json, facts, table)


def size(folder: Path) -> int:
    """Bytes of an index' files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
