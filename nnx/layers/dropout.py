"""Dropout. x, y, dout: any shape."""

from __future__ import annotations

from typing import Any

from nnx.checks import as_floating, check_grad_output
from nnx.device import quiet
from nnx.kernels import dropout
from nnx.np import Array, np
from nnx.rng import as_generator

__all__ = ["Dropout"]


class Dropout:
    """Sets each element to 0 with probability `dropout_ratio` in training: y = x * mask.

    As in the source, what is kept is not scaled up; predicting scales by 1 - dropout_ratio instead.
    The masks are a hash of `seed`, `calls` and the element's index: equal bits on both devices, no
    mask in memory, and two integers to save.

    Parameters
    ----------
    dropout_ratio : float
        In [0, 1); 0 keeps every element.
    rng : seed, numpy.random.Generator or None
        Draws `seed`; None is NumPy's global generator.

    Attributes
    ----------
    seed, calls : int
        What the next mask is made from; `calls` counts the training forwards.

    References
    ----------
    Srivastava et al., "Dropout: A simple way to prevent neural networks from overfitting", 2014.
    """

    state_names = ("seed", "calls")

    def __init__(self, dropout_ratio: float = 0.5, *, rng: Any = None) -> None:
        if not 0 <= dropout_ratio < 1:
            raise ValueError(f"Dropout: dropout_ratio must be in [0, 1), got {dropout_ratio}")
        self.params: list[Array] = []
        self.grads: list[Array] = []
        self.dropout_ratio = dropout_ratio
        self.seed = int.from_bytes(as_generator(rng).bytes(8), "little")
        self.calls = 0

    def forward(self, x: Any, train_flg: bool = True) -> Array:
        """Return x with a new mask, or with train_flg=False x * (1 - dropout_ratio)."""
        x = as_floating(x, None, "Dropout")
        self.shape, self.dtype, self.train_flg = x.shape, x.dtype, train_flg
        if not train_flg:
            return self._scale(x)
        self.calls += 1
        return dropout(x, self.dropout_ratio, self.seed, self.calls)

    def backward(self, dout: Any) -> Array:
        """Return dout under the mask, or the scale, of the last forward."""
        dout = check_grad_output(self, dout, self.shape, self.dtype)
        if not self.train_flg:
            return self._scale(dout)
        return dropout(dout, self.dropout_ratio, self.seed, self.calls)

    @quiet
    def _scale(self, x: Array) -> Array:
        return np.multiply(x, 1 - self.dropout_ratio, dtype=x.dtype)

    @property
    def mask(self) -> Array:
        """The mask of the last forward, which was a training one, made anew: 1 where an element was kept."""
        return dropout(np.ones(self.shape, self.dtype), self.dropout_ratio, self.seed, self.calls)
