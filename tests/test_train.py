"""The training loop: what the two stages move, what the ranks see, what a resume gives, what is refused."""
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import sae
import train
from sae import SAE, DINOv3, DINOv3Config, SAEConfig

ROOT = Path(__file__).parent.parent


def write_images(folder, n=24, size=48, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)).save(path)


def write_encoder(path, width=64, seed=0):
    torch.manual_seed(seed)
    sae.save_safetensors(DINOv3(DINOv3Config(width, 2, 64, 128)).state_dict(), path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with 24 noise images and a tiny encoder, and the options of a run of four steps on them."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "images")
    write_encoder(root / "encoder.safetensors")
    return root


def command(world, out, stage=1, **change):
    opts = {"stage": stage, "data": world / "images", "encoder": world / "encoder.safetensors", "out": out, "size": 32, "batch": 4, "steps": 4,
            "workers": 0, "lpips": 0, "warmup": 2, "lr": 1e-3, "gan-start": 1, "log-every": 1, "precision": "fp32", "min-lr": 1e-4, "ema": 0.9}
    opts |= {"z-dim": 8, "widths": "32 32 32", "blocks": 1} if stage == 1 else {"init": world / "stage1" / "last.pt"}
    opts |= {k.replace("_", "-"): v for k, v in change.items()}
    return [word for k, v in opts.items() if v is not False for word in (f"--{k}", *(str(v).split() if v is not True else []))]


def run(*args, **kwargs):
    train.main(train.options(command(*args, **kwargs)), 0, 1, torch.distributed.HashStore(), note=lambda text: None)


def torchrun(n, *args, **kwargs):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", ROOT / "train.py", *command(*args, **kwargs)],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("images/s", "GiB")} for line in lines]


@pytest.fixture(scope="module")
def stage1(world):
    run(world, world / "stage1")
    return train.load_checkpoint(world / "stage1" / "last.pt")


def equal(a, b):
    """Bitwise equality of nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ------------------------------------------------------------------ stages

def test_stage_1_leaves_the_encoder_bit_identical_and_trains_the_rest(world, stage1):
    encoder = sae.load_safetensors(world / "encoder.safetensors")
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
    teacher, file = built[0][1], sae.load_safetensors(world / "encoder.safetensors")
    assert all(torch.equal(p, file[n]) and not p.requires_grad for n, p in teacher.state_dict(keep_vars=True).items())
    assert not any(m.training for m in teacher.modules())
    after = train.load_checkpoint(tmp_path / "s2" / "last.pt")["model"]
    assert not any(torch.equal(after["encoder." + n], t) for n, t in file.items())
    ema = train.load_checkpoint(tmp_path / "s2" / "last.pt")["ema"]
    assert not any(t.requires_grad for t in ema.values())       # no step has left a graph behind it
    logged = metrics(tmp_path / "s2")
    assert logged[0]["mse"] == 0 < logged[-1]["mse/var"] and {"kl", "l1", "gan", "disc", "psnr", "lr"} <= logged[-1].keys()


def test_frozen_weights_kept_in_bf16_change_no_bit_under_autocast(world, tmp_path):
    import torchvision
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "t.pth")
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    teacher, lpips = sae.DINOv3.from_pretrained(world / "encoder.safetensors"), train.LPIPS("squeeze", tmp_path / "t.pth")
    with torch.autocast("cpu", torch.bfloat16):
        before = teacher(x)[2], lpips(x, y)
        train.round_weights(teacher)
        train.round_weights(lpips.net)
        after = teacher(x)[2], lpips(x, y)
    assert teacher.blocks[0].qkv.weight.dtype == torch.bfloat16 and all(torch.equal(a, b) for a, b in zip(before, after))


def test_more_reg_holds_the_features_closer_to_the_teacher(world, stage1, tmp_path):
    drift = []
    for reg in 0, 100, 1000:
        run(world, tmp_path / str(reg), stage=2, reg=reg, steps=8, encoder_lr=1e-4)
        drift.append(metrics(tmp_path / str(reg))[-1]["mse"])
    assert drift[0] > drift[1] > drift[2]


def assert_same_gradients(one, two):
    """The last step of two runs saw the same gradients, by Adam's running mean of them, to the rounding of fp32 sums in another order.

    Not the weights: where a gradient is all rounding error, so is the direction of Adam's step.
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
    # The rate of the first step is small, so that the second one starts from the same weights but for 1e-6 of them. The seed is one
    # at which no input of a LeakyReLU is so near to 0 that rounding decides its sign: of 8 seeds, 2 have one and differ by 0.4 %.
    common = dict(warmup=10_000, gan_start=0, widths="64 64 64", seed=1)
    runs = {}
    for stage, opts in (1, common), (2, {**common, "widths": False}):
        for steps in 1, 2:
            run(world, world / f"reference{stage}" / str(steps), stage=stage, steps=steps, save_every=1, **opts)
        runs[stage] = opts, world / f"reference{stage}" / "1", world / f"reference{stage}" / "2"
    return runs


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_equal_one_process_with_the_joint_batch(stage, world, references, tmp_path):
    opts, _, two_steps = references[stage]
    torchrun(2, world, tmp_path / "two", stage=stage, batch=2, steps=2, **opts)
    assert_same_step(two_steps, tmp_path / "two")


def test_two_ranks_agree_on_the_adaptive_weight(world, references, tmp_path):
    opts, _, _ = references[1]
    run(world, tmp_path / "one", adaptive=True, steps=2, **opts)
    torchrun(2, world, tmp_path / "two", batch=2, adaptive=True, steps=2, **opts)
    assert_same_step(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulated_passes_equal_the_big_batch(ranks, stage, world, references, tmp_path):
    opts, _, two_steps = references[stage]
    torchrun(ranks, world, tmp_path / "r", stage=stage, batch=2 // ranks, accumulate=2, steps=2, **opts)
    assert_same_step(two_steps, tmp_path / "r")


@pytest.mark.parametrize("stage", [1, 2])
def test_sharded_training_equals_one_process_and_leaves_the_same_checkpoint(stage, world, references, tmp_path):
    opts, _, two_steps = references[stage]
    torchrun(2, world, tmp_path / "two", stage=stage, batch=2, shard=True, steps=2, **opts)
    one, two = assert_same_step(two_steps, tmp_path / "two")
    shapes = lambda tree: torch.utils._pytree.tree_map(lambda t: (t.shape, t.dtype) if torch.is_tensor(t) else None, tree)
    assert all(equal(shapes(one[k]), shapes(two[k])) for k in one if k != "args")
    for name, e in two["ema"].items():                          # e <- 0.9 e + 0.1 p, twice, from where p started
        assert torch.allclose(e, one["ema"][name], rtol=1e-3, atol=1e-6), name


def test_a_run_goes_on_with_other_ranks_passes_or_shards(world, references, tmp_path):
    opts, one_step, two_steps = references[2]
    for i, (ranks, change) in enumerate([(2, dict(batch=2)), (2, dict(batch=2, shard=True)), (1, dict(batch=1, accumulate=4))]):
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

    def killed_at_step_4(out, state, keep):
        if state["step"] == 4:
            raise KeyboardInterrupt
        save(out, state, keep)
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


def test_a_failing_write_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    train.save(tmp_path, {"version": 1, "step": 1}, 2)

    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="last.pt cannot be written: No space left on device"):
        train.save(tmp_path, {"version": 1, "step": 2}, 2)
    assert train.load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_latent_statistics_are_those_of_drawn_latents(world, stage1, tmp_path):
    model = SAE.from_pretrained(world / "stage1" / "last.pt")
    images = train.TrainingImages(train.ImageFolder(world / "images"), 32, 0)
    x = train.to_float(torch.stack([images[g][0] for g in range(24)]))
    z = torch.cat([model.encode(x).sample(seed) for seed in range(2000)])                # [48000,8,2,2]
    assert torch.allclose(model.latent_mean, z.mean((0, 2, 3)), atol=2e-3)
    assert torch.allclose(model.latent_std, z.transpose(0, 1).flatten(1).std(1), rtol=1e-2)


def test_latent_statistics_are_of_the_same_crops_however_a_step_is_divided(world, stage1, tmp_path):
    model = SAE.from_pretrained(world / "stage1" / "last.pt")
    images, means = train.TrainingImages(train.ImageFolder(world / "images"), 32, 0), []
    for batch, accumulate in (10, 1), (2, 5):
        args = SimpleNamespace(batch=batch, accumulate=accumulate, workers=0)
        train.latent_statistics(model, images, args, 0, 1, nullcontext, lambda text: None)
        means.append(model.latent_mean.clone())
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    for file in images.files:
        shutil.copy(file, tmp_path)
        (tmp_path / Path(file).name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="more than 1 % of the 24 images cannot be used"):
        train.latent_statistics(model, train.TrainingImages(train.ImageFolder(tmp_path), 32, 0), args, 0, 1, nullcontext, lambda text: None)


def test_switched_off_terms_are_neither_computed_nor_trained(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "generator_loss", None)
    monkeypatch.setattr(train, "discriminator_loss", None)
    monkeypatch.setattr(train, "LPIPS", None)
    run(world, tmp_path / "off", gan=0)
    assert metrics(tmp_path / "off")[-1].keys() == {"step", "l1", "psnr", "lr", "skips"}
    assert train.load_checkpoint(tmp_path / "off" / "last.pt")["opt_disc"]["state"] == {}


def test_the_discriminator_learns_before_the_generator_listens(world, tmp_path):
    run(world, tmp_path / "r", disc_start=1, gan_start=3)
    assert [("disc" in m, "gan" in m) for m in metrics(tmp_path / "r")] == [(False, False), (True, False), (True, False), (True, True)]


def test_checkpointing_and_workers_change_no_bit(world, stage1, tmp_path):
    run(world, tmp_path / "a", stage=2)
    run(world, tmp_path / "b", stage=2, checkpoint=True, workers=2)
    a, b = (train.load_checkpoint(tmp_path / n / "last.pt") for n in "ab")
    assert equal(a["model"], b["model"]) and metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_dry_run_counts_parameters_and_writes_nothing(world, tmp_path, capsys):
    run(world, tmp_path / "dry", dry_run=True)
    out = capsys.readouterr().out
    model = SAE(SAEConfig(DINOv3Config(64, 2, 64, 128), z_dim=8, widths=(32, 32, 32), blocks=1))
    assert f"{sum(p.numel() for p in model.decoder.parameters()) / 1e6:.1f} M" in out and "GiB of states" in out
    assert not (tmp_path / "dry").exists()


# ------------------------------------------------------------------ what is seen

def test_plot_draws_every_column_of_every_run(world, stage1, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [tmp_path / name for name in "ab"]
    for run_folder in runs:
        shutil.copytree(world / "stage1", run_folder)
    with open(runs[1] / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "l1": null, "lpips": 0.5}\n{"step": 6, "l1')       # a skipped step, and the line that is being written
    train.launch(["--plot", *map(str, runs)])
    assert f"wrote {tmp_path}/curves.png" in capsys.readouterr().out
    with Image.open(tmp_path / "curves.png") as im:
        im.load()
        assert im.width >= 1000 and len(np.unique(np.asarray(im.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    with pytest.raises(SystemExit):
        train.launch(["--plot", str(tmp_path)])
    assert f"there is no {tmp_path}/metrics.jsonl" in capsys.readouterr().err
    (runs[1] / "metrics.jsonl").write_text('{"step": 1, "l')
    with pytest.raises(SystemExit):
        train.launch(["--plot", *map(str, runs)])
    assert f"{runs[1]}/metrics.jsonl has no line yet" in capsys.readouterr().err


def test_tensorboard_shows_the_metrics_of_a_resumed_run_once(world, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(world, tmp_path / "r", steps=3, save_every=2, tensorboard=True)
    (tmp_path / "r" / "last.pt").unlink()                       # back to step 2
    run(world, tmp_path / "r", steps=4, save_every=2, tensorboard=True, resume=True)
    board = accumulator.EventAccumulator(str(tmp_path / "r"))
    board.Reload()
    logged = metrics(tmp_path / "r")
    for name in logged[-1].keys() - {"step"}:
        points = [(m["step"], m[name]) for m in logged if name in m]
        assert [e.step for e in board.Scalars(name)] == [step for step, _ in points], name
        assert [e.value for e in board.Scalars(name)] == pytest.approx([value for _, value in points], rel=1e-6)


def test_a_gpu_without_memory_is_one_sentence(monkeypatch, capsys):
    def main(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 10.00 GiB")

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as status:
        train.launch(["--stage", "1"])
    said = capsys.readouterr().err
    assert status.value.code == 1 and said.startswith("train.py: rank 0 is out of GPU memory: ") and said.count("\n") == 1


# ------------------------------------------------------------------ losses

def test_lpips_and_its_gradient_equal_those_of_the_lpips_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    import torchvision
    for net, factory in ("vgg", torchvision.models.vgg16), ("alex", torchvision.models.alexnet), ("squeeze", torchvision.models.squeezenet1_1):
        torch.manual_seed(0)
        trunk = factory(weights=None)
        torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
        oracle = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        oracle.net.load_state_dict({n: trunk.state_dict()["features." + n.split(".", 1)[1]] for n in oracle.net.state_dict()})
        x, y = (torch.rand(2, 2, 3, 64, 64) * 2 - 1).requires_grad_()
        ours, theirs = train.LPIPS(net, tmp_path / "trunk.pth")(x, y), oracle(x, y).flatten()
        assert torch.allclose(ours, theirs, rtol=1e-5)
        weights = torch.tensor([1.0, -3.0])                  # another factor for each sample
        gradients = [torch.autograd.grad(loss, x, weights)[0] for loss in (ours, theirs)]
        assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_the_distance_of_unit_features_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    x, y, head = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: train.UnitDistance.apply(x, y, head), x.requires_grad_())


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3])
def test_lpips_has_a_finite_gradient_where_both_images_are_equal(value, tmp_path):
    import torchvision
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "t.pth")
    x = torch.full((1, 3, 64, 64), value, requires_grad=True)
    loss = train.LPIPS("squeeze", tmp_path / "t.pth")(x, x.detach()).sum()
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_the_logits_of_an_image_depend_on_no_other():
    disc = train.PatchGAN()
    x = torch.randn(4, 3, 64, 64)
    assert disc(x).shape == (4, 1, 6, 6) and torch.allclose(disc(x)[:1], disc(x[:1]), atol=1e-5)


def test_gan_losses_have_their_closed_forms():
    fake, real = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -3.0])
    log = lambda t: torch.log(torch.sigmoid(t))
    assert train.generator_loss(fake, "nonsaturating").item() == pytest.approx(-log(fake).mean().item())
    assert train.discriminator_loss(real, fake, "nonsaturating").item() == pytest.approx((-log(real).mean() - log(-fake).mean()).item(), rel=1e-6)
    assert train.generator_loss(fake, "hinge").item() == -1 and train.discriminator_loss(real, fake, "hinge").item() == 2 + 2


def test_adaptive_weight_is_the_ratio_of_the_last_layers_gradients():
    torch.manual_seed(0)
    last, h = torch.nn.Conv2d(4, 3, 3), torch.randn(2, 4, 8, 8)
    disc = torch.nn.Conv2d(3, 1, 3)
    xhat = last(h)
    rec, gan = xhat.abs().mean(), disc(xhat).sigmoid().mean()
    grads = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (rec, gan)]
    assert train.adaptive_weight(rec, gan, xhat, last.weight).item() == pytest.approx((grads[0] / (grads[1] + 1e-4)).item(), rel=1e-5)


def test_learning_rate_warms_up_and_ends_at_the_minimum():
    args = train.options(["--stage", "1", "--steps", "100", "--warmup", "10", "--min-lr", "0.1"])
    rates = [train.learning_rate(t, 1.0, args) for t in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert {train.learning_rate(t, 0.0, args) for t in range(101)} == {0}                # --encoder-lr 0 holds it, to the end


# ------------------------------------------------------------------ images

def test_every_epoch_shows_every_image_once_and_ranks_share_it(world):
    images = train.TrainingImages(train.ImageFolder(world / "images"), 32, seed=3)
    images.crop = lambda path, rng: torch.tensor(int(Path(path).stem))
    seen = {(n, rank): [x.tolist() for x, _ in train.batches(images, range(12), 8 // n, rank, n, 0)] for n in (1, 2) for rank in range(n)}
    flat = [i for batch in seen[1, 0] for i in batch]
    assert all(sorted(flat[e:e + 24]) == list(range(24)) for e in range(0, 96, 24)) and flat[:24] != flat[24:48]
    assert [a + b for a, b in zip(seen[2, 0], seen[2, 1])] == seen[1, 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1", "LA"])
def test_every_colour_mode_loads_as_rgb(mode, tmp_path):
    grey = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    if mode == "I;16":
        image, path = Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "x.png"
    else:
        image, path = Image.fromarray(grey).convert("L" if mode == "P" else "RGB").convert(mode), tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    loaded = train.load_image(path)
    assert loaded.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(loaded)[..., 1].astype(int) - grey).max() <= (8 if mode == "CMYK" else 1)


def test_an_image_with_an_exif_rotation_loads_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6            # the camera was turned: display rotated by 90 degrees clockwise
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    assert train.load_image(tmp_path / "x.jpg").size == (40, 80)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_crops_of_a_reduced_decode_equal_those_of_the_full_one_resized_by_pillow(photo, orientation, tmp_path):
    datasets, path, exif = pytest.importorskip("sklearn.datasets"), tmp_path / "x.jpg", Image.Exif()
    exif[0x0112] = orientation
    for sides in (640, 416), (640, 427), (637, 421):
        Image.fromarray(datasets.load_sample_image(photo)).crop((0, 0, *sides)).save(path, quality=95, exif=exif)
        full = train.load_image(path)
        for size in 24, 48, 100, 300:
            whole = np.random.default_rng(0)
            ours = train.TrainingImages(SimpleNamespace(files=[path]), size, 0).crop(path, np.random.default_rng(0))
            small = train.resize_short_side(full, size)
            left, top = whole.integers(small.width - size + 1), whole.integers(small.height - size + 1)
            small = small.crop((left, top, left + size, top + size))
            oracle = torch.from_numpy(np.array(ImageOps.mirror(small) if whole.random() < 0.5 else small))
            reduced, turned = min(train.load_reduced(path, 2 * size)[0].size) < min(full.size), orientation > 1
            assert reduced == (size <= 100 and not (turned and sides[0] % 8 + sides[1] % 8))
            assert train.psnr(ours[None], oracle[None]).item() >= (44 if reduced else 60)


def test_split_takes_every_other_file_of_each_class(world):
    every, even, odd = (train.ImageFolder(world / "images", s) for s in ("all", "even", "odd"))
    assert sorted(even.files + odd.files) == every.files and not set(even.files) & set(odd.files)
    assert [Path(f).stem for f in even.files] == [f"{i:03d}" for i in [*range(0, 24, 4), *range(1, 24, 4)]] and even.labels == [0] * 6 + [1] * 6


def test_names_that_begin_with_a_dot_are_no_images_and_no_classes(tmp_path):
    write_images(tmp_path / "flat", n=4)
    images = sorted(str(p) for p in (tmp_path / "flat").rglob("*.png"))
    (tmp_path / "all").mkdir()
    for path in images:
        shutil.copy(path, tmp_path / "all")
    shutil.copytree(tmp_path / "flat", tmp_path / "all/.ipynb_checkpoints")
    shutil.copy(images[0], tmp_path / "all/._copy.png")
    assert [Path(f).name for f in train.ImageFolder(tmp_path / "all").files] == sorted(Path(p).name for p in images)


def test_a_class_folder_can_be_a_link(tmp_path):
    write_images(tmp_path / "real", n=4)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/b").symlink_to(tmp_path / "real/b")
    (tmp_path / "linked/a").symlink_to(tmp_path / "real/a")
    assert train.ImageFolder(tmp_path / "linked").labels == [0, 0, 1, 1]


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
    ({"data": "{tmp}/mixed"}, "mixed holds images and the folder red"),
    ({"l1": -1}, "--l1 -1: give 0 or more"),
    ({"lr": math.nan}, "--lr nan: give 0 or more"),
    ({"disc_lr": -1}, "--disc-lr -1: give 0 or more"),
    ({"seed": -1}, "--seed -1: give 0 or more"),
    ({"ema": 2}, "--ema 2: give 1 or less"),
    ({"steps": 0}, "--steps 0: give 1 or more"),
    ({"blocks": 0}, "--blocks 0: give 1 or more"),
    ({"widths": "32 0"}, "--widths 32 0: give 1 or more"),
    ({"l1": 0, "lpips": 0}, "leave nothing to learn from"),
    ({"size": 16, "gan": 1}, "--size 16 is too small for the discriminator"),
    ({"size": 40}, "--size 40 is not a multiple of f = 16"),
    ({"size": 128}, "too small for crops of 128"),
    ({"out": "/proc/none"}, "/proc/none cannot be written"),
    ({"resume": True}, "no checkpoint .*last.pt"),
    ({"stage": 2, "init": "none.pt"}, "no stage-1 checkpoint none.pt.*--stage 1 first"),
    ({"stage": 2, "init": "{tmp}/second.pt"}, "second.pt is of stage 2: stage 2 starts from stage 1"),
    ({"stage": 2, "encoder": "{tmp}/seed1.safetensors"}, "trained on another encoder than .*seed1"),
    ({"stage": 2, "encoder": "{tmp}/wide.safetensors"}, "trained on another encoder than .*wide"),
    ({"stage": 2, "f": 32}, "has f 16, not 32"),
    ({"stage": 2, "z_dim": 16}, "has z_dim 8, not 16"),
    ({"shard": True}, "--shard splits the weights over the ranks, and there is one"),
    ({"adaptive": True, "accumulate": 2}, "--adaptive needs the whole gradient"),
    ({"accumulate": 0}, "--accumulate 0: give 1 or more"),
]


@pytest.mark.parametrize("change, words", REFUSED, ids=[w for _, w in REFUSED])
def test_bad_input_is_refused_in_one_sentence_before_anything_is_written(change, words, world, stage1, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed/red").mkdir(parents=True)
    (tmp_path / "mixed/a.png").touch()
    second = torch.load(world / "stage1/last.pt")
    second["args"]["stage"] = 2
    torch.save(second, tmp_path / "second.pt")
    sae.save_safetensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    write_encoder(tmp_path / "seed1.safetensors", seed=1)
    write_encoder(tmp_path / "wide.safetensors", width=128)
    change = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words) as e:
        run(world, change.pop("out", tmp_path / "out"), **change)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out" / "last.pt").exists()


def test_more_ranks_than_images_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="24 images, fewer than the 25 ranks"):
        train.main(train.options(command(world, tmp_path / "out")), 0, 25, torch.distributed.HashStore(), note=print)


def test_a_finished_run_is_not_overwritten(world, stage1):
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        run(world, world / "stage1")


def test_a_resume_with_another_config_says_what_differs(world, stage1, tmp_path, capsys):
    shutil.copytree(world / "stage1", tmp_path / "r")
    for change, words in [({"z_dim": 16}, r"another stage or architecture: z_dim 16 \(there 8\)$"), ({"batch": 3}, "4 images a step, not 3 x 1 x 1: change")]:
        with pytest.raises(ValueError, match=words):
            run(world, tmp_path / "r", resume=True, **change)
    with pytest.raises(ValueError, match=r"stage 2 \(there 1\)"):
        run(world, tmp_path / "r", stage=2, resume=True)
    with pytest.raises(ValueError, match="is at step 4, past --steps 3: give 4 or more"):
        run(world, tmp_path / "r", resume=True, steps=3)
    (tmp_path / "r/last-best.pt").touch()                       # somebody's own
    run(world, tmp_path / "r", resume=True, steps=5, lr=1e-4)
    assert 0 < metrics(tmp_path / "r")[-1]["lr"] <= 1e-4
    assert "resuming at step 4, with steps 5 (was 4), lr 0.0001 (was 0.001)" in capsys.readouterr().out.replace(f"out {tmp_path}/r (was {world}/stage1), ", "")


def test_the_command_line_prints_the_sentence_and_fails(world):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--stage", "1", "--data", "nowhere", "--encoder", world / "encoder.safetensors"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "train.py: there is no image folder nowhere: name one with --data"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["bench_train.py", "--setting", "quick", "--rounds", "1", "--steps", "2"], ["bench_data.py", "--rounds", "1", "--files", "1"]])
def test_the_benchmarks_run(words):
    done = subprocess.run([sys.executable, ROOT / "tests" / words[0], *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
