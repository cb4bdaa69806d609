"""Language models and word2vec in nnx, the book's formulas, PyTorch and JAX, for `compare.py`.

`LSTM V-H/NxT` and `GRU V-H/NxT` are a language model of V words: an embedding, a recurrent layer that keeps its state
between the steps, an affine layer and the softmax loss, all H wide; N sequences of T words, SGD. `CBOW V-H/N` predicts
a word from the mean of the vectors (H,) of its CONTEXT neighbours by negative sampling, N words per batch, Adam.
"""
# ruff: noqa: PLC0415 - a process imports only its own library

import functools
import os
import re
from typing import Any, NamedTuple

import numpy

from benchmarks import book as book_formulas
from benchmarks.net import Net, jax_library, pytorch_blas, updated

MODELS = ["LSTM 10000-100/20x35", "LSTM 10000-650/20x35", "GRU 10000-100/20x35", "GRU 10000-650/20x35"]
CBOW = "CBOW 10000-100/100"
WORKLOADS = [*MODELS, CBOW]
BLOCKS = {"LSTM": 4, "GRU": 3}  # of columns in Wx, Wh and b, one for each gate
CONTEXT, NEGATIVES = 10, 5  # a window of 5 words on each side
LR = {"LSTM": 1.0, "GRU": 1.0, "CBOW": 0.001}


class Problem(NamedTuple):
    """A workload: the kind, the initial weights on the host, and one batch."""

    kind: str
    params: list
    x: Any  # word ids (N, T), or the contexts (N, CONTEXT)
    t: Any  # of the same shape, or (N,)
    corpus: Any  # in which all words occur
    negatives: Any  # (N, NEGATIVES) samples for the comparison of the losses, of CBOW


def problem(workload):
    """Return the Problem of a workload."""
    rng, (kind, sizes) = numpy.random.default_rng(0), workload.split()
    V, H, *batch = map(int, re.split("[-/x]", sizes))
    corpus = rng.permutation(numpy.r_[numpy.arange(V), (V ** rng.random(9 * V)).astype(int)])  # as Zipf's law

    def normal(*shape, scale):
        return rng.standard_normal(shape, "float32") * numpy.float32(scale)

    if kind == "CBOW":
        params = [
            normal(V, H, scale=1),
            normal(V, H, scale=0.3),
        ]  # no tiny gradients: PyTorch adds Adam's eps elsewhere
        shapes = (*batch, CONTEXT), batch
    else:
        columns = BLOCKS[kind] * H
        weights = [normal(H, columns, scale=H**-0.5), normal(H, columns, scale=H**-0.5)]
        params = [normal(V, H, scale=0.1), *weights, normal(columns, scale=0.1)]
        params += [normal(H, V, scale=H**-0.5), normal(V, scale=0.1)]
        shapes = batch, batch
    x, t = (rng.choice(corpus, shape) for shape in shapes)
    return Problem(kind, params, x, t, corpus, rng.choice(corpus, (len(x), NEGATIVES)))


def prepare(variant, workload, device):
    """Return a function that makes a variant's net, which draws its negative samples if called with True, x and t."""
    given = problem(workload)

    def make_net(draws):
        copy = [p.copy() for p in given.params]
        return MAKE[variant](given._replace(params=copy, negatives=None if draws else given.negatives), device)

    return make_net, given.kind == "CBOW", given.x, given.t


def floor(given, device):
    """Only the matrix products, with preallocated outputs."""
    from nnx import asarray, np, synchronize

    _, Wx, Wh, _, W_out, _ = map(asarray, given.params)
    (N, T), (H, columns) = given.x.shape, Wh.shape
    x, h, a, scores = (np.ones((N * T, D), "float32") for D in (H, H, columns, len(W_out.T)))
    products = [(x, Wx, a), (h, W_out, scores), (scores, W_out.T, h.copy()), (h.T, scores, W_out.copy())]
    products += [(a, Wx.T, x.copy()), (x.T, a, Wx.copy()), (h.T, a, Wh.copy())]
    start, parts = 0, {"LSTM": [4], "GRU": [2, 1]}[given.kind]  # GRU: of h for the gates, and of r * h
    for width in parts:
        W = np.ascontiguousarray(Wh[:, start : start + width * H])  # np.dot would copy it each time
        state, gates = np.ones((N, H), "float32"), np.ones((N, width * H), "float32")
        products += [(state, W, gates.copy()), (gates, W.T, state.copy())] * T
        start += width * H

    def step(x, t):
        for a, b, out in products:
            np.dot(a, b, out)
        return 0.0

    return Net(step, asarray, asarray, finish=synchronize, checked=False)


def nnx(given, device):
    import nnx
    from nnx import layers

    if given.kind == "CBOW":
        model, optimizer = _nnx_cbow(given), nnx.Adam(LR["CBOW"])
    else:
        W, Wx, Wh, b, W_out, b_out = map(nnx.asarray, given.params)
        recurrent = getattr(layers, f"Time{given.kind}")(Wx, Wh, b, stateful=True)
        parts = [layers.TimeEmbedding(W), recurrent, layers.TimeAffine(W_out, b_out)]
        model, optimizer = nnx.Sequential(parts, layers.TimeSoftmaxWithLoss()), nnx.SGD(LR[given.kind])

    def step(x, t):
        loss = model.forward(x, t)
        model.backward()
        optimizer.update(model.params, model.grads)
        return loss

    return Net(step, nnx.asarray, nnx.asarray, finish=nnx.synchronize)


def _nnx_cbow(given):
    import nnx
    from nnx import layers, np

    class CBOW:
        def __init__(self, W_in, W_out):
            self.embed = nnx.Embedding(W_in)
            self.loss_layer = layers.NegativeSamplingLoss(W_out, given.corpus, sample_size=NEGATIVES, rng=0)
            self.params = self.embed.params + self.loss_layer.params
            self.grads = self.embed.grads + self.loss_layer.grads

        def forward(self, x, t):
            return self.loss_layer.forward(self.embed.forward(x).mean(axis=1), t)

        def backward(self):
            dh = self.loss_layer.backward() / CONTEXT
            self.embed.backward(np.repeat(dh[:, None], CONTEXT, axis=1))

    model = CBOW(*map(nnx.asarray, given.params))
    if given.negatives is not None:
        negatives = nnx.asarray(given.negatives)
        model.loss_layer.sampler.get_negative_sample = lambda target: negatives
    return model


def book(given, device):
    """Return the book's formulas; on the GPU they run on CuPy, as in the book."""
    put, finish = numpy.asarray, lambda: None
    if device == "cuda":
        import nnx

        book_formulas.np, put, finish = nnx.np, nnx.asarray, nnx.synchronize
    params = [put(p) for p in given.params]
    if given.kind == "CBOW":
        negatives = None if given.negatives is None else put(given.negatives)
        model = book_formulas.CBOW(*params, given.corpus, NEGATIVES, negatives)
    else:
        model = book_formulas.LanguageModel(given.kind, *params)

    def step(x, t):
        loss = model.forward(x, t)
        model.backward()
        model.update(LR[given.kind])
        return loss

    return Net(step, put, put, finish=finish)


def word_probabilities(corpus):
    """Return the distribution of the negative samples."""
    p = numpy.bincount(corpus) ** 0.75
    return (p / p.sum()).astype("float32")


def pytorch(given, device, compiled=False):
    """Eager mode, and `torch.compile` of the loss and of the update."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    put = functools.partial(torch.as_tensor, device=device)
    make_loss, kind = _pytorch_cbow if given.kind == "CBOW" else _pytorch_language_model, given.kind
    model, states = make_loss(given, put)
    optimizer = (torch.optim.Adam if kind == "CBOW" else torch.optim.SGD)(model.parameters(), LR[kind])
    loss_of, update = model, optimizer.step
    if compiled:
        mode = "reduce-overhead" if device == "cuda" else None
        loss_of, update = torch.compile(model, mode=mode), torch.compile(optimizer.step, mode=mode)

    def step(x, t):
        optimizer.zero_grad()
        loss, *after = loss_of(x, t, *states)
        loss.backward()
        update()
        states[:] = [state.detach() for state in after]
        return loss.detach()

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Net(step, put, put, finish=finish, about=pytorch_blas, checked=kind != "GRU")


def _pytorch_language_model(given, put):
    """Return a module whose forward returns the loss and the last states, and the first states.

    It is nn.LSTM or nn.GRU; that GRU has another formula, so its losses are not compared.
    """
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    W, Wx, Wh, b, W_out, b_out = map(torch.as_tensor, given.params)
    H = len(Wh)
    order = {"LSTM": [2, 0, 1, 3], "GRU": [1, 0, 2]}[given.kind]  # f, g, i, o to i, f, g, o; z, r, k to r, z, n

    def recurrent():
        layer = getattr(nn, given.kind)(H, H, batch_first=True)
        rows = [torch.cat([w.T.chunk(len(order))[i] for i in order]) for w in (Wx, Wh, b[None])]
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        layer.load_state_dict(dict(zip(names, (*rows[:2], rows[2][:, 0], torch.zeros(len(b))), strict=True)))
        layer.bias_hh_l0.requires_grad_(False)  # a second bias
        return layer

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding.from_pretrained(W, freeze=False)
            self.recurrent = recurrent()
            self.linear = nn.Linear(*W_out.shape)
            self.linear.load_state_dict({"weight": W_out.T.contiguous(), "bias": b_out})

        def forward(self, x, t, *states):
            hs, last = self.recurrent(self.embedding(x), states if len(states) == 2 else states[0])
            loss = cross_entropy(self.linear(hs.flatten(0, 1)), t.flatten())
            return loss, *(last if len(states) == 2 else [last])

    state = put(torch.zeros(1, len(given.x), H))
    return Model().to(state.device), [state] * (2 if given.kind == "LSTM" else 1)


def _pytorch_cbow(given, put):
    """Return a module whose forward returns a tuple of the loss, and no states; negative samples may repeat."""
    import torch
    from torch import nn
    from torch.nn.functional import binary_cross_entropy_with_logits

    p, N = put(word_probabilities(given.corpus)), len(given.x)
    negatives = None if given.negatives is None else put(given.negatives)
    labels = put(numpy.eye(1, 1 + NEGATIVES, dtype="float32").repeat(N, 0))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            W_in, W_out = map(torch.as_tensor, given.params)
            self.embedding = nn.EmbeddingBag.from_pretrained(W_in, freeze=False, mode="mean")
            self.output = nn.Embedding.from_pretrained(W_out, freeze=False)

        def forward(self, x, t):
            drawn = torch.multinomial(p, N * NEGATIVES, True).view(N, -1) if negatives is None else negatives
            vectors = self.output(torch.cat([t[:, None], drawn], 1))
            scores = (vectors @ self.embedding(x)[:, :, None])[..., 0]
            return (binary_cross_entropy_with_logits(scores, labels) * labels.shape[1],)

    return Model().to(p.device), []


def jax(given, device):
    """One jitted function for loss, gradients and update, with donated weight buffers; `lax.scan` over time."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory for the other processes
    import jax

    jax.config.update("jax_platforms", device)
    if device == "cuda":
        jax.config.update("jax_default_matmul_precision", "highest")  # float32 as in the others, not TF32
    loss_of, states = (_jax_cbow if given.kind == "CBOW" else _jax_language_model)(given)
    optimizer, moments = ("Adam", 2) if given.kind == "CBOW" else ("SGD", 0)
    weights = [[p, *[numpy.zeros_like(p)] * moments] for p in given.params]
    carry = jax.device_put((weights, states, 0))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry, x, t):
        weights, states, k = carry
        (loss, states), grads = jax.value_and_grad(loss_of, has_aux=True)([p for p, *_ in weights], states, k, x, t)
        k = k + 1
        new = [updated(optimizer, LR[given.kind], k, g, *arrays) for g, arrays in zip(grads, weights, strict=True)]
        return (new, states, k), loss

    def step(x, t):
        nonlocal carry
        carry, loss = update(carry, x, t)
        return loss

    return Net(
        step,
        jax.device_put,
        lambda array: array,
        finish=lambda: jax.block_until_ready(carry),
        about=lambda x, t: jax_library(update.lower(carry, x, t)),
    )


def _jax_language_model(given):
    """Return a function of the weights, states, k, x and t that returns the loss and the last states; and the first."""
    import jax
    from jax import numpy as jnp

    H = given.params[2].shape[0]

    def lstm(Wh, states, a):
        h, c = states
        f, g, i, o = jnp.split(a + h @ Wh, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jnp.tanh(g) * jax.nn.sigmoid(i)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(Wh, states, a):
        (h,) = states
        z, r = jnp.split(jax.nn.sigmoid(a[:, : 2 * H] + h @ Wh[:, : 2 * H]), 2, axis=1)
        k = jnp.tanh(a[:, 2 * H :] + (r * h) @ Wh[:, 2 * H :])
        h = (1 - z) * h + z * k
        return (h,), h

    cell, count = {"LSTM": (lstm, 2), "GRU": (gru, 1)}[given.kind]

    def loss_of(params, states, k, x, t):
        W, Wx, Wh, b, W_out, b_out = params
        states, hs = jax.lax.scan(functools.partial(cell, Wh), states, W[x.T] @ Wx + b)
        scores = hs.reshape(-1, H) @ W_out + b_out
        labels = t.T.reshape(-1)
        return -jax.nn.log_softmax(scores)[jnp.arange(len(labels)), labels].mean(), states

    return loss_of, (numpy.zeros((len(given.x), H), "float32"),) * count


def _jax_cbow(given):
    """Return such a function without states; negative samples may repeat."""
    import jax
    from jax import numpy as jnp

    p = word_probabilities(given.corpus)

    def loss_of(params, states, k, x, t):
        W_in, W_out = params
        key = jax.random.fold_in(jax.random.key(0), k)
        drawn = given.negatives
        if drawn is None:
            drawn = jax.random.choice(key, len(p), (len(x), NEGATIVES), p=jnp.asarray(p))
        vectors = W_out[jnp.concatenate([t[:, None], drawn], 1)]
        scores = jnp.einsum("nsh,nh->ns", vectors, W_in[x].mean(1))
        return jax.nn.softplus(scores.at[:, 0].multiply(-1)).sum(1).mean(), states

    return loss_of, ()


MAKE = {
    "floor": floor,
    "nnx": nnx,
    "book float32": book,
    "PyTorch eager": pytorch,
    "torch.compile": functools.partial(pytorch, compiled=True),
    "jax.jit": jax,
}
