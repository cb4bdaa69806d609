"""Models composed as in chapters 7 and 8 of the book: generation by a language model, seq2seq, peeky, attention.

The names come from the star import, and the weights from its `np`, as in the book; data and labels are NumPy's.
"""
# ruff: noqa: F403, F405

import itertools

import numpy
import pytest

from nnx import util
from nnx.base_model import BaseModel
from nnx.dataset import sequence
from nnx.optimizer import Adam
from nnx.testing import check_gradients
from nnx.time_layers import *
from nnx.trainer import RnnlmTrainer, Trainer


def embedding(V, D, dtype):
    return TimeEmbedding((np.random.randn(V, D) / 10).astype(dtype))


def lstm_weights(D, H, dtype):
    return [
        (np.random.randn(D, 4 * H) / np.sqrt(D)).astype(dtype),
        (np.random.randn(H, 4 * H) / np.sqrt(H)).astype(dtype),
        np.zeros(4 * H).astype(dtype),
    ]


def affine(H, V, dtype):
    return TimeAffine((np.random.randn(H, V) / np.sqrt(H)).astype(dtype), np.zeros(V).astype(dtype))


def collect(model, *parts):
    model.params = [p for part in parts for p in part.params]
    model.grads = [g for part in parts for g in part.grads]


# ---- language models that generate ------------------------------------------------------------------


class Rnnlm(BaseModel):
    def __init__(self, V=6, D=8, H=8, dtype="f"):
        self.lstm_layers = [TimeLSTM(*lstm_weights(D, H, dtype), stateful=True)]
        self.drop_layers = []
        self.layers = [embedding(V, D, dtype), *self.lstm_layers, affine(H, V, dtype)]
        self.loss_layer = TimeSoftmaxWithLoss()
        collect(self, *self.layers)

    def predict(self, xs, train_flg=False):
        for layer in self.drop_layers:
            layer.train_flg = train_flg
        for layer in self.layers:
            xs = layer.forward(xs)
        return xs

    def forward(self, xs, ts, train_flg=True):
        return self.loss_layer.forward(self.predict(xs, train_flg), ts)

    def backward(self, dout=1):
        dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def reset_state(self):
        for layer in self.lstm_layers:
            layer.reset_state()

    def get_state(self):
        return [(layer.h, layer.c) for layer in self.lstm_layers]

    def set_state(self, states):
        for layer, state in zip(self.lstm_layers, states, strict=True):
            layer.set_state(*state)

    def generate(self, start_id, skip_ids=(), sample_size=100):
        word_ids, x = [start_id], start_id
        while len(word_ids) < sample_size:
            score = self.predict(np.array(x).reshape(1, 1))
            p = softmax(score.flatten())
            sampled = np.random.choice(len(p), size=1, p=p)
            if int(sampled[0]) not in skip_ids:
                x = sampled
                word_ids.append(int(sampled[0]))
        return word_ids


class BetterRnnlm(Rnnlm):
    """Two LSTM layers, dropout between all layers, and one weight for embedding and scores."""

    def __init__(self, V=6, D=8, H=8, dtype="f"):
        embed = embedding(V, D, dtype)
        self.lstm_layers = [TimeLSTM(*lstm_weights(D, H, dtype), stateful=True) for _ in range(2)]
        self.drop_layers = [TimeDropout(0.2) for _ in range(3)]
        between = [layer for pair in zip(self.drop_layers, self.lstm_layers, strict=False) for layer in pair]
        scores = TimeAffine(embed.params[0].T, np.zeros(V).astype(dtype))
        self.layers = [embed, *between, self.drop_layers[2], scores]
        self.loss_layer = TimeSoftmaxWithLoss()
        collect(self, *self.layers)


@pytest.mark.parametrize("kind", [Rnnlm, BetterRnnlm])
def test_a_language_model_learns_and_generates(kind, capsys):
    np.random.seed(0)
    numpy.random.seed(0)
    corpus = numpy.tile([0, 1, 2, 3, 4, 5], 20)
    model = kind()
    assert 5 not in model.generate(3, skip_ids=[5], sample_size=8)  # all words are as likely
    model.reset_state()
    trainer = RnnlmTrainer(model, Adam(0.1))
    trainer.fit(corpus[:-1], corpus[1:], max_epoch=10, batch_size=5, time_size=6, max_grad=0.5, eval_interval=3)
    assert trainer.ppl_list[-1] < 0.5 * trainer.ppl_list[0]
    assert "perplexity" in capsys.readouterr().out
    model.reset_state()
    model.predict(numpy.array([[0, 1, 2]]))
    states, question = model.get_state(), numpy.array([[3]])
    expected = model.predict(question)
    assert int(expected.flatten().argmax()) == 4
    generated = model.generate(3, sample_size=12)
    assert all(type(i) is int for i in generated)
    followed = [b == (a + 1) % 6 for a, b in itertools.pairwise(generated)]
    assert sum(followed) > len(followed) / 2
    model.set_state(states)
    assert (model.predict(question) == expected).all()


# ---- sequence to sequence ---------------------------------------------------------------------------


class Encoder:
    """Returns the last state."""

    def __init__(self, V, D, H, dtype):
        self.embed, self.lstm = embedding(V, D, dtype), self.recurrent(D, H, dtype)
        collect(self, self.embed, self.lstm)

    def recurrent(self, D, H, dtype):
        return TimeLSTM(*lstm_weights(D, H, dtype), stateful=False)

    def forward(self, xs):
        self.hs = self.lstm.forward(self.embed.forward(xs))
        return self.hs[:, -1, :]

    def backward(self, dh):
        dhs = np.zeros_like(self.hs)
        dhs[:, -1, :] = dh
        return self.embed.backward(self.lstm.backward(dhs))


class AttentionEncoder(Encoder):
    """Returns the states of all steps."""

    def forward(self, xs):
        return self.lstm.forward(self.embed.forward(xs))

    def backward(self, dhs):
        return self.embed.backward(self.lstm.backward(dhs))


class AttentionBiEncoder(AttentionEncoder):
    """Reads the question in both directions, each with half of the hidden units."""

    def recurrent(self, D, H, dtype):
        return TimeBiLSTM(*lstm_weights(D, H // 2, dtype), *lstm_weights(D, H // 2, dtype), stateful=False)


class Decoder:
    """Starts from the last state of the encoder."""

    inputs = outputs = 1  # vectors of H that LSTM and Affine are given, without and with the state of the encoder

    def __init__(self, V, D, H, dtype):
        self.H, extra = H, self.inputs - 1
        self.embed = embedding(V, D, dtype)
        self.lstm = TimeLSTM(*lstm_weights(D + extra * H, H, dtype), stateful=True)
        self.affine = affine(self.outputs * H, V, dtype)
        collect(self, self.embed, self.lstm, self.affine)

    def forward(self, xs, h):
        self.lstm.set_state(h)
        return self.scores(xs, h)

    def scores(self, xs, h):
        return self.affine.forward(self.lstm.forward(self.embed.forward(xs)))

    def backward(self, dscore):
        self.embed.backward(self.lstm.backward(self.affine.backward(dscore)))
        return self.lstm.dh

    def generate(self, h, start_id, sample_size):
        self.lstm.set_state(self.first_state(h))
        sampled, sample_id = [], start_id
        for _ in range(sample_size):
            x = np.array(sample_id).reshape((1, 1))
            sample_id = np.argmax(self.scores(x, h).flatten())
            sampled.append(sample_id)
        return sampled

    def first_state(self, h):
        return h


class PeekyDecoder(Decoder):
    """Gives the encoder's state to LSTM and Affine at every step."""

    inputs = outputs = 2

    def scores(self, xs, h):
        N, T = xs.shape
        repeated = np.repeat(h, T, axis=0).reshape(N, T, self.H)
        hs = self.lstm.forward(np.concatenate((repeated, self.embed.forward(xs)), axis=2))
        return self.affine.forward(np.concatenate((repeated, hs), axis=2))

    def backward(self, dscore):
        H, dout = self.H, self.affine.backward(dscore)
        dinput = self.lstm.backward(dout[:, :, H:])
        self.embed.backward(dinput[:, :, H:])
        return self.lstm.dh + np.sum(dout[:, :, :H] + dinput[:, :, :H], axis=1)


class AttentionDecoder(Decoder):
    """Is given all states of the encoder, and attends to them at every step."""

    outputs = 2

    def __init__(self, V, D, H, dtype):
        super().__init__(V, D, H, dtype)
        self.attention = TimeAttention()

    def forward(self, xs, enc_hs):
        self.lstm.set_state(self.first_state(enc_hs))
        return self.scores(xs, enc_hs)

    def scores(self, xs, enc_hs):
        dec_hs = self.lstm.forward(self.embed.forward(xs))
        c = self.attention.forward(enc_hs, dec_hs)
        return self.affine.forward(np.concatenate((c, dec_hs), axis=2))

    def backward(self, dscore):
        H, dout = self.H, self.affine.backward(dscore)
        denc_hs, ddec_hs = self.attention.backward(dout[:, :, :H])
        self.embed.backward(self.lstm.backward(dout[:, :, H:] + ddec_hs))
        denc_hs[:, -1] += self.lstm.dh
        return denc_hs

    def first_state(self, enc_hs):
        return enc_hs[:, -1]


class Seq2seq(BaseModel):
    encoder_class, decoder_class = Encoder, Decoder

    def __init__(self, V=6, D=8, H=16, dtype="f"):
        self.encoder, self.decoder = self.encoder_class(V, D, H, dtype), self.decoder_class(V, D, H, dtype)
        self.loss_layer = TimeSoftmaxWithLoss()
        collect(self, self.encoder, self.decoder)

    def forward(self, xs, ts):
        score = self.decoder.forward(ts[:, :-1], self.encoder.forward(xs))
        return self.loss_layer.forward(score, ts[:, 1:])

    def backward(self, dout=1):
        return self.encoder.backward(self.decoder.backward(self.loss_layer.backward(dout)))

    def generate(self, xs, start_id, sample_size):
        return self.decoder.generate(self.encoder.forward(xs), start_id, sample_size)


class PeekySeq2seq(Seq2seq):
    decoder_class = PeekyDecoder


class AttentionSeq2seq(Seq2seq):
    encoder_class, decoder_class = AttentionEncoder, AttentionDecoder


class AttentionBiSeq2seq(Seq2seq):
    encoder_class, decoder_class = AttentionBiEncoder, AttentionDecoder


KINDS = [Seq2seq, PeekySeq2seq, AttentionSeq2seq, AttentionBiSeq2seq]


@pytest.fixture
def problems(tmp_path):
    """Return questions and answers, "abc" and "_cba", of a file of the user, as `sequence` reads it."""
    words = map("".join, itertools.product("abc", repeat=3))
    tmp_path.joinpath("words.txt").write_text("".join(f"{word}_{word[::-1]}\n" for word in words))
    (x_train, t_train), _ = sequence.load_data("words.txt", folder=tmp_path)
    return x_train[:, ::-1], t_train  # reversed, which is easier to learn


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_and_answers(kind, problems, capsys, tmp_path, monkeypatch):
    x, t = problems
    np.random.seed(0)
    numpy.random.seed(0)
    _, id_to_char = sequence.get_vocab()
    model = kind(len(id_to_char))
    trainer = Trainer(model, Adam(0.05))
    trainer.fit(x, t, max_epoch=30, batch_size=len(x), max_grad=5.0, eval_interval=1)
    assert trainer.loss_list[-1] < 0.5 * trainer.loss_list[0]
    capsys.readouterr()

    def correct(**settings):
        rows = zip(x[:4, None], t[:4, None], strict=True)
        return sum(util.eval_seq2seq(model, q, a, id_to_char, is_reverse=True, **settings) for q, a in rows)

    right = correct(verbose=True)
    lines = capsys.readouterr().out
    assert lines.count("Q ") == 4
    assert f"T {''.join(id_to_char[i] for i in t[0, 1:].tolist())}\n" in lines
    assert correct(verbos=True) == right >= 3
    assert capsys.readouterr().out == lines
    assert correct() == right
    assert not capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    model.save_params()
    loaded = kind(len(id_to_char))
    loaded.load_params(f"{kind.__name__}.pkl")
    expected = float(model.forward(x, t))
    assert abs(float(loaded.forward(x, t)) - expected) < 0.01 * (1 + expected)


@pytest.mark.parametrize("kind", [AttentionSeq2seq, AttentionBiSeq2seq])
def test_the_attention_of_one_sentence_is_a_map(kind, problems):
    x, t = problems
    np.random.seed(0)
    model = kind()
    model.forward(x[[3]], t[[3]])
    d = numpy.array(model.decoder.attention.attention_weights)
    attention_map = d.reshape(d.shape[0], d.shape[2])
    assert attention_map.shape == (3, 3)
    numpy.testing.assert_allclose(attention_map.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", [Rnnlm, *KINDS])
def test_the_gradients_of_a_whole_model_are_numerically_right(kind):
    np.random.seed(1)
    rng = numpy.random.default_rng(0)
    model = kind(4, 2, 2, dtype="d")
    check_gradients(model, rng.integers(0, 4, (2, 3)), rng.integers(0, 4, (2, 3)), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_the_host_give_what_those_of_the_device_give(kind, problems):
    x, t = problems
    np.random.seed(0)
    model = kind()
    loss = float(model.forward(x[:5], t[:5]))
    model.backward()
    grads = [g.copy() for g in model.grads]
    assert float(model.forward(np.asarray(x[:5].copy()), np.asarray(t[:5]))) == loss
    model.backward()
    assert all((a == b).all() for a, b in zip(model.grads, grads, strict=True))
