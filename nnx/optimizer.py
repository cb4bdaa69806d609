"""Optimizers, which update lists of parameters in place, gradient clipping and learning-rate schedules.

W a parameter, dW its gradient, eps = 1e-7 as in the book. `lr` and the other hyperparameters are plain
attributes that may be assigned between steps. On the GPU a step is one kernel launch for all parameters of
a dtype. Optimizer state has the dtype of its parameter; in float16 the squares of small gradients underflow,
so use float32 weights with the adaptive optimizers.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nnx import kernels
from nnx.arguments import format_repr
from nnx.checks import check_integer, check_number, check_weights
from nnx.device import check_unmasked, is_writable, quiet
from nnx.np import Array, np
from nnx.tree import check_kinds

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Momentum",
    "Nesterov",
    "RMSprop",
    "clip_grads",
    "cosine_decay",
    "linear_warmup",
    "step_decay",
]


_BELOW_1 = math.nextafter(1, 0)  # the bias correction of Adam divides by 1 - beta1**iter and takes a square root
_LARGEST = {
    **dict.fromkeys(("lr", "weight_decay", "eps"), math.inf),  # any finite number
    **{"momentum": 1.0, "decay_rate": 1.0, "beta1": _BELOW_1, "beta2": _BELOW_1},
}


class _Optimizer:
    """Base class of the optimizers: hyperparameters, and state arrays for each parameter (slots)."""

    _settings: tuple[str, ...]
    _slots: tuple[str, ...] = ()
    lr: float
    weight_decay: float

    def __init__(self, **settings: float) -> None:
        for name, value in settings.items():
            setattr(self, name, value)
        self._check_settings()
        self.reset()

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        return format_repr(self)

    def reset(self) -> None:
        """Discard the state; the next update may use other parameters."""
        self.params: list[Array] | None = None
        for name in self._slots:
            setattr(self, name, [])

    def check_update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Raise the errors that `update` would raise for these arrays; nothing is changed."""
        self._check_arguments(params, grads)

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the hyperparameters are numbers, and each slot has an array like each parameter."""
        check_kinds(state, numbers.Real, *(name for name in self._settings if name in state))
        params = state["params"] or []
        if not all(isinstance(p, Array) for p in params):
            raise ValueError(f"params must be arrays of the model, got {params!r:.80}")
        for name in self._slots:
            check_kinds(state, list, name)
            shapes = [(getattr(a, "dtype", None), getattr(a, "shape", None)) for a in state[name]]
            if shapes != [(p.dtype, p.shape) for p in params]:
                raise ValueError(f"{name}: not of the dtypes and shapes of its parameters")

    def _check_arguments(self, params: Sequence[Array], grads: Sequence[Array]) -> tuple[Sequence[Array], list[float]]:
        """Return `grads` in the dtypes of `params`, and the hyperparameters as Python floats."""
        settings = self._check_settings()
        if not kernels.can_update(params, grads):
            grads = _cast_gradients(type(self).__name__, params, grads)
        if self.params is not None and (
            len(params) != len(self.params) or not all(map(operator.is_, params, self.params))
        ):
            raise ValueError(
                f"{type(self).__name__}: these {len(params)} params are not the {len(self.params)} arrays of the "
                "optimizer's state; call reset() to start again with them, or use a separate optimizer for each model"
            )
        return grads, settings

    def _check_settings(self) -> list[float]:
        """Return the hyperparameters as Python floats; they may have been assigned since the last step."""
        values = []
        for name in self._settings:
            value, high = getattr(self, name), _LARGEST[name]
            if type(value) is not float or not 0 <= value <= high or value == math.inf:
                value = check_number(f"{type(self).__name__}: {name}", value, 0, high)
            values.append(value)
        return values

    def _prepare(self, params: Any, grads: Any) -> tuple[Sequence[Array], Sequence[Array], list[float]]:
        """Return the checked lists of arrays and hyperparameters; create the state at the first update."""
        params, grads = _as_list(params), _as_list(grads)
        grads, settings = self._check_arguments(params, grads)
        if self._slots and self.params is None:
            slots = {name: [np.zeros(p.shape, p.dtype) for p in params] for name in self._slots}
            vars(self).update(slots, params=list(params))
        return params, grads, settings


class SGD(_Optimizer):
    """Stochastic gradient descent: W -= lr * dW.

    Parameters
    ----------
    lr : float
        The learning rate.
    weight_decay : float
        Decoupled weight decay: each step also subtracts lr * weight_decay * W for every parameter,
        including biases.

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.

    Examples
    --------
    >>> from nnx import SGD, np
    >>> W = np.array([1.0, 2.0])
    >>> SGD(lr=0.1).update([W], [np.array([1.0, -1.0])])
    >>> print(W)
    [0.9 2.1]
    """

    _settings = ("lr", "weight_decay")

    def __init__(self, lr: float = 0.01, *, weight_decay: float = 0.0) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay)

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Perform one update step on `params`, in place.

        Raises
        ------
        TypeError
            If `params` or `grads` hold anything but floating arrays of the array module, or a hyperparameter
            is not a number.
        ValueError
            If the lengths or shapes of `params` and `grads` differ, a parameter is read-only, or the state belongs
            to other parameters. After an error the parameters and the state are unchanged.
        """
        params, grads, (lr, weight_decay) = self._prepare(params, grads)
        kernels.sgd(params, grads, lr, 1 - lr * weight_decay)


class Momentum(_Optimizer):
    """SGD with momentum: v = momentum * v - lr * dW; W += v.

    Parameters
    ----------
    lr, momentum : float
    weight_decay : float
        As in `SGD`.

    References
    ----------
    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    Examples
    --------
    >>> from nnx import Momentum, np
    >>> W, optimizer = np.array([1.0, 2.0]), Momentum(lr=0.1)
    >>> for _ in range(2):
    ...     optimizer.update([W], [np.array([1.0, -1.0])])
    >>> print(W.round(3))
    [0.71 2.29]
    """

    _settings = ("lr", "momentum", "weight_decay")
    _slots = ("v",)
    v: list[Array]

    def __init__(self, lr: float = 0.01, momentum: float = 0.9, *, weight_decay: float = 0.0) -> None:
        super().__init__(lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Perform one update step on `params`, in place; raises the same errors as `SGD.update`."""
        params, grads, (lr, momentum, weight_decay) = self._prepare(params, grads)
        kernels.momentum(params, grads, self.v, lr, momentum, 1 - lr * weight_decay)


class Nesterov(Momentum):
    """Nesterov accelerated gradient: v = momentum * v - lr * dW; W += momentum * v - lr * dW.

    Parameters
    ----------
    lr, momentum : float
    weight_decay : float
        As in `SGD`.

    References
    ----------
    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013; in the
    form of Bengio et al., "Advances in optimizing recurrent networks", 2013, eq. 7.

    Examples
    --------
    >>> from nnx import Nesterov, np
    >>> W, optimizer = np.array([1.0, 2.0]), Nesterov(lr=0.1)
    >>> optimizer.update([W], [np.array([1.0, -1.0])])
    >>> print(W.round(3))
    [0.81 2.19]
    """

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Perform one update step on `params`, in place."""
        params, grads, (lr, momentum, weight_decay) = self._prepare(params, grads)
        kernels.nesterov(params, grads, self.v, lr, momentum, 1 - lr * weight_decay)


class AdaGrad(_Optimizer):
    """AdaGrad, adaptive gradient descent: h += dW**2; W -= lr * dW / (sqrt(h) + eps).

    Parameters
    ----------
    lr : float
    eps : float
        1e-7, as in the book.
    weight_decay : float
        As in `SGD`.

    References
    ----------
    Duchi, Hazan and Singer, "Adaptive subgradient methods", 2011.

    Examples
    --------
    >>> from nnx import AdaGrad, np
    >>> W, optimizer = np.array([1.0, 2.0]), AdaGrad(lr=0.1)
    >>> optimizer.update([W], [np.array([1.0, -1.0])])
    >>> print(W.round(3))
    [0.9 2.1]
    """

    _settings = ("lr", "eps", "weight_decay")
    _slots = ("h",)
    h: list[Array]

    def __init__(self, lr: float = 0.01, *, eps: float = 1e-7, weight_decay: float = 0.0) -> None:
        super().__init__(lr=lr, eps=eps, weight_decay=weight_decay)

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Perform one update step on `params`, in place."""
        params, grads, (lr, eps, weight_decay) = self._prepare(params, grads)
        kernels.adagrad(params, grads, self.h, lr, eps, 1 - lr * weight_decay)


class RMSprop(_Optimizer):
    """RMSprop: h = decay_rate * h + (1 - decay_rate) * dW**2; W -= lr * dW / (sqrt(h) + eps).

    Parameters
    ----------
    lr, decay_rate : float
    eps : float
        1e-7, as in the book.
    weight_decay : float
        As in `SGD`.

    References
    ----------
    Tieleman and Hinton, "Neural networks for machine learning", 2012, lecture 6e.

    Examples
    --------
    >>> from nnx import RMSprop, np
    >>> W, optimizer = np.array([1.0, 2.0]), RMSprop(lr=0.01)
    >>> optimizer.update([W], [np.array([1.0, -1.0])])
    >>> print(W.round(3))
    [0.9 2.1]
    """

    _settings = ("lr", "decay_rate", "eps", "weight_decay")
    _slots = ("h",)
    h: list[Array]

    def __init__(
        self, lr: float = 0.01, decay_rate: float = 0.99, *, eps: float = 1e-7, weight_decay: float = 0.0
    ) -> None:
        super().__init__(lr=lr, decay_rate=decay_rate, eps=eps, weight_decay=weight_decay)

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Perform one update step on `params`, in place."""
        params, grads, (lr, decay_rate, eps, weight_decay) = self._prepare(params, grads)
        kernels.rmsprop(params, grads, self.h, lr, decay_rate, eps, 1 - lr * weight_decay)


class Adam(_Optimizer):
    """Adam: momentum and RMSprop combined, with bias correction.

    m = beta1 * m + (1 - beta1) * dW; v = beta2 * v + (1 - beta2) * dW**2;
    W -= lr * sqrt(1 - beta2**iter) / (1 - beta1**iter) * m / (sqrt(v) + eps).

    Parameters
    ----------
    lr, beta1, beta2 : float
    eps : float
        1e-7, as in the book.
    weight_decay : float
        As in `SGD`.

    Attributes
    ----------
    iter : int
        Number of steps taken.

    References
    ----------
    Kingma and Ba, "Adam: A method for stochastic optimization", 2015, in the form given at the end of section 2.

    Examples
    --------
    >>> from nnx import Adam, np
    >>> W, optimizer = np.array([1.0, 2.0]), Adam(lr=0.1)
    >>> for _ in range(2):
    ...     optimizer.update([W], [np.array([1.0, -1.0])])
    >>> print(W.round(3), optimizer.iter)
    [0.8 2.2] 2
    """

    _settings = ("lr", "beta1", "beta2", "eps", "weight_decay")
    _slots = ("m", "v")
    m: list[Array]
    v: list[Array]

    def __init__(
        self,
        lr: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        *,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

    def reset(self) -> None:
        """Discard the state; the next update may use other parameters."""
        super().reset()
        self.iter = 0

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError as the other optimizers do, and for a number of steps that is not an integer."""
        super().check_state(state)
        check_kinds(state, int, "iter")

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Perform one update step on `params`, in place; raises the same errors as `SGD.update`."""
        params, grads, (lr, beta1, beta2, eps, weight_decay) = self._prepare(params, grads)
        step = self.iter + 1
        rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        kernels.adam(params, grads, self.m, self.v, rate, beta1, beta2, eps, 1 - lr * weight_decay)
        self.iter = step


class AdamW(Adam):
    """Adam with decoupled weight decay, 0.01 by default: each step also subtracts lr * weight_decay * W.

    Parameters
    ----------
    lr, beta1, beta2, weight_decay : float
    eps : float
        1e-7, as in the book.

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.

    Examples
    --------
    >>> from nnx import AdamW, np
    >>> W, optimizer = np.array([1.0, 2.0]), AdamW(lr=0.1, weight_decay=0.1)
    >>> optimizer.update([W], [np.array([1.0, -1.0])])
    >>> print(W.round(3))
    [0.89 2.08]
    """

    def __init__(
        self,
        lr: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.01,
        *,
        eps: float = 1e-7,
    ) -> None:
        super().__init__(lr, beta1, beta2, eps=eps, weight_decay=weight_decay)


def clip_grads(grads: Iterable[Array], max_norm: float) -> None:
    """Scale all gradients in place by max_norm / (norm + 1e-6) if that is less than 1, as in the book.

    norm = sqrt(sum of all squares), computed without overflow and without synchronizing the GPU. If a
    gradient is infinite or NaN, all gradients are left unchanged; `Trainer` reports non-finite parameters.

    Raises
    ------
    TypeError, ValueError
        If `grads` hold anything but writable floating arrays of the array module, or max_norm is not a positive
        number; the gradients are then unchanged.

    References
    ----------
    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, algorithm 1.

    Examples
    --------
    >>> from nnx import clip_grads, np
    >>> grads = [np.array([3.0]), np.array([4.0])]
    >>> clip_grads(grads, max_norm=1.0)
    >>> print([grad.round(3).tolist() for grad in grads])
    [[0.6], [0.8]]
    """
    if not isinstance(max_norm, numbers.Real) or isinstance(max_norm, bool):
        raise TypeError(f"clip_grads: max_norm must be a number, got {max_norm!r:.80}")
    if not max_norm > 0:
        raise ValueError(f"clip_grads: max_norm must be positive, got {max_norm}")
    grads = [_plain_array("clip_grads", f"grads[{i}]", g) for i, g in enumerate(grads)]
    for i, g in enumerate(grads):
        _check_writable("clip_grads", f"grads[{i}]", g)
    if grads:
        kernels.clip_grads(grads, max_norm)


def _as_list(arrays: Iterable[Array]) -> list[Array]:
    return arrays if type(arrays) is list else list(arrays)


def _plain_array(name: str, argument: str, array: Any) -> Any:
    """Return `array` as a base-class view of the same memory; raise if it has masked elements."""
    if type(array) is Array or not isinstance(array, Array):
        return array
    check_unmasked(array, f"{name}: {argument}")
    return np.asarray(array)


def _check_writable(name: str, argument: str, array: Array) -> None:
    check_weights(name, **{argument: array})
    if not is_writable(array):
        raise ValueError(f"{name}: {argument} is read-only; pass a writable copy, {argument}.copy()")


def _cast_gradients(name: str, params: Sequence[Array], grads: Sequence[Array]) -> list[Array]:
    """Return `grads` in the dtypes of `params`; raise unless lengths and shapes match."""
    if len(params) != len(grads):
        raise ValueError(f"{name}: every parameter needs a gradient, got {len(params)} params and {len(grads)} grads")
    return [_cast_gradient(name, i, p, g) for i, (p, g) in enumerate(zip(params, grads, strict=True))]


@quiet
def _cast_gradient(name: str, i: int, p: Array, g: Array) -> Array:
    _check_writable(name, f"params[{i}]", p)
    g = _plain_array(name, f"grads[{i}]", g)
    native = g.astype(g.dtype.newbyteorder("="), copy=False) if isinstance(g, Array) else g
    check_weights(name, **{f"grads[{i}]": native})
    if p.shape != g.shape:
        raise ValueError(f"{name}: grads[{i}] must have the shape of params[{i}] {p.shape}, got {g.shape}")
    return g.astype(p.dtype, copy=False)


# Learning-rate schedules: functions of the step number, for `callbacks.LearningRateScheduler` or a user-defined loop.


def step_decay(lr: float, every: int, factor: float = 0.1) -> Callable[[int], float]:
    """Return the schedule step -> lr * factor ** (step // every).

    A TypeError or ValueError for arguments that are no numbers, or out of range: lr and factor 0 or more, every at
    least 1; likewise for the other schedules.

    Examples
    --------
    >>> from nnx.optimizer import step_decay
    >>> schedule = step_decay(0.1, every=100)
    >>> [round(schedule(step), 4) for step in (0, 99, 100, 250)]
    [0.1, 0.1, 0.01, 0.001]
    """
    check_number("step_decay: lr", lr, 0)
    check_integer("step_decay: every", every)
    check_number("step_decay: factor", factor, 0)
    return functools.partial(_step_decay, lr, every, factor)


def cosine_decay(lr: float, steps: int, final: float = 0.0) -> Callable[[int], float]:
    """Return a schedule that follows half a cosine from `lr` at step 0 to `final` at `steps` and after.

    References
    ----------
    Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", 2017, eq. 5.

    Examples
    --------
    >>> from nnx.optimizer import cosine_decay
    >>> schedule = cosine_decay(0.1, steps=100)
    >>> [round(schedule(step), 3) for step in (0, 25, 50, 100, 200)]
    [0.1, 0.085, 0.05, 0.0, 0.0]
    """
    check_number("cosine_decay: lr", lr, 0)
    check_integer("cosine_decay: steps", steps)
    check_number("cosine_decay: final", final, 0)
    return functools.partial(_cosine_decay, lr, steps, final)


def linear_warmup(steps: int, schedule: Callable[[int], float]) -> Callable[[int], float]:
    """Return `schedule` with its first `steps` values multiplied by 1 / steps, 2 / steps, ..., 1.

    Examples
    --------
    >>> from nnx.optimizer import cosine_decay, linear_warmup
    >>> schedule = linear_warmup(10, cosine_decay(0.1, steps=100))
    >>> [round(schedule(step), 3) for step in (0, 4, 9, 50, 100)]
    [0.01, 0.05, 0.098, 0.05, 0.0]
    """
    check_integer("linear_warmup: steps", steps)
    if not callable(schedule):
        raise TypeError(f"linear_warmup: schedule must be a function of the steps taken, got {schedule!r:.80}")
    return functools.partial(_linear_warmup, steps, schedule)


# Functions of the module, because a closure cannot be pickled.


def _step_decay(lr: float, every: int, factor: float, step: int) -> float:
    return lr * factor ** (step // every)


def _cosine_decay(lr: float, steps: int, final: float, step: int) -> float:
    return final + (lr - final) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def _linear_warmup(steps: int, schedule: Callable[[int], float], step: int) -> float:
    return schedule(step) * min((step + 1) / steps, 1)
