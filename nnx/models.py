"""Models: sequences of layers, and the two-layer net of the chapter. N rows, D inputs, H hidden, C classes."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import numpy

from nnx.checks import check_integer, check_list, check_same_length, takes_arguments
from nnx.device import asarray
from nnx.initializers import normal
from nnx.layers import Affine, Sigmoid, SoftmaxWithLoss
from nnx.np import Array, np
from nnx.protocols import Layer, LossLayer
from nnx.rng import as_generator
from nnx.tree import TiedParameters, named_layers

__all__ = ["Sequential", "TwoLayerNet"]


class Sequential:
    """A sequence of layers, followed by an optional loss layer.

    Parameters
    ----------
    layers : iterable of layers
        Objects with `params`, `grads`, `forward` and `backward`. They are not changed; no layer may occur
        twice. A Sequential without a loss layer is a layer too.
    loss_layer : layer with forward(x, t) and backward(dout=1), or None

    Attributes
    ----------
    params, grads : lists of arrays
        Those of the layers, in order. An array shared by two layers is listed twice.

    Notes
    -----
    `copy.deepcopy` preserves weights shared between layers. `pickle` preserves them if the layers hold the
    same array, but not if they hold W and W.T; `checkpoint.save` and `load` preserve both.
    """

    def __init__(self, layers: Iterable[Layer], loss_layer: LossLayer | None = None) -> None:
        name = type(self).__name__
        layers = check_list(f"{name}: layers", layers, "layers")
        for i, layer in enumerate(layers):
            _check_layer(f"{name}: layers[{i}]", layer, layers)
        if loss_layer is not None:
            _check_loss_layer(f"{name}: loss_layer", loss_layer)
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                f"{type(self).__name__}: a layer occurs twice, so its second forward would overwrite what its first "
                "backward needs; create another layer, which may share its weights"
            )
        self.layers: list[Any] = layers
        self.loss_layer: Any = loss_layer
        self.params: list[Array] = [p for layer in layers for p in layer.params]
        self.grads: list[Array] = [g for layer in layers for g in layer.grads]

    def predict(self, x: Any) -> Array:
        """Return the output of the last layer for `x`, without the loss.

        Layers with a `train_flg` argument are called with train_flg=False. The layers run as shallow copies, so no
        activations are kept and a pending `backward` is unaffected. A layer that holds other layers shares them with
        its copy: define `predict` in it, which is called instead, if a `backward` may be pending.
        """
        for layer in self.layers:
            if hasattr(layer, "predict"):
                x = layer.predict(x)
            elif _takes_train_flg(layer):
                x = copy.copy(layer).forward(x, train_flg=False)
            else:
                x = copy.copy(layer).forward(x)
        return x

    def forward(self, x: Any, t: Any = None) -> Array:
        """Return the loss for the inputs `x` and targets `t`; without a loss layer, the output of the last layer."""
        for layer in self.layers:
            x = layer.forward(x)
        if self.loss_layer is None:
            return x
        return self.loss_layer.forward(x, t)

    def backward(self, dout: Any = 1) -> Array | None:
        """Compute all gradients of the last forward; return that of the input, or None if the first layer skips it."""
        if self.loss_layer is not None:
            dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def evaluate(self, x: Any, t: Any, batch_size: int = 1024) -> tuple[float, float | None]:
        """Return the mean loss and the accuracy, the fraction of rows whose largest score is at the label.

        If the loss layer weights rows or ignores labels, both are weighted over all rows, independent of the
        batch size. The accuracy is None for a loss layer without a method `accuracy`, as in regression.
        Like `predict`, this does not change the layers.
        """
        if self.loss_layer is None:
            raise ValueError(f"{type(self).__name__}.evaluate: there is no loss layer; pass one to the constructor")
        x, t = check_same_length(f"{type(self).__name__}.evaluate", x, t)
        check_integer(f"{type(self).__name__}.evaluate: batch_size", batch_size)
        loss = hits = total = counted = numpy.float64(0)  # sums over all rows may overflow float16
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            layer, part = copy.copy(self.loss_layer), t[rows]
            if not hasattr(layer, "prepare_targets"):  # which checks labels on the host before it moves them
                part = asarray(part)
            mean = layer.forward(self.predict(asarray(x[rows])), part)
            weight = getattr(layer, "weight_sum", None)
            weight = numpy.float64(len(part)) if weight is None else weight
            with numpy.errstate(under="ignore"):
                loss, total = loss + mean * weight, total + weight
            if hasattr(layer, "accuracy"):
                kept = getattr(layer, "kept", None)
                count = len(part) if kept is None else kept.sum()
                hits, counted = hits + layer.accuracy() * count, counted + count
        if not total > 0:
            raise ValueError(f"{type(self).__name__}.evaluate: all labels are ignored or have weight 0")
        return float(loss) / float(total), float(hits) / float(counted) if hasattr(
            self.loss_layer, "accuracy"
        ) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for group in TiedParameters(self.params).groups:
            i, i_transposed = next((member for member in group if id(self.params[member[0]]) in memo), group[0])
            copied_param = copy.deepcopy(self.params[i], memo)
            for j, transposed in group:  # deepcopy would copy each view into a separate array
                memo.setdefault(id(self.params[j]), copied_param if transposed == i_transposed else copied_param.T)
        copied = memo[id(self)] = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(copied), memo))
        return copied

    def __repr__(self) -> str:
        layers = [*self.layers, self.loss_layer] if self.loss_layer is not None else self.layers
        rows = []
        for layer in layers:
            params = getattr(layer, "params", ())  # optional in a user-defined loss
            shapes = ", ".join(str(p.shape) for p in params)
            count = sum(p.size for p in params)
            rows.append(f"  {type(layer).__name__:16}  {shapes:24}  {count:>12,}")
        dtypes = ", ".join(sorted({str(p.dtype) for p in self.params})) or "no weights"
        total = sum(self.params[group[0][0]].size for group in TiedParameters(self.params).groups)  # shared ones once
        return "\n".join([f"{type(self).__name__}(", *rows, f") {total:,} parameters, {dtypes}"])


class TwoLayerNet(Sequential):
    """The two-layer network of the chapter: Affine, Sigmoid, Affine, followed by SoftmaxWithLoss.

    Parameters
    ----------
    input_size, hidden_size, output_size : int
        D, H and C.
    dtype : floating dtype
    rng : seed, numpy.random.Generator or None
        Draws the weights, normal with standard deviation 0.01; biases are initialized to 0. None uses
        NumPy's global generator, as in the book.
    input_grad : bool
        Whether `backward` returns the gradient of the input. Training does not need it, and its matrix
        product takes up to a third of a step.

    Shapes
    ------
    x : (N, D)    t : (N,) labels or (N, C) one-hot    predict(x) : (N, C) scores
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        dtype: Any = numpy.float32,
        rng: Any = None,
        input_grad: bool = False,
    ) -> None:
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "output_size": output_size}
        for name, size in sizes.items():
            check_integer(f"{type(self).__name__}: {name}", size)
        rng = as_generator(rng)
        W1 = normal((input_size, hidden_size), dtype=dtype, rng=rng)
        W2 = normal((hidden_size, output_size), dtype=dtype, rng=rng)
        super().__init__(
            [
                Affine(W1, np.zeros(hidden_size, dtype), input_grad=input_grad),
                Sigmoid(),
                Affine(W2, np.zeros(output_size, dtype)),
            ],
            SoftmaxWithLoss(),
        )


def _check_layer(name: str, layer: Any, layers: list[Any]) -> None:
    """Raise a TypeError unless `layer` is a layer, and one that passes train_flg on to the layers that it holds."""
    kind, needed = type(layer).__name__, ("params", "grads", "forward", "backward")
    if isinstance(layer, type):
        raise TypeError(f"{name} must be a layer, got the class {layer.__name__}; make one with {layer.__name__}(...)")
    if missing := [attribute for attribute in needed if not hasattr(layer, attribute)]:
        raise TypeError(f"{name} must be a layer, an object with {', '.join(needed)}; {kind} has no {missing[0]}")
    if hasattr(layer, "prepare_targets"):
        raise TypeError(f"{name} is a loss, {kind}; pass it as loss_layer")
    if hasattr(layer, "predict") or _takes_train_flg(layer):
        return
    if inner := next((inner for inner in _inner_training_layers(layer) if not any(inner is n for n in layers)), None):
        raise TypeError(
            f"{name}, {kind}, holds {type(inner).__name__}, which needs train_flg: let forward of the outer layer "
            "take train_flg=True and pass it on, or define predict(x)"
        )


def _check_loss_layer(name: str, layer: Any) -> None:
    if isinstance(layer, type):
        raise TypeError(f"{name} must be a layer, got the class {layer.__name__}; make one with {layer.__name__}(...)")
    forward = getattr(layer, "forward", None)
    if not callable(forward) or not hasattr(layer, "backward"):
        raise TypeError(
            f"{name} must be a loss, an object with forward(x, t) and backward(), got {type(layer).__name__}"
        )
    if not takes_arguments(forward, 2):
        raise TypeError(f"{name} must be a loss with forward(x, t), got {type(layer).__name__}")


def _takes_train_flg(layer: Any) -> bool:
    """Return whether `forward` takes train_flg; one with **options does if the layer holds layers that take it."""
    kinds = _parameter_kinds(layer.__class__) or _parameter_kinds.__wrapped__(layer)
    if "train_flg" in kinds:
        return True
    return inspect.Parameter.VAR_KEYWORD in kinds.values() and next(_inner_training_layers(layer), None) is not None


def _inner_training_layers(layer: Any) -> Iterator[Any]:
    """Yield the layers within `layer` whose `forward` takes train_flg."""
    for _, inner in named_layers(layer):
        if inner is not layer and "train_flg" in _parameter_kinds(inner.__class__):
            yield inner


@functools.cache
def _parameter_kinds(layer_class: Any) -> dict[str, Any]:
    """Return the kinds of the parameters of `forward` by name; none if it is an attribute of the instance."""
    forward = getattr(layer_class, "forward", None)
    if forward is None:
        return {}
    try:
        return {name: p.kind for name, p in inspect.signature(forward).parameters.items()}
    except ValueError:  # no signature, as of a function in C
        return {"": None}
