"""The choices that environment variables make, read once, at import.

`GPU` is True if `NNX_GPU` asks for CuPy. `NATIVE` is about the CPU's kernels in C, and is ignored on the GPU: None if
`NNX_NATIVE` is unset (use them if they can be imported), False if it is off (do not use them), True if it is on (fail
without them).

Nothing else in the package reads these variables: set them before Python starts (`NNX_GPU=1 python train.py`) or before
the first `import nnx`.
"""

import os
import sys
import types

_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off")


def _read(variable: str) -> bool | None:
    """Return whether `variable` is on or off, or None if it is unset or empty."""
    value = os.environ.get(variable, "")
    word = value.strip().lower()
    if not word:
        return None
    if word in _ON:
        return True
    if word in _OFF:
        return False
    hint = "; to pick a device, set CUDA_VISIBLE_DEVICES" if variable == "NNX_GPU" and word.isdecimal() else ""
    raise ValueError(
        f"{variable}={value!r} is neither on ({', '.join(_ON)}) nor off ({', '.join(_OFF)}) nor unset{hint}"
    )


class _Config(types.ModuleType):
    """A module that refuses an assignment which would have no effect."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("GPU", "NATIVE") and value != getattr(self, name):
            raise AttributeError(
                f"nnx.config.{name} is {getattr(self, name)} since nnx was imported and cannot become {value!r}: "
                f"start Python with NNX_{name}={'' if value is None else int(bool(value))}"
            )
        super().__setattr__(name, value)


GPU: bool = _read("NNX_GPU") is True
NATIVE: bool | None = _read("NNX_NATIVE")
sys.modules[__name__].__class__ = _Config
