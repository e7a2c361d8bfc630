"""Gradients through a step that has none: from a code back to the vector that chose it.

A quantizer replaces the vector z_e by its code z_q, and the choice has no derivative. Two rules say
what the encoder gets of the decoder's gradient g = dL/dz_q instead:

    straight-through    dL/dz_e = g                 van den Oord et al. 2017, arXiv 1711.00937, 3.2
    rotation            dL/dz_e = lambda R^T g      Fifty et al. 2024, arXiv 2410.06424, section 4

R turns the direction of z_e into that of z_q, and lambda = |z_q| / |z_e|, so lambda R z_e = z_q.
Both are constants for the gradient. Straight-through gives the same gradient to all vectors of a
code; the rotation turns it back with the vector, so that its angle to the vector is the angle that
g has to the code.

Both functions take the vectors and their codes, (N, D) float32, and have the value of the codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q, but the gradient of z_e: the decoder's gradient reaches the encoder.

    The detached difference is a constant for the gradient. What remains is z_e plus a constant,
    whose derivative with respect to z_e is one; nothing reaches the codes.
    """
    return z_e + (z_q - z_e).detach()


def rotation(z_e: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q, but the gradient of z_e, turned and scaled as z_e is to become z_q.

    With unit vectors a and b along z_e and z_q, and r along a + b, the rotation in their plane is

        R = I - 2 r r^T + 2 b a^T

    because I - 2 r r^T reflects a to -b, and the last term adds 2 b. Only products of vectors are
    computed, so no D x D matrix is built.
    """
    with torch.no_grad():
        a, b = F.normalize(z_e, dim=1), F.normalize(z_q, dim=1)
        r = F.normalize(a + b, dim=1)
        # The clamp keeps it finite for a vector of no length.
        scale = z_q.norm(dim=1, keepdim=True) / z_e.norm(dim=1, keepdim=True).clamp(min=1e-6)
    turned = z_e - 2 * r * _dot(r, z_e) + 2 * b * _dot(a, z_e)  # R z_e
    rotated = scale * turned
    return rotated + (z_q - rotated).detach()  # z_q exactly, also where z_e is zero


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Products of rows, (N, D) and (N, D) -> (N, 1)."""
    return (x * y).sum(dim=1, keepdim=True)


GRADIENT_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight-through": straight_through,
    "rotation": rotation,
}
