"""Every combination of terms, weight perturbation and averaging learns, and goes on after a kill to the last bit."""

import copy
import functools
import inspect
import io
import itertools

import pytest
import torch

from perceptual_at import Linf, draw_beta, ema_update, objectives, pgd, snapshot, swa_update, weight_perturbation
from perceptual_at.models import DigitsCNN, with_cosine_logits
from perceptual_at.objectives.combination import BASES


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


# Every base -----------------------------------------------------------------------------------------------------------

BASES_OF = [name for name in BASES if name not in ("rpat", "rpat_raat")]  # these have the term
OF_RAAT = ("dicar", "raat", "raat_plus_plus", "raat_sharp")
ONE_VIEW = ("te",)
EVERY = [
    (combination, base) for combination in ("rpat", "dicar", "both") for base in BASES_OF
    if combination == "rpat" or base not in (*OF_RAAT, *ONE_VIEW)
]  # fmt: skip


def needs(base, model, labels, views):
    """What a base needs beside the model."""
    average, other = snapshot(model), copy.deepcopy(model).eval()
    wanted = {
        "average": average, "mix": 0.7, "threat": Linf(0.05), "targets": torch.full((len(labels), 10), 0.1).double(),
        "helper": other, "standard_teacher": other, "robust_teacher": other, "teacher": copy.deepcopy(model),
        "table": torch.full((10, 10), 0.1).double(), "pairs": "attacked", "generator": torch.Generator().manual_seed(0),
        "steps": 2,
    }  # fmt: skip
    wanted |= {"mask": torch.ones(len(labels), dtype=torch.bool)} if base in OF_RAAT and base != "raat_sharp" else {}
    known = inspect.signature(getattr(objectives, base)).parameters
    if base == "mart" or "kappa" not in known:
        wanted.pop("steps")
    return {name: value for name, value in wanted.items() if name in known}


@pytest.mark.slow
@pytest.mark.parametrize("perturbed", [False, True], ids=["plain", "awp"])
@pytest.mark.parametrize(("combination", "base"), EVERY)
def test_both_terms_on_every_base_take_a_step_that_lowers_the_loss(combination, base, perturbed):
    torch.manual_seed(0)
    model = DigitsCNN(width=4, num_classes=20 if base == "ducat" else 10).double()
    if base == "hypersphere":
        model = with_cosine_logits(model)
    views = tuple(torch.rand(12, 1, 8, 8).double() for _ in range(2))
    views = views[:1] if combination == "rpat" and base in ONE_VIEW else views
    labels, own = torch.arange(12) % 10, needs(base, model, torch.arange(12), views)
    pgd_once = functools.partial(pgd, threat=Linf(0.05), steps=2, validate=False)
    attack = weight_perturbation.once(pgd_once, calls=2 if base == "raat_sharp" else 1)

    def loss_of():
        draws = {"generator": torch.Generator().manual_seed(1)} if "generator" in own else {}
        on = functools.partial(getattr(objectives, base), **own | draws)
        if combination in ("dicar", "both"):
            on = functools.partial(objectives.dicar, base=on, mix=0.7, mask=torch.ones(12, dtype=torch.bool))
        return (objectives.rpat if combination != "dicar" else apart)(model, views, labels, attack, base=on)[0]

    def apart(*arguments, base):
        return base(*arguments)

    model.train()
    before = loss_of().item()
    moved = weight_perturbation.ascend(model, loss_of, size=0.005) if perturbed else None
    loss = loss_of()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert gradient is None or gradient.isfinite().all()
            parameter.sub_(0 if gradient is None else 1e-4 * gradient)
    if moved is not None:
        weight_perturbation.restore(model, moved, form="awp")
    assert loss_of().item() < before
    averages = [ema_update(snapshot(model), model, decay=0.9), swa_update(snapshot(model), model, count=1)]
    assert all(value.isfinite().all() for average in averages for value in average.values())


@pytest.mark.parametrize("base", ["rpat", "rpat_raat"])
def test_a_term_is_not_added_twice(base):
    model, x, labels = DigitsCNN(width=2), torch.rand(4, 1, 8, 8), torch.arange(4)
    own = needs(base, model, labels, (x,))
    own |= {"mix": 0.5} if base == "rpat_raat" else {}
    with pytest.raises(ValueError, match=f"rpat: `base`='{base}' has the term 'robust_perception' already"):
        objectives.rpat(
            model, (x, x) if base == "rpat_raat" else (x,), labels, functools.partial(pgd, threat=Linf(0.05), steps=1),
            base=functools.partial(getattr(objectives, base), **own),
        )  # fmt: skip
