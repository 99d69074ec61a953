"""The tangent kernel against torch.func's Jacobians, closed forms, and its own laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kxexplain as kx
from kxexplain.kernels import TangentKernel
from kxexplain.trajectory.batches import call, count, outputs_2d, take
from tests.cases import CASES, names
from tests.laws import (
    FACTORED,
    assert_close,
    assert_diagonal_agrees,
    assert_model_untouched,
    assert_positive_semidefinite,
    assert_symmetric,
)

NUMPY = "custom-numpy"


def dense(model: nn.Module, inputs: Any) -> Tensor:
    """Jacobians [n, c, p] by torch.func: an oracle that shares nothing with the library."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return outputs_2d(call(self.model, batch))[0]

    whole = Called()
    named = {f"model.{name}": p.detach() for name, p in parameters.items()}
    rows = []
    for i in range(count(inputs)):
        one = take(inputs, slice(i, i + 1))
        found = jacrev(lambda values, x=one: functional_call(whole, values, (x,)))(named)
        rows.append(torch.cat([j.reshape(len(j), -1) for j in found.values()], 1))
    return torch.stack(rows).detach()


FUNCTIONAL = [name for name in CASES if name not in (NUMPY, "custom-function", "branch")]
"""Cases that torch.func can follow."""


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_equals_the_jacobians_products(name: str, dtype: torch.dtype) -> None:
    problem = CASES[name].build(dtype, queries=5)
    model = problem.model.eval()
    x, y = (take(problem.inputs, rows) for rows in (slice(0, 3), slice(3, 5)))
    full = torch.einsum("ncp,mkp->nmck", dense(model, x), dense(model, y))
    assert_close(kx.tangent_kernel(model, x, y, "full"), full, FACTORED[dtype])
    assert_close(kx.tangent_kernel(model, x, y), torch.einsum("nmcc->nm", full), FACTORED[dtype])
    last = full.shape[2] - 1
    assert_close(kx.tangent_kernel(model, x, y, last), full[:, :, last, last], FACTORED[dtype])
    assert_close(kx.tangent_kernel(model, x, y, -1), full[:, :, last, last], FACTORED[dtype])


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
@pytest.mark.parametrize("name", names(kind="issue"))
def test_laws(name: str, outputs: Any) -> None:
    problem = CASES[name].build()
    outputs = 0 if name == "scalar" and outputs == 1 else outputs
    gram = kx.tangent_kernel(problem.model, problem.inputs, outputs=outputs)
    assert_symmetric(gram, 1e-12)
    assert_positive_semidefinite(gram, 1e-12)
    if outputs == "trace":
        kernel = TangentKernel(problem.model, problem.inputs)
        assert_diagonal_agrees(gram, kernel.diagonal(problem.inputs), 1e-12)
        assert_close(
            torch.einsum("nmcc->nm", kx.tangent_kernel(problem.model, problem.inputs, outputs="full")), gram, 1e-12
        )


@pytest.mark.parametrize("name", ["mlp-relu", "encoder-time-first", "cnn-max", "tied-embedding", "lstm", "argmax"])
def test_batching_is_irrelevant(name: str) -> None:
    problem = CASES[name].build(queries=7)
    whole = kx.tangent_kernel(problem.model, problem.inputs, outputs="full")
    for batch in (1, 2, 3):
        assert_close(kx.tangent_kernel(problem.model, problem.inputs, outputs="full", batch=batch), whole, 1e-12)


def test_a_linear_model_in_closed_form() -> None:
    """f = Wx + b: K(x, x') = (x·x' + 1) I."""
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    model = nn.Linear(6, 3, dtype=torch.float64)
    expected = (x @ y.T + 1)[..., None, None] * torch.eye(3, dtype=torch.float64)
    assert_close(kx.tangent_kernel(model, x, y, "full"), expected, 1e-14)
    assert_close(kx.tangent_kernel(model, x, y), 3 * (x @ y.T + 1), 1e-14)


def test_is_taken_in_evaluation_mode() -> None:
    """Dropout and batch statistics are off, whatever mode the model is in."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = kx.tangent_kernel(model.eval(), x)
    model.train()
    with assert_model_untouched(model):
        assert torch.equal(kx.tangent_kernel(model, x), expected)


def test_refuses_what_makes_no_sense() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(kx.ModelError, match="trainable"):
        kx.tangent_kernel(nn.Flatten(), x)
    with pytest.raises(kx.DatasetError):
        kx.tangent_kernel(nn.Linear(6, 2), x[:0])
    with pytest.raises(kx.DatasetError):
        kx.tangent_kernel(nn.Linear(6, 2), x, x[:0])
    with pytest.raises(kx.ArgumentError, match="2"):
        kx.tangent_kernel(nn.Linear(6, 2), x, outputs=2)
    with pytest.raises(kx.ArgumentError):
        kx.tangent_kernel(nn.Linear(6, 2), x, outputs=True)


def test_inputs_that_are_wrong() -> None:
    model = torch.nn.Linear(5, 3)
    for inputs in (torch.zeros(4, 2), torch.full((4, 5), float("nan"))):
        with pytest.raises(kx.DatasetError):
            kx.tangent_kernel(model, inputs)


def test_other_inputs_that_the_model_cannot_take() -> None:
    """They are told of as those on the left are, and nothing is written."""
    buffer = torch.full((3, 2), 7.0)
    with pytest.raises(kx.DatasetError, match=r"cannot take the inputs .* got torch.float32 \(2, 5\)"):
        kx.tangent_kernel(nn.Linear(4, 2), torch.randn(3, 4), torch.randn(2, 5), out=buffer)
    assert bool((buffer == 7).all())
