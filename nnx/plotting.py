"""Plots: loss curve, points in the plane, decision regions. N points, C classes.

Every function draws into the given `ax` or into a new figure, saves the figure where `path` is given, and returns
the Axes. A new figure that was saved is closed; without `path`, in a script, `matplotlib.pyplot.show()` opens the
window. Matplotlib is imported by the first plot; no display is needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from nnx.checks import class_indices
from nnx.device import as_real_array, to_cpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_data", "plot_decision_regions", "plot_loss"]

_MARKERS = "ox^s*Dv+P"  # 9 and 20 colours: 180 classes that all look different
_BATCH = 10_000  # grid points that are predicted at a time
_MAX_PIXELS = 1000  # grid points along an axis, unless `step` asks for more
_MAX_POINTS = 4_000_000  # of a grid with a given `step`: about 300 MB while it is drawn


def plot_loss(
    loss_list: Iterable[float],
    *,
    interval: int = 1,
    ylim: tuple[float, float] | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Draw losses over the iterations; each of `loss_list` stands for `interval` of them."""
    losses = [float(loss) for loss in loss_list]
    with _axes(ax, path) as ax:
        ax.plot(range(len(losses)), losses)
        ax.set(xlabel=f"iterations (x{interval})", ylabel="loss")
        if ylim is not None:
            ax.set_ylim(*ylim)
    return ax


def plot_data(x: Any, t: Any, *, ax: Axes | None = None, path: str | Path | None = None) -> Axes:
    """Draw points, with a marker and a colour for each class.

    Parameters
    ----------
    x : (N, 2)
    t : (N,) or (N, 1) integer labels, or (N, C) one-hot
        A label may be any integer, also negative.
    ax : Axes or None
    path : str, Path or None

    Raises
    ------
    ValueError
        For shapes or labels other than these, no points, or points with NaN or infinity.
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
    """Colour the plane around the points by the class that is predicted there, and draw the points.

    Parameters
    ----------
    predict : a model, or its `predict`
        A function of (M, 2) that returns scores (M, C), where the largest is the class; one score, (M, 1) or (M,),
        where the class is 1 from 0 on, as for `layers.SigmoidWithLoss`; or the classes themselves, integers (M,).
    x, t : as for `plot_data`
    step : float or None
        Distance of the grid points along both axes; None makes it a pixel.
    ax : Axes or None
    path : str, Path or None

    Raises
    ------
    ValueError
        As `plot_data`; for a `step` that makes more than 4 million grid points; if `predict` returns another shape,
        or NaN.
    """
    x, t = _check_points("plot_decision_regions", x, t)
    predict = getattr(predict, "predict", predict)
    if not callable(predict):
        raise TypeError(f"plot_decision_regions: predict must be a model or a function, got {type(predict).__name__}")
    if step is not None and not (isinstance(step, Real) and 0 < step < math.inf):
        raise ValueError(f"plot_decision_regions: step must be a positive number or None, got {step!r}")
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
    """Return points (N, 2) in float64 and integer labels (N,) on the host."""
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
        raise ValueError(f"{name}: x holds NaN or infinity, first in row {finite.argmin()}; leave out such points")
    if t.size > len(t):
        return x, to_cpu(class_indices(t, t.shape, f"{name}: t"))
    if t.dtype.kind == "f":
        raise ValueError(f"{name}: t must hold integer labels, got {t.dtype}; convert them with t.astype(int)")
    return x, t.reshape(-1).astype(numpy.int64)  # bools too


def _grid(x: numpy.ndarray, ax: Axes, step: float | None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the coordinates of the columns and the rows of a grid around the points `x`."""
    low, high = x.min(axis=0), x.max(axis=0)
    size = numpy.maximum(abs(low), abs(high))
    width = high - low
    width = numpy.where(width > 1e-12 * size, width, numpy.where(size > 0, size, 1))  # of a grid that float64 resolves
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
            f"{_MAX_POINTS}; pass a larger one, or None for one point per pixel"
        )
    columns, rows = (
        numpy.minimum(a + numpy.arange(int(n)) * ((b - a) / s), b)
        for a, b, n, s in zip(low, high, counts, steps, strict=True)
    )
    return columns, rows


def _predict_grid(predict: Any, columns: numpy.ndarray, rows: numpy.ndarray) -> numpy.ndarray:
    """Return the class of every grid point, row after row."""
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
            raise ValueError("plot_decision_regions: predict returns NaN; look for NaN in the weights of the model")
        if scores.size > len(scores):
            classes.append(scores.argmax(axis=1))
        else:
            scores = scores.reshape(-1)
            classes.append(scores >= 0 if scores.dtype.kind == "f" else scores)
    return numpy.concatenate(classes)


def _scatter(ax: Axes, x: numpy.ndarray, t: numpy.ndarray) -> None:
    for label in map(int, numpy.unique(t)):  # a class looks alike in every plot, also where another one is missing
        points = x[t == label]
        marker = _MARKERS[label % len(_MARKERS)]
        ax.scatter(points[:, 0], points[:, 1], s=20, color=_colour(label), marker=marker, label=str(label))


def _colour(label: int) -> Any:
    """Return Matplotlib's ten colours for classes 0 to 9, and their lighter versions for 10 to 19."""
    from matplotlib import colormaps  # noqa: PLC0415 - an extra

    return colormaps["tab20"](2 * (label % 10) + label // 10 % 2)


@contextlib.contextmanager
def _axes(ax: Axes | None, path: str | Path | None) -> Iterator[Axes]:
    """Yield `ax` or the Axes of a new figure, and save it; the new figure stays open only if it is not saved."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ImportError("nnx.plotting draws with matplotlib: pip install matplotlib") from error
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
