import copy

import pytest
import torch
from torch import nn

from vqgan.vqgan import NETWORKS, VQGAN, AttentionBlock, Downsample, GroupNorm, ResNetBlock


@pytest.fixture
def x(shape_images):
    return shape_images * 2 - 1


def small(**kwargs):
    sizes = {"channels": 8, "latent_channels": 8, "embedding_dim": 4, "num_embeddings": 16}
    return VQGAN(**sizes | kwargs)


@pytest.mark.parametrize("quantizer", ["ema", "gradient"])
@pytest.mark.parametrize(
    ("multipliers", "attention", "side"),
    [((1,), (32,), 32), ((1, 2), (), 16), ((1, 2, 2), None, 8), ((1, 1, 2, 3), (16, 4), 4)],
)
def test_indices_hold_the_whole_reconstruction(x, quantizer, multipliers, attention, side):
    model = small(
        channel_multipliers=multipliers, attention_resolutions=attention, quantizer=quantizer
    )
    model(x)  # the codebook starts from data
    model.eval()
    reconstruction, indices, _ = model(x)
    assert indices.shape == (16, side, side) and reconstruction.shape == x.shape
    # The model decodes z + (e - z), which is e but for rounding, and its many layers add to that.
    assert torch.allclose(model.decode_indices(model.encode(x).indices), reconstruction, atol=1e-4)


@pytest.mark.parametrize("quantizer", ["ema", "gradient"])
def test_as_a_tokenizer_it_turns_images_into_sequences_and_back(x, quantizer):
    model = small(quantizer=quantizer)
    model(x)  # the codebook starts from data
    model.eval()
    tokens = model.tokens(x)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < 16
    assert torch.equal(tokens, model.encode(x).indices.flatten(1))
    assert model.grids == [(8, 8)] and tokens.shape == (16, 64)
    assert model.num_embeddings == 16 and model.image_size == model.resolution == 32
    assert torch.allclose(model.decode_tokens(tokens), model(x).reconstruction, atol=1e-4)
    assert small(resolution=64).grids == [(16, 16)]


def test_parameters_counted_by_hand():
    """The docstring's 1.08 M, layer by layer; and the paper's network."""

    def conv(a, b, kernel=3):
        return a * b * kernel**2 + b

    def block(a, b):
        return 2 * a + conv(a, b) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    attention = 2 * 64 + 4 * conv(64, 64, 1)
    middle = 2 * block(64, 64) + attention
    encoder = conv(3, 32) + block(32, 32) + conv(32, 32) + block(32, 64) + conv(64, 64)
    encoder += block(64, 64) + attention + middle + 2 * 64 + conv(64, 64) + conv(64, 32, 1)
    decoder = conv(32, 64, 1) + conv(64, 64) + middle + 2 * (block(64, 64) + attention)
    decoder += conv(64, 64) + 2 * block(64, 64) + conv(64, 64) + block(64, 32) + block(32, 32)
    decoder += 2 * 32 + conv(32, 3)
    assert sum(p.numel() for p in VQGAN().parameters()) == encoder + decoder == 1_075_843
    with torch.device("meta"):
        paper = VQGAN(**NETWORKS["f16"])
    assert sum(p.numel() for p in paper.parameters()) == 71_879_555


def test_every_weight_gets_a_gradient(x):
    model = small()
    output = model(x)
    ((output.reconstruction - x).square().mean() + output.loss).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k.bias"):  # adds the same to every logit of a softmax: no gradient
            assert parameter.grad.abs().sum() > 0, name


def test_attention_is_softmax_of_products_over_places():
    """Against torch's own, and against the formula place by place."""
    block = AttentionBlock(8, 2)
    x = torch.randn(2, 8, 3, 3)
    normed = block.norm(x)
    q, k, v = (layer(normed).flatten(2) for layer in (block.q, block.k, block.v))  # (2, 8, 9)
    expected = torch.zeros(2, 8, 9)
    for i in range(9):
        logits = torch.stack([(q[:, :, i] * k[:, :, j]).sum(dim=1) for j in range(9)]) / 8**0.5
        for share, j in zip(logits.softmax(dim=0), range(9), strict=True):
            expected[:, :, i] += share[:, None] * v[:, :, j]
    expected = x + block.proj_out(expected.view(2, 8, 3, 3))
    assert torch.allclose(block(x), expected, atol=1e-5)
    fused = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    fused = x + block.proj_out(fused.transpose(1, 2).reshape(2, 8, 3, 3))
    assert torch.allclose(block(x), fused, atol=1e-5)


def test_a_residual_block_keeps_its_shortcut():
    block = ResNetBlock(4, 4, 2)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert isinstance(ResNetBlock(4, 6, 2).shortcut, nn.Conv2d)


def test_downsampling_pads_on_the_right_and_below_only():
    """A pixel in the first row and column is seen by one output, at the same corner, weight 0,0."""
    layer = Downsample(1)
    nn.init.zeros_(layer.conv.bias)
    x = torch.zeros(1, 1, 8, 8)
    x[..., 0, 0] = 1
    out = layer(x)
    assert out.shape == (1, 1, 4, 4)
    assert torch.allclose(out[0, 0, 0, 0], layer.conv.weight[0, 0, 0, 0])
    assert out.abs().sum() == out[0, 0, 0, 0].abs()


def test_the_number_of_groups_follows_the_width_and_brightness_survives():
    """Few channels to a group erase brightness: with one each, a constant image becomes zero."""
    groups = {m.num_groups for m in VQGAN().modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {8}
    with torch.device("meta"):
        paper = VQGAN(**NETWORKS["f16"])
    assert {m.num_groups for m in paper.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert {m.eps for m in paper.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}

    x = torch.randn(1, 32, 1, 1).expand(1, 32, 4, 4)  # flat, another value for each channel
    assert GroupNorm(32, 32)(x).abs().max() < 1e-3
    assert GroupNorm(8, 32)(x).abs().max() > 0.5


def test_group_norm_computes_in_float32_and_gives_back_what_it_took():
    x = 100 + torch.randn(2, 8, 4, 4)
    norm = GroupNorm(2, 8, eps=1e-6)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    exact = nn.functional.group_norm(x.bfloat16().float(), 2, eps=1e-6)
    assert torch.allclose(half.float(), exact, atol=2e-2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):  # weights of another type, too
        other = copy.deepcopy(norm).to(dtype)(x.to(dtype))
        expected = nn.functional.group_norm(x.to(dtype).float(), 2, eps=1e-6)
        assert other.dtype == dtype and torch.allclose(other.float(), expected, atol=2e-2)


def test_any_side_that_the_levels_divide_goes_through():
    model = small().eval()
    assert model(torch.zeros(1, 3, 64, 48)).indices.shape == (1, 16, 12)
    with pytest.raises(ValueError, match="30x32.* 4"):
        model(torch.zeros(1, 3, 30, 32))


@pytest.mark.parametrize(
    ("model_args", "expected"),
    [
        ({"resolution": 30}, "30x30.* 4"),
        ({"attention_resolutions": (12,)}, "=12 never occurs.*32, 16, 8"),
        ({"channels": 10, "norm_groups": 4}, "10 channels.*4 groups"),
        ({"quantizer": "lattice"}, "'lattice'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(model_args, expected):
    with pytest.raises(ValueError, match=expected):
        small(**model_args)
