"""Training data: validation, batching and sharding over ranks; and the weighted mean of batch losses."""

from __future__ import annotations

import mmap
import numbers
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy

from nnx.checks import check_same_length
from nnx.device import asarray, quiet, to_cpu
from nnx.kernels import gather
from nnx.models import Sequential
from nnx.np import Array, np
from nnx.tree import memory_keys

__all__ = [
    "WeightedMean",
    "array_addresses",
    "batches",
    "check_data",
    "check_not_rebound",
    "check_settings",
    "checksum",
    "parameter_dtype",
    "sharded_batches",
]

_PIECE_BYTES = 1 << 22  # data checked, cast and copied at a time
_COLUMN_CHUNK_BYTES = 1 << 24  # rows gathered at a time from a file in Fortran order; each gather reads all its pages


class WeightedMean:
    """The mean of batch losses, weighted by batch size and accumulated on the device.

    There is one total per batch size, so that a step costs one addition.
    """

    def __init__(self, state: Iterable[Any] = ()) -> None:
        state = list(state)
        self.totals: dict[int, Any] = {int(rows): _float64(total) for rows, total, _ in state}
        self.counts: dict[int, int] = {int(rows): int(count) for rows, _, count in state}

    def state(self) -> numpy.ndarray:
        """Return one row (batch size, sum of losses, number of losses) per batch size."""
        rows = [(n, float(total), self.counts[n]) for n, total in self.totals.items()]
        return numpy.array(rows, numpy.float64).reshape(-1, 3)

    def add(self, loss: Any, rows: int) -> None:
        """Add the mean loss of a batch of `rows` rows."""
        if rows in self.totals:
            self.totals[rows] += loss
            self.counts[rows] += 1
        else:
            self.totals[rows] = _float64(loss)
            self.counts[rows] = 1

    def value(self) -> float:
        """Return the mean of all losses since the last `pop`."""
        total = sum(rows * float(total) for rows, total in self.totals.items())
        return total / sum(rows * count for rows, count in self.counts.items())

    def pop(self) -> float:
        """Return the mean and reset it."""
        mean = self.value()
        self.totals, self.counts = {}, {}
        return mean


def _float64(loss: Any) -> Any:
    """Return `loss` in float64: a NumPy scalar, whose addition is faster than an array's, or a CuPy array."""
    return np.array(loss, np.float64)[()]


def batches(
    x: Array, t: Array, order: numpy.ndarray, batch_size: int, bytes_at_once: int, dtype: Any = None
) -> Iterator[tuple[Array, Array, int]]:
    """Yield the rows of `x` and `t` in `order`, `batch_size` at a time, with their number.

    As many whole batches as fit in `bytes_at_once` are gathered together and yielded as slices, the last one as a
    copy: a model keeps its last input, and a slice would keep all of the gathered rows in memory. Floating data are
    cast to `dtype`.
    """
    if _is_mapped_in_columns(x) or _is_mapped_in_columns(t):
        bytes_at_once = max(bytes_at_once, _COLUMN_CHUNK_BYTES)
    batch_bytes = (x.nbytes + t.nbytes) // len(x) * batch_size
    chunk = max(1, bytes_at_once // max(1, batch_bytes)) * batch_size
    rows = order if isinstance(x, numpy.ndarray) else asarray(order)
    for start in range(0, len(order), chunk):
        part = rows[start : start + chunk]
        xs, ts = _gather_rows(x, part, dtype), _gather_rows(t, part, dtype)
        for i in range(0, len(xs), batch_size):
            batch, targets = xs[i : i + batch_size], ts[i : i + batch_size]
            if 0 < i >= len(xs) - batch_size:
                batch, targets = batch.copy(), targets.copy()
            yield batch, targets, len(batch)


def _gather_rows(data: Array, rows: Array, dtype: Any) -> Array:
    """Return the `rows` of `data` on the device in C order; floating data are cast to `dtype`."""
    if _is_mapped_in_columns(data):
        ascending = rows.argsort()  # neighboring rows share pages and cache lines
        gathered = numpy.empty((len(rows), *data.shape[1:]), data.dtype)
        gathered[ascending] = gather(data, rows[ascending])
    else:
        gathered = gather(data, rows)
    return _cast(asarray(gathered), _step_dtype(data, dtype))


@quiet
def _cast(data: Array, dtype: Any) -> Array:
    return data.astype(dtype, copy=False)


def sharded_batches(
    x: Array, t: Array, order: numpy.ndarray, batch_size: int, bytes_at_once: int, comm: Any, dtype: Any = None
) -> Iterator[tuple[Array, Array, int]]:
    """Yield this rank's slice of each batch, which may be empty, and the number of rows of the whole batch."""
    whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shards = [rows[comm.shard(len(rows))] for rows in whole]
    shard_size = len(shards[0]) if shards and len(shards[0]) else 1
    gathered = batches(x, t, numpy.concatenate([order[:0], *shards]), shard_size, bytes_at_once, dtype)
    for rows, part in zip(whole, shards, strict=True):  # only the last shard may be shorter, as in `batches`
        xs, ts, _ = next(gathered) if len(part) else (x[:0], t[:0], 0)
        yield xs, ts, len(rows)


def check_data(name: str, model: Any, data: Any, *, copy: bool = True) -> tuple[Array, Array]:
    """Validate `data` and return x and t, on the host or the device, prepared for gathering rows.

    Floating data are cast to the dtype of the parameters. Host data whose rows are not contiguous are
    copied to C order, because gathering from columns takes about ten times as long. Memory-mapped files are
    neither cast nor copied; `batches` casts their rows. With `copy=False` nothing is cast or copied.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise ValueError(f"{name} must be a pair (x, t), got {data!r:.80}")
    if getattr(type(model), "forward", None) is Sequential.forward and model.loss_layer is None:
        raise ValueError(f"{name}: {type(model).__name__} has no loss_layer to learn from; pass one to its constructor")
    x, t = check_same_length(name, *data)
    dtype = parameter_dtype(model)
    x, t = (_check_finite(f"{name}: {n}", a, dtype, copy) for n, a in (("x", x), ("t", t)))
    targets = getattr(getattr(model, "loss_layer", None), "prepare_targets", None)
    if targets is not None and hasattr(model, "predict"):
        sample = asarray(_probe_rows(x))
        shape = model.predict(_cast(sample, _step_dtype(x, dtype))).shape[1:]
        if _is_mapped(t):  # only checked: converted labels may be larger than the file
            try:
                for _, part in _row_pieces(t):
                    targets(part, (len(part), *shape))
            except ValueError:
                targets(to_cpu(t), (len(t), *shape))  # raises again, with the shape of all rows in the message
                raise
        else:
            t = targets(to_cpu(t), (len(x), *shape))
    return x, t


def parameter_dtype(model: Any) -> Any:
    """Return the common dtype of the parameters of `model`, or None if they differ."""
    dtypes = {p.dtype for p in model.params}
    return dtypes.pop() if len(dtypes) == 1 else None


def _step_dtype(data: Array, dtype: Any) -> Any:
    """Return the dtype of batches of `data`: `dtype` for floating data, unless it is None."""
    return data.dtype if dtype is None or data.dtype.kind != "f" else dtype


def _is_mapped(data: Any) -> bool:
    """Return whether `data` is a memory-mapped file, or a view of one."""
    while isinstance(data, numpy.ndarray):
        data = data.base
    return isinstance(data.obj if isinstance(data, memoryview) else data, mmap.mmap)


def _rows_contiguous(data: Array) -> bool:
    """Return whether each row is C-contiguous; the stride between rows is arbitrary."""
    return bool(data[:1].flags.c_contiguous)


def _is_mapped_in_columns(data: Array) -> bool:
    return not _rows_contiguous(data) and _is_mapped(data)


def _row_pieces(data: Array) -> Iterator[tuple[int, Array]]:
    """Yield `data` a few megabytes at a time: the index of the first row, and the rows."""
    rows = max(1, _PIECE_BYTES // max(1, data.nbytes // len(data)))
    for start in range(0, len(data), rows):
        yield start, data[start : start + rows]


def array_addresses(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the memory keys of the arrays of `model`, and those of its layers, both by name."""

    def of(holder: Any, owner: str) -> dict[str, Any]:
        arrays = {
            f"{owner}{kind}[{i}]": a for kind in ("params", "grads") for i, a in enumerate(getattr(holder, kind, ()))
        }
        return {name: memory_keys(a)[0] for name, a in arrays.items()}

    layers = enumerate(getattr(model, "layers", ()))
    return of(model, ""), {name: key for i, layer in layers for name, key in of(layer, f"layers[{i}].").items()}


def check_not_rebound(model: Any, before: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Raise a ValueError if the first step replaced a parameter or gradient array shared by the model and a layer."""
    after = array_addresses(model)
    for one, other in ((0, 1), (1, 0)):
        for name, key in after[one].items():
            previous = before[one].get(name)
            if key != previous and previous in before[other].values() and key not in after[other].values():
                raise ValueError(
                    f"Trainer.fit: {name} of {type(model).__name__} is another array after the first step, not the one "
                    f"being trained; backward and update must write in place: {name}[...] = ..."
                )


def _probe_rows(x: Array) -> Array:
    """Return sample rows for a trial forward pass: the first, or those of the extreme integers (maybe bad indices)."""
    if x.dtype.kind not in "iu" or not x.size or _is_mapped(x):  # min and max would read the whole file
        return x[:1]
    axes = tuple(range(1, x.ndim))  # argmin over all axes would copy a non-contiguous x
    low, high = (x.min(axis=axes), x.max(axis=axes)) if axes else (x, x)
    return x[[int(low.argmin()), int(high.argmax())]]


def check_settings(rows: int, max_epoch: int, batch_size: int, max_grad: float | None, eval_interval: Any) -> None:
    """Validate the arguments of fit."""
    for name, value in (("max_epoch", max_epoch), ("batch_size", batch_size), ("eval_interval", eval_interval or 1)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"Trainer.fit: {name} must be an integer, got {value!r}")
    if max_epoch < 0:
        raise ValueError(f"Trainer.fit: max_epoch must be at least 0, got {max_epoch}")
    if not 1 <= batch_size <= rows:
        raise ValueError(f"Trainer.fit: batch_size must be 1 to {rows}, the number of rows, got {batch_size}")
    if not isinstance(max_grad, numbers.Real | None):
        raise TypeError(f"Trainer.fit: max_grad must be a number, or None, got {max_grad!r}")
    if max_grad is not None and not max_grad > 0:
        raise ValueError(f"Trainer.fit: max_grad must be positive, or None, got {max_grad}")
    if eval_interval is not None and eval_interval < 1:
        raise ValueError(f"Trainer.fit: eval_interval must be at least 1, or None, got {eval_interval}")


@numpy.errstate(over="ignore", under="ignore")
def _check_finite(name: str, data: Array, dtype: Any, copy: bool) -> Array:
    """Cast and copy `data` as in `check_data`; raise for NaN and infinity, also where the cast causes them."""
    dtype, floating = _step_dtype(data, dtype), data.dtype.kind == "f"
    module: Any = np if isinstance(data, np.ndarray) else numpy
    ready = data.dtype == dtype and (_rows_contiguous(data) or not isinstance(data, numpy.ndarray))
    result = data if ready or not copy or _is_mapped(data) else module.empty(data.shape, dtype)
    if result is data and not floating:
        return data
    for start, part in _row_pieces(data):
        if result is data:
            part = part.astype(dtype, copy=False)
        else:
            result[start : start + len(part)] = part
            part = result[start : start + len(part)]
        if floating and not module.isfinite(part).all():
            row = start + int(numpy.argwhere(~numpy.isfinite(to_cpu(part)))[0, 0])
            raise ValueError(f"{name} holds NaN or infinity in {dtype}, first in row {row}; clean or remove such rows")
    return result


def checksum(data: Array) -> str:
    """Return the shape, the dtype and a checksum of about a thousand rows."""
    rows = to_cpu(data[:: 1 + len(data) // 1000])
    return f"{data.shape} {data.dtype} of checksum {zlib.crc32(rows.tobytes()):x}"
