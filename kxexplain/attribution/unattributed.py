"""Saying how much of a bill is no example's, and why; and where a bill does not add up."""

from __future__ import annotations

import torch
from torch import Tensor

from kxexplain.attribution.result import Explanation
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.optimizers import RECURSIONS
from kxexplain.trajectory.replay import TOLERANCE

ROUNDINGS = 100
"""So many roundings of the contributions' sizes are no news: measured over the tests' optimisers, up to 5."""


def unattributed_part(explanation: Explanation, trajectory: Trajectory) -> str | None:
    """A sentence about the unattributed part; ``None`` where it is rounding.

    Sizes are 2-norms over the queries (and outputs). Rounding is what replay takes for rounding, relative to the
    change that training made, and more where large contributions cancel.
    """
    trained = getattr(torch, trajectory.manifest.model.parameters[0].dtype)
    share = _beyond_rounding(explanation, explanation.unattributed, trained)
    if share is None:
        return None
    return (
        f"the bill's line 'unattributed' is {share} (2-norms over the {len(explanation)} queries): "
        f"{_cause(trajectory, explanation.facts['drift'])}; it belongs to no example, and explanation.unattributed has "
        "it query by query"
    )


def missing_part(explanation: Explanation) -> str | None:
    """A sentence about a remainder that is more than rounding; ``None`` where the bill adds up, as it should."""
    share = _beyond_rounding(explanation, explanation.remainder, explanation.prediction.dtype)
    if share is None:
        return None
    return (
        f"the bill does not add up: its line 'remainder' is {share} (2-norms over the {len(explanation)} queries), "
        "where rounding was expected; the contributions may be wrong by as much. This is a mistake in kxexplain: "
        "please report the model and the loop"
    )


def _beyond_rounding(explanation: Explanation, line: Tensor, kind: torch.dtype) -> str | None:
    """How large a line is, in words; ``None`` for what rounding in this type leaves."""
    amount = line.double().norm().item()
    change = (explanation.prediction - explanation.baseline).double().norm().item()
    turned_over = explanation.contributions.double().abs().sum(1).norm().item()
    rounding = TOLERANCE.get(kind, 2e-2) * change + ROUNDINGS * torch.finfo(kind).eps * turned_over
    if not amount > rounding:
        return None
    return f"{100 * amount / change:.3g} % of the change that training made" if change > 0 else f"{amount:.3g}"


def _cause(trajectory: Trajectory, drift: float | None) -> str:
    """The likely cause, with the optimiser's name."""
    optimizer = trajectory.manifest.optimizer
    if not trajectory.manifest.logged:
        return (
            "the trajectory was made of checkpoints, and of what the unknown optimizer did between two of them only "
            "the full-data gradient at the first is known (checkpoints that lie closer leave less)"
        )
    if optimizer.name not in RECURSIONS:
        known = ", ".join(RECURSIONS)
        return f"how {optimizer.title} turns gradients into steps is not itemised (that of {known} is)"
    value = Clipping.noted(trajectory.manifest.settings).value
    if value is not None:
        return f"{optimizer.title} was given gradients whose elements were clamped to {value:g}; a clamp has no shares"
    noise = "moved parameters whose gradient is nothing but rounding, such as a bias before batch norm, or "
    return (
        f"{optimizer.title} {'' if optimizer.name == 'SGD' else noise}began with moments from before the recording, or "
        f"replay on this machine does not repeat the training closely (drift {drift or 0.0:.1e})"
    )
