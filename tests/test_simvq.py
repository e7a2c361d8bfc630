import pytest
import torch

from vqgan.quantizer import VectorQuantizer
from vqgan.simvq import SimVQ


def test_the_codes_are_the_fixed_ones_times_the_matrix():
    quantizer = SimVQ(16, 4)
    z_e = torch.randn(2, 4, 3, 3)
    z_q, indices, _ = quantizer.eval()(z_e)
    codes = torch.stack([quantizer.linear.weight @ c for c in quantizer.codebook])
    assert torch.allclose(quantizer.lookup(indices), codes[indices].permute(0, 3, 1, 2), atol=1e-6)
    assert torch.allclose(z_q, quantizer.lookup(indices), atol=1e-6)
    vectors = z_e.permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(indices.flatten(), torch.cdist(vectors, codes).argmin(dim=1))


@pytest.mark.parametrize(("kind", "moved"), [(SimVQ, 64), (VectorQuantizer, 1)])
def test_a_step_moves_every_code_though_one_was_chosen(kind, moved):
    """Of a `VectorQuantizer` the gradient moves the chosen code only."""
    quantizer = kind(64, 4)
    quantizer.initialized = True
    before = quantizer.embeddings().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer(torch.randn(1, 4, 1, 1)).loss.backward()
    optimizer.step()
    assert (quantizer.embeddings() - before).abs().sum(dim=1).gt(0).sum() == moved


def test_the_table_is_frozen_and_saved():
    quantizer = SimVQ(16, 4)
    assert [name for name, _ in quantizer.named_parameters()] == ["linear.weight"]
    assert set(quantizer.state_dict()) == {"codebook", "linear.weight", "_extra_state"}
