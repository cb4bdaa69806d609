"""Conversion of arguments to arrays, transfers between host and device, and queries of the device.

All functions work on both devices; on the CPU a transfer copies nothing.
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
quiet = numpy.errstate(under="ignore")  # decorator for functions that may underflow: a result of 0 is correct there
_FLOAT32, _FLOAT64 = numpy.dtype("float32"), numpy.dtype("float64")
_LARGE = 1 << 26  # bytes; CuPy copies an upload to pinned memory that it never frees

__all__ = ["asarray", "synchronize", "to_cpu", "to_gpu"]


def to_cpu(x: Any) -> numpy.ndarray:
    """Return `x` as a NumPy array; on the GPU this waits for pending work on `x`.

    Examples
    --------
    >>> from nnx import np, to_cpu
    >>> to_cpu(np.arange(3))
    array([0, 1, 2])
    """
    return _cupy.asnumpy(x) if GPU else numpy.asarray(x)


def to_gpu(x: Any) -> Array:
    """Return `x` as a CuPy array.

    Raises
    ------
    RuntimeError
        If `NNX_GPU` is not on: the array module is then NumPy, and no layer accepts CuPy arrays.

    Examples
    --------
    >>> from nnx import GPU, to_gpu
    >>> if GPU:
    ...     x = to_gpu([1.0, 2.0])
    """
    if not GPU:
        raise RuntimeError("to_gpu: nnx runs on NumPy; start Python with NNX_GPU=1 to train on the GPU")
    return asarray(x)


def asarray(x: Any, dtype: Any = None, *, name: str = "asarray") -> Array:
    """Convert `x`, a NumPy or CuPy array or a nested list, to an array of the array module.

    `x` is not copied if it already is such an array with `dtype`.

    Raises
    ------
    TypeError
        If `x` does not hold numbers (strings, None, objects). `name` is the prefix of the message.
    ValueError
        If `x` is a ragged list.

    Examples
    --------
    >>> from nnx import asarray
    >>> print(asarray([[1, 2], [3, 4]], "float32"))
    [[1. 2.]
     [3. 4.]]
    """
    x = as_real_array(x, name)
    if GPU and dtype is None and x.dtype.itemsize > 8:  # CuPy has no longdouble
        raise TypeError(f"{name}: expected real numbers of at most 64 bits, got {x.dtype}; convert them")
    if GPU and isinstance(x, numpy.ndarray) and x.nbytes > _LARGE:
        native = numpy.dtype(x.dtype if dtype is None else dtype).newbyteorder("=")
        x = numpy.asarray(x, native, order="A")
        y: Any = np.empty(x.shape, native, order="F" if x.flags.fnc else "C")
        y.set(x)
        return y
    with numpy.errstate(under="ignore"):
        return np.asarray(x, dtype)


def as_real_array(x: Any, name: str) -> Array:
    """Return `x` as an array of real numbers without moving it between devices; lists become host arrays."""
    if not isinstance(x, _ARRAYS):
        for part in x if isinstance(x, list | tuple) else ():
            check_unmasked(part, name)
        given = x
        try:
            x = numpy.asarray(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: expected an array or a list of numbers, got {describe(x)} ({error})") from error
        if x.dtype.kind == "O":
            x = _from_objects(given, name)
    elif type(x) not in (*_ARRAYS, numpy.memmap):
        check_unmasked(x, name)
        x = numpy.asarray(x)  # a numpy.matrix would keep two axes
    if x.dtype.kind in "SUT":
        raise TypeError(
            f"{name}: expected real numbers, got strings; make labels integers with "
            "classes, t = numpy.unique(labels, return_inverse=True)"
        )
    if x.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}; convert them, or remove such columns")
    return x


def _from_objects(given: Any, name: str) -> numpy.ndarray:
    """Return `given`, whose NumPy array is one of objects, as numbers: a table of columns with nullable dtypes."""
    if not hasattr(given, "isna"):
        of = " of objects without a numeric dtype" if isinstance(given, list | tuple) else ""
        raise TypeError(f"{name}: expected real numbers, got {describe(given)}{of}")
    table = hasattr(given, "columns")  # a pandas.DataFrame, or a Series
    for column, dtype in given.dtypes.items() if table else [(given.name, given.dtype)]:
        if getattr(dtype, "kind", "O") not in "fiub":
            raise TypeError(f"{name}: column {column!r} holds {dtype}, not real numbers; encode it, or remove it")
    if given.isna().to_numpy().any():
        raise ValueError(f"{name}: {describe(given)} has missing values; fill or remove them")
    return given.astype("float64" if table else given.dtype.numpy_dtype).to_numpy()


def check_unmasked(x: Any, name: str) -> None:
    """Raise a TypeError if `x` is a numpy.ma.MaskedArray with masked elements."""
    if isinstance(x, _ARRAYS) and type(x) not in _ARRAYS and numpy.any(getattr(x, "mask", False)):
        raise TypeError(f"{name}: expected an array without a mask; fill the masked elements with filled(...)")


def is_writable(x: Array) -> bool:
    """Return whether `x` is writable; CuPy arrays always are."""
    return GPU or x.flags.writeable


def address(x: Any) -> int:
    """Return the memory address of the first element of `x`."""
    return int(x.data.ptr if GPU else x.ctypes.data)


def chunk_bytes(x: Any) -> int:
    """Return how many bytes of the training data `x` to gather at a time.

    On the CPU a chunk fits in the L2 cache beside the data of a step. On the GPU, where a gather takes two
    launches whatever its size, it is a quarter of the free memory: a whole epoch for most data. The GPU is idle
    while the host gathers data that does not fit in device memory, so those chunks are smaller.
    """
    if not GPU:
        return 1 << 18
    return _free_bytes() // 4 if isinstance(x, Array) else min(_free_bytes() // 4, 1 << 28)


def fits_on_device(*arrays: Any) -> bool:
    """Return whether moving the host arrays among `arrays` takes at most half of the free device memory."""
    return not GPU or sum(a.nbytes for a in arrays if not isinstance(a, Array)) <= _free_bytes() // 2


def _free_bytes() -> int:
    """Return the free device memory, including the free blocks of CuPy's memory pool."""
    return int(_cupy.cuda.runtime.memGetInfo()[0] + _cupy.get_default_memory_pool().free_bytes())


def devices() -> int:
    """Return the number of GPUs visible to this process; 0 on the CPU."""
    return int(_cupy.cuda.runtime.getDeviceCount()) if GPU else 0


def bus_id() -> str:
    """Return the PCI bus id of the current GPU; an empty string on the CPU."""
    return str(_cupy.cuda.Device().pci_bus_id) if GPU else ""


def set_device(index: int) -> None:
    """Make GPU `index`, modulo the number of GPUs, the current device."""
    if GPU:
        _cupy.cuda.Device(index % devices()).use()


def empty_pinned_like(x: Array) -> Any:
    """Return an uninitialized array like `x` in pinned host memory; on the CPU `x` itself."""
    return importlib.import_module("cupyx").empty_pinned(x.shape, x.dtype) if GPU else x


def nccl() -> Any:
    """Return CuPy's NCCL module, or None if NCCL is unavailable, as on the CPU."""
    if not GPU:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns if NCCL is not installed
        library = importlib.import_module("cupy.cuda.nccl")
    return library if library.available else None


def current_stream_ptr() -> int:
    """Return the address of CuPy's current stream; 0 on the CPU."""
    return int(_cupy.cuda.get_current_stream().ptr) if GPU else 0


def synchronize() -> None:
    """Wait until the GPU has finished all work queued on its current stream; a no-op on the CPU.

    Examples
    --------
    >>> import time
    >>> from nnx import np, synchronize
    >>> begin = time.perf_counter()
    >>> y = np.ones((64, 64)) @ np.ones((64, 64))
    >>> synchronize()  # a GPU may still be computing y
    >>> seconds = time.perf_counter() - begin
    """
    if GPU:
        _cupy.cuda.get_current_stream().synchronize()


def array_module() -> str:
    """Return the name of the array module, for `show_config`, and how it was chosen."""
    return "CuPy (NNX_GPU is on)" if GPU else "NumPy (set NNX_GPU=1 for CuPy)"


def describe_gpu() -> list[tuple[str, str]]:
    """Return the versions of CuPy and CUDA and the current GPU as rows for `show_config`; no rows on the CPU."""
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
    """Describe `x` for an error message: its type, and the dtype of an array."""
    kind = type(x)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{where}{kind.__qualname__}" + (f" of {x.dtype}" if hasattr(x, "dtype") else "")
