from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError, ModelError, TrainingError, TrajectoryError
from kxexplain.learning.interrupts import interrupts
from kxexplain.learning.trainer import train
from kxexplain.trajectory import Replayer, Trajectory, record
from kxexplain.trajectory.store import FLUSH_ROWS
from tests.trajectory.runs import (
    CASES,
    Case,
    assert_same,
    build,
    examples,
    named,
    parameters_of,
    plain_loop,
    sgd,
    unchecked,
)

ROOT = Path(__file__).parents[2]


def run(out, case, data=None, dtype=torch.float32, **options):
    """``train`` on a case; and the model."""
    model, optimizer, scheduler = build(case, dtype)
    settings = {"epochs": 3, "batch_size": 4, "seed": 3, **options}
    data = examples(dtype=dtype, loss=case.loss) if data is None else data
    return train(model, data, case.loss, optimizer, scheduler=scheduler, out=out, **settings), model


def assert_same_runs(got, expected, *, states=True):
    """The same steps and states, to the last bit."""
    assert list(got.steps) == list(expected.steps)
    if states:
        assert [state.step for state in got.states] == [state.step for state in expected.states]
    for record_ in expected.states[-1:] if not states else expected.states:
        one, two = got.state(record_.step), expected.state(record_.step)
        assert_same(parameters_of(one), parameters_of(two))
        assert_same(one.rng, two.rng)
        assert one.rates == two.rates
        assert one.extra == two.extra
        assert one.optimizer.keys() == two.optimizer.keys()
        for name, values in two.optimizer.items():
            for key, value in values.items():
                assert torch.equal(one.optimizer[name][key], value) if torch.is_tensor(value) else value is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_train_is_a_hand_written_loop(tmp_path, case, dtype):
    data = examples(dtype=dtype, loss=case.loss)
    model, optimizer, scheduler = build(case, dtype)
    plain_loop(model, optimizer, scheduler, data, loss=case.loss)
    trajectory, trained = run(tmp_path / "one", case, dtype=dtype)
    assert_same(named(trained), named(model))
    assert len(trajectory) == 18
    assert [state.step for state in trajectory.states] == [0, 6, 12, 18]
    with Replayer(trajectory, trained, data) as replayer:
        replayer.seek(0)
        while replayer.position < len(trajectory):
            replayer.advance()
    assert replayer.drift == 0.0


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ({}, False),
        ({"norms": True}, True),
        ({"schedule": "adagrad_norm"}, True),
        ({"schedule": "adagrad_norm", "norms": False}, False),
    ],
)
def test_norms_are_logged_where_asked_for_or_scheduled(tmp_path, options, logged):
    model, data = nn.Linear(6, 3), examples()
    trajectory = train(model, data, epochs=2, batch_size=5, out=tmp_path, **options)
    assert [math.isnan(step.gradient_norm) for step in trajectory.steps] == [not logged] * 10
    assert not logged or trajectory.norms() == kx.gradient_norms(trajectory, model, data)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ones_own_loop_writes_the_same(tmp_path, case):
    trajectory, _ = run(tmp_path / "one", case, norms=True)
    data = examples(loss=case.loss)
    model, optimizer, scheduler = build(case)
    torch.manual_seed(3)
    with record(model, optimizer, case.loss, data, out=tmp_path / "two", norms=True) as recorder:
        plain_loop(model, optimizer, scheduler, data, loss=case.loss, after=lambda i, loss, e: recorder.step(i, loss))
    own = recorder.trajectory
    assert list(own.steps) == list(trajectory.steps)
    assert own.norms() == trajectory.norms()
    for state in trajectory.states:
        assert_same(parameters_of(own.state(state.step)), parameters_of(trajectory.state(state.step)))


def test_callers_surroundings_are_restored(tmp_path):
    model = CASES["dropout"].model()
    model.eval()
    model[1].train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    trajectory = train(model, examples(), epochs=1, out=tmp_path)
    assert trajectory.manifest.optimizer.name == "SGD"
    assert trajectory.steps[0].rates == (0.1,)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_run_inherits_nothing(tmp_path):
    one, _ = run(tmp_path / "one", CASES["adamw, dropout"])
    run(tmp_path / "other", CASES["batch norm"], seed=9)
    torch.rand(5)
    two, _ = run(tmp_path / "two", CASES["adamw, dropout"])
    assert_same_runs(two, one)


def test_optimizer_made_by_a_function(tmp_path):
    model = CASES["mlp"].model()
    trajectory = train(
        model, examples(), "hinge", lambda p: torch.optim.Adam(p, lr=0.02), epochs=1, out=tmp_path, keep=2
    )
    assert trajectory.manifest.optimizer.name == "Adam"
    assert trajectory.loss_name == "hinge"
    with pytest.raises(ArgumentError, match="returned a list"):
        train(model, examples(), optimizer=list, epochs=1, out=tmp_path / "two")


def test_own_loss(tmp_path):
    def own(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none") + outputs.square().sum(1)

    trajectory = train(CASES["mlp"].model(), examples(), own, epochs=2, out=tmp_path)
    assert trajectory.loss is own
    finished = train(CASES["mlp"].model(), examples(), own, epochs=2, out=tmp_path, resume=True)
    assert len(finished) == 2


class Interrupting(TensorDataset):
    """Interrupts when it serves its ``n``-th example from now on."""

    left = -1

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.interrupt()
        return super().__getitem__(index)

    def interrupt(self):
        raise KeyboardInterrupt


class Signalling(Interrupting):
    def interrupt(self):
        os.kill(os.getpid(), signal.SIGINT)


def interrupted(out, case, data, after, **options):
    """Begin a run and interrupt it while it fetches its ``after``-th example in training."""
    data.left = -1
    model, optimizer, scheduler = build(case)
    settings = {"epochs": 3, "batch_size": 4, "seed": 3, **options}
    probe = type(data)(*data.tensors)
    Probe.count(probe, lambda: train_probe(probe))
    tried = 0 if (out / "manifest.json").exists() else 6  # one batch of four, one of two
    data.left = Probe.served + tried + after
    with pytest.raises(KeyboardInterrupt):
        train(model, data, case.loss, optimizer, scheduler=scheduler, out=out, **settings)
    data.left = -1
    return model, optimizer, scheduler


class Probe:
    """How many examples the checks before training fetch."""

    served = 0

    @classmethod
    def count(cls, data, work):
        data.left = 0
        work()
        cls.served = -data.left


def train_probe(data):
    from kxexplain.trajectory import fingerprint

    fingerprint(data)


@pytest.mark.parametrize("kind", [Interrupting, Signalling])
@pytest.mark.parametrize("after", [1, 9, 22, 23, 31, 44, 50, 66])
@pytest.mark.parametrize("name", ["adamw, dropout", "plateau", "steps"])
def test_interrupted_then_resumed_is_uninterrupted(tmp_path, kind, after, name):
    case = CASES[name]
    whole, model = run(tmp_path / "whole", case)
    data = kind(*examples(loss=case.loss).tensors)
    interrupted(tmp_path / "parts", case, data, after)
    part = Trajectory.open(tmp_path / "parts")
    part.check_files()
    assert part.tail == 0
    done = (after - 1) // 22 * 6 + ((after - 1) % 22) // 4
    assert len(part) == done + (kind is Signalling)
    resumed, other = run(tmp_path / "parts", case, data, resume=True)
    assert_same(named(other), named(model))
    assert_same_runs(resumed, whole)


def test_resuming_with_the_very_same_objects(tmp_path):
    """In a notebook the model, optimiser and scheduler of the interrupted call are at hand."""
    case = CASES["steps"]
    whole, _ = run(tmp_path / "whole", case)
    data = Interrupting(*examples().tensors)
    model, optimizer, scheduler = interrupted(tmp_path / "parts", case, data, 31)
    options = {"epochs": 3, "batch_size": 4, "seed": 3, "out": tmp_path / "parts", "resume": True}
    resumed = train(model, data, case.loss, optimizer, scheduler=scheduler, **options)
    assert_same_runs(resumed, whole)


@pytest.mark.parametrize("keep", ["step", 5, "epoch", "9KB"])
def test_interrupted_many_times(tmp_path, keep):
    case = CASES["lambda"]
    whole, _ = run(tmp_path / "whole", case, keep=keep)
    data = Interrupting(*examples().tensors)
    for after in (5, 13, 30, 2):
        interrupted(tmp_path / "parts", case, data, after, keep=keep, resume=True)
    resumed, _ = run(tmp_path / "parts", case, data, keep=keep, resume=True)
    assert_same_runs(resumed, whole, states=keep != "9KB")


def test_resume_starts_continues_and_returns(tmp_path):
    whole, _ = run(tmp_path / "whole", CASES["batch norm"], epochs=5)
    first, _ = run(tmp_path / "run", CASES["batch norm"], resume=True)
    before = (tmp_path / "run" / "steps.sqlite").stat().st_mtime_ns
    finished, model = run(tmp_path / "run", CASES["batch norm"], resume=True)
    assert_same_runs(finished, first)
    assert_same(named(model), parameters_of(first.state(18)))
    assert (tmp_path / "run" / "steps.sqlite").stat().st_mtime_ns == before
    longer, _ = run(tmp_path / "run", CASES["batch norm"], epochs=5, resume=True)
    assert_same_runs(longer, whole)
    assert Trajectory.open(tmp_path / "run").manifest.settings["epochs"] == 5
    with pytest.raises(ArgumentError, match="already has 5"):
        run(tmp_path / "run", CASES["batch norm"], resume=True)


CHANGES = {
    "batch_size": {"batch_size": 5},
    "seed": {"seed": 4},
    "keep": {"keep": "step"},
    "loss": {"case": Case(loss="hinge")},
    "optimizer": {"case": Case(optimizer=lambda p: torch.optim.Adam(p))},
    "optimizer option lr": {"case": Case(optimizer=sgd(lr=0.2))},
    "optimizer option momentum": {"case": Case(optimizer=sgd(momentum=0.1))},
    "frozen parameters": {"case": CASES["frozen"]},
    "scheduler": {"case": CASES["steps"]},
    "dataset": {"data": examples(21)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_with_other_settings(tmp_path, name):
    run(tmp_path, CASES["mlp"], epochs=1)
    options = dict(CHANGES[name])
    case = options.pop("case", CASES["mlp"])
    if name == "scheduler":
        case = Case(scheduler=case.scheduler)
    with pytest.raises(ArgumentError, match=f"another {name}"):
        run(tmp_path, case, resume=True, **options)
    assert len(Trajectory.open(tmp_path)) == 6


def test_resuming_with_another_model(tmp_path):
    run(tmp_path, CASES["mlp"])
    with pytest.raises(ModelError, match=r"'2\.weight' is missing"):
        run(tmp_path, CASES["batch norm"], resume=True)


def test_a_loss_that_is_not_finite(tmp_path):
    data = examples()
    data.tensors[0][7] = float("nan")
    with pytest.raises(TrainingError, match=r"loss at step \d+ is nan"):
        run(tmp_path, CASES["batch norm"], data)
    trajectory = Trajectory.open(tmp_path)
    assert trajectory.tail == 0
    assert all(7 not in step.indices for step in trajectory.steps)
    trajectory.check_files()
    model = CASES["batch norm"].model()
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        while replayer.position < len(trajectory):
            replayer.advance()
    assert replayer.drift == 0.0


class Counts(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler whose state is not made of numbers."""

    def __init__(self, optimizer):
        self.odd = {1, 2}
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


def build_with(**options):
    model, optimizer, _ = build(CASES["mlp"])
    values = {"model": model, "dataset": examples(), "optimizer": optimizer, "epochs": 1, **options}
    if callable(values.get("scheduler")):
        values["scheduler"] = values["scheduler"](optimizer)
    return values


WRONG = {
    "epochs": (lambda: {"epochs": 0}, ArgumentError, "epochs must be an integer >= 1"),
    "batch": (lambda: {"batch_size": -2}, ArgumentError, "batch_size must be"),
    "seed": (lambda: {"seed": -1}, ArgumentError, "seed must be"),
    "both": (lambda: {"resume": True, "overwrite": True}, ArgumentError, "exclude each other"),
    "loss": (lambda: {"loss": "l1"}, ArgumentError, "unknown loss"),
    "keep": (lambda: {"keep": "often"}, ArgumentError, "unknown keep"),
    "budget": (lambda: {"keep": "100B"}, ArgumentError, "too few"),
    "empty": (lambda: {"dataset": TensorDataset(torch.zeros(0, 6), torch.zeros(0))}, DatasetError, "empty"),
    "frozen": (lambda: {"model": CASES["mlp"].model().requires_grad_(False)}, ModelError, "no trainable"),
    "other model": (lambda: {"model": CASES["mlp"].model()}, ArgumentError, "not the model's"),
    "nothing to train": (lambda: {"model": nn.ReLU(), "optimizer": None}, ModelError, "ReLU has no trainable"),
    "a class": (lambda: {"model": nn.Linear, "optimizer": None}, ModelError, "the class Linear"),
    "loader": (
        lambda: {"dataset": torch.utils.data.DataLoader(examples())},
        DatasetError,
        r"a DataLoader cannot .*loader\.dataset",
    ),
    "optimizer": (lambda: {"optimizer": "sgd"}, ArgumentError, "optimizer is 'sgd'"),
    "no scheduler": (lambda: {"scheduler": "cosine"}, ArgumentError, "scheduler is 'cosine'"),
    "scheduler": (lambda: {"scheduler": Counts}, ArgumentError, "cannot be recorded"),
    "scheduler of another": (
        lambda: {"scheduler": lambda _: CASES["steps"].scheduler(sgd()(CASES["mlp"].model().parameters()))},
        ArgumentError,
        "another optimizer",
    ),
}


@pytest.mark.parametrize(("options", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_errors_come_before_work(tmp_path, options, error, words):
    values = build_with(**options())
    built = isinstance(values["model"], nn.Module)
    before = named(values["model"]) if built else {}
    with pytest.raises(error, match=words):
        unchecked(train)(**values, out=tmp_path)
    assert not any(tmp_path.iterdir())
    assert_same(named(values["model"]) if built else {}, before)


@pytest.mark.parametrize("out", [None, 7])
def test_no_folder(out):
    with pytest.raises(ArgumentError, match=f"out is {out}"):
        unchecked(train)(**build_with(), out=out)


def test_fewer_epochs_than_there_are(tmp_path):
    data = Interrupting(*examples().tensors)
    interrupted(tmp_path, CASES["mlp"], data, 31)
    with pytest.raises(ArgumentError, match="already has 1 and 2 of 6 steps of the next; ask for at least 2"):
        run(tmp_path, CASES["mlp"], data, epochs=1, resume=True)


def test_a_leap_leaves_what_the_message_says(tmp_path):
    with pytest.raises(TrainingError, match="good up to its last state"):
        run(tmp_path, Case(optimizer=sgd(lr=1e38)))
    assert len(Trajectory.open(tmp_path)) in (0, 1)
    Trajectory.open(tmp_path).check_files()


def test_an_occupied_folder(tmp_path):
    run(tmp_path, CASES["mlp"])
    with pytest.raises(TrajectoryError, match="overwrite=True"):
        run(tmp_path, CASES["mlp"])
    again, _ = run(tmp_path, CASES["mlp"], overwrite=True, epochs=1)
    assert len(again) == 6


def stray(n=22, label=3, at=21):
    """Examples of which one, late in the dataset, has a class that the model lacks."""
    data = examples(n)
    data.tensors[1][at] = label
    return data


def scalar(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def one_too_wide():
    return TensorDataset(torch.zeros(22, 7), torch.zeros(22, dtype=torch.int64))


def infinite():
    return TensorDataset(torch.full((22, 6), float("inf")), torch.zeros(22, dtype=torch.int64))


FIRST_STEP = {
    "class": (lambda: {"dataset": stray()}, DatasetError, "example 21 is of class 3.*0 to 2"),
    "negative class": (lambda: {"dataset": stray(label=-1, at=4)}, DatasetError, "example 4 is of class -1"),
    "class below a subset": (
        lambda: {"dataset": Subset(stray(), list(range(2, 22)))},
        DatasetError,
        "example 19 is of class 3",
    ),
    "hinge": (lambda: {"dataset": stray(), "loss": "hinge"}, DatasetError, "example 21 is of class 3"),
    "width": (lambda: {"dataset": one_too_wide()}, ModelError, "fails on a batch.*7"),
    "scalar loss": (lambda: {"loss": scalar}, ArgumentError, "one loss per example"),
    "failing loss": (lambda: {"loss": lambda outputs, targets: outputs @ outputs}, ArgumentError, "loss function"),
    "mse": (lambda: {"loss": "mse"}, ArgumentError, "do not fit outputs"),
    "targets": (lambda: {"dataset": examples(loss="mse").tensors[:1] * 2}, DatasetError, "pair"),
    "not finite": (lambda: {"dataset": infinite()}, TrainingError, "nothing was written"),
    "last batch": (
        lambda: {"model": CASES["batch norm"].model(), "optimizer": None, "batch_size": 21},
        ModelError,
        "more than 1 value",
    ),
    "optimizer": (
        lambda: {"optimizer": torch.optim.SparseAdam},
        ArgumentError,
        "SparseAdam fails on the first step",
    ),
}


@pytest.mark.parametrize("before", ["nothing", "a run"])
@pytest.mark.parametrize(("options", "error", "words"), FIRST_STEP.values(), ids=FIRST_STEP.keys())
def test_a_run_that_cannot_begin_costs_nothing(tmp_path, options, error, words, before):
    out = tmp_path / "run"
    if before == "a run":
        run(out, CASES["mlp"])
    values = build_with(**options())
    weights, generator = named(values["model"]), torch.get_rng_state()
    with pytest.raises(error, match=words):
        train(**values, out=out, overwrite=before == "a run")
    assert_same(named(values["model"]), weights)
    assert all(p.grad is None for p in values["model"].parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    if before == "a run":
        Trajectory.open(out).check_files()
        assert len(Trajectory.open(out)) == 18
    else:
        assert not out.exists()


def test_trying_leaves_buffers_and_generators(tmp_path, monkeypatch):
    values = build_with(model=CASES["batch norm"].model(), optimizer=None)
    weights, generator = named(values["model"]), torch.get_rng_state()
    monkeypatch.setattr("kxexplain.learning.run.Run.train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(**values, out=tmp_path / "run")
    assert_same(named(values["model"]), weights)
    assert torch.equal(torch.get_rng_state(), generator)


def test_positions_that_cross_entropy_ignores(tmp_path):
    assert len(train(**build_with(dataset=stray(label=-100)), out=tmp_path)) == 1


def test_a_failure_in_the_middle(tmp_path):
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) > 10:
            raise ZeroDivisionError("division by zero")
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    model, optimizer, _ = build(CASES["mlp"])
    with pytest.raises(TrainingError, match=r"step 8 failed: ZeroDivisionError.*good up to its last state"):
        train(model, examples(), loss, optimizer, epochs=3, batch_size=4, out=tmp_path)
    assert len(Trajectory.open(tmp_path)) == 8
    Trajectory.open(tmp_path).check_files()


def test_in_a_thread(tmp_path):
    """Signals belong to the main thread; training elsewhere leaves them alone."""
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path, CASES["mlp"])[0]))
    thread.start()
    thread.join()
    assert len(found[0]) == 18


class TwoTables(nn.Module):
    """Named inputs, and gradients that are sparse."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, words, scale):
        return self.head(self.words(words).mean(1) * scale[:, None])


def test_named_inputs_and_sparse_gradients(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 9, (10, 5), generator=generator)
    data = [({"words": words[i], "scale": torch.tensor(float(i))}, i % 3) for i in range(10)]
    model = TwoTables()
    trajectory = train(model, data, epochs=2, batch_size=3, out=tmp_path, keep=3, norms=True)
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        while replayer.position < len(trajectory):
            redone = replayer.advance()
            norm = sum(float(g.to_dense().square().sum()) for g in redone.gradients.values()) ** 0.5
            assert redone.record.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert replayer.drift == 0.0


def test_progress_in_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(tmp_path / "quiet", CASES["mlp"], progress=False)
    assert capsys.readouterr() == ("", "")
    run(tmp_path / "shown", CASES["mlp"])
    shown = capsys.readouterr().err
    assert "epoch 3" in shown
    assert "loss" in shown
    assert "rate 0.1" in shown


def test_a_second_interrupt_is_immediate():
    reached = []

    def press_twice():
        with interrupts() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(pressed.is_set())
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("beyond")

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert reached == [True]


SCRIPT = """
import sys, torch
from kxexplain.learning.trainer import train
from tests.trajectory.runs import CASES, build, examples
torch.set_num_threads(1)
model, optimizer, scheduler = build(CASES["steps"])
print("begun", flush=True)
train(model, examples(), "cross_entropy", optimizer, scheduler=scheduler, epochs=int(sys.argv[2]), batch_size=4,
      seed=3, out=sys.argv[1], resume=True)
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_processes_stopped_at_random(tmp_path, number):
    """Stopped by a signal at some moment after the first rows were flushed; a second process finishes the run."""
    out, epochs = tmp_path / "run", 75
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def begin():
        command = [sys.executable, "-c", SCRIPT, str(out), str(epochs)]
        child = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout.readline() == b"begun\n"
        child.stdout.close()
        return child

    child, patience = begin(), time.monotonic() + 60
    while len(list(out.glob("states/*"))) * 6 < FLUSH_ROWS + 60 and time.monotonic() < patience:
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(60) != 0
    Trajectory.open(out).check_files()
    assert 0 < len(Trajectory.open(out)) < 6 * epochs
    assert begin().wait(100) == 0
    torch.set_num_threads(1)
    whole, _ = run(tmp_path / "whole", CASES["steps"], epochs=epochs)
    assert_same_runs(Trajectory.open(out), whole)
