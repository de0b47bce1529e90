"""Where an attack begins."""

import torch
from torch import Tensor

from perceptual_at import _random
from perceptual_at._shapes import per_sample, rows
from perceptual_at.threats import L1, L2, Linf, Threat, budgets


def random_start(
    function: str, threat: Threat, x: Tensor, generator: _random.Generator | None, restart: int = 0
) -> Tensor:
    """The threat's own random point; with numbers per sample, another one for each restart."""
    if not isinstance(generator, _random.SampleGenerator):
        return threat.random_start(x, generator=generator)
    generator = _random.checked(function, generator, x).fork(restart)
    if isinstance(threat, Linf | L2 | L1):
        return threat.random_start(x, generator=generator)
    # A threat of the user's own draws from torch's generators: one for each sample.
    seeds = generator.bits((len(generator),)).tolist()
    starts = [
        threat.random_start(x[i : i + 1], generator=torch.Generator(x.device).manual_seed(seed))
        for i, seed in enumerate(seeds)
    ]
    return torch.cat(starts)


def far_start(threat: Threat, x: Tensor, generator: _random.SampleGenerator) -> Tensor:
    """APGD's random point: noise scaled to the whole budget, and for L1 a sparse one, its projection."""
    if not isinstance(threat, Linf | L2 | L1):
        return random_start("apgd", threat, x, generator)
    shape = tuple(x.shape)
    if isinstance(threat, L1):
        return threat.project(x + generator.normal(shape, dtype=x.dtype), x)
    if isinstance(threat, Linf):
        noise = 2 * generator.uniform(shape, dtype=x.dtype) - 1
        noise = noise / per_sample(rows(noise).abs().amax(dim=1).clamp_min(1e-12), noise)
    else:
        noise = threat.steepest(generator.normal(shape, dtype=x.dtype))
    return threat.project(x + per_sample(budgets("apgd", threat, x), x) * noise, x)
