"""The data of fit: results do not depend on the memory layout, and memory-mapped files are not read into memory."""

import tracemalloc

import numpy
import pytest

import nnx
from nnx import SGD, Affine, MeanSquaredError, Sequential, SoftmaxWithLoss, Trainer, TwoLayerNet, np
from nnx import batches as module
from nnx.distributed import Comm
from nnx.train_state import TrainState, WeightedMean

ROWS, D, C = 70, 12, 3


def losses(x, t, dtype="float32", model=None, **options):
    model = model or TwoLayerNet(D, 8, C, dtype=dtype, rng=1)
    trainer = Trainer(model, SGD(0.5), rng=2)
    trainer.fit(x, t, 3, 16, eval_interval=1, verbose=False, **options)
    return trainer.loss_list


def mapped(array, folder):
    path = folder / f"{len(list(folder.iterdir()))}.npy"  # a mapped file must not be overwritten
    numpy.save(path, array)
    return numpy.load(path, mmap_mode="r")


def peak(function, *arguments, **options):
    """Return the peak memory allocated by the call, in bytes."""
    tracemalloc.start()
    try:
        function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def column_slice(x):
    wide = numpy.zeros((len(x), x.shape[1] + 5, *x.shape[2:]), x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


def every_other_column(x):
    wide = numpy.zeros((len(x), 2 * x.shape[1], *x.shape[2:]), x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


LAYOUTS = {
    "column slice": column_slice,
    "Fortran": numpy.asfortranarray,
    "every other column": every_other_column,
    "reversed rows": lambda x: numpy.ascontiguousarray(x[::-1])[::-1],
    "reversed columns": lambda x: numpy.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "columns before rows": lambda x: numpy.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
    "byte order": lambda x: x.astype(x.dtype.newbyteorder(">")) if x.dtype.kind == "f" else x,
    "read-only": lambda x: numpy.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.fixture
def t(rng):
    return rng.integers(0, C, ROWS)


@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16", "uint8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_losses_of_a_contiguous_copy(layout, dtype, file, rng, t, tmp_path, monkeypatch):
    x = rng.normal(0, 3, (ROWS, D)).clip(-9, 9).astype(dtype if dtype != "uint8" else "int8").astype(dtype)
    expected = losses(x, t)
    monkeypatch.setattr(module, "_PIECE_BYTES", 500)  # several chunks, the last one smaller
    monkeypatch.setattr(module, "_COLUMN_CHUNK_BYTES", 40 * x[0].nbytes)
    x = LAYOUTS[layout](x)
    if file:
        x = LAYOUTS[layout](mapped(x, tmp_path)) if layout == "column slice" else mapped(x, tmp_path)
    before = x.copy()
    assert losses(x, t) == expected
    assert (x == before).all()


@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_rows_with_several_axes(layout, file, rng, tmp_path):
    x, t = rng.normal(size=(ROWS, 5, D)).astype("float32"), rng.integers(0, C, (ROWS, 5))
    model = [Sequential([Affine(np.ones((D, C), "f"), np.zeros(C, "f"))], SoftmaxWithLoss()) for _ in range(2)]
    expected = losses(x, t, model=model[0])
    if layout == "channels last":
        x = numpy.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    else:
        x, t = LAYOUTS[layout](x), LAYOUTS[layout](t)
    if file:
        x, t = mapped(x, tmp_path), mapped(t, tmp_path)
    assert losses(x, t, model=model[1]) == expected


def test_a_transposed_file_is_gathered_in_c_order(rng, tmp_path):
    x = mapped(rng.normal(size=(ROWS, 4, D)), tmp_path).swapaxes(1, 2)
    t = numpy.arange(ROWS)
    order = rng.permutation(ROWS)
    data = module.ArrayData([x, t], 16, drop_last=False)
    data.to_device()
    parts = list(data.batches(TrainState(permutation=order), Comm(), "float32"))
    assert all(xs.flags.c_contiguous and xs.dtype == "float32" for xs, *_ in parts)
    numpy.testing.assert_array_equal(nnx.to_cpu(np.concatenate([xs for xs, *_ in parts])), x[order].astype("f"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed"])
def test_data_frames(dtype, rng, t):
    pandas = pytest.importorskip("pandas")
    x = rng.normal(0, 3, (ROWS, D))
    columns = {f"x{i}": column.astype("int64" if dtype == "mixed" and i % 2 else dtype.replace("mixed", "float32"))
               for i, column in enumerate(x.T)}  # fmt: skip
    frame = pandas.DataFrame({**columns, "other": t, "label": t})
    data = frame[list(columns)]
    expected = losses(numpy.ascontiguousarray(data), t)
    assert losses(data, frame["label"]) == expected
    assert losses(data, frame["label"], validation=(data, frame["label"])) == expected
    labels = frame[["other", "label"]].to_numpy()[:, 1]  # strided
    assert losses(data, labels) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
def test_one_hot_labels_and_targets(layout, file, rng, t, tmp_path):
    x = rng.normal(size=(ROWS, D)).astype("float32")
    expected, one_hot = losses(x, t), LAYOUTS[layout](numpy.eye(C, dtype=int)[t])
    assert losses(x, mapped(one_hot, tmp_path) if file else one_hot) == expected
    goals = rng.normal(size=(ROWS, C))
    model = [Sequential([Affine(np.ones((D, C), "f"), np.zeros(C, "f"))], MeanSquaredError()) for _ in range(2)]
    expected = losses(x, goals, model=model[0])
    goals = LAYOUTS[layout](goals)
    assert losses(x, mapped(goals, tmp_path) if file else goals, model=model[1]) == expected


def test_dtype_from_a_file_in_a_model_without_weights(rng, t, tmp_path):
    x = rng.normal(size=(ROWS, D))

    def model():
        return Sequential([nnx.Sigmoid(), Affine(np.ones((D, C), "f"), np.zeros(C, "f"))], SoftmaxWithLoss())

    assert losses(mapped(x, tmp_path), t, model=model()) == losses(x, t, model=model())


def test_which_data_is_copied(rng, t, tmp_path):
    x = rng.normal(size=(ROWS, D)).astype("float32")
    model = TwoLayerNet(D, 8, C)
    for name, layout in LAYOUTS.items():
        data = layout(x)
        ready = module.check_data("fit", model, (data, t))[0]
        in_place = name in ("column slice", "reversed rows", "read-only")
        assert numpy.shares_memory(ready, data) is in_place, name
        assert ready[0].flags.c_contiguous
        assert ready.dtype == "float32"
        numpy.testing.assert_array_equal(ready, x)
        assert module.check_data("fit", model, (data, t), copy=False)[0] is data
    for file in (mapped(x.astype("float64"), tmp_path), mapped(numpy.asfortranarray(x), tmp_path)):
        for data in (file, file[:, 3:7], numpy.asarray(file), numpy.asarray(file)[::-1].T.T):
            model = TwoLayerNet(data.shape[1], 8, C)
            assert module.check_data("fit", model, (data, t))[0] is data


def test_a_gather_copies_only_its_rows(rng):
    x, t = column_slice(numpy.zeros((20000, 40), "float32")), numpy.zeros((20000, 2), int)[:, 1]

    data = module.ArrayData([x, t], 100, drop_last=False)
    data.to_device()
    data.bytes_at_once = 1

    def epoch():
        for _ in data.batches(TrainState(permutation=data.permutation(rng)), Comm(), None):
            pass

    assert peak(epoch) < x.nbytes / 4


@pytest.mark.parametrize("layout", ["contiguous", "column slice", "Fortran"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_a_file_is_not_read_into_memory(layout, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(module, "_COLUMN_CHUNK_BYTES", 1 << 18)
    x = mapped(numpy.ones((40000, 64), dtype, "F" if layout == "Fortran" else "C"), tmp_path)
    x = x[:, 3:] if layout == "column slice" else x
    t = numpy.zeros(len(x), "uint8")
    trainer = Trainer(TwoLayerNet(x.shape[1], 4, C, rng=1), SGD(0.01), rng=2)
    options = {"eval_interval": None, "verbose": False, "validation": (x, t)}
    assert peak(trainer.fit, x, t, 1, 500, **options) < x.nbytes / 2


def test_labels_in_a_file_are_converted_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 1 << 16)
    t = mapped(numpy.ones((200, 5000), "uint8"), tmp_path)
    x = numpy.zeros((200, 5000, 1), "float32")
    model = Sequential([Affine(np.ones((1, 2), "f"), np.zeros(2, "f"))], SoftmaxWithLoss())
    checked = []
    assert peak(lambda: checked.extend(module.check_data("fit", model, (x, t)))) < t.nbytes
    assert checked[1] is t


def test_sampling_integer_data_makes_no_copy(rng, tmp_path):
    x = column_slice(rng.integers(0, 100, (20000, 10)))
    x[777, 3], x[1234, 0] = -1, 100
    assert peak(module._probe_rows, x) < x.nbytes / 3
    for data in (x, numpy.asfortranarray(x), numpy.ascontiguousarray(x)):
        numpy.testing.assert_array_equal(module._probe_rows(data), x[[777, 1234]])
    numpy.testing.assert_array_equal(module._probe_rows(x[:, 3]), [-1, x[:, 3].max()])
    numpy.testing.assert_array_equal(module._probe_rows(mapped(x, tmp_path)), x[:1])


def test_validation_data_is_checked_without_a_copy(rng, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 1 << 16)
    x, t = numpy.zeros((20000, 40), order="F"), numpy.zeros(20000, int)
    few = numpy.zeros((10, 40), "float32"), t[:10]
    trainer = Trainer(TwoLayerNet(40, 4, C), SGD(0.01))
    assert peak(trainer.fit, *few, 1, 10, validation=(x, t), verbose=False) < x.nbytes / 4


@pytest.mark.parametrize("bad", [numpy.nan, -numpy.inf, 1e300], ids=["nan", "infinity", "overflow"])
@pytest.mark.parametrize("file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "byte order"])
@pytest.mark.parametrize("which", ["x", "t"])
def test_error_names_the_first_nonfinite_row(which, layout, file, bad, rng, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 500)
    data = {"x": rng.normal(size=(ROWS, D)), "t": rng.normal(size=(ROWS, C))}
    data[which][[41, 66], 2] = bad
    data[which] = LAYOUTS[layout](data[which])
    if file:
        data[which] = mapped(data[which], tmp_path)
    model = Sequential([Affine(np.ones((D, C), "f"), np.zeros(C, "f"))], MeanSquaredError())
    with pytest.raises(ValueError, match=f"Trainer.fit: {which} holds NaN or infinity in float32, first in row 41; "):
        losses(data["x"], data["t"], model=model)


def test_label_errors_are_the_same_for_files_and_arrays(rng, t, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 100)
    x, wrong = rng.normal(size=(ROWS, D)), t.copy()
    wrong[50], wrong[60] = 7, 9
    for labels in (wrong, t[:, None], numpy.zeros((ROWS, C), int), t.astype("f")):
        with pytest.raises(ValueError, match=r"SoftmaxWithLoss: ") as expected:
            losses(x, labels)
        with pytest.raises(ValueError, match=r"SoftmaxWithLoss: ") as raised:
            losses(x, mapped(labels, tmp_path))
        assert str(raised.value) == str(expected.value)


def test_weighted_mean_restores_its_state_from_an_iterator():
    losses = WeightedMean()
    for loss, rows in ((1.0, 30), (2.0, 30), (4.0, 10)):
        losses.add(loss, rows)
    again = WeightedMean(iter(losses.state()))
    assert again.value() == losses.value() == 130 / 70
