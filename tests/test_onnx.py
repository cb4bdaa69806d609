"""Export to ONNX: onnxruntime predicts what the model predicts; names, shapes and errors."""

import copy
import subprocess
import sys

import numpy
import pytest
from cases import CASES as ALL_CASES

import nnx
from nnx import layers, to_cpu
from nnx.layers import attention, recurrent
from nnx.models import Sequential, TwoLayerNet
from nnx.np import np
from nnx.onnx import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Relative to the largest value; onnxruntime has the constants of Gelu in float32.
TOLERANCE = {"float16": 4e-3, "float32": 1e-5, "float64": 1e-7}
LOSSES = {"MeanSquaredError", "NegativeSamplingLoss", "SigmoidWithLoss", "SoftmaxWithLoss"}
NOT_EXPORTED = {"EmbeddingDot", *recurrent.__all__, *attention.__all__}
CASES = {name: cases for name, cases in ALL_CASES.items() if name not in LOSSES | NOT_EXPORTED}


def array(rng, *shape, dtype="float32"):
    return nnx.asarray(rng.standard_normal(shape), dtype)


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # without the messages of errors, which are raised too
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_same(path, model, *batches):
    """Compare the file with `predict` for several batches."""
    runtime = session(path)
    assert [value.name for value in (*runtime.get_inputs(), *runtime.get_outputs())] == ["x", "y"]
    for x in batches:
        expected, (y,) = to_cpu(model.predict(nnx.asarray(x))), runtime.run(None, {"x": x})
        assert y.dtype == expected.dtype
        assert y.shape == expected.shape
        scale = abs(expected.astype("float64")).max()
        numpy.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[y.dtype.name] * scale)


def dimensions(value):
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_cases_hold_every_layer():
    classes = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    assert classes - LOSSES - NOT_EXPORTED == set(CASES)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "i"), [(name, i) for name in CASES for i in range(len(CASES[name]))])
def test_every_layer(name, i, dtype, tmp_path, rng):
    make, (x,) = CASES[name][i]
    layer = make(dtype)
    if name == "BatchNorm":
        layer.running_mean[...] = array(rng, 4)
        layer.running_var[...] = abs(array(rng, 4))
    if hasattr(layer, "eps"):
        layer.eps = 0.3
    model = Sequential([layer] if layer.params else [layers.MatMul(array(rng, 4, 4, dtype=dtype)), layer])
    x = x if name == "Embedding" else (2 * x).astype(dtype)
    export(model, tmp_path / "net.onnx", input_shape=(None, *x.shape[1:]))
    sizes = [1] if name == "Repeat" else [1, 2, 7]
    assert_same(tmp_path / "net.onnx", model, *(numpy.resize(x, (n, *x.shape[1:])) for n in sizes))


def mixed(rng, dtype="float32"):
    """Return a model of most layers, nested, whose BatchNorm has seen a batch."""
    W = array(rng, 6, 6, dtype=dtype)
    ones, zeros = np.ones(6, dtype), np.zeros(6, dtype)
    block = [layers.Affine(array(rng, 4, 6, dtype=dtype), array(rng, 6, dtype=dtype)), layers.BatchNorm(ones, zeros)]
    inner = [layers.MatMul(W), layers.GELU(), layers.LayerNorm(ones, zeros), layers.Dropout(0.3, rng=0)]
    net = TwoLayerNet(6, 5, 3, dtype=dtype, rng=0, input_grad=True)
    net.loss_layer = None
    parts = [Sequential([*block, layers.ReLU()]), Sequential(inner), net, layers.Softmax()]
    model = Sequential(parts, layers.MeanSquaredError())
    model.forward(array(rng, 20, 4, dtype=dtype), numpy.zeros((20, 3)))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_mixed_model_predicts_batches_of_any_size(dtype, tmp_path, rng):
    model = mixed(rng, dtype)
    export(model, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", model, *(rng.standard_normal((n, 4)).astype(dtype) for n in (1, 2, 7)))


def test_the_file_is_valid_and_describes_itself(tmp_path, rng):
    export(mixed(rng), str(tmp_path / "net.onnx"))
    proto = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert dimensions(proto.graph.input[0]) == ["N", 4]
    assert dimensions(proto.graph.output[0]) == ["N", 3]
    assert proto.graph.name == "Sequential"
    assert proto.producer_name == "nnx"


@pytest.mark.parametrize("input_shape", [(None, 3, 4), (None, None, 4), (2, 3, 4), iter([None, 3, 4])])
def test_further_axes(input_shape, tmp_path, rng):
    model = mixed(rng)
    export(model, tmp_path / "net.onnx", input_shape=input_shape)
    assert_same(tmp_path / "net.onnx", model, rng.standard_normal((2, 3, 4)).astype("float32"))


def test_free_axes_have_different_names(tmp_path, rng):
    export(mixed(rng), tmp_path / "net.onnx", input_shape=(None, None, 4))
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert dimensions(graph.input[0]) == ["N", "N1", 4]
    assert dimensions(graph.output[0]) == ["N", "N1", 3]


def test_parameters_have_their_names_in_checkpoints(tmp_path, rng):
    model = Sequential([Sequential([layers.MatMul(array(rng, 4, 6))]), TwoLayerNet(6, 5, 3)])
    export(model, tmp_path / "net.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    names = ["layers.0.layers.0.W", *(f"layers.1.layers.{i}.{p}" for i in (0, 2) for p in "Wb")]
    assert sorted(arrays) == sorted(names)
    for name, p in zip(names, model.params, strict=True):
        numpy.testing.assert_array_equal(arrays[name], to_cpu(p))


def test_a_single_layer_is_a_model(tmp_path, rng):
    layer = layers.Affine(array(rng, 4, 3), array(rng, 3))
    export(layer, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", Sequential([layer]), rng.standard_normal((5, 4)).astype("float32"))


@pytest.mark.parametrize("nodes", [[], [layers.Sigmoid()]])
def test_models_without_parameters_take_any_float32(nodes, tmp_path, rng):
    export(Sequential(nodes), tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", Sequential(nodes), rng.standard_normal((2, 3)).astype("float32"))


def test_tied_weights_are_stored_once(tmp_path, rng):
    W, U = array(rng, 9, 5), array(rng, 5, 5)
    model = Sequential(
        [
            layers.Embedding(W),
            *(layers.MatMul(w) for w in (U, U, U.T, W.T)),
            *(layers.MatMul(w) for w in (W, W.T)),
            layers.MatMul(array(rng, 9, 9)),
        ]
    )
    export(model, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", model, numpy.arange(9), numpy.array([3]))
    shapes = sorted(tuple(t.dims) for t in onnx.load(tmp_path / "net.onnx").graph.initializer)
    assert shapes == [(5, 5), (9, 5), (9, 9)]


def test_a_transposed_weight_that_is_shared_comes_first(tmp_path, rng):
    W = array(rng, 5, 5)
    model = Sequential([layers.MatMul(W.T), layers.MatMul(W)])
    export(model, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", model, rng.standard_normal((2, 5)).astype("float32"))
    assert len(onnx.load(tmp_path / "net.onnx").graph.initializer) == 1


def test_constants_of_equal_layers_are_separate(tmp_path, rng):
    """The memory of a constant that was freed would be reused by the next."""
    model = Sequential([layers.MatMul(array(rng, 4, 4)), *(layers.Dropout(i / 50) for i in range(20))])
    export(model, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", model, rng.standard_normal((2, 4)).astype("float32"))
    assert len(onnx.load(tmp_path / "net.onnx").graph.initializer) == 21


def test_noncontiguous_weights(tmp_path, rng):
    W = array(rng, 8, 10)[::2, 1::3]
    model = Sequential([layers.Affine(W, array(rng, 6)[::2]), layers.MatMul(array(rng, 4, 3).T)])
    export(model, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", model, rng.standard_normal((2, 4)).astype("float32"))


def test_mixed_dtypes_are_computed_in_the_widest(tmp_path, rng):
    half, single = array(rng, 4, 4, dtype="float16"), array(rng, 4, 4)
    model = Sequential([layers.MatMul(half), layers.Dropout(0.3), layers.MatMul(single), layers.MatMul(half)])
    export(model, tmp_path / "net.onnx")
    x = rng.standard_normal((2, 4)).astype("float32")
    (y,) = session(tmp_path / "net.onnx").run(None, {"x": x})
    assert y.dtype == numpy.float32
    expected = 0.7 * x @ to_cpu(half) @ to_cpu(single) @ to_cpu(half)
    numpy.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_a_variance_beyond_the_range_of_float16(tmp_path, rng):
    layer = layers.BatchNorm(np.ones(3, "float16"), np.zeros(3, "float16"))
    layer.running_var[...] = 1e8
    export(layer, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", Sequential([layer]), (20000 * rng.standard_normal((5, 3))).astype("float16"))


def test_embedding_takes_one_axis_of_indices_by_default(tmp_path, rng):
    model = Sequential([layers.Embedding(array(rng, 7, 4)), layers.ReLU()])
    export(model, tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", model, numpy.array([6, 0, 0]))
    export(model, tmp_path / "net.onnx", input_shape=(None, None))
    assert_same(tmp_path / "net.onnx", model, numpy.array([[6, 0, 0], [1, 2, 3]]))


def test_repeat_takes_a_single_row(tmp_path, rng):
    export(Sequential([layers.MatMul(array(rng, 4, 4)), layers.Repeat(3)]), tmp_path / "net.onnx")
    with pytest.raises(Exception, match="must be 1 instead of 2"):
        session(tmp_path / "net.onnx").run(None, {"x": numpy.zeros((2, 4), "float32")})


def test_export_leaves_the_model_and_a_pending_backward_unchanged(tmp_path, rng):
    model = mixed(rng)
    copied = copy.deepcopy(model)
    export(model, tmp_path / "net.onnx")
    model.backward()
    copied.backward()
    arrays = nnx.tree.named_arrays(copied)
    for name, a in nnx.tree.named_arrays(model).items():
        numpy.testing.assert_array_equal(to_cpu(a), to_cpu(arrays[name]))
    for dW, expected in zip(model.grads, copied.grads, strict=True):
        numpy.testing.assert_array_equal(to_cpu(dW), to_cpu(expected))


@pytest.mark.filterwarnings("error")
def test_the_trial_run_does_not_warn(tmp_path):
    """Zeros have no variance, and times infinity are NaN."""
    with numpy.errstate(all="raise"):
        export(layers.LayerNorm(np.ones(3), np.zeros(3), eps=0), tmp_path / "net.onnx")
        export(layers.MatMul(np.full((2, 2), numpy.inf)), tmp_path / "net.onnx")


class Scale:
    """A layer of a user."""

    def __init__(self):
        self.params, self.grads = [], []

    def forward(self, x):
        return 2 * x

    def backward(self, dout):
        return 2 * dout


class Twice(layers.Sigmoid):
    """A layer that does not compute what its base class does."""

    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(Sequential):
    def predict(self, x):
        return 2 * super().predict(x)


class Named(Sequential):
    """A model that only says which layers it consists of."""

    def __init__(self):
        super().__init__([layers.Sigmoid()])


def test_a_subclass_of_sequential_is_one(tmp_path, rng):
    export(Named(), tmp_path / "net.onnx")
    assert_same(tmp_path / "net.onnx", Named(), rng.standard_normal((2, 3)).astype("float32"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scale(), "model cannot be exported: test_onnx.Scale is"),
        (Sequential([layers.ReLU(), Scale()]), r"model.layers\[1\] cannot be exported: test_onnx.Scale is"),
        (
            Sequential([Sequential([Twice()])]),
            r"model.layers\[0\].layers\[0\] cannot be exported: test_onnx.Twice",
        ),
        (Sequential([Doubled([layers.ReLU()])]), r"model.layers\[0\] cannot be exported: test_onnx.Doubled"),
        (layers.SoftmaxWithLoss(), "model cannot be exported: nnx.layers.loss.SoftmaxWithLoss .* or is a loss"),
        (TwoLayerNet, "model cannot be exported: type is"),
        ("net.onnx", "model cannot be exported: str is"),
        (None, "model cannot be exported: NoneType is"),
    ],
)
def test_what_cannot_be_exported_is_named(model, message, tmp_path):
    with pytest.raises(TypeError, match=f"export: {message}"):
        export(model, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(
    ("input_shape", "error", "message"),
    [
        ((None, 5), ValueError, r"Affine: x must have shape \(N, 4\)"),
        ((None,), ValueError, r"Affine: x must have shape \(N, 4\)"),
        (4, TypeError, "export: input_shape must be a list of integers and None, got 4"),
        ((None, 4.0), TypeError, "export: input_shape must be an integer, got 4.0"),
        ((0, 4), ValueError, "export: input_shape must be at least 1, got 0"),
    ],
)
def test_invalid_input_shapes(input_shape, error, message, tmp_path, rng):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        export(mixed(rng), path, input_shape=input_shape)
    assert path.read_bytes() == b"old"


def test_layers_that_do_not_fit_together(tmp_path, rng):
    model = Sequential([layers.MatMul(array(rng, 4, 1)), layers.BatchNorm(np.ones(3), np.zeros(3))])
    with pytest.raises(ValueError, match=r"BatchNorm: x must have shape \(N, 3\)"):  # which ONNX would broadcast
        export(model, tmp_path / "net.onnx")


@pytest.mark.parametrize(("path", "error"), [(3, TypeError), ("", OSError), ("missing/net.onnx", FileNotFoundError)])
def test_invalid_paths(path, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="int" if path == 3 else "missing" if path else "directory"):
        export(layers.Sigmoid(), path)


def test_an_invalid_model_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(nnx.onnx._NODES, layers.ReLU, lambda op, layer, x: op("Unknown", x))
    with pytest.raises(onnx.checker.ValidationError):
        export(layers.ReLU(), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    export(layers.Sigmoid(), "~/net.onnx")
    assert (tmp_path / "net.onnx").exists()


def test_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        export(layers.Sigmoid(), tmp_path / "net.onnx")


def test_import_does_not_import_onnx():
    subprocess.run([sys.executable, "-c", "import sys, nnx.onnx; sys.exit('onnx' in sys.modules)"], check=True)
