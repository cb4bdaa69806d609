"""Training data: validation, batching and sharding over ranks."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import numbers
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy

from nnx.checks import check_integer, check_metrics, check_same_length, takes_keyword
from nnx.device import as_real_array, asarray, chunk_bytes, fits_on_device, quiet, to_cpu
from nnx.kernels import gather
from nnx.models import Sequential
from nnx.np import Array, np

__all__ = [
    "ArrayData",
    "BatchData",
    "check_data",
    "check_validation",
    "checksum",
    "parameter_dtype",
    "prepare_data",
]

Batch: TypeAlias = tuple[Array, Array, Array | None, int]  # x, t, weights of the rows, and rows on all ranks
_PIECE_BYTES = 1 << 22  # data checked, cast and copied at a time
_COLUMN_CHUNK_BYTES = 1 << 24  # rows gathered at a time from a file in Fortran order; each gather reads all its pages


class ArrayData:
    """The arrays of a fit, in batches of rows that each epoch shuffles anew.

    Attributes
    ----------
    arrays : list of arrays
        x and t, and the weights of the rows if there are any.
    rows, batch_size, max_iter : int
        The number of rows, of rows per batch, and of batches per epoch.
    """

    def __init__(self, arrays: Sequence[Array], batch_size: int, drop_last: bool) -> None:
        self.arrays, self.rows, self.batch_size = list(arrays), len(arrays[0]), int(batch_size)
        self.max_iter = self.rows // batch_size if drop_last else -(-self.rows // batch_size)

    def to_device(self) -> None:
        """Move the arrays to the device if they fit, and determine how many rows to gather at a time."""
        move = asarray if fits_on_device(*self.arrays) else to_cpu
        self.arrays = [move(a) for a in self.arrays]
        self.bytes_at_once = chunk_bytes(self.arrays[0])
        if any(map(_is_mapped_in_columns, self.arrays)):
            self.bytes_at_once = max(self.bytes_at_once, _COLUMN_CHUNK_BYTES)

    def permutation(self, rng: Any) -> numpy.ndarray:
        """Return the rows of an epoch, in random order."""
        return rng.permutation(self.rows)[: self.max_iter * self.batch_size]

    def batches(self, state: Any, comm: Any, dtype: Any) -> Iterator[Batch]:
        """Yield this process's shard of each batch of the permutation: x, t, weights, rows of the whole batch.

        As many shards as fit in `bytes_at_once` are gathered together and yielded as slices, the last one as a copy:
        a model keeps its last input, and a slice would keep all of the gathered rows in memory. Floating data are
        cast to `dtype`, except weights. A shard is empty if the batch has fewer rows than there are processes.
        """
        arrays, batch_size, order = self.arrays, self.batch_size, state.permutation
        full = len(order) // batch_size * batch_size
        shard, last = comm.shard(batch_size), comm.shard(len(order) - full)
        rows = numpy.concatenate([order[:full].reshape(-1, batch_size)[:, shard].reshape(-1), order[full:][last]])
        rows = rows if isinstance(arrays[0], numpy.ndarray) else asarray(rows)
        size = max(1, shard.stop - shard.start)
        chunk = max(1, self.bytes_at_once // max(1, sum(a.nbytes for a in arrays) // self.rows * size)) * size
        dtypes = [dtype, dtype, None]
        totals = itertools.chain(itertools.repeat(batch_size, full // batch_size), [len(order) - full])
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            gathered = [_gather_rows(a, part, d) for a, d in zip(arrays, dtypes, strict=False)]
            before = (len(part) - 1) // size * size  # the rows before the last batch, in whole batches
            if before:
                xs, ts, *weights = (a[:before].reshape(before // size, size, *a.shape[1:]) for a in gathered)
                yield from zip(xs, ts, weights[0] if weights else itertools.repeat(None), totals, strict=False)
                gathered = [a[before:].copy() for a in gathered]
            xs, ts, *weights = gathered
            yield xs, ts, weights[0] if weights else None, next(totals)
        for total in totals:  # the batches without a row for this process
            if total:
                yield arrays[0][:0], arrays[1][:0], None, total


class BatchData:
    """The user's batches (x, t), an iterable that each epoch goes through once."""

    rows = batch_size = 0

    def __init__(self, batches: Any, max_epoch: int, model: Any) -> None:
        try:
            if isinstance(batches, numpy.ndarray | Array | str | dict):
                raise TypeError
            iter(batches)
        except TypeError:
            raise TypeError(
                f"Trainer.fit: without t, x must be an iterable of batches (x, t), got {type(batches).__name__}"
            ) from None
        if isinstance(batches, Iterator) and max_epoch > 1:
            raise TypeError(
                f"Trainer.fit: {type(batches).__name__} yields its batches once, and max_epoch is {max_epoch}; pass "
                "an object whose __iter__ starts again, such as a list"
            )
        self.iterable, self.max_iter = batches, 0
        # A loss of nnx checks labels on the host before it moves them.
        self.moves_targets = not hasattr(getattr(model, "loss_layer", None), "prepare_targets")
        with contextlib.suppress(TypeError):  # no length
            self.max_iter = len(batches)

    def to_device(self) -> None:
        """Do nothing: each batch is moved to the device when it comes."""

    def permutation(self, rng: Any) -> numpy.ndarray:
        """Return no rows: the user's batches come in their own order."""
        return numpy.zeros(0, numpy.int64)

    def batches(self, state: Any, comm: Any, dtype: Any) -> Iterator[Batch]:
        """Yield this process's shard of each batch after those of `iteration`, as `ArrayData.batches`."""
        for data in itertools.islice(iter(self.iterable), state.iteration, None):
            x, t = check_same_length("Trainer.fit: a batch", *_pair("Trainer.fit: a batch", data))
            part = comm.shard(len(x))
            xs, ts = asarray(x[part]), asarray(t[part]) if self.moves_targets else t[part]
            yield _cast(xs, _step_dtype(xs, dtype)), _cast(ts, _step_dtype(ts, dtype)), None, len(x)


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


def prepare_data(
    model: Any, x: Any, t: Any, weight: Any, drop_last: bool, *, max_epoch: int, batch_size: int, **settings: Any
) -> ArrayData | BatchData:
    """Return the data of a fit of `model`; raise the errors of fit for invalid data and settings."""
    if getattr(type(model), "forward", None) is Sequential.forward and model.loss_layer is None:
        raise ValueError(
            f"Trainer.fit: {type(model).__name__} has no loss_layer to learn from; pass one to its constructor"
        )
    if t is None:
        _check_settings(None, max_epoch, batch_size, **settings)
        if weight is not None:
            raise ValueError("Trainer.fit: sample_weight needs the arrays x and t, got an iterable of batches")
        return BatchData(x, max_epoch, model)
    x, t = check_data("Trainer.fit", model, (x, t))
    _check_settings(len(x), max_epoch, batch_size, **settings)
    weights = [] if weight is None else [_check_sample_weight(model, weight, len(x))]
    return ArrayData([x, t, *weights], batch_size, drop_last)


def _check_sample_weight(model: Any, weight: Any, rows: int) -> Array:
    """Return the weights of the rows as a host array; raise if they are invalid, or the model takes none."""
    weight = to_cpu(as_real_array(weight, "Trainer.fit: sample_weight"))
    if weight.shape != (rows,):
        raise ValueError(f"Trainer.fit: sample_weight must have one number for each of {rows} rows, got {weight.shape}")
    with numpy.errstate(over="ignore"):
        total = weight.sum(dtype=numpy.float64)
    if not (0 < total < numpy.inf and (weight >= 0).all()):
        raise ValueError("Trainer.fit: sample_weight must hold finite numbers of at least 0, not only zeros")
    for owner in (model, getattr(model, "loss_layer", None) or model):
        if not takes_keyword(owner.forward, "weight"):
            raise TypeError(f"Trainer.fit: sample_weight needs {type(owner).__name__}.forward(x, t, weight)")
    return weight


def check_validation(model: Any, validation: Any, metrics: Any) -> Sequence[Array]:
    """Return the validation data, checked; raise now what `model.evaluate` would raise after an epoch."""
    check_metrics("Trainer.fit", metrics)
    if validation is None:
        if metrics:
            raise ValueError("Trainer.fit: metrics need validation data; pass validation=(x, t)")
        return ()
    checked = check_data("Trainer.fit: validation", model, validation, copy=False)
    if not hasattr(model, "evaluate"):
        raise TypeError("Trainer.fit: validation needs a model with evaluate(x, t) that returns loss, accuracy")
    row = _counted_row(model, checked[1])
    result = model.evaluate(*(data[row : row + 1] for data in validation))
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise TypeError(
            f"Trainer.fit: {type(model).__name__}.evaluate must return (loss, accuracy), got {result!r:.80}"
        )
    if metrics and not takes_keyword(model.evaluate, "metrics"):
        raise TypeError(
            f"Trainer.fit: metrics need a model with evaluate(x, t, metrics=...), got {type(model).__name__}"
        )
    return checked


def _counted_row(model: Any, t: Array) -> int:
    """Return the first row with a label that the loss does not ignore."""
    ignored = getattr(getattr(model, "loss_layer", None), "ignore_label", None)
    counted = to_cpu(t).reshape(len(t), -1) != ignored if ignored is not None else numpy.ones((1, 1), bool)
    return int(counted.any(axis=1).argmax())


def check_data(name: str, model: Any, data: Any, *, copy: bool = True) -> tuple[Array, Array]:
    """Validate `data` and return x and t, on the host or the device, prepared for gathering rows.

    Floating data are cast to the dtype of the parameters. Host data whose rows are not contiguous are
    copied to C order, because gathering from columns takes about ten times as long. Memory-mapped files are
    neither cast nor copied; `batches` casts their rows. With `copy=False` nothing is cast or copied.
    """
    x, t = check_same_length(name, *_pair(name, data))
    dtype = parameter_dtype(model)
    x, t = (_check_finite(f"{name}: {n}", a, dtype, copy) for n, a in (("x", x), ("t", t)))
    targets = getattr(getattr(model, "loss_layer", None), "prepare_targets", None)
    if targets is not None and hasattr(model, "predict"):
        sample = asarray(_probe_rows(x))
        try:
            shape = model.predict(_cast(sample, _step_dtype(x, dtype))).shape[1:]
        except ValueError as error:  # name the shape of the data, not of the sample
            raise ValueError(str(error).replace(str(sample.shape), str(x.shape))) from error
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


def _pair(name: str, data: Any) -> Any:
    if not (isinstance(data, tuple | list) and len(data) == 2):
        got = f"a {type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else f"{data!r:.80}"
        raise ValueError(f"{name} must be a pair (x, t), got {got}")
    return data


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


def _probe_rows(x: Array) -> Array:
    """Return sample rows for a trial forward pass: the first, or those of the extreme integers (maybe bad indices)."""
    if x.dtype.kind not in "iu" or not x.size or _is_mapped(x):  # min and max would read the whole file
        return x[:1]
    axes = tuple(range(1, x.ndim))  # argmin over all axes would copy a non-contiguous x
    low, high = (x.min(axis=axes), x.max(axis=axes)) if axes else (x, x)
    return x[[int(low.argmin()), int(high.argmax())]]


def _check_settings(
    rows: int | None, max_epoch: int, batch_size: int, max_grad: float | None, eval_interval: int | None
) -> None:
    """Validate the arguments of fit; `rows` is None for batches of the user's."""
    check_integer("Trainer.fit: max_epoch", max_epoch, 0)
    check_integer("Trainer.fit: batch_size", batch_size)
    if eval_interval is not None:
        check_integer("Trainer.fit: eval_interval", eval_interval)
    if rows is not None and batch_size > rows:
        raise ValueError(f"Trainer.fit: batch_size must be 1 to {rows}, the number of rows, got {batch_size}")
    if not isinstance(max_grad, numbers.Real | None) or isinstance(max_grad, bool):
        raise TypeError(f"Trainer.fit: max_grad must be a number, or None, got {max_grad!r:.80}")
    if max_grad is not None and not max_grad > 0:
        raise ValueError(f"Trainer.fit: max_grad must be positive, or None, got {max_grad}")


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
