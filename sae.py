"""S-AE, the Semantic Auto-encoder: one latent space for understanding and generation.

    x [B,3,H,W] -> DINOv3 -> patch tokens h [B,D,H/16,W/16] -> mu, logvar
      -> z = mu + exp(logvar/2) eps -> CNN decoder -> xhat [B,3,H,W]

Images are in [-1, 1] at every boundary of this file.
Letters: B batch, N tokens, D width, H and W pixels (or H heads, next to N), h and w the grid of patches.
"""
import json
import math
import mmap
import os
from collections import Counter
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary


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
# A file: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data, no gaps.

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
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, t in tensors:
                file.write(t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error       # a full disk's error names no file
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ------------------------------------------------------------------ DINOv3


# ------------------------------------------------------------------ autoencoder
