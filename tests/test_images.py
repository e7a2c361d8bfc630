import torch

from vqgan.images import from_uint8, to_uint8, to_unit


def test_ranges_and_their_inverse():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = from_uint8(levels)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert torch.equal((to_unit(x) * 255).round().to(torch.uint8), levels)
    assert torch.equal(to_uint8(x), levels)


def test_what_decoders_put_out_beyond_the_range_is_clamped():
    x = torch.tensor([-3.0, 3.0])
    assert to_unit(x).tolist() == [0, 1]
    assert to_uint8(x).tolist() == [0, 255]
    assert to_unit(x.bfloat16()).dtype == torch.float32
