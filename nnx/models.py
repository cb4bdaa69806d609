"""Models: sequences of layers, from sizes or from a file. N rows, D inputs, H hidden, C classes."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from nnx import checkpoint, layers
from nnx.checks import (
    check_bool,
    check_integer,
    check_list,
    check_metrics,
    check_number,
    check_same_length,
    takes_arguments,
)
from nnx.device import as_real_array, asarray, to_cpu
from nnx.initializers import he, normal, xavier
from nnx.layers import GELU, Affine, BatchNorm, Dropout, ReLU, Sigmoid, SoftmaxWithLoss, Tanh
from nnx.np import Array, np
from nnx.protocols import Layer, LossLayer
from nnx.rng import as_generator
from nnx.tree import TiedModel, TiedParameters, named_layers

__all__ = ["Sequential", "TwoLayerNet", "load", "mlp"]

_ACTIVATIONS = {"relu": (ReLU, he), "gelu": (GELU, he), "sigmoid": (Sigmoid, xavier), "tanh": (Tanh, xavier)}


class Sequential(TiedModel):
    """A sequence of layers, followed by an optional loss layer.

    Parameters
    ----------
    layers : iterable of layers
        Objects with `params`, `grads`, `forward` and `backward`. They are not changed; no layer may occur
        twice. A Sequential without a loss layer is a layer too.
    loss_layer : layer with forward(x, t) and backward(dout=1), or None
        A last layer Softmax under SoftmaxWithLoss, or Sigmoid under SigmoidWithLoss, is a RuntimeWarning: the loss
        applies the function too.

    Attributes
    ----------
    params, grads : lists of arrays
        Those of the layers, in order. An array shared by two layers is listed twice.

    Notes
    -----
    Weights shared between layers, as the same array or as W and W.T, stay shared in copies by `copy.deepcopy`, in
    pickles and in checkpoints.

    Examples
    --------
    >>> from nnx import Affine, ReLU, Sequential, SoftmaxWithLoss
    >>> model = Sequential([Affine.init(4, 8, rng=0), ReLU(), Affine.init(8, 3, rng=1)], SoftmaxWithLoss())
    >>> model
    Sequential(
      Affine(4, 8)                 40
      ReLU()                        0
      Affine(8, 3)                 27
      SoftmaxWithLoss()             0
    ) 67 parameters, float32
    >>> model.predict([[0.1, 0.2, 0.3, 0.4]]).shape
    (1, 3)
    """

    def __init__(self, layers: Iterable[Layer], loss_layer: LossLayer | None = None) -> None:
        name = type(self).__name__
        layers = check_list(f"{name}: layers", layers, "layers")
        for i, layer in enumerate(layers):
            _check_layer(f"{name}: layers[{i}]", layer, layers)
        if loss_layer is not None:
            _check_loss_layer(f"{name}: loss_layer", loss_layer)
            _warn_of_two_activations(name, layers, loss_layer)
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                f"{type(self).__name__}: a layer occurs twice, so its second forward would overwrite what its first "
                "backward needs; create another layer, which may share its weights"
            )
        self.layers: list[Any] = layers
        self.loss_layer: Any = loss_layer
        self.params: list[Array] = [p for layer in layers for p in layer.params]
        self.grads: list[Array] = [g for layer in layers for g in layer.grads]

    def predict(self, x: Any, batch_size: int | None = None) -> Array:
        """Return the output of the last layer for `x`, without the loss.

        With `batch_size`, it processes that many rows at a time, so activations and a host array `x` need not fit in
        device memory.

        Layers with a `train_flg` argument are called with train_flg=False. The layers run as shallow copies, so no
        activations are kept and a pending `backward` is unaffected. A layer that holds other layers shares them with
        its copy: define `predict` in it, which is called instead, if a `backward` may be pending.
        """
        if batch_size is not None:
            return self._predict_in_batches(x, batch_size)
        for layer in self.layers:
            if hasattr(layer, "predict"):
                x = layer.predict(x)
            elif _takes_train_flg(layer):
                x = copy.copy(layer).forward(x, train_flg=False)
            else:
                x = copy.copy(layer).forward(x)
        return x

    def _predict_in_batches(self, x: Any, batch_size: int) -> Array:
        name = f"{type(self).__name__}.predict"
        x = as_real_array(x, f"{name}: x")
        check_integer(f"{name}: batch_size", batch_size)
        if not x.ndim or len(x) <= batch_size:
            return self.predict(asarray(x))
        y: Any = None
        for start in range(0, len(x), batch_size):
            part = asarray(x[start : start + batch_size])
            scores = self.predict(part)
            if not scores.ndim or len(scores) != len(part):
                raise ValueError(
                    f"{name}: with batch_size there must be one row of output for each row of x, got shape "
                    f"{scores.shape} for {len(part)} rows"
                )
            y = np.empty((len(x), *scores.shape[1:]), scores.dtype) if y is None else y
            y[start : start + len(part)] = scores
        return y

    def reset_state(self) -> None:
        """Let stateful layers, such as TimeLSTM with stateful=True, start the next forward from zeros."""
        for _, layer in named_layers(self):
            if layer is not self and hasattr(layer, "reset_state"):
                layer.reset_state()

    def predict_proba(self, x: Any, batch_size: int | None = None) -> Array:
        """Return the probabilities of the classes for `x`: those of the loss layer, for the scores of `predict`.

        Raises
        ------
        TypeError
            If the loss layer has no method `probabilities(scores)`, which SoftmaxWithLoss and SigmoidWithLoss have.
        """
        if not hasattr(self.loss_layer, "probabilities"):
            raise TypeError(
                f"{type(self).__name__}.predict_proba: {type(self.loss_layer).__name__} has no probabilities(scores); "
                "use a loss layer that has, such as SoftmaxWithLoss, or predict"
            )
        return self.loss_layer.probabilities(self.predict(x) if batch_size is None else self.predict(x, batch_size))

    def forward(self, x: Any, t: Any = None, weight: Any = None) -> Array:
        """Return the loss for the inputs `x` and targets `t`; without a loss layer, the output of the last layer.

        `weight` holds the weights of the rows in the mean that is the loss, as in `nnx.layers.SoftmaxWithLoss`.
        """
        for layer in self.layers:
            x = layer.forward(x)
        if self.loss_layer is None:
            return x
        return self.loss_layer.forward(x, t) if weight is None else self.loss_layer.forward(x, t, weight=weight)

    def backward(self, dout: Any = 1) -> Array | None:
        """Compute all gradients of the last forward; return that of the input, or None if the first layer skips it."""
        if self.loss_layer is not None:
            dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def evaluate(
        self, x: Any, t: Any, batch_size: int = 1024, *, metrics: Mapping[str, Callable[..., Any]] | None = None
    ) -> Any:
        """Return the mean loss and the accuracy, the fraction of rows whose largest score is at the label.

        With `metrics`, a dict of functions by name, the result is (loss, accuracy, a dict of their results by name).
        Each function is called once with the scores of all rows and `t`, as NumPy arrays, and returns a number.

        If the loss layer weights rows or ignores labels, both are weighted over all rows, independent of the
        batch size. The accuracy is None for a loss layer without a method `accuracy`, as in regression.
        Like `predict`, this does not change the layers.
        """
        if self.loss_layer is None:
            raise ValueError(f"{type(self).__name__}.evaluate: there is no loss layer; pass one to the constructor")
        x, t = check_same_length(f"{type(self).__name__}.evaluate", x, t)
        check_integer(f"{type(self).__name__}.evaluate: batch_size", batch_size)
        check_metrics(f"{type(self).__name__}.evaluate", metrics)
        scores: list[numpy.ndarray] = []
        loss = hits = total = counted = numpy.float64(0)  # sums over all rows may overflow float16
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            layer, part = copy.copy(self.loss_layer), t[rows]
            if not hasattr(layer, "prepare_targets"):  # which checks labels on the host before it moves them
                part = asarray(part)
            y = self.predict(asarray(x[rows]))
            mean = layer.forward(y, part)
            weight = getattr(layer, "weight_sum", None)
            weight = numpy.float64(len(part)) if weight is None else weight
            with numpy.errstate(under="ignore"):
                loss, total = loss + mean * weight, total + weight
            if hasattr(layer, "accuracy"):
                kept = getattr(layer, "kept", None)
                count = len(part) if kept is None else kept.sum()
                hits, counted = hits + layer.accuracy() * count, counted + count
            if metrics:
                scores.append(to_cpu(y))
        if not total > 0:
            raise ValueError(f"{type(self).__name__}.evaluate: all labels are ignored or have weight 0")
        result = float(loss) / float(total), float(hits) / float(counted) if counted > 0 else None
        return (*result, _apply_metrics(metrics, numpy.concatenate(scores), to_cpu(t))) if metrics else result

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        layers = [*self.layers, self.loss_layer] if self.loss_layer is not None else self.layers
        names = [repr(layer).replace("\n", "\n  ") for layer in layers]
        width = max([len(name) for name in names if "\n" not in name], default=0)
        rows = [
            f"  {name}"
            if "\n" in name
            else f"  {name:{width}}  {sum(p.size for p in getattr(layer, 'params', ())):>12,}"
            for name, layer in zip(names, layers, strict=True)  # params are optional in a user-defined loss
        ]
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

    Examples
    --------
    >>> from nnx import SGD, TwoLayerNet, spiral
    >>> x, t = spiral.load_data()
    >>> model = TwoLayerNet(2, 10, 3, rng=0)
    >>> loss = model.forward(x, t)
    >>> print(f"{float(loss):.4f}")  # log(3): the weights are still small
    1.0986
    >>> model.backward()
    >>> SGD(lr=1.0).update(model.params, model.grads)
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


def mlp(
    sizes: Iterable[int],
    *,
    activation: str | None = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
    loss_layer: LossLayer | None = None,
    dtype: Any = numpy.float32,
    rng: Any = None,
) -> Sequential:
    """Return a multi-layer perceptron: Affine layers, and between them BatchNorm, activation and Dropout.

    Parameters
    ----------
    sizes : iterable of int
        The number of inputs, of units in each hidden layer, and of outputs: [784, 512, 10].
    activation : "relu", "gelu", "sigmoid", "tanh" or None
        Of the hidden layers. Their weights are drawn by `initializers.he` for relu and gelu, and by `xavier` otherwise,
        as are those of the last layer. None makes the layers linear.
    batch_norm : bool
        Whether to normalize the inputs of the activations.
    dropout : float
        The probability of dropping a hidden unit.
    loss_layer : layer or None
        None is SoftmaxWithLoss(); use MeanSquaredError() for regression.
    dtype : float16, float32 or float64
    rng : seed, numpy.random.Generator or None
        Draws the weights and the seeds of the dropout layers.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid.

    Examples
    --------
    >>> from nnx import models
    >>> models.mlp([784, 512, 10], batch_norm=True, dropout=0.2, rng=0)
    Sequential(
      Affine(784, 512, input_grad=False)            401,920
      BatchNorm(512, momentum=0.9, eps=1e-05)         1,024
      ReLU()                                              0
      Dropout(dropout_ratio=0.2)                          0
      Affine(512, 10)                                 5,130
      SoftmaxWithLoss()                                   0
    ) 408,074 parameters, float32
    """
    *hidden, last = check_list("mlp: sizes", sizes, "integers") or [None]
    if not hidden:
        raise ValueError(f"mlp: sizes must hold the number of inputs and of outputs, at least two, got {sizes!r:.80}")
    if activation is not None and not (isinstance(activation, str) and activation in _ACTIVATIONS):
        raise ValueError(f"mlp: activation must be one of {', '.join(_ACTIVATIONS)}, or None, got {activation!r:.80}")
    make, initializer = _ACTIVATIONS[activation] if activation else (None, xavier)
    check_bool("mlp: batch_norm", batch_norm)
    check_number("mlp: dropout", dropout, 0, math.nextafter(1, 0))
    rng = as_generator(rng)
    sequence: list[Any] = []
    for D, H in itertools.pairwise(hidden):
        sequence.append(Affine.init(D, H, initializer=initializer, dtype=dtype, rng=rng, input_grad=bool(sequence)))
        if batch_norm:
            sequence.append(BatchNorm.init(H, dtype=dtype))
        if make:
            sequence.append(make())
        if dropout:
            sequence.append(Dropout(dropout, rng=rng))
    sequence.append(Affine.init(hidden[-1], last, dtype=dtype, rng=rng, input_grad=bool(sequence)))
    return Sequential(sequence, SoftmaxWithLoss() if loss_layer is None else loss_layer)


def load(path: str | Path) -> Sequential:
    """Return the model saved in a checkpoint: a Sequential of layers of nnx, built anew, with its weights and state.

    The file names the classes of the layers and their settings; only the layers and models of nnx are built, and no
    code of the file is run. Weight sharing is restored.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is damaged or was not written by `checkpoint.save`, or a layer cannot be built, such as one of a
        user-defined class; the message names it. Build such a model yourself and use `checkpoint.load`.
    ImportError
        If safetensors is not installed, as `nnx-array[checkpoint]` does.

    Examples
    --------
    >>> from nnx import checkpoint, models
    >>> checkpoint.save("net.safetensors", models.mlp([4, 8, 3], rng=0))
    >>> models.load("net.safetensors")
    Sequential(
      Affine(4, 8, input_grad=False)            40
      ReLU()                                     0
      Affine(8, 3)                              27
      SoftmaxWithLoss()                          0
    ) 67 parameters, float32
    """
    path = Path(path).expanduser()
    configs, names, arrays = checkpoint.read_config(path)
    made = {name: np.zeros(shape, dtype) for name, (dtype, shape) in arrays.items() if dtype.startswith("float")}
    try:
        model = _build(configs, made, "", {})
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the model cannot be built: {error}") from error
    checkpoint.load(path, model, **names)
    return model


def _build(configs: Mapping[str, Any], arrays: Mapping[str, Array], path: str, built: dict[str, Any]) -> Any:
    """Return the layer at `path` in a file, with `arrays` as its parameters; the empty path is the model."""
    if path not in built:
        config = configs.get(path, {"class": path, "module": "user-defined", "params": []})
        settings = {name: value for name, value in config.items() if name not in ("class", "module", "params")}
        kind, module = config["class"], config["module"]
        layer = getattr(layers, kind, None) if kind in layers.__all__ else None
        known = isinstance(layer, type) or kind in ("Sequential", "TwoLayerNet")  # layers also exports functions
        if module.partition(".")[0] != "nnx" or not known:
            raise ValueError(
                f"{path or 'the model'} is a {kind} ({module}), not a class of nnx; build the model yourself and use "
                "checkpoint.load"
            )
        if isinstance(layer, type):
            if "rng" in inspect.signature(layer).parameters:
                settings["rng"] = 0  # instead of NumPy's global generator; what it draws is loaded
            params = (arrays[n.removesuffix(".T")].T if n.endswith(".T") else arrays[n] for n in config["params"])
            built[path] = layer(*params, **settings)
        else:
            parts = [_build(configs, arrays, each, built) for each in settings["layers"]]
            loss = settings.get("loss_layer")
            built[path] = object.__new__(TwoLayerNet if kind == "TwoLayerNet" else Sequential)
            Sequential.__init__(built[path], parts, None if loss is None else _build(configs, arrays, loss, built))
    return built[path]


def _apply_metrics(
    metrics: Mapping[str, Callable[..., Any]], scores: numpy.ndarray, t: numpy.ndarray
) -> dict[str, float]:
    results = {}
    for name, function in metrics.items():
        value = function(scores, t)
        try:
            results[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metrics: {name} must return a number, got {value!r:.80}") from None
    return results


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


def _warn_of_two_activations(name: str, sequence: list[Any], loss_layer: Any) -> None:
    """Warn if the last layer applies the function that the loss layer applies, which makes training slow and poor."""
    last = sequence[-1] if sequence else None
    while isinstance(last, Sequential) and last.layers:
        last = last.layers[-1]
    for kind, loss_kind in ((layers.Softmax, SoftmaxWithLoss), (Sigmoid, layers.SigmoidWithLoss)):
        if isinstance(last, kind) and isinstance(loss_layer, loss_kind):
            checkpoint.warn(
                f"{name}: {type(loss_layer).__name__} applies {kind.__name__.lower()} to the result of the last layer, "
                f"{type(last).__name__}, again; leave that layer out, predict_proba returns probabilities"
            )


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
