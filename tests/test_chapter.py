"""The seed gives one curve on both devices, and the examples end with what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import nnx
from nnx import SGD, Trainer, TwoLayerNet, spiral

EXAMPLES = Path(__file__).parents[1] / "examples"

CURVE = """
import json
from nnx import SGD, Trainer, TwoLayerNet, spiral
trainer = Trainer(TwoLayerNet(2, 10, 3, rng=1984), SGD(1.0), rng=1984)
trainer.fit(*spiral.load_data(), 300, 30, eval_interval=10, verbose=False)
print(json.dumps(trainer.loss_list))
"""


def test_the_seed_gives_the_curve_of_numpy():
    """In this process on its device, in the other one on NumPy: equal bits on NumPy, 1e-4 on CuPy."""
    trainer = Trainer(TwoLayerNet(2, 10, 3, rng=1984), SGD(1.0), rng=1984)
    trainer.fit(*spiral.load_data(), 300, 30, eval_interval=10, verbose=False)
    result = subprocess.run(
        [sys.executable, "-c", CURVE], env={**os.environ, "NNX_GPU": "0"}, capture_output=True, text=True, check=True
    )
    numpy.testing.assert_allclose(trainer.loss_list, json.loads(result.stdout), rtol=1e-4 if nnx.GPU else 0)


def run(name, *arguments):
    pytest.importorskip("matplotlib")
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_train_spiral(tmp_path):
    out = run("train_spiral", "--epochs", "3", "--picture", str(tmp_path / "spiral.png"))
    assert "| epoch 3 |  iter 1 / 10 |" in out
    assert out.splitlines()[-1].endswith("on the 300 points")
    assert (tmp_path / "spiral.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(nnx.GPU, reason="one full training is enough; the curve of CuPy is compared above")
def test_train_spiral_reaches_what_it_promises():
    accuracy = float(run("train_spiral", "--picture", "").splitlines()[-1].split("accuracy ")[1].split()[0])
    assert accuracy >= 0.95


@pytest.mark.parametrize("name", ["train_custom_loop", "chapter1"])
def test_example_ends_with_its_number(name):
    assert run(name, "--epochs", "3").splitlines()[-1].endswith("on the 300 points")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_explain_themselves(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    assert run(path.stem, "--help").startswith("usage:")


def test_the_code_of_the_readme_runs(tmp_path):
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    data = "import numpy\nimport nnx\nx = x_test = numpy.random.randn(256, 784)\nt = t_test = numpy.arange(256) % 10\n"
    script = tmp_path / "readme.py"
    script.write_text(data + "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)), encoding="utf-8")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| epoch 10 |  iter 1 / 2 |" in result.stdout
