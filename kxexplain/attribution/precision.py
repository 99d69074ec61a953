"""In which type a bill is computed: the model's own, or float64 where rounding would show.

Under adaptive optimisers a parameter whose examples nearly cancel moves as far as any other, so that their amounts can
be thousands of times the prediction's change; and a change can be small beside the outputs that it is taken from. Then
float32 has not the digits to add up in, and the queries' gradients, the examples' and their products are taken in
float64. The steps themselves are replayed as they were trained: what rounding did to them is the line "unattributed".
"""

from __future__ import annotations

import torch
from torch import Tensor

from kxexplain.attribution.result import Explanation
from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import wide

PRECISIONS = ("auto", "model", "double")

LOST = {torch.float32: 1e-5}
"""A remainder that is a larger part of the change than this is computed again; other types give what they have."""


def check(precision: str, prediction: Tensor) -> None:
    """``ArgumentError`` for an unknown precision, or float64 on a device that has none."""
    if precision not in PRECISIONS:
        raise ArgumentError(f"got precision={precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")
    if precision == "double" and wide(prediction) != torch.float64:
        device = prediction.device.type
        raise ArgumentError(f'a device of type {device} has no float64; leave out precision="double"')


def is_lost(explanation: Explanation) -> bool:
    """Whether rounding left more of a bill than its type should, and another type could do better."""
    limit = LOST.get(explanation.prediction.dtype)
    if limit is None or wide(explanation.prediction) != torch.float64:
        return False
    change = (explanation.prediction - explanation.baseline).double().norm()
    return bool(explanation.remainder.double().norm() > limit * change)
