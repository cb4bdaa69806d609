"""Optimizers: `update(params, grads)` on lists of arrays, in place.

W a parameter, dW its gradient. `lr` and the other settings are plain attributes that may be assigned
between steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from nnx import kernels
from nnx.np import Array

__all__ = ["SGD", "clip_grads"]


class SGD:
    """Stochastic gradient descent: W -= lr * dW.

    Parameters
    ----------
    lr : float
        The learning rate.
    """

    def __init__(self, lr: float = 0.01) -> None:
        self.lr = lr

    def update(self, params: Sequence[Array], grads: Sequence[Array]) -> None:
        """Take one step on `params`, in place.

        Raises
        ------
        ValueError
            If the lists or the arrays in them do not match; nothing is changed.
        """
        _check_pairs("SGD", params, grads)
        kernels.sgd(params, grads, self.lr)


def clip_grads(grads: Sequence[Array], max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where their common norm exceeds `max_norm`, in place.

    norm = sqrt(sum of all squares) + 1e-6, as in the source; the GPU is not waited for.

    References
    ----------
    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, algorithm 1.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grads: max_norm must be positive, got {max_norm}")
    if grads:
        kernels.clip_grads(grads, max_norm)


def _check_pairs(name: str, params: Sequence[Array], grads: Sequence[Array]) -> None:
    if len(params) != len(grads):
        raise ValueError(f"{name}: every parameter needs a gradient, got {len(params)} params and {len(grads)} grads")
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.shape != g.shape:
            raise ValueError(f"{name}: grads[{i}] must have the shape of params[{i}] {p.shape}, got {g.shape}")
