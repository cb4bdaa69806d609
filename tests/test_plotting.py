"""Pictures are drawn where asked, without a display, and say what is missing."""

import sys

import numpy
import pytest

import nnx
from nnx import Trainer, TwoLayerNet, np, spiral
from nnx.plotting import plot_data, plot_decision_regions, plot_loss

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402 - the backend comes first


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def test_plot_loss_draws_every_number(tmp_path):
    ax = plot_loss([3.0, 2.0, 1.0], interval=10, ylim=(0, 4), path=tmp_path / "loss.png")
    assert list(ax.lines[0].get_ydata()) == [3, 2, 1]
    assert ax.get_ylim() == (0, 4)
    assert ax.get_xlabel() == "iterations (x10)"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["one-hot", "labels", "device"])
def test_plot_data_draws_every_class(kind):
    x, t = spiral.load_data()
    if kind != "one-hot":
        t = t.argmax(axis=1)
    if kind == "device":
        x, t = np.asarray(x), np.asarray(t)
    ax = plot_data(x, t)
    assert sorted(len(c.get_offsets()) for c in ax.collections) == [100, 100, 100]


def test_plot_decision_regions_asks_the_model_for_the_plane(tmp_path):
    x, t = spiral.load_data()
    _, ax = pyplot.subplots()
    result = plot_decision_regions(TwoLayerNet(2, 3, 3), x, t, step=0.1, ax=ax, path=tmp_path / "regions.png")
    assert result is ax
    assert (tmp_path / "regions.png").exists()
    seen = []
    plot_decision_regions(lambda grid: seen.append(grid) or np.asarray(grid @ numpy.ones((2, 3))), x, t, step=0.5)
    assert seen[0].min(axis=0) == pytest.approx(x.min(axis=0) - 0.1)


def test_trainer_plot_returns_the_axes():
    trainer = Trainer(TwoLayerNet(2, 3, 3), nnx.SGD())
    trainer.loss_list = [2.0, 1.0]
    assert list(trainer.plot((0, 3)).lines[0].get_ydata()) == [2, 1]


def test_plot_data_refuses_points_that_do_not_fit():
    with pytest.raises(ValueError, match=r"plot_data: x must be \(N, 2\)"):
        plot_data(numpy.zeros((3, 3)), [0, 1, 2])


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_loss([1.0])


def test_plot_loss_takes_the_losses_of_a_loop_of_your_own():
    assert list(plot_loss([np.ones(()), 2.0]).lines[0].get_ydata()) == [1, 2]


def test_a_class_looks_alike_where_another_is_missing():
    x, t = spiral.load_data()
    colours = [c.get_facecolor()[0].tolist() for c in plot_data(x, t).collections]
    part = t[:, 1] == 0
    assert [c.get_facecolor()[0].tolist() for c in plot_data(x[part], t[part]).collections] == colours[::2]
