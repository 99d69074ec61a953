"""Convex problems have one solution: trained here, they are scikit-learn's, coefficient by coefficient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, ModelError
from kxexplain.learning.convex import dual_coefficients


def overlapping(n: int = 40) -> tuple[Tensor, Tensor]:
    """Two clusters that no line separates, standardised."""
    random = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = random.normal(size=(n, 3)) + 1.2 * y[:, None]
    return torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy(y)


def descended(
    model: nn.Module, data: TensorDataset, loss: str, decay: float, rates: Callable[[int], float], steps: int, out: Path
) -> kx.Trajectory:
    """Full-batch steps; weights decay, the intercept of the last layer does not."""
    last = model if isinstance(model, nn.Linear) else model[-1]
    groups = [{"params": [last.weight], "weight_decay": decay}]
    groups += [] if last.bias is None else [{"params": [last.bias]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    x, y = data.tensors
    function = kx.trajectory.LOSSES[loss]
    with kx.record(model, optimizer, loss, data, out=out, keep=steps) as recorder:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rates(step)
            optimizer.zero_grad()
            value = function(model(x), y).mean()
            value.backward()
            optimizer.step()
            recorder.step(range(len(y)), value.item())
    return recorder.trajectory


def pegasos(decay: float, start: int) -> Callable[[int], float]:
    """η_t = 2/(λ(t + t_0)): under charged decay a step's weight in the sum then grows as t."""
    return lambda step: 2 / (decay * (step + start))


def signed(svc: SVC, n: int) -> np.ndarray:
    """libsvm's y_i α_i for every example."""
    found = np.zeros(n)
    found[svc.support_] = svc.dual_coef_[0]
    return found


def assert_same_dual(found: Tensor, svc: SVC, bound: float) -> None:
    """Correlation at least 0.999, largest difference 2 % of C."""
    ours, theirs = found[:, 0].numpy(), signed(svc, len(found))
    assert np.corrcoef(ours, theirs)[0, 1] >= 0.999
    assert np.abs(ours - theirs).max() <= 0.02 * bound


def random_features() -> nn.Module:
    """Of mean square norm 1 or so, on which full-batch steps take fewest to settle."""
    made = nn.Sequential(nn.Linear(3, 80), nn.ReLU(), nn.Linear(80, 1)).double()
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.mul_(0.25)
    return made


def test_hinge_with_decay_is_the_svm(tmp_path: Path) -> None:
    (x, y), bound = overlapping(), 0.5
    decay, model = 1 / (len(y) * bound), nn.Linear(3, 1).double()
    nn.init.zeros_(model.weight)
    trajectory = descended(model, TensorDataset(x, y), "hinge", decay, pegasos(decay, 40), 800, tmp_path)
    found = dual_coefficients(trajectory, model, TensorDataset(x, y), anchors=8)
    svc = SVC(kernel="linear", C=bound).fit(x, y)
    assert_same_dual(found.coefficients, svc, bound)
    assert found.misfit < 1e-9
    inside = found.coefficients[:, 0].abs() > 0.02 * bound
    assert set(torch.nonzero(inside)[:, 0].tolist()) <= set(svc.support_.tolist())
    torch.testing.assert_close(model.weight[0].detach(), found.coefficients[:, 0] @ x)  # the representer theorem


@pytest.mark.slow
def test_on_frozen_random_features_it_is_the_svm_on_their_kernel(tmp_path: Path) -> None:
    (x, y), bound = overlapping(), 0.1
    torch.manual_seed(0)
    decay, model = 1 / (len(y) * bound), random_features()
    model[0].requires_grad_(False)
    phi = model[:2](x)
    trajectory = descended(model, TensorDataset(x, y), "hinge", decay, pegasos(decay, 5), 2500, tmp_path)
    found = dual_coefficients(trajectory, model, TensorDataset(x, y), anchors=39)
    assert_same_dual(found.coefficients, SVC(kernel="precomputed", C=bound).fit(phi @ phi.T, y), bound)


@pytest.mark.slow
def test_on_frozen_tangent_features_too(tmp_path: Path) -> None:
    (x, y), bound = overlapping(), 0.1
    torch.manual_seed(0)
    network = random_features()
    phi = torch.from_numpy(kx.TangentFeatures(network, dim=64).fit_transform(x))
    decay, model = 1 / (len(y) * bound), nn.Linear(64, 1).double()
    trajectory = descended(model, TensorDataset(phi, y), "hinge", decay, pegasos(decay, 5), 2500, tmp_path)
    found = dual_coefficients(trajectory, model, TensorDataset(phi, y), anchors=39)
    assert_same_dual(found.coefficients, SVC(kernel="precomputed", C=bound).fit(phi @ phi.T, y), bound)


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_logistic_loss_with_decay_is_logistic_regression(tmp_path: Path, classes: int) -> None:
    x, y = overlapping()
    y = y if classes == 2 else (x[:, 0] > 0.5).long() + y
    loss, outputs = ("logistic", 1) if classes == 2 else ("cross_entropy", 3)
    bound = 0.25
    decay, model = 1 / (len(y) * bound), nn.Linear(3, outputs).double()
    data = TensorDataset(x, y)
    trajectory = descended(model, data, loss, decay, lambda step: 0.8, 250, tmp_path)
    theirs = LogisticRegression(C=bound, tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(model.weight.detach(), theirs.coef_, atol=1e-5)
    found = dual_coefficients(trajectory, model, data, anchors=8).coefficients
    # The stationary point says d_i = C (y_i − p_i), example by example.
    p = torch.from_numpy(theirs.predict_proba(x))
    expected = (y - p[:, 1])[:, None] if classes == 2 else nn.functional.one_hot(y, 3) - p
    torch.testing.assert_close(found, bound * expected.to(found), atol=1e-5, rtol=0)


def test_a_network_has_no_dual_coefficients(tmp_path: Path) -> None:
    x, y = overlapping()
    data: Any = TensorDataset(x, y)
    torch.manual_seed(0)
    model = random_features()
    trajectory = kx.train(model, data, "logistic", epochs=3, batch_size=8, out=tmp_path / "a", progress=False)
    with pytest.raises(ModelError, match="linear in its"):
        dual_coefficients(trajectory, model, data)
    with pytest.raises(ArgumentError, match="at least 2"):
        dual_coefficients(trajectory, model, data, anchors=1)
