"""Learn word vectors from a text by CBOW with negative sampling, and print the words nearest to a few others.

Reference: Deep Learning from Scratch 2, chapter 4. The text is a file that you name, or Python's own language
reference, which ships with every Python as pydoc_data.topics: 60,000 words, a tiny text for the purpose, yet after a
few seconds "left" is nearest to "right", and "lowercase" to "uppercase". With NNX_GPU=1 it runs on the GPU.
"""

import math
import re
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy

from nnx import Adam, Embedding, Trainer, asarray, np, to_cpu
from nnx.callbacks import LearningRateScheduler
from nnx.layers import NegativeSamplingLoss
from nnx.optimizer import cosine_decay
from nnx.util import create_contexts_target, most_similar, preprocess


class CBOW:
    """Predicts a word from the mean of the vectors of the words around it."""

    def __init__(self, vocab_size, vector_size, corpus, sample_size, rng):
        self.embedding = Embedding.init(vocab_size, vector_size, rng=rng)
        W = np.zeros((vocab_size, vector_size), "float32")
        self.loss_layer = NegativeSamplingLoss(W, corpus, sample_size=sample_size, rng=rng)
        self.params = self.embedding.params + self.loss_layer.params
        self.grads = self.embedding.grads + self.loss_layer.grads

    def forward(self, contexts, target):
        self.vectors = self.embedding.forward(contexts)  # (N, C, H)
        return self.loss_layer.forward(self.vectors.mean(axis=1), target)

    def backward(self, dout=1):
        dmean = self.loss_layer.backward(dout)[:, None] / self.vectors.shape[1]
        self.embedding.backward(np.broadcast_to(dmean, self.vectors.shape))


def load(path, min_count=5):
    """Return corpus, word_to_id and id_to_word of a text, without words that occur less often than `min_count`."""
    text = Path(path).read_text(encoding="utf-8") if path else "\n".join(topics.values())
    words = re.findall(r"[^\W\d_]{2,}", text.lower())
    counts = Counter(words)
    return preprocess(" ".join(word for word in words if counts[word] >= min_count))


def subsample(corpus, threshold, rng):
    """Drop most occurrences of the most frequent words, which say little about their neighbours.

    Source: Mikolov et al., "Distributed representations of words and phrases and their compositionality", 2013, 2.3.
    """
    corpus = to_cpu(corpus)
    frequency = numpy.bincount(corpus) / len(corpus)
    return asarray(corpus[rng.random(len(corpus)) < numpy.sqrt(threshold / frequency)[corpus]])


def main(epochs=20, vector_size=100, window=5, sample_size=10, threshold=3e-4, lr=0.003, seed=0, text=None, words=()):
    """Return the word vectors (V, H), word_to_id and id_to_word."""
    rng = numpy.random.default_rng(seed)
    corpus, word_to_id, id_to_word = load(text)
    contexts, target = create_contexts_target(subsample(corpus, threshold, rng), window)
    print(f"{len(corpus):,} words, {len(target):,} of them as targets, {len(word_to_id):,} different ones")

    model = CBOW(len(word_to_id), vector_size, corpus, sample_size, rng)
    trainer = Trainer(model, Adam(lr), rng=rng)
    rate = LearningRateScheduler(cosine_decay(lr, steps=epochs * math.ceil(len(target) / 128)))
    trainer.fit(contexts, target, epochs, 128, eval_interval=None, verbose=False, callbacks=[rate])
    vectors = model.embedding.params[0]
    for word in words or ("left", "lowercase", "integer", "exception", "iterator", "tuple"):
        most_similar(word, word_to_id, id_to_word, vectors)
    seconds = numpy.mean([row["seconds"] for row in trainer.history])
    print(f"\nloss {trainer.history[-1]['loss']:.2f} after {epochs} epochs of {seconds:.2f} s")
    return vectors, word_to_id, id_to_word


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.add_argument("words", nargs="*", help="words whose nearest words are printed")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--vector-size", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--sample-size", type=int, help="negative samples per word")
    parser.add_argument("--threshold", type=float, help="a more frequent word than this is dropped now and then")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--text", metavar="FILE")
    main(**vars(parser.parse_args()))
