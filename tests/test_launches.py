"""Launches, synchronizations and copies of a training step, counted rather than timed."""

from __future__ import annotations

import numpy
import pytest

import nnx
from nnx import GPU, np

if not GPU:
    pytest.skip("launches are counted on CuPy: run with NNX_GPU=1", allow_module_level=True)
cupy_on_cpu = pytest.importorskip("cupy_on_cpu", reason="launches are counted by cupy-on-cpu's device only")

pytestmark = pytest.mark.gpu

D, H, C, N = 20, 10, 4, 30
QUIET = ("syncs", "h2d_copies", "d2h_copies", "d2d_copies", "memsets", "device_mallocs")


def data(rows=N, dtype="float32"):
    rng = numpy.random.default_rng(0)
    return np.asarray(rng.normal(size=(rows, D)).astype(dtype)), np.asarray(rng.integers(0, C, rows))


def counted(step, linear_warmup=2, memsets=0):
    """Return the number of launches of `step`, and check that it does not synchronize, copy or allocate."""
    for _ in range(linear_warmup):
        step()
    cupy_on_cpu.reset()
    step()
    counters = cupy_on_cpu.counters()
    assert {name: counters[name] for name in QUIET} == {**dict.fromkeys(QUIET, 0), "memsets": memsets}
    return counters["launches"]


def model_step(model, x, t, max_grad=None):
    optimizer = nnx.SGD(0.1)

    def step():
        model.forward(x, t)
        model.backward()
        if max_grad is not None:
            nnx.clip_grads(model.grads, max_grad)
        optimizer.update(model.params, model.grads)

    return step


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_step_of_the_two_layer_net(dtype):
    x, t = data(dtype=dtype)
    assert counted(model_step(nnx.TwoLayerNet(D, H, C, dtype=dtype, rng=0), x, t)) <= 14


LAYERS = {  # launches of forward and backward
    nnx.Sigmoid: 2,
    nnx.ReLU: 2,
    nnx.Tanh: 2,
    nnx.GELU: 2,
    nnx.Softmax: 2,
    nnx.Dropout: 2,
    nnx.BatchNorm: 4,
    nnx.LayerNorm: 3,
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(kind, dtype):
    x, _ = data(dtype=dtype)
    params = [np.ones(D, dtype), np.zeros(D, dtype)] if kind in (nnx.BatchNorm, nnx.LayerNorm) else []
    layer = kind(*params)
    assert counted(lambda: layer.backward(layer.forward(x))) <= LAYERS[kind]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", [nnx.SoftmaxWithLoss, nnx.SigmoidWithLoss, nnx.MeanSquaredError])
def test_a_loss(kind, weighted):
    x, labels = data()
    t = {nnx.SoftmaxWithLoss: labels, nnx.SigmoidWithLoss: (x > 0).astype("int64")}.get(kind, -x)
    weight = np.arange(N, dtype="float64") if weighted else None
    layer = kind()
    launches = counted(lambda: (layer.forward(x, t, weight), layer.backward()))
    assert launches <= (9 if weighted else 2)  # sum of the weights, and division by it


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "states", "forward", "backward"),
    [(nnx.layers.TimeRNN, 1, 2, 2), (nnx.layers.TimeLSTM, 2, 2, 2), (nnx.layers.TimeGRU, 1, 4, 4)],
)
def test_a_time_step(kind, states, forward, backward, dtype):
    """A product and a kernel for the gates; two of each in a GRU. Zeros are the first states and their gradients."""
    layer, launches = kind.init(D, H, dtype=dtype, rng=0), {}
    for steps in (4, 10):
        xs, dhs = np.ones((N, steps, D), dtype), np.ones((N, steps, H), dtype)
        launches[steps] = (
            counted(lambda xs=xs: layer.forward(xs), 5, memsets=states),
            counted(lambda dhs=dhs: layer.backward(dhs), 5, memsets=2 if kind is nnx.layers.TimeGRU else states),
        )
    assert launches[10][0] - launches[4][0] == 6 * forward
    assert launches[10][1] - launches[4][1] == 6 * backward
    # The product of all steps, and bias; first and last states.
    assert launches[4][0] - 4 * forward <= 2 + 2 * states
    assert launches[4][1] - 4 * backward <= 10


@pytest.mark.parametrize("steps", [1, 6])
def test_attention_takes_as_many_launches_for_all_steps_as_for_one(steps):
    """Forward: two products and softmax. Backward: three, its gradient, and two concatenations, of two launches each.

    CuPy copies hs_enc, transposed, for the first product of each.
    """
    layer, dtype = nnx.layers.TimeAttention(), "float32"
    hs_enc, hs_dec = np.ones((N, 4, H), dtype), np.ones((N, steps, H), dtype)
    assert counted(lambda: layer.forward(hs_enc, hs_dec)) <= 4
    assert counted(lambda: layer.backward(hs_dec)) <= 9


def test_clipping_adds_two_launches():
    x, t = data()
    assert counted(model_step(nnx.TwoLayerNet(D, H, C, rng=0), x, t, max_grad=0.1)) <= 14 + 2


@pytest.mark.parametrize("activation", [nnx.Sigmoid, nnx.ReLU, nnx.Tanh])
def test_custom_loop_adds_the_product_for_the_gradient_of_the_data(activation):
    def weights(rows, columns):
        return np.full((rows, columns), 0.1, "float32"), np.zeros(columns, "float32")

    x, t = data()
    layers = [nnx.Affine(*weights(D, H)), activation(), nnx.Affine(*weights(H, C))]
    loss_layer, optimizer = nnx.SoftmaxWithLoss(), nnx.SGD(0.1)
    params = [p for layer in layers for p in layer.params]

    def step():
        a = x
        for layer in layers:
            a = layer.forward(a)
        loss_layer.forward(a, t)
        dout = loss_layer.backward()
        for layer in reversed(layers):
            dout = layer.backward(dout)
        optimizer.update(params, [g for layer in layers for g in layer.grads])

    assert counted(step) <= 15


def test_update_and_clipping_of_any_number_of_layers_take_three_launches():
    params = [np.ones((i + 1, 5), "float32") for i in range(40)]
    grads = [np.ones_like(p) for p in params]

    def step():
        nnx.clip_grads(grads, 0.1)
        nnx.SGD(0.1).update(params, grads)

    assert counted(step) == 3


class Counts:
    """A callback that records the counters after every step."""

    def __init__(self):
        self.steps = []

    def on_begin(self, trainer):
        cupy_on_cpu.reset()

    def on_step(self, trainer):
        self.steps.append((trainer.current_epoch, trainer.iteration, cupy_on_cpu.counters()))
        cupy_on_cpu.reset()


@pytest.mark.parametrize("where", ["host", "device"])
def test_the_trainer_adds_one_launch_a_step_and_five_an_epoch(where):
    x, t = data(rows=100)
    if where == "host":
        x, t = nnx.to_cpu(x), nnx.to_cpu(t)
    counts = Counts()
    trainer = nnx.Trainer(nnx.TwoLayerNet(D, H, C, rng=0), nnx.SGD(0.1), rng=0)
    trainer.fit(x, t, max_epoch=6, batch_size=N, eval_interval=None, verbose=False, callbacks=[counts])
    assert len(counts.steps) == 6 * 4  # the fourth batch of an epoch has 10 rows
    for epoch, iteration, counters in counts.steps:
        if epoch < 4:  # until then CuPy's pool may grow
            continue
        # The check of the parameters, the gathers of x and t; the copies of the last batch, which the model keeps.
        once = {1: 3, 4: 2}.get(iteration, 0)
        assert counters["launches"] <= 14 + 1 + once
        quiet = {name: counters[name] for name in QUIET}
        # At an epoch's end the losses of two sizes of batch are read, and whether the parameters are finite.
        ends = {"h2d_copies": 1, "syncs": 3, "d2h_copies": 3} if iteration == 1 else {}
        assert quiet == {**dict.fromkeys(QUIET, 0), **ends}


def test_evaluation_and_epoch_each_synchronize_twice():
    x, t = data(rows=90)
    counts = Counts()
    trainer = nnx.Trainer(nnx.TwoLayerNet(D, H, C, rng=0), nnx.SGD(0.1), rng=0)
    trainer.fit(x, t, max_epoch=4, batch_size=N, eval_interval=3, verbose=False, callbacks=[counts])
    syncs = {iteration: counters["syncs"] for epoch, iteration, counters in counts.steps if epoch == 3}
    assert syncs == {1: 4, 2: 0, 3: 0}  # the mean loss, and whether the parameters are finite


def test_host_benchmark_table():
    from benchmarks import host

    rows = {name: cells for name, *cells in host.measure(rounds=2, repeats=10)}
    assert rows["step 2-10-3/30"][0] == "14"
    assert rows[host.PRODUCT][0] == "1"
    assert all(float(products) > 0 for *_, products in rows.values())
