import pytest
import torch

from vqgan.classifier import Classifier, load_classifier, save_classifier, train_classifier
from vqgan.data import TrainLoader
from vqgan.errors import InputError
from vqgan.images import from_uint8

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def easy():
    """Dark and bright noise: two classes that a few steps tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    images = torch.randint(0, 120, (256, 3, 16, 16), generator=generator)
    images = (images + 120 * labels[:, None, None, None]).to(torch.uint8)
    return images, labels


def train(easy, **kwargs):
    images, labels = easy
    flags = {"num_classes": 2, "width": 8, "epochs": 4, "seed": 0, "name": "test"}
    flags |= {"device": CPU, "dtype": torch.float32}
    return train_classifier(TrainLoader(images, 128, labels=labels), **flags | kwargs)


def test_it_learns_is_frozen_and_leaves_the_random_state(easy):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = train(easy, epochs=15)
    assert torch.equal(torch.get_rng_state(), before)
    images, labels = easy
    predicted = model(from_uint8(images)).argmax(dim=1)
    assert (predicted == labels).float().mean() > 0.95
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_seed_is_the_whole_start(easy):
    a, b, c = train(easy, epochs=1), train(easy, epochs=1), train(easy, epochs=1, seed=1)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_features_are_means_of_the_last_stage():
    model = Classifier(5, width=6).eval()
    x = torch.randn(2, 3, 32, 32)
    stages = model.stage_features(x)
    assert [tuple(f.shape) for f in stages] == [(2, 6, 32, 32), (2, 12, 16, 16), (2, 24, 8, 8)]
    assert torch.allclose(model.features(x), stages[-1].mean(dim=(2, 3)))
    assert torch.allclose(model(x), model.head(model.features(x)))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = Classifier(2, width=4).eval()
    save_classifier(tmp_path / "c.pt", model, 0.75)
    loaded, share = load_classifier(tmp_path / "c.pt", CPU)
    x = torch.randn(2, 3, 16, 16)
    weights = model.state_dict()
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    # It is loaded with channels last, and in another layout sums are rounded otherwise.
    assert torch.allclose(loaded(x), model(x), atol=1e-5) and share == 0.75
    assert not loaded.training and not loaded.head.weight.requires_grad
    (tmp_path / "c.pt").write_bytes(b"not a file of torch")
    with pytest.raises(InputError, match="c.pt"):
        load_classifier(tmp_path / "c.pt", CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**12}, {"width": 10**30}, {"width": "x"}, {"weights": None},
        {"weights": {}}, {"accuracy": None}, {"accuracy": "high"},
    ],
)  # fmt: skip
def test_a_file_of_odd_content_is_named(tmp_path, change):
    save_classifier(tmp_path / "c.pt", Classifier(2, width=4), 0.75)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    torch.save(content | change, tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt is not a classifier"):
        load_classifier(tmp_path / "c.pt", CPU)
    content["weights"]["head.bias"][0] = float("nan")
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(InputError, match="c.pt is not a classifier"):
        load_classifier(tmp_path / "c.pt", CPU)
