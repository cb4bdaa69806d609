"""Negative sampling: word vectors learned by telling the target word from a few random ones.

N rows (batch size), V words (vocabulary size), H columns of the word vectors, S negative samples per row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from nnx.checks import as_floating, check_grad_output, check_integer, check_number, check_range, loss_grad
from nnx.device import as_real_array, asarray, quiet, to_cpu
from nnx.kernels import embedding, embedding_grad, sigmoid_loss, sigmoid_loss_grad
from nnx.layers.base import BaseLayer
from nnx.layers.embedding import Embedding
from nnx.np import Array, Scalar, np
from nnx.rng import as_generator, check_counters

__all__ = ["EmbeddingDot", "NegativeSamplingLoss", "UnigramSampler"]

_TICKETS = 2.0**48  # what a uniform float64 is scaled to: far fewer than 2**53, so that all products are accurate


class EmbeddingDot(BaseLayer):
    """The dot product of each row of h with the row of W for its index: y[n] = W[idx[n]] @ h[n].

    Parameters
    ----------
    W : (V, H)
        A floating array of the array module; used as `params[0]` without a copy.

    Shapes
    ------
    h : (N, H)    idx : (N,) integers in [0, V)    y, dout : (N,)

    Examples
    --------
    >>> from nnx import np
    >>> from nnx.layers import EmbeddingDot
    >>> dot = EmbeddingDot(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> print(dot.forward([[1.0, 2.0], [3.0, 4.0]], [2, 0]))
    [3. 3.]
    >>> print(dot.backward([1.0, 1.0]))
    [[1. 1.]
     [1. 0.]]
    """

    param_names = ("W",)
    batch_names = ("cache",)
    cache: tuple[Array, Array]

    def __init__(self, W: Array) -> None:
        self.embed = Embedding(W)
        self.params, self.grads = self.embed.params, self.embed.grads

    @quiet
    def forward(self, h: Any, idx: Any) -> Array:
        """Return the dot products."""
        W = self.params[0]
        idx = check_range(idx, len(W), "EmbeddingDot", "idx")
        h = _check_rows("EmbeddingDot", h, idx, W)
        target_W = self.embed.forward(idx)
        self.cache = h, target_W
        return np.sum(target_W * h, axis=1, dtype=W.dtype)

    @quiet
    def backward(self, dout: Any) -> Array:
        """Write the gradient of W and return that of h."""
        h, target_W = self.cache
        dout = check_grad_output(self, dout, h.shape[:1], h.dtype)[:, None]
        self.embed.backward(dout * h)
        return dout * target_W


class UnigramSampler:
    """Draws words with probabilities proportional to count**power, each row without its target and without repetition.

    Words are drawn one after the other from those that remain, as in the book on the CPU (on the GPU the book's
    negatives may repeat and may hold the target). The uniform numbers are drawn on the host, from a counter-based
    generator: the samples are equal on both devices, and the state is two integers. The GPU is not synchronized.

    Parameters
    ----------
    corpus : (M,) word ids
    power : float
        At least 0; below 1, rare words are drawn more often than they occur.
    sample_size : int
        S; less than the number of different words in the corpus.
    rng : seed, numpy.random.Generator or None
        Draws `seed`; None uses NumPy's global generator.
    vocab_size : int or None
        V; None is the largest id in the corpus plus 1. Words that do not occur are never drawn.

    Attributes
    ----------
    word_p : (V,) float64
        The probabilities.
    seed, calls : int
        The state; `calls` counts the calls of `get_negative_sample`.

    Examples
    --------
    >>> from nnx.layers.negative_sampling import UnigramSampler
    >>> sampler = UnigramSampler([0, 1, 2, 1, 3, 1], 0.75, sample_size=2, rng=0)
    >>> print(sampler.word_p.round(3))
    [0.189 0.432 0.189 0.189]
    >>> sampler.get_negative_sample([0, 1, 2]).shape  # two words other than 0, 1 and 2
    (3, 2)
    """

    def __init__(
        self, corpus: Any, power: float, sample_size: int, *, rng: Any = None, vocab_size: int | None = None
    ) -> None:
        self.power = check_number("UnigramSampler: power", power, 0)
        self.sample_size = check_integer("UnigramSampler: sample_size", sample_size)
        counts = _word_counts(corpus, vocab_size)
        self.vocab_size, occurring = len(counts), counts > 0
        if self.sample_size >= occurring.sum():
            raise ValueError(
                f"UnigramSampler: sample_size must be less than the number of words in the corpus, {occurring.sum()}, "
                f"got {self.sample_size}"
            )
        weights = numpy.zeros(len(counts))
        weights[occurring] = (counts[occurring] / counts.max()) ** self.power
        weights /= weights.sum()
        # Word i has the integers [start[i], start[i] + width[i]); those of all words are [0, total).
        width = numpy.where(occurring, numpy.maximum(numpy.rint(weights * _TICKETS), 1), 0).astype(numpy.int64)
        ends = width.cumsum()
        self.word_p = asarray(weights)
        self._width, self._start, self._ends = map(asarray, (width, ends - width, ends))
        self._total = ends[-1].tolist()
        self.seed = int.from_bytes(as_generator(rng).bytes(8), "little")
        self.calls = 0

    def get_negative_sample(self, target: Any) -> Array:
        """Return S words for each of the targets (N,), as an integer array (N, S)."""
        target = check_range(target, self.vocab_size, "UnigramSampler", "target")
        if target.ndim != 1:
            raise ValueError(f"UnigramSampler: target must have one axis, got shape {target.shape}")
        uniform = asarray(self._draw((self.sample_size, len(target))))
        drawn = target[:, None].astype(np.int64)
        width, before = self._width[drawn], np.zeros_like(drawn)  # before: widths of the drawn words with smaller ids
        for u in uniform:
            # Draw an integer among those of the words that remain, then skip the intervals of the others: each if the
            # integer has reached its start less the widths of the excluded intervals before it.
            ticket = np.floor(u * (self._total - width.sum(axis=1))).astype(np.int64)
            ticket += np.where(ticket[:, None] >= self._start[drawn] - before, width, 0).sum(axis=1)
            word = np.searchsorted(self._ends, ticket, side="right")[:, None]
            smaller, new_width = drawn < word, self._width[word]
            before += np.where(smaller, 0, new_width)
            before = np.concatenate([before, np.where(smaller, width, 0).sum(axis=1, keepdims=True)], axis=1)
            drawn, width = np.concatenate([drawn, word], axis=1), np.concatenate([width, new_width], axis=1)
        return drawn[:, 1:]

    def _draw(self, shape: tuple[int, ...]) -> numpy.ndarray:
        """Return uniform numbers in [0, 1), and count the call."""
        self.calls += 1
        bits = numpy.random.Philox(key=self.seed, counter=[0, 0, 0, self.calls])
        return numpy.random.Generator(bits).random(shape)


class NegativeSamplingLoss(BaseLayer):
    """The sum of the binary cross-entropy losses of the target and of S negative samples, as the mean over the rows.

    loss = mean over n of -log(sigmoid(W[t] @ h)) - sum over s of log(sigmoid(-W[s] @ h)), for the rows n with hidden
    vector h, target t and negative samples s.

    The target and the samples share one W with one gradient (in the book, `params` lists W once for each of the
    S + 1 layers around it); a word that occurs several times gets the sum of its gradients.

    Parameters
    ----------
    W : (V, H)
        A floating array of the array module; used as `params[0]` without a copy.
    corpus, power, sample_size, rng
        As for `UnigramSampler`.

    Shapes
    ------
    h : (N, H)    target : (N,) integers in [0, V)

    Attributes
    ----------
    sampler : UnigramSampler
    sample_size : int

    References
    ----------
    Mikolov et al., "Distributed representations of words and phrases and their compositionality", 2013.

    Examples
    --------
    >>> from nnx import initializers
    >>> from nnx.layers import NegativeSamplingLoss
    >>> loss_layer = NegativeSamplingLoss(initializers.normal((4, 8), rng=0), [0, 1, 2, 1, 3], sample_size=2, rng=0)
    >>> loss = loss_layer.forward(initializers.normal((5, 8), rng=1), [0, 1, 2, 1, 3])
    >>> print(f"{float(loss):.2f}")  # about 3 log(2): the vectors are still small
    2.08
    >>> loss_layer.backward().shape
    (5, 8)
    """

    param_names = ("W",)
    state_names = ("seed", "calls")
    batch_names = ("h", "idx", "vectors", "labels", "y")
    h: Array
    idx: Array  # (N, S + 1), the target first
    vectors: Array  # (N, S + 1, H)
    labels: Array
    y: Array

    def __init__(self, W: Array, corpus: Any, power: float = 0.75, sample_size: int = 5, *, rng: Any = None) -> None:
        embed = Embedding(W)
        self.params, self.grads = embed.params, embed.grads
        self.sampler = UnigramSampler(corpus, power, sample_size, rng=rng, vocab_size=len(W))
        self.power, self.sample_size = self.sampler.power, self.sampler.sample_size

    @property
    def seed(self) -> int:
        """That of the sampler."""
        return self.sampler.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.sampler.seed = value

    @property
    def calls(self) -> int:
        """That of the sampler."""
        return self.sampler.calls

    @calls.setter
    def calls(self, value: int) -> None:
        self.sampler.calls = value

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the state is two integers of 64 bits."""
        check_counters(state, self.state_names)

    @quiet
    def forward(self, h: Any, target: Any) -> Scalar:
        """Draw the negative samples and return the loss."""
        W = self.params[0]
        target = check_range(target, len(W), "NegativeSamplingLoss", "target")
        self.h = h = _check_rows("NegativeSamplingLoss", h, target, W)
        negative = self.sampler.get_negative_sample(target)
        self.idx = np.concatenate([target[:, None].astype(negative.dtype), negative], axis=1)
        self.vectors = embedding(W, self.idx)
        scores = np.matmul(self.vectors, h[:, :, None])[..., 0]
        self.labels = np.zeros(scores.shape, np.int8)
        self.labels[:, 0] = 1
        loss, self.y = sigmoid_loss(scores, self.labels, None)
        return loss * scores.shape[1]

    @quiet
    def backward(self, dout: Any = 1) -> Array:
        """Write the gradient of W and return that of h."""
        dout = loss_grad(self, dout) * self.labels.shape[1]
        dscores = sigmoid_loss_grad(self.y, self.labels, dout, None)
        rows = dscores[:, :, None] * self.h[:, None, :]
        embedding_grad(self.idx.reshape(-1), rows.reshape(self.idx.size, self.h.shape[1]), self.grads[0])
        return np.matmul(dscores[:, None, :], self.vectors)[:, 0]


def _check_rows(name: str, h: Any, idx: Array, W: Array) -> Array:
    """Return `h` in the dtype of `W` (V, H); raise unless it has H columns, and a row for each of the indices (N,)."""
    h = as_floating(h, W.dtype, name)
    if idx.ndim != 1 or h.shape != (len(idx), W.shape[1]) or not len(idx):
        raise ValueError(
            f"{name}: h must be (N, {W.shape[1]}) for N indices (N,), at least one, got {h.shape} and {idx.shape}"
        )
    return h


def _word_counts(corpus: Any, vocab_size: int | None) -> numpy.ndarray:
    """Return the number of occurrences of each word; raise if an id is negative or at least `vocab_size`."""
    stop = math.inf if vocab_size is None else check_integer("UnigramSampler: vocab_size", vocab_size)
    corpus = to_cpu(as_real_array(corpus, "UnigramSampler: corpus"))
    if corpus.ndim != 1 or corpus.dtype.kind not in "iu" or not len(corpus):
        raise ValueError(
            f"UnigramSampler: corpus must be a vector of word ids, integers, got {corpus.dtype} {corpus.shape}"
        )
    if corpus.min() < 0 or corpus.max() >= stop:
        raise ValueError(f"UnigramSampler: word ids must be in [0, {stop}), got {corpus.min()} to {corpus.max()}")
    return numpy.bincount(corpus.astype(numpy.int64), minlength=vocab_size or 0)
