"""The checkers must detect wrong gradients (by 0.1 %) and broken rules, and report where."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from cases import CASES, B, W, X

import nnx
from nnx import Affine, np
from nnx.testing import check_gradients, check_layer


class Wrong(Affine):
    """An Affine with one selectable fault; otherwise correct."""

    def __init__(self, dtype, fault):
        super().__init__(np.array(W, dtype), np.array(B, dtype))
        self.fault = fault
        self.count = 0

    def forward(self, x):
        if self.fault == "writes input":
            x *= 1
            x[0, 0] += 1
        y = super().forward(x)
        if self.fault == "aliases":
            if not hasattr(self, "buffer") or self.buffer.shape != y.shape:
                self.buffer = y
            self.buffer[...] = y
            return self.buffer
        return y.astype("float64") if self.fault == "dtype" else y

    def backward(self, dout):
        if self.fault == "writes dout":
            dout *= 2
        old = [g.copy() for g in self.grads]
        dx = super().backward(dout)
        if self.fault == "W":
            self.grads[0] *= 1.001
        elif self.fault == "b":
            self.grads[1] *= 1.001
        elif self.fault == "adds":
            for g, o in zip(self.grads, old, strict=True):
                g += o
        elif self.fault == "new array":
            self.grads[0] = self.grads[0].copy()
        elif self.fault == "one element":
            self.grads[0][1, 2] *= 1.001
        return dx * 1.001 if self.fault == "x" else dx

    def __deepcopy__(self, memo):
        return self if self.fault == "copy" else Wrong._copy(self)

    def _copy(self):
        other = Wrong(self.params[0].dtype, self.fault)
        other.params[0][...], other.params[1][...] = self.params
        return other


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("x", "gradient of input 0 at"),
        ("W", r"gradient of params\[0\] at"),
        ("b", r"gradient of params\[1\] at"),
        ("one element", r"gradient of params\[0\] at \(1, 2\): backward gives .*, the difference quotient"),
        ("adds", "must write, not add"),
        ("new array", r"backward replaces the array grads\[0\]"),
        ("writes input", "an input is modified|gradient of|read-only"),
        ("writes dout", "modifies dout|gradient"),
        ("aliases", "a result changes when the layer is called again"),
        ("dtype", "returns float64 for float32"),
        ("copy", r"a copy shares params\[0\]"),
    ],
)
def test_check_layer_detects_faults(fault, words):
    with pytest.raises((AssertionError, ValueError), match=words) as error:
        check_layer(lambda dtype: Wrong(dtype, fault), X)
    assert "read-only" in str(error.value) or isinstance(error.value, AssertionError)


def test_check_layer_accepts_a_correct_layer():
    check_layer(lambda dtype: Wrong(dtype, None), X)


@pytest.mark.parametrize("fault", ["x", "W", "b", "one element"])
def test_check_gradients_detects_an_error_of_a_thousandth(fault):
    with pytest.raises(AssertionError, match="Wrong: gradient of"):
        check_gradients(Wrong("float64", fault), X)


def test_check_gradients_requires_float64():
    with pytest.raises(AssertionError, match=r"needs float64, params\[0\] is float32"):
        check_gradients(CASES["Affine"][0][0]("float32"), X)


class Product:
    """A user-defined layer with two inputs: y = a * b."""

    params, grads = [], []

    def forward(self, a, b):
        self.a, self.b = a, b
        return a * b

    def backward(self, dout):
        return dout * self.b, dout * self.a


class Lookup:
    """A user-defined layer with an integer input, which has no gradient."""

    def __init__(self, dtype):
        self.params, self.grads = [nnx.asarray(W, dtype)], [np.zeros(W.shape, dtype)]

    def forward(self, idx):
        self.idx = idx
        return self.params[0][idx]

    def backward(self, dout):
        self.grads[0][...] = 0
        np.add.at(self.grads[0], self.idx, dout)


class HalfProduct(Product):
    def backward(self, dout):
        return dout * self.b, dout * self.a * 1.001


def test_check_layer_accepts_any_iterable_of_dtypes():
    tried = []
    check_layer(lambda dtype: tried.append(dtype) or Lookup(dtype), numpy.array([0, 2]), dtypes=iter(["float32"]))
    assert "float32" in tried
    for dtypes in ("float32", numpy.float32, (), iter(())):
        with pytest.raises(TypeError, match=r"check_layer: dtypes must be a list of dtypes, such as \['float32'\]"):
            check_layer(Lookup, numpy.array([0, 2]), dtypes=dtypes)


def test_check_layer_with_several_inputs_and_integer_inputs(rng):
    check_layer(lambda dtype: Product(), X, rng.standard_normal(X.shape))
    check_layer(Lookup, numpy.array([0, 2, 2, 1]))
    with pytest.raises(AssertionError, match="gradient of input 1"):
        check_layer(lambda dtype: HalfProduct(), X, rng.standard_normal(X.shape))


def masked(dtype):
    """Return a right layer that holds a layer which draws new masks at every call."""
    return nnx.Sequential([Affine(np.array(W, dtype), np.array(B, dtype)), nnx.Dropout(0.5, rng=0), nnx.ReLU()])


def test_check_layer_accepts_layers_that_hold_dropout():
    check_layer(masked, X)


class Forgets(nnx.ReLU):
    def backward(self, dout):
        super().backward(dout)


def test_backward_must_return_the_gradient_of_a_floating_input():
    with pytest.raises(AssertionError, match="Forgets: backward returns no gradient of input 0, which is floating"):
        check_gradients(Forgets(), X)
    check_gradients(Affine(np.array(W, "float64"), np.array(B, "float64"), input_grad=False), X)
    assert check_gradients(nnx.MeanSquaredError(), X, 2 * X) == 0  # whose targets need no gradient


class WrongAtZero(nnx.ReLU):
    """A rectifier whose gradient at 0 lies beyond those on both sides."""

    def backward(self, dout):
        return super().backward(dout) + 2 * dout * (self.out == 0)


def test_elements_at_kinks_are_skipped_and_counted():
    x = [[0.0, 1.0], [-1.0, 0.0]]
    assert check_gradients(nnx.ReLU(), x) == 2
    assert check_gradients(nnx.Tanh(), x) == 0
    with pytest.raises(AssertionError, match="WrongAtZero: gradient of input 0 at"):
        check_gradients(WrongAtZero(), x)


def test_the_checks_hold_under_python_o(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(
        "from test_testing import *\n"
        "for fault in ('adds', 'new array', 'aliases', 'dtype', 'copy'):\n"
        "    try:\n"
        "        check_layer(lambda dtype: Wrong(dtype, fault), X)\n"
        "    except AssertionError:\n"
        "        print(fault)\n"
    )
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-O", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n") == ["adds", "new array", "aliases", "dtype", "copy", ""]
