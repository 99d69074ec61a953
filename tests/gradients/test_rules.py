"""Every rule: J(u'−u) = v'−v on random ends, far apart and nearly equal; and J → φ' as the ends meet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kxexplain.gradients.capture import Capture
from kxexplain.gradients.table import RULES
from kxexplain.gradients.two_point import Substitution, Trace, TwoPoint
from kxexplain.gradients.uses import Layout
from tests.laws import relative

Call = Callable[..., Any]


def uniform(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * (high - low) + low


def positive(*shape: int) -> Tensor:
    return uniform(*shape, low=0.2, high=3.0)


def inside(*shape: int) -> Tensor:
    return uniform(*shape, low=-0.9, high=0.9)


def above_one(*shape: int) -> Tensor:
    return uniform(*shape, low=1.2, high=4.0)


def function(name: str) -> Call:
    for space in (torch, F, torch.Tensor, torch._C._nn, torch._C._special):
        found = getattr(space, name, None)
        if found is not None:
            return found
    raise AssertionError(name)


INDEX = torch.tensor([2, 0, 1, 1])
LINEAR = {
    "add": (lambda a, b: a + b, 2),
    "sub": (lambda a, b: a - b, 2),
    "rsub": (lambda a: 3 - a, 1),
    "neg": (lambda a: -a, 1),
    "mul": (lambda a, b: a * b, 2),
    "matmul": (lambda a, b: a @ b.transpose(-1, -2), 2),
    "linear": (lambda a, b: F.linear(a, b, b[:, 0]), 2),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), 2),
    "outer": (lambda a, b: torch.outer(a[0], b[0]), 2),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), 2),
    "addmm": (lambda a, b: torch.addmm(a[:, :1], a, b.T, beta=0.5, alpha=2), 2),
    "kron": (torch.kron, 2),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), 2),
    "addcmul": (lambda a, b: torch.addcmul(a, a, b, value=2), 2),
    "bmm": (lambda a, b: torch.bmm(a[None], b.T[None]), 2),
    "dot": (lambda a, b: torch.dot(a[0], b[0]), 2),
    "square": (torch.square, 1),
    "pow": (lambda a: a**2, 1),
    "conv1d": (lambda a, b: F.conv1d(a[None], b[None, :, :3]), 2),
    "conv_transpose1d": (lambda a, b: F.conv_transpose1d(a[None], b[:, None, :2]), 2),
    "view": (lambda a: a.view(-1), 1),
    "getitem": (lambda a: a[INDEX % 2, 1:], 1),
    "index_select": (lambda a: a.index_select(0, INDEX), 1),
    "gather": (lambda a: a.gather(0, INDEX[None].repeat(4, 1)), 1),
    "cat": (lambda a, b: torch.cat([a, b], 1), 2),
    "stack": (lambda a, b: torch.stack([a, b]), 2),
    "chunk": (lambda a: a.chunk(2, 1)[1], 1),
    "unbind": (lambda a: a.unbind(0)[2], 1),
    "sum": (lambda a: a.sum(1), 1),
    "mean": (lambda a: a.mean(0), 1),
    "cumsum": (lambda a: a.cumsum(1), 1),
    "trace": (torch.trace, 1),
    "pad": (lambda a: F.pad(a[None], (1, 2), mode="reflect"), 1),
    "roll": (lambda a: a.roll(1, 1), 1),
    "flip": (lambda a: a.flip(1), 1),
    "tril": (torch.tril, 1),
    "diagonal": (torch.diagonal, 1),
    "repeat": (lambda a: a.repeat(2, 1), 1),
    "avg_pool1d": (lambda a: F.avg_pool1d(a[None], 2), 1),
    "adaptive_avg_pool1d": (lambda a: F.adaptive_avg_pool1d(a[None], 2), 1),
    "masked_fill": (lambda a: a.masked_fill(torch.eye(4).bool(), 0.5), 1),
    "where": (lambda a, b: torch.where(torch.eye(4).bool(), a, b), 2),
    "upsample_bilinear2d": (lambda a: F.interpolate(a[None, None], scale_factor=2, mode="bilinear"), 1),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a[:, :, None], 2), 1),
    "scatter_add": (lambda a, b: a.scatter_add(0, INDEX[None], b[:1]), 2),
    "index_add": (lambda a, b: a.index_add(0, INDEX, b), 2),
    "unfold": (lambda a: a.unfold(1, 2, 1), 1),
    "cross": (lambda a, b: torch.cross(a[:, :3], b[:, :3], dim=1), 2),
    "expand": (lambda a: a[:, :1].expand(-1, 5), 1),
    "get:T": (lambda a: a.T, 1),
    "split": (lambda a: a.split([1, 3], 1)[1], 1),
    "diff": (lambda a: a.diff(dim=1), 1),
    "movedim": (lambda a: a.movedim(0, 1), 1),
    "clone": (torch.clone, 1),
    "to": (lambda a: a.to(a.dtype), 1),
    "baddbmm": (lambda a, b: torch.baddbmm(a[None], a[None], b[None]), 2),
    "atleast_3d": (torch.atleast_3d, 1),
    "double": (lambda a: a.double(), 1),
}
"""Of degree two at most, called as users call them: (function, number of inputs of shape [4, 4])."""

DOMAINS: dict[str, Call] = (
    dict.fromkeys(["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma"], positive)
    | dict.fromkeys(["asin", "acos", "atanh", "erfinv"], inside)
    | {
        "acosh": above_one,
        "logit": lambda *s: uniform(*s, low=0.05, high=0.95),
        "special_expit": uniform,
    }
)
ELEMENTWISE = [
    name
    for name, rule in RULES.items()
    if getattr(rule, "__name__", getattr(getattr(rule, "func", None), "__name__", ""))
    in ("elementwise", "piecewise_linear", "relu")
]
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.1, -0.5),
    "clamp": (-0.5, 0.7),
    "clamp_min": (-0.3,),
    "clamp_max": (0.4,),
    "heaviside": (torch.tensor(0.5, dtype=torch.float64),),
    "logsigmoid": (),
    "hardtanh": (),
    "softshrink": (),
    "hardshrink": (),
}

COMPOSITE: dict[str, tuple[Call, int]] = {
    "softmax": (lambda a: torch.softmax(a, 1), 1),
    "softmax 0": (lambda a: a.softmax(dim=0), 1),
    "log_softmax": (lambda a: F.log_softmax(a, -1), 1),
    "logsumexp": (lambda a: torch.logsumexp(a, 1), 1),
    "logsumexp keep": (lambda a: a.logsumexp((1,), keepdim=True), 1),
    "div": (lambda a, b: a / (b + 3), 2),
    "div plain": (lambda a: a / 3, 1),
    "rdiv": (lambda a: 2 / (a + 3), 1),
    "rpow": (lambda a: 2**a, 1),
    "pow 3": (lambda a: a**3, 1),
    "pow 2.5": (lambda a: (a + 3) ** 2.5, 1),
    "pow -1": (lambda a: (a + 3) ** -1, 1),
    "pow tensors": (lambda a, b: (a + 3) ** b, 2),
    "pow keyword": (lambda a: torch.pow(a, exponent=2), 1),
    "maximum": (torch.maximum, 2),
    "minimum": (torch.minimum, 2),
    "maximum keyword": (lambda a, b: torch.maximum(a, other=b), 2),
    "max of two": (torch.max, 2),
    "prelu": (lambda a, b: F.prelu(a, b[0]), 2),
    "prelu keyword": (lambda a, b: F.prelu(a, weight=b[0]), 2),
    "glu": (lambda a: F.glu(a, 1), 1),
    "bilinear": (lambda a, b: F.bilinear(a, b, (a @ b)[None].repeat(2, 1, 1)), 2),
    "dropout": (lambda a: F.dropout(a, 0.5, training=False), 1),
    "layer_norm": (lambda a, b: F.layer_norm(a, (4,), b[0], b[1]), 2),
    "layer_norm 2": (lambda a: F.layer_norm(a, (4, 4)), 1),
    "rms_norm": (lambda a, b: F.rms_norm(a, (4,), b[0]), 2),
    "group_norm": (lambda a, b: F.group_norm(a, 2, b[0], b[1]), 2),
    "batch_norm": (lambda a, b: F.batch_norm(a, b[0], b[1].exp(), b[2], b[3]), 2),
    "batch_norm training": (lambda a, b: F.batch_norm(a, None, None, b[0], b[1], training=True), 2),
    "instance_norm": (lambda a, b: F.instance_norm(a[None], weight=b[0], bias=b[1]), 2),
    "var": (torch.var, 1),
    "var dims": (lambda a: a.var((0, 1), unbiased=False), 1),
    "var correction": (lambda a: torch.var(a, dim=1, correction=0, keepdim=True), 1),
    "std": (lambda a: a.std(dim=1), 1),
    "std flag": (lambda a: a.std(False), 1),
    "norm": (lambda a: a.norm(dim=1), 1),
    "norm 1": (lambda a: a.norm(p=1, dim=1), 1),
    "normalize": (lambda a: F.normalize(a, dim=1), 1),
    "attention": (lambda a, b: F.scaled_dot_product_attention(a, b, a * b), 2),
    "attention causal": (lambda a, b: F.scaled_dot_product_attention(a, b, a, is_causal=True, scale=0.7), 2),
    "attention mask": (lambda a, b: F.scaled_dot_product_attention(a, b, a, torch.ones(4, 4).tril().bool()), 2),
    "softmax masked": (lambda a: a.masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")).softmax(1), 1),
    "softmax mask added": (lambda a: torch.softmax(torch.full((4, 4), float("-inf")).triu(1) + a, -1), 1),
    "softmax mask product": (
        lambda a, b: torch.softmax(
            torch.baddbmm(torch.full((4, 4), float("-inf")).double().triu(1), a[None], b[None]), -1
        ),
        2,
    ),
    "cross_entropy": (lambda a: F.cross_entropy(a, INDEX, reduction="none"), 1),
    "cross_entropy soft": (lambda a: F.cross_entropy(a, torch.full((4, 4), 0.25, dtype=a.dtype), reduction="none"), 1),
    "cross_entropy smooth": (lambda a: F.cross_entropy(a, INDEX, reduction="none", label_smoothing=0.1), 1),
    "cross_entropy mean": (lambda a: F.cross_entropy(a, INDEX, weight=torch.arange(1.0, 5.0, dtype=a.dtype)), 1),
    "mse": (lambda a, b: F.mse_loss(a, b), 2),
    "huber": (lambda a, b: F.huber_loss(a, b, reduction="none"), 2),
    "bce": (lambda a: F.binary_cross_entropy_with_logits(a, torch.eye(4, dtype=a.dtype), reduction="none"), 1),
    "tanh keyword": (lambda a: torch.tanh(input=a), 1),
    "relu keyword": (lambda a: torch.relu(input=a), 1),
    "div keyword": (lambda a, b: torch.div(input=a, other=b + 3), 2),
    "relu": (F.relu, 1),
    "clamp tensors": (lambda a, b: torch.clamp(a, b - 1, b + 1), 2),
    "embedding": (lambda a: F.embedding(INDEX, a, padding_idx=1), 1),
}

UNKNOWN: dict[str, tuple[Call, int]] = {
    "sort": (lambda a: a.sort(1).values, 1),
    "topk": (lambda a: a.topk(2, 1).values, 1),
    "cumprod": (lambda a: a.cumprod(1), 1),
    "prod": (lambda a: a.prod(1), 1),
    "max pool": (lambda a: F.max_pool1d(a, 2), 1),
    "max": (lambda a: a.max(1).values, 1),
    "atan2": (lambda a, b: torch.atan2(a, b + 3), 2),
    "hypot": (torch.hypot, 2),
    "logaddexp": (torch.logaddexp, 2),
    "cdist": (torch.cdist, 2),
    "cosine": (lambda a, b: F.cosine_similarity(a, b), 2),
    "det": (lambda a: torch.linalg.det(a[None]), 1),
    "inverse": (lambda a: torch.linalg.inv(a + 8 * torch.eye(4, dtype=a.dtype)), 1),
    "median": (lambda a: a.median(1).values, 1),
    "floor divide": (lambda a: a // 0.3, 1),
    "round": (torch.round, 1),
    "sign": (torch.sign, 1),
    "three factors": (lambda a, b: torch.einsum("ij,jk,kl->il", a, b, a), 2),
    "remainder": (lambda a: a % 0.7, 1),
    "logcumsumexp": (lambda a: a.logcumsumexp(1), 1),
    "renorm": (lambda a: a.renorm(2, 0, 1.0), 1),
}


def trace(rows: int = 4) -> Trace:
    return Trace(rows, Capture({}, Layout({}, {}), rows))


class Inexact(AssertionError):
    """The operation alone has no exact map; the whole model's correction must make up for it."""


def pushed(call: Call, starts: list[Tensor], ends: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, v', JΔu and J in another direction, with J read off the middle's graph."""
    context = trace()
    leaves = [((a + b) / 2).requires_grad_() for a, b in zip(starts, ends, strict=True)]
    points = [TwoPoint(a, b, m, context) for a, b, m in zip(starts, ends, leaves, strict=True)]
    with torch.enable_grad(), Substitution({}, context):
        out = call(*points)
    if not isinstance(out, TwoPoint):
        return call(*starts), call(*ends), torch.zeros_like(out), torch.zeros_like(out)
    if context.inexact:
        raise Inexact
    middle = out.middle.expand_as(out.start)
    rows = []
    for element in middle.flatten():
        grads = (
            torch.autograd.grad(element, leaves, retain_graph=True, allow_unused=True)
            if element.requires_grad
            else [None] * len(leaves)
        )
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True)])
    along = [sum((g * (b - a)).sum() for g, a, b in zip(row, starts, ends, strict=True)) for row in rows]
    other = [sum((g * torch.cos(a)).sum() for g, a in zip(row, starts, strict=True)) for row in rows]
    return out.start, out.end, torch.stack(along).view(out.start.shape), torch.stack(other).view(out.start.shape)


def check_exact(call: Call, inputs: list[Tensor], others: list[Tensor], tolerance: float) -> None:
    start, end, along, _ = pushed(call, inputs, others)
    assert torch.equal(start, call(*inputs)) or relative(start, call(*inputs)) < 1e-6
    assert torch.equal(end, call(*others)) or relative(end, call(*others)) < 1e-6
    eps, size = torch.finfo(start.dtype).eps, float(torch.maximum(start.abs(), end.abs()).max())
    error = float((along - (end - start)).abs().max())
    change = float((end - start).abs().max())
    assert error <= tolerance * change + 64 * eps * size, f"J Δu misses Δv by {error:.1e} of {change:.1e}"


def check_near_derivative(call: Call, inputs: list[Tensor]) -> None:
    """Ends 1e-6 apart: J equals the derivative at the middle, in another direction as well."""
    others = [u + 1e-6 * torch.sin(17 * u) for u in inputs]
    _, _, _, found = pushed(call, inputs, others)
    middle = [((a + b) / 2) for a, b in zip(inputs, others, strict=True)]
    # The direction as a central difference, which needs no derivative of anything.
    step = 1e-5
    ahead, behind = ([m + s * step * torch.cos(a) for m, a in zip(middle, inputs, strict=True)] for s in (1, -1))
    expected = (call(*ahead) - call(*behind)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)


def every() -> dict[str, tuple[Call, list[Tensor], list[Tensor]]]:
    generator_state = torch.get_rng_state()
    torch.manual_seed(3)
    table: dict[str, tuple[Call, list[Tensor], list[Tensor]]] = {}
    for name in ELEMENTWISE:
        domain = DOMAINS.get(name, uniform)
        arguments = ARGUMENTS.get(name, ())
        bare = function(name)
        call = (lambda u, f=bare, extra=arguments: f(u, *extra)) if arguments else bare
        table[f"elementwise {name}"] = (call, [domain(4, 4)], [domain(4, 4)])
    for kind, entries in (("linear", LINEAR), ("composite", COMPOSITE), ("unknown", UNKNOWN)):
        for name, (call, count) in entries.items():
            table[f"{kind} {name}"] = (
                call,
                [uniform(4, 4) for _ in range(count)],
                [uniform(4, 4) for _ in range(count)],
            )
    torch.set_rng_state(generator_state)
    return table


EVERY = every()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(EVERY))
def test_exact_on_ends_far_apart(name: str, dtype: torch.dtype) -> None:
    call, starts, ends = EVERY[name]
    if dtype == torch.float32 and ("double" in name or "heaviside" in name or "mask product" in name):
        pytest.skip("the call is of float64")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    check_exact(call, [t.to(dtype) for t in starts], [t.to(dtype) for t in ends], tolerance)


@pytest.mark.parametrize("gap", [1e-12, 1e-4, *(pytest.param(gap, marks=pytest.mark.slow) for gap in (1e-8, 1e-2))])
@pytest.mark.parametrize("name", list(EVERY))
def test_exact_on_ends_nearly_equal(name: str, gap: float) -> None:
    """Cancellation costs no more than the rounding of the values."""
    call, starts, _ = EVERY[name]
    ends = [u + gap * torch.sin(31 * u) for u in starts]
    check_exact(call, starts, ends, 1e-11)


@pytest.mark.parametrize("name", list(EVERY))
def test_exact_where_only_some_inputs_move(name: str) -> None:
    call, starts, ends = EVERY[name]
    some = [torch.where(torch.ones(4, 4).tril().bool(), a, b) for a, b in zip(starts, ends, strict=True)]
    with suppress(Inexact) if "unknown" in name else nullcontext():
        check_exact(call, starts, some, 1e-12)
    for at in range(len(starts)):
        mixed = [b if i == at else a for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
        check_exact(call, starts, mixed, 1e-12)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in EVERY
        if n != "unknown cdist"  # no second derivative: only the rank-one map, exact along Δu alone
        and not any(
            w in n
            for w in ("floor", "round", "sign", "trunc", "ceil", "heaviside", "hardshrink", "threshold", "renorm")
        )
    ],
)
def test_the_map_tends_to_the_derivative(name: str) -> None:
    call, starts, _ = EVERY[name]
    check_near_derivative(call, starts)


@pytest.mark.parametrize("name", [n for n in EVERY if "digamma" not in n])
def test_equal_ends_give_numbers(name: str) -> None:
    call, starts, _ = EVERY[name]
    _, _, along, other = pushed(call, starts, [t.clone() for t in starts])
    assert bool(along.isfinite().all())
    assert bool(other.isfinite().all())


@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "cross_entropy", "attention"])
def test_logits_of_any_size(name: str, size: float) -> None:
    call, count = COMPOSITE[name]
    starts, ends = ([size * uniform(4, 4) for _ in range(count)] for _ in range(2))
    if name == "attention":
        starts, ends = ([t / size**0.5 for t in ts] for ts in (starts, ends))
    check_exact(call, starts, ends, 1e-12)


def test_softmax_in_closed_form() -> None:
    """J = diag(L) − L Lᵀ/ΣL with L the logarithmic mean of p and p'."""
    u, v = uniform(1, 5), uniform(1, 5)
    p, q = u.softmax(1)[0], v.softmax(1)[0]
    mean = (q - p) / (q.log() - p.log())
    expected = torch.diag(mean) - torch.outer(mean, mean) / mean.sum()
    _, _, _, found = pushed(lambda a: torch.softmax(a, 1), [u], [v])
    torch.testing.assert_close(found[0], expected @ torch.cos(u[0]), rtol=1e-12, atol=1e-14)


def test_a_shift_common_to_all_logits_costs_no_digits() -> None:
    """Attention over nearly saturated scores that all move by 300: J·1 = 0 must hold far below rounding of J itself."""
    values = 8 * torch.randn(4, 6)
    start = torch.rand(4, 4) * 4 + torch.tensor([0.0, 0.0, 8.0, 0.0])
    end = start + 300 + torch.rand(4, 4)
    found_start, found_end, along, _ = pushed(lambda a: torch.softmax(a, 1) @ values, [start], [end])
    assert float((along - (found_end - found_start)).abs().max()) <= 4e-6


def test_in_place_operations() -> None:
    """x.relu_(), x += y, x[i] = y act as their out-of-place versions do."""

    def call(a: Tensor, b: Tensor) -> Tensor:
        h = a * 1.0
        h += b
        h.mul_(b).relu_()
        h[0] = b[1] * a[1]
        h[:, 2] = 0.5
        h -= a
        return F.relu(h, inplace=True) + torch.tanh_(a * b)

    check_exact(call, [uniform(4, 4), uniform(4, 4)], [uniform(4, 4), uniform(4, 4)], 1e-12)
