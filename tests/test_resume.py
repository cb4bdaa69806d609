"""A training that stops anywhere goes on from its last checkpoint to the very same numbers."""

import numpy
import pytest

import nnx
from nnx import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Affine,
    BatchNorm,
    Dropout,
    MatMul,
    Momentum,
    Nesterov,
    RMSprop,
    Sequential,
    Sigmoid,
    SoftmaxWithLoss,
    Trainer,
    initializers,
    np,
    to_cpu,
)
from nnx.callbacks import BestWeights, Checkpoint, EarlyStopping, LearningRate
from nnx.optimizer import cosine_decay

pytest.importorskip("safetensors")
OPTIMIZERS = [SGD, Momentum, Nesterov, AdaGrad, RMSprop, Adam, AdamW]
GENERATORS = {
    "global": lambda: numpy.random.seed(3),
    "RandomState": lambda: numpy.random.RandomState(3),
    **{
        name: lambda name=name: numpy.random.Generator(getattr(numpy.random, name)(3))
        for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
    },
}


def new_model(dtype="float32", seed=1):
    """A net with all that has to be remembered: shared and tied weights, dropout, running statistics."""
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


def new_trainer(optimizer=Adam, generator="PCG64", dtype="float32", seed=1):
    return Trainer(new_model(dtype, seed), optimizer(0.01), rng=GENERATORS[generator]())


def fit(trainer, *callbacks, epochs=3, **options):
    """90 rows of the spiral in batches of 20, the last one smaller: 5 steps an epoch."""
    x, t = nnx.spiral.load_data()
    trainer.fit(
        x[::4][:70], t[::4][:70], epochs, 16, 5.0, 3, validation=(x[1::9], t[1::9]), verbose=False,
        callbacks=callbacks, **options,
    )  # fmt: skip


def everything(trainer):
    """Return what must be equal, bit for bit."""
    optimizer = {
        name: [to_cpu(a).tobytes() for a in value] if isinstance(value, list) else value
        for name, value in vars(trainer.optimizer).items()
    }
    layers = [trainer.model.layers[3], trainer.model.layers[1].layers[0]]
    return {
        "params": [to_cpu(p).tobytes() for p in trainer.model.params],
        "optimizer": optimizer,
        "dropout": (layers[0].seed, layers[0].calls),
        "statistics": [to_cpu(a).tobytes() for a in (layers[1].running_mean, layers[1].running_var)],
        "loss_list": trainer.loss_list,
        "val_list": trainer.val_list,
        "epoch": (trainer.current_epoch, trainer.iteration),
        "rng": repr(initializers.get_state(initializers.generator(trainer.rng))),
    }


def callbacks():
    return LearningRate(cosine_decay(0.02, 15)), EarlyStopping(2), BestWeights()


class Stop(Exception):
    """Ends a fit without any of the ends that Trainer knows, as a kill would."""


class After:
    """Raises Stop after some steps."""

    last = True

    def __init__(self, steps):
        self.steps = steps

    def on_step(self, trainer):
        self.steps -= 1
        if self.steps == 0:
            raise Stop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10, 14])
def test_a_resumed_training_is_one_that_never_stopped(optimizer, steps, tmp_path):
    expected = new_trainer(optimizer)
    fit(expected, *callbacks())
    with pytest.raises(Stop):
        fit(new_trainer(optimizer), Checkpoint(tmp_path, every_steps=1), *callbacks(), After(steps))
    trainer = new_trainer(optimizer, seed=2)
    trainer.resume(tmp_path)
    fit(trainer, *callbacks(), Checkpoint(tmp_path))
    assert everything(trainer) == everything(expected)
