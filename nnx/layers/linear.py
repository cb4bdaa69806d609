"""Linear layers. N rows, D inputs, H outputs; `...` any number of leading batch axes."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import numpy

from nnx.checks import as_floating, check_grad_output, check_weights
from nnx.initializers import Initializer, draw_weight, xavier
from nnx.kernels import affine, affine_grad, input_grad
from nnx.layers.base import BaseLayer
from nnx.np import Array, np

__all__ = ["Affine", "MatMul"]


class MatMul(BaseLayer):
    """Multiplication by a weight matrix: y = x @ W.

    Parameters
    ----------
    W : (D, H)
        A floating array of the array module. It is used as `params[0]` without a copy, so that
        layers can share it; the layer computes in its dtype.
    input_grad : bool
        False skips the gradient of the input, which the first layer of a network does not need;
        `backward` then returns None.

    Shapes
    ------
    x : (..., D), two or more axes    y, dout : (..., H)

    Raises
    ------
    TypeError
        If W is not a floating array of the array module.
    ValueError
        If the shapes of W, x or dout do not match.

    Examples
    --------
    >>> from nnx import MatMul, np
    >>> matmul = MatMul(np.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> print(matmul.forward([[1.0, 1.0]]))
    [[4. 6.]]
    >>> print(matmul.backward([[1.0, 0.0]]))
    [[1. 3.]]
    >>> print(matmul.grads[0])
    [[1. 0.]
     [1. 0.]]
    """

    batch_names = ("x",)
    param_names: tuple[str, ...] = ("W",)
    torch_names: ClassVar[dict[str, str | None]] = {"W": "weight.T", "b": "bias"}  # .T: transposed in the file
    x: Array  # input of the last forward pass
    shape: tuple[int, ...]  # of its output

    def __init__(self, W: Array, *, input_grad: bool = True) -> None:
        check_weights(type(self).__name__, W=W)
        if W.ndim != 2:
            raise ValueError(f"{type(self).__name__}: W must have two axes (inputs, outputs), got shape {W.shape}")
        self.params = [W]
        self.grads = [np.zeros(W.shape, W.dtype)]
        self.input_grad = input_grad

    @classmethod
    def init(
        cls,
        input_size: int,
        output_size: int,
        *,
        initializer: Initializer = xavier,
        dtype: Any = numpy.float32,
        rng: Any = None,
        input_grad: bool = True,
    ) -> Self:
        """Return a layer with a weight (input_size, output_size) of `initializer`, and in `Affine` a bias of zeros.

        Parameters
        ----------
        input_size, output_size : int
            D and H.
        initializer : function of a shape, dtype and rng
            See `nnx.initializers`; `functools.partial(normal, std=0.02)` chooses the standard deviation.
        dtype, rng
            As for the initializers.
        input_grad : bool
        """
        W = draw_weight(f"{cls.__name__}.init", initializer, dtype, rng, input_size=input_size, output_size=output_size)
        biases = [np.zeros(W.shape[1:], W.dtype) for _ in cls.param_names[1:]]
        return cls(W, *biases, input_grad=input_grad)

    def forward(self, x: Any) -> Array:
        """Return x @ W, plus b in `Affine`."""
        W = self.params[0]
        x = as_floating(x, W.dtype, type(self).__name__)
        if x.ndim < 2 or x.shape[-1] != W.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: x must have shape (N, {W.shape[0]}) to match W {W.shape}, got {x.shape}"
                + ("; make it a row with x[None], or a column with x[:, None]" if x.ndim == 1 else "")
            )
        self.x = x
        b = self.params[1] if len(self.params) > 1 else None
        y = affine(x, W, b) if x.ndim == 2 else affine(_rows(x), W, b).reshape(*x.shape[:-1], W.shape[1])
        self.shape = y.shape
        return y

    def backward(self, dout: Any) -> Array | None:
        """Write the gradient of W, x.T @ dout, and in `Affine` that of b, dout.sum(axis=0); return dout @ W.T."""
        W, x, dW = self.params[0], self.x, self.grads[0]
        dout = check_grad_output(self, dout, self.shape, W.dtype)
        if x.ndim > 2:
            x, dout = _rows(x), _rows(dout)
        affine_grad(x, dout, dW, self.grads[1] if len(self.grads) > 1 else None)
        if not self.input_grad:
            return None
        dx = input_grad(dout, W)
        return dx if self.x.ndim == 2 else dx.reshape(self.x.shape)


class Affine(MatMul):
    """A fully connected layer: y = x @ W + b.

    Parameters
    ----------
    W : (D, H)
    b : (H,)
        Of the same dtype as W; otherwise as for `MatMul`.
    input_grad : bool
        As for `MatMul`.

    Shapes
    ------
    x : (..., D), two or more axes    y, dout : (..., H)

    Examples
    --------
    >>> from nnx import Affine, np
    >>> affine = Affine(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, -0.5]))
    >>> print(affine.forward([[1.0, 1.0]]))
    [[4.5 5.5]]
    >>> print(affine.backward([[1.0, 0.0]]))
    [[1. 3.]]
    >>> affine.grads[0].shape, affine.grads[1].shape
    ((2, 2), (2,))
    >>> Affine.init(784, 100, rng=0)  # with random weights
    Affine(784, 100)
    """

    param_names = ("W", "b")

    def __init__(self, W: Array, b: Array, *, input_grad: bool = True) -> None:
        super().__init__(W, input_grad=input_grad)
        check_weights(type(self).__name__, b=b)
        if b.shape != W.shape[1:] or b.dtype != W.dtype:
            raise ValueError(
                f"{type(self).__name__}: b must be {W.dtype} of shape {W.shape[1:]} to match W {W.shape}, "
                f"got {b.dtype} {b.shape}"
            )
        self.params.append(b)
        self.grads.append(np.zeros(b.shape, b.dtype))


def _rows(a: Array) -> Array:
    """Return `a` with its leading axes flattened, as BLAS requires."""
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])  # -1 fails if there are no features
