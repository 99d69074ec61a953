"""Uses of parameters: where one was, which axis of what came out holds the examples, what its gradient needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kxexplain.gradients.sources import Source

Place = tuple[int, ...]
"""Which call of the forward code, and which torch call within it (and which of its outputs, of several): the same for
every batch."""


@dataclass(frozen=True)
class Axis:
    """Where an output keeps its examples: an axis, ``inner`` entries per example, examples outermost or not."""

    axis: int
    inner: int = 1
    outermost: bool = True


@dataclass(frozen=True)
class Layout:
    """The example axis of every torch call's output in a forward pass, by the call's place in it.

    Attributes:
        axes: where outputs that grow with the batch keep their examples.
        fixed: shapes of outputs that do not.
        lengths: how many calls each composite function made, so that one of no interest can be run whole.
        loose: parameters whose uses were seen to be missed; their gradients are taken one by one.
        blind: the forward code does not bear being watched: every parameter is loose.
    """

    axes: Mapping[Place, Axis]
    fixed: Mapping[Place, torch.Size]
    lengths: Mapping[tuple[Place, Any], int] = field(default_factory=dict)
    loose: frozenset[str] = frozenset()
    blind: bool = False

    def axis(self, call: Place, shape: torch.Size, rows: int) -> Axis | None:
        """The measured axis, if the output's shape agrees with it."""
        found = self.axes.get(call)
        if found is None or found.axis >= len(shape) or shape[found.axis] != rows * found.inner:
            return None
        return found

    def is_fixed(self, call: Place, output: Any) -> bool:
        """Whether the call's output was seen not to depend on how many examples there are."""
        return isinstance(output, Tensor) and self.fixed.get(call) == output.shape


@dataclass(frozen=True)
class Use:
    """One contact: what to do with the gradient at ``edge`` is known to the contact's kind."""

    kind: str
    sources: Mapping[str, Source]
    edge: GradientEdge
    axis: Axis
    rows: int
    shape: torch.Size
    held: Mapping[str, Any] = field(default_factory=dict)
