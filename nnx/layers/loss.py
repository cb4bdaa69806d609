"""Losses: `forward(x, t)` returns a mean over the batch, `backward(dout=1)` its gradient by x.

N rows (all leading axes together), C classes. The loss is what the active module's reduction
returns, a NumPy scalar or a CuPy array without axes: nothing waits for the GPU until it is read.
"""

from __future__ import annotations

from typing import Any

from nnx.device import asfloat, numeric
from nnx.functions import check_range, class_indices
from nnx.kernels import sigmoid, softmax_loss, softmax_loss_grad
from nnx.kernels.portable import wide
from nnx.np import Array, Scalar, np

__all__ = ["MeanSquaredError", "SigmoidWithLoss", "SoftmaxWithLoss"]


class SoftmaxWithLoss:
    """Softmax and the cross entropy of its result: loss = -mean(log softmax(x)[t]).

    It is computed as mean(log(sum(exp(x - max))) - (x[t] - max)), so a probability that rounds to 0
    gives no infinite loss, and `backward` is its exact gradient, (y - onehot(t)) / N. (The source
    adds 1e-7 inside the logarithm, and not in its backward.)

    Shapes
    ------
    x : (..., C)    t : (...) integers in [0, C), or (..., C) one-hot integers or bools

    Attributes
    ----------
    y : (..., C)
        softmax(x) of the last forward.
    t : (...)
        Its labels as indices.

    Raises
    ------
    ValueError
        If t is none of these or the batch is empty. Labels that lie on the GPU are not looked at,
        which would stop it: there a label out of range makes the loss NaN.
    """

    y: Array
    t: Array

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.grads: list[Array] = []

    def targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return the labels `t` for scores of `shape` as indices, checked; `Trainer` calls it once for all data."""
        return class_indices(t, shape, "SoftmaxWithLoss")

    def forward(self, x: Any, t: Any) -> Scalar:
        """Return the loss."""
        x = asfloat(x, None, "SoftmaxWithLoss")
        self.t = self.targets(t, x.shape)
        loss, self.y = softmax_loss(x, self.t)
        return loss

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - onehot(t)) * dout / N, a new array at every call."""
        return softmax_loss_grad(self.y, self.t, dout)

    def accuracy(self) -> Scalar:
        """Return the share of rows of the last forward that have their largest score at the label."""
        return (self.y.argmax(axis=-1) == self.t).mean()


class SigmoidWithLoss:
    """Sigmoid and the binary cross entropy of its result: loss = -mean(t * log(y) + (1 - t) * log(1 - y)).

    It is computed from the scores, as mean(log(1 + exp(z))) with z = -x where t is 1 and x where it
    is 0, so it is right however sure the scores are.

    Shapes
    ------
    x, t : equal; (N,) beside (N, 1) would broadcast and is refused. t holds 0 and 1, integers or bools.

    Attributes
    ----------
    y, t
        sigmoid(x) and the labels of the last forward.

    Raises
    ------
    ValueError
        If t is anything else or the batch is empty. Labels that lie on the GPU are not looked at,
        which would stop it: there one that is neither 0 nor 1 makes the loss NaN.
    """

    y: Array
    t: Array

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.grads: list[Array] = []

    def targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return the labels `t` for scores of `shape`, checked; `Trainer` calls it once for all data."""
        t = numeric(t, "SigmoidWithLoss")
        t = check_range(t.astype(np.int8) if t.dtype.kind == "b" else t, 2, "SigmoidWithLoss", "labels")
        return _alike("SigmoidWithLoss", t, shape)

    def forward(self, x: Any, t: Any) -> Scalar:
        """Return the loss."""
        x = asfloat(x, None, "SigmoidWithLoss")
        self.t = self.targets(t, x.shape)
        x = np.where((self.t == 0) | (self.t == 1), x, np.nan)  # other labels can only come from the GPU
        self.y = sigmoid(x)
        z = np.where(self.t == 1, -x, x)
        return (np.maximum(z, 0) + np.log1p(np.exp(-abs(z)))).mean()

    def backward(self, dout: Any = 1) -> Array:
        """Return (y - t) * dout / size, a new array at every call."""
        dx = np.subtract(self.y, self.t, dtype=self.y.dtype)
        return np.multiply(dx, dout / dx.size, out=dx)

    def accuracy(self) -> Scalar:
        """Return the share of elements of the last forward whose probability is on the side of the label."""
        return ((self.y >= 0.5) == self.t).mean()


class MeanSquaredError:
    """The mean of all squared differences, for regression: loss = mean((x - t)**2).

    Shapes
    ------
    x, t : equal; (N,) beside (N, 1) would broadcast and is refused

    Attributes
    ----------
    y, t
        The prediction x and the target of the last forward.

    Raises
    ------
    ValueError
        If the shapes differ or the batch is empty.
    """

    y: Array
    t: Array

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.grads: list[Array] = []

    def targets(self, t: Any, shape: tuple[int, ...]) -> Array:
        """Return the targets `t` for predictions of `shape`, checked; `Trainer` calls it once for all data."""
        return _alike("MeanSquaredError", asfloat(t, None, "MeanSquaredError"), shape)

    def forward(self, x: Any, t: Any) -> Scalar:
        """Return the loss."""
        self.y = asfloat(x, None, "MeanSquaredError")
        self.t = asfloat(self.targets(t, self.y.shape), self.y.dtype, "MeanSquaredError")
        return np.square(self.y - self.t, dtype=wide(self.y.dtype)).mean().astype(self.y.dtype)

    def backward(self, dout: Any = 1) -> Array:
        """Return 2 * (y - t) * dout / size, a new array at every call."""
        dx = self.y - self.t
        return np.multiply(dx, 2 * dout / dx.size, out=dx)


def _alike(name: str, t: Array, shape: tuple[int, ...]) -> Array:
    """Return the targets `t`, having checked that they have the `shape` of x and that the batch is not empty."""
    if t.shape != shape:
        raise ValueError(f"{name}: t must have the shape of x {shape}, got {t.shape}; use reshape")
    if t.size == 0:
        raise ValueError(f"{name}: the batch is empty, and a mean over nothing has no value")
    return t
