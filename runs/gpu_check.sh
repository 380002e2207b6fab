#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: `bash runs/gpu_check.sh [arguments for pytest]`
# First every test marked `cuda`, then the table of tools/bench_model.py. Exit code 0: all tests passed. Nothing is installed and no
# network is used: the Python that has torch is enough, 3.10 or later with torch 2.11 or later.
#   NANOCHAT_PYTHON             the Python to use; otherwise the first of .venv/bin/python, python3, python whose torch sees a GPU
#   NANOCHAT_WHEELS             a folder of wheels (.whl by default): a pure Python package that is missing is read from there as it lies
#   NANOCHAT_GPU_CHECK_DEVICE   cpu: run without a GPU, tests against the CPU itself and a quick table, to see that this script works
#   NANOCHAT_GPU_CHECK_QUICK    1: a quick table on the GPU too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

device="${NANOCHAT_GPU_CHECK_DEVICE:-cuda}"
wheels="${NANOCHAT_WHEELS:-.whl}"
probe='
import sys, torch
version = tuple(map(int, torch.__version__.split(".")[:2]))
sys.exit(not (sys.version_info >= (3, 10) and version >= (2, 11) and (sys.argv[1] == "cpu" or torch.cuda.is_available())))'
PYTHON=""
for candidate in "${NANOCHAT_PYTHON:-}" .venv/bin/python python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c "$probe" "$device" >/dev/null 2>&1; then PYTHON="$candidate"; break; fi
done
[ -n "$PYTHON" ] || die "no GPU here: none of .venv/bin/python, python3 and python is a Python 3.10 with torch 2.11 or later that sees a CUDA device" \
    "(NANOCHAT_PYTHON names another one)"

# Modules that the package and these tests import. What is missing is taken from the wheels, which Python reads without unpacking.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" NANOCHAT_GPU_CHECK_DEVICE="$device" PYTHONDONTWRITEBYTECODE=1
lacks() { ! "$PYTHON" -c "import $1" >/dev/null 2>&1; }
missing=""
for module in numpy pyarrow tiktoken safetensors tqdm fastcore pytest sortedcontainers hypothesis; do
    lacks "$module" || continue
    wheel="$(ls "$wheels/$module"-*-none-any.whl 2>/dev/null | tail -n 1 || true)"
    if [ -n "$wheel" ]; then PYTHONPATH="$PYTHONPATH:$(realpath "$wheel")"; fi
    if lacks "$module"; then missing="$missing $module"; fi
done
[ -z "$missing" ] || die "$PYTHON lacks$missing: install it, or put its wheel into $wheels/ (elsewhere: pip download --no-deps -d $wheels$missing)"

mapfile -t files < <(grep -lE 'mark\.cuda|^gpu = ' tests/test_*.py)
"$PYTHON" - "$device" <<'PY'
import sys, torch
from nanochat.kernels import kernels
from nanochat.precision import capable
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {torch.cuda.get_device_name() if sys.argv[1] != 'cpu' else 'CPU'}; precisions {', '.join(capable(sys.argv[1]))}")
for name, why in kernels(sys.argv[1], torch.bfloat16).items(): print(f"  {name:10} {why or 'here'}")
PY
code=0
# -o addopts=: the notebooks' plugin need not be here. -rs and the summaries: each reason for a skip once
"$PYTHON" -m pytest -q -o addopts= -p no:cacheprovider --tb=short -rfEs -m cuda "${files[@]}" "$@" || code=$?
[ "$code" = 0 ] || say "gpu_check: the tests FAILED with exit code $code; the table follows"
quick=""
if [ "$device" = cpu ] || [ "${NANOCHAT_GPU_CHECK_QUICK:-}" = 1 ]; then quick=--quick; fi
"$PYTHON" tools/bench_model.py --device "$device" $quick || code=$?
exit "$code"
