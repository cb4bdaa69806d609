"""Save and load models, optimizers and trainers in safetensors files, each completely or not at all.

The name of an array gives its path in the model: `layers.0.W` is the array that the first layer calls W
(`param_names`, a class attribute), `params.0` one without a name. An array shared by several layers is saved
once. Layers and callbacks list further state in `state_names`.
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

_NEEDED: dict[str, dict[str, type]] = {  # required keys of the metadata
    "model": {"state": dict},
    "optimizer": {"class": str, "settings": dict},
    "trainer": {},
}
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
    """Save the arrays of `model`, and the state of `optimizer` and `trainer`, to the safetensors file `path`.

    The file is written next to `path`, flushed to the disk and renamed, so that `path` is always either the complete
    old file or the complete new one. Permissions of the old file and symbolic links are kept. The metadata, which
    `safetensors.safe_open(path, "np").metadata()` returns, hold the settings of the layers, the versions of the
    libraries and a digest of everything.

    Parameters
    ----------
    path : str or Path
    model : object with params
    optimizer, trainer : objects or None
        Of an optimizer, the public attributes that are numbers, strings, arrays or lists of these are saved.
    keys : dict of name in the file to name in the model, or None
        Renames arrays, as in `load`.
    transpose : iterable of names in the file
        Arrays to save transposed.

    Raises
    ------
    OSError
        If the file cannot be written, for example to a full disk.
    ValueError
        If `keys` or `transpose` contain unknown names, or two arrays of a layer have the same name.
    TypeError
        If `keys` is not a dict of names, or `transpose` not an iterable of names; a single string is refused.
    """
    path = Path(path).expanduser()
    arrays, extra_state = named_state(model)
    tensors = rename_arrays(path, arrays, keys, transpose)
    state = _pack({name: getattr(*item) for name, item in extra_state.items()}, "state", tensors, model)
    metadata_of: dict[str, Any] = {"model": {"settings": layer_config(model), "state": state}}
    if optimizer is not None:
        settings = _pack(optimizer_state(optimizer), "optimizer", tensors, model)
        metadata_of["optimizer"] = {"class": type(optimizer).__name__, "settings": settings}
    if trainer is not None:
        metadata_of["trainer"] = _pack(trainer.state_dict(), "trainer", tensors, model)
    libraries = {"python": platform.python_version(), "numpy": numpy.__version__, np.__name__: np.__version__}
    metadata_of["versions"] = {"nnx": __version__, **libraries}
    metadata = {f"nnx.{kind}": json.dumps(value) for kind, value in metadata_of.items()}
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
    """Load the safetensors file `path` into the arrays of `model`, and into `optimizer` and `trainer`.

    The arrays are written in place. Files from other libraries, which have no digest, can be loaded as well, for
    example the parameters of `torch.nn.Linear` into an Affine::

        load(path, model, keys={"0.weight": "layers.0.W", "0.bias": "layers.0.b"}, transpose=["0.weight"])

    Parameters
    ----------
    path : str or Path
    model : object with params
    optimizer, trainer : objects or None
        Restored to their saved state. None ignores the corresponding part of the file.
    keys : dict of name in the file to name in the model, or None
        For names that differ. None in place of the model's name ignores that array of the file.
    transpose : iterable of names in the file
        Arrays stored transposed in the file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is damaged or does not match the objects; the message lists all differences. Nothing is changed.
    TypeError
        For `keys` or `transpose`, as in `save`.
    """
    path = Path(path).expanduser()
    with storage.open_checked(path) as file:
        metadata_of = {
            kind: _load_metadata(path, kind, file.metadata) for kind in _NEEDED if f"nnx.{kind}" in file.metadata
        }
        unpack = _Unpacker(path, file, model)
        arrays, extra_state = named_state(model)
        targets = rename_arrays(path, arrays, keys, transpose)
        state = unpack(metadata_of["model"]["state"], asarray) if "model" in metadata_of else {}
        ignored = {name for name, model_name in (keys or {}).items() if model_name is None}
        differences = array_mismatches(file, targets, ignored | unpack.names)
        plan: list[tuple[Any, str, Any]] = []  # object, attribute, its new value
        if "model" in metadata_of:
            differences += structure_mismatches("", {name: getattr(*item) for name, item in extra_state.items()}, state)
            plan += [(*item, state.get(name)) for name, item in extra_state.items()]
        for kind, receiver in (("optimizer", optimizer), ("trainer", trainer)):
            if receiver is not None and kind not in metadata_of:
                differences.append(f"{kind}: requested, but not in the file")
        if optimizer is not None and "optimizer" in metadata_of:
            settings = unpack(metadata_of["optimizer"]["settings"], asarray)
            differences += _compare_optimizer(optimizer, metadata_of["optimizer"]["class"], settings)
            plan += [(optimizer, name, value) for name, value in settings.items()]
        if trainer is not None and "trainer" in metadata_of:
            progress = {  # callbacks may hold arrays on the device; all other state is on the host
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


def structure_mismatches(where: str, current: Any, saved: Any) -> list[str]:
    """Describe how `saved` differs from `current` in names and types; values may differ, and None matches any type."""
    if isinstance(current, dict) and isinstance(saved, dict):
        path = f"{where}." if where else ""
        return [
            *(f"{path}{name}: in the file, but not here" for name in saved if name not in current),
            *(f"{path}{name}: here, but not in the file" for name in current if name not in saved),
            *(
                line
                for name in current
                if name in saved
                for line in structure_mismatches(path + name, current[name], saved[name])
            ),
        ]
    if current is None or saved is None or _describe(current) == _describe(saved):
        return []
    return [f"{where}: {_describe(current)} here, {_describe(saved)} in the file"]


def parse_filename(path: Path) -> tuple[int, int]:
    """Return the epoch and step in the name of a Checkpoint callback's file; (-1, -1) for other names."""
    match = _NUMBERED.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the files of a Checkpoint callback in `folder`, oldest first."""
    return sorted((p for p in folder.iterdir() if parse_filename(p) >= (0, 0)), key=parse_filename)


def latest_checkpoint(folder: str | Path) -> Path:
    """Return the path of the latest intact checkpoint in `folder`.

    Damaged files are renamed to end in `.damaged`, with a warning; files that cannot be read are skipped.

    Raises
    ------
    FileNotFoundError
        If there is no intact checkpoint.
    """
    for path in reversed(list_checkpoints(Path(folder).expanduser())):
        try:
            with storage.open_checked(path):
                return path
        except ValueError as error:
            _set_aside(path, error)
        except OSError:  # not readable, or another process has removed it
            continue
    raise FileNotFoundError(f"{folder}: no intact checkpoint found")


def _set_aside(path: Path, error: ValueError) -> None:
    try:
        path.replace(f"{path}.damaged")
    except OSError as refused:
        storage.warn(f"{error}; skipped, and not renamed: {refused}")
    else:
        storage.warn(f"{error}; set aside as {path.name}.damaged")


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
    elif not _is_plain(value):
        raise TypeError(f"{name} cannot be saved: expected a number, a string, an array or a list, got {value!r}")


def _is_plain(value: Any) -> bool:
    """Return whether `value` can be saved: None, a number, a string, an array, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | numpy.generic | numpy.ndarray | Array)


def layer_config(model: Any) -> dict[str, Any]:
    """Return the class and the plain settings of every layer, for users who inspect a file."""
    return {
        path.removesuffix("."): {"class": type(layer).__name__}
        | {n: v for n, v in getattr(layer, "__dict__", {}).items() if isinstance(v, bool | int | float | str)}
        for path, layer in named_layers(model, "", set())
    }


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer: its public attributes that can be saved."""
    return {n: v for n, v in vars(optimizer).items() if not n.startswith("_") and _is_plain(v)}


def _compare_optimizer(optimizer: Any, name: str, settings: dict[str, Any]) -> list[str]:
    if name != type(optimizer).__name__:
        return [f"optimizer: {type(optimizer).__name__} here, {name} in the file"]
    lines = structure_mismatches("optimizer", optimizer_state(optimizer), settings)
    if not lines:  # the types match, so that slots are lists
        shapes = {n: [getattr(a, "shape", None) for a in v] for n, v in settings.items() if isinstance(v, list)}
        for slot in getattr(optimizer, "_slots", ()):
            if shapes.get(slot) != shapes.get("params", []):
                lines.append(f"optimizer.{slot}: not of the shapes of its parameters")
    return lines


def array_mismatches(file: storage.Reader, arrays: Mapping[str, Array], ignored: Collection[str]) -> list[str]:
    """Describe how the arrays of `file` differ from those of the model; all names are those in the file."""
    lines = []
    for name in file.arrays:
        if (
            name not in arrays
            and name not in ignored
            and not (file.has_digest and name.startswith(("optimizer.", "trainer.")))
        ):
            lines.append(f"{name}: in the file, but not in the model")
    for name, array in arrays.items():
        expected, entry = (array.dtype.name, array.shape), file.arrays.get(name)
        if entry is None:
            lines.append(f"{name}: in the model, but not in the file")
        elif entry != expected:
            lines.append(f"{name}: {expected[0]} {expected[1]} in the model, {entry[0]} {entry[1]} in the file")
        elif not getattr(array.flags, "writeable", True):  # CuPy arrays have no such flag
            lines.append(f"{name}: read-only in the model")
    return lines


def rename_arrays(
    path: Path, arrays: Mapping[str, Array], keys: Mapping[str, str | None] | None, transpose: Iterable[str]
) -> dict[str, Array]:
    """Return the model's arrays by their names in the file, transposed where the file has them transposed."""
    keys = {} if keys is None else keys
    if not isinstance(keys, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str | None) for k, v in keys.items()
    ):
        raise TypeError(f"{path}: keys must be a dict of names in the file to names in the model or None, got {keys!r}")
    transpose = name_list(f"{path}: transpose", transpose)
    file_names = {model_name: name for name, model_name in keys.items() if model_name is not None}
    if len(file_names) + [*keys.values()].count(None) < len(keys):
        raise ValueError(f"{path}: keys gives an array of the model several names in the file")
    if unknown := file_names.keys() - arrays.keys():
        raise ValueError(f"{path}: keys names {_join(unknown)}, and the model has {_join(arrays)}")
    named = {file_names.get(model_name, model_name): array for model_name, array in arrays.items()}
    if len(named) < len(arrays):
        raise ValueError(f"{path}: keys gives several arrays of the model the same name in the file")
    if unknown := set(transpose) - named.keys():
        raise ValueError(f"{path}: transpose names {_join(unknown)}, and the file has {_join(named)}")
    return {name: array.T if name in transpose else array for name, array in named.items()}


def _join(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"


def _describe(value: Any) -> str:
    """Describe the type of `value`; values with equal descriptions are compatible."""
    if isinstance(value, numpy.generic):
        value = value.item()  # as in `_pack`
    if isinstance(value, Array | numpy.ndarray):
        return f"an array of {value.dtype.name} with {value.ndim} axes"
    names = {str: "a string", list: "a list", tuple: "a list", dict: "a dict", int: "a number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def _pack(value: Any, name: str, tensors: dict[str, Any], model: Any) -> Any:
    """Return `value` as JSON-serializable data; its arrays are added to `tensors` with names prefixed by `name`."""
    if isinstance(value, dict):
        check_savable(name, value)
        return {key: _pack(v, f"{name}.{key}", tensors, model) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{name}.{i}", tensors, model) for i, v in enumerate(value)]
    if isinstance(value, numpy.generic):
        return value.item()
    check_savable(name, value)
    if not isinstance(value, Array | numpy.ndarray):
        return value
    for i, p in enumerate(model.params):
        if p is value:
            return {"param": i}
    tensors[name] = value
    return {"tensor": name}


class _Unpacker:
    """The inverse of `_pack`, for untrusted files."""

    def __init__(self, path: Path, file: storage.Reader, model: Any) -> None:
        self.path, self.file, self.model = path, file, model
        self.names: set[str] = set()  # of the arrays read so far

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
                raise ValueError(f"{self.path}: array {name} cannot be restored ({error})") from error
        if value.keys() == {"param"} and isinstance(index, int) and 0 <= index < len(self.model.params):
            return self.model.params[index]
        if value.keys() in ({"tensor"}, {"param"}):
            raise ValueError(f"{self.path}: it refers to an array {value} that is in neither the file nor the model")
        return {key: self(v, convert) for key, v in value.items()}


def _load_metadata(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the parsed metadata of `kind`: model, optimizer or trainer."""
    try:
        parsed = json.loads(metadata[f"nnx.{kind}"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the {kind} metadata is not valid JSON ({error})") from error
    if not isinstance(parsed, dict) or not all(isinstance(parsed.get(n), t) for n, t in _NEEDED[kind].items()):
        raise ValueError(f"{path}: the {kind} metadata must be a JSON object with the keys {[*_NEEDED[kind]]}")
    return parsed
