"""All contacts in one table: which calls are known to meet parameters with data, and what becomes of them.

The usual layers are in :mod:`~kxexplain.gradients.contacts`, rarer ones in :mod:`~kxexplain.gradients.layers`,
written-out algebra in :mod:`~kxexplain.gradients.algebra`, recurrent nets in :mod:`~kxexplain.gradients.recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kxexplain.gradients import algebra, contacts, layers, recurrent
from kxexplain.gradients.contacts import Made, Sources
from kxexplain.gradients.factors import Factors
from kxexplain.gradients.uses import Axis, Use

CONTACTS: dict[str, list[Callable[..., Made]]] = {}
"""By operation, in the order in which they are tried."""

for table in (contacts.CONTACTS, layers.CONTACTS, algebra.CONTACTS):
    for operation, tried in table.items():
        CONTACTS.setdefault(operation, []).append(tried)

OUTPUTS: dict[str, Callable[..., Made]] = {
    **{name: recurrent.contact(name) for name in recurrent.CELLS},
    "embedding_bag": layers.embedding_bag,
}
"""Operations with several outputs, each a use of its own: :data:`~kxexplain.gradients.capture.FUSED`."""

ASSEMBLY: dict[str, Callable[[Use, Tensor], Factors]] = {
    **contacts.ASSEMBLY, **layers.ASSEMBLY, **algebra.ASSEMBLY, "recurrent": recurrent.assemble,
}  # fmt: skip


def made(name: str, func: Any, sources: Sources, args: Any, kwargs: Any, output: Tensor, axis: Axis, leaf: int) -> Made:
    """The first contact that takes the call."""
    if name in OUTPUTS:
        return OUTPUTS[name](sources, args, kwargs, output, axis, leaf)
    for contact in CONTACTS.get(name, ()):
        found = contact(sources, args, kwargs, output, axis)
        if found is not None:
            return found
    found = algebra.look_up(name, func, sources, args, kwargs, output, axis)
    if found is None and name in algebra.ELEMENTWISE:
        found = algebra.elementwise(func, sources, args, kwargs, output, axis)
    return found
