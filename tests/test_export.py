"""Models to publish: what SAE.save_pretrained writes, read by transformers, by the safetensors library, by
SAE.from_pretrained, and by sae.py and sae_weights.py alone."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eval as E
import sae_weights
from sae import SAE, DINOv3, DINOv3Config, SAEConfig

transformers = pytest.importorskip("transformers")
ROOT = Path(E.__file__).parent


def model(seed=0, **encoder):
    """A small S-AE, all parameters random, with statistics of the latent."""
    cfg = DINOv3Config(**{**dict(width=128, depth=2, head_dim=64, hidden=160), **encoder})
    torch.manual_seed(seed)
    sae = SAE(SAEConfig(encoder=cfg, z_dim=8, widths=(16, 16, 8, 8, 8), blocks=1))
    sae.eval().requires_grad_(False)
    for p in sae.parameters():
        p.add_(torch.randn_like(p), alpha=0.02)
    sae.latent_mean.normal_()
    sae.latent_std.uniform_(1, 2)
    return sae


@pytest.fixture(scope="module")
def small():
    return model()


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    small.save_pretrained(folder)
    return folder


def save_checkpoint(sae, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"version": sae_weights.CHECKPOINT_VERSION, "config": asdict(sae.config),
                "ema": sae.state_dict()}, path)
    return path


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


# ------------------------------------------------------------------ the folder

@pytest.mark.parametrize("changes", [
    dict(gated=False, qkv_bias=False), dict(gated=False), dict(qkv_bias=False), dict(registers=0),
    dict(activation="gelu", head_dim=32, eps=1e-6, rope_base=50.0, mean=(0.43, 0.411, 0.296))])
def test_transformers_gives_the_tokens_of_the_exported_encoder(changes, tmp_path):
    sae = model(**changes)
    sae.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model" / "encoder"
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    oracle, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())               # no key is missing, unexpected or of another shape

    image = picture()
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1                # [1,3,256,256]
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, (x - sae.encoder.mean) / sae.encoder.std, atol=2e-6)
    cls, registers, patches = sae.encoder(x)
    ours = torch.cat([cls[:, None], registers, patches], 1)                                 # [1,N,D]
    theirs = oracle.eval()(pixels).last_hidden_state.detach()
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()

    again = DINOv3.from_pretrained(folder)
    assert again.cfg == sae.encoder.cfg and equal(again.state_dict(), sae.encoder.state_dict())


def test_an_exported_model_comes_back_and_its_file_holds_the_weights_and_nothing_else(small, exported):
    again = SAE.from_pretrained(exported)
    assert again.config == small.config and equal(again.state_dict(), small.state_dict())
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert equal(load_file(exported / "model.safetensors"), small.state_dict())
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.json", "encoder", "model.safetensors"]


def test_bf16_halves_the_files_and_comes_back_as_fp32_with_exact_statistics(small, exported, tmp_path):
    small.save_pretrained(tmp_path / "half", torch.bfloat16)
    for name in "model.safetensors", "encoder/model.safetensors":
        assert (tmp_path / "half" / name).stat().st_size < 0.53 * (exported / name).stat().st_size
    rounded = {name: t if name.startswith("latent_") else t.bfloat16().float()
               for name, t in small.state_dict().items()}
    assert equal(SAE.from_pretrained(tmp_path / "half").state_dict(), rounded)
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "half" / "encoder", dtype="auto")
    assert encoder.dtype == torch.bfloat16


def test_compiled_parts_are_written_under_their_own_names(small, tmp_path):
    sae = model()
    sae.encoder, sae.decoder = (torch.compile(part, backend="eager") for part in (sae.encoder, sae.decoder))
    sae.save_pretrained(tmp_path / "model")
    assert equal(SAE.from_pretrained(tmp_path / "model").state_dict(), small.state_dict())


def test_a_link_to_an_empty_folder_is_filled(small, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    small.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and equal(
        SAE.from_pretrained(tmp_path / "disk").state_dict(), small.state_dict())


def test_an_exported_model_needs_sae_py_and_sae_weights_py_torch_and_numpy_alone(small, exported, tmp_path):
    for name in "sae.py", "sae_weights.py":
        shutil.copy(ROOT / name, tmp_path)
    x = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = small.encode(x).sample(seed=3)
    torch.save({"x": x, "z": z, "xhat": small.decode(z)}, tmp_path / "expected.pt")
    code = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2].split()))      # None: to import one is a ModuleNotFoundError

import torch
from sae import SAE
sae, expected = SAE.from_pretrained(sys.argv[1]), torch.load("expected.pt")
z = sae.encode(expected["x"]).sample(seed=3)
assert torch.allclose(z, expected["z"], atol=1e-5)
assert torch.allclose(sae.decode(z), expected["xhat"], atol=1e-5)
assert torch.allclose(sae.denormalize(sae.normalize(z)), z, atol=1e-5)
"""
    others = "PIL lpips torchvision scipy tqdm transformers timm diffusers safetensors huggingface_hub common"
    done = subprocess.run([sys.executable, "-c", code, exported, others], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_code_of_the_card_runs_beside_the_folder(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    card = (exported / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"x": torch.zeros(1, 3, 32, 32), "image": picture()}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["xhat"].shape == (1, 3, 32, 32)
    assert names["tokens"].shape == (1, 1 + 4 + 256, 128)
    assert "license_name: dinov3-license" in card and "sae.normalize(z)" in card


def test_a_model_without_statistics_is_exported_and_its_card_says_so(tmp_path):
    sae = model()
    sae.latent_mean.fill_(torch.nan)
    sae.save_pretrained(tmp_path / "early")
    assert "has no statistics of the latent" in (tmp_path / "early" / "README.md").read_text()
    assert SAE.from_pretrained(tmp_path / "early").latent_mean.isnan().all()


def test_a_folder_appears_whole_or_not_at_all(small, tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "left by a kill").touch()
    with monkeypatch.context() as patch:
        patch.setattr(sae_weights, "hugging_face_config", full_disk)
        with pytest.raises(OSError, match="No space"):
            small.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())
    (tmp_path / "model").mkdir()                # an empty folder may be there
    small.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(list((tmp_path / "model").iterdir())) == 4


def test_a_folder_that_holds_something_else_is_refused_and_stays(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in tmp_path, tmp_path / "notes.txt":
        with pytest.raises(ValueError, match="holds something already: name a new folder"):
            small.save_pretrained(target)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------ what is refused, and the hub

def changed(**changes):
    return lambda about: {**about, **changes}


@pytest.mark.parametrize("change, sentence", [
    (lambda about: None, "is no folder of SAE.save_pretrained"),
    (changed(model_type="dinov3_vit"), "is no folder of SAE.save_pretrained"),
    (changed(version=99), "is no folder of SAE.save_pretrained"),
    (changed(config=None), "has no configuration of an S-AE"),
    (lambda about: {**about, "config": {**about["config"], "f": 20}}, "f must be 16, 32 or 64"),
    (lambda about: {**about, "config": {**about["config"], "z_dim": 4}},
     r"other weights than its configuration describes: .*latent_mean is \[8\], not \[4\]"),
])
def test_a_folder_of_another_kind_is_refused_in_one_sentence(change, sentence, exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    about = change(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").unlink()
    if about:
        (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))} .*{sentence}") as error:
        SAE.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_owner_and_name_are_looked_up_on_the_hub(small, exported, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        return str(exported)

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert equal(SAE.from_pretrained("owner/s-ae.h16").state_dict(), small.state_dict())
    for path in "runs/last.pt", "a/b/c", "last":
        with pytest.raises(ValueError, match=f"there is no checkpoint {path}"):
            SAE.from_pretrained(path)
    assert asked == ["owner/s-ae.h16"]

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="no file or folder owner/name.*`pip install huggingface_hub`"):
        SAE.from_pretrained("owner/name")


def test_a_hub_that_cannot_be_reached_ends_in_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no file or folder owner/name, and the hub gives none") as error:
        SAE.from_pretrained("owner/name")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ eval.py --export

@pytest.fixture
def checkpoint(small, tmp_path):
    return save_checkpoint(small, tmp_path / "last.pt")


def test_a_checkpoint_is_exported_with_its_scores(checkpoint, tmp_path, small):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "0.png")
    score = "--skip fid,lpips,probe --size 64 --workers 0 --data".split() + [str(tmp_path / "images")]
    E.main([str(checkpoint), *score])
    E.main([str(checkpoint), "--export", str(tmp_path / "model"), "--dtype", "bf16"])
    row = json.loads((tmp_path / "last.eval.json").read_text())
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| psnr | {row['psnr']:.6g} |" in card and f"- psnr: {row['protocol']['psnr']}" in card
    assert SAE.from_pretrained(tmp_path / "model").config == small.config

    E.main([str(tmp_path / "model"), *score])   # a folder is scored as a checkpoint is
    again = json.loads((tmp_path / "model.eval.json").read_text())
    assert again["psnr"] == pytest.approx(row["psnr"], rel=0.01)


def test_scores_of_an_earlier_checkpoint_are_left_out_and_it_says_so(checkpoint, tmp_path, capsys):
    (tmp_path / "last.eval.json").write_text('{"identity": ["last.pt", 1, 2], "psnr": 99}')
    E.main([str(checkpoint), "--export", str(tmp_path / "model")])
    assert "the card has no scores" in capsys.readouterr().out
    assert "psnr" not in (tmp_path / "model" / "README.md").read_text()


# ------------------------------------------------------------------ the README

def test_the_python_of_the_readme_runs(small, exported, tmp_path, monkeypatch):
    """In a folder with the files that it names; a block may use what the ones before it have made."""
    save_checkpoint(small, tmp_path / "runs" / "stage2-reg100" / "last.pt")
    shutil.copytree(exported, tmp_path / "s-ae")
    picture().save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(block, names)

    # What the trainers call. DiT's and RAE's encode draw the noise by torch's seed.
    vae, rae = names["vae"], names["RAE"]("s-ae").eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    z = vae.encode(x).latent_dist.sample()
    torch.manual_seed(0)
    assert torch.allclose(rae.encode((x + 1) / 2), z, atol=1e-4) and z.std() < 10
    assert torch.allclose(rae.decode(z), (vae.decode(z).sample + 1) / 2, atol=1e-5)
    assert torch.allclose(vae.decode(z).sample, small.decode(small.denormalize(z)), atol=1e-5)
    assert names["cls"].shape == (1, 128) and names["patches"].shape == (1, 256, 128)
