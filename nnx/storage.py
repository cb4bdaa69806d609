"""Host arrays and strings in one safetensors file: written whole or not at all, read without trust.

The format is a length of 8 bytes, a JSON header of names, dtypes, shapes and offsets, and the bytes. Files of
nnx have a digest of all of it in the header's metadata; files of others have none.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy

__all__ = ["TEMP_PREFIX", "Reader", "atomic_save", "import_safetensors", "open_checked", "warn"]

TEMP_PREFIX = ".saving-"  # of the folders that a save works in, beside its target
_DIGEST = "nnx.digest"
_DTYPES = {
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
}
_MAX_HEADER_BYTES = (
    1 << 24
)  # bytes of a header; the format allows six times as many, and JSON costs many times its length


def import_safetensors() -> Any:
    """Return safetensors' module for NumPy, or raise the one error that says how to get it."""
    try:
        from safetensors import numpy as format  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("nnx saves with safetensors: pip install safetensors") from error
    return format


def warn(message: str) -> None:
    """Give a RuntimeWarning at the line that called nnx, however deep inside we are."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nnx."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def atomic_save(path: Path, arrays: Mapping[str, numpy.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file beside `path`, see it on the disk, and give it that name: until then the old one stays.

    Raises
    ------
    OSError
        That names `path`, such as for a full disk; the old file is untouched, the new one removed.
    """
    import tempfile  # noqa: PLC0415 - as in _digest

    library, target = import_safetensors(), path.resolve()  # not the link that `path` may be
    arrays = {name: numpy.asarray(a, order="C") for name, a in arrays.items()}
    for name, a in arrays.items():
        if a.dtype.name not in _DTYPES.values():
            raise TypeError(f"{path}: {name} is {a.dtype}, which safetensors files cannot hold")
    digest = _digest(metadata, {n: (a.dtype.name, a.shape, [_little_endian_bytes(a)]) for n, a in arrays.items()})
    try:
        with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=target.parent) as folder:
            file = Path(folder, path.name)
            file.touch()  # as any new file, where the library's would be private
            mode = stat.S_IMODE((target if target.exists() else file).stat().st_mode)
            library.save_file(arrays, file, {**metadata, _DIGEST: digest})
            file.chmod(mode)
            _fsync(file)
            file.replace(target)
        _fsync(target.parent)
    except Exception as error:  # the library's own hold the system's words, but not its class
        raise OSError(f"{path}: not saved: {error}") from error


@contextlib.contextmanager
def open_checked(path: Path) -> Iterator[Reader]:
    """Open a file that somebody has written, nnx or not, and yield what reads its arrays.

    Raises
    ------
    OSError, ValueError
        That name `path`: for a file that cannot be opened, or is not a whole safetensors file, or does not have the
        bytes that its digest was made of. Neither costs more memory than the header.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise OSError(f"{path}: not a file")
    with open(path, "rb") as file:
        try:
            yield Reader(file)
        except _CorruptFileError as error:
            raise ValueError(f"{path}: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}: its metadata are lists in lists without end") from error


class _CorruptFileError(Exception):
    """Says what is wrong with a file."""


class Reader:
    """An open file whose header and digest are right.

    Attributes
    ----------
    arrays : dict of name to (dtype, shape)
        The dtype in NumPy's word for it, or the file's where NumPy has none.
    metadata : dict of str to str
    has_digest : bool
        Whether the file is one of nnx, with a digest.
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
            raise _CorruptFileError(f"its header describes {end} bytes of data, and there are {size}")
        digest = self.metadata.pop(_DIGEST, None)
        self.has_digest = digest is not None
        if self.has_digest or any(key.startswith("nnx") for key in self.metadata):
            entries = {n: (d, s, self._chunks(a, b)) for n, (d, s, a, b) in self._offsets.items()}
            if digest != _digest(self.metadata, entries):
                raise _CorruptFileError("damaged: its digest is not that of its contents")

    def read(self, name: str) -> numpy.ndarray:
        """Return the array `name`, one of `arrays` whose dtype NumPy has."""
        dtype, shape, begin, _ = self._offsets[name]
        array = numpy.empty(shape, numpy.dtype(dtype).newbyteorder("<"))
        self._file.seek(self._start + begin)
        if array.size and self._file.readinto(array.reshape(-1).view(numpy.uint8)) != array.nbytes:  # type: ignore[attr-defined]
            raise _CorruptFileError("it became shorter while it was read")
        return array.astype(dtype, copy=False)

    def _chunks(self, begin: int, end: int) -> Iterator[bytes]:
        self._file.seek(self._start + begin)
        while begin < end:
            chunk = self._file.read(min(end - begin, 1 << 20))
            if not chunk:
                raise _CorruptFileError("it became shorter while it was read")
            begin += len(chunk)
            yield chunk


def _header(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Return the header, where the data begin, and how many bytes of them there are."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise _CorruptFileError(
            f"no safetensors file: its {size} bytes cannot hold the header of {length} that it begins with"
        )
    if length > _MAX_HEADER_BYTES:
        raise _CorruptFileError(f"its header of {length} bytes is longer than the {_MAX_HEADER_BYTES} that nnx reads")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise _CorruptFileError(f"no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _CorruptFileError("no safetensors file: its header is not an object of JSON")
    return header, 8 + length, size - 8 - length


def _reject_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise _CorruptFileError(f"its header has {name!r} twice")
    return items


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape and the first and last offset of a header's entry."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _CorruptFileError(f"its header says of {name!r} something else than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if (
        not isinstance(dtype, str)
        or not _is_index_list(shape)
        or not _is_index_list(offsets)
        or len(shape) > 32
        or len(offsets) != 2
    ):
        raise _CorruptFileError(f"the dtype, shape or offsets of {name!r} are no such thing")
    begin, end = offsets
    word = _DTYPES.get(dtype, dtype)
    if end < begin or (dtype in _DTYPES and math.prod(shape) * numpy.dtype(word).itemsize != end - begin):
        raise _CorruptFileError(f"{name!r} of {dtype} {tuple(shape)} has {end - begin} bytes")
    return word, tuple(shape), begin, end


def _is_index_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, tuple[str, Sequence[int], Any]]) -> str:
    """Return the digest over metadata, names, dtypes, shapes and bytes."""
    import hashlib  # noqa: PLC0415 - it loads OpenSSL, and importing nnx imports nothing that only files need

    names = sorted(arrays)
    header = [sorted(metadata.items()), [[name, *arrays[name][:2]] for name in names]]
    digest = hashlib.blake2b(json.dumps(header).encode(), digest_size=32)
    for name in names:
        for chunk in arrays[name][2]:
            digest.update(chunk)
    return digest.hexdigest()


def _little_endian_bytes(array: numpy.ndarray) -> numpy.ndarray:
    """Return the bytes of `array` as in the file."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(numpy.uint8)


def _fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and sys.platform == "win32":  # which has no such call for folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
