"""Where an attack begins."""

from torch import Tensor

from perceptual_at._random import Generator
from perceptual_at.threats import Threat
from perceptual_at.threats import start as start_of


def random_start(function: str, threat: Threat, x: Tensor, generator: Generator | None, restart: int = 0) -> Tensor:
    """The threat's own random point; with numbers per sample, another one for each restart."""
    return start_of(function, threat, x, generator, restart=restart)
