"""Rewrite dates, "SEPTEMBER 27, 1994" as "1994-09-27", with an encoder, a decoder, and attention between them.

Reference: Deep Learning from Scratch 2, chapter 8. The dates are those of the book's date.txt in the folder nnx of your
cache directory, or generated ones in the same spellings. One in ten is held out; at least 0.99 of these are right in
every character after a minute or two. The picture shows where the net looks. With NNX_GPU=1 it runs on the GPU.
"""

import math
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter

import numpy

from nnx import Adam, Sequential, Trainer, np, to_cpu
from nnx.callbacks import LearningRateScheduler
from nnx.dataset import sequence
from nnx.initializers import xavier
from nnx.layers import TimeAffine, TimeAttention, TimeEmbedding, TimeLSTM, TimeSoftmaxWithLoss
from nnx.optimizer import cosine_decay


class AttentionSeq2seq:
    """Encoder and decoder of one LSTM each; the decoder starts from the last state of the encoder."""

    def __init__(self, V, D, H, rng):  # V characters, their vectors (D,), and states (H,)
        self.lstm = TimeLSTM.init(D, H, rng=rng, stateful=True)  # of the decoder
        self.encoder = Sequential([TimeEmbedding.init(V, D, initializer=xavier, rng=rng), TimeLSTM.init(D, H, rng=rng)])
        self.decoder = Sequential([TimeEmbedding.init(V, D, initializer=xavier, rng=rng), self.lstm])
        self.attention, self.affine = TimeAttention(), TimeAffine.init(2 * H, V, rng=rng)
        self.loss_layer = TimeSoftmaxWithLoss()
        self.params = self.encoder.params + self.decoder.params + self.affine.params
        self.grads = self.encoder.grads + self.decoder.grads + self.affine.grads

    def encode(self, x):
        self.hs_enc = self.encoder.forward(x)
        self.lstm.set_state(self.hs_enc[:, -1])

    def decode(self, t):
        hs = self.decoder.forward(t)
        return self.affine.forward(np.concatenate([self.attention.forward(self.hs_enc, hs), hs], axis=2))

    def forward(self, x, t):
        self.encode(x)
        return self.loss_layer.forward(self.decode(t[:, :-1]), t[:, 1:])

    def backward(self, dout=1):
        dcontext, dhs = np.split(self.affine.backward(self.loss_layer.backward(dout)), 2, axis=2)
        dhs_enc, dquery = self.attention.backward(dcontext)
        self.decoder.backward(dhs + dquery)
        dhs_enc[:, -1] += self.lstm.dh
        self.encoder.backward(dhs_enc)

    def generate(self, x, start, length):
        """Return the most likely characters (N, length), one after the other, and the attention (N, length, Te)."""
        self.encode(x)
        ids, answer, weights = np.full((len(x), 1), start), [], []
        for _ in range(length):
            ids = self.decode(ids).argmax(axis=2)
            answer.append(to_cpu(ids))
            weights.append(self.attention.attention_weights[0])
        return numpy.concatenate(answer, axis=1), numpy.stack(weights, axis=1)


def draw(x, answer, weights, path):
    """Draw for each of four dates where the decoder looks (across) for each character that it writes (down)."""
    from matplotlib import pyplot  # noqa: PLC0415 - only needed for the picture

    chars = numpy.array([*sequence.get_vocab()[0]])
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 5.2), layout="constrained")
    for ax, columns, rows, values in zip(axes.flat, chars[x], chars[answer], weights, strict=True):
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
        ax.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
        ax.tick_params(length=0)
    figure.savefig(path)
    print(f"picture: {path}")


def main(epochs=5, seed=0, plot="attention.png"):
    """Return the accuracy on the 5,000 held-out dates: the fraction that is right in every character."""
    (x, t), (x_test, t_test) = sequence.load_data("date.txt")
    x, x_test = x[:, ::-1], x_test[:, ::-1]  # the encoder reads backwards
    rng = numpy.random.default_rng(seed)
    model = AttentionSeq2seq(len(sequence.get_vocab()[0]), 16, 64, rng)
    trainer = Trainer(model, Adam(0.008), rng=rng)
    rate = LearningRateScheduler(cosine_decay(0.008, steps=epochs * math.ceil(len(x) / 128)))
    trainer.fit(x, t, epochs, 128, max_grad=5, eval_interval=100, callbacks=[rate])
    answer, weights = model.generate(x_test, t_test[0, 0], t_test.shape[1] - 1)
    accuracy = float((answer == t_test[:, 1:]).all(axis=1).mean())
    if plot:
        draw(x_test[:4, ::-1], answer[:4], weights[:4, :, ::-1], plot)
    print(f"accuracy {accuracy:.4f} on {len(x_test):,} held-out dates")
    return accuracy


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--plot", metavar="FILE", help="where to save the attention map; '' draws none")
    main(**vars(parser.parse_args()))
