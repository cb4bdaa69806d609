"""The kernels that pay in NumPy's own words; `benchmarks/bench_kernels.py` has each beside `portable`.

N rows (all leading axes together), H outputs, C classes; arrays have at least one axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from nnx.kernels import portable
from nnx.np import Array

__all__ = [
    "adagrad",
    "adam",
    "bias_grad",
    "embedding_grad",
    "momentum",
    "nesterov",
    "rmsprop",
    "sgd",
    "sigmoid",
    "sigmoid_grad",
    "softmax_loss",
    "softmax_loss_grad",
]

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
    """p -= lr * g."""
    dtype = None
    for p, g in zip(*_blocks(params, grads), strict=True):
        if p.dtype is not dtype:
            dtype = p.dtype
            rate = numpy.array(lr, dtype)
        numpy.subtract(p, numpy.multiply(g, rate), out=p)


def _in_blocks(formula: Callable[..., None], lists: int) -> Callable[..., None]:
    """Return an optimizer's `formula`, its first `lists` arguments cut into blocks that stay in the cache."""

    @functools.wraps(formula)
    def update(*arguments: Any) -> None:
        # as Python's floats: a float64 scalar would make float64 temporaries
        formula(*_blocks(*arguments[:lists]), *map(float, arguments[lists:]))

    return update


momentum = _in_blocks(portable.momentum, 3)
nesterov = _in_blocks(portable.nesterov, 3)
adagrad = _in_blocks(portable.adagrad, 3)
rmsprop = _in_blocks(portable.rmsprop, 3)
adam = _in_blocks(portable.adam, 4)


def _blocks(*lists: Sequence[Array]) -> Sequence[Sequence[Array]]:
    """Return `lists`, large arrays that lie alike in one piece replaced by their blocks."""
    if all(a.size <= _BLOCK for a in lists[0]):
        return lists
    result: list[list[Array]] = [[] for _ in lists]
    for arrays in zip(*lists, strict=True):
        if arrays[0].size > _BLOCK and all(a.flags.c_contiguous for a in arrays):
            for blocks, a in zip(result, arrays, strict=True):
                flat = a.reshape(-1)
                blocks.extend(flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))
        else:
            for blocks, a in zip(result, arrays, strict=True):
                blocks.append(a)
    return result


# Read-only constants: NumPy takes an array without axes twice as fast as a Python number.


@functools.lru_cache(maxsize=64)
def _ones(shape: Any, dtype: Any) -> Array:
    return numpy.broadcast_to(numpy.ones(shape, dtype), shape)


@functools.lru_cache(maxsize=64)
def _arange(n: int) -> Array:
    return numpy.broadcast_to(numpy.arange(n), n)
