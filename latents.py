"""The latent space in use: latents on disk for diffusion training, and a small DiT trained on them here.

    python eval.py last.pt --encode DIR --out FOLDER                 # --decode is the way back
    python eval.py a.pt b.pt --overfit image.png                     # is a low latent loss a good image?

Letters: B batch, C channels and h w positions of a latent; for the DiT a latent is N = h w tokens of n = C
channels, and d is its width.
"""
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (ImageFolder, center_crop, load_image, psnr, refuse_output_inside, save_grid, to_float,
                    to_uint8)
from eval import (RANK, WORLD, Crops, batches, check_output, digest, identity, latent_mean_std, latent_sums,
                  load_model, print_table, to_json)
from sae_weights import load_safetensors, load_tensors, require, save_safetensors, write


def run(args, device):
    """The mode of eval.py that its options ask for."""
    if args.overfit:
        overfit_all(args, device)
    else:
        (encode_folder if args.encode else decode_files)(load_model(args.models[0], args, device), args)


# ------------------------------------------------------------------ latents on disk

@torch.no_grad()
def encode_folder(model, args):
    """Latents of the images of --encode in the folder --out, as LightningDiT's ImgLatentDataset reads them.

    latents-00000.safetensors .. hold `latents` [n,C,h,w] fp16, `labels` [n] and, in the metadata, the files'
    names; with --flip also `latents_flip` of the mirrored images, for which that loader asks at every second
    item. latents_stats.pt holds `mean` and `std` [1,C,1,1] of `latents`, by which the loader normalises.
    A shard that is there, made by the same weights from the same images and crop, is not made again. Each
    rank makes its own shards.
    """
    folder, stats = ImageFolder(args.encode, option="--encode"), args.out / "latents_stats.pt"
    check_output(stats, folder)
    crops, n = Crops(args.size, folder), len(folder)
    names = [str(Path(file).relative_to(args.encode)) for file in folder.files]
    images = [(name, *identity(file)[1:]) for name, file in zip(names, folder.files)]
    key = digest(model.identity or model.name, args.size, args.sample, args.shard, args.flip, images)
    shards = [range(n)[i:i + args.shard] for i in range(0, n, args.shard)]
    paths = [args.out / f"latents-{i:05}.safetensors" for i in range(len(shards))]
    others = sorted(set(args.out.glob("*.safetensors")) - set(paths))
    require(not others, f"{''.join(map(str, others[:1]))} is none of the {len(paths)} shards to be written, "
                        "and would be read as one: move it away, or choose another --out")

    announce(model, crops, n, args)
    about, sums = {"key": key, "images": str(args.encode.absolute()), "model": model.name}, 0
    for shard, path in list(zip(shards, paths))[RANK::WORLD]:
        require(not path.exists() or metadata(path).get("key") == key,
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

    mean, std = (t.float().view(1, -1, 1, 1) for t in latent_mean_std(sums, n))          # 2 x [1,C,1,1]
    if RANK == 0:
        write(stats, lambda file: torch.save({"mean": mean, "std": std}, file))


def announce(model, crops, n, args):
    """Say, before hours of work, what n latents take on the disk, from the first image's."""
    shape = encode_crops(model, crops, range(1), args, "first image")["latents"].shape[1:]
    require(len(shape) == 3, f"{model.name} has latents {list(shape)}, but --encode is for [C,h,w]")
    if RANK == 0:
        size = 2 * n * shape.numel() * (1 + args.flip) / 1e9                             # of fp16
        mirrored = ", and of the mirrored images" if args.flip else ""
        print(f"{args.out}: {n} latents of {'x'.join(map(str, shape))}{mirrored}: {size:.3g} GB", flush=True)


def encode_crops(model, crops, items, args, desc):
    """A shard of the crops in the range `items`: {"latents": [n,C,h,w] fp16, "labels": [n], see --flip}."""
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
    for images in {metadata(path).get("images", "") for path in paths}:
        if images and Path(images).is_dir():
            refuse_output_inside(args.out, ImageFolder(images))
    for path in paths[RANK::WORLD]:
        decode_shard(model, path, mean, std, args)


def decode_shard(model, path, mean, std, args):
    z = load_safetensors(path).get("latents")                                            # [n,C,h,w]
    require(z is not None, f"{path} holds no tensor `latents` [n,C,h,w]")
    # Samples have no names: they get numbers.
    names = json.loads(metadata(path).get("names", "[]")) or [f"{path.stem}-{i:05}" for i in range(len(z))]
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


def metadata(path):
    """The __metadata__ of a safetensors file: {str: str}."""
    load_safetensors(path)                      # refuses what is none
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


# ------------------------------------------------------------------ one image, one small DiT

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
    """A DiT of patch 1 without classes: z_t [B,N,n], t [B] in [0,1] -> [B,N,n].

    The last layer maps d to n, so the output lies in a space of d dimensions: hence the floor of the loss.
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
        angle = 1000 * t[:, None] * 10000 ** (-torch.arange(128, device=t.device) / 128)         # [B,128]
        c = self.time(torch.cat([angle.cos(), angle.sin()], 1))                          # [B,d]
        x = self.embed(z) + self.position                                                # [B,N,d]
        for block in self.blocks:
            x = block(x, c)
        return self.out(modulate(x, *self.modulation(c)[:, None].chunk(2, 2)))           # [B,N,n]


TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)               # where losses are compared; t 0 is the image, t 1 noise


def velocity(dit, z_t, t, target):
    """What the DiT predicts at z_t [B,N,n], t [B]: v itself, or the image x, from which v = (z_t - x) / t."""
    out = dit(z_t, t)
    return out if target == "v" else (z_t - out) / t.clamp(min=0.05)[:, None, None]      # JiT's bound


def flow_loss(dit, z, batch, target, generator):
    """mean (vhat - v)^2 at z_t = (1 - t) z + t eps with v = eps - z, for drawn t and eps; z [1,N,n].

    t is uniform, then shifted for the dimension m = N n: t' = s t / (1 + (s - 1) t), s = sqrt(m / 4096).
    """
    shift = math.sqrt(z.numel() / 4096)
    t = torch.rand(batch, device=z.device, generator=generator)                          # [B]
    t = shift * t / (1 + (shift - 1) * t)
    eps = torch.randn(batch, *z.shape[1:], device=z.device, generator=generator)         # [B,N,n]
    a = t[:, None, None]                                                                 # t, to multiply
    z_t = (1 - a) * z + a * eps                                                          # [B,N,n]
    # For x the bound on t holds in the target, too, so that a perfect x has loss 0.
    v = eps - z if target == "v" else (z_t - z) / a.clamp(min=0.05)
    return F.mse_loss(velocity(dit, z_t, t, target), v)


def overfit(model, args, folder):
    """Train a DiT on the latent of the image --overfit: records of latent loss and decoded image in `folder`.

    With --target v and a width d < n the loss cannot go below (n - d) / n (RAE, Theorem 1); with x it can.
    The latent is brought to mean 0 and variance 1.
    """
    image = np.array(center_crop(load_image(args.overfit), args.size))
    x = to_float(torch.from_numpy(image)[None].to(model.device))                         # [1,3,S,S]
    z, _, clean = model.reconstruct(x)                                                   # [1,n,h,w]
    mean, std, shape = z.mean(), z.std(), z.shape[2:]
    z = ((z - mean) / std).flatten(2).transpose(1, 2)                                    # [1,N,n]
    _, N, n = z.shape
    torch.manual_seed(0)
    dit = DiT(N, n, args.dit_width, args.dit_depth).to(model.device)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=args.dit_lr, weight_decay=0)
    eps = torch.randn(len(TIMES), N, n, generator=torch.Generator().manual_seed(1)).to(model.device)
    t = torch.tensor(TIMES, device=model.device)
    a, records = t[:, None, None], []
    floor = max(0, (n - args.dit_width) / n) if args.target == "v" else 0
    about = {"model": model.name, "n": n, "floor": floor,
             "reconstruction_psnr": psnr(to_uint8(x), to_uint8(clean)).item()}

    @torch.no_grad()
    def record(step):
        z_t = (1 - a) * z + a * eps
        v = velocity(dit, z_t, t, args.target)
        losses = (v - (eps - z)).square().flatten(1).mean(1)
        latents = ((z_t - a * v) * std + mean).transpose(1, 2).unflatten(2, shape)       # [5,n,h,w]
        images = torch.cat([model.decode(latent[None]) for latent in latents])           # [5,3,S,S]
        records.append(about | {
            "step": step, "latent_loss": losses.mean().item(), "rgb_l1": (images - x).abs().mean().item(),
            "rgb_psnr": psnr(to_uint8(x), to_uint8(images)).mean().item(),
            "latent_loss_at": dict(zip(map(str, TIMES), losses.tolist()))})
        write(folder / "metrics.jsonl", lambda file: file.writelines(map(to_json, records)))
        # the image, its reconstruction, what the DiT makes of it from each time
        save_grid(folder / f"{step:06}.png", torch.cat([x, clean, images]))

    record(0)
    generator = torch.Generator(model.device)
    for step in tqdm(range(1, args.dit_steps + 1), model.name[-30:], unit="step"):
        loss = flow_loss(dit, z, args.dit_batch, args.target, generator.manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(1, args.dit_steps // 20) == 0 or step == args.dit_steps:
            record(step)
    return records[-1]


def overfit_all(args, device):
    """--overfit of every model, each in a folder of its own, and one table."""
    require(WORLD == 1, "--overfit trains on one device: run it without torchrun")
    rows = []
    for i, spec in enumerate(args.models):
        folder = (args.out or Path("runs/overfit")) / f"{i}-{Path(spec).stem}"
        check_output(folder / "metrics.jsonl")
        rows.append(overfit(load_model(spec, args, device), args, folder))
    print_table(rows, {"n": 0, "floor": 4, "latent_loss": 4, "rgb_l1": 4, "rgb_psnr": 2,
                       "reconstruction_psnr": 2})
