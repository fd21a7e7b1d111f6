"""S-AE, the Semantic Auto-encoder: one latent space for understanding and generation.

    x [B,3,H,W] -> DINOv3 -> patch tokens [B,D,H/16,W/16] -> mu, logvar [B,z_dim,H/f,W/f]
      -> z = mu + exp(logvar/2) eps -> CNN decoder -> xhat [B,3,H,W]

    sae = SAE.from_pretrained("runs/stage2-reg100/last.pt")   # EMA weights, eval mode
    z = sae.encode(x).mode()                                  # or .sample(seed)
    xhat = sae.decode(z)
    y = sae.normalize(z)                                      # what a diffusion model is trained on
    sae.save_pretrained("s-ae")                               # a folder to publish; from_pretrained reads it

Images are in [-1, 1] at every boundary of this file. "Reading:" marks a choice of ours where the paper is
silent. Letters: B batch, N tokens, D width, H and W pixels (or H heads, next to N), h and w the grid of
patches or latents. The order is ops, DINOv3, autoencoder; files of weights are in sae_weights.py.
"""
import math
import os
import sys
import zlib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sae_weights import assign, config_of_dinov3, export, load_sae, load_tensors, rename_dinov3, require

# ------------------------------------------------------------------ ops
# Each op has one public function and a readable reference beside it. csrc/ holds the same ops in C++ and CUDA
# for float32, bfloat16 and float16; the reference takes what csrc does not serve: float64, heads that are not
# 64 wide, other devices that have float64.

def wide(x):
    """x in fp32, or as it is when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def describe(x):
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def rope_tables(h, w, head_dim=64, base=100.0, device=None):
    """(cos, sin) of DINOv3's axial RoPE for h x w patches: ([h, head_dim/4, 2], [w, head_dim/4, 2]), fp32.

    The angle of a patch centre c in [-1, 1] (per axis) and of frequency j is 2 pi c / base^(4j / head_dim).
    """
    period = base ** (torch.arange(head_dim // 4, device=device, dtype=torch.float32) * 4 / head_dim)

    def axis(n):
        centre = (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1
        angle = 2 * math.pi * centre[:, None] / period                          # [n, head_dim/4]
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
    N, d = qkv.shape[1], qkv.shape[4]
    tables_fit = rows.shape[1:] == cols.shape[1:] == (d // 4, 2)
    if not tables_fit or prefix < 0 or N != prefix + len(rows) * len(cols):
        raise ValueError(f"attention: N {N} and d {d} of qkv do not fit prefix {prefix} and rope tables "
                         f"{list(rows.shape)}, {list(cols.shape)} of rope_tables(h, w, d): N is prefix + h w")
    if not rows.device == cols.device == qkv.device or not rows.dtype == cols.dtype == torch.float32:
        raise ValueError(f"attention: rope tables are {describe(rows)} and {describe(cols)}; "
                         f"they must be torch.float32 on {qkv.device}")
    if in_csrc(qkv) and d == 64 and N:
        return torch.ops.sae.attention(qkv, rows, cols, prefix)[0]              # out; lse is for backward
    return attention_reference(qkv, rope, prefix)


def attention_reference(qkv, rope, prefix):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                              # 3 x [B,H,N,d]
    out = F.scaled_dot_product_attention(rotate(q, rope, prefix), rotate(k, rope, prefix), v)
    return out.transpose(1, 2).flatten(2)                                       # [B,N,H d]


def rotate(x, rope, prefix):
    """Turn pairs (x[i], x[i + d/2]) of the patch tokens of x [B,H,N,d]: by row for i < d/4, else column."""
    rows, cols = rope
    h, w = len(rows), len(cols)
    table = torch.cat([rows[:, None].expand(h, w, -1, 2), cols[None].expand(h, w, -1, 2)], 2)
    cos, sin = table.flatten(0, 1).unbind(-1)                                   # [h w, d/2]
    a, b = wide(x[:, :, prefix:]).chunk(2, -1)                                  # [B,H,h w,d/2]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([x[:, :, :prefix], turned], 2)


def reparameterize(mu, logvar, seed, offset=0):
    """z = mu + exp(logvar/2) eps, and KL(q || N(0, I)) summed over each sample.

    mu, logvar [B,...] -> z [B,...], kl [B] in fp32. Element i of eps is element offset + i of the normal
    stream of `seed`, both in 0 .. 2^63-1. logvar is clamped to [-30, 20] as in LDM. CPU and GPU draw the same
    eps, bit for bit; `philox_normal` agrees to a few ulp. A captured CUDA graph replays the same noise: seed
    and offset are numbers in it. Raises ValueError for a pair that does not match.
    """
    alike = mu.shape == logvar.shape and mu.dtype == logvar.dtype and mu.device == logvar.device
    if not alike or mu.dim() < 2:
        raise ValueError(f"reparameterize: mu is {describe(mu)} and logvar {describe(logvar)}; "
                         "they must be alike, [B, ...]")
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


def philox_normal(n, seed, offset=0, device=None):
    """Elements offset .. offset+n-1 of the standard normal stream of `seed`: [n], fp32.

    Philox 4x32-10 (Salmon et al. 2011) makes four random words of a block's index, Box-Muller four normals.
    """
    mask = 0xFFFFFFFF

    def multiply(m, x):
        """The high and the low 32 bits of m x, by halves of x: the product does not fit in int64."""
        return (m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16, m * x & mask

    first, last = offset // 4, (offset + n + 3) // 4
    block = torch.arange(first, last, device=device, dtype=torch.int64)
    c0, c1, c2, c3 = block & mask, block >> 32, torch.zeros_like(block), torch.zeros_like(block)
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high2, low2 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask

    u0, u1, u2, u3 = ((c.double() + 0.5) / 2 ** 32 for c in (c0, c1, c2, c3))   # uniform in (0, 1)
    normals = []
    for a, b in (u0, u1), (u2, u3):
        radius, angle = (-2 * a.log()).sqrt(), 2 * math.pi * b
        normals += [radius * angle.cos(), radius * angle.sin()]
    eps = torch.stack(normals, -1).flatten()
    return eps[offset - 4 * first:][:n].float()


def feature_mse(student, teacher):
    """Mean over tokens and channels of (student - teacher)^2, a scalar in fp32. Only the student learns.

    Deterministic. Raises ValueError when the shapes or devices differ; of two dtypes the wider one is taken.
    """
    if student.shape != teacher.shape or student.device != teacher.device:
        raise ValueError(f"feature_mse: student is {describe(student)} and teacher {describe(teacher)}; "
                         "their shapes and devices must be alike")
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if in_csrc(student):
        return torch.ops.sae.feature_mse(student, teacher)
    return feature_mse_reference(student, teacher)


def feature_mse_reference(student, teacher):
    return (wide(student) - wide(teacher.detach())).square().mean()


def group_norm_silu(x, weight, bias, groups, eps=1e-6):
    """silu(group_norm(x)): x [B,C,h,w], weight and bias [C] in fp32 or x's dtype -> [B,C,h,w], channels_last.

    A group is C / groups neighbouring channels of one sample. Mean and 1 / deviation are fp32, and accurate
    where the mean is far larger than the deviation; backward keeps them and x, not the normalised tensor. A
    contiguous x is converted to channels_last. Under autocast bf16 stays bf16. Deterministic. Raises
    ValueError when shapes, dtypes or devices do not fit.
    """
    if x.dim() != 4 or groups < 1 or not x.shape[1] or x.shape[1] % groups or not x.shape[2] * x.shape[3]:
        raise ValueError(f"group_norm_silu: x is {list(x.shape)}, not [B, C, h, w] with C a multiple of "
                         f"the {groups} groups and no side 0")
    for name, t in ("weight", weight), ("bias", bias):
        if t.shape != x.shape[1:2] or t.dtype not in (torch.float32, x.dtype) or t.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is {describe(t)}; it must be [{x.shape[1]}], "
                             f"torch.float32 or {x.dtype}, on {x.device}")
    if in_csrc(x):
        rows = x.permute(0, 2, 3, 1)                                            # [B,h,w,C], as in memory
        y, _, _ = torch.ops.sae.group_norm_silu(rows, wide(weight), wide(bias), groups, eps)
        return y.permute(0, 3, 1, 2)                                            # [B,C,h,w]
    return group_norm_silu_reference(x, weight, bias, groups, eps)


def group_norm_silu_reference(x, weight, bias, groups, eps=1e-6):
    # torch's function, because F.group_norm refuses groups of one value.
    y = wide(x)
    y = F.silu(torch.group_norm(y, groups, weight.to(y.dtype), bias.to(y.dtype), eps))
    return y.to(x.dtype, memory_format=torch.channels_last)


def in_csrc(x):
    # Not in forward-mode AD: the ops have no derivative for it, and PyTorch would take it for 0.
    if NO_CSRC or forward_ad._current_level >= 0 or x.device.type not in ("cpu", "cuda"):
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def load_csrc(so, sources):
    """Load the extension `so`, built from the folder `sources`: None, or the sentence why it is not used."""
    if not so.exists():
        return f"{so.name} is not beside sae.py"
    try:
        torch.ops.load_library(so)
    except OSError as error:
        return f"{so.name} does not load ({error})"
    crc = 0
    for path in sorted(sources.glob("[!.]*")):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            crc = zlib.crc32(path.name.encode() + b"\0" + path.read_bytes(), crc)
    if crc not in (0, torch.ops.sae.source_crc()):      # 0: installed without its sources
        return f"{so.name} is older than csrc/"
    if torch.cuda.is_available() and not torch.ops.sae.has_cuda():
        return f"{so.name} was built without CUDA"
    return None


def register_csrc():
    """Tell torch.compile the shapes of the ops in csrc, and autograd their gradients.

    fake, fake_backward: outputs of the right shape, without values. saved: what the backward pass needs.
    backward: a gradient, or None, for each input. A gradient of a gradient is refused.
    """
    csrc = torch.ops.sae
    like = partial(torch.empty_like, memory_format=torch.contiguous_format)

    def register(name, fake, fake_backward, saved, backward):
        def setup_context(ctx, inputs, output):
            ctx.numbers = [x for x in inputs if not isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*saved(inputs, output))

        def refuse(ctx, *gradients):
            raise RuntimeError(f"{name} of csrc has a gradient, but no gradient of its gradient: "
                               f"{name}_reference has one")

        torch.library.register_fake(f"sae::{name}", fake)
        torch.library.register_fake(f"sae::{name}_backward", fake_backward)
        torch.library.register_autograd(f"sae::{name}", backward, setup_context=setup_context)
        torch.library.register_autograd(f"sae::{name}_backward", refuse)

    def fake_attention(qkv, rows, cols, prefix):
        B, N, _, H, d = qkv.shape
        return qkv.new_empty(B, N, H * d), qkv.new_empty(B, H, N, dtype=torch.float32)          # out, lse

    register("attention",
             fake=fake_attention,
             fake_backward=lambda dout, qkv, *_: like(qkv),
             saved=lambda inputs, output: (*inputs[:3], *output),               # qkv, rows, cols, out, lse
             backward=lambda ctx, dout, dlse: (
                 csrc.attention_backward(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None))

    register("reparameterize",
             fake=lambda mu, *_: (like(mu), mu.new_empty(mu.shape[0], dtype=torch.float32)),    # z, kl
             fake_backward=lambda dz, dkl, mu, *_: (like(mu), like(mu)),
             saved=lambda inputs, output: inputs[:2],                           # mu, logvar; not eps
             backward=lambda ctx, dz, dkl: (
                 *csrc.reparameterize_backward(dz, dkl, *ctx.saved_tensors, *ctx.numbers), None, None))

    register("feature_mse",
             fake=lambda student, teacher: student.new_empty([], dtype=torch.float32),
             fake_backward=lambda dloss, student, teacher: like(student),
             saved=lambda inputs, output: inputs,                               # student, teacher
             backward=lambda ctx, dloss: (csrc.feature_mse_backward(dloss, *ctx.saved_tensors), None))

    def fake_norm(x, weight, bias, groups, eps):
        mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
        return like(x), mean, like(mean)                                        # y, mean, rstd

    register("group_norm_silu",
             fake=fake_norm,
             fake_backward=lambda dy, x, weight, *_: (like(x), like(weight), like(weight)),
             saved=lambda inputs, output: (*inputs[:3], *output[1:]),           # x, weight, bias, mean, rstd
             backward=lambda ctx, dy, *_: (
                 *csrc.group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.numbers[0]), None, None))


HERE = Path(__file__).resolve().parent
NO_CSRC = load_csrc(HERE / "sae_csrc.so", HERE / "csrc")
if NO_CSRC is None and not getattr(torch.ops.sae, "registered", False):
    register_csrc()
    torch.ops.sae.registered = True             # once in a process: a notebook may load this file again
elif NO_CSRC and os.environ.get("LOCAL_RANK", "0") == "0":
    print(f"sae: {NO_CSRC}: the slower reference ops serve; "
          "`pip install --no-build-isolation -e .` builds it", file=sys.stderr)


# ------------------------------------------------------------------ DINOv3

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


@dataclass
class DINOv3Config:
    """One DINOv3 ViT and the images that it expects; the defaults are H/16+ on LVD-1689M."""
    width: int = 1280
    depth: int = 32
    head_dim: int = 64
    hidden: int = 5120          # of the MLP
    gated: bool = True          # the MLP has a gate (S+, L+, H+, 7B) or none (S, B, L)
    qkv_bias: bool = True       # on Q and V; K never has one
    registers: int = 4
    activation: str = ""        # of the MLP: gelu or silu; "" is silu where it has a gate, else gelu
    eps: float = 1e-5           # of the LayerNorms
    rope_base: float = 100.0
    mean: tuple = (0.485, 0.456, 0.406)         # of the images in [0, 1] that the encoder was trained on
    std: tuple = (0.229, 0.224, 0.225)

    def __post_init__(self):
        self.activation = self.activation or ("silu" if self.gated else "gelu")
        self.eps, self.rope_base = float(self.eps), float(self.rope_base)
        self.mean, self.std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        require(self.activation in list(ACTIVATIONS),
                f"its activation is {self.activation!r}: gelu and silu are implemented")
        require(self.width % self.head_dim == 0,
                f"its width {self.width} is no multiple of {self.head_dim}, the width of a head")
        require(self.head_dim % 4 == 0, f"its heads are {self.head_dim} wide, which is no multiple of 4")
        require(len(self.mean) == len(self.std) == 3, "its mean and std of images are not three numbers each")
        require(min(self.eps, self.rope_base, *self.std) > 0, "its eps, RoPE base or std is not positive")


def check_images(x, multiple):
    """ValueError unless x is [B,3,H,W] of a floating dtype, with H and W multiples of `multiple`."""
    if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError("images are [B,3,H,W] in [-1,1] of a floating dtype, "
                         f"not {list(x.shape)} {x.dtype}: 8 bits become x / 127.5 - 1")
    H, W = x.shape[2:]
    if H % multiple or W % multiple or not H * W:
        raise ValueError(f"images must have sides that are multiples of {multiple}, "
                         f"not {H}x{W}: crop or resize them")


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) up(x)), which for silu is SwiGLU."""

    def __init__(self, cfg):
        super().__init__()
        self.act = ACTIVATIONS[cfg.activation]
        self.gate = nn.Linear(cfg.width, cfg.hidden) if cfg.gated else None
        self.up = nn.Linear(cfg.width, cfg.hidden)
        self.down = nn.Linear(cfg.hidden, cfg.width)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


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
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=cfg.eps), nn.LayerNorm(D, eps=cfg.eps)
        self.qkv, self.proj, self.mlp = QKV(D, 3 * D, bias=False), nn.Linear(D, D), MLP(cfg)
        self.q_bias = nn.Parameter(torch.zeros(D)) if cfg.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(D)) if cfg.qkv_bias else None
        self.ls1, self.ls2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x, rope):
        # DINOv3 learns no bias of K: its third of the packed bias is zeros.
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(self.norm1(x), bias).unflatten(-1, (3, -1, self.head_dim))   # [B,N,3,H,d]
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
        self.cfg = cfg
        self.checkpointing = False              # recompute each block in the backward pass
        D = cfg.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.registers = nn.Parameter(torch.zeros(1, cfg.registers, D))
        self.patch_embed = nn.Conv2d(3, D, self.patch, self.patch)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(D, eps=cfg.eps)
        # Moved from [0,1] to [-1,1]; on a device that has values also where from_pretrained uses "meta".
        device = "cpu" if self.cls_token.is_meta else self.cls_token.device
        mean, std = torch.tensor([cfg.mean, cfg.std], dtype=torch.float32, device=device)[..., None, None]
        self.register_buffer("mean", mean * 2 - 1, persistent=False)            # [3,1,1]
        self.register_buffer("std", std * 2, persistent=False)
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
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)                # [B,h w,D]
        cls, registers = self.cls_token.expand(B, -1, -1), self.registers.expand(B, -1, -1)
        x = torch.cat([cls, registers, patches], 1)                             # [B,N,D]
        h, w = H // self.patch, W // self.patch
        rope = rope_tables(h, w, self.cfg.head_dim, self.cfg.rope_base, x.device)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        x = self.norm(x)
        return x[:, 0], x[:, 1:1 + self.cfg.registers], x[:, 1 + self.cfg.registers:]

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """The encoder at `path`, of any width and depth: a file of Hugging Face, timm or Meta, or a folder.

        Where config.json or preprocessor_config.json stands beside the weights, it decides what tensors do
        not tell: heads, RoPE base, activation, eps, mean and std of images. Without them, those of Meta's
        models on LVD-1689M count. A prefix that all names share (module., _orig_mod., backbone., teacher.)
        is dropped. A tensor that has `dtype` already stays in the mapped file until it is written to, but for
        Q, K and V of Hugging Face's files, which are packed into one.

        Raises ValueError, which names it, for what is not implemented, and for a tensor that is missing, left
        over, of another shape, or holds NaN or infinity.
        """
        tensors = rename_dinov3(load_tensors(path), path, dtype)
        cfg = config_of_dinov3(tensors, path, DINOv3Config)
        with torch.device("meta"):
            model = cls(cfg)
        assign(model, tensors, f"{path} is not a DINOv3 ViT of width {cfg.width} and depth {cfg.depth}")
        for n, t in tensors.items():            # where any value is not finite, the least or largest is not
            require(not t.numel() or all(x.isfinite() for x in t.aminmax()),
                    f"{path} holds NaN or infinity in {n}: fetch or train it again")
        return model.eval()


# ------------------------------------------------------------------ autoencoder

@dataclass
class SAEConfig:
    """The architecture of an S-AE; saved in every checkpoint. The defaults are the paper's."""
    encoder: DINOv3Config = field(default_factory=DINOv3Config)
    f: int = 16                 # pixels per latent: 16, 32 or 64
    z_dim: int = 1280           # latent channels; fewer than the encoder's width for small GPUs
    widths: tuple = (1280, 1024, 512, 256, 128)     # of the decoder; the first repeats at f 32, 64
    blocks: int = 2             # residual blocks per resolution of the decoder
    attention: bool = True      # in the decoder's middle, as LDM; the cost grows with the side's 4th power

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
        return reparameterize(self.mu, self.logvar, seed=0)[1]      # it does not depend on the draw


def groups(channels):
    """The number of groups of a GroupNorm: 32 as LDM's, fewer where 128 does not divide `channels`.

    A group has 4 channels or more: of one, it takes the channel's mean out of each image, which is colour.
    """
    return max(1, math.gcd(128, channels) // 4)


class NormSiLU(nn.GroupNorm):
    """silu(norm(x)), x [B,channels,h,w]."""

    def __init__(self, channels):
        super().__init__(groups(channels), channels, eps=1e-6)

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
        y = self.conv1(self.norm1(x))
        return self.skip(x) + self.conv2(self.norm2(y))


class AttnBlock(nn.Module):
    """x + proj(attention(norm(x))), one head over the h w positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(groups(channels), channels, eps=1e-6)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        norm = self.norm                        # torch's function: nn.GroupNorm refuses groups of one value
        y = torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        q, k, v = self.qkv(y).flatten(2).transpose(1, 2).chunk(3, -1)                # 3 x [B,h w,C]
        # Written out: the fast kernels of scaled_dot_product_attention refuse heads of more than 256.
        weights = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1)           # [B,h w,h w]
        return x + self.proj((weights @ v).transpose(1, 2).reshape(x.shape))         # [B,C,h,w]


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution, as one transposed convolution.

    Row m of the upsampled map is row m // 2 of x, so row o of the output is sum_r w[r] x[(o + r - 1) // 2].
    With k[t] the sum of w[2 - t] and w[3 - t] (0 outside of w), this is sum_j k[o - 2j + 1] x[j], a
    transposed convolution of stride 2; columns likewise. Its 4x4 kernel meets 4 pixels of x for each output,
    not 9: 2.25 times fewer products, and no map of the larger size is kept for the backward pass.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # On small maps summing the kernels costs more than it saves: on a CPU at batch 4, 8x8 of 512 channels
        # took 1.9 times as long, 16x16 of 256 took 0.8. The choice does not look at the batch, so that ranks
        # and batch sizes round alike.
        if x.shape[2] * x.shape[3] < 256:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        w = self.conv.weight.flip(2, 3)
        kernel = F.avg_pool2d(w, 2, 1, padding=1, divisor_override=1)           # [Cout,Cin,4,4], 2x2 sums
        y = F.conv_transpose2d(x, kernel.transpose(0, 1).contiguous(), stride=2, padding=1)
        # The bias is added here because inside, on a CPU, its gradient takes longer than the kernel's.
        return y + self.conv.bias.to(y.dtype)[:, None, None]


def downsample(cfg):
    """[B,D,H/16,W/16] -> [B,D,H/f,W/f]: log2(f / 16) times a residual block and a convolution of stride 2."""
    D = cfg.encoder.width
    layers = []
    for _ in range(int(math.log2(cfg.f // DINOv3.patch))):
        layers += [ResBlock(D, D), nn.Conv2d(D, D, 3, stride=2, padding=1)]
    return nn.Sequential(*layers)


class Decoder(nn.Sequential):
    """z [B,z_dim,h,w] -> xhat [B,3,f h,f w]: a middle, then `blocks` residual blocks at each resolution."""

    def __init__(self, cfg):
        resolutions = int(math.log2(cfg.f)) + 1
        widths = (cfg.widths[0],) * (resolutions - len(cfg.widths)) + tuple(cfg.widths)
        c = widths[0]
        layers = [nn.Conv2d(cfg.z_dim, c, 3, padding=1), ResBlock(c, c)]
        if cfg.attention:
            layers.append(AttnBlock(c))
        layers.append(ResBlock(c, c))
        for i, width in enumerate(widths):
            if i:
                layers.append(Upsample(c))
            for _ in range(cfg.blocks):
                layers.append(ResBlock(c, width))
                c = width
        super().__init__(*layers, NormSiLU(c), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, z):
        for layer in self:                      # nn.Sequential's own is not compiled as one in torch 2.11
            z = layer(z)
        return z


class SAE(nn.Module):
    """The Semantic Auto-encoder.

    encode: x [B,3,H,W] in [-1,1], H and W multiples of f -> Posterior of z [B,z_dim,H/f,W/f].
    decode: z -> xhat [B,3,H,W], about [-1,1], not clamped.
    latent_mean, latent_std [z_dim]: of z over the training images; NaN until training has ended.
    """

    def __init__(self, cfg, encoder=None):
        super().__init__()
        if cfg.f not in (16, 32, 64) or len(cfg.widths) > int(math.log2(cfg.f)) + 1:
            raise ValueError("f must be 16, 32 or 64 with at most log2(f) + 1 decoder widths, "
                             f"not f {cfg.f} with widths {cfg.widths}")
        self.config = cfg
        self.encoder = DINOv3(cfg.encoder) if encoder is None else encoder
        self.down = downsample(cfg)
        self.to_latent = nn.Conv2d(cfg.encoder.width, 2 * cfg.z_dim, 1)
        # Reading: the paper names no initialisation. At PyTorch's, logvar is about 0 and the noise as strong
        # as mu; from a standard deviation of exp(-3) the decoder sees the image from the first step on.
        nn.init.zeros_(self.to_latent.weight[cfg.z_dim:])
        nn.init.constant_(self.to_latent.bias[cfg.z_dim:], -6.0)
        self.decoder = Decoder(cfg)
        self.register_buffer("latent_mean", torch.full((cfg.z_dim,), math.nan))
        self.register_buffer("latent_std", torch.full((cfg.z_dim,), math.nan))

    def posterior(self, patches, h, w):
        """Patch tokens [B,h w,D] -> Posterior [B,z_dim,16 h/f,16 w/f]."""
        x = patches.transpose(1, 2).unflatten(2, (h, w))                             # [B,D,h,w]
        return Posterior(*self.to_latent(self.down(x)).chunk(2, 1))

    def encode(self, x):
        check_images(x, self.config.f)
        return self.posterior(self.encoder(x)[2], x.shape[2] // DINOv3.patch, x.shape[3] // DINOv3.patch)

    def decode(self, z):
        return self.decoder(z)

    def normalize(self, z):
        """(z - latent_mean) / latent_std, on which a diffusion model is trained: z [B,z_dim,h,w]."""
        mean, std = self.latent_statistics()
        return (z - mean) / std

    def denormalize(self, z):
        """z latent_std + latent_mean, the inverse of `normalize`: z [B,z_dim,h,w]."""
        mean, std = self.latent_statistics()
        return z * std + mean

    def latent_statistics(self):
        """latent_mean and latent_std as [z_dim,1,1]. ValueError while they are NaN, if not compiled."""
        require(torch.compiler.is_compiling() or not (self.latent_mean + self.latent_std).isnan().any(),
                "latent_mean and latent_std are absent: train.py computes them at the last step of a run")
        return self.latent_mean[:, None, None], self.latent_std[:, None, None]

    def forward(self, x, seed, offset=0):
        """One training pass: xhat [B,3,H,W], kl [B], the student's patch tokens [B,N,D]."""
        check_images(x, self.config.f)
        patches = self.encoder(x)[2]
        q = self.posterior(patches, x.shape[2] // DINOv3.patch, x.shape[3] // DINOv3.patch)
        z, kl = reparameterize(q.mu, q.logvar, seed, offset)
        return self.decode(z), kl, patches

    @classmethod
    def from_pretrained(cls, path):
        """The model at `path`, in fp32, in eval mode and frozen.

        path: a checkpoint of train.py, whose EMA weights count, a folder of `save_pretrained`, or, where
        huggingface_hub is installed, owner/name of such a folder on the hub. ValueError, one sentence, for
        anything else.
        """
        config, tensors = load_sae(path)
        try:
            with torch.device("meta"):
                sae = cls(SAEConfig.from_dict(config))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has no configuration of an S-AE: {error}") from error
        assign(sae, tensors, f"{path} holds other weights than its configuration describes")
        for module in sae.down, sae.decoder:    # as in training: convolutions need no transposes
            module.to(memory_format=torch.channels_last)
        return sae.eval().requires_grad_(False)

    def save_pretrained(self, folder, dtype=None, scores=None):
        """Write the model into the new folder `folder`, from which `from_pretrained` reads it, to publish it.

        config.json, model.safetensors (the weights in `dtype`, their own by default), a model card README.md
        with `scores`, a row of eval.py, and encoder/, which transformers.AutoModel and AutoImageProcessor
        read. A model without latent statistics, as before its run has ended, can be written, too: the card
        says so. Whole or not at all. ValueError for a folder that holds anything already.
        """
        export(self.state_dict(), asdict(self.config), folder, dtype, scores or {})
