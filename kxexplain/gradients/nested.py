"""Values in nested tuples, lists and dicts, as the arguments of a torch call are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def leaves(value: Any) -> Iterator[Any]:
    """The values, in order.

    >>> list(leaves((1, [2, {"a": 3}])))
    [1, 2, 3]
    """
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def change(value: Any, by: Callable[[Any], Any]) -> Any:
    """The same nesting with every value changed, in the order of :func:`leaves`; any dict becomes a plain one.

    >>> change((1, [2, {"a": 3}]), lambda number: 10 * number)
    (10, [20, {'a': 30}])
    """
    if isinstance(value, (tuple, list)):
        parts = [change(part, by) for part in value]
        kind = type(value)
        return kind(*parts) if hasattr(kind, "_make") else kind(parts)  # a named tuple takes them one by one
    if isinstance(value, dict):
        return {key: change(part, by) for key, part in value.items()}
    return by(value)
