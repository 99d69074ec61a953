"""Sequences: pairs of positions or per-example matrices, whichever takes fewer operations; many uses as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kxexplain.gradients import Dense, Factors, Outer, gram, gram_trace, layout_of, output_gradients, trainable
from kxexplain.gradients.factors import compact
from kxexplain.gradients.positions import joined
from tests import reference
from tests.laws import assert_close

WIDE = torch.float64


def outer(rows: int, positions: int, d_in: int, d_out: int, columns: int = 1, weight: str = "w") -> Outer:
    a = torch.randn(rows, positions, d_in, dtype=WIDE)
    return Outer(weight, None, a, torch.randn(rows, columns, positions, d_out, dtype=WIDE))


def operations(left: Factors, right: Factors) -> int:
    with FlopCounterMode(display=False) as counter:
        gram_trace(left, right)
    return counter.get_total_flops()


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 12), (4, 40), (40, 4), (64, 64)])
@pytest.mark.parametrize("positions", [1, 2, 4, 5, 6, 9, 16])
def test_the_form_with_fewer_operations_is_chosen(positions: int, d_in: int, d_out: int) -> None:
    """Counted by torch while the products are taken, not by the formula."""
    left, right = (outer(n, positions, d_in, d_out) for n in (3, 4))
    pairs, written = operations([left], [right]), operations(list(left.dense()), list(right.dense()))
    chosen = operations(compact(left), compact(right))
    assert chosen == min(pairs, written)
    assert chosen == (written if isinstance(compact(left)[0], Dense) else pairs)


@pytest.mark.parametrize(("width", "form"), [(6, Dense), (64, Outer)])
def test_a_model_of_sequences_gets_the_cheaper_form(width: int, form: type) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)).sum(1)[:, :2]

    model, x = Words().to(WIDE), torch.randn(4, 5, width, dtype=WIDE)
    _, factors = output_gradients(model, x, layout_of(model, x, trainable(model)))
    assert {type(f) for f in factors if "layer.weight" in f.names} == {form}
    dense = reference.jacobian(model, x)
    assert_close(gram(factors, factors), torch.einsum("ncp,mkp->ncmk", dense, dense), 1e-12)


@pytest.mark.parametrize("times", [1, 2, 3, 7])
@pytest.mark.parametrize("width", [3, 200])
def test_many_uses_of_a_matrix_are_one_sequence(times: int, width: int) -> None:
    each = [outer(3, 1, width, width, 2) for _ in range(times)]
    other = outer(3, 1, 4, 4, 2, weight="v")
    together = joined([each[0], other, *each[1:]])
    uses = [f for f in together if f.weight == "w"]
    assert len(uses) == (times if times < 3 else 1)
    assert isinstance(uses[0], Dense) == (times >= 3 and width == 3)
    assert together[1] is other
    written = sum(f.dense()[0].values for f in uses)
    assert_close(written, sum(f.dense()[0].values for f in each), 1e-14)


def test_a_loop_over_time_is_one_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty applications of a wide matrix: not 400 small products."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = torch.tanh(self.step(x))
            return x[:, :2]

    model, x = Loop().to(WIDE), torch.randn(3, 40, dtype=WIDE)
    _, factors = output_gradients(model, x, layout_of(model, x, trainable(model)))
    assert len([f for f in factors if "step.weight" in f.names]) == 1
    dense = reference.jacobian(model, x)
    assert_close(gram_trace(factors, factors), torch.einsum("ncp,mcp->nm", dense, dense), 1e-12)
