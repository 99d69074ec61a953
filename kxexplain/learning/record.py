"""Recording a loop of one's own, with or without features for the retrieval index."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from kxexplain.errors import ArgumentError
from kxexplain.search.own_loop import LoopFeatures
from kxexplain.trajectory import LossFunction, Objective, Recorder
from kxexplain.trajectory import record as recorder_of


def record(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: str | LossFunction,
    dataset: Any,
    *,
    out: str | PathLike[str],
    keep: str | int = "epoch",
    reduction: Literal["mean", "sum"] = "mean",
    seed: int | None = None,
    clip_value: float | None = None,
    objective: Objective | None = None,
    norms: bool = False,
    features: int | None = None,
    segments: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Recorder:
    """Record your own training loop into the folder ``out``; use it as a context manager.

    ``loss`` (a name or a function giving one loss per example) and ``reduction`` say what the loop
    minimises over each batch; the loop calls ``recorder.step(indices)`` after ``optimizer.step()``, also where it
    accumulated the gradient over several forward passes (equally weighted examples; replay makes it one pass, so
    neither dropout nor batch norm in training mode).
    Weights of examples or classes belong into the loss function, as factors of its losses; a sample's own weight can
    be part of its target: ``lambda f, y: cross_entropy(f, y[:, 0].long(), reduction="none") * y[:, 1]``. Torch's
    weighted mean divides by the batch's weights: that is ``losses * w * (len(w) / w.sum())``, and "mean".
    A loop that multiplies its gradients (``clip_grad_norm_``) tells ``recorder.step(..., clip=factor)``; one that
    (after that) clamps them, as ``clip_grad_value_`` does, gives ``clip_value``; what it took away is "unattributed".
    A loop that ascends in some steps tells ``recorder.step(..., sign=-1)``; one that adds a penalty on gradients to its
    loss gives ``objective``, which says which.
    A dataset that augments at random must draw from torch's global generator, and its batches must come from
    ``recorder.fetch(indices)``, so that replay draws the same; ``TrainingError`` before the first step if they do not.
    ``keep`` says which states to keep: "step", "epoch", a number of steps, or a size like "200MB".
    ``norms`` logs the norm of every step's gradient, which takes up to a tenth of a short step's time; without it
    :func:`kxexplain.gradient_norms` finds them by replay. It also looks at every gradient before the optimiser moves:
    without it one that is not finite stops training there only if it reaches the smallest parameter, as most do, and
    else when the loop tells a loss that is not, or at the next state. The steps before that one can then be had by
    :func:`kxexplain.recover`, as those of a loop that was killed.
    ``features`` collects gradient features of so many dimensions from the loop's own forward and backward passes, for
    the retrieval index in ``out``/index, as :func:`kxexplain.train` does; ``segments``, the number of states to come
    after the first (of epochs, with ``keep="epoch"``), divides their coordinates better from 512 dimensions on. They
    take a loop whose gradients are sums over the examples of ``recorder.step(indices)``, in their order and as the
    dataset has them, which is checked; for any other a replay makes the index in the end, and a warning says why.
    ``seed`` is only noted. With ``resume`` a run that was interrupted goes on: model, optimiser and random generators
    are set to its last state, and the loop continues with batch number ``recorder.position``; where ``out`` holds no
    run yet, one begins. A learning-rate scheduler of the loop's own is not recorded, and the loop must restore it
    itself. An optimiser's class may be your own, if its ``step()`` takes no closure and its parameter groups hold the
    arguments that its constructor needs; it is passed again to ``Trajectory.open``. Everything is checked at the
    call: ``ModelError``, ``DatasetError``, ``ArgumentError``, or ``TrajectoryError`` if ``out`` cannot be used. Files
    are written, or with ``overwrite`` removed, on entering the ``with`` block.

    >>> import tempfile, torch
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.eye(4), torch.arange(4.0))
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with record(model, optimizer, "mse", data, out=tempfile.mkdtemp(), keep="step") as recorder:
    ...     for indices in ([0, 1], [2, 3], [1, 3]):
    ...         optimizer.zero_grad()
    ...         inputs, targets = data[indices]
    ...         loss = (model(inputs)[:, 0] - targets).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...         recorder.step(indices, loss)
    >>> len(recorder.trajectory)
    3
    """
    if features is None and segments is not None:
        raise ArgumentError(
            f"got segments={segments} without features; give features=, a number of dimensions, as well"
        )

    def collecting(recorder: Recorder) -> LoopFeatures:
        assert features is not None
        return LoopFeatures.of(
            model, optimizer, recorder.manifest, recorder.keep, dataset, dim=features, segments=segments
        )

    return recorder_of(
        model, optimizer, loss, dataset, out=out, keep=keep, reduction=reduction, seed=seed, clip_value=clip_value,
        objective=objective, norms=norms, beside=None if features is None else collecting,
        overwrite=overwrite, resume=resume,
    )  # fmt: skip
