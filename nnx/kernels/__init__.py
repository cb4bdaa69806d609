"""One name per kernel, bound once, at import, to the fastest version for the device.

Every kernel is in `portable`, the reference; `native` (C, on the CPU) or `cuda` (CuPy) replaces those that it has,
with the same arguments in the same order. `KERNELS` says which of the three was bound, and `native_error` why
`native` was not, if it could not be imported.
"""

from nnx.config import NATIVE
from nnx.kernels.portable import *
from nnx.np import GPU  # importing it also verifies CuPy

KERNELS = "portable"
native_error: ImportError | None = None

if GPU:
    from nnx.kernels.cuda import *

    KERNELS = "cuda"
elif NATIVE is not False:
    try:
        from nnx.kernels.native import *
    except ImportError as error:
        if NATIVE:
            raise ImportError(
                f"NNX_NATIVE=1, but nnx.kernels.native cannot be imported: {error}; "
                "install a C compiler and reinstall nnx, or unset NNX_NATIVE"
            ) from error
        native_error = error
    else:
        KERNELS = "native"
