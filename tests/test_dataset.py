"""The spiral equals the book's, bit for bit."""

import numpy
import pytest

from nnx import spiral


def test_spiral_equals_the_books_bit_for_bit():
    x, t = spiral.load_data()
    state = numpy.random.RandomState(1984)
    for j in range(3):
        for i in range(100):
            rate = i / 100
            theta = j * 4.0 + 4.0 * rate + state.randn() * 0.2
            expected = numpy.array([rate * numpy.sin(theta), rate * numpy.cos(theta)])
            assert (x[100 * j + i] == expected).all(), (i, j)
    assert (x.shape, x.dtype, t.shape, t.dtype) == ((300, 2), numpy.float64, (300, 3), numpy.int32)
    numpy.testing.assert_array_equal(t.argmax(axis=1), numpy.repeat([0, 1, 2], 100))
    assert (t.sum(axis=1) == 1).all()


def test_spiral_does_not_change_the_global_generator():
    numpy.random.seed(5)
    expected = numpy.random.rand()
    numpy.random.seed(5)
    x, _ = spiral.load_data(seed=7)
    assert numpy.random.rand() == expected
    assert (x != spiral.load_data()[0]).any()


def test_a_seed_that_the_generator_does_not_take_is_refused():
    for seed in (-1, 1 << 32):
        with pytest.raises(ValueError, match=rf"load_data: seed must be .*, got {seed}"):
            spiral.load_data(seed=seed)
