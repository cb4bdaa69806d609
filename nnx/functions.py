"""The functions of the chapter, for arrays of any number of axes.

N rows (product of all leading axes), C classes (last axis). A floating dtype is kept, integers
become `result_type(x, float32)`; host arrays and lists are converted to the array module.
"""

from __future__ import annotations

from typing import Any

import numpy

from nnx import kernels
from nnx.checks import as_floating, as_scores, class_indices
from nnx.np import Array, Scalar, np

_INT64 = numpy.dtype("int64")

__all__ = ["cross_entropy_error", "relu", "sigmoid", "softmax"]


def sigmoid(x: Any) -> Array:
    """Return 1 / (1 + exp(-x)), elementwise, without overflow.

    Results below the smallest normal number of the dtype may be flushed to 0.

    Examples
    --------
    >>> from nnx.functions import sigmoid
    >>> print(sigmoid([-1000.0, 0.0, 1.0]).round(3))
    [0.    0.5   0.731]
    """
    return kernels.sigmoid(as_floating(x, None, "sigmoid"))


def relu(x: Any) -> Array:
    """Return max(x, 0), elementwise; NaN propagates.

    Examples
    --------
    >>> from nnx.functions import relu
    >>> print(relu([-1.0, 0.0, 1.0]))
    [0. 0. 1.]
    """
    return kernels.relu(as_floating(x, None, "relu"))


def softmax(x: Any) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis.

    The maximum is subtracted first to avoid overflow. If the maximum is infinite, the result is the
    limit: the elements equal to +inf share the probability mass of their row equally.

    Examples
    --------
    >>> from nnx.functions import softmax
    >>> print(softmax([0.0, 1.0, 2.0]).round(3))
    [0.09  0.245 0.665]
    """
    return kernels.softmax(as_scores(x, "softmax"))


def cross_entropy_error(y: Any, t: Any) -> Scalar:
    """Return the mean of -log(y[t]) over the rows of `y`.

    Parameters
    ----------
    y : (N, C) or (C,)
        Probabilities. One of exactly 0 at the label gives an infinite loss, a negative one NaN; the book adds
        1e-7 inside the logarithm. `layers.SoftmaxWithLoss` computes the loss from scores and needs neither.
    t : (N,) or (N, C); for one row an integer or (C,)
        Labels, as for `class_indices`.

    Examples
    --------
    >>> from nnx.functions import cross_entropy_error
    >>> y = [[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]]
    >>> print(f"{float(cross_entropy_error(y, [0, 1])):.4f}")
    0.5249
    >>> print(f"{float(cross_entropy_error(y, [[1, 0, 0], [0, 1, 0]])):.4f}")
    0.5249
    """
    y = as_floating(y, None, "cross_entropy_error")
    t = class_indices(t, y.shape, "cross_entropy_error")
    picked = np.take_along_axis(y, t[..., None], -1)
    with numpy.errstate(divide="ignore", invalid="ignore", under="ignore"):
        return -np.log(picked).mean()
