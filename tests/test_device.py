"""Arrays between host and device."""

import numpy
import pytest

import nnx
from nnx import asarray, np, to_cpu, to_gpu


def test_asarray_gives_arrays_of_the_active_module():
    for x in ([1, 2], (1.5, 2), numpy.arange(3), np.arange(3), 3, True):
        assert isinstance(asarray(x), np.ndarray)
    assert asarray([1, 2], "float32").dtype == np.float32


def test_asarray_makes_no_copy_without_need():
    x = np.arange(3.0)
    assert asarray(x) is x
    assert asarray(x, "float64") is x


@pytest.mark.parametrize("x", ["abc", None, [None], ["a"], {1: 2}, numpy.array("2026", "M8"), 1j])
def test_asarray_refuses_what_holds_no_real_numbers(x):
    with pytest.raises(TypeError, match="asarray: expected real numbers"):
        asarray(x)


def test_asarray_refuses_ragged_lists():
    with pytest.raises(ValueError, match="asarray: expected an array or a list of numbers, got list"):
        asarray([[1, 2], [3]])


def test_to_cpu_gives_numpy_whatever_comes():
    for x in ([1, 2], np.arange(3), numpy.arange(3), np.arange(3).sum(), 1.5):
        assert isinstance(to_cpu(x), numpy.ndarray)


def test_to_gpu():
    if nnx.GPU:
        assert isinstance(to_gpu([1, 2]), np.ndarray)
    else:
        with pytest.raises(RuntimeError, match="start Python with NNX_GPU=1"):
            to_gpu([1, 2])


def test_synchronize_returns():
    assert nnx.synchronize() is None
