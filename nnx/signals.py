"""Deferral of Ctrl-C (SIGINT) and SIGTERM to the end of a step, so that no parameter is half updated."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["SIGNALS", "DeferredSignals", "NestedInterrupt", "defer_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_active: list[DeferredSignals] = []  # of the fit that runs in the main thread, shared by those in its callbacks


class NestedInterrupt(KeyboardInterrupt):
    """Ends a fit within a callback of another one, which then delivers the signal."""


class DeferredSignals:
    """The signals of a fit, which `install` defers and the loop delivers at the end of a step.

    Attributes
    ----------
    pending : int
        The number of the pending signal, or 0. The loop checks it at the end of a step, cleans up if
        needed, and calls `deliver`.
    """

    def __init__(self) -> None:
        self.pending = 0
        self.process = os.getpid()
        self.depth = 0  # of fits within callbacks
        self.previous: dict[int, Any] = {}  # the previous handlers

    def install(self) -> None:
        """Replace the handlers, except those of ignored signals and those not installed from Python."""
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.previous = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}
        for signum in self.previous:
            signal.signal(signum, self._defer)

    def restore(self) -> None:
        """Restore the previous handlers; raise a signal again that is still pending."""
        for signum, previous in self.previous.items():
            signal.signal(signum, previous)
        if self.pending in self.previous:
            signal.raise_signal(self.pending)

    def deliver(self) -> None:
        """Call the previous handler, which raises, or returns so that training continues.

        If that is the system's default, which ends the process, raise SystemExit with the status that shells
        report for this signal, so that the callers can clean up; `restore` then raises the signal again. Within a
        callback, raise NestedInterrupt: the signal is still pending for the outer fit.
        """
        if self.depth:
            raise NestedInterrupt("Trainer.fit: interrupted by a signal")
        previous = self.previous.get(self.pending)
        if not callable(previous):
            raise SystemExit(128 + self.pending)
        signum, self.pending = self.pending, 0
        previous(signum, None)

    def _defer(self, signum: int, frame: Any) -> None:
        """Note the first signal; deliver a second one, and any in a forked child, at once."""
        if os.getpid() == self.process and not self.pending:
            self.pending = signum
            return
        if self.pending == signum:  # delivered below
            self.pending = 0
        previous = self.previous[signum]
        if callable(previous):
            previous(signum, frame)
        else:
            signal.signal(signum, previous)
            signal.raise_signal(signum)


@contextlib.contextmanager
def defer_signals() -> Iterator[DeferredSignals]:
    """Defer SIGINT and SIGTERM until the loop delivers them from the yielded object; a second one is not deferred.

    Has no effect outside the main thread, which alone receives signals, and in forked children. A fit in a callback
    of another shares the other's object, so that a signal ends both. A signal still pending at the end, also after
    an error, is raised again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield DeferredSignals()
        return
    if _active:
        _active[0].depth += 1
        try:
            yield _active[0]
        finally:
            _active[0].depth -= 1
        return
    signals = DeferredSignals()
    _active.append(signals)
    try:
        signals.install()
        yield signals
    finally:
        _active.clear()
        signals.restore()
