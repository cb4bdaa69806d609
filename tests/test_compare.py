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
from benchmarks.parts import take_apart
from benchmarks.report import duration

ROOT = Path(__file__).parents[1]
WORKLOAD = "2-10-3/30"


on_linux = pytest.mark.skipif(nnx.GPU or sys.platform != "linux", reason="the comparison without a GPU, on Linux")


def compare(*patterns, out, path=ROOT):
    """Run the comparison, and return its output, groups and tables."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), "OPENBLAS_CORETYPE": "Haswell"}
    command = [sys.executable, "-m", "benchmarks.compare", "--quick", "--only", *patterns, "--out", out]
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


@on_linux
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="without PyTorch")
def test_compare_layers(tmp_path):
    names = ["ReLU 32x64", "Adam 64-100-10"]
    _, groups, table = compare(*(f"layers/{name}" for name in names), out=tmp_path)
    ratios = {row["group"]: row["to PyTorch eager"][1] for row in groups["layers"] if row["variant"] == "nnx"}
    assert [*ratios] == names
    assert f"| optimizers | {ratios[names[1]]:.2f} |" in table
    assert f"| all | {statistics.geometric_mean(ratios.values()):.2f} |" in table


def test_readme_quotes_the_committed_results():
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    quoted = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines)}
    for group, rows in result["groups"].items():
        if group in ("layers", "data"):  # separate tables
            continue
        rows = {row["variant"]: row for row in rows}
        nnx_row = rows["nnx"]
        step = "floor" in rows
        cells = [duration(nnx_row["quartiles"][1])]
        cells.append(f"{nnx_row['to floor'][1]:.2f}" if step else f"{nnx_row['bytes'] / 1e6:.0f} MB")
        for peer in ("book float64", "PyTorch eager", *["torch.compile"] * step, "jax.jit"):
            cells.append(f"{rows[peer]['to nnx'][1]:.2f}" if peer in rows else "-")
        assert quoted[group] == cells, group


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
