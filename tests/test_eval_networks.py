import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from vqgan import eval_networks, metrics
from vqgan.classifier import Classifier, save_classifier
from vqgan.data import ImageDataset
from vqgan.errors import InputError
from vqgan.eval_networks import (
    accuracy,
    extract_features,
    inception_distance,
    load_eval_classifier,
    perceptual_distance,
    trained_classifier,
)
from vqgan.images import from_uint8
from vqgan.perceptual import ClassifierDistance
from vqgan.training import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def easy():
    """Dark and bright noise: two classes that a few steps tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    images = torch.randint(0, 120, (256, 3, 16, 16), generator=generator)
    images = (images + 120 * labels[:, None, None, None]).to(torch.uint8)
    return ImageDataset(images, images[:64], labels, labels[:64], ("dark", "bright"))


@pytest.fixture
def run(tmp_path, easy):
    return Run(
        out=tmp_path,
        data=easy,
        variance=0.3,
        device=CPU,
        dtype=torch.float32,
        epochs=1,
        seed=0,
        flip=True,
        checkpoint_every=100,
        resume=False,
        metadata={},
    )


def loose(run):
    """The same images without classes."""
    return replace(
        run, data=ImageDataset(run.data.train_images, run.data.test_images, None, None, ())
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- classifiers of the run's images -----------------------------------------------------------


def test_a_classifier_is_trained_measured_and_written(run, capsys):
    path = run.out / "c.pt"
    model, share = trained_classifier(path, run, width=8, epochs=12, seed=0)
    assert share == accuracy(model, run.data, CPU) > 0.9
    assert f"c: {share:.1%} of the test images classified correctly" in capsys.readouterr().out
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    again, same_share = trained_classifier(
        path, replace(run, resume=True), width=8, epochs=12, seed=0
    )
    assert same(again, model) and same_share == share and capsys.readouterr().out == ""


def test_a_resumed_run_trains_what_is_not_there_and_a_new_one_what_is(run):
    first, _ = trained_classifier(
        run.out / "c.pt", replace(run, resume=True), width=4, epochs=1, seed=0
    )
    other, _ = trained_classifier(run.out / "c.pt", run, width=4, epochs=1, seed=1)
    assert (run.out / "c.pt").exists() and not same(first, other)


def test_images_without_classes_are_refused(run):
    for few in (loose(run), replace(run, data=replace(run.data, class_names=("one",)))):
        with pytest.raises(InputError, match="class folders.*lpips or none"):
            trained_classifier(run.out / "c.pt", few, width=4, epochs=1, seed=0)


def test_accuracy_counted_by_hand(run):
    model = Classifier(2, width=4).eval()
    with torch.no_grad():
        predicted = model(from_uint8(run.data.test_images)).argmax(dim=1)
    share = (predicted == run.data.test_labels).float().mean().item()
    assert accuracy(model, run.data, CPU) == pytest.approx(share)


def test_features_of_batches_are_those_of_all(run):
    model = Classifier(2, width=4).eval()
    x = from_uint8(run.data.test_images)
    features = extract_features(model, x.split(10))
    assert features.shape == (64, 16) and not features.requires_grad
    assert torch.allclose(features, model.features(x), atol=1e-5)


# --- the perceptual distance -------------------------------------------------------------------


def test_the_distance_is_of_a_classifier_of_the_runs_images(run):
    distance, share = perceptual_distance(run, "classifier", epochs=1)
    assert isinstance(distance, ClassifierDistance) and 0 <= share <= 1
    assert (run.out / "classifier.pt").exists()
    assert perceptual_distance(run, "none", epochs=1) == (None, None)


def test_the_distance_may_be_lpips(run, monkeypatch):
    lpips = nn.Linear(1, 1)
    monkeypatch.setattr(eval_networks, "load_lpips", lambda: lpips)
    assert perceptual_distance(run, "lpips", epochs=1) == (lpips, None)


# --- the evaluation classifier -----------------------------------------------------------------


def test_the_yardstick_is_another_network_and_the_same_for_every_seed(run):
    eval_classifier, share = load_eval_classifier(run, epochs=1)
    assert 0 <= share <= 1 and (run.out / "eval_classifier.pt").exists()
    assert eval_classifier.stem.out_channels != eval_networks.CLASSIFIER_WIDTH
    assert eval_networks.EVAL_SEED != eval_networks.CLASSIFIER_SEED
    assert same(load_eval_classifier(replace(run, seed=7), epochs=1)[0], eval_classifier)


def test_without_classes_or_with_one_test_image_there_is_no_yardstick(run, save, capsys):
    single = replace(run, data=replace(run.data, test_images=run.data.test_images[:1]))
    given = save(run.out / "given" / "eval_classifier.pt")
    for few in (loose(run), single):
        for where in ({}, {"file": given}, {"folder": given.parent}):
            assert load_eval_classifier(few, epochs=1, **where) == (None, None)
            assert "no evaluation classifier" in capsys.readouterr().out
    assert not (run.out / "eval_classifier.pt").exists()


@pytest.fixture
def save(run):
    def save(path, num_classes=2):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_classifier(path, Classifier(num_classes, 4), 0.25)
        return path

    return save


@pytest.mark.parametrize("place", ["model", "."])
def test_another_runs_yardstick_is_found_beside_its_model_or_above(run, save, place):
    save(run.out / "other" / place / "eval_classifier.pt")
    eval_classifier, share = load_eval_classifier(run, epochs=1, folder=run.out / "other" / "model")
    assert share == 0.25 and eval_classifier.stem.out_channels == 4
    assert not (run.out / "eval_classifier.pt").exists()


def test_a_yardstick_that_is_given_comes_first(run, save):
    save(run.out / "other" / "eval_classifier.pt")
    given = run.out / "mine.pt"
    save_classifier(given, Classifier(2, 6), 0.75)
    assert load_eval_classifier(run, epochs=1, file=str(given), folder=run.out / "other")[1] == 0.75


@pytest.mark.parametrize("folder", [None, "nothing"])
def test_where_none_is_found_a_new_one_is_trained(run, folder):
    folder = folder and run.out / folder / "model"
    load_eval_classifier(run, epochs=1, folder=folder)
    assert (run.out / "eval_classifier.pt").exists()


def test_a_yardstick_of_other_classes_is_refused(run, save):
    path = save(run.out / "three.pt", num_classes=3)
    with pytest.raises(InputError, match="eval_classifier=.*three.pt.* 3 classes.* 2"):
        load_eval_classifier(run, epochs=1, file=str(path))


# --- Inception ---------------------------------------------------------------------------------


def test_rfid_is_torchmetrics_own():
    """With a small network in Inception's place, whose weights need a download."""
    pytest.importorskip("torchmetrics")

    class Means(nn.Module):
        num_features = 3

        def forward(self, images):
            return images.mean(dim=(2, 3))

    x, y = torch.rand(64, 3, 8, 8), torch.rand(64, 3, 8, 8) / 2
    fid = inception_distance(CPU, feature=Means())
    fid.update(x, real=True)
    fid.update(y, real=False)
    features = [Means()(images) for images in (x, y)]
    assert fid.compute().item() == pytest.approx(metrics.frechet_distance(*features), rel=1e-3)


def test_rfid_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(InputError, match="extra .*fid"):
        inception_distance(CPU)


def test_rfid_without_its_weights_says_where_they_go(monkeypatch, tmp_path):
    def refuse(**kwargs):
        raise OSError("no network")

    fid = type(sys)("torchmetrics.image.fid")
    fid.FrechetInceptionDistance = refuse
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", fid)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="no network.*inception.*pth.*") as caught:
        inception_distance(CPU)
    assert str(tmp_path) in str(caught.value)
