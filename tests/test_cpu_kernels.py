"""Every kernel of its own that NumPy has against its portable reference."""

import inspect

import numpy
import pytest
from kernel_cases import CASES, DTYPES, LAYOUTS, TOLERANCE, arguments, assert_same, outcome

import nnx
from nnx import GPU

if GPU:
    pytest.skip("the NumPy kernels: run without NNX_GPU", allow_module_level=True)

from nnx.kernels import cpu, portable


@pytest.mark.parametrize("limit", [None, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cpu.__all__)
def test_is_the_portable_kernel(monkeypatch, name, dtype, layout, limit):
    if limit:  # arrays are large from here on: blocks, the last of them not full, and BLAS
        for name_of_limit in ("_BLOCK", "_SMALL", "_FEW"):
            monkeypatch.setattr(cpu, name_of_limit, limit)
    for shape in CASES[name][0]:
        if name == "softmax_loss" and 0 in shape:
            continue  # no mean; the loss layer refuses an empty batch
        case = name, shape, dtype, layout
        factor = 50 if name == "bias_grad" else 8  # thousands of rows, which BLAS adds in another order
        assert_same(outcome(cpu, *case), outcome(portable, *case), factor * TOLERANCE[dtype])


@pytest.mark.parametrize("classes", [3, 200])
@pytest.mark.parametrize("scale", [1, 12, 60, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_of_scores_of_any_size(dtype, scale, classes):
    rng = numpy.random.default_rng(0)
    x = (scale * rng.standard_normal((50, classes))).astype(dtype)
    t = rng.integers(classes, size=50)
    (loss, y), (expected, probabilities) = cpu.softmax_loss(x, t), portable.softmax_loss(x, t)
    numpy.testing.assert_allclose(loss, expected, rtol=10 * TOLERANCE[dtype])
    numpy.testing.assert_allclose(y, probabilities, rtol=2e-4 if dtype == "float32" else 1e-12)
    assert (loss.dtype, y.dtype) == (x.dtype, x.dtype)


@pytest.mark.parametrize("score", [39, 41, 80, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_of_a_sure_mistake(dtype, score):
    x = numpy.array([[-score, score, 0], [0, score, -score]], dtype)
    loss, y = cpu.softmax_loss(x, numpy.array([0, 2]))
    numpy.testing.assert_allclose(loss, 2 * score, rtol=1e-6)
    numpy.testing.assert_allclose(y[:, 1], 1)


@pytest.mark.parametrize("classes", [3, 200])
@pytest.mark.parametrize("dout", [1, 0.5, numpy.float64(-2), numpy.array(3.0, "float32")])
def test_the_gradient_of_the_loss_is_scaled(dout, classes):
    y, t, _ = arguments(CASES["softmax_loss_grad"][1], (5, classes), "float32", "C")
    assert_same([cpu.softmax_loss_grad(y, t, dout)], [portable.softmax_loss_grad(y, t, dout)], 1e-6)


def test_names_and_arguments_are_those_of_the_reference():
    for name in cpu.__all__:
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(portable, name))
        assert getattr(nnx.kernels, name) is getattr(cpu, name)


@pytest.mark.parametrize("size", [8, 40_000])
def test_sgd_leaves_read_only_parameters_alone(size):
    p = numpy.ones(size, "float32")
    p.flags.writeable = False  # as those of numpy.load(..., mmap_mode="r"), where BLAS would end the process
    with pytest.raises(ValueError, match="read-only"):
        cpu.sgd([p], [numpy.ones_like(p)], 0.5)
    assert (p == 1).all()


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8", "<f8"])
def test_sgd_takes_numbers_of_any_byte_order(dtype):
    p = numpy.ones(40_000, dtype)
    cpu.sgd([p], [numpy.full_like(p, 0.5)], 0.5)
    assert (p == 0.75).all()


def test_the_float16_gradient_of_a_scaled_loss_keeps_its_digits():
    y = numpy.full((512, 2), [0.001, 0.999], "float16")
    t = numpy.ones(512, int)
    scaled = cpu.softmax_loss_grad(y, t, 1024.0)
    numpy.testing.assert_allclose(scaled[:, 0], 2 * y[:, 0], rtol=1e-3)


def test_a_loss_of_nothing_is_not_negative():
    loss, _ = cpu.softmax_loss(numpy.array([[30.0, -30.0]] * 3), numpy.zeros(3, int))
    assert loss == 0
    assert not numpy.signbit(loss)
