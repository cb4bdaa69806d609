"""Layers: plain classes with `params`, `grads`, `forward` and `backward`.

`backward(dout)` overwrites `grads` with the gradients of the parameters (it does not accumulate) and
returns the gradient of the input. Layers do not modify their arguments. Any class with these four
members is a layer; no base class or registration is needed.

As in the book, `from nnx.layers import *` also brings np, GPU, softmax and cross_entropy_error.
"""

from nnx.functions import cross_entropy_error, softmax
from nnx.layers.activation import GELU, ReLU, Sigmoid, Softmax, Tanh
from nnx.layers.attention import Attention, AttentionWeight, TimeAttention, WeightSum
from nnx.layers.dropout import Dropout
from nnx.layers.embedding import Embedding
from nnx.layers.graph import Repeat, Sum
from nnx.layers.linear import Affine, MatMul
from nnx.layers.loss import MeanSquaredError, SigmoidWithLoss, SoftmaxWithLoss
from nnx.layers.negative_sampling import EmbeddingDot, NegativeSamplingLoss
from nnx.layers.normalization import BatchNorm, LayerNorm
from nnx.layers.recurrent import (
    GRU,
    LSTM,
    RNN,
    Simple_TimeAffine,
    Simple_TimeSoftmaxWithLoss,
    TimeAffine,
    TimeBiLSTM,
    TimeDropout,
    TimeEmbedding,
    TimeGRU,
    TimeLSTM,
    TimeRNN,
    TimeSigmoidWithLoss,
    TimeSoftmaxWithLoss,
)
from nnx.np import GPU, np

__all__ = [
    "GELU",
    "GPU",
    "GRU",
    "LSTM",
    "RNN",
    "Affine",
    "Attention",
    "AttentionWeight",
    "BatchNorm",
    "Dropout",
    "Embedding",
    "EmbeddingDot",
    "LayerNorm",
    "MatMul",
    "MeanSquaredError",
    "NegativeSamplingLoss",
    "ReLU",
    "Repeat",
    "Sigmoid",
    "SigmoidWithLoss",
    "Simple_TimeAffine",
    "Simple_TimeSoftmaxWithLoss",
    "Softmax",
    "SoftmaxWithLoss",
    "Sum",
    "Tanh",
    "TimeAffine",
    "TimeAttention",
    "TimeBiLSTM",
    "TimeDropout",
    "TimeEmbedding",
    "TimeGRU",
    "TimeLSTM",
    "TimeRNN",
    "TimeSigmoidWithLoss",
    "TimeSoftmaxWithLoss",
    "WeightSum",
    "cross_entropy_error",
    "np",
    "softmax",
]
