"""The formulas of chapter 1 of the book in NumPy, as the reference for nnx.

Written from the formulas, for tests and benchmarks only: float64 unless the weights have another
dtype, a new array for every intermediate, log(y + 1e-7), the gradient of the data
always computed. N rows, D inputs, H hidden, C classes.
"""

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
