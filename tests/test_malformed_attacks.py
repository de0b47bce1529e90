"""Attacks and `evaluate`, called wrongly in every way: an error or a documented result, never a silent number."""

import functools
import math

import pytest
import torch
from torch import nn

from perceptual_at import Linf, apgd, auto_attack, cw, evaluate, fab, fgsm, pgd, square
from tests.test_attack_contract import Net, classes_of, images

CALLS = {
    "pgd": functools.partial(pgd, steps=2),
    "fgsm": fgsm,
    "cw": functools.partial(cw, steps=2),
    "apgd": functools.partial(apgd, steps=2),
    "fab": functools.partial(fab, steps=2),
    "square": functools.partial(square, queries=2),
    "auto_attack": functools.partial(auto_attack, version=[("apgd-ce", {"steps": 2}), ("square", {"queries": 2})]),
}


def evaluated(model, x, labels, threat):
    attack = functools.partial(pgd, threat=threat, steps=2)
    return evaluate(model, [(x, labels)], {"pgd": attack}, progress=False)


class Gives(nn.Module):
    """Something else than logits."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, x):
        return self.change(self.net(x))


X, LABELS = images(), classes_of()
NOT_A_NUMBER = torch.where(torch.arange(6).reshape(-1, 1, 1, 1) == 2, float("nan"), X)

# What is changed, the error, and words it must have. `None` where `evaluate` finds nothing wrong with it.
WRONG = {
    "inputs that are no tensor": ({"x": X.tolist()}, TypeError, "must be a torch.Tensor|pairs|triples|tensors"),
    "integer inputs": ({"x": (X * 255).to(torch.uint8)}, TypeError, "must be a floating-point tensor.*x.float"),
    "normalised inputs": ({"x": X * 4 - 2}, ValueError, "must lie in the bounds"),
    "inputs in 255ths": ({"x": X * 255}, ValueError, "must lie in the bounds"),
    "NaN inputs": ({"x": NOT_A_NUMBER}, ValueError, "contains NaN"),
    "infinite inputs": ({"x": torch.where(NOT_A_NUMBER.isnan(), math.inf, X)}, ValueError, "NaN or infinite"),
    "inputs elsewhere": ({"x": X.to("meta")}, ValueError, "is on meta|on cpu"),
    "labels of another batch": ({"labels": LABELS[:5]}, ValueError, r"shape \(6,\)"),
    "labels in columns": ({"labels": LABELS[:, None]}, ValueError, r"shape \(6,\)"),
    "float labels": ({"labels": LABELS.double()}, TypeError, "integer class indices"),
    "labels out of range": ({"labels": LABELS + 5}, ValueError, r"must lie in \[0, 4\] for 5 classes"),
    "negative labels": ({"labels": LABELS - 5}, ValueError, r"must lie in \[0, 4\] for 5 classes"),
    "a threat model's class": ({"threat": Linf}, TypeError, "`threat` must be a threat model"),
    "a number for a threat": ({"threat": 0.1}, TypeError, "`threat` must be a threat model"),
    "no model": ({"model": "net"}, TypeError, "`model` must be callable"),
    "a model that returns a tuple": ({"model": Gives(lambda z: (z, z))}, TypeError, "ensor.*got tuple"),
    "a model that returns one class": ({"model": Gives(lambda z: z[:, :1])}, ValueError, "K >= 2 classes"),
    "a model that returns classes": (
        {"model": Gives(lambda z: z.argmax(dim=1))},
        (ValueError, TypeError),
        r"logits|model\(x\)",
    ),
    "a model that mixes the batch up": ({"model": Gives(lambda z: z[:-1])}, ValueError, r"\(6|shape"),
    "a model that cannot be differentiated": ({"model": Gives(lambda z: z.detach())}, ValueError, "has no gradient"),
}
# Not every function has to mind: Square asks for no gradient.
FINE = {("square", "a model that cannot be differentiated")}
CASES = [(name, wrong) for name in [*CALLS, "evaluate"] for wrong in WRONG if (name, wrong) not in FINE]


@pytest.mark.parametrize(("name", "wrong"), CASES)
def test_a_malformed_call_is_refused(name, wrong):
    change, error, message = WRONG[wrong]
    given = {"model": Net(), "x": X, "labels": LABELS, "threat": Linf(0.1), **change}
    with pytest.raises(error, match=message) as raised:
        CALLS.get(name, evaluated)(given["model"], given["x"], given["labels"], given["threat"])
    assert str(raised.value).startswith(("pgd: ", "evaluate: ") if name == "evaluate" else f"{name}: ")


def test_there_are_a_hundred_of_them():
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", ["pgd", "fgsm", "cw", "apgd", "fab", "square"])
def test_a_budget_of_zero_gives_back_the_inputs(name):
    assert torch.equal(CALLS[name](Net(), X, LABELS, Linf(0)), X)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "cw", "apgd", "fab", "square", "auto_attack"])
class TestWhatIsAllowed:
    def test_an_empty_batch_is_an_empty_result(self, name):
        assert CALLS[name](Net(), X[:0], LABELS[:0], Linf(0.1)).shape == (0, 3, 2, 2)

    def test_logits_with_nan_are_never_a_success(self, name):
        model = Gives(lambda z: z * float("nan"))
        found = CALLS[name](model, X, LABELS, Linf(0.1), verdict=True)
        assert not found.success.any()
        assert found.x_adv.isfinite().all()

    def test_probabilities_are_attacked_as_they_are(self, name):
        found = CALLS[name](Gives(lambda z: z.softmax(dim=1)), X, LABELS, Linf(0.1), verdict=True)
        model = Gives(lambda z: z).eval()
        assert torch.equal(found.success, model(found.x_adv).argmax(dim=1) != LABELS)
        if name == "auto_attack":
            assert any("probabilities" in warning for warning in found.warnings)
