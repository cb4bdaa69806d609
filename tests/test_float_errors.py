"""With numpy.seterr(all="raise"), correct results that underflow or reach their limits raise nothing."""

import math

import numpy
import pytest
from cases import CASES
from test_optimizer import OPTIMIZERS

import nnx
from nnx import Sequential, Trainer, np, to_cpu
from nnx.functions import cross_entropy_error, relu, sigmoid, softmax

pytestmark = pytest.mark.skipif(nnx.GPU, reason="CuPy has no floating-point errors")
TINY = {"float16": 6e-8, "float32": 1e-45, "float64": 5e-324}
ALL_CASES = [pytest.param(*case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def _all_raise(_strict_floats):
    with numpy.errstate(all="raise"):
        yield


@numpy.errstate(under="ignore")
def scaled(a, factor):
    """Return `a` times `factor` unless it has an integer dtype."""
    return a * factor if a.dtype.kind == "f" else a


@pytest.mark.parametrize("scale", [1e-30, 1e-300, "tiny", 1e-6, 100])
@pytest.mark.parametrize(("make", "inputs"), ALL_CASES)
def test_layers_ignore_underflow(make, inputs, scale, rng):
    """Float64 inputs are rounded by float32 and float16 layers."""
    for dtype, tiny in TINY.items():
        if scale == "tiny" or scale >= tiny:
            factor = tiny if scale == "tiny" else scale
            arrays = [scaled(a, factor if i == 0 else min(1, factor)) for i, a in enumerate(inputs)]
            layer, results = make(dtype), []
            out = layer.forward(*arrays)
            shape = getattr(out, "shape", ())
            for dout in (rng.standard_normal(shape), scaled(numpy.asarray(rng.standard_normal(shape)), factor)):
                dinputs = layer.backward(dout if shape else float(dout))
                results += [*(dinputs if isinstance(dinputs, tuple) else [dinputs]), *layer.grads]
            if shape and len(arrays) == 1:
                results.append(Sequential([layer]).predict(*arrays))
            elif not shape:
                model = Sequential([], layer)
                results.append(model.evaluate(*arrays[:2])[0] if len(arrays) == 2 else out)
            if isinstance(layer, nnx.Dropout | nnx.BatchNorm):
                results += [layer.forward(*arrays, train_flg=False), layer.backward(dout)]
            assert all(numpy.isfinite(r).all() for r in results if r is not None)


@pytest.mark.parametrize("dtype", TINY)
def test_layers_and_losses_at_extreme_values(dtype):
    inf = math.inf
    x = numpy.array([[-inf, 0, inf], [-6e4, 0, 6e4], [inf, 1, 2]], dtype)
    for layer in (nnx.Sigmoid(), nnx.ReLU(), nnx.Tanh(), nnx.GELU(), nnx.Softmax()):
        y = layer.forward(x)
        assert not numpy.isnan(y).any()
        assert not numpy.isnan(layer.backward(numpy.ones((3, 3), dtype))).any()
    for function in (sigmoid, relu, softmax):
        assert not numpy.isnan(function(x)).any()
    t = numpy.array([2, 2, 0])
    for weight in (None, [1, 0, 1e-300]):
        for layer, labels in ((nnx.SoftmaxWithLoss(), t), (nnx.SigmoidWithLoss(), x > 0)):
            assert 0 <= layer.forward(x, labels, weight) < 1
            assert numpy.isfinite(layer.backward(1e-30)).all()
    assert cross_entropy_error(numpy.array([[0, 1], [1, 0]], dtype), [0, 0]) == inf


@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_ignore_underflow(name, dtype, rng):
    for factor in (1e-30, 1e-300, TINY[dtype], 1.0):
        gradient = scaled(rng.standard_normal(9), factor)
        params, grads = [rng.standard_normal(9).astype(dtype)], [nnx.asarray(gradient, dtype)]
        optimizer = getattr(nnx, name)(weight_decay=1e-4)
        for g in (*grads, gradient):  # also of another dtype
            for _ in range(3):
                optimizer.update(params, [g])
                optimizer.lr *= 1e-10
        nnx.clip_grads(grads, 1e-30)
        nnx.clip_grads(grads, 1e30)
        assert numpy.isfinite(params[0]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_ignores_underflow(name, dtype, rng):
    ones, zeros = numpy.full(4, 1e-30, dtype), numpy.zeros(4, dtype)
    model = Sequential(
        [
            nnx.Affine((1e-25 * rng.standard_normal((3, 4))).astype(dtype), zeros.copy()),
            nnx.BatchNorm(ones, zeros.copy()),
            nnx.Dropout(0.5, rng=0),
            nnx.GELU(),
            nnx.MatMul((1e-25 * rng.standard_normal((4, 2))).astype(dtype)),
        ],
        nnx.SoftmaxWithLoss(),
    )
    x, t = 1e-30 * rng.standard_normal((40, 3)), rng.integers(0, 2, 40)
    x[0] = 1e-320
    trainer = Trainer(model, OPTIMIZERS[name][0](lr=1e-20), rng=0)
    trainer.fit(x, t, 2, 16, max_grad=1e-20, validation=(x, t), verbose=False)
    assert trainer.val_list[-1][0] == pytest.approx(math.log(2))


def test_sums_and_transfers_ignore_underflow():
    assert not to_cpu(nnx.asarray([1e-50, -1e-320], "float32")).any()
    model = Sequential([nnx.MatMul(np.ones((1, 1)))], nnx.MeanSquaredError())
    assert model.evaluate([[1e-155], [1e-160], [1e-161]], [[0.0], [0], [0]], 1)[0] < 1e-310
