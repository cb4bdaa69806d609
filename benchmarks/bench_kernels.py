"""Every kernel written for the active device beside its portable version, compared and then timed.

A kernel stays in `nnx.kernels.cpu` or `cuda` only while its row here is the smaller one at the sizes it is for.
"""

import importlib
import inspect

import numpy
import pytest

from nnx import GPU, np
from nnx.kernels import portable

NAME = "cuda" if GPU else "cpu"
fast = importlib.import_module(f"nnx.kernels.{NAME}")

SHAPES = ["30x10", "512x1024", "1024x4096"]  # the spiral's hidden layer, the largest workload's scores and weights


def arguments(kernel, shape):
    """Return what `kernel` calls for by its parameters' names, for N rows of H: the same numbers at every call."""
    n, h = map(int, shape.split("x"))
    rng = numpy.random.default_rng(0)
    x, dout, row = (np.array(rng.standard_normal(s), "float32") for s in ((n, h), (n, h), h))
    known = {
        "x": x,
        "y": portable.softmax(x),
        "t": np.array(rng.integers(h, size=n)),
        "dout": 1 if kernel == "softmax_loss_grad" else dout,
        "b": row,
        "out": row if kernel == "bias_grad" else x.copy(),
        "idx": np.array(rng.integers(n, size=n)),
        "W": x,
        "params": [x, row],
        "grads": [dout, row.copy()],
        **{state: [abs(x), abs(row)] for state in ("ms", "vs", "hs")},
        "lr": 1e-6,  # small: the same gradients are subtracted again and again
        **dict.fromkeys(("momentum", "decay", "beta1", "beta2"), 0.9),
        "eps": 1e-7,
        "shrink": 1.0,
        "max_norm": 1.0,
        "ratio": 0.5,
        "seed": 1,
        "call": 1,
    }
    return [known[letter] for letter in inspect.signature(getattr(portable, kernel)).parameters]


MODULES = {"portable": portable, NAME: fast}


@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", fast.__all__)
def test_kernel(measure, assert_close, kernel, shape, variant):
    def run(module):
        args = arguments(kernel, shape)
        result = getattr(module, kernel)(*args)
        return args if result is None else (result, args)  # without a result it writes into an argument

    if variant == NAME:
        assert_close(run(fast), run(portable))
    measure(f"{kernel} {shape}", getattr(MODULES[variant], kernel), *arguments(kernel, shape))
