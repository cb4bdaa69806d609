"""Contents of checkpoint files, loading, and failed saves."""

import json
import os
import stat
import sys
from pathlib import Path

import numpy
import pytest
from training import everything, fit, new_model, new_trainer, values, with_header

import nnx
from nnx import Affine, BatchNorm, Dropout, Embedding, MatMul, ReLU, Sequential, TwoLayerNet, checkpoint, np, to_cpu
from nnx.callbacks import Checkpoint
from nnx.device import asarray

safetensors = pytest.importorskip("safetensors.numpy")


def header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def assert_equal(model, other):
    for p, q in zip(model.params, other.params, strict=True):
        assert p.dtype == q.dtype
        numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


# File contents


def test_file_contents_are_human_readable(tmp_path):
    path = tmp_path / "net.safetensors"
    trainer = new_trainer()
    fit(trainer)
    checkpoint.save(path, trainer.model, trainer.optimizer)
    entries = header(path)
    words = {name: json.loads(text) for name, text in entries.pop("__metadata__").items() if name != "nnx.digest"}
    assert words["nnx.format"] == 2
    assert sorted(n for n in entries if n.startswith("layers")) == [
        "layers.0.W",
        "layers.0.b",
        "layers.1.layers.0.beta",
        "layers.1.layers.0.gamma",
        "layers.1.layers.0.running_mean",
        "layers.1.layers.0.running_var",
        "layers.2.W",
        "layers.6.W",
        "layers.6.b",
    ]
    assert entries["layers.0.W"]["dtype"] == "F32"
    assert words["nnx.layers"]["layers.3"]["dropout_ratio"] == 0.2
    assert words["nnx.state"].keys() == {"model.layers.3", "optimizer.Adam"}
    assert words["nnx.state"]["optimizer.Adam"]["beta2"] == 0.999
    dropout = trainer.model.layers[3]
    assert words["nnx.state"]["model.layers.3"] == {"seed": dropout.seed, "calls": dropout.calls}
    assert words["nnx.versions"]["nnx"] == nnx.__version__
    assert words["nnx.versions"][np.__name__] == np.__version__


def test_files_are_compatible_with_the_safetensors_library(tmp_path):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3, rng=1)
    checkpoint.save(path, model)
    arrays = safetensors.load_file(path)
    numpy.testing.assert_array_equal(arrays["layers.2.W"], to_cpu(model.layers[2].params[0]))
    safetensors.save_file(arrays, path)
    other = TwoLayerNet(2, 10, 3, rng=2)
    checkpoint.load(path, other)
    assert_equal(other, model)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_load_writes_into_existing_arrays(dtype, tmp_path):
    path = tmp_path / "net.safetensors"
    trainer = new_trainer("SGD", dtype=dtype)
    fit(trainer)
    checkpoint.save(path, trainer.model)
    other = new_trainer("SGD", dtype=dtype, seed=2)
    arrays = list(other.model.params)
    checkpoint.load(path, other.model)
    assert all(p is q for p, q in zip(other.model.params, arrays, strict=True))
    assert everything(other)["params"] == everything(trainer)["params"]
    assert everything(other)["statistics"] == everything(trainer)["statistics"]
    assert everything(other)["dropout"] == everything(trainer)["dropout"]


class OwnNet:
    """A user-defined net: its own weights, a layer in an attribute, a loss with a weight."""

    def __init__(self, seed):
        rng = numpy.random.default_rng(seed)
        self.embed = Embedding(asarray(rng.standard_normal((4, 2))))
        self.loss = OwnLoss(seed)
        self.params = [*self.embed.params, asarray(rng.standard_normal(3)), asarray(rng.standard_normal((2, 0)))]
        self.grads = [np.zeros_like(p) for p in self.params]


class OwnLoss:
    def __init__(self, seed):
        self.params, self.grads = [asarray([float(seed)])], [np.zeros(1)]

    def forward(self, x, t):
        return x


def test_user_defined_model_needs_no_param_names(tmp_path):
    path, net, other = tmp_path / "net.safetensors", OwnNet(1), OwnNet(2)
    checkpoint.save(path, net)
    assert sorted(n for n in header(path) if n[0] != "_") == ["embed.W", "loss.params.0", "params.1", "params.2"]
    checkpoint.load(path, other)
    assert_equal(other, net)
    assert_equal(other.loss, net.loss)


def test_parameter_with_the_name_of_state_is_reported_missing(tmp_path):
    net, path = Sequential([MatMul(np.ones((2, 2)))]), tmp_path / "net.safetensors"
    net.state = MatMul(np.ones((2, 2)))
    checkpoint.save(path, net)
    with pytest.raises(ValueError, match=r"state\.W: in the file, but not in the model"):
        checkpoint.load(path, Sequential([MatMul(np.ones((2, 2)))]))


class Remembering(MatMul):
    """A user-defined layer with state of every type."""

    state_names = ("count", "note", "last", "history", "nothing")

    def __init__(self, seed):
        super().__init__(np.ones((2, 2)))
        self.count, self.note, self.nothing = seed, f"seed {seed}", None
        self.last, self.history = np.full(3, float(seed)), [np.full(2, 0.5 * seed), [np.zeros(seed)], 1.5 * seed]


def test_layer_state_of_numbers_strings_arrays_and_lists_is_saved(tmp_path):
    path, net, other = tmp_path / "net.safetensors", Sequential([Remembering(2)]), Sequential([Remembering(3)])
    checkpoint.save(path, net)
    checkpoint.load(path, other)
    (want,), (got,) = net.layers, other.layers
    assert (got.count, got.note, got.nothing, got.history[2]) == (2, "seed 2", None, 3.0)
    for a, b in zip(
        [got.last, got.history[0], *got.history[1]], [want.last, want.history[0], *want.history[1]], strict=True
    ):
        assert isinstance(a, np.ndarray)
        numpy.testing.assert_array_equal(to_cpu(a), to_cpu(b))


@pytest.mark.parametrize("what", [[np.ones(3)], {"W": np.ones(3)}])
def test_save_rejects_objects_that_are_not_models(what, tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint: expected a model, an object with params, got (list|dict)"):
        checkpoint.save(tmp_path / "net.safetensors", what)
    assert not list(tmp_path.iterdir())


def test_duplicate_array_names_are_an_error(tmp_path):
    net = OwnNet(1)
    for names in ({"param_names": ("", "w", "w")}, {"param_names": ("", "w"), "state_names": ("w",), "w": np.ones(3)}):
        vars(net).update(names)
        with pytest.raises(ValueError, match="OwnNet: two arrays are named w; param_names and state_names must be"):
            checkpoint.save(tmp_path / "net.safetensors", net)
    assert not list(tmp_path.iterdir())


def test_arrays_of_a_state_with_equal_paths_are_an_error(tmp_path):
    net = OwnNet(1)
    net.state_names, net.sums = ("sums",), {"a": {"b": np.ones(1)}, "a.b": np.ones(2)}
    with pytest.raises(ValueError, match=r"two arrays are named .*sums\.a\.b"):
        checkpoint.save(tmp_path / "net.safetensors", net)
    assert not list(tmp_path.iterdir())


class Branches:
    """A user-defined net with its layers in a dict of lists."""

    def __init__(self, seed):
        norms = [BatchNorm(np.ones(2), np.zeros(2)) for _ in range(2)]
        self.layers = {"first": norms[0], "blocks": [[ReLU()], [norms[1], Dropout(0.5, rng=seed)]]}
        self.layers["again"] = self.layers  # a reference cycle
        self.params, self.grads = [p for n in norms for p in n.params], [g for n in norms for g in n.grads]


def test_layers_in_dicts_and_nested_lists_are_saved(tmp_path):
    path, net, other = tmp_path / "net.safetensors", Branches(1), Branches(2)
    norm, dropout = net.layers["blocks"][1]
    norm.forward(np.asarray([[1.0, 2.0], [3.0, 5.0]]))
    checkpoint.save(path, net)
    assert "layers.blocks.1.0.running_var" in header(path)
    checkpoint.load(path, other)
    loaded, second = other.layers["blocks"][1]
    assert to_cpu(loaded.running_mean).tolist() == to_cpu(norm.running_mean).tolist() != [0, 0]
    assert second.seed == dropout.seed


def test_complex_weights_and_numpy_scalars_round_trip(tmp_path):
    path, net, other = tmp_path / "net.safetensors", OwnNet(1), OwnNet(2)
    for model, value in ((net, 1j), (other, 0)):
        model.params.append(np.full(3, value, "complex64"))
    optimizer, second = nnx.SGD(numpy.float32(0.5)), nnx.SGD(numpy.float32(0.1))
    checkpoint.save(path, net, optimizer)
    checkpoint.load(path, other, second)
    assert_equal(other, net)
    assert second.lr == 0.5


class OwnOptimizer:
    """A user-defined optimizer with state in attributes, some of which cannot be saved and are left unchanged."""

    def __init__(self):
        self.rate, self.h, self.schedule, self.note = 0.5, None, abs, "mine"

    def update(self, params, grads):
        self.h = self.h or [np.zeros_like(p) for p in params]
        for p, g, h in zip(params, grads, self.h, strict=True):
            h += g
            p -= self.rate * h
        self.rate *= 0.9


def test_user_defined_optimizer_resumes(tmp_path):
    x, t = nnx.spiral.load_data()
    path = tmp_path / "net.safetensors"
    model, optimizer = TwoLayerNet(2, 10, 3, rng=1), OwnOptimizer()
    other, second = TwoLayerNet(2, 10, 3, rng=2), OwnOptimizer()
    nnx.Trainer(model, optimizer, rng=0).fit(x, t, 1, verbose=False)
    checkpoint.save(path, model, optimizer)
    checkpoint.load(path, other, second)
    for net, opt in ((model, optimizer), (other, second)):
        nnx.Trainer(net, opt, rng=1).fit(x, t, 1, verbose=False)
    assert_equal(other, model)
    assert second.rate == optimizer.rate


def test_shared_weights_are_saved_once_and_stay_shared(tmp_path):
    path, model, other = tmp_path / "net.safetensors", new_model(seed=1), new_model(seed=2)
    checkpoint.save(path, model)
    assert "layers.4.W" not in header(path)
    checkpoint.load(path, other)
    assert_equal(other, model)
    other.layers[2].params[0][0, 1] = 7
    assert float(other.layers[4].params[0][1, 0]) == float(other.layers[5].params[0][0, 1]) == 7
    untied = Sequential([MatMul(np.zeros((6, 6), "float32")), MatMul(np.zeros((6, 6), "float32"))])
    tied = Sequential([MatMul(untied.params[0]), MatMul(untied.params[0].T)])
    checkpoint.save(path, tied)
    with pytest.raises(ValueError, match=r"layers\.1\.W: in the model, but not in the file"):
        checkpoint.load(path, untied)


def test_weights_of_any_layout_and_empty_weights_round_trip(tmp_path):
    path = tmp_path / "net.safetensors"
    W = asarray([[numpy.nan, numpy.inf, -0.0], [1, 2, 3]])
    model, other = Sequential([MatMul(W.T)]), Sequential([MatMul(np.zeros((3, 2)))])
    checkpoint.save(path, model)
    checkpoint.load(path, other)
    assert to_cpu(other.params[0]).tobytes() == to_cpu(W.T).tobytes("C")


def test_new_file_has_default_permissions(tmp_path):
    path, plain = tmp_path / "net.safetensors", tmp_path / "plain"
    checkpoint.save(path, TwoLayerNet(2, 10, 3))
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="rights and links of Unix")
def test_overwriting_keeps_permissions_and_symlinks(tmp_path):
    (tmp_path / "there").mkdir()
    path, link = tmp_path / "there" / "net.safetensors", tmp_path / "link.safetensors"
    checkpoint.save(path, TwoLayerNet(2, 10, 3, rng=1))
    path.chmod(0o600)
    link.symlink_to(path)
    model, other = TwoLayerNet(2, 10, 3, rng=2), TwoLayerNet(2, 10, 3, rng=3)
    checkpoint.save(link, model)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    checkpoint.load(path, other)
    assert_equal(other, model)


# PyTorch


def linear_file(path):
    """Write the file PyTorch saves for Sequential(Linear(4, 5), ReLU(), Linear(5, 3)); return its arrays."""
    rng = numpy.random.default_rng(0)
    shapes = {"0.weight": (5, 4), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,)}
    arrays = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    entries, data = {}, b""
    for name, a in arrays.items():
        entries[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [len(data), len(data) + a.nbytes]}
        data += a.tobytes()
    path.write_bytes(with_header({"__metadata__": {"format": "pt", "model": "a linear one"}, **entries}, data))
    return arrays


KEYS = {
    "0.weight": "layers.0.W",
    "0.bias": "layers.0.b",
    "2.weight": "layers.2.W",
    "2.bias": "layers.2.b",
}
TURNED = ["0.weight", "2.weight"]


def linear_net():
    shapes = ((4, 5), 5), ((5, 3), 3)
    (W1, b1), (W2, b2) = [(np.zeros(a, "float32"), np.zeros(b, "float32")) for a, b in shapes]
    return Sequential([Affine(W1, b1), ReLU(), Affine(W2, b2)])


def test_pytorch_layout_loads_and_saves(tmp_path):
    path, back, net = tmp_path / "torch.safetensors", tmp_path / "back.safetensors", linear_net()
    arrays = linear_file(path)
    checkpoint.load(path, net, keys=KEYS, transpose=TURNED)
    x = numpy.random.default_rng(1).standard_normal((7, 4)).astype("float32")
    hidden = numpy.maximum(x @ arrays["0.weight"].T + arrays["0.bias"], 0)
    numpy.testing.assert_allclose(to_cpu(net.predict(x)), hidden @ arrays["2.weight"].T + arrays["2.bias"], rtol=1e-5)
    checkpoint.save(back, net, keys=KEYS, transpose=TURNED)
    for name, array in safetensors.load_file(back).items():
        numpy.testing.assert_array_equal(array, arrays[name])
    checkpoint.load(back, net, keys=KEYS, transpose=TURNED)


def test_round_trip_through_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    path, net = tmp_path / "torch.safetensors", linear_net()
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    save_file(theirs.state_dict(), path)
    checkpoint.load(path, net, keys=KEYS, transpose=TURNED)
    x = numpy.random.default_rng(1).standard_normal((7, 4)).astype("float32")
    with torch.no_grad():
        numpy.testing.assert_allclose(to_cpu(net.predict(x)), theirs(torch.tensor(x)).numpy(), rtol=1e-5, atol=1e-6)
    net.params[0] *= 2
    checkpoint.save(path, net, keys=KEYS, transpose=TURNED)
    theirs.load_state_dict(load_file(path))
    with torch.no_grad():
        numpy.testing.assert_allclose(to_cpu(net.predict(x)), theirs(torch.tensor(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_keys_can_omit_arrays_of_a_file(tmp_path):
    path, first = tmp_path / "torch.safetensors", Sequential(linear_net().layers[:1])
    arrays = linear_file(path)
    some = {name: own for name, own in KEYS.items() if name[0] == "0"}
    with pytest.raises(ValueError, match=r"2\.bias: in the file, but not in the model"):
        checkpoint.load(path, first, keys=some, transpose=TURNED[:1])
    checkpoint.load(path, first, keys={**some, "2.weight": None, "2.bias": None}, transpose=TURNED[:1])
    numpy.testing.assert_array_equal(to_cpu(first.params[0]), arrays["0.weight"].T)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": {"a": "layers.7.W"}}, r"keys names layers\.7\.W, and the model has layers\.0\.W, layers\.0\.b, lay"),
        ({"keys": {"x": "layers.0.W", "layers.0.b": "layers.2.b"}}, "several arrays of the model the same name"),
        ({"keys": {"x": "layers.0.W", "y": "layers.0.W"}}, "an array of the model several names"),
        ({"transpose": ["layers.0.w"]}, r"transpose names layers\.0\.w, and the file has layers\.0\.W"),
    ],
)
def test_unknown_keys_are_rejected_by_load_and_save(options, words, tmp_path):
    path, net = tmp_path / "net.safetensors", linear_net()
    with pytest.raises(ValueError, match=words):
        checkpoint.save(path, net, **options)
    assert not list(tmp_path.iterdir())
    checkpoint.save(path, net)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(path, net, **options)


def square_net(value):
    W = numpy.arange(9, dtype="float32").reshape(3, 3) * value
    return Sequential([Affine(asarray(W), np.zeros(3, "float32")), Affine(asarray(W + 1), np.zeros(3, "float32"))])


@pytest.mark.parametrize("of", [iter, tuple, set, dict.fromkeys, numpy.array, lambda names: (n for n in names)])
def test_transpose_may_be_any_iterable_of_names(of, tmp_path):
    path, net, again = tmp_path / "net.safetensors", square_net(1), square_net(0)
    names = ["layers.0.W", "layers.1.W"]
    checkpoint.save(path, net, transpose=of(names))
    for name, p in zip(names, net.params[::2], strict=True):
        numpy.testing.assert_array_equal(safetensors.load_file(path)[name], to_cpu(p).T)
    checkpoint.load(path, again, transpose=of(names))
    assert_equal(again, net)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transpose": "W"}, r"transpose must be a list of names, such as \['W', 'b'\], got 'W'"),
        ({"transpose": b"W"}, r"transpose must be a list of names, such as .*, got \[87\]"),
        ({"transpose": [0]}, r"transpose must be a list of names, such as .*, got \[0\]"),
        ({"transpose": 3}, r"transpose must be a list of names, such as .*, got 3"),
        ({"transpose": None}, r"transpose must be a list of names, such as .*, got None"),
        ({"keys": "W"}, "keys must be a dict of names in the file to names in the model or None, got 'W'"),
        ({"keys": zip("ab", ["W", "b"], strict=True)}, "keys must be a dict of names in the file to names in the mod"),
        ({"keys": {0: "layers.0.W"}}, r"keys must be a dict of names .*, got \{0: 'layers\.0\.W'\}"),
        ({"keys": {"a": 0}}, "keys must be a dict of names"),
    ],
)
def test_keys_and_transpose_must_be_names(options, words, tmp_path):
    path, net = tmp_path / "net.safetensors", square_net(1)
    with pytest.raises(TypeError, match=words):
        checkpoint.save(path, net, **options)
    assert not list(tmp_path.iterdir())
    checkpoint.save(path, net)
    with pytest.raises(TypeError, match=words):
        checkpoint.load(path, net, **options)


@pytest.mark.parametrize("attribute", ["param_names", "state_names"])
@pytest.mark.parametrize("names", ["weight", iter(["weight"]), 3, (0,)])
def test_names_of_a_layer_must_be_a_list(attribute, names, tmp_path):
    layer = type("Own", (MatMul,), {attribute: names})(np.ones((2, 2), "float32"))
    with pytest.raises(TypeError, match=rf"Own\.{attribute} must be a list of names"):
        checkpoint.save(tmp_path / "net.safetensors", Sequential([layer]))
    assert not list(tmp_path.iterdir())


def test_names_of_a_callback_must_be_a_list():
    callback = type("Own", (), {"state_names": "count", "on_step": lambda self, trainer: None})()
    trainer = new_trainer()
    with pytest.raises(TypeError, match=r"Own\.state_names must be a list of names, such as .*, got 'count'"):
        fit(trainer, callbacks=[callback])
    assert trainer.current_epoch == trainer.iteration == 0


# Mismatches


def test_error_lists_every_mismatch_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "net.safetensors"
    checkpoint.save(
        path,
        Sequential(
            [
                Affine(np.ones((2, 3), "float32"), np.ones(3, "float32")),
                MatMul(np.ones((3, 3))),
                Dropout(0.5),
                MatMul(np.ones((3, 3), "float32")),
            ]
        ),
        nnx.Adam(),
    )
    model = Sequential(
        [
            Affine(np.zeros((2, 4), "float32"), np.zeros(4, "float32")),
            MatMul(np.zeros((3, 3), "float32")),
            MatMul(np.zeros((3, 3), "float32")),
        ]
    )
    before = values(model)
    with pytest.raises(ValueError, match="does not fit, and nothing was loaded") as error:
        checkpoint.load(path, model, nnx.Momentum())
    assert str(error.value).splitlines() == [
        f"{path} does not fit, and nothing was loaded:",
        "  layers.3.W: in the file, but not in the model",
        "  layers.0.W: float32 (2, 4) in the model, float32 (2, 3) in the file",
        "  layers.0.b: float32 (4,) in the model, float32 (3,) in the file",
        "  layers.1.W: float32 (3, 3) in the model, float64 (3, 3) in the file",
        "  layers.2.W: in the model, but not in the file",
        "  model.layers.2: in the file, but not here",
        "  optimizer.Adam: in the file, but not here",
        "  optimizer.Momentum: here, but not in the file",
    ]
    for p, q in zip(values(model), before, strict=True):
        numpy.testing.assert_array_equal(p, q)


@pytest.mark.skipif(nnx.GPU, reason="CuPy's arrays can all be written to")
def test_read_only_arrays_are_detected_before_any_is_written(tmp_path):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3, rng=1)
    checkpoint.save(path, TwoLayerNet(2, 10, 3, rng=2))
    model.params[2].flags.writeable = False
    before = values(model)
    with pytest.raises(ValueError, match=r"nothing was loaded:\n  layers\.2\.W: read-only in the model"):
        checkpoint.load(path, model)
    for p, q in zip(values(model), before, strict=True):
        numpy.testing.assert_array_equal(p, q)


def test_optimizer_settings_must_exist_with_the_right_type(tmp_path):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3)
    optimizer = nnx.SGD(0.5)
    optimizer.clip, optimizer.lr = 3.0, "fast"
    checkpoint.save(path, model, optimizer)
    mine = nnx.SGD(0.1)
    mine.other = 1
    with pytest.raises(ValueError, match=r"optimizer\.SGD\.clip: in the file") as error:
        checkpoint.load(path, model, mine)
    assert "optimizer.SGD.other: here, but not in the file" in str(error.value)
    assert "optimizer.SGD.lr: a number here, a string in the file" in str(error.value)
    assert mine.lr == 0.1


def test_optimizer_state_of_wrong_shape_is_rejected(tmp_path):
    path, trainer = tmp_path / "net.safetensors", new_trainer("Momentum")
    fit(trainer)
    trainer.optimizer.v[0] = np.zeros((3, 3), "float32")
    checkpoint.save(path, trainer.model, trainer.optimizer)
    with pytest.raises(ValueError, match=r"optimizer\.Momentum: v: not of the dtypes and shapes of its parameters"):
        checkpoint.load(path, trainer.model, nnx.Momentum())


def test_error_names_what_cannot_be_saved(tmp_path):
    path = tmp_path / "net.safetensors"
    model = Sequential([Dropout(0.5)])
    model.layers[0].seed = {"a": object()}
    with pytest.raises(TypeError, match=r"model\.layers\.0\.seed\.a cannot be saved: expected a number, a string"):
        checkpoint.save(path, model)
    with pytest.raises(TypeError, match=r"params\.0 is (longdouble|float128)"):
        checkpoint._atomic_save(path, {"params.0": numpy.zeros(3, numpy.longdouble)}, {})
    assert not path.exists()


class Growing(MatMul):
    """A layer whose state is set, and grows, in training."""

    state_names = ("mean", "seen", "pair")

    def __init__(self, W):
        super().__init__(W)
        self.mean, self.seen, self.pair = None, {}, (1, numpy.float32(0.1))


def test_state_may_be_set_and_grow_in_training(tmp_path):
    path, model, fresh = tmp_path / "net.safetensors", *(Sequential([Growing(np.ones((2, 2)))]) for _ in range(2))
    layer = model.layers[0]
    layer.mean, layer.seen = np.arange(3.0), {"e1": 1, "e2": [np.ones(2), (1, 2)]}
    checkpoint.save(path, model)
    checkpoint.load(path, fresh)
    loaded = fresh.layers[0]
    numpy.testing.assert_array_equal(to_cpu(loaded.mean), numpy.arange(3.0))
    assert loaded.seen["e1"] == 1
    assert loaded.seen["e2"][1] == (1, 2)
    assert loaded.pair == (1, numpy.float32(0.1))
    assert isinstance(loaded.pair[1], numpy.float32)


class Wrapper:
    """A user-defined optimizer that holds another one."""

    def __init__(self):
        self.inner = nnx.Momentum(0.1)

    def update(self, params, grads):
        self.inner.update(params, grads)


class Private(nnx.SGD):
    """Has hyperparameters that are properties, and names private state."""

    state_names = ("_seen",)

    def __init__(self):
        self._rate, self._seen = 0.1, 0
        super().__init__(0.1)

    @property
    def lr(self):
        return self._rate

    @lr.setter
    def lr(self, value):
        self._rate = value


def test_no_state_of_an_optimizer_is_lost(tmp_path):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3)
    with pytest.raises(TypeError, match=r"Wrapper\.inner: the state of an optimizer within another is not saved"):
        checkpoint.save(path, model, Wrapper())
    saved, loaded = Private(), Private()
    saved.lr, saved._seen = 0.025, 7
    checkpoint.save(path, model, saved)
    checkpoint.load(path, model, loaded)
    assert (loaded.lr, loaded._seen) == (0.025, 7)


def test_a_state_that_cannot_be_assigned_changes_nothing(tmp_path):
    class Fixed(MatMul):
        state_names = ("n",)
        n = property(lambda self: 3)

    path, models = tmp_path / "net.safetensors", [Sequential([Fixed(np.full((2, 2), v))]) for v in (1.0, 2.0)]
    checkpoint.save(path, models[0])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.n: a property without a setter here"):
        checkpoint.load(path, models[1])
    assert (to_cpu(models[1].params[0]) == 2).all()


def test_layers_in_attributes_named_like_the_parts_of_a_file_are_compared(tmp_path):
    class Net:
        def __init__(self, layers):
            self.model = Sequential([MatMul(np.ones((2, 2))) for _ in range(layers)])
            self.params, self.grads = self.model.params, self.model.grads

    path = tmp_path / "net.safetensors"
    checkpoint.save(path, Net(3))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.W: in the file, but not in the model"):
        checkpoint.load(path, Net(2))


def test_a_loss_without_params_may_have_state(tmp_path):
    class Counting(nnx.SoftmaxWithLoss):
        state_names = ("count",)

        def __init__(self, count):
            super().__init__()
            del self.params
            self.count = count

    path, nets = tmp_path / "net.safetensors", [Sequential([MatMul(np.ones((2, 2)))], Counting(n)) for n in (4, 2)]
    checkpoint.save(path, nets[0])
    checkpoint.load(path, nets[1])
    assert nets[1].loss_layer.count == 4


def test_subclasses_may_have_more_state_and_less(tmp_path):
    class Noted(Dropout):
        state_names = (*Dropout.state_names, "note")
        note = "x"

    class History(nnx.callbacks.EarlyStopping):
        state_names = (*nnx.callbacks.EarlyStopping.state_names, "history")
        history = ()

    class Light(nnx.callbacks.BestWeights):
        state_names = ("best", "epoch")

    first, sigmoid, last = TwoLayerNet(2, 4, 3).layers
    trainer = nnx.Trainer(Sequential([first, sigmoid, Noted(0.5), last], nnx.SoftmaxWithLoss()), nnx.SGD())
    x, t = nnx.spiral.load_data()
    options = {"validation": (x, t), "verbose": False}
    trainer.fit(x, t, 1, 100, callbacks=[History(), Light(), Checkpoint(tmp_path)], **options)
    trainer.resume(tmp_path)
    trainer.fit(x, t, 2, 100, callbacks=[History(), Light()], **options)
    assert trainer.current_epoch == 2


def test_files_of_another_format_are_not_set_aside(tmp_path, monkeypatch):
    fit(new_trainer(), Checkpoint(tmp_path))
    names = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "_FORMAT", "3")
    with pytest.raises(ValueError, match="this version of nnx loads format 3, got '2'"):
        new_trainer().resume(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_state_too_long_to_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_METADATA", 10)
    with pytest.raises(
        OSError, match=r"not saved: the state has \d+ characters, more than 10; keep long lists in arrays"
    ):
        checkpoint.save(tmp_path / "net.safetensors", new_model())


# Failed saves


def test_failed_save_keeps_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3)
    checkpoint.save(path, model)
    before = path.read_bytes()
    for function in ("save_file", "_fsync"):
        with monkeypatch.context() as patch:
            target = safetensors if function == "save_file" else checkpoint
            patch.setattr(target, function, lambda *args: (_ for _ in ()).throw(OSError("the disk is gone")))
            with pytest.raises(OSError, match=r"net\.safetensors: not saved: the disk is gone"):
                checkpoint.save(path, model)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before
    with pytest.raises(OSError, match=r"nowhere/net\.safetensors: not saved: "):
        checkpoint.save(tmp_path / "nowhere" / path.name, model)


def test_error_says_how_to_install_safetensors(tmp_path, monkeypatch):
    path, model = tmp_path / "net.safetensors", TwoLayerNet(2, 10, 3)
    checkpoint.save(path, model)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for function in (checkpoint.save, checkpoint.load):
        with pytest.raises(ImportError, match=r"nnx saves and loads with safetensors: pip install safetensors"):
            function(path, model)
    with pytest.raises(ImportError, match="pip install"):  # at once, not after an epoch
        fit(new_trainer(), Checkpoint(tmp_path / "folder"))


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    checkpoint.save("~/net.safetensors", square_net(1))
    checkpoint.load("~/net.safetensors", square_net(2))
    assert (tmp_path / "net.safetensors").is_file()
    assert nnx.callbacks.Checkpoint("~/run").folder == tmp_path / "run"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links of Unix")
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop of links"])
def test_only_a_regular_file_is_replaced(kind, tmp_path):
    path = tmp_path / "net.safetensors"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop of links": lambda: path.symlink_to(path)}[kind]()
    with pytest.raises(OSError, match=r"net\.safetensors"):
        checkpoint.save(path, square_net(1))
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert not path.is_file()


@pytest.mark.parametrize("refused", ["fsync of the folder", "chmod"])
def test_what_is_refused_after_the_file_is_whole_is_a_warning(refused, tmp_path, monkeypatch):
    """As on network file systems."""
    fsync, path = os.fsync, tmp_path / "net.safetensors"

    def refuse(*arguments):
        if refused == "chmod" or stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
            raise PermissionError("refused")
        fsync(*arguments)

    monkeypatch.setattr(*((os, "fsync") if refused != "chmod" else (Path, "chmod")), refuse)
    with pytest.warns(RuntimeWarning, match=r"net\.safetensors: saved, but .*: refused"):
        checkpoint.save(path, square_net(3))
    loaded = square_net(1)
    checkpoint.load(path, loaded)
    assert_equal(loaded, square_net(3))


def test_files_are_flushed_by_descriptors_open_for_writing(tmp_path, monkeypatch):
    """Windows refuses to flush others."""
    fsync, flags = os.fsync, []

    def noted(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.write(descriptor, b"")
            flags.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.save(tmp_path / "net.safetensors", square_net(1))
    assert len(flags) == 1
