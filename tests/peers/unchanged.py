"""The same results again, and what must stay as it was."""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import (
    Linf,
    SampleGenerator,
    apgd,
    cw,
    fgsm,
    pgd,
)
from tests.peers.listing import (
    ATTACKS,
    DRAWS,
    GRADIENT,
    NORMS,
    Images,
    expected,
    images,
    is_inside,
    refused,
    threat_of,
)
from tests.strategies import generator


@expected("advertorch, AutoAttack", "one seed gives one result, another another", attack=DRAWS)
def _(attack):
    x, labels = images()
    model = Images().eval()
    first, again, other = (attack(model, x, labels, Linf(0.1), generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@expected(
    "advertorch, AutoAttack",
    "a sample is attacked alike alone and in a batch",
    attack=ATTACKS,
    kind=NORMS,
    row={"first": 0, "middle": 3, "last": 5},
)
def _(attack, kind, row):
    x, labels = images(dtype=torch.float64)
    model = Images().eval().double()

    def run(rows):
        options = {} if attack is fgsm else {"generator": SampleGenerator(0, rows)}
        return attack(model, x[rows], labels[rows], threat_of(kind), **options)

    assert_close(run(torch.arange(6))[row : row + 1], run(torch.tensor([row])), rtol=0, atol=1e-9)


@expected(
    "torchattacks, AutoAttack",
    "the random numbers of the program are left alone where a generator is given",
    attack={name: ATTACKS[name] for name in ("pgd", "apgd", "square", "auto_attack")},
)
def _(attack):
    x, labels = images()
    before = torch.get_rng_state()
    attack(Images().eval(), x, labels, Linf(0.1), generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@expected("advertorch", "inputs, labels and targets stay untouched", attack=ATTACKS)
def _(attack):
    x, labels = images()
    given = x.clone(), labels.clone()
    attack(Images().eval(), x, labels, Linf(0.1))
    assert torch.equal(x, given[0])
    assert torch.equal(labels, given[1])


@expected("torchattacks, foolbox", "train mode comes back, module by module", attack=ATTACKS)
def _(attack):
    x, labels = images()
    model = Images().train()
    model.features[1].eval()
    before = [part.training for part in model.modules()]
    attack(model, x, labels, Linf(0.1))
    assert [part.training for part in model.modules()] == before


@expected(
    "torchattacks, foolbox, RobustBench", "a model in train mode is attacked as it is in eval mode", attack=GRADIENT
)
def _(attack):
    x, labels = images()
    options = {} if attack is fgsm else {"generator": SampleGenerator(0, torch.arange(6))}
    found = [attack(Images().train(mode), x, labels, Linf(0.1), **options) for mode in (True, False)]
    assert torch.equal(*found)


@expected(
    "torchattacks", "a model can be attacked in train mode on request", attack={"pgd": pgd, "cw": cw, "apgd": apgd}
)
def _(attack):
    x, labels = images()
    seen = []
    model = Images().train()
    model.features[4].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    attack(model, x, labels, Linf(0.1), steps=2, model_mode="as_is")
    assert all(seen)


@expected("torchattacks, foolbox", "statistics of batch norm stay as they were", attack=ATTACKS)
def _(attack):
    x, labels = images()
    model = Images().train()
    before = copy.deepcopy(model.state_dict())
    attack(model, x, labels, Linf(0.1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@expected("advertorch, torchattacks", "parameters get no gradient and keep the one they had", attack=ATTACKS)
def _(attack):
    x, labels = images()
    model = Images().eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    attack(model, x, labels, Linf(0.1))
    assert bool((model.head.weight.grad == 1).all())
    assert model.head.bias.grad is None


@expected("foolbox", "which parameters want gradients is as it was", attack=ATTACKS)
def _(attack):
    x, labels = images()
    model = Images().eval()
    model.head.bias.requires_grad_(False)
    before = [one.requires_grad for one in model.parameters()]
    attack(model, x, labels, Linf(0.1))
    assert [one.requires_grad for one in model.parameters()] == before


@expected("torchattacks", "modes come back after an error")
def _():
    x, labels = images()
    model = Images().train()
    model.head.forward = lambda z: (_ for _ in ()).throw(RuntimeError("broken"))
    refused(lambda: pgd(model, x, labels, Linf(0.1)), "broken", RuntimeError)
    assert all(part.training for part in model.modules())


@expected("foolbox, torchattacks", "results carry no graph", attack=ATTACKS)
def _(attack):
    x, labels = images()
    assert not attack(Images().eval(), x.requires_grad_(), labels, Linf(0.1)).requires_grad
    assert x.grad is None


@expected(
    "torchattacks",
    "attacks run inside no_grad and inference mode",
    attack=ATTACKS,
    context={"no_grad": torch.no_grad, "inference": torch.inference_mode},
)
def _(attack, context):
    x, labels = images()
    model = Images().eval()
    with context():
        assert is_inside(Linf(0.1), attack(model, x, labels, Linf(0.1)), x)


@expected("advertorch", "layers that work in place are no obstacle", attack=ATTACKS)
def _(attack):
    x, labels = images()
    model = nn.Sequential(nn.ReLU(inplace=True), Images()).eval()
    given = x.clone()
    attack(model, x, labels, Linf(0.1))
    assert torch.equal(x, given)


@expected("torchattacks", "inputs need not be contiguous", attack=ATTACKS)
def _(attack):
    x, labels = images()
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (turned, x.to(memory_format=torch.channels_last)):
        assert is_inside(Linf(0.1), attack(Images().eval(), other, labels, Linf(0.1)), x)
