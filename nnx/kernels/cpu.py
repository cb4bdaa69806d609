"""The kernels that pay on NumPy; `benchmarks/bench_kernels.py` has each beside `portable`.

What makes them faster: fewer and plainer calls for small arrays, where the calls are what costs (one
that broadcasts or reduces costs three to four that do neither), and for large ones blocks that stay
in the cache from one pass to the next. All of it runs on one core: beside BLAS, whose threads keep
the other cores busy waiting, a pool of threads gained nothing. N rows (all leading axes together),
H outputs, C classes; arrays have at least one axis. Outputs are given by position: in a small step
keywords are felt too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy

from nnx.kernels import portable
from nnx.kernels.portable import Arrays
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
_FEW = 2048  # elements that np.add.at has added before they would be sorted
_FEW_CLASSES = 16  # so few that products with square matrices of them are faster than broadcasting
_MODERATE = 40  # scores up to here have exponentials whose sums and quotients are ordinary numbers


def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,): a product with ones, so that BLAS adds."""
    if dout.itemsize == 2:  # BLAS has no float16
        portable.bias_grad(dout, out)
    else:
        _ones(len(dout), dout.dtype).dot(dout, out)


def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    """Write into row i of `out` (V, H) the sum of the rows of `dout` (N, H) where idx (N,) is i."""
    if dout.size <= _FEW:
        portable.embedding_grad(idx, dout, out)
        return
    out[...] = 0
    order = idx.argsort(kind="stable")
    rows, starts = numpy.unique(idx[order], return_index=True)
    out[rows] = numpy.add.reduceat(dout[order], starts, axis=0)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose quotient is 0."""
    if x.itemsize == 2:  # float16
        return portable.sigmoid(x)
    if x.size <= _BLOCK:
        return _sigmoid(x)
    y = numpy.empty(x.shape, x.dtype)
    _elementwise(_sigmoid, x, y)
    return y


@numpy.errstate(over="ignore")
def _sigmoid(x: Array, y: Array | None = None) -> Array:
    one = _one(x.dtype)
    y = numpy.negative(x, y)
    numpy.exp(y, y)
    y += one
    return numpy.divide(one, y, y)  # faster than reciprocal


def sigmoid_grad(dout: Array, y: Array) -> Array:
    """Return dout * y * (1 - y)."""
    if y.size <= _BLOCK:
        return _sigmoid_grad(dout, y)
    dx = numpy.empty(y.shape, y.dtype)
    _elementwise(_sigmoid_grad, dout, y, dx)
    return dx


def _sigmoid_grad(dout: Array, y: Array, dx: Array | None = None) -> Array:
    dx = numpy.subtract(_one(y.dtype), y, dx)
    dx *= y
    dx *= dout
    return dx


def softmax_loss(x: Array, t: Array) -> tuple[Array, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    Moderate scores need no maximum subtracted: NumPy is slow on short rows. NaN is not moderate.
    """
    if x.ndim != 2 or x.itemsize == 2:  # float16
        return portable.softmax_loss(x, t)
    if not (x.item(x.argmax()) < _MODERATE and x.item(x.argmin()) > -_MODERATE):
        return portable.softmax_loss(x, t)
    starts, minus_mean, sums, _, _ = _constants(*x.shape, x.dtype)
    y = numpy.exp(x)
    total = y.dot(sums)
    y /= total if total.ndim == 2 else total[:, None]
    return minus_mean.dot(numpy.log(y.take(starts + t))), y


def softmax_loss_grad(y: Array, t: Array, dout: Any) -> Array:
    """Return (y - onehot(t)) * dout / N, the gradient of `softmax_loss` by x."""
    if y.ndim != 2 or y.itemsize == 2:  # float16, in which y / N may vanish before a large dout scales it
        return portable.softmax_loss_grad(y, t, dout)
    _, _, _, share, one_hot = _constants(*y.shape, y.dtype)
    dx = y * share
    if one_hot is None:
        dx[numpy.arange(len(t)), t] -= share
    else:
        dx -= one_hot.take(t, 0)
    if dout != 1:
        dx *= dout
    return dx


def sgd(params: Arrays, grads: Arrays, lr: float) -> None:
    """p -= lr * g: for large arrays BLAS does it in one pass, on all cores."""
    dtype = None
    for p, g in zip(params, grads, strict=True):
        if p.dtype is not dtype:
            dtype = p.dtype
            rate = numpy.array(lr, dtype)
        if p.size <= _SMALL or not _add(p, -lr, g):
            p -= g * rate


def _in_blocks(formula: Callable[..., None], lists: int) -> Callable[..., None]:
    """Return an optimizer's `formula` for blocks of the arrays in its first `lists` arguments."""

    @functools.wraps(formula)
    def update(*arguments: Any) -> None:
        # a float64 scalar would make float64 temporaries
        params, settings = arguments[0], [float(value) for value in arguments[lists:]]
        if all(p.size <= _BLOCK for p in params):
            formula(*arguments[:lists], *settings)
            return
        for arrays in zip(*arguments[:lists], strict=True):
            _elementwise(lambda *blocks: formula(*([b] for b in blocks), *settings), *arrays)

    return update


momentum = _in_blocks(portable.momentum, 3)
nesterov = _in_blocks(portable.nesterov, 3)
adagrad = _in_blocks(portable.adagrad, 3)
rmsprop = _in_blocks(portable.rmsprop, 3)
adam = _in_blocks(portable.adam, 4)


def _elementwise(function: Callable[..., Any], *arrays: Array) -> None:
    """Call `function` with `arrays`, which it treats element by element: with large ones in blocks."""
    size = arrays[0].size
    if size <= _BLOCK or not all(a.flags.c_contiguous for a in arrays):
        function(*arrays)
        return
    flat = [a.reshape(-1) for a in arrays]
    for i in range(0, size, _BLOCK):
        function(*(a[i : i + _BLOCK] for a in flat))


def _add(y: Array, a: float, x: Array) -> bool:
    """Let BLAS do y += a * x; return False where it cannot."""
    axpy = _axpy(y.dtype)
    if not axpy or x.dtype != y.dtype or not (x.flags.c_contiguous and y.flags.carray):
        return False  # carray: writeable as well, which BLAS would not ask
    axpy(y.size, a, x.ctypes.data, 1, y.ctypes.data, 1)
    return True


@functools.cache
def _axpy(dtype: Any) -> Any:
    """Return y += a * x from the BLAS that NumPy has loaded, or None if it shows no such function."""
    types = {numpy.dtype("f"): ("s", ctypes.c_float), numpy.dtype("d"): ("d", ctypes.c_double)}
    letter, real = types.get(dtype, (None, None))  # None for the other byte order too
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


# Constants: NumPy takes an array without axes twice as fast as a Python number.


@functools.cache
def _one(dtype: Any) -> Array:
    return numpy.ones((), dtype)


@functools.lru_cache(maxsize=16)
def _ones(n: int, dtype: Any) -> Array:
    return numpy.ones(n, dtype)


@functools.lru_cache(maxsize=16)
def _constants(n: int, classes: int, dtype: Any) -> tuple[Array, Array, Array, Array, Array | None]:
    """Return where n rows start in memory, what makes -mean and the sums of rows, 1 / n, and rows of one-hot / n."""
    few = classes <= _FEW_CLASSES
    share = numpy.full((), 1 / n, dtype)
    sums = numpy.ones((classes, classes) if few else classes, dtype)  # a square matrix: the sum in every column
    return (
        numpy.arange(n) * classes,
        numpy.full(n, -share),
        sums,
        share,
        numpy.eye(classes, dtype=dtype) * share if few else None,
    )
