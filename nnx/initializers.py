"""Initial weights, drawn on the host: the same seed gives the same numbers on both devices.

Numbers are drawn in float64 and then cast and moved. D inputs (fan-in), H outputs (fan-out).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import numpy

from nnx.device import asarray
from nnx.np import Array

__all__ = ["generator", "he", "normal", "xavier"]


def generator(rng: Any = None) -> Any:
    """Return what draws random numbers: a new generator for a seed, NumPy's global one for None, a generator itself."""
    if rng is None or rng is numpy.random:
        return numpy.random
    if isinstance(rng, numpy.random.Generator | numpy.random.RandomState):
        return rng
    try:
        return numpy.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise type(error)(f"rng must be a seed, a numpy.random.Generator or None, got {rng!r} ({error})") from error


def get_state(rng: Any) -> dict[str, Any]:
    """Return what `set_state` brings `generator(rng)` back with: numbers and arrays under the name of its kind."""
    state = rng.bit_generator.state if isinstance(rng, numpy.random.Generator) else rng.get_state(legacy=False)
    kind = "numpy.random" if rng is numpy.random else type(rng).__name__
    return {f"{kind} {state['bit_generator']}": state}


def set_state(rng: Any, state: dict[str, Any]) -> None:
    """Make `rng` draw as the generator of `get_state` did from there on."""
    (inner,) = state.values()
    if isinstance(rng, numpy.random.Generator):
        rng.bit_generator.state = inner
    else:
        rng.set_state(inner)


def check_state(rng: Any, state: dict[str, Any]) -> None:
    """Raise a ValueError unless `state` is one for `rng`, such as NumPy itself would not always find."""
    (inner,) = state.values()
    pos = inner["state"].get("pos", 0), inner.get("buffer_pos", 0)  # NumPy reads from there without a look
    try:
        set_state(numpy.random.RandomState() if rng is numpy.random else copy.deepcopy(rng), state)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(f"no state of a generator ({error})") from error
    if not (0 <= pos[0] <= 624 and 0 <= pos[1] <= 4):
        raise ValueError(f"no state of a generator: its position is {max(pos)}")


def normal(shape: int | Iterable[int], std: float = 0.01, dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal numbers of mean 0 and standard deviation `std`, as the source draws its weights.

    Parameters
    ----------
    shape : int or iterable of int
    std : float
        Finite, 0 or more.
    dtype : float16, float32 or float64
    rng : seed, numpy.random.Generator or None
        None is NumPy's global generator, which nnx never seeds.

    Raises
    ------
    TypeError
        If `dtype` is not one of these, or `std` not a number.
    ValueError
        If `std` is negative, infinite or NaN.
    """
    try:
        valid = math.isfinite(std) and std >= 0
    except TypeError as error:
        raise TypeError(f"normal: std must be a number, got {std!r}") from error
    if not valid:
        raise ValueError(f"normal: std must be finite and at least 0, got {std}")
    return _normal("normal", shape, float(std), dtype, rng)


def xavier(shape: Iterable[int], dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal numbers (D, H) of standard deviation sqrt(2 / (D + H)), which suit sigmoid and tanh.

    The parameters are those of `normal`; a shape other than (D, H) is a ValueError.

    References
    ----------
    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 12.
    """
    D, H = _fans("xavier", shape)
    return _normal("xavier", (D, H), math.sqrt(2 / (D + H)), dtype, rng)


def he(shape: Iterable[int], dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal numbers (D, H) of standard deviation sqrt(2 / D), which suit ReLU.

    The parameters are those of `normal`; a shape other than (D, H) is a ValueError.

    References
    ----------
    He et al., "Delving deep into rectifiers", 2015, eq. 10.
    """
    D, H = _fans("he", shape)
    return _normal("he", (D, H), math.sqrt(2 / D), dtype, rng)


def _normal(name: str, shape: int | Iterable[int], std: float, dtype: Any, rng: Any) -> Array:
    try:
        known = numpy.dtype(dtype)
    except (TypeError, ValueError):
        known = None
    if known not in (numpy.float16, numpy.float32, numpy.float64):  # one in the other byte order equals none of them
        raise TypeError(
            f"{name}: dtype must be float16, float32 or float64, got {dtype!r}; weights are floating numbers, "
            "convert the result with astype(...) if you need others"
        )
    shape = tuple(shape) if isinstance(shape, Iterable) else shape
    return asarray(std * generator(rng).standard_normal(shape), known)


def _fans(name: str, shape: Any) -> tuple[int, int]:
    """Return D and H of a weight's shape."""
    axes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if len(axes) != 2 or not min(axes) >= 1:
        raise ValueError(
            f"{name}: shape must be (D, H), inputs and outputs of at least 1, got {axes}; "
            "for other shapes pass a standard deviation to normal(shape, std)"
        )
    return axes
