#!/usr/bin/env bash
# All that a GPU is needed for, in three parts, each one command and within 10 minutes:
#
#   tests/gpu.sh correctness FOLDER         builds csrc; the tests of the ops, both sanitizers, and all that
#                                           torch.compile makes for the timings: 4 minutes
#   tests/gpu.sh timings FOLDER [STEP ...]  all of them, or some of ops ncu step parts
#   tests/gpu.sh photos FOLDER              the miniature's ablation on the photos that SAE_TEST_DATA names
#
# A part writes FOLDER/PART.txt, photos also photos.tar.gz with its rows, table, figure and picture. A step
# that fails or takes too long does not stop the others; exit status 1 if there was one.
#
#   PYTHON=.venv/bin/python     the interpreter, with the extra `test`
#   LIMIT=300                   seconds for the whole part instead of 590
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export SAE_TEST_CUDA=1 PYTHONUNBUFFERED=1 TQDM_MININTERVAL=60
PATH=$PATH:/usr/local/cuda/bin:$(printf '%s:' /opt/nvidia/nsight-compute/*)
python=${PYTHON:-python3}
part=${1:-} chosen=" ${*:3} "
all="ops ncu step parts"
[[ " correctness timings photos " == *" $part "* && -n ${2:-} ]] || { sed -n '2,14s/^# \?//p' "$0"; exit 2; }
for word in $chosen; do
    [[ " $all " == *" $word "* ]] || { echo "gpu.sh: no step $word: choose of $all"; exit 2; }
done
mkdir -p "$2"
folder=$(realpath "$2") results=$(realpath "$2")/$part.txt
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
: > "$results"
# The files of the step, 8 GB, and what torch.compile makes come from the part correctness and stay for the
# part timings.
files=${TMPDIR:-/tmp}/sae-step
[[ $(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9) -lt 20 ]] || files=/dev/shm/sae-step

# run NAME SECONDS COMMAND...: at its limit it is interrupted, since pytest and the benchmarks then still
# print what they have; env, because what bash starts with & would ignore interrupts.
run() {
    local name=$1 limit=$2 start=$SECONDS left=$((${LIMIT:-590} - SECONDS)) status=124
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
step() { [[ $chosen != "  " && $chosen != *" $1 "* ]] || run "$@"; }
ops() { step "$1" "$2" "$python" tests/bench/bench_ops.py "${@:3}" --device cuda --compile; }
train() {
    step "$1" "$2" "$python" tests/bench/bench_train.py --setting H+ --keep "$files" --rounds 1 "${@:3}"
}

if ! arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'); then
    echo "gpu.sh: torch sees no GPU" | tee -a "$results"
    exit 1
fi
export TORCH_CUDA_ARCH_LIST=$arch
usable='import sae, sys, torch; sys.exit(sae.NO_CSRC or not torch.ops.sae.has_cuda())'
"$python" -c "$usable" || run build 90 "$python" setup.py -q build_ext --inplace
run has-cuda 60 "$python" -c "$usable"
[[ ! -e $logs/failed ]] || exit 1               # without the kernels there is nothing to test or time
run device 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv

tests() { run "$1" 150 "$python" -m pytest -q -rs -p no:cacheprovider tests/test_ops.py -k "$2"; }
sanitize() {  # TOOL attention|itself|rest
    # A sanitizer makes kernels tens of times slower: small shapes, every kernel and every dtype.
    local attention='test_attention_errs and cuda and (3-5-1 or 1-1-0 or 17-17-5)'
    local rest='test_reparameterize and cuda and (shape0 or shape1) or test_feature_mse and cuda'
    rest+=' or test_group_norm_silu and cuda and not (shape1 or shape5 or shape6)'
    # Under racecheck the process died at the first test of bf16 attention ("Internal Sanitizer Error"),
    # perhaps at its oracle's product: there attention is held against itself.
    local itself='cuda and (test_attention_of_views or same_bits)'
    # Our kernels alone; without torch's cache of memory, in whose large blocks memcheck would not see an
    # overrun; torch may try CUDA calls that fail, and handles it.
    run "$1-$2" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-name kns=sae --report-api-errors no \
        "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py -k "${!2}"
}
correctness() {
    # Nothing is timed here, so all of it runs at once. An illegal access fails all later tests of its
    # process, so the attention and the norm have processes of their own. The tensors of 2^31 elements and
    # the step take most of the memory, one after the other.
    local on_gpu='(cuda or gpu or current_stream)'
    tests tests-attention "$on_gpu and attention" &
    tests tests-norm "$on_gpu and group_norm and not attention" &
    tests tests-rest "$on_gpu and not attention and not group_norm" &
    sanitize memcheck attention &
    sanitize memcheck rest &
    sanitize racecheck itself &
    sanitize racecheck rest &
    ops compile-ops 200 attention gaussian mse norm --rounds 1 &
    {
        tests tests-large 2_31 &
        train files 150 files
        wait
        train compile-step 300 files --compile --peers compiled
    } &
    wait
}

timings() {
    local attention='import torch, sae
qkv = torch.randn(16, 261, 3, 20, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
sae.attention(qkv, sae.rope_tables(16, 16, device="cuda"), 5).sum().backward()
torch.cuda.synchronize()'
    ops ops 150 ceilings attention gaussian mse norm --rounds 11
    step ncu 40 ncu --clock-control none --set detailed --launch-count 3 \
        --kernel-name 'regex:^(forward|backward_q|backward_kv)_kernel' "$python" -c "$attention"
    train step 300 step --steps 40 --compile --peers bf16 compiled
    train parts 75 parts kernels --rounds 5
}

photos() {
    local data=${SAE_TEST_DATA:?names no folder of photos and weights} out=$logs/photos
    local weights=$data/weights inception=()
    [[ ! -e $weights/inception-fid ]] || inception=(--inception "$weights"/inception-fid/*768.safetensors)
    # No row fills a GPU: four at a time.
    run photos 580 "$python" tests/miniature.py --rows Freeze E2E "reg 100" "reg 200" "reg 500" --jobs 4 \
        --out "$out" --data "$data/data/caltech24/images" --size 128 --batch 64 --steps 300 1000 \
        --encoder "$weights/dinov3-ti-from-deit/model.safetensors" --widths 256 192 96 48 24 --gan 1 \
        --lpips-net squeeze "${inception[@]}" \
        --lpips-weights "$weights/squeezenet1_1-lpips/squeezenet1_1_features.safetensors"
    (cd "$out" && tar -czf "$folder/photos.tar.gz" rows ./*.md ./*.png)
}

"$part"
failed=$(tr '\n' ' ' 2> /dev/null < "$logs/failed")
echo "== failed: ${failed:-none}" | tee -a "$results"
[[ -z $failed ]]
