"""Normalization to mean 0 and variance 1. N rows (all leading axes together), D features: the last axis."""

from __future__ import annotations

from typing import Any

from nnx.device import asfloat, asgrad, check_weights
from nnx.kernels import bias_grad
from nnx.kernels.portable import wide
from nnx.np import Array, np

__all__ = ["BatchNorm", "LayerNorm"]


class _Norm:
    """y = gamma * (x - mean) / sqrt(var + eps) + beta, with mean and var over the axes that `_axes` names."""

    param_names = ("gamma", "beta")
    xn: Array  # (x - mean) / std of the last forward
    std: Array
    eps = 1e-5

    def __init__(self, gamma: Array, beta: Array) -> None:
        name = type(self).__name__
        check_weights(name, gamma=gamma, beta=beta)
        if gamma.ndim != 1 or gamma.shape != beta.shape or gamma.dtype != beta.dtype:
            raise ValueError(
                f"{name}: gamma and beta must have one axis, the features, and be alike; "
                f"got {gamma.dtype} {gamma.shape} and {beta.dtype} {beta.shape}"
            )
        self.params = [gamma, beta]
        self.grads = [np.zeros(gamma.shape, gamma.dtype), np.zeros(beta.shape, beta.dtype)]

    def _axes(self, ndim: int) -> Any:
        raise NotImplementedError

    def _input(self, x: Any) -> Array:
        gamma = self.params[0]
        x = asfloat(x, gamma.dtype, type(self).__name__)
        if x.ndim < 2 or x.shape[-1:] != gamma.shape:
            raise ValueError(f"{type(self).__name__}: x must have shape (N, {len(gamma)}), got {x.shape}")
        return x

    def _normalize(self, x: Array, mean: Array, var: Array) -> Array:
        self.std = np.sqrt(var + self.eps).astype(x.dtype, copy=False)
        self.xn = x - mean
        self.xn /= self.std
        y = self.xn * self.params[0]
        y += self.params[1]
        return y

    def forward(self, x: Any) -> Array:
        """Return x normalized by its own mean and variance, times gamma, plus beta."""
        x = self._input(x)
        axes = self._axes(x.ndim)
        self.mean = x.mean(axis=axes, keepdims=True)
        self.var = x.var(axis=axes, keepdims=True, dtype=wide(x.dtype))
        return self._normalize(x, self.mean, self.var)

    def _dxn(self, dout: Any) -> Array:
        """Write the gradients of gamma and beta; return that of xn."""
        gamma, xn = self.params[0], self.xn
        dout = asgrad(self, dout, xn.shape, gamma.dtype)
        for grad, terms in zip(self.grads, (dout * xn, dout), strict=True):
            bias_grad(terms.reshape(-1, terms.shape[-1]), grad)
        return dout * gamma

    def backward(self, dout: Any) -> Array:
        """Write the gradients; return (dxn - mean(dxn) - xn * mean(dxn * xn)) / std, where dxn = dout * gamma."""
        dxn, axes = self._dxn(dout), self._axes(self.xn.ndim)
        dx = dxn - dxn.mean(axis=axes, keepdims=True)
        dx -= self.xn * (dxn * self.xn).mean(axis=axes, keepdims=True)
        dx /= self.std
        return dx


class LayerNorm(_Norm):
    """Normalizes each row: y = gamma * (x - mean) / sqrt(var + eps) + beta, mean and var over the features.

    Parameters
    ----------
    gamma, beta : (D,)
        Scale and shift, of one floating dtype; usually ones and zeros.

    Shapes
    ------
    x, y, dout : (..., D), two or more axes

    References
    ----------
    Ba, Kiros and Hinton, "Layer normalization", 2016.
    """

    def _axes(self, ndim: int) -> Any:
        return -1


class BatchNorm(_Norm):
    """Normalizes each feature: y = gamma * (x - mean) / sqrt(var + eps) + beta, mean and var over the rows.

    Training uses the batch's own mean and variance and keeps running ones for predicting.

    Parameters
    ----------
    gamma, beta : (D,)
        Scale and shift, of one floating dtype; usually ones and zeros.
    momentum : float
        Of the running statistics: running = momentum * running + (1 - momentum) * batch.

    Attributes
    ----------
    running_mean, running_var : (D,)
        0 and 1 at first; the variance is the unbiased one, as in the paper, and float32 for float16
        weights, whose range it may leave.

    Shapes
    ------
    x, y, dout : (..., D), two or more axes

    References
    ----------
    Ioffe and Szegedy, "Batch normalization", 2015, algorithms 1 and 2.
    """

    state_names = ("running_mean", "running_var")

    def __init__(self, gamma: Array, beta: Array, momentum: float = 0.9) -> None:
        super().__init__(gamma, beta)
        self.momentum = momentum
        self.running_mean = np.zeros(gamma.shape, gamma.dtype)
        self.running_var = np.ones(gamma.shape, wide(gamma.dtype))

    def _axes(self, ndim: int) -> Any:
        return tuple(range(ndim - 1))

    def forward(self, x: Any, train_flg: bool = True) -> Array:
        """Return x normalized by its own statistics, or with train_flg=False by the running ones."""
        x = self._input(x)
        self.train_flg = train_flg
        if not train_flg:
            return self._normalize(x, self.running_mean, self.running_var)
        if x.size == 0:  # its statistics would make the running ones NaN
            raise ValueError(f"BatchNorm: the batch is empty, got shape {x.shape}; its mean and variance have no value")
        y = super().forward(x)
        rows = y.size // y.shape[-1]
        unbiased = self.var * (rows / max(1, rows - 1))
        for running, batch in ((self.running_mean, self.mean), (self.running_var, unbiased)):
            running *= self.momentum
            running += (1 - self.momentum) * batch.reshape(-1)
        return y

    def backward(self, dout: Any) -> Array:
        """Write the gradients; return that of x, for the statistics of the last forward."""
        return super().backward(dout) if self.train_flg else self._dxn(dout) / self.std
