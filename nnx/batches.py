"""The data of a training: checked, in batches, whole or shared by ranks; and the mean of their losses. N rows."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy

from nnx.device import asarray, gather_bytes, to_cpu
from nnx.np import Array, np

__all__ = ["MeanLoss", "all_finite", "batches", "check_finite", "shares", "sketch"]


class MeanLoss:
    """The mean of losses, weighted by their rows, kept on the device until it is asked for.

    Losses of equally many rows are added up by themselves, so that a step costs one addition.
    """

    def __init__(self, state: Any = ()) -> None:
        self.totals: dict[int, Any] = {int(rows): _double(total) for rows, total, _ in state}
        self.counts: dict[int, int] = {int(rows): int(count) for rows, _, count in state}

    def state(self) -> numpy.ndarray:
        """Return a row (rows of a batch, sum of losses, their number) for each size of batch."""
        rows = [(n, float(total), self.counts[n]) for n, total in self.totals.items()]
        return numpy.array(rows, numpy.float64).reshape(-1, 3)

    def add(self, loss: Any, rows: int) -> None:
        """Add the mean loss of a batch of `rows` rows."""
        if rows in self.totals:
            self.totals[rows] += loss
            self.counts[rows] += 1
        else:
            self.totals[rows] = _double(loss)
            self.counts[rows] = 1

    def take(self) -> float:
        """Return the mean of all losses since it was asked for last."""
        total = sum(rows * float(total) for rows, total in self.totals.items())
        weight = sum(rows * count for rows, count in self.counts.items())
        self.totals, self.counts = {}, {}
        return total / weight


def _double(loss: Any) -> Any:
    """Return a float64 that is added to where it lies: a NumPy scalar, faster than an array, or a CuPy array."""
    return np.array(loss, np.float64)[()]


def batches(x: Array, t: Array, order: numpy.ndarray, batch_size: int) -> Iterator[tuple[Array, Array, int]]:
    """Yield the rows of `x` and `t` in `order`, `batch_size` at a time, and how many there are.

    As many whole batches as `gather_bytes` allows are gathered at once and handed out as slices.
    """
    batch_bytes = (x.nbytes + t.nbytes) // len(x) * batch_size
    chunk = max(1, gather_bytes() // max(1, batch_bytes)) * batch_size
    rows = order if isinstance(x, numpy.ndarray) else asarray(order)
    for start in range(0, len(order), chunk):
        part = rows[start : start + chunk]
        xs, ts = asarray(x.take(part, axis=0)), asarray(t.take(part, axis=0))
        for i in range(0, len(xs), batch_size):
            yield (batch := xs[i : i + batch_size]), ts[i : i + batch_size], len(batch)


def shares(x: Array, t: Array, order: numpy.ndarray, batch_size: int, comm: Any) -> Iterator[tuple[Array, Array, int]]:
    """Yield this rank's slice of each of `batches`, which may have no row, and the rows of the whole batch."""
    whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine = [rows[comm.slice(len(rows))] for rows in whole]
    gathered = batches(x, t, numpy.concatenate([order[:0], *mine]), len(mine[0]) if mine and len(mine[0]) else 1)
    for rows, part in zip(whole, mine, strict=True):  # only the last part may be shorter, as `batches` has it
        xs, ts, _ = next(gathered) if len(part) else (x[:0], t[:0], 0)
        yield xs, ts, len(rows)


@numpy.errstate(over="ignore")
def check_finite(name: str, data: Array, dtype: Any) -> Array:
    """Return floating `data` in `dtype`, having looked for NaN and infinity, also those that the cast makes."""
    if data.dtype.kind != "f":
        return data
    if dtype is not None:
        data = data.astype(dtype, copy=False)
    finite = np.isfinite if isinstance(data, np.ndarray) else numpy.isfinite
    if not finite(data).all():
        row = int(numpy.argwhere(~numpy.isfinite(to_cpu(data)))[0, 0])
        raise ValueError(
            f"{name} holds NaN or infinity in {data.dtype}, first in row {row}; clean or leave out such rows"
        )
    return data


def all_finite(params: Sequence[Array]) -> bool:
    """Return whether `params` hold neither NaN nor infinity.

    The sum of their squares, one pass of BLAS each, says so unless it overflows; asks the device once.
    """
    if math.isfinite(sum((np.vdot(p, p) for p in params), numpy.float64(0))):
        return True
    return bool(np.stack([np.isfinite(p).all() for p in params]).all())


def sketch(data: Array) -> str:
    """Return shape and dtype, and a checksum of about a thousand rows."""
    rows = to_cpu(data[:: 1 + len(data) // 1000])
    return f"{data.shape} {data.dtype} of checksum {zlib.crc32(rows.tobytes()):x}"
