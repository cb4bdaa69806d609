"""Neural-network layers with the backward pass written out, on NumPy, or on CuPy when `NNX_GPU=1`."""

from nnx import (
    callbacks,
    checkpoint,
    config,
    dataset,
    distributed,
    functions,
    initializers,
    layers,
    models,
    onnx,  # noqa: F401 - not in __all__, because another package has the name
    optimizer,
    plotting,
    testing,
    trainer,
    util,
)
from nnx._version import __version__ as __version__
from nnx.config import GPU
from nnx.dataset import spiral
from nnx.device import asarray, synchronize, to_cpu, to_gpu
from nnx.info import show_config
from nnx.layers import (
    GELU,
    Affine,
    BatchNorm,
    Dropout,
    Embedding,
    LayerNorm,
    MatMul,
    MeanSquaredError,
    ReLU,
    Repeat,
    Sigmoid,
    SigmoidWithLoss,
    Softmax,
    SoftmaxWithLoss,
    Sum,
    Tanh,
)
from nnx.models import Sequential, TwoLayerNet
from nnx.np import np  # rebinds `nnx.np` from the submodule to the array module
from nnx.optimizer import SGD, AdaGrad, Adam, AdamW, Momentum, Nesterov, RMSprop, clip_grads
from nnx.trainer import Trainer

__all__ = [
    "GELU",
    "GPU",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Affine",
    "BatchNorm",
    "Dropout",
    "Embedding",
    "LayerNorm",
    "MatMul",
    "MeanSquaredError",
    "Momentum",
    "Nesterov",
    "RMSprop",
    "ReLU",
    "Repeat",
    "Sequential",
    "Sigmoid",
    "SigmoidWithLoss",
    "Softmax",
    "SoftmaxWithLoss",
    "Sum",
    "Tanh",
    "Trainer",
    "TwoLayerNet",
    "asarray",
    "callbacks",
    "checkpoint",
    "clip_grads",
    "config",
    "dataset",
    "distributed",
    "functions",
    "initializers",
    "layers",
    "models",
    "np",
    "optimizer",
    "plotting",
    "show_config",
    "spiral",
    "synchronize",
    "testing",
    "to_cpu",
    "to_gpu",
    "trainer",
    "util",
]
