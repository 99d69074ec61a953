r"""Per-example gradients of one use of a parameter, kept in the form that is cheapest to multiply.

A linear layer's per-example gradient is Σ_r g_r a_rᵀ over positions r: :class:`Outer` keeps g and a.
Anything else, and sequences long enough that the matrix is the smaller thing, is :class:`Dense`: one
gradient per example, flattened.

Axes: n example · c output (1 for a scalar) · r position · d feature · p parameter element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """Gradients Σ_r g_r a_rᵀ of a matrix, and Σ_r g_r of its bias if it has one.

    Attributes:
        weight: name of the matrix, or ``None`` where only the bias is trained.
        bias: name of the bias, or ``None``.
        a: what the matrix was applied to, [n, r, d_in].
        g: gradients at what came out, [n, c, r, d_out].
        transposed: the parameter is stored as (d_in, d_out), as in ``x @ w``.
        raw: ``a`` holds the examples' input of this number as the dataset serves it, which training does not change.
    """

    weight: str
    bias: str | None
    a: Float[Tensor, "n r d_in"]
    g: Float[Tensor, "n c r d_out"]
    transposed: bool = False
    raw: int | None = None

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self.g.shape[0]

    @property
    def columns(self) -> int:
        """Number of quantities differentiated."""
        return self.g.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters concerned."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def elements(self) -> int:
        """Numbers stored."""
        return self.a.numel() + self.g.numel()

    def repeated(self, columns: int) -> Outer:
        """As many quantities as there were one, with the same gradients, in the same memory."""
        return self.of(self.a, self.g.expand(-1, columns, -1, -1))

    def take(self, rows: Tensor | slice) -> Outer:
        """Some of the examples."""
        return self.of(self.a[rows], self.g[rows])

    def of(self, a: Tensor, g: Tensor) -> Outer:
        """Gradients of the same parameters from other values."""
        return Outer(self.weight, self.bias, a, g, self.transposed, self.raw)

    def marked(self, raw: int | None) -> Outer:
        """The same gradients, ``a`` marked as the input of this number; as they are for ``None``."""
        return self if raw is None else Outer(self.weight, self.bias, self.a, self.g, self.transposed, raw)

    def cast(self, dtype: torch.dtype) -> Outer:
        """The same gradients in another type; ``a`` is then no input as the dataset serves it."""
        return Outer(self.weight, self.bias, self.a.to(dtype), self.g.to(dtype), self.transposed)

    def emptied(self, rows: int) -> Outer:
        """Room for so many examples' gradients of this kind."""
        return self.of(*(t.new_empty(rows, *t.shape[1:]) for t in (self.a, self.g)))

    def scaled(self, scale: Mapping[str, float]) -> list[Factor]:
        """Each parameter's gradients times its own number."""
        g = self.g * scale[self.weight]
        if self.bias is None or scale[self.weight] == scale[self.bias]:
            return [self.of(self.a, g)]
        matrix = Outer(self.weight, None, self.a, g, self.transposed, self.raw)
        return [matrix, Dense(self.bias, self.g.sum(2) * scale[self.bias])]

    def dense(self) -> list[Dense]:
        """The same gradients, written out."""
        g, a = self.g, self.a[:, None]
        product = a.transpose(-1, -2) @ g if self.transposed else g.transpose(-1, -2) @ a
        written = [Dense(self.weight, product.flatten(2))]
        return written if self.bias is None else [*written, Dense(self.bias, g.sum(2))]

    def total(self) -> dict[str, Tensor]:
        """Each parameter's gradients summed over examples and quantities, flattened; one matrix product."""
        g, a = self.g.sum(1).flatten(0, 1), self.a.flatten(0, 1)
        found = {self.weight: (a.T @ g if self.transposed else g.T @ a).flatten()}
        return found if self.bias is None else {**found, self.bias: g.sum(0)}


class Served(Outer):
    """Gradients of examples whose input stays in the batches that the dataset served: ``a`` is these, joined.

    They are joined when ``a`` is first asked for. Who knows the inputs' products already never does.
    """

    def __init__(self, like: Outer, g: Tensor, find: Callable[[], Tensor]) -> None:
        values = {"weight": like.weight, "bias": like.bias, "g": g, "transposed": like.transposed, "raw": like.raw}
        vars(self).update(values, find=find)

    def __getattr__(self, name: str) -> Tensor:
        if name != "a":
            raise AttributeError(name)
        return cast(Tensor, vars(self).setdefault("a", vars(self)["find"]()))

    def take(self, rows: Tensor | slice) -> Served:
        """Some of the examples."""
        return Served(self, self.g[rows], lambda: self.a[rows])


@dataclass(frozen=True)
class Dense:
    """Gradients written out: [n, c, p] for one parameter, flattened."""

    weight: str
    values: Float[Tensor, "n c p"]

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        """Number of quantities differentiated."""
        return self.values.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter concerned."""
        return (self.weight,)

    @property
    def elements(self) -> int:
        """Numbers stored."""
        return self.values.numel()

    def repeated(self, columns: int) -> Dense:
        """As many quantities as there were one, with the same gradients, in the same memory."""
        return replace(self, values=self.values.expand(-1, columns, -1))

    def take(self, rows: Tensor | slice) -> Dense:
        """Some of the examples."""
        return replace(self, values=self.values[rows])

    def cast(self, dtype: torch.dtype) -> Dense:
        """The same gradients in another type."""
        return replace(self, values=self.values.to(dtype))

    def emptied(self, rows: int) -> Dense:
        """Room for so many examples' gradients of this kind."""
        return replace(self, values=self.values.new_empty(rows, *self.values.shape[1:]))

    def zeros(self, rows: int) -> Dense:
        """Gradients of value zero, for so many examples."""
        return replace(self, values=self.values.new_zeros(rows, *self.values.shape[1:]))

    def scaled(self, scale: Mapping[str, float]) -> list[Factor]:
        """The gradients times the parameter's number."""
        return [replace(self, values=self.values * scale[self.weight])]

    def dense(self) -> list[Dense]:
        """Itself."""
        return [self]

    def total(self) -> dict[str, Tensor]:
        """The gradients summed over examples and quantities, which may nearly cancel."""
        return {self.weight: self.values.sum((0, 1), dtype=wide(self.values))}


Factor: TypeAlias = Outer | Dense
Factors: TypeAlias = list[Factor]
"""Per-example gradients of a whole model: one entry per use of a parameter; uses of one parameter add."""


def compact(factor: Outer) -> Factors:
    """Write the matrix out where that takes fewer operations (:func:`worth_writing`)."""
    if worth_writing(factor.a.shape[1], factor.a.shape[2], factor.g.shape[3]):
        return list(factor.dense())
    return [factor]


def worth_writing(positions: int, d_in: int, d_out: int) -> bool:
    """Whether products of matrices take fewer operations than products over pairs of positions.

    A pair of examples costs r²(d_in+d_out) multiplications in factored form and d_in·d_out written out.
    """
    return positions > 1 and positions**2 * (d_in + d_out) > d_in * d_out


def merge(factors: Sequence[Factor]) -> Factors:
    """Join the written-out uses of one parameter into one entry, so that later products see it once."""
    merged: Factors = []
    place: dict[str, int] = {}
    for factor in factors:
        if isinstance(factor, Dense) and factor.weight in place:
            at = place[factor.weight]
            earlier = merged[at]
            assert isinstance(earlier, Dense)
            merged[at] = replace(earlier, values=earlier.values + factor.values)
            continue
        if isinstance(factor, Dense):
            place[factor.weight] = len(merged)
        merged.append(factor)
    return merged


def scale(factors: Factors, by: Mapping[str, float]) -> Factors:
    """Every parameter's gradients times its own number (a learning rate, say)."""
    return [part for f in factors for part in f.scaled(by)]


def concatenate(pieces: Sequence[Factors]) -> Factors:
    """The examples of several passes one after the other.

    Where passes met different uses the gradients are written out, with zeros for what a pass did not meet.
    """
    if len(pieces) == 1:
        return pieces[0]
    if len({signature(piece) for piece in pieces}) > 1:
        pieces = _alike(pieces)
    joined: Factors = []
    for position, head in enumerate(pieces[0]):
        column = [piece[position] for piece in pieces]
        if isinstance(head, Outer):
            outers = [f for f in column if isinstance(f, Outer)]
            a, g = torch.cat([f.a for f in outers]), torch.cat([f.g for f in outers])
            joined.append(head.of(a, g))
        else:
            joined.append(replace(head, values=torch.cat([f.values for f in column if isinstance(f, Dense)])))
    return joined


def _alike(pieces: Sequence[Factors]) -> list[Factors]:
    """The same gradients written out, every piece with an entry for each parameter that one of them has."""
    written = [{d.weight: d for d in merge([d for f in piece for d in f.dense()])} for piece in pieces]
    everything = {name: d for part in written for name, d in part.items() if isinstance(d, Dense)}
    return [
        [part.get(name, d.zeros(piece[0].rows)) for name, d in everything.items()]
        for part, piece in zip(written, pieces, strict=True)
    ]


def signature(factors: Factors) -> tuple[object, ...]:
    """What must agree for two passes to be concatenated."""
    return tuple(
        (f.weight, f.bias, f.a.shape[1:], f.g.shape[1:], f.transposed, f.raw)
        if isinstance(f, Outer)
        else (f.weight, f.values.shape[1:])
        for f in factors
    )


def take(factors: Factors, rows: Tensor | slice) -> Factors:
    """Some of the examples, in every use."""
    return [f.take(rows) for f in factors]


def size(factors: Factors) -> int:
    """Bytes held."""
    return sum(f.elements * _item(f) for f in factors)


def wide(like: Tensor) -> torch.dtype:
    """The dtype for sums of many terms that nearly cancel: float64, where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64


def _item(factor: Factor) -> int:
    return (factor.a if isinstance(factor, Outer) else factor.values).element_size()
