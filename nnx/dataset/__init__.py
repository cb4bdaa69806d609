"""Data sets, returned as NumPy arrays on both devices."""

from nnx.dataset import spiral

__all__ = ["spiral"]
