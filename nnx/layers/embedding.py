"""Embedding layer. V rows (vocabulary size), H columns; `...` any number of index axes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy

from nnx.checks import check_grad_output, check_range, check_weights
from nnx.initializers import Initializer, draw_weight, normal
from nnx.kernels import embedding, embedding_grad
from nnx.layers.base import BaseLayer
from nnx.np import Array, np

__all__ = ["Embedding"]


class Embedding(BaseLayer):
    """Look up rows of W, such as word vectors: y = W[idx].

    Parameters
    ----------
    W : (V, H)
        A floating array of the array module; used as `params[0]` without a copy.

    Shapes
    ------
    idx : (...) integers in [0, V)    y, dout : (..., H)

    Raises
    ------
    ValueError
        If the indices are not integers, or host indices are outside [0, V). Indices on the GPU are not
        checked, to avoid a synchronization: one out of range gives a row of NaN.

    Examples
    --------
    >>> from nnx import Embedding, np
    >>> embedding = Embedding(np.array([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]))
    >>> print(embedding.forward([2, 0, 2]))
    [[2.  2.5]
     [0.  0.5]
     [2.  2.5]]
    >>> embedding.backward(np.ones((3, 2)))
    >>> print(embedding.grads[0])
    [[1. 1.]
     [0. 0.]
     [2. 2.]]
    """

    param_names = ("W",)
    torch_names: ClassVar[dict[str, str | None]] = {"W": "weight"}
    batch_names = ("idx",)
    idx: Array

    def __init__(self, W: Array) -> None:
        check_weights(type(self).__name__, W=W)
        if W.ndim != 2:
            raise ValueError(f"{type(self).__name__}: W must have two axes (vocabulary, vector), got shape {W.shape}")
        self.params = [W]
        self.grads = [np.zeros(W.shape, W.dtype)]

    @classmethod
    def init(
        cls,
        vocab_size: int,
        vector_size: int,
        *,
        initializer: Initializer = normal,
        dtype: Any = numpy.float32,
        rng: Any = None,
    ) -> Embedding:
        """Return a layer with W (vocab_size, vector_size) of `initializer`; the options are those of `Affine.init`."""
        return cls(
            draw_weight(f"{cls.__name__}.init", initializer, dtype, rng, vocab_size=vocab_size, vector_size=vector_size)
        )

    def forward(self, idx: Any) -> Array:
        """Return W[idx]."""
        W = self.params[0]
        idx = check_range(idx, len(W), type(self).__name__, "idx")
        self.idx = np.asarray(idx, order="C")  # native kernels take no strides, as of a column of contexts
        return embedding(W, self.idx)

    def backward(self, dout: Any) -> None:
        """Write the gradient of W: for each index the sum of its rows of dout, added in row order."""
        W = self.params[0]
        dout = check_grad_output(self, dout, (*self.idx.shape, W.shape[1]), W.dtype)
        embedding_grad(self.idx.reshape(-1), dout.reshape(self.idx.size, W.shape[1]), self.grads[0])
