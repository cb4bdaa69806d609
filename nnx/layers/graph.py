"""Nodes of the computational graphs in the chapter: Repeat and Sum, each the backward of the other. N rows."""

from __future__ import annotations

from typing import Any

from nnx.checks import as_floating, check_grad_output, check_integer
from nnx.device import quiet
from nnx.kernels import accumulation_dtype
from nnx.layers.base import BaseLayer
from nnx.np import Array, np

__all__ = ["Repeat", "Sum"]


class Repeat(BaseLayer):
    """Repeat a row N times: y = repeat(x, N) along axis 0.

    Parameters
    ----------
    N : int

    Shapes
    ------
    x : (1, ...)    y, dout : (N, ...)

    Examples
    --------
    >>> from nnx import Repeat, np
    >>> repeat = Repeat(3)
    >>> print(repeat.forward(np.array([[1.0, 2.0]])))
    [[1. 2.]
     [1. 2.]
     [1. 2.]]
    >>> print(repeat.backward(np.ones((3, 2))))
    [[3. 3.]]
    """

    batch_names = ("x",)

    def __init__(self, N: int) -> None:
        super().__init__()
        self.N = check_integer("Repeat: N", N)

    def forward(self, x: Any) -> Array:
        """Return N copies of x along axis 0."""
        x = as_floating(x, None, "Repeat")
        if x.ndim == 0 or len(x) != 1:
            raise ValueError(f"Repeat: axis 0 of x must have length 1, got shape {x.shape}; take a row with x[:1]")
        self.x = x
        return np.repeat(x, check_integer("Repeat: N", self.N), axis=0)

    def backward(self, dout: Any) -> Array:
        """Return the sum of dout over axis 0, kept with length 1."""
        dout = check_grad_output(self, dout, (self.N, *self.x.shape[1:]), self.x.dtype)
        return _sum(dout)


class Sum(BaseLayer):
    """Sum over axis 0, kept with length 1.

    Shapes
    ------
    x : (N, ...)    y, dout : (1, ...)

    Examples
    --------
    >>> from nnx import Sum, np
    >>> total = Sum()
    >>> print(total.forward(np.array([[1.0, 2.0], [3.0, 4.0]])))
    [[4. 6.]]
    >>> print(total.backward(np.array([[1.0, 1.0]])))
    [[1. 1.]
     [1. 1.]]
    """

    batch_names = ("x",)

    def forward(self, x: Any) -> Array:
        """Return the sum over axis 0."""
        x = as_floating(x, None, "Sum")
        if x.ndim == 0:
            raise ValueError("Sum: x must have at least one axis, got a scalar")
        self.x = x
        return _sum(x)

    def backward(self, dout: Any) -> Array:
        """Return N copies of dout along axis 0."""
        x = self.x
        return np.repeat(check_grad_output(self, dout, (1, *x.shape[1:]), x.dtype), len(x), axis=0)


@quiet
def _sum(x: Array) -> Array:
    return x.sum(axis=0, keepdims=True, dtype=accumulation_dtype(x.dtype)).astype(x.dtype, copy=False)
