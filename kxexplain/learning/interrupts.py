"""Ctrl-C as a wish that a loop grants between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Inside the block a first Ctrl-C only sets the event; a second one interrupts at once.

    ``KeyboardInterrupt`` is raised at the end of the block if the event was set. Outside the main
    thread, or where Ctrl-C is ignored, nothing changes.

    >>> with interrupts() as pressed:
    ...     pressed.is_set()
    False
    """
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(before):
        yield pressed
        return

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            before(number, frame)
        pressed.set()

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        raise KeyboardInterrupt
