"""eval.py's metrics against oracles: torchmetrics, lpips, torch-fidelity, closed forms, published numbers."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import eval as E
from common import LPIPS


def pictures(n, size, seed=0):
    """Smooth pictures with a flat patch, and a noisy copy: uint8 [n,3,size,size] twice."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, 3, 6, 6, generator=g), (size, size), mode="bilinear") * 255
    x[:, :, size // 4:size // 2, size // 3:] = torch.rand(n, 3, 1, 1, generator=g) * 255
    y = x + 12 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 255).round().to(torch.uint8), y.clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", [32, 128])
def test_psnr_equals_torchmetrics(size):
    x, y = pictures(3, size)
    ours = E.psnr(x, y)
    for i in range(3):
        theirs = peak_signal_noise_ratio(y[i].float(), x[i].float(), data_range=255)
        assert ours[i].item() == pytest.approx(theirs.item(), abs=1e-5)


def test_psnr_of_equal_images_is_infinite():
    x, _ = pictures(1, 32)
    assert E.psnr(x, x).item() == math.inf


@pytest.mark.parametrize("size", [32, 128])
def test_ssim_equals_torchmetrics(size):
    x, y = pictures(3, size)
    y[2] = x[2]
    y[1] = 7                                    # a flat image: where variances cancel
    theirs = structural_similarity_index_measure(y.double(), x.double(), data_range=255.0, reduction="none")
    assert torch.allclose(E.ssim(x, y).double(), theirs, atol=1e-5, rtol=0)


def test_lpips_squeeze_gives_the_published_numbers(real_data):
    """torchmetrics documents LPIPS 'squeeze' of its two seeded batches as [0.1024, 0.0938]."""
    lpips = LPIPS("squeeze", real_data / "weights/squeezenet1_1-lpips/squeezenet1_1_features.safetensors")
    g = torch.Generator().manual_seed(42)
    x, y = (torch.rand(2, 3, 100, 100, generator=g) * 2 - 1 for _ in range(2))
    assert lpips(x, y).tolist() == pytest.approx([0.1024, 0.0938], abs=5e-5)


@pytest.mark.parametrize("damage", [lambda whole: whole[:len(whole) // 2], lambda whole: b"",
                                    lambda whole: b"no weights"])
def test_a_damaged_lpips_trunk_is_named(damage, tmp_path):
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "trunk.pth")
    (tmp_path / "trunk.pth").write_bytes(damage((tmp_path / "trunk.pth").read_bytes()))
    with pytest.raises(ValueError, match="trunk.pth is damaged, or no file of weights"):
        LPIPS("squeeze", tmp_path / "trunk.pth")


# ------------------------------------------------------------------ FID

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file under the published names and shapes with random weights, of a size that lets no layer die."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for name, p in net.state_dict().items():
        if p.dim() > 1:
            torch.nn.init.kaiming_normal_(p)
        elif p.is_floating_point():
            p.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else p.uniform_(-0.2, 0.2)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize("size", [32, 128, 256, 299, 400])
def test_the_resize_equals_tensorflow_1_bilinear(size):
    x = pictures(2, size)[0].float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert torch.allclose(E.tf1_resize(x), theirs, atol=1e-3, rtol=0)                    # of 255


def fidelity_inception(dims, path):
    return FeatureExtractorInceptionV3("inception", [str(dims)], feature_extractor_weights_path=str(path))


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_inception_features_equal_torch_fidelity(inception_file, dims):
    x = pictures(3, 64)[0]
    theirs, = fidelity_inception(dims, inception_file)(x)
    ours = E.FIDInception(inception_file, dims)(x)
    assert ours.shape == (3, dims)
    assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-5


def test_the_torch_resize_is_pytorch_fids(inception_file):
    """pytorch-fid: [0,1] images, torch's bilinear without corners aligned, then 2 x - 1, the same network."""
    x = pictures(2, 64)[0]
    ours = E.FIDInception(inception_file, 192, "torch")
    resized = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
    expected = ours.net(2 * resized - 1).mean((2, 3))
    assert torch.allclose(ours(x), expected, atol=1e-5)
    assert not torch.allclose(ours(x), E.FIDInception(inception_file, 192)(x), atol=1e-4)


def test_fid_equals_torch_fidelity(inception_file):
    x, y = pictures(80, 32)
    net, theirs = E.FIDInception(inception_file, 64), []
    ours = []
    for images in (x, y):
        moments, features = E.Moments(64, "cpu"), []
        for part in images.split(7):
            features.append(net(part))
            moments.update(features[-1])
        ours += moments.mean_cov()
        theirs.append(fid_features_to_statistics(torch.cat(features).double()))
    expected = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    assert E.frechet_distance(*ours) == pytest.approx(expected, rel=1e-6)


def test_fid_64_gives_the_published_number(real_data, inception_file):
    """torchmetrics documents FID-64 of two batches as 12.6388: seed 42, then its network, then both."""
    torch.manual_seed(42)
    fidelity_inception(64, inception_file)
    batches = [torch.randint(low, high, (100, 3, 299, 299), dtype=torch.uint8)
               for low, high in ((0, 200), (100, 255))]
    net, statistics = E.FIDInception(real_data / "weights/inception-fid/inception_fid192.safetensors", 64), []
    for images in batches:
        moments = E.Moments(64, "cpu")
        for part in images.split(20):
            moments.update(net(part))
        statistics += moments.mean_cov()
    assert E.frechet_distance(*statistics) == pytest.approx(12.6388, abs=0.002)


def gaussian(n, d, seed, rank=None):
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((d, rank or d)) / np.sqrt(d)
    x = rng.standard_normal((n, rank or d)) @ basis.T + rng.standard_normal(d)
    return x.mean(0), np.cov(x, rowvar=False)


def test_moments_equal_numpys_mean_and_covariance():
    x = np.random.default_rng(0).standard_normal((50, 7)) + 3
    moments = E.Moments(7, "cpu")
    for part in np.array_split(x, 6):
        moments.update(torch.from_numpy(part))
    mean, cov = moments.mean_cov()
    assert np.allclose(mean, x.mean(0), atol=1e-12) and np.allclose(cov, np.cov(x, rowvar=False), atol=1e-12)


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    """|m1 - m2|^2 + |C1^1/2 - C2^1/2|_F^2 when C1 and C2 share their axes (Dowson and Landau 1982)."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    s1, s2, m1, m2 = rng.random((4, 40)) * 3
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    cov1, cov2 = ((axes * s ** 2) @ axes.T for s in (s1, s2))
    assert E.frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_equal_sets_is_below_1e_6_even_with_empty_dimensions():
    mean, cov = gaussian(60, 512, 0)                                                     # rank 59 of 512
    assert abs(E.frechet_distance(mean, cov, mean, cov)) < 1e-6


def test_frechet_distance_of_rank_deficient_gaussians_equals_that_of_their_own_subspace():
    """Both sets lie in 10 of 300 dimensions: the small full-rank problem there has the same distance."""
    rng = np.random.default_rng(1)
    (m1, c1), (m2, c2) = gaussian(500, 10, 2), gaussian(500, 10, 3)
    axes, _ = np.linalg.qr(rng.standard_normal((300, 10)))
    wide = E.frechet_distance(axes @ m1, axes @ c1 @ axes.T, axes @ m2, axes @ c2 @ axes.T)
    assert wide == pytest.approx(E.frechet_distance(m1, c1, m2, c2), rel=1e-6)


def test_the_wrong_inception_file_is_named(inception_file, tmp_path):
    for classes, tensors in ((1000, None), (1008, {"weight": torch.zeros(3)})):
        tensors = tensors or dict(torch.load(inception_file), **{"fc.weight": torch.zeros(classes, 2048)})
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="other.pth is not the FID Inception .*weights.sh"):
            E.FIDInception(tmp_path / "other.pth", 2048)
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:10_000])
    with pytest.raises(ValueError, match="cut.pth is damaged, or no file of weights"):
        E.FIDInception(tmp_path / "cut.pth", 2048)
    with pytest.raises(ValueError, match="there is no FID Inception .*gone.pth"):
        E.FIDInception(tmp_path / "gone.pth", 2048)


def test_a_partial_inception_file_serves_the_features_it_reaches(real_data):
    stem = real_data / "weights/inception-fid/inception_fid192.safetensors"
    assert set(load_file(stem)) and E.FIDInception(stem, 192)(pictures(1, 32)[0]).shape == (1, 192)
    with pytest.raises(ValueError, match="not the FID Inception for 768 features .no Mixed_5b"):
        E.FIDInception(stem, 768)
