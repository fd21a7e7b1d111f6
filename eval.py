"""Score an autoencoder, and use one: one protocol for every model, printed with every result.

    python eval.py runs/stage2-reg100/last.pt                        # PSNR, SSIM, LPIPS, rFID, probe, picture
    python eval.py last.pt diffusers:stabilityai/sd-vae-ft-mse my.py:load     # the same table for peers
    torchrun --nproc_per_node 8 eval.py last.pt                      # the same numbers from 8 GPUs
    python eval.py last.pt --export FOLDER                           # a model to publish
    python eval.py last.pt --encode DIR --out FOLDER                 # or --decode, --generate: see latents.py

A model is a checkpoint of train.py, a folder of --export, diffusers:NAME_OR_FOLDER, or FILE.py:FACTORY, where
FACTORY() gives an object with encode(x) -> z [B,C,...] and decode(z) -> xhat, images [B,3,H,W] in [-1,1].

Published rFIDs of one and the same checkpoint differ by more than the gaps that papers claim, because crop,
rounding, Inception network and resize differ. Here image and reconstruction are rounded to uint8 the same way
before any metric. The constants ..._PROTOCOL, beside the code that follows them, are printed with them.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import runpy
import sys
from collections import OrderedDict, deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.models.inception import BasicConv2d, inception_v3
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, ToPILImage
from tqdm import tqdm

from common import (LPIPS, Help, ImageFolder, center_crop, check_launcher, check_output, command, load_crops,
                    load_image, psnr, save_grid, to_float, to_uint8)
from sae import SAE, Posterior, philox_normal
from sae_weights import load_tensors, require, write

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's


# ------------------------------------------------------------------ metrics

# common.psnr. An image that comes back exactly has infinite dB, and would make the mean infinite.
PSNR_PROTOCOL = "RGB, range 255, mean over the images that do not come back exactly"
LPIPS_PROTOCOL = "{lpips_net}, version 0.1"     # common.LPIPS
SSIM_PROTOCOL = "11 taps, sigma 1.5, per channel, reflect padding, full map"
NOISE_PROTOCOL = "decoded from z + tau std eps, std per channel over these images"
FD_PROTOCOL = ("features before the head, fp32, bicubic antialiased resize to {input_size}, mean {mean}, std "
               "{std}; those of a DINO flatter a DINO autoencoder")
FID_PROTOCOL = "{dims} features of {file}, {resize} resize to 299, fp32"


def ssim(x, y):
    """Wang et al. 2004 of each image, K 0.01 and 0.03 (as torchmetrics 1.9): uint8 [B,3,H,W] twice -> [B]."""
    def blur(n):
        # Blurring an axis is a matrix, its reflected borders included: faster than convolutions of 11 taps.
        taps = torch.exp(-(torch.arange(11, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
        rows = F.pad(torch.eye(n, device=x.device)[None], (5, 5), mode="reflect")[0]     # [n,n+10]
        return rows.unfold(1, 11, 1) @ (taps / taps.sum())                               # [n,n], in by out

    x, y = x.float(), y.float()
    maps = torch.stack([x, y, x * x, y * y, x * y])                                      # [5,B,3,H,W]
    mx, my, xx, yy, xy = blur(x.shape[2]).T @ maps @ blur(x.shape[3])
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    # SSIM = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(var x + var y + c2))
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    variances = (xx - mx * mx).clamp(min=0) + (yy - my * my).clamp(min=0)
    bottom = (mx * mx + my * my + c1) * (variances + c2)
    return (top / bottom).flatten(1).mean(1)


class FIDInception(nn.Module):
    """The Inception of FID (pt_inception-2015-12-05, 1008 classes): uint8 [B,3,H,W] -> [B,dims] fp32.

    dims 64, 192, 768, 2048: averaged over the positions after the first and second pool, Mixed_6e, Mixed_7c.
    resize "tf1", or "torch" for pytorch-fid's variant. Raises ValueError when the file is another network's.
    """

    def __init__(self, path, dims=2048, resize="tf1"):
        super().__init__()
        last = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}[dims]
        inception = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
        layers = OrderedDict(inception.named_children())
        while next(reversed(layers)) != last:
            layers.popitem()
        self.net, self.resize = nn.Sequential(layers), resize
        self.dims = dims
        self.protocol = FID_PROTOCOL.format(dims=dims, file=Path(path).name, resize=resize)
        self.load(path, dims)

        for module in self.net.modules():
            if isinstance(module, BasicConv2d):     # batch norm into the convolution: less memory traffic
                module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv.eval(), module.bn.eval())
                module.bn = nn.Identity()

        # TensorFlow's mean leaves the padding out; the last block's maximum is a slip of 2015 that FIDs keep.
        mean, maximum = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
        for name, block in layers.items():
            if hasattr(block, "branch_pool"):
                self.feed_pool_branch(block, maximum if name == "Mixed_7c" else mean)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def load(self, path, dims):
        mend = "./weights.sh --only inception fetches it, --skip fid goes without"
        require(Path(path).is_file(), f"there is no FID Inception {path}: {mend}")
        found, wanted = load_tensors(path), self.net.state_dict()
        shapes = {key: t.shape for key, t in found.items()}
        wrong = [f"no {key}" for key, t in wanted.items() if t.dim() and shapes.get(key) != t.shape]
        # torchvision's own Inception has the same names and other weights: its 1000 classes give it away.
        if shapes.get("fc.weight", [1008])[0] != 1008:
            wrong.append("not 1008 classes")
        what = "".join(wrong[:1])
        require(not wrong, f"{path} is not the FID Inception for {dims} features ({what}): {mend}")
        # The counters of batches, which older files lack, keep their zero.
        self.net.load_state_dict({key: found.get(key, t) for key, t in wanted.items()})

    @staticmethod
    def feed_pool_branch(block, pool):
        """The block's pool branch takes pool(input of the block) in place of torchvision's pooling."""
        inputs = []
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.branch_pool.register_forward_pre_hook(lambda *_: pool(inputs.pop()))

    def forward(self, x):
        x = x.float()
        if self.resize == "tf1":
            x = (tf1_resize(x) - 128) / 128
        else:
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
        return self.net(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize, fp32 [B,C,H,W] -> [B,C,size,size]: pixel i reads at i * in / out."""
    for dim in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = at.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (at - low).view(-1, 1) if dim == 2 else at - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


class TimmFeatures(nn.Module):
    """A network of timm without its head: uint8 [B,3,H,W] -> features [B,dims] fp32.

    spec: timm:NAME, timm:hf-hub:OWNER/NAME or timm:local-dir:FOLDER. ValueError when it cannot be loaded.
    """

    def __init__(self, spec):
        super().__init__()
        with loading(spec):
            import timm
            self.net = timm.create_model(spec.removeprefix("timm:"), pretrained=True, num_classes=0)
        config = timm.data.resolve_model_data_config(self.net)
        config |= {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}   # the whole image
        self.transform, self.protocol = timm.data.create_transform(**config), FD_PROTOCOL.format(**config)
        self.eval().requires_grad_(False)
        self.dims = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    def forward(self, x):
        images = [self.transform(ToPILImage()(image)) for image in x.cpu()]
        return self.net(torch.stack(images).to(x.device))


class Moments:
    """Mean and covariance of rows [n,D] that come in batches: n, sum x and sum x x^T in float64."""

    def __init__(self, dims, device):
        self.n, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                        for shape in ((), dims, (dims, dims)))

    def update(self, x):
        x = x.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def mean_cov(self):
        """(mean [D], unbiased covariance [D,D]) over all ranks, numpy float64. Every rank must call it."""
        n, total, outer = (over_ranks(t).numpy() for t in (self.n, self.sum, self.outer))
        mean = total / n
        return mean, (outer - n * np.outer(mean, mean)) / max(n - 1, 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2) of Gaussians (Heusel et al. 2017), float64."""
    def factor(cov):
        # A [D,rank] with A A^T = cov, by a pivoted Cholesky factorisation, which needs no full rank
        lower, order, r, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
        a = np.empty_like(lower[:, :r])
        a[order - 1] = np.tril(lower)[:, :r]
        return a

    # tr (C1 C2)^1/2 is the sum of the singular values of A1^T A2. They are the roots of the eigenvalues of
    # C1^1/2 C2 C1^1/2, found without squaring first: the root of rounding noise would add 1e-8 for every
    # dimension that n images leave empty.
    cross = scipy.linalg.svdvals(factor(cov1).T @ factor(cov2)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def latent_sums(z):
    """z [B,C,...] -> [2,C]: sums over the images of the means over the positions of z and of z^2."""
    flat = z.transpose(0, 1).flatten(1).double()                                         # [C,B h w]
    return torch.stack([flat.mean(1), flat.square().mean(1)]) * len(z)


def latent_mean_std(sums, n):
    """(mean [C], std [C]) from the ranks' `latent_sums` [2,C] of n images in all. Every rank must call it."""
    mean, square = over_ranks(sums) / n
    return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def score(model, folder, lpips, networks, args, noise=None):
    """PSNR, SSIM, LPIPS, latent statistics and, on rank 0, distances in networks' features, in one pass.

    noise: None, or [C], the deviation of what is added to z before it is decoded.
    """
    n, sums, latents, shape = len(folder), 0, 0, None
    real, fake = ({name: Moments(net.dims, model.device) for name, net in networks.items()} for _ in range(2))

    for index, images, _ in batches(Crops(args.size, folder), shares(range(n), args.batch), args, "scores"):
        x = to_float(images.to(model.device, non_blocking=True))                         # [B,3,S,S]
        z, kl, xhat = model.reconstruct(x, index[0].item(), noise)
        x8, y8 = to_uint8(x), to_uint8(xhat)    # x8 is the image itself, bit for bit
        db = psnr(x8, y8)                                                                # [B]
        none = torch.full_like(db, math.nan)
        columns = (~xhat.flatten(1).isfinite().all(1), db.isinf(), db.where(db.isfinite(), 0), ssim(x8, y8),
                   lpips(y8 / 127.5 - 1, x8 / 127.5 - 1) if lpips else none, none if kl is None else kl)
        sums = sums + torch.stack([column.double().sum() for column in columns])
        latents = latents + latent_sums(z)
        shape = list(z.shape[1:])
        for name, net in networks.items():
            real[name].update(net(x8))
            fake[name].update(net(y8))

    broken, exact, db, similarity, distance, kl = over_ranks(sums).tolist()
    require(not broken, f"{model.name} made NaN or Inf of {broken:.0f} of {n} images: no number would count")
    result = {"images": n, "exact": int(exact), "psnr": db / (n - exact) if exact < n else None,
              "ssim": similarity / n} | ({"lpips": distance / n} if lpips else {})
    mean, std = latent_mean_std(latents, n)
    model.std = std                             # also on a rank that has seen no image
    # std: the root mean square of the channels'
    result["latent"] = {"shape": shape, "mean": mean.mean().item(), "std": std.square().mean().sqrt().item(),
                        "std_min": std.min().item(), "std_max": std.max().item(), "kl": kl / n}
    gaussians = {name: (*real[name].mean_cov(), *fake[name].mean_cov()) for name in networks}
    if RANK == 0:
        result |= {name: frechet_distance(*four) for name, four in gaussians.items()}
    small = [f"{name} is unreliable: {n} images cannot fill a covariance of {net.dims} dimensions"
             for name, net in networks.items() if n <= net.dims]
    return result | ({"warning": "; ".join(small)} if small else {})


def score_noisy(model, folder, networks, args):
    """{"psnr TAU", "rfid TAU" ..} of decode(z + tau std eps): does it forgive a diffusion model's errors?"""
    result = {}
    for tau in args.latent_noise:
        scores = score(model, folder, None, networks, args, noise=tau * model.std)
        result |= {f"{key} {tau}": scores.get(key) for key in ("psnr", *networks)}
    return result


# ------------------------------------------------------------------ probe

# DINOv3's grid; the rates are for a batch of 256 and grow with it.
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
PROBE_BATCH = 1024
HOLD = 10                                       # every tenth training image only chooses the rate
# Reading: DINOv3 chooses the rate on the images that it reports; here they have no say in it.
PROBE_PROTOCOL = ("linear, {probe}, {probe_iterations} iterations, rate chosen on a tenth of the training "
                  "set, CLS of {probe_layers} last block(s) beside the mean patch token of the last")


def probe(model, train, test, args, folder):
    """{"probe": {kind of feature: % of `test` right}, "probe_rate": {kind: learning rate}}.

    DINOv3's linear probe on what is before the bottleneck. train, test: ImageFolders of the same classes.
    """
    crops, device = Crops(args.size, train, test), model.device
    labels = np.array(crops.labels)
    index, tests = np.split(np.arange(len(labels)), [len(train)])
    held, kept = index[HOLD - 1::HOLD], index[index % HOLD != HOLD - 1]
    rows = feature_file(model, crops, args, folder) if args.probe == "cached" else None

    def stream(desc, steps, count=None):
        """(features [B,D], labels [B]) of each of the `count` batches of items in `steps`."""
        if rows is None:
            for _, images, y in batches(crops, steps, args, desc, count):
                yield model.embed(images, args.batch), y.to(device)
        else:
            for step in tqdm(steps, desc, count, unit="batch", disable=RANK > 0):
                features, y = torch.from_numpy(rows[step]), torch.from_numpy(labels[step])
                yield features.to(device).float(), y.to(device)

    batch = min(PROBE_BATCH, len(kept))
    steps = draws(kept, batch, args.probe_iterations)
    if rows is not None:                        # centre crops take no seed
        steps = ([i for i, _ in step] for step in steps)
    torch.manual_seed(0)
    heads = Heads(model.kinds(), len(train.classes)).to(device)
    train_heads(heads, stream("probe", steps, args.probe_iterations), batch, args.probe_iterations)

    choice = tally(heads, stream("probe choice", shares(held, args.batch)))
    final = tally(heads, stream("probe test", shares(tests, args.batch)))
    best = {kind: choose(right, loss, len(held)) for kind, (right, loss) in choice.items()}
    return {"probe": {kind: final[kind][0][i].item() for kind, i in best.items()},
            "probe_rate": {kind: RATES[i] for kind, i in best.items()}}


def check_probe(train, test):
    """ValueError unless `probe` can work with these ImageFolders."""
    differ = sorted(set(train.classes) ^ set(test.classes))
    require(not differ, f"{''.join(differ[:1])} is in one of --train and --data alone, and the probe needs "
                        "the same class folders in both: pass others, or --skip probe")
    require(len(train.classes) > 1 and len(train) >= HOLD,
            f"the probe needs two class folders and {HOLD} training images or more, and --train has "
            f"{len(train.classes)} and {len(train)}: pass another, or --skip probe")


class Heads(nn.Module):
    """A linear classifier for each of K kinds of feature and R rates: features [B,D] -> [B,K,R,classes]."""

    def __init__(self, kinds, classes):
        super().__init__()
        self.kinds = kinds
        self.linear = nn.ModuleList(nn.Linear(c.stop - c.start, len(RATES) * classes) for c in kinds.values())
        for linear in self.linear:
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, features):
        logits = [linear(features[:, c]) for linear, c in zip(self.linear, self.kinds.values())]
        return torch.stack(logits, 1).unflatten(2, (len(RATES), -1))                     # [B,K,R,classes]


def cross_entropy(logits, labels):
    """Of each image and head: logits [B,K,R,classes], labels [B] -> [B,K,R]."""
    labels = labels[:, None, None].expand(logits.shape[:3])
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)


def draws(index, batch, iterations):
    """This rank's part of each batch of endless permutations of `index`: lists of (item, number of draw)."""
    epochs = (np.random.default_rng([0, epoch]).permutation(index) for epoch in itertools.count())
    numbered = zip(itertools.chain.from_iterable(epochs), itertools.count())
    for _ in range(iterations):
        yield list(itertools.islice(numbered, batch))[RANK::WORLD]


def train_heads(heads, stream, batch, iterations):
    """SGD 0.9, no weight decay, cosine, on a stream of (features, labels); `batch` images over all ranks."""
    model = nn.parallel.DistributedDataParallel(heads) if WORLD > 1 else heads
    optimizer = torch.optim.SGD(heads.parameters(), lr=batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    # A step of SGD is linear in the gradient: a rate as the factor of a head's loss is its learning rate.
    rates = torch.tensor(RATES, device=heads.linear[0].weight.device)
    for features, labels in stream:
        # A sum over kinds and rates: each head sees its own cross entropy alone. A mean over the images of
        # all ranks, over which DistributedDataParallel averages: hence their number is a factor.
        loss = (rates * cross_entropy(model(features), labels)).sum() * WORLD / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def tally(heads, stream):
    """{kind: (% right [R], mean cross entropy [R])} of the heads over the stream of all ranks."""
    sums = 0
    for features, labels in stream:
        logits = heads(features)
        loss = cross_entropy(logits, labels).double()                                    # [B,K,R]
        right = (logits.argmax(-1) == labels[:, None, None]).double()
        sums = sums + torch.stack([right, loss, torch.ones_like(loss)]).sum(1)           # [3,K,R]
    right, loss, n = over_ranks(sums)
    return dict(zip(heads.kinds, zip(100 * right / n, loss / n)))


def choose(right, loss, n):
    """The number of the best head by % right [R] and cross entropy [R] on n images.

    Accuracies within two standard errors count as equal, and the loss decides, which is far less noisy. The
    error is that of two more images right and two more wrong (Agresti and Coull 1998): not 0 at 100 %.
    """
    best = right.max()
    p = (best * n + 200) / (n + 4)
    error = (p * (100 - p) / (n + 4)).sqrt()
    return min((i for i in range(len(right)) if right[i] >= best - 2 * error), key=lambda i: loss[i])


def feature_file(model, crops, args, folder):
    """The features of all crops, a memory-mapped fp16 array [n,D+1] in `folder`, which all ranks must share.

    Its name holds a hash of the files of weights and images (path, size, time), kinds of feature, crop and
    device type. It is used again while they agree; without an identity it is made anew. The last column is 1
    in the rows that are written, so that an interrupted pass goes on.
    """
    images = [identity(path) for path in crops.files]
    key = digest(model.identity, model.kinds(), model.device.type, crops.size, images)
    path = folder / f"features-{key}.npy"

    def zeros(file):
        shape = len(images), max(columns.stop for columns in model.kinds().values()) + 1
        np.lib.format.open_memmap(file.name, mode="w+", dtype=np.float16, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):      # a disk too small is an error here, a crash in a mapped write
            os.posix_fallocate(file.fileno(), 0, os.stat(file.name).st_size)

    if RANK == 0 and (model.identity is None or not path.exists()):
        write(path, zeros)
    over_ranks(0)                               # a barrier: all wait for the file
    rows = np.load(path, mmap_mode="r+")
    todo = [s for s in shares(range(len(rows)), args.batch) if not rows[s.start:s.stop, -1].all()]
    for index, x, _ in batches(crops, todo, args, "features"):
        half = F.pad(model.embed(x, args.batch).half(), (0, 1), value=1)                 # [B,D+1]
        require(half.isfinite().all(), f"{model.name} has features that do not fit fp16: use --probe full")
        rows[index] = half.cpu().numpy()
    rows.flush()
    over_ranks(0)                               # a barrier: all wait for the last row
    return np.load(path, mmap_mode="r")


# ------------------------------------------------------------------ S-AE and its peers

class Autoencoder:
    """Any model behind the few methods that the metrics use, in fp32 and without gradients.

    encode: x [B,3,S,S] in [-1,1] -> z [B,C,...] or a Posterior of it; decode: z -> xhat [B,3,S,S].
    identity: of its file; None for an object from FILE.py or diffusers, whose weights may change unseen.
    std: [C] of z, known after `score`. Raises ValueError for weights that are not finite and wrong shapes.
    """

    def __init__(self, name, model, encode, decode, args, device):
        self.name, self.model, self.encode, self.decode = name, model, encode, decode
        self.identity = identity(name) if isinstance(model, SAE) else None
        self.sample, self.layers, self.device = args.sample, args.probe_layers, device
        self.std = None
        if isinstance(model, SAE):
            # The CLS tokens of the last blocks, left here by encoder(x) for `features`.
            blocks, self.cls = model.encoder.blocks, deque(maxlen=self.layers)
            require(self.layers <= len(blocks), f"{name} has {len(blocks)} blocks: lower --probe-layers")
            for block in blocks[-self.layers:]:
                block.register_forward_hook(lambda _, x, out: self.cls.append(out[:, 0]))
        if isinstance(model, nn.Module):
            model.to(device).eval().requires_grad_(False)
            for key, t in model.state_dict().items():
                absent = key in ("latent_mean", "latent_std")           # NaN until an S-AE's run has ended
                require(absent or t.isfinite().all(), f"{name} has NaN or Inf in {key}: take an earlier one")

    @torch.no_grad()
    def latent(self, x, first=0):
        """x [B,3,H,W], the images first .. of a set -> z [B,C,...], KL to N(0,I) in nats [B] or None."""
        q = self.encode(x)
        if isinstance(q, Posterior):
            # An image's noise depends on its place in the set alone: neither batch size nor ranks matter.
            return (q.sample(seed=0, offset=first * q.mu[0].numel()) if self.sample else q.mode()), q.kl()
        require(not self.sample, f"{self.name} has no posterior to draw z from: leave --sample out")
        require(torch.is_tensor(q) and q.dim() > 2 and len(q) == len(x),
                f"encode of {self.name} must give a tensor [B,C,...] for images [B,3,H,W]")
        return q, None

    @torch.no_grad()
    def reconstruct(self, x, first=0, noise=None):
        """x [B,3,H,W] in [-1,1] -> z and KL as from `latent`, xhat [B,3,H,W]; noise as in `score`."""
        z, kl = self.latent(x, first)
        if noise is None:
            xhat = self.decode(z)
        else:                                   # seed 1, since --sample draws from seed 0
            eps = philox_normal(z.numel(), 1, first * z[0].numel(), z.device).view(z.shape)
            xhat = self.decode(z + eps * noise.to(z).view(-1, *[1] * (z.dim() - 2)))
        require(torch.is_tensor(xhat) and xhat.shape == x.shape,
                f"{self.name} does not give {list(x.shape)} back: pass the --size that it was made for")
        return z, kl, xhat

    @torch.no_grad()
    def features(self, x):
        """What the probe sees, [B,D]: [CLS of the last blocks ; mean patch token ; mu] of S-AE, mu of others.

        As DINOv3 and VTP probe, each CLS comes under the final norm. mu is the latent averaged over the
        positions, of the posterior's mean also under --sample.
        """
        if not isinstance(self.model, SAE):
            q = self.encode(x)
            return (q.mode() if isinstance(q, Posterior) else q).flatten(2).mean(2)      # [B,C]
        encoder = self.model.encoder
        patches = encoder(x)[2]                                                          # [B,h w,D]
        cls = encoder.norm(torch.stack([*self.cls], 1)).flatten(1)                       # [B,layers D]
        h, w = (side // encoder.patch for side in x.shape[2:])
        mu = self.model.posterior(patches, h, w).mu.mean((2, 3))                         # [B,z_dim]
        return torch.cat([cls, patches.mean(1), mu], 1)

    def kinds(self):
        """{kind of feature: its columns of `features`}."""
        if not isinstance(self.model, SAE):
            return {"mu": slice(0, len(self.std))}
        # The teacher's MSE holds the patch tokens alone and CLS may drift: they also stand by themselves.
        D, z_dim = self.model.config.encoder.width, self.model.config.z_dim
        patch, mu = self.layers * D, (self.layers + 1) * D                               # where they begin
        return {"cls+patch": slice(0, mu), "patch": slice(patch, mu), "mu": slice(mu, mu + z_dim)}

    def embed(self, images, batch):
        """Features [B,D] fp32 of uint8 [B,S,S,3], `batch` images at a time; the encoder in bf16 on a GPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            parts = [self.features(to_float(part.to(self.device))) for part in images.split(batch)]
        return torch.cat(parts).float()


def load_model(spec, args, device):
    """The autoencoder that `spec` names; see the top of this file. Raises ValueError, one sentence."""
    file, _, factory = spec.rpartition(":")
    if spec.startswith("diffusers:"):
        return Autoencoder(spec, *load_diffusers(spec), args, device)
    if file.endswith(".py"):
        sys.path.insert(0, str(Path(file).parent))      # so that it finds its own neighbours
        model = runpy.run_path(file).get(factory, lambda: None)()
    else:
        model = SAE.from_pretrained(spec)
    encode, decode = (getattr(model, name, None) for name in ("encode", "decode"))
    require(callable(encode) and callable(decode),
            f"{file} needs a function {factory}() for an object with encode(x) -> z and decode(z) -> xhat")
    return Autoencoder(spec, model, encode, decode, args, device)


@contextmanager
def loading(spec):
    """One sentence where another library cannot load `spec`."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load {spec} (extra `peers`): {' '.join(str(error).split())}") from error


def load_diffusers(spec):
    """(model, encode, decode): SD-VAE and its like (AutoencoderKL), DC-AE or R-AE, by hub name or folder."""
    with loading(spec):
        import diffusers
        model = diffusers.AutoModel.from_pretrained(spec.removeprefix("diffusers:"))

    ways = {
        "AutoencoderKL": (lambda x: Posterior(*model.encode(x).latent_dist.parameters.chunk(2, 1)),
                          lambda z: model.decode(z).sample),
        "AutoencoderDC": (lambda x: model.encode(x).latent,
                          lambda z: model.decode(z).sample),
        "AutoencoderRAE": (lambda x: model.encode((x + 1) / 2).latent,                   # images in [0,1]
                           lambda z: model.decode(z).sample * 2 - 1)}
    kind = type(model).__name__
    require(kind in ways, f"{spec} is a {kind}: {', '.join(ways)} are known, others come by FILE.py:FACTORY")
    return model, *ways[kind]


# ------------------------------------------------------------------ images and files

IMAGES_PROTOCOL = "{data}: ADM centre crop {size}, both sides rounded to uint8"


class Crops(Dataset):
    """Item i: (i, uint8 [S,S,3], label) of file i, its centre crop. Item (i, seed): random crop and flip."""

    def __init__(self, size, *folders):
        self.size = size
        self.files = [file for folder in folders for file in folder.files]
        self.labels = [label for folder in folders for label in folder.labels]

    def __getitem__(self, item):
        i, seed = item if isinstance(item, tuple) else (item, None)
        try:
            image = load_image(self.files[i])
        except ValueError as error:
            return error                        # raised in a worker it would arrive as a page of traceback
        if seed is None:
            image = center_crop(image, self.size)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)         # the crop depends on the draw alone, not on workers or ranks
                crop = RandomResizedCrop(self.size, interpolation=InterpolationMode.BICUBIC)
                image = RandomHorizontalFlip()(crop(image))
        return i, torch.from_numpy(np.array(image)), self.labels[i]


def collate(items):
    return next((item for item in items if isinstance(item, ValueError)), None) or default_collate(items)


def shares(index, batch):
    """This rank's batches of `index`. No item is missed or counted twice; a batch is the same on any rank."""
    return [index[i:i + batch] for i in range(0, len(index), batch)][RANK::WORLD]


def batches(crops, steps, args, desc, count=None):
    """(index [B], images [B,S,S,3], labels [B]) for each of the `count` batches of items in `steps`."""
    loader = DataLoader(crops, batch_sampler=steps, num_workers=args.workers, collate_fn=collate,
                        pin_memory=torch.cuda.is_available())
    for batch in tqdm(loader, desc, count or len(steps), unit="batch", disable=RANK > 0):
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def over_ranks(t):
    """The sum of the ranks' tensors, on the CPU; a rank that has seen no image gives 0."""
    parts = [t.cpu() if torch.is_tensor(t) else t] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, parts[0])
    return sum(parts)


def identity(path):
    """What tells whether a file has changed: path, size and time; of a Member, those of its tar."""
    file = getattr(path, "tar", path)
    stat = os.stat(Path(file, "model.safetensors") if os.path.isdir(file) else file)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def digest(*values):
    """A short name for what `values` describe."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def to_json(value, indent=None):
    """JSON, in bytes, and a newline. It knows neither NaN nor Infinity: null stands in their place."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return f"{json.dumps(value, indent=indent, allow_nan=False)}\n".encode()


# ------------------------------------------------------------------ the command

def at_least(low):
    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more")
        return int(text)
    return number


def options(argv):
    import latents              # here, since it imports this file: a second time, where this is the command
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    count = at_least(1)
    p.add_argument("models", nargs="+", metavar="MODEL", help="CKPT.pt, diffusers:NAME, FILE.py:FACTORY ..")
    p.add_argument("--data", default="data/imagenet/val", metavar="DIR", help="images to score")
    p.add_argument("--train", default="data/imagenet/train", metavar="DIR", help="images to train the probe")
    p.add_argument("--size", type=at_least(16), default=256, help="of the centre crop")
    p.add_argument("--sample", action="store_true", help="draw z from the posterior; default is its mean")
    p.add_argument("--skip", default="", metavar="A,B", help="leave out some of fid, lpips, probe")
    p.add_argument("--fid-dims", type=int, default=2048, choices=[64, 192, 768, 2048], help="features")
    p.add_argument("--fid-resize", default="tf1", choices=["tf1", "torch"], help="torch: pytorch-fid's")
    p.add_argument("--inception", type=Path, metavar="FILE",
                   default="weights/pt_inception-2015-12-05-6726825d.pth", help="its weights")
    p.add_argument("--fd", nargs="+", default=[], metavar="timm:NAME", help="distances in their features")
    p.add_argument("--latent-noise", type=float, nargs="+", default=[], metavar="TAU",
                   help="score decode(z + TAU std eps), too")
    p.add_argument("--lpips-net", default="vgg", choices=["vgg", "alex", "squeeze"], help="LPIPS' trunk")
    p.add_argument("--lpips-weights", default="weights/vgg16-397923af.pth", metavar="FILE", help="its file")
    p.add_argument("--probe", default="full", choices=["full", "cached"], help="on random or on centre crops")
    p.add_argument("--probe-layers", type=int, default=1, choices=[1, 4], help="blocks whose CLS it sees")
    p.add_argument("--probe-iterations", type=count, default=12500, help="of the probe's training")
    p.add_argument("--batch", type=count, default=32, help="images at a time on each device")
    p.add_argument("--workers", type=at_least(0), default=min(8, os.cpu_count()), help="for each device")
    p.add_argument("--out", type=Path, metavar="PATH", help="JSON file, by default beside the checkpoint")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--export", type=Path, metavar="FOLDER", help="write the model there, to publish it")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the weights of --export")
    latents.add_options(p, mode)
    args = p.parse_args(argv)
    args.skip = set(filter(None, args.skip.split(",")))
    if args.skip - {"fid", "lpips", "probe"}:
        p.error(f"--skip takes fid, lpips and probe, not {','.join(sorted(args.skip))}")
    if args.export and len(args.models) > 1:
        p.error("--export takes one model")
    if (args.encode or args.decode) and not args.out:
        p.error("--encode and --decode need --out DIR")
    if len(args.models) > 1 and args.out and not args.generate:
        p.error("--out goes with one model: drop the option, or name the models one by one")
    for spec in args.models:
        file = Path(spec.rpartition(":")[0] if ".py:" in spec else spec)
        exported = (file / "config.json").is_file()
        require(spec.startswith("diffusers:") or exported or file.is_file() and not spec.endswith(".py"),
                f"there is no file {file}, or no {file}:FACTORY: name a checkpoint of train.py, a "
                "folder of --export, diffusers:NAME_OR_FOLDER or FILE.py:FACTORY")
    return args


def main(argv=None):
    args = options(argv)
    check_launcher()
    if args.export:
        return export(args)
    if WORLD > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # fp32 means fp32: TF32 alone moves an rFID in the third digit
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    if args.encode or args.decode or args.generate:
        import latents
        latents.run(args, device)
    else:
        score_all(args, device)
    if dist.is_initialized():                   # not after an error: it would wait for ranks that met none
        dist.destroy_process_group()


def export(args):
    """--export: the model as a folder, its card with the scores that lie beside the checkpoint."""
    require(WORLD == 1, "--export is the work of one process: run it without torchrun")
    spec, file = args.models[0], default_output(args.models[0])
    sae = SAE.from_pretrained(spec)
    scores = json.loads(file.read_bytes()) if file.exists() else {}
    if scores.get("identity") != list(identity(spec)):
        print(f"the card has no scores: {file} is absent or of another file than {spec}")
        scores = {}
    sae.save_pretrained(args.export, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], scores)
    print(f"{args.export}: config.json, model.safetensors, README.md and encoder/ are written")


def score_all(args, device):
    """Score every model on the command line: a JSON and a picture for each, one table at the end."""
    test, train, lpips, networks = ImageFolder(args.data), None, None, {}
    if "probe" not in args.skip:
        train = ImageFolder(args.train, option="--train, or --skip probe")
        check_probe(train, test)
    outputs = [args.out or default_output(spec) for spec in args.models]
    for out in outputs:
        check_output(out, test, *([train] if train else []))
    if "lpips" not in args.skip:
        lpips = LPIPS(args.lpips_net, args.lpips_weights).to(device)
    if "fid" not in args.skip:
        networks["rfid"] = FIDInception(args.inception, args.fid_dims, args.fid_resize).to(device)
    networks |= {f"fd {spec.removeprefix('timm:')}": TimmFeatures(spec).to(device) for spec in args.fd}

    rows = []
    try:
        for spec, out in zip(args.models, outputs):
            model = load_model(spec, args, device)
            row = {"model": spec, "identity": model.identity, "protocol": protocol(model, networks, args)}
            row |= score(model, test, lpips, networks, args)
            rows.append(row)
            row |= score_noisy(model, test, networks, args)
            write_json(out, row | ({"unfinished": "probe"} if train else {}))
            if RANK == 0:
                write_grid(out.with_suffix(".png"), model, test, args.size)
            if train:
                row |= probe(model, train, test, args, out.parent)
                write_json(out, row)
    finally:                                    # also when a file cannot be written, or a later model fails
        if rows and RANK == 0:
            print_scores(rows)


def default_output(spec):
    """The JSON of a checkpoint is beside it, that of a peer in runs/."""
    if spec.startswith("diffusers:") or ".py:" in spec:
        return Path("runs") / re.sub(r"[^\w.-]+", "-", spec).strip("-.") / "eval.json"
    return Path(f"{Path(spec)}.eval.json") if Path(spec).is_dir() else Path(spec).with_suffix(".eval.json")


def write_json(path, row):
    if RANK == 0:
        write(path, lambda file: file.write(to_json(row, indent=1)))


def write_grid(path, model, folder, size):
    """Eight images of the set, evenly spaced, as a PNG: originals, reconstructions, |difference|."""
    index = np.linspace(0, len(folder) - 1, min(8, len(folder))).astype(int)
    x = load_crops([folder.files[i] for i in index], size).to(model.device)              # [8,3,S,S]
    y = torch.cat([model.reconstruct(image[None], int(i))[2] for image, i in zip(x, index)]).clamp(-1, 1)
    save_grid(path, x, y, (x - y).abs() - 1)    # -1 is black


def protocol(model, networks, args):
    """What the numbers mean: printed under the table and kept in the JSON."""
    z = "drawn from the posterior" if args.sample else "the posterior's mean, where there is a posterior"
    precision = "bf16" if model.device.type == "cuda" else "fp32"
    crops = {"full": "random crops", "cached": "centre crops, features kept in fp16"}[args.probe]
    lines = {"images": IMAGES_PROTOCOL, "model": f"z {z}, fp32; of an S-AE the EMA weights",
             "psnr": PSNR_PROTOCOL, "ssim": SSIM_PROTOCOL, "lpips": LPIPS_PROTOCOL,
             "probe": PROBE_PROTOCOL, "noise": NOISE_PROTOCOL}
    known = vars(args) | {"probe": f"on {crops}, {precision} encoder"}
    left_out = args.skip if args.latent_noise else args.skip | {"noise"}
    lines = {key: line.format(**known) for key, line in lines.items() if key not in left_out}
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return lines | {name: net.protocol for name, net in networks.items()} | {"versions": versions}


def print_scores(rows):
    table = [row | {f"probe {kind}": right for kind, right in row.get("probe", {}).items()} for row in rows]
    columns = {"images": 0, "probe cls+patch": 2, "probe patch": 2, "probe mu": 2, "psnr": 2, "ssim": 4,
               "lpips": 4, "rfid": 3} | ({"exact": 0} if any(row["exact"] for row in rows) else {})
    more = [key for row in rows for key in row if key.startswith(("fd ", "psnr ", "rfid "))]
    columns |= {key: 2 if key.startswith("psnr") else 3 for key in more}
    print_table(table, columns)
    for line in [row["warning"] for row in rows if "warning" in row]:
        print(" ", line)
    for key, line in rows[-1]["protocol"].items():
        print(f"  {key}: {line}")


def print_table(rows, columns):
    """One line a row: its model, then the columns {key: digits}, but those that all rows have left out."""
    columns = {key: digits for key, digits in columns.items() if any(key in row for row in rows)}
    print(f"{'model':40}", *(f"{key:>{len(key) + 2}}" for key in columns))
    for row in rows:
        cells = ("-" if row.get(key) is None else f"{row[key]:.{digits}f}" for key, digits in columns.items())
        print(f"{row['model'][-40:]:40}", *(f"{cell:>{len(key) + 2}}" for key, cell in zip(columns, cells)))


if __name__ == "__main__":
    command(main)
