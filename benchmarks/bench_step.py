"""The time of a training step (forward, backward, update on a prepared batch) and of its matrix products alone.

The nets are those of `peers.py`, all on CuPy if on the GPU. Results are compared before timing.
"""

import pytest

from benchmarks import peers
from nnx import GPU


def ready(problem, variant):
    """Return a function that performs a step and returns the loss, and one that returns the weights."""
    _, make, dtype = peers.VARIANTS[variant]
    params = [p.astype(dtype) for p in problem.params]
    net = make(params, 0.01, "cuda" if GPU else "cpu")  # a small rate keeps the values in the normal range
    x, t = net.put(problem.x.astype(dtype)), net.put(problem.t)
    return lambda: net.step(x, t), net.weights


@pytest.mark.parametrize("variant", ["floor", "nnx", "book float64", "book float32"])
def test_step(measure, assert_close, problem, variant):
    step, weights = ready(problem, variant)
    if variant != "floor":
        reference, expected = ready(problem, "book float64")
        assert_close((step(), weights()), (reference(), expected()))
    measure(f"step {problem.name}", "forward, backward and update of a net D-H-C on N rows", step)
