"""Initial weights: distribution, dtype, and source of random numbers."""

import math

import numpy
import pytest

from nnx import TwoLayerNet, np, to_cpu
from nnx.initializers import he, normal, xavier
from nnx.rng import as_generator


@pytest.mark.parametrize(
    ("initializer", "std"), [(normal, 0.01), (xavier, math.sqrt(2 / 700)), (he, math.sqrt(2 / 400))]
)
def test_standard_deviation(initializer, std):
    W = initializer((400, 300), rng=0)
    assert isinstance(W, np.ndarray)
    assert W.dtype == np.float32
    assert float(W.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(W.mean())) < 0.02 * std


def test_none_draws_the_same_numbers_as_the_book():
    numpy.random.seed(1984)
    expected = 0.01 * numpy.random.randn(2, 10), 0.01 * numpy.random.randn(10, 3)
    numpy.random.seed(1984)
    net = TwoLayerNet(2, 10, 3, dtype="float64")
    numpy.testing.assert_array_equal(to_cpu(net.params[0]), expected[0])
    numpy.testing.assert_array_equal(to_cpu(net.params[2]), expected[1])


def test_seed_does_not_change_the_global_generator():
    numpy.random.seed(3)
    expected = numpy.random.rand()
    numpy.random.seed(3)
    TwoLayerNet(2, 10, 3, rng=5)
    assert numpy.random.rand() == expected


def test_generator_continues_its_sequence():
    rng = numpy.random.default_rng(1)
    assert float(normal((1,), rng=rng)[0]) != float(normal((1,), rng=rng)[0])
    assert float(normal((1,), rng=1)[0]) == float(normal((1,), rng=1)[0])


def test_as_generator_error():
    with pytest.raises(TypeError, match=r"rng must be a seed, .* or None, got 'dice'"):
        as_generator("dice")


@pytest.mark.parametrize("initializer", [normal, xavier, he])
@pytest.mark.parametrize("dtype", ["float16", "f4", float, numpy.float64, numpy.dtype("float32")])
def test_floating_dtypes(initializer, dtype):
    W = initializer((3, 4), dtype=dtype, rng=0)
    assert W.dtype == numpy.dtype(dtype)
    assert float(abs(W).min()) > 0


OTHERS = ["int32", int, "uint8", "U5", str, bool, "complex64", "O", "M8[s]", "x", 7]
OTHERS += [numpy.dtype(name).newbyteorder() for name in ("float16", "float32", "float64")]
if numpy.dtype(numpy.longdouble).itemsize > 8:
    OTHERS.append(numpy.longdouble)


@pytest.mark.parametrize("initializer", [normal, xavier, he])
@pytest.mark.parametrize("dtype", OTHERS)
def test_invalid_dtypes(initializer, dtype):
    words = rf"{initializer.__name__}: dtype must be float16, float32 or float64, got "
    with pytest.raises(TypeError, match=words):
        initializer((3, 4), dtype=dtype)


def test_net_rejects_integer_dtypes():
    with pytest.raises(TypeError, match="dtype must be float16, float32 or float64, got 'int32'"):
        TwoLayerNet(2, 3, 3, dtype="int32")


@pytest.mark.parametrize("initializer", [xavier, he])
@pytest.mark.parametrize("shape", [3, (3,), (), (3, 4, 5), (0, 3), (3, 0), (-3, 4), (2, 2, 3, 3)])
def test_fans_need_two_axes(initializer, shape):
    with pytest.raises(ValueError, match=rf"{initializer.__name__}: shape must be \(D, H\), .* normal\(shape, std\)"):
        initializer(shape)


@pytest.mark.parametrize("initializer", [normal, xavier, he])
def test_a_shape_may_be_any_iterable(initializer):
    want = to_cpu(initializer((3, 4), rng=0))
    for shape in ([3, 4], iter((3, 4)), numpy.array([3, 4])):
        numpy.testing.assert_array_equal(to_cpu(initializer(shape, rng=0)), want)


def test_normal_accepts_any_shape():
    assert normal(3).shape == (3,)
    assert normal((2, 3, 4)).shape == (2, 3, 4)
    assert normal((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("std", [0, 0.5, numpy.float32(0.5), np.asarray(0.5)])
def test_std_may_be_any_number(std):
    numpy.testing.assert_array_equal(to_cpu(normal((3, 4), std, rng=0)), to_cpu(normal((3, 4), float(std), rng=0)))


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf, pytest.param(10**400, id="huge")])
def test_invalid_std(std):
    shown = "inf" if std == 10**400 else std  # it has no float
    with pytest.raises(ValueError, match=f"normal: std must be finite and at least 0, got {shown}"):
        normal((3, 4), std)


@pytest.mark.parametrize("std", ["0.1", None, 1j, [0.1, 0.2], numpy.array([0.1, 0.2])])
def test_std_must_be_a_number(std):
    with pytest.raises(TypeError, match="normal: std must be a number, got "):
        normal((3, 4), std)
