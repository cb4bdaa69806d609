"""The configuration nnx runs with: versions, device, kernels, BLAS and threads."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from typing import Any

import numpy

from nnx import device, kernels
from nnx._version import __version__

__all__ = ["show_config"]


def show_config() -> None:
    """Print the configuration: versions, device, kernels, BLAS and threads.

    Examples
    --------
    >>> from nnx import show_config
    >>> show_config()
    nnx       ... on ...
    """
    rows = [
        ("nnx", f"{__version__} on {device.array_module()}"),
        ("Python", f"{sys.version.split()[0]}, {platform.platform()}"),
        ("NumPy", numpy.__version__),
        ("kernels", _kernels()),
        ("BLAS", _blas()),
        ("threads", _threads()),
        *device.describe_gpu(),
    ]
    print("\n".join(f"{name:10}{value}" for name, value in rows))  # noqa: T201 - printing is its purpose


def _kernels() -> str:
    """Return the kernels in use, with their instruction set, or why the native ones are not used."""
    if kernels.KERNELS == "native":
        native: Any = importlib.import_module("nnx.kernels.native")
        return f"native ({native.INSTRUCTIONS})"
    if kernels.KERNELS == "cuda":
        return "cuda"
    if kernels.native_error is None:
        return "portable: NNX_NATIVE=0"
    what = "was not built" if isinstance(kernels.native_error, ModuleNotFoundError) else "cannot be imported"
    return f"portable: nnx.kernels.native {what} ({kernels.native_error}); install a C compiler and reinstall nnx"


def _blas() -> str:
    """Return NumPy's BLAS and, if threadpoolctl reports it, the architecture of its kernels."""
    blas: Any = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    try:
        pools: list[dict[str, Any]] = importlib.import_module("threadpoolctl").threadpool_info()
    except ImportError:
        pools = []
    architectures = {pool["architecture"] for pool in pools if pool["user_api"] == "blas" and pool.get("architecture")}
    return ", ".join([f"{blas['name']} {blas['version']}", *sorted(architectures)])


def _threads() -> str:
    """Return the thread limits set by environment variables, or the number of cores."""
    variables = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    limits = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join(limits) or f"{cores} cores, no limit set"
