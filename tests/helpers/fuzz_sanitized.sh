#!/usr/bin/env bash
# Random calls of the CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer:
#
#   MMLITE_FUZZ_CALLS=20000 MMLITE_FUZZ_SEED=0 tests/helpers/fuzz_sanitized.sh
#
# PYTHON chooses the interpreter. The kernels are built apart, in build/sanitized.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
build=build/sanitized
cmake -S . -B "$build" -DMMLITE_SANITIZE=ON -DSKBUILD=ON -DSKBUILD_STATE=wheel > "$build.log" 2>&1 ||
  { cat "$build.log"; exit 1; }
cmake --build "$build"
export MMLITE_CPU_LIBRARY=$PWD/$build/libmmlite_cpu.so
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0  # Python's own
"$python" -m pytest --timeout 0 tests/ops/test_fuzz.py "$@"
