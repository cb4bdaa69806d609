"""Measure training on several ranks, and write `ranks.json` and `ranks.md`.

    python -m benchmarks.ranks [--ranks 2] [--quick] [--out FOLDER]    # in the root; needs [mpi] and mpiexec

It times steps of the net 784-512-10 in float32 on batches of N rows: in one process with all cores, and on R
ranks with a shard each. A ratio is the median of the ratios in each block; the variants of a block are
timed sequentially in the same processes, and the time of the slowest rank is used; the processes are
started four times. The results are compared with a model of the time of a ring all-reduce of S bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

import nnx
from benchmarks import report
from nnx import SGD, TwoLayerNet, np, synchronize

ROOT = Path(__file__).parents[1]
SIZES = 784, 512, 10
BATCHES = [128, 256, 512, 1024, 2048]
LAUNCHES = 4
THREADS = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
NETWORKS = {"10 Gb/s": (25e-6, 10e9 / 8), "100 Gb/s": (5e-6, 100e9 / 8)}  # assumed latency, bytes per second
BYTES = 4 * ((SIZES[0] + 1) * SIZES[1] + (SIZES[1] + 1) * SIZES[2])  # total size of all gradients

ADDED = """
Time added to a step of independent ranks: by a barrier in place of the reduction; by a bare
Allreduce with a cold cache; by the reduction of `Trainer`; by `Comm.allreduce_gradients`, which writes
the sums back. The last column is the ratio of the Trainer's reduction to the bare Allreduce in the
step."""
PAPER = """
## Model: a ring all-reduce

S bytes on R ranks take 2 (R - 1) rounds, in each of which every rank
sends and receives S / R bytes: 2 (R - 1) (latency + S / R / bandwidth). The efficiency is the
time of a step without reduction over that of a step with it: T / (T + ring). The model does not include
packing, summation, or waiting for the slowest rank. Latency and bandwidth measured between two ranks
on this machine: {:.2f} µs and {:.2f} GB/s each way; MPI libraries need not use a ring."""


def ring(ranks, size, latency, bandwidth):
    """Return the seconds of a ring all-reduce, where every rank sends size / ranks bytes in each round."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


# ---- in each rank ----


def steps(comm, batch):
    """Return the functions to time for a batch, by name."""
    rng = numpy.random.default_rng(0)
    part = comm.shard(batch)
    x = np.asarray(rng.standard_normal((batch, SIZES[0]))[part], "float32")
    t, share = np.asarray(rng.integers(SIZES[2], size=batch)[part]), (part.stop - part.start) / batch
    model, optimizer = TwoLayerNet(*SIZES, rng=0), SGD(0.1)

    def gradients():
        loss = model.forward(x, t)
        model.backward()
        return loss

    def apart():  # independent ranks
        gradients()
        optimizer.update(model.params, model.grads)

    def together():  # a barrier only
        gradients()
        comm.barrier()
        optimizer.update(model.params, model.grads)

    def bare():  # an Allreduce of the same size, whose result is not used
        gradients()
        comm.mpi.Allreduce(MPI.IN_PLACE, flat)
        optimizer.update(model.params, model.grads)

    def trainer():
        loss = gradients()
        grads, _ = comm.allreduce(model.grads, share, loss * share, 0, 0)
        optimizer.update(model.params, grads)

    def loop():  # custom training loop
        gradients()
        comm.allreduce_gradients(model.grads, share)
        optimizer.update(model.params, model.grads)

    if comm.size == 1:
        return {"apart": apart}
    from mpi4py import MPI  # noqa: PLC0415 - an extra

    flat = numpy.zeros(BYTES // 4, "float32")
    return {f.__name__: f for f in (apart, together, bare, trainer, loop)}


def messages(comm):
    """Return the functions to time for MPI alone, by name."""
    if comm.size == 1:
        return {}
    from mpi4py import MPI  # noqa: PLC0415 - an extra

    flat, one = numpy.zeros(BYTES // 4, "float32"), numpy.zeros(1, "float32")
    other, half = comm.rank ^ 1, BYTES // 8
    into = numpy.empty_like(flat)

    def exchange(size):
        if other < comm.size:
            comm.mpi.Sendrecv(flat[:size], other, recvbuf=into[:size], source=other)

    return {
        "allreduce": lambda: comm.mpi.Allreduce(MPI.IN_PLACE, flat),
        "allreduce of 4 bytes": lambda: comm.mpi.Allreduce(MPI.IN_PLACE, one),
        "exchange of 4 bytes": lambda: exchange(1),
        "exchange of half": lambda: exchange(half),
    }


def work(batches, blocks, path):
    """Time all variants alternately; rank 0 writes the seconds of the slowest rank, a list per variant."""
    comm = nnx.distributed.init()
    timed = {f"{name}/{n}": (f, max(3, 2560 // n)) for n in batches for name, f in steps(comm, n).items()}
    timed |= {name: (f, 20) for name, f in messages(comm).items()}
    seconds = {name: [] for name in timed}
    for _ in range(blocks):
        for name, (function, count) in timed.items():
            function()
            synchronize()
            comm.barrier()
            begin = time.perf_counter()
            for _ in range(count):
                function()
            synchronize()
            spent = (time.perf_counter() - begin) / count
            seconds[name].append(spent if comm.size == 1 else max(comm.mpi.allgather(spent)))
    if comm.rank == 0:
        Path(path).write_text(json.dumps(seconds), encoding="utf-8")


# ---- in the main process ----


def launch(ranks, quick, environment):
    """Start the ranks and return the measured seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seconds.json")
        launcher = [Path(sys.executable).parent / "mpiexec", "-n", str(ranks)] if ranks > 1 else []
        command = [sys.executable, "-m", "benchmarks.ranks", "--work", path, *(["--quick"] if quick else [])]
        subprocess.run([*launcher, *command], cwd=ROOT, env=environment, check=True)
        return json.loads(path.read_text(encoding="utf-8"))


def ratios(over, under, *less):
    """Return the quartiles over blocks of (over - less) / under."""
    less = less[0] if less else [0] * len(over)
    return statistics.quantiles([(a - c) / b for a, b, c in zip(over, under, less, strict=True)], method="inclusive")


def by_launch(seconds):
    """Return the median for each launch of the processes."""
    blocks = max(1, len(seconds) // LAUNCHES)
    return [statistics.median(seconds[i : i + blocks]) for i in range(0, len(seconds), blocks)]


def median(seconds):
    return report.duration(statistics.median(seconds))


def percent(part):
    return f"{100 * part:.0f} %"


def tables(ranks, batches, one, several, capped):
    """Yield the lines of the tables: the measurements, then the model."""
    allreduce = several["allreduce"]
    yield from ["", f"## A step in one process with all cores, and on {ranks} ranks on the same cores"]
    rows = []
    for n in batches:
        alone, together = one[f"apart/{n}"], several[f"trainer/{n}"]
        rows.append(
            [str(n), median(alone), median(together), report.ratio(ratios(by_launch(alone), by_launch(together)))]
        )
    yield from report.table(["rows", "one process", f"{ranks} ranks", "speed-up"], rows)

    yield from ["", f"## Reduction, relative to a standalone Allreduce: {BYTES:,} bytes in {median(allreduce)}"]
    yield ADDED
    rows = []
    for n in batches:
        step = {name: several[f"{name}/{n}"] for name in ("apart", "together", "bare", "trainer", "loop")}
        apart = step.pop("apart")
        inside = [a - b for a, b in zip(step["bare"], apart, strict=True)]
        cells = [report.ratio(ratios(seconds, allreduce, apart)) for seconds in step.values()]
        rows.append([str(n), *cells, report.ratio(ratios(step["trainer"], inside, apart))])
    yield from report.table(["rows", "waiting", "Allreduce", "Trainer", "average", "Trainer / Allreduce"], rows)

    yield from ["", "## Threads: a step with default settings, relative to one with OMP_NUM_THREADS=1"]
    rows = [[str(n), report.ratio(ratios(several[f"trainer/{n}"], capped[f"trainer/{n}"]))] for n in batches]
    yield from report.table(["rows", "ratio"], rows)

    latency = statistics.median(several["exchange of 4 bytes"])
    bandwidth = BYTES / 2 / (statistics.median(several["exchange of half"]) - latency)
    yield PAPER.format(latency * 1e6, bandwidth / 1e9)
    expected = ring(ranks, BYTES, latency, bandwidth)
    rows = [["all-reduce", report.duration(expected), median(allreduce)]]
    for n in batches:
        alone, together = (statistics.median(several[f"{name}/{n}"]) for name in ("apart", "trainer"))
        rows.append(
            [f"efficiency, {n // ranks} rows a rank", percent(alone / (alone + expected)), percent(alone / together)]
        )
    yield from report.table([f"{ranks} ranks on this machine", "model", "measured"], rows)

    yield from ["", "Computed, not measured: machines with one rank each and the same step time as here."]
    cases = [(f"{r} ranks, {name}", ring(r, BYTES, *NETWORKS[name])) for name in NETWORKS for r in (8, 64)]
    rows = [["all-reduce", *(report.duration(seconds) for _, seconds in cases)]]
    for n in batches:
        alone = statistics.median(several[f"apart/{n}"])
        rows.append([f"efficiency, {n // ranks} rows a rank", *(percent(alone / (alone + s)) for _, s in cases)])
    yield from report.table(["", *(name for name, _ in cases)], rows)
    assumed = ", ".join(f"{1e6 * seconds:.0f} µs at {name}" for name, (seconds, _) in NETWORKS.items())
    yield from ["", f"Latency assumed: {assumed}."]


def configuration(ranks):
    """Return the configuration that the results depend on, by name."""
    version = "from mpi4py import MPI; print(' '.join(MPI.Get_library_version().split()[:3]))"
    return report.configuration(ranks=f"{ranks} on this machine", MPI=report.output(sys.executable, "-c", version))


def main(ranks, quick, out):
    free = {name: value for name, value in os.environ.items() if name not in THREADS}
    batches = BATCHES[:1] if quick else BATCHES
    one, several, capped = runs = {}, {}, {}
    for _ in range(1 if quick else LAUNCHES):  # the placement of processes and memory affects the times
        for seconds, settings in zip(
            runs, [(1, free), (ranks, free), (ranks, free | {"OMP_NUM_THREADS": "1"})], strict=True
        ):
            for name, blocks in launch(settings[0], quick, settings[1]).items():
                seconds.setdefault(name, []).extend(blocks)
    about = configuration(ranks)
    lines = ["# nnx on several ranks", *report.table(["", ""], about.items())]
    lines += [
        "",
        "Medians, and ratios as median (quartiles) over the blocks.",
        *tables(ranks, batches, one, several, capped),
    ]
    path = Path(out).resolve() / "ranks"
    named = {"one process": one, "ranks": several, "ranks, OMP_NUM_THREADS=1": capped}
    report.write(path, lines, {"configuration": about, "ranks": ranks, "bytes": BYTES, "seconds": named})
    print("\n".join(lines))
    print(f"\nwritten: {path}.md and .json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few short blocks of one batch: a test, not a measurement")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if path := options.pop("work"):
        work(BATCHES[:1] if options["quick"] else BATCHES, 3 if options["quick"] else 8, path)
    else:
        main(**options)
