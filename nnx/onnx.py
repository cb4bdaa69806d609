"""Export of models to ONNX, a file format for inference in other programs. N rows, D inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy

from nnx import layers
from nnx.checks import check_integer, check_list, setting
from nnx.device import describe, to_cpu
from nnx.models import Sequential
from nnx.np import Array, np
from nnx.protocols import Layer
from nnx.tree import memory_keys, named_arrays

__all__ = ["export"]


def export(model: Layer, path: str | Path, *, input_shape: Iterable[int | None] | None = None) -> None:
    """Write an ONNX model that computes y = model.predict(x); its input is named "x", its output "y".

    Parameters
    ----------
    model : Sequential, or a layer of `nnx.layers`
        Loss layers are left out: y holds scores; for probabilities export `Sequential([*model.layers, Softmax()])`.
    path : str or Path
    input_shape : iterable of int or None
        Shape of x, with None for axes of any length. The default is (None, D), with D of the first layer that has
        parameters; any D if there is none. x and y have the widest dtype of the parameters, or float32. If the first
        layer is an Embedding, the default is (None,), and x is int64; ONNX counts negative indices from the end.

    Raises
    ------
    TypeError, ValueError
        If a layer is a loss, or not of a class in `nnx.layers`, or cannot take an x of this shape.
    ImportError
        If onnx is not installed.

    Examples
    --------
    >>> import nnx
    >>> nnx.onnx.export(nnx.models.mlp([4, 8, 3], rng=0), "net.onnx")  # x (N, 4) to scores y (N, 3)
    """
    try:
        from onnx import checker, helper, numpy_helper, save, shape_inference  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("nnx.onnx.export requires onnx: pip install onnx") from error
    flat = list(_flatten(model, "model"))
    params = [p for layer in flat for p in layer.params]
    dtype = numpy.result_type(*[p.dtype for p in params] or [numpy.float32])
    of_indices = isinstance(flat[0] if flat else None, layers.Embedding)
    default = [None] if of_indices else [None, len(params[0]) if params else None]
    axes = check_list("export: input_shape", default if input_shape is None else input_shape, "integers and None")
    shape = [f"N{i or ''}" if n is None else check_integer("export: input_shape", n) for i, n in enumerate(axes)]
    trial = np.zeros([1 if isinstance(n, str) else n for n in shape], np.int64 if of_indices else dtype)
    with numpy.errstate(all="ignore"):
        Sequential([model]).predict(trial)  # raises an error for a wrong shape; the values do not matter
    graph, value = _Graph(helper.make_node, named_arrays(model)), "x"
    for layer in flat:
        value = _NODES[type(layer)](graph.node, layer, value, *layer.params)
    graph.nodes.append(helper.make_node("Identity", [value], ["y"]))
    x = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(trial.dtype), shape)
    host = {name: to_cpu(a).astype(dtype if a.dtype.kind == "f" else a.dtype) for name, a in graph.arrays.items()}
    arrays = [numpy_helper.from_array(a, name) for name, a in host.items()]
    body = helper.make_graph(graph.nodes, type(model).__name__, [x], [helper.make_empty_tensor_value_info("y")], arrays)
    proto = helper.make_model(body, producer_name="nnx", opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    proto = shape_inference.infer_shapes(proto, strict_mode=True)  # adds type and shape of y
    checker.check_model(proto, full_check=True)
    save(proto, Path(path).expanduser())


def _flatten(layer: Any, name: str) -> Iterator[Any]:
    """Yield the layers that `predict` calls; raise a TypeError for one that cannot be exported."""
    if isinstance(layer, Sequential) and type(layer).predict is Sequential.predict:
        for i, inner in enumerate(layer.layers):
            yield from _flatten(inner, f"{name}.layers[{i}]")
    elif type(layer) in _NODES:
        yield layer
    else:
        raise TypeError(f"export: {name} cannot be exported: {describe(layer)} is not in nnx.layers, or is a loss")


class _Graph:
    """The nodes of an ONNX model, and its arrays by name."""

    def __init__(self, make_node: Callable[..., Any], named: dict[str, Array]) -> None:
        self.make_node, self.names = make_node, {memory_keys(a)[0]: name for name, a in named.items()}
        self.nodes, self.arrays = list[Any](), dict[str, Array]()

    def node(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """Append a node; return the name of its output. `inputs` are such names, arrays and numbers."""
        names = [a if isinstance(a, str) else self.array(np.asarray(a)) for a in inputs]
        self.nodes.append(self.make_node(op, names, [f"{op}_{len(self.nodes)}"], **attributes))
        return f"{op}_{len(self.nodes) - 1}"

    def array(self, a: Array) -> str:
        """Return the name of an array, the same for arrays that share memory."""
        key, transposed_key = memory_keys(a)
        if key not in self.names and transposed_key in self.names:
            return self.node("Transpose", a.T)
        self.arrays[self.names.setdefault(key, f"constant_{len(self.names)}")] = a  # keeps its memory from being reused
        return self.names[key]


_NODES: dict[type, Callable[..., str]] = {  # called with graph.node, the layer, the name of its input, its parameters
    layers.Affine: lambda op, layer, x, W, b: op("Add", op("MatMul", x, W), b),
    layers.BatchNorm: lambda op, layer, x, gamma, beta: op(
        "Add", op("Mul", op("Sub", x, layer.running_mean), gamma / np.sqrt(layer.running_var + layer.eps)), beta
    ),
    layers.Dropout: lambda op, layer, x: op("Mul", x, 1 - setting(layer, "dropout_ratio")),
    layers.Embedding: lambda op, layer, idx, W: op("Gather", W, idx),
    layers.GELU: lambda op, layer, x: op("Gelu", x, approximate="tanh"),  # of opset 20
    layers.LayerNorm: lambda op, layer, x, *params: op("LayerNormalization", x, *params, epsilon=setting(layer, "eps")),
    layers.MatMul: lambda op, layer, x, W: op("MatMul", x, W),
    layers.ReLU: lambda op, layer, x: op("Relu", x),
    # Squeeze and Unsqueeze raise an error unless axis 0 has length 1.
    layers.Repeat: lambda op, layer, x: op("Gather", op("Unsqueeze", op("Squeeze", x, [0]), [0]), [0] * layer.N),
    layers.Sigmoid: lambda op, layer, x: op("Sigmoid", x),
    layers.Softmax: lambda op, layer, x: op("Softmax", x),
    layers.Sum: lambda op, layer, x: op("ReduceSum", x, [0]),
    layers.Tanh: lambda op, layer, x: op("Tanh", x),
}
