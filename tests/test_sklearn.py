"""The estimators of nnx.sklearn: scikit-learn's own checks, equality with its perceptrons, and what is added."""

import pickle
import subprocess
import sys

import numpy
import pytest

import nnx
from nnx import np, to_cpu

pytest.importorskip("sklearn")
from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import has_fit_parameter

import nnx.sklearn
from nnx.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
ESTIMATORS = [MLPClassifier, MLPRegressor]


@parametrize_with_checks(
    [kind(max_iter=20, learning_rate_init=0.01, dtype=dtype) for kind in ESTIMATORS for dtype in ("float32", "float64")]
)
def test_checks_of_scikit_learn(estimator, check):
    # scikit-learn runs this check on its own perceptrons with other solvers than adam (PER_ESTIMATOR_CHECK_PARAMS in
    # sklearn/utils/_test_common/instance_generator.py); with float64 it passes, see also test_weights_of_rows.
    if estimator.dtype == "float32" and check.func.__name__ == "check_sample_weight_equivalence_on_dense_data":
        pytest.xfail("the results are equal within the rounding of float32, but the tolerance is 1e-7")
    check(estimator)


@pytest.fixture(scope="module")
def wine():
    X, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(params=ESTIMATORS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def data(kind, wine, diabetes):
    return wine if kind is MLPClassifier else diabetes


def both(kind, **settings):
    """Return the estimator of nnx and that of scikit-learn, with batches of all rows, whose order has no effect."""
    settings = {"random_state": 3, "batch_size": 1000, "max_iter": 30, **settings}
    return kind(dtype="float64", **settings), getattr(neural_network, kind.__name__)(**settings)


@pytest.mark.filterwarnings("ignore:Got `batch_size`")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 0.1},
        {"solver": "sgd", "alpha": 3.0},
        {"solver": "sgd", "momentum": 0.5, "nesterovs_momentum": False},
        {"solver": "sgd", "learning_rate": "adaptive", "learning_rate_init": 0.01, "tol": 0.3, "n_iter_no_change": 2},
        {"activation": "logistic", "alpha": 10.0, "hidden_layer_sizes": (7, 5)},
        {"activation": "tanh", "hidden_layer_sizes": 8},
        {"activation": "identity", "hidden_layer_sizes": ()},
        {"learning_rate_init": 0.01, "max_iter": 200, "tol": 0.05, "n_iter_no_change": 3},
        {"learning_rate_init": 0.02, "max_iter": 200, "early_stopping": True, "n_iter_no_change": 4},
        {"learning_rate": "adaptive", "max_iter": 200, "tol": 1e3, "n_iter_no_change": 2},  # only for sgd
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_training_equals_that_of_scikit_learn(kind, data, settings, weighted, rng):
    X, y = data
    y = y if kind is MLPClassifier else y / 100
    ours, theirs = both(kind, **settings)
    if weighted and not has_fit_parameter(theirs, "sample_weight"):
        pytest.skip("the perceptrons of scikit-learn take sample_weight since 1.7")
    weights = {"sample_weight": rng.integers(1, 6, len(X))} if weighted else {}
    ours.fit(X, y, **weights)
    theirs.fit(X, y, **weights)
    assert ours.n_iter_ == theirs.n_iter_
    numpy.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)
    numpy.testing.assert_allclose(ours.loss_, theirs.loss_, rtol=1e-9)
    for ours_p, theirs_p in zip(ours.model_.params[::2], theirs.coefs_, strict=True):
        numpy.testing.assert_allclose(to_cpu(ours_p), theirs_p, rtol=1e-6, atol=1e-9)
    if settings.get("early_stopping"):
        numpy.testing.assert_allclose(ours.validation_scores_, theirs.validation_scores_, rtol=1e-9)
    else:
        numpy.testing.assert_allclose(ours.best_loss_, theirs.best_loss_, rtol=1e-9)
        assert ours.validation_scores_ is theirs.validation_scores_ is None
    method = "predict_proba" if kind is MLPClassifier else "predict"
    numpy.testing.assert_allclose(getattr(ours, method)(X), getattr(theirs, method)(X), rtol=1e-6)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y))


def test_float32_follows_float64(kind, data):
    X, y = data
    single, double = (kind(random_state=0, max_iter=50, dtype=dtype).fit(X, y) for dtype in ("float32", "float64"))
    numpy.testing.assert_allclose(single.loss_curve_, double.loss_curve_, rtol=1e-4)
    assert {p.dtype for p in single.model_.params} == {numpy.dtype("float32")}
    assert {p.dtype for p in double.model_.params} == {numpy.dtype("float64")}


def test_training_in_batches_is_as_accurate():
    X, y = load_digits(return_X_y=True)
    X, settings = StandardScaler().fit_transform(X), {"random_state": 0, "max_iter": 10}
    ours, theirs = (module.MLPClassifier(**settings).fit(X[:800], y[:800]) for module in (nnx.sklearn, neural_network))
    assert ours.loss_ == pytest.approx(theirs.loss_, rel=0.1)
    assert ours.score(X[800:], y[800:]) == pytest.approx(theirs.score(X[800:], y[800:]), abs=0.02)


def test_batches_are_at_most_200_rows_unless_given(kind, rng):
    X, y = rng.normal(size=(450, 3)), rng.integers(0, 2, 450)
    for batch_size, steps in (("auto", 3), (100, 5), (1000, 1)):
        estimator = kind(max_iter=2, batch_size=batch_size).fit(X, y)
        assert estimator.trainer_.optimizer.iter == 2 * steps
    assert kind(max_iter=2).fit(X[:50], y[:50]).trainer_.optimizer.iter == 2


def test_numpy_in_numpy_out(kind, data):
    X, y = data
    estimator = kind(max_iter=2).fit(X, y)
    results = [estimator.predict(X)]
    if kind is MLPClassifier:
        results.append(estimator.predict_proba(X))
        assert type(estimator.classes_) is numpy.ndarray
        assert results[1].shape == (len(X), 3)
        numpy.testing.assert_allclose(results[1].sum(axis=1), 1, rtol=1e-5)
        numpy.testing.assert_array_equal(results[0], results[1].argmax(axis=1))
    for result in results:
        assert type(result) is numpy.ndarray
        assert len(result) == len(X)
    assert all(type(p) is np.ndarray for p in estimator.model_.params)
    assert {type(loss) for loss in estimator.loss_curve_} == {float}


def test_predictions_are_made_in_pieces(kind, data, monkeypatch):
    X, y = data
    estimator = kind(max_iter=2, random_state=0).fit(X, y)
    whole, rows = estimator.predict(X), []
    predict = nnx.Sequential.predict

    def recorded(self, x, batch_size=None):
        if batch_size is None:
            rows.append(len(x))
        return predict(self, x, batch_size)

    monkeypatch.setattr(nnx.Sequential, "predict", recorded)
    monkeypatch.setattr(nnx.sklearn, "_ROWS", 50)
    numpy.testing.assert_allclose(estimator.predict(X), whole, rtol=1e-5, atol=1e-6)
    assert max(rows) == 50
    assert sum(rows) == len(X)


def test_labels_of_strings_and_data_frames(wine):
    pandas = pytest.importorskip("pandas")
    X, y = wine
    names = numpy.array(["white", "amber", "red"])
    frame = pandas.DataFrame(X, columns=[f"x{i}" for i in range(X.shape[1])])
    plain = MLPClassifier(max_iter=20, random_state=0).fit(X, y)
    for labels in (names[y], names[y].tolist(), pandas.Series(names[y]), pandas.Series(names[y], dtype="category")):
        estimator = MLPClassifier(max_iter=20, random_state=0, early_stopping=True).fit(frame, labels)
        assert estimator.classes_.tolist() == ["amber", "red", "white"]
        assert set(estimator.predict(frame)) <= set(names)
        assert estimator.score(frame, labels) > 0.5
        assert estimator.feature_names_in_[0] == "x0"
    with pytest.raises(ValueError, match="feature names"):
        estimator.predict(frame[frame.columns[::-1]])
    for labels in (y * 10 - 5, y.astype(float)):
        same = MLPClassifier(max_iter=20, random_state=0).fit(X, labels)
        numpy.testing.assert_array_equal(same.predict(X), numpy.unique(labels)[plain.predict(X)])
    two = MLPClassifier(random_state=0, max_iter=100).fit(X[y < 2], y[y < 2] == 1)
    assert two.classes_.tolist() == [False, True]
    assert two.score(X[y < 2], y[y < 2] == 1) > 0.95


def test_several_outputs_of_a_regression(diabetes):
    X, y = diabetes
    Y = numpy.stack([y, -y, y / 2], axis=1) / 100
    estimator = MLPRegressor(random_state=0, learning_rate_init=0.01, max_iter=100).fit(X, Y)
    assert estimator.predict(X).shape == Y.shape
    assert estimator.n_outputs_ == 3
    assert estimator.score(X, Y) > 0.5
    with pytest.raises(ValueError, match="t must have the shape of x"):
        estimator.partial_fit(X, y)
    assert estimator.predict(X).shape == Y.shape
    stopped = MLPRegressor(max_iter=3, early_stopping=True).fit(X, Y)
    assert len(stopped.validation_scores_) == 3
    assert stopped.best_validation_score_ == max(stopped.validation_scores_)


def test_held_out_scores_are_those_of_scikit_learn(rng):
    scores, labels, weight = rng.normal(size=(30, 3)), rng.integers(0, 3, 30), rng.random(30)
    for w in (None, weight):
        expected = accuracy_score(labels, scores.argmax(axis=1), sample_weight=w)
        assert MLPClassifier._score(scores, labels, w) == pytest.approx(expected)
        targets = scores + rng.normal(size=scores.shape)
        assert MLPRegressor._score(scores, targets, w) == pytest.approx(r2_score(targets, scores, sample_weight=w))
    assert MLPRegressor._score(numpy.ones((4, 1)), numpy.zeros((4, 1))) < -1e9  # constant targets
    assert MLPRegressor._score(numpy.ones((4, 1)), numpy.ones((4, 1))) == 1


def test_early_stopping_restores_the_best_weights(kind, data, rng):
    X, y = data[0], rng.permutation(data[1])  # nothing to learn, so the scores go up and down
    estimator = kind(early_stopping=True, random_state=0, learning_rate_init=0.1, batch_norm=True, n_iter_no_change=2)
    estimator.fit(X, y)
    held_out = estimator.trainer_.validation
    scores = to_cpu(estimator.model_.predict(np.asarray(held_out[0])))
    assert estimator._score(scores, held_out[1]) == pytest.approx(max(estimator.validation_scores_), rel=1e-5)
    assert max(estimator.validation_scores_) > estimator.validation_scores_[-1]
    assert len(held_out[0]) == -(-len(X) // 10)
    assert len(estimator.validation_scores_) == estimator.n_iter_ == len(estimator.loss_curve_)


def test_partial_fit_equals_fit(kind, data):
    X, y = data
    first = {"classes": [0, 1, 2]} if kind is MLPClassifier else {}
    settings = {"random_state": 0, "max_iter": 6, "batch_size": 64}
    whole, parts = kind(**settings).fit(X, y), kind(**settings)
    for epoch in range(6):
        parts.partial_fit(X, y, **(first if epoch == 0 else {}))
        assert parts.n_iter_ == 1
        parts = pickle.loads(pickle.dumps(parts)) if epoch == 3 else parts
    assert parts.loss_curve_ == whole.loss_curve_
    numpy.testing.assert_array_equal(parts.predict(X), whole.predict(X))
    parts.set_params(early_stopping=True)
    with pytest.raises(ValueError, match="early_stopping"):
        parts.partial_fit(X, y)


def test_classes_of_partial_fit(wine):
    X, y = wine
    estimator = MLPClassifier(random_state=0)
    with pytest.raises(ValueError, match="first call needs classes"):
        estimator.partial_fit(X, y)
    estimator.partial_fit(X[y < 2], y[y < 2], classes=[2, 1, 0])
    assert estimator.predict_proba(X).shape == (len(X), 3)
    estimator.partial_fit(X[y > 1], y[y > 1], sample_weight=numpy.ones((y > 1).sum()), classes=[0, 1, 2])
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        estimator.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="unseen labels"):
        estimator.partial_fit(X, y + 1)


def test_warm_start_continues_with_a_new_optimizer(kind, data):
    X, y = data
    cold, warm = kind(random_state=0, max_iter=5), kind(random_state=0, max_iter=5, warm_start=True)
    for _ in range(2):
        cold.fit(X, y)
        warm.fit(X, y)
    assert len(cold.loss_curve_) == 5
    assert len(warm.loss_curve_) == 10
    assert warm.n_iter_ == 5
    assert warm.loss_curve_[:5] == cold.loss_curve_
    assert warm.loss_curve_[5] < warm.loss_curve_[4]
    assert warm.trainer_.optimizer.iter == cold.trainer_.optimizer.iter
    with pytest.raises(ValueError, match="features"):
        warm.fit(X[:, 1:], y)


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_convergence_warning(kind, data):
    X, y = data
    with pytest.warns(ConvergenceWarning, match="not converged after max_iter=3 epochs") as warned:
        kind(max_iter=3).fit(X, y)
    assert warned[0].filename == __file__
    assert kind(max_iter=50, tol=1e6, n_iter_no_change=4).fit(X, y).n_iter_ == 6
    kind(max_iter=3).partial_fit(X, y, **({"classes": [0, 1, 2]} if kind is MLPClassifier else {}))


def test_pipeline_grid_search_clone_and_pickle(kind, data):
    X, y = data
    grid = {"hidden_layer_sizes": [(5,), (20, 10)], "alpha": numpy.logspace(-3, 0, 2)}
    assert cross_val_score(kind(max_iter=2), X, y, cv=2).shape == (2,)
    search = GridSearchCV(
        kind(random_state=0, max_iter=5, learning_rate_init=numpy.float64(0.01)), grid, n_jobs=2, cv=2
    )
    model = make_pipeline(StandardScaler(), search).fit(X, y)
    best = search.best_estimator_
    assert best.model_.params[0].dtype == "float32"
    assert type(best.trainer_.model.decay) is float  # NumPy's float64 would promote the gradients
    loaded = pickle.loads(pickle.dumps(model))
    numpy.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    cloned = clone(best)
    assert cloned.get_params() == best.get_params()
    assert not hasattr(cloned, "model_")
    with pytest.raises(NotFittedError):
        cloned.predict(X)
    cloned.fit(StandardScaler().fit_transform(X), y)
    numpy.testing.assert_array_equal(cloned.predict(X), best.predict(X))


def test_pickles_hold_no_data(kind, rng):
    X, y = rng.normal(size=(5000, 10)), rng.integers(0, 2, 5000)
    estimator = kind((4,), max_iter=2, early_stopping=True).fit(X, y, sample_weight=numpy.ones(5000))
    assert len(pickle.dumps(estimator)) < 20_000


def test_weights_of_rows(kind, data):
    X, y = data
    half = numpy.arange(len(X)) % 2
    settings = {"random_state": 0, "max_iter": 20, "batch_size": 10_000, "alpha": 1.0}
    for weight in (half * 3, half + 1):
        weighted = kind(**settings).fit(X, y, sample_weight=weight)
        repeated = kind(**settings).fit(X.repeat(weight, axis=0), y.repeat(weight))
        numpy.testing.assert_allclose(weighted.loss_curve_, repeated.loss_curve_, rtol=1e-4)
    for weight, message in ((half * 0, "not only zeros"), (half - 0.5, "at least 0"), (half[1:], "inconsistent|must")):
        with pytest.raises(ValueError, match=message):
            kind().fit(X, y, sample_weight=weight)


def test_random_state(kind, data):
    X, y = data
    state = numpy.random.get_state()[2]
    first, second, other = (kind(random_state=seed, max_iter=3, dropout=0.5).fit(X, y) for seed in (1, 1, 2))
    assert numpy.random.get_state()[2] == state
    assert first.loss_curve_ == second.loss_curve_ != other.loss_curve_
    draws = numpy.random.RandomState(1)
    a, b = (kind(random_state=draws, max_iter=3).fit(X, y).loss_curve_ for _ in range(2))
    assert a != b
    with pytest.raises(ValueError, match="seed"):
        kind(random_state="x").fit(X, y)


def test_dropout_batch_norm_and_gelu(kind, data):
    X, y = data
    estimator = kind((20, 10), "gelu", batch_norm=True, dropout=0.2, max_iter=3).fit(X, y)
    names = [type(layer).__name__ for layer in estimator.model_.layers]
    assert names == ["Affine", "BatchNorm", "GELU", "Dropout"] * 2 + ["Affine"]
    numpy.testing.assert_array_equal(estimator.predict(X), estimator.predict(X))


def test_model_can_be_saved_and_loaded(kind, data, tmp_path):
    pytest.importorskip("safetensors")
    X, y = data
    estimator = kind((6,), max_iter=2).fit(X, y)
    nnx.checkpoint.save(tmp_path / "model.safetensors", estimator.model_)
    loaded = nnx.models.load(tmp_path / "model.safetensors")
    x = np.asarray(X.astype("float32"))
    numpy.testing.assert_array_equal(to_cpu(loaded.predict(x)), to_cpu(estimator.model_.predict(x)))


def test_verbose(kind, data, capsys):
    X, y = data
    kind(max_iter=2, early_stopping=True).fit(X, y)
    assert capsys.readouterr().out == ""
    kind(max_iter=2, verbose=True).fit(X, y)
    assert "| epoch 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "lbfgs"}, "solver must be one of adam, sgd, got 'lbfgs'; sklearn.neural_network.MLP.* has it"),
        ({"solver": "adamw"}, "got 'adamw'$"),
        ({"learning_rate": "invscaling"}, "'invscaling'; sklearn"),
        ({"activation": "swish"}, "activation must be one of relu, tanh, logistic, identity, gelu, got 'swish'"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64"),
        ({"alpha": -1}, "alpha must be"),
        ({"learning_rate_init": "0.1"}, "learning_rate_init must be a number"),
        ({"tol": numpy.nan}, "tol must be"),
        ({"epsilon": -1}, "epsilon must be"),
        ({"momentum": 1.5}, "momentum must be"),
        ({"beta_1": 1}, "beta_1 must be"),
        ({"beta_2": 1.0}, "beta_2 must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"validation_fraction": 2}, "validation_fraction must be"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"n_iter_no_change": 2.5}, "n_iter_no_change must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": "all"}, "batch_size must be an integer"),
        ({"hidden_layer_sizes": (10, 0)}, "hidden_layer_sizes must be at least 1"),
        ({"hidden_layer_sizes": (10.0,)}, "hidden_layer_sizes must be an integer"),
        ({"hidden_layer_sizes": "10"}, "hidden_layer_sizes must be an integer"),
        ({"early_stopping": "yes"}, "early_stopping must be a bool"),
        ({"warm_start": None}, "warm_start must be a bool"),
        ({"nesterovs_momentum": 0.5}, "nesterovs_momentum must be a bool"),
        ({"verbose": "no"}, "verbose must be a bool"),
        ({"batch_norm": "x"}, "batch_norm must be a bool"),
    ],
    ids=str,
)
def test_invalid_parameters(kind, data, settings, message):
    with pytest.raises((TypeError, ValueError), match=f"^{kind.__name__}: .*{message}"):
        kind(**settings).fit(*data)


def test_invalid_data(kind, data):
    sparse = pytest.importorskip("scipy.sparse")
    X, y = data
    with pytest.raises(TypeError, match="Sparse data was passed"):
        kind().fit(sparse.csr_array(X), y)
    fitted = kind(max_iter=1).fit(X, y)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        fitted.predict(sparse.csr_array(X))
    with pytest.raises(ValueError, match="NaN"):
        kind().fit(numpy.where(X > 2, numpy.nan, X), y)
    with numpy.errstate(all="ignore"), pytest.raises(ValueError, match="too large for dtype"):
        kind().fit(X * 1e200, y)
    with numpy.errstate(all="ignore"), pytest.raises(FloatingPointError, match="smaller lr"):
        kind(solver="sgd", learning_rate_init=1e10, activation="identity").fit(X, y)


def test_several_labels_per_row_are_refused(wine):
    X, y = wine
    with pytest.raises(ValueError, match=r"one label per row, got shape \(178, 2\).*MultiOutputClassifier"):
        MLPClassifier().fit(X, numpy.stack([y > 0, y > 1], axis=1))
    with pytest.raises(ValueError, match="Unknown label type"):
        MLPClassifier().fit(X, y + 0.5)


def test_import_of_nnx_does_not_import_scikit_learn():
    code = "import nnx, sys; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_scikit_learn_is_named():
    code = "import sys; sys.modules['sklearn'] = None; import nnx.sklearn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "ImportError: nnx.sklearn needs scikit-learn 1.6 or newer: pip install 'nnx-array[sklearn]'" in result.stderr
