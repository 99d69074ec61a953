"""Ctrl-C while a recorder writes: put off until what it writes is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Deferral:
    """While :meth:`begin` is in force a Ctrl-C that comes when ``busy`` is set is only noted, for :meth:`deliver`.

    Any other goes to the handler that was there before, whose say it is what Ctrl-C does. Outside the main thread, or
    where Ctrl-C is ignored, nothing changes.

    >>> deferral = Deferral()
    >>> deferral.begin()
    >>> deferral.busy = True
    >>> signal.raise_signal(signal.SIGINT)
    >>> deferral.busy, deferral.noted
    (True, True)
    >>> deferral.noted = deferral.busy = False
    >>> deferral.end()
    """

    def __init__(self) -> None:
        self.busy = False
        self.noted = False
        self._before = signal.getsignal(signal.SIGINT)
        self._handler = self._handle  # one object, to be known again
        self._installed = False

    def begin(self) -> None:
        """Take the place of the present handler."""
        self._before = signal.getsignal(signal.SIGINT)
        if _in_main_thread() and callable(self._before):
            signal.signal(signal.SIGINT, self._handler)
            self._installed = True

    def end(self) -> None:
        """Put the handler of before back, unless another one was installed meanwhile; deliver what was noted."""
        if self._installed and _in_main_thread() and signal.getsignal(signal.SIGINT) is self._handler:
            signal.signal(signal.SIGINT, self._before)
            self._installed = False
        self.busy = False
        self.deliver()

    def deliver(self) -> None:
        """Hand a noted Ctrl-C to the handler of before."""
        if self.noted:
            self.noted = False
            if callable(self._before):
                self._before(signal.SIGINT, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.busy:
            self.noted = True
        elif callable(self._before):
            self._before(number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
