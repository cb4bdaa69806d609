"""sigmoid, relu, softmax, cross_entropy_error: values, tails, dtypes, axes, errors."""

import math

import numpy
import pytest

from nnx import np, to_cpu
from nnx.checks import class_indices
from nnx.functions import cross_entropy_error, relu, sigmoid, softmax

DTYPES = ["float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_is_accurate_in_both_tails(dtype):
    x = numpy.array([-math.inf, -1e4, -12, -1, 0, 1, 12, 1e4, math.inf], dtype)
    y = to_cpu(sigmoid(x))
    assert y.dtype == dtype
    with numpy.errstate(over="ignore"):
        expected = (1 / (1 + numpy.exp(-x.astype("float64")))).astype(dtype)
    numpy.testing.assert_allclose(y, expected, rtol=4 * numpy.finfo(dtype).eps)
    assert y[2] > 0
    assert math.isnan(float(sigmoid(numpy.array(math.nan, dtype))))


@pytest.mark.parametrize("function", [sigmoid, relu, softmax])
def test_dtype_and_shape_are_kept(function):
    for dtype in DTYPES:
        for shape in [(3,), (2, 3), (2, 2, 3), (0, 3)]:
            y = function(np.zeros(shape, dtype))
            assert (y.dtype, y.shape) == (dtype, shape)
    assert function([1, 2]).dtype == np.float64
    assert function(numpy.array([1, 2], "int8")).dtype == np.float32


def test_elementwise_functions_accept_scalars():
    assert float(sigmoid(0.0)) == 0.5
    assert float(relu(-1.0)) == 0
    assert sigmoid(np.asarray(1.0)).shape == ()


def test_relu():
    x = numpy.array([-math.inf, -1.0, -0.0, 2.0, math.inf])
    numpy.testing.assert_array_equal(to_cpu(relu(x)), [0, 0, 0, 2, math.inf])
    assert math.isnan(float(relu([math.nan])[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([0, 0], [0.5, 0.5]),
        ([60000, 0], [1, 0]),
        ([-60000, -60000], [0.5, 0.5]),
        ([math.inf, 0, 1], [1, 0, 0]),
        ([math.inf, math.inf, 1], [0.5, 0.5, 0]),
        ([-math.inf, 0], [0, 1]),
        ([-math.inf, -math.inf], [0.5, 0.5]),
    ],
)
def test_softmax_limits(x, y, dtype):
    numpy.testing.assert_array_equal(to_cpu(softmax(numpy.array(x, dtype))), numpy.array(y, dtype))


def test_softmax_over_the_last_of_any_number_of_axes(rng):
    x = rng.standard_normal((2, 3, 4, 5))
    e = numpy.exp(x)
    numpy.testing.assert_allclose(to_cpu(softmax(x)), e / e.sum(axis=-1, keepdims=True))
    numpy.testing.assert_allclose(to_cpu(softmax(x[0, 0, 0])), to_cpu(softmax(x))[0, 0, 0])


def test_softmax_of_nan_is_nan_in_that_row_only():
    y = to_cpu(softmax([[math.nan, 1], [1, 1]]))
    numpy.testing.assert_array_equal(numpy.isnan(y), [[True, True], [False, False]])


def test_softmax_does_not_modify_its_argument(rng):
    x = np.asarray(rng.standard_normal((3, 4)))
    before = x.copy()
    softmax(x)
    sigmoid(x)
    numpy.testing.assert_array_equal(to_cpu(x), to_cpu(before))


def test_cross_entropy_error():
    y = numpy.array([[0.25, 0.75], [0.5, 0.5]])
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert float(cross_entropy_error(y, [1, 0])) == pytest.approx(expected)
    assert float(cross_entropy_error(y, [[0, 1], [1, 0]])) == pytest.approx(expected)
    assert float(cross_entropy_error(y[0], 1)) == pytest.approx(-math.log(0.75))
    assert float(cross_entropy_error(y[0], [0, 1])) == pytest.approx(-math.log(0.75))
    assert float(cross_entropy_error([[1.0, 0.0]], [1])) == math.inf


def test_class_indices_of_host_labels_are_transferred():
    assert isinstance(class_indices([0, 1], (2, 3)), np.ndarray)
    numpy.testing.assert_array_equal(to_cpu(class_indices(np.asarray([[0, 1], [1, 0]]), (2, 2))), [1, 0])


@pytest.mark.parametrize("function", [sigmoid, relu, softmax])
@pytest.mark.parametrize(("x", "error"), [("a", TypeError), (None, TypeError), ([[1], [1, 2]], ValueError)])
def test_errors_name_the_function(function, x, error):
    with pytest.raises(error, match=f"{function.__name__}: expected"):
        function(x)
