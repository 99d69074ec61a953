from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kxexplain.errors import ArgumentError
from kxexplain.trajectory.losses import LOSSES, check_losses, resolve

f = torch.tensor([[0.2, -1.0, 3.0], [2.0, 0.5, -0.5]], dtype=torch.float64)
y = torch.tensor([2, 1])


def by_hand(name, outputs, target):
    """The formula for one example, in plain Python."""
    values = [float(v) for v in outputs]
    if name == "cross_entropy":
        return math.log(sum(math.exp(v) for v in values)) - values[target]
    if name == "mse":
        return sum((v - t) ** 2 for v, t in zip(values, target, strict=True)) / len(values)
    if name == "hinge":
        others = (v for c, v in enumerate(values) if c != target)
        return sum(max(0.0, 1 - values[target] + v) for v in others) / len(values)
    return sum(math.log1p(math.exp(-v if t else v)) for v, t in zip(values, target, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name, dtype):
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]]) if name in ("mse", "logistic") else y
    got = LOSSES[name](f.to(dtype), labels)
    expected = [by_hand(name, row, label.tolist()) for row, label in zip(f, labels, strict=True)]
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("name", ["hinge", "logistic"])
@pytest.mark.parametrize("targets", [torch.tensor([1, 0]), torch.tensor([1.0, -1.0]), torch.tensor([[1], [0]])])
@pytest.mark.parametrize("column", [True, False])
def test_one_output_takes_signs(name, targets, column):
    outputs = f[0, :2, None] if column else f[0, :2]
    margins = [1 * 0.2, -1 * -1.0]
    formula = {"hinge": lambda m: max(0.0, 1 - m), "logistic": lambda m: math.log1p(math.exp(-m))}[name]
    torch.testing.assert_close(LOSSES[name](outputs, targets), f.new_tensor([formula(m) for m in margins]))


def test_hinge_is_torch_multi_margin():
    torch.testing.assert_close(LOSSES["hinge"](f, y), F.multi_margin_loss(f, y, reduction="none"))


def test_cross_entropy_takes_probabilities_small_integers_and_positions():
    soft = torch.softmax(torch.rand(2, 3), 1)
    expected = -(soft * f.log_softmax(1)).sum(1)
    torch.testing.assert_close(LOSSES["cross_entropy"](f, soft), expected, check_dtype=False, rtol=1e-6, atol=0)
    assert torch.equal(LOSSES["cross_entropy"](f, y.to(torch.uint8)), LOSSES["cross_entropy"](f, y))
    sequence = f.T.reshape(1, 3, 2)
    mean = F.cross_entropy(f, y)
    torch.testing.assert_close(LOSSES["cross_entropy"](sequence, y[None]), mean[None])


def test_mse_fits_column_to_vector():
    outputs, targets = torch.tensor([[1.0], [5.0]]), torch.tensor([2, 2])
    assert LOSSES["mse"](outputs, targets).tolist() == [1.0, 9.0]
    assert LOSSES["mse"](outputs[:, 0], targets[:, None]).tolist() == [1.0, 9.0]


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit(name):
    with pytest.raises((ArgumentError, IndexError, RuntimeError, ValueError)):
        LOSSES[name](f, torch.zeros(3, 5))


def test_cross_entropy_of_one_output_is_refused():
    with pytest.raises(ArgumentError, match="logistic"):
        LOSSES["cross_entropy"](f[:, :1], y)


def test_resolve_names_and_functions():
    assert resolve("hinge") == ("hinge", LOSSES["hinge"])
    assert resolve(LOSSES["mse"])[0] == "mse"
    own = torch.nn.MSELoss(reduction="none")
    assert resolve(own) == ("own:MSELoss", own)
    with pytest.raises(ArgumentError, match="cross_entropy, mse, hinge, logistic"):
        resolve("crossentropy")


@pytest.mark.parametrize("losses", [torch.tensor(1.0), torch.ones(2), torch.ones(3, 1)])
def test_losses_of_another_shape_are_refused(losses):
    with pytest.raises(ArgumentError, match="reduction='none'"):
        check_losses(losses, 3)
