"""S-AE, the Semantic Auto-encoder: one latent space for understanding and generation.

    x [B,3,H,W] -> DINOv3 -> patch tokens h [B,D,H/16,W/16] -> mu, logvar
      -> z = mu + exp(logvar/2) eps -> CNN decoder -> xhat [B,3,H,W]

Images are in [-1, 1] at every boundary of this file.
Letters: B batch, N tokens, D width, H and W pixels (or H heads, next to N), h and w the grid of patches.
"""
import math

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------ ops
# Each op has one public function and a readable reference beside it.

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

    qkv [B,N,3,H,d], rope the tables of `rope_tables(h, w)` with N = prefix + h w -> [B,N,H d].
    The first `prefix` tokens (CLS and registers) have no position and are not rotated.
    """
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
    a, b = x[:, :, prefix:].float().chunk(2, -1)                                         # [B,H,h w,d/2]
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

    eps is element offset + i of the normal stream of `seed`; logvar is clamped to [-30, 20] as in LDM.
    """
    return reparameterize_reference(mu, logvar, seed, offset)


def reparameterize_reference(mu, logvar, seed, offset=0):
    eps = philox_normal(mu.numel(), seed, offset, mu.device).view(mu.shape)
    m, v = mu.float(), logvar.float().clamp(-30, 20)
    # KL = 1/2 sum(mu^2 + var - 1 - logvar)
    kl = 0.5 * (m * m + v.exp() - 1 - v).flatten(1).sum(1)
    return (m + (v / 2).exp() * eps).to(mu.dtype), kl


def feature_mse(student, teacher):
    """Mean over tokens and channels of (student - teacher)^2, fp32; the gradient goes to the student alone."""
    return feature_mse_reference(student, teacher)


def feature_mse_reference(student, teacher):
    return (student.float() - teacher.detach().float()).square().mean()


# ------------------------------------------------------------------ safetensors


# ------------------------------------------------------------------ DINOv3


# ------------------------------------------------------------------ autoencoder
