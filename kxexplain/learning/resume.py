"""Going on with a run: what its scheduler knew."""

from __future__ import annotations

from typing import Any


def restored(template: Any, value: Any) -> Any:
    """A value read from JSON with the key types, tuples and counters of ``template``."""
    if isinstance(template, dict) and isinstance(value, dict):
        keys = {str(key): key for key in template}
        pairs = {keys.get(k, k): restored(template.get(keys.get(k, k)), v) for k, v in value.items()}
        return type(template)(pairs)
    if isinstance(template, (list, tuple)) and isinstance(value, list):
        inner = [*template, *[None] * len(value)]
        return type(template)(restored(t, v) for t, v in zip(inner, value, strict=False))
    return value
