r"""Kernel logistic regression: min_a Σ_j ℓ(y_j, u_j) + (ρ/2) aᵀKa with u = f + K a and cross-entropy ℓ.

At the optimum ρ a = y − p. For several outputs the Hessian of an example's loss is W = diag(p) − ppᵀ = S Sᵀ with
S = diag(√p)(I − √p √pᵀ); for one, W = p(1 − p). Source: Rasmussen & Williams 2006, 3.5 (algorithm 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.learning.incremental.cholesky import bordered, singular, solved, without
from kxexplain.learning.incremental.encoding import probabilities

TOLERANCE = 1e-9
"""Largest |y − p − ρ a| at which the optimum is found."""

SLOW = 0.2
"""A step that leaves more than this part of the gap asks for the Hessian at the present outputs."""

STEPS = {"newton": 200, "descent": 100_000}


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


def between(left: Float[Tensor, "n c c"], gram: Float[Tensor, "p k"], right: Float[Tensor, "m c c"]) -> Tensor:
    """SᵀK S of two sets of examples, [n·C, m·C]."""
    n, m, c = len(left), len(right), left.shape[1]
    return torch.einsum("ncx,ncmd,mdy->nxmy", left, gram.view(n, c, m, c), right).reshape(n * c, m * c)


@dataclass(frozen=True)
class Curvature:
    """The Hessian's part of Newton's step, which follows its examples by low-rank changes of a Cholesky factor.

    Attributes:
        root: S of every example, at the outputs that it was taken at.
        lower: the factor of ρI + SᵀKS.
        damping: ρ.
    """

    root: Float[Tensor, "n c c"]
    lower: Float[Tensor, "p p"]
    damping: float

    @classmethod
    def at(cls, p: Float[Tensor, "n c"], gram: Float[Tensor, "p p"], damping: float) -> Curvature:
        """Of these probabilities.

        Raises:
            ArgumentError: the system is singular; the message gives the damping that mends it.
        """
        root = hessian_root(p)
        inner = between(root, gram, root)
        inner.diagonal().add_(damping)
        lower, info = torch.linalg.cholesky_ex(inner)
        if int(info):  # K is positive semi-definite up to rounding, which the damping is smaller than
            raise singular(-float(torch.linalg.eigvalsh(gram)[0]), f"{damping:g}")
        return cls(root, lower, damping)

    def solve(self, gram: Float[Tensor, "p p"], gap: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Δ with (ρI + W K) Δ = gap: (gap − S (ρI + SᵀKS)⁻¹ SᵀK gap) / ρ, a symmetric system."""
        right = self.root.transpose(1, 2) @ (gram @ gap.flatten()).view(*gap.shape, 1)
        inner = solved(self.lower, right.flatten()).view_as(right)
        found: Tensor = (gap - (self.root @ inner)[..., 0]) / self.damping
        return found

    def joined(self, p: Float[Tensor, "m c"], cross: Float[Tensor, "q k"], corner: Float[Tensor, "k k"]) -> Curvature:
        """With more examples below.

        Raises:
            ArgumentError: rounding does not let the factor grow.
        """
        root = hessian_root(p)
        inner = between(root, corner, root)
        inner.diagonal().add_(self.damping)
        floor = torch.finfo(corner.dtype).eps * float(corner.trace())
        lower = bordered(self.lower, between(self.root, cross, root), inner, floor, f"{self.damping:g}")
        return Curvature(torch.cat([self.root, root]), lower, self.damping)

    def without(self, i: int) -> Curvature:
        """With an example left out."""
        c = self.root.shape[1]
        root = torch.cat([self.root[:i], self.root[i + 1 :]])
        return Curvature(root, without(self.lower, slice(i * c, (i + 1) * c)), self.damping)


Solved = tuple[Float[Tensor, "n c"], Curvature | None]
"""a, and the Hessian to go on from where there is one."""


def newton(
    gram: Tensor, base: Tensor, goal: Tensor, damping: float, start: Tensor, curvature: Curvature | None = None
) -> Solved:
    r"""A by Newton's method: (ρI + W K) Δ = y − p − ρ a, steps halved until the objective falls.

    W is kept from step to step while that closes the gap fast, and from one optimum to the next: an example more moves
    the others' W little. (Chord or simplified Newton method: Ortega & Rheinboldt 1970, 7.1.)
    """
    a, moved, last = start, _moved(gram, start), float("inf")
    size = last
    for _ in range(STEPS["newton"]):
        p = probabilities(base + moved)
        gap = goal - p - damping * a
        size = float(gap.abs().max())
        if size <= TOLERANCE:
            return a, curvature
        if curvature is None or size > SLOW * last:
            curvature = Curvature.at(p, gram, damping)
        step = curvature.solve(gram, gap)
        along = _moved(gram, step)
        length = _length(base, goal, damping, (a, moved), (step, along))
        a, moved, last = a + length * step, moved + length * along, size
    raise _unfinished("newton", damping, size)


def entering(
    curvature: Curvature, cross: Tensor, corner: Tensor, base: Float[Tensor, "m c"], goal: Float[Tensor, "m c"]
) -> tuple[Float[Tensor, "k c"], Curvature | None]:
    r"""Nearly what examples that come to others change in all coefficients, and the Hessian with them.

    The others, whose W is held fixed, answer linearly. So terms a of the new ones move their own outputs by M a with
    M = K_mm − K_mn S (ρI + SᵀKS)⁻¹ SᵀK_nm: a small problem of the same kind, with outputs ``base`` to begin from.

    Returns:
        The change, the others' coefficients first; and ``None`` for the Hessian where rounding asks for a new one.
    """
    n, c = curvature.root.shape[:2]
    scaled = (curvature.root.transpose(1, 2) @ cross.view(n, c, -1)).view(cross.shape)
    half = torch.linalg.solve_triangular(curvature.lower, scaled, upper=False)
    answered = corner - half.T @ half
    try:
        a, _ = newton(answered, base, goal, curvature.damping, torch.zeros_like(base))
        joined = curvature.joined(probabilities(base + _moved(answered, a)), cross, corner)
    except (ArgumentError, TrainingError):
        return base.new_zeros(n + len(base), c), None
    answer = torch.linalg.solve_triangular(curvature.lower.T, (half @ a.flatten())[:, None], upper=True)
    return torch.cat([-(curvature.root @ answer.view(n, c, 1))[..., 0], a]), joined


def _moved(gram: Tensor, a: Tensor) -> Tensor:
    return (gram @ a.flatten()).view_as(a)


def _length(
    base: Tensor, goal: Tensor, damping: float, now: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]
) -> float:
    """1, or the first of ½, ¼ … at which the objective is no larger; rounding is let pass."""

    def objective(length: float) -> float:
        a, moved = (value + length * change for value, change in zip(now, step, strict=True))
        return float(losses(base + moved, goal).sum() + 0.5 * damping * (a * moved).sum())

    limit, length = objective(0.0) * (1 + 1e-12) + 1e-12, 1.0
    while length > 1e-6 and objective(length) > limit:
        length /= 2
    return length


def descent(
    gram: Tensor, base: Tensor, goal: Tensor, damping: float, start: Tensor, curvature: Curvature | None = None
) -> Solved:
    r"""A by gradient descent in the coefficients, a ← a + η (y − p − ρ a), with Nesterov's look-ahead.

    That is the gradient in the kernel's own norm: the objective is ρ-convex and (ρ + λ_max(K)/2)-smooth there, which
    gives η and the momentum (√κ − 1) / (√κ + 1). One product with K a step; no system is solved.
    """
    smooth = damping + 0.5 * float(torch.linalg.matrix_norm(gram, 1))  # an upper bound of λ_max
    kappa = (smooth / damping) ** 0.5
    momentum, a, ahead = (kappa - 1) / (kappa + 1), start, start
    gap = start
    for _ in range(STEPS["descent"]):
        gap = goal - probabilities(base + _moved(gram, ahead)) - damping * ahead
        if float(gap.abs().max()) <= TOLERANCE:
            return ahead, curvature
        new = ahead + gap / smooth
        a, ahead = new, new + momentum * (new - a)
    raise _unfinished("descent", damping, float(gap.abs().max()))


def _unfinished(solver: str, damping: float, gap: float) -> TrainingError:
    return TrainingError(
        f"kernel logistic regression by {solver} with damping={damping:g} has not converged: the largest "
        f"|y − p − damping·a| is {gap:.1e} after {STEPS[solver]} steps, expected {TOLERANCE:g}; give a larger damping"
    )


SOLVERS = {"newton": newton, "descent": descent}
