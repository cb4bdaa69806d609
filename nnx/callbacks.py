"""Hooks into `Trainer.fit`: progress, learning-rate schedules, early stopping, best weights, checkpoints.

A callback is any object with at least one of the methods of `Callback`; inheriting from that class is optional.
Each method is called with the trainer. `trainer.stop()` ends the training after the current epoch. The attributes
named in `state_names`, a class attribute, are saved in checkpoints: numbers, strings, arrays and lists of these.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import reprlib
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

from nnx import checkpoint
from nnx.arguments import format_repr
from nnx.checks import check_integer, check_list, check_number, takes_arguments
from nnx.np import Array
from nnx.signals import NestedInterrupt
from nnx.tree import (
    attribute_names,
    check_kinds,
    check_savable,
    named_arrays,
    object_state,
    set_state,
    state_errors,
    state_mismatches,
    to_device,
)

__all__ = [
    "BestWeights",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LearningRateScheduler",
    "Log",
    "PrintLog",
    "ProgressBar",
]

_EVENTS = ("on_begin", "on_evaluate", "on_step", "on_epoch", "on_checkpoint", "on_interrupt", "on_end")
_MODES = {"loss": "min", "val_loss": "min", "val_accuracy": "max"}


class Callback:
    """A base class of hooks that do nothing.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, callbacks, spiral
    >>> class StopAt(callbacks.Callback):
    ...     def on_epoch(self, trainer):
    ...         if trainer.history[-1]["loss"] < 0.8:
    ...             trainer.stop()
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), 100, verbose=False, callbacks=[StopAt()])
    >>> trainer.current_epoch < 100
    True
    """

    state_names: tuple[str, ...] = ()
    _model: Callable[[], Any] | None = None  # a weak reference to the one that the last fit trained

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        return format_repr(self)

    def reset(self) -> None:
        """Discard what was learned from a model; called when the callback is reused with another model."""

    def on_begin(self, trainer: Any) -> None:
        """Do something before the first step of a fit."""

    def on_evaluate(self, trainer: Any) -> None:
        """Do something after the mean loss was appended to `trainer.loss_list`."""

    def on_step(self, trainer: Any) -> None:
        """Do something after a step."""

    def on_epoch(self, trainer: Any) -> None:
        """Do something after an epoch and its validation."""

    def on_checkpoint(self, trainer: Any) -> None:
        """Do something after the `on_step` or `on_epoch` of all callbacks, when their state is complete."""

    def on_interrupt(self, trainer: Any) -> None:
        """Do something after the step during which Ctrl-C or SIGTERM arrived."""

    def on_end(self, trainer: Any) -> None:
        """Do something at the end of a fit, also after an error."""

    def _bind_model(self, model: Any, *, resumed: bool) -> None:
        """Prepare for a fit of `model`, which may continue an interrupted one."""
        if self._model is not None and self._model() is not model:
            self.reset()
        reference = weakref.ref(model) if hasattr(model, "__weakref__") else lambda: model
        object.__setattr__(self, "_model", reference)  # the callback may be a frozen dataclass

    def __getstate__(self) -> dict[str, Any]:  # weak references cannot be pickled
        return {name: value for name, value in vars(self).items() if name != "_model"}


class PrintLog(Callback):
    """Prints the book's line at every evaluation, and with validation a line after every epoch.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, spiral
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), 2, 30, verbose=True)  # verbose=True adds PrintLog
    | epoch 1 |  iter 1 / 10 | time ...[s] | loss 1.10
    | epoch 2 |  iter 1 / 10 | time ...[s] | loss ...
    """

    def on_begin(self, trainer: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_evaluate(self, trainer: Any) -> None:
        """Print epoch, iteration, seconds and loss."""
        print(  # noqa: T201 - its purpose
            f"| epoch {trainer.current_epoch + 1} |  iter {trainer.iteration} / {trainer.max_iter} "
            f"| time {time.perf_counter() - self.start:.0f}[s] | {trainer.loss_text()}"
        )

    def on_epoch(self, trainer: Any) -> None:
        """Print the losses and metrics of the epoch."""
        row = trainer.history[-1]
        if "val_loss" in row:
            print(" | ".join([f"| epoch {row['epoch']}", *_format_losses(row)]))  # noqa: T201 - its purpose


def _format_losses(row: dict[str, float]) -> list[str]:
    """Return the losses and metrics in a row of the history as text."""
    return [f"{key} {value:.4g}" for key, value in row.items() if key == "loss" or key.startswith("val_")]


def print_line(text: str) -> None:
    """Print `text` above the progress bars that are open."""
    from tqdm import tqdm  # noqa: PLC0415 - importing nnx imports nothing that only training needs

    with tqdm.external_write_mode():
        print(text)  # noqa: T201 - its purpose


class ProgressBar(Callback):
    """Shows a tqdm progress bar over all steps, with the losses and metrics of the last epoch.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, callbacks, spiral
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), 2, verbose=False, callbacks=[callbacks.ProgressBar()])  # also in a pipe
    """

    def on_begin(self, trainer: Any) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm  # noqa: PLC0415 - as in print_line

        steps = (trainer.max_epoch - trainer.current_epoch) * trainer.max_iter
        self.bar = tqdm(total=steps or None, initial=trainer.iteration, unit="step")

    def on_step(self, trainer: Any) -> None:
        """Count a step."""
        self.bar.update()

    def on_evaluate(self, trainer: Any) -> None:
        """Show the loss of the first epoch before its end."""
        if not trainer.history:
            self.bar.set_postfix_str(f"epoch 1, loss {trainer.loss_list[-1]:.4g}", refresh=False)

    def on_epoch(self, trainer: Any) -> None:
        """Show the losses and metrics of the epoch."""
        row = trainer.history[-1]
        self.bar.set_postfix_str(", ".join([f"epoch {row['epoch']}", *_format_losses(row)]), refresh=False)

    def on_end(self, trainer: Any) -> None:
        """Close the bar."""
        self.bar.close()


class Log(Callback):
    """Calls a function with a copy of each new row of `trainer.history`, a dict of numbers, at the end of its epoch.

    With several ranks, only rank 0 calls it.

    Parameters
    ----------
    function : function of a dict
        For example `wandb.log`, `mlflow.log_metrics`, or `writerow` of a csv.DictWriter.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, callbacks, spiral
    >>> rows = []
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), 2, verbose=False, callbacks=[callbacks.Log(rows.append)])
    >>> [row["epoch"] for row in rows], list(rows[0])
    ([1, 2], ['epoch', 'loss', 'lr', 'seconds'])
    """

    def __init__(self, function: Callable[[dict[str, float]], Any]) -> None:
        if not callable(function) or not takes_arguments(function, 1):
            raise TypeError(f"Log: function must be a function of a dict, got {function!r:.80}")
        self.function = function

    def on_epoch(self, trainer: Any) -> None:
        """Call the function."""
        if trainer.comm.rank == 0:
            self.function(dict(trainer.history[-1]))


class LearningRateScheduler(Callback):
    """Sets `optimizer.lr` for each step to `schedule(steps taken)`.

    Parameters
    ----------
    schedule : function of an int
        See `optimizer.step_decay`, `cosine_decay` and `linear_warmup`.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, callbacks, optimizer, spiral
    >>> schedule = optimizer.step_decay(1.0, every=20)  # there are 10 steps in an epoch
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(), rng=0)
    >>> scheduler = callbacks.LearningRateScheduler(schedule)
    >>> trainer.fit(*spiral.load_data(), 4, 30, verbose=False, callbacks=[scheduler])
    >>> [row["lr"] for row in trainer.history]
    [1.0, 1.0, 0.1, 0.1]
    """

    state_names = ("steps",)

    def __init__(self, schedule: Callable[[int], float]) -> None:
        if not callable(schedule):
            raise TypeError(f"LearningRateScheduler: schedule must be a function of the steps taken, got {schedule!r}")
        self.schedule = schedule
        self.steps = 0

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless steps is an integer."""
        check_kinds(state, int, "steps")

    def reset(self) -> None:
        """Set the number of steps to 0."""
        self.steps = 0

    def on_begin(self, trainer: Any) -> None:
        """Set the rate of the next step."""
        trainer.optimizer.lr = self.schedule(self.steps)

    def on_step(self, trainer: Any) -> None:
        """Set the rate of the next step."""
        self.steps += 1
        trainer.optimizer.lr = self.schedule(self.steps)


class _Monitor(Callback):
    """Base class of the callbacks that follow a number in the rows of `trainer.history`."""

    monitor: str
    mode: str | None
    followed: str  # the target of `best`; monitor and mode may have been assigned since

    @property
    def needs_validation(self) -> bool:
        """Whether fit must be given validation data."""
        return self.monitor.startswith("val_")

    def _check_settings(self) -> None:
        """Check what may have been assigned."""
        name = type(self).__name__
        if not isinstance(self.monitor, str):
            raise TypeError(f"{name}: monitor must be a key of Trainer.history, got {self.monitor!r:.80}")
        if not (self.mode is None or (isinstance(self.mode, str) and self.mode in ("min", "max"))):
            raise ValueError(f'{name}: mode must be "min", "max" or None, got {self.mode!r:.80}')
        if self.mode is None and self.monitor not in _MODES:
            raise ValueError(f'{name}: mode must be "min" or "max" for {self.monitor}, as lower or higher is better')

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the state is that of the same number."""
        check_kinds(state, numbers.Real, "best")
        if state.get("followed", self._target) != self._target:
            raise ValueError(f"the saved best is the {state['followed']!s:.80}, here it is the {self._target}")

    def reset(self) -> None:
        """Discard the best value."""
        self.followed, self.best = self._target, math.inf * self._sign

    def on_begin(self, trainer: Any) -> None:
        """Check the settings, and discard the best value of another monitor or mode."""
        if self.followed != self._target:
            self.reset()

    @property
    def _target(self) -> str:
        """What `best` is, such as "lowest val_loss"."""
        self._check_settings()
        return f"{'lowest' if self._sign > 0 else 'highest'} {self.monitor}"

    @property
    def _sign(self) -> int:
        """1 if lower values are better, -1 if higher ones are."""
        return 1 if (self.mode or _MODES[self.monitor]) == "min" else -1

    def _improves(self, trainer: Any, min_delta: float = 0.0) -> bool:
        """Return whether the value of the last epoch is better than `best` by more than `min_delta`, and keep it."""
        row = trainer.history[-1]
        if self.monitor not in row:
            raise ValueError(
                f"{type(self).__name__}: the history has no {self.monitor}, only {', '.join(row)}; pass "
                "fit(metrics=...) or a callback before this one that adds it"
            )
        improves = (self.best - row[self.monitor]) * self._sign > min_delta
        if improves:
            self.best = row[self.monitor]
        return improves


class EarlyStopping(_Monitor):
    """Ends the training when the validation loss, or another number, has not improved for `patience` epochs.

    Every fit starts counting these epochs anew; the best value is kept between the fits of one model.

    Parameters
    ----------
    patience : int
        Epochs without improvement, at least 1.
    monitor : str
        The number to follow, a key of the rows of `Trainer.history`: "val_loss", "val_accuracy", "loss", or `"val_"`
        and the name of a metric.
    mode : "min", "max" or None
        Whether lower or higher values are better; None knows it for "loss", "val_loss" and "val_accuracy".
    min_delta : float
        A value that is better than the best one by no more than this is no improvement.

    Attributes
    ----------
    best : float
        The value at the last improvement.

    Examples
    --------
    >>> from nnx import Adam, Trainer, TwoLayerNet, callbacks, spiral
    >>> x, t = spiral.load_data()
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), Adam(1.0), rng=0)
    >>> stopping = callbacks.EarlyStopping(patience=2)
    >>> trainer.fit(x[::2], t[::2], 100, verbose=False, validation=(x[1::2], t[1::2]), callbacks=[stopping])
    >>> trainer.current_epoch < 100
    True
    """

    state_names = ("followed", "best", "epochs_without_improvement")

    def __init__(
        self, patience: int = 5, *, monitor: str = "val_loss", mode: str | None = None, min_delta: float = 0.0
    ) -> None:
        self.patience, self.monitor, self.mode, self.min_delta = patience, monitor, mode, min_delta
        self.reset()

    def _check_settings(self) -> None:
        super()._check_settings()
        check_integer("EarlyStopping: patience", self.patience)
        check_number("EarlyStopping: min_delta", self.min_delta, 0)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the state holds numbers, and is that of the same number."""
        super().check_state(state)
        check_kinds(state, numbers.Real, "epochs_without_improvement")

    def reset(self) -> None:
        """Discard the best value."""
        super().reset()
        self.epochs_without_improvement = 0

    def _bind_model(self, model: Any, *, resumed: bool) -> None:
        super()._bind_model(model, resumed=resumed)
        if not resumed:
            self.epochs_without_improvement = 0

    def on_epoch(self, trainer: Any) -> None:
        """Compare the value of the epoch with the best one."""
        improves = self._improves(trainer, self.min_delta)
        self.epochs_without_improvement = 0 if improves else self.epochs_without_improvement + 1
        if self.epochs_without_improvement >= self.patience:
            trainer.stop()
            limit = f"{'below' if self._sign > 0 else 'above'} {self.best - self._sign * self.min_delta:.4g}"
            trainer.log(
                f"EarlyStopping: stopped after epoch {trainer.current_epoch}; {self.monitor} has not been {limit} for "
                f"{self.patience} epochs"
            )


class BestWeights(_Monitor):
    """Keeps a copy of the weights with the lowest validation loss, or another best number, and restores it at the end.

    The running statistics of BatchNorm are kept and restored with them.

    Parameters
    ----------
    monitor, mode
        As for `EarlyStopping`.

    Attributes
    ----------
    best : float
        The best value.
    epoch : int
        The epoch of that value, counted from 1.

    Examples
    --------
    >>> from nnx import Adam, Trainer, TwoLayerNet, callbacks, spiral
    >>> x, t = spiral.load_data()
    >>> best = callbacks.BestWeights()
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), Adam(0.1), rng=0)
    >>> trainer.fit(x[::2], t[::2], 5, verbose=False, validation=(x[1::2], t[1::2]), callbacks=[best])
    >>> best.best == min(row["val_loss"] for row in trainer.history)
    True
    """

    state_names = ("followed", "best", "epoch", "weights")

    def __init__(self, *, monitor: str = "val_loss", mode: str | None = None) -> None:
        self.monitor, self.mode = monitor, mode
        self.reset()

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the state holds two numbers and floating arrays, and is that of the same number."""
        super().check_state(state)
        check_kinds(state, numbers.Real, "epoch")
        check_kinds(state, list, "weights")
        weights = state.get("weights", ())
        if not all(getattr(a, "dtype", numpy.dtype(int)).kind == "f" for a in weights):
            raise ValueError("weights must be floating arrays")
        if not weights and "weights" in state and math.isfinite(state["best"]):
            raise ValueError("the weights of the best value are missing")

    def reset(self) -> None:
        """Discard the copy."""
        super().reset()
        self.epoch = 0
        self.weights: list[Array] = []

    def on_begin(self, trainer: Any) -> None:
        """Raise a ValueError if the copy, restored from a checkpoint, does not fit the model."""
        super().on_begin(trainer)
        shapes, copied = ([a.shape for a in arrays] for arrays in (named_arrays(trainer.model).values(), self.weights))
        if copied and copied != shapes:
            raise ValueError(f"BestWeights: the saved weights have the shapes {copied}, and the model has {shapes}")

    def on_epoch(self, trainer: Any) -> None:
        """Copy the weights if the epoch's value is the best."""
        if self._improves(trainer):
            self.epoch = trainer.current_epoch
            self.weights = [a.copy() for a in named_arrays(trainer.model).values()]

    def on_end(self, trainer: Any) -> None:
        """Restore the best weights."""
        for a, best in zip(named_arrays(trainer.model).values(), self.weights, strict=bool(self.weights)):
            a[...] = best
        if self.weights:
            trainer.log(f"BestWeights: restored the weights of epoch {self.epoch}, {self.monitor} {self.best:.4g}")


class Checkpoint(Callback):
    """Saves checkpoints of a training to numbered files in a folder; `Trainer.resume` continues from them.

    A checkpoint is also saved at the end of fit, and when Ctrl-C or SIGTERM ends it. A failed write, for example to
    a full disk, issues a warning; training continues.

    Parameters
    ----------
    folder : str or Path
        Created if it does not exist. Use one folder per training run.
    every_epochs, every_steps : int or None
        How often to save; None disables this interval.
    keep : int
        The number of numbered files to keep; older ones are removed.
    best : bool
        With validation, also save the epoch with the lowest loss as `best.safetensors`.

    Attributes
    ----------
    path : Path or None
        The numbered file that was saved last.
    best_loss : float
        The validation loss of `best.safetensors`.

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, callbacks, spiral
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), 5, verbose=False, callbacks=[callbacks.Checkpoint("run")])
    >>> trainer.resume("run").name
    'epoch-0005-step-000000.safetensors'
    """

    state_names = ("best_loss",)

    def __init__(
        self,
        folder: str | Path,
        *,
        every_epochs: int | None = 1,
        every_steps: int | None = None,
        keep: int = 3,
        best: bool = True,
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()  # independent of the working directory
        self.every_epochs, self.every_steps, self.keep, self.best = every_epochs, every_steps, keep, best
        self.best_loss = math.inf
        self.path: Path | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("every_epochs", "every_steps", "keep"):
            value = getattr(self, name)
            if value is not None or name == "keep":
                check_integer(f"Checkpoint: {name}", value)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the lowest loss is a number."""
        check_kinds(state, numbers.Real, "best_loss")

    def reset(self) -> None:
        """Discard the lowest loss."""
        self.best_loss = math.inf

    def on_begin(self, trainer: Any) -> None:
        """Create the folder, check that it holds no other run, and remove the temporary files of a killed save."""
        import shutil  # noqa: PLC0415 - importing nnx imports nothing that only files need

        self._check_settings()
        self.path = None
        if trainer.comm.rank > 0:  # rank 0 saves
            return
        checkpoint.import_safetensors()
        checkpoint.optimizer_state(trainer.optimizer)  # raises now what a save would raise
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(f"{checkpoint.TEMP_PREFIX}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        saved = checkpoint.list_checkpoints(self.folder)
        if saved and checkpoint.parse_filename(saved[-1]) > (trainer.current_epoch, trainer.iteration):
            raise ValueError(
                f"Checkpoint: {saved[-1]} is later than epoch {trainer.current_epoch}, step {trainer.iteration}, where "
                "this training begins; continue it with Trainer.resume, or choose another folder"
            )

    def on_checkpoint(self, trainer: Any) -> None:
        """Save every `every_steps` steps and `every_epochs` epochs, after the last epoch, and the best one."""
        if trainer.iteration:
            count, every, last = trainer.current_epoch * trainer.max_iter + trainer.iteration, self.every_steps, False
        else:
            self._save_best(trainer)
            count, every, last = trainer.current_epoch, self.every_epochs, trainer.is_last_epoch
        if last or (every is not None and count % every == 0):
            self.on_interrupt(trainer)

    def on_interrupt(self, trainer: Any) -> None:
        """Save, and remove old files."""
        path = self.folder / checkpoint.make_filename(trainer.current_epoch, trainer.iteration)
        if self._save(trainer, path):
            self.path = path
            for old in checkpoint.list_checkpoints(self.folder)[: -self.keep]:
                self._remove(old)

    def on_end(self, trainer: Any) -> None:
        """Say which files were saved."""
        if self.path is not None:
            best = f", and val_loss {self.best_loss:.4g} as best.safetensors" if self.best_loss < math.inf else ""
            trainer.log(f"Checkpoint: saved {self.path}{best}")

    def _remove(self, old: Path) -> None:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            checkpoint.warn(f"Checkpoint: {old.name} could not be removed: {error}; training continues")

    def _save_best(self, trainer: Any) -> None:
        before, loss = self.best_loss, trainer.val_list[-1][0] if trainer.validation is not None else math.inf
        if self.best and loss < before:
            self.best_loss = loss  # before saving, because it is part of the state
            if not self._save(trainer, self.folder / "best.safetensors"):
                self.best_loss = before

    def _save(self, trainer: Any, path: Path) -> bool:
        if trainer.comm.rank > 0:
            return False
        try:
            checkpoint.save(path, trainer.model, trainer.optimizer, trainer)
        except OSError as error:
            checkpoint.warn(f"Checkpoint: {error}; training continues")
            return False
        return True


class CallbackList:
    """The callbacks of a fit, called in their order.

    Raises
    ------
    TypeError
        If `callbacks` is not an iterable of objects with at least one of the methods.
    """

    def __init__(self, callbacks: Any) -> None:
        self.callbacks = check_list("Trainer.fit: callbacks", callbacks, "callbacks")
        for callback in self.callbacks:
            if isinstance(callback, type):
                kind = callback.__name__
                raise TypeError(f"Trainer.fit: a callback must be an object, got the class {kind}; pass {kind}(...)")
            if not any(hasattr(callback, event) for event in _EVENTS):
                raise TypeError(f"Trainer.fit: a callback needs one of {', '.join(_EVENTS)}, {callback!r} has none")
            check_savable(type(callback).__name__, object_state(callback, unset_ok=True))
        self._hooks = {event: [*self._find_hooks(event)] for event in _EVENTS}

    def _find_hooks(self, event: str) -> Iterator[Callable[[Any], Any]]:
        """Yield the methods for `event` that do something."""
        for callback in self.callbacks:
            hook = getattr(callback, event, None)
            if hook is not None and getattr(hook, "__func__", None) is not getattr(Callback, event):
                yield hook

    def __call__(self, event: str, trainer: Any) -> None:
        """Call the methods for `event`."""
        for hook in self._hooks[event]:
            try:
                hook(trainer)
            except NestedInterrupt:  # of a fit in the callback; the signal is still pending
                continue

    def with_progress(self, verbose: bool | None) -> CallbackList:
        """Return these callbacks after one that shows progress, unless `verbose` is False; None is as in fit."""
        if verbose is False:
            return self
        bar = verbose is None and (_is_terminal() or _is_notebook())
        return CallbackList([ProgressBar() if bar else PrintLog(), *self.callbacks])

    def handles(self, *events: str) -> bool:
        """Return whether any callback has a method for one of `events`."""
        return any(self._hooks[event] for event in events)

    def check_validation(self, validation: Any) -> None:
        """Raise a ValueError if a callback needs validation data and there are none."""
        for callback in self.callbacks:
            if validation is None and getattr(callback, "needs_validation", False):
                kind = type(callback).__name__
                raise ValueError(f"{kind}: there are no validation data; pass fit(validation=(x, t))")

    def restore_states(self, model: Any, saved: list[Any] | None) -> None:
        """Reset callbacks that were used with another model; let each take the next saved state of its class.

        Raises
        ------
        ValueError
            If a state does not fit its class, before any callback is changed.
        """
        remaining, plan, mismatches = list(saved or ()), [], []
        for callback in self.callbacks:
            kind, current = type(callback).__name__, object_state(callback, unset_ok=True)
            state = next((s for s in remaining if s[0] == kind), None)
            names = attribute_names(callback, "state_names")
            if state is not None and names:
                remaining.remove(state)
                current = dict.fromkeys(names) | current  # None, for one not set yet, matches any kind
                mismatches += state_mismatches(kind, current, state[1]) or state_errors(kind, callback, state[1])
                plan.append((callback, state[1]))
        if mismatches:
            raise ValueError("\n  ".join(["Trainer.fit: the saved callbacks do not fit:", *mismatches]))
        for callback in self.callbacks:
            if isinstance(callback, Callback):
                callback._bind_model(model, resumed=saved is not None)
        for callback, values in plan:
            set_state(callback, to_device(values))

    @contextlib.contextmanager
    def running(self, trainer: Any) -> Iterator[None]:
        """Call on_begin, and at the end on_end of the callbacks that have begun."""
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                if hasattr(callback, "on_begin"):
                    callback.on_begin(trainer)
                if hasattr(callback, "on_end"):
                    stack.callback(callback.on_end, trainer)
            yield

    def state(self) -> list[Any]:
        """Return class name and state of each callback that has `state_names`."""
        return [
            [type(callback).__name__, object_state(callback)]
            for callback in self.callbacks
            if getattr(callback, "state_names", ())
        ]


def _is_terminal() -> bool:
    """Return whether stderr is a terminal; pythonw has none, and it may be closed."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
