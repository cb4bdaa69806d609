"""Traversal of a model's layers, its named arrays and other state, and parameters shared between layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from nnx.device import address
from nnx.np import Array, np

__all__ = ["TiedParameters", "memory_keys"]


def memory_keys(p: Array) -> tuple[Any, Any]:
    """Return the memory keys of `p` and `p.T`: address, shape, strides."""
    return (address(p), p.shape, p.strides), (address(p), p.shape[::-1], p.strides[::-1])


class TiedParameters:
    """The groups of `params` that share memory, determined once, and buffers for their summed gradients."""

    def __init__(self, params: Iterable[Array]) -> None:
        params = list(params)
        groups: dict[Any, list[tuple[int, bool]]] = {}
        for i, p in enumerate(params):
            key, transposed_key = memory_keys(p)
            transposed = key not in groups and transposed_key in groups
            groups.setdefault(transposed_key if transposed else key, []).append((i, transposed))
        self.groups = list(groups.values())
        self.buffers = [
            np.empty(params[g[0][0]].shape, params[g[0][0]].dtype) if len(g) > 1 else None for g in self.groups
        ]

    def sum_tied_gradients(self, params: list[Array], grads: list[Array]) -> tuple[list[Array], list[Array]]:
        """Return `params` and `grads` with each shared array listed once and its gradients summed."""
        if len(self.groups) == len(params):
            return params, grads
        merged = []
        for group, total in zip(self.groups, self.buffers, strict=True):
            first = grads[group[0][0]]
            for i, transposed in group[1:]:
                first = np.add(first, grads[i].T if transposed else grads[i], out=total)
            merged.append(first)
        return [params[group[0][0]] for group in self.groups], merged


def named_state(model: Any) -> tuple[dict[str, Array], dict[str, tuple[Any, str]]]:
    """Return the arrays of `model` by name, and its other state by name as (layer, attribute)."""
    if not hasattr(model, "params"):
        raise TypeError(f"checkpoint: expected a model, an object with params, got {type(model).__name__}")
    arrays: dict[str, Array] = {}
    extra_state: dict[str, tuple[Any, str]] = {}
    known: set[Any] = set()

    def put(layer: Any, name: str, array: Array) -> None:
        if name in arrays:
            raise ValueError(
                f"{type(layer).__name__}: two arrays are named {name}; param_names and state_names must be unique"
            )
        arrays[name] = array

    for path, layer in named_layers(model, "", set()):
        names = attribute_names(layer, "param_names")
        for i, p in enumerate(layer.params):
            key, transposed_key = memory_keys(p) if p.size else (id(p), None)
            if key not in known:
                put(layer, path + (names[i] if i < len(names) else f"params.{i}"), p)
            known |= {key, transposed_key}
        for name in attribute_names(layer, "state_names"):
            if isinstance(getattr(layer, name), Array):
                put(layer, path + name, getattr(layer, name))
            else:
                extra_state[path + name] = layer, name
    return arrays, extra_state


def name_list(what: str, names: Any) -> list[str]:
    """Return `names`, an iterable of strings, as a list; `what` is the prefix of the TypeError message."""
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = list(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(f"{what} must be a list of names, such as ['W', 'b'], got {names!r}")


def attribute_names(holder: Any, attribute: str) -> list[str]:
    """Return `param_names` or `state_names` of a layer or callback; an empty list if it has no such attribute."""
    names = getattr(holder, attribute, ())
    what = f"{type(holder).__name__}.{attribute}"
    if isinstance(names, Iterator):  # would be exhausted after the first save
        raise TypeError(f"{what} must be a list of names, such as ['W', 'b'], got an iterator, which can be read once")
    return name_list(what, names)


def named_layers(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) for the layers nested in attributes, lists and dicts of `value`, then `value` itself."""
    several = isinstance(value, dict | list | tuple)
    if id(value) in seen or not (several or not path or (hasattr(value, "forward") and hasattr(value, "params"))):
        return
    seen.add(id(value))
    inside = value if isinstance(value, dict) else dict(enumerate(value)) if several else getattr(value, "__dict__", {})
    for name, inner in inside.items():
        yield from named_layers(inner, f"{path}{name}.", seen)
    if not several:
        yield path, value
