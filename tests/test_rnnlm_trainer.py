"""RnnlmTrainer: the book's batches, lines and perplexities, on Trainer's loop."""

import math
import re

import numpy
import pytest

import nnx
from nnx import SGD, Affine, Embedding, SoftmaxWithLoss, checkpoint, np, to_cpu
from nnx.callbacks import Callback
from nnx.trainer import RnnlmTrainer, Trainer

V = 11
CORPUS = numpy.random.default_rng(0).integers(0, V, 401)
XS, TS = CORPUS[:-1], CORPUS[1:]


class Bigram:
    """A language model without a recurrent layer, which counts its steps."""

    def __init__(self, seed=0):
        rng = numpy.random.default_rng(seed)
        W, U = (nnx.asarray(rng.standard_normal(shape), "float32") for shape in ((V, 5), (5, V)))
        self.layers = [Embedding(W), Affine(U, np.zeros(V, "float32"))]
        self.loss = SoftmaxWithLoss()
        self.params = [p for layer in self.layers for p in layer.params]
        self.grads = [g for layer in self.layers for g in layer.grads]
        self.seen = []

    def forward(self, xs, ts):
        assert isinstance(xs, np.ndarray)
        assert isinstance(ts, np.ndarray)
        self.seen.append((to_cpu(xs), to_cpu(ts)))
        return self.loss.forward(self.layers[1].forward(self.layers[0].forward(xs)), ts)

    def backward(self, dout=1):
        self.layers[0].backward(self.layers[1].backward(self.loss.backward(dout)))


def batch_by_loop(x, batch_size, time_size, time_idx):
    batch, jump = numpy.empty((batch_size, time_size), int), len(x) // batch_size
    for t in range(time_size):
        for i in range(batch_size):
            batch[i, t] = x[(i * jump + time_idx + t) % len(x)]
    return batch


@pytest.mark.parametrize("move", [numpy.asarray, nnx.asarray, list])
@pytest.mark.parametrize(("batch_size", "time_size"), [(1, 1), (4, 7), (3, 100), (7, 3)])
def test_get_batch_equals_the_loop(move, batch_size, time_size):
    trainer = RnnlmTrainer(Bigram(), SGD())
    assert trainer.time_idx == 0
    for call in range(2 * len(XS) // (batch_size * time_size) + 5):  # wraps around the corpus
        x, t = trainer.get_batch(move(XS), move(TS), batch_size, time_size)
        numpy.testing.assert_array_equal(to_cpu(x), batch_by_loop(XS, batch_size, time_size, call * time_size))
        numpy.testing.assert_array_equal(to_cpu(t), batch_by_loop(TS, batch_size, time_size, call * time_size))
        assert trainer.time_idx == (call + 1) * time_size


def fit_by_loop(model, lr, epochs, batch_size, time_size, interval):
    """Return the perplexities of the book's loop."""
    ppl, losses, time_idx = [], [], 0
    for _ in range(epochs):
        for step in range(len(XS) // (batch_size * time_size)):
            x, t = (batch_by_loop(a, batch_size, time_size, time_idx) for a in (XS, TS))
            time_idx += time_size
            losses.append(float(model.forward(nnx.asarray(x), nnx.asarray(t))))
            model.backward()
            for p, g in zip(model.params, model.grads, strict=True):
                p -= np.asarray(lr, p.dtype) * g
            if step % interval == 0:
                ppl.append(math.exp(sum(losses) / len(losses)))
                losses = []
    return ppl


@pytest.mark.parametrize("move", [numpy.asarray, nnx.asarray])
def test_fit_trains_as_the_loop_of_the_book(move, capsys):
    model, other = Bigram(), Bigram()
    trainer = RnnlmTrainer(model, SGD(0.5))
    trainer.fit(move(XS), move(TS), 3, 4, 7, None, 5, verbose=True)
    expected = fit_by_loop(other, 0.5, 3, 4, 7, 5)
    numpy.testing.assert_allclose(trainer.ppl_list, expected, rtol=1e-5)
    assert all(type(ppl) is float for ppl in trainer.ppl_list)
    for a, b in zip(model.seen, other.seen, strict=True):
        numpy.testing.assert_array_equal(a, b)
    for p, q in zip(model.params, other.params, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), to_cpu(q), rtol=1e-4, atol=1e-6)
    lines = re.sub(r"time \d+\[s\]", "time 0[s]", capsys.readouterr().out).splitlines()
    points = [(epoch, step) for epoch in (1, 2, 3) for step in range(1, 15, 5)]
    assert lines == [
        f"| epoch {epoch} |  iter {step} / 14 | time 0[s] | perplexity {ppl:.2f}"
        for (epoch, step), ppl in zip(points, trainer.ppl_list, strict=True)
    ]
    assert (trainer.current_epoch, trainer.eval_interval, trainer.time_idx) == (3, 5, 3 * 14 * 7)


def test_perplexities_are_kept_and_positions_begin_again_in_a_second_fit():
    model = Bigram()
    trainer = RnnlmTrainer(model, SGD(0.1))
    assert trainer.ppl_list == []
    trainer.fit(XS, TS, max_epoch=1, batch_size=5, time_size=8, verbose=False)
    first = trainer.ppl_list
    assert len(first) == 1
    trainer.fit(XS, TS, max_epoch=2, batch_size=5, time_size=8, verbose=False)
    assert trainer.ppl_list[:1] == first
    assert len(trainer.ppl_list) == 3
    numpy.testing.assert_array_equal(model.seen[10][0], model.seen[0][0])
    assert (model.seen[20][0] != model.seen[0][0]).any()  # the second epoch goes on


def test_resume_within_an_epoch(tmp_path):
    class Save(Callback):
        def on_step(self, trainer):
            if (trainer.current_epoch, trainer.iteration) == (1, 6):
                checkpoint.save(tmp_path / "a.safetensors", trainer.model, trainer.optimizer, trainer)

    options = {"max_epoch": 3, "batch_size": 4, "time_size": 7, "verbose": False}
    whole = RnnlmTrainer(Bigram(), SGD(0.5))
    whole.fit(XS, TS, **options, callbacks=[Save()])
    rest = RnnlmTrainer(Bigram(1), SGD(0.1))
    rest.resume(tmp_path / "a.safetensors")
    rest.fit(XS, TS, **options)
    assert rest.ppl_list == whole.ppl_list
    for p, q in zip(whole.model.params, rest.model.params, strict=True):
        numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


def test_max_grad_limits_the_step():
    model = Bigram()
    before = [to_cpu(p).copy() for p in model.params]
    RnnlmTrainer(model, SGD(1.0)).fit(XS, TS, max_epoch=1, batch_size=20, time_size=20, max_grad=0.01, verbose=False)
    moved = math.sqrt(sum(((to_cpu(p) - b) ** 2).sum() for p, b in zip(model.params, before, strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-2)


def test_plot_shows_perplexities(tmp_path):
    trainer = RnnlmTrainer(Bigram(), SGD(0.1))
    trainer.fit(XS, TS, max_epoch=2, batch_size=5, time_size=8, eval_interval=3, verbose=False)
    axes = trainer.plot(ylim=(0, 50), path=tmp_path / "a.png")
    assert list(axes.lines[0].get_ydata()) == trainer.ppl_list
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()) == ("iterations (x3)", "perplexity", (0, 50))
    other = Trainer(Bigram(), SGD(0.1))
    other.fit([(XS[:6].reshape(2, 3), TS[:6].reshape(2, 3))], max_epoch=1, verbose=False)
    assert other.plot(path=tmp_path / "b.png").get_ylabel() == "loss"


def test_infinite_perplexity():
    trainer = RnnlmTrainer(Bigram(), SGD())
    trainer.loss_list += [1.0, 1000.0]
    assert trainer.ppl_list == [pytest.approx(math.e), math.inf]


def test_errors():
    trainer = RnnlmTrainer(Bigram(), SGD())
    with pytest.raises(ValueError, match=r"batch_size=20 and time_size=35 need at least 700 words, got 400"):
        trainer.fit(XS, TS)
    with pytest.raises(ValueError, match=r"RnnlmTrainer.fit: x and t must have the same number of rows"):
        trainer.fit(XS, TS[:-1])
    with pytest.raises(ValueError, match=r"RnnlmTrainer.fit: xs must be a vector of word ids, integers, got float64"):
        trainer.fit(XS * 1.0, TS)
    with pytest.raises(TypeError, match=r"RnnlmTrainer.fit: time_size must be an integer, got 2.5"):
        trainer.fit(XS, TS, 1, 4, 2.5)
    with pytest.raises(ValueError, match=r"Trainer.fit: max_grad must be positive"):
        trainer.fit(XS, TS, 1, 4, 5, 0)
    assert not trainer.model.seen
    assert repr(trainer) == f"RnnlmTrainer(Bigram, {SGD()!r}, current_epoch=0)"
