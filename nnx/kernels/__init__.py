"""One name per kernel, bound once to the fastest version of the active device.

Every name is in `portable`, the reference; `cpu` (NumPy) or `cuda` (CuPy) has those that pay there,
with the same arguments in the same order.
"""

from nnx.np import GPU  # which has also seen to it that CuPy can be had

if GPU:
    from nnx.kernels.cuda import (
        adagrad,
        adam,
        add_bias,
        bias_grad,
        clip_grads,
        dropout,
        embedding,
        embedding_grad,
        gelu,
        gelu_grad,
        momentum,
        nesterov,
        relu_grad,
        rmsprop,
        sgd,
        sigmoid,
        sigmoid_grad,
        softmax,
        softmax_grad,
        softmax_loss,
        softmax_loss_grad,
        tanh_grad,
    )
else:
    from nnx.kernels.cpu import (
        adagrad,
        adam,
        bias_grad,
        embedding_grad,
        momentum,
        nesterov,
        rmsprop,
        sgd,
        sigmoid,
        sigmoid_grad,
        softmax_loss,
        softmax_loss_grad,
    )
    from nnx.kernels.portable import (
        add_bias,
        clip_grads,
        dropout,
        embedding,
        gelu,
        gelu_grad,
        relu_grad,
        softmax,
        softmax_grad,
        tanh_grad,
    )

__all__ = [
    "adagrad",
    "adam",
    "add_bias",
    "bias_grad",
    "clip_grads",
    "dropout",
    "embedding",
    "embedding_grad",
    "gelu",
    "gelu_grad",
    "momentum",
    "nesterov",
    "relu_grad",
    "rmsprop",
    "sgd",
    "sigmoid",
    "sigmoid_grad",
    "softmax",
    "softmax_grad",
    "softmax_loss",
    "softmax_loss_grad",
    "tanh_grad",
]
