"""The ops of sae.py: the reference, the C++ ops and, where there is a GPU, the CUDA ops, by the same oracles.

Oracles: transformers' DINOv3 attention and RoPE, torch's own Philox engine (its C++ header),
torch.distributions, mse_loss, group_norm and silu, autograd in float64, SciPy's Kolmogorov-Smirnov test.
Error rule: against float64, at most twice (gradients three times) the error of PyTorch's own computation in
the same dtype.
"""
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit import modeling_dinov3_vit as oracle

import sae

ROOT = Path(sae.__file__).resolve().parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: tests/gpu.sh shows it")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
built = pytest.mark.skipif(sae.NO_CSRC is not None, reason=f"csrc is not in use: {sae.NO_CSRC}")
device = pytest.mark.parametrize("device", DEVICES)
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def relative(x, y):
    """|x - y| / |y|"""
    return ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-300)).item()


def half_ulp(dtype):
    return torch.finfo(dtype).eps / 2


# ------------------------------------------------------------------ attention

def packed(B, N, H, d=64, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, 3, H, d, generator=g).to(device, dtype)


def transformers_attention(qkv, rope, prefix):
    rows, cols = rope
    h, w = len(rows), len(cols)
    table = torch.cat([rows[:, None].expand(h, w, -1, 2), cols[None].expand(h, w, -1, 2)], 2)
    cos, sin = table.flatten(0, 1).repeat(1, 2, 1).to(qkv.dtype).unbind(-1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = oracle.apply_rotary_pos_emb(q, k, cos, sin)
    module, scaling = torch.nn.Module().eval(), qkv.shape[-1] ** -0.5
    return oracle.eager_attention_forward(module, q, k, v, None, scaling=scaling)[0].flatten(2)


def with_gradient(f, qkv, dtype, dout):
    x = qkv.detach().to(dtype).requires_grad_()
    out = f(x)
    out.backward(dout.to(dtype))
    return out.detach(), x.grad


@pytest.mark.parametrize("h, w", [(16, 16), (3, 7)])
def test_rope_tables_equal_transformers(h, w):
    rows, cols = sae.rope_tables(h, w)
    config = DINOv3ViTConfig(hidden_size=384, num_attention_heads=6)
    rope = oracle.DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = rope(torch.empty(1, 3, 16 * h, 16 * w))
    for table, part in ((cos, 0), (sin, 1)):
        of_rows, of_cols = rows[:, None, :, part].expand(h, w, 16), cols[None, :, :, part].expand(h, w, 16)
        ours = torch.cat([of_rows, of_cols], -1).flatten(0, 1).repeat(1, 2)
        # The angles reach 2 pi, where fp32 ends at 5e-7.
        torch.testing.assert_close(ours, table, rtol=0, atol=3e-6)


@device
@dtype
@pytest.mark.parametrize("B, H, h, w, prefix", [(2, 3, 16, 16, 5), (1, 2, 3, 5, 1), (3, 1, 1, 1, 0),
                                                (1, 1, 4, 4, 0), (1, 2, 17, 17, 5), (1, 1, 32, 32, 5)])
def test_attention_errs_at_most_twice_and_its_gradient_three_times_as_much_as_pytorch(
        device, dtype, B, H, h, w, prefix):
    qkv, rope = packed(B, prefix + h * w, H, dtype=dtype, device=device), sae.rope_tables(h, w, device=device)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(B, prefix + h * w, H * 64, generator=g).to(device, dtype)
    expected = with_gradient(lambda x: transformers_attention(x, rope, prefix), qkv, torch.float64, dout)
    pytorch = with_gradient(lambda x: transformers_attention(x, rope, prefix), qkv, dtype, dout)
    for f in (sae.attention, sae.attention_reference):
        # CUDA's other backends put fp32 together from three TF32 products: its error is not fp32's.
        with sdpa_kernel(SDPBackend.MATH) if device == "cuda" else nullcontext():
            ours = with_gradient(lambda x: f(x, rope, prefix), qkv, dtype, dout)
        # The result's own rounding; and at N 1, where PyTorch's dQ and dK are exactly 0, dP - delta is the
        # difference of two sums of the same 64 products in fp32: rounding errors of both, about sqrt(64) / 2
        # half ulps of one product, on the dO that dV is.
        for x, p, e, factor, floor in zip(ours, pytorch, expected, (2, 3), (0, 3)):
            assert x.dtype == dtype and x.shape == e.shape
            rounding = half_ulp(dtype) + floor * half_ulp(torch.float32)
            assert relative(x, e) <= factor * relative(p, e) + rounding
    for j in range(3):                                        # dQ, dK and dV, each by itself
        if expected[1][:, :, j].norm() > 1e-9:                # at N 1 only V has a gradient
            x, p, e = (result[1][:, :, j] for result in (ours, pytorch, expected))
            assert relative(x, e) <= 3 * relative(p, e) + half_ulp(dtype)


@pytest.mark.parametrize("d", [64, 128])
def test_attention_passes_gradcheck_in_float64_and_serves_other_head_widths(d):
    qkv, rope = packed(1, 5, 2, d, torch.float64).requires_grad_(), sae.rope_tables(2, 2, d)
    assert torch.autograd.gradcheck(lambda x: sae.attention(x, rope, 1), qkv, fast_mode=True)
    torch.testing.assert_close(sae.attention(qkv, rope, 1), transformers_attention(qkv, rope, 1))


@built
@device
def test_attention_of_views_equals_attention_of_copies(device):
    rope = sae.rope_tables(3, 4, device=device)
    flat = packed(2, 12, 3, dtype=torch.bfloat16, device=device).flatten()
    storage = torch.cat([flat[:1], flat])           # the view starts 2 bytes after an aligned address
    misaligned = storage[1:].view(2, 12, 3, 3, 64)
    dense = packed(2, 12, 3, dtype=torch.bfloat16, device=device)
    transposed = dense.transpose(0, 1).contiguous().transpose(0, 1)
    expected = sae.attention(dense, rope, 0)
    assert torch.equal(sae.attention(misaligned, rope, 0), expected)
    assert torch.equal(sae.attention(transposed, rope, 0), expected)
    x = transposed.clone(memory_format=torch.preserve_format).requires_grad_()
    y = packed(2, 12, 3, dtype=torch.bfloat16, device=device).requires_grad_()
    dout = torch.randn(12, 2, 192, device=device).bfloat16().transpose(0, 1)
    sae.attention(x, rope, 0).backward(dout)
    sae.attention(y, rope, 0).backward(dout.contiguous())
    assert torch.equal(x.grad, y.grad)


@device
@dtype
def test_an_empty_batch_gives_an_empty_output(device, dtype):
    x = torch.empty(0, 9, 3, 2, 64, dtype=dtype, device=device, requires_grad=True)
    out = sae.attention(x, sae.rope_tables(3, 3, device=device), 0)
    out.sum().backward()
    assert out.shape == (0, 9, 128) and x.grad.shape == x.shape
    mu = torch.empty(0, 4, dtype=dtype, device=device, requires_grad=True)
    z, kl = sae.reparameterize(mu, mu, 1)
    (z.sum() + kl.sum()).backward()
    assert z.shape == (0, 4) and kl.shape == (0,) and mu.grad.shape == mu.shape
    x = torch.empty(0, 4, 2, 3, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(4, device=device, requires_grad=True)
    y = sae.group_norm_silu(x, weight, weight, 2)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and not weight.grad.any()


@device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@built                                                        # torch's own SDPA loses a NaN of Q on the CPU
def test_nan_and_inf_spread_as_in_pytorch(device, value):
    rope = sae.rope_tables(3, 4, device=device)
    for part, dtype in itertools.product(range(3), (torch.float32, torch.bfloat16)):
        qkv = packed(2, 13, 2, dtype=dtype, device=device)
        qkv[1, 3, part, 1, 5] = value
        dout = torch.ones(2, 13, 128, dtype=dtype, device=device)
        ours, theirs = (with_gradient(lambda x: f(x, rope, 1), qkv, dtype, dout)
                        for f in (sae.attention, transformers_attention))
        assert torch.equal(ours[0].isfinite(), theirs[0].isfinite())
        assert ours[1][0].isfinite().all()              # no other image
        assert ours[1][1, :, :, 0].isfinite().all()     # no other head
    for which in range(2):
        pair = [torch.randn(3, 40, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2)]
        pair[which][1, 7] = value
        for x, y in zip(sae.reparameterize(*pair, 5), sae.reparameterize_reference(*pair, 5)):
            assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())
    a, b = torch.ones(50, device=device), torch.ones(50, device=device)
    a[49] = value
    assert not sae.feature_mse(a, b).isfinite()


@built
@device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_key_whose_score_is_minus_infinity_has_no_weight(device, dtype):
    qkv, rope = packed(1, 5, 2, dtype=dtype, device=device), sae.rope_tables(1, 1, device=device)
    qkv[:, :4, 0] = 1e20
    qkv[:, 1:, 1] *= 1e-20
    qkv[:, 0, 1] = -1e20                            # the first key, where the maximum begins
    ours, theirs = sae.attention(qkv, rope, 4), transformers_attention(qkv, rope, 4)
    assert relative(ours[:, :4], theirs[:, :4]) < 4 * half_ulp(dtype)


@built
@device
@pytest.mark.parametrize("N", [70, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_neither_the_largest_scores_nor_the_least_overflow(device, dtype, N):
    rope = sae.rope_tables(1, 2, device=device)
    large = packed(1, N, 1, device=device) * 30     # scores of some thousands
    least = packed(1, N, 1, device=device)
    least[:, :, 0] += 30
    least[:, :, 1] -= 30                            # of minus some thousands, all of them
    dout = torch.randn(1, N, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for qkv in (large.to(dtype), least.to(dtype)):
        f = lambda x: transformers_attention(x, rope, N - 2)
        exact, theirs = with_gradient(f, qkv, torch.float64, dout), with_gradient(f, qkv, dtype, dout)
        ours = with_gradient(lambda x: sae.attention(x, rope, N - 2), qkv, dtype, dout)
        q, k = qkv[0, :, 0, 0].double(), qkv[0, :, 1, 0].double()
        # The rounding of the scores, and of lse, from which backward has P, is P's error; PyTorch's own may
        # be none where one key has it all.
        lse = (q @ k.T / 8 / math.log(2)).logsumexp(1).abs().max().item()
        for x, p, e, floor in zip(ours, theirs, exact, (lse / 4, lse)):
            rounding = 4 * half_ulp(dtype) + floor * half_ulp(torch.float32)
            assert relative(x, e) <= 3 * relative(p, e) + rounding


# ------------------------------------------------------------------ Gaussian

@pytest.fixture(scope="session")
def philox_words(tmp_path_factory):
    """(seed, first block, blocks) -> words [blocks, 4] of torch's at::philox_engine."""
    folder = tmp_path_factory.mktemp("philox")
    (folder / "philox.cpp").write_text('''
#include <ATen/core/PhiloxRNGEngine.h>
#include <cstdio>
#include <cstdlib>
int main(int, char** argv) {
  at::philox_engine engine(std::strtoull(argv[1], nullptr, 10), 0, std::strtoull(argv[2], nullptr, 10));
  for (long i = 0; i < 4 * std::atol(argv[3]); ++i) std::printf("%u\\n", engine());
}''')
    torch_home = Path(torch.__file__).parent
    include, lib = torch_home / "include", torch_home / "lib"
    subprocess.run(["g++", "-std=c++20", "-w", f"-I{include}", folder / "philox.cpp", f"-L{lib}", "-lc10",
                    f"-Wl,-rpath,{lib}", "-o", folder / "philox"], check=True)

    def words(*arguments):
        command = [folder / "philox", *map(str, arguments)]
        r = subprocess.run(command, capture_output=True, text=True, check=True)
        return np.array(r.stdout.split(), np.uint64).reshape(-1, 4)

    return words


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++: torch's Philox engine cannot be compiled")
@device
@pytest.mark.parametrize("seed, offset", [(0, 0), (1234567890123456789, 0), (2 ** 32 - 1, 2 ** 34 - 8),
                                          (7, 2 ** 40 + 4)])
def test_noise_is_box_muller_of_the_words_of_torchs_philox_engine(device, philox_words, seed, offset):
    u = (philox_words(seed, offset // 4, 1000).astype(np.float64) + 0.5) / 2 ** 32
    radius, angle = np.sqrt(-2 * np.log(u[:, ::2])), 2 * np.pi * u[:, 1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)
    zero = torch.zeros(1, 4000, device=device)
    ulp = np.spacing(np.abs(expected).astype(np.float32))
    drawn = sae.philox_normal(4000, seed, offset, device=device)
    for eps in (drawn, sae.reparameterize(zero, zero, seed, offset)[0][0]):
        error = np.abs(eps.cpu().double().numpy() - expected) / ulp
        assert error.max() < 6


@device
def test_noise_is_standard_normal_and_seeds_are_independent(device):
    zero = torch.zeros(1, 1 << 18, device=device)
    x, y = (sae.reparameterize(zero, zero, seed)[0][0].cpu().double().numpy() for seed in (11, 12))
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    for a, b in ((x, y), (x[1:], x[:-1]), (x[2:], x[:-2]), (x[::4], x[1::4])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


@device
@pytest.mark.parametrize("cut", [1, 4, 4096, 5003])
def test_a_stream_drawn_in_pieces_equals_the_stream_drawn_at_once(device, cut):
    zero, offset = torch.zeros(1, 10000, device=device), 2 ** 33 + 1
    whole = sae.reparameterize(zero, zero, 3, offset)[0]
    first = sae.reparameterize(zero[:, :cut], zero[:, :cut], 3, offset)[0]
    rest = sae.reparameterize(zero[:, cut:], zero[:, cut:], 3, offset + cut)[0]
    assert torch.equal(torch.cat([first, rest], 1), whole)


@device
@dtype
@pytest.mark.parametrize("shape", [(3, 7), (2, 16, 9, 5), (4, 5000)])
def test_reparameterize_and_its_gradient_err_at_most_twice_and_three_times_as_much_as_pytorch(
        device, dtype, shape):
    g = torch.Generator().manual_seed(4)
    mu, logvar, dz = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(3))
    logvar.view(-1)[:3] = torch.tensor([25., -40., 10.], dtype=dtype)  # outside, outside, inside the clamp
    dkl = torch.randn(shape[0], generator=g).to(device)
    eps = sae.philox_normal(mu.numel(), 9, 2, device=device).view(shape)

    def pytorch(m, v):                                        # as autograd would do it, all in one dtype
        v = v.clamp(-30, 20)
        kl = 0.5 * (m.square() + v.exp() - 1 - v)
        return m + (v / 2).exp() * eps.to(m.dtype), kl.flatten(1).sum(1) if kl.dim() > 1 else kl

    def both(f, dtype):
        m, v = mu.to(dtype).requires_grad_(), logvar.to(dtype).requires_grad_()
        z, kl = f(m, v)
        return [z, kl, *torch.autograd.grad([z, kl], [m, v], [dz.to(dtype), dkl.to(kl.dtype)])]

    expected, own = both(pytorch, torch.float64), both(pytorch, dtype)
    normal = torch.distributions.Normal(mu.double(), (logvar.double().clamp(-30, 20) / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(expected[0]), torch.ones_like(expected[0]))
    kl = torch.distributions.kl_divergence(normal, standard)
    torch.testing.assert_close(expected[1], kl.view(shape[0], -1).sum(1))
    for f in (sae.reparameterize, sae.reparameterize_reference):
        ours = both(lambda m, v: f(m, v, 9, 2), dtype)
        assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and ours[1].shape == shape[:1]
        for x, p, e, factor, more in zip(ours, own, expected, (2, 2, 3, 3), (1, 4, 1, 1)):
            # The result's own rounding, and more of a term of it in fp32: PyTorch's own may be none, by
            # chance. Of the KL this is var = std^2, twice the ulp by which a GPU's expf may be off.
            rounding = half_ulp(x.dtype) + more * half_ulp(torch.float32)
            assert relative(x, e) <= factor * relative(p, e) + rounding
        assert (ours[3].view(-1)[:3] != 0).tolist() == [False, False, True]  # no gradient from outside


@needs_gpu
@built
def test_noise_is_the_same_on_cpu_and_gpu_bit_for_bit():
    for n, offset in ((40004, 3), (40004, 8), (40000, 8)):    # the last one takes the kernel's fast path
        zero = torch.zeros(2, n)
        there = sae.reparameterize(zero.cuda(), zero.cuda(), 5, offset)[0].cpu()
        assert torch.equal(sae.reparameterize(zero, zero, 5, offset)[0], there)


@needs_gpu
@built
def test_tensors_of_more_than_2_31_elements_are_read_to_the_end():
    n = 2 ** 31 + 64
    a, b = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a[-1] = 1024
    assert sae.feature_mse(a, b).item() == pytest.approx(1024 ** 2 / n, rel=1e-6)
    z, kl = sae.reparameterize(a.view(2, -1), b.view(2, -1), 1)
    assert kl[0].item() == 0 and kl[1].item() == 1024 ** 2 / 2
    assert torch.equal(z.view(-1)[-100:-1], sae.philox_normal(99, 1, n - 100, device="cuda").bfloat16())
    del a, b, z
    x, dy, weight, bias = norm_arguments((1, 32, 32, 32), torch.bfloat16, "cuda")
    many = torch.zeros(2 ** 16 + 1, 32, 32, 32, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    gradient = torch.zeros_like(many)
    many[-1:], gradient[-1:] = x, dy
    of_many = norm_and_gradients(sae.group_norm_silu, many, gradient, weight, bias, 16)
    of_one = norm_and_gradients(sae.group_norm_silu, x, dy, weight, bias, 16)
    for last, alone, per_sample in zip(of_many, of_one, (True, True, False, False)):
        torch.testing.assert_close(last[-1:] if per_sample else last, alone)


# ------------------------------------------------------------------ feature MSE

@device
@dtype
@pytest.mark.parametrize("shape", [(2, 9, 24), (1, 1), (3, 261, 80)])
def test_feature_mse_errs_at_most_twice_and_its_gradient_three_times_as_much_as_mse_loss(
        device, dtype, shape):
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))

    def both(f, dtype):
        s, t = student.to(dtype).requires_grad_(), teacher.to(dtype)
        loss = f(s, t)
        return loss, torch.autograd.grad(loss, s, torch.full_like(loss, 100.))[0]

    expected, own = both(F.mse_loss, torch.float64), both(F.mse_loss, dtype)
    for f in (sae.feature_mse, sae.feature_mse_reference):
        ours = both(f, dtype)
        assert ours[0].dtype == torch.float32 and ours[0].shape == () and ours[1].dtype == dtype
        for x, p, e, factor in zip(ours, own, expected, (2, 3)):
            # For one value: the roundings of the difference, of 2 / n, and of their product, which is the
            # result's own.
            rounding = half_ulp(x.dtype) + 2 * half_ulp(torch.float32)
            assert relative(x, e) <= factor * relative(p, e) + rounding


@device
def test_feature_mse_gives_the_teacher_no_gradient_and_takes_the_wider_dtype(device):
    student = torch.randn(3, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(3, 8, device=device, requires_grad=True)
    loss = sae.feature_mse(student, teacher)
    loss.backward()
    assert teacher.grad is None and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach(), F.mse_loss(student.detach().float(), teacher.detach()))


# ------------------------------------------------------------------ SiLU of group norm

def norm_arguments(shape, dtype=torch.float32, device="cpu", mean=0., seed=6):
    """x and the gradient of y in channels_last, weight, bias; all representable in dtype."""
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=g).to(device, dtype, memory_format=torch.channels_last)
             for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=g).to(device, dtype) for _ in range(2))
    return x + mean, dy, weight, bias


def pytorch_group_norm_silu(x, weight, bias, groups):
    return F.silu(torch.group_norm(x, groups, weight, bias, 1e-6))


def norm_and_gradients(f, x, dy, weight, bias, groups):
    """y and the gradients of x, weight and bias."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, weight, bias)]
    for t in inputs:
        t.requires_grad_()
    y = f(*inputs, groups)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def in_float64(*tensors):
    return [t.double() for t in tensors]


# Widths of the decoder, one that 16 lanes do not divide, groups of no power of 2, one row of pixels, many
# chunks, samples that the cache holds one by one.
NORM_SHAPES = [((2, 128, 9, 7), 32), ((1, 1280, 8, 8), 32), ((2, 24, 5, 7), 8), ((3, 30, 3, 3), 3),
               ((2, 6, 1, 50), 1), ((2, 256, 24, 31), 32), ((3, 64, 128, 128), 32)]


@device
@dtype
@pytest.mark.parametrize("shape, groups", NORM_SHAPES)
def test_group_norm_silu_errs_at_most_twice_and_its_gradients_three_times_as_much_as_pytorch(
        device, dtype, shape, groups):
    x, dy, weight, bias = norm_arguments(shape, dtype, device)
    expected = norm_and_gradients(pytorch_group_norm_silu, *in_float64(x, dy, weight, bias), groups)
    own = norm_and_gradients(pytorch_group_norm_silu, x, dy, weight, bias, groups)
    for f in (sae.group_norm_silu, sae.group_norm_silu_reference):
        for parameters in (torch.float32, dtype):
            ours = norm_and_gradients(f, x, dy, weight.to(parameters), bias.to(parameters), groups)
            assert [t.dtype for t in ours] == [dtype, dtype, parameters, parameters]
            for a, p, e, factor in zip(ours, own, expected, (2, 3, 3, 3)):
                rounding = half_ulp(a.dtype)        # the result's own
                assert relative(a, e) <= factor * relative(p, e) + rounding


@device
@dtype
@pytest.mark.parametrize("shape, groups", [((1, 1, 1, 2), 1), ((2, 4, 1, 1), 2), ((1, 17, 1, 3), 1),
                                           ((2, 2, 2, 2), 2)])
def test_group_norm_silu_of_a_few_values_is_off_by_no_more_than_rounding(device, dtype, shape, groups):
    x, dy, weight, bias = norm_arguments(shape, dtype, device)
    expected = norm_and_gradients(pytorch_group_norm_silu, *in_float64(x, dy, weight, bias), groups)
    ours = norm_and_gradients(sae.group_norm_silu, x, dy, weight.float(), bias.float(), groups)
    for a, e in zip(ours, expected):
        # A dx of a few values is a difference of terms as large as rstd |weight dy|: with these at most 10.
        rounding = half_ulp(a.dtype) * e.abs() + 32 * half_ulp(torch.float32) * 2
        assert ((a.double() - e).abs() <= rounding).all()


@device
def test_group_norm_silu_of_one_value_is_silu_of_the_bias(device):
    x, dy, weight, bias = norm_arguments((1, 5, 1, 1), device=device, mean=100.)
    y = sae.group_norm_silu(x, weight, bias, 5)
    torch.testing.assert_close(y.flatten(), F.silu(bias), rtol=1e-6, atol=1e-6)


@built
@device
@pytest.mark.parametrize("shape, groups", NORM_SHAPES)
def test_a_mean_a_thousand_times_the_deviation_costs_only_the_rounding_of_the_mean(device, shape, groups):
    x, dy, weight, bias = norm_arguments(shape, device=device, mean=1000.)
    expected = norm_and_gradients(pytorch_group_norm_silu, *in_float64(x, dy, weight, bias), groups)
    ours = norm_and_gradients(sae.group_norm_silu, x, dy, weight, bias, groups)
    # In fp32 1000 is off by up to 2^-15; the deviation is about 1 and silu' at most 1.1.
    assert ((ours[0] - expected[0]).abs() <= 1.2 * 2 ** -15 * weight.abs().view(-1, 1, 1) + 2e-6).all()
    for a, e in zip(ours[1:], expected[1:]):
        assert relative(a, e) <= 2 * 2 ** -15


@built
@device
def test_an_outlier_costs_the_others_nothing(device):
    x, dy, weight, bias = norm_arguments((1, 32, 64, 64), device=device)
    x[:, :, 0, 0] = 1e4                             # a hundred times the deviation that it gives its group
    y = sae.group_norm_silu(x, weight, bias, 32)
    expected = pytorch_group_norm_silu(*in_float64(x, weight, bias), 32)
    assert ((y - expected).abs() <= 4e-6 * (1 + expected.abs())).all()


@built
@device
@dtype
def test_group_norm_silu_of_views_equals_that_of_copies_and_is_channels_last(device, dtype):
    x, dy, weight, bias = norm_arguments((2, 24, 6, 5), dtype, device)
    expected = norm_and_gradients(sae.group_norm_silu, x, dy, weight, bias, 8)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in expected[:2])
    storage = torch.empty(x.numel() + 1, dtype=dtype, device=device)
    misaligned = storage[1:].view(2, 6, 5, 24).permute(0, 3, 1, 2).copy_(x)
    wide = torch.zeros(2, 48, 6, 5, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    wide[:, ::2] = x
    for view in (x.contiguous(), misaligned, wide[:, ::2], x.transpose(2, 3).contiguous().transpose(2, 3)):
        for dview in (dy, dy.contiguous()):
            leaf = view.detach().requires_grad_()
            y = sae.group_norm_silu(leaf, weight, bias, 8)
            assert torch.equal(y, expected[0]) and y.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(torch.autograd.grad(y, leaf, dview)[0], expected[1])


@built
@device
def test_backward_of_group_norm_silu_keeps_x_and_two_numbers_a_group(device):
    x, _, weight, bias = norm_arguments((2, 64, 16, 16), device=device)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sae.group_norm_silu(x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 32)
    assert kept.pop(x.data_ptr()) == x.nbytes
    assert sum(kept.values()) == weight.nbytes + bias.nbytes + 2 * 4 * 2 * 32


@device
def test_under_autocast_group_norm_silu_keeps_bf16_and_its_parameters_get_fp32_gradients(device):
    block = sae.ResBlock(32, 64).to(device)
    seen = []
    for norm in (block.norm1, block.norm2):
        norm.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x = torch.randn(2, 32, 8, 8, device=device).bfloat16().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = block(x)
    y.float().square().mean().backward()
    assert seen == [torch.bfloat16] * 2 and y.dtype == x.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}


def test_group_norm_silu_passes_gradcheck_in_float64():
    x, _, weight, bias = norm_arguments((2, 6, 2, 3), torch.float64)
    f = lambda x, weight, bias: sae.group_norm_silu(x, weight, bias, 3)
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, weight, bias)])


@built
@device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_nan_and_inf_spread_through_group_norm_silu_as_in_pytorch(device, value, where):
    x, dy, weight, bias = norm_arguments((2, 24, 3, 5), device=device)
    {"x": x[1, 7, 2], "weight": weight[3:], "bias": bias[3:]}[where][0] = value
    ours = norm_and_gradients(sae.group_norm_silu, x, dy, weight, bias, 8)
    own = norm_and_gradients(pytorch_group_norm_silu, *in_float64(x, dy, weight, bias), 8)
    for a, p in zip(ours, own):
        assert torch.equal(a.isfinite(), p.isfinite())


# ------------------------------------------------------------------ as PyTorch ops

def arguments(device, dtype=torch.float32):
    rope = sae.rope_tables(2, 3, device=device)
    qkv = packed(2, 7, 2, dtype=dtype, device=device).requires_grad_()
    mu, logvar = (torch.randn(2, 6, 5, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 3, 5, 6, device=device, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    return {"attention": (qkv, *rope, 1), "reparameterize": (mu, logvar, 5, 2),
            "feature_mse": (mu, logvar.detach()), "group_norm_silu": (x, weight, bias, 3, 1e-6)}


@built
@device
@pytest.mark.parametrize("op", ["attention", "reparameterize", "feature_mse", "group_norm_silu"])
def test_opcheck_accepts_the_op(device, op):
    torch.library.opcheck(getattr(torch.ops.sae, op).default, arguments(device)[op])


@built
@device
@pytest.mark.parametrize("op", ["attention", "reparameterize", "feature_mse", "group_norm_silu"])
def test_a_gradient_of_a_gradient_is_refused_in_one_sentence(device, op):
    inputs = arguments(device)[op]
    out = getattr(torch.ops.sae, op)(*inputs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    gradient, = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} of csrc has a gradient, but no gradient of its gradient"):
        gradient.square().sum().backward()


def test_forward_mode_derivatives_are_those_of_the_reference():
    g = torch.Generator().manual_seed(0)
    mu, logvar, teacher, tangent = torch.randn(4, 2, 3, 4, 4, generator=g).unbind()
    x, weight = mu.contiguous(), torch.ones(3)
    pairs = [(lambda m: sae.reparameterize(m, logvar, 5)[0],
              lambda m: sae.reparameterize_reference(m, logvar, 5)[0]),
             (lambda m: sae.feature_mse(m, teacher),
              lambda m: sae.feature_mse_reference(m, teacher)),
             (lambda m: sae.group_norm_silu(m, weight, weight, 3),
              lambda m: sae.group_norm_silu_reference(m, weight, weight, 3))]
    for op, reference in pairs:
        _, derivative = torch.func.jvp(op, (x,), (tangent,))
        step = 1e-3
        difference = (reference(x + step * tangent) - reference(x - step * tangent)) / (2 * step)
        assert derivative.norm() > 0.1 and (derivative - difference).norm() < 1e-2 * difference.norm()


@built
@device
def test_compiled_ops_equal_eager_ones_in_one_graph_and_a_new_seed_compiles_nothing(device):
    qkv, rows, cols, prefix = arguments(device)["attention"]
    mu, logvar = arguments(device)["reparameterize"][:2]
    ones = torch.ones(2, device=device)

    def f(qkv, mu, logvar, seed):
        z, kl = sae.reparameterize(mu, logvar, seed, seed * 4)
        y = sae.group_norm_silu(qkv.flatten(2)[:, None].expand(-1, 2, -1, -1) + 1, ones, ones, 2)
        out = sae.attention(qkv * 2, (rows, cols), prefix)
        squares = out.square().mean() + z.square().sum() + y.square().sum()
        return squares + kl.sum() + sae.feature_mse(mu * 3, logvar)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for seed in range(3, 9):
        inputs = [qkv, mu, logvar]
        gradients = [torch.autograd.grad(function(*inputs, seed), inputs) for function in (compiled, f)]
        for x, y in zip(*gradients):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2                           # one for the first seed, one for all others


@built
@device
@dtype
def test_results_are_the_same_bits_every_time_and_at_any_thread_count(device, dtype):
    qkv, rope = packed(2, 261, 3, dtype=dtype, device=device), sae.rope_tables(16, 16, device=device)
    mu = torch.randn(3, 20000, device=device, dtype=dtype)
    image, dy, weight, bias = norm_arguments((3, 48, 40, 30), dtype, device)

    def everything():
        x, m = qkv.clone().requires_grad_(), mu.clone().requires_grad_()
        outputs = [sae.attention(x, rope, 5), *sae.reparameterize(m, m, 1), sae.feature_mse(m, mu * 2)]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        normalised = norm_and_gradients(sae.group_norm_silu, image, dy, weight, bias, 16)
        return [*outputs, x.grad, m.grad, *normalised]

    threads = torch.get_num_threads()
    first = everything()
    torch.set_num_threads(1 if threads > 1 else 2)
    second = everything()
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@needs_gpu
@built
def test_ops_run_on_the_current_stream_and_on_the_device_of_their_tensors():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    big = torch.randn(8192, 8192, device=last)
    stream = torch.cuda.Stream(last)
    stream.wait_stream(torch.cuda.current_stream(last))
    with torch.cuda.stream(stream):
        for _ in range(20):     # keeps the stream busy: an op on another stream would overtake it
            product = big @ big
        student = product / 90
        loss = sae.feature_mse(student, torch.zeros_like(student))
    stream.synchronize()
    assert loss > 0.5                                         # rows and columns of normals: about 8192 / 90^2
    torch.testing.assert_close(loss, student.square().mean())


@built
@pytest.mark.parametrize("kernels", ["avx512", "avx2", "generic"])
def test_the_kernels_for_lesser_processors_agree_with_the_best_ones(kernels, tmp_path):
    code = '''
torch.manual_seed(0)
out = [torch.ops.sae.cpu_kernels()]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    qkv = torch.randn(1, 68, 3, 2, 64).to(dtype).requires_grad_()
    o = sae.attention(qkv, sae.rope_tables(7, 9), 5)
    o.backward(torch.ones_like(o))
    mu, logvar = (torch.randn(2, 4999).to(dtype).requires_grad_() for _ in range(2))
    z, kl = sae.reparameterize(mu, logvar, 77, 5)
    loss = sae.feature_mse(mu, logvar.detach())
    torch.autograd.backward([z, kl.sum(), loss], [torch.ones_like(z), None, None])
    out += [o.detach(), qkv.grad, z.detach(), kl.detach(), loss.detach(), mu.grad, logvar.grad]
    x, dy = (torch.randn(2, 30, 40, 31).to(dtype) for _ in range(2))
    x, weight, bias = x.requires_grad_(), torch.randn(30).requires_grad_(), torch.randn(30).requires_grad_()
    y = sae.group_norm_silu(x, weight, bias, 10)
    out += [y.detach(), *torch.autograd.grad(y, [x, weight, bias], dy)]
    zero = torch.zeros(1, 5000)
    out.append(sae.reparameterize(zero, zero, 2**40 + 5, 2**35 + 2)[0])
'''
    program = f'import torch, sae\n{code}\ntorch.save(out, "lesser.pt")'
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True,
                   env=dict(os.environ, PYTHONPATH=str(ROOT), SAE_CPU=kernels))
    here = {"torch": torch, "sae": sae}
    exec(code, here)
    best, lesser = here["out"], torch.load(tmp_path / "lesser.pt")
    if lesser[0] != kernels:
        pytest.skip(f"this processor has no {kernels}")
    for i, (x, y) in enumerate(zip(best[1:], lesser[1:])):
        noise = i % 12 == 11                        # has the same bits
        assert torch.equal(x, y) if noise else relative(x, y) < 16 * half_ulp(x.dtype)


# ------------------------------------------------------------------ errors

def normalise(shape=(2, 6, 3, 3), weight=torch.zeros(6), bias=torch.zeros(6), groups=2):
    return sae.group_norm_silu(torch.zeros(shape), weight, bias, groups)


def draw(mu=torch.zeros(2, 3), logvar=torch.zeros(2, 3), seed=0, offset=0):
    return sae.reparameterize(mu, logvar, seed, offset)


@pytest.mark.parametrize("call, message", [
    (lambda: sae.attention(torch.zeros(2, 9, 64), sae.rope_tables(3, 3), 0), r"qkv is \[2, 9, 64\]"),
    (lambda: sae.attention(packed(1, 9, 1), sae.rope_tables(3, 3), 5),
     "N 9 and d 64 of qkv do not fit prefix 5"),
    (lambda: sae.attention(packed(1, 9, 1), sae.rope_tables(3, 3, 128), 0), r"rope tables \[3, 32, 2\]"),
    (lambda: sae.attention(packed(1, 8, 1), sae.rope_tables(3, 3), -1), "prefix -1"),
    (lambda: sae.attention(packed(1, 9, 1), [t.double() for t in sae.rope_tables(3, 3)], 0),
     "torch.float64 on cpu"),
    (lambda: sae.attention(packed(1, 9, 1), [t.to("meta") for t in sae.rope_tables(3, 3)], 0), "on meta"),
    (lambda: draw(logvar=torch.zeros(2, 4)), r"logvar \[2, 4\]"),
    (lambda: draw(logvar=torch.zeros(2, 3).bfloat16()), "torch.bfloat16"),
    (lambda: draw(torch.zeros(5), torch.zeros(5)), r"they must be alike, \[B, ...\]"),
    (lambda: draw(seed=-1), "seed -1"),
    (lambda: draw(offset=2 ** 63), "offset 9223372036854775808"),
    (lambda: sae.feature_mse(torch.zeros(2, 3), torch.zeros(3, 2)), r"teacher \[3, 2\]"),
    (lambda: normalise((2, 6, 3)), r"x is \[2, 6, 3\]"),
    (lambda: normalise(groups=4), r"\[2, 6, 3, 3\].* of the 4 groups"),
    (lambda: normalise(groups=0), "multiple of the 0 groups"),
    (lambda: normalise((2, 6, 0, 3)), r"\[2, 6, 0, 3\].* no side 0"),
    (lambda: normalise(bias=torch.zeros(5)), r"bias is \[5\].* it must be \[6\]"),
    (lambda: normalise(weight=torch.zeros(6).half()), "weight is .* torch.float16"),
    (lambda: normalise(bias=torch.zeros(6, device="meta")), "bias is .* meta"),
])
def test_arguments_that_do_not_fit_give_one_sentence_with_the_values(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


def raw_attention_backward(op, dout, out=(1, 9, 64), lse=torch.zeros(1, 1, 9)):
    rope = sae.rope_tables(3, 3)
    return op.attention_backward(torch.zeros(dout), packed(1, 9, 1), *rope, torch.zeros(out), lse, 0)


def raw_norm(op, x=torch.zeros(2, 9, 6), bias=torch.zeros(6), groups=2):
    return op.group_norm_silu(x, torch.zeros(6), bias, groups, 1e-6)


def raw_norm_backward(op, rows=9, statistics=2):
    x, dy, parameters = torch.zeros(2, 9, 6), torch.zeros(2, rows, 6), torch.zeros(2, 6)
    return op.group_norm_silu_backward(dy, x, *parameters, *torch.zeros(2, 2, statistics), 2)


@built
@pytest.mark.parametrize("call", [
    lambda op: op.attention(packed(1, 9, 1, 32), *sae.rope_tables(3, 3), 0),
    lambda op: op.attention(packed(1, 9, 1), *sae.rope_tables(3, 4), 0),
    lambda op: op.attention(packed(1, 9, 1).double(), *sae.rope_tables(3, 3), 0),
    lambda op: op.attention(packed(1, 9, 1), *(t.double() for t in sae.rope_tables(3, 3)), 0),
    lambda op: raw_attention_backward(op, (1, 9, 32)),
    lambda op: raw_attention_backward(op, (1, 8, 64), (1, 8, 64)),
    lambda op: raw_attention_backward(op, (1, 9, 64), lse=torch.zeros(1, 1, 9).half()),
    lambda op: op.reparameterize(torch.zeros(2, 3), torch.zeros(3, 2), 0, 0),
    lambda op: op.reparameterize_backward(torch.zeros(2, 3), torch.zeros(3), *torch.zeros(2, 2, 3), 0, 0),
    lambda op: op.feature_mse(torch.zeros(2), torch.zeros(3)),
    lambda op: op.feature_mse_backward(torch.zeros(2), torch.zeros(3), torch.zeros(3)),
    lambda op: raw_norm(op, bias=torch.zeros(5)),
    lambda op: raw_norm(op, bias=torch.zeros(6).double()),
    lambda op: raw_norm(op, groups=4),
    lambda op: raw_norm(op, torch.zeros(2, 9, 6).double()),
    lambda op: raw_norm(op, torch.zeros(6)),
    lambda op: raw_norm_backward(op, rows=8),
    lambda op: raw_norm_backward(op, statistics=1),
])
def test_the_raw_ops_refuse_what_they_would_read_out_of_bounds(call):
    with pytest.raises(RuntimeError, match="sae: "):
        call(torch.ops.sae)


# ------------------------------------------------------------------ the extension

@built
def test_a_missing_a_broken_and_a_stale_extension_are_told_in_one_sentence(tmp_path):
    assert sae.load_csrc(tmp_path / "sae_csrc.so", ROOT / "csrc") == "sae_csrc.so is not beside sae.py"
    (tmp_path / "broken.so").write_bytes(b"not a library")
    assert sae.load_csrc(tmp_path / "broken.so", ROOT / "csrc").startswith("broken.so does not load (")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for left_by_an_editor in ".norm.cu.swp", "norm.cu~":
        (tmp_path / "csrc" / left_by_an_editor).touch()
    (tmp_path / "csrc" / ".ipynb_checkpoints").mkdir()
    assert sae.load_csrc(ROOT / "sae_csrc.so", tmp_path / "csrc") is None
    (tmp_path / "csrc" / "noise.h").write_text("// changed")
    assert sae.load_csrc(ROOT / "sae_csrc.so", tmp_path / "csrc") == "sae_csrc.so is older than csrc/"
    # Installed without its sources, it loads.
    assert sae.load_csrc(ROOT / "sae_csrc.so", tmp_path / "no such folder") is None


@pytest.mark.parametrize("rank", ["0", "3"])
def test_without_the_extension_the_reference_serves_and_only_the_first_rank_says_so(
        tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    spec = importlib.util.spec_from_file_location("sae_alone", shutil.copy(ROOT / "sae.py", tmp_path))
    alone = importlib.util.module_from_spec(spec)
    sys.modules["sae_alone"] = alone                          # dataclasses look their module up
    spec.loader.exec_module(alone)
    del sys.modules["sae_alone"]
    said = capsys.readouterr().err
    assert said.count("\n") == (rank == "0")
    assert ("sae_csrc.so is not beside sae.py: the slower reference ops serve" in said) == (rank == "0")
    qkv, rope = packed(1, 5, 2), sae.rope_tables(2, 2)
    assert torch.equal(alone.attention(qkv, rope, 1), sae.attention_reference(qkv, rope, 1))
    assert alone.feature_mse(torch.ones(3), torch.zeros(3)).item() == 1
