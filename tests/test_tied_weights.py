"""Weights tied by a transposed view, `Affine(W_embed.T, b)`: training, copies and files, as in BetterRnnlm."""

import copy
import pickle

import numpy
import pytest
from test_optimizer import OPTIMIZERS, steps_by_hand

import nnx
from nnx import Sequential, Trainer, checkpoint, clip_grads, models, np, to_cpu
from nnx.base_model import BaseModel
from nnx.callbacks import Checkpoint
from nnx.layers import MatMul, TimeAffine, TimeDropout, TimeEmbedding, TimeLSTM, TimeSoftmaxWithLoss
from nnx.trainer import RnnlmTrainer, remove_duplicate

V, H, N, T = 7, 4, 2, 3
CORPUS = numpy.random.default_rng(3).integers(0, V, 4 * N * T + 1)
XS, TS = CORPUS[:-1], CORPUS[1:]
STEPS = len(XS) // (N * T)


class Rnnlm(BaseModel):
    """A language model whose last layer has the embedding as its weight, transposed, or a copy of that."""

    def __init__(self, tied=True, seed=0, dtype="float64"):
        super().__init__()
        W = TimeEmbedding.init(V, H, dtype=dtype, rng=seed).params[0]
        self.layers = [
            TimeEmbedding(W),
            TimeDropout(0.3, rng=1),
            TimeLSTM.init(H, H, dtype=dtype, rng=seed, stateful=True),
            TimeAffine(W.T if tied else W.T.copy(), np.zeros(V, dtype)),
        ]
        self.loss_layer = TimeSoftmaxWithLoss()
        self.params = [p for layer in self.layers for p in layer.params]
        self.grads = [g for layer in self.layers for g in layer.grads]

    def forward(self, xs, ts):
        for layer in self.layers:
            xs = layer.forward(xs)
        return self.loss_layer.forward(xs, ts)

    def backward(self, dout=1):
        dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)


def sequential(seed=0, dtype="float64"):
    model = Rnnlm(seed=seed, dtype=dtype)
    return Sequential(model.layers, model.loss_layer)


MODELS = {"Sequential": sequential, "BaseModel": Rnnlm}


def batches():
    trainer = RnnlmTrainer(Rnnlm(), nnx.SGD())
    return [trainer.get_batch(XS, TS, N, T) for _ in range(STEPS)]


def loop(model, optimizer, max_grad):
    for x, t in batches():
        model.forward(x, t)
        model.backward()
        params, grads = remove_duplicate(model.params, model.grads)
        if max_grad is not None:
            clip_grads(grads, max_grad)
        optimizer.update(params, grads)


def fit(model, optimizer, max_grad):
    Trainer(model, optimizer).fit(batches(), max_epoch=1, max_grad=max_grad, verbose=False)


def fit_rnnlm(model, optimizer, max_grad, **options):
    RnnlmTrainer(model, optimizer).fit(XS, TS, 1, N, T, max_grad, verbose=False, **options)


def train_untied(name, max_grad):
    """Return the parameters after training: W and W.T are two arrays, which get the sum of both gradients."""
    model = Rnnlm(tied=False)
    start = [to_cpu(p).copy() for p in model.params]
    last = len(start) - 2  # the weight of the last layer
    gradients = [[] for _ in start[:last] + start[-1:]]
    for x, t in batches():
        model.forward(x, t)
        model.backward()
        grads = [to_cpu(g).copy() for g in model.grads]
        grads[0] += grads.pop(last).T
        norm = numpy.sqrt(sum((g**2).sum() for g in grads))
        rate = 1 if max_grad is None else min(1, max_grad / (norm + 1e-6))
        for each, g in zip(gradients, grads, strict=True):
            each.append(g * rate)
        values = [steps_by_hand(name, p, each) for p, each in zip(start[:last] + start[-1:], gradients, strict=True)]
        values.insert(last, values[0].T)
        for p, value in zip(model.params, values, strict=True):
            p[...] = np.asarray(value)
    return values


def assert_tied(model):
    W, U = model.layers[0].params[0], model.layers[-1].params[0]
    assert model.params[0] is W
    assert model.params[-2] is U
    assert len(remove_duplicate(model.params, model.grads)[0]) == len(model.params) - 1


@pytest.mark.parametrize("max_grad", [None, 0.3])
@pytest.mark.parametrize("how", [loop, fit, fit_rnnlm])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_a_tied_weight_by_the_summed_gradient(name, how, max_grad):
    model = Rnnlm()
    how(model, OPTIMIZERS[name][0](lr=0.1), max_grad)
    assert_tied(model)
    for p, expected in zip(model.params, train_untied(name, max_grad), strict=True):
        numpy.testing.assert_allclose(to_cpu(p), expected, rtol=1e-9, atol=1e-12)


COPIES = {
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda value, n=n: pickle.loads(pickle.dumps(value, n)) for n in (2, 4, 5)},
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", MODELS)
def test_copies_stay_tied(kind, copied):
    """A model, its optimizer and trainer are copied at once, and continue with the same bits."""
    model = MODELS[kind]()
    trainer = RnnlmTrainer(model, nnx.Momentum(0.1))
    trainer.fit(XS, TS, 1, N, T, verbose=False)
    twins = copied((model, trainer))
    before = [to_cpu(p).copy() for p in model.params]
    assert_tied(twins[0])
    assert twins[1].model is twins[0]
    twins[1].fit(XS, TS, 2, N, T, verbose=False)
    assert all((to_cpu(p) == b).all() for p, b in zip(model.params, before, strict=True))
    trainer.fit(XS, TS, 2, N, T, verbose=False)
    assert twins[1].ppl_list == trainer.ppl_list
    assert all((p == q).all() for p, q in zip(model.params, twins[0].params, strict=True))
    assert any((to_cpu(p) != b).any() for p, b in zip(model.params, before, strict=True))


def test_a_shallow_copy_has_the_same_arrays():
    model = Rnnlm()
    twin = copy.copy(model)
    assert twin.params is model.params
    assert twin.layers is model.layers
    assert_tied(model)
    assert "_tied" not in vars(twin)


class Attribute(BaseModel):
    """A model that keeps its weights in attributes of its own."""

    def __init__(self):
        super().__init__()
        self.W = np.ones((3, 3))
        self.U = self.W.T
        self.params, self.grads = [self.W, self.U], [np.zeros((3, 3)), np.zeros((3, 3))]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [list, tuple])
def test_arrays_in_attributes_stay_tied(copied, kind):
    model = Attribute()
    model.params = kind(model.params)
    twin = copied(model)
    twin.W[0, 1] = 5
    assert twin.params[1] is twin.U
    assert float(twin.U[1, 0]) == 5


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_ties_within_and_across_nested_models_are_kept(copied):
    W = MatMul.init(3, 3, rng=0).params[0]
    parts = [Sequential([MatMul(W), MatMul(W.T)]), Sequential([MatMul(W.T), Sequential([MatMul(W)])])]
    twin = copied(Sequential(parts))
    assert len(remove_duplicate(twin.params, twin.grads)[0]) == 1
    twin.params[0][...] = np.arange(9).reshape(3, 3)
    first, second = (twin.layers[i].predict(np.eye(3, dtype=W.dtype)) for i in range(2))
    assert (first == twin.params[0] @ twin.params[0].T).all()
    assert (second == twin.params[0].T @ twin.params[0]).all()


@pytest.mark.parametrize("kind", MODELS)
def test_files_of_all_kinds_keep_the_tie(kind, tmp_path):
    pytest.importorskip("safetensors")
    model, file = MODELS[kind](), tmp_path / "model.safetensors"
    fit_rnnlm(model, nnx.Adam(0.1), None)
    checkpoint.save(file, model)
    loaded = [MODELS[kind](seed=5)]
    checkpoint.load(file, loaded[0])
    if kind == "Sequential":
        loaded.append(models.load(file))
    for other in loaded:
        assert_tied(other)
        assert all((p == q).all() for p, q in zip(model.params, other.params, strict=True))
        fit_rnnlm(twin := copy.deepcopy(model), nnx.SGD(0.1), None)
        fit_rnnlm(other, nnx.SGD(0.1), None)
        assert all((p == q).all() for p, q in zip(twin.params, other.params, strict=True))


def test_the_books_files_keep_the_tie(tmp_path):
    model, other = Rnnlm(dtype="float32"), Rnnlm(seed=5, dtype="float32")
    model.save_params(tmp_path / "a.pkl")
    other.load_params(tmp_path / "a.pkl")
    assert_tied(other)
    for p, q in zip(model.params, other.params, strict=True):
        numpy.testing.assert_array_equal(to_cpu(q), to_cpu(p).astype("float16"))
    Rnnlm(tied=False, dtype="float32").save_params(tmp_path / "b.pkl")  # equal values
    other.load_params(tmp_path / "b.pkl")
    untied = Rnnlm(tied=False, dtype="float32")
    untied.params[-2][0, 0] = 9
    untied.save_params(tmp_path / "c.pkl")
    before = to_cpu(other.params[0]).copy()
    with pytest.raises(ValueError, match=r"Rnnlm.load_params: params\[0\] and params\[4\] are one weight, .*c\.pkl"):
        other.load_params(tmp_path / "c.pkl")
    numpy.testing.assert_array_equal(to_cpu(other.params[0]), before)


class Interrupt(Exception):
    pass


class After:
    """Ends a fit after some steps, like a kill."""

    def __init__(self, steps):
        self.steps = steps

    def on_checkpoint(self, trainer):
        self.steps -= 1
        if not self.steps:
            raise Interrupt


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_training_has_the_same_bits(name, kind, tmp_path):
    pytest.importorskip("safetensors")

    def trainer(seed):
        return RnnlmTrainer(MODELS[kind](seed=seed), OPTIMIZERS[name][0](lr=0.1))

    def run(trainer, *callbacks):
        trainer.fit(XS, TS, 2, N, T, 0.3, 1, verbose=False, callbacks=callbacks)

    whole, rest = trainer(0), trainer(5)
    run(whole)
    with pytest.raises(Interrupt):
        run(trainer(0), Checkpoint(tmp_path, every_steps=1, every_epochs=None), After(STEPS + 2))
    rest.resume(tmp_path)
    run(rest)
    assert_tied(rest.model)
    assert rest.ppl_list == whole.ppl_list
    assert all((p == q).all() for p, q in zip(whole.model.params, rest.model.params, strict=True))
