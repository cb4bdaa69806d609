"""Layers: plain classes with `params`, `grads`, `forward` and `backward`.

`backward(dout)` writes the gradients of the parameters into `grads`, never adding to what is there,
and returns the gradient of the input. No layer writes into its arguments. Any class with these four
members is a layer; there is no base class and nothing to register.
"""

from nnx.layers.activation import GELU, ReLU, Sigmoid, Softmax, Tanh
from nnx.layers.dropout import Dropout
from nnx.layers.embedding import Embedding
from nnx.layers.graph import Repeat, Sum
from nnx.layers.linear import Affine, MatMul
from nnx.layers.loss import MeanSquaredError, SigmoidWithLoss, SoftmaxWithLoss
from nnx.layers.normalization import BatchNorm, LayerNorm

__all__ = [
    "GELU",
    "Affine",
    "BatchNorm",
    "Dropout",
    "Embedding",
    "LayerNorm",
    "MatMul",
    "MeanSquaredError",
    "ReLU",
    "Repeat",
    "Sigmoid",
    "SigmoidWithLoss",
    "Softmax",
    "SoftmaxWithLoss",
    "Sum",
    "Tanh",
]
