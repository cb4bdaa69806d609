"""Arrays crossing the border: between host and device, and from the caller into a layer.

Everything here works alike on both devices; on the CPU a move is no copy.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy

from nnx.config import GPU
from nnx.np import Array, np

_ARRAYS = (Array, numpy.ndarray)
_cupy: Any = np  # CuPy ships no types; used only where GPU is True
quiet = numpy.errstate(under="ignore")  # decorates what may underflow: a product that vanishes is 0, and right
_FLOAT32, _FLOAT64 = numpy.dtype("float32"), numpy.dtype("float64")
_LARGE = 1 << 26  # bytes, from which CuPy's pinned copy of what it uploads, never given back, would be felt

__all__ = ["asarray", "synchronize", "to_cpu", "to_gpu"]


def to_cpu(x: Any) -> numpy.ndarray:
    """Return `x` as a NumPy array; on the GPU this waits for the work that makes `x`."""
    return _cupy.asnumpy(x) if GPU else numpy.asarray(x)


def to_gpu(x: Any) -> Array:
    """Return `x` as a CuPy array.

    Raises
    ------
    RuntimeError
        Without `NNX_GPU=1`: there is no GPU to move to, and no layer that would take the result.
    """
    if not GPU:
        raise RuntimeError("to_gpu: nnx runs on NumPy; start Python with NNX_GPU=1 to train on the GPU")
    return asarray(x)


def asarray(x: Any, dtype: Any = None, *, name: str = "asarray") -> Array:
    """Return `x`, an array of either module or a nested list, as an array of the array module.

    No copy is made where `x` is one already and has `dtype`.

    Raises
    ------
    TypeError
        If `x` does not hold numbers: strings, None, objects. `name` opens the message.
    ValueError
        If `x` is a ragged list.
    """
    x = as_real_array(x, name)
    if GPU and isinstance(x, numpy.ndarray) and x.nbytes > _LARGE:
        native = numpy.dtype(x.dtype if dtype is None else dtype).newbyteorder("=")
        x = numpy.asarray(x, native, order="A")
        y: Any = np.empty(x.shape, native, order="F" if x.flags.fnc else "C")
        y.set(x)
        return y
    with numpy.errstate(under="ignore"):
        return np.asarray(x, dtype)


def as_real_array(x: Any, name: str) -> Array:
    """Return `x` as an array of real numbers where it lies: lists become host arrays."""
    if not isinstance(x, _ARRAYS):
        for part in x if isinstance(x, list | tuple) else ():
            check_unmasked(part, name)
        given = x
        try:
            x = numpy.asarray(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: expected an array or a list of numbers, got {describe(x)} ({error})") from error
        if x.dtype.kind == "O":
            held = " of what fits no number dtype" if isinstance(given, list | tuple) else ""
            raise TypeError(f"{name}: expected real numbers, got {describe(given)}{held}")
    check_unmasked(x, name)
    if x.dtype.kind not in "fiub":
        raise TypeError(
            f"{name}: expected real numbers, got {x.dtype}; convert with astype(...) or leave out what is no number"
        )
    return x


def check_unmasked(x: Any, name: str) -> None:
    """Raise a TypeError if `x` is a numpy.ma.MaskedArray with masked elements."""
    if isinstance(x, _ARRAYS) and type(x) not in _ARRAYS and numpy.any(getattr(x, "mask", False)):
        raise TypeError(f"{name}: expected an array without a mask; fill the masked elements with filled(...)")


def is_writable(x: Array) -> bool:
    """Return whether `x` may be written into; CuPy's arrays always may."""
    return GPU or x.flags.writeable


def address(x: Any) -> int:
    """Return where the first element of `x` lies in memory."""
    return int(x.data.ptr if GPU else x.ctypes.data)


def chunk_bytes(x: Any) -> int:
    """Return how many bytes of the training data `x` to gather at a time.

    On the CPU what fits beside a step in the second-level cache; on the GPU, where a gather is two
    launches whatever its size, a quarter of the free memory: a whole epoch of most data. It waits while
    the host gathers what did not fit there, so that goes in smaller pieces.
    """
    if not GPU:
        return 1 << 18
    return _free_bytes() // 4 if isinstance(x, Array) else min(_free_bytes() // 4, 1 << 28)


def fits_on_device(*arrays: Any) -> bool:
    """Return whether those of `arrays` that are on the host may be moved and leave half of the device's memory free."""
    return not GPU or sum(a.nbytes for a in arrays if not isinstance(a, Array)) <= _free_bytes() // 2


def _free_bytes() -> int:
    """Return the device's free memory, with what CuPy's pool keeps for the next arrays."""
    return int(_cupy.cuda.runtime.memGetInfo()[0] + _cupy.get_default_memory_pool().free_bytes())


def devices() -> int:
    """Return how many GPUs this process sees; on the CPU 0."""
    return int(_cupy.cuda.runtime.getDeviceCount()) if GPU else 0


def bus_id() -> str:
    """Return where on this machine's bus the GPU in use sits; on the CPU nothing."""
    return str(_cupy.cuda.Device().pci_bus_id) if GPU else ""


def set_device(index: int) -> None:
    """Make GPU number `index`, counted round those that are there, the one that arrays are made on."""
    if GPU:
        _cupy.cuda.Device(index % devices()).use()


def empty_pinned_like(x: Array) -> Any:
    """Return uninitialised host memory like `x` that the GPU copies from and to by itself; on the CPU `x`."""
    return importlib.import_module("cupyx").empty_pinned(x.shape, x.dtype) if GPU else x


def nccl() -> Any:
    """Return CuPy's door to NCCL, or None where there is no NCCL, as on the CPU."""
    if not GPU:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that NCCL is not installed, which is what is asked
        library = importlib.import_module("cupy.cuda.nccl")
    return library if library.available else None


def current_stream_ptr() -> int:
    """Return the address of CuPy's current stream; on the CPU 0."""
    return int(_cupy.cuda.get_current_stream().ptr) if GPU else 0


def synchronize() -> None:
    """Wait until the GPU has done what its current stream was asked for; on the CPU there is nothing to wait for."""
    if GPU:
        _cupy.cuda.get_current_stream().synchronize()


def array_module() -> str:
    """Return the name of the array module, for `show_config`, and how it was chosen."""
    return "CuPy (NNX_GPU is on)" if GPU else "NumPy (set NNX_GPU=1 for CuPy)"


def describe_gpu() -> list[tuple[str, str]]:
    """Return the versions of CuPy and CUDA and the GPU in use, as rows for `show_config`; on the CPU none."""
    if not GPU:
        return []
    runtime = _cupy.cuda.runtime
    device = _cupy.cuda.Device()
    name = runtime.getDeviceProperties(device.id)["name"].decode()
    free, total = device.mem_info
    return [
        ("CuPy", f"{np.__version__}, CUDA {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}"),
        ("device", f"{device.id}: {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"),
    ]


def describe(x: Any) -> str:
    """Say what `x` is, for an error: its type, and the dtype of an array."""
    kind = type(x)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{where}{kind.__qualname__}" + (f" of {x.dtype}" if hasattr(x, "dtype") else "")
