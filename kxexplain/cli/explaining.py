"""``kxexplain explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch.utils.data import Subset

from kxexplain.attribution import Explanation, explain
from kxexplain.attribution.file import LINES
from kxexplain.cli.console import Data, Json, Model, Out, Queries, Run, Target, emit, folder, numbers, target_of
from kxexplain.cli.specs import NamedData, OpenRun
from kxexplain.plots import plot_explanation


def command(
    run: Run,
    queries: Queries = "0",
    target: Target = "predicted",
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Proponents and opponents to show.")] = 6,
    stride: Annotated[int | None, typer.Option(help="Steps per segment; by default one per state.")] = None,
    decay: Annotated[
        str, typer.Option(help="Weight decay: a line of the bill, or charged to the updates that it erodes.")
    ] = "line",
    memory: Annotated[str, typer.Option(help="Memory for intermediate values.")] = "1GB",
    out: Out = None,
    model: Model = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Itemise predictions over the training examples: a bill that adds up.

    Queries are numbers of test examples (of the training examples, where the data has no test set). With --out, a
    picture for each query and explanation.safetensors, which kx.Explanation.load reads, are written there.

    **Examples**

        kxexplain explain runs/digits --queries 0,5,9 --out why
        kxexplain explain runs/digits --queries 0-20 --target margin --json > bills.json
        kxexplain explain runs/digits --decay charged
        kxexplain explain runs/mine --target label --model mine:model --data mine:data
    """
    if decay not in ("line", "charged"):
        raise typer.BadParameter(f"{decay!r} is neither line nor charged", param_hint="--decay")
    opened = OpenRun.open(run, model, data)
    chosen = numbers(queries, len(opened.data.test))
    if out is not None:
        folder(out)
    explanation = explain(
        opened.trajectory, opened.model, opened.data.train, Subset(opened.data.test, chosen), target_of(target),
        stride=stride, decay=decay, memory=memory, kernel=False, progress=not json,
    )  # fmt: skip
    files = [] if out is None else write(explanation, out, chosen, opened.data, k=k)
    values = {
        **explanation.facts,
        "decay": decay,
        "queries": [bill(explanation, at, number, k=k) for at, number in enumerate(chosen)],
        "files": files,
    }
    shown: list[Any] = []
    for at, number in enumerate(chosen):
        shown += [f"test example {number}", explanation.table(at, k), ""]
    emit(json, values, *shown, *(f"wrote {file}" for file in files))


def write(explanation: Explanation, out: Path, chosen: list[int], data: NamedData, *, k: int = 6) -> list[Path]:
    """A picture for every query, and the explanation itself."""
    files = [explanation.save(out / "explanation.safetensors")]
    for at, number in enumerate(chosen):
        file = out / f"query-{number}.png"
        plot_explanation(explanation, at, k=k, name=f"test example {number}", **data.looks).savefig(file)
        files.append(file)
    return files


def bill(explanation: Explanation, query: int, number: int, *, k: int) -> dict[str, Any]:
    """One query's bill as plain values; of all outputs, the largest one's examples are ranked."""
    one = explanation
    if explanation.all_outputs:
        one = explanation.of_output(int(explanation.prediction[query].argmax()))
    ranked = one.top(k)
    labels = explanation.labels
    values: dict[str, Any] = {name: getattr(explanation, name)[query] for name in LINES if name != "contributions"}
    values["contributions"] = explanation.contributions[query].double().sum(0)
    return {
        "query": number,
        "label": None if labels is None else labels[query],
        "output": None if one.output is None else int(one.output[query]),
        **values,
        "proponents": _entries(ranked.proponents[query], ranked.proponent_values[query], one.dataset, 1),
        "opponents": _entries(ranked.opponents[query], ranked.opponent_values[query], one.dataset, -1),
    }


def _entries(indices: Any, values: Any, dataset: Any, sign: int) -> list[dict[str, Any]]:
    pairs = [(i, v) for i, v in zip(indices.tolist(), values.tolist(), strict=True) if v * sign > 0]
    return [{"example": i, "label": dataset[i][1], "contribution": v} for i, v in pairs]
