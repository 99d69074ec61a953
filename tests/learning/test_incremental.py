"""Incremental models: every rule against an independent statement of what it must equal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor, nn

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError, ModelError, TrajectoryError
from kxexplain.learning.incremental.damping import chosen, left_out
from kxexplain.learning.incremental.encoding import margin_outputs
from kxexplain.learning.incremental.optimum import descent, hessian_root, losses, newton

RULES = ("gradient", "ridge", "logistic")


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def examples(n: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=draw)
    return x, torch.randint(classes, (n,), generator=draw)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """∂f/∂θ, [n, C, p], by a loop of ordinary backward passes."""
    rows = []
    for one in x:
        outputs = model(one[None])[0]
        gradients = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in outputs]
        rows.append(torch.stack([torch.cat([g.flatten() for g in found]) for found in gradients]))
    return torch.stack(rows)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def flat(learner: kx.IncrementalModel) -> Tensor:
    return torch.cat([v.flatten() for v in learner.vector().values()])


# Law 1.


def test_the_gradient_rule_is_one_sgd_step_of_the_linearised_model() -> None:
    model, (x, y), (more, _) = network(), examples(7), examples(5, seed=1)
    learner = kx.IncrementalModel(model, rule="gradient", rate=0.3)
    phi, base = jacobian(model, x), model(x).detach()
    delta = torch.zeros(phi.shape[2], dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([delta], lr=0.3)
    for rows in (slice(0, 4), slice(4, 7)):  # two steps: the second begins where the first ended
        learner.learn(x[rows], y[rows])
        sgd.zero_grad()
        nn.functional.cross_entropy(base[rows] + phi[rows] @ delta, y[rows]).backward()
        sgd.step()
    assert relative(flat(learner), delta.detach()) < 1e-6
    expected = model(more).detach() + jacobian(model, more) @ delta.detach()
    assert relative(learner(more), expected) < 1e-6


@pytest.mark.parametrize("n", [5, 40])  # 15 rows, fewer than the 51 parameters; and 120, more
def test_the_ridge_rule_is_scikit_learns_kernel_ridge(n: int) -> None:
    model, (x, _), (more, _) = network(), examples(n), examples(6, seed=1)
    y = torch.randn(n, 3, dtype=torch.float64)
    learner = kx.IncrementalModel(model, damping=0.7)
    learner.learn(x, y)
    phi, query = jacobian(model, x).flatten(0, 1), jacobian(model, more).flatten(0, 1)
    reference = KernelRidge(alpha=0.7, kernel="precomputed").fit(
        (phi @ phi.T).numpy(), (y - model(x)).detach().flatten()
    )
    expected = torch.from_numpy(reference.predict((query @ phi.T).numpy())).view(6, 3) + model(more).detach()
    assert relative(learner(more), expected) < 1e-6
    assert relative(learner.engine.coefficients().flatten(), torch.from_numpy(reference.dual_coef_)) < 1e-6


@pytest.mark.parametrize("solver", ["newton", "descent"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_logistic_rule_is_the_optimum_of_its_objective(solver: Any, outputs: int) -> None:
    model, (x, y), (more, _) = network(outputs), examples(8, max(2, outputs)), examples(6, seed=1)
    learner = kx.IncrementalModel(model, rule="logistic", damping=0.5, solver=solver)
    learner.learn(x, y)
    phi, base = jacobian(model, x), model(x).detach()

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        delta = torch.tensor(values, requires_grad=True)
        scores = base + phi @ delta
        loss = nn.functional
        data = (
            loss.cross_entropy(scores, y, reduction="sum")
            if outputs > 1
            else loss.binary_cross_entropy_with_logits(scores[:, 0], y.double(), reduction="sum")
        )
        total = data + 0.25 * delta.square().sum()
        total.backward()
        return float(total.detach()), delta.grad.numpy()  # type: ignore[union-attr]

    options = {"maxiter": 5000, "gtol": 1e-12, "ftol": 1e-16}
    best = minimize(objective, np.zeros(phi.shape[2]), jac=True, method="L-BFGS-B", options=options).x
    expected = model(more).detach() + jacobian(model, more) @ torch.from_numpy(best)
    assert relative(learner(more), expected) < 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("n", [5, 30])
def test_learn_then_forget_returns_every_prediction(rule: Any, memory: bool, n: int) -> None:
    model, (x, y), (more, label) = network(), examples(n), examples(9, seed=1)
    past = examples(4, seed=2)[0] if memory else None
    learner = kx.IncrementalModel(model, rule=rule, memory=past, damping=0.3)
    untouched = learner(more)
    learner.learn(x, y)
    before = learner(more)
    names = learner.learn(more[:3], label[:3], ids=["a", "b", "c"])
    assert relative(learner(more), before) > 1e-4
    for name in (names[1], names[0], names[2]):
        learner.forget(name)
    assert relative(learner(more), before) < 1e-6
    for name in learner.ids:
        learner.forget(name)
    assert relative(learner(more), untouched) < 1e-6


@pytest.mark.parametrize("rule", ["ridge", "logistic"])
@pytest.mark.parametrize("memory", [False, True])
def test_streaming_equals_batch(rule: Any, memory: bool) -> None:
    (x, y), (more, _) = examples(30), examples(9, seed=1)
    past = examples(4, seed=2)[0] if memory else None
    batch, stream = (kx.IncrementalModel(network(), rule=rule, memory=past, damping=0.3) for _ in range(2))
    batch.learn(x, y)
    for i in torch.randperm(30).tolist():
        stream.learn(x[i : i + 1], y[i : i + 1])
    assert relative(stream(more), batch(more)) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_both_forms_and_float32_predict_the_same(rule: Any) -> None:
    (x, y), (more, _) = examples(2), examples(9, seed=1)
    learner = kx.IncrementalModel(network(), rule=rule, damping=0.3, parameters=["0"])
    learner.learn(x[:1], y[:1])
    assert learner.form == "kernel"
    by_vector = learner.features.linearised(more, learner.vector())
    torch.testing.assert_close(learner(more), by_vector, rtol=1e-9, atol=1e-9)
    single = kx.IncrementalModel(network().float(), rule=rule, damping=0.3, parameters=["0"])
    single.learn(x[:1].float(), y[:1])
    assert relative(single(more.float()).double(), learner(more)) < 1e-5
    learner.learn(x[1:], y[1:])
    assert learner.form == "vector"


# Law 3, short; the long stream is tests/benchmarks/stream.py.


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_longer_held_stays_learnt(rule: Any) -> None:
    (x, y), (more, _) = examples(20), examples(9, seed=1)
    learner = kx.IncrementalModel(network(), rule=rule, damping=0.3, remember=6)
    for i in range(20):
        learner.learn(x[i : i + 1], y[i : i + 1])
        assert len(learner.held) <= 6
    assert learner.ids == list(range(14, 20))
    assert learner.form == "vector"
    with pytest.raises(ArgumentError, match="remember=6"):
        learner.forget(3)
    before = learner(more)
    learner.forget(18)
    assert relative(learner(more), before) > 1e-5


def test_of_a_small_kernel_everything_stays_in_the_solve() -> None:
    # 21 parameters of the last layer: the system in the parameters' space holds what the window has let go of.
    (x, y), (more, _) = examples(60), examples(9, seed=1)
    window, whole = (kx.IncrementalModel(network(), damping=0.3, parameters=["2"], remember=size) for size in (10, 60))
    for i in range(60):
        window.learn(x[i : i + 1], y[i : i + 1])
    whole.learn(x, y)
    assert relative(window(more), whole(more)) < 1e-5
    assert window.engine.released == 50  # type: ignore[attr-defined]
    window.forget(55)
    whole.forget(55)
    assert relative(window(more), whole(more)) < 1e-6


def test_letting_go_changes_no_prediction() -> None:
    (x, y), (more, _) = examples(7), examples(9, seed=1)
    learner = kx.IncrementalModel(network(), damping=0.3, remember=7)
    learner.learn(x, y)
    before = learner(more)
    learner.engine.release(0)
    learner.held.drop(0)
    learner._vector = None
    assert relative(learner(more), before) < 1e-9


# Damping, margins, pieces of the logistic rule.


def test_left_out_errors_are_those_of_refits() -> None:
    phi, r = torch.randn(6, 2, 9, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    rows = phi.flatten(0, 1)
    found = left_out(*torch.linalg.eigh(rows @ rows.T), r, 0.4)
    for i in range(6):
        keep = [k for k in range(6) if k != i]
        part = phi[keep].flatten(0, 1)
        a = torch.linalg.solve(part @ part.T + 0.4 * torch.eye(10).double(), r[keep].flatten())
        torch.testing.assert_close(found[i], r[i] - phi[i] @ (part.T @ a))


def test_the_damping_chosen_is_the_best_of_the_grid_by_refits() -> None:
    model, (x, _) = network(1), examples(12)
    y = x[:, :1].sin() + 0.3 * torch.randn(12, 1, dtype=torch.float64)
    learner = kx.IncrementalModel(model)
    learner.learn(x, y)
    rho = learner.chosen_damping
    assert rho is not None

    def error(damping: float) -> float:
        total = 0.0
        for i in range(12):
            keep = [k for k in range(12) if k != i]
            one = kx.IncrementalModel(model, damping=damping)
            one.learn(x[keep], y[keep])
            total += float((one(x[i : i + 1]) - y[i]).square())
        return total

    assert error(rho) <= min(error(rho / 2), error(rho * 2)) * 1.02
    phi = jacobian(model, x).flatten(0, 1)
    assert chosen(phi @ phi.T, y - model(x).detach()) == pytest.approx(rho)
    learner.forget(0)
    assert learner.chosen_damping == rho  # fixed, until asked
    assert learner.tune() > 0


def test_margin_outputs_are_the_nearest_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    f, y = 2 * torch.randn(20, 4, generator=draw, dtype=torch.float64), torch.randint(4, (20,), generator=draw)
    found = margin_outputs(f, y, 1.5)
    for outputs, label, z in zip(f.numpy(), y.tolist(), found.numpy(), strict=True):
        others = [c for c in range(4) if c != label]
        gaps = [{"type": "ineq", "fun": lambda v, c=c, k=label: v[k] - v[c] - 1.5} for c in others]
        best = minimize(lambda v, o=outputs: ((v - o) ** 2).sum(), outputs, constraints=gaps, tol=1e-12).x
        np.testing.assert_allclose(z, best, atol=1e-5)
    torch.testing.assert_close(margin_outputs(torch.tensor([[0.5], [3.0]]), torch.tensor([0, 1]), 2.0).flatten(),
                               torch.tensor([-1.0, 3.0]))  # fmt: skip


def test_newton_and_descent_agree_and_the_root_is_the_hessians() -> None:
    rows = torch.randn(15, 20, dtype=torch.float64)
    gram, base = rows @ rows.T, torch.randn(5, 3, dtype=torch.float64)
    goal = torch.softmax(torch.randn(5, 3, dtype=torch.float64), 1)
    start = torch.zeros_like(goal)
    torch.testing.assert_close(
        newton(gram, base, goal, 0.2, start)[0], descent(gram, base, goal, 0.2, start)[0], rtol=1e-6, atol=1e-6
    )
    one = base[:1]
    hessian = torch.autograd.functional.hessian(lambda u: losses(u, goal[:1]).sum(), one)[0, :, 0]  # type: ignore[index]
    root = hessian_root(one.softmax(1))[0]
    torch.testing.assert_close(root @ root.T, hessian)


# Memory, new classes, merge, saving.


@pytest.mark.parametrize("rule", RULES)
def test_memory_protects_past_outputs(rule: Any) -> None:
    model, (past, _), (x, y) = network(), examples(6, seed=2), examples(6)
    free = kx.IncrementalModel(model, rule=rule, rate=5.0, damping=0.01)
    held = kx.IncrementalModel(model, rule=rule, rate=5.0, damping=0.01, memory=past)
    torch.testing.assert_close(held(past), model(past).detach())  # nothing is learnt yet
    free.learn(x, y)
    held.learn(x, y)
    assert relative(held(past), model(past).detach()) < 0.3 * relative(free(past), model(past).detach())
    with pytest.raises(ArgumentError, match="cannot be forgotten"):
        held.forget("memory 0")


def test_ridge_with_memory_is_the_solve_over_both() -> None:
    (past, label), (x, y), (more, _) = examples(4, seed=2), examples(5), examples(6, seed=1)
    both = kx.IncrementalModel(network(), damping=0.5, memory=torch.utils.data.TensorDataset(past, label))
    both.learn(x, y)
    plain = kx.IncrementalModel(network(), damping=0.5)
    plain.learn(torch.cat([past, x]), torch.cat([label, y]))
    assert relative(both(more), plain(more)) < 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_new_classes_grow_outputs(rule: Any) -> None:
    model, (x, y), (more, _) = network(), examples(8), examples(6, seed=1)
    learner = kx.IncrementalModel(model, rule=rule, damping=0.1, rate=1.0, memory=more)
    learner.learn(x, y)
    fresh = x[:4] + 5
    with pytest.raises(DatasetError, match=r"label 4 is unknown.*new_classes=True"):
        learner.learn(fresh, torch.full((4,), 4))
    names = learner.learn(fresh, torch.full((4,), 4), new_classes=True)
    assert learner(more).shape == (6, 5)
    start = learner(fresh)[:, 4].mean()
    for _ in range(30 if rule == "gradient" else 0):
        learner.learn(fresh, torch.full((4,), 4))
    assert (learner.predict(fresh) == 4).all(), start
    if rule != "gradient":  # the outputs stay; what their examples put in goes, in whatever order it came
        other = kx.IncrementalModel(model, rule=rule, damping=0.1, memory=more)
        for name in other.learn(fresh, torch.full((4,), 4), new_classes=True):
            other.forget(name)
        other.learn(x, y)
        for name in names:
            learner.forget(name)
        assert relative(learner(more), other(more)) < 1e-6
    assert model[2].out_features == 3  # type: ignore[union-attr]  # the caller's model is as it was


def test_merging_is_exact_for_a_linear_model_and_measured_for_others() -> None:
    (x, y), linear = examples(6), nn.Linear(4, 3).double()
    learner = kx.IncrementalModel(linear, damping=0.5)
    learner.learn(x, y)
    merged = learner.merge()
    torch.testing.assert_close(merged.model(x), learner(x))
    assert merged.relative < 1e-12
    assert merged.agreement == 1
    bent = kx.IncrementalModel(network(), damping=0.5)
    bent.learn(x, y)
    found = bent.merge(x)
    change = found.model(x).detach() - bent(x)
    assert found.largest == pytest.approx(float(change.abs().max()))
    assert found.relative == pytest.approx(float(change.norm() / (bent(x) - network()(x).detach()).norm()))
    assert found.relative > 1e-6
    assert "outputs change by" in str(found)
    with pytest.raises(ArgumentError, match="give inputs"):
        kx.IncrementalModel(network()).merge()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("last", [False, True])
def test_saved_and_loaded(rule: Any, last: bool, tmp_path: Path) -> None:
    model, (x, y), (more, _) = network(), examples(30), examples(6, seed=1)
    options: dict[str, Any] = {"parameters": ["2"]} if last else {"memory": more[:2]}
    learner = kx.IncrementalModel(model, rule=rule, damping=0.4, remember=8, **options)
    if last:
        learner.learn(x, y)
    else:
        learner.learn(x[:4], y[:4])
        learner.learn(x[4:6], torch.tensor([3, 3]), ids=["a", "b"], new_classes=True)
    other = kx.IncrementalModel.load(learner.save(tmp_path / "state"), network())
    assert other.ids == learner.ids
    assert relative(other(more), learner(more)) < 1e-9
    for one in (learner, other):
        one.learn(more[:1] + 1, torch.tensor([0]))
        one.forget(one.ids[-2])
    assert other.ids == learner.ids
    assert relative(other(more), learner(more)) < 1e-7


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    learner = kx.IncrementalModel(network(), damping=0.4)
    learner.learn(*examples(3))
    path = learner.save(tmp_path / "state")
    with pytest.raises(ModelError, match="other weights"):
        kx.IncrementalModel.load(path, nn.Sequential(nn.Linear(4, 3)).double())
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("no arrays")
    (tmp_path / "odd").write_bytes(data.replace(b'\\"ids\\"', b'\\"isd\\"'))
    for name in ("cut", "text", "odd", "missing"):
        with pytest.raises(TrajectoryError):
            kx.IncrementalModel.load(tmp_path / name, network())
    with pytest.raises(TrajectoryError, match="folder"):
        learner.save(tmp_path)


# A drop-in, and wrong input.


def test_a_drop_in_module_leaves_the_model_alone() -> None:
    model, (x, y) = network().train(), examples(5)
    weights = copy.deepcopy(model.state_dict())
    learner = kx.IncrementalModel(model, damping=0.4)
    torch.testing.assert_close(learner(x), model(x).detach())
    learner.learn(x, y)
    whole = nn.Sequential(learner, nn.Softmax(1)).train()
    torch.testing.assert_close(whole(x), learner(x).softmax(1))
    assert not learner.base.training
    assert model.training
    assert all(torch.equal(a, weights[name]) for name, a in model.state_dict().items())
    torch.testing.assert_close(copy.deepcopy(learner)(x), learner(x))
    assert learner.predict(x).tolist() == learner(x).argmax(1).tolist()
    assert learner.learn(x[0][None] + 1, 2) == [5]


def test_models_of_any_kind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.head = nn.Linear(9, 3)

        def forward(self, tokens: Tensor, extra: Tensor) -> Tensor:
            return self.head(torch.cat([self.layer(self.words(tokens)).mean(1), extra], 1))

    model = Two().double()
    inputs = (torch.randint(7, (6, 4)), torch.randn(6, 1, dtype=torch.float64))
    learner = kx.IncrementalModel(model, damping=0.3)
    learner.learn(inputs, torch.tensor([0, 1, 2, 0, 1, 2]))
    found = learner(*inputs)
    expected = learner.features.outputs(inputs) + learner.contributions(inputs).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    gru = kx.IncrementalModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), rule="logistic")
    gru.learn(torch.randn(3, 2, 2), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize(
    ("x", "y", "options", "kind", "message"),
    [
        (torch.zeros(2, 5).double(), [0, 1], {}, DatasetError, "cannot take inputs"),
        (torch.zeros(0, 4).double(), [], {}, DatasetError, "no examples"),
        (torch.full((2, 4), torch.nan).double(), [0, 1], {}, DatasetError, "NaN"),
        (torch.zeros(2, 4).double(), [0], {}, DatasetError, r"expected \(2,\)"),
        (torch.zeros(2, 4).double(), None, {}, DatasetError, "expected class numbers"),
        (torch.zeros(1, 4).double(), ["a"], {}, DatasetError, "expected class numbers"),
        (torch.zeros(2, 4).double(), [0, -1], {}, DatasetError, "reach from -1"),
        (torch.zeros(2, 4).double(), [0, 3], {}, DatasetError, "label 3 is unknown"),
        (torch.zeros(2, 4).double(), [0.0, 1.0], {}, DatasetError, r"\(2, 3\) numbers"),
        (torch.zeros(1, 4).double(), [[0.0, torch.nan, 1.0]], {}, DatasetError, "NaN"),
        (torch.zeros(2, 4).double(), [0, 1], {"ids": ["a", "a"]}, ArgumentError, "taken"),
        (torch.zeros(2, 4).double(), [0, 1], {"ids": ["a", "old"]}, ArgumentError, "taken"),
        (torch.zeros(2, 4).double(), [0, 1], {"ids": [1.5, 2]}, ArgumentError, "whole number or a text"),
    ],
)
def test_wrong_input_changes_nothing(x: Tensor, y: Any, options: Any, kind: Any, message: str) -> None:
    learner, (old, label) = kx.IncrementalModel(network()), examples(1)
    learner.learn(old, label, ids=["old"])
    before = learner(old)
    with pytest.raises(kind, match=message):
        learner.learn(x, y, **options)
    assert learner.ids == ["old"]
    assert torch.equal(learner(old), before)


def test_outputs_and_gradients_that_are_not_finite_are_refused() -> None:
    linear = nn.Linear(4, 3).double()
    nn.init.ones_(linear.weight)
    learner = kx.IncrementalModel(linear)
    with pytest.raises(DatasetError, match="outputs or their gradients hold NaN or infinite"):
        learner.learn(torch.full((1, 4), 1e308, dtype=torch.float64), [0])
    assert not learner.ids


def test_singular_systems_are_mended_by_the_damping_named() -> None:
    model, (x, y) = network(), examples(3)
    learner = kx.IncrementalModel(model, damping=0)
    learner.learn(x, y)
    before = learner(x)
    with pytest.raises(ArgumentError, match="singular") as error:
        learner.learn(x[:1], y[:1])
    assert torch.equal(learner(x), before)
    assert len(learner.ids) == 3
    mended = kx.IncrementalModel(model, damping=float(str(error.value).rpartition("damping=")[2].split()[0]))
    mended.learn(torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))
    torch.testing.assert_close(mended(x), before, rtol=1e-4, atol=1e-4)


def test_wrong_arguments() -> None:
    for options in (
        {"rule": "newton"}, {"solver": "sgd"}, {"damping": -1.0}, {"rate": 0}, {"remember": 0}, {"parameters": ["9"]},
        {"parameters": "2"}, {"loss": "huber"}, {"rule": "logistic", "damping": 0},
        {"memory": 5},
    ):  # fmt: skip
        with pytest.raises(ArgumentError):
            kx.IncrementalModel(network(), **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="cannot be forgotten"):
        kx.IncrementalModel(network()).forget(0)
    with pytest.raises(ModelError, match="no trainable"):
        kx.IncrementalModel(nn.Flatten())
    with pytest.raises(ArgumentError, match="learn some first"):
        kx.IncrementalModel(network(), rule="logistic").tune()
    stepping = kx.IncrementalModel(network(), rule="gradient")
    stepping.learn(*examples(3))
    with pytest.raises(ArgumentError, match="nothing is left out"):
        stepping.tune()


# The bill.


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[kx.Trajectory, nn.Module, Any]:
    model, (x, y) = network(), examples(20, seed=5)
    data = torch.utils.data.TensorDataset(x, y)
    return kx.train(model, data, epochs=2, batch_size=5, out=tmp_path / "run", progress=False), model, data


@pytest.mark.parametrize(
    ("rule", "target"),
    [("ridge", "all"), ("ridge", 1), ("gradient", "label"), ("logistic", "predicted")],
)
def test_added_terms_are_lines_of_the_bill(recorded: Any, rule: Any, target: Any, tmp_path: Path) -> None:
    run, model, data = recorded
    (x, y), (more, label) = examples(5), examples(3, seed=1)
    learner = kx.IncrementalModel(run, network(), rule=rule, damping=0.2, rate=1.0, remember=3)
    torch.testing.assert_close(learner(more), model(more).detach())
    learner.learn(x, y, ids=list("abcde"))
    queries = torch.utils.data.TensorDataset(more, label)
    bill = learner.explain(data, queries, target=target)
    assert bill.added is not None
    assert list(bill.added_names) == ["c", "d", "e", "earlier examples"]
    total = bill.baseline + bill.contributions.sum(1) + bill.regularizer + bill.buffers + bill.unattributed
    total = total + bill.added.sum(1) + bill.remainder
    torch.testing.assert_close(total, bill.prediction)
    assert float(bill.remainder.abs().max()) < 1e-9
    outputs = learner(more)
    column = {"predicted": outputs.argmax(1), "label": label, 1: torch.ones(3, dtype=torch.int64)}
    expected = outputs if target == "all" else outputs.gather(1, column[target][:, None])[:, 0]
    torch.testing.assert_close(bill.prediction, expected)
    a, phi = learner.engine.coefficients(), jacobian(model, x[2:])
    each = torch.einsum("qcp,mkp,mk->qmc", jacobian(model, more), phi, a)
    own = each if target == "all" else each.gather(2, column[target][:, None, None].expand(-1, 3, 1))[..., 0]
    torch.testing.assert_close(bill.added[:, :3], own)
    read = kx.Explanation.load(bill.save(tmp_path / "bill"))
    assert torch.equal(read.added, bill.added)  # type: ignore[arg-type]
    assert list(read.added_names) == list(bill.added_names)
    text = bill.bill(0)
    assert "added: c" in text
    assert "added: earlier examples" in text
    bill.plot(0)


def test_a_bill_of_a_grown_output_begins_where_it_began(recorded: Any) -> None:
    run, _, data = recorded
    x, _ = examples(4)
    learner = kx.IncrementalModel(run, network(), damping=0.2)
    learner.learn(x + 4, torch.full((4,), 3), new_classes=True)
    bill = learner.explain(data, torch.cat([x[:2] + 4, x[:2]]), kernel=False)
    assert bill.output is not None
    assert bill.output.tolist()[:2] == [3, 3]
    assert not bill.contributions[:2].any()
    assert bill.added is not None
    torch.testing.assert_close(bill.baseline[:2], torch.full((2,), learner.growth[0][1]).double())
    torch.testing.assert_close(bill.baseline + bill.contributions.sum(1) + bill.added.sum(1), bill.prediction)
    with pytest.raises(kx.TargetError, match="choose one"):
        learner.explain(data, x, "all")


def test_what_cannot_be_explained(recorded: Any) -> None:
    run, model, data = recorded
    x, y = examples(3)
    learner = kx.IncrementalModel(run, model)
    with pytest.raises(kx.TargetError, match="amounts of outputs"):
        learner.explain(data, torch.utils.data.TensorDataset(x, y), "loss")
    with pytest.raises(kx.TargetError, match="expected one of their numbers"):
        learner.explain(data, x, "label")
    with pytest.raises(ArgumentError, match="recorded training"):
        kx.IncrementalModel(model).explain(data, x)
    with pytest.raises(ArgumentError, match="give a model"):
        kx.IncrementalModel(run)
    with pytest.raises(ModelError):
        kx.IncrementalModel(run, network(4))
    plain = learner.explain(data, x)
    assert not plain.added_names
    torch.testing.assert_close(plain.prediction, kx.explain(run, model, data, x).prediction)


def test_the_optimum_is_found_in_float32_with_a_large_kernel() -> None:
    # Gradients of float32 make a Gram matrix that is symmetric to 1e-7 only; Newton's method stalled on it once.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = 3 * torch.randn(40, 64), torch.randint(10, (40,))
    learner = kx.IncrementalModel(model, rule="logistic", memory=x[:10])
    for rows in (slice(10, 30), slice(30, 33), slice(33, 40)):
        learner.learn(x[rows], y[rows])
    a, held = learner.engine.coefficients(), learner.held
    assert torch.equal(learner.engine.gram, learner.engine.gram.T)  # type: ignore[attr-defined]
    outputs = held.column("base") + (learner.engine.gram @ a.flatten()).view_as(a)  # type: ignore[attr-defined]
    assert learner.chosen_damping is not None
    gap = held.column("goal") - outputs.softmax(1) - learner.chosen_damping * a
    assert float(gap.abs().max()) < 1e-8


class Once(torch.autograd.Function):
    """tanh, whose derivative torch will not differentiate again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class Bent(nn.Module):
    """A network with that function, and outputs of one number an example, [n]."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.plain = nn.Linear(4, 6).double(), nn.Linear(6, 1).double(), plain

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h.tanh() if self.plain else Once.apply(h))[:, 0]


@pytest.mark.parametrize("rule", ["gradient", "ridge"])
def test_outputs_of_any_shape_and_operations_without_a_second_derivative(rule: Any) -> None:
    (x, _), (more, _) = examples(20), examples(5, seed=1)
    y = x[:, 0].sin()
    found = []
    for plain in (True, False):
        own = lambda outputs, targets: (outputs - targets).square()  # noqa: E731
        learner = kx.IncrementalModel(Bent(plain), rule=rule, damping=0.1, loss=own, remember=5, memory=more[3:])
        learner(more)  # nothing learnt yet says nothing about derivatives
        learner.learn(x, y)
        assert learner.form == "vector"
        found.append(learner(more))
        assert found[-1].shape == (5,)
        assert learner.predict(more).shape == (5, 1)
    torch.testing.assert_close(*found)
