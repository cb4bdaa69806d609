"""The progress of a training: counters, losses and history, which checkpoints hold."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy

from nnx.np import np
from nnx.tree import check_kinds

__all__ = ["TrainState", "WeightedMean"]

_COUNTS = ("epoch", "iteration", "first_epoch", "rows", "batch_size", "max_iter", "stop")
_MEANS = ("losses", "epoch_losses", "recent_losses")


class WeightedMean:
    """The mean of batch losses, weighted by batch size.

    There is one total per batch size, on the device, so that a step costs one addition.
    """

    def __init__(self, state: Iterable[Any] = ()) -> None:
        state = list(state)
        self.totals: dict[int, Any] = {int(rows): _float64(total) for rows, total, _ in state}
        self.counts: dict[int, int] = {int(rows): int(count) for rows, _, count in state}

    def state(self) -> numpy.ndarray:
        """Return one row (batch size, sum of losses, number of losses) per batch size."""
        rows = [(n, float(total), self.counts[n]) for n, total in self.totals.items()]
        return numpy.array(rows, numpy.float64).reshape(-1, 3)

    def add(self, loss: Any, rows: int) -> None:
        """Add the mean loss of a batch of `rows` rows."""
        if rows in self.totals:
            self.totals[rows] += loss
            self.counts[rows] += 1
        else:
            self.totals[rows] = _float64(loss)
            self.counts[rows] = 1

    def merge(self, state: numpy.ndarray) -> None:
        """Add losses by their `state`, on the host."""
        for rows, total, count in state.tolist():
            self.totals[rows] = self.totals.get(rows, 0.0) + total
            self.counts[rows] = self.counts.get(rows, 0) + int(count)

    def value(self) -> float:
        """Return the mean."""
        total = sum(rows * float(total) for rows, total in self.totals.items())
        return total / sum(rows * count for rows, count in self.counts.items())


def _float64(loss: Any) -> Any:
    """Return `loss` in float64: a NumPy scalar, whose addition is faster than an array's, or a CuPy array."""
    return np.array(loss, np.float64)[()]


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
        The losses of the last steps, which are not yet in the other two.
    epoch_losses, recent_losses : WeightedMean
        The losses of this epoch, and those since the last evaluation.
    lr : float or None
        The learning rate at the beginning of this epoch.
    loss_list, val_list, history : lists
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
    epoch_losses: WeightedMean = dataclasses.field(default_factory=WeightedMean)
    recent_losses: WeightedMean = dataclasses.field(default_factory=WeightedMean)
    lr: float | None = None
    loss_list: list[float] = dataclasses.field(default_factory=list)
    val_list: list[tuple[float, float | None]] = dataclasses.field(default_factory=list)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def check_resume(self, rows: int, batch_size: int, max_iter: int, max_epoch: int) -> None:
        """Raise a ValueError unless a fit with these sizes can continue the saved one."""
        before, now = (self.rows, self.batch_size, self.max_iter), (rows, batch_size, max_iter)
        if self.iteration and (before[:2] != now[:2] or (before[2] != now[2] and before[2] and now[2])):
            raise ValueError(
                f"Trainer.fit: the saved epoch has {before[0]} rows in {before[2]} batches of {before[1]}, got "
                f"{now[0]} rows in {now[2]} batches of {now[1]}; finish it as it began"
            )
        begun = self.epoch + (self.iteration > 0) - (self.first_epoch or 0)
        if begun > max_epoch:
            raise ValueError(
                f"Trainer.fit: the saved fit has begun {begun} epochs; max_epoch counts these too, got {max_epoch}"
            )

    def begin(self, rows: int, batch_size: int, max_iter: int, *, resumed: bool) -> None:
        """Begin a fit of epochs of these sizes, or continue the saved one."""
        if not resumed:
            self.first_epoch, self.iteration, self.stop = self.epoch, 0, False
            self._reset_losses()
        self.rows, self.batch_size, self.max_iter = rows, batch_size, max_iter

    def end(self) -> None:
        """End a fit and discard what only a resumed fit needs."""
        self.first_epoch, self.stop, self.permutation = None, False, self.permutation[:0].copy()
        self._reset_losses()

    def begin_epoch(self, permutation: numpy.ndarray, lr: Any) -> None:
        """Begin an epoch with its order of rows and learning rate."""
        self.permutation, self.lr = permutation, None
        # A user-defined optimizer may have no lr, or one that is not a number.
        with contextlib.suppress(TypeError, ValueError):
            self.lr = float(lr)

    def mean_loss(self) -> float:
        """Return the mean loss since the last evaluation, and reset it."""
        self._collect_losses()
        mean, self.recent_losses = self.recent_losses.value(), WeightedMean()
        return mean

    def epoch_loss(self) -> float:
        """Return the mean loss of this epoch so far."""
        self._collect_losses()
        return self.epoch_losses.value()

    def _collect_losses(self) -> None:
        """Read the losses of the last steps from the device, once."""
        state, self.losses = self.losses.state(), WeightedMean()
        self.epoch_losses.merge(state)
        self.recent_losses.merge(state)

    def end_epoch(self, seconds: float) -> None:
        """Count the epoch, and append its row to the history."""
        rate = {} if self.lr is None else {"lr": self.lr}
        self.history.append({"epoch": self.epoch + 1, "loss": self.epoch_loss(), **rate, "seconds": seconds})
        self.epoch_losses = WeightedMean()
        self.max_iter, self.epoch, self.iteration = self.iteration, self.epoch + 1, 0

    def add_validation(self, loss: float, accuracy: float | None, metrics: Mapping[str, float] | None = None) -> None:
        """Append the result of `evaluate` to `val_list`, and to the row of the last epoch."""
        loss, accuracy = float(loss), None if accuracy is None else float(accuracy)
        self.val_list.append((loss, accuracy))
        results = {"loss": loss, "accuracy": accuracy, **(metrics or {})}
        self.history[-1] |= {f"val_{name}": value for name, value in results.items() if value is not None}

    def _reset_losses(self) -> None:
        self.losses, self.epoch_losses, self.recent_losses = WeightedMean(), WeightedMean(), WeightedMean()

    def to_dict(self) -> dict[str, Any]:
        """Return the state as numbers and arrays."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            **{name: self.epoch if value is None else int(value) for name, value in counts.items()},
            **{name: getattr(self, name).state() for name in _MEANS},
            "lr": math.nan if self.lr is None else self.lr,
            "loss_list": numpy.array(self.loss_list, numpy.float64),
            "val_list": numpy.array(self.val_list, numpy.float64).reshape(-1, 2),  # None, no accuracy, is NaN
            "history": _to_columns(self.history),
            "permutation": self.permutation[len(self.permutation) - self._rows_left() :],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TrainState:
        """Return the state that `to_dict` returned as `state`; raise a ValueError if it is not valid."""
        check_kinds(state, int, *_COUNTS)
        check_kinds(state, numpy.ndarray, "loss_list", "val_list", "permutation", *_MEANS)
        check_kinds(state, float, "lr")
        check_kinds(state, dict, "history")
        pairs, means = state["val_list"], {name: state[name] for name in _MEANS}
        if pairs.shape[1:] != (2,) or not all(
            mean.shape[1:] == (3,) and numpy.isfinite(mean[:, ::2]).all() for mean in means.values()
        ):
            raise ValueError("invalid losses")
        self = cls(**{name: state[name] for name in _COUNTS})
        self.losses = WeightedMean(means["losses"])
        self.epoch_losses.merge(means["epoch_losses"])
        self.recent_losses.merge(means["recent_losses"])
        self.stop, self.permutation = bool(self.stop), state["permutation"]
        self.lr = None if math.isnan(state["lr"]) else state["lr"]
        self.loss_list = state["loss_list"].tolist()
        self.val_list = [(loss, None if math.isnan(hits) else hits) for loss, hits in pairs.tolist()]
        self.history = _from_columns(state["history"])
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


def _to_columns(history: list[dict[str, float]]) -> dict[str, Any]:
    """Return the number of rows, and an array of pairs (number of the row, value) for each key, which rows may lack."""
    columns: dict[str, list[tuple[int, float]]] = {}
    for i, row in enumerate(history):
        for key, value in row.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(f"Trainer.history: {key} of row {i} must be a number, got {value!r:.80}")
            columns.setdefault(key, []).append((i, value))
    return {"rows": len(history), "columns": {key: numpy.array(pairs, float) for key, pairs in columns.items()}}


def _from_columns(history: dict[str, Any]) -> list[dict[str, float]]:
    """Return the rows of `_to_columns`; raise a ValueError for columns that are not valid."""
    count, columns = history.get("rows"), history.get("columns")
    if type(count) is not int or not 0 <= count < 1 << 24 or not isinstance(columns, dict):
        raise ValueError("invalid history")
    check_kinds(columns, numpy.ndarray, *columns)
    if not all(pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype.kind == "f" for pairs in columns.values()):
        raise ValueError("invalid history")
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    for key, pairs in columns.items():
        indices = pairs[:, 0]
        if not (numpy.isin(indices, numpy.arange(len(rows))).all() and (numpy.diff(indices) > 0).all()):
            raise ValueError(f"invalid history: {key}")
        for i, value in pairs.tolist():
            rows[int(i)][key] = int(value) if key == "epoch" and math.isfinite(value) else value
    return rows
