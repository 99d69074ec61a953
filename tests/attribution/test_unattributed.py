"""Optimisers the library does not know: the bill is complete all the same, and says how much of it is no example's."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kxexplain as kx
from kxexplain.attribution.unattributed import unattributed_part
from kxexplain.errors import ArgumentError, UnattributedWarning
from tests.attribution.test_optimizers import explained
from tests.cases import CASES
from tests.laws import assert_complete, assert_timeline_agrees
from tests.runs import run


class SignDescent(torch.optim.Optimizer):
    """An optimiser of the user's own, with an argument that must be given and a state of its own."""

    def __init__(self, params: Any, rate: float, *, slow: float = 0.0) -> None:
        super().__init__(params, {"rate": rate, "slow": slow, "lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state.setdefault(p, {"mean": torch.zeros_like(p)})
                held["mean"].mul_(group["slow"]).add_(p.grad)
                p.sub_(group["rate"] * held["mean"].sign())


UNKNOWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SignDescent": lambda p: SignDescent(p, 0.003, slow=0.5),
}


def percent(explanation: kx.Explanation) -> float:
    return 100 * float(explanation.unattributed.norm() / (explanation.prediction - explanation.baseline).norm())


def said(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if w.category is UnattributedWarning]


@pytest.mark.parametrize("target", ["all", "label"])
@pytest.mark.parametrize("name", list(UNKNOWN))
def test_complete_and_the_size_is_said(name: str, target: str, tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=UNKNOWN[name](problem.model.parameters()))
    with pytest.warns(UnattributedWarning) as caught:
        explanation = explained(problem, trajectory, target, kernel=False)
    assert_complete(explanation, 1e-10)
    assert_timeline_agrees(explanation, 1e-9)
    assert float(explanation.contributions.abs().max()) == 0
    (message,) = said(caught)
    assert f"how {name} turns gradients into steps" in message
    found = re.search(r"is ([\d.e+-]+) % of the change .*\(2-norms over the 4 queries\)", message)
    assert found is not None
    assert float(found[1]) == pytest.approx(percent(explanation), rel=5e-3)


def test_a_part_of_the_whole(tmp_path: Path) -> None:
    """A parameter that moves without being the optimiser's own: half known, and the number is the bill's."""
    problem = CASES["mlp-tanh"].build()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    for p in problem.model.parameters():
        optimizer.state[p]["momentum_buffer"] = 0.1 * torch.randn_like(p)
    trajectory = run(problem, tmp_path, optimizer=optimizer)
    with pytest.warns(UnattributedWarning) as caught:
        explanation = explained(problem, trajectory)
    (message,) = said(caught)
    found = re.search(r"is ([\d.e+-]+) % of the change", message)
    assert found is not None
    assert float(found[1]) == pytest.approx(percent(explanation), rel=5e-3)
    assert 1 < percent(explanation) != pytest.approx(100, rel=0.05)
    assert float(explanation.contributions.abs().max()) > 0


def test_nothing_is_said_of_rounding(tmp_path: Path) -> None:
    """In single precision the line is not zero, and of the size that is called rounding."""
    problem = CASES["residual-batch-norm"].build(torch.float32)
    trajectory = run(problem, tmp_path, optimizer=torch.optim.AdamW(problem.model.parameters(), lr=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = explained(problem, trajectory, kernel=False)
    assert float(explanation.unattributed.abs().max()) > 0
    assert unattributed_part(explanation, trajectory) is None


def test_nothing_moved(tmp_path: Path) -> None:
    """No change to divide by, and nothing to say."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=torch.optim.NAdam(problem.model.parameters(), lr=0.0))
    explanation = explained(problem, trajectory, kernel=False)
    assert float((explanation.prediction - explanation.baseline).abs().max()) == 0
    assert float(explanation.unattributed.abs().max()) == 0


def test_an_own_class_is_given_again(tmp_path: Path) -> None:
    """Nothing on disk can give code back: the class is passed on opening, as a loss of one's own is."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=SignDescent(problem.model.parameters(), 0.003))
    with pytest.warns(UnattributedWarning):
        expected = explained(problem, trajectory, kernel=False)
    assert "SignDescent" in repr(trajectory)
    makers = [SignDescent, lambda groups: SignDescent(groups, rate=7.0)]  # the recorded options hold, not these
    for make in makers:
        with pytest.warns(UnattributedWarning, match="SignDescent"):
            again = explained(problem, kx.Trajectory.open(tmp_path, optimizer=make), kernel=False)
        assert torch.equal(again.unattributed, expected.unattributed)
    with pytest.raises(ArgumentError, match=r"'SignDescent'; pass that class: Trajectory.open\(path, optimizer="):
        explained(problem, kx.Trajectory.open(tmp_path))
    with pytest.raises(ArgumentError, match="made a SGD, but this trajectory was trained with 'SignDescent'"):
        explained(problem, kx.Trajectory.open(tmp_path, optimizer=torch.optim.SGD))
    with pytest.raises(ArgumentError, match="cannot be built"):
        explained(problem, kx.Trajectory.open(tmp_path, optimizer=lambda: None))


def test_a_class_that_need_not_be_given(tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    run(problem, tmp_path)
    with pytest.raises(ArgumentError, match=r"trained with torch\.optim\.SGD; leave out"):
        kx.Trajectory.open(tmp_path, optimizer=SignDescent)


def test_training_with_an_own_class(tmp_path: Path) -> None:
    """``kx.train`` tries it first, goes on after an interruption, and gives a trajectory that can be explained."""
    problem = CASES["mlp-tanh"].build()
    options: dict[str, Any] = {"out": tmp_path, "progress": False, "batch_size": 5}
    make = lambda p: SignDescent(p, 0.003)  # noqa: E731
    kx.train(problem.model, problem.data, problem.loss, make, epochs=1, **options)
    kx.train(problem.model, problem.data, problem.loss, make, epochs=2, resume=True, **options)
    finished = kx.train(problem.model, problem.data, problem.loss, make, epochs=2, resume=True, **options)
    with pytest.warns(UnattributedWarning, match="SignDescent"):
        assert_complete(explained(problem, finished, kernel=False), 1e-10)


def test_the_index_refuses_it(tmp_path: Path) -> None:
    """An index of nothing would be silent: it is not built."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=SignDescent(problem.model.parameters(), 0.003))
    with pytest.raises(ArgumentError, match="optimiser is SignDescent"):
        kx.GradientIndex.build(trajectory, problem.model, problem.data, dim=64)
