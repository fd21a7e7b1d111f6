"""Two-stage training of S-AE, in one straight-line loop.

    torchrun --nproc_per_node 8 train.py --stage 1              # decoder and bottleneck, on the frozen encoder
    torchrun --nproc_per_node 8 train.py --stage 2 --reg 100    # everything, held to the frozen teacher
    python train.py --stage 1 --data photos --encoder small.safetensors --size 128 ...     # one device, or a CPU

    L_G = 100 L1(xhat, x) + 100 LPIPS(xhat, x) + GAN(xhat)  [+ 1e-6 KL(q(z|x) || N(0,I)) + reg MSE(f_student, f_teacher) in stage 2]
    L_D = mean softplus(-D(x)) + mean softplus(D(xhat))

Data order, crops and noise are functions of (seed, global sample index) alone, where the index counts
step x global batch + position. So a resumed run, and one on another number of ranks, sees what an uninterrupted one sees.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sae import CHECKPOINT_VERSION, SAE, DINOv3, SAEConfig, feature_mse, load_checkpoint, load_tensors

# ------------------------------------------------------------------ images

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ImageFolder:
    """The image files under `root`: one folder a class, or all in one. Sorted; `files` [n], `labels` [n], `classes`.

    split "even" or "odd" keeps every other file of each class, by its position: a train/test split of a folder that has none.
    """

    def __init__(self, root, split="all"):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"there is no image folder {root}: name one with --data")
        folders = sorted(d for d in root.iterdir() if d.is_dir()) or [root]
        self.classes, self.files, self.labels = [d.name for d in folders], [], []
        for label, folder in enumerate(folders):
            found = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
            found = found[split == "odd"::1 if split == "all" else 2]
            self.files += found
            self.labels += [label] * len(found)
        if not self.files:
            raise ValueError(f"{root} holds no images ({', '.join(SUFFIXES)}): name another folder with --data")

    def __len__(self):
        return len(self.files)


def load_image(path):
    """The image at `path` as PIL RGB, upright (EXIF), 16-bit scaled to 8, the first frame of an animation. ValueError if unreadable."""
    try:
        with Image.open(path) as im:
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith("I"):                                 # 16 bits: Pillow's convert would clip at 255
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            return im.convert("RGB")
    except Exception as e:      # Pillow's decoders raise a dozen kinds of error on damaged files
        raise ValueError(f"{path} cannot be read as an image: {e or type(e).__name__}") from e


def center_crop(im, size):
    """ADM's centre crop: halve with BOX while the short side is at least 2 size, BICUBIC to `size`, crop. PIL -> PIL."""
    while min(im.size) >= 2 * size:
        im = im.resize((im.width // 2, im.height // 2), Image.BOX)
    im = resize_short_side(im, size)
    left, top = (im.width - size) // 2, (im.height - size) // 2
    return im.crop((left, top, left + size, top + size))


def resize_short_side(im, size):
    scale = size / min(im.size)
    return im.resize((max(size, round(im.width * scale)), max(size, round(im.height * scale))), Image.BICUBIC)


def to_float(x):
    """uint8 [B,H,W,3] -> [B,3,H,W] in [-1,1], channels_last."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """[-1,1] -> uint8, round(255 (x + 1) / 2), the same shape."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(x, y):
    """10 log10(255^2 / mean (x - y)^2) of each image, in dB: uint8 [B,3,H,W] twice -> [B]; Inf for equal images."""
    return 10 * torch.log10(255 ** 2 / (x.float() - y.float()).square().flatten(1).mean(1))


def save_grid(path, *rows):
    """Rows of images [n,3,H,W] in [-1,1] -> one PNG."""
    grid = torch.cat([torch.cat(list(to_uint8(row)), 2) for row in rows], 1)             # [3,rows H,n W]
    Image.fromarray(grid.permute(1, 2, 0).cpu().numpy()).save(path)


class TrainingImages(Dataset):
    """Item g, the global sample index -> (uint8 [size,size,3], sentences on files that were skipped on the way).

    Epoch g // n has its own permutation; the crop and the flip are drawn from (seed, g).
    """

    def __init__(self, folder, size, seed):
        self.files, self.size, self.seed = folder.files, size, seed
        self.epoch, self.order = None, None

    def __getitem__(self, g):
        n = len(self.files)
        epoch, position = divmod(g, n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(n)
        skipped = []
        for _ in range(n // 100 + 2):       # so many bad files in a row are more than 1 % of all
            try:
                return self.crop(self.files[self.order[position]], np.random.default_rng((self.seed, epoch, position))), skipped
            except ValueError as e:
                skipped.append(str(e))
                position = (position + 1) % n
        raise ValueError(too_many_bad(skipped, n))

    def crop(self, path, rng):
        im = load_image(path)
        if min(im.size) * 2 < self.size:    # enlarged more than twice it would teach blur
            raise ValueError(f"{path} is {im.width}x{im.height}, too small for crops of {self.size}: remove it or lower --size")
        im = resize_short_side(im, self.size)
        left, top = rng.integers(im.width - self.size + 1), rng.integers(im.height - self.size + 1)
        im = im.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(ImageOps.mirror(im) if rng.random() < 0.5 else im))


def too_many_bad(skipped, n):
    return f"more than 1 % of the {n} images cannot be used, the last because {sorted(skipped)[-1]}"


def batches(images, steps, batch, rank, world, workers):
    """Yields (x uint8 [batch,size,size,3], skipped) for each step of `steps`: this rank's part of the global batch."""
    def indices():
        for step in steps:
            first = (step * world + rank) * batch
            yield range(first, first + batch)

    def collate(items):
        return torch.stack([x for x, _ in items]), [s for _, skipped in items for s in skipped]

    return iter(DataLoader(images, batch_sampler=indices(), collate_fn=collate, num_workers=workers, pin_memory=torch.cuda.is_available(),
                           prefetch_factor=4 if workers else None))


# ------------------------------------------------------------------ losses

class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018): x, y [B,3,H,W] in [-1,1] -> [B]. The gradient goes to x alone.

    The heads come with the lpips package; `path` is torchvision's file of the trunk (net vgg, alex or squeeze), never downloaded here.
    """

    def __init__(self, net, path):
        super().__init__()
        import lpips                         # imports torchvision, which takes seconds: only where LPIPS is used
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path} with the LPIPS trunk {net}: run ./weights.sh --only vgg16, name one with "
                             "--lpips-weights, or switch the term off with --lpips 0")
        with warnings.catch_warnings():      # torchvision deprecates the argument that lpips passes
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        tensors = load_tensors(path)
        # lpips cuts torchvision's `features` into slices but keeps their numbers: net.slice2.5.weight is features.5.weight
        trunk = {name: "features." + name.split(".", 1)[1] for name in model.net.state_dict()}
        wrong = [theirs for name, theirs in trunk.items() if theirs not in tensors or tensors[theirs].shape != model.net.state_dict()[name].shape]
        if wrong:
            raise ValueError(f"{path} does not hold torchvision's {net} for LPIPS: {', '.join(wrong)} missing or of another shape")
        model.net.load_state_dict({name: tensors[theirs] for name, theirs in trunk.items()})
        self.scaling, self.net, self.heads = model.scaling_layer, model.net, nn.ModuleList(h.model[-1] for h in model.lins)
        self.requires_grad_(False).eval()

    def features(self, x):
        """Unit vectors [B,C,h,w] of each layer. The root's argument stays above 0: its slope there is infinite, and 0 times it NaN."""
        return [f / (f.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10) for f in (f.float() for f in self.net(self.scaling(x)))]

    def forward(self, x, y):
        with torch.no_grad():
            fy = self.features(y)
        # A head is a 1x1 convolution to one channel; as a product it stays in fp32 under autocast.
        return sum(((a - b).square() * head.weight[0]).sum(1).mean((1, 2)) for head, a, b in zip(self.heads, self.features(x), fy))

    def train(self, mode=True):
        return super().train(False)          # frozen stays in eval


class PatchGAN(nn.Sequential):
    """pix2pix's 70x70 discriminator: x [B,3,H,W] -> logits [B,1,about H/8,W/8].

    GroupNorm where pix2pix has BatchNorm: the logits of an image then depend on no other image, so real and fake
    go through in one pass, and ranks need no common statistics.
    """

    def __init__(self, width=64):
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for cin, cout, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [nn.Conv2d(cin, cout, 4, stride, 1, bias=False), nn.GroupNorm(32, cout), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for m in self:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)


def generator_loss(fake, kind):
    """-D(xhat) seen through softplus (non-saturating) or as it is (hinge); mean over all patches."""
    return F.softplus(-fake).mean() if kind == "nonsaturating" else -fake.mean()


def discriminator_loss(real, fake, kind):
    """softplus(-D(x)) + softplus(D(xhat)), or relu(1 - D(x)) + relu(1 + D(xhat)); means over all patches."""
    if kind == "nonsaturating":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def adaptive_weight(reconstruction, gan, xhat, last):
    """VQGAN's weight |d rec / d last| / |d gan / d last|, `last` the weight of the decoder's last convolution.

    The gradients at xhat suffice: from there to `last` is one convolution. They are averaged over the ranks, as DDP's are.
    """
    grads = []
    for loss in (reconstruction, gan):
        at_xhat, = torch.autograd.grad(loss, xhat, retain_graph=True)
        at_last, = torch.autograd.grad(xhat, last, at_xhat, retain_graph=True)
        grads.append(at_last.float())
    both = torch.stack(grads)
    if dist.is_initialized():
        dist.all_reduce(both)
        both /= dist.get_world_size()
    return (both[0].norm() / (both[1].norm() + 1e-4)).clamp(0, 1e4)


# ------------------------------------------------------------------ options

def options(argv=None):
    p = argparse.ArgumentParser(description="Two-stage training of S-AE; the defaults are the paper's.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--stage", type=int, choices=(1, 2), required=True)
    p.add_argument("--reg", type=float, default=100.0, help="weight of the teacher MSE (stage 2): more probe accuracy, less PSNR")
    # files
    p.add_argument("--data", default="data/imagenet/train", help="folder of images, one folder a class or flat")
    p.add_argument("--split", choices=("all", "even", "odd"), default="all", help="train on every other file of each class")
    p.add_argument("--encoder", default="weights/dinov3-hplus.safetensors", help="DINOv3 weights: the encoder's start and the teacher")
    p.add_argument("--init", default="runs/stage1/last.pt", help="stage 2 starts from the EMA of this stage-1 checkpoint")
    p.add_argument("--out", default=None, help="output folder; default runs/stage1 or runs/stage2-reg<reg>")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    # model; stage 2 takes all of it from --init
    p.add_argument("--f", type=int, choices=(16, 32, 64), default=None, help="pixels per latent; default 16")
    p.add_argument("--z-dim", type=int, default=None, help="latent channels; default the encoder's width")
    p.add_argument("--widths", type=int, nargs="+", default=None, help="of the decoder, coarse to fine; default 1280 1024 512 256 128")
    p.add_argument("--blocks", type=int, default=None, help="residual blocks per resolution of the decoder; default 2")
    # optimisation
    p.add_argument("--size", type=int, default=256, help="training crop")
    p.add_argument("--batch", type=int, default=16, help="images per rank")
    p.add_argument("--steps", type=int, default=500_000)
    p.add_argument("--lr", type=float, default=5e-6)
    p.add_argument("--encoder-lr", type=float, default=None, help="default: --lr")
    p.add_argument("--disc-lr", type=float, default=None, help="default: --lr")
    p.add_argument("--min-lr", type=float, default=1e-7, help="end of the cosine")
    p.add_argument("--warmup", type=int, default=5000, help="steps of linear warm-up")
    p.add_argument("--ema", type=float, default=0.9995)
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast over fp32 weights")
    p.add_argument("--checkpoint", action="store_true", help="recompute the encoder's blocks in the backward pass: less memory")
    # losses
    p.add_argument("--l1", type=float, default=100.0)
    p.add_argument("--lpips", type=float, default=100.0)
    p.add_argument("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg")
    p.add_argument("--lpips-weights", default="weights/vgg16-397923af.pth")
    p.add_argument("--gan", type=float, default=1.0)
    p.add_argument("--gan-loss", choices=("nonsaturating", "hinge"), default="nonsaturating")
    p.add_argument("--adaptive", action="store_true", help="scale the GAN term by VQGAN's adaptive weight")
    p.add_argument("--disc-start", type=int, default=0, help="first step at which the discriminator learns")
    p.add_argument("--gan-start", type=int, default=5000, help="first step at which the generator listens to it (stage 2: 0 is fine)")
    p.add_argument("--kl", type=float, default=1e-6, help="weight of the KL, in nats per image (stage 2)")
    # the run
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=8, help="data processes per rank")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--image-every", type=int, default=1000)
    p.add_argument("--save-every", type=int, default=5000)
    p.add_argument("--dry-run", action="store_true", help="print configuration, parameter counts and estimated memory, then stop")
    args = p.parse_args(argv)
    for name in ("reg", "l1", "lpips", "gan", "kl", "lr", "min_lr", "warmup", "disc_start", "gan_start", "workers"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name):g} is negative: give 0 or more")
    for name in ("batch", "steps", "log_every", "image_every", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive: give 1 or more")
    args.out = args.out or ("runs/stage1" if args.stage == 1 else f"runs/stage2-reg{args.reg:g}")
    return args


def learning_rate(step, peak, args):
    """Linear warm-up to `peak`, then a cosine to --min-lr at the last step."""
    if step < args.warmup:
        return peak * (step + 1) / args.warmup
    t = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * t)) * (peak - args.min_lr)


# ------------------------------------------------------------------ model and checkpoints

def build(args):
    """(SAE, teacher or None, discriminator), on the CPU; refuses what does not fit together."""
    if not Path(args.encoder).is_file():
        raise ValueError(f"there is no encoder {args.encoder}: run ./weights.sh, or name a DINOv3 file with --encoder")
    pretrained = DINOv3.from_pretrained(args.encoder).requires_grad_(False)
    asked = {k: v for k, v in dict(f=args.f, z_dim=args.z_dim, widths=args.widths and tuple(args.widths), blocks=args.blocks).items() if v is not None}
    disc = PatchGAN()
    if args.stage == 1:
        config = SAEConfig(**{"encoder": pretrained.cfg, "z_dim": pretrained.cfg.width, **asked})
        config.attention = args.size // config.f <= 32          # Reading: above 32x32 latents it costs more than it gives
        sae, teacher = SAE(config, pretrained), None
    else:
        if not Path(args.init).is_file():
            raise ValueError(f"there is no stage-1 checkpoint {args.init}, and without stage 1 the encoder collapses: "
                             "run train.py --stage 1 first, or name one with --init")
        start = load_checkpoint(args.init)
        config = SAEConfig.from_dict(start["config"])
        for name, value in asked.items():
            if getattr(config, name) != value:
                raise ValueError(f"{args.init} has {name} {getattr(config, name)}, not {value}: drop the option, or train stage 1 with it")
        own = {n.removeprefix("encoder."): t for n, t in start["ema"].items() if n.startswith("encoder.")}
        if config.encoder != pretrained.cfg or any(not torch.equal(t, own[n]) for n, t in pretrained.state_dict().items()):
            raise ValueError(f"{args.init} was trained on another encoder than {args.encoder}: name its own with --encoder")
        sae, teacher = SAE(config, copy.deepcopy(pretrained)), pretrained
        sae.load_state_dict(start["ema"])
        disc.load_state_dict(start["disc"])                     # it has learnt already: no cold start beside a good generator
    if args.size % config.f:
        raise ValueError(f"--size {args.size} is not a multiple of f = {config.f}")
    sae.encoder.requires_grad_(args.stage == 2)
    sae.encoder.checkpointing = args.checkpoint
    return sae, teacher, disc


def save(out, state):
    """Write out/last.pt, whole or not at all; the one before stays as previous.pt."""
    tmp, last = out / "last.pt.tmp", out / "last.pt"
    with open(tmp, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    if last.exists():
        os.replace(last, out / "previous.pt")
    os.replace(tmp, last)


def load_last(out):
    """out/last.pt, or out/previous.pt where the last is damaged; says so."""
    try:
        return load_checkpoint(out / "last.pt")
    except ValueError as e:
        if not (out / "previous.pt").exists():
            raise
        print(f"{e}; going back to {out}/previous.pt", file=sys.stderr)
        return load_checkpoint(out / "previous.pt")


def latent_statistics(sae, images, args, rank, world, autocast, n=10_000):
    """Fill in latent_mean and latent_std [z_dim] of z over the first n training crops, moments in fp64, the same on any number of ranks."""
    device = sae.latent_mean.device
    moments = torch.zeros(2, sae.config.z_dim, dtype=torch.float64, device=device)
    steps = max(1, min(n, len(images.files)) // (args.batch * world))
    with torch.no_grad(), autocast():
        for x, _ in tqdm(batches(images, range(steps), args.batch, rank, world, args.workers), "latent statistics", steps, disable=rank > 0):
            q = sae.encode(to_float(x.to(device)))
            mu, var = q.mu.double(), q.logvar.double().clamp(-30, 20).exp()
            # E[z^2] = E[mu^2 + var]: z is a draw, not the mean
            moments += torch.stack([mu.mean((0, 2, 3)), (mu * mu + var).mean((0, 2, 3))])
    if world > 1:
        dist.all_reduce(moments)
    mean, square = moments / (steps * world)
    sae.latent_mean.copy_(mean)
    sae.latent_std.copy_((square - mean * mean).clamp_min(0).sqrt())


def dry_run(sae, teacher, disc, args):
    """Print parameter counts and an estimate of a rank's memory: states, and what autograd keeps in one forward pass, counted on fake tensors."""
    def count(*modules, trained=False):
        return sum(p.numel() for m in modules if m for p in m.parameters() if p.requires_grad or not trained)
    for name, modules in (("encoder", [sae.encoder]), ("downsampling and projection", [sae.down, sae.to_latent]), ("decoder", [sae.decoder]),
                          ("discriminator", [disc]), ("teacher", [teacher])):
        print(f"{name:30}{count(*modules) / 1e6:10.1f} M parameters, {count(*modules, trained=True) / 1e6:.1f} M trained")
    # fp32: weights, and for each trained parameter a gradient, two Adam moments and (the autoencoder's) an EMA
    states = 4 * (count(sae, disc, teacher) + 4 * count(sae, trained=True) + 3 * count(disc, trained=True))
    kept = {}

    def pack(t):
        kept[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        return t
    with torch.device("meta"):
        fake = SAE(sae.config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, args.precision == "bf16"):
        fake.to_empty(device="cpu")
        fake.encoder.requires_grad_(args.stage == 2)
        fake.encoder.checkpointing = args.checkpoint
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fake(torch.zeros(args.batch, 3, args.size, args.size), seed=0)
    for p in fake.parameters():
        kept.pop(StorageWeakRef(p.untyped_storage()), None)
    print(f"memory per rank, estimated    {states / 2 ** 30:10.1f} GiB of states, {sum(kept.values()) / 2 ** 30:.1f} GiB of the autoencoder's activations")


# ------------------------------------------------------------------ the run

def main(args):
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    out = Path(args.out)

    # Everything that can be refused is refused here, before the first step.
    sae, teacher, disc = build(args)
    folder = ImageFolder(args.data, args.split)
    if len(folder) < world:
        raise ValueError(f"{args.data} holds {len(folder)} images, fewer than the {world} ranks: start fewer")
    lpips = LPIPS(args.lpips_net, args.lpips_weights) if args.lpips else None
    if rank == 0:
        print(f"stage {args.stage}, {len(folder)} images, {world} x {args.batch} a step on {device.type}\n" + ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    if args.dry_run:
        if rank == 0:
            dry_run(sae, teacher, disc, args)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f".writable{rank}").touch()
        (out / f".writable{rank}").unlink()
    except OSError as e:
        raise ValueError(f"the output folder {out} cannot be written: {e.strerror}") from e
    if (out / "last.pt").exists() and not args.resume:
        raise ValueError(f"{out} holds a run already: continue it with --resume, or name another folder with --out")
    if world > 1:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")

    # The EMA shares what is frozen, in memory and in the checkpoint.
    ema = SAE(sae.config, sae.encoder if args.stage == 1 else copy.deepcopy(sae.encoder))
    ema.load_state_dict(sae.state_dict())
    for module in (sae.decoder, sae.down, ema.decoder, ema.down, disc, *([lpips] if lpips else [])):
        module.to(memory_format=torch.channels_last)            # what the convolution libraries want: no transposes
    for module in (sae, ema, disc, teacher, lpips):
        if module:
            module.to(device)
    ema.eval().requires_grad_(False)
    trained = [p for p in sae.parameters() if p.requires_grad]
    averaged = [e for e, p in zip(ema.parameters(), sae.parameters(), strict=True) if p.requires_grad]

    encoder_ids = {id(p) for p in sae.encoder.parameters()}
    groups = [{"params": [p for p in trained if id(p) not in encoder_ids], "peak": args.lr},
              {"params": [p for p in trained if id(p) in encoder_ids], "peak": args.lr if args.encoder_lr is None else args.encoder_lr}]
    adamw = lambda groups: torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    opt = adamw(groups)
    opt_disc = adamw([{"params": list(disc.parameters()), "peak": args.lr if args.disc_lr is None else args.disc_lr}])

    step = 0
    if args.resume:
        state = load_last(out)
        if state["config"] != asdict(sae.config) or state["args"]["stage"] != args.stage:
            raise ValueError(f"{out}/last.pt is of another stage or architecture than the options ask for")
        if state["images_per_step"] != args.batch * world:
            raise ValueError(f"{out}/last.pt was trained on {state['images_per_step']} images a step, not {args.batch} x {world}: change --batch")
        sae.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        disc.load_state_dict(state["disc"])
        opt.load_state_dict(state["opt"])
        opt_disc.load_state_dict(state["opt_disc"])
        step = state["step"]
        changed = [f"{k} {v} (was {state['args'].get(k)})" for k, v in vars(args).items() if k != "resume" and v != state["args"].get(k)]
        if rank == 0:
            print(f"resuming at step {step}" + (", with " + ", ".join(changed) if changed else ""))
    metrics = out / "metrics.jsonl"
    if rank == 0:
        (out / "config.json").write_text(json.dumps({**vars(args), "model": asdict(sae.config)}, indent=1))
        # Lines after the checkpoint belong to steps that will be done again; a kill can have cut the last one short.
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        metrics.write_text("".join(line + "\n" for line in lines))

    wrap = lambda module: DDP(module, device_ids=[local] if cuda else None, gradient_as_bucket_view=True) if world > 1 else module
    model, disc_ddp = wrap(sae), wrap(disc)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    images = TrainingImages(folder, args.size, args.seed)
    latents_per_image = sae.config.z_dim * (args.size // sae.config.f) ** 2
    bad, since, seen = set(), time.time(), 0

    def state():
        return {"version": CHECKPOINT_VERSION, "config": asdict(sae.config), "args": vars(args), "images_per_step": args.batch * world, "step": step,
                "model": sae.state_dict(), "ema": ema.state_dict(), "disc": disc.state_dict(), "opt": opt.state_dict(), "opt_disc": opt_disc.state_dict()}

    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, desc=f"stage {args.stage}", dynamic_ncols=True)
    for x, skipped in batches(images, range(step, args.steps), args.batch, rank, world, args.workers):
        for sentence in skipped:
            if sentence not in bad:
                bar.write(f"skipped: {sentence}")
        bad.update(skipped)
        if len(bad) * 100 > len(folder):
            raise ValueError(too_many_bad(bad, len(folder)))
        for group in opt.param_groups + opt_disc.param_groups:
            group["lr"] = learning_rate(step, group["peak"], args)
        x = to_float(x.to(device, non_blocking=True))                                    # [B,3,H,W]
        log, show = (step + 1) % args.log_every == 0 or step + 1 == args.steps, (step + 1) % args.image_every == 0 or step + 1 == args.steps
        disc_learns = args.gan > 0 and step >= args.disc_start
        gan_counts = disc_learns and step >= args.gan_start

        # ---- generator
        with autocast():
            # offset: each image of the whole run has its own stretch of one noise stream
            xhat, kl, patches = model(x, args.seed, (step * world + rank) * args.batch * latents_per_image)
            terms = {"l1": (args.l1, F.l1_loss(xhat.float(), x))}
            if lpips:
                terms["lpips"] = (args.lpips, lpips(xhat, x).mean())
            if args.stage == 2:
                with torch.no_grad():
                    target = teacher(x)[2]
                terms["kl"] = (args.kl, kl.mean())
                terms["mse"] = (args.reg, feature_mse(patches, target))
            if gan_counts:
                disc.requires_grad_(False)
                terms["gan"] = (args.gan, generator_loss(disc(xhat).float(), args.gan_loss))
        if gan_counts and args.adaptive:
            reconstruction = sum(w * terms[t][1] for t, w in (("l1", args.l1), ("lpips", args.lpips)) if t in terms)
            terms["gan"] = (args.gan * adaptive_weight(reconstruction, terms["gan"][1], xhat, sae.decoder[-1].weight), terms["gan"][1])
        loss = sum(w * term for w, term in terms.values() if torch.is_tensor(w) or w > 0)
        opt.zero_grad()
        loss.backward()
        opt.step()
        # EMA: e <- decay e + (1 - decay) p
        torch._foreach_lerp_(averaged, trained, 1 - args.ema)

        # ---- discriminator, on the fake images that the generator step made
        if disc_learns:
            disc.requires_grad_(True)
            with autocast():
                real, fake = disc_ddp(torch.cat([x, xhat.detach().to(x.dtype)])).float().chunk(2)
                terms["disc"] = (0, discriminator_loss(real, fake, args.gan_loss))
            opt_disc.zero_grad()
            terms["disc"][1].backward()
            opt_disc.step()

        step, seen = step + 1, seen + args.batch * world
        bar.update()
        if log:
            values = {name: term.detach().float() for name, (_, term) in terms.items()}
            values["psnr"] = psnr(to_uint8(x), to_uint8(xhat)).mean()
            if args.stage == 2:
                values["mse/var"] = values["mse"] / target.float().var()
            packed = torch.stack(list(values.values()))
            if world > 1:
                dist.all_reduce(packed)
            values = dict(zip(values, (packed / world).tolist()))
            values |= {"lr": opt.param_groups[0]["lr"], "images/s": seen / (time.time() - since)}
            since, seen = time.time(), 0
            if rank == 0:
                with open(metrics, "a") as f:
                    f.write(json.dumps({"step": step, **values}) + "\n")
                bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k != "lr"})
        if show and rank == 0:
            save_grid(out / f"grid-{step:07d}.png", x[:8], xhat[:8].detach())
        if step == args.steps:
            latent_statistics(ema, images, args, rank, world, autocast)
            sae.latent_mean.copy_(ema.latent_mean)
            sae.latent_std.copy_(ema.latent_std)
        if rank == 0 and (step % args.save_every == 0 or step == args.steps):
            save(out, state())
    bar.close()
    if rank == 0:
        print(f"wrote {out}/last.pt, {metrics} and {out}/grid-*.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(options())
    except ValueError as e:
        sys.exit(f"train.py: {e}")
