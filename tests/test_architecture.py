"""The order of the modules (each imports only from earlier ones), and restrictions on some of them."""

import ast
from pathlib import Path

import pytest

import nnx

ROOT = Path(nnx.__file__).parent
ORDER = [
    *("_version", "config", "np", "device", "protocols", "arguments", "rng"),
    *("kernels.portable", "kernels.native", "kernels.cuda", "kernels"),
    *("checks", "info", "functions", "initializers"),
    *("layers.base", "layers.linear", "layers.activation", "layers.loss", "layers.graph", "layers.dropout"),
    *("layers.embedding", "layers.normalization", "layers.negative_sampling", "layers.recurrent"),
    "layers.attention",
    *("layers", "time_layers"),
    *("tree", "optimizer", "dataset.files", "dataset.ptb", "dataset.sequence", "dataset.spiral", "dataset", "plotting"),
    *("checkpoint", "base_model", "models", "signals", "train_state", "batches", "distributed", "callbacks", "trainer"),
    *("util", "testing", "sklearn", "onnx"),
]
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in ROOT.rglob("*.py")}
COMPILED = {"kernels.native"}  # written in C
INSIDE = {name: path for name, path in FILES.items() if name not in ("__init__", "__main__")}


def imports(path):
    """Yield the modules that a file imports; those of the package by their qualified names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [m for m in submodules if m.removeprefix("nnx.") in {*FILES, *COMPILED}]
            yield from known or [node.module]


def test_order_lists_every_module():
    assert set(INSIDE) | COMPILED == set(ORDER)


@pytest.mark.parametrize("name", INSIDE)
def test_modules_import_only_earlier_ones(name):
    for module in imports(INSIDE[name]):
        if module == "nnx" or module.startswith("nnx."):
            inside = module.removeprefix("nnx.")
            assert inside in ORDER, f"{name} imports {module}"
            assert ORDER.index(inside) < ORDER.index(name), f"{name} imports {module}, which comes later"


@pytest.mark.parametrize("name", INSIDE)
def test_only_some_modules_branch_on_the_device(name):
    tree = ast.parse(INSIDE[name].read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    if name != "config":
        for variable in ("NNX_GPU", "NNX_NATIVE"):
            assert variable not in strings, f"{name} reads {variable}"
    if name not in ("np", "device", "kernels.cuda"):
        assert not any(m.split(".")[0] in ("cupy", "cupyx") for m in imports(INSIDE[name]))
    if name not in ("_version", "config", "np", "device", "kernels"):
        assert "GPU" not in names, f"{name} branches on the device"


def test_layers_and_kernels_do_not_synchronize_with_the_gpu():
    """No float(x), .item(), or print in a layer, loss, optimizer or kernel that runs on the GPU."""
    for name in ("kernels.portable", "optimizer", *(n for n in INSIDE if n.startswith("layers"))):
        for node in ast.walk(ast.parse(INSIDE[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in ("float", "int", "bool", "item", "print", "get"), f"{name}: line {node.lineno}"
