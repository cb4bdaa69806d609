"""What nnx asks of the objects that it is given: layers, models, optimizers, callbacks.

These are protocols: a class of your own need not inherit from them, it needs their attributes and methods.
For mypy, declare a list of unlike layers that has a name of its own: `layers: list[Layer] = [...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

__all__ = ["Callback", "Layer", "LossLayer", "Model", "Optimizer"]


class LossLayer(Protocol):
    """A loss: `forward(x, t)` returns it, `backward(dout=1)` its gradient with respect to x."""

    @property
    def forward(self) -> Callable[..., Any]:
        """A method that returns the loss of the scores x for the targets t."""

    @property
    def backward(self) -> Callable[..., Any]:
        """A method that returns the gradient of the last forward."""


class Layer(LossLayer, Protocol):
    """A differentiable function: `forward` returns its outputs, `backward(dout)` the gradients of its inputs."""

    @property
    def params(self) -> Sequence[Any]:
        """The parameters, arrays."""

    @property
    def grads(self) -> Sequence[Any]:
        """Their gradients, arrays into which `backward` writes."""


class Model(Layer, Protocol):
    """A layer that is a whole network: `forward(x, t)` returns the loss, and `backward()` needs no argument."""


class Optimizer(Protocol):
    """An update rule for parameters."""

    def update(self, params: Any, grads: Any, /) -> Any:
        """Change `params` in place by one step."""


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
