r"""The exact bill: prediction = baseline + Σ contributions + regulariser + penalty + buffers + unattributed + rest.

With Δ_s = Σ_{j,i} (update of example i in step j) over a segment s, and D_s(x) the discrete gradient across it,
f_T(x) − f_0(x) = Σ_s ⟨D_s(x), Δ_s⟩ exactly, so C_i(x) = Σ_s ⟨D_s(x), Σ_j update_{j,i}⟩ adds up whatever the segments'
length. Kernel form: K(x, x_i) = Σ_t w ⟨D_t(x), ∇f(x_i; θ_t)⟩ and α_i(x) solves K α_i = C_i(x).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.attribution import precision as precisions
from kxexplain.attribution.backward import BackwardWalk
from kxexplain.attribution.chords import ChordWalk
from kxexplain.attribution.ledger import Ledger
from kxexplain.attribution.queries import Ends, QuerySide
from kxexplain.attribution.result import Explanation
from kxexplain.attribution.targets import TargetSpec
from kxexplain.attribution.unattributed import missing_part, unattributed_part
from kxexplain.attribution.walk import Walk, bounds
from kxexplain.errors import ArgumentError, IncompleteWarning, KxError, ModelError, UnattributedWarning
from kxexplain.kernels import quadrature
from kxexplain.kernels.budget import parse_bytes, progress_bar
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import Replayer, Trajectory, split
from kxexplain.trajectory.optimizers import RECURSIONS


def explain(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    queries: Tensor | Examples | Inputs,
    target: TargetSpec = "predicted",
    *,
    rule: str = "discrete",
    stride: int | None = None,
    decay: str = "line",
    kernel: bool = True,
    memory: str | int = "1GB",
    precision: str = "auto",
    progress: bool = False,
) -> Explanation:
    """Itemise predictions over the training examples, exactly.

    Args:
        trajectory: the recorded training, or imported checkpoints (:func:`kxexplain.import_checkpoints`).
        model: a model of the recorded architecture; only its code is used, and it is not changed.
        dataset: the training examples, as recorded.
        queries: a tensor of inputs [q, …] (or a tuple or dict of them), or a dataset of (input, target).
        target: an output's number, ``"predicted"``, ``"label"``, ``"margin"``, ``"loss"``, ``"all"`` (every output:
            the result gains an output axis) or a function from outputs [q, C] to [q].
        rule: ``"discrete"`` is exact; ``"start"`` (TracIn), ``"midpoint"`` and ``"gauss-m"`` are approximations for
            comparison, and leave a remainder.
        stride: steps (of imported checkpoints: chords) per segment on the query's side; one segment per recorded state
            if ``None``. Never costs exactness, only how closely each step's own path is followed.
        decay: weight decay is a ``"line"`` of the bill, or ``"charged"`` to the updates that it erodes; what it does to
            the initial parameters then stays as the regulariser's line.
        kernel: also accumulate the path kernel, from which α follows. With ``target="all"`` that takes a backward
            pass per output and step.
        memory: bytes for intermediate values, as a number or like ``"500MB"``.
        precision: ``"model"`` computes in the model's type, ``"double"`` in float64, of which the result is then;
            ``"auto"`` in the model's, and again in float64 where rounding left a float32 model's bill a remainder
            above 1e-5 of the change (under adaptive optimisers, examples' amounts can be thousands of times that).
        progress: show a bar over the replayed steps.

    Returns:
        The bill of every query.

    Warns:
        IncompleteWarning: the bill does not add up, which no faithfully recorded run should bring about.
        UnattributedWarning: a part of the bill is no example's, and more than rounding: how large it is, and why.

    Raises:
        ModelError: not the recorded architecture, or one whose outputs are not the same twice or depend on the other
            queries; one that cannot compute in float64, if that is asked for.
        DatasetError: not the recorded examples, no queries, or queries that the model cannot take.
        TargetError: the target does not exist.
        ArgumentError: an unknown rule, stride, amount of memory, precision or way of accounting for decay; charged
            decay of imported checkpoints, which nobody knows; float64 asked of a device that has none.
        ReplayError: the log does not lead to the recorded states.

    Source: discrete gradients, Gonzalez 1996; the kernel form, Domingos 2020 (arXiv 2012.00152).

    >>> import tempfile, torch, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    >>> model = torch.nn.Linear(3, 2)
    >>> trajectory = kx.train(model, data, epochs=5, batch_size=2, out=tempfile.mkdtemp(), progress=False)
    >>> explanation = kx.explain(trajectory, model, data, torch.eye(3)[:1])
    >>> bill = explanation.baseline + explanation.contributions.sum(1)
    >>> bool((bill - explanation.prediction).abs() < 1e-6)
    True
    """
    question = _Question(trajectory, model, queries, target, rule, memory)
    side = question.side()
    precisions.check(precision, side.prediction)
    bounds(trajectory, stride)
    if decay not in ("line", "charged"):
        raise ArgumentError(f'got decay={decay!r}; expected "line" or "charged"')
    if decay == "charged" and not trajectory.manifest.logged:
        raise ArgumentError(
            f'{trajectory.path} was made of checkpoints: nobody knows its decay; leave out decay="charged"'
        )
    itemised = partial(
        _itemised, trajectory, model, dataset, stride=stride, decay=decay, kernel=kernel, progress=progress
    )
    explanation = itemised(question.wide_side() if precision == "double" else side)
    if precision == "auto" and side.rule.exact and precisions.is_lost(explanation):
        try:
            side = question.wide_side()
        except ModelError:  # one that cannot: the remainder says what is missing
            pass
        else:
            explanation = itemised(side)
    left = unattributed_part(explanation, trajectory)
    if left is not None:
        warnings.warn(left, UnattributedWarning, stacklevel=2)
    missing = missing_part(explanation) if side.rule.exact else None
    if missing is not None:
        warnings.warn(missing, IncompleteWarning, stacklevel=2)
    return explanation


@dataclass(frozen=True)
class _Question:
    """What is asked, of which training."""

    trajectory: Trajectory
    model: nn.Module
    queries: Any
    target: TargetSpec
    rule: str = "discrete"
    memory: str | int = "1GB"

    def side(self, dtype: torch.dtype | None = None) -> QuerySide:
        """The queries' side, everything about them checked, in the model's type or another."""
        ends = Ends.of(self.trajectory, self.model, dtype)
        return QuerySide.prepare(ends, self.queries, self.target, quadrature.rule(self.rule), parse_bytes(self.memory))

    def wide_side(self) -> QuerySide:
        """The same in float64; ``ModelError`` if the model, which takes the queries in its own type, does not."""
        cause: KxError | None = None
        try:
            side = self.side(torch.float64)
            if side.dtype == torch.float64:
                return side
            problem = f"its outputs are {side.dtype} all the same"
        except KxError as error:
            problem, cause = str(error), error
        raise ModelError(
            f"the model (or the target, if it is a function) cannot compute in float64: {problem}; make what it "
            "creates follow its input's type (torch.zeros(n, dtype=x.dtype), say), or leave out the precision"
        ) from cause


def _itemised(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    side: QuerySide,
    *,
    stride: int | None,
    decay: str,
    kernel: bool,
    progress: bool,
) -> Explanation:
    """The bill of the queries, in the type that their side computes in."""
    options: dict[str, Any] = {
        "stride": stride,
        "jacobian": kernel and side.target.components is not None,
        "dtype": side.ends.dtype,
    }
    with progress_bar(progress, len(trajectory)) as tick, ExitStack() as stack:
        walk: Walk | ChordWalk | BackwardWalk
        if remembers(trajectory, decay):
            replayer, charge = stack.enter_context(Replayer(trajectory, model, dataset)), decay == "charged"
            walk = BackwardWalk(replayer, side, charge=charge, tick=tick, **options)
        else:
            options |= {"budget": side.budget // 2, "tick": tick}
            walk = stack.enter_context(forward_walk(trajectory, model, dataset, **options))
        ledger = Ledger(side, trajectory.manifest.dataset.count, len(walk.bounds) - 1, kernel=kernel)
        walk.visit(ledger)
    return ledger.explanation(trajectory, dataset, walk.bounds, walk.drift)


@contextmanager
def forward_walk(
    trajectory: Trajectory, model: nn.Module, dataset: Examples, **options: Any
) -> Iterator[Walk | ChordWalk]:
    """A pass from the start to the end: with replay, or along the chords between imported checkpoints."""
    if not trajectory.manifest.logged:
        yield ChordWalk(trajectory, model, dataset, **options)
        return
    with Replayer(trajectory, model, dataset) as replayer:
        yield Walk(replayer, **options)


def remembers(trajectory: Trajectory, decay: str) -> bool:
    """Whether the bill needs the pass backward in time: a step does more than multiply the gradient by a number."""
    optimizer = trajectory.manifest.optimizer
    decays = any(group.options.get("weight_decay") for group in optimizer.groups)
    plain = split(optimizer, trajectory.steps[0]) is not None and not (decays and decay == "charged")
    return not plain and optimizer.name in RECURSIONS


def contributions_of(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    queries: Any,
    target: TargetSpec,
    examples: Tensor,
) -> Tensor:
    """Exact contributions of some examples only, [q, k], in the order given: re-ranks a search's candidates."""
    side = _Question(trajectory, model, queries, target).side()
    with ExitStack() as stack:
        walk: Walk | ChordWalk | BackwardWalk
        if remembers(trajectory, "line"):
            walk = BackwardWalk(stack.enter_context(Replayer(trajectory, model, dataset)), side, examples=examples)
        else:
            walk = stack.enter_context(
                forward_walk(trajectory, model, dataset, budget=side.budget // 2, examples=examples)
            )
        ledger = Ledger(side, trajectory.manifest.dataset.count, len(walk.bounds) - 1, kernel=False, timeline=False)
        walk.visit(ledger)
    return ledger.contributions[:, examples, 0].to(side.dtype)
