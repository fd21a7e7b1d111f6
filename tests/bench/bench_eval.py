"""eval.py's metrics beside their peers, interleaved in one run.

    python tests/bench/bench_eval.py [--size 256] [--batch 8] [--rounds 5]

    Inception    ours (folded batch norm, channels_last, one resize) against torch-fidelity's, same weights
    SSIM         ours (two matrix products) against torchmetrics'
    PSNR         ours (per image) against torchmetrics' (over the batch)
    LPIPS        ours against the lpips package, VGG16, same random weights
    FID          ours (singular values of factors) of two 2048-dimensional Gaussians against torch-fidelity's
                 (eigvals) and scipy's sqrtm, as pytorch-fid and clean-fid take it
Prints medians; the number behind them is the time over ours.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import lpips
import numpy as np
import scipy.linalg
import torch
import torchvision
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

sys.path.insert(0, str(Path(__file__).parents[2]))
import eval as E  # noqa: E402
from common import LPIPS  # noqa: E402


def race(name, n, unit, rounds, **runners):
    """Print the speed of each runner, `n` units a call, and its time over that of the first."""
    seconds = {runner: [] for runner in runners}
    for i in range(rounds + 1):                 # the first round warms up
        for runner, function in runners.items():
            start = time.perf_counter()
            with torch.no_grad():
                function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[runner].append(time.perf_counter() - start)
    medians = {runner: statistics.median(s) for runner, s in seconds.items()}
    for runner, s in medians.items():
        print(f"{name:10} {runner:24} {n / s:9.2f} {unit}/s   {s / medians['ours']:5.2f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    x = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=device)
    y = (x.float() + 10 * torch.randn(x.shape, device=device)).clamp(0, 255).to(torch.uint8)
    a, b = x / 127.5 - 1, y / 127.5 - 1
    inception = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(device)
    trunk = {"features." + name.split(".", 1)[1]: t for name, t in package.net.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        weights, vgg = f"{folder}/inception.pth", f"{folder}/vgg.pth"
        torch.save(inception.state_dict(), weights)
        torch.save(trunk, vgg)
        ours = E.FIDInception(weights).to(device)
        fidelity = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
        fidelity.to(device)
        distance = LPIPS("vgg", vgg).to(device)
    print(f"{torch.get_num_threads()} threads, {device}, batch {args.batch}, {args.size} px, "
          f"torch {torch.__version__}")

    images = args.batch, "images", args.rounds
    race("Inception", *images, **{"ours": lambda: ours(x), "torch-fidelity": lambda: fidelity(x)})
    race("SSIM", *images, ours=lambda: E.ssim(x, y),
         torchmetrics=lambda: structural_similarity_index_measure(y.float(), x.float(), data_range=255.0))
    race("PSNR", *images, ours=lambda: E.psnr(x, y),
         torchmetrics=lambda: peak_signal_noise_ratio(y.float(), x.float(), data_range=255.0))
    race("LPIPS", *images, ours=lambda: distance(b, a), lpips=lambda: package(b, a))

    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((4096, 2048)) for _ in range(2)]
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in rows)
    one, two = {"mu": m1, "sigma": c1}, {"mu": m2, "sigma": c2}
    race("FID", 1, "distances", 1, **{"ours": lambda: E.frechet_distance(m1, c1, m2, c2),
                                      "torch-fidelity": lambda: fid_statistics_to_metric(one, two, False),
                                      "scipy's sqrtm": lambda: scipy.linalg.sqrtm(c1 @ c2)})


if __name__ == "__main__":
    main()
