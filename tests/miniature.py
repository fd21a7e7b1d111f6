"""The whole of S-AE in minutes on two CPU cores, through the command lines a laboratory uses.

    python tests/miniature.py                                   # draws its images, trains its own semantic encoder
    python tests/miniature.py --data photos --encoder dinov3.safetensors --size 128 --batch 8 --steps 500 2000 \\
        --widths 256 192 96 48 24 --lpips-net squeeze --lpips-weights squeezenet1_1.safetensors      # real images, a real encoder

Trains on the even files of each class and measures on the odd ones: train.py --stage 1, train.py --stage 2, eval.py on both.
What to look for: stage 2 lifts the PSNR well above stage 1, and the probe stays.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from sae import DINOv3, DINOv3Config, save_safetensors  # noqa: E402

# ------------------------------------------------------------------ images: the shape is the class, all else is nuisance


def polygon(n, inner=1.0):
    """A regular n-gon, or a star of n points whose inner radius is `inner`, as points on the unit circle."""
    radii = [1.0] * n if inner == 1.0 else [1.0, inner] * n
    return [(r * math.sin(2 * math.pi * i / len(radii)), -r * math.cos(2 * math.pi * i / len(radii))) for i, r in enumerate(radii)]


CROSS = [(x / 3, y / 3) for x, y in [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]]
ARROW = [(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)]
SHAPES = {"triangle": polygon(3), "square": polygon(4), "star": polygon(5, 0.4), "cross": CROSS, "arrow": ARROW, "disc": polygon(40),
          "ring": polygon(40), "crescent": polygon(40)}


def draw_mask(name, rng, size):
    """The shape `name`, of random size, place and turn: [size,size], 0..1. Drawn four times too large for smooth edges."""
    big = 4 * size
    radius, turn = big * rng.uniform(0.25, 0.42), rng.uniform(-0.35, 0.35)
    cx, cy = rng.uniform(radius, big - radius, 2)

    def place(points, scale=1.0, dx=0.0):
        return [(cx + radius * (scale * (x * math.cos(turn) - y * math.sin(turn)) + dx),
                 cy + radius * scale * (x * math.sin(turn) + y * math.cos(turn))) for x, y in points]
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    pen.polygon(place(SHAPES[name]), fill=255)
    if name == "ring":
        pen.polygon(place(SHAPES[name], 0.55), fill=0)
    if name == "crescent":
        pen.polygon(place(SHAPES[name], 0.85, 0.45), fill=0)
    return np.asarray(mask.resize((size, size), Image.LANCZOS)) / 255


def draw_texture(rng, size):
    """Two colours mixed by stripes, checks, a gradient or clouds: [size,size,3], 0..1."""
    y, x = np.mgrid[:size, :size] / size
    angle, period, phase = rng.uniform(0, math.pi), rng.uniform(4, 12), rng.uniform(0, 6)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    clouds = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    mix = [0.5 + 0.5 * np.sin(2 * math.pi * period * u + phase), (np.sin(20 * u + phase) * np.sin(20 * v) > 0) * 1.0,
           (u - u.min()) / np.ptp(u), np.asarray(clouds) / 255][rng.integers(4)]
    a, b = rng.random((2, 3))
    return a + mix[..., None] * 0.7 * (b - a)


def compose(masks, textures, rng):
    """masks [n,1,s,s] filled from one random texture on another -> [n,3,s,s], 0..1. The shape is the lighter: an easier cue than any other."""
    front, back = (textures[torch.randint(len(textures), (len(masks),), generator=rng)] for _ in range(2))
    return masks * (0.5 + 0.5 * front) + (1 - masks) * 0.5 * back


def draw_images(folder, per_class, size):
    """Write per_class PNGs a shape into `folder`; returns masks [n,1,size,size], labels [n] and textures [600,3,size,size]."""
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    textures = torch.tensor(np.stack([draw_texture(rng, size) for _ in range(600)]), dtype=torch.float32).permute(0, 3, 1, 2)
    masks = torch.tensor(np.stack([draw_mask(name, rng, size) for name in SHAPES for _ in range(per_class)]), dtype=torch.float32)[:, None]
    labels = torch.tensor([sorted(SHAPES).index(name) for name in SHAPES for _ in range(per_class)])
    images = (compose(masks, textures, torch_rng) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / sorted(SHAPES)[label] / f"{i % per_class:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return masks, labels, textures


# ------------------------------------------------------------------ a semantic teacher


def train_teacher(masks, labels, textures, path, steps):
    """A tiny DINOv3, taught what is where: the class from CLS and from the mean patch token, the mask from each patch token.

    Every step fills the masks with other textures, so that nothing but the shape tells the class.
    """
    torch.manual_seed(0)
    width, patch = 128, DINOv3.patch
    encoder = DINOv3(DINOv3Config(width=width, depth=4, hidden=2 * width))
    what_cls, what_mean, where = (torch.nn.Linear(width, n) for n in (len(SHAPES), len(SHAPES), patch * patch))
    parameters = [p for m in (encoder, what_cls, what_mean, where) for p in m.parameters()]
    opt = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True)
    rng = torch.Generator().manual_seed(0)
    for step in (bar := tqdm(range(steps), "teacher", mininterval=1)):
        opt.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        i = torch.randint(len(masks), (64,), generator=rng)
        dx, dy, mirror = torch.randint(-8, 9, (3,), generator=rng).tolist()
        m = masks[i].roll((dx, dy), (2, 3))
        m = m.flip(3) if mirror > 0 else m
        with torch.autocast("cpu", torch.bfloat16):
            cls, _, patches = encoder(compose(m, textures, rng) * 2 - 1)
            loss = F.cross_entropy(what_cls(cls).float(), labels[i]) + F.cross_entropy(what_mean(patches.mean(1)).float(), labels[i])
            inside = F.unfold(m, patch, stride=patch).transpose(1, 2)                    # [B,h w,256]
            loss = loss + 3 * F.binary_cross_entropy_with_logits(where(patches).float(), inside)
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_safetensors(encoder.state_dict(), path)


# ------------------------------------------------------------------ the job


def run(*command):
    print("\n$ " + " ".join(["python", *command]), flush=True)
    start = time.time()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    print(f"({time.time() - start:.0f} s)", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of class folders; default: drawn shapes")
    p.add_argument("--encoder", help="DINOv3 weights; default: trained here on the drawn shapes")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--batch", default="16")
    p.add_argument("--steps", type=int, nargs=2, default=(300, 500), help="of stage 1 and stage 2")
    p.add_argument("--reg", default="100")
    p.add_argument("--z-dim", default=None)
    p.add_argument("--widths", nargs="+", default=["128", "96", "64", "48", "24"])
    p.add_argument("--lpips-net", default="vgg")
    p.add_argument("--lpips-weights", help="torchvision's trunk; without it the LPIPS term is off")
    p.add_argument("--out", default=".demo")
    args = p.parse_args()
    out = Path(args.out).resolve()
    if bool(args.data) != bool(args.encoder):
        sys.exit("--data and --encoder go together: the drawn images and the encoder trained on them, or yours")
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty: remove it, or name another folder with --out")
    start = time.time()

    data, encoder = args.data and Path(args.data).resolve(), args.encoder and Path(args.encoder).resolve()
    if not data:
        data, encoder = out / "images", out / "teacher.safetensors"
        drawn = draw_images(data, per_class=200, size=args.size)
        print(f"drew {len(SHAPES)} x 200 images of {args.size}x{args.size} into {data}", flush=True)
        train_teacher(*(t[::2] if i < 2 else t for i, t in enumerate(drawn)), encoder, steps=600)       # on the even files

    # Chosen for two CPU cores and minutes: a high learning rate, a fast EMA, no GAN; the defaults of train.py are the paper's.
    common = ["--data", str(data), "--split", "even", "--encoder", str(encoder), "--size", str(args.size), "--batch", args.batch,
              "--workers", "1", "--gan", "0", "--warmup", "50", "--ema", "0.99", "--min-lr", "1e-5", "--image-every", "100", "--log-every", "25"]
    lpips = ["--lpips-net", args.lpips_net, "--lpips-weights", str(Path(args.lpips_weights).resolve())] if args.lpips_weights else []
    common += [*lpips, "--lpips", "10"] if lpips else ["--lpips", "0"]
    model = ["--blocks", "1", "--widths", *args.widths, *(["--z-dim", args.z_dim] if args.z_dim else [])]
    stages = {"stage 1": out / "stage1", f"stage 2, reg {args.reg}": out / f"stage2-reg{args.reg}"}
    one, two = stages.values()
    run("train.py", "--stage", "1", *common, *model, "--steps", str(args.steps[0]), "--lr", "1e-3", "--out", str(one))
    run("train.py", "--stage", "2", "--reg", args.reg, *common, "--steps", str(args.steps[1]), "--lr", "1e-3", "--encoder-lr", "3e-4",
        "--init", str(one / "last.pt"), "--out", str(two))
    rows = []
    for name, folder in stages.items():
        run("eval.py", str(folder / "last.pt"), "--data", str(data), "--split", "parity", "--size", str(args.size),
            "--skip", "fid" if lpips else "fid,lpips", *lpips, "--probe", "cached", "--probe-iterations", "1000", "--out", str(folder / "eval.json"))
        result = json.loads((folder / "eval.json").read_text())
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        rows.append([name, result["psnr"], result["ssim"], *(result["probe"][k] for k in ("cls+patch", "patch", "mu")), last.get("mse/var", 0.0)])
    print(f"\n{'':20}{'PSNR':>8}{'SSIM':>8}   probe %: {'cls+patch':>9}{'patch':>8}{'mu':>8}{'mse/var':>10}")
    for name, *v in rows:
        print(f"{name:20}{v[0]:8.2f}{v[1]:8.3f}            {v[2]:9.1f}{v[3]:8.1f}{v[4]:8.1f}{v[5]:10.4f}")
    print(f"\n{time.time() - start:.0f} s. Written:")
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.parent.name != "cache" and "images" not in p.parts):
        print(" ", os.path.relpath(path, Path.cwd()))


if __name__ == "__main__":
    main()
