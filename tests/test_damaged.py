"""Damaged, forged and foreign files are rejected with a clear error, at low cost, without changing anything."""

import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy
import pytest
from training import At, everything, fit, new_trainer, values, with_header

import nnx
from nnx import TwoLayerNet, checkpoint

pytest.importorskip("safetensors")


def base_files(folder):
    """Return the bytes of files of a model, with an optimizer, with a trainer."""
    trainer = new_trainer()
    fit(trainer)
    path, files = folder / "base.safetensors", []
    for rest in ((), (trainer.optimizer,), (trainer.optimizer, trainer)):
        checkpoint.save(path, trainer.model, *rest)
        files.append(path.read_bytes())
    return files


def damaged(rng, data):
    """Return (description of the damage, damaged bytes)."""
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    way = rng.choice(["cut", "bits", "bits of the header", "bytes", "length", "longer", "header", "header", "header"])
    if way == "cut":
        return way, data[: rng.randrange(len(data))]
    if way.startswith("bits"):
        out = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            out[rng.randrange(8 + length if way != "bits" else len(data))] ^= 1 << rng.randrange(8)
        return way, bytes(out)
    if way == "bytes":
        out, start = bytearray(data), rng.randrange(len(data))
        out[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
        return way, bytes(out)
    if way == "length":
        n = rng.choice([0, 1, length - 1, length + 1, len(data), 1 << 24, 1 << 40, (1 << 64) - 1, rng.getrandbits(64)])
        return way, n.to_bytes(8, "little") + data[8:]
    if way == "longer":
        return way, data + rng.randbytes(rng.randrange(1, 99))
    words = json.loads(text)
    name = rng.choice([n for n in words if n != "__metadata__"])
    entry = words[name]
    way = rng.choice(sorted(HEADERS))
    result = HEADERS[way](rng, words, name, entry)
    return way, with_header(words if result is None else result, body)


def _twice(rng, words, name, entry):
    text = json.dumps(words)
    return (text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}").encode()


def _swapped(rng, words, name, entry):
    other = rng.choice([n for n in words if n not in (name, "__metadata__")])
    words[name], words[other] = words[other], entry


HEADERS = {
    "a huge shape": lambda rng, words, name, entry: entry.update(
        shape=[1 << rng.randrange(20, 62)] * rng.randrange(1, 4)
    ),
    "huge offsets": lambda rng, words, name, entry: entry.update(data_offsets=[0, 1 << rng.randrange(30, 80)]),
    "all huge": lambda rng, words, name, entry: entry.update(shape=[1 << 40], dtype="U8", data_offsets=[0, 1 << 40]),
    "another shape": lambda rng, words, name, entry: entry.update(shape=[*entry["shape"], rng.choice([0, 1, 2])]),
    "another dtype": lambda rng, words, name, entry: entry.update(
        dtype=rng.choice([d for d in ("F64", "I32", "U32", "F16", "BF16", "F8_E4M3", "f32", "") if d != entry["dtype"]])
    ),
    "no integers": lambda rng, words, name, entry: entry.update(
        rng.choice([{"shape": [1.0]}, {"shape": "12"}, {"shape": [-1, -1]}, {"data_offsets": [True, 4]}, {"dtype": 3}])
    ),
    "other offsets": lambda rng, words, name, entry: entry.update(
        data_offsets=[n + rng.choice([-4, 4, 1]) for n in entry["data_offsets"]]
    ),
    "backward": lambda rng, words, name, entry: entry.update(data_offsets=[*entry["data_offsets"][::-1], 0]),
    "more words": lambda rng, words, name, entry: entry.update(more=1),
    "fewer words": lambda rng, words, name, entry: entry.pop(rng.choice(sorted(entry))),
    "no entry": lambda rng, words, name, entry: words.update({name: rng.choice([None, 1, "a", [], {}])}),
    "left out": lambda rng, words, name, entry: words.pop(name),
    "added": lambda rng, words, name, entry: words.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "renamed": lambda rng, words, name, entry: words.update({name + "x": words.pop(name)}),
    "twice": _twice,
    "swapped": _swapped,
    "no digest": lambda rng, words, name, entry: words["__metadata__"].pop("nnx.digest"),
    "no metadata": lambda rng, words, name, entry: words["__metadata__"].update({"nnx.model": 3}),
    "other metadata": lambda rng, words, name, entry: words["__metadata__"].update({"nnx.model": '{"state": {}}'}),
    "deep": lambda rng, words, name, entry: b"[" * 100_000,
    "deep in names": lambda rng, words, name, entry: b'{"a":' * 50_000,
    "a list": lambda rng, words, name, entry: b"[]",
    "a number": lambda rng, words, name, entry: b"1" * 5000,
    "not text": lambda rng, words, name, entry: rng.randbytes(200),
}


def check_damaged(count, folder, seed):
    """Load `count` damaged files; each must raise a clear error, change nothing, and use little memory."""
    rng = random.Random(seed)
    files, path = base_files(folder), folder / "damaged.safetensors"
    trainer = new_trainer(seed=2)
    fit(trainer)
    before, seen, peak = everything(trainer), {}, 0
    tracemalloc.start()
    try:
        while sum(seen.values()) < count:
            original = rng.choice(files)
            way, data = damaged(rng, original)
            if data == original:
                continue
            path.write_bytes(data)
            rest = (trainer.optimizer, trainer)[: files.index(original)]
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            with pytest.raises((ValueError, OSError)) as error:
                checkpoint.load(path, trainer.model, *rest)
            peak = max(peak, tracemalloc.get_traced_memory()[1] - start)
            assert str(path) in str(error.value), way
            assert len(str(error.value)) > len(str(path)) + 10, way
            seen[way] = seen.get(way, 0) + 1
    finally:
        tracemalloc.stop()
    assert everything(trainer) == before
    assert peak < 8 << 20
    return seen, peak


def test_damaged_files_are_rejected(tmp_path):
    check_damaged(300, tmp_path, 0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_five_thousand_damaged_files_are_rejected(part, tmp_path):
    seen, peak = check_damaged(1000, tmp_path, 1 + part)
    print(f"{sum(seen.values())} files damaged in {len(seen)} ways, at most {peak / 2**20:.1f} MiB more: {seen}")
    assert seen.keys() >= HEADERS.keys()


def _entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("words", "data", "reason"),
    [
        ({"a": _entry(0, 4), "b": _entry(0, 4)}, 4, "'b' begins at byte 0 of the data, where 4 was expected"),
        ({"a": _entry(0, 4), "b": _entry(8, 12)}, 12, "'b' begins at byte 8 of the data, where 4 was expected"),
        ({"a": _entry(0, 4), "b": _entry(2, 6)}, 6, "'b' begins at byte 2"),
        ({"a": _entry(0, 4)}, 8, "its header describes 4 bytes of data, but the file has 8"),
        ({"a": _entry(0, 8)}, 8, r"'a' of F32 \(1,\) has 8 bytes"),
        ({"a": _entry(0, 0, [0, 1 << 61])}, 0, r"a: in the file, but not in the model"),
        ({"a": _entry(0, 0, [0] * 33)}, 0, "invalid dtype, shape or offsets for 'a'"),
        ({"a": _entry(0, 3, [3], "F8_E4M3"), "b": _entry(3, 7)}, 7, "a: in the file, but not in the model"),
        (b'{"a": ' + json.dumps(_entry(0, 4)).encode() + b', "a": 1}', 4, "duplicate header entry 'a'"),
        ({"__metadata__": {"format": 1}}, 0, "the metadata in its header are not strings"),
        ({"__metadata__": {"nnx.model": "{}"}}, 0, "damaged: the digest does not match the contents"),
        (b" " * (1 << 24) + b"{}", 0, "exceeds the limit of 16777216"),
    ],
)
def test_invalid_files_without_a_digest_are_rejected(words, data, reason, tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(with_header(words, bytes(data)))
    with pytest.raises(ValueError, match=reason):
        checkpoint.load(path, TwoLayerNet(2, 10, 3))


MT19937 = "RandomState MT19937"
FORGED = {
    "a position beyond the generator": lambda told, arrays: told["trainer"]["rng"]["RandomState MT19937"][
        "state"
    ].update(pos=10**6),
    "a key that is too short": lambda told, arrays: arrays.update(
        {f"trainer.rng.{MT19937}.state.key": numpy.zeros(3, numpy.uint32)}
    ),
    "rows that are not there": lambda told, arrays: arrays["trainer.order"].fill(70),
    "fewer rows than are left": lambda told, arrays: arrays.update({"trainer.order": numpy.arange(3)}),
    "a step that is none": lambda told, arrays: told["trainer"].update(iteration=-1),
    "half a step": lambda told, arrays: told["trainer"].update(iteration=2.5),
    "a step after the last": lambda told, arrays: (
        told["trainer"].update(iteration=99),
        arrays.update({"trainer.order": numpy.zeros(0, int)}),
    ),
    "callbacks that are none": lambda told, arrays: told["trainer"].update(callbacks=[3]),
    "losses of another shape": lambda told, arrays: arrays.update({"trainer.val_list": numpy.zeros((3, 3))}),
    "mean losses of another shape": lambda told, arrays: arrays.update({"trainer.losses": numpy.zeros((3, 2))}),
    "infinitely many losses": lambda told, arrays: arrays.update({"trainer.losses": numpy.full((1, 3), numpy.inf)}),
    "losses that are no numbers": lambda told, arrays: told["trainer"].update(loss_list="low"),
    "an array that is not there": lambda told, arrays: told["optimizer"]["settings"].update(m=[{"tensor": "none"}]),
    "a parameter that is not there": lambda told, arrays: told["optimizer"]["settings"].update(params=[{"param": 99}]),
    "a method": lambda told, arrays: told["optimizer"]["settings"].update(update=1),
    "state that is no number": lambda told, arrays: told["optimizer"]["settings"].update(iter="many"),
    "state of other shapes": lambda told, arrays: arrays.update({"optimizer.m.0": numpy.zeros((9, 9), "float32")}),
    "state that is none": lambda told, arrays: told["optimizer"]["settings"].update(m=[1] * 8),
    "state without parameters": lambda told, arrays: told["optimizer"]["settings"].update(params=None),
    "state of other numbers": lambda told, arrays: arrays.update({"optimizer.m.0": numpy.zeros((2, 6), "complex64")}),
    "parameters that are none": lambda told, arrays: told["optimizer"]["settings"].update(params=[1, "a"]),
    "parameters that are a number": lambda told, arrays: told["optimizer"]["settings"].update(params=8),
    "state that is a number": lambda told, arrays: told["optimizer"]["settings"].update(m=8),
    "depth that JSON stands": lambda told, arrays: told["trainer"].update(callbacks=json.loads("[" * 800 + "]" * 800)),
    "no state": lambda told, arrays: told["model"].pop("state"),
    "a seed that is none": lambda told, arrays: told["model"]["state"].update({"layers.3.seed": "x"}),
    "a word instead": lambda told, arrays: told.update(model="x"),
    "depth": lambda told, arrays: told.update(optimizer=None),
}


@pytest.mark.parametrize("what", FORGED)
def test_invalid_files_with_a_valid_digest_are_rejected(what, tmp_path):
    path, trainer = tmp_path / "net.safetensors", new_trainer(generator="RandomState")
    fit(trainer, At(8, lambda: checkpoint.save(path, trainer.model, trainer.optimizer, trainer)))
    with nnx.storage.open_checked(path) as file:
        arrays = {name: file.read(name) for name in file.arrays}
        told = {kind.removeprefix("nnx."): json.loads(text) for kind, text in file.metadata.items()}
    FORGED[what](told, arrays)
    deep = "[" * 100_000
    nnx.storage.atomic_save(
        path, arrays, {f"nnx.{k}": json.dumps(v) if v is not None else deep for k, v in told.items()}
    )
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        trainer.resume(path)
    assert everything(trainer) == before


@pytest.mark.parametrize(("old", "new"), [(b'"F64"', b'"I64"'), (b"[2,3]", b"[3,2]"), (b"numbers", b"letters")])
def test_digest_covers_dtypes_shapes_and_metadata(old, new, tmp_path):
    path = tmp_path / "net.safetensors"
    nnx.storage.atomic_save(path, {"a": numpy.ones((2, 3))}, {"what": "numbers"})
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match="the digest does not match"), nnx.storage.open_checked(path):
        pass


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def foreign(folder):
    """Create files in other formats; return their paths."""
    (folder / "pickle").write_bytes(pickle.dumps(Evil()))
    numpy.savez(folder / "objects.npz", numpy.array([Evil(), None]))
    numpy.save(folder / "array.npy", numpy.zeros(1000))
    (folder / "empty").touch()
    (folder / "zeros").write_bytes(bytes(1000))
    (folder / "text").write_text("W = 3")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    with open(folder / "sparse", "wb") as file:
        file.truncate(1 << 40)
    yield from folder.iterdir()
    yield folder / "nothing"
    yield Path("/dev/zero")


def test_foreign_files_are_rejected_without_running_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = TwoLayerNet(2, 10, 3, rng=1)
    before = values(model)
    paths = list(foreign(tmp_path))
    for path in paths:
        with pytest.raises((ValueError, OSError), match=str(path)):
            checkpoint.load(path, model)
    assert not Path("evil").exists()
    for p, q in zip(values(model), before, strict=True):
        numpy.testing.assert_array_equal(p, q)


def test_unreadable_file_is_an_error(tmp_path):
    path = tmp_path / "net.safetensors"
    checkpoint.save(path, TwoLayerNet(2, 10, 3))
    path.chmod(0)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"net\.safetensors"):
            checkpoint.load(path, TwoLayerNet(2, 10, 3))
    finally:
        if root:
            os.seteuid(0)
