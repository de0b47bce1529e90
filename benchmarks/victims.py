"""Networks for evaluations: trained so far that some images resist and some do not."""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from cases import case, settled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from perceptual_at import Linf, accuracy, pgd
from perceptual_at.data import digits
from perceptual_at.models import resnet18

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.robust_model import robust_digits


class Victim(NamedTuple):
    """A network, images to attack it with, and the set to look in."""

    name: str
    model: nn.Module
    x: Tensor
    labels: Tensor
    threat: Linf

    def of(self, images: int) -> "Victim":
        """The same with the first images only."""
        return self._replace(x=self.x[:images], labels=self.labels[:images])


def untrained(images: int, device: torch.device | str = "cpu") -> Victim:
    """A tiny network with the weights it starts from, for miniatures."""
    return Victim("ResNet-18, width 2, untrained", *case(images, width=2, side=8, device=device), Linf(1e-4))


def small(device: torch.device | str = "cpu") -> Victim:
    """DigitsCNN of width 8 after eight epochs of PGD-AT on 8 x 8 digits: about 70 % robust."""
    model, x, labels = robust_digits()
    model = copy.deepcopy(model).requires_grad_(True)  # as in a model just loaded
    return Victim("DigitsCNN, width 8", model.to(device), x.to(device), labels.to(device), Linf(0.15))


def resnet(width: int, images: int, *, device: torch.device | str = "cpu", seed: int = 0, steps: int = 40) -> Victim:
    """ResNet-18 on digits enlarged to 3 x 32 x 32, after a few dozen steps of SGD.

    It resists little, so the budget is made for it: the largest of a row, each 0.8 times the one before, at which
    PGD-10 leaves at least two thirds of the images. Weights require gradients, as in a model just loaded.
    """
    (x, labels), (x_test, labels_test) = (enlarged(split, seed, device) for split in ("train", "test"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = settled(resnet18(width=width).to(device), x[:64]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for rows in torch.arange(32 * steps).remainder(len(x)).split(32):
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    settled(model, x[:128])  # the running statistics of so few steps lag behind
    victim = Victim(f"ResNet-18, width {width}", model, x_test[:images], labels_test[:images], Linf(0.1))
    while robust(victim) < 2 / 3 and victim.threat.eps > 1e-3:
        victim = victim._replace(threat=Linf(round(0.8 * victim.threat.eps, 6)))
    return victim


def robust(victim: Victim) -> float:
    """Share of images that withstand PGD-10."""
    x_adv = pgd(victim.model, victim.x, victim.labels, victim.threat, steps=10, start="clean")
    with torch.no_grad():
        return float(accuracy(victim.model(x_adv), victim.labels))


def enlarged(split: str, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The digits in the size of CIFAR-10."""
    x, labels = digits(split, seed=seed)
    return interpolate(x, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous().to(device), labels.to(device)
