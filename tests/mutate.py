"""Breaks the CUDA kernels on purpose, a line at a time, and fails unless the emulated tests notice every bug.

    python tests/mutate.py [WORDS]
        all mutants, or those with WORDS in their name, two compilers at a time; status 1 when one survives
    python tests/mutate.py run MODULE CASES [KIND ...]
        the cases alone, on one build of the emulated kernels: numpy only, so that it runs under sanitizers

A mutant is built the way it shows: plainly (and run with warps in ascending and in descending order), with
AddressSanitizer or with ThreadSanitizer. The unbroken kernels must pass all three.
"""
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CSRC = Path(__file__).resolve().parent.parent / "csrc"
EMULATION = Path(__file__).resolve().parent / "emulation"
SOURCES = ("attention_mma.cu", "attention_fp32.cu", "gaussian.cu", "norm.cu")
INCLUDED_BY = {"attention.cuh": SOURCES[:2], "noise.h": SOURCES[2:3], "vector.cuh": SOURCES[2:]}
CASES_OF = {"attention_mma.cu": ["attention"], "attention_fp32.cu": ["attention"],
            "gaussian.cu": ["gaussian", "error"], "norm.cu": ["norm"]}
SANITIZERS = {"plain": [], "asan": ["-g", "-fsanitize=address"], "tsan": ["-g", "-fsanitize=thread"]}
FLOAT32, BFLOAT16, FLOAT16 = range(3)

# (source, name, build that shows it, text, replacement); the text occurs once
MUTANTS = [
    ("attention_mma.cu", "forward: no barrier before a chunk is overwritten", "tsan",
     "if (base) __syncthreads();                                // the last chunk", "//"),
    ("attention_mma.cu", "dQ: no barrier before a chunk is overwritten", "tsan",
     "    if (base) __syncthreads();\n    load_tile_of_pairs(ks", "    load_tile_of_pairs(ks"),
    ("attention_mma.cu", "dK, dV: no barrier before a chunk is overwritten", "tsan",
     "    if (base) __syncthreads();\n    load_tile_of_pairs(qs", "    load_tile_of_pairs(qs"),
    ("attention_mma.cu", "forward: no barrier after loading", "plain",
     "__syncthreads();\n\n    if (row0 >= a.N) continue;                                //",
     "if (row0 >= a.N) continue;  //"),
    ("attention_mma.cu", "dK, dV: no barrier after loading", "plain",
     "    __syncthreads();\n\n    if (row0 >= a.N) continue;\n    for (int q0",
     "    if (row0 >= a.N) continue;\n    for (int q0"),
    ("attention_mma.cu", "K and V are not waited for", "plain",
     "    copy_async_wait();\n    turn_tile<T>(ks, base, rows, a);\n    __syncthreads();\n\n"
     "    if (row0 >= a.N) continue;                                //",
     "    turn_tile<T>(ks, base, rows, a);\n    __syncthreads();\n\n    if (row0 >= a.N) continue;  //"),
    ("attention_mma.cu", "Q is turned before it has landed", "plain",
     "    copy_async_wait();\n    turn_tile<T>(qs, base, rows, a);\n",
     "    turn_tile<T>(qs, base, rows, a);\n    copy_async_wait();\n"),
    ("attention_mma.cu", "a thread turns what another has copied", "plain",
     "int r = spread(threadIdx.x / 4), x =", "int r = threadIdx.x / 4, x ="),
    ("attention_mma.cu", "Q is loaded for the first chunk after it was wanted", "plain",
     "    if (!base) {\n      load_operand(q", "    if (base) {\n      load_operand(q"),
    ("attention_mma.cu", "forward: keys that fill no whole step left out", "plain",
     "for (; k0 < rows; k0 += 16) softmax", "for (; k0 + 64 <= rows; k0 += 16) softmax"),
    ("attention_mma.cu", "a row of the grid is too long in shared memory", "plain",
     "for (; x >= a.w; x -= a.w) ++y;", "for (; x > a.w; x -= a.w) ++y;"),
    ("attention_mma.cu", "no mask", "plain", "  if (column0 + 8 * kColumns <= left) return;", "  return;"),
    ("attention_mma.cu", "mask off by one", "plain", "(i & 1) >= left) s", "(i & 1) > left) s"),
    ("attention_mma.cu", "mask skips a full last step", "plain",
     "if (column0 + 8 * kColumns <= left) return;", "if (column0 + 8 * kColumns <= left + 8) return;"),
    ("attention_mma.cu", "forward: the last 16 keys left out", "plain",
     "for (; k0 < rows; k0 += 16) softmax", "for (; k0 + 16 < rows; k0 += 16) softmax"),
    ("attention_mma.cu", "dQ: padded keys keep their weight", "plain",
     "  mask<kColumns>(s, k0, left, 0.f);\n", ""),
    ("attention_mma.cu", "dK, dV: padded queries weigh NaN", "plain",
     "lse[i] = i < left ? a.lse", "if (i < left) lse[i] = i < left ? a.lse"),
    ("attention_mma.cu", "writes past the last row", "asan",
     "    if (r >= n) continue;\n    const float scale", "    const float scale"),
    ("attention_mma.cu", "reads past the last row", "asan",
     "f.v[k][i] = r < n ?", "f.v[k][i] = r < n + 16 ?"),
    ("attention_mma.cu", "shared memory 16 bytes short", "asan",
     "kTwoTiles = 2 * kChunkRows * D * sizeof(u16);", "kTwoTiles = 2 * kChunkRows * D * sizeof(u16) - 16;"),
    ("attention_mma.cu", "no room for lse and delta", "asan",
     "kTwoTiles + 2 * kChunkRows * sizeof(float)", "kTwoTiles + kChunkRows * sizeof(float)"),
    ("attention_mma.cu", "B operand swapped", "plain",
     "mma<T>(sum.v[2 * d + 1], a, b[2], b[3]);", "mma<T>(sum.v[2 * d + 1], a, b[3], b[2]);"),
    ("attention_mma.cu", "A operand swapped", "plain",
     "pack<T>(left[2], left[3]),\n                           pack<T>(right[0], right[1])",
     "pack<T>(right[0], right[1]), pack<T>(left[2], left[3])"),
    ("attention_mma.cu", "ldmatrix reads the other half", "plain",
     "half * 4 + lane / 8", "(1 - half) * 4 + lane / 8"),
    ("attention_mma.cu", "the last row of a tile is not loaded", "plain",
     "void load_tile(u16* tile, Rows<const u16> src, int first, int rows, int n) {\n",
     "void load_tile(u16* tile, Rows<const u16> src, int first, int rows, int n) {\n  --rows;\n"),
    ("attention_mma.cu", "return where a barrier follows", "plain",
     "if (row0 >= a.N) continue;                                //", "if (row0 >= a.N) return;  //"),
    ("attention_mma.cu", "the output is not rescaled", "plain", "o.v[d][2 * half + 1] *= shrink;", ""),
    ("attention_mma.cu", "the sum is not rescaled", "plain", "l[half] *= shrink;", ""),
    ("attention_mma.cu", "the slack is far too wide", "plain",
     "kSlack = 8.f / kScoreScale", "kSlack = 8000.f / kScoreScale"),
    ("attention_mma.cu", "lse without the maximum", "plain", "m[half] * kScoreScale + log2f", "log2f"),
    ("attention_mma.cu", "dQ is not turned back", "plain",
     "  turn_back_sum(dq, row0, a);\n", ""),
    ("attention_mma.cu", "dK is not turned back", "plain",
     "  turn_back_sum(dk, row0, a);\n", ""),
    ("attention_mma.cu", "prefix tokens are turned in registers", "plain",
     "    if (r < a.prefix || r >= a.N) continue;\n#pragma unroll\n    for (int k",
     "    if (r >= a.N) continue;\n#pragma unroll\n    for (int k"),
    ("attention_mma.cu", "prefix tokens are turned in shared memory", "asan",
     "if (x < 0) continue;                                      //", "//"),
    ("attention_mma.cu", "dQ without the scale", "plain",
     "dq, row0, a.N, kScale, kScale", "dq, row0, a.N, 1.f, 1.f"),
    ("attention_mma.cu", "two warps own the same rows", "tsan",
     "threadIdx.x / 32 * 16; }", "threadIdx.x / 32 % 2 * 16; }"),
    ("attention.cuh", "the sine has the wrong sign", "plain",
     "y = y * angle.x + x * angle.y;", "y = y * angle.x - x * angle.y;"),
    ("attention.cuh", "rows and columns of the grid swapped", "plain",
     "i < 16 ? a.rows + y * 32 : a.cols + x * 32", "i < 16 ? a.cols + x * 32 : a.rows + y * 32"),
    ("attention.cuh", "a quad sums two lanes", "plain",
     "return v + __shfl_xor_sync(~0u, v, 2);", "return v;"),
    ("attention.cuh", "a quad takes the maximum of two lanes", "plain",
     "return fmaxf(v, __shfl_xor_sync(~0u, v, 2));", "return v;"),
    ("attention.cuh", "the wrong head", "plain",
     "(int64_t(which) * a.H + p.head) * D", "(int64_t(which) + p.head * 3) * D"),
    ("attention_fp32.cu", "fp32: no barrier after loading", "tsan",
     "__syncthreads();\n\n    for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {\n      const float s",
     "for (int j = 0; j < smaller(kKeys, a.N - base); ++j) {\n      const float s"),
    ("attention_fp32.cu", "fp32: one key too many", "plain",
     "j < smaller(kKeys, a.N - base); ++j) {\n      const float s",
     "j < smaller(kKeys, a.N - base + 1); ++j) {\n      const float s"),
    ("attention_fp32.cu", "fp32: dK is not turned back", "plain", "  turn_share(dk, c, row, a, true);\n", ""),
    ("attention_fp32.cu", "fp32: reads past the last row", "asan", "  if (t >= a.N) return;\n", ""),
    ("gaussian.cu", "no barrier in the sum of a block", "tsan",
     "warp[threadIdx.x / 32] = v;\n  __syncthreads();", "warp[threadIdx.x / 32] = v;"),
    ("gaussian.cu", "the first noise block only", "plain",
     "normals_of(first / 4 + i / 4, key, four);", "normals_of(first / 4, key, four);"),
    ("gaussian.cu", "the offset is forgotten", "plain",
     "draw<kFast>(a.seed, a.offset + at);\n    Eight z;", "draw<kFast>(a.seed, at);\n    Eight z;"),
    ("gaussian.cu", "backward draws other noise", "plain",
     "draw<kFast>(a.seed, a.offset + at);\n    Eight dmu",
     "draw<kFast>(a.seed, a.offset + at + 4);\n    Eight dmu"),
    ("gaussian.cu", "the clamp lets its gradient through", "plain",
     "logvar.v[j] > -30.f && logvar.v[j] < 20.f ? d : 0.f", "d"),
    ("gaussian.cu", "no clamp from above", "plain", ": v > 20.f ? 20.f : v;", ": v;"),
    ("gaussian.cu", "padding counts in the KL", "plain", "if (kFast || j < left) kl +=", "kl += 1e-3f +"),
    ("vector.cuh", "writes past the end of a sample", "asan",
     "      if (i < n) store_one(p + i, e.v[i]);", "      store_one(p + i, e.v[i]);"),
    ("gaussian.cu", "the fast path for any length", "asan",
     "const bool fast = e.n % kEach == 0;\n  const char* error",
     "const bool fast = true;\n  const char* error"),
    ("norm.cu", "norm: no barrier before lanes join", "tsan",
     "  __syncthreads();\n\n  const int lanes = p.rows", "  const int lanes = p.rows"),
    ("norm.cu", "norm: no barrier before lanes are summed", "tsan",
     "    put(c, p, 1, product);\n  }\n  __syncthreads();", "    put(c, p, 1, product);\n  }"),
    ("vector.cuh", "no barrier before a sum of the block", "tsan",
     "  __syncthreads();\n  shared[threadIdx.x] = v;", "  shared[threadIdx.x] = v;"),
    ("vector.cuh", "no barrier in a sum of the block", "tsan",
     "    __syncthreads();\n    if (static_cast<int>(threadIdx.x) < half)",
     "    if (static_cast<int>(threadIdx.x) < half)"),
    ("vector.cuh", "no barrier after a sum of the block", "plain",
     "  __syncthreads();\n  return shared[0];", "  return shared[0];"),
    ("norm.cu", "norm: no barrier before the lanes of a group join", "tsan",
     "  __syncthreads();\n\n  const double rstd", "  const double rstd"),
    ("norm.cu", "norm: shared memory of the lanes short", "asan",
     "return 2 * threads(c) * kEach * sizeof(float);", "return 2 * threads(c) * kEach * sizeof(float) - 4;"),
    ("norm.cu", "norm: no room for the sum of the block", "asan",
     "2 * entries * sizeof(double) + kFinishShared", "2 * entries * sizeof(double)"),
    ("norm.cu", "norm: chunks join without their means", "plain",
     "part(i, 2) + d * d * count(i / width)", "part(i, 2)"),
    ("norm.cu", "norm: chunks join without their origins", "plain",
     "const double d = part(i, 0) + part(i, 1) - mean;", "const double d = part(i, 1) - mean;"),
    ("norm.cu", "norm: lanes join without their means", "plain",
     "__fmaf_rn(d * d, count(l), lane_values(c, 1, l)[i])", "lane_values(c, 1, l)[i]"),
    ("norm.cu", "norm: variance from squares that are not shifted", "plain",
     "shift = load<kFast>(at<const void, const T>(a.x, a, p, p.lane), p.n);\n"
     "    for (int row = p.lane + c.lanes;",
     "shift = Eight{};\n    for (int row = p.lane;"),
    ("norm.cu", "norm: a lane counts a row too few", "plain",
     "const int count = (p.rows - p.lane + c.lanes - 1) / c.lanes;",
     "const int count = (p.rows - p.lane) / c.lanes;"),
    ("norm.cu", "norm: the last chunk counts as a whole one", "plain",
     "static_cast<double>(left < c.rows ? left : c.rows)", "static_cast<double>(c.rows)"),
    ("norm.cu", "norm: no eps", "plain", " + a.eps));", "));"),
    ("norm.cu", "norm: the next group begins a channel late", "plain",
     "if (p.channel + j == next)", "if (p.channel + j == next + 1)"),
    ("norm.cu", "norm: the second tile of a row takes the first one's channels", "plain",
     "(tile * c.columns + p.column) * kEach", "p.column * kEach"),
    ("norm.cu", "norm: sigmoid of -u", "plain", "fast_exp2(-kLog2e * u)", "fast_exp2(kLog2e * u)"),
    ("norm.cu", "norm: the gradient of silu is sigmoid", "plain",
     "dy * sigma * __fmaf_rn(u, 1.f - sigma, 1.f)", "dy * sigma"),
    ("norm.cu", "norm: dx without mean(weight du)", "plain",
     "-__fmaf_rn(d, slope.v[j], offset.v[j])", "-d * slope.v[j]"),
    ("norm.cu", "norm: dx without mean(weight du xhat)", "plain",
     "-__fmaf_rn(d, slope.v[j], offset.v[j])", "-offset.v[j]"),
    ("norm.cu", "norm: dweight without rstd", "plain", "    q *= rstd;\n", ""),
    ("norm.cu", "norm: dweight and dbias of the first sample", "plain", "b < a.B; ++b", "b < 1; ++b"),
    ("norm.cu", "norm: every lane adds all chunks", "plain",
     "for (int64_t chunk = lane; chunk < c.chunks; chunk += lanes) {",
     "for (int64_t chunk = 0; chunk < c.chunks; ++chunk) {"),
    ("norm.cu", "norm: writes past the last row", "asan",
     "if (row + i * c.lanes >= p.rows) break;", "if (row + i * c.lanes > p.rows) break;"),
    ("norm.cu", "norm: a row past the last one counts in the moments", "plain",
     "x[i] = r < p.rows ?", "x[i] = r < p.rows + 1 ?"),
    ("norm.cu", "norm: the last chunk is as long as the others", "asan",
     "left < c.rows ? static_cast<int>(left) : c.rows;", "c.rows;"),
    ("norm.cu", "norm: a thread has eight channels always", "asan",
     "p.n = a.C - p.channel < kEach ? a.C - p.channel : kEach;", "p.n = kEach;"),
    ("norm.cu", "norm: the fast path for any C", "asan",
     "const bool fast = a.C % kEach == 0;\n  const char* error =\n      SAE_LAUNCH(moments",
     "const bool fast = true;\n  const char* error =\n      SAE_LAUNCH(moments"),
    ("norm.cu", "norm: parameters past the last channel", "asan", "  if (i >= a.C) return;\n", ""),
    ("norm.cu", "norm: backward leaves out the last of an odd number of rows", "plain",
     "if (row < p.rows) work(row,", "if (false) work(row,"),
    ("norm.cu", "norm: the second row of two is past the last one", "asan",
     "for (; row + c.lanes < p.rows;", "for (; row + c.lanes < p.rows + 1;"),
    ("noise.h", "a Philox round less", "plain", "round < 10", "round < 9"),
    ("noise.h", "sine and cosine swapped", "plain",
     "eps[i] = r * c;\n    eps[i + 1] = r * s;", "eps[i] = r * s;\n    eps[i + 1] = r * c;"),
    ("noise.h", "the wrong quadrant", "plain", "(quadrant & 2u) << 30;", "(quadrant & 1u) << 31;"),
]


# ------------------------------------------------------------------ cases: inputs, and what oracles say

# (dtype, B, H, h, w, prefix, spread of the scores); the chunk of these builds is 80 rows
SMALL = [(BFLOAT16, 1, 1, 1, 1, 0, 1), (BFLOAT16, 2, 2, 3, 4, 3, 1), (FLOAT16, 1, 1, 3, 4, 5, 1),
         (BFLOAT16, 1, 2, 10, 11, 5, 1), (BFLOAT16, 1, 1, 12, 12, 0, 3), (BFLOAT16, 1, 1, 1, 1, 62, 4),
         (BFLOAT16, 1, 1, 1, 1, 18, -4), (FLOAT32, 1, 2, 5, 7, 2, 1), (FLOAT32, 1, 1, 1, 3, 0, 2)]

# (dtype, shape, seed, offset)
GAUSSIANS = [(FLOAT32, (2, 3 * 4096 + 64), 7, 0), (BFLOAT16, (1, 4096 + 8), 2 ** 40 + 3, 4),
             (FLOAT16, (3, 37), 5, 3), (FLOAT32, (1, 8), 1, 2 ** 34 - 4)]

# (dtype, n)
ERRORS = [(FLOAT32, 4096 + 16), (BFLOAT16, 2 * 4096 + 24), (FLOAT16, 77)]

# (dtype, B, C, groups, rows, mean). ThreadSanitizer knows 8128 fibers, and each costs time: few groups, of
# 128 threads each.
NORMS = [(FLOAT32, 2, 24, 4, 300, 0), (BFLOAT16, 1, 128, 8, 110, 0), (FLOAT16, 2, 30, 3, 7, 0),
         (FLOAT32, 1, 10, 2, 131, 0), (FLOAT32, 1, 64, 8, 100, 1000), (FLOAT32, 1, 2, 2, 1, 0),
         (BFLOAT16, 1, 16, 1, 1, 0), (FLOAT32, 1, 600, 2, 5, 0), (FLOAT32, 1, 3080, 4, 5, 0)]


def cases(shapes, path, norms=()):
    """Writes inputs and expected outputs to the npz file `path`.

    Bounds of attention: twice (gradients three times) the largest error of PyTorch's own computation in the
    same dtype, plus half an ulp of the largest value; of norm the same in fp32, plus half an ulp of each
    value of 16 bits.
    """
    import torch
    torch.manual_seed(0)
    arrays = {}
    kinds = (("attention", attention_case, shapes), ("gaussian", gaussian_case, GAUSSIANS),
             ("error", error_case, ERRORS), ("norm", norm_case, norms))
    for kind, make, arguments in kinds:
        for i, argument in enumerate(arguments):
            for key, value in make(*argument).items():
                if isinstance(value, torch.Tensor):
                    value = value.detach().contiguous()
                    sixteen_bits = value.dtype in (torch.bfloat16, torch.float16)
                    value = (value.view(torch.int16) if sixteen_bits else value).numpy()
                arrays[f"{kind} {i}/{key}"] = np.asarray(value)
    np.savez(path, **arrays)


def torch_dtype(t):
    import torch
    return (torch.float32, torch.bfloat16, torch.float16)[t]


def bound(own, expected, factor):
    import torch
    half_ulp = torch.finfo(own.dtype).eps / 2
    return factor * (own.double() - expected).abs().max().item() + half_ulp * expected.abs().max().item()


def attend(qkv, rope, prefix):
    """transformers' DINOv3 rotation and attention -> (output, log-sum-exp of the scores)"""
    import torch
    from transformers.models.dinov3_vit import modeling_dinov3_vit as oracle
    rows, cols = rope
    h, w = len(rows), len(cols)
    table = torch.cat([rows[:, None].expand(h, w, -1, 2), cols[None].expand(h, w, -1, 2)], 2)
    cos, sin = table.flatten(0, 1).repeat(1, 2, 1).to(qkv.dtype).unbind(-1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = oracle.apply_rotary_pos_emb(q, k, cos, sin)
    scores = q @ k.transpose(-1, -2) / 8
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 1
    out = oracle.eager_attention_forward(module, q, k, v, None, scaling=1 / 8)[0]
    return out.flatten(2), scores.logsumexp(-1)


def attention_case(t, B, H, h, w, prefix, spread):
    """Oracle: transformers' attention in float64."""
    import torch

    import sae
    dtype, N = torch_dtype(t), prefix + h * w
    qkv = torch.randn(B, N, 3, H, 64)
    if spread > 1:                          # scores grow along the keys: the maximum moves again and again
        qkv[:, :, 0] += spread * qkv[:, :1, 0]
        qkv[:, :, 1] += torch.linspace(0, spread, N).view(-1, 1, 1) * qkv[:, :1, 0]
    if spread < 0:                          # every score is far below 0, and so is lse
        first = qkv[:, :1, 0].clone()
        qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0] - spread * first, qkv[:, :, 1] + spread * first
    qkv = qkv.to(dtype)
    dout = torch.randn(B, N, H * 64).to(dtype)
    rope = sae.rope_tables(h, w)

    expected, own = [], []
    for d, out in ((torch.float64, expected), (dtype, own)):
        x = qkv.to(d).requires_grad_()
        o, lse = attend(x, rope, prefix)
        o.backward(dout.to(d))
        out += [o.detach(), lse.detach() / np.log(2), x.grad]
    bounds = [bound(a, b, f) for a, b, f in zip(own, expected, (2, 2, 3))]
    # Q, K and V have gradients of different sizes, and a bound of one should not cover for another.
    bounds += [bound(own[2][:, :, j], expected[2][:, :, j], 3) for j in range(3)]
    bounds[1] = max(bounds[1], 1e-5 * expected[1].abs().max().item())
    return dict(sizes=[t, B, N, H, prefix, h, w], rows=rope[0], cols=rope[1], qkv=qkv, dout=dout,
                expected_o=expected[0], expected_lse=expected[1], expected_dqkv=expected[2], bounds=bounds)


def gaussian_case(t, shape, seed, offset):
    """Oracles: torch.distributions' KL and autograd in float64, on the noise of sae.philox_normal, which
    tests/test_ops.py holds to torch's Philox engine."""
    import torch

    import sae
    mu, logvar, dz = (torch.randn(shape).to(torch_dtype(t)) for _ in range(3))
    logvar.view(-1)[:3] = torch.tensor([25., -40., 10.])
    dkl = torch.randn(shape[0])
    m, v = mu.double().requires_grad_(), logvar.double().requires_grad_()
    eps = sae.philox_normal(mu.numel(), seed, offset).view(shape)
    std = (v.clamp(-30, 20) / 2).exp()
    z = m + std * eps
    standard = torch.distributions.Normal(torch.zeros_like(m), 1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(m, std), standard).sum(1)
    dmu, dlogvar = torch.autograd.grad([z, kl], [m, v], [dz.double(), dkl.double()])
    return dict(sizes=[t, *shape, seed, offset], mu=mu, logvar=logvar, dz=dz, dkl=dkl,
                expected_z=z, expected_kl=kl, expected_dmu=dmu, expected_dlogvar=dlogvar,
                scale_z=m.abs() + (z - m).abs(), scale_dmu=dz.abs() + (dmu - dz).abs(),
                scale_dlogvar=((z - m) * dz).abs() / 2 + dkl.abs().view(-1, 1) * (std.square() + 1) / 2)


def error_case(t, n):
    """Oracle: torch's mse_loss in float64."""
    import torch
    a, b = (torch.randn(n).to(torch_dtype(t)) for _ in range(2))
    x = a.double().requires_grad_()
    loss = torch.nn.functional.mse_loss(x, b.double())
    loss.backward(torch.tensor(3., dtype=torch.float64))
    return dict(sizes=[t, n], a=a, b=b, expected_mean=loss, expected_da=x.grad)


def norm_case(t, B, C, groups, rows, mean):
    """Oracle: torch's group_norm and silu in float64."""
    import torch
    dtype = torch_dtype(t)
    x, dy = (torch.randn(B, rows, C).to(dtype) for _ in range(2))
    x += mean
    weight, bias = torch.randn(C).to(dtype), torch.randn(C).to(dtype)

    def normalised(d):
        leaves = [v.to(d).requires_grad_() for v in (x, weight, bias)]
        normal = torch.group_norm(leaves[0].transpose(1, 2), groups, *leaves[1:], 1e-6)
        y = torch.nn.functional.silu(normal).transpose(1, 2)
        return [y, *torch.autograd.grad(y, leaves, dy.to(d))]

    expected = normalised(torch.float64)
    grouped = x.double().view(B, rows, groups, -1).transpose(1, 2).flatten(2)
    var, average = torch.var_mean(grouped, -1, correction=0)
    outputs = {f"expected_{n}": e for n, e in zip(("y", "dx", "dweight", "dbias"), expected)}
    bounds = [bound(p, e, f) for p, e, f in zip(normalised(torch.float32), expected, (2, 3, 3, 3))]
    return dict(sizes=[t, B, rows, C, groups], x=x, dy=dy, weight=weight.float(), bias=bias.float(),
                expected_mean=average, expected_rstd=(var + 1e-6).rsqrt(), bounds=bounds, **outputs)


# ------------------------------------------------------------------ run: numpy only

def run(module, path, *kinds):
    """The outputs that are off by more than their bounds, with how far; of all cases, or of these kinds."""
    spec = importlib.util.spec_from_file_location("emulate", module)
    emulate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulate)
    data = np.load(path)
    wrong = []
    for name in sorted({key.split("/")[0] for key in data.files if key.startswith(kinds or "")}):
        case = {key.split("/")[1]: data[key] for key in data.files if key.startswith(name + "/")}
        for output, got, expected, most in RUNS[name.split()[0]](emulate, case):
            error = np.abs(got - expected)
            if not np.all(error <= most):
                wrong.append(f"{name} {output}: off by {np.max(error):.2e}")
    return wrong


def address(x):
    return x.__array_interface__["data"][0]


def addresses(*arrays):
    return [address(x) for x in arrays]


def unwritten(shape, t):
    return np.full(shape, -1, np.int16) if t else np.full(shape, np.nan, np.float32)


def values(x, t):
    """An array of type t in float64; numpy has no bfloat16."""
    if x.dtype != np.int16:
        return x.astype(np.float64)
    if t == FLOAT16:
        return x.view(np.float16).astype(np.float64)
    return (x.astype(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def ulp(t):
    return (2. ** -23, 2. ** -8, 2. ** -11)[t]


def run_attention(emulate, case):
    t, B, N, H, prefix, h, w = (int(s) for s in case["sizes"])
    o, lse = unwritten((B, N, H * 64), t), unwritten((B, H, N), FLOAT32)
    delta, dqkv = unwritten((B, H, N), FLOAT32), unwritten((B, N, 3, H, 64), t)
    shape = (t, B, N, H, prefix, h, w, *addresses(case["rows"], case["cols"], case["qkv"]))
    emulate.attention_forward(*shape, *addresses(o, lse))
    emulate.attention_backward(*shape, *addresses(o, lse, case["dout"], delta, dqkv))
    yield "o", values(o, t), case["expected_o"], case["bounds"][0]
    yield "lse", values(lse, FLOAT32), case["expected_lse"], case["bounds"][1]
    for j, name in enumerate(("dq", "dk", "dv")):
        yield name, values(dqkv, t)[:, :, j], case["expected_dqkv"][:, :, j], case["bounds"][3 + j]


def run_gaussian(emulate, case):
    t, B, n, seed, offset = (int(s) for s in case["sizes"])
    z, kl, partial = unwritten((B, n), t), unwritten(B, FLOAT32), np.full(B * emulate.partials(n), np.nan)
    dmu, dlogvar = unwritten((B, n), t), unwritten((B, n), t)
    shape = (t, B, n, seed, offset, *addresses(case["mu"], case["logvar"]))
    emulate.reparameterize_forward(*shape, *addresses(z, kl, partial))
    emulate.reparameterize_backward(*shape, *addresses(case["dz"], case["dkl"], dmu, dlogvar))
    yield "kl", values(kl, FLOAT32), case["expected_kl"], 2e-6 * np.abs(case["expected_kl"])
    for name, got in (("z", z), ("dmu", dmu), ("dlogvar", dlogvar)):
        expected = case[f"expected_{name}"]
        yield name, values(got, t), expected, ulp(t) * np.abs(expected) + 1e-6 * case[f"scale_{name}"]


def run_error(emulate, case):
    t, n = (int(s) for s in case["sizes"])
    mean, da, dmean = unwritten(1, FLOAT32), unwritten(n, t), np.array([3], np.float32)
    partial = np.full(emulate.partials(n), np.nan)
    emulate.squared_error_forward(t, n, *addresses(case["a"], case["b"], mean, partial))
    emulate.squared_error_backward(t, n, *addresses(case["a"], case["b"], dmean, da))
    yield "mean", values(mean, FLOAT32), case["expected_mean"], 2e-6
    yield "da", values(da, t), case["expected_da"], ulp(t) * np.abs(case["expected_da"]) + 1e-7


def run_norm(emulate, case):
    t, B, rows, C, groups = (int(s) for s in case["sizes"])
    mean, rstd = unwritten((B, groups), FLOAT32), unwritten((B, groups), FLOAT32)
    y, dx = unwritten((B, rows, C), t), unwritten((B, rows, C), t)
    dweight, dbias = unwritten(C, FLOAT32), unwritten(C, FLOAT32)
    partial = unwritten(emulate.norm_partials(B, rows, C), FLOAT32)
    sums, slope = np.full(B * 2 * C, np.nan), unwritten(B * 2 * groups, FLOAT32)
    inputs = addresses(case["x"], case["weight"], case["bias"])
    emulate.group_norm_silu_forward(t, B, rows, C, groups, 1e-6, *inputs, *addresses(mean, rstd, y, partial))
    emulate.group_norm_silu_backward(
        t, B, rows, C, groups, *inputs,
        *addresses(mean, rstd, case["dy"], dx, dweight, dbias, partial, sums, slope))

    # The means of pieces are rounded to fp32, and they are at most a deviation (or so) from the mean of all.
    m, r = case["expected_mean"], case["expected_rstd"]
    yield "mean", values(mean, FLOAT32), m, 2. ** -23 * np.abs(m) + 1e-7
    yield "rstd", values(rstd, FLOAT32), r, (1e-6 + 2. ** -24 * np.abs(m) * r) * r
    outputs = (("y", y, t), ("dx", dx, t), ("dweight", dweight, FLOAT32), ("dbias", dbias, FLOAT32))
    for (name, got, u), most in zip(outputs, case["bounds"]):
        expected = case[f"expected_{name}"]
        yield name, values(got, u), expected, most + (ulp(t) * np.abs(expected) if u else 0)


RUNS = {"attention": run_attention, "gaussian": run_gaussian, "error": run_error, "norm": run_norm}


# ------------------------------------------------------------------ build

def compile_binding(folder):
    import pybind11
    out = Path(folder) / "emulate.o"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    source = EMULATION / "emulate.cpp"
    subprocess.run(["g++", "-std=c++20", "-O0", "-fPIC", *includes, "-c", source, "-o", out], check=True)
    return out


def compile_kernels(folder, binding, build="plain", chunk=80, sources=SOURCES, csrc=CSRC, base=None):
    """A module of the emulated kernels; objects of `base` stand in for sources that are not compiled anew."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-w", f"-DSAE_CHUNK_ROWS={chunk}",
             "-include", EMULATION / "simt.h", *SANITIZERS[build]]
    objects = [binding]
    for name in SOURCES:
        out = (folder if name in sources else base) / f"{name}.o"
        if name in sources:
            subprocess.run(["g++", "-x", "c++", *flags, "-c", csrc / name, "-o", out], check=True)
        objects.append(out)
    subprocess.run(["g++", "-shared", *SANITIZERS[build], *objects, "-o", folder / "emulate.so"], check=True)
    return folder / "emulate.so"


def verdict(module, path, build, order, kinds=()):
    """'' when all cases (of these kinds) pass, else what was noticed first."""
    env = dict(os.environ, EMU_ORDER=str(order), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1",
               ASAN_OPTIONS="detect_leaks=0", TSAN_OPTIONS="report_mutex_bugs=0:halt_on_error=1")
    if build != "plain":
        runtime = subprocess.run(["g++", f"-print-file-name=lib{build}.so"], capture_output=True, text=True,
                                 check=True)
        env["LD_PRELOAD"] = runtime.stdout.strip()
    r = subprocess.run([sys.executable, __file__, "run", module, path, *kinds], env=env, capture_output=True,
                       text=True, timeout=900)
    text = r.stdout + r.stderr
    for mark in ("data race", "AddressSanitizer: ", "emulation: ", "off by"):
        for line in text.splitlines():
            if mark in line:
                return line.strip()[:110]
    return "" if r.returncode == 0 else f"exit status {r.returncode}: {text[-300:]}"


def check(folder, binding, base, path, mutant):
    source, name, build, text, replacement = mutant
    code = (CSRC / source).read_text()
    if code.count(text) != 1:
        return f"the text of this mutant occurs {code.count(text)} times in {source}"
    csrc = folder / "csrc"
    csrc.mkdir(parents=True)
    for f in CSRC.iterdir():
        if f.name == source:
            (csrc / f.name).write_text(code.replace(text, replacement))
        else:
            (csrc / f.name).symlink_to(f)
    changed = INCLUDED_BY.get(source, (source,))
    module = compile_kernels(folder, binding, build, sources=changed, csrc=csrc, base=base[build])
    kinds = [kind for name in changed for kind in CASES_OF[name]]
    orders = (0, 1) if build == "plain" else (0,)
    return next(filter(None, (verdict(module, path, build, order, kinds) for order in orders)), "")


def main(only=""):
    """Returns the survivors' names; `only` chooses the mutants whose name has it."""
    mutants = [m for m in MUTANTS if only in m[1]]
    survivors = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folder = Path(folder)
        path = folder / "cases.npz"
        cases(SMALL, path, NORMS)
        binding = compile_binding(folder)
        build = lambda b: compile_kernels(folder / b, binding, b)
        modules = dict(zip(SANITIZERS, pool.map(build, SANITIZERS)))
        runs = [("plain", 0), ("plain", 1), ("asan", 0), ("tsan", 0)]
        unbroken = pool.map(lambda run: verdict(modules[run[0]], path, *run), runs)
        for what, found in zip(("plain", "plain, descending", "asan", "tsan"), unbroken):
            print(f"unbroken, {what:40s}", found or "passes", flush=True)
            survivors += [f"the unbroken kernels fail ({what})"] * bool(found)

        base = {b: folder / b for b in SANITIZERS}
        look = lambda i: check(folder / str(i), binding, base, path, mutants[i])
        found = pool.map(look, range(len(mutants)))
        for mutant, f in zip(mutants, found):
            print(f"{mutant[2]:6s} {mutant[1]:60s}", f or "SURVIVES", flush=True)
            survivors += [mutant[1]] * (not f or f.startswith("the text"))
    return survivors


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        wrong = run(*sys.argv[2:])
        print("\n".join(wrong))
        sys.exit(bool(wrong))
    sys.path.insert(0, str(CSRC.parent))
    survivors = main(*sys.argv[1:])
    print(f"{len(survivors)} survive")
    sys.exit(bool(survivors))
