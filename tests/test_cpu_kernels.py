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


@pytest.mark.parametrize("classes", [3, 200])
@pytest.mark.parametrize("dout", [1, 0.5, numpy.float64(-2), numpy.array(3.0, "float32")])
def test_the_gradient_of_the_loss_is_scaled(dout, classes):
    y, t, _ = arguments(CASES["softmax_loss_grad"][1], (5, classes), "float32", "C")
    assert_same([cpu.softmax_loss_grad(y, t, dout)], [portable.softmax_loss_grad(y, t, dout)], 1e-6)


def test_names_and_arguments_are_those_of_the_reference():
    for name in cpu.__all__:
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(portable, name))
        assert getattr(nnx.kernels, name) is getattr(cpu, name)
