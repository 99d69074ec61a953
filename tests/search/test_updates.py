"""What the index adds up: every example's share of the movement in every segment, under every optimiser."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kxexplain as kx
from kxexplain.attribution.decompose import contributions_of
from kxexplain.attribution.queries import Ends, QuerySide
from kxexplain.attribution.walk import Walk
from kxexplain.errors import ArgumentError
from kxexplain.gradients import Factors
from kxexplain.gradients.projection import Projection
from kxexplain.kernels import quadrature
from kxexplain.search import GradientIndex, carried
from kxexplain.search.features import query_features, recorded_segments
from kxexplain.search.updates import UpdateFeatures, projection_for, update_features
from kxexplain.trajectory import Replayer
from tests.attribution.test_optimizers import OPTIMIZERS, carried_forward
from tests.cases import CASES, Problem
from tests.runs import order, run


class Whole(Projection):
    """Projects nothing: the coordinates of a segment's block are the parameters themselves."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], segments: int) -> None:
        super().__init__(shapes, segments, 16)
        self.sizes = {name: rows * columns for name, (rows, columns) in self.shapes.items()}
        self.blocks, self.dim = segments, segments * sum(self.sizes.values())

    def __call__(self, factors: Factors, segment: int) -> Tensor:
        n = factors[0].rows
        room = {name: torch.zeros(n, 1, size, dtype=torch.float64) for name, size in self.sizes.items()}
        for part in (part for factor in factors for part in factor.dense()):
            room[part.weight] += part.values
        return torch.cat(list(room.values()), 2)


def exact_features(problem: Problem, trajectory: kx.Trajectory) -> Tensor:
    """P_{s,i} unprojected, [n, s, p]."""
    shapes = {name: tuple(p.shape) for name, p in problem.model.named_parameters()}
    projection = Whole(shapes, len(trajectory.states) - 1)
    found = update_features(trajectory, problem.model, problem.data, projection)
    assert found is not None
    return found.view(len(found), projection.blocks, -1).double()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_updates_are_those_carried_forward_by_hand(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of three steps: a moment carries most of a gradient into later ones."""
    monkeypatch.setattr(carried, "ELEMENTS", 500)  # portions of a few examples
    problem = CASES["mlp-relu"].build(torch.float64)
    batches = order(epochs=3)
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()), batches=batches, keep=3)
    by_hand = CASES["mlp-relu"].build(torch.float64)
    moved, _ = carried_forward(by_hand, OPTIMIZERS[name](by_hand.model.parameters()), batches)
    borders = [state.step for state in trajectory.states]
    wanted = torch.stack([moved[first:last].sum(0) for first, last in pairwise(borders)], 1)
    found = exact_features(problem, trajectory)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_sketches_are_unbiased(name: str, tmp_path: Path) -> None:
    """Mean of the index' inner products over 200 seeds within three standard errors of the exact bill."""
    problem = CASES["mlp-relu"].build(torch.float64, examples=6, queries=2)
    batches = order(6, 3, 2)
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()), batches=batches)
    parts = (trajectory, problem.model, problem.data)
    exact = kx.explain(*parts, problem.queries, 0, kernel=False).contributions
    side = QuerySide.prepare(Ends.of(trajectory, problem.model), problem.queries, 0, quadrature.rule("discrete"), 10**6)
    found = []
    for seed in range(200):
        projection = projection_for(trajectory, 64, seed=seed)
        queries = query_features(recorded_segments(trajectory, torch.device("cpu")), side, projection)
        features = update_features(*parts, projection)
        assert features is not None
        found.append(queries.double() @ features.T.double())
    values = torch.stack(found)
    assert ((values.mean(0) - exact).abs() / (values.std(0) / 200**0.5)).max() <= 3


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_reranked_under_momentum_and_adam(name: str, tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build(torch.float64)
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()), batches=order())
    parts = (trajectory, problem.model, problem.data)
    bill = kx.explain(*parts, problem.queries, 0, kernel=False)
    found = GradientIndex.build(*parts, dim=64).search(problem.queries, 3, 0, rerank=4)
    torch.testing.assert_close(found.proponents.contributions, bill.contributions.gather(1, found.proponents.ids))
    torch.testing.assert_close(found.opponents.contributions, bill.contributions.gather(1, found.opponents.ids))


@pytest.mark.parametrize("name", ["sgd-decay", "adam"])
@pytest.mark.parametrize("keep", [1, 3, 100])
def test_contributions_of_some_are_those_of_the_bill(name: str, keep: int, tmp_path: Path) -> None:
    """Steps without them are not looked at, segments without them skipped."""
    problem = CASES["mlp-relu"].build(torch.float64)
    make = {"sgd-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01), "adam": torch.optim.Adam}[name]
    trajectory = run(problem, tmp_path, optimizer=make(problem.model.parameters()), batches=order(epochs=3), keep=keep)
    parts = (trajectory, problem.model, problem.data)
    bill = kx.explain(*parts, problem.queries, 0, kernel=False).contributions
    ids = torch.tensor([5, 2])
    torch.testing.assert_close(contributions_of(*parts, problem.queries, 0, ids), bill[:, ids])
    with Replayer(*parts) as replayer:
        walk, redone = Walk(replayer, examples=ids), []
        advance = replayer.advance
        replayer.advance = lambda *a: (redone.append(replayer.position), advance(*a))[1]  # type: ignore[method-assign]
        if name == "sgd-decay":
            walk.visit(UpdateFeatures(projection_for(trajectory, 16), ids, len(problem.data)))
            wanted = {t for t, step in enumerate(trajectory.steps) if set(step.indices) & {5, 2}}
            assert wanted <= set(redone)
            assert keep > 1 or set(redone) == wanted


def test_an_optimiser_nobody_can_divide_is_told(tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build(torch.float64)
    rprop = torch.optim.Rprop(problem.model.parameters())
    trajectory = run(problem, tmp_path, optimizer=rprop)
    with pytest.raises(ArgumentError, match=r"is Rprop, whose steps are not divided .* SGD, Adam"):
        GradientIndex.build(trajectory, problem.model, problem.data)
