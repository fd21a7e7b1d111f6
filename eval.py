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
import hashlib
import itertools
import json
import os
import pickle
import platform
import re
import runpy
import sys
import time
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
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
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop
from tqdm import tqdm

from sae import SAE, Posterior, load_safetensors, save_safetensors
from train import LPIPS, ImageFolder, center_crop, load_image, to_float, to_uint8


# ------------------------------------------------------------------ ranks and images

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(t):
    """The sum of t over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


class Crops(Dataset):
    """Item i: (uint8 [S,S,3], label) of file i by ADM's centre crop. With `augment`, item (i, seed): the probe's random crop."""

    def __init__(self, folder, size, augment=False):
        self.files, self.labels, self.size = folder.files, folder.labels, size
        self.augment = Compose([RandomResizedCrop(size), RandomHorizontalFlip()]) if augment else None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, item):
        i, seed = item if self.augment else (item, None)
        try:
            image = load_image(self.files[i])
        except ValueError as error:
            return error                        # returned, not raised: a worker's exception would arrive as a page of traceback
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)         # the crop depends on the draw alone: not on workers, ranks or a resume
                image = self.augment(image)
        else:
            image = center_crop(image, self.size)
        return torch.from_numpy(np.array(image)), self.labels[i]


def collate(items):
    return next((x for x in items if isinstance(x, ValueError)), None) or default_collate(items)


def shares(n, batch):
    """This rank's batches of 0 .. n-1: every world-th run of `batch` consecutive indices. No index is missed or counted twice,
    and a batch is the same on whichever rank it falls, so that the sums do not depend on the number of ranks."""
    return [range(i, min(i + batch, n)) for i in range(0, n, batch)][rank()::world()]


def batches(data, indices, total, args, desc):
    """(x uint8 [B,S,S,3], labels [B]) for each list in `indices`, `total` images in all; progress on rank 0."""
    loader = DataLoader(data, batch_sampler=indices, num_workers=args.workers, collate_fn=collate, pin_memory=torch.cuda.is_available())
    with tqdm(total=total, desc=desc, unit="img", disable=rank() != 0) as bar:
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
            bar.update(len(batch[1]))


def barrier():
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------ autoencoders

class Peer:
    """An object with encode(x) -> z [B,C,...] and decode(z) -> xhat, behind the three methods that the metrics use."""
    protocol = "latent = encode(x)"

    def __init__(self, model, name, device, sample=False):
        if sample:
            raise ValueError(f"--sample draws z from a posterior, and {name} has none: leave --sample out")
        self.model, self.name, self.device = model, name, device
        self.digest = None                      # of a model that is no torch module nothing is known: its features are never reused
        if isinstance(model, nn.Module):
            model.to(device).eval().requires_grad_(False)
            h = hashlib.sha256()
            for key, t in model.state_dict().items():
                if t.is_floating_point() and not t.isfinite().all():
                    raise ValueError(f"{name} holds NaN or Inf in {key}: the run that wrote it has diverged, take an earlier checkpoint")
                h.update(key.encode() + t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self.digest = h.hexdigest()

    def latent(self, x, first=0):
        """x [B,3,H,W] in [-1,1], the images first .. first+B-1 -> z [B,C,...], KL to N(0,I) in nats [B] or None."""
        z = self.model.encode(x)
        if not torch.is_tensor(z) or z.dim() < 3 or len(z) != len(x):
            raise ValueError(f"encode of {self.name} must return a tensor [B,C,...] for {len(x)} images, not {getattr(z, 'shape', type(z))}")
        return z, None

    def decode(self, z):
        """z -> xhat [B,3,H,W], about [-1,1]."""
        return self.model.decode(z)

    def features(self, x):
        """What the probe sees [B,D]: the parts that `kinds` names, side by side."""
        return self.latent(x)[0].flatten(2).mean(2)                                      # [B,C]

    def kinds(self, size):
        """Name -> columns of `features`; `mu` is the latent averaged over the positions."""
        return {"mu": slice(0, self.latent(torch.zeros(1, 3, size, size, device=self.device))[0].shape[1])}


class Gaussian(Peer):
    """An autoencoder whose encoder gives a Posterior: z is its mean, or a draw."""

    def __init__(self, model, name, device, sample=False):
        super().__init__(model, name, device)
        self.sample, self.protocol = sample, "latent = " + ("a draw from the posterior" if sample else "posterior mean")

    def latent(self, x, first=0):
        q = self.posterior(x)
        # The noise of an image depends on its place in the set alone, so neither batch size nor ranks change a number.
        z = q.sample(seed=0, offset=first * q.mu[0].numel()) if self.sample else q.mode()
        return z, q.kl()


class Semantic(Gaussian):
    """A checkpoint of train.py."""

    def __init__(self, path, device, sample=False):
        super().__init__(SAE.from_pretrained(path), str(path), device, sample)
        self.protocol = "EMA weights, " + self.protocol

    def posterior(self, x):
        return self.model.encode(x)

    def features(self, x):
        cls, _, patches = self.model.encoder(x)
        q = self.model.posterior(patches, x.shape[2] // self.model.encoder.patch, x.shape[3] // self.model.encoder.patch)
        return torch.cat([cls, patches.mean(1), q.mu.mean((2, 3))], 1)                   # [B,2 D + z_dim]

    def kinds(self, size):
        D, z = self.model.config.encoder.width, self.model.config.z_dim
        # The teacher's MSE holds the patch tokens alone and CLS may drift, so the patch tokens stand by themselves too.
        return {"cls+patch": slice(0, 2 * D), "patch": slice(D, 2 * D), "mu": slice(2 * D, 2 * D + z)}


class KL(Gaussian):
    """diffusers' AutoencoderKL (SD-VAE and its like)."""

    def posterior(self, x):
        q = self.model.encode(x).latent_dist
        return Posterior(q.mean, q.logvar)

    def decode(self, z):
        return self.model.decode(z).sample


class DC(Peer):
    """diffusers' AutoencoderDC (DC-AE)."""

    def latent(self, x, first=0):
        return self.model.encode(x).latent, None

    def decode(self, z):
        return self.model.decode(z).sample


class RAE(DC):
    """diffusers' AutoencoderRAE (R-AE): its images are in [0,1]."""

    def latent(self, x, first=0):
        return super().latent((x + 1) / 2)

    def decode(self, z):
        return super().decode(z) * 2 - 1


def load_model(spec, device, sample=False):
    """The autoencoder that `spec` names; see the top of this file. Raises ValueError, one sentence."""
    file, _, factory = spec.rpartition(":")
    if file.endswith(".py"):
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file} to take {factory} from")
        sys.path.insert(0, str(Path(file).parent))           # so that it finds its own neighbours
        make = runpy.run_path(file).get(factory)
        if make is None:
            raise ValueError(f"{file} defines no {factory}")
        model = make()
        if not (callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))):
            raise ValueError(f"{factory}() of {file} must return an object with encode(x) -> z and decode(z) -> xhat, not a {type(model).__name__}")
        return Peer(model, spec, device, sample)
    if spec.startswith("diffusers:"):
        try:
            import diffusers
        except ImportError:
            raise ValueError(f"{spec} needs diffusers: pip install diffusers transformers, or this project's extra `peers`") from None
        try:
            model = diffusers.AutoModel.from_pretrained(spec.removeprefix("diffusers:"))
        except (OSError, ValueError) as error:
            raise ValueError(f"diffusers cannot load {spec}: {' '.join(str(error).split())}") from error
        wrapper = {"AutoencoderKL": KL, "AutoencoderDC": DC, "AutoencoderRAE": RAE}.get(type(model).__name__)
        if wrapper is None:
            raise ValueError(f"{spec} is a {type(model).__name__}: AutoencoderKL, AutoencoderDC and AutoencoderRAE are scored, others by FILE.py:FACTORY")
        return wrapper(model, spec, device, sample)
    return Semantic(spec, device, sample)


# ------------------------------------------------------------------ PSNR, SSIM

def psnr(x, y):
    """10 log10(255^2 / mean (x - y)^2) of each image, in dB: uint8 [B,3,H,W] twice -> [B]; Inf for equal images."""
    return 10 * torch.log10(255 ** 2 / (x.float() - y.float()).square().flatten(1).mean(1))


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
    """TensorFlow 1's bilinear resize: output i reads at i * in/out, with no half-pixel shift. fp32 [B,C,H,W] -> [B,C,size,size]."""
    for dim in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = at.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (at - low).view(-1, 1) if dim == 2 else at - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


class TFPool:
    """Before one of torchvision's Inception blocks: the pool branch as TensorFlow's graph of 2015 has it."""

    def __init__(self, *args, pool=lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), **kwargs):
        super().__init__(*args, **kwargs)
        self.pool, self.tf_pool, self.branch_pool = pool, self.branch_pool, nn.Identity()

    def _forward(self, x):
        *branches, _ = super()._forward(x)
        return [*branches, self.tf_pool(self.pool(x))]


class PoolA(TFPool, InceptionA):
    pass


class PoolC(TFPool, InceptionC):
    pass


class PoolE(TFPool, InceptionE):
    pass


class FIDInception(nn.Module):
    """The Inception of FID (pt_inception-2015-12-05, torchvision's names, 1008 classes): uint8 [B,3,H,W] -> features [B,dims], fp32.

    dims 64, 192, 768 or 2048: averaged over the positions after the first and second pool, Mixed_6e, Mixed_7c.
    resize "tf1", or "torch" for pytorch-fid's variant. Raises ValueError when the file is another network's.
    """

    def __init__(self, path, dims=2048, resize="tf1"):
        super().__init__()
        taps = {64: "pool1", 192: "pool2", 768: "Mixed_6e", 2048: "Mixed_7c"}
        net = [("Conv2d_1a_3x3", BasicConv2d(3, 32, kernel_size=3, stride=2)), ("Conv2d_2a_3x3", BasicConv2d(32, 32, kernel_size=3)),
               ("Conv2d_2b_3x3", BasicConv2d(32, 64, kernel_size=3, padding=1)), ("pool1", nn.MaxPool2d(3, 2)),
               ("Conv2d_3b_1x1", BasicConv2d(64, 80, kernel_size=1)), ("Conv2d_4a_3x3", BasicConv2d(80, 192, kernel_size=3)),
               ("pool2", nn.MaxPool2d(3, 2)),
               ("Mixed_5b", PoolA(192, 32)), ("Mixed_5c", PoolA(256, 64)), ("Mixed_5d", PoolA(288, 64)), ("Mixed_6a", InceptionB(288)),
               ("Mixed_6b", PoolC(768, 128)), ("Mixed_6c", PoolC(768, 160)), ("Mixed_6d", PoolC(768, 160)), ("Mixed_6e", PoolC(768, 192)),
               ("Mixed_7a", InceptionD(768)), ("Mixed_7b", PoolE(1280)),
               ("Mixed_7c", PoolE(2048, pool=lambda x: F.max_pool2d(x, 3, 1, 1)))]       # a maximum: a slip that every FID has kept
        self.net = nn.Sequential(OrderedDict(net[:[name for name, _ in net].index(taps[dims]) + 1]))
        self.dims, self.resize = dims, resize
        self.load(Path(path))
        for m in self.net.modules():
            if isinstance(m, BasicConv2d):      # batch norm goes into the convolution: a third less memory traffic
                m.conv, m.bn = nn.utils.fusion.fuse_conv_bn_eval(m.conv.eval(), m.bn.eval()), nn.Identity()
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def load(self, path):
        if not path.is_file():
            raise ValueError(f"there is no FID Inception {path}: ./weights.sh --only inception fetches it, --skip fid goes without")
        tensors = load_weights(path)
        wanted = {k: v for k, v in self.net.state_dict().items() if not k.endswith("num_batches_tracked")}
        found = {k.replace("branch_pool", "tf_pool"): v for k, v in tensors.items()}
        wrong = [k for k, v in wanted.items() if k not in found or found[k].shape != v.shape]
        # torchvision's own Inception has the same names and other weights: its 1000 classes give it away.
        classes = len(found["fc.weight"]) if "fc.weight" in found else 1008
        if wrong or classes != 1008:
            what = f"{classes} classes, not 1008" if not wrong else f"no {wrong[0].replace('tf_pool', 'branch_pool')} of the right shape"
            raise ValueError(f"{path} is not the FID Inception for {self.dims} features ({what}): ./weights.sh --only inception fetches it")
        self.net.load_state_dict({k: found.get(k, v) for k, v in self.net.state_dict().items()})

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
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dims, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dims, dims, dtype=torch.float64, device=device)

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
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2) of two Gaussians, numpy float64, any rank (Heusel et al. 2017)."""
    def factor(cov):                                                                     # A with A A^T = cov
        value, vector = scipy.linalg.eigh(cov)
        return vector * np.sqrt(value.clip(min=0))

    # tr (C1 C2)^1/2 = sum of the singular values of A1^T A2. They are the roots of the eigenvalues of C1^1/2 C2 C1^1/2, but found
    # without squaring first: a root of rounding noise would add 1e-8 for every dimension that n images leave empty.
    cross = scipy.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def load_weights(path):
    """The dict of tensors in a .safetensors or a torch file. Raises ValueError, one sentence."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a weights file, or a damaged one: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not a dict of tensors")
    return tensors


# ------------------------------------------------------------------ linear probe

# DINOv3's grid; the rates are for a batch of 256 and grow with it.
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
PROBE_BATCH = 1024
SAVE_EVERY = 500                                # iterations of the full probe
HOLD = 10                                       # every tenth training image chooses the learning rate, and is not trained on


class Heads(nn.Module):
    """A linear classifier for each kind of feature and each learning rate: features [B,D] -> {kind: logits [R,B,classes]}."""

    def __init__(self, kinds, classes):
        super().__init__()
        self.kinds = kinds
        self.weight = nn.ModuleDict({k: nn.ParameterList(torch.randn(classes, s.stop - s.start) * 0.01 for _ in RATES) for k, s in kinds.items()})
        self.bias = nn.ModuleDict({k: nn.ParameterList(torch.zeros(classes) for _ in RATES) for k in kinds})

    def forward(self, features):
        logits = {}
        for kind, columns in self.kinds.items():
            # one product for all rates instead of thirteen; each keeps its own parameters, so the optimizer sees them apart
            out = F.linear(features[:, columns], torch.cat(list(self.weight[kind])), torch.cat(list(self.bias[kind])))
            logits[kind] = out.unflatten(1, (len(RATES), -1)).transpose(0, 1)            # [R,B,classes]
        return logits


def draws(n, batch, iterations, start=0):
    """This rank's share of the index batches number start .. iterations-1 from endless permutations of 0 .. n-1; each index
    with the number of its draw."""
    endless = itertools.chain.from_iterable(np.random.default_rng([0, epoch]).permutation(n) for epoch in itertools.count())
    numbered = zip(endless, itertools.count())
    for i in range(iterations):
        drawn = list(itertools.islice(numbered, batch))
        if i >= start:
            yield drawn[rank()::world()]


def train_heads(heads, stream, batch, iterations, state=None):
    """Train the heads on stream(start) of (features [B,D], labels [B]): SGD 0.9, no weight decay, cosine, cross entropy.
    `state`: a file to resume from and to save to."""
    model = nn.parallel.DistributedDataParallel(heads) if dist.is_initialized() else heads
    groups = [{"params": [p[i] for d in (heads.weight, heads.bias) for p in d.values()], "lr": r * batch / 256} for i, r in enumerate(RATES)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    parts, start = {"heads": heads, "optimizer": optimizer, "schedule": schedule}, 0
    if state and state.exists():
        saved = torch.load(state, map_location=next(heads.parameters()).device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start = saved["iteration"]
    for i, (features, labels) in enumerate(stream(start), start + 1):
        logits = model(features)
        # the sum over kinds and rates: each head sees its own mean cross entropy alone; `batch` counts the images of all ranks
        loss = sum(F.cross_entropy(l.flatten(0, 1), labels.repeat(len(RATES)), reduction="sum") for l in logits.values()) * world() / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if state and i % SAVE_EVERY == 0 and i < iterations and rank() == 0:
            save_atomic({"iteration": i} | {name: part.state_dict() for name, part in parts.items()}, state)


@torch.no_grad()
def score_heads(heads, stream):
    """{kind: (% right [R], mean cross entropy [R]) of each rate's head} over all ranks' (features [B,D], labels [B])."""
    sums = {kind: torch.zeros(3, len(RATES), dtype=torch.float64, device=next(heads.parameters()).device) for kind in heads.kinds}
    for features, labels in stream:
        for kind, logits in heads(features).items():
            loss = F.cross_entropy(logits.permute(1, 2, 0), labels[:, None].expand(-1, len(RATES)), reduction="none")       # [B,R]
            sums[kind] += torch.stack([(logits.argmax(-1) == labels).sum(1), loss.sum(0), torch.full_like(loss[0], len(labels))])
    totals = {kind: all_reduce(t).cpu() for kind, t in sums.items()}
    return {kind: (100 * right / n, loss / n) for kind, (right, loss, n) in totals.items()}


@torch.no_grad()
def knn_accuracy(bank, bank_labels, stream, kinds, classes):
    """{kind: {k: % right}}: votes of the k nearest by cosine, weighted exp(cosine / 0.07) (DINO's k-NN), k 10 and 20."""
    neighbours = {f"k{k}": min(k, len(bank)) for k in (10, 20)}
    right = {kind: torch.zeros(len(neighbours) + 1, dtype=torch.float64, device=bank.device) for kind in kinds}
    for features, labels in stream:
        for kind, columns in kinds.items():
            near = F.normalize(features[:, columns], dim=1) @ F.normalize(bank[:, columns].float(), dim=1).T          # [B,n]
            cosine, index = near.topk(max(neighbours.values()))
            for i, k in enumerate(neighbours.values()):
                votes = near.new_zeros(len(labels), classes).scatter_add_(1, bank_labels[index[:, :k]], (cosine[:, :k] / 0.07).exp())
                right[kind][i] += (votes.argmax(1) == labels).sum()
            right[kind][-1] += len(labels)
    totals = {kind: all_reduce(count) for kind, count in right.items()}
    return {kind: {k: float(100 * t[i] / t[-1]) for i, k in enumerate(neighbours)} for kind, t in totals.items()}


def feature_file(model, sets, embed, width, args, folder):
    """The features of all images of `sets`, one after the other: a read-only fp16 memory map [n, width].

    The file's name holds a hash of weights, images (path, size, time) and crop: it is reused when all agree, and an interrupted
    pass goes on where it stopped. Under torchrun every rank writes its own rows, so all must see the same folder.
    """
    h = hashlib.sha256(repr((model.digest, args.size, width)).encode())
    for path in (p for s in sets for p in s.files):
        stat = os.stat(path)
        h.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
    path = folder / f"features-{h.hexdigest()[:16]}.npy"
    part = path.with_suffix(".tmp")
    if model.digest is None and rank() == 0:
        path.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    shape = (sum(map(len, sets)), width)
    if rank() == 0 and not path.exists() and not part.exists():
        np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape).flush()
    barrier()
    if not path.exists():
        rows, first = np.lib.format.open_memmap(part, mode="r+"), 0
        for data in sets:
            # a row of zeros has not been written: no network gives one
            todo = [s for s in shares(len(data), args.batch) if not rows[first + s.start:first + s.stop].any(1).all()]
            for (x, _), s in zip(batches(data, todo, sum(map(len, todo)), args, "features"), todo):
                half = embed(x).half()
                if not half.isfinite().all():
                    raise ValueError(f"the features of {model.name} do not fit fp16, NaN or beyond 65504: use --probe full")
                rows[first + s.start:first + s.stop] = half.cpu().numpy()
            first += len(data)
        rows.flush()
        barrier()
        if rank() == 0:
            os.replace(part, path)
        barrier()
    return np.load(path, mmap_mode="r")


def probe(model, train, test, args, folder):
    """{"probe": {kind: % of `test` right}, ...}: DINOv3's linear probe, or k-NN, on what is in front of the bottleneck.

    train, test: ImageFolders with the same classes. --probe full: 12 500 iterations of 1024 random crops; cached: the same
    heads on one centre crop an image; knn. The learning rate is chosen on a tenth of *train* (DINOv3 chooses it on test).
    """
    if train.classes != test.classes or len(train.classes) < 2:
        raise ValueError(f"the probe needs the same two or more class folders to train and to test on, not {len(train.classes)} and "
                         f"{len(test.classes)}: pass --train DIR or --split parity, or --skip probe")
    device, classes = model.device, len(train.classes)
    kinds = model.kinds(args.size)
    width = max(s.stop for s in kinds.values())
    n, centre, tests = len(train), Crops(train, args.size), Crops(test, args.size)
    held, kept = np.arange(n)[HOLD - 1::HOLD], np.delete(np.arange(n), np.s_[HOLD - 1::HOLD])
    if args.probe != "knn" and not len(held):
        raise ValueError(f"the linear probe needs {HOLD} training images or more, not {n}: use --probe knn")

    @torch.no_grad()
    def embed(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model.features(to_float(x.to(device))).float()

    batch = min(PROBE_BATCH, len(kept))
    if args.probe == "full":
        augmented = Crops(train, args.size, augment=True)

        def stream(data, indices, total, desc):
            for x, labels in batches(data, indices, total, args, desc):
                # an encoder sees --batch images at a time, whatever the probe's batch
                yield torch.cat([embed(part) for part in x.split(args.batch)]), labels.to(device)

        def training(start):
            indices = ([(kept[i], draw) for i, draw in b] for b in draws(len(kept), batch, args.probe_iterations, start))
            return stream(augmented, indices, (args.probe_iterations - start) * batch // world(), "probe")

        def scoring(data, index):
            return stream(data, [index[s.start:s.stop].tolist() for s in shares(len(index), args.batch)], len(index) // world(), "probe test")
    else:
        rows = feature_file(model, [centre, tests], embed, width, args, folder)
        labels = torch.tensor(train.labels + test.labels)

        def take(index):
            return torch.from_numpy(rows[index]).to(device).float(), labels[index].to(device)

        def training(start):
            steps = draws(len(kept), batch, args.probe_iterations, start)
            for b in tqdm(steps, total=args.probe_iterations - start, desc="probe", unit="it", disable=rank() != 0):
                yield take(np.sort(kept[[i for i, _ in b]]))

        def scoring(data, index):
            return (take(index[s.start:s.stop] + (n if data is tests else 0)) for s in shares(len(index), PROBE_BATCH))

    if args.probe == "knn":
        found = knn_accuracy(*take(np.arange(n)), scoring(tests, np.arange(len(test))), kinds, classes)
        return {"probe": {k: v["k10"] for k, v in found.items()}, "probe_k20": {k: v["k20"] for k, v in found.items()}}
    torch.manual_seed(0)
    heads = Heads(kinds, classes).to(device)
    key = hashlib.sha256(repr((model.digest, args.size, args.probe_iterations, batch, [str(f) for f in train.files])).encode()).hexdigest()
    state = folder / f"probe-{key[:16]}.tmp" if args.probe == "full" and model.digest else None
    train_heads(heads, training, batch, args.probe_iterations, state)
    chosen, scores = score_heads(heads, scoring(centre, held)), score_heads(heads, scoring(tests, np.arange(len(test))))
    if state and rank() == 0:
        state.unlink(missing_ok=True)
    # of equals, and a small held-out set has many, the one with the smaller loss
    best = {kind: max(range(len(RATES)), key=lambda i: (accuracy[i], -loss[i])) for kind, (accuracy, loss) in chosen.items()}
    return {"probe": {kind: float(scores[kind][0][i]) for kind, i in best.items()}, "probe_rate": {kind: RATES[i] for kind, i in best.items()}}


# ------------------------------------------------------------------ scores

class Clock:
    """Seconds by part. It waits for the GPU only when profiling, so that an ordinary run is never held up."""

    def __init__(self, on):
        self.on, self.start, self.seconds = on, time.perf_counter(), defaultdict(float)

    @contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        if self.on and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - start

    def report(self, n):
        total = time.perf_counter() - self.start
        parts = {"waiting for images": total - sum(self.seconds.values())} | self.seconds
        print("".join(f"{part:20} {n / s:8.1f} images/s {100 * s / total:5.1f} %\n" for part, s in parts.items() if s))


@torch.no_grad()
def score(model, folder, lpips, inception, args):
    """PSNR, SSIM, LPIPS, rFID and the latent's statistics over the images of `folder`, in one pass; {} on all ranks but the first."""
    device, data, clock = model.device, Crops(folder, args.size), Clock(args.profile)
    sums = torch.zeros(6, dtype=torch.float64, device=device)                            # images, PSNR, SSIM, LPIPS, KL, not finite
    real, fake = (Moments(args.fid_dims, device) for _ in range(2)) if inception else (None, None)
    mu = model.kinds(args.size)["mu"]
    channels = torch.zeros(2, mu.stop - mu.start, dtype=torch.float64, device=device)    # sum z, sum z^2, an image counts as one
    mine = shares(len(data), args.batch)
    for (images, _), share in zip(batches(data, mine, sum(map(len, mine)), args, "scores"), mine):
        x = to_float(images.to(device, non_blocking=True))                               # [B,3,S,S]
        with clock("encoder"):
            z, kl = model.latent(x, share.start)
        with clock("decoder"):
            xhat = model.decode(z)
        if not torch.is_tensor(xhat) or xhat.shape != x.shape:
            raise ValueError(f"{model.name} makes {getattr(xhat, 'shape', type(xhat))} of images {list(x.shape)}: pass the --size that it was made for")
        with clock("metrics"):
            x8, y8 = to_uint8(x), to_uint8(xhat)                                         # x8 is the image itself, bit for bit
            bad = ~xhat.flatten(1).isfinite().all(1)
            rows = [torch.ones_like(bad), psnr(x8, y8), ssim(x8, y8), lpips(x, to_float(y8)) if lpips else bad, bad if kl is None else kl, bad]
            sums += torch.stack([r.double().sum() for r in rows])
            flat = z.transpose(0, 1).flatten(1).double()                                 # [C,B h w]
            channels += torch.stack([flat.mean(1), flat.square().mean(1)]) * len(x)
        if inception:
            with clock("inception"):
                real.update(inception(x8))
                fake.update(inception(y8))
    if args.profile and rank() == 0:
        clock.report(sum(map(len, mine)))
    n, *sums = all_reduce(sums).tolist()
    mean, square = all_reduce(channels) / n
    if sums[-1]:
        raise ValueError(f"{model.name} made NaN or Inf of {sums[-1]:.0f} of {n:.0f} images: its numbers mean nothing")
    gaussians = real.mean_cov() + fake.mean_cov() if inception else ()
    if rank():
        return {}
    std = (square - mean.square()).clamp(min=0).sqrt()
    result = {"images": int(n), "psnr": sums[0] / n, "ssim": sums[1] / n}
    result["latent"] = {"shape": list(z.shape[1:]), "mean": mean.mean().item(), "std": std.square().mean().sqrt().item(),
                        "std_min": std.min().item(), "std_max": std.max().item(), "kl": sums[3] / n if kl is not None else None}
    if lpips:
        result["lpips"] = sums[2] / n
    if inception:
        result["rfid"] = frechet_distance(*gaussians)
        if n <= args.fid_dims:
            result["warning"] = f"rFID is unreliable: {n:.0f} images cannot fill a covariance of {args.fid_dims} dimensions"
    return result


@torch.no_grad()
def write_grid(model, folder, size, path):
    """Eight images of the set, evenly spaced, as a PNG: originals, reconstructions, |difference|."""
    index = np.linspace(0, len(folder) - 1, min(8, len(folder))).astype(int)
    data = Crops(folder, size)
    x = to_float(torch.stack([data[i][0] for i in index]))                               # [8,3,S,S]
    y = torch.cat([model.decode(model.latent(x[i:i + 1].to(model.device), int(at))[0]) for i, at in enumerate(index)]).clamp(-1, 1).cpu()
    rows = torch.stack([x, y, (x - y).abs() - 1])                                        # [3,8,3,S,S]
    save_png(to_uint8(rows).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1), path)    # [3 S,8 S,3]


def save_png(image, path):
    """uint8 [H,W,3] -> a PNG file, whole or not at all."""
    Image.fromarray(image.cpu().numpy()).save(path.with_suffix(".tmp"), format="png")
    os.replace(path.with_suffix(".tmp"), path)


def save_atomic(value, path):
    torch.save(value, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def save_json(value, path):
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


# ------------------------------------------------------------------ main

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="MODEL", help="ckpt.pt, diffusers:NAME_OR_FOLDER or FILE.py:FACTORY")
    p.add_argument("--data", default="data/imagenet/val", metavar="DIR", help="the images to score (class folders for the probe)")
    p.add_argument("--train", metavar="DIR", help="the probe's training images (default data/imagenet/train)")
    p.add_argument("--split", choices=["parity"], help="in each class of --data, train the probe on the images at even positions, score the odd ones")
    p.add_argument("--size", type=int, default=256, help="of the centre crop (default 256)")
    p.add_argument("--sample", action="store_true", help="draw z from the posterior; default is its mean")
    p.add_argument("--skip", default="", metavar="A,B", help="leave out some of fid, lpips, probe, curve")
    p.add_argument("--fid-dims", type=int, default=2048, choices=[64, 192, 768, 2048])
    p.add_argument("--fid-resize", default="tf1", choices=["tf1", "torch"], help="torch: pytorch-fid's")
    p.add_argument("--inception", default="weights/pt_inception-2015-12-05-6726825d.pth", metavar="FILE")
    p.add_argument("--lpips-net", default="vgg", choices=["vgg", "alex", "squeeze"])
    p.add_argument("--lpips-weights", default="weights/vgg16-397923af.pth", metavar="FILE", help="torchvision's file of that network")
    p.add_argument("--probe", default="full", choices=["full", "cached", "knn"])
    p.add_argument("--probe-iterations", type=int, default=12500)
    p.add_argument("--batch", type=int, default=32, help="images at a time on each device")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="processes that decode images, for each device")
    p.add_argument("--out", type=Path, metavar="PATH", help="JSON file (default beside the checkpoint)")
    p.add_argument("--profile", action="store_true", help="images/s by part")
    args = p.parse_args(argv)
    args.skip = set(filter(None, args.skip.split(",")))
    if args.skip - {"fid", "lpips", "probe", "curve"}:
        p.error(f"--skip takes fid, lpips, probe and curve, not {','.join(sorted(args.skip))}")
    if args.size < 16 or min(args.batch, args.probe_iterations) < 1 or args.workers < 0:
        p.error("--size must be 16 or more, --batch and --probe-iterations 1 or more, --workers 0 or more")
    if args.split and args.train:
        p.error("--split parity takes the probe's training images from --data: leave --train out")
    return args


def main(argv=None):
    args = parse(argv)
    if "RANK" in os.environ:                    # torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    # fp32 means fp32: TF32 alone moves an rFID in the third digit
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        evaluate(args, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def evaluate(args, device):
    """Score every model on the command line: a JSON and a grid for each, one table at the end."""
    test = ImageFolder(args.data, split="odd" if args.split else "all")
    train = None
    if "probe" not in args.skip:
        train = ImageFolder(args.data, split="even") if args.split else ImageFolder(args.train or "data/imagenet/train")
    lpips = None if "lpips" in args.skip else LPIPS(args.lpips_net, args.lpips_weights).to(device)
    inception = None if "fid" in args.skip else FIDInception(args.inception, args.fid_dims, args.fid_resize).to(device)
    rows = []
    for spec in args.models:
        model = load_model(spec, device, args.sample)
        out = args.out or (Path(spec).with_suffix(".eval.json") if isinstance(model, Semantic) else Path("runs") / re.sub(r"[^\w.-]+", "-", spec) / "eval.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"model": spec, "weights_sha256": model.digest} | score(model, test, lpips, inception, args)
        if train:
            result |= probe(model, train, test, args, out.parent)
        result["protocol"] = protocol(model, test, args)
        if rank() == 0:
            write_grid(model, test, args.size, out.with_suffix(".png"))
            save_json(result, out)
            rows.append(result)
    if rank() == 0:
        print_table(rows)


def protocol(model, test, args):
    """What the numbers mean: printed under the table and kept in the JSON."""
    lines = {"images": f"{args.data}{', odd positions of each class' if args.split else ''}: ADM centre crop {args.size}, both sides rounded to uint8",
             "model": f"{model.protocol}, fp32", "psnr": "RGB, 255, mean over images", "ssim": "11 taps, sigma 1.5, per channel, reflect, full map"}
    if "lpips" not in args.skip:
        lines["lpips"] = f"{args.lpips_net}, version 0.1"
    if "fid" not in args.skip:
        lines["rfid"] = f"{args.fid_dims} features of {Path(args.inception).name}, {args.fid_resize} resize to 299, fp32"
    if "probe" not in args.skip:
        lines["probe"] = {"knn": "k-NN, k 10, T 0.07, centre crops",
                          "cached": f"linear, {args.probe_iterations} iterations on centre crops, rate chosen on a tenth of train",
                          "full": f"linear, {args.probe_iterations} iterations on random crops, rate chosen on a tenth of train"}[args.probe]
    lines["versions"] = ", ".join(f"{name} {v}" for name, v in [("python", platform.python_version()), ("torch", torch.__version__),
                                                                ("torchvision", torchvision.__version__)])
    return lines


def print_table(rows):
    names = [f"probe {k}" for k in ("cls+patch", "patch", "mu")] + ["PSNR", "SSIM", "LPIPS", "rFID"]
    print(f"{'model':40} {'images':>7} " + " ".join(f"{n:>15}" if "probe" in n else f"{n:>7}" for n in names))
    for r in rows:
        cells = [r.get("probe", {}).get(k) for k in ("cls+patch", "patch", "mu")] + [r.get(k) for k in ("psnr", "ssim", "lpips", "rfid")]
        digits = [2, 2, 2, 2, 4, 4, 3]
        print(f"{r['model'][-40:]:40} {r['images']:7} " + " ".join(("-" if c is None else f"{c:.{d}f}").rjust(15 if i < 3 else 7)
                                                                  for i, (c, d) in enumerate(zip(cells, digits))))
    for warning in (r["warning"] for r in rows if "warning" in r):
        print(f"  {warning}")
    for key, text in rows[-1]["protocol"].items():
        print(f"  {key}: {text}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
