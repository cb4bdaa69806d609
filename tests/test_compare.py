"""The comparison with the peers writes its rows, and names the peers that are absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnx

ROOT = Path(__file__).parents[1]
WORKLOAD = "2-10-3/30"


@pytest.mark.skipif(nnx.GPU or sys.platform != "linux", reason="the comparison without a GPU, on Linux")
def test_compare(tmp_path):
    for peer in ("torch", "jax"):  # absent, also where they are installed
        (tmp_path / f"{peer}.py").write_text(f"raise ImportError('{peer} is not installed')\n", encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.compare", "--quick", "--only", WORKLOAD, "--out", tmp_path / "results"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "cpu.json").read_text(encoding="utf-8"))
    rows = {row["variant"]: row for row in result["groups"][WORKLOAD]}
    for variant in ("floor", "nnx", "nnx Trainer", "book float64", "book float32"):
        assert len(rows[variant]["seconds"]) == 3
        assert rows[variant]["to nnx"][1] > 0
    assert rows["nnx"]["to nnx"] == [1, 1, 1]
    table = (tmp_path / "results" / "cpu.md").read_text(encoding="utf-8")
    for variant, peer in {"PyTorch eager": "torch", "torch.compile": "torch", "jax.jit": "jax"}.items():
        assert f"| {variant} | absent: {peer} is not installed |" in table
