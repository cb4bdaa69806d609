"""What `Trainer.fit` calls on its way: progress, learning rates, early stopping, the best weights.

A callback is an object with some of the methods `on_begin`, `on_step`, `on_evaluate`, `on_epoch` and
`on_end`, each called with the trainer; `on_end` also after an error. `trainer.stop()` ends the training.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nnx.np import Array

__all__ = ["Bar", "BestWeights", "EarlyStopping", "LearningRate", "Lines", "running"]

_EVENTS = ("on_begin", "on_step", "on_evaluate", "on_epoch", "on_end")


class Lines:
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


class Bar:
    """Shows a tqdm bar over all steps, with epoch and loss."""

    def on_begin(self, trainer: Any) -> None:
        """Open the bar."""
        from tqdm import tqdm  # noqa: PLC0415 - importing nnx imports nothing that only a terminal needs

        self.bar = tqdm(total=(trainer.max_epoch - trainer.current_epoch) * trainer.max_iter, unit="step")

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


class LearningRate:
    """Sets `optimizer.lr` for each step to `schedule(steps taken)`.

    Parameters
    ----------
    schedule : function of an int
        See `optimizer.step_decay`, `cosine_decay` and `warm_up`.
    """

    def __init__(self, schedule: Callable[[int], float]) -> None:
        self.schedule = schedule
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

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be at least 1, got {patience}")
        self.patience = patience
        self.lowest = math.inf
        self.since = 0

    def on_epoch(self, trainer: Any) -> None:
        """Look at the epoch's validation loss."""
        loss = trainer.val_list[-1][0]
        self.since = 0 if loss < self.lowest else self.since + 1
        self.lowest = min(self.lowest, loss)
        if self.since >= self.patience:
            trainer.stop()


class BestWeights:
    """Keeps a copy of the weights with the lowest validation loss, and puts it back at the end.

    The running statistics of BatchNorm, which that loss depends on, go with them.

    Attributes
    ----------
    lowest : float
        Their validation loss.
    epoch : int
        The epoch after which they were seen, from 1.
    """

    needs_validation = True

    def __init__(self) -> None:
        self.lowest = math.inf
        self.epoch = 0
        self.weights: list[Array] = []

    def on_epoch(self, trainer: Any) -> None:
        """Copy the weights if the epoch's validation loss is the lowest."""
        loss = trainer.val_list[-1][0]
        if loss < self.lowest:
            self.lowest, self.epoch = loss, trainer.current_epoch
            self.weights = [a.copy() for a in _learned(trainer.model)]

    def on_end(self, trainer: Any) -> None:
        """Put the best weights back."""
        for a, best in zip(_learned(trainer.model), self.weights, strict=bool(self.weights)):
            a[...] = best


@contextlib.contextmanager
def running(trainer: Any, callbacks: Iterable[Any]) -> Iterator[Callable[[str], None]]:
    """Begin the callbacks, yield what calls those that have a method for an event, and end those that began."""
    callbacks = list(callbacks)
    for callback in callbacks:
        if not any(hasattr(callback, event) for event in _EVENTS):
            raise TypeError(f"Trainer.fit: a callback needs one of {', '.join(_EVENTS)}, {callback!r} has none")
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


def _learned(model: Any) -> list[Array]:
    """Return the parameters, and the running statistics of the layers, nested ones too."""
    return [*model.params, *_statistics(model)]


def _statistics(layer: Any) -> list[Array]:
    own = [getattr(layer, name) for name in ("running_mean", "running_var") if hasattr(layer, name)]
    return own + [a for inner in getattr(layer, "layers", ()) for a in _statistics(inner)]
