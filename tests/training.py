"""A training run with all kinds of state; as a program, one to be interrupted.

python tests/training.py OPTIMIZER FOLDER [HOW]
"""

import json
import os
import signal
import sys

import numpy

import nnx
from nnx import (
    Affine,
    BatchNorm,
    Dropout,
    MatMul,
    Sequential,
    Sigmoid,
    SoftmaxWithLoss,
    Trainer,
    checkpoint,
    initializers,
    np,
    to_cpu,
)
from nnx.callbacks import BestWeights, Checkpoint, EarlyStopping, LearningRateScheduler
from nnx.optimizer import cosine_decay
from nnx.rng import as_generator, get_state

OPTIMIZERS = ["SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW"]
GENERATORS = {
    "global": lambda: numpy.random.seed(3),
    "RandomState": lambda: numpy.random.RandomState(3),
    **{
        name: lambda name=name: numpy.random.Generator(getattr(numpy.random, name)(3))
        for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
    },
}


def new_model(dtype="float32", seed=1):
    """Return a net with shared and tied weights, a net inside it, running statistics and dropout."""
    rng = numpy.random.default_rng(seed)
    W = initializers.xavier((6, 6), dtype, rng)
    return Sequential(
        [
            Affine(initializers.xavier((2, 6), dtype, rng), np.zeros(6, dtype)),
            Sequential([BatchNorm(np.ones(6, dtype), np.zeros(6, dtype)), Sigmoid()]),
            MatMul(W),
            Dropout(0.2, rng=rng),
            MatMul(W.T),
            MatMul(W),
            Affine(initializers.xavier((6, 3), dtype, rng), np.zeros(3, dtype)),
        ],
        SoftmaxWithLoss(),
    )


def new_trainer(optimizer="Adam", generator="PCG64", dtype="float32", seed=1):
    return Trainer(new_model(dtype, seed), getattr(nnx, optimizer)(0.01), rng=GENERATORS[generator]())


def callbacks():
    """Return the callbacks with state."""
    return [LearningRateScheduler(cosine_decay(0.02, 15)), EarlyStopping(50), BestWeights()]


def fit(trainer, *callbacks, epochs=3, batch_size=16, **options):
    """Train on 70 points of the spiral in batches of 16, the last one smaller: 5 steps an epoch."""
    x, t = nnx.spiral.load_data()
    options = {"validation": (x[1::9], t[1::9]), "verbose": False, "callbacks": callbacks, **options}
    trainer.fit(x[::4][:70], t[::4][:70], epochs, batch_size, 5.0, 3, **options)


def everything(trainer):
    """Return all state that must be equal bit for bit."""
    statistics, dropout = trainer.model.layers[1].layers[0], trainer.model.layers[3]
    return {
        "params": _bytes(trainer.model.params),
        "optimizer": {n: _bytes(v) if isinstance(v, list) else v for n, v in vars(trainer.optimizer).items()},
        "dropout": (dropout.seed, dropout.calls),
        "statistics": _bytes([statistics.running_mean, statistics.running_var]),
        "loss_list": trainer.loss_list,
        "val_list": trainer.val_list,
        "epoch": (trainer.current_epoch, trainer.iteration),
        "rng": repr(get_state(as_generator(trainer.rng))),
    }


def _bytes(arrays):
    return [(a.dtype, a.shape, to_cpu(a).tobytes()) for a in arrays]


class Stop(Exception):
    """Ends a fit without notifying Trainer, like a kill."""


def stop():
    raise Stop


def check_resumed(folder, optimizer="Adam", generator="PCG64", others=callbacks, **options):
    """Resume in a new trainer with other weights, and compare with an uninterrupted one."""
    expected = new_trainer(optimizer, generator)
    fit(expected, *others(), **options)
    expected = everything(expected)
    trainer = new_trainer(optimizer, generator, seed=2)
    trainer.resume(folder)
    fit(trainer, *others(), **options)
    assert everything(trainer) == expected


def values(model):
    return [to_cpu(p).copy() for p in model.params]


def with_header(words, data=b""):
    text = words if isinstance(words, bytes) else json.dumps(words).encode()
    return len(text).to_bytes(8, "little") + text + data


class At:
    """Calls a function at the end of one step, after the preceding callbacks have saved."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_checkpoint(self, trainer):
        self.step -= trainer.iteration > 0
        if self.step == 0 and trainer.iteration:
            self.function()


def main(optimizer, folder, how="run"):
    """Train 60 epochs with a checkpoint every step; `write` is killed within a save, `term` and `int` get signals."""
    extra = []
    if how == "write":
        flush, calls = checkpoint._fsync, []

        def kill(path, flags):
            calls.append(path)
            if len(calls) == 41:  # two per save: in the 21st, between write and rename
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path, flags)

        checkpoint._fsync = kill
    elif how in ("term", "int"):
        signum = {"term": signal.SIGTERM, "int": signal.SIGINT}[how]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        extra = [At(7, lambda: os.kill(os.getpid(), signum))]
    trainer = new_trainer(optimizer)
    every = None if extra else 1
    fit(trainer, Checkpoint(folder, every_steps=every, every_epochs=every), *callbacks(), *extra, epochs=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
