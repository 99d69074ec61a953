"""The random projection: unbiased, error falling as 1/√dim, one result whatever form a gradient is kept in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.gradients import Dense, Factors, Outer, gram, layout_of, output_gradients, projection, trainable
from kxexplain.gradients.projection import SMALLEST, WIDTH, Projection
from kxexplain.trajectory.batches import take
from tests.cases import CASES, names

SHAPES = {"w": (7, 5), "b": (7,), "t": (4, 6), "conv": (3, 2, 2), "gain": (6,), "single": ()}


def gradients(rows: int, dtype: torch.dtype, outputs: int = 1) -> Factors:
    """Every form: with positions, with bias, transposed, written out, a vector, a scalar, and something unknown."""
    normal = lambda *shape: torch.randn(*shape, dtype=dtype) + 0.3  # noqa: E731
    return [
        Outer("w", "b", normal(rows, 2, 5), normal(rows, outputs, 2, 7)),
        Outer("t", None, normal(rows, 1, 4), normal(rows, outputs, 1, 6), transposed=True),
        Dense("conv", normal(rows, outputs, 12)),
        Dense("gain", normal(rows, outputs, 6)),
        Dense("single", normal(rows, outputs, 1)),
        Dense("b", normal(rows, outputs, 7)),
    ]


def exact(left: Factors, right: Factors) -> Tensor:
    return gram(left, right)


def sketched(left: Factors, right: Factors, dim: int, seed: int) -> Tensor:
    made = Projection(SHAPES, 1, dim, seed=seed)
    return torch.einsum("ncd,mkd->ncmk", made(left, 0), made(right, 0))


def test_unbiased_over_200_seeds(dtype: torch.dtype) -> None:
    left, right = gradients(2, dtype, 2), gradients(3, dtype)
    found = torch.stack([sketched(left, right, 64, seed) for seed in range(200)])
    error = found.std(0) / 200**0.5
    assert (found.mean(0) - exact(left, right)).abs().div(error).max() <= 3


def test_error_falls_as_one_over_the_square_root_of_the_dimension(dtype: torch.dtype) -> None:
    left, right = gradients(3, dtype), gradients(3, dtype)
    truth, dims = exact(left, right), [2**i for i in range(5, 12)]
    errors = [
        np.mean([float((sketched(left, right, dim, seed) - truth).square().mean()) for seed in range(40)])
        for dim in dims
    ]
    slope = np.polyfit(np.log(dims), np.log(errors) / 2, 1)[0]
    assert -0.6 < slope < -0.4


def test_segments_that_share_a_block_stay_unbiased(dtype: torch.dtype) -> None:
    """Σ_s ⟨D_s, P_s⟩: what the segments have in common in one block averages out."""
    parts = [(gradients(2, dtype)[:1], gradients(2, dtype)[:1]) for _ in range(3)]
    truth = sum(exact(d, p)[:, 0, :, 0] for d, p in parts)

    def found(seed: int) -> Tensor:
        made = Projection(SHAPES, 3, 64, seed=seed)
        assert made.blocks == 1
        one, other = (sum(made(pair[side], s)[:, 0] for s, pair in enumerate(parts)) for side in (0, 1))
        return one @ other.T

    values = torch.stack([found(seed) for seed in range(200)])
    assert ((values.mean(0) - truth).abs() / (values.std(0) / 200**0.5)).max() <= 3


def test_every_form_gives_the_same_sketch(dtype: torch.dtype) -> None:
    made = Projection(SHAPES, 2, 2 * WIDTH, seed=3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for factor in gradients(4, dtype, 3):
        torch.testing.assert_close(made([factor], 1), made([*factor.dense()], 1), rtol=tolerance, atol=tolerance)
    outer = gradients(4, dtype)[0]
    halves = outer.scaled({"w": 0.5, "b": 2.0})
    written = [Dense(f.weight, f.values * {"w": 0.5, "b": 2.0}[f.weight]) for f in outer.dense()]
    torch.testing.assert_close(made(halves, 0), made(written, 0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*names(kind="shared"), "cnn-max", "encoder", "attention-causal", "scalar", "lstm"])
def test_models_gradients_and_their_dense_form_agree(name: str, dtype: torch.dtype) -> None:
    problem = CASES[name].build(dtype)
    inputs = take(problem.inputs, slice(0, 3))
    factors = output_gradients(problem.model, inputs, layout_of(problem.model, inputs, trainable(problem.model)))[1]
    shapes = {n: tuple(p.shape) for n, p in trainable(problem.model).items()}
    made = Projection(shapes, 1, 300)
    dense = [part for factor in factors for part in factor.dense()]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(made(factors, 0), made(dense, 0), rtol=tolerance, atol=tolerance)


def test_portions_do_not_matter(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    made, factors = Projection(SHAPES, 1, 100), gradients(5, dtype)
    whole = made(factors, 0)
    monkeypatch.setattr(projection, "ELEMENTS", 1)
    monkeypatch.setattr(projection, "KEPT", 1)
    torch.testing.assert_close(Projection(SHAPES, 1, 100)(factors, 0), whole)
    assert made(gradients(0, dtype), 0).shape == (0, 1, 100)


def test_only_the_parameters_asked_for_count() -> None:
    made = Projection({"b": (7,)}, 1, 32)
    outer = gradients(2, torch.float64)[0]
    torch.testing.assert_close(made([outer], 0), made([outer.dense()[1]], 0))
    assert not made([Dense("other", torch.ones(2, 1, 9))], 0).any()
    assert not made([gradients(2, torch.float64)[1]], 0).any()


def test_same_matrices_in_every_precision() -> None:
    factors = gradients(2, torch.float64)
    narrow: Factors = [
        Dense(f.weight, f.values.float())
        if isinstance(f, Dense)
        else Outer(f.weight, f.bias, f.a.float(), f.g.float(), f.transposed)
        for f in factors
    ]
    made = Projection(SHAPES, 1, 512)
    assert made(narrow, 0).dtype == torch.float32
    torch.testing.assert_close(made(narrow, 0).double(), made(factors, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("segments", "dim", "blocks"), [(1, 16, 1), (3, 2048, 3), (15, 2048, 8), (40, 300, 1)])
def test_blocks_cover_the_dimension(segments: int, dim: int, blocks: int) -> None:
    made = Projection(SHAPES, segments, dim)
    columns = [made.columns(s) for s in range(segments)]
    assert made.blocks == blocks
    assert sorted({i for c in columns for i in range(c.start, c.stop)}) == list(range(dim))
    assert all(a == b or a.stop == b.start for a, b in pairwise(columns))


@pytest.mark.parametrize("arguments", [{"dim": SMALLEST - 1}, {"dim": True}, {"dim": 64, "seed": True}], ids=str)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="expected a whole number"):
        Projection(SHAPES, 1, **arguments)
