import copy

import pytest
import torch
from torch import nn

from vqgan.vqgan import VQGAN
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
    with pytest.raises(ValueError, match="in_channels.*0"):
        VQVAE(in_channels=0)


# --- elsewhere: what is true of the VQGAN too --------------------------------------------------


def small_vqgan(**kwargs):
    return VQGAN(channels=8, latent_channels=8, embedding_dim=4, num_embeddings=16, **kwargs)


def initialized(build, x, **kwargs):
    """A model in eval mode whose codes are vectors of x."""
    model = build(**kwargs)
    model(x)
    return model.eval().requires_grad_(False)


MODELS = pytest.mark.parametrize("build", [small, small_vqgan])


@MODELS
@QUANTIZERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_sees_and_gives_the_same(x, build, quantizer, dtype):
    model = initialized(build, x, quantizer=quantizer)
    other = copy.deepcopy(model).to(dtype)
    reconstruction, indices, _ = other(x.to(dtype))
    decoded = other.decode_indices(indices)
    assert reconstruction.dtype == decoded.dtype == dtype
    assert (indices == model(x).indices).float().mean() > 0.9
    for expected in (reconstruction, model.decode_indices(indices)):
        assert (decoded.float() - expected.float()).abs().mean() < 1e-2


class Method(nn.Module):
    """One method of a model as a module, which torch.export takes."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, argument):
        return getattr(self.model, self.name)(argument)


@MODELS
@pytest.mark.parametrize("is_free", [False, True])
def test_both_halves_can_be_exported_for_one_batch_size_or_any(x, build, is_free):
    model = initialized(build, x)
    indices = model.encode(x).indices
    sizes = ({0: torch.export.Dim("batch")},) if is_free else None
    n = 7 if is_free else 4  # another one than below
    encode = torch.export.export(Method(model, "encode"), (x[:4],), dynamic_shapes=sizes)
    assert (encode.module()(x[:n])[1] == indices[:n]).float().mean() > 0.99
    decode = Method(model, "decode_indices")
    decode = torch.export.export(decode, (indices[:4],), dynamic_shapes=sizes)
    expected = model.decode_indices(indices[:n])
    assert torch.allclose(decode.module()(indices[:n]), expected, atol=1e-3)


@MODELS
def test_weights_as_plain_tensors_are_the_whole_model(x, build):
    """What other file formats, and averages over state dicts, take for granted."""
    model = initialized(build, x)
    loaded = build()
    loaded.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert loaded.quantizer.initialized
    assert torch.allclose(loaded.eval()(x).reconstruction, model(x).reconstruction, atol=1e-4)


@MODELS
@pytest.mark.parametrize("in_channels", [1, 5])
def test_images_of_other_channels(build, in_channels):
    model, x = build(in_channels=in_channels), torch.randn(4, in_channels, 32, 32)
    reconstruction, indices, _ = model(x)
    assert reconstruction.shape == x.shape and indices.shape == (4, 8, 8)
    assert model.decode_tokens(model.tokens(x)).shape == x.shape
    with pytest.raises(ValueError, match=rf"\(B, {in_channels}, H, W\).*\(4, 3, 32, 32\)"):
        model(torch.randn(4, 3, 32, 32))


@MODELS
def test_gray_images_for_a_model_of_three_channels_get_a_remedy(x, build):
    model = initialized(build, x)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*\(16, 1, 32, 32\); x\.expand"):
        model(x[:, :1])
    assert model(x[:, :1].expand(-1, 3, -1, -1)).reconstruction.shape == x.shape
