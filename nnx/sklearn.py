"""Estimators for scikit-learn, trained by `Trainer`: multi-layer perceptrons for classification and regression.

N rows, D features, C classes, K outputs. Arrays given and returned are NumPy's, on the GPU too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy

from nnx.callbacks import Callback
from nnx.checks import check_bool, check_integer, check_number
from nnx.device import asarray, to_cpu
from nnx.layers import Affine, MeanSquaredError, SoftmaxWithLoss
from nnx.models import Sequential, mlp
from nnx.np import Array, np
from nnx.optimizer import Adam, Momentum, Nesterov
from nnx.trainer import Trainer
from nnx.tree import named_arrays

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelEncoder
    from sklearn.utils import check_array, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("nnx.sklearn needs scikit-learn 1.6 or newer: pip install 'nnx-array[sklearn]'") from error

__all__ = ["MLPClassifier", "MLPRegressor"]

_ROWS = 4096  # predicted at a time
_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "logistic": "sigmoid", "identity": None, "gelu": "gelu"}
_CHOICES = {
    "activation": tuple(_ACTIVATIONS),
    "solver": ("adam", "sgd"),
    "learning_rate": ("constant", "adaptive"),
    "dtype": ("float32", "float64"),
}
_ONLY_SKLEARN = ("lbfgs", "invscaling")
_LARGEST = {
    **dict.fromkeys(("alpha", "learning_rate_init", "tol", "epsilon"), math.inf),  # any finite number
    **dict.fromkeys(("momentum", "validation_fraction"), 1.0),
    **dict.fromkeys(("beta_1", "beta_2", "dropout"), math.nextafter(1, 0)),
}
_FLAGS = ("nesterovs_momentum", "early_stopping", "warm_start", "verbose", "batch_norm")


class _PenalizedNet(Sequential):
    """The layers of `net`, trained on scale * loss + decay / 2 * sum(W**2), with the weights W of the Affine layers."""

    def __init__(self, net: Sequential, scale: float) -> None:
        super().__init__(net.layers, net.loss_layer)
        self.scale, self.decay = scale, 0.0
        self.weights = [(W, dW) for W, dW in zip(self.params, self.grads, strict=True) if W.ndim == 2]

    def forward(self, x: Any, t: Any = None, weight: Any = None) -> Any:
        """Return the loss with the penalty."""
        return self.scale * super().forward(x, t, weight) + self.decay / 2 * sum(np.vdot(W, W) for W, _ in self.weights)

    def backward(self, dout: Any = 1) -> Array | None:
        """Compute the gradients of the loss with the penalty."""
        dx = super().backward(self.scale * dout)
        for W, dW in self.weights:
            dW += self.decay * W
        return dx


class _Convergence(Callback):
    """Ends the training as scikit-learn does, when more than `patience` epochs in a row did not improve by `tol`.

    Compared are the scores of held-out rows, whose best weights are restored at the end, or else the training losses.
    With `adaptive`, the learning rate is divided by 5 instead, until it is at most 1e-6.
    """

    def __init__(self, tol: float, patience: int, adaptive: bool) -> None:
        self.tol, self.patience, self.adaptive = tol, patience, adaptive
        self.best, self.wait, self.converged = -math.inf, 0, False
        self.best_arrays: list[Array] = []

    def on_begin(self, trainer: Any) -> None:
        """Find the arrays to copy."""
        self.arrays = [] if trainer.validation is None else [*named_arrays(trainer.model).values()]

    def on_epoch(self, trainer: Any) -> None:
        """Compare the score of the epoch with the best one."""
        row, optimizer = trainer.history[-1], trainer.optimizer
        score = row.get("val_score", -row["loss"])
        self.wait = 0 if score >= self.best + self.tol else self.wait + 1
        if score > self.best:
            self.best, self.best_arrays = score, [a.copy() for a in self.arrays]
        if self.wait > self.patience:
            if self.adaptive and optimizer.lr > 1e-6:
                optimizer.lr, self.wait = optimizer.lr / 5, 0
            else:
                self.converged = True
                trainer.stop()

    def on_end(self, trainer: Any) -> None:
        """Restore the arrays of the best score."""
        for a, best in zip(self.arrays, self.best_arrays, strict=bool(self.best_arrays)):
            a[...] = best


class _BaseMLP(BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """The parameters of both estimators, their training, and the outputs of the network."""

    _loss: Any
    _scale: float  # of the loss, which is then scikit-learn's
    loss_curve_: list[float]
    validation_scores_: list[float] | None

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        max_iter: int = 200,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: int = 10,
        batch_norm: bool = False,
        dropout: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        self.hidden_layer_sizes, self.activation = hidden_layer_sizes, activation
        self.batch_norm, self.dropout, self.dtype = batch_norm, dropout, dtype
        self.solver, self.alpha, self.batch_size, self.max_iter = solver, alpha, batch_size, max_iter
        self.learning_rate, self.learning_rate_init = learning_rate, learning_rate_init
        self.momentum, self.nesterovs_momentum = momentum, nesterovs_momentum
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.early_stopping, self.validation_fraction = early_stopping, validation_fraction
        self.tol, self.n_iter_no_change = tol, n_iter_no_change
        self.random_state, self.warm_start, self.verbose = random_state, warm_start, verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on the rows of X (N, D), their targets y and, if given, their weights (N,); return the estimator."""
        if not self._train(X, y, sample_weight):
            warnings.warn(
                f"{type(self).__name__}: not converged after max_iter={self.max_iter} epochs; increase max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _train(self, X: Any, y: Any, weight: Any, classes: Any = None, *, partial: bool = False) -> bool:
        """Train, for one epoch if `partial`, and return whether the training converged."""
        self._check_parameters()
        if partial and self.early_stopping:
            raise ValueError(f"{type(self).__name__}.partial_fit: early_stopping=True needs fit")
        resume = hasattr(self, "trainer_") and (partial or self.warm_start)
        X, y = validate_data(self, X, y, dtype=self.dtype, multi_output=True, reset=not resume)
        data, held_out = [X, self._encode(y, classes, resume)], []
        if weight is not None:
            data.append(check_array(weight, ensure_2d=False, dtype=numpy.float64, input_name="sample_weight"))
        if not resume:
            self._build(X.shape[1])
        elif not partial:
            self.trainer_.optimizer = self._make_optimizer()
        if self.early_stopping:
            parts = train_test_split(*data, test_size=self.validation_fraction, random_state=self.trainer_.rng)
            data, held_out = parts[::2], parts[1::2]
        return self._fit_trainer(data, held_out, partial)

    def _build(self, features: int) -> None:
        """Make the network, with weights and biases drawn as scikit-learn draws them, and its trainer."""
        name, sizes = f"{type(self).__name__}: hidden_layer_sizes", numpy.atleast_1d(self.hidden_layer_sizes).tolist()
        self.model_ = mlp(
            [features, *(check_integer(name, size) for size in sizes), self.n_outputs_],
            activation=_ACTIVATIONS[self.activation],
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            loss_layer=self._loss(),
            dtype=self.dtype,
            rng=check_random_state(self.random_state),
        )
        rng, factor = check_random_state(self.random_state), 2 if self.activation == "logistic" else 6
        for layer in self.model_.layers:
            if isinstance(layer, Affine):
                bound = math.sqrt(factor / sum(layer.params[0].shape))
                for p in layer.params:
                    p[...] = asarray(rng.uniform(-bound, bound, p.shape))
        self.trainer_ = Trainer(_PenalizedNet(self.model_, self._scale), self._make_optimizer(), rng=rng)
        self.loss_curve_, self.best_loss_, self.validation_scores_ = [], math.inf, None

    def _make_optimizer(self) -> Adam | Momentum:
        if self.solver == "adam":
            return Adam(self.learning_rate_init, self.beta_1, self.beta_2, eps=self.epsilon)
        return (Nesterov if self.nesterovs_momentum else Momentum)(self.learning_rate_init, self.momentum)

    def _fit_trainer(self, data: list[Any], held_out: list[Any], partial: bool) -> bool:
        (X, t, *weight), trainer, epochs = data, self.trainer_, self.trainer_.current_epoch
        batch_size = min(200 if self.batch_size == "auto" else int(self.batch_size), len(X))
        mean_weight = weight[0].mean() if weight else 1
        trainer.model.decay = float(self.alpha / batch_size / (mean_weight or 1))  # fit refuses weights that are all 0
        adaptive = self.learning_rate == "adaptive" and self.solver == "sgd"
        convergence = _Convergence(self.tol, self.n_iter_no_change, adaptive)
        trainer.fit(
            X,
            t,
            1 if partial else self.max_iter,
            batch_size,
            eval_interval=20 if self.verbose else None,
            validation=tuple(held_out[:2]) or None,
            metrics={"score": lambda scores, t: self._score(scores, t, *held_out[2:])} if held_out else None,
            sample_weight=weight[0] if weight else None,
            verbose=None if self.verbose else False,
            callbacks=[convergence],
        )
        rows = trainer.history[epochs:]
        self.loss_curve_ += [row["loss"] for row in rows]
        self.n_iter_, self.loss_ = len(rows), self.loss_curve_[-1]
        self.best_loss_ = min(self.best_loss_, *self.loss_curve_[-len(rows) :])
        if held_out:
            self.validation_scores_ = (self.validation_scores_ or []) + [row["val_score"] for row in rows]
        self.best_validation_score_ = max(self.validation_scores_) if self.validation_scores_ else None
        return convergence.converged

    def _predict(self, X: Any, method: str = "predict") -> numpy.ndarray:
        """Return the result of a method of the network, computed for some thousands of rows at a time."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=self.dtype, reset=False)
        return to_cpu(getattr(self.model_, method)(X, _ROWS))

    def _check_parameters(self) -> None:
        name = type(self).__name__
        for parameter, options in _CHOICES.items():
            if (value := getattr(self, parameter)) not in options:
                remedy = f"; sklearn.neural_network.{name} has it" if value in _ONLY_SKLEARN else ""
                raise ValueError(f"{name}: {parameter} must be one of {', '.join(options)}, got {value!r:.80}{remedy}")
        for parameter, largest in _LARGEST.items():
            check_number(f"{name}: {parameter}", getattr(self, parameter), 0, largest)
        for parameter in _FLAGS:
            check_bool(f"{name}: {parameter}", getattr(self, parameter))
        for parameter in ("max_iter", "n_iter_no_change", *(["batch_size"] if self.batch_size != "auto" else [])):
            check_integer(f"{name}: {parameter}", getattr(self, parameter))


class MLPClassifier(ClassifierMixin, _BaseMLP):  # type: ignore[misc]
    """A multi-layer perceptron that minimizes the cross-entropy loss.

    Parameters and attributes have the names, meanings and defaults of `sklearn.neural_network.MLPClassifier`; the
    differences are listed in the notes.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int
        The number of units in each hidden layer; () is logistic regression.
    activation : "relu", "tanh", "logistic", "identity" or "gelu"
        Of the hidden layers; scikit-learn has no "gelu".
    solver : "adam" or "sgd"
    alpha : float
        Strength of the L2 penalty: the loss of a batch of n rows includes alpha / 2 * sum(W**2) / n, or with weighted
        rows alpha / 2 * sum(W**2) / (n * their mean weight). Biases are not penalized. As in scikit-learn, this is
        part of the gradient, not decoupled weight decay.
    batch_size : int or "auto"
        The number of rows per step, at most N; "auto" is 200.
    learning_rate : "constant" or "adaptive"
        With solver="sgd", "adaptive" divides the learning rate by 5 each time that "constant" would end the training.
    learning_rate_init, beta_1, beta_2, epsilon, momentum : float
        Of `optimizer.Adam`, and of `optimizer.Nesterov` for solver="sgd".
    nesterovs_momentum : bool
        False uses `optimizer.Momentum` instead.
    max_iter : int
        The maximum number of epochs.
    tol, n_iter_no_change : float, int
        The training has converged when the loss, or with early stopping the score of the held-out rows, has not
        improved by at least tol for more than n_iter_no_change epochs.
    early_stopping, validation_fraction : bool, float
        Whether to hold out this fraction of the rows, and to restore the weights with the best score at the end.
    random_state : int, numpy.random.RandomState or None
        Draws the weights, the held-out rows, and the order of the rows in each epoch.
    warm_start : bool
        Whether fit continues from the weights of the last fit.
    verbose : bool
        Whether to show progress, as `Trainer.fit` does.
    batch_norm, dropout : bool, float
        As in `models.mlp`; scikit-learn has neither.
    dtype : "float32" or "float64"
        Of the weights and of the computation; scikit-learn uses that of X.

    Attributes
    ----------
    classes_ : (C,)
        The sorted labels.
    loss_curve_ : list of float
        The mean loss of each epoch, over all calls; `loss_` is the last one, `best_loss_` the lowest.
    validation_scores_ : list of float, or None
        The accuracy, or R2, of the held-out rows after each epoch; `best_validation_score_` is the highest.
    n_iter_ : int
        The number of epochs of the last call.
    n_features_in_, feature_names_in_, n_outputs_ : int, (D,), int
        `feature_names_in_` is set only if X has column names.
    model_ : models.Sequential
        The network, for `checkpoint.save`; its `params` are the weights and biases of the layers.
    trainer_ : Trainer

    Notes
    -----
    Weights and biases are drawn as in scikit-learn (Glorot and Bengio, 2010); the order of the rows differs. Other
    differences from scikit-learn: a binary classifier has two outputs. Held-out rows are not stratified. Rows are
    always shuffled. A diverging loss raises a FloatingPointError. There is no solver "lbfgs", no learning rate
    "invscaling", and no support for sparse X and multilabel y.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from nnx.sklearn import MLPClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = MLPClassifier((16,), learning_rate_init=0.01, batch_size=32, max_iter=60, tol=0.01, random_state=0)
    >>> classifier.fit(X, y).score(X, y) > 0.9
    True
    """

    _loss, _scale = SoftmaxWithLoss, 1.0

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Any:
        """Train for one epoch, continuing the last call; the first one needs `classes`, the labels of all calls."""
        if classes is None and not hasattr(self, "trainer_"):
            raise ValueError("MLPClassifier.partial_fit: the first call needs classes, the labels of all calls")
        self._train(X, y, sample_weight, classes, partial=True)
        return self

    def predict(self, X: Any) -> numpy.ndarray:
        """Return the most probable label of each row of X, (N,)."""
        indices = self._predict(X).argmax(axis=1)
        return self.classes_[indices]

    def predict_proba(self, X: Any) -> numpy.ndarray:
        """Return the probabilities of `classes_` for each row of X, (N, C)."""
        return self._predict(X, "predict_proba")

    def _encode(self, y: numpy.ndarray, classes: Any, resume: bool) -> numpy.ndarray:
        """Return the labels (N,) or (N, 1) as indices of `classes_`."""
        if y.shape[1:] not in ((), (1,)):
            raise ValueError(
                f"MLPClassifier: y must have one label per row, got shape {y.shape}; for several, use "
                "sklearn.multioutput.MultiOutputClassifier"
            )
        check_classification_targets(y)
        if not resume:
            self._encoder = LabelEncoder().fit(y if classes is None else classes)
            self.classes_, self.n_outputs_ = self._encoder.classes_, len(self._encoder.classes_)
        elif classes is not None and not numpy.array_equal(numpy.unique(classes), self.classes_):
            raise ValueError(f"MLPClassifier.partial_fit: classes must be those of the first call, {self.classes_}")
        return self._encoder.transform(y)

    @staticmethod
    def _score(scores: numpy.ndarray, t: numpy.ndarray, weight: Any = None) -> float:
        return numpy.average(scores.argmax(axis=1) == t, weights=weight)


class MLPRegressor(RegressorMixin, _BaseMLP):  # type: ignore[misc]
    """A multi-layer perceptron that minimizes half the mean squared error.

    Parameters, attributes and differences from scikit-learn are those of `MLPClassifier`. Targets are (N,), or (N, K)
    for several outputs: the loss is the mean over the outputs, and so is its gradient, which is that of the sum in
    `sklearn.neural_network.MLPRegressor`. There is no Poisson loss.

    Examples
    --------
    >>> import numpy
    >>> from nnx.sklearn import MLPRegressor
    >>> X = numpy.linspace(-1, 1, 100)[:, None]
    >>> regressor = MLPRegressor((16,), learning_rate_init=0.01, batch_size=10, max_iter=100, tol=0.001, random_state=0)
    >>> regressor.fit(X, X[:, 0] ** 2).score(X, X[:, 0] ** 2) > 0.9
    True
    """

    _loss, _scale = MeanSquaredError, 0.5

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train for one epoch, continuing the last call; return the estimator."""
        self._train(X, y, sample_weight, partial=True)
        return self

    def predict(self, X: Any) -> numpy.ndarray:
        """Return the predictions, (N,), or (N, K) for several outputs."""
        y = self._predict(X)
        return y.reshape(-1) if self.n_outputs_ == 1 else y

    def _encode(self, y: numpy.ndarray, classes: None, resume: bool) -> numpy.ndarray:
        """Return the targets as (N, K)."""
        y = column_or_1d(y, warn=True) if y.shape[1:] == (1,) else y
        t = numpy.asarray(y, numpy.float64).reshape(len(y), -1)
        if not resume:
            self.n_outputs_ = t.shape[1]
        return t

    @staticmethod
    def _score(scores: numpy.ndarray, t: numpy.ndarray, weight: Any = None) -> float:
        """Return R2; scikit-learn's r2_score takes as long as an epoch of a few hundred rows."""
        predictions = scores, numpy.average(t, axis=0, weights=weight)
        error, variance = (numpy.average((t - y) ** 2, axis=0, weights=weight) for y in predictions)
        return (1 - error / numpy.maximum(variance, numpy.finfo(t.dtype).eps)).mean()
