"""Traversal of a model: its layers, their arrays and other state by name, and parameters that layers share.

State has one protocol. An object names what it must remember beside its parameters in `state_names`, a class
attribute: numbers, strings, arrays, and lists and dicts of these. If it has a method `check_state(state)`, that
raises a ValueError for a state, a dict of these names, that it cannot continue from.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import numpy

from nnx.device import address, asarray
from nnx.np import Array, np

__all__ = [
    "TiedParameters",
    "attribute_names",
    "check_kinds",
    "check_savable",
    "is_savable",
    "layer_states",
    "memory_keys",
    "name_list",
    "named_arrays",
    "named_layers",
    "object_state",
    "release_batch",
    "set_state",
    "state_errors",
    "state_mismatches",
    "to_device",
]


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


def named_layers(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) for the layers nested in attributes, lists and dicts of `value`, then `value` itself."""
    seen = set() if seen is None else seen
    several = isinstance(value, dict | list | tuple)
    if id(value) in seen or not (several or not path or (hasattr(value, "forward") and hasattr(value, "params"))):
        return
    seen.add(id(value))
    inside = value if isinstance(value, dict) else dict(enumerate(value)) if several else getattr(value, "__dict__", {})
    for name, inner in inside.items():
        yield from named_layers(inner, f"{path}{name}.", seen)
    if not several:
        yield path, value


def named_arrays(model: Any) -> dict[str, Array]:
    """Return the arrays of `model` that training changes by name: parameters, each once, and arrays of its state."""
    if not hasattr(model, "params"):
        raise TypeError(f"checkpoint: expected a model, an object with params, got {type(model).__name__}")
    arrays: dict[str, Array] = {}
    known: set[Any] = set()
    for path, layer in named_layers(model):
        names = attribute_names(layer, "param_names")
        found: list[tuple[str, Array]] = []
        for i, p in enumerate(layer.params):
            key, transposed_key = memory_keys(p) if p.size else (id(p), None)
            if key not in known:
                found.append((names[i] if i < len(names) else f"params.{i}", p))
            known |= {key, transposed_key}
        found += [(name, value) for name, value in object_state(layer).items() if isinstance(value, Array)]
        for name, array in found:
            if path + name in arrays:
                raise ValueError(
                    f"{type(layer).__name__}: two arrays are named {path}{name}; param_names and state_names must be "
                    "unique"
                )
            arrays[path + name] = array
    return arrays


def layer_states(model: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return (layer, its state without arrays) by path, for the layers of `model` that have such a state."""
    states = {
        path: (layer, {name: value for name, value in object_state(layer).items() if not isinstance(value, Array)})
        for path, layer in named_layers(model)
    }
    return {path: (layer, state) for path, (layer, state) in states.items() if state}


def object_state(holder: Any) -> dict[str, Any]:
    """Return the attributes of a layer or callback that are listed in its `state_names`."""
    return {name: getattr(holder, name) for name in attribute_names(holder, "state_names")}


def attribute_names(holder: Any, attribute: str) -> list[str]:
    """Return `param_names` or `state_names` of a layer or callback; an empty list if it has no such attribute."""
    names = getattr(holder, attribute, ())
    what = f"{type(holder).__name__}.{attribute}"
    if isinstance(names, Iterator):  # would be exhausted after the first save
        raise TypeError(f"{what} must be a list of names, such as ['W', 'b'], got an iterator, which can be read once")
    return name_list(what, names)


def name_list(what: str, names: Any) -> list[str]:
    """Return `names`, an iterable of strings, as a list; `what` is the prefix of the TypeError message."""
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = list(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(f"{what} must be a list of names, such as ['W', 'b'], got {names!r}")


def check_savable(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` can be saved: None, numbers, strings, arrays, and lists and dicts of these."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} cannot be saved: the keys of a dict must be strings, got {key!r}")
            check_savable(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            check_savable(f"{name}.{i}", inner)
    elif value is not None and not isinstance(value, bool | int | float | str | numpy.generic | numpy.ndarray | Array):
        raise TypeError(f"{name} cannot be saved: expected a number, a string, an array or a list, got {value!r}")


def is_savable(value: Any) -> bool:
    """Return whether `check_savable` accepts `value`."""
    try:
        check_savable("", value)
    except TypeError:
        return False
    return True


def state_mismatches(name: str, current: Any, saved: Any) -> list[str]:
    """Describe how `saved` differs from `current` in names and types; values may differ, and None matches any type."""
    if isinstance(current, dict) and isinstance(saved, dict):
        path = f"{name}." if name else ""
        return [
            *(f"{path}{n}: in the file, but not here" for n in saved if n not in current),
            *(f"{path}{n}: here, but not in the file" for n in current if n not in saved),
            *(line for n in current if n in saved for line in state_mismatches(path + n, current[n], saved[n])),
        ]
    if current is None or saved is None or _describe(current) == _describe(saved):
        return []
    return [f"{name}: {_describe(current)} here, {_describe(saved)} in the file"]


def state_errors(name: str, holder: Any, state: dict[str, Any]) -> list[str]:
    """Return why `holder` cannot continue from `state`, if its `check_state` says so: no line or one."""
    try:
        if hasattr(holder, "check_state"):
            holder.check_state(state)
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


def to_device(value: Any) -> Any:
    """Return `value` with the host arrays in it, also in lists and dicts, moved to the device."""
    if isinstance(value, dict):
        return {name: to_device(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [to_device(inner) for inner in value]
    return asarray(value) if isinstance(value, numpy.ndarray) else value


def set_state(holder: Any, state: dict[str, Any]) -> None:
    """Assign the values of `state` to the attributes of `holder`, unless it has a method `load_state_dict`."""
    if hasattr(holder, "load_state_dict"):
        holder.load_state_dict(state)
        return
    for name, value in state.items():
        setattr(holder, name, value)


def check_kinds(state: dict[str, Any], kind: type = numbers.Real, *names: str) -> None:
    """Raise a ValueError unless the values `names` of `state` are of the class `kind`."""
    for name in names:
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{name} must be {kind.__name__}, got {state[name]!r:.80}")


def release_batch(model: Any) -> None:
    """Delete what the layers of `model` keep of the last batch for backward, listed in their `batch_names`."""
    for _, layer in named_layers(model):
        for name in getattr(layer, "batch_names", ()):
            vars(layer).pop(name, None)


def _describe(value: Any) -> str:
    """Describe the type of `value`; values with equal descriptions are compatible."""
    if isinstance(value, numpy.generic):
        value = value.item()  # as it is saved
    if isinstance(value, Array | numpy.ndarray):
        return f"an array of {value.dtype.name} with {value.ndim} axes"
    names = {str: "a string", list: "a list", tuple: "a list", dict: "a dict", int: "a number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)
