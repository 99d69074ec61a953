"""Law 2: at stride 1 the contributions are the path integral's; and what must not matter does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

import kxexplain as kx
from tests import cases, reference
from tests.cases import CASES
from tests.laws import (
    assert_batching_irrelevant,
    assert_close,
    assert_permutes_with_data,
    assert_query_order_irrelevant,
    assert_same_bill,
    relative,
)
from tests.runs import order, run

FEW = order(14, 5, 1)
SMOOTH = list(cases.names(smooth=True, without="batch-norm"))


@pytest.mark.parametrize("name", SMOOTH)
def test_stride_one_is_the_path_integral(name: str, tmp_path: Path) -> None:
    """Within 1 % in norm of 64 Gauss–Legendre nodes on each step, SGD redone by hand."""
    case = CASES[name]
    problem = case.build(examples=10, queries=2)
    batches = order(10, 5, 1)
    nodes = 64 if name.startswith(("mlp", "scalar", "twice")) else 12
    expected = reference.path_integral(
        problem.model, problem.data, problem.loss, batches, case.rate, problem.inputs, nodes=nodes
    )
    trajectory = run(problem, tmp_path, case.rate, batches=batches)
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", stride=1, kernel=False)
    assert_close(found.contributions, expected, 1e-2)


@pytest.mark.parametrize("name", ["mlp-relu", "cnn-max", "sort", "time-maximum"])
def test_models_with_kinks_agree_too(name: str, tmp_path: Path) -> None:
    """A path integral of kinked functions needs a fine grid; agreement is then a few per cent."""
    case = CASES[name]
    problem = case.build(examples=10, queries=2)
    batches = order(10, 5, 1)
    expected = reference.path_integral(
        problem.model, problem.data, problem.loss, batches, case.rate, problem.inputs, nodes=64
    )
    trajectory = run(problem, tmp_path, case.rate, batches=batches)
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", stride=1, kernel=False)
    assert relative(found.contributions, expected) < 0.1


def test_a_jump_is_in_the_bill_but_in_no_path_integral(tmp_path: Path) -> None:
    """Where an argmax flips within a step, f jumps: ∫⟨∇f, dθ⟩ along the step is not f(θ')−f(θ), the bill is.

    So the two agree example by example on the steps that cross no jump, and cannot on the one that does. Each of the
    two steps has five examples of its own, whose contributions are therefore those of that step.
    """
    case = CASES["argmax"]
    problem = case.build(examples=10, queries=2)
    batches = order(10, 5, 1)
    model = reference.trained(problem.model, problem.data, problem.loss, batches[:1], case.rate).eval()
    integral = reference.path_integral(problem.model, problem.data, problem.loss, batches, case.rate, problem.inputs)
    with torch.no_grad():
        outputs, choices = [problem.model.eval()(problem.inputs)], [problem.model.first(problem.inputs).argmax(1)]
    trajectory = run(problem, tmp_path, case.rate, batches=batches)
    with torch.no_grad():
        for later in (model, problem.model.eval()):
            outputs.append(later(problem.inputs))
            choices.append(later.first(problem.inputs).argmax(1))
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", stride=1, kernel=False)
    jumps = []
    for step, batch in enumerate(batches):
        for query, change in enumerate(outputs[step + 1] - outputs[step]):
            ours, theirs = found.contributions[query, batch], integral[query, batch]
            assert_close(ours.sum(0), change, 1e-11)
            jumps.append(bool(choices[step][query] != choices[step + 1][query]))
            if jumps[-1]:
                assert relative(theirs.sum(0), change) > 0.5
            else:
                assert_close(theirs.sum(0), change, 1e-11)
                assert_close(ours, theirs, 1e-11)
    assert jumps == [False, False, False, True]


@pytest.mark.parametrize("target", ["predicted", "loss", "all"])
@pytest.mark.parametrize("name", ["mlp-relu", "attention-causal", "residual-batch-norm", "tied-embedding", "sort"])
def test_memory_is_irrelevant(name: str, target: str, tmp_path: Path) -> None:
    """A thousand bytes or a thousand million: portions of one query, updates handed over one step at a time."""
    problem = CASES[name].build()
    trajectory = run(problem, tmp_path)
    whole, tight, tighter = (
        kx.explain(trajectory, problem.model, problem.data, problem.queries, target, memory=memory)
        for memory in ("1GB", "40KB", 100)
    )
    assert_same_bill(whole, tight, 1e-11)
    assert_same_bill(whole, tighter, 1e-11)
    assert_close(tight.kernel, whole.kernel, 1e-10)
    assert_close(tighter.kernel, whole.kernel, 1e-10)


@pytest.mark.parametrize("name", cases.names(without="none"))
def test_queries_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    """In any order and any portions, each query has the bill it has alone."""
    problem = CASES[name].build(queries=5)
    trajectory = run(problem, tmp_path, 0.2)
    explain = lambda queries: kx.explain(  # noqa: E731
        trajectory, problem.model, problem.data, queries, "all", kernel=False
    )
    whole = explain(problem.queries)
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    assert_query_order_irrelevant(whole, explain(Subset(problem.queries, shuffled.tolist())), shuffled, 1e-10)
    parts = [explain(Subset(problem.queries, rows)) for rows in ([0], [1, 2], [3, 4])]
    assert_batching_irrelevant(whole, parts, 1e-10)


@pytest.mark.parametrize("name", ["mlp-gelu", "encoder-time-first", "residual-batch-norm", "twice", "sort"])
def test_permuting_the_data_permutes_the_contributions(name: str, tmp_path: Path) -> None:
    shuffled = torch.randperm(14)
    place = torch.argsort(shuffled)  # example i of the first is example place[i] of the second
    first, second = CASES[name].build(), CASES[name].build()
    second.data = Subset(second.data, shuffled.tolist())
    batches = order()
    runs = [
        run(first, tmp_path / "first", batches=batches),
        run(second, tmp_path / "second", batches=[[int(place[i]) for i in batch] for batch in batches]),
    ]
    bills = [
        kx.explain(trajectory, problem.model, problem.data, first.queries, "all", kernel=False)
        for trajectory, problem in zip(runs, (first, second), strict=True)
    ]
    assert_permutes_with_data(bills[0], bills[1], shuffled, 1e-10)


def test_states_kept_are_irrelevant_at_equal_stride(tmp_path: Path) -> None:
    """What is recorded and what is replayed give the same bill."""
    bills = []
    for keep in ("step", "epoch", 2, 1000):
        problem = CASES["mlp-gelu"].build()
        trajectory = run(problem, tmp_path / str(keep), keep=keep)
        bills += [
            kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", stride=stride)
            for stride in (1, 2)
        ]
    for bill in bills[2::2]:
        assert_same_bill(bill, bills[0], 1e-12)
    for bill in bills[3::2]:
        assert_same_bill(bill, bills[1], 1e-12)


def test_no_stride_means_the_recorded_states(tmp_path: Path) -> None:
    problem = CASES["mlp-gelu"].build()
    trajectory = run(problem, tmp_path, keep=2)
    by_state, by_two = (
        kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", stride=stride)
        for stride in (None, 2)
    )
    assert by_state.timeline.steps.tolist() == [0, 2, 4, 6]
    assert_same_bill(by_state, by_two, 1e-12)


def test_the_model_s_present_values_are_irrelevant(tmp_path: Path) -> None:
    problem = CASES["residual-batch-norm"].build()
    trajectory = run(problem, tmp_path)
    first = kx.explain(trajectory, problem.model, problem.data, problem.queries)
    fresh = CASES["residual-batch-norm"].build().model
    with torch.no_grad():
        for p in fresh.parameters():
            p.fill_(3.0)
    assert_same_bill(kx.explain(trajectory, fresh, problem.data, problem.queries), first, 1e-13)


def test_long_segments_rank_alike(tmp_path: Path) -> None:
    """Stride changes how closely the path is followed, not the story: the total is equal, the ranks are near."""
    problem = CASES["mlp-gelu"].build(examples=24)
    trajectory = run(problem, tmp_path, 0.05, batches=order(24, 4, 2))
    fine, coarse = (
        kx.explain(trajectory, problem.model, problem.data, problem.queries, 0, stride=stride).contributions
        for stride in (1, None)
    )
    assert_close(coarse.sum(1), fine.sum(1), 1e-10)
    for a, b in zip(fine, coarse, strict=True):
        ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.95
