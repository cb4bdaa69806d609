"""Ctrl-C and SIGTERM that wait for the end of a step, so that no parameter is half updated."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["DeferredSignals", "defer_signals"]


class DeferredSignals:
    """What a signal asked for.

    Attributes
    ----------
    pending : int
        The number of the signal that waits, 0 where none does. Whoever reads it at the end of a step,
        and has done what must be done first, calls `deliver`.
    """

    def __init__(self) -> None:
        self.pending = 0
        self.previous: dict[int, Any] = {}  # the handlers of before

    def deliver(self) -> None:
        """Give the signal to the handler of before, which raises, or returns and lets the training go on.

        Where that is the system's own, which ends the process, the callers get SystemExit first, with the
        status that shells give such an end; `defer_signals` then sends the signal once more.
        """
        previous = self.previous.get(self.pending)
        if not callable(previous):
            raise SystemExit(128 + self.pending)
        signum, self.pending = self.pending, 0
        previous(signum, None)


@contextlib.contextmanager
def defer_signals(*signals: int) -> Iterator[DeferredSignals]:
    """Let `signals` wait for the yielded DeferredSignals to be asked; a second one does not wait.

    Only the main thread gets signals, and handlers of other languages and ignored signals are left
    alone. One that is still pending at the end, after an error too, is sent again when the handlers of
    before are back.
    """
    stop = DeferredSignals()
    if threading.current_thread() is threading.main_thread():
        handlers = {signum: signal.getsignal(signum) for signum in signals}
        stop.previous = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}

    def postpone(signum: int, frame: Any) -> None:
        if not stop.pending:
            stop.pending = signum
            return
        if stop.pending == signum:  # which is served now
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
