"""Deferral of SIGINT and SIGTERM to the end of a step, so that no parameter is half updated."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["DeferredSignals", "defer_signals"]


class DeferredSignals:
    """The state of deferred signals.

    Attributes
    ----------
    pending : int
        The number of the pending signal, or 0. The loop checks it at the end of a step, cleans up if
        needed, and calls `deliver`.
    """

    def __init__(self) -> None:
        self.pending = 0
        self.previous: dict[int, Any] = {}  # the previous handlers

    def deliver(self) -> None:
        """Call the previous handler, which raises, or returns so that training continues.

        If that is the system's default, which ends the process, raise SystemExit with the status that shells
        report for this signal, so that the callers can clean up; `defer_signals` then raises the signal again.
        """
        previous = self.previous.get(self.pending)
        if not callable(previous):
            raise SystemExit(128 + self.pending)
        signum, self.pending = self.pending, 0
        previous(signum, None)


@contextlib.contextmanager
def defer_signals(*signals: int) -> Iterator[DeferredSignals]:
    """Defer `signals` until the loop checks the yielded DeferredSignals; a repeated signal is delivered at once.

    Has no effect outside the main thread, which alone receives signals, in forked children, nor on ignored signals
    and handlers not installed from Python. A signal still pending at exit, also after an error, is raised again once
    the previous handlers are restored.
    """
    stop, process = DeferredSignals(), os.getpid()
    if threading.current_thread() is threading.main_thread():
        handlers = {signum: signal.getsignal(signum) for signum in signals}
        stop.previous = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}

    def postpone(signum: int, frame: Any) -> None:
        if os.getpid() == process and not stop.pending:
            stop.pending = signum
            return
        if stop.pending == signum:  # delivered below
            stop.pending = 0
        previous = stop.previous[signum]
        if callable(previous):
            previous(signum, frame)
        else:
            signal.signal(signum, previous)
            signal.raise_signal(signum)

    try:
        for signum in stop.previous:
            signal.signal(signum, postpone)
        yield stop
    finally:
        for signum, previous in stop.previous.items():
            signal.signal(signum, previous)
        if stop.pending in stop.previous:
            signal.raise_signal(stop.pending)
