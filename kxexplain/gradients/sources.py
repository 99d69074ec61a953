"""A parameter, however its elements are arranged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A parameter, or a rearrangement of its elements (a slice, a transpose): ``index`` says which.

    ``index`` holds, for each element of the rearrangement, its position in the flattened parameter.
    """

    name: str
    tensor: Tensor
    size: int
    index: Tensor | None = None

    def moved(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A rearranging call on the elements' positions, as floating-point numbers (not every call takes integers)."""
        positions = self.index
        if positions is None:
            positions = torch.arange(self.size, device=self.tensor.device).view(self.tensor.shape)
        with torch.no_grad():
            return func(positions.to(torch.float64), *args[1:], **kwargs)
