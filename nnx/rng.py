"""Random generators: creation from seeds, and saving and restoring of their state."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterable
from typing import Any

import numpy

__all__ = ["as_generator", "check_counters", "check_state", "get_state", "set_state"]


def as_generator(rng: Any = None) -> Any:
    """Return `rng` if it is a generator, NumPy's global one for None, or a new generator seeded with `rng`."""
    if rng is None or rng is numpy.random:
        return numpy.random
    if isinstance(rng, numpy.random.Generator | numpy.random.RandomState):
        return rng
    plain = rng.tolist() if isinstance(rng, numpy.ndarray) else rng  # NumPy crashes at a numpy.matrix
    parts = plain if isinstance(plain, list | tuple) and plain else [plain]
    seeds = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 0 for n in parts)
    if not seeds and not isinstance(rng, numpy.random.SeedSequence | numpy.random.BitGenerator):
        kind = ValueError if isinstance(rng, numbers.Integral) and not isinstance(rng, bool) else TypeError
        raise kind(
            f"rng must be a seed, a numpy.random.Generator or None, got {rng!r:.80}; a seed is an integer of at least "
            "0, or a list of these"
        )
    return numpy.random.default_rng(plain)


def get_state(rng: Any) -> dict[str, Any]:
    """Return the state of `rng` for `set_state`: a dict of numbers and arrays under the name of the generator type."""
    state = rng.bit_generator.state if isinstance(rng, numpy.random.Generator) else rng.get_state(legacy=False)
    kind = "numpy.random" if rng is numpy.random else type(rng).__name__
    return {f"{kind} {state['bit_generator']}": state}


def set_state(rng: Any, state: dict[str, Any]) -> None:
    """Restore the state of `rng` returned by `get_state`."""
    (inner,) = state.values()
    if isinstance(rng, numpy.random.Generator):
        rng.bit_generator.state = inner
    else:
        rng.set_state(inner)


def check_state(rng: Any, state: dict[str, Any]) -> None:
    """Raise a ValueError unless `state` is valid for `rng`; NumPy does not detect every invalid state."""
    try:
        if state.keys() != (here := get_state(rng).keys()):
            raise ValueError(f"that of {', '.join(state)}, and here is {', '.join(here)}")
        (inner,) = state.values()
        pos = inner["state"].get("pos", 0), inner.get("buffer_pos", 0)  # NumPy does not check these bounds
        set_state(numpy.random.RandomState() if rng is numpy.random else copy.deepcopy(rng), state)
        if not (0 <= pos[0] <= 624 and 0 <= pos[1] <= 4):
            raise ValueError(f"position {max(pos)}")
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(f"invalid generator state ({error})") from error


def check_counters(state: dict[str, Any], names: Iterable[str]) -> None:
    """Raise a ValueError unless the values `names` of `state`, if it has them, are integers of 64 bits."""
    for name, value in ((name, state[name]) for name in names if name in state):
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise ValueError(f"{name} must be an integer of 64 bits, got {value!r}")
