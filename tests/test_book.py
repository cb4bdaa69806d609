"""The scripts of the book's chapters 1 to 6: their imports, with `nnx` for `common`, and models composed as they do.

ch01/forward_net, ch06/clip_grads and ch06/rnn_gradient_graph import nothing of the book's package. Chapters 7 and 8 are
in test_book_seq2seq.py.
"""

import json
import pickle
from pathlib import Path

import numpy
import pytest

import nnx
from nnx import config
from nnx.base_model import BaseModel
from nnx.dataset import ptb, spiral
from nnx.layers import NegativeSamplingLoss
from nnx.layers.negative_sampling import UnigramSampler
from nnx.np import *
from nnx.optimizer import SGD, Adam
from nnx.time_layers import *
from nnx.trainer import RnnlmTrainer, Trainer
from nnx.util import (
    analogy,
    clip_grads,
    convert_one_hot,
    cos_similarity,
    create_co_matrix,
    create_contexts_target,
    eval_perplexity,
    most_similar,
    ppmi,
    preprocess,
    to_cpu,
    to_gpu,
)

TEXT = "You say goodbye and I say hello."


@pytest.fixture(autouse=True)
def _seed():
    numpy.random.seed(1)
    np.random.seed(1)


def randn(*shape, scale=0.1):
    return (scale * np.random.randn(*shape)).astype("f")


def lists(layers):
    """Return the parameters and the gradients of `layers`, as every model of the book collects them."""
    return [p for layer in layers for p in layer.params], [g for layer in layers for g in layer.grads]


class Chain:
    """A model of layers in a row: TwoLayerNet, SimpleRnnlm and Rnnlm."""

    def __init__(self, layers, loss_layer):
        self.layers, self.loss_layer = layers, loss_layer
        self.params, self.grads = lists(layers)

    def predict(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def forward(self, x, t):
        return self.loss_layer.forward(self.predict(x), t)

    def backward(self, dout=1):
        dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout


# Chapter 1


def two_layer_net():
    W1, W2 = 0.01 * np.random.randn(2, 10), 0.01 * np.random.randn(10, 3)
    return Chain([Affine(W1, np.zeros(10)), Sigmoid(), Affine(W2, np.zeros(3))], SoftmaxWithLoss())


def losses_by_formula(params, batches, lr):
    W1, b1, W2, b2 = (to_cpu(p).copy() for p in params)
    losses = []
    for x, t in batches:
        h = 1 / (1 + numpy.exp(-(x @ W1 + b1)))
        scores = numpy.exp(h @ W2 + b2)
        y = scores / scores.sum(axis=1, keepdims=True)
        losses.append(-numpy.log(y[t == 1]).mean())
        ds = (y - t) / len(x)
        da = ds @ W2.T * h * (1 - h)
        for p, g in ((W1, x.T @ da), (b1, da.sum(axis=0)), (W2, h.T @ ds), (b2, ds.sum(axis=0))):
            p -= lr * g
    return losses


def test_ch01_show_spiral_dataset():
    x, t = spiral.load_data()
    assert (x.shape, t.shape) == ((300, 2), (300, 3))
    for label in range(3):  # the script plots the rows of a class with a marker of its own
        assert (t[label * 100 : (label + 1) * 100].argmax(axis=1) == label).all()


def test_ch01_two_layer_net_and_train_custom_loop():
    x, t = spiral.load_data()
    model, optimizer = two_layer_net(), SGD(lr=1.0)
    params, batches, losses = [p.copy() for p in model.params], [], []
    for _ in range(3):
        order = numpy.random.permutation(len(x))
        x, t = x[order], t[order]
        for start in range(0, len(x), 30):
            batches.append((x[start : start + 30], t[start : start + 30]))
            loss = model.forward(*batches[-1])
            model.backward()
            optimizer.update(model.params, model.grads)
            losses.append(loss)
    expected = losses_by_formula(params, batches, 1.0)
    assert f"{sum(losses) / len(losses):.2f}" == f"{numpy.mean(expected):.2f}"
    numpy.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-9)
    xx, yy = numpy.meshgrid(numpy.arange(-1, 1, 0.1), numpy.arange(-1, 1, 0.1))
    regions = np.argmax(model.predict(numpy.c_[xx.ravel(), yy.ravel()]), axis=1).reshape(xx.shape)
    assert regions.shape == (20, 20)


def test_ch01_train():
    pytest.importorskip("matplotlib").use("agg")
    x, t = spiral.load_data()
    trainer = Trainer(two_layer_net(), SGD(lr=1.0))
    trainer.fit(x, t, 60, 30, eval_interval=10)
    trainer.plot()
    assert len(trainer.loss_list) == 60
    assert trainer.loss_list[-1] < 0.85 < 1.0 < trainer.loss_list[0]


# Chapter 2


def test_ch02_similarity_ppmi_and_count_method_small():
    corpus, word_to_id, id_to_word = preprocess(TEXT)
    C = create_co_matrix(corpus, len(word_to_id), window_size=1)
    similarity = cos_similarity(C[word_to_id["you"]], C[word_to_id["i"]])
    assert float(similarity) == pytest.approx(0.5**0.5, rel=1e-6)
    W = to_cpu(ppmi(C))
    # 14 pairs; "you" is in 1 of them, "say" in 4, and they are neighbours once
    assert W[0, 1] == pytest.approx(numpy.log2(14 / 4), rel=1e-6)
    numpy.testing.assert_array_equal(W, W.T)
    U, S, V = numpy.linalg.svd(W)
    numpy.testing.assert_allclose(U * S @ V, W, atol=1e-5)
    assert U[0, :2].shape == (2,)
    assert id_to_word[0] == "you"


def test_ch02_most_similar(capsys):
    corpus, word_to_id, id_to_word = preprocess(TEXT)
    most_similar("you", word_to_id, id_to_word, create_co_matrix(corpus, len(word_to_id)), top=5)
    assert [line.split(":")[0] for line in capsys.readouterr().out.split("\n")] == [
        *("", "[query] you", " goodbye", " i", " hello", " say", " and", "")
    ]


@pytest.fixture
def small_ptb(tmp_path, monkeypatch):
    """Put a corpus in the place of the Penn Treebank, in which cars and books stand in contexts of their own."""
    sentences = ["you drive the {} to work", "he parks a {} outside"], ["she reads the {} aloud", "we print a {} today"]
    words = ["car", "toyota"], ["book", "letter"]
    kinds = numpy.random.default_rng(0).integers(0, 2, (300, 3)).tolist()
    lines = [f" {sentences[kind][form].format(words[kind][word])} \n" for kind, form, word in kinds]
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    (tmp_path / "nnx").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "nnx" / f"ptb.{part}.txt").write_text("".join(lines), encoding="utf-8")
    return "".join(lines)


def test_ch02_show_ptb_and_count_method_big(small_ptb, capsys):
    corpus, word_to_id, id_to_word = ptb.load_data("train")
    assert [id_to_word[i] for i in corpus] == small_ptb.replace("\n", "<eos>").split()
    W = ppmi(create_co_matrix(corpus, len(word_to_id), 2), verbose=True)
    assert capsys.readouterr().out.splitlines()[-1] == "100.0% done"
    word_vecs = numpy.linalg.svd(to_cpu(W))[0][:, :5]
    for query, nearest in (("car", "toyota"), ("book", "letter")):
        most_similar(query, word_to_id, id_to_word, word_vecs, top=5)
        printed = capsys.readouterr().out.splitlines()
        assert printed[1] == f"[query] {query}"
        assert printed[2].startswith(f" {nearest}: ")
        assert len(printed) == 7


# Chapter 3


def test_ch03_cbow_predict():
    W_in, W_out = np.random.randn(7, 3), np.random.randn(3, 7)
    in_layer0, in_layer1, out_layer = MatMul(W_in), MatMul(W_in), MatMul(W_out)
    h0 = in_layer0.forward(numpy.array([[1, 0, 0, 0, 0, 0, 0]]))
    h1 = in_layer1.forward(numpy.array([[0, 0, 1, 0, 0, 0, 0]]))
    scores = out_layer.forward(0.5 * (h0 + h1))
    numpy.testing.assert_allclose(to_cpu(scores), to_cpu((W_in[:1] + W_in[2:3]) / 2 @ W_out))


class SimpleCBOW:
    def __init__(self, V, H):
        self.word_vecs, W_out = randn(V, H, scale=0.01), randn(H, V, scale=0.01)
        self.inputs, self.output = [MatMul(self.word_vecs) for _ in range(2)], MatMul(W_out)
        self.loss_layer = SoftmaxWithLoss()
        self.params, self.grads = lists([*self.inputs, self.output])

    def forward(self, contexts, target):
        h = (self.inputs[0].forward(contexts[:, 0]) + self.inputs[1].forward(contexts[:, 1])) * 0.5
        return self.loss_layer.forward(self.output.forward(h), target)

    def backward(self, dout=1):
        dh = self.output.backward(self.loss_layer.backward(dout))
        dh *= 0.5
        for layer in self.inputs:
            layer.backward(dh)


class SimpleSkipGram:
    def __init__(self, V, H):
        self.word_vecs, W_out = randn(V, H, scale=0.01), randn(H, V, scale=0.01)
        self.input, self.output = MatMul(self.word_vecs), MatMul(W_out)
        self.loss_layers = [SoftmaxWithLoss() for _ in range(2)]
        self.params, self.grads = lists([self.input, self.output])

    def forward(self, contexts, target):
        scores = self.output.forward(self.input.forward(target))
        return sum(layer.forward(scores, contexts[:, i]) for i, layer in enumerate(self.loss_layers))

    def backward(self, dout=1):
        ds = sum(layer.backward(dout) for layer in self.loss_layers)
        self.input.backward(self.output.backward(ds))


@pytest.mark.parametrize(("kind", "limit"), [(SimpleCBOW, 0.5), (SimpleSkipGram, 2.0)])
def test_ch03_train(kind, limit):
    corpus, word_to_id, id_to_word = preprocess(TEXT)
    contexts, target = create_contexts_target(corpus, 1)
    model = kind(len(word_to_id), 5)
    before = model.word_vecs.copy()
    trainer = Trainer(model, Adam(lr=0.02))
    trainer.fit(convert_one_hot(contexts, 7), convert_one_hot(target, 7), 100, 3, eval_interval=None)
    final = float(model.forward(convert_one_hot(contexts, 7), convert_one_hot(target, 7)))
    assert final < limit  # from log(7) = 1.9 for one word, 3.9 for two
    assert trainer.loss_list == []
    assert model.params[0] is model.word_vecs  # trained in place: the script prints its rows
    moved = {word for i, word in id_to_word.items() if (model.word_vecs[i] != before[i]).any()}
    assert moved == set(word_to_id) - ({"you", "."} if kind is SimpleSkipGram else set())  # which are no targets


# Chapter 4

V, H = 8, 6
WORDS = numpy.random.default_rng(0).permutation(numpy.arange(400) % V)


class SampledLoss:
    """The chapter's NegativeSamplingLoss, of an Embedding of one W and a SigmoidWithLoss for each word."""

    def __init__(self, W, corpus, power=0.75, sample_size=5, rng=None):
        self.sampler = UnigramSampler(corpus, power, sample_size, rng=rng)
        self.embeddings = [Embedding(W) for _ in range(sample_size + 1)]
        self.losses = [SigmoidWithLoss() for _ in range(sample_size + 1)]
        self.params, self.grads = lists(self.embeddings)

    def forward(self, h, target):
        words = [target, *self.sampler.get_negative_sample(target).T]
        self.h, self.rows = h, [layer.forward(idx) for layer, idx in zip(self.embeddings, words, strict=True)]
        return sum(
            layer.forward(np.sum(rows * h, axis=1), (np.zeros if i else np.ones)(len(h), dtype=np.int32))
            for i, (layer, rows) in enumerate(zip(self.losses, self.rows, strict=True))
        )

    def backward(self, dout=1):
        dh = 0
        for loss, embedding, rows in zip(self.losses, self.embeddings, self.rows, strict=True):
            ds = loss.backward(dout).reshape(-1, 1)
            embedding.backward(ds * self.h)
            dh += ds * rows
        return dh


class CBOW:
    def __init__(self, kind, window):
        self.word_vecs = randn(V, H)
        self.embeddings = [Embedding(self.word_vecs) for _ in range(2 * window)]
        self.ns_loss = kind(randn(V, H), WORDS, power=0.75, sample_size=3)
        self.params, self.grads = lists([*self.embeddings, self.ns_loss])

    def forward(self, contexts, target):
        h = 0
        for i, layer in enumerate(self.embeddings):
            h += layer.forward(contexts[:, i])
        h *= 1 / len(self.embeddings)
        return self.ns_loss.forward(h, target)

    def backward(self, dout=1):
        dh = self.ns_loss.backward(dout)
        dh *= 1 / len(self.embeddings)
        for layer in self.embeddings:
            layer.backward(dh)


class SkipGram:
    def __init__(self, kind, window):
        self.word_vecs, W_out = randn(V, H), randn(V, H)
        self.embedding = Embedding(self.word_vecs)
        self.losses = [kind(W_out, WORDS, power=0.75, sample_size=3) for _ in range(2 * window)]
        self.params, self.grads = lists([self.embedding, *self.losses])

    def forward(self, contexts, target):
        h = self.embedding.forward(target)
        return sum(layer.forward(h, contexts[:, i]) for i, layer in enumerate(self.losses))

    def backward(self, dout=1):
        self.embedding.backward(sum(layer.backward(dout) for layer in self.losses))


def test_ch04_negative_sampling_layer(rng):
    W, h, target = randn(V, H), rng.standard_normal((5, H)).astype("f"), numpy.arange(5)
    own, layer = (kind(W, WORDS, sample_size=3, rng=0) for kind in (SampledLoss, NegativeSamplingLoss))
    h = nnx.asarray(h)
    assert float(own.forward(h, nnx.asarray(target))) == pytest.approx(float(layer.forward(h, target)), rel=1e-5)
    numpy.testing.assert_allclose(to_cpu(own.backward()), to_cpu(layer.backward()), rtol=1e-4, atol=1e-7)
    numpy.testing.assert_allclose(to_cpu(sum(own.grads)), to_cpu(layer.grads[0]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [SampledLoss, NegativeSamplingLoss])
@pytest.mark.parametrize("model", [CBOW, SkipGram])
def test_ch04_cbow_skip_gram_train_and_eval(model, kind, tmp_path, capsys):
    words = ["king", "man", "queen", "woman", "car", "cars", "child", "children"]
    word_to_id, id_to_word = {word: i for i, word in enumerate(words)}, dict(enumerate(words))
    contexts, target = create_contexts_target(numpy.arange(122) % V, window_size=1)
    if config.GPU:
        contexts, target = to_gpu(contexts), to_gpu(target)
    model = model(kind, 1)
    trainer = Trainer(model, Adam(lr=0.1))
    trainer.fit(contexts, target, 4, 30, eval_interval=4)
    assert trainer.loss_list[-1] < 0.8 * trainer.loss_list[0]

    params = {"word_to_id": word_to_id, "id_to_word": id_to_word}
    params["word_vecs"] = to_cpu(model.word_vecs).astype(numpy.float16)
    (tmp_path / "cbow_params.pkl").write_bytes(pickle.dumps(params, -1))
    params = pickle.loads((tmp_path / "cbow_params.pkl").read_bytes())
    word_vecs = params["word_vecs"].astype("f")
    capsys.readouterr()
    most_similar("car", params["word_to_id"], params["id_to_word"], word_vecs, top=5)
    analogy("king", "man", "queen", params["word_to_id"], params["id_to_word"], word_vecs)
    printed = capsys.readouterr().out.splitlines()
    assert (printed[1], printed[8]) == ("[query] car", "[analogy] king:man = queen:?")
    assert len(printed) == 14


# Chapter 5

XS = numpy.arange(161) * 3 % V  # the next word follows from the word
XS, TS = XS[:-1], XS[1:]


def weights(*shape):
    return randn(*shape, scale=0.5)


def simple_rnnlm():
    return Chain(
        [
            TimeEmbedding(weights(V, H)),
            TimeRNN(weights(H, H), weights(H, H), np.zeros(H).astype("f"), stateful=True),
            TimeAffine(weights(H, V), np.zeros(V).astype("f")),
        ],
        TimeSoftmaxWithLoss(),
    )


def test_ch05_train_and_train_custom_loop():
    pytest.importorskip("matplotlib").use("agg")
    model = simple_rnnlm()
    start = [p.copy() for p in model.params]
    trainer = RnnlmTrainer(model, SGD(0.5))
    trainer.fit(XS, TS, 20, 4, 5)
    trainer.plot()
    assert trainer.ppl_list[-1] < 2 < trainer.ppl_list[0]

    other, optimizer = simple_rnnlm(), SGD(0.5)
    for p, q in zip(other.params, start, strict=True):
        p[...] = q
    time, losses = 0, []
    for _ in range(20 * 8):
        batch_x, batch_t = (numpy.empty((4, 5), "i") for _ in range(2))
        for t in range(5):
            for i in range(4):
                batch_x[i, t], batch_t[i, t] = (words[(i * 40 + time) % len(XS)] for words in (XS, TS))
            time += 1
        losses.append(other.forward(batch_x, batch_t))
        other.backward()
        optimizer.update(other.params, other.grads)
    perplexity = np.exp(sum(losses[-8:]) / 8)
    assert float(perplexity) == pytest.approx(trainer.ppl_list[-1], rel=0.05)
    for p, q in zip(model.params, other.params, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), to_cpu(q), rtol=1e-5, atol=1e-6)
    first, second = (float(model.forward(batch_x, batch_t)) for _ in range(2))
    assert first != second  # the second continues from the state of the first
    model.layers[1].reset_state()
    assert model.layers[1].h is None


# Chapter 6


class Rnnlm(Chain, BaseModel):
    def __init__(self):
        self.lstm = TimeLSTM(weights(H, 4 * H), weights(H, 4 * H), np.zeros(4 * H).astype("f"), stateful=True)
        layers = [TimeEmbedding(weights(V, H)), self.lstm, TimeAffine(weights(H, V), np.zeros(V).astype("f"))]
        super().__init__(layers, TimeSoftmaxWithLoss())

    def reset_state(self):
        self.lstm.reset_state()


class BetterRnnlm(Chain, BaseModel):
    def __init__(self):
        zeros, W = np.zeros(4 * H).astype("f"), weights(V, H)
        self.lstms = [TimeLSTM(weights(H, 4 * H), weights(H, 4 * H), zeros.copy(), stateful=True) for _ in range(2)]
        self.drops = [TimeDropout(0.1) for _ in range(3)]
        between = [layer for pair in zip(self.lstms, self.drops[1:], strict=True) for layer in pair]
        layers = [TimeEmbedding(W), self.drops[0], *between, TimeAffine(W.T, np.zeros(V).astype("f"))]
        super().__init__(layers, TimeSoftmaxWithLoss())

    def predict(self, xs, train_flg=False):
        for layer in self.drops:
            layer.train_flg = train_flg
        return super().predict(xs)

    def forward(self, xs, ts, train_flg=True):
        return self.loss_layer.forward(self.predict(xs, train_flg), ts)

    def reset_state(self):
        for layer in self.lstms:
            layer.reset_state()


def test_ch06_train_rnnlm_and_eval(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Rnnlm()
    RnnlmTrainer(model, SGD(3.0)).fit(XS, TS, 20, 4, 5, 0.5, eval_interval=20)
    model.reset_state()
    perplexity = eval_perplexity(model, XS, 4, 5)
    assert 1 < perplexity < 1.5
    model.save_params()

    model = Rnnlm()
    assert eval_perplexity(model, XS, 4, 5) > 0.8 * V
    model.load_params("Rnnlm.pkl")
    model.reset_state()
    assert eval_perplexity(model, XS, 4, 5) == pytest.approx(perplexity, rel=1e-2)  # the file is float16


def test_ch06_train_better_rnnlm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, lr, best, found = BetterRnnlm(), 3.0, float("inf"), []
    optimizer = SGD(lr)
    trainer = RnnlmTrainer(model, optimizer)
    for _ in range(10):
        trainer.fit(XS, TS, max_epoch=1, batch_size=4, time_size=5, max_grad=1.0)
        model.reset_state()
        found.append(eval_perplexity(model, XS, 4, 5))
        if found[-1] < best:
            best = found[-1]
            model.save_params()
        else:
            lr /= 4.0
            optimizer.lr = lr
        model.reset_state()
    assert best < 2 < found[0]
    assert len(trainer.ppl_list) == trainer.current_epoch == 10
    numpy.testing.assert_array_equal(to_cpu(model.layers[-1].params[0]), to_cpu(model.layers[0].params[0].T))
    model.load_params()
    for _ in range(2):  # equal: nothing is dropped in evaluation
        model.reset_state()
        assert eval_perplexity(model, XS, 4, 5) == pytest.approx(best, rel=1e-2)


def test_ch06_clip_grads():
    grads = [np.full((3, 3), 4.0), np.full((2, 2), 3.0)]  # of norm sqrt(9 * 16 + 4 * 9) = 13.4
    clip_grads(grads, 5.0)
    numpy.testing.assert_allclose([float(g[0, 0]) for g in grads], [4 * 5 / 180**0.5, 3 * 5 / 180**0.5], rtol=1e-5)


def test_the_page_lists_every_script_with_its_measured_ratio():
    root, chapter, ratios = Path(__file__).parents[1], 0, {}
    for line in (root / "docs" / "from_the_book.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("### Chapter "):
            chapter = int(line.split()[2].rstrip(":"))
        elif chapter and line.count("|") == 7 and not line.startswith(("| script", "|---")):
            name, *_, ratio = (cell.strip() for cell in line.strip("|").split("|"))
            ratios[f"ch{chapter:02}/{name}"] = ratio
    results = json.loads((root / "benchmarks/results/book_scripts.json").read_text(encoding="utf-8"))["scripts"]
    assert len(ratios) == 41
    assert {name: ratio for name, ratio in ratios.items() if ratio} == {
        name: f"{times['nnx'] / times['book']:.2f}" for name, times in results.items()
    }
