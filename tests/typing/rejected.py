"""Code that a type checker must reject: exactly the marked lines."""

import numpy

from nnx import SGD, Affine, ReLU, Sequential, SoftmaxWithLoss, Trainer, TwoLayerNet, np
from nnx.callbacks import EarlyStopping
from nnx.testing import check_gradients, check_layer

model, sgd = TwoLayerNet(2, 3, 4), SGD(0.1)
x, t = numpy.ones((5, 2)), numpy.ones(5, int)
trainer = Trainer(model, sgd)

Trainer(model, SGD)  # rejected
Trainer(3, "x")  # rejected
Trainer(sgd, model)  # rejected
Trainer(None, sgd)  # rejected
Trainer(SoftmaxWithLoss, sgd)  # rejected
trainer.fit(x, t, callbacks=EarlyStopping())  # rejected
trainer.fit(x, t, callbacks=[EarlyStopping])  # rejected
trainer.fit(x, t, callbacks=None)  # rejected
trainer.fit(x, t, callbacks=[print])  # rejected
Sequential([None])  # rejected
Sequential(ReLU(), SoftmaxWithLoss())  # rejected
Sequential([ReLU()], 3)  # rejected
Sequential([np.ones(3)])  # rejected
Affine(np.ones((2, 3)))  # rejected
check_gradients(np.ones(3), x)  # rejected
check_layer(lambda dtype: 3, x)  # rejected
