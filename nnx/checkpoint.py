"""Save and load models, optimizers and trainers in safetensors files, each completely or not at all.

The name of an array gives its path in the model: `layers.0.W` is the array that the first layer calls W
(`param_names`, a class attribute), `params.0` one without a name. An array shared by several layers is saved
once. Layers and callbacks list further state in `state_names`; see `nnx.tree`.

The metadata of a file hold the number of its format, the state as JSON, in which {"$tensor": name} stands for an
array, the settings of the layers, versions, and a digest of all metadata and arrays.
"""

from __future__ import annotations

import contextlib
import functools
import json
import numbers
import os
import platform
import re
import stat
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from nnx._version import __version__
from nnx.arguments import constructor_arguments
from nnx.device import to_cpu
from nnx.np import Array, np
from nnx.tree import (
    SAVABLE_DTYPES,
    check_savable,
    is_savable,
    layer_states,
    memory_keys,
    name_list,
    named_arrays,
    named_layers,
    object_state,
    set_state,
    state_errors,
    state_mismatches,
    to_device,
)

__all__ = ["latest_checkpoint", "load", "save"]

TEMP_PREFIX = ".saving-"  # of the temporary folder next to the target of a save
_FORMAT = "2"
_MAX_METADATA = 1 << 24  # characters; parsed JSON takes many times as many bytes
_NUMBERED = re.compile(r"epoch-(\d{4,})-step-(\d{6,})\.safetensors")
_DTYPES = {  # of the files; NumPy has no others of them
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
}
# Keys of JSON objects that stand for an array of the file, one of the model, a tuple, and a NumPy scalar.
_TENSOR, _PARAM, _TUPLE, _SCALAR = "$tensor", "$param", "$tuple", "$scalar"


def save(
    path: str | Path,
    model: Any,
    optimizer: Any = None,
    trainer: Any = None,
    *,
    keys: Mapping[str, str | None] | None = None,
    transpose: Iterable[str] = (),
    layout: str | None = None,
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
    layout : "torch" or None
        In place of `keys` and `transpose`, those of `load`.

    Raises
    ------
    OSError
        If the file cannot be written, for example to a full disk, or `path` is a folder, a device or a pipe. Once the
        file has its name, a refused chmod or fsync of its folder is only a RuntimeWarning.
    ImportError
        If safetensors is not installed, as `nnx-array[checkpoint]` does.
    ValueError
        If `keys` or `transpose` contain unknown names, `layout` is unknown or has no name for an array, or two arrays
        of a layer have the same name.
    TypeError
        If `keys` is not a dict of names, or `transpose` not an iterable of names; a single string is refused.

    Examples
    --------
    >>> from nnx import Adam, checkpoint, models
    >>> model, optimizer = models.mlp([4, 8, 3], rng=0), Adam()
    >>> checkpoint.save("net.safetensors", model, optimizer)
    >>> checkpoint.load("net.safetensors", model, optimizer)
    """
    path = Path(path).expanduser()
    keys, transpose, gates = _apply_layout(path, model, layout, keys, transpose)
    tensors = rename_arrays(path, named_arrays(model), keys, transpose)
    config = json.dumps(layer_config(model, tensors))
    states = {name: state for name, (_, state) in _states(model, optimizer, trainer).items()}
    for name, state in states.items():
        check_savable(name, state)
    text = json.dumps({name: _pack(state, name, tensors, model) for name, state in states.items()})
    if (length := max(len(text), len(config))) > _MAX_METADATA:
        raise OSError(
            f"{path}: not saved: the state has {length} characters, more than {_MAX_METADATA}; keep long lists in "
            "arrays"
        )
    metadata = {
        "nnx.format": _FORMAT,
        "nnx.state": text,
        "nnx.layers": config,
        "nnx.names": json.dumps({"layout": layout} if layout else {"keys": keys or {}, "transpose": list(transpose)}),
        "nnx.versions": json.dumps(
            {
                "nnx": __version__,
                "python": platform.python_version(),
                "numpy": numpy.__version__,
                np.__name__: np.__version__,
            }
        ),
    }
    _atomic_save(path, _to_torch_gates({name: to_cpu(a) for name, a in tensors.items()}, gates), metadata)


def load(
    path: str | Path,
    model: Any,
    optimizer: Any = None,
    trainer: Any = None,
    *,
    keys: Mapping[str, str | None] | None = None,
    transpose: Iterable[str] = (),
    layout: str | None = None,
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
    layout : "torch" or None
        In place of `keys` and `transpose`, the names of a torch.nn.Sequential, "0.weight", with the same layers at the
        same positions: Linear as Affine, or MatMul without a bias, Embedding, BatchNorm1d (whose momentum is 1 minus
        that of BatchNorm), LayerNorm, RNN and LSTM of one layer (TimeRNN, TimeLSTM and TimeBiLSTM, whose order of gates
        differs; the two biases are added when they are loaded, and the second is 0 in a saved file) and their cells,
        nested Sequentials, and layers without arrays. Dropout must have the ratio 0, as PyTorch scales in training, not
        in prediction; GELU is that of approximate="tanh"; a GRU has another formula. An array that layers share has the
        name of the first.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is damaged or does not match the objects; the message lists all differences. Nothing is changed.
    TypeError
        For `keys` or `transpose`, as in `save`.
    ImportError
        If safetensors is not installed, as `nnx-array[checkpoint]` does.

    Examples
    --------
    >>> from nnx import TwoLayerNet, checkpoint
    >>> checkpoint.save("net.safetensors", TwoLayerNet(2, 10, 3, rng=0))
    >>> checkpoint.load("net.safetensors", TwoLayerNet(2, 10, 3))
    >>> checkpoint.load("net.safetensors", TwoLayerNet(2, 20, 3))
    Traceback (most recent call last):
    ValueError: net.safetensors does not fit, and nothing was loaded:
      layers.0.W: float32 (2, 20) in the model, float32 (2, 10) in the file
      layers.0.b: float32 (20,) in the model, float32 (10,) in the file
      layers.2.W: float32 (20, 3) in the model, float32 (10, 3) in the file
    """
    path = Path(path).expanduser()
    keys, transpose, gates = _apply_layout(path, model, layout, keys, transpose)
    file = _read(path)
    _from_torch_gates(file, gates)
    targets = rename_arrays(path, named_arrays(model), keys, transpose)
    ignored = {name for name, model_name in (keys or {}).items() if model_name is None}
    receivers = _states(model, optimizer, trainer)
    if not file.is_checkpoint:
        receivers = {name: receiver for name, receiver in receivers.items() if _kind(name) != "model"}
    requested = {"model", *map(_kind, receivers)}
    saved = _unpack(path, file, model, [name for name in file.states if _kind(name) in requested])
    ignored |= _move_unset_arrays(file, receivers, saved)
    differences = array_mismatches(file, targets, ignored | _references(file.states))
    differences += [f"{name}: in the file, but not here" for name in saved if name not in receivers]
    for name, (holder, state) in receivers.items():
        if name not in saved:
            differences.append(f"{name}: here, but not in the file")
        else:
            differences += state_mismatches(name, state, saved[name]) or state_errors(name, holder, saved[name])
    if differences:
        raise ValueError("\n  ".join([f"{path} does not fit, and nothing was loaded:", *differences]))
    values = {name: np.asarray(file.read(name)) for name in targets}
    states = {name: state if name == "trainer" else to_device(state) for name, state in saved.items()}
    for name, array in targets.items():
        array[...] = values[name]
    for name, (holder, _) in receivers.items():
        (holder.load_state_dict if name == "trainer" else functools.partial(set_state, holder))(states[name])


def _move_unset_arrays(file: _Reader, receivers: dict[str, Any], saved: dict[str, Any]) -> set[str]:
    """Move arrays of the file to the states of layers that have None there so far; return their names."""
    moved = set()
    for name, (_, state) in receivers.items():
        for attribute, value in state.items():
            array = f"{name}.{attribute}".removeprefix("model.")
            if value is None and _kind(name) == "model" and array in file.arrays:
                saved.setdefault(name, {})[attribute] = file.read(array)
                moved.add(array)
    return moved


def _references(value: Any) -> set[str]:
    """Return the names of the arrays to which states as JSON refer."""
    if isinstance(value, dict):
        name = value.get(_TENSOR)
        inside: Iterable[Any] = value.values()
        return {name} if isinstance(name, str) else set().union(*map(_references, inside))
    return set().union(*map(_references, value)) if isinstance(value, list) else set()


def make_filename(epoch: int, iteration: int) -> str:
    """Return the name of a Checkpoint callback's file."""
    return f"epoch-{epoch:04d}-step-{iteration:06d}.safetensors"


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

    Examples
    --------
    >>> from nnx import SGD, Trainer, TwoLayerNet, callbacks, checkpoint, spiral
    >>> trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    >>> trainer.fit(*spiral.load_data(), 3, verbose=False, callbacks=[callbacks.Checkpoint("run")])
    >>> checkpoint.latest_checkpoint("run").name
    'epoch-0003-step-000000.safetensors'
    """
    for path in reversed(list_checkpoints(Path(folder).expanduser())):
        try:
            _read(path)
            return path
        except _DamagedFileError as error:
            _set_aside(path, error)
        except OSError:  # not readable, or another process has removed it
            continue
    raise FileNotFoundError(f"{folder}: no intact checkpoint found")


def _set_aside(path: Path, error: Exception) -> None:
    try:
        path.replace(f"{path}.damaged")
    except OSError as refused:
        warn(f"{error}; skipped, and not renamed: {refused}")
    else:
        warn(f"{error}; set aside as {path.name}.damaged")


def layer_config(model: Any, tensors: Mapping[str, Array]) -> dict[str, Any]:
    """Return class, module and settings of every layer by path, from which `models.load` builds them.

    "params" are the names of its parameters in the file, with `.T` if they are transposed there; "layers" and
    "loss_layer" of a model are the paths of these, or their classes if they have no path.
    """
    names: dict[Any, str] = {}
    for name, array in tensors.items():
        key, transposed_key = memory_keys(array)
        names |= {transposed_key: f"{name}.T", key: name}  # in this order: they are equal for a vector
    layers = {path.removesuffix("."): layer for path, layer in named_layers(model)}
    paths = {id(layer): path for path, layer in layers.items()}
    config = {}
    for path, layer in layers.items():
        config[path] = {
            "class": type(layer).__name__,
            "module": type(layer).__module__,
            "params": [names.get(memory_keys(p)[0], "") for p in getattr(layer, "params", ())],
            **_plain_settings(layer),
        }
        for attribute in ("layers", "loss_layer"):
            inside = getattr(layer, attribute, None)
            if isinstance(inside, list):
                config[path][attribute] = [paths.get(id(each), type(each).__name__) for each in inside]
            elif inside is not None:
                config[path][attribute] = paths.get(id(inside), type(inside).__name__)
    return config


def _plain_settings(layer: Any) -> dict[str, Any]:
    """Return the constructor arguments that a layer has as numbers or strings; of nnx's own layers also arrays."""
    settings: dict[str, Any] = {}
    for name, value in constructor_arguments(layer).items():
        if isinstance(value, Array | numpy.ndarray) and type(layer).__module__.startswith("nnx."):
            settings[name] = to_cpu(value).tolist()
        elif isinstance(value, bool | numpy.bool_):
            settings[name] = bool(value)
        elif isinstance(value, numbers.Real):
            settings[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
        elif isinstance(value, str | None):
            settings[name] = value
    return settings


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """Return of a file of `save` the `layer_config`, the arguments for its names, and dtype and shape of each array.

    Raises
    ------
    OSError, ValueError
        As `load`, and a ValueError for a file that has no such part.
    """
    file = _read(path)
    if not file.is_checkpoint:
        raise ValueError(
            f"{path}: was not written by checkpoint.save; build the model yourself and use checkpoint.load"
        )
    try:
        names = json.loads(file.names)
        if names != {"layout": "torch"}:
            names = {"keys": dict(names["keys"]), "transpose": name_list("transpose", names["transpose"])}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path}: invalid names of arrays: {error}") from error
    return file.layers, names, file.arrays


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer: public attributes that can be saved, hyperparameters, and its `state_names`.

    Raises
    ------
    TypeError
        For an attribute that holds another optimizer, whose state would be lost.
    """
    attributes = {n: v for n, v in getattr(optimizer, "__dict__", {}).items() if not n.startswith("_")}
    listed = object_state(optimizer)
    for name, value in attributes.items():
        if hasattr(value, "update") and not is_savable(value) and not listed:
            raise TypeError(
                f"{type(optimizer).__name__}.{name}: the state of an optimizer within another is not saved; list the "
                "attributes to save in state_names"
            )
    settings = {n: getattr(optimizer, n) for n in getattr(optimizer, "_settings", ())}  # may be properties
    return {n: v for n, v in attributes.items() if is_savable(v)} | settings | listed


def _states(model: Any, optimizer: Any, trainer: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return (object, its state) by name, for everything that has one beside the arrays of the model."""
    states = {f"model.{path}".removesuffix("."): item for path, item in layer_states(model).items()}
    if optimizer is not None:  # under the name of its class, so that another class does not fit
        states[f"optimizer.{type(optimizer).__name__}"] = optimizer, optimizer_state(optimizer)
    if trainer is not None:
        states["trainer"] = trainer, trainer.state_dict()
    return states


def _kind(name: str) -> str:
    """Return what the state `name` is of: "model", "optimizer" or "trainer"."""
    return name.partition(".")[0]


def array_mismatches(file: _Reader, arrays: Mapping[str, Array], ignored: Collection[str]) -> list[str]:
    """Describe how the arrays of `file` differ from those of the model; all names are those in the file."""
    lines = []
    for name in file.arrays:
        if name not in arrays and name not in ignored:
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


def _apply_layout(
    path: Path, model: Any, layout: str | None, keys: Mapping[str, str | None] | None, transpose: Iterable[str]
) -> tuple[Mapping[str, str | None] | None, Iterable[str], dict[str, Sequence[int]]]:
    """Return `keys` and `transpose`, or those of `layout`, and the orders of gates by names in the file."""
    if layout is None:
        return keys, transpose, {}
    if layout != "torch" or keys is not None or list(transpose):
        raise ValueError(f'{path}: layout must be "torch" or None, and takes no keys and transpose; got {layout!r:.80}')
    return _torch_layout(path, model)


def _torch_layout(path: Path, model: Any) -> tuple[dict[str, str | None], list[str], dict[str, Sequence[int]]]:
    """Return `keys`, `transpose` and the orders of gates for the names of a torch.nn.Sequential."""
    keys: dict[str, str | None] = {}
    names: dict[str, tuple[str, bool, Sequence[int]]] = {}  # of the arrays; a layer replaces those of layers within
    arrays = named_arrays(model)
    for place, layer in named_layers(model):
        if getattr(layer, "dropout_ratio", 0):
            raise ValueError(f'{path}: {place}: PyTorch scales dropout otherwise; use layout="torch" with Dropout(0.0)')
        if difference := getattr(layer, "torch_difference", ""):
            raise ValueError(f'{path}: {place}: {difference}; layout="torch" has no {type(layer).__name__}')
        module = ".".join(part for part in place.split(".") if part != "layers")
        for array, torch_name in getattr(layer, "torch_names", {}).items():
            name = f"{module}{(torch_name or array).removesuffix('.T')}"
            if torch_name is None:
                keys[name] = None
            elif place + array in arrays:
                names[place + array] = name, torch_name.endswith(".T"), getattr(layer, "torch_gates", ())
    if unknown := arrays.keys() - names.keys():
        raise ValueError(f'{path}: {_join(unknown)} has no name in the layout "torch"; pass keys')
    keys |= {name: array for array, (name, _, _) in names.items()}
    return keys, [n for n, transposed, _ in names.values() if transposed], {n: g for n, _, g in names.values() if g}


def _to_torch_gates(arrays: dict[str, numpy.ndarray], gates: Mapping[str, Sequence[int]]) -> dict[str, numpy.ndarray]:
    """Return the arrays of a file with the gates of recurrent layers in PyTorch's order, and its second biases of 0."""
    ordered = {name: _reorder(arrays[name], order) for name, order in gates.items()}
    second = {name.replace("bias_ih", "bias_hh"): numpy.zeros_like(arrays[name]) for name in gates if "bias_ih" in name}
    return arrays | ordered | second


def _from_torch_gates(file: _Reader, gates: Mapping[str, Sequence[int]]) -> None:
    """Let a file of PyTorch's read as if it had the gates in the order of nnx, and one bias: the sum of both."""
    read, second = file.read, {}
    for name in gates:
        other = name.replace("bias_ih", "bias_hh")
        if other != name and file.arrays.get(other) == file.arrays.get(name) is not None:
            second[name] = other
            del file.arrays[other]

    def converted(name: str) -> numpy.ndarray:
        array = read(name) + read(second[name]) if name in second else read(name)
        return _reorder(array, numpy.argsort(gates[name])) if name in gates else array

    file.read = converted


def _reorder(array: numpy.ndarray, order: Any) -> numpy.ndarray:
    """Return an array with the equal blocks of its rows in another order."""
    return array.reshape(len(order), -1, *array.shape[1:])[list(order)].reshape(array.shape)


def _join(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"


def _pack(value: Any, name: str, tensors: dict[str, Any], model: Any) -> Any:
    """Return `value` as JSON-serializable data; its arrays are added to `tensors`, named by their paths in it."""
    if isinstance(value, dict):
        return {key: _pack(v, f"{name}.{key}", tensors, model) for key, v in value.items()}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{name}.{i}", tensors, model) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {_TUPLE: packed}
    if isinstance(value, numpy.generic):
        return {_SCALAR: [value.dtype.name, value.item()]}
    if not isinstance(value, Array | numpy.ndarray):
        return value
    for i, p in enumerate(model.params):
        if p is value:
            return {_PARAM: i}
    if name in tensors:
        raise ValueError(f"two arrays are named {name}")
    tensors[name] = value
    return {_TENSOR: name}


def _unpack(path: Path, file: _Reader, model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the states `names` of a file, with host arrays; the inverse of `_pack`, for untrusted files."""
    unpack = _Unpacker(file, model.params)
    try:
        return {name: unpack(file.states[name]) for name in names}
    except RecursionError as error:
        raise _DamagedFileError(f"{path}: metadata is nested too deeply") from error
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise ValueError(f"{path}: invalid state: {error}") from error


class _Unpacker:
    """Replaces the objects that stand for arrays, parameters, tuples and scalars."""

    def __init__(self, file: _Reader, params: Sequence[Array]) -> None:
        self.file, self.params = file, params
        self.used: set[Any] = set()
        self.kinds = {_TENSOR: self.tensor, _PARAM: self.param, _TUPLE: self.tuple, _SCALAR: self.scalar}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self(v) for v in value]
        if not isinstance(value, dict):
            return value
        (kind, content), *others = value.items() or [("", None)]
        if kind in self.kinds and not others:
            return self.kinds[kind](content)
        return {key: self(v) for key, v in value.items()}

    def tensor(self, name: Any) -> Any:
        if name not in self.file.arrays or name in self.used:  # a second reference would make two arrays one
            raise ValueError(f"it refers to an array {name!r:.80} that is not in the file, or twice")
        self.used.add(name)
        return self.file.read(name)

    def param(self, index: Any) -> Any:
        if not isinstance(index, int) or not 0 <= index < len(self.params):
            raise ValueError(f"it refers to parameter {index!r:.80}, and the model has {len(self.params)}")
        return self.params[index]

    def tuple(self, values: Any) -> Any:
        return tuple(map(self, values))

    def scalar(self, content: Any) -> Any:
        dtype, value = content
        if dtype not in SAVABLE_DTYPES:
            raise ValueError(f"it has a number of dtype {dtype!r:.80}")
        return numpy.dtype(dtype).type(value)


def import_safetensors() -> Any:
    """Return the module safetensors, or raise an ImportError that says how to install it."""
    try:
        import safetensors.numpy  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("nnx saves and loads with safetensors: pip install safetensors") from error
    return safetensors


def warn(message: str) -> None:
    """Issue a RuntimeWarning at the line that called nnx, whatever the call depth."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("nnx."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


class _DamagedFileError(ValueError):
    """The contents are not those that were written; the message gives the reason."""


class _Reader:
    """The contents of a safetensors file from any library.

    Attributes
    ----------
    arrays : dict of name to (dtype, shape)
        NumPy's name of the dtype, or the file's if NumPy has no such dtype.
    read : function of a name
        Returns the array. Those of a checkpoint are in memory, so that they are the ones that the digest matched.
    is_checkpoint : bool
        Whether `save` has written the file.
    states : dict of name to state
    layers : dict of path to class and settings of a layer
    names : `keys` and `transpose`, the arguments of `save`, as JSON
    """

    def __init__(self, path: Path, file: Any) -> None:
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        self.arrays = {
            name: (_DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()
        }
        self.read: Callable[[str], numpy.ndarray] = file.get_tensor
        self.is_checkpoint = any(key.startswith("nnx") for key in metadata)
        self.states: dict[str, Any] = {}
        self.layers: dict[str, Any] = {}
        self.names = ""
        if self.is_checkpoint:
            if (version := metadata.get("nnx.format")) != _FORMAT:
                raise ValueError(f"{path}: this version of nnx loads format {_FORMAT}, got {version!r:.80}")
            arrays = {name: file.get_tensor(name) for name in slices}
            if metadata.pop("nnx.digest", None) != _digest(metadata, arrays):
                raise _DamagedFileError(f"{path}: damaged: the digest does not match the contents")
            self.read = arrays.__getitem__
            self.states, self.layers = (_parse_objects(path, metadata.get(n, "")) for n in ("nnx.state", "nnx.layers"))
            self.names = metadata.get("nnx.names", "")


def _read(path: Path) -> _Reader:
    """Open and validate a safetensors file.

    Raises
    ------
    OSError, ValueError
        If the file cannot be opened, is not a complete safetensors file, or does not match its digest; the message
        names `path`.
    """
    safetensors = import_safetensors()
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
        raise OSError(f"{path}: not a file")
    with open(path, "rb"):  # whose errors name the file
        pass
    try:
        return _Reader(path, safetensors.safe_open(path, "np"))
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:  # the last two: NumPy has no such dtype
        raise _DamagedFileError(f"{path}: damaged, or not a safetensors file: {error}") from error


def _parse_objects(path: Path, text: str) -> dict[str, Any]:
    if len(text) > _MAX_METADATA:
        raise ValueError(f"{path}: its state of {len(text)} characters exceeds the limit of {_MAX_METADATA}")
    try:
        objects = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _DamagedFileError(f"{path}: its state is not valid JSON: {error}") from error
    if not isinstance(objects, dict) or not all(isinstance(value, dict) for value in objects.values()):
        raise _DamagedFileError(f"{path}: its state must be a JSON object of objects")
    return objects


def _atomic_save(path: Path, arrays: dict[str, numpy.ndarray], metadata: dict[str, str]) -> None:
    """Write a temporary file, fsync it and rename it over `path` (atomic)."""
    import tempfile  # noqa: PLC0415 - as in _digest

    safetensors = import_safetensors()
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(f"{path}: not saved: not a regular file")
    target = path.resolve()  # a symbolic link is kept, its target replaced
    arrays = {name: numpy.asarray(a, order="C") for name, a in arrays.items()}
    for name, a in arrays.items():
        if a.dtype.name not in SAVABLE_DTYPES:
            raise TypeError(f"{path}: {name} is {a.dtype}, which safetensors files cannot hold")
    metadata["nnx.digest"] = _digest(metadata, arrays)
    try:
        with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=target.parent) as folder:
            file = Path(folder, path.name)
            file.touch()  # for the default permissions of a new file; the library would make it private
            mode = stat.S_IMODE((target if target.exists() else file).stat().st_mode)
            safetensors.numpy.save_file(arrays, file, metadata)
            _call_or_warn(f"{path}: saved, but its permissions could not be set", lambda: file.chmod(mode))
            _fsync(file, os.O_RDWR)  # Windows flushes only what may be written
            file.replace(target)
    except Exception as error:  # the library's errors hold the system's message, but are no OSError
        raise OSError(f"{path}: not saved: {error}") from error
    if sys.platform != "win32":  # which cannot fsync a folder
        _call_or_warn(f"{path}: saved, but its folder could not be flushed", lambda: _fsync(target.parent, os.O_RDONLY))


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, numpy.ndarray]) -> str:
    """Return the digest of metadata, names, dtypes, shapes and bytes."""
    import hashlib  # noqa: PLC0415 - it loads OpenSSL, and `import nnx` loads nothing that only files need

    names = sorted(arrays)
    header = [sorted(metadata.items()), [[name, arrays[name].dtype.name, arrays[name].shape] for name in names]]
    digest: Any = hashlib.blake2b(json.dumps(header).encode(), digest_size=32)
    for name in names:
        a = arrays[name]
        digest.update(a.astype(a.dtype.newbyteorder("<"), copy=False).reshape(-1).view(numpy.uint8))
    return digest.hexdigest()


def _call_or_warn(failure: str, action: Callable[[], Any]) -> None:
    """Call `action`; an OSError is a warning that begins with `failure`."""
    try:
        action()
    except OSError as error:
        warn(f"{failure}: {error}")


def _fsync(path: Path, flags: int) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
