"""A stage-2 training step of train.py beside the same step assembled from others' parts.

    python tests/bench/bench_train.py [step] [parts] [scaling] [--rounds 3] [--steps 6] [--compile]
                                      [--setting NAME]

step      images/s and peak memory. Ours is train.py itself, run as a user runs it. The peer is transformers'
          DINOv3 (student and teacher), diffusers' decoder of the same widths and blocks, the lpips package,
          pix2pix's discriminator with its two passes, AdamW and a loop for the EMA: in fp32, in bf16 autocast
          and channels_last (its best form) and, with --compile, that compiled.
parts     forward and backward of each part alone
scaling   train.py alone: step time and memory against batch, resolution and number of ranks

On a CPU with the S encoder, the LDM decoder's widths, 128x128, batch 4; on a GPU the paper's setting, and the
LDM decoder's; or the one that --setting names ("quick" is a tiny one, to see that all runs). Weights are
random and the images noise. Competitors take turns and the tables hold medians: a shared machine slows all of
them alike.
"""
import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                                                   # noqa: E402
import sae                                                      # noqa: E402
import train                                                    # noqa: E402
from sae_weights import save_safetensors                        # noqa: E402

LDM, PAPER = (512, 256, 256, 128, 128), (1280, 1024, 512, 256, 128)
TINY = sae.DINOv3Config(64, 2, 64, 128, False)
S, H_PLUS = sae.DINOv3Config(384, 12, 64, 1536, False), sae.DINOv3Config()
SETTINGS = {                # encoder, crop, batch, decoder widths, LPIPS trunk
    "quick": (TINY, 32, 2, (64, 32, 32, 32, 32), "squeeze"),
    "S": (S, 128, 4, LDM, "vgg"),
    "H+ and LDM's decoder": (H_PLUS, 256, 16, LDM, "vgg"),
    "H+": (H_PLUS, 256, 16, PAPER, "vgg")}
PEERS = {                   # bf16 autocast and channels_last, compiled
    "peer, fp32": (False, False),
    "peer, bf16": (True, False),
    "peer, compiled": (True, True)}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WORKERS = 8 if CUDA else 1
ADAMW = {"lr": 5e-6, "betas": (0.9, 0.95), "weight_decay": 0}


def table(title, head, rows):
    print(f"\n{title}")
    for row in head, ["---"] * len(head), *rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


# ------------------------------------------------------------------ the peer

class Peer:
    """The step as one assembles it from packages."""

    def __init__(self, setting, bf16, compiled):
        import lpips
        from diffusers.models.autoencoders.vae import Decoder
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
        cfg, size, batch, widths, net = SETTINGS[setting]
        self.bf16, self.side = bf16, size // 16

        config = DINOv3ViTConfig(
            hidden_size=cfg.width, num_hidden_layers=cfg.depth, num_attention_heads=cfg.width // 64,
            intermediate_size=cfg.hidden, use_gated_mlp=cfg.gated, hidden_act="silu" if cfg.gated else "gelu",
            num_register_tokens=4, pos_embed_rescale=None)
        self.student = DINOv3ViTModel(config)
        self.teacher = DINOv3ViTModel(config).eval().requires_grad_(False)
        self.mean = torch.tensor((0.485, 0.456, 0.406), device=DEVICE).view(3, 1, 1)
        self.std = torch.tensor((0.229, 0.224, 0.225), device=DEVICE).view(3, 1, 1)
        self.to_latent = nn.Conv2d(cfg.width, 2 * cfg.width, 1)
        self.decoder = Decoder(cfg.width, up_block_types=("UpDecoderBlock2D",) * len(widths),
                               block_out_channels=widths[::-1], layers_per_block=1)
        self.perceptual = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
        self.disc = pix2pix_discriminator()

        layout = torch.channels_last if bf16 else torch.contiguous_format
        for m in (self.student, self.teacher, self.to_latent, self.decoder, self.perceptual, self.disc):
            m.to(DEVICE, memory_format=layout)
            if compiled:
                m.compile()
        self.trained = [p for m in (self.student, self.to_latent, self.decoder) for p in m.parameters()]
        self.ema = [p.detach().clone() for p in self.trained]
        self.opt = torch.optim.AdamW(self.trained, **ADAMW)
        self.opt_disc = torch.optim.AdamW(self.disc.parameters(), **ADAMW)

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
    """Trains until it is killed; writes a line a step, as train.py does."""
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
        for x, _ in loader:
            values = peer.step(x.to(DEVICE, non_blocking=True, memory_format=layout))
            values["images/s"] = batch / (time.time() - since)
            since = time.time()
            if CUDA:
                values["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
            file.write(json.dumps(values) + "\n")
            file.flush()


# ------------------------------------------------------------------ whole steps

def prepare(setting, folder):
    """Images, encoder, LPIPS trunk and a stage-1 checkpoint in `folder`.

    Exits where the two models differ in size.
    """
    import torchvision
    cfg, size, batch, widths, net = SETTINGS[setting]
    (folder / "images" / "noise").mkdir(parents=True)
    for i in range(4 * batch):
        shape = (2 * size, 2 * size + 32, 3)
        pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "noise" / f"{i:03d}.png")
    save_safetensors(sae.DINOv3(cfg).state_dict(), folder / "encoder.safetensors")
    factory = {"vgg": torchvision.models.vgg16, "squeeze": torchvision.models.squeezenet1_1}[net]
    trunk = factory(weights=None).features.state_dict()
    torch.save({f"features.{n}": t for n, t in trunk.items()}, folder / "trunk.pth")

    with torch.device("meta"):
        model = sae.SAE(sae.SAEConfig(cfg, z_dim=cfg.width, widths=widths))
    ours = sum(p.numel() for p in model.parameters())
    theirs = sum(p.numel() for p in Peer(setting, False, False).trained)
    theirs -= cfg.width                                         # without the pre-training's mask token
    if ours != theirs:
        sys.exit(f"bench_train.py: {setting} has {ours} parameters and the peer's {theirs}: they are not the "
                 "same model")

    command = train_command(setting, folder, folder / "stage1", stage=1, steps=1, batch=1)
    command += ["--widths", *map(str, widths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"bench_train.py: {' '.join(command)} failed:\n{done.stderr[-3000:]}")


def train_command(setting, folder, out, ranks=1, **change):
    _, size, batch, _, net = SETTINGS[setting]
    options = {
        "stage": 2, "reg": 100, "data": folder / "images", "out": out,
        "encoder": folder / "encoder.safetensors", "init": folder / "stage1" / "last.pt",
        "size": size, "batch": batch, "steps": 10 ** 6, "workers": WORKERS,
        "lpips-net": net, "lpips-weights": folder / "trunk.pth", "gan-start": 0,
        "log-every": 1, "image-every": 10 ** 6, "save-every": 10 ** 6}
    words = []
    for name, value in (options | change).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / "train.py"), *words]


def measure(command, out, steps, skip=2, threads=None):
    """(median images/s, peak GiB of a process) of `steps` steps of `command`, after `skip` that do not count.

    Runs it until out/metrics.jsonl has so many lines, then kills it.
    """
    out.mkdir()
    env, lines = dict(os.environ), []
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


def bench_step(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    commands = {"train.py": lambda out: train_command(setting, folder, out)}
    if args.compile:
        commands["train.py --compile"] = lambda out: train_command(setting, folder, out, compile=True)
    for name in args.peers:
        words = [sys.executable, __file__, "--peer", name, setting, str(folder)]
        commands[name] = lambda out, words=words: [*words, str(out)]

    runs = {name: [] for name in commands}
    for i in range(args.rounds):
        for k, (name, command) in enumerate(commands.items()):
            out = folder / f"step{i}-{k}"
            runs[name].append(measure(command(out), out, args.steps))
            rate, _ = runs[name][-1]
            print(f"round {i + 1} of {args.rounds}: {name}, {rate:.3g} images/s", file=sys.stderr)

    speed = {name: statistics.median(rate for rate, _ in run) for name, run in runs.items()}
    memory = {name: statistics.median(peak for _, peak in run) for name, run in runs.items()}
    rows = [(name, f"{batch / speed[name]:.3f}",
             f"{speed[name]:.2f}", f"{speed['train.py'] / speed[name]:.2f}",
             f"{memory[name]:.2f}", f"{memory['train.py'] / memory[name]:.2f}") for name in commands]
    table(f"stage-2 step: {setting}, {size} px, batch {batch}, {DEVICE.type}",
          ("", "s a step", "images/s", "ours over it", "peak GiB", "ours over it"), rows)


def bench_scaling(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    cases = [{"batch": b} for b in (batch // 2, batch, 2 * batch)]
    cases += [{"batch": max(1, batch // k ** 2), "size": k * size} for k in (2, 4)]
    if not CUDA or torch.cuda.device_count() > 1:
        cases += [{"batch": batch // ranks, "ranks": ranks} for ranks in (1, 2)]
    rows = []
    for i, case in enumerate(cases):
        ranks, out = case.get("ranks", 1), folder / f"scale{i}"
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
    """train.py's parts under the peer's names."""

    def __init__(self, setting, folder):
        args = train.options(train_command(setting, folder, folder / "none")[2:])
        self.bf16, self.side = True, args.size // 16
        model, self.teacher, self.disc, _ = train.build(args)
        self.perceptual = common.LPIPS(args.lpips_net, args.lpips_weights)
        train.round_weights(self.teacher, self.perceptual.net)
        for m in (model.decoder, self.disc, self.perceptual):
            m.to(memory_format=torch.channels_last)
        for m in (model, self.teacher, self.disc, self.perceptual):
            m.to(DEVICE)
        self.student, self.to_latent, self.decoder = model.encoder, model.to_latent, model.decoder
        self.trained = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.trained]
        self.opt = torch.optim.AdamW(self.trained, **ADAMW, fused=True)
        self.opt_disc = torch.optim.AdamW(self.disc.parameters(), **ADAMW, fused=True)

    def encode(self, x, model=None):
        return (model or self.student)(x)[2]

    def disc_loss(self, xhat, x):
        return train.discriminator_loss(*self.disc(torch.cat([x, xhat])).float().chunk(2))

    def update(self):
        self.opt.step()
        torch._foreach_lerp_(self.ema, self.trained, 1 - 0.9995)


def part_runners(m, x):
    """{part: a call that runs it forward and backward} of Ours or a Peer."""
    z = torch.randn(len(x), m.to_latent.in_channels, m.side, m.side, device=DEVICE)
    fake = torch.rand_like(x) * 2 - 1
    gradients = [torch.randn_like(p) for p in m.trained]

    def both(f, *inputs):
        def run():
            leaves = [t.detach().requires_grad_() for t in inputs]
            for p in (*m.trained, *m.disc.parameters()):
                p.grad = None
            with m.autocast():
                out = f(*leaves)
            out.float().sum().backward()
        return run

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
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def bench_parts(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    x = torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    runners = {"train.py": part_runners(Ours(setting, folder), x)}
    for name in args.peers:
        runners[name] = part_runners(Peer(setting, *PEERS[name]), x)
    rows = []
    for part in runners["train.py"]:
        times = {name: [] for name in runners}
        for _ in range(args.rounds + 1):
            for name, parts in runners.items():
                times[name].append(milliseconds(parts[part]))
        median = {name: statistics.median(t[1:]) for name, t in times.items()}           # the first warms up
        ours = median.pop("train.py")
        rows.append((part, f"{ours:.1f}", *(f"{t:.1f} ({t / ours:.2f})" for t in median.values())))
    table(f"parts, forward and backward, ms (over ours): {setting}, {size} px, batch {batch}",
          ("", *runners), rows)


BENCHES = {"step": bench_step, "scaling": bench_scaling, "parts": bench_parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHES)}; all by default")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=6, help="measured in each run, after two that are not")
    add("--compile", action="store_true", help="compiled competitors too: minutes to build")
    add("--setting", choices=SETTINGS, help="this model alone")
    add("--peer", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        name, setting, folder, out = args.peer
        return run_peer(name, setting, Path(folder), Path(out))
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(BENCHES)}")
    args.peers = [name for name, (_, compiled) in PEERS.items() if args.compile or not compiled]

    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}")
    settings = ["H+ and LDM's decoder", "H+"] if CUDA else ["S"]
    for setting in [args.setting] if args.setting else settings:
        with tempfile.TemporaryDirectory() as folder:
            prepare(setting, Path(folder))
            for name in args.what or BENCHES:
                BENCHES[name](setting, Path(folder), args)


if __name__ == "__main__":
    main()
