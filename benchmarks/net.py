"""What the variants of `compare.py` share: a net in a library, the BLAS that it uses, and the optimizers' formulas."""
# ruff: noqa: PLC0415 - a process imports only its own library

import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy


def numpy_blas(*_):
    """Return NumPy's BLAS and its kernels, if threadpoolctl is installed to detect them."""
    if "cupy" in sys.modules:
        return f"CuPy {sys.modules['cupy'].__version__}, cuBLAS"
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return f"NumPy {numpy.__version__}, BLAS unknown without threadpoolctl"
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    about = "{internal_api} {version} {architecture}, {num_threads} threads"
    return "; ".join(about.format_map({"architecture": "kernels unknown", **library}) for library in libraries)


def pytorch_blas(*_):
    """Return what PyTorch reports about its BLAS: threadpoolctl does not detect statically linked libraries."""
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    kernels = f"{blas[1] if blas else 'BLAS unknown'}, own kernels {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {kernels}, {torch.get_num_threads()} threads"


def jax_library(lowered):
    """Return the JAX version, and the libraries that XLA uses for the matrix products of a step."""
    import jax

    step = lowered.compile().as_text()
    libraries = {"__ynn_fusion": "YNNPACK", "__onednn": "oneDNN", "__cublas": "cuBLAS"}
    used = [name for mark, name in libraries.items() if mark in step] or ["Eigen"]
    return f"jax {jax.__version__} on {jax.default_backend()}, {' and '.join(used)}, kernels unknown"


class Net(NamedTuple):
    """A net in one library, with its own parameters W1, b1, W2, ..."""

    step: Callable  # of x and t: performs a step and returns the loss as the library's object
    put: Callable  # of a host array: the array that is reused in all steps
    feed: Callable  # of a host array: the input of one step
    weights: Callable | None = None  # W1, b1, W2, ... on the host, of the nets that a JOB trains
    finish: Callable = lambda: None  # synchronizes the device
    fit: Callable | None = None  # the library's own training loop
    about: Callable = numpy_blas  # of x and t: the library, its BLAS and threads
    checked: bool = True  # whether its losses are those of the other variants


def updated(optimizer, lr, k, g, p, m=None, v=None):
    """Return a parameter and Adam's two moments after step k with gradient g, for libraries that compile the step."""
    if optimizer == "SGD":
        return (p - lr * g,)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    rate, decay = lr * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k), 0.01 * lr if optimizer == "AdamW" else 0
    return p * (1 - decay) - rate * m / (v**0.5 + 1e-7), m, v
