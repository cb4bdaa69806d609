"""Single layers and optimizers in nnx and in PyTorch, for the table `layers` of `compare.py`.

A size is N x D, the rows and features of a layer's input; V x H, an embedding's vocabulary and vectors; or
D-H-C, the net whose parameters an optimizer updates.
"""
# ruff: noqa: PLC0415 - a process imports only its own library

import functools
import itertools

import numpy

NORMS = ["BatchNorm", "LayerNorm"]
LOSSES = ["SoftmaxWithLoss", "SigmoidWithLoss", "MeanSquaredError"]
LAYERS = ["ReLU", "Sigmoid", "Tanh", "GELU", "Softmax", "Dropout", *NORMS, *LOSSES]
OPTIMIZERS = ["SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW"]
SIZES = {
    **dict.fromkeys(["32x64", "128x512", "1024x1024"], LAYERS),
    "10000x100": ["Embedding"],
    **dict.fromkeys(["64-100-10", "784-512-10", "1024-4096-1024"], OPTIMIZERS),
}
LR, STEPS = 0.01, 3  # of an optimizer; the sum of the first steps is compared


def nnx_layer(name, *arrays, ratio=0.5):
    import nnx

    return nnx.Dropout(ratio, rng=0) if name == "Dropout" else getattr(nnx, name)(*map(nnx.asarray, arrays))


def pytorch_layer(name, *arrays, ratio=0.5):
    """Return the PyTorch module equivalent to nnx's layer; scales are 1 and shifts 0 in both."""
    from torch import as_tensor, nn

    def linear(W, b):
        module = nn.Linear(*W.shape)
        module.load_state_dict({"weight": as_tensor(W.T.copy()), "bias": as_tensor(b)})
        return module

    modules = {
        "Affine": linear,
        "Embedding": lambda W: nn.Embedding.from_pretrained(as_tensor(W), freeze=False),
        "BatchNorm": lambda gamma, beta: nn.BatchNorm1d(len(gamma)),
        "LayerNorm": lambda gamma, beta: nn.LayerNorm(len(gamma)),
        "GELU": lambda: nn.GELU(approximate="tanh"),
        "Softmax": lambda: nn.Softmax(dim=-1),
        "Dropout": lambda: nn.Dropout(ratio),
        "SoftmaxWithLoss": nn.CrossEntropyLoss,
        "SigmoidWithLoss": nn.BCEWithLogitsLoss,
        "MeanSquaredError": nn.MSELoss,
    }
    return modules.get(name, getattr(nn, name, None))(*arrays)


def pytorch_optimizer(name, params, lr):
    from torch import optim

    others = {
        "Momentum": functools.partial(optim.SGD, momentum=0.9),
        "Nesterov": functools.partial(optim.SGD, momentum=0.9, nesterov=True),
        "AdaGrad": functools.partial(optim.Adagrad, eps=1e-7),
        "RMSprop": functools.partial(optim.RMSprop, eps=1e-7),
    }
    return others.get(name, getattr(optim, name, None))(params, lr)


def layer_arrays(name, size):
    """Return a layer's parameters, its input, and its targets or the gradient of its output."""
    rng = numpy.random.default_rng(0)
    N, D = map(int, size.split("x"))
    x = rng.standard_normal((N, D), "float32")
    if name == "Embedding":
        return [x], rng.integers(N, size=(20, 35)), rng.standard_normal((20, 35, D), "float32")
    params = [numpy.ones(D, "float32"), numpy.zeros(D, "float32")] if name in NORMS else []
    if name in ("SoftmaxWithLoss", "SigmoidWithLoss"):
        return params, x, rng.integers(D, size=N) if name == "SoftmaxWithLoss" else rng.integers(2, size=(N, D))
    return params, x, rng.standard_normal((N, D), "float32")


def net_arrays(size, seed):
    """Return the parameters of a net (seed 0), or their gradients (seed 1)."""
    rng = numpy.random.default_rng(seed)
    shapes = [shape for D, H in itertools.pairwise(map(int, size.split("-"))) for shape in ((D, H), (H,))]
    return [rng.random(shape, "float32") + 0.5 for shape in shapes]  # not near 0: PyTorch adds Adam's eps elsewhere


def first_steps(call, params, size):
    """Return the change of `params`, an iterator over their arrays on the host, after the first steps."""
    for _ in range(STEPS):
        call()
    return sample((p - before) / LR for p, before in zip(params, net_arrays(size, 0), strict=True))


def sample(arrays):
    """Return about a hundred elements of each array."""
    return [array.ravel()[:: array.size // 100 + 1].tolist() for array in arrays]


def share_kept(y, dx):
    """Return statistics of Dropout's results that do not depend on the mask, which differs between libraries."""
    return [[round(float((y != 0).mean()), 1), float(((y != 0) == (dx != 0)).mean())]]


def nnx_call(name, size, device):
    """Return a function that runs the layer or optimizer, its results, and a function that synchronizes the device.

    The results are the layer's outputs and gradients, or the sum of an optimizer's first steps over its learning rate.
    """
    import nnx

    if name in OPTIMIZERS:
        params, grads = ([*map(nnx.asarray, net_arrays(size, seed))] for seed in (0, 1))
        call = functools.partial(getattr(nnx, name)(LR).update, params, grads)
        return call, first_steps(call, map(nnx.to_cpu, params), size), nnx.synchronize
    arrays, *given = layer_arrays(name, size)
    layer, x, last = nnx_layer(name, *arrays), *map(nnx.asarray, given)

    def call():
        if name in LOSSES:
            return layer.forward(x, last), layer.backward()
        return layer.forward(x), layer.backward(last)

    results = [nnx.to_cpu(array) for array in (*call(), *layer.grads) if array is not None]
    return call, share_kept(*results) if name == "Dropout" else sample(results), nnx.synchronize


def pytorch_call(name, size, device):
    """Return the same for PyTorch's module or optimizer."""
    import torch

    put = functools.partial(torch.as_tensor, device=device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    if name in OPTIMIZERS:
        params, grads = ([*map(put, net_arrays(size, seed))] for seed in (0, 1))
        params = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        call = pytorch_optimizer(name, params, LR).step
        return call, first_steps(call, (p.numpy(force=True) for p in params), size), finish
    arrays, *given = layer_arrays(name, size)
    module, x, last = pytorch_layer(name, *arrays).to(device), *map(put, given)
    if name == "SigmoidWithLoss":
        last = last.float()
    leaves = [x.requires_grad_(x.is_floating_point()), *module.parameters()]

    def call():
        for leaf in leaves:
            leaf.grad = None
        if name in LOSSES:
            y = module(x, last)
            y.backward()
        else:
            y = module(x)
            y.backward(last)
        return y

    results = [a.numpy(force=True) for a in (call(), *(leaf.grad for leaf in leaves)) if a is not None]
    return call, share_kept(*results) if name == "Dropout" else sample(results), finish
