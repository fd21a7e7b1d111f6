"""Loading an H+ encoder: peak memory over the file's size, and time over that of the safetensors library.

    python tests/bench/bench_load.py [--layers 32] [--rounds 5]

The file has random weights in Hugging Face's naming, so that Q, K and V are packed, and H+'s sizes: 3.36 GB
at 32 layers, in a temporary folder (TMPDIR chooses the disk). Each load runs in a process of its own, in
turn, with the file in the page cache. The library's load_file is followed by load_state_dict into a module
that is there already, which is how a model of transformers or timm gets its weights. "load" ends when the
model is there; "load and use" has also summed every weight once.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch                                        # noqa: E402
from safetensors.torch import load_file             # noqa: E402

from sae import DINOv3                              # noqa: E402
from sae_weights import save_safetensors            # noqa: E402


def huggingface(layers):
    """Random tensors of H+ in Hugging Face's naming."""
    D, hidden = 1280, 5120
    shapes = {
        "embeddings.cls_token": [1, 1, D], "embeddings.mask_token": [1, 1, D],
        "embeddings.register_tokens": [1, 4, D], "embeddings.patch_embeddings.weight": [D, 3, 16, 16],
        "embeddings.patch_embeddings.bias": [D], "norm.weight": [D], "norm.bias": [D]}
    block = {
        **{f"attention.{p}_proj.weight": [D, D] for p in "qkvo"},
        **{f"attention.{p}_proj.bias": [D] for p in "qvo"},
        **{f"mlp.{p}_proj.weight": [hidden, D] for p in ("gate", "up")}, "mlp.down_proj.weight": [D, hidden],
        **{f"mlp.{p}_proj.bias": [hidden] for p in ("gate", "up")}, "mlp.down_proj.bias": [D],
        **{f"norm{n}.{p}": [D] for n in "12" for p in ("weight", "bias")},
        **{f"layer_scale{n}.lambda1": [D] for n in "12"}}
    for i in range(layers):
        shapes.update({f"layer.{i}.{name}": shape for name, shape in block.items()})
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def ours(path, layers):
    return DINOv3.from_pretrained(path)


def library(path, layers):
    """load_file and load_state_dict into modules of the same shapes as the file's tensors."""
    tensors = load_file(path)
    model = torch.nn.ParameterDict({n.replace(".", "/"): torch.empty_like(t) for n, t in tensors.items()})
    model.load_state_dict({n.replace(".", "/"): t for n, t in tensors.items()})
    return model


def child(which, path, layers):
    """Prints peak bytes over those before the load, seconds to load, seconds to load and use."""
    before = peak()
    start = time.perf_counter()
    model = {"ours": ours, "library": library}[which](path, layers)
    loaded, loaded_peak = time.perf_counter() - start, peak() - before
    total = sum(p.detach().sum().item() for p in model.parameters())
    used = time.perf_counter() - start
    assert total == total
    print(loaded_peak, peak() - before, loaded, used)


def peak():
    """Highest resident memory so far, bytes. In getrusage a new process takes over its parent's peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--layers", type=int, default=32, help="blocks of the file; 32 are H+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child, args.layers)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        save_safetensors(huggingface(args.layers), path)
        size = os.path.getsize(path)
        runs = {"ours": [], "library": []}
        for _ in range(args.rounds):
            for which in runs:
                command = [sys.executable, __file__, "--layers", str(args.layers), "--child", which, path]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[which].append([float(x) for x in out.split()])
    print(f"file {size / 1e9:.2f} GB, {args.layers} layers, medians of {args.rounds}")
    print(f"{'':>10} {'peak/file, load':>16} {'load and use':>13} {'load s':>8} {'load and use s':>15}")
    middle = {which: [statistics.median(column) for column in zip(*rows)] for which, rows in runs.items()}
    for which, (peak_load, peak_use, load, use) in middle.items():
        print(f"{which:>10} {peak_load / size:16.2f} {peak_use / size:13.2f} {load:8.2f} {use:15.2f}")
    print(f"time, ours over the library's: load {middle['ours'][2] / middle['library'][2]:.2f}, "
          f"load and use {middle['ours'][3] / middle['library'][3]:.2f}")


if __name__ == "__main__":
    main()
