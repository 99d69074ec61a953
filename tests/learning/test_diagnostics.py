"""The input-versus-parameter gradient inequality, on many networks and by dense matrices."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kxexplain as kx

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Identity)


def network(draw: torch.Generator) -> tuple[nn.Module, Tensor]:
    """A random MLP, and a few inputs, of random sizes and scales."""
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))  # noqa: E731
    widths = [pick(1, 12) for _ in range(pick(2, 6))]
    activation = ACTIVATIONS[pick(0, len(ACTIVATIONS) - 1)]
    modules: list[nn.Module] = []
    for a, b in pairwise(widths):
        layer = nn.Linear(a, b, bias=pick(0, 3) > 0, dtype=torch.float64)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 2.0 ** pick(-3, 2))
        modules += [layer, activation()]
    return nn.Sequential(*modules[: len(modules) - pick(0, 1)]), torch.randn(
        pick(1, 3), widths[0], generator=draw, dtype=torch.float64
    ) * 2.0 ** pick(-3, 3)


def test_it_holds_on_a_thousand_random_networks_and_inputs() -> None:
    draw, ratios = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        model, inputs = network(draw)
        found = kx.gradient_inequality(model, inputs)
        assert found.holds, model
        ratios.append(found.ratio)
    every = torch.cat(ratios)
    every = every[~every.isnan()]  # 0/0: units that are dead for good
    assert float(every.max()) <= 1 + 1e-9
    assert float((every > 0.05).double().mean()) > 0.1  # not empty: many come close


@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer_with_one_output_has_equality(bias: bool) -> None:
    found = kx.gradient_inequality(nn.Linear(5, 1, bias=bias).double(), torch.randn(7, 5, dtype=torch.float64))
    torch.testing.assert_close(found.left, found.right, rtol=1e-12, atol=0)
    scaled = nn.Sequential(nn.Linear(5, 1), nn.Tanh()).double()
    found = kx.gradient_inequality(scaled, torch.randn(7, 5, dtype=torch.float64), lambda f: 3 * f[:, 0])
    torch.testing.assert_close(found.left, found.right, rtol=1e-12, atol=0)


def test_both_sides_by_dense_jacobians() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), nn.GELU()).double()
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    found = kx.gradient_inequality(model, x, 1)
    assert found.layers == ("1", "2.1")
    linear = [model[1], model[2][1]]
    for i in range(3):
        below = [lambda v: v.flatten(), lambda v: model[2][0](model[1](v.reshape(1, -1)))[0]]
        value = lambda v: model(v[None])[0, 1]  # noqa: E731
        slope = torch.autograd.functional.jacobian(value, x[i]).norm() ** 2
        for k, layer in enumerate(linear):
            h = below[k](x[i])
            j = torch.autograd.functional.jacobian(below[k], x[i]).reshape(len(h), -1)
            left = slope * (1 + h @ h) / (torch.linalg.svdvals(layer.weight)[0] * torch.linalg.svdvals(j)[0]) ** 2
            gradients = torch.autograd.grad(value(x[i]), [layer.weight, layer.bias])
            torch.testing.assert_close(found.left[i, k], left.detach())
            torch.testing.assert_close(found.right[i, k], sum(g.square().sum() for g in gradients))
    kernel = kx.tangent_kernel(lambda_model(model, 1), x)
    torch.testing.assert_close(found.right.sum(1), kernel.diagonal())


def lambda_model(model: nn.Module, output: int) -> nn.Module:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, output : output + 1]

    return One()


def test_along_a_trajectory_and_left_as_it_was(tmp_path: Path) -> None:
    data = kx.datasets.toy().train
    inputs = data.tensors[0][:4]
    model = nn.Sequential(nn.Linear(inputs.shape[1], 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    trajectory = kx.train(model, data, epochs=2, out=tmp_path, progress=False)
    before = [p.detach().clone() for p in model.parameters()]
    found = kx.gradient_inequality_along(trajectory, model, inputs)
    assert list(found) == [state.step for state in trajectory.states]
    assert all(one.holds for one in found.values())
    torch.testing.assert_close(found[len(trajectory)].right, kx.gradient_inequality(model, inputs).right)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert kx.plot_training(trajectory, name="toy").axes


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv1d(1, 1, 1)), "with Conv1d"),
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), "not elementwise"),
        (nn.Bilinear(3, 3, 1), "got a Bilinear"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "with LayerNorm"),
    ],
)
def test_other_architectures(model: nn.Module, message: str) -> None:
    with pytest.raises(kx.ModelError, match=message):
        kx.gradient_inequality(model, torch.randn(2, 3))


def test_a_layer_used_twice_and_an_output_that_is_not_there() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(kx.ModelError, match="used twice"):
        kx.gradient_inequality(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 3))
    with pytest.raises(kx.ArgumentError, match="output 3"):
        kx.gradient_inequality(layer, torch.randn(2, 3), 3)
