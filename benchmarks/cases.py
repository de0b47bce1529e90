"""What the benchmarks attack and train: networks with settled statistics, images without meaning, the lanes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from perceptual_at import Lane, Linf
from perceptual_at.models import resnet18, wide_resnet28_10, wide_resnet34_10

THREAT = Linf(8 / 255)
STEPS, STEP_SIZE = 10, 2 / 255
LANES = {
    "plain": None,
    "fp32 lane": Lane(),
    "bf16 lane": Lane(dtype=torch.bfloat16),
}
COMPILED = {
    "fp32 lane, compiled": Lane(compile=True),
    "bf16 lane, compiled": Lane(dtype=torch.bfloat16, compile=True),
}
WIDE = {"WRN-28-10": wide_resnet28_10, "WRN-34-10": wide_resnet34_10}


class Case(NamedTuple):
    """A network and a batch for it."""

    model: nn.Module
    x: Tensor
    labels: Tensor

    def of(self, batch: int) -> "Case":
        """The same with the first images only."""
        return Case(self.model, self.x[:batch], self.labels[:batch])


def case(
    batch: int,
    *,
    width: int = 64,
    classes: int = 10,
    side: int = 32,
    network: str = "ResNet-18",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """A network with the weights it starts from, in eval mode, and a batch of noise.

    The time of a pass depends on neither. Labels are the network's own predictions but for every tenth image, as for a
    model that has learned: what attacks and objectives leave out then is left out here too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WIDE[network](classes) if network in WIDE else resnet18(classes, width=width)
        x = torch.rand(batch, 3, side, side)
    model, x = settled(model.to(device), x.to(device)[:64]), x.to(device)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(dim=1) for part in x.split(64)])
    labels[::10] = (labels[::10] + 1) % classes
    return Case(model, x, labels)


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in eval mode, with the batch's statistics as its running ones."""
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.eval()
