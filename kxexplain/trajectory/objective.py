r"""What is minimised besides the loss, and in which direction a step goes; training and replay do it alike.

With J = L + λ_p ‖∇_θ L‖² + λ_x · mean_i Σ_c ‖∇_x f_c(x_i)‖², L the batch's loss with its input penalty in it for the
gradient penalty:

* flooding at level b minimises |J − b| + b: below b the step ascends (Ishida et al. 2020, arXiv 2002.08709);
* alternating goes down with the rate ε₁ and up with ε₂ = ascent · ε₁ from the start, step by step;
* λ_p: the gradient's size, as flat minima have it small (Barrett & Dherin 2021, arXiv 2009.11162);
* λ_x: how fast the outputs change with the inputs (Drucker & LeCun 1992).

The direction is a sign, and the size of a step a factor, of the whole gradient; the step log keeps both. An input
penalty is a sum over the examples and is itemised with their losses. ∇‖∇L‖² = 2 H ∇L pairs the examples with one
another: it is a line of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kxexplain.errors import ArgumentError, TrajectoryError
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import leaves, outputs_2d

OBJECTIVE = "objective"
"""Its name in a manifest's settings."""


@dataclass(frozen=True)
class Objective:
    """What a run minimises beside its loss; for ``kx.train(objective=...)`` and ``kx.record(objective=...)``.

    Attributes:
        flooding: b; where the batch's objective is below it, the step ascends.
        ascent: ε₂/ε₁, below 1: every second step ascends, its gradient multiplied by this.
        parameter_penalty: λ_p, of ‖∇_θ L‖². Its share of every prediction is the bill's line "penalty".
        input_penalty: λ_x, of the mean over the batch of Σ_c ‖∇_x f_c‖². Itemised over the examples, at one backward
            pass per example when a bill is made; in training it takes one per output.

    Raises:
        ArgumentError: a level that is no finite number, a ratio outside (0, 1), a penalty that is negative or not
            finite, or flooding and alternating at once.

    >>> Objective(flooding=0.05).direction(7, 0.04), Objective(ascent=0.5).direction(7, 0.04)
    ((-1, 1.0), (-1, 0.5))
    """

    flooding: float | None = None
    ascent: float | None = None
    parameter_penalty: float = 0.0
    input_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.flooding is not None and not _is_number(self.flooding):
            raise ArgumentError(f"flooding must be a finite level of the loss, got {self.flooding!r}")
        if self.ascent is not None and not (_is_number(self.ascent) and 0 < self.ascent < 1):
            raise ArgumentError(f"ascent must be a ratio between 0 and 1 (ε₂ < ε₁), got {self.ascent!r}")
        for name in ("parameter_penalty", "input_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ArgumentError(f"{name} must be a finite number >= 0, got {value!r}")
        if self.flooding is not None and self.ascent is not None:
            raise ArgumentError("flooding and ascent both choose the step's direction; give one of them")

    @classmethod
    def noted(cls, settings: Mapping[str, Any]) -> Objective:
        """As a manifest's settings say; ``TrajectoryError`` if they say something impossible."""
        noted = settings.get(OBJECTIVE, {})
        try:
            return cls(**noted)
        except (TypeError, ArgumentError) as error:
            raise TrajectoryError(f"manifest.json: settings: {OBJECTIVE} is {noted!r}: {error}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest's settings note; nothing where only the loss is minimised."""
        noted = {name: value for name, value in asdict(self).items() if value is not None and value != 0}
        if self.flooding is not None:
            noted["flooding"] = self.flooding
        return {OBJECTIVE: noted} if noted else {}

    @property
    def directed(self) -> bool:
        """Whether steps may ascend."""
        return self.flooding is not None or self.ascent is not None

    def direction(self, step: int, value: float) -> tuple[int, float]:
        """The sign and the factor of step number ``step`` (from 0), where the objective is ``value``."""
        if self.ascent is not None and step % 2:
            return -1, self.ascent
        return (-1 if self.flooding is not None and value < self.flooding else 1), 1.0

    def tracked(self, inputs: Inputs) -> Inputs:
        """The inputs as they are, or such that outputs can be differentiated with respect to them."""
        if not self.input_penalty:
            return inputs
        if not any(leaf.is_floating_point() for _, leaf in leaves(inputs)):
            raise ArgumentError("input_penalty needs inputs of a floating-point type; leave it out for these")
        return _tracked(inputs)


def input_penalty(outputs: Tensor, inputs: Inputs) -> Tensor:
    """Σ_c ‖∇_x f_c(x_i)‖² of every example, [n]; differentiable once more.

    ``inputs`` are those that ``outputs`` (n rows) were computed from, and require gradients. Under batch norm the
    gradient is that of all examples' outputs together.

    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> input_penalty((x**2).sum(1), x)
    tensor([20.], grad_fn=<AddBackward0>)
    """
    wanted = [leaf for _, leaf in leaves(inputs) if leaf.requires_grad]
    if not wanted:
        raise ArgumentError("the inputs do not require gradients; call inputs.requires_grad_() before the model")
    columns = outputs_2d(outputs)
    total = columns.new_zeros(len(columns))
    for column in range(columns.shape[1]):
        found = torch.autograd.grad(columns[:, column].sum(), wanted, create_graph=True, allow_unused=True)
        for gradient in found:
            if gradient is not None:
                total = total + gradient.flatten(1).square().sum(1)
    return total


def parameter_penalty(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """‖∇_θ L‖² over the parameters, a number; differentiable once more.

    >>> w = torch.tensor([3.0], requires_grad=True)
    >>> parameter_penalty((w**2).sum(), [w])
    tensor(36., grad_fn=<AddBackward0>)
    """
    return square(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))


def square(gradients: Sequence[Tensor | None]) -> Tensor:
    """Σ ‖g‖² of those that are there."""
    return sum((g.square().sum() for g in gradients if g is not None), torch.zeros(()))


def _tracked(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.detach().requires_grad_() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _tracked(value) for key, value in inputs.items()}
    return tuple(_tracked(value) for value in inputs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["Objective", "input_penalty", "parameter_penalty"]
