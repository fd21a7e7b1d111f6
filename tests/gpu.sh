#!/usr/bin/env bash
# All that a GPU is needed for, in one command and within 10 minutes: builds csrc, runs the tests of the ops and kernels on it, the benchmarks,
# and the tests under compute-sanitizer (memcheck, racecheck). Writes everything to FILE; exit status 1 if any step failed.
#
#   tests/gpu.sh [FILE [STEP ...]]      default gpu-results.txt and all steps: tests attention gaussian encoder memcheck racecheck
#   PYTHON=.venv/bin/python tests/gpu.sh                                  chooses the interpreter
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SAE_TEST_CUDA=1 PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin
python=${PYTHON:-python3}
results=${1:-gpu-results.txt}
all="tests attention gaussian encoder memcheck racecheck" steps=" ${*:2} "
[[ $steps == "  " ]] && steps=" $all "
for word in $steps; do
    [[ " $all " == *" $word "* ]] || { echo "gpu.sh: no step $word: choose of $all"; exit 2; }
done
failed=()
: > "$results"

step() {                        # step NAME SECONDS COMMAND...: a step that fails or runs too long does not stop the next ones
    local name=$1 limit=$2 start=$SECONDS left=$((590 - SECONDS)) status=124
    shift 2
    echo "== $name" | tee -a "$results"
    if ((left > 0)); then       # INT: pytest and the benchmarks then still print what they have
        timeout -s INT -k 10 $((limit < left ? limit : left)) "$@" 2>&1 | tee -a "$results"
        status=${PIPESTATUS[0]}
    fi
    echo "-- $name: exit status $status, $((SECONDS - start)) s" | tee -a "$results"
    [[ $status == 0 ]] || failed+=("$name")
}
chosen() { [[ $steps == *" $1 "* ]] && step "$@"; }

sanitize() {                    # sanitize TOOL SECONDS
    # It makes kernels tens of times slower: small shapes, every kernel and every dtype.
    local small='test_attention_errs and cuda and (3-5-1 or 1-1-0 or 17-17-5) or test_reparameterize and cuda and (shape0 or shape1)'
    small+=' or test_feature_mse and cuda or test_group_norm_silu and cuda and not (shape1 or shape5 or shape6)'
    # Our kernels alone; without torch's cache of memory, in whose large blocks memcheck would not see an overrun; torch may try CUDA calls
    # that fail, and handles it.
    chosen "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kns=sae \
        --report-api-errors no "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "$small"
}

if ! arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>&1); then
    echo "gpu.sh: torch sees no GPU" | tee -a "$results"
    exit 1
fi
step device 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
step build 60 env TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py -q build_ext --inplace
step "the extension has CUDA" 20 "$python" -c 'import sae, sys, torch; sys.exit(sae.NO_CSRC or not torch.ops.sae.has_cuda())'
chosen tests 90 "$python" -m pytest -q -rs tests/test_ops.py -k "cuda or gpu or current_stream or 2_31"
chosen attention 180 "$python" tests/bench_ops.py attention --device cuda --compile --rounds 21
chosen gaussian 180 "$python" tests/bench_ops.py gaussian mse norm --device cuda --compile --rounds 21
chosen encoder 90 "$python" tests/bench_ops.py encoder --device cuda --rounds 5
sanitize memcheck 120
sanitize racecheck 120

echo "== ${#failed[@]} steps failed${failed[*]:+: ${failed[*]}}" | tee -a "$results"
[[ ${#failed[@]} == 0 ]]
