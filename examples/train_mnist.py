"""Classify MNIST's handwritten digits of 28 x 28 pixels, read from its four IDX files, which are not included.

--data is the folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte
and t10k-labels-idx1-ubyte, uncompressed or with .gz. A 784-512-10 net with ReLU is trained by Adam, with
NNX_GPU=1 on the GPU. The last line of output is the accuracy on the test digits.
"""

import gzip
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy

from nnx import Adam, Affine, ReLU, Sequential, SoftmaxWithLoss, Trainer, initializers, np


def read_idx(folder, name, axes):
    """Read an IDX file of bytes into an array; format: two zeros, 8, the number of axes, their lengths, the data."""
    paths = [Path(folder) / name, Path(folder) / f"{name}.gz"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"expected {paths[0]} or {paths[1]}: one of the four IDX files of MNIST")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"{path}: expected an IDX file of bytes with {axes} axes, it begins with {raw[:4].hex()}")
    shape = numpy.frombuffer(raw, ">u4", axes, offset=4)
    if len(raw) != 4 + 4 * axes + shape.prod(dtype=object):
        raise ValueError(f"{path}: {len(raw)} bytes are not those of {' x '.join(map(str, shape))}; is it whole?")
    return numpy.frombuffer(raw, "u1", offset=4 + 4 * axes).reshape(shape)


def load(folder, part):
    """Return pixels in [0, 1] of shape (N, 784) and labels (N,) of the part 'train' or 't10k'."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {part} has {len(images)} images and {len(labels)} labels")
    return images.reshape(len(images), -1).astype("float32") / 255, labels


def main(data, epochs=10, hidden_size=512, batch_size=128, lr=0.001, seed=0):
    """Return the accuracy on the test digits."""
    (x, t), (x_test, t_test) = load(data, "train"), load(data, "t10k")
    rng = numpy.random.default_rng(seed)
    sizes = [(x.shape[1], hidden_size), (hidden_size, 10)]
    W1, W2 = (initializers.he(size, rng=rng) for size in sizes)
    b1, b2 = (np.zeros(size[1], "float32") for size in sizes)
    model = Sequential([Affine(W1, b1, input_grad=False), ReLU(), Affine(W2, b2)], SoftmaxWithLoss())
    print(model)
    Trainer(model, Adam(lr), rng=rng).fit(x, t, epochs, batch_size, eval_interval=100)
    _, accuracy = model.evaluate(x_test, t_test)
    print(f"accuracy {accuracy:.4f} on the {len(x_test)} test digits")
    return accuracy


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int)
    main(**vars(parser.parse_args()))
