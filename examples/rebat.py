"""ReBAT: the prediction under attack should stay with the averaged model's (Wang et al. 2023).

    python examples/rebat.py --seed 0

The term and the averaging begin after the first half, where the paper's learning rate first falls.
Measured (digits, Linf 0.15, 10 epochs, seeds 0-2, CPU): clean 89.0 ± 3.0, PGD-20 55.6 ± 1.1, NRR 68.5 ± 1.7 %.
"""

import common
import torch
from torch.nn.functional import cross_entropy

from perceptual_at import Linf, call_with, ema_update, frozen, kl_divergence, pgd, snapshot

THREAT = Linf(eps=0.15)
BETA, DECAY, START = 1.0, 0.98, 0.5


def train_loss(model, x, labels, generator, average):
    x_adv = pgd(model, x, labels, THREAT, steps=10, generator=generator)
    adv = model(x_adv)
    if average is None:
        return cross_entropy(adv, labels)
    with frozen(model) as f, torch.no_grad():
        teacher = call_with(f, average, x_adv)
    return cross_entropy(adv, labels) + BETA * kl_divergence(teacher, adv).mean()


def train(model, batches, generator, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    average = snapshot(model)
    for epoch in range(epochs):
        model.train()
        for x, labels in batches:
            loss = train_loss(model, x, labels, generator, average if epoch >= START * epochs else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average = ema_update(average, model, decay=DECAY if epoch >= START * epochs else 0.0)
        schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return common.with_weights(model, average)


if __name__ == "__main__":
    common.main(train)
