"""Normalization layers. N rows (product of all leading axes), D features (last axis)."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy

from nnx.checks import as_floating, check_grad_output, check_integer, check_weights, setting
from nnx.device import quiet
from nnx.initializers import check_dtype
from nnx.kernels import accumulation_dtype, batch_norm, batch_norm_grad, bias_grad, layer_norm, layer_norm_grad
from nnx.layers.base import BaseLayer
from nnx.np import Array, np

__all__ = ["BatchNorm", "LayerNorm"]


class _Norm(BaseLayer):
    """y = gamma * (x - mean) * rstd + beta, rstd = 1 / sqrt(var + eps)."""

    batch_names = ("x", "mean", "rstd")
    param_names = ("gamma", "beta")
    torch_names: ClassVar[dict[str, str | None]] = {"gamma": "weight", "beta": "bias"}
    x: Array  # input of the last forward pass, as (N, D)
    mean: Array  # statistics that its rows or columns were normalized with
    rstd: Array

    def __init__(self, gamma: Array, beta: Array, eps: float = 1e-5) -> None:
        name = type(self).__name__
        check_weights(name, gamma=gamma, beta=beta)
        if gamma.ndim != 1 or not gamma.size or gamma.shape != beta.shape or gamma.dtype != beta.dtype:
            raise ValueError(
                f"{name}: gamma and beta must have one axis, of one or more features, and the same shape and dtype; "
                f"got {gamma.dtype} {gamma.shape} and {beta.dtype} {beta.shape}"
            )
        self.params = [gamma, beta]
        self.grads = [np.zeros(gamma.shape, gamma.dtype), np.zeros(beta.shape, beta.dtype)]
        self.eps = eps
        setting(self, "eps")

    @classmethod
    def _initial(cls, size: int, dtype: Any) -> tuple[Array, Array]:
        """Return gamma and beta of a new layer."""
        name = f"{cls.__name__}.init"
        check_integer(f"{name}: size", size)
        dtype = check_dtype(name, dtype)
        return np.ones(size, dtype), np.zeros(size, dtype)

    def _rows(self, x: Any) -> Array:
        """Return `x` checked, as (N, D), and store its shape."""
        gamma = self.params[0]
        x = as_floating(x, gamma.dtype, type(self).__name__)
        if x.ndim < 2 or x.shape[-1:] != gamma.shape:
            raise ValueError(f"{type(self).__name__}: x must have shape (N, {len(gamma)}), got {x.shape}")
        self.shape = x.shape
        return x if x.ndim == 2 else x.reshape(-1, len(gamma))

    def _dout_rows(self, dout: Any) -> Array:
        dout = check_grad_output(self, dout, self.shape, self.params[0].dtype)
        return dout if dout.ndim == 2 else dout.reshape(-1, dout.shape[-1])


class LayerNorm(_Norm):
    """Layer normalization, of each row: y = gamma * (x - mean) / sqrt(var + eps) + beta.

    mean and var are taken over the features.

    Parameters
    ----------
    gamma, beta : (D,)
        Scale and shift, of the same floating dtype; usually ones and zeros.
    eps : float

    Shapes
    ------
    x, y, dout : (..., D), two or more axes

    References
    ----------
    Ba, Kiros and Hinton, "Layer normalization", 2016.

    Examples
    --------
    >>> from nnx import LayerNorm
    >>> norm = LayerNorm.init(2)
    >>> print(norm.forward([[1.0, 3.0], [10.0, 30.0]]).round(2))
    [[-1.  1.]
     [-1.  1.]]
    """

    @classmethod
    def init(cls, size: int, *, dtype: Any = numpy.float32, eps: float = 1e-5) -> LayerNorm:
        """Return a layer for `size` features, with gamma 1 and beta 0."""
        return cls(*cls._initial(size, dtype), eps)

    def forward(self, x: Any) -> Array:
        """Return x normalized by the mean and variance of each row, times gamma, plus beta."""
        self.x = self._rows(x)
        y, self.mean, self.rstd = layer_norm(self.x, self.params[0], self.params[1], setting(self, "eps"))
        return y if len(self.shape) == 2 else y.reshape(self.shape)

    def backward(self, dout: Any) -> Array:
        """Write the gradients; return (dxn - mean(dxn) - xn * mean(dxn * xn)) * rstd, where dxn = dout * gamma."""
        dx = layer_norm_grad(self._dout_rows(dout), self.x, self.params[0], self.mean, self.rstd, *self.grads)
        return dx if len(self.shape) == 2 else dx.reshape(self.shape)


class BatchNorm(_Norm):
    """Batch normalization, of each feature: y = gamma * (x - mean) / sqrt(var + eps) + beta.

    mean and var are taken over the rows of the batch in training; inference uses their running averages.

    Parameters
    ----------
    gamma, beta : (D,)
        Scale and shift, of the same floating dtype; usually ones and zeros.
    momentum : float
        Of the running averages: running = momentum * running + (1 - momentum) * batch.
    eps : float

    Raises
    ------
    TypeError, ValueError
        If a parameter, setting or input is invalid. Values whose squares overflow the dtype give NaN.

    Attributes
    ----------
    running_mean, running_var : (D,)
        Initially 0 and 1. The variance is unbiased, as in the paper, and float32 for float16 weights, since it
        may exceed the range of float16. A batch of one row has no unbiased variance: it leaves running_var
        unchanged, with a RuntimeWarning the first time.

    Shapes
    ------
    x, y, dout : (..., D), two or more axes

    References
    ----------
    Ioffe and Szegedy, "Batch normalization", 2015, algorithms 1 and 2.

    Examples
    --------
    >>> from nnx import BatchNorm
    >>> norm = BatchNorm.init(2)
    >>> print(norm.forward([[1.0, 10.0], [3.0, 30.0]]).round(2))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(norm.running_mean)
    [0.2 2. ]
    """

    state_names = ("running_mean", "running_var")
    torch_names: ClassVar[dict[str, str | None]] = {
        **_Norm.torch_names,
        "running_mean": "running_mean",
        "running_var": "running_var",
        "num_batches_tracked": None,
    }
    _warned = False  # about a batch of one row

    def __init__(self, gamma: Array, beta: Array, momentum: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__(gamma, beta, eps)
        self.momentum = momentum
        setting(self, "momentum", 1)
        self.running_mean = np.zeros(gamma.shape, gamma.dtype)
        self.running_var = np.ones(gamma.shape, accumulation_dtype(gamma.dtype))

    @classmethod
    def init(cls, size: int, *, dtype: Any = numpy.float32, momentum: float = 0.9, eps: float = 1e-5) -> BatchNorm:
        """Return a layer for `size` features, with gamma 1 and beta 0."""
        return cls(*cls._initial(size, dtype), momentum, eps)

    def forward(self, x: Any, train_flg: bool = True) -> Array:
        """Return x normalized by the batch statistics, or by the running ones if train_flg is False."""
        x, (gamma, beta) = self._rows(x), self.params
        momentum, eps = setting(self, "momentum", 1), setting(self, "eps")
        if train_flg:
            if len(x) < 2:
                self._check_rows(x)
            y, self.mean, self.rstd = batch_norm(x, gamma, beta, self.running_mean, self.running_var, momentum, eps)
        else:
            self.mean, self.rstd = self.running_mean, 1 / np.sqrt(self.running_var + eps)
            y = self._predict(x)
        self.x, self.train_flg = x, train_flg
        return y if len(self.shape) == 2 else y.reshape(self.shape)

    @quiet
    def _predict(self, x: Array) -> Array:
        gamma, beta = self.params
        return ((x - self.mean) * self.rstd * gamma + beta).astype(x.dtype, copy=False)

    @quiet
    def backward(self, dout: Any) -> Array:
        """Write the gradients; return that of x, for the statistics used in the last forward."""
        dout, gamma = self._dout_rows(dout), self.params[0]
        if self.train_flg:
            dx = batch_norm_grad(dout, self.x, gamma, self.mean, self.rstd, *self.grads)
            return dx if len(self.shape) == 2 else dx.reshape(self.shape)
        bias_grad(dout * ((self.x - self.mean) * self.rstd), self.grads[0])
        bias_grad(dout, self.grads[1])
        return (dout * (gamma * self.rstd)).astype(dout.dtype, copy=False).reshape(self.shape)

    def _check_rows(self, x: Array) -> None:
        if x.size == 0:  # would make the running statistics NaN
            raise ValueError(
                f"BatchNorm: the batch is empty, got shape {self.shape}, so its mean and variance are undefined"
            )
        if not self._warned:
            warnings.warn(
                "BatchNorm: a batch of one row has no variance, so running_var is not updated; use larger batches, "
                "or fit(drop_last=True) if only the last batch is that small",
                RuntimeWarning,
                stacklevel=3,
            )
            self._warned = True  # set after warn(), so that with warnings as errors every such batch raises
