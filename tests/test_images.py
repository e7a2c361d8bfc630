import pytest
import torch

from vqgan.images import check_channels, check_multiple, from_uint8, to_uint8, to_unit


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


def test_images_of_other_shapes_are_named_and_gray_ones_get_a_remedy():
    check_channels(torch.zeros(2, 3, 4, 4), 3)
    check_channels(torch.zeros(2, 1, 4, 4), 1)
    with pytest.raises(ValueError, match=r"3, H, W.*not \(2, 1, 4, 4\); x.expand\(-1, 3, -1, -1\)"):
        check_channels(torch.zeros(2, 1, 4, 4), 3)
    for shape, in_channels in (((2, 3, 4), 3), ((2, 4, 4, 3), 3), ((2, 3, 4, 4), 1)):
        with pytest.raises(ValueError, match=f"{in_channels}, H, W") as error:
            check_channels(torch.zeros(shape), in_channels)
        assert str(shape) in str(error.value) and "expand" not in str(error.value)


def test_sides_that_do_not_halve_evenly_are_named():
    check_multiple(4, 64, 4)
    for height, width in ((30, 32), (32, 30), (0, 4), (4, -4)):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels: give multiples of 4"):
            check_multiple(height, width, 4)
