"""A progress bar with loss and learning rate, which stays out of the way of fast steps."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS = 0.1
"""Least time between two updates."""


class Progress:
    """A bar over ``total`` steps, of which ``done`` are behind us; nothing if not ``shown``."""

    def __init__(self, total: int, done: int = 0, *, shown: bool) -> None:
        self._done = done
        self._due = 0.0
        self._total = total
        self._bar: Bar | None = None
        console = Console(stderr=True) if shown else None  # it looks about for milliseconds
        if console is not None and console.is_terminal:
            self._bar = Bar(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  rate {task.fields[rate]:.2g}"),
                TimeRemainingColumn(),
                console=console,
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=self._total, completed=self._done, epoch=1, loss=float("nan"), rate=0.0
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int, loss: float, rate: float) -> None:
        """Count one step; the bar itself moves ten times a second at most."""
        self._done += 1
        if self._bar is None or (time.monotonic() < self._due and self._done < self._total):
            return
        self._due = time.monotonic() + SECONDS
        self._bar.update(self._task, completed=self._done, epoch=epoch + 1, loss=loss, rate=float(rate))
