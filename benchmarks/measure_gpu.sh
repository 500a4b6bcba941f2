#!/usr/bin/env bash
# All that docs/kernels-gpu.md lists as not measured, on this machine's GPU, in one run:
#
#     benchmarks/measure_gpu.sh [FOLDER]
#
# The operators need PyTorch and Triton alone; encoders and detectors are left out without
# MMDetection. Nothing is downloaded. One part that fails does not stop the others.
set -u
cd "$(dirname "$0")/.."
out=${1:-gpu-$(date +%Y%m%d-%H%M)}
python=${PYTHON:-python}
mkdir -p "$out"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo 'PyTorch sees no CUDA device: nothing to measure' >&2
    exit 1
}
failed=0

part() {  # part NAME COMMAND...: what it prints goes to NAME.txt
    local name=$1
    shift
    echo "== $name: $*"
    "$@" > "$out/$name.txt" 2>&1 || {
        echo "   failed, see $out/$name.txt"
        failed=1
    }
}

bench() {  # bench NAME ARGUMENTS...: and its numbers to NAME.json
    part "$1" "$python" -m mmlite.cli benchmark "${@:2}" --device cuda --json "$out/$1.json"
}

part environment "$python" -m mmlite.cli env
"$python" -c 'import pytest' 2> /dev/null && part tests "$python" -m pytest -q tests/ops/test_triton.py
for dtype in float32 float16 bfloat16; do
    for batch in 1 2 8; do
        bench "ops-$dtype-$batch" ops --dtype "$dtype" --batch-size "$batch"
    done
    bench "ops-$dtype-scattered" ops --dtype "$dtype" --locations uniform
    bench "ops-$dtype-high-level" ops --dtype "$dtype" --queries 5523
    bench "ops-$dtype-decoder" ops --dtype "$dtype" --queries 900
done
if "$python" -c 'import mmdet' 2> /dev/null; then
    bench encoder-float32 encoder --train
    bench encoder-bfloat16 encoder --train --dtype bfloat16
    bench encoder-modes encoder --mode eager --mode compiled
fi
echo "results are in $out"
exit $failed
