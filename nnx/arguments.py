"""The constructor arguments of objects: for `repr`, and for the settings of layers in checkpoints."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

__all__ = ["constructor_arguments", "format_repr"]


def constructor_arguments(holder: Any) -> dict[str, Any]:
    """Return those arguments of the constructor of `holder` that it has as attributes."""
    arguments = {}
    for name in _parameters(holder):
        with contextlib.suppress(Exception):  # a property may raise anything
            value = getattr(holder, name)
            if not inspect.ismethod(value):  # of the same name
                arguments[name] = value
    return arguments


def format_repr(holder: Any, *sizes: int) -> str:
    """Return class, sizes and settings of `holder`; flags and optional arguments only if they are not the defaults."""
    parameters = _parameters(holder)
    settings = [
        f"{name}={_format(value)}"
        for name, value in constructor_arguments(holder).items()
        if value is not parameters[name].default or not isinstance(value, bool | None)
    ]
    return f"{type(holder).__name__}({', '.join([*map(str, sizes), *settings])})"


def _parameters(holder: Any) -> Any:
    try:
        return inspect.signature(type(holder)).parameters
    except (TypeError, ValueError):  # no signature, as of a class in C
        return {}


def _format(value: Any) -> str:
    """Return the repr of a setting in one line; of an array its shape if it is long."""
    if getattr(value, "size", 1) > 10 and hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {value.shape}"
    return " ".join(f"{value!r:.80}".split())
