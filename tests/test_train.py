"""The training loop: what the two stages move, what the ranks see, what a resume gives, what is refused."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
import train
from sae import SAE, DINOv3, DINOv3Config, SAEConfig
from sae_weights import load_safetensors, save_safetensors
from test_common import pack

ROOT = Path(__file__).parent.parent


def write_images(folder, n=24, size=48, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)).save(path)


def write_encoder(path, width=64, seed=0):
    torch.manual_seed(seed)
    save_safetensors(DINOv3(DINOv3Config(width, 2, 64, 128)).state_dict(), path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with 24 noise images and a tiny encoder, and the options of a run of four steps on them."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "images")
    write_encoder(root / "encoder.safetensors")
    return root


def command(world, out, stage=1, **change):
    opts = {"stage": stage, "data": world / "images", "encoder": world / "encoder.safetensors", "out": out,
            "size": 32, "batch": 4, "steps": 4, "workers": 0, "lpips": 0, "gan-start": 1,
            "lr": 1e-3, "min-lr": 1e-4, "warmup": 2, "ema": 0.9, "precision": "fp32", "log-every": 1}
    if stage == 1:
        opts |= {"z-dim": 8, "widths": "32 32 32", "blocks": 1}
    else:
        opts |= {"init": world / "stage1" / "last.pt"}
    opts |= {name.replace("_", "-"): value for name, value in change.items()}
    words = []
    for name, value in opts.items():
        if value is not False:
            words += [f"--{name}", *(str(value).split() if value is not True else [])]
    return words


def run(*args, **kwargs):
    train.main(command(*args, **kwargs))


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process takes over the handlers of signals."""
    before = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    yield
    for signum, handler in before.items():
        if signal.getsignal(signum) is not handler:
            signal.signal(signum, handler)


def torchrun(n, *args, **kwargs):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    words = [*launcher, ROOT / "train.py", *command(*args, **kwargs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("images/s", "GiB")} for line in lines]


@pytest.fixture(scope="module")
def stage1(world):
    run(world, world / "stage1")
    return train.load_checkpoint(world / "stage1" / "last.pt")


def equal(a, b):
    """Bitwise equality of nested dicts and lists of tensors; NaN stands for what is absent."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ------------------------------------------------------------------ stages

def test_stage_1_leaves_the_encoder_bit_identical_and_trains_the_rest(world, stage1):
    encoder = load_safetensors(world / "encoder.safetensors")
    for weights in stage1["model"], stage1["ema"]:
        assert all(torch.equal(weights["encoder." + n], t) for n, t in encoder.items())
    torch.manual_seed(0)
    start = SAE(SAEConfig.from_dict(stage1["config"]), DINOv3.from_pretrained(world / "encoder.safetensors"))
    for name, p in start.named_parameters():
        assert name.startswith("encoder.") or not torch.equal(stage1["model"][name], p), name


def test_stage_2_moves_all_of_the_encoder_and_none_of_the_teacher(world, stage1, tmp_path, monkeypatch):
    built = []
    build = train.build
    monkeypatch.setattr(train, "build", lambda args: built.append(build(args)) or built[-1])
    run(world, tmp_path / "s2", stage=2)
    teacher, file = built[0][1], load_safetensors(world / "encoder.safetensors")
    for name, p in teacher.state_dict(keep_vars=True).items():
        assert torch.equal(p, file[name]) and not p.requires_grad, name
    assert not any(m.training for m in teacher.modules())
    after = train.load_checkpoint(tmp_path / "s2" / "last.pt")
    assert not any(torch.equal(after["model"]["encoder." + n], t) for n, t in file.items())
    assert not any(t.requires_grad for t in after["ema"].values())      # no step has left a graph behind it
    first, *_, last = metrics(tmp_path / "s2")
    assert first["mse"] == 0 < last["mse/var"]
    assert {"kl", "l1", "gan", "disc", "psnr", "lr"} <= last.keys()


def test_frozen_weights_kept_in_bf16_change_no_bit_under_autocast(world, tmp_path):
    import torchvision
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "t.pth")
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    teacher = DINOv3.from_pretrained(world / "encoder.safetensors")
    lpips = common.LPIPS("squeeze", tmp_path / "t.pth")
    with torch.autocast("cpu", torch.bfloat16):
        before = teacher(x)[2], lpips(x, y)
        train.round_weights(teacher)
        train.round_weights(lpips.net)
        after = teacher(x)[2], lpips(x, y)
    assert teacher.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_more_reg_holds_the_features_closer_to_the_teacher(world, stage1, tmp_path):
    drift = []
    for reg in 0, 100, 1000:
        run(world, tmp_path / str(reg), stage=2, reg=reg, steps=8, encoder_lr=1e-4)
        drift.append(metrics(tmp_path / str(reg))[-1]["mse"])
    assert drift[0] > drift[1] > drift[2]


def assert_same_gradients(one, two):
    """The last step of two runs saw the same gradients, to the rounding of fp32 sums in another order.

    By Adam's running mean of them. Not the weights: where a gradient is all rounding error, so is the
    direction of Adam's step.
    """
    for part in "opt", "opt_disc":
        a, b = ([s["exp_avg"] for s in checkpoint[part]["state"].values()] for checkpoint in (one, two))
        size = torch.stack([m.norm() for m in a]).max()
        for i, (m, n) in enumerate(zip(a, b, strict=True)):
            assert (m - n).norm() <= 1e-3 * m.norm() + 1e-6 * size, (part, i)


def assert_same_step(one, two):
    """Two runs of equally many steps ended in the same step, and logged the same numbers."""
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    one, two = (train.load_checkpoint(out / "last.pt") for out in (one, two))
    assert_same_gradients(one, two)
    for buffer in "latent_mean", "latent_std":
        assert torch.allclose(one["ema"][buffer], two["ema"][buffer], rtol=1e-3, atol=1e-3)
    return one, two


@pytest.fixture(scope="module")
def references(world, stage1):
    """stage -> (its options, a run of one step on four images, another of two steps) on one rank."""
    # The rate of the first step is small, so that the second one starts from the same weights but for 1e-6 of
    # them. The seed is one at which no input of a LeakyReLU is so near to 0 that rounding decides its sign:
    # of 8 seeds, 2 have one and differ by 0.4 %.
    both = dict(warmup=10_000, gan_start=0, seed=1)
    runs = {}
    for stage, opts in (1, both | {"widths": "64 64 64"}), (2, both):
        out = world / f"reference{stage}"
        for steps in 1, 2:
            run(world, out / str(steps), stage=stage, steps=steps, save_every=1, **opts)
        runs[stage] = opts, out / "1", out / "2"
    return runs


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_equal_one_process_with_the_joint_batch(stage, world, references, tmp_path):
    opts, _, two_steps = references[stage]
    torchrun(2, world, tmp_path / "two", stage=stage, batch=2, steps=2, **opts)
    assert_same_step(two_steps, tmp_path / "two")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulated_passes_equal_the_big_batch(ranks, stage, world, references, tmp_path):
    opts, _, two_steps = references[stage]
    torchrun(ranks, world, tmp_path / "r", stage=stage, batch=2 // ranks, accumulate=2, steps=2, **opts)
    assert_same_step(two_steps, tmp_path / "r")


@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_training_equals_one_process_and_leaves_the_same_checkpoint(
        stage, world, references, tmp_path):
    opts, _, two_steps = references[stage]
    torchrun(2, world, tmp_path / "two", stage=stage, batch=2, shard=True, steps=2, **opts)
    one, two = assert_same_step(two_steps, tmp_path / "two")

    def shapes(tree):
        of = lambda leaf: (leaf.shape, leaf.dtype) if torch.is_tensor(leaf) else None
        return torch.utils._pytree.tree_map(of, tree)

    assert all(equal(shapes(one[k]), shapes(two[k])) for k in one if k != "args")
    for name, e in two["ema"].items():                  # e <- 0.9 e + 0.1 p, twice, from where p started
        assert torch.allclose(e, one["ema"][name], rtol=1e-3, atol=1e-6), name


def test_a_run_goes_on_with_other_ranks_passes_or_shards(world, references, tmp_path):
    opts, one_step, two_steps = references[2]
    others = [(2, dict(batch=2)),
              (2, dict(batch=1, accumulate=2, shard=True)),
              (1, dict(batch=1, accumulate=4))]
    for i, (ranks, change) in enumerate(others):
        shutil.copytree(one_step, tmp_path / str(i))
        torchrun(ranks, world, tmp_path / str(i), stage=2, resume=True, steps=2, **opts, **change)
        assert_same_step(two_steps, tmp_path / str(i))
    shutil.copytree(tmp_path / "1", tmp_path / "back")          # from shards to one rank
    run(world, tmp_path / "back", stage=2, resume=True, steps=3, **opts)
    run(world, tmp_path / "whole", stage=2, steps=3, **opts)
    assert_same_step(tmp_path / "whole", tmp_path / "back")


@pytest.mark.slow
def test_compiled_training_equals_the_eager_one(world, references, tmp_path):
    opts, _, two_steps = references[2]
    run(world, tmp_path / "compiled", stage=2, compile=True, steps=2, **opts)
    assert_same_step(two_steps, tmp_path / "compiled")


def test_an_interrupted_run_resumes_to_the_same_bits(world, stage1, tmp_path, monkeypatch):
    run(world, tmp_path / "whole", stage=2, steps=6, save_every=2)
    save = train.save

    def killed_at_step_4(run):
        if run.step == 4:
            raise KeyboardInterrupt
        save(run)

    monkeypatch.setattr(train, "save", killed_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "broken", stage=2, steps=6, save_every=2)
    monkeypatch.setattr(train, "save", save)
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "l1": 0.')          # as a kill would leave it
    run(world, tmp_path / "broken", stage=2, steps=6, save_every=2, resume=True)
    a, b = (train.load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "broken"))
    assert all(equal(a[k], b[k]) for k in a if k != "args")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")


def test_a_failing_write_leaves_the_last_checkpoint_whole(world, stage1, tmp_path, monkeypatch):
    shutil.copytree(world / "stage1", tmp_path / "r")

    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device.*new.pt"):
        run(world, tmp_path / "r", steps=5, resume=True)
    assert train.load_checkpoint(tmp_path / "r/last.pt")["step"] == 4
    assert not list((tmp_path / "r").glob("*.tmp"))


def drawn_statistics(out, images):
    """The model of a run, and mean and standard deviation [z_dim] of 2000 drawn latents of each crop."""
    model = SAE.from_pretrained(out / "last.pt")
    x = common.to_float(torch.stack([images[g][0] for g in range(24)]))
    z = torch.cat([model.encode(x).sample(seed) for seed in range(2000)])                # [48000,8,2,2]
    return model, z.mean((0, 2, 3)), z.transpose(0, 1).flatten(1).std(1)


def test_latent_statistics_are_those_of_drawn_latents(world, stage1):
    images = common.TrainingImages(common.ImageFolder(world / "images"), 32, 0)
    model, mean, std = drawn_statistics(world / "stage1", images)
    assert torch.allclose(model.latent_mean, mean, atol=2e-3)
    assert torch.allclose(model.latent_std, std, rtol=1e-2)


def test_latent_statistics_are_of_the_same_crops_however_a_step_is_divided(world, stage1, tmp_path):
    model, means = SAE.from_pretrained(world / "stage1" / "last.pt"), []

    def statistics(images, batch, accumulate):
        args = SimpleNamespace(batch=batch, accumulate=accumulate, workers=0)
        train.latent_statistics(SimpleNamespace(
            args=args, images=images, sae=model, ema=model, rank=0, world=1, device=torch.device("cpu"),
            images_per_step=batch * accumulate, autocast=nullcontext))
        return model.latent_mean.clone()

    images = common.TrainingImages(common.ImageFolder(world / "images"), 32, 0)
    torch.testing.assert_close(statistics(images, 10, 1), statistics(images, 2, 5), rtol=1e-5, atol=1e-6)
    for file in images.files:
        (tmp_path / Path(file).name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="more than 1 % of the 24 images cannot be used"):
        statistics(common.TrainingImages(common.ImageFolder(tmp_path), 32, 0), 2, 5)


def test_latent_statistics_are_those_of_the_last_step_or_absent(world, tmp_path, monkeypatch):
    images = common.TrainingImages(common.ImageFolder(world / "images"), 32, 0)

    def stopped_at(step, **change):
        agree = train.agree

        def signalled(run, loss):
            broken, _ = agree(run, loss)
            return broken, signal.SIGTERM if run.step + 1 == step else 0

        monkeypatch.setattr(train, "agree", signalled)
        with pytest.raises(SystemExit):
            run(world, tmp_path / "r", **change)
        monkeypatch.setattr(train, "agree", agree)
        return train.load_checkpoint(tmp_path / "r/last.pt")

    assert stopped_at(3, steps=400)["ema"]["latent_mean"].isnan().all()
    run(world, tmp_path / "r", steps=3, resume=True)                # nothing is left to do but the statistics
    model, mean, std = drawn_statistics(tmp_path / "r", images)
    assert torch.allclose(model.latent_mean, mean, atol=2e-3)
    assert torch.allclose(model.latent_std, std, rtol=1e-2)
    saved = stopped_at(6, steps=42, resume=True)                    # not those of step 3
    assert saved["step"] == 6 and saved["ema"]["latent_std"].isnan().all()


def test_switched_off_terms_are_neither_computed_nor_trained(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "generator_loss", None)
    monkeypatch.setattr(train, "discriminator_loss", None)
    monkeypatch.setattr(train, "LPIPS", None)
    run(world, tmp_path / "off", gan=0)
    assert metrics(tmp_path / "off")[-1].keys() == {"step", "l1", "psnr", "lr", "skips"}
    assert train.load_checkpoint(tmp_path / "off" / "last.pt")["opt_disc"]["state"] == {}


def test_the_discriminator_learns_before_the_generator_listens(world, tmp_path):
    run(world, tmp_path / "r", gan_start=3)
    played = [("disc" in m, "gan" in m) for m in metrics(tmp_path / "r")]
    assert played == [(True, False), (True, False), (True, False), (True, True)]


def test_checkpointing_and_workers_change_no_bit(world, stage1, tmp_path):
    run(world, tmp_path / "a", stage=2)
    run(world, tmp_path / "b", stage=2, checkpoint=True, workers=2)
    a, b = (train.load_checkpoint(tmp_path / n / "last.pt") for n in "ab")
    assert equal(a["model"], b["model"]) and metrics(tmp_path / "a") == metrics(tmp_path / "b")


# ------------------------------------------------------------------ what is seen

def test_a_gpu_without_memory_is_one_sentence(capfd):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 10.00 GiB")

    with pytest.raises(SystemExit) as status:
        common.command(main)
    said = status.value.code
    assert said.startswith(f"{Path(sys.argv[0]).name}: out of GPU memory: lower --batch (CUDA out of")
    assert "\n" not in said


# ------------------------------------------------------------------ losses

def test_lpips_and_its_gradient_equal_those_of_the_lpips_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    from torchvision import models
    for net, factory in ("vgg", models.vgg16), ("alex", models.alexnet), ("squeeze", models.squeezenet1_1):
        torch.manual_seed(0)
        trunk = factory(weights=None).state_dict()
        torch.save(trunk, tmp_path / "trunk.pth")
        oracle = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        names = oracle.net.state_dict()
        oracle.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]] for name in names})
        x, y = (torch.rand(2, 2, 3, 64, 64) * 2 - 1).requires_grad_()
        ours, theirs = common.LPIPS(net, tmp_path / "trunk.pth")(x, y), oracle(x, y).flatten()
        assert torch.allclose(ours, theirs, rtol=1e-5)
        weights = torch.tensor([1.0, -3.0])                  # another factor for each sample
        gradients = [torch.autograd.grad(loss, x, weights)[0] for loss in (ours, theirs)]
        assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3])
def test_lpips_has_a_finite_gradient_where_both_images_are_equal(value, tmp_path):
    import torchvision
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "t.pth")
    x = torch.full((1, 3, 64, 64), value, requires_grad=True)
    loss = common.LPIPS("squeeze", tmp_path / "t.pth")(x, x.detach()).sum()
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_the_logits_of_an_image_depend_on_no_other():
    disc = train.PatchGAN()
    x = torch.randn(4, 3, 64, 64)
    assert disc(x).shape == (4, 1, 6, 6) and torch.allclose(disc(x)[:1], disc(x[:1]), atol=1e-5)


def test_gan_losses_have_their_closed_forms():
    fake, real = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -3.0])
    log = lambda t: torch.log(torch.sigmoid(t))
    assert train.generator_loss(fake).item() == pytest.approx(-log(fake).mean().item())
    right = (-log(real).mean() - log(-fake).mean()).item()
    assert train.discriminator_loss(real, fake).item() == pytest.approx(right, rel=1e-6)


def test_learning_rate_warms_up_and_ends_at_the_minimum():
    args = train.options(["--stage", "1", "--steps", "100", "--warmup", "10", "--min-lr", "0.1"])
    rates = [train.learning_rate(t, 1.0, args) for t in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    # --encoder-lr 0 holds it, to the end
    assert {train.learning_rate(t, 0.0, args) for t in range(101)} == {0}


# ------------------------------------------------------------------ images

def test_every_epoch_shows_every_image_once_and_ranks_share_it(world):
    images = common.TrainingImages(common.ImageFolder(world / "images"), 32, seed=3)
    images.crop = lambda path, rng: torch.tensor(int(Path(path).stem))

    def seen(rank, ranks):
        args = SimpleNamespace(batch=8 // ranks, workers=0)
        return [x.tolist() for _, x in common.batches(images, range(12), args, rank, ranks)]

    alone = seen(0, 1)
    flat = [i for batch in alone for i in batch]
    assert all(sorted(flat[e:e + 24]) == list(range(24)) for e in range(0, 96, 24))
    assert flat[:24] != flat[24:48]
    assert [a + b for a, b in zip(seen(0, 2), seen(1, 2))] == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_on_tars_has_the_bits_of_a_run_on_class_folders(workers, world, stage1, tmp_path):
    tars = pack(world / "images", tmp_path / "tars")
    change = {"data": tars, "workers": workers, "warmup": 0, "min_lr": 1e-3}
    run(world, tmp_path / "r", **change, steps=3)
    run(world, tmp_path / "r", **change, steps=8, resume=True)
    run(world, tmp_path / "folders", **change | {"data": world / "images"}, steps=8)
    ours, oracle = (train.load_checkpoint(tmp_path / name / "last.pt") for name in ("r", "folders"))
    assert all(equal(ours[k], oracle[k]) for k in ours if k != "args")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1", "LA"])
def test_every_colour_mode_loads_as_rgb(mode, tmp_path):
    grey = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("L" if mode == "P" else "RGB").convert(mode)
    image.save(path)
    loaded = common.load_image(path)
    assert loaded.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(loaded)[..., 1].astype(int) - grey).max() <= (8 if mode == "CMYK" else 1)


def test_an_image_with_an_exif_rotation_loads_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6            # the camera was turned: display rotated by 90 degrees clockwise
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    assert common.load_image(tmp_path / "x.jpg").size == (40, 80)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_crops_of_a_reduced_decode_equal_those_of_the_full_one_resized_by_pillow(
        photo, orientation, tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    path, exif = tmp_path / "x.jpg", Image.Exif()
    exif[0x0112] = orientation
    # At a half, an odd side becomes a pixel that is half empty, and crops of it move by a part of a pixel:
    # sides that are multiples of 8 for the reduced ones.
    for sides, sizes in ((640, 416), (24, 48, 100, 300)), ((640, 427), (300,)), ((637, 421), (300,)):
        whole_image = Image.fromarray(datasets.load_sample_image(photo)).crop((0, 0, *sides))
        whole_image.save(path, quality=95, exif=exif)
        full = common.load_image(path)
        for size in sizes:
            images = common.TrainingImages(SimpleNamespace(files=[path]), size, 0)
            ours = images.crop(path, np.random.default_rng(0))
            rng = np.random.default_rng(0)
            small = full.resize(common.resized(*full.size, size), Image.BICUBIC)
            left, top = rng.integers(small.width - size + 1), rng.integers(small.height - size + 1)
            small = small.crop((left, top, left + size, top + size))
            if rng.random() < 0.5:
                small = ImageOps.mirror(small)
            oracle = torch.from_numpy(np.array(small))
            reduced = min(common.load_image(path, at_least=2 * size).size) < min(full.size)
            assert reduced == (size <= 100)
            assert common.psnr(ours[None], oracle[None]).item() >= (44 if reduced else 60)


def test_names_that_begin_with_a_dot_are_no_images_and_no_classes(tmp_path):
    write_images(tmp_path / "flat", n=4)
    images = sorted(str(p) for p in (tmp_path / "flat").rglob("*.png"))
    (tmp_path / "all").mkdir()
    for path in images:
        shutil.copy(path, tmp_path / "all")
    shutil.copytree(tmp_path / "flat", tmp_path / "all/.ipynb_checkpoints")
    shutil.copy(images[0], tmp_path / "all/._copy.png")
    found = [Path(file).name for file in common.ImageFolder(tmp_path / "all").files]
    assert found == sorted(Path(path).name for path in images)


def test_a_class_folder_can_be_a_link(tmp_path):
    write_images(tmp_path / "real", n=4)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/b").symlink_to(tmp_path / "real/b")
    (tmp_path / "linked/a").symlink_to(tmp_path / "real/a")
    assert common.ImageFolder(tmp_path / "linked").labels == [0, 0, 1, 1]


def test_one_bad_file_in_a_hundred_is_named_and_skipped_and_more_stop_the_run(tmp_path, world, capsys):
    write_images(tmp_path / "images", n=200, size=32)
    for bad in "000", "001":
        next(tmp_path.rglob(f"{bad}.png")).write_bytes(b"not an image")
    opts = dict(data=tmp_path / "images", batch=50, steps=4, gan=0)
    run(world, tmp_path / "good", **opts)
    out = capsys.readouterr()
    assert all(f"{bad}.png cannot be read" in out.out + out.err for bad in ("000", "001"))
    next(tmp_path.rglob("002.png")).write_bytes(b"")
    with pytest.raises(ValueError, match="more than 1 % of the 200 images"):
        run(world, tmp_path / "bad", **opts)


# ------------------------------------------------------------------ what is refused

REFUSED = [
    ({"data": "nowhere"}, "no image folder nowhere"),
    ({"data": "{tmp}/empty"}, "empty holds no images"),
    ({"encoder": "none.safetensors"}, "no encoder none.safetensors: run ./weights.sh"),
    ({"encoder": "{tmp}/other.safetensors"}, "other.safetensors holds no DINOv3"),
    ({"lpips": 1, "lpips_weights": "vgg.pth"}, "no file vgg.pth .*weights.sh"),
    ({"lpips": 1, "lpips_weights": "{tmp}/other.pth"}, "does not hold torchvision's vgg"),
    ({"data": "{tmp}/mixed"}, "mixed holds images .a.png. and the folder red"),
    ({"l1": -1}, "--l1 -1: give 0 or more"),
    ({"lr": math.nan}, "--lr nan: give 0 or more"),
    ({"seed": -1}, "--seed -1: give 0 or more"),
    ({"ema": 2}, "--ema 2: give 1 or less"),
    ({"steps": 0}, "--steps 0: give 1 or more"),
    ({"blocks": 0}, "--blocks 0: give 1 or more"),
    ({"widths": "32 0"}, "--widths 32 0: give 1 or more"),
    ({"l1": 0, "lpips": 0}, "leave nothing to learn from"),
    ({"size": 16, "gan": 1}, "--size 16 is too small for the discriminator"),
    ({"size": 40}, "--size 40 is not a multiple of f = 16"),
    ({"size": 128}, "too small for crops of 128"),
    ({"resume": True}, "no checkpoint .*last.pt"),
    ({"stage": 2, "init": "none.pt"}, "no stage-1 checkpoint none.pt.*--stage 1 first"),
    ({"stage": 2, "init": "{tmp}/second.pt"}, "second.pt is of stage 2: name a checkpoint of stage 1"),
    ({"stage": 2, "encoder": "{tmp}/seed1.safetensors"}, "trained on another encoder than .*seed1"),
    ({"stage": 2, "encoder": "{tmp}/wide.safetensors"}, "trained on another encoder than .*wide"),
    ({"stage": 2, "f": 32}, "has f 16, not 32"),
    ({"stage": 2, "z_dim": 16}, "has z_dim 8, not 16"),
    ({"shard": True}, "--shard splits the weights over the ranks, and there is one"),
    ({"accumulate": 0}, "--accumulate 0: give 1 or more"),
]


@pytest.mark.parametrize("change, words", REFUSED, ids=[w for _, w in REFUSED])
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(
        change, words, world, stage1, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed/red").mkdir(parents=True)
    (tmp_path / "mixed/a.png").touch()
    second = torch.load(world / "stage1/last.pt")
    second["args"]["stage"] = 2
    torch.save(second, tmp_path / "second.pt")
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    write_encoder(tmp_path / "seed1.safetensors", seed=1)
    write_encoder(tmp_path / "wide.safetensors", width=128)
    change = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words) as e:
        run(world, change.pop("out", tmp_path / "out"), **change)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out" / "last.pt").exists()


def test_an_output_folder_that_cannot_be_made_is_one_sentence(world):
    words = [sys.executable, ROOT / "train.py", *command(world, "/proc/none")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("train.py: /proc/none: No such file or directory")


def test_a_finished_run_is_not_overwritten(world, stage1):
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        run(world, world / "stage1")


def test_a_resume_with_another_config_says_what_differs(world, stage1, tmp_path, capsys):
    shutil.copytree(world / "stage1", tmp_path / "r")
    for change, words in [({"z_dim": 16}, r"another stage or architecture: z_dim 16 \(there 8\)$"),
                          ({"batch": 3}, "4 images a step, not 3 x 1 x 1: change")]:
        with pytest.raises(ValueError, match=words):
            run(world, tmp_path / "r", resume=True, **change)
    with pytest.raises(ValueError, match=r"stage 2 \(there 1\)"):
        run(world, tmp_path / "r", stage=2, resume=True)
    with pytest.raises(ValueError, match="is at step 4, past --steps 3: give 4 or more"):
        run(world, tmp_path / "r", resume=True, steps=3)
    run(world, tmp_path / "r", resume=True, steps=5, lr=1e-4)
    assert 0 < metrics(tmp_path / "r")[-1]["lr"] <= 1e-4
    said = capsys.readouterr().out.replace(f"out {tmp_path}/r (was {world}/stage1), ", "")
    assert "resuming at step 4, with steps 5 (was 4), lr 0.0001 (was 0.001)" in said


def test_a_resume_with_another_encoder_is_refused_in_both_stages(world, stage1, tmp_path):
    write_encoder(tmp_path / "other.safetensors", seed=1)
    shutil.copytree(world / "stage1", tmp_path / "one")
    with pytest.raises(ValueError, match="trained on another encoder than .*other.safetensors: name its own"):
        run(world, tmp_path / "one", resume=True, steps=6, encoder=tmp_path / "other.safetensors")
    assert train.load_checkpoint(tmp_path / "one/last.pt")["step"] == 4

    # Stage 2 with the other's own stage 1 fits together, but not with the teacher of the run to go on with.
    run(world, tmp_path / "other1", encoder=tmp_path / "other.safetensors")
    run(world, tmp_path / "two", stage=2, steps=2)
    other = {"encoder": tmp_path / "other.safetensors", "init": tmp_path / "other1/last.pt"}
    with pytest.raises(ValueError, match="trained on another encoder"):
        run(world, tmp_path / "two", stage=2, resume=True, steps=4, **other)


def test_what_the_options_leave_out_is_said(world, tmp_path, capsys):
    run(world, tmp_path / "r", steps=2, warmup=5000, gan_start=5000)
    said = capsys.readouterr().out
    assert "note: 2 steps end within the warm-up of 5000: --lr is never reached" in said
    assert "note: 2 steps end before --gan-start 5000: the generator never meets the discriminator" in said
    run(world, tmp_path / "s", steps=3, warmup=2, gan_start=1)
    assert "note:" not in capsys.readouterr().out


def test_the_command_line_prints_the_sentence_and_fails(world):
    words = ["--stage", "1", "--data", "nowhere", "--encoder", world / "encoder.safetensors"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said == "train.py: there is no image folder nowhere: name one with --data"


@pytest.mark.slow
@pytest.mark.parametrize("words", ["bench_train.py --setting quick --rounds 1 --steps 2 --peers fp32 bf16",
                                   "bench_data.py --rounds 1 --files 1"])
def test_the_benchmarks_run(words):
    name, *options = words.split()
    script = ROOT / "tests" / "bench" / name
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
