"""Validation of arguments: floating arrays, weights, gradients, labels, lengths. N rows, C classes."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy

from nnx import kernels
from nnx.device import as_real_array, asarray, describe
from nnx.np import Array, np

__all__ = [
    "as_floating",
    "as_scores",
    "check_bool",
    "check_grad_output",
    "check_integer",
    "check_list",
    "check_metrics",
    "check_number",
    "check_range",
    "check_same_length",
    "check_weights",
    "class_indices",
    "loss_grad",
    "setting",
    "takes_arguments",
    "takes_keyword",
]

_FLOAT32, _FLOAT64, _INT64 = map(numpy.dtype, ("float32", "float64", "int64"))


def as_floating(x: Any, dtype: Any, name: str) -> Array:
    """Return `x` as a floating array of the array module.

    With `dtype=None` a floating dtype is kept and integers become `result_type(x, float32)`.
    """
    if type(x) is Array and (x.dtype is dtype or (dtype is None and (x.dtype is _FLOAT32 or x.dtype is _FLOAT64))):
        return x  # the common case
    x = asarray(x, name=name)
    if dtype is None:
        dtype = x.dtype.newbyteorder("=") if x.dtype.kind == "f" else np.result_type(x.dtype, np.float32)
    with numpy.errstate(under="ignore"):
        return x.astype(dtype, copy=False)


def as_scores(x: Any, name: str) -> Array:
    """Return `x` as a floating array with a last axis of at least one class."""
    x = as_floating(x, None, name)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{name}: x must have a last axis of one or more classes, got shape {x.shape}")
    return x


def check_grad_output(layer: Any, dout: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return `dout`, the gradient of a layer's output, cast to `dtype`; raise if its shape is not `shape`."""
    if dout is None:
        raise ValueError(
            f"{type(layer).__name__}.backward: dout is None; the next layer was probably created with input_grad=False"
        )
    if type(dout) is not Array or dout.dtype is not dtype:
        dout = as_floating(dout, dtype, type(layer).__name__)
    if dout.shape != shape:
        raise ValueError(
            f"{type(layer).__name__}.backward: dout must have the shape of the output {shape}, got {dout.shape}"
        )
    return dout


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a Python float; raise unless it is a finite number in [low, high]. `name` is a prefix.

    A NumPy scalar would affect dtype promotion. NaN is in no interval.
    """
    value = value.item() if isinstance(value, Array | numpy.ndarray) and value.ndim == 0 else value
    if not isinstance(value, numbers.Real) or isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name} must be a number, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:  # of a huge integer
        number = math.inf
    if not (low <= number <= high and math.isfinite(number)):
        if high == math.inf:
            allowed = "finite" if low == -math.inf else f"finite and at least {low:g}"
        else:  # just below 1 is printed as 1
            allowed = f"in [{low:g}, {high:g}{')' if float(f'{high:g}') > high else ']'}"
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def setting(owner: Any, name: str, high: float = math.inf) -> float:
    """Return the attribute `name` of `owner`, a number in [0, high] that may have been assigned, as a Python float."""
    value = getattr(owner, name)
    if type(value) is float and 0 <= value <= high and value < math.inf:
        return value
    return check_number(f"{type(owner).__name__}: {name}", value, 0, high)


def check_integer(name: str, value: Any, low: int = 1) -> int:
    """Return `value` as an int; raise unless it is an integer of at least `low`. `name` is a prefix."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    number = int(value)
    if not low <= number < 1 << 63:
        raise ValueError(f"{name} must be at least {low}{' and below 2**63' if number >= low else ''}, got {number}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """Return `value` as a bool; raise unless it is one, or an integer. `name` is a prefix."""
    if not isinstance(value, numbers.Integral | numpy.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r:.80}")
    return bool(value)


def check_list(name: str, value: Any, of: str) -> list[Any]:
    """Return the elements of an iterable; raise a TypeError for others, strings and dicts. `name` is a prefix."""
    try:
        if isinstance(value, str | bytes | dict):
            raise TypeError
        return list(value)
    except TypeError:
        raise TypeError(f"{name} must be a list of {of}, got {value!r:.80}") from None


def check_metrics(name: str, metrics: Any) -> None:
    """Raise an error unless `metrics` is None or a dict of functions of two arguments. `name` is a prefix."""
    if metrics is None:
        return
    if not isinstance(metrics, Mapping) or not all(isinstance(key, str) for key in metrics):
        raise TypeError(f"{name}: metrics must be a dict of functions by name, or None, got {metrics!r:.80}")
    if reserved := metrics.keys() & {"loss", "accuracy"}:
        raise ValueError(f"{name}: metrics: {reserved.pop()} is a result of every validation; choose another name")
    for key, function in metrics.items():
        if not callable(function) or not takes_arguments(function, 2):
            raise TypeError(f"{name}: metrics: {key} must be a function of (scores, t), got {function!r:.80}")


def takes_arguments(function: Any, count: int) -> bool:
    """Return whether `function` can be called with `count` arguments; True if it has no signature, as one in C."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def takes_keyword(function: Any, name: str) -> bool:
    """Return whether `function` has a parameter of this name, or takes any keywords."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def loss_grad(layer: Any, dout: Any) -> Any:
    """Return `dout`, the gradient of the loss of `layer`, as a Python number; a GPU array stays on the GPU.

    Raises
    ------
    TypeError, ValueError
        If `dout` is not a single real number.
    """
    if type(dout) is int or type(dout) is float:
        return dout
    dout = as_real_array(dout, f"{type(layer).__name__}.backward: dout")
    if dout.ndim:
        raise ValueError(
            f"{type(layer).__name__}.backward: dout must be one number, the gradient of the loss, "
            f"got shape {dout.shape}"
        )
    return float(dout) if isinstance(dout, numpy.ndarray) else dout.astype(np.float64, copy=False)


def check_weights(name: str, **weights: Any) -> None:
    """Raise a TypeError unless every weight is a floating array of the array module.

    Weights are not converted: a converted copy would not be shared with other layers, and integer weights
    would truncate their updates. Subclasses with other arithmetic (numpy.matrix, numpy.ma.MaskedArray) are
    rejected; numpy.memmap is accepted.
    """
    for argument, weight in weights.items():
        if (
            not isinstance(weight, Array)
            or weight.dtype.kind != "f"
            or not weight.dtype.isnative
            or type(weight).__mul__ is not Array.__mul__
        ):
            remedy = f"make it with nnx.asarray({argument}, dtype='float32')"
            if isinstance(weight, numbers.Integral):
                remedy = f"{name}.init makes a layer from sizes"
            raise TypeError(
                f"{name}: {argument} must be a {np.__name__} array of a floating dtype, "
                f"got {describe(weight)}; {remedy}"
            )


def check_same_length(name: str, x: Any, t: Any) -> tuple[Array, Array]:
    """Return inputs and targets as arrays on their devices; raise unless they have equally many rows."""
    x, t = as_real_array(x, f"{name}: x"), as_real_array(t, f"{name}: t")
    if x.ndim == 0 or t.ndim == 0 or len(x) != len(t) or len(x) == 0:
        raise ValueError(
            f"{name}: x and t must have the same number of rows, at least one, got shapes {x.shape} and {t.shape}"
        )
    return x, t


def class_indices(
    t: Any, shape: tuple[int, ...], name: str = "class_indices", ignore_label: int | None = None
) -> Array:
    """Return the labels `t` for scores of `shape` (..., C) as indices of shape (...).

    Parameters
    ----------
    t : integers in [0, C) of shape (...), or one-hot rows (integers or bools) of `shape`
        Values are checked on the host only. Reading labels from the GPU would synchronize it, so there only
        shape and dtype are checked, and a label out of range makes the loss NaN.
    name : str
        Prefix of the error messages.
    ignore_label : int or None
        An additional valid label; it may be outside [0, C).

    Raises
    ------
    ValueError
        If the shape, dtype or values of the labels are invalid, or the batch is empty.
    """
    if (
        type(t) is Array
        and t.dtype is _INT64
        and t.shape == shape[:-1]
        and shape
        and t.size
        and kernels.in_range(t, shape[-1])
    ):
        return t  # the common case
    t = as_real_array(t, name)
    if not shape:
        raise ValueError(f"{name}: scores must have an axis for the classes, got a single number")
    rows, classes = shape[:-1], shape[-1]
    kind = t.dtype.kind
    if kind not in "iub":
        hint = "; use argmax(axis=-1)" if t.shape == shape else "; convert them with astype(int)"
        raise ValueError(
            f"{name}: labels must be integers in [0, {classes}) or one-hot integers, got {t.dtype} {t.shape}{hint}"
        )
    if t.size == 0:
        raise ValueError(f"{name}: the batch is empty, so the mean is undefined")
    if t.shape == rows:
        _check_range(t, classes, name, "labels", ignore_label)
        indices = t if kind == "i" else t.astype(np.int64)
    elif t.shape == shape:
        indices = t.argmax(axis=-1)
        if isinstance(t, numpy.ndarray) and not _is_one_hot(t, indices):
            raise ValueError(f"{name}: every one-hot row must hold a single 1 and otherwise zeros")
    else:
        raise ValueError(
            f"{name}: labels must be integers of shape {rows} or one-hot of shape {shape}, got shape {t.shape}"
            + ("; use numpy.ravel(labels)" if t.shape == (*rows, 1) else "")
        )
    return indices if isinstance(indices, Array) else np.asarray(indices)


def check_range(idx: Any, stop: int, name: str, what: str, ignored: int | None = None) -> Array:
    """Return `idx` as an integer array of the array module; raise if host values are outside [0, stop).

    Values equal to `ignored` are not checked.
    """
    idx = as_real_array(idx, name)
    if idx.dtype.kind not in "iu":
        raise ValueError(f"{name}: {what} must be integers in [0, {stop}), got {idx.dtype}")
    _check_range(idx, stop, name, what, ignored)
    return np.asarray(idx)


def _check_range(idx: Array, stop: int, name: str, what: str, ignored: int | None = None) -> None:
    if ignored is not None:
        idx = idx[idx != ignored] if isinstance(idx, numpy.ndarray) else idx
    if not kernels.in_range(idx, stop):
        low, high = idx.min(), idx.max()
        raise ValueError(f"{name}: {what} must be in [0, {stop}), got {low if low < 0 else high}")


def _is_one_hot(t: numpy.ndarray, indices: numpy.ndarray) -> bool:
    # Flat indices take a third of the time of take_along_axis.
    ones = t.ravel().take(indices.ravel() + numpy.arange(0, t.size, t.shape[-1])) == 1
    return numpy.count_nonzero(t) == indices.size == numpy.count_nonzero(ones)
