"""The latent space in use: latents on disk for diffusion training, and a small DiT trained on them here.

    python eval.py last.pt --encode DIR --out FOLDER                 # --decode is the way back
    python eval.py a.pt b.pt --generate image.png                    # is a low latent loss a good image?
    python eval.py a.pt b.pt --generate train --data val --encoder dinov3.safetensors     # and its samples?

Letters: M images, B of a batch, C channels and h w positions of a latent; for the DiT a latent is N = h w
tokens of n = C channels, and d is its width.
"""
import copy
import json
import math
import zlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import ImageFolder, check_output, load_crops, psnr, save_grid, to_float, to_uint8
from eval import (RANK, WORLD, Crops, FIDInception, Moments, at_least, batches, digest, frechet_distance,
                  identity, latent_mean_std, latent_sums, load_model, print_table, shares, to_json)
from sae import SAE, DINOv3
from sae_weights import (load_metadata, load_safetensors, load_tensors, require, save_safetensors, torch_load,
                         write)


def add_options(p, mode):
    """The options of eval.py that are read here; `mode`: its group of which one is chosen."""
    count = at_least(1)
    mode.add_argument("--encode", type=Path, metavar="DIR", help="write its latents to --out DIR")
    p.add_argument("--flip", action="store_true", help="--encode the mirrored images, too")
    p.add_argument("--shard", type=count, default=1024, help="latents in a file (1024: 0.7 GB)")
    mode.add_argument("--decode", type=Path, metavar="PATH", help="write the images of latents to --out DIR")
    p.add_argument("--normalized", action="store_true", help="--decode z std + mean of latents_stats.pt")
    mode.add_argument("--generate", type=Path, metavar="PATH",
                      help="train a DiT on the latents of an image or of a folder, held in memory; --out DIR")
    p.add_argument("--encoder", metavar="FILE", help="a DINOv3 file, in whose features samples are measured")
    p.add_argument("--target", default="v", choices=["v", "x"], help="what the DiT predicts; x: the latent")
    p.add_argument("--guidance", type=float, default=1.5, help="of samples by their class; 1 is none")
    p.add_argument("--seed", type=int, default=0, help="of the DiT and its samples")
    p.add_argument("--dit-width", type=count, default=384, help="of --generate")
    p.add_argument("--dit-depth", type=count, default=12, help="of --generate")
    p.add_argument("--dit-steps", type=count, default=1200, help="of --generate")
    p.add_argument("--dit-batch", type=count, default=32, help="of --generate")
    p.add_argument("--dit-lr", type=float, default=2e-4, help="of --generate")


def run(args, device):
    """The mode that the options ask for."""
    if args.generate:
        generate_all(args, device)
    else:
        work = encode_folder if args.encode else decode_files
        work(load_model(args.models[0], args, device), args)


# ------------------------------------------------------------------ latents on disk

@torch.no_grad()
def encode_folder(model, args):
    """Latents of the images of --encode in the folder --out, as LightningDiT's ImgLatentDataset reads them.

    latents-00000.safetensors .. hold `latents` [M,C,h,w] fp16 and `labels` [M], which are places in `classes`
    of the metadata, where the files' `names` are, too; with --flip also `latents_flip`, of mirrored images,
    for which that loader asks at every second item. latents_stats.pt holds `mean` and `std` [1,C,1,1] of
    `latents`, by which the loader normalises. A shard that is there, made by the same weights from the same
    images and crop, is not made again. Each rank makes its own shards.
    """
    folder, stats = ImageFolder(args.encode, option="--encode"), args.out / "latents_stats.pt"
    check_output(stats, folder)
    crops, M = Crops(args.size, folder), len(folder)
    names = [str(Path(file).relative_to(args.encode)) for file in folder.files]
    images = [(name, *identity(file)[1:]) for name, file in zip(names, folder.files)]
    key = digest(model.identity or model.name, args.size, args.sample, args.shard, args.flip, images)
    shards = [range(M)[i:i + args.shard] for i in range(0, M, args.shard)]
    paths = [args.out / f"latents-{i:05}.safetensors" for i in range(len(shards))]
    others = sorted(set(args.out.glob("*.safetensors")) - set(paths))
    require(not others, f"{''.join(map(str, others[:1]))} is none of the {len(paths)} shards to be written, "
                        "and would be read as one: move it away, or choose another --out")

    announce(model, crops, M, args)
    about = {"key": key, "images": str(args.encode.absolute()), "model": model.name,
             "classes": json.dumps(folder.classes)}
    sums = 0
    for shard, path in list(zip(shards, paths))[RANK::WORLD]:
        require(not path.exists() or load_metadata(path).get("key") == key,
                f"{path} holds latents of another model, crop, --shard, --flip or images: delete it, or "
                "choose another --out")
        if path.exists() and model.identity:
            z = load_safetensors(path)["latents"]
        else:                                   # also where the weights may have changed unseen
            tensors = encode_crops(model, crops, shard, args, path.stem)
            own_names = json.dumps(names[shard.start:shard.stop])
            save_safetensors(tensors, path, about | {"names": own_names})
            z = tensors["latents"]
        sums = sums + sum(map(latent_sums, z.split(args.batch)))

    mean, std = (t.float().view(1, -1, 1, 1) for t in latent_mean_std(sums, M))          # 2 x [1,C,1,1]
    if RANK == 0:
        write(stats, lambda file: torch.save({"mean": mean, "std": std}, file))


def announce(model, crops, M, args):
    """Say, before hours of work, what M latents take on the disk, from the first image's."""
    shape = encode_crops(model, crops, range(1), args, "first image")["latents"].shape[1:]
    require(len(shape) == 3, f"{model.name} has latents {list(shape)}, but --encode is for [C,h,w]")
    if RANK == 0:
        size = 2 * M * shape.numel() * (1 + args.flip) / 1e9                             # of fp16
        mirrored = ", and of the mirrored images" if args.flip else ""
        print(f"{args.out}: {M} latents of {'x'.join(map(str, shape))}{mirrored}: {size:.3g} GB", flush=True)


def encode_crops(model, crops, items, args, desc):
    """A shard of the crops in the range `items`: {"latents": [M,C,h,w] fp16, "labels": [M], see --flip}."""
    parts = defaultdict(list)
    steps = [items[i:i + args.batch] for i in range(0, len(items), args.batch)]
    for index, images, labels in batches(crops, steps, args, desc):
        x = to_float(images.to(model.device))                                            # [B,3,S,S]
        parts["labels"].append(labels)
        for name, x in [("latents", x), ("latents_flip", x.flip(3))][:1 + args.flip]:
            z = model.latent(x, index[0].item())[0].half().cpu()
            require(z.isfinite().all(), f"{model.name} makes latents beyond fp16's 65504, or NaN")
            parts[name].append(z)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def decode_files(model, args):
    """The images of --decode, a folder of shards or one, as PNGs in --out; those that are there stay.

    --normalized: they are samples of a diffusion model that was trained on what --encode wrote, and become
    z std + mean first, by the latents_stats.pt that lies beside them.
    """
    paths = sorted(args.decode.glob("*.safetensors")) if args.decode.is_dir() else [args.decode]
    require(paths and paths[0].is_file(),
            f"there are no latents {args.decode} to decode: name a safetensors file or a folder of them")
    mean, std = 0, 1
    if args.normalized:
        stats = load_tensors(paths[0].with_name("latents_stats.pt"))
        require({"mean", "std"} <= stats.keys(), f"latents_stats.pt beside {paths[0]} has no mean and std")
        mean, std = stats["mean"], stats["std"]                                          # [1,C,1,1]
    for images in {load_metadata(path).get("images", "") for path in paths}:
        require(not images or not args.out.resolve().is_relative_to(Path(images).resolve()),
                f"the output {args.out} lies inside the images of {images} and would become one: give "
                "another --out")
    for path in paths[RANK::WORLD]:
        decode_shard(model, path, mean, std, args)


def decode_shard(model, path, mean, std, args):
    z = load_safetensors(path).get("latents")                                            # [M,C,h,w]
    require(z is not None, f"{path} holds no tensor `latents` [M,C,h,w]")
    names = json.loads(load_metadata(path).get("names", "[]"))
    names = names or [f"{path.stem}-{i:05}" for i in range(len(z))]     # samples have none: numbers
    targets = [args.out / (name if name.endswith(".png") else name + ".png") for name in names]
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in names)
    require(inside and len(set(targets)) == len(targets),
            f"{path} names two latents alike, or a file outside of {args.out}: rename the images and encode "
            "them again")
    todo = [i for i, target in enumerate(targets) if not target.exists()]
    if len(todo) < len(targets):
        print(f"{args.out}: {len(targets) - len(todo)} of the {len(targets)} images of {path.name} are there "
              "already and stay as they are")
    for i in tqdm(range(0, len(todo), args.batch), path.stem, unit="batch", disable=RANK > 0):
        part = todo[i:i + args.batch]
        try:
            images = to_uint8(model.decode((z[part].float() * std + mean).to(model.device)))     # [B,3,H,W]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:           # torch's own check of the channels
            raise ValueError(f"{path} holds latents of {z.shape[1]} channels that {model.name} cannot decode "
                             f"({str(error).splitlines()[0]}): name the model that made them") from error
        for j, image in zip(part, images.permute(0, 2, 3, 1).cpu().numpy()):
            targets[j].parent.mkdir(parents=True, exist_ok=True)
            write(targets[j], lambda file: Image.fromarray(image).save(file, format="png"))


# ------------------------------------------------------------------ a small DiT

class DiTBlock(nn.Module):
    """AdaLN-zero (Peebles and Xie 2023): x [B,N,d], condition c [B,d] -> [B,N,d]."""

    def __init__(self, d):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, d // 64 if d % 64 == 0 else 1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.modulation = nn.Linear(d, 6 * d)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, 2)   # 6 x [B,1,d]
        h = modulate(x, shift1, scale1)
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class DiT(nn.Module):
    """A DiT of patch 1: z_t [B,N,n], t [B] in [0,1], label [B] in 0 .. classes -> [B,N,n].

    The label `classes` means any class. The last layer maps d to n, so the output lies in a space of d
    dimensions: hence the floor of the loss.
    """

    def __init__(self, N, n, d, depth, classes):
        super().__init__()
        self.classes = classes
        self.embed, self.position = nn.Linear(n, d), nn.Parameter(0.02 * torch.randn(1, N, d))
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.label = nn.Embedding(classes + 1, d)
        self.blocks = nn.ModuleList(DiTBlock(d) for _ in range(depth))
        self.modulation, self.out = nn.Linear(d, 2 * d), nn.Linear(d, n)
        for linear in [*(block.modulation for block in self.blocks), self.modulation, self.out]:
            nn.init.zeros_(linear.weight)       # zero: every block starts as the identity
            nn.init.zeros_(linear.bias)

    def forward(self, z, t, label):
        angle = 1000 * t[:, None] * 10000 ** (-torch.arange(128, device=t.device) / 128)         # [B,128]
        c = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.label(label))      # [B,d]
        x = self.embed(z) + self.position                                                # [B,N,d]
        for block in self.blocks:
            x = block(x, c)
        return self.out(modulate(x, *self.modulation(c)[:, None].chunk(2, 2)))           # [B,N,n]


def shifted(t, m):
    """t' = s t / (1 + (s - 1) t), s = sqrt(m / 4096): times in [0,1] for latents of m = N n dimensions (RAE).

    Reading: s is 1 at least. Below, small latents would hardly ever see the noise that samples start from.
    """
    s = max(1, math.sqrt(m / 4096))
    return s * t / (1 + (s - 1) * t)


def flow_loss(dit, z, label, target, generator):
    """mean (vhat - v)^2 at z_t = (1 - t) z + t eps with v = eps - z, for drawn t and eps.

    z [B,N,n], label [B]. t is uniform, then shifted for the dimension. A tenth of the labels is left out.
    """
    t = shifted(torch.rand(len(z), device=z.device, generator=generator), z[0].numel())  # [B]
    eps = torch.randn(z.shape, device=z.device, generator=generator)                     # [B,N,n]
    left_out = torch.rand(len(z), device=z.device, generator=generator) < 0.1            # [B]
    a = t[:, None, None]                                                                 # t, to multiply
    out = dit((1 - a) * z + a * eps, t, label.masked_fill(left_out, dit.classes))
    if target == "v":
        return F.mse_loss(out, eps - z)
    return ((out - z) / a.clamp(min=0.05)).square().mean()      # vhat - v = (z - zhat) / t; JiT's bound on t


def velocity(dit, z_t, t, label, target, guidance=1):
    """v at z_t [B,N,n], t [B] > 0: what the DiT predicts, or (z_t - zhat) / t where it predicts the latent.

    guidance w (Ho and Salimans 2022): out = out(any class) + w (out(label) - out(any class)).
    """
    out = dit(z_t, t, label)
    if guidance != 1 and dit.classes > 1:
        out = torch.lerp(dit(z_t, t, torch.full_like(label, dit.classes)), out, guidance)
    return out if target == "v" else (z_t - out) / t[:, None, None]


@torch.no_grad()
def sample(dit, z, label, target, guidance=1, steps=50):
    """Latents [B,N,n] of the classes label [B] from noise z [B,N,n]: Euler's method from t = 1 to 0."""
    times = shifted(torch.linspace(1, 0, steps + 1, device=z.device), z[0].numel())
    for t, after in zip(times, times[1:]):
        z = z + (after - t) * velocity(dit, z, t.expand(len(z)), label, target, guidance)
    return z


# ------------------------------------------------------------------ who judges the samples

def images_of(folder, args, device):
    """The centre crops of a folder, [B,3,S,S] in [-1,1] at a time."""
    steps = shares(range(len(folder.files)), args.batch)
    for _, images, _ in batches(Crops(args.size, folder), steps, args, "images"):
        yield to_float(images.to(device))


class Judge:
    """Compares images with the test images, by networks that know no autoencoder.

    fd: Frechet distance to the test images in [CLS ; mean patch token] of --encoder; fid: in Inception's
    features. class: % of the images to which a linear probe on the former gives the class asked for.
    """

    def __init__(self, train, test, args, device):
        teacher = DINOv3.from_pretrained(args.encoder).to(device).requires_grad_(False)

        def features(x):
            cls, _, patches = teacher(x / 127.5 - 1)                                     # [B,D], [B,h w,D]
            return torch.cat([cls, patches.mean(1)], 1)                                  # [B,2D]

        self.networks, self.labels = {"fd": features}, torch.tensor(test.labels, device=device)
        if "fid" not in args.skip:
            self.networks["fid"] = FIDInception(args.inception, args.fid_dims, args.fid_resize).to(device)
        self.test, self.probe = self.look(images_of(test, args, device)), None
        self.gaussians = {name: gaussian(f) for name, f in self.test.items()}
        if len(train.classes) > 1:
            seen = torch.cat([features(to_uint8(x)) for x in images_of(train, args, device)])
            self.probe = fit_probe(seen, torch.tensor(train.labels, device=device))

    @torch.no_grad()
    def look(self, images):
        """{network: features [M,D]} of images [B,3,S,S] in [-1,1] that come in batches, rounded to uint8."""
        parts = [[network(x) for network in self.networks.values()] for x in map(to_uint8, images)]
        return dict(zip(self.networks, map(torch.cat, zip(*parts))))

    def notes(self):
        """Lines on what the distances mean."""
        dims = {name: features.shape[1] for name, features in self.test.items()}
        small = [f"{name} is unreliable: {len(self.labels)} images cannot fill a covariance of {d} dimensions"
                 for name, d in dims.items() if len(self.labels) <= d]
        return small + [f"{name}: {net.protocol}" for name, net in self.networks.items() if name == "fid"]

    def compare(self, **kinds):
        """{fd_KIND, fid_KIND, class_KIND} of each kind of images; their labels are the test images'."""
        seen = {kind: self.look(images) for kind, images in kinds.items()}
        scores = {f"{name}_{kind}": frechet_distance(*gaussian(f), *self.gaussians[name])
                  for kind, features in seen.items() for name, f in features.items()}
        if self.probe:
            for kind, features in {**seen, "test": self.test}.items():
                right = self.probe(features["fd"]).argmax(1) == self.labels
                scores[f"class_{kind}"] = 100 * right.float().mean().item()
        return scores


def gaussian(features):
    """(mean [D], covariance [D,D]) of features [M,D], numpy float64."""
    moments = Moments(features.shape[1], features.device)
    moments.update(features)
    return moments.mean_cov()


def fit_probe(features, labels):
    """Ridge regression of one-hot labels [M] on features [M,D]: a function of features to class scores."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    x, y = (features - mean) / std, F.one_hot(labels).to(features)                       # y [M,classes]
    penalty = 1e-3 * len(x) * torch.eye(x.shape[1], device=x.device)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(0)))                # [D,classes]
    return lambda f: (f - mean) / std @ weight + y.mean(0)


# ------------------------------------------------------------------ generation

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)               # where losses are compared; t 0 is the image, t 1 noise


class Generation:
    """A DiT on the latents of `train`, its losses on a handful of `test`, its samples; files in `folder`.

    Latents [B,n,h,w] become tokens [B,N,n] by a mean and a std: two numbers for one image; else by channel,
    an S-AE's own, or where they are absent (peers, unfinished runs) those of these latents.
    """

    def __init__(self, model, train, test, args, folder):
        self.model, self.test, self.args, self.folder, self.device = model, test, args, folder, model.device
        z = torch.cat([model.latent(x, i * args.batch)[0]
                       for i, x in enumerate(images_of(train, args, self.device))])      # [M,n,h,w]
        sae, self.shape = model.model, z.shape[2:]
        if len(z) == 1:
            self.mean, self.std = z.mean(), z.std()
        elif isinstance(sae, SAE) and sae.latent_mean.isfinite().all():
            self.mean, self.std = sae.latent_mean, sae.latent_std
        else:
            mean, std = latent_mean_std(latent_sums(z), len(z))
            self.mean, self.std = mean.to(z), std.to(z).clamp(min=1e-6)
        self.z, self.labels = self.tokens(z), torch.tensor(train.labels, device=self.device)
        self.choose(test)

        _, N, n = self.z.shape
        torch.manual_seed(args.seed)
        self.dit = DiT(N, n, args.dit_width, args.dit_depth, len(train.classes)).to(self.device)
        self.ema = copy.deepcopy(self.dit).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.dit.parameters(), lr=args.dit_lr, weight_decay=0, fused=True)
        self.step, self.records = 0, []

        images = [identity(file) for file in train.files + test.files]
        options = {key: value for key, value in vars(args).items() if key.startswith("dit_")}
        # The weights of a peer may change unseen, but then its latents do.
        weights = model.identity or (model.name, zlib.crc32(z.cpu().numpy().tobytes()))
        self.key = digest(weights, images, options, args.size, args.sample, args.seed, args.target)

    def choose(self, test, most=8):
        """The handful of evenly spaced test images x [K,3,S,S] on which losses are compared."""
        index = np.linspace(0, len(test.files) - 1, min(most, len(test.files))).astype(int)
        self.x = load_crops([test.files[i] for i in index], self.args.size).to(self.device)
        z, _, self.xhat = self.model.reconstruct(self.x)
        self.z_test, self.labels_test = self.tokens(z), torch.tensor(test.labels, device=self.device)[index]

    def tokens(self, z):
        return (z.flatten(2).transpose(1, 2) - self.mean) / self.std                     # [B,N,n]

    @torch.no_grad()
    def images(self, tokens):
        z = (tokens * self.std + self.mean).transpose(1, 2).unflatten(2, self.shape)     # [B,n,h,w]
        return torch.cat([self.model.decode(part) for part in z.split(self.args.batch)])         # [B,3,S,S]

    def train(self):
        """From dit.pt or from the start, up to --dit-steps."""
        args, generator = self.args, torch.Generator(self.device)
        self.resume()
        if not self.records:
            self.record()
        steps = range(self.step + 1, args.dit_steps + 1)
        for self.step in tqdm(steps, self.model.name[-30:], unit="step"):
            generator.manual_seed(1_000_003 * args.seed + self.step)    # so that a run goes on exactly
            i = torch.randint(len(self.z), (args.dit_batch,), device=self.device, generator=generator)
            loss = flow_loss(self.dit, self.z[i], self.labels[i], args.target, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            # Up over the first twentieth, and down to 0 over the second half.
            s = (self.step - 0.5) / args.dit_steps
            self.optimizer.param_groups[0]["lr"] = args.dit_lr * min(1, 20 * s, 2 * (1 - s))
            self.optimizer.step()
            # Over about the last tenth of the steps so far, in a run of any length (Karras et al. 2024).
            weight = 1 - (1 - 1 / self.step) ** 8
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.dit.parameters()), weight)
            if self.step % max(1, args.dit_steps // 20) == 0 or self.step == args.dit_steps:
                self.record()

    @torch.no_grad()
    def record(self):
        """The averaged DiT's losses at TIMES, in latents and in images: a line, a picture, a checkpoint."""
        z, x, K, T, n = self.z_test[:, None], self.x[:, None], len(self.x), len(TIMES), self.z.shape[2]
        eps = torch.randn(K, T, *z.shape[2:], generator=torch.Generator().manual_seed(1)).to(z)  # [K,T,N,n]
        t = torch.tensor(TIMES, device=self.device)
        a = t[:, None, None]                                                             # [T,1,1]
        z_t = (1 - a) * z + a * eps
        v = velocity(self.ema, z_t.flatten(0, 1), t.repeat(K), self.labels_test.repeat_interleave(T),
                     self.args.target).view_as(z_t)
        losses = (v - (eps - z)).square().mean((0, 2, 3))                                # [T]
        images = self.images((z_t - a * v).flatten(0, 1)).unflatten(0, (K, T))           # [K,T,3,S,S]
        db = psnr(to_uint8(x).expand_as(images).flatten(0, 1), to_uint8(images).flatten(0, 1))

        record = {"model": self.model.name, "step": self.step, "n": n, "latent_loss": losses.mean().item(),
                  "latent_loss_at": dict(zip(map(str, TIMES), losses.tolist())),
                  "rgb_l1": (images - x).abs().mean().item(), "rgb_psnr": db.mean().item(),
                  "reconstruction_psnr": psnr(to_uint8(self.x), to_uint8(self.xhat)).mean().item()}
        if len(self.z) == 1:                    # one image's v has a floor (RAE, Theorem 1); x has none
            record["floor"] = max(0, 1 - self.args.dit_width / n) if self.args.target == "v" else 0
        self.records.append(record)
        # a row an image: itself, its reconstruction, what the DiT makes of it from each time
        save_grid(self.folder / f"{self.step:06}.png", *torch.cat([x, self.xhat[:, None], images], 1))
        self.save(dit=self.dit.state_dict(), optimizer=self.optimizer.state_dict())

    def samples(self, labels):
        """Images [B,3,S,S] of the classes labels, --batch at a time."""
        generator = torch.Generator(self.device).manual_seed(self.args.seed)
        for label in labels.split(self.args.batch):
            noise = torch.randn(len(label), *self.z.shape[1:], device=self.device, generator=generator)
            yield self.images(sample(self.ema, noise, label, self.args.target, self.args.guidance))

    def finish(self, judge):
        """samples.png, a row for each of the first 16 classes, and what the judge says: the last record."""
        rows = torch.arange(min(16, self.dit.classes), device=self.device).repeat_interleave(8)
        save_grid(self.folder / "samples.png", *torch.cat(list(self.samples(rows))).split(8))
        if judge:
            reconstructions = (self.model.reconstruct(x, i * self.args.batch)[2]
                               for i, x in enumerate(images_of(self.test, self.args, self.device)))
            self.records[-1] |= judge.compare(gen=self.samples(judge.labels), rec=reconstructions)
        self.save()                             # without the optimizer: the run is over
        return self.records[-1]

    def save(self, **more):
        state = {"key": self.key, "step": self.step, "records": self.records, "ema": self.ema.state_dict()}
        write(self.folder / "dit.pt", lambda file: torch.save(state | more, file))
        write(self.folder / "metrics.jsonl", lambda file: file.writelines(map(to_json, self.records)))

    def resume(self):
        path = self.folder / "dit.pt"
        if not path.exists():
            return
        state = torch_load(path)
        require(state["key"] == self.key, f"{path} is of other weights, images or options: delete it, or "
                                          "choose another --out")
        self.step, self.records = state["step"], state["records"]
        self.ema.load_state_dict(state["ema"])
        if "dit" in state:                      # not in that of a run that has ended
            self.dit.load_state_dict(state["dit"])
            self.optimizer.load_state_dict(state["optimizer"])


def generate_all(args, device):
    """--generate with every model, each in a folder of its own, and one table."""
    require(WORLD == 1, "--generate trains on one device: run it without torchrun")
    train = test = SimpleNamespace(files=[str(args.generate)], labels=[0], classes=[""])
    many = args.generate.is_dir()
    if many:
        train, test = ImageFolder(args.generate, option="--generate"), ImageFolder(args.data)
        require(args.encoder, "--generate DIR measures samples in a teacher's features: name a DINOv3 file "
                              "with --encoder")
        differ = sorted(set(train.classes) ^ set(test.classes))
        require(not differ or len(train.classes) == len(test.classes) == 1,
                f"{''.join(differ[:1])} is in one of --generate and --data alone, and samples of a class "
                "need test images of it: pass folders of the same classes")
        require(len(test) > 1, f"{args.data} holds one image, too few for a distance: name more with --data")
    out = args.out or Path("runs/generate")
    outputs = [out / f"{i}-{Path(spec).stem}" for i, spec in enumerate(args.models)]
    for folder in outputs:
        check_output(folder / "metrics.jsonl", *([train, test] if many else []))
    judge = Judge(train, test, args, device) if many else None

    rows = []
    for spec, folder in zip(args.models, outputs):
        run = Generation(load_model(spec, args, device), train, test, args, folder)
        run.train()
        rows.append(run.finish(judge))
    print_table(rows, {"n": 0, "floor": 4, "latent_loss": 4, "rgb_l1": 4, "rgb_psnr": 2,
                       "reconstruction_psnr": 2, "fd_gen": 3, "fd_rec": 3, "fid_gen": 2, "fid_rec": 2,
                       "class_gen": 1, "class_rec": 1, "class_test": 1})
    for line in judge.notes() if judge else ():
        print(" ", line)
