"""The time of `import nnx` and of importing NumPy (and CuPy), each in a new process, including Python's startup."""

import subprocess
import sys

import pytest

from nnx import np


@pytest.mark.parametrize("variant", dict.fromkeys(["numpy", np.__name__, "nnx"]))
def test_import(benchmark, pytestconfig, variant):
    benchmark.group, benchmark.extra_info["compared"] = "import", "a process from Python's start to its end"
    command = [sys.executable, "-c", f"import {variant}"]
    benchmark.pedantic(
        subprocess.run, (command,), {"check": True, "cwd": pytestconfig.rootpath}, rounds=7, warmup_rounds=1
    )
