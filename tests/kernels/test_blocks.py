"""Gram matrices in blocks: caller's buffers, memory budgets, one triangle, diagonals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kxexplain as kx
from kxexplain.gradients import Outer, layout_of, output_gradients, trainable
from kxexplain.kernels import TangentKernel
from kxexplain.kernels.blocks import Plan, mirrored, symmetrised
from kxexplain.trajectory.batches import take
from tests import reference
from tests.cases import CASES
from tests.laws import assert_close, assert_positive_semidefinite
from tests.memory import MEASURED, peak
from tests.runs import run

NAMES = ["mlp-relu", "cnn-max", "tied-embedding"]


def dense(model: nn.Module, x: Any, y: Any, outputs: Any) -> Tensor:
    """The kernel from whole Jacobians, [n, m] or [n, m, C, C]."""
    full = torch.einsum("ncp,mkp->nmck", reference.jacobian(model.eval(), x), reference.jacobian(model.eval(), y))
    if outputs == "full":
        return full
    return torch.einsum("nmcc->nm", full) if outputs == "trace" else full[:, :, outputs, outputs]


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_the_blocks(name: str, outputs: Any) -> None:
    """From one tile for everything to one pair at a time: the same matrix, exactly symmetric where it should be."""
    problem = CASES[name].build(queries=7)
    model, x, y = problem.model, problem.inputs, take(problem.inputs, slice(1, 4))
    wanted, between = dense(model, x, x, outputs), dense(model, x, y, outputs)
    for memory in ("1GB", 30_000, 1):
        found = kx.tangent_kernel(model, x, outputs=outputs, memory=memory)
        assert torch.equal(found, mirrored(found))
        assert_close(found, wanted, 1e-12)
        assert_positive_semidefinite(found, 1e-12)
        assert_close(kx.tangent_kernel(model, x, y, outputs, memory=memory, batch=2), between, 1e-12)
        diag = kx.tangent_kernel(model, x, outputs=outputs, memory=memory, diag=True)
        assert_close(diag, found.diagonal().movedim(-1, 0), 1e-12)


@pytest.mark.parametrize("outputs", ["trace", "full", 0])
def test_the_path_kernel_in_blocks(outputs: Any, tmp_path: Path) -> None:
    problem = CASES["cnn-max"].build(queries=6)
    trajectory = run(problem, tmp_path / "run")
    x, y = problem.inputs, take(problem.inputs, slice(0, 2))
    for second in (None, y):
        whole = kx.path_kernel(trajectory, problem.model, x, second, outputs)
        shape, file = tuple(whole.shape), tmp_path / "gram"
        buffer = np.memmap(file, dtype=np.float64, mode="w+", shape=shape)
        buffer[:] = np.nan
        shared = kx.path_kernel(trajectory, problem.model, x, second, outputs, out=buffer, memory=20_000)
        assert_close(shared, whole, 1e-12)
        buffer.flush()
        assert np.array_equal(np.memmap(file, dtype=np.float64, mode="r", shape=shape), shared.numpy())
        assert second is not None or torch.equal(whole, mirrored(whole))
    diag = kx.path_kernel(trajectory, problem.model, x, outputs=outputs, diag=True, memory=20_000)
    whole = kx.path_kernel(trajectory, problem.model, x, outputs=outputs)
    assert_close(diag, whole.diagonal().movedim(-1, 0), 1e-12)


@pytest.mark.parametrize(
    "make", [torch.empty, lambda shape: np.empty(shape, np.float32), lambda shape: torch.empty(shape).T]
)
def test_writes_into_the_caller_s_buffer(make: Any) -> None:
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    out = make((5, 5))
    found = kx.tangent_kernel(model, x, out=out)
    assert torch.equal(torch.as_tensor(out), kx.tangent_kernel(model, x))
    assert found.data_ptr() == torch.as_tensor(out).data_ptr()


def test_refuses_buffers_and_options_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, x = nn.Linear(6, 3), torch.randn(5, 6)
    locked = np.zeros((5, 5), np.float32)
    locked.flags.writeable = False
    monkeypatch.setattr(TangentKernel, "blocks", None)  # nothing may be computed
    for wrong in (
        torch.empty(5, 4),
        torch.empty(5, 5, dtype=torch.float64),
        torch.empty(5, 5, 3, 3),
        torch.empty(5, 1).expand(5, 5),
        np.empty((5, 5)),
        np.empty((5, 5), ">f4"),
        np.empty((5, 5), np.float32)[::-1],
        locked,
        [[0.0] * 5] * 5,
    ):
        with pytest.raises(kx.ArgumentError, match="out"):
            kx.tangent_kernel(model, x, out=wrong)  # type: ignore[arg-type]
    with pytest.raises(kx.ArgumentError, match=r"shape \(5, 5, 3, 3\)"):
        kx.tangent_kernel(model, x, outputs="full", out=torch.empty(5, 5))
    for options in ({"memory": "much"}, {"memory": 0}, {"batch": 0}, {"batch": 2.0}, {"x2": x, "diag": True}):
        with pytest.raises(kx.ArgumentError):
            kx.tangent_kernel(model, x, **options)  # type: ignore[arg-type]


def test_only_one_triangle_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs multiplied: at most one triangle and the tiles on the diagonal, whatever the panels."""
    problem = CASES["mlp-relu"].build(queries=24)
    pairs = 0
    between = TangentKernel.between

    def counted(self: TangentKernel, left: Any, right: Any) -> Tensor:
        nonlocal pairs
        pairs += left[0].rows * right[0].rows
        return between(self, left, right)

    monkeypatch.setattr(TangentKernel, "between", counted)
    for plan in (Plan(5, 9, 2), Plan(3, 24, 4), Plan(1, 1, 1)):
        monkeypatch.setattr(Plan, "within", lambda *_, plan=plan, **__: plan)
        kernel = TangentKernel(problem.model, problem.inputs)
        pairs, places = 0, []
        for rows, columns, _ in kernel.blocks(problem.inputs, None, lambda: None):
            places += [(i, j) for i in range(rows.start, rows.stop) for j in range(columns.start, columns.stop)]
        assert len(places) == len(set(places)) == pairs <= 24 * 25 // 2 + 24 * plan.tile // 2
        assert {(max(p), min(p)) for p in places} == {(i, j) for i in range(24) for j in range(i + 1)}


def test_a_block_on_the_diagonal_becomes_symmetric() -> None:
    block = torch.randn(4, 4, 3, 3)
    found = symmetrised(block)
    assert torch.equal(found, mirrored(found))
    assert torch.equal(found[2, 1], block[2, 1])
    assert torch.equal(found[1, 1].tril(), block[1, 1].tril())
    assert torch.equal(symmetrised(block[:, :, 0, 0]), symmetrised(block[:, :, :1, :1])[:, :, 0, 0])


class Forked(nn.Module):
    """Which layer is used depends on the batch's first example."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[int(x[0, 0] > 0)](x)


def test_pieces_that_met_different_parameters() -> None:
    """Examples served by different layers have no parameter in common."""
    model, x = Forked().double(), torch.randn(6, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    for second in (None, x.flip(0)):
        other = x if second is None else second
        found = kx.tangent_kernel(model, x, second, batch=1)
        assert_close(found, 2 * (x @ other.T + 1) * (x[:, None, 0] == other[None, :, 0]), 1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_on_small_maps_stay_factored(bias: bool, dtype: torch.dtype) -> None:
    """A 2 × 2 map with many channels: products over positions are cheaper than matrices, and equal them."""
    model = nn.Sequential(nn.Conv2d(40, 50, 3, padding=1, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(200, 2))
    model, x = model.to(dtype), torch.randn(5, 40, 2, 2, dtype=dtype)
    factors = output_gradients(model, x, layout_of(model, x, trainable(model)))[1]
    assert [f.a.shape[1] for f in factors if isinstance(f, Outer)] == [4, 1]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for outputs in ("trace", "full", 1):
        assert_close(kx.tangent_kernel(model, x, outputs=outputs), dense(model, x, x, outputs), tolerance)
    diag = kx.tangent_kernel(model, x, outputs="full", diag=True)
    assert_close(diag, dense(model, x, x, "full").diagonal().movedim(-1, 0), tolerance)


MODEL = """
model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(800, 10))
x = torch.randn({rows}, 1, 12, 12)
kx.tangent_kernel(model, x[:4], memory=1)
"""


def taken(rows: int, memory: str, options: str = "") -> float:
    """Megabytes that a Gram matrix takes at most."""
    return peak(MODEL.format(rows=rows), f"kx.tangent_kernel(model, x, memory={memory!r}{options})")


@pytest.mark.slow
@pytest.mark.skipif(not MEASURED, reason="peak memory is read where Linux shows it")
def test_memory_stays_within_the_budget() -> None:
    """Gradients of all 1,000 examples take 80 MB; within 20 MB, what is taken does not grow with their number."""
    assert taken(1000, "1GB") > 45  # of the 80 MB some reuse freed memory; far above the bound that follows
    assert taken(1000, "20MB") < 20 + 4 + 5  # the matrix itself has 4 MB
    assert taken(1000, "20MB", ", diag=True") < 20
