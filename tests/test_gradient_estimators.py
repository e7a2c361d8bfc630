import pytest
import torch
import torch.nn.functional as F

from vqgan.gradient_estimators import GRADIENT_ESTIMATORS, rotation, straight_through

BOTH = pytest.mark.parametrize("name", GRADIENT_ESTIMATORS)


@BOTH
def test_the_value_is_the_code_and_the_code_gets_no_gradient(name):
    z_e, z_q = torch.randn(2, 5, 3).requires_grad_().unbind()
    z_e, z_q = z_e.detach().requires_grad_(), z_q.detach().requires_grad_()
    out = GRADIENT_ESTIMATORS[name](z_e, z_q)
    assert torch.allclose(out, z_q, atol=1e-5)
    out.square().sum().backward()
    assert z_e.grad.abs().min() > 0 and z_q.grad is None


def test_straight_through_passes_the_gradient_unchanged():
    z_e = torch.randn(5, 3, requires_grad=True)
    weights = torch.randn(5, 3)
    (straight_through(z_e, torch.randn(5, 3)) * weights).sum().backward()
    assert torch.equal(z_e.grad, weights)


def rotation_matrix(a, b):
    """The rotation of the plane of two unit vectors that takes a to b, (D, D), by Rodrigues."""
    generator = torch.outer(b, a) - torch.outer(a, b)
    return torch.eye(len(a), dtype=a.dtype) + generator + generator @ generator / (1 + a @ b)


@pytest.mark.parametrize("D", [2, 3, 7])
def test_the_rotation_is_that_of_an_explicit_matrix(D):
    z_e, z_q, gradient = torch.randn(3, 6, D, dtype=torch.float64)  # nearly opposite ones too
    z_e.requires_grad_()
    (rotation(z_e, z_q) * gradient).sum().backward()
    for i in range(6):
        z, e = z_e[i].detach(), z_q[i]
        R = rotation_matrix(F.normalize(z, dim=0), F.normalize(e, dim=0))
        assert torch.allclose(R @ R.T, torch.eye(D, dtype=R.dtype)) and torch.det(R) > 0
        scale = e.norm() / z.norm()
        assert torch.allclose(scale * R @ z, e)
        assert torch.allclose(z_e.grad[i], scale * R.T @ gradient[i])


def test_the_rotation_keeps_the_angle_between_gradient_and_vector():
    """The angle of g to the code becomes the angle of the encoder's gradient to the vector."""
    z_e, z_q, g = torch.randn(3, 20, 8, dtype=torch.float64)
    z_e.requires_grad_()
    (rotation(z_e, z_q) * g).sum().backward()
    cosine = F.cosine_similarity(z_e.grad, z_e.detach(), dim=1)
    assert torch.allclose(cosine, F.cosine_similarity(g, z_q, dim=1))


def test_the_rotation_of_vectors_without_a_direction_is_finite():
    """A zero vector, a zero code, and a code on the opposite side."""
    z_e = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 0.0]], requires_grad=True)
    z_q = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-2.0, 0.0]])
    out = rotation(z_e, z_q)
    assert torch.allclose(out, z_q)
    out.sum().backward()
    assert z_e.grad.isfinite().all()
