"""Two-stage training of S-AE.

    torchrun --nproc_per_node 8 train.py --stage 1              # decoder and bottleneck, on a frozen encoder
    torchrun --nproc_per_node 8 train.py --stage 2 --reg 100    # everything, held to the frozen teacher
    python train.py --stage 1 --data photos --encoder small.safetensors --size 128      # one device, or a CPU

An image x has patch tokens f, a posterior q(z|x) = N(mu, exp(logvar)) and, of a drawn z ~ q, a reconstruction
xhat = decoder(z). The autoencoder (the generator) and the discriminator D minimise

    L_G = 100 L1(xhat, x) + 100 LPIPS(xhat, x)
          + 1e-6 KL(q(z|x) || N(0, I)) + reg MSE(f, f_teacher)                in stage 2
          + softplus(-D(xhat))                                                from step --gan-start
    L_D = softplus(-D(x)) + softplus(D(xhat))

The order of the images, their crops and the noise of z are functions of (seed, number of the sample in the
run) alone: a resumed run, and a run on another number of ranks, sees what an uninterrupted one sees.

Order: the loop, what stands before and after it, networks, options, checkpoints, ranks. Images and LPIPS are
in common.py. "Reading:" marks a choice of ours where the paper is silent.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile
import zlib
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from common import (LPIPS, Help, ImageFolder, TrainingImages, batches, check_launcher, command, psnr,
                    refuse_output_inside, save_grid, to_float, to_uint8)
from sae import SAE, Block, DINOv3, ResBlock, SAEConfig, feature_mse
from sae_weights import CHECKPOINT_VERSION, load_checkpoint, require, write

# ------------------------------------------------------------------ the loop

MAX_SKIPS = 20          # steps in a row with a NaN or infinite loss or gradient, after which a run ends


def generator_loss(fake):
    """softplus(-D(xhat)), the non-saturating loss; mean over all logits."""
    return F.softplus(-fake).mean()


def discriminator_loss(real, fake):
    """softplus(-D(x)) + softplus(D(xhat)), each a mean over all logits."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def train(run):
    """The training loop, from run.step to --steps. Returns the signal that ended it early, or 0."""
    args, disc = run.args, run.disc
    # Reading: every term is a mean, over pixels, logits, tokens or images, but for the KL: a sum over the
    # latent, a mean over the batch. Averaged over the latent, too, a weight of 1e-6 would do nothing.
    weight = {"l1": args.l1, "lpips": args.lpips, "gan": args.gan, "kl": args.kl, "mse": args.reg}
    noise_per_image = run.sae.config.z_dim * (args.size // run.sae.config.f) ** 2
    passes = range(run.step * args.accumulate, args.steps * args.accumulate)
    crops = batches(run.images, passes, args, run.rank, run.world)
    bar = tqdm(total=args.steps, initial=run.step, disable=run.rank > 0, desc=f"stage {args.stage}")
    skipped_in_a_row, logged_step, logged_time = 0, run.step, time.time()

    while run.step < args.steps:
        for group in run.opt.param_groups + run.opt_disc.param_groups:
            group["lr"] = learning_rate(run.step, group["peak"], args)
        last = run.step + 1 == args.steps
        log = last or (run.step + 1) % args.log_every == 0
        run.opt.zero_grad()
        run.opt_disc.zero_grad()
        loss_sum, logged = 0, []

        for i in range(args.accumulate):
            number, x = next(crops)
            x = to_float(x.to(run.device, non_blocking=True))                        # [B,3,H,W]
            # DDP exchanges gradients in the last pass; FSDP in each, since it would keep whole ones.
            for model in run.model, run.disc_model:
                model.require_backward_grad_sync = i == args.accumulate - 1

            # generator
            with run.autocast():
                # Sample n's noise begins at element n * noise_per_image of --seed's stream: no two share any.
                xhat, kl, patches = run.model(x, args.seed, number * noise_per_image)    # patches [B,N,D]
                term = {"l1": F.l1_loss(xhat.float(), x)}
                if args.lpips:
                    term["lpips"] = run.lpips(xhat, x).mean()
                if args.stage == 2:
                    term["kl"] = kl.mean()
                if args.stage == 2 and (args.reg or log):       # with --reg 0 it is only measured
                    with torch.no_grad():
                        _, _, target = run.teacher(x)                                # patch tokens [B,N,D]
                    # Reading: of the patch tokens after the final norm. CLS is not held: see eval.py.
                    term["mse"] = feature_mse(patches, target)
                if args.gan and run.step >= args.gan_start:
                    disc.requires_grad_(False)                  # the gradient goes through D, not into it
                    term["gan"] = generator_loss(disc(xhat).float())
            # A term of weight 0 is left out: it costs no backward pass, and its NaN does no harm.
            loss = sum(weight[name] * t for name, t in term.items() if weight[name]) / args.accumulate
            loss.backward()
            loss_sum += loss.detach()

            # discriminator, on the fake images that the generator has just made
            if args.gan:
                disc.requires_grad_(True)
                with run.autocast():
                    logits = run.disc_model(torch.cat([x, xhat.detach()]))               # [2 B,1,h,w]
                    term["disc"] = discriminator_loss(*logits.float().chunk(2))
                (term["disc"] / args.accumulate).backward()

            if log:
                term["psnr"] = psnr(to_uint8(x), to_uint8(xhat)).mean()
                if args.stage == 2:
                    term["mse/var"] = term["mse"] / target.float().var()
                logged.append(torch.stack([t.detach().float() for t in term.values()]))

        # A NaN or a signal on one rank makes all of them skip the step, or stop after it.
        broken, signum = agree(run, loss_sum)
        if not broken:
            run.opt.step()
            if args.gan:
                run.opt_disc.step()
            with torch.no_grad():
                # EMA: e <- decay e + (1 - decay) p
                torch._foreach_lerp_(trained(run.ema), trained(run.sae), 1 - args.ema)
        run.skips += broken
        skipped_in_a_row = skipped_in_a_row + 1 if broken else 0

        run.step += 1
        bar.update()
        if log:
            values = dict(zip(term, torch.stack(logged).mean(0)))       # each a mean over the passes
            images = (run.step - logged_step) * run.images_per_step
            bar.set_postfix(report(run, values, images / (time.time() - logged_time)))
            logged_step, logged_time = run.step, time.time()
        if run.rank == 0 and (last or run.step % args.image_every == 0):
            save_grid(run.out / f"grid-{run.step:07d}.png", x[:8], xhat[:8].detach())
        if skipped_in_a_row == MAX_SKIPS:
            again = f"go on from step {run.saved_step} with --resume" if run.saved_step else "start again"
            raise ValueError(f"the loss or a gradient was NaN or infinite in the last {MAX_SKIPS} steps, up "
                             f"to step {run.step}: {again} and a lower --lr, or --precision fp32")
        if signum:
            break
        if run.step % args.save_every == 0 and run.step < args.steps:
            save(run)
    bar.close()
    return signum if run.step < args.steps else 0


def learning_rate(step, peak, args):
    """Linear warm-up to `peak`, then a cosine that would reach --min-lr at step number --steps."""
    if step < args.warmup:
        return peak * (step + 1) / args.warmup
    t = (step - args.warmup) / max(1, args.steps - args.warmup)
    low = min(args.min_lr, peak)        # a peak of 0 (--encoder-lr 0) stays 0
    return low + 0.5 * (1 + math.cos(math.pi * t)) * (peak - low)


def trained(sae):
    """The parameters that the optimizer moves; those of the EMA in the same order."""
    return [p for p in sae.parameters() if p.requires_grad]


def agree(run, loss):
    """(1 if the loss or a gradient is not finite, the signal that has come or 0), on any rank."""
    gradients = [p.grad for p in (*trained(run.sae), *run.disc.parameters()) if p.grad is not None]
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]       # this rank's part
    finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients) + loss)
    flags = torch.tensor([0.0, signals[0][0] if signals else 0], device=run.device)     # see on_signal
    flags[0] = ~finite
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [int(flag) for flag in flags.tolist()]


def report(run, values, speed):
    """Write {name: scalar tensor}, as means over the ranks, to metrics.jsonl. Returns what the bar shows."""
    total = torch.stack(list(values.values()))
    if run.world > 1:
        dist.all_reduce(total)
    line = {name: v if math.isfinite(v) else None for name, v in zip(values, (total / run.world).tolist())}
    line |= {"lr": run.opt.param_groups[0]["lr"], "skips": run.skips, "images/s": speed}
    if run.device.type == "cuda":
        line["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
    if run.rank == 0:
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": run.step, **line}) + "\n")
    return {name: f"{v:.3g}" for name, v in line.items() if v is not None and name != "lr"}


# ------------------------------------------------------------------ before and after the loop

def main(argv=None):
    args = options(argv)
    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2:
        signal.signal(signum, on_signal)
    run = setup(args)
    signum = train(run)
    finish(run)
    if run.world > 1:
        dist.destroy_process_group()
    if signum:
        if run.rank == 0:
            print(f"stopped by {signal.Signals(signum).name} after step {run.step}, which is in "
                  f"{run.out}/last.pt: go on with --resume")
        sys.exit(128 + signum)          # so that no script takes it for a finished run
    if run.rank == 0:
        print(f"wrote {run.out}/last.pt, {run.out}/metrics.jsonl and {run.out}/grid-*.png")


def setup(args):
    """The `run`: all that the loop works on, at the step from which it begins or goes on.

    What can be refused is refused here, before the first step: a ValueError of one sentence. `place` adds
    ema, opt, opt_disc, and model and disc_model: sae and disc as DDP or FSDP wrap them, the same weights.
    """
    check_launcher()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if rank > 0:
        warnings.simplefilter("ignore")                         # rank 0 says it
    folder = ImageFolder(args.data)
    refuse_output_inside(args.out, folder)
    require(world > 1 or not args.shard,
            "--shard splits the weights over the ranks, and there is one: drop it")

    sae, teacher, disc, crc = build(args)
    run = SimpleNamespace(
        args=args, rank=rank, world=world, device=device, out=Path(args.out),
        images=TrainingImages(folder, args.size, args.seed),
        images_per_step=args.batch * world * args.accumulate,
        sae=sae, teacher=teacher, disc=disc, encoder_crc=crc,
        lpips=LPIPS(args.lpips_net, args.lpips_weights) if args.lpips else None,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16",
                                        cache_enabled=not args.shard),  # it would keep what FSDP frees
        step=0, saved_step=0, skips=0)
    if rank == 0:
        describe(run)
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = lock(run.out)
    saved = find_checkpoint(run)

    if world > 1:
        if cuda:
            torch.cuda.set_device(device)
        # torchrun keeps its store over its restarts: without a prefix, ranks find the addresses of dead ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
                                 next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=30))
        steps = [None] * world
        dist.all_gather_object(steps, saved["step"] if saved else 0)
        require(len(set(steps)) == 1,
                f"the ranks see checkpoints of different steps in {run.out}, {min(steps)} and {max(steps)}: "
                "it must be one folder that all nodes share")
    place(run)
    if saved:
        restore(run, saved)
    if rank == 0:
        start_metrics(run)
    return run


def describe(run):
    """Print what will be trained, and what among the options is easily overlooked."""
    args = run.args
    print(f"stage {args.stage} on {run.device.type}: {len(run.images)} images, {run.world} x {args.batch} x "
          f"{args.accumulate} a step; " + ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    for name, network in {"encoder": run.sae.encoder, "decoder": run.sae.decoder, "D": run.disc}.items():
        print(f"  {name:14}{sum(p.numel() for p in network.parameters()) / 1e6:8.1f} M parameters")
    if args.warmup >= args.steps:
        print(f"  note: {args.steps} steps end within the warm-up of {args.warmup}: --lr is never reached")
    if args.gan and args.gan_start >= args.steps:
        print(f"  note: {args.steps} steps end before --gan-start {args.gan_start}: the generator never "
              "meets the discriminator")


def place(run):
    """Everything on its device, wrapped for the exchange of gradients; the EMA and the optimizers."""
    args, sae, disc = run.args, run.sae, run.disc
    teacher, lpips = [run.teacher] if run.teacher else [], [run.lpips] if run.lpips else []
    if args.precision == "bf16" and not args.shard:             # FSDP wants one dtype
        round_weights(*teacher, *(network.net for network in lpips))
    # What the convolution libraries want: no transposes. FSDP lays its shards out itself.
    for module in disc, *lpips, *([] if args.shard else [sae.decoder, sae.down]):
        module.to(memory_format=torch.channels_last)
    for module in sae, disc, *teacher, *lpips:
        module.to(run.device)
    # The EMA is a copy that shares a frozen encoder; not under FSDP, whose shards belong to one network each.
    frozen = args.stage == 1 and not args.shard
    run.ema = copy.deepcopy(sae, {id(sae.encoder): sae.encoder} if frozen else {})
    if args.compile:                                            # in place: the names of weights stay
        blocks = [block for encoder in (sae.encoder, *teacher) for block in encoder.blocks]
        for module in *blocks, sae.decoder, *lpips:
            module.compile()
    run.model, run.disc_model = sae, disc
    if args.shard:
        for module in sae, run.ema, *teacher:
            shard(module)
    if run.world > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        run.disc_model = DDP(disc, device_ids=ids, gradient_as_bucket_view=True)
        if not args.shard:
            run.model = DDP(sae, device_ids=ids, gradient_as_bucket_view=True)

    # Reading: the paper names no betas.
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}    # the loop sets lr, from "peak"
    encoder = set(sae.encoder.parameters())
    groups = [{"params": [p for p in trained(sae) if p not in encoder], "peak": args.lr}]
    if args.stage == 2:
        peak = args.lr if args.encoder_lr is None else args.encoder_lr
        groups.append({"params": list(sae.encoder.parameters()), "peak": peak})
    run.opt = torch.optim.AdamW(groups, **adamw)
    run.opt_disc = torch.optim.AdamW([{"params": list(disc.parameters()), "peak": args.lr}], **adamw)


def finish(run):
    """The last checkpoint. That of a finished run holds the latent's statistics, for diffusion models."""
    if run.step > run.saved_step:
        save(run)                       # first, since the statistics take minutes
    if run.step == run.args.steps and not run.ema.latent_mean.isfinite().all():
        latent_statistics(run)
        save(run)


@torch.no_grad()
def latent_statistics(run, n=10_000):
    """Fill in latent_mean and latent_std [z_dim] of the EMA's z over the first n training crops, in fp64.

    In whole steps of the run: the crops are the same on any number of ranks, if a step has the same images.
    """
    args, sae = run.args, run.ema
    moments = torch.zeros(2, sae.config.z_dim, dtype=torch.float64, device=run.device)
    passes = max(1, min(n, len(run.images)) // run.images_per_step) * args.accumulate
    crops = batches(run.images, range(passes), args, run.rank, run.world)
    for _, x in tqdm(crops, desc="latent statistics", total=passes, disable=run.rank > 0):
        with run.autocast():
            q = sae.encode(to_float(x.to(run.device)))
        mu, var = q.mu.double(), q.logvar.double().clamp(-30, 20).exp()
        # E[z^2] = E[mu^2 + var]: z is a draw, not the mean
        moments += torch.stack([mu.mean((0, 2, 3)), (mu * mu + var).mean((0, 2, 3))])
    if run.world > 1:
        dist.all_reduce(moments)
    mean, square = moments / (passes * run.world)
    sae.latent_mean.copy_(mean)
    sae.latent_std.copy_((square - mean * mean).clamp_min(0).sqrt())


# ------------------------------------------------------------------ networks

class PatchGAN(nn.Sequential):
    """pix2pix's 70x70 discriminator: x [B,3,H,W] -> logits [B,1,about H/8,W/8].

    Reading: GroupNorm where pix2pix has BatchNorm. The logits of an image then depend on no other image, so
    real and fake go through in one pass, and ranks need no common statistics.
    """

    def __init__(self, width=64):
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)
            layers += [conv, nn.GroupNorm(32, 2 * c), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for m in self:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)


def build(args):
    """(SAE, teacher or None, discriminator, checksum of --encoder) on the CPU. ValueError for a misfit."""
    require(Path(args.encoder).exists(),
            f"there is no encoder {args.encoder}: run ./weights.sh, or name a DINOv3 file with --encoder")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = args.precision == "bf16"  # on by default, and fp32 means fp32
    pretrained = DINOv3.from_pretrained(args.encoder).requires_grad_(False)
    crc = 0
    for t in pretrained.state_dict().values():
        crc = zlib.crc32(t.contiguous().flatten().view(torch.uint8).numpy(), crc)
    asked = {"f": args.f, "z_dim": args.z_dim, "widths": tuple(args.widths or ()), "blocks": args.blocks}
    asked = {name: value for name, value in asked.items() if value}
    disc = PatchGAN()
    if args.stage == 1:
        config = SAEConfig(**{"encoder": pretrained.cfg, "z_dim": pretrained.cfg.width, **asked})
        config.attention = args.size // config.f <= 32          # Reading: above, it costs more than it gives
        sae, teacher = SAE(config, pretrained), None
    else:
        start = load_stage1(args, pretrained.cfg, crc, asked)
        sae, teacher = SAE(SAEConfig.from_dict(start["config"]), copy.deepcopy(pretrained)), pretrained
        sae.load_state_dict(start["ema"])
        forget_statistics(sae)                                  # they were those of stage 1
        disc.load_state_dict(start["disc"])                     # it has learnt beside the generator
    require(args.size % sae.config.f == 0, f"--size {args.size} is not a multiple of f = {sae.config.f}")
    sae.encoder.requires_grad_(args.stage == 2)
    sae.encoder.checkpointing = args.checkpoint
    return sae, teacher, disc, crc


def load_stage1(args, encoder, crc, asked):
    """The checkpoint --init, if it is of stage 1, of this encoder and of the architecture `asked` for."""
    path = args.init
    require(Path(path).is_file(),
            f"there is no stage-1 checkpoint {path}, and without stage 1 the encoder collapses: run train.py "
            "--stage 1 first, or name one with --init (--resume reads it, too)")
    start = load_checkpoint(path)
    stage, config = start["args"]["stage"], start["config"]
    require(stage == 1, f"{path} is of stage {stage}: name a checkpoint of stage 1 with --init")
    require(config["encoder"] == asdict(encoder) and start["encoder_crc"] == crc,
            f"{path} was trained on another encoder than {args.encoder}: name its own with --encoder")
    require(start["args"]["gan"] or args.gan_start or not args.gan,
            f"{path} was trained with --gan 0 and has no discriminator that has learnt: give --gan-start, or "
            "--gan 0")
    for name, value in asked.items():
        require(config[name] == value,
                f"{path} has {name} {config[name]}, not {value}: drop the option, or train stage 1 with it")
    return start


def forget_statistics(sae):
    """Mark the latent's statistics as absent: they belong to the weights at the end of a run."""
    sae.latent_mean.fill_(math.nan)
    sae.latent_std.fill_(math.nan)


def round_weights(*frozen):
    """Keep in bf16 what autocast would round to bf16 in every step; the results are the same bits."""
    for network in frozen:
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(torch.bfloat16)


# ------------------------------------------------------------------ options

def options(argv=None):
    p = argparse.ArgumentParser(description="The defaults are the paper's.", formatter_class=Help)
    add = p.add_argument
    add("--stage", type=int, choices=(1, 2), required=True, help="1: on a frozen encoder; 2: all is trained")
    add("--reg", type=float, default=100.0, help="weight of the teacher MSE (stage 2): more probe, less PSNR")

    add("--data", default="data/imagenet/train", help="folder of images: a folder a class, flat, or tars")
    add("--encoder", default="weights/dinov3-hplus.safetensors", help="DINOv3: start and teacher")
    add("--init", default="runs/stage1/last.pt", help="stage 2 starts from this checkpoint's EMA")
    add("--out", help="output folder; default runs/stage1 or runs/stage2-reg<reg>")
    add("--resume", action="store_true", help="go on from the checkpoint in the output folder")

    # the model; stage 2 takes all of it from --init
    add("--f", type=int, choices=(16, 32, 64), help="pixels per latent; default 16")
    add("--z-dim", type=int, help="latent channels; default the encoder's width")
    add("--widths", type=int, nargs="+", help="of the decoder, coarse to fine; default 1280 1024 512 256 128")
    add("--blocks", type=int, help="residual blocks per resolution of the decoder; default 2")

    add("--size", type=int, default=256, help="training crop")
    add("--batch", type=int, default=16, help="images per rank and pass")
    add("--accumulate", type=int, default=1, help="passes per step: more images in the same memory")
    add("--steps", type=int, default=500_000, help="of the optimizer, in all")
    add("--lr", type=float, default=5e-6, help="AdamW's rate after the warm-up")
    add("--encoder-lr", type=float, help="the encoder's (stage 2); default --lr")
    add("--min-lr", type=float, default=1e-7, help="end of the cosine")
    add("--warmup", type=int, default=5000, help="steps of linear warm-up")
    add("--ema", type=float, default=0.9995, help="decay of the averaged weights")
    add("--precision", choices=("bf16", "fp32"), help="bf16: autocast; default bf16 on a GPU, fp32 on a CPU")
    add("--checkpoint", action="store_true", help="recompute encoder blocks in backward: less memory")
    add("--compile", action="store_true", help="torch.compile encoder blocks, decoder and LPIPS")
    add("--shard", action="store_true", help="FSDP2, not DDP: for encoders too large for one GPU")

    add("--l1", type=float, default=100.0, help="weight of L1(xhat, x)")
    add("--lpips", type=float, default=100.0, help="weight of LPIPS(xhat, x)")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="its trunk")
    add("--lpips-weights", default="weights/vgg16-397923af.pth", help="torchvision's file of the trunk")
    add("--gan", type=float, default=1.0, help="weight of the GAN term; 0 trains without a discriminator")
    add("--gan-start", type=int, help="step from which the generator learns from the discriminator; default "
        "5000, in stage 2, which takes over stage 1's discriminator, 0")
    add("--kl", type=float, default=1e-6, help="weight of the KL, in nats per image (stage 2)")

    add("--seed", type=int, default=0, help="of weights, data order, crops and noise")
    add("--workers", type=int, default=8, help="data processes per rank")
    add("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl")
    add("--image-every", type=int, default=1000, help="steps between grids of images")
    add("--save-every", type=int, default=5000, help="steps between checkpoints")
    args = p.parse_args(argv)
    if args.precision is None:          # many CPUs multiply bf16 ten times slower than fp32
        args.precision = "bf16" if torch.cuda.is_available() else "fp32"
    if args.gan_start is None:          # Reading: the paper does not say
        args.gan_start = 5000 if args.stage == 1 else 0
    args.out = args.out or ("runs/stage1" if args.stage == 1 else f"runs/stage2-reg{args.reg:g}")
    check_options(args)
    return args


def check_options(args):
    """ValueError, one sentence, for values that cannot be meant."""
    counts = "z_dim widths blocks size batch accumulate steps log_every image_every save_every".split()
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], (int, float)):
            least = int(name in counts)                         # `>=` is false for NaN, too
            given = " ".join(f"{v:g}" for v in values)
            require(min(values) >= least, f"--{name.replace('_', '-')} {given}: give {least} or more")
    require(args.ema <= 1, f"--ema {args.ema:g}: give 1 or less")
    require(args.seed < 2 ** 63, f"--seed {args.seed}: give less than 2^63")
    require(args.size >= 32 or not args.gan,
            f"--size {args.size} is too small for the discriminator: give 32 or more, or --gan 0")
    require(args.l1 or args.lpips or args.gan and not args.gan_start,
            "--l1 0 and --lpips 0 leave nothing to learn from in the first step: give one of them a weight")


# ------------------------------------------------------------------ checkpoints

FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)     # shards joined, on rank 0's CPU


def save(run):
    """Write out/last.pt, whole or not at all; the one of an earlier step becomes last-1.pt."""
    model, opt = dcp.get_state_dict(run.sae, run.opt, options=FULL)
    ema = dcp.get_model_state_dict(run.ema, options=FULL)
    rotate = run.step > run.saved_step
    run.saved_step = run.step
    if run.rank > 0:
        return
    state = {"version": CHECKPOINT_VERSION, "config": asdict(run.sae.config), "args": vars(run.args),
             "images_per_step": run.images_per_step, "encoder_crc": run.encoder_crc,
             "step": run.step, "skips": run.skips, "model": model, "ema": ema, "opt": opt,
             "disc": run.disc.state_dict(), "opt_disc": run.opt_disc.state_dict()}
    write(run.out / "new.pt", lambda file: torch.save(state, file))
    if rotate and (run.out / "last.pt").exists():
        os.replace(run.out / "last.pt", run.out / "last-1.pt")
    os.replace(run.out / "new.pt", run.out / "last.pt")


def find_checkpoint(run):
    """The newest checkpoint in the output folder, with --resume or restarted by torchrun; None for a new run.

    Raises ValueError when it is damaged, or of another kind of run.
    """
    args, out = run.args, run.out
    # A kill between the two renames of `save` leaves no last.pt.
    found = [out / name for name in ("last.pt", "last-1.pt") if (out / name).exists()]
    # torchrun restarts what was refused, too: a run is its own only where the same options have begun it.
    begun = json.loads((out / "config.json").read_bytes()) if (out / "config.json").exists() else {}
    own = vars(args).items() <= begun.items()
    restarted = own and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    require(args.resume or restarted or not found,
            f"{out} holds a run already: continue it with --resume, or name another folder with --out")
    require(found or not args.resume,
            f"there is no checkpoint {out}/last.pt to go on from: start without --resume")
    if not found:
        return None

    try:
        saved = load_checkpoint(found[0])
        with zipfile.ZipFile(found[0]) as records:              # torch.load maps the tensors, without a check
            require(records.testzip() is None, f"{found[0]} is damaged")
    except ValueError as error:
        before = f"; to go on from the one before, rename {found[1]} to last.pt" if len(found) == 2 else ""
        raise ValueError(f"{error}{before}") from error
    theirs = {**saved["config"], "stage": saved["args"]["stage"]}
    asked = {**asdict(run.sae.config), "stage": args.stage}
    differ = [f"{k} {v} (there {theirs[k]})" for k, v in asked.items() if v != theirs[k]]
    require(not differ, f"the checkpoint in {out} is of another stage or architecture: {', '.join(differ)}")
    require(saved["encoder_crc"] == run.encoder_crc,
            f"the checkpoint in {out} was trained on another encoder than {args.encoder}: name its own with "
            f"--encoder (it was {saved['args']['encoder']})")
    require(saved["images_per_step"] == run.images_per_step,
            f"the checkpoint in {out} was trained on {saved['images_per_step']} images a step, not "
            f"{args.batch} x {run.world} x {args.accumulate}: change --batch or --accumulate")
    require(saved["step"] <= args.steps,
            f"the checkpoint in {out} is at step {saved['step']}, past --steps {args.steps}: give "
            f"{saved['step']} or more")
    if run.rank == 0:
        changed = [f"{k} {v} (was {saved['args'].get(k)})" for k, v in vars(args).items()
                   if k != "resume" and v != saved["args"].get(k)]
        print(f"resuming at step {saved['step']}" + (", with " + ", ".join(changed) if changed else ""))
    return saved


def restore(run, saved):
    """Bring networks, moments and the step to those of a checkpoint."""
    peaks = [group["peak"] for group in run.opt.param_groups + run.opt_disc.param_groups]
    dcp.set_state_dict(run.sae, run.opt, options=FULL,
                       model_state_dict=saved["model"], optim_state_dict=saved["opt"])
    for p, moments in run.opt.state.items():
        # Fused AdamW takes moments to lie in memory as their parameter does, channels_last included.
        moments.update({k: torch.empty_like(p).copy_(m) for k, m in moments.items() if m.dim()})
    dcp.set_model_state_dict(run.ema, saved["ema"], options=FULL)
    run.disc.load_state_dict(saved["disc"])
    # Not by set_state_dict, which gives an optimizer without state (--gan 0) one, by taking a step.
    run.opt_disc.load_state_dict(saved["opt_disc"])
    for group, peak in zip(run.opt.param_groups + run.opt_disc.param_groups, peaks):
        group["peak"] = peak                                    # not the checkpoint's: what is asked for now
    run.step, run.saved_step, run.skips = saved["step"], saved["step"], saved["skips"]
    if run.step < run.args.steps:
        forget_statistics(run.sae)
        forget_statistics(run.ema)


def start_metrics(run):
    """config.json, and metrics.jsonl without the lines after the checkpoint: those steps are done again."""
    config = json.dumps({**vars(run.args), "model": asdict(run.sae.config)}, indent=1)
    write(run.out / "config.json", lambda file: file.write(config.encode()))
    metrics = run.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= run.step]
    write(metrics, lambda file: file.writelines(f"{line}\n".encode() for line in lines))


# ------------------------------------------------------------------ ranks and processes

signals = []                                                    # (signal, when it came), see `on_signal`


def on_signal(signum, frame):
    """The first signal ends the run after the step at hand, with a checkpoint; a later one, at once."""
    # Not one within a second: `timeout` sends its own twice, to the process and to its group.
    if signals and time.monotonic() > signals[0][1] + 1:
        os._exit(128 + signum)
    signals.append((signum, time.monotonic()))


def lock(out):
    """An open file that keeps other processes from training into `out`, as long as this process lives."""
    import fcntl                        # not on Windows
    file = open(out / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not flock, which data workers would inherit
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another process is training into {out}: wait for it, or name another folder "
                         "with --out") from error
    except OSError as error:                                    # some network file systems have no locks
        print(f"{out} cannot be locked ({error.strerror}): see to it that no other process writes there")
    return file


def shard(model):
    """FSDP2: weights, gradients and moments are split over the ranks; a block is gathered while it works."""
    for m in model.modules():
        if isinstance(m, (Block, ResBlock)):
            fully_shard(m)
    fully_shard(model)
    if isinstance(model, SAE):
        register_fsdp_forward_method(model, "encode")           # beside forward, which has the hooks already


if __name__ == "__main__":
    command(main)
