"""Selection of the array module, and errors when it is not available."""

import importlib
import os
import subprocess
import sys
import types

import numpy
import pytest

import nnx
from nnx import config

shim = importlib.import_module("nnx.np")  # the submodule; the package's own `np` is the library


def run(code, **environment):
    """Run `code` in a new Python process with `environment` added (None: unset)."""
    variables = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_import_forms_give_the_library_itself():
    import nnx.np as np_as

    namespace = {}
    exec("from nnx.np import *", namespace)
    from nnx import np as np_from
    from nnx.np import zeros

    library = sys.modules["cupy" if nnx.GPU else "numpy"]
    assert np_as is np_from is nnx.np is namespace["np"] is library
    assert namespace["GPU"] is nnx.GPU is config.GPU
    assert {name for name in namespace if not name.startswith("_")} == {"np", "GPU"}
    assert zeros is library.zeros


def test_missing_attribute_error():
    with pytest.raises(ImportError, match="scatter_add"):
        exec("from nnx.np import scatter_add", {})
    with pytest.raises(AttributeError, match=rf"neither nnx.np nor {nnx.np.__name__} has 'scatter_add'"):
        shim.scatter_add  # noqa: B018 - tests the attribute look-up


@pytest.mark.parametrize("value", [None, "", "0", "false", "no", "off", "OFF", " 0 "])
def test_disabled_is_numpy_without_further_imports(value):
    code = (
        "import sys, numpy, nnx; assert nnx.np is numpy and nnx.GPU is False; "
        "optional = ('cupy', 'matplotlib', 'tqdm', 'safetensors', 'sklearn', 'scipy', 'onnx'); "
        "print([m for m in optional if m in sys.modules])"
    )
    result = run(code, NNX_GPU=value)
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize("value", ["banana", "2", "-1", "cuda"])
def test_other_values_are_rejected(value):
    error = run("import nnx", NNX_GPU=value).stderr.splitlines()[-1]
    message = "ValueError: NNX_GPU must be on (1, true, yes, on), off (0, false, no, off) or unset"
    assert error.startswith(f"{message}, got {value!r}")
    assert ("CUDA_VISIBLE_DEVICES" in error) == (value == "2")


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_enabled_requires_cupy(value):
    blocked = "import sys; sys.modules['cupy'] = None; import nnx"  # the import system then has no cupy
    result = run(blocked, NNX_GPU=value)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: NNX_GPU=1, but CuPy cannot be imported: pip install")
    assert "ModuleNotFoundError" in result.stderr  # the original is kept


def test_old_cupy_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(__version__="13.6.0"))
    with pytest.raises(ImportError, match=r"nnx needs CuPy 14 or newer and found 13\.6\.0: pip install cupy-cuda13x"):
        shim._import_cupy()


class Runtime:
    """A mock of CuPy's runtime with configurable results for the checks at import."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, devices=1, driver=13000, status=35):
        self.devices, self.driver, self.status = devices, driver, status

    def getDeviceCount(self):
        if self.devices is None:
            error = self.CUDARuntimeError("cudaErrorSomething")
            error.status = self.status
            raise error
        return self.devices

    def driverGetVersion(self):
        return self.driver

    def runtimeGetVersion(self):
        return 13020


def missing():
    raise RuntimeError("libnvrtc.so not found")


@pytest.mark.parametrize(
    ("runtime", "cuda", "words"),
    [
        (Runtime(None, 0), {}, "no NVIDIA driver is installed"),
        (Runtime(None, 12080), {}, "the driver supports CUDA 12.8, but this CuPy needs 13.2; .* install cupy-cuda12x"),
        (Runtime(None, 13020, 100), {}, "the driver reports no device; see nvidia-smi"),
        (Runtime(0), {}, "no CUDA device is visible; see CUDA_VISIBLE_DEVICES"),
        (
            Runtime(),
            {"nvrtc": types.SimpleNamespace(getVersion=missing)},
            r"NVRTC .*cannot be loaded: .*toolkit.*==13",
        ),
        (Runtime(), {"nvrtc": types.SimpleNamespace(getVersion=int)}, "cuBLAS .*cannot be loaded"),
        (Runtime(), {"nvrtc": types.SimpleNamespace(getVersion=int), "cublas": 1}, "cuRAND .*cannot be loaded"),
    ],
)
def test_missing_cuda_component_error(runtime, cuda, words, monkeypatch):
    class Cuda(types.SimpleNamespace):
        def __getattr__(self, name):  # as CuPy 14 does for a library that it cannot load
            raise ImportError(name)

    cupy = types.SimpleNamespace(__version__="14.0.0", cuda=Cuda(runtime=runtime, **cuda))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match=f"NNX_GPU=1.*{words}") as error:
        shim._import_cupy()
    assert runtime.devices == 0 or error.value.__cause__ is not None


def test_the_choice_cannot_be_changed_later():
    config.GPU = config.GPU  # assigning the current value is allowed, as scripts of the book do
    with pytest.raises(AttributeError, match=f"start Python with NNX_GPU={int(not nnx.GPU)}"):
        config.GPU = not nnx.GPU
    assert config.GPU is nnx.GPU


def test_module_run_prints_the_configuration():
    result = subprocess.run([sys.executable, "-m", "nnx"], capture_output=True, text=True, check=True)
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["nnx"].startswith(f"{nnx.__version__} on {'CuPy' if nnx.GPU else 'NumPy'}")
    assert rows["NumPy"] == numpy.__version__
    assert ("device" in rows) == nnx.GPU
