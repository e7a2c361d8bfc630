import pytest
import torch

from vqgan.vqvae2 import VQVAE2

SIZES = {"num_hiddens": 8, "num_residual_hiddens": 4, "embedding_dim": 4, "num_embeddings": 16}


def images(n=4, side=32):
    return torch.rand(n, 3, side, side) * 2 - 1


def trained(**options):
    model = VQVAE2(**SIZES | options)
    model.train()(images())  # initializes the codes
    return model.eval().requires_grad_(False)


def test_the_sequence_is_the_coarse_grid_and_then_the_fine_one():
    model, x = trained(), images()
    assert model.grids == [(8, 8), (16, 16)] and model.seq_len == 320
    coarse, fine = model.split_tokens(model.tokens(x))
    assert coarse.shape == (4, 8, 8) and fine.shape == (4, 16, 16)
    features = model.encoder(x)
    assert torch.equal(coarse, model.coarse_quantizer(model.coarse_encoder(features)).indices)
    assert model.encode(x).z_q.shape == (4, 8, 16, 16)


def test_the_fine_codes_know_the_coarse_ones_and_not_the_other_way_round():
    """Another coarse grid gives other fine vectors; the coarse grid never sees the fine one."""
    model, x = trained(), images()
    before = model.split_tokens(model.tokens(x))
    model.coarse_quantizer.codebook.mul_(-3).add_(1)  # what the coarse codes decode to
    after = model.split_tokens(model.tokens(x))
    assert (before[1] != after[1]).any()
    model.quantizer.codebook.mul_(-3)
    assert torch.equal(model.split_tokens(model.tokens(x))[0], after[0])


def test_the_loss_is_the_sum_of_both_quantizers():
    model, x = trained(), images()
    features = model.encoder(x)
    coarse, _, coarse_loss = model.coarse_quantizer(model.coarse_encoder(features))
    seen = torch.cat([features, model.coarse_decoder(coarse)], dim=1)
    fine_loss = model.quantizer(model.to_fine(seen)).loss
    assert model(x).loss.item() == pytest.approx((coarse_loss + fine_loss).item())


def test_the_coarse_image_depends_on_the_coarse_tokens_only():
    model, x = trained(), images()
    tokens = model.tokens(x)
    others = tokens.clone()
    others[:, 64:] = (others[:, 64:] + 1) % 16
    assert torch.equal(model.decode_coarse(tokens), model.decode_coarse(others))
    assert not torch.equal(model.decode_tokens(tokens), model.decode_tokens(others))
    others[:, 0] = (others[:, 0] + 1) % 16
    assert not torch.equal(model.decode_coarse(tokens), model.decode_coarse(others))


def test_every_parameter_learns():
    model = VQVAE2(**SIZES | {"quantizer": "gradient"})
    x = images()
    output = model(x)
    ((output.reconstruction - x).square().mean() + output.loss).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_sizes_that_do_not_halve_twice_are_refused():
    with pytest.raises(ValueError, match="34x34 pixels: give multiples of 4"):
        VQVAE2(image_size=34)
    with pytest.raises(ValueError, match="multiples of 4"):
        trained().encode(images(side=30))
    with pytest.raises(ValueError, match="residual"):
        VQVAE2(quantizer="residual")
