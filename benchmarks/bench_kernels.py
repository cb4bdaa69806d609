"""Every native or CUDA kernel and its portable version: results compared, then timed.

A kernel stays in `nnx.kernels.native` or `cuda` only if it is faster here at the sizes it is intended for.
"""

import pytest

from nnx import GPU
from nnx.kernels import portable
from tests.kernel_cases import CASES, STEPS, arguments, assert_same, outcome

NAME = "cuda" if GPU else "native"
fast = pytest.importorskip(f"nnx.kernels.{NAME}", reason="the native kernels are not built")

SHAPES = ["30x10", "512x1024", "1024x4096"]  # spiral's hidden layer; scores and weights of the largest workload
MODULES = {"portable": portable, NAME: fast}
KERNELS = [name for name in CASES if getattr(fast, name, None) not in (None, getattr(portable, name))]


@pytest.mark.parametrize("variant", MODULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(measure, kernel, shape, variant):
    N, H = map(int, shape.split("x"))
    case = (N, 3, H) if CASES[kernel][0] is STEPS else (N, H), "float32", "C"  # a step of 3
    if variant == NAME:
        assert_same(outcome(fast, kernel, *case), outcome(portable, kernel, *case), 1e-3)
    compared = f"the portable kernel and the {NAME} one"
    measure(f"{kernel} {shape}", compared, getattr(MODULES[variant], kernel), *arguments(CASES[kernel][1], *case))
