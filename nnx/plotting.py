"""Plots of loss curves, labelled points in the plane and decision regions. N points, C classes.

Every function draws into `ax` or a new figure, saves the figure if `path` is given, and returns the Axes. A new figure
is closed after it is saved; without `path`, call `matplotlib.pyplot.show()` in a script to open the window. Matplotlib
is imported at the first plot; no display is needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from nnx.checks import check_integer, check_list, check_number, class_indices
from nnx.device import as_real_array, to_cpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_data", "plot_decision_regions", "plot_history", "plot_loss"]

_MARKERS = "ox^s*Dv+P"  # 9 markers and 20 colours: 180 distinct classes
_BATCH = 10_000  # grid points per call of predict
_MAX_PIXELS = 1000  # maximum grid points along an axis if `step` is None
_MAX_POINTS = 4_000_000  # maximum grid points for a given `step`; drawing them takes about 300 MB


def plot_loss(
    loss_list: Iterable[float],
    *,
    interval: int = 1,
    ylim: tuple[float, float] | None = None,
    ylabel: str = "loss",
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Plot `loss_list` over the iterations; each entry is the loss of `interval` iterations.

    Raises
    ------
    TypeError, ValueError
        If `loss_list` holds anything but numbers, `interval` is not an integer of at least 1, or `ylim` not a pair of
        finite numbers.

    Examples
    --------
    >>> from nnx import plotting
    >>> ax = plotting.plot_loss([1.1, 0.8, 0.6], interval=10, path="loss.png")
    >>> ax.get_xlabel()
    'iterations (x10)'
    """
    losses = []
    for loss in check_list("plot_loss: loss_list", loss_list, "numbers"):
        if not isinstance(loss, Real) and getattr(loss, "shape", None) != ():
            raise TypeError(f"plot_loss: loss_list must be a list of numbers, got {loss!r:.80} in it")
        losses.append(float(loss))
    check_integer("plot_loss: interval", interval)
    limits = _check_limits("plot_loss", ylim)
    with _axes(ax, path) as ax:
        ax.plot(range(len(losses)), losses)
        ax.set(xlabel=f"iterations (x{interval})", ylabel=ylabel, ylim=limits)
    return ax


def plot_history(
    history: Iterable[Mapping[str, float]],
    *,
    ylim: tuple[float, float] | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Plot the losses of training and validation over the epochs, from `trainer.history`.

    Raises
    ------
    TypeError, ValueError
        If `history` is not a list of dicts with "epoch" and "loss", or `ylim` is not a pair of finite numbers.

    Examples
    --------
    >>> from nnx import plotting
    >>> history = [{"epoch": 1, "loss": 1.1, "val_loss": 1.2}, {"epoch": 2, "loss": 0.8, "val_loss": 1.0}]
    >>> ax = plotting.plot_history(history, path="history.png")
    >>> [line.get_label() for line in ax.lines]
    ['training', 'validation']
    """
    rows = check_list("plot_history: history", history, "dicts")
    for row in rows:
        if not isinstance(row, Mapping) or not {"epoch", "loss"} <= row.keys():
            raise TypeError(f'plot_history: history must be a list of dicts with "epoch" and "loss", got {row!r:.80}')
    limits = _check_limits("plot_history", ylim)
    with _axes(ax, path) as ax:
        for key, label in (("loss", "training"), ("val_loss", "validation")):
            if points := [(row["epoch"], row[key]) for row in rows if key in row]:
                ax.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) == 1 else None)
        ax.set(xlabel="epochs", ylabel="loss", ylim=limits)
        if rows:
            ax.legend()
    return ax


def _check_limits(name: str, ylim: Any) -> list[float] | None:
    if ylim is None:
        return None
    limits = [check_number(f"{name}: ylim", y) for y in check_list(f"{name}: ylim", ylim, "two numbers")]
    if len(limits) != 2:
        raise ValueError(f"{name}: ylim must be a list of two numbers, got {len(limits)}")
    return limits


def plot_data(x: Any, t: Any, *, ax: Axes | None = None, path: str | Path | None = None) -> Axes:
    """Plot points with a marker and a colour for each class.

    Parameters
    ----------
    x : (N, 2)
    t : (N,) or (N, 1) integer labels, or (N, C) one-hot
        Labels may be any integers, including negative ones.
    ax : Axes or None
    path : str, Path or None

    Raises
    ------
    ValueError
        If shapes or labels are invalid, there are no points, or a coordinate is NaN or infinite.

    Examples
    --------
    >>> from nnx import plotting, spiral
    >>> ax = plotting.plot_data(*spiral.load_data(), path="spiral.png")
    """
    x, t = _check_points("plot_data", x, t)
    with _axes(ax, path) as ax:
        _scatter(ax, x, t)
    return ax


def plot_decision_regions(
    predict: Any,
    x: Any,
    t: Any,
    *,
    step: float | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Plot points over the plane coloured by predicted class.

    Parameters
    ----------
    predict : a model, or its `predict`
        A function of (M, 2) that returns scores (M, C), of which the largest gives the class; a single score,
        (M, 1) or (M,), with class 1 if it is >= 0, as for `layers.SigmoidWithLoss`; or integer classes (M,).
    x, t : as for `plot_data`
    step : float or None
        Spacing of the grid points along both axes; None uses one pixel.
    ax : Axes or None
    path : str, Path or None

    Raises
    ------
    ValueError
        As for `plot_data`; if `step` gives more than 4 million grid points; if `predict` returns an invalid shape
        or NaN.

    Examples
    --------
    >>> from nnx import TwoLayerNet, plotting, spiral
    >>> model = TwoLayerNet(2, 10, 3, rng=0)
    >>> ax = plotting.plot_decision_regions(model, *spiral.load_data(), path="regions.png")
    """
    x, t = _check_points("plot_decision_regions", x, t)
    predict = getattr(predict, "predict", predict)
    if not callable(predict):
        raise TypeError(f"plot_decision_regions: predict must be a model or a function, got {type(predict).__name__}")
    if step is not None and (isinstance(step, bool) or not (isinstance(step, Real) and 0 < step < math.inf)):
        raise ValueError(f"plot_decision_regions: step must be a positive number or None, got {step!r:.80}")
    with _axes(ax, path) as ax:
        columns, rows = _grid(x, ax, step)
        classes, index = numpy.unique(_predict_grid(predict, columns, rows), return_inverse=True)
        ax.contourf(
            columns,
            rows,
            index.reshape(len(rows), len(columns)),
            levels=numpy.arange(len(classes) + 1) - 0.5,
            colors=[_colour(int(c)) for c in classes],
            alpha=0.3,
        )
        _scatter(ax, x, t)
    return ax


def _check_points(name: str, x: Any, t: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return checked points (N, 2) in float64 and integer labels (N,) on the host."""
    x, t = to_cpu(as_real_array(x, f"{name}: x")), to_cpu(as_real_array(t, f"{name}: t"))
    if x.ndim != 2 or x.shape[1] != 2 or len(x) == 0:
        raise ValueError(f"{name}: x must be (N, 2), with at least one point, got shape {x.shape}")
    if t.ndim not in (1, 2) or len(t) != len(x) or t.size == 0:
        raise ValueError(
            f"{name}: t must be labels ({len(x)},) or one-hot ({len(x)}, C) for the {len(x)} points in x, "
            f"got shape {t.shape}"
        )
    x = x.astype(numpy.float64)
    if not (finite := numpy.isfinite(x).all(axis=1)).all():
        raise ValueError(f"{name}: x holds NaN or infinity, first in row {finite.argmin()}; remove such points")
    if t.size > len(t):
        return x, to_cpu(class_indices(t, t.shape, f"{name}: t"))
    if t.dtype.kind == "f":
        raise ValueError(f"{name}: t must hold integer labels, got {t.dtype}; convert them with t.astype(int)")
    return x, t.reshape(-1).astype(numpy.int64)  # bools too


def _grid(x: numpy.ndarray, ax: Axes, step: float | None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the coordinates of the columns and rows of a grid around the points `x`."""
    low, high = x.min(axis=0), x.max(axis=0)
    size = numpy.maximum(abs(low), abs(high))
    width = high - low
    width = numpy.where(width > 1e-12 * size, width, numpy.where(size > 0, size, 1))  # resolvable in float64
    low, high = low - 0.05 * width, high + 0.05 * width
    if step is None:
        extent = ax.get_window_extent()
        steps = numpy.clip([extent.width, extent.height], 2, _MAX_PIXELS) - 1
    else:
        with numpy.errstate(over="ignore"):
            steps = (high - low) / step
    counts = numpy.ceil(steps) + 1
    if counts.prod() > _MAX_POINTS:
        raise ValueError(
            f"plot_decision_regions: step={step} makes a grid of {counts[0]:.0f} x {counts[1]:.0f} points, more than "
            f"{_MAX_POINTS}; pass a larger step, or None for one point per pixel"
        )
    columns, rows = (
        numpy.minimum(a + numpy.arange(int(n)) * ((b - a) / s), b)
        for a, b, n, s in zip(low, high, counts, steps, strict=True)
    )
    return columns, rows


def _predict_grid(predict: Any, columns: numpy.ndarray, rows: numpy.ndarray) -> numpy.ndarray:
    """Return the predicted class of every grid point, in row-major order."""
    size, classes = len(columns) * len(rows), []
    for start in range(0, size, _BATCH):
        row, column = numpy.divmod(numpy.arange(start, min(start + _BATCH, size)), len(columns))
        scores = predict(numpy.stack([columns[column], rows[row]], axis=1))
        scores = to_cpu(as_real_array(scores, "plot_decision_regions: the result of predict"))
        if scores.ndim not in (1, 2) or len(scores) != len(row) or scores.size == 0:
            raise ValueError(
                f"plot_decision_regions: predict must return scores ({len(row)}, C) or ({len(row)},) for {len(row)} "
                f"points, got shape {scores.shape}"
            )
        if numpy.isnan(scores).any():
            raise ValueError("plot_decision_regions: predict returned NaN; check the weights of the model for NaN")
        if scores.size > len(scores):
            classes.append(scores.argmax(axis=1))
        else:
            scores = scores.reshape(-1)
            classes.append(scores >= 0 if scores.dtype.kind == "f" else scores)
    return numpy.concatenate(classes)


def _scatter(ax: Axes, x: numpy.ndarray, t: numpy.ndarray) -> None:
    for label in map(int, numpy.unique(t)):  # marker and colour depend on the label only, so they agree between plots
        points = x[t == label]
        marker = _MARKERS[label % len(_MARKERS)]
        ax.scatter(points[:, 0], points[:, 1], s=20, color=_colour(label), marker=marker, label=str(label))


def _colour(label: int) -> Any:
    """Return a colour of Matplotlib's default cycle for classes 0 to 9, its lighter version for 10 to 19."""
    from matplotlib import colormaps  # noqa: PLC0415 - optional dependency

    return colormaps["tab20"](2 * (label % 10) + label // 10 % 2)


@contextlib.contextmanager
def _axes(ax: Axes | None, path: str | Path | None) -> Iterator[Axes]:
    """Yield `ax` or the Axes of a new figure; save the figure if `path` is given and close a new one that is saved."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 - optional, slow to import
    except ImportError as error:
        raise ImportError("nnx.plotting requires matplotlib: pip install matplotlib") from error
    with contextlib.ExitStack() as stack:
        if ax is None:
            figure = pyplot.figure()
            stack.callback(pyplot.close, figure)
            ax = figure.add_subplot()
        yield ax
        if path is None:
            stack.pop_all()
        else:
            ax.get_figure(root=True).savefig(path)  # type: ignore[union-attr]  # None only for removed Axes
