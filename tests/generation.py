"""Understanding and generation in one space: small DiTs on the latents of the miniature's autoencoders.

    python tests/miniature.py --rows "Freeze, all steps" "reg 100" E2E VAE --waves 4 12 --steps 300 2200 \\
        --out .miniature
    python tests/generation.py --runs .miniature
    python tests/generation.py --runs .photos --rows "reg 100" E2E --steps 4000 200 --images 0      # photos

1. A folder: one DiT for each autoencoder, of the same size and as many steps, on its latents of the training
   images. Are the samples of the class that they were asked for? How far are they from the test images?
2. One image, the paper's finding that a low latent loss does not mean a good image: DiTs of three widths on
   three images, with three seeds. Do latents and images rank the autoencoders alike? Where v is predicted
   and the width d is less than the latent's n channels, the latent loss has a floor of 1 - d / n (RAE,
   Theorem 1).

All of it is `eval.py --generate`: the commands are printed, and go on where they were interrupted.
RUNS/generation.md has the tables, RUNS/generation.png samples. The runs of tests/photos-generation.md are
those of miniature.py's last example with --size 64 --steps 600 2400 --gan 0.
"""
import argparse
import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
from miniature import ROWS, draw_rows, markdown, mean_and_spread, result_file, row_folders, run, side_by_side
from PIL import Image

from common import ImageFolder
from sae_weights import write

SHOWN = 8               # classes, in the picture


def generate(models, source, out, args, *options):
    """{row: the last record of its DiT} of eval.py --generate `source` with the checkpoints of `models`."""
    settings = args.settings
    fid = ["--skip", "fid"]
    if settings["inception"]:
        fid = ["--inception", settings["inception"], "--fid-dims", "64"]
    run("eval.py", *(str(folder / "last.pt") for folder in models.values()), "--generate", str(source),
        "--size", str(settings["size"]), "--workers", "1", *fid, "--out", str(out), *map(str, options))
    # eval.py calls the folders NUMBER-NAME, and all of these checkpoints are last.pt.
    logs = [out / f"{i}-last/metrics.jsonl" for i in range(len(models))]
    return {row: json.loads(log.read_text().splitlines()[-1]) for row, log in zip(models, logs)}


# ------------------------------------------------------------------ a folder

COLUMNS = {"class_gen": ("samples, %", 1), "class_rec": ("reconstructions, %", 1),
           "class_test": ("test images, %", 1), "fd_gen": ("FD of samples", 2),
           "fd_rec": ("FD of reconstructions", 2), "fid_gen": ("FID-64 of samples", 2),
           "fid_rec": ("FID-64 of reconstructions", 2), "latent_loss": ("latent loss", 3)}


def from_folder(models, args):
    """{row: scores}; draws a sample of each of the first classes, from the same noise for each row."""
    images, out, found = args.runs / "images", args.out / "folder", {}
    encoder = args.settings["encoder"] or args.runs / "teacher.safetensors"

    def train(row, folder):
        found.update(generate({row: folder}, images / "train", out / folder.name, args, "--data",
                              images / "val", "--encoder", encoder, "--dit-width", 192, "--dit-depth", 4,
                              "--dit-steps", args.steps[0], "--dit-batch", 32, "--dit-lr", 3e-3,
                              "--guidance", 2))

    side_by_side(args.jobs, [partial(train, *model) for model in models.items()])
    S, pictures = args.settings["size"], {}
    for row, folder in models.items():
        grid = np.asarray(Image.open(out / folder.name / "0-last/samples.png"))          # [classes S,8 S,3]
        pictures[row] = [grid[y:y + S, :S] for y in range(0, len(grid), S)][:SHOWN]
    draw_rows(pictures, args.runs / "generation.png", ImageFolder(images / "val").classes[:SHOWN])
    return {row: found[row] for row in models}


def folder_table(found):
    """Class and FD of samples, beside those of reconstructions and test images: Markdown."""
    columns = {key: words for key, words in COLUMNS.items() if any(key in row for row in found.values())}
    lines = [["DiT on", *(title for title, _ in columns.values())]]
    for row, scores in found.items():
        lines.append([row, *(f"{scores[key]:.{digits}f}" for key, (_, digits) in columns.items())])
    return markdown(lines)


# ------------------------------------------------------------------ one image

CAPTION = "\nOne image: latent loss, L1 of the decoded image; over all images and seeds.\n\n"


def from_images(models, args):
    """{(target, width): [{row: scores} of each image and seed]}."""
    val = ImageFolder(args.runs / "images/val").files
    images = [val[i] for i in np.linspace(0, len(val) - 1, args.images).astype(int)]
    dits = [("v", 96), ("v", 192), ("v", 384), ("x", 96)]
    found = {dit: [] for dit in dits}

    def train(dit, number, seed):
        target, width = dit
        out = args.out / f"{target}-{width}-image{number}-seed{seed}"
        scores = generate(models, images[number], out, args, "--target", target, "--dit-width", width,
                          "--dit-depth", 2, "--dit-steps", args.steps[1], "--dit-batch", 8, "--dit-lr", 1e-3,
                          "--seed", seed)
        found[dit].append(scores)

    side_by_side(args.jobs, [partial(train, *words)
                             for words in itertools.product(dits, range(len(images)), args.seeds)])
    return found


def opposite(runs):
    """% of the pairs of autoencoders that latent loss and RGB loss put in opposite orders, over all runs."""
    pairs = [pair for scores in runs for pair in itertools.combinations(scores.values(), 2)]
    return 100 * statistics.mean((a["latent_loss"] < b["latent_loss"]) != (a["rgb_l1"] < b["rgb_l1"])
                                 for a, b in pairs)


def image_table(found):
    """Mean latent loss and RGB L1 of each autoencoder, a line a DiT: Markdown."""
    rows = list(next(iter(found.values()))[0])
    lines = [["DiT", *rows, "floor", "opposite pairs, %"]]
    for (target, width), runs in found.items():
        cells = []
        for row in rows:
            both = ([scores[row][key] for scores in runs] for key in ("latent_loss", "rgb_l1"))
            cells.append(", ".join(mean_and_spread(values, 3) for values in both))
        floor = runs[0][rows[0]]["floor"]
        lines.append([f"{target}, {width}", *cells, f"{floor:.2f}", f"{opposite(runs):.0f}"])
    return markdown(lines)


# ------------------------------------------------------------------ the command

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=Path(".miniature"), help="--out of tests/miniature.py")
    rows = ["Freeze, all steps", "reg 100", "E2E", "VAE"]
    p.add_argument("--rows", nargs="+", default=rows, choices=list(ROWS), metavar="ROW",
                   help=f"default: {'; '.join(rows)}")
    p.add_argument("--steps", type=int, nargs=2, default=(6000, 200), help="of a DiT, in 1. and in 2.")
    p.add_argument("--images", type=int, default=3, help="of 2.; 0 leaves it out")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of 2.")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    args = p.parse_args()
    args.runs = args.runs.resolve()
    args.out = args.runs / "generation"
    args.settings = json.loads((args.runs / "settings.json").read_bytes())

    missing = [row for row in args.rows if not result_file(row, 0, args.runs).exists()]
    if missing:
        sys.exit(f"{args.runs} has no finished {', '.join(missing)} of seed 0: tests/miniature.py makes them")
    models = {row: row_folders(row, 0, args.runs)[1] for row in args.rows}
    text = folder_table(from_folder(models, args))
    if args.images:
        text += CAPTION + image_table(from_images(models, args))
    write(args.runs / "generation.md", lambda file: file.write(text.encode()))
    print("\n" + text)


if __name__ == "__main__":
    main()
