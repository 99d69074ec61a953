"""The laws, each a function with a name: what holds of every explanation and every kernel, whatever the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kxexplain import Explanation

LINES = ("regularizer", "penalty", "buffers", "unattributed")
COMPLETE = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Law 1: how far a bill may miss the prediction, relative to what training changed."""

FACTORED = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Law 3: how far factored inner products may be from dense ones."""


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ (absolute where ``expected`` is zero)."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale or 1.0)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The two agree in norm."""
    error = relative(found, expected)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def incompleteness(explanation: Explanation) -> float:
    """‖prediction − baseline − Σ contributions − other lines‖ / ‖prediction − baseline‖, from the lines shown."""
    wide = {name: getattr(explanation, name).double() for name in ("prediction", "baseline", "contributions", *LINES)}
    change = wide["prediction"] - wide["baseline"]
    missing = change - wide["contributions"].sum(1) - sum(wide[name] for name in LINES)
    return float(missing.norm() / change.norm())


def assert_complete(explanation: Explanation, tolerance: float | None = None) -> None:
    """Law 1: the bill adds up, and its remainder line says by how much not."""
    allowed = COMPLETE[explanation.prediction.dtype] if tolerance is None else tolerance
    missing = incompleteness(explanation)
    assert missing <= allowed, f"the bill misses the prediction by {missing:.2e} of the change"
    change = explanation.prediction - explanation.baseline
    assert float(explanation.remainder.norm()) <= allowed * float(change.norm())


def assert_each_complete(explanation: Explanation, tolerance: float) -> None:
    """Every query's own bill adds up: relative to the largest change of any."""
    change = (explanation.prediction - explanation.baseline).abs().max()
    assert float(explanation.remainder.abs().max() / change) <= tolerance


def assert_unexplained_is_shown(explanation: Explanation, tolerance: float) -> None:
    """With the remainder counted, every bill adds up, exact rule or not."""
    total = explanation.baseline + explanation.contributions.sum(1) + explanation.remainder
    total = total + sum(getattr(explanation, name) for name in LINES)
    assert_close(total, explanation.prediction, tolerance)


def assert_timeline_agrees(explanation: Explanation, tolerance: float) -> None:
    """The timeline's totals add up to the bill's lines, its shares to the examples' contributions."""
    line = explanation.timeline
    for name in LINES:
        torch.testing.assert_close(line.totals[name].sum(0), getattr(explanation, name), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        line.totals["contributions"].sum(0), explanation.contributions.sum(1), atol=tolerance, rtol=tolerance
    )
    rows = torch.arange(len(explanation))[:, None]
    expected = explanation.contributions[rows, line.examples]
    torch.testing.assert_close(line.shares.sum(0), expected, atol=tolerance, rtol=tolerance)
    assert len(line.bins) == len(line.shares) + 1
    assert len(line.steps) == len(line.totals["contributions"]) + 1


def assert_symmetric(gram: Tensor, tolerance: float) -> None:
    """K = Kᵀ; a C × C block is transposed as well."""
    mirrored = gram.transpose(0, 1)
    assert_close(gram, mirrored.transpose(2, 3) if gram.dim() == 4 else mirrored, tolerance)


def assert_positive_semidefinite(gram: Tensor, tolerance: float) -> None:
    """No eigenvalue below −tolerance of the largest."""
    if gram.dim() == 4:
        n, _, c, _ = gram.shape
        gram = gram.transpose(1, 2).reshape(n * c, n * c)
    values = torch.linalg.eigvalsh((gram + gram.T) / 2)
    assert float(values[0]) >= -tolerance * float(values[-1])


def assert_diagonal_agrees(gram: Tensor, diagonal: Tensor, tolerance: float) -> None:
    """K(x, x) computed alone equals the matrix' diagonal."""
    assert_close(diagonal, gram.diagonal(), tolerance)


def assert_same_bill(first: Explanation, second: Explanation, tolerance: float) -> None:
    """Two explanations of the same queries agree line by line."""
    assert_close(first.contributions, second.contributions, tolerance)
    for name in ("baseline", "prediction", *LINES):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=tolerance, rtol=tolerance)


def assert_batching_irrelevant(whole: Explanation, parts: Sequence[Explanation], tolerance: float) -> None:
    """Queries explained in portions have the bills they have together."""
    joined = torch.cat([part.contributions for part in parts])
    assert_close(joined, whole.contributions, tolerance)
    torch.testing.assert_close(
        torch.cat([part.prediction for part in parts]), whole.prediction, atol=tolerance, rtol=tolerance
    )


def assert_query_order_irrelevant(first: Explanation, second: Explanation, order: Tensor, tolerance: float) -> None:
    """Query ``order[i]`` of the first is query i of the second."""
    assert_close(second.contributions, first.contributions[order], tolerance)


def assert_permutes_with_data(first: Explanation, second: Explanation, order: Tensor, tolerance: float) -> None:
    """Example ``order[j]`` of the first is example j of the second."""
    assert_close(second.contributions, first.contributions[:, order], tolerance)


def assert_stride_irrelevant_to_total(explanations: Sequence[Explanation], tolerance: float) -> None:
    """Σ contributions is the same for every stride."""
    totals = [e.contributions.sum(1) for e in explanations]
    for total in totals[1:]:
        assert_close(total, totals[0], tolerance)


def assert_kernel_times_alpha(explanation: Explanation, tolerance: float) -> None:
    """Contributions = K α wherever α is defined, and where it is not, α is NaN and nothing else is."""
    kernel, alpha, defined = explanation.kernel, explanation.alpha, explanation.defined
    assert bool(kernel.isfinite().all())
    assert bool(explanation.contributions.isfinite().all())
    if explanation.all_outputs:
        product = (kernel @ alpha[..., None])[..., 0]
        assert bool(alpha[~defined].isnan().any(-1).all())
    else:
        product = kernel * alpha
        assert bool(alpha[~defined].isnan().all())
    assert bool(defined.any()), "α is defined nowhere"
    assert_close(product[defined], explanation.contributions[defined], tolerance)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a call must not change."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "wanted": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "identity": {k: (id(p), p.data_ptr()) for k, p in model.named_parameters()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for k, m in model.named_modules()
        },
    }


@contextmanager
def assert_model_untouched(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing of the model or of torch's global state changes."""
    before = copy.deepcopy(snapshot(model))
    rng, grad, default = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    after = snapshot(model)
    for aspect in ("wanted", "modes", "identity", "hooks"):
        assert after[aspect] == before[aspect], aspect
    for aspect in ("values", "grads"):
        for name, old in before[aspect].items():  # type: ignore[attr-defined]
            new = after[aspect][name]  # type: ignore[index]
            assert (old is None) == (new is None), (aspect, name)
            assert old is None or torch.equal(old, new), (aspect, name)
    assert torch.equal(rng, torch.get_rng_state()), "the generator has moved"
    assert (grad, default) == (torch.is_grad_enabled(), torch.get_default_dtype())
