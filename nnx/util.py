"""The functions of the book's `common.util` that nnx provides, under the same names."""

from nnx.device import to_cpu, to_gpu
from nnx.optimizer import clip_grads

__all__ = ["clip_grads", "to_cpu", "to_gpu"]
