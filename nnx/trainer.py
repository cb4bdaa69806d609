"""The training loop: `Trainer.fit` shuffles, steps, reports, and stops where going on makes no sense. N rows."""

from __future__ import annotations

import contextlib
import math
import operator
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy

from nnx.callbacks import Bar, Lines, running
from nnx.device import address, asarray, check_rows, fits, gather_bytes, to_cpu
from nnx.initializers import generator
from nnx.np import Array, np
from nnx.optimizer import clip_grads
from nnx.plotting import plot_loss

__all__ = ["Trainer", "remove_duplicate"]


class Trainer:
    """Trains a model with an optimizer.

    Parameters
    ----------
    model : object with params, grads, forward(x, t) and backward()
    optimizer : object with update(params, grads)
    rng : seed, numpy.random.Generator or None
        Draws one `permutation(N)` an epoch, on the host: the same seed shuffles alike on both
        devices. None is NumPy's global generator, as in the source.

    Attributes
    ----------
    loss_list : list of float
        The mean loss since the evaluation before, one number per evaluation, over all calls of fit.
    val_list : list of (loss, accuracy)
        What `model.evaluate` gave for the validation data, one pair per epoch.
    current_epoch, max_epoch : int
        Epochs finished over all calls of fit, and how many there will be when this call ends.
    iteration, max_iter : int
        Steps done in this epoch, and all that it has.
    """

    def __init__(self, model: Any, optimizer: Any, *, rng: Any = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.rng = None if rng is None else generator(rng)  # not NumPy's module, which cannot be copied
        self.loss_list: list[float] = []
        self.val_list: list[tuple[float, float | None]] = []
        self.eval_interval: int | None = None
        self.validation: tuple[Any, Any] | None = None
        self.current_epoch = self.iteration = self.max_iter = self.max_epoch = 0
        self._stop = False

    def fit(
        self,
        x: Any,
        t: Any,
        max_epoch: int = 10,
        batch_size: int = 32,
        max_grad: float | None = None,
        eval_interval: int | None = 20,
        *,
        validation: tuple[Any, Any] | None = None,
        drop_last: bool = False,
        verbose: bool | None = None,
        callbacks: Iterable[Any] = (),
    ) -> None:
        """Train on the rows of `x` and `t`, host or device arrays.

        Parameters
        ----------
        x, t : arrays of N rows
            Moved to the device once where they fit, else batch by batch.
        max_epoch : int
            Epochs to train, after those of earlier calls.
        batch_size : int
            Rows of a step, 1 to N. The last batch of an epoch has the rows that are left.
        max_grad : float or None
            Clips the gradients to this common norm.
        eval_interval : int or None
            Steps between two evaluations: the mean loss is reported and the numbers are looked at.
        validation : (x, t) or None
            Evaluated after each epoch into `val_list`.
        drop_last : bool
            True leaves out a last batch with fewer rows.
        verbose : bool or None
            None shows a progress bar on a terminal and lines of text elsewhere; True lines, False nothing.
        callbacks : iterable of objects
            See `nnx.callbacks`; one of yours has any of on_begin, on_step, on_evaluate, on_epoch, on_end.

        Raises
        ------
        TypeError, ValueError
            For data that the model cannot train on, before anything is changed.
        FloatingPointError
            At the evaluation that finds the loss or a parameter infinite or NaN.
        KeyboardInterrupt
            Ctrl-C is raised when the step at work is done, so that no parameter is half updated; a
            second Ctrl-C is raised at once.
        """
        x, t = self._check_data("Trainer.fit", x, t)
        _check_settings(len(x), max_epoch, batch_size, max_grad, eval_interval)
        if validation is not None:
            self._check_data("Trainer.fit: validation", *validation)
            self.model.evaluate(*(data[:1] for data in validation))  # raises now what it would after an epoch
        self.max_iter = len(x) // batch_size if drop_last else math.ceil(len(x) / batch_size)
        self.max_epoch = self.current_epoch + max_epoch
        self.eval_interval, self.validation = eval_interval, validation
        self._stop = False
        if verbose is not False:
            callbacks = [Bar() if verbose is None and sys.stderr.isatty() else Lines(), *callbacks]
        x, t = (asarray(x), asarray(t)) if fits(x, t) else (to_cpu(x), to_cpu(t))
        shared, losses = _Shared(self.model.params), _MeanLoss()
        with _finish_step() as interrupt, running(self, callbacks) as call:
            try:
                while self.current_epoch < self.max_epoch and not self._stop:
                    order = generator(self.rng).permutation(len(x))[: self.max_iter * batch_size]
                    for self.iteration, batch in enumerate(_batches(x, t, order, batch_size), 1):
                        losses.add(self._step(*batch, shared, max_grad), len(batch[0]))
                        if eval_interval is not None and (self.iteration - 1) % eval_interval == 0:
                            self._record(losses)
                            call("on_evaluate")
                        call("on_step")
                        interrupt()
                    self.current_epoch, self.iteration = self.current_epoch + 1, 0
                    if validation is not None:
                        self.val_list.append(self.model.evaluate(*validation))
                    call("on_epoch")
                    interrupt()
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(
                    f"Trainer.fit: interrupted in epoch {self.current_epoch + 1} after {self.iteration} "
                    f"of {self.max_iter} iterations; fit again to go on from these weights"
                ) from error
            if losses.totals and not _all_finite(self.model.params):
                raise FloatingPointError(
                    "Trainer: a parameter is infinite or NaN after the last step; use a smaller lr, or max_grad"
                )

    def stop(self) -> None:
        """End `fit` after the epoch at work; for callbacks."""
        self._stop = True

    def plot(self, ylim: tuple[float, float] | None = None, **options: Any) -> Any:
        """Draw `loss_list` and return the Axes; the options are those of `plotting.plot_loss`.

        As in the source a window opens, where there is a display and neither `ax` nor `path` is given.
        """
        axes = plot_loss(self.loss_list, interval=self.eval_interval or 1, ylim=ylim, **options)
        if not options.keys() & {"ax", "path"}:
            from matplotlib import pyplot  # noqa: PLC0415 - an extra

            if pyplot.get_backend().lower() != "agg":
                pyplot.show()
        return axes

    def _step(self, x: Array, t: Array, shared: _Shared, max_grad: float | None) -> Any:
        loss = self.model.forward(x, t)
        self.model.backward()
        params, grads = shared.merge(self.model.params, self.model.grads)
        if max_grad is not None:
            clip_grads(grads, max_grad)
        self.optimizer.update(params, grads)
        return loss

    def _check_data(self, name: str, x: Any, t: Any) -> tuple[Array, Array]:
        """Return `x` and `t` as the steps take them, where they lie, or raise before anything is changed."""
        x, t = check_rows(name, x, t)
        dtypes = {p.dtype for p in self.model.params}
        dtype = dtypes.pop() if len(dtypes) == 1 else None  # cast once what every step would cast
        x, t = _check_finite(f"{name}: x", x, dtype), _check_finite(f"{name}: t", t, dtype)
        targets = getattr(getattr(self.model, "loss_layer", None), "targets", None)
        if targets is not None and hasattr(self.model, "predict"):
            t = targets(to_cpu(t), (len(x), *self.model.predict(asarray(x[:1])).shape[1:]))
        return x, t

    def _record(self, losses: _MeanLoss) -> None:
        """Append the mean loss to `loss_list`, and raise if it or a parameter is no number."""
        loss = losses.take()
        self.loss_list.append(loss)
        if not (math.isfinite(loss) and _all_finite(self.model.params)):
            first = max(1, self.iteration - (self.eval_interval or 1) + 1)
            raise FloatingPointError(
                f"Trainer: the loss is {loss} or a parameter is infinite or NaN in epoch {self.current_epoch + 1}, "
                f"iterations {first} to {self.iteration}; use a smaller lr, or max_grad"
            )


def remove_duplicate(params: Sequence[Array], grads: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Return new lists in which an array that several layers share stands once, with the sum of its gradients.

    Shared means the same memory, also transposed. (The source compares values, and merges two
    different matrices that happen to be equal.)
    """
    params, grads = _Shared(params).merge(list(params), list(grads))
    return params, grads


class _Shared:
    """Which of `params` are one array in memory, found once, and their summed gradients."""

    def __init__(self, params: Sequence[Array]) -> None:
        groups: dict[Any, list[tuple[int, bool]]] = {}
        for i, p in enumerate(params):
            place, flipped = (address(p), p.shape, p.strides), (address(p), p.shape[::-1], p.strides[::-1])
            transposed = place not in groups and flipped in groups
            groups.setdefault(flipped if transposed else place, []).append((i, transposed))
        self.groups = list(groups.values())
        self.sums = [
            np.empty(params[g[0][0]].shape, params[g[0][0]].dtype) if len(g) > 1 else None for g in self.groups
        ]

    def merge(self, params: list[Array], grads: list[Array]) -> tuple[list[Array], list[Array]]:
        if len(self.groups) == len(params):
            return params, grads
        merged = []
        for group, total in zip(self.groups, self.sums, strict=True):
            first = grads[group[0][0]]
            for i, transposed in group[1:]:
                first = np.add(first, grads[i].T if transposed else grads[i], out=total)
            merged.append(first)
        return [params[group[0][0]] for group in self.groups], merged


class _MeanLoss:
    """The mean of losses, weighted by their rows, kept on the device until it is asked for.

    Losses of equally many rows are added up by themselves, so that a step costs one addition.
    """

    def __init__(self) -> None:
        self.totals: dict[int, Array] = {}
        self.counts: dict[int, int] = {}

    def add(self, loss: Any, rows: int) -> None:
        if rows in self.totals:
            np.add(self.totals[rows], loss, out=self.totals[rows])
            self.counts[rows] += 1
        else:
            self.totals[rows] = np.array(loss, np.float64)
            self.counts[rows] = 1

    def take(self) -> float:
        total = sum(rows * float(total) for rows, total in self.totals.items())
        weight = sum(rows * count for rows, count in self.counts.items())
        self.totals, self.counts = {}, {}
        return total / weight


def _batches(x: Array, t: Array, order: numpy.ndarray, batch_size: int) -> Iterator[tuple[Array, Array]]:
    """Yield the rows of `x` and `t` in `order`, `batch_size` at a time.

    As many whole batches as `gather_bytes` allows are gathered at once and handed out as slices.
    """
    batch_bytes = (x.nbytes + t.nbytes) // len(x) * batch_size
    chunk = max(1, gather_bytes() // max(1, batch_bytes)) * batch_size
    rows = order if isinstance(x, numpy.ndarray) else asarray(order)
    for start in range(0, len(order), chunk):
        part = rows[start : start + chunk]
        xs, ts = asarray(x.take(part, axis=0)), asarray(t.take(part, axis=0))
        for i in range(0, len(xs), batch_size):
            yield xs[i : i + batch_size], ts[i : i + batch_size]


def _check_settings(
    rows: int, max_epoch: int, batch_size: int, max_grad: float | None, eval_interval: int | None
) -> None:
    if operator.index(max_epoch) < 0:
        raise ValueError(f"Trainer.fit: max_epoch must be at least 0, got {max_epoch}")
    if not 1 <= operator.index(batch_size) <= rows:
        raise ValueError(f"Trainer.fit: batch_size must be 1 to {rows}, the number of rows, got {batch_size}")
    if max_grad is not None and not max_grad > 0:
        raise ValueError(f"Trainer.fit: max_grad must be positive, or None, got {max_grad}")
    if eval_interval is not None and operator.index(eval_interval) < 1:
        raise ValueError(f"Trainer.fit: eval_interval must be at least 1, or None, got {eval_interval}")


@numpy.errstate(over="ignore")
def _check_finite(name: str, data: Array, dtype: Any) -> Array:
    """Return floating `data` in `dtype`, having looked for NaN and infinity, also those that the cast makes."""
    if data.dtype.kind != "f":
        return data
    if dtype is not None:
        data = data.astype(dtype, copy=False)
    finite = np.isfinite if isinstance(data, np.ndarray) else numpy.isfinite
    if not finite(data).all():
        row = int(numpy.argwhere(~numpy.isfinite(to_cpu(data)))[0, 0])
        raise ValueError(
            f"{name} holds NaN or infinity in {data.dtype}, first in row {row}; clean or leave out such rows"
        )
    return data


def _all_finite(params: Sequence[Array]) -> bool:
    """Return whether all parameters are numbers, asking the device once."""
    return not params or bool(np.stack([np.isfinite(p).all() for p in params]).all())


@contextlib.contextmanager
def _finish_step() -> Iterator[Callable[[], None]]:
    """Let Ctrl-C wait for the yielded function to be called; a second Ctrl-C does not wait.

    Only the main thread gets signals, and a handler other than a function of Python's is left alone.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield lambda: None
        return
    pending: list[Any] = []

    def postpone(signum: int, frame: Any) -> None:
        if pending:
            previous(signum, frame)
        pending.append(frame)

    def interrupt() -> None:
        if pending:
            previous(signal.SIGINT, pending.pop())

    signal.signal(signal.SIGINT, postpone)
    try:
        yield interrupt
        interrupt()  # one that came after the last step
    finally:
        signal.signal(signal.SIGINT, previous)
