"""A stage-2 training step of train.py: whole, by part, by kernel, and beside others'.

    python tests/bench/bench_train.py [files] [step] [scaling] [parts] [kernels]
        [--rounds 3] [--steps N] [--compile] [--peers fp32 bf16 compiled] [--setting NAME] [--keep FOLDER]

files       what the others read, for --keep; with --compile and --peers compiled also a few steps of what is
            compiled: torch keeps what it made of them, and later runs begin at once
step        images/s and peak memory of train.py itself, run as a user runs it, in bf16
scaling     step time and memory against batch, resolution and number of ranks
parts       forward and backward of each part alone
kernels     each part's most expensive kernels

--peers puts a step made of others' parts beside `step` and `parts`: transformers' DINOv3 (student and
teacher), diffusers' decoder of the same widths and blocks, the lpips package, pix2pix's discriminator with
its two passes, AdamW and a loop for the EMA: in fp32, in bf16 autocast and channels_last (its best form), and
that compiled.

On a CPU with the S encoder, the LDM decoder's widths, 128x128, batch 4; on a GPU the paper's setting, and the
LDM decoder's; or the one that --setting names ("quick" is a tiny one, to see that all runs). All weights but
LPIPS's heads are random, the images noise. Competitors take turns and the tables hold medians: a shared
machine slows all of them alike.
"""
import argparse
import contextlib
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sae                                                      # noqa: E402
import train                                                    # noqa: E402
from sae_weights import CHECKPOINT_VERSION, save_safetensors, write     # noqa: E402

LDM, PAPER = (512, 256, 256, 128, 128), (1280, 1024, 512, 256, 128)
TINY = sae.DINOv3Config(64, 2, 64, 128, False)
S, H_PLUS = sae.DINOv3Config(384, 12, 64, 1536, False), sae.DINOv3Config()
SETTINGS = {                # encoder, crop, batch, decoder widths, LPIPS trunk
    "quick": (TINY, 32, 2, (64, 32, 32, 32, 32), "squeeze"),
    "S": (S, 128, 4, LDM, "vgg"),
    "H+ and LDM's decoder": (H_PLUS, 256, 16, LDM, "vgg"),
    "H+": (H_PLUS, 256, 16, PAPER, "vgg")}
PEERS = {                   # bf16 autocast and channels_last, compiled
    "fp32": (False, False),
    "bf16": (True, False),
    "compiled": (True, True)}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WORKERS = 8 if CUDA else 1
LOG_EVERY = 5 if CUDA else 1            # steps: to log waits for the GPU
ADAMW = {"lr": 5e-6, "betas": (0.9, 0.95), "weight_decay": 0}


def table(title, head, rows):
    print(f"\n{title}")
    for row in itertools.chain([head, ["---"] * len(head)], rows):      # as they come
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


# ------------------------------------------------------------------ the peer

class Peer:
    """The step as one assembles it from packages."""

    def __init__(self, setting, bf16, compiled):
        import lpips
        from diffusers.models.autoencoders.vae import Decoder
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
        from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer
        cfg, size, batch, widths, net = SETTINGS[setting]
        self.bf16, self.side = bf16, size // 16

        config = DINOv3ViTConfig(
            hidden_size=cfg.width, num_hidden_layers=cfg.depth, num_attention_heads=cfg.width // 64,
            intermediate_size=cfg.hidden, use_gated_mlp=cfg.gated, hidden_act="silu" if cfg.gated else "gelu",
            num_register_tokens=4, pos_embed_rescale=None)
        with torch.device(DEVICE):                              # a billion weights are drawn there in no time
            self.student = DINOv3ViTModel(config)
            self.teacher = DINOv3ViTModel(config).eval().requires_grad_(False)
            self.to_latent = nn.Conv2d(cfg.width, 2 * cfg.width, 1)
            self.decoder = Decoder(cfg.width, up_block_types=("UpDecoderBlock2D",) * len(widths),
                                   block_out_channels=widths[::-1], layers_per_block=1)
        self.mean = torch.tensor((0.485, 0.456, 0.406), device=DEVICE).view(3, 1, 1)
        self.std = torch.tensor((0.229, 0.224, 0.225), device=DEVICE).view(3, 1, 1)
        self.perceptual = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
        self.disc = pix2pix_discriminator()

        layout = torch.channels_last if bf16 else torch.contiguous_format
        for m in (self.student, self.teacher, self.to_latent, self.decoder, self.perceptual, self.disc):
            m.to(DEVICE, memory_format=layout)
            if compiled:
                # Of an encoder one block for all, as train.py does: whole, its 32 blocks take minutes.
                blocks = [block for block in m.modules() if isinstance(block, DINOv3ViTLayer)]
                for part in blocks or [m]:
                    part.compile()
        self.trained = [p for m in (self.student, self.to_latent, self.decoder) for p in m.parameters()]
        self.ema = [p.detach().clone() for p in self.trained]
        self.opt = torch.optim.AdamW(self.trained, **ADAMW)
        self.opt_disc = torch.optim.AdamW(self.disc.parameters(), **ADAMW)

        with torch.device("meta"):
            model = sae.SAE(sae.SAEConfig(cfg, z_dim=cfg.width, widths=widths))
        ours = sum(p.numel() for p in model.parameters())
        theirs = sum(p.numel() for p in self.trained) - cfg.width           # pre-training's mask token
        if ours != theirs:
            sys.exit(f"bench_train.py: {setting} has {ours} parameters and the peer's {theirs}: they are not "
                     "the same model")

    def autocast(self):
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16)

    def encode(self, x, model=None):
        return (model or self.student)(((x + 1) / 2 - self.mean) / self.std).last_hidden_state[:, 5:]

    def teach(self, x):
        with torch.no_grad():
            return self.encode(x, self.teacher)

    def lpips(self, xhat, x):
        return self.perceptual(xhat, x).mean()

    def disc_loss(self, xhat, x):
        return F.softplus(-self.disc(x).float()).mean() + F.softplus(self.disc(xhat).float()).mean()

    def update(self):
        self.opt.step()
        for e, p in zip(self.ema, self.trained):
            e.mul_(0.9995).add_(p.detach(), alpha=1 - 0.9995)

    def step(self, x):
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        with self.autocast():
            patches, target = self.encode(x), self.teach(x)
            grid = patches.transpose(1, 2).unflatten(2, (self.side, self.side))          # [B,D,h,w]
            q = DiagonalGaussianDistribution(self.to_latent(grid))
            xhat = self.decoder(q.sample())
            self.disc.requires_grad_(False)
            gan = F.softplus(-self.disc(xhat).float()).mean()
            loss = 100 * F.l1_loss(xhat.float(), x) + 100 * self.lpips(xhat, x) + gan
            loss = loss + 1e-6 * q.kl().mean() + 100 * F.mse_loss(patches.float(), target.float())
        self.opt.zero_grad()
        loss.backward()
        self.update()
        self.disc.requires_grad_(True)
        with self.autocast():
            disc_loss = self.disc_loss(xhat.detach(), x)
        self.opt_disc.zero_grad()
        disc_loss.backward()
        self.opt_disc.step()
        return {"loss": loss.item(), "disc": disc_loss.item()}


def pix2pix_discriminator():
    layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    for c, stride in ((64, 2), (128, 2), (256, 1)):
        conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))


def run_peer(name, setting, folder, out):
    """Trains until it is killed; writes lines, as train.py does."""
    from torchvision import datasets, transforms
    _, size, batch, *_ = SETTINGS[setting]
    peer = Peer(setting, *PEERS[name])
    transform = transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
        transforms.RandomCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5)])
    images = torch.utils.data.ConcatDataset([datasets.ImageFolder(folder / "images", transform)] * 100)
    loader = torch.utils.data.DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=WORKERS,
                                         pin_memory=CUDA)
    layout = torch.channels_last if peer.bf16 else torch.contiguous_format
    since = time.time()
    with open(out / "metrics.jsonl", "a") as file:
        for i, (x, _) in enumerate(loader, 1):
            values = peer.step(x.to(DEVICE, non_blocking=True, memory_format=layout))
            if i % LOG_EVERY:
                continue
            values["images/s"] = LOG_EVERY * batch / (time.time() - since)
            since = time.time()
            if CUDA:
                values["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
            file.write(json.dumps(values) + "\n")
            file.flush()


# ------------------------------------------------------------------ whole steps

def prepare(setting, folder):
    """Images, encoder, LPIPS trunk and, last, a stage-1 checkpoint that has learnt nothing, in `folder`."""
    import lpips  # noqa: F401 (train.build needs it, after gigabytes have been written)
    import torchvision
    cfg, size, batch, widths, net = SETTINGS[setting]
    (folder / "images" / "noise").mkdir(parents=True, exist_ok=True)
    for i in range(4 * batch):
        shape = (2 * size, 2 * size + 32, 3)
        pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "noise" / f"{i:03d}.jpg")
    factory = {"vgg": torchvision.models.vgg16, "squeeze": torchvision.models.squeezenet1_1}[net]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        encoder, trunk = sae.DINOv3(cfg), factory(weights=None).features
    save_safetensors(encoder.cpu().state_dict(), folder / "encoder.safetensors")
    torch.save({f"features.{n}": t for n, t in trunk.cpu().state_dict().items()}, folder / "trunk.pth")

    command = train_command(setting, folder, folder / "none", stage=1) + ["--widths", *map(str, widths)]
    model, _, disc, crc = train.build(train.options(command[2:]))
    state = {"version": CHECKPOINT_VERSION, "config": asdict(model.config), "args": {"stage": 1, "gan": 1},
             "encoder_crc": crc, "ema": model.state_dict(), "disc": disc.state_dict()}
    (folder / "stage1").mkdir(exist_ok=True)
    write(folder / "stage1" / "last.pt", lambda file: torch.save(state, file))
    if CUDA:
        torch.cuda.empty_cache()            # for the processes that are measured
    print("images are noise and weights random, but for LPIPS's heads: those of the lpips package")


def train_command(setting, folder, out, ranks=1, **change):
    _, size, batch, _, net = SETTINGS[setting]
    options = {
        "stage": 2, "reg": 100, "precision": "bf16", "data": folder / "images", "out": out,
        "encoder": folder / "encoder.safetensors", "init": folder / "stage1" / "last.pt",
        "size": size, "batch": batch, "steps": 10 ** 6, "workers": WORKERS,
        "lpips-net": net, "lpips-weights": folder / "trunk.pth", "gan-start": 0,
        "log-every": LOG_EVERY, "image-every": 10 ** 6, "save-every": 10 ** 6}
    words = []
    for name, value in (options | change).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / "train.py"), *words]


def new_folder(folder):
    return Path(tempfile.mkdtemp(dir=folder))


def measure(command, out, steps, skip=2, threads=None):
    """(median images/s, peak GiB of a process) of `steps` steps of `command`, which writes to `out`.

    Runs it until out/metrics.jsonl has so many, a line for LOG_EVERY steps, after `skip` lines that do not
    count, then kills it.
    """
    env, lines, steps = dict(os.environ), [], -(-steps // LOG_EVERY)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    with (open(out / "log", "w") as log,
          subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=env) as process):
        try:
            while len(lines) < skip + steps:
                if process.poll() is not None:
                    said = (out / "log").read_text()
                    raise RuntimeError(f"{' '.join(command)} ended early:\n{said[-3000:]}")
                time.sleep(0.05)
                with contextlib.suppress(FileNotFoundError):
                    lines = (out / "metrics.jsonl").read_text().splitlines()
                    lines = [line for line in lines if line.endswith("}")]
            peak = max(map(peak_memory, family(process.pid)))
        finally:
            if process.poll() is None:
                for pid in family(process.pid):
                    os.kill(pid, signal.SIGKILL)
    values = [json.loads(line) for line in lines[skip:skip + steps]]
    if CUDA:
        peak = max(v["GiB"] for v in values)
    return statistics.median(v["images/s"] for v in values), peak


def family(pid):
    """The process and all that it started, directly or not."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid] + [p for child in children.split() for p in family(int(child))]


def peak_memory(pid):
    """The highest resident memory of the process, GiB.

    Not getrusage: a new process takes over its parent's peak there.
    """
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2 ** 20


def step_commands(setting, folder, args):
    """{name: f(output folder) -> command}"""
    commands = {"train.py": lambda out: train_command(setting, folder, out)}
    if args.compile:
        commands["train.py --compile"] = lambda out: train_command(setting, folder, out, compile=True)
    for name in args.peers:
        words = [sys.executable, __file__, "--peer", name, setting, str(folder)]
        commands[f"peer, {name}"] = lambda out, words=words: [*words, str(out)]
    return commands


def bench_files(setting, folder, args):
    for name, command in step_commands(setting, folder, args).items():
        if "compile" in name:
            out = new_folder(folder)
            measure(command(out), out, 1)


def bench_step(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    commands = step_commands(setting, folder, args)
    runs = {name: [] for name in commands}
    for i in range(args.rounds):
        for name, command in commands.items():
            out = new_folder(folder)
            try:
                runs[name].append(measure(command(out), out, args.steps))
            except RuntimeError as error:                       # out of memory, no such package
                print(f"bench_train.py: {error}", file=sys.stderr)
                continue
            rate, peak = runs[name][-1]
            print(f"round {i + 1} of {args.rounds}: {name}, {rate:.3g} images/s, {peak:.3g} GiB",
                  file=sys.stderr)

    runs = {name: run for name, run in runs.items() if run}
    speed = {name: statistics.median(rate for rate, _ in run) for name, run in runs.items()}
    memory = {name: statistics.median(peak for _, peak in run) for name, run in runs.items()}
    rows = [(name, f"{batch / speed[name]:.3f}",
             f"{speed[name]:.2f}", f"{speed['train.py'] / speed[name]:.2f}",
             f"{memory[name]:.2f}", f"{memory['train.py'] / memory[name]:.2f}") for name in runs]
    table(f"stage-2 step: {setting}, {size} px, batch {batch}, {DEVICE.type}",
          ("", "s a step", "images/s", "ours over it", "peak GiB", "ours over it"), rows)


def bench_scaling(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    cases = [{"batch": b} for b in (batch // 2, batch, 2 * batch)]
    cases += [{"batch": max(1, batch // k ** 2), "size": k * size} for k in (2, 4)]
    if not CUDA or torch.cuda.device_count() > 1:
        cases += [{"batch": batch // ranks, "ranks": ranks} for ranks in (1, 2)]
    rows = []
    for case in cases:
        ranks, out = case.get("ranks", 1), new_folder(folder)
        threads = None if CUDA else max(1, torch.get_num_threads() // ranks)
        row = (case.get("size", size), ranks, case["batch"])
        try:
            command = train_command(setting, folder, out, **case)
            rate, peak = measure(command, out, args.steps, threads=threads)
            rows.append((*row, f"{ranks * case['batch'] / rate:.3f}", f"{rate:.2f}", f"{peak:.2f}"))
        except RuntimeError as error:                           # out of memory: the others still count
            print(f"bench_train.py: {error}", file=sys.stderr)
            rows.append((*row, "failed", "", ""))
    table(f"train.py as work grows: {setting}, {DEVICE.type}",
          ("size", "ranks", "batch of a rank", "s a step", "images/s", "peak GiB of a rank"), rows)


# ------------------------------------------------------------------ parts

class Ours(Peer):
    """train.py's parts under the peer's names, and its `run`."""

    def __init__(self, setting, folder):
        command = train_command(setting, folder, new_folder(folder))
        self.run = run = train.setup(train.options(command[2:]))
        self.bf16, self.side = True, run.args.size // 16
        self.teacher, self.disc, self.perceptual = run.teacher, run.disc, run.lpips
        self.student, self.to_latent, self.decoder = run.sae.encoder, run.sae.to_latent, run.sae.decoder
        self.trained, self.ema = train.trained(run.sae), train.trained(run.ema)
        self.opt, self.opt_disc = run.opt, run.opt_disc
        for group in self.opt.param_groups + self.opt_disc.param_groups:
            group["lr"] = ADAMW["lr"]

    def encode(self, x, model=None):
        return (model or self.student)(x)[2]

    def disc_loss(self, xhat, x):
        return train.discriminator_loss(*self.disc(torch.cat([x, xhat])).float().chunk(2))

    @torch.no_grad()
    def update(self):
        self.opt.step()
        torch._foreach_lerp_(self.ema, self.trained, 1 - 0.9995)


@functools.cache
def ours(setting, folder):
    """(Ours, a batch of images), once for all benchmarks of a process."""
    _, size, batch, *_ = SETTINGS[setting]
    x = torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
    return Ours(setting, folder), x.contiguous(memory_format=torch.channels_last)


def both_ways(m, f, *inputs):
    """A call that runs f(*inputs) forward and backward."""
    def run():
        leaves = [t.detach().requires_grad_() for t in inputs]
        for p in (*m.trained, *m.disc.parameters()):
            p.grad = None
        with m.autocast():
            out = f(*leaves)
        out.backward(torch.ones_like(out))
    return run


def part_runners(m, x):
    """{part: a call that runs it forward and backward} of Ours or a Peer."""
    z = torch.randn(len(x), m.to_latent.in_channels, m.side, m.side, device=DEVICE)
    fake = torch.rand_like(x) * 2 - 1
    gradients = [torch.randn_like(p) for p in m.trained]
    both = functools.partial(both_ways, m)

    def teacher():
        with m.autocast():
            m.teach(x)

    def gan():
        m.disc.requires_grad_(False)
        both(lambda xhat: F.softplus(-m.disc(xhat).float()).mean(), fake)()
        m.disc.requires_grad_(True)
        both(lambda: m.disc_loss(fake, x))()
        m.opt_disc.step()

    def update():
        for p, g in zip(m.trained, gradients):
            p.grad = g
        m.update()

    return {"encoder": both(lambda: m.encode(x)),
            "teacher, forward": teacher,
            "decoder": both(m.decoder, z),
            "LPIPS": both(lambda xhat: m.lpips(xhat, x), fake),
            "GAN, both players": gan,
            "AdamW and EMA": update}


def milliseconds(run):
    """Of one call; on a GPU by its own clock, behind a pause of 20 ms in which the launches queue up."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turns(rounds, *calls):
    """The median of what each call returns."""
    results = [[call() for call in calls] for _ in range(rounds + 1)]
    return [statistics.median(r) for r in zip(*results[1:])]                # the first round warms up


def bench_parts(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    m, x = ours(setting, folder)
    runners = {"train.py": part_runners(m, x)}
    for name in args.peers:
        runners[f"peer, {name}"] = part_runners(Peer(setting, *PEERS[name]), x)

    def rows():
        for part in runners["train.py"]:
            calls = [functools.partial(milliseconds, parts[part]) for parts in runners.values()]
            first, *others = in_turns(args.rounds, *calls)
            yield part, f"{first:.1f}", *(f"{t:.1f} ({t / first:.2f})" for t in others)

    table(f"parts, forward and backward, ms (over ours): {setting}, {size} px, batch {batch}",
          ("", *runners), rows())


def bench_kernels(setting, folder, args):
    total, device = ("self_device_time_total", "CUDA") if CUDA else ("self_cpu_time_total", "CPU")
    for part, run in part_runners(*ours(setting, folder)).items():
        run()
        with torch.profiler.profile() as profiler:
            run()
            if CUDA:
                torch.cuda.synchronize()
        kernels = [k for k in profiler.key_averages() if k.device_type.name == device]
        kernels = [k for k in kernels if not k.is_user_annotation]          # they span kernels
        kernels.sort(key=lambda k: -getattr(k, total))
        ms = sum(getattr(k, total) for k in kernels) / 1e3
        table(f"{part}: {ms:.2f} ms in {sum(k.count for k in kernels)} kernels", ("ms", "calls", "kernel"),
              [(f"{getattr(k, total) / 1e3:.3f}", k.count, k.key[:90]) for k in kernels[:12]])


BENCHES = {"files": bench_files, "step": bench_step, "scaling": bench_scaling,
           "parts": bench_parts, "kernels": bench_kernels}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHES)}; all by default")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=6 * LOG_EVERY, help="measured in each run")
    add("--compile", action="store_true", help="train.py --compile, too: minutes to build")
    add("--peers", nargs="+", choices=PEERS, default=[], help="the step made of others' parts, too")
    add("--setting", choices=SETTINGS, help="this model alone")
    add("--keep", type=Path, metavar="FOLDER", help="of the setting's files, drawn where they are not there")
    add("--peer", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        name, setting, folder, out = args.peer
        return run_peer(name, setting, Path(folder), Path(out))
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(BENCHES)}")
    if args.keep and not args.setting:
        parser.error("--keep holds the files of one --setting: name it")

    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}")
    settings = ["H+ and LDM's decoder", "H+"] if CUDA else ["S"]
    for setting in [args.setting] if args.setting else settings:
        with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
            folder = Path(folder).resolve()
            if not (folder / "stage1" / "last.pt").exists():
                prepare(setting, folder)
            for name, bench in BENCHES.items():
                if name in (args.what or BENCHES):
                    bench(setting, folder, args)
        ours.cache_clear()


if __name__ == "__main__":
    main()
