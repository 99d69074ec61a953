"""Axis letters, the same everywhere, and the array types that signatures are written with.

Letters: n train · q query · c output · p parameter · d feature · t step · s segment. The names
inside :class:`jaxtyping.Float` strings are the words for those letters, for instance
``Float[Tensor, "query train"]``. jaxtyping and beartype check them while the tests run; users pay
nothing, because annotations are never evaluated outside the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch of model inputs: a tensor, or a tuple or dict of tensors sharing their first axis."""

Tensors: TypeAlias = dict[str, Tensor]
"""Named tensors, such as a model's parameters."""


@runtime_checkable
class Examples(Protocol):
    """A map-style dataset of (input, target) whose order is fixed (``torch.utils.data.Dataset``)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...
