r"""Making a trajectory of a training's checkpoints, which has no step log.

Between two checkpoints, θ_k and θ_{k+1}, all that is known of training is the chord Δ = θ_{k+1} − θ_k. As much of it as
full-data gradient descent can explain is the examples': −c ∇L(θ_k) with the c ≥ 0 that leaves the least of Δ,
c = max(0, −⟨Δ, ∇L⟩ / ⟨∇L, ∇L⟩), or c = rate · steps where these are told. (The gradients of both ends, each with its
best weight, left less of Δ, but with a checkpoint an epoch more of the outputs' change: of an MLP on digits 72 %
instead of 60 % under SGD, 56 % instead of 53 % under Adam; with five an epoch hardly less, 51 % instead of 53 %.)
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, TrainingError
from kxexplain.shapes import Tensors
from kxexplain.trajectory import rng
from kxexplain.trajectory.batches import fetch
from kxexplain.trajectory.checkpoints import Checkpoints, files, read
from kxexplain.trajectory.describe import versions
from kxexplain.trajectory.fingerprints import fingerprint
from kxexplain.trajectory.forward import forward, gradients, private_copy
from kxexplain.trajectory.losses import LossFunction, resolve
from kxexplain.trajectory.records import GroupRecord, Manifest, OptimizerRecord
from kxexplain.trajectory.signature import describe_model
from kxexplain.trajectory.states import State, encode, load_model
from kxexplain.trajectory.store import LOG, MANIFEST, STATES, Writer, check_free, folder, prepare, storage
from kxexplain.trajectory.trajectory import Trajectory
from kxexplain.trajectory.trial import evaluate

BATCH = 256
"""Examples differentiated at once; no result depends on it."""


def import_checkpoints(
    checkpoints: Checkpoints,
    model: nn.Module,
    dataset: Any,
    loss: str | LossFunction = "cross_entropy",
    *,
    out: str | PathLike[str],
    reduction: Literal["mean", "sum"] = "mean",
    rate: float | None = None,
    steps: int | None = None,
    overwrite: bool = False,
) -> Trajectory:
    r"""Make a trajectory of the checkpoints that an unrecorded training left behind.

    :func:`kxexplain.explain` then takes a chord from each checkpoint to the next. An example's part in it is
    −c ∇ℓ_i/n with the gradient at the chord's start, in evaluation mode; whatever else moved the parameters (minibatch
    noise, curvature, momentum, an optimiser's scaling, weight decay) is the bill's line "unattributed", and a warning
    says how large it is. The bill adds up all the same. Checkpoints that lie closer leave less unattributed.

    Args:
        checkpoints: a folder of .safetensors, .pt, .pth or .bin files, ordered by the numbers in their names (epoch_2
            before epoch_10), or a list of files in their order; each a state dict, or a dict that holds one under
            "state_dict", "model_state_dict" or "model". The first one is the bill's baseline.
        model: of the architecture trained; not changed. Parameters that need no gradient are not the examples' doing.
        dataset: the training examples, a map-style dataset of (input, target) whose order is fixed.
        loss: what was minimised: a name of :data:`kxexplain.trajectory.LOSSES`, or a function giving one loss per
            example.
        out: a new or empty folder.
        reduction: whether training minimised the mean or the sum over a batch; the scale of ``rate`` and of the kernel.
        rate: the learning rate, with ``steps``: then c = rate · steps; found by least squares if ``None``.
        steps: number of steps from each checkpoint to the next; for ``reduction="sum"``, of passes over the data.
        overwrite: replace a trajectory that ``out`` holds.

    Returns:
        The trajectory, with a "step" for each chord, whose learning rate is c. It cannot be replayed.

    Raises:
        ArgumentError: fewer than two checkpoints, one given twice, an order that cannot be told, an unknown loss or
            reduction, or a rate and steps that make no sense.
        TrajectoryError: a file is missing or cannot be read as tensors, or ``out`` cannot be used.
        ModelError: a checkpoint is of another model, or the model fails on the dataset's inputs.
        DatasetError: the dataset is empty or not deterministic, or its targets do not fit the loss.
        TrainingError: a checkpoint's parameters, or the loss or gradient there, are not finite.

    In every case of an error ``out`` is as it was.

    >>> import tempfile
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> model, saved = nn.Linear(3, 2), tempfile.mkdtemp()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> for epoch in range(3):
    ...     torch.save(model.state_dict(), f"{saved}/epoch_{epoch}.pt")
    ...     nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> trajectory = import_checkpoints(saved, model, data, out=tempfile.mkdtemp())
    >>> [round(step.rates[0], 4) for step in trajectory.steps]  # one full-data step a chord: the learning rate is found
    [0.5, 0.5]
    """
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f"unknown reduction {reduction!r}; expected 'mean' or 'sum'")
    told, path = _told(rate, steps), folder(out)
    name, function = resolve(loss)
    found = files(checkpoints)
    signature, private = describe_model(model), private_copy(model).eval()
    check_free(path, overwrite=overwrite)
    for number, file in enumerate(found):
        read(file, private, number)
    trained = tuple(n for n, p in private.named_parameters() if p.requires_grad)
    optimizer = OptimizerRecord("unknown", (GroupRecord(trained, {}),))
    examples = fingerprint(dataset)
    if examples.random:
        raise DatasetError(
            "the dataset draws at random whenever it serves an example, and checkpoints do not say what was drawn; "
            "give the examples as they are without augmentation"
        )
    evaluate(private, name, function, dataset, min(BATCH, examples.count))
    manifest = Manifest(
        model=signature, dataset=examples, optimizer=optimizer,
        loss=name, reduction=reduction, seed=None, keep="checkpoints", versions=versions(),
        device=str(next(model.parameters()).device), threads=torch.get_num_threads(),
        settings={"checkpoints": [file.name for file in found], "rate": rate, "steps": steps}, logged=False,
    )  # fmt: skip
    descent = _Descent(private, dataset, function, manifest, told)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        prepare(unfinished, overwrite=False)
        _write(unfinished, manifest, (read(file, private, k) for k, file in enumerate(found)), descent)
        _install(unfinished, path, overwrite=overwrite)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Trajectory.open(path, function if callable(loss) else None)


def moved(start: State, end: State, names: tuple[str, ...]) -> list[str]:
    """The parameters that differ between two checkpoints; one that does not was frozen, or has no gradient."""
    return [name for name in names if not torch.equal(start.parameters[name], end.parameters[name])]


class _Chord(NamedTuple):
    coefficient: float
    loss: float
    norm: float


class _Descent:
    """Explains chords by the full-data gradient at their start."""

    def __init__(
        self, model: nn.Module, dataset: Any, loss: LossFunction, manifest: Manifest, told: float | None
    ) -> None:
        self.model, self.dataset, self.loss, self.told = model, dataset, loss, told
        self.examples = manifest.dataset.count
        self.share = 1.0 / self.examples if manifest.reduction == "mean" else 1.0
        self.names = manifest.optimizer.groups[0].names

    def explain(self, start: State, end: State) -> _Chord:
        """The best multiple of the gradient, or the one told."""
        value, gradient = self._gradient(start)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"at checkpoint {start.step} (counted from 0) the loss is {value} and the gradient's norm {norm}; "
                "check the data, and leave out checkpoints of a training that diverged"
            )
        if self.told is not None:
            return _Chord(self.told, value, norm)
        along = size = 0.0
        for name in moved(start, end, self.names):
            if name in gradient:
                g = gradient[name].double().cpu()
                along -= float(((end.parameters[name].double() - start.parameters[name].double()) * g).sum())
                size += float(g.square().sum())
        return _Chord(max(0.0, along / size) if size > 0 else 0.0, value, norm)

    def _gradient(self, state: State) -> tuple[float, Tensors]:
        """The reduced loss over all examples at a state, and its gradient."""
        load_model(state, self.model)
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        device, value, total = next(iter(parameters.values())).device, 0.0, dict[str, Tensor]()
        with rng.fork(device), torch.enable_grad():
            for at in range(0, self.examples, BATCH):
                inputs, targets = fetch(self.dataset, range(at, min(at + BATCH, self.examples)), device)
                result = forward(self.model, inputs, targets, loss=self.loss, reduction="sum")
                for name, g in zip(parameters, gradients(result.total, list(parameters.values()))[0], strict=True):
                    if g is not None:
                        total[name] = total[name].add_(g, alpha=self.share) if name in total else g * self.share
                value += self.share * result.total.item()
        return value, total


def _told(rate: float | None, steps: int | None) -> float | None:
    """The chords' coefficient, if the caller knows it."""
    if rate is None and steps is None:
        return None
    numbers = isinstance(rate, (int, float)) and isinstance(steps, int) and not isinstance(steps, bool)
    if not numbers or not 0 < rate < math.inf or steps < 1:  # type: ignore[operator]
        raise ArgumentError(
            f"got rate={rate!r} and steps={steps!r}; expected a positive learning rate and a number of steps of at "
            "least 1 between two checkpoints, or neither"
        )
    return float(rate * steps)  # type: ignore[operator]


def _write(path: Path, manifest: Manifest, states: Iterator[State], descent: _Descent) -> None:
    """A whole trajectory: every checkpoint as a state, every chord as a row of the log."""
    writer = Writer.create(path, manifest.to_json())
    try:
        start = next(states)
        writer.put_state(0, partial(encode, start), kept=True)
        for end in states:
            chord = descent.explain(start, end)
            writer.append((start.step, start.step, (chord.coefficient,), [], chord.loss, chord.norm, 1, 1.0))
            writer.put_state(end.step, partial(encode, end), kept=True)
            start = end
    finally:
        writer.close()


def _install(unfinished: Path, path: Path, *, overwrite: bool) -> None:
    """Move a whole trajectory to where it belongs; its manifest, which makes it one, last."""
    prepare(path, overwrite=overwrite)
    with storage(path):
        for file in sorted((unfinished / STATES).iterdir()):
            os.replace(file, path / STATES / file.name)
        for name in (LOG, MANIFEST):
            os.replace(unfinished / name, path / name)
