"""With `torch.set_default_device` everything happens on the device of the inputs all the same.

The default is `meta` here, which holds no numbers, so that whatever is made on it and read is an error.
"""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, TensorDataset

import perceptual_at as pat
from perceptual_at import L1, L2, Linf, SampleGenerator, objectives, theory
from perceptual_at.augment import cutmix, seeded, standard
from perceptual_at.data import TensorImages, loader
from tests.strategies import generator, normal, uniform

LABELS = torch.tensor([0, 1, 2, 0])
THREATS = {"Linf": Linf(0.1), "L2": L2(0.5), "L1": L1(2.0)}
ATTACKS = {
    "pgd": functools.partial(pat.pgd, steps=2),
    "apgd": functools.partial(pat.apgd, steps=3),
    "fab": functools.partial(pat.fab, steps=2),
    "square": functools.partial(pat.square, queries=5),
    "auto_attack": functools.partial(pat.auto_attack, version=[("apgd-t", {"steps": 2}), ("square", {"queries": 3})]),
}


def images():
    return uniform(0, 4, 1, 4, 4, dtype=torch.float32)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).eval()


@pytest.fixture
def elsewhere():
    """What was made before stays on the CPU."""

    def run(call):
        torch.set_default_device("meta")
        try:
            return call()
        finally:
            torch.set_default_device(None)

    return run


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, threat, elsewhere):
    model, x, index = network(), images(), torch.arange(4)
    attack = functools.partial(ATTACKS[name], model, x, LABELS, THREATS[threat])
    numbers = [generator(0), SampleGenerator(0, index), SampleGenerator(0, range(4))]
    expected = [attack(generator=one) for one in (generator(0), *numbers[1:])]
    for found, wanted in zip(elsewhere(lambda: [attack(generator=one) for one in numbers]), expected, strict=True):
        assert torch.equal(found, wanted)
    elsewhere(attack)


OBJECTIVES = {
    "pgd_at": {}, "trades": {}, "mart": {}, "consistency_at": {}, "rpat": {},
    "raat": {"mix": 0.4}, "raat_plus_plus": {"mix": 0.4}, "dicar": {"mix": 0.4}, "mail": {}, "sovr": {},
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, elsewhere):
    x, attack = images(), functools.partial(pat.pgd, threat=THREATS["Linf"], steps=1)
    objective = functools.partial(getattr(objectives, name), attack=attack, **OBJECTIVES[name])
    views = (x, x.flip(3)) if name in ("consistency_at", "dicar") or name.startswith("raat") else (x,)
    model = network()
    loss, _ = elsewhere(lambda: objective(model, views, LABELS))
    assert loss.device.type == "cpu"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [TensorImages, TensorDataset, lambda *data: ConcatDataset([TensorDataset(*data)])])
def test_loaders(kind, shuffle, elsewhere):
    data = kind(images(), LABELS)

    def passes(own=None):
        options = {"shuffle": True, "generator": own} if shuffle else {}
        return [labels.tolist() for _ in range(2) for _, labels in loader(data, 3, **options)]

    assert elsewhere(lambda: passes(torch.Generator("cpu").manual_seed(0))) == passes(torch.Generator().manual_seed(0))
    first, second = elsewhere(passes)[:2]
    assert sorted(first + second) == sorted(LABELS.tolist())


def test_transforms_of_a_generator_draw_from_it(elsewhere):
    def draw(image):
        return image + torch.rand(()) + torch.randint(9, ()).item()

    x = images()

    def draws():
        own = torch.Generator("cpu").manual_seed(3)
        mixed, soft = cutmix(x, LABELS, num_classes=3, generator=own)
        return mixed, soft, seeded(draw, own)(x[0]), seeded(standard(4, padding=1), own)(x[0])

    before = torch.random.get_rng_state()
    for found, wanted in zip(elsewhere(draws), draws(), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_evaluation(elsewhere, tmp_path):
    model, batches = network(), [(images(), LABELS)]
    attacks = {name: functools.partial(ATTACKS[name], threat=THREATS["Linf"]) for name in ("pgd", "square")}
    call = functools.partial(pat.evaluate, model, batches, attacks, checks=True, progress=False)
    expected, found = call(), elsewhere(call)
    assert found.robust_accuracy == expected.robust_accuracy
    assert elsewhere(lambda: str(found)).splitlines()[0] == str(expected).splitlines()[0]
    expected.to_json(tmp_path / "report.json")
    assert elsewhere(lambda: pat.Evaluation.from_json(tmp_path / "report.json")) == expected
    record = {"record": tmp_path / "record.jsonl", "checks": False}
    assert elsewhere(lambda: call(**record)) == elsewhere(lambda: call(**record))


@pytest.mark.slow
def test_losses_paths_and_theory(elsewhere):
    logits = [normal(seed, 4, 3) for seed in range(3)]
    model, x = network().double(), images().double()
    step = 0.1 * torch.ones_like(x)
    calls = {
        "losses": lambda: pat.trades_loss(logits[0], logits[1], LABELS) + pat.dicar_loss(*logits, mix=0.3),
        "partition": lambda: pat.boundary_partition(logits[0], logits[1], LABELS).boundary,
        "path": lambda: theory.segment_residual(model, x, step, [0.25, 0.5]),
        "mixing": lambda: theory.mixup_residual(model, x, x.flip(0), 0.5),
        "quadrature": lambda: theory.mixup_identity(model, x, x.flip(0), 0.5).right,
        "coefficients": lambda: theory.taylor_coefficients(model, x, step),
        "random places": lambda: theory.power_jacobian_gap(model, x, step, 0.5, generator=generator(0)),
        "kinks": lambda: torch.tensor(theory.hessian_is_vacuous(model, x, step), device="cpu"),
        "estimators": lambda: torch.tensor(
            theory.simulated_half_error_threshold(4, 1.0, 0.1, runs=3, generator=generator(0)), device="cpu"
        ),
        "mix": lambda: torch.tensor(pat.draw_beta(generator=generator(0)), device="cpu"),
        "interval": lambda: torch.tensor(pat.wilson_interval(3, 9), device="cpu"),
    }
    for call in calls.values():
        assert_close(elsewhere(call), call())
