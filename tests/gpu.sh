#!/usr/bin/env bash
# All that a GPU is needed for, in one command and within 10 minutes: builds csrc, runs the tests of the ops
# on the GPU, the same under compute-sanitizer (memcheck, racecheck), then the benchmarks. Writes everything
# to FILE; exit status 1 if any step failed.
#
#   tests/gpu.sh [FILE [STEP ...]]      default gpu-results.txt and all steps:
#                                       correctness attention ops encoder compiled
#   PYTHON=.venv/bin/python tests/gpu.sh                                  chooses the interpreter
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SAE_TEST_CUDA=1 PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin
python=${PYTHON:-python3}
results=$(realpath "${1:-gpu-results.txt}")
all="correctness attention ops encoder compiled"
steps=" ${*:2} "
[[ $steps == "  " ]] && steps=" $all "
for word in $steps; do
    [[ " $all " == *" $word "* ]] || { echo "gpu.sh: no step $word: choose of $all"; exit 2; }
done
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
: > "$results"

# run NAME SECONDS COMMAND...: one that fails or takes too long does not stop the others. It is interrupted,
# since pytest and the benchmarks then still print what they have; env, because what bash starts with & would
# ignore interrupts.
run() {
    local name=$1 limit=$2 start=$SECONDS left=$((590 - SECONDS)) status=124
    shift 2
    if ((left > 0)); then
        limit=$((limit < left ? limit : left))
        timeout -s INT -k 10 "$limit" env --default-signal=INT "$@" > "$logs/$name" 2>&1
        status=$?
    fi
    [[ $status == 0 ]] || echo "$name" >> "$logs/failed"
    {
        flock 9
        echo "== $name: exit status $status, $((SECONDS - start)) s"
        cat "$logs/$name" 2> /dev/null
    } 9> "$logs/lock" | tee -a "$results"
}
chosen() { [[ $steps == *" $1 "* ]]; }
tests() { run "$1" 150 "$python" -m pytest -q -rs -p no:cacheprovider tests/test_ops.py -k "$2"; }
bench() { run "$1" "$2" "$python" tests/bench/bench_ops.py "${@:3}" --device cuda; }

sanitize() {
    # A sanitizer makes kernels tens of times slower: small shapes, every kernel and every dtype.
    local small='test_attention_errs and cuda and (3-5-1 or 1-1-0 or 17-17-5)'
    small+=' or test_reparameterize and cuda and (shape0 or shape1) or test_feature_mse and cuda'
    small+=' or test_group_norm_silu and cuda and not (shape1 or shape5 or shape6)'
    # Our kernels alone; without torch's cache of memory, in whose large blocks memcheck would not see an
    # overrun; torch may try CUDA calls that fail, and handles it.
    run "$1" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-name kns=sae --report-api-errors no \
        "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "$small"
}

if ! arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>&1); then
    echo "gpu.sh: torch sees no GPU" | tee -a "$results"
    exit 1
fi
run device 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
run build 90 env TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py -q build_ext --inplace
run has-cuda 20 "$python" -c 'import sae, sys, torch; sys.exit(sae.NO_CSRC or not torch.ops.sae.has_cuda())'

# Nothing is timed here, so all of it runs at once. An illegal access fails all later tests of its process, so
# the attention and the norm have processes of their own.
if chosen correctness; then
    on_gpu='(cuda or gpu or current_stream or 2_31)'
    tests tests-attention "$on_gpu and attention" &
    tests tests-norm "$on_gpu and group_norm and not attention" &
    tests tests-rest "$on_gpu and not attention and not group_norm" &
    sanitize memcheck &
    sanitize racecheck &
    wait
fi

# The most valuable first; what has to be compiled takes minutes and comes last.
chosen attention && bench attention 60 attention --rounds 11
chosen ops && bench ops 60 gaussian mse norm --rounds 11
chosen encoder && bench encoder 60 encoder --rounds 5
chosen compiled && bench compiled 200 attention gaussian mse norm --compile --rounds 11

failed=$(tr '\n' ' ' 2> /dev/null < "$logs/failed")
echo "== failed: ${failed:-none}" | tee -a "$results"
[[ -z $failed ]]
