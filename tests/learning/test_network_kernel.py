"""A network's kernel and features inside scikit-learn: against Gram matrices that were computed by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.decomposition import KernelPCA
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, SVR, LinearSVC
from torch import nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError
from tests.laws import assert_positive_semidefinite, assert_symmetric


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def rows(n: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(n, 4))
    return x, (x[:, 0] * x[:, 1] > 0).astype(int)


@pytest.fixture(params=["tangent", "path"])
def pair(request: Any, tmp_path: Path) -> tuple[kx.NetworkKernel, Any]:
    """A kernel, and the function that it must equal."""
    model, (x, y) = network(), rows()
    if request.param == "tangent":
        return kx.NetworkKernel(model), lambda a, b=None: kx.tangent_kernel(model, a, b)
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    run = kx.train(model, data, epochs=2, batch_size=8, out=tmp_path, progress=False)
    return kx.NetworkKernel(model, run), lambda a, b=None: kx.path_kernel(run, model, a, b)


def test_values_diagonal_and_laws(pair: Any) -> None:
    kernel, oracle = pair
    x, other = rows()[0], rows(5, 1)[0]
    gram = kernel(x)
    np.testing.assert_allclose(gram, oracle(torch.from_numpy(x)), rtol=1e-12)
    np.testing.assert_allclose(kernel(other, x), oracle(torch.from_numpy(other), torch.from_numpy(x)), rtol=1e-12)
    np.testing.assert_allclose(kernel.diag(x), np.diag(gram), rtol=1e-12)
    assert_symmetric(torch.from_numpy(gram), 1e-6)
    assert_positive_semidefinite(torch.from_numpy(gram), 1e-6)
    scaled = kernel.scaled_to(x)
    assert scaled.diag(x).mean() == pytest.approx(1)
    np.testing.assert_allclose(scaled(x) * scaled.scale, gram)
    assert kernel(x, eval_gradient=True)[1].shape == (24, 24, 0)


@pytest.mark.parametrize(
    "body",
    [
        lambda: [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)],
        lambda: [
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(144, 10),
        ],
    ],
    ids=["mlp", "cnn"],
)
def test_in_single_precision_gram_matrices_are_symmetric_and_positive(body: Any, tmp_path: Path) -> None:
    data = Subset(kx.datasets.digits().train, range(300))
    torch.manual_seed(0)
    model = nn.Sequential(*body())
    run = kx.train(model, data, epochs=2, out=tmp_path, progress=False)
    for kernel in (kx.NetworkKernel(model), kx.NetworkKernel(model, run)):
        gram = torch.from_numpy(kernel(data[:][0].numpy()))
        assert_symmetric(gram, 1e-6)
        assert_positive_semidefinite(gram, 1e-6)


def test_every_kernel_method_sees_the_same_matrix(pair: Any) -> None:
    kernel, _ = pair
    (x, y), (new, _) = rows(), rows(7, 1)
    kernel = kernel.scaled_to(x)
    gram, across = kernel(x), kernel(new, x)
    for own, given in (
        (SVC(kernel=kernel), SVC(kernel="precomputed")),
        (SVR(kernel=kernel), SVR(kernel="precomputed")),
        (KernelRidge(kernel=kernel), KernelRidge(kernel="precomputed")),
    ):
        np.testing.assert_allclose(own.fit(x, y).predict(new), given.fit(gram, y).predict(across), atol=1e-10)
    mine = KernelPCA(2, kernel=kernel).fit(x).transform(new)
    theirs = KernelPCA(2, kernel="precomputed").fit(gram).transform(across)
    np.testing.assert_allclose(np.abs(mine), np.abs(theirs), atol=1e-10)


def test_gaussian_processes(pair: Any) -> None:
    kernel, _ = pair
    (x, y), (new, _) = rows(), rows(7, 1)
    kernel = kernel.scaled_to(x)
    gram, across = kernel(x), kernel(new, x)
    fixed = GaussianProcessRegressor(kernel, alpha=0.1).fit(x, y)
    mean, deviation = fixed.predict(new, return_std=True)
    solve = np.linalg.solve(gram + 0.1 * np.eye(24), np.c_[y, across.T])
    np.testing.assert_allclose(mean, across @ solve[:, 0], atol=1e-8)
    np.testing.assert_allclose(deviation**2, kernel.diag(new) - (across * solve[:, 1:].T).sum(1), atol=1e-8)
    tuned = GaussianProcessRegressor(2.0 * kernel + WhiteKernel(0.5)).fit(x, y)
    assert tuned.log_marginal_likelihood_value_ >= tuned.log_marginal_likelihood(np.log([2.0, 0.5]))
    assert GaussianProcessClassifier(kernel).fit(x, y).predict_proba(new).shape == (7, 2)


def test_it_follows_the_models_weights_and_is_cloned_by_reference() -> None:
    model, (x, _) = network(), rows()
    kernel = kx.NetworkKernel(model)
    before, twin = kernel(x), clone(kernel)
    assert twin is not kernel
    assert twin.model is model
    twin.set_params(outputs=1)
    np.testing.assert_allclose(twin(x), kx.tangent_kernel(model, torch.from_numpy(x), outputs=1))
    np.testing.assert_array_equal(kernel(x), before)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert np.abs(kernel(x) - before).max() > 1e-3


def test_features_approach_the_kernel_as_they_grow() -> None:
    model, (x, _) = network(), rows()
    gram = kx.tangent_kernel(model, torch.from_numpy(x)).numpy()
    errors = []
    for dim in (128, 512, 2048, 8192):
        phi = kx.TangentFeatures(model, dim=dim, normalize=False).fit_transform(x)
        assert phi.shape == (24, dim)
        errors.append(np.linalg.norm(phi @ phi.T - gram) / np.linalg.norm(gram))
    slope = np.polyfit(np.log([128, 512, 2048, 8192]), np.log(errors), 1)[0]
    assert -0.75 < slope < -0.25  # 1/√dim
    one = kx.TangentFeatures(model, dim=8192, outputs=2, normalize=False).fit_transform(x)
    wanted = kx.tangent_kernel(model, torch.from_numpy(x), outputs=2).numpy()
    assert np.linalg.norm(one @ one.T - wanted) / np.linalg.norm(wanted) < 0.1
    unit = kx.TangentFeatures(model, dim=2048).fit(x)
    assert (unit.transform(x) ** 2).sum(1).mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(unit.transform(x)[3:5], clone(unit).fit(x).transform(x[3:5]), atol=1e-12)


@pytest.mark.parametrize("last", [LinearSVC(), SGDClassifier(random_state=0), LogisticRegression()])
def test_features_in_pipelines_of_images(last: Any) -> None:
    digits = kx.datasets.digits()
    x, y = (t[:300].numpy() for t in digits.train.tensors)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    pipeline = make_pipeline(kx.TangentFeatures(model, dim=256, shape=(1, 8, 8)), last)
    assert pipeline.fit(x, y).score(*(t[:200].numpy() for t in digits.test.tensors)) > 0.8


def test_errors() -> None:
    model, x = network(), rows()[0]
    for wrong, message in (
        ({"outputs": "full"}, "one number a pair"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"shape": (0, 4)}, r"shape=\(0, 4\)"),
    ):
        with pytest.raises(ArgumentError, match=message):
            kx.NetworkKernel(model, **wrong)(x)
    with pytest.raises(DatasetError, match="do not fit"):
        kx.NetworkKernel(model, shape=(3, 3))(x)
    with pytest.raises(DatasetError, match="at least one row"):
        kx.NetworkKernel(model)(x[:0])
    with pytest.raises(DatasetError, match="no array"):
        kx.NetworkKernel(model)([["a", "b"]])
    with pytest.raises(ArgumentError, match="eval_gradient"):
        kx.NetworkKernel(model)(x, x, eval_gradient=True)
    with pytest.raises(ArgumentError, match="dim=3"):
        kx.TangentFeatures(model, dim=3).fit(x)
    with pytest.raises(ArgumentError, match="full"):
        kx.TangentFeatures(model, outputs="full").fit(x)
    with pytest.raises(DatasetError, match="expecting 4 features"):
        kx.TangentFeatures(model, dim=16).fit(x).transform(x[:, :3])
    with pytest.raises(AttributeError, match="no attribute"):
        kx.nothing  # noqa: B018
