"""The images of train.py and eval.py, LPIPS, and how a command ends. The method is not here.

Pixels are uint8 [...,H,W,3] in data workers, and [B,3,H,W] in [-1,1] from `to_float` on.
"""
import argparse
import errno
import io
import json
import math
import os
import posixpath
import sys
import tarfile
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, PngImagePlugin
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sae_weights import load_tensors, require, write

NO_CLASSES = ("lost+found", "@eaDir", "__MACOSX")               # what file systems and archives leave behind
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long comment makes no bad image


# ------------------------------------------------------------------ folders

class ImageFolder:
    """The images under `root`, by class and name: `files` [n], `labels` [n], `classes`.

    `root` holds a folder a class, or images alone, or WebDataset's tars, see `read_tar`. Classes are sorted
    by name, and by value where the name is a number. Every suffix that Pillow reads counts, and links are
    followed. Names that begin with a dot and NO_CLASSES are left out; a line on stderr counts other files.
    `option` is what messages call the folder.
    """

    def __init__(self, root, option="--data"):
        self.root = root = Path(root)
        require(root.is_dir(), f"there is no image folder {root}: name one with {option}")
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        folders = sorted(d for d in root.iterdir() if d.is_dir() and not hidden(d.name))
        names = [p.name for p in root.iterdir() if p.is_file() and not hidden(p.name)]
        loose = [name for name in names if os.path.splitext(name)[1].lower() in suffixes]
        tars = sorted(name for name in names if name.endswith(TARS))

        kinds = {"images ({})": loose, "the folder {}": [d.name for d in folders], "the tar {}": tars}
        there = [kind.format(some[0]) for kind, some in kinds.items() if some]
        require(len(there) < 2,
                f"{root} holds {' and '.join(there)}: it takes one folder a class, or images alone, or tars "
                f"alone; move one away, or name another with {option}")

        self.folders = folders or [root]
        files = ((folder.name, path) for folder in self.folders for path in sorted(walk(folder)))
        images, left_out = defaultdict(list), Counter()
        for name, path in list_tars(root, tars) if tars else files:
            suffix = os.path.splitext(path)[1]
            if suffix.lower() in suffixes:
                images[name].append(path)
            else:
                left_out[suffix or "without a suffix"] += 1
        for folder in self.folders:
            require(images if tars else folder.name in images,
                    f"{folder} holds no images: fill it or remove it, or name another with {option}")
        if len(images) > 1 and "" in images:
            raise ValueError(f"{images[''][0]} has no label, and other images have one: give one to all of "
                             "them, or to none")

        self.classes = sorted(images, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
        self.files = [path for name in self.classes for path in images[name]]
        self.labels = [label for label, name in enumerate(self.classes) for _ in images[name]]
        if left_out and os.environ.get("RANK", "0") == "0":
            counts = ", ".join(f"{n} {suffix}" for suffix, n in left_out.most_common())
            print(f"{root}: left out, since they are no images: {counts}", file=sys.stderr)

    def __len__(self):
        return len(self.files)


def hidden(name):
    return name.startswith(".") or name in NO_CLASSES


def walk(folder):
    """The paths of all files under `folder`, through links; each folder once, for a link can lead back up."""
    def refuse(error):                  # os.walk would leave out a folder that it cannot read, without a word
        raise error

    seen = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()             # os.walk goes into those that are left here
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not hidden(name)]
        yield from (os.path.join(here, name) for name in names if not hidden(name))


def refuse_output_inside(out, folder):
    """ValueError when `out` lies inside an ImageFolder: pictures written there would become its images."""
    for root in (folder.root, *folder.folders):
        require(not Path(out).resolve().is_relative_to(root.resolve()),
                f"the output {out} lies inside the images of {root} and would become one: give another --out")


def check_output(path, *folders):
    """ValueError, before hours of work, if `path` is among the images or could not be written after them."""
    for folder in folders:
        refuse_output_inside(path, folder)
    trial = Path(f"{path}.tmp")                 # the name under which `write` begins
    try:
        # A folder is no file, nor is a device, which a rename would replace.
        require(path.is_file() or not path.exists(), f"--out {path} is no file: name another")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink(missing_ok=True)           # another rank may have been faster
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name another --out") from error


# ------------------------------------------------------------------ tars

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")       # all but the first are refused


class Member(NamedTuple):
    """A file in a tar: `size` bytes from `offset` on. Its path is the one that it would have in a folder."""
    name: str
    tar: str
    offset: int
    size: int

    def __str__(self):
        return f"{self.tar}/{self.name}"

    __fspath__ = __str__

    def open(self):
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def list_tars(root, tars):
    """Yields (class, Member) of the files in the tars of `root`, by name; "" is no class.

    Reading all headers takes minutes: root/.index.json keeps them until a tar's name, size or time changes.
    """
    index, paths = root / ".index.json", [f"{root}/{tar}" for tar in tars]
    stats = [[tar, os.stat(path).st_size, os.stat(path).st_mtime_ns] for tar, path in zip(tars, paths)]
    state = {"version": 1, "tars": stats}       # the version of what `read_tar` makes of them
    try:
        kept = json.loads(index.read_bytes())
    except (OSError, ValueError):
        kept = None
    if isinstance(kept, dict) and kept.get("state") == state:
        members = kept["members"]
    else:
        first = os.environ.get("RANK", "0") == "0"
        bar = tqdm(paths, f"index of {root}", unit="tar", delay=1, disable=not first)
        members = sorted((name, i, *rest) for i, path in enumerate(bar) for name, *rest in read_tar(path))
        try:
            if first:
                content = json.dumps({"state": state, "members": members}).encode()
                write(index, lambda file: file.write(content))
        except OSError as error:        # others may own the folder, and all works without an index
            print(f"{index} cannot be kept ({error.strerror}), and each start reads all tars: name a folder "
                  "of your own with links to them", file=sys.stderr)
    for name, i, offset, size, label in members:
        yield label, Member(name, paths[i], offset, size)


def read_tar(path):
    """[(name, offset, size, class)] of the files in a tar. NAME.jpg has its class in NAME.cls or NAME.json.

    Where the class is not found so, NAME ends at the first dot, as WebDataset has it: 0.img.jpg and 0.cls.
    NAME.cls is a number or a name, NAME.json has it as "label" or "cls"; without either it is "". Raises
    ValueError, with the member at fault, for a tar that is damaged, cut short or compressed, or holds links.
    """
    files, labels, last = [], {}, "its start"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                last, name = member.name, posixpath.normpath(member.name)
                if member.isdir() or any(map(hidden, name.split("/"))):
                    continue
                require(member.isfile(), "it is a link")
                stem, suffix = os.path.splitext(name)
                if suffix == ".cls":
                    labels[stem] = tar.extractfile(member).read().decode().strip()
                elif suffix == ".json":
                    about = json.loads(tar.extractfile(member).read())
                    label = about.get("label", about.get("cls")) if isinstance(about, dict) else None
                    labels.setdefault(stem, "" if label is None else str(label))
                else:
                    files.append((name, member.offset_data, member.size))
            # tarfile takes a header that it cannot read for the end, which is a block of zeros.
            tar.fileobj.seek(tar.offset)
            require(tar.fileobj.read(512) == bytes(512), "no header follows")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path} cannot be read from {last} on ({error}): pack it again, not compressed "
                         "and without links") from error

    def label(name):
        folder, file = posixpath.split(name)
        sample = posixpath.join(folder, file.split(".")[0])
        return labels.get(os.path.splitext(name)[0], labels.get(sample, ""))

    return [(*file, label(file[0])) for file in files]


# ------------------------------------------------------------------ one image

def load_image(path, at_least=None):
    """The image at `path` as PIL RGB, upright (EXIF), 16 bits scaled to 8, the first frame of an animation.

    path: of a file, or a Member.
    at_least: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where each side still has so many pixels.
    Raises ValueError when the pixels cannot be read.
    """
    try:
        with Image.open(path.open() if isinstance(path, Member) else path) as im:
            if at_least:
                im.draft("RGB", (at_least, at_least))           # leaves all but JPEGs as they are
            im.load()
            turn = orientation(im)
            if im.mode.startswith("I"):                         # 16 bits: Pillow's convert would clip at 255
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            im = im.convert("RGB")
            return im if turn == 1 else im.transpose(Image.Transpose[TURNS[turn - 2]])
    except Image.UnidentifiedImageError as error:               # its text has an address, other each time
        raise ValueError(f"{path} cannot be read as an image: Pillow knows no such kind") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels: shrink it or remove it ({error})") from error
    except Exception as error:          # Pillow's decoders raise a dozen kinds of error on damaged files
        raise ValueError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error


def orientation(im):
    """EXIF's, 1 to 8. 1, upright, where the metadata cannot be read: the pixels still can."""
    try:
        turn = im.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:                   # the parser raises half a dozen kinds of error on damaged metadata
        turn = 1
    return turn if turn in range(1, 9) else 1


def center_crop(im, size):
    """ADM's centre crop, PIL -> PIL: BOX halves while the short side is 2 size or more, BICUBIC, crop."""
    while min(im.size) >= 2 * size:
        im = im.resize((im.width // 2, im.height // 2), Image.BOX)
    im = im.resize(resized(*im.size, size), Image.BICUBIC)
    left, top = (im.width - size) // 2, (im.height - size) // 2
    return im.crop((left, top, left + size, top + size))


def load_crops(files, size):
    """The centre crops of image files, [n,3,size,size] in [-1,1]. ValueError as from `load_image`."""
    crops = [np.asarray(center_crop(load_image(file), size)) for file in files]
    return to_float(torch.from_numpy(np.stack(crops)))


def resized(width, height, short_side):
    """(width, height) scaled so that the shorter one is `short_side`, rounded."""
    scale = short_side / min(width, height)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def to_float(x):
    """uint8 [B,H,W,3] -> [B,3,H,W] in [-1,1], channels_last."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """[-1,1] -> uint8, round(255 (x + 1) / 2), the same shape."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(path, *rows):
    """Rows of images [n,3,H,W] in [-1,1] -> one PNG."""
    grid = torch.cat([torch.cat(list(to_uint8(row)), 2) for row in rows], 1)             # [3,rows H,n W]
    image = Image.fromarray(grid.permute(1, 2, 0).cpu().numpy())
    write(path, lambda file: image.save(file, format="png"))


# ------------------------------------------------------------------ how far two images are apart

def psnr(x, y):
    """10 log10(255^2 / mean (x - y)^2) of each image, in dB: uint8 [B,3,H,W] twice -> [B]; Inf if equal."""
    return 10 * torch.log10(255 ** 2 / (x.float() - y.float()).square().flatten(1).mean(1))


class LPIPS(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018): x, y [B,3,H,W] in [-1,1] -> [B]. The gradient goes to x alone.

    The heads come with the lpips package; `path` is torchvision's file of the trunk (vgg, alex or squeeze),
    which is never downloaded here. Raises ValueError when it is not there, or of another network.
    """

    def __init__(self, net, path):
        super().__init__()
        import lpips                         # imports torchvision, which takes seconds: only where it is used
        require(Path(path).is_file(),
                f"there is no file {path} with the LPIPS trunk {net}: run ./weights.sh --only vgg16, name "
                "one with --lpips-weights, or leave LPIPS out (train.py --lpips 0, eval.py --skip lpips)")
        with warnings.catch_warnings():      # torchvision deprecates the argument that lpips passes
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # lpips cuts torchvision's `features` into slices and keeps the numbers: slice2.5 is features.5
        tensors, trunk = load_tensors(path), model.net.state_dict()
        found = {name: tensors.get("features." + name.split(".", 1)[1]) for name in trunk}
        wrong = [name for name, t in found.items() if t is None or t.shape != trunk[name].shape]
        require(not wrong,
                f"{path} does not hold torchvision's {net} for LPIPS: no {''.join(wrong[:1])} of its shape")
        model.net.load_state_dict(found)
        self.scaling, self.net = model.scaling_layer, model.net
        self.heads = nn.ModuleList(h.model[-1] for h in model.lins)
        self.requires_grad_(False).eval()

    def forward(self, x, y):
        with torch.no_grad():
            targets = self.net(self.scaling(y))
        # checkpoint: the normalised features are as large as the features, and quickly computed once more.
        return sum(checkpoint(unit_distance, f, target, head.weight, use_reentrant=False)
                   for f, target, head in zip(self.net(self.scaling(x)), targets, self.heads))

    def train(self, mode=True):
        return super().train(False)          # frozen stays in eval


def unit_distance(x, y, head):
    """Mean over h w of sum_c head[c] (x / |x| - y / |y|)^2: x, y [B,C,h,w], head [1,C,1,1] -> [B], fp32."""
    x, y = (f.float() / (torch.linalg.vector_norm(f.float(), dim=1, keepdim=True) + 1e-10) for f in (x, y))
    return (head.float() * (x - y).square()).sum(1).mean((1, 2))


# ------------------------------------------------------------------ training

class TrainingImages(Dataset):
    """Item g, the number of the sample in the run -> (uint8 [size,size,3], sentences on skipped files).

    Epoch g // n has its own permutation; crop and flip are drawn from (seed, epoch, place in it). The shorter
    side becomes `size`. A bad file gives way to the next. After more than 1 % of all files in a row the image
    is None, and `batches` raises: from here, an error would come with a data worker's traceback.
    """

    def __init__(self, folder, size, seed):
        self.files, self.size, self.seed = folder.files, size, seed
        self.epoch, self.order = None, None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, g):
        n, skipped = len(self.files), []
        epoch, position = divmod(g, n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(n)
        for _ in range(n // 100 + 2):
            rng = np.random.default_rng((self.seed, epoch, position))
            try:
                return self.crop(self.files[self.order[position]], rng), skipped
            except ValueError as error:
                skipped.append(str(error))
            position = (position + 1) % n
        return None, skipped

    def crop(self, path, rng):
        # Decoded to twice the size or more, crops of 258 photos have a PSNR of 49 dB (at worst 40) against
        # those of the full decode; decoded down to the size itself, 39 dB (26).
        im = load_image(path, at_least=2 * self.size)
        require(min(im.size) * 2 >= self.size,
                f"{path} is {im.width}x{im.height}, too small for crops of {self.size}, since enlarged more "
                "than twice it would teach blur: remove it, or lower --size")
        w, h = resized(*im.size, self.size)
        x = torch.from_numpy(np.array(im)).permute(2, 0, 1)[None]                        # [1,3,height,width]
        # 74 dB (at worst 55) from Pillow's BICUBIC, and 3 times as fast.
        x = F.interpolate(x, (h, w), mode="bicubic", antialias=True)[0]                  # [3,h,w]
        left, top = rng.integers(w - self.size + 1), rng.integers(h - self.size + 1)
        x = x[:, top:top + self.size, left:left + self.size]                             # [3,size,size]
        return (x.flip(2) if rng.random() < 0.5 else x).permute(1, 2, 0).contiguous()


def batches(images, passes, args, rank, world):
    """Yields (number of the first sample in the run, crops uint8 [batch,size,size,3]) of this rank.

    passes: numbers of the passes, forward and backward. Each rank names the files that it cannot use, once,
    on stderr, and raises ValueError when they are more than 1 % of all, or clearly of those it has seen.
    """
    def first(i):                       # number of the first sample of pass i
        return (i * world + rank) * args.batch

    samples = (range(first(i), first(i) + args.batch) for i in passes)
    workers = {"prefetch_factor": 4, "timeout": 1800, "worker_init_fn": own_session} if args.workers else {}
    loader = DataLoader(images, batch_sampler=samples, collate_fn=collate, num_workers=args.workers,
                        pin_memory=torch.cuda.is_available(), **workers)
    bad, seen = set(), 0
    for i, (x, skipped) in zip(passes, loader):
        new = sorted(set(skipped) - bad)
        bad.update(new)
        for sentence in new:
            tqdm.write(f"skipped: {sentence}", file=sys.stderr)
        # Of many ranks each sees few of all in days. Ten files and four deviations are left to chance.
        seen += args.batch
        require(len(bad) * 100 <= min(len(images), seen + 40 * math.sqrt(seen) + 1000),
                f"more than 1 % of the {len(images)} images cannot be used, such as: {''.join(new[-1:])}")
        yield first(i), x


def collate(items):
    crops = [crop for crop, _ in items]
    skipped = [sentence for _, sentences in items for sentence in sentences]
    return None if any(crop is None for crop in crops) else torch.stack(crops), skipped


def own_session(worker):
    # Ctrl-C and torchrun signal a whole process group. The data workers leave it: the loop needs them to
    # reach its checkpoint.
    if hasattr(os, "setsid"):           # Windows has no groups to leave
        os.setsid()


# ------------------------------------------------------------------ the command line

class Stream:
    """A stream that goes on when its reader has ended, as `| tee log` does by Ctrl-C: into nothing."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            return call(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return call(*args)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each help text with its default, if there is one, and the description's lines as they are."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


def check_launcher():
    """ValueError where a launcher has started several processes that are not ranks of one run."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "1")
        require("RANK" in os.environ or tasks == "1",
                f"{name} is {tasks}, but these processes are no ranks of one run: start one task a node, "
                f"with torchrun --nproc_per_node GPUS {Path(sys.argv[0]).name} ..., or unset {name}")


def command(main):
    """Run main(). What a user can mend ends as one sentence on stderr and exit status 1, else a traceback."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")           # for names of files that no encoding knows
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        return record(main)()                                   # record: torchrun names the first that failed
    except ValueError as error:
        problem = str(error)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, torch.OutOfMemoryError):
            problem = f"out of GPU memory: lower --batch ({reason})"
        elif isinstance(error, ConnectionError) or "DataLoader" in reason:
            problem = f"a data worker has died, often for want of memory: take fewer --workers ({reason})"
        elif isinstance(error, dist.DistError) or "gloo" in reason:
            problem = ("the ranks cannot reach each other: if one has ended, its own message says why; if "
                       f"none has, look at the network, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME ({reason})")
        elif isinstance(error, OSError):                        # a full disk, a missing permission
            problem = f"{error.filename or 'a file'}: {error.strerror or reason}; what was written is whole"
        else:
            raise
    sys.exit(f"{Path(sys.argv[0]).name}: {problem}")
