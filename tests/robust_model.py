"""A small robust model of handwritten digits, trained once per process: something for attacks to compare on."""

import functools

import torch

from perceptual_at import Linf, pgd
from perceptual_at.data import digits
from perceptual_at.divergences import cross_entropy
from perceptual_at.models import DigitsCNN

EPOCHS = 8


@functools.lru_cache(maxsize=8)
def robust_digits(classes=10, seed=0):
    """`(model, x_test, labels_test)`: PGD-AT in Linf(0.15) on the first `classes` digits, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsCNN(width=8, num_classes=classes)
    generator = torch.Generator().manual_seed(seed)
    (x, labels), (x_test, labels_test) = (first(classes, *digits(split)) for split in ("train", "test"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - epoch / EPOCHS)
        for batch in torch.randperm(len(x), generator=generator).split(64):
            x_adv = pgd(model, x[batch], labels[batch], Linf(0.15), steps=3, step_size=0.08, generator=generator)
            loss = cross_entropy(model.train()(x_adv), labels[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False), x_test, labels_test


def first(classes, x, labels):
    """The images of the first few classes."""
    keep = labels < classes
    return x[keep], labels[keep]
