"""Neural-network layers with the backward pass written out, on NumPy, or on CuPy when `NNX_GPU=1`."""

from nnx import (
    callbacks,
    checkpoint,
    config,
    dataset,
    functions,
    initializers,
    layers,
    models,
    optimizer,
    plotting,
    testing,
    trainer,
)
from nnx.config import GPU
from nnx.dataset import spiral
from nnx.device import asarray, show_config, synchronize, to_cpu, to_gpu
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
from nnx.np import np  # binds the library itself over the submodule of the same name
from nnx.optimizer import SGD, AdaGrad, Adam, AdamW, Momentum, Nesterov, RMSprop, clip_grads
from nnx.trainer import Trainer

__version__ = "0.1.0"

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
]
