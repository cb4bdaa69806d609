"""Turn NumPy's floating-point warnings into errors in every test; the library's default is less strict."""

import numpy
import pytest


@pytest.fixture(autouse=True)
def _strict_floats():
    with numpy.errstate(over="raise", divide="raise", invalid="raise"):
        yield


@pytest.fixture
def rng():
    return numpy.random.default_rng(0)
