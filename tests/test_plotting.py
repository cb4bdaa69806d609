"""Plots: drawing without a display, and error messages."""

import sys
import tracemalloc

import numpy
import pytest

import nnx
from nnx import Trainer, TwoLayerNet, np, spiral
from nnx.plotting import plot_data, plot_decision_regions, plot_loss

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402 - the backend must be set first


@pytest.fixture(autouse=True)
def _small_figures():
    with pyplot.rc_context({"figure.figsize": (2, 2)}):
        yield
    pyplot.close("all")


class Grid:
    """A model that records the points passed to predict."""

    def __init__(self, scores=lambda points: points[:, 0]):
        self.scores = scores
        self.batches = []

    def predict(self, points):
        self.batches.append(points)
        return self.scores(points)

    @property
    def points(self):
        return numpy.concatenate(self.batches)


def looks(ax):
    """Return colour, marker and number of the points of each class."""
    groups = [c for c in ax.collections if isinstance(c, matplotlib.collections.PathCollection)]
    return [(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes(), len(c.get_offsets())) for c in groups]


def regions(ax):
    """Return the colours of the regions that are not empty, without their alpha."""
    contours = ax.collections[0]
    return [
        tuple(colour[:3])
        for colour, path in zip(contours.get_facecolor(), contours.get_paths(), strict=True)
        if len(path.vertices)
    ]


BLUE, ORANGE, GREEN = (matplotlib.colors.to_rgb(f"C{i}") for i in range(3))
POINTS = numpy.array([[-1.0, 0], [0, 1], [1, 0], [2, 2]])


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


def test_plot_decision_regions_predicts_a_grid(tmp_path):
    x, t = spiral.load_data()
    _, ax = pyplot.subplots()
    result = plot_decision_regions(TwoLayerNet(2, 3, 3), x, t, step=0.1, ax=ax, path=tmp_path / "regions.png")
    assert result is ax
    assert (tmp_path / "regions.png").exists()
    grid = Grid(lambda points: np.asarray(points @ numpy.ones((2, 3))))
    plot_decision_regions(grid, x, t, step=0.5)
    width = x.max(axis=0) - x.min(axis=0)
    assert grid.points.min(axis=0) == pytest.approx(x.min(axis=0) - 0.05 * width)
    assert grid.points.max(axis=0) == pytest.approx(x.max(axis=0) + 0.05 * width)
    assert numpy.diff(numpy.unique(grid.points[:, 0]))[:-1] == pytest.approx(0.5)


def test_trainer_plot_returns_the_axes():
    trainer = Trainer(TwoLayerNet(2, 3, 3), nnx.SGD())
    trainer.loss_list = [2.0, 1.0]
    assert list(trainer.plot((0, 3)).lines[0].get_ydata()) == [2, 1]


def test_plot_data_rejects_mismatched_points():
    with pytest.raises(ValueError, match=r"plot_data: x must be \(N, 2\)"):
        plot_data(numpy.zeros((3, 3)), [0, 1, 2])


def test_missing_matplotlib_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_loss([1.0])


def test_plot_loss_of_a_custom_loop():
    assert list(plot_loss([np.ones(()), 2.0]).lines[0].get_ydata()) == [1, 2]


def test_appearance_of_a_class_does_not_depend_on_other_classes():
    x, t = spiral.load_data()
    colours = [c.get_facecolor()[0].tolist() for c in plot_data(x, t).collections]
    part = t[:, 1] == 0
    assert [c.get_facecolor()[0].tolist() for c in plot_data(x[part], t[part]).collections] == colours[::2]


def test_plot_loss_accepts_a_generator():
    assert list(plot_loss(loss for loss in [3, 2, 1]).lines[0].get_ydata()) == [3, 2, 1]


# Labels


@pytest.mark.parametrize(
    ("t", "counts"),
    [
        ([[0], [1], [1], [2]], [1, 2, 1]),
        ([False, True, True, True], [1, 3]),
        ([[False], [True], [True], [True]], [1, 3]),
        ([[True, False], [False, True], [False, True], [True, False]], [2, 2]),
        ([-1, -1, 1, -1], [3, 1]),
        (numpy.array([0, 3, 0, 3], "uint8"), [2, 2]),
        ([[1, 0], [0, 1], [0, 1], [0, 1]], [1, 3]),
    ],
)
def test_every_kind_of_labels(t, counts):
    for given in (t, numpy.array(t), np.asarray(t)):
        found = looks(plot_data(POINTS, given))
        assert [count for *_, count in found] == counts
        assert len({(colour, marker) for colour, marker, _ in found}) == len(counts)
        assert looks(plot_decision_regions(Grid(), POINTS, given, step=1)) == found


def test_points_and_labels_of_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [-1.0, 0, 1, 2], "b": [0.0, 1, 0, 2], "t": [0, 1, 1, 2]}, index=[5, 7, 1, 2])
    for t in (frame["t"], frame[["t"]], pandas.get_dummies(frame["t"])):
        assert [count for *_, count in looks(plot_data(frame[["a", "b"]], t))] == [1, 2, 1]


@pytest.mark.parametrize(
    ("t", "words"),
    [
        ([0, 1, 2], r"t must be labels \(4,\) or one-hot \(4, C\) for the 4 points in x, got shape \(3,\)"),
        ([[0], [1], [2]], r"got shape \(3, 1\)"),
        ([[0, 1, 2, 1]], r"got shape \(1, 4\)"),
        (numpy.zeros((4, 1, 1), int), r"got shape \(4, 1, 1\)"),
        (numpy.zeros((4, 0), int), r"got shape \(4, 0\)"),
        (3, r"got shape \(\)"),
        ([0.0, 1, 1, 2], r"t must hold integer labels, got float64; convert them with t\.astype\(int\)"),
        ([[0.0], [1], [1], [2]], "t must hold integer labels, got float64"),
        (numpy.eye(4), r"one-hot integers, got float64 \(4, 4\); use argmax"),
        (numpy.ones((4, 2), int), "every one-hot row must hold a single 1"),
    ],
)
@pytest.mark.parametrize("name", ["plot_data", "plot_decision_regions"])
def test_invalid_labels_are_rejected(name, t, words):
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        plot_data(POINTS, t) if name == "plot_data" else plot_decision_regions(Grid(), POINTS, t)
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([[0, 0], [0, numpy.nan], [1, 1], [2, 2]], "x holds NaN or infinity, first in row 1"),
        ([[0, 0], [0, 1], [1, -numpy.inf], [2, 2]], "x holds NaN or infinity, first in row 2"),
        ([0.0, 1, 2, 3], r"x must be \(N, 2\), with at least one point, got shape \(4,\)"),
        (numpy.zeros((0, 2)), r"x must be \(N, 2\), with at least one point, got shape \(0, 2\)"),
    ],
)
def test_invalid_points_are_rejected(x, words):
    t = [0, 1, 1, 2][: len(x)]
    with pytest.raises(ValueError, match=f"plot_data: {words}"):
        plot_data(x, t)
    with pytest.raises(ValueError, match=f"plot_decision_regions: {words}"):
        plot_decision_regions(Grid(), x, t)


def test_many_classes_all_look_different():
    t = numpy.arange(-60, 120)
    x = numpy.stack([t, t], axis=1)
    found = looks(plot_data(x, t))
    assert len({(colour, marker) for colour, marker, _ in found}) == 180
    assert [colour[:3] for colour, *_ in found[60:63]] == [BLUE, ORANGE, GREEN]
    grid = Grid(lambda points: -abs(points[:, :1] - numpy.arange(20)))
    assert len(set(regions(plot_decision_regions(grid, x[60:80], t[60:80])))) == 20


# Regions


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("scale", [1, -1])
def test_single_score_gives_two_regions(axes, scale):
    def scores(points):
        score = np.asarray(scale * (points[:, 0] - 0.5))
        return score if axes == 1 else score[:, None]

    ax = plot_decision_regions(Grid(scores), POINTS, [0, 0, 1, 1])
    assert regions(ax) == [BLUE, ORANGE]
    right = ax.collections[0].get_paths()[1 if scale == 1 else 0].vertices[:, 0]
    assert right.min() == pytest.approx(0.5, abs=0.02)  # a pixel
    assert right.max() == ax.get_xlim()[1]


def test_single_score_of_zero_is_class_1_as_in_the_loss():
    assert regions(plot_decision_regions(Grid(lambda p: 0 * p[:, :1]), POINTS, [0, 0, 1, 1])) == [ORANGE]
    layer = nnx.SigmoidWithLoss()
    layer.forward(np.zeros((1, 1), "float32"), np.ones((1, 1), int))
    assert layer.accuracy() == 1


@pytest.mark.parametrize("dtype", [int, bool])
def test_a_function_that_returns_classes(dtype):
    grid = Grid(lambda points: (points[:, 0] >= 0.5).astype(dtype))
    assert regions(plot_decision_regions(grid, POINTS, [0, 0, 1, 1])) == [BLUE, ORANGE]


def test_the_largest_of_two_or_more_scores():
    grid = Grid(lambda p: numpy.stack([0 * p[:, 0], p[:, 0] - 1, -p[:, 0]], axis=1))
    assert regions(plot_decision_regions(grid, POINTS, [0, 0, 1, 1])) == [BLUE, ORANGE, GREEN]


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda p: p[:, 0] * numpy.nan, "predict returned NaN"),
        (lambda p: p[:5], r"predict must return scores \(\d+, C\) or \(\d+,\) for \d+ points, got shape \(5, 2\)"),
        (lambda p: p[:, :, None], r"predict must return .*, 2, 1\)"),
        (lambda p: p[:, :0], r"predict must return .*, 0\)"),
        (lambda p: 1.0, r"predict must return .* got shape \(\)"),
    ],
)
def test_invalid_results_of_predict_are_rejected(scores, words):
    with pytest.raises(ValueError, match=words):
        plot_decision_regions(Grid(scores), POINTS, [0, 0, 1, 1])
    assert not pyplot.get_fignums()


def test_predict_must_be_callable():
    with pytest.raises(TypeError, match="predict must be a model or a function, got list"):
        plot_decision_regions([], POINTS, [0, 0, 1, 1])


# The grid


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1, 100, 1000, 1e9, 1e300])
def test_grid_size_depends_on_the_pixels_for_any_range(scale):
    grid = Grid(lambda p: p[:, 0] - scale)
    tracemalloc.start()
    ax = plot_decision_regions(grid, POINTS * scale, [0, 0, 1, 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    extent = ax.get_window_extent()
    assert len(grid.points) == pytest.approx(extent.width * extent.height, rel=0.02)
    assert max(map(len, grid.batches)) <= 10_000
    assert numpy.array(ax.get_xlim()) / scale == pytest.approx([-1.15, 2.15])
    assert numpy.array(ax.get_ylim()) / scale == pytest.approx([-0.1, 2.1])
    assert regions(ax) == [BLUE, ORANGE]


def test_the_grid_of_a_large_figure_is_bounded():
    grid = Grid()
    plot_decision_regions(grid, POINTS, [0, 0, 1, 1], ax=pyplot.figure(figsize=(40, 40), dpi=300).add_subplot())
    assert len(grid.points) == 1_000_000


@pytest.mark.parametrize("value", [0, 5, -1e-7, 1e20])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_points_with_equal_coordinates(value, axis):
    x = POINTS.copy()
    x[:, slice(None) if axis is None else axis] = value
    grid = Grid(lambda p: p[:, axis or 0] - value)
    ax = plot_decision_regions(grid, x, [0, 0, 1, 1])
    assert regions(ax) == [BLUE, ORANGE]
    for low, high in (ax.get_xlim(), ax.get_ylim()):
        assert low < high


def test_integer_points_are_converted_to_floating():
    grid = Grid()
    plot_decision_regions(grid, numpy.array([[0, 0], [200, 100]], "uint8"), [0, 1], step=10)
    assert grid.points.min(axis=0) == pytest.approx([-10, -5])
    assert grid.points.max(axis=0) == pytest.approx([210, 105])


def test_step_with_too_many_points_is_rejected():
    grid = Grid()
    for scale, step in ((1000, 0.01), (1, 1e-4), (1, 1e-320)):
        with pytest.raises(
            ValueError, match=r"step=.* makes a grid of .*more than 4000000; pass a larger step, or None"
        ):
            plot_decision_regions(grid, POINTS * scale, [0, 0, 1, 1], step=step)
    assert not grid.batches
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("step", [0, -0.1, numpy.nan, numpy.inf, "0.1"])
def test_invalid_step_is_rejected(step):
    with pytest.raises(ValueError, match="step must be a positive number or None"):
        plot_decision_regions(Grid(), POINTS, [0, 0, 1, 1], step=step)


def test_step_wider_than_the_range():
    assert regions(plot_decision_regions(Grid(), POINTS, [0, 0, 1, 1], step=100)) == [BLUE, ORANGE]


# Figures


def draw_all(**options):
    net = TwoLayerNet(2, 3, 3)
    trainer = Trainer(net, nnx.SGD())
    trainer.loss_list = [2.0, 1.0]
    return [
        plot_loss([2.0, 1.0], **options),
        plot_data(POINTS, [0, 0, 1, 1], **options),
        plot_decision_regions(net, POINTS, [0, 0, 1, 1], step=0.5, **options),
        trainer.plot(**options),
    ]


def test_figures_that_were_saved_are_closed(tmp_path):
    for i in range(7):  # 28 figures; Matplotlib warns from 21 on
        axes = draw_all(path=tmp_path / f"{i}.png")
        assert all(isinstance(ax, matplotlib.axes.Axes) for ax in axes)
    assert not pyplot.get_fignums()
    axes[0].figure.savefig(tmp_path / "again.png")  # still usable


def test_figures_of_the_caller_and_figures_to_be_shown_stay_open(tmp_path):
    figure, ax = pyplot.subplots()
    assert draw_all(ax=ax, path=tmp_path / "a.png") == [ax] * 4
    assert pyplot.get_fignums() == [figure.number]
    draw_all()
    assert len(pyplot.get_fignums()) == 5


def test_a_subfigure_is_saved_with_its_figure(tmp_path):
    ax = pyplot.figure().subfigures(1, 2)[0].add_subplot()
    plot_loss([1.0], ax=ax, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_figures_are_closed_after_errors(tmp_path):
    def fail(points):
        raise RuntimeError("no prediction")

    with pytest.raises(RuntimeError, match="no prediction"):
        plot_decision_regions(fail, POINTS, [0, 0, 1, 1])
    with pytest.raises(FileNotFoundError):
        plot_loss([1.0], path=tmp_path / "missing" / "a.png")
    with pytest.raises(TypeError):
        plot_loss([1.0, None])
    assert not pyplot.get_fignums()


def test_trainer_plot_opens_a_window_without_ax_and_path(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(pyplot, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_fignums()))
    trainer = Trainer(TwoLayerNet(2, 3, 3), nnx.SGD())
    trainer.plot(path=tmp_path / "a.png")
    trainer.plot(ax=pyplot.figure(7).add_subplot())
    assert shown == []
    trainer.plot()
    assert shown == [[7, 8]]
