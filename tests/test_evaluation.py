from dataclasses import replace
from unittest import mock

import pytest
import torch

from vqgan import evaluation, metrics
from vqgan.classifier import Classifier
from vqgan.conditions import NO_CONDITION, caption_condition, class_condition
from vqgan.evaluation import (
    decode_tokens,
    evaluate_autoencoder,
    evaluate_samples,
    reference_frechet,
)
from vqgan.images import from_uint8, to_unit
from vqgan.perceptual import ClassifierDistance
from vqgan.tokens import TokenDataset, load_tokens
from vqgan.training import Run
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqvae import VQVAE
from vqgan.vqvae2 import VQVAE2

CPU = torch.device("cpu")
K, N = 32, 16
PLAIN = {"guidance": 1.0, "temperature": 1.0, "top_k": None, "top_p": None}


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    """Of 48 images, which are measured in batches of 20."""
    return Run(
        out=tmp_path_factory.mktemp("run"),
        data=shapes.first(48),
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


@pytest.fixture(autouse=True)
def small_batches():
    with (
        mock.patch("vqgan.data.eval_batch_size", lambda image_size: 20),
        mock.patch.object(evaluation, "eval_batch_size", lambda image_size: 20),
    ):
        yield


@pytest.fixture(scope="module")
def x(run):
    return from_uint8(run.data.test_images)


@pytest.fixture(scope="module")
def tokenizer(run):
    torch.manual_seed(0)
    model = VQVAE(num_hiddens=8, num_embeddings=K, num_downsamples=3)
    with torch.no_grad():
        model.train().encode(from_uint8(run.data.train_images))
    return model.eval()


@pytest.fixture(scope="module")
def eval_classifier():
    torch.manual_seed(0)
    return Classifier(10, 4).eval().requires_grad_(False)


# --- reconstructions ---------------------------------------------------------------------------


@torch.no_grad()
def test_a_tokenizer_is_measured_over_the_whole_test_set(run, x, tokenizer, eval_classifier):
    distance = ClassifierDistance(Classifier(10, 4))
    tokenizer.train()
    result, counts = evaluate_autoencoder(
        tokenizer, run, distance=distance, eval_classifier=eval_classifier
    )
    assert not tokenizer.training
    x_hat = tokenizer(x).reconstruction
    quality = metrics.reconstruction_quality(x, x_hat, 0.3)
    for name, values in quality.items():
        assert result[name] == pytest.approx(values.mean().item(), rel=1e-4), name
    assert result["nmse_sampled"] == pytest.approx(result["nmse"], rel=1e-6)
    assert result["ssim_sampled"] == pytest.approx(result["ssim"], rel=1e-6)
    assert result["perceptual"] == pytest.approx(distance(x, x_hat).mean().item(), rel=1e-4)
    features = [eval_classifier.features(images) for images in (x, x_hat)]
    assert result["frechet"] == pytest.approx(metrics.frechet_distance(*features), rel=1e-3)
    right = eval_classifier(x_hat).argmax(dim=1) == run.data.test_labels
    assert result["class_accuracy"] == pytest.approx(right.float().mean().item())
    expected = tokenizer.tokens(x).flatten().bincount(minlength=K)
    assert torch.equal(counts, expected) and result["codes_used"] == (expected > 0).sum()
    assert result["bits_per_image"] == N * 5
    entropy = N * torch.tensor(result["perplexity"]).log2().item()
    assert result["entropy_bits_per_image"] == pytest.approx(entropy, rel=1e-5)


@torch.no_grad()
def test_of_two_codebooks_the_one_that_is_used_least_is_reported(run, x):
    torch.manual_seed(0)
    model = VQVAE2(num_hiddens=8, num_embeddings=K, num_downsamples=2)
    with torch.no_grad():
        model.train().encode(x)
        model.coarse_quantizer.codebook[1:] += 1e4  # only the first coarse code is near anything
    result, counts = evaluate_autoencoder(model.eval(), run)
    coarse, fine = model.split_tokens(model.tokens(x))
    assert result["codes_used"] == 1 == len(coarse.unique()) < len(fine.unique())
    expected = sum((level == k).sum() for level in (coarse, fine) for k in [3])
    assert counts[3] == expected
    assert result["bits_per_image"] == 5 * (16 + 64)


def test_rounds_of_one_codebook_are_counted_together(run, x):
    torch.manual_seed(0)
    model = VQVAE(
        num_hiddens=8, num_embeddings=K, num_downsamples=3, quantizer="residual", num_rounds=2
    )
    with torch.no_grad():
        model.train().encode(x)
    result, _ = evaluate_autoencoder(model.eval(), run)
    assert result["codes_used"] == len(model.tokens(x).unique())


@pytest.mark.parametrize("kind", [VAE, SpatialVAE])
def test_a_vae_is_measured_at_the_mean_and_at_a_sample(run, x, kind):
    torch.manual_seed(0)
    model = kind(num_hiddens=8).eval()
    before = torch.get_rng_state()
    result, counts = evaluate_autoencoder(model, run)
    assert torch.equal(torch.get_rng_state(), before)  # its noise is its own
    assert counts is None and result["perplexity"] is result["codes_used"] is None
    at_mean = model.decode(model.encode(x)[0])
    nmse = metrics.normalized_mse(x, at_mean, 0.3).mean().item()
    assert result["nmse"] == pytest.approx(nmse, rel=1e-4)
    assert result["nmse_sampled"] > result["nmse"] and result["ssim_sampled"] != result["ssim"]
    bits = metrics.nats_to_bits(model(x).kl.mean().item())
    assert result["bits_per_image"] == pytest.approx(bits, rel=1e-4) and "kl" not in result
    again, _ = evaluate_autoencoder(model, run)
    assert again == result


def test_what_is_not_measured_is_none(run, tokenizer):
    result, _ = evaluate_autoencoder(tokenizer, run)
    assert result["perceptual"] is result["frechet"] is result["class_accuracy"] is None
    assert "rfid" not in result


def test_all_models_have_the_same_keys(run, tokenizer):
    models = (tokenizer, VAE(num_hiddens=8), SpatialVAE(num_hiddens=8))
    results = [evaluate_autoencoder(model, run)[0] for model in models]
    assert results[0].keys() == results[1].keys() == results[2].keys()


def test_rfid_is_of_originals_and_reconstructions_in_unit_range(run, x, tokenizer):
    class Fid:
        images, device, resets = {True: [], False: []}, "cpu", 0

        def update(self, images, real):
            self.images[real].append(images)

        def compute(self):
            return torch.tensor(7.0)

        def reset(self):
            self.resets += 1

    fid = Fid()
    result, _ = evaluate_autoencoder(tokenizer, run, inception=fid)
    assert result["rfid"] == 7 and fid.resets == 1
    assert torch.equal(torch.cat(fid.images[True]), to_unit(x))
    reconstructions = torch.cat(fid.images[False])
    assert torch.allclose(reconstructions, to_unit(tokenizer(x).reconstruction), atol=1e-4)


# --- samples -----------------------------------------------------------------------------------


def test_tokens_are_decoded_in_parts(tokenizer, x):
    tokens = tokenizer.tokens(x)
    with mock.patch.object(tokenizer, "decode_tokens", wraps=tokenizer.decode_tokens) as decode:
        images = decode_tokens(tokenizer, tokens)
    assert decode.call_count == 3 and not images.requires_grad
    assert torch.allclose(images, tokenizer.decode_tokens(tokens), atol=1e-5)


@torch.no_grad()
def test_distances_to_read_a_samples_beside(run, x, tokenizer, eval_classifier):
    features, references = reference_frechet(eval_classifier, tokenizer, run)
    assert torch.allclose(features, eval_classifier.features(x), atol=1e-5)
    of_hat = eval_classifier.features(tokenizer(x).reconstruction)
    of_train = eval_classifier.features(from_uint8(run.data.train_images))
    assert references == {
        "reconstructions": pytest.approx(metrics.frechet_distance(of_hat, features), rel=1e-3),
        "training images": pytest.approx(metrics.frechet_distance(of_train, features), rel=1e-3),
    }


@pytest.fixture
def dataset_of(run, tokenizer):
    def dataset_of(condition) -> TokenDataset:
        return load_tokens(replace(run, flip=False), tokenizer, condition)

    return dataset_of


class Recites(GPT):
    """In place of a prior: gives back the tokens of the images whose conditions it is asked for."""

    def __init__(self, dataset):
        condition = dataset.condition
        super().__init__(K, N, condition.vocabulary, condition.length, 1, 1, 8)
        self.all_tokens, self.asked, self.settings = dataset.test_tokens, [], []

    def sample(self, condition, **settings):
        start = sum(map(len, self.asked))
        self.asked.append(condition)
        self.settings.append(settings)
        chosen = torch.arange(start, start + len(condition)) % len(self.all_tokens)
        return self.all_tokens[chosen]


@torch.no_grad()
def test_samples_stand_under_the_conditions_of_the_test_images(
    run, x, tokenizer, eval_classifier, dataset_of
):
    dataset = dataset_of(class_condition(run.data.class_names))
    prior = Recites(dataset)
    setting = PLAIN | {"temperature": 0.5, "top_k": 4}
    (row,), references = evaluate_samples(
        prior, tokenizer, dataset, [setting], eval_classifier, num_samples=None, run=run
    )
    assert torch.equal(torch.cat(prior.asked)[:, 0], run.data.test_labels)
    for settings in prior.settings:
        assert settings.pop("generator").initial_seed() == 0 and settings == setting
    # What it recites are the reconstructions.
    assert row["frechet"] == pytest.approx(references["reconstructions"], rel=1e-3, abs=1e-6)
    right = eval_classifier(tokenizer(x).reconstruction).argmax(dim=1) == run.data.test_labels
    assert row["class_accuracy"] == pytest.approx(right.float().mean().item())
    assert {name: row[name] for name in setting} == setting
    assert row["num_samples"] == 48 and row["seconds"] >= 0
    assert row["color_accuracy"] is row["prompt_accuracy"] is None


def test_samples_do_not_depend_on_the_chunks(run, tokenizer, eval_classifier, dataset_of):
    dataset, sample, sampled = dataset_of(class_condition(run.data.class_names)), GPT.sample, []

    def remember(self, condition, **settings):
        sampled.append(sample(self, condition, **settings))
        return sampled[-1]

    torch.manual_seed(0)
    prior, drawn = GPT(K, N, 10, 1, n_layer=1, n_head=1, n_embd=8).eval(), []
    for chunk_size, num_chunks in ((5, 3), (12, 1)):
        sampled.clear()
        with (
            mock.patch.object(evaluation, "MAX_CACHED", chunk_size * (2 * 2 * N * 8)),
            mock.patch.object(GPT, "sample", remember),
        ):
            evaluate_samples(
                prior, tokenizer, dataset, [PLAIN], eval_classifier, num_samples=12, run=run
            )
        assert len(sampled) == num_chunks
        drawn.append(torch.cat(sampled))
    # Sums over another batch may be rounded otherwise, which could change a token or two.
    assert (drawn[0] == drawn[1]).double().mean() > 0.9


@pytest.mark.parametrize("num_samples", [2, 100])
def test_more_samples_than_test_images_go_around_again(
    num_samples, run, tokenizer, eval_classifier, dataset_of
):
    dataset = dataset_of(class_condition(run.data.class_names))
    prior = Recites(dataset)
    ((row,), _) = evaluate_samples(
        prior, tokenizer, dataset, [PLAIN], eval_classifier, num_samples=num_samples, run=run
    )
    asked = torch.cat(prior.asked)[:, 0]
    assert row["num_samples"] == len(asked) == num_samples
    assert torch.equal(asked, run.data.test_labels.repeat(3)[:num_samples])


def test_without_a_condition_nothing_is_to_be_classified(
    run, tokenizer, eval_classifier, dataset_of
):
    dataset = dataset_of(NO_CONDITION)
    settings = [PLAIN, PLAIN | {"temperature": 0.0}]
    rows, _ = evaluate_samples(
        Recites(dataset), tokenizer, dataset, settings, eval_classifier, num_samples=4, run=run
    )
    assert [row["temperature"] for row in rows] == [1, 0]
    assert all(row["class_accuracy"] is None for row in rows)


def test_a_prompt_is_right_where_shape_and_colours_are(
    run, x, tokenizer, eval_classifier, dataset_of
):
    """The test images themselves in place of samples, and a classifier that knows every shape."""
    dataset = dataset_of(caption_condition(run.data.train_captions + run.data.test_captions))
    labels = run.data.test_labels.clone()
    labels[:12] = (labels[:12] + 1) % 10  # a quarter is taken for another shape
    knows = mock.Mock(wraps=eval_classifier)
    knows.head = lambda features: torch.nn.functional.one_hot(labels, 10).float()
    knows.parameters = eval_classifier.parameters
    with mock.patch.object(evaluation, "decode_tokens", lambda tokenizer, tokens: x):
        ((row,), _) = evaluate_samples(
            Recites(dataset), tokenizer, dataset, [PLAIN], knows, num_samples=None, run=run
        )
    assert row["frechet"] == pytest.approx(0, abs=1e-6) and row["class_accuracy"] == 0.75
    assert row["color_accuracy"] > 0.9
    assert 0.75 * 0.85 < row["prompt_accuracy"] <= 0.75


def test_without_a_yardstick_nothing_is_sampled(run, tokenizer, dataset_of):
    dataset = dataset_of(NO_CONDITION)
    with mock.patch.object(GPT, "sample", side_effect=AssertionError):
        prior = GPT(K, N, 1, 1, 1, 1, 8)
        model_args = (prior, tokenizer, dataset, [PLAIN], None)
        assert evaluate_samples(*model_args, num_samples=4, run=run) == ([], {})
