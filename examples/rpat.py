"""RPAT on PGD-AT: logits should move evenly from clean to adversarial (ICCV 2025).

    python examples/rpat.py --seed 0

The form "interpolation" is the released code's; Eq. 3 of the paper is form="quotient", 16 times as large here.
Measured (digits, Linf 0.15, 10 epochs, seeds 0-2, CPU): clean 90.0 ± 2.7, PGD-20 56.6 ± 2.6, NRR 69.5 ± 2.7 %.
"""

import common
import torch
from torch.nn.functional import cross_entropy

from perceptual_at import Linf, interpolate, pgd, robust_perception_loss

THREAT = Linf(eps=0.15)
WEIGHT, ALPHA = 1.0, 0.5


def train_loss(model, x, labels, generator):
    x_adv = pgd(model, x, labels, THREAT, steps=10, generator=generator)
    adv, mid, clean = model(x_adv), model(interpolate(x, x_adv, ALPHA)), model(x)
    evenness = robust_perception_loss(clean, mid, adv, alpha=ALPHA, form="interpolation")
    return cross_entropy(adv, labels) + WEIGHT * evenness


def train(model, batches, generator, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    for epoch in range(epochs):
        model.train()
        for x, labels in batches:
            loss = train_loss(model, x, labels, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    common.main(train)
