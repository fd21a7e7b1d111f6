#!/usr/bin/env bash
# All that a GPU is needed for, in one command and within 10 minutes (about 8): builds csrc, runs the tests of the ops and kernels on it, the
# same under compute-sanitizer (memcheck, racecheck), and the benchmarks. Writes everything to FILE; exit status 1 if any step failed.
#
#   tests/gpu.sh [FILE]         default gpu-results.txt; PYTHON=.venv/bin/python chooses the interpreter
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SAE_TEST_CUDA=1 PATH=$PATH:/usr/local/cuda/bin
python=${PYTHON:-python3}
results=${1:-gpu-results.txt}
failed=()
: > "$results"

step() {                        # step NAME SECONDS COMMAND...: a step that fails or runs too long does not stop the next ones
    local name=$1 limit=$2 start=$SECONDS left=$((590 - SECONDS)) status=124
    shift 2
    echo "== $name" | tee -a "$results"
    if ((left > 0)); then
        timeout $((limit < left ? limit : left)) "$@" 2>&1 | tee -a "$results"
        status=${PIPESTATUS[0]}
    fi
    echo "-- $name: exit status $status, $((SECONDS - start)) s" | tee -a "$results"
    [[ $status == 0 ]] || failed+=("$name")
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no GPU" | tee -a "$results"
    exit 1
fi
step device 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
step build 60 "$python" setup.py -q build_ext --inplace
step "the extension has CUDA" 20 "$python" -c 'import sae, sys, torch; sys.exit(sae.NO_CSRC or not torch.ops.sae.has_cuda())'
step tests 90 "$python" -m pytest -q -rs tests/test_ops.py -k "cuda or gpu or current_stream or 2_31"
# The sanitizer makes kernels tens of times slower: small shapes, every kernel and every dtype.
small='test_attention_errs and cuda and (3-5-1 or 1-1-0 or 17-17-5) or test_reparameterize and cuda and (shape0 or shape1) or test_feature_mse and cuda'
small+=' or test_group_norm_silu and cuda and not (shape1 or shape5 or shape6)'
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        # Our kernels alone; without torch's cache of memory, in whose large blocks memcheck would not see an overrun.
        step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kns=sae \
            "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "$small"
    done
else
    echo "gpu.sh: no compute-sanitizer on PATH: memcheck and racecheck are not run" | tee -a "$results"
    failed+=("compute-sanitizer")
fi
step "benchmark: attention" 120 "$python" tests/bench_ops.py attention --device cuda --compile --rounds 21
step "benchmark: gaussian, mse, norm" 150 "$python" tests/bench_ops.py gaussian mse norm --device cuda --compile --rounds 21
step "benchmark: encoder" 90 "$python" tests/bench_ops.py encoder --device cuda --rounds 5

echo "== ${#failed[@]} steps failed${failed[*]:+: ${failed[*]}}" | tee -a "$results"
[[ ${#failed[@]} == 0 ]]
