"""Images/s of eval.py's parts beside their peers, in one run, interleaved: python tests/bench_eval.py [--size 256] [--batch 16]

    Inception    ours (folded batch norm, channels_last) against torch-fidelity's, same random weights
    SSIM         ours (two matrix products) against torchmetrics'
Prints medians and ratios; the machine is shared, so compare only inside one run.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import structural_similarity_index_measure

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as E


def race(n, rounds, **runners):
    """Print images/s of each runner and its ratio to the first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {name: [] for name in runners}
    for i in range(rounds + 1):                 # the first round warms up
        for name, runner in runners.items():
            start = time.perf_counter()
            with torch.no_grad():
                runner()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    first = next(iter(medians.values()))
    for name, s in medians.items():
        print(f"{name:32} {n / s:9.2f} images/s   {first / s:5.2f} x {next(iter(medians))}")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    x = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
    y = (x.float() + 10 * torch.randn(x.shape, device=device)).clamp(0, 255).to(torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(), path)
        theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path)).to(device)
        ours = E.FIDInception(path).to(device)
    print(f"{torch.get_num_threads()} threads, {device}, batch {args.batch}, {args.size} px, torch {torch.__version__}")
    race(args.batch, args.rounds, **{"torch-fidelity's Inception": lambda: theirs(x), "ours": lambda: ours(x)})
    race(args.batch, args.rounds, **{"torchmetrics' SSIM": lambda: structural_similarity_index_measure(y.float(), x.float(), data_range=255.0),
                                     "ours": lambda: E.ssim(x, y)})


if __name__ == "__main__":
    main()
