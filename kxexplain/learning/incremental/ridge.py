r"""Ridge regression on the tangent kernel: (K_JJ + ρI) a = r, or in the parameters' space (ΦᵀΦ + ρI) δ = Φᵀ r.

Both have one solution, δ = Φᵀ a. The first system has n·C rows, the second p: the smaller one is kept, and its Cholesky
factor follows the examples as they come and go. Source: Rasmussen & Williams 2006, 2.2; kernel ridge, Saunders 1998.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.gradients import Factors
from kxexplain.gradients.factors import concatenate, take
from kxexplain.learning.incremental import damping as left_out
from kxexplain.learning.incremental.cholesky import bordered, downdated, factor, solved, updated, without
from kxexplain.learning.incremental.features import TangentFeatures, added
from kxexplain.learning.incremental.held import Batch, Held
from kxexplain.learning.incremental.rules import Learnt, Rule
from kxexplain.shapes import Tensors


class ExampleSystem:
    """(K + ρI) a = r: a row for every output of every example held."""

    def __init__(self, rule: RidgeRule) -> None:
        self.rule, like = rule, rule.features.like
        self.lower = like.new_zeros(0, 0)
        self.trace = 0.0

    def learn(self, factors: Factors, residual: Float[Tensor, "m c"]) -> None:
        """Rows are added below."""
        rule, features = self.rule, self.rule.features
        corner = features.gram(factors)
        rho = rule.damping
        assert rho is not None
        trace = self.trace + float(corner.trace())
        corner = corner + rho * torch.eye(len(corner)).to(corner)
        floor = rule.floor(trace)
        if len(self.lower):
            cross = features.gram(rule.held.factors(), factors)
            self.lower = bordered(self.lower, cross, corner, floor, f"{rho:g}")
        else:
            self.lower = factor(corner, floor, f"{rho:g}")
        self.trace = trace

    def forget(self, i: int) -> None:
        """Its rows are left out."""
        features, row = self.rule.features, self.rule.held.rows[i]
        c = row.base.shape[1]
        self.lower = without(self.lower, slice(i * c, (i + 1) * c))
        self.trace -= float(features.gram(row.factors).trace())

    def solve(self, residual: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """A."""
        return solved(self.lower, residual.flatten()).view_as(residual)


class ParameterSystem:
    """(ΦᵀΦ + ρI) δ = Φᵀ r: a row for every parameter, however many examples have come."""

    def __init__(self, features: TangentFeatures, held: Held, rho: float) -> None:
        self.features, self.held, self.rho = features, held, rho
        self.lower = rho**0.5 * torch.eye(features.size).to(features.like)
        self.right = features.like.new_zeros(features.size)

    def learn(self, factors: Factors, residual: Float[Tensor, "m c"]) -> None:
        """A change of the examples' rank; of a high one, a new factor costs less."""
        rows = self.features.written(factors)
        if 4 * len(rows) > len(self.lower):
            self.lower = torch.linalg.cholesky(self.lower @ self.lower.T + rows.T @ rows)
        else:
            self.lower = updated(self.lower, rows.T)
        self.right = self.right + rows.T @ residual.flatten()

    def forget(self, i: int) -> None:
        """The same change, backward."""
        row = self.held.rows[i]
        rows = self.features.written(row.factors)
        self.lower = downdated(self.lower, rows.T, 0.5 * self.rho)
        self.right = self.right - rows.T @ row.residual.flatten()

    def solve(self) -> Float[Tensor, " p"]:
        """δ, less what is frozen."""
        return solved(self.lower, self.right)


class RidgeRule(Rule):
    """The regularised least-squares fit of all examples held, after every change of them."""

    def __init__(self, features: TangentFeatures, held: Held, damping: float | None) -> None:
        super().__init__(features, held, damping)
        self.system: ExampleSystem | ParameterSystem = ExampleSystem(self)
        self.released = 0  # examples in a parameter system that are no longer held

    @property
    def parts(self) -> list[object]:
        """The objects whose attributes change."""
        return [self, self.system]

    @property
    def exact(self) -> bool:
        """Whether the examples held are all that was learnt."""
        return self.frozen is None and not self.released

    def choose(self, factors: Factors, residual: Float[Tensor, "n c"]) -> float:
        """ρ by leaving one out."""
        rows = left_out.some(*residual.shape)
        return left_out.chosen(self.features.gram(take(factors, rows)), residual[rows])

    def tune(self) -> float:
        """ρ by leaving one out of the examples held, and the solve with it."""
        if self.released:
            raise ArgumentError(
                f"{self.released} examples of the system are no longer held, so they cannot be left out one by one; "
                "give a larger remember="
            )
        self.damping = self.choose(self.held.factors(), self.held.column("residual"))
        self._build()
        return self.damping

    def learn(self, batch: Batch, outputs: Float[Tensor, "m c"]) -> None:
        """Solve with these as well."""
        held = self.held
        if self.damping is None:
            factors, residual = batch.factors, batch.residual
            if len(held):  # a memory, which waited for something to learn
                factors = concatenate([held.factors(), factors])
                residual = torch.cat([held.column("residual"), residual])
            self.damping = self.choose(factors, residual)
            self._build()
        rows = (len(held) + len(batch)) * batch.base.shape[1]
        if isinstance(self.system, ExampleSystem) and rows > self.features.size and self.damping:
            self.system = self._by_parameters(self.damping)
        self.system.learn(batch.factors, batch.residual)

    def _by_parameters(self, rho: float) -> ParameterSystem:
        system = ParameterSystem(self.features, self.held, rho)
        if len(self.held):
            system.learn(self.held.factors(), self.held.column("residual"))
        return system

    def forget(self, i: int) -> None:
        """Solve without it."""
        self.system.forget(i)

    def release(self, i: int) -> None:
        """A parameter system keeps it as it is; of an example system it is moved to δ_0."""
        if isinstance(self.system, ParameterSystem):
            self.released += 1
            return
        self._freeze(i)
        self.system.forget(i)

    def coefficients(self) -> Float[Tensor, "n c"]:
        """a; from a parameter system, a = (r − Φδ) / ρ."""
        residual = self.held.column("residual")
        if self.damping is None:
            return torch.zeros_like(residual)
        if isinstance(self.system, ExampleSystem):
            return self.system.solve(residual)
        moved = self.features.along(self.held.factors(), self.features.shaped(self.system.solve()))
        return (residual - moved) / self.system.rho

    def vector(self) -> Tensors:
        """δ."""
        if isinstance(self.system, ExampleSystem):
            return super().vector()
        found = self.features.shaped(self.system.solve())
        return found if self.frozen is None else added(self.frozen, found)

    def learnt(self) -> Learnt:
        """δ_0, and a system that others than the examples held are part of."""
        system = self.system
        kept = {"lower": system.lower, "right": system.right} if isinstance(system, ParameterSystem) else {}
        return Learnt(self.damping, self.frozen, None, self.released, kept if self.released else {})

    def restore(self, learnt: Learnt) -> None:
        """Go on from what was kept."""
        self.damping, self.frozen, self.released = learnt.damping, learnt.vector, learnt.released
        if not self.released:
            self.rebuild()
            return
        assert self.damping is not None
        self.system = ParameterSystem(self.features, self.held, self.damping)
        self.system.lower, self.system.right = learnt.system["lower"], learnt.system["right"]

    def rebuild(self) -> None:
        """Factor the system of the examples held; a memory alone says nothing about ρ, and waits."""
        if self.damping is None and len(self.held) > self.held.protected:
            self.damping = self.choose(self.held.factors(), self.held.column("residual"))
        self._build()

    def _build(self) -> None:
        self.system = ExampleSystem(self)
        if self.damping is None or not len(self.held):
            return
        if self.damping and self.held.column("base").numel() > self.features.size:
            self.system = self._by_parameters(self.damping)
        else:
            self.system.learn(self.held.factors(), self.held.column("residual"))
