"""What long computations share: an amount of memory to stay within, and a bar that shows how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress

from kxexplain.errors import ArgumentError


@contextmanager
def progress_bar(shown: bool, steps: int, what: str = "explaining") -> Iterator[Callable[[], None]]:
    """A progress bar over so many steps; gives the function that advances it."""
    if not shown:
        yield lambda: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda: bar.advance(task)


def parse_bytes(amount: str | int) -> int:
    """Bytes from a number or a text with a unit.

    >>> parse_bytes("1.5MB")
    1500000
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    if isinstance(amount, str):
        text = amount.strip().upper().removesuffix("B")
        power = "KMGT".find(text[-1:]) + 1 if text[-1:] else 0
        try:
            value = float(text[:-1] if power else text) * 1000**power
        except ValueError:
            value = 0.0
        if 0 < value < float("inf"):
            return int(value)
    raise ArgumentError(f'got memory={amount!r}; expected a positive number of bytes or a text such as "500MB"')
