"""The comparison with a support vector machine: a linear network's kernel is known, and so is its SVM."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import nn
from torch.utils.data import Subset, TensorDataset

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.kernels import path_kernel, tangent_kernel
from kxexplain.learning.comparison import Comparison
from kxexplain.learning.svm import compare_svm, stratified
from kxexplain.learning.trainer import train
from kxexplain.trajectory import Trajectory


def blobs(n: int, classes: int = 3, d: int = 4, seed: int = 0) -> TensorDataset:
    """Overlapping clusters, one a class, in float64."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = 1.5 * np.eye(classes, d)
    points = centres[labels] + 0.8 * random.normal(size=(n, d))
    return TensorDataset(torch.from_numpy(points), torch.from_numpy(labels))


def plainly(*given: Any, **options: Any) -> Comparison:
    """The comparison on the one kernel alone."""
    return compare_svm(*given, **{"against": (), "queries": 0, **options})


def trained(model: nn.Module, data: Any, out: Path, loss: str = "cross_entropy") -> Trajectory:
    return train(model, data, loss, epochs=3, batch_size=8, out=out / "run", progress=False)


@pytest.fixture
def linear(tmp_path: Path) -> tuple[Trajectory, nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3, bias=False).double(), blobs(45)
    return trained(model, data, tmp_path), model, data, blobs(60, seed=1)


@pytest.mark.parametrize("kernel", ["path", "tangent"])
@pytest.mark.parametrize("bias", [False, True])
def test_of_a_linear_network_it_is_the_linear_svm(tmp_path: Path, kernel: Any, bias: bool) -> None:
    # K(x, x') is proportional to x·x' (+ 1 with biases) all along training; dividing by the mean diagonal takes the
    # factor away, whatever learning rate, steps and number of outputs made it.
    model, data, test = nn.Linear(4, 3, bias=bias).double(), blobs(45), blobs(60, seed=1)
    found = plainly(trained(model, data, tmp_path), model, data, test, C=2.0, kernel=kernel)
    x, y = (t.numpy() for t in data.tensors)
    x_test = test.tensors[0].numpy()
    if bias:
        x, x_test = (np.hstack([a, np.ones((len(a), 1))]) for a in (x, x_test))
    size = np.sqrt((x**2).sum(1).mean())
    reference = SVC(kernel="linear", C=2.0, decision_function_shape="ovo").fit(x / size, y)
    np.testing.assert_allclose(found.decisions, reference.decision_function(x_test / size), atol=5e-3)
    assert found.svm.tolist() == reference.predict(x_test / size).tolist()
    assert found.support.tolist() == sorted(reference.support_.tolist())


def test_the_scale_is_the_mean_diagonal_of_a_symmetric_positive_gram_matrix(linear: Any) -> None:
    trajectory, model, data, test = linear
    gram = path_kernel(trajectory, model, data.tensors[0])
    found = plainly(trajectory, model, data, test)
    torch.testing.assert_close(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9 * gram.diagonal().max()
    assert found.scale == pytest.approx(float(gram.diagonal().mean()))


def test_margins_and_decisions_of_three_classes_speak_for_the_first_of_a_pair(linear: Any) -> None:
    found = plainly(*linear)
    assert found.margins.shape == found.decisions.shape == (60, 3)  # pairs (0, 1), (0, 2), (1, 2)
    outputs = linear[1](linear[3].tensors[0])
    torch.testing.assert_close(found.margins[:, 1], (outputs[:, 0] - outputs[:, 2]).detach())
    for_first = (found.decisions[:, 0] > 0) & (found.decisions[:, 1] > 0)
    assert (found.svm[for_first] == 0).all()
    assert found.correlation > 0.8


@pytest.mark.parametrize("outputs", [1, 2])
def test_of_two_classes_too(tmp_path: Path, outputs: int) -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(4, outputs).double(), blobs(40, classes=2)
    loss = "logistic" if outputs == 1 else "cross_entropy"
    found = plainly(trained(model, data, tmp_path, loss), model, data, blobs(30, 2, seed=1))
    assert found.margins.shape == found.decisions.shape == (30, 1)
    assert found.classes.tolist() == [0, 1]
    assert torch.equal(found.margins[:, 0] > 0, found.network == 0)
    assert torch.equal(found.decisions[:, 0] > 0, found.svm == 0)
    assert found.network_accuracy > 0.7
    assert found.svm_accuracy > 0.7


def test_signs_are_classes_where_the_loss_takes_them_so(tmp_path: Path) -> None:
    model, data, test = nn.Linear(4, 1).double(), blobs(40, classes=2), blobs(20, 2, seed=1)
    data, test = (TensorDataset(x, 2.0 * y - 1) for x, y in (data.tensors, test.tensors))
    found = plainly(trained(model, data, tmp_path, "hinge"), model, data, test)
    assert set(found.labels.tolist()) == {0, 1}


def test_accuracies_agreement_and_report(linear: Any) -> None:
    found = plainly(*linear)
    labels = linear[3].tensors[1]
    assert found.network_accuracy == pytest.approx(float((found.network == labels).double().mean()))
    assert found.svm_accuracy == pytest.approx(float((found.svm == labels).double().mean()))
    assert found.agreement == pytest.approx(float((found.network == found.svm).double().mean()))
    assert f"{found.svm_accuracy:.3f}" in str(found)
    read = json.loads(found.to_json())
    assert read["support_vectors"] == len(read["support"]) == len(found.support)
    assert read["network"] == found.network.tolist()
    assert read["agreement"] == found.agreement


def test_what_it_was_given_stays_as_it_was_and_weights_come_from_the_trajectory(linear: Any) -> None:
    trajectory, model, data, test = linear
    first = plainly(*linear)
    other = copy.deepcopy(model).train()
    nn.init.zeros_(other.weight)
    found = plainly(trajectory, other, data, test)
    assert torch.equal(found.network, first.network)
    assert torch.equal(found.decisions, first.decisions)
    assert other.training
    assert not other.weight.any()


def test_a_sample_keeps_the_proportions_and_is_seeded(linear: Any) -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = stratified(labels, 50)
    assert labels[chosen].bincount().tolist() == pytest.approx([30, 15, 5], abs=1)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(chosen, stratified(labels, 50))
    assert not torch.equal(chosen, stratified(labels, 50, seed=1))
    assert stratified(torch.tensor([0] * 99 + [1]), 2).tolist()[-1] == 99  # a class of one is not lost
    found = plainly(*linear, limit=20)
    assert len(found.examples) == 20
    assert set(found.support.tolist()) <= set(found.examples.tolist())


def test_the_tangent_kernel_is_the_last_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), blobs(30)
    trajectory = trained(model, data, tmp_path)
    found = plainly(trajectory, model, data, data, kernel="tangent")
    assert found.scale == pytest.approx(float(tangent_kernel(model, data.tensors[0]).diagonal().mean()))


def test_errors_come_before_work(linear: Any, tmp_path: Path) -> None:
    trajectory, model, data, test = linear
    empty = Subset(test, [])
    for wrong, kind, message in (
        ({"model": nn.Linear(5, 3).double()}, ModelError, "not the model"),
        ({"train": blobs(45, seed=3)}, DatasetError, "other contents"),
        ({"train": Subset(data, range(44, -1, -1))}, DatasetError, "another order"),
        ({"train": empty}, DatasetError, "training set is empty"),
        ({"test": empty}, DatasetError, "test set is empty"),
        ({"test": TensorDataset(test.tensors[0], test.tensors[1] + 1)}, DatasetError, "reach from 1 to 3"),
        ({"C": 0.0}, ArgumentError, "C=0.0"),
        ({"limit": 2}, ArgumentError, "at least 3"),
        ({"limit": 0}, ArgumentError, "limit=0"),
        ({"against": ["poly"]}, ArgumentError, "against"),
        ({"against": "rbf"}, ArgumentError, "as a list"),
        ({"queries": -1}, ArgumentError, "queries=-1"),
        ({"seed": -1}, ArgumentError, "seed=-1"),
    ):
        given = {"trajectory": trajectory, "model": model, "train": data, "test": test} | wrong
        with pytest.raises(kind, match=message):
            plainly(**given)


def test_one_class_and_regression_are_refused(tmp_path: Path) -> None:
    x = blobs(20).tensors[0]
    alike = TensorDataset(x, torch.zeros(20, dtype=torch.int64))
    model = nn.Linear(4, 2).double()
    with pytest.raises(DatasetError, match="two classes"):
        plainly(trained(model, alike, tmp_path), model, alike, alike)
    numbers = TensorDataset(x, x[:, :1])
    regressor = nn.Linear(4, 1).double()
    with pytest.raises(DatasetError, match="no classes"):
        plainly(trained(regressor, numbers, tmp_path / "b", "mse"), regressor, numbers, numbers)


def test_a_constant_decision_has_no_correlation() -> None:
    ones = torch.ones(2, dtype=torch.int64)
    flat = Comparison(
        classes=torch.tensor([0, 1]), labels=ones, network=ones, svm=ones, margins=torch.ones(2, 1),
        decisions=torch.ones(2, 1), support=ones, examples=ones, scale=1.0, kernel="path", C=1.0,
        weights=torch.ones(2),
    )  # fmt: skip
    assert flat.correlation != flat.correlation
    assert flat.summary()["correlation"] is None
    assert "accuracy" in str(flat)
