"""The quantizers by name, for `quantizer=` of an autoencoder and `--quantizer` of a script."""

import inspect
from collections.abc import Sequence
from typing import Any

from vqgan.finite_scalar import FSQ, FSQ_LEVELS, LFQ
from vqgan.quantizer import EMAVectorQuantizer, Quantizer, VectorQuantizer
from vqgan.residual import ResidualVQ
from vqgan.simvq import SimVQ

QUANTIZERS: dict[str, type[Quantizer]] = {
    "ema": EMAVectorQuantizer,  # a table that follows moving averages
    "gradient": VectorQuantizer,  # a table that a gradient moves
    "fsq": FSQ,  # each number is rounded to a few levels
    "lfq": LFQ,  # each number becomes its sign
    "simvq": SimVQ,  # a random table, moved as a whole by one matrix
    "residual": ResidualVQ,  # several codes for a vector, each for what the others left
}


# Further arguments of the quantizers, and the values that leave everything as usual.
DEFAULTS: dict[str, Any] = {
    "beta": 0.25,
    "data_init": True,
    "restart_dead_codes": True,
    "cosine": False,
    "gradient_estimator": "straight-through",
    "levels": None,
    "num_rounds": None,
}


def code_dimensions(
    kind: str, num_embeddings: int, embedding_dim: int, levels: Sequence[int] | None
) -> int:
    """D of a quantizer: as given, but of "fsq" and "lfq" it follows from the levels or from K."""
    if kind in ("fsq", "lfq"):
        return make_quantizer(kind, num_embeddings, embedding_dim, levels=levels).embedding_dim
    return embedding_dim


def make_quantizer(kind: str, num_embeddings: int, embedding_dim: int, **options: Any) -> Quantizer:
    """Build a quantizer of `QUANTIZERS`.

    Args:
        num_embeddings: K. Of "fsq" it selects the levels of `FSQ_LEVELS`, unless they are given.
        embedding_dim: D, which "fsq" and "lfq" do not take, because it follows from levels or K.
        options: further arguments of the quantizer. All of `DEFAULTS` may be given to any kind, if
            those that it does not have keep these values.

    Raises:
        ValueError: an unknown kind, an argument that it does not have, or a size that it does not
            take.
    """
    if kind not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, not {kind!r}")
    known = inspect.signature(QUANTIZERS[kind]).parameters
    for name, value in options.items():
        if name not in known and (name not in DEFAULTS or value != DEFAULTS[name]):
            raise ValueError(f"quantizer={kind} has no {name}: leave that out")
    if kind == "fsq" and options.get("levels") is None:
        if num_embeddings not in FSQ_LEVELS:
            sizes = ", ".join(map(str, FSQ_LEVELS))
            raise ValueError(f"num_embeddings={num_embeddings}: give one of {sizes}, or levels")
        options["levels"] = FSQ_LEVELS[num_embeddings]
    if kind == "residual" and options.get("num_rounds") is None:
        raise ValueError("quantizer=residual needs num_rounds=M, the codes of each position")
    options |= {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
    return QUANTIZERS[kind](**{name: options[name] for name in options if name in known})
