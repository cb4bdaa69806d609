"""The spiral data set: three classes of 100 points in the plane, which are not linearly separable."""

from __future__ import annotations

import numpy

from nnx.checks import check_integer

__all__ = ["load_data"]

_POINTS, _CLASSES = 100, 3


def load_data(seed: int = 1984) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the 300 points of the book, bit for bit, and their classes.

    Point i of class j has radius r = i / 100 and angle 4 * (j + r) + 0.2 * noise, with standard normal noise from
    NumPy's legacy generator. Unlike in the book, the global generator is not seeded.

    Returns
    -------
    x : (300, 2) float64
    t : (300, 3) int32, one-hot

    Examples
    --------
    >>> from nnx import spiral
    >>> x, t = spiral.load_data()
    >>> x.shape, t.shape
    ((300, 2), (300, 3))
    """
    if check_integer("load_data: seed", seed, 0) >= 1 << 32:
        raise ValueError(f"load_data: seed must be below 2**32, got {seed}")
    noise = numpy.random.RandomState(seed).randn(_CLASSES, _POINTS)
    arm = numpy.arange(_CLASSES)[:, None]
    radius = numpy.arange(_POINTS) / _POINTS
    angle = arm * 4.0 + 4.0 * radius + noise * 0.2
    x = numpy.stack([radius * numpy.sin(angle), radius * numpy.cos(angle)], axis=-1).reshape(-1, 2)
    t = numpy.repeat(numpy.eye(_CLASSES, dtype=numpy.int32), _POINTS, axis=0)
    return x, t
