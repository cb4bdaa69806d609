"""What `Trainer.fit` calls on its way: progress, learning rates, early stopping, best weights, checkpoints.

A callback is an object with some of the methods `on_begin`, `on_evaluate`, `on_step`, `on_epoch`, `on_checkpoint`,
`on_interrupt` and `on_end`, each called with the trainer; `on_checkpoint` after the `on_step` and `on_epoch` of all
callbacks, when all ranks have heard of a stop, `on_interrupt` next, where a signal has come, `on_end` also
after an error. `trainer.stop()` ends the training. Attributes that are to go into checkpoints are named in
`state_names`, a class attribute: numbers, strings, arrays, lists of these. One that has followed a model and is
given to the training of another is told by `reset()`, if it has that.
"""

from __future__ import annotations

import contextlib
import math
import operator
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nnx import checkpoint, storage
from nnx.np import Array
from nnx.tree import attribute_names, named_state

__all__ = ["BestWeights", "Checkpoint", "EarlyStopping", "LearningRateScheduler", "PrintLog", "ProgressBar"]

_EVENTS = ("on_begin", "on_evaluate", "on_step", "on_epoch", "on_checkpoint", "on_interrupt", "on_end")


class PrintLog:
    """Prints the source's line of text at every evaluation."""

    def on_begin(self, trainer: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_evaluate(self, trainer: Any) -> None:
        """Print epoch, iteration, seconds and loss."""
        print(  # noqa: T201 - its purpose
            f"| epoch {trainer.current_epoch + 1} |  iter {trainer.iteration} / {trainer.max_iter} "
            f"| time {time.perf_counter() - self.start:.0f}[s] | loss {trainer.loss_list[-1]:.2f}"
        )


class ProgressBar:
    """Shows a tqdm bar over all steps, with epoch and loss."""

    def on_begin(self, trainer: Any) -> None:
        """Open the bar."""
        from tqdm import tqdm  # noqa: PLC0415 - importing nnx imports nothing that only a terminal needs

        steps = (trainer.max_epoch - trainer.current_epoch) * trainer.max_iter
        self.bar = tqdm(total=steps, initial=trainer.iteration, unit="step")

    def on_step(self, trainer: Any) -> None:
        """Count a step."""
        self.bar.update()

    def on_evaluate(self, trainer: Any) -> None:
        """Show epoch and loss."""
        text = f"epoch {trainer.current_epoch + 1}, loss {trainer.loss_list[-1]:.2f}"
        self.bar.set_postfix_str(text, refresh=False)

    def on_end(self, trainer: Any) -> None:
        """Close the bar."""
        self.bar.close()


class LearningRateScheduler:
    """Sets `optimizer.lr` for each step to `schedule(steps taken)`.

    Parameters
    ----------
    schedule : function of an int
        See `optimizer.step_decay`, `cosine_decay` and `linear_warmup`.
    """

    state_names = ("steps",)

    def __init__(self, schedule: Callable[[int], float]) -> None:
        if not callable(schedule):
            raise TypeError(f"LearningRateScheduler: schedule must be a function of the steps taken, got {schedule!r}")
        self.schedule = schedule
        self.steps = 0

    def reset(self) -> None:
        """Forget the steps taken."""
        self.steps = 0

    def on_begin(self, trainer: Any) -> None:
        """Set the rate of the next step."""
        trainer.optimizer.lr = self.schedule(self.steps)

    def on_step(self, trainer: Any) -> None:
        """Set the rate of the next step."""
        self.steps += 1
        trainer.optimizer.lr = self.schedule(self.steps)


class EarlyStopping:
    """Ends the training when the validation loss has not been lower for `patience` epochs.

    Parameters
    ----------
    patience : int
        Epochs without a new lowest loss, 1 or more.
    """

    needs_validation = True
    state_names = ("best_loss", "epochs_without_improvement")

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be at least 1, got {patience}")
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forget the losses seen."""
        self.best_loss, self.epochs_without_improvement = math.inf, 0

    def on_epoch(self, trainer: Any) -> None:
        """Look at the epoch's validation loss."""
        loss = trainer.val_list[-1][0]
        self.epochs_without_improvement = 0 if loss < self.best_loss else self.epochs_without_improvement + 1
        self.best_loss = min(self.best_loss, loss)
        if self.epochs_without_improvement >= self.patience:
            trainer.stop()


class BestWeights:
    """Keeps a copy of the weights with the lowest validation loss, and puts it back at the end.

    The run_callbacks statistics of BatchNorm, which that loss depends on, go with them.

    Attributes
    ----------
    best_loss : float
        Their validation loss.
    epoch : int
        The epoch after which they were seen, from 1.
    """

    needs_validation = True
    state_names = ("best_loss", "epoch", "weights")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the weights."""
        self.best_loss, self.epoch = math.inf, 0
        self.weights: list[Array] = []

    def on_epoch(self, trainer: Any) -> None:
        """Copy the weights if the epoch's validation loss is the lowest."""
        loss = trainer.val_list[-1][0]
        if loss < self.best_loss:
            self.best_loss, self.epoch = loss, trainer.current_epoch
            self.weights = [a.copy() for a in _model_state(trainer.model)]

    def on_end(self, trainer: Any) -> None:
        """Put the best weights back."""
        for a, best in zip(_model_state(trainer.model), self.weights, strict=bool(self.weights)):
            a[...] = best


class Checkpoint:
    """Saves the training into numbered files of a folder, from which `Trainer.resume` goes on as if never stopped.

    A file is saved at the end of fit too, and when Ctrl-C or SIGTERM ends it. One that cannot be written,
    for example to a full disk, is a warning, and the training goes on.

    Parameters
    ----------
    folder : str or Path
        Made if need be. It holds one training: one that begins anew needs another folder.
    every_epochs, every_steps : int or None
        How often to save; None never by this measure.
    keep : int
        How many of the numbered files to keep, the newest.
    best : bool
        With validation, save the epoch of the lowest loss as `best.safetensors` too.

    Attributes
    ----------
    path : Path or None
        The numbered file saved last.
    best_loss : float
        The validation loss of `best.safetensors`.
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
        for name, value in (("every_epochs", every_epochs), ("every_steps", every_steps), ("keep", keep)):
            if (value is not None or name == "keep") and operator.index(value) < 1:  # type: ignore[arg-type]
                raise ValueError(f"Checkpoint: {name} must be at least 1, got {value}")
        self.folder = Path(folder).absolute()  # wherever a callback goes
        self.every_epochs, self.every_steps, self.keep, self.best = every_epochs, every_steps, keep, best
        self.best_loss = math.inf
        self.path: Path | None = None

    def reset(self) -> None:
        """Forget the lowest loss."""
        self.best_loss = math.inf

    def on_begin(self, trainer: Any) -> None:
        """Make the folder, see that it holds no other training, and remove what a killed save left."""
        import shutil  # noqa: PLC0415 - importing nnx imports nothing that only files need

        if trainer.comm.rank > 0:  # rank 0 saves
            return
        storage.import_safetensors()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{storage.TEMP_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        there = checkpoint.list_checkpoints(self.folder)
        if there and checkpoint.parse_filename(there[-1]) > (trainer.current_epoch, trainer.iteration):
            raise ValueError(
                f"Checkpoint: {there[-1]} is later than epoch {trainer.current_epoch}, step {trainer.iteration}, where "
                "this training begins; go on from it with Trainer.resume, or choose another folder"
            )

    def on_checkpoint(self, trainer: Any) -> None:
        """Save after every `every_steps` steps, every `every_epochs` epochs and the last one; and the best one."""
        if trainer.iteration:
            count, every, last = trainer.current_epoch * trainer.max_iter + trainer.iteration, self.every_steps, False
        else:
            self._save_best(trainer)
            count, every, last = trainer.current_epoch, self.every_epochs, trainer.is_last_epoch
        if last or (every is not None and count % every == 0):
            self.on_interrupt(trainer)

    def on_interrupt(self, trainer: Any) -> None:
        """Save, and remove what is no longer to be kept."""
        path = self.folder / f"epoch-{trainer.current_epoch:04d}-step-{trainer.iteration:06d}.safetensors"
        if self._save(trainer, path):
            self.path = path
            for old in checkpoint.list_checkpoints(self.folder)[: -self.keep]:
                old.unlink(missing_ok=True)

    def _save_best(self, trainer: Any) -> None:
        before, loss = self.best_loss, trainer.val_list[-1][0] if trainer.validation is not None else math.inf
        if self.best and loss < before:
            self.best_loss = loss  # first, as it is saved too
            if not self._save(trainer, self.folder / "best.safetensors"):
                self.best_loss = before

    def _save(self, trainer: Any, path: Path) -> bool:
        if trainer.comm.rank > 0:
            return False
        try:
            checkpoint.save(path, trainer.model, trainer.optimizer, trainer)
        except OSError as error:
            storage.warn(f"Checkpoint: {error}; the training goes on")
            return False
        return True


def _model_state(model: Any) -> list[Array]:
    """Return the arrays of `model` that training changes: its parameters, each once, and run_callbacks statistics."""
    return list(named_state(model)[0].values())


_models: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # which the callbacks followed last


def reset_if_new_model(model: Any, callbacks: list[Any]) -> None:
    """Let `callbacks` follow the training of `model`; one that followed another forgets that, if it can `reset`."""
    for callback in callbacks:
        if hasattr(callback, "reset"):
            if callback in _models and _models[callback]() is not model:
                callback.reset()
            _models[callback] = weakref.ref(model) if hasattr(model, "__weakref__") else lambda: model


def as_callback_list(callbacks: Any) -> list[Any]:
    """Return `callbacks` as a list, having checked that each is an object with at least one of the methods."""
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"Trainer.fit: callbacks must be a list of callbacks, got {callbacks!r}; pass [callback]")
    callbacks = list(callbacks)
    for callback in callbacks:
        if isinstance(callback, type):
            name = callback.__name__
            raise TypeError(f"Trainer.fit: a callback must be an object, got the class {name}; make one: {name}(...)")
        if not any(hasattr(callback, event) for event in _EVENTS):
            raise TypeError(f"Trainer.fit: a callback needs one of {', '.join(_EVENTS)}, {callback!r} has none")
    return callbacks


@contextlib.contextmanager
def run_callbacks(trainer: Any, callbacks: list[Any]) -> Iterator[Callable[[str], None]]:
    """Begin the callbacks, yield what calls those that have a method for an event, and end those that began."""
    for callback in callbacks:
        attribute_names(callback, "state_names")
        if getattr(callback, "needs_validation", False) and trainer.validation is None:
            name = type(callback).__name__
            raise ValueError(f"{name}: there is no validation loss to follow; pass fit(validation=(x, t))")
    methods = {event: [getattr(c, event) for c in callbacks if hasattr(c, event)] for event in _EVENTS}

    def call(event: str) -> None:
        for method in methods[event]:
            method(trainer)

    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if hasattr(callback, "on_begin"):
                callback.on_begin(trainer)
            if hasattr(callback, "on_end"):
                stack.callback(callback.on_end, trainer)
        yield call


def load_callback_states(callbacks: list[Any], saved: Any) -> None:
    """Let `callbacks` go on from what was saved of them: each takes the next state of its class.

    Raises
    ------
    ValueError
        For a state that is none of that class, before any is taken.
    """
    left = list(saved)
    plan = []
    for callback in callbacks:
        name = type(callback).__name__
        state = next((s for s in left if s[0] == name), None)
        if state is not None and hasattr(callback, "state_names"):
            left.remove(state)
            mine = {n: getattr(callback, n) for n in attribute_names(callback, "state_names")}
            if lines := checkpoint.structure_mismatches(name, mine, state[1]):
                raise ValueError("\n  ".join(["Trainer.fit: what was saved of the callbacks does not fit:", *lines]))
            plan += [(callback, n, value) for n, value in state[1].items()]
    for callback, name, value in plan:
        setattr(callback, name, value)
