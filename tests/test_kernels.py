"""The CUDA kernels without a GPU: the same .cu sources, compiled with g++ and tests/emulation/, and nvcc's
verdict on them.

Oracles: transformers' DINOv3 attention, torch.distributions, torch's mse_loss, group_norm and silu (cases in
mutate.py), the C++ ops of the CPU.
"""
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mutate
import sae

CSRC = Path(sae.__file__).resolve().parent / "csrc"
SPILL_BOUND = 40                                              # bytes a thread, of at most 255 registers of 4
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++: the kernels cannot be emulated")

# (dtype, B, H, h, w, prefix, spread): 256 x 256 pixels, one more row than fits in shared memory, 512 x 512
BF16, F16, F32 = mutate.BFLOAT16, mutate.FLOAT16, mutate.FLOAT32
float32_and_bfloat16 = pytest.mark.parametrize("type, dtype", [(F32, torch.float32), (BF16, torch.bfloat16)],
                                               ids=["float32", "bfloat16"])
REAL = [(BF16, 1, 1, 16, 16, 5, 1), (F16, 1, 1, 16, 17, 1, 2), (F32, 1, 1, 9, 11, 5, 1)]
LARGE = [(BF16, 1, 1, 32, 32, 5, 1)]
# (dtype, B, C, groups, rows, mean): two widths of the decoder
NORMS = [(BF16, 1, 1280, 32, 64, 0), (F32, 1, 256, 32, 400, 0), (F16, 1, 256, 32, 100, 0)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="session")
def binding(folder):
    return mutate.compile_binding(folder)


@pytest.fixture(scope="session")
def module(folder, binding):
    return mutate.compile_kernels(folder / "real", binding, chunk=272)


def verdict(module, shapes, folder, order):
    mutate.cases(shapes, folder / "cases.npz", NORMS)
    return mutate.verdict(module, folder / "cases.npz", "plain", order)


@pytest.mark.parametrize("order", [0, 1], ids=["ascending warps", "descending warps"])
def test_kernels_match_transformers_at_261_tokens_and_past_one_chunk_and_group_norm_of_torch(
        module, tmp_path, order):
    assert verdict(module, REAL, tmp_path, order) == ""


def test_kernels_match_transformers_at_1029_tokens(module, tmp_path):
    assert verdict(module, LARGE, tmp_path, 0) == ""


def test_every_injected_bug_is_noticed_and_the_sanitizers_pass_the_unbroken_kernels(capsys):
    with capsys.disabled():
        print()
        survivors = mutate.main()
    assert survivors == []


def load(module):
    spec = importlib.util.spec_from_file_location("emulate", module)
    emulate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulate)
    return emulate


@float32_and_bfloat16
def test_a_key_whose_score_is_minus_infinity_has_no_weight(module, type, dtype):
    torch.manual_seed(0)
    qkv, rope = torch.randn(1, 5, 3, 1, 64, dtype=dtype), sae.rope_tables(1, 1)
    qkv[:, :4, 0] = 1e20
    qkv[:, 1:, 1] *= 1e-20
    qkv[:, 0, 1] = -1e20                                      # the first key, where the maximum begins
    out, lse = torch.empty(1, 5, 64, dtype=dtype), torch.empty(1, 1, 5)
    load(module).attention_forward(type, 1, 5, 1, 4, 1, 1, *(t.data_ptr() for t in (*rope, qkv, out, lse)))
    torch.testing.assert_close(out[:, :4], sae.attention_reference(qkv, rope, 4)[:, :4])


@float32_and_bfloat16
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spread_as_in_pytorch(module, type, dtype, value):
    emulate, rope = load(module), sae.rope_tables(3, 4)
    for part in range(3):
        torch.manual_seed(0)
        qkv = torch.randn(1, 13, 3, 2, 64, dtype=dtype)
        qkv[0, 3, part, 1, 5] = value
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (sae.rotate(t, rope, 1) for t in (q, k))
        expected = (torch.softmax(q @ k.mT / 8, -1) @ v).transpose(1, 2).flatten(2)
        out, lse = torch.empty(1, 13, 128, dtype=dtype), torch.empty(1, 2, 13)
        emulate.attention_forward(type, 1, 13, 2, 1, 3, 4, *(t.data_ptr() for t in (*rope, qkv, out, lse)))
        assert torch.equal(out.isfinite(), expected.isfinite())


@pytest.mark.skipif(sae.NO_CSRC is not None, reason=f"the C++ ops are not built: {sae.NO_CSRC}")
@pytest.mark.parametrize("n, seed, offset", [(4096 + 8, 3, 0), (75, 2 ** 62 + 1, 2), (64, 9, 2 ** 36 + 4),
                                             (16, 1, 2 ** 34 - 8)])
def test_noise_of_the_cuda_kernel_equals_noise_of_the_cpu_bit_for_bit(module, n, seed, offset):
    emulate, zero, z, kl = load(module), torch.zeros(1, n), torch.empty(1, n), torch.empty(1)
    partial = torch.empty(emulate.partials(n), dtype=torch.float64)
    pointers = [t.data_ptr() for t in (zero, zero, z, kl, partial)]
    emulate.reparameterize_forward(F32, 1, n, seed, offset, *pointers)
    assert torch.equal(z, sae.reparameterize(zero, zero, seed, offset)[0])


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc: what it makes of stores is unknown")
@pytest.mark.parametrize("name, stores", [("gaussian.cu", r"Gaussian|_backward_kernel\w*Error"),
                                          ("norm.cu", r"(?:forward|backward)_kernel")])
def test_nvcc_leaves_the_stores_of_16_bytes_whole(name, stores, tmp_path):
    ptx = tmp_path / "x.ptx"
    r = subprocess.run(["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-ptx", CSRC / name, "-o", ptx],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    kernels = dict(k.split("(", 1) for k in re.split(r"\.entry ", ptx.read_text())[1:])
    fast = {n: re.findall(r"\bst\.global\S*", code) for n, code in kernels.items()
            if "Lb1E" in n and re.search(stores, n)}
    assert len(fast) >= 6
    for n, found in fast.items():                             # a block's sum is one double
        assert found and set(found) <= {"st.global.v4.b32", "st.global.f64"}, (n, found)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc: register use is unknown")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_compiles_every_kernel_with_few_register_spills(arch, tmp_path):
    for name in mutate.SOURCES:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-c", CSRC / name]
        r = subprocess.run([*command, "-o", tmp_path / "x.o"], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        assert "warning" not in r.stderr, r.stderr
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", r.stderr)]
        assert len(spills) >= 3 and max(spills) <= SPILL_BOUND, f"{name}: {spills}"
