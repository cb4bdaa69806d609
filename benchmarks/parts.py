"""Break down the time of nnx's training steps by layer, each compared with its matrix products alone.

    python -m benchmarks.parts [WORKLOAD ...] > benchmarks/results/parts.md    # in the repository root

The parts of every step of a workload D-H-C/N are timed, alternating with its products as in `floor` of
`peers.py`. Times are medians; the overhead of the clock is subtracted.
"""

import argparse
import statistics
import time
from collections import defaultdict

import numpy

from benchmarks import report
from benchmarks.compare import GROUPS
from benchmarks.peers import problem
from nnx import SGD, Affine, Sequential, Sigmoid, SoftmaxWithLoss, asarray, np, synchronize

SECONDS = 3  # per workload
HEAD = ["", "time", "products", "the rest", "of the step"]


class Clock:
    """Calls functions and records the time of each call, by name."""

    def __init__(self):
        self.seconds = defaultdict(list)

    def __call__(self, name, function, *args):
        begin = time.perf_counter()
        result = function(*args)
        synchronize()
        self.seconds[name].append(time.perf_counter() - begin)
        return result

    def median(self, name):
        return statistics.median(self.seconds[name]) - statistics.median(self.seconds["clock"])


def take_apart(workload, seconds=SECONDS):
    """Return (part, seconds, seconds of its products) in execution order."""
    rng = numpy.random.default_rng(0)
    sizes, N, params = problem(workload, rng)
    x, t = asarray(rng.standard_normal((N, sizes[0])), "float32"), asarray(rng.integers(sizes[-1], size=N))
    params = [asarray(p, "float32") for p in params]
    layers = {}
    for i, (W, b) in enumerate(zip(params[::2], params[1::2], strict=True), 1):
        layers |= {f"Affine {i}": Affine(W, b, input_grad=i > 1), f"Sigmoid {i}": Sigmoid()}
    layers.popitem()
    model, sgd, clock = Sequential(layers.values(), SoftmaxWithLoss()), SGD(1e-4), Clock()
    scratch = {}  # the outputs of products, by part
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        y, products = x, []
        for name, layer in layers.items():
            if isinstance(layer, Affine):
                products.append((f"{name} forward", y, layer.params[0]))
            y = clock(f"{name} forward", layer.forward, y)
        clock("SoftmaxWithLoss forward", model.loss_layer.forward, y, t)
        dout = clock("SoftmaxWithLoss backward", model.loss_layer.backward)
        for name, layer in reversed(layers.items()):
            if isinstance(layer, Affine):
                products.append((f"{name} backward, W", layer.x.T, dout))
                if layer.input_grad:
                    products.append((f"{name} backward, x", dout, layer.params[0].T))
            dout = clock(f"{name} backward", layer.backward, dout)
        clock("SGD update", sgd.update, model.params, model.grads)
        clock("clock", lambda: None)
        for name, a, b in products:
            if name not in scratch:
                scratch[name] = a.dot(b)
            clock(f"product: {name}", np.dot, a, b, scratch[name])
    return [
        (part, clock.median(part), sum(clock.median(f"product: {name}") for name in scratch if name.startswith(part)))
        for part in clock.seconds
        if part != "clock" and not part.startswith("product")
    ]


def cells(name, seconds, products, whole):
    """Return a row of HEAD's columns; times below the noise of the clock are left empty."""
    rest = seconds - products
    times = [report.duration(s) if s > 0 else "" for s in (seconds, products, rest)]
    return [name, *times, f"{max(rest, 0) / whole:.0%}"]


def main(workloads):
    lines = ["# Breakdown of nnx's training steps", *report.table(["", ""], report.configuration().items())]
    for workload in workloads:
        parts = take_apart(workload)
        _, seconds, products = zip(*parts, strict=True)
        rows = [cells(*part, sum(seconds)) for part in [*parts, ("all", sum(seconds), sum(products))]]
        lines += ["", f"## {workload}", *report.table(HEAD, rows)]
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [group for group in GROUPS if "/" in group and " " not in group]
    parser.add_argument("workloads", nargs="*", default=every, metavar="WORKLOAD", help="such as 784-512-10/128")
    main(**vars(parser.parse_args()))
