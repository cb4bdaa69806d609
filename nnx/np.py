"""The array module, chosen once: `np` is NumPy, or CuPy when `NNX_GPU=1`.

`from nnx.np import *` gives `np` and `GPU`; `from nnx import np`, `import nnx.np as np` and
`from nnx.np import zeros` work too. `nnx.np` is the library itself, without a wrapper, and nothing
in it is patched. `Array` is the type of its arrays.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

from nnx.config import GPU

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["GPU", "np"]

_CUPY = 14  # the oldest major version that nnx is tested with
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver


def _import_cupy() -> ModuleType:
    """Return CuPy, or raise the one error that names the missing piece.

    The checks touch no device memory: they ask the driver for devices and open three libraries.
    """
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(
            f"NNX_GPU=1, but CuPy cannot be imported: pip install {_pieces(13)} "
            "(with 12 in place of 13 for a driver below 580), or unset NNX_GPU to run on NumPy"
        ) from error
    if int(cupy.__version__.partition(".")[0]) < _CUPY:
        raise ImportError(
            f"NNX_GPU=1, but nnx needs CuPy {_CUPY} or newer and found {cupy.__version__}: pip install {_pieces(13)} "
            "(with 12 in place of 13 for a driver below 580)"
        )
    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver == 0:
            why = "no NVIDIA driver is installed"
        elif error.status == _INSUFFICIENT_DRIVER:
            why = (
                f"the driver supports CUDA {_version(driver)}, this CuPy needs {_version(needed)}; update the "
                f"driver, or install the CuPy made for it: pip install {_pieces(driver // 1000)}"
            )
        else:
            why = "the driver shows none; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise RuntimeError(f"NNX_GPU=1, but no CUDA device can be used: {why} ({error})") from error
    if devices == 0:
        raise RuntimeError("NNX_GPU=1, but no CUDA device is visible; see CUDA_VISIBLE_DEVICES")
    probes: dict[str, Callable[[], Any]] = {  # NVRTC loads when first called, the others when first named
        "NVRTC": cupy.cuda.nvrtc.getVersion,
        "cuBLAS": lambda: cupy.cuda.cublas,
        "cuRAND": lambda: cupy.cuda.curand,
    }
    for library, probe in probes.items():
        try:
            probe()
        except (ImportError, RuntimeError) as error:
            pieces = _pieces(runtime.runtimeGetVersion() // 1000)
            raise RuntimeError(
                f"NNX_GPU=1, but {library} of the CUDA toolkit cannot be loaded: pip install {pieces}"
            ) from error
    return cupy


def _pieces(cuda: int) -> str:
    """Return what the extra of a CUDA version consists of."""
    return f"cupy-cuda{cuda}x 'cuda-toolkit[cublas,cudart,curand,nvrtc]=={cuda}.*'"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


if GPU and not TYPE_CHECKING:
    np = _import_cupy()
else:
    import numpy as np

Array = np.ndarray
Scalar: TypeAlias = Any  # what a reduction returns: a NumPy scalar, or a CuPy array without axes


def __getattr__(name: str) -> Any:
    try:
        return getattr(np, name)
    except AttributeError:
        raise AttributeError(f"neither nnx.np nor {np.__name__} has {name!r}") from None
