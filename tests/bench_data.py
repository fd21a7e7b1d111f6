"""Images/s of one core: decode, resize, crop and flip as train.py does it, beside plain PIL and torchvision on PIL and on tensors.

    [SAE_TEST_DATA=DIR] python tests/bench_data.py [--rounds 5] [--files 8]

On synthetic JPEGs and, where SAE_TEST_DATA names them, real photos. CPU time of one thread, so that a busy machine does not count;
all end with a uint8 tensor; medians of interleaved rounds.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train                                                                            # noqa: E402


def jpegs(folder, width, height, n):
    """n synthetic JPEGs of about a photo's size in bytes: noise of all scales, its amplitude that of the scale. Quality 90, 4:2:0."""
    folder.mkdir(parents=True)
    for i in range(n):
        rng, total = np.random.default_rng(i), np.zeros((height, width, 3))
        for k in 2 ** np.arange(8):
            noise = rng.normal(0, 6 * k ** 0.5, (height // k + 1, width // k + 1, 3))
            planes = [Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.BICUBIC) for plane in np.moveaxis(noise, 2, 0)]
            total += np.stack(planes, 2)
        Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def bench(folder, rounds, n):
    sources = {f"{w}x{h}": (folder / f"jpeg{w}", 256) for w, h in ((500, 375), (1600, 1200), (4000, 3000))}
    for name, (path, _) in sources.items():
        jpegs(path / "a", *map(int, name.split("x")), n)
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

        def torchvision_pil(i):
            return v2.functional.pil_to_tensor(transform(Image.open(images.files[i]).convert("RGB")))

        def torchvision_tensor(i):
            return transform(io.decode_jpeg(io.read_file(images.files[i]), io.ImageReadMode.RGB))

        competitors = {"train.py": ours.__getitem__, "PIL": pil, "torchvision, PIL": torchvision_pil, "torchvision, decode_jpeg": torchvision_tensor}
        times = {n: [] for n in competitors}
        for _ in range(rounds + 1):
            for n, f in competitors.items():
                start = time.process_time()
                for i in range(len(images)):
                    f(i)
                times[n].append((time.process_time() - start) / len(images))
        times = {n: statistics.median(t[1:]) for n, t in times.items()}
        rows.append((name, size, *(f"{1 / t:.0f}" + (f" ({t / times['train.py']:.2f})" if n != "train.py" else "") for n, t in times.items())))
    return ("JPEGs", "crop", *competitors), rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=8, help="synthetic JPEGs of each size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        head, rows = bench(Path(folder), args.rounds, args.files)
    print("images/s of one core (ours over it)")
    for row in head, ["---"] * len(head), *rows:
        print("| " + " | ".join(map(str, row)) + " |")
