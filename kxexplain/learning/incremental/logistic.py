r"""Kernel logistic regression: min_a Σ_j ℓ(y_j, u_j) + (ρ/2) aᵀKa with u = f + K a and cross-entropy ℓ.

At the optimum ρ a = y − p. For several outputs the Hessian of an example's loss is W = diag(p) − ppᵀ = S Sᵀ with
S = diag(√p)(I − √p √pᵀ); for one, W = p(1 − p). Source: Rasmussen & Williams 2006, 3.5 (algorithm 3.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import TrainingError
from kxexplain.learning.incremental.encoding import probabilities
from kxexplain.learning.incremental.features import TangentFeatures
from kxexplain.learning.incremental.held import Batch, Held
from kxexplain.learning.incremental.rules import DAMPING, Learnt, Rule

TOLERANCE = 1e-9
"""Largest |y − p − ρ a| at which the optimum is found."""

STEPS = {"newton": 100, "descent": 100_000}


def losses(outputs: Float[Tensor, "n c"], goal: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Cross-entropy against probabilities.

    >>> losses(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    if outputs.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs, goal, reduction="none")[:, 0]
    return -(goal * outputs.log_softmax(1)).sum(1)


def hessian_root(p: Float[Tensor, "n c"]) -> Float[Tensor, "n c c"]:
    """S with S Sᵀ = W, per example.

    >>> root = hessian_root(torch.tensor([[0.5, 0.5]]))
    >>> root @ root.transpose(1, 2)
    tensor([[[ 0.2500, -0.2500],
             [-0.2500,  0.2500]]])
    """
    if p.shape[1] == 1:
        return (p * (1 - p)).clamp(min=0).sqrt()[:, :, None]
    q = p.sqrt()
    return q[:, :, None] * (torch.eye(p.shape[1]).to(p) - q[:, :, None] * q[:, None, :])


def newton(gram: Tensor, base: Tensor, goal: Tensor, damping: float, start: Tensor) -> Float[Tensor, "n c"]:
    r"""A by Newton's method, steps halved until the objective falls.

    A step solves (ρI + W K) a' = b with b = y − p + W K a: a' = (b − S (ρI + SᵀKS)⁻¹ SᵀK b) / ρ, a symmetric system.
    """
    a, (n, c) = start, base.shape
    for _ in range(STEPS["newton"]):
        moved = (gram @ a.flatten()).view(n, c)
        p = probabilities(base + moved)
        gap = goal - p - damping * a
        if float(gap.abs().max()) <= TOLERANCE:
            return a
        root = hessian_root(p)
        b = goal - p + (root @ (root.transpose(1, 2) @ moved[..., None]))[..., 0]
        inner = torch.einsum("ncx,ncmd,mdy->nxmy", root, gram.view(n, c, n, c), root).reshape(n * c, n * c)
        inner = inner + damping * torch.eye(n * c).to(inner)
        right = (root.transpose(1, 2) @ (gram @ b.flatten()).view(n, c, 1)).flatten()
        solved = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(inner)).view(n, c, 1)
        step = (b - (root @ solved)[..., 0]) / damping - a
        a = a + _length(gram, base, goal, damping, a, step) * step
    raise _unfinished("newton", damping, float(gap.abs().max()))


def _length(gram: Tensor, base: Tensor, goal: Tensor, damping: float, a: Tensor, step: Tensor) -> float:
    """1, or the first of ½, ¼ … at which the objective is no larger; rounding is let pass."""
    now, length = _objective(gram, base, goal, damping, a), 1.0
    while length > 1e-6 and _objective(gram, base, goal, damping, a + length * step) > now * (1 + 1e-12) + 1e-12:
        length /= 2
    return length


def _objective(gram: Tensor, base: Tensor, goal: Tensor, damping: float, a: Tensor) -> float:
    moved = (gram @ a.flatten()).view_as(a)
    return float(losses(base + moved, goal).sum() + 0.5 * damping * (a * moved).sum())


def descent(gram: Tensor, base: Tensor, goal: Tensor, damping: float, start: Tensor) -> Float[Tensor, "n c"]:
    r"""A by gradient descent in the coefficients, a ← a + η (y − p − ρ a), with Nesterov's look-ahead.

    That is the gradient in the kernel's own norm: the objective is ρ-convex and (ρ + λ_max(K)/2)-smooth there, which
    gives η and the momentum (√κ − 1) / (√κ + 1). One product with K a step; no system is solved.
    """
    smooth = damping + 0.5 * float(torch.linalg.matrix_norm(gram, 1))  # an upper bound of λ_max
    kappa = (smooth / damping) ** 0.5
    momentum, a, ahead = (kappa - 1) / (kappa + 1), start, start
    gap = start
    for _ in range(STEPS["descent"]):
        gap = goal - probabilities(base + (gram @ ahead.flatten()).view_as(ahead)) - damping * ahead
        if float(gap.abs().max()) <= TOLERANCE:
            return ahead
        new = ahead + gap / smooth
        a, ahead = new, new + momentum * (new - a)
    raise _unfinished("descent", damping, float(gap.abs().max()))


def _unfinished(solver: str, damping: float, gap: float) -> TrainingError:
    return TrainingError(
        f"kernel logistic regression by {solver} with damping={damping:g} has not converged: the largest "
        f"|y − p − damping·a| is {gap:.1e} after {STEPS[solver]} steps, expected {TOLERANCE:g}; give a larger damping"
    )


SOLVERS = {"newton": newton, "descent": descent}


class LogisticRule(Rule):
    """Kernel logistic regression over all examples held, solved anew from the last solution after every change."""

    def __init__(self, features: TangentFeatures, held: Held, damping: float | None, solver: str) -> None:
        super().__init__(features, held, damping)
        self.solver = SOLVERS[solver]
        self.gram = features.like.new_zeros(0, 0)
        self.a: Tensor | None = None

    def learn(self, batch: Batch, outputs: Float[Tensor, "m c"]) -> None:
        """Solve with these as well."""
        features, held = self.features, self.held
        gram = features.gram(batch.factors)
        a, base, goal = torch.zeros_like(batch.goal), batch.base + batch.shift, batch.goal
        if len(held):
            cross = features.gram(held.factors(), batch.factors)
            gram = torch.cat([torch.cat([self.gram, cross], 1), torch.cat([cross.T, gram], 1)])
            a, base = torch.cat([self.coefficients(), a]), torch.cat([self._present(), base])
            goal = torch.cat([held.column("goal"), goal])
        rho = DAMPING * float(gram.diagonal().mean()) if self.damping is None else self.damping
        self.a = self.solver(gram, base, goal, rho, a)
        self.gram, self.damping = gram, rho

    def forget(self, i: int) -> None:
        """Solve without it."""
        a, goal, base = (self._others(t, i) for t in (self.coefficients(), self.held.column("goal"), self._present()))
        keep = [k for k in range(len(self.held)) if k != i]
        gram = self._kept(keep, a.shape[1])
        assert self.damping is not None
        self.a = self.solver(gram, base, goal, self.damping, a) if keep else a
        self.gram = gram

    def release(self, i: int) -> None:
        """Its term stays; the others' optimum is the same."""
        self._freeze(i)
        a = self.coefficients()
        self.gram = self._kept([k for k in range(len(self.held)) if k != i], a.shape[1])
        self.a = self._others(a, i)

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
        factors = self.held.factors()
        self.gram = self.features.gram(factors)
        goal = self.held.column("goal")
        if self.damping is None:
            self.damping = DAMPING * float(self.gram.diagonal().mean())
        start = self.a if self.a is not None and self.a.shape == goal.shape else torch.zeros_like(goal)
        self.a = self.solver(self.gram, self._present(), goal, self.damping, start)

    def _present(self) -> Tensor:
        return self.held.column("base") + self.held.column("shift")

    def _kept(self, rows: list[int], c: int) -> Tensor:
        n = len(self.gram) // c
        return self.gram.view(n, c, n, c)[rows][:, :, rows].reshape(len(rows) * c, len(rows) * c)

    @staticmethod
    def _others(values: Tensor, i: int) -> Tensor:
        return torch.cat([values[:i], values[i + 1 :]])
