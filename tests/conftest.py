"""Stricter than users get: any floating-point warning of NumPy is an error, in every test."""

import numpy
import pytest


@pytest.fixture(autouse=True)
def _strict_floats():
    with numpy.errstate(over="raise", divide="raise", invalid="raise"):
        yield


@pytest.fixture
def rng():
    return numpy.random.default_rng(0)
