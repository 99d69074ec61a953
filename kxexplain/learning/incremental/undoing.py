"""All or nothing: what fails half-way leaves an incremental model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel

CHANGING = ("features", "base", "held", "engine", "regression", "growth", "origin", "_vector")
"""The model's own attributes that learning changes."""


@contextmanager
def unchanged_on_error(learner: IncrementalModel) -> Iterator[None]:
    """If what is done inside raises, or is interrupted, everything is again what it was.

    Attributes are replaced by whoever changes them, not written into, so that keeping the old ones is enough.
    """
    own = {name: getattr(learner, name) for name in CHANGING}
    parts = [(part, dict(vars(part))) for part in (learner.held, *learner.engine.parts)]
    try:
        yield
    except BaseException:
        for name, value in own.items():
            setattr(learner, name, value)
        for part, values in parts:
            vars(part).clear()
            vars(part).update(values)
        raise
