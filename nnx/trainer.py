"""The training loop: `Trainer.fit` shuffles, takes steps, reports, and stops when the loss diverges. N rows.

`RnnlmTrainer` is the loop for language models, which read the corpus in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from nnx import checkpoint
from nnx.batches import (
    ArrayData,
    BatchData,
    check_validation,
    checksum,
    parameter_dtype,
    prepare_data,
)
from nnx.callbacks import CallbackList, Checkpoint, print_line
from nnx.checks import check_bool, check_integer, check_same_length, check_weights, takes_arguments
from nnx.device import asarray, describe, is_writable
from nnx.distributed import Comm
from nnx.kernels import all_finite
from nnx.np import Array, np
from nnx.optimizer import clip_grads
from nnx.plotting import plot_history, plot_loss
from nnx.protocols import Callback, Model, Optimizer
from nnx.rng import as_generator, check_state, get_state, set_state
from nnx.signals import DeferredSignals, defer_signals
from nnx.train_state import TrainState
from nnx.tree import TiedParameters, release_batch, snapshot

__all__ = ["RnnlmTrainer", "Trainer", "remove_duplicate"]


@dataclasses.dataclass
class _FitContext:
    """The data and settings of one call of `Trainer.fit`."""

    data: ArrayData | BatchData
    max_grad: float | None
    callbacks: CallbackList
    metrics: Mapping[str, Callable[..., Any]] | None
    signals: DeferredSignals
    tied: TiedParameters
    changes: contextlib.ExitStack | None  # restores, until the first step is done, what an error would leave changed
    weighted_loss: Any  # the loss layer if it weights rows, else None
    signal: int = 0  # the one that all ranks have agreed on


def _state_attribute(name: str) -> Any:
    """Return a property that forwards to an attribute of `state`."""
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
    history : list of dict
        One row of plain numbers per epoch, over all calls of fit: "epoch", counted from 1; "loss", the mean over all
        rows of the epoch, computed before the update of their step, in which batches count by their size; "lr", the
        learning rate at the beginning of the epoch; "seconds", the duration of its steps, or of those after a resume;
        and with validation "val_loss", "val_accuracy" unless the model has none, and `"val_" + name` for each of
        `metrics`. pandas.DataFrame(trainer.history) is a table.
    verbose : bool or None
        That of the last fit; False on ranks other than 0.
    current_epoch, max_epoch : int
        The number of epochs finished over all calls of fit, and the number at which this call ends.
    iteration, max_iter : int
        The number of steps finished in this epoch, and the number of steps per epoch; 0 until the first epoch ends
        for batches whose number is unknown.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, spiral
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(lr=1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), max_epoch=5, batch_size=30, verbose=False)
    >>> trainer.history[-1]["epoch"], trainer.optimizer.lr
    (5, 1.0)
    """

    current_epoch, iteration, max_iter = map(_state_attribute, ("epoch", "iteration", "max_iter"))
    loss_list, val_list, history = map(_state_attribute, ("loss_list", "val_list", "history"))

    def __init__(self, model: Model, optimizer: Optimizer, *, rng: Any = None, comm: Comm | None = None) -> None:
        _check_interface("model", model, ("params", "forward(x, t)", "backward()"))
        _check_interface("optimizer", optimizer, ("update(params, grads)",))
        self.model: Any = model
        self.optimizer: Any = optimizer
        self.rng = None if rng is None else as_generator(rng)  # not NumPy's module, which cannot be copied
        self.comm, self.state = comm or Comm(), TrainState()
        self.max_epoch, self._running = 0, False
        self.eval_interval: int | None = None
        self.verbose: bool | None = None
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
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        sample_weight: Any = None,
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
            Evaluated after each epoch; the results are appended to `val_list` and added to `history`.
        metrics : dict of functions by name, or None
            Each is called after each epoch with the scores of all validation rows and their targets, NumPy arrays, and
            returns a number, stored in `history` under `"val_" + name`: {"f1": lambda scores, t: ...}.
        sample_weight : (N,) or None
            Weights of the rows, at least 0: the loss of a batch is the mean weighted by them. `loss_list` and `history`
            weight batches by batch size.
        drop_last : bool
            Whether to drop a last batch with fewer rows.
        verbose : bool or None
            None shows a progress bar on a terminal and in a notebook, and prints lines elsewhere; True prints lines,
            False nothing.
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
        data = prepare_data(self.model, x, t, sample_weight, drop_last, **settings)
        checked = check_validation(self.model, validation, metrics)
        hooks.check_validation(validation)
        if self.comm.size > 1:
            settings |= {"drop_last": drop_last, "max_iter": data.max_iter, "metrics": sorted(metrics or ())}
            _setup_ranks(self, data, checked, **settings)
        self._begin(hooks, max_epoch, data)
        self.eval_interval, self.validation = eval_interval, validation
        self.verbose = verbose if self.comm.rank == 0 else False
        hooks = hooks.with_progress(self.verbose)
        weighted = _weighted_loss(self.model, sample_weight)
        data.to_device()
        self._running = True
        try:
            with (
                defer_signals() as signals,
                _restored_on_error(self.model, as_generator(self.rng)) as changes,
                hooks.running(self),
            ):
                tied = TiedParameters(self.model.params)
                self._run(_FitContext(data, max_grad, hooks, metrics, signals, tied, changes, weighted))
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
        state.end()
        self._callbacks = self._callback_states = None

    def _run_epoch(self, run: _FitContext) -> None:
        """Run an epoch, or the rest of one that was resumed."""
        state, interval, start = self.state, self.eval_interval, time.perf_counter()
        if not state.iteration:
            state.begin_epoch(run.data.permutation(as_generator(self.rng)), getattr(self.optimizer, "lr", None))
            self.comm.broadcast([state.permutation])
        dtype, hooks = parameter_dtype(self.model), run.callbacks.handles("on_step", "on_checkpoint")
        for x, t, weight, rows in run.data.batches(state, self.comm, dtype):
            state.losses.add(self._train_step(run, x, t, weight, rows), rows)
            state.iteration += 1  # only now that the step is done
            if interval is not None and (state.iteration - 1) % interval == 0:
                self._log_loss()
                run.callbacks("on_evaluate", self)
            if hooks or run.signal or run.signals.pending:
                self._after_step(run, "on_step")
        if not state.iteration:
            raise ValueError("Trainer.fit: the iterable of batches is empty")
        self._check_finite(state.epoch_loss())
        state.end_epoch(time.perf_counter() - start)
        if self.validation is not None:
            state.add_validation(*_evaluate(self.model, self.comm, *self.validation, run.metrics))
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

    def _train_step(self, run: _FitContext, x: Array, t: Array, weight: Array | None, rows: int) -> Any:
        """Take a step and return its loss: forward, backward, the sum over ranks, clipping, update."""
        model, loss = self.model, 0.0
        if len(x):  # a rank may have no row of a small batch
            loss = model.forward(x, t) if weight is None else model.forward(x, t, weight=weight)
            if run.changes is not None:
                _check_loss(model, loss)
            model.backward()
        params, grads = run.tied.sum_tied_gradients(model.params, model.grads)
        stops = run.signals.pending, self.state.stop
        grads, loss, (run.signal, self.state.stop) = self.comm.reduce_step(
            grads, loss, len(x), rows, run.weighted_loss, stops
        )
        if run.max_grad is not None:
            clip_grads(grads, run.max_grad)
        self.optimizer.update(params, grads)
        if run.changes is not None:
            run.changes.pop_all()
            run.changes = self._callback_states = None  # only now: after an error before it, fit may be called again
        return loss

    def resume(self, path: str | Path) -> Path:
        """Load a checkpoint: model, optimizer, random generator, counters, `loss_list`, `val_list` and `history`.

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

    def __repr__(self) -> str:
        kind, model = type(self).__name__, type(self.model).__name__
        return f"{kind}({model}, {self.optimizer!r}, current_epoch={self.current_epoch})"

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

    def log(self, text: str) -> None:
        """Print a line, above the progress bar if there is one; nothing if `verbose` is False; for callbacks."""
        if self.verbose is not False:
            print_line(text)

    def loss_text(self) -> str:
        """Return the last loss as the lines of progress show it."""
        return f"loss {self.loss_list[-1]:.2f}"

    def stop(self) -> None:
        """End `fit` after the current epoch; for callbacks."""
        self.state.stop = True

    def plot(self, ylim: tuple[float, float] | None = None, **options: Any) -> Any:
        """Draw `loss_list` as in the book, or with validation both losses of `history`, and return the Axes.

        The options are `ax` and `path`. As in the book, a window opens if there is a display and neither is given.
        """
        axes = self._draw(ylim=ylim, **options)
        if options.get("ax") is None and options.get("path") is None:
            from matplotlib import pyplot  # noqa: PLC0415 - an extra

            if pyplot.get_backend().lower() != "agg":
                pyplot.show()
        return axes

    def _draw(self, **options: Any) -> Any:
        if any("val_loss" in row for row in self.history):
            return plot_history(self.history, **options)
        return plot_loss(self.loss_list, interval=self.eval_interval or 1, **options)

    def _begin(self, callbacks: CallbackList, max_epoch: int, data: ArrayData | BatchData) -> None:
        """Start a fit, or continue the one of a checkpoint."""
        state, resumed = self.state, self._callback_states is not None and self.state.first_epoch is not None
        sizes = data.rows, data.batch_size, data.max_iter
        if resumed:
            state.check_resume(*sizes, max_epoch)
        callbacks.restore_states(self.model, self._callback_states if resumed else None)
        state.begin(*sizes, resumed=resumed)
        self._callbacks, self.max_epoch = callbacks, (state.first_epoch or 0) + max_epoch

    def _exchange_stops(self, run: _FitContext) -> None:
        """Agree with the other ranks on the signal to deliver, and on whether to stop."""
        run.signal, self.state.stop = self.comm.exchange_stops((run.signals.pending, self.state.stop))

    def _log_loss(self) -> None:
        """Append the mean loss since the last evaluation to `loss_list`."""
        self.loss_list.append(self.state.mean_loss())
        self._check_finite(self.loss_list[-1])

    def _check_finite(self, loss: float) -> None:
        """Raise a FloatingPointError if the mean loss or a parameter is infinite or NaN."""
        if not (math.isfinite(loss) and all_finite(self.model.params)):
            first = max(1, self.iteration - (self.eval_interval or self.iteration) + 1)
            raise FloatingPointError(
                f"Trainer.fit: the loss is {loss} or a parameter is infinite or NaN in epoch {self.current_epoch + 1}, "
                f"iterations {first} to {self.iteration}; use a smaller lr, or max_grad"
            )


class RnnlmTrainer(Trainer):
    """Trains a language model on a corpus, which is read in order, in parallel streams.

    A batch holds the next `time_size` words of each stream, so that layers with a state, which fit does not reset, go
    on where they stopped. Everything else is as in `Trainer`.

    Attributes
    ----------
    ppl_list : list of float
        exp(mean loss since the previous evaluation), one number per evaluation, over all calls of fit. (The book
        begins a new list in each.)
    time_idx : int
        The position of the next batch in each stream; 0 at the beginning of a fit.

    Examples
    --------
    >>> from nnx import SGD, Sequential, np
    >>> from nnx.layers import TimeAffine, TimeEmbedding, TimeSoftmaxWithLoss
    >>> from nnx.trainer import RnnlmTrainer
    >>> layers = [TimeEmbedding.init(5, 4, rng=0), TimeAffine.init(4, 5, rng=1)]
    >>> words = np.arange(200) % 5
    >>> trainer = RnnlmTrainer(Sequential(layers, TimeSoftmaxWithLoss()), SGD(1.0))
    >>> trainer.fit(words[:-1], words[1:], max_epoch=1, batch_size=4, time_size=10, verbose=False)
    >>> print([f"{ppl:.2f}" for ppl in trainer.ppl_list])  # five words are equally probable before the training
    ['5.00']
    """

    time_idx = 0

    @property
    def ppl_list(self) -> list[float]:
        """The perplexities of all evaluations."""
        with numpy.errstate(over="ignore", under="ignore"):
            return numpy.exp(numpy.array(self.loss_list, numpy.float64)).tolist()

    def get_batch(self, x: Any, t: Any, batch_size: int, time_size: int) -> tuple[Array, Array]:
        """Return the next words of x and t (N,), (batch_size, time_size) each, and advance `time_idx` by `time_size`.

        Stream i begins at word i * (N // batch_size); after the last word of the corpus comes the first.
        """
        x, t = check_same_length("RnnlmTrainer.get_batch", x, t)
        offsets = _stream_offsets(len(x), batch_size, time_size, isinstance(x, numpy.ndarray))
        index = (offsets + self.time_idx) % len(x)
        self.time_idx += time_size
        return x[index], t[index]

    def fit(  # type: ignore[override]  # the book's arguments in its order
        self,
        xs: Any,
        ts: Any,
        max_epoch: int = 10,
        batch_size: int = 20,
        time_size: int = 35,
        max_grad: float | None = None,
        eval_interval: int | None = 20,
        *,
        verbose: bool | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Train on the words `xs` (N,), with the words `ts` (N,) that follow them as labels.

        Parameters
        ----------
        xs, ts : (N,) word ids
            For a corpus, corpus[:-1] and corpus[1:].
        batch_size : int
            The number of streams.
        time_size : int
            The number of words per stream and step, to which backpropagation through time is truncated.
        max_epoch, max_grad, eval_interval, verbose, callbacks
            As in `Trainer.fit`. An epoch has N // (batch_size * time_size) steps.

        Raises
        ------
        ValueError
            If the corpus is too short for one step; for the others see `Trainer.fit`.
        """
        batches = _StreamBatches(self, xs, ts, batch_size, time_size)
        options: dict[str, Any] = {"verbose": verbose, "callbacks": callbacks}
        super().fit(batches, None, max_epoch, batch_size, max_grad, eval_interval, **options)

    def loss_text(self) -> str:
        """Return the last perplexity as the lines of progress show it."""
        return f"perplexity {self.ppl_list[-1]:.2f}"

    def _draw(self, **options: Any) -> Any:
        return plot_loss(self.ppl_list, interval=self.eval_interval or 1, ylabel="perplexity", **options)


class _StreamBatches:
    """The batches of `RnnlmTrainer`: each epoch continues where the last one of the fit ended."""

    def __init__(self, trainer: RnnlmTrainer, xs: Any, ts: Any, batch_size: int, time_size: int) -> None:
        check_integer("RnnlmTrainer.fit: batch_size", batch_size)
        check_integer("RnnlmTrainer.fit: time_size", time_size)
        xs, ts = map(asarray, check_same_length("RnnlmTrainer.fit", xs, ts))
        for name, words in (("xs", xs), ("ts", ts)):
            if words.ndim != 1 or words.dtype.kind not in "iu":
                raise ValueError(
                    f"RnnlmTrainer.fit: {name} must be a vector of word ids, integers, got {words.dtype} {words.shape}"
                )
        self.trainer, self.arguments = trainer, (xs, ts, batch_size, time_size)
        self.max_iter = len(xs) // (batch_size * time_size)
        if not self.max_iter:
            raise ValueError(
                f"RnnlmTrainer.fit: batch_size={batch_size} and time_size={time_size} need at least "
                f"{batch_size * time_size} words, got {len(xs)}"
            )

    def __len__(self) -> int:
        return self.max_iter

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        state, time_size = self.trainer.state, self.arguments[-1]
        self.trainer.time_idx = (state.epoch - (state.first_epoch or 0)) * self.max_iter * time_size
        for _ in range(self.max_iter):
            yield self.trainer.get_batch(*self.arguments)


@functools.lru_cache(maxsize=8)
def _stream_offsets(size: int, batch_size: int, time_size: int, on_host: bool) -> Array:
    """Return the index (batch_size, time_size) of the first batch of a corpus of `size` words."""
    module: Any = numpy if on_host else np
    return module.arange(batch_size)[:, None] * (size // batch_size) + module.arange(time_size)


@contextlib.contextmanager
def _restored_on_error(model: Any, rng: Any) -> Iterator[contextlib.ExitStack]:
    """Restore layers and random generator after an error, until the first step clears the yielded stack."""
    with contextlib.ExitStack() as changes:
        changes.callback(set_state, rng, get_state(rng))
        changes.callback(snapshot(model))
        yield changes
        changes.pop_all()


def _weighted_loss(model: Any, sample_weight: Any) -> Any:
    """Return the loss layer if it weights rows, else None."""
    loss_layer = getattr(model, "loss_layer", None)
    return loss_layer if sample_weight is not None or getattr(loss_layer, "is_weighted", False) else None


def _setup_ranks(trainer: Trainer, data: Any, validation: Sequence[Array], **settings: Any) -> None:
    """Check that all ranks have the same data and arguments, and broadcast the weights of rank 0."""
    numbers = {n: v for n, v in vars(trainer.optimizer).items() if isinstance(v, int | float | numpy.number)}
    checksums = [*map(checksum, getattr(data, "arrays", ())), None, None, None]
    arrays = dict(zip(("x", "t", "sample_weight"), checksums, strict=False))
    trainer.comm.assert_equal_on_ranks(
        "Trainer.fit",
        **arrays,
        validation=" and ".join(map(checksum, validation)) or None,
        **settings,
        optimizer=f"{type(trainer.optimizer).__name__} {numbers}",
        begin=f"epoch {trainer.state.epoch}, step {trainer.state.iteration}",
    )
    trainer.comm.broadcast(trainer.model.params)


def _evaluate(model: Any, comm: Comm, x: Any, t: Any, metrics: Any) -> Any:
    """Return the result of `model.evaluate`; each rank evaluates its shard, or all rows for metrics and weights."""
    if metrics:
        return model.evaluate(x, t, metrics=metrics)
    if _weighted_loss(model, None) is not None:
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

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.trainer import remove_duplicate
    >>> W = np.ones((2, 3))
    >>> params, grads = remove_duplicate([W, W.T], [np.ones((2, 3)), np.ones((3, 2))])
    >>> len(params), grads[0].tolist()
    (1, [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    """
    params, grads = list(params), list(grads)
    return TiedParameters(params).sum_tied_gradients(params, grads)
