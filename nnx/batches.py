"""The batches of an epoch, and the mean of their losses. N rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

from nnx.device import asarray, gather_bytes
from nnx.np import Array, np

__all__ = ["MeanLoss", "batches"]


class MeanLoss:
    """The mean of losses, weighted by their rows, kept on the device until it is asked for.

    Losses of equally many rows are added up by themselves, so that a step costs one addition.
    """

    def __init__(self, state: Any = ()) -> None:
        self.totals: dict[int, Array] = {int(rows): np.array(total, np.float64) for rows, total, _ in state}
        self.counts: dict[int, int] = {int(rows): int(count) for rows, _, count in state}

    def state(self) -> numpy.ndarray:
        """Return a row (rows of a batch, sum of losses, their number) for each size of batch."""
        rows = [(n, float(total), self.counts[n]) for n, total in self.totals.items()]
        return numpy.array(rows, numpy.float64).reshape(-1, 3)

    def add(self, loss: Any, rows: int) -> None:
        """Add the mean loss of a batch of `rows` rows."""
        if rows in self.totals:
            np.add(self.totals[rows], loss, out=self.totals[rows])
            self.counts[rows] += 1
        else:
            self.totals[rows] = np.array(loss, np.float64)
            self.counts[rows] = 1

    def take(self) -> float:
        """Return the mean of all losses since it was asked for last."""
        total = sum(rows * float(total) for rows, total in self.totals.items())
        weight = sum(rows * count for rows, count in self.counts.items())
        self.totals, self.counts = {}, {}
        return total / weight


def batches(x: Array, t: Array, order: numpy.ndarray, batch_size: int) -> Iterator[tuple[Array, Array]]:
    """Yield the rows of `x` and `t` in `order`, `batch_size` at a time.

    As many whole batches as `gather_bytes` allows are gathered at once and handed out as slices.
    """
    batch_bytes = (x.nbytes + t.nbytes) // len(x) * batch_size
    chunk = max(1, gather_bytes() // max(1, batch_bytes)) * batch_size
    rows = order if isinstance(x, numpy.ndarray) else asarray(order)
    for start in range(0, len(order), chunk):
        part = rows[start : start + chunk]
        xs, ts = asarray(x.take(part, axis=0)), asarray(t.take(part, axis=0))
        for i in range(0, len(xs), batch_size):
            yield xs[i : i + batch_size], ts[i : i + batch_size]
