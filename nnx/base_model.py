"""The book's base class of models, and a safe reader of the pickle files that the book's models are saved in.

A pickle file is a program, and `pickle.load` runs whatever it says. `load_pickle` builds only arrays, lists, tuples,
dicts, numbers and strings, and runs no code of the file.
"""

from __future__ import annotations

import math
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from nnx.checks import check_weights
from nnx.device import asarray, is_writable, to_cpu
from nnx.np import Array
from nnx.tree import TiedModel, TiedParameters

__all__ = ["BaseModel", "load_pickle"]

_MAX_AXES = 32


class BaseModel(TiedModel):
    """A model with `params` and `grads`, which subclasses set to lists of arrays, and files of its parameters.

    The files are the book's, a pickled list of float16 arrays: they have the precision of 3 decimal digits, and
    neither the state of layers nor that of an optimizer. `nnx.checkpoint` saves everything, in full precision.
    Weights shared between layers, as the same array or as W and W.T, stay shared in copies, pickles and both files.

    Examples
    --------
    >>> from nnx import Affine
    >>> from nnx.base_model import BaseModel
    >>> class Linear(BaseModel):
    ...     def __init__(self):
    ...         self.layer = Affine.init(3, 2, rng=0)
    ...         self.params, self.grads = self.layer.params, self.layer.grads
    >>> Linear().save_params("linear.pkl")
    >>> Linear().load_params("linear.pkl")
    """

    def __init__(self) -> None:
        self.params: Any = None
        self.grads: Any = None

    def forward(self, *args: Any) -> Any:
        """Raise NotImplementedError: subclasses return the loss."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, *args: Any) -> Any:
        """Raise NotImplementedError: subclasses write `grads`."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def save_params(self, file_name: str | os.PathLike[str] | None = None) -> None:
        """Save `params`, rounded to float16, to `file_name` or to <class name>.pkl in the current folder.

        A file of that name is replaced once the new one is complete.

        Raises
        ------
        ValueError
            If a parameter is beyond 65504, the largest number of float16, or NaN; `nnx.checkpoint.save` can save it.
        """
        name = f"{type(self).__name__}.save_params"
        arrays = [_as_float16(f"{name}: params[{i}]", p) for i, p in enumerate(self._checked_params(name))]
        _replace_file(self._path(file_name), pickle.dumps(arrays, protocol=4))

    def load_params(self, file_name: str | os.PathLike[str] | None = None) -> None:
        """Load the parameters that `save_params`, or the book's, wrote; they keep their arrays and dtypes.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If the file is damaged, does not hold an array of the same shape for each parameter, or holds different
            values for a weight that layers share. Nothing is changed.
        """
        name, path = f"{type(self).__name__}.load_params", self._path(file_name)
        params, arrays = self._checked_params(name), load_pickle(path)
        if not isinstance(arrays, list | tuple) or not all(
            isinstance(a, numpy.ndarray) and a.dtype.kind == "f" for a in arrays
        ):
            raise ValueError(f"{name}: {path} does not hold a list of floating arrays; read it with load_pickle")
        if (saved := [a.shape for a in arrays]) != (shapes := [p.shape for p in params]):
            raise ValueError(
                f"{name}: the parameters have the shapes {shapes}, those in {path} {saved}; create the model with the "
                "sizes that it was saved with"
            )
        for (i, _), *others in TiedParameters(params).groups:
            for j, transposed in others:
                if not numpy.array_equal(arrays[i].T if transposed else arrays[i], arrays[j], equal_nan=True):
                    raise ValueError(
                        f"{name}: params[{i}] and params[{j}] are one weight, but {path} has different values for them"
                    )
        for p, a in zip(params, arrays, strict=True):
            p[...] = asarray(a, p.dtype)

    def _path(self, file_name: str | os.PathLike[str] | None) -> Path:
        return Path(f"{type(self).__name__}.pkl" if file_name is None else file_name).expanduser()

    def _checked_params(self, name: str) -> list[Array]:
        """Return `params`; raise if they are not yet set, or not floating arrays that can be written."""
        if self.params is None:
            raise TypeError(f"{name}: params is None; set it to the list of parameters in __init__")
        for i, p in enumerate(self.params):
            check_weights(name, **{f"params[{i}]": p})
            if not is_writable(p) and name.endswith("load_params"):
                raise ValueError(f"{name}: params[{i}] is read-only; load into a copy")
        return list(self.params)


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Return the contents of a pickle file such as the book's `cbow_params.pkl`, without running code from it.

    The file may hold NumPy arrays and scalars of numbers, lists, tuples, dicts, numbers, strings and None, in pickle
    protocols 2 to 5. Arrays are NumPy arrays on both devices.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is damaged or holds anything else; nothing of it was run.

    Examples
    --------
    >>> import pickle
    >>> from nnx.base_model import load_pickle
    >>> with open("params.pkl", "wb") as file:
    ...     pickle.dump({"word_to_id": {"you": 0, "say": 1}}, file)
    >>> load_pickle("params.pkl")
    {'word_to_id': {'you': 0, 'say': 1}}
    """
    path = Path(path).expanduser()
    with path.open("rb") as file:
        try:
            return _Converter().convert(_Unpickler(file).load())
        except OSError:
            raise
        except Exception as error:  # damaged files raise almost any
            raise ValueError(
                f"load_pickle: {path} is damaged, or holds more than arrays, lists, dicts, numbers and strings: {error}"
            ) from error


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins for NumPy's objects, whose own `__setstate__` are not made for files that nobody can trust."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global name of the file."""
        function = _GLOBALS.get((module.replace("numpy._core", "numpy.core"), name))
        if function is None:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _Global(function)


class _Global:
    """A function that a file may call, and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _PickledDtype:
    """Stands for a dtype: a letter, a size, and the byte order that `__setstate__` adds."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *flags: Any) -> None:
        if not isinstance(code, str) or code[:1] not in tuple("biufc") or not code[1:].isdecimal():
            raise pickle.UnpicklingError(f"it holds an array of the dtype {code!r:.40}")
        self.dtype = numpy.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands for an array; `value` is set by `__setstate__`."""

    __slots__ = ("value",)

    def __init__(self, *args: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> numpy.ndarray:
    """Return a new array in native byte order."""
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _PickledDtype) or order not in ("C", "F"):
        raise pickle.UnpicklingError("it holds an array that is not one of numbers")
    if not isinstance(shape, tuple) or len(shape) > _MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError(f"it holds an array of the shape {shape!r:.80}")
    if len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise pickle.UnpicklingError(f"it holds {len(data)} bytes for an array of {dtype.dtype} {shape}")
    array = numpy.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="), order=order)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array.value = _from_bytes(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> _PickledArray:
    array = _array(data, dtype, (), "C")
    array.value = array.value[()]
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how protocol 2 writes bytes
        raise pickle.UnpicklingError(f"it holds text in {encoding!r:.40}")
    return text.encode("latin1")


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # protocol 2's empty bytes
}


class _Converter:
    """Replaces the stand-ins by what they stand for, in new containers; an object used twice stays one object."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def convert(self, value: Any) -> Any:
        """Return `value` converted; raise for an object that is neither a container nor a number or string."""
        if type(value) in (str, int, float, bool, type(None)):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = self._convert(value)
        return self.known[id(value)]

    def _convert(self, value: Any) -> Any:
        if type(value) is dict:
            return {self.convert(key): self.convert(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.convert, value))
        if type(value) is _PickledArray and value.value is not None:
            return value.value
        raise pickle.UnpicklingError(f"it holds an object of {type(value).__name__}")


def _as_float16(name: str, p: Array) -> numpy.ndarray:
    """Return `p` as a float16 array on the host."""
    with numpy.errstate(over="ignore", under="ignore"):
        array = to_cpu(p).astype(numpy.float16)
    if not numpy.isfinite(array).all():
        raise ValueError(
            f"{name} holds NaN, or numbers beyond 65504, the largest of float16; save it with nnx.checkpoint.save"
        )
    return array


def _replace_file(path: Path, data: bytes) -> None:
    """Write a file next to `path` and rename it to that (atomic)."""
    target = path.resolve()  # a symbolic link is kept, its target replaced
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as folder:
        file = Path(folder, target.name)
        file.write_bytes(data)
        file.replace(target)
