import pytest
import torch
import torch.nn.functional as F

from vqgan.residual import ResidualVQ


def make(K=8, D=3, M=3, **options):
    quantizer = ResidualVQ(K, D, M, data_init=False, restart_dead_codes=False, **options)
    quantizer.quantizer.codebook.normal_()
    quantizer.quantizer.ema_sums.copy_(quantizer.quantizer.codebook)
    return quantizer


def test_the_rounds_by_hand():
    quantizer, z_e = make().eval(), torch.randn(2, 3, 4, 5)
    z_q, indices, loss = quantizer(z_e)
    assert indices.shape == (2, 3, 4, 5) and z_q.shape == z_e.shape
    codebook = quantizer.quantizer.codebook
    residual, total, commitment = z_e.permute(0, 2, 3, 1), 0, 0
    for m in range(3):
        distances = (residual[..., None, :] - codebook).square().sum(dim=-1)  # (B, h, w, K)
        assert torch.equal(indices[:, m], distances.argmin(dim=-1))
        code = codebook[indices[:, m]]
        commitment += 0.25 * F.mse_loss(residual, code)
        total, residual = total + code, residual - code
    assert torch.allclose(z_q, total.permute(0, 3, 1, 2), atol=1e-6)
    assert torch.allclose(quantizer.lookup(indices), z_q, atol=1e-6)
    assert loss.item() == pytest.approx(commitment.item(), rel=1e-5)


def test_the_gradient_passes_the_sum_of_the_codes_unchanged():
    quantizer, z_e = make(), torch.randn(2, 3, 4, 5, requires_grad=True)
    weights = torch.randn(2, 3, 4, 5)
    (quantizer(z_e).z_q * weights).sum().backward()
    assert torch.allclose(z_e.grad, weights, atol=1e-6)


def test_the_loss_pulls_the_vectors_towards_the_sum_of_the_codes():
    """By finite differences, at a step too small to change a code. (Codes get no gradient.)"""
    quantizer, z_e = make().eval(), torch.randn(1, 3, 2, 2, requires_grad=True)
    quantizer(z_e).loss.backward()
    for position in ((0, 0, 0, 0), (0, 2, 1, 1)):
        step = torch.zeros_like(z_e)
        step[position] = 1e-2
        with torch.no_grad():
            difference = (quantizer(z_e + step).loss - quantizer(z_e - step).loss) / 2e-2
        assert z_e.grad[position].item() == pytest.approx(difference.item(), abs=1e-3)


def test_more_rounds_come_closer():
    data = torch.randn(64, 4, 4, 4)
    errors = []
    for M in (2, 4):
        quantizer = ResidualVQ(16, 4, M)
        for _ in range(100):
            quantizer(data)
        errors.append(F.mse_loss(quantizer.eval()(data).z_q, data).item())
    assert errors[1] < 0.5 * errors[0] < 0.5


@pytest.mark.parametrize("M", [0, 1])
def test_fewer_than_two_rounds_are_refused(M):
    with pytest.raises(ValueError, match=f"num_rounds={M}: give 2"):
        ResidualVQ(8, 4, M)
