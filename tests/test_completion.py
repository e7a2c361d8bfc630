import pytest
import torch
from commands import CLASSES

from vqgan.completion import complete, missing_tokens, paint_over, paste
from vqgan.pretrained import load_pipeline


def hole_of(box, size=32):
    x0, y0, x1, y1 = box
    hole = torch.zeros(size, size, dtype=torch.bool)
    hole[y0:y1, x0:x1] = True
    return hole


def test_a_hole_gets_the_mean_color_of_its_border():
    x, hole = torch.rand(2, 3, 8, 8), hole_of((2, 3, 4, 5), 8)
    painted = paint_over(x, hole)
    border = x[:, :, 2:6, 1:5].clone()
    border[:, :, 1:3, 1:3] = 0  # the hole itself
    torch.testing.assert_close(painted[:, :, 3, 2], border.sum(dim=(2, 3)) / 12)
    assert torch.equal(painted[:, :, ~hole], x[:, :, ~hole])
    assert (painted[:, :, hole] == painted[:, :, 3, 2, None]).all()


def test_tokens_that_a_hole_touches_are_missing():
    four_pixels = hole_of((19, 9, 21, 11))  # columns 4, 5 and row 2 of 8x8; column 2, row 1 of 4x4
    fine = torch.zeros(8, 8, dtype=torch.bool)
    fine[2, 4:6] = True
    coarse = torch.zeros(4, 4, dtype=torch.bool)
    coarse[1, 2] = True
    missing = missing_tokens(four_pixels, [(4, 4), (8, 8)])
    assert torch.equal(missing, torch.cat([coarse.flatten(), fine.flatten()]))


@pytest.mark.parametrize("kind", ["class", "masked", "image"])
def test_what_is_in_the_hole_has_no_effect(kind, pairs):
    pipeline, hole = load_pipeline(pairs / kind), hole_of((0, 0, 9, 9))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    other = torch.where(hole, torch.rand(2, 3, 32, 32), x)
    first, second = (
        complete(pipeline, images, hole, generator=torch.Generator().manual_seed(0))
        for images in (x, other)
    )
    assert torch.equal(first, second)
    pasted = paste(x, first, hole)
    assert torch.equal(pasted[:, :, ~hole], x[:, :, ~hole])
    assert torch.equal(pasted[:, :, hole], first[:, :, hole])


def test_a_condition_reaches_the_prior(pairs, asked):
    pipeline, hole = load_pipeline(pairs / "masked"), hole_of((0, 0, 9, 9))
    condition = pipeline.condition.encode_classes([CLASSES[1]])
    complete(pipeline, torch.zeros(1, 3, 32, 32), hole, condition, steps=2)
    complete(pipeline, torch.zeros(1, 3, 32, 32), hole)
    assert torch.equal(asked[0]["condition"], condition) and asked[0]["steps"] == 2
    assert asked[1]["condition"].item() == pipeline.transformer.null_token


def test_holes_that_leave_nothing_are_refused(pairs):
    pipeline = load_pipeline(pairs / "class")
    for hole in (hole_of((0, 0, 0, 0)), hole_of((0, 0, 9, 9), 28)):
        with pytest.raises(ValueError, match=r"hole is .*: give \(32, 32\) with some"):
            complete(pipeline, torch.zeros(1, 3, 32, 32), hole)
    with pytest.raises(ValueError, match="touches every token"):
        complete(pipeline, torch.zeros(1, 3, 32, 32), hole_of((3, 3, 29, 29)))
