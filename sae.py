"""S-AE, the Semantic Auto-encoder: one latent space for understanding and generation.

    x [B,3,H,W] -> DINOv3 -> patch tokens h [B,D,H/16,W/16] -> mu, logvar [B,z_dim,h,w]
      -> z = mu + exp(logvar/2) eps -> CNN decoder -> xhat [B,3,H,W]

    sae = SAE.from_pretrained("runs/stage2-reg100/last.pt")   # EMA weights, eval mode
    z = sae.encode(x).mode()                                  # or .sample(seed)
    xhat = sae.decode(z)

Images are in [-1, 1] at every boundary of this file. "Reading:" marks a choice of ours where the paper is silent.
Letters: B batch, N tokens, D width, H and W pixels (or H heads, next to N), h and w the grid of patches or latents.
"""
import json
import math
import mmap
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary


# ------------------------------------------------------------------ ops
# Each op has one public function and a readable reference beside it. csrc/ holds the same ops in C++ and CUDA for float32, bfloat16
# and float16; whatever it does not serve (float64, heads that are not 64 wide, other devices) takes the reference.

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
        raise ValueError(f"attention: qkv is {list(qkv.shape)}, not [B, N, 3, H, d] with d a multiple of 4")
    d = qkv.shape[4]
    if rows.shape[1:] != (d // 4, 2) or cols.shape[1:] != (d // 4, 2) or prefix < 0 or qkv.shape[1] != prefix + len(rows) * len(cols):
        raise ValueError(f"attention: N {qkv.shape[1]} and d {d} of qkv do not fit prefix {prefix} and rope tables {list(rows.shape)}, "
                         f"{list(cols.shape)}; N is prefix + h w, the tables come from rope_tables(h, w, d)")
    if not rows.device == cols.device == qkv.device or not rows.dtype == cols.dtype == torch.float32:
        raise ValueError(f"attention: rope tables are {rows.dtype} on {rows.device}, {cols.dtype} on {cols.device}; "
                         f"they must be torch.float32 on {qkv.device}")
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

    def mul(m, x):              # (high, low) 32 bits of m x, by halves of x: m x itself does not fit in int64
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
        raise ValueError(f"reparameterize: mu is {list(mu.shape)} {mu.dtype} {mu.device} and logvar {list(logvar.shape)} {logvar.dtype} "
                         f"{logvar.device}; they must be alike, [B, ...]")
    if not 0 <= seed < 2 ** 63 or not 0 <= offset < 2 ** 63:
        raise ValueError(f"reparameterize: seed {seed} and offset {offset} must be in 0 .. 2^63-1")
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
        raise ValueError(f"feature_mse: student is {list(student.shape)} on {student.device} and teacher {list(teacher.shape)} on "
                         f"{teacher.device}; they must be alike")
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    return torch.ops.sae.feature_mse(student, teacher) if in_csrc(student) else feature_mse_reference(student, teacher)


def feature_mse_reference(student, teacher):
    return (wide(student) - wide(teacher.detach())).square().mean()


def group_norm_silu(x, weight, bias, groups, eps=1e-6):
    """silu(group_norm(x)): x [B,C,h,w], weight and bias [C] in fp32 or in x's dtype -> [B,C,h,w] of x's dtype, in channels_last.

    A group is C / groups neighbouring channels of one sample; mean and rstd are fp32, and accurate where the mean is far larger than
    the deviation. Backward keeps x, mean and rstd, not the normalised tensor. Deterministic. A contiguous x is converted to
    channels_last. Under autocast bf16 stays bf16. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    if x.dim() != 4 or groups < 1 or not x.shape[1] or x.shape[1] % groups or not x.shape[2] * x.shape[3]:
        raise ValueError(f"group_norm_silu: x is {list(x.shape)}, not [B, C, h, w] with C a multiple of the {groups} groups and "
                         "no side 0")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != x.shape[1:2] or t.dtype not in (torch.float32, x.dtype) or t.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is {list(t.shape)} {t.dtype} {t.device}; it must be [{x.shape[1]}], "
                             f"torch.float32 or {x.dtype}, on {x.device}")
    if in_csrc(x):
        rows = x.permute(0, 2, 3, 1)                                                     # [B,h,w,C]: as channels_last lies in memory
        return torch.ops.sae.group_norm_silu(rows, wide(weight), wide(bias), groups, eps)[0].permute(0, 3, 1, 2)
    return group_norm_silu_reference(x, weight, bias, groups, eps)


def group_norm_silu_reference(x, weight, bias, groups, eps=1e-6):
    y = F.silu(torch.group_norm(wide(x), groups, wide(weight), wide(bias), eps))         # F.group_norm refuses one value a group
    return y.to(x.dtype, memory_format=torch.channels_last)


def load_csrc(so, sources):
    """Load the extension `so`: None, or the sentence that says why it is not used. `sources` is the folder that it was built from."""
    if not so.exists():
        return f"{so.name} is not beside sae.py"
    try:
        torch.ops.load_library(so)
    except OSError as error:
        return f"{so.name} does not load ({error})"
    crc = 0
    for path in sorted(sources.iterdir()) if sources.is_dir() else ():
        crc = zlib.crc32(path.name.encode() + b"\0" + path.read_bytes(), crc)
    if crc not in (0, torch.ops.sae.source_crc()):
        return f"{so.name} is older than csrc/"
    if torch.cuda.is_available() and not torch.ops.sae.has_cuda():
        return f"{so.name} was built without CUDA"
    return None


HERE = Path(__file__).resolve().parent
NO_CSRC = load_csrc(HERE / "sae_csrc.so", HERE / "csrc")
if NO_CSRC and os.environ.get("LOCAL_RANK", "0") == "0":
    print(f"sae: {NO_CSRC}: the slower reference ops serve; `pip install --no-build-isolation -e .` builds it", file=sys.stderr)


def in_csrc(x):
    # Not in forward-mode AD: the ops have no derivative for it, and PyTorch would take it for 0.
    if NO_CSRC or forward_ad._current_level >= 0 or x.device.type not in ("cpu", "cuda"):
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def register_csrc():
    """Autograd and, for torch.compile, the shapes of the ops in csrc. A gradient of a gradient is refused."""
    csrc = torch.ops.sae

    def register(name, shape, shape_of_gradient, saved, gradient):
        def setup_context(ctx, inputs, output):
            ctx.numbers = [x for x in inputs if not isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*saved(inputs, output))

        def refuse(ctx, *gradients):
            raise RuntimeError(f"{name} of csrc has a gradient, but no gradient of its gradient: {name}_reference has one")

        torch.library.register_fake(f"sae::{name}", shape)
        torch.library.register_fake(f"sae::{name}_backward", shape_of_gradient)
        torch.library.register_autograd(f"sae::{name}", gradient, setup_context=setup_context)
        torch.library.register_autograd(f"sae::{name}_backward", refuse)

    register("attention",
             lambda qkv, rows, cols, prefix: (qkv.new_empty(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]),
                                              qkv.new_empty(qkv.shape[0], qkv.shape[3], qkv.shape[1], dtype=torch.float32)),
             lambda dout, qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
             lambda inputs, output: (*inputs[:3], *output),                              # qkv, rows, cols, out, lse
             lambda ctx, dout, dlse: (csrc.attention_backward(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None))
    register("reparameterize",
             lambda mu, logvar, seed, offset: (torch.empty_like(mu, memory_format=torch.contiguous_format),
                                               mu.new_empty(mu.shape[0], dtype=torch.float32)),
             lambda dz, dkl, mu, *_: tuple(torch.empty_like(mu, memory_format=torch.contiguous_format) for _ in range(2)),
             lambda inputs, output: inputs[:2],                                          # mu, logvar; eps is drawn again
             lambda ctx, dz, dkl: (*csrc.reparameterize_backward(dz, dkl, *ctx.saved_tensors, *ctx.numbers), None, None))
    register("feature_mse",
             lambda student, teacher: student.new_empty([], dtype=torch.float32),
             lambda dloss, student, teacher: torch.empty_like(student, memory_format=torch.contiguous_format),
             lambda inputs, output: inputs,
             lambda ctx, dloss: (csrc.feature_mse_backward(dloss, *ctx.saved_tensors), None))
    register("group_norm_silu",
             lambda x, weight, bias, groups, eps: (torch.empty_like(x, memory_format=torch.contiguous_format),
                                                   *(x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))),
             lambda dy, x, weight, *_: (torch.empty_like(x, memory_format=torch.contiguous_format),
                                        *(torch.empty_like(weight, memory_format=torch.contiguous_format) for _ in range(2))),
             lambda inputs, output: (*inputs[:3], *output[1:]),                          # x, weight, bias, mean, rstd
             lambda ctx, dy, *_: (*csrc.group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.numbers[0]), None, None))


if NO_CSRC is None:
    register_csrc()


# ------------------------------------------------------------------ DINOv3

@dataclass
class DINOv3Config:
    """The architecture of one DINOv3 ViT; the defaults are H/16+. `from_pretrained` reads it off the tensors, all but head_dim."""
    width: int = 1280
    depth: int = 32
    head_dim: int = 64          # 128 for 7B, which is known by its width
    hidden: int = 5120          # of the MLP
    gated: bool = True          # SwiGLU (S+, L+, H+, 7B) or GELU (S, B, L)
    qkv_bias: bool = True       # on Q and V; K never has one
    registers: int = 4


def check_images(x, multiple):
    """ValueError unless x is [B,3,H,W] of a floating dtype, with H and W multiples of `multiple`."""
    if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"images are [B,3,H,W] in [-1,1] of a floating dtype, not {list(x.shape)} {x.dtype}: 8 bits become x / 127.5 - 1")
    H, W = x.shape[2:]
    if H % multiple or W % multiple or not H * W:
        raise ValueError(f"images must have sides that are multiples of {multiple}, not {H}x{W}: crop or resize them")


class MLP(nn.Module):
    """GELU MLP, or SwiGLU: down(silu(gate(x)) up(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.gate = nn.Linear(cfg.width, cfg.hidden) if cfg.gated else None
        self.up = nn.Linear(cfg.width, cfg.hidden)
        self.down = nn.Linear(cfg.hidden, cfg.width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gate else F.gelu(self.up(x)))


class QKV(nn.Linear):
    """The packed projection of Q, K and V; its bias comes with x, since K has none."""

    def forward(self, x, bias):
        return F.linear(x, self.weight, bias)


class Block(nn.Module):
    """x + ls1 attn(norm1(x)), then x + ls2 mlp(norm2(x)); ls is LayerScale, a learned factor per channel."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.head_dim, self.prefix = cfg.head_dim, 1 + cfg.registers
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-5), nn.LayerNorm(D, eps=1e-5)
        self.qkv, self.proj, self.mlp = QKV(D, 3 * D, bias=False), nn.Linear(D, D), MLP(cfg)
        self.q_bias = nn.Parameter(torch.zeros(D)) if cfg.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(D)) if cfg.qkv_bias else None
        self.ls1, self.ls2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x, rope):
        # DINOv3 has no K bias. Softmax would cancel one, were there no RoPE; as it is, K's part of the packed bias is zeros.
        bias = None if self.q_bias is None else torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(self.norm1(x), bias).unflatten(-1, (3, -1, self.head_dim))        # [B,N,3,H,d]
        x = x + self.ls1 * self.proj(attention(qkv, rope, self.prefix))
        return x + self.ls2 * self.mlp(self.norm2(x))


class DINOv3(nn.Module):
    """DINOv3 ViT (Simeoni et al. 2025): `cls, registers, patches = encoder(x)`.

    x [B,3,H,W] in [-1,1], H and W multiples of 16 -> final-norm tokens [B,D], [B,R,D], [B,h w,D], row by row.
    The positions are those of the patch centres, always: DINOv3's own training jitters and rescales them,
    but a student and a teacher that see different positions cannot agree, so there is no code for it here.
    """
    patch = 16

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False        # checkpointing: recompute each block in the backward pass
        D = cfg.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.registers = nn.Parameter(torch.zeros(1, cfg.registers, D))
        self.patch_embed = nn.Conv2d(3, D, self.patch, self.patch)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(D, eps=1e-5)
        # ImageNet mean and std, moved from [0,1] to [-1,1]. Named device: from_pretrained builds the rest on "meta".
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device="cpu").view(3, 1, 1) * 2 - 1, persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device="cpu").view(3, 1, 1) * 2, persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, x):
        check_images(x, self.patch)
        B, _, H, W = x.shape
        x = ((x - self.mean) / self.std).to(self.patch_embed.weight.dtype)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)                         # [B,h w,D]
        x = torch.cat([self.cls_token.expand(B, -1, -1), self.registers.expand(B, -1, -1), patches], 1)  # [B,N,D]
        rope = rope_tables(H // self.patch, W // self.patch, self.cfg.head_dim, device=x.device)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        x = self.norm(x)
        return x[:, 0], x[:, 1:1 + self.cfg.registers], x[:, 1 + self.cfg.registers:]

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """The encoder in a file: safetensors in Hugging Face's or timm's naming, or Meta's .pth; any width and depth.

        Raises ValueError when a tensor is missing, left over, or of a shape that does not fit, and lists the names.
        A tensor that has `dtype` already is not copied: it stays in the mapped file until it is written to.
        """
        cfg, tensors = read_dinov3(load_tensors(path), path, dtype)
        with torch.device("meta"):
            model = cls(cfg)
        expected = {n: p.shape for n, p in model.state_dict().items()}
        wrong = [f"missing {n}" for n in expected if n not in tensors] + [f"left over {n}" for n in tensors if n not in expected]
        wrong += [f"{n} is {list(t.shape)}, not {list(expected[n])}" for n, t in tensors.items() if t.shape != expected.get(n, t.shape)]
        if wrong:
            raise ValueError(f"{path} is not a DINOv3 ViT of width {cfg.width} and depth {cfg.depth}: {'; '.join(wrong)}")
        model.load_state_dict(tensors, assign=True)
        return model.eval()


# Hugging Face's, timm's and Meta's names -> ours, applied in turn.
RENAMES = [(re.compile(a), b) for a, b in [
    (r"^embeddings\.", ""), (r"^(model\.)?layer\.", "blocks."), (r"\.(attention|attn)\.", "."),
    (r"^(register_tokens|reg_token|storage_tokens)$", "registers"),
    (r"^(patch_embeddings|patch_embed\.proj)\.", "patch_embed."),
    (r"\.o_proj\.", ".proj."), (r"\.([qkv])_proj\.bias$", r".\1_bias"),
    (r"\.(?:layer_scale([12])\.lambda1|gamma_([12])|ls([12])\.gamma)$", lambda m: f".ls{m[1] or m[2] or m[3]}"),
    (r"\.mlp\.(gate_proj|fc1_g|w1)\.", ".mlp.gate."), (r"\.mlp\.(up_proj|fc1_x|fc1|w2)\.", ".mlp.up."),
    (r"\.mlp\.(down_proj|fc2|w3)\.", ".mlp.down."),
]]
# Left out: what pre-training alone uses (the mask token, 7B's norm for local crops), and RoPE's periods, which rope_tables computes.
PRETRAINING_ONLY = re.compile(r"^(mask_token|local_cls_norm\..*|rope_embed\.periods)$")


def read_dinov3(tensors, path, dtype):
    """(config, tensors under our names) of a DINOv3 checkpoint. Packs Q, K and V; folds Meta's bias_mask."""
    ours = {}
    for name, t in tensors.items():
        for pattern, to in RENAMES:
            name = pattern.sub(to, name)
        if not PRETRAINING_ONLY.match(name):
            ours[name] = t
    depth = len({n.split(".")[1] for n in ours if n.startswith("blocks.")})
    if not depth or "cls_token" not in ours or "registers" not in ours:
        raise ValueError(f"{path} holds no DINOv3 ViT: no cls_token, register tokens or blocks among its {len(ours)} tensors")
    for i in range(depth):
        b = f"blocks.{i}."
        parts = [ours.pop(f"{b}{c}_proj.weight") for c in "qkv" if f"{b}{c}_proj.weight" in ours]
        if parts:
            ours[b + "qkv.weight"] = torch.cat([p.to(dtype) for p in parts])
            for p in parts:
                release(p)
        if b + "qkv.bias" in ours:
            # Meta's bias_mask is 0 on the K part, where the bias may hold anything, NaN included.
            bias = ours.pop(b + "qkv.bias")
            bias = torch.where(ours.pop(b + "qkv.bias_mask", torch.ones_like(bias)) != 0, bias, torch.zeros_like(bias))
            ours[b + "q_bias"], k_bias, ours[b + "v_bias"] = bias.chunk(3)
            ours[b + "k_bias"] = k_bias
        if b + "k_bias" in ours and not ours[b + "k_bias"].any():
            del ours[b + "k_bias"]                                     # any other K bias stays, and is refused as left over
    width = ours["cls_token"].shape[-1]
    up = ours.get("blocks.0.mlp.up.weight")
    cfg = DINOv3Config(width, depth, 128 if width == 4096 else 64, 4 * width if up is None else len(up),
                       "blocks.0.mlp.gate.weight" in ours, "blocks.0.q_bias" in ours, ours["registers"].shape[1])
    if width % cfg.head_dim:
        raise ValueError(f"{path} holds no DINOv3 ViT: its width {width} is no multiple of {cfg.head_dim}, the width of a head")
    for n, t in ours.items():
        if not t.is_floating_point():
            raise ValueError(f"{path} holds {n} as {t.dtype}: quantised weights are not read, fetch the original")
    return cfg, {n: t.to(dtype) for n, t in ours.items()}


# ------------------------------------------------------------------ autoencoder

@dataclass
class SAEConfig:
    """The architecture of an S-AE; saved in every checkpoint. The defaults are the paper's."""
    encoder: DINOv3Config = field(default_factory=DINOv3Config)
    f: int = 16                 # pixels per latent: 16, 32 or 64
    z_dim: int = 1280           # latent channels; fewer than the encoder's width for small GPUs
    widths: tuple = (1280, 1024, 512, 256, 128)     # of the decoder, coarse to fine; f 32 and 64 repeat the first
    blocks: int = 2             # residual blocks per resolution of the decoder
    attention: bool = True      # in the middle of the decoder, as LDM has; its cost grows with the 4th power of the side

    @classmethod
    def from_dict(cls, d):
        return cls(**{**d, "encoder": DINOv3Config(**d["encoder"]), "widths": tuple(d["widths"])})


@dataclass
class Posterior:
    """q(z|x) = N(mu, exp(logvar)), mu and logvar [B,z_dim,h,w]."""
    mu: torch.Tensor
    logvar: torch.Tensor

    def mode(self):
        """[B,z_dim,h,w]"""
        return self.mu

    def sample(self, seed, offset=0):
        """[B,z_dim,h,w]: the same draw for the same (seed, offset) on every device; see `reparameterize`."""
        return reparameterize(self.mu, self.logvar, seed, offset)[0]

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over each sample: [B]."""
        return reparameterize(self.mu, self.logvar, 0)[1]


class NormSiLU(nn.GroupNorm):
    """silu(norm(x)), x [B,channels,h,w]."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, x):
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))): LDM's residual block."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = NormSiLU(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(self.norm1(x))
        return self.skip(x) + self.conv2(self.norm2(h))


class AttnBlock(nn.Module):
    """x + proj(attention(norm(x))), one head over the h w positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        norm = self.norm
        y = torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)       # nn.GroupNorm refuses one value a group
        q, k, v = self.qkv(y).flatten(2).transpose(1, 2).chunk(3, -1)                    # 3 x [B,h w,C]
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]     # [B,h w,C]
        return x + self.proj(y.transpose(1, 2).reshape(x.shape))                         # [B,C,h,w]


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution, as one transposed convolution.

    Row m of the upsampled map is row m // 2 of x, so row o of the output is sum_r w[r] x[(o + r - 1) // 2]. With k[t] the sum of w[2 - t] and
    w[3 - t] (0 outside of w), this is sum_j k[o - 2j + 1] x[j], a transposed convolution of stride 2; columns likewise. Its 4x4 kernel
    meets 4 pixels of x for each output, not 9: 2.25 times fewer products, and no map of the larger size is kept for the backward pass.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # On small maps summing the kernels costs more than it saves: at 512 channels and batch 4 on a CPU, 8x8 took 1.9 times as long,
        # and 16x16 at 256 channels 0.8. The choice does not look at the batch, so that ranks and batch sizes round alike.
        if x.shape[2] * x.shape[3] < 256:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernel = F.avg_pool2d(self.conv.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)  # [Cout,Cin,4,4], sums over 2x2
        y = F.conv_transpose2d(x, kernel.transpose(0, 1).contiguous(), stride=2, padding=1)
        return y + self.conv.bias.to(y.dtype)[:, None, None]    # apart: inside, on a CPU, its gradient takes longer than the kernel's


def downsample(cfg):
    """log2(f / 16) groups on the patch tokens' map, each a residual block and a 3x3 convolution of stride 2."""
    D, groups = cfg.encoder.width, int(math.log2(cfg.f // DINOv3.patch))
    return nn.Sequential(*[m for _ in range(groups) for m in (ResBlock(D, D), nn.Conv2d(D, D, 3, stride=2, padding=1))])


def decoder(cfg):
    """z [B,z_dim,h,w] -> xhat [B,3,f h,f w]: conv, middle, `blocks` residual blocks a resolution with upsampling between, conv."""
    widths = (cfg.widths[0],) * (int(math.log2(cfg.f)) + 1 - len(cfg.widths)) + tuple(cfg.widths)
    c = widths[0]
    layers = [nn.Conv2d(cfg.z_dim, c, 3, padding=1), ResBlock(c, c), *([AttnBlock(c)] if cfg.attention else []), ResBlock(c, c)]
    for i, width in enumerate(widths):
        if i:
            layers.append(Upsample(c))
        for _ in range(cfg.blocks):
            layers.append(ResBlock(c, width))
            c = width
    # nn.Identity stands where a SiLU stood once: the names of the parameters after it stay those of older checkpoints.
    return nn.Sequential(*layers, NormSiLU(c), nn.Identity(), nn.Conv2d(c, 3, 3, padding=1))


CHECKPOINT_VERSION = 1


class SAE(nn.Module):
    """The Semantic Auto-encoder.

    encode: x [B,3,H,W] in [-1,1], H and W multiples of f -> Posterior of z [B,z_dim,H/f,W/f].
    decode: z -> xhat [B,3,H,W], about [-1,1], not clamped.
    latent_mean, latent_std [z_dim]: of z over the training images, filled in at the end of training;
    a diffusion model is trained on (z - latent_mean) / latent_std.
    """

    def __init__(self, cfg, encoder=None):
        super().__init__()
        if cfg.f not in (16, 32, 64) or len(cfg.widths) > int(math.log2(cfg.f)) + 1:
            raise ValueError(f"f must be 16, 32 or 64 with at most log2(f) + 1 decoder widths, not f {cfg.f} with widths {cfg.widths}")
        self.config = cfg
        self.encoder = encoder or DINOv3(cfg.encoder)
        self.down = downsample(cfg)
        self.to_latent = nn.Conv2d(cfg.encoder.width, 2 * cfg.z_dim, 1)
        # Reading: the paper names no initialisation. At PyTorch's, logvar is about 0 and the noise as strong as mu;
        # from a standard deviation of exp(-3) the decoder sees the image from the first step on.
        nn.init.zeros_(self.to_latent.weight[cfg.z_dim:])
        nn.init.constant_(self.to_latent.bias[cfg.z_dim:], -6.0)
        self.decoder = decoder(cfg)
        self.register_buffer("latent_mean", torch.zeros(cfg.z_dim))
        self.register_buffer("latent_std", torch.ones(cfg.z_dim))

    def posterior(self, patches, h, w):
        """Patch tokens [B,h w,D] -> Posterior [B,z_dim,16 h/f,16 w/f]."""
        x = patches.transpose(1, 2).unflatten(2, (h, w))                                 # [B,D,h,w]
        return Posterior(*self.to_latent(self.down(x)).chunk(2, 1))

    def encode(self, x):
        check_images(x, self.config.f)
        return self.posterior(self.encoder(x)[2], x.shape[2] // DINOv3.patch, x.shape[3] // DINOv3.patch)

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x, seed, offset=0):
        """One training pass: xhat [B,3,H,W], kl [B], the student's patch tokens [B,N,D]."""
        patches = self.encoder(x)[2]
        q = self.posterior(patches, x.shape[2] // DINOv3.patch, x.shape[3] // DINOv3.patch)
        z, kl = reparameterize(q.mu, q.logvar, seed, offset)
        return self.decode(z), kl, patches

    @classmethod
    def from_pretrained(cls, path):
        """The EMA weights of a checkpoint of train.py, fp32, in eval mode, frozen."""
        ckpt = load_checkpoint(path)
        with torch.device("meta"):
            sae = cls(SAEConfig.from_dict(ckpt["config"]))
        sae.load_state_dict(ckpt["ema"], assign=True)
        return sae.eval().requires_grad_(False)


# ------------------------------------------------------------------ files of weights
# A safetensors file: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data, no gaps.

SAFETENSORS_DTYPES = {              # in the order in which the library lays tensors out: widest first, so that all are aligned
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16,
    "I16": torch.int16, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8,
    "F4": torch.float4_e2m1fn_x2, "BOOL": torch.bool}           # F4: two to a byte, so half of the header's last dimension
MAX_HEADER = 100_000_000                                        # bytes, the library's limit
_pages = WeakTensorKeyDictionary()                              # tensor -> (mapping, first byte, end), for `release`


def load_safetensors(path):
    """{name: tensor} of a safetensors file, in the file's order. The tensors are the mapped file: nothing is read before its use.

    The mapping is private: tensors can be written to and the file does not change. It lives as long as any of its tensors;
    `release(tensor)` gives back the memory of one that is done with. ValueError, naming file and tensor, for what the safetensors
    library refuses and for three things that it takes but only a broken writer makes: a key given twice, data_offsets that are
    no multiple of the item's size, an entry that is no JSON object.
    """
    with open(path, "rb") as file:
        try:
            entries = _safetensors_entries(file)
        except ValueError as error:
            raise ValueError(f"{path} is no valid safetensors file: {error}; fetch or write it again") from error
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        data = torch.empty(0, dtype=torch.uint8)
        if begin < end:
            data = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin, count=end - begin)
        aligned = begin % dtype.itemsize == 0       # false after a header of odd length: legal, but vector code may count on it
        tensors[name] = (data if aligned else data.clone()).view(dtype).reshape(shape)
        if aligned:                                 # whole pages only: the first and the last may belong to a neighbour, too
            _pages[tensors[name]] = mapping, -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    return tensors


def torch_load(path):
    """What torch.save wrote to `path`, on the CPU; mapped, not copied, when the file is of torch 1.6 or later.

    Raises ValueError, one sentence, for a damaged file and for one that holds code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:      # on damaged files torch's readers and unpickler raise a dozen kinds of error
        reason = " ".join([type(e).__name__, *str(e).splitlines()[:1]]).split(". ")[0]
        raise ValueError(f"{path} is damaged, or no file of weights that torch can read: {reason}; fetch or write it again") from e


def load_tensors(path):
    """{name: tensor} of a file of weights: safetensors by its suffix, else a state dict that torch.save wrote (.pth, .pt).

    Raises ValueError, one sentence, for a file that is not there, is damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path)
    tensors = torch_load(path)
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and torch.is_tensor(t) for name, t in tensors.items()):
        raise ValueError(f"{path} holds no tensors by name, but other things: give a file of weights alone")
    return tensors


def release(tensor):
    """Give the memory of a tensor of `load_safetensors` back to the system, for example once it has been copied.

    The tensor stays valid; its next use reads the file again, so changes made to it are lost. Other tensors are left alone.
    """
    mapping, first, end = _pages.get(tensor, (None, 0, 0))
    if first < end:
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


def _demand(good, problem):
    if not good:
        raise ValueError(problem)


def _safetensors_entries(file):
    """[(name, dtype, shape, first byte in the file, end)] by position. All checks are here, before anything is mapped."""
    def unique(pairs):
        for key, n in Counter(key for key, _ in pairs).items():
            _demand(n == 1, f"its header gives {key!r} twice")
        return dict(pairs)

    def number(text):                               # as the library reads them: -0 is a float, and infinity an error
        _demand(math.isfinite(float(text)), f"its header has the number {text:.20}, which is out of range")
        return int(text) if text.isdigit() else float(text)

    def sizes(x):
        return type(x) is list and all(type(i) is int and i < 2 ** 63 for i in x)

    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    _demand(8 + length <= size, f"its {size} bytes are too few for the first 8 and a header of {length}")
    _demand(length <= MAX_HEADER, f"its header of {length} bytes is over the limit of {MAX_HEADER}")
    try:
        text = file.read(length).decode()
        header = json.loads(text, object_pairs_hook=unique, parse_int=number, parse_float=number, parse_constant=number)
        json.dumps(header, ensure_ascii=False).encode()                                  # fails for half a surrogate pair
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    _demand(type(header) is dict, "its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    _demand(metadata is None or type(metadata) is dict and all(type(v) is str for v in metadata.values()),
            "its __metadata__ does not map strings to strings")
    for name, info in header.items():
        _demand(type(info) is dict and info.keys() >= {"dtype", "shape", "data_offsets"} and sizes(info["shape"])
                and sizes(info["data_offsets"]) and len(info["data_offsets"]) == 2,
                f"tensor {name!r} needs a dtype, sizes as shape and two data_offsets, and has {info!r:.200}")
        _demand(info["dtype"] in list(SAFETENSORS_DTYPES), f"tensor {name!r} has the unknown dtype {info['dtype']!r:.80}")

    entries, position = [], 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = info["shape"], info["data_offsets"]
        dtype = SAFETENSORS_DTYPES[info["dtype"]]
        label = f"tensor {name!r} ({info['dtype']} {shape!r:.80})"
        if info["dtype"] == "F4":
            _demand(shape and shape[-1] % 2 == 0, f"{label} needs an even last dimension")
            shape = [*shape[:-1], shape[-1] // 2]
        _demand(all(n < 2 ** 64 for n in accumulate(shape, mul)), f"{label} has more items than 64 bits can count")
        nbytes = math.prod(shape) * dtype.itemsize
        _demand(begin == position, f"{label} begins at byte {begin} of the data, but the one before it ends at {position}")
        _demand(end - begin == nbytes, f"{label} takes {nbytes} bytes, but its data_offsets are {begin} and {end}")
        _demand(8 + length + end <= size, f"{label} should end at byte {8 + length + end}, but the file ends at {size}")
        _demand(begin % dtype.itemsize == 0 or begin == end, f"{label} is misaligned: it begins at byte {begin} of the data")
        entries.append((name, dtype, shape, 8 + length + begin, 8 + length + end))
        position = end
    _demand(8 + length + position == size, f"its tensors end at byte {8 + length + position}, but the file at {size}")
    return entries


def write(path, save):
    """save(file) to a temporary file, flushed to the disk and renamed: `path` appears whole or not at all. An OSError names it."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error       # a full disk's error names no file
    finally:
        part.unlink(missing_ok=True)


def save_safetensors(tensors, path, metadata=None):
    """Write {name: tensor}, of any device and stride, and a metadata of {str: str}. The file appears whole or not at all.

    Its bytes are those that the safetensors library would write, with the metadata in the order of its keys. Tensors that share
    memory are written one by one. ValueError for what the format cannot hold, OSError for what the disk cannot.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    _demand(all(type(x) is str for pair in (metadata or {}).items() for x in pair), f"{path}: metadata must map str to str")
    for name, t in tensors.items():
        _demand(type(name) is str and name != "__metadata__", f"{path}: {name!r} cannot be the name of a tensor")
        _demand(isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta,
                f"{path}: {name!r} is not a tensor with dense data")
        _demand(t.dtype in names, f"{path}: tensor {name!r} is of {t.dtype}, which the format lacks; convert it first")
    order = list(names)
    tensors = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header, position = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, t in tensors:
        shape = [*t.shape[:-1], 2 * t.shape[-1]] if t.dtype == torch.float4_e2m1fn_x2 else [*t.shape]
        header[name] = {"dtype": names[t.dtype], "shape": shape, "data_offsets": [position, position + t.nbytes]}
        position += t.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                                                      # the data begins at a multiple of 8
    _demand(len(text) <= MAX_HEADER, f"{path}: a header of {len(text)} bytes is over the limit of {MAX_HEADER}")

    def save(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in tensors:
            file.write(t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())
    write(path, save)


def load_checkpoint(path):
    """The dict that train.py saved at `path`, on the CPU, mapped, not copied. Raises ValueError, one sentence, for anything else."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    ckpt = torch_load(path)
    if not isinstance(ckpt, dict) or ckpt.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path} is no S-AE checkpoint of version {CHECKPOINT_VERSION}: train.py writes those")
    return ckpt
