"""The kernels in words that NumPy and CuPy share: the reference for `cpu` and `cuda`.

N rows (all leading axes together), C classes; arrays have at least one axis. A kernel owns the
arrays that it makes and works on them in place; it writes into no argument unless its sentence says
so. NumPy's floating-point warnings are off exactly where an infinity is the right intermediate;
CuPy has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from nnx.np import Array, np

__all__ = [
    "add_bias",
    "bias_grad",
    "clip_grads",
    "relu_grad",
    "sgd",
    "sigmoid",
    "sigmoid_grad",
    "softmax",
    "softmax_grad",
    "softmax_loss",
    "softmax_loss_grad",
    "tanh_grad",
]


def add_bias(y: Array, b: Array) -> None:
    """Add `b` (H,) to every row of `y` (N, H), in place."""
    np.add(y, b, out=y)


def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,)."""
    np.sum(dout, axis=0, dtype=_wide(dout.dtype), out=out)


@numpy.errstate(over="ignore")
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose reciprocal is 0."""
    y = np.negative(x, dtype=_wide(x.dtype))
    np.exp(y, out=y)
    np.add(y, 1, out=y)
    np.reciprocal(y, out=y)
    return y.astype(x.dtype, copy=False)


def sigmoid_grad(dout: Array, y: Array) -> Array:
    """Return dout * y * (1 - y)."""
    dx = np.subtract(1, y)
    dx *= y
    dx *= dout
    return dx


def relu_grad(dout: Array, y: Array) -> Array:
    """Return `dout` where y > 0, else 0 (also where `dout` is infinite)."""
    return np.where(y > 0, dout, 0)


def tanh_grad(dout: Array, y: Array) -> Array:
    """Return dout * (1 - y**2)."""
    dx = np.multiply(y, y)
    np.subtract(1, dx, out=dx)
    dx *= dout
    return dx


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    y = _shifted(x)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y.astype(x.dtype, copy=False)


def softmax_grad(dout: Array, y: Array) -> Array:
    """Return y * (dout - sum(dout * y)) over the last axis."""
    dx = dout * y
    dx -= y * dx.sum(axis=-1, keepdims=True)
    return dx


def softmax_loss(x: Array, t: Array) -> tuple[Array, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    A label outside [0, C) makes its row of softmax(x), and so the loss, NaN.
    """
    y = _shifted(x)
    classes = x.shape[-1]
    valid = ((t >= 0) & (t < classes))[..., None]
    picked = np.take_along_axis(y, np.where(valid, t[..., None], 0), -1)
    np.exp(y, out=y)
    total = y.sum(axis=-1, keepdims=True)
    loss = np.where(valid, np.log(total) - picked, np.nan).mean()
    np.divide(y, np.where(valid, total, np.nan), out=y)
    return loss.astype(x.dtype), y.astype(x.dtype, copy=False)


def softmax_loss_grad(y: Array, t: Array, dout: Any) -> Array:
    """Return (y - onehot(t)) * dout / N, the gradient of `softmax_loss` by x."""
    dx = np.subtract(y, t[..., None] == np.arange(y.shape[-1]), dtype=y.dtype)
    return np.multiply(dx, dout / t.size, out=dx)


def sgd(params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
    """Subtract lr * grad from every parameter, in place."""
    for p, g in zip(params, grads, strict=True):
        np.subtract(p, lr * g, out=p)


def clip_grads(grads: Sequence[Array], max_norm: float) -> None:
    """Scale all of `grads` by max_norm / norm where their common norm exceeds `max_norm`, in place.

    The sum of squares is float64: it overflows for no float32 gradient.
    """
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads))
    rate = np.minimum(max_norm / (norm + 1e-6), 1.0)
    for g in grads:
        np.multiply(g, rate, out=g)


@numpy.errstate(invalid="ignore")
def _shifted(x: Array) -> Array:
    """Return x - max(x) over the last axis, and 0 at the maximum also where that is infinite.

    So an infinite score takes all the weight, as in the limit, and equal infinities share it.
    """
    x = x.astype(_wide(x.dtype), copy=False)
    top = x.max(axis=-1, keepdims=True)
    y = np.subtract(x, top)
    np.copyto(y, 0, where=x == top)
    return y


def _wide(dtype: Any) -> Any:
    """Return the dtype to compute in: float32 for float16, whose range ends at 65504."""
    return np.float32 if dtype == np.float16 else dtype
