"""The same seed gives the same curve on both devices, and the examples reach their documented results."""

import gzip
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


def test_same_seed_gives_same_curve_as_numpy():
    """Compare with a NumPy process: bit-identical on NumPy, within 1e-4 on CuPy."""
    trainer = Trainer(TwoLayerNet(2, 10, 3, rng=1984), SGD(1.0), rng=1984)
    trainer.fit(*spiral.load_data(), 300, 30, eval_interval=10, verbose=False)
    result = subprocess.run(
        [sys.executable, "-c", CURVE], env={**os.environ, "NNX_GPU": "0"}, capture_output=True, text=True, check=True
    )
    numpy.testing.assert_allclose(trainer.loss_list, json.loads(result.stdout), rtol=1e-4 if nnx.GPU else 0)


def run(name, *arguments):
    pytest.importorskip("sklearn" if name == "train_digits" else "matplotlib")
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
def test_train_spiral_reaches_its_accuracy():
    accuracy = float(run("train_spiral", "--picture", "").splitlines()[-1].split("accuracy ")[1].split()[0])
    assert accuracy >= 0.95


@pytest.mark.parametrize("name", ["train_custom_loop", "chapter1"])
def test_example_ends_with_its_accuracy(name):
    assert run(name, "--epochs", "3").splitlines()[-1].endswith("on the 300 points")


def test_train_digits(tmp_path):
    out = run("train_digits", "--epochs", "2", "--seeds", "2", "--picture", str(tmp_path / "digits.png"))
    assert out.count("held-out accuracy") == 3
    assert out.splitlines()[-1].endswith("of 2 seeds, on 450 digits")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_train_digits_resumes_from_checkpoints(tmp_path):
    pytest.importorskip("safetensors")
    options = "--epochs", "2", "--picture", "", "--checkpoint", str(tmp_path)
    first = run("train_digits", *options, "--seeds", "1")
    again = run("train_digits", *options, "--seeds", "2", "--resume").splitlines()
    assert again[0].endswith("epoch-0002-step-000000.safetensors")
    assert again[1] == first.splitlines()[0]
    assert again[-1].endswith("of 2 seeds, on 450 digits")


@pytest.mark.skipif(nnx.GPU, reason="one full training is enough")
def test_train_digits_reaches_its_accuracy():
    median = float(run("train_digits", "--picture", "").splitlines()[-1].split("accuracy ")[1].split()[0])
    assert median >= 0.96


def test_train_regression(tmp_path):
    out = run("train_regression", "--epochs", "200", "--picture", str(tmp_path / "fit.png"))
    assert float(out.split("the fit is ")[1].split()[0]) < 0.2
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_tabular(tmp_path):
    for package in ("pandas", "onnx", "onnxruntime", "safetensors", "sklearn"):
        pytest.importorskip(package)
    out = run("tabular", "--folder", str(tmp_path / "new"))
    assert "onnxruntime chooses the same class in 143 rows" in out
    assert float(out.split("\naccuracy ")[1].split()[0]) > 0.9
    names = ["history.png", "net.onnx", "net.safetensors", "probabilities.npy", "rows.npy"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names


def idx(array, gz=False):
    """Return the bytes of an IDX file."""
    raw = bytes([0, 0, 8, array.ndim]) + numpy.array(array.shape, ">u4").tobytes() + array.astype("u1").tobytes()
    return gzip.compress(raw) if gz else raw


@pytest.fixture
def mnist(tmp_path):
    """Return a folder with a tiny MNIST: stripes whose position is the label."""
    for part, n in (("train", 400), ("t10k", 50)):
        labels = numpy.arange(n) % 10
        images = 200 * (numpy.arange(28) // 2 == labels[:, None])[:, None, :].repeat(28, axis=1)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels, gz=True))
    return tmp_path


def test_train_mnist(mnist):
    out = run("train_mnist", "--data", str(mnist), "--epochs", "8", "--hidden-size", "32", "--lr", "0.01")
    assert out.splitlines()[-1] == "accuracy 1.0000 on the 50 test digits"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train-images-idx3-ubyte", None, r"expected .*train-images-idx3-ubyte or .*\.gz: one of the four IDX files"),
        ("train-images-idx3-ubyte", b"<html>", "expected an IDX file of bytes with 3 axes, it begins with 3c68746d"),
        ("train-images-idx3-ubyte", idx(numpy.zeros((2, 28, 28)))[:-1], "bytes are not those of 2 x 28 x 28"),
        ("train-images-idx3-ubyte", idx(numpy.zeros((2, 28, 28))), "train has 2 images and 400 labels"),
    ],
)
def test_train_mnist_error_messages(mnist, name, content, words):
    (mnist / name).unlink()
    if content is not None:
        (mnist / name).write_bytes(content)
    result = subprocess.run(
        [sys.executable, EXAMPLES / "train_mnist.py", "--data", mnist], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert re.search(words, result.stderr.splitlines()[-1])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_have_help(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    assert run(path.stem, "--help").startswith("usage:")
