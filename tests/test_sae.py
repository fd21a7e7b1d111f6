"""The encoder against transformers and timm, and the autoencoder's shapes and promises."""
import copy
import re
from dataclasses import asdict

import pytest
import torch

import sae
from sae import SAE, DINOv3, DINOv3Config, SAEConfig

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

# name: width, depth, heads, MLP hidden, gated, biases on Q and V. Full depth for S and S+, two blocks for the rest.
SIZES = {
    "S": (384, 12, 6, 1536, False, True), "S+": (384, 12, 6, 1536, True, True), "B": (768, 2, 12, 3072, False, True),
    "L": (1024, 2, 16, 4096, False, True), "L+": (1024, 2, 16, 4096, True, True), "H+": (1280, 2, 20, 5120, True, True),
    "7B": (4096, 2, 32, 8192, True, False),
}
SQUARE, WIDE = (64, 64), (48, 112)


def hugging_face(size, depth=None, seed=0):
    """transformers' model of that size, all its parameters random (its own initialisation zeroes most biases)."""
    width, full, heads, hidden, gated, bias = SIZES[size]
    cfg = transformers.DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=depth or full, num_attention_heads=heads, intermediate_size=hidden, use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu", num_register_tokens=4, query_bias=bias, value_bias=bias, layerscale_value=0.1)
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


def images(B, H, W, seed=1):
    """x in [-1,1], and the same under ImageNet's normalisation, which the oracles expect from their caller."""
    x = torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
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
    theirs, _ = sae.read_dinov3({n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}, "gradients", torch.float32)[::-1]
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


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb",
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
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def meta_pth(model):
    """The state dict of `model` as Meta's .pth files have it: packed qkv with a bias mask and NaN under the mask."""
    names = [("registers", "storage_tokens"), ("patch_embed.", "patch_embed.proj."), (".qkv.", ".attn.qkv."), (".proj.weight", ".attn.proj.weight"),
             (".proj.bias", ".attn.proj.bias"), (".ls1", ".ls1.gamma"), (".ls2", ".ls2.gamma"), (".mlp.gate.", ".mlp.w1."), (".mlp.up.", ".mlp.w2."),
             (".mlp.down.", ".mlp.w3.")]
    out = {"mask_token": torch.zeros(1, model.cfg.width), "rope_embed.periods": torch.ones(16)}
    for name, t in model.state_dict().items():
        if name.startswith("blocks") and name.endswith("_bias"):
            continue
        for ours, theirs in names if name.startswith("blocks") else names[:2]:
            name = name.replace(ours, theirs)
        out[name] = t
    for i, block in enumerate(model.blocks):
        nan = torch.full_like(block.q_bias, float("nan"))
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat([block.q_bias, nan, block.v_bias]).detach()
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([nan * 0 + 1, nan * 0, nan * 0 + 1]).nan_to_num(1.0).mul_(1)
        out[f"blocks.{i}.attn.qkv.bias_mask"][model.cfg.width:2 * model.cfg.width] = 0
    return out


def test_metas_pth_loads_with_its_bias_mask_folded(tmp_path):
    oracle = hugging_face("S+", depth=2)
    ours = load(oracle, tmp_path)
    torch.save(meta_pth(ours), tmp_path / "meta.pth")
    again = DINOv3.from_pretrained(tmp_path / "meta.pth")
    assert again.cfg == ours.cfg
    assert all(torch.equal(p, q) for p, q in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


def test_half_precision_files_load_as_fp32(tmp_path):
    oracle = hugging_face("S", depth=1).half()
    ours = load(oracle, tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.norm.weight, oracle.norm.weight.float())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("norm.weight"), "missing norm.weight"),
    (lambda t: t.update(extra=torch.zeros(1)), "left over extra"),
    (lambda t: t.update({"norm.bias": torch.zeros(3)}), r"norm.bias is \[3\], not \[384\]"),
    (lambda t: t.update({"model.layer.0.attention.k_proj.bias": torch.ones(384)}), "left over blocks.0.k_bias"),
    (lambda t: t.pop("embeddings.cls_token"), "holds no DINOv3 ViT"),
    (lambda t: t.update({"embeddings.cls_token": torch.zeros(1, 1, 96)}), "its width 96 is no multiple of 64"),
    (lambda t: t.update({"norm.weight": torch.zeros(384, dtype=torch.int8)}), "holds norm.weight as torch.int8: quantised weights"),
    (lambda t: t.pop("model.layer.1.attention.q_proj.weight"), r"blocks.1.qkv.weight is \[768, 384\]"),
])
def test_a_file_with_missing_or_left_over_tensors_is_refused_by_name(change, words, tmp_path):
    tensors = hugging_face("S", depth=2).state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=words) as e:
        DINOv3.from_pretrained(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(e.value)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return SAE(SAEConfig(DINOv3Config(64, 2, 64, 128), z_dim=8, widths=(64, 64, 32, 32, 32), blocks=1)).eval()


@pytest.mark.parametrize("side", [(32, 40), (0, 32), (33, 32)])
def test_sides_that_the_patches_do_not_divide_are_refused(side, tiny):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny.encoder(torch.zeros(1, 3, *side))


@pytest.mark.parametrize("x", [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)],
                         ids=["3 axes", "1 channel", "uint8"])
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
    one = torch.randn(1, 8, 1, 1)
    with torch.no_grad():
        assert torch.allclose(tiny.decode(one), copy.deepcopy(tiny).train().decode(torch.cat([one, one]))[:1], atol=1e-5)
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
    assert q.mu.shape == q.logvar.shape == q.sample(0).shape == (2, 8, 64 // f, 128 // f) and q.kl().shape == (2,)
    assert model.decode(q.mode()).shape == x.shape
    xhat, kl, student = model(x, seed=0)
    assert xhat.shape == x.shape and kl.shape == (2,) and torch.equal(student, patches)


class PlainBlock(torch.nn.Module):
    """sae.ResBlock of torch.nn's layers."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.GroupNorm(n.num_groups, n.num_channels, eps=1e-6) for n in (block.norm1, block.norm2))
        self.conv1, self.conv2, self.skip = block.conv1, block.conv2, block.skip

    def forward(self, x):
        h = self.conv1(torch.nn.functional.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(torch.nn.functional.silu(self.norm2(h)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_decoder_equals_its_layers_of_torch_nn_under_the_same_parameter_names(memory_format, tiny):
    ours = copy.deepcopy(tiny.decoder).to(memory_format=memory_format)
    for name, p in ours.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p)
    *layers, norm, _, conv = ours
    plain = torch.nn.Sequential(*[PlainBlock(m) if isinstance(m, sae.ResBlock) else m for m in layers],
                                torch.nn.GroupNorm(norm.num_groups, norm.num_channels, eps=1e-6), torch.nn.SiLU(), conv)
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


def test_the_papers_decoder_has_its_five_widths():
    with torch.device("meta"):
        model = SAE(SAEConfig())
    widths = [m.conv2.out_channels for m in model.decoder if isinstance(m, sae.ResBlock)]
    assert sorted(set(widths), reverse=True) == [1280, 1024, 512, 256, 128] and model.decoder(torch.zeros(1, 1280, 2, 2, device="meta")).shape[2] == 32


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
    normal = torch.distributions.Normal
    oracle = torch.distributions.kl_divergence(normal(q.mu, (q.logvar / 2).exp()), normal(torch.zeros_like(q.mu), 1.0)).flatten(1).sum(1)
    assert torch.allclose(q.kl(), oracle, rtol=1e-5)


def test_a_checkpoint_gives_back_its_ema(tiny, tmp_path):
    torch.save({"version": sae.CHECKPOINT_VERSION, "config": asdict(tiny.config), "ema": tiny.state_dict()}, tmp_path / "c.pt")
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
        sae.load_checkpoint(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_of_weights_gives_its_tensors_or_one_sentence(kind, tmp_path):
    """Cut anywhere or with any byte changed: what torch.save wrote since 1.6 (zip) and before (legacy: VGG16, Inception), and safetensors."""
    whole = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.float16)}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(whole, path)
    else:
        torch.save(whole, path, _use_new_zipfile_serialization=kind == "zip")
    assert all(torch.equal(t, whole[name]) for name, t in sae.load_tensors(path).items())
    content, refused = path.read_bytes(), 0
    step = max(1, len(content) // 150)
    for i in range(0, len(content), step):
        for damaged in (content[:i], content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1:]):
            path.write_bytes(damaged)
            try:
                assert all(torch.is_tensor(t) for t in sae.load_tensors(path).values())
            except ValueError as e:
                refused += 1
                assert str(path) in str(e) and len(str(e).splitlines()) == 1, str(e)
    assert refused > len(content) // step       # every cut, and some of the changed bytes


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model": {"weight": torch.zeros(2)}}, {"weight": 3}, torch.zeros(2)])
def test_a_file_of_other_things_than_tensors_by_name_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth holds no tensors by name"):
        sae.load_tensors(tmp_path / "w.pth")


def test_a_missing_file_of_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*gone.pth"):
        sae.load_tensors(tmp_path / "gone.pth")
