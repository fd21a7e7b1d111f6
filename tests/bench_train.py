"""A stage-2 training step of train.py beside the same step assembled from others' parts, and what train.py reads its images with.

    python tests/bench_train.py [step] [parts] [scaling] [data] [--rounds 3] [--steps 6] [--compile] [--quick]

step      images/s and peak memory. Ours is train.py itself, run as a user runs it. The peer is transformers' DINOv3 (student and teacher),
          diffusers' decoder of the same widths and blocks, the lpips package, pix2pix's discriminator with its two passes, AdamW and a loop
          for the EMA: in fp32, in its best eager form (bf16 autocast, channels_last) and, with --compile, both compiled.
parts     forward and backward of each part alone
scaling   train.py alone: step time and memory against batch, resolution and number of ranks
data      images/s of one core: decode, resize, crop, flip

On a CPU with the S encoder, the LDM decoder's widths, 128x128, batch 4; on a GPU the paper's setting. Weights are random, images noise.
Competitors take turns in processes of their own and the tables hold medians: a shared machine slows all of them alike.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sae                                                                              # noqa: E402
import train                                                                            # noqa: E402

LDM = (512, 256, 256, 128, 128)
#               encoder: width, depth, MLP width, gated; then crop, batch, decoder widths, LPIPS trunk
SETTINGS = {"quick": ((64, 2, 128, False), 32, 2, (64, 32, 32, 32, 32), "squeeze"),
            "S": ((384, 12, 1536, False), 128, 4, LDM, "vgg"),
            "H+, LDM decoder": ((1280, 32, 5120, True), 256, 16, LDM, "vgg"),
            "H+": ((1280, 32, 5120, True), 256, 16, (1280, 1024, 512, 256, 128), "vgg")}
#        autocast to bf16, channels_last, compiled
PEERS = {"peer, fp32": (False, False, False), "peer, bf16, channels_last": (True, True, False), "peer, compiled": (True, True, True)}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKERS = 8 if DEVICE.type == "cuda" else 1
REG, KL = 100, 1e-6


def table(title, head, rows):
    print(f"\n{title}\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)), flush=True)


# ------------------------------------------------------------------ the peer

def discriminator(width=64):
    """pix2pix's 70x70 discriminator, with its BatchNorm."""
    layers, c = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)], width
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        c *= 2
    return nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))


class Peer:
    """The parts of a step, and the step, as one assembles it from packages."""

    def __init__(self, setting, bf16, channels_last, compiled):
        import lpips
        from diffusers.models.autoencoders.vae import Decoder
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
        (D, depth, hidden, gated), size, batch, widths, net = SETTINGS[setting]
        config = DINOv3ViTConfig(hidden_size=D, num_hidden_layers=depth, num_attention_heads=D // 64, intermediate_size=hidden,
                                 use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", num_register_tokens=4, pos_embed_rescale=None)
        self.student, self.teacher = DINOv3ViTModel(config), DINOv3ViTModel(config).eval().requires_grad_(False)
        self.to_latent = nn.Conv2d(D, 2 * D, 1)
        self.decoder = Decoder(in_channels=D, up_block_types=("UpDecoderBlock2D",) * len(widths), block_out_channels=widths[::-1], layers_per_block=1)
        self.perceptual = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
        self.disc = discriminator()
        self.mean, self.std = (torch.tensor(t, device=DEVICE).view(3, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        self.bf16, self.side = bf16, size // 16
        for m in (self.student, self.teacher, self.to_latent, self.decoder, self.perceptual, self.disc):
            m.to(DEVICE, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            if compiled:
                m.compile()
        self.trained = [p for m in (self.student, self.to_latent, self.decoder) for p in m.parameters()]
        self.ema = [p.detach().clone() for p in self.trained]
        self.opt, self.opt_disc = (torch.optim.AdamW(p, lr=5e-6, betas=(0.9, 0.95), weight_decay=0) for p in (self.trained, self.disc.parameters()))
        self.generator = [self.student, self.to_latent, self.decoder]

    def autocast(self):
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16)

    def encode(self, x, model=None):
        return (model or self.student)(((x + 1) / 2 - self.mean) / self.std).last_hidden_state[:, 5:]

    def teach(self, x):
        with torch.no_grad():
            return self.encode(x, self.teacher)

    def bottleneck(self, patches):
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        q = DiagonalGaussianDistribution(self.to_latent(patches.transpose(1, 2).unflatten(2, (self.side, self.side))))
        return q.sample(), q.kl()

    def mse(self, patches, target):
        return F.mse_loss(patches.float(), target.float())

    def lpips(self, xhat, x):
        return self.perceptual(xhat, x).mean()

    def disc_loss(self, xhat, x):
        return F.softplus(-self.disc(x).float()).mean() + F.softplus(self.disc(xhat).float()).mean()

    def update(self):
        self.opt.step()
        for e, p in zip(self.ema, self.trained):
            e.mul_(0.9995).add_(p.detach(), alpha=1 - 0.9995)

    def step(self, x):
        with self.autocast():
            patches, target = self.encode(x), self.teach(x)
            z, kl = self.bottleneck(patches)
            xhat = self.decoder(z)
            self.disc.requires_grad_(False)
            gan = F.softplus(-self.disc(xhat).float()).mean()
            loss = 100 * F.l1_loss(xhat.float(), x) + 100 * self.lpips(xhat, x) + gan + KL * kl.mean() + REG * self.mse(patches, target)
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


def peer_run(name, setting, folder, out):
    """Trains the peer until it is killed; writes a line a step, as train.py does."""
    from torchvision import datasets, transforms
    _, size, batch, *_ = SETTINGS[setting]
    torch.manual_seed(0)
    peer = Peer(setting, *PEERS[name])
    transform = transforms.Compose([transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.RandomCrop(size),
                                    transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    images = torch.utils.data.ConcatDataset([datasets.ImageFolder(folder / "images", transform)] * 100)
    loader = torch.utils.data.DataLoader(images, batch, shuffle=True, drop_last=True, num_workers=WORKERS, pin_memory=DEVICE.type == "cuda")
    since = time.time()
    with open(out / "metrics.jsonl", "a") as file:
        for x, _ in loader:
            x = x.to(DEVICE, non_blocking=True)
            if PEERS[name][1]:
                x = x.contiguous(memory_format=torch.channels_last)
            values = peer.step(x)
            if DEVICE.type == "cuda":
                values["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
            file.write(json.dumps(values | {"images/s": batch / (time.time() - since)}) + "\n")
            file.flush()
            since = time.time()


# ------------------------------------------------------------------ whole steps

def prepare(setting, folder):
    """Images, encoder, LPIPS trunk and a stage-1 checkpoint in `folder`; refuses to compare models of different sizes."""
    import torchvision
    (D, depth, hidden, gated), size, batch, widths, net = SETTINGS[setting]
    rng = np.random.default_rng(0)
    (folder / "images" / "noise").mkdir(parents=True)
    for i in range(4 * batch):
        Image.fromarray(rng.integers(0, 256, (size + 8, size + 32, 3), dtype=np.uint8)).save(folder / "images" / "noise" / f"{i:03d}.png")
    sae.save_safetensors(sae.DINOv3(sae.DINOv3Config(D, depth, 64, hidden, gated)).state_dict(), folder / "encoder.safetensors")
    trunk = {"vgg": torchvision.models.vgg16, "squeeze": torchvision.models.squeezenet1_1}[net]().features
    torch.save({f"features.{n}": t for n, t in trunk.state_dict().items()}, folder / "trunk.pth")
    with torch.device("meta"):
        ours = sae.SAE(sae.SAEConfig(sae.DINOv3Config(D, depth, 64, hidden, gated), z_dim=D, widths=widths))
    peer = Peer(setting, False, False, False)
    counts = [sum(p.numel() for p in ps) for ps in (ours.parameters(), peer.trained)]
    if counts[0] != counts[1] - D:                            # transformers keeps the mask token of the pre-training
        sys.exit(f"bench_train.py: ours has {counts[0]} parameters and the peer {counts[1] - D}: not the same model")
    subprocess.run(train_command(setting, folder, folder / "stage1", stage=1, steps=1, batch=1) + ["--widths", *map(str, widths)],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)


def train_command(setting, folder, out, stage=2, ranks=1, **change):
    _, size, batch, widths, net = SETTINGS[setting]
    opts = {"stage": stage, "data": folder / "images", "encoder": folder / "encoder.safetensors", "init": folder / "stage1" / "last.pt", "out": out,
            "reg": REG, "size": size, "batch": batch, "steps": 10 ** 6, "workers": WORKERS, "lpips-net": net, "lpips-weights": folder / "trunk.pth",
            "gan-start": 0, "log-every": 1, "image-every": 10 ** 6, "save-every": 10 ** 6} | change
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *(str(w) for k, v in opts.items() for w in (f"--{k}", *([] if v is True else [v])))]


def measure(command, out, steps, skip, threads=None):
    """Runs `command` until out/metrics.jsonl has skip + steps lines, then kills it: (images/s of the last `steps`, peak GiB of a process)."""
    out.mkdir()
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    lines, peak = [], 0
    with open(out / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True) as process:
        try:
            while len(lines) < skip + steps:
                if process.poll() is not None:
                    sys.exit(f"bench_train.py: {' '.join(command)}\nended early:\n{(out / 'log').read_text()[-3000:]}")
                time.sleep(0.05)
                with contextlib.suppress(FileNotFoundError):
                    lines = (out / "metrics.jsonl").read_text().splitlines()
            peak = peak_memory(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    values = [json.loads(line) for line in lines[skip:skip + steps]]
    return [v["images/s"] for v in values], max(v["GiB"] for v in values) if DEVICE.type == "cuda" else peak


def peak_memory(session):
    """The highest resident memory, GiB, of any one process of the session. Not getrusage: a new process takes over its parent's peak there."""
    peaks = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):                    # a process may end meanwhile
            if os.getsid(int(status.parent.name)) == session:
                peaks += [int(line.split()[1]) / 2 ** 20 for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return max(peaks)


def bench_step(setting, folder, args):
    commands = {"train.py": lambda out: train_command(setting, folder, out)}
    if args.compile and "--compile" in (ROOT / "train.py").read_text():
        commands["train.py --compile"] = lambda out: train_command(setting, folder, out, compile=True)
    for name in PEERS:
        if args.compile or not PEERS[name][2]:
            commands[name] = lambda out, name=name: [sys.executable, __file__, "--peer", name, setting, str(folder), str(out)]
    speed, memory = {n: [] for n in commands}, {n: [] for n in commands}
    for i in range(args.rounds):
        for j, (name, command) in enumerate(commands.items()):
            rates, peak = measure(command(folder / f"run{i}{j}"), folder / f"run{i}{j}", args.steps, skip=3 if "compile" in name else 2)
            speed[name] += rates
            memory[name].append(peak)
            print(f"round {i + 1} of {args.rounds}: {name}, {statistics.median(rates):.3g} images/s", file=sys.stderr)
    speed, memory = ({n: statistics.median(v) for n, v in d.items()} for d in (speed, memory))
    batch = SETTINGS[setting][2]
    table(f"stage-2 step: {setting}, {SETTINGS[setting][1]} px, batch {batch}, {DEVICE.type}", ("", "s a step", "images/s", "ours over it", "peak GiB", "ours over it"),
          [(n, f"{batch / speed[n]:.3f}", f"{speed[n]:.2f}", f"{speed['train.py'] / speed[n]:.2f}", f"{memory[n]:.2f}", f"{memory['train.py'] / memory[n]:.2f}")
           for n in commands])


def bench_scaling(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    ranks = min(2, torch.cuda.device_count()) if DEVICE.type == "cuda" else 2
    cases = [dict(batch=b) for b in (max(1, batch // 4), batch // 2, batch, 2 * batch)]
    cases += [dict(batch=max(1, batch // k ** 2), size=k * size) for k in (2, 4)] + [dict(batch=batch // n, ranks=n) for n in (1, 2)[:ranks]]
    rows = []
    for i, case in enumerate(cases):
        n = case.get("ranks", 1)
        rates, peak = measure(train_command(setting, folder, folder / f"scale{i}", **case), folder / f"scale{i}", args.steps, 2,
                              threads=torch.get_num_threads() // n if DEVICE.type == "cpu" else None)
        rate = statistics.median(rates)
        rows.append((case.get("size", size), n, case["batch"], f"{n * case['batch'] / rate:.3f}", f"{rate:.2f}", f"{peak:.2f}"))
    table(f"train.py as work grows: {setting}, {DEVICE.type}", ("size", "ranks", "batch of a rank", "s a step", "images/s", "peak GiB of a rank"), rows)


# ------------------------------------------------------------------ parts

class Ours:
    """train.py's parts under the peer's names."""

    def __init__(self, setting, folder):
        args = train.options(train_command(setting, folder, folder / "none")[2:])
        self.sae, self.teacher, self.disc = train.build(args)
        self.perceptual = train.LPIPS(args.lpips_net, args.lpips_weights)
        for m in (self.sae.decoder, self.sae.down, self.disc, self.perceptual):
            m.to(memory_format=torch.channels_last)
        for m in (self.sae, self.teacher, self.disc, self.perceptual):
            m.to(DEVICE)
        self.decoder, self.trained = self.sae.decoder, list(self.sae.parameters())
        self.ema = [p.detach().clone() for p in self.trained]
        self.opt = torch.optim.AdamW(self.trained, lr=5e-6, betas=(0.9, 0.95), weight_decay=0, fused=True)
        self.opt_disc = torch.optim.AdamW(self.disc.parameters(), lr=5e-6, betas=(0.9, 0.95), weight_decay=0, fused=True)
        self.generator, self.side = [self.sae], args.size // 16

    def autocast(self):
        return torch.autocast(DEVICE.type, torch.bfloat16)

    def encode(self, x):
        return self.sae.encoder(x)[2]

    def teach(self, x):
        with torch.no_grad():
            return self.teacher(x)[2]

    def bottleneck(self, patches):
        q = self.sae.posterior(patches, self.side, self.side)
        return sae.reparameterize(q.mu, q.logvar, 0)

    def mse(self, patches, target):
        return sae.feature_mse(patches, target)

    def lpips(self, xhat, x):
        return self.perceptual(xhat, x).mean()

    def disc_loss(self, xhat, x):
        return train.discriminator_loss(*self.disc(torch.cat([x, xhat])).float().chunk(2), "nonsaturating")

    def update(self):
        self.opt.step()
        torch._foreach_lerp_(self.ema, self.trained, 1 - 0.9995)


def part_runners(m, x):
    """{part: a call that runs it forward and backward} of Ours or a Peer."""
    with m.autocast(), torch.no_grad():
        patches = m.encode(x)
        z, _ = m.bottleneck(patches)
        xhat = m.decoder(z)

    def both(f, *inputs):
        def run():
            leaves = [t.detach().requires_grad_() for t in inputs]
            for g in (*m.generator, m.disc):
                g.zero_grad()
            with m.autocast():
                out = f(*leaves)
            torch.autograd.backward(out, [torch.ones_like(o) for o in out] if isinstance(out, tuple) else torch.ones_like(out))
        return run

    def gan():
        m.disc.requires_grad_(False)
        both(lambda fake: F.softplus(-m.disc(fake).float()).mean(), xhat)()
        m.disc.requires_grad_(True)
        both(lambda: m.disc_loss(xhat, x))()
        m.opt_disc.step()

    def teacher():
        with m.autocast():
            m.teach(x)

    both(lambda: (m.encode(x), *m.bottleneck(patches), m.decoder(z)))()                  # gradients, for the optimiser
    gradients = [p.grad for p in m.trained]

    def update():
        for p, g in zip(m.trained, gradients):
            p.grad = g
        m.update()

    return {"encoder": both(lambda: m.encode(x)), "teacher, forward": teacher, "bottleneck and KL": both(m.bottleneck, patches),
            "teacher MSE": both(lambda p: m.mse(p, patches), patches), "decoder": both(m.decoder, z), "LPIPS": both(lambda fake: m.lpips(fake, x), xhat),
            "GAN, both players": gan, "AdamW and EMA": update}


def bench_parts(setting, folder, args):
    _, size, batch, *_ = SETTINGS[setting]
    x = (torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1).contiguous(memory_format=torch.channels_last)
    names = ["train.py", *(n for n in PEERS if args.compile or not PEERS[n][2])]
    runners = {n: part_runners(Peer(setting, *PEERS[n]) if n in PEERS else Ours(setting, folder), x) for n in names}
    rows = []
    for part in runners["train.py"]:
        times = {n: [] for n in names}
        for i in range(args.rounds + 1):                      # the first round warms up
            for name in names:
                torch.cuda.synchronize() if DEVICE.type == "cuda" else None
                start = time.perf_counter()
                runners[name][part]()
                torch.cuda.synchronize() if DEVICE.type == "cuda" else None
                times[name] += [time.perf_counter() - start] if i else []
        times = {n: 1e3 * statistics.median(t) for n, t in times.items()}
        rows.append((part, *(f"{t:.1f}" + (f" ({t / times['train.py']:.2f})" if n in PEERS else "") for n, t in times.items())))
    table(f"parts, forward and backward, ms (over ours): {setting}, {size} px, batch {batch}", ("", *names), rows)

# ------------------------------------------------------------------ data

def jpegs(folder, width, height, n=8):
    """n synthetic JPEGs of about a photo's size in bytes: noise of all scales, its amplitude that of the scale. Quality 90, 4:2:0."""
    folder.mkdir(parents=True)
    for i in range(n):
        rng, total = np.random.default_rng(i), np.zeros((height, width, 3))
        for k in 2 ** np.arange(8):
            noise = rng.normal(0, 6 * k ** 0.5, (height // k + 1, width // k + 1, 3))
            total += np.stack([np.asarray(Image.fromarray(c.astype(np.float32)).resize((width, height), Image.BICUBIC)) for c in np.moveaxis(noise, 2, 0)], 2)
        Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def bench_data(setting, folder, args):
    """CPU time, so that a busy machine does not count; every competitor ends with a uint8 tensor."""
    from torchvision import io
    from torchvision.transforms import v2
    torch.set_num_threads(1)
    sources = {f"{w}x{h}": (folder / f"jpeg{w}", 256) for w, h in ((500, 375), (1600, 1200), (4000, 3000))}
    for name, (path, _) in sources.items():
        jpegs(path / "a", *map(int, name.split("x")), n=2 if args.quick else 8)
    if "SAE_TEST_DATA" in os.environ:
        sources["caltech24"] = (Path(os.environ["SAE_TEST_DATA"]) / "data" / "caltech24" / "images", 128)
    rows = []
    for name, (path, size) in sources.items():
        images = train.ImageFolder(path)
        images.files = images.files[::8] if len(images) > 1000 else images.files
        ours, rng = train.TrainingImages(images, size, 0), np.random.default_rng(0)
        transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.RandomCrop(size), v2.RandomHorizontalFlip()])

        def pil(i):
            im = Image.open(images.files[i]).convert("RGB")
            scale = size / min(im.size)
            im = im.resize((max(size, round(im.width * scale)), max(size, round(im.height * scale))), Image.BICUBIC)
            left, top = rng.integers(im.width - size + 1), rng.integers(im.height - size + 1)
            im = im.crop((left, top, left + size, top + size))
            return torch.from_numpy(np.array(im.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else im))

        competitors = {"train.py": lambda i: ours[i], "PIL": pil, "torchvision, PIL": lambda i: v2.functional.pil_to_tensor(transform(Image.open(images.files[i]).convert("RGB"))),
                       "torchvision, decode_jpeg": lambda i: transform(io.decode_jpeg(io.read_file(images.files[i]), io.ImageReadMode.RGB))}
        times = {n: [] for n in competitors}
        for _ in range(args.rounds + 1):
            for n, f in competitors.items():
                start = time.process_time()
                for i in range(len(images)):
                    f(i)
                times[n].append((time.process_time() - start) / len(images))
        times = {n: statistics.median(t[1:]) for n, t in times.items()}
        rows.append((name, size, *(f"{1 / t:.0f}" + (f" ({t / times['train.py']:.2f})" if n != "train.py" else "") for n, t in times.items())))
    table("images/s of one core (ours over it)", ("JPEGs", "crop", *competitors), rows)


BENCHES = {"step": bench_step, "scaling": bench_scaling, "parts": bench_parts, "data": bench_data}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured in each run, after the first ones")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd competitors too: minutes to build")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all runs")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer_run(args.peer[0], args.peer[1], *map(Path, args.peer[2:]))
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose of {', '.join(BENCHES)}")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else f'{torch.get_num_threads()} threads'}")
    for setting in ["quick"] if args.quick else ["S"] if DEVICE.type == "cpu" else ["H+, LDM decoder", "H+"]:
        with tempfile.TemporaryDirectory() as folder:
            what = args.what or BENCHES
            if set(what) - {"data"}:
                prepare(setting, Path(folder))
            for name in what:
                BENCHES[name](setting, Path(folder), args)


if __name__ == "__main__":
    main()
