r"""Training examples taken out: what the bill says, and what retraining says.

The bill's subtraction, f(x) − Σ_{i∈S} C_i(x), takes out what the examples *put in*. It is not what training without
them would have given: the others' gradients would have been taken at other parameters, and would have made up for the
loss. How far the two are apart is measured here, by training again.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kxexplain.attribution import Explanation, explain
from kxexplain.attribution.queries import evaluate, query_batch
from kxexplain.errors import ArgumentError
from kxexplain.kernels.budget import progress_bar
from kxexplain.shapes import Examples
from kxexplain.trajectory import Replayer, Trajectory


@dataclass(frozen=True)
class Removal:
    """A prediction three times: as it is, less what the examples put in, and after training without them.

    Attributes:
        examples: the dataset indices S taken out, rising.
        prediction: f_T, [query].
        subtracted: f_T − Σ_{i∈S} C_i, [query].
        retrained: training again without S, [query].
        seconds: what the bill took, and what training took.
    """

    examples: Int[Tensor, " removed"]
    prediction: Float[Tensor, " query"]
    subtracted: Float[Tensor, " query"]
    retrained: Float[Tensor, " query"]
    seconds: tuple[float, float]

    @property
    def correlation(self) -> float:
        """Pearson's, of the two changes over the queries; NaN where one is constant."""
        x, y = (t.double() - self.prediction.double() for t in (self.subtracted, self.retrained))
        x, y = x - x.mean(), y - y.mean()
        norm = float(x.norm() * y.norm())
        return float(x @ y) / norm if norm > 0 else float("nan")

    @property
    def ratio(self) -> float:
        """Change by retraining per change by subtraction (least squares through 0): 1 if they were the same."""
        x, y = (t.double() - self.prediction.double() for t in (self.subtracted, self.retrained))
        return float(x @ y / (x @ x)) if bool(x.any()) else float("nan")

    def __str__(self) -> str:
        change = [float((t - self.prediction).abs().mean()) for t in (self.subtracted, self.retrained)]
        return (
            f"without {len(self.examples)} examples, over {len(self.prediction)} queries: the bill subtracts "
            f"{change[0]:.3g} on average, retraining changes {change[1]:.3g}; correlation {self.correlation:.2f}, "
            f"ratio {self.ratio:.2f}"
        )


def subtract(explanation: Explanation, examples: Sequence[Any] | Tensor) -> Tensor:
    """F − Σ_{i∈S} C_i: the prediction less what some training examples put in, [query] (or [query, output]).

    Args:
        explanation: the bill.
        examples: dataset indices S.

    Raises:
        ArgumentError: an index that is none of the training examples', or the same one twice.

    >>> import tempfile, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> model = nn.Linear(3, 2)
    >>> run = kx.train(model, data, epochs=2, batch_size=3, out=tempfile.mkdtemp(), progress=False)
    >>> bill = kx.explain(run, model, data, torch.eye(3))
    >>> nothing_left = subtract(bill, [0, 1, 2])
    >>> torch.allclose(nothing_left, bill.baseline, atol=1e-6)
    True
    """
    chosen = _indices(examples, explanation.contributions.shape[1])
    return explanation.prediction - explanation.contributions[:, chosen].sum(1)


def retrain(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    without: Sequence[Any] | Tensor,
    *,
    progress: bool = False,
) -> nn.Module:
    """Train again as recorded, from the same start, with the same batches, rates and random state, less some examples.

    A batch's loss is reduced over the examples that are left; a batch of which none is left is skipped. A run that
    clipped by norm or ascended is refused: the log has what that did, not what it would have done.

    Args:
        trajectory: the recorded training.
        model: a model of its architecture; not changed.
        dataset: the training examples, as recorded.
        without: dataset indices to leave out; none gives the trained model again.
        progress: show a bar over the steps.

    Returns:
        The model trained without them, in evaluation mode.

    Raises:
        ModelError, DatasetError: not the recorded model or examples.
        ArgumentError: an index out of range, a run made of checkpoints, or one that clipped or flooded.
    """
    gone = set(_indices(without, trajectory.manifest.dataset.count).tolist())
    steps = range(len(trajectory))
    if any(trajectory.steps[t].clip != 1 or trajectory.steps[t].sign != 1 for t in steps):
        raise ArgumentError(
            "the run clipped its gradients or ascended; what that would have been without them is unknown"
        )
    with Replayer(trajectory, model, dataset) as replayer, progress_bar(progress, len(steps), "retraining") as tick:
        replayer.seek(trajectory.states[0].step)
        for t in steps:
            left = [i for i in trajectory.steps[t].indices.tolist() if i not in gone]
            if left:
                replayer.advance(indices=left)
            else:
                replayer.position += 1
            tick()
    return replayer.model.eval()


def compare_removal(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    examples: Sequence[Any] | Tensor,
    queries: Any,
    target: int | str = "predicted",
    *,
    progress: bool = False,
) -> Removal:
    """Take training examples out by the bill's subtraction, and by retraining, and set the two side by side.

    Args:
        trajectory: the recorded training.
        model: a model of its architecture; not changed.
        dataset: the training examples, as recorded.
        examples: dataset indices S to take out.
        queries: as for :func:`kxexplain.explain`.
        target: an output's number, ``"predicted"`` (by the trained model) or ``"label"``.
        progress: show bars.

    Raises:
        What :func:`kxexplain.explain` and :func:`retrain` raise.
    """
    if isinstance(target, str) and target not in ("predicted", "label"):
        raise ArgumentError(f'got target={target!r}; expected an output\'s number, "predicted" or "label"')
    began = time.perf_counter()
    bill = explain(trajectory, model, dataset, queries, target, kernel=False, progress=progress)
    subtracted = subtract(bill, examples)
    middle = time.perf_counter()
    new = retrain(trajectory, model, dataset, examples, progress=progress)
    ended = time.perf_counter()
    inputs, _ = query_batch(queries, next(new.parameters()).device)
    assert bill.output is not None
    found = evaluate(new, inputs).gather(1, bill.output[:, None].to(bill.prediction.device))[:, 0]
    chosen = _indices(examples, trajectory.manifest.dataset.count)
    return Removal(chosen, bill.prediction, subtracted, found, (middle - began, ended - middle))


def _indices(examples: Sequence[Any] | Tensor, n: int) -> Tensor:
    try:
        chosen = sorted(operator.index(i) for i in examples)
    except TypeError:
        raise ArgumentError(f"got examples={examples!r}; expected dataset indices, as whole numbers") from None
    if chosen and not (chosen[0] >= 0 and chosen[-1] < n):
        raise ArgumentError(f"examples reach from {chosen[0]} to {chosen[-1]}; there are 0 to {n - 1}")
    if len(set(chosen)) < len(chosen):
        raise ArgumentError("an example is named twice; give each index once")
    return torch.tensor(chosen, dtype=torch.int64)


__all__ = ["Removal", "compare_removal", "retrain", "subtract"]
