"""Initial weights, drawn on the host: the same seed gives the same numbers on both devices.

Numbers are drawn in float64 and then cast and moved. D inputs (fan-in), H outputs (fan-out).
"""

from __future__ import annotations

import math
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


def normal(shape: tuple[int, ...], std: float = 0.01, dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal numbers of mean 0 and standard deviation `std`, as the source draws its weights.

    Parameters
    ----------
    shape : tuple of int
    std : float
    dtype : a floating dtype
    rng : seed, numpy.random.Generator or None
        None is NumPy's global generator, which nnx never seeds.
    """
    return asarray(std * generator(rng).standard_normal(shape), dtype)


def xavier(shape: tuple[int, int], dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal numbers of standard deviation sqrt(2 / (D + H)), which suit sigmoid and tanh.

    References
    ----------
    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 12.
    """
    return normal(shape, math.sqrt(2 / (shape[0] + shape[1])), dtype, rng)


def he(shape: tuple[int, int], dtype: Any = numpy.float32, rng: Any = None) -> Array:
    """Return normal numbers of standard deviation sqrt(2 / D), which suit ReLU.

    References
    ----------
    He et al., "Delving deep into rectifiers", 2015, eq. 10.
    """
    return normal(shape, math.sqrt(2 / shape[0]), dtype, rng)
