"""eval.py through its command line, on small pictures and small models."""
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
import torchvision
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import eval as E
from sae import CHECKPOINT_VERSION, SAE, DINOv3Config, SAEConfig
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
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
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
    heads = E.Heads({"pixels": slice(0, 64)}, 10)
    E.train_heads(heads, lambda start: ((x[[i for i, _ in b]], y[[i for i, _ in b]]) for b in E.draws(len(x), 512, 2000, start)), 512, 2000)
    (train, _), (test, _) = E.score_heads(heads, [(x, y)])["pixels"], E.score_heads(heads, [(xt, yt)])["pixels"]
    assert abs(test[train.argmax()].item() - theirs) < 1


def test_knn_equals_sklearns_weighted_neighbours():
    (x, y), (xt, yt) = digits()
    ours = E.knn_accuracy(x, y, [(xt[:300], yt[:300]), (xt[300:], yt[300:])], {"all": slice(0, 64), "half": slice(0, 32)}, 10)
    for kind, columns in (("all", slice(0, 64)), ("half", slice(0, 32))):
        for k in (10, 20):
            theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x[:, columns], y)
            assert ours[kind][f"k{k}"] == pytest.approx(100 * theirs.score(xt[:, columns], yt), abs=0.12)    # one image: ties
    assert set(ours) == {"all", "half"}


@pytest.mark.parametrize("kind", ["full", "cached", "knn"])
def test_the_probe_finds_classes_that_differ_in_colour(photos, checkpoint, tmp_path, kind):
    got = run(checkpoint, "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", kind, "--probe-iterations", 60,
              "--out", tmp_path / "a.json", *FAST)
    assert got["images"] == 21 and set(got["probe"]) == {"cls+patch", "patch", "mu"}
    assert all(accuracy > 90 for accuracy in got["probe"].values()), got["probe"]


def test_cached_features_are_reused_only_while_weights_images_and_crop_agree(photos, checkpoint, tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(E.Semantic, "features", lambda self, x, f=E.Semantic.features: passes.append(len(x)) or f(self, x))
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
    features, passes = E.Semantic.features, []

    def stop_after_three(self, x):
        passes.append(len(x))
        if len(passes) == 4:
            raise KeyboardInterrupt
        return features(self, x)

    command = [checkpoint, "--data", photos, "--split", "parity", "--skip", "fid,lpips", "--probe", "knn", "--out", tmp_path / "a.json", *FAST]
    monkeypatch.setattr(E.Semantic, "features", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    monkeypatch.setattr(E.Semantic, "features", lambda self, x: passes.append(len(x)) or features(self, x))
    passes.clear()
    resumed = run(*command)["probe"]
    assert sum(passes) == 42 - 15
    monkeypatch.setattr(E.Semantic, "features", features)
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


# ------------------------------------------------------------------ bad input

def refusal(*args):
    """The one sentence with which the command ends."""
    done = subprocess.run([sys.executable, ROOT / "eval.py", *map(str, args)], capture_output=True, text=True)
    sentence = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and sentence.startswith("eval.py: ") and "Traceback" not in done.stderr, done.stderr
    return sentence
