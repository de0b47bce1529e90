"""TE: predictions are held to the average of a sample's earlier ones, under attack too (Dong et al. 2022).

    python examples/te.py --seed 0

The memory has a row per image, found by its number. The term begins after the first third.
Measured (digits, Linf 0.15, 10 epochs, seed 0, CPU): clean 91.4, PGD-20 55.6, NRR 69.1 %.
"""

import functools

import common
import torch

from perceptual_at import Linf, frozen, objectives, pgd
from perceptual_at.memories import ensemble_targets, ensemble_update
from perceptual_at.schedules import te_weight

ATTACK = functools.partial(pgd, threat=Linf(eps=0.15), steps=10)
PEAK, START, LENGTH = 30.0, 0.3, 0.3


def train(model, batches, generator, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    ensemble = torch.zeros(common.IMAGES, 10, device=next(model.parameters()).device)
    attack = functools.partial(ATTACK, generator=generator)
    for epoch in range(epochs):
        model.train()
        weight = te_weight(epoch / epochs, peak=PEAK, start=START, length=LENGTH)
        for x, labels, index in batches:
            targets = None
            if epoch >= START * epochs:
                with frozen(model) as f, torch.no_grad():
                    ensemble = ensemble_update(ensemble, index, f(x))
                targets = ensemble_targets(ensemble, index)
            loss, _ = objectives.te(model, (x,), labels, attack, targets=targets, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    common.main(train, numbered=True)
