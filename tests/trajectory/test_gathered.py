"""Steps wait for each other before they are logged: nothing of them may be lost, or come to another step."""

from __future__ import annotations

import sqlite3
import time

import numpy as np
import pytest
import torch
from torch import nn

import kxexplain as kx
from kxexplain.trajectory import Trajectory, record, recorder, recover
from kxexplain.trajectory.groups import Groups
from kxexplain.trajectory.store import Writer
from tests.trajectory.runs import CASES, build, examples

DATA = examples()
QUIET = 20
"""So many steps, and some more, until steps are gathered."""


class BrokenOffError(Exception):
    """The loop's own."""


def run(out, steps, before=lambda number, model: None, after=lambda number: None, case="batch norm"):
    """A loop of steps on the same examples; ``before`` comes before a step, ``after`` between it and its log."""
    model, optimizer, _ = build(CASES[case])
    model.eval()  # no draws, so that it becomes quiet
    with record(model, optimizer, "cross_entropy", DATA, out=out, keep=10**6) as recorder:
        for number in range(steps):
            before(number, model)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(DATA[:4][0]), DATA[:4][1])
            loss.backward()
            optimizer.step()
            after(number)
            recorder.step(range(4), loss)
            assert recorder.position == number + 1
    return recorder.trajectory, model


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 23, 24, 25, 26, 40])
def test_all_are_logged_in_the_end(tmp_path, steps):
    trajectory, _ = run(tmp_path, steps)
    assert [step.step for step in trajectory.steps] == list(range(steps))
    losses = [step.loss for step in trajectory.steps]
    assert losses == sorted(losses, reverse=True)
    trajectory.check_files()


@pytest.mark.parametrize("number", range(QUIET, QUIET + 9))
def test_modes_of_a_step_that_was_not_logged_are_nobody_s(tmp_path, number):
    """The last step's layer is in training mode, and breaks off; those that waited were not."""

    def before(step, model):
        if step == number:
            model[1].train()

    def after(step):
        if step == number:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        run(tmp_path, 40, before, after)
    trajectory = Trajectory.open(tmp_path)
    assert trajectory.tail == number
    assert set(trajectory.modes) == {0}
    assert len(recover(trajectory, build(CASES["batch norm"])[0], DATA)) == number


@pytest.mark.parametrize("number", range(QUIET, QUIET + 9))
def test_modes_that_change(tmp_path, number):
    trajectory, _ = run(tmp_path, 40, lambda step, model: model[3].train(step >= number), case="dropout")
    assert set(trajectory.modes) == {0, number}


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, failing):
    """Rows that could not be written are written later, each once."""
    flush, calls = Writer.flush, []

    def full(writer):
        calls.append(len(writer._rows))
        if len(calls) == failing + 1:  # after the first state's
            raise kx.TrajectoryError("the disk is full")
        flush(writer)

    monkeypatch.setattr(Writer, "flush", full)
    monkeypatch.setattr("kxexplain.trajectory.store.FLUSH_ROWS", 3)
    model, optimizer, _ = build(CASES["mlp"])
    failed = []
    with record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=10**6) as recorder:
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(DATA[:4][0]), DATA[:4][1]).backward()
            optimizer.step()
            try:
                recorder.step(range(4))
            except kx.TrajectoryError:
                failed.append(recorder.position)
    assert len(failed) == 1
    trajectory = recorder.trajectory
    assert [step.step for step in trajectory.steps] == list(range(40))
    trajectory.check_files()


def test_slow_steps_do_not_wait(tmp_path, monkeypatch):
    """Once steps are slow, all but the last are in the log, whatever becomes of the loop."""
    monkeypatch.setattr(recorder, "GATHERED_SECONDS", 0.01)
    monkeypatch.setattr("kxexplain.trajectory.store.FLUSH_SECONDS", 0.01)
    logged = []

    def after(number):
        if number > QUIET:
            time.sleep(0.02)
            with sqlite3.connect(tmp_path / "steps.sqlite") as log:
                logged.append((number, log.execute("SELECT COUNT(*) FROM steps").fetchone()[0]))

    run(tmp_path, QUIET + 6, after=after)
    assert all(found >= number - 1 for number, found in logged[2:])


class TestGroups:
    def test_rates_that_change_in_place(self):
        """A rate, or another option, that is a tensor can change without being replaced."""
        rate = torch.tensor(0.1)
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate)
        groups = Groups(optimizer)
        assert groups.rates(0) == groups.rates(1) == pytest.approx((0.1,))
        rate.fill_(0.05)
        assert groups.rates(2) == pytest.approx((0.05,))

    @pytest.mark.parametrize("rate", [0.2, 1, np.float64(0.2)])
    def test_rates_of_any_kind(self, rate):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        groups = Groups(optimizer)
        assert groups.rates(0) == (0.1,)
        optimizer.param_groups[0]["lr"] = rate
        assert groups.rates(1) == groups.rates(2) == (float(rate),)
        optimizer.param_groups[0]["lr"] = 0.1
        assert groups.rates(3) == (0.1,)

    def test_two_groups(self):
        first, second = (torch.zeros(1, requires_grad=True) for _ in range(2))
        optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
        groups = Groups(optimizer)
        assert groups.rates(0) == (0.1, 0.2)
        optimizer.param_groups[1]["lr"] = 0.3
        assert groups.rates(1) == (0.1, 0.3)
        optimizer.param_groups[0]["momentum"] = 0.5
        with pytest.raises(kx.TrainingError, match=r"momentum changed from 0 to 0\.5 by step 2"):
            groups.rates(2)
        optimizer.param_groups[0]["momentum"] = 0
        optimizer.param_groups[0]["params"].append(second)
        with pytest.raises(kx.TrainingError, match="more parameters, or fewer"):
            groups.rates(3)
        optimizer.param_groups[0]["params"].pop()
        del optimizer.param_groups[0]["dampening"]
        with pytest.raises(kx.TrainingError, match="option 'dampening' is gone"):
            groups.rates(4)

    def test_an_optimizer_without_options(self):
        class Own(torch.optim.Optimizer):
            def step(self):
                pass

        groups = Groups(Own([torch.zeros(1, requires_grad=True)], {"lr": 0.1}))
        assert groups.rates(0) == groups.rates(1) == (0.1,)
