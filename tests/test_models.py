"""Sequential and TwoLayerNet: results, side effects, printing."""

import collections
import copy
import pickle
import threading

import numpy
import pytest

import nnx
from benchmarks import book
from nnx import Affine, MeanSquaredError, Sequential, Sigmoid, SoftmaxWithLoss, TwoLayerNet, layers, np, to_cpu


def data(rng, n=6):
    return rng.standard_normal((n, 2)).astype("float32"), rng.integers(0, 3, n)


def trained(rng):
    net = TwoLayerNet(2, 4, 3, rng=0)
    x, t = data(rng)
    net.forward(x, t)
    net.backward()
    return net, x, t


class Doubling:
    """A user-defined layer that distinguishes training from prediction."""

    params, grads = [], []

    def forward(self, x, train_flg=True):
        self.seen = x
        return x * 2 if train_flg else x

    def backward(self, dout):
        return dout * 2


@pytest.mark.parametrize("labels", ["indices", "one-hot"])
def test_two_layer_net_matches_the_book(rng, labels):
    net = TwoLayerNet(4, 5, 3, dtype="float64", rng=1, input_grad=True)
    reference = book.TwoLayerNet(*(to_cpu(p).copy() for p in net.params))
    x, t = rng.standard_normal((7, 4)), rng.integers(0, 3, 7)
    t = numpy.eye(3, dtype=int)[t] if labels == "one-hot" else t
    assert float(net.forward(x, t)) == pytest.approx(reference.forward(x, t), abs=1e-6)
    numpy.testing.assert_allclose(to_cpu(net.backward()), reference.backward(), rtol=1e-10, atol=1e-15)
    for g, expected in zip(net.grads, reference.grads, strict=True):
        numpy.testing.assert_allclose(to_cpu(g), expected, rtol=1e-10, atol=1e-15)
    numpy.testing.assert_allclose(to_cpu(net.predict(x)), reference.predict(x), rtol=1e-12)


def test_training_skips_the_gradient_of_the_data(rng):
    net, _, _ = trained(rng)
    assert net.backward() is None
    assert TwoLayerNet(2, 4, 3).params[0].dtype == np.float32


def test_predict_does_not_change_the_model(rng):
    net, x, _ = trained(rng)
    before = [to_cpu(g).copy() for g in net.grads]
    first = net.predict(x)
    kept = to_cpu(first).copy()
    net.predict(x[:1] + 5)
    numpy.testing.assert_array_equal(to_cpu(first), kept)
    assert len(net.layers[0].x) == len(x)
    net.backward()
    for g, b in zip(net.grads, before, strict=True):
        numpy.testing.assert_array_equal(to_cpu(g), b)
    fresh = TwoLayerNet(2, 4, 3)
    fresh.predict(x)
    assert not hasattr(fresh.layers[0], "x")


def test_predict_passes_train_flg():
    layer = Doubling()
    net = Sequential([Sequential([layer])])
    assert float(net.predict(np.ones((1, 1)))[0, 0]) == 1
    assert not hasattr(layer, "seen")
    assert float(net.forward(np.ones((1, 1)))[0, 0]) == 2


def test_a_sequential_is_a_layer(rng):
    x, t = data(rng)
    inner = [Affine(np.ones((2, 4), "float32"), np.zeros(4, "float32")), Sigmoid()]
    last = Affine(np.ones((4, 3), "float32"), np.zeros(3, "float32"))
    nested = Sequential([Sequential(inner), last], SoftmaxWithLoss())
    flat = Sequential([*inner, last], SoftmaxWithLoss())
    assert all(a is b for a, b in zip(nested.params, flat.params, strict=True))
    assert float(nested.forward(x, t)) == float(flat.forward(x, t))
    numpy.testing.assert_array_equal(to_cpu(nested.backward()), to_cpu(flat.backward()))


def test_evaluate_in_batches_matches_a_single_batch(rng):
    net, x, t = trained(rng)
    loss, accuracy = net.evaluate(x, t)
    assert loss == pytest.approx(float(net.forward(x, t)))
    assert accuracy == pytest.approx((to_cpu(net.predict(x)).argmax(axis=1) == t).mean())
    assert net.evaluate(x, t, batch_size=4) == pytest.approx((loss, accuracy))
    assert net.evaluate(x, numpy.eye(3, dtype=int)[t], batch_size=4) == pytest.approx((loss, accuracy))
    assert all(isinstance(value, float) for value in (loss, accuracy))


def test_evaluate_of_a_regression_has_no_accuracy(rng):
    net = Sequential([Affine(np.zeros((2, 1)), np.ones(1))], MeanSquaredError())
    assert net.evaluate(rng.standard_normal((5, 2)), numpy.zeros((5, 1)), batch_size=2) == (1.0, None)


@pytest.mark.parametrize("t", [[0, 1], [], 0])
def test_evaluate_rejects_unequal_numbers_of_rows(t):
    with pytest.raises(ValueError, match=r"TwoLayerNet.evaluate: x and t must have the same number of rows"):
        TwoLayerNet(2, 3, 3).evaluate(numpy.zeros((3, 2)), t)


def test_evaluate_needs_a_loss():
    with pytest.raises(ValueError, match=r"Sequential.evaluate: there is no loss layer"):
        Sequential([Sigmoid()]).evaluate([[1.0]], [0])


def test_copies_are_independent_and_complete(rng):
    net, x, t = trained(rng)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(p is q for p, q in zip(other.params, other.layers[0].params + other.layers[2].params, strict=True))
        before = to_cpu(net.params[0]).copy()
        other.forward(x, t)
        other.backward()
        nnx.SGD(1.0).update(other.params, other.grads)
        numpy.testing.assert_array_equal(to_cpu(net.params[0]), before)
        assert (to_cpu(other.params[0]) != before).any()


def test_deepcopy_preserves_shared_weights(rng):
    """The weight itself, a view of it, and its transpose inside a nested model."""
    W = np.asarray(before := rng.standard_normal((3, 3)))
    inner = Sequential([nnx.MatMul(W.T), Sigmoid(), nnx.MatMul(W)])
    net = Sequential([nnx.MatMul(W), Sigmoid(), inner, nnx.MatMul(W[:])], SoftmaxWithLoss())
    optimizer = nnx.Momentum()
    optimizer.update(*nnx.trainer.remove_duplicate(net.params, net.grads))
    twin, same = copy.deepcopy((net, optimizer))
    assert len(nnx.trainer.remove_duplicate(twin.params, twin.grads)[0]) == 1
    assert same.params[0] is twin.params[0]
    numpy.testing.assert_array_equal(to_cpu(twin.params[0]), before)
    twin.params[0][...] = new = np.arange(9.0).reshape(3, 3)
    layers = [twin.layers[0], *twin.layers[2].layers[::2], twin.layers[3]]
    for layer, p, expected in zip(layers, twin.params, [new, new.T, new, new], strict=True):
        assert layer.params[0] is p
        numpy.testing.assert_array_equal(to_cpu(p), to_cpu(expected))
    numpy.testing.assert_array_equal(to_cpu(W), before)


def test_deepcopy_preserves_sharing_with_a_layer_copied_first(rng):
    W = np.asarray(rng.standard_normal((3, 3)))
    decoder = nnx.MatMul(W.T)
    layer, twin = copy.deepcopy([decoder, Sequential([nnx.MatMul(W), decoder])])
    assert twin.layers[1] is layer
    twin.params[0][...] = np.arange(9.0).reshape(3, 3)
    numpy.testing.assert_array_equal(to_cpu(layer.params[0]), numpy.arange(9.0).reshape(3, 3).T)


def test_deepcopy_uses_getstate_of_a_user_defined_model():
    class Locked(Sequential):
        def __init__(self):
            super().__init__([nnx.MatMul(np.ones((2, 2)))])
            self.history, self.lock = [1], threading.Lock()

        def __getstate__(self):
            return {**vars(self), "lock": None}

    net = Locked()
    twin = copy.deepcopy(net)
    twin.history.append(2)
    assert (net.history, twin.lock) == ([1], None)
    assert net.params[0] is not twin.params[0] is twin.layers[0].params[0]


class Block:
    """A user-defined layer with nested layers in an attribute, a list and a dict, without train_flg."""

    def __init__(self):
        self.affine = nnx.Affine(np.ones((4, 4)), np.zeros(4))
        self.norms, self.last = [nnx.BatchNorm(np.ones(4), np.zeros(4))], {"dropout": nnx.Dropout(0.5, rng=0)}
        self.params, self.grads = self.affine.params, self.affine.grads

    def forward(self, x):
        return self.last["dropout"].forward(self.norms[0].forward(self.affine.forward(x)))

    def backward(self, dout):
        return self.affine.backward(self.norms[0].backward(self.last["dropout"].backward(dout)))


def test_a_layer_that_holds_layers_which_take_train_flg_must_pass_it_on():
    message = r"Sequential: layers\[1\], Block, holds BatchNorm, which needs train_flg: let forward of the outer layer"
    with pytest.raises(TypeError, match=message):
        Sequential([Sigmoid(), Block()])


class Passing(Block):
    """Passes its options on."""

    def forward(self, x, **options):
        x = self.norms[0].forward(self.affine.forward(x), **options)
        return self.last["dropout"].forward(x, **options)


class Neighbour(nnx.ReLU):
    """Refers to a layer of the same model without calling it."""

    def __init__(self, other):
        super().__init__()
        self.other = other


def test_layers_that_need_not_pass_train_flg_on_are_accepted(rng):
    norm, x = nnx.BatchNorm(np.ones(4), np.zeros(4)), np.asarray(rng.standard_normal((6, 4)))
    Sequential([norm, Neighbour(norm)])
    passing = Passing()
    net = Sequential([passing])
    once = to_cpu(net.predict(x))
    assert (to_cpu(net.predict(x)) == once).all()
    assert passing.last["dropout"].calls == 0
    with pytest.raises(TypeError, match=r"Sequential: layers\[0\] must be a layer, .*; NoneType has no params"):
        Sequential([None])
    with pytest.raises(TypeError, match=r"Sequential: layers must be a list of layers, got ReLU"):
        Sequential(nnx.ReLU(), nnx.ReLU())
    with pytest.raises(TypeError, match=r"Sequential: layers\[1\] is a loss, SoftmaxWithLoss; pass it as loss_layer"):
        Sequential([nnx.ReLU(), SoftmaxWithLoss()])
    with pytest.raises(TypeError, match=r"Sequential: loss_layer must be a loss with forward\(x, t\), got ReLU"):
        Sequential([nnx.ReLU()], nnx.ReLU())


class PredictingBlock(Block):
    def predict(self, x):
        x = copy.copy(self.affine).forward(x)
        x = copy.copy(self.norms[0]).forward(x, train_flg=False)
        return copy.copy(self.last["dropout"]).forward(x, train_flg=False)


def test_predict_does_not_change_a_nested_layer_that_defines_it(rng):
    block = PredictingBlock()
    net, x = Sequential([block], nnx.MeanSquaredError()), np.asarray(rng.standard_normal((6, 4)))
    net.forward(x, x)
    before = pickle.dumps(net)
    once = to_cpu(net.predict(x + 100))
    assert (to_cpu(net.predict(x + 100)) == once).all()
    assert net.evaluate(x, x) == net.evaluate(x, x)
    assert pickle.dumps(net) == before
    net.backward()  # of the previous forward
    assert block.affine.x is x


class Positional:
    """A user-defined layer that passes train_flg on, and has arbitrary and custom attributes."""

    def __init__(self, dropout):
        self.inner = nnx.Affine(np.ones((4, 4)), np.zeros(4))
        self.params, self.grads = self.inner.params, self.inner.grads
        self.both = Pair(dropout, self)
        self.bag = {"self": None}
        self.bag["self"] = self.bag
        self.plain = Plain()

    def __setattr__(self, name, value):
        if isinstance(value, Plain):
            self.params.extend(value.params)
        super().__setattr__(name, value)

    def forward(self, x, train_flg=True):
        return self.plain.forward(self.both.dropout.forward(self.inner.forward(x), train_flg))

    def backward(self, dout):
        raise AssertionError("not called")


Pair = collections.namedtuple("Pair", "dropout holder")


class Plain:
    def __init__(self):
        self.params, self.grads = [np.ones(1)], [np.zeros(1)]
        self.forward = lambda x, t=None: 2 * x
        self.backward = lambda dout=1: 2 * dout


class Slotted:
    __slots__ = ("grads", "params")

    def __init__(self):
        self.params, self.grads = [], []

    def forward(self, x, train_flg=True):
        return x if train_flg else 3 * x

    def backward(self, dout):
        raise AssertionError("not called")


def test_predict_with_user_defined_layers_of_any_kind(rng):
    layer = Positional(nnx.Dropout(0.5, rng=0))
    net, x = Sequential([layer, Slotted()]), np.asarray(rng.standard_normal((6, 4)))
    before = len(layer.params)
    y = to_cpu(net.predict(x))
    numpy.testing.assert_allclose(y, 3 * 2 * 0.5 * to_cpu(x.dot(np.ones((4, 4)))))
    assert len(layer.params) == before
    numpy.testing.assert_array_equal(to_cpu(net.predict(x)), y)


def test_model_does_not_keep_replaced_arrays():
    net = Sequential([nnx.MatMul(np.ones((300, 300)))])
    net.layers[0] = nnx.MatMul(np.ones((2, 2)))
    net.params, net.grads = net.layers[0].params, net.layers[0].grads
    assert len(pickle.dumps(net)) < 10_000


class Wrapper:
    """A user-defined layer around another one."""

    def __init__(self, layer):
        self.layer, self.params, self.grads = layer, layer.params, layer.grads
        self.forward, self.backward = layer.forward, layer.backward


@pytest.mark.parametrize("outer", [lambda layer: Sequential([layer]), Wrapper])
def test_reset_state_reaches_the_stateful_layers_within_others(rng, outer):
    lstm = layers.TimeLSTM.init(3, 4, rng=0, stateful=True)
    model = Sequential([outer(lstm), layers.ReLU()])
    xs = np.asarray(rng.standard_normal((2, 5, 3)))
    first, second = model.forward(xs), model.forward(xs)
    model.reset_state()
    assert lstm.h is None
    assert lstm.c is None
    assert not (first == second).all()
    assert (model.forward(xs) == first).all()


def test_layer_classes_are_rejected():
    with pytest.raises(TypeError, match=r"Sequential: layers\[1\] must be a layer, got the class ReLU; make one"):
        Sequential([Sigmoid(), nnx.ReLU])
    with pytest.raises(TypeError, match="Sequential: loss_layer must be a layer, got the class SoftmaxWithLoss"):
        Sequential([Sigmoid()], SoftmaxWithLoss)


def test_a_printed_model_counts_a_shared_weight_once_and_needs_no_params_of_a_loss():
    W = np.zeros((3, 3))
    loss_layer = Plain()
    del loss_layer.params
    net = Sequential([nnx.MatMul(W), nnx.MatMul(W.T)], loss_layer)
    assert repr(net).endswith(") 9 parameters, float64")


def test_a_printed_model_shows_layers_shapes_and_parameters():
    assert repr(TwoLayerNet(2, 10, 3)).splitlines() == [
        "TwoLayerNet(",
        "  Affine(2, 10, input_grad=False)            30",
        "  Sigmoid()                                   0",
        "  Affine(10, 3)                              33",
        "  SoftmaxWithLoss()                           0",
        ") 63 parameters, float32",
    ]
    assert repr(Sequential([Doubling()])).endswith(") 0 parameters, no weights")


def test_evaluate_accumulates_in_float64(rng):
    x, t = rng.standard_normal((2000, 2)), rng.integers(0, 3, 2000)
    net = Sequential([Affine(np.zeros((2, 3), "float16"), np.asarray([0, 0, 100], dtype="float16"))], SoftmaxWithLoss())
    expected = 100 * (t != 2).mean()  # times 2000 rows this overflows float16
    assert net.evaluate(x, t, batch_size=200)[0] == pytest.approx(expected, rel=1e-3)


def test_evaluate_does_not_change_the_loss_layer(rng):
    net, x, t = trained(rng)
    y = net.loss_layer.y
    net.evaluate(x[:1], t[:1])
    assert net.loss_layer.y is y


@pytest.mark.parametrize("batch_size", [0, -5])
def test_evaluate_rejects_invalid_batch_sizes(batch_size):
    with pytest.raises(ValueError, match=r"TwoLayerNet.evaluate: batch_size must be at least 1, got"):
        TwoLayerNet(2, 3, 3).evaluate([[1.0, 2.0]], [0], batch_size)


def test_duplicate_layers_are_rejected():
    layer = Sigmoid()
    with pytest.raises(ValueError, match="Sequential: a layer occurs twice"):
        Sequential([layer, layer])


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid"])
def test_an_activation_that_the_loss_applies_again_is_a_warning(kind, rng):
    loss, other = getattr(layers, f"{kind}WithLoss"), {"Softmax": "SigmoidWithLoss", "Sigmoid": "SoftmaxWithLoss"}[kind]
    affine, last = nnx.Affine.init(2, 3), getattr(layers, kind)()
    for sequence in ([affine, last], [affine, Sequential([last])]):
        words = (
            rf"^Sequential: {kind}WithLoss applies {kind.lower()} to the result of the last layer, {kind}, again; leave"
        )
        with pytest.warns(RuntimeWarning, match=words) as caught:
            Sequential(sequence, loss())
        assert caught[0].filename == __file__
        Sequential(sequence)
        Sequential(sequence, getattr(layers, other)())
        Sequential(sequence, nnx.MeanSquaredError())
    Sequential([last, affine], loss())
    Sequential([], loss())
