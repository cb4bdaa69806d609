"""Layers and models from sizes and from files, prediction in batches, probabilities, and PyTorch's layout."""

import fractions
import functools
import json
import tracemalloc

import numpy
import pytest

import nnx
from nnx import (
    GELU,
    Adam,
    Affine,
    BatchNorm,
    Dropout,
    Embedding,
    LayerNorm,
    MatMul,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SigmoidWithLoss,
    SoftmaxWithLoss,
    Sum,
    Tanh,
    Trainer,
    TwoLayerNet,
    checkpoint,
    initializers,
    layers,
    np,
    to_cpu,
)
from nnx.models import load, mlp

pytest.importorskip("safetensors")


def assert_equal(a, b):
    numpy.testing.assert_array_equal(to_cpu(a), to_cpu(b))


@pytest.mark.parametrize(
    ("make", "initializer"),
    [
        (Affine.init, initializers.xavier),
        (MatMul.init, initializers.xavier),
        (Embedding.init, initializers.normal),
        (functools.partial(Affine.init, initializer=initializers.he), initializers.he),
    ],
)
def test_weights_are_drawn_as_the_initializers_draw_them(make, initializer):
    layer = make(7, 5, rng=3)
    assert_equal(layer.params[0], initializer((7, 5), rng=3))
    assert layer.params[0].dtype == np.float32
    assert make(7, 5, dtype="float64", rng=numpy.random.default_rng(3)).params[0].dtype == np.float64
    for b in layer.params[1:]:
        assert b.dtype == np.float32
        assert_equal(b, numpy.zeros(5))


def test_norms_begin_with_ones_and_zeros():
    layer = BatchNorm.init(4, dtype="float64", momentum=0.5)
    assert_equal(layer.params[0], numpy.ones(4))
    assert_equal(layer.params[1], numpy.zeros(4))
    assert (layer.momentum, layer.params[0].dtype) == (0.5, np.float64)
    assert LayerNorm.init(4, eps=0.1).eps == 0.1


def test_a_subclass_is_initialized_as_itself():
    class Own(Affine):
        pass

    assert type(Own.init(2, 3)) is Own
    assert Own.init(2, 3, input_grad=False).input_grad is False


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Affine.init(2, 0), ValueError, "Affine.init: output_size must be at least 1, got 0"),
        (
            lambda: Affine.init(2, 3, initializer="he"),
            TypeError,
            r"Affine.init: initializer must be a function of \(sh",
        ),
        (lambda: Affine.init(2, 3, dtype="int32"), TypeError, "Affine.init: dtype must be float16, float32 or float64"),
        (
            lambda: Affine.init(2, 3, initializer=lambda s, dtype, rng: np.ones(s[::-1], dtype)),
            ValueError,
            "shape .2, 3.",
        ),
        (lambda: Affine.init(2, 3, initializer=lambda s, dtype, rng: np.ones(s)), ValueError, "float32 array of shape"),
        (lambda: Affine.init(2, 3, initializer=lambda s, dtype, rng: [[0]]), ValueError, "return a float32 array"),
        (lambda: mlp([3, 2], dropout=7), ValueError, "mlp: dropout must be in"),
        (lambda: Affine(30, 16), TypeError, "Affine: W must be .*, got int; Affine.init makes a layer from sizes"),
        (lambda: LayerNorm.init(2.5), TypeError, "LayerNorm.init: size must be an integer, got 2.5"),
        (lambda: mlp([3]), ValueError, r"mlp: sizes must hold the number of inputs and of outputs, .* got \[3\]"),
        (lambda: mlp([3, 2], activation="swish"), ValueError, "mlp: activation must be one of relu, .* got 'swish'"),
        (lambda: mlp([3, 4, 2], dropout=1.0), ValueError, r"mlp: dropout must be in \[0, 1\)"),
    ],
)
def test_invalid_sizes_and_options_are_rejected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mlp_has_these_layers():
    model = mlp([784, 512, 10], activation="relu", batch_norm=True, dropout=0.2, rng=0)
    assert [type(layer) for layer in model.layers] == [Affine, BatchNorm, ReLU, Dropout, Affine]
    assert [layer.params[0].shape for layer in (model.layers[0], model.layers[4])] == [(784, 512), (512, 10)]
    assert (model.layers[0].input_grad, model.layers[4].input_grad) == (False, True)
    assert type(model.loss_layer) is SoftmaxWithLoss
    assert model.layers[3].dropout_ratio == 0.2
    rng = numpy.random.default_rng(0)
    assert_equal(model.layers[0].params[0], initializers.he((784, 512), rng=rng))
    for name, layer, initializer in (("gelu", GELU, initializers.he), ("tanh", Tanh, initializers.xavier)):
        model = mlp([3, 4, 5, 2], activation=name, loss_layer=MeanSquaredError(), dtype="float64", rng=1)
        assert [type(each) for each in model.layers] == [Affine, layer, Affine, layer, Affine]
        assert_equal(model.layers[0].params[0], initializer((3, 4), dtype="float64", rng=1))
        assert type(model.loss_layer) is MeanSquaredError
    assert [type(layer) for layer in mlp([3, 4, 2], activation=None).layers] == [Affine, Affine]
    assert [type(layer) for layer in mlp(numpy.array([3, 4, 2]), activation="sigmoid").layers] == [
        Affine,
        Sigmoid,
        Affine,
    ]


def test_mlp_learns():
    x, t = nnx.spiral.load_data()
    trainer = Trainer(mlp([2, 32, 32, 3], batch_norm=True, rng=0), Adam(0.01), rng=0)
    trainer.fit(x, t, 40, 30, verbose=False)
    assert trainer.model.evaluate(x, t)[1] > 0.95


@pytest.mark.parametrize("batch_size", [1, 7, 50, 51, 100])
def test_prediction_in_batches_is_that_of_the_whole(rng, batch_size):
    model, x = mlp([6, 9, 4], dropout=0.3, batch_norm=True, rng=0), rng.standard_normal((50, 6))
    y = model.predict(x, batch_size=batch_size)
    assert y.dtype == np.float32
    numpy.testing.assert_allclose(to_cpu(y), to_cpu(model.predict(x)), rtol=1e-5, atol=1e-6)
    assert model.predict(x[:0], batch_size).shape == (0, 4)


def test_prediction_in_batches_needs_the_memory_of_a_batch(rng):
    model, x = mlp([20, 2000, 3], rng=0), rng.standard_normal((4000, 20)).astype("float32")
    tracemalloc.start()
    try:
        model.predict(x, batch_size=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # the hidden layer of all rows takes 32 MB


def test_prediction_in_batches_refuses_a_model_that_mixes_rows(rng):
    model = Sequential([Affine.init(3, 2), Sum()])
    with pytest.raises(
        ValueError, match=r"Sequential.predict: .* one row of output for each row of x, got shape \(1, 2"
    ):
        model.predict(rng.standard_normal((5, 3)), batch_size=2)
    with pytest.raises(ValueError, match=r"Sequential.predict: batch_size must be at least 1, got 0"):
        model.predict(rng.standard_normal((5, 3)), batch_size=0)


def test_probabilities_are_those_of_the_loss_layer(rng):
    x = rng.standard_normal((9, 4))
    model = mlp([4, 5, 3], rng=0)
    y = to_cpu(model.predict_proba(x))
    scores = numpy.exp(to_cpu(model.predict(x)))
    numpy.testing.assert_allclose(y, scores / scores.sum(axis=1, keepdims=True), rtol=1e-5)
    numpy.testing.assert_allclose(to_cpu(model.predict_proba(x, 2)), y, rtol=1e-5)
    model = mlp([4, 5, 1], loss_layer=SigmoidWithLoss(), rng=0)
    expected = 1 / (1 + numpy.exp(-to_cpu(model.predict(x))))
    numpy.testing.assert_allclose(to_cpu(model.predict_proba(x)), expected, rtol=1e-5)
    for loss in (MeanSquaredError(), None):
        with pytest.raises(TypeError, match=r"Sequential.predict_proba: \w+ has no probabilities\(scores\)"):
            Sequential(model.layers, loss).predict_proba(x)


def nets():
    W = np.asarray(initializers.normal((4, 4), 0.5, rng=1))
    return {
        "mlp": mlp([4, 8, 8, 3], activation="gelu", batch_norm=True, dropout=0.4, rng=0),
        "TwoLayerNet": TwoLayerNet(4, 5, 3, dtype="float64", rng=0),
        "tied and nested": Sequential(
            [
                MatMul(W, input_grad=False),
                Sequential([LayerNorm.init(4, eps=0.01), MatMul(W.T), Tanh()]),
                Affine.init(4, 3),
            ],
            SoftmaxWithLoss([1.0, 2.5, 0.1], ignore_label=-1),
        ),
        "regression": mlp([4, 3], loss_layer=MeanSquaredError(), rng=0),
    }


@pytest.mark.parametrize("name", nets())
def test_a_loaded_model_is_the_saved_one(name, rng, tmp_path):
    model, path = nets()[name], tmp_path / "net.safetensors"
    x = rng.standard_normal((20, 4))
    t = rng.standard_normal((20, 3)) if name == "regression" else rng.integers(0, 3, 20)
    trainer = Trainer(model, Adam(0.01), rng=0)
    trainer.fit(x, t, 2, 5, verbose=False)
    checkpoint.save(path, model, trainer.optimizer, trainer)
    numpy.random.seed(5)
    again = load(path)
    assert numpy.random.random() == numpy.random.RandomState(5).random()  # NumPy's generator was not used
    assert type(again) is type(model)
    assert repr(again) == repr(model)
    assert_equal(again.predict(x), model.predict(x))
    assert again.forward(x, t) == model.forward(x, t)  # dropout continues with the saved state
    assert again.evaluate(x, t) == model.evaluate(x, t)
    for net in (model, again):
        Trainer(net, Adam(0.01), rng=1).fit(x, t, 2, 5, verbose=False)  # ties are kept
    for p, q in zip(model.params, again.params, strict=True):
        assert_equal(p, q)


def test_a_model_of_other_classes_is_refused_by_name(tmp_path):
    class Own(ReLU):
        pass

    class Net(TwoLayerNet):
        pass

    path = tmp_path / "net.safetensors"
    for model, message in (
        (Sequential([Affine.init(2, 3), Own()]), r"layers\.1 is a Own \(.*\), not a class of nnx"),
        (Net(2, 3, 2), r"the model is a Net \(.*\), not a class of nnx; .* use checkpoint.load"),
    ):
        checkpoint.save(path, model)
        with pytest.raises(ValueError, match=message):
            load(path)


def test_layers_that_cannot_be_found_again_are_refused_and_repeated_ones_are_kept(tmp_path):
    class Loss:
        def forward(self, x, t):
            return ((x - t) ** 2).mean()

        def backward(self, dout=1):
            return dout

    path = tmp_path / "net.safetensors"
    checkpoint.save(path, Sequential([Affine.init(3, 2)], Loss()))
    with pytest.raises(ValueError, match=r"Loss is a Loss \(user-defined\), not a class of nnx"):
        load(path)
    shared = Affine.init(3, 3)
    checkpoint.save(path, Sequential([Sequential([shared]), Sequential([shared, ReLU()])]))
    model = load(path)
    assert [len(inner.layers) for inner in model.layers] == [1, 2]
    assert model.layers[0].layers[0] is model.layers[1].layers[0]


@pytest.mark.parametrize(
    "options",
    [{"transpose": ["layers.0.W"]}, {"keys": {"weight": "layers.0.W"}, "transpose": ["weight"]}, {"layout": "torch"}],
)
def test_a_model_saved_under_other_names_is_loaded(options, tmp_path):
    path, model = tmp_path / "net.safetensors", mlp([4, 4, 3], rng=0)
    checkpoint.save(path, model, **options)
    for p, q in zip(load(path).params, model.params, strict=True):
        assert_equal(p, q)


def test_settings_of_any_number_type_are_kept(tmp_path):
    path = tmp_path / "net.safetensors"
    numbers = (fractions.Fraction(1, 4), numpy.float64(0.25), numpy.array(0.25), numpy.longdouble(0.25), np.array(0.25))
    checkpoint.save(path, Sequential([Affine.init(3, 2), *map(Dropout, numbers)]))
    assert [float(layer.dropout_ratio) for layer in load(path).layers[1:]] == [0.25] * 5


def test_settings_too_long_to_be_loaded_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_MAX_METADATA", 1000)
    with pytest.raises(OSError, match=r"not saved: the state has \d+ characters, more than 1000"):
        checkpoint.save(tmp_path / "net.safetensors", Sequential([], SoftmaxWithLoss(numpy.ones(300))))


def test_a_file_of_another_library_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"W": numpy.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: was not written by checkpoint.save"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"layers.0": {"class": "os.system", "module": "nnx.layers"}},
        {"layers.0": {"class": "__builtins__", "module": "nnx"}},
        {"layers.0": {"class": "Affine", "module": "nnx.layers.linear", "params": ["layers.9.W"]}},
        {"layers.0": {"class": "Affine", "module": "nnx.layers.linear", "params": [[]]}},
        {"layers.0": {"class": "Affine", "module": "nnx.layers.linear", "params": "layers.0.W"}},
        {
            "layers.0": {
                "class": "Affine",
                "module": "nnx.layers.linear",
                "params": ["layers.0.W", "layers.0.b"],
                "a": 1,
            }
        },
        {"layers.0": {"class": 3, "module": "nnx.layers.linear"}},
        {"layers.1": {"class": "Repeat", "module": "nnx.layers.graph", "N": "x"}},
        {"layers.1": {"class": "Dropout", "module": "nnx.layers", "dropout_ratio": [0.5]}},
        {"layers.0": {"class": "ReLU", "module": "nnx.layers"}},
        {"": {}},
        {"metadata": {"nnx.names": "[]"}},
        {"metadata": {"nnx.names": '{"keys": 3, "transpose": []}'}},
        {"metadata": {"nnx.names": '{"keys": {}, "transpose": "W"}'}},
        {"metadata": {"nnx.names": "[" * 100000}},
        {"loss_layer": {"class": "ReLU", "module": "nnx.layers"}},
        {"layers." * n + "0": {"class": "Sequential", "module": "nnx.models"} for n in range(1, 3000)},
    ],
)
def test_forged_settings_are_refused(change, tmp_path):
    path, model = tmp_path / "net.safetensors", Sequential([Affine.init(2, 3), ReLU()], SoftmaxWithLoss())
    checkpoint.save(path, model)
    file = checkpoint._read(path)
    arrays = {name: file.read(name) for name in file.arrays}
    metadata = {"nnx.format": "2", "nnx.state": "{}", "nnx.names": '{"keys": {}, "transpose": []}'}
    metadata |= change.pop("metadata", {})
    metadata["nnx.layers"] = json.dumps({**file.layers, **change})
    checkpoint._atomic_save(path, arrays, metadata)
    with pytest.raises(ValueError, match=r"net.safetensors"):
        load(path)


def torch_nets():
    """Return a model and the same one in PyTorch."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1),
        torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False), torch.nn.LayerNorm(6)),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Linear(6, 3),
    )
    with torch.no_grad():
        theirs(torch.randn(50, 4) * 2 + 1)  # running statistics
        for p in theirs.parameters():
            p += torch.randn_like(p) / 10
    inner = Sequential([MatMul.init(8, 6), LayerNorm.init(6)])
    layers = [Affine.init(4, 8), BatchNorm.init(8), ReLU(), Dropout(0.0), inner, GELU(), Affine.init(6, 3)]
    return Sequential(layers, SoftmaxWithLoss()), theirs.eval()


def test_weights_pass_to_and_from_pytorch_without_a_map(rng, tmp_path):
    model, theirs = torch_nets()
    import torch
    from safetensors.torch import load_file, save_file

    path, x = tmp_path / "torch.safetensors", rng.standard_normal((9, 4)).astype("float32")
    save_file(theirs.state_dict(), path)
    checkpoint.load(path, model, layout="torch")
    with torch.no_grad():
        numpy.testing.assert_allclose(to_cpu(model.predict(x)), theirs(torch.tensor(x)), rtol=1e-4, atol=1e-5)
        for p in model.params:
            p *= 1.5
        checkpoint.save(path, model, layout="torch")
        theirs.load_state_dict(load_file(path))
        numpy.testing.assert_allclose(to_cpu(model.predict(x)), theirs(torch.tensor(x)), rtol=1e-4, atol=1e-5)


def recurrent_torch_nets(kind, bias):
    """Return a layer and the same one in PyTorch, with a function for its result."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    cells = {"RNN": torch.nn.RNNCell, "LSTM": torch.nn.LSTMCell}
    if kind in cells:
        theirs = cells[kind](4, 3, bias=bias)
        states = [numpy.full((5, 3), 0.25, "float32")] * (1 + (kind == "LSTM"))
        given = [torch.tensor(state) for state in states]

        def result(x):
            return theirs(x, tuple(given) if kind == "LSTM" else given[0])

    else:
        name, states = kind.removeprefix("Time").removeprefix("Bi"), []
        theirs = getattr(torch.nn, name)(4, 3, batch_first=True, bidirectional="Bi" in kind, bias=bias)

        def result(x):
            return theirs(x)[0]

    if kind == "TimeBiLSTM":
        (W1, U1, b1), (W2, U2, b2) = (layers.TimeLSTM.init(4, 3).params for _ in range(2))
        return layers.TimeBiLSTM(W1, U1, b1, W2, U2, b2), theirs, states, result
    layer = getattr(layers, kind).init(4, 3)
    return (layer if bias else type(layer)(*layer.params[:2])), theirs, states, result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "TimeRNN", "TimeLSTM", "TimeBiLSTM"])
def test_weights_of_recurrent_layers_pass_to_and_from_pytorch(kind, bias, rng, tmp_path):
    if kind == "TimeBiLSTM" and not bias:
        pytest.skip("needs its biases")
    layer, theirs, states, result = recurrent_torch_nets(kind, bias)
    import torch
    from safetensors.torch import load_file, save_file

    path, x = tmp_path / "torch.safetensors", rng.standard_normal((5, 6, 4)).astype("float32")
    x = x if kind.startswith("Time") else x[:, 0]

    def assert_same(layer):
        for ours, expected in zip(as_list(layer.forward(x, *states)), as_list(result(torch.tensor(x))), strict=True):
            numpy.testing.assert_allclose(to_cpu(ours), expected, rtol=1e-5, atol=1e-6)

    def as_list(value):
        return list(value) if isinstance(value, tuple) else [value]

    with torch.no_grad():
        save_file({f"0.{name}": p for name, p in theirs.state_dict().items()}, path)
        model = Sequential([layer])
        checkpoint.load(path, model, layout="torch")
        assert_same(layer)
        for p in layer.params:
            p *= 1.5
        checkpoint.save(path, model, layout="torch")
        theirs.load_state_dict({name.removeprefix("0."): p for name, p in load_file(path).items()})
        assert_same(layer)
        assert_same(load(path).layers[0])


def test_a_language_model_passes_to_pytorch(rng, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    model = Sequential([layers.TimeEmbedding.init(9, 4), layers.TimeLSTM.init(4, 3), layers.TimeAffine.init(3, 9)])
    checkpoint.save(tmp_path / "torch.safetensors", model, layout="torch")
    theirs = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LSTM(4, 3, batch_first=True), torch.nn.Linear(3, 9))
    theirs.load_state_dict(load_file(tmp_path / "torch.safetensors"))
    idx = rng.integers(0, 9, (2, 5))
    with torch.no_grad():
        expected = theirs[2](theirs[1](theirs[0](torch.tensor(idx)))[0])
    numpy.testing.assert_allclose(to_cpu(model.predict(idx)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [layers.GRU, layers.TimeGRU])
def test_a_gru_has_no_layout_of_pytorch(kind, tmp_path):
    words = rf"layers.0.: PyTorch's GRU applies the reset gate after .*; layout=\"torch\" has no {kind.__name__}"
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "a.safetensors", Sequential([kind.init(2, 3)]), layout="torch")


def test_biases_of_unequal_shapes_are_not_added(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.numpy import load_file, save_file

    path, model = tmp_path / "a.safetensors", Sequential([layers.TimeLSTM.init(2, 3)])
    checkpoint.save(path, model, layout="torch")
    arrays = load_file(path)
    assert not arrays["0.bias_hh_l0"].any()
    save_file(arrays | {"0.bias_hh_l0": numpy.ones(1, "float32")}, path)
    with pytest.raises(ValueError, match=r"0.bias_hh_l0: in the file, but not in the model"):
        checkpoint.load(path, model, layout="torch")


def test_the_layout_of_pytorch_has_its_names_and_transposes(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "torch.safetensors"
    inner = Sequential([LayerNorm.init(3)])
    model = Sequential([Embedding.init(10, 4), Affine.init(4, 3), BatchNorm.init(3), inner])
    checkpoint.save(path, model, layout="torch")
    shapes = {name: array.shape for name, array in load_file(path).items()}
    norm = dict.fromkeys(("2.weight", "2.bias", "2.running_mean", "2.running_var", "3.0.weight", "3.0.bias"), (3,))
    assert shapes == {"0.weight": (10, 4), "1.weight": (3, 4), "1.bias": (3,), **norm}
    before = [to_cpu(p).copy() for p in model.params]
    for p in model.params:
        p *= 2
    checkpoint.load(path, model, layout="torch")
    for p, q in zip(model.params, before, strict=True):
        assert_equal(p, q)


def test_a_layout_that_does_not_fit_is_refused(tmp_path):
    class Scale:
        def __init__(self):
            self.params, self.grads = [np.ones(3)], [np.zeros(3)]

        forward = backward = None

    path, model = tmp_path / "torch.safetensors", TwoLayerNet(2, 3, 2)
    with pytest.raises(ValueError, match=r'layout must be "torch" or None, .* got \'keras\''):
        checkpoint.save(path, model, layout="keras")
    with pytest.raises(ValueError, match="takes no keys and transpose"):
        checkpoint.save(path, model, layout="torch", transpose=["0.weight"])
    with pytest.raises(ValueError, match=r'layers.0.params.0 has no name in the layout "torch"; pass keys'):
        checkpoint.save(path, Sequential([Scale()]), layout="torch")
    with pytest.raises(ValueError, match=r"layers.2.: PyTorch scales dropout otherwise"):
        checkpoint.save(path, mlp([2, 3, 2], dropout=0.5), layout="torch")
    assert not path.exists()
    layer = Affine.init(2, 3)
    checkpoint.save(path, layer, layout="torch")
    checkpoint.load(path, layer, layout="torch")
