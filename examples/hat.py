"""HAT: beyond the adversarial input the network should say what a standard-trained one says at it (Rade et al. 2022).

    python examples/hat.py --seed 0

The helper is trained first, for as many epochs, without attacks.
Measured (digits, Linf 0.15, 10 epochs, seed 0, CPU): clean 96.9, PGD-20 56.7, NRR 71.5 %.
"""

import copy
import functools

import common
import torch

from perceptual_at import Linf, objectives, pgd

ATTACK = functools.partial(pgd, threat=Linf(eps=0.15), steps=10)


def trained(model, batches, loss_of, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    for epoch in range(epochs):
        model.train()
        for x, labels in batches:
            loss, _ = loss_of(model, (x,), labels, ATTACK)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        yield epoch, loss


def train(model, batches, generator, epochs=10):
    helper = copy.deepcopy(model)
    for _ in trained(helper, batches, objectives.standard, epochs):
        pass
    hat = functools.partial(objectives.hat, helper=helper, generator=generator)
    for epoch, loss in trained(model, batches, hat, epochs):
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    common.main(train)
