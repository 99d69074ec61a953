from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from kxexplain.errors import ArgumentError, DatasetError, ModelError, ReplayError
from kxexplain.trajectory import Replayer, Trajectory, gradient_norms, record, split
from kxexplain.trajectory.replay import unprofiled
from tests.trajectory.runs import CASES, Case, assert_same, build, examples, named, parameters_of, plain_loop, sgd


def recorded(out, case, dtype=torch.float32, **options):
    data = examples(dtype=dtype, loss=case.loss)
    model, optimizer, scheduler = build(case, dtype)
    passed = [named(model)]

    with record(model, optimizer, case.loss, data, out=out, **options) as recorder:

        def after(indices, loss, epoch):
            recorder.step(indices, loss)
            passed.append(named(model))

        plain_loop(model, optimizer, scheduler, data, loss=case.loss, after=after)
    return recorder.trajectory, model, data, passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_replay_from_every_state_is_bitwise(tmp_path, case, dtype):
    trajectory, model, data, passed = recorded(tmp_path, case, dtype, keep=5)
    with Replayer(trajectory, model, data) as replayer:
        for state in trajectory.states[:-1]:
            replayer.seek(state.step)
            for step in range(state.step, len(trajectory)):
                assert_same(named(replayer.model), passed[step])
                redone = replayer.advance()
                assert redone.record == trajectory.steps[step]
                assert redone.losses.mean().item() == trajectory.steps[step].loss
            assert_same(named(replayer.model), passed[-1])
    assert replayer.drift == 0.0


def test_loaders_that_draw_from_the_same_generator(tmp_path):
    """Shuffling between epochs moves the generator that dropout draws from."""
    data = examples()
    model, optimizer, _ = build(CASES["dropout"])
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, keep=1000) as recorder:
        for epoch in range(3):
            for indices in DataLoader(range(22), batch_size=4, shuffle=True):
                inputs, targets = data[indices]
                loss = nn.functional.cross_entropy(model(inputs), targets, reduction="none").mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.step(indices, loss, epoch=epoch)
            with torch.no_grad():
                model(data[:3][0])  # a look at the outputs, in training mode: draws too
            model.eval()
            model(data[:3][0])
            model.train()
    trajectory = recorder.trajectory
    assert 0 < len(trajectory.rng_steps) <= 3
    assert replay(trajectory, model, data).drift == 0.0


def test_randomness_that_begins_late(tmp_path):
    """After quiet steps the forward pass is no longer watched; draws are noticed all the same."""
    data = examples()
    model, optimizer, _ = build(Case(CASES["dropout"].model))
    model[1].p = 0.0
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, keep=1000) as recorder:
        for number in range(80):
            model[1].p = 0.0 if number < 50 else 0.5
            if number % 9 == 0:
                torch.rand(1)
            nn.functional.cross_entropy(model(data[:4][0]), data[:4][1], reduction="none").mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(range(4))
    replayer = Replayer(recorder.trajectory, model, data)
    with replayer:
        replayer.seek(0)
        for number in range(80):
            replayer.model[1].p = 0.0 if number < 50 else 0.5
            replayer.advance()
    assert replayer.drift == 0.0


class Rarely(nn.Module):
    """Draws for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        if self.training and float(x.abs().max()) > 2.5:
            hidden = nn.functional.dropout(hidden, 0.5)
        return self.last(hidden)


@pytest.mark.parametrize("keep", ["epoch", "step"])
def test_one_that_draws_now_and_then_beside_a_loader_that_does(tmp_path, keep):
    torch.manual_seed(1)
    data, model = TensorDataset(torch.randn(40, 6), torch.arange(40) % 3), Rarely()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, keep=keep) as recorder:
        for _ in range(4):
            for indices in DataLoader(range(40), batch_size=4, shuffle=True):
                optimizer.zero_grad()
                inputs, targets = data[indices]
                nn.functional.cross_entropy(model(inputs), targets, reduction="none").mean().backward()
                optimizer.step()
                recorder.step(indices)
    assert 0 < len(recorder.trajectory.rng_steps) < 40
    assert replay(recorder.trajectory, model, data).drift == 0.0


def test_a_loop_that_begins_to_draw_with_an_epoch_beside_a_model_that_does_now_and_then(tmp_path):
    """Draws are expected at an epoch's beginning, as for its order; that they go on must be noticed in time."""
    torch.manual_seed(1)
    data, model = TensorDataset(torch.randn(40, 6), torch.arange(40) % 3), Rarely()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quiet = (data.tensors[0].abs().amax(1) < 2.5).nonzero()[:, 0].tolist()
    loud = [i for i in range(40) if i not in quiet]
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, keep=300) as recorder:
        for number in range(60):
            batch = [quiet[number % len(quiet)]] * 3 + [quiet[0] if number < 40 or number % 3 else loud[0]]
            if number >= 40:
                torch.rand(1)
            optimizer.zero_grad()
            inputs, targets = data[batch]
            nn.functional.cross_entropy(model(inputs), targets, reduction="none").mean().backward()
            optimizer.step()
            recorder.step(batch)
    assert recorder.trajectory.rng_steps == {42, 45, 48, 51, 54, 57}
    assert replay(recorder.trajectory, model, data).drift == 0.0


@pytest.mark.parametrize("whose", ["model", "loop"])
@pytest.mark.parametrize("start", [20, 30, 31, 32, 33, 40, 47])
def test_one_that_begins_to_draw_in_the_quiet(tmp_path, start, whose):
    """Whether the step or the loop drew is not known there, and need not be."""
    data = examples()
    model, optimizer, _ = build(Case(CASES["dropout"].model))
    model[1].p = 0.0
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, keep=37) as recorder:
        for number in range(60):
            if whose == "model":
                model[1].p = 0.0 if number < start else 0.5
            elif number >= start:
                torch.rand(1)
            nn.functional.cross_entropy(model(data[:4][0]), data[:4][1], reduction="none").mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(range(4))
    for state in (0, 37):
        with Replayer(recorder.trajectory, model, data) as replayer:
            replayer.seek(state)
            for number in range(state, 60):
                replayer.model[1].p = 0.5 if whose == "model" and number >= start else 0.0
                replayer.advance()
        assert replayer.drift == 0.0


@pytest.mark.parametrize("name", ["mlp", "adamw, dropout", "batch norm"])
def test_gradient_norms_that_were_not_logged(tmp_path, name):
    case, data = CASES[name], examples()
    found = {}
    for norms in (True, False):
        model, optimizer, scheduler = build(case)
        torch.manual_seed(5)
        with record(model, optimizer, case.loss, data, out=tmp_path / str(norms), norms=norms) as recorder:
            plain_loop(
                model, optimizer, scheduler, data, loss=case.loss, after=lambda i, loss, e: recorder.step(i, loss)
            )
        found[norms] = recorder.trajectory
    assert gradient_norms(found[False], model, data) == found[True].norms() == gradient_norms(found[True], model, data)
    assert list(found[False].steps) == list(found[True].steps)


def test_modes_that_change(tmp_path):
    """Batch norm frozen, a layer unfrozen, in the middle of training."""
    data = examples()
    model, optimizer, _ = build(CASES["batch norm"])
    model[3].eval()
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, keep=4) as recorder:
        for number in range(12):
            if number == 5:
                model[1].eval()
                model[0].weight.requires_grad_(False)
            if number == 9:
                model.train()
                model[0].weight.requires_grad_(True)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[:7][0]), data[:7][1], reduction="none").mean().backward()
            optimizer.step()
            recorder.step(range(7))
    trajectory = recorder.trajectory
    with Replayer(trajectory, model, data) as replayer:
        for state in trajectory.states[:-1]:
            replayer.seek(state.step)
            while replayer.position < len(trajectory):
                replayer.advance()
    assert replayer.drift == 0.0


def replay(trajectory, model, data):
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        for _ in range(len(trajectory)):
            replayer.advance()
    return replayer


@pytest.mark.parametrize("name", ["batch norm", "adamw, dropout", "frozen"])
def test_the_callers_model_is_never_touched(tmp_path, name):
    trajectory, model, data, _ = recorded(tmp_path, CASES[name])
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = named(model), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    replay(trajectory, model, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(named(model), before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert [p.requires_grad for p in model.parameters()] == before[2]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_interleaved_replays_and_foreign_draws(tmp_path):
    trajectory, model, data, passed = recorded(tmp_path, CASES["dropout"])
    with Replayer(trajectory, model, data) as one, Replayer(trajectory, model, data) as two:
        one.seek(0)
        two.seek(6)
        for step in range(6):
            one.advance()
            torch.rand(3)
            two.advance()
            assert_same(named(one.model), passed[step + 1])
            assert_same(named(two.model), passed[step + 7])


class Look:
    """Takes the gradient at the first layer's output."""

    def __init__(self, replayer):
        self.layer, self.at_edges, self.seen = replayer.model[0], [], []

    @contextmanager
    def forward(self, inputs):
        handle = self.layer.register_forward_hook(lambda module, args, output: self.seen.append(output))
        yield
        handle.remove()

    def edges(self, outputs, losses, total):
        assert torch.equal(total, losses.mean())
        return [get_gradient_edge(outputs), get_gradient_edge(self.seen[-1])]

    def collect(self, gradients):
        self.at_edges.append(gradients)


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm"])
def test_watching_gives_gradients_and_disturbs_nothing(tmp_path, name):
    trajectory, model, data, passed = recorded(tmp_path, CASES[name])
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        watch = Look(replayer)
        for step in range(len(trajectory)):
            redone = replayer.advance(watch)
            at_outputs, at_layer = watch.at_edges[-1]
            inputs, targets = data[redone.record.indices]
            outputs = redone.outputs.requires_grad_()
            nn.functional.cross_entropy(outputs, targets).backward()
            torch.testing.assert_close(at_outputs, outputs.grad)
            torch.testing.assert_close(redone.gradients["0.weight"], at_layer.T @ inputs)
            assert_same(named(replayer.model), passed[step + 1])


def test_steps_run_the_hooks_there_are():
    """Torch's profiling is left out, a hook is not, be it this optimiser's or everyone's; the step is the same."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizers = [torch.optim.SGD([w], lr=0.1, momentum=0.9) for w in weights]
    seen = []
    note = lambda optimizer, args, kwargs: seen.append(optimizer)  # noqa: E731
    for count in range(2):
        for w in weights:
            w.grad = torch.full((2,), 0.3 + count)
        optimizers[0].step()
        unprofiled(optimizers[1])()
        everyones = register_optimizer_step_post_hook(note)
        unprofiled(optimizers[2])()
        everyones.remove()
    assert seen == [optimizers[2]] * 2
    assert all(torch.equal(w, weights[0]) for w in weights)
    assert unprofiled(optimizers[1]) != optimizers[1].step
    optimizers[1].register_step_pre_hook(note)
    assert unprofiled(optimizers[1]) == optimizers[1].step


@pytest.mark.parametrize("name", ["mlp", "weight decay", "tied", "frozen"])
def test_split_and_gradients_give_the_movement(tmp_path, name):
    trajectory, model, data, _ = recorded(tmp_path, CASES[name], torch.float64)
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        for step in trajectory.steps:
            before = replayer.copy_state()
            gradients = replayer.advance().gradients
            parts = split(trajectory.manifest.optimizer, step)
            for key, p in replayer.parameters.items():
                expected = torch.zeros_like(p)
                if key in gradients:
                    expected = parts.gradient[key] * gradients[key] + parts.decay[key] * before[key]
                torch.testing.assert_close(p.detach() - before[key], expected, rtol=1e-10, atol=1e-14)


def test_sign_and_clip_are_replayed(tmp_path):
    data = examples()
    model, optimizer, _ = build(Case(optimizer=sgd(momentum=0.9)))
    with record(model, optimizer, "cross_entropy", data, out=tmp_path, reduction="sum", keep=3) as recorder:
        for number in range(9):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[:6][0]), data[:6][1], reduction="none").sum().backward()
            sign, clip = (-1 if number % 2 else 1), 0.5 ** (number % 3)
            for p in model.parameters():
                p.grad *= sign * clip
            optimizer.step()
            recorder.step(range(6), sign=sign, clip=clip)
    assert replay(recorder.trajectory, model, data).drift == 0.0


def clipped(out):
    """A run whose gradients were clipped without telling the recorder."""
    data = examples()
    model, optimizer, _ = build(CASES["mlp"])
    with record(model, optimizer, "cross_entropy", data, out=out) as recorder:
        for indices in torch.arange(22).split(4):
            inputs, targets = data[indices]
            nn.functional.cross_entropy(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            recorder.step(indices)
    return recorder.trajectory, model, data


def test_drift_is_an_error_that_names_causes(tmp_path):
    trajectory, model, data = clipped(tmp_path)
    with pytest.raises(ReplayError, match=r"step 6 ended .* away .*order.*dropout.*threads.*clipped"):
        replay(trajectory, model, data)


def test_small_drift_is_remembered_and_not_passed_on(tmp_path):
    trajectory, model, data, passed = recorded(tmp_path, CASES["mlp"])
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        with torch.no_grad():
            replayer.parameters["0.weight"][0, 0] += 1e-6
        for _ in range(6):
            replayer.advance()
        assert 1e-8 < replayer.drift < 1e-5
        assert_same(named(replayer.model), passed[6])


def test_another_model_or_dataset_is_refused(tmp_path):
    trajectory, model, data, _ = recorded(tmp_path, CASES["mlp"])
    wide = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(ModelError, match=r"'0\.weight' has shape \(9, 6\), expected \(8, 6\)"):
        Replayer(trajectory, wide, data)
    with pytest.raises(ModelError, match=r"'0\.weight' has dtype float64"):
        Replayer(trajectory, copy.deepcopy(model).double(), data)
    with pytest.raises(ModelError, match=r"'2\.weight' is missing"):
        Replayer(trajectory, model[:2], data)
    with pytest.raises(ModelError, match=r"'3\.weight' was not there"):
        Replayer(trajectory, nn.Sequential(*model, nn.Linear(3, 3)), data)
    with pytest.raises(DatasetError, match="the same examples in another order"):
        Replayer(trajectory, model, TensorDataset(*(t.flip(0) for t in data.tensors)))
    with pytest.raises(DatasetError, match="20 examples instead of 22"):
        Replayer(trajectory, model, TensorDataset(*(t[:20] for t in data.tensors)))
    trajectory.check_model(CASES["mlp"].model())


def test_where_one_cannot_go(tmp_path):
    trajectory, model, data, _ = recorded(tmp_path, CASES["mlp"])
    with Replayer(trajectory, model, data) as replayer:
        with pytest.raises(ArgumentError, match="seek"):
            replayer.advance()
        with pytest.raises(ArgumentError, match="no state recorded at step 7; the nearest before is 6"):
            replayer.seek(7)
        replayer.seek(18)
        with pytest.raises(ArgumentError, match="ends after step 18"):
            replayer.advance()


def test_own_loss_is_needed_again(tmp_path):
    def squared(outputs, targets):
        return outputs.square().sum(1)

    case = Case()
    data = examples()
    model, optimizer, _ = build(case)
    with record(model, optimizer, squared, data, out=tmp_path, keep=2) as recorder:
        for indices in torch.arange(20).split(4):
            optimizer.zero_grad()
            squared(model(data[indices][0]), None).mean().backward()
            optimizer.step()
            recorder.step(indices)
    assert replay(recorder.trajectory, model, data).drift == 0.0
    closed = Trajectory.open(tmp_path)
    assert "squared" in closed.loss_name
    with pytest.raises(ArgumentError, match="loss of its own"):
        replay(closed, model, data)
    assert replay(Trajectory.open(tmp_path, loss=squared), model, data).drift == 0.0


def test_named_loss_contradicted(tmp_path):
    recorded(tmp_path, CASES["mlp"])
    with pytest.raises(ArgumentError, match="leave out loss"):
        Trajectory.open(tmp_path, loss=nn.MSELoss(reduction="none"))


def test_states_hold_moments(tmp_path):
    trajectory, _, _, _ = recorded(tmp_path, CASES["adamw, dropout"])
    assert trajectory.state(0).optimizer == {}
    moments = trajectory.state(18).optimizer
    assert set(moments) == set(trajectory.state(18).parameters)
    assert moments["0.weight"]["step"].item() == 18
    assert parameters_of(trajectory.state(18)).keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
