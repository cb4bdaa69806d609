"""The kernels selected by NNX_NATIVE, with and without the extension, and the output of show_config."""

import importlib
import re
import sys
import types

import pytest
from test_shim import run

import nnx
from nnx import config, kernels

ABSENT = "import sys; sys.modules['nnx.kernels.native'] = None\n"  # the import system then has no such module
PRESENT = """
import sys, types
native = sys.modules['nnx.kernels.native'] = types.ModuleType('nnx.kernels.native')
native.__all__, native.INSTRUCTIONS, native.relu_grad = ['relu_grad'], 'AVX2', len
"""
BINDING = """
import nnx
from nnx import config, kernels
print(config.NATIVE, kernels.KERNELS, type(kernels.native_error).__name__, kernels.relu_grad.__module__)
"""
PORTABLE = "nnx.kernels.portable"


@pytest.mark.parametrize(
    ("extension", "value", "binding"),
    [
        *((PRESENT, value, "None native NoneType builtins") for value in (None, "", " ")),
        *((PRESENT, value, "True native NoneType builtins") for value in ("1", "true", "YES", " on ")),
        *((PRESENT, value, f"False portable NoneType {PORTABLE}") for value in ("0", "false", "No", " off ")),
        (ABSENT, None, f"None portable ModuleNotFoundError {PORTABLE}"),
        (ABSENT, "0", f"False portable NoneType {PORTABLE}"),
    ],
)
def test_binding(extension, value, binding):
    result = run(extension + BINDING, NNX_GPU="0", NNX_NATIVE=value)
    assert (result.stdout.strip(), result.stderr) == (binding, "")


def test_enabled_without_the_extension_is_an_import_error():
    result = run(ABSENT + "import nnx", NNX_GPU="0", NNX_NATIVE="1")
    assert result.returncode == 1
    assert re.fullmatch(
        "ImportError: NNX_NATIVE=1, but nnx.kernels.native cannot be imported: .*nnx.kernels.native.*; "
        "install a C compiler and reinstall nnx, or unset NNX_NATIVE",
        result.stderr.splitlines()[-1],
    )
    assert "ModuleNotFoundError" in result.stderr  # the original is kept


@pytest.mark.parametrize("value", ["banana", "2", "-1", "AVX2"])
@pytest.mark.parametrize("gpu", ["0", "1"])
def test_other_values_are_rejected(value, gpu):
    error = run("import nnx", NNX_GPU=gpu, NNX_NATIVE=value).stderr.splitlines()[-1]
    assert error == (
        f"ValueError: NNX_NATIVE must be on (1, true, yes, on), off (0, false, no, off) or unset, got {value!r}"
    )


def test_the_choice_cannot_be_changed_later():
    config.NATIVE = config.NATIVE
    other = not config.NATIVE
    with pytest.raises(AttributeError, match=f"start Python with NNX_NATIVE={int(other)}$"):
        config.NATIVE = other


@pytest.mark.skipif(not nnx.GPU, reason="needs CuPy (NNX_GPU=1)")
@pytest.mark.parametrize("value", ["0", "1"])
def test_nnx_native_is_ignored_on_the_gpu(value):
    result = run(ABSENT + BINDING, NNX_NATIVE=value)
    assert (result.stdout.split()[1:], result.stderr) == (["cuda", "NoneType", "nnx.kernels.cuda"], "")


@pytest.mark.skipif(kernels.KERNELS != "native", reason="nnx.kernels.native is not used")
def test_extension_defines_all_its_names():
    native = importlib.import_module("nnx.kernels.native")
    assert native.__all__
    for name in native.__all__:
        assert getattr(kernels, name) is getattr(native, name)
    assert isinstance(native.INSTRUCTIONS, str)


def rows(capsys):
    nnx.show_config()
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_show_config_has_a_row_of_kernels(capsys):
    assert rows(capsys)["kernels"].startswith(kernels.KERNELS)


@pytest.mark.parametrize(
    ("name", "error", "row"),
    [
        ("cuda", None, "cuda"),
        ("portable", None, "portable: NNX_NATIVE=0"),
        (
            "portable",
            ModuleNotFoundError("No module named 'nnx.kernels.native'"),
            "portable: nnx.kernels.native was not built (No module named 'nnx.kernels.native'); "
            "install a C compiler and reinstall nnx",
        ),
        (
            "portable",
            ImportError("undefined symbol: expf"),
            "portable: nnx.kernels.native cannot be imported (undefined symbol: expf); "
            "install a C compiler and reinstall nnx",
        ),
    ],
)
def test_show_config_gives_the_reason_for_portable_kernels(name, error, row, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "KERNELS", name)
    monkeypatch.setattr(kernels, "native_error", error)
    assert rows(capsys)["kernels"] == row


def test_show_config_names_the_instruction_set():
    result = run(PRESENT + "import nnx; nnx.show_config()", NNX_GPU="0", NNX_NATIVE=None)
    assert "kernels   native (AVX2)\n" in result.stdout


def test_show_config_names_the_architecture_of_the_blas(monkeypatch, capsys):
    pools = [
        {"user_api": "blas", "architecture": "Zen"},
        {"user_api": "blas", "architecture": None},
        {"user_api": "openmp"},
    ]
    monkeypatch.setitem(sys.modules, "threadpoolctl", types.SimpleNamespace(threadpool_info=lambda: pools))
    with_architecture = rows(capsys)["BLAS"]
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert with_architecture == rows(capsys)["BLAS"] + ", Zen"
