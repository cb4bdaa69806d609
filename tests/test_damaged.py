"""Damaged, forged and foreign files are rejected with a clear error, at low cost, without changing anything."""

import json
import os
import pickle
import random
import sys
import tracemalloc
from pathlib import Path

import numpy
import pytest
from training import At, callbacks, everything, fit, new_trainer, values, with_header

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
    "fewer words": lambda rng, words, name, entry: entry.pop(rng.choice(sorted(entry))),
    "no entry": lambda rng, words, name, entry: words.update({name: rng.choice([None, 1, "a", [], {}])}),
    "left out": lambda rng, words, name, entry: words.pop(name),
    "added": lambda rng, words, name, entry: words.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "renamed": lambda rng, words, name, entry: words.update({name + "x": words.pop(name)}),
    "swapped": _swapped,
    "no digest": lambda rng, words, name, entry: words["__metadata__"].pop("nnx.digest"),
    "no metadata": lambda rng, words, name, entry: words["__metadata__"].update({"nnx.state": 3}),
    "other metadata": lambda rng, words, name, entry: words["__metadata__"].update({"nnx.state": "{}"}),
    "another format": lambda rng, words, name, entry: words["__metadata__"].update({"nnx.format": "1"}),
    "deep": lambda rng, words, name, entry: b"[" * 100_000,
    "deep in names": lambda rng, words, name, entry: b'{"a":' * 50_000,
    "a list": lambda rng, words, name, entry: b"[]",
    "a number": lambda rng, words, name, entry: b"1" * 5000,
    "not text": lambda rng, words, name, entry: rng.randbytes(200),
}


def contents(data):
    arrays = pytest.importorskip("safetensors.numpy").load(data)
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


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
            if data == original or (way == "swapped" and contents(data) == contents(original)):
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
        ({"a": _entry(0, 4), "b": _entry(0, 4)}, 4, "damaged, or not a safetensors file: .*"),
        ({"a": _entry(0, 4), "b": _entry(8, 12)}, 12, "damaged, or not"),
        ({"a": _entry(0, 4), "b": _entry(2, 6)}, 6, "damaged, or not"),
        ({"a": _entry(0, 4)}, 8, "damaged, or not"),
        ({"a": _entry(0, 8)}, 8, "damaged, or not"),
        ({"a": _entry(0, 0, [0, 1 << 61])}, 0, r"a: in the file, but not in the model"),
        ({"a": _entry(0, 3, [3], "F8_E4M3"), "b": _entry(3, 7)}, 7, "a: in the file, but not in the model"),
        ({"__metadata__": {"format": 1}}, 0, "damaged, or not"),
        ({"__metadata__": {"nnx.model": "{}"}}, 0, "this version of nnx loads format 2, got None"),
        ({"__metadata__": {"nnx.format": "1"}}, 0, "this version of nnx loads format 2, got '1'"),
        ({"__metadata__": {"nnx.format": "2"}}, 0, "damaged: the digest does not match the contents"),
        ({"__metadata__": {"nnx.format": "2"}, "a": _entry(0, 4, [2], "BF16")}, 4, "damaged"),
        ({"__metadata__": {"nnx.format": "2"}, "a": _entry(0, 4, [4], "F8_E4M3")}, 4, "damaged"),
    ],
)
def test_invalid_files_without_a_digest_are_rejected(words, data, reason, tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(with_header(words, bytes(data)))
    with pytest.raises(ValueError, match=reason):
        checkpoint.load(path, TwoLayerNet(2, 10, 3))


@pytest.mark.parametrize("oddity", ["an unknown key of an entry", "an entry that occurs twice"])
def test_oddities_of_a_header_that_change_no_contents_are_ignored(oddity, tmp_path):
    path, models = tmp_path / "net.safetensors", [TwoLayerNet(2, 10, 3, rng=seed) for seed in (1, 2)]
    checkpoint.save(path, models[0])
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    words = json.loads(data[8:length])
    text = json.dumps(words)[:-1] + f', "layers.0.W": {json.dumps(words["layers.0.W"])}}}'
    words["layers.0.W"]["more"] = 1
    path.write_bytes(with_header(words if "unknown" in oddity else text.encode(), data[length:]))
    checkpoint.load(path, models[1])
    for p, q in zip(*map(values, models), strict=True):
        numpy.testing.assert_array_equal(p, q)


MT19937 = "RandomState MT19937"
FORGED = {
    "a position beyond the generator": lambda told, arrays: told["trainer"]["rng"]["RandomState MT19937"][
        "state"
    ].update(pos=10**6),
    "a key that is too short": lambda told, arrays: arrays.update(
        {f"trainer.rng.{MT19937}.state.key": numpy.zeros(3, numpy.uint32)}
    ),
    "rows that are not there": lambda told, arrays: arrays["trainer.permutation"].fill(70),
    "fewer rows than are left": lambda told, arrays: arrays.update({"trainer.permutation": numpy.arange(3)}),
    "a step that is none": lambda told, arrays: told["trainer"].update(iteration=-1),
    "half a step": lambda told, arrays: told["trainer"].update(iteration=2.5),
    "a step after the last": lambda told, arrays: (
        told["trainer"].update(iteration=99),
        arrays.update({"trainer.permutation": numpy.zeros(0, int)}),
    ),
    "callbacks that are none": lambda told, arrays: told["trainer"].update(callbacks=[3]),
    "losses of another shape": lambda told, arrays: arrays.update({"trainer.val_list": numpy.zeros((3, 3))}),
    "mean losses of another shape": lambda told, arrays: arrays.update({"trainer.losses": numpy.zeros((3, 2))}),
    "infinitely many losses": lambda told, arrays: arrays.update({"trainer.losses": numpy.full((1, 3), numpy.inf)}),
    "losses that are no numbers": lambda told, arrays: told["trainer"].update(loss_list="low"),
    "an array that is not there": lambda told, arrays: told["optimizer.Adam"].update(m=[{"tensor": "none"}]),
    "a parameter that is not there": lambda told, arrays: told["optimizer.Adam"].update(params=[{"param": 99}]),
    "a method": lambda told, arrays: told["optimizer.Adam"].update(update=1),
    "state that is no number": lambda told, arrays: told["optimizer.Adam"].update(iter="many"),
    "state of other shapes": lambda told, arrays: arrays.update({"optimizer.Adam.m.0": numpy.zeros((9, 9), "float32")}),
    "state that is none": lambda told, arrays: told["optimizer.Adam"].update(m=[1] * 8),
    "state without parameters": lambda told, arrays: told["optimizer.Adam"].update(params=None),
    "state of other numbers": lambda told, arrays: arrays.update(
        {"optimizer.Adam.m.0": numpy.zeros((2, 6), "complex64")}
    ),
    "parameters that are none": lambda told, arrays: told["optimizer.Adam"].update(params=[1, "a"]),
    "parameters that are a number": lambda told, arrays: told["optimizer.Adam"].update(params=8),
    "state that is a number": lambda told, arrays: told["optimizer.Adam"].update(m=8),
    "depth that JSON stands": lambda told, arrays: told["trainer"].update(callbacks=json.loads("[" * 800 + "]" * 800)),
    "no state": lambda told, arrays: told.pop("model.layers.3"),
    "a seed that is none": lambda told, arrays: told["model.layers.3"].update(seed="x"),
    "a word instead": lambda told, arrays: told.update(trainer="x"),
    "depth": lambda told, arrays: told.clear(),
    "moments of another dtype": lambda told, arrays: arrays.update(
        {"optimizer.Adam.m.0": arrays["optimizer.Adam.m.0"].astype("float64")}
    ),
    "two moments in one array": lambda told, arrays: told["optimizer.Adam"].update(
        v=told["optimizer.Adam"]["m"], m=told["optimizer.Adam"]["m"]
    ),
    "a state that is a list": lambda told, arrays: told.update({"model.layers.3": []}),
}


def forge(path, change):
    """Let `change(states, arrays)` change the contents of a checkpoint; the digest is right."""
    file = checkpoint._read(path)
    arrays = {name: file.read(name) for name in file.arrays}
    change(file.states, arrays)
    text = "[" * 100_000 if not file.states else json.dumps(file.states)
    checkpoint._atomic_save(path, arrays, {"nnx.format": "2", "nnx.state": text, "nnx.layers": "{}"})


@pytest.mark.parametrize("what", FORGED)
def test_invalid_files_with_a_valid_digest_are_rejected(what, tmp_path):
    path, trainer = tmp_path / "net.safetensors", new_trainer(generator="RandomState")
    fit(trainer, At(8, lambda: checkpoint.save(path, trainer.model, trainer.optimizer, trainer)))
    forge(path, FORGED[what])
    before = everything(trainer)
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        trainer.resume(path)
    assert everything(trainer) == before


def leaves(states, path=()):
    """Yield the paths of all values in nested dicts and lists, also of the empty ones."""
    items = states.items() if isinstance(states, dict) else enumerate(states) if isinstance(states, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


@pytest.mark.parametrize("value", [None, "x", [], {}, [None]], ids=str)
def test_states_of_another_kind_change_nothing(value, tmp_path):
    path, trainer = tmp_path / "net.safetensors", new_trainer()
    fit(trainer, *callbacks(), At(8, lambda: checkpoint.save(path, trainer.model, trainer.optimizer, trainer)))
    original, before = path.read_bytes(), everything(trainer)
    states, tried = checkpoint._read(path).states, 0
    for place in leaves(states):
        *outer, last = place

        def change(states, arrays, outer=outer, last=last):
            for key in outer:
                states = states[key]
            states[last] = value

        inner = states
        for key in place:
            inner = inner[key]
        names_callbacks = place[:2] == ("trainer", "callbacks") and (place[3:] == (0,) or not place[2:])
        if inner == value or (names_callbacks and value in ("x", [])):  # callbacks may have gone, or been renamed
            continue
        path.write_bytes(original)
        forge(path, change)
        given, tried = callbacks(), tried + 1
        told = [vars(callback).copy() for callback in given]
        other = new_trainer(seed=2)
        unchanged = everything(other)
        try:
            other.resume(path)
            unchanged = everything(other)
            fit(other, *given)
        except ValueError:
            pass
        else:
            pytest.fail(f"{place} was accepted")
        assert everything(other) == unchanged, place
        assert [vars(callback) for callback in given] == told, place
    assert everything(trainer) == before
    assert tried > 50


def test_many_references_to_one_array_are_refused(tmp_path):
    """They would take 2,000 times the memory of the file, or make different arrays one."""
    path, trainer = tmp_path / "net.safetensors", new_trainer()
    fit(trainer)
    checkpoint.save(path, trainer.model, trainer.optimizer, trainer)
    forge(path, lambda states, arrays: states["trainer"].update(callbacks=[{"$tensor": "trainer.loss_list"}] * 2000))
    with pytest.raises(ValueError, match=r"it refers to an array .*trainer\.loss_list"):
        trainer.resume(path)


def test_state_that_would_take_much_memory_is_refused(tmp_path, monkeypatch):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3)
    checkpoint.save(path, model)
    monkeypatch.setattr(checkpoint, "_MAX_METADATA", 1)
    with pytest.raises(ValueError, match="its state of 2 characters exceeds the limit of 1"):
        checkpoint.load(path, model)


def test_the_digest_is_that_of_the_arrays_used(tmp_path, monkeypatch):
    """A file that changes after it was verified must not be loaded."""
    path, models = tmp_path / "net.safetensors", [TwoLayerNet(2, 10, 3, rng=seed) for seed in (1, 2, 3)]
    checkpoint.save(path, models[0])
    before, digest = path.read_bytes(), checkpoint._digest

    def changing(*arguments):
        data = bytearray(before)
        data[-100:] = bytes(100)
        with open(path, "r+b") as file:
            file.write(data)
        return digest(*arguments)

    monkeypatch.setattr(checkpoint, "_digest", changing)
    checkpoint.load(path, models[1])
    assert path.read_bytes() != before
    for p, q in zip(*map(values, models[:2]), strict=True):
        numpy.testing.assert_array_equal(p, q)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the digest does not match"):
        checkpoint.load(path, models[2])


@pytest.mark.parametrize(("old", "new"), [(b'"F64"', b'"I64"'), (b"[2,3]", b"[3,2]"), (b"numbers", b"letters")])
def test_digest_covers_dtypes_shapes_and_metadata(old, new, tmp_path):
    path = tmp_path / "net.safetensors"
    metadata = {"nnx.format": "2", "nnx.state": "{}", "nnx.layers": "{}", "what": "numbers"}
    checkpoint._atomic_save(path, {"a": numpy.ones((2, 3))}, metadata)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match="the digest does not match"):
        checkpoint._read(path)


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


@pytest.mark.skipif(sys.platform == "win32", reason="pipes, links and rights of Unix")
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


@pytest.mark.skipif(sys.platform == "win32", reason="pipes, links and rights of Unix")
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
