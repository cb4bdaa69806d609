"""Host overhead on a GPU: the time of Python and CuPy for layers, optimizers and steps, and their number of launches.

    RUNNER python -m benchmarks.host > benchmarks/results/host.md    # in the repository root; RUNNER runs CuPy-on-CPU

For small arrays the GPU finishes before Python launches the next kernel, and the host time is the time of a step,
except for the driver's 2 µs or so per launch. It needs CuPy-on-CPU, which can count kernels without executing
them, and serves to compare designs; it is not a time on a GPU.
"""

import argparse
import functools
import importlib
import statistics
import time

import numpy

from benchmarks import peers, report
from benchmarks.layers import LAYERS, OPTIMIZERS, nnx_call
from nnx import Affine, asarray, clip_grads, layers, np
from nnx.kernels import gather

STEPS = [
    "2-10-3/30",
    "784-512-10/128",
    "ReLU Adam 64-100-10/100",
    "BatchNorm ReLU Dropout Adam 784-512-512-10/128",
    "LayerNorm GELU AdamW 512-2048-512-10/1024",
]
LAYER_SIZE, OPTIMIZER_SIZE = "32x64", "64-100-10"
RECURRENT = [layers.TimeRNN, layers.TimeLSTM, layers.TimeGRU]
TIME_STEPS = 100  # of which a mean is taken: what is done once per call is a few percent of it
PRODUCT = "a product: a.dot(b)"
HEAD = ["", "launches", "host time (quartiles)", "products"]


def step(workload):
    """Return a function that performs a training step."""
    rng = numpy.random.default_rng(0)
    sizes, N, params = peers.problem(workload, rng)
    *between, optimizer = workload.split()[:-1] or ["Sigmoid", "SGD"]
    net = peers.nnx([p.astype("float32") for p in params], 1e-3, "cuda", between, optimizer)
    x, t = asarray(rng.standard_normal((N, sizes[0]), "float32")), asarray(rng.integers(sizes[-1], size=N))
    return functools.partial(net.step, x, t)


def time_steps():
    """Return the forward and backward functions of the recurrent layers, by name."""
    xs, calls = asarray(numpy.zeros((20, TIME_STEPS, 100), "float32")), {}
    for kind in RECURRENT:
        layer = kind.init(100, 100, rng=0)
        dhs = layer.forward(xs)
        calls[f"{kind.__name__}, a time step forward"] = functools.partial(layer.forward, xs)
        calls[f"{kind.__name__}, a time step backward"] = functools.partial(layer.backward, dhs)
    return calls


def calls():
    """Return the functions to time, by name."""
    rng = numpy.random.default_rng(0)
    a, b, bias = (asarray(rng.standard_normal(shape, "float32")) for shape in ((32, 64), (64, 64), 64))
    affine, rows, grads = Affine(b, bias), asarray(rng.permutation(32)), [b.copy(), bias.copy()]
    return {
        PRODUCT: lambda: a.dot(b),
        **{f"step {workload}": step(workload) for workload in STEPS},
        "Affine": lambda: affine.backward(affine.forward(a)),
        **{name: nnx_call(name, LAYER_SIZE, "cuda")[0] for name in LAYERS},
        "Embedding": nnx_call("Embedding", "100x64", "cuda")[0],
        **{name: nnx_call(name, OPTIMIZER_SIZE, "cuda")[0] for name in OPTIMIZERS},
        "clip_grads": lambda: clip_grads(grads, 1.0),
        "gather a batch": lambda: gather(a, rows),
        **time_steps(),
    }


def launches(call):
    """Return the number of launches of a call after warm-up."""
    for _ in range(3):
        call()
    np.cuda.get_current_stream().synchronize()
    cupy_on_cpu = importlib.import_module("cupy_on_cpu")
    cupy_on_cpu.reset()
    call()
    return cupy_on_cpu.counters()["launches"]


def parts(name):
    """Return the number of parts of a call, of which one is reported."""
    return TIME_STEPS if "time step" in name else 1


def seconds(name, call, repeats):
    """Return the mean time of a part of a call."""
    repeats = max(1, repeats // parts(name))
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / (repeats * parts(name))


def measure(rounds, repeats):
    """Return a row of HEAD's columns for each call; the ratio is the median over rounds, each with its own product."""
    timed = calls()
    counts = {name: launches(call) for name, call in timed.items()}
    times = {name: [] for name in timed}
    products = {name: [] for name in timed}
    with importlib.import_module("cupy_on_cpu").free_work():
        for _ in range(rounds):
            for name, call in timed.items():
                seconds(name, call, repeats // 10)  # warm up again after the others
                product = seconds(PRODUCT, timed[PRODUCT], repeats)
                times[name].append(seconds(name, call, repeats))
                products[name].append(times[name][-1] / product)
    rows = []
    for name in timed:
        low, median, high = map(report.duration, statistics.quantiles(times[name], method="inclusive"))
        count = f"{counts[name] / parts(name):.3g}"
        rows.append([name, count, f"{median} ({low}-{high})", f"{statistics.median(products[name]):.1f}"])
    return rows


def main():
    lines = [f"# Host overhead of nnx on CuPy: {report.device_name()}"]
    lines += report.table(["", ""], report.configuration().items())
    lines += ["", f"Layers forward and backward at {LAYER_SIZE}, optimizers at {OPTIMIZER_SIZE}; float32. Kernels and"]
    lines += ["products are counted, not executed: this is the time of Python and CuPy, not a time on a GPU."]
    lines += [f"A time step is the mean of {TIME_STEPS}, with what a call does once."]
    print("\n".join(lines + report.table(HEAD, measure(rounds=9, repeats=300))))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
