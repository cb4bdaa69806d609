"""Models, optimizers and trainers in safetensors files: saved whole, loaded all or nothing.

An array has a name that says where it lies in the model: `layers.0.W` is the array that the first layer calls W
(`param_names`, a class attribute), `params.0` one without a name. One that several layers share is saved
once. What else a layer or a callback must remember it names in `state_names`.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy

from nnx import storage
from nnx._version import __version__
from nnx.device import asarray, to_cpu
from nnx.np import Array, np
from nnx.tree import name_list, named_layers, named_state

__all__ = ["latest_checkpoint", "load", "save"]

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
    arrays, extra_state = named_state(model)
    tensors = rename_arrays(path, arrays, keys, transpose)
    state = _pack({name: getattr(*place) for name, place in extra_state.items()}, "state", tensors, model)
    metadata_of: dict[str, Any] = {"model": {"settings": layer_config(model), "state": state}}
    if optimizer is not None:
        settings = _pack(optimizer_state(optimizer), "optimizer", tensors, model)
        metadata_of["optimizer"] = {"class": type(optimizer).__name__, "settings": settings}
    if trainer is not None:
        metadata_of["trainer"] = _pack(trainer.state_dict(), "trainer", tensors, model)
    libraries = {"python": platform.python_version(), "numpy": numpy.__version__, np.__name__: np.__version__}
    metadata_of["versions"] = {"nnx": __version__, **libraries}
    metadata = {f"nnx.{kind}": json.dumps(words) for kind, words in metadata_of.items()}
    storage.atomic_save(path, {name: to_cpu(a) for name, a in tensors.items()}, metadata)


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

    The arrays stay the objects that they are. Files of extra_state, which have no digest, load as well; the
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
    with storage.open_checked(path) as file:
        metadata_of = {
            kind: _load_metadata(path, kind, file.metadata) for kind in _NEEDED if f"nnx.{kind}" in file.metadata
        }
        unpack = _Unpacker(path, file, model)
        arrays, extra_state = named_state(model)
        targets = rename_arrays(path, arrays, keys, transpose)
        state = unpack(metadata_of["model"]["state"], asarray) if "model" in metadata_of else {}
        left = {name for name, own in (keys or {}).items() if own is None}
        differences = array_mismatches(file, targets, left | unpack.names)
        plan: list[tuple[Any, str, Any]] = []  # object, attribute, its new value
        if "model" in metadata_of:
            differences += structure_mismatches(
                "", {name: getattr(*place) for name, place in extra_state.items()}, state
            )
            plan += [(*place, state.get(name)) for name, place in extra_state.items()]
        for kind, receiver in (("optimizer", optimizer), ("trainer", trainer)):
            if receiver is not None and kind not in metadata_of:
                differences.append(f"{kind}: wanted, but not in the file")
        if optimizer is not None and "optimizer" in metadata_of:
            settings = unpack(metadata_of["optimizer"]["settings"], asarray)
            differences += _compare_optimizer(optimizer, metadata_of["optimizer"]["class"], settings)
            plan += [(optimizer, name, value) for name, value in settings.items()]
        if trainer is not None and "trainer" in metadata_of:
            progress = {  # callbacks may hold arrays of the model's kind, all else lives on the host
                name: unpack(v, asarray if name == "callbacks" else numpy.asarray)
                for name, v in metadata_of["trainer"].items()
            }
            differences += structure_mismatches("trainer", trainer.state_dict(), progress)
        if differences:
            raise ValueError("\n  ".join([f"{path} does not fit, and nothing was loaded:", *differences]))
        values = {name: np.asarray(file.read(name)) for name in targets}
    restore = trainer.load_state_dict(path, progress) if trainer is not None else None
    for name, array in targets.items():
        array[...] = values[name]
    for receiver, name, value in plan:
        setattr(receiver, name, value)
    if restore is not None:
        restore()


def structure_mismatches(where: str, mine: Any, saved: Any) -> list[str]:
    """Return in words how `saved` differs from `mine` in names and kinds; the numbers may differ, and None fits all."""
    if isinstance(mine, dict) and isinstance(saved, dict):
        path = f"{where}." if where else ""
        return [
            *(f"{path}{name}: in the file, but not here" for name in saved if name not in mine),
            *(f"{path}{name}: here, but not in the file" for name in mine if name not in saved),
            *(
                line
                for name in mine
                if name in saved
                for line in structure_mismatches(path + name, mine[name], saved[name])
            ),
        ]
    if mine is None or saved is None or _describe(mine) == _describe(saved):
        return []
    return [f"{where}: {_describe(mine)} here, {_describe(saved)} in the file"]


def parse_filename(path: Path) -> tuple[int, int]:
    """Return the epochs and the steps after them in the name of a Checkpoint callback's file; (-1, -1) for others."""
    match = _NUMBERED.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the list_checkpoints files of a Checkpoint callback in `folder`, in their order."""
    return sorted((p for p in folder.iterdir() if parse_filename(p) >= (0, 0)), key=parse_filename)


def latest_checkpoint(folder: str | Path) -> Path:
    """Return the latest_checkpoint whole one of the list_checkpoints files in `folder`.

    A damaged one gets the ending `.damaged`, with a warning.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    for path in reversed(list_checkpoints(Path(folder))):
        try:
            with storage.open_checked(path):
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


def layer_config(model: Any) -> dict[str, Any]:
    """Return class and numbers of every layer, for the people who look into a file."""
    return {
        path.removesuffix("."): {"class": type(layer).__name__}
        | {n: v for n, v in getattr(layer, "__dict__", {}).items() if isinstance(v, bool | int | float | str)}
        for path, layer in named_layers(model, "", set())
    }


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return what an optimizer remembers: its public attributes, those that can be saved."""
    return {n: v for n, v in vars(optimizer).items() if not n.startswith("_") and _is_plain(v)}


def _compare_optimizer(optimizer: Any, name: str, settings: dict[str, Any]) -> list[str]:
    if name != type(optimizer).__name__:
        return [f"optimizer: {type(optimizer).__name__} here, {name} in the file"]
    lines = structure_mismatches("optimizer", optimizer_state(optimizer), settings)
    if not lines:  # so that lists are lists
        shapes = {n: [getattr(a, "shape", None) for a in v] for n, v in settings.items() if isinstance(v, list)}
        for state in getattr(optimizer, "_slots", ()):
            if shapes.get(state) != shapes.get("params", []):
                lines.append(f"optimizer.{state}: not of the shapes of its parameters")
    return lines


def array_mismatches(file: storage.Reader, arrays: Mapping[str, Array], left: Collection[str]) -> list[str]:
    """Return in words how the arrays of `file` differ from those of the model, both by their names in the file."""
    lines = []
    for name in file.arrays:
        if (
            name not in arrays
            and name not in left
            and not (file.has_digest and name.startswith(("optimizer.", "trainer.")))
        ):
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


def rename_arrays(
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
        raise ValueError(f"{path}: keys names {_join(unknown)}, and the model has {_join(arrays)}")
    named = {in_file.get(own, own): array for own, array in arrays.items()}
    if len(named) < len(arrays):
        raise ValueError(f"{path}: keys gives several arrays of the model one name in the file")
    if unknown := set(transpose) - named.keys():
        raise ValueError(f"{path}: transpose names {_join(unknown)}, and the file has {_join(named)}")
    return {name: array.T if name in transpose else array for name, array in named.items()}


def _join(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"


def _describe(value: Any) -> str:
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
                raise ValueError(f"{self.path}: {name} is no array to be named_state ({error})") from error
        if value.keys() == {"param"} and isinstance(index, int) and 0 <= index < len(self.model.params):
            return self.model.params[index]
        if value.keys() in ({"tensor"}, {"param"}):
            raise ValueError(f"{self.path}: it refers to an array {value} that is neither in it nor in the model")
        return {key: self(v, convert) for key, v in value.items()}


def _load_metadata(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the metadata say of a model, an optimizer or a trainer."""
    try:
        metadata_of = json.loads(metadata[f"nnx.{kind}"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata of the {kind} are not JSON ({error})") from error
    if not isinstance(metadata_of, dict) or not all(
        isinstance(metadata_of.get(n), t) for n, t in _NEEDED[kind].items()
    ):
        raise ValueError(f"{path}: its metadata of the {kind} lack {_join(_NEEDED[kind])}")
    return metadata_of
