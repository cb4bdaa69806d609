"""The kernels, each bound at import to its fastest implementation for the device.

`portable` is the reference implementation and `portable.__all__` the list of kernels; `native` (C, on the CPU) or
`cuda` (CuPy) overrides those that it implements, with the same arguments in the same order. `KERNELS` is the name of
the implementation in use, and `native_error` the error if `native` could not be imported.
"""

import importlib
from typing import Any

from nnx.config import NATIVE
from nnx.kernels import portable
from nnx.kernels.portable import *
from nnx.np import GPU  # importing it also verifies CuPy

KERNELS = "portable"
native_error: ImportError | None = None

_fast: Any = portable
if GPU:
    _fast = importlib.import_module("nnx.kernels.cuda")
    KERNELS = "cuda"
elif NATIVE is not False:
    try:
        _fast = importlib.import_module("nnx.kernels.native")
    except ImportError as error:
        if NATIVE:
            raise ImportError(
                f"NNX_NATIVE=1, but nnx.kernels.native cannot be imported: {error}; "
                "install a C compiler and reinstall nnx, or unset NNX_NATIVE"
            ) from error
        native_error = error
    else:
        KERNELS = "native"
globals().update((name, getattr(_fast, name)) for name in portable.__all__ if hasattr(_fast, name))
