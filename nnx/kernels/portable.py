"""The portable kernels, for NumPy and CuPy alike: the reference implementation for `native` and `cuda`.

N rows (all leading axes together), D features, H outputs, C classes, V rows of a vocabulary; arrays
have at least one axis, except those of elementwise functions. Kernels do not modify their arguments
unless their docstring says so; they work in place only on arrays that they allocate. float16 is computed
in float32. NumPy's floating-point warnings are disabled only where overflow to infinity or underflow to 0
is correct; CuPy issues none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy

from nnx.device import is_writable, quiet
from nnx.np import Array, Scalar, np

Arrays: TypeAlias = Sequence[Array]

__all__ = [
    "accumulation_dtype",
    "adagrad",
    "adam",
    "affine",
    "affine_grad",
    "all_finite",
    "batch_norm",
    "batch_norm_grad",
    "bias_grad",
    "can_update",
    "clip_grads",
    "dropout",
    "embedding",
    "embedding_grad",
    "gather",
    "gelu",
    "gelu_grad",
    "gru_gates",
    "gru_gates_grad",
    "gru_step",
    "gru_step_grad",
    "in_range",
    "input_grad",
    "layer_norm",
    "layer_norm_grad",
    "lstm_step",
    "lstm_step_grad",
    "momentum",
    "nesterov",
    "relu",
    "relu_grad",
    "rmsprop",
    "rnn_step",
    "rnn_step_grad",
    "sgd",
    "sigmoid",
    "sigmoid_grad",
    "sigmoid_loss",
    "sigmoid_loss_grad",
    "softmax",
    "softmax_grad",
    "softmax_loss",
    "softmax_loss_grad",
    "squared_error",
    "squared_error_grad",
    "tanh",
    "tanh_grad",
]

_TINY = 2.0**-700


def _elementwise(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """Let `kernel` take arrays without axes, of which NumPy would make scalars."""

    @functools.wraps(kernel)
    def any_shape(x: Array, *others: Array) -> Array:
        if x.ndim:
            return kernel(x, *others)
        return kernel(x.reshape(1), *(a.reshape(1) for a in others)).reshape(())

    return any_shape


def gather(x: Array, idx: Array) -> Array:
    """Return the rows `idx` of `x`; `take` would first copy a non-contiguous `x` as a whole."""
    return x.take(idx, axis=0) if x.flags.c_contiguous else x[idx]


def in_range(idx: Array, stop: int) -> bool:
    """Return whether all integers are in [0, stop); always True on the GPU, where the check would synchronize."""
    return not isinstance(idx, numpy.ndarray) or idx.size == 0 or (idx.min() >= 0 and idx.max() < stop)


# ---- linear -----------------------------------------------------------------------------------------


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return a @ b, in `out` if given. `dot` copies `b` if it is only some columns of a matrix; `matmul` does not."""
    if b.flags.forc and (out is None or out.flags.c_contiguous):
        return a.dot(b, out)
    return np.matmul(a, b, out=out)


@quiet
def affine(x: Array, W: Array, b: Array | None) -> Array:
    """Return x @ W + b for `x` (N, D), `W` (D, H) and `b` (H,) or None."""
    y = product(x, W)
    if b is not None:
        y += b
    return y


@quiet
def affine_grad(x: Array, dout: Array, dW: Array, db: Array | None) -> None:
    """Write x.T @ dout into `dW` (D, H), and the sum of the rows of `dout` (N, H) into `db` (H,) unless it is None."""
    product(x.T, dout, dW)
    if db is not None:
        bias_grad(dout, db)


@quiet
def input_grad(dout: Array, W: Array) -> Array:
    """Return dout @ W.T."""
    return product(dout, W.T)


@quiet
def bias_grad(dout: Array, out: Array) -> None:
    """Write the sum of the rows of `dout` (N, H) into `out` (H,)."""
    np.sum(dout, axis=0, dtype=accumulation_dtype(dout.dtype), out=out)


# ---- activations ------------------------------------------------------------------------------------


@_elementwise
@numpy.errstate(over="ignore", under="ignore")
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)); exp may overflow to infinity, whose reciprocal is 0."""
    y = np.negative(x, dtype=accumulation_dtype(x.dtype))
    np.exp(y, out=y)
    np.add(y, 1, out=y)
    np.reciprocal(y, out=y)
    return y.astype(x.dtype, copy=False)


@_elementwise
@quiet
def sigmoid_grad(dout: Array, y: Array) -> Array:
    """Return dout * y * (1 - y)."""
    dx = np.subtract(1, y)
    dx *= y
    dx *= dout
    return dx


@_elementwise
def relu(x: Array) -> Array:
    """Return max(x, 0); NaN stays NaN."""
    return np.maximum(x, 0)


@_elementwise
def relu_grad(dout: Array, y: Array) -> Array:
    """Return `dout` where y > 0, else 0 (also where `dout` is infinite)."""
    return np.where(y > 0, dout, 0)


@_elementwise
@quiet
def tanh(x: Array) -> Array:
    """Return tanh(x)."""
    return np.tanh(x)


@_elementwise
@quiet
def tanh_grad(dout: Array, y: Array) -> Array:
    """Return dout * (1 - y**2)."""
    dx = np.multiply(y, y)
    np.subtract(1, dx, out=dx)
    dx *= dout
    return dx


@_elementwise
@quiet
def gelu(x: Array) -> Array:
    """Return x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 * x**3)."""
    s, c, _ = _gelu_terms(x)
    return (np.where(x < 0, c, x) * s).astype(x.dtype, copy=False)


@_elementwise
@quiet
def gelu_grad(dout: Array, x: Array) -> Array:
    """Return dout * (s + x * s * (1 - s) * 2 * du/dx), s = (1 + tanh(u)) / 2."""
    s, c, du = _gelu_terms(x)
    return (dout * (s + c * s * (1 - s) * (2 * du))).astype(x.dtype, copy=False)


def _gelu_terms(x: Array) -> tuple[Array, Array, Array]:
    """Return (1 + tanh(u)) / 2 = sigmoid(2 * u), x clipped to [-30, 30], beyond which that is 0 or 1, and du/dx."""
    c = np.clip(x.astype(accumulation_dtype(x.dtype), copy=False), -30, 30)
    cc = c * c
    root = math.sqrt(2 / math.pi)
    return sigmoid(2 * root * c * (1 + 0.044715 * cc)), c, root * (1 + 3 * 0.044715 * cc)


@quiet
def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) over the last axis."""
    y = _subtract_max(x)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y.astype(x.dtype, copy=False)


@quiet
def softmax_grad(dout: Array, y: Array) -> Array:
    """Return y * (dout - sum(dout * y)) over the last axis."""
    dx = dout * y
    dx -= y * dx.sum(axis=-1, keepdims=True, dtype=accumulation_dtype(y.dtype))
    return dx


@numpy.errstate(invalid="ignore")
def _subtract_max(x: Array) -> Array:
    """Return x - max(x) over the last axis, with 0 at the maximum even if it is infinite.

    The softmax of an infinite score is then 1, as in the limit, and equal infinities share it evenly.
    """
    x = x.astype(accumulation_dtype(x.dtype), copy=False)
    top = x.max(axis=-1, keepdims=True)
    y = np.subtract(x, top)
    np.copyto(y, 0, where=x == top)
    return y


# ---- losses: the mean over all elements of t, or with weights, which sum to 1, sum(weight[m] * mean of group m), where
# ---- the elements of t, in order, form len(weight) groups of equal size; groups of weight 0 are ignored


@quiet
def softmax_loss(x: Array, t: Array, weight: Array | None) -> tuple[Scalar, Array]:
    """Return the mean of -log softmax(x)[t] over the rows of `x` (..., C), and softmax(x).

    A label outside [0, C) makes its row of softmax(x), and so the loss, NaN.
    """
    y = _subtract_max(x)
    classes = x.shape[-1]
    valid = ((t >= 0) & (t < classes))[..., None]
    picked = np.take_along_axis(y, np.where(valid, t[..., None], 0), -1)
    np.exp(y, out=y)
    total = y.sum(axis=-1, keepdims=True)
    loss = _mean(np.where(valid, np.log(total) - picked, np.nan), weight)
    np.divide(y, np.where(valid, total, np.nan), out=y)
    return loss.astype(x.dtype), y.astype(x.dtype, copy=False)


@quiet
def softmax_loss_grad(y: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    """Return (y - onehot(t)) * dout / N, the gradient of `softmax_loss` with respect to x."""
    dx = np.subtract(y, t[..., None] == np.arange(y.shape[-1]), dtype=y.dtype)
    return _scale(dx, t.size, dout, weight)


@quiet
def sigmoid_loss(x: Array, t: Array, weight: Array | None) -> tuple[Scalar, Array]:
    """Return the mean of log(1 + exp(z)), z = -x where t is 1 and x where it is 0, and sigmoid(x).

    Any other label makes its element of sigmoid(x), and so the loss, NaN.
    """
    x = np.where((t == 0) | (t == 1), x, np.nan).astype(x.dtype, copy=False)
    z = np.where(t == 1, -x, x).astype(accumulation_dtype(x.dtype), copy=False)
    losses = np.maximum(z, 0) + np.log1p(np.exp(-abs(z)))
    return _mean(losses, weight).astype(x.dtype), sigmoid(x)


@quiet
def sigmoid_loss_grad(y: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    """Return (y - t) * dout / N, the gradient of `sigmoid_loss` with respect to x; N elements."""
    return _scale(np.subtract(y, t, dtype=y.dtype), t.size, dout, weight)


@quiet
def squared_error(x: Array, t: Array, weight: Array | None) -> Scalar:
    """Return the mean of (x - t)**2."""
    return _mean(np.square(_difference(x, t, weight)), weight).astype(x.dtype)


@quiet
def squared_error_grad(x: Array, t: Array, dout: Any, weight: Array | None) -> Array:
    """Return 2 * (x - t) * dout / N, the gradient of `squared_error` with respect to x; N elements."""
    return _scale(_difference(x, t, weight), t.size, 2 * dout, weight).astype(x.dtype, copy=False)


def _difference(x: Array, t: Array, weight: Array | None) -> Array:
    """Return x - t in the accumulation dtype, with 0 in groups of weight 0, whose values are arbitrary."""
    dtype = accumulation_dtype(x.dtype)
    if weight is None:
        return np.subtract(x, t, dtype=dtype)
    with numpy.errstate(over="ignore", invalid="ignore"):
        groups = np.subtract(x, t, dtype=dtype).reshape(len(weight), -1)
    np.copyto(groups, 0, where=weight[:, None] == 0)
    return groups.reshape(x.shape)


def _mean(losses: Array, weight: Array | None) -> Scalar:
    if weight is None:
        return losses.mean()
    groups = losses.reshape(len(weight), -1)
    return (np.where(weight[:, None] == 0, 0, groups).mean(axis=1) * weight).sum()


def _scale(dx: Array, n: int, dout: Any, weight: Array | None) -> Array:
    """Return `dx` * dout / n, or the same weighted by group, for the loss's gradient `dout`; may overwrite `dx`."""
    dtype = accumulation_dtype(dx.dtype)
    if weight is None:
        return np.multiply(dx, dout / n, out=dx, dtype=dtype)
    groups = dx.reshape(len(weight), -1)  # a copy where dx is not C-ordered
    np.copyto(groups, 0, where=weight[:, None] == 0)
    np.multiply(groups, (weight * (dout * len(weight) / n))[:, None], out=groups, dtype=dtype)
    return groups.reshape(dx.shape)


# ---- dropout, normalization, embedding --------------------------------------------------------------


def dropout(x: Array, ratio: float, seed: int, call: int) -> Array:
    """Return `x` with a fraction `ratio` of its elements set to 0, by a hash of seed, call and index (in C order)."""
    *keys, threshold = dropout_keys(ratio, seed, call)
    bits = np.arange(x.size, dtype=np.uint32)
    for key in keys:
        bits ^= np.uint32(key)
        bits ^= bits >> 16
        bits *= np.uint32(0x7FEB352D)
        bits ^= bits >> 15
        bits *= np.uint32(0x846CA68B)
        bits ^= bits >> 16
    return np.where(bits.reshape(x.shape) >= np.uint32(threshold), x, 0)


def dropout_keys(ratio: float, seed: int, call: int) -> tuple[int, int, int]:
    """Return two 32-bit keys for the hash, by splitmix64, and the smallest hash for which an element is kept."""
    mask64 = 0xFFFFFFFFFFFFFFFF
    z = (seed + 0x9E3779B97F4A7C15 * call) & mask64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask64
    z ^= z >> 31
    return z & 0xFFFFFFFF, z >> 32, math.floor(ratio * 2**32)


@quiet
def batch_norm(
    x: Array, gamma: Array, beta: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
) -> tuple[Array, Array, Array]:
    """Return gamma * (x - mean) * rstd + beta for `x` (N, D), and mean and rstd = 1 / sqrt(var + eps) of its columns.

    Updates the running statistics in place: momentum * running + (1 - momentum) * batch, with the unbiased
    variance, which is undefined for one row, so that running_var is then unchanged.
    """
    y, mean, rstd, var = _normalize(x, gamma, beta, eps, 0)
    for running, batch in ((running_mean, mean), (running_var, var * (len(x) / max(1, len(x) - 1)))):
        if running is running_mean or len(x) > 1:
            running *= momentum
            running += (1 - momentum) * batch
    return y, mean, rstd


@quiet
def batch_norm_grad(
    dout: Array, x: Array, gamma: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array
) -> Array:
    """Write the sums of dout * xn and of dout over the rows into `dgamma` and `dbeta`, xn = (x - mean) * rstd.

    Return gamma * rstd * (dout - mean(dout) - xn * mean(dout * xn)), the means over the rows.
    """
    xn = (x - mean) * rstd
    sums = [np.sum(terms, axis=0, dtype=xn.dtype) for terms in (dout * xn, dout)]
    dgamma[...], dbeta[...] = sums
    dx = gamma * rstd * (dout - sums[1] / len(x) - xn * (sums[0] / len(x)))
    return dx.astype(x.dtype, copy=False)


@quiet
def layer_norm(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return gamma * (x - mean) * rstd + beta for `x` (N, D), and mean and rstd = 1 / sqrt(var + eps) of its rows."""
    y, mean, rstd, _ = _normalize(x, gamma, beta, eps, 1)
    return y, mean[:, 0], rstd[:, 0]


@quiet
def layer_norm_grad(
    dout: Array, x: Array, gamma: Array, mean: Array, rstd: Array, dgamma: Array, dbeta: Array
) -> Array:
    """Write the sums of dout * xn and of dout over the rows into `dgamma` and `dbeta`, xn = (x - mean) * rstd.

    Return rstd * (dxn - mean(dxn) - xn * mean(dxn * xn)), dxn = dout * gamma, the means over the features.
    """
    rstd = rstd[:, None]
    xn = (x - mean[:, None]) * rstd
    bias_grad(dout * xn, dgamma)
    bias_grad(dout, dbeta)
    dxn = (dout * gamma).astype(xn.dtype, copy=False)
    dx = dxn - dxn.mean(axis=1, keepdims=True)
    dx -= xn * (dxn * xn).mean(axis=1, keepdims=True)
    dx *= rstd
    return dx.astype(x.dtype, copy=False)


def _normalize(x: Array, gamma: Array, beta: Array, eps: float, axis: int) -> tuple[Array, Array, Array, Array]:
    """Return gamma * (x - mean) * rstd + beta, and mean, rstd and variance along `axis` in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    mean = x.mean(axis=axis, keepdims=axis == 1, dtype=dtype)
    xn = x - mean
    var = (xn * xn).mean(axis=axis, keepdims=axis == 1)
    rstd = 1 / np.sqrt(var + eps)
    xn *= rstd
    xn *= gamma
    xn += beta
    return xn.astype(x.dtype, copy=False), mean, rstd, var


def embedding(W: Array, idx: Array) -> Array:
    """Return W[idx], with a row of NaN for an index outside [0, V)."""
    valid = ((idx >= 0) & (idx < len(W)))[..., None]
    rows = np.where(valid[..., 0], idx, 0).astype(np.intp, copy=False)  # NumPy 2.0 takes no uint64
    return np.where(valid, W.take(rows, axis=0), np.nan)


@quiet
def embedding_grad(idx: Array, dout: Array, out: Array) -> None:
    """Write into row i of `out` (V, H) the sum of the rows of `dout` (N, H) where idx (N,) is i."""
    total = out if out.itemsize > 2 else np.empty(out.shape, accumulation_dtype(out.dtype))
    total[...] = 0
    np.add.at(total, idx, dout)
    out[...] = total


# ---- recurrent layers: time step t of T, for N rows and H hidden units. Of the arrays (N, T, ...), [:, t] is read, or
# ---- written in place. `product` is the previous state h times Wh, h_prev[:, t] the state h before step t; `dhs` is
# ---- the gradient of all hs, `dh` that of h from step t + 1, and `da` that of the sums a = x Wx + h Wh + b.


@quiet
def rnn_step(hs: Array, product: Array, h_prev: Array, t: int) -> None:
    """h = tanh(a): replace hs[:, t], which holds x Wx + b, and write h_prev[:, t + 1]. All have H columns."""
    hs[:, t] = np.tanh(_add(hs[:, t], product))
    h_prev[:, t + 1 : t + 2] = hs[:, t : t + 1]


@quiet
def rnn_step_grad(hs: Array, dhs: Array, dh: Array, da: Array, t: int) -> None:
    """Write da[:, t] = (dhs[:, t] + dh) * (1 - h**2)."""
    da[:, t] = _add(dhs[:, t], dh) * (1 - np.square(hs[:, t]))


@quiet
def lstm_step(gates: Array, product: Array, cs: Array, h_prev: Array, hs: Array, t: int) -> None:
    """c = f * c_prev + g * i; h = o * tanh(c), with f, i, o = sigmoid(a) and g = tanh(a).

    Replace gates[:, t], which holds x Wx + b, by f, g, i, o (N, 4H); write cs[:, t + 1], hs[:, t] and h_prev[:, t + 1].
    cs (N, T + 1, H) begins with the initial c.
    """
    H = hs.shape[2]
    a = _add(gates[:, t], product)
    g = np.tanh(a[:, H : 2 * H])
    a = sigmoid(a)
    a[:, H : 2 * H] = g
    c = a[:, :H] * cs[:, t] + g * a[:, 2 * H : 3 * H]
    gates[:, t], cs[:, t + 1] = a, c
    hs[:, t] = a[:, 3 * H :] * np.tanh(c)
    h_prev[:, t + 1 : t + 2] = hs[:, t : t + 1]


@quiet
def lstm_step_grad(gates: Array, cs: Array, dhs: Array, dh: Array, dc: Array, da: Array, t: int) -> None:
    """Write da[:, t] (N, 4H), and replace `dc`, the gradient of c from step t + 1, by that of c_prev."""
    H = dhs.shape[2]
    y, total, tanh_c = gates[:, t], _add(dhs[:, t], dh), np.tanh(cs[:, t + 1])
    f, g, i, o = (y[:, k * H : (k + 1) * H] for k in range(4))
    dsum = dc + total * o * (1 - np.square(tanh_c))
    da[:, t, :H] = dsum * cs[:, t] * f * (1 - f)
    da[:, t, H : 2 * H] = dsum * i * (1 - np.square(g))
    da[:, t, 2 * H : 3 * H] = dsum * g * i * (1 - i)
    da[:, t, 3 * H :] = total * tanh_c * o * (1 - o)
    dc[...] = dsum * f


@quiet
def gru_gates(gates: Array, product: Array, h_prev: Array, reset: Array, t: int) -> None:
    """z, r = sigmoid(a): replace gates[:, t, :2H] of gates (N, T, 3H), and write reset[:, t] = r * h_prev[:, t]."""
    H = h_prev.shape[2]
    gates[:, t, : 2 * H] = sigmoid(_add(gates[:, t, : 2 * H], product))
    reset[:, t] = gates[:, t, H : 2 * H] * h_prev[:, t]


@quiet
def gru_step(gates: Array, product: Array, h_prev: Array, hs: Array, t: int) -> None:
    """h = (1 - z) * h_prev + z * k, with k = tanh(a), where the product is that of `reset` (see `gru_gates`) and Wh.

    Replace gates[:, t, 2H:] by k; write hs[:, t] and h_prev[:, t + 1].
    """
    H = hs.shape[2]
    gates[:, t, 2 * H :] = k = np.tanh(_add(gates[:, t, 2 * H :], product))
    z = gates[:, t, :H]
    hs[:, t] = (1 - z) * h_prev[:, t] + z * k
    h_prev[:, t + 1 : t + 2] = hs[:, t : t + 1]


@quiet
def gru_step_grad(gates: Array, h_prev: Array, dhs: Array, dh: Array, product: Array, da: Array, t: int) -> None:
    """Write da[:, t, :H] and da[:, t, 2H:], of z and k; the gradient of h from step t + 1 is `dh` + `product`.

    Replace `dh` by the part of the gradient of h_prev that does not pass through a gate.
    """
    H = dhs.shape[2]
    total, z, k = _add(dhs[:, t], dh) + product, gates[:, t, :H], gates[:, t, 2 * H :]
    da[:, t, :H] = total * (k - h_prev[:, t]) * z * (1 - z)
    da[:, t, 2 * H :] = total * z * (1 - np.square(k))
    dh[...] = total * (1 - z)


@quiet
def gru_gates_grad(gates: Array, h_prev: Array, dreset: Array, dh: Array, da: Array, t: int) -> None:
    """Write da[:, t, H:2H], of r, for the gradient of `reset`; add its part in that of h_prev to `dh`."""
    H = dh.shape[1]
    r = gates[:, t, H : 2 * H]
    da[:, t, H : 2 * H] = dreset * h_prev[:, t] * r * (1 - r)
    dh[...] = _add(dh, dreset * r)


def _add(a: Array, b: Array) -> Array:
    return np.add(a, b, dtype=accumulation_dtype(a.dtype))


# ---- optimizers: update every parameter p, with its gradient g, and its state in place. decay_factor is
# ---- 1 - lr * weight_decay, exactly 1 without weight decay. All arguments are validated before anything is written.


def can_update(params: Arrays, grads: Arrays) -> bool:
    """Return whether every parameter is a writable floating array, and its gradient one of equal dtype and shape."""
    return len(params) == len(grads) and all(
        type(p) is type(g) is Array
        and p.shape == g.shape
        and p.dtype is g.dtype
        and p.dtype.kind == "f"
        and is_writable(p)
        for p, g in zip(params, grads, strict=True)
    )


@quiet
def sgd(params: Arrays, grads: Arrays, lr: float, decay_factor: float) -> None:
    """p = decay_factor * p - lr * g."""
    for p, g in zip(params, grads, strict=True):
        _step(p, lr * g, decay_factor)


@quiet
def momentum(params: Arrays, grads: Arrays, vs: Arrays, lr: float, momentum: float, decay_factor: float) -> None:
    """v = momentum * v - lr * g; p = decay_factor * p + v."""
    for p, g, v in zip(params, grads, vs, strict=True):
        v *= momentum
        v -= lr * g
        _step(p, -v, decay_factor)


@quiet
def nesterov(params: Arrays, grads: Arrays, vs: Arrays, lr: float, momentum: float, decay_factor: float) -> None:
    """v = momentum * v - lr * g; p = decay_factor * p + momentum * v - lr * g."""
    for p, g, v in zip(params, grads, vs, strict=True):
        step = lr * g
        v *= momentum
        v -= step
        _step(p, step - momentum * v, decay_factor)


@quiet
def adagrad(params: Arrays, grads: Arrays, hs: Arrays, lr: float, eps: float, decay_factor: float) -> None:
    """h += g**2; p = decay_factor * p - lr * g / (sqrt(h) + eps)."""
    for p, g, h in zip(params, grads, hs, strict=True):
        h += g * g
        _step(p, lr * g / (np.sqrt(h) + eps), decay_factor)


@quiet
def rmsprop(
    params: Arrays, grads: Arrays, hs: Arrays, lr: float, decay: float, eps: float, decay_factor: float
) -> None:
    """h = decay * h + (1 - decay) * g**2; p = decay_factor * p - lr * g / (sqrt(h) + eps)."""
    for p, g, h in zip(params, grads, hs, strict=True):
        h *= decay
        h += (1 - decay) * (g * g)
        _step(p, lr * g / (np.sqrt(h) + eps), decay_factor)


@quiet
def adam(
    params: Arrays,
    grads: Arrays,
    ms: Arrays,
    vs: Arrays,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay_factor: float,
) -> None:
    """p = decay_factor * p - lr * m / (sqrt(v) + eps).

    m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g**2.
    """
    for p, g, m, v in zip(params, grads, ms, vs, strict=True):
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * (g * g)
        _step(p, lr * m / (np.sqrt(v) + eps), decay_factor)


def _step(p: Array, step: Array, decay_factor: float) -> None:
    if decay_factor != 1:
        np.multiply(p, decay_factor, out=p)
    np.subtract(p, step, out=p)


@numpy.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore")
def clip_grads(grads: Arrays, max_norm: float) -> None:
    """Scale all of `grads` in place by max_norm / (norm + 1e-6) if that is below 1.

    Nothing is scaled if a gradient is infinite or NaN, as the norm is then not finite. The squares are
    summed in float64; if that overflows, the norm is computed from the gradients times 2**-700.
    """
    whole, scaled = (
        np.sqrt(sum(np.square(np.multiply(g, s, dtype=np.float64)).sum() for g in grads)) for s in (1.0, _TINY)
    )
    rate = np.where(np.isfinite(whole), max_norm / (whole + 1e-6), max_norm * _TINY / scaled)
    rate = np.where((rate < 1) & (scaled < np.inf), rate, 1.0)  # comparisons with NaN are False
    for g in grads:
        np.multiply(g, rate, out=g)


def all_finite(arrays: Arrays) -> Scalar:
    """Return whether `arrays` hold neither NaN nor infinity."""
    return np.stack([np.isfinite(a).all() for a in arrays]).all() if arrays else True


def accumulation_dtype(dtype: Any) -> Any:
    """Return the dtype to compute in: float32 for float16, whose range ends at 65504."""
    return np.float32 if dtype == np.float16 else dtype
