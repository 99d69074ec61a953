"""``kxexplain compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from kxexplain.cli.console import Data, Json, Model, Out, Run, emit, folder
from kxexplain.cli.specs import OpenRun
from kxexplain.learning.svm import OTHERS, compare_svm


def command(
    run: Run,
    c: Annotated[
        float | None,
        typer.Option("--C", help="Bound on every weight, for kernels of mean diagonal 1; by default cross-validated."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Training examples for the SVM, at most; stratified.")] = 2000,
    kernel: Annotated[str, typer.Option(help="path (along training) or tangent (at its end).")] = "path",
    against: Annotated[
        str, typer.Option(help="More kernels: some of path,start,middle,end,rbf,linear; none.")
    ] = ",".join(OTHERS),
    queries: Annotated[int, typer.Option(help="Test examples for which α is computed; 0 for none.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the choice of those examples, and of the folds.")] = 0,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Compare the network with support vector machines on its own kernel, and on others.

    A table of the network beside the SVM, one of all kernels (the path kernel; the tangent kernel at the start, the
    middle and the end of training; RBF and linear), C chosen by cross-validation. With --out, comparison.png and
    comparison.json are written there.

    **Examples**

        kxexplain compare runs/digits --out why
        kxexplain compare runs/digits --kernel tangent --C 10 --against none --limit 500 --json
    """
    opened = OpenRun.open(run, model, data)
    if kernel not in ("path", "tangent"):
        raise typer.BadParameter(f"{kernel!r} is neither path nor tangent", param_hint="--kernel")
    if out is not None:
        folder(out)
    comparison = compare_svm(
        opened.trajectory, opened.model, opened.data.train, opened.data.test,
        C=c, limit=limit, kernel="path" if kernel == "path" else "tangent", seed=seed, queries=queries,
        against=[] if against == "none" else [name.strip() for name in against.split(",")], progress=not json,
    )  # fmt: skip
    files = []
    if out is not None:
        files = [out / "comparison.png", out / "comparison.json"]
        comparison.plot(files[0], **opened.data.looks)
        files[1].write_text(comparison.to_json() + "\n", encoding="utf-8")
    tables = [comparison.table()] + ([comparison.kernel_table()] if len(comparison.kernels) > 1 else [])
    emit(json, {**comparison.summary(), "files": files}, *tables, *(f"wrote {file}" for file in files))
