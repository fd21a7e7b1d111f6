"""The encoder against transformers and timm, and the autoencoder's shapes and promises."""
import copy
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sae
import sae_weights
from sae import SAE, DINOv3, DINOv3Config, SAEConfig

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

# Width, depth, heads, MLP hidden, gated, biases on Q and V. Full depth for S and S+, two blocks for the rest.
SIZES = {
    "S": (384, 12, 6, 1536, False, True),
    "S+": (384, 12, 6, 1536, True, True),
    "B": (768, 2, 12, 3072, False, True),
    "L": (1024, 2, 16, 4096, False, True),
    "L+": (1024, 2, 16, 4096, True, True),
    "H+": (1280, 2, 20, 5120, True, True),
    "7B": (4096, 2, 32, 8192, True, False),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAT_493M = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
SQUARE, WIDE = (64, 64), (48, 112)


def hugging_face(size, depth=None, seed=0, **changes):
    """transformers' model of that size, all parameters random (its own initialisation zeroes most biases)."""
    width, full, heads, hidden, gated, bias = SIZES[size]
    settings = dict(
        hidden_size=width, num_hidden_layers=depth or full, num_attention_heads=heads,
        intermediate_size=hidden, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
        num_register_tokens=4, query_bias=bias, value_bias=bias, layerscale_value=0.1)
    cfg = transformers.DINOv3ViTConfig(**{**settings, **changes})
    torch.manual_seed(seed)
    model = transformers.DINOv3ViTModel(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def load(model, tmp_path, rename=lambda n: n):
    path = tmp_path / "model.safetensors"
    save_file({rename(n): t.contiguous() for n, t in model.state_dict().items()}, path)
    return DINOv3.from_pretrained(path)


def images(B, H, W, seed=1, normalisation=IMAGENET):
    """x in [-1,1], and the same normalised, which the oracles expect from their caller."""
    x = torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in normalisation)
    return x, ((x + 1) / 2 - mean) / std


def tokens(model, x):
    return torch.cat([t if t.dim() == 3 else t[:, None] for t in model(x)], 1)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("size", SIZES)
def test_encoder_equals_transformers_in_fp32(size, tmp_path):
    oracle = hugging_face(size)
    ours = load(oracle, tmp_path)
    for H, W in SQUARE, WIDE:
        x, normalised = images(2, H, W)
        with torch.no_grad():
            assert relative(tokens(ours, x), oracle(normalised).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("size", ["S", "S+", "H+"])
def test_gradients_equal_those_of_transformers(size, tmp_path):
    oracle = hugging_face(size, depth=2)
    ours = load(oracle, tmp_path)
    x, normalised = images(2, *WIDE)
    target = torch.randn(2, 5 + 21, SIZES[size][0], generator=torch.Generator().manual_seed(2))
    (tokens(ours, x) * target).sum().backward()
    (oracle(normalised).last_hidden_state * target).sum().backward()
    grads = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    theirs = sae_weights.rename_dinov3(grads, "gradients", torch.float32)
    for name, p in ours.named_parameters():
        assert relative(p.grad, theirs[name]) <= 1e-4, name


@pytest.mark.parametrize("size", ["S", "H+"])
def test_bf16_error_is_at_most_twice_that_of_transformers(size, tmp_path):
    oracle = hugging_face(size, depth=4)
    ours = load(oracle, tmp_path)
    x, normalised = images(2, *SQUARE)
    with torch.no_grad():
        exact = oracle(normalised).last_hidden_state
        error = relative(tokens(ours.bfloat16(), x), exact)
        assert error <= 2 * relative(oracle.bfloat16()(normalised.bfloat16()).last_hidden_state, exact)


@pytest.mark.parametrize("name", [
    "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb",
    "vit_huge_plus_patch16_dinov3", "vit_7b_patch16_dinov3"])
def test_encoder_equals_timm_in_fp32(name, tmp_path):
    torch.manual_seed(0)
    oracle = timm.create_model(name, pretrained=False, depth=12 if "small" in name else 2).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    ours = load(oracle, tmp_path)
    for H, W in SQUARE, WIDE:
        x, normalised = images(2, H, W)
        with torch.no_grad():
            assert relative(tokens(ours, x), oracle.forward_features(normalised)) <= 1e-5


@pytest.mark.slow
def test_full_h_plus_equals_transformers(tmp_path):
    oracle = hugging_face("H+", depth=32)
    ours = load(oracle, tmp_path)
    x, normalised = images(1, *SQUARE)
    with torch.no_grad():
        assert relative(tokens(ours, x), oracle(normalised).last_hidden_state) <= 1e-5


def test_both_of_hugging_faces_namings_load_alike(tmp_path):
    oracle = hugging_face("S", depth=2)
    a, b = load(oracle, tmp_path), load(oracle, tmp_path, lambda n: n.replace("model.layer.", "layer."))
    assert same_weights(a, b)


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def meta_pth(model):
    """The state dict of `model` as Meta's .pth has it: packed qkv, a bias mask and NaN under the mask."""
    names = [
        ("registers", "storage_tokens"), ("patch_embed.", "patch_embed.proj."), (".qkv.", ".attn.qkv."),
        (".proj.weight", ".attn.proj.weight"), (".proj.bias", ".attn.proj.bias"), (".ls1", ".ls1.gamma"),
        (".ls2", ".ls2.gamma"), (".mlp.gate.", ".mlp.w1."), (".mlp.up.", ".mlp.w2."),
        (".mlp.down.", ".mlp.w3.")]
    frequencies = model.cfg.head_dim // 4
    periods = model.cfg.rope_base ** (torch.arange(frequencies) / frequencies)
    out = {"mask_token": torch.zeros(1, model.cfg.width), "rope_embed.periods": periods}
    for name, t in model.state_dict().items():
        if name.startswith("blocks") and name.endswith("_bias"):
            continue
        for ours, theirs in names if name.startswith("blocks") else names[:2]:
            name = name.replace(ours, theirs)
        out[name] = t
    for i, block in enumerate(model.blocks):
        nan = torch.full_like(block.q_bias, float("nan"))
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat([block.q_bias, nan, block.v_bias]).detach()
        mask = torch.ones(3, model.cfg.width)
        mask[1] = 0
        out[f"blocks.{i}.attn.qkv.bias_mask"] = mask.flatten()
    return out


def test_metas_pth_loads_with_its_bias_mask_folded(tmp_path):
    oracle = hugging_face("S+", depth=2)
    ours = load(oracle, tmp_path)
    torch.save(meta_pth(ours), tmp_path / "meta.pth")
    again = DINOv3.from_pretrained(tmp_path / "meta.pth")
    assert again.cfg == ours.cfg and same_weights(again, ours)


def test_metas_pth_tells_the_width_of_its_heads_and_refuses_another_rope_base(tmp_path):
    oracle = hugging_face("S", depth=1, num_attention_heads=3)
    oracle.save_pretrained(tmp_path)
    ours = DINOv3.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    torch.save(meta_pth_of_plain_mlp(ours), tmp_path / "meta.pth")
    assert DINOv3.from_pretrained(tmp_path / "meta.pth").cfg == ours.cfg and ours.cfg.head_dim == 128
    ours.cfg.rope_base = 10000.0
    torch.save(meta_pth_of_plain_mlp(ours), tmp_path / "meta.pth")
    with pytest.raises(ValueError, match="meta.pth has RoPE periods"):
        DINOv3.from_pretrained(tmp_path / "meta.pth")


def meta_pth_of_plain_mlp(model):
    return {n.replace(".w2.", ".fc1.").replace(".w3.", ".fc2."): t for n, t in meta_pth(model).items()}


def test_a_model_without_register_tokens_equals_transformers_in_both_namings(tmp_path):
    oracle = hugging_face("S", depth=2, num_register_tokens=0)
    ours = load(oracle, tmp_path)
    x, normalised = images(2, *WIDE)
    with torch.no_grad():
        assert relative(tokens(ours, x), oracle(normalised).last_hidden_state) <= 1e-5
    meta = meta_pth_of_plain_mlp(ours)
    del meta["storage_tokens"]
    torch.save(meta, tmp_path / "meta.pth")
    again = DINOv3.from_pretrained(tmp_path / "meta.pth")
    assert again.cfg == ours.cfg and same_weights(again, ours)


# ------------------------------------------------------------------ folders of Hugging Face and timm

@pytest.mark.parametrize("changes", [
    dict(hidden_size=256, num_attention_heads=2, intermediate_size=512), dict(rope_theta=10000.0),
    dict(hidden_act="silu"), dict(layer_norm_eps=1e-2), dict(use_gated_mlp=True, hidden_act="gelu"),
], ids=lambda changes: " ".join(changes))
def test_what_config_json_says_gives_transformers_tokens(changes, tmp_path):
    oracle = hugging_face("S", depth=2, **changes)
    oracle.save_pretrained(tmp_path)
    x, normalised = images(2, *WIDE)
    with torch.no_grad():
        expected = oracle(normalised).last_hidden_state
        for path in tmp_path, tmp_path / "model.safetensors":
            assert relative(tokens(DINOv3.from_pretrained(path), x), expected) <= 1e-5
        (tmp_path / "config.json").unlink()             # the weights alone do not tell
        assert relative(tokens(DINOv3.from_pretrained(tmp_path), x), expected) > 1e-3


def test_the_mean_and_std_of_preprocessor_config_json_are_taken(tmp_path):
    oracle = hugging_face("S", depth=2)
    oracle.save_pretrained(tmp_path)
    mean, std = SAT_493M
    transformers.DINOv3ViTImageProcessor(image_mean=list(mean), image_std=list(std)).save_pretrained(tmp_path)
    x, normalised = images(2, *WIDE, normalisation=SAT_493M)
    ours = DINOv3.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(tokens(ours, x), oracle(normalised).last_hidden_state) <= 1e-5
    assert (ours.cfg.mean, ours.cfg.std) == SAT_493M


def test_a_folder_of_timm_gives_timms_tokens(tmp_path):
    torch.manual_seed(0)
    oracle = timm.create_model("vit_large_patch16_dinov3.sat493m", pretrained=False, depth=1).eval()
    timm.models.save_for_hf(oracle, tmp_path, safe_serialization=True)
    x, normalised = images(2, *SQUARE, normalisation=SAT_493M)
    with torch.no_grad():
        ours = tokens(DINOv3.from_pretrained(tmp_path), x)
        assert relative(ours, oracle.forward_features(normalised)) <= 1e-5


def test_the_settings_of_the_encoder_travel_with_a_checkpoint(tmp_path):
    oracle = hugging_face("S", depth=1, num_attention_heads=3, hidden_act="silu", rope_theta=50.0)
    oracle.save_pretrained(tmp_path)
    processor = transformers.DINOv3ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor.save_pretrained(tmp_path)
    encoder = DINOv3.from_pretrained(tmp_path)
    model = SAE(SAEConfig(encoder.cfg, z_dim=8, widths=(32, 32, 32, 32, 32), blocks=1), encoder).eval()
    save_checkpoint(model, tmp_path / "c.pt")
    again = SAE.from_pretrained(tmp_path / "c.pt")
    x, _ = images(1, *SQUARE)
    with torch.no_grad():
        assert again.config == model.config and torch.equal(again.encode(x).mu, model.encode(x).mu)
        assert torch.equal(again.encoder.mean, encoder.mean)


CONFIG = {
    "model_type": "dinov3_vit", "hidden_size": 384, "num_attention_heads": 6, "hidden_act": "gelu",
    "rope_theta": 100.0, "layer_norm_eps": 1e-5, "num_hidden_layers": 1, "num_register_tokens": 4}
TIMM_CONFIG = {"architecture": "vit_small_patch16_dinov3", "pretrained_cfg": {}}


@pytest.mark.parametrize("file, content, words", [
    ("config.json", {**CONFIG, "hidden_act": "gelu_new"}, "'gelu_new'"),
    ("config.json", {**CONFIG, "hidden_act": ["gelu"]}, r"\['gelu'\]"),
    ("config.json", {**CONFIG, "num_attention_heads": 5}, "5 heads"),
    ("config.json", {**CONFIG, "num_attention_heads": 0}, "zero"),
    ("config.json", {**CONFIG, "hidden_size": 768}, "gives the width 768, but the weights have 384"),
    ("config.json", {**CONFIG, "num_register_tokens": 0}, "gives the registers 0, but the weights have 4"),
    ("config.json", {**CONFIG, "rope_theta": "high"}, "'high'"),
    ("config.json", {**CONFIG, "layer_norm_eps": -1}, "eps"),
    ("config.json", {"model_type": "dinov2"}, "config.json describes dinov2"),
    ("config.json", {"architecture": "resnet50"}, "config.json describes resnet50"),
    ("config.json", {**TIMM_CONFIG, "model_args": {"num_heads": 3}}, "model_args .* num_heads"),
    ("config.json", {**TIMM_CONFIG, "pretrained_cfg": {"mean": [0.5]}}, "three numbers"),
    ("config.json", [CONFIG], "config.json holds no JSON object"),
    ("preprocessor_config.json", {"do_normalize": False}, "preprocessor_config.json has do_normalize False"),
    ("preprocessor_config.json", {"rescale_factor": 1}, "preprocessor_config.json has rescale_factor 1"),
    ("preprocessor_config.json", {"image_std": [0.2, 0.2, 0]}, "std"),
])
def test_what_the_code_cannot_do_is_refused_by_name(file, content, words, tmp_path):
    load(hugging_face("S", depth=1), tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        DINOv3.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_shards_loads_as_the_whole_does(tmp_path):
    oracle = hugging_face("S", depth=2)
    whole = load(oracle, tmp_path)
    folder = tmp_path / "shards"
    oracle.save_pretrained(folder, max_shard_size="5MB")
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    assert len(shards) > 2
    for path in folder, index:
        assert same_weights(DINOv3.from_pretrained(path), whole)
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="index.json and its files differ in more"):
        DINOv3.from_pretrained(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"there is no file .*{shards[1].name}"):
        DINOv3.from_pretrained(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*model.safetensors"):
        DINOv3.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "backbone.", "teacher.", "module._orig_mod.backbone."])
def test_a_prefix_that_all_names_share_is_dropped(prefix, tmp_path):
    oracle = hugging_face("S", depth=1)
    assert same_weights(load(oracle, tmp_path, lambda name: prefix + name), load(oracle, tmp_path))
    with pytest.raises(ValueError, match="no cls_token|left over"):
        load(oracle, tmp_path, lambda name: name if "norm1" in name else prefix + name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["norm.weight", "model.layer.1.attention.k_proj.weight"])
def test_a_checkpoint_with_nan_or_infinity_is_refused_naming_the_tensor(name, value, tmp_path):
    oracle = hugging_face("S", depth=2)
    oracle.state_dict()[name].view(-1)[-3] = value
    ours = "norm.weight" if name == "norm.weight" else "blocks.1.qkv.weight"
    with pytest.raises(ValueError, match=f"model.safetensors holds NaN or infinity in {ours}"):
        load(oracle, tmp_path)
    torch.save(oracle.half().state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"model.pth holds NaN or infinity in {ours}"):
        DINOv3.from_pretrained(tmp_path / "model.pth")


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n", "is a Git LFS pointer"),
    (b"<!DOCTYPE html>\n<html>Access to this model is restricted</html>", "is a web page"),
    (b"\n<html><body>404</body></html>", "is a web page"),
])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_pointer_or_a_web_page_in_place_of_weights_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {words}"):
        sae_weights.load_tensors(tmp_path / name)


# ------------------------------------------------------------------ a file of weights


def test_half_precision_files_load_as_fp32(tmp_path):
    oracle = hugging_face("S", depth=1).half()
    ours = load(oracle, tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.norm.weight, oracle.norm.weight.float())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("norm.weight"), "missing norm.weight"),
    (lambda t: t.update(extra=torch.zeros(1)), "left over extra"),
    (lambda t: t.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \[3\], not \[384\]"),
    (lambda t: t.update({"model.layer.0.attention.k_proj.bias": torch.ones(384)}),
     "left over blocks.0.k_bias"),
    (lambda t: t.pop("embeddings.cls_token"), "holds no DINOv3 ViT: no cls_token"),
    (lambda t: t.pop("embeddings.register_tokens"), "holds no DINOv3 ViT: no registers"),
    (lambda t: t.update({"embeddings.cls_token": torch.zeros(384)}), r"its cls_token is \[384\]"),
    (lambda t: t.update({"model.layer.0.attention.q_proj.weight": torch.zeros(384, 9)}),
     "Q, K and V of different shapes in blocks.0"),
    (lambda t: t.update({"embeddings.cls_token": torch.zeros(1, 1, 96)}),
     "its width 96 is no multiple of 64"),
    (lambda t: t.update({"norm.weight": torch.zeros(384, dtype=torch.int8)}),
     "holds norm.weight as torch.int8: quantised weights"),
    (lambda t: t.update({"model.layer.0.attention.q_proj.weight": torch.zeros(384, 384, dtype=torch.int8)}),
     "q_proj.weight as torch.int8: quantised weights"),
    (lambda t: t.pop("model.layer.1.attention.q_proj.weight"), r"blocks.1.qkv.weight is \[768, 384\]"),
])
def test_a_file_with_missing_or_left_over_tensors_is_refused_by_name(change, words, tmp_path):
    tensors = hugging_face("S", depth=2).state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=words) as e:
        DINOv3.from_pretrained(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(e.value)


# ------------------------------------------------------------------ the encoder and the autoencoder

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return SAE(SAEConfig(DINOv3Config(64, 2, 64, 128), z_dim=8, widths=(64, 64, 32, 32, 32), blocks=1)).eval()


@pytest.mark.parametrize("side", [(32, 40), (0, 32), (33, 32)])
def test_sides_that_the_patches_do_not_divide_are_refused(side, tiny):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny.encoder(torch.zeros(1, 3, *side))


def test_sides_that_f_does_not_divide_are_refused():
    model = SAE(SAEConfig(DINOv3Config(64, 1, 64, 128), z_dim=8, widths=(8,), blocks=1, f=32))
    for f in model.encode, lambda x: model(x, seed=0):
        with pytest.raises(ValueError, match="multiples of 32"):
            f(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize("x", [
    torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
], ids=["3 axes", "1 channel", "uint8"])
def test_what_is_no_batch_of_images_is_refused(x, tiny):
    for f in tiny.encoder, tiny.encode:
        with pytest.raises(ValueError, match=r"images are \[B,3,H,W\] in \[-1,1\]"):
            f(x)


def test_every_linear_layer_of_the_encoder_is_called_so_that_hooks_see_it(tiny):
    sae, seen = copy.deepcopy(tiny), []
    layers = [m for m in sae.encoder.modules() if isinstance(m, torch.nn.Linear)]
    for m in layers:
        m.register_forward_hook(lambda m, args, out: seen.append(m))
    sae.encoder(images(1, *SQUARE)[0])
    assert sorted(map(id, seen)) == sorted(map(id, layers)) and len(layers) == 10


def test_the_default_dtype_does_not_reach_into_the_normalisation_of_images(tiny):
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert DINOv3(tiny.config.encoder).mean.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_latent_a_sample_goes_through_the_decoder_also_in_training(tiny):
    # Rounding is magnified where a group has a single value, so the draw is a fixed one.
    one = torch.randn(1, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained = copy.deepcopy(tiny).train().decode(torch.cat([one, one]))
        assert torch.allclose(tiny.decode(one), trained[:1], atol=1e-5)
        assert tiny.decode(one).shape == (1, 3, 16, 16)


def test_training_mode_moves_no_position(tiny):
    x, _ = images(1, *WIDE)
    with torch.no_grad():
        evaluated = tokens(tiny.encoder, x)
        trained = tokens(copy.deepcopy(tiny.encoder).train(), x)
    assert torch.equal(evaluated, trained)


def test_checkpointing_changes_no_gradient(tiny):
    x, _ = images(2, *SQUARE)
    grads = []
    for on in False, True:
        encoder = copy.deepcopy(tiny.encoder)
        encoder.checkpointing = on
        tokens(encoder, x).square().sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("f", [16, 32, 64])
def test_documented_shapes_hold_at_every_f(f):
    model = SAE(SAEConfig(DINOv3Config(64, 1, 64, 128), f=f, z_dim=8, widths=(64, 32, 32, 32, 32), blocks=1))
    x, _ = images(2, 64, 128)
    cls, registers, patches = model.encoder(x)
    assert (cls.shape, registers.shape, patches.shape) == ((2, 64), (2, 4, 64), (2, 32, 64))
    q = model.encode(x)
    assert q.mu.shape == q.logvar.shape == q.sample(0).shape == (2, 8, 64 // f, 128 // f)
    assert q.kl().shape == (2,)
    assert model.decode(q.mode()).shape == x.shape
    xhat, kl, student = model(x, seed=0)
    assert xhat.shape == x.shape and kl.shape == (2,) and torch.equal(student, patches)


class PlainBlock(torch.nn.Module):
    """sae.ResBlock of torch.nn's layers."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2 = PlainNormSiLU(block.norm1), PlainNormSiLU(block.norm2)
        self.conv1, self.conv2, self.skip = block.conv1, block.conv2, block.skip

    def forward(self, x):
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class PlainNormSiLU(torch.nn.GroupNorm):
    """sae.NormSiLU of torch.nn's layers."""

    def __init__(self, norm):
        super().__init__(norm.num_groups, norm.num_channels, eps=1e-6)

    def forward(self, x):
        return torch.nn.functional.silu(super().forward(x))


class PlainAttnBlock(torch.nn.Module):
    """sae.AttnBlock of torch.nn's layers and its attention."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.qkv, self.proj = block.norm, block.qkv, block.proj

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, -1)     # 3 x [B,1,h w,C]
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.squeeze(1).mT.reshape(x.shape))


PLAIN = {sae.ResBlock: PlainBlock, sae.NormSiLU: PlainNormSiLU, sae.AttnBlock: PlainAttnBlock}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_decoder_equals_its_layers_of_torch_nn_under_the_same_parameter_names(memory_format, tiny):
    ours = copy.deepcopy(tiny.decoder).to(memory_format=memory_format)
    for name, p in ours.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p)
    plain = torch.nn.Sequential(*[PLAIN[type(m)](m) if type(m) in PLAIN else m for m in ours])
    plain.load_state_dict(ours.state_dict())
    z = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(3)).to(memory_format=memory_format)
    grads = []
    for model in ours, plain:
        model.zero_grad()
        y = model(z)
        y.square().mean().backward()
        grads.append({"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}})
    for name, g in grads[1].items():
        # A bias before a norm of one channel a group has no effect: its gradient is rounding.
        assert relative(grads[0][name], g) <= 1e-4 or g.norm() < 1e-4 * grads[1]["y"].norm(), name


def test_the_decoder_is_compiled_as_one_graph(tiny):
    from torch._dynamo.testing import CompileCounter       # it takes seconds
    counter = CompileCounter()
    torch.compile(tiny.decoder, backend=counter)(torch.randn(2, 8, 4, 6))
    assert counter.frame_count == 1


def test_the_papers_decoder_has_its_five_widths():
    with torch.device("meta"):
        model = SAE(SAEConfig())
    widths = [m.conv2.out_channels for m in model.decoder if isinstance(m, sae.ResBlock)]
    assert sorted(set(widths), reverse=True) == [1280, 1024, 512, 256, 128]
    assert model.decoder(torch.zeros(1, 1280, 2, 2, device="meta")).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 8, 19, 18), (1, 8, 1, 256), (2, 8, 31, 33), (1, 8, 5, 3)])
def test_upsampling_equals_nearest_and_a_3x3_convolution(shape, layout):
    torch.manual_seed(0)
    up = sae.Upsample(8).double().to(memory_format=layout)
    oracle = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2, mode="nearest"), copy.deepcopy(up.conv))
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    dy = torch.randn(shape[0], 8, 2 * shape[2], 2 * shape[3], dtype=torch.float64)
    results = []
    for module in up, oracle:
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
    assert results[0][0].is_contiguous(memory_format=layout)
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) <= 1e-13


def test_kl_equals_torch_distributions(tiny):
    q = tiny.encode(images(3, *SQUARE)[0])
    posterior = torch.distributions.Normal(q.mu, (q.logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(q.mu), 1.0)
    oracle = torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1)
    assert torch.allclose(q.kl(), oracle, rtol=1e-5)


def test_normalize_has_mean_0_and_deviation_1_and_denormalize_is_its_inverse(tiny):
    model = copy.deepcopy(tiny)
    z = torch.randn(4, 8, 5, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2
    std, mean = torch.std_mean(z, (0, 2, 3), correction=0)
    model.latent_mean.copy_(mean)
    model.latent_std.copy_(std)
    y = model.normalize(z)
    std, mean = torch.std_mean(y, (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(8), atol=1e-6) and torch.allclose(std, torch.ones(8), atol=1e-6)
    assert torch.allclose(model.denormalize(y), z, atol=1e-5)
    compiled = torch.compile(model.denormalize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(y), model.denormalize(y))


def test_latent_statistics_are_nan_until_they_are_computed_and_their_use_is_refused(tiny):
    z = torch.zeros(1, 8, 2, 2)
    assert tiny.latent_mean.isnan().all() and tiny.latent_std.isnan().all()
    for f in tiny.normalize, tiny.denormalize:
        with pytest.raises(ValueError, match="latent_mean and latent_std are absent"):
            f(z)


def test_a_compiled_encoder_can_be_handed_over(tiny):
    encoder = torch.compile(tiny.encoder, backend="eager")
    assert SAE(tiny.config, encoder).encoder is encoder


def test_sae_can_be_loaded_again_in_one_process():
    code = """
import importlib, torch, sae
sae = importlib.reload(sae)
x = torch.ones(1, 4, requires_grad=True)
sae.feature_mse(x, torch.zeros(1, 4)).backward()
assert torch.equal(x.grad, torch.full((1, 4), 0.5))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(sae.__file__).parent, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_sae_imports_and_loads_without_modules_that_only_unix_has(tmp_path):
    save_file({"x": torch.ones(1 << 16)}, tmp_path / "x.safetensors")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(sae.__file__).parent)!r})
sys.modules.update(dict.fromkeys(["resource", "fcntl", "pwd", "grp", "termios"]))
import sae, sae_weights
sae_weights.load_safetensors(sys.argv[1])["x"].sum()
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.safetensors"], check=True)


def save_checkpoint(model, path):
    torch.save({"version": sae_weights.CHECKPOINT_VERSION, "config": asdict(model.config),
                "ema": model.state_dict()}, path)


def test_a_checkpoint_gives_back_its_ema(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path / "c.pt")
    again = SAE.from_pretrained(tmp_path / "c.pt")
    assert again.config == tiny.config and not any(p.requires_grad for p in again.parameters())
    x, _ = images(1, *SQUARE)
    assert torch.equal(again.encode(x).mode(), tiny.encode(x).mode())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint_is_refused_by_name(content, tmp_path):
    path = tmp_path / "c.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        sae_weights.load_checkpoint(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_of_weights_gives_its_tensors_or_one_sentence(kind, tmp_path):
    """Cut anywhere or with any byte changed: safetensors, and what torch.save wrote since 1.6 (zip) and
    before (legacy: VGG16, Inception)."""
    whole = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.float16)}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(whole, path)
    else:
        torch.save(whole, path, _use_new_zipfile_serialization=kind == "zip")
    assert all(torch.equal(t, whole[name]) for name, t in sae_weights.load_tensors(path).items())
    content, refused = path.read_bytes(), 0
    step = max(1, len(content) // 150)
    for i in range(0, len(content), step):
        for damaged in (content[:i], content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1:]):
            path.write_bytes(damaged)
            try:
                assert all(torch.is_tensor(t) for t in sae_weights.load_tensors(path).values())
            except ValueError as e:
                refused += 1
                assert str(path) in str(e) and len(str(e).splitlines()) == 1, str(e)
    assert refused > len(content) // step       # every cut, and some of the changed bytes


@pytest.mark.parametrize("content", [
    [torch.zeros(2)], {"model": {"weight": torch.zeros(2)}}, {"weight": 3}, torch.zeros(2)])
def test_a_file_of_other_things_than_tensors_by_name_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth holds no tensors by name"):
        sae_weights.load_tensors(tmp_path / "w.pth")


def test_a_missing_file_of_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*gone.pth"):
        sae_weights.load_tensors(tmp_path / "gone.pth")
