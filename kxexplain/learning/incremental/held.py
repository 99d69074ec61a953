"""The examples that a model holds on to: those that can be forgotten, corrected, and pointed at in a bill."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.gradients import Factors
from kxexplain.gradients.factors import Factor, Outer, concatenate, take
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import copied
from kxexplain.trajectory.batches import take as rows_of

Identity: TypeAlias = int | str


@dataclass(frozen=True)
class Batch:
    """Some examples, and all that a rule needs to know of them.

    Attributes:
        ids: their names.
        inputs: as the model takes them.
        targets: class numbers [m], or numbers [m, C]; ``None`` for examples whose outputs are to stay.
        factors: their output gradients.
        base: the model's own outputs.
        goal: what the rule aims at: outputs, or probabilities.
        shift: what terms that are no longer held add to their outputs.
    """

    ids: list[Identity]
    inputs: Inputs
    targets: Tensor | None
    factors: Factors
    base: Float[Tensor, "m c"]
    goal: Float[Tensor, "m c"]
    shift: Float[Tensor, "m c"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def residual(self) -> Float[Tensor, "m c"]:
        """What outputs lack: r = goal − f − shift."""
        return self.goal - self.base - self.shift

    def row(self, i: int) -> Batch:
        """One of them, in memory of its own."""
        one = slice(i, i + 1)
        targets = None if self.targets is None else self.targets[one].clone()
        return Batch(
            [self.ids[i]], copied(rows_of(self.inputs, one)), targets,
            [_own(f) for f in take(self.factors, one)], self.base[one], self.goal[one], self.shift[one],
        )  # fmt: skip


class Held:
    """Examples one by one, in the order they came; the first ``protected`` are the memory of past ones.

    The list is replaced at every change, never written to: what it was before can be gone back to.
    """

    def __init__(self) -> None:
        self.rows: list[Batch] = []
        self.protected = 0
        self._factors: Factors | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[Identity]:
        """The examples' names, the memory's included."""
        return [row.ids[0] for row in self.rows]

    @property
    def elements(self) -> int:
        """Numbers that the examples' gradients take."""
        return sum(f.elements for row in self.rows for f in row.factors)

    def place(self, name: Identity, room: int) -> int:
        """Where an example stands that can be forgotten; there is room for so many.

        Raises:
            ArgumentError: it is not held, or one of the memory's.
        """
        own = self.ids[self.protected :]
        if name not in own:
            shown = f"{own[:5]!r}"[:-1] + (", …]" if len(own) > 5 else "]")
            raise ArgumentError(
                f"id {name!r} cannot be forgotten: held are {len(own)} examples, {shown}; of those learnt longer ago "
                f"the terms stay (remember={room}), and a memory is held for good"
            )
        return self.protected + own.index(name)

    def add(self, batch: Batch) -> None:
        """Hold on to some more."""
        self.rows = self.rows + [batch.row(i) for i in range(len(batch))]
        self._factors = None

    def drop(self, i: int) -> None:
        """Let go of one."""
        self.rows = self.rows[:i] + self.rows[i + 1 :]
        self._factors = None

    def shifted(self, by: Float[Tensor, "n c"]) -> None:
        """Note that so much more of the outputs is explained by terms that are no longer held."""
        self.rows = [replace(row, shift=row.shift + by[i : i + 1]) for i, row in enumerate(self.rows)]

    def column(self, name: str) -> Tensor:
        """One attribute of all of them, [n, C]."""
        return torch.cat([getattr(row, name) for row in self.rows])

    def factors(self) -> Factors:
        """All output gradients; joined once for every change."""
        if self._factors is None:
            self._factors = concatenate([row.factors for row in self.rows])
        return self._factors


def _own(factor: Factor) -> Factor:
    if isinstance(factor, Outer):
        return replace(factor, a=factor.a.clone(), g=factor.g.clone())
    return replace(factor, values=factor.values.clone())
