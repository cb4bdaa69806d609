"""Measure what training with several ranks costs, and write `ranks.json` and `ranks.md`.

    python -m benchmarks.ranks [--ranks 2] [--quick] [--out FOLDER]    # in the root, with the extra [mpi] and mpiexec

A step of 784-512-10, float32, global batches of N rows: by one process with all cores, by ranks with
a slice each, and by ranks that do not reduce. Beside them a bare MPI Allreduce of as many bytes. The
ring model predicts the reduction from bytes, latency and bandwidth.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy

import nnx
from benchmarks import report
from nnx import SGD, TwoLayerNet, np, synchronize

ROOT = Path(__file__).parents[1]
SIZES = 784, 512, 10
BATCHES = [128, 256, 512, 1024]
THREADS = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
NETWORKS = {"10 Gb/s, 25 µs": (25e-6, 10e9 / 8), "100 Gb/s, 5 µs": (5e-6, 100e9 / 8)}  # latency, bytes a second


def ring(ranks, size, latency, bandwidth):
    """Return the seconds of a ring all-reduce of `size` bytes.

    R - 1 rounds that scatter sums and R - 1 that gather them; in each, every rank sends size / R.
    """
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


def variants(comm, batch):
    """Return what is timed, by name."""
    rng = numpy.random.default_rng(0)
    x, t = rng.standard_normal((batch, SIZES[0])), rng.integers(SIZES[2], size=batch)
    part = comm.slice(batch)
    x, t, share = np.asarray(x[part], "float32"), np.asarray(t[part]), (part.stop - part.start) / batch
    model, optimizer = TwoLayerNet(*SIZES, rng=0), SGD(0.1)
    flat = numpy.zeros(sum(p.size for p in model.params) + 2, "float32")

    def alone():
        loss = model.forward(x, t)
        model.backward()
        optimizer.update(model.params, model.grads)
        return loss

    def reducing():  # what Trainer does
        loss = model.forward(x, t)
        model.backward()
        grads, _ = comm.reduce(model.grads, share, loss * share, 0)
        optimizer.update(model.params, grads)

    def averaging():  # a loop written out
        model.forward(x, t)
        model.backward()
        comm.average(model.grads, share)
        optimizer.update(model.params, model.grads)

    def allreduce():
        comm.mpi.Allreduce(MPI.IN_PLACE, flat)

    if comm.size == 1:
        return {"step": alone}
    from mpi4py import MPI  # noqa: PLC0415 - an extra

    return {"step": alone, "step, reduced": reducing, "step, averaged": averaging, "Allreduce": allreduce}


def work(batches, blocks):
    """Return the seconds of each variant, the slowest rank's: a list over blocks, taken in turns."""
    comm = nnx.distributed.init()
    timed = {f"{name} {n}": f for n in batches for name, f in variants(comm, n).items()}
    seconds = {name: [] for name in timed}
    for _ in range(blocks):
        for name, function in timed.items():
            function()
            comm.barrier()
            begin = time.perf_counter()
            for _ in range(20):
                function()
            synchronize()
            spent = (time.perf_counter() - begin) / 20
            seconds[name].append(spent if comm.size == 1 else max(comm.mpi.allgather(spent)))
    return comm, seconds


if __name__ == "__main__":
    comm, seconds = work([int(b) for b in sys.argv[1:]] or BATCHES, 30)
    if comm.rank == 0:
        for k, v in seconds.items():
            print(f"{k:30} min {min(v) * 1e3:.3f} median {statistics.median(v) * 1e3:.3f} ms")
