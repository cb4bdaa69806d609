"""check_layer on every layer; then values by hand, limits and errors of single layers."""

import math

import numpy
import pytest
from cases import CASES, W, X
from kernel_cases import DTYPES, TOLERANCE, assert_same

import nnx
from nnx import layers, np, to_cpu
from nnx.kernels import affine, affine_grad, input_grad
from nnx.layers import Affine, MatMul, MeanSquaredError, ReLU, Repeat, Sigmoid, Softmax, SoftmaxWithLoss, Sum, Tanh
from nnx.testing import check_layer


@pytest.mark.parametrize(
    ("make", "inputs"),
    [pytest.param(*case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)],
)
def test_layer_passes_check_layer(make, inputs):
    check_layer(make, *inputs)


def test_every_public_layer_has_a_case():
    assert set(CASES) == {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}


def test_star_import_brings_the_names_that_the_books_scripts_use():
    names = {}
    exec("from nnx.layers import *", names)
    assert names["np"] is np
    assert names["GPU"] is nnx.GPU
    assert names["softmax"] is nnx.functions.softmax
    assert names["cross_entropy_error"] is nnx.functions.cross_entropy_error


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_a_name_for_checkpoints(name):
    layer = CASES[name][0][0]("float32")
    assert len(getattr(layer, "param_names", ())) >= len(layer.params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_W", ["turned", "columns", "every second"])
@pytest.mark.parametrize("of_x", ["turned", "columns", "every second", "backwards", "broadcast"])
def test_products_of_every_layout(of_x, of_W, dtype):
    def matrix(layout, rows, columns):
        a = np.asarray(numpy.random.default_rng(rows).normal(size=(20, 20)).astype(dtype))
        return {
            "turned": a[:columns, :rows].copy().T,
            "columns": a[:rows, 1 : 1 + columns],
            "every second": a[:rows, : 2 * columns : 2],
            "backwards": a[rows - 1 :: -1, :columns],
            "broadcast": np.broadcast_to(a[0, :columns], (rows, columns)),
        }[layout]

    for N, D, H in ((5, 7, 3), (1, 7, 3), (5, 1, 1), (1, 1, 1), (4, 4, 4)):
        x, W, dout = matrix(of_x, N, D), matrix(of_W, D, H), matrix(of_W, N, H)
        around = np.full((9, 9), 2, dtype)
        dW = around[1 : 1 + D, 1 : 1 + H]
        affine_grad(x, dout, dW, None)
        results = [affine(x, W, None), input_grad(dout, W), dW.copy()]
        x, W, dout = (to_cpu(a).astype("float64") for a in (x, W, dout))
        expected = [np.asarray(a.astype(dtype)) for a in (x @ W, dout @ W.T, x.T @ dout)]
        assert_same(results, expected, TOLERANCE[dtype])
        dW[...] = 2
        assert bool((around == 2).all())


def test_float16_sums_accumulate_in_float32():
    x = np.asarray([1.0] + 4999 * [4e-4], "float16").reshape(-1, 1)
    want = to_cpu(x).astype("float64").sum()
    repeat, table = Repeat(5000), nnx.Embedding(np.ones((2, 1), "float16"))
    repeat.forward(x[:1])
    for rows in (x[:2048], x):  # NumPy treats few rows differently
        table.forward(numpy.ones(len(rows), int))
        table.backward(rows)
        numpy.testing.assert_allclose(to_cpu(table.grads[0]).ravel(), [0, to_cpu(rows).astype("f").sum()], rtol=1e-3)
    for y in (Sum().forward(x), repeat.backward(x)):
        assert y.dtype == np.float16
        numpy.testing.assert_allclose(to_cpu(y), [[want]], rtol=1e-3)
    far = np.zeros((10_000, 1), "float16")
    far[0] = 300
    loss = MeanSquaredError().forward(far, np.zeros_like(far))
    assert loss.dtype == np.float16
    assert float(loss) == 9


@pytest.mark.skipif(nnx.GPU, reason="CuPy has no such errors")
def test_underflow_is_not_an_error():
    with numpy.errstate(all="raise"):
        for x in (numpy.array([[200.0, -200.0, 0.0]], dtype) for dtype in ("float32", "float64")):
            for layer in (Sigmoid(), Softmax()):
                layer.forward(5 * x)
            SoftmaxWithLoss().forward(5 * x, [0])


@pytest.mark.parametrize("name", CASES)
def test_float16_stays_float16(name):
    make, inputs = CASES[name][0]
    layer = make("float16")
    out = layer.forward(*(numpy.asarray(a, "float16" if a.dtype.kind == "f" else a.dtype) for a in inputs))
    grad = layer.backward(np.ones_like(out) if out.ndim else 1)
    assert out.dtype == np.float16
    assert all(g is None or g.dtype == np.float16 for g in (grad if isinstance(grad, tuple) else (grad,)))
    wide = make("float64")
    expected = wide.forward(*inputs)
    numpy.testing.assert_allclose(to_cpu(out), to_cpu(expected), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("layer", [Sigmoid(), ReLU(), Tanh(), Softmax(), Sum()], ids=lambda layer: type(layer).__name__)
def test_weightless_layers_convert_integers_to_floating(layer):
    assert layer.forward([[1, 2], [3, 4]]).dtype == np.float64
    assert layer.forward(numpy.ones((2, 2), numpy.int8)).dtype == np.float32


def test_weights_become_params_and_grads_are_written_in_place():
    W, b = np.ones((2, 3), "float32"), np.zeros(3, "float32")
    layer = Affine(W, b)
    grads = list(layer.grads)
    assert layer.params[0] is W
    assert layer.params[1] is b
    layer.forward(np.ones((4, 2), "float32"))
    layer.backward(np.ones((4, 3), "float32"))
    assert layer.grads[0] is grads[0]
    numpy.testing.assert_array_equal(to_cpu(grads[0]), numpy.full((2, 3), 4))
    numpy.testing.assert_array_equal(to_cpu(grads[1]), [4, 4, 4])


def test_affine_by_hand():
    layer = Affine(nnx.asarray([[1.0, 2.0], [3.0, 4.0]]), nnx.asarray([0.5, -0.5]))
    numpy.testing.assert_array_equal(to_cpu(layer.forward([[1, 1], [2, 0]])), [[4.5, 5.5], [2.5, 3.5]])
    numpy.testing.assert_array_equal(to_cpu(layer.backward([[1, 0], [0, 1]])), [[1, 3], [2, 4]])
    numpy.testing.assert_array_equal(to_cpu(layer.grads[0]), [[1, 2], [1, 0]])
    numpy.testing.assert_array_equal(to_cpu(layer.grads[1]), [1, 1])


def test_layers_cast_their_input_to_the_weights():
    layer = MatMul(nnx.asarray(W, "float32"))
    assert layer.forward(X).dtype == np.float32
    assert layer.backward(numpy.ones((5, 3))).dtype == np.float32


def test_grads_are_c_ordered_for_a_transposed_weight():
    layer = MatMul(nnx.asarray(W, "float32").T)
    assert layer.grads[0].flags.c_contiguous


def test_softmax_with_loss_by_hand():
    layer = SoftmaxWithLoss()
    loss = layer.forward([[0.0, 0.0], [math.log(3), 0.0]], [0, 1])
    assert float(loss) == pytest.approx((math.log(2) + math.log(4)) / 2)
    numpy.testing.assert_allclose(to_cpu(layer.y), [[0.5, 0.5], [0.75, 0.25]])
    numpy.testing.assert_allclose(to_cpu(layer.backward()), [[-0.25, 0.25], [0.375, -0.375]])
    numpy.testing.assert_allclose(to_cpu(layer.backward(2)), [[-0.5, 0.5], [0.75, -0.75]])


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool", "int64"])
def test_softmax_with_loss_accepts_indices_and_one_hot(dtype, rng):
    x, t = rng.standard_normal((6, 2)), rng.integers(0, 2, 6)
    layer = SoftmaxWithLoss()
    expected = float(layer.forward(x, t))
    assert float(layer.forward(x, numpy.eye(2)[t].astype(dtype))) == expected
    numpy.testing.assert_array_equal(to_cpu(layer.t), t)
    assert float(layer.forward(x, t.astype(dtype))) == expected


def test_labels_of_a_single_class_are_indices():
    assert float(SoftmaxWithLoss().forward([[1.0], [2.0]], [0, 0])) == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_softmax_with_loss_is_not_clipped(dtype):
    x = numpy.array([[0, 30], [0, 200], [0, 1000]], dtype)
    assert float(SoftmaxWithLoss().forward(x, [0, 0, 0])) == pytest.approx(410, rel=1e-3)
    assert float(SoftmaxWithLoss().forward(x[1:], [1, 1])) == 0


@pytest.mark.parametrize("classes", [3, 300])
def test_softmax_with_loss_of_infinite_scores_is_the_limit(classes):
    x = numpy.zeros((1, classes), "float32")
    x[0, 1] = numpy.inf
    layer = SoftmaxWithLoss()
    assert float(layer.forward(x, [1])) == 0
    numpy.testing.assert_array_equal(to_cpu(layer.y)[0, :3], [0, 1, 0])
    assert float(layer.forward(x, [0])) == numpy.inf
    assert float(layer.forward(-x, [0])) == pytest.approx(math.log(classes - 1))
    x[0, 0] = numpy.nan
    assert math.isnan(float(layer.forward(x, [1])))


def test_mean_squared_error_by_hand():
    layer = MeanSquaredError()
    assert float(layer.forward([[1.0], [2.0]], [[0.0], [4.0]])) == 2.5
    numpy.testing.assert_array_equal(to_cpu(layer.backward()), [[1], [-2]])


def test_repeat_and_sum_are_the_backward_of_each_other(rng):
    x, dout = rng.standard_normal((1, 8)), rng.standard_normal((7, 8))
    repeat, total = Repeat(7), Sum()
    y = repeat.forward(x)
    assert y.shape == (7, 8)
    numpy.testing.assert_array_equal(to_cpu(y), numpy.repeat(x, 7, axis=0))
    numpy.testing.assert_allclose(to_cpu(repeat.backward(dout)), dout.sum(axis=0, keepdims=True))
    numpy.testing.assert_allclose(to_cpu(total.forward(dout)), to_cpu(repeat.backward(dout)))
    numpy.testing.assert_array_equal(to_cpu(total.backward(x)), to_cpu(y))


def test_relu_backward_masks_infinite_gradients():
    layer = ReLU()
    layer.forward([[-1.0, 1.0]])
    numpy.testing.assert_array_equal(to_cpu(layer.backward([[numpy.inf, 2.0]])), [[0, 2]])


@pytest.mark.parametrize(
    ("W", "b", "error", "words"),
    [
        (np.ones((2, 3), int), np.zeros(3), TypeError, "W must be a .* floating dtype, got .*int64.*nnx.asarray"),
        (np.ones((2, 3)), np.zeros(3, int), TypeError, "b must be a .* floating dtype, got .*int64.*nnx.asarray"),
        ([[1.0, 2.0]], [0.0, 0.0], TypeError, "W must be a .* got list"),
        (None, None, TypeError, "W must be a .* got NoneType"),
        (np.ones((2, 3)), np.zeros(2), ValueError, r"b must be float64 of shape \(3,\).*got float64 \(2,\)"),
        (np.ones((2, 3)), np.zeros(3, "float32"), ValueError, "b must be float64"),
        (np.ones(3), np.zeros(3), ValueError, "W must have two axes"),
    ],
)
def test_affine_rejects_invalid_weights(W, b, error, words):
    with pytest.raises(error, match=f"Affine: {words}"):
        Affine(W, b)


@pytest.mark.skipif(nnx.GPU, reason="CuPy has no other byte order")
def test_non_native_byte_order_of_weights_is_rejected():
    with pytest.raises(TypeError, match=r"Affine: W must be .* got numpy.ndarray of >f4; make it with nnx.asarray"):
        Affine(np.ones((2, 3), ">f4"), np.zeros(3, ">f4"))  # BLAS would not write their gradients


@pytest.mark.skipif(not nnx.GPU, reason="without NNX_GPU=1 host arrays belong to the array module")
def test_host_weights_are_rejected_on_the_gpu():
    with pytest.raises(
        TypeError, match=r"MatMul: W must be a cupy array .* got numpy.ndarray of float64; .*nnx.asarray"
    ):
        MatMul(numpy.ones((2, 2)))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (numpy.ones((5, 3)), ValueError, r"Affine: x must have shape \(N, 4\) to match W \(4, 3\), got \(5, 3\)"),
        (numpy.ones(4), ValueError, r"got \(4,\); make it a row with x\[None\], or"),
        (3.0, ValueError, "x must have shape"),
        ("text", TypeError, "Affine: expected real numbers"),
        (None, TypeError, "Affine: expected real numbers, got NoneType"),
        ([[1, 2], [3]], ValueError, "Affine: expected an array or a list of numbers, got list"),
        (numpy.ones((5, 4), complex), TypeError, "expected real numbers, got complex128"),
    ],
)
def test_affine_rejects_invalid_inputs(x, error, words):
    with pytest.raises(error, match=words):
        CASES["Affine"][0][0]("float64").forward(x)


@pytest.mark.parametrize("name", ["Affine", "Sigmoid", "Softmax", "Sum"])
def test_backward_rejects_a_gradient_that_would_broadcast(name):
    make, inputs = CASES[name][0]
    layer = make("float64")
    layer.forward(*inputs)
    with pytest.raises(ValueError, match=rf"{name}.backward: dout must have the shape of the output .* got \(1, 1\)"):
        layer.backward(numpy.ones((1, 1)))


def test_backward_rejects_a_gradient_of_another_shape_and_equal_size():
    layer = Sigmoid()
    layer.forward(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"dout must have the shape of the output \(2, 3\), got \(3, 2"):
        layer.backward(np.ones((3, 2)))


LABEL_ERRORS = [
    ([0, 1, 3], r"labels must be in \[0, 3\), got 3"),
    ([0, -1, 2], r"labels must be in \[0, 3\), got -1"),
    (numpy.array([0, 1, 256], ">i4"), r"labels must be in \[0, 3\), got 256"),
    ([0.0, 1.0, 2.0], "labels must be integers .* got float64"),
    (numpy.eye(3), "use argmax"),
    ([0, 1], r"integers of shape \(3,\) or one-hot of shape \(3, 3\), got shape \(2,\)"),
    ([[0], [1], [2]], r"got shape \(3, 1\)"),
    (numpy.eye(3, 4, dtype=int), r"got shape \(3, 4\)"),
    (numpy.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]]), "every one-hot row must hold a single 1"),
    (numpy.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]]), "every one-hot row must hold a single 1"),
    (numpy.array([[1, 0, 0], [0, 2, 0], [0, 0, 1]]), "every one-hot row must hold a single 1"),
]


@pytest.mark.parametrize(("t", "words"), LABEL_ERRORS)
def test_softmax_with_loss_rejects_invalid_labels(t, words):
    with pytest.raises(ValueError, match=f"SoftmaxWithLoss: .*{words}"):
        SoftmaxWithLoss().forward(numpy.zeros((3, 3)), t)


@pytest.mark.parametrize("t", ["abc", None])
def test_softmax_with_loss_rejects_non_numeric_labels(t):
    with pytest.raises(TypeError, match="SoftmaxWithLoss: expected real numbers"):
        SoftmaxWithLoss().forward(numpy.zeros((3, 3)), t)


@pytest.mark.skipif(not nnx.GPU, reason="on NumPy a label out of range is an error")
@pytest.mark.parametrize("bad", [-1, 3, 10**6])
def test_a_bad_label_on_the_gpu_gives_nan(bad):
    layer = SoftmaxWithLoss()
    loss = layer.forward(np.zeros((2, 3)), np.asarray([0, bad]))
    assert math.isnan(float(loss))
    numpy.testing.assert_array_equal(numpy.isnan(to_cpu(layer.backward())).any(axis=1), [False, True])


@pytest.mark.parametrize(
    ("layer", "x", "t"),
    [
        (SoftmaxWithLoss(), numpy.zeros((0, 3)), numpy.zeros(0, int)),
        (MeanSquaredError(), numpy.zeros((0, 1)), numpy.zeros((0, 1))),
    ],
)
def test_losses_reject_an_empty_batch(layer, x, t):
    with pytest.raises(ValueError, match="the batch is empty"):
        layer.forward(x, t)


def test_mean_squared_error_rejects_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"MeanSquaredError: t must have the shape .*\(3, 1\), got \(3,\)"):
        MeanSquaredError().forward(numpy.zeros((3, 1)), numpy.zeros(3))


def test_repeat_rejects_more_than_one_row():
    with pytest.raises(ValueError, match="Repeat: axis 0 of x must have length 1"):
        Repeat(3).forward(numpy.zeros((2, 3)))


def test_layers_accept_empty_batches():
    make, _ = CASES["Affine"][0]
    layer = make("float32")
    assert layer.forward(numpy.zeros((0, 4))).shape == (0, 3)
    assert layer.backward(numpy.zeros((0, 3))).shape == (0, 4)
    assert not to_cpu(layer.grads[0]).any()
    assert layer.forward(numpy.zeros((2, 0, 4))).shape == (2, 0, 3)
    assert layer.backward(numpy.zeros((2, 0, 3))).shape == (2, 0, 4)


def test_extra_leading_axes_match_flattened_rows(rng):
    make, _ = CASES["Affine"][0]
    x, dout = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5, 3))
    deep, flat = make("float64"), make("float64")
    numpy.testing.assert_allclose(to_cpu(deep.forward(x)).reshape(10, 3), to_cpu(flat.forward(x.reshape(10, 4))))
    numpy.testing.assert_allclose(
        to_cpu(deep.backward(dout)).reshape(10, 4), to_cpu(flat.backward(dout.reshape(10, 3)))
    )
    numpy.testing.assert_allclose(to_cpu(deep.grads[1]), to_cpu(flat.grads[1]))


def test_float32_products_have_float32_accuracy(rng):
    """TF32, which has an accuracy of three digits, must not be used."""
    x, W = (rng.standard_normal((256, 256)).astype("float32") for _ in range(2))
    y = to_cpu(MatMul(np.asarray(W)).forward(x))
    expected = x.astype("float64") @ W.astype("float64")
    assert abs(y - expected).max() < 1e-5 * abs(expected).max()


def with_mask(a):
    """Return `a` as a masked array that hides its last element."""
    mask = numpy.zeros(numpy.shape(a), bool)
    mask[(-1,) * mask.ndim] = True
    return numpy.ma.array(a, mask=mask)


WEIGHTED = {
    "MatMul": [numpy.ones((2, 3))],
    "Affine": [numpy.ones((2, 3)), numpy.ones(3)],
    "Embedding": [numpy.ones((2, 3))],
    "LayerNorm": [numpy.ones(3), numpy.ones(3)],
    "BatchNorm": [numpy.ones(3), numpy.ones(3)],
}


@pytest.mark.skipif(nnx.GPU, reason="NumPy's subclasses")
@pytest.mark.parametrize("kind", [with_mask, numpy.ma.array, lambda a: numpy.atleast_2d(a).view(numpy.matrix)])
@pytest.mark.parametrize("name", WEIGHTED)
def test_masked_array_and_matrix_weights_are_rejected(name, kind):
    """Masked arrays propagate their mask, and * of numpy.matrix is the matrix product."""
    for i, weight in enumerate(WEIGHTED[name]):
        weights = list(WEIGHTED[name])
        weights[i] = kind(weight)
        with pytest.raises(TypeError, match=rf"{name}: \w+ must be a numpy array .*, got numpy\..*; make it with"):
            getattr(layers, name)(*weights)
    mapped = [numpy.asarray(w).view(numpy.memmap) for w in WEIGHTED[name]]
    assert getattr(layers, name)(*mapped).params[0] is mapped[0]


@pytest.mark.parametrize("name", CASES)
def test_masked_elements_are_rejected(name):
    make, inputs = CASES[name][-1]
    for i in range(len(inputs)):
        given = list(inputs)
        for hidden in (with_mask(inputs[i]), [*inputs[i][:-1], with_mask(inputs[i][-1])]):
            given[i] = hidden
            with pytest.raises(TypeError, match=rf"{name}.*: expected an array without a mask; .*filled"):
                make("float64").forward(*given)
        given[i] = numpy.ma.array(inputs[i])  # with no masked elements
    layer = make("float64")
    out = layer.forward(*given)
    assert type(out) is type(make("float64").forward(*inputs))
    with pytest.raises(TypeError, match=f"{name}.*: expected an array without a mask"):
        layer.backward(with_mask(numpy.ones(out.shape)) if out.ndim else numpy.ma.masked)
