r"""Inner products of per-example gradients, without writing the gradients out where structure allows.

⟨g aᵀ, h bᵀ⟩ = (g·h)(a·b): for n × m pairs of a linear layer's examples, 2(d_in+d_out) operations a pair
instead of 2·d_in·d_out, as two matrix products and an elementwise one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.gradients.factors import Dense, Factor, Factors, Outer, merge

Outputs = Literal["full", "trace"]
InputsMet = Callable[[Outer, Outer], Tensor]


def inputs_met(f: Outer, h: Outer) -> Float[Tensor, "n m"]:
    """Inner products of what two linear layers, of one position each, were applied to."""
    return f.a.view(len(f.a), -1) @ h.a.view(len(h.a), -1).T


def gram(
    left: Factors, right: Factors, inputs: InputsMet = inputs_met, dtype: torch.dtype | None = None
) -> Float[Tensor, "n c m k"]:
    """All inner products between two sets of per-example gradients, every output with every output.

    Args:
        left: gradients of n examples with c outputs each.
        right: gradients of m examples with k outputs each.
        inputs: gives a new tensor of the inner products of the inputs, if they are known already.
        dtype: in which to add up the uses' products, if not in their own.

    Returns:
        [n, c, m, k]; summed over all parameters that both sides have, zero if there are none.
    """
    return _accumulate(left, right, partial(_outer_full, inputs=inputs), _dense_full, dtype)


def gram_trace(left: Factors, right: Factors) -> Float[Tensor, "n m"]:
    """Inner products summed over equal outputs: Σ_c ⟨∇f_c(x), ∇f_c(x')⟩.

    One matrix product over c·d_out columns replaces c² blocks: the structural minimum of operations.
    """
    return _accumulate(left, right, _outer_trace, _dense_trace)


def _accumulate(  # type: ignore[no-untyped-def]
    left: Factors, right: Factors, outer, dense, dtype: torch.dtype | None = None
) -> Tensor:
    total: Tensor | None = None
    for f, h in _pairs(left, right):
        if isinstance(f, Outer) and isinstance(h, Outer):
            term = outer(f, h)
        else:
            assert isinstance(f, Dense)
            assert isinstance(h, Dense)
            term = dense(f.values, h.values)
        term = term.to(dtype or term.dtype)  # converted first: adding numbers of two kinds takes longer
        total = term if total is None else total.add_(term)
    return outer(_nothing(left[0]), _nothing(right[0])) if total is None else total


def _nothing(like: Factor) -> Outer:
    """Gradients of value zero, for as many examples and outputs."""
    values = like.g if isinstance(like, Outer) else like.values
    return Outer("", None, values.new_zeros(like.rows, 1, 1), values.new_zeros(*values.shape[:2], 1, 1))


def pair_elements(factors: Factors, *, full: bool) -> int:
    """Numbers that :func:`gram` or :func:`gram_trace` takes for a pair of such examples, the result included."""
    c = factors[0].columns ** 2 if full else 1
    positions = [f.a.shape[1] for f in factors if isinstance(f, Outer)]
    return 2 * c + max(((r * r) * (1 + 2 * c) for r in positions), default=0)


def _pairs(left: Factors, right: Factors) -> list[tuple[Factor, Factor]]:
    """Uses to be multiplied with each other: all uses of one parameter meet all uses of it.

    Where a parameter is kept in different forms (tied to an embedding and a linear layer, say) every use
    of it is written out first.
    """
    forms: dict[str, set[object]] = {}
    for factor in (*left, *right):
        form = (factor.names, factor.transposed) if isinstance(factor, Outer) else "dense"
        for name in factor.names:
            forms.setdefault(name, set()).add(form)
    clash = {name for name, met in forms.items() if len(met) > 1}
    while True:  # an Outer holds two parameters: writing one out drags the other along
        grown = clash | {n for f in (*left, *right) if clash & set(f.names) for n in f.names}
        if grown == clash:
            break
        clash = grown
    left, right = _written(left, clash), _written(right, clash)
    by_name: dict[str, list[Factor]] = {}
    for h in right:
        by_name.setdefault(h.weight, []).append(h)
    return [(f, h) for f in left for h in by_name.get(f.weight, [])]


def _written(factors: Factors, names: set[str]) -> Factors:
    if not names:
        return factors
    return merge([part for f in factors for part in (f.dense() if names & set(f.names) else [f])])


def _outer_full(f: Outer, h: Outer, inputs: InputsMet = inputs_met) -> Tensor:
    (n, c, r, _), (m, k, s, _) = f.g.shape, h.g.shape
    if r == 1 and s == 1:
        met = inputs(f, h)[:, None, :, None]
        outputs = (f.g.reshape(n * c, -1) @ h.g.reshape(m * k, -1).T).view(n, c, m, k)
        return outputs.mul_(met) if f.bias is None else outputs.addcmul_(outputs, met)  # times met, or 1 + met
    met = torch.einsum("nrd,msd->nrms", f.a, h.a)
    if f.bias is not None:
        met += 1
    outputs = torch.einsum("ncrd,mksd->ncrmks", f.g, h.g)
    return torch.einsum("nrms,ncrmks->ncmk", met, outputs)


def _dense_full(f: Tensor, h: Tensor) -> Tensor:
    (n, c, p), (m, k, _) = f.shape, h.shape
    return (f.reshape(n * c, p) @ h.reshape(m * k, p).T).view(n, c, m, k)


def _outer_trace(f: Outer, h: Outer) -> Tensor:
    (n, r, _), (m, s, _) = f.a.shape, h.a.shape
    if r == 1 and s == 1:
        inputs = inputs_met(f, h)
        if f.bias is not None:
            inputs += 1
        return inputs.mul_(f.g.reshape(n, -1) @ h.g.reshape(m, -1).T)
    inputs = torch.einsum("nrd,msd->nrms", f.a, h.a)
    if f.bias is not None:
        inputs += 1
    return torch.einsum("nrms,nrms->nm", inputs, torch.einsum("ncrd,mcsd->nrms", f.g, h.g))


def _dense_trace(f: Tensor, h: Tensor) -> Tensor:
    return f.reshape(f.shape[0], -1) @ h.reshape(h.shape[0], -1).T


def dot(factors: Factors, direction: Mapping[str, Tensor]) -> Float[Tensor, "n c"]:
    """Inner product of every example's gradient with one dense direction; parameters it lacks count as 0.

    ⟨U, Σ_r g_r a_rᵀ⟩ = Σ_r g_rᵀ U a_r: one matrix product a layer.
    """
    total: Tensor | None = None
    for f in factors:
        if isinstance(f, Dense):
            term = f.values @ direction[f.weight].flatten() if f.weight in direction else None
        else:
            term = _outer_dot(f, direction)
        if term is not None:
            total = term if total is None else total + term
    if total is None:
        first = factors[0]
        return (first.g[..., 0, 0] if isinstance(first, Outer) else first.values[..., 0]) * 0
    return total


def _outer_dot(f: Outer, direction: Mapping[str, Tensor]) -> Tensor | None:
    pushed: Tensor | None = None
    if f.weight in direction:
        matrix = direction[f.weight]
        pushed = f.a @ (matrix if f.transposed else matrix.reshape(f.g.shape[-1], -1).T)
    if f.bias is not None and f.bias in direction:
        pushed = direction[f.bias].expand(*f.a.shape[:2], -1) if pushed is None else pushed + direction[f.bias]
    return None if pushed is None else (f.g * pushed[:, None]).sum((-1, -2))


def against_dense(
    factors: Factors, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Float[Tensor, "n c m k"]:
    """Inner products with m × k dense vectors, given by parameter as [m, k, p]; parameters they lack count as 0.

    ⟨U, g aᵀ⟩ = gᵀ U a: the vectors meet the factors, which are not written out. The uses' products are added up in
    ``dtype``, if not in their own.
    """
    m, k, _ = next(iter(tensors.values())).shape
    total: Tensor | None = None
    for f in factors:
        for term in _against_dense(f, tensors, m * k):
            total = term.to(dtype or term.dtype) if total is None else total.add_(term)
    if total is None:
        first = _nothing(factors[0])
        total = first.g.new_zeros(*first.g.shape[:2], m * k)
    return total.view(*total.shape[:2], m, k)


def _against_dense(f: Factor, tensors: Mapping[str, Tensor], vectors: int) -> Iterator[Tensor]:
    """[n, c, vectors] for each parameter of a use."""
    if isinstance(f, Dense):
        if f.weight in tensors:
            yield f.values @ tensors[f.weight].reshape(vectors, -1).T
        return
    d_in, d_out = f.a.shape[-1], f.g.shape[-1]
    if f.weight in tensors:
        matrices = tensors[f.weight].reshape(vectors, *((d_in, d_out) if f.transposed else (d_out, d_in)))
        rows = (matrices.transpose(1, 2) if f.transposed else matrices).reshape(vectors * d_out, d_in)
        pushed = (f.a @ rows.T).unflatten(-1, (vectors, d_out))
        yield torch.einsum("nrxo,ncro->ncx", pushed, f.g)
    if f.bias is not None and f.bias in tensors:
        yield f.g.sum(2) @ tensors[f.bias].reshape(vectors, -1).T


def squared_norm(factors: Factors) -> Float[Tensor, "n c"]:
    """‖∇f_c(x)‖² of every example and output."""
    return _own(factors, lambda g, h: (g * h).sum(-1))


def diagonal(factors: Factors) -> Float[Tensor, "n c c"]:
    """⟨∇f_c(x), ∇f_k(x)⟩ of every example with itself: the kernel's diagonal, without the matrix."""
    return _own(factors, lambda g, h: g @ h.transpose(1, 2))


def _own(factors: Factors, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every example's products with itself, added up over the uses of each parameter.

    With M_rs = a_r·b_s, Σ_rs M_rs (g_r·h_s) is the product of g with what M makes of h: nothing is written out.
    """
    total: Tensor | None = None
    for f, h in _pairs(factors, factors):
        if isinstance(f, Outer) and isinstance(h, Outer):
            met = f.a @ h.a.transpose(1, 2)
            if f.bias is not None:
                met += 1
            term = product(f.g.flatten(2), (met[:, None] @ h.g).flatten(2))
        else:
            assert isinstance(f, Dense)
            assert isinstance(h, Dense)
            term = product(f.values, h.values)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total
