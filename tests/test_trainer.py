"""Trainer.fit: training, reports, errors and side effects."""

import contextlib
import copy
import dataclasses
import io
import math
import os
import pickle
import signal
import sys
import threading

import numpy
import pytest
from training import At

import nnx
from benchmarks import book
from nnx import SGD, Affine, MeanSquaredError, Sequential, Sigmoid, SoftmaxWithLoss, Trainer, TwoLayerNet, np, to_cpu
from nnx.callbacks import BestWeights, Callback, Checkpoint, EarlyStopping, LearningRateScheduler
from nnx.optimizer import step_decay
from nnx.trainer import remove_duplicate
from nnx.tree import object_state


def spiral():
    return nnx.spiral.load_data()


def new_trainer(lr=1.0, dtype="float32", rng=0):
    return Trainer(TwoLayerNet(2, 10, 3, dtype=dtype, rng=1), SGD(lr), rng=rng)


class Recorder:
    """A callback that records its calls."""

    def __init__(self):
        self.events = []

    def on_begin(self, trainer):
        self.events.append("begin")

    def on_step(self, trainer):
        self.events.append((trainer.current_epoch, trainer.iteration))

    def on_evaluate(self, trainer):
        self.events.append(trainer.loss_list[-1])

    def on_epoch(self, trainer):
        self.events.append("epoch")

    def on_end(self, trainer):
        self.events.append("end")


def test_fit_matches_the_books_loop():
    x, t = spiral()
    trainer = new_trainer(dtype="float64")
    reference = book.TwoLayerNet(*(to_cpu(p).copy() for p in trainer.model.params))
    trainer.fit(x, t, max_epoch=300, batch_size=30, eval_interval=10, verbose=False)
    rng, losses = numpy.random.default_rng(0), []
    for _ in range(300):
        order = rng.permutation(300)
        for i in range(0, 300, 30):
            losses.append(reference.forward(x[order[i : i + 30]], t[order[i : i + 30]]))
            reference.backward()
            reference.update(1.0)
    for p, expected in zip(trainer.model.params, reference.params, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), expected, rtol=1e-10)
    means = [losses[0], *numpy.mean(numpy.reshape(losses[1:-9], (299, 10)), axis=1)]
    numpy.testing.assert_allclose(trainer.loss_list, means, atol=1e-5)
    _, accuracy = trainer.model.evaluate(x, t)
    assert accuracy >= 0.95


def test_fit_prints_the_books_line_to_a_pipe(capsys):
    x, t = spiral()
    new_trainer().fit(x, t, 2, 30, None, 5)
    out, err = capsys.readouterr()
    assert [line.split(" | loss")[0] for line in out.splitlines()] == [
        "| epoch 1 |  iter 1 / 10 | time 0[s]",
        "| epoch 1 |  iter 6 / 10 | time 0[s]",
        "| epoch 2 |  iter 1 / 10 | time 0[s]",
        "| epoch 2 |  iter 6 / 10 | time 0[s]",
    ]
    assert out.splitlines()[0].endswith("| loss 1.10")
    assert err == ""


def test_fit_shows_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    x, t = spiral()
    new_trainer().fit(x, t, 2, 30)
    out, err = capsys.readouterr()
    assert out == ""
    assert "20/20" in err
    assert "loss 1.1" in err


@pytest.mark.parametrize(("verbose", "lines"), [(True, 1), (False, 0)])
def test_verbose(verbose, lines, capsys):
    x, t = spiral()
    new_trainer().fit(x, t, 1, 30, verbose=verbose)
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_callbacks_are_called_in_order():
    recorder = Recorder()
    trainer = new_trainer()
    trainer.fit(*spiral(), 2, 150, eval_interval=2, verbose=False, callbacks=[recorder])
    first, second = trainer.loss_list
    assert recorder.events == ["begin", first, (0, 1), (0, 2), "epoch", second, (1, 1), (1, 2), "epoch", "end"]
    with pytest.raises(TypeError, match="a callback needs one of on_begin, on_evaluate"):
        trainer.fit(*spiral(), callbacks=[print])


def test_stop_ends_after_the_epoch():
    trainer = new_trainer()
    trainer.fit(*spiral(), 5, 30, verbose=False, callbacks=[At(12, trainer.stop)])
    assert trainer.current_epoch == 2
    trainer.fit(*spiral(), 2, 30, verbose=False)
    assert trainer.current_epoch == 4  # an earlier stop does not affect this fit


def test_second_fit_continues_training():
    once, twice = new_trainer(), new_trainer()
    once.fit(*spiral(), 4, 30, eval_interval=10, verbose=False)
    for _ in range(2):
        twice.fit(*spiral(), 2, 30, eval_interval=10, verbose=False)
    assert len(twice.loss_list) == 4
    assert twice.current_epoch == 4
    for p, q in zip(once.model.params, twice.model.params, strict=True):
        numpy.testing.assert_array_equal(to_cpu(p), to_cpu(q))


def test_last_batch_has_the_remaining_rows_unless_dropped():
    x, t = spiral()
    for drop_last, rows in [(False, [128, 128, 44]), (True, [128, 128])]:
        seen = []
        trainer = new_trainer()
        forward = trainer.model.forward
        trainer.model.forward = lambda x, t, forward=forward, seen=seen: seen.append(len(x)) or forward(x, t)
        trainer.fit(x, t, 1, 128, drop_last=drop_last, verbose=False)
        assert seen == rows


def test_mean_losses_are_weighted_by_rows():
    trainer = new_trainer(lr=0.0)
    x, t = spiral()
    trainer.fit(x, t, 2, 128, eval_interval=3, verbose=False)
    losses = []
    rng = numpy.random.default_rng(0)
    order = rng.permutation(300)
    for rows in (order[128:256], order[256:], rng.permutation(300)[:128]):
        losses.append((trainer.model.evaluate(x[rows], t[rows])[0], len(rows)))
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert trainer.loss_list[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bytes_at_a_time", [1, 1 << 12, 1 << 40])
def test_chunk_size_does_not_change_the_results(bytes_at_a_time, monkeypatch):
    expected = new_trainer()
    expected.fit(*spiral(), 2, 70, verbose=False)
    monkeypatch.setattr("nnx.batches.chunk_bytes", lambda x: bytes_at_a_time)
    trainer = new_trainer()
    trainer.fit(*spiral(), 2, 70, verbose=False)
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), to_cpu(expected.model.params[0]))


def test_data_that_does_not_fit_the_device_stays_on_the_host(monkeypatch):
    expected = new_trainer()
    expected.fit(*spiral(), 2, 70, verbose=False)
    monkeypatch.setattr("nnx.batches.fits_on_device", lambda *arrays: False)
    trainer = new_trainer()
    trainer.fit(*spiral(), 2, 70, verbose=False)
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), to_cpu(expected.model.params[0]))


def test_a_layer_keeps_one_batch_in_memory():
    """Of the last gather, which may be a quarter of the memory of a GPU."""

    class Own(nnx.MatMul):
        batch_names = ()

        def forward(self, x):
            self.own = x
            return super().forward(x)

    model = Sequential([Own(np.ones((2, 3)))], SoftmaxWithLoss())
    Trainer(model, SGD(0.1), rng=0).fit(*spiral(), 1, 30, verbose=False)
    assert len(model.layers[0].own) == 30
    assert model.layers[0].own.base is None


def test_after_fit_the_model_lets_the_last_batch_go():
    """Otherwise a pickled model would hold it."""
    x, t = numpy.zeros((300, 50), "float32"), numpy.zeros(300, int)
    model = Sequential(
        [
            Affine(np.zeros((50, 4), "f"), np.zeros(4, "f")),
            nnx.ReLU(),
            nnx.LayerNorm(np.ones(4, "f"), np.zeros(4, "f")),
        ],
        SoftmaxWithLoss(),
    )
    size = len(pickle.dumps(model))
    Trainer(model, SGD(0.1), rng=0).fit(x, t, 1, 150, verbose=False)
    assert len(pickle.dumps(model)) < size + 1000
    model.forward(x, t)
    twin = copy.deepcopy(model)
    for net in (model, twin):  # a copy between forward and backward is complete
        net.backward()
    numpy.testing.assert_array_equal(to_cpu(twin.grads[0]), to_cpu(model.grads[0]))


@pytest.mark.parametrize("kind", ["device", "lists", "indices"])
def test_fit_accepts_data_of_any_type(kind):
    x, t = spiral()
    expected = new_trainer()
    expected.fit(x, t, 1, 30, verbose=False)
    trainer = new_trainer()
    given = {"device": (np.asarray(x), np.asarray(t)), "lists": (x.tolist(), t.tolist()), "indices": (x, t.argmax(1))}
    trainer.fit(*given[kind], 1, 30, verbose=False)
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), to_cpu(expected.model.params[0]))


def test_fit_does_not_change_data_or_the_global_generator():
    x, t = spiral()
    before = x.copy(), t.copy()
    numpy.random.seed(3)
    expected = numpy.random.rand()
    numpy.random.seed(3)
    new_trainer().fit(x, t, 1, 30, verbose=False)
    numpy.testing.assert_array_equal(x, before[0])
    numpy.testing.assert_array_equal(t, before[1])
    assert numpy.random.rand() == expected


def test_without_rng_numpys_global_generator_shuffles():
    curves = []
    for _ in range(2):
        numpy.random.seed(11)
        trainer = new_trainer(rng=None)
        trainer.fit(*spiral(), 2, 30, eval_interval=1, verbose=False)
        curves.append(trainer.loss_list)
    assert curves[0] == curves[1]


def test_max_grad_bounds_the_step():
    trainer = new_trainer()
    before = [to_cpu(p).copy() for p in trainer.model.params]
    trainer.fit(*spiral(), 1, 300, 1e-3, verbose=False)
    step = math.sqrt(sum(((to_cpu(p) - b) ** 2).sum() for p, b in zip(trainer.model.params, before, strict=True)))
    assert step == pytest.approx(1e-3, rel=0.02)


def test_validation_after_every_epoch():
    x, t = spiral()
    trainer = new_trainer()
    trainer.fit(x, t, 3, 30, validation=(x, t), verbose=False)
    assert len(trainer.val_list) == 3
    assert trainer.val_list[-1] == trainer.model.evaluate(x, t)


def test_invalid_validation_data_is_detected_before_training():
    trainer = new_trainer()
    with pytest.raises(ValueError, match="Affine: x must have shape"):
        trainer.fit(*spiral(), validation=(numpy.zeros((3, 5)), [0, 1, 2]))
    assert trainer.current_epoch == 0


class Losses:
    """A model with given validation losses, whose only weight counts the steps."""

    def __init__(self, *losses):
        self.params, self.grads, self.losses = [np.zeros(1)], [-np.ones(1)], iter((0, *losses))

    def forward(self, x, t):
        return np.zeros(())

    def backward(self, dout=1):
        pass

    def evaluate(self, x, t):
        return next(self.losses), None


def fit_losses(losses, *callbacks, epochs=10):
    trainer = Trainer(Losses(*losses), SGD(1.0), rng=0)
    data = numpy.zeros((2, 1)), numpy.zeros(2)
    trainer.fit(*data, epochs, 2, verbose=False, validation=data, callbacks=callbacks)
    return trainer


def test_early_stopping_waits_for_its_patience():
    losses = [5, 4, 6, 3, 3, 4, 3, 2, 1, 0]
    assert fit_losses(losses, EarlyStopping(1)).current_epoch == 3
    assert fit_losses(losses, EarlyStopping(2)).current_epoch == 6
    assert fit_losses(losses, EarlyStopping(9)).current_epoch == 10
    assert fit_losses([5, 9, 8, 7, 6, 5, 4], EarlyStopping(3)).current_epoch == 4  # lower than the last, not the lowest


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
@pytest.mark.parametrize("name", ["val_f1", "seen"])
def test_callbacks_follow_any_number_of_the_history_in_either_direction(name, mode, sign):
    """A metric, or a number that an earlier callback adds to the row."""
    values = iter([sign * v for v in (5, 4, 6, 3, 3, 4, 3, 2, 1, 0)])

    class Model(Losses):
        def evaluate(self, x, t, metrics=None):
            return (0.0, None, {"f1": next(values)}) if metrics else (0.0, None)

    class Add(Callback):
        def on_epoch(self, trainer):
            trainer.history[-1]["seen"] = next(values)

    early, best = (kind(monitor=name, mode=mode) for kind in (EarlyStopping, BestWeights))
    early.patience = 2
    trainer, data = Trainer(Model(), SGD(1.0), rng=0), (numpy.zeros((2, 1)), numpy.zeros(2))
    options = {"verbose": False, "callbacks": [Add(), early, best]}
    if name == "val_f1":
        options |= {"validation": data, "metrics": {"f1": max}, "callbacks": [early, best]}
    trainer.fit(*data, 10, 2, **options)
    assert trainer.current_epoch == 6
    assert (best.best, best.epoch, early.best) == (3 * sign, 4, 3 * sign)
    assert float(trainer.model.params[0][0]) == 4


def test_accuracy_is_known_to_be_better_if_higher():
    assert EarlyStopping(monitor="val_accuracy").best == -math.inf
    best, x_t = BestWeights(monitor="val_accuracy"), spiral()
    trainer = new_trainer()
    trainer.fit(*x_t, 20, 30, validation=x_t, verbose=False, callbacks=[best])
    accuracies = [row["val_accuracy"] for row in trainer.history]
    assert (best.best, best.epoch) == (max(accuracies), 1 + accuracies.index(max(accuracies)))
    assert trainer.model.evaluate(*x_t)[1] == best.best


def test_an_improvement_must_exceed_min_delta():
    losses = [5, 4.5, 4.1, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4, 3.3]
    assert fit_losses(losses, EarlyStopping(2)).current_epoch == 10
    early = EarlyStopping(3, min_delta=1.0)
    assert fit_losses(losses, early).current_epoch == 7  # 3.9 is, compared with the 5 that was the last improvement
    assert early.best == 3.9
    assert fit_losses([4, 3, 3, 1], EarlyStopping(2, min_delta=1.0)).current_epoch == 3  # 3 is not below 3


def test_settings_of_callbacks_that_follow_a_number_are_checked():
    for kind in (EarlyStopping, BestWeights):
        name = kind.__name__
        with pytest.raises(ValueError, match=rf'{name}: mode must be "min" or "max" for val_f1'):
            kind(monitor="val_f1")
        with pytest.raises(ValueError, match=rf'{name}: mode must be "min", "max" or None, got \'auto\''):
            kind(mode="auto")
        with pytest.raises(TypeError, match=rf"{name}: monitor must be a key of Trainer.history, got 3"):
            kind(monitor=3)
        with pytest.raises(ValueError, match=rf"{name}: the history has no val_f1, only epoch, loss, .*metrics="):
            fit_losses([3, 2], kind(monitor="val_f1", mode="max"))
        for other in (kind(monitor="val_accuracy"), kind(mode="max")):
            with pytest.raises(
                ValueError, match=f"the saved best is the lowest val_loss, here it is the highest {other.monitor}"
            ):
                other.check_state(object_state(kind()))
    with pytest.raises(ValueError, match="EarlyStopping: min_delta must be finite and at least 0"):
        EarlyStopping(min_delta=-1)
    assert repr(EarlyStopping(3, monitor="loss", min_delta=0.1)) == (
        "EarlyStopping(patience=3, monitor='loss', min_delta=0.1)"
    )


def test_a_monitor_or_mode_assigned_after_a_fit_starts_from_no_best_value():
    x_t = spiral()
    for kind in (EarlyStopping, BestWeights):
        callback, trainer = kind(), new_trainer()
        for monitor, mode in [("val_loss", None), ("val_accuracy", None), ("val_loss", "max"), ("val_loss", "min")]:
            callback.monitor, callback.mode = monitor, mode
            trainer.fit(*x_t, 1, 30, validation=x_t, verbose=False, callbacks=[callback])
            assert callback.best == trainer.history[-1][monitor]
        callback.monitor, callback.mode = "val_f1", None
        with pytest.raises(ValueError, match=rf'{kind.__name__}: mode must be "min" or "max" for val_f1'):
            new_trainer().fit(*x_t, 1, 30, validation=x_t, verbose=False, callbacks=[callback])


def test_best_weights_are_restored():
    best = BestWeights()
    trainer = fit_losses([5, 4, 2, 6, 3, 2, 9, 9, 9, 9], best)
    assert (best.best, best.epoch) == (2, 3)
    assert float(trainer.model.params[0][0]) == 3


def test_best_weights_that_do_not_fit_are_refused():
    best = BestWeights()
    fit_losses([5] * 10, best)
    state = object_state(best)
    with pytest.raises(ValueError, match="weights must be floating arrays"):
        BestWeights().check_state({**state, "weights": [np.ones(3, int)]})
    with pytest.raises(ValueError, match="the weights of the best value are missing"):
        BestWeights().check_state({**state, "weights": []})
    other = new_trainer()
    best.weights = [np.ones(7)]
    with pytest.raises(
        ValueError, match=r"BestWeights: the saved weights have the shapes \[\(7,\)\], and the model has"
    ):
        best.on_begin(other)


def test_best_weights_include_running_statistics():
    x, t = spiral()
    norm = nnx.BatchNorm(np.ones(10, "float32"), np.zeros(10, "float32"))
    first, _, last = TwoLayerNet(2, 10, 3, rng=1).layers
    model, best = Sequential([Sequential([first, norm]), Sigmoid(), last], SoftmaxWithLoss()), BestWeights()
    data = x[::2], t[::2]
    validation = x[1::2], t[1::2]
    Trainer(model, SGD(10.0), rng=0).fit(*data, 10, 10, validation=validation, verbose=False, callbacks=[best])
    assert best.epoch < 10
    assert model.evaluate(*validation)[0] == pytest.approx(best.best)


@pytest.mark.parametrize("callback", [EarlyStopping(), BestWeights()])
def test_callbacks_that_need_validation_data(callback):
    with pytest.raises(ValueError, match=f"{type(callback).__name__}: there are no validation data"):
        new_trainer().fit(*spiral(), callbacks=[callback], verbose=False)
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(0)


def test_started_callbacks_end_if_another_fails_to_start():
    class Failing(Recorder):
        def on_begin(self, trainer):
            raise RuntimeError("no")

    recorder, failing = Recorder(), Failing()
    with pytest.raises(RuntimeError, match="no"):
        new_trainer().fit(*spiral(), callbacks=[recorder, failing], verbose=False)
    assert (recorder.events, failing.events) == (["begin", "end"], [])


def test_learning_rate_follows_its_schedule_over_several_fits():
    trainer, seen = new_trainer(), []
    update = trainer.optimizer.update
    trainer.optimizer.update = lambda *args: seen.append(trainer.optimizer.lr) or update(*args)
    schedule = LearningRateScheduler(step_decay(1.0, every=3, factor=0.5))
    for _ in range(2):
        trainer.fit(*spiral(), 1, 100, verbose=False, callbacks=[schedule])
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5]


class Batches:
    """An iterable of batches that draws them anew each time, as augmentation does."""

    def __init__(self, count=10):
        self.count, self.passes = count, 0

    def __iter__(self):
        self.passes += 1
        rng = numpy.random.default_rng(self.passes)
        for _ in range(self.count):
            rows = rng.permutation(300)[: rng.integers(20, 30)]
            yield tuple(a[rows] for a in spiral())


def test_fit_iterates_over_batches_in_each_epoch():
    trainer, reference, batches = new_trainer(), new_trainer(), Batches()
    trainer.fit(batches, max_epoch=3, eval_interval=4, verbose=False, validation=spiral())
    assert (batches.passes, trainer.current_epoch, trainer.max_iter) == (3, 3, 10)
    losses, same = [], Batches()
    for _ in range(3):
        for i, (x, t) in enumerate(same):
            losses.append((len(x), float(reference.model.forward(x, t))))
            reference.model.backward()
            reference.optimizer.update(reference.model.params, reference.model.grads)
            if i % 4 == 0:
                rows = sum(n for n, _ in losses)
                assert trainer.loss_list.pop(0) == pytest.approx(sum(n * loss for n, loss in losses) / rows)
                losses = []
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), to_cpu(reference.model.params[0]))
    assert len(trainer.val_list) == 3


def test_a_list_of_batches_equals_their_concatenation_in_order(monkeypatch):
    x, t = spiral()
    rows = numpy.random.default_rng(0).permutation(300)
    expected, trainer = new_trainer(), new_trainer()
    expected.fit(x, t, 1, 30, verbose=False)
    batches = [(x[rows[i : i + 30]].tolist(), t[rows[i : i + 30]]) for i in range(0, 300, 30)]
    recorder = Recorder()
    trainer.fit(batches, max_epoch=1, verbose=False, callbacks=[recorder])
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), to_cpu(expected.model.params[0]))
    assert trainer.loss_list == expected.loss_list
    assert trainer.max_iter == 10


def test_an_epoch_of_batches_is_resumed_after_those_it_has_trained_on(tmp_path):
    pytest.importorskip("safetensors")
    expected, first, second = (new_trainer() for _ in range(3))
    expected.fit(Batches(), max_epoch=2, verbose=False)
    with pytest.raises(MemoryError):
        first.fit(Batches(), max_epoch=2, verbose=False, callbacks=[Checkpoint(tmp_path, every_steps=1), At(14, fail)])
    second.resume(tmp_path)
    assert (second.current_epoch, second.iteration) == (1, 4)
    rest = Batches()
    rest.passes = 1
    second.fit(rest, max_epoch=2, verbose=False)
    numpy.testing.assert_array_equal(to_cpu(second.model.params[0]), to_cpu(expected.model.params[0]))
    second.resume(tmp_path)
    with pytest.raises(ValueError, match="the saved epoch has 0 rows in 10 batches of 0, got 300 rows in 10"):
        second.fit(*spiral(), 2, 30, verbose=False)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (spiral()[0], TypeError, "without t, x must be an iterable of batches .x, t., got ndarray"),
        (3, TypeError, "without t, x must be an iterable of batches .x, t., got int"),
        (iter(Batches()), TypeError, "generator yields its batches once, and max_epoch is 2; pass an object whose"),
        ([], ValueError, "the iterable of batches is empty"),
        ([spiral()[0]], ValueError, r"a batch must be a pair \(x, t\), got array"),
        ([(numpy.ones((3, 2)), [0, 1])], ValueError, r"a batch: x and t must have the same number of rows"),
        ([(numpy.ones((3, 2)), ["a", "b", "c"])], TypeError, "a batch: t: expected real numbers"),
    ],
)
def test_invalid_batches_are_refused(batches, error, message):
    trainer = new_trainer()
    before = to_cpu(trainer.model.params[0]).copy()
    with pytest.raises(error, match=f"^Trainer.fit: {message}"):
        trainer.fit(batches, max_epoch=2, verbose=False)
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), before)


def test_an_iterator_of_batches_is_enough_for_one_epoch(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    trainer = new_trainer()
    trainer.fit(iter(Batches(7)), max_epoch=1)
    assert trainer.max_iter == 7
    assert "7step" in capsys.readouterr().err  # a bar without an end


def test_an_error_before_the_first_step_restores_layers_and_generator():
    model = Sequential(fragile().layers, SoftmaxWithLoss())
    before, trainer = remembered(model), Trainer(model, SGD(0.1), rng=5)
    with pytest.raises(ValueError, match="SoftmaxWithLoss"):
        trainer.fit([(numpy.ones((4, 2), "float32"), [0, 1, 2, 9])], max_epoch=1, verbose=False)
    assert remembered(model) == before

    class Fails(SoftmaxWithLoss):
        def backward(self, dout=1):
            raise MemoryError

    model.loss_layer = Fails()
    with pytest.raises(MemoryError):
        trainer.fit(*spiral(), 1, 30, verbose=False)
    assert remembered(model) == before
    model.loss_layer = SoftmaxWithLoss()
    fresh = Trainer(fragile(), SGD(0.1), rng=5)
    for each in (trainer, fresh):
        each.fit(*spiral(), 1, 30, verbose=False)
    assert remembered(model) == remembered(fresh.model)


def test_an_error_before_the_first_step_keeps_what_was_resumed(tmp_path):
    pytest.importorskip("safetensors")
    expected, trainer = new_trainer(), new_trainer()
    batches = [tuple(a[i : i + 30] for a in spiral()) for i in range(0, 300, 30)]
    expected.fit(batches, max_epoch=2, verbose=False)
    with pytest.raises(MemoryError):
        trainer.fit(batches, max_epoch=2, verbose=False, callbacks=[Checkpoint(tmp_path, every_steps=1), At(14, fail)])
    trainer.resume(tmp_path)
    wrong = [*batches[:4], (numpy.ones((3, 7)), batches[0][1][:3]), *batches[5:]]
    with pytest.raises(ValueError, match="Affine: x must have shape"):
        trainer.fit(wrong, max_epoch=2, verbose=False)
    trainer.fit(batches, max_epoch=2, verbose=False)
    assert trainer.current_epoch == 2
    numpy.testing.assert_array_equal(to_cpu(trainer.model.params[0]), to_cpu(expected.model.params[0]))


def test_a_trainer_cannot_be_loaded_while_it_runs(tmp_path):
    pytest.importorskip("safetensors")
    trainer = new_trainer()
    saves = [Checkpoint(tmp_path), At(12, lambda: trainer.resume(tmp_path))]
    with pytest.raises(
        RuntimeError, match="a checkpoint cannot be loaded while fit runs; load model and optimizer only"
    ):
        trainer.fit(*spiral(), 2, 30, verbose=False, callbacks=saves)
    assert trainer.current_epoch == 1


def test_a_signal_in_the_fit_of_a_callback_saves_the_outer_one(tmp_path, ctrl_c):
    pytest.importorskip("safetensors")
    expected, outer, resumed = new_trainer(), new_trainer(), new_trainer()

    class Search:
        def on_step(self, trainer):
            if trainer.iteration == 2:
                new_trainer().fit(*spiral(), 5, 30, verbose=False, callbacks=[At(2, ctrl_c)])

    def callbacks(*others):
        return [*others, LearningRateScheduler(step_decay(1.0, 3)), Checkpoint(tmp_path)]

    expected.fit(*spiral(), 1, 30, verbose=False, callbacks=callbacks()[:1])
    with pytest.raises(KeyboardInterrupt, match=r"from .*epoch-0000-step-000002\.safetensors with resume"):
        outer.fit(*spiral(), 1, 30, verbose=False, callbacks=callbacks(Search()))
    resumed.resume(tmp_path)
    resumed.fit(*spiral(), 1, 30, verbose=False, callbacks=callbacks())
    numpy.testing.assert_array_equal(to_cpu(resumed.model.params[0]), to_cpu(expected.model.params[0]))


def test_layers_may_be_frozen_and_unfrozen_in_a_callback():
    model = TwoLayerNet(2, 10, 3, rng=0)
    params, grads = model.params, model.grads

    class Freeze:
        def on_epoch(self, trainer):
            first = 2 if trainer.current_epoch == 1 else 0
            model.params, model.grads = params[first:], grads[first:]
            seen.append(to_cpu(params[0]).copy())

    seen = []
    Trainer(model, SGD(0.5), rng=0).fit(*spiral(), 3, 30, verbose=False, callbacks=[Freeze()])
    assert (seen[0] == seen[1]).all()
    assert (seen[1] != seen[2]).any()


@pytest.mark.parametrize("loss", [None, numpy.ones(1), (1.0,), "low", 1j])
def test_the_loss_must_be_one_number(loss):
    class Odd(TwoLayerNet):
        def forward(self, x, t):
            super().forward(x, t)
            return loss

    model = Odd(2, 10, 3, rng=0)
    before = to_cpu(model.params[0]).copy()
    with pytest.raises(TypeError, match=r"Odd.forward\(x, t\) must return the loss, one number, got"):
        Trainer(model, SGD(0.5)).fit(*spiral(), 1, 30, verbose=False)
    assert (to_cpu(model.params[0]) == before).all()


def test_evaluate_must_return_loss_and_accuracy():
    class Odd(TwoLayerNet):
        def evaluate(self, x, t):
            return 0.5

    with pytest.raises(TypeError, match=r"Odd.evaluate must return \(loss, accuracy\), got 0.5"):
        Trainer(Odd(2, 10, 3), SGD(0.5)).fit(*spiral(), 1, 30, validation=spiral(), verbose=False)


def test_the_first_row_of_the_validation_data_may_be_ignored():
    x, t = spiral()[0], spiral()[1].argmax(axis=1)
    t[0] = -1
    model = Sequential(TwoLayerNet(2, 10, 3, rng=0).layers, SoftmaxWithLoss(ignore_label=-1))
    trainer = Trainer(model, SGD(0.5))
    trainer.fit(x, t, 1, 30, validation=(x, t), verbose=False)
    assert len(trainer.val_list) == 1


class Unsized:
    """Has __len__ that raises, as a loader of an endless data set."""

    def __iter__(self):
        return iter(Batches(3))

    def __len__(self):
        raise TypeError("unknown")


class Indexed:
    """Can be iterated over by its indices only."""

    def __getitem__(self, i):
        if i == 3:
            raise IndexError
        return tuple(a[i : i + 30] for a in spiral())


@pytest.mark.parametrize("kind", [Unsized, Indexed])
def test_batches_need_only_be_iterable(kind):
    trainer = new_trainer()
    trainer.fit(kind(), max_epoch=2, verbose=False)
    assert (trainer.current_epoch, trainer.max_iter) == (2, 3)


def test_callbacks_may_be_frozen_dataclasses():
    @dataclasses.dataclass(frozen=True)
    class Frozen(Callback):
        setting: int = 1

    new_trainer().fit(*spiral(), 1, 30, verbose=False, callbacks=[Frozen()])


def test_regression_fits_a_line(rng):
    x = rng.uniform(-1, 1, (200, 1))
    model = Sequential([Affine(np.zeros((1, 1)), np.zeros(1))], MeanSquaredError())
    Trainer(model, SGD(0.5), rng=0).fit(x, 3 * x - 1, 50, 20, verbose=False)
    assert float(model.params[0][0, 0]) == pytest.approx(3, abs=1e-3)
    assert float(model.params[1][0]) == pytest.approx(-1, abs=1e-3)


class OwnNet:
    """A user-defined net with its own layers and loss: y = x @ W, half the squared error."""

    def __init__(self):
        self.params, self.grads = [np.zeros((2, 1))], [np.zeros((2, 1))]

    def forward(self, x, t):
        self.x, self.error = x, x @ self.params[0] - t
        return 0.5 * (self.error**2).mean()

    def backward(self, dout=1):
        self.grads[0][...] = dout * self.x.T @ self.error / len(self.x)


def test_user_defined_net_trains(rng):
    x = rng.standard_normal((100, 2))
    net = OwnNet()
    Trainer(net, SGD(0.5), rng=0).fit(x, x @ [[1.0], [2.0]], 20, 10, verbose=False)
    numpy.testing.assert_allclose(to_cpu(net.params[0]), [[1], [2]], atol=1e-6)


class OwnLayer:
    """A user-defined layer that requires arrays of the array module."""

    def __init__(self):
        self.params, self.grads = [np.zeros((2, 3), "float32")], [np.zeros((2, 3), "float32")]

    def forward(self, x):
        self.x = x
        return np.matmul(x, self.params[0])

    def backward(self, dout):
        self.grads[0][...] = np.matmul(self.x.T, dout)


class OwnLoss:
    """A user-defined loss that also requires arrays of the array module: mean(x * t)."""

    params, grads = (), ()

    def forward(self, x, t):
        self.t = t
        return np.multiply(x, t).mean()

    def backward(self, dout=1):
        return (self.t / self.t.size).astype("float32")


@pytest.mark.parametrize("loss", [SoftmaxWithLoss, OwnLoss])
def test_user_defined_layers_train_on_host_data(loss):
    x, t = spiral()
    model = Sequential([OwnLayer()], loss())
    Trainer(model, SGD(0.1), rng=0).fit(x, t, 2, 30, validation=(x.tolist(), t.tolist()), verbose=False)
    assert to_cpu(model.params[0]).any()


@pytest.mark.parametrize("rng", [None, 0])
def test_copy_of_a_trainer_continues_identically(rng):
    trainer = new_trainer(rng=rng)
    for other in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        other.fit(*spiral(), 1, 30, verbose=False)
        assert other.current_epoch == 1
    assert trainer.current_epoch == 0


def test_trainer_can_be_copied_in_a_callback():
    copies = []
    trainer = new_trainer()
    once = At(3, lambda: copies.extend([copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]))
    trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=[LearningRateScheduler(lambda step: 0.1), once])
    for other in copies:
        other.fit(*spiral(), 1, 30, verbose=False)
        assert other.current_epoch == 1


def tied():
    """A net whose last layer is the first one transposed, and the same net with the gradient by hand."""
    W = np.asarray(numpy.random.default_rng(0).standard_normal((3, 3)) * 0.5)
    return Sequential([nnx.MatMul(W), Sigmoid(), nnx.MatMul(W.T)], SoftmaxWithLoss()), W


def test_gradients_of_shared_weights_are_summed(rng):
    model, W = tied()
    x, t = rng.standard_normal((4, 3)), [0, 1, 2, 0]
    model.forward(x, t)
    model.backward()
    params, grads = remove_duplicate(iter(model.params), iter(model.grads))
    assert params[0] is W
    assert len(params) == len(grads) == 1
    numpy.testing.assert_allclose(to_cpu(grads[0]), to_cpu(model.grads[0] + model.grads[1].T))
    before, total = to_cpu(W).copy(), to_cpu(grads[0])
    Trainer(model, SGD(0.1), rng=0).fit(x, t, 1, 4, verbose=False)
    numpy.testing.assert_allclose(to_cpu(W), before - 0.1 * total, rtol=1e-6)
    assert model.params[1].base is W or nnx.GPU


def test_equal_values_are_not_shared_weights():
    params = [np.zeros((3, 3)), np.zeros((3, 3))]
    grads = [np.ones((3, 3)), np.ones((3, 3))]
    kept, same = remove_duplicate(params, grads)
    assert [p is q for p, q in zip(kept, params, strict=True)] == [True, True]
    assert [g is q for g, q in zip(same, grads, strict=True)] == [True, True]


def state_of(trainer):
    return [to_cpu(p).copy() for p in trainer.model.params], str(trainer.rng.bit_generator.state), trainer.current_epoch


X, T = spiral()
HOLE = X.copy()
HOLE[17, 1] = math.nan
HUGE = X.copy()
HUGE[17, 1] = 1e39  # infinite in float32


@pytest.mark.parametrize(
    ("x", "t", "options", "error", "words"),
    [
        (X, T, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (X, T, {"batch_size": 301}, ValueError, "batch_size must be 1 to 300, the number of rows, got 301"),
        (X, T, {"batch_size": 1.5}, TypeError, "integer"),
        (X, T, {"max_epoch": -1}, ValueError, "max_epoch must be at least 0, got -1"),
        (X, T, {"max_epoch": 1.5}, TypeError, "integer"),
        (X, T, {"max_grad": 0}, ValueError, "max_grad must be positive, or None, got 0"),
        (X, T, {"max_grad": math.nan}, ValueError, "max_grad must be positive, or None, got nan"),
        (X, T, {"validation": (X, T[:-1])}, ValueError, r"validation: .*got shapes \(300, 2\) and \(299, 3\)"),
        (
            X,
            T,
            {"validation": (HOLE, T)},
            ValueError,
            "validation: x holds NaN or infinity in float32",
        ),
        (X, T, {"validation": (X, 3 * T)}, ValueError, "every one-hot row must hold a single 1"),
        (HUGE, T, {}, ValueError, "x holds NaN or infinity in float32, first in row 17"),
        (X, T, {"eval_interval": 0}, ValueError, "eval_interval must be at least 1, got 0"),
        (X, T[:-1], {}, ValueError, r"the same number of rows, at least one, got shapes \(300, 2\) and \(299, 3\)"),
        (X[:0], T[:0], {}, ValueError, "at least one"),
        (HOLE, T, {}, ValueError, "x holds NaN or infinity in float32, first in row 17"),
        (X[:, :1], T, {}, ValueError, r"Affine: x must have shape \(N, 2\)"),
        (X[:, 0], T, {}, ValueError, r"Affine: x must have shape \(N, 2\)"),
        (X, T[:, :2], {}, ValueError, "SoftmaxWithLoss: labels must be integers of shape"),
        (X, T.astype(float), {}, ValueError, "use argmax"),
        (X, T.argmax(1) + 1, {}, ValueError, r"labels must be in \[0, 3\), got 3"),
        (X, T.argmax(1) - 1, {}, ValueError, r"labels must be in \[0, 3\), got -1"),
        ("abc", T, {}, TypeError, "Trainer.fit: expected real numbers|Trainer.fit: x"),
        (None, T, {}, TypeError, "Trainer.fit"),
        ([[1, 2], [3]], T, {}, ValueError, "Trainer.fit"),
    ],
)
@pytest.mark.parametrize("where", ["host", "device"])
def test_invalid_input_changes_nothing(x, t, options, error, words, where):
    if where == "device" and isinstance(x, numpy.ndarray):
        x, t = np.asarray(x), np.asarray(t)
    trainer = new_trainer()
    before = state_of(trainer)
    with pytest.raises(error, match=words):
        trainer.fit(x, t, **options)
    after = state_of(trainer)
    for p, q in zip(before[0], after[0], strict=True):
        numpy.testing.assert_array_equal(p, q)
    assert before[1:] == after[1:]
    assert trainer.loss_list == []


def test_nonfinite_loss_is_detected_at_the_evaluation():
    trainer = Trainer(OwnNet(), SGD(1e3), rng=0)
    x = numpy.ones((40, 2))
    with numpy.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"epoch \d+, iterations \d+ to \d+;"):
        trainer.fit(x, x[:, :1], 100, 4, eval_interval=5, verbose=False)
    assert all(math.isfinite(loss) for loss in trainer.loss_list[:-1])


def test_diverged_model_is_detected_at_the_end_of_the_epoch_without_evaluations():
    trainer = Trainer(OwnNet(), SGD(1e300), rng=0)
    x = numpy.ones((8, 2))
    with numpy.errstate(all="ignore"), pytest.raises(FloatingPointError, match="in epoch 1, iterations 1 to 2;"):
        trainer.fit(x, x[:, :1], 100, 4, eval_interval=None, verbose=False)
    assert trainer.current_epoch == 0


@pytest.fixture
def ctrl_c():
    """Python's default handler, also if the suite runs in the background and ignores the signal."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_finishes_the_step(ctrl_c):
    trainer, recorder = new_trainer(), Recorder()
    handler = signal.getsignal(signal.SIGINT)
    interrupt = At(3, ctrl_c)
    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 1 after 3 of 10 iterations; continue") as raised:
        trainer.fit(*spiral(), 5, 30, eval_interval=None, verbose=False, callbacks=[interrupt, recorder])
    assert raised.value.__suppress_context__  # one traceback
    assert recorder.events == ["begin", (0, 1), (0, 2), (0, 3), "end"]  # the third step is completed
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("event", ["on_step", "on_epoch"])
def test_ctrl_c_in_the_fit_of_a_callback_ends_both(event, ctrl_c):
    inner, outer, recorder = new_trainer(), new_trainer(), Recorder()

    class Search:
        pass

    nested = {"verbose": False, "callbacks": [At(2, ctrl_c), recorder]}
    setattr(Search, event, lambda self, trainer: inner.fit(*spiral(), 5, 30, eval_interval=None, **nested))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch") as raised:
        outer.fit(*spiral(), 5, 30, eval_interval=None, verbose=False, callbacks=[Search()])
    assert raised.value.__suppress_context__  # one traceback
    assert recorder.events == ["begin", (0, 1), (0, 2), "end"]
    assert (outer.current_epoch, outer.iteration) == ((0, 1) if event == "on_step" else (1, 0))
    assert signal.getsignal(signal.SIGINT) is handler
    outer.fit(*spiral(), 1, 30, verbose=False)


def test_ctrl_c_after_the_last_step_is_not_lost(ctrl_c):
    class Late:
        def on_end(self, trainer):
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        new_trainer().fit(*spiral(), 1, 30, verbose=False, callbacks=[Late()])


def test_second_ctrl_c_is_delivered_at_once(ctrl_c):
    trainer = new_trainer()

    def twice():
        ctrl_c()
        ctrl_c()
        raise AssertionError("the second one did not interrupt")

    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 1 after 1 of"):  # no third one is needed
        trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=[At(1, twice)])


def test_a_step_that_fails_is_not_counted():
    """Otherwise a file saved by a callback would skip its batch."""

    class Failing(TwoLayerNet):
        left = 2

        def forward(self, x, t):
            self.left -= 1
            if self.left < 0:
                raise MemoryError
            return super().forward(x, t)

    trainer = Trainer(Failing(2, 10, 3, rng=0), SGD(1.0), rng=0)
    with pytest.raises(MemoryError):
        trainer.fit(*spiral(), 1, 30, verbose=False)
    assert trainer.iteration == 2
    assert len(trainer.state_dict()["permutation"]) == 300 - 2 * 30


def test_callbacks_are_reset_for_another_model():
    """Otherwise they would use the learning rate, loss and weights of the first training."""
    callbacks = [BestWeights(), EarlyStopping(30), LearningRateScheduler(nnx.optimizer.cosine_decay(1.0, 20))]
    results = []
    for _ in range(2):
        trainer = new_trainer()
        trainer.fit(*spiral(), 3, 30, validation=spiral(), verbose=False, callbacks=callbacks)
        results.append((trainer.loss_list, trainer.optimizer.lr, [to_cpu(p).tolist() for p in trainer.model.params]))
    assert results[0] == results[1]
    trainer.fit(*spiral(), 1, 30, validation=spiral(), verbose=False, callbacks=callbacks)
    assert callbacks[2].steps == 40  # with the same model they continue


@dataclasses.dataclass
class Equal:
    """Unhashable, and equal to others."""

    steps: int = 0

    def on_step(self, trainer):
        self.steps += 1

    def reset(self):
        raise AssertionError("only nnx's own callbacks, and what inherits from Callback, are reset")


class Slots:
    __slots__ = ("steps",)

    def __init__(self):
        self.steps = 0

    def on_step(self, trainer):
        self.steps += 1


class Inherits(Callback):
    resets = 0

    def reset(self):
        self.resets += 1


def test_callbacks_are_told_apart_by_identity():
    callbacks = [Equal(), Equal(), Slots(), Inherits(), Inherits()]
    trainer = new_trainer()
    for each in (trainer, trainer, new_trainer()):
        each.fit(*spiral(), 1, 30, verbose=False, callbacks=callbacks)
    assert [c.steps for c in callbacks[:3]] == [30, 30, 30]
    assert [c.resets for c in callbacks[3:]] == [1, 1]
    assert copy.deepcopy(callbacks[3]).resets == pickle.loads(pickle.dumps(callbacks[4])).resets == 1


def test_early_stopping_waits_anew_in_every_fit_of_a_model():
    trainer, early, losses = new_trainer(), EarlyStopping(2), iter([1.0] * 20)
    trainer.model.evaluate = lambda x, t: (next(losses), None)
    for _ in range(2):  # the first loss of the first fit is lower than none
        trainer.fit(*spiral(), 10, 30, validation=spiral(), verbose=False, callbacks=[early])
    assert trainer.current_epoch == 3 + 2


@pytest.mark.parametrize("event", ["on_begin", "on_step", "on_end"])
def test_fit_is_refused_in_a_callback_of_its_own(event):
    class Nested:
        pass

    setattr(Nested, event, lambda self, trainer: trainer.fit(*spiral(), 1, 30, verbose=False))
    trainer = new_trainer()
    with pytest.raises(RuntimeError, match="called from one of its own callbacks"):
        trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=[Nested()])
    trainer.fit(*spiral(), 1, 30, verbose=False)
    assert trainer.current_epoch == 1 + (event == "on_end")  # whose fit was done


@pytest.mark.parametrize("stderr", ["none", "closed", "no isatty"])
def test_fit_needs_no_terminal(stderr, monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "no isatty": object()}[stderr])
    new_trainer().fit(*spiral(), 1, 30)
    assert capsys.readouterr().out.startswith("| epoch 1 |")


@pytest.mark.parametrize(
    "schedule",
    [
        nnx.optimizer.step_decay(1.0, 3),
        nnx.optimizer.cosine_decay(1.0, 9),
        nnx.optimizer.linear_warmup(4, nnx.optimizer.step_decay(1.0, 3)),
    ],
)
def test_schedules_can_be_pickled(schedule):
    copied = pickle.loads(pickle.dumps(LearningRateScheduler(schedule))).schedule
    assert [copied(step) for step in range(12)] == [schedule(step) for step in range(12)]


class OwnLoop:
    """A user-defined model without evaluate, whose forward does not return the loss."""

    def __init__(self):
        self.net = TwoLayerNet(2, 10, 3, rng=0)
        self.params, self.grads = self.net.params, self.net.grads

    def forward(self, x, t):
        self.net.forward(x, t)

    def backward(self):
        self.net.backward()


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (None, {"validation": numpy.ones((40, 2))}, ValueError, r"validation must be a pair \(x, t\), got array"),
        (None, {"validation": spiral()[:1]}, ValueError, r"validation must be a pair \(x, t\)"),
        (None, {"max_epoch": 1.0}, TypeError, "max_epoch must be an integer, got 1.0"),
        (None, {"batch_size": "32"}, TypeError, "batch_size must be an integer, got '32'"),
        (None, {"eval_interval": 2.5}, TypeError, "eval_interval must be an integer, got 2.5"),
        (Sequential(TwoLayerNet(2, 10, 3).layers), {}, ValueError, "Sequential has no loss_layer to learn from"),
        (OwnLoop(), {}, TypeError, r"OwnLoop.forward\(x, t\) must return the loss, one number, got NoneType"),
        (OwnLoop(), {"validation": spiral()}, TypeError, r"validation needs a model with evaluate\(x, t\)"),
    ],
)
def test_invalid_arguments_are_detected_before_any_change(model, options, error, words):
    trainer = Trainer(model or TwoLayerNet(2, 10, 3, rng=0), SGD(1.0), rng=0)
    before = [to_cpu(p).copy() for p in trainer.model.params]
    with pytest.raises(error, match=rf"Trainer.fit: {words}"):
        trainer.fit(*spiral(), **{"max_epoch": 1, "verbose": False, **options})
    for p, q in zip(trainer.model.params, before, strict=True):
        numpy.testing.assert_array_equal(to_cpu(p), q)


@pytest.mark.skipif(nnx.GPU, reason="indices on the GPU are not looked at")
@pytest.mark.parametrize("bad", [-1, 5])
def test_index_out_of_range_in_a_late_row_is_detected_before_any_change(bad):
    W = np.ones((5, 2))
    model = Sequential([nnx.Embedding(W), nnx.MatMul(np.ones((2, 3)))], SoftmaxWithLoss())
    with pytest.raises(ValueError, match=rf"Embedding: idx must be in \[0, 5\), got {bad}"):
        Trainer(model, SGD(1.0)).fit([0, 1, 2, 3, 4, bad], [0, 1, 2, 0, 1, 2], 1, 2, verbose=False)
    assert (W == 1).all()


class Unwritten(nnx.MatMul):
    """A user-defined layer that replaces its gradient array."""

    def backward(self, dout):
        self.grads[0] = self.x.T.dot(dout)


class Collecting:
    """A user-defined model that creates its lists on each access, with a layer that creates new gradients."""

    class Layer(nnx.MatMul):
        def backward(self, dout):
            self.grads = [self.x.T.dot(dout)]

    def __init__(self):
        self.layers, self.loss = [self.Layer(np.zeros((2, 3), "float32"))], SoftmaxWithLoss()

    params = property(lambda self: [p for layer in self.layers for p in layer.params])
    grads = property(lambda self: [g for layer in self.layers for g in layer.grads])

    def forward(self, x, t):
        return self.loss.forward(self.layers[0].forward(x), t)

    def backward(self):
        self.layers[0].backward(self.loss.backward())


def test_model_that_creates_gradient_lists_trains():
    trainer = Trainer(Collecting(), SGD(1.0), rng=0)
    trainer.fit(*spiral(), 20, 30, verbose=False)
    assert trainer.loss_list[-1] < trainer.loss_list[0]


def test_subclass_may_freeze_layers_and_add_parameters():
    class Scaled(Sequential):
        def __init__(self):
            super().__init__(TwoLayerNet(2, 10, 3, rng=0).layers, SoftmaxWithLoss())
            self.scale = np.ones(1, "float32")
            self.params.append(self.scale)
            self.grads.append(np.zeros_like(self.scale))

    frozen, scaled = TwoLayerNet(2, 10, 3, rng=0), Scaled()
    first = to_cpu(frozen.params[0]).copy()
    frozen.params, frozen.grads = frozen.params[2:], frozen.grads[2:]
    apart = Sequential([Unwritten(np.ones((2, 3))), nnx.MatMul(np.ones((3, 3)))], SoftmaxWithLoss())
    apart.params, apart.grads = apart.params[1:], apart.grads[1:]  # a frozen layer may replace its gradients
    for model in (frozen, scaled, apart):
        Trainer(model, SGD(1.0), rng=0).fit(*spiral(), 2, 30, verbose=False)
    numpy.testing.assert_array_equal(to_cpu(frozen.layers[0].params[0]), first)


def test_model_with_its_own_loss_and_targets():
    class Own(Sequential):
        def __init__(self):
            super().__init__(TwoLayerNet(2, 10, 3, rng=0).layers)
            self.loss = SoftmaxWithLoss()

        def forward(self, x, t):
            return self.loss.forward(super().forward(x), t)

        def backward(self):
            return super().backward(self.loss.backward())

        def evaluate(self, x, t):
            return 0.5, float((to_cpu(self.predict(x)).argmax(axis=1) == t.argmax(axis=1)).mean())

    x, t = spiral()
    trainer = Trainer(Own(), SGD(1.0), rng=0)
    onehot = numpy.eye(3, dtype=int)[to_cpu(t) if t.ndim == 1 else t.argmax(axis=1)]
    trainer.fit(x, onehot, 1, 30, validation=(x, onehot), verbose=False)
    assert trainer.val_list[0][0] == 0.5


def test_callbacks_keep_state_for_the_same_model():
    trainer, rate = new_trainer(), LearningRateScheduler(lambda step: 0.1)
    rate.steps = 100  # set by the user after loading a file with only the model
    with pytest.raises(MemoryError):
        trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=[rate, At(3, fail)])
    trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=[rate])
    assert rate.steps == 100 + 3 + 10


def fail():
    raise MemoryError


def test_fit_runs_in_a_thread():
    trainer = new_trainer()
    thread = threading.Thread(target=trainer.fit, args=(*spiral(), 1, 30), kwargs={"verbose": False})
    thread.start()
    thread.join()
    assert trainer.current_epoch == 1


def fragile(dtype="float32"):
    """Return a model whose layers have state that forward changes in training."""
    rng = numpy.random.default_rng(0)
    W = [np.asarray(0.1 * rng.standard_normal(shape), dtype) for shape in ((2, 6), (6, 3))]
    norm = nnx.BatchNorm(np.ones(6, dtype), np.zeros(6, dtype))
    return Sequential([nnx.MatMul(W[0]), norm, nnx.Dropout(0.5, rng=1), nnx.MatMul(W[1])], SoftmaxWithLoss())


def remembered(model):
    norm, dropout = model.layers[1:3]
    return [to_cpu(a).tolist() for a in (*model.params, norm.running_mean, norm.running_var)], dropout.calls


def of_another_model():
    optimizer, other = nnx.Momentum(), fragile()
    optimizer.update(other.params, other.grads)
    return optimizer


def assigned(optimizer, **settings):
    """Assign settings that the constructor would refuse."""
    vars(optimizer).update(settings)
    return optimizer


def read_only(model):
    model.params[1].flags.writeable = False


def with_masked(arrays):
    arrays[1] = numpy.ma.array(arrays[1], mask=[0, 1, 0, 0, 0, 0])


nothing = [lambda model: None]
FAILING = {  # how to break the model; the optimizer; the error; an argument of fit
    "no rate": (*nothing, lambda: assigned(nnx.Adam(), lr=None), TypeError, "Adam: lr must be a number, got None"),
    "a decay of text": (
        *nothing,
        lambda: assigned(SGD(), weight_decay="0"),
        TypeError,
        "SGD: weight_decay must be a number",
    ),
    "a beta of 1": (*nothing, lambda: assigned(nnx.AdamW(), beta1=1), ValueError, "AdamW: beta1 must be in"),
    "another model's": (*nothing, of_another_model, ValueError, r"Momentum: these 4 params are not .*reset\(\)"),
    "a gradient less": (lambda m: m.grads.pop(), SGD, ValueError, "a gradient, got 4 params and 3 grads"),
    "a gradient more": (lambda m: m.grads.append(m.grads[0]), SGD, ValueError, "got 4 params and 5 grads"),
    "a parameter more": (lambda m: m.params.append(m.params[0]), SGD, ValueError, "got 5 params and 4 grads"),
    "integers": (
        lambda m: m.grads.__setitem__(1, np.zeros(6, int)),
        SGD,
        TypeError,
        r"SGD: grads\[1\] must be a \w+ array of a floating dtype",
    ),
    "another shape": (
        lambda m: m.grads.__setitem__(0, np.zeros((6, 2), "float32")),
        SGD,
        ValueError,
        r"SGD: grads\[0\] must have the shape of params\[0\] \(2, 6\)",
    ),
    "a norm of text": (*nothing, SGD, TypeError, "max_grad must be a number, or None, got '1'", "1"),
    "a norm of an array": (*nothing, SGD, TypeError, "max_grad must be a number", numpy.ones(1)),
}
if not nnx.GPU:
    FAILING |= {
        "read-only": (read_only, SGD, ValueError, r"params\[1\] of Sequential is read-only"),
        "masked weights": (lambda m: with_masked(m.params), SGD, TypeError, r"params\[1\] must be .*MaskedArray"),
        "masked gradients": (lambda m: with_masked(m.grads), SGD, TypeError, r"grads\[1\]: expected .* without a mask"),
    }


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (3, "x", r"model must be an object with params, forward\(x, t\), backward\(\), got 3"),
        (
            TwoLayerNet,
            SGD(),
            r"model must be an object, got the class TwoLayerNet; make one with TwoLayerNet\(\.\.\.\)",
        ),
        (SGD(), fragile(), "model must be an object with params"),
        (fragile(), None, r"optimizer must be an object with update\(params, grads\), got None"),
        (fragile(), nnx.Adam, r"optimizer must be an object, got the class Adam; make one with Adam\(\.\.\.\)"),
        (fragile(), print, "optimizer must be an object with update"),
    ],
)
def test_constructor_rejects_invalid_models_and_optimizers(model, optimizer, message):
    with pytest.raises(TypeError, match=f"^Trainer: {message}"):
        Trainer(model, optimizer)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (EarlyStopping(), "callbacks must be a list of callbacks, got EarlyStopping.*"),
        (None, "callbacks must be a list of callbacks, got None"),
        (
            [EarlyStopping],
            r"a callback must be an object, got the class EarlyStopping; pass EarlyStopping\(\.\.\.\)",
        ),
        ([print], "a callback needs one of on_begin, .* has none"),
    ],
)
def test_fit_rejects_invalid_callbacks(callbacks, message):
    trainer = Trainer(fragile(), SGD())
    with pytest.raises(TypeError, match=f"^Trainer.fit: {message}"):
        trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=callbacks)
    assert trainer.current_epoch == 0


@pytest.mark.parametrize("failing", FAILING)
def test_failing_first_update_is_detected_before_any_change(failing):
    spoil, optimizer, error, words, *max_grad = FAILING[failing]
    model = fragile()
    before = remembered(model)
    spoil(model)
    trainer = Trainer(model, optimizer(), rng=0)
    with pytest.raises(error, match=words):
        trainer.fit(*spiral(), 1, 30, *max_grad, verbose=False)
    model.params = [p for layer in model.layers for p in layer.params]
    assert remembered(model) == before
    assert (trainer.current_epoch, trainer.iteration, trainer.loss_list) == (0, 0, [])

    model, fresh = fragile(), Trainer(fragile(), SGD(0.1), rng=0)
    trainer.model, trainer.optimizer = model, SGD(0.1)
    for each in (trainer, fresh):
        each.fit(*spiral(), 1, 30, verbose=False)
    assert remembered(trainer.model) == remembered(fresh.model)  # and no permutation was drawn


def test_optimizer_with_only_update_and_model_without_initial_gradients():
    class Own:
        def update(self, params, grads):
            for p, g in zip(params, grads, strict=True):
                p -= 0.1 * g

    class Late(Collecting):
        class Layer(nnx.MatMul):
            def __init__(self, W):
                super().__init__(W)
                self.grads = []

            def backward(self, dout):
                self.grads = [self.x.T.dot(dout)]

    for optimizer in (Own(), SGD(0.1), nnx.Adam()):
        model = Late()
        Trainer(model, optimizer, rng=0).fit(*spiral(), 1, 30, verbose=False)
        assert to_cpu(model.params[0]).any()


def test_last_batch_of_one_row_does_not_update_the_variance(rng):
    """65 rows in batches of 64: the variance of one row, 0, would have the same weight as the others."""
    x, t = rng.standard_normal((65, 2)).astype("float32"), rng.integers(0, 3, 65)
    x[:, 1] *= 3
    model = fragile()
    model.layers[0].params[0][...] = 0
    model.layers[0].params[0][:2, :2] = np.eye(2)
    with pytest.warns(RuntimeWarning, match="BatchNorm: a batch of one row has no variance.*drop_last=True") as caught:
        Trainer(model, SGD(0.0), rng=0).fit(x, t, 60, 64, verbose=False)
    assert len(caught) == 1
    numpy.testing.assert_allclose(to_cpu(model.layers[1].running_var)[:2], x.var(axis=0, ddof=1), rtol=0.1)
    Trainer(fragile(), SGD(0.0), rng=0).fit(x, t, 2, 64, drop_last=True, validation=(x[:1], t[:1]), verbose=False)


def test_state_of_a_layer_may_be_set_in_forward_or_be_a_property():
    class Late(nnx.ReLU):
        state_names = ("seen", "fixed")
        fixed = property(lambda self: 3)

        def forward(self, x):
            self.seen = len(x)
            return super().forward(x)

    first, _, last = TwoLayerNet(2, 10, 3, rng=0).layers
    trainer = Trainer(Sequential([first, Late(), last], SoftmaxWithLoss()), SGD(0.1), rng=0)
    for t, raises in (
        ("wrong", pytest.raises(ValueError, match="SoftmaxWithLoss")),
        ("right", contextlib.nullcontext()),
    ):
        with raises:
            trainer.fit([(numpy.ones((3, 2)), [0, 1, 9 if t == "wrong" else 2])], max_epoch=1, verbose=False)
    assert trainer.current_epoch == 1


def test_state_of_a_callback_may_be_set_when_fit_begins(tmp_path):
    pytest.importorskip("safetensors")

    class Counts(Callback):
        state_names = ("count",)

        def on_begin(self, trainer):
            self.count = getattr(self, "count", 0)

        def on_step(self, trainer):
            self.count += 1

    trainer, counts = new_trainer(), Counts()
    trainer.fit(*spiral(), 1, 30, verbose=False, callbacks=[Counts(), Checkpoint(tmp_path)])
    trainer.resume(tmp_path)
    trainer.fit(*spiral(), 2, 30, verbose=False, callbacks=[counts])
    assert counts.count == 20
