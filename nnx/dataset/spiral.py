"""The spiral: three arms of 100 points in the plane, which no straight line separates."""

from __future__ import annotations

import numpy

__all__ = ["load_data"]

_POINTS, _CLASSES = 100, 3


def load_data(seed: int = 1984) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the source's 300 points, bit for bit, and their classes.

    Point i of arm j lies at radius r = i / 100 and angle 4 * (j + r) + 0.2 * noise, the noise from
    NumPy's legacy generator. Unlike the source, the global generator is left alone.

    Returns
    -------
    x : (300, 2) float64
    t : (300, 3) int32, one-hot
    """
    noise = numpy.random.RandomState(seed).randn(_CLASSES, _POINTS)
    arm = numpy.arange(_CLASSES)[:, None]
    radius = numpy.arange(_POINTS) / _POINTS
    angle = arm * 4.0 + 4.0 * radius + noise * 0.2
    x = numpy.stack([radius * numpy.sin(angle), radius * numpy.cos(angle)], axis=-1).reshape(-1, 2)
    t = numpy.repeat(numpy.eye(_CLASSES, dtype=numpy.int32), _POINTS, axis=0)
    return x, t
