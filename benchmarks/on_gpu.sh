#!/usr/bin/env bash
# Test and benchmark nnx on this machine's CUDA device, in at most ten minutes:
#
#     benchmarks/on_gpu.sh [FOLDER]    # for <device>.json, <device>.md and logs; default: benchmarks/results
#
# FOLDER/peers compares nnx with PyTorch and JAX, if installed: steps of one net limited by the host and of two
# limited by the GPU, and layers at a small and a large size; FOLDER/language, a language model and word2vec.
#
# PYTHON (default: python, or python3) needs nnx's extras cuda12 or cuda13, test and bench. A stage that fails or
# exceeds its time limit (it then gets SIGINT) does not end the run, but the exit status is nonzero.
set -uo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit
fi
folder=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-$(command -v python || command -v python3)}
export NNX_GPU=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"
stages=$folder/stages.tsv # written as each stage ends, as its log is: also a run that is cut short tells something
: >"$stages"
failures=0

stage() { # NAME SECONDS COMMAND...: run it, record name, verdict, seconds and the last line of output
  local name=$1 limit=$2 begin=$SECONDS status verdict
  shift 2
  printf '\n== %s\n' "$name"
  timeout --signal=INT --kill-after=9 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="FAILED: not done in $limit s" ;;
    *) verdict="FAILED: status $status" ;;
  esac
  [ "$status" -eq 0 ] || failures=$((failures + 1))
  printf '%s\t%s\t%s\t%s\n' "$name" "$verdict" $((SECONDS - begin)) "$(tail -n 1 "$folder/$name.log")" >>"$stages"
}

# The most telling stages come first; their limits add up to 540 s. Deprecation warnings are not errors here, and CI
# has compiled the kernels for all architectures.
tests=("$python" -m pytest -q --tb=short --maxfail=20 -W default)
stage preflight 20 "$python" -m nnx
stage native 20 "$python" setup.py -q build_ext --inplace
stage cuda-against-portable 90 "${tests[@]}" -m gpu -k "not compiles_for"
stage suite 140 "${tests[@]}" -m "not gpu and not slow" --ignore=tests/test_distributed.py
stage curves 30 "$python" -m benchmarks.curves
beside=(floor nnx 'PyTorch eager' jax.jit)
groups=('2-10-3/30' '784-512-10/128' '1024-4096-1024/512')
only=('layers/* 32x64' 'layers/* 1024x1024' 'layers/* 1024-4096-1024')
for group in "${groups[@]}"; do only+=("${beside[@]/#/$group/}"); done
stage peers 80 "$python" -m benchmarks.compare --quick --only "${only[@]}" --out "$folder/peers"
only=()
for group in 'LSTM 10000-650/20x35' 'CBOW 10000-100/100'; do only+=("${beside[@]/#/$group/}"); done
stage language 50 "$python" -m benchmarks.compare --quick --only "${only[@]}" --out "$folder/language"
stage ranks 60 "${tests[@]}" tests/test_distributed.py
stage benchmarks 40 "$python" -m pytest benchmarks -q --benchmark-max-time=0.05 \
  --benchmark-json="$work/benchmarks.json"
stage report 10 "$python" -m benchmarks.report "$work/benchmarks.json" "$stages" "$folder"

printf '\n== summary\n'
column -t -s $'\t' "$stages" 2>/dev/null || cat "$stages"
[ "$failures" -eq 0 ]
