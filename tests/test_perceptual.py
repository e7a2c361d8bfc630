from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from vqgan import perceptual
from vqgan.classifier import Classifier
from vqgan.errors import InputError
from vqgan.perceptual import LPIPS, ClassifierDistance, load_lpips, load_lpips_lins


@pytest.fixture(scope="module")
def vgg_weights():
    torch.manual_seed(0)
    return vgg16(weights=None).state_dict()


@pytest.fixture(scope="module")
def heads():
    """The published heads, which the package `lpips` carries."""
    pytest.importorskip("lpips")
    return load_lpips_lins(Path("not there"))


@pytest.fixture(scope="module")
def lpips_distance(vgg_weights, heads):
    """Made once: it takes a second, and nothing changes it."""
    return LPIPS(vgg_weights, heads)


@pytest.fixture(params=["classifier", "lpips"])
def distance(request):
    if request.param == "classifier":
        return ClassifierDistance(Classifier(10, width=8))
    return request.getfixturevalue("lpips_distance")


def pair():
    return torch.rand(3, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 32, 32) * 2 - 1


def test_lpips_equals_the_authors_package(vgg_weights, heads):
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    features = {f"features.{k.split('.', 1)[1]}": v for k, v in theirs.net.state_dict().items()}
    ours = LPIPS(vgg_weights | features, heads)
    x, y = pair()
    with torch.no_grad():
        assert torch.allclose(ours(x, y), theirs(x, y).flatten(), atol=1e-5)


def test_classifier_distance_by_hand():
    classifier = Classifier(10, width=8)
    x, y = pair()
    expected = torch.zeros(3)
    stages = zip(classifier.eval().stage_features(x), classifier.stage_features(y), strict=True)
    for f_x, f_y in stages:
        for b in range(3):
            for i in range(f_x.shape[2]):
                for j in range(f_x.shape[3]):
                    u, v = f_x[b, :, i, j], f_y[b, :, i, j]
                    u, v = u / max(u.norm(), 1e-10), v / max(v.norm(), 1e-10)
                    expected[b] += (u - v).square().sum() / f_x[0, 0].numel()
    assert torch.allclose(ClassifierDistance(classifier)(x, y), expected, rtol=1e-4)


def test_zero_for_equal_images_symmetric_and_positive(distance):
    x, y = pair()
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert torch.allclose(distance(x, y), distance(y, x))
    assert (distance(x, y) > 0).all()


def test_training_mode_of_a_parent_changes_nothing(distance):
    """Neither dropout nor batch statistics wake up."""
    x, y = pair()
    before = distance(x, y)
    parent = nn.ModuleList([distance]).train()
    assert not any(module.training for module in parent[0].modules())
    assert torch.equal(distance(x, y), before) and torch.equal(distance(x, y), before)


def test_it_never_learns_but_hands_the_gradient_on(distance):
    x, y = pair()
    y.requires_grad_()
    distance(x, y).sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_the_gradient_is_finite_where_features_are_zero(vgg_weights, heads):
    """A square root of zero would have an infinite slope: a place where no channel is active."""
    dark = {name: torch.zeros_like(weight) for name, weight in vgg_weights.items()}
    y = torch.zeros(1, 3, 32, 32, requires_grad=True)
    LPIPS(dark, heads)(torch.ones(1, 3, 32, 32), y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_autocast_does_not_reach_it(distance):
    x, y = pair()
    with torch.autocast("cpu", torch.bfloat16):
        half = distance(x, y)
    assert half.dtype == torch.float32 and torch.equal(half, distance(x, y))


def test_it_wants_the_models_range(distance):
    """[0, 1] gives another number: nothing warns, so the docstring must."""
    x, y = pair()
    assert not torch.allclose(distance(x, y), distance((x + 1) / 2, (y + 1) / 2), rtol=0.02)
    assert "[-1, 1]" in type(distance).forward.__doc__


# --- weights that do not fit -------------------------------------------------------------------


def test_heads_are_loaded_strictly(vgg_weights, heads):
    renamed = {name.replace("model.1", "model.0"): weight for name, weight in heads.items()}
    with pytest.raises(ValueError, match="lin0.model.0.weight"):
        LPIPS(vgg_weights, renamed)
    with pytest.raises(RuntimeError, match="VGG"):
        LPIPS({"features.0.weight": torch.zeros(1)}, heads)
    model = LPIPS(vgg_weights, dict(reversed(heads.items())))  # in any order
    assert torch.equal(model.w4, heads["lin4.model.1.weight"].flatten())


def test_another_file_in_place_of_the_heads_is_refused(tmp_path):
    path = tmp_path / "vgg.pth"
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, path)
    with pytest.raises(InputError, match="vgg.pth is not the published file.*http"):
        load_lpips_lins(path)


def refuse(*args, **kwargs):
    raise OSError("no network")


def test_another_file_in_place_of_vgg_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir()
    path.write_bytes(b"not weights")
    with pytest.raises(InputError, match="397923af.pth is not the published file.*http"):
        load_lpips()


def test_without_network_the_error_says_where_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError, match="vgg16-397923af.pth at .*perceptual=classifier"):
        load_lpips()
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="vgg.pth at .*heads.pth"):
        load_lpips_lins(tmp_path / "heads.pth")
