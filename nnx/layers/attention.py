"""Attention with dot products as scores, under the names of chapter 8 of *Deep Learning from Scratch 2*.

N rows, T time steps (Te of an encoder, Td of a decoder), H hidden units. A state h (N, H) is compared with the states
hs (N, T, H): the weight of a time step is the softmax of its dot product with h, and the result the weighted sum of hs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy

from nnx.checks import as_floating, check_grad_output
from nnx.device import quiet, to_cpu
from nnx.kernels import accumulation_dtype, softmax, softmax_grad
from nnx.layers.base import BaseLayer
from nnx.np import Array, np

__all__ = ["Attention", "AttentionWeight", "TimeAttention", "WeightSum"]


class _AttentionLayer(BaseLayer):
    """Base class of the layers. Their first input is hs (N, T, H), whose dtype their results have."""

    batch_names = ("cache",)
    _inputs: ClassVar[str] = "hs must have shape (N, T, H) and h (N, H)"
    _ndim: ClassVar[int] = 2  # of the second input
    cache: tuple[Array, ...]  # both inputs and the weights, in float32 if the inputs are float16
    dtype: Any

    def _as_inputs(self, hs: Any, other: Any, axis: int = 2) -> tuple[Array, Array]:
        """Return both as arrays; raise unless `other` has N rows and a last axis as long as the `axis` of hs."""
        name = type(self).__name__
        hs = as_floating(hs, None, name)
        dtype, wide = hs.dtype, accumulation_dtype(hs.dtype)  # scores may be beyond the range of float16
        hs, other = as_floating(hs, wide, name), as_floating(other, wide, name)
        if (
            (hs.ndim, other.ndim) != (3, self._ndim)
            or (len(other), other.shape[-1]) != (len(hs), hs.shape[axis])
            or not hs.size
            or not other.size
        ):
            raise ValueError(f"{name}: {self._inputs}, not empty, got {hs.shape} and {other.shape}")
        self.dtype = dtype
        return hs, other

    def _attend(self, hs: Array, queries: Array) -> Array:
        """Return the results for Q states h, `queries` (N, Q, H)."""
        weights = softmax(np.matmul(queries, hs.swapaxes(1, 2)))  # (N, Q, T)
        self.cache = hs, queries, weights
        return np.matmul(weights, hs).astype(self.dtype, copy=False)

    def _attend_grad(self, dout: Array) -> tuple[Array, Array]:
        """Return the gradients of hs and of the queries."""
        hs, queries, weights = self.cache
        dscores = softmax_grad(np.matmul(dout, hs.swapaxes(1, 2)), weights)
        dqueries = np.matmul(dscores, hs)
        # The gradient of hs, dscores.T @ queries + weights.T @ dout, is one product.
        left = np.concatenate((dscores.swapaxes(1, 2), weights.swapaxes(1, 2)), axis=2)  # (N, T, 2Q)
        dhs = np.matmul(left, np.concatenate((queries, dout), axis=1))
        return dhs.astype(self.dtype, copy=False), dqueries.astype(self.dtype, copy=False)


class AttentionWeight(_AttentionLayer):
    """The weights of the time steps: a = softmax(s), s[n, t] = hs[n, t] @ h[n].

    Shapes
    ------
    hs : (N, T, H)    h : (N, H)    a, da : (N, T)

    Raises
    ------
    ValueError
        If the shapes do not match, or an input is empty.

    Notes
    -----
    The layers of this module compute in the dtype of hs, and float16 in float32.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import AttentionWeight
    >>> hs = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> print(AttentionWeight().forward(hs, np.array([[1.0, 0.0]])).round(3))
    [[0.422 0.155 0.422]]
    """

    @quiet
    def forward(self, hs: Any, h: Any) -> Array:
        """Return the weights."""
        hs, h = self._as_inputs(hs, h)
        weights = softmax(np.matmul(hs, h[:, :, None])[:, :, 0])
        self.cache = hs, h, weights
        return weights.astype(self.dtype, copy=False)

    @quiet
    def backward(self, da: Any) -> tuple[Array, Array]:
        """Return the gradients of hs and h."""
        hs, h, weights = self.cache
        dscores = softmax_grad(check_grad_output(self, da, weights.shape, weights.dtype), weights)
        dhs, dh = dscores[:, :, None] * h[:, None], np.matmul(dscores[:, None], hs)[:, 0]
        return dhs.astype(self.dtype, copy=False), dh.astype(self.dtype, copy=False)


class WeightSum(_AttentionLayer):
    """The sum of the states, weighted: c[n] = sum over t of a[n, t] * hs[n, t].

    Shapes
    ------
    hs : (N, T, H)    a : (N, T)    c, dc : (N, H)

    Raises
    ------
    ValueError
        As for `AttentionWeight`.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import WeightSum
    >>> hs = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> print(WeightSum().forward(hs, np.array([[0.5, 0.25, 0.25]])))
    [[0.75 0.5 ]]
    """

    _inputs = "hs must have shape (N, T, H) and a (N, T)"

    @quiet
    def forward(self, hs: Any, a: Any) -> Array:
        """Return the weighted sum."""
        self.cache = hs, a = self._as_inputs(hs, a, axis=1)
        return np.matmul(a[:, None], hs)[:, 0].astype(self.dtype, copy=False)

    @quiet
    def backward(self, dc: Any) -> tuple[Array, Array]:
        """Return the gradients of hs and a."""
        hs, a = self.cache
        dc = check_grad_output(self, dc, hs.shape[::2], hs.dtype)
        dhs, da = a[:, :, None] * dc[:, None], np.matmul(hs, dc[:, :, None])[:, :, 0]
        return dhs.astype(self.dtype, copy=False), da.astype(self.dtype, copy=False)


class Attention(_AttentionLayer):
    """`WeightSum` with the weights of `AttentionWeight`: c[n] = sum over t of softmax(hs[n] @ h[n])[t] * hs[n, t].

    Shapes
    ------
    hs : (N, T, H)    h, c, dout : (N, H)

    Attributes
    ----------
    attention_weight : (N, T)
        The weights of the last forward; `Trainer.fit` releases them at its end.

    Raises
    ------
    ValueError
        As for `AttentionWeight`.

    References
    ----------
    Luong, Pham and Manning, "Effective approaches to attention-based neural machine translation", 2015, section 3.1.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import Attention
    >>> attention = Attention()
    >>> hs = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> print(attention.forward(hs, np.array([[1.0, 0.0]])).round(3))
    [[0.845 0.578]]
    >>> print(attention.attention_weight.round(3))
    [[0.422 0.155 0.422]]
    """

    @quiet
    def forward(self, hs: Any, h: Any) -> Array:
        """Return the weighted sum of hs."""
        hs, h = self._as_inputs(hs, h)
        return self._attend(hs, h[:, None])[:, 0]

    @quiet
    def backward(self, dout: Any) -> tuple[Array, Array]:
        """Return the gradients of hs and h."""
        hs, *_ = self.cache
        dout = check_grad_output(self, dout, hs.shape[::2], hs.dtype)
        dhs, dh = self._attend_grad(dout[:, None])
        return dhs, dh[:, 0]

    @property
    def attention_weight(self) -> Array:
        """The weights of the last forward."""
        return self.cache[2][:, 0]


class TimeAttention(_AttentionLayer):
    """`Attention` of every time step of a decoder over the states of an encoder.

    y[n, s] = sum over t of softmax(hs_enc[n] @ hs_dec[n, s])[t] * hs_enc[n, t]. This is scaled dot-product attention
    with a scale of 1, whose keys and values are hs_enc.

    Shapes
    ------
    hs_enc : (N, Te, H)    hs_dec, y, dout : (N, Td, H)

    Attributes
    ----------
    attention_weights : (Td, N, Te)
        The weights of the last forward, copied to the host: they are made for a plot. `Trainer.fit` releases them
        at its end.

    Raises
    ------
    ValueError
        As for `AttentionWeight`.

    Notes
    -----
    A forward takes two matrix products, a backward three for all time steps; the book has an `Attention` for each.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import TimeAttention
    >>> attention = TimeAttention()
    >>> attention.forward(np.ones((2, 5, 4)), np.ones((2, 3, 4))).shape
    (2, 3, 4)
    >>> attention.attention_weights.shape
    (3, 2, 5)
    """

    _inputs = "hs_enc must have shape (N, Te, H) and hs_dec (N, Td, H)"
    _ndim = 3

    @quiet
    def forward(self, hs_enc: Any, hs_dec: Any) -> Array:
        """Return the weighted sums of hs_enc."""
        return self._attend(*self._as_inputs(hs_enc, hs_dec))

    @quiet
    def backward(self, dout: Any) -> tuple[Array, Array]:
        """Return the gradients of hs_enc and hs_dec."""
        hs, queries, _ = self.cache
        return self._attend_grad(check_grad_output(self, dout, queries.shape, hs.dtype))

    @property
    def attention_weights(self) -> numpy.ndarray:
        """The weights of the last forward, one after the other for the time steps of the decoder."""
        return to_cpu(self.cache[2]).swapaxes(0, 1)
