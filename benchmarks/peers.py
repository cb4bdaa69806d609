"""The variants that `compare.py` compares: nnx, its floor, the book's formulas, and other libraries.

    python -m benchmarks.peers DEVICE VARIANT TASK [X.npy T.npy]    # DEVICE cpu or cuda; files for JOBS and `data`

runs one variant in its own process; every answer is a line of JSON. The TASK 784-100-10/100 is a
workload, and so is `ReLU Adam 784-100-10/100`, with the layers between two Affine and the optimizer
(default: Sigmoid and SGD): it first prints the losses of the first steps, then, for each line of
standard input, a number of tens of steps, the seconds and page faults of these steps. The workloads
of `language.py` are timed in the same way, in single steps, and so is `data`: an epoch of `Trainer` on
an array whose memory layout is the VARIANT. `layers` reads names and sizes of `layers.py`, each
followed by such numbers and an empty line. The other tasks, `import` and the JOBS, are complete
programs. D inputs, H hidden (one or more), C classes, N rows in a batch.
"""
# ruff: noqa: PLC0415 - a process imports only its own library

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import re
import resource
import sys
import time
import traceback

import numpy

from benchmarks import book as chapter1
from benchmarks import language
from benchmarks.layers import NORMS, nnx_call, nnx_layer, pytorch_call, pytorch_layer, pytorch_optimizer
from benchmarks.net import Net, jax_library, numpy_blas, pytorch_blas, updated

CHECKED = 20  # steps whose losses are compared
JOBS = {"spiral": ("2-10-3/30", 300, 1.0), "digits": ("64-100-10/100", 100, 0.5)}  # workload, epochs, learning rate
DATA = "784-100-10/100"
LAYOUTS = ["C-contiguous", "column slice", "F-ordered", "pandas DataFrame", "memory-mapped"]


def architecture(params, between):
    """Return the layers as (name, *arrays): an Affine for each W and b, with the layers `between` two of them."""
    layers = []
    for W, b in zip(params[::2], params[1::2], strict=True):
        layers.append(("Affine", W, b))
        layers += [(name, numpy.ones_like(b), numpy.zeros_like(b)) if name in NORMS else (name,) for name in between]
    return layers[: -len(between)]


def floor(params, lr, device, **_):
    """Only the matrix products, with preallocated outputs and without the gradient of the data."""
    from nnx import asarray, np, synchronize

    Ws, products = [asarray(W) for W in params[::2]], []

    def prepare(x):
        xs = [x]
        for W in Ws:
            xs.append(np.dot(xs[-1], W))
        dout = xs[-1].copy()
        products.extend(zip(xs[:-1], Ws, xs[1:], strict=True))
        for x, W in reversed(list(zip(xs[:-1], Ws, strict=True))):
            products.append((x.T, dout, np.empty_like(W)))
            if x is not xs[0]:
                products.append((dout, W.T, dout := np.empty_like(x)))

    def step(x, t):
        if not products:
            prepare(x)
        for a, b, out in products:
            np.dot(a, b, out)
        return 0.0

    return Net(step, asarray, asarray, finish=synchronize, checked=False)


def nnx(params, lr, device, between=("Sigmoid",), optimizer="SGD", ratio=0.5):
    import nnx

    layers = [nnx_layer(*layer, ratio=ratio) for layer in architecture(params, between)]
    layers[0].input_grad = False
    model, optimizer = nnx.Sequential(layers, nnx.SoftmaxWithLoss()), getattr(nnx, optimizer)(lr)

    def step(x, t):
        loss = model.forward(x, t)
        model.backward()
        optimizer.update(model.params, model.grads)
        return loss

    def fit(x, t, epochs, N):
        trainer = nnx.Trainer(model, optimizer, rng=0)
        trainer.fit(x, t, epochs, N, eval_interval=10, verbose=False)
        return trainer.loss_list

    return Net(step, nnx.asarray, nnx.asarray, lambda: [nnx.to_cpu(p) for p in model.params], nnx.synchronize, fit)


def book(params, lr, device, **_):
    """Return the formulas of chapter 1; on the GPU they run on CuPy, as in the book."""
    put, to_cpu, finish = numpy.asarray, numpy.asarray, lambda: None
    if device == "cuda":
        import nnx

        chapter1.np, put, to_cpu, finish = nnx.np, nnx.asarray, nnx.to_cpu, nnx.synchronize
    model = chapter1.TwoLayerNet(*map(put, params))

    def step(x, t):
        loss = model.forward(x, t)
        model.backward()
        model.update(lr)
        return loss

    return Net(step, put, put, lambda: [to_cpu(p) for p in model.params], finish)


def pytorch(params, lr, device, between=("Sigmoid",), optimizer="SGD", ratio=0.5, compiled=False):
    """Eager mode as in PyTorch's tutorials; compiled mode with gradients and update in one graph, the fastest form."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    put = functools.partial(torch.as_tensor, device=device)
    layers = [pytorch_layer(*layer, ratio=ratio) for layer in architecture(params, between)]
    model, loss_of = torch.nn.Sequential(*layers).to(device), torch.nn.CrossEntropyLoss()
    eager = pytorch_optimizer(optimizer, model.parameters(), lr)

    def step(x, t):
        eager.zero_grad()
        loss = loss_of(model(x), t)
        loss.backward()
        eager.step()
        return loss.detach()

    if compiled:
        moments = 0 if optimizer == "SGD" else 2
        state = {
            name: [p.detach(), *(torch.zeros_like(p) for _ in range(moments))] for name, p in model.named_parameters()
        }
        buffers, k = dict(model.named_buffers()), put(0)

        def loss_with(params, buffers, x, t):
            return loss_of(torch.func.functional_call(model, (params, buffers), x), t)

        gradients = torch.func.grad_and_value(loss_with)

        @functools.partial(torch.compile, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
        def step(x, t):
            if moments:
                k.add_(1)
            grads, loss = gradients({name: p for name, (p, *_) in state.items()}, buffers, x, t)
            for name, arrays in state.items():
                for array, new in zip(arrays, updated(optimizer, lr, k, grads[name], *arrays), strict=True):
                    array.copy_(new)
            return loss

    def weights():
        linears = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        return [array.numpy(force=True) for linear in linears for array in (linear.weight.T, linear.bias)]

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Net(step, put, put, weights, finish, about=pytorch_blas)


def jax(params, lr, device, between=("Sigmoid",), optimizer="SGD", ratio=0.5):
    """One jitted function for loss, gradients and update, with donated weight buffers."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory for the other processes
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_platforms", device)
    if device == "cuda":
        jax.config.update("jax_default_matmul_precision", "highest")  # float32 as in the others, not TF32
    layers = architecture(params, between)
    moments = 0 if optimizer == "SGD" else 2
    state = [[a, *[numpy.zeros_like(a)] * moments] for _, *arrays in layers for a in arrays]
    norms = [gamma for name, gamma, *_ in filter(lambda layer: layer[0] == "BatchNorm", layers)]
    running = [start(gamma) for gamma in norms for start in (numpy.zeros_like, numpy.ones_like)]  # mean, variance
    carry = jax.device_put((state, running, 0 if moments else None))

    def loss_of(arrays, key, x, t):
        arrays, statistics = iter(arrays), []
        for i, (name, *_) in enumerate(layers):
            if name == "Affine":
                x = x @ next(arrays) + next(arrays)
            elif name == "Dropout":
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - ratio, x.shape)
                x = jnp.where(kept, x / (1 - ratio), 0)
            elif name in NORMS:
                axis = 0 if name == "BatchNorm" else -1
                mean = x.mean(axis, keepdims=True)
                var = (x * x).mean(axis, keepdims=True) - mean * mean  # in one pass over x, as Flax does
                x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * next(arrays) + next(arrays)
                if name == "BatchNorm":
                    statistics += [mean[0], var[0]]
            else:
                x = getattr(jax.nn, name.lower())(x)
        return -jax.nn.log_softmax(x)[jnp.arange(len(t)), t].mean(), statistics

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry, x, t):
        state, running, k = carry
        k = k + 1 if moments else None
        key = jax.random.fold_in(jax.random.key(0), k) if "Dropout" in between else None
        gradients = jax.value_and_grad(loss_of, has_aux=True)
        (loss, statistics), grads = gradients([p for p, *_ in state], key, x, t)
        state = [updated(optimizer, lr, k, g, *arrays) for g, arrays in zip(grads, state, strict=True)]
        running = [0.9 * old + 0.1 * new for old, new in zip(running, statistics, strict=True)]
        return (state, running, k), loss

    def step(x, t):
        nonlocal carry
        carry, loss = update(carry, x, t)
        return loss

    return Net(
        step,
        jax.device_put,
        lambda array: array,  # passing host arrays to a jitted function is faster than device_put
        lambda: jax.device_get([p for p, *_ in carry[0]]),
        lambda: jax.block_until_ready(carry),
        about=lambda x, t: jax_library(update.lower(carry, x, t)),
    )


VARIANTS = {  # required module, net, dtype
    "floor": ("numpy", floor, "float32"),
    "nnx": ("nnx", nnx, "float32"),
    "nnx Trainer": ("nnx", nnx, "float32"),
    "book float64": ("numpy", book, "float64"),
    "book float32": ("numpy", book, "float32"),
    "PyTorch eager": ("torch", pytorch, "float32"),
    "torch.compile": ("torch", functools.partial(pytorch, compiled=True), "float32"),
    "jax.jit": ("jax.numpy", jax, "float32"),
}


def problem(workload, rng):
    """Return sizes and N of a workload, and the initial weights of all variants: float64, on the host."""
    *sizes, N = map(int, re.split("[-/]", workload.split()[-1]))
    pairs = [(rng.standard_normal((D, H)) / D**0.5, 0.1 * rng.standard_normal(H)) for D, H in itertools.pairwise(sizes)]
    return sizes, N, [array for pair in pairs for array in pair]


def loop(net, x, t, epochs, N):
    """Train like `Trainer.fit`: with the same shuffling, reading the loss at every tenth step of an epoch."""
    rng, losses = numpy.random.default_rng(0), []
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(len(x) // N):
            rows = order[i * N : (i + 1) * N]
            loss = net.step(net.feed(x[rows]), net.feed(t[rows]))
            if i % 10 == 0:
                losses.append(float(loss))
    net.finish()
    return losses


def repeat(call):
    """Return a function that calls `call` a given number of times."""

    def run(count):
        for _ in range(count):
            call()

    return run


def clock(run, finish, steps=1):
    """For each count on standard input, up to an empty line, print the time of `run(count)`, `steps` steps each."""
    while (line := sys.stdin.readline()).strip():
        faults, begin = page_faults(), time.perf_counter()
        run(int(line))
        finish()
        seconds = time.perf_counter() - begin
        answer(seconds=seconds, faults=page_faults() - faults, steps=int(line) * steps)


def prepare(make, dtype, workload):
    """Return the arguments of `steps`: a function that makes a net, whether it has dropout, x and t."""
    rng = numpy.random.default_rng(0)
    sizes, N, params = problem(workload, rng)
    x, t = rng.standard_normal((N, sizes[0])).astype(dtype), rng.integers(sizes[-1], size=N)
    *between, optimizer = workload.split()[:-1] or ["Sigmoid", "SGD"]

    def make_net(draws):
        lr = 0.1 if optimizer == "SGD" else 0.001
        ratio = 0.5 if draws else 0.0
        return make([p.astype(dtype) for p in params], lr, between=between, optimizer=optimizer, ratio=ratio)

    return make_net, "Dropout" in between, x, t


def steps(make_net, draws, x, t, trainer=False, checked=CHECKED, each=10):
    """Print the losses of the first steps of a net, then times of `each` steps.

    `make_net(draws)` makes it; without random numbers for the losses, which differ between libraries.
    """
    net, N = make_net(False), len(x)
    if trainer:  # an epoch of ten batches
        losses, tenfold = net.fit(x, t, checked, N), (numpy.tile(x, (10, 1)), numpy.tile(t, 10))
    else:
        x, t = net.put(x), net.put(t)
        losses = [float(net.step(x, t)) for _ in range(checked)]
    if draws:
        net = make_net(True)
        net.step(x, t)

    def run(count):
        if trainer:
            net.fit(*tenfold, count, N)
            return
        for _ in range(count):
            for _ in range(each):
                loss = net.step(x, t)
            float(loss)

    answer(results=[losses] if net.checked else None, about=net.about(x, t))
    clock(run, net.finish, steps=each)


def table(variant, device):
    """Print the results of each layer or optimizer given with its size on standard input, then times."""
    make, about = {"nnx": (nnx_call, numpy_blas), "PyTorch eager": (pytorch_call, pytorch_blas)}[variant]
    answer(about=about())
    while row := sys.stdin.readline().split():
        call, results, finish = make(*row, device)
        answer(results=results)
        clock(repeat(call), finish)


def arranged(file, layout):
    """Return the data in a file in the given memory layout."""
    if layout == "memory-mapped":
        return numpy.load(file, mmap_mode="r")
    x = numpy.load(file)
    if layout == "column slice":
        return numpy.pad(x, ((0, 0), (0, 216)))[:, : x.shape[1]]
    if layout == "F-ordered":
        return numpy.asfortranarray(x)
    if layout == "pandas DataFrame":
        import pandas

        return pandas.DataFrame(x)
    return x


def epochs(layout, device, x, t):
    """Print the losses of an epoch of Trainer, then times."""
    _, N, params = problem(DATA, numpy.random.default_rng(0))
    x, t, net = arranged(x, layout), numpy.load(t), nnx([p.astype("float32") for p in params], 0.1, device)
    epoch = functools.partial(net.fit, x, t, 1, N)
    answer(results=[epoch()], about=net.about())
    clock(repeat(epoch), net.finish)


def job(make, dtype, name, *files):
    """Train on the files of x and t; return the loss over all data, by the book's formulas for every variant."""
    workload, epochs, lr = JOBS[name]
    _, N, params = problem(workload, numpy.random.default_rng(0))
    x, t = map(numpy.load, files)
    x = x.astype(dtype)
    net = make([p.astype(dtype) for p in params], lr)
    (net.fit or functools.partial(loop, net))(x, t, epochs, N)
    chapter1.np = numpy  # from here on NumPy, also after a GPU run
    return [float(chapter1.TwoLayerNet(*net.weights()).forward(x, t))]


def peak_bytes():
    """Return the peak memory of this process; ru_maxrss would be inherited from the parent."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def page_faults():
    """Return the number of minor page faults of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def answer(**entries):
    print(json.dumps(entries), flush=True)


def main(device, variant, task, *data):
    try:
        if variant in LAYOUTS:
            epochs(variant, device, *data)
        elif task == "layers":
            table(variant, device)
        else:
            module, make, dtype = VARIANTS[variant]
            make = functools.partial(make, device=device)
            importlib.import_module(module)
            if task in language.WORKLOADS:
                steps(*language.prepare(variant, task, device), checked=5, each=1)  # of up to a second
            elif "/" in task:
                steps(*prepare(make, dtype, task), trainer=variant == "nnx Trainer")
            else:
                losses = job(make, dtype, task, *data) if task in JOBS else None
                answer(results=losses and [losses], bytes=peak_bytes())
    except ImportError as error:
        answer(note=f"absent: {error}")
    except Exception as error:
        traceback.print_exc()
        answer(note=f"failed: {type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("variant")
    parser.add_argument("task")
    parser.add_argument("data", nargs="*")
    arguments = parser.parse_args()
    main(arguments.device, arguments.variant, arguments.task, *arguments.data)
