"""S-AE, the Semantic Auto-encoder: one latent space for understanding and generation.

    x [B,3,H,W] -> DINOv3 -> patch tokens h [B,D,H/16,W/16] -> mu, logvar
      -> z = mu + exp(logvar/2) eps -> CNN decoder -> xhat [B,3,H,W]

Images are in [-1, 1] at every boundary of this file.
Letters: B batch, N tokens, D width, H and W pixels (or H heads, next to N), h and w the grid of patches.
"""
import math
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------ ops
# Each op has one public function and a readable reference beside it. csrc/ holds the same ops in C++ and CUDA for float32, bfloat16
# and float16; whatever it does not serve (float64, heads that are not 64 wide, other devices) takes the reference.

def load_csrc(so, sources):
    """Load the extension `so`: None, or the sentence that says why it is not used. `sources` is the folder that it was built from."""
    if not so.exists():
        return f'{so.name} is not beside sae.py'
    try:
        torch.ops.load_library(so)
    except OSError as error:
        return f'{so.name} does not load ({error})'
    crc = 0
    for path in sorted(sources.iterdir()) if sources.is_dir() else ():
        crc = zlib.crc32(path.name.encode() + b'\0' + path.read_bytes(), crc)
    if crc not in (0, torch.ops.sae.source_crc()):
        return f'{so.name} is older than csrc/'
    if torch.cuda.is_available() and not torch.ops.sae.has_cuda():
        return f'{so.name} was built without CUDA'
    return None


HERE = Path(__file__).resolve().parent
NO_CSRC = load_csrc(HERE / 'sae_csrc.so', HERE / 'csrc')
if NO_CSRC and os.environ.get('LOCAL_RANK', '0') == '0':
    print(f'sae: {NO_CSRC}: the slower reference ops serve; `pip install --no-build-isolation -e .` builds it', file=sys.stderr)


def in_csrc(x):
    return NO_CSRC is None and x.device.type in ('cpu', 'cuda') and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def wide(x):
    """x in fp32, or as it is when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_tables(h, w, head_dim=64, base=100.0, device=None):
    """(cos, sin) of DINOv3's axial RoPE for a grid of h x w patches: ([h, head_dim/4, 2], [w, head_dim/4, 2]), fp32.

    The angle of a patch centre c in [-1, 1] (per axis) and of frequency j is 2 pi c / base^(4j / head_dim).
    """
    period = base ** (torch.arange(head_dim // 4, device=device, dtype=torch.float32) * 4 / head_dim)

    def axis(n):
        centre = (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1
        angle = 2 * math.pi * centre[:, None] / period                                   # [n, head_dim/4]
        return torch.stack([angle.cos(), angle.sin()], -1)

    return axis(h), axis(w)


def attention(qkv, rope, prefix):
    """softmax(rope(Q) rope(K)^T / sqrt(d)) V from the packed projection.

    qkv [B,N,3,H,d], rope the tables of `rope_tables(h, w, d)` with N = prefix + h w -> [B,N,H d].
    The first `prefix` tokens (CLS and registers) have no position and are not rotated.
    Deterministic. Raises ValueError when shapes, dtypes or devices do not fit together.
    """
    rows, cols = rope
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] % 4:
        raise ValueError(f'attention: qkv is {list(qkv.shape)}, not [B, N, 3, H, d] with d a multiple of 4')
    d = qkv.shape[4]
    if rows.shape[1:] != (d // 4, 2) or cols.shape[1:] != (d // 4, 2) or prefix < 0 or qkv.shape[1] != prefix + len(rows) * len(cols):
        raise ValueError(f'attention: N {qkv.shape[1]} and d {d} of qkv do not fit prefix {prefix} and rope tables {list(rows.shape)}, '
                         f'{list(cols.shape)}; N is prefix + h w, the tables come from rope_tables(h, w, d)')
    if not rows.device == cols.device == qkv.device or not rows.dtype == cols.dtype == torch.float32:
        raise ValueError(f'attention: rope tables are {rows.dtype} on {rows.device}, {cols.dtype} on {cols.device}; '
                         f'they must be torch.float32 on {qkv.device}')
    if in_csrc(qkv) and d == 64 and qkv.shape[1]:
        return torch.ops.sae.attention(qkv, rows, cols, prefix)[0]
    return attention_reference(qkv, rope, prefix)


def attention_reference(qkv, rope, prefix):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                                       # 3 x [B,H,N,d]
    out = F.scaled_dot_product_attention(rotate(q, rope, prefix), rotate(k, rope, prefix), v)
    return out.transpose(1, 2).flatten(2)                                                # [B,N,H d]


def rotate(x, rope, prefix):
    """Turn the pairs (x[i], x[i + d/2]) of the patch tokens of x [B,H,N,d]: i < d/4 by the row, the others by the column."""
    rows, cols = rope
    h, w = len(rows), len(cols)
    table = torch.cat([rows[:, None].expand(h, w, -1, 2), cols[None].expand(h, w, -1, 2)], 2).flatten(0, 1)
    cos, sin = table.unbind(-1)                                                          # [h w, d/2]
    a, b = wide(x[:, :, prefix:]).chunk(2, -1)                                           # [B,H,h w,d/2]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([x[:, :, :prefix], turned], 2)


def philox_normal(n, seed, offset=0, device=None):
    """Elements offset .. offset+n-1 of the standard normal stream of `seed`: [n], fp32. Philox 4x32-10 and Box-Muller."""
    mask = 0xFFFFFFFF
    first, last = offset // 4, (offset + n + 3) // 4
    block = torch.arange(first, last, device=device, dtype=torch.int64)                  # one block: four normals
    c = [block & mask, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    k0, k1 = seed & mask, seed >> 32 & mask

    def mul(m, x):                                                                       # 32 x 32 -> (high, low) 32 bits
        return (m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16, m * x & mask

    for _ in range(10):
        (h0, l0), (h1, l1) = mul(0xD2511F53, c[0]), mul(0xCD9E8D57, c[2])
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    u = [(x.double() + 0.5) / 2 ** 32 for x in c]                                        # uniform in (0, 1)
    pairs = [((-2 * a.log()).sqrt(), 2 * math.pi * b) for a, b in (u[:2], u[2:])]
    eps = torch.stack([f for r, t in pairs for f in (r * t.cos(), r * t.sin())], -1).flatten()
    return eps[offset - 4 * first:][:n].float()


def reparameterize(mu, logvar, seed, offset=0):
    """z = mu + exp(logvar/2) eps, and KL(q || N(0, I)) summed over each sample: mu, logvar [B,...] -> z [B,...], kl [B] fp32.

    eps is element offset + i of the normal stream of `seed`, both in 0 .. 2^63-1; logvar is clamped to [-30, 20] as in LDM.
    CPU and GPU draw the same eps, bit for bit; `philox_normal` agrees to a few ulp. Raises ValueError for a pair that does not match.
    """
    if mu.shape != logvar.shape or mu.dtype != logvar.dtype or mu.device != logvar.device or mu.dim() < 2:
        raise ValueError(f'reparameterize: mu is {list(mu.shape)} {mu.dtype} {mu.device} and logvar {list(logvar.shape)} {logvar.dtype} '
                         f'{logvar.device}; they must be alike, [B, ...]')
    if not 0 <= seed < 2 ** 63 or not 0 <= offset < 2 ** 63:
        raise ValueError(f'reparameterize: seed {seed} and offset {offset} must be in 0 .. 2^63-1')
    if in_csrc(mu):
        return torch.ops.sae.reparameterize(mu, logvar, seed, offset)
    return reparameterize_reference(mu, logvar, seed, offset)


def reparameterize_reference(mu, logvar, seed, offset=0):
    eps = philox_normal(mu.numel(), seed, offset, mu.device).view(mu.shape)
    m, v = wide(mu), wide(logvar).clamp(-30, 20)
    # KL = 1/2 sum(mu^2 + var - 1 - logvar)
    kl = 0.5 * (m * m + v.exp() - 1 - v).flatten(1).sum(1)
    return (m + (v / 2).exp() * eps).to(mu.dtype), kl


def feature_mse(student, teacher):
    """Mean over tokens and channels of (student - teacher)^2, a scalar in fp32; the gradient goes to the student alone.

    Deterministic. Raises ValueError when the shapes or devices differ; of two dtypes the wider one is taken.
    """
    if student.shape != teacher.shape or student.device != teacher.device:
        raise ValueError(f'feature_mse: student is {list(student.shape)} on {student.device} and teacher {list(teacher.shape)} on '
                         f'{teacher.device}; they must be alike')
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    return torch.ops.sae.feature_mse(student, teacher) if in_csrc(student) else feature_mse_reference(student, teacher)


def feature_mse_reference(student, teacher):
    return (wide(student) - wide(teacher.detach())).square().mean()


def register_csrc():
    """Autograd and, for torch.compile, the shapes of the ops in csrc. Backward needs no op that has a backward of its own."""
    csrc = torch.ops.sae

    def register(name, shape, shape_of_gradient, saved, gradient):
        def setup_context(ctx, inputs, output):
            ctx.numbers = [x for x in inputs if not isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*saved(inputs, output))

        torch.library.register_fake(f'sae::{name}', shape)
        torch.library.register_fake(f'sae::{name}_backward', shape_of_gradient)
        torch.library.register_autograd(f'sae::{name}', gradient, setup_context=setup_context)

    register('attention',
             lambda qkv, rows, cols, prefix: (qkv.new_empty(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]),
                                              qkv.new_empty(qkv.shape[0], qkv.shape[3], qkv.shape[1], dtype=torch.float32)),
             lambda dout, qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
             lambda inputs, output: (*inputs[:3], *output),                              # qkv, rows, cols, out, lse
             lambda ctx, dout, dlse: (csrc.attention_backward(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None))
    register('reparameterize',
             lambda mu, logvar, seed, offset: (torch.empty_like(mu, memory_format=torch.contiguous_format),
                                               mu.new_empty(mu.shape[0], dtype=torch.float32)),
             lambda dz, dkl, mu, *_: tuple(torch.empty_like(mu, memory_format=torch.contiguous_format) for _ in range(2)),
             lambda inputs, output: inputs[:2],                                          # mu, logvar; eps is drawn again
             lambda ctx, dz, dkl: (*csrc.reparameterize_backward(dz, dkl, *ctx.saved_tensors, *ctx.numbers), None, None))
    register('feature_mse',
             lambda student, teacher: student.new_empty([], dtype=torch.float32),
             lambda dloss, student, teacher: torch.empty_like(student, memory_format=torch.contiguous_format),
             lambda inputs, output: inputs,
             lambda ctx, dloss: (csrc.feature_mse_backward(dloss, *ctx.saved_tensors), None))


if NO_CSRC is None:
    register_csrc()


# ------------------------------------------------------------------ safetensors


# ------------------------------------------------------------------ DINOv3


# ------------------------------------------------------------------ autoencoder
