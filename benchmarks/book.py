"""The formulas of chapters 1 and 4 to 6 of the book in NumPy, as the reference for nnx.

Written from the formulas, for tests and benchmarks only: float64 unless the weights have another
dtype, a new array for every intermediate, log(y + 1e-7), the gradient of the data
always computed. N rows, D inputs, H hidden, C classes.
"""

import numpy
import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy_error(y, t):
    return -np.sum(np.log(y[np.arange(len(t)), t] + 1e-7)) / len(t)


class TwoLayerNet:
    """Affine, Sigmoid, Affine, softmax cross entropy; `params` are W1, b1, W2, b2."""

    def __init__(self, W1, b1, W2, b2):
        self.params = [W1, b1, W2, b2]
        self.grads = [np.zeros_like(p) for p in self.params]

    def predict(self, x):
        W1, b1, W2, b2 = self.params
        self.x = x
        self.h = sigmoid(np.dot(x, W1) + b1)
        return np.dot(self.h, W2) + b2

    def forward(self, x, t):
        scores = self.predict(x)
        self.t = t.argmax(axis=1) if t.ndim == 2 else t
        self.y = softmax(scores)
        return cross_entropy_error(self.y, self.t)

    def backward(self, dout=1):
        W1, _, W2, _ = self.params
        n = len(self.t)
        ds = self.y.copy()
        ds[np.arange(n), self.t] -= 1
        ds *= dout
        ds = ds / n
        self.grads[3][...] = np.sum(ds, axis=0)
        self.grads[2][...] = np.dot(self.h.T, ds)
        dh = np.dot(ds, W2.T)
        da = dh * (1.0 - self.h) * self.h
        self.grads[1][...] = np.sum(da, axis=0)
        self.grads[0][...] = np.dot(self.x.T, da)
        return np.dot(da, W1.T)

    def update(self, lr):
        for p, g in zip(self.params, self.grads, strict=True):
            p -= lr * g


# ---- chapters 4 to 6: one object, here a closure, and gradients of its own for each time step or sample -------------


def lstm(x, h, c, Wx, Wh, b):
    """Return the states after a time step, and a function of their gradients that returns all others."""
    a = np.dot(x, Wx) + np.dot(h, Wh) + b
    f, g, i, o = np.split(a, 4, axis=1)
    f, g, i, o = sigmoid(f), np.tanh(g), sigmoid(i), sigmoid(o)
    new = f * c + g * i

    def backward(dh, dnew):
        tanh_c = np.tanh(new)
        total = dnew + dh * o * (1 - tanh_c**2)
        df, dg, di, do = total * c, total * i, total * g, dh * tanh_c
        da = np.hstack([df * f * (1 - f), dg * (1 - g**2), di * i * (1 - i), do * o * (1 - o)])
        grads = np.dot(x.T, da), np.dot(h.T, da), np.sum(da, axis=0)
        return np.dot(da, Wx.T), (np.dot(da, Wh.T), total * f), grads

    return (o * np.tanh(new), new), backward


def gru(x, h, Wx, Wh, b):
    """Return the same for a GRU; as in the book, each gate has products of its own."""
    (Wxz, Wxr, Wxk), (Whz, Whr, Whk), (bz, br, bk) = (np.split(w, 3, axis=-1) for w in (Wx, Wh, b))
    z = sigmoid(np.dot(x, Wxz) + np.dot(h, Whz) + bz)
    r = sigmoid(np.dot(x, Wxr) + np.dot(h, Whr) + br)
    k = np.tanh(np.dot(x, Wxk) + np.dot(r * h, Whk) + bk)

    def backward(dh):
        ak = dh * z * (1 - k**2)
        dreset = np.dot(ak, Whk.T)
        az, ar = (dh * k - dh * h) * z * (1 - z), dreset * h * r * (1 - r)
        dx = np.dot(az, Wxz.T) + np.dot(ar, Wxr.T) + np.dot(ak, Wxk.T)
        dprev = dh * (1 - z) + r * dreset + np.dot(az, Whz.T) + np.dot(ar, Whr.T)
        dWx = np.hstack([np.dot(x.T, az), np.dot(x.T, ar), np.dot(x.T, ak)])
        dWh = np.hstack([np.dot(h.T, az), np.dot(h.T, ar), np.dot((r * h).T, ak)])
        db = np.hstack([np.sum(az, axis=0), np.sum(ar, axis=0), np.sum(ak, axis=0)])
        return dx, (dprev,), (dWx, dWh, db)

    return ((1 - z) * h + z * k,), backward


class LanguageModel:
    """Embedding, LSTM or GRU, affine, softmax cross entropy at every time step; keeps its states between batches."""

    def __init__(self, cell, W, Wx, Wh, b, W_out, b_out):
        self.cell = {"LSTM": lstm, "GRU": gru}[cell]
        self.params = [W, Wx, Wh, b, W_out, b_out]
        self.grads = [np.zeros_like(p) for p in self.params]
        self.states = None

    def forward(self, x, t):
        W, Wx, Wh, b, W_out, b_out = self.params
        (N, T), H = x.shape, len(Wh)
        vectors = np.empty((N, T, W.shape[1]), W.dtype)
        for i in range(T):
            vectors[:, i] = W[x[:, i]]
        if self.states is None:
            self.states = [np.zeros((N, H), W.dtype) for _ in range(Wh.shape[1] // H - 2)]
        hs, self.steps = np.empty((N, T, H), W.dtype), []
        for i in range(T):
            self.states, backward = self.cell(vectors[:, i], *self.states, Wx, Wh, b)
            self.steps.append(backward)
            hs[:, i] = self.states[0]
        self.x, self.rows, self.t = x, hs.reshape(N * T, H), t.reshape(N * T)
        self.y = softmax(np.dot(self.rows, W_out) + b_out)
        return -np.sum(np.log(self.y[np.arange(N * T), self.t])) / (N * T)

    def backward(self):
        W, _, _, _, W_out, _ = self.params
        (N, T), n = self.x.shape, len(self.t)
        ds = self.y
        ds[np.arange(n), self.t] -= 1
        ds /= n
        ds *= (self.t != -1)[:, None]
        self.grads[5][...] = np.sum(ds, axis=0)
        self.grads[4][...] = np.dot(self.rows.T, ds)
        dhs = np.dot(ds, W_out.T).reshape(N, T, -1)
        dvectors = np.empty((N, T, W.shape[1]), W.dtype)
        dh, dstates, sums = 0, [0] * (len(self.states) - 1), [0, 0, 0]
        for i in reversed(range(T)):
            dvectors[:, i], (dh, *dstates), grads = self.steps[i](dhs[:, i] + dh, *dstates)
            sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
        for grad, total in zip(self.grads[1:4], sums, strict=True):
            grad[...] = total
        dW = np.zeros_like(W)
        for i in range(T):
            dW += embedding_grad(W, self.x[:, i], dvectors[:, i])
        self.grads[0][...] = dW

    def update(self, lr):
        for p, g in zip(self.params, self.grads, strict=True):
            p -= lr * g


def embedding_grad(W, idx, dout):
    dW = np.zeros_like(W)
    np.add.at(dW, idx, dout)
    return dW


class CBOW:
    """The mean of the context's vectors against a target and negative samples: an embedding for each of them; Adam."""

    def __init__(self, W_in, W_out, corpus, sample_size, negatives=None):
        self.params, self.k = [W_in, W_out], 0
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.params]
        p = numpy.bincount(corpus) ** 0.75
        self.word_p, self.sample_size, self.negatives = p / p.sum(), sample_size, negatives

    def draw(self, t):
        """Return the negative samples of each target, without the target and without repetition."""
        samples = numpy.empty((len(t), self.sample_size), int)
        for i in range(len(t)):
            p = self.word_p.copy()
            p[int(t[i])] = 0
            samples[i] = numpy.random.choice(len(p), self.sample_size, replace=False, p=p / p.sum())  # noqa: NPY002
        return np.asarray(samples)

    def forward(self, x, t):
        W_in, W_out = self.params
        negatives = self.draw(t) if self.negatives is None else self.negatives
        self.x, self.words = x, [t, *negatives.T]
        self.h = sum(W_in[x[:, i]] for i in range(x.shape[1])) / x.shape[1]
        self.vectors = [W_out[words] for words in self.words]
        self.y = [sigmoid(np.sum(vectors * self.h, axis=1)) for vectors in self.vectors]
        n = len(t)
        return -sum(np.sum(np.log((1 - y if s else y) + 1e-7)) / n for s, y in enumerate(self.y))

    def backward(self):
        W_in, W_out = self.params
        dh, of_out = 0, []
        for s, (words, vectors, y) in enumerate(zip(self.words, self.vectors, self.y, strict=True)):
            ds = ((y - (s == 0)) / len(y))[:, None]
            of_out.append(embedding_grad(W_out, words, ds * self.h))
            dh = dh + ds * vectors
        dh /= self.x.shape[1]
        of_in = [embedding_grad(W_in, self.x[:, i], dh) for i in range(self.x.shape[1])]
        for total, *others in (of_in, of_out):  # of weights that occur several times, the gradients are summed
            for grad in others:
                total += grad
        self.grads = of_in[0], of_out[0]

    def update(self, lr):
        self.k += 1
        rate = lr * (1 - 0.999**self.k) ** 0.5 / (1 - 0.9**self.k)
        for p, g, (m, v) in zip(self.params, self.grads, self.moments, strict=True):
            m += (1 - 0.9) * (g - m)
            v += (1 - 0.999) * (g**2 - v)
            p -= rate * m / (np.sqrt(v) + 1e-7)
