"""Protocols of layers, models, optimizers and callbacks.

A user-defined class need not inherit from a protocol; it needs its attributes and methods.
For mypy, annotate a variable that holds layers of different types: `layers: list[Layer] = [...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

__all__ = ["Callback", "Layer", "LossLayer", "Model", "Optimizer"]


class LossLayer(Protocol):
    """A loss function: `forward(x, t)` returns the loss, `backward(dout=1)` its gradient with respect to x.

    Examples
    --------
    >>> from nnx import SoftmaxWithLoss
    >>> from nnx.protocols import LossLayer
    >>> loss_layer: LossLayer = SoftmaxWithLoss()
    """

    @property
    def forward(self) -> Callable[..., Any]:
        """Method that returns the loss for the scores x and the targets t."""

    @property
    def backward(self) -> Callable[..., Any]:
        """Method that returns the gradient of the last forward pass."""


class Layer(LossLayer, Protocol):
    """A differentiable function: `forward` returns its outputs, `backward(dout)` the gradients of its inputs.

    `backward` overwrites the gradients of the parameters, so a layer that is used twice in one pass keeps only the
    gradients of the use that is differentiated last: create a second layer that shares the weights.

    Examples
    --------
    >>> from nnx import Affine, ReLU
    >>> from nnx.protocols import Layer
    >>> layers: list[Layer] = [Affine.init(2, 3), ReLU()]  # a type checker accepts both
    """

    @property
    def params(self) -> Sequence[Any]:
        """The parameter arrays."""

    @property
    def grads(self) -> Sequence[Any]:
        """The gradients of the parameters, arrays that `backward` writes in place."""


class Model(Layer, Protocol):
    """A complete network: `forward(x, t)` returns the loss, and `backward()` needs no argument.

    Examples
    --------
    >>> from nnx import TwoLayerNet
    >>> from nnx.protocols import Model
    >>> def number_of_parameters(model: Model) -> int:
    ...     return sum(param.size for param in model.params)
    >>> number_of_parameters(TwoLayerNet(2, 10, 3))
    63
    """


class Optimizer(Protocol):
    """An update rule for parameters.

    Examples
    --------
    >>> from nnx import Trainer, TwoLayerNet
    >>> class SignSGD:
    ...     def update(self, params, grads):
    ...         for param, grad in zip(params, grads, strict=True):
    ...             param -= 0.01 * ((grad > 0) * 2 - 1)
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3), SignSGD())
    """

    def update(self, params: Any, grads: Any, /) -> Any:
        """Perform one update step on `params`, in place."""


class _HasOnBegin(Protocol):
    def on_begin(self, trainer: Any, /) -> Any: ...


class _HasOnEvaluate(Protocol):
    def on_evaluate(self, trainer: Any, /) -> Any: ...


class _HasOnStep(Protocol):
    def on_step(self, trainer: Any, /) -> Any: ...


class _HasOnEpoch(Protocol):
    def on_epoch(self, trainer: Any, /) -> Any: ...


class _HasOnCheckpoint(Protocol):
    def on_checkpoint(self, trainer: Any, /) -> Any: ...


class _HasOnInterrupt(Protocol):
    def on_interrupt(self, trainer: Any, /) -> Any: ...


class _HasOnEnd(Protocol):
    def on_end(self, trainer: Any, /) -> Any: ...


#: An object with at least one of the methods that `Trainer.fit` calls with the trainer; see `nnx.callbacks`.
Callback: TypeAlias = (
    _HasOnBegin | _HasOnEvaluate | _HasOnStep | _HasOnEpoch | _HasOnCheckpoint | _HasOnInterrupt | _HasOnEnd
)
