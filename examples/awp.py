"""AWP: the step is taken where the weights are at their worst nearby (Wu et al. 2020).

    python examples/awp.py --seed 0

The adversarial inputs are those of the weights as they are; the loss is computed twice, here and at the moved weights.
Measured (digits, Linf 0.15, 10 epochs, seed 0, CPU): clean 88.6, PGD-20 54.7, NRR 67.7 %.
"""

import common
import torch
from torch.nn.functional import cross_entropy

from perceptual_at import Linf, pgd
from perceptual_at.weight_perturbation import ascend, restore

THREAT = Linf(eps=0.15)
GAMMA = 0.01


def train(model, batches, generator, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    for epoch in range(epochs):
        model.train()
        for x, labels in batches:
            x_adv = pgd(model, x, labels, THREAT, steps=10, generator=generator)
            moved = ascend(model, lambda: cross_entropy(model(x_adv), labels), size=GAMMA)  # noqa: B023
            loss = cross_entropy(model(x_adv), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            restore(model, moved, form="awp")
        schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    common.main(train)
