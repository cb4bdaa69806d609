"""Losses: weights compared with PyTorch and by hand, the gradient dout, accuracy, errors."""

import copy
import decimal
import math
import pickle

import numpy
import pytest

import nnx
from nnx import MeanSquaredError, Sequential, SigmoidWithLoss, SoftmaxWithLoss, np, to_cpu

DTYPES = ["float16", "float32", "float64"]
ROWS = numpy.array([0.5, 0, 2, 1, 0.25, 3])
INF, NAN = math.inf, math.nan


def run(layer, *arguments, dout=1):
    """Return loss and gradient on the host."""
    loss = layer.forward(*arguments)
    return float(loss), to_cpu(layer.backward(dout))


def problem(rng, loss, axes=2):
    """Return scores and targets for a loss, 6 rows and 4 columns: labels 0 to 3, binary labels, or real numbers."""
    shape = (6, 4) if axes == 2 else (6, 3, 4)
    x = 3 * rng.standard_normal(shape)
    if loss is SoftmaxWithLoss:
        return x, rng.integers(0, 4, shape[:-1])
    return x, rng.integers(0, 2, shape) if loss is SigmoidWithLoss else rng.standard_normal(shape)


# ---- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, "rows", "elements"])
@pytest.mark.parametrize("ignore_label", [None, 0, 1, -100])
@pytest.mark.parametrize("class_weight", [None, [1, 0.5, 2, 3]])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss])
def test_weighted_mean_matches_pytorch(rng, loss, axes, class_weight, ignore_label, weight):
    torch = pytest.importorskip("torch")
    x, t = problem(rng, loss, axes)
    if ignore_label == -100:
        t[rng.integers(0, 4, t.shape) == 0] = -100
    class_weight = class_weight and class_weight[: 4 if loss is SoftmaxWithLoss else 2]
    weight = weight and (ROWS if weight == "rows" else rng.uniform(0, 2, t.shape))

    score = torch.tensor(x, requires_grad=True)
    kept = torch.tensor(t != ignore_label)
    labels = torch.where(kept, torch.tensor(t), 0)
    if loss is SoftmaxWithLoss:
        losses = torch.nn.functional.cross_entropy(score.movedim(-1, 1), labels, reduction="none")
    else:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(score, labels.double(), reduction="none")
    weights = kept * (torch.tensor(class_weight, dtype=torch.float64)[labels] if class_weight else 1.0)
    if weight is not None:
        weights = weights * torch.tensor(weight).reshape(weight.shape + (1,) * (t.ndim - weight.ndim))
    expected = (losses * weights).sum() / weights.sum()
    if loss is SoftmaxWithLoss and weight is None:  # PyTorch's own weighted mean
        options = {"weight": torch.tensor(class_weight, dtype=torch.float64)} if class_weight else {}
        index = -100 if ignore_label is None else ignore_label
        own = torch.nn.functional.cross_entropy(score.movedim(-1, 1), torch.tensor(t), ignore_index=index, **options)
        assert own.item() == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()

    value, gradient = run(loss(class_weight, ignore_label), x, t, weight)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    numpy.testing.assert_allclose(gradient, score.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss, MeanSquaredError])
def test_integer_weights_match_repeated_rows(rng, loss, axes):
    """Weights of any layout, dtype and scale; they are relative."""
    x, t = problem(rng, loss, axes)
    counts = numpy.array([2, 0, 1, 3, 0, 1])
    times = numpy.repeat(numpy.arange(6), counts)
    value, gradient = run(loss(), x[times], t[times])
    expected = numpy.zeros_like(x)
    numpy.add.at(expected, times, gradient)
    for weight in (counts, counts.tolist(), counts.astype("f"), np.asarray(counts), counts * 1e-300, counts * 1e300):
        for layout in (numpy.ascontiguousarray, numpy.asfortranarray, lambda a: numpy.repeat(a, 2, axis=0)[::2]):
            loss_of_weights, gradient = run(loss(), layout(x), layout(t), weight)
            assert loss_of_weights == pytest.approx(value, rel=1e-12)
            numpy.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)
    by_bools = run(loss(), x, t, counts > 0)
    numpy.testing.assert_allclose(by_bools[0], run(loss(), x[counts > 0], t[counts > 0])[0], rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss, MeanSquaredError])
def test_weights_keep_the_dtype_of_the_scores(rng, loss, dtype):
    x, t = problem(rng, loss)
    layer, plain = loss(), loss()
    for weight in (ROWS, np.asarray(ROWS, "float32"), [1, 0, 1, 2, 1, 0]):
        value, gradient = layer.forward(x.astype(dtype), t, weight), layer.backward(numpy.float64(2))
        assert value.dtype == gradient.dtype == dtype
    ones = numpy.full(6, 7.0)
    rtol = 4 * float(numpy.finfo(dtype).eps)
    for a, b in zip(run(layer, x.astype(dtype), t, ones), run(plain, x.astype(dtype), t), strict=True):
        numpy.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss, MeanSquaredError])
def test_ignored_rows_may_contain_any_values(rng, loss, bad):
    x, t = (a.astype("float32") if a.dtype.kind == "f" else a for a in problem(rng, loss))
    out, rest = numpy.array([1, 4]), numpy.array([0, 2, 3, 5])
    expected = run(loss(), x[rest], t[rest])
    weight = numpy.isin(numpy.arange(6), rest)
    x[out] = bad
    x[4, 1:] = 0
    results = [run(loss(), x, t if loss is not MeanSquaredError else numpy.where(x == bad, -bad, t), weight)]
    if loss is MeanSquaredError:
        results.append(run(loss(), x, numpy.where(x == bad, bad, t), weight))
    else:
        t[out] = 9
        results.append(run(loss(ignore_label=9), x, t))
    for value, gradient in results:
        assert value == pytest.approx(expected[0], rel=1e-6)
        numpy.testing.assert_allclose(gradient[rest], expected[1], rtol=1e-5)
        assert not gradient[out].any()


@pytest.mark.parametrize(
    ("layer", "t", "weight"),
    [
        (SoftmaxWithLoss(ignore_label=7), numpy.full(6, 7), None),
        (SoftmaxWithLoss([0, 0, 1, 1]), numpy.arange(6) % 2, None),
        (SoftmaxWithLoss(), numpy.arange(6) % 4, numpy.zeros(6)),
        (SigmoidWithLoss(ignore_label=-1), numpy.full((6, 4), -1), ROWS),
        (SigmoidWithLoss([1, 0]), numpy.ones((6, 4), bool), None),
        (MeanSquaredError(), numpy.ones((6, 4)), numpy.zeros((6, 4), int)),
    ],
)
def test_zero_weights_give_zero_loss_and_gradient(rng, layer, t, weight):
    x = rng.standard_normal((6, 4))
    x[0, 0] = NAN
    value, gradient = run(layer, x, t, weight)
    assert value == 0
    assert not gradient.any()
    assert float(layer.accuracy()) == 0 if getattr(layer, "kept", None) is not None else True


@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss])
def test_ignored_labels_do_not_affect_loss_or_accuracy(rng, loss):
    x, t = problem(rng, loss)
    t[[0, 1, 4]] = -1  # with batches of two rows, one batch is ignored entirely
    model = Sequential([], loss([1, 3, 2, 0.5][: 4 if loss is SoftmaxWithLoss else 2], ignore_label=-1))
    expected = Sequential([], loss(model.loss_layer.class_weight)).evaluate(x[[2, 3, 5]], t[[2, 3, 5]])
    for batch_size in (1, 2, 4, 6, 100):
        numpy.testing.assert_allclose(model.evaluate(x, t, batch_size), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"Sequential.evaluate: all labels are ignored"):
        model.evaluate(x, numpy.full_like(t, -1))


@pytest.mark.parametrize("kind", ["uint8", "int8", "int64", ">i2", "one-hot"])
@pytest.mark.parametrize("ignore_label", [1, numpy.int64(1), 200, -1])
def test_ignore_label_of_any_integer_dtype(rng, kind, ignore_label):
    x, t = problem(rng, SoftmaxWithLoss)
    t[:2] = 1
    t = numpy.eye(4, dtype=bool)[t] if kind == "one-hot" else t.astype(kind)
    layer = SoftmaxWithLoss(ignore_label=ignore_label)
    rows = numpy.flatnonzero(to_cpu(SoftmaxWithLoss().prepare_targets(t, x.shape)) != ignore_label)
    value, _ = run(layer, x, t)
    assert value == pytest.approx(run(SoftmaxWithLoss(), x[rows], t[rows])[0], rel=1e-12)
    assert to_cpu(layer.kept).sum() == len(rows)


def test_weights_of_the_previous_forward_are_not_reused(rng):
    x, t = problem(rng, SoftmaxWithLoss)
    layer, plain = SoftmaxWithLoss(ignore_label=0), SoftmaxWithLoss()
    layer.forward(x, t, ROWS)
    layer.ignore_label = None
    for a, b in zip(run(layer, x[:3], t[:3]), run(plain, x[:3], t[:3]), strict=True):
        numpy.testing.assert_array_equal(a, b)
    assert float(layer.accuracy()) == float(plain.accuracy())


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_the_weights(rng, twin):
    x, t = problem(rng, SoftmaxWithLoss)
    layer = SoftmaxWithLoss(numpy.array([1, 2, 0, 4]), 3)
    for a, b in zip(run(twin(layer), x, t), run(layer, x, t), strict=True):
        numpy.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        ([1.0] * 5, ValueError, r"weight must have the leading axes of t \(6,\), .* got shape \(5,\)"),
        (numpy.ones((6, 1)), ValueError, r".*got shape \(6, 1\)"),
        (2.0, ValueError, r".*got shape \(\)"),
        ([1, 1, 1, 1, 1, -1e-9], ValueError, "weight must hold finite numbers of at least 0"),
        ([1, 1, 1, 1, 1, NAN], ValueError, "weight must hold finite numbers of at least 0"),
        ([1, 1, 1, 1, 1, INF], ValueError, "weight must hold finite numbers of at least 0"),
        ([1, 1, 1, 1, 1, None], TypeError, "weight: expected real numbers"),
        ("balanced", TypeError, "weight: expected real numbers"),
        (numpy.ones(6, complex), TypeError, "weight: expected real numbers"),
        (numpy.ma.array(numpy.ones(6), mask=[0, 0, 1, 0, 0, 0]), TypeError, "weight: expected an array without a mask"),
    ],
)
def test_weights_of_rows_are_checked(rng, weight, error, words):
    x, t = problem(rng, SoftmaxWithLoss)
    with pytest.raises(error, match=f"SoftmaxWithLoss: {words}"):
        SoftmaxWithLoss().forward(x, t, weight)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"class_weight": 2.0}, ValueError, r"class_weight must have one number per class, got shape \(\)"),
        ({"class_weight": numpy.ones((4, 1))}, ValueError, r"class_weight must have one number per class"),
        ({"class_weight": [1, 1, 1, -1]}, ValueError, "class_weight must hold finite numbers of at least 0"),
        ({"class_weight": [1, 1, 1, NAN]}, ValueError, "class_weight must hold finite numbers of at least 0"),
        ({"class_weight": [1, 1, 1, None]}, TypeError, "class_weight: expected real numbers"),
        ({"class_weight": "balanced"}, TypeError, "class_weight: expected real numbers"),
        ({"class_weight": {0: 1.0}}, TypeError, "class_weight: expected real numbers"),
        ({"ignore_label": 1.0}, TypeError, "ignore_label must be an integer or None, got 1.0"),
        ({"ignore_label": "1"}, TypeError, "ignore_label must be an integer or None, got '1'"),
        ({"ignore_label": [1, 2]}, TypeError, "ignore_label must be an integer or None"),
    ],
)
@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss])
def test_settings_are_checked(loss, settings, error, words):
    with pytest.raises(error, match=f"{loss.__name__}: {words}"):
        loss(**settings)


@pytest.mark.parametrize(("loss", "classes"), [(SoftmaxWithLoss, 4), (SigmoidWithLoss, 2)])
def test_class_weight_needs_one_weight_per_class(rng, loss, classes):
    for wrong in (classes - 1, classes + 1):
        with pytest.raises(ValueError, match=f"must have one number for each of the {classes} classes, got"):
            loss(numpy.ones(wrong)).forward(*problem(rng, loss))


def test_training_with_ignored_labels(rng):
    """The result equals that without these rows for the same batches."""
    x, t = rng.standard_normal((40, 2)).astype("f"), rng.integers(0, 3, 40)
    more, labels = numpy.concatenate([x, x + 5]), numpy.concatenate([t, numpy.full(40, -1)])
    models = []
    for rows in ((x, t), (more, labels)):
        model = nnx.TwoLayerNet(2, 5, 3, rng=0)
        model.loss_layer = SoftmaxWithLoss([1, 2, 0.5], ignore_label=-1)
        trainer = nnx.Trainer(model, nnx.SGD(0.5), rng=0)
        trainer.fit(*rows, 5, len(rows[0]), validation=rows, verbose=False)
        models.append((model, trainer.val_list))
    for p, q in zip(models[0][0].params, models[1][0].params, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), to_cpu(q), rtol=1e-5, atol=1e-7)
    numpy.testing.assert_allclose(models[0][1], models[1][1], rtol=1e-6)


# ---- the gradient of the loss -----------------------------------------------------------------------


LOSSES = [(SoftmaxWithLoss, [0, 2]), (SigmoidWithLoss, [[0, 1, 1], [1, 0, 0]]), (MeanSquaredError, numpy.ones((2, 3)))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [None, [1, 3]])
@pytest.mark.parametrize(("loss", "t"), LOSSES)
def test_dout_may_be_any_scalar(loss, t, weight, dtype):
    layer = loss()
    layer.forward(numpy.array([[0.5, -1, 2], [0, 1, -1]], dtype), t, weight)
    plain = to_cpu(layer.backward())
    rtol = 4 * float(numpy.finfo(dtype).eps)
    numbers = [2, 0.5, True, numpy.uint8(200), numpy.int8(-100), numpy.True_, numpy.float16(0.1), numpy.float64(1e-3)]
    numbers += [np.asarray(0.25), numpy.array(3, "uint8"), np.asarray(2.0, "float16"), numpy.longdouble(2), -0.0]
    for dout in numbers:
        gradient = to_cpu(layer.backward(dout))
        assert gradient.dtype == dtype
        expected = plain.astype("float64") * float(dout)
        numpy.testing.assert_allclose(gradient, expected, rtol=rtol, atol=1e-6 if dtype == "float16" else 1e-12)


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("loss", [SoftmaxWithLoss, SigmoidWithLoss, MeanSquaredError])
def test_scaled_float16_loss_does_not_overflow_or_round_twice(loss, rows):
    for weight in (None, numpy.ones(rows)):
        gradients = []
        for dtype in ("float16", "float64"):
            layer = loss()
            x = numpy.full((rows, 2), 0.125, dtype)
            layer.forward(x, numpy.zeros(rows if loss is SoftmaxWithLoss else (rows, 2), int), weight)
            gradients += [to_cpu(layer.backward(dout)) for dout in (1.3e5, np.asarray(1.3e5))]
        for half in gradients[:2]:
            numpy.testing.assert_allclose(half, gradients[2], rtol=1e-3)  # y itself is rounded


@pytest.mark.parametrize(
    ("dout", "error", "words"),
    [
        (numpy.ones(1), ValueError, r"dout must be one number, the gradient of the loss, got shape \(1,\)"),
        (np.ones((1, 1)), ValueError, r".*got shape \(1, 1\)"),
        ([1.0], ValueError, r".*got shape \(1,\)"),
        (numpy.ones((2, 3)), ValueError, r".*got shape \(2, 3\)"),
        (numpy.zeros(0), ValueError, r".*got shape \(0,\)"),
        (None, TypeError, "dout: expected real numbers, got NoneType"),
        ("1", TypeError, "dout: expected real numbers"),
        (1j, TypeError, "dout: expected real numbers, got complex"),
        (numpy.complex64(1), TypeError, "dout: expected real numbers, got complex64"),
        (decimal.Decimal(1), TypeError, "dout: expected real numbers, got decimal.Decimal"),
        (numpy.ma.masked, TypeError, "dout: expected an array without a mask"),
    ],
)
@pytest.mark.parametrize(("loss", "t"), LOSSES)
def test_dout_of_a_loss_must_be_a_scalar(loss, t, dout, error, words):
    layer = loss()
    layer.forward(numpy.ones((2, 3)), t)
    with pytest.raises(error, match=rf"{loss.__name__}.backward: {words}"):
        layer.backward(dout)


# ---- accuracy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "small"), [("float16", 1e-7), ("float32", 1e-8), ("float64", 1e-20)])
def test_accuracy_compares_scores(rng, dtype, small):
    """Probabilities of nearly equal scores may round to the same number."""
    assert Sequential([], SoftmaxWithLoss()).evaluate(numpy.array([[0, small]], dtype), [1])[1] == 1
    scores = (numpy.argsort(rng.uniform(size=(2000, 10)), axis=1) * small).astype(dtype)
    labels = scores.argmax(axis=1)
    for t in (labels, numpy.eye(10, dtype=int)[labels]):
        assert Sequential([], SoftmaxWithLoss()).evaluate(scores, t, 300)[1] == 1
    bits = scores - scores.dtype.type(5 * small)
    assert Sequential([], SigmoidWithLoss()).evaluate(bits, bits >= 0, 300)[1] == 1
    assert Sequential([], SigmoidWithLoss()).evaluate(numpy.array([-small, 0, small], dtype), [0, 1, 1])[1] == 1
