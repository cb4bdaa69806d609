"""Checks for built-in and user-defined layers: numerical gradient checks, and the layer contract.

Both functions raise an AssertionError that names the layer and, for a gradient, the array and the element.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy

from nnx.device import asarray, to_cpu
from nnx.np import Array, np
from nnx.protocols import Layer

__all__ = ["check_gradients", "check_layer"]


def check_gradients(layer: Layer, *inputs: Any, rtol: float = 1e-5, eps: float = 1e-5, seed: int = 0) -> int:
    """Compare `backward` with central differences, (f(a + eps) - f(a - eps)) / (2 eps), element by element.

    f is a randomly weighted sum of the outputs, or the loss itself. The gradients of all parameters are
    checked, and those of all floating inputs for which `backward` returns a gradient.

    Parameters
    ----------
    layer : a layer whose parameters are float64
        In float32 rounding errors dominate the differences.
    inputs : the arguments of `layer.forward`
        A layer with several inputs returns their gradients as a tuple.
    rtol : float
        Tolerance relative to the larger of the two values or, for small values, to a thousandth of the
        largest value in the array.
    eps : float
    seed : int
        Seed of the random weights.

    Returns
    -------
    int
        The number of elements at kinks, such as 0 in ReLU, where the difference quotients from the left and from the
        right disagree: there any gradient between these is right.

    Examples
    --------
    >>> import numpy
    >>> from nnx import Affine, ReLU
    >>> from nnx.testing import check_gradients
    >>> x = numpy.random.default_rng(0).standard_normal((5, 3))
    >>> check_gradients(Affine.init(3, 4, dtype="float64", rng=0), x)
    0
    >>> check_gradients(ReLU(), numpy.array([[-1.0, 0.0, 2.0]]))
    1
    """
    name = type(layer).__name__
    for i, p in enumerate(layer.params):
        _require(p.dtype == np.float64, f"{name}: check_gradients needs float64, params[{i}] is {p.dtype}")
    arrays = [_as_input(a, np.float64) for a in inputs]
    weights: Any = 1

    def f() -> float:
        """Run a copy, whose layers, also inner ones, count calls and draw masks as in the first run."""
        copied = copy.deepcopy(before)
        for p, q in zip(copied.params, layer.params, strict=True):
            p[...] = q
        return float((copied.forward(*arrays) * weights).sum())

    before = copy.deepcopy(layer)
    out = layer.forward(*arrays)
    if out.ndim:
        weights = asarray(numpy.random.default_rng(seed).standard_normal(out.shape))
    dinputs = _as_tuple(layer.backward(weights))
    _check_input_gradients(layer, arrays, dinputs, is_loss=not out.ndim)
    checks = [(f"input {i}", a, d) for i, (a, d) in enumerate(zip(arrays, dinputs, strict=False)) if d is not None]
    checks += [(f"params[{i}]", p, g.copy()) for i, (p, g) in enumerate(zip(layer.params, layer.grads, strict=True))]
    return sum(_check_gradient(f"{name}: gradient of {what}", f, a, d, rtol, eps) for what, a, d in checks)


def _check_input_gradients(layer: Any, arrays: Sequence[Array], dinputs: Sequence[Any], *, is_loss: bool) -> None:
    """Raise if `backward` returns no gradient of a floating input; that of the targets of a loss is not needed."""
    if getattr(layer, "input_grad", True) is False:
        return
    for i, a in enumerate(arrays[:1] if is_loss else arrays):
        missing = i >= len(dinputs) or dinputs[i] is None
        _require(
            not missing or a.dtype.kind != "f",
            f"{type(layer).__name__}: backward returns no gradient of input {i}, which is floating",
        )


def _check_gradient(what: str, f: Callable[[], float], array: Array, gradient: Array, rtol: float, eps: float) -> int:
    """Compare a gradient with the differences of f; return the number of elements at kinks."""
    _require(gradient.shape == array.shape, f"{what} has shape {gradient.shape}, expected {array.shape}")
    analytic, (left, right) = to_cpu(gradient), _differences(f, array, eps)
    numeric = (left + right) / 2
    larger = numpy.maximum(abs(analytic), abs(numeric))
    tolerance = rtol * numpy.maximum(larger, 1e-3 * larger.max(initial=0) + 1e-8)
    error = abs(analytic - numeric) - tolerance
    _require(not numpy.isnan(error).any(), f"{what} is NaN")
    low, high = numpy.minimum(left, right), numpy.maximum(left, right)
    kinks = (error > 0) & (high - low > 0.01 * numpy.maximum(abs(low), abs(high)))
    kinks &= (low - tolerance <= analytic) & (analytic <= high + tolerance)
    error[kinks] = -1
    if error.max(initial=-1) > 0:
        worst = numpy.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{what} at {tuple(map(int, worst))}: backward gives {analytic[worst]:.9g}, the difference quotient "
            f"{numeric[worst]:.9g}"
        )
    return int(kinks.sum())


def check_layer(
    make: Callable[[Any], Layer], *inputs: Any, dtypes: Iterable[Any] = (numpy.float32, numpy.float64)
) -> None:
    """Check that a layer fulfils the contract that models, optimizers and trainers rely on.

    The contract: correct gradients; inputs are not modified and may be read-only or non-contiguous; results are
    not overwritten by later calls; the dtype is preserved; the batch size may change between calls; gradients are
    written in place, not accumulated; deepcopy and pickle give independent copies.

    Parameters
    ----------
    make : function of a dtype
        Returns a new layer whose parameters have that dtype and the same values at every call.
    inputs : the arguments of `forward`, on the host
        At least two rows each. Floating arrays are cast to the dtype under test, integer arrays are not.
    dtypes : dtypes to test, at least one

    Examples
    --------
    >>> import numpy
    >>> from nnx.testing import check_layer
    >>> class Square:
    ...     def __init__(self):
    ...         self.params, self.grads = [], []
    ...     def forward(self, x):
    ...         self.x = x
    ...         return x * x
    ...     def backward(self, dout):
    ...         return self.x * dout  # the factor 2 is missing
    >>> check_layer(lambda dtype: Square(), numpy.random.default_rng(0).standard_normal((5, 3)))
    Traceback (most recent call last):
    AssertionError: Square: ...
    """
    if isinstance(dtypes, str) or not isinstance(dtypes, Iterable) or not (dtypes := list(dtypes)):
        raise TypeError(f"check_layer: dtypes must be a list of dtypes, such as ['float32'], got {dtypes!r}")
    check_gradients(make(np.float64), *inputs)
    for dtype in dtypes:
        arrays = [_as_input(a, dtype) for a in inputs]
        layer = make(dtype)
        _require(len(layer.params) == len(layer.grads), f"{type(layer).__name__}: params and grads differ in length")
        expected = _run(layer, arrays)
        _check_dtypes(layer, expected, dtype)
        _check_repeats(layer, arrays, expected)
        _check_inputs(make, arrays, expected, dtype)
        _check_batches(make, arrays, dtype)
        _check_copies(make(dtype), arrays, expected)


def _run(layer: Any, arrays: Sequence[Array]) -> list[Any]:
    """Return the results of forward and backward, and copies of the parameter gradients."""
    out = layer.forward(*arrays)
    dout = np.ones_like(out) if out.ndim else 1
    return [out, *_as_tuple(layer.backward(dout)), *(g.copy() for g in layer.grads)]


def _check_dtypes(layer: Any, results: Sequence[Any], dtype: Any) -> None:
    for result in results:
        if result is not None:
            expected = numpy.dtype(dtype)
            _require(result.dtype == expected, f"{type(layer).__name__}: returns {result.dtype} for {expected}")


def _check_repeats(layer: Any, arrays: Sequence[Array], expected: Sequence[Any]) -> None:
    """Call the layer again after the run that gave `expected`."""
    kept = [None if a is None else a.copy() for a in expected]
    arrays_of = {"params": list(layer.params), "grads": list(layer.grads)}
    dout = np.ones_like(expected[0]) if expected[0].ndim else 1
    again = [expected[0], *_as_tuple(layer.backward(dout)), *layer.grads]
    _check_equal(layer, "a second backward gives a different gradient (it must write, not add)", again, kept)
    _run(layer, [a * 0.5 if a.dtype.kind == "f" else a for a in arrays])
    _check_equal(layer, "a result changes when the layer is called again", expected, kept)
    for kind, before in arrays_of.items():
        for i, (a, b) in enumerate(zip(before, getattr(layer, kind), strict=True)):
            name = f"{kind}[{i}]"
            _require(a is b, f"{type(layer).__name__}: backward replaces the array {name}; assign to {name}[...]")


def _check_inputs(make: Callable[[Any], Any], arrays: Sequence[Array], expected: Sequence[Any], dtype: Any) -> None:
    """Pass read-only inputs (CuPy has no such flag), then non-contiguous ones."""
    plain = [a.copy() for a in arrays]
    if isinstance(plain[0], numpy.ndarray):
        for a in plain:
            a.flags.writeable = False
    for given in (plain, [np.repeat(a, 2, axis=-1)[..., ::2] for a in arrays]):
        layer = make(dtype)
        out = layer.forward(*given)
        dout = np.ones_like(out) if out.ndim else 1
        result = [out, *_as_tuple(layer.backward(dout)), *layer.grads]
        _check_equal(layer, "an input is modified", given, arrays)
        _require(bool((to_cpu(dout) == 1).all()), f"{type(layer).__name__}: backward modifies dout")
        _check_close(layer, "read-only or non-contiguous inputs give a different result", result, expected)


def _check_batches(make: Callable[[Any], Any], arrays: Sequence[Array], dtype: Any) -> None:
    """Run a smaller batch after a larger one; the result must equal that of a new layer."""
    used, new = make(dtype), make(dtype)
    smaller = [a[: max(1, len(a) - 1)] for a in arrays]
    _run(used, arrays)
    _run(new, smaller)
    _check_close(new, "an earlier batch changes the result", _run(used, smaller), _run(new, smaller))


def _check_copies(layer: Any, arrays: Sequence[Array], expected: Sequence[Any]) -> None:
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - trusted data
        for i, p in enumerate(copied.params):
            shared = np.may_share_memory(p, layer.params[i])
            _require(not shared, f"{type(layer).__name__}: a copy shares params[{i}]")
        _check_close(layer, "a copy gives a different result", _run(copied, arrays), expected)


def _check_equal(layer: Any, what: str, results: Sequence[Any], expected: Sequence[Any]) -> None:
    _check_close(layer, what, results, expected, rtol=0)


def _check_close(layer: Any, what: str, results: Sequence[Any], expected: Sequence[Any], rtol: float = 1e-4) -> None:
    for a, b in zip(results, expected, strict=True):
        same = (a is None and b is None) or numpy.allclose(to_cpu(a), to_cpu(b), rtol=rtol, atol=rtol)
        _require(same, f"{type(layer).__name__}: {what}")


def _require(condition: bool, message: str) -> None:
    """Raise an AssertionError with `message` unless `condition` holds, under `python -O` too."""
    if not condition:
        raise AssertionError(message)


def _differences(f: Callable[[], float], array: Array, eps: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the difference quotients from the left and from the right for each element of `array`, which f reads."""
    left, right, middle = numpy.empty(array.shape), numpy.empty(array.shape), f()
    for index in numpy.ndindex(*array.shape):
        value = float(array[index])
        array[index] = value + eps
        right[index] = (f() - middle) / eps
        array[index] = value - eps
        left[index] = (middle - f()) / eps
        array[index] = value
    return left, right


def _as_input(a: Any, dtype: Any) -> Array:
    a = numpy.asarray(a)
    return asarray(a.astype(dtype) if a.dtype.kind == "f" else a.copy())


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)
