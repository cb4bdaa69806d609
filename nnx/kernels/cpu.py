"""The kernels that pay on NumPy; `benchmarks/bench_kernels.py` has each beside `portable`.

What makes them faster: fewer calls for small arrays, where the calls are what costs; for large ones
blocks that stay in the cache from one pass to the next, and all cores (NumPy lets go of the lock
while it computes). N rows (all leading axes together), H outputs, C classes; arrays have at least
one axis. Outputs are given by position: in a small step keywords are felt too.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import importlib
import math
import os
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
_SMALL = 32768  # elements, up to which two calls of NumPy are faster than one of BLAS through ctypes
_SHARED = 1 << 18  # elements, from which a second core is worth waking
_FEW_CLASSES = 128


def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,): a product with ones, so that BLAS adds."""
    if dout.itemsize == 2:  # BLAS has no float16
        portable.bias_grad(dout, out)
    else:
        numpy.dot(_ones(len(dout), dout.dtype), dout, out)


def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    """Write into row i of `out` (V, H) the sum of the rows of `dout` (N, H) where idx (N,) is i."""
    out[...] = 0
    if idx.size:
        order = idx.argsort(kind="stable")
        rows, starts = numpy.unique(idx[order], return_index=True)
        out[rows] = numpy.add.reduceat(dout[order], starts, axis=0)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose reciprocal is 0."""
    if x.itemsize == 2:  # float16
        return portable.sigmoid(x)
    y = numpy.empty(x.shape, x.dtype)
    if x.size <= _BLOCK:
        _sigmoid(x, y)
    else:
        _elementwise(_sigmoid, x, y)
    return y


@numpy.errstate(over="ignore")
def _sigmoid(x: Array, y: Array) -> None:
    numpy.negative(x, y)
    numpy.exp(y, y)
    numpy.add(y, _ones((), y.dtype), y)
    numpy.reciprocal(y, y)


def sigmoid_grad(dout: Array, y: Array) -> Array:
    """Return dout * y * (1 - y)."""
    dx = numpy.empty(y.shape, y.dtype)
    if y.size <= _BLOCK:
        _sigmoid_grad(dout, y, dx)
    else:
        _elementwise(_sigmoid_grad, dout, y, dx)
    return dx


def _sigmoid_grad(dout: Array, y: Array, dx: Array) -> None:
    numpy.subtract(_ones((), y.dtype), y, dx)
    numpy.multiply(dx, y, dx)
    numpy.multiply(dx, dout, dx)


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
    rows, ones_n, ones_c = _constants(n, classes, y.dtype)
    picked = y[t, rows]
    numpy.exp(y, y)
    total = numpy.dot(ones_c, y)
    loss = numpy.dot(ones_n, numpy.log(total) - picked) / n
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
    dx[_constants(*y.shape, y.dtype)[0], t] -= scale
    return dx


def sgd(params: Sequence[Array], grads: Sequence[Array], lr: float) -> None:
    """p -= lr * g: for large arrays BLAS does it in one pass, on all cores."""
    dtype = None
    for p, g in zip(params, grads, strict=True):
        if p.dtype is not dtype:
            dtype = p.dtype
            rate = numpy.array(lr, dtype)
        if p.size > _SMALL and g.dtype is dtype and p.flags.c_contiguous and g.flags.c_contiguous and _axpy(dtype):
            _axpy(dtype)(p.size, -lr, g.ctypes.data, 1, p.ctypes.data, 1)
        else:
            numpy.subtract(p, numpy.multiply(g, rate), p)


def _in_blocks(formula: Callable[..., None], lists: int) -> Callable[..., None]:
    """Return an optimizer's `formula` for blocks of the arrays in its first `lists` arguments."""

    @functools.wraps(formula)
    def update(*arguments: Any) -> None:
        settings = [float(value) for value in arguments[lists:]]  # a float64 scalar would make float64 temporaries
        for arrays in zip(*arguments[:lists], strict=True):
            _elementwise(lambda *blocks: formula(*([b] for b in blocks), *settings), *arrays)

    return update


momentum = _in_blocks(portable.momentum, 3)
nesterov = _in_blocks(portable.nesterov, 3)
adagrad = _in_blocks(portable.adagrad, 3)
rmsprop = _in_blocks(portable.rmsprop, 3)
adam = _in_blocks(portable.adam, 4)


# ---- blocks, cores, BLAS ----


def _elementwise(function: Callable[..., None], *arrays: Array) -> None:
    """Call `function` with `arrays`, which it treats element by element: large ones in blocks, on all cores."""
    size = arrays[0].size
    if size <= _BLOCK or not all(a.flags.c_contiguous for a in arrays):
        function(*arrays)
        return
    flat = [a.reshape(-1) for a in arrays]

    def work(start: int, stop: int) -> None:
        for i in range(start, stop, _BLOCK):
            function(*(a[i : min(i + _BLOCK, stop)] for a in flat))

    _share(work, size)


def _share(work: Callable[[int, int], None], size: int) -> None:
    """Call work(start, stop) for parts of range(size), one on each core if it is long."""
    parts = _threads() if size >= _SHARED else 1
    ends = [size * i // parts for i in range(parts + 1)]
    others = [_pool().submit(work, ends[i], ends[i + 1]) for i in range(1, parts)]
    work(0, ends[1])
    for other in others:
        other.result()


_limits: list[int] = []


@functools.cache
def _threads() -> int:
    """Return how many cores to use: those of the process, or fewer if BLAS or `limit_threads` is told so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"))
    return min([cores, *_limits, *(max(1, int(limit)) for limit in limits if limit.isdecimal())])


def limit_threads(limit: int) -> None:
    """Use at most `limit` cores from now on: the share of one of several processes on a machine."""
    _limits.append(limit)
    _threads.cache_clear()
    _pool.cache_clear()


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max(1, _threads() - 1), thread_name_prefix="nnx")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@functools.cache
def _axpy(dtype: Any) -> Any:
    """Return y += a * x from the BLAS that NumPy has loaded, or None if it shows no such function."""
    letter, real = {"f": ("s", ctypes.c_float), "d": ("d", ctypes.c_double)}.get(dtype.char, (None, None))
    try:
        library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    except (ImportError, OSError, TypeError):
        return None
    for name, integer in (("scipy_cblas_{}axpy64_", ctypes.c_int64), ("cblas_{}axpy", ctypes.c_int)):
        function = letter and getattr(library, name.format(letter), None)
        if function:
            function.argtypes = [integer, real, ctypes.c_void_p, integer, ctypes.c_void_p, integer]
            function.restype = None
            return function
    return None


# Read-only constants: NumPy takes an array without axes twice as fast as a Python number.


@functools.lru_cache(maxsize=64)
def _ones(shape: Any, dtype: Any) -> Array:
    return numpy.broadcast_to(numpy.ones(shape, dtype), shape)


@functools.lru_cache(maxsize=64)
def _constants(n: int, classes: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Return 0 to n - 1, n ones, and `classes` ones."""
    return numpy.broadcast_to(numpy.arange(n), n), _ones(n, dtype), _ones(classes, dtype)
