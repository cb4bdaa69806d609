#!/usr/bin/env bash
# Check and measure nnx on this machine's CUDA device, in about eight minutes:
#
#     benchmarks/on_gpu.sh [FOLDER]    # of <device>.json, <device>.md and logs, benchmarks/results by default
#
# PYTHON (default: python, or python3) needs nnx's extra cuda12 or cuda13, test and bench. A stage that fails or
# outlasts its limit, which ends it as Ctrl-C does, does not end the run; the exit status says that there was one.
set -uo pipefail

folder=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-$(command -v python || command -v python3)}
export NNX_GPU=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"
touch "$work/stages"
failures=0

stage() { # NAME SECONDS COMMAND...: run it, note name, verdict, seconds and the last line that it printed
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
  printf '%s\t%s\t%s\t%s\n' "$name" "$verdict" $((SECONDS - begin)) "$(tail -n 1 "$folder/$name.log")" >>"$work/stages"
}

stage preflight 30 "$python" -m nnx
# what other libraries deprecate is not looked for here, and CI has compiled the kernels for all architectures
tests=("$python" -m pytest -q --tb=short --maxfail=20 -W default)
stage suite 170 "${tests[@]}" -m "not gpu and not slow" --ignore=tests/test_distributed.py
stage ranks 100 "${tests[@]}" tests/test_distributed.py
stage cuda-against-portable 100 "${tests[@]}" -m gpu -k "not compiles_for"
stage curves 45 "$python" -m benchmarks.curves
stage benchmarks 145 "$python" -m pytest benchmarks -q --benchmark-max-time=0.1 --benchmark-columns=median,iqr,rounds \
  --benchmark-json="$work/benchmarks.json"
stage report 30 "$python" -m benchmarks.report "$work/benchmarks.json" "$work/stages" "$folder"

printf '\n== summary\n'
column -t -s $'\t' "$work/stages" 2>/dev/null || cat "$work/stages"
[ "$failures" -eq 0 ]
