"""The time of each part of a step: nnx in float32, the matrix products alone, and the book in float64.

The affine layer is the first of the workload; loss and update are the workload's. Backward includes the
gradient of the data, which the book always computes.
"""

import pytest

from benchmarks import book
from nnx import SGD, Affine, MatMul, SoftmaxWithLoss, np

LR = 1e-6  # small, because the same gradients are subtracted repeatedly


def floor(x, t, params):
    """Return the matrix products alone, with preallocated outputs."""
    W = params[0]
    y, dW, dx = np.dot(x, W), np.empty_like(W), np.empty_like(x)
    dout = y.copy()
    return {
        "matmul": lambda: np.dot(x, W, out=y),
        "affine forward": lambda: np.dot(x, W, out=y),
        "affine backward": lambda: (np.dot(dout, W.T, out=dx), np.dot(x.T, dout, out=dW)),
    }


def nnx_layers(x, t, params):
    W, b, W2, _ = params
    matmul, affine, loss, sgd = MatMul(W), Affine(W, b), SoftmaxWithLoss(), SGD(LR)
    h = affine.forward(x)
    scores, updated = np.dot(h, W2), [p.copy() for p in params]
    return {
        "matmul": lambda: matmul.forward(x),
        "affine forward": lambda: affine.forward(x),
        "affine backward": lambda: (affine.backward(h), *affine.grads),
        "softmax with loss": lambda: (loss.forward(scores, t), loss.backward()),
        "sgd": lambda: sgd.update(updated, params) or updated,
    }


def book_formulas(x, t, params):
    W, b, W2, _ = params
    h = np.dot(x, W) + b
    scores, updated = np.dot(h, W2), [p.copy() for p in params]

    def softmax_with_loss():
        y = book.softmax(scores)
        loss = book.cross_entropy_error(y, t)
        dx = y.copy()
        dx[np.arange(len(t)), t] -= 1
        return loss, dx / len(t)

    def sgd():
        for p, g in zip(updated, params, strict=True):
            p -= LR * g
        return updated

    return {
        "matmul": lambda: np.dot(x, W),
        "affine forward": lambda: np.dot(x, W) + b,
        "affine backward": lambda: (np.dot(h, W.T), np.dot(x.T, h), np.sum(h, axis=0)),
        "softmax with loss": softmax_with_loss,
        "sgd": sgd,
    }


VARIANTS = {
    "floor float32": (floor, "float32"),
    "nnx float32": (nnx_layers, "float32"),
    "book float64": (book_formulas, "float64"),
}
COMPARED = {
    "matmul": "x @ W",
    "affine forward": "x @ W + b",
    "affine backward": "the gradients of x, W and b",
    "softmax with loss": "the loss and its gradient",
    "sgd": "the update of all parameters",
}
ROWS = [(g, v) for g in COMPARED for v in VARIANTS if g not in ("softmax with loss", "sgd") or "floor" not in v]


@pytest.fixture(scope="module")
def calls(problem, assert_close):
    """Return the calls to time by variant and group, after comparing nnx's results with the book's."""
    calls = {variant: make(*problem.on(dtype)) for variant, (make, dtype) in VARIANTS.items()}
    for group, call in calls["nnx float32"].items():
        assert_close(call(), calls["book float64"][group]())
    return calls


@pytest.mark.parametrize(("group", "variant"), ROWS)
def test_layer(measure, problem, calls, group, variant):
    measure(f"{group} {problem.name}", COMPARED[group], calls[variant][group])
