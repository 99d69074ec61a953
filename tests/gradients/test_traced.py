"""Two sides that meet column by column: what needs no room, and that the kernel is that of whole Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import kxexplain as kx
from kxexplain.gradients import layout_of, trainable
from kxexplain.gradients.ordinary import watched
from kxexplain.gradients.traced import joint_trace, passing
from kxexplain.kernels import TangentKernel
from tests import reference
from tests.laws import FACTORED, assert_close
from tests.memory import MEASURED, peak


class Net(nn.Module):
    """Three layers and whatever is made of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def halved(net: Any, x: Tensor) -> Tensor:
    """A slice of the second matrix beside the whole one."""
    return net.head(F.linear(net.second(net.first(x)).tanh(), net.second.weight[:2]) @ torch.ones(2, 5).to(x))


NETS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "once": (lambda net, x: net.head(net.second(net.first(x).tanh()).tanh()), ["first", "second", "head"]),
    "tied": (lambda net, x: net.head(net.first(net.second(net.first(x).tanh()).tanh())), ["second", "head"]),
    "sliced": (halved, ["first", "head"]),
    "derived": (
        lambda net, x: net.head(F.linear(net.second(net.first(x)).tanh(), 2 - net.second.weight)),
        ["first", "head"],
    ),
    "as x @ w": (
        lambda net, x: net.head((net.first(x).tanh() @ net.second.weight).tanh()),
        ["first", "second", "head"],
    ),
    "positions": (
        lambda net, x: net.head(net.second(torch.stack([net.first(x), x, x.tanh()], 1)).tanh().sum(1)),
        ["first", "head"],
    ),
    "loose": (
        lambda net, x: net.head(net.first(x).tanh()) * torch.cdist(x, net.second.weight).sum(1, keepdim=True),
        ["first", "head"],
    ),
    "unused": (lambda net, x: (net.second(x), net.head(net.first(x).tanh()))[1], ["first", "second", "head"]),
    "not every output": (
        lambda net, x: torch.cat([net.head(net.first(x).tanh()), net.second(x)], 1),
        ["first", "second", "head"],
    ),
}
"""Models, and the layers whose gradients need no room."""


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Net(NETS[name][0]).to(dtype).eval()


def whole(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """From whole Jacobians, row by row."""
    return torch.einsum("ncp,mcp->nm", reference.jacobian(model, x), reference.jacobian(model, y))


@pytest.mark.parametrize("name", NETS)
def test_equals_the_jacobians_products(name: str, dtype: torch.dtype) -> None:
    model, x = build(name, dtype), torch.randn(6, 5, dtype=dtype)
    layout = layout_of(model, x, trainable(model))
    found = joint_trace(model, x.clone(), 4, layout)
    assert_close(found, whole(model, x[:4], x[4:]), FACTORED[dtype])
    one = joint_trace(model, x.clone(), 4, layout, lambda values: values[:, [1]])
    assert_close(one, kx.tangent_kernel(model, x[:4], x[4:], outputs=1, batch=1), FACTORED[dtype])


@pytest.mark.parametrize("name", NETS)
def test_what_needs_no_room(name: str) -> None:
    """Only matrices used once, whole, with one vector of each example: others have products across their uses."""
    model, x = build(name), torch.randn(6, 5, dtype=torch.float64)
    capture = watched(model, x, layout_of(model, x, trainable(model)))[1]
    assert capture.loose == ({"second.weight"} if name == "loose" else set())
    found = [source.name for number in passing(capture) for source in capture.uses[number].sources.values()]
    assert sorted(found) == sorted(n for n, _ in model.named_parameters() if n.split(".")[0] in NETS[name][1])


def test_frozen_and_normed_weights() -> None:
    """A frozen bias adds no 1; a normed weight's gradients are carried on to its length and direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    x = torch.randn(6, 5, dtype=torch.float64)
    found = joint_trace(model, x.clone(), 2, layout_of(model, x, trainable(model)))
    assert_close(found, whole(model, x[:2], x[2:]), 1e-12)


def test_is_used_where_both_sides_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with little memory, nor in smaller batches, nor where examples differ in shape or kind."""
    model = build("once")
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    wanted, calls = whole(model, x, y), 0

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return joint_trace(*arguments)

    monkeypatch.setattr("kxexplain.kernels.tangent.joint_trace", counted)
    for options, times in (
        ({}, 1),
        ({"batch": 7}, 1),
        ({"batch": 6}, 0),
        ({"memory": 2000}, 0),
    ):
        calls = 0
        assert_close(kx.tangent_kernel(model, x, y, **options), wanted, 1e-12)  # type: ignore[arg-type]
        assert calls == times, options
    calls, words = 0, nn.Sequential(nn.Linear(2, 3), nn.Tanh(), Mean(), nn.Linear(3, 2)).double()
    short, long = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    assert_close(kx.tangent_kernel(words, short, long), whole(words, short, long), 1e-12)
    assert calls == 0
    kx.tangent_kernel(words, short, short + 1)
    assert calls == 1
    kernel = TangentKernel(model, x)
    assert len(kernel.steps(x, y)) == 1
    assert kernel.plan.at_once(4, 3)
    assert not kernel.plan.at_once(kernel.plan.joint, 1)


class Mean(nn.Module):
    """Over a sequence's positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


MODEL = """
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.{middle}, torch.nn.Tanh(), torch.nn.Linear(256, 100))
x = torch.randn(1000, 64)
kx.tangent_kernel(model, x[:4], x[:2])
"""


def taken(middle: str, memory: str, options: str = "") -> float:
    """Megabytes that a Gram matrix takes at most."""
    return peak(MODEL.format(middle=middle), f"kx.tangent_kernel(model, x, x[:500], memory={memory!r}{options})")


@pytest.mark.slow
@pytest.mark.skipif(not MEASURED, reason="peak memory is read where Linux shows it")
def test_takes_no_room_for_all_outputs() -> None:
    """100 outputs' gradients at 256 units take 150 MB for 1,500 examples; none of it where they meet in one pass.

    A norm between the layers needs room of its own: within the budget either way.
    """
    assert taken("Identity()", "1GB", ", batch=1000") > 100
    assert taken("Identity()", "1GB") < 60
    for middle in ("Identity()", "LayerNorm(256)"):
        assert taken(middle, "100MB") < 100 + 2 + 5  # the matrix itself has 2 MB
