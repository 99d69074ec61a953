"""``kxexplain demo``: the whole library on a small real data set, in a few seconds."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Subset

from kxexplain.attribution import Explanation, explain
from kxexplain.cli.console import Json, folder, plain
from kxexplain.cli.explaining import bill, write
from kxexplain.cli.neighbors import draw, hits
from kxexplain.cli.specs import DEFAULT_DATA, DEFAULT_MODEL, NamedData, Specs, build_data, build_model, remember
from kxexplain.errors import TrajectoryError
from kxexplain.learning.comparison import Comparison
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import train
from kxexplain.search import GradientIndex, Neighbors
from kxexplain.trajectory import Trajectory, call
from kxexplain.trajectory.store import MANIFEST

RATE, BATCH, TOP = 0.1, 32, 6


def command(
    out: Annotated[Path, typer.Option("--out", help="A new or empty folder, or that of an earlier demo.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 15,
    seed: Annotated[int, typer.Option(help="Of initialisation and order.")] = 0,
    json: Json = False,
) -> None:
    """Train on handwritten digits, explain three test predictions, one of them wrong, and write pictures.

    Trains a small network by SGD and records how; itemises its most confident, its narrowest and its most
    confidently wrong test prediction over the training examples; finds their neighbours; compares the network with an
    SVM on its own kernel. The recorded training stays in OUT/run for the other commands, the numbers in
    OUT/summary.json.

    **Example**

        kxexplain demo --out runs/demo && kxexplain verify runs/demo/run
    """
    _check_folder(out)
    folder(out)
    console = Console(quiet=json, highlight=False)
    with one_thread():
        summary = run(out, console, epochs=epochs, seed=seed, progress=not json)
    if json:
        typer.echo(json_module.dumps(summary, allow_nan=False))


def run(out: Path, console: Console, *, epochs: int, seed: int, progress: bool) -> dict[str, Any]:
    """Train, explain, search and compare, telling it on the way; the summary as it is written."""
    began = time.perf_counter()
    data = build_data(DEFAULT_DATA)
    model = build_model(DEFAULT_MODEL, data, seed)
    trajectory = _train(model, data, out, epochs=epochs, seed=seed, progress=progress)
    chosen, accuracy = choose(model, data)
    _tell_training(console, trajectory, data, accuracy, epochs=epochs, began=began)
    numbers = list(chosen.values())
    queries = Subset(data.test, numbers)
    explanation = explain(trajectory, model, data.train, queries, kernel=False)
    files = write(explanation, out, numbers, data, k=TOP)
    _tell_bills(console, explanation, chosen)
    found = GradientIndex.build(trajectory, model, data.train).search(queries, TOP)
    files += draw(found, out, numbers, data)
    _tell_neighbours(console, found, chosen)
    comparison = compare_svm(trajectory, model, data.train, data.test, against=(), queries=0)
    comparison.plot(out / "comparison.png")
    _tell_svm(console, comparison)
    files += [out / "comparison.png", out / "summary.json"]
    summary: dict[str, Any] = plain(
        {
            **summarise(trajectory, explanation, found, comparison, chosen=chosen),
            "files": [file.name for file in files],
            "seconds": round(time.perf_counter() - began, 2),
        }
    )
    files[-1].write_text(json_module.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"\n   Wrote to {out} in {summary['seconds']:.0f} s: {', '.join(summary['files'])}")
    console.print(f"   Next: kxexplain verify {out / 'run'}")
    return summary


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a network gains nothing from threads, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose(model: nn.Module, data: NamedData) -> tuple[dict[str, int], float]:
    """The test examples to explain, by what they show, and the test accuracy.

    "sure": right by the largest margin. "narrow": right by the smallest. "wrong": wrong by the largest, if any is.
    """
    inputs, labels = data.test.tensors
    with torch.no_grad():
        outputs = call(model.eval(), inputs)
    best = outputs.topk(2, dim=1).values
    margin, right = best[:, 0] - best[:, 1], outputs.argmax(1) == labels
    found = {"sure": _extreme(margin, right), "narrow": _extreme(-margin, right), "wrong": _extreme(margin, ~right)}
    distinct: dict[str, int] = {}
    for name, number in found.items():
        if number is not None and number not in distinct.values():
            distinct[name] = number
    return distinct, float(right.double().mean())


def _extreme(values: Tensor, among: Tensor) -> int | None:
    return int(values.masked_fill(~among, -torch.inf).argmax()) if bool(among.any()) else None


def summarise(
    trajectory: Trajectory,
    explanation: Explanation,
    found: Neighbors,
    comparison: Comparison,
    *,
    chosen: dict[str, int],
) -> dict[str, Any]:
    """The demo's numbers."""
    change = (explanation.prediction - explanation.baseline).double().norm()
    numbers = list(chosen.items())
    return {
        "data": DEFAULT_DATA,
        "model": DEFAULT_MODEL,
        "steps": len(trajectory),
        "states": len(trajectory.states),
        "test_accuracy": comparison.network_accuracy,
        "misclassified": chosen.get("wrong"),
        "remainder_relative": float(explanation.remainder.double().norm() / change),
        "replay_drift": explanation.facts["drift"],
        "explained": [
            {"why": why, **bill(explanation, at, number, k=TOP), "neighbors": hits(found, at, number)}
            for at, (why, number) in enumerate(numbers)
        ],
        "svm": comparison.summary(),
        "versions": trajectory.manifest.versions,
    }


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise TrajectoryError(f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "run" / MANIFEST).is_file():
        raise TrajectoryError(f"{out} holds files that are no demo's; give a new folder")


def _train(model: nn.Module, data: NamedData, out: Path, *, epochs: int, seed: int, progress: bool) -> Trajectory:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    trajectory = train(
        model, data.train, "cross_entropy", optimizer, epochs=epochs, batch_size=BATCH, seed=seed,
        out=out / "run", overwrite=True, progress=progress,
    )  # fmt: skip
    remember(trajectory.path, Specs(DEFAULT_MODEL, DEFAULT_DATA))
    return trajectory


def _tell_training(
    console: Console, trajectory: Trajectory, data: NamedData, accuracy: float, *, epochs: int, began: float
) -> None:
    n, wrong = len(data.test), round((1 - accuracy) * len(data.test))
    console.print(
        f"[bold]1. Training[/bold] {DEFAULT_MODEL} on {len(data.train):,} handwritten digits: {epochs} epochs of SGD, "
        f"{len(trajectory):,} steps, {len(trajectory.states)} states recorded, {time.perf_counter() - began:.1f} s.\n"
        f"   {accuracy:.1%} of {n} test images are right, {wrong} are wrong.\n"
    )


def _tell_bills(console: Console, explanation: Explanation, chosen: dict[str, int]) -> None:
    about = {
        "sure": "its most confident right prediction",
        "narrow": "its narrowest right prediction",
        "wrong": "its most confident mistake",
    }
    console.print("[bold]2. Explaining[/bold] three test predictions over all training examples, exactly:\n")
    assert explanation.labels is not None
    assert explanation.output is not None
    for at, (why, number) in enumerate(chosen.items()):
        says, truth = int(explanation.output[at]), int(explanation.labels[at])
        console.print(f"   Test image {number}, {about[why]}: it is a {truth}, the network says {says}.")
        console.print(explanation.table(at, 3))
    change = (explanation.prediction - explanation.baseline).double().norm()
    left = float(explanation.remainder.double().norm() / change)
    console.print(f"   The bills leave {left:.0e} of the change from baseline to prediction unexplained: rounding.\n")


def _tell_neighbours(console: Console, found: Neighbors, chosen: dict[str, int]) -> None:
    console.print("[bold]3. Searching[/bold] the training examples' updates for each image's neighbours:\n")
    labels = found.nearest.labels
    for at, number in enumerate(chosen.values()):
        near = [
            f"{int(i)} (a {int(labels[at, rank])})" if labels is not None else f"{int(i)}"
            for rank, i in enumerate(found.nearest.ids[at][:4])
        ]
        console.print(f"   Nearest to test image {number}: training examples {', '.join(near)}")
    console.print()


def _tell_svm(console: Console, comparison: Comparison) -> None:
    console.print("[bold]4. Comparing[/bold] with a support vector machine on the network's own path kernel:\n")
    console.print(comparison.table())
    console.print(
        f"   The SVM, which never saw the network's weights, predicts the same for {comparison.agreement:.1%} of the "
        "test images."
    )
