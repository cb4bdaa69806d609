"""Loss layers: `forward(x, t)` returns a mean over the batch, `backward(dout=1)` its gradient with respect to x.

N rows (product of all leading axes), C classes. The loss is a NumPy scalar or a 0-d CuPy array; the GPU is not
synchronized until its value is read.

Every loss accepts weights w: the loss is then the weighted mean sum(w * l) / sum(w) of the losses l of the
elements of t. If all weights are 0, the loss and its gradient are 0.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy

from nnx.checks import as_floating, check_range, class_indices, loss_grad
from nnx.device import as_real_array, quiet
from nnx.functions import sigmoid, softmax
from nnx.kernels import (
    accumulation_dtype,
    embedding,
    sigmoid_loss,
    sigmoid_loss_grad,
    softmax_loss,
    softmax_loss_grad,
    squared_error,
    squared_error_grad,
)
from nnx.layers.base import BaseLayer
from nnx.np import Array, Scalar, np

__all__ = ["MeanSquaredError", "SigmoidWithLoss", "SoftmaxWithLoss"]


class _Loss(BaseLayer):
    """Base class of the losses: no parameters, and the weights of the last forward.

    Attributes
    ----------
    weight : (M,) or None
        Normalized weights, each for one of M equal groups of the elements of t.
    weight_sum : 0-d, or None
        Sum of the unnormalized weights over all elements of t: the weight of the batch relative to others.
    """

    batch_names = ("x", "t", "y", "weight", "kept")
    x: Array  # inputs of the last forward pass
    t: Array
    weight: Array | None = None
    weight_sum: Scalar | None = None

    def _set_weight(self, weight: Any, elements: Array | None = None) -> None:
        """Store `weight`, None or of the leading axes of t, times `elements`, None or one weight per element of t."""
        if weight is None and elements is None:
            self.weight = self.weight_sum = None
        else:
            self._normalize_weight(weight, elements)

    @quiet
    def _normalize_weight(self, weight: Any, elements: Array | None) -> None:
        """Divide the weights by their sum, in float64, so that their scale does not affect the result."""
        name, t = type(self).__name__, self.t
        if weight is not None:
            weight = _check_weight(as_real_array(weight, f"{name}: weight"), f"{name}: weight")
            if weight.ndim == 0 or weight.shape != t.shape[: weight.ndim]:
                raise ValueError(
                    f"{name}: weight must have the leading axes of t {t.shape}, one number per row, "
                    f"got shape {weight.shape}"
                )
            weight = as_floating(weight, np.float64, name)
            if elements is not None:
                elements = elements * weight.reshape(*weight.shape, *[1] * (t.ndim - weight.ndim))
        weight = weight if elements is None else elements
        total = weight.sum()
        normalized = weight.reshape(-1) / np.where(total == 0, 1, total)
        self.weight = normalized.astype(accumulation_dtype(self.x.dtype), copy=False)
        self.weight_sum = total * (t.size // weight.size)


class _ClassLoss(_Loss):
    """Base class of the classification losses: class weights, and a label to ignore."""

    class_weight: Array | None = None
    ignore_label: int | None = None
    kept: Array | None = None  # mask of the labels that are not ignored in the last forward

    def __init__(self, class_weight: Any = None, ignore_label: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if class_weight is not None:
            class_weight = _check_weight(as_real_array(class_weight, f"{name}: class_weight"), f"{name}: class_weight")
            if class_weight.ndim != 1:
                raise ValueError(f"{name}: class_weight must have one number per class, got shape {class_weight.shape}")
            class_weight = as_floating(class_weight, np.float64, name)
        if ignore_label is not None and (
            not isinstance(ignore_label, numbers.Integral) or isinstance(ignore_label, bool)
        ):
            raise TypeError(f"{name}: ignore_label must be an integer or None, got {ignore_label!r:.80}")
        self.class_weight = class_weight
        self.ignore_label = ignore_label

    @property
    def is_weighted(self) -> bool:
        """Whether rows are weighted even if no weight is passed to `forward`."""
        return self.class_weight is not None or self.ignore_label is not None

    def _apply_weights(self, weight: Any, classes: int) -> None:
        """Store the weights of the elements of t, and replace ignored labels by 0."""
        self.kept = elements = None
        if self.ignore_label is not None:
            self.kept = self.t != self.ignore_label
            self.t = np.where(self.kept, self.t, 0)
            elements = self.kept.astype(np.float64)
        if self.class_weight is not None:
            if len(self.class_weight) != classes:
                raise ValueError(
                    f"{type(self).__name__}: class_weight must have one number for each of the {classes} classes, "
                    f"got {len(self.class_weight)}"
                )
            label_weight = embedding(self.class_weight[:, None], self.t)[..., 0]
            elements = label_weight if elements is None else elements * label_weight
        self._set_weight(weight, elements)

    def _hit_rate(self, hits: Array) -> Scalar:
        """Return the fraction of `hits` among the labels that are not ignored."""
        return hits.mean() if self.kept is None else (hits & self.kept).sum() / np.maximum(self.kept.sum(), 1)


class SoftmaxWithLoss(_ClassLoss):
    """Softmax followed by cross-entropy loss: loss = -mean(log softmax(x)[t]).

    It is computed as mean(log(sum(exp(x - max))) - (x[t] - max)), so the loss is finite even if a probability
    rounds to 0, and `backward` is its exact gradient, (y - onehot(t)) / N. (The book adds 1e-7 inside the
    logarithm, but not in its backward.)

    Parameters
    ----------
    class_weight : (C,) or None
        Weight of each class; the loss is the mean weighted by the class weights of the labels.
    ignore_label : int or None
        Rows with this label are excluded from the loss and the accuracy. It may be outside [0, C).

    Shapes
    ------
    x : (..., C)    t : (...) integers in [0, C), or (..., C) one-hot integers or bools
    weight : leading axes of (...), weights of the rows, at least 0

    Attributes
    ----------
    y : (..., C)
        softmax(x) of the last forward.
    t : (...)
        Its labels as indices.

    Raises
    ------
    ValueError
        If t or weight is invalid or the batch is empty. Labels and weights on the GPU are not checked, to
        avoid a synchronization: a label out of range makes the loss NaN.

    Examples
    --------
    >>> from nnx import SoftmaxWithLoss
    >>> loss_layer = SoftmaxWithLoss()
    >>> print(f"{float(loss_layer.forward([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0, 2])):.4f}")
    0.8955
    >>> print(loss_layer.backward().round(3))
    [[-0.107  0.053  0.053]
     [ 0.106  0.288 -0.394]]
    >>> print(float(loss_layer.accuracy()))
    0.5
    """

    y: Array

    def prepare_targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return labels `t` for scores of `shape` as checked indices; `Trainer` calls this once for all data."""
        return class_indices(t, shape, type(self).__name__, self.ignore_label)

    def forward(self, x: Any, t: Any, weight: Any = None) -> Scalar:
        """Return the loss."""
        self.x = x = as_floating(x, None, type(self).__name__)
        self.t = self.prepare_targets(t, x.shape)
        self._apply_weights(weight, x.shape[-1])
        loss, self.y = softmax_loss(x, self.t, self.weight)
        return loss

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - onehot(t)) * dout / N, a new array at every call."""
        return softmax_loss_grad(self.y, self.t, loss_grad(self, dout), self.weight)

    def probabilities(self, x: Any) -> Array:
        """Return softmax(x), the probabilities of the classes for the scores x."""
        return softmax(x)

    def accuracy(self) -> Scalar:
        """Return the fraction of rows of the last forward whose largest score is at the label."""
        return self._hit_rate(self.x.argmax(axis=-1) == self.t)


class SigmoidWithLoss(_ClassLoss):
    """Sigmoid followed by binary cross-entropy loss: loss = -mean(t * log(y) + (1 - t) * log(1 - y)).

    It is computed from the scores, as mean(log(1 + exp(z))) with z = -x where t is 1 and z = x where t
    is 0, so it is accurate for scores of any magnitude.

    Parameters
    ----------
    class_weight : (2,) or None
        Weights of the labels 0 and 1; the loss is the mean weighted by them.
    ignore_label : int or None
        Elements with this label are excluded from the loss and the accuracy.

    Shapes
    ------
    x, t : same shape; (N,) with (N, 1) would broadcast and is rejected. t holds 0 and 1, integers or bools.
    weight : leading axes of t, weights of the rows, at least 0

    Attributes
    ----------
    y, t
        sigmoid(x) and the labels of the last forward.

    Raises
    ------
    ValueError
        If t or weight is invalid or the batch is empty. Labels and weights on the GPU are not checked, to
        avoid a synchronization: a label that is neither 0 nor 1 makes the loss NaN.

    Examples
    --------
    >>> from nnx import SigmoidWithLoss
    >>> loss_layer = SigmoidWithLoss()
    >>> print(f"{float(loss_layer.forward([2.0, -1.0], [1, 0])):.4f}")
    0.2201
    >>> print(loss_layer.backward().round(3), float(loss_layer.accuracy()))
    [-0.06   0.134] 1.0
    """

    y: Array

    def prepare_targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return checked labels `t` for scores of `shape`; `Trainer` calls this once for all data."""
        t = as_real_array(t, type(self).__name__)
        t = t.astype(np.int8) if t.dtype.kind == "b" else t
        t = check_range(t, 2, type(self).__name__, "labels", self.ignore_label)
        return _check_same_shape(type(self).__name__, t, shape)

    def forward(self, x: Any, t: Any, weight: Any = None) -> Scalar:
        """Return the loss."""
        self.x = x = as_floating(x, None, type(self).__name__)
        self.t = self.prepare_targets(t, x.shape)
        self._apply_weights(weight, 2)
        loss, self.y = sigmoid_loss(x, self.t, self.weight)
        return loss

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - t) * dout / size, a new array at every call."""
        return sigmoid_loss_grad(self.y, self.t, loss_grad(self, dout), self.weight)

    def probabilities(self, x: Any) -> Array:
        """Return sigmoid(x), the probability of label 1 for each score in x."""
        return sigmoid(x)

    def accuracy(self) -> Scalar:
        """Return the fraction of elements of the last forward whose prediction (1 if x >= 0) equals the label."""
        return self._hit_rate((self.x >= 0) == self.t)


class MeanSquaredError(_Loss):
    """Mean squared error, for regression: loss = mean((x - t)**2).

    Shapes
    ------
    x, t : same shape; (N,) with (N, 1) would broadcast and is rejected
    weight : leading axes of t, weights of the rows, at least 0

    Attributes
    ----------
    y, t
        The prediction x and the target of the last forward.

    Raises
    ------
    ValueError
        If the shapes differ or the batch is empty.

    Examples
    --------
    >>> from nnx import MeanSquaredError, np
    >>> loss_layer = MeanSquaredError()
    >>> print(loss_layer.forward([[1.0], [3.0]], [[0.0], [1.0]]))
    2.5
    >>> print(loss_layer.backward())
    [[1.]
     [2.]]
    """

    @property
    def y(self) -> Array:
        """The prediction of the last forward, x itself."""
        return self.x

    def prepare_targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return checked targets `t` for predictions of `shape`; `Trainer` calls this once for all data."""
        return _check_same_shape("MeanSquaredError", as_floating(t, None, "MeanSquaredError"), shape)

    def forward(self, x: Any, t: Any, weight: Any = None) -> Scalar:
        """Return the loss."""
        self.x = x = as_floating(x, None, "MeanSquaredError")
        self.t = as_floating(self.prepare_targets(t, x.shape), x.dtype, "MeanSquaredError")
        self._set_weight(weight)
        return squared_error(x, self.t, self.weight)

    def backward(self, dout: Any = 1) -> Array:
        """Return 2 * (x - t) * dout / size, a new array at every call."""
        return squared_error_grad(self.x, self.t, loss_grad(self, dout), self.weight)


def _check_same_shape(name: str, t: Array, shape: tuple[int, ...]) -> Array:
    """Return the targets `t`; raise if their shape is not `shape` or the batch is empty."""
    if not shape:
        raise ValueError(f"{name}: x must have at least one axis, the rows, got a single number")
    if t.shape != shape:
        raise ValueError(f"{name}: t must have the shape of x {shape}, got {t.shape}; use numpy.asarray(t).reshape")
    if t.size == 0:
        raise ValueError(f"{name}: the batch is empty, so the mean is undefined")
    return t


def _check_weight(weight: Array, what: str) -> Array:
    """Return `weight`; raise if a host array holds numbers that are negative, infinite or NaN."""
    if isinstance(weight, numpy.ndarray) and not (numpy.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError(f"{what} must hold finite numbers of at least 0; use weight 0 to exclude a row")
    return weight
