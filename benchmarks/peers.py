"""The variants that `compare.py` compares: nnx, its floor, the book's formulas, and the peers.

    python -m benchmarks.peers DEVICE VARIANT TASK [X.npy T.npy]    # DEVICE cpu or cuda; files for JOBS

is one variant in a process of its own; every answer is a line of JSON. The TASK 784-100-10/100 is a
workload: the losses of the first steps are answered at once, then each line of standard input, a
number of tens of steps, with the seconds that they took. The other tasks, `import` and the JOBS,
are whole programs. D inputs, H hidden (one or more), C classes, N rows of a batch.
"""
# ruff: noqa: PLC0415 - a process imports its own library and no other

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy

from benchmarks import book as chapter1

CHECKED = 20  # steps whose losses are compared
JOBS = {"spiral": ("2-10-3/30", 300, 1.0), "digits": ("64-100-10/100", 100, 0.5)}  # workload, epochs, learning rate


class Net(NamedTuple):
    """A net as its library trains it; `params`, W1, b1, W2, ... are its own."""

    step: Callable  # of x and t: takes a step and returns the loss, where the library keeps it
    put: Callable  # of a host array: the array that steps take again and again
    feed: Callable  # of a host array: what one step takes
    weights: Callable | None = None  # W1, b1, W2, ... on the host; the floor has none
    finish: Callable = lambda: None  # waits for the device
    fit: Callable | None = None  # a training loop of its own
    about: str = ""


def floor(params, lr, device):
    """Only multiply the matrices, the outputs given: no product for the gradient of the data."""
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

    return Net(step, asarray, asarray, finish=synchronize)


def nnx(params, lr, device):
    """Return TwoLayerNet, or Sequential for more than two layers."""
    import nnx
    from nnx import Affine, Sequential, Sigmoid, TwoLayerNet, asarray

    if len(params) == 4:
        model = TwoLayerNet(*params[0].shape, params[3].size)
        for mine, given in zip(model.params, params, strict=True):
            mine[...] = asarray(given)
    else:
        pairs = [(asarray(W), asarray(b)) for W, b in zip(params[::2], params[1::2], strict=True)]
        layers = [layer for W, b in pairs for layer in (Affine(W, b, input_grad=W is not pairs[0][0]), Sigmoid())]
        model = Sequential(layers[:-1], nnx.SoftmaxWithLoss())
    sgd = nnx.SGD(lr)

    def step(x, t):
        loss = model.forward(x, t)
        model.backward()
        sgd.update(model.params, model.grads)
        return loss

    def fit(x, t, epochs, N):
        trainer = nnx.Trainer(model, sgd, rng=0)
        trainer.fit(x, t, epochs, N, eval_interval=10, verbose=False)
        return trainer.loss_list

    return Net(step, asarray, asarray, lambda: [nnx.to_cpu(p) for p in model.params], nnx.synchronize, fit)


def book(params, lr, device):
    """Return the formulas of chapter 1; on the GPU they run on CuPy, as with the source's own shim."""
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


def pytorch(params, lr, device, compiled=False):
    """Eager as PyTorch's tutorials write it; compiled with gradients and update in one graph, its fastest form."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    put = functools.partial(torch.as_tensor, device=device)
    linears = []
    for W, b in zip(params[::2], params[1::2], strict=True):
        linears.append(torch.nn.Linear(*W.shape, device=device))
        linears[-1].load_state_dict({"weight": put(W.T.copy()), "bias": put(b)})
    layers = [layer for linear in linears for layer in (linear, torch.nn.Sigmoid())]
    model, loss_of = torch.nn.Sequential(*layers[:-1]), torch.nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr)

    def step(x, t):
        sgd.zero_grad()
        loss = loss_of(model(x), t)
        loss.backward()
        sgd.step()
        return loss.detach()

    if compiled:
        named = {name: p.detach() for name, p in model.named_parameters()}
        gradients = torch.func.grad_and_value(lambda p, x, t: loss_of(torch.func.functional_call(model, p, x), t))

        @functools.partial(torch.compile, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
        def step(x, t):
            grads, loss = gradients(named, x, t)
            for name, p in named.items():
                p.sub_(grads[name], alpha=lr)
            return loss

    def weights():
        return [array.numpy(force=True) for linear in linears for array in (linear.weight.T, linear.bias)]

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    about = f"torch {torch.__version__}, BLAS {blas[1] if blas else 'unknown'}, {torch.get_num_threads()} threads"
    return Net(step, put, put, weights, finish, about=about)


def jax(params, lr, device):
    """One jitted function of loss, gradients and update, the old weights donated to the new ones."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other processes need memory too
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_platforms", device)
    if device == "cuda":
        jax.config.update("jax_default_matmul_precision", "highest")  # float32, as the others: no TF32
    params = jax.device_put(params)

    def loss_of(params, x, t):
        for W, b in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = jax.nn.sigmoid(x @ W + b)
        scores = x @ params[-2] + params[-1]
        return -jax.nn.log_softmax(scores)[jnp.arange(len(t)), t].mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def update(params, x, t):
        loss, grads = jax.value_and_grad(loss_of)(params, x, t)
        return [p - lr * g for p, g in zip(params, grads, strict=True)], loss

    def step(x, t):
        nonlocal params
        params, loss = update(params, x, t)
        return loss

    # a jitted call takes host arrays faster than device_put makes them
    return Net(
        step,
        jax.device_put,
        lambda array: array,
        lambda: jax.device_get(params),
        lambda: jax.block_until_ready(params),
        about=f"jax {jax.__version__} on {jax.default_backend()}",
    )


VARIANTS = {  # the module without which there is nothing to compare, the net, its dtype
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
    """Return sizes and N of a workload, and the weights that every variant starts from: float64, on the host."""
    *sizes, N = map(int, re.split("[-/]", workload))
    pairs = [(rng.standard_normal((D, H)) / D**0.5, 0.1 * rng.standard_normal(H)) for D, H in itertools.pairwise(sizes)]
    return sizes, N, [array for pair in pairs for array in pair]


def loop(net, x, t, epochs, N):
    """Train as `Trainer.fit` does: the same shuffles, the loss read at every tenth step of an epoch."""
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


def steps(make, dtype, workload, trainer):
    """Answer the losses of a workload's first steps, then times."""
    rng = numpy.random.default_rng(0)
    sizes, N, params = problem(workload, rng)
    x, t = rng.standard_normal((N, sizes[0])).astype(dtype), rng.integers(sizes[-1], size=N)
    net = make([p.astype(dtype) for p in params], 0.1)
    if trainer:  # an epoch of ten batches
        losses, tenfold = net.fit(x, t, CHECKED, N), (numpy.tile(x, (10, 1)), numpy.tile(t, 10))
    else:
        x, t = net.put(x), net.put(t)
        losses = [float(net.step(x, t)) for _ in range(CHECKED)]
    answer(losses=losses if net.weights else None, about=net.about)
    for line in sys.stdin:
        begin = time.perf_counter()
        if trainer:
            net.fit(*tenfold, int(line), N)
        else:
            for _ in range(int(line)):
                for _ in range(10):
                    loss = net.step(x, t)
                float(loss)
        net.finish()
        answer(seconds=time.perf_counter() - begin)


def job(make, dtype, name, *files):
    """Train on the files of x and t; answer the loss over all of it, for every variant by the book's formulas."""
    workload, epochs, lr = JOBS[name]
    _, N, params = problem(workload, numpy.random.default_rng(0))
    x, t = map(numpy.load, files)
    x = x.astype(dtype)
    net = make([p.astype(dtype) for p in params], lr)
    (net.fit or functools.partial(loop, net))(x, t, epochs, N)
    chapter1.np = numpy  # from now on, the GPU's too
    return [float(chapter1.TwoLayerNet(*net.weights()).forward(x, t))]


def peak_bytes():
    """Return the most memory that this process held; its ru_maxrss would begin with its parent's."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def answer(**entries):
    print(json.dumps(entries), flush=True)


def main(device, variant, task, *data):
    module, make, dtype = VARIANTS[variant]
    make = functools.partial(make, device=device)
    try:
        importlib.import_module(module)
        if "/" in task:
            steps(make, dtype, task, trainer=variant == "nnx Trainer")
        else:
            losses = job(make, dtype, task, *data) if task in JOBS else None
            answer(losses=losses, bytes=peak_bytes())
    except ImportError as error:
        answer(note=f"absent: {error}")
    except Exception as error:
        traceback.print_exc()
        answer(note=f"failed: {type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
