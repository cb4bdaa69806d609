"""The kernels in words that NumPy and CuPy share: the reference for `cpu` and `cuda`.

N rows (all leading axes together), C classes; arrays have at least one axis. A kernel owns the
arrays that it makes and works on them in place; it writes into no argument unless its sentence says
so. NumPy's floating-point warnings are off exactly where an infinity is the right intermediate;
CuPy has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy

from nnx.np import Array, Scalar, np

Arrays: TypeAlias = Sequence[Array]

__all__ = [
    "adagrad",
    "adam",
    "add_bias",
    "bias_grad",
    "clip_grads",
    "dropout",
    "embedding",
    "embedding_grad",
    "gelu",
    "gelu_grad",
    "momentum",
    "nesterov",
    "relu_grad",
    "rmsprop",
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
    y += b


def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,)."""
    np.sum(dout, axis=0, dtype=wide(dout.dtype), out=out)


@numpy.errstate(over="ignore", under="ignore")
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose reciprocal is 0."""
    y = np.negative(x, dtype=wide(x.dtype))
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


def gelu(x: Array) -> Array:
    """Return x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 * x**3)."""
    tanh, c, _ = _gelu_terms(x)
    return (np.where(x < 0, c, x) * (0.5 * (1 + tanh))).astype(x.dtype, copy=False)


def gelu_grad(dout: Array, x: Array) -> Array:
    """Return dout * (1 + tanh(u) + x * (1 - tanh(u)**2) * du/dx) / 2."""
    tanh, c, du = _gelu_terms(x)
    return (dout * (0.5 * (1 + tanh + c * (1 - tanh * tanh) * du))).astype(x.dtype, copy=False)


def _gelu_terms(x: Array) -> tuple[Array, Array, Array]:
    """Return tanh(u), x clipped to where tanh(u) is neither 1 nor -1 exactly, and du/dx."""
    c = np.clip(x.astype(wide(x.dtype), copy=False), -20, 20)
    cc = c * c
    root = math.sqrt(2 / math.pi)
    return np.tanh(root * c * (1 + 0.044715 * cc)), c, root * (1 + 3 * 0.044715 * cc)


def dropout(x: Array, ratio: float, seed: int, call: int) -> Array:
    """Return `x` with a share `ratio` of its elements 0, chosen by a hash of seed, call and index (in C order)."""
    *keys, threshold = dropout_keys(ratio, seed, call)
    bits = np.arange(x.size, dtype=np.uint32)
    for key in keys:
        bits ^= np.uint32(key)
        bits ^= bits >> 16
        bits *= np.uint32(0x7FEB352D)
        bits ^= bits >> 15
        bits *= np.uint32(0x846CA68B)
        bits ^= bits >> 16
    return np.where(bits.reshape(x.shape) >= np.uint32(threshold), x, 0)


def dropout_keys(ratio: float, seed: int, call: int) -> tuple[int, int, int]:
    """Return two keys of 32 bits for the hash, by splitmix64, and the smallest hash with which an element is kept."""
    mask64 = 0xFFFFFFFFFFFFFFFF
    z = (seed + 0x9E3779B97F4A7C15 * call) & mask64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask64
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32, math.floor(ratio * 2**32)


def embedding(W: Array, idx: Array) -> Array:
    """Return W[idx]; an index outside [0, V) gives a row of NaN."""
    valid = ((idx >= 0) & (idx < len(W)))[..., None]
    return np.where(valid, W.take(np.where(valid[..., 0], idx, 0), axis=0), np.nan)


def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    """Write into row i of `out` (V, H) the sum of the rows of `dout` (N, H) where idx (N,) is i."""
    total = out if out.itemsize > 2 else np.empty(out.shape, wide(out.dtype))
    total[...] = 0
    np.add.at(total, idx, dout)
    out[...] = total


@numpy.errstate(under="ignore")
def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    y = _shifted(x)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y.astype(x.dtype, copy=False)


def softmax_grad(dout: Array, y: Array) -> Array:
    """Return y * (dout - sum(dout * y)) over the last axis."""
    dx = dout * y
    dx -= y * dx.sum(axis=-1, keepdims=True, dtype=wide(y.dtype))
    return dx


@numpy.errstate(under="ignore")
def softmax_loss(x: Array, t: Array) -> tuple[Scalar, Array]:
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


# The optimizers: each formula for every parameter p, its gradient g and its state, in place.


def sgd(params: Arrays, grads: Arrays, lr: float) -> None:
    """p -= lr * g."""
    for p, g in zip(params, grads, strict=True):
        np.subtract(p, lr * g, out=p)


def momentum(params: Arrays, grads: Arrays, vs: Arrays, lr: float, momentum: float) -> None:
    """v = momentum * v - lr * g; p += v."""
    for p, g, v in zip(params, grads, vs, strict=True):
        v *= momentum
        v -= lr * g
        np.add(p, v, out=p)


def nesterov(params: Arrays, grads: Arrays, vs: Arrays, lr: float, momentum: float) -> None:
    """v = momentum * v - lr * g; p += momentum * v - lr * g."""
    for p, g, v in zip(params, grads, vs, strict=True):
        step = lr * g
        v *= momentum
        v -= step
        np.add(p, momentum * v - step, out=p)


def adagrad(params: Arrays, grads: Arrays, hs: Arrays, lr: float, eps: float) -> None:
    """h += g**2; p -= lr * g / (sqrt(h) + eps)."""
    for p, g, h in zip(params, grads, hs, strict=True):
        h += g * g
        np.subtract(p, lr * g / (np.sqrt(h) + eps), out=p)


def rmsprop(params: Arrays, grads: Arrays, hs: Arrays, lr: float, decay: float, eps: float) -> None:
    """h = decay * h + (1 - decay) * g**2; p -= lr * g / (sqrt(h) + eps)."""
    for p, g, h in zip(params, grads, hs, strict=True):
        h *= decay
        h += (1 - decay) * (g * g)
        np.subtract(p, lr * g / (np.sqrt(h) + eps), out=p)


def adam(
    params: Arrays,
    grads: Arrays,
    ms: Arrays,
    vs: Arrays,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    shrink: float,
) -> None:
    """m += (1 - beta1) * (g - m); v += (1 - beta2) * (g**2 - v); p = shrink * p - lr * m / (sqrt(v) + eps)."""
    for p, g, m, v in zip(params, grads, ms, vs, strict=True):
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        if shrink != 1:
            np.multiply(p, shrink, out=p)
        np.subtract(p, lr * m / (np.sqrt(v) + eps), out=p)


def clip_grads(grads: Arrays, max_norm: float) -> None:
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
    x = x.astype(wide(x.dtype), copy=False)
    top = x.max(axis=-1, keepdims=True)
    y = np.subtract(x, top)
    np.copyto(y, 0, where=x == top)
    return y


def wide(dtype: Any) -> Any:
    """Return the dtype to compute in: float32 for float16, whose range ends at 65504."""
    return np.float32 if dtype == np.float16 else dtype
