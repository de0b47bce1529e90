"""Free-AT: one gradient moves the weights and the perturbation, several times per batch (Shafahi et al. 2019).

    python examples/free_at.py --seed 0

The perturbation lives on from batch to batch. A batch takes four forward and backward passes, one a replay and step,
where PGD-AT takes eleven: no attack is paid for. As all single-step training it can overfit catastrophically.
"""

import common
import torch
from torch.nn.functional import cross_entropy

from perceptual_at import Linf

THREAT = Linf(eps=0.15)
REPLAYS = 4


def train(model, batches, generator, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    delta = None  # part of the state of a run, as the weights are
    for epoch in range(epochs):
        model.train()
        for x, labels in batches:
            delta = torch.zeros_like(x) if delta is None else delta
            for _ in range(REPLAYS):
                rows = delta[: len(x)]  # what a short last batch does not use stays as it is
                x_adv = THREAT.project(x + rows, x).requires_grad_()
                loss = cross_entropy(model(x_adv), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                moved = x_adv.detach() + THREAT.eps * THREAT.steepest(x_adv.grad)
                rows.copy_(THREAT.project(moved, x) - x)
        schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    common.main(train)
