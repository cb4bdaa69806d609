"""The base class of nnx's own layers; a user-defined layer needs none."""

from __future__ import annotations

from nnx.arguments import format_repr
from nnx.np import Array

__all__ = ["BaseLayer"]


class BaseLayer:
    """A layer without parameters, with a repr of its sizes and settings."""

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.grads: list[Array] = []

    def __repr__(self) -> str:
        return format_repr(self, *self.params[0].shape) if self.params else format_repr(self)
