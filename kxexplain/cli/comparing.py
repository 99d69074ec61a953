"""``kxexplain compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from kxexplain.cli.console import Data, Json, Model, Out, Run, emit, folder
from kxexplain.cli.specs import OpenRun
from kxexplain.learning.svm import compare_svm


def command(
    run: Run,
    c: Annotated[float, typer.Option("--C", help="Bound on every weight, for a kernel of mean diagonal 1.")] = 1.0,
    limit: Annotated[int, typer.Option(help="Training examples for the SVM, at most; stratified.")] = 2000,
    kernel: Annotated[str, typer.Option(help="path (along training) or tangent (at its end).")] = "path",
    seed: Annotated[int, typer.Option(help="Of the choice of those examples.")] = 0,
    out: Out = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Compare the network with a support vector machine on the network's own kernel.

    With --out, comparison.png is written there.

    **Examples**

        kxexplain compare runs/digits --out why
        kxexplain compare runs/digits --kernel tangent --C 10 --limit 500 --json
    """
    opened = OpenRun.open(run, model, data)
    if kernel not in ("path", "tangent"):
        raise typer.BadParameter(f"{kernel!r} is neither path nor tangent", param_hint="--kernel")
    if out is not None:
        folder(out)
    comparison = compare_svm(
        opened.trajectory, opened.model, opened.data.train, opened.data.test,
        C=c, limit=limit, kernel="path" if kernel == "path" else "tangent", seed=seed,
    )  # fmt: skip
    files = []
    if out is not None:
        files.append(out / "comparison.png")
        comparison.plot(files[0], classes=opened.data.classes)
    emit(json, {**comparison.summary(), "files": files}, comparison.table(), *(f"wrote {file}" for file in files))
