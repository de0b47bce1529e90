"""TRADES: clean cross entropy plus the KL that the attack maximises (Zhang et al. 2019).

    python examples/trades.py --seed 0

The attack starts beside x, because the KL has no gradient at x itself.
Measured (digits, Linf 0.15, 10 epochs, seeds 0-2, CPU): clean 96.6 ± 0.4, PGD-20 65.2 ± 1.8, NRR 77.8 ± 1.3 %.
"""

import common
import torch

from perceptual_at import Linf, frozen, kl_to, pgd, trades_loss

THREAT = Linf(eps=0.15)
BETA = 6.0


def train_loss(model, x, labels, generator):
    with frozen(model) as f, torch.no_grad():
        attack_loss = kl_to(f(x))
    start = x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device)
    x_adv = pgd(model, x, labels, THREAT, steps=10, loss=attack_loss, start=start)
    clean, adv = model(x), model(x_adv)
    return trades_loss(clean, adv, labels, beta=BETA)


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
