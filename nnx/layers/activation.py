"""Activation layers: elementwise functions of any shape, also of one number, and softmax over the last axis."""

from __future__ import annotations

from typing import Any

from nnx.checks import as_floating, as_scores, check_grad_output
from nnx.kernels import gelu, gelu_grad, relu, relu_grad, sigmoid, sigmoid_grad, softmax, softmax_grad, tanh, tanh_grad
from nnx.layers.base import BaseLayer
from nnx.np import Array

__all__ = ["GELU", "ReLU", "Sigmoid", "Softmax", "Tanh"]


class Sigmoid(BaseLayer):
    """The logistic function y = 1 / (1 + exp(-x)), accurate in both tails.

    Examples
    --------
    >>> from nnx import Sigmoid
    >>> sigmoid = Sigmoid()
    >>> print(sigmoid.forward([-1.0, 0.0, 1.0]).round(3))
    [0.269 0.5   0.731]
    >>> print(sigmoid.backward([1.0, 1.0, 1.0]).round(3))
    [0.197 0.25  0.197]
    """

    batch_names = ("out",)
    out: Array  # y of the last forward pass

    def forward(self, x: Any) -> Array:
        """Return 1 / (1 + exp(-x))."""
        self.out = sigmoid(as_floating(x, None, "Sigmoid"))
        return self.out

    def backward(self, dout: Any) -> Array:
        """Return dout * y * (1 - y)."""
        y = self.out
        return sigmoid_grad(check_grad_output(self, dout, y.shape, y.dtype), y)


class ReLU(BaseLayer):
    """The rectifier y = max(x, 0); its gradient at 0 is 0.

    Examples
    --------
    >>> from nnx import ReLU
    >>> relu = ReLU()
    >>> print(relu.forward([-1.0, 0.0, 1.0]))
    [0. 0. 1.]
    >>> print(relu.backward([1.0, 1.0, 1.0]))
    [0. 0. 1.]
    """

    batch_names = ("out",)
    out: Array  # y of the last forward pass

    def forward(self, x: Any) -> Array:
        """Return max(x, 0)."""
        self.out = relu(as_floating(x, None, "ReLU"))
        return self.out

    def backward(self, dout: Any) -> Array:
        """Return dout where y > 0, else 0."""
        y = self.out
        return relu_grad(check_grad_output(self, dout, y.shape, y.dtype), y)


class Tanh(BaseLayer):
    """The hyperbolic tangent y = tanh(x).

    Examples
    --------
    >>> from nnx import Tanh
    >>> tanh = Tanh()
    >>> print(tanh.forward([-1.0, 0.0, 1.0]).round(3))
    [-0.762  0.     0.762]
    >>> print(tanh.backward([1.0, 1.0, 1.0]).round(3))
    [0.42 1.   0.42]
    """

    batch_names = ("out",)
    out: Array  # y of the last forward pass

    def forward(self, x: Any) -> Array:
        """Return tanh(x)."""
        self.out = tanh(as_floating(x, None, "Tanh"))
        return self.out

    def backward(self, dout: Any) -> Array:
        """Return dout * (1 - y**2)."""
        y = self.out
        return tanh_grad(check_grad_output(self, dout, y.shape, y.dtype), y)


class GELU(BaseLayer):
    """The Gaussian error linear unit in its tanh approximation, y = x / 2 * (1 + tanh(u)).

    u = sqrt(2 / pi) * (x + 0.044715 * x**3); the error of the approximation is below 5e-4.

    References
    ----------
    Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2.

    Examples
    --------
    >>> from nnx import GELU
    >>> gelu = GELU()
    >>> print(gelu.forward([-1.0, 0.0, 1.0]).round(3))
    [-0.159  0.     0.841]
    >>> print(gelu.backward([1.0, 1.0, 1.0]).round(3))
    [-0.083  0.5    1.083]
    """

    batch_names = ("x",)
    x: Array  # input of the last forward pass

    def forward(self, x: Any) -> Array:
        """Return x / 2 * (1 + tanh(u))."""
        self.x = as_floating(x, None, "GELU")
        return gelu(self.x)

    def backward(self, dout: Any) -> Array:
        """Return dout * (1 + tanh(u) + x * (1 - tanh(u)**2) * du/dx) / 2."""
        x = self.x
        return gelu_grad(check_grad_output(self, dout, x.shape, x.dtype), x)


class Softmax(BaseLayer):
    """The softmax function y = exp(x) / sum(exp(x)) over the last axis.

    Examples
    --------
    >>> from nnx import Softmax
    >>> softmax = Softmax()
    >>> print(softmax.forward([[0.0, 1.0, 2.0]]).round(3))
    [[0.09  0.245 0.665]]
    >>> print(softmax.backward([[1.0, 0.0, 0.0]]).round(3))
    [[ 0.082 -0.022 -0.06 ]]
    """

    batch_names = ("out",)
    out: Array  # y of the last forward pass

    def forward(self, x: Any) -> Array:
        """Return softmax(x)."""
        self.out = softmax(as_scores(x, "Softmax"))
        return self.out

    def backward(self, dout: Any) -> Array:
        """Return y * (dout - sum(dout * y))."""
        y = self.out
        return softmax_grad(check_grad_output(self, dout, y.shape, y.dtype), y)
