"""Images/s of one core: decode, resize, crop and flip as train.py does it, beside plain PIL and torchvision
on PIL and on tensors.

    [SAE_TEST_DATA=DIR] python tests/bench/bench_data.py [--rounds 5] [--files 8]

On synthetic JPEGs and, where SAE_TEST_DATA names them, real photos. CPU time of one thread, so that a busy
machine does not count; all end with a uint8 tensor; medians of interleaved rounds.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import io
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common                                                   # noqa: E402


def jpegs(folder, width, height, n):
    """n synthetic JPEGs of about a photo's size in bytes, of quality 90, 4:2:0.

    They are noise of all scales, its amplitude that of the scale.
    """
    folder.mkdir(parents=True)
    for i in range(n):
        rng, total = np.random.default_rng(i), np.zeros((height, width, 3))
        for k in 2 ** np.arange(8):
            noise = rng.normal(0, 6 * k ** 0.5, (height // k + 1, width // k + 1, 3)).astype(np.float32)
            planes = [Image.fromarray(plane) for plane in np.moveaxis(noise, 2, 0)]
            total += np.stack([plane.resize((width, height), Image.BICUBIC) for plane in planes], 2)
        pixels = (128 + total).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)


def competitors(images, size):
    """{name: a call that makes a crop of image number i, a uint8 tensor}."""
    ours, rng = common.TrainingImages(images, size, 0), np.random.default_rng(0)
    transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.RandomCrop(size),
                            v2.RandomHorizontalFlip()])

    def pil(i):
        im = Image.open(images.files[i]).convert("RGB")
        scale = size / min(im.size)
        width, height = max(size, round(im.width * scale)), max(size, round(im.height * scale))
        im = im.resize((width, height), Image.BICUBIC)
        left, top = rng.integers(width - size + 1), rng.integers(height - size + 1)
        im = im.crop((left, top, left + size, top + size))
        if rng.random() < 0.5:
            im = im.transpose(Image.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(im))

    def torchvision_pil(i):
        return v2.functional.pil_to_tensor(transform(Image.open(images.files[i]).convert("RGB")))

    def torchvision_tensor(i):
        return transform(io.decode_jpeg(io.read_file(images.files[i]), io.ImageReadMode.RGB))

    return {"train.py": ours.__getitem__, "PIL": pil, "torchvision, PIL": torchvision_pil,
            "torchvision, decode_jpeg": torchvision_tensor}


def bench(folder, rounds, n):
    sources = {}
    for width, height in (500, 375), (1600, 1200), (4000, 3000):
        path = folder / f"jpeg{width}"
        jpegs(path / "a", width, height, n)
        sources[f"{width}x{height}"] = path, 256
    if "SAE_TEST_DATA" in os.environ:
        sources["caltech24"] = Path(os.environ["SAE_TEST_DATA"]) / "data" / "caltech24" / "images", 128
    rows = []
    for source, (path, size) in sources.items():
        images = common.ImageFolder(path)
        images.files = images.files[::8] if len(images) > 1000 else images.files
        calls = competitors(images, size)
        times = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                start = time.process_time()
                for i in range(len(images)):
                    call(i)
                times[name].append((time.process_time() - start) / len(images))
        median = {name: statistics.median(t[1:]) for name, t in times.items()}           # the first warms up
        ours = median.pop("train.py")
        rows.append((source, size, f"{1 / ours:.0f}",
                     *(f"{1 / t:.0f} ({t / ours:.2f})" for t in median.values())))
    return ("JPEGs", "crop", *calls), rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=8, help="synthetic JPEGs of each size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        head, rows = bench(Path(folder), args.rounds, args.files)
    print("images/s of one core (ours over it)")
    for row in head, ["---"] * len(head), *rows:
        print("| " + " | ".join(map(str, row)) + " |")
