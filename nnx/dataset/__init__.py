"""Data sets, returned as NumPy arrays on both devices."""

from nnx.dataset import ptb, sequence, spiral

__all__ = ["ptb", "sequence", "spiral"]
