"""Configuration from environment variables, read once at import.

`GPU` is True if `NNX_GPU` selects CuPy. `NATIVE` selects the CPU kernels written in C and is ignored on the GPU: None
if `NNX_NATIVE` is unset (use them if they can be imported), False if it is off (do not use them), True if it is on
(raise if they cannot be imported).

No other module reads these variables: set them before Python starts (`NNX_GPU=1 python train.py`) or before the first
`import nnx`.
"""

import os
import sys
import types

_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off")


def _read(variable: str) -> bool | None:
    """Parse `variable` as a boolean; return None if it is unset or empty."""
    value = os.environ.get(variable, "")
    word = value.strip().lower()
    if not word:
        return None
    if word in _ON:
        return True
    if word in _OFF:
        return False
    hint = "; to select a device, set CUDA_VISIBLE_DEVICES" if variable == "NNX_GPU" and word.isdecimal() else ""
    raise ValueError(f"{variable} must be on ({', '.join(_ON)}), off ({', '.join(_OFF)}) or unset, got {value!r}{hint}")


class _Config(types.ModuleType):
    """Module type that rejects assignments which would have no effect."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("GPU", "NATIVE") and value != getattr(self, name):
            raise AttributeError(
                f"nnx.config.{name} was set to {getattr(self, name)} at import and cannot be changed to {value!r}: "
                f"start Python with NNX_{name}={'' if value is None else int(bool(value))}"
            )
        super().__setattr__(name, value)


GPU: bool = _read("NNX_GPU") is True
NATIVE: bool | None = _read("NNX_NATIVE")
sys.modules[__name__].__class__ = _Config
