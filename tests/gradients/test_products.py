"""Factored inner products against the dense ones, for every layer kind (law 3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kxexplain.gradients import (
    Dense,
    Outer,
    dot,
    gram,
    gram_trace,
    layout_of,
    output_gradients,
    squared_norm,
    trainable,
)
from kxexplain.gradients.factors import compact, concatenate, merge, scale, take
from kxexplain.trajectory.batches import take as rows_of
from tests import reference
from tests.cases import CASES
from tests.laws import FACTORED, assert_close, assert_positive_semidefinite, assert_symmetric


@pytest.mark.parametrize("name", list(CASES))
def test_products_equal_the_dense_loop(name: str, dtype: torch.dtype) -> None:
    problem = CASES[name].build(dtype, queries=5)
    model = problem.model.eval()
    layout = layout_of(model, problem.inputs, trainable(model))
    x, y = (rows_of(problem.inputs, rows) for rows in (slice(0, 2), slice(2, 5)))
    left, right = (output_gradients(model, part, layout)[1] for part in (x, y))
    # The dense reference in float64, so that its own rounding does not count.
    model64 = CASES[name].build(torch.float64, queries=5)
    if dtype == torch.float64:
        dense_x, dense_y = (reference.jacobian(model, part) for part in (x, y))
    else:
        copy = model64.model.eval()
        copy.load_state_dict(model.state_dict())
        wide = lambda part: _double(part)  # noqa: E731
        dense_x, dense_y = (reference.jacobian(copy, wide(part)) for part in (x, y))
    expected = reference.gram(dense_x, dense_y)
    tolerance = FACTORED[dtype]
    assert_close(gram(left, right).double(), expected.double(), tolerance)
    assert_close(gram_trace(left, right).double(), torch.einsum("ncmc->nm", expected).double(), tolerance)
    assert_close(squared_norm(left).double(), dense_x.square().sum(-1).double(), tolerance)
    direction = {key: torch.randn_like(p) for key, p in reference.parameters(model).items()}
    flat = torch.cat([d.flatten() for d in direction.values()])
    assert_close(dot(left, direction).double(), (dense_x.double() @ flat.double()), tolerance * 10)
    own = gram(left, left).transpose(1, 2)
    assert_symmetric(own, tolerance)
    assert_positive_semidefinite(own, 10 * tolerance)


def _double(part: object) -> object:
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, dict):
        return {key: _double(value) for key, value in part.items()}
    return tuple(_double(value) for value in part)  # type: ignore[attr-defined]


def outer(name: str, rows: int, positions: int, *, bias: str | None = None, transposed: bool = False, c: int = 2):
    """Random factors of a 4 × 3 matrix."""
    a, g = torch.randn(rows, positions, 3, dtype=torch.float64), torch.randn(rows, c, positions, 4, dtype=torch.float64)
    return Outer(name, bias, a, g, transposed)


def written(factors: list) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for factor in factors:
        for dense in factor.dense():
            parts[dense.weight] = parts.get(dense.weight, 0) + dense.values
    return parts


def dense_gram(left: list, right: list) -> Tensor:
    a, b = written(left), written(right)
    return sum(torch.einsum("ncp,mkp->ncmk", a[name], b[name]) for name in a if name in b)


MIXES = {
    "one use": ([outer("w", 3, 1)], [outer("w", 2, 1)]),
    "positions": ([outer("w", 3, 4)], [outer("w", 2, 2)]),
    "bias": ([outer("w", 3, 2, bias="b")], [outer("w", 2, 3, bias="b")]),
    "two uses": ([outer("w", 3, 1), outer("w", 3, 2)], [outer("w", 2, 2), outer("w", 2, 1)]),
    "transposed use": ([outer("w", 3, 1), outer("w", 3, 1, transposed=True)], [outer("w", 2, 1), outer("w", 2, 1)]),
    "bias shared by two matrices": (
        [outer("w", 3, 1, bias="b"), outer("v", 3, 1, bias="b")],
        [outer("w", 2, 1, bias="b"), outer("v", 2, 1, bias="b")],
    ),
    "bias on one side": ([outer("w", 3, 1, bias="b")], [outer("w", 2, 1)]),
    "different biases": (
        [outer("w", 3, 1, bias="b"), outer("w", 3, 1, bias="d")],
        [outer("w", 2, 1, bias="b"), outer("w", 2, 1, bias="d")],
    ),
    "bias dense elsewhere": (
        [outer("w", 3, 1, bias="b"), Dense("b", torch.randn(3, 2, 4, dtype=torch.float64))],
        [outer("w", 2, 1, bias="b")],
    ),
    "dense and outer": ([outer("w", 3, 1), Dense("w", torch.randn(3, 2, 12, dtype=torch.float64))], [outer("w", 2, 1)]),
    "outer against dense": ([outer("w", 3, 2)], [Dense("w", torch.randn(2, 2, 12, dtype=torch.float64))]),
    "drags along": (
        [
            outer("w", 3, 1, bias="b"),
            outer("v", 3, 1, bias="b"),
            Dense("v", torch.randn(3, 2, 12, dtype=torch.float64)),
        ],
        [outer("w", 2, 1, bias="b"), outer("v", 2, 1, bias="b")],
    ),
    "only some in common": ([outer("w", 3, 1), outer("v", 3, 1)], [outer("v", 2, 1), outer("u", 2, 1)]),
}


@pytest.mark.parametrize("mix", list(MIXES))
def test_uses_of_one_parameter_meet_each_other(mix: str) -> None:
    left, right = MIXES[mix]
    expected = dense_gram(left, right)
    for f, h, value in ((left, right, expected), (right, left, expected.permute(2, 3, 0, 1))):
        before = [t.clone() for factor in (*f, *h) for t in vars(factor).values() if isinstance(t, Tensor)]
        assert_close(gram(f, h), value, 1e-13)
        assert_close(gram_trace(f, h), torch.einsum("ncmc->nm", value), 1e-13)
        after = [t for factor in (*f, *h) for t in vars(factor).values() if isinstance(t, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the factors were changed"
    norms = sum(value.square().sum(-1) for value in written(left).values())
    assert_close(squared_norm(left), norms, 1e-13)
    direction = {
        name: torch.randn(4, 3, dtype=torch.float64) if name in "wvu" else torch.randn(4, dtype=torch.float64)
        for name in written(left)
    }
    if not any(isinstance(f, Outer) and f.transposed for f in left):
        expected_dot = sum(value @ direction[name].flatten() for name, value in written(left).items())
        assert_close(dot(left, direction), expected_dot, 1e-13)


def test_a_transposed_use_is_stored_as_the_parameter_is() -> None:
    f = outer("w", 3, 2, transposed=True)
    direction = torch.randn(3, 4, dtype=torch.float64)
    assert_close(dot([f], {"w": direction}), f.dense()[0].values @ direction.flatten(), 1e-13)


def test_reshaping_factors_keeps_their_meaning() -> None:
    f = [outer("w", 5, 3, bias="b"), Dense("v", torch.randn(5, 2, 6, dtype=torch.float64))]
    want = written(f)
    for changed in (merge([*compact(f[0]), f[1]]), concatenate([take(f, slice(0, 2)), take(f, slice(2, 5))])):
        for name, value in written(changed).items():
            assert_close(value, want[name], 1e-14)
    scaled = written(scale(f, {"w": 2.0, "b": -3.0, "v": 0.5}))
    for name, by in (("w", 2.0), ("b", -3.0), ("v", 0.5)):
        assert_close(scaled[name], want[name] * by, 1e-14)
    assert not written(scale(f, {"w": 2.0, "b": 0.0, "v": 0.0}))["v"].any()
