"""The book's utilities, compared with loops over single elements."""

import math
import time

import numpy
import pytest

import nnx
from nnx import np, to_cpu, util

TEXT = "You say goodbye and I say hello."
CORPUS = numpy.array([0, 1, 2, 3, 4, 1, 5, 6])


def co_matrix_by_loop(corpus, vocab_size, window_size):
    counts = numpy.zeros((vocab_size, vocab_size), int)
    for i, word in enumerate(corpus):
        for j in range(max(0, i - window_size), min(len(corpus), i + window_size + 1)):
            if j != i:
                counts[word, corpus[j]] += 1
    return counts


def ppmi_by_loop(C, eps=1e-8):
    C = C.astype(float)
    M = numpy.zeros(C.shape, numpy.float32)
    for i, j in numpy.ndindex(*C.shape):
        if C[:, i].sum() and C[:, j].sum():
            M[i, j] = max(0, math.log2(C[i, j] * C.sum() / (C[:, i].sum() * C[:, j].sum()) + eps))
    return M


def cosine(x, y, eps=1e-8):
    return numpy.dot(x / (numpy.sqrt(numpy.sum(x**2)) + eps), y / (numpy.sqrt(numpy.sum(y**2)) + eps))


def test_preprocess_gives_ids_in_order_of_appearance():
    corpus, word_to_id, id_to_word = util.preprocess(TEXT)
    assert isinstance(corpus, np.ndarray)
    numpy.testing.assert_array_equal(to_cpu(corpus), CORPUS)
    assert list(word_to_id) == ["you", "say", "goodbye", "and", "i", "hello", "."]
    assert id_to_word == {i: word for word, i in word_to_id.items()}
    assert list(id_to_word) == list(range(7))
    assert [*util.preprocess("a  b")[1]] == ["a", "", "b"]  # words are separated by single spaces, as in the book
    with pytest.raises(TypeError, match=r"preprocess: text must be a string, got list"):
        util.preprocess(["a"])


@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_co_matrix_equals_the_loop(window, dtype, rng):
    corpus = rng.integers(0, 20, 60)
    C = util.create_co_matrix(nnx.asarray(corpus, dtype), 21, window)
    assert C.dtype == np.int32
    numpy.testing.assert_array_equal(to_cpu(C), co_matrix_by_loop(corpus, 21, window))
    numpy.testing.assert_array_equal(to_cpu(util.create_co_matrix(corpus.tolist(), 21, window)), to_cpu(C))


def test_co_matrix_of_the_book():
    C = to_cpu(util.create_co_matrix(CORPUS, 7))
    numpy.testing.assert_array_equal(C[1], [1, 0, 1, 0, 1, 1, 0])
    assert C.sum() == 14


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_ppmi_equals_the_loop(window, block, rng, monkeypatch):
    monkeypatch.setattr(util, "_BLOCK", block)
    C = co_matrix_by_loop(rng.integers(0, 20, 300) % rng.integers(1, 20, 300), 25, window)  # 5 words do not occur
    M = util.ppmi(nnx.asarray(C, "int32"))
    assert M.dtype == np.float32
    numpy.testing.assert_allclose(to_cpu(M), ppmi_by_loop(C), rtol=1e-6)
    numpy.testing.assert_allclose(to_cpu(util.ppmi(C.astype(float), eps=2.5)), ppmi_by_loop(C, 2.5), rtol=1e-6)


def test_ppmi_of_large_counts_does_not_overflow():
    C = np.full((2, 2), 2**31 - 1, np.int32)
    C[0, 0] = 0
    numpy.testing.assert_allclose(to_cpu(util.ppmi(C)), ppmi_by_loop(to_cpu(C)), rtol=1e-6)


def test_ppmi_leaves_its_argument_unchanged_and_refuses_others():
    C = util.create_co_matrix(CORPUS, 7)
    before = C.copy()
    util.ppmi(C)
    numpy.testing.assert_array_equal(to_cpu(C), to_cpu(before))
    with pytest.raises(ValueError, match=r"ppmi: C must be a square matrix of counts, got shape \(7, 6\)"):
        util.ppmi(C[:, :6])
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"ppmi: C must hold counts of at least 0"):
            util.ppmi([[bad, 1], [1, 1]])


@pytest.mark.parametrize(("size", "block"), [(7, 14), (30, 1000), (30, 1)])
def test_ppmi_prints_the_lines_of_the_book(size, block, monkeypatch, capsys):
    monkeypatch.setattr(util, "_BLOCK", block)
    util.ppmi(numpy.ones((size, size), int), verbose=True)
    total = size * size
    expected = [f"{100 * n / total:.1f}% done" for n in range(1, total + 1) if n % (total // 100 + 1) == 0]
    assert capsys.readouterr().out.splitlines() == expected
    util.ppmi(numpy.ones((size, size), int))
    assert not capsys.readouterr().out


@pytest.mark.skipif(nnx.GPU, reason="times the CPU")
def test_count_based_vectors_of_a_large_vocabulary_take_seconds(rng):
    corpus = rng.integers(0, 3000, 200_000)
    start = time.perf_counter()
    util.ppmi(util.create_co_matrix(corpus, 3000, 2))
    util.create_contexts_target(corpus, 5)
    assert time.perf_counter() - start < 5  # 0.5 s alone; loops over the elements take 30 s


@pytest.mark.parametrize("window", [1, 2, 4])
def test_contexts_and_target_equal_the_loop(window):
    for corpus in (nnx.asarray(CORPUS), CORPUS.tolist() * 3):
        contexts, target = util.create_contexts_target(corpus, window) if len(corpus) > 2 * window else (None, None)
        if target is None:
            continue
        words = numpy.asarray(to_cpu(corpus))
        middle = range(window, len(words) - window)
        numpy.testing.assert_array_equal(to_cpu(target), words[list(middle)])
        around = [[words[i + d] for d in range(-window, window + 1) if d] for i in middle]
        numpy.testing.assert_array_equal(to_cpu(contexts), around)
    with pytest.raises(ValueError, match=r"window_size=4 needs a corpus of at least 9 words, got 8"):
        util.create_contexts_target(CORPUS, 4)


def test_targets_are_a_copy():
    corpus = nnx.asarray(CORPUS.copy())
    _, target = util.create_contexts_target(corpus)
    target[...] = 0
    numpy.testing.assert_array_equal(to_cpu(corpus), CORPUS)


def test_one_hot_of_words_and_contexts():
    contexts, target = util.create_contexts_target(CORPUS)
    for ids in (target, contexts, to_cpu(contexts)):
        one_hot = util.convert_one_hot(ids, 7)
        assert one_hot.dtype == np.int32
        numpy.testing.assert_array_equal(to_cpu(one_hot), numpy.eye(7)[to_cpu(ids)])


@pytest.mark.parametrize(
    "call",
    [
        lambda corpus: util.convert_one_hot(corpus, 7),
        lambda corpus: util.create_co_matrix(corpus, 7),
        lambda corpus: util.create_co_matrix(nnx.asarray(corpus), 7),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(call):
    for bad in (-1, 7):
        with pytest.raises(ValueError, match=rf"word ids must be at least 0 and below vocab_size=7, got {bad}"):
            call(numpy.array([0, bad]))
    with pytest.raises(ValueError, match=r"corpus must hold word ids, integers, got float64"):
        call(numpy.array([0.0, 1.0]))


def test_a_corpus_has_one_axis():
    with pytest.raises(ValueError, match=r"create_co_matrix: corpus must have one axis, got shape \(2, 4\)"):
        util.create_co_matrix(CORPUS[:8].reshape(2, 4), 7)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_cos_similarity_is_that_of_the_book(dtype, rng):
    x, y = (5 * rng.standard_normal((2, 50))).astype(dtype)
    similarity = util.cos_similarity(nnx.asarray(x), nnx.asarray(y))
    numpy.testing.assert_allclose(float(similarity), cosine(x, y), rtol=1e-6 if dtype != "float16" else 2e-3)
    assert float(util.cos_similarity(numpy.zeros(3), numpy.ones(3))) == 0
    with pytest.raises(ValueError, match=r"vectors of equal length, got \(3,\) and \(2,\)"):
        util.cos_similarity([1, 2, 3], [1, 2])


def test_most_similar_prints_the_lines_of_the_book(capsys):
    corpus, word_to_id, id_to_word = util.preprocess(TEXT)
    assert util.most_similar("you", word_to_id, id_to_word, util.create_co_matrix(corpus, 7)) is None
    assert capsys.readouterr().out == (
        "\n[query] you\n goodbye: 0.7071067691154799\n i: 0.7071067691154799\n hello: 0.7071067691154799\n"
        " say: 0.0\n and: 0.0\n"
    )
    util.most_similar("none", word_to_id, id_to_word, util.create_co_matrix(corpus, 7))
    assert capsys.readouterr().out == "none is not found\n"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("top", [1, 5, 400])
def test_most_similar_ranks_as_the_loop(dtype, top, rng, capsys):
    words = {f"w{i}": i for i in range(300)}
    names = {i: word for word, i in words.items()}
    matrix = rng.standard_normal((300, 20)).astype(dtype)
    matrix[7] = 0
    util.most_similar("w5", words, names, nnx.asarray(matrix), top)
    lines = capsys.readouterr().out.splitlines()
    scores = numpy.array([cosine(row, matrix[5]) if row.any() else 0 for row in matrix], float)
    order = [i for i in (-scores).argsort(kind="stable") if i != 5][:top]
    assert lines[:2] == ["", "[query] w5"]
    shown = [line.strip().split(": ") for line in lines[2:]]
    assert len(shown) == min(top, 299)
    tolerance = 1e-6 if dtype != "float16" else 2e-3
    numpy.testing.assert_allclose([float(score) for _, score in shown], scores[order], atol=tolerance)
    assert [word for word, _ in shown[:5]] == [names[i] for i in order[:5]]
    if dtype == "float16" and not nnx.GPU:  # the digits printed in the book come from float16 vectors
        assert [score for _, score in shown] == [str(score) for score in scores[order]]


def test_analogy_prints_the_lines_of_the_book(rng, capsys):
    words = {word: i for i, word in enumerate(["king", "man", "queen", "woman", "car", "bad"])}
    names = {i: word for word, i in words.items()}
    vectors = rng.standard_normal((6, 4)).astype("float16")
    vectors[5] = numpy.nan
    query = (vectors[1] - vectors[0] + vectors[2]).astype("float16")
    query /= numpy.sqrt((query * query).sum())
    with numpy.errstate(invalid="ignore"):
        scores = numpy.dot(vectors, query)
        util.analogy("king", "man", "queen", words, names, nnx.asarray(vectors), answer="woman")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "[analogy] king:man = queen:?"]
    assert lines[2].startswith("==>woman:")
    assert float(lines[2].partition(":")[2]) == pytest.approx(float(scores[3]), rel=0.01)
    expected = sorted((3, 4), key=lambda i: -scores[i])  # the words asked for and NaN are left out
    assert [line.strip().split(": ")[0] for line in lines[3:]] == [names[i] for i in expected]
    if not nnx.GPU:
        assert lines[2:] == [f"==>woman:{scores[3]!s}", *(f" {names[i]}: {float(scores[i])}" for i in expected)]
    util.analogy("king", "lord", "queen", words, names, vectors)
    assert capsys.readouterr().out == "lord is not found\n"
    with pytest.raises(ValueError, match=r"analogy: word_matrix must have a row for each of 6 words, got shape \(5, 4"):
        util.analogy("king", "man", "queen", words, names, vectors[:5])


def test_analogy_of_count_vectors(capsys):
    corpus, word_to_id, id_to_word = util.preprocess(TEXT)
    C = util.create_co_matrix(corpus, 7)
    before = C.copy()
    util.analogy("you", "say", "i", word_to_id, id_to_word, C, top=2)
    assert len(capsys.readouterr().out.splitlines()) == 4
    numpy.testing.assert_array_equal(to_cpu(C), to_cpu(before))


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_normalize_works_in_place(shape, rng):
    x = rng.standard_normal(shape)
    given = nnx.asarray(x.copy())
    assert util.normalize(given) is given
    numpy.testing.assert_allclose(to_cpu(given), x / numpy.linalg.norm(x, axis=-1, keepdims=True))
    numpy.testing.assert_array_equal(to_cpu(util.normalize(np.zeros(shape))), numpy.zeros(shape))


def test_normalize_refuses_what_it_cannot_change():
    for bad in ([1.0, 2.0], np.array([1, 2])):
        with pytest.raises(TypeError, match=r"normalize: x must be a floating \w+ array, which is changed in place"):
            util.normalize(bad)
    with pytest.raises(ValueError, match=r"normalize: x must be a writable vector or matrix, got shape \(1, 1, 1\)"):
        util.normalize(np.ones((1, 1, 1)))


class Perplexed:
    """Has the loss that its inputs determine, and keeps them."""

    def __init__(self):
        self.seen = []

    def forward(self, xs, ts):
        self.seen.append((to_cpu(xs), to_cpu(ts)))
        return np.asarray(to_cpu(xs).mean() / 10, np.float32)


class Trained(Perplexed):
    def forward(self, xs, ts, train_flg=True):
        assert train_flg is False
        return super().forward(xs, ts)


@pytest.mark.parametrize("kind", [Perplexed, Trained])
@pytest.mark.parametrize("move", [numpy.asarray, nnx.asarray])
def test_eval_perplexity_reads_the_corpus_as_the_loop(kind, move, capsys):
    corpus, model = numpy.arange(100) * 7 % 31, kind()
    perplexity = util.eval_perplexity(model, move(corpus), batch_size=4, time_size=5)
    jump, steps = 99 // 4, 99 // 20
    assert len(model.seen) == steps
    for step, (xs, ts) in enumerate(model.seen):
        for i in range(4):
            for t in range(5):
                assert xs[i, t] == corpus[(i * jump + step * 5 + t) % 100]
                assert ts[i, t] == corpus[(i * jump + step * 5 + t + 1) % 100]
    assert isinstance(perplexity, float)
    assert perplexity == pytest.approx(math.exp(sum(xs.mean() / 10 for xs, _ in model.seen) / steps))
    lines = "".join(f"\r{step} / {steps}" for step in range(steps))
    assert capsys.readouterr().out == f"evaluating perplexity ...\n{lines}\n"


def test_eval_perplexity_raises_the_errors_of_the_model():
    class Broken(Trained):
        def forward(self, xs, ts, train_flg=True):
            raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        util.eval_perplexity(Broken(), numpy.arange(400))
    with pytest.raises(ValueError, match=r"need a corpus of at least 351 words, got 350"):
        util.eval_perplexity(Perplexed(), numpy.arange(350))


class Answers:
    def __init__(self, guess):
        self.guess = guess

    def generate(self, question, start_id, sample_size):
        assert type(start_id) is int
        self.asked = start_id, sample_size
        return self.guess


CHARS = dict(enumerate("ab+_1 "))
QUESTION, CORRECT = numpy.array([[0, 2, 1]]), numpy.array([[3, 4, 5]])


@pytest.mark.parametrize(
    "guess",
    [
        [4, 5],
        numpy.array([[4], [5]]),
        [numpy.array([4]), numpy.array([[5]])],
        [nnx.asarray(4), nnx.asarray([5])],
        nnx.asarray([4, 5]),
    ],
)
@pytest.mark.parametrize("move", [numpy.asarray, nnx.asarray])
def test_eval_seq2seq_compares_the_answer_after_its_start(guess, move):
    model = Answers(guess)
    assert util.eval_seq2seq(model, move(QUESTION), move(CORRECT), CHARS) == 1
    assert model.asked == (3, 2)
    assert util.eval_seq2seq(Answers([4, 4]), move(QUESTION), move(CORRECT[0]), CHARS) == 0


@pytest.mark.parametrize("option", ["verbose", "verbos"])
def test_eval_seq2seq_prints_the_lines_of_the_book(option, capsys):
    util.eval_seq2seq(Answers([4, 5]), QUESTION, CORRECT, CHARS, **{option: True}, is_reverse=True)
    util.eval_seq2seq(Answers([4, 4]), QUESTION, CORRECT, CHARS, True)
    assert capsys.readouterr().out == ("Q b+a\nT 1 \n\033[92m☑\033[0m 1 \n---\nQ a+b\nT 1 \n\033[91m☒\033[0m 11\n---\n")
    util.eval_seq2seq(Answers([4, 4]), QUESTION, CORRECT, CHARS)
    assert not capsys.readouterr().out
