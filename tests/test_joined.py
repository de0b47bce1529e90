"""What belongs to samples beside their image, and losses that belong to a batch, when samples leave."""

import functools

import pytest
import torch
from torch import nn

from perceptual_at import Linf, SampleGenerator, apgd, auto_attack, evaluate, fab, kl_to, pgd, square
from perceptual_at.models import from_joined, joined
from tests.strategies import generator

X, SIDE = torch.rand(12, 1, 4, 4, generator=generator(0)), torch.rand(12, 3, generator=generator(1)) * 9


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(19, 5)

    def forward(self, image, side):
        assert image.shape[1:] == (1, 4, 4)
        return self.layer(torch.cat([image.flatten(1), side], dim=1))


MODEL = from_joined(Both(), (1, 4, 4), (3,))
TOGETHER = joined(X, SIDE)
LABELS = torch.where(torch.arange(12) < 4, 0, MODEL(TOGETHER).argmax(dim=1))
THREAT = Linf(
    joined(torch.full((1, 1, 4, 4), 0.1), torch.zeros(1, 3)),
    bounds=(0.0, joined(torch.ones(1, 1, 4, 4), torch.full((1, 3), 9.0))),
)
ATTACKS = {
    "pgd": functools.partial(pgd, steps=4, keep="best", early_stop=True),
    "apgd": functools.partial(apgd, steps=4),
    "fab": functools.partial(fab, steps=4),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_side_inputs_go_with_their_samples_and_stay_as_they_are(attack):
    found = attack(MODEL, TOGETHER, LABELS, THREAT, verdict=True)
    assert torch.equal(found.x_adv[:, 16:], SIDE)
    assert torch.equal(MODEL(found.x_adv).argmax(dim=1) != LABELS, found.success)
    batches = list(zip(TOGETHER.split(5), LABELS.split(5), strict=True))
    result = evaluate(MODEL, batches, {"a": functools.partial(attack, threat=THREAT)}, progress=False)
    assert result.robust_accuracy["a"] <= result.clean_accuracy


def test_joined_inputs_come_apart_again():
    assert joined(X, SIDE).shape == (12, 19)
    assert torch.equal(MODEL(TOGETHER), MODEL.model(X, SIDE))
    assert joined(X[:0], SIDE[:0]).shape == (0, 19)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: joined(), ValueError, "joined: `inputs`"),
        (lambda: joined(X, SIDE[:3]), ValueError, r"joined: `inputs\[1\]`.*12 samples"),
        (lambda: joined(X, SIDE.double()), ValueError, r"joined: `inputs\[1\]`.*float32"),
        (lambda: joined(X, SIDE.long()), TypeError, r"joined: `inputs\[1\]`"),
        (lambda: from_joined(Both()), ValueError, "from_joined: `shapes`"),
        (lambda: from_joined(Both(), 3), TypeError, r"from_joined: `shapes\[0\]`"),
        (lambda: from_joined(Both(), (0,)), ValueError, r"from_joined: `shapes\[0\]`"),
        (lambda: from_joined(len, (3,)), TypeError, "from_joined: `model`"),
        (lambda: MODEL(TOGETHER[:, 1:]), ValueError, r"from_joined: `x`.*\(B, 19\)"),
    ],
)
def test_malformed_calls_are_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_closures_over_a_batch_are_told_where_it_can_go():
    net = Both()
    closure = functools.partial(lambda side, x: net(x, side), SIDE)
    with pytest.raises(ValueError, match=r"^apgd: `model` fails for the \d of 12 samples .*models[.]from_joined"):
        apgd(closure, X, LABELS, Linf(0.1), steps=3)

    def loss(logits, labels):
        return (logits - SIDE[:, :1]).square().sum(dim=1)

    with pytest.raises(ValueError, match=r"^apgd: `loss` fails for the \d of 12 samples .*`select\(rows\)`"):
        apgd(MODEL, TOGETHER, LABELS, THREAT, steps=3, loss=loss)


class Weighted:
    """The distance of one logit from a number of each sample's own; says which rows it is called with."""

    def __init__(self, targets, seen):
        self.targets, self.seen = targets, seen

    def __call__(self, logits, labels):
        self.seen.append(self.targets)
        return (logits[:, 0] - self.targets).square()

    def select(self, rows):
        return Weighted(self.targets[rows], self.seen)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))


def by_loss(loss):
    return {
        "pgd": functools.partial(pgd, steps=4, keep="best", early_stop=True, loss=loss),
        "apgd": functools.partial(apgd, steps=4, loss=loss),
        "square": functools.partial(square, queries=6, loss=loss),
        "auto_attack": functools.partial(auto_attack, version=[("apgd-ce", {"steps": 4, "loss": loss})], batch_size=3),
    }


@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "auto_attack"])
def test_a_loss_of_all_data_goes_with_the_samples(name):
    model, loss = net(), kl_to(net()(X).detach().roll(1, 0))
    labels = torch.where(torch.arange(12) < 4, 0, model(X).argmax(dim=1))
    index = torch.arange(12)
    whole = by_loss(loss)[name](model, X, labels, Linf(0.2), verdict=True, generator=SampleGenerator(0, index))
    parts = []
    for rows in index.split(5):
        part = by_loss(loss.select(rows))[name]
        parts.append(part(model, X[rows], labels[rows], Linf(0.2), generator=SampleGenerator(0, rows)))
    torch.testing.assert_close(torch.cat(parts), whole.x_adv, rtol=0, atol=1e-5)
    batches = list(zip(X.split(5), labels.split(5), strict=True))
    seen = []
    numbers = torch.arange(12.0)
    attack = functools.partial(by_loss(Weighted(numbers, seen))[name], threat=Linf(0.2))
    evaluate(model, batches, {"a": attack}, progress=False)
    attacked = torch.cat(seen).unique()
    assert torch.equal(attacked, numbers[model(X).argmax(dim=1) == labels])


def test_a_loss_with_too_few_rows_is_refused_by_name():
    model, labels = net(), net()(X).argmax(dim=1)
    attack = functools.partial(pgd, threat=Linf(0.1), loss=kl_to(net()(X[:5]).detach()))
    with pytest.raises(ValueError, match=r"^evaluate: `loss` of attack 'a' has one entry per sample"):
        evaluate(model, [(X, labels)], {"a": attack}, progress=False)
