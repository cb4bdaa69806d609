"""The training loop: `Trainer.fit` shuffles, takes steps, reports, and stops when the loss diverges. N rows."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from nnx import checkpoint
from nnx.batches import (
    WeightedMean,
    array_addresses,
    batches,
    check_data,
    check_not_rebound,
    check_settings,
    checksum,
    parameter_dtype,
    sharded_batches,
)
from nnx.callbacks import CallbackList, PrintLog, ProgressBar
from nnx.checks import check_weights
from nnx.device import asarray, chunk_bytes, fits_on_device, is_writable, to_cpu
from nnx.distributed import Comm
from nnx.kernels import all_finite
from nnx.np import Array, np
from nnx.optimizer import clip_grads
from nnx.plotting import plot_loss
from nnx.protocols import Callback, Model, Optimizer
from nnx.rng import as_generator, check_state, get_state, set_state
from nnx.signals import DeferredSignals, defer_signals
from nnx.tree import TiedParameters

__all__ = ["Trainer", "remove_duplicate"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_COUNTS = ("epoch", "iteration", "begun", "stop", "rows", "batch_size", "max_iter")


@dataclasses.dataclass
class _Fit:
    """The data and settings of one call of `Trainer.fit`."""

    x: Any
    t: Any
    batch_size: int
    chunk_bytes: int  # gathered at a time
    max_grad: float | None
    callbacks: CallbackList
    signals: DeferredSignals
    tied: TiedParameters
    addresses: Any  # of the model's arrays before the first step, None after it


class Trainer:
    """Trains a model with an optimizer.

    Parameters
    ----------
    model : object with params, grads, forward(x, t) and backward()
    optimizer : object with update(params, grads)
    rng : seed, numpy.random.Generator or None
        Draws one `permutation(N)` per epoch, on the host: the same seed shuffles alike on both
        devices. None is NumPy's global generator, as in the book.
    comm : distributed.Comm or None
        The ranks that train together, each on its shard of every batch; see `nnx.distributed`. All ranks call fit
        with the same data and arguments. The weights and the permutations of rank 0 are used on all ranks. Only
        rank 0 shows progress and saves checkpoints; a signal or a call of `stop` on any rank stops all of them.

    Attributes
    ----------
    loss_list : list of float
        The mean loss since the previous evaluation, one number per evaluation, over all calls of fit.
    val_list : list of (loss, accuracy)
        The results of `model.evaluate` on the validation data, one pair per epoch.
    current_epoch, max_epoch : int
        The number of epochs finished over all calls of fit, and the number at which this call ends.
    iteration, max_iter : int
        The number of steps finished in this epoch, and the number of steps per epoch.
    """

    def __init__(self, model: Model, optimizer: Optimizer, *, rng: Any = None, comm: Comm | None = None) -> None:
        _check_interface("model", model, ("params", "forward(x, t)", "backward()"))
        _check_interface("optimizer", optimizer, ("update(params, grads)",))
        self.model: Any = model
        self.optimizer: Any = optimizer
        self.rng = None if rng is None else as_generator(rng)  # not NumPy's module, which cannot be copied
        self.loss_list: list[float] = []
        self.val_list: list[tuple[float, float | None]] = []
        self.eval_interval: int | None = None
        self.validation: tuple[Any, Any] | None = None
        self.current_epoch = self.iteration = self.max_iter = self.max_epoch = 0
        self.comm = comm or Comm()  # one rank
        self._running = False
        self._stop, self._stop_signal = False, 0  # the signal agreed on by all ranks
        self._losses = WeightedMean()
        self._first_epoch: int | None = None  # of the fit that is not finished
        self._plan: Any = (0, 0, 0)  # rows, rows of a batch and steps of an epoch
        self._permutation = numpy.zeros(0, numpy.int64)  # of this epoch, or what remains of it after `resume`
        self._callbacks: CallbackList | None = None  # of the running fit
        self._callback_states: list[Any] | None = None  # from a checkpoint, for the next fit

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
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Train on the rows of `x` and `t`, host or device arrays.

        Parameters
        ----------
        x, t : arrays of N rows
            Moved to the device once if they fit, otherwise batch by batch. Floating data in another dtype than the
            parameters, and data whose rows are not contiguous (Fortran order, most DataFrames, x[:, ::2]), are
            copied once, in C order; column slices x[:, :n] and reversed rows are used without a copy.
            Memory-mapped files are never copied: the checks read a few megabytes at a time, and each batch is read
            and cast when it is needed; from Fortran order 16 MB of rows at a time.
        max_epoch : int
            The number of epochs to train, in addition to those of earlier calls.
        batch_size : int
            The number of rows per step, 1 to N. The last batch of an epoch has the remaining rows.
        max_grad : float or None
            The largest global norm of the gradients; larger ones are clipped.
        eval_interval : int or None
            The number of steps between two evaluations, which report the mean loss and check that it and the
            parameters are finite. The end of an epoch checks this too.
        validation : (x, t) or None
            Evaluated after each epoch; the results are appended to `val_list`.
        drop_last : bool
            Whether to drop a last batch with fewer rows.
        verbose : bool or None
            None shows a progress bar on a terminal and prints lines elsewhere; True prints lines, False nothing.
        callbacks : iterable of callbacks
            See `nnx.callbacks`.

        Raises
        ------
        TypeError, ValueError
            If the model cannot be trained on these data; nothing has been changed.
        FloatingPointError
            If the loss or a parameter is infinite or NaN at an evaluation or at the end of an epoch.
        KeyboardInterrupt
            On Ctrl-C, at the end of the current step, so that no parameter is half updated; a second Ctrl-C is
            raised at once. If a callback has on_interrupt, such as `callbacks.Checkpoint`, or if there are several
            ranks, SIGTERM is deferred as well, and then ends the process as usual.
        RuntimeError
            If a callback calls fit of its own trainer.
        """
        if self._running:
            raise RuntimeError("Trainer.fit: called from one of its own callbacks; use another Trainer there")
        x, t = check_data("Trainer.fit", self.model, (x, t))
        check_settings(len(x), max_epoch, batch_size, max_grad, eval_interval)
        checked = self._check_validation(validation)
        max_iter = len(x) // batch_size if drop_last else math.ceil(len(x) / batch_size)
        hooks = CallbackList(callbacks)
        hooks.check_validation(validation)
        self._check_update()
        settings = {"max_epoch": max_epoch, "batch_size": batch_size, "max_grad": max_grad}
        self._setup_ranks((x, t), checked, **settings, eval_interval=eval_interval, drop_last=drop_last)
        self._begin(hooks, max_epoch, (len(x), batch_size, max_iter))
        self.eval_interval, self.validation = eval_interval, validation
        if verbose is not False and self.comm.rank == 0:
            hooks = CallbackList(
                [ProgressBar() if verbose is None and _is_terminal() else PrintLog(), *hooks.callbacks]
            )
        x, t = (asarray(x), asarray(t)) if fits_on_device(x, t) else (to_cpu(x), to_cpu(t))
        saves = self.comm.size > 1 or hooks.handles("on_interrupt")
        self._running = True
        try:
            with defer_signals(*(_SIGNALS if saves else _SIGNALS[:1])) as signals, hooks.running(self):
                tied, addresses = TiedParameters(self.model.params), array_addresses(self.model)
                run = _Fit(x, t, batch_size, chunk_bytes(x), max_grad, hooks, signals, tied, addresses)
                self._callback_states = None  # only now: if on_begin raises, fit may be called again
                self._run(run)
        finally:
            self._running = False

    def _run(self, run: _Fit) -> None:
        """Run the epochs of a fit."""
        self._sync_stop_flags(run)  # on_begin may have called `stop`
        try:
            while self.current_epoch < self.max_epoch and (self.iteration or not self._stop):
                self._run_epoch(run)
        except KeyboardInterrupt:
            saved = next((c.path for c in run.callbacks.callbacks if getattr(c, "path", None)), None)
            resume = f"from {saved} with resume" if saved else "from a file with resume"
            raise KeyboardInterrupt(
                f"Trainer.fit: interrupted in epoch {self.current_epoch + 1} after {self.iteration} "
                f"of {self.max_iter} iterations; continue from these weights with fit, or {resume}"
            ) from None
        self._first_epoch, self._stop, self._callbacks, self._losses = None, False, None, WeightedMean()

    def _run_epoch(self, run: _Fit) -> None:
        """Run an epoch, or the rest of one that was resumed."""
        if not self.iteration:
            rows, batch_size, max_iter = self._plan
            self._permutation = as_generator(self.rng).permutation(rows)[: max_iter * batch_size]
            self.comm.broadcast([self._permutation])
        data = (run.x, run.t, self._permutation, run.batch_size, run.chunk_bytes)
        dtype = parameter_dtype(self.model)
        parts = sharded_batches(*data, self.comm, dtype) if self.comm.size > 1 else batches(*data, dtype)
        for iteration, (x, t, rows) in enumerate(parts, self.iteration + 1):
            self._losses.add(self._train_step(run, x, t, rows), rows)
            self.iteration = iteration  # only now that the step is done
            if run.addresses:
                check_not_rebound(self.model, run.addresses)
                run.addresses = None
            if self.eval_interval is not None and (iteration - 1) % self.eval_interval == 0:
                self._log_loss()
                run.callbacks("on_evaluate", self)
            self._after_step(run, "on_step")
        if self._losses.totals:
            self._check_finite(self._losses.value())
        self.current_epoch, self.iteration = self.current_epoch + 1, 0
        if self.validation is not None:
            self.val_list.append(self._evaluate(*self.validation))
        self._after_step(run, "on_epoch")

    def _after_step(self, run: _Fit, event: str) -> None:
        """Call the callbacks after a step or an epoch, and deliver a signal that has arrived."""
        run.callbacks(event, self)
        if event == "on_epoch" and self.comm.size > 1:
            self._check_ranks_in_sync()
            self._sync_stop_flags(run)
        run.callbacks("on_checkpoint", self)
        if pending := self._stop_signal if self.comm.size > 1 else run.signals.pending:
            run.signals.pending = pending
            run.callbacks("on_interrupt", self)
            self.comm.barrier()  # until rank 0 has saved
            run.signals.deliver()

    def _train_step(self, run: _Fit, x: Array, t: Array, rows: int) -> Any:
        """Take a step and return its loss: forward, backward, the sum over ranks, clipping, update."""
        loss: Any = 0.0
        if len(x):  # a rank may have no row of a small batch
            loss = self.model.forward(x, t)
            if loss is None:
                raise TypeError(
                    f"Trainer.fit: {type(self.model).__name__}.forward(x, t) must return the loss, got None"
                )
            self.model.backward()
        params, grads = run.tied.sum_tied_gradients(self.model.params, self.model.grads)
        if self.comm.size > 1:
            share = self._share(len(x), rows)
            grads, (loss, *flags) = self.comm.allreduce(grads, share, loss * share, *self._stop_flags(run.signals))
            self._apply_stop_flags(flags)
        if run.max_grad is not None:
            clip_grads(grads, run.max_grad)
        self.optimizer.update(params, grads)
        return loss

    def resume(self, path: str | Path) -> Path:
        """Load a checkpoint: model, optimizer, random generator, counters, `loss_list` and `val_list`.

        The next `fit`, called with the data and arguments of the interrupted one, continues it and reproduces it
        bit for bit. Callbacks of the same classes continue as well, in their order. Returns the file.

        Parameters
        ----------
        path : str or Path
            A file, or the folder of a `callbacks.Checkpoint`: its latest file. Damaged files are renamed, with a
            warning.

        Raises
        ------
        OSError, ValueError
            As `checkpoint.load`, before anything is changed; FileNotFoundError for a folder without checkpoints.
        """
        file = Path(path).expanduser()
        if file.is_dir():
            file = self.comm.main_process_first(lambda: checkpoint.latest_checkpoint(file))
        checkpoint.load(file, self.model, self.optimizer, self)
        return file

    @property
    def is_last_epoch(self) -> bool:
        """Whether `fit` ends after the callbacks of this epoch."""
        return self._stop or self.current_epoch >= self.max_epoch

    def __getstate__(self) -> dict[str, Any]:  # data and callbacks are not part of it
        return {**vars(self), "_callbacks": None, "_running": False, "validation": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that another trainer needs to continue: numbers, arrays and lists."""
        begun = self.current_epoch if self._first_epoch is None else self._first_epoch
        counts = (self.current_epoch, self.iteration, begun, int(self._stop), *self._plan)
        return {
            **dict(zip(_COUNTS, counts, strict=True)),
            "loss_list": numpy.array(self.loss_list, numpy.float64),
            "val_list": numpy.array(self.val_list, numpy.float64).reshape(-1, 2),  # None, no accuracy, is NaN
            "losses": self._losses.state(),
            "order": self._permutation[len(self._permutation) - _rows_left(self.iteration, *self._plan) :],
            "rng": get_state(as_generator(self.rng)),
            "callbacks": self._callbacks.state() if self._callbacks else [],
        }

    def load_state_dict(self, path: Path, state: dict[str, Any]) -> Callable[[], None]:
        """Validate `state`, read from the file `path`; return a function that applies it."""
        counts = [state[name] for name in _COUNTS]
        order, plan = state["order"], counts[4:]
        try:
            check_state(as_generator(self.rng), state["rng"])
            if not all(type(n) is int and 0 <= n < 1 << 62 for n in counts) or state["iteration"] > state["max_iter"]:
                raise ValueError("invalid counters")
            if (
                len(order) != _rows_left(state["iteration"], *plan)
                or not ((order >= 0) & (order < state["rows"])).all()
            ):
                raise ValueError("invalid permutation of the remaining rows of the epoch")
            if not all(isinstance(c, list) and list(map(type, c)) == [str, dict] for c in state["callbacks"]):
                raise ValueError("invalid callbacks")
            losses = WeightedMean(state["losses"])
            pairs = [(loss, None if math.isnan(hits) else hits) for loss, hits in state["val_list"].tolist()]
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: invalid state of a trainer: {error}") from error

        def restore() -> None:
            self.current_epoch, self.iteration, self._first_epoch, stop, *_, self.max_iter = counts
            self._stop, self._plan, self._losses = bool(stop), tuple(plan), losses
            self.loss_list, self.val_list = state["loss_list"].tolist(), pairs
            set_state(as_generator(self.rng), state["rng"])
            self._permutation, self._callback_states = order, state["callbacks"]

        return restore

    def stop(self) -> None:
        """End `fit` after the current epoch; for callbacks."""
        self._stop = True

    def plot(self, ylim: tuple[float, float] | None = None, **options: Any) -> Any:
        """Draw `loss_list` and return the Axes; the options are those of `plotting.plot_loss`.

        As in the book, a window opens if there is a display and neither `ax` nor `path` is given.
        """
        axes = plot_loss(self.loss_list, interval=self.eval_interval or 1, ylim=ylim, **options)
        if options.get("ax") is None and options.get("path") is None:
            from matplotlib import pyplot  # noqa: PLC0415 - an extra

            if pyplot.get_backend().lower() != "agg":
                pyplot.show()
        return axes

    def _begin(self, callbacks: CallbackList, max_epoch: int, plan: tuple[int, int, int]) -> None:
        """Start a fit, or continue the one of a checkpoint."""
        resumed = self._callback_states is not None and self._first_epoch is not None
        first = self._first_epoch if resumed and self._first_epoch is not None else self.current_epoch
        if resumed and self.iteration and plan != self._plan:
            raise ValueError(
                f"Trainer.fit: the saved epoch has {self._plan[0]} rows in {self._plan[2]} batches of "
                f"{self._plan[1]}, got {plan[0]} rows in {plan[2]} batches of {plan[1]}; finish it as it began"
            )
        if resumed and (begun := self.current_epoch + (self.iteration > 0) - first) > max_epoch:
            raise ValueError(
                f"Trainer.fit: the saved fit has begun {begun} epochs; max_epoch counts these too, got {max_epoch}"
            )
        callbacks.follow(self.model, resumed=resumed)
        if resumed:
            callbacks.load_state(self._callback_states)
        else:
            self.iteration, self._losses, self._stop = 0, WeightedMean(), False
        self._first_epoch, self._callbacks, self._plan = first, callbacks, plan
        self.max_iter, self.max_epoch = plan[2], first + max_epoch

    def _check_validation(self, validation: Any) -> Sequence[Array]:
        """Return the validation data, checked; raise now what `evaluate` would raise after an epoch."""
        if validation is None:
            return ()
        checked = check_data("Trainer.fit: validation", self.model, validation, copy=False)
        if not hasattr(self.model, "evaluate"):
            raise TypeError("Trainer.fit: validation needs a model with evaluate(x, t) that returns loss, accuracy")
        self.model.evaluate(*(data[:1] for data in validation))
        return checked

    def _check_update(self) -> None:
        """Raise what the first update would raise, before any layer has changed its state."""
        name, params, optimizer = type(self.model).__name__, self.model.params, self.optimizer
        for i, p in enumerate(params):
            check_weights("Trainer.fit", **{f"params[{i}]": p})
            if not is_writable(p):
                raise ValueError(f"Trainer.fit: params[{i}] of {name} is read-only; train a copy")
        grads = getattr(self.model, "grads", []) or params  # the first backward may create them
        if len(grads) != len(params):
            raise ValueError(
                f"Trainer.fit: every parameter of {name} needs a gradient, got {len(params)} params and "
                f"{len(grads)} grads"
            )
        if hasattr(optimizer, "check_update"):
            with numpy.errstate(all="ignore"):  # the gradients are stale
                optimizer.check_update(*TiedParameters(params).sum_tied_gradients(params, grads))

    def _setup_ranks(self, data: Sequence[Array], validation: Sequence[Array], **settings: Any) -> None:
        """Check that all ranks have the same data and arguments, and broadcast the weights of rank 0."""
        if self.comm.size == 1:
            return
        numbers = {n: v for n, v in vars(self.optimizer).items() if isinstance(v, int | float | numpy.number)}
        self.comm.assert_equal_on_ranks(
            "Trainer.fit",
            **dict(zip("xt", map(checksum, data), strict=True)),
            validation=" and ".join(map(checksum, validation)) or None,
            **settings,
            optimizer=f"{type(self.optimizer).__name__} {numbers}",
            begin=f"epoch {self.current_epoch}, step {self.iteration}",
        )
        self.comm.broadcast(self.model.params)

    def _check_ranks_in_sync(self) -> None:
        """Raise if the ranks' weights have diverged; all NaNs count as equal."""
        params = [np.where(np.isnan(p), np.nan, p) for p in self.model.params]
        fingerprints = {f"params[{i}]": checksum(p.reshape(-1)) for i, p in enumerate(params)}
        self.comm.assert_equal_on_ranks(
            f"Trainer.fit, in epoch {self.current_epoch} the ranks have diverged", **fingerprints
        )

    def _share(self, part: int, rows: int) -> float:
        """Return the weight of this rank's `part` rows in a batch of `rows` rows."""
        if not self._is_weighted():
            return part / rows
        weight = float(self.model.loss_layer.weight_sum) if part else 0.0
        return weight / (self.comm.all_sum(weight) or 1.0)

    def _is_weighted(self) -> bool:
        return getattr(getattr(self.model, "loss_layer", None), "is_weighted", False)

    def _stop_flags(self, signals: DeferredSignals) -> list[bool]:
        """Return the stop flags of this rank: one for each signal, and one for `stop`."""
        return [*(signals.pending == signum for signum in _SIGNALS), self._stop]

    def _apply_stop_flags(self, flags: list[float]) -> None:
        """Apply the stop flags of all ranks, which have been summed."""
        *signals, self._stop = (flag > 0 for flag in flags)
        self._stop_signal = next((signum for signum, flag in zip(_SIGNALS, signals, strict=True) if flag), 0)

    def _sync_stop_flags(self, run: _Fit) -> None:
        """Sum the stop flags over all ranks, and apply them."""
        self._apply_stop_flags(self.comm.all_sum(*self._stop_flags(run.signals)))

    def _evaluate(self, x: Any, t: Any) -> tuple[float, float | None]:
        """Return the result of `model.evaluate`; each rank evaluates its shard, unless rows have weights."""
        if self._is_weighted():
            return self.model.evaluate(x, t)
        part = self.comm.shard(len(x))
        rows = part.stop - part.start
        loss, accuracy = self.model.evaluate(*((x[part], t[part]) if rows else (x[:1], t[:1])))
        loss, hits = self.comm.all_sum(loss * rows / len(x), (accuracy or 0) * rows / len(x))
        return loss, None if accuracy is None else hits

    def _log_loss(self) -> None:
        """Append the mean loss since the last evaluation to `loss_list`."""
        self.loss_list.append(self._losses.pop())
        self._check_finite(self.loss_list[-1])

    def _check_finite(self, loss: float) -> None:
        """Raise a FloatingPointError if the mean loss or a parameter is infinite or NaN."""
        if not (math.isfinite(loss) and all_finite(self.model.params)):
            first = max(1, self.iteration - (self.eval_interval or self.iteration) + 1)
            raise FloatingPointError(
                f"Trainer.fit: the loss is {loss} or a parameter is infinite or NaN in epoch {self.current_epoch + 1}, "
                f"iterations {first} to {self.iteration}; use a smaller lr, or max_grad"
            )


def _is_terminal() -> bool:
    """Return whether stderr is a terminal; pythonw has none, and it may be closed."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _check_interface(name: str, given: Any, needed: Sequence[str]) -> None:
    """Raise a TypeError unless `given` is an object, not a class, that has the attributes `needed`."""
    if isinstance(given, type):
        kind = given.__name__
        raise TypeError(f"Trainer: {name} must be an object, got the class {kind}; make one with {kind}(...)")
    if not all(hasattr(given, attribute.partition("(")[0]) for attribute in needed):
        raise TypeError(f"Trainer: {name} must be an object with {', '.join(needed)}, got {given!r}")


def remove_duplicate(params: Iterable[Array], grads: Iterable[Array]) -> tuple[list[Array], list[Array]]:
    """Return new lists in which an array shared by several layers occurs once, with the sum of its gradients.

    Arrays are shared if they have the same memory, also transposed. (The book compares values, and merges
    different matrices that happen to be equal.)
    """
    params, grads = list(params), list(grads)
    return TiedParameters(params).sum_tied_gradients(params, grads)


def _rows_left(iteration: int, rows: int, batch_size: int, max_iter: int) -> int:
    """Return the number of rows that remain in an epoch that has begun."""
    return max(0, min(rows, max_iter * batch_size) - iteration * batch_size) if iteration else 0
