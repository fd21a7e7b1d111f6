"""The files of weights: checkpoints, models to publish, DINOv3 in all its namings, safetensors.

A file that is damaged, or another than asked for, is a ValueError of one sentence that names it. Nothing here
imports sae.py, which imports this.
"""
import json
import math
import mmap
import os
import re
import shutil
import zipfile
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch


def require(condition, sentence):
    """ValueError with `sentence`, which says what is wrong and how to mend it, unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


# ------------------------------------------------------------------ checkpoints

CHECKPOINT_VERSION = 2


def load_checkpoint(path):
    """The dict that train.py saved at `path`, on the CPU and mapped. ValueError for anything else."""
    require(Path(path).is_file(), f"there is no checkpoint {path}")
    ckpt = torch_load(path)
    require(isinstance(ckpt, dict) and ckpt.get("version") == CHECKPOINT_VERSION,
            f"{path} is no S-AE checkpoint of version {CHECKPOINT_VERSION}: train.py writes those")
    return ckpt


def assign(model, tensors, refusal):
    """Make `tensors`, uncopied, the state of `model`.

    ValueError unless they have the names and shapes that it expects: `refusal`, and what differs.
    """
    expected = {n: p.shape for n, p in model.state_dict().items()}
    wrong = [f"missing {n}" for n in expected if n not in tensors]
    wrong += [f"left over {n}" for n in tensors if n not in expected]
    wrong += [f"{n} is {list(t.shape)}, not {list(expected[n])}"
              for n, t in tensors.items() if t.shape != expected.get(n, t.shape)]
    more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
    require(not wrong, f"{refusal}: {'; '.join(wrong[:10])}{more}")
    model.load_state_dict(tensors, assign=True)


# ------------------------------------------------------------------ models to publish

EXPORT_VERSION = 1
LICENCE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
CARD = """---
license: other
license_name: dinov3-license
license_link: {licence}
---
# S-AE, a Semantic Auto-encoder

Built with DINOv3. One latent space for understanding and generation: a DINOv3 ViT of width {width} and depth
{depth}, a Gaussian latent of {z_dim} channels for {f} x {f} pixels, and a CNN decoder.

```python
from sae import SAE                     # sae.py needs sae_weights.py, torch and numpy, and nothing else

sae = SAE.from_pretrained("{name}")     # this folder, or owner/name on the hub
z = sae.encode(x).sample(seed=0)        # x [B,3,H,W] in [-1,1], H and W multiples of {f}
xhat = sae.decode(z)
```

{statistics}

The encoder alone, for understanding (on the hub: "owner/name" and `subfolder="encoder"`):

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}/encoder")
encoder = AutoModel.from_pretrained("{name}/encoder")
tokens = encoder(**processor(image, return_tensors="pt")).last_hidden_state
```

{scores}## Licence

These weights derive from DINOv3's: [its licence]({licence})
applies to them, and a copy of it must go with them.
"""


def load_sae(path):
    """(sae.SAEConfig as a dict, {name: fp32 tensor}) of what sae.SAE.from_pretrained takes."""
    # What is not here and looks like owner/name is on the hub; a runs/last.pt is only missing.
    if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)", str(path)):
        path = download(path)
    if not Path(path).is_dir():
        ckpt = load_checkpoint(path)
        return ckpt["config"], ckpt["ema"]
    file = Path(path, "config.json")
    published = read_json(file) if file.exists() else {}
    require(published.get("model_type") == "sae" and published.get("version") == EXPORT_VERSION,
            f"{path} is no folder of SAE.save_pretrained, version {EXPORT_VERSION}: its config.json is "
            "absent or says otherwise")
    return published.get("config"), {name: t.float() for name, t in load_tensors(path).items()}


def download(name):
    """The folder in the hub's cache that holds the S-AE of `name`, owner/name."""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=["config.json", "model.safetensors"])
    except ImportError as error:
        raise ValueError(f"there is no file or folder {name}, and to look on the hub this needs "
                         "`pip install huggingface_hub`") from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no file or folder {name}, and the hub gives none: {reason}") from error


def export(weights, config, folder, dtype, scores):
    """Write what sae.SAE.save_pretrained promises: `weights` by name, `config` a sae.SAEConfig as a dict."""
    folder = Path(folder).resolve()                     # a link's target, to which `part` can be renamed
    part = Path(f"{folder}.tmp")
    require(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
            f"{folder} holds something already: name a new folder, or remove what is there")
    # The statistics of the latent stay as they are: they are few, and what normalize gives depends on them.
    weights = {name.replace("_orig_mod.", ""):          # of parts that torch.compile wraps
               t if dtype is None or name.startswith("latent_") else t.to(dtype)
               for name, t in weights.items()}
    encoder = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}

    def write_json(name, content):
        write(part / name, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))

    try:
        shutil.rmtree(part, ignore_errors=True)         # of an export that was killed
        Path(part, "encoder").mkdir(parents=True)
        write_json("config.json", {"model_type": "sae", "version": EXPORT_VERSION, "config": config})
        save_safetensors(weights, part / "model.safetensors")
        card = model_card(config, folder.name, weights, scores)
        write(part / "README.md", lambda file: file.write(card.encode()))

        encoder_config, preprocessor = hugging_face_config(config["encoder"], encoder)
        write_json("encoder/config.json", encoder_config)
        write_json("encoder/preprocessor_config.json", preprocessor)
        save_safetensors(hugging_face_names(encoder), part / "encoder/model.safetensors", {"format": "pt"})
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_card(config, name, weights, scores):
    """README.md of an exported model in the folder `name`; `scores` is a row of eval.py, or {}."""
    if weights["latent_mean"].isfinite().all():
        statistics = "A diffusion model is trained on `sae.normalize(z)`; `sae.denormalize` is the way back."
    else:
        statistics = "The training had not ended: `sae.normalize` has no statistics of the latent to go by."
    columns = {key: scores.get(key) for key in ("images", "psnr", "ssim", "lpips", "rfid")}
    columns |= {f"probe {kind}": right for kind, right in scores.get("probe", {}).items()}
    table = [f"| {key} | {value:.6g} |" for key, value in columns.items() if value is not None]
    protocol = [f"- {key}: {line}" for key, line in scores.get("protocol", {}).items()]
    lines = ["## Scores", "", "| of the checkpoint, in fp32 | |", "|---|---|", *table, "", *protocol, "", ""]
    return CARD.format(**config["encoder"], z_dim=config["z_dim"], f=config["f"], name=name,
                       statistics=statistics, scores="\n".join(lines if scores else []), licence=LICENCE)


# ------------------------------------------------------------------ DINOv3

# Hugging Face's, timm's and Meta's names -> ours, applied in turn.
RENAMES = [(re.compile(a), b) for a, b in [
    (r"^embeddings\.", ""), (r"^(model\.)?layer\.", "blocks."), (r"\.(attention|attn)\.", "."),
    (r"^(register_tokens|reg_token|storage_tokens)$", "registers"),
    (r"^(patch_embeddings|patch_embed\.proj)\.", "patch_embed."),
    (r"\.o_proj\.", ".proj."), (r"\.([qkv])_proj\.bias$", r".\1_bias"),
    (r"\.(layer_scale|gamma_|ls)([12])(\.lambda1|\.gamma|)$", r".ls\2"),
    (r"\.mlp\.(gate_proj|fc1_g|w1)\.", ".mlp.gate."), (r"\.mlp\.(up_proj|fc1_x|fc1|w2)\.", ".mlp.up."),
    (r"\.mlp\.(down_proj|fc2|w3)\.", ".mlp.down."),
]]
TO_HUGGING_FACE = [                     # ours -> Hugging Face's
    (r"^cls_token", "embeddings.cls_token"), (r"^registers", "embeddings.register_tokens"),
    (r"^patch_embed\.", "embeddings.patch_embeddings."), (r"^blocks\.", "layer."),
    (r"\.proj\.", ".attention.o_proj."), (r"\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.ls([12])$", r".layer_scale\1.lambda1"), (r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj."),
]
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "teacher.")      # dropped where all names begin so
PRETRAINING_ONLY = re.compile(r"^(mask_token|local_cls_norm\..*)$")


def rename_dinov3(tensors, path, dtype):
    """The tensors of a DINOv3 checkpoint under our names and in `dtype`, with Q, K and V packed."""
    while tensors and (common := [p for p in WRAPPERS if all(name.startswith(p) for name in tensors)]):
        tensors = {name.removeprefix(common[0]): t for name, t in tensors.items()}
    ours = {}
    for name, t in tensors.items():
        require(t.is_floating_point(),
                f"{path} holds {name} as {t.dtype}: quantised weights are not read, fetch the original")
        for pattern, replacement in RENAMES:
            name = pattern.sub(replacement, name)
        if not PRETRAINING_ONLY.match(name):
            ours[name] = t
    # Without registers, Meta's and timm's files have no such tensor, Hugging Face's an empty one.
    if "cls_token" in tensors and tensors["cls_token"].dim() == 3:
        ours.setdefault("registers", tensors["cls_token"][:, :0])
    for name in "cls_token", "registers", "blocks.0.norm1.weight":
        require(name in ours, f"{path} holds no DINOv3 ViT: no {name} among its {len(tensors)} tensors")
    for name in "cls_token", "registers":
        require(ours[name].dim() == 3, f"{path} holds no DINOv3 ViT: its {name} is {list(ours[name].shape)}")
    for i in range(count_blocks(ours)):
        pack_qkv(ours, f"blocks.{i}.", path, dtype)
    return {name: t.to(dtype) for name, t in ours.items()}


def count_blocks(tensors):
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def pack_qkv(tensors, block, path, dtype):
    """Hugging Face's three matrices become one; timm's and Meta's packed bias becomes those of Q and V."""
    parts = [tensors.pop(f"{block}{c}_proj.weight") for c in "qkv" if f"{block}{c}_proj.weight" in tensors]
    if parts:
        require(len({p.shape for p in parts}) == 1, f"{path} has Q, K and V of different shapes in {block}")
        tensors[block + "qkv.weight"] = torch.cat([p.to(dtype) for p in parts])
    if block + "qkv.bias" in tensors:
        # Meta's bias_mask is 0 on the K part, where the bias may hold anything, NaN included.
        bias = tensors.pop(block + "qkv.bias")
        require(len(bias) % 3 == 0, f"{path} has a {block}qkv.bias of {len(bias)}, which is not three parts")
        mask = tensors.pop(block + "qkv.bias_mask", torch.ones_like(bias))
        q, k, v = torch.where(mask != 0, bias, torch.zeros_like(bias)).chunk(3)
        tensors |= {block + "q_bias": q, block + "k_bias": k, block + "v_bias": v}
    # A K bias of zeros is none. Any other stays, and is refused as left over.
    if block + "k_bias" in tensors and not tensors[block + "k_bias"].any():
        del tensors[block + "k_bias"]


CONFIG_KEYS = {                         # Hugging Face's config.json -> DINOv3Config, but for "heads"
    "hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads",
    "intermediate_size": "hidden", "use_gated_mlp": "gated", "num_register_tokens": "registers",
    "hidden_act": "activation", "layer_norm_eps": "eps", "rope_theta": "rope_base",
}
TIMM_ARGUMENTS = {"depth", "in_chans", "num_classes", "global_pool", "img_size", "dynamic_img_size"}


def settings_beside(folder):
    """What config.json and preprocessor_config.json in `folder` say: fields of DINOv3Config, and "heads"."""
    file, preprocessor_file = folder / "config.json", folder / "preprocessor_config.json"
    config = read_json(file) if file.exists() else {}
    preprocessor = read_json(preprocessor_file) if preprocessor_file.exists() else {}
    kind = config.get("model_type", config.get("architecture"))
    require(not config or "dinov3" in str(kind), f"{file} describes {kind}, not a DINOv3 ViT")
    if "architecture" in config:        # timm's: that architecture's own settings, but for model_args
        preprocessor = config.get("pretrained_cfg") or {}
        other = (config.get("model_args") or {}).keys() - TIMM_ARGUMENTS
        require(not other, f"{file} has model_args that are not implemented: {', '.join(sorted(other))}")
        config = {}
    for key, value in ("do_normalize", True), ("do_rescale", True), ("rescale_factor", 1 / 255):
        require(preprocessor.get(key, value) == value,
                f"{preprocessor_file} has {key} {preprocessor.get(key)}: only {value} is implemented")

    settings = {ours: config[key] for key, ours in CONFIG_KEYS.items() if key in config}
    for name in "mean", "std":
        value = preprocessor.get(f"image_{name}", preprocessor.get(name))    # Hugging Face's name, timm's
        if value is not None:
            settings[name] = value
    return settings


def hugging_face_names(tensors):
    """The tensors of a DINOv3 of ours under the names that Hugging Face gives its own files."""
    theirs = {"embeddings.mask_token": torch.zeros_like(tensors["cls_token"])}      # not ours, but expected
    for name, t in tensors.items():
        for pattern, replacement in TO_HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".qkv.weight"):
            for c, part in zip("qkv", t.chunk(3)):
                theirs[name.replace("qkv", f"attention.{c}_proj")] = part
        else:
            theirs[name] = t
    return theirs


def hugging_face_config(cfg, tensors):
    """config.json and preprocessor_config.json of a DINOv3; `cfg` has the fields of sae.DINOv3Config."""
    ours = cfg | {"heads": cfg["width"] // cfg["head_dim"]}
    config = {"architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit", "patch_size": 16,
              "query_bias": cfg["qkv_bias"], "key_bias": False, "value_bias": cfg["qkv_bias"],
              "dtype": str(tensors["cls_token"].dtype).removeprefix("torch."),
              **{key: ours[name] for key, name in CONFIG_KEYS.items()}}
    preprocessor = {"image_processor_type": "DINOv3ViTImageProcessorFast",
                    "image_mean": cfg["mean"], "image_std": cfg["std"],
                    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                    # the paper's size
                    "do_resize": True, "resample": 2, "size": {"height": 256, "width": 256}}
    return config, preprocessor


def config_of_dinov3(tensors, path, Config):
    """The Config, sae.DINOv3Config, of tensors under our names and of the JSON files beside `path`.

    RoPE periods, which Meta's files hold, are checked and taken out of the tensors.
    """
    width = tensors["cls_token"].shape[-1]
    up = tensors.get("blocks.0.mlp.up.weight")
    seen = {
        "width": width,
        "depth": count_blocks(tensors),
        "hidden": 4 * width if up is None else len(up),
        "gated": "blocks.0.mlp.gate.weight" in tensors,
        "qkv_bias": "blocks.0.q_bias" in tensors,
        "registers": tensors["registers"].shape[1],
    }
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    settings = settings_beside(folder)
    for name in seen.keys() & settings.keys():
        require(settings[name] == seen[name],
                f"{folder / 'config.json'} gives the {name} {settings[name]!r}, but the weights have "
                f"{seen[name]!r}: config.json is of other weights")
    heads = settings.pop("heads", None)
    head_dim = 128 if width == 4096 else 64                         # of Meta's models: 7B has wider heads
    periods = tensors.pop("rope_embed.periods", None)               # Meta's files: base^(4j / head_dim)
    if periods is not None:
        head_dim = 4 * len(periods)
        expected = Config.rope_base ** torch.linspace(0, 1, len(periods) + 1, device=periods.device)[:-1]
        require(torch.allclose(periods.float(), expected, rtol=0.01),
                f"{path} has RoPE periods of another base than {Config.rope_base}: not implemented")
    try:
        if heads is not None:
            require(width % heads == 0, f"its {heads} heads do not divide its width {width}")
            head_dim = width // heads
        return Config(head_dim=head_dim, **{**seen, **settings})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} holds no DINOv3 ViT that is implemented: {error}") from error


def load_tensors(path):
    """{name: tensor} of safetensors or of a state dict that torch.save wrote (.pth, .pt); on the CPU, mapped.

    A folder stands for its model.safetensors, else for the shards that model.safetensors.index.json lists.
    Raises ValueError, one sentence, for a file that is not there, is damaged, or holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
        path = index if index.exists() and not whole.exists() else whole
    require(path.is_file(), f"there is no file {path}")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix == ".json":
        return load_shards(path)
    tensors = torch_load(path)
    by_name = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    require(by_name and all(torch.is_tensor(t) for t in tensors.values()),
            f"{path} holds no tensors by name, but other things: give a file of weights alone")
    return tensors


def load_shards(index):
    """The tensors of the files that an index lists: {"weight_map": {tensor: file in the same folder}}."""
    file_of = read_json(index).get("weight_map")
    require(isinstance(file_of, dict), f"{index} has no weight_map from tensors to files")
    tensors = {}
    for file in sorted(set(map(str, file_of.values()))):
        require(not file.endswith(".json"), f"{index} lists {file}, which holds no tensors: fetch it again")
        tensors |= load_tensors(index.parent / file)
    odd = sorted(file_of.keys() ^ tensors.keys())
    require(not odd, f"{index} and its files differ in {', '.join(odd[:5])}: fetch them again")
    return tensors


def read_json(path):
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from error
    require(isinstance(content, dict), f"{path} holds no JSON object: fetch it again")
    return content


def torch_load(path):
    """What torch.save wrote to `path`, on the CPU; mapped when the file is of torch 1.6 or later.

    Raises ValueError, one sentence, for a damaged file and for one that holds code.
    """
    refuse_text(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:      # on damaged files torch's readers and unpickler raise a dozen kinds of error
        reason = " ".join([type(e).__name__, *str(e).splitlines()[:1]]).split(". ")[0]
        raise ValueError(f"{path} is damaged, or no file of weights that torch can read: {reason}; "
                         "fetch or write it again") from e


def refuse_text(path):
    """ValueError for what a download may leave in place of weights."""
    with open(path, "rb") as file:
        start = file.read(100).lstrip().lower()
    require(not start.startswith(b"version https://git-lfs"),
            f"{path} is a Git LFS pointer, not the weights that it stands for: run `git lfs pull`")
    require(not start.startswith((b"<!doctype", b"<html", b"<?xml")),
            f"{path} is a web page, not weights: its address may ask for a login or a licence")


# ------------------------------------------------------------------ safetensors

# A safetensors file: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
# data_offsets), the data without gaps.

SAFETENSORS_DTYPES = {          # in the order in which the library lays tensors out: widest first
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8,
    "F4": torch.float4_e2m1fn_x2,           # two to a byte: the header's last dimension is twice ours
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000                    # bytes, the library's limit


def load_safetensors(path):
    """{name: tensor} of a safetensors file, which is mapped: nothing is read before its use.

    Tensors can be written to, and the file does not change. ValueError, naming file and tensor, for what the
    safetensors library refuses and for three things that it takes but only a broken writer makes: a key given
    twice, data_offsets that are no multiple of the item's size, an entry that is no JSON object.
    """
    entries, _ = read_header(path)
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for begin, end, name, dtype, shape in entries:
        data = torch.empty(0, dtype=torch.uint8)
        if begin < end:
            data = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin, count=end - begin)
        if begin % dtype.itemsize:          # legal after a header of odd length; vector code may fail on it
            data = data.clone()
        tensors[name] = data.view(dtype).reshape(shape)
    return tensors


def load_metadata(path):
    """The metadata of a safetensors file, {str: str}. ValueError as from `load_safetensors`."""
    return read_header(path)[1]


def read_header(path):
    """What `check_header` gives of the file, or ValueError with its name."""
    refuse_text(path)
    with open(path, "rb") as file:
        try:
            return check_header(file)
        except ValueError as error:
            raise ValueError(f"{path} is no valid safetensors file: {error}; "
                             "fetch or write it again") from error


def check_header(file):
    """([(first byte in the file, end, name, dtype, shape)] in the order of the data, metadata)."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    require(start <= size, f"its {size} bytes are too few for the first 8 and a header of {length}")
    require(length <= MAX_HEADER, f"its header of {length} bytes is over the limit of {MAX_HEADER}")
    header, metadata = parse_header(file.read(length))
    for name, info in header.items():
        require(is_entry(info), f"tensor {name!r} needs a known dtype, sizes as shape and two data_offsets, "
                f"and has {info!r:.200}")

    entries, position = [], 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = SAFETENSORS_DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
        label = f"tensor {name!r} ({info['dtype']} {shape!r:.80})"
        if info["dtype"] == "F4":
            require(shape and shape[-1] % 2 == 0, f"{label} needs an even last dimension")
            shape = [*shape[:-1], shape[-1] // 2]
        count_fits = all(n < 2 ** 64 for n in accumulate(shape, mul))
        nbytes = math.prod(shape) * dtype.itemsize
        require(count_fits, f"{label} has more items than 64 bits can count")
        require(begin == position, f"{label} begins at byte {begin}, the one before it ends at {position}")
        require(end - begin == nbytes, f"{label} takes {nbytes} bytes, but has offsets {begin} and {end}")
        require(begin % dtype.itemsize == 0 or not nbytes, f"{label} is misaligned, at byte {begin}")
        require(start + end <= size, f"{label} should end at byte {start + end}, but the file ends at {size}")
        entries.append((start + begin, start + end, name, dtype, shape))
        position = end
    require(start + position == size, f"its tensors end at byte {start + position}, but the file at {size}")
    return entries, metadata


def is_entry(info):
    """Whether the header's entry of a tensor has a known dtype, sizes as shape, and two offsets."""
    def sizes(x):
        return type(x) is list and all(type(n) is int and n < 2 ** 63 for n in x)

    return (type(info) is dict and info.get("dtype") in list(SAFETENSORS_DTYPES) and sizes(info.get("shape"))
            and sizes(info.get("data_offsets")) and len(info["data_offsets"]) == 2)


def parse_header(text):
    """({name: entry}, metadata) of a header, by the library's rules of JSON, without a key given twice."""
    def unique(pairs):
        found = {}
        for key, value in pairs:
            require(key not in found, f"its header gives {key!r} twice")
            found[key] = value
        return found

    def number(text):           # -0 is a float to the library, and infinity an error
        require(math.isfinite(float(text)), f"its header has the number {text:.20}, which is out of range")
        return int(text) if text.isdigit() else float(text)

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_int=number, parse_float=number,
                            parse_constant=number)
        json.dumps(header, ensure_ascii=False).encode()            # fails for half a surrogate pair
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    require(type(header) is dict, "its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    require(metadata is None or type(metadata) is dict and all(type(v) is str for v in metadata.values()),
            "its __metadata__ does not map strings to strings")
    return header, metadata or {}


def save_safetensors(tensors, path, metadata=None):
    """Write {name: tensor}, of any device and stride, and a metadata of {str: str}; see `write`.

    The bytes are those that the safetensors library would write, with the metadata in the order of its keys.
    Tensors that share memory are written one by one. ValueError for what the format cannot hold.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    strings = all(type(x) is str for pair in (metadata or {}).items() for x in pair)
    require(strings, f"{path}: metadata must map str to str")
    for name, t in tensors.items():
        require(type(name) is str and name != "__metadata__", f"{path}: {name!r} cannot name a tensor")
        dense = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta
        require(dense, f"{path}: {name!r} is not a tensor with dense data")
        require(t.dtype in names, f"{path}: tensor {name!r} is of {t.dtype}, which the format lacks")

    order = list(names)
    tensors = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header, position = {}, 0
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name, t in tensors:
        shape = [*t.shape[:-1], 2 * t.shape[-1]] if t.dtype == torch.float4_e2m1fn_x2 else [*t.shape]
        end = position + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                                # the data begins at a multiple of 8
    require(len(text) <= MAX_HEADER, f"{path}: a header of {len(text)} bytes is over {MAX_HEADER}")

    def save(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in tensors:
            t = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(t.reshape(-1).view(torch.uint8).numpy())
    write(path, save)


def write(path, save):
    """save(file), flushed to the disk: `path` appears whole or not at all. An OSError names it."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:            # a full disk's error names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
