"""Initial weights: their distribution, dtype, and where their numbers come from."""

import math

import numpy
import pytest

from nnx import TwoLayerNet, np, to_cpu
from nnx.initializers import generator, he, normal, xavier


@pytest.mark.parametrize(
    ("initializer", "std"), [(normal, 0.01), (xavier, math.sqrt(2 / 700)), (he, math.sqrt(2 / 400))]
)
def test_deviation(initializer, std):
    W = initializer((400, 300), rng=0)
    assert isinstance(W, np.ndarray)
    assert W.dtype == np.float32
    assert float(W.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(W.mean())) < 0.02 * std


def test_none_draws_what_the_source_draws():
    numpy.random.seed(1984)
    expected = 0.01 * numpy.random.randn(2, 10), 0.01 * numpy.random.randn(10, 3)
    numpy.random.seed(1984)
    net = TwoLayerNet(2, 10, 3, dtype="float64")
    numpy.testing.assert_array_equal(to_cpu(net.params[0]), expected[0])
    numpy.testing.assert_array_equal(to_cpu(net.params[2]), expected[1])


def test_a_seed_leaves_the_global_generator_alone():
    numpy.random.seed(3)
    expected = numpy.random.rand()
    numpy.random.seed(3)
    TwoLayerNet(2, 10, 3, rng=5)
    assert numpy.random.rand() == expected


def test_one_generator_goes_on_drawing():
    rng = numpy.random.default_rng(1)
    assert float(normal((1,), rng=rng)[0]) != float(normal((1,), rng=rng)[0])
    assert float(normal((1,), rng=1)[0]) == float(normal((1,), rng=1)[0])


def test_generator_says_what_it_takes():
    with pytest.raises(TypeError, match=r"rng must be a seed, .* or None, got 'dice'"):
        generator("dice")
