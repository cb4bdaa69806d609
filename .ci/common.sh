# Shared by run and full: read by them, not run. Everything runs in copies, which detects missing install steps and
# leaves the checkout unchanged.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 MPLBACKEND=agg
export PIP_COMPILE=0          # the first import compiles a module; most are never imported
unset PYTHONDONTWRITEBYTECODE # otherwise every process that a test starts compiles its imports again
export NNX_NATIVE=1 # otherwise a failed compilation would pass with the portable kernels

stage() { printf '\n== %s (after %d s)\n' "$*" $SECONDS; }
checkout() { mkdir -p "$1" && git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$1"); }

# CuPy without a GPU: CUPY_ON_CPU is the runner.
cupy_runner=${CUPY_ON_CPU:-$root/../shared/cupy-on-cpu/run}
cupy() {
  [ -x "$cupy_runner" ] || { echo "no such runner, $cupy_runner: NOT run on CuPy: $*"; return; }
  local packages="tqdm matplotlib scikit-learn safetensors mpi4py mpich threadpoolctl pytest-benchmark pytest-xdist onnx onnxruntime pandas"
  env -u NNX_NATIVE CUPY_ON_CPU_PIP="$packages" "$cupy_runner" "$@" # native.c is not compiled for its Python
}
