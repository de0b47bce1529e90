"""The checks find five broken defences, each by name, and nothing in honest models."""

from functools import partial

import pytest
import torch
from torch import nn

from perceptual_at import L1, L2, Linf, evaluate, objectives, pgd, sanity_checks
from perceptual_at.data import digits
from perceptual_at.evaluation import checks, masking
from perceptual_at.models import DigitsCNN, Normalize, normalized

pytest.importorskip("sklearn")
THREAT = Linf(0.15)


def trained(objective, *, steps):
    torch.manual_seed(0)
    model, generator = DigitsCNN(width=8).train(), torch.Generator().manual_seed(0)
    attack = partial(pgd, threat=THREAT, steps=steps, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, labels = (part[:800] for part in digits("train"))
    for _ in range(3):
        for rows in torch.randperm(len(x), generator=generator).split(50):
            loss, _ = objective(model, (x[rows],), labels[rows], attack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def honest():
    return {
        "PGD-AT": trained(objectives.pgd_at, steps=3),
        "TRADES": trained(objectives.trades, steps=3),
        "standard": trained(lambda model, views, *rest: objectives.pgd_at(model, views, rest[0], lambda m, x, y: x),
                            steps=1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def data():
    x, labels = digits("test")
    return x[:80], labels[:80]


def failed(found):
    return {check.name: check for check in found if not check.passed}


# Honest models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PGD-AT", "TRADES", "standard"])
def test_an_honest_model_passes_every_check(honest, data, name):
    other = honest["TRADES" if name == "PGD-AT" else "PGD-AT"]
    found = sanity_checks(honest[name], *data, THREAT, steps=5, transfer_from=other)
    assert [check.name for check in found] == [
        "modes", "inputs", "normalization", "deterministic", "batches", "gradients",
        "more_steps", "restarts", "larger_eps", "whole_box", "black_box", "transfer",
    ]  # fmt: skip
    assert failed(found) == {}
    assert all((check.suggests, check.advice) == ("", "") for check in found)


@pytest.mark.parametrize("threat", [L2(0.8), L1(4.0)], ids=repr)
def test_an_honest_model_passes_in_other_norms(honest, data, threat):
    x, labels = data
    assert failed(sanity_checks(honest["PGD-AT"], x[:60], labels[:60], threat, steps=6)) == {}


# Broken defences ----------------------------------------------------------------------------------------------------


class ZeroedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0


class Around(nn.Module):
    """A defence around a model: something done to its inputs or logits."""

    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


class BatchStatistics(nn.Module):
    """Forgets to leave train mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.training = True
                part.momentum = 0.0
        return self

    def forward(self, x):
        return self.model(x)


BROKEN = {
    "zeroed gradient": lambda model: Around(model, before=ZeroedGradient.apply),
    "saturated softmax": lambda model: Around(model, after=lambda z: 1000 * z),
    "quantised input": lambda model: Around(model, before=lambda x: (4 * x).round() / 4),
    "random layer": lambda model: Around(model, before=noisy),
    "train-mode batch norm": BatchStatistics,
}
FOUND = {
    "zeroed gradient": {"gradients", "whole_box", "black_box", "transfer"},
    "saturated softmax": {"gradients"},
    "quantised input": {"gradients", "whole_box", "black_box", "transfer"},
    "random layer": {"deterministic", "batches"},
    "train-mode batch norm": {"modes", "batches"},
}
WORDS = {
    "gradients": "gradient masking", "whole_box": "gradient masking", "black_box": "gradient masking",
    "transfer": "gradient masking", "deterministic": "random layer", "modes": "batch norm in train mode",
    "batches": "batch norm in train mode",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defence_is_flagged_by_name(honest, data, name):
    torch.manual_seed(0)
    defence = BROKEN[name](honest["standard"]).eval()
    found = failed(sanity_checks(defence, *data, THREAT, steps=5, transfer_from=honest["standard"]))
    assert set(found) >= FOUND[name]
    for check in found.values():
        assert WORDS.get(check.name, "") in check.suggests
        assert check.advice
        assert f"{check.name} FAILED" in str(check)
    honest["standard"].eval()


def test_a_defence_without_any_gradient_is_flagged_too(honest, data):
    found = failed(sanity_checks(lambda x: honest["standard"](x.detach()), *data, THREAT, steps=4))
    assert set(found) >= FOUND["zeroed gradient"] - {"transfer"}


def test_evaluate_runs_the_checks_and_says_what_failed(honest, data):
    defence = BROKEN["zeroed gradient"](honest["standard"])
    attacks = {"pgd": partial(pgd, threat=THREAT, steps=5)}
    data = data[0][:60], data[1][:60]
    result = evaluate(defence, [data], attacks, progress=False, checks=True)
    assert result.robust_accuracy["pgd"] > 0.5  # what would have been published
    assert {"gradients", "black_box"} <= set(failed(result.checks))
    assert "- black_box FAILED: " in result.to_markdown()
    honest_result = evaluate(honest["PGD-AT"].train(), [data], attacks, progress=False, checks=True)
    assert failed(honest_result.checks) == {}  # evaluate puts it into eval mode itself
    assert honest["PGD-AT"].training
    honest["PGD-AT"].eval()


# Each check by itself -----------------------------------------------------------------------------------------------


def test_modes_of_parts_are_seen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).eval()
    assert checks.check_modes(model).passed
    model[1].train()
    check = checks.check_modes(model)
    assert (check.passed, check.value) == (False, 1.0)
    assert "1 of 4 modules in train mode or with statistics of the batch: 1" in check.found


def test_inputs_out_of_bounds_say_which_way(data):
    x, _ = data
    assert checks.check_inputs(x, THREAT).passed
    assert "normalised" in checks.check_inputs((x - 0.3) / 0.4, THREAT).suggests
    assert "[0, 16]" in checks.check_inputs(16 * x, THREAT).suggests
    assert not checks.check_inputs(x * torch.nan, THREAT).passed
    assert checks.check_inputs(2 * x - 1, Linf(0.1, bounds=(-1.0, 1.0))).passed


def test_double_normalisation_is_seen(data):
    x, _ = data
    once = normalized(DigitsCNN(width=4), mean=(0.3,), std=(0.4,))
    assert checks.check_normalization(once, x).passed
    for model, inputs in ((once, (x - 0.3) / 0.4), (nn.Sequential(Normalize((0.3,), (0.4,)), once), x)):
        check = checks.check_normalization(model, inputs)
        assert check.suggests == "double normalisation"
        assert check.value == 2.0


def test_checks_on_normalised_inputs_stop_before_the_attacks(honest, data):
    x, labels = data
    found = sanity_checks(honest["standard"], (x - 0.3) / 0.4, labels, THREAT)
    assert [check.name for check in found][-1] == "gradients"
    assert "inputs" in failed(found)


def test_rounding_is_no_randomness():
    x = torch.rand(5, 3)
    passes = iter([x, x * (1 + 1e-6)])
    assert checks.check_deterministic(lambda _: next(passes), x).passed
    passes = iter([x, x + 0.01])
    check = checks.check_deterministic(lambda _: next(passes), x)
    assert check.value == pytest.approx(0.01, rel=1e-4)


def test_the_order_of_a_batch_must_not_matter():
    def every_second_sees_the_one_before(x):
        return torch.cat([x[:1], *(x[i : i + 1] - (i % 2) * x[i - 1] for i in range(1, len(x)))])

    x = torch.rand(4, 3)  # parts of even length hide it
    assert not checks.check_batches(every_second_sees_the_one_before, x).passed


def test_the_comparison_of_attacks_fails_at_its_level_and_not_before():
    def of(only_weak, only_strong, level):
        n = only_weak + only_strong
        weak = torch.tensor([True] * only_weak + [False] * only_strong + [True, False])
        strong = torch.tensor([False] * only_weak + [True] * only_strong + [True, False])
        assert len(weak) == n + 2
        return masking.check_stronger("steps", strong, weak, level=level)

    assert of(0, 0, 0.01).value == 1.0
    assert of(0, 5, 0.01).passed
    assert of(6, 0, 1 / 64).passed
    assert not of(6, 0, 1 / 64 + 1e-9).passed
    assert of(9, 2, 0.05).value == (55 + 11 + 1) / 2048
    with pytest.raises(ValueError, match="check_stronger: `strong` must be a boolean mask"):
        masking.check_stronger("steps", torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_a_black_box_attack_of_ones_own_is_used(honest, data):
    calls = []

    def mine(model, x, labels):
        calls.append(len(x))
        return x

    x, labels = data
    found = sanity_checks(honest["standard"], x[:20], labels[:20], THREAT, steps=2, black_box=mine)
    assert calls == [int((honest["standard"](x[:20]).argmax(1) == labels[:20]).sum())]
    assert next(check for check in found if check.name == "black_box").value == 1.0


def test_vectors_and_threats_of_other_kinds_are_checked():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 3, generator=generator)
    x = torch.rand(40, 12, generator=generator)
    found = sanity_checks(lambda x: x @ weights, x, (x @ weights).argmax(1), Linf(0.1), steps=4)
    assert found[-1].name == "black_box"
    assert failed(found) == {}


def test_malformed_calls_are_refused():
    x, labels = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
    bad = {
        "`threat` must be a threat model": lambda: sanity_checks(nn.Linear(3, 2), x, labels, 8 / 255),
        "`x` holds no sample": lambda: sanity_checks(nn.Linear(3, 2), x[:0], labels[:0], THREAT),
        "`labels` must be integer": lambda: sanity_checks(nn.Linear(3, 2), x, labels[:2], THREAT),
        "`level`": lambda: sanity_checks(nn.Linear(3, 2), x, labels, THREAT, level=1.0),
        "`steps`": lambda: sanity_checks(nn.Linear(3, 2), x, labels, THREAT, steps=0),
    }
    for words, call in bad.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()
