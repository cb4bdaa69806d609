"""The part of the build that pyproject.toml cannot say: the extension `nnx.kernels.native`.

It is optional. Where it cannot be compiled, the installation succeeds and nnx runs on its portable kernels.
"""

import os
import shlex
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# GCC and Clang. Neither option on floating point changes a result; multiplications and additions are not fused, so that
# results do not depend on the compiler's choice. MSVC is left at its defaults.
FLAGS = "-std=c11 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden -Wall -Wextra"

NUMPY_API = "NPY_2_0_API_VERSION"  # what is built against any NumPy 2 runs with any NumPy 2


class BuildExtension(build_ext):
    """Compiles with FLAGS where the compiler knows them, and always anew."""

    def run(self) -> None:
        """Build, and copy into the source tree if that is asked for."""
        self._delete(self.extensions)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile with FLAGS and then CFLAGS, so that what the user sets wins."""
        self._delete([ext])
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args = shlex.split(f"{FLAGS} {os.environ.get('CFLAGS', '')}")
        super().build_extension(ext)

    def _delete(self, extensions: list[Extension]) -> None:
        """Delete an earlier build's result, in the source tree or, below run(), in the build folder.

        If this build fails, it would be installed.
        """
        for extension in extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)


setup(
    ext_modules=[
        Extension(
            "nnx.kernels.native",
            ["nnx/kernels/native.c"],
            depends=glob("nnx/kernels/*.h"),
            include_dirs=[numpy.get_include()],
            define_macros=[("NPY_NO_DEPRECATED_API", NUMPY_API), ("NPY_TARGET_VERSION", NUMPY_API)],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
