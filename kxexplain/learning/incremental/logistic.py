r"""Kernel logistic regression as a rule, and the damping chosen for it by leaving one out approximately."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.learning.incremental import damping as left_out
from kxexplain.learning.incremental.features import TangentFeatures
from kxexplain.learning.incremental.held import Batch, Held
from kxexplain.learning.incremental.optimum import SOLVERS, Curvature, entering
from kxexplain.learning.incremental.rules import DAMPING, Learnt, Rule


class LogisticRule(Rule):
    """Kernel logistic regression over all examples held, solved after every change from the last solution.

    Newton's Hessian follows the examples by low-rank changes of its factor; it is taken anew only where steps with it
    have become slow.
    """

    def __init__(self, features: TangentFeatures, held: Held, damping: float | None, solver: str) -> None:
        super().__init__(features, held, damping)
        self.solver = SOLVERS[solver]
        self.gram = features.like.new_zeros(0, 0)
        self.a: Tensor | None = None
        self.curvature: Curvature | None = None

    def learn(self, batch: Batch, outputs: Float[Tensor, "m c"]) -> None:
        """Solve with these as well."""
        features, held, curvature = self.features, self.held, self.curvature
        gram = corner = features.gram(batch.factors)
        a, base, goal = torch.zeros_like(batch.goal), batch.base + batch.shift, batch.goal
        if len(held):
            cross = features.gram(held.factors(), batch.factors)
            gram = torch.cat([torch.cat([self.gram, cross], 1), torch.cat([cross.T, corner], 1)])
            a = torch.cat([self.coefficients(), a])
            if curvature is not None:
                present = base + (cross.T @ self.coefficients().flatten()).view_as(base)
                change, curvature = entering(curvature, cross, corner, present, goal)
                a = a + change
            base, goal = torch.cat([self._present(), base]), torch.cat([held.column("goal"), goal])
        self.gram = gram
        self._solve(base, goal, a, curvature)

    def forget(self, i: int) -> None:
        """Solve without it."""
        a, goal, base = (self._others(t, i) for t in (self.coefficients(), self.held.column("goal"), self._present()))
        self._leave_out(i)
        if len(a):
            self._solve(base, goal, a, self.curvature)
        else:
            self.a = a

    def release(self, i: int) -> None:
        """Its term stays; the others' optimum is the same."""
        self._freeze(i)
        self.a = self._others(self.coefficients(), i)
        self._leave_out(i)

    def tune(self) -> float:
        """ρ by leaving one out of the examples held, approximately, and the solve with it."""
        base, goal = self._present(), self.held.column("goal")
        rows = left_out.some(*base.shape)
        gram = self._block(rows.tolist())
        self.damping = left_out.chosen_logistic(gram, base[rows], goal[rows])
        self.rebuild()
        return self.damping

    def coefficients(self) -> Float[Tensor, "n c"]:
        """A of every example held."""
        assert self.a is not None
        return self.a

    def learnt(self) -> Learnt:
        """δ_0, and the coefficients to begin from."""
        return Learnt(self.damping, self.frozen, self.a)

    def restore(self, learnt: Learnt) -> None:
        """Go on from what was kept."""
        self.damping, self.frozen, self.a = learnt.damping, learnt.vector, learnt.a
        self.rebuild()

    def rebuild(self) -> None:
        """Solve anew for the examples held, from the coefficients there are."""
        if not len(self.held):
            return
        self.gram = self.features.gram(self.held.factors())
        goal = self.held.column("goal")
        start = self.a if self.a is not None and self.a.shape == goal.shape else torch.zeros_like(goal)
        self._solve(self._present(), goal, start, None)

    def _solve(self, base: Tensor, goal: Tensor, start: Tensor, curvature: Curvature | None) -> None:
        if self.damping is None:
            self.damping = DAMPING * float(self.gram.diagonal().mean())
        self.a, self.curvature = self.solver(self.gram, base, goal, self.damping, start, curvature)

    def _present(self) -> Tensor:
        return self.held.column("base") + self.held.column("shift")

    def _leave_out(self, i: int) -> None:
        """Its rows of the Gram matrix and of Newton's factor."""
        rows = [k for k in range(len(self.held)) if k != i]
        self.gram = self._block(rows)
        self.curvature = None if self.curvature is None or not rows else self.curvature.without(i)

    def _block(self, rows: list[int]) -> Tensor:
        n, k = len(self.held), len(rows)
        c = len(self.gram) // n
        return self.gram.view(n, c, n, c)[rows][:, :, rows].reshape(k * c, k * c)

    @staticmethod
    def _others(values: Tensor, i: int) -> Tensor:
        return torch.cat([values[:i], values[i + 1 :]])
