"""Regularisers on any objective: the sum they stand for, the passes they take, and what they leave to the base."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import (
    Linf,
    dicar_loss,
    interpolate,
    objectives,
    pgd,
    robust_perception_loss,
    snapshot,
)
from perceptual_at.objectives.combination import BASES
from tests.needs import needs
from tests.test_objectives import SmallNet, averaged, fixed_attack, problem

MIX = 0.7
MATTER_OF_TASTE = {"preset", "standard", "random_noise", "mma"}
"""No objective, or one without adversarial inputs of every sample."""
ELSEWHERE = ("raat_sharp", "rpat_raat", "grad_align", "ducat", "te")
"""Bases with two attacks, terms of these already, two outputs per class or one view, which have tests of their own."""


def needed(name, model):
    """What an objective cannot do without."""
    options = {}
    if name in ("raat", "raat_plus_plus", "raat_sharp", "dicar", "rpat_raat"):
        options["mix"] = MIX
    if name == "lbgat":
        options["teacher"] = SmallNet(seed=1).eval()
    if name == "ikl":
        options["table"] = None
    if name == "clp":
        options["pairs"] = "attacked"
    if name == "grad_align":
        options |= {"threat": Linf(0.1), "generator": torch.Generator()}
    if name in ("rebat", "rpat_plus_plus", "raat_sharp"):
        options["average"] = averaged(model)
    options |= needs(name, model, torch.zeros(24, 1, dtype=torch.float64), 3, steps=2, teacher=SmallNet(seed=5))
    if name == "gairat":
        options["kappa"] = torch.arange(24) % 3  # an answer that is given has no steps to count
    return options


def attack_once(model, views, labels):
    """One answer for all views, from a real attack; the same for each call."""
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2, validate=False)
    given = {}

    def answer(m, x, y, **options):
        if x.shape[0] not in given:
            given[x.shape[0], len(given)] = attack(
                m, x, y, generator=torch.Generator().manual_seed(x.shape[0]), **options
            )
        return next(value for (rows, _), value in given.items() if rows == x.shape[0])

    return answer


def evenness(model, x, x_adv, alpha=0.5):
    logits = (model(x), model(interpolate(x, x_adv, alpha)), model(x_adv))
    return robust_perception_loss(*logits, alpha=alpha, form="interpolation")


def alignment(model, x, x_adv, labels):
    with torch.no_grad():
        right = (model(x).argmax(dim=1) == labels.repeat(2)).reshape(2, -1).all(dim=0)
    one, two = x_adv.chunk(2)
    clean = model(x).chunk(2)
    return dicar_loss(model(interpolate(two, one, MIX)), *clean, mix=MIX, mask=right, space="logits", temperature=0.5)


def test_every_objective_with_adversarial_inputs_is_a_base():
    assert set(BASES) == set(objectives.__all__) - MATTER_OF_TASTE


@pytest.mark.parametrize("base", [name for name in BASES if name not in ELSEWHERE])
def test_each_term_is_added_to_the_base_and_so_are_both(base):
    model, views, labels = problem()
    model.eval()  # so that the order of passes changes no value
    attack = attack_once(model, views, labels)
    x = torch.cat(views)
    function = functools.partial(getattr(objectives, base), **needed(base, model))
    alone, terms = function(model, views, labels, attack)
    x_adv = attack(model, x, labels.repeat(2))
    even, aligned = evenness(model, x, x_adv), alignment(model, x, x_adv, labels)

    if base != "rpat":
        loss, more = objectives.rpat(model, views, labels, attack, base=function, weight=3.0)
        assert_close(loss, alone + 3 * even)
        assert_close(more["robust_perception"], even.detach())
        assert set(terms) <= set(more)
    if base in ("dicar", "raat", "raat_plus_plus"):
        with pytest.raises(ValueError, match=f"dicar: `base`='{base}' has the term 'dicar' already"):
            objectives.dicar(model, views, labels, attack, base=function, mix=MIX)
        return
    loss, more = objectives.dicar(model, views, labels, attack, base=function, mix=MIX, weight=2.0)
    assert_close(loss, alone + 2 * aligned)
    if base == "rpat":
        return
    both = functools.partial(objectives.dicar, base=function, mix=MIX, weight=2.0)
    loss, more = objectives.rpat(model, views, labels, attack, base=both, weight=3.0)
    assert_close(loss, alone + 2 * aligned + 3 * even)
    assert {"dicar", "robust_perception"} <= set(more)
    other = functools.partial(objectives.rpat, base=function, weight=3.0)
    assert_close(objectives.dicar(model, views, labels, attack, base=other, mix=MIX, weight=2.0)[0], loss)


def test_views_that_are_attacked_one_by_one_are_joined():
    model, views, labels = problem()
    model.eval()
    attacks = [pgd(model, view, labels, Linf(0.1), generator=torch.Generator().manual_seed(0)) for view in views]
    options = {"average": averaged(model), "mix": MIX}
    alone, _ = objectives.raat_sharp(model, views, labels, fixed_attack(*attacks), **options)
    loss, _ = objectives.rpat(model, views, labels, fixed_attack(*attacks), base="raat_sharp", **options)
    assert_close(loss, alone + evenness(model, torch.cat(views), torch.cat(attacks)))


PASSES = [
    ("pgd_at", {}, [24, 24, 24, "pairs"]),  # adversarial, middle, clean
    ("trades", {}, [24, 24, "pairs", 24]),
    ("mart", {}, [24, 24, "pairs", 24]),
]


@pytest.mark.parametrize(("base", "options", "rows"), PASSES, ids=lambda value: str(value))
def test_what_the_base_ran_is_not_run_again(base, options, rows):
    model, views, labels = problem()
    both = functools.partial(objectives.dicar, base=base, mix=MIX, **options)
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2, generator=torch.Generator().manual_seed(0))
    objectives.rpat(model, views, labels, attack, base=both)
    pairs = [row for row in model.rows if row != 24]
    assert len(pairs) == 1
    assert sorted(map(str, model.rows)) == sorted(str(pairs[0]) if row == "pairs" else str(row) for row in rows)
    assert model.passes["attack"] == 2


def test_rpat_on_raat_takes_one_more_pass_than_on_pgd_at():
    # RAAT runs the supervised inputs, which are not always the adversarial ones.
    model, views, labels = problem()
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2)
    objectives.rpat(model, views, labels, attack, base="raat", mix=MIX)
    assert [row for row in model.rows if row == 24] == [24] * 4  # supervised, clean, adversarial, middle


def test_a_base_of_the_users_own_is_as_good():
    model, views, labels = problem()
    model.eval()

    def own(model, views, labels, attack, *, weight=1.0):
        x_adv = attack(model, views[0], labels)
        loss = weight * model(x_adv).square().mean()
        return loss, {"size": loss.detach()}

    attack = attack_once(model, views, labels)
    x_adv = attack(model, views[0], labels)
    loss, terms = objectives.rpat(model, views[:1], labels, attack, base=functools.partial(own, weight=0.5))
    assert list(terms) == ["size", "robust_perception"]
    assert_close(loss, 0.5 * model(x_adv).square().mean() + evenness(model, views[0], x_adv))


def test_the_attack_gets_the_model_itself_and_keeps_its_keywords():
    model, views, labels = problem()
    seen = []

    def attack(given, x, y, *, strength, loss=None):
        seen.append((given, strength))
        return x

    def base(given, views, labels, attack):
        seen.append(attack.keywords)
        return given(attack(given, views[0], labels)).sum(), {}

    objectives.rpat(model, views[:1], labels, functools.partial(attack, strength=2), base=base)
    assert seen == [{"strength": 2}, (model, 2)]


def test_an_attack_that_gives_back_its_input_is_told_from_it():
    model, views, labels = problem()
    _, terms = objectives.rpat(model, views[:1], labels, lambda m, x, y: x, base="pgd_at")
    assert model.rows == [12, 12, 12]
    assert terms["robust_perception"] == 0


def test_gradients_are_those_of_the_sum_and_the_model_is_as_before():
    model, views, labels = problem()
    model.eval()
    attack = attack_once(model, views, labels)
    both = functools.partial(objectives.dicar, base="trades", mix=MIX)
    names = [name for name, _ in model.named_parameters()]
    loss, _ = objectives.rpat(model, views, labels, attack, base=both)
    together = torch.autograd.grad(loss, model.parameters())
    x, x_adv = torch.cat(views), attack(model, torch.cat(views), labels.repeat(2))
    apart = objectives.trades(model, views, labels, attack)[0] + evenness(model, x, x_adv)
    apart = apart + alignment(model, x, x_adv, labels)
    for one, other in zip(together, torch.autograd.grad(apart, model.parameters()), strict=True):
        assert_close(one, other)
    assert [name for name, _ in model.named_parameters()] == names
    assert not model.training
    assert set(snapshot(model)) == {*names, "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_bases_without_one_attack_per_sample_are_refused():
    model, views, labels = problem()
    attack = functools.partial(pgd, threat=Linf(0.1), steps=1)

    def some(model, views, labels, attack):
        return model(attack(model, views[0][:3], labels[:3])).sum(), {}

    with pytest.raises(ValueError, match="rpat: `base`='some' attacked 3 rows of 12; the term is defined on bases"):
        objectives.rpat(model, views[:1], labels, attack, base=some)
    with pytest.raises(ValueError, match="rpat: `base`='standard' attacked 0 rows of 12"):
        objectives.rpat(model, views[:1], labels, attack, base=objectives.standard)
    with pytest.raises(ValueError, match="rpat: `base` must be one of"):
        objectives.rpat(model, views[:1], labels, attack, base="standard")
    with pytest.raises(TypeError, match="rpat: `gamma` has no effect with base='trades', which takes beta, noise"):
        objectives.rpat(model, views[:1], labels, attack, base="trades", gamma=1.0)
    with pytest.raises(TypeError, match="rpat: `attack` must be a function"):
        objectives.rpat(model, views[:1], labels, "pgd", base="trades")


@pytest.mark.parametrize(("made", "words"), [
    (lambda loss: loss, r"must return \(loss, terms\), .* got Tensor"),
    (lambda loss: (loss, None), r"must return \(loss, terms\), .* got Tensor, NoneType"),
    (lambda loss: (loss, {"entropy": loss.item()}), r"own's term 'entropy'` must be a torch.Tensor, got float"),
], ids=["a loss", "no terms", "numbers"])  # fmt: skip
def test_a_base_of_the_users_own_says_what_it_must_return(made, words):
    def own(model, views, labels, attack):
        return made(nn.functional.cross_entropy(model(attack(model, views[0], labels)), labels))

    model, views, labels = problem()
    with pytest.raises(TypeError, match=f"^rpat: .*{words}"):
        objectives.rpat(model, views[:1], labels, functools.partial(pgd, threat=Linf(0.1), steps=1), base=own)


def test_a_model_in_a_wrapper_is_combined_as_well():
    model, views, labels = problem()
    compiled = torch.compile(model, backend="eager")
    attack = functools.partial(pgd, threat=Linf(0.1), steps=1)
    loss, _ = objectives.rpat(compiled, views, labels, attack, base="rebat", average=snapshot(model))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Dropping(nn.Module):
    """A model that draws: what is not run again is not drawn again."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    def forward(self, x):
        return self.layers(x)


def test_the_logits_of_the_term_are_the_very_ones_of_the_base():
    _, views, labels = problem()
    model = Dropping().train()
    seen = []
    model.register_forward_hook(lambda module, given, logits: seen.append((given[0], logits)))
    _, terms = objectives.rpat(model, views[:1], labels, fixed_attack((views[0] + 0.01).clamp(0, 1)))
    assert len(seen) == 3
    (_, adv), (_, mid), (_, clean) = seen
    assert_close(terms["robust_perception"], robust_perception_loss(clean, mid, adv, form="interpolation").detach())
