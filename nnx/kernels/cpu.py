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
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from nnx.kernels import portable
from nnx.kernels.portable import Arrays
from nnx.np import Array, Scalar

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
    out[rows] = numpy.add.reduceat(dout[order], starts, axis=0, dtype=portable.wide(dout.dtype))


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp overflows to the infinity whose quotient is 0."""
    if x.itemsize == 2:  # float16
        return portable.sigmoid(x)
    if x.size <= _BLOCK:
        return _sigmoid(x)
    y = numpy.empty(x.shape, x.dtype)
    _elementwise(_sigmoid, (x, y))
    return y


@numpy.errstate(over="ignore", under="ignore")
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
    _elementwise(_sigmoid_grad, (dout, y, dx))
    return dx


def _sigmoid_grad(dout: Array, y: Array, dx: Array | None = None) -> Array:
    dx = numpy.subtract(_one(y.dtype), y, dx)
    dx *= y
    dx *= dout
    return dx


def softmax_loss(x: Array, t: Array) -> tuple[Scalar, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    Moderate scores need no maximum subtracted: NumPy is slow on short rows. NaN is not moderate.
    """
    if x.ndim != 2 or x.itemsize == 2:  # float16
        return portable.softmax_loss(x, t)
    if not (x.item(x.argmax()) < _MODERATE and x.item(x.argmin()) > -_MODERATE):
        return portable.softmax_loss(x, t)
    starts, sums, minus_mean = _for_loss(*x.shape, x.dtype)
    y = numpy.exp(x)
    total = y.dot(sums)
    y /= total if total.ndim == 2 else total[:, None]
    return minus_mean.dot(numpy.log(y.take(starts + t))), y


def softmax_loss_grad(y: Array, t: Array, dout: Any) -> Array:
    """Return (y - onehot(t)) * dout / N, the gradient of `softmax_loss` by x."""
    if y.ndim != 2 or y.itemsize == 2:  # float16, in which y / N may vanish before a large dout scales it
        return portable.softmax_loss_grad(y, t, dout)
    share, one_hot = _for_loss_grad(*y.shape, y.dtype)
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
    lr, dtype = float(lr), None
    for p, g in zip(params, grads, strict=True):
        if p.dtype is not dtype:
            dtype = p.dtype
            rate = numpy.array(lr, dtype)
        if p.size <= _SMALL or not _add(p, -lr, g):
            p -= g * rate


def momentum(params: Arrays, grads: Arrays, vs: Arrays, lr: float, momentum: float) -> None:
    """v = momentum * v - lr * g; p += v."""
    _update(_momentum, (params, grads, vs), lr, momentum)


def _momentum(p: Array, g: Array, v: Array, lr: Array, momentum: Array) -> None:
    v *= momentum
    v -= g * lr
    p += v


def nesterov(params: Arrays, grads: Arrays, vs: Arrays, lr: float, momentum: float) -> None:
    """v = momentum * v - lr * g; p += momentum * v - lr * g."""
    _update(_nesterov, (params, grads, vs), lr, momentum)


def _nesterov(p: Array, g: Array, v: Array, lr: Array, momentum: Array) -> None:
    step = g * lr
    v *= momentum
    v -= step
    ahead = v * momentum
    ahead -= step
    p += ahead


def adagrad(params: Arrays, grads: Arrays, hs: Arrays, lr: float, eps: float) -> None:
    """h += g**2; p -= lr * g / (sqrt(h) + eps)."""
    _update(_adagrad, (params, grads, hs), lr, eps)


def _adagrad(p: Array, g: Array, h: Array, lr: Array, eps: Array) -> None:
    h += g * g
    _adapt(p, g, h, lr, eps)


def rmsprop(params: Arrays, grads: Arrays, hs: Arrays, lr: float, decay: float, eps: float) -> None:
    """h = decay * h + (1 - decay) * g**2; p -= lr * g / (sqrt(h) + eps)."""
    _update(_rmsprop, (params, grads, hs), lr, decay, 1 - decay, eps)


def _rmsprop(p: Array, g: Array, h: Array, lr: Array, decay: Array, rest: Array, eps: Array) -> None:
    square = g * g
    square *= rest
    h *= decay
    h += square
    _adapt(p, g, h, lr, eps)


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
    _update(_adam, (params, grads, ms, vs), lr, 1 - beta1, 1 - beta2, eps, *([shrink] if shrink != 1 else []))


def _adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: Array,
    rest1: Array,
    rest2: Array,
    eps: Array,
    shrink: Array | None = None,
) -> None:
    change = g - m
    change *= rest1
    m += change
    change = g * g
    change -= v
    change *= rest2
    v += change
    if shrink is not None:
        p *= shrink
    _adapt(p, m, v, lr, eps)


def _adapt(p: Array, g: Array, h: Array, lr: Array, eps: Array) -> None:
    """p -= lr * g / (sqrt(h) + eps)."""
    root = numpy.sqrt(h)
    root += eps
    step = g * lr
    step /= root
    p -= step


def _update(formula: Callable[..., None], lists: tuple[Arrays, ...], *settings: float) -> None:
    """Call an optimizer's `formula` for each parameter, its gradient and state, with the settings in its dtype."""
    dtype = None
    for arrays in zip(*lists, strict=True):
        if arrays[0].dtype is not dtype:
            dtype = arrays[0].dtype
            constants = [numpy.array(float(value), dtype) for value in settings]
        _elementwise(formula, arrays, constants)


def _elementwise(function: Callable[..., Any], arrays: tuple[Array, ...], constants: Sequence[Array] = ()) -> None:
    """Call `function` with `arrays`, which it treats element by element: with large ones in blocks."""
    size = arrays[0].size
    if size <= _BLOCK or not all(a.flags.c_contiguous for a in arrays):
        function(*arrays, *constants)
        return
    flat = [a.reshape(-1) for a in arrays]
    for i in range(0, size, _BLOCK):
        function(*(a[i : i + _BLOCK] for a in flat), *constants)


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
def _for_loss(n: int, classes: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Return where n rows start in memory, and what makes the sums of rows and -mean."""
    sums = numpy.ones((classes, classes) if classes <= _FEW_CLASSES else classes, dtype)  # of a square, in every column
    return numpy.arange(n) * classes, sums, numpy.full(n, -1 / n, dtype)


@functools.lru_cache(maxsize=16)
def _for_loss_grad(n: int, classes: int, dtype: Any) -> tuple[Array, Array | None]:
    """Return 1 / n, and rows of one-hot / n if the classes are few."""
    share = numpy.full((), 1 / n, dtype)
    return share, numpy.eye(classes, dtype=dtype) * share if classes <= _FEW_CLASSES else None
