"""Score an autoencoder, and use one: one protocol for every model, printed with every result.

    python eval.py runs/stage2-reg100/last.pt                              # probe, PSNR, SSIM, LPIPS, rFID, picture grid
    python eval.py last.pt diffusers:stabilityai/sd-vae-ft-mse my.py:load  # the same table for peers
    torchrun --nproc_per_node 8 eval.py last.pt                            # the same numbers from 8 GPUs
    python eval.py last.pt --encode DIR --out latents.safetensors          # for diffusion training; --decode is the way back
    python eval.py a.pt b.pt --overfit image.png                           # does a low latent loss mean a good image?

A model is a checkpoint of train.py, diffusers:NAME_OR_FOLDER, or FILE.py:FACTORY, where FACTORY() gives an object with
encode(x) -> z [B,C,...] and decode(z) -> xhat, images [B,3,H,W] in [-1,1].

Published rFIDs of one and the same checkpoint differ by more than the gaps that papers claim, because crop, rounding, Inception
network and resize differ. Here both the image and its reconstruction are rounded to uint8 the same way before any metric; the
rest of the protocol stands beside the code that follows it and in the JSON.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import platform
import re
import runpy
import sys
import time
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.models.inception import BasicConv2d, inception_v3
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from tqdm import tqdm

from sae import SAE, Posterior, load_safetensors, load_tensors, save_safetensors, torch_load, write
from train import LPIPS, Help, ImageFolder, center_crop, load_image, psnr, save_grid, to_float, to_uint8


# ------------------------------------------------------------------ ranks, images, files

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(t):
    """The sum of t over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


class Crops(Dataset):
    """Item i: (i, uint8 [S,S,3], label) of file i, ADM's centre crop. Item (i, seed): the probe's random resized crop and flip."""

    def __init__(self, size, *folders):
        self.size, self.files, self.labels = size, sum((f.files for f in folders), []), sum((f.labels for f in folders), [])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        i, seed = item if isinstance(item, tuple) else (item, None)
        try:
            image = load_image(self.files[i])
        except ValueError as error:
            return error                        # returned, not raised: a worker's exception would arrive as a page of traceback
        if seed is None:
            image = center_crop(image, self.size)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)         # the crop depends on the draw alone: not on workers, ranks or a resume
                image = RandomHorizontalFlip()(RandomResizedCrop(self.size)(image))
        return i, torch.from_numpy(np.array(image)), self.labels[i]


def collate(items):
    return next((x for x in items if isinstance(x, ValueError)), None) or default_collate(items)


def shares(index, batch):
    """This rank's batches of `index`: every world-th run of `batch` consecutive ones.

    No index is missed or counted twice, and a batch is the same on whichever rank it falls: sums do not depend on the ranks.
    """
    return [index[i:i + batch] for i in range(0, len(index), batch)][rank()::world()]


def batches(crops, steps, args, desc, count=None):
    """(index [B], images [B,S,S,3], labels [B]) for each of the `count` batches of items in `steps`; progress on rank 0."""
    loader = DataLoader(crops, batch_sampler=steps, num_workers=args.workers, collate_fn=collate, pin_memory=torch.cuda.is_available())
    for batch in tqdm(loader, desc, count or len(steps), unit="batch", disable=rank() != 0):
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def digest(*values):
    """A short name for what `values` describe."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def slug(text):
    """`text` as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


# ------------------------------------------------------------------ autoencoders

class Autoencoder:
    """Any model behind the few methods that the metrics use.

    encode: x [B,3,S,S] in [-1,1] -> z [B,C,...], or a Posterior of it; decode: z -> xhat [B,3,S,S], about [-1,1].
    digest: SHA-256 of the weights, None for an object that is no torch module. shape, posterior: of z, [C,...], and whether it is
    drawn from one. width, kinds: D of `features` and {kind: its columns}.
    Raises ValueError for weights that are not finite and for tensors of the wrong shape.
    """

    def __init__(self, name, model, encode, decode, args, device):
        self.name, self.model, self.encode, self.decode, self.sample, self.device = name, model, encode, decode, args.sample, device
        self.digest = None
        if isinstance(model, nn.Module):
            model.to(device).eval().requires_grad_(False)
            weights = hashlib.sha256()
            for key, t in model.state_dict().items():
                if t.is_floating_point() and not t.isfinite().all():
                    raise ValueError(f"{name} holds NaN or Inf in {key}: its run has diverged, take an earlier checkpoint")
                weights.update(key.encode() + t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self.digest = weights.hexdigest()
        with torch.no_grad():                   # a grey image shows what does not fit before the long pass does
            grey = torch.zeros(1, 3, args.size, args.size, device=device)
            z, kl = self.latent(grey)
            features, self.kinds = self.features(grey)
            self.width, self.shape, self.posterior = features.shape[1], list(z.shape[1:]), kl is not None
            back = decode(z)
        if not torch.is_tensor(back) or back.shape != grey.shape:
            raise ValueError(f"{name} gives {shape_of(back)} back for {shape_of(grey)}: pass the --size that it was made for")

    def latent(self, x, first=0):
        """x [B,3,H,W] in [-1,1], the images first .. first+B-1 of a set -> z [B,C,...], KL to N(0,I) in nats [B] or None."""
        q = self.encode(x)
        if isinstance(q, Posterior):
            # The noise of an image depends on its place in the set alone, so neither batch size nor ranks change a number.
            return (q.sample(seed=0, offset=first * q.mu[0].numel()) if self.sample else q.mode()), q.kl()
        if self.sample:
            raise ValueError(f"--sample draws z from a posterior, and {self.name} has none: leave --sample out")
        if not torch.is_tensor(q) or q.dim() < 3 or len(q) != len(x):
            raise ValueError(f"encode of {self.name} must give a tensor [B,C,...], and for {shape_of(x)} it gives {shape_of(q)}")
        return q, None

    def features(self, x):
        """What the probe sees, [B,D], and {kind: its columns}. `mu` is the latent averaged over the positions."""
        if not isinstance(self.model, SAE):
            q = self.encode(x)
            mu = (q.mode() if isinstance(q, Posterior) else q).flatten(2).mean(2)        # [B,C]; the mean also under --sample
            return mu, {"mu": slice(0, mu.shape[1])}
        cls, _, patches = self.model.encoder(x)
        D, (h, w) = cls.shape[1], (side // self.model.encoder.patch for side in x.shape[2:])
        mu = self.model.posterior(patches, h, w).mu.mean((2, 3))                         # [B,z_dim]
        # The teacher's MSE holds the patch tokens alone and CLS may drift: the patch tokens also stand by themselves.
        kinds = {"cls+patch": slice(0, 2 * D), "patch": slice(D, 2 * D), "mu": slice(2 * D, 2 * D + mu.shape[1])}
        return torch.cat([cls, patches.mean(1), mu], 1), kinds


def shape_of(x):
    return list(x.shape) if torch.is_tensor(x) else f"a {type(x).__name__}"


def load_model(spec, args, device):
    """The autoencoder that `spec` names; see the top of this file. Raises ValueError, one sentence."""
    file, _, factory = spec.rpartition(":")
    if spec.startswith("diffusers:"):
        model, encode, decode = load_diffusers(spec)
    elif file.endswith(".py"):
        sys.path.insert(0, str(Path(file).parent))                                       # so that it finds its own neighbours
        names = runpy.run_path(file)
        model = names[factory]() if factory in names else None
        encode, decode = (getattr(model, name, None) for name in ("encode", "decode"))
        if not (callable(encode) and callable(decode)):
            raise ValueError(f"{file} needs a function {factory}() that gives an object with encode(x) -> z and decode(z) -> xhat")
    else:
        model = SAE.from_pretrained(spec)
        encode, decode = model.encode, model.decode
    return Autoencoder(spec, model, encode, decode, args, device)


def load_diffusers(spec):
    """(model, encode, decode): SD-VAE and its like (AutoencoderKL), DC-AE or R-AE, by a hub name or from a folder."""
    try:
        import diffusers
        model = diffusers.AutoModel.from_pretrained(spec.removeprefix("diffusers:"))
    except ImportError as error:
        raise ValueError(f"{spec} needs diffusers and transformers, this project's extra `peers`: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"diffusers cannot load {spec}: {' '.join(str(error).split())}") from error

    ways = {"AutoencoderKL": (lambda x: Posterior(*model.encode(x).latent_dist.parameters.chunk(2, 1)), lambda z: model.decode(z).sample),
            "AutoencoderDC": (lambda x: model.encode(x).latent, lambda z: model.decode(z).sample),
            # R-AE's images are in [0,1]
            "AutoencoderRAE": (lambda x: model.encode((x + 1) / 2).latent, lambda z: model.decode(z).sample * 2 - 1)}
    if type(model).__name__ not in ways:
        raise ValueError(f"{spec} is a {type(model).__name__}: {', '.join(ways)} are scored by name, others by FILE.py:FACTORY")
    return model, *ways[type(model).__name__]


# ------------------------------------------------------------------ SSIM

def ssim(x, y):
    """Wang et al. 2004 of each image: uint8 [B,3,H,W] twice -> [B].

    11-tap Gaussian of sigma 1.5, K 0.01 and 0.03, per channel, reflect padding, mean of the full map (as torchmetrics 1.9).
    """
    def blur(n):
        # Blurring an axis is a matrix, its reflected borders included: two products beat eleven-tap convolutions of one channel.
        taps = torch.exp(-(torch.arange(11, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
        rows = F.pad(torch.eye(n, device=x.device)[None], (5, 5), mode="reflect")[0]
        return rows.unfold(1, 11, 1) @ (taps / taps.sum())                               # [n,n], input by output

    x, y = x.float(), y.float()
    maps = blur(x.shape[2]).T @ torch.stack([x, y, x * x, y * y, x * y]) @ blur(x.shape[3])  # [5,B,3,H,W]
    mx, my, xx, yy, xy = maps
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    # SSIM = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(var x + var y + c2))
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    bottom = (mx * mx + my * my + c1) * ((xx - mx * mx).clamp(min=0) + (yy - my * my).clamp(min=0) + c2)
    return (top / bottom).flatten(1).mean(1)


# ------------------------------------------------------------------ FID

def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize, fp32 [B,C,H,W] -> [B,C,size,size]: output i reads at i * in/out, no half-pixel shift."""
    for dim in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = at.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (at - low).view(-1, 1) if dim == 2 else at - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def feed_pool_branch(block, pool):
    """Let the pool branch of one of torchvision's Inception blocks take pool(input of the block) instead of its own pooling."""
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda *_: pool(inputs.pop()))


class FIDInception(nn.Module):
    """The Inception of FID (pt_inception-2015-12-05, torchvision's names, 1008 classes): uint8 [B,3,H,W] -> [B,dims] fp32.

    dims 64, 192, 768 or 2048: averaged over the positions after the first and second pool, Mixed_6e, Mixed_7c.
    resize "tf1", or "torch" for pytorch-fid's variant. Raises ValueError when the file is another network's.
    """

    def __init__(self, path, dims=2048, resize="tf1"):
        super().__init__()
        mend = "./weights.sh --only inception fetches it, --skip fid goes without"
        if not Path(path).is_file():
            raise ValueError(f"there is no FID Inception {path}: {mend}")
        last = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}[dims]
        layers = OrderedDict(inception_v3(num_classes=1008, aux_logits=False, init_weights=False).named_children())
        while next(reversed(layers)) != last:
            layers.popitem()
        self.net, self.resize = nn.Sequential(layers), resize
        found, wanted = load_tensors(path), self.net.state_dict()
        wrong = [key for key, t in wanted.items() if t.dim() and (key not in found or found[key].shape != t.shape)]
        # torchvision's own Inception has the same names and other weights: its 1000 classes give it away.
        classes = len(found["fc.weight"]) if "fc.weight" in found else 1008
        if wrong or classes != 1008:
            what = f"no {wrong[0]} of its shape" if wrong else f"{classes} classes, not 1008"
            raise ValueError(f"{path} is not the FID Inception for {dims} features ({what}): {mend}")
        # the counters of batches, which older files lack, keep their zero
        self.net.load_state_dict({key: found.get(key, t) for key, t in wanted.items()})
        for m in self.net.modules():
            if isinstance(m, BasicConv2d):      # batch norm goes into the convolution: a third less memory traffic
                m.conv, m.bn = nn.utils.fusion.fuse_conv_bn_eval(m.conv.eval(), m.bn.eval()), nn.Identity()
        # TensorFlow's mean leaves the padding out; the maximum of the last block is a slip of 2015 that every FID has kept.
        mean, maximum = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
        for name, block in layers.items():
            if hasattr(block, "branch_pool"):
                feed_pool_branch(block, maximum if name == "Mixed_7c" else mean)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x.float()
        if self.resize == "tf1":
            x = (tf1_resize(x) - 128) / 128
        else:
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
        return self.net(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class Moments:
    """Mean and covariance of rows [n,D] that come in batches: n, sum x and sum x x^T in float64, so ranks just add."""

    def __init__(self, dims, device):
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.n, self.sum, self.outer = zeros(()), zeros(dims), zeros(dims, dims)

    def update(self, x):
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def mean_cov(self):
        """(mean [D], unbiased covariance [D,D]) over all ranks, numpy float64. Every rank must call it, once."""
        n, total, outer = (all_reduce(t).cpu().numpy() for t in (self.n, self.sum, self.outer))
        mean = total / n
        return mean, (outer - n * np.outer(mean, mean)) / max(n - 1, 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2) of two Gaussians (Heusel et al. 2017): numpy float64, also singular ones."""
    def factor(cov):                                                                     # A [D,rank] with A A^T = cov
        lower, order, r, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)                    # pivoted Cholesky: also without full rank
        a = np.empty_like(lower[:, :r])
        a[order - 1] = np.tril(lower)[:, :r]
        return a

    # tr (C1 C2)^1/2 = sum of the singular values of A1^T A2. They are the roots of the eigenvalues of C1^1/2 C2 C1^1/2, but found
    # without squaring first: a root of rounding noise would add 1e-8 for every dimension that n images leave empty.
    cross = scipy.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


# ------------------------------------------------------------------ probe

# DINOv3's grid; the rates are for a batch of 256 and grow with it.
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
PROBE_BATCH = 1024
SAVE_EVERY = 500                                # iterations of the full probe
HOLD = 3                                        # every third training image has a say in the choice of the learning rate
NEIGHBOURS = (10, 20)                           # k of k-NN


class Heads(nn.Module):
    """Linear classifiers for each of K kinds of feature, 2 R of each for R learning rates: features [B,D] -> logits [B,K,2 R,classes].

    The first R choose the rate: they are not trained on the images held out, every HOLD-th. The others are, and give the result.
    """

    def __init__(self, kinds, classes):
        super().__init__()
        self.kinds, self.rates = kinds, 2 * RATES
        self.linear = nn.ModuleList(nn.Linear(c.stop - c.start, len(self.rates) * classes) for c in kinds.values())
        for linear in self.linear:
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, features):
        logits = [linear(features[:, columns]) for linear, columns in zip(self.linear, self.kinds.values())]
        return torch.stack(logits, 1).unflatten(2, (len(self.rates), -1))                # [B,K,2 R,classes]


def cross_entropy(logits, labels):
    """Of each image and head: logits [B,K,ways,classes], labels [B] -> [B,K,ways]."""
    labels = labels[:, None, None].expand(logits.shape[:3])
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)


def draws(i, n, batch):
    """This rank's part of batch i of endless permutations of 0 .. n-1: a list of (index, number of the draw)."""
    numbers = range(i * batch, (i + 1) * batch)[rank()::world()]
    return [(permutation(n, number // n)[number % n], number) for number in numbers]


@functools.lru_cache(2)
def permutation(n, epoch):
    return np.random.default_rng([0, epoch]).permutation(n)


def train_heads(heads, stream, batch, iterations, state=None):
    """Train the heads on stream(start) of (index [B], features [B,D], labels [B]): SGD 0.9, no weight decay, cosine, cross entropy.

    `state`: a file to resume from and to save to.
    """
    model = nn.parallel.DistributedDataParallel(heads) if dist.is_initialized() else heads
    # A step of SGD is linear in the gradient: a rate as the factor of a head's loss is its learning rate.
    rates = torch.tensor(heads.rates, device=heads.linear[0].weight.device)
    optimizer = torch.optim.SGD(heads.parameters(), lr=batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    parts, start = {"heads": heads, "optimizer": optimizer, "schedule": schedule}, 0
    if state and state.exists():
        saved = torch_load(state)
        start = saved["iteration"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for i, (index, features, labels) in enumerate(stream(start), start + 1):
        # the heads that choose the rate do not see the images held out, and weigh the others so much the more
        seen = (index % HOLD != HOLD - 1).to(features) * HOLD / (HOLD - 1)
        weight = torch.stack([seen, torch.ones_like(seen)], 1).repeat_interleave(len(RATES), 1)         # [B,2 R]
        # a sum over kinds and rates: each head sees its own cross entropy alone, a mean over the `batch` images of all ranks
        loss = (rates * weight[:, None] * cross_entropy(model(features), labels)).sum() * world() / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if state and i % SAVE_EVERY == 0 and i < iterations and rank() == 0:
            write(state, lambda file: torch.save({"iteration": i} | {name: p.state_dict() for name, p in parts.items()}, file))


@torch.no_grad()
def tally(predict, stream, kinds, ways, device):
    """{kind: (% right, mean cross entropy) [ways]} of predict(features [B,D]) -> logits [B,K,ways,classes] over all ranks' stream."""
    sums = torch.zeros(3, len(kinds), ways, dtype=torch.float64, device=device)
    for _, features, labels in stream:
        logits = predict(features)
        right = (logits.argmax(-1) == labels[:, None, None]).double()                    # [B,K,ways]
        sums += torch.stack([right, cross_entropy(logits, labels).double(), torch.ones_like(right)]).sum(1)
    right, loss, n = all_reduce(sums).cpu()
    return dict(zip(kinds, zip(100 * right / n, loss / n)))


def choose(right, loss, n):
    """The number of the best head by % right [R] and cross entropy [R] on n images.

    Accuracies within two standard errors are taken as equal, and the loss decides, which is far less noisy: of 100 images each
    is a whole point. With a third of ImageNet two standard errors are 0.1 points.
    """
    best = right.max()
    error = (best * (100 - best) / n).sqrt()
    return min((i for i in range(len(right)) if right[i] >= best - 2 * error), key=lambda i: loss[i])


def neighbours(bank, labels, kinds, classes):
    """DINO's k-NN for `tally`: votes [B,K,2,classes] of the k nearest in bank [n,D] by cosine, each of exp(cosine / 0.07)."""
    banks = [F.normalize(bank[:, columns].float(), dim=1).T for columns in kinds.values()]               # K x [D,n]

    def votes(features):
        found = features.new_zeros(len(features), len(kinds), len(NEIGHBOURS), classes)
        for i, columns in enumerate(kinds.values()):
            similar = F.normalize(features[:, columns], dim=1) @ banks[i]                                # [B,n]
            cosine, index = similar.topk(min(max(NEIGHBOURS), len(bank)))
            for j, k in enumerate(NEIGHBOURS):
                found[:, i, j].scatter_add_(1, labels[index[:, :k]], (cosine[:, :k] / 0.07).exp())
        return found
    return votes


def feature_file(model, crops, embed, args, folder):
    """The features of all crops, a memory-mapped fp16 array [n,D].

    The file's name holds a hash of weights, kind of device, images (path, size, time) and crop: it is reused when all agree, and an interrupted
    pass goes on where it stopped. Under torchrun every rank writes its own rows, so all must see the same folder.
    """
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in crops.files]
    path = folder / f"features-{digest(model.digest, model.device.type, crops.size, files)}.npy"        # bf16 on a GPU, see `embed`
    part = path.with_suffix(".tmp")
    if rank() == 0 and model.digest is None:    # weights that cannot be seen may have changed
        path.unlink(missing_ok=True)
        part.unlink(missing_ok=True)

    def zeros(file):
        np.lib.format.open_memmap(file.name, mode="w+", dtype=np.float16, shape=(len(files), model.width)).flush()
        if hasattr(os, "posix_fallocate"):      # a disk too small is an error here, and a crash while the map is written
            os.posix_fallocate(file.fileno(), 0, os.stat(file.name).st_size)
    if rank() == 0 and not path.exists() and not part.exists():
        write(part, zeros)
    barrier()
    if not path.exists():
        rows = np.lib.format.open_memmap(part, mode="r+")
        # a row of zeros has not been written: no network gives one
        todo = [s for s in shares(range(len(files)), args.batch) if not rows[s.start:s.stop].any(1).all()]
        for index, x, _ in batches(crops, todo, args, "features"):
            half = embed(x).half()
            if not half.isfinite().all():
                raise ValueError(f"the features of {model.name} do not fit fp16, NaN or beyond 65504: use --probe full")
            rows[index] = half.cpu().numpy()
        rows.flush()
        barrier()
        if rank() == 0:
            os.replace(part, path)
        barrier()
    return np.load(path, mmap_mode="c")        # copy on write: the file stays as it is


def check_probe(train, test, args):
    """ValueError unless `probe` can work with these ImageFolders."""
    if differ := set(train.classes) ^ set(test.classes):
        raise ValueError(f"the probe trains on the class folders of --train and scores those of --data, and {min(differ)} is in one of them "
                         "alone: pass others, use --split parity, or --skip probe")
    if len(train.classes) < 2:
        raise ValueError(f"the probe needs two or more class folders, and there is {train.classes[0]} alone: --skip probe goes without")
    if args.probe != "knn" and len(train) < HOLD:
        raise ValueError(f"the linear probe needs {HOLD} training images or more, not {len(train)}: use --probe knn")


def probe(model, train, test, args, folder):
    """{"probe": {kind: % of `test` right}, ...}: DINOv3's linear probe, or k-NN, on what is in front of the bottleneck.

    train, test: ImageFolders with the same classes. --probe full: 12 500 iterations of 1024 random crops; cached: the same
    heads on one centre crop an image; knn. The learning rate is chosen on a third of *train* (DINOv3 chooses it on test).
    """
    crops, n, classes, device = Crops(args.size, train, test), len(train), len(train.classes), model.device
    tests, held = np.arange(n, n + len(test)), np.arange(HOLD - 1, n, HOLD)

    @torch.no_grad()
    def embed(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            # the encoder sees --batch images at a time, whatever the probe's batch
            return torch.cat([model.features(to_float(part.to(device)))[0].float() for part in x.split(args.batch)])

    labels = torch.tensor(crops.labels, device=device)
    rows = None if args.probe == "full" else feature_file(model, crops, embed, args, folder)

    def stream(steps, desc, count=None):
        """(index [B], features [B,D], labels [B]) of each of the `count` batches in `steps`."""
        if rows is None:
            for index, x, _ in batches(crops, steps, args, desc, count):
                index = index.to(device)
                yield index, embed(x), labels[index]
        else:
            for step in tqdm(steps, desc, count, unit="batch", disable=rank() != 0):
                index = torch.as_tensor(step, device=device)
                yield index, torch.from_numpy(rows[step]).to(device).float(), labels[index]

    def tally_over(index, predict, ways, desc):
        return tally(predict, stream(shares(index, args.batch), desc), model.kinds, ways, device)

    if args.probe == "knn":
        votes = neighbours(torch.from_numpy(rows[:n]).to(device), labels, model.kinds, classes)
        found = tally_over(tests, votes, len(NEIGHBOURS), "probe test")
        return {name: {kind: right[i].item() for kind, (right, _) in found.items()} for i, name in ((0, "probe"), (1, "probe_k20"))}

    batch = min(PROBE_BATCH, n)

    def training(start):
        steps = (draws(i, n, batch) for i in range(start, args.probe_iterations))
        if args.probe != "full":
            steps = ([i for i, _ in step] for step in steps)                             # centre crops are not drawn
        return stream(steps, "probe", args.probe_iterations - start)

    torch.manual_seed(0)
    heads, state = Heads(model.kinds, classes).to(device), None
    if args.probe == "full" and model.digest:
        state = folder / f"probe-{digest(model.digest, args.size, args.probe_iterations, batch, train.files)}.tmp"
    train_heads(heads, training, batch, args.probe_iterations, state)
    R, ways, result = len(RATES), len(heads.rates), {"probe": {}, "probe_rate": {}}
    choice, final = tally_over(held, heads, ways, "probe choice"), tally_over(tests, heads, ways, "probe test")
    if state and rank() == 0:
        state.unlink(missing_ok=True)
    for kind, (right, loss) in choice.items():
        i = choose(right[:R], loss[:R], len(held))
        result["probe"][kind], result["probe_rate"][kind] = final[kind][0][R + i].item(), RATES[i]
    return result


# ------------------------------------------------------------------ scores

def latent_sums(z):
    """z [B,C,...] -> [2,C]: sums over the images of the means over the positions of z and of z^2."""
    flat = z.transpose(0, 1).flatten(1).double()                                         # [C,B h w]
    return torch.stack([flat.mean(1), flat.square().mean(1)]) * len(z)


def latent_mean_std(sums, n):
    """(mean [C], std [C]) from the ranks' `latent_sums` [2,C] of n images in all. Every rank must call it."""
    mean, square = all_reduce(sums) / n
    return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def score(model, folder, lpips, inception, args):
    """PSNR, SSIM, LPIPS, rFID and the latent's statistics over `folder`, in one pass; rFID on the first rank alone."""
    device, n, began, seconds = model.device, len(folder), time.perf_counter(), defaultdict(float)

    def timed(part, function, *inputs):
        start = time.perf_counter()
        result = function(*inputs)
        if args.profile and device.type == "cuda":
            torch.cuda.synchronize()            # only when profiling: an ordinary run is never held up
        seconds[part] += time.perf_counter() - start
        return result

    def metrics(x, y, xhat, kl):
        """Of a batch: sums of images that are not finite, PSNR, SSIM, LPIPS, KL [5]."""
        bad = ~xhat.flatten(1).isfinite().all(1)
        rows = [bad, psnr(x, y), ssim(x, y), lpips(y / 127.5 - 1, x / 127.5 - 1) if lpips else bad, bad if kl is None else kl]
        return torch.stack([r.double().sum() for r in rows])

    real, fake = (Moments(args.fid_dims, device) if inception else None for _ in range(2))
    sums, moments = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in (5, (2, model.shape[0])))
    steps = shares(range(n), args.batch)
    for index, images, _ in batches(Crops(args.size, folder), steps, args, "scores"):
        x = to_float(images.to(device, non_blocking=True))                               # [B,3,S,S]
        z, kl = timed("encoder", model.latent, x, index[0].item())
        xhat = timed("decoder", model.decode, z)
        x8, y8 = to_uint8(x), to_uint8(xhat)                                             # x8 is the image itself, bit for bit
        sums += timed("metrics", metrics, x8, y8, xhat, kl)
        moments += timed("metrics", latent_sums, z)
        if inception:
            real.update(timed("Inception", inception, x8))
            fake.update(timed("Inception", inception, y8))
    if args.profile and rank() == 0:
        total = time.perf_counter() - began
        for part, s in ({"waiting for images": total - sum(seconds.values())} | seconds).items():
            print(f"{part:20} {sum(map(len, steps)) / s:8.1f} images/s {100 * s / total:5.1f} %")
    bad, *means = (all_reduce(sums) / n).tolist()
    if bad:
        raise ValueError(f"{model.name} made NaN or Inf of {bad * n:.0f} of {n} images: its numbers mean nothing")
    mean, std = latent_mean_std(moments, n)
    result = {"images": n, "psnr": means[0], "ssim": means[1]} | ({"lpips": means[2]} if lpips else {})
    result["latent"] = {"shape": model.shape, "mean": mean.mean().item(), "std": std.square().mean().sqrt().item(),
                        "std_min": std.min().item(), "std_max": std.max().item(), "kl": means[3] if model.posterior else None}
    gaussians = real.mean_cov() + fake.mean_cov() if inception else ()
    if gaussians and rank() == 0:
        result["rfid"] = frechet_distance(*gaussians)
        if n <= args.fid_dims:
            result["warning"] = f"rFID is unreliable: {n} images cannot fill a covariance of {args.fid_dims} dimensions"
    return result


@torch.no_grad()
def write_grid(model, folder, size, path):
    """Eight images of the set, evenly spaced, as a PNG: originals, reconstructions, |difference|."""
    crops, index = Crops(size, folder), np.linspace(0, len(folder) - 1, min(8, len(folder))).astype(int)
    x = to_float(torch.stack([crops[i][1] for i in index]))                              # [8,3,S,S]
    y = torch.cat([model.decode(model.latent(image[None].to(model.device), int(i))[0]) for image, i in zip(x, index)])
    y = y.clamp(-1, 1).cpu()
    save_grid(path, x, y, (x - y).abs() - 1)


# ------------------------------------------------------------------ one image, one small DiT

def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """AdaLN-zero (Peebles and Xie 2023): x [B,N,d], condition c [B,d] -> [B,N,d]."""

    def __init__(self, d):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, d // 64 if d % 64 == 0 else 1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.modulation = nn.Linear(d, 6 * d)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, 2)          # 6 x [B,1,d]
        h = modulate(x, shift1, scale1)
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class DiT(nn.Module):
    """A DiT of patch 1 without classes: z_t [B,N,n], t [B] in [0,1] -> [B,N,n].

    The last layer maps d to n, so the output lies in a space of d dimensions: hence the floor (n - d) / n of the loss on noise.
    """

    def __init__(self, N, n, d, depth):
        super().__init__()
        self.embed, self.position = nn.Linear(n, d), nn.Parameter(0.02 * torch.randn(1, N, d))
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.blocks = nn.ModuleList(DiTBlock(d) for _ in range(depth))
        self.modulation, self.out = nn.Linear(d, 2 * d), nn.Linear(d, n)
        for linear in [*(block.modulation for block in self.blocks), self.modulation, self.out]:
            nn.init.zeros_(linear.weight)       # zero: every block starts as the identity
            nn.init.zeros_(linear.bias)

    def forward(self, z, t):
        angle = 1000 * t[:, None] * 10000 ** (-torch.arange(128, device=t.device) / 128)                 # [B,128]
        c = self.time(torch.cat([angle.cos(), angle.sin()], 1))                          # [B,d]
        x = self.embed(z) + self.position                                                # [B,N,d]
        for block in self.blocks:
            x = block(x, c)
        return self.out(modulate(x, *self.modulation(c)[:, None].chunk(2, 2)))           # [B,N,n]


TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)               # where losses are compared; t 0 is the image, t 1 noise
STATE = "state.tmp"                             # of an unfinished run


def velocity(dit, z_t, t, target):
    """The velocity that the DiT predicts at z_t [B,N,n], t [B], itself or by way of the image (`x`: v = (z_t - x) / t)."""
    out = dit(z_t, t)
    return out if target == "v" else (z_t - out) / t.clamp(min=0.05)[:, None, None]      # 0.05 as in JiT: at t 0 it would divide by 0


def overfit(model, path, args, folder):
    """Train a DiT on the latent of one image and watch the latent loss and the decoded image; the records are also metrics.jsonl.

    Flow matching: z_t = (1 - t) z + t eps, loss = mean (vhat - v)^2 with v = eps - z, for both --target v and x. With
    --target v and width d < n the loss cannot go below (n - d) / n (RAE, Theorem 1); with x it can. t is uniform, then shifted
    for the dimension m = N n: t' = a t / (1 + (a - 1) t), a = sqrt(m / 4096). z has mean 0 and variance 1 over the image.
    An interrupted run goes on from its last record if weights, image and options are the same.
    """
    device, folder = model.device, folder / f"{slug(f'{model.name}-{path}')}-{digest(model.name, str(path))[:6]}"
    folder.mkdir(parents=True, exist_ok=True)
    image = torch.from_numpy(np.array(center_crop(load_image(path), args.size)))[None]
    x = to_float(image.to(device))                                                       # [1,3,S,S]
    x8 = to_uint8(x)
    with torch.no_grad():
        z = model.latent(x)[0]                                                           # [1,n,h,w]
        clean, shape, mean, std = model.decode(z), z.shape[1:], z.mean(), z.std()
    z = ((z - mean) / std).flatten(2).transpose(1, 2)                                    # [1,N,n]
    _, N, n = z.shape
    shift = math.sqrt(N * n / 4096)
    torch.manual_seed(0)
    dit = DiT(N, n, args.dit_width, args.dit_depth).to(device)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=args.dit_lr, weight_decay=0)
    fixed = torch.randn(len(TIMES), N, n, generator=torch.Generator().manual_seed(1)).to(device)
    at = torch.tensor(TIMES, device=device)
    generator, records, start = torch.Generator(device), [], 0

    options = {name: value for name, value in vars(args).items() if name.startswith(("dit_", "target", "size", "sample"))}
    key, state = digest(model.digest, options, image.numpy().tobytes()), folder / STATE
    if state.exists():
        saved = torch_load(state)
        if saved["key"] == key and model.digest:    # without it there are no weights to be seen: they may have changed
            records, start = saved["records"], saved["records"][-1]["step"]
            dit.load_state_dict(saved["dit"])
            optimizer.load_state_dict(saved["optimizer"])
        print(f"{folder}: " + (f"goes on at step {start}" if records else "starts again: model, image or options differ"))

    def decode(tokens):
        return model.decode((tokens * std + mean).transpose(1, 2).unflatten(2, shape[1:]))               # [B,N,n] -> [B,3,S,S]

    @torch.no_grad()
    def report(step):
        a = at[:, None, None]
        z_t = (1 - a) * z + a * fixed
        v = velocity(dit, z_t, at, args.target)
        images = torch.cat([decode(token[None]) for token in z_t - a * v])               # [5,3,S,S]
        sample, grid = fixed[:1], torch.linspace(1, 0, 26, device=device)
        for t, s in zip(grid[:-1], grid[1:]):                                            # Euler, 25 steps
            sample = sample + (s - t) * velocity(dit, sample, t[None], args.target)
        sample = decode(sample)
        losses = (v - (fixed - z)).square().flatten(1).mean(1)
        records.append({"step": step, "latent_loss": losses.mean().item(), "rgb_l1": (images - x).abs().mean().item(),
                        "rgb_psnr": psnr(x8, to_uint8(images)).mean().item(), "sample_psnr": psnr(x8, to_uint8(sample)).item(),
                        "latent_loss_at": dict(zip(map(str, TIMES), losses.tolist()))})
        # the image, its reconstruction, what the DiT makes of it from each time, and of pure noise
        save_grid(folder / f"{step:06}.png", torch.cat([x, clean, images, sample]))
        write(folder / "metrics.jsonl", lambda file: file.writelines(f"{json.dumps(r)}\n".encode() for r in records))
        parts = {"key": key, "records": records, "dit": dit.state_dict(), "optimizer": optimizer.state_dict()}
        write(state, lambda file: torch.save(parts, file))

    if not records:
        report(0)
    for step in tqdm(range(start + 1, args.dit_steps + 1), model.name[-30:], args.dit_steps, initial=start, unit="step"):
        generator.manual_seed(step)             # the draws of a step depend on its number alone: not on an interruption
        t = torch.rand(args.dit_batch, device=device, generator=generator)
        t = shift * t / (1 + (shift - 1) * t)
        a, eps = t[:, None, None], torch.randn(args.dit_batch, N, n, device=device, generator=generator)
        z_t = (1 - a) * z + a * eps
        # (z_t - z) / t is eps - z, and under the bound on t what --target x can reach
        v = eps - z if args.target == "v" else (z_t - z) / a.clamp(min=0.05)
        loss = F.mse_loss(velocity(dit, z_t, t, args.target), v)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(1, args.dit_steps // 20) == 0 or step == args.dit_steps:
            report(step)
    floor = max(0.0, (n - args.dit_width) / n) if args.target == "v" else 0.0
    return {"model": model.name, "image": str(path), "n": n, "tokens": N, "width": args.dit_width, "target": args.target,
            "floor": floor, "reconstruction_psnr": psnr(x8, to_uint8(clean)).item(), "records": records}


def overfit_all(args, device):
    """--overfit of every model on every image: a table of the last losses, the two rankings, overfit.json and curve.png."""
    if world() > 1:
        raise ValueError("--overfit trains on one device: run it without torchrun")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--overfit draws its curve with matplotlib, this project's extra `plot`: {error}") from error
    folder, models = args.out or Path("runs/overfit"), [load_model(spec, args, device) for spec in args.models]
    runs = [overfit(model, path, args, folder) for model in models for path in args.overfit]
    last, losses = [r | r["records"][-1] for r in runs], ("latent_loss", "rgb_l1")
    print_table(last, {"n": 0, "floor": 4} | dict.fromkeys(losses, 4) | {"rgb_psnr": 2, "sample_psnr": 2, "reconstruction_psnr": 2})
    ranking = {key: [f"{r['model']} {r['image']}" for r in sorted(last, key=lambda r: r[key])] for key in losses}
    figure = Figure(figsize=(10, 4), layout="tight")
    for axis, (key, order) in zip(figure.subplots(1, 2), ranking.items()):
        print(f"  best to worst by {key}: {', '.join(order)}")
        for r in runs:
            label = f"{r['model'][-30:]} {Path(r['image']).stem}"
            axis.semilogy([p["step"] for p in r["records"]], [p[key] for p in r["records"]], label=label)
        axis.set(xlabel="step", ylabel=key)
        axis.legend()
    write(folder / "curve.png", lambda file: figure.savefig(file, format="png"))
    write(folder / "overfit.json", lambda file: file.write(f"{json.dumps({'runs': runs, 'ranking': ranking}, indent=1)}\n".encode()))
    for state in folder.glob(f"*/{STATE}"):
        state.unlink()


# ------------------------------------------------------------------ latents on disk

def metadata(path):
    """The __metadata__ of a safetensors file that load_safetensors has accepted."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


@torch.no_grad()
def encode_folder(model, args):
    """Latents of all images of --encode: OUT with `mean` and `std` [C], and shards OUT-00000.safetensors.. beside it.

    A shard holds z [n,C,h,w] fp16, labels [n] and, in its metadata, the files' names. One that is there and was made by the same
    weights, images and crop is not made again. Under torchrun each rank makes its own shards.
    """
    folder, sums = ImageFolder(args.encode, option="--encode"), torch.zeros(2, model.shape[0], dtype=torch.float64)
    crops, names = Crops(args.size, folder), [str(Path(f).relative_to(args.encode)) for f in folder.files]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images = [(name, os.stat(f).st_size, os.stat(f).st_mtime_ns) for name, f in zip(names, folder.files)]
    key = digest(model.digest or model.name, args.size, args.sample, args.shard, images)
    paths = [args.out.with_name(f"{args.out.stem}-{i:05}.safetensors") for i in range(math.ceil(len(names) / args.shard))]
    for i, path in list(enumerate(paths))[rank()::world()]:
        shard = range(len(names))[i * args.shard:(i + 1) * args.shard]
        z = None
        if path.exists():
            z = load_safetensors(path).get("z")
            if metadata(path).get("key") != key:
                raise ValueError(f"{path} holds latents of another model, crop, --shard or images: delete it, or choose another --out")
        if z is None or model.digest is None:   # weights that cannot be seen may have changed
            steps = [shard[j:j + args.batch] for j in range(0, len(shard), args.batch)]
            z = torch.cat([model.latent(to_float(x.to(model.device)), index[0].item())[0].half().cpu()
                           for index, x, _ in batches(crops, steps, args, path.stem)])
            if not z.isfinite().all():
                raise ValueError(f"{model.name} makes latents that do not fit fp16, NaN or beyond 65504")
            save_safetensors({"z": z, "labels": torch.tensor(folder.labels[shard.start:shard.stop])}, path,
                             {"key": key, "names": json.dumps(names[shard.start:shard.stop])})
        sums += latent_sums(z)
    mean, std = latent_mean_std(sums.to(model.device), len(names))
    if rank() == 0:
        save_safetensors({"mean": mean.float(), "std": std.float()}, args.out,
                         {"key": key, "model": model.name, "size": str(args.size), "shards": json.dumps([p.name for p in paths])})
        print(f"{args.out}: mean and std of {len(names)} latents in {len(paths)} shards beside it")


@torch.no_grad()
def decode_file(model, args):
    """The images of --decode, an OUT of --encode or one shard, as PNGs in --out. An image that is there is not made again."""
    if not args.decode.is_file():
        raise ValueError(f"there is no file {args.decode} to decode: name one that --encode wrote")
    paths = [args.decode]
    if "z" not in load_safetensors(args.decode):
        paths = [args.decode.with_name(name) for name in json.loads(metadata(args.decode).get("shards", "[]"))]
    if not paths:
        raise ValueError(f"{args.decode} holds neither latents z nor a list of shards: name a file that --encode wrote")
    for path in paths[rank()::world()]:
        z = load_safetensors(path)["z"]
        names = json.loads(metadata(path).get("names", json.dumps([f"{path.stem}-{i:06}" for i in range(len(z))])))
        targets = [args.out / (name if name.endswith(".png") else name + ".png") for name in names]
        if z.shape[1] != model.shape[0]:
            raise ValueError(f"{path} holds latents of {z.shape[1]} channels, {model.name} takes {model.shape[0]}: name the one that made them")
        if len(set(targets)) < len(targets) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError(f"{path} names two latents alike, or a file outside of {args.out}: encode the images again under other names")
        todo = [i for i, target in enumerate(targets) if not target.exists()]
        if len(todo) < len(targets):
            print(f"{args.out}: {len(targets) - len(todo)} of the {len(targets)} images of {path.name} are there already and stay as they are")
        for i in tqdm(range(0, len(todo), args.batch), path.stem, unit="batch", disable=rank() != 0):
            part = todo[i:i + args.batch]
            for j, image in zip(part, to_uint8(model.decode(z[part].float().to(model.device)))):
                targets[j].parent.mkdir(parents=True, exist_ok=True)
                png = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
                write(targets[j], lambda file: png.save(file, format="png"))


# ------------------------------------------------------------------ the command

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("models", nargs="+", metavar="MODEL", help="ckpt.pt, diffusers:NAME_OR_FOLDER or FILE.py:FACTORY")
    p.add_argument("--data", default="data/imagenet/val", metavar="DIR", help="the images to score (class folders for the probe)")
    p.add_argument("--train", default="data/imagenet/train", metavar="DIR", help="the probe's training images")
    p.add_argument("--split", choices=["parity"],
                   help="score the images at odd positions in each class of --data, and train the probe on the even ones")
    p.add_argument("--size", type=int, default=256, help="of the centre crop")
    p.add_argument("--sample", action="store_true", help="draw z from the posterior; default is its mean")
    p.add_argument("--skip", default="", metavar="A,B", help="leave out some of fid, lpips, probe")
    p.add_argument("--fid-dims", type=int, default=2048, choices=[64, 192, 768, 2048], help="Inception's features")
    p.add_argument("--fid-resize", default="tf1", choices=["tf1", "torch"], help="torch: pytorch-fid's")
    p.add_argument("--inception", default="weights/pt_inception-2015-12-05-6726825d.pth", metavar="FILE", help="its weights")
    p.add_argument("--lpips-net", default="vgg", choices=["vgg", "alex", "squeeze"], help="LPIPS' trunk")
    p.add_argument("--lpips-weights", default="weights/vgg16-397923af.pth", metavar="FILE", help="torchvision's file of that net")
    p.add_argument("--probe", default="full", choices=["full", "cached", "knn"], help="linear on random crops, linear on centre crops, k-NN")
    p.add_argument("--probe-iterations", type=int, default=12500, help="of the linear ones")
    p.add_argument("--batch", type=int, default=32, help="images at a time on each device")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="processes that decode images, for each device")
    p.add_argument("--out", type=Path, metavar="PATH", help="JSON file (default beside the checkpoint)")
    p.add_argument("--profile", action="store_true", help="images/s by part")
    p.add_argument("--encode", metavar="DIR", help="write the latents of the images in DIR to --out FILE.safetensors")
    p.add_argument("--shard", type=int, default=1024, help="latents in a file of --encode (1024 of 1280x16x16 are 0.7 GB)")
    p.add_argument("--decode", type=Path, metavar="FILE", help="write the images of latents to the folder --out")
    p.add_argument("--overfit", nargs="+", metavar="IMAGE", help="train a DiT on each latent; --out is a folder (runs/overfit)")
    p.add_argument("--target", default="v", choices=["v", "x"], help="what the DiT predicts; the loss is of v either way")
    for name, default in (("width", 384), ("depth", 12), ("steps", 1200), ("batch", 32), ("lr", 2e-4)):
        p.add_argument(f"--dit-{name}", type=type(default), default=default, help="of --overfit")
    args = p.parse_args(argv)
    args.skip = set(filter(None, args.skip.split(",")))
    if args.skip - {"fid", "lpips", "probe"}:
        p.error(f"--skip takes fid, lpips and probe, not {','.join(sorted(args.skip))}")
    counts = ("batch", "probe_iterations", "shard", "dit_width", "dit_depth", "dit_steps", "dit_batch")
    for name, least in ({"size": 16, "workers": 0} | dict.fromkeys(counts, 1)).items():
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be {least} or more")
    modes = [m for m in ("encode", "decode", "overfit") if getattr(args, m)]
    if len(modes) > 1:
        p.error("give one of --encode, --decode, --overfit")
    if len(args.models) > 1 and not args.overfit and (modes or args.out):
        p.error("--encode, --decode and --out go with one model: drop the option, or name the models one by one")
    if (args.encode or args.decode) and not args.out:
        p.error("--encode needs --out FILE.safetensors, --decode needs --out DIR")
    folder_wanted = bool(args.decode or args.overfit)
    if args.out and args.out.exists() and not (args.out.is_dir() if folder_wanted else args.out.is_file()):      # a device is neither
        raise ValueError(f"--out {args.out} is no {'folder' if folder_wanted else 'file'}: name another")
    for spec in args.models:
        file = spec.rpartition(":")[0] if ".py:" in spec else spec
        if file.endswith(".py") and file == spec:
            raise ValueError(f"{spec} needs the name of a function in it: {spec}:FACTORY")
        if not spec.startswith("diffusers:") and not Path(file).is_file():
            raise ValueError(f"there is no file {file}: name a checkpoint of train.py, diffusers:NAME_OR_FOLDER or FILE.py:FACTORY")
    return args


def main(argv=None):
    args = parse(argv)
    if "RANK" in os.environ:                    # torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)           # what NCCL and its barrier take
    # fp32 means fp32: TF32 alone moves an rFID in the third digit
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.encode or args.decode:
        (encode_folder if args.encode else decode_file)(load_model(args.models[0], args, device), args)
    else:
        (overfit_all if args.overfit else score_all)(args, device)
    if dist.is_initialized():                   # not after an error: it would wait for the ranks that have met none
        dist.destroy_process_group()


def score_all(args, device):
    """Score every model on the command line: a JSON and a grid for each, one table at the end."""
    test, train, lpips, inception, rows = ImageFolder(args.data, split="odd" if args.split else "all"), None, None, None, []
    if "probe" not in args.skip:
        train = ImageFolder(args.data, split="even") if args.split else ImageFolder(args.train, option="--train, or --skip probe")
        check_probe(train, test, args)
    if "lpips" not in args.skip:
        lpips = LPIPS(args.lpips_net, args.lpips_weights).to(device)
    if "fid" not in args.skip:
        inception = FIDInception(args.inception, args.fid_dims, args.fid_resize).to(device)
    for spec in args.models:
        model = load_model(spec, args, device)
        beside = Path(spec).with_suffix(".eval.json") if isinstance(model.model, SAE) else Path("runs") / slug(spec) / "eval.json"
        out = args.out or beside
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"model": spec, "weights_sha256": model.digest, "protocol": protocol(model, args)}
        result |= score(model, test, lpips, inception, args)

        def write_result(more):
            if rank() == 0:
                write(out, lambda file: file.write(f"{json.dumps(result | more, indent=1)}\n".encode()))
        if rank() == 0:
            write_grid(model, test, args.size, out.with_suffix(".png"))
        if train:
            write_result({"unfinished": "probe"})       # which can take hours: the rest is not lost with it
            result |= probe(model, train, test, args, out.parent)
        write_result({})
        rows.append({f"probe {kind}": right for kind, right in result.get("probe", {}).items()} | result)
    if rank() == 0:
        probes = {f"probe {kind}": 2 for kind in ("cls+patch", "patch", "mu")}
        print_table(rows, {"images": 0} | probes | {"psnr": 2, "ssim": 4, "lpips": 4, "rfid": 3})
        for line in [r["warning"] for r in rows if "warning" in r] + [f"{k}: {v}" for k, v in rows[-1]["protocol"].items()]:
            print(" ", line)


def protocol(model, args):
    """What the numbers mean: printed under the table and kept in the JSON."""
    z = "drawn from the posterior" if args.sample else "the posterior's mean, where there is a posterior"
    heads = f"{args.probe_iterations} iterations, the learning rate chosen on a third of the training images"
    features = f"{'bf16' if model.device.type == 'cuda' else 'fp32'} encoder"
    lines = {
        "images": f"{args.data}{', odd positions of each class' if args.split else ''}: ADM centre crop {args.size}, "
                  "both sides rounded to uint8",
        "model": f"{'EMA weights, ' if isinstance(model.model, SAE) else ''}z {z}, fp32",
        "psnr": "RGB, range 255, mean over images",
        "ssim": "11 taps, sigma 1.5, per channel, reflect padding, full map",
        "lpips": f"{args.lpips_net}, version 0.1",
        "fid": f"{args.fid_dims} features of {Path(args.inception).name}, {args.fid_resize} resize to 299, fp32",
        "probe": {"knn": f"k-NN, k 10, T 0.07, on centre crops, {features}, kept in fp16",
                  "cached": f"linear, on centre crops, {heads}, {features}, kept in fp16",
                  "full": f"linear, on random crops, {heads}, {features}"}[args.probe],
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"}
    return {key: line for key, line in lines.items() if key not in args.skip}


def print_table(rows, columns):
    """One line a row: its model, then the columns {key: digits}, those that no row has left out."""
    columns = {key: digits for key, digits in columns.items() if any(key in r for r in rows)}
    print(f"{'model':40}", *(f"{key:>{len(key) + 2}}" for key in columns))
    for r in rows:
        cells = (f"{r[key]:.{digits}f}" if key in r else "-" for key, digits in columns.items())
        print(f"{r['model'][-40:]:40}", *(f"{cell:>{len(key) + 2}}" for key, cell in zip(columns, cells)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
    except OSError as error:                    # a full disk's error names no file
        sys.exit(f"eval.py: {error.filename or 'writing the results'}: {error.strerror or error}")
