"""Pictures: loss curve, points in the plane, decision regions. Matplotlib is imported when one is drawn.

Every function draws into the given `ax` or makes a figure, saves it where `path` is given, and
returns the Axes. No display is needed; in a script `matplotlib.pyplot.show()` opens the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from nnx.device import numeric, to_cpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_data", "plot_decision_regions", "plot_loss"]

_MARKERS = "ox^s*Dv+"


def plot_loss(
    loss_list: Sequence[float],
    *,
    interval: int = 1,
    ylim: tuple[float, float] | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Axes:
    """Draw losses over the iterations; each of `loss_list` stands for `interval` of them."""
    ax = _axes(ax)
    ax.plot(range(len(loss_list)), [float(loss) for loss in loss_list])
    ax.set(xlabel=f"iterations (x{interval})", ylabel="loss")
    if ylim is not None:
        ax.set_ylim(*ylim)
    return _save(ax, path)


def plot_data(x: Any, t: Any, *, ax: Axes | None = None, path: str | Path | None = None) -> Axes:
    """Draw points x (N, 2), a marker and a colour for each class; t are labels (N,) or one-hot (N, C)."""
    x, t = to_cpu(numeric(x, "plot_data: x")), to_cpu(numeric(t, "plot_data: t"))
    if x.ndim != 2 or x.shape[1] != 2 or len(x) != len(t):
        raise ValueError(f"plot_data: x must be (N, 2) and t have its N rows, got shapes {x.shape} and {t.shape}")
    t = t.argmax(axis=1) if t.ndim == 2 else t
    ax = _axes(ax)
    for label in numpy.unique(t):
        i = int(label)  # so that a class looks alike in every picture, also where another one is missing
        ax.scatter(
            x[t == label, 0],
            x[t == label, 1],
            s=20,
            color=f"C{i % 10}",
            marker=_MARKERS[i % len(_MARKERS)],
            label=str(label),
        )
    return _save(ax, path)


def plot_decision_regions(
    predict: Any, x: Any, t: Any, *, step: float = 0.01, ax: Axes | None = None, path: str | Path | None = None
) -> Axes:
    """Colour the plane around the points x (N, 2) by the class with the largest score, and draw the points.

    Parameters
    ----------
    predict : a model, or its `predict`: (N, 2) -> scores (N, C)
    t : labels (N,) or one-hot (N, C)
    step : float
        Distance of the grid points.
    """
    predict = getattr(predict, "predict", predict)
    points = to_cpu(numeric(x, "plot_decision_regions: x"))
    low, high = points.min(axis=0) - 0.1, points.max(axis=0) + 0.1
    grid = numpy.meshgrid(numpy.arange(low[0], high[0], step), numpy.arange(low[1], high[1], step))
    scores = to_cpu(predict(numpy.stack([axis.ravel() for axis in grid], axis=1)))
    ax = _axes(ax)
    classes = scores.shape[1]
    ax.contourf(
        *grid,
        scores.argmax(axis=1).reshape(grid[0].shape),
        levels=numpy.arange(classes + 1) - 0.5,
        colors=[f"C{i}" for i in range(classes)],
        alpha=0.3,
    )
    plot_data(points, t, ax=ax)
    return _save(ax, path)


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise ImportError("nnx.plotting draws with matplotlib: pip install matplotlib") from error
    return pyplot.figure().add_subplot() if ax is None else ax


def _save(ax: Axes, path: str | Path | None) -> Axes:
    if path is not None:
        ax.figure.savefig(path)  # type: ignore[union-attr]  # a SubFigure's own figure is its parent
    return ax
