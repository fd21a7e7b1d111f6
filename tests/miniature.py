"""The whole of S-AE in minutes or hours on two CPU cores, through the command lines a laboratory uses.

    python tests/miniature.py                                           # make demo: three rows, pictures
    python tests/miniature.py --rows all --seeds 0 1 2 --waves 4 12 --steps 300 2200 \\
        --out .miniature                                                # make miniature: all, finer textures
    python tests/miniature.py --out .photos --data photos --encoder dinov3.safetensors --size 128 \\
        --widths 256 192 96 48 24 --steps 500 1500 --gan 1 --precision bf16 --lpips-net squeeze \\
        --lpips-weights squeezenet1_1.safetensors --inception inception.pth \\
        --rows Freeze "reg 500" "reg 200" "reg 100" E2E

Without --data it draws its images and trains its own teacher. A row of the table is a train.py command, which
is printed, and its scores a JSON file in OUT/rows: one that is there is not made again, so that hours of
work can be interrupted, and go on. OUT/rows.md is their table, OUT/rows.png the figure. tests/tradeoff holds
the rows of the second command, tests/photos those of the third.
"""
import argparse
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import ImageFolder, load_crops, psnr, to_uint8  # noqa: E402
from eval import Moments, frechet_distance  # noqa: E402
from sae import SAE, DINOv3, DINOv3Config  # noqa: E402
from sae_weights import save_safetensors, write  # noqa: E402

# ------------------------------------------------------------------ the rows

UNTRAINED = ("--steps", "1", "--lr", "0")       # a stage 1 that leaves the decoder as it was initialised
ROWS = {                                        # (options of stage 1, --reg of stage 2; Freeze has none)
    "Freeze": ((), None),
    "Freeze, all steps": (("--steps", "ALL"), None),    # as many as the others have in both stages
    "reg 500": ((), "500"),
    "reg 200": ((), "200"),
    "reg 100": ((), "100"),
    "reg 10": ((), "10"),
    "reg 1": ((), "1"),
    "E2E": ((), "0"),
    "reg 100, no stage 1": (UNTRAINED, "100"),
    "E2E, no stage 1": (UNTRAINED, "0"),
    "VAE": (UNTRAINED, "0"),                    # its encoder starts from random weights
    "reg 5000": ((), "5000"),                   # ten times the paper's largest
    "f 32": (("--f", "32"), "100"),
    "f 64": (("--f", "64"), "100"),
    "z_dim / 4": (("--z-dim", "QUARTER"), "100"),
}
ONE_SEED = ("reg 10", "reg 1", "reg 5000", "f 32", "f 64", "z_dim / 4")     # what the paper does not have
DEMO = ("Freeze", "reg 100", "E2E")
LOOK_FOR = """
What to look for, after as many steps as by default:
  Freeze:  in stage 1's few steps the decoder has learned shapes and places, and hardly any colour.
  reg 100: with more steps come the colours, and the stripes and checks of the grounds; the probe holds.
  E2E:     colours and outlines are the best, and the probe collapses: the semantics are gone."""
PAPER = {                                       # probe %, PSNR on ImageNet 256
    "Freeze": (88.4, 19.39), "reg 500": (87.0, 29.74), "reg 200": (86.1, 32.21), "reg 100": (81.9, 33.84),
    "E2E": (12.4, 41.35), "VAE": (8.0, 25.29),
}

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


def draw_texture(rng, size, waves):
    """Two colours mixed by stripes, checks, a gradient or clouds: [size,size,3], 0..1.

    waves: how often stripes repeat in the width of an image, at least and at most. Checks repeat as often, up
    to three times.
    """
    y, x = np.mgrid[:size, :size] / size
    angle, frequency, phase = rng.uniform(0, math.pi), 2 * math.pi * rng.uniform(*waves), rng.uniform(0, 6)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    checks = min(frequency, 20)
    clouds = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    mix = [0.5 + 0.5 * np.sin(frequency * u + phase),
           (np.sin(checks * u + phase) * np.sin(checks * v) > 0) * 1.0,
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


def draw_images(folder, per_class, size, waves):
    """Draw per_class images a shape, even ones into folder/train and odd ones into folder/val.

    Returns masks [n,1,size,size] and labels [n] of the training images, and textures [600,3,size,size].
    """
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    textures = np.stack([draw_texture(rng, size, waves) for _ in range(600)])
    textures = torch.tensor(textures, dtype=torch.float32).permute(0, 3, 1, 2)
    masks = np.stack([draw_mask(name, rng, size) for name in SHAPES for _ in range(per_class)])
    masks = torch.tensor(masks, dtype=torch.float32)[:, None]
    labels = torch.tensor([sorted(SHAPES).index(name) for name in SHAPES for _ in range(per_class)])
    images = (compose(masks, textures, torch_rng) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / ("train", "val")[i % 2] / sorted(SHAPES)[label] / f"{i % per_class:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return masks[::2], labels[::2], textures


def link_images(data, folder):
    """Link the images of a folder of class folders: the even ones of each class to train, the odd to val."""
    images = ImageFolder(data)
    for label, name in enumerate(images.classes):
        files = [file for file, of in zip(images.files, images.labels) if of == label]
        for i, file in enumerate(files):
            link = folder / ("train", "val")[i % 2] / name / f"{i:06d}{Path(file).suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
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


# ------------------------------------------------------------------ training and scoring a row

JOB = threading.local()         # JOB.number of the threads that `side_by_side` starts
CORES = torch.get_num_threads()         # which the jobs of `side_by_side` share


def run(*command):
    """A command of this project, with this job's share of the cores and a progress bar on its own line."""
    print("\n$ " + shlex.join(["python", *command]), flush=True)
    start = time.time()
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()),
           "TQDM_POSITION": str(getattr(JOB, "number", 0))}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=True)
    print(f"({time.time() - start:.0f} s)", flush=True)


def side_by_side(jobs, calls):
    """Make `calls`, so many at a time. After one that fails no other begins; its error is raised.

    They share the cores: two runs with a thread each end sooner than one after the other with two.
    """
    jobs, numbers = min(jobs, len(calls)), itertools.count()
    torch.set_num_threads(max(1, CORES // jobs))
    with ThreadPoolExecutor(jobs, initializer=lambda: setattr(JOB, "number", next(numbers))) as pool:
        try:
            for done in as_completed([pool.submit(call) for call in calls]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def train(folder, stage, name, seed, args, paths, *options):
    """One train.py command for the row `name` into `folder`, which goes on where it was interrupted."""
    # Chosen for two CPU cores: high rates, a fast EMA. train.py's defaults are the paper's.
    lpips = ["--lpips", "0"]
    if args.lpips_weights:
        lpips = ["--lpips", "10", "--lpips-net", args.lpips_net, "--lpips-weights", args.lpips_weights]
    precision = ["--precision", args.precision] if args.precision else []
    resume = ["--resume"] if any(folder.glob("last*.pt")) else []
    encoder = paths["random" if name == "VAE" else "encoder"]
    run("train.py", "--stage", stage, "--data", str(paths["train"]), "--encoder", str(encoder), "--seed",
        str(seed), "--size", str(args.size), "--batch", str(args.batch), "--lr", args.lr[0], "--warmup", "50",
        "--min-lr", "1e-5", "--ema", "0.99", "--gan", args.gan, *lpips, *precision, "--image-every", "500",
        "--save-every", "500", "--workers", "1", *options, "--out", str(folder), *resume)


def row_folders(name, seed, out):
    """(folder of its stage 1, which rows share; folder of the row's own run)."""
    stage1, reg = ROWS[name]
    label = "vae" if name == "VAE" else "-".join(word.strip("-") for word in stage1) or "freeze"
    first = out / f"seed{seed}" / label.lower()
    return first, first if reg is None else first.with_name(f"{first.name}-reg{reg}")


def result_file(name, seed, out):
    """The JSON of a row that is done."""
    return out / "rows" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-seed{seed}.json"


def train_stage1(name, seed, args, paths):
    (stage1, _), (first, _) = ROWS[name], row_folders(name, seed, args.out)
    words = {"QUARTER": str(paths["width"] // 4), "ALL": str(sum(map(int, args.steps)))}
    stage1 = [words.get(option, option) for option in stage1]
    if not (first / "done").exists():
        train(first, "1", name, seed, args, paths, "--steps", args.steps[0], "--blocks", "1",
              "--widths", *args.widths, *stage1)
        (first / "done").touch()


def make_row(name, seed, args, paths):
    """Stage 2, unless the row has none, and its scores -> the row's JSON file."""
    (_, reg), (first, folder) = ROWS[name], row_folders(name, seed, args.out)
    if reg is not None:
        train(folder, "2", name, seed, args, paths, "--steps", args.steps[1], "--reg", reg,
              "--init", str(first / "last.pt"), "--encoder-lr", args.lr[1])
    row = {"row": name, "seed": seed, "scores": score_row(folder, args, paths),
           "settings": portable(args.settings), "torch": torch.__version__}
    text = json.dumps(row, indent=1).encode() + b"\n"
    write(result_file(name, seed, args.out), lambda file: file.write(text))


def score_row(folder, args, paths):
    """{column: number} of a finished run on the test images."""
    out = folder / "eval.json"
    common = [str(folder / "last.pt"), "--data", str(paths["val"]), "--train", str(paths["train"]), "--size",
              str(args.size), "--workers", "1", "--probe", "cached", "--probe-iterations", "1000"]
    skip = [] if args.inception else ["fid"]
    if args.lpips_weights:
        common += ["--lpips-net", args.lpips_net, "--lpips-weights", args.lpips_weights]
    else:
        skip.append("lpips")
    if args.inception:
        common += ["--inception", args.inception, "--fid-dims", "64"]
    run("eval.py", *common, "--skip", ",".join(skip), "--out", str(out))
    found = json.loads(out.read_text())
    scores = {"probe": found["probe"]["cls+patch"], "probe patch": found["probe"]["patch"],
              "probe mu": found["probe"]["mu"], "PSNR": found["psnr"], "SSIM": found["ssim"]}
    if args.lpips_weights:
        scores["LPIPS"] = found["lpips"]
    if args.inception:
        scores["FID-64"] = found["rfid"]
        run("eval.py", *common, "--fid-dims", "768", "--skip", "lpips,probe", "--out", str(out))
        scores["FID-768"] = json.loads(out.read_text())["rfid"]
    return scores | teacher_scores(folder, args, paths)


@torch.no_grad()
def teacher_scores(folder, args, paths):
    """What the teacher sees of a run's test images, and how far the student's tokens have moved from its own.

    FD: Frechet distance of the teacher's mean patch tokens, reconstructions to test images. mse/var: that of
    the patch tokens, as a share of their variance. PSNR 3:4: of crops that are a quarter less high than wide,
    where f divides their height.
    """
    sae, teacher = SAE.from_pretrained(folder / "last.pt"), DINOv3.from_pretrained(paths["encoder"])
    files, f, grid = ImageFolder(paths["val"]).files, sae.config.f, (args.size // DINOv3.patch,) * 2
    real, fake = (Moments(teacher.cfg.width, "cpu") for _ in range(2))
    mse, tokens, db, height = 0.0, [], [], args.size * 3 // 4
    for i in range(0, len(files), 32):
        x = load_crops(files[i:i + 32], args.size)                                       # [B,3,S,S]
        target = teacher(x)[2]                                                           # [B,N,D]
        patches = sae.encoder(x)[2]                                                      # [B,N,D]
        xhat = sae.decode(sae.posterior(patches, *grid).mode()).clamp(-1, 1)
        real.update(target.mean(1))
        fake.update(teacher(xhat)[2].mean(1))
        mse += (patches - target).square().sum().item()
        tokens.append(target)
        if height % f == 0:
            wide = x[:, :, :height]                                                      # [B,3,3/4 S,S]
            db.append(psnr(to_uint8(wide), to_uint8(sae.decode(sae.encode(wide).mode()))))
    tokens = torch.cat(tokens)
    scores = {"FD": frechet_distance(*real.mean_cov(), *fake.mean_cov()),
              "mse/var": mse / tokens.numel() / tokens.var().item()}
    return scores | ({"PSNR 3:4": torch.cat(db).mean().item()} if db else {})


# ------------------------------------------------------------------ what it shows

DIGITS = {"probe": 1, "probe patch": 1, "probe mu": 1, "PSNR": 2, "SSIM": 3, "LPIPS": 3, "FID-64": 2,
          "FID-768": 3, "FD": 2, "mse/var": 4, "PSNR 3:4": 2}


def read_results(results):
    """{row: [its scores, one dict a seed]} of the JSON files in `results`, in the order of ROWS."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    scores = {name: [row["scores"] for row in found if row["row"] == name] for name in ROWS}
    return {name: seeds for name, seeds in scores.items() if seeds}


def mean_and_spread(values, digits):
    """As text: their mean, and ± their standard deviation where there are several; 0 where all are."""
    if not any(values):
        return "0"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def markdown(lines):
    """The Markdown table of lines of cells, of which the first are its titles."""
    rows = [f"| {' | '.join(map(str, cells))} |\n" for cells in lines]
    return rows[0] + "|---" * len(lines[0]) + "|\n" + "".join(rows[1:])


def table(rows):
    """The Markdown table of `rows`, over their seeds, beside the paper's probe and PSNR."""
    columns = [c for c in DIGITS if any(c in scores[0] for scores in rows.values())]
    lines = [["row", "seeds", *columns, "paper's"]]
    for name, scores in rows.items():
        cells = [mean_and_spread([s[column] for s in scores], DIGITS[column]) if column in scores[0] else "-"
                 for column in columns]
        paper = ", ".join(map(str, PAPER.get(name, ["-"])))
        lines.append([name, len(scores), *cells, paper])
    return markdown(lines)


def draw_figure(rows, path):
    """Probe against PSNR: the rows with their spread, the upper ones again, enlarged, and the paper's."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib, which is in this project's extra `plots`")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    marker, colours = dict(zip(ROWS, "oHsD^v<>PX*hdp8")), dict(zip(ROWS, pyplot.colormaps["tab20"].colors))
    for name, scores in rows.items():
        x, y = ([s[column] for s in scores] for column in ("PSNR", "probe"))
        spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in (x, y)]
        for ours in axes[:2]:
            ours.errorbar(statistics.mean(x), statistics.mean(y), xerr=spread[0], yerr=spread[1], capsize=3,
                          fmt=marker[name], color=colours[name], label=name)
    for name, (probe, db) in PAPER.items():
        axes[2].plot(db, probe, marker[name], color="grey", label=name)

    top = max(statistics.mean(s["probe"] for s in scores) for scores in rows.values())
    limits = {"measured here": (0, 105), "its upper part": (top - 8, top + 1),
              "the paper's, ImageNet 256": (0, 105)}
    for plot, (title, ylim) in zip(axes, limits.items()):
        plot.set(title=title, xlabel="PSNR, dB", ylabel="linear probe, %", ylim=ylim)
    for plot in axes[0], axes[2]:
        plot.legend(loc="lower left", fontsize=8)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_rows(rows, path, columns=(), side=128):
    """A PNG of {label: images uint8 [n,S,S,3]}, a row each, enlarged to `side`, with names of the columns."""
    font, top, n = ImageFont.load_default(20), 30 if columns else 0, max(map(len, rows.values()))
    label = max(110, *(int(font.getlength(name)) + 16 for name in rows))
    picture = Image.new("RGB", (label + n * side, top + len(rows) * side), "white")
    pen = ImageDraw.Draw(picture)
    for x, name in enumerate(columns):
        pen.text((label + x * side + 4, 4), name, fill="black", font=font)
    for y, (name, images) in enumerate(rows.items()):
        pen.text((8, top + y * side + side // 2 - 10), name, fill="black", font=font)
        for x, image in enumerate(images):
            image = Image.fromarray(image).resize((side, side), Image.BICUBIC)
            picture.paste(image, (label + x * side, top + y * side))
    write(path, lambda file: picture.save(file, format="png", optimize=True))


def to_pixels(x):
    """[B,3,H,W] in [-1,1] -> uint8 [B,H,W,3]."""
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


class Principal:
    """The first three principal components of maps [n,C,h,w] as red, green and blue."""

    def __init__(self, maps):
        rows = maps.transpose(0, 1).flatten(1).T                                         # [n h w,C]
        self.mean = rows.mean(0)
        self.basis = torch.linalg.svd(rows - self.mean, full_matrices=False)[2][:3].T    # [C,3]
        self.scale = 2 * ((rows - self.mean) @ self.basis).std(0)

    def paint(self, maps, size):
        """maps [n,C,h,w] -> uint8 [n,size,size,3], grey where a map is at the mean."""
        colours = (maps.movedim(1, -1) - self.mean) @ self.basis / self.scale            # [n,h,w,3]
        return to_pixels(F.interpolate(colours.movedim(-1, 1), size=(size, size)))


@torch.no_grad()
def draw_runs(folders, paths, size, demo_path, one_path, n=8):
    """Two pictures of test images. demo_path: originals, then a row of reconstructions for each run.

    one_path: the first of them on its way through each run: patch tokens, painted by the principal components
    of the teacher's, so that a run whose tokens have kept their meaning keeps their colours; mu, by its own.
    """
    files = ImageFolder(paths["val"]).files
    files = [files[i] for i in np.linspace(0, len(files) - 1, 8 * n).astype(int)]        # 8 n, for the basis
    x, shown = load_crops(files, size), slice(0, None, 8)                                # [8 n,3,S,S]
    grid = (size // DINOv3.patch,) * 2
    tokens = DINOv3.from_pretrained(paths["encoder"])(x)[2].transpose(1, 2).unflatten(2, grid)
    colours = Principal(tokens)                                                          # of [8 n,D,h,w]

    rows, steps = {"original": to_pixels(x[shown])}, {}
    for name, folder in folders.items():
        sae = SAE.from_pretrained(folder / "last.pt")
        patches = sae.encoder(x)[2]                                                      # [8 n,h w,D]
        mu = sae.posterior(patches, *grid).mode()
        tokens = patches.transpose(1, 2).unflatten(2, grid)
        rows[name] = to_pixels(sae.decode(mu[shown]))
        steps[name] = np.stack([rows["original"][0], colours.paint(tokens[:1], size)[0],
                                Principal(mu).paint(mu[:1], size)[0], rows[name][0]])
    draw_rows(rows, demo_path)
    draw_rows(steps, one_path, columns=("x", "patch tokens", "mu", "xhat"))


# ------------------------------------------------------------------ the command

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", default=list(DEMO), choices=["all", *ROWS], metavar="ROW",
                   help=f"all, or some of: {', '.join(ROWS)}; default {', '.join(DEMO)}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--data", help="folder of class folders; default: drawn shapes")
    p.add_argument("--encoder", help="DINOv3 weights; default: trained here on the drawn shapes")
    p.add_argument("--size", type=int, default=64)
    # A decoder of few steps draws stripes wider than a patch, and the mean of finer ones: nearest x2 and a
    # convolution make one colour of equal neighbours, so what repeats within each patch is learned late.
    p.add_argument("--waves", type=float, nargs=2, default=(1, 2), metavar=("LEAST", "MOST"),
                   help="how often stripes repeat in the width of a drawn image")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", nargs=2, default=("300", "1300"), help="of stage 1 and stage 2")
    p.add_argument("--lr", nargs=2, default=("1e-3", "5e-4"), help="of decoder and encoder")
    # Odd multiples of 8 have two groups to a GroupNorm (sae.py: groups). With many, each takes the mean of a
    # few channels out of each image, and the decoder learns colours late.
    p.add_argument("--widths", nargs="+", default=["120", "72", "40", "24", "24"])
    p.add_argument("--precision", choices=("fp32", "bf16"),
                   help="of training; default: train.py's. bf16 is twice as fast on a CPU with AMX")
    p.add_argument("--gan", default="0", help="weight of the GAN term")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    p.add_argument("--lpips-net", default="vgg")
    p.add_argument("--lpips-weights", help="torchvision's trunk; without it the LPIPS term is off")
    p.add_argument("--inception", help="FID's Inception; without it there is no FID")
    p.add_argument("--out", type=Path, default=Path(".demo"))
    args = p.parse_args()
    if bool(args.data) != bool(args.encoder):
        p.error("--data and --encoder go together: both are yours, or both are made here")
    if "all" in args.rows:
        args.rows = list(ROWS)
    if args.data:
        args.waves = None                       # which drawn images alone have
    args.out = args.out.resolve()
    for name in "data", "encoder", "lpips_weights", "inception":
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    return args


def prepare(args):
    """Images and teacher, drawn and trained where they are not there yet: what the rows' commands name."""
    data, encoder = args.out / "images", args.out / "teacher.safetensors"
    if args.data:
        link_images(args.data, data)
        encoder = Path(args.encoder)
    elif not encoder.exists():                  # it is written last, and whole
        drawn = draw_images(data, 200, args.size, args.waves)
        print(f"drew {len(SHAPES)} x 200 images of {args.size}x{args.size} into {data}", flush=True)
        train_teacher(*drawn, encoder, steps=600)
    torch.manual_seed(0)
    teacher, random = DINOv3.from_pretrained(encoder), args.out / "random"
    random.mkdir(exist_ok=True)
    save_safetensors(DINOv3(teacher.cfg).state_dict(), random / "model.safetensors")
    beside = encoder if encoder.is_dir() else encoder.parent
    for name in "config.json", "preprocessor_config.json":          # they decide heads, eps, mean and std
        if (beside / name).exists():
            shutil.copy(beside / name, random)
    return {"train": data / "train", "val": data / "val", "encoder": encoder, "random": random,
            "width": teacher.cfg.width}


def portable(settings):
    """Paths by their last two names, "caltech24/images": so that results do not depend on where they lie."""
    return {k: "/".join(Path(v).parts[-2:]) if isinstance(v, str) else v for k, v in settings.items()}


def check_settings(args):
    """The options that decide numbers. Ends the program where --out holds those of others."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "rows", "seeds", "jobs")}
    settings = json.loads(json.dumps(settings))         # tuples become lists, as in the files
    file, wanted = args.out / "settings.json", portable(settings)
    kept = portable(json.loads(file.read_bytes())) if file.exists() else wanted
    differ = [f"--{k.replace('_', '-')}" for k in wanted if wanted[k] != kept.get(k)]
    if differ:
        sys.exit(f"{args.out} was made with another {', '.join(differ)}: give what it was made with, or name "
                 "another --out")
    write(file, lambda file: file.write(json.dumps(settings, indent=1).encode() + b"\n"))
    return settings


def main():
    args, start, paths = options(), time.time(), None
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    args.settings = check_settings(args)
    wanted = [(name, seed) for seed, name in itertools.product(args.seeds, args.rows)
              if not result_file(name, seed, args.out).exists()
              and not (name in ONE_SEED and seed != args.seeds[0])]

    if wanted:
        paths = prepare(args)
        first = {row_folders(*row, args.out)[0]: row for row in wanted}         # one stage 1 serves many rows
        side_by_side(args.jobs, [partial(train_stage1, *row, args, paths) for row in first.values()])
        side_by_side(args.jobs, [partial(make_row, *row, args, paths) for row in wanted])

    rows = read_results(args.out / "rows")
    write(args.out / "rows.md", lambda file: file.write(table(rows).encode()))
    draw_figure(rows, args.out / "rows.png")
    print("\n" + table(rows))
    folders = {name: row_folders(name, args.seeds[0], args.out)[1] for name in DEMO}
    if all((folder / "last.pt").exists() for folder in folders.values()):
        paths = paths or prepare(args)
        draw_runs(folders, paths, args.size, args.out / "demo.png", args.out / "one.png")
        print(f"{time.time() - start:.0f} s. Look at {os.path.relpath(args.out / 'demo.png')}: test images, "
              "which no run has seen." + ("" if args.data else LOOK_FOR))


if __name__ == "__main__":
    main()
