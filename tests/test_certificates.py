"""Certificates of small ReLU networks: bound <= exact <= attack, for every attack, against brute force."""

import functools
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from perceptual_at import Linf, SampleGenerator, auto_attack, pgd
from perceptual_at.attacks import apgd, dlr, fab, fgsm, margin, square, surrogate_pgd
from perceptual_at.models import Normalize

pytest.importorskip("scipy")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
THREAT = Linf(0.12)
ATTACKS = {
    "fgsm": (fgsm, {}),
    "pgd": (pgd, {"steps": 20, "keep": "best"}),
    "pgd, margin": (pgd, {"steps": 20, "loss": margin, "keep": "best"}),
    "apgd, cross entropy": (apgd, {"steps": 20}),
    "apgd, dlr": (apgd, {"steps": 20, "loss": dlr}),
    "apgd, targeted": (apgd, {"steps": 10, "target_classes": 3}),
    "fab": (fab, {"steps": 20}),
    "square": (square, {"queries": 60}),
    "auto_attack": (auto_attack, {"version": ["apgd-ce", "apgd-t", "fab-t", ("square", {"queries": 60})]}),
    "surrogate_pgd": (surrogate_pgd, {"steps": 20, "restarts": 1, "probes": 8}),
}


@pytest.fixture(scope="module")
def scripts():
    """The two modules beside the benchmarks, forgotten afterwards."""
    names, path, bytecode = ("certificates", "exact"), list(sys.path), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def certificates(scripts):
    """Bounds by relaxation."""
    return scripts[0]


@pytest.fixture(scope="module")
def exact(scripts):
    """Programs."""
    return scripts[1]


@pytest.fixture(scope="module")
def trained():
    """A network of two inputs and four classes, taught where a pinwheel's arms are, with points that it knows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        x = torch.rand(400, 1, 1, 2)
        angle = torch.atan2(x[:, 0, 0, 0] - 0.5, x[:, 0, 0, 1] - 0.5) + 4 * (x - 0.5).flatten(1).norm(dim=1)
        labels = (2 * angle / math.pi).floor().long() % 4
    weights = list(model.parameters())
    moved = [torch.zeros_like(weight) for weight in weights]
    for _ in range(250):
        slopes = torch.autograd.grad(cross_entropy(model(x), labels), weights)
        for weight, move, slope in zip(weights, moved, slopes, strict=True):
            weight.data -= 0.1 * move.mul_(0.9).add_(slope)
    model.eval().requires_grad_(False)
    known = (model(x).argmax(dim=1) == labels).nonzero().squeeze(1)[:12]
    return model, x[known], labels[known]


def differences(model, x, labels):
    """Logit of the label minus each logit, in double precision; infinity for itself."""
    logits = nn.Sequential(*model).double()(x.double())
    model.float()
    found = logits.gather(1, labels[:, None]) - logits
    return found.scatter(1, labels[:, None], math.inf)


@pytest.fixture(scope="module")
def proved(certificates, exact, trained):
    """For every sample the bounds of the relaxation, the exact smallest differences, and those of a fine grid."""
    model, x, labels = trained
    steps = certificates.steps_of(model)
    matrices = exact.matrices_of(steps, x.shape[1:])
    line = torch.linspace(0, 1, 151, dtype=torch.float64)
    rows = []
    for image, label in zip(x, labels.tolist(), strict=True):
        low, high = certificates.box(image, THREAT.eps)
        bounds = certificates.bounds_of(steps, low, high)
        lowest = certificates.lowest_margins(steps, bounds, label)
        smallest = [
            math.inf if other == label else
            exact.smallest_margin(steps, matrices, bounds, label, other)[0] for other in range(4)
        ]  # fmt: skip
        grid = torch.cartesian_prod(*((a + (b - a) * line) for a, b in zip(low.flatten(), high.flatten(), strict=True)))
        tried = differences(model, grid.reshape(-1, 1, 1, 2), torch.full((len(grid),), label)).amin(dim=0)
        project = functools.partial(THREAT.project, x=image[None])
        verdict = exact.decide(model, steps, matrices, bounds, label, project=project).verdict
        rows.append((lowest, torch.tensor(smallest, dtype=torch.float64), tried, verdict))
    return rows


@pytest.mark.slow
def test_the_exact_value_lies_between_the_relaxation_and_brute_force(proved):
    gaps = []
    for lowest, smallest, tried, verdict in proved:
        there = smallest.isfinite()
        assert (lowest <= smallest + 1e-6)[there].all()
        assert (smallest <= tried + 1e-6)[there].all()
        assert (tried - smallest < 0.2)[there].all()  # the grid is 1.6e-3 wide
        gaps.append((smallest - lowest)[there].max())
        if abs(tried.min()) > 0.2:
            assert verdict == ("broken" if tried.min() < 0 else "robust")
    assert max(gaps) > 1e-3  # the relaxation is not exact, or this compares a thing with itself
    assert {verdict for *_, verdict in proved} == {"broken", "robust"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_beats_a_certificate(name, trained, proved):
    model, x, labels = trained
    attack, options = ATTACKS[name]
    numbers = SampleGenerator(0, torch.arange(len(x)))
    given = {} if name == "fgsm" else {"generator": numbers}
    x_adv = attack(model, x, labels, THREAT, **given, **options)
    reached = differences(model, x_adv, labels)
    broken = model(x_adv).argmax(dim=1) != labels
    for (lowest, smallest, _, verdict), found, wrong in zip(proved, reached, broken, strict=True):
        assert (lowest <= found).all()
        assert (smallest <= found + 1e-6).all()
        assert not (wrong and verdict == "robust")
    assert broken.any()


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.relu(self.conv2(self.bn(self.conv1(x)).relu()) + x)


@pytest.fixture(scope="module")
def residual():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            Normalize([0.4, 0.5], [0.2, 0.3]), nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(), Block(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(3, 3),
        )  # fmt: skip
        with torch.no_grad():
            model.train()(torch.rand(64, 2, 4, 4))
        return model.eval().requires_grad_(False), torch.rand(2, 4, 4), torch.rand(4000, 2, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("relaxed", [False, True])
def test_bounds_hold_at_every_step_of_a_network_with_sums(certificates, residual, relaxed):
    model, x, noise = residual
    steps = certificates.steps_of(model)
    assert [step.kind for step in steps].count("sum") == 1
    low, high = certificates.box(x, 0.05)
    bounds = certificates.bounds_of(steps, low, high, relaxed=relaxed)
    values = []
    for step in steps:
        taken = [values[source] for source in step.sources]
        if step.kind == "input":
            values.append(low + (high - low) * noise)
        else:
            values.append({"affine": step.module, "relu": torch.relu, "sum": torch.add}[step.kind](*taken))
    assert torch.allclose(values[-1].float(), model(values[0].float()), atol=1e-5)
    for value, (below, above) in zip(values, bounds, strict=True):
        assert (value >= below - 1e-9).all()
        assert (value <= above + 1e-9).all()
    lowest = certificates.lowest_margins(steps, bounds, 0)[1:]
    seen = (values[-1][:, :1] - values[-1][:, 1:]).amin(dim=0)
    assert (lowest <= seen).all()


@pytest.mark.slow
def test_programs_of_networks_with_sums_are_exact_too(certificates, exact, residual):
    model, x, noise = residual
    steps = certificates.steps_of(model)
    bounds = certificates.bounds_of(steps, *certificates.box(x, 0.05))
    assert exact.open_relus(steps, bounds) > 0
    matrices = exact.matrices_of(steps, x.shape)
    smallest, point = exact.smallest_margin(steps, matrices, bounds, 0, 1)
    logits = model.double()(torch.from_numpy(point).reshape(1, *x.shape))[0]
    seen = model(bounds[0][0] + (bounds[0][1] - bounds[0][0]) * noise)
    model.float()
    assert float(logits[0] - logits[1]) == pytest.approx(smallest, abs=1e-6)
    assert certificates.lowest_margins(steps, bounds, 0)[1] <= smallest + 1e-6
    assert smallest <= (seen[:, 0] - seen[:, 1]).min()


def test_without_open_relus_the_relaxation_is_exact(certificates, exact):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, -1.0]))  # one open, one shut, everywhere in the box
        model[2].weight.copy_(torch.tensor([[1.0, 5.0], [-1.0, 5.0]]))
        model[2].bias.zero_()
    steps = certificates.steps_of(model)
    low, high = torch.tensor([0.25, 0.0]), torch.tensor([0.5, 1.0])
    bounds = certificates.bounds_of(steps, low, high)
    assert exact.open_relus(steps, bounds) == 0
    assert certificates.lowest_margins(steps, bounds, 0).tolist() == [math.inf, 2.5]  # 2 (x + 1) at x = 1/4
    assert certificates.lowest_margins(steps, bounds, 1).tolist() == [-3.0, math.inf]


def test_an_open_relu_lies_under_its_chord(certificates):
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ([[1.0]], [0.0], [[0.0], [1.0]], [1.0, 0.0]), strict=True):
            parameter.copy_(torch.tensor(value))
    steps = certificates.steps_of(model)
    bounds = certificates.bounds_of(steps, torch.tensor([-1.0]), torch.tensor([3.0]))
    # 1 - relu(z), where relu(z) <= 3/4 (z + 1) on [-1, 3]; and relu(z) - 1, where relu(z) >= z
    assert certificates.lowest_margins(steps, bounds, 0)[1] == -2.0
    assert certificates.lowest_margins(steps, bounds, 1)[0] == -2.0
    bounds = certificates.bounds_of(steps, torch.tensor([-3.0]), torch.tensor([1.0]))
    assert certificates.lowest_margins(steps, bounds, 1)[0] == -1.0  # and relu(z) >= 0 where that is the smaller gap


def test_boxes_hold_every_point_of_the_ball_in_single_precision(certificates):
    x = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    low, high = certificates.box(x, 0.3)
    for sign in (-1, 1):
        point = (x + sign * 0.3).clamp(0, 1).double()
        assert (low <= point).all()
        assert (point <= high).all()
    assert low.min() == 0
    assert high.max() == 1


def test_what_the_certificates_do_not_know_is_named(certificates):
    with pytest.raises(TypeError, match="steps_of: the certificates know no Tanh"):
        certificates.steps_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
