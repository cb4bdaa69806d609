"""What a training step costs beside its floor: forward, backward and update on a ready batch.

The floor is the five matrix products alone, their outputs given. The book's formulas are in float64,
as printed, and in float32; on the GPU they run on CuPy. Every net is compared before it is timed.
"""

import pytest

from benchmarks import book
from nnx import SGD, TwoLayerNet, np

LR = 0.01  # small, so that thousands of steps on one batch leave its numbers ordinary


def floor(problem):
    x, _, (W1, _, W2, _) = problem.on("float32")
    h, dW1, dW2 = np.dot(x, W1), np.empty_like(W1), np.empty_like(W2)
    y, dh = np.dot(h, W2), np.empty_like(h)
    dy = y.copy()

    def step():
        np.dot(x, W1, out=h)
        np.dot(h, W2, out=y)
        np.dot(h.T, dy, out=dW2)
        np.dot(dy, W2.T, out=dh)
        np.dot(x.T, dh, out=dW1)

    return step


def nnx_net(params):
    net, sgd = TwoLayerNet(*params[0].shape, params[3].size), SGD(LR)
    for mine, given in zip(net.params, params, strict=True):
        mine[...] = given
    return net, lambda: sgd.update(net.params, net.grads)


def book_net(params):
    net = book.TwoLayerNet(*params)
    return net, lambda: net.update(LR)


FLOOR = "floor float32"
NETS = {
    "nnx float32": (nnx_net, "float32"),
    "book float64": (book_net, "float64"),
    "book float32": (book_net, "float32"),
}


def make(problem, variant):
    """Return a net, and a function that takes a step with it and returns the loss."""
    net_of, dtype = NETS[variant]
    x, t, params = problem.on(dtype)
    net, update = net_of(params)

    def step():
        loss = net.forward(x, t)
        net.backward()
        update()
        return loss

    return net, step


@pytest.fixture(scope="module")
def reference(problem):
    net, step = make(problem, "book float64")
    return step(), net.grads


@pytest.mark.parametrize("variant", [FLOOR, *NETS])
def test_step(measure, assert_close, problem, reference, variant):
    if variant == FLOOR:
        step = floor(problem)
    else:
        net, step = make(problem, variant)
        assert_close((step(), net.grads), reference)
    measure(f"step {problem.name}", step)
