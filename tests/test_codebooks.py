"""What holds for every quantizer, alone and in an autoencoder."""

import pytest
import torch
import torch.nn.functional as F

from vqgan import VQGAN, VQVAE, load_model
from vqgan.checkpoint import save_checkpoint
from vqgan.codebooks import DEFAULTS, QUANTIZERS, make_quantizer
from vqgan.data import TrainLoader
from vqgan.vqvae2 import VQVAE2

# Arguments of an autoencoder, for each quantizer and each option that has a meaning with it.
CASES = {
    "ema": {"quantizer": "ema"},
    "ema-cosine": {"quantizer": "ema", "cosine": True, "embedding_dim": 8},
    "ema-rotation": {"quantizer": "ema", "gradient_estimator": "rotation"},
    "gradient": {"quantizer": "gradient"},
    "gradient-cosine": {"quantizer": "gradient", "cosine": True, "embedding_dim": 8},
    "gradient-rotation": {"quantizer": "gradient", "gradient_estimator": "rotation"},
    "fsq": {"quantizer": "fsq", "levels": [8, 8]},
    "lfq": {"quantizer": "lfq"},
    "simvq": {"quantizer": "simvq"},
    "simvq-rotation": {"quantizer": "simvq", "gradient_estimator": "rotation"},
    "residual": {"quantizer": "residual", "num_rounds": 3},
    "residual-rotation": {
        "quantizer": "residual",
        "num_rounds": 2,
        "gradient_estimator": "rotation",
    },
}
VQVAE_SIZES = {"image_size": 16, "num_hiddens": 8, "num_residual_hiddens": 4, "num_embeddings": 64}
VQGAN_SIZES = {"resolution": 16, "channels": 8, "latent_channels": 8, "num_embeddings": 64}
EVERY = pytest.mark.parametrize("case", CASES)


def autoencoders(case):
    """A small one of each kind, with this quantizer."""
    models = [VQVAE(**VQVAE_SIZES | CASES[case]), VQGAN(**VQGAN_SIZES | CASES[case])]
    if CASES[case]["quantizer"] != "residual":
        models.append(VQVAE2(**VQVAE_SIZES | CASES[case]))
    return models


def images(n=8):
    return torch.rand(n, 3, 16, 16) * 2 - 1


def step(model, x):
    """One training step, so that codes are initialized and moved."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    output = model.train()(x)
    (F.mse_loss(output.reconstruction, x) + output.loss).backward()
    optimizer.step()
    return output


def test_every_quantizer_is_a_case():
    assert {options["quantizer"] for options in CASES.values()} == set(QUANTIZERS)


@EVERY
def test_an_image_from_its_tokens_is_the_reconstruction(case):
    for model in autoencoders(case):
        x = images()
        step(model, x)
        model.eval()
        with torch.no_grad():
            encoded = model.encode(x)
            tokens = model.tokens(x)
            assert tokens.shape == (8, model.seq_len) and tokens.dtype == torch.int64
            assert tokens.max() < model.num_embeddings
            assert torch.equal(encoded.indices.flatten(1), tokens)
            expected = model(x).reconstruction
            assert torch.allclose(model.decode_tokens(tokens), expected, atol=1e-5)
            assert torch.allclose(model.decode_indices(encoded.indices), expected, atol=1e-5)
            split = torch.cat([grid.flatten(1) for grid in model.split_tokens(tokens)], dim=1)
            assert torch.equal(split, tokens)


@EVERY
def test_every_weight_of_the_encoder_gets_a_gradient_of_the_reconstruction(case):
    for model in autoencoders(case):
        x = images()
        step(model, x)
        model.zero_grad()
        F.mse_loss(model(x).reconstruction, x).backward()
        first = model.encoder[0].weight.grad
        assert first is not None and first.abs().sum() > 0


@EVERY
def test_the_loss_reaches_what_it_should(case):
    """The encoder (but not from FSQ, whose loss is zero), and codes that a gradient moves."""
    for model in autoencoders(case):
        x = images()
        step(model, x)
        model.zero_grad()
        kind, loss = CASES[case]["quantizer"], model(x).loss
        if kind == "fsq":
            assert loss == 0 and not loss.requires_grad
            continue
        loss.backward()
        assert model.encoder[0].weight.grad.abs().sum() > 0
        learned = [name for name, p in model.quantizer.named_parameters() if p.grad.abs().sum() > 0]
        expected = {"gradient": ["codebook"], "simvq": ["linear.weight"]}
        assert learned == expected.get(kind, [])


@EVERY
def test_a_checkpoint_encodes_as_the_model_that_it_is_of(case, tmp_path):
    for model in autoencoders(case):
        x = images()
        step(model, x)
        sizes = VQGAN_SIZES if isinstance(model, VQGAN) else VQVAE_SIZES
        loader = TrainLoader(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), 4)
        options = {"optimizers": {}, "batches": loader, "step": 1, "seconds": 0.0}
        path = tmp_path / f"{type(model).__name__}.pt"
        save_checkpoint(path, model=model, model_args=sizes | CASES[case], **options)
        loaded = load_model(path)
        with torch.no_grad():
            ours, theirs = model.eval()(x), loaded(x)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.reconstruction, theirs.reconstruction)


@EVERY
def test_autocast_does_not_change_the_codes_of_a_vector(case):
    model = VQVAE(**VQVAE_SIZES | CASES[case])
    step(model, images())
    quantizer = model.eval().quantizer
    z_e = torch.randn(4, quantizer.embedding_dim, 4, 4).bfloat16()
    expected = quantizer(z_e.float())
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, loss = quantizer(z_e)
        assert torch.allclose(quantizer.lookup(indices), z_q, atol=1e-6)
    assert torch.equal(indices, expected.indices) and torch.equal(z_q, expected.z_q)
    assert z_q.dtype == loss.dtype == torch.float32


@EVERY
def test_a_diverged_encoder_gives_indices_and_a_loss_that_says_so(case):
    """The training must see NaN in its losses, and not stop in the middle of a step."""
    model = VQVAE(**VQVAE_SIZES | CASES[case])
    step(model, images())
    with torch.no_grad():
        model.encoder[0].weight.fill_(float("nan"))
    output = model(images())
    assert 0 <= output.indices.min() and output.indices.max() < model.num_embeddings
    losses = F.mse_loss(output.reconstruction, images()) + output.loss
    assert not losses.isfinite()


@EVERY
def test_the_lookup_is_what_the_decoder_gets(case):
    model = VQVAE(**VQVAE_SIZES | CASES[case])
    step(model, images())
    with torch.no_grad():
        z_q, indices, _ = model.eval().encode(images())
        assert torch.allclose(model.quantizer.lookup(indices), z_q, atol=1e-6)


# --- cosine codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_cosine_codes_are_of_unit_length_and_chosen_by_their_angle(kind):
    quantizer = make_quantizer(kind, 32, 8, cosine=True)
    for _ in range(3):
        z_q, indices, _ = quantizer(10 * torch.randn(4, 8, 5, 5))  # EMA codes move
    assert torch.allclose(quantizer.embeddings().norm(dim=1), torch.ones(32))
    quantizer.eval()
    z_e = torch.randn(4, 8, 5, 5)
    z_q, indices, _ = quantizer(z_e)
    vectors = z_e.permute(0, 2, 3, 1)
    cosine = F.cosine_similarity(vectors[..., None, :], quantizer.embeddings(), dim=-1)
    assert torch.equal(indices, cosine.argmax(dim=-1))
    assert torch.allclose(z_q.norm(dim=1), torch.ones(4, 5, 5), atol=1e-5)
    for scale in (0.01, 100.0):  # the length says nothing
        scaled = quantizer(scale * z_e)
        assert torch.equal(scaled.indices, indices)
        assert scaled.loss.item() == pytest.approx(quantizer(z_e).loss.item(), rel=1e-3)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vq", {}, "one of ema, gradient"),
        ("fsq", {"cosine": True}, "fsq has no cosine"),
        ("lfq", {"gradient_estimator": "rotation"}, "lfq has no gradient_estimator"),
        ("simvq", {"data_init": False}, "simvq has no data_init"),
        ("simvq", {"cosine": True}, "simvq has no cosine"),
        ("gradient", {"restart_dead_codes": False}, "gradient has no restart_dead_codes"),
        ("residual", {"num_rounds": 2, "cosine": True}, "residual has no cosine"),
        ("residual", {}, "needs num_rounds"),
        ("ema", {"levels": [8, 8]}, "ema has no levels"),
        ("ema", {"num_rounds": 2}, "ema has no num_rounds"),
        ("ema", {"gama": 1}, "ema has no gama"),
        ("ema", {"gradient_estimator": "rotate"}, "straight-through, rotation, not rotate"),
        ("fsq", {}, "num_embeddings=100: give one of 64, "),
        ("lfq", {}, "num_embeddings=100.*power of two"),
    ],
)
def test_what_means_nothing_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(kind, 100, 8, **options)


@pytest.mark.parametrize("kind", ["ema", "gradient", "simvq", "residual"])
def test_a_codebook_without_codes_or_dimensions_is_refused(kind):
    options = {"num_rounds": 2} if kind == "residual" else {}
    assert make_quantizer(kind, 1, 1, **options).num_embeddings == 1
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="num_embeddings.*embedding_dim.*1"):
            make_quantizer(kind, *sizes, **options)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_values_that_leave_everything_as_usual_can_be_given_to_any_kind(kind):
    options = DEFAULTS | ({"num_rounds": 2} if kind == "residual" else {})
    assert isinstance(make_quantizer(kind, 64, 8, **options), QUANTIZERS[kind])
