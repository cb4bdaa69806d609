"""Weights that several layers share: found by memory, also transposed, never by comparing values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnx.device import address
from nnx.np import Array, np

__all__ = ["Shared", "places"]


def places(p: Array) -> tuple[Any, Any]:
    """Return where `p` lies, and where it would lie if it were another array transposed: pointer, shape, strides."""
    return (address(p), p.shape, p.strides), (address(p), p.shape[::-1], p.strides[::-1])


class Shared:
    """Which of `params` are one array in memory, found once, and their summed gradients."""

    def __init__(self, params: Iterable[Array]) -> None:
        params = list(params)
        groups: dict[Any, list[tuple[int, bool]]] = {}
        for i, p in enumerate(params):
            place, flipped = places(p)
            transposed = place not in groups and flipped in groups
            groups.setdefault(flipped if transposed else place, []).append((i, transposed))
        self.groups = list(groups.values())
        self.sums = [
            np.empty(params[g[0][0]].shape, params[g[0][0]].dtype) if len(g) > 1 else None for g in self.groups
        ]

    def merge(self, params: list[Array], grads: list[Array]) -> tuple[list[Array], list[Array]]:
        """Return `params` and `grads` with each shared array once, its gradients summed."""
        if len(self.groups) == len(params):
            return params, grads
        merged = []
        for group, total in zip(self.groups, self.sums, strict=True):
            first = grads[group[0][0]]
            for i, transposed in group[1:]:
                first = np.add(first, grads[i].T if transposed else grads[i], out=total)
            merged.append(first)
        return [params[group[0][0]] for group in self.groups], merged
