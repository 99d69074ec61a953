"""What example visits put into the parameters, gathered over many steps and handed over together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kxexplain.gradients.factors import Factors, Outer
from kxexplain.gradients.pile import Pile, bytes_per_row


@dataclass(frozen=True)
class Updates:
    """What a number of example visits put into the parameters during a segment.

    Attributes:
        indices: the examples' dataset indices, [m]; one may occur several times.
        factors: their updates −η_t s_t g_{t,i}, [m, 1].
        alpha: size of the pull on the outputs, [m]: −∂ℓ/∂f for one output, ‖∂ℓ/∂f‖ for several.
        jacobian: η_t-weighted output gradients w ∇f_c, [m, C], if asked for.
    """

    indices: Tensor
    factors: Factors
    alpha: Tensor
    jacobian: Factors | None


def pull_of(pull: Tensor) -> Tensor:
    """Size of the pull on the outputs, [n], from −∂ℓ/∂f, [n, C]: itself for one output, the norm for several."""
    return pull[:, 0] if pull.shape[1] == 1 else pull.norm(dim=1)


class Visits:
    """Several steps' examples: their updates, and how their losses pulled on the outputs."""

    def __init__(self) -> None:
        self.factors: Pile | None = None
        self.jacobian: Pile | None = None
        self.clear()

    def clear(self) -> None:
        """Forget what was gathered, but keep its memory."""
        self.indices: list[Tensor] = []
        self.pulls: list[Tensor] = []
        for pile in (self.factors, self.jacobian):
            if pile is not None:
                pile.clear()

    def fits(self, factors: Factors, rows: int, jacobian: Factors | None) -> bool:
        """Whether there is room for a step's examples."""
        if self.factors is None or not self.factors.fits(factors, rows):
            return False
        return jacobian is None or (self.jacobian is not None and self.jacobian.fits(jacobian, rows))

    def make_room(self, factors: Factors, rows: int, jacobian: Factors | None, budget: int, visits: int) -> None:
        """Room for so many visits, or as many as the budget (in bytes) allows.

        Inputs that stay in their batches count twice: somebody may ask for them.
        """
        gathered = [*factors, *(jacobian or [])]
        each = bytes_per_row([*gathered, *(f for f in gathered if isinstance(f, Outer) and f.raw is not None)], rows)
        capacity = max(rows, min(visits, budget // each))
        if self.factors is None or self.factors.capacity < capacity or not self.fits(factors, rows, jacobian):
            self.factors = Pile(factors, capacity, served=True)
            self.jacobian = None if jacobian is None else Pile(jacobian, capacity, served=True)

    def add(self, factors: Factors, weight: float, jacobian: Factors | None, indices: Tensor, pull: Tensor) -> None:
        """Add one step's examples; ``pull`` is −∂ℓ/∂f, [n, C]."""
        assert self.factors is not None
        self.factors.add(factors, len(indices), weight)
        if jacobian is not None:
            assert self.jacobian is not None
            self.jacobian.add(jacobian, len(indices), 1.0)
        self.indices.append(indices)
        self.pulls.append(pull)

    def joined(self) -> Updates:
        """All steps' updates, one after the other."""
        assert self.factors is not None
        return Updates(
            torch.cat(self.indices),
            self.factors.gathered(),
            pull_of(torch.cat(self.pulls)),
            None if self.jacobian is None else self.jacobian.gathered(),
        )
