"""The native kernels against the portable ones: dtypes, layouts, sizes, extreme values; errors in ulp."""

import inspect

import numpy
import pytest
from kernel_cases import CASES, DTYPES, LAYOUTS, TOLERANCE, assert_same, outcome

import nnx
from nnx import GPU

if GPU:
    pytest.skip("the native kernels are for NumPy: run without NNX_GPU", allow_module_level=True)

from nnx.kernels import portable

native = pytest.importorskip("nnx.kernels.native", reason="the native kernels are not built")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(set(CASES) & set(native.__all__)))
def test_is_the_portable_kernel(name, dtype, layout, weighted):
    for shape in CASES[name][0]:
        case = name, shape, dtype, layout
        if name.endswith("_loss") and 0 in shape:
            continue  # no mean; the loss layer refuses an empty batch
        factor = 50 if name == "bias_grad" else 8  # sums of thousands of rows, in another order
        options = {"weighted": weighted}
        assert_same(outcome(native, *case, **options), outcome(portable, *case, **options), factor * TOLERANCE[dtype])
