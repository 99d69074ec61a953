"""Kernel machines by gradient descent: against the exact solution, against each other, and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kxexplain.errors import ArgumentError, DatasetError, TrainingError, TrajectoryError
from kxexplain.kernels import tangent_kernel
from kxexplain.learning.kernel_machine import KernelMachine
from kxexplain.learning.spaces import Preconditioner
from kxexplain.learning.tangent_features import TangentFeatures


def rbf(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square())


def points(n: int, seed: int = 0, d: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0].sin() * x[:, 1], x[:, 2].tanh()], 1)


def machine(kernel: Any = rbf, **options: Any) -> KernelMachine:
    return KernelMachine(kernel, **{"epochs": 60, "batch_size": 16, "directions": 20, "subsample": 60, **options})


def test_squared_loss_ends_at_the_interpolating_solution() -> None:
    (x, y), (new, _) = points(60), points(30, 1)
    wanted = rbf(new, x) @ torch.linalg.solve(rbf(x, x), y)
    found = machine(epochs=150).fit(TensorDataset(x, y))
    assert float((found(x) - y).abs().max()) < 1e-2
    assert float((found(new) - wanted).norm() / wanted.norm()) < 3e-2


@pytest.mark.parametrize("directions", [0, 5])
def test_a_step_is_the_preconditioned_gradient_written_out(directions: int) -> None:
    x, y = points(24)
    found = machine(epochs=1, batch_size=24, directions=directions, subsample=10, rate=0.3).fit(TensorDataset(x, y))
    # From f = 0 the mean gradient is g = −y (2 outputs: 2/C = 1). P is written out as a matrix that acts on the
    # coefficients over all 24 examples: a ↦ a − S V (damping/σ) Vᵀ K(S, ·) a.
    first = machine(epochs=1, batch_size=24, directions=directions, subsample=10)
    sample = first.fit(TensorDataset(x, y))._space._sample  # type: ignore[union-attr]
    values, vectors = torch.linalg.eigh(rbf(x[sample], x[sample]))
    values, vectors = values.flip(0), vectors.flip(1)
    out = torch.eye(24, dtype=torch.float64)
    for i in range(directions):
        row = vectors[:, i] @ rbf(x[sample], x)
        out[sample] -= torch.outer(vectors[:, i], row) * (1 - values[directions] / values[i]) / values[i]
    torch.testing.assert_close(found.coefficients, 0.3 / 24 * out @ y)


def test_what_is_taken_out_leaves_the_next_eigenvalue() -> None:
    x, _ = points(40)
    gram = rbf(x, x)
    made = Preconditioner.of(gram, 6)
    # K_P = K − Σ damping e_i e_iᵀ on the sample itself: its largest eigenvalue is the seventh of K.
    v = made.vectors
    left = gram - v @ torch.diag(made.damping * made.sigma) @ v.T
    assert float(torch.linalg.eigvalsh(left)[-1]) == pytest.approx(float(torch.linalg.eigvalsh(gram)[-7]))
    assert made.flattest == pytest.approx(float(torch.linalg.eigvalsh(gram)[-7]) / 40)
    assert made.diagonal == pytest.approx(float(left.diagonal().max()))


def test_directions_save_epochs() -> None:
    data = TensorDataset(*points(60))
    plain, steep = (machine(directions=d, epochs=10).fit(data).history[-1]["loss"] for d in (0, 20))
    assert steep < 0.2 * plain


def test_a_modules_tangent_kernel_held_or_not_is_that_function() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double(), points(40)
    made = [
        machine(kernel, epochs=5, memory=memory).fit(TensorDataset(x, y))
        for kernel, memory in ((model, "1GB"), (model, 20_000), (lambda a, b: tangent_kernel(model, a, b), "1GB"))
    ]
    for other in made[1:]:
        torch.testing.assert_close(made[0](x), other(x))


def test_over_features_it_is_the_machine_of_the_features_kernel() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double(), points(40)
    features = TangentFeatures(model, dim=64, seed=1)
    over = machine(features, epochs=5).fit(TensorDataset(x, y))
    phi = TangentFeatures(model, dim=64, seed=1).fit(x)
    inner = lambda a, b: torch.from_numpy(phi.transform(a) @ phi.transform(b).T)  # noqa: E731
    torch.testing.assert_close(over(x), machine(inner, epochs=5).fit(TensorDataset(x, y))(x))
    assert over.coefficients.shape == (64, 2)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_classes_are_learnt(loss: str) -> None:
    x, y = points(80)
    labels = (y[:, 0] > 0).long() + (y[:, 1] > 0.5).long()
    found = machine(loss=loss).fit(TensorDataset(x, labels))(x)
    assert found.shape == (80, 3)
    assert float((found.argmax(1) == labels).double().mean()) > 0.95


def test_single_outputs_too() -> None:
    x, y = points(60)
    found = machine(loss="logistic").fit(TensorDataset(x, (y[:, 0] > 0).long()))(x)
    assert float(((found[:, 0] > 0) == (y[:, 0] > 0)).double().mean()) > 0.95
    hinged = machine(loss="hinge", rate=0.5).fit(TensorDataset(x, (y[:, 0] > 0).long()))(x)
    assert float(((hinged[:, 0] > 0) == (y[:, 0] > 0)).double().mean()) > 0.95


def test_the_best_epoch_is_kept_and_patience_stops() -> None:
    (x, y), (other, truth) = points(30), points(30, 1)
    noisy = y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = machine(epochs=80, patience=3).fit(TensorDataset(x, noisy), TensorDataset(other, truth))
    course = [entry["validation"] for entry in found.history]
    best = course.index(min(course))
    assert len(course) == best + 4 < 80
    assert float((found(other) - truth).square().mean()) == pytest.approx(course[best])


def test_interrupted_and_resumed_it_ends_where_it_would_have(tmp_path: Path) -> None:
    data = TensorDataset(*points(40))
    whole = machine(epochs=6).fit(data, out=tmp_path / "whole.safetensors")
    machine(epochs=2).fit(data, out=tmp_path / "part.safetensors")
    resumed = machine(epochs=6).fit(data, out=tmp_path / "part.safetensors", resume=True)
    assert torch.equal(resumed.coefficients, whole.coefficients)
    assert resumed.history == whole.history
    again = machine(epochs=6).fit(data, out=tmp_path / "part.safetensors", resume=True)
    assert torch.equal(again.coefficients, whole.coefficients)


def test_another_networks_kernel_is_not_resumed_with(tmp_path: Path) -> None:
    data = TensorDataset(*points(20))
    torch.manual_seed(0)
    one, other = (nn.Linear(3, 2).double() for _ in range(2))
    for number, kernels in enumerate(
        [
            (one, other),
            (TangentFeatures(one, 32), TangentFeatures(other, 32)),
            (TangentFeatures(one, 32), TangentFeatures(one, 48)),
        ]
    ):
        file = tmp_path / f"{number}.safetensors"
        machine(kernels[0], epochs=1).fit(data, out=file)
        with pytest.raises(TrajectoryError, match=r"another training \(weights"):
            machine(kernels[1], epochs=2).fit(data, out=file, resume=True)
        machine(kernels[0], epochs=2).fit(data, out=file, resume=True)


def test_errors(tmp_path: Path) -> None:
    x, y = points(20)
    data, file = TensorDataset(x, y), tmp_path / "machine.safetensors"
    for wrong, message in (
        ({"epochs": 0}, "epochs=0"),
        ({"directions": -1}, "directions=-1"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"loss": "hinge"}, "curvature"),
        ({"patience": 0}, "patience=0"),
        ({"memory": "much"}, "much"),
    ):
        with pytest.raises(ArgumentError, match=message):
            machine(**wrong)
    with pytest.raises(ArgumentError, match="kernel='rbf'"):
        machine("rbf")
    with pytest.raises(ArgumentError, match="NaN"):
        machine(lambda a, b: rbf(a, b) * float("nan")).fit(data)
    with pytest.raises(DatasetError, match="training set is empty"):
        machine().fit(TensorDataset(x[:0], y[:0]))
    with pytest.raises(DatasetError, match="cannot take the inputs"):
        machine(nn.Linear(3, 2).double(), epochs=1).fit(data)(x[:, :2])
    with pytest.raises(ArgumentError, match="validation"):
        machine(patience=2).fit(data)
    with pytest.raises(ArgumentError, match="do not fit loss"):
        machine(loss="logistic").fit(TensorDataset(x, torch.zeros(20, 2, 3)))
    with pytest.raises(ArgumentError, match="positive semi-definite"):
        machine(lambda a, b: -rbf(a, b)).fit(data)
    with pytest.raises(ArgumentError, match="expected a matrix"):
        machine(lambda a, b: rbf(a, b)[:, 0]).fit(data)
    with pytest.raises(DatasetError, match="classes"):
        machine().fit(TensorDataset(x, torch.arange(20) % 2), TensorDataset(x, torch.arange(20)))
    with pytest.raises(TrainingError, match="not been trained"):
        machine()(x)
    with pytest.raises(TrainingError, match="grew"):
        machine(rate=1e3).fit(data)
    machine(epochs=1).fit(data, out=file)
    with pytest.raises(TrajectoryError, match="resume"):
        machine(epochs=1).fit(data, out=file)
    with pytest.raises(TrajectoryError, match="batch_size: 16, now 8"):
        machine(epochs=2, batch_size=8).fit(data, out=file, resume=True)
    file.write_bytes(b"nothing")
    with pytest.raises(TrajectoryError, match="no readable"):
        machine(epochs=2).fit(data, out=file, resume=True)
