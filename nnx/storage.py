"""Host arrays and strings in a safetensors file: written atomically, and validated when read.

The format is a length of 8 bytes, a JSON header with names, dtypes, shapes and offsets, and the data. Files written
by nnx have a digest of all of it in the header's metadata; files from other libraries have none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy

__all__ = ["TEMP_PREFIX", "Reader", "atomic_save", "import_safetensors", "open_checked", "warn"]

TEMP_PREFIX = ".saving-"  # of the temporary folder next to the target of a save
_DIGEST = "nnx.digest"
_DTYPES = {
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
}
_MAX_HEADER_BYTES = 1 << 24  # the format allows six times as many, but parsed JSON needs many times its length


def import_safetensors() -> Any:
    """Return the NumPy module of safetensors, or raise an ImportError that says how to install it."""
    try:
        from safetensors import numpy as format  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("nnx saves with safetensors: pip install safetensors") from error
    return format


def warn(message: str) -> None:
    """Issue a RuntimeWarning at the line that called nnx, whatever the call depth."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nnx."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def atomic_save(path: Path, arrays: Mapping[str, numpy.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a temporary file, fsync it and rename it over `path` (atomic).

    Raises
    ------
    OSError
        If the file cannot be written, for example to a full disk, or `path` is a folder, a device or a pipe; it
        names `path`. The old file is unchanged, the temporary one removed. Once the file has its name, a refused
        chmod or fsync of its folder is only a RuntimeWarning.
    """
    import tempfile  # noqa: PLC0415 - as in _digest

    library = import_safetensors()
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(f"{path}: not saved: not a regular file")
    target = path.resolve()  # a symbolic link is kept, its target replaced
    arrays = {name: numpy.asarray(a, order="C") for name, a in arrays.items()}
    for name, a in arrays.items():
        if a.dtype.name not in _DTYPES.values():
            raise TypeError(f"{path}: {name} is {a.dtype}, which safetensors files cannot hold")
    digest = _digest(metadata, {n: (a.dtype.name, a.shape, [_little_endian_bytes(a)]) for n, a in arrays.items()})
    try:
        with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=target.parent) as folder:
            file = Path(folder, path.name)
            file.touch()  # for the default permissions of a new file; the library would make it private
            mode = stat.S_IMODE((target if target.exists() else file).stat().st_mode)
            library.save_file(arrays, file, {**metadata, _DIGEST: digest})
            _attempt(f"{path}: saved, but its permissions could not be set", lambda: file.chmod(mode))
            _fsync(file, os.O_RDWR)  # Windows flushes only what may be written
            file.replace(target)
    except Exception as error:  # the library's errors hold the system's message, but are no OSError
        raise OSError(f"{path}: not saved: {error}") from error
    if sys.platform != "win32":  # which cannot fsync a folder
        _attempt(f"{path}: saved, but its folder could not be flushed", lambda: _fsync(target.parent, os.O_RDONLY))


@contextlib.contextmanager
def open_checked(path: Path) -> Iterator[Reader]:
    """Open and validate a safetensors file from any library, and yield a `Reader` of its arrays.

    Raises
    ------
    OSError, ValueError
        If the file cannot be opened, is not a complete safetensors file, or does not match its digest. The message
        names `path`. Validation needs no more memory than the header.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
        raise OSError(f"{path}: not a file")
    with open(path, "rb") as file:
        try:
            yield Reader(file)
        except _CorruptFileError as error:
            raise ValueError(f"{path}: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}: metadata is nested too deeply") from error


class _CorruptFileError(Exception):
    """A file is damaged or not in the safetensors format; the message gives the reason."""


class Reader:
    """An open file with a valid header and a matching digest.

    Attributes
    ----------
    arrays : dict of name to (dtype, shape)
        NumPy's name of the dtype, or the file's if NumPy has no such dtype.
    metadata : dict of str to str
    has_digest : bool
        Whether the file has a digest, as files written by nnx do.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        header, self._start, size = _header(file)
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise _CorruptFileError("the metadata in its header are not strings")
        self._offsets = {name: _entry(name, entry) for name, entry in header.items()}
        self.arrays = {name: (dtype, shape) for name, (dtype, shape, _, _) in self._offsets.items()}
        end = 0
        for name, (_, _, begin, after) in sorted(self._offsets.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise _CorruptFileError(f"{name!r} begins at byte {begin} of the data, where {end} was expected")
            end = after
        if end != size:
            raise _CorruptFileError(f"its header describes {end} bytes of data, but the file has {size}")
        digest = self.metadata.pop(_DIGEST, None)
        self.has_digest = digest is not None
        if self.has_digest or any(key.startswith("nnx") for key in self.metadata):
            entries = {n: (d, s, self._chunks(a, b)) for n, (d, s, a, b) in self._offsets.items()}
            if digest != _digest(self.metadata, entries):
                raise _CorruptFileError("damaged: the digest does not match the contents")

    def read(self, name: str) -> numpy.ndarray:
        """Return the array `name`, whose dtype must be one that NumPy has."""
        dtype, shape, begin, _ = self._offsets[name]
        array = numpy.empty(shape, numpy.dtype(dtype).newbyteorder("<"))
        self._file.seek(self._start + begin)
        if array.size and self._file.readinto(array.reshape(-1).view(numpy.uint8)) != array.nbytes:  # type: ignore[attr-defined]
            raise _CorruptFileError("the file was truncated while it was read")
        return array.astype(dtype, copy=False)

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        self._file.seek(self._start + begin)
        while begin < end:
            chunk = self._file.read(min(end - begin, 1 << 20))
            if not chunk:
                raise _CorruptFileError("the file was truncated while it was read")
            begin += len(chunk)
            yield chunk


def _header(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Return the header, the offset of the data in the file, and their size in bytes."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise _CorruptFileError(
            f"not a safetensors file: it has {size} bytes, too few for a header of the {length} bytes that it declares"
        )
    if length > _MAX_HEADER_BYTES:
        raise _CorruptFileError(f"its header of {length} bytes exceeds the limit of {_MAX_HEADER_BYTES}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise _CorruptFileError(f"not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _CorruptFileError("not a safetensors file: its header is not a JSON object")
    return header, 8 + length, size - 8 - length


def _reject_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise _CorruptFileError(f"duplicate header entry {name!r}")
    return items


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Validate a header entry; return its dtype, shape, and begin and end offset."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _CorruptFileError(f"header entry {name!r} must contain exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if (
        not isinstance(dtype, str)
        or not _is_index_list(shape)
        or not _is_index_list(offsets)
        or len(shape) > 32
        or len(offsets) != 2
    ):
        raise _CorruptFileError(f"invalid dtype, shape or offsets for {name!r}")
    begin, end = offsets
    dtype_name = _DTYPES.get(dtype, dtype)
    if end < begin or (dtype in _DTYPES and math.prod(shape) * numpy.dtype(dtype_name).itemsize != end - begin):
        raise _CorruptFileError(f"{name!r} of {dtype} {tuple(shape)} has {end - begin} bytes")
    return dtype_name, tuple(shape), begin, end


def _is_index_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, tuple[str, Sequence[int], Any]]) -> str:
    """Return the digest of metadata, names, dtypes, shapes and bytes."""
    import hashlib  # noqa: PLC0415 - it loads OpenSSL, and `import nnx` loads nothing that only files need

    names = sorted(arrays)
    header = [sorted(metadata.items()), [[name, *arrays[name][:2]] for name in names]]
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=32)
    for name in names:
        for chunk in arrays[name][2]:
            digest.update(chunk)
    return digest.hexdigest()


def _little_endian_bytes(array: numpy.ndarray) -> numpy.ndarray:
    """Return the bytes of `array` in the byte order of the file."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(numpy.uint8)


def _attempt(failure: str, action: Callable[[], Any]) -> None:
    """Call `action`; an OSError is a warning that begins with `failure`."""
    try:
        action()
    except OSError as error:
        warn(f"{failure}: {error}")


def _fsync(path: Path, flags: int) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
