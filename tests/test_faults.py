"""Faults of the book's code that nnx does not have, where no other test shows it; docs/book_faults.md lists all 28."""

import importlib
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy
import pytest

import nnx
from nnx import np, spiral, to_cpu
from nnx.layers import Affine, Dropout, MatMul, Simple_TimeAffine, TimeDropout
from nnx.trainer import RnnlmTrainer, remove_duplicate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "book_faults.md"


# ---- the page ---------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """Return the rows of the table, each a list of its cells."""
    if not PAGE.exists():
        pytest.skip("the documentation is not part of a source distribution")
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| *\d", line)]


def test_the_page_lists_every_fault_with_tests_that_exist(rows):
    assert [int(number) for number, *_ in rows] == [*range(1, 29)]
    for number, *_, shown in rows:
        tests = re.findall(r"`tests/(\w+\.py)::(\w+)`", shown)
        for file, test in tests:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{number}: {file}::{test}"
        assert tests, number


def test_the_docstrings_on_the_page_say_what_is_quoted(rows):
    quotes = re.findall(r'docstring of `nnx\.([\w.]+)`: "([^"]+)"', "\n".join(" ".join(row) for row in rows))
    assert len(quotes) >= 5
    for name, quote in quotes:
        module, _, attribute = name.rpartition(".")
        documented = importlib.import_module(f"nnx.{module}")
        documented = getattr(documented, attribute)
        assert quote in " ".join(documented.__doc__.split()), name


# ---- numerics ---------------------------------------------------------------------------------------


def test_weights_are_float32_by_default_and_stay_float32_with_float64_data():  # fault 2
    model = nnx.TwoLayerNet(2, 4, 3, rng=0)
    nnx.Trainer(model, nnx.Adam(), rng=0).fit(*spiral.load_data(), max_epoch=1, verbose=False)
    assert {a.dtype for a in (*model.params, *model.grads, model.predict(numpy.ones((2, 2))))} == {np.dtype("float32")}


@pytest.mark.skipif(nnx.GPU, reason="traces the memory of the host")
@pytest.mark.parametrize("lr", [0.01, numpy.float64(0.01)])
def test_a_step_of_adam_in_float32_has_no_temporary_in_float64(lr):  # fault 3
    p, g = np.ones(1 << 20, "float32"), np.ones(1 << 20, "float32")
    optimizer = nnx.Adam(lr)
    optimizer.update([p], [g])
    tracemalloc.start()
    try:
        optimizer.update([p], [g])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * p.nbytes  # the portable kernel has three temporaries in float32; one in float64 is 2 * nbytes


# ---- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MatMul, Affine])
def test_a_square_weight_refuses_a_vector(kind):  # fault 9
    layer = kind(np.ones((3, 3)), *([np.zeros(3)] if kind is Affine else []))
    with pytest.raises(ValueError, match=rf"{kind.__name__}: x must have shape .*make it a row with x\[None\]"):
        layer.forward(numpy.ones(3))


@pytest.mark.parametrize("kind", [Dropout, TimeDropout])
def test_backward_of_dropout_is_that_of_the_last_forward(kind):  # fault 11
    layer, x = kind(0.5, rng=0), np.ones((4, 50))
    with pytest.raises(AttributeError, match=kind.__name__):  # there was none
        layer.backward(x)
    for train_flg in (True, False, True):
        y = layer.forward(x, train_flg=train_flg)
        assert (layer.backward(x) == y).all()
        assert len(numpy.unique(to_cpu(y))) == (2 if train_flg else 1)


# ---- weights ----------------------------------------------------------------------------------------


def test_remove_duplicate_leaves_the_gradients_of_the_layers_alone():  # fault 13
    W = np.ones((3, 3))
    grads = [np.ones((3, 3)), np.ones((3, 3))]
    for _ in range(2):
        params, (total,) = remove_duplicate([W, W.T], grads)
        assert params[0] is W
        assert (total == 2).all()
    assert all((g == 1).all() for g in grads)


def test_simple_time_affine_has_parameters_and_gradients():  # fault 15
    layer = Simple_TimeAffine(np.ones((4, 3)), np.zeros(3))
    layer.forward(np.ones((2, 5, 4)))
    layer.backward(np.ones((2, 5, 3)))
    assert [(g == 10).all() for g in layer.grads] == [True, True]
    assert len(layer.params) == 2


# ---- training ---------------------------------------------------------------------------------------


def test_a_batch_of_words_is_read_at_once():  # fault 20
    """The number of lines of Python that run does not depend on the size of a batch."""
    corpus, counts = numpy.arange(2000) % 7, []

    class Model:
        params, grads = [], []

        def forward(self, xs, ts):
            return 1.0

        def backward(self):
            pass

    def count(function):
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            lines += event == "line" and "nnx" in frame.f_globals["__name__"]
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(before)
        return lines

    for sizes in ((1, 2), (20, 35)):
        trainer = RnnlmTrainer(Model(), nnx.SGD())
        trainer.get_batch(corpus, corpus, *sizes)  # the offsets are kept
        short = corpus[: sizes[0] * sizes[1] + 1]  # one step
        counts.append(
            (
                count(lambda trainer=trainer, sizes=sizes: trainer.get_batch(corpus, corpus, *sizes)),
                count(lambda short=short, sizes=sizes: nnx.util.eval_perplexity(Model(), short, *sizes)),
            )
        )
    assert counts[0] == counts[1]
    assert all(lines > 3 for lines in counts[0])


# ---- data, files, versions --------------------------------------------------------------------------


def test_the_books_first_weights_and_losses_follow_from_its_seed():  # fault 22
    """The book's load_data leaves the global generator seeded with 1984, 300 normal numbers later."""
    x, t = spiral.load_data()
    numpy.random.seed(1984)
    numpy.random.randn(300)
    model = nnx.TwoLayerNet(2, 10, 3, dtype="float64")
    trainer = nnx.Trainer(model, nnx.SGD(1.0))
    W1, _, W2, _ = (to_cpu(p).copy() for p in model.params)
    trainer.fit(x, t, max_epoch=1, batch_size=30, eval_interval=10, verbose=False)
    numpy.random.seed(1984)
    numpy.random.randn(300)
    numpy.testing.assert_array_equal(W1, 0.01 * numpy.random.randn(2, 10))
    numpy.testing.assert_array_equal(W2, 0.01 * numpy.random.randn(10, 3))
    rows = numpy.random.permutation(numpy.arange(300))[:30]  # the first batch
    scores = 1 / (1 + numpy.exp(-x[rows] @ W1)) @ W2
    y = numpy.exp(scores) / numpy.exp(scores).sum(axis=1, keepdims=True)
    assert trainer.loss_list[0] == pytest.approx(-numpy.log((y * t[rows]).sum(axis=1)).mean(), rel=1e-12)


def test_an_array_of_one_number_is_an_id():  # fault 27
    class Model:
        def generate(self, question, start_id, sample_size):
            return [numpy.array([1]), numpy.array([[0]])]  # whose int() is a TypeError since NumPy 2.4

    assert nnx.util.eval_seq2seq(Model(), numpy.array([[0, 1]]), numpy.array([[2, 1, 0]]), dict(enumerate("ab_"))) == 1


def test_imports_and_data_do_not_depend_on_the_folder(tmp_path):  # fault 28
    code = (
        "import nnx.base_model, nnx.trainer, nnx.util\n"
        "from nnx.time_layers import *\n"
        "from nnx.dataset import ptb, sequence, spiral\n"
        "assert spiral.load_data()[0].shape == (300, 2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []
