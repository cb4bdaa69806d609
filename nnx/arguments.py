"""The constructor arguments of objects: for `repr`, and for the settings of layers in checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["constructor_arguments", "format_repr"]


def constructor_arguments(holder: Any) -> dict[str, Any]:
    """Return those arguments of the constructor of `holder` that it has as attributes."""
    return {name: getattr(holder, name) for name in inspect.signature(type(holder)).parameters if hasattr(holder, name)}


def format_repr(holder: Any, *sizes: int) -> str:
    """Return class, sizes and settings of `holder`; flags and optional arguments only if they are not the defaults."""
    parameters = inspect.signature(type(holder)).parameters
    settings = [
        f"{name}={value!r:.80}"
        for name, value in constructor_arguments(holder).items()
        if value is not parameters[name].default or not isinstance(value, bool | None)
    ]
    return f"{type(holder).__name__}({', '.join([*map(str, sizes), *settings])})"
