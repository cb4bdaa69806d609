"""The functions of the book's `common.util`: text, word vectors, and evaluation of language models.

V words in the vocabulary, N words in the corpus, D dimensions of the vectors. Arguments are arrays of either device,
or lists; returned arrays are on the device. The functions that print show the book's lines.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy

from nnx.checks import check_bool, check_integer, check_number
from nnx.device import as_real_array, asarray, describe, is_writable, quiet, to_cpu, to_gpu
from nnx.np import Array, np
from nnx.optimizer import clip_grads

__all__ = [
    "analogy",
    "clip_grads",
    "convert_one_hot",
    "cos_similarity",
    "create_co_matrix",
    "create_contexts_target",
    "eval_perplexity",
    "eval_seq2seq",
    "most_similar",
    "normalize",
    "ppmi",
    "preprocess",
    "to_cpu",
    "to_gpu",
]

_BLOCK = 1 << 20  # elements of a block of rows in ppmi


def preprocess(text: str) -> tuple[Array, dict[str, int], dict[int, str]]:
    """Split a text into words, and return corpus (N,), word_to_id and id_to_word.

    The text is converted to lower case, a full stop becomes a word of its own, and words are separated by single
    spaces. Ids are assigned in order of first appearance.

    Examples
    --------
    >>> from nnx.util import preprocess
    >>> corpus, word_to_id, id_to_word = preprocess("You say goodbye and I say hello.")
    >>> print(corpus, id_to_word[6])
    [0 1 2 3 4 1 5 6] .
    """
    if not isinstance(text, str):
        raise TypeError(f"preprocess: text must be a string, got {describe(text)}")
    words = text.lower().replace(".", " .").split(" ")
    word_to_id = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return np.array([word_to_id[word] for word in words]), word_to_id, {i: word for word, i in word_to_id.items()}


@quiet
def cos_similarity(x: Any, y: Any, eps: float = 1e-8) -> Any:
    """Return x @ y / ((norm(x) + eps) * (norm(y) + eps)) for two vectors (D,).

    Examples
    --------
    >>> from nnx.util import cos_similarity
    >>> print(f"{float(cos_similarity([1.0, 0.0], [1.0, 1.0])):.4f}")
    0.7071
    """
    x, y = asarray(x, name="cos_similarity: x"), asarray(y, name="cos_similarity: y")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"cos_similarity: x and y must be vectors of equal length, got {x.shape} and {y.shape}")
    return np.dot(_unit_rows(x, eps), _unit_rows(y, eps))


def most_similar(
    query: str,
    word_to_id: Mapping[str, int],
    id_to_word: Mapping[int, str],
    word_matrix: Any,
    top: int = 5,
) -> None:
    """Print the `top` words whose rows in `word_matrix` (V, D) have the largest cosine similarity with that of `query`.

    Words of equal similarity are printed in order of their ids.

    Examples
    --------
    >>> from nnx.util import create_co_matrix, most_similar, ppmi, preprocess
    >>> corpus, word_to_id, id_to_word = preprocess("You say goodbye and I say hello.")
    >>> W = ppmi(create_co_matrix(corpus, len(word_to_id)))
    >>> most_similar("you", word_to_id, id_to_word, W, top=3)
    <BLANKLINE>
    [query] you
     goodbye: 0.407...
     i: 0.407...
     hello: 0.276...
    """
    word_matrix = _check_word_matrix("most_similar", word_matrix, id_to_word)
    if query not in word_to_id:
        print(f"{query} is not found")
        return
    print(f"\n[query] {query}")
    with numpy.errstate(under="ignore"):
        units = _unit_rows(word_matrix, 1e-8)
        similarity = np.dot(units, units[word_to_id[query]])
    _print_best("most_similar", similarity, id_to_word, top, {query})


def analogy(
    a: str,
    b: str,
    c: str,
    word_to_id: Mapping[str, int],
    id_to_word: Mapping[int, str],
    word_matrix: Any,
    top: int = 5,
    answer: str | None = None,
) -> None:
    """Print the `top` words for "a is to b as c is to ?": those with the largest product with vec(b) - vec(a) + vec(c).

    That sum is normalized. With `answer`, the product of this word is printed as well.

    Examples
    --------
    >>> from nnx.util import analogy
    >>> words = ["king", "man", "queen", "woman", "apple"]
    >>> word_to_id, id_to_word = {word: i for i, word in enumerate(words)}, dict(enumerate(words))
    >>> vectors = [[1.0, 1.0, 0.1], [0.0, 1.0, 0.1], [1.0, -1.0, 0.1], [0.0, -1.0, 0.1], [-1.0, 0.0, 1.0]]
    >>> analogy("man", "king", "woman", word_to_id, id_to_word, vectors, top=2)
    <BLANKLINE>
    [analogy] man:king = woman:?
     queen: 1.41...
     apple: -0.63...
    """
    word_matrix = _check_word_matrix("analogy", word_matrix, id_to_word)
    for word in (a, b, c, *([] if answer is None else [answer])):
        if word not in word_to_id:
            print(f"{word} is not found")
            return
    print(f"\n[analogy] {a}:{b} = {c}:?")
    rows = [word_matrix[word_to_id[word]] for word in (b, a, c)]
    with numpy.errstate(under="ignore"):
        similarity = np.dot(word_matrix, normalize(_integers_to_float(rows[0] - rows[1] + rows[2])))
    if answer is not None:
        print(f"==>{answer}:{to_cpu(similarity)[word_to_id[answer]]!s}")
    _print_best("analogy", similarity, id_to_word, top, {a, b, c})


@quiet
def normalize(x: Array) -> Array:
    """Divide a vector (D,), or each row of a matrix (N, D), by its norm, in place, and return it; zeros stay zeros.

    Raises
    ------
    TypeError, ValueError
        If `x` is not a writable floating array of the array module with one or two axes.

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.util import normalize
    >>> print(normalize(np.array([[3.0, 4.0], [0.0, 0.0]])))
    [[0.6 0.8]
     [0.  0. ]]
    """
    if not isinstance(x, Array) or x.dtype.kind != "f":
        raise TypeError(
            f"normalize: x must be a floating {np.__name__} array, which is changed in place, got {describe(x)}; "
            "make it with nnx.asarray(x, dtype='float32')"
        )
    if x.ndim not in (1, 2) or not is_writable(x):
        kind = "" if is_writable(x) else " of a read-only array"
        raise ValueError(f"normalize: x must be a writable vector or matrix, got shape {x.shape}{kind}")
    norm = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    x /= np.where(norm == 0, 1, norm)
    return x


def convert_one_hot(corpus: Any, vocab_size: int) -> Array:
    """Return the one-hot vectors of word ids (N,) or contexts (N, C): (N, V) or (N, C, V) in int32.

    Examples
    --------
    >>> from nnx.util import convert_one_hot
    >>> print(convert_one_hot([0, 2, 1], vocab_size=3))
    [[1 0 0]
     [0 0 1]
     [0 1 0]]
    """
    vocab_size = check_integer("convert_one_hot: vocab_size", vocab_size)
    corpus = _check_ids("convert_one_hot", corpus, vocab_size)
    return (corpus[..., None] == np.arange(vocab_size)).astype(np.int32)


def create_co_matrix(corpus: Any, vocab_size: int, window_size: int = 1) -> Array:
    """Return the co-occurrence matrix (V, V) of a corpus (N,) in int32.

    Element (i, j) counts how often word j is among the `window_size` words to the left or right of word i.

    Examples
    --------
    >>> from nnx.util import create_co_matrix, preprocess
    >>> corpus, word_to_id, id_to_word = preprocess("You say goodbye and I say hello.")
    >>> print(create_co_matrix(corpus, len(word_to_id)))
    [[0 1 0 0 0 0 0]
     [1 0 1 0 1 1 0]
     [0 1 0 1 0 0 0]
     [0 0 1 0 1 0 0]
     [0 1 0 1 0 0 0]
     [0 1 0 0 0 0 1]
     [0 0 0 0 0 1 0]]
    """
    vocab_size = check_integer("create_co_matrix: vocab_size", vocab_size)
    check_integer("create_co_matrix: window_size", window_size)
    corpus = _check_corpus("create_co_matrix", corpus, vocab_size).astype(np.int64)
    counts = np.zeros(vocab_size * vocab_size, np.int32)
    for distance in range(1, min(window_size, len(corpus) - 1) + 1):
        left, right = corpus[:-distance], corpus[distance:]
        np.add.at(counts, left * vocab_size + right, 1)
        np.add.at(counts, right * vocab_size + left, 1)
    return counts.reshape(vocab_size, vocab_size)


def ppmi(C: Any, verbose: bool = False, eps: float = 1e-8) -> Array:
    """Return the positive pointwise mutual information of a co-occurrence matrix C (V, V), in float32.

    PPMI(i, j) = max(0, log2(C[i, j] * N / (S[i] * S[j]) + eps)), N the sum of C and S those of its columns; 0 where a
    sum is 0. It is computed in float64, a block of rows at a time.

    Parameters
    ----------
    C : (V, V)
        Counts of at least 0.
    verbose : bool
        Whether to print the progress, in about a hundred lines.
    eps : float

    Raises
    ------
    ValueError
        If C is not a square matrix, or holds negative numbers or NaN.

    Examples
    --------
    >>> from nnx.util import ppmi
    >>> print(ppmi([[0, 2], [2, 1]]).round(3))
    [[0.    0.737]
     [0.737 0.   ]]
    """
    C, eps = asarray(C, name="ppmi: C"), check_number("ppmi: eps", eps, 0)
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise ValueError(f"ppmi: C must be a square matrix of counts, got shape {C.shape}")
    if C.size and not C.min() >= 0:
        raise ValueError(f"ppmi: C must hold counts of at least 0, got {C.min()}")
    M = np.empty(C.shape, np.float32)
    sums = C.sum(axis=0, dtype=np.float64)
    total = sums.sum()
    rows, progress = max(1, _BLOCK // max(1, len(C))), _Progress(C.size if verbose else 0)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, len(C), rows):
            block = slice(start, start + rows)
            pmi = np.multiply(C[block], total, dtype=np.float64)
            pmi /= sums[block, None] * sums
            pmi += eps
            np.log2(pmi, out=pmi)
            M[block] = np.fmax(pmi, 0)  # 0 for NaN, which is 0 / 0
            progress.show(min(start + rows, len(C)) * len(C))
    return M


class _Progress:
    """Prints the book's lines for the elements done, of `total`; none if that is 0."""

    def __init__(self, total: int) -> None:
        self.total, self.step, self.lines = total, total // 100 + 1, 0

    def show(self, done: int) -> None:
        """Print the lines due since the last call."""
        for count in range((self.lines + 1) * self.step, min(done, self.total) + 1, self.step):
            print(f"{100 * count / self.total:.1f}% done")
            self.lines += 1


def create_contexts_target(corpus: Any, window_size: int = 1) -> tuple[Array, Array]:
    """Return the contexts (N - 2 * window_size, 2 * window_size) and targets (N - 2 * window_size,) of a corpus (N,).

    The context of a word are the `window_size` words to its left, then those to its right.

    Examples
    --------
    >>> from nnx.util import create_contexts_target
    >>> contexts, target = create_contexts_target([0, 1, 2, 3, 4])
    >>> print(contexts, target)
    [[0 2]
     [1 3]
     [2 4]] [1 2 3]
    """
    size = check_integer("create_contexts_target: window_size", window_size)
    corpus = _check_corpus("create_contexts_target", corpus)
    count = len(corpus) - 2 * size
    if count < 1:
        raise ValueError(
            f"create_contexts_target: window_size={size} needs a corpus of at least {2 * size + 1} words, "
            f"got {len(corpus)}"
        )
    contexts = np.stack([corpus[i : i + count] for i in range(2 * size + 1) if i != size], axis=1)
    return contexts, corpus[size : size + count].copy()


def eval_perplexity(model: Any, corpus: Any, batch_size: int = 10, time_size: int = 35) -> float:
    """Return exp(mean loss) of a language model over a corpus (N,), read in `batch_size` parallel streams.

    `model.forward(xs, ts)` gets word ids (batch_size, time_size) and the ids that follow them, and `train_flg=False`
    if it has such an argument. The state of the model is not reset.

    Examples
    --------
    >>> from nnx import Sequential, np
    >>> from nnx.layers import TimeAffine, TimeEmbedding, TimeSoftmaxWithLoss
    >>> from nnx.util import eval_perplexity
    >>> layers = [TimeEmbedding(np.zeros((5, 4))), TimeAffine(np.zeros((4, 5)), np.zeros(5))]
    >>> model = Sequential(layers, TimeSoftmaxWithLoss())
    >>> perplexity = eval_perplexity(model, np.arange(100) % 5, batch_size=2, time_size=10)
    evaluating perplexity ...
    >>> round(perplexity, 2)
    5.0
    """
    check_integer("eval_perplexity: batch_size", batch_size)
    check_integer("eval_perplexity: time_size", time_size)
    corpus = _check_corpus("eval_perplexity", corpus)
    steps, jump = (len(corpus) - 1) // (batch_size * time_size), (len(corpus) - 1) // batch_size
    if not steps:
        raise ValueError(
            f"eval_perplexity: batch_size={batch_size} and time_size={time_size} need a corpus of at least "
            f"{batch_size * time_size + 1} words, got {len(corpus)}"
        )
    print("evaluating perplexity ...")
    options: dict[str, Any] = {"train_flg": False} if _takes_train_flg(model.forward) else {}
    total: Any = 0.0
    index: Any = np.arange(batch_size)[:, None] * jump + np.arange(time_size)
    for step in range(steps):
        total = total + np.asarray(model.forward(corpus[index], corpus[index + 1], **options), np.float64)
        index += time_size
        print(f"\r{step} / {steps}", end="", flush=True)
    print()
    with numpy.errstate(over="ignore"):
        return float(numpy.exp(float(total) / steps))


def eval_seq2seq(
    model: Any,
    question: Any,
    correct: Any,
    id_to_char: Mapping[int, str],
    verbose: bool = False,
    is_reverse: bool = False,
    *,
    verbos: bool = False,
) -> int:
    """Return 1 if `model.generate(question, start_id, sample_size)` gives the characters of `correct`, otherwise 0.

    Parameters
    ----------
    model : object with generate
    question : (1, T) character ids
    correct : (1, T) or (T,) character ids
        The first is the one that starts every answer; it is not compared.
    id_to_char : dict
    verbose : bool
        Whether to print question, answer and guess. The Korean edition calls it `verbos`.
    is_reverse : bool
        Whether `question` is reversed; it is printed in the right order.

    Examples
    --------
    >>> from nnx.util import eval_seq2seq
    >>> class Adder:
    ...     def generate(self, question, start_id, sample_size):
    ...         return [3, 4]
    >>> id_to_char = dict(enumerate("+_ 91"))
    >>> eval_seq2seq(Adder(), [[3, 0, 4]], [[1, 3, 4]], id_to_char)
    1
    """
    verbose = check_bool("eval_seq2seq: verbose", verbose) or check_bool("eval_seq2seq: verbos", verbos)
    start, *answer = _as_ints(correct)
    guess = _as_text(model.generate(question, start, len(answer)), id_to_char)
    expected, asked = _as_text(answer, id_to_char), _as_text(question, id_to_char)
    if verbose:
        ok = guess == expected
        mark = f"\033[9{2 if ok else 1}m{'☑' if ok else '☒'}\033[0m" if os.name != "nt" else "O" if ok else "X"
        print(f"Q {asked[::-1] if is_reverse else asked}\nT {expected}\n{mark} {guess}\n---")
    return int(guess == expected)


def _as_text(ids: Any, id_to_char: Mapping[int, str]) -> str:
    return "".join(id_to_char[i] for i in _as_ints(ids))


def _as_ints(ids: Any) -> list[int]:
    """Return ids, an array or a list of numbers and arrays of one number, as Python ints."""
    parts = ids if isinstance(ids, list | tuple) else [ids]
    return [int(i) for part in parts for i in to_cpu(part).reshape(-1)]


def _takes_train_flg(function: Callable[..., Any]) -> bool:
    return "train_flg" in inspect.signature(function).parameters


def _unit_rows(x: Array, eps: float) -> Array:
    """Return `x` divided by norm + eps along the last axis, in its dtype if that is floating."""
    norm = np.sqrt(np.sum(x**2, axis=-1, keepdims=True)) + eps
    return x / np.where(norm == 0, 1, norm)  # eps is 0 in float16


def _integers_to_float(x: Array) -> Array:
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def _print_best(name: str, similarity: Array, id_to_word: Mapping[int, str], top: int, excluded: set[str]) -> None:
    """Print the `top` words of the largest similarity, without `excluded` ones and NaN."""
    similarity, top = to_cpu(similarity), check_integer(f"{name}: top", top)
    for word, score in _best(similarity, id_to_word, top, excluded):
        print(f" {word}: {score}")


def _best(
    similarity: numpy.ndarray, id_to_word: Mapping[int, str], top: int, excluded: set[str]
) -> Iterator[tuple[str, float]]:
    order = (-similarity).argsort(kind="stable")
    for i in order[: top + len(excluded)].tolist():
        score = float(similarity[i])
        if top and not math.isnan(score) and id_to_word[i] not in excluded:
            top -= 1
            yield id_to_word[i], score


def _check_word_matrix(name: str, word_matrix: Any, id_to_word: Mapping[int, str]) -> Array:
    word_matrix = asarray(word_matrix, name=f"{name}: word_matrix")
    if word_matrix.ndim != 2 or len(word_matrix) < len(id_to_word):
        raise ValueError(
            f"{name}: word_matrix must have a row for each of {len(id_to_word)} words, got shape {word_matrix.shape}"
        )
    return word_matrix[: len(id_to_word)]


def _check_corpus(name: str, corpus: Any, vocab_size: int | None = None) -> Array:
    """Return `corpus` as a vector of ids on the device."""
    corpus = _check_ids(name, corpus, vocab_size)
    if corpus.ndim != 1:
        raise ValueError(f"{name}: corpus must have one axis, got shape {corpus.shape}")
    return corpus


def _check_ids(name: str, corpus: Any, vocab_size: int | None = None) -> Array:
    """Return word ids on the device; raise unless they are integers of at least 0, and below `vocab_size` if given."""
    corpus = as_real_array(corpus, f"{name}: corpus")
    if corpus.dtype.kind not in "iu" or not corpus.size:
        raise ValueError(f"{name}: corpus must hold word ids, integers, got {corpus.dtype} of shape {corpus.shape}")
    low, high = int(corpus.min()), int(corpus.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "" if vocab_size is None else f" and below vocab_size={vocab_size}"
        raise ValueError(f"{name}: word ids must be at least 0{limit}, got {low if low < 0 else high}")
    return asarray(corpus)
