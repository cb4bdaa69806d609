"""Weight initializers; the same seed gives the same weights on both devices.

Weights are drawn on the host in float64, then cast and moved. D inputs (fan-in), H outputs (fan-out).
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy

from nnx.checks import check_integer, check_list, check_number
from nnx.device import asarray, describe
from nnx.np import Array
from nnx.rng import as_generator

__all__ = ["he", "normal", "xavier"]

Initializer: TypeAlias = Callable[..., Array]


def normal(shape: int | Iterable[int], std: float = 0.01, dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return samples from a normal distribution with mean 0 and standard deviation `std`, as in the book.

    Parameters
    ----------
    shape : int or iterable of int
    std : float
        Finite, 0 or more.
    dtype : float16, float32 or float64
    rng : seed, numpy.random.Generator or None
        None uses NumPy's global generator, which nnx never seeds.

    Raises
    ------
    TypeError
        If `dtype` is not one of these, or `std` is not a number.
    ValueError
        If `std` is negative, infinite or NaN.

    Examples
    --------
    >>> from nnx.initializers import normal
    >>> print(normal((2, 3), std=0.01, rng=0).round(4))
    [[ 0.0013 -0.0013  0.0064]
     [ 0.001  -0.0054  0.0036]]
    """
    return _normal("normal", shape, check_number("normal: std", std, 0), dtype, rng)


def xavier(shape: Iterable[int], dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal weights (D, H) with standard deviation sqrt(2 / (D + H)), for sigmoid and tanh.

    The parameters are those of `normal`. Raises a ValueError if `shape` is not (D, H).

    References
    ----------
    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 12.

    Examples
    --------
    >>> from nnx.initializers import xavier
    >>> W = xavier((100, 100), rng=0)
    >>> W.shape, W.dtype, round(float(W.std()), 2)  # sqrt(2 / 200) = 0.1
    ((100, 100), dtype('float32'), 0.1)
    """
    D, H = _fans("xavier", shape)
    return _normal("xavier", (D, H), math.sqrt(2 / (D + H)), dtype, rng)


def he(shape: Iterable[int], dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal weights (D, H) with standard deviation sqrt(2 / D), for ReLU.

    The parameters are those of `normal`. Raises a ValueError if `shape` is not (D, H).

    References
    ----------
    He et al., "Delving deep into rectifiers", 2015, eq. 10.

    Examples
    --------
    >>> from nnx.initializers import he
    >>> W = he((200, 100), rng=0)
    >>> W.shape, W.dtype, round(float(W.std()), 2)  # sqrt(2 / 200) = 0.1
    ((200, 100), dtype('float32'), 0.1)
    """
    D, H = _fans("he", shape)
    return _normal("he", (D, H), math.sqrt(2 / D), dtype, rng)


def draw_weight(name: str, initializer: Initializer, dtype: Any, rng: Any, **sizes: int) -> Array:
    """Return a weight of the `sizes` drawn by `initializer`; `name` is the prefix of the error messages."""
    shape = [check_integer(f"{name}: {n}", size) for n, size in sizes.items()]
    try:
        inspect.signature(initializer).bind(shape, dtype=dtype, rng=rng)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: initializer must be a function of (shape, dtype, rng), such as nnx.initializers.he, "
            f"got {initializer!r:.80}"
        ) from None
    weight, known = initializer(shape, dtype=check_dtype(name, dtype), rng=rng), check_dtype(name, dtype)
    if not isinstance(weight, Array) or weight.shape != tuple(shape) or weight.dtype != known:
        raise ValueError(
            f"{name}: initializer must return a {known} array of shape {tuple(shape)}, got {describe(weight)}"
            + (f" {weight.shape}" if hasattr(weight, "shape") else "")
        )
    return weight


def check_dtype(name: str, dtype: Any) -> numpy.dtype:
    """Return `dtype`; raise unless it is float16, float32 or float64. `name` is a prefix."""
    try:
        known = numpy.dtype(dtype)
    except (TypeError, ValueError):
        known = None
    if known not in (numpy.float16, numpy.float32, numpy.float64):  # excludes non-native byte order
        raise TypeError(f"{name}: dtype must be float16, float32 or float64, got {dtype!r:.80}")
    return known


def _normal(name: str, shape: int | Iterable[int], std: float, dtype: Any, rng: Any) -> Array:
    known = check_dtype(name, dtype)
    sizes = [check_integer(f"{name}: shape", n, 0) for n in _as_sizes(name, shape)]
    with numpy.errstate(over="ignore"):
        samples = (std * as_generator(rng).standard_normal(sizes)).astype(known)
    if not numpy.isfinite(samples).all():
        raise ValueError(f"{name}: std must be smaller, got {std:g}, with which {known} overflows")
    return asarray(samples)


def _as_sizes(name: str, shape: Any) -> list[Any]:
    """Return the axes of `shape`, an integer or an iterable."""
    return [shape] if isinstance(shape, numbers.Integral) else check_list(f"{name}: shape", shape, "integers")


def _fans(name: str, shape: Any) -> tuple[int, int]:
    """Return D and H, the fan-in and fan-out of a weight of `shape`."""
    axes = tuple(_as_sizes(name, shape))
    if len(axes) != 2 or not all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in axes):
        raise ValueError(
            f"{name}: shape must be (D, H), both integers of at least 1, got {axes!r:.80}; for other shapes pass a "
            "standard deviation to normal(shape, std)"
        )
    return axes
