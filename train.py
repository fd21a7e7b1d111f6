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
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sae import CHECKPOINT_VERSION, SAE, Block, DINOv3, ResBlock, SAEConfig, feature_mse, load_checkpoint, load_tensors, write

# ------------------------------------------------------------------ images

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ImageFolder:
    """The image files under `root`: one folder a class, or all in one. Sorted; `files` [n], `labels` [n], `classes`.

    split "even" or "odd" keeps every other file of each class, by its position: a train/test split of a folder that has none.
    Names that begin with a dot are left out. `option`: of the command line, that named the folder.
    """

    def __init__(self, root, split="all", option="--data"):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"there is no image folder {root}: name one with {option}")

        def images(folder, pattern):
            found = (p for p in folder.glob(pattern) if p.suffix.lower() in SUFFIXES)
            return sorted(str(p) for p in found if not any(name[0] == "." for name in p.relative_to(folder).parts))

        folders = sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".")
        if folders and images(root, "*"):
            raise ValueError(f"{root} holds images and the folder {folders[0].name}: it takes one folder a class, or images alone; "
                             f"move the others away, or name another with {option}")
        folders = folders or [root]
        self.classes, self.files, self.labels = [d.name for d in folders], [], []
        for label, folder in enumerate(folders):
            found = images(folder, "**/*")
            found = found[split == "odd"::1 if split == "all" else 2]
            self.files += found
            self.labels += [label] * len(found)
        if not self.files:
            raise ValueError(f"{root} holds no images{'' if split == 'all' else f' at {split} positions'} ({', '.join(SUFFIXES)}): "
                             f"name another folder with {option}")

    def __len__(self):
        return len(self.files)


def load_image(path):
    """The image at `path` as PIL RGB, upright (EXIF), 16-bit scaled to 8, the first frame of an animation. ValueError if unreadable."""
    return load_reduced(path, None)[0]


def load_reduced(path, short_side):
    """(image, (width, height)) as `load_image`, but a JPEG decoded at 1/2, 1/4 or 1/8 where that leaves `short_side` or more.

    Width and height are those of what the original covers: at 1/2, a side of 1001 becomes 501, of which it covers 500.5.
    """
    try:
        with Image.open(path) as im:
            sides = im.size
            # A turned image has its part of a pixel on another side: decoded in full, unless its sides are multiples of 8, as most are.
            if short_side and (im.getexif().get(ExifTags.Base.Orientation, 1) == 1 or not any(n % 8 for n in sides)):
                im.draft(None, (short_side, short_side))                # leaves all but JPEGs as they are
                part = round(sides[0] / im.width)
                sides = sides[0] / part, sides[1] / part
            upright = ImageOps.exif_transpose(im)
            sides = sides if upright.size == im.size else sides[::-1]
            if upright.mode.startswith("I"):                            # 16 bits: Pillow's convert would clip at 255
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
            return upright.convert("RGB"), sides
    except Exception as e:      # Pillow's decoders raise a dozen kinds of error on damaged files
        raise ValueError(f"{path} cannot be read as an image: {e or type(e).__name__}") from e


def center_crop(im, size):
    """ADM's centre crop: halve with BOX while the short side is at least 2 size, BICUBIC to `size`, crop. PIL -> PIL."""
    while min(im.size) >= 2 * size:
        im = im.resize((im.width // 2, im.height // 2), Image.BOX)
    im = resize_short_side(im, size)
    left, top = (im.width - size) // 2, (im.height - size) // 2
    return im.crop((left, top, left + size, top + size))


def resized(width, height, short_side):
    """(width, height) scaled so that the shorter one is `short_side`, rounded."""
    scale = short_side / min(width, height)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def resize_short_side(im, size):
    return im.resize(resized(*im.size, size), Image.BICUBIC)


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

    Epoch g // n has its own permutation; the crop and the flip are drawn from (seed, g). The shorter side becomes `size`; an image that
    would be enlarged more than twice is refused. None in place of the image when
    more than 1 % of all files in a row are bad: the loop says so, since an error raised here would come with the worker's traceback.
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
        return None, skipped

    def crop(self, path, rng):
        # Decoded to twice the size or more, the crops of 258 photos are within 49 dB of those of the full decode (at worst 40);
        # decoded down to the size itself, within 39 dB (26).
        im, sides = load_reduced(path, 2 * self.size)
        if min(sides) * 2 < self.size:      # enlarged more than twice it would teach blur
            raise ValueError(f"{path} is {im.width}x{im.height}, too small for crops of {self.size}: remove it or lower --size")
        w, h = resized(*sides, self.size)
        x = torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]                        # [1,3,height,width]
        # Equal to Pillow's BICUBIC to 74 dB (at worst 55), 3 times as fast. The 1e-6 keep h and w from being rounded down.
        x = F.interpolate(x, scale_factor=((h + 1e-6) / sides[1], (w + 1e-6) / sides[0]), mode="bicubic", antialias=True)[0]
        left, top = rng.integers(w - self.size + 1), rng.integers(h - self.size + 1)
        x = x[:, top:top + self.size, left:left + self.size]                             # [3,size,size]
        return (x.flip(2) if rng.random() < 0.5 else x).permute(1, 2, 0).contiguous()


def too_many_bad(skipped, n):
    return f"more than 1 % of the {n} images cannot be used, the last because {sorted(skipped)[-1]}"


def own_session(worker):
    """Ctrl-C and torchrun signal a whole process group: the data workers leave it, since the loop needs them to reach its checkpoint."""
    os.setsid()


def collate(items):
    crops = [x for x, _ in items]
    return torch.stack(crops) if all(x is not None for x in crops) else None, [s for _, skipped in items for s in skipped]


def batches(images, steps, batch, rank, world, workers):
    """Yields (x uint8 [batch,size,size,3] or None, skipped) for each step of `steps`: this rank's part of the global batch."""
    firsts = ((step * world + rank) * batch for step in steps)
    samples = (range(first, first + batch) for first in firsts)
    loader = iter(DataLoader(images, batch_sampler=samples, collate_fn=collate, num_workers=workers, pin_memory=torch.cuda.is_available(),
                             prefetch_factor=4 if workers else None, worker_init_fn=own_session))
    # DataLoader has a dead worker raise an error wherever the main thread is, even half-way through a checkpoint. `next` notices it, too.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return loader


# ------------------------------------------------------------------ losses

class UnitDistance(torch.autograd.Function):
    """Mean over h and w of sum_c head[c] (x / |x| - y / |y|)^2: features [B,C,h,w] of one layer, head [C] -> [B], in fp32.

    The gradient goes to x alone. It is known up to a factor per sample as soon as the distance is, so no intermediate is kept for it.
    """

    @staticmethod
    def forward(ctx, x, y, head):
        x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)                              # [B,h,w,C]
        wide = torch.promote_types(x.dtype, torch.float32)
        x_scale, y_scale = (1 / (torch.linalg.vector_norm(f, dim=3, keepdim=True, dtype=wide) + 1e-10) for f in (x, y))
        u = x * x_scale
        d = u - y * y_scale
        e = d * head
        distance = (d * e).mean((1, 2)).sum(1)
        if ctx.needs_input_grad[0]:
            # dx = 2 / (h w) (e - u (u . e)) / |x|
            e.addcmul_(u, (u * e).sum(3, keepdim=True), value=-1).mul_(x_scale * (2 / (x.shape[1] * x.shape[2])))
            ctx.save_for_backward(e.to(x.dtype))
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        dx, = ctx.saved_tensors
        return (dx * gradient.view(-1, 1, 1, 1).to(dx.dtype)).permute(0, 3, 1, 2), None, None


class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018): x, y [B,3,H,W] in [-1,1] -> [B]. The gradient goes to x alone.

    The heads come with the lpips package; `path` is torchvision's file of the trunk (net vgg, alex or squeeze), never downloaded here.
    """

    def __init__(self, net, path):
        super().__init__()
        import lpips                         # imports torchvision, which takes seconds: only where LPIPS is used
        if not Path(path).is_file():
            raise ValueError(f"there is no file {path} with the LPIPS trunk {net}: run ./weights.sh --only vgg16, name one with "
                             "--lpips-weights, or leave LPIPS out (train.py --lpips 0, eval.py --skip lpips)")
        with warnings.catch_warnings():      # torchvision deprecates the argument that lpips passes
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        tensors = load_tensors(path)
        # lpips cuts torchvision's `features` into slices but keeps their numbers: net.slice2.5.weight is features.5.weight
        trunk = {name: "features." + name.split(".", 1)[1] for name in model.net.state_dict()}
        shapes = {name: t.shape for name, t in model.net.state_dict().items()}
        wrong = [theirs for name, theirs in trunk.items() if theirs not in tensors or tensors[theirs].shape != shapes[name]]
        if wrong:
            raise ValueError(f"{path} does not hold torchvision's {net} for LPIPS: "
                             f"{', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)} missing or of another shape")
        model.net.load_state_dict({name: tensors[theirs] for name, theirs in trunk.items()})
        self.scaling, self.net, self.heads = model.scaling_layer, model.net, nn.ModuleList(h.model[-1] for h in model.lins)
        self.requires_grad_(False).eval()

    def forward(self, x, y):
        with torch.no_grad():
            targets = self.net(self.scaling(y))
        features = self.net(self.scaling(x))
        return sum(UnitDistance.apply(f, target, head.weight.flatten()) for f, target, head in zip(features, targets, self.heads))

    def train(self, mode=True):
        return super().train(False)          # frozen stays in eval


class PatchGAN(nn.Sequential):
    """pix2pix's 70x70 discriminator: x [B,3,H,W] -> logits [B,1,about H/8,W/8].

    Reading: GroupNorm where pix2pix has BatchNorm. The logits of an image then depend on no other image, so real and fake
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

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each help text with its default, if there is one, and the description's lines as they are."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") or action.default is False else super()._get_help_string(action)


def options(argv=None):
    p = argparse.ArgumentParser(description="Two-stage training of S-AE; what the paper gives are its defaults.", formatter_class=Help)
    p.add_argument("--stage", type=int, choices=(1, 2), default=None, help="1: decoder and bottleneck on the frozen encoder; 2: everything")
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
    p.add_argument("--batch", type=int, default=16, help="images per rank and pass")
    p.add_argument("--accumulate", type=int, default=1, help="passes per step: as many times the images in the memory of --batch")
    p.add_argument("--steps", type=int, default=500_000, help="of the optimizer, in all")
    p.add_argument("--lr", type=float, default=5e-6, help="AdamW's rate after the warm-up")
    p.add_argument("--encoder-lr", type=float, default=None, help="default: --lr")
    p.add_argument("--disc-lr", type=float, default=None, help="default: --lr")
    p.add_argument("--min-lr", type=float, default=1e-7, help="end of the cosine")
    p.add_argument("--warmup", type=int, default=5000, help="steps of linear warm-up")
    p.add_argument("--ema", type=float, default=0.9995, help="decay of the averaged weights")
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast over fp32 weights")
    p.add_argument("--checkpoint", action="store_true", help="recompute the encoder's blocks in the backward pass: less memory")
    p.add_argument("--compile", action="store_true", help="torch.compile the encoder's blocks and the decoder: minutes at the start")
    p.add_argument("--shard", action="store_true", help="FSDP2 in place of DDP: for encoders whose states do not fit on one GPU")
    # losses
    p.add_argument("--l1", type=float, default=100.0, help="weight of L1(xhat, x)")
    p.add_argument("--lpips", type=float, default=100.0, help="weight of LPIPS(xhat, x)")
    p.add_argument("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="its trunk")
    p.add_argument("--lpips-weights", default="weights/vgg16-397923af.pth", help="torchvision's file of the trunk")
    p.add_argument("--gan", type=float, default=1.0, help="weight of the GAN term; 0 trains without a discriminator")
    p.add_argument("--gan-loss", choices=("nonsaturating", "hinge"), default="nonsaturating", help="of both players")
    p.add_argument("--adaptive", action="store_true", help="scale the GAN term by VQGAN's adaptive weight")
    p.add_argument("--disc-start", type=int, default=0, help="first step at which the discriminator learns")
    p.add_argument("--gan-start", type=int, default=None,
                   help="first step at which the generator listens to it; default 5000, in stage 2, which takes over a discriminator, 0")
    p.add_argument("--kl", type=float, default=1e-6, help="weight of the KL, in nats per image (stage 2)")
    # the run
    p.add_argument("--seed", type=int, default=0, help="of weights, data order, crops and noise")
    p.add_argument("--workers", type=int, default=8, help="data processes per rank")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl")
    p.add_argument("--image-every", type=int, default=1000, help="steps between grids of images")
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    p.add_argument("--keep", type=int, default=2, help="checkpoints kept: last.pt, last-1.pt, ...")
    p.add_argument("--max-skips", type=int, default=20, help="stop after so many steps in a row with a NaN or infinite loss or gradient")
    p.add_argument("--timeout", type=float, default=1800, help="seconds without progress on any rank after which the run ends")
    p.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    p.add_argument("--plot", nargs="+", metavar="RUN", default=None, help="draw the metrics of these output folders, and train nothing")
    p.add_argument("--dry-run", action="store_true", help="print configuration, parameter counts and estimated memory, then stop")
    args = p.parse_args(argv)
    if args.stage is None and not args.plot:
        p.error("name the --stage, 1 or 2")
    if args.gan_start is None:          # Reading: the paper does not say
        args.gan_start = 5000 if args.stage == 1 else 0
    least = dict.fromkeys(("reg", "l1", "lpips", "gan", "kl", "lr", "encoder_lr", "disc_lr", "min_lr", "ema", "warmup", "disc_start",
                           "gan_start", "workers", "seed"), 0)
    least |= dict.fromkeys(("z_dim", "widths", "blocks", "size", "batch", "accumulate", "steps", "log_every", "image_every", "save_every",
                            "keep", "max_skips", "timeout"), 1)
    for name, low in least.items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if value is not None and not min(values) >= low:                                 # `not >=` refuses NaN, too
            raise ValueError(f"--{name.replace('_', '-')} {' '.join(f'{v:g}' for v in values)}: give {low} or more")
    if args.ema > 1:
        raise ValueError(f"--ema {args.ema:g}: give 1 or less")
    if args.seed >= 2 ** 63:
        raise ValueError(f"--seed {args.seed}: give less than 2^63")
    if args.gan and args.size < 32:
        raise ValueError(f"--size {args.size} is too small for the discriminator: give 32 or more, or --gan 0")
    gan_at_once, held = args.gan and not max(args.disc_start, args.gan_start), args.stage == 2 and args.kl + args.reg
    if not (args.l1 or args.lpips or gan_at_once or held):
        raise ValueError("--l1 0 and --lpips 0 leave nothing to learn from in the first step: give one of them a weight")
    if args.adaptive and (args.shard or args.accumulate > 1):
        raise ValueError("--adaptive needs the whole gradient of the last layer in one pass: drop it, or --shard and --accumulate")
    args.out = args.out or ("runs/stage1" if args.stage == 1 else f"runs/stage2-reg{args.reg:g}")
    return args


def learning_rate(step, peak, args):
    """Linear warm-up to `peak`, then a cosine that would reach --min-lr at step number --steps."""
    if step < args.warmup:
        return peak * (step + 1) / args.warmup
    t = (step - args.warmup) / max(1, args.steps - args.warmup)
    low = min(args.min_lr, peak)        # a peak of 0 (--encoder-lr 0) stays 0
    return low + 0.5 * (1 + math.cos(math.pi * t)) * (peak - low)


# ------------------------------------------------------------------ model and checkpoints

def build(args):
    """(SAE, teacher or None, discriminator), on the CPU; refuses what does not fit together."""
    if not Path(args.encoder).is_file():
        raise ValueError(f"there is no encoder {args.encoder}: run ./weights.sh, or name a DINOv3 file with --encoder")
    torch.manual_seed(args.seed)
    pretrained = DINOv3.from_pretrained(args.encoder).requires_grad_(False)
    asked = {"f": args.f, "z_dim": args.z_dim, "widths": args.widths and tuple(args.widths), "blocks": args.blocks}
    asked = {name: value for name, value in asked.items() if value is not None}
    disc = PatchGAN()
    if args.stage == 1:
        config = SAEConfig(**{"encoder": pretrained.cfg, "z_dim": pretrained.cfg.width, **asked})
        config.attention = args.size // config.f <= 32          # Reading: above 32x32 latents it costs more than it gives
        sae, teacher = SAE(config, pretrained), None
    else:
        if not Path(args.init).is_file():
            raise ValueError(f"there is no stage-1 checkpoint {args.init}, and without stage 1 the encoder collapses: "
                             "run train.py --stage 1 first, or name one with --init (--resume reads it, too)")
        start = load_checkpoint(args.init)
        if start["args"]["stage"] != 1:
            raise ValueError(f"{args.init} is of stage {start['args']['stage']}: stage 2 starts from stage 1, name its checkpoint with --init")
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


def round_weights(frozen):
    """Keeps in bf16 what autocast would otherwise round to bf16 in every step; the results are the same bits."""
    for module in frozen.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)


@contextmanager
def writing(path):
    """An OSError of what is done inside becomes one sentence: a full disk or a missing permission is no fault of the program."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"{path} cannot be written: {e.strerror}; mend that and go on with --resume, what was saved is whole") from e


def save(out, state, keep):
    """Write out/last.pt, whole or not at all; last-1.pt, last-2.pt ... are the ones before, `keep` in all."""
    names = [out / name for name in ("new.pt", "last.pt", *(f"last-{i}.pt" for i in range(1, keep)))]
    with writing(out / "last.pt"):
        write(out / "new.pt", lambda file: torch.save(state, file))
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                os.replace(newer, older)


def checkpoints(out):
    """What `save` has left in `out`, the newest first. A kill between its renames can leave no last.pt."""
    found = [path for path in out.glob("last*.pt") if re.fullmatch(r"last(-\d+)?", path.stem)]
    return sorted(found, key=lambda path: int(path.stem[len("last-"):] or 0))


def load_last(out, rank=0):
    """The newest checkpoint in `out` that is whole, by the checksums in it; says which ones are not, and renames them."""
    found = checkpoints(out)
    if not found:
        raise ValueError(f"there is no checkpoint {out}/last.pt to go on from: start without --resume")
    for path in found:
        try:
            state = load_checkpoint(path)
            with zipfile.ZipFile(path) as records:              # torch.load maps the tensors and does not check them
                if records.testzip() is None:
                    return state
            problem = f"{path} is damaged"
        except (ValueError, FileNotFoundError) as e:            # rank 0 may have renamed it already
            problem = str(e)
        if rank == 0:
            print(f"{problem}; trying the checkpoint before it", file=sys.stderr)
            with writing(path):
                os.replace(path, f"{path}.damaged")             # where it is, the next save would put it in the place of a whole one
    raise ValueError(f"none of the {len(found)} checkpoints in {out} is whole: start again in another folder")


@torch.no_grad()
def swap(weights, others):
    """Exchange the values of two lists of tensors."""
    for p, e in zip(weights, others, strict=True):
        before = p.clone()
        p.copy_(e)
        e.copy_(before)


def latent_statistics(sae, images, args, rank, world, autocast, note, n=10_000):
    """Fill in latent_mean and latent_std [z_dim] of z over the first n training crops, in whole steps of the run; moments in fp64.

    The same crops on any number of ranks, as long as a step has the same images.
    """
    device = sae.latent_mean.device
    moments = torch.zeros(2, sae.config.z_dim, dtype=torch.float64, device=device)
    steps = max(1, min(n, len(images.files)) // (args.batch * world * args.accumulate)) * args.accumulate
    with torch.no_grad(), autocast():
        parts = batches(images, range(steps), args.batch, rank, world, args.workers)
        for x, skipped in tqdm(parts, "latent statistics", steps, disable=rank > 0):
            note("latent statistics")
            if x is None:
                raise ValueError(too_many_bad(skipped, len(images.files)))
            q = sae.encode(to_float(x.to(device)))
            mu, var = q.mu.double(), q.logvar.double().clamp(-30, 20).exp()
            # E[z^2] = E[mu^2 + var]: z is a draw, not the mean
            moments += torch.stack([mu.mean((0, 2, 3)), (mu * mu + var).mean((0, 2, 3))])
    if world > 1:
        dist.all_reduce(moments)
    mean, square = moments / (steps * world)
    sae.latent_mean.copy_(mean)
    sae.latent_std.copy_((square - mean * mean).clamp_min(0).sqrt())


def dry_run(sae, teacher, disc, args, world):
    """Print parameter counts and an estimate of a rank's memory: states, and what autograd keeps of a forward pass, by fake tensors."""
    def count(*modules, trained=False):
        return sum(p.numel() for m in modules if m for p in m.parameters() if p.requires_grad or not trained)
    for name, modules in (("encoder", [sae.encoder]), ("downsampling and projection", [sae.down, sae.to_latent]),
                          ("decoder", [sae.decoder]), ("discriminator", [disc]), ("teacher", [teacher])):
        print(f"{name:30}{count(*modules) / 1e6:10.1f} M parameters, {count(*modules, trained=True) / 1e6:.1f} M trained")
    # fp32: weights, and for each trained parameter a gradient, two Adam moments and (the autoencoder's) an EMA
    states = 4 * (count(sae, disc) + 4 * count(sae, trained=True) + 3 * count(disc, trained=True))
    states += sum(p.nbytes for p in teacher.parameters()) if teacher else 0
    if args.shard:
        states /= world
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
    print(f"memory per rank, estimated    {states / 2 ** 30:10.1f} GiB of states, "
          f"{sum(kept.values()) / 2 ** 30:.1f} GiB of the autoencoder's activations")


# ------------------------------------------------------------------ ranks

signals = []                                                    # those received, see `on_signal`


def on_signal(signum, frame):
    """The first signal ends the run after the step at hand, with a checkpoint; a second one ends the process at once."""
    if signals:
        os._exit(128 + signum)
    signals.append(signum)


@contextmanager
def watch(store, rank, world, seconds):
    """Gives note(text), to be called when this rank begins something new.

    Where a rank stalls, the others wait for it in a collective, in silence. So each rank keeps two things in the store: its last
    note, numbered, and its beat, which a thread counts up. When no note has changed for `seconds`, the ranks without a beat (stopped
    or dead) are named, or else those with the oldest note, and all processes end; the checkpoints are whole, and torchrun can start again.
    """
    ranks, begun, over, pause = range(world), count(1), threading.Event(), min(1, seconds / 10)

    def note(text):
        store.set(f"note {rank}", f"{next(begun):012d}{text}")

    def stalled():
        """Returns when the run is over or has stalled; then, on the first rank that notices, with a sentence."""
        before, beats, idle = None, None, 0                     # idle counts pauses: a job that was stopped and continued has not stalled
        while not over.wait(pause):
            store.add(f"beat {rank}", 1)                        # this process runs, whatever its main thread is at
            notes = [store.get(f"note {r}").decode() if store.check([f"note {r}"]) else f"{0:012d}not started" for r in ranks]
            if notes != before:
                before, beats, idle = notes, [store.add(f"beat {r}", 0) for r in ranks], 0
            idle += pause
            if idle > seconds:
                silent = [r for r in ranks if store.add(f"beat {r}", 0) == beats[r]]
                behind = ", ".join(f"rank {r} ({notes[r][12:]})" for r in silent or [r for r in ranks if notes[r][:12] == min(notes)[:12]])
                sentence = (f"no rank has begun anything new for {seconds:g} s; {'silent' if silent else 'furthest behind'}: {behind}; "
                            "look there, then go on with --resume, or wait longer with --timeout")
                return sentence if store.add("told", 1) == 1 else None

    def look():
        try:
            sentence = stalled()
        except RuntimeError:                                    # the store went with the rank that keeps it
            sentence = None if over.wait(seconds) else f"rank {rank} has lost the others; go on with --resume"
        if sentence:
            print(f"\ntrain.py: {sentence}", file=sys.stderr, flush=True)
        if not over.is_set():
            os._exit(1)

    note("starting")
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield note
    finally:
        over.set()
        thread.join()


def exchange_gradients(*models, on):
    """Whether the coming backward passes exchange the gradients between the ranks; until then they pile up on each."""
    for model in models:
        if isinstance(model, DDP):
            model.require_backward_grad_sync = on               # what DDP.no_sync sets
        elif isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(on)


def shard(model):
    """FSDP2: weights, gradients and moments of `model` are split over the ranks; a block is gathered while it is at work."""
    for m in model.modules():
        if isinstance(m, (Block, ResBlock)):
            fully_shard(m)
    fully_shard(model)
    if isinstance(model, SAE):
        register_fsdp_forward_method(model, "encode")           # beside forward, which has the hooks already


def whole(tree, rank):
    """A state dict with its sharded tensors put together, on the CPU of rank 0; all ranks take part."""
    def gather(t):
        if not isinstance(t, DTensor):
            return t
        t = t.full_tensor()
        return t.cpu() if rank == 0 else None
    return tree_map(gather, tree)


def like(p, t):
    """A whole tensor as the parameter p is: its shard, device and memory order. The fused optimizer takes for granted that they agree."""
    if not t.dim():
        return t
    if isinstance(p, DTensor):
        return distribute_tensor(t.contiguous().to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return torch.empty_like(p).copy_(t)


# ------------------------------------------------------------------ what is seen

def tensorboard(out, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ValueError("--tensorboard needs the package: pip install --no-build-isolation -e '.[plot]'") from e
    return SummaryWriter(out, purge_step=step + 1)


def plot(runs):
    """Every column of the runs' metrics.jsonl against the step -> curves.png beside the first run."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError("--plot needs matplotlib: pip install --no-build-isolation -e '.[plot]'") from e
    tables = {}
    for run in map(Path, runs):
        if not (run / "metrics.jsonl").is_file():
            raise ValueError(f"there is no {run}/metrics.jsonl: name output folders of train.py with --plot")
        tables[run] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
        if not tables[run]:
            raise ValueError(f"{run}/metrics.jsonl has no line yet: wait for --log-every steps of that run")
    names = sorted({name for table in tables.values() for line in table for name in line} - {"step"})
    figure = Figure(figsize=(20, 4 * math.ceil(len(names) / 4)), layout="constrained")
    for axes, name in zip(figure.subplots(math.ceil(len(names) / 4), 4, squeeze=False).flat, names):
        for run, table in tables.items():
            points = [(line["step"], line[name]) for line in table if line.get(name) is not None]
            axes.plot(*zip(*points) if points else ((), ()), label=run.resolve().name)
        axes.set(title=name, xlabel="step", yscale="log" if name in ("l1", "lpips", "mse", "mse/var", "kl") else "linear")
        axes.legend()
    out = Path(runs[0]).parent / "curves.png"
    with writing(out):
        figure.savefig(out)
    print(f"wrote {out}")


# ------------------------------------------------------------------ the run

def main(args, rank, world, store, note):
    """One run: `store` introduces the `world` ranks to each other, `note` is told what this one is at."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    out = Path(args.out)
    images_per_step = args.batch * world * args.accumulate
    torch.backends.cudnn.allow_tf32 = args.precision == "bf16"  # on by default, and fp32 means fp32
    if rank > 0:
        warnings.simplefilter("ignore")                         # rank 0 says it

    # Everything that can be refused is refused here, before the first step.
    sae, teacher, disc = build(args)
    note("listing the images")
    folder = ImageFolder(args.data, args.split)
    if len(folder) < world:
        raise ValueError(f"{args.data} holds {len(folder)} images, fewer than the {world} ranks: start fewer")
    if args.shard and world == 1:
        raise ValueError("--shard splits the weights over the ranks, and there is one: start more with torchrun, or drop it")
    lpips = LPIPS(args.lpips_net, args.lpips_weights) if args.lpips else None
    if args.precision == "bf16" and not args.shard:             # FSDP wants one dtype
        for frozen in (teacher, lpips and lpips.net):
            if frozen:
                round_weights(frozen)
    if rank == 0:
        print(f"stage {args.stage}, {len(folder)} images, {world} x {args.batch} x {args.accumulate} a step on {device.type}\n"
              + ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    if args.dry_run:
        if rank == 0:
            dry_run(sae, teacher, disc, args, world)
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()                 # it can be written to
    # torchrun --max-restarts starts the same command again: what it finds then is its own.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if checkpoints(out) and not (args.resume or restarted):
        raise ValueError(f"{out} holds a run already: continue it with --resume, or name another folder with --out")
    step, skips, saved = 0, 0, None
    if args.resume or restarted and checkpoints(out):
        saved = load_last(out, rank)
        theirs = {**saved["config"], "stage": saved["args"]["stage"]}
        differ = [f"{k} {v} (there {theirs[k]})" for k, v in {**asdict(sae.config), "stage": args.stage}.items() if v != theirs[k]]
        if differ:
            raise ValueError(f"the checkpoint in {out} is of another stage or architecture: {', '.join(differ)}")
        if saved["images_per_step"] != images_per_step:
            raise ValueError(f"the checkpoint in {out} was trained on {saved['images_per_step']} images a step, not "
                             f"{args.batch} x {world} x {args.accumulate}: change --batch or --accumulate")
        sae.load_state_dict(saved["model"])
        disc.load_state_dict(saved["disc"])
        step, skips = saved["step"], saved.get("skips", 0)
        if step > args.steps:
            raise ValueError(f"the checkpoint in {out} is at step {step}, past --steps {args.steps}: give {step} or more")
        changed = [f"{k} {v} (was {saved['args'].get(k)})" for k, v in vars(args).items() if k != "resume" and v != saved["args"].get(k)]
        if rank == 0:
            print(f"resuming at step {step}" + (", with " + ", ".join(changed) if changed else ""))

    if world > 1:
        if cuda:
            torch.cuda.set_device(device)
        # Twice the time: `watch` knows which rank is behind, and is to speak first.
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world,
                                timeout=timedelta(seconds=2 * args.timeout + 60))
        steps = [0] * world
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"the ranks see checkpoints of different steps in {out}, {min(steps)} and {max(steps)}: "
                             "it must be one folder that all nodes share")

    if args.compile:
        for module in (*sae.encoder.blocks, *(teacher.blocks if teacher else ()), sae.decoder):
            module.compile()                                    # in place: names in checkpoints stay as they are
    for module in (disc, *([lpips] if lpips else []), *(() if args.shard else (sae.decoder, sae.down))):
        module.to(memory_format=torch.channels_last)            # what the convolution libraries want: no transposes
    for module in (sae, disc, teacher, lpips):
        if module:
            module.to(device)
    wrap = lambda module: DDP(module, device_ids=[local_rank] if cuda else None, gradient_as_bucket_view=True) if world > 1 else module
    if args.shard:
        for module in (sae, teacher) if teacher else (sae,):
            shard(module)
    model, disc_ddp = sae if args.shard else wrap(sae), wrap(disc)
    trained = {name: p for name, p in sae.named_parameters() if p.requires_grad}
    averaged = {name: p.detach().clone() for name, p in trained.items()}                 # the EMA; what is frozen it shares
    # Reading: the paper names no betas
    adamw = lambda groups: torch.optim.AdamW([{"params": params, "peak": args.lr if lr is None else lr} for params, lr in groups if params],
                                             lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    opt = adamw([([p for name, p in trained.items() if not name.startswith("encoder.")], args.lr),
                 ([p for name, p in trained.items() if name.startswith("encoder.")], args.encoder_lr)])
    opt_disc = adamw([(list(disc.parameters()), args.disc_lr)])
    if saved:
        for name, e in averaged.items():
            e.copy_(like(e, saved["ema"][name]))
        params = [p for group in opt.param_groups for p in group["params"]]
        for i, moments in saved["opt"]["state"].items():
            moments.update({k: like(params[i], v) for k, v in moments.items()})
        for o, theirs in (opt, saved["opt"]), (opt_disc, saved["opt_disc"]):
            o.load_state_dict({**theirs, "param_groups": o.state_dict()["param_groups"]})  # the moments; rates are those asked for now
        saved = None                                            # its memory

    def state():
        weights, ema = whole(sae.state_dict(), rank), whole(averaged, rank)
        return {"version": CHECKPOINT_VERSION, "config": asdict(sae.config), "args": vars(args), "images_per_step": images_per_step,
                "step": step, "skips": skips, "model": weights, "ema": {**weights, **ema}, "disc": disc.state_dict(),
                "opt": whole(opt.state_dict(), rank), "opt_disc": opt_disc.state_dict()}

    metrics, board = out / "metrics.jsonl", None
    if rank == 0:
        with writing(out):
            (out / "config.json").write_text(json.dumps({**vars(args), "model": asdict(sae.config)}, indent=1))
            # Lines after the checkpoint belong to steps that will be done again; a kill can have cut the last one short.
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write(metrics, lambda file: file.writelines(f"{line}\n".encode() for line in lines))
            board = tensorboard(out, step) if args.tensorboard else None

    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    images = TrainingImages(folder, args.size, args.seed)
    latents_per_image = sae.config.z_dim * (args.size // sae.config.f) ** 2
    bad_files, in_a_row, saved_at, since, seen = set(), 0, step, time.time(), 0
    parts = batches(images, range(step * args.accumulate, args.steps * args.accumulate), args.batch, rank, world, args.workers)
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, desc=f"stage {args.stage}", dynamic_ncols=True)
    while step < args.steps:
        for group in opt.param_groups + opt_disc.param_groups:
            group["lr"] = learning_rate(step, group["peak"], args)
        log, show = (step + 1 == args.steps or (step + 1) % every == 0 for every in (args.log_every, args.image_every))
        disc_learns = args.gan > 0 and step >= args.disc_start
        gan_counts = disc_learns and step >= args.gan_start
        opt.zero_grad()
        opt_disc.zero_grad()
        logged, new_bad, loss_sum = [], [], 0

        for part in range(step * args.accumulate, (step + 1) * args.accumulate):
            note(f"images of step {step}")
            x, skipped = next(parts)
            new_bad += [sentence for sentence in skipped if sentence not in bad_files]
            if x is None:
                raise ValueError(too_many_bad(new_bad, len(folder)))
            note(f"step {step}")
            x = to_float(x.to(device, non_blocking=True))                                # [B,3,H,W]
            exchange_gradients(model, disc_ddp, on=(part + 1) % args.accumulate == 0)    # once a step

            # ---- generator
            with autocast():
                # offset: each image of the whole run has its own stretch of one noise stream
                xhat, kl, patches = model(x, args.seed, (part * world + rank) * args.batch * latents_per_image)
                # Reading: L1 and the MSE are means over everything, LPIPS over the batch, the KL a sum over the latent and a mean over the
                # batch. Means make 100 : 100 : 1 comparable, and a mean KL at 1e-6 would not count at all.
                terms = {"l1": (args.l1, F.l1_loss(xhat.float(), x))}
                if lpips:
                    terms["lpips"] = (args.lpips, lpips(xhat, x).mean())
                if args.stage == 2:
                    with torch.no_grad():
                        target = teacher(x)[2]
                    terms["kl"] = (args.kl, kl.mean())
                    # Reading: of the patch tokens after the final norm. CLS is not held: eval.py shows the probe with and without it.
                    terms["mse"] = (args.reg, feature_mse(patches, target))
                if gan_counts:
                    disc.requires_grad_(False)
                    terms["gan"] = (args.gan, generator_loss(disc(xhat).float(), args.gan_loss))
            if gan_counts and args.adaptive:
                reconstruction = sum(w * terms[t][1] for t, w in (("l1", args.l1), ("lpips", args.lpips)) if t in terms)
                terms["gan"] = (args.gan * adaptive_weight(reconstruction, terms["gan"][1], xhat, sae.decoder[-1].weight), terms["gan"][1])
            loss = sum(w * term for w, term in terms.values() if torch.is_tensor(w) or w > 0) / args.accumulate
            loss.backward()

            # ---- discriminator, on the fake images that the generator has just made
            if disc_learns:
                disc.requires_grad_(True)
                with autocast():
                    real, fake = disc_ddp(torch.cat([x, xhat.detach().to(x.dtype)])).float().chunk(2)
                    terms["disc"] = (0, discriminator_loss(real, fake, args.gan_loss))
                (terms["disc"][1] / args.accumulate).backward()
            loss_sum += loss.detach()
            if log:
                values = {name: term.detach().float() for name, (_, term) in terms.items()}
                values["psnr"] = psnr(to_uint8(x), to_uint8(xhat)).mean()
                if args.stage == 2:
                    values["mse/var"] = values["mse"] / target.float().var()
                logged.append(torch.stack(list(values.values())))

        # ---- one small exchange: what one rank has met, all act on together
        grads = [p.grad for p in (*trained.values(), *disc.parameters()) if p.grad is not None]
        grads = [g.to_local() if isinstance(g, DTensor) else g for g in grads]           # this rank's part
        finite = torch.isfinite(torch.nn.utils.get_total_norm(grads) + loss_sum)
        flags = torch.tensor([0.0, len(new_bad), signals[0] if signals else 0], device=device)
        flags[0] = ~finite
        if world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        broken, any_bad, signum = (int(v) for v in flags.tolist())
        if any_bad:
            every = [new_bad]
            if world > 1:
                every = [None] * world
                dist.all_gather_object(every, new_bad)
            for sentence in sorted({s for sentences in every for s in sentences} - bad_files):
                bad_files.add(sentence)
                if rank == 0:
                    bar.write(f"skipped: {sentence}")
            if len(bad_files) * 100 > len(folder):
                raise ValueError(too_many_bad(bad_files, len(folder)))
        if broken:
            skips, in_a_row = skips + 1, in_a_row + 1
        else:
            in_a_row = 0
            opt.step()
            with torch.no_grad():
                # EMA: e <- decay e + (1 - decay) p
                torch._foreach_lerp_(list(averaged.values()), list(trained.values()), 1 - args.ema)
            if disc_learns:
                opt_disc.step()

        step, seen = step + 1, seen + images_per_step
        bar.update()
        if log:
            packed = torch.stack(logged).mean(0)
            if world > 1:
                dist.all_reduce(packed)
            values = {name: v if math.isfinite(v) else None for name, v in zip(values, (packed / world).tolist())}
            peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            values |= {"lr": opt.param_groups[0]["lr"], "skips": skips, "images/s": seen / (time.time() - since), "GiB": peak / 2 ** 30}
            since, seen = time.time(), 0
            if rank == 0:
                with writing(metrics), open(metrics, "a") as f:
                    f.write(json.dumps({"step": step, **values}) + "\n")
                bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if v is not None and k != "lr"})
            for name, value in values.items() if board else ():
                board.add_scalar(name, float("nan") if value is None else value, step)
        if show and rank == 0:
            with writing(out):
                save_grid(out / f"grid-{step:07d}.png", x[:8], xhat[:8].detach())
        if in_a_row >= args.max_skips:
            raise ValueError(f"the loss or a gradient was NaN or infinite in the last {in_a_row} steps, up to step {step}, "
                             f"and they were skipped: go on from {out}/last.pt ({f'step {saved_at}' if saved_at else 'none yet'}) with --resume "
                             "and a lower --lr, or --precision fp32")
        if step == args.steps:
            swap(trained.values(), averaged.values())
            latent_statistics(sae, images, args, rank, world, autocast, note)
            swap(trained.values(), averaged.values())
        if step % args.save_every == 0 or step == args.steps or signum:
            note(f"checkpoint of step {step}")
            now = state()
            if rank == 0:
                save(out, now, args.keep)
            saved_at = step
        if signum and step < args.steps:
            break
    bar.close()
    if board:
        board.close()
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        print(f"wrote {out}/last.pt, {metrics} and {out}/grid-*.png" if step == args.steps else
              f"stopped by {signal.Signals(signum).name} after step {step}, which is in {out}/last.pt: go on with --resume")
    if step < args.steps:
        sys.exit(128 + signum)                                  # so that no script takes it for a finished run


def launch(argv=None):
    """The command line. What goes wrong is told in one sentence, by the first rank that meets it, and the exit status is 1."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = dist.HashStore()
    if world > 1:       # torchrun keeps one store over its restarts: what the ranks before have left in it is not for these
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, on_signal)
    try:
        args = options(argv)
        if args.plot:
            return plot(args.plot)
        # A clone: its own connection does not wait while the other one does.
        with watch(dist.PrefixStore("watch", store.clone()), rank, world, args.timeout) as note:
            return main(args, rank, world, store, note)
    except ValueError as e:
        key = problem = str(e)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        if isinstance(e, torch.OutOfMemoryError):
            key = problem = f"rank {rank} is out of GPU memory: go on with --resume and a lower --batch beside a higher --accumulate, " \
                            "--checkpoint or --shard"
        elif "DataLoader worker" in reason or "Pin memory thread" in reason:
            key = problem = f"a data worker of rank {rank} has died, most often for want of memory: {reason} Go on with --resume, " \
                            "perhaps with fewer --workers"
        elif isinstance(e, dist.DistError) or "gloo" in reason:
            key, problem = "lost", f"the ranks have lost each other, most often because one of them has gone ({reason}); go on with --resume"
        else:
            raise
    try:
        first = store.add(key, 1) == 1
    except RuntimeError:                                        # the store went with the rank that keeps it, and that one has spoken
        first = False
    if first:
        print(f"train.py: {problem}", file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    launch()
