"""What holds on any device, on the stand-in: values as on the CPU, nothing mixed with another device, no hidden reads.

Run by `tests/test_second_device.py` in a process of its own.
"""

import copy
import functools
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import perceptual_at as pat
from perceptual_at import Linf, _random, _rounding, evaluate, models, objectives, pgd
from perceptual_at.augment import random_crop_flip

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests import second_device
from tests.test_attack_contract import ATTACKS, SEARCHES, Net, classes_of, images
from tests.test_objectives import call

second_device.load()
DEVICE = torch.device(second_device.CHOSEN)
# Those that need no second network and no memory of the samples: what they add is the same on every device.
OBJECTIVES = (
    "pgd_at", "trades", "mart", "consistency_at", "rebat", "rpat", "rpat_plus_plus", "raat", "raat_plus_plus",
    "raat_sharp", "dicar", "mail", "ewat", "sovr", "piat", "score", "alp", "standard",
)  # fmt: skip
PAIRED = ("raat", "raat_plus_plus", "raat_sharp", "dicar")
SOME = torch.arange(12) < 6  # pairs for DICAR: batch norm of single features needs more than one


@pytest.fixture(params=["plain", "no float64", "no generator"])
def kind(request):
    """The device as it is, one that computes in float32 at most, and one that makes no random numbers."""
    for answers in (_random.has_generator, _rounding.has_float64):
        answers.cache_clear()
    _random._streams.clear()
    if request.param == "plain":
        yield request.param
    else:
        with second_device.mode(request.param):
            yield request.param
    for answers in (_random.has_generator, _rounding.has_float64):
        answers.cache_clear()
    _random._streams.clear()


def generator(kind):
    return torch.Generator("cpu" if kind == "no generator" else DEVICE).manual_seed(0)


def network():
    return Net(dtype=torch.float32).train()


every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in [*ATTACKS, *SEARCHES]])


@every_case
def test_an_attack_finds_there_what_it_finds_on_the_cpu(case, kind):
    model, x, labels = network(), images(dtype=torch.float32), classes_of()
    draws = (
        ({"generator": torch.Generator().manual_seed(0)}, {"generator": generator(kind)}) if case.draws else ({}, {})
    )
    expected = case(model, x, labels, **draws[0])
    moved = copy.deepcopy(model).to(DEVICE)
    found = case(moved, x.to(DEVICE), labels.to(DEVICE), **draws[1])
    assert found.device.type == DEVICE.type
    assert_close(found.cpu(), expected, rtol=0, atol=1e-5)
    assert moved.training
    delta = found - x.to(DEVICE)
    assert bool((case.threat.norm(delta) <= case.threat.eps).all())
    assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ATTACKS])
def test_an_attack_without_checks_reads_nothing(case):
    model, x, labels = network().to(DEVICE), images(dtype=torch.float32).to(DEVICE), classes_of().to(DEVICE)
    options = {"generator": generator("plain")} if case.draws else {}
    with second_device.mode("no reads"):
        case(model, x, labels, validate=False, **options)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ATTACKS if case.draws][:4])
def test_the_checks_of_an_attack_wait_once(case):
    model, x, labels = network().to(DEVICE), images(dtype=torch.float32).to(DEVICE), classes_of().to(DEVICE)
    before = second_device.reads()
    case(model, x, labels, generator=generator("plain"))
    assert second_device.reads() == before + 1


def test_things_of_another_device_are_refused():
    model, x, labels = network().to(DEVICE), images(dtype=torch.float32).to(DEVICE), classes_of().to(DEVICE)
    attack = functools.partial(pgd, threat=Linf(0.1), steps=1)
    with pytest.raises(ValueError, match="pgd: `labels` is on cpu"):
        attack(model, x, labels.cpu())
    with pytest.raises(ValueError, match="`generator` is on cpu"):
        attack(model, x, labels, generator=torch.Generator())
    with pytest.raises(ValueError, match="pgd: `start` is on cpu"):
        attack(model, x, labels, start=x.cpu())
    with pytest.raises(ValueError, match=r"pgd: `x` is on .* but the model has weights on cpu"):
        attack(network(), x, labels)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_gives_there_what_it_gives_on_the_cpu(name, kind):
    values, gradients = [], []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        model = network()
        model.dropout.p = 0.0  # its numbers differ
        model = model.to(device)
        views = tuple(images(12, seed=seed, dtype=torch.float32).to(device) for seed in (0, 1))
        labels = classes_of(12).to(device)
        source = torch.Generator().manual_seed(0) if device.type == "cpu" else generator(kind)
        attack = functools.partial(pgd, threat=Linf(0.1), steps=2, generator=source)
        draws = "generator" in inspect.signature(getattr(objectives, name)).parameters
        options = {"generator": source} if draws else {}
        options |= {"mask": SOME.to(device)} if name in PAIRED else {}
        loss, terms = call(name, model, views, labels, attack, **options)
        loss.backward()
        assert all(term.device == loss.device and not term.requires_grad for term in terms.values())
        values.append(loss.detach().cpu())
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in PAIRED])
def test_an_objective_reads_nothing(name):
    model = network().to(DEVICE)
    views = tuple(images(12, seed=seed, dtype=torch.float32).to(DEVICE) for seed in (0, 1))
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2, validate=False)
    with second_device.mode("no reads"):
        loss, _ = call(name, model, views, classes_of(12).to(DEVICE), attack)
        loss.backward()


@pytest.mark.parametrize("name", PAIRED)
def test_picking_pairs_is_all_that_waits(name):
    model = network().to(DEVICE)
    views = tuple(images(12, seed=seed, dtype=torch.float32).to(DEVICE) for seed in (0, 1))
    attack = functools.partial(pgd, threat=Linf(0.1), steps=2, validate=False)
    before = second_device.reads()
    call(name, model, views, classes_of(12).to(DEVICE), attack, mask=SOME.to(DEVICE))[0].backward()
    assert second_device.reads() == before + 1


def test_an_evaluation_comes_to_the_same_verdicts(kind):
    model, x, labels = network().eval(), images(32, dtype=torch.float32), classes_of(32)
    attacks = {
        "pgd": functools.partial(pgd, threat=Linf(0.1), steps=3),
        "aa": functools.partial(
            pat.auto_attack, threat=Linf(0.1), version=[("apgd-ce", {"steps": 4}), ("square", {"queries": 20})]
        ),
    }  # fmt: skip
    there = copy.deepcopy(model).to(DEVICE)
    batches = [(x[:20], labels[:20]), (x[20:], labels[20:])]
    expected = evaluate(model, batches, attacks, progress=False)
    found = evaluate(there, [(a.to(DEVICE), b.to(DEVICE)) for a, b in batches], attacks, progress=False)
    assert found.clean_accuracy == expected.clean_accuracy
    assert found.robust_accuracy == expected.robust_accuracy


def test_sanity_checks_run(kind):
    model, x, labels = network().eval().to(DEVICE), images(32, dtype=torch.float32), classes_of(32)
    checks = pat.sanity_checks(model, x.to(DEVICE), labels.to(DEVICE), Linf(0.1))
    assert checks


def test_an_epoch_of_training(kind):
    torch.manual_seed(0)
    model = models.resnet18(width=2).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, labels = torch.rand(24, 3, 8, 8), torch.arange(24) % 3
    source, average, losses = generator(kind), pat.snapshot(model), []
    for rows in torch.randperm(24).split(8):
        view = random_crop_flip(x[rows].to(DEVICE), padding=1, generator=source)
        attack = functools.partial(pgd, threat=Linf(8 / 255), steps=2, generator=source)
        loss, _ = objectives.rpat(model, (view,), labels[rows].to(DEVICE), attack)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = pat.ema_update(average, model, decay=0.9)
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert {value.device.type for value in average.values()} == {DEVICE.type}


def test_a_loss_on_a_tensor_of_another_device_is_refused():
    z = torch.rand(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match="is on"):
        pat.robust_perception_loss(z, z, z.cpu())
