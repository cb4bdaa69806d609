"""Dropout, Embedding, normalization, GELU and SigmoidWithLoss: values, limits, modes, errors."""

import math

import numpy
import pytest

import nnx
from nnx import BatchNorm, Dropout, Embedding, LayerNorm, Sequential, SigmoidWithLoss, np, to_cpu
from nnx.kernels import dropout


def ones_and_zeros(n, dtype="float64"):
    return np.ones(n, dtype), np.zeros(n, dtype)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_dropout_drops_the_given_ratio(ratio):
    layer = Dropout(ratio, rng=0)
    y = to_cpu(layer.forward(numpy.ones((200, 500), "float32")))
    assert set(numpy.unique(y)) <= {0, 1}
    assert (y == 0).mean() == pytest.approx(ratio, abs=0.005)
    numpy.testing.assert_array_equal(to_cpu(layer.mask), y)
    numpy.testing.assert_array_equal(to_cpu(layer.backward(numpy.full(y.shape, 3, "float32"))), 3 * y)
    assert layer.mask.dtype == np.float32


def test_dropout_scales_in_prediction_as_in_the_book():
    layer = Dropout(0.25, rng=0)
    assert float(Sequential([layer]).predict([[2.0]])[0, 0]) == 1.5
    assert layer.calls == 0
    layer.forward([[2.0]], train_flg=False)
    assert float(layer.backward([[1.0]])[0, 0]) == 0.75


def test_dropout_masks_are_identical_on_all_platforms():
    """The first mask for seed 12345 on NumPy: changing the hash would change the results of resumed runs."""
    kept = to_cpu(dropout(np.ones(32, "float32"), 0.5, 12345, 1))
    assert "".join(str(int(k)) for k in kept) == "00100110011100010101001000110100"


def test_dropout_masks_of_two_calls_are_independent():
    layer = Dropout(0.5, rng=3)
    x = numpy.ones((300, 300))
    first, second = to_cpu(layer.forward(x)), to_cpu(layer.forward(x))
    assert (first * second).mean() == pytest.approx(0.25, abs=0.01)
    other = to_cpu(Dropout(0.5, rng=4).forward(x))
    assert (first * other).mean() == pytest.approx(0.25, abs=0.01)
    assert (first[1:] * first[:-1]).mean() == pytest.approx(0.25, abs=0.01)
    assert (first[:, 1:] * first[:, :-1]).mean() == pytest.approx(0.25, abs=0.01)


def test_dropout_drops_infinity_too():
    assert not numpy.isnan(to_cpu(Dropout(0.5, rng=0).forward(numpy.full(50, numpy.inf)))).any()


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan])
def test_dropout_rejects_invalid_ratios(ratio):
    with pytest.raises(ValueError, match=r"Dropout: dropout_ratio must be in \[0, 1\)"):
        Dropout(ratio)


def test_embedding_sums_the_gradients_of_a_repeated_index(rng):
    W = np.asarray(rng.standard_normal((5, 2)))
    layer = Embedding(W)
    numpy.testing.assert_array_equal(to_cpu(layer.forward([[1, 3], [1, 1]])), to_cpu(W)[[[1, 3], [1, 1]]])
    assert layer.backward(numpy.ones((2, 2, 2))) is None
    numpy.testing.assert_array_equal(to_cpu(layer.grads[0])[:, 0], [0, 3, 0, 1, 0])
    layer.forward(numpy.zeros(0, int))
    layer.backward(numpy.zeros((0, 2)))
    assert not to_cpu(layer.grads[0]).any()


def test_embedding_of_a_column_of_indices_runs_natively(rng):
    W, contexts = nnx.asarray(rng.standard_normal((5, 3))), numpy.array([[1, 0], [4, 2], [1, 3]])
    layer = nnx.Embedding(W)
    numpy.testing.assert_array_equal(to_cpu(layer.forward(contexts[:, 1])), to_cpu(W)[[0, 2, 3]])
    assert layer.idx.flags.c_contiguous
    assert layer.forward(numpy.array(4)).shape == (3,)


@pytest.mark.parametrize(
    "idx", [[0, 5], [-1], numpy.array([255], "uint8"), numpy.array([1, 256], ">i8"), [0.5], "a", [[0], [1, 2]]]
)
def test_embedding_rejects_invalid_indices(idx):
    with pytest.raises((ValueError, TypeError), match="Embedding: "):
        Embedding(np.zeros((5, 2))).forward(idx)


@pytest.mark.skipif(not nnx.GPU, reason="on NumPy an index out of range is an error")
def test_a_bad_index_on_the_gpu_gives_nan():
    y = to_cpu(Embedding(np.zeros((5, 2))).forward(np.asarray([0, 5, -1])))
    numpy.testing.assert_array_equal(numpy.isnan(y).all(axis=1), [False, True, True])


@pytest.mark.parametrize(("layer", "axis"), [(LayerNorm, -1), (BatchNorm, 0)])
def test_normalization_gives_mean_0_and_variance_1(layer, axis, rng):
    y = to_cpu(layer(*ones_and_zeros(8)).forward(5 + 3 * rng.standard_normal((64, 8))))
    numpy.testing.assert_allclose(y.mean(axis=axis), 0, atol=1e-12)
    numpy.testing.assert_allclose(y.var(axis=axis), 1, rtol=1e-4)


def test_batch_norm_keeps_running_statistics_for_predicting(rng):
    layer = BatchNorm(*ones_and_zeros(2), momentum=0.5)
    x = rng.standard_normal((1000, 2)) * [1, 3] + [5, -5]
    for _ in range(20):
        layer.forward(x)
    numpy.testing.assert_allclose(to_cpu(layer.running_mean), x.mean(axis=0), rtol=1e-4)
    numpy.testing.assert_allclose(to_cpu(layer.running_var), x.var(axis=0, ddof=1), rtol=1e-4)
    before = to_cpu(layer.running_mean).copy()
    y = Sequential([layer]).predict(x[:1])
    numpy.testing.assert_allclose(to_cpu(y), (x[:1] - x.mean(axis=0)) / x.std(axis=0), rtol=1e-2)
    numpy.testing.assert_array_equal(to_cpu(layer.running_mean), before)


def test_batch_norm_backward_after_prediction_is_a_scale(rng):
    layer = BatchNorm(np.full(2, 3.0), np.zeros(2))
    layer.forward(rng.standard_normal((4, 2)), train_flg=False)
    numpy.testing.assert_allclose(to_cpu(layer.backward(numpy.ones((4, 2)))), 3, rtol=1e-4)


def test_batch_norm_rejects_an_empty_batch():
    layer = BatchNorm(*ones_and_zeros(2))
    with pytest.raises(ValueError, match="BatchNorm: the batch is empty"):
        layer.forward(numpy.zeros((0, 2)))
    assert not to_cpu(layer.running_mean).any()
    assert layer.forward(numpy.zeros((0, 2)), train_flg=False).shape == (0, 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 1, 2)])
def test_batch_norm_updates_only_the_mean_from_one_row(shape, dtype):
    layer = BatchNorm(*ones_and_zeros(2, dtype), momentum=0.5)
    x = numpy.array([5.0, -6.0], dtype).reshape(shape)
    with pytest.warns(RuntimeWarning, match="BatchNorm: a batch of one row has no variance, so running_var is not"):
        y = layer.forward(x)
    assert not to_cpu(y).any()
    assert not to_cpu(layer.backward(x)).any()
    y = layer.forward(x)  # warns once
    assert y.shape == shape
    assert to_cpu(layer.running_var).tolist() == [1, 1]
    assert to_cpu(layer.running_mean).tolist() == [3.75, -4.5]
    numpy.testing.assert_allclose(to_cpu(layer.forward(x, train_flg=False)).ravel(), [1.25, -1.5], rtol=2e-3)
    with pytest.warns(RuntimeWarning, match="one row"):  # for another layer
        BatchNorm(*ones_and_zeros(2, dtype)).forward(x)


def test_predicting_one_row_gives_no_warning(rng):
    layer = BatchNorm(*ones_and_zeros(2))
    Sequential([layer]).predict([[1.0, 2.0]])
    layer.forward([[1.0, 2.0]], train_flg=False)
    layer.forward(rng.standard_normal((1, 2, 2)))  # two rows
    with pytest.raises(RuntimeWarning, match="one row"):  # warnings are errors here, and this is the first one
        layer.forward([[1.0, 2.0]])
    before = to_cpu(layer.running_mean).tolist()
    with pytest.raises(RuntimeWarning, match="one row"):
        layer.forward([[1.0, 2.0]])
    assert to_cpu(layer.running_mean).tolist() == before


@pytest.mark.parametrize("layer", [LayerNorm, BatchNorm])
def test_normalization_rejects_invalid_inputs(layer):
    with pytest.raises(ValueError, match=f"{layer.__name__}: gamma and beta must have one axis"):
        layer(np.ones(3), np.zeros(2))
    with pytest.raises(TypeError, match=f"{layer.__name__}: gamma must be a"):
        layer(np.ones(3, int), np.zeros(3))
    with pytest.raises(ValueError, match=rf"{layer.__name__}: x must have shape \(N, 3\), got \(2, 4\)"):
        layer(*ones_and_zeros(3)).forward(numpy.zeros((2, 4)))


def test_gelu_by_hand_and_in_the_tails():
    for dtype, rtol in (("float16", 2e-3), ("float32", 1e-5), ("float64", 1e-12)):
        x = numpy.array([-math.inf, -60000, -1, 0, 1, 60000, math.inf], dtype)
        y = to_cpu(nnx.GELU().forward(x))
        u = math.sqrt(2 / math.pi) * 1.044715
        inner = [-0.5 * (1 - math.tanh(u)), 0, 0.5 * (1 + math.tanh(u))]
        numpy.testing.assert_allclose(y, [0, 0, *inner, 60000, math.inf], rtol=rtol)
        layer = nnx.GELU()
        layer.forward(x)
        numpy.testing.assert_array_equal(to_cpu(layer.backward(numpy.ones(7, dtype)))[[0, 1, 5, 6]], [0, 0, 1, 1])


def test_sigmoid_with_loss_by_hand():
    layer = SigmoidWithLoss()
    loss = layer.forward([math.log(3), 0.0], [1, 0])
    assert float(loss) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    numpy.testing.assert_allclose(to_cpu(layer.backward()), [-0.125, 0.25])
    assert float(layer.accuracy()) == 0.5


def test_sigmoid_with_loss_in_the_tails():
    layer = SigmoidWithLoss()
    assert float(layer.forward([1000.0, -1000.0, math.inf, -math.inf], [1, 0, 1, 0])) == 0
    assert float(layer.forward([-1000.0], [1])) == 1000
    assert float(layer.forward([math.inf], [0])) == math.inf


@pytest.mark.skipif(not nnx.GPU, reason="on NumPy a label out of range is an error")
def test_invalid_binary_labels_give_nan_on_the_gpu():
    layer = SigmoidWithLoss()
    assert math.isnan(float(layer.forward(np.zeros(3), np.asarray([0, 1, 2]))))
    numpy.testing.assert_array_equal(numpy.isnan(to_cpu(layer.backward())), [False, False, True])


@pytest.mark.parametrize(
    ("t", "words"),
    [
        ([[0], [1]], r"t must have the shape of x \(2,\), got \(2, 1\)"),
        ([0, 2], r"labels must be in \[0, 2\), got 2"),
        ([0, -1], r"labels must be in \[0, 2\), got -1"),
        ([0.0, 1.0], "labels must be integers"),
    ],
)
def test_sigmoid_with_loss_rejects_invalid_labels(t, words):
    with pytest.raises(ValueError, match=f"SigmoidWithLoss: {words}"):
        SigmoidWithLoss().forward(numpy.zeros(2), t)


def test_dropout_with_a_numpy_scalar_ratio_keeps_the_dtype():
    x, layer = np.ones((2, 3), "float32"), Dropout(numpy.float64(0.5))
    assert layer.forward(x, train_flg=False).dtype == np.float32
    assert layer.backward(x).dtype == np.float32


def test_sigmoid_with_loss_accuracy():
    loss = SigmoidWithLoss()
    loss.forward(np.asarray([-2.0, -0.1, 0.1, 2.0]), np.asarray([0, 1, 1, 1]))
    assert float(loss.accuracy()) == 0.75


def test_normalization_of_many_float16_rows_does_not_saturate():
    layer = LayerNorm(*ones_and_zeros(2, "float16"))
    layer.forward(numpy.zeros((5000, 2)))
    layer.backward(numpy.ones((5000, 2)))
    numpy.testing.assert_array_equal(to_cpu(layer.grads[1]), [5000, 5000])


@pytest.mark.parametrize("layer", [BatchNorm, LayerNorm])
def test_normalization_when_the_variance_overflows_float16(rng, layer):
    x = (2000 * rng.standard_normal((20, 4))).astype("float16")
    results = []
    for dtype in ("float16", "float32"):
        made = layer(*ones_and_zeros(4, dtype))
        results.append([made.forward(x.astype(dtype))])
        if layer is BatchNorm:
            results[-1].append(made.forward(x.astype(dtype), train_flg=False))
    for half, single in zip(*results, strict=True):
        assert half.dtype == np.float16
        numpy.testing.assert_allclose(to_cpu(half), to_cpu(single), rtol=4e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [nnx.Sigmoid, nnx.ReLU, nnx.Tanh, nnx.GELU, lambda: nnx.Dropout(0.5, rng=0)])
@pytest.mark.parametrize("x", [0.5, 2, numpy.float32(0.5), numpy.array(-0.5)])
def test_elementwise_layers_take_one_number(kind, x):
    layer, row = kind(), kind()
    out = layer.forward(x)
    assert isinstance(out, np.ndarray)
    assert out.shape == layer.backward(x).shape == ()
    assert float(out) == pytest.approx(float(row.forward(numpy.asarray(x)[None])[0]), rel=1e-6)
    assert float(layer.backward(1)) == pytest.approx(float(row.backward(numpy.ones(1))[0]), rel=1e-6)


def test_layers_without_features_give_no_columns():
    x = np.zeros((4, 2, 0))
    assert nnx.Affine(np.zeros((0, 3)), np.ones(3)).forward(x).shape == (4, 2, 3)
    embedding = nnx.Embedding(np.zeros((2, 0)))
    assert embedding.forward([0, 1]).shape == (2, 0)
    embedding.backward(np.zeros((2, 0)))
    model = nnx.Sequential([nnx.Affine(np.zeros((0, 3)), np.zeros(3))], nnx.SoftmaxWithLoss())
    nnx.Trainer(model, nnx.SGD(0.1), rng=0).fit(numpy.zeros((40, 0)), numpy.arange(40) % 3, 1, 4, verbose=False)
    for kind in (nnx.LayerNorm, nnx.BatchNorm):
        with pytest.raises(ValueError, match="gamma and beta must have one axis, of one or more features"):
            kind(np.zeros(0), np.zeros(0))


def test_wrong_number_of_columns_is_reported_for_all_rows():
    model = nnx.TwoLayerNet(64, 4, 3)
    with pytest.raises(ValueError, match=r"Affine: x must have shape \(N, 64\) to match W \(64, 4\), got \(285, 10\)"):
        nnx.Trainer(model, nnx.SGD(0.1)).fit(numpy.zeros((285, 10)), numpy.zeros(285, int))
