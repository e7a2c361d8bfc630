import pytest
import torch

from vqgan.vqvae import VQVAE, ResidualBlock

QUANTIZERS = pytest.mark.parametrize("quantizer", ["ema", "gradient"])


@pytest.fixture
def x(shape_images):
    return shape_images * 2 - 1


def small(**kwargs):
    return VQVAE(
        num_hiddens=16, num_residual_hiddens=8, embedding_dim=8, num_embeddings=32, **kwargs
    )


@QUANTIZERS
@pytest.mark.parametrize(("num_downsamples", "side"), [(1, 16), (2, 8), (3, 4)])
def test_indices_hold_the_whole_reconstruction(x, quantizer, num_downsamples, side):
    model = small(num_downsamples=num_downsamples, quantizer=quantizer)
    model(x)  # the codebook starts from data
    model.eval()
    reconstruction, indices, _ = model(x)
    assert indices.shape == (16, side, side) and reconstruction.shape == x.shape
    assert torch.allclose(model.decode_indices(model.encode(x).indices), reconstruction, atol=1e-5)
    assert torch.allclose(model.decode(model.quantizer.lookup(indices)), reconstruction, atol=1e-5)


@QUANTIZERS
@pytest.mark.parametrize(("num_downsamples", "side"), [(1, 16), (3, 4)])
def test_as_a_tokenizer_it_turns_images_into_sequences_and_back(
    x, quantizer, num_downsamples, side
):
    model = small(num_downsamples=num_downsamples, quantizer=quantizer)
    model(x)  # the codebook starts from data
    model.eval()
    tokens = model.tokens(x)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < 32
    assert torch.equal(tokens, model.encode(x).indices.flatten(1))
    assert model.grids == [(side, side)] and tokens.shape == (16, side**2)
    assert model.num_embeddings == 32 and model.image_size == 32
    assert torch.allclose(model.decode_tokens(tokens), model(x).reconstruction, atol=1e-4)


def test_a_sequence_is_of_images_of_the_size_that_it_was_made_for():
    """Which changes no weight."""
    model = small(image_size=48).eval()
    assert model.grids == [(12, 12)]
    assert model.tokens(torch.zeros(2, 3, 48, 48)).shape == (2, 144)
    assert model.decode_tokens(torch.zeros(2, 144, dtype=torch.int64)).shape == (2, 3, 48, 48)
    assert model.state_dict().keys() == small().state_dict().keys()
    for sides in ((30, 32), (32, 30), (0, 4)):
        with pytest.raises(ValueError, match=f"{sides[0]}x{sides[1]}.* 4"):
            model.check_resolution(*sides)
    model.check_resolution(4, 64)
    with pytest.raises(ValueError, match="30x30.* 4"):
        small(image_size=30)


def test_parameters_counted_by_hand():
    """No weights are shared between the residual blocks, and the EMA codebook is no parameter."""

    def conv(a, b, kernel):
        return a * b * kernel**2 + b

    residual = 2 * (conv(128, 32, 3) + conv(32, 128, 1))
    encoder = conv(3, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3) + residual + conv(128, 64, 1)
    decoder = conv(64, 128, 3) + residual + conv(128, 64, 4) + conv(64, 3, 4)
    assert sum(p.numel() for p in VQVAE().parameters()) == encoder + decoder == 662_723
    gradient = VQVAE(quantizer="gradient")
    assert sum(p.numel() for p in gradient.parameters()) == encoder + decoder + 512 * 64


def test_the_decoder_mirrors_the_encoder():
    model = small(num_downsamples=3)
    down = [(c.in_channels, c.out_channels) for c in model.encoder[:6:2]]
    up = [c for c in model.decoder if isinstance(c, torch.nn.ConvTranspose2d)]
    assert down == [(3, 8), (8, 16), (16, 16)]
    assert [(c.out_channels, c.in_channels) for c in up] == down[::-1]


@QUANTIZERS
def test_every_weight_gets_a_gradient(x, quantizer):
    model = small(quantizer=quantizer)
    out = model(x)
    ((out.reconstruction - x).square().mean() + out.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_residual_block_adds_what_it_was_given():
    """The first ReLU is not in place: with a silent branch, negative values pass unchanged."""
    block = ResidualBlock(4, 2)
    torch.nn.init.zeros_(block.conv1x1.weight)
    torch.nn.init.zeros_(block.conv1x1.bias)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x.clone()), x)


def test_constructor_arguments_reach_the_quantizer():
    quantizer = small(beta=0.7, data_init=False, restart_dead_codes=False).quantizer
    assert quantizer.beta == 0.7 and quantizer.initialized and not quantizer.restart_dead_codes


def test_bad_arguments_are_named(x):
    with pytest.raises(ValueError, match="'product'"):
        VQVAE(quantizer="product")
    with pytest.raises(ValueError, match="num_downsamples"):
        VQVAE(num_downsamples=0)
    with pytest.raises(ValueError, match="30x32.* 4"):
        small()(x[:, :, :30])
