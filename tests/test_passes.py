"""Every attack and every objective takes exactly the passes it needs, and waits for the device only where it must.

Counted on the CPU, in units of the attacked batch.
"""

import functools

import pytest
import torch
from torch import nn

from perceptual_at import (
    L1,
    L2,
    Lane,
    Linf,
    SampleGenerator,
    _check,
    dlr,
    fgsm,
    frozen,
    kl_to,
    margin,
    objectives,
    pgd,
    snapshot,
)
from tests.needs import OWN_TESTS, needs
from tests.passes import Cost, cost, host_reads
from tests.strategies import generator, uniform
from tests.test_attack_contract import CentralPatch

pytestmark = pytest.mark.slow

BATCH, CLASSES, STEPS = 12, 5, 10
LINF = Linf(0.1)


@pytest.fixture(autouse=True)
def labels_as_on_a_device(monkeypatch):
    """Labels in CPU memory are compared with the number of classes; on a device nothing reads them."""
    monkeypatch.setattr(_check, "_readable", lambda value: False)


def network(*, momentum=0.0):
    """Two convolutions with batch norm, in train mode; its running statistics stay as they are."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Tanh(), nn.Conv2d(4, CLASSES, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return net.double()


def problem():
    """Two views of a batch, and labels the network is right about for most of them."""
    model, views = network(), tuple(uniform(seed, BATCH, 3, 6, 6) for seed in (1, 2))
    with torch.no_grad(), frozen(model) as f:
        right = [f(view).argmax(dim=1) for view in views]
    labels = torch.where(torch.arange(BATCH) < 3, (right[0] + 1) % CLASSES, right[0])
    pairs = (right[0] == labels) & (right[1] == labels)
    assert 0 < pairs.sum() < BATCH
    return model, views, labels, int(pairs.sum()) / (2 * BATCH)


# The counter ------------------------------------------------------------------------------------------------------


def test_the_counter_tells_the_passes_apart():
    model, x = network(), uniform(0, BATCH, 3, 6, 6)
    leaf = x.clone().requires_grad_()
    assert cost(lambda: model(x), batch=BATCH) == Cost(1, 0, 0, 0)
    assert cost(lambda: model(x[:3]).sum().backward(), batch=BATCH) == Cost(0.25, 0, 0.25, 0)
    assert cost(lambda: model(leaf).sum().backward(), batch=BATCH) == Cost(1, 1, 1, 0)
    assert cost(lambda: torch.autograd.grad(model(leaf).sum(), leaf), batch=BATCH) == Cost(1, 1, 0, 0)
    with torch.inference_mode():
        assert cost(lambda: model(x), batch=BATCH) == Cost(1, 0, 0, 0)


@pytest.mark.parametrize("name", [name for name, _ in network().named_parameters()])
def test_the_counter_sees_the_gradient_of_any_single_parameter(name):
    model, leaf = network(), uniform(0, BATCH, 3, 6, 6).requires_grad_()
    model.requires_grad_(False).get_parameter(name).requires_grad_()
    assert cost(lambda: model(leaf).sum().backward(), batch=BATCH) == Cost(1, 1, 1, 0)


def test_the_counter_sees_what_waits():
    z, mask = torch.ones(2), torch.tensor([True, False])
    for read in (
        z[0].item, z.tolist, z.numpy, z.cpu, mask.nonzero, lambda: z[mask], lambda: bool(mask.any()), z.unique,
        lambda: int(z[0]), lambda: float(z[0]), lambda: torch.equal(z, z), lambda: z.masked_select(mask),
        lambda: torch.where(mask), lambda: z.clone().index_put_((mask,), z[0]), lambda: z.unique(dim=0),
        z.unique_consecutive, lambda: mask.long().bincount(),
    ):  # fmt: skip
        with host_reads() as reads:
            read()
        assert len(reads) == 1, read
    with host_reads() as reads:
        torch.where(mask, z, 0).sum() + z[torch.tensor([0, 1])].sum()
    assert reads == []


# Attacks ----------------------------------------------------------------------------------------------------------


EACH = torch.linspace(0.05, 0.2, BATCH)
THREATS = {
    "Linf": LINF, "Linf of each": Linf(EACH), "L2": L2(0.5), "L2 of each": L2(EACH), "L2 clipped last":
    L2(0.5, projection="ball_box"), "L1": L1(2.0), "L1 of each": L1(10 * EACH), "of the user's own": CentralPatch(),
}  # fmt: skip
STARTS = {
    "random": {"start": "random"}, "clean": {"start": "clean"},
    "given": {"start": uniform(3, BATCH, 3, 6, 6)},
    "generator": {"generator": generator(0)},
}  # fmt: skip
# Options, then forwards, input gradients.
OPTIONS = {
    "plain": ({}, 10, 10),
    "margin": ({"loss": margin}, 10, 10),
    "dlr": ({"loss": dlr}, 10, 10),
    "kl_to": ({"loss": kl_to(torch.zeros(BATCH, CLASSES, dtype=torch.float64))}, 10, 10),
    "targets": ({"targets": torch.zeros(BATCH, dtype=torch.long)}, 10, 10),
    "step sizes of each": ({"step_size": EACH}, 10, 10),
    "momentum": ({"momentum": 0.9}, 10, 10),
    "averaged passes": ({"eot": 3}, 30, 30),
    "keep best": ({"keep": "best"}, 11, 10),
    "restarts": ({"restarts": 3}, 33, 30),
    "restarts, keep best": ({"restarts": 3, "keep": "best"}, 33, 30),
    "verdict": ({"verdict": True}, 11, 10),
    "verdict, keep best": ({"verdict": True, "keep": "best"}, 11, 10),
    "mode kept": ({"model_mode": "as_is"}, 10, 10),
    "numbers of each sample": ({"generator": SampleGenerator(0, torch.arange(BATCH))}, 10, 10),
}


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("threat", THREATS)
def test_pgd_needs_its_steps_and_nothing_else(threat, start, validate):
    model, views, labels, _ = problem()
    attack = functools.partial(pgd, threat=THREATS[threat], steps=STEPS, validate=validate, **STARTS[start])
    spent = cost(lambda: attack(model, views[0], labels), batch=BATCH)
    assert spent == Cost(STEPS, STEPS, 0, int(validate))


@pytest.mark.parametrize("threat", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_pgd_cost_what_they_say(threat, name):
    options, forwards, gradients = OPTIONS[name]
    model, views, labels, _ = problem()
    attack = functools.partial(pgd, threat=THREATS[threat], steps=STEPS, validate=False, **options)
    assert cost(lambda: attack(model, views[0], labels), batch=BATCH) == Cost(forwards, gradients, 0, 0)


@pytest.mark.parametrize("threat", THREATS)
def test_fgsm_needs_one_gradient(threat):
    model, views, labels, _ = problem()
    attack = functools.partial(fgsm, threat=THREATS[threat], validate=False)
    assert cost(lambda: attack(model, views[0], labels), batch=BATCH) == Cost(1, 1, 0, 0)


# A lane's twin is made at the first call; from then on it takes new weights without a pass of any kind.
LANES = [Lane(), Lane(fold=False), Lane(channels_last=False), Lane(dtype=torch.bfloat16)]


def change_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("threat", THREATS)
def test_pgd_in_a_lane_needs_its_steps_and_nothing_else(threat, lane):
    model, views, labels, _ = problem()
    attack = functools.partial(pgd, model, views[0], labels, THREATS[threat], steps=STEPS, validate=False, lane=lane)
    attack()
    change_weights(model)
    assert cost(attack, batch=BATCH) == Cost(STEPS, STEPS, 0, 0)


@pytest.mark.parametrize(("options", "forwards"), [({"keep": "best"}, 11), ({"verdict": True}, 12)], ids=str)
def test_a_verdict_in_a_lane_costs_one_pass_of_the_model_itself(options, forwards):
    model, views, labels, _ = problem()
    attack = functools.partial(pgd, model, views[0], labels, LINF, validate=False, lane=Lane(), **options)
    attack()
    assert cost(attack, batch=BATCH) == Cost(forwards, STEPS, 0, 0)


@pytest.mark.parametrize("lane", [None, Lane()], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"keep": "best"}, {"restarts": 2}, {"keep": "best", "early_stop": True}], ids=str
)
def test_a_verdict_says_what_was_spent(options, lane):
    model, views, labels, _ = problem()
    attack = functools.partial(pgd, model, views[0], labels, LINF, validate=False, lane=lane, verdict=True, **options)
    attack()
    found = []
    spent = cost(lambda: found.append(attack()), batch=BATCH)
    said = [float(passes.sum()) / BATCH for passes in (found[0].forwards, found[0].gradients)]
    assert [spent.forwards, spent.input_gradients] == pytest.approx(said)
    if "early_stop" in options:
        assert spent.input_gradients < STEPS
        assert 0 < spent.reads <= 2 * STEPS + 1
    else:
        assert spent.reads == 0


# Objectives -------------------------------------------------------------------------------------------------------

# Objective and options; then forwards and parameter gradients apart from the attack's, and reads on the host. (5, 1) is
# 5 and one for the pairs in use, which are a share of the batch.
STEPS_OF_TRAINING = [
    ("standard", {}, 1, 1, 0),
    ("random_noise", {}, 1, 1, 0),
    ("pgd_at", {}, 1, 1, 0),
    ("trades", {}, 3, 2, 0),
    ("trades", {"repeat_clean_forward": True}, 4, 3, 0),
    ("mart", {}, 2, 2, 0),
    ("consistency_at", {}, 1, 1, 0),
    ("rpat", {}, 3, 3, 0),
    ("rpat", {"form": "quotient", "criterion": "kl"}, 3, 3, 0),
    ("rpat", {"base": "trades"}, 4, 3, 0),
    ("rpat", {"base": "mart"}, 3, 3, 0),
    ("rpat", {"base": "consistency_at"}, 3, 3, 0),
    ("rebat", {}, 2, 1, 0),
    ("rebat", {"average": None}, 1, 1, 0),
    ("rpat_plus_plus", {}, 3, 1, 0),
    ("rpat_plus_plus", {"average": None}, 1, 1, 0),
    ("raat", {}, (5, 1), (2, 1), 1),
    ("raat", {"boundary": "definition"}, (4, 1), (2, 1), 1),
    ("raat", {"boundary": "objective"}, (4, 1), (2, 1), 1),
    ("raat", {"bound": False}, (3, 1), (2, 1), 1),
    ("raat", {"misclassified": "clean"}, (5, 1), (2, 1), 1),
    ("raat", {"misclassified": "mart"}, (5, 1), (2, 1), 1),
    ("raat", {"supervise": "first"}, (4.5, 1), (1.5, 1), 1),
    ("raat", {"weight": 0.0}, 4, 1, 0),
    ("raat", {"weight": 0.0, "boundary": "objective"}, 2, 1, 0),
    ("raat", {"weight": 0.0, "bound": False}, 1, 1, 0),
    ("raat_plus_plus", {}, (6, 1), (3, 1), 1),
    ("raat_plus_plus", {"repeat_clean_forward": True}, (7, 1), (4, 1), 1),
    ("raat_plus_plus", {"bound": False}, (3, 1), (2, 1), 1),
    ("raat_plus_plus", {"weight": 0.0}, 6, 3, 0),
    ("raat_plus_plus", {"weight": 0.0, "bound": False}, 2, 2, 0),
    ("raat_sharp", {}, (3.5, 1), (1.5, 1), 1),
    ("raat_sharp", {"bound": False}, (2.5, 1), (1.5, 1), 1),
    ("dicar", {}, (3, 1), (2, 1), 1),
    ("dicar", {"base": "trades"}, (4, 1), (2, 1), 1),
    ("dicar", {"base": "mart"}, (3, 1), (2, 1), 1),
    ("dicar", {"base": "consistency_at"}, (3, 1), (2, 1), 1),
    ("gairat", {}, 1, 1, 0),
    ("mail", {}, 1, 1, 0),
    ("mail", {"margin": "clean"}, 2, 1, 0),
    ("mail", {"margin": "difference"}, 2, 1, 0),
    ("mail", {"weighted": False}, 1, 1, 0),
    ("mail", {"base": "trades"}, 3, 2, 0),
    ("mail", {"base": "mart", "margin": "difference"}, 2, 2, 0),
    ("ewat", {}, 1, 1, 0),
    ("sovr", {}, 1, 1, 0),
    ("piat", {}, 2, 2, 0),
    ("te", {}, 1, 1, 0),
    ("te", {"targets": None}, 1, 1, 0),
    ("te", {"base": "trades"}, 3, 2, 0),
    ("hat", {}, 5, 3, 0),
    ("hat", {"base": "pgd_at"}, 4, 3, 0),
    ("kd", {}, 3, 1, 0),
    ("adr", {}, 2, 1, 0),
    ("adr", {"base": "trades"}, 4, 2, 0),
    ("adr", {"base": "trades", "joint": False}, 4, 2, 0),
    ("cure", {}, 5, 2, 0),
    ("cure", {"average": None}, 3, 2, 0),
    ("mma", {}, 2, 2, 0),
]
PAIRED = ("consistency_at", "raat", "raat_plus_plus", "raat_sharp", "dicar", "rpat_raat")


def step_of(name, options, *, validate=False, lane=None, **more):
    """A training step, how many images it attacks, and the share of them that are pairs in use."""
    model, views, labels, share = problem()
    options = options | more
    if name in PAIRED[1:]:
        options = {"mix": 0.7, **options}
    elif name not in PAIRED and options.get("base") not in PAIRED:
        views = views[:1]
    if name in ("rebat", "rpat_plus_plus", "raat_sharp"):
        options = {"average": snapshot(model), **options}
    if name in ("random_noise", "grad_align"):
        options = {"threat": LINF, **options}
    options = {**needs(name, model, views[0], CLASSES, steps=STEPS), **options}
    attack = functools.partial(pgd, threat=LINF, steps=STEPS, generator=generator(0), validate=validate, lane=lane)

    def step():
        loss, _ = getattr(objectives, name)(model, views, labels, attack, **options)
        loss.backward()

    if lane is not None:  # make the twin
        attack(model, views[0], labels)
        change_weights(model)
    return step, len(views) * BATCH, share


def expected(extra, share):
    return extra[0] + extra[1] * share if isinstance(extra, tuple) else extra


@pytest.mark.parametrize(
    ("name", "options", "forwards", "gradients", "reads"),
    STEPS_OF_TRAINING,
    ids=[f"{row[0]} {' '.join(f'{k}={v}' for k, v in row[1].items())}".strip() for row in STEPS_OF_TRAINING],
)
def test_a_training_step_needs_the_passes_of_its_formula(name, options, forwards, gradients, reads):
    step, batch, share = step_of(name, options)
    attacking = 0 if name in ("standard", "random_noise") else STEPS
    needed = Cost(attacking + expected(forwards, share), attacking, expected(gradients, share), reads)
    assert cost(step, batch=batch) == pytest.approx(needed)


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("name", [name for name in objectives.__all__ if name not in OWN_TESTS])
def test_a_training_step_in_a_lane_takes_the_same_passes(name, lane):
    mask = {"mask": torch.arange(BATCH) < 6} if name in PAIRED[1:] else {}  # whatever rounding makes of a prediction
    (plain, batch, _), (fast, _, _) = step_of(name, mask), step_of(name, mask, lane=lane)
    assert cost(fast, batch=batch) == cost(plain, batch=batch)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "mart", "consistency_at", "rpat", "raat", "raat_plus_plus"])
def test_a_validated_attack_waits_once(name):
    (bare, batch, _), (checked, _, _) = (step_of(name, {}, validate=validate) for validate in (False, True))
    before, after = cost(bare, batch=batch), cost(checked, batch=batch)
    assert after == before._replace(reads=before.reads + 1)


def test_views_attacked_one_by_one_wait_once_each():
    step, batch, _ = step_of("raat_sharp", {}, validate=True)
    assert cost(step, batch=batch).reads == 3


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus"])
def test_a_reduced_attack_costs_its_steps(name):
    reduced = functools.partial(pgd, threat=LINF.scaled(0.1), steps=4, validate=False)
    step, batch, _ = step_of(name, {"reduced_attack": reduced})
    plain = cost(step_of(name, {})[0], batch=batch)
    assert cost(step, batch=batch) == pytest.approx(
        plain._replace(forwards=plain.forwards + 4, input_gradients=plain.input_gradients + 4)
    )


# A mask of the caller's own says which pairs count: nobody has to be asked for them.
@pytest.mark.parametrize(
    ("name", "options", "forwards", "gradients"),
    [
        ("raat", {"bound": False}, 2, 2),
        ("raat", {"bound": False, "misclassified": "clean"}, 3, 2),
        ("raat", {"boundary": "objective"}, 3, 2),
        ("raat", {}, 5, 2),
        ("raat_plus_plus", {"bound": False}, 2, 2),
        ("raat_plus_plus", {}, 6, 3),
        ("raat_sharp", {}, 3, 1.5),
        ("dicar", {}, 2, 2),
        ("dicar", {"base": "mart"}, 2, 2),
    ],
    ids=str,
)
def test_a_mask_for_dicar_saves_the_passes_that_would_find_it(name, options, forwards, gradients):
    mask = torch.arange(BATCH) < 6
    step, batch, _ = step_of(name, options, mask=mask)
    assert cost(step, batch=batch) == Cost(STEPS + forwards + 0.25, STEPS, gradients + 0.25, 1)


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus", "raat_sharp", "dicar"])
def test_without_a_pair_to_align_no_pass_is_made_for_dicar(name):
    step, batch, _ = step_of(name, {}, mask=torch.zeros(BATCH, dtype=torch.bool))
    needed = {"raat": (4, 1), "raat_plus_plus": (6, 3), "raat_sharp": (2, 0.5), "dicar": (1, 1)}[name]
    assert cost(step, batch=batch) == Cost(STEPS + needed[0], STEPS, needed[1], 1)
