"""Every kernel written for the active device beside its portable version, compared and then timed.

A kernel stays in `nnx.kernels.cpu` or `cuda` only while its row here is the smaller one.
"""

import numpy
import pytest

from nnx import GPU, np
from nnx.kernels import portable

NAME = "cuda" if GPU else "cpu"
fast = pytest.importorskip(f"nnx.kernels.{NAME}", reason=f"there are no {NAME} kernels")

SHAPES = ["30x10", "512x1024"]  # the spiral's hidden layer, the largest workload's scores


def arguments(kernel, shape):
    """Return the arguments of `kernel` for N rows of H, the same numbers at every call; a new kernel has them here."""
    n, h = map(int, shape.split("x"))
    rng = numpy.random.default_rng(0)
    x, dout, row = (np.array(rng.standard_normal(s), "float32") for s in ((n, h), (n, h), h))
    t = np.array(rng.integers(h, size=n))
    y = portable.softmax(x)
    return {
        "add_bias": (x, row),
        "bias_grad": (x, row),
        "clip_grads": ([x, row], 1.0),
        "relu_grad": (dout, y),
        "sgd": ([x, row], [dout, row], 1e-6),
        "sigmoid": (x,),
        "sigmoid_grad": (dout, y),
        "softmax": (x,),
        "softmax_grad": (dout, y),
        "softmax_loss": (x, t),
        "softmax_loss_grad": (y, t, 1),
        "tanh_grad": (dout, y),
    }[kernel]


MODULES = {"portable": portable, NAME: fast}


@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", fast.__all__)
def test_kernel(measure, assert_close, kernel, shape, variant):
    def run(module):
        args = arguments(kernel, shape)
        result = getattr(module, kernel)(*args)
        return args if result is None else (result, args)  # without a result it writes into an argument

    assert_close(run(fast), run(portable))
    measure(f"{kernel} {shape}", getattr(MODULES[variant], kernel), *arguments(kernel, shape))
