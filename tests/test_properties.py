"""Arbitrary shapes, strides, dtypes and values give the right result, the documented error, or a non-finite number.

The references are NumPy's formulas in float64. Extreme values are those that overflow float16 and
float32, denormals, infinities and NaN.
"""

import math

import numpy
import pytest

import nnx
from nnx import np, to_cpu

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402 - after the skip
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as arrays  # noqa: E402

settings.register_profile("nnx", deadline=None, max_examples=20 if nnx.GPU else 100, derandomize=True)
settings.load_profile("nnx")
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = st.sampled_from(["float16", "float32", "float64"])
TINY, HUGE = 1e-42, 1e38
ORDINARY = st.floats(-4, 4, width=16)
ANY = ORDINARY | st.sampled_from([0.0, -0.0, TINY, -TINY, HUGE, -HUGE, math.inf, -math.inf, math.nan, 88.8, -88.8])


@st.composite
def inputs(draw, values=ORDINARY, axes=(2, 3), columns=None, rows=(1, 5)):
    """Draw an array of the array module, contiguous or not."""
    n = draw(st.integers(*axes))
    shape = [draw(st.integers(*rows)) for _ in range(n - 1)] + [columns or draw(st.integers(1, 6))]
    dtype = draw(DTYPES)
    host = draw(arrays.arrays("float64", tuple(shape), elements=values))
    with numpy.errstate(over="ignore"):
        x = np.asarray(host.astype(dtype))
    layout = draw(st.sampled_from(["C", "F", "gaps", "backwards"]))
    if layout == "F":
        return np.asfortranarray(x)
    if layout == "gaps":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    return x[::-1].copy()[::-1] if layout == "backwards" else x


def reference(x):
    """Return the values of `x` in float64."""
    return to_cpu(x).astype("float64")


def assert_matches(result, expected, x, factor=8):
    """Assert shape and dtype, and the values to the accuracy of the dtype."""
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    info = numpy.finfo(to_cpu(x).dtype)
    with numpy.errstate(over="ignore", invalid="ignore"):
        expected = expected.astype(info.dtype)
    numpy.testing.assert_allclose(
        to_cpu(result).astype("float64"), expected.astype("float64"), rtol=factor * info.eps, atol=4 * info.tiny
    )


def sigmoid(x):
    return numpy.where(x < 0, numpy.exp(-abs(x)), 1) / (1 + numpy.exp(-abs(x)))


def softmax(x):
    top = x.max(axis=-1, keepdims=True)
    shifted = numpy.where(x == top, 0, x - top)
    e = numpy.exp(shifted)
    return e / e.sum(axis=-1, keepdims=True)


FUNCTIONS = {
    "Sigmoid": sigmoid,
    "ReLU": lambda x: numpy.maximum(x, 0),
    "Tanh": numpy.tanh,
    "Softmax": softmax,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@quick
@given(x=inputs(values=ANY))
def test_activations_of_arbitrary_inputs(name, x):
    with numpy.errstate(all="ignore"):
        expected = FUNCTIONS[name](reference(x))
    layer = getattr(nnx, name)()
    result = layer.forward(x)
    assert_matches(result, expected, x, factor=64 if name == "Softmax" else 8)
    dout = np.ones(x.shape, x.dtype)
    with numpy.errstate(invalid="ignore"):  # NaN in, NaN out
        dx = layer.backward(dout)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    if numpy.isfinite(to_cpu(x)).all():
        assert numpy.isfinite(to_cpu(dx)).all()


@quick
@given(x=inputs(columns=4), data=st.data())
def test_affine_of_any_layout(x, data):
    dtype = data.draw(DTYPES)
    rng = numpy.random.default_rng(data.draw(st.integers(0, 9)))
    W, b = np.asarray(rng.standard_normal((4, 3)), dtype), np.asarray(rng.standard_normal(3), dtype)
    W = data.draw(st.sampled_from([W, np.asfortranarray(W)]))
    layer = nnx.Affine(W, b)
    y = layer.forward(x)
    assert_matches(y, reference(x) @ reference(W) + reference(b), W[..., :0], factor=256)
    dout = np.asarray(rng.standard_normal(y.shape), dtype)
    dx = layer.backward(dout)
    rows, drows = reference(x).reshape(-1, 4), reference(dout).reshape(-1, 3)
    scale = {"rtol": 0.05 if dtype == "float16" else 1e-4, "atol": 0.05 if "float16" in (dtype, x.dtype) else 1e-5}
    numpy.testing.assert_allclose(reference(dx), (drows @ reference(W).T).reshape(x.shape), **scale)
    numpy.testing.assert_allclose(reference(layer.grads[0]), rows.T @ drows, **scale)
    numpy.testing.assert_allclose(reference(layer.grads[1]), drows.sum(axis=0), **scale)


@quick
@given(x=inputs(values=ANY), data=st.data())
def test_softmax_with_loss_of_arbitrary_inputs(x, data):
    rows, classes = x.shape[:-1], x.shape[-1]
    t = data.draw(arrays.arrays("int64", rows, elements=st.integers(0, classes - 1)))
    kind = data.draw(st.sampled_from(["int64", "int32", "uint8", "one-hot", "bool"]))
    labels = t.astype(kind) if kind not in ("one-hot", "bool") else numpy.eye(classes, dtype=int)[t]
    layer = nnx.SoftmaxWithLoss()
    if kind == "bool":
        labels = labels.astype(bool)
    loss = layer.forward(x, labels)
    r = reference(x)
    with numpy.errstate(all="ignore"):
        top = r.max(axis=-1, keepdims=True)
        shifted = numpy.where(r == top, 0, r - top)
        picked = numpy.take_along_axis(shifted, t[..., None], -1)[..., 0]
        expected = (numpy.log(numpy.exp(shifted).sum(axis=-1)) - picked).mean()
    assert (loss.dtype, loss.shape) == (x.dtype, ())
    info = numpy.finfo(to_cpu(x).dtype)
    if abs(expected) < info.max / 8 or not math.isfinite(expected):
        numpy.testing.assert_allclose(float(loss), expected, rtol=64 * info.eps, atol=16 * info.eps)
    dx = layer.backward()
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    one_hot = numpy.eye(classes)[t]
    with numpy.errstate(all="ignore"):
        wanted = (softmax(r) - one_hot) / t.size
    numpy.testing.assert_allclose(reference(dx), wanted, rtol=64 * info.eps, atol=16 * info.eps)


@quick
@given(data=st.data(), classes=st.integers(1, 5), n=st.integers(1, 5))
def test_labels_are_valid_or_rejected(data, classes, n):
    dtype = data.draw(st.sampled_from(["int8", "int32", "int64", "uint8", "bool", "float64"]))
    shape = data.draw(st.sampled_from([(n,), (n, 1), (n, classes), (n + 1,), ()]))
    t = data.draw(arrays.arrays(dtype, shape, elements=arrays.from_dtype(numpy.dtype(dtype), allow_nan=False)))
    right = dtype != "float64" and (
        (shape == (n,) and int(t.min()) >= 0 and int(t.max()) < classes)
        or (
            shape == (n, classes)
            and (t.astype(int) >= 0).all()
            and (numpy.sort(t.astype(int), axis=1) == numpy.sort(numpy.eye(classes, dtype=int)[[0] * n], axis=1)).all()
        )
    )
    layer = nnx.SoftmaxWithLoss()
    scores = numpy.linspace(-1, 1, n * classes).reshape(n, classes)
    if right:
        assert math.isfinite(float(layer.forward(scores, t)))
    else:
        with pytest.raises(ValueError, match="SoftmaxWithLoss"):
            layer.forward(scores, t)


@pytest.mark.parametrize("name", ["MeanSquaredError", "SigmoidWithLoss"])
@quick
@given(x=inputs(values=ORDINARY), data=st.data())
def test_elementwise_losses(name, x, data):
    t = data.draw(arrays.arrays("int64", x.shape, elements=st.integers(0, 1)))
    layer, r = getattr(nnx, name)(), reference(x)
    loss = layer.forward(x, t)
    y = r if name == "MeanSquaredError" else sigmoid(r)
    values = (r - t) ** 2 if name == "MeanSquaredError" else -numpy.log(numpy.where(t == 1, y, 1 - y))
    wanted = (y - t) * (2 if name == "MeanSquaredError" else 1) / t.size
    eps = float(numpy.finfo(to_cpu(x).dtype).eps)
    assert (loss.dtype, loss.shape) == (x.dtype, ())
    numpy.testing.assert_allclose(float(loss), values.mean(), rtol=16 * eps, atol=16 * eps)
    assert_matches(layer.backward(), wanted, x, factor=64)


@quick
@given(
    data=st.data(),
    name=st.sampled_from(["SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW"]),
    value=st.sampled_from([0.0, 1e-20, 1e18, HUGE, math.inf, math.nan]),
)
def test_optimizers_keep_dtype_and_propagate_nonfinite_values(data, name, value):
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    params = [np.zeros((2, 3), dtype), np.zeros(4, dtype)]
    grads = [np.ones((2, 3), dtype), np.full(4, value, dtype)]
    optimizer = getattr(nnx, name)(lr=0.01)
    with numpy.errstate(all="ignore"):
        for _ in range(2):
            optimizer.update(params, grads)
    assert [p.dtype for p in params] == [dtype, dtype]
    assert numpy.isfinite(to_cpu(params[0])).all()
    if math.isnan(value) or (math.isinf(value) and name not in ("AdaGrad", "RMSprop", "Adam", "AdamW")):
        assert not numpy.isfinite(to_cpu(params[1])).any()


@quick
@given(idx=arrays.arrays("int64", arrays.array_shapes(max_dims=2), elements=st.integers(-2, 6)))
def test_embedding_of_arbitrary_indices(idx):
    W = np.asarray(numpy.arange(10.0).reshape(5, 2))
    layer = nnx.Embedding(W)
    if idx.min() < 0 or idx.max() >= 5:
        with pytest.raises(ValueError, match=r"Embedding: idx must be in \[0, 5\)"):
            layer.forward(idx)
        return
    numpy.testing.assert_array_equal(to_cpu(layer.forward(idx)), to_cpu(W)[idx])
    dout = numpy.random.default_rng(0).standard_normal((*idx.shape, 2))
    layer.backward(dout)
    expected = numpy.zeros((5, 2))
    numpy.add.at(expected, idx, dout)
    numpy.testing.assert_allclose(to_cpu(layer.grads[0]), expected, rtol=1e-12, atol=1e-12)
