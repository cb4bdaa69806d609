"""The chapter's functions on arrays of any number of axes.

N rows (all leading axes together), C classes: the last axis. A floating dtype is kept, integers
become `result_type(x, float32)`; host arrays and lists are moved to the active device.
"""

from __future__ import annotations

from typing import Any

import numpy

from nnx import kernels
from nnx.checks import as_floating, class_indices
from nnx.np import Array, Scalar, np

_INT64 = numpy.dtype("int64")

__all__ = ["cross_entropy_error", "relu", "sigmoid", "softmax"]


def sigmoid(x: Any) -> Array:
    """Return 1 / (1 + exp(-x)), elementwise and without overflow.

    Results below the smallest normal number of the dtype may be 0.
    """
    x = as_floating(x, None, "sigmoid")
    return kernels.sigmoid(x.reshape(x.shape or 1)).reshape(x.shape)


def relu(x: Any) -> Array:
    """Return max(x, 0), elementwise; NaN stays NaN."""
    return kernels.relu(as_floating(x, None, "relu"))


def softmax(x: Any) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis.

    The maximum is subtracted first, so nothing overflows. Where it is infinite the result is the
    limit: infinite scores share the weight of their row.
    """
    return kernels.softmax(as_floating(x, None, "softmax"))


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
    y = as_floating(y, None, "cross_entropy_error")
    t = class_indices(t, y.shape, "cross_entropy_error")
    picked = np.take_along_axis(y, t[..., None], -1)
    with numpy.errstate(divide="ignore", under="ignore"):
        return -np.log(picked).mean()
