"""Shared fixtures: the workloads, the comparison of results before timing, timing that synchronizes with the GPU.

The tables have a row per variant: its median, and the ratio of that to the median of the first row in the group, which
is the floor, the matrix products alone, if the group has one.

D inputs, H hidden units, C classes, N rows in a batch.
"""

import itertools
import re
from typing import Any, NamedTuple

import numpy
import pytest

from benchmarks import book, report
from nnx import GPU, np, synchronize, to_cpu


class Problem(NamedTuple):
    """The batch and initial weights of a two-layer net, on the host in float64."""

    name: str
    x: Any  # (N, D)
    t: Any  # (N,)
    params: list  # W1, b1, W2, b2

    def on(self, dtype):
        """Return copies of x, t and params as `dtype` arrays of the array module."""
        return np.array(self.x, dtype), np.array(self.t), [np.array(p, dtype) for p in self.params]


@pytest.fixture(scope="module", params=["2-10-3/30", "784-100-10/100", "784-512-10/128", "1024-4096-1024/512"])
def problem(request):
    """Return the workloads, named D-H-C/N: the spiral, two nets for MNIST, and one dominated by matrix products."""
    D, H, C, N = map(int, re.split("[-/]", request.param))
    rng = numpy.random.default_rng(0)
    params = [0.01 * rng.standard_normal(shape) for shape in ((D, H), H, (H, C), C)]
    return Problem(request.param, rng.standard_normal((N, D)), rng.integers(C, size=N), params)


@pytest.fixture(scope="module", autouse=True)
def _book_on_device():
    """Run the book's formulas on the array module, as in the book, so that each row of a table uses one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "np", np)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    """Print the tables of this module in place of pytest-benchmark's, which are wider than a terminal."""
    session = config._benchmarksession
    session.quiet = True
    timed = [b for b in session.benchmarks if b.stats.rounds]
    for (group, what), rows in itertools.groupby(timed, key=lambda b: (b.group, b.extra_info["compared"])):
        rows = [(b.params["variant"], b.stats.median) for b in rows]
        first = rows[0]
        terminalreporter.write_line(f"\n{group}: {what}")
        for name, median in rows:
            ratio = "" if len(rows) == 1 else f"{median / first[1]:7.2f} x {first[0]}"
            terminalreporter.write_line(f"  {name:16}{report.duration(median):>10}{ratio}".rstrip())


@pytest.fixture
def measure(benchmark):
    """Return a function that times a call including synchronization: GPU work is asynchronous."""

    def measure(group, compared, function, *args):
        def to_the_end():
            function(*args)
            synchronize()

        benchmark.group, benchmark.extra_info["compared"] = group, compared
        if GPU:
            benchmark(to_the_end)
        else:
            benchmark(function, *args)

    return measure


@pytest.fixture(scope="session")
def assert_close():
    """Return a function that compares arrays or nested lists to float32 accuracy relative to their largest element."""

    def assert_close(got, want):
        if isinstance(want, list | tuple):
            for pair in zip(got, want, strict=True):
                assert_close(*pair)
        else:
            got, want = to_cpu(got), to_cpu(want)
            numpy.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())

    return assert_close
