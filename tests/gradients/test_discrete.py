"""Completeness of the discrete gradient: ⟨D, θ'−θ⟩ = f(θ')−f(θ), for every case and steps of any size."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kxexplain.gradients import DiscreteGradient, layout_of, squared_norm, trainable
from kxexplain.gradients.capture import Capture
from kxexplain.gradients.products import dot
from kxexplain.trajectory.batches import call, count, outputs_2d, take
from tests import cases, reference
from tests.cases import CASES, Case
from tests.laws import COMPLETE, assert_close

EVERY = lambda outputs, rows: outputs  # noqa: E731


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in named if t.is_floating_point()}


def moved(values: dict[str, Tensor], size: float, model: nn.Module) -> dict[str, Tensor]:
    """The values after a random step; buffers stay positive, as variances must."""
    generator = torch.Generator().manual_seed(5)
    buffers = {name for name, _ in model.named_buffers()}
    ends = {}
    for name, value in values.items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        ends[name] = value * torch.exp(size * noise) if name in buffers else value + size * noise
    return ends


def evaluated(model: nn.Module, values: dict[str, Tensor], inputs: object) -> Tensor:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in values:
                tensor.copy_(values[name])
        return outputs_2d(call(model, inputs))


def secant_of(case: Case, dtype: torch.dtype, size: float, queries: int = 4):
    problem = case.build(dtype, queries=queries)
    model = problem.model.eval()
    start = moving(model)
    end = moved(start, size, model)
    found = DiscreteGradient(copy.deepcopy(model), list(start))(start, end, problem.inputs, EVERY)
    return problem, start, end, found


def some_slow(names: Iterable[str]) -> list[Any]:
    """The names; variants of the encoder and of the LSTM, which take long, only where time does not count."""
    return [pytest.param(n, marks=pytest.mark.slow) if n.startswith(("encoder-", "lstm-")) else n for n in names]


@pytest.mark.parametrize("size", [1e-6, pytest.param(1e-2, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("name", list(CASES))
def test_completeness_at_steps_of_any_size(name: str, size: float, dtype: torch.dtype) -> None:
    problem, start, end, found = secant_of(CASES[name], dtype, size)
    change = found.end - found.start
    assert_close(found.start, evaluated(problem.model, start, problem.inputs), 1e-6)
    assert_close(found.end, evaluated(problem.model, end, problem.inputs), 1e-6)
    direction = {key: end[key] - start[key] for key in start}
    error = (found.along(direction) - change).norm()
    # A change smaller than the values' own rounding cannot be met better than that rounding.
    floor = 32 * torch.finfo(dtype).eps * found.end.norm()
    assert float(error) <= COMPLETE[dtype] * float(change.norm()) + float(floor)


@pytest.mark.parametrize("name", some_slow(cases.names(smooth=True)))
def test_nearly_equal_ends_give_the_ordinary_gradient(name: str) -> None:
    problem, _start, _end, found = secant_of(CASES[name], torch.float64, 1e-7)
    parameters = reference.parameters(problem.model)
    dense = reference.jacobian(problem.model, problem.inputs)
    at = 0
    for key, parameter in parameters.items():
        probe = {key: torch.randn_like(parameter)}
        expected = dense[..., at : at + parameter.numel()] @ probe[key].flatten()
        at += parameter.numel()
        scale = dense.norm() * probe[key].norm()
        assert float((found.along(probe) - expected).norm() / scale) < 2e-5, key


@pytest.mark.parametrize("name", some_slow(CASES))
def test_an_example_s_gradient_does_not_depend_on_its_company(name: str) -> None:
    """D of a batch is D of each alone: completeness of the sum must not hide a swap among examples."""
    problem, start, end, together = secant_of(CASES[name], torch.float64, 0.1)
    inputs = problem.inputs
    discrete = DiscreteGradient(copy.deepcopy(problem.model).eval(), list(start))
    for i in range(count(inputs)):
        alone = discrete(start, end, take(inputs, slice(i, i + 1)), EVERY)
        for key in reference.parameters(problem.model):
            probe = {key: end[key] - start[key]}
            found, expected = together.along(probe)[i], alone.along(probe)[0]
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("queries", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["time-unknown", "time-maximum", "lstm-time-first", "encoder-time-first"])
def test_axes_of_equal_length_are_not_confused(name: str, queries: int) -> None:
    """As many queries as times, features or layers: sizes do not tell which axis holds the examples."""
    _, start, end, found = secant_of(CASES[name], torch.float64, 0.1, queries)
    direction = {key: end[key] - start[key] for key in start}
    torch.testing.assert_close(found.along(direction), found.end - found.start, atol=1e-11, rtol=1e-11)


def test_a_quadratic_model_has_the_midpoint_gradient() -> None:
    """f = xᵀ A B x with both matrices moving: D_A = x (B̄x)ᵀ, D_B = (Āᵀx) xᵀ, in closed form."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
            self.b = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return ((x @ self.a) * (x @ self.b.T)).sum(1)

    model, x = Quadratic(), torch.randn(3, 5, dtype=torch.float64)
    start = moving(model)
    end = moved(start, 1.0, model)
    found = DiscreteGradient(copy.deepcopy(model), list(start))(start, end, x, EVERY)
    a, b = ((start[key] + end[key]) / 2 for key in "ab")
    probe = {key: torch.randn_like(value) for key, value in start.items()}
    expected_a = torch.einsum("ni,ij,nj->n", x, probe["a"], x @ b.T)
    expected_b = torch.einsum("nj,ji,ni->n", x @ a, probe["b"], x)
    assert_close(found.along({"a": probe["a"]})[:, 0], expected_a, 1e-13)
    assert_close(found.along({"b": probe["b"]})[:, 0], expected_b, 1e-13)


def test_nothing_moved() -> None:
    """Equal ends: the ordinary gradient, no division by zero."""
    for name in ("mlp-relu", "mlp-gelu", "sort", "encoder", "argmax", "custom-numpy"):
        problem, _, _, found = secant_of(CASES[name], torch.float64, 0.0)
        norms = squared_norm(found.factors)
        assert bool(norms.isfinite().all()), name
        assert torch.equal(found.start, found.end)
        if name in ("mlp-relu", "mlp-gelu", "encoder", "sort"):
            dense = reference.jacobian(problem.model, problem.inputs)
            assert_close(norms, dense.square().sum(-1), 1e-10)


def test_a_custom_function_that_leaves_torch_keeps_its_gradient() -> None:
    """Not only the sum: D is near the ordinary gradient for a small step, the function's own backward used."""
    problem, start, _end, found = secant_of(CASES["custom-numpy"], torch.float64, 1e-6)
    probe = {key: torch.randn_like(value) for key, value in start.items()}
    flat = torch.cat([probe[key].flatten() for key in reference.parameters(problem.model)])
    expected = reference.jacobian(problem.model, problem.inputs) @ flat
    assert_close(found.along(probe), expected, 1e-3)


def test_only_some_names_move() -> None:
    """Parameters not named stay constants."""
    problem = CASES["mlp-tanh"].build()
    model = problem.model.eval()
    start = {"2.weight": moving(model)["2.weight"]}
    end = {"2.weight": start["2.weight"] + 0.3}
    found = DiscreteGradient(copy.deepcopy(model), ["2.weight"])(start, end, problem.inputs, EVERY)
    change = evaluated(model, end, problem.inputs) - evaluated(model, start, problem.inputs)
    assert_close(found.along({"2.weight": end["2.weight"] - start["2.weight"]}), change, 1e-12)
    assert {name for factor in found.factors for name in factor.names} == {"2.weight"}


def test_buffers_may_move_too() -> None:
    """Running statistics are known at both ends: their part of the change is ⟨D_buffers, Δ⟩."""
    _problem, start, end, found = secant_of(CASES["batch-norm-1d"], torch.float64, 0.5)
    statistics = {key: end[key] - start[key] for key in start if "running" in key}
    rest = {key: end[key] - start[key] for key in start if "running" not in key}
    assert float(found.along(statistics).norm()) > 0
    assert_close(found.along(statistics) + found.along(rest), found.end - found.start, 1e-12)


def test_along_equals_the_dense_product() -> None:
    _problem, start, _end, found = secant_of(CASES["twice"], torch.float64, 0.2)
    probe = {key: torch.randn_like(value) for key, value in start.items()}
    assert_close(found.along(probe), dot(found.factors, probe), 1e-14)


def test_the_largest_of_a_bag() -> None:
    """The one mode of embedding bags that is not linear in the table."""
    model = nn.EmbeddingBag(7, 5, mode="max").double()
    start = moving(model)
    end = moved(start, 1.0, model)
    found = DiscreteGradient(model, list(start))(start, end, torch.tensor([[1, 3, 4, 6]]), EVERY)
    assert_close(found.along({"weight": end["weight"] - start["weight"]}), found.end - found.start, 1e-13)
    assert_close(found.end, end["weight"][[1, 3, 4, 6]].amax(0, keepdim=True), 1e-15)


FOREIGN = ("custom-numpy", "into-plain", "spectrum")
"""What leaves torch, writes into plain tensors, or computes with complex numbers."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(CASES))
def test_every_use_is_in_sight(name: str, training: bool) -> None:
    """Every architecture is spared a backward pass per example."""
    problem = CASES[name].build()
    model, inputs = problem.model.train(training), problem.inputs
    layout = layout_of(model, inputs, trainable(model))
    assert not layout.blind
    assert not layout.loose
    capture = Capture(trainable(model), layout, count(inputs))
    with capture:
        call(model, inputs)
    assert not capture.loose


def captures(monkeypatch: pytest.MonkeyPatch) -> list[Capture]:
    """Every capture made from now on."""
    made: list[Capture] = []
    plain = Capture.__init__

    def noted(self: Capture, *args: Any) -> None:
        made.append(self)
        plain(self, *args)

    monkeypatch.setattr(Capture, "__init__", noted)
    return made


ALONE = ("time-maximum", "time-unknown")
"""Operations without a rule whose first axis is not the examples': exact one example at a time."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in FOREIGN])
def test_no_model_falls_back_unnoticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that cannot be followed counts as one operation, exactly, and unknown uses are taken example by example:
    either would hide a defect of our own, and cost time.
    """  # fmt: skip
    monkeypatch.setattr(DiscreteGradient, "_at_midpoint", lambda *_: pytest.fail("not followed"))
    made = captures(monkeypatch)
    problem = CASES[name].build()
    start = moving(problem.model.eval())
    discrete = DiscreteGradient(problem.model, list(start))
    discrete(start, moved(start, 0.1, problem.model), problem.inputs, EVERY)
    assert not made[-1].loose
    assert discrete.one_by_one == (name in ALONE)


@pytest.mark.parametrize("name", ["type_as", "to", "broadcast_tensors"])
def test_operations_that_return_an_input_leave_it_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier operation has saved of it would be changed, and the code no longer followed."""
    monkeypatch.setattr(DiscreteGradient, "_at_midpoint", lambda *_: pytest.fail("not followed"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x).tanh(), self.b(x)
            product = a * a
            again = torch.broadcast_tensors(product, b)[0] if name == "broadcast_tensors" else getattr(product, name)(b)
            return product * b + again * product

    torch.manual_seed(0)
    model = Model().double()
    start = moving(model)
    end = {key: value + 0.3 * torch.randn_like(value) for key, value in start.items()}
    found = DiscreteGradient(model, list(start))(start, end, torch.randn(5, 4, dtype=torch.float64), EVERY)
    assert found.correction is None
    torch.testing.assert_close(found.along(found.direction), found.end - found.start, rtol=1e-12, atol=1e-12)
