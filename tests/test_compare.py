"""The comparison with other libraries writes its rows, and reports libraries that are absent."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import nnx
from benchmarks import book, language
from benchmarks.parts import take_apart

ROOT = Path(__file__).parents[1]
WORKLOAD = "2-10-3/30"


on_linux = pytest.mark.skipif(nnx.GPU or sys.platform != "linux", reason="the comparison without a GPU, on Linux")


def compare(*patterns, out, path=ROOT, flags=()):
    """Run the comparison, and return its output, groups and tables."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "OPENBLAS_CORETYPE": "Haswell"}
    command = [sys.executable, "-m", "benchmarks.compare", "--quick", *flags, "--only", *patterns, "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    groups = json.loads((out / "cpu.json").read_text(encoding="utf-8"))["groups"]
    return done.stdout, groups, (out / "cpu.md").read_text(encoding="utf-8")


@on_linux
def test_compare_without_peers(tmp_path):
    for peer in ("torch", "jax"):  # absent, even if installed
        (tmp_path / f"{peer}.py").write_text(f"raise ImportError('{peer} is not installed')\n", encoding="utf-8")
    printed, groups, table = compare(WORKLOAD, "layers/ReLU 32x64", out=tmp_path / "results", path=tmp_path)
    assert printed.startswith("warning: OPENBLAS_CORETYPE=Haswell")
    rows = {row["variant"]: row for row in groups[WORKLOAD]}
    for variant in ("floor", "nnx", "nnx Trainer", "book float64", "book float32"):
        assert len(rows[variant]["seconds"]) == 3
        assert rows[variant]["to nnx"][1] > 0
        assert rows[variant]["faults"] >= 0
        assert "threads" in rows[variant]["about"] or "unknown" in rows[variant]["about"]
    assert rows["nnx"]["to nnx"] == [1, 1, 1]
    for variant, peer in {"PyTorch eager": "torch", "torch.compile": "torch", "jax.jit": "jax"}.items():
        assert f"| {variant} | absent: {peer} is not installed |" in table
    mine, peer = groups["layers"]
    assert mine["quartiles"]
    assert peer["note"] == "absent: torch is not installed"
    before = groups[WORKLOAD]
    _, groups, table = compare("import/nnx", out=tmp_path / "results", path=tmp_path, flags=["--update"])
    assert [*groups] == ["layers", WORKLOAD, "import"]
    assert groups[WORKLOAD] == before
    assert f"| measured before | layers, {WORKLOAD}: " in table


@on_linux
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="without PyTorch")
def test_compare_layers(tmp_path):
    names = ["ReLU 32x64", "Adam 64-100-10"]
    _, groups, table = compare(*(f"layers/{name}" for name in names), out=tmp_path)
    ratios = {row["group"]: row["to PyTorch eager"][1] for row in groups["layers"] if row["variant"] == "nnx"}
    assert [*ratios] == names
    assert f"| optimizers | {ratios[names[1]]:.2f} |" in table
    assert f"| all | {statistics.geometric_mean(ratios.values()):.2f} |" in table


@pytest.mark.parametrize("variant", ["nnx", "PyTorch eager"])
@pytest.mark.parametrize("workload", ["LSTM 50-6/3x4", "GRU 50-6/3x4", "CBOW 50-6/7"])
def test_language_models_train_as_the_book_does(workload, variant, monkeypatch):
    if variant != "nnx":
        pytest.importorskip("torch")
    monkeypatch.setattr(book, "np", nnx.np)
    losses, checked = {}, True
    for name in ("book float32", variant):
        device = "cuda" if nnx.GPU and name != "PyTorch eager" else "cpu"
        make_net, _, x, t = language.prepare(name, workload, device)
        net = make_net(False)
        x, t = net.put(x), net.put(t)
        losses[name] = [float(net.step(x, t)) for _ in range(9)]
        checked &= net.checked
    expected = losses["book float32"]
    assert expected[-1] < expected[0]
    assert checked == ((workload[:3], variant) != ("GRU", "PyTorch eager"))
    close = 1e-2 if (workload[:4], variant) == ("CBOW", "PyTorch eager") else 1e-4  # it adds Adam's eps elsewhere
    assert not checked or losses[variant] == pytest.approx(expected, rel=close)


def test_negative_samples_are_drawn_unless_the_losses_are_compared():
    make_net, draws, x, t = language.prepare("nnx", "CBOW 50-6/7", "cpu")
    assert draws
    net = make_net(True)
    assert len({float(net.step(net.put(x), net.put(t))) for _ in range(3)}) == 3


@pytest.mark.skipif(nnx.GPU, reason="the same on both devices")
def test_pytest_benchmarks_prints_tables_that_fit_a_terminal():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "benchmarks/bench_layers.py"]
    # Within pytest-xdist, whose variables tell pytest-benchmark to measure nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-k", "2-10-3 and matmul", "--benchmark-max-time=0.01"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    table = lines[lines.index("matmul 2-10-3/30: x @ W") :][:4]
    assert {line.split("  ")[1] for line in table[1:]} == {"floor float32", "nnx float32", "book float64"}
    assert all(line.endswith(" x floor float32") for line in table[1:])
    assert max(map(len, lines)) <= 80


def test_take_apart_lists_the_parts_in_execution_order():
    parts = take_apart("6-5-4-3/20", seconds=0.05)
    assert [name for name, _, _ in parts] == [
        *("Affine 1 forward", "Sigmoid 1 forward", "Affine 2 forward", "Sigmoid 2 forward", "Affine 3 forward"),
        *("SoftmaxWithLoss forward", "SoftmaxWithLoss backward"),
        *("Affine 3 backward", "Sigmoid 2 backward", "Affine 2 backward", "Sigmoid 1 backward", "Affine 1 backward"),
        "SGD update",
    ]
    assert sum(seconds for _, seconds, _ in parts) > 0  # a single part may be shorter than the clock's overhead
    assert [products != 0 for name, _, products in parts] == ["Affine" in name for name, _, _ in parts]


@pytest.mark.parametrize("script", ["compare", "curves", "host", "parts", "peers", "ranks", "report"])
def test_every_script_explains_itself(script):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"benchmarks.{script}" in done.stdout
