r"""How new examples become kernel terms: what all rules share, and the rule of one gradient step.

f(x) + Σ_j K(x, x_j) a_j + ⟨φ(x), δ_0⟩, with δ_0 the terms of examples that are no longer held. A rule finds the a_j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.cholesky import factor, solved
from kxexplain.learning.incremental.features import TangentFeatures, added
from kxexplain.learning.incremental.held import Batch, Held
from kxexplain.shapes import Tensors
from kxexplain.trajectory.losses import LossFunction

DAMPING = 0.01
"""Damping where leaving one out does not choose it, as a part of the Gram matrix' mean diagonal."""


@dataclass(frozen=True)
class Learnt:
    """What a rule knows beyond the examples held: enough to go on from.

    Attributes:
        damping: ρ.
        vector: δ_0, or all steps' sum for the gradient rule.
        a: the coefficients, where they do not follow from the examples, [n, C].
        released: examples that are no longer held.
        system: a system that examples no longer held are part of.
    """

    damping: float | None
    vector: Tensors | None
    a: Tensor | None = None
    released: int = 0
    system: Tensors = field(default_factory=dict)


class Rule(ABC):
    """Finds the coefficients of the examples held, and follows as they come and go.

    Attributes are replaced, never written into, so that the model can go back to what they were if something fails.

    Attributes:
        features: the model that stays as it is.
        held: the examples; the model adds to it after :meth:`learn`, and drops from it after the others.
        damping: ρ, as given or chosen.
        frozen: δ_0; ``None`` for nothing.
    """

    def __init__(self, features: TangentFeatures, held: Held, damping: float | None) -> None:
        self.features, self.held, self.damping = features, held, damping
        self.frozen: Tensors | None = None

    @property
    def parts(self) -> list[object]:
        """The objects whose attributes change."""
        return [self]

    @property
    def exact(self) -> bool:
        """Whether the examples held are all that was learnt, so that the kernel form is complete."""
        return self.frozen is None

    @abstractmethod
    def learn(self, batch: Batch, outputs: Float[Tensor, "m c"]) -> None:
        """Take in some examples, whose outputs are now these."""

    @abstractmethod
    def forget(self, i: int) -> None:
        """Undo an example."""

    @abstractmethod
    def release(self, i: int) -> None:
        """Let go of an example, whose term stays."""

    @abstractmethod
    def coefficients(self) -> Float[Tensor, "n c"]:
        """A of every example held."""

    @abstractmethod
    def learnt(self) -> Learnt:
        """What there is to keep."""

    @abstractmethod
    def restore(self, learnt: Learnt) -> None:
        """Go on from what was kept; the same examples are held, and ``frozen`` is set."""

    @abstractmethod
    def rebuild(self) -> None:
        """Begin again from the examples held and δ_0."""

    def tune(self) -> float:
        """Choose ρ by leaving one out of the examples held, and solve with it."""
        raise ArgumentError('the damping of rule="gradient" is its memory\'s: nothing is left out; give damping=')

    def vector(self) -> Tensors:
        """δ, everything that was learnt."""
        start = self.features.nothing() if self.frozen is None else self.frozen
        if not len(self.held):
            return start
        return added(start, self.features.pull(self.held.factors(), self.coefficients()))

    def floor(self, trace: float) -> float:
        """Squared pivots of a system with this trace that are rounding in the model's precision."""
        first = next(self.features.model.parameters())
        return float(torch.finfo(first.dtype).eps) * trace

    def _freeze(self, i: int) -> None:
        """Move an example's term into δ_0; predictions do not change."""
        row, a = self.held.rows[i], self.coefficients()[i : i + 1]
        term = self.features.pull(row.factors, a)
        self.frozen = term if self.frozen is None else added(self.frozen, term)
        moved = self.features.gram(self.held.factors(), row.factors) @ a.flatten()
        self.held.shifted(moved.view(len(self.held), -1))


class GradientRule(Rule):
    r"""a_j = −η ∂ℓ/∂f(x_j) / m at the present outputs: one SGD step, of the mean loss, of the linearised model.

    With a memory M the step is corrected so that the outputs there stay, by a ridge solve:
    δ = δ_g − Φ_Mᵀ (K_MM + ρI)⁻¹ Φ_M δ_g, linear in the steps' sum δ_g, so that each step can still be taken back.
    """

    def __init__(
        self, features: TangentFeatures, held: Held, damping: float | None, loss: LossFunction, rate: float
    ) -> None:
        super().__init__(features, held, damping)
        self.loss, self.rate = loss, rate
        self.total = features.nothing()  # δ_g
        self.released = 0
        self._own: list[Tensor] = []  # a, [1, C] each, of those that are no memory
        self._lower: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether the examples held are all that was learnt."""
        return not self.released

    def learn(self, batch: Batch, outputs: Float[Tensor, "m c"]) -> None:
        """One step."""
        assert batch.targets is not None
        with torch.enable_grad():
            values = outputs.detach().clone().requires_grad_()
            self.loss(values, batch.targets).mean().backward()
        assert values.grad is not None
        a = -self.rate * values.grad.to(self.features.like)
        self.total = added(self.total, self.features.pull(batch.factors, a))
        self._own = [*self._own, *a.split(1)]

    def forget(self, i: int) -> None:
        """Take an example's part of its step back."""
        a = self._own[i - self.held.protected]
        self.total = added(self.total, self.features.pull(self.held.rows[i].factors, a), -1.0)
        self._drop(i - self.held.protected)

    def release(self, i: int) -> None:
        """Its part of the step stays in δ_g."""
        self._drop(i - self.held.protected)
        self.released += 1

    def coefficients(self) -> Float[Tensor, "n c"]:
        """A of every example held; the memory's are what holds its outputs in place."""
        return torch.cat([*self._memory(), *self._own])

    def vector(self) -> Tensors:
        """δ."""
        memory = self._memory()
        if not memory:
            return self.total
        return added(self.total, self.features.pull(self._past().factors(), torch.cat(memory)))

    def learnt(self) -> Learnt:
        """δ_g, and each example's part."""
        return Learnt(self.damping, self.total, torch.cat(self._own) if self._own else None, self.released)

    def restore(self, learnt: Learnt) -> None:
        """Go on from what was kept."""
        assert learnt.vector is not None
        self.damping, self.total, self.released = learnt.damping, learnt.vector, learnt.released
        self._own = [] if learnt.a is None else list(learnt.a.split(1))
        self.frozen = None
        self.rebuild()

    def rebuild(self) -> None:
        """Prepare the memory's system."""
        self._lower = None
        if self.held.protected:
            gram = self.features.gram(self._past().factors())
            if self.damping is None:
                self.damping = DAMPING * float(gram.diagonal().mean())
            floor = self.floor(float(gram.trace()))
            self._lower = factor(gram + self.damping * torch.eye(len(gram)).to(gram), floor, f"{self.damping:g}")

    def _drop(self, place: int) -> None:
        self._own = self._own[:place] + self._own[place + 1 :]

    def _memory(self) -> list[Tensor]:
        if self._lower is None:
            return []
        past = self._past()
        rows = self.features.along(past.factors(), self.total)
        return [-solved(self._lower, rows.flatten()).view_as(rows)]

    def _past(self) -> Held:
        past = Held()
        past.rows = self.held.rows[: self.held.protected]
        return past
