"""The kernels that pay in NumPy's own words; `benchmarks/bench_kernels.py` has each beside `portable`.

N rows (all leading axes together), H outputs, C classes; arrays have at least one axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy

from nnx.kernels import portable
from nnx.np import Array

__all__ = ["bias_grad", "embedding_grad", "sgd", "sigmoid", "sigmoid_grad", "softmax_loss", "softmax_loss_grad"]

_BLOCK = 65536  # elements: a block of each operand fits in the second-level cache
_FEW_CLASSES = 128


def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,): a product with ones, so that BLAS adds."""
    if dout.itemsize == 2:  # BLAS has no float16
        portable.bias_grad(dout, out)
    else:
        numpy.dot(_ones(len(dout), dout.dtype), dout, out=out)


def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    """Write into row i of `out` (V, H) the sum of the rows of `dout` (N, H) where idx (N,) is i."""
    out[...] = 0
    if idx.size:
        order = idx.argsort(kind="stable")
        rows, starts = numpy.unique(idx[order], return_index=True)
        out[rows] = numpy.add.reduceat(dout[order], starts, axis=0)


@numpy.errstate(over="ignore")
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose reciprocal is 0."""
    if x.itemsize == 2:  # float16
        return portable.sigmoid(x)
    y = numpy.negative(x)
    numpy.exp(y, out=y)
    numpy.add(y, _ones((), x.dtype), out=y)
    return numpy.reciprocal(y, out=y)


def sigmoid_grad(dout: Array, y: Array) -> Array:
    """Return dout * y * (1 - y)."""
    dx = numpy.subtract(_ones((), y.dtype), y)
    numpy.multiply(dx, y, out=dx)
    return numpy.multiply(dx, dout, out=dx)


@numpy.errstate(invalid="ignore", over="ignore")
def softmax_loss(x: Array, t: Array) -> tuple[Array, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    Few classes are worked on as columns of N numbers: NumPy is slow on short rows.
    """
    if x.ndim != 2 or x.itemsize == 2:  # float16
        return portable.softmax_loss(x, t)
    n, classes = x.shape
    columns = x.T
    if classes <= _FEW_CLASSES:
        columns = numpy.ascontiguousarray(columns)
    y = numpy.subtract(columns, numpy.maximum.reduce(columns, axis=0))
    picked = y[t, _arange(n)]
    numpy.exp(y, out=y)
    total = numpy.dot(_ones(classes, y.dtype), y)
    loss = numpy.dot(_ones(n, y.dtype), numpy.log(total) - picked) / n
    if not math.isfinite(loss):  # infinite scores: their limits are worth more passes
        return portable.softmax_loss(x, t)
    y /= total
    return loss, y.T


def softmax_loss_grad(y: Array, t: Array, dout: Any) -> Array:
    """Return (y - onehot(t)) * dout / N, the gradient of `softmax_loss` by x."""
    if y.ndim != 2:
        return portable.softmax_loss_grad(y, t, dout)
    scale = numpy.asarray(dout / t.size, y.dtype)
    dx = numpy.multiply(y, scale)
    dx[_arange(t.size), t] -= scale
    return dx


def sgd(params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
    """Subtract lr * grad from every parameter, in place, in blocks whose product stays in the cache."""
    dtype = None
    for p, g in zip(params, grads, strict=True):
        if p.dtype is not dtype:
            dtype = p.dtype
            rate = numpy.array(lr, dtype)
        if p.size <= _BLOCK or not (p.flags.c_contiguous and g.flags.c_contiguous):
            numpy.subtract(p, numpy.multiply(g, rate), out=p)
            continue
        p, g = p.reshape(-1), g.reshape(-1)
        scratch = numpy.empty(_BLOCK, p.dtype)
        for start in range(0, p.size, _BLOCK):
            block = p[start : start + _BLOCK]
            step = numpy.multiply(g[start : start + _BLOCK], rate, out=scratch[: block.size])
            numpy.subtract(block, step, out=block)


# Read-only constants: NumPy takes an array without axes twice as fast as a Python number.


@functools.lru_cache(maxsize=64)
def _ones(shape: Any, dtype: Any) -> Array:
    return numpy.broadcast_to(numpy.ones(shape, dtype), shape)


@functools.lru_cache(maxsize=64)
def _arange(n: int) -> Array:
    return numpy.broadcast_to(numpy.arange(n), n)
