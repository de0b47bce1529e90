"""The checks find five broken defences, each by name, and nothing in honest models."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

from perceptual_at import L1, L2, Linf, auto_attack, evaluate, objectives, pgd
from perceptual_at import sanity_checks as all_checks
from perceptual_at._binomial import rare
from perceptual_at.data import digits
from perceptual_at.evaluation import checks, strength
from perceptual_at.models import DigitsCNN, Normalize, normalized
from perceptual_at.victims import inspection

pytest.importorskip("sklearn")
THREAT = Linf(0.15)
sanity_checks = partial(all_checks, queries=300)  # enough for what is broken here; see below for where it is not


def trained(objective, *, steps, seed=0):
    torch.manual_seed(seed)
    model, generator = DigitsCNN(width=8).train(), torch.Generator().manual_seed(seed)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PGD-AT", "TRADES", "standard"])
def test_an_honest_model_passes_every_check(honest, data, name):
    other = honest["TRADES" if name == "PGD-AT" else "PGD-AT"]
    found = sanity_checks(honest[name], *data, THREAT, steps=5, transfer_from=other)
    assert [check.name for check in found] == [
        "modes", "inputs", "normalization", "deterministic", "batches", "probabilities", "ties", "gradients",
        "more_steps", "restarts", "larger_eps", "losses", "whole_box", "black_box", "transfer",
    ]  # fmt: skip
    # Between cross entropy and margin there are points of accuracy on networks as small as these, on some machines
    # more than chance explains: the check that compares losses then says so, and is right.
    wrong = failed([check for check in found if check.name != "losses"])
    assert wrong == {}
    assert all((check.suggests, check.advice) == ("", "") for check in found if check.passed)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_defence_without_any_gradient_is_flagged_too(honest, data):
    found = failed(sanity_checks(lambda x: honest["standard"](x.detach()), *data, THREAT, steps=4))
    assert set(found) >= FOUND["zeroed gradient"] - {"transfer"}


@pytest.mark.slow
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


def test_an_export_is_in_no_mode_that_could_be_switched():
    model = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval(), (torch.rand(3, 2),)).module()
    assert model.training  # which is how they are made
    assert checks.check_modes(model).passed
    check = checks.check_modes(nn.Sequential(model, nn.Dropout()))
    assert check.value == 2.0
    assert "2 of 5 modules" in check.found  # the outer two
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not checks.check_modes(traced).passed


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
        return strength.check_stronger("steps", strong, weak, level=level)

    assert of(0, 0, 0.01).value == 1.0
    assert of(0, 5, 0.01).passed
    assert of(6, 0, 1 / 64).passed
    assert not of(6, 0, 1 / 64 + 1e-9).passed
    assert of(9, 2, 0.05).value == (55 + 11 + 1) / 2048
    with pytest.raises(ValueError, match="check_stronger: `strong` must be a boolean mask"):
        strength.check_stronger("steps", torch.zeros(3), torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("threat", [
    Linf(torch.tensor([0.1, 0.2, 0.0]).reshape(1, 3, 1), bounds=(-1, 1)),
    L2(torch.full((4,), 0.1), bounds=(-torch.ones(1, 3, 1), torch.ones(1, 3, 1))),
], ids=["budgets", "bounds"])  # fmt: skip
def test_square_takes_signals_whose_entries_have_budgets_and_bounds(threat):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(15, 2)), 2 * torch.rand(4, 3, 5) - 1
    found = all_checks(model, x, model(x).argmax(dim=1), threat, steps=1, queries=2)
    (own,) = (check for check in found if check.name == "black_box")
    assert "Square with 2 queries" in own.found


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


# Premises, significance, errors -------------------------------------------------------------------------------------


def linear(classes=3, entries=16, seed=0):
    weights = torch.randn(entries, classes, generator=torch.Generator().manual_seed(seed))
    return lambda x: x.flatten(1) @ weights


def images(model, n=60):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(dim=1)


class Patch:
    """Anything may happen in the upper half of the image, and nothing below."""

    eps = 1.0

    def project(self, x_adv, x):
        return torch.cat([x_adv[:, :, :2].clamp(0, 1), x[:, :, 2:]], dim=2)

    def steepest(self, grad):
        return grad.sign()

    def random_start(self, x, *, generator=None):
        return x

    def norm(self, delta):
        return delta.flatten(1).abs().amax(dim=1)

    def scaled(self, factor):
        return self


class Sphere(L2):
    """A user's own kind of ball."""


@pytest.mark.parametrize(
    "threat", [Patch(), Linf(torch.tensor([1.0, 0.0]).repeat(8).reshape(1, 1, 4, 4))], ids=["patch", "mask"]
)
def test_a_threat_that_cannot_reach_everything_is_no_masking(threat):
    model = linear()
    found = {check.name: check for check in sanity_checks(model, *images(model), threat, steps=3)}
    assert not found["whole_box"].applies
    assert str(found["whole_box"]) == "whole_box not run: no budget of this threat reaches every point of the box."
    assert failed(found.values()) == {}


@pytest.mark.slow
def test_a_subclass_and_a_threat_without_eps_end_nothing():
    class NoBudget(Patch):
        eps = property()  # reading it raises an AttributeError

    model = linear()
    for threat in (Sphere(0.5), NoBudget()):
        push = partial(pgd, threat=threat, steps=3, step_size=0.2)
        with torch.inference_mode():
            result = evaluate(model, [images(model)], {"pgd": push}, progress=False, checks=True)
        assert len(result.checks) > 7
        assert result.robust_accuracy["pgd"] < 1
    stopped = [check for check in result.checks if "ended with" in check.found]
    assert all(not check.passed for check in stopped)


def test_what_ends_a_check_is_its_result():
    def stumbles(model, x, labels):
        raise RuntimeError("no luck")

    model = linear()
    found = {
        check.name: check for check in sanity_checks(model, *images(model), Linf(0.1), steps=3, black_box=stumbles)
    }
    assert not found["black_box"].passed
    assert "the check ended with RuntimeError: no luck" in found["black_box"].found
    assert failed(found.values()).keys() == {"black_box"}


@pytest.mark.slow
def test_checks_never_end_an_evaluation():
    def model(x):
        if len(x) == 7:  # a third of the first batch
            raise RuntimeError("only some batch sizes")
        return linear()(x)

    x, labels = images(linear(), 20)
    result = evaluate(model, [(x, labels)], {"pgd": partial(pgd, threat=Linf(0.1))}, progress=False, checks=True)
    assert "only some batch sizes" in failed(result.checks)["batches"].found
    assert result.clean_accuracy == 1.0


def test_checks_do_not_change_what_is_measured():
    class Noisy(nn.Module):
        def forward(self, x):
            return linear()(x + 0.3 * torch.randn_like(x))

    data = images(linear())
    results = []
    attack = {"pgd": partial(pgd, threat=Linf(0.1), steps=2)}
    for checked in (False, True):
        torch.manual_seed(0)
        results.append(evaluate(Noisy(), [data, (data[0][:9], data[1][:9])], attack, progress=False, checks=checked))
    assert torch.equal(results[0].robust["pgd"], results[1].robust["pgd"])
    assert torch.equal(results[0].correct, results[1].correct)


def test_outputs_that_are_no_logits_and_labels_out_of_range_are_refused():
    model = linear()
    x, labels = images(model)
    calls = {
        "must return a tensor of logits, got dict": lambda: sanity_checks(
            lambda x: {"logits": model(x)}, x, labels, THREAT
        ),
        "must return a tensor of logits, got tuple": lambda: sanity_checks(lambda x: (model(x),), x, labels, THREAT),
        r"must lie in \[0, 2\] for 3 classes": lambda: sanity_checks(model, x, labels + 1, THREAT),
        "K >= 2": lambda: sanity_checks(lambda x: model(x)[:, :1], x, labels * 0, THREAT),
        "`labels` must be integer": lambda: sanity_checks(model, x, labels.float(), THREAT),
        "`model` must be callable": lambda: sanity_checks(None, x, labels, THREAT),
        "`black_box` must be a function": lambda: sanity_checks(nn.Flatten(), x, labels, THREAT, black_box="square"),
        "`black_box` cannot be called .* 'threat'": lambda: sanity_checks(
            nn.Flatten(), x, labels, THREAT, black_box=pgd
        ),
        "`queries` must be at least 1": lambda: all_checks(model, x, labels, THREAT, queries=0),
    }
    for words, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_dense_outputs_are_checked_without_attacks():
    x = torch.rand(20, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = sanity_checks(lambda x: 3 * x, x, x.argmax(dim=1), THREAT)
    assert [check.name for check in found][-2:] == ["gradients", "attacks"]
    assert not found[-1].applies
    assert failed(found) == {}


def test_single_samples_without_a_gradient_are_no_masking():
    def model(x):  # the first of a hundred has a gradient of zero
        return torch.where(x[:, :1] < 0.005, x.round(), x) @ torch.tensor([[1.0, -1.0], [-1.0, 1.0]])

    x = torch.linspace(0, 0.99, 100)[:, None].repeat(1, 2)
    x[:, 1] = 1 - x[:, 0]
    labels = model(x).argmax(dim=1)
    check = checks.check_gradients(model, x, labels, threat=Linf(0.6))
    assert (check.value, check.passed) == (0.01, True)


def test_where_logits_are_constant_there_is_nothing_to_follow():
    def model(x):  # dead below 0.5
        return torch.cat([1 - (x - 0.5).relu(), (x - 0.5).relu()], dim=1)

    x, labels = torch.full((50, 1), 0.2), torch.zeros(50, dtype=torch.long)
    assert checks.check_gradients(model, x, labels, threat=Linf(0.1)).value == 0.0
    assert checks.check_gradients(model, x, labels, threat=Linf(0.4)).value == 1.0


def test_ties_are_seen_in_coarse_logits():
    model = linear()
    x, _ = images(model)
    assert checks.check_ties(model, x).passed
    assert not checks.check_ties(lambda x: model(x) + 1e8, x).passed
    assert not checks.check_ties(lambda x: (model(x) / 9 + 30).bfloat16(), x).passed


def test_losses_that_differ_by_chance_or_little_pass():
    def of(both, only_entropy, only_margin, none):
        parts = ((both, True, True), (only_entropy, True, False), (only_margin, False, True), (none, False, False))
        entropy = torch.tensor([a for n, a, _ in parts for _ in range(n)])
        difference = torch.tensor([b for n, _, b in parts for _ in range(n)])
        return strength.check_losses(entropy, difference)

    assert of(50, 3, 5, 42).passed
    assert of(500, 0, 20, 480).passed  # two points
    assert not of(500, 1, 38, 461).passed
    assert "margin does better" in of(500, 1, 38, 461).advice
    assert of(500, 38, 1, 461).passed  # then the accuracy under the cross entropy is the smaller one


def test_outputs_with_nan_are_said_and_everything_else_is_of_the_other_samples():
    def above(x):
        return torch.cat([x, 0.5 - x], dim=1).where(x < 0.8, math.nan)

    x, labels = torch.tensor([[0.75], [0.375], [0.125], [0.9]]), torch.tensor([0, 0, 1, 0])
    undefined, *others = (
        one for one in sanity_checks(above, x, labels, Linf(torch.full((4,), 0.01)), steps=2, queries=5)
        if one.name not in ("modes", "inputs", "normalization")
    )  # fmt: skip
    assert str(undefined).startswith("outputs FAILED: the model gives NaN for 1 of 4 inputs. Suggests a division")
    assert {one.name for one in others} >= {"deterministic", "batches", "gradients", "more_steps", "black_box"}
    assert not failed(one for one in others if one.name in ("deterministic", "batches", "gradients"))
    found = sanity_checks(lambda x: x * math.nan, x.expand(4, 2), labels, Linf(0.01))
    assert [one.name for one in found if not one.passed] == ["outputs"]


def test_a_black_box_attack_that_returns_something_else_is_named_and_may_write_to_its_inputs():
    model, x, labels = nn.Flatten(), torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1])
    results = {}
    for name, attack in {"nothing": lambda *_: None, "in place": lambda model, x, labels: x.fill_(0.5)}.items():
        found = sanity_checks(model, x, labels, Linf(0.01), steps=2, black_box=attack)
        (results[name],) = (one for one in found if one.name == "black_box")
    assert "`black_box(model, x, labels)` must be a torch.Tensor, got NoneType" in results["nothing"].found
    assert "broke 0 of 2, an attack without gradients 1, 1 of them alone" in results["in place"].found


def test_a_few_samples_for_the_black_box_alone_are_no_masking():
    known = torch.arange(150) < 60
    assert strength.check_alone("black_box", known, torch.arange(150) > 146).passed
    assert not strength.check_alone("black_box", known, torch.arange(150) > 140).passed
    nothing = torch.zeros(150, dtype=torch.bool)
    assert not strength.check_alone("black_box", nothing, torch.arange(150) < 8).passed  # eight to none


def test_the_sentence_names_the_queries():
    model = linear()
    found = {check.name: check for check in all_checks(model, *images(model), Linf(0.1), steps=3, queries=77)}
    assert "Square with 77 queries" in found["black_box"].found


# AutoAttack's warnings ------------------------------------------------------------------------------------------------


def heard(model, x, labels, threat, version):
    return auto_attack(model, x, labels, threat, version=version, verdict=True).warnings


def test_auto_attack_says_nothing_of_single_samples():
    model = linear()
    x, labels = images(model, 150)

    def one_dead(z):  # the gradient of one sample in 150 is zero
        dead = (z.flatten(1) - x[0].flatten()).abs().amax(dim=1, keepdim=True) == 0
        return model(torch.where(dead[..., None, None], z.detach(), z))

    assert heard(one_dead, x, labels, Linf(0.02), ["apgd-ce"]) == ()
    (warning,) = [
        text
        for text in heard(lambda z: model(z.detach() + 0 * z), x, labels, Linf(0.02), ["apgd-ce"])
        if "cross" in text
    ]
    assert "is exactly zero for 150 of 150 samples although some point of the ball lowers their lead" in warning


def test_auto_attack_without_gradients_needs_none():
    x, labels = images(linear(), 12)
    found = auto_attack(
        lambda z: linear()(z.detach()), x, labels, Linf(0.05), version=[("square", {"queries": 20})], verdict=True
    )
    assert len(found) == 12


def test_square_is_said_with_its_queries_and_by_significance():
    sentence = inspection.square_alone(9, 150, 5000)
    assert "broke 9 of 150 samples with 5000 queries" in sentence
    assert inspection.square_alone(2, 150, 5000) == ""
    assert inspection.square_alone(12, 1000, 5000) == ""


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


# How often an honest model fails, exactly -----------------------------------------------------------------------------


def mask(*runs):
    """A mask of so many of each: `mask((3, True), (2, False))`."""
    return torch.tensor([value for count, value in runs for _ in range(count)], dtype=torch.bool)


def chance(n, fails, probability):
    """Chance of the counts at which a check fails, where each of `n` samples shows it with a probability."""
    return sum(math.comb(n, k) * probability**k * (1 - probability) ** (n - k) for k in range(n + 1) if fails(k))


@pytest.mark.parametrize("level", [0.05, 0.01, 1e-4])
@pytest.mark.parametrize("n", [20, 150, 256])
def test_attacks_of_one_strength_fail_no_more_often_than_the_level(n, level):
    def stronger(k):  # of n samples that one of the two breaks alone, k fall to the weaker
        return not strength.check_stronger("steps", mask((k, False), (n - k, True)), mask((k, True), (n - k, False)),
                                           level=level).passed  # fmt: skip

    def losses(k):
        return not strength.check_losses(mask((k, False), (n - k, True)), mask((k, True), (n - k, False)),
                                         level=level, least=0.0).passed  # fmt: skip

    for fails in (stronger, losses):
        assert chance(n, fails, Fraction(1, 2)) <= level
        assert fails(n)
        assert not fails(n // 2)


@pytest.mark.parametrize("level", [0.05, 0.01, 1e-4])
@pytest.mark.parametrize("n", [20, 150, 256])
def test_an_attack_that_adds_one_in_a_hundred_fails_no_more_often_than_the_level(n, level):
    half = n // 2
    known = mask((half, True), (n - half, False))

    def alone(k):  # of n samples, half are known and k others fall to the other attack alone
        other = mask((half, False), (min(k, n - half), True), (n - half - min(k, n - half), False))
        return not strength.check_alone("black_box", known, other, level=level).passed

    assert chance(n, alone, Fraction(1, 100)) <= level
    assert alone(half)
    assert not alone(n // 100)


@pytest.mark.parametrize("level", [0.01, 1e-4])
def test_warnings_of_gradients_and_ties_hold_their_level(level):
    for n in (1, 40, 150):
        assert chance(n, lambda k, n=n: rare(k, n, level=level), Fraction(1, 100)) <= level


# Masked and honest networks with the right answer known ---------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Changes nothing; its gradient is random, or none."""

    @staticmethod
    def forward(ctx, x, noise):
        ctx.noise = noise
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.randn_like(grad) * ctx.noise, None


def hidden_behind(what):
    """A linear model whose robustness is known, behind something that misleads attacks."""
    inner = linear(entries=16)
    return {
        "zeroed gradient": lambda x: inner(Straight.apply(x, 0.0)),
        "random gradient": lambda x: inner(Straight.apply(x, 1.0)),
        "quantised input": lambda x: inner((4 * x).round() / 4),
        "finely quantised input": lambda x: inner((64 * x).round() / 64),
        "quantised logits": lambda x: inner(x).round(decimals=1),
        "coarse logits": lambda x: inner(x).round(),
        "large logits": lambda x: 1000 * inner(x),
        "larger logits": lambda x: 1e6 * inner(x),
        "confident logits": lambda x: inner(x) + 300 * nn.functional.one_hot(inner(x).argmax(dim=1), 3),
        "shattered gradient": lambda x: inner(x + 0.05 * torch.sin(400 * x)),
        "probabilities": lambda x: inner(x).softmax(dim=1),
        "sharp probabilities": lambda x: (20 * inner(x)).softmax(dim=1),
        "saturated units": lambda x: torch.tanh(30 * inner(x)),
        "shifted logits": lambda x: inner(x) + 1e8,
        "clamped logits": lambda x: inner(x).clamp(-0.3, 0.3),
        "votes": lambda x: nn.functional.one_hot(inner(x).argmax(dim=1), 3).float(),
        "undefined gradient": lambda x: inner(x + 0 * (x - x.detach()).abs().sqrt()),
        "misleading branch": lambda x: inner(x.detach()) - 0.05 * inner(x),
        "steps": lambda x: inner((x - 0.5).sign()),
        "noise": lambda x: inner(x + 0.2 * torch.randn_like(x)),
        "statistics of the batch": lambda x: inner(x - x.mean(dim=0)),
    }[what]


EXPECTED = {
    "zeroed gradient": {"gradients", "whole_box", "black_box"},
    "random gradient": {"black_box"},
    "quantised input": {"gradients", "whole_box", "black_box"},
    "finely quantised input": {"gradients", "whole_box", "black_box"},
    "quantised logits": {"gradients", "whole_box", "black_box"},
    "coarse logits": {"gradients"},
    "large logits": {"gradients", "losses"},
    "larger logits": {"gradients", "losses"},
    "confident logits": {"gradients", "losses"},
    "shattered gradient": {"black_box"},
    "probabilities": {"probabilities"},
    "sharp probabilities": {"probabilities"},
    "saturated units": {"ties"},
    "shifted logits": {"ties"},
    "clamped logits": {"gradients", "ties"},
    "votes": {"probabilities", "gradients", "black_box"},
    "undefined gradient": {"gradients", "black_box"},
    "misleading branch": {"whole_box", "black_box"},
    "steps": {"gradients", "black_box"},
    "noise": {"deterministic"},
    "statistics of the batch": {"batches"},
}


@pytest.mark.parametrize("what", EXPECTED)
def test_a_masked_network_is_found_at_a_level_no_honest_one_reaches(what):
    model, (x, _) = hidden_behind(what), images(linear(), 80)
    torch.manual_seed(0)
    found = all_checks(model, x, model(x).argmax(dim=1), Linf(0.2), steps=3, queries=80, level=1e-4)
    assert EXPECTED[what] <= failed(found).keys()


@pytest.mark.parametrize(
    ("seed", "threat"),
    [
        pytest.param(
            seed, threat, marks=[] if (seed, threat.p) == (0, math.inf) else pytest.mark.slow, id=f"{seed}-{threat}"
        )
        for seed in range(4)
        for threat in (Linf(0.15), L2(0.3), L1(0.8))
    ],
)
def test_a_linear_model_fails_nothing_because_its_attacks_are_exact(seed, threat):
    # Gradients lead to the nearest mistake, so nothing that they leave can fall to another attack, whatever the seed.
    model = linear(classes=2, seed=seed)
    x, labels = images(model, 100)
    found = all_checks(model, x, labels, threat, steps=20, queries=100, transfer_from=linear(classes=2, seed=seed + 50))
    assert failed(found) == {}


def test_samples_that_nothing_in_the_ball_moves_are_not_called_masked():
    # Units that are shut all over the ball: no gradient, and certainly robust.
    def model(x):
        units = (x.flatten(1) - 0.6).relu().sum(dim=1, keepdim=True)
        return torch.cat([0.1 - units, units], dim=1)

    x = torch.full((80, 1, 4, 4), 0.3)
    labels = model(x).argmax(dim=1)
    assert int((inspection.gradient_sizes(model, x, labels) == 0).sum()) == 80
    found = {check.name: check for check in all_checks(model, x, labels, Linf(0.2), steps=20, queries=50)}
    assert failed(found.values()) == {}
    assert heard(model, x, labels, Linf(0.2), ["apgd-ce"]) == ()
    assert not checks.check_gradients(model, x, labels, threat=Linf(0.4)).passed  # where some corner moves them


def test_samples_that_only_become_surer_in_the_ball_are_not_called_masked():
    def model(x):  # flat up to 0.4, and in favour of class 0 beyond; 1 is the same the other way round
        units = (x.flatten(1) - 0.4).relu().sum(dim=1, keepdim=True)
        return torch.cat([0.1 + units, torch.zeros_like(units)], dim=1)

    x = torch.full((80, 1, 4, 4), 0.3)
    favoured = torch.zeros(80, dtype=torch.long)
    assert checks.check_gradients(model, x, favoured, threat=Linf(0.2)).value == 0
    assert checks.check_gradients(lambda x: -model(x), x, favoured, threat=Linf(0.2)).value == 1
    assert checks.check_gradients(model, x, favoured).value == 1  # no ball to look into


@pytest.mark.parametrize("pattern", ["brightness", "rows", "columns"])
def test_what_only_a_pattern_moves_is_not_constant(pattern):
    weights = torch.ones(4, 4)
    if pattern == "rows":
        weights = weights * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    if pattern == "columns":
        weights = weights * torch.tensor([1.0, -1.0, 1.0, -1.0])

    def stairs(x):  # moves by a whole step where all entries work together, and hardly ever by chance
        height = ((x - 0.5) * weights).sum(dim=(1, 2, 3))[:, None] / 1.4
        return torch.cat([0.5 - height.round(), height.round()], dim=1)

    x = torch.full((40, 1, 4, 4), 0.5)
    labels = torch.zeros(40, dtype=torch.long)
    assert int(inspection.nothing_to_gain(stairs, x, labels, Linf(0.1)).sum()) < 8
    assert inspection.nothing_to_gain(stairs, x, labels, Linf(0.01)).all()


@pytest.mark.slow
def test_trained_networks_of_several_seeds_are_honest_at_a_level_that_masked_ones_fail(data):
    # Of 3 networks and 8 checks with a chance of at most 1e-4 each, one fails by luck in 400 runs at most. That the
    # cross entropy is weaker than the margin on some, TRADES above all, is no luck; `losses` says so, and is left out.
    level = 1e-4
    for seed in range(3):
        torch.manual_seed(seed)
        model = trained(objectives.pgd_at, steps=3, seed=seed)
        found = sanity_checks(model, *data, THREAT, steps=5, level=level)
        assert failed([check for check in found if check.name != "losses"]) == {}
        masked = Around(model, before=lambda x: (16 * x).round() / 16).eval()
        assert {"gradients", "black_box"} <= failed(sanity_checks(masked, *data, THREAT, steps=5, level=level)).keys()


@pytest.mark.parametrize("what", ["constant logits", "one class"])
def test_a_model_of_one_class_is_no_masking(what):
    def model(x):
        height = 0 * x.flatten(1)[:, :1] if what == "constant logits" else x.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([2 + height, height, height - 1], dim=1)

    x, _ = images(linear(), 100)
    found = {
        check.name: check for check in all_checks(model, x, model(x).argmax(dim=1), Linf(0.2), steps=3, queries=20)
    }
    assert failed(found.values()) == {}
    assert not found["whole_box"].applies


def test_inputs_around_zero_are_not_normalised_where_the_box_says_so():
    model = normalized(nn.Flatten(), mean=(0.1,), std=(0.4,))
    x = 2 * images(linear())[0] - 1
    assert not checks.check_normalization(model, x).passed
    assert checks.check_normalization(model, x, threat=Linf(0.1, bounds=(-1.0, 1.0))).passed
    assert not checks.check_normalization(model, 2 * x, threat=Linf(0.1, bounds=(-1.0, 1.0))).passed
