"""Dropout layer. x, y, dout: any shape."""

from __future__ import annotations

import math
from typing import Any

from nnx.checks import as_floating, check_grad_output, setting
from nnx.device import quiet
from nnx.kernels import dropout
from nnx.layers.base import BaseLayer
from nnx.np import Array, np
from nnx.rng import as_generator, check_counters

__all__ = ["Dropout"]

_BELOW_1 = math.nextafter(1, 0)


class Dropout(BaseLayer):
    """Zeroes each element with probability `dropout_ratio` during training: y = x * mask.

    As in the book, kept elements are not scaled during training; inference scales by 1 - dropout_ratio instead.
    The mask is a hash of `seed`, `calls` and the element index: it is the same on both devices, takes no
    memory, and its state is two integers.

    Parameters
    ----------
    dropout_ratio : float
        In [0, 1); 0 keeps every element.
    rng : seed, numpy.random.Generator or None
        Draws `seed`; None uses NumPy's global generator.

    Attributes
    ----------
    seed, calls : int
        The state of the mask; `calls` counts the forward passes in training mode.

    References
    ----------
    Srivastava et al., "Dropout: A simple way to prevent neural networks from overfitting", 2014.

    Examples
    --------
    >>> from nnx import Dropout
    >>> dropout = Dropout(0.5, rng=0)
    >>> print(dropout.forward([1.0, 1.0, 1.0, 1.0]))
    [0. 1. 0. 1.]
    >>> print(dropout.backward([1.0, 1.0, 1.0, 1.0]))
    [0. 1. 0. 1.]
    >>> print(dropout.forward([1.0, 1.0, 1.0, 1.0], train_flg=False))
    [0.5 0.5 0.5 0.5]
    """

    state_names = ("seed", "calls")

    def __init__(self, dropout_ratio: float = 0.5, *, rng: Any = None) -> None:
        super().__init__()
        self.dropout_ratio = dropout_ratio
        self._ratio = setting(self, "dropout_ratio", _BELOW_1)  # of the last forward
        self.seed = int.from_bytes(as_generator(rng).bytes(8), "little")
        self.calls = 0

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the state is two integers of 64 bits."""
        check_counters(state, Dropout.state_names)

    def forward(self, x: Any, train_flg: bool = True) -> Array:
        """Return x * mask with a new mask, or x * (1 - dropout_ratio) if train_flg is False."""
        self.train_flg = train_flg
        return self._forward(x, train_flg)

    def backward(self, dout: Any) -> Array:
        """Return dout times the mask, or the scale, of the last forward."""
        return self._apply(check_grad_output(self, dout, self.shape, self.dtype))

    def _forward(self, x: Any, training: bool) -> Array:
        x = as_floating(x, None, type(self).__name__)
        self._ratio = setting(self, "dropout_ratio", _BELOW_1)
        self.shape, self.dtype, self._training = x.shape, x.dtype, training
        if training:
            self.calls += 1
        return self._apply(x)

    @quiet
    def _apply(self, x: Array) -> Array:
        """Return `x` times the mask, if in training, and the scale of the last forward."""
        scale = self._scale()
        if not self._training:
            return np.multiply(x, scale, dtype=x.dtype)
        y = dropout(x, self._ratio, self.seed, self.calls)
        return y if scale == 1 else np.multiply(y, scale, out=y)

    def _scale(self) -> float:
        return 1 if self._training else 1 - self._ratio

    @property
    def mask(self) -> Array:
        """The factor of each element in the last forward in training mode; it is recomputed at every access."""
        return self._apply(np.ones(self.shape, self.dtype))
