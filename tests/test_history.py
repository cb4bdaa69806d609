"""The history of a training, metrics, weights of rows, and what a user sees of a training."""

import csv
import io
import math
import pickle
import sys
import types

import numpy
import pytest

import nnx
from nnx import SGD, Adam, MeanSquaredError, Sequential, SoftmaxWithLoss, Trainer, TwoLayerNet, np, to_cpu
from nnx.callbacks import BestWeights, Callback, Checkpoint, EarlyStopping, LearningRateScheduler, Log, ProgressBar
from nnx.models import mlp

X, T = nnx.spiral.load_data()
LABELS = T.argmax(axis=1)


def new_trainer(seed=0, optimizer=None):
    return Trainer(TwoLayerNet(2, 10, 3, rng=1), optimizer or Adam(0.01), rng=seed)


class Losses(Callback):
    """Records the loss of every step, at eval_interval=1."""

    def __init__(self):
        self.epochs = []

    def on_evaluate(self, trainer):
        self.epochs += [[]] if trainer.iteration == 1 else []
        self.epochs[-1].append(trainer.loss_list[-1])


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.mark.parametrize("interval", [1, 3, 20, None])
def test_the_loss_of_an_epoch_is_the_mean_over_its_rows(interval):
    steps = Losses()
    new_trainer().fit(X, T, 3, 64, eval_interval=1, verbose=False, callbacks=[steps])
    trainer = new_trainer()
    trainer.fit(X, T, 3, 64, eval_interval=interval, verbose=False)
    sizes = [64, 64, 64, 64, 44]
    expected = [numpy.average(losses, weights=sizes) for losses in steps.epochs]
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3]
    numpy.testing.assert_allclose([row["loss"] for row in trainer.history], expected, rtol=1e-6)


def test_rows_hold_plain_numbers_in_a_fixed_order():
    trainer = new_trainer()
    metrics = {"f1": lambda scores, t: numpy.float32(0.5)}
    trainer.fit(X, T, 2, 30, validation=(X[:50], T[:50]), metrics=metrics, verbose=False)
    trainer.fit(X, T, 1, 30, verbose=False)
    names = ["epoch", "loss", "lr", "seconds", "val_loss", "val_accuracy", "val_f1"]
    assert [list(row) for row in trainer.history] == [names, names, names[:4]]
    assert all(type(value) in (int, float) for row in trainer.history for value in row.values())
    assert all(row["seconds"] > 0 and row["lr"] == 0.01 for row in trainer.history)
    assert [(row["val_loss"], row["val_accuracy"]) for row in trainer.history[:2]] == trainer.val_list


def test_pandas_takes_the_history_as_it_is():
    pandas = pytest.importorskip("pandas")
    trainer = new_trainer()
    trainer.fit(X, T, 2, 30, verbose=False)
    table = pandas.DataFrame(trainer.history)
    assert list(table.columns) == ["epoch", "loss", "lr", "seconds"]
    assert len(table) == 2


def test_regression_has_no_accuracy_and_an_optimizer_may_have_no_rate():
    class Step:
        def update(self, params, grads):
            for p, g in zip(params, grads, strict=True):
                p -= 0.01 * g

    trainer = Trainer(mlp([2, 4, 1], loss_layer=MeanSquaredError(), rng=0), Step(), rng=0)
    trainer.fit(X, X[:, :1], 1, 30, validation=(X, X[:, :1]), verbose=False)
    assert list(trainer.history[0]) == ["epoch", "loss", "seconds", "val_loss"]


def test_the_rate_is_that_at_the_beginning_of_the_epoch():
    trainer = new_trainer(optimizer=SGD(5.0))
    trainer.fit(X, T, 2, 30, verbose=False, callbacks=[LearningRateScheduler(lambda steps: 1 / (1 + steps))])
    assert [row["lr"] for row in trainer.history] == [1, 1 / 11]


def test_callbacks_find_the_row_of_the_epoch_and_may_change_it():
    class Reads(Callback):
        def on_epoch(self, trainer):
            trainer.history[-1]["norm"] = float(len(trainer.history))

    trainer, rows = new_trainer(), []
    trainer.fit(X, T, 2, 30, verbose=False, callbacks=[Reads(), Log(rows.append)])
    assert rows == trainer.history
    assert [row["norm"] for row in rows] == [1.0, 2.0]
    rows[0]["loss"] = None  # a copy
    assert trainer.history[0]["loss"] is not None


@pytest.mark.parametrize("steps", [3, 10, 13])
def test_history_continues_in_checkpoints(tmp_path, steps):
    class Stop(Callback):
        def on_step(self, trainer):
            if trainer.current_epoch * 10 + trainer.iteration == steps:
                raise InterruptedError

    validation = (X[:50], T[:50])
    whole, first, second = new_trainer(), new_trainer(), new_trainer(seed=5)
    whole.fit(X, T, 3, 30, eval_interval=7, validation=validation, verbose=False)
    callbacks = [Checkpoint(tmp_path, every_steps=1), Stop()]  # the step before the last is saved
    with pytest.raises(InterruptedError):
        first.fit(X, T, 3, 30, eval_interval=7, validation=validation, verbose=False, callbacks=callbacks)
    second.resume(tmp_path)
    second.fit(X, T, 3, 30, eval_interval=7, validation=validation, verbose=False)
    assert without_seconds(second.history) == without_seconds(whole.history)
    assert second.loss_list == whole.loss_list
    assert type(second.history[0]["epoch"]) is int
    again = pickle.loads(pickle.dumps(second))
    assert again.history == second.history


def test_metrics_are_computed_once_over_all_rows():
    calls = []

    def macro_recall(scores, t):
        assert type(scores) is type(t) is numpy.ndarray
        calls.append((scores.shape, t.shape))
        hits = scores.argmax(axis=1) == t
        return numpy.mean([hits[t == c].mean() for c in range(3)])

    model = TwoLayerNet(2, 10, 3, rng=1)
    loss, accuracy, results = model.evaluate(X, LABELS, 7, metrics={"recall": macro_recall})
    assert calls == [((300, 3), (300,))]
    assert (loss, accuracy) == model.evaluate(X, LABELS, 7)
    assert results == {"recall": pytest.approx(accuracy)}  # the classes have equally many rows


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": {"f1": max}}, ValueError, r"metrics need validation data; pass validation=\(x, t\)"),
        (
            {"metrics": [max], "validation": (X, T)},
            TypeError,
            r"metrics must be a dict of functions by name, .* got \[",
        ),
        ({"metrics": {"loss": max}, "validation": (X, T)}, ValueError, "metrics: loss is a result of every validation"),
        ({"sample_weight": numpy.full(300, 1e308)}, ValueError, "finite numbers of at least 0, not only zeros"),
        ({"metrics": {"f1": 3}, "validation": (X, T)}, TypeError, r"metrics: f1 must be a function of \(scores, t\)"),
        ({"sample_weight": numpy.ones(299)}, ValueError, r"one number for each of 300 rows, got \(299,\)"),
        ({"sample_weight": -numpy.ones(300)}, ValueError, "finite numbers of at least 0, not only zeros"),
        ({"sample_weight": numpy.zeros(300)}, ValueError, "finite numbers of at least 0, not only zeros"),
        ({"sample_weight": numpy.full(300, numpy.nan)}, ValueError, "finite numbers of at least 0, not only zeros"),
    ],
)
def test_invalid_metrics_and_weights_are_rejected_before_the_first_step(options, error, message):
    trainer = new_trainer()
    before = [to_cpu(p).copy() for p in trainer.model.params]
    with pytest.raises(error, match=f"Trainer.fit: .*{message}"):
        trainer.fit(X, T, 1, 30, verbose=False, **options)
    assert trainer.history == []
    for p, q in zip(trainer.model.params, before, strict=True):
        numpy.testing.assert_array_equal(to_cpu(p), q)


def test_a_metric_must_return_a_number():
    with pytest.raises(TypeError, match=r"metrics: f1 must return a number, got \[1, 2\]"):
        new_trainer().fit(
            X, T, 1, 30, validation=(X, T), metrics={"f1": lambda scores, t: [1, 2]}, verbose=False, callbacks=[]
        )


def test_a_model_without_metrics_or_weights_is_rejected_by_name():
    class Net(TwoLayerNet):
        def evaluate(self, x, t):
            return 1.0, None

    class Loss:
        def forward(self, x, t):
            return abs(x - t).mean()

        def backward(self, dout=1):
            return np.zeros((3, 3))

    with pytest.raises(TypeError, match=r"metrics need a model with evaluate\(x, t, metrics=...\), got Net"):
        Trainer(Net(2, 10, 3), SGD()).fit(X, T, 1, validation=(X, T), metrics={"f1": lambda s, t: 1}, verbose=False)
    model = Sequential([nnx.Affine.init(2, 3)], Loss())
    with pytest.raises(TypeError, match=r"sample_weight needs Loss.forward\(x, t, weight\)"):
        Trainer(model, SGD()).fit(X, T.astype("f"), 1, sample_weight=numpy.ones(300), verbose=False)
    with pytest.raises(ValueError, match="sample_weight needs the arrays x and t, got an iterable of batches"):
        new_trainer().fit([(X, T)], sample_weight=numpy.ones(300), verbose=False)


def test_rows_of_weight_0_and_weights_of_one_size_change_nothing():
    x, t = numpy.concatenate([X, X + 5]), numpy.concatenate([LABELS, LABELS[::-1]])
    weight = numpy.concatenate([numpy.full(300, 3), numpy.zeros(300, int)])
    weighted, plain = new_trainer(), new_trainer()
    weighted.fit(x, t, 5, 600, sample_weight=weight, verbose=False)
    plain.fit(X, LABELS, 5, 300, verbose=False)
    for p, q in zip(weighted.model.params, plain.model.params, strict=True):
        numpy.testing.assert_allclose(to_cpu(p), to_cpu(q), rtol=1e-4, atol=1e-6)


def test_each_weight_stays_with_its_row():
    """Rows with wrong labels have weight 0; a weight that belongs to another row would let them be learned."""
    wrong = numpy.arange(300) % 2 == 0
    trainer = Trainer(mlp([2, 32, 3], rng=0), Adam(0.02), rng=0)
    labels = numpy.where(wrong, (LABELS + 1) % 3, LABELS)
    trainer.fit(X, labels, 60, 30, sample_weight=np.asarray(~wrong), verbose=False)
    assert trainer.model.evaluate(X, LABELS)[1] > 0.8


def test_log_writes_a_csv_file():
    file = io.StringIO()
    writer = csv.DictWriter(file, ["epoch", "loss", "lr", "seconds"])
    writer.writeheader()
    trainer = new_trainer()
    trainer.fit(X, T, 2, 30, verbose=False, callbacks=[Log(writer.writerow)])
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(int(row["epoch"]), float(row["loss"])) for row in rows] == [
        (row["epoch"], row["loss"]) for row in trainer.history
    ]
    with pytest.raises(TypeError, match="Log: function must be a function of a dict, got 3"):
        Log(3)


def test_lines_show_the_epoch_and_callbacks_say_what_they_did(tmp_path, capsys):
    trainer = new_trainer(optimizer=SGD(0.0))
    callbacks = [EarlyStopping(2), BestWeights(), Checkpoint(tmp_path)]
    trainer.fit(X, T, 9, 30, validation=(X, T), verbose=True, callbacks=callbacks)
    loss, accuracy = trainer.val_list[0]
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1]
        == f"| epoch 1 | loss {trainer.history[0]['loss']:.4g} | val_loss {loss:.4g} | val_accuracy {accuracy:.4g}"
    )
    assert lines[-3:] == [
        f"EarlyStopping: stopped after epoch 3; val_loss has not been below {loss:.4g} for 2 epochs",
        f"Checkpoint: saved {tmp_path}/epoch-0003-step-000000.safetensors, and val_loss {loss:.4g} as best.safetensors",
        f"BestWeights: restored the weights of epoch 1, val_loss {loss:.4g}",
    ]
    trainer.fit(X, T, 9, 30, validation=(X, T), verbose=False, callbacks=callbacks)
    trainer.log("nothing")
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_the_last_epoch_and_lines_stay_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())

    class Says(Callback):
        def on_epoch(self, trainer):
            trainer.log("a line")

    trainer = new_trainer()
    trainer.fit(X, T, 3, 30, validation=(X, T), callbacks=[Says()])
    loss, accuracy = trainer.val_list[-1]
    expected = f"epoch 3, loss {trainer.history[-1]['loss']:.4g}, val_loss {loss:.4g}, val_accuracy {accuracy:.4g}"
    assert expected in terminal.getvalue().replace("\r", "\n").splitlines()[-1]
    assert capsys.readouterr().out == "a line\n" * 3


def test_a_notebook_shows_the_bar(monkeypatch, capsys):
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    opened = []
    monkeypatch.setattr(ProgressBar, "on_begin", lambda self, trainer: opened.append(trainer))
    for event in ("on_step", "on_evaluate", "on_epoch", "on_end"):
        monkeypatch.setattr(ProgressBar, event, lambda self, trainer: None)
    trainer = new_trainer()
    trainer.fit(X, T, 1, 30)
    assert opened == [trainer]
    assert capsys.readouterr().out == ""
    shell.config = {}  # IPython in a terminal or a pipe
    trainer.fit(X, T, 1, 30)
    assert len(opened) == 1
    assert "| epoch 2 |" in capsys.readouterr().out


def test_the_plot_shows_training_and_validation():
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    trainer = new_trainer()
    trainer.fit(X, T, 4, 30, verbose=False)
    axes = trainer.plot(ax=pyplot.figure().add_subplot())
    assert [line.get_ydata().tolist() for line in axes.lines] == [trainer.loss_list]
    trainer.fit(X, T, 3, 30, validation=(X, T), verbose=False)
    axes = trainer.plot(ax=pyplot.figure().add_subplot(), ylim=(0, 2))
    training, validation = axes.lines
    assert training.get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert training.get_ydata().tolist() == [row["loss"] for row in trainer.history]
    assert validation.get_xdata().tolist() == [5, 6, 7]
    assert validation.get_ydata().tolist() == [loss for loss, _ in trainer.val_list]
    assert axes.get_ylim() == (0, 2)
    pyplot.close("all")
    for wrong in (3, [3], [{"loss": 1}]):
        with pytest.raises(TypeError, match="plot_history: history must be a list of dicts"):
            nnx.plotting.plot_history(wrong)


def test_a_forged_history_is_refused():
    state = new_trainer()
    state.fit(X, T, 2, 30, verbose=False)
    saved = state.state_dict()
    for change in (
        {"epoch": numpy.zeros((2, 3))},
        {"epoch": numpy.array([[0.0, 1], [0, 2]])},
        {"loss": numpy.array([[math.nan, 1.0]])},
        {"loss": numpy.array([[7.0, 1.0]])},
        {"loss": 3},
    ):
        history = {**saved["history"], "columns": {**saved["history"]["columns"], **change}}
        with pytest.raises(ValueError, match=r"history|must be ndarray"):
            state.check_state({**saved, "history": history})
    for rows in (None, -1, 1 << 60, 1):
        with pytest.raises(ValueError, match="invalid history"):
            state.check_state({**saved, "history": {**saved["history"], "rows": rows}})


def test_rows_that_callbacks_add_are_saved_and_text_is_refused_by_name(tmp_path):
    trainer, again = new_trainer(), new_trainer()
    trainer.fit(X, T, 1, 30, verbose=False)
    trainer.history.append({"extra": 1.5})
    nnx.checkpoint.save(tmp_path / "net.safetensors", trainer.model, trainer.optimizer, trainer)
    again.resume(tmp_path / "net.safetensors")
    assert again.history == trainer.history
    trainer.history[0]["note"] = "best"
    with pytest.raises(TypeError, match=r"Trainer.history: note of row 0 must be a number, got 'best'"):
        trainer.state_dict()


def test_reprs_say_class_sizes_and_settings():
    assert repr(nnx.Affine.init(3, 4, input_grad=False)) == "Affine(3, 4, input_grad=False)"
    assert repr(nnx.BatchNorm.init(5, momentum=0.8)) == "BatchNorm(5, momentum=0.8, eps=1e-05)"
    assert repr(nnx.Dropout(0.25)) == "Dropout(dropout_ratio=0.25)"
    assert repr(SoftmaxWithLoss(ignore_label=-1)) == "SoftmaxWithLoss(ignore_label=-1)"
    optimizer = Adam(0.5)
    assert repr(optimizer) == "Adam(lr=0.5, beta1=0.9, beta2=0.999, eps=1e-07, weight_decay=0.0)"
    trainer = new_trainer(optimizer=optimizer)
    trainer.fit(X, T, 1, 30, verbose=False)  # now the optimizer has state
    assert repr(trainer) == f"Trainer(TwoLayerNet, {optimizer!r}, current_epoch=1)"
    assert repr(optimizer).startswith("Adam(lr=0.5, ")
    assert repr(EarlyStopping(3)) == "EarlyStopping(patience=3, monitor='val_loss', min_delta=0.0)"
    assert "Sequential(\n    ReLU()" in repr(Sequential([Sequential([nnx.ReLU()])]))


def test_reprs_of_unusual_objects_do_not_raise():
    class Named(nnx.Affine):
        """Has an argument with the name of a method, and a property that raises."""

        def __init__(self, W, b, backward=True, broken=None):
            super().__init__(W, b)

        @property
        def broken(self):
            raise RuntimeError

    assert repr(Named(np.ones((2, 3)), np.ones(3))) == "Named(2, 3)"
    assert repr(object.__new__(nnx.Affine)) == "Affine()"
    assert (
        repr(SoftmaxWithLoss(numpy.ones(50))) == f"SoftmaxWithLoss(class_weight={np.ndarray.__name__} of shape (50,))"
    )
    inner = nnx.Dropout(0.5)
    inner.dropout_ratio = net = Sequential([inner])
    assert "..." in repr(net)


def test_a_model_with_a_third_argument_that_is_no_weight_is_refused():
    class Net(TwoLayerNet):
        def forward(self, x, t, train_flg=True):
            return super().forward(x, t)

    with pytest.raises(TypeError, match=r"sample_weight needs Net.forward\(x, t, weight\)"):
        Trainer(Net(2, 3, 3), SGD()).fit(X, T, 1, sample_weight=numpy.ones(300), verbose=False)
