from __future__ import annotations

import itertools
import math
import os
import signal
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kxexplain.errors import ArgumentError, DatasetError, ModelError, TrainingError, TrajectoryError
from kxexplain.trajectory import Trajectory, record
from kxexplain.trajectory.observe import gradient_norm
from kxexplain.trajectory.store import Writer
from tests.trajectory.runs import (
    CASES,
    Case,
    assert_same,
    build,
    examples,
    mlp,
    named,
    parameters_of,
    plain_loop,
    sgd,
    unchecked,
)

DATA = examples()
STEPS = 18  # three epochs of 22 examples in batches of 4


def run(out, case=CASES["mlp"], **options):
    """A hand-written loop, recorded; and the states it went through."""
    model, optimizer, scheduler = build(case)
    told = options.pop("told", False)
    passed = [named(model)]
    with record(model, optimizer, case.loss, DATA, out=out, **options) as recorder:

        def after(indices, loss, epoch):
            recorder.step(indices, loss, epoch=epoch if told else None)
            passed.append(named(model))

        plain_loop(model, optimizer, scheduler, DATA, loss=case.loss, after=after)
    return recorder.trajectory, passed


@pytest.mark.parametrize("told", [True, False])
def test_round_trip(tmp_path, told):
    trajectory, passed = run(tmp_path / "run", keep="step", told=told, seed=3)
    again = Trajectory.open(tmp_path / "run")
    for opened in (trajectory, again):
        assert len(opened) == len(opened.steps) == STEPS
        assert [state.step for state in opened.states] == list(range(STEPS + 1))
        assert opened.tail == 0
        assert opened.manifest.seed == 3
        for step in range(STEPS + 1):
            assert_same(parameters_of(opened.state(step)), passed[step])
    assert [step.epoch for step in again.steps] == [0] * 6 + [1] * 6 + [2] * 6
    assert again.steps[-1] == again.steps[STEPS - 1] == again.steps[STEPS - 2 :][1]
    assert sorted(i for step in again.steps[:6] for i in step.indices.tolist()) == list(range(22))
    assert "18 steps" in repr(again)
    again.check_files()
    again.check_dataset(DATA)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_recording_changes_nothing(tmp_path, case):
    data = examples(loss=case.loss)
    model, optimizer, scheduler = build(case)
    plain_loop(model, optimizer, scheduler, data, loss=case.loss)
    other, optimizer, scheduler = build(case)
    with record(other, optimizer, case.loss, data, out=tmp_path) as recorder:
        plain_loop(other, optimizer, scheduler, data, loss=case.loss, after=lambda i, loss, e: recorder.step(i, loss))
    assert_same(named(other), named(model))
    assert not other._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("norms", [True, False])
def test_steps_say_what_happened(tmp_path, norms):
    model, optimizer, _ = build(Case(optimizer=sgd(lr=0.5)))
    inputs, targets = DATA[[4, 2, 20]]
    with record(model, optimizer, "cross_entropy", DATA, out=tmp_path, norms=norms) as recorder:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.25  # what a scheduler does
        recorder.step([4, 2, 20], loss)
    step = recorder.trajectory.steps[0]
    assert (step.rates, step.indices.tolist(), step.sign, step.clip) == ((0.5,), [4, 2, 20], 1, 1.0)
    assert step.loss == loss.item()
    assert step.gradient_norm == pytest.approx(norm if norms else math.nan, rel=1e-6, nan_ok=True)
    if not norms:
        with pytest.raises(ArgumentError, match=r"without gradient norms; record with norms=True"):
            recorder.trajectory.norms()


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("step", list(range(19))),
        ("epoch", [0, 6, 12, 18]),
        (4, [0, 4, 8, 12, 16, 18]),
        (9, [0, 9, 18]),
        (100, [0, 18]),
        ("1GB", list(range(19))),
    ],
)
def test_states_kept(tmp_path, keep, expected):
    trajectory, passed = run(tmp_path, keep=keep)
    assert [state.step for state in trajectory.states] == expected
    assert sorted(os.listdir(tmp_path / "states")) == [state.file for state in trajectory.states]
    for step in expected:
        assert_same(parameters_of(trajectory.state(step)), passed[step])


@pytest.mark.parametrize("states", [2, 3, 4, 7, 12])
def test_budget_doubles_the_stride(tmp_path, states):
    size = run(tmp_path / "all", keep="step")[0].states[0].bytes
    trajectory, _ = run(tmp_path / "thin", keep=f"{states * size + size // 2}B")
    steps = [state.step for state in trajectory.states]
    strides = {b - a for a, b in itertools.pairwise(steps[:-1])}
    assert steps[0] == 0
    assert steps[-1] == STEPS
    assert len(strides) <= 1
    assert all(stride & (stride - 1) == 0 for stride in strides)
    assert len(steps) <= states + 1  # the last one may lie off the grid
    assert len(steps) >= min(states // 2, STEPS)
    trajectory.check_files()


def test_epochs_that_the_loop_cuts_short(tmp_path):
    """Told epochs of two steps: the state is kept with the first step of the next."""
    model, optimizer, _ = build(CASES["mlp"])
    with record(model, optimizer, "cross_entropy", DATA, out=tmp_path) as recorder:
        for epoch in range(3):
            for indices in ([0, 1], [2, 3]):
                model(DATA[indices][0]).sum().backward()
                optimizer.step()
                recorder.step(indices, epoch=epoch)
    assert [state.step for state in recorder.trajectory.states] == [0, 3, 5, 6]
    assert [step.epoch for step in recorder.trajectory.steps] == [0, 0, 1, 1, 2, 2]


def one_step(model, optimizer, indices=(0, 1), before=lambda: None):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(DATA[list(indices)][0]), DATA[list(indices)][1])
    loss.backward()
    before()
    optimizer.step()
    return loss


def recording(recorder, *acts):
    """Do the acts, one after the other, inside the recorder's block."""
    with recorder:
        for act in acts:
            act()


class TestStepsPastTheRecorder:
    def begin(self, tmp_path, optimizer=None):
        self.model, own, _ = build(CASES["mlp"])
        self.optimizer = optimizer(self.model) if optimizer else own
        self.recorder = record(self.model, self.optimizer, "cross_entropy", DATA, out=tmp_path, keep=100)
        return self.recorder

    def train(self):
        one_step(self.model, self.optimizer)

    def log(self):
        self.recorder.step([0, 1])

    def step(self, indices, **values):
        unchecked(type(self.recorder).step)(self.recorder, indices, **values)

    def test_two_optimizer_steps(self, tmp_path):
        with pytest.raises(TrainingError, match="second optimizer"):
            recording(self.begin(tmp_path), self.train, self.log, self.train, self.train)
        trajectory = Trajectory.open(tmp_path)
        assert (len(trajectory), trajectory.tail) == (0, 1)

    def test_no_optimizer_step(self, tmp_path):
        with pytest.raises(TrainingError, match=r"without an optimizer\.step"):
            recording(self.begin(tmp_path), self.train, self.log, self.log)
        assert len(Trajectory.open(tmp_path)) == 1

    def test_another_optimizer(self, tmp_path):
        def train():
            one_step(self.model, torch.optim.SGD(self.model.parameters()))

        with pytest.raises(TrainingError, match=r"without an optimizer\.step"):
            recording(self.begin(tmp_path), train, self.log)

    def test_last_step_not_logged(self, tmp_path):
        with pytest.raises(TrainingError, match="not followed"):
            recording(self.begin(tmp_path), self.train, self.log, self.train)
        trajectory = Trajectory.open(tmp_path)
        assert (len(trajectory), trajectory.tail) == (0, 1)

    @pytest.mark.parametrize("indices", [[], [22], [-1], [0.5], [[0]], ["a"], torch.tensor([0.0])], ids=str)
    def test_indices_that_are_no_examples(self, tmp_path, indices):
        with pytest.raises((ArgumentError, TypeError), match="indices"):
            recording(self.begin(tmp_path), self.train, lambda: self.recorder.step(indices))
        assert len(Trajectory.open(tmp_path)) == 0

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"epoch": "first"}, "epoch must be an integer"),
            ({"epoch": -3}, "epoch must be an integer"),
            ({"epoch": 1.5}, "epoch must be an integer"),
            ({"epoch": True}, "epoch must be an integer"),
            ({"epoch": 2**63}, "epoch must be an integer"),
            ({"sign": 2.5}, "sign must be 1 or -1"),
            ({"sign": 0}, "sign must be 1 or -1"),
            ({"sign": "+"}, "sign must be one number"),
            ({"clip": float("nan")}, "clip must be a finite factor"),
            ({"clip": -0.5}, "clip must be a finite factor"),
            ({"clip": "a"}, "clip must be one number"),
            ({"loss": torch.zeros(2)}, r"loss must be one number, got a tensor of shape \(2,\)"),
            ({"loss": "x"}, "loss must be one number, got 'x'"),
            ({"loss": 1j}, "loss must be one number"),
            ({"indices": [[1], [2, 3]]}, "indices must be a list"),
        ],
        ids=str,
    )
    def test_values_that_would_spoil_the_run(self, tmp_path, values, words):
        with pytest.raises(ArgumentError, match=words):
            recording(self.begin(tmp_path), self.train, lambda: self.step(**{"indices": [0, 1], **values}))
        assert (len(Trajectory.open(tmp_path)), Trajectory.open(tmp_path).tail) == (0, 0)
        Trajectory.open(tmp_path).check_files()

    def test_factors_of_other_types(self, tmp_path):
        recorder = self.begin(tmp_path)
        values = {"sign": np.int64(-1), "clip": torch.tensor(0.5), "epoch": np.int64(4), "loss": torch.tensor([0.25])}
        recording(recorder, self.train, lambda: self.step([0, 1], **values))
        step = recorder.trajectory.steps[0]
        assert (step.sign, step.clip, step.epoch, step.loss) == (-1, 0.5, 4, 0.25)

    def test_cycled_momentum(self, tmp_path):
        recorder = self.begin(tmp_path, lambda model: sgd(momentum=0.9)(model.parameters()))

        def cycle():
            self.optimizer.param_groups[0]["momentum"] = 0.8

        with pytest.raises(TrainingError, match=r"momentum changed from 0\.9 to 0\.8"):
            recording(recorder, cycle, self.train, self.log)

    def test_autocast(self, tmp_path):
        with (
            pytest.raises(TrainingError, match="autocast"),
            self.begin(tmp_path),
            torch.autocast("cpu", torch.bfloat16),
        ):
            self.model(DATA[:2][0])

    def test_outside_the_block(self, tmp_path):
        recorder = self.begin(tmp_path)
        with pytest.raises(TrainingError, match="inside its `with` block"):
            recorder.step([0])
        with pytest.raises(TrainingError, match="complete when"):
            _ = recorder.trajectory
        with recorder:
            pass
        assert len(recorder.trajectory) == 0
        with pytest.raises(TrainingError, match="one run"):
            recorder.__enter__()


@pytest.mark.parametrize("stop", [2, 10, 23])
def test_resumed_after_the_loop_had_drawn_for_a_step(tmp_path, stop):
    """The generator is set to what the last logged step left, not to what the step that never was drew."""

    def loop(recorder, model, optimizer, until):
        while recorder.position < 30:
            indices = torch.randint(0, 22, (4,))
            if recorder.position == until:
                raise ZeroDivisionError
            one_step(model, optimizer, indices.tolist())
            recorder.step(indices)

    found = []
    for name, until in (("whole", None), ("parts", stop)):
        model, optimizer, _ = build(CASES["mlp"])
        torch.manual_seed(4)
        if until is not None:
            with (
                pytest.raises(ZeroDivisionError),
                record(model, optimizer, "cross_entropy", DATA, out=tmp_path / name, keep=1000) as recorder,
            ):
                loop(recorder, model, optimizer, until)
        resumed = record(model, optimizer, "cross_entropy", DATA, out=tmp_path / name, keep=1000, resume=True)
        with resumed:
            loop(resumed, model, optimizer, None)
        found.append(named(model))
    assert_same(*found)


class TestNotFinite:
    def run(self, tmp_path, spoil, steps=3):
        """``steps`` good steps, then one that ``spoil`` has spoilt."""
        model, optimizer, _ = build(CASES["batch norm"])
        passed = []
        with record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=100) as recorder:
            for number in range(steps + 1):
                optimizer.zero_grad()
                passed.append(named(model))
                loss = nn.functional.cross_entropy(model(DATA[:5][0]), DATA[:5][1])
                if number == steps:
                    loss = spoil(loss, model)
                loss.backward()
                optimizer.step()
                recorder.step(range(5), loss)
        return passed

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_norm_of_large_gradients(self, dtype):
        gradients = [torch.full((1000,), 31.8, dtype=dtype), torch.full((10, 100), 4000.0, dtype=dtype)]
        expected = torch.cat([g.double().reshape(-1) for g in gradients]).norm().item()
        assert gradient_norm(gradients) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_gradient(self, tmp_path, value):
        with pytest.raises(TrainingError, match="gradient at step 3 is not finite"):
            self.run(tmp_path, lambda loss, model: loss * value)
        trajectory = Trajectory.open(tmp_path)
        assert (len(trajectory), trajectory.tail) == (3, 0)
        assert [state.step for state in trajectory.states] == [0, 3]
        trajectory.check_files()

    @pytest.mark.parametrize("norms", [True, False])
    def test_gradient_of_some_parameters(self, tmp_path, norms):
        """One that the loss does not show: all are looked at with norms, and without them the states are."""
        model, optimizer, _ = build(CASES["mlp"])
        recorder = record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=2, norms=norms)

        def spoilt():
            one_step(model, optimizer, before=lambda: model[0].weight.grad.fill_(math.inf))

        acts = [lambda: one_step(model, optimizer), lambda: recorder.step([0, 1])]
        wanted = "gradient at step 3 is not finite" if norms else "parameter is not finite after 4 steps"
        with pytest.raises(TrainingError, match=wanted):
            recording(recorder, *acts, *acts, *acts, spoilt, acts[1])
        trajectory = Trajectory.open(tmp_path)
        assert (len(trajectory), trajectory.tail) == ((3, 0) if norms else (2, 2))
        trajectory.check_files()

    @pytest.mark.parametrize("first", [nn.Linear(6, 1, bias=False), nn.Linear(6, 100)])
    def test_gradient_of_models_without_a_short_bias(self, tmp_path, first):
        model = nn.Sequential(first, nn.Linear(first.out_features, 200))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        start = named(model)
        backward = lambda: (model(DATA[:9][0]).sum() * math.nan).backward()  # noqa: E731
        with pytest.raises(TrainingError, match="gradient at step 0 is not finite"):
            recording(record(model, optimizer, "cross_entropy", DATA, out=tmp_path), backward, optimizer.step)
        assert_same(named(model), start)

    def test_state_before_the_bad_step_has_its_buffers(self, tmp_path):
        """The spoilt forward pass has moved the running statistics; the state must not have them."""
        model, optimizer, _ = build(CASES["batch norm"])
        recorder = record(model, optimizer, "cross_entropy", DATA, out=tmp_path, keep=100)
        good = {}

        def fail():
            good.update(named(model))
            model(DATA[:9][0])
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            recording(recorder, lambda: one_step(model, optimizer), lambda: recorder.step([0, 1]), fail)
        assert not torch.equal(named(model)["1.running_mean"], good["1.running_mean"])
        assert_same(parameters_of(Trajectory.open(tmp_path).state(1)), good)

    def test_loss_alone(self, tmp_path):
        model, optimizer, _ = build(CASES["mlp"])
        recorder = record(model, optimizer, "cross_entropy", DATA, out=tmp_path)
        acts = [lambda: one_step(model, optimizer), lambda: recorder.step([0, 1])]
        with pytest.raises(TrainingError, match="loss at step 1 is nan"):
            recording(recorder, *acts, acts[0], lambda: recorder.step([0, 1], float("nan")))
        trajectory = Trajectory.open(tmp_path)
        assert (len(trajectory), trajectory.tail) == (0, 1)

    def test_parameters(self, tmp_path):
        model, optimizer, _ = build(Case(optimizer=sgd(lr=1e38)))
        recorder = record(model, optimizer, "cross_entropy", DATA, out=tmp_path)

        def leap():
            (1000 * model(DATA[:9][0]).sum()).backward()
            optimizer.step()

        with pytest.raises(TrainingError, match="not finite after 1 steps"):
            recording(recorder, leap, lambda: recorder.step([0, 1]))
        assert len(Trajectory.open(tmp_path)) == 0

    def test_initial_parameters(self, tmp_path):
        model, optimizer, _ = build(CASES["mlp"])
        model[0].bias.data.fill_(float("nan"))
        with pytest.raises(TrainingError, match="initial weights"), record(model, optimizer, "mse", DATA, out=tmp_path):
            pass
        assert not any(tmp_path.iterdir())
        assert not optimizer._optimizer_step_pre_hooks


class Closing(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Unlike(torch.optim.SGD):
    def __init__(self, rate, params):
        super().__init__(params, lr=rate)


def nothing_trainable():
    return mlp().requires_grad_(False)


BAD = {
    "nothing trainable": (nothing_trainable, ModelError, "no trainable"),
    "lazy": (lambda: nn.LazyLinear(3), ModelError, "no shape yet"),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD.values(), ids=BAD.keys())
def test_models_that_cannot_be_recorded(tmp_path, make, error, words):
    model = make()
    with pytest.raises(error, match=words):
        record(model, torch.optim.SGD(model.parameters()), "mse", DATA, out=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS cannot be replayed"),
        (lambda p: Closing(p), "Closing cannot be replayed"),
        (lambda p: Unlike(0.1, p), "Unlike' cannot be built"),
        (lambda p: torch.optim.SGD([*p, nn.Parameter(torch.zeros(7))]), r"shape \(7,\) that is not the model's"),
        (lambda p: torch.optim.SGD([q for q in p if not q.requires_grad]), "no trainable"),
    ],
)
def test_optimizers_that_cannot_be_recorded(tmp_path, make, words):
    model, _, _ = build(CASES["frozen"])
    with pytest.raises(ArgumentError, match=words):
        record(model, make(list(model.parameters())), "mse", DATA, out=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "mean"}, ArgumentError, "unknown loss"),
        ({"keep": "sometimes"}, ArgumentError, "unknown keep"),
        ({"keep": "10B"}, ArgumentError, "too few"),
        ({"dataset": TensorDataset(torch.zeros(0, 6), torch.zeros(0))}, DatasetError, "empty"),
    ],
)
def test_other_arguments_that_are_wrong(tmp_path, options, error, words):
    model, optimizer, _ = build(CASES["mlp"])
    values = {"loss": "mse", "dataset": DATA, **options}
    with pytest.raises(error, match=words):
        record(model, optimizer, values.pop("loss"), values.pop("dataset"), out=tmp_path, **values)
    assert not any(tmp_path.iterdir())


class TestFolder:
    def record(self, out, **options):
        model, optimizer, _ = build(CASES["mlp"])
        with record(model, optimizer, "cross_entropy", DATA, out=out, **options) as recorder:
            one_step(model, optimizer)
            recorder.step([0, 1])
        return recorder.trajectory

    @pytest.mark.parametrize("option", ["overwrite", "resume"])
    def test_nothing_is_written_before_the_block(self, tmp_path, option):
        model, optimizer, _ = build(CASES["mlp"])
        for _ in range(2):
            record(model, optimizer, "cross_entropy", DATA, out=tmp_path / "run", **{option: True})
        assert not (tmp_path / "run").exists()
        self.record(tmp_path / "run")
        for _ in range(2):
            recorder = record(model, optimizer, "cross_entropy", DATA, out=tmp_path / "run", **{option: True})
            assert len(Trajectory.open(tmp_path / "run")) == 1
        with recorder:
            assert recorder.position == (option == "resume")
        assert len(recorder.trajectory) == (option == "resume")

    def test_foreign_folders_are_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years")
        for overwrite in (False, True):
            with pytest.raises(TrajectoryError, match="no trajectory"):
                self.record(tmp_path, overwrite=overwrite)
        assert os.listdir(tmp_path) == ["thesis.txt"]

    def test_overwrite_replaces_only_its_own(self, tmp_path):
        self.record(tmp_path, keep="step")
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(TrajectoryError, match="overwrite=True"):
            self.record(tmp_path)
        trajectory = self.record(tmp_path, overwrite=True)
        assert len(trajectory) == 1
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(TrajectoryError, match="is a file"):
            self.record(tmp_path / "file")
        with pytest.raises(TrajectoryError, match="file"):
            self.record(tmp_path / "file" / "below")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_unwritable(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(TrajectoryError, match="cannot be"):
            self.record(tmp_path / "below")

    def test_device_that_refuses_files(self):
        with pytest.raises(TrajectoryError, match="cannot be made"):
            self.record("/proc/kxexplain")


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm", "momentum", "adamw, dropout"])
@pytest.mark.parametrize("stopped", [0, 1, 5, 6, 7, STEPS])
def test_a_loop_of_one_s_own_goes_on(tmp_path, name, stopped):
    """Interrupted anywhere and gone on with, a loop leaves the trajectory it would have left."""
    case = CASES[name]
    batches = [list(range(start, min(start + 4, 22))) for start in range(0, 22, 4)] * 3

    def loop(out, upto, **options):
        model = case.model()
        optimizer = case.optimizer(model.parameters())
        with record(model, optimizer, "cross_entropy", DATA, out=out, **options) as recorder:
            for indices in batches[recorder.position : upto]:
                inputs, targets = DATA[indices]
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                recorder.step(indices, loss)
        return recorder.trajectory, named(model)

    torch.manual_seed(1)
    whole, ended = loop(tmp_path / "whole", STEPS, resume=True)  # nothing there yet: it begins
    torch.manual_seed(1)
    loop(tmp_path / "parts", stopped)
    torch.manual_seed(2)  # whatever the new process' generators hold
    parts, arrived = loop(tmp_path / "parts", STEPS, resume=True)
    assert_same(arrived, ended)
    assert parts.steps[:] == whole.steps[:]
    assert_same(parameters_of(parts.state(STEPS)), parameters_of(whole.state(STEPS)))
    parts.check_files()


def test_what_cannot_be_gone_on_with(tmp_path):
    run(tmp_path / "run", keep="step")
    model = mlp()
    with pytest.raises(ArgumentError, match="exclude"):
        record(model, sgd()(model.parameters()), "mse", DATA, out=tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(ArgumentError, match="another keep"):
        record(model, sgd()(model.parameters()), "cross_entropy", DATA, out=tmp_path / "run", resume=True)
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    options = {"out": tmp_path / "run", "resume": True, "keep": "step"}
    with pytest.raises(ModelError):
        record(other, sgd()(other.parameters()), "cross_entropy", DATA, **options)


@pytest.mark.parametrize("stopped", [4, 6, 7, 9, 13, 17])
def test_epochs_end_where_they_would_have(tmp_path, stopped):
    """Batches of 5 of 16 examples: what an epoch leaves over counts for the next, after an interruption as well."""
    data = examples(16)
    batches = [[(start + i) % 16 for i in range(5)] for start in range(0, 100, 5)]

    def loop(out, upto):
        model, optimizer, _ = build(CASES["mlp"])
        with record(model, optimizer, "cross_entropy", data, out=out, resume=True) as recorder:
            for indices in batches[recorder.position : upto]:
                one_step(model, optimizer, indices)
                recorder.step(indices)
        return recorder.trajectory

    whole = loop(tmp_path / "whole", 20)
    assert [state.step for state in whole.states] == [0, 4, 7, 10, 13, 16, 20]
    loop(tmp_path / "parts", stopped)
    parts = loop(tmp_path / "parts", 20)
    assert [state.step for state in parts.states] == [0, 4, 7, 10, 13, 16, 20]
    assert parts.steps[:] == whole.steps[:]


class TestInterrupted:
    """Ctrl-C while the recorder is at work."""

    def loop(self, out, patch=lambda recorder: None, steps=12, **options):
        model, optimizer, _ = build(CASES["mlp"])
        with record(model, optimizer, "cross_entropy", DATA, out=out, keep=2, **options) as recorder:
            patch(recorder)
            for _ in range(recorder.position, steps):
                loss = one_step(model, optimizer)
                recorder.step([0, 1], loss)
        return recorder.trajectory

    @pytest.mark.parametrize(
        "name", ["append", "flush", "flush_all", "settle", "put_state", "drop_state", "_write_state", "_transaction"]
    )
    @pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
    def test_the_run_opens_and_goes_on(self, tmp_path, monkeypatch, name, late):
        original, calls = getattr(Writer, name), []

        def interrupting(*args, **options):
            calls.append(name)
            if len(calls) == 3 and not late:
                signal.raise_signal(signal.SIGINT)
            result = original(*args, **options)
            if len(calls) == 3 and late:
                signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(Writer, name, interrupting)
        handler = signal.getsignal(signal.SIGINT)
        try:
            self.loop(tmp_path / "run")
        except KeyboardInterrupt:
            pass
        else:
            assert len(calls) < 3
        assert signal.getsignal(signal.SIGINT) is handler
        monkeypatch.undo()
        stopped = Trajectory.open(tmp_path / "run")
        stopped.check_files()
        if name != "_write_state":  # a thread's: its Ctrl-C may come between the optimiser's step and the recorder's
            assert stopped.tail == 0
        files = sorted(path.name for path in (tmp_path / "run" / "states").iterdir())
        assert files == [state.file for state in stopped.states]
        again = self.loop(tmp_path / "run", resume=True)
        whole = self.loop(tmp_path / "whole")
        assert again.steps[:] == whole.steps[:]
        again.check_files()

    def test_on_entering(self, tmp_path, monkeypatch):
        create = Writer.create

        def interrupting(*args):
            signal.raise_signal(signal.SIGINT)
            return create(*args)

        monkeypatch.setattr(Writer, "create", interrupting)
        with pytest.raises(KeyboardInterrupt):
            self.loop(tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(Trajectory.open(tmp_path)) == 0
        assert not list(tmp_path.glob("*-wal"))

    def test_between_steps_at_once(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            self.loop(tmp_path, lambda recorder: signal.raise_signal(signal.SIGINT))
        assert len(Trajectory.open(tmp_path)) == 0

    def test_a_handler_of_one_s_own(self, tmp_path, monkeypatch):
        heard, append = [], Writer.append

        def interrupting(writer, row, **options):
            if row[0] == 5:
                signal.raise_signal(signal.SIGINT)
                assert not heard
            append(writer, row, **options)

        monkeypatch.setattr(Writer, "append", interrupting)
        before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        try:
            trajectory = self.loop(tmp_path)
        finally:
            signal.signal(signal.SIGINT, before)
        assert heard == [signal.SIGINT]
        assert len(trajectory) == 12

    def test_rolled_back_rows_are_hashed_once(self, tmp_path, monkeypatch):
        """Without the recorder's deferral: an interrupt within the transaction."""

        def patch(recorder):
            flush, failed = Writer.flush, []

            def failing(writer):
                with monkeypatch.context() as patched:
                    if writer._rows and not failed:
                        failed.append(1)
                        patched.setattr("kxexplain.trajectory.store.SET_FACT", "INTERRUPTED")
                        with pytest.raises(TrajectoryError):
                            flush(writer)
                flush(writer)

            monkeypatch.setattr(Writer, "flush", failing)

        self.loop(tmp_path, patch).check_files()

    def test_waiting_for_a_state_interrupted(self, tmp_path, monkeypatch):
        """Without the recorder's deferral: the state being waited for gets its row nevertheless."""
        waits = []

        def interrupted(jobs):
            waits.append(jobs)
            if len(waits) == 3:
                raise KeyboardInterrupt
            return wait(jobs)

        monkeypatch.setattr("kxexplain.trajectory.store.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.loop(tmp_path)
        trajectory = Trajectory.open(tmp_path)
        trajectory.check_files()
        assert len(list((tmp_path / "states").iterdir())) == len(trajectory.states)


def parameters_added(model, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def frozen_with_a_gradient(model, optimizer):
    model[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "words"), [(parameters_added, "all parameters before"), (frozen_with_a_gradient, "set_to_none=True")]
)
def test_steps_that_replay_could_not_repeat(tmp_path, change, words):
    """Refused before the optimiser moves anything; what was recorded stays good."""
    data = examples()
    inputs, targets = data.tensors
    model = nn.Sequential(nn.Linear(inputs.shape[1], 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = []

    def loop():
        with record(model, optimizer, "cross_entropy", data, out=tmp_path) as recorder:
            for step in range(4):
                if step == 2:
                    change(model, optimizer)
                optimizer.zero_grad(set_to_none=False)
                nn.functional.cross_entropy(model(inputs), targets).backward()
                before[:] = [p.detach().clone() for p in model.parameters()]
                optimizer.step()
                recorder.step(range(len(targets)))

    with pytest.raises(TrainingError, match=words):
        loop()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(Trajectory.open(tmp_path)) == 2


def test_a_rate_with_fewer_digits_than_the_parameters(tmp_path):
    model = nn.Linear(3, 3).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    with pytest.raises(ArgumentError, match="float32 tensor"):
        record(model, optimizer, "cross_entropy", examples(), out=tmp_path)
