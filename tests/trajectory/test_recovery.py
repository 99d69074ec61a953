from __future__ import annotations

import sqlite3

import pytest
import torch
from torch import nn

import kxexplain as kx
from kxexplain.trajectory import Trajectory, record, recover
from tests.trajectory.runs import CASES, assert_same, build, examples, named, parameters_of

DATA = examples(16)
BATCHES = [[(start + i) % 16 for i in range(5)] for start in range(0, 100, 5)]
"""An epoch ends with the fourth batch, or one of the three after, of which something is left over."""


class BrokenOffError(Exception):
    """The loop's own."""


def loop(out, case="mlp", between=None, **options):
    """The recorded loop, which goes on where it was; with the weights after every step."""
    model, optimizer, _ = build(CASES[case])
    torch.manual_seed(3)
    passed = {0: named(model)}
    with record(model, optimizer, "cross_entropy", DATA, out=out, resume=True, **options) as recorder:
        for number in range(recorder.position, len(BATCHES)):
            inputs, targets = DATA[BATCHES[number]]
            loss = nn.functional.cross_entropy(model(inputs), targets, reduction="none").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if between == number:
                raise BrokenOffError
            recorder.step(BATCHES[number], loss)
            passed[number + 1] = named(model)
    return recorder.trajectory, passed, model


def broken_off(out, **options):
    with pytest.raises(BrokenOffError):
        loop(out, **options)
    return Trajectory.open(out)


@pytest.mark.parametrize("case", ["mlp", "dropout", "batch norm", "momentum", "adamw, dropout"])
@pytest.mark.parametrize("number", [3, 9, 12, 15])
def test_a_loop_that_broke_off_between_a_step_and_its_log(tmp_path, case, number):
    """Recovered, its last state is what training had come to; gone on with, it is as if nothing had happened."""
    whole, passed, model = loop(tmp_path / "whole", case)
    trajectory = broken_off(tmp_path / "parts", case=case, between=number)
    last = max(s.step for s in whole.states if s.step <= number)
    assert (len(trajectory), trajectory.tail) == (last, number - last)
    recovered = recover(trajectory, model, DATA)
    assert (len(recovered), recovered.tail) == (number, 0)
    recovered.check_files()
    state = recovered.state(number)
    assert_same({**parameters_of(state), **state.buffers}, passed[number])
    assert recovered.steps[:] == whole.steps[:number]
    parts, _, again = loop(tmp_path / "parts", case)
    assert_same(named(again), named(model))
    assert [s.step for s in parts.states] == [s.step for s in whole.states]
    assert parts.steps[:] == whole.steps[:]


class Trap(nn.Module):
    """Its outputs are always finite, but where it meets one example the gradient of a weight is not."""

    def __init__(self, example: torch.Tensor) -> None:
        super().__init__()
        self.example = example
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        weight = self.first.weight
        if (x == self.example).all(1).any():
            weight = torch.where(weight == weight, weight, (weight - weight).sqrt())
        return self.last(nn.functional.linear(x, weight, self.first.bias))


def trapped(out, number):
    """A loop of batches of five, states every five steps, that spoils the weights in one step."""
    torch.manual_seed(4)
    data = examples(80)
    model = Trap(data[5 * number + 2][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passed = [named(model)]

    def train():
        with record(model, optimizer, "cross_entropy", data, out=out, keep=5) as recorder:
            for indices in torch.arange(80).split(5):
                inputs, targets = data[indices]
                loss = nn.functional.cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.step(indices, loss)
                passed.append(named(model))

    with pytest.raises(kx.TrainingError, match="is not finite"):
        train()
    return Trajectory.open(out), model, data, passed


@pytest.mark.parametrize("number", [1, 6, 13])
def test_weights_that_were_spoilt(tmp_path, number):
    """By a gradient that nobody looked at: what came before it can be explained."""
    trajectory, model, data, passed = trapped(tmp_path, number)
    assert (len(trajectory), trajectory.tail) == (number // 5 * 5, number % 5 + 1)
    recovered = recover(trajectory, model, data)
    assert (len(recovered), recovered.tail) == (number, 1)
    assert_same(parameters_of(recovered.state(number)), passed[number])
    recovered.check_files()
    bill = kx.explain(recovered, model, data, data[:2][0])
    assert float(bill.remainder.abs().max()) < 1e-6


def test_a_tail_of_bad_steps_only(tmp_path):
    """The first step after a state spoils the weights: there is nothing to gain."""
    trajectory, model, data, _ = trapped(tmp_path, 5)
    again = recover(trajectory, model, data)
    assert (len(again), again.tail, again.states) == (5, 1, trajectory.states)
    again.check_files()


@pytest.mark.parametrize("keep", ["epoch", "step", 3, "5kB"])
def test_states_on_the_way_are_kept(tmp_path, keep):
    """As if the process had been killed before any state but the first was written."""
    whole, passed, model = loop(tmp_path / "whole", keep=keep)
    broken_off(tmp_path / "run", between=13, keep=keep)
    with sqlite3.connect(tmp_path / "run" / "steps.sqlite") as log:
        log.execute("DELETE FROM states WHERE step > 0")
        log.execute("DELETE FROM facts WHERE key = 'stride'")
    trajectory = Trajectory.open(tmp_path / "run")
    assert (len(trajectory), trajectory.tail) == (0, 13)
    recovered = recover(trajectory, model, DATA)
    recovered.check_files()
    for state in recovered.states:
        assert_same(parameters_of(recovered.state(state.step)), passed[state.step])
    parts, _, _ = loop(tmp_path / "run", keep=keep)
    assert [s.step for s in parts.states] == [s.step for s in whole.states]
    assert parts.steps[:] == whole.steps[:]
    parts.check_files()


def test_a_trajectory_opened_before_the_run_was_over(tmp_path):
    """What was recorded since is there afterwards as before."""
    whole, _, model = loop(tmp_path / "run", keep=4)
    with sqlite3.connect(tmp_path / "run" / "steps.sqlite") as log:
        rows = log.execute("SELECT * FROM states WHERE step > 8").fetchall()
        log.execute("DELETE FROM states WHERE step > 8")
        log.commit()
        early = Trajectory.open(tmp_path / "run")
        log.executemany("INSERT INTO states VALUES (?,?,?,?)", rows)
    assert early.tail == 12
    recovered = recover(early, model, DATA)
    assert recovered.states == whole.states
    recovered.check_files()


def test_nothing_to_recover(tmp_path):
    trajectory, _, model = loop(tmp_path)
    assert recover(trajectory, model, DATA).states == trajectory.states


def test_wrong_arguments(tmp_path):
    _, _, model = loop(tmp_path / "whole")
    trajectory = broken_off(tmp_path / "run", between=6)
    with pytest.raises(kx.DatasetError):
        recover(trajectory, model, examples(15))
    with pytest.raises(kx.ModelError):
        recover(trajectory, nn.Linear(6, 3), DATA)
    assert Trajectory.open(tmp_path / "run").tail == trajectory.tail > 0
    case = CASES["steps"]
    model, optimizer, scheduler = build(case)
    scheduled = kx.train(model, DATA, optimizer=optimizer, scheduler=scheduler, epochs=2, out=tmp_path / "scheduled")
    assert len(recover(scheduled, model, DATA)) == 2
    with sqlite3.connect(tmp_path / "scheduled" / "steps.sqlite") as log:
        log.execute("DELETE FROM states WHERE step > 1")
    with pytest.raises(kx.ArgumentError, match="trained with a scheduler, whose state"):
        recover(scheduled, model, DATA)


@pytest.mark.parametrize("schedule", [None, "constant"])
def test_what_a_training_that_was_spoilt_says(tmp_path, schedule):
    """Where ``kx.recover`` helps it is named, and gets the run up to the last good step."""
    data = examples(80)
    torch.manual_seed(4)
    model = Trap(data[40][0])
    with pytest.raises(kx.TrainingError) as raised:
        kx.train(model, data, epochs=1, batch_size=5, out=tmp_path, schedule=schedule, norms=False)
    assert ("kx.recover" in str(raised.value)) == (schedule is None)
    trajectory = Trajectory.open(tmp_path)
    if schedule is None:
        assert trajectory.tail > 1
        recovered = recover(trajectory, model, data)
        assert (len(recovered), recovered.tail) == (trajectory.tail - 1, 1)
