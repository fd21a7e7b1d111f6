"""The ops and the encoder against the same computation of others, side by side in one run.

    python tests/bench_ops.py [attention] [gaussian] [mse] [norm] [encoder] [--device cpu|cuda] [--rounds 11] [--compile]
                              [--json FILE]

Competitors take turns, round by round, and the table holds medians: a shared machine slows all of them alike. "ratio" is a competitor's
time over ours. On a GPU every round works on other buffers, more than the L2 cache holds, and times are of CUDA events. A competitor that
cannot run here (a package or an attention backend is missing) is named and left out. Compiled ones run in bf16 alone on a GPU.
"""
import argparse
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch                                                                            # noqa: E402
import torch._functorch.config                                                          # noqa: E402
import torch.nn.functional as F                                                         # noqa: E402
from timm.layers import apply_rot_embed_cat                                             # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel                                  # noqa: E402
from tqdm import tqdm                                                                   # noqa: E402
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb     # noqa: E402

import sae                                                                              # noqa: E402

# "backward alone" runs a kept graph again and again, and compiled graphs give their buffers away otherwise.
torch._functorch.config.donated_buffer = False
torch._dynamo.config.fail_on_recompile_limit_hit = True       # not silently eager
RESULTS = []


def cases(shapes, device, compiled):
    """(shape, dtype, compiled) of each shape in bf16 and fp32, with nothing compiled yet. On a GPU bf16 alone is: it takes minutes."""
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            torch._dynamo.reset()
            yield shape, dtype, compiled and (device == "cpu" or dtype == torch.bfloat16)


def compare(title, device, rounds, sets, competitors, note=None):
    """Times competitors {name: f(buffers)} on each of `sets` in turn and prints the medians in ms; the first one is ours."""
    for name, f in list(competitors.items()):                 # warm up, compile
        try:
            for s in sets[:2]:
                f(*s)
        except RuntimeError as e:
            if name == "ours":
                raise
            print(f"    {title}: {name} cannot run here: {str(e).splitlines()[0]:.120}")
            competitors = {n: f for n, f in competitors.items() if n != name}
    times, gaps = {name: [] for name in competitors}, set()
    for i in tqdm(range(rounds), title, leave=False, disable=None):
        for name, f in competitors.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                torch.cuda._sleep(20_000_000)                 # 10 ms of nothing, in which the launches queue up: kernels alone are timed
                start.record()
                for s in sets:
                    f(*s)
                end.record()
                if start.query():
                    gaps.add(name)
                end.synchronize()
                times[name].append(start.elapsed_time(end) / len(sets))
            else:
                start = time.perf_counter()
                f(*sets[i % len(sets)])
                times[name].append((time.perf_counter() - start) * 1e3)
    median = {name: statistics.median(t) for name, t in times.items()}
    ours = next(iter(median.values()))
    print(f"\n{title}")
    for name, t in median.items():
        print(f"    {name:44s} {t:10.3f} ms   ratio {t / ours:5.2f}" + "   with gaps: its launches took over 10 ms" * (name in gaps))
    if note:
        print(f"    {note(median)}")
    RESULTS.append({"title": title, "ms": median})


def buffers(make, nbytes, device):
    """[make(), ...]: as many as fill twice the L2 cache of a GPU, 120 MB; one on a CPU. nbytes: of what a call of ours reads."""
    return [make() for _ in range(max(2, -(-120_000_000 // nbytes)) if device == "cuda" else 1)]


def share(tensors, of_copy, nbytes, copy):
    """A note for `compare`: ours moves so many tensors of nbytes, the competitor `copy` moves of_copy of them."""
    return lambda t: f"ours moves at least {tensors} x {nbytes / 2**20:.1f} MiB, at {tensors / of_copy * t[copy] / t['ours']:.0%} of the copy's bandwidth"


def forward_backward(f):
    """f(*inputs) -> (outputs, their gradients); runs both ways."""
    def run(*inputs):
        for p in inputs:
            if isinstance(p, torch.Tensor) and p.requires_grad:
                p.grad = None
        outputs, gradients = f(*inputs)
        torch.autograd.backward(outputs, gradients)
    return run


# ------------------------------------------------------------------ attention

def bench_attention(device, rounds, compiled):
    shapes = [(16, 16, 16, 20), (4, 32, 32, 20)] if device == "cuda" else [(8, 16, 16, 20)]
    for (B, h, w, H), dtype, compile_too in cases(shapes, device, compiled):
        N, prefix = h * w + 5, 5
        rope = sae.rope_tables(h, w, device=device)
        table = torch.cat([rope[0][:, None].expand(h, w, 16, 2), rope[1][None].expand(h, w, 16, 2)], 2).flatten(0, 1).repeat(1, 2, 1)
        cos, sin = (t.contiguous() for t in table.to(dtype).unbind(-1))               # [h w,64]
        timm_table = torch.cat([sin, cos], -1)

        def split(qkv):
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)                               # 3 x [B,H,N,64]

        def merge(out):
            return out.transpose(1, 2).reshape(B, N, H * 64)

        def transformers_sdpa(qkv):
            q, k, v = split(qkv)
            return merge(F.scaled_dot_product_attention(*apply_rotary_pos_emb(q, k, cos, sin), v))

        def transformers_eager(qkv):
            q, k, v = split(qkv)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            return merge(torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) / 8, -1), v))

        def timm_sdpa(qkv):
            q, k, v = split(qkv)
            q, k = (torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], timm_table, half=True)], 2).type_as(v) for t in (q, k))
            return merge(F.scaled_dot_product_attention(q, k, v))

        def sdpa_alone(qkv):
            return merge(F.scaled_dot_product_attention(*split(qkv)))

        competitors = {"ours": lambda x: sae.attention(x, rope, prefix), "transformers, sdpa": transformers_sdpa,
                       "transformers, eager": transformers_eager, "timm": timm_sdpa, "sdpa without RoPE": sdpa_alone}
        if compile_too:
            competitors["transformers, sdpa, compiled"] = torch.compile(transformers_sdpa)
            competitors["transformers, eager, compiled"] = torch.compile(transformers_eager)
        if device == "cuda" and dtype == torch.bfloat16:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                for name, f in (("sdpa without RoPE", sdpa_alone), ("transformers, sdpa", transformers_sdpa)):
                    def with_backend(x, f=f, backend=backend):
                        with sdpa_kernel(backend):
                            return f(x)
                    competitors[f"{name}, {backend.name}"] = with_backend
                    if compile_too and f is transformers_sdpa:           # the backend inside: it is chosen while compiling
                        competitors[f"{name}, compiled, {backend.name}"] = torch.compile(with_backend)
        dout = torch.randn(B, N, H * 64, device=device, dtype=dtype)
        sets = buffers(lambda: torch.randn(B, N, 3, H, 64, device=device, dtype=dtype), 3 * dout.nbytes, device)
        title = f"attention {device} {str(dtype)[6:]} B{B} N{N} H{H}"
        moved = 4 * dout.numel() * dout.element_size()
        floor = (lambda median, moved=moved: f"memory floor at 4.3 TB/s: forward {moved / 4.3e9:.4f} ms") if device == "cuda" else None
        compare(title + " forward", device, rounds, [(s,) for s in sets], {n: torch.no_grad()(f) for n, f in competitors.items()}, floor)
        both = {n: forward_backward(lambda x, f=f: ([f(x)], [dout])) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, [(s.clone().requires_grad_(),) for s in sets], both)
        if device == "cuda":                              # backward alone, on a graph that is kept
            kept = {}

            def backward(i, n, f):
                if (n, i) not in kept:
                    x = sets[i].clone().requires_grad_()
                    kept[n, i] = f(x), x
                torch.autograd.grad(*kept[n, i], dout, retain_graph=True)

            compare(title + " backward", device, rounds, [(i,) for i in range(len(sets))],
                    {n: (lambda i, n=n, f=f: backward(i, n, f)) for n, f in competitors.items()})
            kept.clear()


# ------------------------------------------------------------------ Gaussian

def bench_gaussian(device, rounds, compiled):
    try:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    except ImportError:
        DiagonalGaussianDistribution = None
        print("    diffusers is not installed: left out")
    for shape, dtype, compile_too in cases([(16, 1280, 16, 16)], device, compiled):
        def eager(mu, logvar, noise, both):
            v = logvar.clamp(-30, 20)
            return mu + (0.5 * v).exp() * torch.randn_like(mu), 0.5 * (mu.square() + v.exp() - 1 - v).flatten(1).sum(1)

        def given(mu, logvar, noise, both):
            v = logvar.clamp(-30, 20)
            return mu + (0.5 * v).exp() * noise, 0.5 * (mu.square() + v.exp() - 1 - v).flatten(1).sum(1)

        def diffusers(mu, logvar, noise, both):
            d = DiagonalGaussianDistribution(torch.cat([mu, logvar], 1))
            return d.sample(), d.kl()

        def make():
            both = torch.randn(2, *shape, device=device, dtype=dtype)
            return *(t.detach().requires_grad_() for t in both), torch.randn(shape, device=device, dtype=dtype), both

        competitors = {"ours": lambda m, v, *_: sae.reparameterize(m, v, 5), "eager": eager, "noise given, eager": given}
        if DiagonalGaussianDistribution:
            competitors["diffusers"] = diffusers
        if compile_too:
            competitors |= {"compiled": torch.compile(eager), "noise given, compiled": torch.compile(given)}
        sets = buffers(make, 2 * math.prod(shape) * dtype.itemsize, device)
        copying = {"copy of mu and logvar": lambda m, v, e, both: both.clone()}
        title = f"reparameterize and KL {device} {str(dtype)[6:]} {list(shape)}"
        alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
        compare(title + " forward", device, rounds, sets, alone | copying, share(3, 4, sets[0][0].nbytes, *copying))
        dz, dkl = torch.randn(shape, device=device, dtype=dtype), torch.full((shape[0],), 1e-6, device=device)

        def both(f):
            def run(*inputs):
                z, kl = f(*inputs)
                return [z, kl], [dz, dkl.to(kl.dtype)]
            return forward_backward(run)

        compare(title + " forward and backward", device, rounds, sets, {n: both(f) for n, f in competitors.items()} | copying,
                share(8, 4, sets[0][0].nbytes, *copying))


def bench_mse(device, rounds, compiled):
    for shape, dtype, compile_too in cases([(16, 256, 1280)], device, compiled):
        competitors = {"ours": sae.feature_mse, "mse_loss in fp32": lambda s, t: F.mse_loss(s.float(), t.float())}
        if compile_too:
            competitors["mse_loss in fp32, compiled"] = torch.compile(competitors["mse_loss in fp32"])
        sets = buffers(lambda: tuple(torch.randn(shape, device=device, dtype=dtype, requires_grad=i == 0) for i in range(2)),
                       2 * math.prod(shape) * dtype.itemsize, device)
        title = f"feature MSE {device} {str(dtype)[6:]} {list(shape)}"
        copying = {"copy of the student": lambda s, t: s.detach().clone()}
        both = {n: forward_backward(lambda s, t, f=f: ([f(s, t)], [None])) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, sets, both | copying, share(5, 2, sets[0][0].nbytes, *copying))


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
            competitors |= {f"{name}, compiled": torch.compile(f) for name, f in list(competitors.items())[1:]}
        x, dy = (torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last) for _ in range(2))
        parameters = [torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2)]
        sets = buffers(lambda: (x.clone().requires_grad_(), *parameters), x.nbytes, device)
        title = f"SiLU of group norm {device} {str(dtype)[6:]} {list(shape)}"
        copying = {"copy": lambda x, w, b: x.detach().clone()}

        alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
        compare(title + " forward", device, rounds, sets, alone | copying, share(2, 2, x.nbytes, *copying))
        both = {n: forward_backward(lambda *s, f=f: ([f(*s)], [dy])) for n, f in competitors.items()}
        compare(title + " forward and backward", device, rounds, sets, both | copying, share(5, 2, x.nbytes, *copying))
        kept = (f"{n} {kept_for_backward(f, *sets[0]) / 2**20:.1f} MiB" for n, f in competitors.items())
        print("    kept for backward: " + ", ".join(kept))


# ------------------------------------------------------------------ encoder

def bench_encoder(device, rounds, compiled):
    import timm
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    # width, depth, heads, MLP width, gated, batch
    models = {"H+": (1280, 32, 20, 5120, True, 16)} if device == "cuda" else {"S": (384, 12, 6, 1536, False, 4), "B": (768, 12, 12, 3072, False, 2)}
    for name, (D, depth, heads, hidden, gated, B) in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            if device == "cuda" and dtype == torch.float32:
                continue
            config = DINOv3ViTConfig(hidden_size=D, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=hidden, num_register_tokens=4,
                                     use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", pos_embed_rescale=None)
            arch = {"S": "vit_small_patch16_dinov3", "B": "vit_base_patch16_dinov3", "H+": "vit_huge_plus_patch16_dinov3"}[name]
            with torch.device(device):                        # 840 M numbers are drawn there in no time
                ours = sae.DINOv3(sae.DINOv3Config(width=D, depth=depth, hidden=hidden, gated=gated)).to(device, dtype)
                peers = {f"transformers, {a}": DINOv3ViTModel._from_config(config, attn_implementation=a).to(dtype).eval() for a in ("sdpa", "eager")}
                peers["timm"] = timm.create_model(arch, pretrained=False).to(dtype).eval()
            competitors = {"ours": lambda x: ours(x)[2]}
            competitors |= {n: (lambda x, m=m: m(x).last_hidden_state) if n[:2] == "tr" else m.forward_features for n, m in peers.items()}
            if device == "cpu" and dtype == torch.float32:    # fp32 products by oneDNN instead of MKL
                def onednn(f):
                    def run(x):
                        before = torch.get_float32_matmul_precision()
                        torch.set_float32_matmul_precision("medium")
                        out = f(x)
                        torch.set_float32_matmul_precision(before)
                        return out
                    return run
                competitors |= {f"{n}, oneDNN": onednn(competitors[n]) for n in ("ours", "transformers, sdpa")}
            x = torch.randn(B, 3, 256, 256, device=device, dtype=dtype)
            title = f"encoder {name} {device} {str(dtype)[6:]} 256x256 B{B}"
            alone = {n: torch.no_grad()(f) for n, f in competitors.items()}
            compare(title + " forward", device, rounds, [(x,)], alone)
            if "ours, oneDNN" in alone:
                exact = copy.deepcopy(ours).requires_grad_(False).double()(x.double())[2]
                for n in ("ours", "ours, oneDNN"):
                    print(f"    {n}: relative error against float64 {(alone[n](x) - exact).norm() / exact.norm():.2e}")

            def both(f):
                def run(x):
                    out = f(x)
                    return [out], [torch.ones_like(out)]
                return forward_backward(run)

            compare(title + " forward and backward", device, rounds, [(x,)], {n: both(f) for n, f in competitors.items()})


BENCHES = {"attention": bench_attention, "gaussian": bench_gaussian, "mse": bench_mse, "norm": bench_norm, "encoder": bench_encoder}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile", action="store_true", help="torch.compile'd competitors too")
    parser.add_argument("--json", help="append the medians to this file")
    args = parser.parse_args()
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(BENCHES)}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.ops.sae.cpu_kernels() if sae.NO_CSRC is None else 'reference'} kernels, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    for name in args.what or BENCHES:
        BENCHES[name](args.device, args.rounds, args.compile)
    if args.json:
        with open(args.json, "a") as f:
            f.writelines(json.dumps(r) + "\n" for r in RESULTS)
