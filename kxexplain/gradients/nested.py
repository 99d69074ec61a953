"""Values in nested tuples, lists and dicts, as the arguments of a torch call are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leaves(value: Any) -> list[Any]:
    """The values, in order.

    >>> leaves((1, [2, {"a": 3}]))
    [1, 2, 3]
    """
    found: list[Any] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Any]) -> None:
    if isinstance(value, (tuple, list)):
        for part in value:
            _gather(part, found)
    elif isinstance(value, dict):
        for part in value.values():
            _gather(part, found)
    else:
        found.append(value)


def change(value: Any, by: Callable[[Any], Any]) -> Any:
    """The same nesting with every value changed, in the order of :func:`leaves`; any dict becomes a plain one.

    >>> change((1, [2, {"a": 3}]), lambda number: 10 * number)
    (10, [20, {'a': 30}])
    """
    kind = type(value)
    if kind is tuple:  # the arguments of most calls, which are many
        return tuple([change(part, by) if isinstance(part, (tuple, list, dict)) else by(part) for part in value])
    if isinstance(value, (tuple, list)):
        parts = [change(part, by) for part in value]
        return kind(*parts) if hasattr(kind, "_make") else kind(parts)  # a named tuple takes them one by one
    if isinstance(value, dict):
        return {key: change(part, by) for key, part in value.items()}
    return by(value)
