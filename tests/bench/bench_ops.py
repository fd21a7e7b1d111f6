"""The ops and the encoder against the same computation of others, side by side in one run.

    python tests/bench/bench_ops.py [ceilings] [attention] [gaussian] [mse] [norm] [encoder]
                                    [--device cpu|cuda] [--rounds 11] [--compile] [--ours] [--json FILE]

Competitors take turns, round by round, and the table holds medians: a shared machine slows all of them alike.
"ratio" is a competitor's time over ours; what ours moves is given as a share of the bandwidth of a copy in
the same run. On a GPU every round works on other buffers, more than the L2 cache holds, and times are of CUDA
events. A competitor that cannot run here (a package or an attention backend is missing) is named and left
out. Compiled ones run in bf16 alone on a GPU, where compiling takes minutes.
"""
import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch                                                                            # noqa: E402
import torch._functorch.config                                                          # noqa: E402
import torch.nn.functional as F                                                         # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel                                  # noqa: E402
from tqdm import tqdm                                                                   # noqa: E402

import sae                                                                              # noqa: E402

# "backward alone" runs a kept graph again and again, and compiled graphs give their buffers away otherwise.
torch._functorch.config.donated_buffer = False
torch._dynamo.config.fail_on_recompile_limit_hit = True       # not silently eager
RESULTS = []
OURS = False                                                  # --ours


def cases(shapes, device, compiled):
    """(shape, dtype, whether to compile) of each shape in bf16 and fp32, with nothing compiled yet."""
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            torch._dynamo.reset()
            yield shape, dtype, compiled and (device == "cpu" or dtype == torch.bfloat16)


def title_of(what, device, dtype, shape):
    return f"{what} {device} {str(dtype)[6:]} {shape}"


def time_cpu(f, inputs):
    """ms of one call"""
    start = time.perf_counter()
    f(*inputs)
    return (time.perf_counter() - start) * 1e3


def time_cuda(f, sets):
    """ms of a call on each of `sets`, and whether the launches were slower than the kernels"""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)       # 10 ms of nothing, in which launches queue up: only kernels are timed
    start.record()
    for s in sets:
        f(*s)
    end.record()
    starved = end.query()               # the GPU was done as soon as the last kernel was launched
    end.synchronize()
    return start.elapsed_time(end) / len(sets), starved


def compare(title, device, rounds, sets, competitors, note=None):
    """Times competitors {name: f(buffers)}, ours first, on each of `sets` in turn; prints medians in ms."""
    if OURS:
        competitors = {n: f for n, f in competitors.items() if n == "ours" or n.startswith("copy")}
    for name, f in list(competitors.items()):                 # warm up, compile
        try:
            for s in sets[:2]:
                f(*s)
        except RuntimeError as e:
            if name == "ours":
                raise
            print(f"    {title}: {name} cannot run here: {str(e).splitlines()[0]:.120}")
            competitors = {n: f for n, f in competitors.items() if n != name}

    times, starved = {name: [] for name in competitors}, set()
    for i in tqdm(range(rounds), title, leave=False, disable=None):
        for name, f in competitors.items():
            if device == "cuda":
                ms, slow_launches = time_cuda(f, sets)
                starved |= {name} if slow_launches else set()
            else:
                ms = time_cpu(f, sets[i % len(sets)])
            times[name].append(ms)

    median = {name: statistics.median(t) for name, t in times.items()}
    ours = next(iter(median.values()))
    print(f"\n{title}")
    for name, t in median.items():
        gaps = "   with gaps: its launches are slower than its kernels" if name in starved else ""
        print(f"    {name:44s} {t:10.3f} ms   ratio {t / ours:5.2f}{gaps}")
    if note:
        print(f"    {note(median)}")
    RESULTS.append({"title": title, "ms": median})


def buffers(make, nbytes, device):
    """[make(), ...]: as many as fill twice the L2 cache of a GPU, 120 MB; one on a CPU. A call of ours reads
    nbytes."""
    return [make() for _ in range(max(2, -(-120_000_000 // nbytes)) if device == "cuda" else 1)]


def share(tensors, of_copy, nbytes, copy):
    """A note for `compare`: ours moves so many tensors of nbytes, the competitor `copy` of_copy of them."""
    def note(median):
        bandwidth = tensors / of_copy * median[copy] / median["ours"]
        moved = f"ours moves at least {tensors} x {nbytes / 2**20:.1f} MiB"
        return f"{moved}, at {bandwidth:.0%} of the copy's bandwidth"
    return note


def forward_backward(f):
    """f(*inputs) -> (outputs, their gradients); runs both ways."""
    def run(*inputs):
        for p in inputs:
            if isinstance(p, torch.Tensor) and p.requires_grad:
                p.grad = None
        outputs, gradients = f(*inputs)
        torch.autograd.backward(outputs, gradients)
    return run


# ------------------------------------------------------------------ ceilings

def bench_ceilings(device, rounds, compiled):
    """What the device does at best: against this the others' figures are to be held."""
    n, side, dtype = 2 ** 26, 1024, torch.float32
    if device == "cuda":
        n, side, dtype = 2 ** 31, 8192, torch.bfloat16
    x, y = (torch.zeros(n, device=device, dtype=dtype) for _ in range(2))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for name, f, work, unit in (("copy", lambda: y.copy_(x), 2 * x.nbytes, "TB/s, read and written"),
                                (f"{str(dtype)[6:]} product", lambda: a @ b, 2 * side ** 3, "TFLOP/s")):
        times = [time_cuda(f, [()] * 5)[0] if device == "cuda" else time_cpu(f, ()) for _ in range(rounds)]
        print(f"{name}: {work / statistics.median(times) / 1e9:.3g} {unit}")


# ------------------------------------------------------------------ attention

PREFIX = 5


def attention_competitors(h, w, dtype, device, compiled):
    """{name: f(qkv [B,N,3,H,64]) -> [B,N,H 64]}, ours first"""
    rope = sae.rope_tables(h, w, device=device)
    ours = {"ours": lambda x: sae.attention(x, rope, PREFIX)}
    if OURS:
        return ours                     # without the seconds that the packages of the others take to import
    from timm.layers import apply_rot_embed_cat
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb
    table = torch.cat([rope[0][:, None].expand(h, w, 16, 2), rope[1][None].expand(h, w, 16, 2)], 2)
    table = table.flatten(0, 1).repeat(1, 2, 1)                                   # [h w,64,2]
    cos, sin = (t.contiguous() for t in table.to(dtype).unbind(-1))
    timm_table = torch.cat([sin, cos], -1)

    def split(qkv):
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)                               # 3 x [B,H,N,64]

    def merge(out):
        return out.transpose(1, 2).flatten(2)

    def timm_rope(t):
        turned = apply_rot_embed_cat(t[:, :, PREFIX:], timm_table, half=True)
        return torch.cat([t[:, :, :PREFIX], turned], 2).type_as(t)

    def transformers_sdpa(qkv):
        q, k, v = split(qkv)
        return merge(F.scaled_dot_product_attention(*apply_rotary_pos_emb(q, k, cos, sin), v))

    def transformers_eager(qkv):
        q, k, v = split(qkv)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return merge(torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) / 8, -1), v))

    def timm_sdpa(qkv):
        q, k, v = split(qkv)
        return merge(F.scaled_dot_product_attention(timm_rope(q), timm_rope(k), v))

    def sdpa_alone(qkv):
        return merge(F.scaled_dot_product_attention(*split(qkv)))

    competitors = {**ours, "transformers, sdpa": transformers_sdpa, "transformers, eager": transformers_eager,
                   "timm": timm_sdpa, "sdpa without RoPE": sdpa_alone}
    if compiled:
        competitors["transformers, sdpa, compiled"] = torch.compile(transformers_sdpa)
        competitors["transformers, eager, compiled"] = torch.compile(transformers_eager)
    if device == "cuda" and dtype == torch.bfloat16:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            competitors[f"sdpa without RoPE, {backend.name}"] = with_backend(sdpa_alone, backend)
            chosen = with_backend(transformers_sdpa, backend)
            competitors[f"transformers, sdpa, {backend.name}"] = chosen
            if compiled:                # with the choice inside: it is made while compiling
                competitors[f"transformers, sdpa, compiled, {backend.name}"] = torch.compile(chosen)
    return competitors


def with_backend(f, backend):
    def run(qkv):
        with sdpa_kernel(backend):
            return f(qkv)
    return run


def backward_alone(f, sets, dout):
    """f(i): backward on the graph of f(sets[i]), which is kept"""
    kept = {}

    def run(i):
        if i not in kept:
            x = sets[i].clone().requires_grad_()
            kept[i] = f(x), x
        torch.autograd.grad(*kept[i], dout, retain_graph=True)
    return run


def bench_attention(device, rounds, compiled):
    shapes = [(16, 16, 16, 20), (4, 32, 32, 20)] if device == "cuda" else [(8, 16, 16, 20)]
    for (B, h, w, H), dtype, compile_too in cases(shapes, device, compiled):
        N = h * w + PREFIX
        competitors = attention_competitors(h, w, dtype, device, compile_too)
        factory = dict(device=device, dtype=dtype)
        dout = torch.randn(B, N, H * 64, **factory)
        sets = buffers(lambda: torch.randn(B, N, 3, H, 64, **factory), 3 * dout.nbytes, device)
        title = title_of("attention", device, dtype, f"B{B} N{N} H{H}")
        copying = {"copy of qkv": lambda x: x.detach().clone()}

        alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
        compare(title + " forward", device, rounds, [(s,) for s in sets], alone | copying,
                share(4, 6, dout.nbytes, *copying))
        both = {n: forward_backward(lambda x, f=f: ([f(x)], [dout])) for n, f in competitors.items()}
        leaves = [(s.clone().requires_grad_(),) for s in sets]
        compare(title + " forward and backward", device, rounds, leaves, both | copying,
                share(12, 6, dout.nbytes, *copying))
        if device == "cuda":
            backward = {n: backward_alone(f, sets, dout) for n, f in competitors.items()}
            copying = {"copy of qkv": lambda i: sets[i].clone()}
            numbers = [(i,) for i in range(len(sets))]
            compare(title + " backward", device, rounds, numbers, backward | copying,
                    share(8, 6, dout.nbytes, *copying))


# ------------------------------------------------------------------ Gaussian

def bench_gaussian(device, rounds, compiled):
    try:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    except ImportError:
        DiagonalGaussianDistribution = None
        print("    diffusers is not installed: left out")
    for shape, dtype, compile_too in cases([(16, 1280, 16, 16)], device, compiled):
        def given(mu, logvar, noise, both):
            v = logvar.clamp(-30, 20)
            kl = 0.5 * (mu.square() + v.exp() - 1 - v).flatten(1).sum(1)
            return mu + (0.5 * v).exp() * noise, kl

        def eager(mu, logvar, noise, both):
            return given(mu, logvar, torch.randn_like(mu), both)

        def diffusers(mu, logvar, noise, both):
            d = DiagonalGaussianDistribution(torch.cat([mu, logvar], 1))
            return d.sample(), d.kl()

        def make():
            both = torch.randn(2, *shape, device=device, dtype=dtype)
            noise = torch.randn(shape, device=device, dtype=dtype)
            return *(t.detach().requires_grad_() for t in both), noise, both

        competitors = {"ours": lambda m, v, *_: sae.reparameterize(m, v, 5), "eager": eager,
                       "noise given, eager": given}
        if DiagonalGaussianDistribution:
            competitors["diffusers"] = diffusers
        if compile_too:
            competitors |= {"compiled": torch.compile(eager), "noise given, compiled": torch.compile(given)}
        sets = buffers(make, 2 * math.prod(shape) * dtype.itemsize, device)
        copying = {"copy of mu and logvar": lambda m, v, e, both: both.clone()}
        nbytes = sets[0][0].nbytes
        title = title_of("reparameterize and KL", device, dtype, list(shape))
        alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
        compare(title + " forward", device, rounds, sets, alone | copying, share(3, 4, nbytes, *copying))
        dz = torch.randn(shape, device=device, dtype=dtype)
        dkl = torch.full((shape[0],), 1e-6, device=device)

        def both_ways(f):
            def run(*inputs):
                z, kl = f(*inputs)
                return [z, kl], [dz, dkl.to(kl.dtype)]
            return forward_backward(run)

        both = {n: both_ways(f) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, sets, both | copying,
                share(8, 4, nbytes, *copying))


def bench_mse(device, rounds, compiled):
    for shape, dtype, compile_too in cases([(16, 256, 1280)], device, compiled):
        def in_fp32(student, teacher):
            return F.mse_loss(student.float(), teacher.float())

        def make():
            student, teacher = torch.randn(2, *shape, device=device, dtype=dtype).unbind()
            return student.clone().requires_grad_(), teacher.clone()

        competitors = {"ours": sae.feature_mse, "mse_loss in fp32": in_fp32}
        if compile_too:
            competitors["mse_loss in fp32, compiled"] = torch.compile(in_fp32)
        sets = buffers(make, 2 * math.prod(shape) * dtype.itemsize, device)
        title = title_of("feature MSE", device, dtype, list(shape))
        copying = {"copy of the student": lambda s, t: s.detach().clone()}
        both = {n: forward_backward(lambda s, t, f=f: ([f(s, t)], [None])) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, sets, both | copying,
                share(5, 2, sets[0][0].nbytes, *copying))


# ------------------------------------------------------------------ SiLU of group norm

def kept_for_backward(f, *inputs):
    """Bytes that autograd keeps of one call, parameters aside."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f(*inputs)
    return sum(n for address, n in kept.items() if address not in {p.data_ptr() for p in inputs[1:]})


def bench_norm(device, rounds, compiled):
    # The decoder's levels; in bf16 as autocast has them, with fp32 parameters.
    shapes = [(16, 1280, 16, 16), (16, 512, 64, 64), (16, 256, 128, 128), (16, 128, 256, 256)]
    if device == "cpu":
        shapes = [(4, 1280, 8, 8), (4, 512, 32, 32), (4, 256, 64, 64), (4, 128, 128, 128)]
    for shape, dtype, compile_too in cases(shapes, device, compiled):
        def eager(x, weight, bias):
            return F.silu(F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype), 1e-6))

        def in_fp32(x, weight, bias):                     # as CUDA's autocast runs it
            return F.silu(F.group_norm(x.float(), 32, weight, bias, 1e-6)).to(x.dtype)

        competitors = {"ours": lambda x, w, b: sae.group_norm_silu(x, w, b, 32), "eager": eager}
        if device == "cuda" and dtype == torch.bfloat16:
            competitors["eager, norm and SiLU in fp32"] = in_fp32
        if compile_too:
            others = list(competitors.items())[1:]
            competitors |= {f"{name}, compiled": torch.compile(f) for name, f in others}
        x, dy = (torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
                 for _ in range(2))
        parameters = [torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2)]
        sets = buffers(lambda: (x.clone().requires_grad_(), *parameters), x.nbytes, device)
        title = title_of("SiLU of group norm", device, dtype, list(shape))
        copying = {"copy": lambda x, w, b: x.detach().clone()}

        alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
        compare(title + " forward", device, rounds, sets, alone | copying, share(2, 2, x.nbytes, *copying))
        both = {n: forward_backward(lambda *s, f=f: ([f(*s)], [dy])) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, sets, both | copying,
                share(5, 2, x.nbytes, *copying))
        kept = (f"{n} {kept_for_backward(f, *sets[0]) / 2**20:.1f} MiB" for n, f in competitors.items())
        print("    kept for backward: " + ", ".join(kept))


# ------------------------------------------------------------------ encoder

# width, depth, heads, MLP width, gated, batch, timm's name
ENCODERS = {"S": (384, 12, 6, 1536, False, 4, "vit_small_patch16_dinov3"),
            "B": (768, 12, 12, 3072, False, 2, "vit_base_patch16_dinov3"),
            "H+": (1280, 32, 20, 5120, True, 16, "vit_huge_plus_patch16_dinov3")}


def encoder_competitors(name, device, dtype):
    """Our encoder, and {name: f(images) -> tokens} of it and its peers"""
    import timm
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    D, depth, heads, hidden, gated, _, arch = ENCODERS[name]
    config = DINOv3ViTConfig(hidden_size=D, num_hidden_layers=depth, num_attention_heads=heads,
                             intermediate_size=hidden, num_register_tokens=4, use_gated_mlp=gated,
                             hidden_act="silu" if gated else "gelu", pos_embed_rescale=None)
    with torch.device(device):          # 840 M numbers are drawn there in no time
        ours = sae.DINOv3(sae.DINOv3Config(width=D, depth=depth, hidden=hidden, gated=gated)).to(dtype)
        sdpa, eager = (DINOv3ViTModel._from_config(config, attn_implementation=a).to(dtype).eval()
                       for a in ("sdpa", "eager"))
        peer = timm.create_model(arch, pretrained=False).to(dtype).eval()
    return ours, {"ours": lambda x: ours(x)[2],
                  "transformers, sdpa": lambda x: sdpa(x).last_hidden_state,
                  "transformers, eager": lambda x: eager(x).last_hidden_state,
                  "timm": peer.forward_features}


def with_onednn(f):
    """fp32 products by oneDNN instead of MKL"""
    def run(x):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        out = f(x)
        torch.set_float32_matmul_precision(before)
        return out
    return run


def bench_encoder(device, rounds, compiled):
    names, dtypes = ["S", "B"], [torch.float32, torch.bfloat16]
    if device == "cuda":
        names, dtypes = ["H+"], [torch.bfloat16]
    for name, dtype in itertools.product(names, dtypes):
        ours, competitors = encoder_competitors(name, device, dtype)
        on_cpu = device == "cpu" and dtype == torch.float32
        if on_cpu:
            for n in ("ours", "transformers, sdpa"):
                competitors[f"{n}, oneDNN"] = with_onednn(competitors[n])
        B = ENCODERS[name][5]
        x = torch.randn(B, 3, 256, 256, device=device, dtype=dtype)
        title = title_of(f"encoder {name}", device, dtype, f"256x256 B{B}")
        alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
        compare(title + " forward", device, rounds, [(x,)], alone)
        if on_cpu:
            exact = copy.deepcopy(ours).requires_grad_(False).double()(x.double())[2]
            for n in ("ours", "ours, oneDNN"):
                error = (alone[n](x) - exact).norm() / exact.norm()
                print(f"    {n}: relative error against float64 {error:.2e}")

        def both_ways(f):
            def run(x):
                out = f(x)
                return [out], [torch.ones_like(out)]
            return forward_backward(run)

        both = {n: both_ways(f) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, [(x,)], both)


BENCHES = {"ceilings": bench_ceilings, "attention": bench_attention, "gaussian": bench_gaussian,
           "mse": bench_mse, "norm": bench_norm, "encoder": bench_encoder}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile", action="store_true", help="torch.compile'd competitors too")
    parser.add_argument("--ours", action="store_true", help="no competitors but a copy")
    parser.add_argument("--json", help="append the medians to this file")
    args = parser.parse_args()
    OURS = args.ours
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(BENCHES)}")
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        kernels = "reference" if sae.NO_CSRC else torch.ops.sae.cpu_kernels()
        where = f"{kernels} kernels, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    for name in args.what or BENCHES:
        BENCHES[name](args.device, args.rounds, args.compile)
    if args.json:
        with open(args.json, "a") as f:
            f.writelines(json.dumps(r) + "\n" for r in RESULTS)
