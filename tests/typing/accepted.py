"""Code that a type checker must accept: nnx's objects, and user-defined classes without a base class."""

from typing import Any

import numpy

from nnx import (
    SGD,
    Adam,
    Affine,
    BatchNorm,
    Dropout,
    MatMul,
    ReLU,
    Sequential,
    SoftmaxWithLoss,
    Trainer,
    TwoLayerNet,
    np,
)
from nnx.callbacks import BestWeights, Checkpoint, EarlyStopping, LearningRateScheduler, Log
from nnx.initializers import he
from nnx.models import mlp
from nnx.optimizer import cosine_decay
from nnx.protocols import Layer
from nnx.testing import check_gradients, check_layer


class Scale:
    """A layer."""

    def __init__(self, factor: np.ndarray) -> None:
        self.params = [factor]
        self.grads = [np.zeros_like(factor)]

    def forward(self, x: np.ndarray, train_flg: bool = True) -> Any:
        """Return x times the factor."""
        self.x = x
        return x * self.params[0]

    def backward(self, dout: np.ndarray) -> Any:
        """Return the gradient of x."""
        self.grads[0][...] = (dout * self.x).sum()
        return dout * self.params[0]


class Loss:
    """A loss layer without parameters."""

    def forward(self, x: np.ndarray, t: np.ndarray) -> Any:
        """Return the loss."""
        return abs(x - t).mean()

    def backward(self, dout: float = 1) -> np.ndarray:
        """Return the gradient of x."""
        return np.zeros(1)


class Net:
    """A model."""

    params: list[Any]
    grads: list[Any]

    def forward(self, x: Any, t: Any) -> Any:
        """Return the loss."""

    def backward(self) -> None:
        """Write the gradients."""


class Sign:
    """An optimizer."""

    def update(self, params: list[np.ndarray], grads: list[np.ndarray]) -> None:
        """Take a step."""


class Counter:
    """A callback with one of the methods."""

    steps = 0

    def on_step(self, t: Trainer) -> None:
        """Count a step."""
        self.steps += 1


W, b, ones = np.ones((2, 3)), np.ones(3), np.ones(3)
layers: list[Layer] = [Affine(W, b), BatchNorm(ones, b), ReLU(), Dropout(0.5), Scale(np.ones(1)), Sequential([ReLU()])]
model = Sequential(layers, SoftmaxWithLoss())
Sequential([Scale(np.ones(1))], Loss())
Sequential((ReLU() for _ in range(2)), None)
trainer = Trainer(model, Adam(), rng=0)
Trainer(TwoLayerNet(2, 3, 4), SGD(0.1))
Trainer(Net(), Sign())
every: list[Any] = [EarlyStopping(), BestWeights(), Checkpoint("here"), LearningRateScheduler(cosine_decay(0.1, 9))]
x, t = numpy.ones((5, 2)), numpy.ones(5, int)
trainer.fit(x, t, callbacks=[EarlyStopping(), BestWeights(), Counter()])
trainer.fit(x, t, callbacks=(Counter() for _ in range(2)), validation=(x, t))
trainer.fit(x, t, callbacks=every)
rows: list[dict[str, float]] = []
trainer.fit(
    x, t, validation=(x, t), metrics={"f1": lambda scores, t: 1.0}, sample_weight=t, callbacks=[Log(rows.append)]
)
net = mlp([2, 3, 4], activation="relu", batch_norm=True, dropout=0.2, rng=0)
Trainer(net, SGD()).fit(net.predict(x, batch_size=2), net.predict_proba(x))
Sequential([Affine.init(2, 3, initializer=he, dtype="float64"), BatchNorm.init(3), MatMul.init(3, 4)], net.loss_layer)
check_gradients(Scale(np.ones(1)), x)
check_layer(lambda dtype: Scale(np.ones(1, dtype)), x)
