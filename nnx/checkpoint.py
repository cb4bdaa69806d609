"""Models, optimizers and trainers in safetensors files: saved whole, loaded all or nothing.

An array has a name that says where it lies in the model: `layers.0.W` is the array that the first layer calls W
(`param_names`, a class attribute), `params.0` one without a name. One that several layers share is saved
once. What else a layer or a callback must remember it names in `state_names`.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from nnx import storage
from nnx._version import __version__
from nnx.device import asarray, to_cpu
from nnx.np import Array, np
from nnx.shared import places

__all__ = ["load", "newest", "save"]

_NEEDED: dict[str, dict[str, type]] = {
    "model": {"state": dict},
    "optimizer": {"class": str, "settings": dict},
    "trainer": {},
}  # in the metadata
_NUMBERED = re.compile(r"epoch-(\d{4,})-step-(\d{6,})\.safetensors")


def save(
    path: str | Path,
    model: Any,
    optimizer: Any = None,
    trainer: Any = None,
    *,
    keys: Mapping[str, str | None] | None = None,
    transpose: Iterable[str] = (),
) -> None:
    """Write the arrays of `model` to the safetensors file `path`, with what `optimizer` and `trainer` remember.

    The file is written beside `path`, flushed to the disk and renamed: whatever happens, `path` is the old file
    or the new one. It keeps the rights of the old one, and a link stays one. Settings of the layers, the versions
    of the libraries and a digest of everything stand in its metadata, which
    `safetensors.safe_open(path, "np").metadata()` returns.

    Parameters
    ----------
    path : str or Path
    model : object with params
    optimizer, trainer : objects or None
        Of an optimizer its public attributes, as far as they are numbers, strings, arrays or lists of these.
    keys : dict of name in the file to name in the model, or None
        Renames arrays, as for `load`.
    transpose : iterable of names in the file
        Arrays to be saved transposed.

    Raises
    ------
    OSError
        If the file cannot be written, for example to a full disk.
    ValueError
        If `keys` or `transpose` name what is not there, or two arrays of a layer have one name.
    TypeError
        If `keys` is not a dict of names, or `transpose` not an iterable of names; a single string is none.
    """
    path = Path(path)
    arrays, others = remembered(model)
    tensors = _as_in_file(path, arrays, keys, transpose)
    state = _pack({name: getattr(*place) for name, place in others.items()}, "state", tensors, model)
    told: dict[str, Any] = {"model": {"settings": _settings(model), "state": state}}
    if optimizer is not None:
        settings = _pack(_described(optimizer), "optimizer", tensors, model)
        told["optimizer"] = {"class": type(optimizer).__name__, "settings": settings}
    if trainer is not None:
        told["trainer"] = _pack(trainer.state(), "trainer", tensors, model)
    libraries = {"python": platform.python_version(), "numpy": numpy.__version__, np.__name__: np.__version__}
    told["versions"] = {"nnx": __version__, **libraries}
    metadata = {f"nnx.{kind}": json.dumps(words) for kind, words in told.items()}
    storage.write(path, {name: to_cpu(a) for name, a in tensors.items()}, metadata)


def load(
    path: str | Path,
    model: Any,
    optimizer: Any = None,
    trainer: Any = None,
    *,
    keys: Mapping[str, str | None] | None = None,
    transpose: Iterable[str] = (),
) -> None:
    """Read the safetensors file `path` into the arrays of `model`, and into `optimizer` and `trainer`.

    The arrays stay the objects that they are. Files of others, which have no digest, load as well; the
    parameters of `torch.nn.Linear`, for example, into an Affine::

        load(path, model, keys={"0.weight": "layers.0.W", "0.bias": "layers.0.b"}, transpose=["0.weight"])

    Parameters
    ----------
    path : str or Path
    model : object with params
    optimizer, trainer : objects or None
        To go on as those did that were saved; what is not asked for stays unread.
    keys : dict of name in the file to name in the model, or None
        For names that differ. None in place of the model's name leaves an array of the file out.
    transpose : iterable of names in the file
        Arrays that lie there transposed.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged, or does not fit: the error lists every difference. Nothing has been changed.
    TypeError
        For `keys` or `transpose`, as `save`.
    """
    path = Path(path)
    with storage.opened(path) as file:
        told = {kind: _parsed(path, kind, file.metadata) for kind in _NEEDED if f"nnx.{kind}" in file.metadata}
        unpack = _Unpacker(path, file, model)
        arrays, others = remembered(model)
        targets = _as_in_file(path, arrays, keys, transpose)
        state = unpack(told["model"]["state"], asarray) if "model" in told else {}
        left = {name for name, own in (keys or {}).items() if own is None}
        differences = _differences(file, targets, left | unpack.names)
        plan: list[tuple[Any, str, Any]] = []  # object, attribute, its new value
        if "model" in told:
            differences += compare("", {name: getattr(*place) for name, place in others.items()}, state)
            plan += [(*place, state.get(name)) for name, place in others.items()]
        for kind, receiver in (("optimizer", optimizer), ("trainer", trainer)):
            if receiver is not None and kind not in told:
                differences.append(f"{kind}: wanted, but not in the file")
        if optimizer is not None and "optimizer" in told:
            settings = unpack(told["optimizer"]["settings"], asarray)
            differences += _compare_optimizer(optimizer, told["optimizer"]["class"], settings)
            plan += [(optimizer, name, value) for name, value in settings.items()]
        if trainer is not None and "trainer" in told:
            progress = {  # callbacks may hold arrays of the model's kind, all else lives on the host
                name: unpack(v, asarray if name == "callbacks" else numpy.asarray)
                for name, v in told["trainer"].items()
            }
            differences += compare("trainer", trainer.state(), progress)
        if differences:
            raise ValueError("\n  ".join([f"{path} does not fit, and nothing was loaded:", *differences]))
        values = {name: np.asarray(file.read(name)) for name in targets}
    restore = trainer.restoring(path, progress) if trainer is not None else None
    for name, array in targets.items():
        array[...] = values[name]
    for receiver, name, value in plan:
        setattr(receiver, name, value)
    if restore is not None:
        restore()


def remembered(model: Any) -> tuple[dict[str, Array], dict[str, tuple[Any, str]]]:
    """Return the arrays of `model` by name, and where its other state is: an object and an attribute by name."""
    if not hasattr(model, "params"):
        raise TypeError(f"checkpoint: expected a model, an object with params, got {type(model).__name__}")
    arrays: dict[str, Array] = {}
    others: dict[str, tuple[Any, str]] = {}
    known: set[Any] = set()

    def put(layer: Any, name: str, array: Array) -> None:
        if name in arrays:
            raise ValueError(
                f"{type(layer).__name__}: two arrays are called {name}; param_names and state_names must all differ"
            )
        arrays[name] = array

    for path, layer in _walk(model, "", set()):
        names = attribute_names(layer, "param_names")
        for i, p in enumerate(layer.params):
            place, flipped = places(p) if p.size else (id(p), None)
            if place not in known:
                put(layer, path + (names[i] if i < len(names) else f"params.{i}"), p)
            known |= {place, flipped}
        for name in attribute_names(layer, "state_names"):
            if isinstance(getattr(layer, name), Array):
                put(layer, path + name, getattr(layer, name))
            else:
                others[path + name] = layer, name
    return arrays, others


def name_list(what: str, names: Any) -> list[str]:
    """Return the strings in `names`, any iterable of them, as a list; `what` opens the message of a TypeError."""
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = list(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(f"{what} must be a list of names, such as ['W', 'b'], got {names!r}")


def attribute_names(holder: Any, attribute: str) -> list[str]:
    """Return the names in the attribute `param_names` or `state_names` of a layer or callback, which may lack it."""
    names = getattr(holder, attribute, ())
    what = f"{type(holder).__name__}.{attribute}"
    if isinstance(names, Iterator):  # every save reads it
        raise TypeError(f"{what} must be a list of names, such as ['W', 'b'], got an iterator, which can be read once")
    return name_list(what, names)


def compare(where: str, mine: Any, saved: Any) -> list[str]:
    """Return in words how `saved` differs from `mine` in names and kinds; the numbers may differ, and None fits all."""
    if isinstance(mine, dict) and isinstance(saved, dict):
        path = f"{where}." if where else ""
        return [
            *(f"{path}{name}: in the file, but not here" for name in saved if name not in mine),
            *(f"{path}{name}: here, but not in the file" for name in mine if name not in saved),
            *(line for name in mine if name in saved for line in compare(path + name, mine[name], saved[name])),
        ]
    if mine is None or saved is None or _kind(mine) == _kind(saved):
        return []
    return [f"{where}: {_kind(mine)} here, {_kind(saved)} in the file"]


def position(path: Path) -> tuple[int, int]:
    """Return the epochs and the steps after them in the name of a Checkpoint callback's file; (-1, -1) for others."""
    match = _NUMBERED.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def numbered(folder: Path) -> list[Path]:
    """Return the numbered files of a Checkpoint callback in `folder`, in their order."""
    return sorted((p for p in folder.iterdir() if position(p) >= (0, 0)), key=position)


def newest(folder: str | Path) -> Path:
    """Return the newest whole one of the numbered files in `folder`.

    A damaged one gets the ending `.damaged`, with a warning.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    for path in reversed(numbered(Path(folder))):
        try:
            with storage.opened(path):
                return path
        except ValueError as error:
            path.replace(f"{path}.damaged")
            storage.warn(f"{error}; set aside as {path.name}.damaged")
    raise FileNotFoundError(f"{folder}: no checkpoint in it that is whole")


def _is_plain(value: Any) -> bool:
    """Return whether `value` can be saved: None, a number, a string, an array, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | numpy.generic | numpy.ndarray | Array)


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield with their paths the layers that attributes of one hold, alone or in lists and dicts, and then itself."""
    several = isinstance(value, dict | list | tuple)
    if id(value) in seen or not (several or not path or (hasattr(value, "forward") and hasattr(value, "params"))):
        return
    seen.add(id(value))
    inside = value if isinstance(value, dict) else dict(enumerate(value)) if several else getattr(value, "__dict__", {})
    for name, inner in inside.items():
        yield from _walk(inner, f"{path}{name}.", seen)
    if not several:
        yield path, value


def _settings(model: Any) -> dict[str, Any]:
    """Return class and numbers of every layer, for the people who look into a file."""
    return {
        path.removesuffix("."): {"class": type(layer).__name__}
        | {n: v for n, v in getattr(layer, "__dict__", {}).items() if isinstance(v, bool | int | float | str)}
        for path, layer in _walk(model, "", set())
    }


def _described(optimizer: Any) -> dict[str, Any]:
    """Return what an optimizer remembers: its public attributes, those that can be saved."""
    return {n: v for n, v in vars(optimizer).items() if not n.startswith("_") and _is_plain(v)}


def _compare_optimizer(optimizer: Any, name: str, settings: dict[str, Any]) -> list[str]:
    if name != type(optimizer).__name__:
        return [f"optimizer: {type(optimizer).__name__} here, {name} in the file"]
    lines = compare("optimizer", _described(optimizer), settings)
    if not lines:  # so that lists are lists
        shapes = {n: [getattr(a, "shape", None) for a in v] for n, v in settings.items() if isinstance(v, list)}
        for state in getattr(optimizer, "_slots", ()):
            if shapes.get(state) != shapes.get("params", []):
                lines.append(f"optimizer.{state}: not of the shapes of its parameters")
    return lines


def _differences(file: storage.Reader, arrays: Mapping[str, Array], left: Collection[str]) -> list[str]:
    """Return in words how the arrays of `file` differ from those of the model, both by their names in the file."""
    lines = []
    for name in file.arrays:
        if name not in arrays and name not in left and not (file.own and name.startswith(("optimizer.", "trainer."))):
            lines.append(f"{name}: in the file, but not in the model")
    for name, array in arrays.items():
        mine, entry = (array.dtype.name, array.shape), file.arrays.get(name)
        if entry is None:
            lines.append(f"{name}: in the model, but not in the file")
        elif entry != mine:
            lines.append(f"{name}: {mine[0]} {mine[1]} in the model, {entry[0]} {entry[1]} in the file")
        elif not getattr(array.flags, "writeable", True):  # which CuPy's arrays all are
            lines.append(f"{name}: read-only in the model")
    return lines


def _as_in_file(
    path: Path, arrays: Mapping[str, Array], keys: Mapping[str, str | None] | None, transpose: Iterable[str]
) -> dict[str, Array]:
    """Return the model's arrays under the names, and turned as, they have in the file."""
    keys = {} if keys is None else keys
    if not isinstance(keys, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str | None) for k, v in keys.items()
    ):
        raise TypeError(f"{path}: keys must be a dict of names in the file to names in the model or None, got {keys!r}")
    transpose = name_list(f"{path}: transpose", transpose)
    in_file = {own: name for name, own in keys.items() if own is not None}
    if len(in_file) + [*keys.values()].count(None) < len(keys):
        raise ValueError(f"{path}: keys gives an array of the model several names in the file")
    if unknown := in_file.keys() - arrays.keys():
        raise ValueError(f"{path}: keys names {_listed(unknown)}, and the model has {_listed(arrays)}")
    named = {in_file.get(own, own): array for own, array in arrays.items()}
    if len(named) < len(arrays):
        raise ValueError(f"{path}: keys gives several arrays of the model one name in the file")
    if unknown := set(transpose) - named.keys():
        raise ValueError(f"{path}: transpose names {_listed(unknown)}, and the file has {_listed(named)}")
    return {name: array.T if name in transpose else array for name, array in named.items()}


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"


def _kind(value: Any) -> str:
    """Say what `value` is, as far as another value must be alike."""
    if isinstance(value, numpy.generic):
        value = value.item()  # as `_pack` saves it
    if isinstance(value, Array | numpy.ndarray):
        return f"an array of {value.dtype.name} with {value.ndim} axes"
    kinds = {str: "a string", list: "a list", tuple: "a list", dict: "a dict", int: "a number", float: "a number"}
    return next((word for kind, word in kinds.items() if isinstance(value, kind)), type(value).__name__)


def _pack(value: Any, name: str, tensors: dict[str, Any], model: Any) -> Any:
    """Return `value` as JSON knows it; its arrays go to `tensors` under names that begin with `name`."""
    if isinstance(value, dict):
        return {key: _pack(v, f"{name}.{key}", tensors, model) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{name}.{i}", tensors, model) for i, v in enumerate(value)]
    if isinstance(value, numpy.generic):
        return value.item()
    if not _is_plain(value):
        raise TypeError(f"{name} cannot be saved: expected a number, a string, an array or a list, got {value!r}")
    if not isinstance(value, Array | numpy.ndarray):
        return value
    for i, p in enumerate(model.params):
        if p is value:
            return {"param": i}
    tensors[name] = value
    return {"tensor": name}


class _Unpacker:
    """What undoes `_pack`, for a file that anybody may have written."""

    def __init__(self, path: Path, file: storage.Reader, model: Any) -> None:
        self.path, self.file, self.model = path, file, model
        self.names: set[str] = set()  # of the arrays that were asked for

    def __call__(self, value: Any, convert: Callable[[Any], Any] = numpy.asarray) -> Any:
        if isinstance(value, list):
            return [self(v, convert) for v in value]
        if not isinstance(value, dict):
            return value
        name, index = value.get("tensor"), value.get("param")
        if value.keys() == {"tensor"} and isinstance(name, str) and name in self.file.arrays:
            self.names.add(name)
            try:
                return convert(self.file.read(name))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.path}: {name} is no array to be remembered ({error})") from error
        if value.keys() == {"param"} and isinstance(index, int) and 0 <= index < len(self.model.params):
            return self.model.params[index]
        if value.keys() in ({"tensor"}, {"param"}):
            raise ValueError(f"{self.path}: it refers to an array {value} that is neither in it nor in the model")
        return {key: self(v, convert) for key, v in value.items()}


def _parsed(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the metadata say of a model, an optimizer or a trainer."""
    try:
        told = json.loads(metadata[f"nnx.{kind}"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata of the {kind} are not JSON ({error})") from error
    if not isinstance(told, dict) or not all(isinstance(told.get(n), t) for n, t in _NEEDED[kind].items()):
        raise ValueError(f"{path}: its metadata of the {kind} lack {_listed(_NEEDED[kind])}")
    return told
