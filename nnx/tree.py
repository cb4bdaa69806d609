"""Traversal of a model: its layers, their arrays and other state by name, and parameters that layers share.

State has one protocol. An object names what it must remember beside its parameters in `state_names`, a class
attribute: numbers, strings, arrays, and lists and dicts of these. If it has a method `check_state(state)`, that
raises a ValueError for a state, a dict of these names, that it cannot continue from.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy

from nnx.device import address
from nnx.np import Array, np

__all__ = [
    "SAVABLE_DTYPES",
    "TiedModel",
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
    "snapshot",
    "state_errors",
    "state_mismatches",
    "to_device",
]


SAVABLE_DTYPES = {"bool", "complex64", *(f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64))}
SAVABLE_DTYPES |= {f"float{n}" for n in (16, 32, 64)}


def memory_keys(p: Array) -> tuple[Any, Any]:
    """Return the memory keys of `p` and `p.T`: address, shape, strides."""
    return (address(p), p.shape, p.strides), (address(p), p.shape[::-1], p.strides[::-1])


class TiedParameters:
    """The groups of `params` that share memory, determined once, and buffers for their summed gradients."""

    def __init__(self, params: Iterable[Array]) -> None:
        params = list(params)
        self.count = len(params)
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
        if len(params) != self.count:  # layers were frozen or unfrozen
            self.__init__(params)  # type: ignore[misc]
        if len(self.groups) == len(params):
            return params, grads
        merged = []
        for group, total in zip(self.groups, self.buffers, strict=True):
            first = grads[group[0][0]]
            for i, transposed in group[1:]:
                first = np.add(first, grads[i].T if transposed else grads[i], out=total)
            merged.append(first)
        return [params[group[0][0]] for group in self.groups], merged


class TiedModel:
    """Base class of models whose copies and pickles keep the sharing of weights, also that of W and W.T."""

    params: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        params = self.params or ()
        for group in TiedParameters(params).groups:
            i, i_transposed = next((member for member in group if id(params[member[0]]) in memo), group[0])
            copied_param = copy.deepcopy(params[i], memo)
            for j, transposed in group:  # deepcopy would copy each view into a separate array
                memo.setdefault(id(params[j]), copied_param if transposed == i_transposed else copied_param.T)
        copied = memo[id(self)] = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(copied), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        tied = [group for group in TiedParameters(self.params or ()).groups if len(group) > 1]
        return {**vars(self), "_tied": tied} if tied else vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for (i, _), *others in vars(self).pop("_tied", ()):
            for j, transposed in others:
                array, view = self.params[j], self.params[i].T if transposed else self.params[i]
                if memory_keys(array)[0] != memory_keys(view)[0]:  # pickle has made two arrays of them
                    _replace_array(self, array, view)


def _replace_array(model: Any, old: Array, new: Array) -> None:
    """Replace an array and its transposed view in attributes, lists and tuples of a model and its layers."""
    views = dict(zip(reversed(memory_keys(old)), (new.T, new), strict=True))

    def replaced(value: Any) -> Any:
        return views.get(memory_keys(value)[0], value) if isinstance(value, Array) else value

    for _, layer in named_layers(model):
        for name, value in vars(layer).items():
            if isinstance(value, list):
                value[:] = map(replaced, value)
            else:
                vars(layer)[name] = tuple(map(replaced, value)) if type(value) is tuple else replaced(value)


def named_layers(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) for the layers nested in attributes, lists and dicts of `value`, then `value` itself."""
    seen = set() if seen is None else seen
    several = isinstance(value, dict | list | tuple)
    is_layer = hasattr(value, "forward") and (hasattr(value, "params") or hasattr(value, "state_names"))
    if id(value) in seen or not (several or not path or is_layer):
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
        for i, p in enumerate(getattr(layer, "params", ())):  # optional in a loss
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


def object_state(holder: Any, *, unset_ok: bool = False) -> dict[str, Any]:
    """Return the attributes of an object that are listed in its `state_names`; if `unset_ok`, without unset ones."""
    names = attribute_names(holder, "state_names")
    for name in names:
        if not (unset_ok or hasattr(holder, name)):
            raise TypeError(
                f"{type(holder).__name__}: state_names lists {name!r}, which it does not have yet; set it in __init__"
            )
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}


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
    elif not (value is None or isinstance(value, bool | int | float | str) or _is_plain(value)):
        raise TypeError(f"{name} cannot be saved: expected a number, a string, an array or a list, got {value!r:.80}")


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a real number of NumPy, or an array of a dtype that files can hold."""
    if isinstance(value, numpy.generic):
        return value.dtype.kind in "fiub" and value.itemsize <= 8
    return isinstance(value, Array | numpy.ndarray) and value.dtype.name in SAVABLE_DTYPES


def is_savable(value: Any) -> bool:
    """Return whether `check_savable` accepts `value`."""
    try:
        check_savable("", value)
    except TypeError:
        return False
    return True


def state_mismatches(name: str, current: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Describe how the state `saved` differs from `current` in names and kinds of values; None matches any kind."""
    return [
        *(f"{name}.{n}: in the file, but not here" for n in saved if n not in current),
        *(f"{name}.{n}: here, but not in the file" for n in current if n not in saved),
        *(
            f"{name}.{n}: {_describe(value)} here, {_describe(saved[n])} in the file"
            for n, value in current.items()
            if n in saved and value is not None and saved[n] is not None and _describe(value) != _describe(saved[n])
        ),
    ]


def state_errors(name: str, holder: Any, state: dict[str, Any]) -> list[str]:
    """Return why `holder` cannot continue from `state`: by its `check_state`, or because it cannot be assigned."""
    for attribute in state:
        descriptor = getattr(type(holder), attribute, None)
        if isinstance(descriptor, property) and descriptor.fset is None:
            return [f"{name}.{attribute}: a property without a setter here"]
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
    if isinstance(value, list | tuple):
        return type(value)(to_device(inner) for inner in value)
    return np.asarray(value) if isinstance(value, numpy.ndarray) else value


def set_state(holder: Any, state: dict[str, Any]) -> None:
    """Assign the values of `state` to the attributes of `holder`."""
    for name, value in state.items():
        setattr(holder, name, value)


def snapshot(model: Any) -> Callable[[], None]:
    """Return a function that restores the present state of the layers of `model`, without their parameters."""
    states = [(layer, object_state(layer, unset_ok=True)) for _, layer in named_layers(model)]
    copied = [
        {name: a.copy() if isinstance(a, Array) else copy.deepcopy(a) for name, a in s.items()} for _, s in states
    ]

    def restore() -> None:
        for (layer, state), values in zip(states, copied, strict=True):
            for name, value in values.items():
                if isinstance(value, Array):  # the layer's array itself, which others may refer to
                    state[name][...] = value
                    value = state[name]
                with contextlib.suppress(AttributeError):  # a property without a setter
                    setattr(layer, name, value)

    return restore


def check_kinds(state: dict[str, Any], kind: type, *names: str) -> None:
    """Raise a ValueError unless the values `names` of `state`, if it has them, are of the class `kind`."""
    for name in state.keys() & set(names):
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{name} must be {kind.__name__}, got {state[name]!r:.80}")


def release_batch(model: Any) -> None:
    """Delete what the layers of `model` keep of the last batch for backward, listed in their `batch_names`."""
    for _, layer in named_layers(model):
        for name in getattr(layer, "batch_names", ()):
            with contextlib.suppress(AttributeError):  # there was no forward, or it kept nothing
                delattr(layer, name)


def _describe(value: Any) -> str:
    """Describe the type of `value`; values with equal descriptions are compatible."""
    if isinstance(value, numpy.generic):
        value = value.item()  # as it is saved
    if isinstance(value, Array | numpy.ndarray):
        return f"an array of {value.dtype.name} with {value.ndim} axes"
    names = {str: "a string", list: "a list", tuple: "a list", dict: "a dict", int: "a number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)
