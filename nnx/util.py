"""The names of the source's `common.util` that nnx has, where its readers look for them."""

from nnx.device import to_cpu, to_gpu
from nnx.optimizer import clip_grads

__all__ = ["clip_grads", "to_cpu", "to_gpu"]
