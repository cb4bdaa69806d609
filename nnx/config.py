"""What the environment chose: `GPU` is True where `NNX_GPU` asks for CuPy.

Nothing else in the package reads `NNX_GPU`, and it is read once, at import: set it before Python
starts (`NNX_GPU=1 python train.py`) or before the first `import nnx`.
"""

import os
import sys
import types

_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")


def _read(value: str) -> bool:
    word = value.strip().lower()
    if word in _ON:
        return True
    if word in _OFF:
        return False
    hint = "; to pick a device, set CUDA_VISIBLE_DEVICES" if word.isdecimal() else ""
    raise ValueError(f"NNX_GPU={value!r} is neither on ({', '.join(_ON)}) nor off (unset, {', '.join(_OFF[1:])}){hint}")


class _Config(types.ModuleType):
    """A module that does not let the choice be changed where the change would have no effect."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "GPU" and value != self.GPU:
            raise AttributeError(
                f"nnx.config.GPU is {self.GPU} since nnx was imported and cannot become {value!r}: "
                f"start Python with NNX_GPU={int(bool(value))}"
            )
        super().__setattr__(name, value)


GPU: bool = _read(os.environ.get("NNX_GPU", ""))
sys.modules[__name__].__class__ = _Config
