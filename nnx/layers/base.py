"""The base class of nnx's own layers; a user-defined layer needs none."""

from __future__ import annotations

import reprlib

from nnx.arguments import format_repr
from nnx.np import Array

__all__ = ["BaseLayer"]


class BaseLayer:
    """A layer without parameters, with a repr of its sizes and settings."""

    def __init__(self) -> None:
        self.params: list[Array] = []
        self.grads: list[Array] = []

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        params = getattr(self, "params", None) or [None]  # none yet in an object that is half built
        return format_repr(self, *getattr(params[0], "shape", ()))
