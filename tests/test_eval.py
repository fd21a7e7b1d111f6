"""eval.py through its command line, on small pictures and small models."""
import errno
import glob
import io
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, PngImagePlugin, TiffImagePlugin
from torch.nn import functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from timm.models import save_for_hf
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import eval as E
import latents as latents_py
from common import ImageFolder, center_crop
from sae import SAE, DINOv3, DINOv3Config, SAEConfig, philox_normal
from sae_weights import CHECKPOINT_VERSION, save_safetensors
from test_common import pack

ROOT = Path(E.__file__).parent
FAST = ["--size", "32", "--workers", "0", "--batch", "5"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three classes of 14 noisy pictures, told apart by their colour."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, name in enumerate(["blue", "green", "red"]):
        (root / name).mkdir()
        for j in range(14):
            picture = rng.integers(0, 160, (40, 36 + j, 3))
            picture[..., 2 - i] += 60
            Image.fromarray(picture.astype(np.uint8)).save(root / name / f"{j:02}.png")
    return root


def link_halves(photos, root):
    """root/train and root/val, folders of links: every other image of each class."""
    for folder in (path for path in photos.iterdir() if path.is_dir()):
        for i, path in enumerate(sorted(folder.iterdir())):
            link = root / ("train", "val")[i % 2] / folder.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return root


@pytest.fixture(scope="session")
def halves(photos, tmp_path_factory):
    return link_halves(photos, tmp_path_factory.mktemp("halves"))


def small_sae(path, seed=0, depth=1, **changes):
    torch.manual_seed(seed)
    encoder = DINOv3Config(width=64, depth=depth, head_dim=64, hidden=64, gated=False, qkv_bias=True,
                           registers=4)
    config = SAEConfig(encoder=encoder, z_dim=16, widths=(16, 16, 16, 8, 8), blocks=1, **changes)
    weights = SAE(config).state_dict()
    torch.save({"version": CHECKPOINT_VERSION, "config": asdict(config), "args": {}, "step": 0,
                "model": weights, "ema": weights}, path)
    return str(path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return small_sae(tmp_path_factory.mktemp("run") / "last.pt")


def command(*args):
    E.main([str(a) for a in args])


def run(*args):
    """The JSON that the command line writes, by a reader that takes neither NaN nor Infinity."""
    def refuse(name):
        raise ValueError(f"{name} in the JSON")

    command(*args)
    return json.loads(Path(args[args.index("--out") + 1]).read_text(), parse_constant=refuse)


@pytest.fixture(scope="session")
def stem_file(tmp_path_factory):
    """FID-64's part of the Inception file, random."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "stem.pth"
    stem = {key: t for key, t in net.state_dict().items() if key.startswith("Conv2d")}
    torch.save({key: t * 5 if t.dim() > 1 else t for key, t in stem.items()}, path)
    return path


# ------------------------------------------------------------------ scores

NO_NETS = ["--skip", "fid,lpips,probe"]


def pixels(folder, size=32):
    """The centre crops of an image folder: float [n,3,size,size] of 0 .. 255."""
    crops = [np.array(center_crop(Image.open(path), size)) for path in ImageFolder(folder).files]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()


def rounded(y):
    """[-1,1] -> 0 .. 255, as a PNG would hold it."""
    return ((y.clamp(-1, 1) + 1) / 2 * 255).round()


def test_scores_of_a_checkpoint_equal_torchmetrics_of_its_reconstructions(photos, checkpoint, tmp_path):
    got = run(checkpoint, "--data", photos, *NO_NETS, "--out", tmp_path / "a.json", *FAST)
    sae, psnr, ssim = SAE.from_pretrained(checkpoint), [], []
    for x in pixels(photos).split(1):
        with torch.no_grad():
            y = rounded(sae.decode(sae.encode(x / 127.5 - 1).mode()))
        psnr.append(peak_signal_noise_ratio(y, x, data_range=255).item())
        ssim.append(structural_similarity_index_measure(y, x, data_range=255.0).item())
    assert got["images"] == len(psnr) == 42 and got["exact"] == 0
    assert got["psnr"] == pytest.approx(np.mean(psnr), abs=1e-4)
    assert got["ssim"] == pytest.approx(np.mean(ssim), abs=1e-5)
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (8 * 32, 3 * 32)


def test_lpips_of_the_command_is_the_lpips_packages(photos, checkpoint, tmp_path, real_data):
    weights = real_data / "weights/squeezenet1_1-lpips/squeezenet1_1_features.safetensors"
    got = run(checkpoint, "--data", photos, "--skip", "fid,probe", "--lpips-net", "squeeze",
              "--lpips-weights", weights, "--out", tmp_path / "a.json", *FAST)
    # the package's heads, and the trunk that is given here
    package, trunk = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False), load_file(weights)
    names = {name: "features." + name.split(".", 1)[1] for name in package.net.state_dict()}
    package.net.load_state_dict({name: trunk[theirs] for name, theirs in names.items()})
    sae, distances = SAE.from_pretrained(checkpoint), []
    batch = int(FAST[FAST.index("--batch") + 1])                # in other batches other pixels round up
    for x in (pixels(photos) / 127.5 - 1).split(batch):
        with torch.no_grad():
            y = rounded(sae.decode(sae.encode(x).mode())) / 127.5 - 1
            distances += package(x, y).flatten().tolist()
    assert got["lpips"] == pytest.approx(np.mean(distances), abs=1e-5)


def test_latent_statistics_equal_those_of_all_latents_at_once(photos, checkpoint, tmp_path):
    got = run(checkpoint, "--data", photos, *NO_NETS, "--out", tmp_path / "a.json", *FAST)["latent"]
    with torch.no_grad():
        q = SAE.from_pretrained(checkpoint).encode(pixels(photos) / 127.5 - 1)
    posterior = torch.distributions.Normal(q.mu, (q.logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    std = q.mu.transpose(0, 1).flatten(1).std(1, correction=0)
    assert got["kl"] == pytest.approx(kl.flatten(1).sum(1).mean().item(), rel=1e-4)
    assert got["shape"] == [16, 2, 2]
    assert got["std_min"] == pytest.approx(std.min().item(), rel=1e-4)
    assert got["std_max"] == pytest.approx(std.max().item(), rel=1e-4)


def on_ranks(ranks, folder, *words):
    """The JSON of eval.py under torchrun."""
    out = folder / f"{ranks}.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks,
             ROOT / "eval.py", *words, "--out", out]
    # torchrun gives each of several ranks one thread; other numbers of threads add in another order
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_numbers_do_not_depend_on_ranks_or_workers(photos, checkpoint, stem_file, tmp_path):
    """42 images in batches of 4: neither 11 batches nor 42 images divide by 2 or 3 ranks."""
    results = [on_ranks(ranks, tmp_path, checkpoint, "--data", photos, "--train", photos,
                        "--size", 32, "--batch", 4, "--workers", ranks % 2, "--skip", "lpips",
                        "--fid-dims", 64, "--inception", stem_file, *CACHED, "--sample",
                        "--latent-noise", 0.3)
               for ranks in (1, 2, 3)]
    assert results[0]["latent"].pop("shape")
    for other in results[1:]:
        assert other["images"] == 42
        for key in ("rfid", "psnr", "ssim", "probe", "psnr 0.3", "rfid 0.3"):
            assert other[key] == pytest.approx(results[0][key], rel=1e-9), key
        assert other["latent"].pop("shape") == [16, 2, 2]
        assert other["latent"] == pytest.approx(results[0]["latent"], rel=1e-9)


def test_more_ranks_than_images_give_the_same_numbers(photos, codecs, tmp_path):
    """A rank that sees no image still knows how many channels a peer has."""
    for name in ("blue/00.png", "red/00.png"):
        (tmp_path / "two" / name).parent.mkdir(parents=True)
        shutil.copy(photos / name, tmp_path / "two" / name)
    (tmp_path / "train").mkdir()
    for name in ("blue", "red"):
        (tmp_path / "train" / name).symlink_to(photos / name)
    one, three = (on_ranks(ranks, tmp_path, f"{codecs}:Blurred", "--data", tmp_path / "two",
                           "--train", tmp_path / "train", "--skip", "fid,lpips", "--probe-iterations", 3,
                           *FAST)
                  for ranks in (1, 3))
    for key in ("images", "psnr", "ssim", "probe", "probe_rate"):
        assert one[key] == pytest.approx(three[key], rel=1e-6), key


def test_a_drawn_latent_is_the_same_at_any_batch_size_and_differs_from_the_mean(photos, checkpoint, tmp_path):
    def psnr(batch, *more):
        return run(checkpoint, "--data", photos, *NO_NETS, "--out", tmp_path / "a.json", "--size", 32,
                   "--workers", 0, "--batch", batch, *more)["psnr"]

    one, two, mean = psnr(3, "--sample"), psnr(16, "--sample"), psnr(16)
    assert one == pytest.approx(two, abs=1e-4) and abs(one - mean) > 1e-3


def test_scores_under_noise_are_those_of_noisy_latents_at_any_batch_size(
        photos, checkpoint, tmp_path, capsys):
    """Against the equation: PSNR of decode(z + tau std eps), eps the normal stream of seed 1."""
    def noisy(batch):
        return run(checkpoint, "--data", photos, *NO_NETS, "--out", tmp_path / "a.json", "--size", 32,
                   "--workers", 0, "--batch", batch, "--latent-noise", 1, 10)

    got, x, model = noisy(5), pixels(photos), SAE.from_pretrained(checkpoint)
    assert "psnr 10.0" in capsys.readouterr().out
    with torch.no_grad():
        z = model.encode(x / 127.5 - 1).mode()
        eps = philox_normal(z.numel(), 1).view(z.shape)
        for tau in 1.0, 10.0:
            y = model.decode(z + tau * z.std((0, 2, 3), correction=0, keepdim=True) * eps)
            psnr = [peak_signal_noise_ratio(*pair, data_range=255).item() for pair in zip(rounded(y), x)]
            assert got[f"psnr {tau}"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert abs(got["psnr 10.0"] - got["psnr"]) > 1e-2
    again = noisy(16)
    for key in "psnr", "psnr 1.0", "psnr 10.0":
        assert again[key] == pytest.approx(got[key], abs=1e-4)


def test_what_the_probe_sees_of_a_peer_is_the_mean_at_any_batch_size():
    def encode(x):
        return E.Posterior(F.avg_pool2d(x, 16), torch.zeros_like(F.avg_pool2d(x, 16)))

    def decode(z):
        return F.interpolate(z, scale_factor=16.)

    args = SimpleNamespace(sample=True, probe_layers=1)
    model = E.Autoencoder("peer", None, encode, decode, args, torch.device("cpu"))
    x = torch.rand(6, 3, 32, 32)
    torch.testing.assert_close(model.features(x), x.mean((2, 3)))
    torch.testing.assert_close(torch.cat([model.features(part) for part in x.split(2)]), model.features(x))


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory):
    """A small ViT of timm, random, saved by timm itself, with a size, mean and std of its own."""
    torch.manual_seed(0)
    shape = dict(img_size=48, embed_dim=64, depth=2, num_heads=2)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=7, **shape)
    folder = tmp_path_factory.mktemp("timm")
    own = {"input_size": (3, 48, 48), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "crop_pct": 0.9}
    net.pretrained_cfg.update(own)
    save_for_hf(net, folder, model_args=shape, safe_serialization=True)
    return folder


def test_features_of_a_timm_network_are_those_of_timms_own_transform_and_forward(photos, timm_folder):
    network = E.TimmFeatures(f"timm:local-dir:{timm_folder}")
    oracle = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    transform = timm.data.create_transform((3, 48, 48), interpolation="bicubic", mean=(0.4, 0.5, 0.6),
                                           std=(0.2, 0.3, 0.4), crop_pct=1.0)
    x = pixels(photos)[:5].byte()
    images = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in x])
    assert images.shape == (5, 3, 48, 48) and network.dims == 64
    with torch.no_grad():
        theirs = oracle.forward_head(oracle.forward_features(images), pre_logits=True)
        torch.testing.assert_close(network(x), theirs)
    assert "resize to (3, 48, 48), mean [0.4, 0.5, 0.6], std [0.2, 0.3, 0.4]" in network.protocol


def test_a_distance_in_a_timm_networks_features_stands_beside_rfid(
        photos, checkpoint, stem_file, timm_folder, tmp_path, capsys):
    words = [checkpoint, "--data", photos, "--skip", "lpips,probe", "--fid-dims", 64, "--inception",
             stem_file, "--fd", f"timm:local-dir:{timm_folder}", "--out", tmp_path / "a.json", *FAST]
    got, name, features = run(*words), f"fd local-dir:{timm_folder}", []
    sae, network = SAE.from_pretrained(checkpoint), E.TimmFeatures(f"timm:local-dir:{timm_folder}")
    for x in pixels(photos).split(5):
        with torch.no_grad():
            y = rounded(sae.decode(sae.encode(x / 127.5 - 1).mode()))
            features.append([network(images.byte()).double().numpy() for images in (x, y)])
    gaussians = [f(rows) for rows in map(np.concatenate, zip(*features))
                 for f in (lambda a: a.mean(0), lambda a: np.cov(a, rowvar=False))]
    assert got[name] == pytest.approx(E.frechet_distance(*gaussians), rel=1e-6) and got["rfid"] > 0
    printed = capsys.readouterr().out
    assert name in printed and "flatter a DINO autoencoder" in printed
    for spec in "timm:no_such_network", f"timm:local-dir:{tmp_path}":
        words[words.index("--fd") + 1] = spec
        assert f"cannot load {spec} (extra `peers`)" in refusal(*words)


def test_too_few_images_for_fid_are_said_to_be(photos, checkpoint, stem_file, tmp_path, capsys):
    got = run(checkpoint, "--data", photos, "--skip", "lpips,probe", "--fid-dims", 64,
              "--inception", stem_file, "--out", tmp_path / "a.json", *FAST)
    assert "42 images cannot fill a covariance of 64 dimensions" in got["warning"]
    assert got["warning"] in capsys.readouterr().out


def test_images_that_come_back_exactly_are_counted_and_not_in_the_mean_psnr(photos, codecs, tmp_path, capsys):
    """Blurred gives images of one colour back bit for bit: an infinite PSNR, which would hide the others."""
    shutil.copytree(photos / "red", tmp_path / "set")
    for i in range(2):
        Image.new("RGB", (32, 32), (10 * i, 99, 7)).save(tmp_path / f"set/flat{i}.png")
    words = ["--data", tmp_path / "set", *NO_NETS, "--out", tmp_path / "a.json", *FAST]
    got = run(f"{codecs}:Blurred", *words)
    psnr = []
    for x in pixels(tmp_path / "set").split(1):
        y = rounded(F.interpolate(F.avg_pool2d(x / 127.5 - 1, 8), scale_factor=8.0))
        psnr.append(peak_signal_noise_ratio(y, x, data_range=255).item())
    noisy = [value for value in psnr if value < 100]
    assert (got["images"], got["exact"], len(noisy)) == (16, 2, 14)
    assert got["psnr"] == pytest.approx(np.mean(noisy), abs=1e-4)
    got = run(f"{codecs}:Exact", *words)
    assert got["exact"] == 16 and got["psnr"] is None and "exact" in capsys.readouterr().out


def test_a_checkpoint_without_latent_statistics_is_scored_and_encoded(photos, checkpoint, tmp_path):
    """They are NaN until a run has ended, which is no damage. --encode computes its own."""
    saved = torch.load(checkpoint, weights_only=True)
    for name in ("latent_mean", "latent_std"):
        saved["ema"][name] = torch.full_like(saved["ema"][name], math.nan)
    torch.save(saved, tmp_path / "last.pt")
    scores, files = [], []
    for i, model in enumerate((tmp_path / "last.pt", checkpoint)):
        files.append(tmp_path / f"{i}/latents_stats.pt")
        scores.append(run(model, "--data", photos, *NO_NETS, "--out", tmp_path / "a.json", *FAST))
        command(model, "--encode", photos, "--out", files[-1].parent, *FAST)
    assert scores[0]["psnr"] == scores[1]["psnr"]
    ours, theirs = map(torch.load, files)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].isfinite().all() for key in ("mean", "std"))


# ------------------------------------------------------------------ probe

def digits():
    """sklearn's 1797 handwritten digits, as (features [n,64], labels): even ones train, odd ones test."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 4, dtype=torch.float32), torch.tensor(y)
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def test_the_linear_probe_is_within_a_point_of_sklearns_logistic_regression():
    """sklearn sees the same nine tenths of the training images as the heads."""
    (x, y), (xt, yt) = digits()
    index = np.arange(len(x))
    held, kept = index[index % E.HOLD == E.HOLD - 1], index[index % E.HOLD != E.HOLD - 1]
    theirs = 100 * LogisticRegression(max_iter=5000).fit(x[kept], y[kept]).score(xt, yt)
    torch.manual_seed(0)
    heads = E.Heads({"pixels": slice(0, 64)}, 10)
    batches = (torch.tensor([i for i, _ in step]) for step in E.draws(kept, 512, 2000))
    E.train_heads(heads, ((x[b], y[b]) for b in batches), 512, 2000)
    choice, test = (E.tally(heads, [s])["pixels"] for s in ((x[held], y[held]), (xt, yt)))
    assert abs(test[0][E.choose(*choice, len(held))].item() - theirs) < 1


def test_each_head_is_trained_as_sgd_would_alone():
    """torch.optim.SGD on one nn.Linear a rate: rates as factors of one optimizer's losses change nothing."""
    (x, y), _ = digits()
    x, steps = x / x.std(), 20
    heads = E.Heads({"pixels": slice(0, 64)}, 10)
    start = heads.linear[0].weight.detach().clone().split(10)
    E.train_heads(heads, ((x[i::steps], y[i::steps]) for i in range(steps)), 45, steps)
    for rate, before, after in zip(E.RATES, start, heads.linear[0].weight.split(10)):
        linear = torch.nn.Linear(64, 10)
        linear.load_state_dict({"weight": before, "bias": torch.zeros(10)})
        optimizer = torch.optim.SGD(linear.parameters(), lr=rate * 45 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for i in range(steps):
            loss = F.cross_entropy(linear(x[i::steps]), y[i::steps], reduction="sum") / 45
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        assert torch.allclose(after, linear.weight, rtol=1e-4, atol=1e-6), rate


def test_the_rate_is_chosen_by_the_loss_where_accuracies_cannot_be_told_apart():
    """The standard error of 90 % is 3 points for 100 images and 0.09 for 100 000 (binomial)."""
    right, loss = torch.tensor([90.0, 89.0, 80.0]), torch.tensor([0.5, 0.4, 0.1])
    assert E.choose(right, loss, 100) == 1 and E.choose(right, loss, 100_000) == 0
    right = torch.tensor([100.0, 99.0, 80.0])   # of 76 images all right are not certain to be the best
    assert E.choose(right, loss, 76) == 1 and E.choose(right, loss, 100_000) == 0


def test_the_images_that_choose_the_rate_are_not_trained_on(halves, checkpoint, tmp_path, monkeypatch):
    """21 training images: numbers 9 and 19, every tenth, choose; the others train; 21 .. are the test."""
    drawn, counted = [], []

    def draws(index, *args, real=E.draws):
        drawn.extend(index)
        return real(index, *args)

    def shares(index, *args, real=E.shares):
        counted.append(list(index))
        return real(index, *args)

    monkeypatch.setattr(E, "draws", draws)
    monkeypatch.setattr(E, "shares", shares)
    run(checkpoint, *probing(halves), "--probe-iterations", 2, "--out", tmp_path / "a.json", *FAST)
    assert drawn == [i for i in range(21) if i not in (9, 19)]
    assert counted[-2:] == [[9, 19], list(range(21, 42))]


def test_batches_are_drawn_from_whole_permutations_and_split_over_ranks(monkeypatch):
    index = np.arange(100, 107)
    steps = list(E.draws(index, 3, 14))         # 42 draws, six of each item
    items, numbers = zip(*sum(steps, []))
    assert numbers == tuple(range(42))
    assert all(sorted(items[i:i + 7]) == list(index) for i in range(0, 42, 7)) and items[:7] != items[7:14]
    monkeypatch.setattr(E, "WORLD", 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(E, "RANK", rank)
        parts.append(list(E.draws(index, 3, 14)))
    assert [sorted(a + b, key=lambda draw: draw[1]) for a, b in zip(*parts)] == steps


def test_the_linear_probe_on_real_photos_is_within_a_point_of_sklearns_logistic_regression(
        real_data, tmp_path):
    """caltech24 through a real encoder and the command, `cls+patch` and `patch`; sklearn with its own l2.

    sklearn sees the same nine tenths of the training images as the heads.
    """
    encoder = DINOv3.from_pretrained(real_data / "weights/dinov3-ti-from-deit/model.safetensors")
    config = SAEConfig(encoder=encoder.cfg, z_dim=8, widths=(8, 8, 8, 8, 8), blocks=1)
    ema = SAE(config, encoder).state_dict()
    torch.save({"version": CHECKPOINT_VERSION, "config": asdict(config), "ema": ema}, tmp_path / "last.pt")
    photos = link_halves(real_data / "data/caltech24/images", tmp_path / "photos")
    got = run(tmp_path / "last.pt", *probing(photos), "--probe", "cached", "--probe-iterations", 1000,
              "--size", 96, "--workers", 0, "--out", tmp_path / "a.json")
    features, = map(np.load, tmp_path.glob("features-*.npy"))
    train, test = ImageFolder(photos / "train"), ImageFolder(photos / "val")
    x, xt = np.split(features.astype(np.float32), [len(train)])
    kept = np.arange(len(train)) % E.HOLD != E.HOLD - 1
    width = config.encoder.width
    for kind, columns in (("cls+patch", slice(0, 2 * width)), ("patch", slice(width, 2 * width))):
        oracle = LogisticRegression(max_iter=5000).fit(x[kept][:, columns], np.array(train.labels)[kept])
        theirs = oracle.score(xt[:, columns], test.labels)
        assert abs(got["probe"][kind] - 100 * theirs) < 1, (kind, got["probe"], got["probe_rate"], theirs)


def test_the_probe_of_four_layers_sees_what_dinov3s_and_vtps_do(tmp_path):
    """Their create_linear_input: CLS of each of the last blocks, then the mean patch token of the last.

    The oracle is transformers' DINOv3: the outputs of its layers under its norm.
    """
    torch.manual_seed(0)
    oracle = DINOv3ViTModel(DINOv3ViTConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=6,
                                            num_attention_heads=1, num_register_tokens=4)).eval()
    oracle.save_pretrained(tmp_path)
    encoder, x, outputs = DINOv3.from_pretrained(tmp_path), torch.rand(2, 3, 32, 48) * 2 - 1, []
    for layer in [m for name, m in oracle.named_modules() if re.search(r"layer\.[0-5]$", name)][-4:]:
        layer.register_forward_hook(lambda _, x, out: outputs.append(oracle.norm(out)))      # [2,1+4+6,64]
    with torch.no_grad():
        oracle((x - encoder.mean) / encoder.std)
    expected = torch.cat([*(out[:, 0] for out in outputs), outputs[-1][:, 5:].mean(1)], 1)

    model = SAE(SAEConfig(encoder.cfg, z_dim=8, widths=(8, 8, 8, 8, 8), blocks=1), encoder).eval()
    args, device = SimpleNamespace(sample=False, probe_layers=4), torch.device("cpu")
    model = E.Autoencoder(str(tmp_path), model, model.encode, model.decode, args, device)
    for _ in range(2):                          # of this call's blocks
        features, kinds = model.features(x), model.kinds()
        torch.testing.assert_close(features[:, kinds["cls+patch"]], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(features[:, kinds["patch"]], features[:, 4 * 64:5 * 64])
    torch.testing.assert_close(features[:, kinds["mu"]], model.encode(x).mu.mean((2, 3)))


def test_the_number_of_layers_is_part_of_the_probe_and_its_cached_features(halves, checkpoint, tmp_path):
    deep = small_sae(tmp_path / "deep.pt", depth=4)
    words = [deep, *probing(halves), *CACHED, "--out", tmp_path / "a.json", *FAST]
    one, four = run(*words), run(*words, "--probe-layers", "4")
    assert one["probe"].keys() == four["probe"].keys() and "CLS of 4 last" in four["protocol"]["probe"]
    assert len(list(tmp_path.glob("features-*"))) == 2
    assert "has 1 blocks: lower --probe-layers" in refusal(checkpoint, *words[1:], "--probe-layers", "4")


def probing(halves):
    return ["--data", halves / "val", "--train", halves / "train", "--skip", "fid,lpips"]


def test_scores_and_probe_on_tars_are_those_on_class_folders(halves, checkpoint, tmp_path):
    for part in "train", "val":
        pack(halves / part, tmp_path / "tars" / part)
    words = ["--probe", "cached", "--probe-iterations", 5, *FAST, "--out", tmp_path / "a.json"]
    ours, oracle = (run(checkpoint, *probing(root), *words) for root in (tmp_path / "tars", halves))
    ours["protocol"]["images"] = oracle["protocol"]["images"]           # they name the folder
    assert ours == oracle and len(list(tmp_path.glob("features-*.npy"))) == 2


@pytest.mark.parametrize("kind", ["full", "cached"])
def test_the_probe_finds_classes_that_differ_in_colour(halves, checkpoint, tmp_path, kind):
    got = run(checkpoint, *probing(halves), "--probe", kind, "--probe-iterations", 60,
              "--out", tmp_path / "a.json", *FAST)
    assert got["images"] == 21 and set(got["probe"]) == {"cls+patch", "patch", "mu"}
    assert all(accuracy > 90 for accuracy in got["probe"].values()), got["probe"]


def count_images(monkeypatch, method):
    """A list that grows by the number of images of each call of the Autoencoder's method."""
    seen, real = [], getattr(E.Autoencoder, method)

    def counted(self, x, *args):
        seen.append(len(x))
        return real(self, x, *args)

    monkeypatch.setattr(E.Autoencoder, method, counted)
    return seen


CACHED = ["--probe", "cached", "--probe-iterations", "30"]


def test_cached_features_are_reused_only_while_weights_images_and_crop_agree(
        halves, checkpoint, codecs, tmp_path, monkeypatch):
    seen = count_images(monkeypatch, "features")
    (tmp_path / "set").symlink_to(halves)
    shutil.copy(checkpoint, tmp_path / "last.pt")

    def images_seen(model=tmp_path / "last.pt", size="32"):
        seen.clear()
        run(model, *probing(tmp_path / "set"), *CACHED, "--out", tmp_path / "a.json", "--workers", "0",
            "--size", size)
        return sum(seen)

    assert images_seen() == 42 and images_seen() == 0
    assert images_seen(size="48") == 42
    assert images_seen(small_sae(tmp_path / "other.pt", seed=1)) == 42
    small_sae(tmp_path / "last.pt", seed=1)                     # the same name and size, at another time
    assert images_seen() == 42
    (tmp_path / "set").unlink()
    shutil.copytree(halves, tmp_path / "set")
    Image.new("RGB", (40, 40)).save(tmp_path / "set/train/red/00.png")
    assert images_seen() == 42 and images_seen() == 0
    # weights that are in no file may have changed
    assert images_seen(f"{codecs}:Blurred") == 42 and images_seen(f"{codecs}:Blurred") == 42


def test_an_interrupted_feature_pass_goes_on_where_it_stopped(halves, checkpoint, tmp_path, monkeypatch):
    words = [checkpoint, *probing(halves), *CACHED, *FAST, "--out"]
    with monkeypatch.context() as patch:
        seen = count_images(patch, "features")
        features = E.Autoencoder.features

        def stop_after_three(self, x):
            if len(seen) == 3:
                raise KeyboardInterrupt
            return features(self, x)

        patch.setattr(E.Autoencoder, "features", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(*words, tmp_path / "a.json")
        patch.setattr(E.Autoencoder, "features", features)
        seen.clear()
        resumed = run(*words, tmp_path / "a.json")["probe"]
        assert sum(seen) == 42 - 15
    (tmp_path / "b").mkdir()
    assert resumed == run(*words, tmp_path / "b/a.json")["probe"]


def test_scores_are_written_before_the_probe(halves, checkpoint, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    words = [checkpoint, *probing(halves), *CACHED, *FAST, "--out", tmp_path / "a.json"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(E, "probe", stop)
        run(*words)
    before = json.loads((tmp_path / "a.json").read_text())
    after = run(*words)
    assert before.pop("unfinished") == "probe" and "probe" not in before and before["psnr"] > 0
    assert (tmp_path / "a.png").exists()
    assert before.items() <= after.items() and set(after) - set(before) == {"probe", "probe_rate"}


# ------------------------------------------------------------------ the DiT on one image

CODECS = """
import multiprocessing

import torch.nn.functional as F

class Exact:                                    # 8x8 blocks of pixels as 192 channels: bit for bit
    def encode(self, x): return F.pixel_unshuffle(x, 8)
    def decode(self, z): return F.pixel_shuffle(z, 8)

class Blurred:                                  # the mean of each 8x8 block
    def encode(self, x): return F.avg_pool2d(x, 8)
    def decode(self, z): return F.interpolate(z, scale_factor=8.0)

class Nothing: pass

def wrong_shape():
    codec = Exact()
    codec.decode = lambda z: z
    return codec
def not_a_tensor():
    codec = Exact()
    codec.encode = lambda x: (x, x)
    return codec
def infinite():
    codec = Exact()
    codec.decode = lambda z: Exact.decode(codec, z) / 0
    return codec
def worker_killer():
    codec = Exact()
    def encode(x):
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        return Exact.encode(codec, x)
    codec.encode = encode
    return codec
"""


@pytest.fixture(scope="session")
def codecs(tmp_path_factory):
    path = tmp_path_factory.mktemp("codecs") / "codecs.py"
    path.write_text(CODECS)
    return path


@pytest.fixture(scope="session")
def generated(photos, codecs, tmp_path_factory):
    """{target: (records of Exact, of Blurred, printed table, folder)} of DiTs of width 48 on one image."""
    root, found = tmp_path_factory.mktemp("one"), {}
    for target in "vx":
        with redirect_stdout(io.StringIO()) as printed:
            command(f"{codecs}:Exact", f"{codecs}:Blurred", "--generate", photos / "red/03.png", "--size", 32,
                    "--target", target, "--dit-width", 48, "--dit-depth", 1, "--dit-steps", 240,
                    "--dit-batch", 8, "--dit-lr", 3e-3, "--out", root / target)
        exact, blurred = ([json.loads(line) for line in file.read_text().splitlines()]
                          for file in sorted((root / target).glob("*/metrics.jsonl")))
        found[target] = exact, blurred, printed.getvalue(), root / target
    return found


def test_velocity_loss_comes_down_to_its_floor_and_not_below(generated):
    """(n - d) / n = 144 / 192 for a network of width d = 48 (Zheng et al. 2025, RAE, Theorem 1)."""
    exact, blurred, *_ = generated["v"]
    losses = [r["latent_loss"] for r in exact]
    assert exact[0]["floor"] == 0.75 and blurred[0]["floor"] == 0
    assert min(losses) > 0.75 - 0.03            # the fixed noise has a spread of 1 %
    assert losses[-1] < 0.9 < losses[0] and blurred[-1]["latent_loss"] < 0.5


def test_predicting_the_image_goes_below_the_floor_of_the_velocity(generated):
    exact, *_ = generated["x"]
    assert exact[0]["floor"] == 0 and exact[-1]["latent_loss"] < 0.5


def test_the_better_autoencoder_wins_by_its_images_and_both_are_reported(generated):
    """With --target x both latents are learned; the decoded image says which autoencoder is good."""
    exact, blurred, printed, folder = generated["x"]
    assert exact[-1]["rgb_l1"] < blurred[-1]["rgb_l1"]
    assert exact[-1]["reconstruction_psnr"] is None             # it comes back exactly
    assert blurred[-1]["reconstruction_psnr"] < 20
    header, *rows = printed.splitlines()
    assert header.split()[:5] == ["model", "n", "floor", "latent_loss", "rgb_l1"] and len(rows) == 2
    for row, record in zip(rows, (exact[-1], blurred[-1])):
        assert row.split()[3:5] == [f"{record['latent_loss']:.4f}", f"{record['rgb_l1']:.4f}"]
    assert all([r["step"] for r in records] == list(range(0, 241, 12)) for records in (exact, blurred))
    with Image.open(next(folder.glob("*/000240.png"))) as row:
        assert row.size == (7 * 32, 32)


TINY_DIT = ["--target", "x", "--dit-width", 32, "--dit-depth", 1, "--dit-steps", 6, "--dit-batch", 4,
            "--skip", "fid", *FAST]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    encoder = DINOv3(DINOv3Config(width=64, depth=1, hidden=64, gated=False, qkv_bias=True, registers=0))
    path = tmp_path_factory.mktemp("teacher") / "dinov3.safetensors"
    save_safetensors(encoder.state_dict(), path)
    return path


def generating(halves, teacher):
    return ["--generate", halves / "train", "--data", halves / "val", "--encoder", teacher, *TINY_DIT]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_samples_of_a_folder_are_measured_beside_reconstructions(
        halves, checkpoint, codecs, teacher, tmp_path, capsys):
    command(checkpoint, f"{codecs}:Exact", *generating(halves, teacher), "--out", tmp_path)
    sae, exact = records(tmp_path / "0-last")[-1], records(tmp_path / "1-codecs")[-1]
    assert sae["step"] == 6 and "floor" not in sae and exact["fd_rec"] == pytest.approx(0, abs=1e-6)
    assert exact["class_rec"] == exact["class_test"] == sae["class_test"]
    assert 0 <= sae["class_gen"] <= 100 and sae["fd_gen"] > 0
    header, *rows, note = capsys.readouterr().out.splitlines()
    assert header.split()[-5:] == ["fd_gen", "fd_rec", "class_gen", "class_rec", "class_test"]
    assert len(rows) == 2
    assert note == "  fd is unreliable: 21 images cannot fill a covariance of 128 dimensions"
    assert rows[0].split()[-1] == f"{sae['class_test']:.1f}"
    for name, size in ("samples", (8 * 32, 3 * 32)), ("000006", (7 * 32, 8 * 32)):
        with Image.open(tmp_path / f"0-last/{name}.png") as grid:
            assert grid.size == size


def test_the_dit_of_a_peer_whose_weights_have_changed_is_not_gone_on_with(photos, tmp_path):
    def words(scale):
        (tmp_path / "peer.py").write_text("class Peer:\n"
                                          f"    encode = staticmethod(lambda x: {scale} * x)\n"
                                          f"    decode = staticmethod(lambda z: z / {scale})\n")
        return [f"{tmp_path / 'peer.py'}:Peer", "--generate", photos / "red/03.png", *TINY_DIT,
                "--out", tmp_path / "out"]

    for _ in range(2):
        command(*words(1))
    assert "of other weights, images or options: delete it" in refusal(*words(2))


def test_an_interrupted_training_of_the_dit_goes_on_exactly(
        halves, checkpoint, teacher, tmp_path, monkeypatch):
    words = [checkpoint, *generating(halves, teacher)]
    command(*words, "--out", tmp_path / "whole")
    flow_loss, calls = latents_py.flow_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return flow_loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latents_py, "flow_loss", interrupted)
        command(*words, "--out", tmp_path / "parts")
    assert [r["step"] for r in records(tmp_path / "parts/0-last")] == list(range(4))
    command(*words, "--out", tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "0-last/dit.pt") for name in ("whole", "parts"))
    assert whole["records"] == parts["records"] and parts.keys() == {"key", "step", "records", "ema"}
    assert all(torch.equal(t, parts["ema"][name]) for name, t in whole["ema"].items())
    assert "of other weights, images or options" in refusal(*words, "--seed", 1, "--out", tmp_path / "parts")


def test_folders_that_cannot_serve_generation_are_refused(photos, halves, checkpoint, teacher, tmp_path):
    words = [checkpoint, "--generate", halves / "train", *TINY_DIT, "--out", tmp_path / "out"]
    assert "with --encoder" in refusal(*words, "--data", halves / "val")
    shutil.copytree(halves / "val", tmp_path / "renamed")
    (tmp_path / "renamed/red").rename(tmp_path / "renamed/crimson")
    assert "crimson is in one of" in refusal(*words, "--data", tmp_path / "renamed", "--encoder", teacher)
    few = tmp_path / "few"
    (few / "train").mkdir(parents=True)
    shutil.copy(photos / "red/00.png", few / "train")
    loose = [checkpoint, "--generate", few / "train", "--data", few / "train", "--encoder", teacher]
    assert "holds one image" in refusal(*loose, *TINY_DIT, "--out", tmp_path / "out")
    words[-1] = halves / "val"
    assert "inside the images of" in refusal(*words, "--data", halves / "val", "--encoder", teacher)
    gone = tmp_path / "gone.png"
    assert "gone.png" in refusal(checkpoint, "--generate", gone, *TINY_DIT, "--out", tmp_path / "out")


def test_a_perfect_prediction_is_sampled_exactly_in_any_number_of_steps():
    """The path from noise to the image is straight: v = eps - x is the same at all of its points."""
    x, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    for steps in 1, 2, 7:
        for target, perfect in ("x", x), ("v", noise - x):
            def dit(z, t, label):
                return perfect
            z = latents_py.sample(dit, noise, torch.zeros(2).long(), target, steps=steps)
            assert torch.allclose(z, x, atol=1e-5)


def test_each_class_is_sampled_by_its_label():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 8)                    # [B,N,n]
    dit, generator = latents_py.DiT(4, 8, 64, 1, classes=2), torch.Generator()
    optimizer = torch.optim.Adam(dit.parameters(), 3e-3)
    for step in range(200):
        label = torch.arange(16) % 2
        loss = latents_py.flow_loss(dit, z[label], label, "v", generator.manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label = torch.arange(8) % 2
    for guidance in 1, 1.5:
        drawn = latents_py.sample(dit, torch.randn(8, 4, 8), label, "v", guidance)
        own, other = ((drawn - z[k]).square().mean((1, 2)) for k in (label, 1 - label))
        assert own.mean() < 0.1 and (own < other / 4).all(), guidance


def test_the_probe_is_ridge_regression():
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) % 3
    standard = (x - x.mean(0)) / x.std(0)
    oracle = Ridge(1e-3 * 60).fit(standard, F.one_hot(y))
    assert np.allclose(latents_py.fit_probe(x, y)(x), oracle.predict(standard), atol=1e-4)


# ------------------------------------------------------------------ peers

def test_an_object_from_a_file_is_scored_by_the_same_protocol(halves, codecs, tmp_path):
    exact, blurred = (run(f"{codecs}:{name}", *probing(halves), "--probe", "cached",
                          "--probe-iterations", 200, "--out", tmp_path / "a.json", *FAST)
                      for name in ("Exact", "Blurred"))
    assert exact["exact"] == 21 and exact["ssim"] == pytest.approx(1) and blurred["psnr"] < 20
    assert blurred["latent"]["shape"] == [3, 4, 4] and blurred["latent"]["kl"] is None
    assert blurred["identity"] is None
    # the mean colour tells these classes apart
    assert exact["probe"].keys() == {"mu"} and blurred["probe"]["mu"] > 90


def diffusers_models():
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE
    torch.manual_seed(0)
    return {
        "kl": AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2),
        "dc": AutoencoderDC(
            latent_channels=8, attention_head_dim=8, encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_block_out_channels=(16, 32),
            decoder_block_out_channels=(16, 32), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()), decoder_norm_types="rms_norm", decoder_act_fns="silu"),
        "rae": AutoencoderRAE(
            encoder_hidden_size=64, encoder_num_hidden_layers=1, decoder_hidden_size=32,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
            encoder_input_size=28, patch_size=16)}


@pytest.mark.parametrize("kind", ["kl", "dc", "rae"])
def test_a_diffusers_model_is_scored_as_diffusers_itself_reconstructs(halves, tmp_path, kind):
    model = diffusers_models()[kind].eval()
    model.save_pretrained(tmp_path / kind)
    got = run(f"diffusers:{tmp_path / kind}", *probing(halves), *CACHED, "--out", tmp_path / "a.json", *FAST)
    low, high = (0, 1) if kind == "rae" else (-1, 1)            # the range of its images
    psnr = []
    for x in pixels(halves / "val").split(1):
        with torch.no_grad():
            y = model(x / 255 * (high - low) + low).sample
        y = ((y.clamp(low, high) - low) / (high - low) * 255).round()
        psnr.append(peak_signal_noise_ratio(y, x, data_range=255).item())
    assert got["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3) and got["probe"].keys() == {"mu"}
    assert (got["latent"]["kl"] is not None) == (kind == "kl")


# ------------------------------------------------------------------ latents on disk

def latents(folder, key="latents"):
    return torch.cat([load_file(path)[key] for path in sorted(folder.glob("*.safetensors"))])


class ImgLatentDataset(torch.utils.data.Dataset):
    """The rules of LightningDiT's loader of that name, with latent_norm and a latent_multiplier of 1."""

    def __init__(self, folder):
        self.items = []
        for file in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
            with safe_open(file, framework="pt") as tensors:
                self.items += [(file, i) for i in range(tensors.get_slice("labels").get_shape()[0])]
        stats = torch.load(os.path.join(folder, "latents_stats.pt"))
        self.mean, self.std = stats["mean"], stats["std"]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        file, i = self.items[index]
        with safe_open(file, framework="pt") as tensors:
            latent = tensors.get_slice("latents" if np.random.rand() > 0.5 else "latents_flip")[i:i + 1]
            label = tensors.get_slice("labels")[i:i + 1]
        return ((latent - self.mean) / self.std * 1.0).squeeze(0), label.squeeze(0)


def test_encoded_latents_are_read_by_lightningdits_rules(photos, checkpoint, tmp_path, capsys):
    command(checkpoint, "--encode", photos, "--out", tmp_path / "l", "--shard", 16, "--flip", *FAST)
    assert "42 latents of 16x2x2, and of the mirrored images: 1.08e-05 GB" in capsys.readouterr().out
    x, model = pixels(photos) / 127.5 - 1, SAE.from_pretrained(checkpoint)
    with torch.no_grad():
        z, flipped = model.encode(x).mode(), model.encode(x.flip(3)).mode()
    mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), correction=0, keepdim=True)
    data, drawn = ImgLatentDataset(tmp_path / "l"), []
    assert len(data) == 42 and data.mean.shape == data.std.shape == (1, 16, 1, 1)
    np.random.seed(0)
    for i, (latent, label) in enumerate(data):
        assert latent.dtype == torch.float32 and label == ImageFolder(photos).labels[i]
        either = [torch.allclose(latent * std[0] + mean[0], t[i], atol=5e-3) for t in (z, flipped)]
        assert any(either)
        drawn.append(either.index(True))
    assert 0 < sum(drawn) < 42                  # the loader has read both
    with safe_open(tmp_path / "l/latents-00000.safetensors", framework="pt") as tensors:
        assert json.loads(tensors.metadata()["classes"]) == ImageFolder(photos).classes


def test_encoded_latents_are_those_of_the_model_with_their_mean_and_std(photos, checkpoint, tmp_path):
    folder = tmp_path / "a new/folder"
    command(checkpoint, "--encode", photos, "--out", folder, "--shard", 16, *FAST)
    with torch.no_grad():
        z = SAE.from_pretrained(checkpoint).encode(pixels(photos) / 127.5 - 1).mode()
    stored, stats = latents(folder), torch.load(folder / "latents_stats.pt")
    assert stored.dtype == torch.float16 and torch.allclose(stored.float(), z, atol=2e-3)
    flat = z.transpose(0, 1).flatten(1)
    assert torch.allclose(stats["mean"].flatten(), flat.mean(1), atol=1e-3)
    assert torch.allclose(stats["std"].flatten(), flat.std(1, correction=0), atol=1e-3)
    shards = sorted(folder.glob("latents-*.safetensors"))
    assert latents(folder, "labels").tolist() == ImageFolder(photos).labels
    assert len(shards) == 3 and load_file(shards[0]).keys() == {"latents", "labels"}


def test_decoding_gives_the_reconstructions_under_the_images_names(photos, codecs, tmp_path):
    spec = f"{codecs}:Exact"                    # multiples of 1/127.5 survive fp16: every pixel comes back
    command(spec, "--encode", photos, "--out", tmp_path / "latents", "--shard", 16, *FAST)
    command(spec, "--decode", tmp_path / "latents", "--out", tmp_path / "back", *FAST)
    files = ImageFolder(photos).files
    assert len(list((tmp_path / "back").rglob("*.png"))) == len(files)
    for path in files:
        with Image.open(tmp_path / "back" / Path(path).relative_to(photos)) as back:
            assert np.array_equal(np.array(back), np.array(center_crop(Image.open(path), 32)))


def test_normalised_samples_are_decoded_by_the_statistics_beside_them_and_numbered(photos, codecs, tmp_path):
    spec, folder = f"{codecs}:Exact", tmp_path / "latents"
    command(spec, "--encode", photos, "--out", folder, *FAST)
    stats = torch.load(folder / "latents_stats.pt")
    samples = (latents(folder).float() - stats["mean"]) / stats["std"]
    save_file({"latents": samples}, folder / "samples.safetensors")
    command(spec, "--decode", folder / "samples.safetensors", "--normalized", "--out", tmp_path / "s", *FAST)
    found = [np.array(Image.open(path)) for path in sorted((tmp_path / "s").iterdir())]
    assert np.array_equal(found, pixels(photos).permute(0, 2, 3, 1).numpy())
    assert (tmp_path / "s/samples-00041.png").exists()
    (folder / "latents_stats.pt").unlink()
    assert "there is no file" in refusal(spec, "--decode", folder, "--normalized", "--out", tmp_path, *FAST)


def test_interrupted_encoding_and_decoding_go_on(photos, checkpoint, tmp_path, monkeypatch):
    out, encoded, decoded = tmp_path / "latents", count_images(monkeypatch, "latent"), []
    words = [checkpoint, "--encode", photos, "--out", out, "--shard", 16, *FAST]
    command(*words)
    before, stats = latents(out), torch.load(out / "latents_stats.pt")
    assert sum(encoded) == 1 + 42               # the first tells the size
    encoded.clear()
    (out / "latents_stats.pt").unlink()
    (out / "latents-00001.safetensors").unlink()
    command(*words)
    assert sum(encoded) == 1 + 16 and torch.equal(latents(out), before)
    assert all(torch.equal(stats[k], v) for k, v in torch.load(out / "latents_stats.pt").items())
    monkeypatch.setattr(SAE, "decode", lambda self, z, f=SAE.decode: decoded.append(len(z)) or f(self, z))
    words = [checkpoint, "--decode", out, "--out", tmp_path / "back", *FAST]
    command(*words)
    (tmp_path / "back/green/07.png").unlink()
    command(*words)
    assert decoded[-1] == 1 and sum(decoded) == 42 + 1
    assert (tmp_path / "back/green/07.png").exists()


def test_latents_of_another_model_are_not_mixed_in(photos, checkpoint, tmp_path):
    out = tmp_path / "latents"
    command(checkpoint, "--encode", photos, "--out", out, *FAST)
    other = small_sae(tmp_path / "other.pt", seed=1)
    sentence = refusal(other, "--encode", photos, "--out", out, *FAST)
    assert "latents-00000.safetensors holds latents of another model" in sentence
    for option in ["--shard", 16], ["--flip"]:
        assert option[0] in refusal(checkpoint, "--encode", photos, "--out", out, *option, *FAST)
    save_file({"latents": torch.zeros(1)}, out / "samples.safetensors")
    sentence = refusal(checkpoint, "--encode", photos, "--out", out, *FAST)
    assert "samples.safetensors is none of the 1 shards" in sentence


def test_latents_of_images_that_have_changed_are_not_mixed_in(photos, checkpoint, tmp_path):
    shutil.copytree(photos, tmp_path / "images")
    words = [checkpoint, "--encode", tmp_path / "images", "--out", tmp_path / "latents", *FAST]
    command(*words)
    shutil.copy(photos / "red/03.png", tmp_path / "images/red/04.png")
    assert "or images: delete it" in refusal(*words)


def test_latents_of_an_object_without_a_file_of_weights_are_made_again(photos, codecs, tmp_path, monkeypatch):
    encoded = count_images(monkeypatch, "latent")
    for _ in range(2):
        command(f"{codecs}:Exact", "--encode", photos, "--out", tmp_path / "latents", *FAST)
    assert sum(encoded) == 2 * (1 + 42)


def test_decoding_refuses_latents_that_are_not_the_models_and_names_that_are_not_its_own(
        photos, checkpoint, codecs, tmp_path, capsys):
    out, back = tmp_path / "latents", tmp_path / "back"
    command(checkpoint, "--encode", photos, "--out", out, *FAST)
    sentence = refusal(f"{codecs}:Exact", "--decode", out, "--out", back, *FAST)
    assert re.search("latents of 16 channels that .*Exact cannot decode", sentence)
    odd = tmp_path / "odd.safetensors"
    for names in ["x.jpg", "x.jpg.png"], ["/tmp/x", "y"], ["../x", "y"]:
        save_file({"latents": torch.zeros(2, 16, 2, 2)}, odd, {"names": json.dumps(names)})
        sentence = refusal(checkpoint, "--decode", odd, "--out", back, *FAST)
        assert "two latents alike, or a file outside" in sentence
    save_file({"z": torch.zeros(2, 16, 2, 2)}, tmp_path / "foreign.safetensors")
    sentence = refusal(checkpoint, "--decode", tmp_path / "foreign.safetensors", "--out", back, *FAST)
    assert "foreign.safetensors holds no tensor `latents`" in sentence
    assert not back.exists()
    for _ in range(2):
        command(checkpoint, "--decode", out, "--out", back, *FAST)
    assert "42 of the 42 images of latents-00000.safetensors are there already" in capsys.readouterr().out


# ------------------------------------------------------------------ outputs

@pytest.mark.parametrize("where", ["flat", "a class folder", "the training images", "beside the checkpoint"])
def test_a_score_written_among_the_images_is_refused(halves, checkpoint, tmp_path, where):
    """The picture beside the JSON would become an image of the set, and its features file lies there, too."""
    data, train = shutil.copytree(halves, tmp_path / "set") / "val", tmp_path / "set/train"
    words = [checkpoint, "--data", data, "--train", train, *CACHED, "--skip", "fid,lpips", *FAST]
    if where == "flat":
        words = [checkpoint, "--data", data / "red", *NO_NETS, *FAST, "--out", data / "red/e.json"]
    elif where == "a class folder":
        words += ["--out", data / "red/e.json"]
    elif where == "the training images":
        words += ["--out", train / "run/e.json"]
    else:
        shutil.copy(checkpoint, data / "red/last.pt")
        words[0] = data / "red/last.pt"
    before = sorted((tmp_path / "set").rglob("*"))
    assert "inside the images of" in refusal(*words)
    assert sorted((tmp_path / "set").rglob("*")) == before


def test_latents_and_images_written_among_the_images_are_refused(photos, checkpoint, tmp_path):
    images = shutil.copytree(photos, tmp_path / "set")
    before = sorted(images.rglob("*"))
    sentence = refusal(checkpoint, "--encode", images, "--out", images / "red/latents", *FAST)
    assert "inside the images of" in sentence
    command(checkpoint, "--encode", images, "--out", tmp_path / "latents", *FAST)
    for name in "latents", "latents/latents-00000.safetensors":
        for out in images, images / "red":
            sentence = refusal(checkpoint, "--decode", tmp_path / name, "--out", out, *FAST)
            assert "inside the images of" in sentence
    assert sorted(images.rglob("*")) == before


def test_an_output_that_cannot_be_written_is_told_before_the_pass(photos, checkpoint, tmp_path, monkeypatch):
    def too_late(*args):
        raise AssertionError("images were read")

    monkeypatch.setattr(E, "load_image", too_late)
    (tmp_path / "file").touch()
    for folder in tmp_path / "file", Path("/proc/self"), tmp_path / ("x" * 300):
        for words in (["--data", photos, *NO_NETS, "--out", folder / "e.json"],
                      ["--encode", photos, "--out", folder],
                      ["--generate", photos / "red/03.png", "--out", folder]):
            assert "cannot be written" in refusal(checkpoint, *words, *FAST)
    for out in tmp_path, Path("/dev/null"):     # a rename would replace the device
        words = [checkpoint, "--data", photos, *NO_NETS, "--out", out, *FAST]
        assert "is no file: name another" in refusal(*words)


def test_the_table_is_printed_when_the_json_cannot_be_written(
        photos, checkpoint, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = [checkpoint, "--data", photos, *NO_NETS, "--out", tmp_path / "a.json", *FAST]
    psnr = f"{run(*words)['psnr']:.2f}"
    capsys.readouterr()
    for name in ("write", "write_grid"):
        (tmp_path / "a.json").unlink(missing_ok=True)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(E, name, full)
            command(*words)
        assert psnr in capsys.readouterr().out
    assert f"{json.loads((tmp_path / 'a.json').read_text())['psnr']:.2f}" == psnr        # before the picture


def test_the_table_has_the_models_before_one_that_fails(photos, codecs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sentence = refusal(f"{codecs}:Blurred", f"{codecs}:infinite", "--data", photos, *NO_NETS, *FAST)
    assert "NaN or Inf of 42 of 42 images" in sentence and "Blurred" in capsys.readouterr().out
    assert len(list(tmp_path.glob("runs/*Blurred/eval.json"))) == 1


def test_a_disk_too_small_for_the_features_is_an_error_before_they_are_written(
        halves, checkpoint, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = [checkpoint, *probing(halves), *CACHED, "--out", tmp_path / "a.json", *FAST]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "posix_fallocate", full)
        command(*words)
    assert not list(tmp_path.glob("features-*"))
    assert json.loads((tmp_path / "a.json").read_text())["unfinished"] == "probe"
    assert run(*words)["probe"].keys() == {"cls+patch", "patch", "mu"}


# ------------------------------------------------------------------ bad input

def refusal(*args):
    """The one sentence of the error with which the command ends."""
    with pytest.raises(ValueError) as error:
        command(*args)
    sentence = str(error.value)
    assert len(sentence.splitlines()) == 1, sentence
    return sentence


def ends_in_one_sentence(done):
    """The last line of stderr, for exit status 1 without a traceback. A progress bar may stand before it."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "eval.py: " in done.stderr.splitlines()[-1], done.stderr
    return done.stderr.splitlines()[-1]


def shell(*words, **environment):
    return subprocess.Popen([sys.executable, ROOT / "eval.py", *(str(word) for word in words)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)


def finished(process):
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    done = finished(shell(tmp_path / "gone.pt", "--data", tmp_path / "none"))
    assert f"there is no file {tmp_path}/gone.pt" in ends_in_one_sentence(done)
    # before it may stand the one line that says that the extension has not been built
    assert len(done.stderr.splitlines()) <= 2


def test_a_killed_data_worker_ends_in_one_sentence(photos, codecs, tmp_path):
    done = finished(shell(f"{codecs}:worker_killer", "--data", photos, *NO_NETS, "--size", 32, "--workers", 1,
                          "--batch", 1, "--out", tmp_path / "a.json"))
    assert "worker" in ends_in_one_sentence(done) and "--workers" in done.stderr


def test_ranks_that_cannot_reach_each_other_end_in_one_sentence(photos, checkpoint, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [shell(checkpoint, "--data", photos, *NO_NETS, *FAST, "--out", tmp_path / "a.json",
                   RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                   GLOO_SOCKET_IFNAME="nowhere")
             for rank in range(2)]
    assert all("GLOO_SOCKET_IFNAME" in ends_in_one_sentence(finished(process)) for process in ranks)


def test_tasks_of_a_launcher_that_are_no_ranks_are_refused(photos, checkpoint, tmp_path):
    """Each would score everything and write the same files."""
    done = finished(shell(checkpoint, "--data", photos, *NO_NETS, *FAST, "--out", tmp_path / "a.json",
                          SLURM_NTASKS="2"))
    assert "torchrun" in ends_in_one_sentence(done) and not (tmp_path / "a.json").exists()


SCORES = [*NO_NETS, "--size", "32", "--workers", "0", "--out", Path(tempfile.gettempdir()) / "refused.json"]


def test_latents_that_are_not_there_are_refused(checkpoint, tmp_path):
    for path in tmp_path / "none.safetensors", tmp_path:        # a folder without any
        sentence = refusal(checkpoint, "--decode", path, "--out", tmp_path, *FAST)
        assert f"there are no latents {path}" in sentence


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["zero bytes", "text", "truncated"])
def test_an_unreadable_image_is_named(photos, checkpoint, tmp_path, content, workers):
    whole = (photos / "red/00.png").read_bytes()
    shutil.copytree(photos, tmp_path / "set")
    (tmp_path / "set/red/05.png").write_bytes(whole[:len(whole) // 2] if content is None else content)
    sentence = refusal(checkpoint, "--data", tmp_path / "set", *NO_NETS, "--size", 32, "--workers", workers,
                       "--out", tmp_path / "a.json")
    assert "red/05.png" in sentence and not (tmp_path / "a.json").exists()


def test_images_of_every_kind_are_scored(checkpoint, tmp_path):
    """Greyscale, palette, RGBA, CMYK, 16 bits, EXIF-rotated, animated, 1 x 1: each becomes one RGB crop."""
    root, rng = tmp_path / "kinds", np.random.default_rng(0)
    root.mkdir()
    rgb = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for mode in ("L", "LA", "P", "RGBA", "1"):
        rgb.convert(mode).save(root / f"{mode}.png")
    rgb.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=np.uint16)).save(root / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6                            # a quarter turn
    rgb.save(root / "turned.jpg", exif=exif)
    rgb.save(root / "animated.webp", save_all=True, append_images=[Image.new("RGB", rgb.size)])
    Image.new("RGB", (1, 1), (200, 30, 30)).save(root / "tiny.png")
    assert run(checkpoint, "--data", root, *NO_NETS, "--out", tmp_path / "a.json", *FAST)["images"] == 10
    folder = ImageFolder(root)
    crops = {Path(file).stem: E.Crops(32, folder)[i][1] for i, file in enumerate(folder.files)}
    assert all(crop.shape == (32, 32, 3) and crop.dtype == torch.uint8 for crop in crops.values())
    assert crops["sixteen"].float().std() > 30                  # scaled, not clipped to white
    upright = np.array(center_crop(Image.open(root / "turned.jpg").rotate(-90, expand=True), 32))
    assert np.array_equal(crops["turned"].numpy(), upright)


def test_pixels_that_decode_are_scored_whatever_their_metadata(photos, codecs, tmp_path):
    """A broken rational beside the orientation, EXIF without a TIFF header, 2 MB of compressed text."""
    root = tmp_path / "set"
    root.mkdir()
    with Image.open(photos / "red/00.png") as image:
        exif = Image.Exif()
        exif[0x0112], exif[0x9204] = 6, TiffImagePlugin.IFDRational(-1, 1)
        image.save(root / "rational.jpg", exif=exif)
        broken = struct.pack(">ii", -1, 1), struct.pack(">ii", -1, 0)
        data = (root / "rational.jpg").read_bytes()
        for one, zero in (broken, [part[3::-1] + part[:3:-1] for part in broken]):       # either byte order
            data = data.replace(one, zero)
        (root / "rational.jpg").write_bytes(data)
        image.save(root / "exif.png", exif=b"no TIFF header")
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "x" * 2_000_000, zip=True)
        image.save(root / "text.png", pnginfo=text)
    got = run(f"{codecs}:Exact", "--data", root, *NO_NETS, "--out", tmp_path / "a.json", *FAST)
    assert got["images"] == got["exact"] == 3
    command(f"{codecs}:Exact", "--encode", root, "--out", tmp_path / "latents", *FAST)
    assert len(latents(tmp_path / "latents")) == 3


def test_an_emptied_class_is_refused_and_what_systems_leave_behind_is_no_class(halves, checkpoint, tmp_path):
    data = shutil.copytree(halves, tmp_path / "set")
    words = [checkpoint, *probing(data), *CACHED, "--out", tmp_path / "a.json", *FAST]
    before = run(*words)["probe"]
    for name in ("lost+found", "@eaDir", "__MACOSX", ".cache"):
        for half in ("train", "val"):
            (data / half / name).mkdir()
    shutil.copy(data / "train/red/00.png", data / "train/@eaDir/00.png")
    assert run(*words)["probe"] == before
    for path in (data / "train/red").iterdir():
        path.unlink()
    assert re.search("red holds no images", refusal(*words))


def test_data_folders_that_cannot_serve_are_named(photos, halves, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "gone" in refusal(checkpoint, "--data", tmp_path / "gone", *SCORES)
    assert "empty holds no images" in refusal(checkpoint, "--data", tmp_path / "empty", *SCORES)
    assert "data/imagenet/train" in refusal(checkpoint, "--data", photos, "--skip", "fid,lpips")
    sentence = refusal(checkpoint, "--data", photos / "red", "--train", photos / "red", *SCORES[2:])
    assert "needs two class folders" in sentence
    shutil.copytree(photos, tmp_path / "renamed")
    (tmp_path / "renamed/red").rename(tmp_path / "renamed/crimson")
    sentence = refusal(checkpoint, "--data", photos, "--train", tmp_path / "renamed", *SCORES[2:])
    assert "crimson is in one of" in sentence
    for name in ("blue", "green", "red"):
        (tmp_path / "few" / name).mkdir(parents=True)
        shutil.copy(photos / name / "00.png", tmp_path / "few" / name)
    sentence = refusal(checkpoint, "--data", photos, "--train", tmp_path / "few", *SCORES[2:])
    assert "10 training images or more, and --train has 3 and 3" in sentence
    (tmp_path / "peer.py").touch()
    assert "peer.py:FACTORY" in refusal(tmp_path / "peer.py")
    assert "no file gone.pt" in refusal(checkpoint, "gone.pt")


def test_missing_metric_weights_say_what_to_run(photos, checkpoint, tmp_path):
    words = [checkpoint, "--data", photos, "--out", tmp_path / "a.json"]
    gone = tmp_path / "gone.pth"
    assert "weights.sh --only inception" in refusal(*words, "--skip", "lpips,probe", "--inception", gone)
    assert "weights.sh --only vgg16" in refusal(*words, "--skip", "fid,probe", "--lpips-weights", gone)


def test_checkpoints_that_are_none_are_named(photos, checkpoint, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(Path(checkpoint).read_bytes()[:100_000])
    (tmp_path / "zero.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    broken = torch.load(checkpoint, weights_only=True)
    broken["ema"]["to_latent.weight"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pt")
    for name in ("gone", "other", "cut", "zero", "text", "nan"):
        assert f"{name}.pt" in refusal(tmp_path / f"{name}.pt", "--data", photos, *SCORES), name
    assert "NaN or Inf in to_latent.weight" in refusal(tmp_path / "nan.pt", "--data", photos, *SCORES)


def test_peers_that_do_not_fit_are_named(photos, codecs, tmp_path):
    def said(spec, *more):
        return refusal(spec, "--data", photos, *SCORES, *more)

    assert "there is no file" in said(f"{tmp_path}/gone.py:load")
    assert "Missing()" in said(f"{codecs}:Missing") and "encode(x) -> z" in said(f"{codecs}:Nothing")
    assert "pass the --size" in said(f"{codecs}:wrong_shape")
    assert "must give a tensor" in said(f"{codecs}:not_a_tensor")
    assert "NaN or Inf of 42 of 42 images" in said(f"{codecs}:infinite")
    assert "leave --sample out" in said(f"{codecs}:Exact", "--sample")
    assert "cannot load" in said(f"diffusers:{tmp_path}")


@pytest.mark.parametrize("words", [
    ["--skip", "ssim"], ["--size", "8"], ["--workers", "-1"], ["--shard", "0"], ["--encode", "x"],
    ["--encode", "x", "--decode", "y", "--out", "z"], ["other.pt", "--out", "z"]])
def test_options_that_contradict_each_other_are_refused(checkpoint, capsys, words):
    with pytest.raises(SystemExit) as stop:
        command(checkpoint, *words)
    assert stop.value.code == 2 and ": error: " in capsys.readouterr().err
