"""One name per kernel, bound once, at import, to the fastest version there is.

Every name is in `portable`, the reference; `native` (NumPy) or `cuda` (CuPy) replaces those that pay
there, with the same arguments in the same order.
"""
# ruff: noqa: F403 - the names are those of `portable.__all__`, which the others only bind anew

from nnx.kernels import portable
from nnx.kernels.portable import *
from nnx.np import GPU  # importing it also verifies CuPy

if GPU:
    from nnx.kernels.cuda import *
else:
    from nnx.kernels.native import *

__all__ = portable.__all__
