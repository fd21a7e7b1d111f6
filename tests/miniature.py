"""The whole of S-AE in minutes on two CPU cores, through the command lines a laboratory uses.

    python tests/miniature.py                                   # draws its images, trains its own teacher
    python tests/miniature.py --data photos --encoder dinov3.safetensors --size 128 \\
        --widths 256 192 96 48 24 --steps 500 2000 --lr 1e-3 3e-4 \\
        --lpips-net squeeze --lpips-weights squeezenet1_1.safetensors

Trains on the even files of each class and measures on the odd ones: train.py --stage 1, then --stage 2 for
each --reg, and eval.py. What to look for: stage 2 lifts the PSNR well above stage 1, and only with a reg the
probe stays.
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
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import ImageFolder, center_crop, load_image  # noqa: E402
from sae import SAE, DINOv3, DINOv3Config  # noqa: E402
from sae_weights import save_safetensors  # noqa: E402

# ------------------------------------------------------------------ images
# The shape is the class, all else is nuisance.


def polygon(n, inner=1.0):
    """A regular n-gon, or a star of n points whose inner radius is `inner`, as points on the unit circle."""
    radii = [1.0] * n if inner == 1.0 else [1.0, inner] * n
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles)]


CROSS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
         (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
CROSS = [(x / 3, y / 3) for x, y in CROSS]
ARROW = [(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)]
PARTS = ("train", "val")
SHAPES = {"triangle": polygon(3), "square": polygon(4), "star": polygon(5, 0.4), "cross": CROSS,
          "arrow": ARROW, "disc": polygon(40), "ring": polygon(40), "crescent": polygon(40)}


def draw_mask(name, rng, size):
    """The shape `name`, of random size, place and turn: [size,size], 0..1."""
    big = 4 * size                      # for smooth edges
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
    mix = [0.5 + 0.5 * np.sin(2 * math.pi * period * u + phase),
           (np.sin(20 * u + phase) * np.sin(20 * v) > 0) * 1.0,
           (u - u.min()) / np.ptp(u),
           np.asarray(clouds) / 255][rng.integers(4)]
    a, b = rng.random((2, 3))
    return a + mix[..., None] * 0.7 * (b - a)


def compose(masks, textures, rng):
    """masks [n,1,s,s] filled from one random texture on another -> [n,3,s,s], 0..1.

    The shape is the lighter: an easier cue than any other.
    """
    front, back = (textures[torch.randint(len(textures), (len(masks),), generator=rng)] for _ in range(2))
    return masks * (0.5 + 0.5 * front) + (1 - masks) * 0.5 * back


def draw_images(folder, per_class, size):
    """Draw per_class images a shape, even ones into folder/train and odd ones into folder/val.

    Returns masks [n,1,size,size] and labels [n] of the training images, and textures [600,3,size,size].
    """
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    textures = np.stack([draw_texture(rng, size) for _ in range(600)])
    textures = torch.tensor(textures, dtype=torch.float32).permute(0, 3, 1, 2)
    masks = np.stack([draw_mask(name, rng, size) for name in SHAPES for _ in range(per_class)])
    masks = torch.tensor(masks, dtype=torch.float32)[:, None]
    labels = torch.tensor([sorted(SHAPES).index(name) for name in SHAPES for _ in range(per_class)])
    images = (compose(masks, textures, torch_rng) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / PARTS[i % 2] / sorted(SHAPES)[label] / f"{i % per_class:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return masks[::2], labels[::2], textures


def link_images(data, folder):
    """Link the images of a folder of class folders: the even ones of each class to train, the odd to val."""
    images = ImageFolder(data)
    for label, name in enumerate(images.classes):
        files = [file for file, of in zip(images.files, images.labels) if of == label]
        for i, file in enumerate(files):
            link = folder / PARTS[i % 2] / name / f"{i:06d}{Path(file).suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(file).resolve())


# ------------------------------------------------------------------ a semantic teacher


def train_teacher(masks, labels, textures, path, steps):
    """A tiny DINOv3, taught what is where.

    The class from CLS and from the mean patch token, the mask from each patch token.
    Every step fills the masks with other textures, so that nothing but the shape tells the class.
    """
    torch.manual_seed(0)
    width, patch = 128, DINOv3.patch
    encoder = DINOv3(DINOv3Config(width=width, depth=4, hidden=2 * width))
    what_cls, what_mean = (torch.nn.Linear(width, len(SHAPES)) for _ in range(2))
    where = torch.nn.Linear(width, patch * patch)
    parameters = [p for m in (encoder, what_cls, what_mean, where) for p in m.parameters()]
    opt = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True)
    rng = torch.Generator().manual_seed(0)
    for step in (bar := tqdm(range(steps), "teacher", mininterval=1)):
        opt.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        i = torch.randint(len(masks), (64,), generator=rng)
        dx, dy, mirror = torch.randint(-8, 9, (3,), generator=rng).tolist()
        m = masks[i].roll((dx, dy), (2, 3))
        m = m.flip(3) if mirror > 0 else m
        cls, _, patches = encoder(compose(m, textures, rng) * 2 - 1)
        inside = F.unfold(m, patch, stride=patch).transpose(1, 2)                        # [B,h w,256]
        loss = F.cross_entropy(what_cls(cls), labels[i])
        loss = loss + F.cross_entropy(what_mean(patches.mean(1)), labels[i])
        loss = loss + 3 * F.binary_cross_entropy_with_logits(where(patches), inside)
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


def train_and_score(args, out, data, encoder):
    """Stage 1, then stage 2 for each reg, each with its scores: {name: its output folder}."""
    # Chosen for two CPU cores and minutes: a high rate, a fast EMA, no GAN. train.py's defaults are the
    # paper's.
    size = ["--size", str(args.size), "--workers", "1"]
    common = ["--data", str(data / "train"), "--encoder", str(encoder), *size, "--batch", str(args.batch),
              "--gan", "0", "--warmup", "50", "--ema", "0.99", "--min-lr", "1e-5",
              "--image-every", "500", "--log-every", "50"]
    lpips = []
    if args.lpips_weights:
        lpips = ["--lpips-net", args.lpips_net, "--lpips-weights", args.lpips_weights]
    common += [*lpips, "--lpips", "10"] if lpips else ["--lpips", "0"]
    lr, encoder_lr = map(str, args.lr)
    folders = {"stage 1": out / "stage1"} | {f"reg {reg}": out / f"stage2-reg{reg}" for reg in args.reg}
    for name, folder in folders.items():
        if name == "stage 1":
            stage = ["--stage", "1", "--blocks", "1", "--widths", *args.widths,
                     "--steps", str(args.steps[0]), "--lr", lr]
        else:
            stage = ["--stage", "2", "--reg", name.split()[1], "--init", str(out / "stage1/last.pt"),
                     "--steps", str(args.steps[1]), "--lr", lr, "--encoder-lr", encoder_lr]
        run("train.py", *stage, *common, "--out", str(folder))
        run("eval.py", str(folder / "last.pt"), "--data", str(data / "val"), "--train", str(data / "train"),
            *size, "--skip", "fid" if lpips else "fid,lpips", *lpips,
            "--probe", "cached", "--probe-iterations", "1000", "--out", str(folder / "eval.json"))
    return folders


def draw_demo(folders, data, size, path, n=8, scale=2):
    """One picture: originals of the test set, then a labelled row of reconstructions for each run."""
    files = ImageFolder(data / "val").files
    files = [files[i] for i in np.linspace(0, len(files) - 1, n).astype(int)]
    originals = [np.asarray(center_crop(load_image(file), size)) for file in files]
    originals = np.stack(originals)                                                      # [n,size,size,3]
    rows = {"original": originals}
    for name, folder in folders.items():
        sae = SAE.from_pretrained(folder / "last.pt")
        x = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            xhat = sae.decode(sae.encode(x).mode())
        rows[name] = ((xhat.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    side, label = scale * size, 110
    picture = Image.new("RGB", (label + n * side, len(rows) * side), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for y, (name, images) in enumerate(rows.items()):
        pen.text((8, y * side + side // 2 - 10), name, fill="black", font=font)
        for x, image in enumerate(images):
            image = Image.fromarray(image).resize((side, side), Image.BICUBIC)
            picture.paste(image, (label + x * side, y * side))
    picture.save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of class folders; default: drawn shapes")
    p.add_argument("--encoder", help="DINOv3 weights; default: trained here on the drawn shapes")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, nargs=2, default=(300, 1000), help="of stage 1 and stage 2")
    p.add_argument("--lr", type=float, nargs=2, default=(1e-3, 1e-3), help="of decoder and encoder")
    p.add_argument("--reg", nargs="+", default=["100", "0"], help="a stage 2 for each; 0 is the paper's E2E")
    p.add_argument("--widths", nargs="+", default=["128", "96", "64", "48", "24"])
    p.add_argument("--lpips-net", default="vgg")
    p.add_argument("--lpips-weights", help="torchvision's trunk; without it the LPIPS term is off")
    p.add_argument("--out", default=".demo")
    args = p.parse_args()
    out = Path(args.out).resolve()
    if bool(args.data) != bool(args.encoder):
        sys.exit("--data and --encoder go together: the drawn images and the encoder trained on them, or "
                 "yours")
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty: remove it, or name another folder with --out")
    if args.lpips_weights:
        args.lpips_weights = str(Path(args.lpips_weights).resolve())
    start, data = time.time(), out / "images"
    if args.data:
        link_images(args.data, data)
        encoder = Path(args.encoder).resolve()
    else:
        encoder = out / "teacher.safetensors"
        drawn = draw_images(data, per_class=200, size=args.size)
        print(f"drew {len(SHAPES)} x 200 images of {args.size}x{args.size} into {data}", flush=True)
        train_teacher(*drawn, encoder, steps=600)

    folders = train_and_score(args, out, data, encoder)
    draw_demo(folders, data, args.size, out / "demo.png")
    print(f"\n{'':12}{'PSNR':>8}{'SSIM':>8}   probe %: {'cls+patch':>9}{'patch':>8}{'mu':>8}{'mse/var':>10}")
    for name, folder in folders.items():
        scores = json.loads((folder / "eval.json").read_text())
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        probes = "".join(f"{scores['probe'][kind]:8.1f}" for kind in ("cls+patch", "patch", "mu"))
        drift = last.get("mse/var", 0)
        print(f"{name:12}{scores['psnr']:8.2f}{scores['ssim']:8.3f}             {probes}{drift:10.4f}")
    picture = os.path.relpath(out / "demo.png")
    print(f"\n{time.time() - start:.0f} s. Look at {picture}: test images, which no run has seen.")
    if not args.data:
        print("""What to look for, after as many steps as by default:
  stage 1: the frozen encoder tells the decoder the shape and its place, and hardly any colour.
  reg 100: sharper outlines and the colours of the grounds come back; the probe falls by a point or three.
  reg 0 (the paper's E2E): more of the colours still, and the probe collapses: the semantics are gone.""")


if __name__ == "__main__":
    main()
