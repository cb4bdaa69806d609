"""Files of parameters: the book's format, read without running code, completely or not at all."""

import copyreg
import io
import os
import pickle
import pickletools

import numpy
import pytest

import nnx
from nnx import base_model, np, to_cpu
from nnx.base_model import BaseModel, load_pickle


class Net(BaseModel):
    def __init__(self, *shapes, dtype="float32", value=0.0):
        self.params = [np.full(shape, value, dtype) for shape in shapes]
        self.grads = [np.zeros_like(p) for p in self.params]


@pytest.fixture
def net(rng):
    net = Net((2, 3), (3,))
    for p in net.params:
        p[...] = nnx.asarray(rng.standard_normal(p.shape))
    return net


def test_base_model_is_abstract():
    model = BaseModel()
    assert model.params is None
    assert model.grads is None
    for call in (model.forward, model.backward):
        with pytest.raises(NotImplementedError, match="BaseModel has no"):
            call(1, 2)
    with pytest.raises(TypeError, match=r"BaseModel.save_params: params is None; set it"):
        model.save_params()


def test_default_name_and_the_books_format(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net.save_params()
    assert os.listdir(tmp_path) == ["Net.pkl"]
    arrays = pickle.loads((tmp_path / "Net.pkl").read_bytes())
    assert type(arrays) is list
    for a, p in zip(arrays, net.params, strict=True):
        assert type(a) is numpy.ndarray
        assert a.dtype == numpy.float16
        numpy.testing.assert_array_equal(a, to_cpu(p).astype("float16"))
    other = Net((2, 3), (3,))
    kept = list(other.params)
    other.load_params()
    for p, k, saved in zip(other.params, kept, net.params, strict=True):
        assert p is k
        assert p.dtype == np.float32
        numpy.testing.assert_array_equal(to_cpu(p), to_cpu(saved).astype("float16"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_every_protocol_and_module_name_is_read(protocol, module, tmp_path, rng):
    data = {
        "word_vecs": rng.standard_normal((4, 3)).astype("float16"),
        "fortran": numpy.asfortranarray(rng.standard_normal((4, 3))),
        "big": numpy.arange(6, dtype=">i4").reshape(2, 3),
        "bools": numpy.array([True, False]),
        "empty": numpy.zeros((0, 3)),
        "scalar": numpy.float32(1.5),
        "none": (None, True, 2**70, -1.5, "ä"),
        "word_to_id": {"you": 0, "say": 1},
        "id_to_word": {0: "you", 1: "say"},
        "complex": numpy.array([1j]),
    }
    raw = pickle.dumps(data, protocol=protocol)
    if protocol < 4:  # names are lines of text there
        raw = raw.replace(b"cnumpy._core", b"c" + module)
    elif module == b"numpy.core":
        raw = _respell(raw)
    (tmp_path / "a.pkl").write_bytes(raw)
    loaded = load_pickle(tmp_path / "a.pkl")
    assert list(loaded) == list(data)
    for name, expected in data.items():
        found = loaded[name]
        if isinstance(expected, numpy.ndarray):
            assert type(found) is numpy.ndarray
            assert found.dtype == expected.dtype.newbyteorder("=")
            assert found.flags.writeable
            assert found.flags.f_contiguous or not expected.flags.f_contiguous
            numpy.testing.assert_array_equal(found, expected)
        else:
            assert type(found) is type(expected)
            assert found == expected


def _respell(raw):
    """Return a pickle of protocol 4 or 5 with NumPy's old module name, without frames, which have lengths."""
    out, previous = bytearray(), None
    for op, _, pos in [*pickletools.genops(raw), (None, None, len(raw))]:
        if previous is not None:
            piece = raw[previous[1] : pos]
            if piece[:1] == pickle.SHORT_BINUNICODE and piece[2:].startswith(b"numpy._core"):
                name = piece[2:].replace(b"numpy._core", b"numpy.core")
                piece = pickle.SHORT_BINUNICODE + bytes([len(name)]) + name
            if previous[0].name != "FRAME":
                out += piece
        previous = op, pos
    assert b"numpy.core" in out
    assert b"numpy._core" not in out
    return bytes(out)


def test_the_same_array_twice_stays_one(tmp_path):
    a = numpy.ones(3)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([a, [a]] * 2))
    first, (second,), third, (fourth,) = load_pickle(tmp_path / "a.pkl")
    assert first is second is third is fourth
    tree = ("leaf",)
    for _ in range(100):
        tree = (tree, tree)  # 2**100 leaves
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree))
    left, right = load_pickle(tmp_path / "a.pkl")
    assert left is right


class Evil:
    """Writes a file when it is unpickled by `pickle.load`."""

    path = None

    def __reduce__(self):
        return (exec, (f"open({os.fspath(self.path)!r}, 'w').close()",))


def _global(module, name):
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n"


def test_no_code_of_a_file_is_run(tmp_path):
    Evil.path = tmp_path / "ran"
    file = tmp_path / "a.pkl"
    for protocol in range(2, 6):
        for content in (Evil(), [numpy.ones(2), {"a": Evil()}], numpy.array([Evil()], object)):
            file.write_bytes(pickle.dumps(content, protocol=protocol))
            with pytest.raises(ValueError, match=r"load_pickle: .*a\.pkl is damaged, or holds more than arrays"):
                load_pickle(file)
            with pytest.raises(ValueError, match=r"a\.pkl is damaged"):
                Net((2,)).load_params(file)
    assert not Evil.path.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Evil.path.exists()  # with pickle.load it would have been run


@pytest.mark.parametrize(
    "raw",
    [
        _global("os", "system") + b".",
        _global("builtins", "eval") + b"X\x01\x00\x00\x001\x85R.",
        _global("numpy", "load") + b".",
        _global("numpy", "ndarray") + b".",  # nothing of NumPy's is the content itself
        _global("numpy", "dtype") + b"X\x02\x00\x00\x00f4\x85R.",
        _global("numpy.core.multiarray", "_reconstruct") + b")R.",  # an array without its contents
        _global("numpy.core.multiarray", "_reconstruct") + b"}X\x08\x00\x00\x00__name__K\x01sb.",  # changes a function
        _global("numpy", "ndarray") + b")\x81.",
        b"(inumpy\nload\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0d_core.nothing\x93.",
        b"\x80\x02P1\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        pickle.dumps({1, 2}),
        pickle.dumps(b"bytes"),
        pickle.dumps(numpy.array(["text"])),
        pickle.dumps(numpy.zeros(2, [("a", "f4")])),
        pickle.dumps(numpy.array(["2020-01-01"], "M8[D]")),
        pickle.dumps(numpy.array([None])),
        pickle.dumps(1 + 2j),
        b"",
        b"text",
        pickle.dumps([numpy.ones(3)])[:-9],
    ],
)
def test_other_objects_and_damaged_files_are_refused(raw, tmp_path):
    (tmp_path / "a.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=r"load_pickle: .*a\.pkl is damaged, or holds more than"):
        load_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("name", base_model._GLOBALS)
def test_a_file_cannot_change_the_functions_that_it_may_call(name, tmp_path):
    state = b"N}X\x06\x00\x00\x00markerK\x01s\x86"  # None, a dict
    (tmp_path / "a.pkl").write_bytes(_global(*name) + state + b"b.")
    with pytest.raises(ValueError, match="it changes a function"):
        load_pickle(tmp_path / "a.pkl")
    assert not hasattr(base_model._GLOBALS[name], "marker")


def test_an_extension_code_is_looked_up_by_name(tmp_path):
    copyreg.add_extension("os", "system", 200)
    try:
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02\x82\xc8.")
        with pytest.raises(ValueError, match=r"it refers to os\.system"):
            load_pickle(tmp_path / "a.pkl")
    finally:
        copyreg.remove_extension("os", "system", 200)


def _forged(shape, size=24, code="f8"):
    """Return a pickled array of `size` bytes that claims `shape`."""
    file = io.BytesIO()

    class Forged:
        def __reduce__(self):
            state = (1, shape, numpy.dtype(code), False, bytes(size))
            return numpy.ones(3).__reduce__()[0], (numpy.ndarray, (0,), b"b"), state

    pickle.Pickler(file, 4).dump(Forged())
    return file.getvalue()


@pytest.mark.parametrize(
    "shape", [(4,), (-3,), (-1, -3), (1 << 60, 1 << 60), (0,), "3", (3.0,), (1,) * 40 + (3,), (True, 3), None]
)
def test_arrays_of_false_sizes_are_refused(shape, tmp_path):
    (tmp_path / "a.pkl").write_bytes(_forged(shape))
    with pytest.raises(ValueError, match=r": it holds"):
        load_pickle(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(_forged((3,)))
    numpy.testing.assert_array_equal(load_pickle(tmp_path / "a.pkl"), numpy.zeros(3))


def test_every_truncation_and_changed_byte_is_an_array_or_a_value_error(tmp_path):
    raw = pickle.dumps([numpy.ones((2, 2), "float16"), {"a": 1}], protocol=2)
    file = tmp_path / "a.pkl"
    for i in range(len(raw)):
        for damaged in (raw[:i], raw[:i] + bytes([raw[i] ^ 0x11]) + raw[i + 1 :]):
            file.write_bytes(damaged)
            try:
                load_pickle(file)
            except ValueError:
                continue


@pytest.mark.parametrize(
    "arrays",
    [
        [numpy.ones((1, 3)), numpy.ones(3)],  # both would broadcast
        [numpy.ones((2, 3)), numpy.ones(1)],
        [numpy.ones((3, 2)), numpy.ones(3)],
        [numpy.ones((2, 3))],
        [numpy.ones((2, 3)), numpy.ones(3), numpy.ones(3)],
        [numpy.ones((2, 3)), numpy.ones(3, int)],
        [numpy.ones((2, 3)), 1.0],
        {"W": numpy.ones((2, 3)), "b": numpy.ones(3)},
        numpy.ones((2, 3)),
    ],
)
def test_other_parameters_are_refused_before_anything_changes(arrays, tmp_path, net):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays))
    before = [to_cpu(p).copy() for p in net.params]
    with pytest.raises(ValueError, match=r"Net.load_params: .*a\.pkl"):
        net.load_params(tmp_path / "a.pkl")
    for p, b in zip(net.params, before, strict=True):
        numpy.testing.assert_array_equal(to_cpu(p), b)


def test_missing_and_read_only(tmp_path, net):
    with pytest.raises(FileNotFoundError):
        net.load_params(tmp_path / "none.pkl")
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "none.pkl")
    if not nnx.GPU:
        net.params[1].flags.writeable = False
        net.save_params(tmp_path / "a.pkl")
        with pytest.raises(ValueError, match=r"Net.load_params: params\[1\] is read-only; load into a copy"):
            net.load_params(tmp_path / "a.pkl")


@pytest.mark.parametrize("bad", [65520.0, -1e30, numpy.nan, numpy.inf])
def test_what_float16_cannot_hold_is_not_saved(bad, tmp_path, net):
    net.save_params(tmp_path / "a.pkl")
    before = (tmp_path / "a.pkl").read_bytes()
    net.params[1][0] = bad
    with pytest.raises(ValueError, match=r"Net.save_params: params\[1\] holds NaN, or numbers beyond 65504"):
        net.save_params(tmp_path / "a.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pkl"]


@pytest.mark.skipif(os.name == "nt", reason="Windows replaces no open file")
def test_a_file_is_replaced_not_overwritten(tmp_path, net):
    net.save_params(tmp_path / "a.pkl")
    with (tmp_path / "a.pkl").open("rb") as file:
        before = (tmp_path / "a.pkl").read_bytes()
        net.params[0] *= 2
        net.save_params(tmp_path / "a.pkl")
        assert file.read() == before
    assert (tmp_path / "a.pkl").read_bytes() != before


def test_float64_parameters_and_tied_weights(tmp_path):
    net = Net((4, 2), dtype="float64", value=1e-9)
    net.params.append(net.params[0].T)
    net.save_params(tmp_path / "a.pkl")
    other = Net((4, 2), dtype="float64", value=1.0)
    other.params.append(other.params[0].T)
    other.load_params(tmp_path / "a.pkl")
    assert other.params[0].dtype == np.float64
    numpy.testing.assert_array_equal(to_cpu(other.params[0]), numpy.zeros((4, 2)))
    assert np.may_share_memory(other.params[0], other.params[1])
