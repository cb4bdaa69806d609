"""Arrays between host and device."""

import numpy
import pytest

import nnx
from nnx import asarray, np, to_cpu, to_gpu
from nnx.device import as_real_array


def test_asarray_returns_arrays_of_the_array_module():
    for x in ([1, 2], (1.5, 2), numpy.arange(3), np.arange(3), 3, True):
        assert isinstance(asarray(x), np.ndarray)
    assert asarray([1, 2], "float32").dtype == np.float32


def test_asarray_avoids_copies():
    x = np.arange(3.0)
    assert asarray(x) is x
    assert asarray(x, "float64") is x


@pytest.mark.parametrize("x", ["abc", None, [None], ["a"], {1: 2}, numpy.array("2026", "M8"), 1j])
def test_asarray_rejects_non_real_data(x):
    with pytest.raises(TypeError, match="asarray: expected real numbers"):
        asarray(x)


def test_asarray_rejects_ragged_lists():
    with pytest.raises(ValueError, match="asarray: expected an array or a list of numbers, got list"):
        asarray([[1, 2], [3]])


def test_to_cpu_returns_numpy_arrays():
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


def test_masked_arrays_are_rejected():
    masked = numpy.ma.masked_array([[1.0, 2.0]], mask=[[False, True]])
    for read in (
        nnx.asarray,
        nnx.Sigmoid().forward,
        lambda x: nnx.Trainer(nnx.TwoLayerNet(2, 3, 3), nnx.SGD()).fit(x, [0]),
    ):
        with pytest.raises(TypeError, match="expected an array without a mask; fill the masked elements"):
            read(masked)


class Own(numpy.ndarray):
    """A subclass such as numpy.matrix, whose operators may be redefined."""


@pytest.mark.skipif(nnx.GPU, reason="CuPy has no subclasses and no foreign byte order")
@pytest.mark.parametrize("layer", [nnx.Sigmoid, nnx.Tanh, nnx.ReLU, nnx.GELU, nnx.Softmax, nnx.Dropout])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layers_convert_inputs_to_plain_native_arrays(layer, dtype):
    x = numpy.array([[1, 2], [3, -4]], dtype)
    want, wants_grad = layer(), numpy.array([[1, 2], [0.5, 1]], dtype)
    y = want.forward(x)
    dx = want.backward(wants_grad)
    foreign = x.dtype.newbyteorder(">")
    for other, dout in (
        (x.astype(foreign), wants_grad.astype(foreign)),
        (x.view(Own), wants_grad.view(Own)),
    ):
        got = layer()
        got.seed = getattr(want, "seed", None)
        for a, b in ((got.forward(other), y), (got.backward(dout), dx)):
            assert type(a) is numpy.ndarray
            assert a.dtype == dtype
            assert a.dtype.isnative
            numpy.testing.assert_array_equal(a, b)


def test_missing_gradient_is_an_error():
    net = nnx.Sequential([nnx.Tanh(), nnx.MatMul(np.ones((2, 3)), input_grad=False)], nnx.SoftmaxWithLoss())
    net.forward(numpy.ones((4, 2)), [0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"Tanh.backward: dout is None; the next layer was probably created with"):
        net.backward()


@pytest.mark.skipif(not nnx.GPU, reason="the memory of a GPU")
def test_free_bytes_include_the_memory_pool(monkeypatch):
    device, pool = nnx.device, np.cuda.MemoryPool()
    monkeypatch.setattr(device._cupy, "get_default_memory_pool", lambda: pool)
    monkeypatch.setattr(device._cupy.cuda.runtime, "memGetInfo", lambda: (1 << 20, 1 << 30))
    host = numpy.zeros(3 << 18, "float32")  # 3 MiB
    with np.cuda.using_allocator(pool.malloc):
        assert not device.fits_on_device(host)
        there = np.zeros(8 << 20, "uint8")
        assert device.fits_on_device(there)
        assert device.chunk_bytes(there) < 2 << 20
        del there  # returned to the pool
        assert device.fits_on_device(host)
        assert device.chunk_bytes(np.zeros(1)) > 2 << 20
    monkeypatch.setattr(device._cupy.cuda.runtime, "memGetInfo", lambda: (1 << 36, 1 << 36))
    assert device.chunk_bytes(host) == 1 << 28


@pytest.mark.parametrize("kind", ["float32", ">f4"])
@pytest.mark.parametrize("dtype", [None, "float64", "float32", ">f4"])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_large_arrays_are_transferred_like_small_ones(dtype, layout, kind, rng, monkeypatch):
    x = numpy.asarray(rng.standard_normal((30, 20)), kind, order=layout)
    small = asarray(x, dtype)
    monkeypatch.setattr(nnx.device, "_LARGE", 10)
    y = asarray(x, dtype)
    assert type(y) is np.ndarray
    assert (y.dtype, y.strides) == (small.dtype, small.strides)
    numpy.testing.assert_array_equal(to_cpu(y), x)


def test_tables_name_the_column_that_holds_no_numbers():
    pandas = pytest.importorskip("pandas")
    for bad in (["x", "y"], pandas.Categorical(["x", "y"]), [object(), 2]):
        with pytest.raises(TypeError, match=r"x: column 'b' holds (str|object|category), not real numbers; encode it"):
            as_real_array(pandas.DataFrame({"a": [1, 2], "b": bad}), "x")
    with pytest.raises(ValueError, match=r"x: pandas\S*DataFrame has missing values; fill or remove them"):
        as_real_array(pandas.DataFrame({"a": pandas.array([1, None], dtype="Int64"), "b": [1, 2]}), "x")


def test_nullable_columns_without_missing_values_are_numbers():
    pandas = pytest.importorskip("pandas")
    columns = {"a": pandas.array([1, 2], dtype="Int64"), "b": pandas.array([0.5, 2], dtype="Float64")}
    numpy.testing.assert_array_equal(as_real_array(pandas.DataFrame(columns), "x"), [[1, 0.5], [2, 2]])
    labels = as_real_array(pandas.Series([1, 0], dtype="Int64"), "t")
    assert labels.dtype == "int64"


def test_strings_are_told_to_be_made_integers():
    for labels in (["cat", "dog"], numpy.array(["cat", "dog"])):
        with pytest.raises(TypeError, match=r"t: .* got strings; make labels integers with .*numpy.unique\(labels"):
            as_real_array(labels, "t")


def test_a_matrix_is_taken_as_an_array():
    assert type(as_real_array(numpy.eye(2).view(numpy.matrix), "x")) is numpy.ndarray
