r"""The bill of an incremental model: training's contributions, and what was learnt since as lines of its own.

f_new(x) = f_0(x) + Σ_i C_i(x) + … + Σ_j K(x, x_j) a_j + ⟨∇f(x), δ_0⟩: the trained model's bill, which is exact, and the
added terms, which are a sum as they stand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kxexplain.attribution import explain as explain_training
from kxexplain.attribution.queries import query_batch
from kxexplain.attribution.result import Explanation
from kxexplain.errors import ArgumentError, TargetError
from kxexplain.trajectory.batches import count, take

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel

EARLIER = "earlier examples"
"""The line of terms whose examples are no longer held."""


class Labelled(Dataset):  # type: ignore[type-arg]
    """Inputs with the number of the output to explain."""

    def __init__(self, inputs: Any, outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs, outputs

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitem__(self, i: int) -> Any:
        return take(self.inputs, torch.tensor(i)), self.outputs[i]


def explain(learner: IncrementalModel, dataset: Any, queries: Any, target: Any, **options: Any) -> Explanation:
    """Training's bill with the added terms."""
    if learner.recorded is None:
        raise ArgumentError(
            "a bill needs the recorded training: make the model from it, kx.IncrementalModel(trajectory, model)"
        )
    trajectory, architecture = learner.recorded
    inputs, labels = query_batch(queries, learner.features.like.device)
    learner.features.checked(inputs)
    with torch.no_grad():
        outputs = learner(inputs).view(count(inputs), -1).to(learner.features.like)
        added, names = _added(learner, inputs, outputs)
    recorded = outputs.shape[1] - sum(extra for extra, _ in learner.growth)
    if target == "all":
        if learner.growth:
            raise TargetError('target "all" is of the outputs that were trained; choose one of the grown model\'s')
        bill = explain_training(trajectory, architecture, dataset, inputs, "all", **options)
        chosen, total = added.to(outputs), outputs
    else:
        column = _column(target, outputs, labels)
        known = Labelled(inputs, column.clamp(max=recorded - 1))
        bill = explain_training(trajectory, architecture, dataset, known, "label", **options)
        bill = _of_new_outputs(bill, column, recorded, learner)
        chosen = added.gather(2, column[:, None, None].expand(-1, added.shape[1], 1))[..., 0]
        total = outputs.gather(1, column[:, None])[:, 0]
    parts = [getattr(bill, name) for name in ("baseline", "regularizer", "buffers", "unattributed")]
    prediction, chosen = total.to(bill.prediction), chosen.to(bill.prediction)
    explained = sum(p.double() for p in parts) + bill.contributions.double().sum(1) + chosen.double().sum(1)
    return replace(
        bill,
        prediction=prediction,
        added=chosen,
        added_names=names,
        remainder=(total.double() - explained).to(bill.prediction),
        labels=labels,
        facts={**bill.facts, "target": str(target), "rule of learning": learner.settings.rule},
    )


def _added(learner: IncrementalModel, inputs: Any, outputs: Tensor) -> tuple[Tensor, list[str]]:
    """The added terms, [q, m, C], and their names."""
    added = learner.contributions(inputs).to(outputs)
    names = [str(name) for name in learner.held.ids]
    if learner.engine.exact:
        return added, names
    rest = outputs - learner.features.outputs(inputs).to(outputs) - added.sum(1)
    return torch.cat([added, rest[:, None]], 1), [*names, EARLIER]


def _column(target: Any, outputs: Tensor, labels: Tensor | None) -> Tensor:
    """The output to explain, per query."""
    columns = outputs.shape[1]
    if target == "predicted":
        return outputs.argmax(1)
    classes = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
    if target == "label" and labels is not None and classes and bool(((labels >= 0) & (labels < columns)).all()):
        return labels
    if isinstance(target, int) and not isinstance(target, bool) and -columns <= target < columns:
        return torch.full((len(outputs),), target % columns, device=outputs.device)
    raise TargetError(
        f'got target {target!r} for {columns} outputs; expected one of their numbers, "predicted", "all", or '
        '"label" with queries (input, class number): added terms are amounts of outputs'
    )


def _of_new_outputs(bill: Explanation, column: Tensor, recorded: int, learner: IncrementalModel) -> Explanation:
    """Outputs that were added since have no training: their bill begins at the constant they began with."""
    new = (column >= recorded).to(bill.prediction.device)
    if not bool(new.any()):
        return replace(bill, output=column)
    starts = [bias for extra, bias in learner.growth for _ in range(extra)]
    begun = bill.baseline.new_tensor([0.0] * recorded + starts)[column]
    line = bill.timeline
    return replace(
        bill,
        output=column,
        baseline=torch.where(new, begun, bill.baseline),
        **{name: getattr(bill, name).masked_fill(new, 0) for name in ("regularizer", "buffers", "unattributed")},
        contributions=bill.contributions.masked_fill(new[:, None], 0),
        path_kernel=None,
        timeline=replace(
            line,
            totals={name: t.masked_fill(new, 0) for name, t in line.totals.items()},
            shares=line.shares.masked_fill(new[:, None], 0),
        ),
    )
