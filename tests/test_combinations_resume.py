"""Every combination of terms, weight perturbation and averaging learns, and goes on after a kill to the last bit."""

import functools
import io
import itertools

import pytest
import torch

from perceptual_at import Linf, draw_beta, ema_update, objectives, pgd, snapshot, swa_update, weight_perturbation
from perceptual_at.models import DigitsCNN


class Training:
    """A run whose whole state is in `state()`: weights, optimiser, average, random numbers, steps."""

    def __init__(self, combination, base, perturbed, averaging):
        torch.manual_seed(0)
        self.model = DigitsCNN(width=4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.generator = torch.Generator().manual_seed(0)
        self.average, self.done = snapshot(self.model), 0
        self.combination, self.base, self.perturbed, self.averaging = combination, base, perturbed, averaging

    def loss(self, views, labels, attack, mix):
        draws = {"generator": self.generator} if self.base in ("trades", "mart") else {}
        base = functools.partial(getattr(objectives, self.base), **draws)
        if self.combination == "both":
            base = functools.partial(objectives.dicar, base=base, mix=mix)
        if self.combination in ("rpat", "both"):
            return objectives.rpat(self.model, views, labels, attack, base=base)[0]
        return objectives.dicar(self.model, views, labels, attack, base=base, mix=mix)[0]

    def step(self):
        data = torch.Generator().manual_seed(self.done % 2)
        views = tuple(torch.rand(12, 1, 8, 8, generator=data) for _ in range(2))
        labels = torch.arange(12) % 10
        mix = draw_beta(fold="max", generator=self.generator)
        attack = functools.partial(pgd, threat=Linf(0.05), steps=2, generator=self.generator, validate=False)
        attack = weight_perturbation.once(attack)
        loss_of = functools.partial(self.loss, views, labels, attack, mix)
        self.model.train()
        moved = weight_perturbation.ascend(self.model, loss_of, size=0.005) if self.perturbed else None
        loss = loss_of()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if moved is not None:
            weight_perturbation.restore(self.model, moved, form="awp")
        if self.averaging == "ema":
            self.average = ema_update(self.average, self.model, decay=0.9)
        if self.averaging == "swa":
            self.average = swa_update(self.average, self.model, count=self.done)
        self.done += 1
        return loss.item()

    def state(self):
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
            "generator": self.generator.get_state(), "done": self.done,
        }  # fmt: skip

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.average, self.done = state["average"], state["done"]


COMBINATIONS = list(itertools.product(("rpat", "dicar", "both"), ("pgd_at", "trades", "mart", "consistency_at")))
AROUND = list(itertools.product((False, True), ("none", "ema", "swa")))


@pytest.mark.slow
@pytest.mark.parametrize(("combination", "base"), COMBINATIONS)
def test_a_combination_learns_and_goes_on_after_a_kill_to_the_last_bit(combination, base):
    # each pairing of weight perturbation and averaging with one of the combinations, and all of them with some
    perturbed, averaging = AROUND[COMBINATIONS.index((combination, base)) % len(AROUND)]
    run = Training(combination, base, perturbed, averaging)
    losses = [run.step() for _ in range(4)]
    saved = io.BytesIO()
    torch.save(run.state(), saved)
    losses += [run.step() for _ in range(8)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert min(losses[-4:]) < losses[0]
    again = Training(combination, base, perturbed, averaging)
    saved.seek(0)
    again.restore(torch.load(saved, weights_only=True))
    assert [again.step() for _ in range(8)] == losses[4:]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert all(torch.equal(value, again.average[name]) for name, value in run.average.items())
