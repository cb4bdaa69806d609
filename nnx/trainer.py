"""The training loop: `Trainer.fit` shuffles, takes steps, reports, and stops when the loss diverges. N rows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from nnx import checkpoint
from nnx.batches import (
    ArrayData,
    BatchData,
    WeightedMean,
    check_validation,
    checksum,
    parameter_dtype,
    prepare_data,
)
from nnx.callbacks import CallbackList, Checkpoint
from nnx.checks import check_bool, check_weights, takes_arguments
from nnx.device import describe, is_writable
from nnx.distributed import Comm
from nnx.kernels import all_finite
from nnx.np import Array
from nnx.optimizer import clip_grads
from nnx.plotting import plot_loss
from nnx.protocols import Callback, Model, Optimizer
from nnx.rng import as_generator, check_state, get_state, set_state
from nnx.signals import DeferredSignals, defer_signals
from nnx.tree import TiedParameters, check_kinds, release_batch, snapshot

__all__ = ["TrainState", "Trainer", "remove_duplicate"]


_COUNTS = ("epoch", "iteration", "first_epoch", "rows", "batch_size", "max_iter", "stop")


@dataclasses.dataclass
class TrainState:
    """The progress of a training, which checkpoints hold.

    Attributes
    ----------
    epoch, iteration : int
        The epochs finished over all fits, and the steps finished in this epoch.
    first_epoch : int or None
        The epoch in which the fit began that is not finished.
    rows, batch_size, max_iter : int
        Of this epoch: the rows, the rows per batch and the steps; 0 rows for batches of the user's.
    stop : bool
        Whether the fit ends after this epoch.
    permutation : array of int64
        The rows of this epoch in their order, or of what remains of it after a resume.
    losses : WeightedMean
        Since the last evaluation.
    loss_list, val_list : lists
        Of `Trainer`.
    """

    epoch: int = 0
    iteration: int = 0
    first_epoch: int | None = None
    rows: int = 0
    batch_size: int = 0
    max_iter: int = 0
    stop: bool = False
    permutation: numpy.ndarray = dataclasses.field(default_factory=lambda: numpy.zeros(0, numpy.int64))
    losses: WeightedMean = dataclasses.field(default_factory=WeightedMean)
    loss_list: list[float] = dataclasses.field(default_factory=list)
    val_list: list[tuple[float, float | None]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as numbers and arrays."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            **{name: self.epoch if value is None else int(value) for name, value in counts.items()},
            "loss_list": numpy.array(self.loss_list, numpy.float64),
            "val_list": numpy.array(self.val_list, numpy.float64).reshape(-1, 2),  # None, no accuracy, is NaN
            "losses": self.losses.state(),
            "permutation": self.permutation[len(self.permutation) - self._rows_left() :],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TrainState:
        """Return the state that `to_dict` returned as `state`; raise a ValueError if it is not valid."""
        check_kinds(state, int, *_COUNTS)
        check_kinds(state, numpy.ndarray, "loss_list", "val_list", "losses", "permutation")
        pairs, losses = state["val_list"], state["losses"]
        if pairs.shape[1:] != (2,) or losses.shape[1:] != (3,) or not numpy.isfinite(losses[:, ::2]).all():
            raise ValueError("invalid losses")
        self = cls(**{name: state[name] for name in _COUNTS})
        self.stop, self.permutation, self.losses = bool(self.stop), state["permutation"], WeightedMean(losses)
        self.loss_list = state["loss_list"].tolist()
        self.val_list = [(loss, None if math.isnan(hits) else hits) for loss, hits in pairs.tolist()]
        limit = self.max_iter if self.rows else 1 << 62
        if not all(0 <= state[name] < 1 << 62 for name in _COUNTS) or self.iteration > limit:
            raise ValueError("invalid counters")
        order = self.permutation
        if len(order) != self._rows_left() or not ((order >= 0) & (order < self.rows)).all():
            raise ValueError("invalid permutation of the remaining rows of the epoch")
        return self

    def _rows_left(self) -> int:
        """Return the number of rows that remain in an epoch that has begun."""
        rows = min(self.rows, self.max_iter * self.batch_size)
        return max(0, rows - self.iteration * self.batch_size) if self.iteration else 0


@dataclasses.dataclass
class _FitContext:
    """The data and settings of one call of `Trainer.fit`."""

    data: ArrayData | BatchData
    max_grad: float | None
    callbacks: CallbackList
    signals: DeferredSignals
    tied: TiedParameters
    changes: contextlib.ExitStack | None  # restores, until the first step is done, what an error would leave changed
    signal: int = 0  # the one that all ranks have agreed on


def _state_attribute(name: str) -> Any:
    """Return a property that stands for an attribute of `state`."""
    return property(lambda self: getattr(self.state, name), lambda self, value: setattr(self.state, name, value))


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
        The number of steps finished in this epoch, and the number of steps per epoch; 0 until the first epoch ends
        for batches whose number is unknown.
    """

    current_epoch, iteration, max_iter = map(_state_attribute, ("epoch", "iteration", "max_iter"))
    loss_list, val_list = map(_state_attribute, ("loss_list", "val_list"))

    def __init__(self, model: Model, optimizer: Optimizer, *, rng: Any = None, comm: Comm | None = None) -> None:
        _check_interface("model", model, ("params", "forward(x, t)", "backward()"))
        _check_interface("optimizer", optimizer, ("update(params, grads)",))
        self.model: Any = model
        self.optimizer: Any = optimizer
        self.rng = None if rng is None else as_generator(rng)  # not NumPy's module, which cannot be copied
        self.comm, self.state = comm or Comm(), TrainState()
        self.max_epoch, self._running = 0, False
        self.eval_interval: int | None = None
        self.validation: tuple[Any, Any] | None = None
        self._callbacks: CallbackList | None = None  # of the fit that is not finished
        self._callback_states: list[Any] | None = None  # from a checkpoint, for the next fit

    def fit(
        self,
        x: Any,
        t: Any = None,
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
        """Train on the rows of `x` and `t`, host or device arrays, or on batches.

        Parameters
        ----------
        x, t : arrays of N rows
            Moved to the device once if they fit, otherwise batch by batch. Floating data in another dtype than the
            parameters, and data whose rows are not contiguous (Fortran order, most DataFrames, x[:, ::2]), are
            copied once, in C order; column slices x[:, :n] and reversed rows are used without a copy.
            Memory-mapped files are never copied: the checks read a few megabytes at a time, and each batch is read
            and cast when it is needed; from Fortran order 16 MB of rows at a time.

            Without `t`, `x` is an iterable of batches (x, t), which each epoch goes through once: for augmentation, or
            for data from elsewhere. `batch_size` and `drop_last` then have no effect. A resumed epoch skips the batches
            that it has trained on; it reproduces the interrupted one if the iterable yields the same batches again.
            With several ranks, each trains on its shard of every batch, and all must iterate over the same ones.
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
            If the model cannot be trained on these data, or an argument is invalid; an error before the first step
            leaves model, optimizer and random generator as they were.
        FloatingPointError
            If the loss or a parameter is infinite or NaN at an evaluation or at the end of an epoch.
        KeyboardInterrupt
            On Ctrl-C, at the end of the current step, so that no parameter is half updated; a second Ctrl-C is
            raised at once. SIGTERM is deferred as well, and then ends the process as usual. In a callback's fit of
            another trainer, either ends both.
        RuntimeError
            If a callback calls fit of its own trainer.
        """
        if self._running:
            raise RuntimeError("Trainer.fit: called from one of its own callbacks; use another Trainer there")
        hooks, drop_last = CallbackList(callbacks), check_bool("Trainer.fit: drop_last", drop_last)
        verbose = None if verbose is None else check_bool("Trainer.fit: verbose", verbose)
        _check_update(self.model, self.optimizer)
        settings: dict[str, Any] = {"max_epoch": max_epoch, "batch_size": batch_size, "max_grad": max_grad}
        settings["eval_interval"] = eval_interval
        data = prepare_data(self.model, x, t, drop_last, **settings)
        checked = check_validation(self.model, validation)
        hooks.check_validation(validation)
        if self.comm.size > 1:
            self._setup_ranks(data, checked, **settings, drop_last=drop_last, max_iter=data.max_iter)
        self._begin(hooks, max_epoch, data)
        self.eval_interval, self.validation = eval_interval, validation
        hooks = hooks.with_progress(verbose if self.comm.rank == 0 else False)
        data.to_device()
        self._running = True
        try:
            with (
                defer_signals() as signals,
                _restored_on_error(self.model, as_generator(self.rng)) as changes,
                hooks.running(self),
            ):
                self._run(_FitContext(data, max_grad, hooks, signals, TiedParameters(self.model.params), changes))
        finally:
            self._running = False
            release_batch(self.model)

    def _run(self, run: _FitContext) -> None:
        """Run the epochs of a fit."""
        state = self.state
        self._exchange_stops(run)  # on_begin may have called `stop`
        try:
            while state.epoch < self.max_epoch and (state.iteration or not state.stop):
                self._run_epoch(run)
        except KeyboardInterrupt as error:
            saves = (c.path for c in run.callbacks.callbacks if isinstance(c, Checkpoint) and c.path)
            saved = next(saves, "a file")
            raise type(error)(
                f"Trainer.fit: interrupted in epoch {state.epoch + 1} after {state.iteration} of {state.max_iter} "
                f"iterations; continue from these weights with fit, or from {saved} with resume"
            ) from None
        state.first_epoch, state.stop, state.losses = None, False, WeightedMean()
        state.permutation, self._callbacks, self._callback_states = state.permutation[:0].copy(), None, None

    def _run_epoch(self, run: _FitContext) -> None:
        """Run an epoch, or the rest of one that was resumed."""
        state, interval = self.state, self.eval_interval
        if not state.iteration:
            state.permutation = run.data.permutation(as_generator(self.rng))
            self.comm.broadcast([state.permutation])
        dtype, hooks = parameter_dtype(self.model), run.callbacks.handles("on_step", "on_checkpoint")
        for x, t, rows in run.data.batches(state, self.comm, dtype):
            state.losses.add(self._train_step(run, x, t, rows), rows)
            state.iteration += 1  # only now that the step is done
            if interval is not None and (state.iteration - 1) % interval == 0:
                self._log_loss()
                run.callbacks("on_evaluate", self)
            if hooks or run.signal or run.signals.pending:
                self._after_step(run, "on_step")
        if not state.iteration:
            raise ValueError("Trainer.fit: the iterable of batches is empty")
        if state.losses.totals:
            self._check_finite(state.losses.value())
        state.max_iter, state.epoch, state.iteration = state.iteration, state.epoch + 1, 0
        if self.validation is not None:
            state.val_list.append(_evaluate(self.model, self.comm, *self.validation))
        self._after_step(run, "on_epoch")

    def _after_step(self, run: _FitContext, event: str) -> None:
        """Call the callbacks after a step or an epoch, and deliver a signal that has arrived."""
        run.callbacks(event, self)
        if event == "on_epoch":
            self._exchange_stops(run)
        run.callbacks("on_checkpoint", self)
        if signum := self.comm.agreed_signal(run.signal, run.signals.pending):
            run.signals.pending = signum
            run.callbacks("on_interrupt", self)
            self.comm.barrier()  # until rank 0 has saved
            run.signals.deliver()

    def _train_step(self, run: _FitContext, x: Array, t: Array, rows: int) -> Any:
        """Take a step and return its loss: forward, backward, the sum over ranks, clipping, update."""
        model, loss = self.model, 0.0
        if len(x):  # a rank may have no row of a small batch
            loss = model.forward(x, t)
            if run.changes is not None:
                _check_loss(model, loss)
            model.backward()
        params, grads = run.tied.sum_tied_gradients(model.params, model.grads)
        stops = run.signals.pending, self.state.stop
        grads, loss, (run.signal, self.state.stop) = self.comm.reduce_step(grads, loss, len(x), rows, model, stops)
        if run.max_grad is not None:
            clip_grads(grads, run.max_grad)
        self.optimizer.update(params, grads)
        if run.changes is not None:
            run.changes.pop_all()
            run.changes = self._callback_states = None  # only now: after an error before it, fit may be called again
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
        return self.state.stop or self.current_epoch >= self.max_epoch

    def __getstate__(self) -> dict[str, Any]:  # data and callbacks are not part of it
        return {**vars(self), "_callbacks": None, "_running": False, "validation": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that another trainer needs to continue: numbers, arrays and lists."""
        callbacks = self._callbacks.state() if self._callbacks else []
        return {**self.state.to_dict(), "rng": get_state(as_generator(self.rng)), "callbacks": callbacks}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless `load_state_dict` can load `state`."""
        if self._running:
            raise RuntimeError("Trainer: a checkpoint cannot be loaded while fit runs; load model and optimizer only")
        TrainState.from_dict(state)
        check_state(as_generator(self.rng), state["rng"])
        saved = state["callbacks"]
        if saved is None or not all(isinstance(c, list) and [*map(type, c)] == [str, dict] for c in saved):
            raise ValueError("invalid callbacks")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `state_dict` returned."""
        self.check_state(state)
        set_state(as_generator(self.rng), state["rng"])
        self.state, self._callback_states = TrainState.from_dict(state), state["callbacks"]

    def stop(self) -> None:
        """End `fit` after the current epoch; for callbacks."""
        self.state.stop = True

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

    def _begin(self, callbacks: CallbackList, max_epoch: int, data: ArrayData | BatchData) -> None:
        """Start a fit, or continue the one of a checkpoint."""
        state, first = self.state, self.state.epoch
        resumed = self._callback_states is not None and state.first_epoch is not None
        if resumed:
            first = state.first_epoch or 0
            before, now = ((d.rows, d.batch_size, d.max_iter) for d in (state, data))
            if state.iteration and (before[:2] != now[:2] or (before[2] != now[2] and before[2] and now[2])):
                raise ValueError(
                    f"Trainer.fit: the saved epoch has {before[0]} rows in {before[2]} batches of {before[1]}, got "
                    f"{now[0]} rows in {now[2]} batches of {now[1]}; finish it as it began"
                )
            begun = state.epoch + (state.iteration > 0) - first
            if begun > max_epoch:
                raise ValueError(
                    f"Trainer.fit: the saved fit has begun {begun} epochs; max_epoch counts these too, got {max_epoch}"
                )
        callbacks.restore_states(self.model, self._callback_states if resumed else None)
        if not resumed:
            state.iteration, state.losses, state.stop = 0, WeightedMean(), False
        state.rows, state.batch_size, state.max_iter = data.rows, data.batch_size, data.max_iter
        state.first_epoch, self._callbacks, self.max_epoch = first, callbacks, first + max_epoch

    def _setup_ranks(self, data: Any, validation: Sequence[Array], **settings: Any) -> None:
        """Check that all ranks have the same data and arguments, and broadcast the weights of rank 0."""
        numbers = {n: v for n, v in vars(self.optimizer).items() if isinstance(v, int | float | numpy.number)}
        arrays = {name: checksum(getattr(data, name)) for name in ("x", "t") if hasattr(data, name)}
        self.comm.assert_equal_on_ranks(
            "Trainer.fit",
            **arrays,
            validation=" and ".join(map(checksum, validation)) or None,
            **settings,
            optimizer=f"{type(self.optimizer).__name__} {numbers}",
            begin=f"epoch {self.state.epoch}, step {self.state.iteration}",
        )
        self.comm.broadcast(self.model.params)

    def _exchange_stops(self, run: _FitContext) -> None:
        """Agree with the other ranks on the signal to deliver, and on whether to stop."""
        run.signal, self.state.stop = self.comm.exchange_stops((run.signals.pending, self.state.stop))

    def _log_loss(self) -> None:
        """Append the mean loss since the last evaluation to `loss_list`."""
        self.loss_list.append(self.state.losses.pop())
        self._check_finite(self.loss_list[-1])

    def _check_finite(self, loss: float) -> None:
        """Raise a FloatingPointError if the mean loss or a parameter is infinite or NaN."""
        if not (math.isfinite(loss) and all_finite(self.model.params)):
            first = max(1, self.iteration - (self.eval_interval or self.iteration) + 1)
            raise FloatingPointError(
                f"Trainer.fit: the loss is {loss} or a parameter is infinite or NaN in epoch {self.current_epoch + 1}, "
                f"iterations {first} to {self.iteration}; use a smaller lr, or max_grad"
            )


@contextlib.contextmanager
def _restored_on_error(model: Any, rng: Any) -> Iterator[contextlib.ExitStack]:
    """Restore layers and random generator after an error, until the first step clears the yielded stack."""
    with contextlib.ExitStack() as changes:
        changes.callback(set_state, rng, get_state(rng))
        changes.callback(snapshot(model))
        yield changes
        changes.pop_all()


def _evaluate(model: Any, comm: Comm, x: Any, t: Any) -> tuple[float, float | None]:
    """Return the result of `model.evaluate`; each rank evaluates its shard, unless rows have weights."""
    if getattr(getattr(model, "loss_layer", None), "is_weighted", False):
        return model.evaluate(x, t)
    part = comm.shard(len(x))
    rows = part.stop - part.start
    loss, accuracy = model.evaluate(*((x[part], t[part]) if rows else (x[:1], t[:1])))
    loss, hits = comm.all_sum(loss * rows / len(x), (accuracy or 0) * rows / len(x))
    return loss, None if accuracy is None else hits


def _check_update(model: Any, optimizer: Any) -> None:
    """Raise what the first update would raise, before any layer has changed its state."""
    name, params = type(model).__name__, model.params
    for i, p in enumerate(params):
        check_weights("Trainer.fit", **{f"params[{i}]": p})
        if not is_writable(p):
            raise ValueError(f"Trainer.fit: params[{i}] of {name} is read-only; train a copy")
    grads = getattr(model, "grads", []) or params  # the first backward may create them
    if len(grads) != len(params):
        raise ValueError(
            f"Trainer.fit: every parameter of {name} needs a gradient, got {len(params)} params and {len(grads)} grads"
        )
    if hasattr(optimizer, "check_update"):
        with numpy.errstate(all="ignore"):  # the gradients are stale
            optimizer.check_update(*TiedParameters(params).sum_tied_gradients(params, grads))


def _check_loss(model: Any, loss: Any) -> None:
    """Raise a TypeError unless the loss is one real number."""
    kind = getattr(getattr(loss, "dtype", None), "kind", "f" if isinstance(loss, numbers.Real) else "")
    if kind not in ("f", "i", "u") or numpy.ndim(loss):
        shape = f" of shape {loss.shape}" if hasattr(loss, "shape") else ""
        raise TypeError(
            f"Trainer.fit: {type(model).__name__}.forward(x, t) must return the loss, one number, "
            f"got {describe(loss)}{shape}"
        )


def _check_interface(name: str, given: Any, needed: Sequence[str]) -> None:
    """Raise a TypeError unless `given` is an object, not a class, that has the attributes `needed`."""
    if isinstance(given, type):
        kind = given.__name__
        raise TypeError(f"Trainer: {name} must be an object, got the class {kind}; make one with {kind}(...)")
    names = [attribute.partition("(")[0] for attribute in needed]
    arguments = {"forward": 2, "update": 2}  # of x and t, or params and grads
    if isinstance(given, dict | set) or not all(
        hasattr(given, n) and (n not in arguments or takes_arguments(getattr(given, n), arguments[n])) for n in names
    ):
        raise TypeError(f"Trainer: {name} must be an object with {', '.join(needed)}, got {given!r}")


def remove_duplicate(params: Iterable[Array], grads: Iterable[Array]) -> tuple[list[Array], list[Array]]:
    """Return new lists in which an array shared by several layers occurs once, with the sum of its gradients.

    Arrays are shared if they have the same memory, also transposed. (The book compares values, and merges
    different matrices that happen to be equal.)
    """
    params, grads = list(params), list(grads)
    return TiedParameters(params).sum_tied_gradients(params, grads)
