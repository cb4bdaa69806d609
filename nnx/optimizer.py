"""Optimizers: `update(params, grads)` on lists of arrays, in place; and learning rates that change.

W a parameter, dW its gradient, eps = 1e-7 as in the source. `lr` and the other settings are plain
attributes that may be assigned between steps. On the GPU a step is one launch for all parameters of
a dtype. The state has the dtype of its parameter; in float16 the squares of small gradients vanish,
so give the adaptive optimizers float32 weights.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from nnx import kernels
from nnx.device import check_weights
from nnx.np import Array, np

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
    "step_decay",
    "warm_up",
]

_EPS = 1e-7


class SGD:
    """Stochastic gradient descent: W -= lr * dW.

    Parameters
    ----------
    lr : float
        The learning rate.
    """

    def __init__(self, lr: float = 0.01) -> None:
        self.lr = lr

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place.

        Raises
        ------
        TypeError
            If they hold anything but floating arrays of the active module.
        ValueError
            If the lists or the arrays in them do not match; nothing is changed.
        """
        kernels.sgd(params, _checked("SGD", params, grads), self.lr)


class _Stateful:
    """What an optimizer remembers: arrays beside each parameter, under the names of `_state`."""

    _state: tuple[str, ...]

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next update may be for other parameters."""
        self.params: list[Array] | None = None
        for name in self._state:
            setattr(self, name, [])

    def _begin(self, params: Sequence[Array], grads: Sequence[Array]) -> Sequence[Array]:
        """Return `grads` checked; make the state for new parameters, and refuse others than those it belongs to."""
        name = type(self).__name__
        grads = _checked(name, params, grads)
        if self.params is None:
            self.params = list(params)
            for state in self._state:
                setattr(self, state, [np.zeros(p.shape, p.dtype) for p in params])
        elif len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            raise ValueError(
                f"{name}: these {len(params)} params are not the {len(self.params)} arrays that its state belongs to; "
                "call reset() to start anew with them, or use one optimizer for each model"
            )
        return grads


class Momentum(_Stateful):
    """SGD with momentum: v = momentum * v - lr * dW; W += v.

    Parameters
    ----------
    lr, momentum : float

    References
    ----------
    Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """

    _state = ("v",)
    v: list[Array]

    def __init__(self, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__()
        self.lr, self.momentum = lr, momentum

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place; the errors are those of `SGD`, and a ValueError for other params."""
        grads = self._begin(params, grads)
        kernels.momentum(params, grads, self.v, self.lr, self.momentum)


class Nesterov(Momentum):
    """Momentum that looks ahead: v = momentum * v - lr * dW; W += momentum * v - lr * dW.

    Parameters
    ----------
    lr, momentum : float

    References
    ----------
    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013; in the
    form of Bengio et al., "Advances in optimizing recurrent networks", 2013, eq. 7.
    """

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place."""
        grads = self._begin(params, grads)
        kernels.nesterov(params, grads, self.v, self.lr, self.momentum)


class AdaGrad(_Stateful):
    """Steps that shrink where gradients were large: h += dW**2; W -= lr * dW / (sqrt(h) + eps).

    Parameters
    ----------
    lr : float

    References
    ----------
    Duchi, Hazan and Singer, "Adaptive subgradient methods", 2011.
    """

    _state = ("h",)
    h: list[Array]

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place."""
        grads = self._begin(params, grads)
        kernels.adagrad(params, grads, self.h, self.lr, _EPS)


class RMSprop(_Stateful):
    """AdaGrad that forgets: h = decay_rate * h + (1 - decay_rate) * dW**2; W -= lr * dW / (sqrt(h) + eps).

    Parameters
    ----------
    lr, decay_rate : float

    References
    ----------
    Tieleman and Hinton, "Neural networks for machine learning", 2012, lecture 6e.
    """

    _state = ("h",)
    h: list[Array]

    def __init__(self, lr: float = 0.01, decay_rate: float = 0.99) -> None:
        super().__init__()
        self.lr, self.decay_rate = lr, decay_rate

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place."""
        grads = self._begin(params, grads)
        kernels.rmsprop(params, grads, self.h, self.lr, self.decay_rate, _EPS)


class Adam(_Stateful):
    """Momentum and RMSprop together, corrected for their start at 0.

    m += (1 - beta1) * (dW - m); v += (1 - beta2) * (dW**2 - v);
    W -= lr * sqrt(1 - beta2**iter) / (1 - beta1**iter) * m / (sqrt(v) + eps).

    Parameters
    ----------
    lr, beta1, beta2 : float

    Attributes
    ----------
    iter : int
        Steps taken.

    References
    ----------
    Kingma and Ba, "Adam: A method for stochastic optimization", 2015, in the order of the end of section 2.
    """

    _state = ("m", "v")
    m: list[Array]
    v: list[Array]
    weight_decay = 0.0

    def __init__(self, lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.999) -> None:
        super().__init__()
        self.lr, self.beta1, self.beta2 = lr, beta1, beta2

    def reset(self) -> None:
        """Forget everything; the next update may be for other parameters."""
        super().reset()
        self.iter = 0

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place."""
        grads = self._begin(params, grads)
        self.iter += 1
        rate = self.lr * math.sqrt(1 - self.beta2**self.iter) / (1 - self.beta1**self.iter)
        shrink = 1 - self.lr * self.weight_decay
        kernels.adam(params, grads, self.m, self.v, rate, self.beta1, self.beta2, _EPS, shrink)


class AdamW(Adam):
    """Adam with decoupled weight decay: before each of its steps W -= lr * weight_decay * W.

    Parameters
    ----------
    lr, beta1, beta2, weight_decay : float
        The decay applies to all parameters, biases too.

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """

    def __init__(self, lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float = 0.01) -> None:
        super().__init__(lr, beta1, beta2)
        self.weight_decay = weight_decay


def clip_grads(grads: Sequence[Array], max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where their common norm exceeds `max_norm`, in place.

    norm = sqrt(sum of all squares) + 1e-6, as in the source; the GPU is not waited for.

    References
    ----------
    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, algorithm 1.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grads: max_norm must be positive, got {max_norm}")
    if grads:
        kernels.clip_grads(grads, max_norm)


def _checked(name: str, params: Sequence[Array], grads: Sequence[Array]) -> Sequence[Array]:
    """Return `grads` in the dtypes of `params`, having checked that the lists match."""
    if len(params) != len(grads):
        raise ValueError(f"{name}: every parameter needs a gradient, got {len(params)} params and {len(grads)} grads")
    for p, g in zip(params, grads, strict=True):
        if not (type(p) is type(g) is Array and p.shape == g.shape and p.dtype is g.dtype and p.dtype.kind == "f"):
            return [_matching(name, i, *pair) for i, pair in enumerate(zip(params, grads, strict=True))]
    return grads


def _matching(name: str, i: int, p: Array, g: Array) -> Array:
    native = g.astype(g.dtype.newbyteorder("="), copy=False) if isinstance(g, Array) else g
    check_weights(name, **{f"params[{i}]": p, f"grads[{i}]": native})
    if p.shape != g.shape:
        raise ValueError(f"{name}: grads[{i}] must have the shape of params[{i}] {p.shape}, got {g.shape}")
    return g.astype(p.dtype, copy=False)


# Learning rates: functions of the number of steps taken, for `callbacks.LearningRate` or a loop of your own.


def step_decay(lr: float, every: int, factor: float = 0.1) -> Callable[[int], float]:
    """Return step -> lr * factor ** (step // every)."""
    return lambda step: lr * factor ** (step // every)


def cosine_decay(lr: float, steps: int, final: float = 0.0) -> Callable[[int], float]:
    """Return step -> half a cosine from `lr` at 0 to `final` at `steps` and after.

    References
    ----------
    Loshchilov and Hutter, "SGDR: Stochastic gradient descent with warm restarts", 2017, eq. 5.
    """
    return lambda step: final + (lr - final) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def warm_up(steps: int, schedule: Callable[[int], float]) -> Callable[[int], float]:
    """Return `schedule` with its first `steps` values multiplied by 1 / steps, 2 / steps, ..., 1."""
    return lambda step: schedule(step) * min((step + 1) / steps, 1)
