"""Calls of every public constructor, method and function with weird values, and what is right for each.

`python tests/fuzz.py [COUNT]` runs COUNT random calls (default 100,000) and prints how they ended, by kind and call.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import math
import numbers
import pickle
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy

import nnx
from nnx import callbacks, functions, initializers, layers, np, optimizer, plotting, to_cpu
from nnx.models import Sequential, TwoLayerNet

X = numpy.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5], [-2.0, 1.0, 0.0], [0.75, 3.0, -1.25]])
T = numpy.array([0, 2, 1, 2])
X.flags.writeable = T.flags.writeable = False
PUBLIC = {name for name in dir(nnx) if not name.startswith("_")} | {
    name
    for module in (
        nnx.spiral,
        nnx.layers,
        layers.negative_sampling,
        functions,
        nnx.layers,
        initializers,
        optimizer,
        plotting,
        callbacks,
        nnx.trainer,
        nnx.models,
        nnx.testing,
    )
    for name in module.__all__
}
BEGINS = re.compile(r"(\w+)(\.\w+)*(:| |,)")


def mapped():
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        numpy.save(file, X)
    return numpy.load(file.name, mmap_mode="r")


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


class Subclass(numpy.ndarray):
    pass


WEIRD: dict[str, Callable[[], Any]] = {
    **{repr(v): lambda v=v: v for v in (None, True, False, 0, 1, 2, -1, 10**30, 0.5, 2.0, -1.0, 1e308, -1e308, 5e-324)},
    **{
        repr(v): lambda v=v: v for v in (math.nan, math.inf, -math.inf, 1j, "1", "", "relu", b"1", (), [], {}, {"a": 1})
    },
    **{f"NumPy {v!r}": lambda v=v: v for v in (numpy.float32(0.5), numpy.float64(2), numpy.int8(2), numpy.bool_(True))},
    **{
        f"NumPy {v!r}": lambda v=v: v
        for v in (numpy.float16(numpy.inf), numpy.datetime64("2020-01-01"), numpy.str_("1"))
    },
    "an object": object,
    "a function": lambda: lambda *arguments: 0.5,
    "a class": lambda: nnx.SGD,
    "an optimizer": nnx.SGD,
    "a layer": nnx.ReLU,
    "a loss": nnx.SoftmaxWithLoss,
    "a callback": lambda: callbacks.EarlyStopping(),
    "a generator": lambda: (v for v in X.copy()),
    "numbers in a list": lambda: [0.5, 1.0],
    "rows in a list": X.tolist,
    "integers in a list": T.tolist,
    "a ragged list": lambda: [[1, 2], [3]],
    "None in a list": lambda: [None, 1],
    "strings in a list": lambda: ["a", "b", "c", "d"],
    "layers in a list": lambda: [nnx.ReLU(), nnx.Affine(np.ones((3, 2)), np.zeros(2))],
    "callbacks in a list": lambda: [callbacks.BestWeights()],
    "nested lists of objects": lambda: [[object()]],
    "floats": X.copy,
    "float32": lambda: X.astype("float32"),
    "float16": lambda: X.astype("float16"),
    "longdouble": lambda: X.astype("longdouble"),
    "integers": lambda: X.astype(int),
    "labels": T.copy,
    "int8 labels": lambda: T.astype("int8"),
    "uint64 labels": lambda: T.astype("uint64"),
    "labels out of range": lambda: T + 7,
    "negative labels": lambda: T - 1,
    "labels as floats": lambda: T.astype(float),
    "labels as a column": lambda: T[:, None],
    "one-hot labels": lambda: numpy.eye(3, dtype=int)[T],
    "one-hot labels with two ones": lambda: numpy.ones((4, 3), int),
    "one-hot labels as floats": lambda: numpy.eye(3)[T],
    "bools": lambda: X > 0,
    "zeros and ones": lambda: (X > 0).astype(int),
    "uint8": lambda: abs(X).astype("uint8"),
    "objects": lambda: X.astype(object),
    "strings": lambda: X.astype(str),
    "complex": lambda: X + 1j,
    "dates": lambda: numpy.full((4, 3), numpy.datetime64("2020-01-01")),
    "a structure": lambda: numpy.zeros((4, 3), [("a", "f4")]),
    "masked": lambda: numpy.ma.array(X.copy(), mask=X > 1),
    "not masked": lambda: numpy.ma.array(X.copy()),
    "a matrix": lambda: X.copy().view(numpy.matrix),
    "a matrix of labels": lambda: T[None].copy().view(numpy.matrix),
    "a subclass": lambda: X.copy().view(Subclass),
    "a file": mapped,
    "read-only": lambda: read_only(X),
    "big-endian": lambda: X.astype(">f8"),
    "Fortran order": lambda: numpy.array(X, order="F"),
    "negative strides": lambda: X.copy()[::-1, ::-1],
    "every other column": lambda: numpy.repeat(X, 2, axis=1)[:, ::2],
    "one number": lambda: numpy.array(0.5),
    "one integer": lambda: numpy.array(2),
    "one row": lambda: X[0].copy(),
    "one row of two axes": lambda: X[:1].copy(),
    "three axes": lambda: X[None].copy(),
    "two columns": lambda: X[:, :2].copy(),
    "nothing": lambda: numpy.zeros(0),
    "no rows": lambda: numpy.zeros((0, 3)),
    "no columns": lambda: numpy.zeros((4, 0)),
    "NaN among floats": lambda: numpy.where(X == 2, math.nan, X),
    "infinity among floats": lambda: numpy.where(X == 2, math.inf, X),
    "huge floats": lambda: X * 1e300,
    "tiny floats": lambda: X * 1e-320,
    "the smallest integer": lambda: numpy.full((4, 3), numpy.iinfo("int64").min),
}

OVERFLOWS = {"infinity among floats", "NaN among floats", "huge floats", "1e+308", "-1e+308", repr(10**30)}
OVERFLOWS |= {"inf", "-inf", "nan", f"NumPy {numpy.float16(numpy.inf)!r}"}
EMPTY = {"nothing", "no rows", "no columns"}


# What a value that was accepted must be.


def number(low=-math.inf, high=math.inf):
    def valid(v):
        v = v[()] if isinstance(v, numpy.ndarray) and v.ndim == 0 else v
        real = isinstance(v, numbers.Real) and not isinstance(v, bool | numpy.bool_)
        return real and math.isfinite(v) and low <= v <= high

    return valid


def integer(low=1):
    return lambda v: isinstance(v, numbers.Integral) and not isinstance(v, bool) and v >= low


def optional(valid):
    return lambda v: v is None or valid(v)


def real(v):
    """Return whether `v` is an array, a list or a number without anything but real numbers."""
    try:
        return numpy.asarray(v).dtype.kind in "fiub" and not numpy.any(getattr(v, "mask", False))
    except (TypeError, ValueError):
        return False


def labels(v):
    a = numpy.asarray(v)
    return a.dtype.kind in "iub" and (a.shape == (4,) or a.shape == (4, 3)) and a.min() >= 0 and a.max() <= 2


def weights(v):
    return isinstance(v, np.ndarray) and v.dtype.kind == "f"


def anything(v):
    return True


def instance(*kinds):
    return lambda v: isinstance(v, kinds)


@dataclasses.dataclass
class Call:
    """A call with valid arguments, what each may be, the right result in float64, and the objects it may change."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    valid: dict[str, Callable[[Any], bool]]
    reference: Callable[..., Any] | None = None
    objects: tuple[Any, ...] = ()


def state(objects):
    """Return the parameters, gradients and other state of layers, optimizers and trainers as bytes."""
    seen = []
    for item in objects:
        names = (
            "params",
            "grads",
            "running_mean",
            "running_var",
            "calls",
            "m",
            "v",
            "h",
            "c",
            "iter",
            "lr",
            "momentum",
        )
        for name in names:
            value = getattr(item, name, None)
            seen.append([to_cpu(a).tobytes() for a in value] if isinstance(value, list) else pickle.dumps(value))
        if isinstance(item, nnx.Trainer):
            seen.append((item.current_epoch, item.iteration, list(item.loss_list), list(item.val_list)))
    return seen


def affine():
    return nnx.Affine(np.asarray(X[:3].copy()), np.asarray(X[3].copy()))


def norm(kind):
    return kind(np.asarray(1 + abs(X[0])), np.asarray(X[1].copy()))


def normalized(x, axis):
    m = x.mean(axis=axis, keepdims=True)
    return (x - m) / numpy.sqrt(x.var(axis=axis, keepdims=True) + 1e-5) * (1 + abs(X[0])) + X[1]


def softmax(x):
    e = numpy.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(x, t):
    t = t.argmax(axis=-1) if t.shape == x.shape else t
    return -numpy.log(numpy.take_along_axis(softmax(x), t.astype(int)[..., None], -1)).mean()


FORWARD = {
    "Sigmoid": (nnx.Sigmoid, lambda x: 1 / (1 + numpy.exp(-x))),
    "ReLU": (nnx.ReLU, lambda x: numpy.maximum(x, 0)),
    "Tanh": (nnx.Tanh, lambda x: numpy.tanh(x)),
    "GELU": (nnx.GELU, lambda x: x / 2 * (1 + numpy.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "Softmax": (nnx.Softmax, softmax),
    "Affine": (affine, lambda x: x @ X[:3] + X[3]),
    "MatMul": (lambda: nnx.MatMul(np.asarray(X[:3].copy())), lambda x: x @ X[:3]),
    "BatchNorm": (lambda: norm(nnx.BatchNorm), lambda x: normalized(x.reshape(-1, 3), 0).reshape(x.shape)),
    "LayerNorm": (lambda: norm(nnx.LayerNorm), lambda x: normalized(x, -1)),
    "Dropout": (lambda: nnx.Dropout(0.5, rng=0), None),
    "Sum": (nnx.Sum, lambda x: x.sum(axis=0, keepdims=True)),
    "Repeat": (lambda: nnx.Repeat(2), lambda x: numpy.repeat(x, 2, axis=0)),
}
OPTIMIZERS = {
    name: {n: number(0, {"momentum": 1, "decay_rate": 1, "beta1": 1, "beta2": 1}.get(n, math.inf)) for n in settings}
    for name in ("SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW")
    for settings in [inspect.signature(getattr(nnx, name)).parameters]
}


def forward_calls():
    for name, (make, reference) in FORWARD.items():

        def forward(name=name, make=make, reference=reference):
            layer = make()
            x = X[:1] if name == "Repeat" else X
            return Call(layer.forward, {"x": x}, {"x": real}, reference, (layer,))

        def backward(name=name, make=make):
            layer = make()
            out = layer.forward(X[:1] if name == "Repeat" else X)
            return Call(layer.backward, {"dout": numpy.ones(out.shape)}, {"dout": real}, None, (layer,))

        yield f"{name}.forward", forward
        yield f"{name}.backward", backward


def attended(hs, h):
    return numpy.einsum("nqt,nth->nqh", softmax(numpy.einsum("nqh,nth->nqt", h, hs)), hs)


HS = numpy.stack([X, X[::-1] / 2], axis=1)  # (4, 2, 3)
ATTENTION = {
    "AttentionWeight": ({"hs": HS, "h": X}, lambda hs, h: softmax((hs * h[:, None]).sum(axis=2))),
    "WeightSum": ({"hs": HS, "a": X[:, :2]}, lambda hs, a: (hs * a[:, :, None]).sum(axis=1)),
    "Attention": ({"hs": HS, "h": X}, lambda hs, h: attended(hs, h[:, None])[:, 0]),
    "TimeAttention": ({"hs_enc": HS, "hs_dec": HS[::-1]}, attended),
}


def attention_calls():
    for name, (inputs, reference) in ATTENTION.items():
        kind = getattr(nnx.layers, name)

        def forward(kind=kind, inputs=inputs, reference=reference):
            layer = kind()
            return Call(layer.forward, inputs, dict.fromkeys(inputs, real), reference, (layer,))

        def backward(kind=kind, inputs=inputs):
            layer = kind()
            out = layer.forward(*inputs.values())
            (argument,) = inspect.signature(layer.backward).parameters
            return Call(layer.backward, {argument: numpy.ones(out.shape)}, {argument: real}, None, (layer,))

        yield f"{name}.forward", forward
        yield f"{name}.backward", backward


def setting_calls():
    for name, valid in OPTIMIZERS.items():
        kind = getattr(nnx, name)
        defaults = {n: p.default for n, p in inspect.signature(kind).parameters.items()}
        yield name, lambda kind=kind, defaults=defaults, valid=valid: Call(kind, defaults, valid)

        def assigned(kind=kind, defaults=defaults, valid=valid):
            """Assign settings after a first step."""
            each, p = kind(), [np.ones(3), np.ones((2, 2))]
            each.update(p, [np.ones(3), np.ones((2, 2))])

            def update(**settings):
                before = vars(each).copy()
                vars(each).update(settings)
                try:
                    each.update(p, [np.ones(3), np.ones((2, 2))])
                finally:
                    vars(each).update({n: before[n] for n in settings})

            return Call(update, defaults, valid, None, (each, Sequential([])))

        yield f"{name}, assigned", assigned

        def update(kind=kind):
            each, p = kind(), [np.ones((4, 3)), np.ones(3)]
            each.update(p, [np.ones((4, 3)), np.ones(3)])
            holder = nnx.ReLU()
            holder.params = p
            same = {
                "W": lambda v: v is p[0] or (kind is nnx.SGD and weights(v)),
                "dW": lambda v: weights(v) and v.shape == (4, 3),
            }
            return Call(
                lambda W, dW: each.update([W, p[1]], [dW, np.ones(3)]),
                {"W": p[0], "dW": np.ones((4, 3))},
                same,
                None,
                (each, holder),
            )

        yield f"{name}.update", update


ASSIGNED = {
    "Dropout": (lambda: nnx.Dropout(0.5, rng=0), {"dropout_ratio": number(0, 1)}),
    "BatchNorm": (lambda: norm(nnx.BatchNorm), {"momentum": number(0, 1), "eps": number(0)}),
    "LayerNorm": (lambda: norm(nnx.LayerNorm), {"eps": number(0)}),
}


def assigned_calls():
    """Assign settings of layers, which the next forward checks."""
    for name, (make, valid) in ASSIGNED.items():

        def assigned(make=make, valid=valid):
            layer = make()

            def forward(**settings):
                before = vars(layer).copy()
                vars(layer).update(settings)
                try:
                    layer.forward(X)
                finally:
                    vars(layer).update({n: before[n] for n in settings})

            return Call(forward, {n: getattr(layer, n) for n in valid}, valid, None, (layer,))

        yield f"{name}, assigned", assigned


def simple(function, valid, reference=None, **arguments):
    return lambda: Call(function, arguments, valid, reference)


def model():
    return TwoLayerNet(3, 4, 3, dtype="float64", rng=0)


def fit_call():
    trainer = nnx.Trainer(model(), nnx.Momentum(0.01), rng=0)

    def pair(v):
        return v is None or (isinstance(v, tuple | list) and len(v) == 2 and real(v[0]) and labels(v[1]))

    arguments = {"x": X, "t": T, "max_epoch": 1, "batch_size": 2, "max_grad": 1.0, "eval_interval": 1}
    arguments |= {"validation": (X, T), "drop_last": False, "callbacks": [], "verbose": False}
    arguments |= {"metrics": {"rows": lambda scores, t: len(t)}, "sample_weight": numpy.ones(4)}
    valid = {"x": lambda v: real(v) and numpy.shape(v) == (4, 3) and numpy.isfinite(numpy.asarray(v, float)).all()}
    valid |= {"t": labels, "max_epoch": integer(0), "batch_size": lambda v: integer()(v) and v <= 4}
    valid |= {"max_grad": lambda v: v is None or v == math.inf or (number(0)(v) and v > 0)}
    valid |= {"eval_interval": optional(integer()), "validation": pair, "drop_last": anything, "verbose": anything}
    valid |= {"metrics": metrics, "sample_weight": optional(row_weights)}
    valid["callbacks"] = lambda v: all(not isinstance(c, type) and hasattr(c, "on_epoch") for c in v)

    def fit(max_epoch, **others):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(max_epoch=min(max_epoch, 2) if integer(0)(max_epoch) else max_epoch, **others)

    return Call(fit, arguments, valid, None, (trainer, trainer.model, trainer.optimizer))


def metrics(v):
    return v is None or (isinstance(v, dict) and all(map(callable, v.values())))


def row_weights(v):
    return real(v) and numpy.shape(v) == (4,) and (numpy.asarray(v, float) >= 0).all() and numpy.any(v)


def evaluate_call():
    net = model()
    valid = {"x": real, "t": labels, "batch_size": integer(), "metrics": metrics}
    return Call(net.evaluate, {"x": X, "t": T, "batch_size": 2, "metrics": None}, valid, None, (net,))


def predict_call(name="predict"):
    net = model()
    valid = {"x": real, "batch_size": optional(integer())}
    return Call(getattr(net, name), {"x": X, "batch_size": 3}, valid, None, (net,))


def loss_calls():
    for name, t in (("SoftmaxWithLoss", T), ("SigmoidWithLoss", (X > 0).astype(int)), ("MeanSquaredError", X * 2)):
        kind = getattr(nnx, name)
        valid_t = labels if name == "SoftmaxWithLoss" else real
        reference = {
            "SoftmaxWithLoss": lambda x, t, weight: cross_entropy(x, t) if weight is None else None,
            "SigmoidWithLoss": lambda x, t, weight: (numpy.logaddexp(0, x) - x * t).mean() if weight is None else None,
            "MeanSquaredError": lambda x, t, weight: ((x - t) ** 2).mean() if weight is None else None,
        }[name]

        def valid_weight(v):
            return v is None or (real(v) and (numpy.asarray(v, float) >= 0).all())

        def forward(kind=kind, t=t, valid_t=valid_t, reference=reference):
            return Call(
                kind().forward,
                {"x": X, "t": t, "weight": None},
                {"x": real, "t": valid_t, "weight": valid_weight},
                reference,
            )

        def backward(kind=kind, t=t):
            layer = kind()
            layer.forward(X, t)
            one = {"dout": lambda v: isinstance(v, int) or (real(v) and numpy.ndim(v) == 0)}
            return Call(layer.backward, {"dout": 1.0}, one, None, (layer,))

        yield f"{name}.forward", forward
        yield f"{name}.backward", backward


def array_weights(shape):
    return lambda v: weights(v) and v.shape == shape


def sizes(v):
    return all(integer(0)(n) for n in (v if isinstance(v, tuple | list | numpy.ndarray) else (v,)))


def plain_dtype(v):
    return numpy.dtype(v) in (numpy.float16, numpy.float32, numpy.float64)


def seed(v):
    return v is None or integer(0)(v) or isinstance(v, list | tuple | numpy.ndarray)


def constructor_calls():
    W, b = np.asarray(X[:3].copy()), np.asarray(X[3].copy())
    gamma, beta = np.ones(3), np.zeros(3)
    per_class = optional(lambda v: real(v) and numpy.ndim(v) == 1 and (numpy.asarray(v) >= 0).all())
    yield (
        "Affine",
        simple(nnx.Affine, {"W": weights, "b": array_weights((3,)), "input_grad": anything}, W=W, b=b, input_grad=True),
    )
    yield "MatMul", simple(nnx.MatMul, {"W": weights}, W=W)
    options = {"initializer": callable, "dtype": plain_dtype, "rng": seed}
    chosen = {"initializer": initializers.he, "dtype": "float32", "rng": 0}
    for kind, names in ((nnx.Affine, ("input_size", "output_size")), (nnx.Embedding, ("vocab_size", "vector_size"))):
        valid = dict.fromkeys(names, integer()) | options
        yield f"{kind.__name__}.init", simple(kind.init, valid, **dict.fromkeys(names, 2), **chosen)
    for kind in (nnx.LayerNorm, nnx.BatchNorm):
        valid = {"size": integer(), "dtype": plain_dtype, "eps": number(0)}
        yield f"{kind.__name__}.init", simple(kind.init, valid, size=2, dtype="float32", eps=1e-5)
    valid = {"sizes": lambda v: all(map(integer(), v)), "batch_norm": anything, "dropout": number(0, 1)}
    valid |= {"activation": lambda v: v in ("relu", None), "dtype": plain_dtype, "rng": seed}
    valid["loss_layer"] = optional(lambda v: hasattr(v, "prepare_targets"))
    arguments = {"sizes": [2, 3, 2], "activation": "relu", "batch_norm": True, "dropout": 0.5, "loss_layer": None}
    yield "mlp", simple(nnx.models.mlp, valid, **arguments, dtype="float32", rng=0)
    yield "Log", lambda: Call(callbacks.Log, {"function": len}, {"function": callable})
    yield "Embedding", simple(nnx.Embedding, {"W": weights}, W=W)
    for kind in (nnx.LayerNorm, nnx.BatchNorm):
        valid = {"gamma": array_weights((3,)), "beta": array_weights((3,)), "eps": number(0), "momentum": number(0, 1)}
        arguments = {"gamma": gamma, "beta": beta, "eps": 1e-5} | ({"momentum": 0.9} if kind is nnx.BatchNorm else {})
        yield kind.__name__, simple(kind, valid, **arguments)
    yield "Dropout", simple(nnx.Dropout, {"dropout_ratio": number(0, 1), "rng": seed}, dropout_ratio=0.5, rng=0)
    yield "Repeat", simple(nnx.Repeat, {"N": integer()}, N=2)
    for kind in (nnx.SoftmaxWithLoss, nnx.SigmoidWithLoss):
        valid = {"class_weight": per_class, "ignore_label": optional(integer(-math.inf))}
        yield kind.__name__, simple(kind, valid, class_weight=None, ignore_label=None)

    def valid_layers(v):
        return all(hasattr(layer, "backward") and not hasattr(layer, "prepare_targets") for layer in v)

    loss = optional(lambda v: hasattr(v, "prepare_targets"))
    yield (
        "Sequential",
        lambda: Call(
            Sequential,
            {"layers": [affine()], "loss_layer": nnx.SoftmaxWithLoss()},
            {"layers": valid_layers, "loss_layer": loss},
        ),
    )
    valid = {n: integer() for n in ("input_size", "hidden_size", "output_size")} | {"dtype": plain_dtype, "rng": seed}
    yield "TwoLayerNet", simple(TwoLayerNet, valid, input_size=2, hidden_size=3, output_size=2, dtype="float32", rng=0)
    yield (
        "Trainer",
        lambda: Call(
            nnx.Trainer,
            {"model": model(), "optimizer": nnx.SGD(), "rng": 0},
            {"model": instance(Sequential, nnx.SoftmaxWithLoss), "optimizer": instance(nnx.SGD), "rng": seed},
        ),
    )
    followed = {"monitor": lambda v: isinstance(v, str), "mode": lambda v: v in ("min", "max")}
    given = {"monitor": "val_f1", "mode": "max"}
    valid = {"patience": integer(), "min_delta": number(0), **followed}
    yield "EarlyStopping", simple(callbacks.EarlyStopping, valid, patience=5, min_delta=0.0, **given)
    yield "BestWeights", simple(callbacks.BestWeights, followed, **given)
    every = {"every_epochs": optional(integer()), "every_steps": optional(integer()), "keep": integer()}
    yield (
        "Checkpoint",
        simple(functools.partial(callbacks.Checkpoint, "none"), every, every_epochs=1, every_steps=1, keep=3),
    )
    yield "LearningRateScheduler", simple(callbacks.LearningRateScheduler, {"schedule": callable}, schedule=len)


def function_calls():
    for name, reference in (("sigmoid", FORWARD["Sigmoid"][1]), ("relu", FORWARD["ReLU"][1]), ("softmax", softmax)):
        yield name, simple(getattr(functions, name), {"x": real}, reference, x=X)
    probabilities = softmax(X)
    yield (
        "cross_entropy_error",
        simple(
            functions.cross_entropy_error,
            {"y": real, "t": lambda v: integer(0)(v) or real(v)},
            None,
            y=probabilities,
            t=T,
        ),
    )
    random_ = {"dtype": plain_dtype, "rng": seed}
    yield (
        "normal",
        simple(
            initializers.normal,
            {"shape": sizes, "std": number(0), **random_},
            shape=(2, 3),
            std=0.1,
            dtype="float32",
            rng=0,
        ),
    )
    for name in ("xavier", "he"):
        yield (
            name,
            simple(
                getattr(initializers, name),
                {"shape": lambda v: sizes(v) and len(v) == 2, **random_},
                shape=(2, 3),
                dtype="float32",
                rng=0,
            ),
        )
    positive = number(0)
    yield (
        "step_decay",
        simple(
            optimizer.step_decay, {"lr": positive, "every": integer(), "factor": positive}, lr=0.1, every=3, factor=0.1
        ),
    )
    yield (
        "cosine_decay",
        simple(
            optimizer.cosine_decay, {"lr": positive, "steps": integer(), "final": positive}, lr=0.1, steps=3, final=0.0
        ),
    )
    yield (
        "linear_warmup",
        simple(optimizer.linear_warmup, {"steps": integer(), "schedule": callable}, steps=3, schedule=len),
    )
    norms = {"max_norm": lambda v: v == math.inf or (number(0)(v) and v > 0), "g": weights}
    yield (
        "clip_grads",
        lambda: Call(lambda g, max_norm: nnx.clip_grads([g], max_norm), {"g": np.ones((4, 3)), "max_norm": 1.0}, norms),
    )


def embedding_call():
    layer = nnx.Embedding(np.asarray(X.copy()))
    index = {"idx": lambda v: labels(v) or (real(v) and numpy.asarray(v).dtype.kind in "iu")}
    return Call(layer.forward, {"idx": T}, index, lambda idx: X[idx.astype(int)], (layer,))


def embedding_backward_call():
    layer = nnx.Embedding(np.asarray(X.copy()))
    layer.forward(T)
    return Call(layer.backward, {"dout": X}, {"dout": real}, None, (layer,))


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


def recurrent(kind, **settings):
    """Return a recurrent layer with D = H = 3."""
    blocks = 3 if "GRU" in kind.__name__ else 4 if "LSTM" in kind.__name__ else 1
    arrays = [np.tile(np.asarray(a.copy()), blocks) for a in (X[:3], -X[1:] / 2, X[3])]
    return kind(*arrays * (1 + ("Bi" in kind.__name__)), **settings)


def steps(kind):
    """Return the formula of a cell with the weights of `recurrent`: x, h_prev and c_prev to h, and c beside it."""

    def function(x, h_prev, c_prev=None):
        h = 0 if h_prev is None else h_prev
        c = 0 if c_prev is None else c_prev
        x, product = x @ X[:3] + X[3], lambda h: h @ (-X[1:] / 2) if numpy.ndim(h) else 0
        a = x + product(h)
        if kind is layers.RNN:
            return numpy.tanh(a)
        gate = sigmoid(a)
        if kind is layers.GRU:
            return (1 - gate) * h + gate * numpy.tanh(x + product(gate * h))
        c = gate * c + numpy.tanh(a) * gate
        return numpy.concatenate([gate * numpy.tanh(c), c], axis=1)

    return function


def recurrent_calls():
    states = optional(lambda v: real(v) and numpy.shape(v) == (4, 3))
    columns = {"Wx": lambda v: weights(v) and v.shape[1] == 3, "Wh": array_weights((3, 3))}
    columns["b"] = optional(array_weights((3,)))
    sizes_ = {"input_size": integer(), "hidden_size": integer(), "initializer": callable, "dtype": plain_dtype}
    chosen = {"input_size": 2, "hidden_size": 3, "initializer": initializers.he, "dtype": "float32", "rng": 0}
    for kind in (layers.RNN, layers.LSTM, layers.GRU):
        name = kind.__name__
        given = {n: X if i == 0 else X / 2 for i, n in enumerate(("x", "h_prev", "c_prev")[: 2 + (name == "LSTM")])}

        def forward(kind=kind, given=given):
            layer = recurrent(kind)

            def function(**arguments):
                result = layer.forward(**arguments)
                return np.concatenate(result, axis=1) if isinstance(result, tuple) else result

            return Call(function, given, {"x": real} | dict.fromkeys(given, states), steps(kind), (layer,))

        def backward(kind=kind, given=given):
            layer = recurrent(kind)
            layer.forward(**given)
            gradients = {"dh_next": X} | ({"dc_next": X} if kind is layers.LSTM else {})
            return Call(layer.backward, gradients, {"dh_next": real, "dc_next": states}, None, (layer,))

        time_kind = getattr(layers, f"Time{name}")
        yield f"{name}.forward", forward
        yield f"{name}.backward", backward
        yield f"Time{name}.init", simple(time_kind.init, sizes_ | {"rng": seed}, **chosen)
    arrays = dict(zip(("Wx", "Wh", "b"), recurrent(layers.RNN).params, strict=True))
    yield "TimeRNN", simple(layers.TimeRNN, columns | {"stateful": anything}, **arrays, stateful=False)
    for kind in (layers.TimeRNN, layers.TimeLSTM, layers.TimeGRU, layers.TimeBiLSTM):
        yield f"{kind.__name__}.forward", functools.partial(time_call, kind)
        yield f"{kind.__name__}.backward", functools.partial(time_backward_call, kind)
    for kind in (layers.TimeRNN, layers.TimeLSTM, layers.TimeGRU):
        yield f"{kind.__name__}, from a state", functools.partial(state_call, kind)


def sequences(v):
    return real(v) and numpy.ndim(v) == 3 and numpy.shape(v)[2] == 3 and numpy.shape(v)[1] > 0


def time_call(kind):
    layer = recurrent(kind)

    def reference(xs):
        h, c, hs = None, None, []
        for x in numpy.moveaxis(xs, 1, 0):
            out = steps(getattr(layers, kind.__name__.removeprefix("Time")))(x, h, *[c] * (kind is layers.TimeLSTM))
            h, c = out[:, :3], out[:, 3:]
            hs.append(h)
        return numpy.stack(hs, axis=1)

    return Call(
        layer.forward, {"xs": X[None]}, {"xs": sequences}, None if kind is layers.TimeBiLSTM else reference, (layer,)
    )


def time_backward_call(kind):
    layer = recurrent(kind)
    hs = layer.forward(X[None])
    return Call(layer.backward, {"dhs": numpy.ones(hs.shape)}, {"dhs": sequences}, None, (layer,))


def state_call(kind):
    """The next forward checks the states that were set."""
    layer = recurrent(kind, stateful=True)
    state = optional(lambda v: real(v) and numpy.shape(v) == (4, 3))

    def forward(**states):
        before = layer.state
        layer.set_state(**states)
        try:
            return layer.forward(X[:, None])
        finally:
            layer.state = before

    states = dict.fromkeys(("h", "c")[: len(layer.state)], X / 2)
    return Call(forward, states, dict.fromkeys(states, state), None, (layer,))


def time_loss_calls():
    """TimeSoftmaxWithLoss, whose label -1 is ignored, TimeDropout, TimeEmbedding and TimeAffine."""

    def loss(x, t):
        if t.shape == x.shape:
            return cross_entropy(x, t)
        kept = t.astype(int) >= 0
        return cross_entropy(x[kept], t[kept]) if kept.any() else 0.0

    def valid_t(v):  # one row of scores has one label
        return integer(-1)(v) or labels(numpy.asarray(v) + (numpy.asarray(v) == -1))

    ignored = {"x": real, "t": valid_t}
    yield "TimeSoftmaxWithLoss.forward", simple(layers.TimeSoftmaxWithLoss().forward, ignored, loss, x=X, t=T - 1)
    yield (
        "TimeDropout",
        simple(layers.TimeDropout, {"dropout_ratio": number(0, 1), "rng": seed}, dropout_ratio=0.5, rng=0),
    )
    index = {"idx": lambda v: labels(v) or (real(v) and numpy.asarray(v).dtype.kind in "iu")}
    embedding = layers.TimeEmbedding(np.asarray(X.copy()))
    yield "TimeEmbedding.forward", simple(embedding.forward, index, lambda idx: X[idx.astype(int)], idx=T)
    affine_ = layers.TimeAffine(np.asarray(X[:3].copy()), np.asarray(X[3].copy()))
    yield "TimeAffine.forward", simple(affine_.forward, {"x": real}, lambda x: x @ X[:3] + X[3], x=X)


def word_ids(v):
    return real(v) and numpy.asarray(v).dtype.kind in "iu" and numpy.ndim(v) == 1 and numpy.min(v) >= 0


def negative_sampling_calls():
    corpus, W = numpy.arange(12) % 4, np.asarray(X.copy())
    valid = {"corpus": word_ids, "power": number(0), "sample_size": integer(), "rng": seed}
    arguments = {"corpus": corpus, "power": 0.75, "sample_size": 2, "rng": 0}
    size = {"vocab_size": optional(integer())}
    yield "UnigramSampler", simple(layers.negative_sampling.UnigramSampler, valid | size, **arguments, vocab_size=4)
    yield "NegativeSamplingLoss", simple(layers.NegativeSamplingLoss, valid | {"W": weights}, W=W, **arguments)

    def loss():
        layer = layers.NegativeSamplingLoss(np.asarray(X.copy()), corpus, sample_size=2, rng=0)
        layer.forward(X, T)
        return layer

    def forward():
        layer = loss()
        return Call(layer.forward, {"h": X, "target": T}, {"h": real, "target": word_ids}, None, (layer,))

    def backward():
        layer = loss()
        one = {"dout": lambda v: isinstance(v, int) or (real(v) and numpy.ndim(v) == 0)}
        return Call(layer.backward, {"dout": 1.0}, one, None, (layer,))

    def sample():
        sampler = layers.negative_sampling.UnigramSampler(**arguments)
        return Call(sampler.get_negative_sample, {"target": T}, {"target": word_ids}, None, (sampler,))

    def dot():
        layer = layers.EmbeddingDot(np.asarray(X.copy()))
        return Call(
            layer.forward,
            {"h": X, "idx": T},
            {"h": real, "idx": word_ids},
            lambda h, idx: (X[idx.astype(int)] * h).sum(axis=1),
            (layer,),
        )

    yield "NegativeSamplingLoss.forward", forward
    yield "NegativeSamplingLoss.backward", backward
    yield "UnigramSampler.get_negative_sample", sample
    yield "EmbeddingDot.forward", dot


def axes():
    from matplotlib import figure

    return figure.Figure().add_subplot()


def plot_calls():
    points = {"x": lambda v: real(v) and numpy.isfinite(numpy.asarray(v, float)).all(), "t": real}
    pairs = X[:, :2].copy()

    def predict(x):
        return to_cpu(np.asarray(x))[:, :1]

    functions_ = {"predict": lambda v: callable(v) or hasattr(v, "predict"), "step": optional(number(0))}
    losses = {"loss_list": anything, "interval": integer(), "ylim": anything}
    yield (
        "plot_loss",
        lambda: Call(
            functools.partial(plotting.plot_loss, ax=axes()),
            {"loss_list": [1.0, 0.5], "interval": 1, "ylim": None},
            losses,
        ),
    )
    yield (
        "plot_history",
        lambda: Call(
            functools.partial(plotting.plot_history, ax=axes()),
            {"history": [{"epoch": 1, "loss": 0.5}], "ylim": None},
            {"history": lambda v: all(isinstance(row, dict) for row in v), "ylim": anything},
        ),
    )
    yield "plot_data", lambda: Call(functools.partial(plotting.plot_data, ax=axes()), {"x": pairs, "t": T}, points)
    yield (
        "plot_decision_regions",
        lambda: Call(
            functools.partial(plotting.plot_decision_regions, ax=axes()),
            {"predict": predict, "x": pairs, "t": T, "step": 1.0},
            points | functions_,
        ),
    )


def conversion_calls():
    yield "asarray", simple(nnx.asarray, {"x": real}, lambda x: x, x=X)
    yield "load_data", simple(nnx.spiral.load_data, {"seed": integer(0)}, seed=1984)


CALLS = {
    "Trainer.fit": fit_call,
    "Sequential.evaluate": evaluate_call,
    "Sequential.predict": predict_call,
    "Sequential.predict_proba": functools.partial(predict_call, "predict_proba"),
    **dict(forward_calls()),
    **dict(attention_calls()),
    **dict(setting_calls()),
    **dict(assigned_calls()),
    **dict(loss_calls()),
    **dict(constructor_calls()),
    **dict(function_calls()),
    **dict(conversion_calls()),
    **dict(recurrent_calls()),
    **dict(time_loss_calls()),
    **dict(negative_sampling_calls()),
    "Embedding.forward": embedding_call,
    "Embedding.backward": embedding_backward_call,
}
if importlib.util.find_spec("matplotlib"):
    CALLS |= dict(plot_calls())
WORDS = ("rng must be",)  # clear, though the function that takes rng is not named


def describe(error):
    return f"{type(error).__name__}: {str(error)[:100]}"


def judge(call, arguments, overflows):
    """Run a call; return how it ended: right, unclear, silent wrong or changed state, and a description.

    Where the arguments hold infinity, NaN or numbers that overflow, NumPy may warn.
    """
    before = state(call.objects)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="BatchNorm: a batch of one row")
            with numpy.errstate(**dict.fromkeys(("over", "invalid"), "ignore") if overflows else {}):
                result = call.function(**arguments)
    except (TypeError, ValueError) as error:
        if state(call.objects) != before:
            return "changed state", describe(error)
        match = BEGINS.match(str(error))
        clear = (match and match[1] in PUBLIC) or str(error).startswith(WORDS)
        return "right" if clear else "unclear", describe(error)
    except FloatingPointError as error:
        return "right" if str(error).startswith("Trainer.fit") else "unclear", describe(error)
    except Exception as error:
        return "changed state" if state(call.objects) != before else "unclear", describe(error)
    for name, value in arguments.items():
        try:
            valid = call.valid.get(name, anything)(value)
        except Exception:
            valid = False
        if not valid:
            return "silent wrong", f"accepted {name}={value!r:.60}"
    return compare(call, arguments, result, overflows)


def compare(call, arguments, result, overflows):
    """Compare a result with the reference in float64; where that overflows, NaN and infinity are as right."""
    if call.reference is None:
        return "right", ""
    with numpy.errstate(all="ignore"):
        host = {
            n: v if v is None else numpy.asarray(v).astype(float if n != "t" else None) for n, v in arguments.items()
        }
        expected = call.reference(**host)
    if expected is None:
        return "right", ""
    result = to_cpu(result)
    with numpy.errstate(all="ignore"):
        expected = numpy.asarray(expected).astype(result.dtype)
        rtol = {"float16": 5e-3, "float32": 1e-5}.get(result.dtype.name, 1e-9)
        finite = numpy.isfinite(expected) & (numpy.isfinite(result) | (not overflows))
        same = result.shape == expected.shape and numpy.allclose(result[finite], expected[finite], rtol, rtol)
    return ("right", "") if same else ("silent wrong", f"{result!r:.60} instead of {expected!r:.60}")


def run(name, weird):
    """Make the call `name` with the arguments of `weird`, names of WEIRD by argument."""
    call = CALLS[name]()
    arguments = call.arguments | {argument: WEIRD[value]() for argument, value in weird.items()}
    overflows = OVERFLOWS & {*weird.values()} or {"float16", "the smallest integer"} <= {*weird.values()}
    kind, what = judge(call, arguments, overflows)
    return kind, f"{name}({', '.join(f'{a}={v}' for a, v in weird.items())}) {what}"


def single_calls():
    """Yield every call with each of its arguments replaced by each weird value."""
    for name, make in CALLS.items():
        for argument in make().arguments:
            for value in WEIRD:
                yield name, {argument: value}


def random_calls(count, seed=0):
    """Yield up to `count` calls of which one to three arguments are replaced, at most one by an empty array.

    Two of these may fit one another, and each is judged alone.
    """
    rng = random.Random(seed)
    names = {name: list(make().arguments) for name, make in CALLS.items()}
    for _ in range(count):
        name = rng.choice(list(names))
        arguments = rng.sample(names[name], min(len(names[name]), rng.choice([1, 1, 2, 3])))
        weird = {argument: rng.choice(list(WEIRD)) for argument in arguments}
        if sum(value in EMPTY for value in weird.values()) < 2:
            yield name, weird


def summary(calls):
    """Return how many calls ended in each way, and descriptions of those that were not right."""
    counts, found = collections.Counter(), collections.defaultdict(list)
    for name, weird in calls:
        kind, what = run(name, weird)
        counts[kind] += 1
        if kind != "right":
            found[kind].append(what)
    return counts, found


if __name__ == "__main__":
    counts, found = summary(random_calls(int(sys.argv[1]) if sys.argv[1:] else 100_000))
    print(dict(counts))
    for kind, lines in found.items():
        print(f"== {kind}")
        for line, times in collections.Counter(lines).most_common(60):
            print(times, line)
