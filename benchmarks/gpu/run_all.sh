#!/usr/bin/env bash
# Everything that a GPU is needed for: build, tests, compute-sanitizer, benchmarks, one table last, JSON in $OUT.
#
#   benchmarks/gpu/run_all.sh                          all, in at most 25 minutes
#   benchmarks/gpu/run_all.sh tests sanitizer          some parts, where a command must be shorter
#   benchmarks/gpu/run_all.sh --rehearse [PART…]       on a CPU with the fastris that is installed: does it all run?
#
# Wants torch with CUDA, triton, numpy, scipy, pytest, pytest-timeout and hypothesis, and nvcc; no package registry.
# PYTHON says which Python, OUT where the results go, PART_SECONDS how long a part may take. A part that fails or takes
# too long does not stop the others. Exit code 1: something failed, or an answer was wrong.
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results/gpu}
part_seconds=${PART_SECONDS:-570}
all_seconds=1500
options=()
if [ "${1:-}" = --rehearse ]; then
  options=(--device cpu --tiny)
  shift
fi
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer gates convlstm soft_iou assignment step)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 1
failed=0

# Of the tree, __init__.py and all, only what is installed is imported: the tree has no compiled part.
export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}

if [ ${#options[@]} -eq 0 ]; then
  echo "== build"
  if FASTRIS_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --no-warn-script-location \
    --target "$work/site" . >"$work/build.log" 2>&1; then
    export PYTHONPATH=$work/site:$PYTHONPATH
  else
    tail -n 30 "$work/build.log"
    exit 1
  fi
  "$python" -m fastris info
fi

for part in "${parts[@]}"; do
  left=$((all_seconds - SECONDS))
  limit=$((left < part_seconds ? left : part_seconds))
  if [ "$limit" -le 10 ]; then
    echo "== $part: no time left"
    failed=1
    continue
  fi
  echo "== $part ($SECONDS s so far)"
  rm -f "$out/$part.json"
  timeout --kill-after=20 "$limit" "$python" -m gpu.measure "$part" --out "$out" ${options[@]+"${options[@]}"}
  code=$?
  if [ $code -ne 0 ]; then
    echo "== $part: exit code $code"
    failed=1
  fi
done

"$python" -m gpu.table "$out" "${parts[@]}" || failed=1
exit $failed
