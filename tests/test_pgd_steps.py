"""What a step of PGD costs, what its options refuse, and that momentum is measured in the norm it should be."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import perceptual_at
from perceptual_at import L1, L2, Linf, cw, fgsm, friendly_pgd, kl_to, n_fgsm, pgd, pure_pgd
from tests.strategies import generator
from tests.test_attack_contract import Net, Pointwise, classes_of, images

LINF = Linf(0.1)
PACKAGE = Path(perceptual_at.__file__).parent


class Counted(TorchDispatchMode):
    """Counts tensor operations, those of the passes included; not what autograd detaches, more in older torch."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_on_a_linear_model_takes_at_most_16_operations(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)
    x, labels = torch.rand(8, 1, 8, 8, dtype=dtype), torch.randint(10, (8,))
    counts = []
    for steps in (10, 11):
        with Counted() as counted:
            pgd(model, x, labels, LINF, steps=steps, step_size=0.01)
        counts.append(counted.operations)
    assert counts[1] - counts[0] <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_call_on_a_linear_model_takes_few_operations_beside_its_steps(dtype):
    """The corners of the cube are computed once, both together; values are read once."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)
    x, labels = torch.rand(8, 1, 8, 8, dtype=dtype), torch.randint(10, (8,))
    with Counted() as counted:
        pgd(model, x, labels, LINF, steps=1, step_size=0.01)
    assert counted.operations <= 45


def private_functions():
    for path in [*(PACKAGE / "attacks").glob("*.py"), *(PACKAGE / "victims").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield f"{path.stem}.{node.name}", [one.arg for one in taken if one.arg != "self"]


def test_no_private_function_of_attacks_and_victims_takes_more_than_ten_arguments():
    assert {name: len(taken) for name, taken in private_functions() if len(taken) > 10} == {}


# Momentum -----------------------------------------------------------------------------------------------------------


class Steep(nn.Module):
    """Gradients whose L1 and L2 norms are in another proportion at every step, so that they weigh differently."""

    def forward(self, x):
        score = (x[:, 0] * 3 - x[:, 1:].sum(dim=1) * torch.where(x[:, 0] > 0.5, 0.1, 2.0)).sin()
        return torch.stack([score, -score], dim=1)


@pytest.mark.parametrize("threat", [L2(2.0), L1(3.0)], ids=repr)
def test_momentum_divides_by_the_l1_norm(threat):
    x, labels, decay = torch.full((2, 9), 0.45, dtype=torch.float64), torch.zeros(2, dtype=torch.long), 0.8
    point, velocity = x, torch.zeros_like(x)
    for _ in range(6):
        seen = point.clone().requires_grad_()
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(Steep()(seen), labels, reduction="sum"), seen)
        velocity = decay * velocity + grad / grad.abs().sum(dim=1, keepdim=True)
        own = getattr(threat, "step", None)
        moved = own(point, x, velocity, 0.1) if own else threat.project(point + 0.1 * threat.steepest(velocity), x)
        point = moved
    found = pgd(Steep(), x, labels, threat, steps=6, step_size=0.1, start="clean", momentum=decay)
    assert_close(found, point, rtol=0, atol=1e-12)


def test_the_norm_of_momentum_matters_for_a_linf_step():
    """Two gradients, of one entry and of many: in L1 the first outweighs the second, in L2 it would not."""
    grads = torch.tensor([[4.0, 0, 0, 0, 0, 0, 0, 0, 0], [-1.0] * 9], dtype=torch.float64)

    def model(x):
        score = torch.where(x[:, :1] > 0.5, grads[1], grads[0]).mul(x).sum(dim=1)
        return torch.stack([score, -score], dim=1)

    x = torch.full((1, 9), 0.45, dtype=torch.float64)
    found = pgd(
        model, x, torch.zeros(1, dtype=torch.long), Linf(0.4), steps=2, step_size=0.1, start="clean", momentum=0.2,
        loss=lambda logits, labels: logits[:, 0],
    )  # fmt: skip
    assert_close(found[0, 0], torch.tensor(0.65, dtype=torch.float64))  # 0.2 * 1 - 1 / 9 > 0, but 0.2 - 1 / 3 < 0


# Steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [pgd, cw])
@pytest.mark.parametrize(
    ("step_size", "message"),
    [
        (2, r"did you mean 2 / 255\?"),
        (torch.tensor(2.0), r"did you mean 2 / 255\?"),
        (torch.tensor(-2 / 255), r"`step_size` must lie in \(0.0, inf\)"),
        (torch.tensor(0.0), r"`step_size` must lie in \(0.0, inf\)"),
        (torch.tensor(float("nan")), r"`step_size` must lie in \(0.0, inf\)"),
        (torch.full((5,), 0.1), r"floating-point numbers of shape \(6,\), got torch.float32 of shape \(5,\)"),
        (torch.tensor([0.1] * 5 + [0.0]), "every `step_size` must be positive and finite"),
        (torch.tensor([0.1] * 5 + [float("inf")]), "every `step_size` must be positive and finite"),
        (torch.tensor([2 / 255] * 5 + [2.0]), r"did you mean 2 / 255\?"),
    ],
    ids=range(9),
)
def test_a_step_that_is_no_step_is_refused(attack, step_size, message):
    with pytest.raises(ValueError, match=f"^{attack.__name__}: .*{message}"):
        attack(Net(), images(), classes_of(), Linf(8 / 255), step_size=step_size)


@pytest.mark.parametrize(
    "threat",
    [
        Linf(torch.full((6,), 8 / 255)),
        Linf(torch.full((1, 3, 1, 1), 8 / 255)),
        Linf(8 / 255, bounds=(torch.zeros(1, 3, 1, 1), 1.0)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("step_size", [2, torch.full((6,), 2.0)], ids=["number", "each"])
def test_a_step_in_255ths_is_noticed_with_tensors_for_budget_and_bounds(threat, step_size):
    with pytest.raises(ValueError, match=r"^pgd: .*did you mean 2 / 255\?"):
        pgd(Net(), images(), classes_of(), threat, step_size=step_size)


def test_long_steps_of_other_norms_are_none_in_255ths():
    for threat in (L2(2.0), L1(12.0)):
        pgd(Net(), images(), classes_of(), threat, step_size=2.5)


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_a_budget_of_zero_gives_the_inputs_back(kind):
    x = images()
    assert torch.equal(pgd(Net(), x, classes_of(), kind(0.0)), x)
    assert torch.equal(fgsm(Net(), x, classes_of(), kind(0.0)), x)
    for eps in (torch.zeros(6), torch.zeros(1, 3, 1, 1), torch.zeros(6, 1, 1, 1)):
        assert torch.equal(pgd(Net(), x, classes_of(), kind(eps), step_size=0.0), x)
        assert torch.equal(n_fgsm(Net(), x, classes_of(), kind(eps)), x)
        assert torch.equal(friendly_pgd(Net(), x, classes_of(), kind(eps), steps=2), x)
    assert torch.equal(pure_pgd(Net().eval(), x, classes_of(), kind(0.0), x, step_size=0.0), x)


# Losses -------------------------------------------------------------------------------------------------------------


def test_a_loss_for_a_batch_goes_on_with_the_samples_that_stay():
    x, labels = images(24), classes_of(24)
    net = Pointwise()
    reference = net(x).detach()
    run = [pgd(net, x, labels, Linf(0.3), steps=6, start=x + 0.01, keep="best", loss=kl_to(reference), early_stop=stop,
               verdict=True) for stop in (False, True)]  # fmt: skip
    assert 0 < run[1].success.sum() < 24
    assert torch.equal(run[0].success, run[1].success)


class Selective:
    """A loss of the user's own that holds a weight for each sample."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, logits, labels):
        assert len(logits) == len(self.weights)
        return self.weights * nn.functional.cross_entropy(logits, labels, reduction="none")

    def select(self, rows):
        return Selective(self.weights[rows])


@pytest.mark.parametrize("targeted", [False, True])
def test_a_loss_of_the_users_own_is_asked_for_the_samples_that_stay(targeted):
    x, labels = images(24), classes_of(24)
    options = {"targets": (labels + 1) % 5} if targeted else {}
    loss = Selective(torch.linspace(0.5, 2, 24, dtype=torch.float64))
    found = pgd(
        Pointwise(), x, labels, Linf(0.3), steps=6, keep="best", early_stop=True, loss=loss, verdict=True, **options
    )
    assert 0 < found.success.sum() < 24


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.zeros(6)], ids=["int", "float", "tensor", "each"])
@pytest.mark.parametrize("threat", [Linf(0), L2(0.0)], ids=repr)
def test_a_step_of_0_is_for_a_budget_of_0(threat, zero):
    x = torch.rand(6, 3, generator=generator(0))
    labels = torch.zeros(6, dtype=torch.long)
    model = nn.Linear(3, 2)
    assert torch.equal(pgd(model, x, labels, threat, step_size=zero), x)
    with pytest.raises(ValueError, match=r"^pgd: .*`step_size` must"):
        pgd(model, x, labels, dataclasses.replace(threat, eps=0.1), step_size=zero)


def test_each_sample_has_the_step_of_its_budget():
    x = torch.full((3, 2), 0.5)
    eps = torch.tensor([0.0, 0.1, 0.2])
    found = pgd(nn.Linear(2, 2), x, torch.zeros(3, dtype=torch.long), Linf(eps), step_size=eps / 4, start="clean")
    assert torch.equal((found != x).any(dim=1), eps > 0)
    with pytest.raises(ValueError, match=r"^pgd: every `step_size` must"):
        pgd(nn.Linear(2, 2), x, torch.zeros(3, dtype=torch.long), Linf(eps), step_size=torch.tensor([0.0, 0.0, 0.1]))
