"""Every public layer with inputs for `check_layer`: name -> list of (make(dtype), inputs).

D = 4 inputs, H = 3 outputs or classes, N = 5 rows.
"""

import numpy

import nnx
from nnx import layers, np
from nnx.trainer import remove_duplicate

_rng = numpy.random.default_rng(7)
X = _rng.standard_normal((5, 4))
X3 = _rng.standard_normal((2, 3, 4))
W = _rng.standard_normal((4, 3))
B = _rng.standard_normal(3)
LABELS = numpy.array([0, 2, 1, 1, 2])
ONE_HOT = numpy.eye(3, dtype=numpy.int32)[LABELS]
SCORES = _rng.standard_normal((5, 3))
ROW_WEIGHTS = numpy.array([0.5, 0, 2, 1, 0.25])


def _weights(dtype, *arrays):
    return [nnx.asarray(a, dtype) for a in arrays]


def _norm(layer):
    return lambda dtype: layer(*_weights(dtype, 1 + numpy.arange(4) / 4, numpy.arange(4) / 8))


def _negative_sampling(dtype, sample_size):
    corpus = numpy.arange(20) % 4
    return layers.NegativeSamplingLoss(*_weights(dtype, W), corpus, sample_size=sample_size, rng=5)


def recurrent(kind, D=4, H=3, **settings):
    """Return a function of a dtype that makes a recurrent layer, always with the same weights."""
    columns = {"RNN": 1, "LSTM": 4, "GRU": 3}[kind.__name__.removeprefix("Time").removeprefix("Bi")] * H
    rng = numpy.random.default_rng(3)
    arrays = [rng.standard_normal(s) / 2 for s in 2 * ((D, columns), (H, columns), (columns,))]
    count = 6 if "Bi" in kind.__name__ else settings.pop("weights", 3)
    return lambda dtype: kind(*_weights(dtype, *arrays[:count]), **settings)


class JoinedLSTM:
    """An LSTM cell with one output, h beside c."""

    param_names = layers.LSTM.param_names

    def __init__(self, cell):
        self.cell, self.params, self.grads = cell, cell.params, cell.grads

    def forward(self, *inputs):
        return np.concatenate(self.cell.forward(*inputs), axis=1)

    def backward(self, dout):
        H = dout.shape[1] // 2
        return self.cell.backward(dout[:, :H], dout[:, H:])


class FromState:
    """A stateful recurrent layer whose initial states are inputs."""

    def __init__(self, layer):
        self.layer, self.params, self.grads, self.param_names = layer, layer.params, layer.grads, layer.param_names

    def forward(self, xs, *states):
        self.layer.set_state(*states)
        return self.layer.forward(xs)

    def backward(self, dhs):
        dxs = self.layer.backward(dhs)
        return dxs, self.layer.dh, *([self.layer.dc] if hasattr(self.layer, "dc") else [])


class Tied:
    """An embedding and an Affine with its weight transposed, as one layer with one weight."""

    param_names = ("W", "b")

    def __init__(self, W, b):
        self.params, self.grads = [W, b], [np.zeros_like(W), np.zeros_like(b)]

    def forward(self, idx):
        W, b = self.params
        self.embedding, self.affine = layers.TimeEmbedding(W), layers.TimeAffine(W.T, b)
        return self.affine.forward(self.embedding.forward(idx))

    def backward(self, dout):
        self.embedding.backward(self.affine.backward(dout))
        pairs = [self.embedding.params + self.affine.params, self.embedding.grads + self.affine.grads]
        for g, total in zip(self.grads, remove_duplicate(*pairs)[1], strict=True):
            g[...] = total


def _time_cases(kind, *states):
    """Return the cases of a layer of T time steps: also one step, one row, both, and initial states."""
    inputs = [(x,) for x in (X3, X_STEPS, X_STEPS[:, :1], X_STEPS[:1], X_STEPS[:1, :1])]
    stateful = (lambda dtype: FromState(recurrent(kind, stateful=True)(dtype)), (X_STEPS, *states))
    return [(recurrent(kind), x) for x in inputs] + [stateful] * bool(states)


STATE, CELL_STATE = SCORES / 2, SCORES[::-1] / 2
X_STEPS = numpy.stack([X, X[::-1], -X], axis=1)  # (5, 3, 4)
HS = numpy.stack([SCORES, SCORES[::-1] / 2, STATE - CELL_STATE], axis=1)  # (5, 3, 3)

CASES = {
    "MatMul": [
        (lambda dtype: layers.MatMul(*_weights(dtype, W)), (X,)),
        (lambda dtype: layers.MatMul(*_weights(dtype, W)), (X3,)),
        (lambda dtype: layers.MatMul(_weights(dtype, W.T)[0].T), (X,)),
        (lambda dtype: layers.MatMul(*_weights(dtype, W), input_grad=False), (X,)),
    ],
    "Affine": [
        (lambda dtype: layers.Affine(*_weights(dtype, W, B)), (X,)),
        (lambda dtype: layers.Affine(*_weights(dtype, W, B)), (X3,)),
        (lambda dtype: layers.Affine(*_weights(dtype, W, B), input_grad=False), (X,)),
    ],
    "BatchNorm": [(_norm(layers.BatchNorm), (X,)), (_norm(layers.BatchNorm), (X3,))],
    "Dropout": [(lambda dtype: layers.Dropout(0.3, rng=5), (X3,))],
    "Embedding": [
        (lambda dtype: layers.Embedding(*_weights(dtype, W)), (numpy.array([3, 0, 0, 1]),)),
        (lambda dtype: layers.Embedding(*_weights(dtype, W)), (numpy.array([[3, 0], [0, 1], [3, 3]]),)),
    ],
    "EmbeddingDot": [(lambda dtype: layers.EmbeddingDot(*_weights(dtype, W)), (SCORES[:4], numpy.array([3, 0, 0, 1])))],
    "GELU": [(lambda dtype: layers.GELU(), (X3,))],
    "LayerNorm": [(_norm(layers.LayerNorm), (X,)), (_norm(layers.LayerNorm), (X3,))],
    "Sigmoid": [(lambda dtype: layers.Sigmoid(), (X3,))],
    "ReLU": [(lambda dtype: layers.ReLU(), (X3,))],
    "Tanh": [(lambda dtype: layers.Tanh(), (X3,))],
    "Softmax": [(lambda dtype: layers.Softmax(), (X3,)), (lambda dtype: layers.Softmax(), (X,))],
    "SoftmaxWithLoss": [
        (lambda dtype: layers.SoftmaxWithLoss(), (SCORES, LABELS)),
        (lambda dtype: layers.SoftmaxWithLoss(), (SCORES, ONE_HOT)),
        (lambda dtype: layers.SoftmaxWithLoss(), (X3, numpy.array([[0, 1, 2], [3, 3, 0]]))),
        (lambda dtype: layers.SoftmaxWithLoss(), (_rng.standard_normal((3, 200)), LABELS[:3])),
        (lambda dtype: layers.SoftmaxWithLoss(), (SCORES, LABELS, ROW_WEIGHTS)),
        (lambda dtype: layers.SoftmaxWithLoss([1, 0.5, 2], ignore_label=1), (SCORES, ONE_HOT, ROW_WEIGHTS)),
        (lambda dtype: layers.SoftmaxWithLoss(ignore_label=-1), (X3, numpy.array([[0, -1, 2], [3, 3, -1]]))),
    ],
    "SigmoidWithLoss": [
        (lambda dtype: layers.SigmoidWithLoss(), (SCORES[:, 0], LABELS % 2)),
        (lambda dtype: layers.SigmoidWithLoss(), (SCORES, ONE_HOT.astype(bool))),
        (lambda dtype: layers.SigmoidWithLoss(), (SCORES, ONE_HOT, ROW_WEIGHTS)),
        (lambda dtype: layers.SigmoidWithLoss([1, 3], ignore_label=2), (SCORES, ONE_HOT + numpy.eye(5, 3, dtype=int))),
    ],
    "MeanSquaredError": [
        (lambda dtype: layers.MeanSquaredError(), (SCORES, _rng.standard_normal((5, 3)))),
        (lambda dtype: layers.MeanSquaredError(), (SCORES, _rng.standard_normal((5, 3)), ROW_WEIGHTS)),
    ],
    "NegativeSamplingLoss": [
        (lambda dtype: _negative_sampling(dtype, 2), (SCORES, LABELS)),
        (lambda dtype: _negative_sampling(dtype, 3), (SCORES, numpy.zeros(5, int))),
    ],
    "Repeat": [(lambda dtype: layers.Repeat(3), (X[:1],))],
    "Sum": [(lambda dtype: layers.Sum(), (X3,))],
    "RNN": [(recurrent(layers.RNN), (X, STATE))],
    "LSTM": [(lambda dtype: JoinedLSTM(recurrent(layers.LSTM)(dtype)), (X, STATE, CELL_STATE))],
    "GRU": [(recurrent(layers.GRU), (X, STATE)), (recurrent(layers.GRU, weights=2), (X, STATE))],
    "TimeRNN": _time_cases(layers.TimeRNN, STATE),
    "TimeLSTM": _time_cases(layers.TimeLSTM, STATE, CELL_STATE),
    "TimeGRU": [*_time_cases(layers.TimeGRU, STATE), (recurrent(layers.TimeGRU, weights=2), (X3,))],
    "TimeBiLSTM": _time_cases(layers.TimeBiLSTM),
    "AttentionWeight": [(lambda dtype: layers.AttentionWeight(), (HS[:, :T], SCORES)) for T in (3, 1)],
    "WeightSum": [(lambda dtype: layers.WeightSum(), (HS[:, :T], SCORES[:, :T])) for T in (3, 1)],
    "Attention": [(lambda dtype: layers.Attention(), (HS[:, :T], SCORES)) for T in (3, 1)],
    "TimeAttention": [
        (lambda dtype: layers.TimeAttention(), (HS[:, :Te], HS[::-1, :Td] / 2)) for Te, Td in ((3, 2), (1, 3), (3, 1))
    ],
    "TimeEmbedding": [
        (lambda dtype: layers.TimeEmbedding(*_weights(dtype, W)), (idx,))
        for idx in (numpy.array([[3, 0], [0, 1], [3, 3]]), numpy.array([[2]]))
    ],
    "TimeAffine": [
        (lambda dtype: layers.TimeAffine(*_weights(dtype, W, B)), (X3,)),
        (lambda dtype: Tied(*_weights(dtype, W.T, B)), (numpy.array([[2, 0, 2], [1, 1, 0]]),)),
        (lambda dtype: layers.TimeAffine(*_weights(dtype, W, B)), (X3[:1, :1],)),
    ],
    "Simple_TimeAffine": [(lambda dtype: layers.Simple_TimeAffine(*_weights(dtype, W, B)), (X3,))],
    "TimeDropout": [(lambda dtype: layers.TimeDropout(0.3, rng=5), (X3,))],
    "TimeSoftmaxWithLoss": [
        (lambda dtype: layers.TimeSoftmaxWithLoss(), (X3, numpy.array([[0, -1, 2], [3, 3, -1]]))),
        (lambda dtype: layers.TimeSoftmaxWithLoss(), (X3, numpy.eye(4, dtype=int)[[[0, 1, 2], [3, 3, 0]]])),
        (lambda dtype: layers.TimeSoftmaxWithLoss(), (X3, numpy.array([[-1, 1, -1], [-1, -1, -1]]))),
        (lambda dtype: layers.TimeSoftmaxWithLoss(ignore_label=3), (X3, numpy.array([[0, 3, 2], [3, 3, 1]]))),
        (lambda dtype: layers.TimeSoftmaxWithLoss(), (X3[:1, :1], numpy.array([[2]]))),
    ],
    "Simple_TimeSoftmaxWithLoss": [
        (lambda dtype: layers.Simple_TimeSoftmaxWithLoss(), (X3, numpy.array([[0, 1, 2], [3, 3, 0]])))
    ],
    "TimeSigmoidWithLoss": [
        (lambda dtype: layers.TimeSigmoidWithLoss(), (SCORES, ONE_HOT)),
        (lambda dtype: layers.TimeSigmoidWithLoss(ignore_label=-1), (SCORES, 2 * ONE_HOT - 1)),
    ],
}
