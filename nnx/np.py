"""The array module, selected at import: `np` is NumPy, or CuPy when `NNX_GPU=1`.

`from nnx.np import *` imports `np` and `GPU`; `from nnx import np`, `import nnx.np as np` and
`from nnx.np import zeros` work too. `np` is the library itself, neither wrapped nor patched. `Array` is its array type.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

from nnx.config import GPU

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["GPU", "np"]

_MIN_CUPY = 14  # the oldest major version that nnx is tested with
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver


def _import_cupy() -> ModuleType:
    """Import and return CuPy; raise an error that names the missing component.

    The checks allocate no device memory: they query the driver for devices and load three libraries.
    """
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(
            f"NNX_GPU=1, but CuPy cannot be imported: pip install {_requirements(13)} "
            "(12 instead of 13 for a driver older than 580), or unset NNX_GPU to run on NumPy"
        ) from error
    if int(cupy.__version__.partition(".")[0]) < _MIN_CUPY:
        raise ImportError(
            f"NNX_GPU=1, but nnx needs CuPy {_MIN_CUPY} or newer and found {cupy.__version__}: "
            f"pip install {_requirements(13)} (12 instead of 13 for a driver older than 580)"
        )
    _check_devices(cupy.cuda.runtime)
    probes: dict[str, Callable[[], Any]] = {  # NVRTC is loaded at its first call, the others at first attribute access
        "NVRTC": cupy.cuda.nvrtc.getVersion,
        "cuBLAS": lambda: cupy.cuda.cublas,
        "cuRAND": lambda: cupy.cuda.curand,
    }
    for library, probe in probes.items():
        try:
            probe()
        except (ImportError, RuntimeError) as error:
            requirements = _requirements(cupy.cuda.runtime.runtimeGetVersion() // 1000)
            raise RuntimeError(
                f"NNX_GPU=1, but {library} of the CUDA toolkit cannot be loaded: pip install {requirements}"
            ) from error
    return cupy


def _check_devices(runtime: Any) -> None:
    """Raise a RuntimeError that says why, if there is no CUDA device."""
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver == 0:
            reason = "no NVIDIA driver is installed"
        elif error.status == _INSUFFICIENT_DRIVER:
            reason = (
                f"the driver supports CUDA {_version(driver)}, but this CuPy needs {_version(needed)}; update the "
                f"driver, or install the CuPy built for it: pip install {_requirements(driver // 1000)}"
            )
        else:
            reason = "the driver reports no device; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise RuntimeError(f"NNX_GPU=1, but no CUDA device is available: {reason} ({error})") from error
    if devices == 0:
        raise RuntimeError("NNX_GPU=1, but no CUDA device is visible; see CUDA_VISIBLE_DEVICES")


def _requirements(cuda: int) -> str:
    """Return the pip requirements of the optional dependency `cuda<version>`."""
    return f"cupy-cuda{cuda}x 'cuda-toolkit[cublas,cudart,curand,nvrtc]=={cuda}.*'"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


if GPU and not TYPE_CHECKING:
    np = _import_cupy()
else:
    import numpy as np

Array = np.ndarray
Scalar: TypeAlias = Any  # the result of a reduction: a NumPy scalar or a 0-d CuPy array


def __getattr__(name: str) -> Any:
    try:
        return getattr(np, name)
    except AttributeError:
        raise AttributeError(f"neither nnx.np nor {np.__name__} has {name!r}") from None
