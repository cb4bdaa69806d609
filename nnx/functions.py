"""The chapter's functions on arrays of any number of axes.

N rows (all leading axes together), C classes: the last axis. A floating dtype is kept, integers
become `result_type(x, float32)`; host arrays and lists are moved to the active device.
"""

from __future__ import annotations

from typing import Any

import numpy

from nnx import kernels
from nnx.device import asfloat, numeric
from nnx.np import Array, Scalar, np

_INT64 = numpy.dtype("int64")

__all__ = ["cross_entropy_error", "relu", "sigmoid", "softmax"]


def sigmoid(x: Any) -> Array:
    """Return 1 / (1 + exp(-x)), elementwise and without overflow.

    Results below the smallest normal number of the dtype may be 0.
    """
    x = asfloat(x, None, "sigmoid")
    return kernels.sigmoid(x.reshape(x.shape or 1)).reshape(x.shape)


def relu(x: Any) -> Array:
    """Return max(x, 0), elementwise; NaN stays NaN."""
    return kernels.relu(asfloat(x, None, "relu"))


def softmax(x: Any) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis.

    The maximum is subtracted first, so nothing overflows. Where it is infinite the result is the
    limit: infinite scores share the weight of their row.
    """
    return kernels.softmax(asfloat(x, None, "softmax"))


def cross_entropy_error(y: Any, t: Any) -> Scalar:
    """Return the mean of -log(y[t]) over the rows of the probabilities `y`.

    Parameters
    ----------
    y : (N, C) or (C,)
        Probabilities. One of exactly 0 at the label gives an infinite loss; the source adds 1e-7
        inside the logarithm. `layers.SoftmaxWithLoss` starts from scores and has neither problem.
    t : (N,) or (N, C); for one row an integer or (C,)
        Labels, as for `class_indices`.
    """
    y = asfloat(y, None, "cross_entropy_error")
    t = class_indices(t, y.shape, "cross_entropy_error")
    picked = np.take_along_axis(y, t[..., None], -1)
    with numpy.errstate(divide="ignore", under="ignore"):
        return -np.log(picked).mean()


def class_indices(
    t: Any, shape: tuple[int, ...], name: str = "class_indices", ignore_label: int | None = None
) -> Array:
    """Return the labels `t` for scores of `shape` (..., C) as indices of shape (...).

    Parameters
    ----------
    t : integers in [0, C) of shape (...), or one-hot rows (integers or bools) of `shape`
        Checked where they lie on the host. To look at labels on the GPU would stop it: there only
        shape and dtype are checked, and the loss turns a label out of range into NaN.
    name : str
        Opens the messages.
    ignore_label : int or None
        A label that is taken too, wherever it lies.

    Raises
    ------
    ValueError
        If shape, dtype or values are none of these, or the batch is empty.
    """
    if type(t) is Array and t.dtype is _INT64 and t.shape == shape[:-1] and t.size and kernels.in_range(t, shape[-1]):
        return t  # as at nearly every call
    t = numeric(t, name)
    if not shape:
        raise ValueError(f"{name}: scores must have an axis for the classes, got a single number")
    rows, classes = shape[:-1], shape[-1]
    kind = t.dtype.kind
    if kind not in "iub":
        hint = "; use argmax(axis=-1)" if t.shape == shape else "; convert them with astype(int)"
        raise ValueError(f"{name}: labels must be integers in [0, {classes}) or one-hot, got {t.dtype} {t.shape}{hint}")
    if t.size == 0:
        raise ValueError(f"{name}: the batch is empty, and a mean over no rows has no value")
    if t.shape == rows:
        _check_range(t, classes, name, "labels", ignore_label)
        indices = t if kind == "i" else t.astype(np.int64)
    elif t.shape == shape:
        indices = t.argmax(axis=-1)
        if isinstance(t, numpy.ndarray) and not _is_one_hot(t, indices):
            raise ValueError(f"{name}: every one-hot row must hold a single 1 among zeros")
    else:
        raise ValueError(
            f"{name}: labels must be integers of shape {rows} or one-hot of shape {shape}, got shape {t.shape}"
        )
    return indices if isinstance(indices, Array) else np.asarray(indices)


def check_range(idx: Any, stop: int, name: str, what: str, ignored: int | None = None) -> Array:
    """Return `idx` as an integer array of the array module; on the host its values must lie in [0, stop).

    Those that are `ignored` are not looked at.
    """
    idx = numeric(idx, name)
    if idx.dtype.kind not in "iu":
        raise ValueError(f"{name}: {what} must be integers in [0, {stop}), got {idx.dtype}")
    _check_range(idx, stop, name, what, ignored)
    return np.asarray(idx)


def _check_range(idx: Array, stop: int, name: str, what: str, ignored: int | None = None) -> None:
    if ignored is not None:
        idx = idx[idx != ignored] if isinstance(idx, numpy.ndarray) else idx
    if not kernels.in_range(idx, stop):
        low, high = idx.min(), idx.max()
        raise ValueError(f"{name}: {what} must lie in [0, {stop}), got {low if low < 0 else high}")


def _is_one_hot(t: numpy.ndarray, indices: numpy.ndarray) -> bool:
    ones = numpy.take_along_axis(t, indices[..., None], -1)
    return bool(numpy.all(ones == 1)) and numpy.count_nonzero(t) == indices.size
