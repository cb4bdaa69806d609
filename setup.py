"""The part of the build that pyproject.toml cannot express: the extension module `nnx.kernels.native`.

The extension is optional: if it cannot be compiled, the installation succeeds and nnx uses the portable kernels.
"""

import os
import shlex
import tempfile
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# For GCC and Clang, whose attributes and builtins native.c uses; MSVC has neither. nnx reads neither errno nor the
# floating-point exception flags. Without contraction into fused multiply-add, results do not depend on the compiler.
FLAGS = "-std=c11 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden -Wall -Wextra"

NUMPY_API = "NPY_2_0_API_VERSION"  # a build with any NumPy 2.x runs with any NumPy 2.x


class BuildExtension(build_ext):
    """Compile with flags for the compiler in use."""

    def run(self) -> None:
        """Delete the result of an earlier in-place build, which would be used if this one fails; then build."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile with FLAGS, then CFLAGS, so that the user's flags take precedence."""
        if self.compiler.compiler_type == "msvc":
            raise CompileError("native.c needs GCC or Clang; without it nnx runs on NumPy alone")
        ext.extra_compile_args = shlex.split(f"{FLAGS} {os.environ.get('CFLAGS', '')}")
        super().build_extension(ext)


with tempfile.TemporaryDirectory() as build:  # ./build could hold files of an earlier build, which would be installed
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
        options={"build": {"build_base": build}},
    )
