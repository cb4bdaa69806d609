"""Losses: `forward(x, t)` returns a mean over the batch, `backward(dout=1)` its gradient by x.

N rows (all leading axes together), C classes. The loss is what the array module's reduction returns,
a NumPy scalar or a CuPy array without axes: nothing waits for the GPU until it is read.

Every loss takes weights: with weights w the mean of the losses l of the elements of t is the weighted
mean, sum(w * l) / sum(w). Where all weights are 0 the loss and its gradient are 0.
"""

from __future__ import annotations

from typing import Any

import numpy

from nnx.checks import as_floating, check_range, class_indices, loss_grad
from nnx.device import as_real_array, quiet
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
from nnx.np import Array, Scalar, np

__all__ = ["MeanSquaredError", "SigmoidWithLoss", "SoftmaxWithLoss"]


class _Loss:
    """What the losses have in common: no parameters, and the weights of the last forward.

    Attributes
    ----------
    weight : (M,) or None
        The weights of M equal groups of the elements of t, divided by their sum.
    weight_sum : 0-d, or None
        Their sum before, counted for each element: what the batch weighs beside others.
    """

    x: Array  # of the last forward
    t: Array
    weight: Array | None = None
    weight_sum: Scalar | None = None

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.grads: list[Array] = []

    def _set_weight(self, weight: Any, elements: Array | None = None) -> None:
        """Keep the argument `weight` of forward, None or of t's leading axes, times the weights of t's `elements`."""
        if weight is None and elements is None:
            self.weight = self.weight_sum = None
        else:
            self._normalize_weight(weight, elements)

    @quiet
    def _normalize_weight(self, weight: Any, elements: Array | None) -> None:
        """Divide the weights by their sum; until then they are float64, so that their scale makes no difference."""
        name, t = type(self).__name__, self.t
        if weight is not None:
            weight = _check_weight(as_real_array(weight, f"{name}: weight"), f"{name}: weight")
            if weight.ndim == 0 or weight.shape != t.shape[: weight.ndim]:
                raise ValueError(
                    f"{name}: weight must have the leading axes of t {t.shape}, one number for each row, "
                    f"got shape {weight.shape}"
                )
            weight = as_floating(weight, np.float64, name)
            if elements is not None:
                elements = elements * weight.reshape(*weight.shape, *[1] * (t.ndim - weight.ndim))
        weight = weight if elements is None else elements
        total = weight.sum()
        share = weight.reshape(-1) / np.where(total == 0, 1, total)
        self.weight = share.astype(accumulation_dtype(self.x.dtype), copy=False)
        self.weight_sum = total * (t.size // weight.size)


class _ClassLoss(_Loss):
    """A loss for labels: weights of the classes, and a label that is left out."""

    class_weight: Array | None = None
    ignore_label: int | None = None
    kept: Array | None = None  # where the labels of the last forward are not ignore_label

    def __init__(self, class_weight: Any = None, ignore_label: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if class_weight is not None:
            class_weight = _check_weight(as_real_array(class_weight, f"{name}: class_weight"), f"{name}: class_weight")
            if class_weight.ndim != 1:
                raise ValueError(f"{name}: class_weight must be one number a class, got shape {class_weight.shape}")
            class_weight = as_floating(class_weight, np.float64, name)
        if ignore_label is not None and not hasattr(ignore_label, "__index__"):
            raise TypeError(f"{name}: ignore_label must be an integer or None, got {ignore_label!r}")
        self.class_weight = class_weight
        self.ignore_label = ignore_label

    @property
    def is_weighted(self) -> bool:
        """Whether rows weigh unlike without weights that are passed to forward."""
        return self.class_weight is not None or self.ignore_label is not None

    def _weigh(self, weight: Any, classes: int) -> None:
        """Keep the weights of the elements of t, and replace the labels that are left out by 0."""
        self.kept = elements = None
        if self.ignore_label is not None:
            self.kept = self.t != self.ignore_label
            self.t = np.where(self.kept, self.t, 0)
            elements = self.kept.astype(np.float64)
        if self.class_weight is not None:
            if len(self.class_weight) != classes:
                raise ValueError(
                    f"{type(self).__name__}: class_weight must have a number for each of {classes} classes, "
                    f"got {len(self.class_weight)}"
                )
            of_labels = embedding(self.class_weight[:, None], self.t)[..., 0]
            elements = of_labels if elements is None else elements * of_labels
        self._set_weight(weight, elements)

    def _share(self, hits: Array) -> Scalar:
        """Return the share of `hits` among the labels that are not left out."""
        return hits.mean() if self.kept is None else (hits & self.kept).sum() / np.maximum(self.kept.sum(), 1)


class SoftmaxWithLoss(_ClassLoss):
    """Softmax and the cross entropy of its result: loss = -mean(log softmax(x)[t]).

    It is computed as mean(log(sum(exp(x - max))) - (x[t] - max)), so a probability that rounds to 0
    gives no infinite loss, and `backward` is its exact gradient, (y - onehot(t)) / N. (The book
    adds 1e-7 inside the logarithm, and not in its backward.)

    Parameters
    ----------
    class_weight : (C,) or None
        The weight of each class: the loss is the mean weighted by those of the labels.
    ignore_label : int or None
        Rows with this label count neither for the loss nor for the accuracy. It may lie outside [0, C).

    Shapes
    ------
    x : (..., C)    t : (...) integers in [0, C), or (..., C) one-hot integers or bools
    weight : the leading axes of (...), weights of the rows, at least 0

    Attributes
    ----------
    y : (..., C)
        softmax(x) of the last forward.
    t : (...)
        Its labels as indices.

    Raises
    ------
    ValueError
        If t or weight is none of these or the batch is empty. Labels and weights that lie on the GPU
        are not looked at, which would stop it: there a label out of range makes the loss NaN.
    """

    y: Array

    def prepare_targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return the labels `t` for scores of `shape` as indices, checked; `Trainer` calls it once for all data."""
        return class_indices(t, shape, "SoftmaxWithLoss", self.ignore_label)

    def forward(self, x: Any, t: Any, weight: Any = None) -> Scalar:
        """Return the loss."""
        self.x = x = as_floating(x, None, "SoftmaxWithLoss")
        self.t = self.prepare_targets(t, x.shape)
        self._weigh(weight, x.shape[-1])
        loss, self.y = softmax_loss(x, self.t, self.weight)
        return loss

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - onehot(t)) * dout / N, a new array at every call."""
        return softmax_loss_grad(self.y, self.t, loss_grad(self, dout), self.weight)

    def accuracy(self) -> Scalar:
        """Return the share of rows of the last forward that have their largest score at the label."""
        return self._share(self.x.argmax(axis=-1) == self.t)


class SigmoidWithLoss(_ClassLoss):
    """Sigmoid and the binary cross entropy of its result: loss = -mean(t * log(y) + (1 - t) * log(1 - y)).

    It is computed from the scores, as mean(log(1 + exp(z))) with z = -x where t is 1 and x where it
    is 0, so it is right however sure the scores are.

    Parameters
    ----------
    class_weight : (2,) or None
        The weights of the labels 0 and 1: the loss is the mean weighted by them.
    ignore_label : int or None
        Elements with this label count neither for the loss nor for the accuracy.

    Shapes
    ------
    x, t : equal; (N,) beside (N, 1) would broadcast and is refused. t holds 0 and 1, integers or bools.
    weight : the leading axes of t, weights of the rows, at least 0

    Attributes
    ----------
    y, t
        sigmoid(x) and the labels of the last forward.

    Raises
    ------
    ValueError
        If t or weight is anything else or the batch is empty. Labels and weights that lie on the GPU
        are not looked at, which would stop it: there a label that is neither 0 nor 1 makes the loss NaN.
    """

    y: Array

    def prepare_targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return the labels `t` for scores of `shape`, checked; `Trainer` calls it once for all data."""
        t = as_real_array(t, "SigmoidWithLoss")
        t = t.astype(np.int8) if t.dtype.kind == "b" else t
        t = check_range(t, 2, "SigmoidWithLoss", "labels", self.ignore_label)
        return _check_same_shape("SigmoidWithLoss", t, shape)

    def forward(self, x: Any, t: Any, weight: Any = None) -> Scalar:
        """Return the loss."""
        self.x = x = as_floating(x, None, "SigmoidWithLoss")
        self.t = self.prepare_targets(t, x.shape)
        self._weigh(weight, 2)
        loss, self.y = sigmoid_loss(x, self.t, self.weight)
        return loss

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - t) * dout / size, a new array at every call."""
        return sigmoid_loss_grad(self.y, self.t, loss_grad(self, dout), self.weight)

    def accuracy(self) -> Scalar:
        """Return the share of elements of the last forward whose score is on the side of the label: x >= 0 for 1."""
        return self._share((self.x >= 0) == self.t)


class MeanSquaredError(_Loss):
    """The mean of all squared differences, for regression: loss = mean((x - t)**2).

    Shapes
    ------
    x, t : equal; (N,) beside (N, 1) would broadcast and is refused
    weight : the leading axes of t, weights of the rows, at least 0

    Attributes
    ----------
    y, t
        The prediction x and the target of the last forward.

    Raises
    ------
    ValueError
        If the shapes differ or the batch is empty.
    """

    @property
    def y(self) -> Array:
        """The prediction of the last forward, x itself."""
        return self.x

    def prepare_targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return the targets `t` for predictions of `shape`, checked; `Trainer` calls it once for all data."""
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
    """Return the targets `t`, having checked that they have the `shape` of x and that the batch is not empty."""
    if t.shape != shape:
        raise ValueError(f"{name}: t must have the shape of x {shape}, got {t.shape}; use reshape")
    if t.size == 0:
        raise ValueError(f"{name}: the batch is empty, and a mean over nothing has no value")
    return t


def _check_weight(weight: Array, what: str) -> Array:
    """Return `weight`, having checked on the host that it holds finite numbers of at least 0."""
    if isinstance(weight, numpy.ndarray) and not (numpy.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError(f"{what} must hold finite numbers of at least 0; leave out a row with the weight 0")
    return weight
