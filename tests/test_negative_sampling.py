"""Negative sampling: the sampler's distribution, and loss and gradients against the book's formulas in loops."""

import copy
import itertools
import time

import numpy
import pytest

import nnx
from nnx import SGD, Adam, Trainer, checkpoint, np, to_cpu
from nnx.layers import Embedding, EmbeddingDot, NegativeSamplingLoss
from nnx.layers.negative_sampling import UnigramSampler

V, H, N, S = 12, 4, 6, 3
CORPUS = numpy.random.default_rng(3).integers(0, 3, 200) * 4 + numpy.arange(200) % 4  # all words of 0..11
TARGET = numpy.array([1, 2, 2, 11, 0, 5])


def book_loss(W, h, target, negatives, dout=1.0):
    """Return loss, dh and dW, word by word."""
    loss, dh, dW = 0.0, numpy.zeros_like(h), numpy.zeros_like(W)
    for n in range(len(h)):
        for word, label in [(target[n], 1), *((s, 0) for s in negatives[n])]:
            p = 1 / (1 + numpy.exp(-W[word] @ h[n]))
            loss -= numpy.log(p if label else 1 - p) / len(h)
            dscore = dout * (p - label) / len(h)
            dh[n] += dscore * W[word]
            dW[word] += dscore * h[n]
    return loss, dh, dW


@pytest.fixture
def W(rng):
    return rng.standard_normal((V, H))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_and_gradients_are_those_of_the_book(dtype, W, rng):
    layer = NegativeSamplingLoss(nnx.asarray(W, dtype), CORPUS, sample_size=S, rng=0)
    h = rng.standard_normal((N, H)).astype(dtype)
    loss = layer.forward(h, TARGET)
    idx = to_cpu(layer.idx)
    numpy.testing.assert_array_equal(idx[:, 0], TARGET)
    expected = book_loss(W, h, TARGET, idx[:, 1:], dout=2.0)
    tolerance = {"rtol": 1e-4 if dtype == "float32" else 1e-10, "atol": 1e-6}
    numpy.testing.assert_allclose(float(loss), expected[0], **tolerance)
    numpy.testing.assert_allclose(to_cpu(layer.backward(2.0)), expected[1], **tolerance)
    numpy.testing.assert_allclose(to_cpu(layer.grads[0]), expected[2], **tolerance)


def test_one_weight_and_one_gradient(W):
    weight = nnx.asarray(W)
    layer = NegativeSamplingLoss(weight, CORPUS)
    assert len(layer.params) == len(layer.grads) == 1
    assert layer.params[0] is weight
    assert layer.sample_size == layer.sampler.sample_size == 5
    assert repr(layer) == "NegativeSamplingLoss(12, 4, power=0.75, sample_size=5)"


def test_embedding_dot_is_that_of_the_book(W, rng):
    layer, h = EmbeddingDot(nnx.asarray(W)), rng.standard_normal((N, H))
    numpy.testing.assert_allclose(to_cpu(layer.forward(h, TARGET)), (W[TARGET] * h).sum(axis=1))
    dout = rng.standard_normal(N)
    numpy.testing.assert_allclose(to_cpu(layer.backward(dout)), dout[:, None] * W[TARGET])
    dW = numpy.zeros((V, H))
    for n, word in enumerate(TARGET):
        dW[word] += dout[n] * h[n]
    numpy.testing.assert_allclose(to_cpu(layer.grads[0]), dW)


def test_word_p_is_the_distribution_of_the_book():
    corpus = [0, 1, 2, 3, 4, 1, 2, 3]
    sampler = UnigramSampler(corpus, 0.75, 2)
    p = numpy.array([1, 2, 2, 2, 1]) ** 0.75
    numpy.testing.assert_allclose(to_cpu(sampler.word_p), p / p.sum())
    assert (sampler.vocab_size, sampler.sample_size) == (5, 2)
    assert sampler.get_negative_sample(numpy.array([1, 3, 0])).shape == (3, 2)


@pytest.mark.parametrize("sample_size", [1, 4, V - 1])
def test_negatives_are_never_the_target_nor_repeated(sample_size):
    sampler = UnigramSampler(nnx.asarray(CORPUS), 0.75, sample_size, rng=1)
    for _ in range(50):
        drawn = to_cpu(sampler.get_negative_sample(nnx.asarray(numpy.arange(V))))
        assert drawn.min() >= 0
        assert drawn.max() < V
        for target, row in enumerate(drawn.tolist()):
            assert len({target, *row}) == sample_size + 1


@pytest.mark.parametrize("corpus", [[0, 1, 2, 2, 2, 3] * 3, [0] * 1000 + [1, 2, 3], [1, 1, 2, 3, 0]])
def test_negatives_have_the_probabilities_of_drawing_without_replacement(corpus):
    """Both draws, one after the other, against the probabilities of all pairs; also of a word that is nearly always."""
    rows, target, power = 20_000, 2, 0.75
    p = numpy.bincount(corpus) ** power
    sampler = UnigramSampler(corpus, power, 2, rng=2)
    drawn = to_cpu(sampler.get_negative_sample(numpy.full(rows, target)))
    for first, second in itertools.permutations([0, 1, 3], 2):
        left = p.sum() - p[target]
        expected = p[first] / left * p[second] / (left - p[first])
        found = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).mean()
        assert abs(found - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5 + 1e-9, (first, second)


def test_words_that_do_not_occur_are_never_drawn():
    sampler = UnigramSampler([1, 3, 3, 5], 0.75, 2, rng=0, vocab_size=9)
    numpy.testing.assert_array_equal(to_cpu(sampler.word_p) > 0, numpy.isin(numpy.arange(9), [1, 3, 5]))
    drawn = to_cpu(sampler.get_negative_sample(numpy.repeat([0, 1, 2, 8], 50)))
    assert set(drawn.ravel().tolist()) == {1, 3, 5}
    assert set(drawn[50:100].ravel().tolist()) == {3, 5}
    layer = NegativeSamplingLoss(np.ones((9, 2), "float32"), [1, 3, 3, 5], sample_size=2)
    layer.forward(numpy.ones((2, 2)), [8, 0])  # words of W that are not in the corpus


@pytest.mark.parametrize("power", [0, 0.75, 60.0])
def test_extreme_powers(power):
    corpus = [0] * 100_000 + [1, 2]
    drawn = to_cpu(UnigramSampler(corpus, power, 2, rng=0).get_negative_sample([0, 1, 2] * 20))
    assert (numpy.sort(drawn, axis=1)[:3] == [[1, 2], [0, 2], [0, 1]]).all()


def test_seeds(W):
    def samples(rng):
        sampler = UnigramSampler(CORPUS, 0.75, S, rng=rng)
        return [to_cpu(sampler.get_negative_sample(TARGET)) for _ in range(2)]

    first, second = samples(5)
    assert (first != second).any()
    for expected, found in zip((first, second), samples(5), strict=True):
        numpy.testing.assert_array_equal(found, expected)
    assert (samples(6)[0] != first).any()
    numpy.random.seed(9)  # as in a script of the book
    from_global = samples(None)
    numpy.random.seed(9)
    numpy.testing.assert_array_equal(samples(None), from_global)
    numpy.testing.assert_array_equal(first[:2], [[9, 7, 10], [10, 4, 7]])  # equal on both devices


def test_copies_draw_the_same(W):
    layer = NegativeSamplingLoss(nnx.asarray(W), CORPUS, sample_size=S)
    copied, h = copy.deepcopy(layer), numpy.ones((N, H))
    assert float(layer.forward(h, TARGET)) == float(copied.forward(h, TARGET))
    assert float(layer.forward(h, TARGET)) == float(copied.forward(h, TARGET))


def test_errors(W):
    weight = nnx.asarray(W)
    with pytest.raises(ValueError, match=r"sample_size must be less than the number of words in the corpus, 3, got 3"):
        UnigramSampler([0, 5, 9], 0.75, 3)
    with pytest.raises(ValueError, match=r"UnigramSampler: word ids must be in \[0, 12\), got 0 to 12"):
        NegativeSamplingLoss(weight, [*range(13)])
    with pytest.raises(ValueError, match=r"UnigramSampler: word ids must be in \[0, inf\), got -1 to 3"):
        UnigramSampler([-1, 0, 3], 0.75, 1)
    with pytest.raises(ValueError, match=r"corpus must be a vector of word ids, integers, got float64 \(2,\)"):
        UnigramSampler([0.0, 1.0], 0.75, 1)
    layer = NegativeSamplingLoss(weight, CORPUS)
    with pytest.raises(ValueError, match=r"NegativeSamplingLoss: h must be \(N, 4\) for N indices \(N,\), .* \(5, 4\)"):
        layer.forward(numpy.ones((5, 4)), TARGET)
    with pytest.raises(ValueError, match=r"NegativeSamplingLoss: target must be in \[0, 12\), got 12"):
        layer.forward(numpy.ones((1, 4)), [12])
    with pytest.raises(ValueError, match=r"EmbeddingDot: h must be \(N, 4\)"):
        EmbeddingDot(weight).forward(numpy.ones((6, 3)), TARGET)


class CBOW:
    """The model of chapter 4."""

    def __init__(self, rng=0):
        random = numpy.random.default_rng(0)
        W_in, W_out = (nnx.asarray(0.1 * random.standard_normal((V, H)), "float32") for _ in range(2))
        self.layers = [Embedding(W_in) for _ in range(2)]
        self.ns_loss = NegativeSamplingLoss(W_out, CORPUS, sample_size=S, rng=rng)
        layers = [*self.layers, self.ns_loss]
        self.params = [p for layer in layers for p in layer.params]
        self.grads = [g for layer in layers for g in layer.grads]

    def forward(self, contexts, target):
        h = sum(layer.forward(contexts[:, i]) for i, layer in enumerate(self.layers)) / 2
        return self.ns_loss.forward(h, target)

    def backward(self, dout=1):
        dh = self.ns_loss.backward(dout) / 2
        for layer in self.layers:
            layer.backward(dh)


def test_chapter_4_learns_and_resumes(tmp_path):
    contexts, target = nnx.util.create_contexts_target(numpy.arange(400) % V)
    whole = Trainer(CBOW(), Adam(0.1), rng=0)
    whole.fit(contexts, target, max_epoch=4, batch_size=50, verbose=False, eval_interval=4)
    assert whole.loss_list[-1] < 0.7 * whole.loss_list[0]
    half = Trainer(CBOW(), Adam(0.1), rng=0)
    half.fit(contexts, target, max_epoch=2, batch_size=50, verbose=False)
    checkpoint.save(tmp_path / "a.safetensors", half.model, half.optimizer, half)
    rest = Trainer(CBOW(rng=8), Adam())
    rest.rng = numpy.random.default_rng(1)
    checkpoint.load(tmp_path / "a.safetensors", rest.model, rest.optimizer, rest)
    assert rest.model.ns_loss.sampler.calls == half.model.ns_loss.calls == 16
    rest.fit(contexts, target, max_epoch=2, batch_size=50, verbose=False)
    for p, q in zip(whole.model.params, rest.model.params, strict=True):
        numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


def test_an_error_before_the_first_step_restores_the_sampler():
    model = CBOW()
    model.backward = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Trainer(model, SGD()).fit(numpy.ones((4, 2), int), numpy.ones(4, int), batch_size=2, verbose=False)
    assert model.ns_loss.sampler.calls == 0


@pytest.mark.skipif(nnx.GPU, reason="times the CPU")
def test_a_large_vocabulary_takes_about_a_millisecond(rng):
    corpus = rng.integers(0, 10_000, 100_000)
    layer = NegativeSamplingLoss(np.zeros((10_000, 100), "float32"), corpus)
    h, target = rng.standard_normal((100, 100)).astype("float32"), corpus[:100]
    durations = []
    for _ in range(10):
        start = time.perf_counter()
        layer.forward(h, target)
        layer.backward()
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.01  # 0.6 ms alone; the book's code takes 70 ms


@pytest.mark.parametrize("value", [-1, 1 << 64, 1.0, None])
def test_seed_and_calls_must_be_64_bit_integers(value):
    layer = CBOW().ns_loss
    for name in layer.state_names:
        with pytest.raises(ValueError, match=f"{name} must be an integer of 64 bits, got {value}"):
            layer.check_state({"seed": 1, "calls": 2, name: value})
