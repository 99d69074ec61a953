"""What a comparison says beyond two accuracies: measures, cross-validation, α over queries, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.svm import SVC
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError
from kxexplain.learning.measures import alignment, effective_rank
from kxexplain.learning.precomputed import GRID, _folds, choose_C, fit_svm


def clusters(n: int, seed: int = 0) -> TensorDataset:
    random = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = 1.5 * np.eye(3, 4)[y] + 0.8 * random.normal(size=(n, 4))
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[kx.Trajectory, nn.Module, TensorDataset, TensorDataset]:
    model, data = network(), clusters(36)
    run = kx.train(model, data, epochs=4, batch_size=6, out=tmp_path_factory.mktemp("run"), progress=False)
    return run, model, data, clusters(30, 1)


@pytest.fixture(scope="module")
def compared(trained: Any) -> kx.Comparison:
    return kx.compare_svm(*trained, queries=20)


def test_alignment_is_the_cosine_of_the_centred_matrices() -> None:
    x, y = clusters(20).tensors
    gram, same = x @ x.T, (y[:, None] == y).double()
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    first, second = (centre @ m @ centre for m in (gram, same))
    assert alignment(gram, y) == pytest.approx(float((first * second).sum() / first.norm() / second.norm()))
    values = torch.linalg.eigvalsh(first)
    assert effective_rank(gram) == pytest.approx(float(values.sum() ** 2 / values.square().sum()))
    assert np.isnan(alignment(torch.ones(3, 3), torch.tensor([0, 1, 1])))


def test_c_is_the_one_that_scikit_learn_would_choose_on_the_same_folds() -> None:
    x, y = (t.numpy() for t in clusters(45).tensors)
    gram = x @ x.T / (x**2).sum(1).mean()
    folds = PredefinedSplit(_folds(y, 3, 0))
    scores = [cross_val_score(SVC(kernel="precomputed", C=C), gram, y, cv=folds).mean() for C in GRID]
    chosen, accuracy = choose_C(gram, y)
    assert chosen == GRID[int(np.argmax(scores))]
    assert accuracy == pytest.approx(max(scores))
    assert (np.bincount(_folds(y, 3, 0)) == 15).all()
    assert choose_C(np.eye(2), np.array([0, 1]))[0] == 1.0  # nothing to validate on
    svm = fit_svm(torch.from_numpy(gram), torch.from_numpy(gram), torch.from_numpy(y))
    assert chosen == svm.C
    assert torch.nonzero(svm.weights)[:, 0].tolist() == svm.support.tolist()


def test_a_row_for_every_kernel(compared: kx.Comparison, trained: Any) -> None:
    _, model, data, test = trained
    rows = {row.kernel: row for row in compared.kernels}
    assert list(rows) == ["path", "start", "middle", "end", "rbf", "linear"]
    assert rows["path"].accuracy == compared.svm_accuracy
    assert rows["path"].agreement == compared.agreement
    assert rows["path"].correlation == compared.correlation
    assert rows["path"].C == compared.C
    assert rows["end"].alignment == pytest.approx(alignment(kx.tangent_kernel(model, data.tensors[0]), data.tensors[1]))
    start = network()  # as it was initialised
    gram, across = kx.tangent_kernel(start, data.tensors[0]), kx.tangent_kernel(start, test.tensors[0], data.tensors[0])
    alone = fit_svm(gram, across, data.tensors[1])
    assert rows["start"].accuracy == float((alone.predicted == test.tensors[1]).double().mean())
    assert rows["start"].effective_rank == pytest.approx(effective_rank(gram))
    x, y = (t.numpy() for t in data.tensors)
    scale = np.sqrt((x**2).sum(1).mean())
    linear = SVC(kernel="linear", C=rows["linear"].C).fit(x / scale, y)
    assert rows["linear"].accuracy == linear.score(test.tensors[0].numpy() / scale, test.tensors[1].numpy())
    assert "tangent, initial" in str(compared)
    read = json.loads(compared.to_json())
    assert [row["kernel"] for row in read["kernels"]] == list(rows)
    assert read["alphas"]["network_accuracy"] == compared.alphas.network_accuracy  # type: ignore[union-attr]


def test_support_vectors_and_the_largest_alphas(compared: kx.Comparison, trained: Any) -> None:
    assert compared.alphas is not None
    size = compared.alphas.size[compared.examples]
    largest = set(size.argsort(descending=True)[: len(compared.support)].tolist())
    shared = len(largest & set(compared.support.tolist())) / len(compared.support)
    assert compared.support_overlap == (pytest.approx(shared), len(compared.support) / 36)
    assert compared.kernels[0].support_overlap == compared.support_overlap[0]
    end = compared.kernels[3]
    given = trained[2].tensors
    gram = kx.tangent_kernel(trained[1], given[0])
    support = set(SVC(kernel="precomputed", C=end.C).fit(gram / gram.diagonal().mean(), given[1]).support_.tolist())
    largest = set(size.argsort(descending=True)[: len(support)].tolist())
    assert end.support_overlap == pytest.approx(len(largest & support) / len(support))
    slope, intercept = compared.calibration
    fitted = np.polyfit(compared.margins.flatten(), compared.decisions.flatten(), 1)
    np.testing.assert_allclose([slope, intercept], fitted)
    assert compared.parted.tolist() == [i for i in range(30) if compared.network[i] != compared.svm[i]]


def test_of_a_linear_model_alpha_does_not_depend_on_the_query(tmp_path: Path) -> None:
    model, data, test = nn.Linear(4, 3).double(), clusters(24), clusters(12, 1)
    run = kx.train(model, data, epochs=3, batch_size=6, out=tmp_path, progress=False)
    found = kx.alpha_variation(run, model, data, test)
    assert float(found.unexplained.max()) < 1e-7
    assert float(found.spread.max()) < 1e-7
    assert found.error < 1e-7
    assert torch.equal(found.network, found.constant)


def test_the_mean_alpha_is_least_squares_and_the_svm_form_its_sum(trained: Any) -> None:
    trajectory, model, data, test = trained
    found = kx.alpha_variation(trajectory, model, data, test)
    bill = kx.explain(trajectory, model, data, test, target="all")
    said = bill.baseline[15:].clone()
    for i in range(len(data)):
        flat, put = bill.kernel[:, i].reshape(-1, 3), bill.contributions[:, i].reshape(-1, 1)
        fit = torch.linalg.lstsq(flat, put)
        torch.testing.assert_close(found.mean[i], fit.solution[:, 0])
        left = (put - flat @ fit.solution).norm() / put.norm()
        torch.testing.assert_close(found.unexplained[i], left, atol=1e-9, rtol=1e-6)
        half = torch.linalg.lstsq(bill.kernel[:15, i].reshape(-1, 3), bill.contributions[:15, i].reshape(-1, 1))
        said += bill.kernel[15:, i] @ half.solution[:, 0]
    assert torch.equal(found.constant, said.argmax(1))
    change = bill.prediction[15:] - bill.baseline[15:]
    assert found.error == pytest.approx(float((said - bill.prediction[15:]).norm() / change.norm()))
    assert 0 < float(found.unexplained.nanmedian()) < 1
    torch.testing.assert_close(found.size, bill.alpha.norm(dim=2).nanmedian(0).values)


def test_errors(trained: Any) -> None:
    trajectory, model, data, test = trained
    with pytest.raises(ArgumentError, match="fewer than 2"):
        kx.alpha_variation(trajectory, model, data, TensorDataset(*(t[:1] for t in test.tensors)))
    with pytest.raises(DatasetError, match="no classes"):
        kx.alpha_variation(trajectory, model, data, TensorDataset(test.tensors[0], test.tensors[0]))
