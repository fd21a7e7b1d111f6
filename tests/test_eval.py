"""eval.py through its command line, on small pictures and small models."""
import errno
import io
import json
import os
import shutil
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
import torch
from PIL import Image
from torch.nn import functional as F
import torchvision
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import eval as E
from sae import CHECKPOINT_VERSION, SAE, DINOv3, DINOv3Config, SAEConfig
from train import ImageFolder, center_crop

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


def small_sae(path, seed=0, **changes):
    torch.manual_seed(seed)
    config = SAEConfig(encoder=DINOv3Config(width=64, depth=1, head_dim=64, hidden=64, gated=False, qkv_bias=True, registers=4),
                       z_dim=16, widths=(16, 16, 16, 8, 8), blocks=1, **changes)
    weights = SAE(config).state_dict()
    torch.save({"version": CHECKPOINT_VERSION, "config": asdict(config), "args": {}, "step": 0, "model": weights, "ema": weights}, path)
    return str(path)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return small_sae(tmp_path_factory.mktemp("run") / "last.pt")


def run(*args):
    """The JSON that the command line writes."""
    args = [str(a) for a in args]
    E.main(args)
    return json.loads(Path(args[args.index("--out") + 1]).read_text())


@pytest.fixture(scope="session")
def stem_file(tmp_path_factory):
    """FID-64's part of the Inception file, random."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "stem.pth"
    torch.save({k: v * 5 if v.dim() > 1 else v for k, v in net.state_dict().items() if k.startswith("Conv2d")}, path)
    return path


# ------------------------------------------------------------------ scores

def test_scores_of_a_checkpoint_equal_those_of_its_reconstructions_by_torchmetrics(photos, checkpoint, tmp_path):
    got = run(checkpoint, "--data", photos, "--skip", "fid,lpips,probe", "--out", tmp_path / "a.json", *FAST)
    sae, psnr, ssim = SAE.from_pretrained(checkpoint), [], []
    for path in ImageFolder(photos).files:
        x = torch.from_numpy(np.array(center_crop(Image.open(path), 32))).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            y = sae.decode(sae.encode(x / 127.5 - 1).mode())
        y = ((y.clamp(-1, 1) + 1) / 2 * 255).round()
        psnr.append(peak_signal_noise_ratio(y, x, data_range=255).item())
        ssim.append(structural_similarity_index_measure(y, x, data_range=255.0).item())
    assert got["images"] == len(psnr) == 42
    assert got["psnr"] == pytest.approx(np.mean(psnr), abs=1e-4) and got["ssim"] == pytest.approx(np.mean(ssim), abs=1e-5)
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (8 * 32, 3 * 32)


def test_lpips_of_the_command_is_the_lpips_packages(photos, checkpoint, tmp_path, real_data):
    weights = real_data / "weights/squeezenet1_1-lpips/squeezenet1_1_features.safetensors"
    got = run(checkpoint, "--data", photos, "--skip", "fid,probe", "--lpips-net", "squeeze", "--lpips-weights", weights, "--out", tmp_path / "a.json", *FAST)
    package = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)                  # its heads are in the package, the trunk is given here
    package.net.load_state_dict({k: load_file(weights)["features." + k.split(".", 1)[1]] for k in package.net.state_dict()})
    sae, distances = SAE.from_pretrained(checkpoint), []
    images = torch.stack([torch.from_numpy(np.array(center_crop(Image.open(path), 32))) for path in ImageFolder(photos).files])
    for x in (images.permute(0, 3, 1, 2) / 127.5 - 1).split(int(FAST[FAST.index("--batch") + 1])):      # in other batches other pixels round up
        with torch.no_grad():
            y = ((sae.decode(sae.encode(x).mode()).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            distances += package(x, y).flatten().tolist()
    assert got["lpips"] == pytest.approx(np.mean(distances), abs=1e-5)


def test_latent_statistics_equal_those_of_all_latents_at_once(photos, checkpoint, tmp_path):
    got = run(checkpoint, "--data", photos, "--skip", "fid,lpips,probe", "--out", tmp_path / "a.json", *FAST)["latent"]
    sae = SAE.from_pretrained(checkpoint)
    x = torch.stack([torch.from_numpy(np.array(center_crop(Image.open(p), 32))).permute(2, 0, 1) for p in ImageFolder(photos).files])
    with torch.no_grad():
        q = sae.encode(x / 127.5 - 1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mu, (q.logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0))
    std = q.mu.transpose(0, 1).flatten(1).std(1, correction=0)
    assert got["kl"] == pytest.approx(kl.flatten(1).sum(1).mean().item(), rel=1e-4)
    assert (got["shape"], got["std_min"], got["std_max"]) == ([16, 2, 2], pytest.approx(std.min().item(), rel=1e-4), pytest.approx(std.max().item(), rel=1e-4))


def test_numbers_do_not_depend_on_ranks_or_workers(photos, checkpoint, stem_file, tmp_path):
    """42 images in batches of 4: neither 11 batches nor 42 images divide by 2 or 3 ranks."""
    results = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", 29611 + ranks,
                   ROOT / "eval.py", checkpoint, "--data", photos, "--train", photos, "--out", out, "--size", 32, "--batch", 4,
                   "--workers", ranks % 2, "--skip", "lpips", "--fid-dims", 64, "--inception", stem_file, "--probe", "cached", "--probe-iterations", 30, "--sample"]
        # torchrun gives each of several ranks one thread; other numbers of threads add in another order
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    assert results[0]["latent"].pop("shape")
    for other in results[1:]:
        assert other["images"] == 42
        for key in ("rfid", "psnr", "ssim", "probe"):
            assert other[key] == pytest.approx(results[0][key], rel=1e-9), key
        assert other["latent"].pop("shape") == [16, 2, 2] and other["latent"] == pytest.approx(results[0]["latent"], rel=1e-9)


def test_a_drawn_latent_is_the_same_at_any_batch_size_and_differs_from_the_mean(photos, checkpoint, tmp_path):
    one, two, mean = (run(checkpoint, "--data", photos, "--skip", "fid,lpips,probe", "--out", tmp_path / "a.json", "--size", 32, "--workers", 0,
                          "--batch", batch, *more)["psnr"] for batch, more in ((3, ["--sample"]), (16, ["--sample"]), (16, [])))
    assert one == pytest.approx(two, abs=1e-4) and abs(one - mean) > 1e-3


def test_what_the_probe_sees_of_a_peer_is_the_mean_at_any_batch_size():
    def encode(x):
        return E.Posterior(F.avg_pool2d(x, 16), torch.zeros_like(F.avg_pool2d(x, 16)))
    args = SimpleNamespace(sample=True, size=32)
    model = E.Autoencoder("peer", None, encode, lambda z: F.interpolate(z, scale_factor=16.), args, torch.device("cpu"))
    x = torch.rand(6, 3, 32, 32)
    torch.testing.assert_close(model.features(x)[0], x.mean((2, 3)))
    torch.testing.assert_close(torch.cat([model.features(part)[0] for part in x.split(2)]), model.features(x)[0])


def test_too_few_images_for_fid_are_said_to_be(photos, checkpoint, stem_file, tmp_path, capsys):
    got = run(checkpoint, "--data", photos, "--skip", "lpips,probe", "--fid-dims", 64, "--inception", stem_file, "--out", tmp_path / "a.json", *FAST)
    assert "42 images cannot fill a covariance of 64 dimensions" in got["warning"] and got["warning"] in capsys.readouterr().out


# ------------------------------------------------------------------ probe

def digits():
    """sklearn's 1797 handwritten digits, as (features [n,64], labels), even ones to train, odd ones to test."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 4, dtype=torch.float32), torch.tensor(y)
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def test_the_linear_probe_is_within_a_point_of_sklearns_logistic_regression():
    (x, y), (xt, yt) = digits()
    theirs = 100 * LogisticRegression(max_iter=5000).fit(x, y).score(xt, yt)
    torch.manual_seed(0)
    kinds, R = {"pixels": slice(0, 64)}, len(E.RATES)
    heads = E.Heads(kinds, 10)
    batches = [torch.tensor([i for i, _ in E.draws(step, len(x), 512)]) for step in range(2000)]
    E.train_heads(heads, lambda start: ((b, x[b], y[b]) for b in batches[start:]), 512, 2000)
    held, test = (E.tally(heads, [(None, *s)], kinds, 2 * R, "cpu")["pixels"] for s in ((x[E.HOLD - 1::E.HOLD], y[E.HOLD - 1::E.HOLD]), (xt, yt)))
    assert abs(test[0][R + E.choose(held[0][:R], held[1][:R], len(x) // E.HOLD)].item() - theirs) < 1


def test_each_head_is_trained_as_sgd_would_alone_and_those_that_choose_the_rate_without_the_images_held_out():
    """torch.optim.SGD on one nn.Linear a rate: the rates as factors of the losses of one optimizer change nothing."""
    (x, y), _ = digits()
    x, steps, index = x / x.std(), 20, torch.arange(len(x))
    heads = E.Heads({"pixels": slice(0, 64)}, 10)
    start = heads.linear[0].weight.detach().split(10)
    alone = [torch.nn.Linear(64, 10) for _ in heads.rates]
    for linear, weight in zip(alone, start):
        linear.load_state_dict({"weight": weight, "bias": torch.zeros(10)})
    E.train_heads(heads, lambda start: ((index[i::steps], x[i::steps], y[i::steps]) for i in range(start, steps)), 45, steps)
    for i, (linear, weight) in enumerate(zip(alone, heads.linear[0].weight.detach().split(10))):
        kept = index % E.HOLD != E.HOLD - 1 if i < len(E.RATES) else index >= 0
        optimizer = torch.optim.SGD(linear.parameters(), lr=heads.rates[i] * 45 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for j in range(steps):
            mine = kept[j::steps]
            loss = torch.nn.functional.cross_entropy(linear(x[j::steps][mine]), y[j::steps][mine], reduction="sum") / (45 if mine.all() else 30)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        assert torch.allclose(weight, linear.weight, rtol=1e-4, atol=1e-6), (i, heads.rates[i])


def test_the_rate_is_chosen_by_the_loss_where_accuracies_cannot_be_told_apart():
    """The standard error of 90 % is 3 points for 100 images and 0.09 for 100 000 (binomial)."""
    right, loss = torch.tensor([90.0, 89.0, 80.0]), torch.tensor([0.5, 0.4, 0.1])
    assert E.choose(right, loss, 100) == 1 and E.choose(right, loss, 100_000) == 0


def test_the_linear_probe_on_real_photos_is_within_a_point_of_sklearns_logistic_regression(real_data, tmp_path):
    """caltech24 through a real encoder and the command, `cls+patch` and `patch`; sklearn with its own l2."""
    photos, encoder = real_data / "data/caltech24/images", DINOv3.from_pretrained(real_data / "weights/dinov3-ti-from-deit/model.safetensors")
    config = SAEConfig(encoder=encoder.cfg, z_dim=8, widths=(8, 8, 8, 8, 8), blocks=1)
    ema = SAE(config, encoder).state_dict()
    torch.save({"version": CHECKPOINT_VERSION, "config": asdict(config), "ema": ema}, tmp_path / "last.pt")
    got = run(tmp_path / "last.pt", "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--size", 96, "--workers", 0,
              "--probe", "cached", "--probe-iterations", 1000, "--out", tmp_path / "a.json")
    features, = map(np.load, tmp_path.glob("features-*.npy"))
    train, test = (ImageFolder(photos, split) for split in ("even", "odd"))
    x, xt = np.split(features.astype(np.float32), [len(train)])
    width = config.encoder.width
    for kind, columns in (("cls+patch", slice(0, 2 * width)), ("patch", slice(width, 2 * width))):
        theirs = LogisticRegression(max_iter=5000).fit(x[:, columns], train.labels).score(xt[:, columns], test.labels)
        assert abs(got["probe"][kind] - 100 * theirs) < 1, (kind, got["probe"], got["probe_rate"], theirs)


def test_knn_equals_sklearns_weighted_neighbours():
    (x, y), (xt, yt) = digits()
    kinds = {"all": slice(0, 64), "half": slice(0, 32)}
    ours = E.tally(E.neighbours(x, y, kinds, 10), [(None, xt[:300], yt[:300]), (None, xt[300:], yt[300:])], kinds, 2, "cpu")
    for kind, columns in kinds.items():
        for k, right in zip((10, 20), ours[kind][0].tolist()):
            theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x[:, columns], y)
            assert right == pytest.approx(100 * theirs.score(xt[:, columns], yt), abs=0.12)    # one image: ties


@pytest.mark.parametrize("kind", ["full", "cached", "knn"])
def test_the_probe_finds_classes_that_differ_in_colour(photos, checkpoint, tmp_path, kind):
    got = run(checkpoint, "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", kind, "--probe-iterations", 60,
              "--out", tmp_path / "a.json", *FAST)
    assert got["images"] == 21 and set(got["probe"]) == {"cls+patch", "patch", "mu"}
    assert all(accuracy > 90 for accuracy in got["probe"].values()), got["probe"]


def test_cached_features_are_reused_only_while_weights_images_and_crop_agree(photos, checkpoint, tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(E.Autoencoder, "features", lambda self, x, f=E.Autoencoder.features: passes.append(len(x) * x.any().item()) or f(self, x))
    (tmp_path / "set").symlink_to(photos)

    def images_seen(ckpt=checkpoint, size="32"):
        passes.clear()
        run(ckpt, "--data", tmp_path / "set", "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", "--out", tmp_path / "a.json",
            "--workers", "0", "--size", size)
        return sum(passes)

    assert images_seen() == 42 and images_seen() == 0
    assert images_seen(size="48") == 42
    assert images_seen(small_sae(tmp_path / "other.pt", seed=1)) == 42
    (tmp_path / "set").unlink()
    shutil.copytree(photos, tmp_path / "set")
    Image.new("RGB", (40, 40)).save(tmp_path / "set/red/00.png")
    assert images_seen() == 42


def test_an_interrupted_feature_pass_goes_on_where_it_stopped(photos, checkpoint, tmp_path, monkeypatch):
    features, passes = E.Autoencoder.features, []

    def stop_after_three(self, x):
        passes.append(x.any().item())                   # a grey image, which only asks for the width, does not count
        if sum(passes) == 4:
            raise KeyboardInterrupt
        return features(self, x)

    command = [checkpoint, "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", "--out", tmp_path / "a.json", *FAST]
    monkeypatch.setattr(E.Autoencoder, "features", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    monkeypatch.setattr(E.Autoencoder, "features", lambda self, x: passes.append(len(x) * x.any().item()) or features(self, x))
    passes.clear()
    resumed = run(*command)["probe"]
    assert sum(passes) == 42 - 15
    monkeypatch.setattr(E.Autoencoder, "features", features)
    (tmp_path / "b").mkdir()
    assert resumed == run(*command[:-len(FAST) - 1], tmp_path / "b/a.json", *FAST)["probe"]


def test_an_interrupted_full_probe_ends_as_an_uninterrupted_one(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "SAVE_EVERY", 4)
    command = [checkpoint, "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", "full", "--probe-iterations", 10, *FAST, "--out"]
    whole = run(*command, tmp_path / "a.json")
    trained, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: trained.append(1) or (exec("raise KeyboardInterrupt") if len(trained) == 7 else step(self)))
    with pytest.raises(KeyboardInterrupt):
        run(*command, tmp_path / "b.json")
    trained.clear()
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: trained.append(1) or step(self))
    resumed = run(*command, tmp_path / "b.json")
    assert len(trained) == 6 and resumed["probe"] == whole["probe"] and not list(tmp_path.glob("probe-*"))


def test_scores_are_written_before_the_probe(photos, checkpoint, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    command = [checkpoint, "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", *FAST, "--out", tmp_path / "a.json"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(E, "probe", stop)
        run(*command)
    before = json.loads((tmp_path / "a.json").read_text())
    after = run(*command)
    assert before.pop("unfinished") == "probe" and "probe" not in before and before["psnr"] > 0 and (tmp_path / "a.png").exists()
    assert before.items() <= after.items() and set(after) - set(before) == {"probe", "probe_k20"}


# ------------------------------------------------------------------ the DiT on one image

CODECS = """
import torch.nn.functional as F

class Exact:                                    # 8x8 blocks of pixels as 192 channels: the image comes back bit for bit
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
"""


@pytest.fixture(scope="session")
def codecs(tmp_path_factory):
    path = tmp_path_factory.mktemp("codecs") / "codecs.py"
    path.write_text(CODECS)
    return path


@pytest.fixture(scope="session")
def overfits(photos, codecs, tmp_path_factory):
    """{target: overfit.json} of DiTs of width 48 on one image with both codecs, and the output of the command."""
    folder, found = tmp_path_factory.mktemp("overfit"), {}
    for target in "vx":
        with redirect_stdout(io.StringIO()) as printed:
            E.main([str(a) for a in (f"{codecs}:Exact", f"{codecs}:Blurred", "--overfit", photos / "red/03.png", "--size", 32, "--target", target,
                                     "--dit-width", 48, "--dit-depth", 1, "--dit-steps", 240, "--dit-batch", 8, "--dit-lr", 3e-3, "--out", folder / target)])
        found[target] = json.loads((folder / target / "overfit.json").read_text()), printed.getvalue(), folder / target
    return found


def test_velocity_loss_comes_down_to_its_floor_and_not_below(overfits):
    """(n - d) / n = 144 / 192 for a network of width d = 48 (Zheng et al. 2025, RAE, Theorem 1)."""
    exact, blurred = overfits["v"][0]["runs"]
    losses = [r["latent_loss"] for r in exact["records"]]
    assert exact["floor"] == 0.75 and blurred["floor"] == 0
    assert min(losses) > 0.75 - 0.03                                                     # the fixed noise has a spread of 1 %
    assert losses[-1] < 0.9 < losses[0] and blurred["records"][-1]["latent_loss"] < 0.5


def test_predicting_the_image_goes_below_the_floor_of_the_velocity(overfits):
    exact, _ = overfits["x"][0]["runs"]
    assert exact["floor"] == 0 and exact["records"][-1]["latent_loss"] < 0.5


def test_both_rankings_are_reported_and_the_better_autoencoder_wins_only_by_rgb(overfits):
    """With --target x both latents are learned, the coarse one at a lower loss; the decoded image says which is good."""
    result, printed, folder = overfits["x"]
    by_latent, by_rgb = result["ranking"]["latent_loss"], result["ranking"]["rgb_l1"]
    assert len(by_latent) == 2 and sorted(by_latent) == sorted(by_rgb)
    exact, blurred = (r["records"][-1] for r in result["runs"])
    assert exact["rgb_l1"] < blurred["rgb_l1"] and "Exact" in by_rgb[0]
    assert "best to worst by latent_loss" in printed and "best to worst by rgb_l1" in printed
    assert result["runs"][0]["reconstruction_psnr"] == float("inf") and result["runs"][1]["reconstruction_psnr"] < 20
    lines = [json.loads(line) for file in sorted(folder.glob("*/metrics.jsonl")) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * 21 and [r["step"] for r in lines[:21]] == list(range(0, 241, 12))
    with Image.open(folder / "curve.png") as curve, Image.open(next(folder.glob("*/000240.png"))) as row:
        assert curve.width > 500 and row.size == (8 * 32, 32)


def test_an_interrupted_overfit_ends_as_an_uninterrupted_one(photos, checkpoint, tmp_path, monkeypatch, capsys):
    command = [checkpoint, "--overfit", photos / "red/03.png", "--size", 32, "--dit-width", 64, "--dit-depth", 1, "--dit-steps", 40, "--dit-batch", 4, "--out"]
    whole = E.main([str(a) for a in (*command, tmp_path / "a")]) or json.loads((tmp_path / "a/overfit.json").read_text())
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or (exec("raise KeyboardInterrupt") if len(steps) == 16 else step(self)))
    with pytest.raises(KeyboardInterrupt):
        E.main([str(a) for a in (*command, tmp_path / "b")])
    assert [json.loads(line)["step"] for line in next(tmp_path.glob("b/*/metrics.jsonl")).read_text().splitlines()] == list(range(0, 15, 2))
    steps.clear()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
    E.main([str(a) for a in (*command, tmp_path / "b")])
    assert len(steps) == 40 - 14 and "goes on at step 14" in capsys.readouterr().out
    assert json.loads((tmp_path / "b/overfit.json").read_text()) == whole and not list(tmp_path.glob("*/*/*.tmp"))


def test_an_overfit_with_other_options_starts_again_and_says_so(photos, checkpoint, tmp_path, monkeypatch, capsys):
    command = [checkpoint, "--overfit", photos / "red/03.png", "--size", 32, "--dit-width", 64, "--dit-depth", 1, "--dit-batch", 4, "--out", tmp_path / "a"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch.optim.AdamW, "step", lambda self: 1 / 0)
        E.main([str(a) for a in (*command, "--dit-steps", 40)])
    E.main([str(a) for a in (*command, "--dit-steps", 20)])
    assert "starts again: model, image or options differ" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "a/overfit.json").read_text())["runs"][0]["records"]) == 21


# ------------------------------------------------------------------ peers

def test_an_object_from_a_file_is_scored_by_the_same_protocol(photos, codecs, tmp_path):
    exact, blurred = (run(f"{codecs}:{name}", "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", "--out", tmp_path / "a.json", *FAST)
                      for name in ("Exact", "Blurred"))
    assert exact["psnr"] == float("inf") and exact["ssim"] == pytest.approx(1) and blurred["psnr"] < 20
    assert blurred["latent"]["shape"] == [3, 4, 4] and blurred["latent"]["kl"] is None
    assert exact["probe"].keys() == {"mu"} and blurred["probe"]["mu"] > 90               # the mean colour tells these classes apart


def diffusers_models():
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE
    torch.manual_seed(0)
    return {"kl": AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
            "dc": AutoencoderDC(latent_channels=8, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
                                encoder_block_out_channels=(16, 32), decoder_block_out_channels=(16, 32), encoder_layers_per_block=(1, 1),
                                decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
                                decoder_norm_types="rms_norm", decoder_act_fns="silu"),
            "rae": AutoencoderRAE(encoder_hidden_size=64, encoder_num_hidden_layers=1, decoder_hidden_size=32, decoder_num_hidden_layers=1,
                                  decoder_num_attention_heads=2, decoder_intermediate_size=32, encoder_input_size=28, patch_size=16)}


@pytest.mark.parametrize("kind", ["kl", "dc", "rae"])
def test_a_diffusers_model_is_scored_as_diffusers_itself_reconstructs(photos, tmp_path, kind):
    model = diffusers_models()[kind].eval()
    model.save_pretrained(tmp_path / kind)
    got = run(f"diffusers:{tmp_path / kind}", "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", "--out", tmp_path / "a.json", *FAST)
    low, high = (0, 1) if kind == "rae" else (-1, 1)                                     # the range of its images
    psnr = []
    for path in ImageFolder(photos, split="odd").files:
        x = torch.from_numpy(np.array(center_crop(Image.open(path), 32))).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            y = model(x / 255 * (high - low) + low).sample
        psnr.append(peak_signal_noise_ratio(((y.clamp(low, high) - low) / (high - low) * 255).round(), x, data_range=255).item())
    assert got["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3) and got["probe"].keys() == {"mu"}
    assert (got["latent"]["kl"] is not None) == (kind == "kl")


# ------------------------------------------------------------------ latents on disk

def latents(folder):
    return torch.cat([load_file(path)["z"] for path in sorted(folder.glob("latents-*.safetensors"))])


def test_encoded_latents_are_those_of_the_model_with_their_mean_and_std(photos, checkpoint, tmp_path):
    tmp_path = tmp_path / "a new folder"
    E.main([checkpoint, "--encode", str(photos), "--out", str(tmp_path / "latents.safetensors"), "--shard", "16", *FAST])
    sae, files = SAE.from_pretrained(checkpoint), ImageFolder(photos)
    x = torch.stack([torch.from_numpy(np.array(center_crop(Image.open(p), 32))).permute(2, 0, 1) for p in files.files])
    with torch.no_grad():
        z = sae.encode(x / 127.5 - 1).mode()
    stored, index = latents(tmp_path), load_file(tmp_path / "latents.safetensors")
    assert stored.dtype == torch.float16 and torch.allclose(stored.float(), z, atol=2e-3)
    flat = z.transpose(0, 1).flatten(1)
    assert torch.allclose(index["mean"], flat.mean(1), atol=1e-3) and torch.allclose(index["std"], flat.std(1, correction=0), atol=1e-3)
    labels = torch.cat([load_file(p)["labels"] for p in sorted(tmp_path.glob("latents-*.safetensors"))])
    assert labels.tolist() == files.labels and len(list(tmp_path.glob("latents-*"))) == 3


def test_decoding_gives_the_reconstructions_under_the_images_names(photos, codecs, tmp_path):
    spec = f"{codecs}:Exact"                    # multiples of 1/127.5 survive fp16, so every pixel must come back
    E.main([spec, "--encode", str(photos), "--out", str(tmp_path / "latents.safetensors"), "--shard", "16", *FAST])
    E.main([spec, "--decode", str(tmp_path / "latents.safetensors"), "--out", str(tmp_path / "back"), *FAST])
    files = ImageFolder(photos).files
    assert len(list((tmp_path / "back").rglob("*.png"))) == len(files)
    for path in files:
        with Image.open(tmp_path / "back" / Path(path).relative_to(photos)) as back:
            assert np.array_equal(np.array(back), np.array(center_crop(Image.open(path), 32)))


def test_interrupted_encoding_and_decoding_go_on_where_they_stopped(photos, checkpoint, tmp_path, monkeypatch):
    out, encoded, decoded = tmp_path / "latents.safetensors", [], []
    monkeypatch.setattr(E.Autoencoder, "latent", lambda self, x, first=0, f=E.Autoencoder.latent: encoded.append(len(x) * x.any().item()) or f(self, x, first))
    E.main([checkpoint, "--encode", str(photos), "--out", str(out), "--shard", "16", *FAST])
    before, index = latents(tmp_path), load_file(out)
    assert sum(encoded) == 42
    encoded.clear()
    out.unlink()
    (tmp_path / "latents-00001.safetensors").unlink()
    E.main([checkpoint, "--encode", str(photos), "--out", str(out), "--shard", "16", *FAST])
    assert sum(encoded) == 16 and torch.equal(latents(tmp_path), before)
    assert all(torch.equal(index[k], v) for k, v in load_file(out).items())
    monkeypatch.setattr(SAE, "decode", lambda self, z, f=SAE.decode: decoded.append(len(z)) or f(self, z))
    E.main([checkpoint, "--decode", str(out), "--out", str(tmp_path / "back"), *FAST])
    (tmp_path / "back/green/07.png").unlink()
    E.main([checkpoint, "--decode", str(out), "--out", str(tmp_path / "back"), *FAST])
    assert decoded[-1] == 1 and sum(decoded) == 42 + 1 + 2                               # two grey images, one a command
    assert (tmp_path / "back/green/07.png").exists()


def test_latents_of_another_model_are_not_mixed_in(photos, checkpoint, tmp_path):
    out = str(tmp_path / "latents.safetensors")
    E.main([checkpoint, "--encode", str(photos), "--out", out, *FAST])
    with pytest.raises(ValueError, match="latents-00000.safetensors holds latents of another model"):
        E.main([small_sae(tmp_path / "other.pt", seed=1), "--encode", str(photos), "--out", out, *FAST])
    with pytest.raises(ValueError, match="--shard"):
        E.main([checkpoint, "--encode", str(photos), "--out", out, "--shard", "16", *FAST])


def test_latents_of_images_that_have_changed_are_not_mixed_in(photos, checkpoint, tmp_path):
    shutil.copytree(photos, tmp_path / "images")
    words = [checkpoint, "--encode", str(tmp_path / "images"), "--out", str(tmp_path / "latents.safetensors"), *FAST]
    E.main(words)
    shutil.copy(photos / "red/03.png", tmp_path / "images/red/04.png")
    with pytest.raises(ValueError, match="or images: delete it"):
        E.main(words)


def test_latents_of_an_object_without_weights_are_made_again(photos, codecs, tmp_path, monkeypatch):
    out, encoded = tmp_path / "latents.safetensors", []
    monkeypatch.setattr(E.Autoencoder, "latent", lambda self, x, first=0, f=E.Autoencoder.latent: encoded.append(len(x) * x.any().item()) or f(self, x, first))
    for _ in range(2):
        E.main([f"{codecs}:Exact", "--encode", str(photos), "--out", str(out), *FAST])
    assert sum(encoded) == 2 * 42


def test_decoding_refuses_latents_that_are_not_the_models_and_names_that_are_not_its_own(photos, checkpoint, codecs, tmp_path, capsys):
    out, back = tmp_path / "latents.safetensors", tmp_path / "back"
    E.main([checkpoint, "--encode", str(photos), "--out", str(out), *FAST])
    with pytest.raises(ValueError, match="of 16 channels, .*Exact takes 192"):
        E.main([f"{codecs}:Exact", "--decode", str(out), "--out", str(back), *FAST])
    for names in ["x.jpg", "x.jpg.png"], ["/tmp/x", "y"], ["../x", "y"]:
        save_file({"z": torch.zeros(2, 16, 2, 2)}, tmp_path / "odd.safetensors", {"names": json.dumps(names)})
        with pytest.raises(ValueError, match="two latents alike, or a file outside"):
            E.main([checkpoint, "--decode", str(tmp_path / "odd.safetensors"), "--out", str(back), *FAST])
    assert not back.exists()
    for _ in range(2):
        E.main([checkpoint, "--decode", str(out), "--out", str(back), *FAST])
    assert "42 of the 42 images of latents-00000.safetensors are there already" in capsys.readouterr().out


# ------------------------------------------------------------------ bad input

def refusal(*args):
    """The one sentence of the error with which the command ends."""
    with pytest.raises(ValueError) as error:
        E.main([str(a) for a in args])
    sentence = str(error.value)
    assert len(sentence.splitlines()) == 1, sentence
    return sentence


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "eval.py", tmp_path / "gone.pt", "--data", tmp_path / "none"], capture_output=True, text=True)
    # before it may stand the one line that says that the extension has not been built
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"eval.py: there is no file {tmp_path}/gone.pt")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2


SCORES = ["--skip", "fid,lpips,probe", "--size", "32", "--workers", "0", "--out", Path(tempfile.gettempdir()) / "refused.json"]


def test_a_disk_too_small_for_the_features_is_an_error_before_they_are_written(photos, checkpoint, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    words = [checkpoint, "--data", str(photos), "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", "--out", str(tmp_path / "a.json"), *FAST]
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space left"):
        m.setattr(os, "posix_fallocate", full)
        E.main(words)
    assert not list(tmp_path.glob("features-*.npy")) and json.loads((tmp_path / "a.json").read_text())["unfinished"] == "probe"
    E.main(words)
    assert json.loads((tmp_path / "a.json").read_text())["probe"].keys() == {"cls+patch", "patch", "mu"}


def test_latents_that_are_not_there_are_refused(checkpoint, tmp_path):
    assert "no file" in refusal(checkpoint, "--decode", tmp_path / "none.safetensors", "--out", tmp_path, *FAST)


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["zero bytes", "text", "truncated"])
def test_an_unreadable_image_is_named(photos, checkpoint, tmp_path, content, workers):
    whole = (photos / "red/00.png").read_bytes()
    shutil.copytree(photos, tmp_path / "set")
    (tmp_path / "set/red/05.png").write_bytes(whole[:len(whole) // 2] if content is None else content)
    sentence = refusal(checkpoint, "--data", tmp_path / "set", "--skip", "fid,lpips,probe", "--size", 32, "--workers", workers, "--out", tmp_path / "a.json")
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
    assert run(checkpoint, "--data", root, "--skip", "fid,lpips,probe", "--out", tmp_path / "a.json", *FAST)["images"] == 10
    crops = {Path(f).stem: c for f, (_, c, _) in zip(ImageFolder(root).files, E.Crops(32, ImageFolder(root)))}
    assert all(c.shape == (32, 32, 3) and c.dtype == torch.uint8 for c in crops.values())
    assert crops["sixteen"].float().std() > 30                                           # scaled, not clipped to white
    upright = np.array(center_crop(Image.open(root / "turned.jpg").rotate(-90, expand=True), 32))
    assert np.array_equal(crops["turned"].numpy(), upright)


def test_data_folders_that_cannot_serve_are_named(photos, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "gone" in refusal(checkpoint, "--data", tmp_path / "gone", *SCORES)
    assert "empty holds no images" in refusal(checkpoint, "--data", tmp_path / "empty", *SCORES)
    assert "data/imagenet/train" in refusal(checkpoint, "--data", photos, "--skip", "fid,lpips")
    flat = ["--data", photos / "red", "--train", photos / "red", "--skip", "fid,lpips", "--out", tmp_path / "a.json", "--size", "32", "--workers", "0"]
    assert "class folders" in refusal(checkpoint, *flat)
    shutil.copytree(photos, tmp_path / "renamed")
    (tmp_path / "renamed/red").rename(tmp_path / "renamed/crimson")
    assert "crimson is in one of them" in refusal(checkpoint, "--data", photos, "--train", tmp_path / "renamed", "--skip", "fid,lpips", "--size", "32")
    for out in tmp_path, "/dev/null":                           # which a rename would replace
        assert "is no file: name another" in refusal(checkpoint, "--data", photos, "--skip", "fid,lpips,probe", "--size", "32", "--out", out)
    (tmp_path / "peer.py").touch()
    assert "peer.py:FACTORY" in refusal(tmp_path / "peer.py")
    assert "no file gone.pt" in refusal(checkpoint, "gone.pt")


def test_missing_metric_weights_say_what_to_run(photos, checkpoint, tmp_path):
    gone = tmp_path / "gone.pth"
    assert "weights.sh --only inception" in refusal(checkpoint, "--data", photos, "--skip", "lpips,probe", "--inception", gone)
    assert "weights.sh --only vgg16" in refusal(checkpoint, "--data", photos, "--skip", "fid,probe", "--lpips-weights", gone)


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


def test_options_that_contradict_each_other_are_refused(checkpoint, capsys):
    for args in (["--skip", "ssim"], ["--size", "8"], ["--encode", "x"], ["--encode", "x", "--decode", "y", "--out", "z"]):
        with pytest.raises(SystemExit) as stop:
            E.main([checkpoint, *args])
        assert stop.value.code == 2 and "eval.py: error:" in capsys.readouterr().err.replace("__main__.py", "eval.py").replace("pytest", "eval.py")
