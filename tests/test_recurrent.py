"""Recurrent layers: the book's formulas, PyTorch's, states, ignored labels, tied weights, modes, errors."""

import copy
import pickle

import numpy
import pytest
from cases import FromState, recurrent

import nnx
from nnx import GPU, Sequential, checkpoint, layers, models, np, to_cpu
from nnx.layers import (
    GRU,
    LSTM,
    RNN,
    Affine,
    Simple_TimeSoftmaxWithLoss,
    TimeAffine,
    TimeBiLSTM,
    TimeDropout,
    TimeEmbedding,
    TimeGRU,
    TimeLSTM,
    TimeRNN,
    TimeSigmoidWithLoss,
    TimeSoftmaxWithLoss,
)
from nnx.testing import check_gradients

KINDS = [TimeRNN, TimeLSTM, TimeGRU]
CELLS = {TimeRNN: RNN, TimeLSTM: LSTM, TimeGRU: GRU}
SIZES = [(1, 1, 1, 1), (3, 5, 4, 2), (1, 4, 3, 5), (7, 1, 2, 6), (20, 3, 17, 33)]  # N, T, D, H


def normal(*shape, dtype="float64", seed=0):
    return np.asarray(numpy.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype))


def sigmoid(x):
    return 1 / (1 + numpy.exp(-x))


def reference(kind, xs, h, c, Wx, Wh, b):
    """Return hs and the last h and c, by the book's formulas, one step after the other."""
    H, hs = len(Wh), []
    for x in numpy.moveaxis(xs, 1, 0):
        if kind is TimeRNN:
            h = numpy.tanh(x @ Wx + h @ Wh + b)
        elif kind is TimeLSTM:
            f, g, i, o = numpy.split(x @ Wx + h @ Wh + b, 4, axis=1)
            c = sigmoid(f) * c + numpy.tanh(g) * sigmoid(i)
            h = sigmoid(o) * numpy.tanh(c)
        else:
            z, r = (sigmoid(x @ Wx[:, k] + h @ Wh[:, k] + b[k]) for k in (slice(H), slice(H, 2 * H)))
            k = numpy.tanh(x @ Wx[:, 2 * H :] + (r * h) @ Wh[:, 2 * H :] + b[2 * H :])
            h = (1 - z) * h + z * k
        hs.append(h)
    return numpy.stack(hs, axis=1), h, c


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_formulas_are_the_books(kind, size):
    N, T, D, H = size
    xs, h, c = normal(N, T, D), normal(N, H), normal(N, H, seed=1)
    layer = recurrent(kind, D, H, stateful=True)("float64")
    layer.set_state(*(h, c)[: 1 + (kind is TimeLSTM)])
    hs, last_h, last_c = reference(kind, *map(to_cpu, (xs, h, c, *layer.params)))
    numpy.testing.assert_allclose(to_cpu(layer.forward(xs)), hs, rtol=1e-12, atol=1e-12)
    numpy.testing.assert_allclose(to_cpu(layer.h), last_h, rtol=1e-12, atol=1e-12)
    if kind is TimeLSTM:
        numpy.testing.assert_allclose(to_cpu(layer.c), last_c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_equals_its_cell_step_by_step(kind):
    layer, cell = recurrent(kind)("float64"), recurrent(CELLS[kind])("float64")
    xs, dhs, states = normal(2, 3, 4), normal(2, 3, 3), [np.zeros((2, 3))] * (1 + (kind is TimeLSTM))
    hs, total, steps = layer.forward(xs), [np.zeros_like(p) for p in cell.params], []
    for t in range(3):
        result = cell.forward(xs[:, t], *states)
        steps.append(copy.copy(cell))
        states = list(result) if isinstance(result, tuple) else [result]
        numpy.testing.assert_allclose(to_cpu(states[0]), to_cpu(hs[:, t]), atol=1e-14)
    dxs, dstates = layer.backward(dhs), [np.zeros((2, 3))] * len(states)
    for t in reversed(range(3)):
        dx, *dstates = steps[t].backward(dhs[:, t] + dstates[0], *dstates[1:])
        total = [a + g for a, g in zip(total, cell.grads, strict=True)]
        numpy.testing.assert_allclose(to_cpu(dx), to_cpu(dxs[:, t]), atol=1e-14)
    numpy.testing.assert_allclose(to_cpu(dstates[0]), to_cpu(layer.dh), atol=1e-14)
    for a, g in zip(total, layer.grads, strict=True):
        numpy.testing.assert_allclose(to_cpu(a), to_cpu(g), atol=1e-13)


@pytest.mark.parametrize(("N", "T"), [(1, 1), (1, 3), (2, 1), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_initial_states_are_numerically_right(kind, N, T):
    layer = FromState(recurrent(kind, stateful=True)("float64"))
    states = [normal(N, 3, seed=k) for k in range(1 + (kind is TimeLSTM))]
    check_gradients(layer, *map(to_cpu, (normal(N, T, 4), *states)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stateful_layer_continues_where_it_stopped(kind):
    xs = normal(2, 6, 4)
    whole, parts, stateless = (recurrent(kind, stateful=s)("float64") for s in (False, True, False))
    hs = whole.forward(xs)
    for _ in range(2):
        joined = np.concatenate([parts.forward(xs[:, :2]), parts.forward(xs[:, 2:])], axis=1)
        numpy.testing.assert_allclose(to_cpu(joined), to_cpu(hs), atol=1e-14)
        parts.reset_state()
        assert parts.h is None
    assert (stateless.forward(xs[:, :2]) == stateless.forward(xs[:, :2])).all()
    numpy.testing.assert_array_equal(to_cpu(whole.h), to_cpu(hs[:, -1]))


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_kept_apart_from_results(kind):
    layer, xs = recurrent(kind, stateful=True)("float64"), normal(2, 3, 4)
    h = normal(2, 3)
    given = h.copy()
    layer.set_state(h)
    hs = layer.forward(xs)
    kept = layer.h.copy()
    hs[...] = 0
    assert (layer.h == kept).all()
    assert (h == given).all()


def test_set_state_without_c_starts_from_zeros_as_in_the_book():
    layer, xs = recurrent(TimeLSTM, stateful=True)("float64"), normal(2, 3, 4)
    layer.forward(xs)
    layer.set_state(to_cpu(normal(2, 3)))  # a host array is moved
    hs, *_ = reference(TimeLSTM, to_cpu(xs), to_cpu(normal(2, 3)), 0, *map(to_cpu, layer.params))
    numpy.testing.assert_allclose(to_cpu(layer.forward(xs)), hs, atol=1e-14)


def test_predict_leaves_the_state_and_a_pending_backward_alone():
    for make in (recurrent(TimeLSTM, stateful=True), recurrent(TimeBiLSTM, stateful=True)):
        layer, xs = make("float64"), normal(2, 3, 4)
        model = Sequential([layer])
        dhs = np.ones_like(model.forward(xs))
        inner = getattr(layer, "forward_lstm", layer)
        before, h = model.backward(dhs), inner.h.copy()
        model.predict(-xs)
        assert (model.backward(dhs) == before).all()
        assert (inner.h == h).all()


def test_both_directions_of_the_bidirectional_layer_read_the_sequence_in_their_order():
    layer, xs = recurrent(TimeBiLSTM)("float64"), normal(2, 5, 4)
    hs = to_cpu(layer.forward(xs))
    zeros = numpy.zeros((2, 3))
    weights = [*map(to_cpu, layer.params)]
    first, *_ = reference(TimeLSTM, to_cpu(xs), zeros, zeros, *weights[:3])
    second, *_ = reference(TimeLSTM, to_cpu(xs)[:, ::-1], zeros, zeros, *weights[3:])
    numpy.testing.assert_allclose(hs, numpy.concatenate([first, second[:, ::-1]], axis=2), atol=1e-14)
    assert layer.forward_lstm.params[0] is layer.params[0]


def test_a_stateful_bidirectional_layer_keeps_the_states_of_both_directions():
    layer, xs = recurrent(TimeBiLSTM, stateful=True)("float64"), normal(2, 6, 4)
    assert layer.stateful
    parts = [to_cpu(layer.forward(block)) for block in (xs[:, :4], xs[:, 4:])]
    weights, states = [*map(to_cpu, layer.params)], [(numpy.zeros((2, 3)),) * 2] * 2
    for hs, block in zip(parts, (to_cpu(xs)[:, :4], to_cpu(xs)[:, 4:]), strict=True):
        first, *states[0] = reference(TimeLSTM, block, *states[0], *weights[:3])
        second, *states[1] = reference(TimeLSTM, block[:, ::-1], *states[1], *weights[3:])
        numpy.testing.assert_allclose(hs, numpy.concatenate([first, second[:, ::-1]], axis=2), atol=1e-14)
    with pytest.raises(ValueError, match=r"^TimeLSTM: the state h must have shape \(3, 3\).*reset_state"):
        layer.forward(normal(3, 2, 4))
    layer.reset_state()
    assert layer.forward(normal(3, 2, 4)).shape == (3, 2, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_bias_equals_one_with_a_bias_of_zeros(kind, tmp_path):
    layer, xs = recurrent(kind, stateful=True)("float64"), normal(2, 3, 4)
    Wx, Wh, b = layer.params
    b[...] = 0
    plain = kind(Wx, Wh, stateful=True)
    assert (plain.forward(xs) == layer.forward(xs)).all()
    assert (plain.backward(xs[..., :3]) == layer.backward(xs[..., :3])).all()
    assert len(CELLS[kind](Wx, Wh).params) == len(plain.params) == len(plain.grads) == 2
    pytest.importorskip("safetensors")
    checkpoint.save(tmp_path / "model.safetensors", Sequential([plain]))
    assert (models.load(tmp_path / "model.safetensors").forward(xs) == plain.forward(xs)).all()


# ---- PyTorch ----------------------------------------------------------------------------------------

SHAPES = [*SIZES, *numpy.random.default_rng(11).integers(1, [9, 9, 21, 21], (45, 4)).tolist()]


@pytest.fixture
def torch():
    if GPU:
        pytest.skip("compares two libraries on the CPU")
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the shapes are small
    yield torch
    torch.set_num_threads(threads)


def tensor(torch, a):
    """Return a copy of an array as a tensor; a floating one with a gradient."""
    return torch.tensor(to_cpu(a).copy(), requires_grad=a.dtype.kind == "f")


def split(a, count):
    return numpy.split(to_cpu(a), count, axis=-1)


def as_torch(weights, order):
    """Return weight_ih, weight_hh and bias_ih of PyTorch, whose gates have this order in the ones of nnx."""
    blocks = (split(w, len(order)) for w in weights)
    return [numpy.concatenate([b[k] for k in order], axis=-1).T for b in blocks]


def peer_of(layer, kind, order, **options):
    """Return a layer of PyTorch with the weights of `layer`; the second bias is 0."""
    D, H = len(layer.params[0]), len(layer.params[1])
    peer = kind(D, H, batch_first=True, **options)
    weights = [as_torch(layer.params[i : i + 3], order) for i in range(0, len(layer.params), 3)]
    parameters = [p for p in peer.parameters() if p.ndim]
    for i, p in enumerate(parameters):
        block, kind_of = divmod(i, 4)
        p.data = p.new_tensor(weights[block][kind_of].copy()) if kind_of < 3 else p.data * 0
    return peer, [p for i, p in enumerate(parameters) if i % 4 < 3]


@pytest.mark.parametrize("kind", [TimeRNN, TimeLSTM])
def test_results_and_gradients_are_those_of_pytorch(torch, kind):
    """50 shapes, from given states: hs, the last states, and the gradients of xs, of the states and of the weights."""
    order = {TimeRNN: [0], TimeLSTM: [2, 0, 1, 3]}[kind]  # PyTorch: i, f, g, o
    for N, T, D, H in SHAPES:
        layer = recurrent(kind, D, H, stateful=True)("float32")
        peer, parameters = peer_of(layer, getattr(torch.nn, kind.__name__.removeprefix("Time")), order)
        states = [normal(N, H, dtype="float32", seed=k) for k in (2, 3)[: len(layer._states)]]
        xs, dhs = normal(N, T, D, dtype="float32"), normal(N, T, H, dtype="float32", seed=1)
        x, *initial = (tensor(torch, a) for a in (xs, *states))
        given = tuple(state[None] for state in initial)
        hs, last = peer(x, given if kind is TimeLSTM else given[0])
        hs.backward(torch.from_numpy(dhs))
        layer.set_state(*states)
        close(layer.forward(xs), hs.detach())
        for name, state in zip(layer._states, last if kind is TimeLSTM else [last], strict=True):
            close(getattr(layer, name), state[0].detach())
        close(layer.backward(dhs), x.grad)
        for name, state in zip(layer._states, initial, strict=True):
            close(getattr(layer, f"d{name}"), state.grad)
        for ours, p in zip(as_torch(layer.grads, order), parameters, strict=True):
            close(ours, p.grad)


def test_the_bidirectional_layer_is_that_of_pytorch(torch):
    for N, T, D, H in SHAPES:
        layer = recurrent(TimeBiLSTM, D, H)("float32")
        peer, parameters = peer_of(layer, torch.nn.LSTM, [2, 0, 1, 3], bidirectional=True)
        xs, dhs = normal(N, T, D, dtype="float32"), normal(N, T, 2 * H, dtype="float32", seed=1)
        x = tensor(torch, xs)
        hs, _ = peer(x)
        hs.backward(torch.from_numpy(dhs))
        close(layer.forward(xs), hs.detach())
        close(layer.backward(dhs), x.grad)
        grads = [g for i in (0, 3) for g in as_torch(layer.grads[i : i + 3], [2, 0, 1, 3])]
        for ours, p in zip(grads, parameters, strict=True):
            close(ours, p.grad)


def test_a_gru_has_the_gradients_of_pytorchs_autograd(torch):
    """The formula is the book's, with r before the product, which torch.nn.GRU does not have."""
    for N, T, D, H in SHAPES:
        layer = recurrent(TimeGRU, D, H, stateful=True)("float32")
        xs, dhs, h0 = (normal(*s, dtype="float32", seed=1) for s in ((N, T, D), (N, T, H), (N, H)))
        x, start, Wx, Wh, b = (tensor(torch, a) for a in (xs, h0, *layer.params))
        h, hs = start, []
        for t in range(T):
            a = x[:, t] @ Wx + b
            z, r = (torch.sigmoid(a[:, k] + h @ Wh[:, k]) for k in (slice(H), slice(H, 2 * H)))
            h = (1 - z) * h + z * torch.tanh(a[:, 2 * H :] + (r * h) @ Wh[:, 2 * H :])
            hs.append(h)
        hs = torch.stack(hs, dim=1)
        hs.backward(torch.from_numpy(dhs))
        layer.set_state(h0)
        close(layer.forward(xs), hs.detach())
        for ours, leaf in zip((layer.backward(dhs), layer.dh, *layer.grads), (x, start, Wx, Wh, b), strict=True):
            close(ours, leaf.grad)


def test_a_gru_whose_reset_gate_is_open_is_torch_nn_gru(torch):
    """With r = 1 the formulas agree, but for z and 1 - z, which negated weights exchange."""
    for N, T, D, H in SHAPES:
        layer = recurrent(TimeGRU, D, H)("float32")
        Wx, Wh, b = layer.params
        Wx[:, H : 2 * H] = Wh[:, H : 2 * H] = 0
        b[H : 2 * H] = 100
        peer, parameters = peer_of(layer, torch.nn.GRU, [1, 0, 2])
        for p in parameters:
            p.data[H : 2 * H] *= -1
        xs, dhs = normal(N, T, D, dtype="float32"), normal(N, T, H, dtype="float32", seed=1)
        x = tensor(torch, xs)
        hs, _ = peer(x)
        hs.backward(torch.from_numpy(dhs))
        close(layer.forward(xs), hs.detach())
        close(layer.backward(dhs), x.grad)
        for ours, p in zip(as_torch(layer.grads, [1, 0, 2]), parameters, strict=True):
            sign = numpy.repeat([1, -1, 1], H)
            close(ours, (p.grad.numpy().T * sign).T)


def test_embedding_and_loss_are_those_of_pytorch(torch):
    rng = numpy.random.default_rng(0)
    for N, T, V, H in SHAPES:
        idx, t = rng.integers(0, V, (2, N, T))
        t.ravel()[rng.permutation(N * T)[: rng.integers(0, N * T)]] = -1
        class_weight = rng.uniform(0.5, 2, V).astype("float32") if N % 2 else None
        W, U = normal(V, H, dtype="float32"), normal(H, V, dtype="float32")
        embedding, affine = TimeEmbedding(W), TimeAffine(U, np.zeros(V, "float32"))
        loss_layer = TimeSoftmaxWithLoss(class_weight)
        loss = loss_layer.forward(affine.forward(embedding.forward(idx)), t)
        embedding.backward(affine.backward(loss_layer.backward()))
        w, u = tensor(torch, W), tensor(torch, U)
        scores = (torch.nn.functional.embedding(torch.from_numpy(idx), w) @ u).reshape(-1, V)
        options = {} if class_weight is None else {"weight": torch.from_numpy(class_weight)}
        expected = torch.nn.functional.cross_entropy(scores, torch.from_numpy(t).ravel(), ignore_index=-1, **options)
        expected.backward()
        close(loss, expected.detach())
        close(embedding.grads[0], w.grad)
        close(affine.grads[0], u.grad)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():  # NaN in PyTorch
    layer = TimeSoftmaxWithLoss()
    assert float(layer.forward(normal(2, 3, 4), numpy.full((2, 3), -1))) == 0
    assert not layer.backward().any()


def close(ours, expected):
    ours, expected = to_cpu(ours), numpy.asarray(expected)
    numpy.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * max(1, abs(expected).max()))


# ---- losses, dropout --------------------------------------------------------------------------------


def test_ignored_positions_count_toward_neither_loss_nor_gradient():
    x, t = normal(2, 3, 4), numpy.array([[0, -1, 2], [-1, 3, -1]])
    x[0, 1], x[1, 0] = numpy.inf, numpy.nan  # saturated scores, which are NaN in the book
    layer, plain = TimeSoftmaxWithLoss(), layers.SoftmaxWithLoss()
    kept = t.ravel() >= 0
    expected = plain.forward(x.reshape(6, 4)[numpy.flatnonzero(kept)], t.ravel()[kept])
    numpy.testing.assert_allclose(float(layer.forward(x, t)), float(expected), rtol=1e-12)
    first, dx = layer.backward(), numpy.zeros((6, 4))
    dx[kept] = to_cpu(plain.backward())
    numpy.testing.assert_allclose(to_cpu(first), dx.reshape(2, 3, 4), atol=1e-15)
    assert (layer.backward() == first).all()


def test_labels_may_be_one_hot_but_not_below_minus_1():
    x, t = normal(2, 3, 4), numpy.array([[0, 1, 2], [3, 3, 0]])
    layer = TimeSoftmaxWithLoss()
    assert float(layer.forward(x, numpy.eye(4, dtype=int)[t])) == float(layer.forward(x, t))
    with pytest.raises(ValueError, match=r"^TimeSoftmaxWithLoss: labels must be in \[0, 4\), got -2"):
        layer.forward(x, t - 2)
    with pytest.raises(ValueError, match=r"^Simple_TimeSoftmaxWithLoss: labels must be in \[0, 4\), got -1"):
        Simple_TimeSoftmaxWithLoss().forward(x, t - 1)


@pytest.mark.parametrize("kind", [TimeSoftmaxWithLoss, TimeSigmoidWithLoss, Simple_TimeSoftmaxWithLoss])
def test_backward_leaves_its_argument_alone(kind):
    sigmoid = kind is TimeSigmoidWithLoss
    layer, dout = kind(), np.ones(())
    layer.forward(normal(2, 3) if sigmoid else normal(2, 3, 4), numpy.ones((2, 3), int))
    first = layer.backward(dout)
    assert float(dout) == 1
    assert (layer.backward(dout) == first).all()


def test_time_dropout_scales_in_training_and_passes_x_on_in_inference():
    layer, xs = TimeDropout(0.25, rng=0), np.ones((50, 4, 25), "float32")
    ys = to_cpu(layer.forward(xs))
    assert {*numpy.unique(ys)} == {0, numpy.float32(1 / 0.75)}
    assert abs(ys.mean() - 1) < 0.02
    assert (layer.backward(xs) == layer.mask).all()
    layer.train_flg = False  # as the book's models do
    again = layer.forward(xs)
    assert (again == xs).all()
    assert again is not xs
    assert (layer.backward(xs) == xs).all()
    layer.train_flg = True
    assert (layer.forward(xs, train_flg=False) == xs).all()
    assert layer.train_flg is True
    assert (Sequential([layer]).predict(xs) == xs).all()
    assert (layer.forward(xs) == 0).any()


def test_time_dropout_draws_the_masks_of_dropout():
    xs = np.ones((5, 4, 3))
    ours, other = TimeDropout(0.5, rng=1).forward(xs), layers.Dropout(0.5, rng=1).forward(xs)
    assert (ours == 2 * other).all()


# ---- weights ----------------------------------------------------------------------------------------


def language_model(V=7, D=4, H=4, dtype="float64", tied=True, **settings):
    embedding = TimeEmbedding.init(V, D, dtype=dtype, rng=0)
    affine = (
        TimeAffine(embedding.params[0].T, np.zeros(V, dtype)) if tied else TimeAffine.init(H, V, dtype=dtype, rng=2)
    )
    return Sequential([embedding, TimeLSTM.init(D, H, dtype=dtype, rng=1, **settings), affine], TimeSoftmaxWithLoss())


def test_weights_tied_by_a_transposed_view_train_as_one():
    model = language_model()
    W, before = model.params[0], model.params[0].copy()
    xs, ts = numpy.arange(12).reshape(3, 4) % 7, (numpy.arange(12).reshape(3, 4) + 1) % 7
    first = float(model.forward(xs, ts))
    for _ in range(200):
        model.forward(xs, ts)
        model.backward()
        params, grads = nnx.tree.TiedParameters(model.params).sum_tied_gradients(model.params, model.grads)
        assert len(params) == len(model.params) - 1
        nnx.SGD(1.0).update(params, grads)
    assert float(model.forward(xs, ts)) < 0.2 * first
    assert np.may_share_memory(model.layers[-1].params[0], W)
    assert bool((before != W).any())


def test_layers_keep_the_callers_arrays():
    weights = [normal(4, 12), normal(3, 12), normal(12)]
    layer = TimeLSTM(*weights)
    assert all(p is w for p, w in zip(layer.params, weights, strict=True))
    turned = TimeLSTM(normal(12, 4).T, np.asfortranarray(weights[1]), weights[2])
    plain = TimeLSTM(np.ascontiguousarray(turned.params[0]), *weights[1:])
    xs = normal(2, 3, 4)
    for layer in (turned, plain):
        layer.forward(xs)
        layer.backward(np.ones((2, 3, 3)))
    for a, b in zip(turned.grads, plain.grads, strict=True):
        numpy.testing.assert_allclose(to_cpu(a), to_cpu(b), atol=1e-13)


@pytest.mark.parametrize("kind", [*KINDS, TimeBiLSTM])
def test_copies_have_arrays_of_their_own(kind):
    layer, xs = recurrent(kind, stateful=True)("float64"), normal(2, 3, 4)
    layer.forward(xs)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (copied.forward(xs) == copy.deepcopy(layer).forward(xs)).all()
        assert not np.may_share_memory(copied.params[0], layer.params[0])


def test_weights_drawn_by_init():
    layer = TimeLSTM.init(5, 3, rng=0, stateful=True)
    assert [p.shape for p in layer.params] == [(5, 12), (3, 12), (12,)]
    assert layer.stateful
    assert repr(layer) == "TimeLSTM(5, 3, stateful=True)"
    assert repr(GRU.init(5, 3)) == "GRU(5, 3)"
    assert (TimeLSTM.init(5, 3, rng=0).params[1] == layer.params[1]).all()
    assert not (layer.params[0][:, :3] == layer.params[0][:, 3:6]).any()


# ---- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stateful", [False, True])
def test_a_checkpoint_continues_from_the_state(tmp_path, stateful):
    pytest.importorskip("safetensors")
    model, xs = language_model(stateful=stateful, tied=False), numpy.arange(12).reshape(3, 4) % 7
    for steps in range(2):  # without and with a state
        checkpoint.save(tmp_path / "model.safetensors", model)
        other = language_model(stateful=stateful, tied=False)
        other.forward(xs[:2], xs[:2])
        checkpoint.load(tmp_path / "model.safetensors", other)
        built = models.load(tmp_path / "model.safetensors")
        expected = to_cpu(copy.deepcopy(model).layers[1].forward(normal(3, 2, 4)))
        for loaded in (other, built):
            assert (to_cpu(loaded.layers[1].forward(normal(3, 2, 4))) == expected).all(), steps
        model.forward(xs, xs)


def test_a_checkpoint_of_another_state_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    model = language_model(stateful=True)
    model.layers[1].set_state(np.zeros((2, 5)))
    checkpoint.save(tmp_path / "model.safetensors", model)
    with pytest.raises(ValueError, match=r"state must hold h and c, \(N, 4\) or None, got \[\(2, 5\), None\]"):
        checkpoint.load(tmp_path / "model.safetensors", language_model(stateful=True))
    with pytest.raises(ValueError, match="state must hold nothing"):
        checkpoint.load(tmp_path / "model.safetensors", language_model())


# ---- errors, names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TimeLSTM(normal(4, 12), normal(3, 9), normal(12)), ValueError, r"^TimeLSTM: Wx, Wh and b must .*4H"),
        (lambda: RNN(normal(4, 3), normal(3, 3), normal(4)), ValueError, r"^RNN: .*\(D, H\).*float64 \(4,\)"),
        (lambda: TimeGRU(normal(4, 9), normal(3, 9, dtype="float32")), ValueError, "^TimeGRU: .* same dtype"),
        (lambda: TimeRNN(normal(4, 3), normal(3, 3), [0.0] * 3), TypeError, "^TimeRNN: b must be"),
        (lambda: TimeRNN(normal(4, 3), normal(3, 3), normal(3), "yes"), TypeError, "^TimeRNN: stateful must be a bool"),
        (lambda: recurrent(TimeGRU)("float32").forward(normal(2, 4)), ValueError, r"^TimeGRU: xs must have .*\(2, 4\)"),
        (lambda: recurrent(TimeGRU)("float32").forward(normal(2, 0, 4)), ValueError, "T at least 1"),
        (lambda: recurrent(GRU)("float32").forward(normal(2, 1, 4), None), ValueError, "^GRU: expected .* one time"),
        (lambda: recurrent(GRU)("float32").forward(normal(2, 4), normal(3, 3)), ValueError, r"^GRU: the state h must"),
        (lambda: TimeBiLSTM(*([normal(4, 12), normal(3, 12), normal(12), normal(5, 12), normal(3, 12), normal(12)])),
         ValueError, "^TimeBiLSTM: Wx1 and Wx2"),
        (lambda: TimeBiLSTM(*(2 * [normal(4, 12), normal(3, 12), None])), TypeError, "^TimeBiLSTM: b1 must be"),
    ],
)  # fmt: skip
def test_errors_name_layer_and_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_another_batch_size_is_refused_before_anything_changes():
    layer = recurrent(TimeLSTM, stateful=True)("float64")
    layer.forward(normal(2, 3, 4))
    h = layer.h
    with pytest.raises(
        ValueError, match=r"TimeLSTM: the state h must have shape \(3, 3\), got \(2, 3\); call reset_st"
    ):
        layer.forward(normal(3, 3, 4))
    assert layer.h is h
    with pytest.raises(ValueError, match="shape of the output"):
        layer.backward(np.ones((3, 3, 3)))


def test_time_layers_gives_what_the_books_star_import_gives():
    names = {}
    exec("from nnx.time_layers import *", names)
    assert names["np"] is np
    assert names["GPU"] is GPU
    assert {"softmax", "sigmoid", "cross_entropy_error", *layers.__all__} <= set(names)
    assert names["Affine"] is Affine
    assert names["TimeLSTM"] is TimeLSTM
