"""Models: layers in a row, and the chapter's two-layer net. N rows, D inputs, H hidden, C classes."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Iterable
from typing import Any

import numpy

from nnx.device import asarray, check_rows
from nnx.initializers import generator, normal
from nnx.layers import Affine, Sigmoid, SoftmaxWithLoss
from nnx.np import Array, np
from nnx.shared import Shared

__all__ = ["Sequential", "TwoLayerNet"]


class Sequential:
    """Layers applied one after the other, and a loss on their result.

    Parameters
    ----------
    layers : iterable of layers
        Objects with `params`, `grads`, `forward` and `backward`; none is changed, and none may stand
        twice. A Sequential without a loss layer is one too.
    loss_layer : a layer with forward(x, t) and backward(dout=1), or None

    Attributes
    ----------
    params, grads : lists of arrays
        Those of the layers, in their order. An array that two layers share stands there twice.

    Notes
    -----
    Layers that share a weight share it in a `copy.deepcopy` too. A pickle keeps that where both have the
    array itself, and parts W from W.T; `checkpoint.save` and `load` part nothing.
    """

    def __init__(self, layers: Iterable[Any], loss_layer: Any = None) -> None:
        layers = list(layers)
        for i, layer in enumerate([*layers, loss_layer]):
            if isinstance(layer, type):
                what = f"layers[{i}]" if i < len(layers) else "loss_layer"
                raise TypeError(
                    f"{type(self).__name__}: {what} must be a layer, got the class {layer.__name__}; "
                    f"make one with {layer.__name__}(...)"
                )
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                f"{type(self).__name__}: a layer stands twice, and its second forward would overwrite what its first "
                "backward needs; make another layer, which may share its weights"
            )
        params: list[Array] = [p for layer in layers for p in layer.params]
        self._ties = _Ties(params)  # the first attribute
        self.layers = layers
        self.loss_layer = loss_layer
        self.params = params
        self.grads: list[Array] = [g for layer in layers for g in layer.grads]

    def predict(self, x: Any) -> Array:
        """Return the result of the last layer for `x`, without the loss.

        Layers that take `train_flg` get False, those within others too. All run as shallow copies, so that
        no activation is kept and a `backward` that is still to come finds what its `forward` left.
        """
        twins: dict[int, Any] = {}
        for layer in self.layers:
            x = layer.predict(x) if hasattr(layer, "predict") else _predicting(layer, twins).forward(x)
        return x

    def forward(self, x: Any, t: Any = None) -> Array:
        """Return the loss for the inputs `x` and their targets `t`; without a loss layer, the last layer's result."""
        for layer in self.layers:
            x = layer.forward(x)
        if self.loss_layer is None:
            return x
        return self.loss_layer.forward(x, t)

    def backward(self, dout: Any = 1) -> Array | None:
        """Write all gradients of the last forward; return that of the input, None if the first layer skips it."""
        if self.loss_layer is not None:
            dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def evaluate(self, x: Any, t: Any, batch_size: int = 1024) -> tuple[float, float | None]:
        """Return the mean loss over all rows, and the accuracy: the share of rows whose largest score is at the label.

        The accuracy is None for a loss layer without a method `accuracy`, as in regression. Like
        `predict` this leaves the layers as they are.
        """
        if self.loss_layer is None:
            raise ValueError(f"{type(self).__name__}.evaluate: there is no loss layer; pass one to the constructor")
        x, t = check_rows(f"{type(self).__name__}.evaluate", x, t)
        if operator.index(batch_size) < 1:
            raise ValueError(f"{type(self).__name__}.evaluate: batch_size must be at least 1, got {batch_size}")
        loss = hits = 0
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            layer, part = copy.copy(self.loss_layer), t[rows]
            if not hasattr(layer, "targets"):  # which moves the labels itself, once it has looked at them on the host
                part = asarray(part)
            # float64: the sum over all rows may be beyond float16
            loss += layer.forward(self.predict(asarray(x[rows])), part) * numpy.float64(len(part))
            if hasattr(layer, "accuracy"):
                hits += layer.accuracy() * len(part)
        return float(loss) / len(x), float(hits) / len(x) if hasattr(self.loss_layer, "accuracy") else None

    def check_arrays(self, name: str) -> None:
        """Raise a ValueError, opened by `name`, if `params` or `grads` hold an array in the place of a layer's own.

        To hold fewer freezes layers, to hold more is a matter of subclasses.
        """
        for kind in ("params", "grads"):
            mine = set(map(id, getattr(self, kind)))
            theirs = {id(a) for layer in self.layers for a in getattr(layer, kind)}
            if mine - theirs and theirs - mine:
                raise ValueError(
                    f"{name}: the {kind} of {type(self).__name__} are not the arrays that its layers have, and one put "
                    f"in the place of another is not trained; write into it instead, {kind}[i][...] ="
                )
        for layer in self.layers:
            if isinstance(layer, Sequential):
                layer.check_arrays(name)

    def __repr__(self) -> str:
        layers = [*self.layers, self.loss_layer] if self.loss_layer is not None else self.layers
        rows = []
        for layer in layers:
            params = getattr(layer, "params", ())  # which a reader's loss may lack
            shapes = ", ".join(str(p.shape) for p in params)
            count = sum(p.size for p in params)
            rows.append(f"  {type(layer).__name__:16}  {shapes:24}  {count:>12,}")
        dtypes = ", ".join(sorted({str(p.dtype) for p in self.params})) or "no weights"
        total = sum(self.params[group[0][0]].size for group in Shared(self.params).groups)  # a shared one once
        return "\n".join([f"{type(self).__name__}(", *rows, f") {total:,} parameters, {dtypes}"])


class TwoLayerNet(Sequential):
    """The chapter's net: Affine, Sigmoid, Affine, and SoftmaxWithLoss on the scores.

    Parameters
    ----------
    input_size, hidden_size, output_size : int
        D, H and C.
    dtype : a floating dtype
    rng : seed, numpy.random.Generator or None
        Draws the weights, normal with standard deviation 0.01; the biases start at 0. None is NumPy's
        global generator, as in the source.
    input_grad : bool
        True makes `backward` return the gradient of the data. Training needs none, and its product
        is up to a third of a step.

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
        rng = generator(rng)
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


class _Ties:
    """Lets arrays of one memory, such as W and W.T, share it in a deep copy, as a model's attribute copied first."""

    def __init__(self, params: list[Array]) -> None:
        self.params = params

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ties:
        for group in Shared(self.params).groups:
            i, turned = next((member for member in group if id(self.params[member[0]]) in memo), group[0])
            kept = copy.deepcopy(self.params[i], memo)
            for j, transposed in group:  # views, which would become arrays of their own
                memo.setdefault(id(self.params[j]), kept if transposed == turned else kept.T)
        return _Ties(copy.deepcopy(self.params, memo))


def _predicting(value: Any, twins: dict[int, Any]) -> Any:
    """Return `value` with each layer in it, also in lists and dicts, as a shallow copy that takes train_flg=False."""
    if isinstance(value, list | tuple):
        inside = [_predicting(inner, twins) for inner in value]
        return value if all(map(operator.is_, inside, value)) else type(value)(inside)
    if isinstance(value, dict):
        named = {name: _predicting(inner, twins) for name, inner in value.items()}
        return value if all(map(operator.is_, named.values(), value.values())) else named
    if isinstance(value, type) or not (hasattr(value, "forward") and hasattr(value, "params")):
        return value
    if id(value) not in twins:
        twins[id(value)] = twin = copy.copy(value)
        if not type(value).__module__.startswith("nnx.layers."):  # which hold no others
            for name, inner in getattr(value, "__dict__", {}).items():
                setattr(twin, name, _predicting(inner, twins))
        if _takes_train_flg(value.__class__):
            twin.forward = functools.partial(twin.forward, train_flg=False)
    return twins[id(value)]


@functools.cache
def _takes_train_flg(layer_class: Any) -> bool:
    return "train_flg" in inspect.signature(layer_class.forward).parameters
