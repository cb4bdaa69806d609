"""Chapter 1 of Deep Learning from Scratch 2, section by section, on NumPy or with NNX_GPU=1 on CuPy.

The last section trains a user-defined net of three layers on the spiral; its accuracy on the 300 points
is about 0.97 after 300 epochs, in a second on a CPU.
"""

from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter

import numpy
from tqdm import trange

from nnx import SGD, spiral, to_cpu
from nnx.layers import Affine, MatMul, Repeat, Sigmoid, SoftmaxWithLoss, Sum
from nnx.np import *  # the book's import: np and GPU


def vectors_and_matrices():
    """1.1: elementwise arithmetic, broadcasting, inner product and matrix product."""
    A, b = np.array([[1, 2], [3, 4]]), np.array([10, 20])
    print(A + A, A * A, sep="\n")
    print(A * 10, A * b, sep="\n")
    print(np.dot(np.array([1, 2, 3]), np.array([4, 5, 6])), np.matmul(A, A), sep="\n")


def inference():
    """1.2: inference with a net of 2 inputs, 4 hidden neurons and 3 outputs, on 10 rows."""
    W1, b1, W2, b2 = (np.random.randn(*shape) for shape in ((2, 4), (4,), (4, 3), (3,)))
    x = np.random.randn(10, 2)
    for layer in (Affine(W1, b1), Sigmoid(), Affine(W2, b2)):
        x = layer.forward(x)
    print("scores", x.shape)


def nodes():
    """1.3: Repeat and Sum, each the backward of the other, and MatMul, which writes its gradient in place."""
    repeat, total, matmul = Repeat(7), Sum(), MatMul(np.ones((8, 3)))
    x = np.random.randn(1, 8)
    y = repeat.forward(x)
    print("repeat", x.shape, "->", y.shape, "backward", repeat.backward(y).shape)
    print("sum", y.shape, "->", total.forward(y).shape, "backward", total.backward(x).shape)
    dW = matmul.grads[0]
    matmul.backward(np.ones_like(matmul.forward(y)))
    print("the gradient is the same array:", matmul.grads[0] is dW, dW.shape)


class TwoLayerNet:
    """1.4: the chapter's net as a user-defined class."""

    def __init__(self, input_size, hidden_size, output_size):
        W1, b1 = 0.01 * np.random.randn(input_size, hidden_size), np.zeros(hidden_size)
        W2, b2 = 0.01 * np.random.randn(hidden_size, output_size), np.zeros(output_size)
        self.layers = [Affine(W1, b1), Sigmoid(), Affine(W2, b2)]
        self.loss_layer = SoftmaxWithLoss()
        self.params = [p for layer in self.layers for p in layer.params]
        self.grads = [g for layer in self.layers for g in layer.grads]

    def predict(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def forward(self, x, t):
        return self.loss_layer.forward(self.predict(x), t)

    def backward(self, dout=1):
        dout = self.loss_layer.backward(dout)
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout


def training(epochs):
    """1.4: the spiral and the training loop; returns the accuracy."""
    np.random.seed(1984)
    x, t = spiral.load_data()  # host arrays: the layers move each batch to the device
    model, optimizer = TwoLayerNet(2, 10, 3), SGD(lr=1.0)
    for _ in trange(epochs, unit="epoch"):
        order = numpy.random.permutation(len(x))
        for start in range(0, len(x), 30):
            rows = order[start : start + 30]
            loss = model.forward(x[rows], t[rows])
            model.backward()
            optimizer.update(model.params, model.grads)
    accuracy = (to_cpu(model.predict(x)).argmax(axis=1) == t.argmax(axis=1)).mean()
    print(f"last loss {loss:.2f}, accuracy {accuracy:.3f} on the {len(x)} points")
    return accuracy


def main(epochs=300):
    """Run all sections; return the accuracy of the last one."""
    for section in (vectors_and_matrices, inference, nodes):
        section()
    return training(epochs)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.add_argument("--epochs", type=int)
    main(**vars(parser.parse_args()))
