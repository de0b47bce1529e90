"""Labels, models, losses, normalisation."""

import copy
import pickle
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import (
    Linf,
    SampleGenerator,
    apgd,
    dlr,
    fab,
    fgsm,
    kl_to,
    margin,
    pgd,
    square,
    targeted_dlr,
)
from perceptual_at.divergences import cross_entropy, squared_error
from perceptual_at.models import Normalize, normalized
from tests.peers.listing import (
    ATTACKS,
    FLOATS,
    NORMS,
    TARGETED,
    Images,
    expected,
    flat_case,
    images,
    is_inside,
    normals,
    points,
    refused,
    still_right,
    threat_of,
)


@expected("cleverhans", "labels may be one-hot probabilities", attack={"pgd": pgd, "fgsm": fgsm})
def _(attack):
    model, x, labels = flat_case()
    options = {} if attack is fgsm else {"start": "clean"}
    found = [attack(model, x, one, Linf(0.1), **options) for one in (labels, functional.one_hot(labels, 4).float())]
    assert_close(*found, rtol=0, atol=1e-6)


@expected(
    "advertorch, foolbox",
    "labels may be integers of any kind",
    attack=ATTACKS,
    dtype={str(dtype): dtype for dtype in (torch.int32, torch.uint8, torch.int16)},
)
def _(attack, dtype):
    x, labels = images()
    noise = {} if attack is fgsm else {"generator": SampleGenerator(0, torch.arange(6))}
    found = [attack(Images().eval(), x, one, Linf(0.1), **noise) for one in (labels, labels.to(dtype))]
    assert torch.equal(*found)


@expected("foolbox", "labels of another number of samples are refused", attack=ATTACKS)
def _(attack):
    x, labels = images()
    refused(lambda: attack(Images().eval(), x, torch.cat([labels, labels]), Linf(0.1)), "`labels`")


@expected("foolbox", "targets of another number of samples are refused", attack=TARGETED)
def _(attack):
    x, labels = images()
    refused(lambda: attack(Images().eval(), x, labels, Linf(0.1), targets=torch.cat([labels, labels])), "`targets`")


@expected("foolbox, AutoAttack", "labels and targets that are no class are refused", attack=TARGETED)
def _(attack):
    x, labels = images()
    refused(lambda: attack(Images().eval(), x, labels + 4, Linf(0.1)), "`labels`")
    refused(lambda: attack(Images().eval(), x, labels, Linf(0.1), targets=labels - 5), "`targets`")


@expected("cleverhans, advertorch", "any callable is a model", attack=ATTACKS)
def _(attack):
    x, labels = images()
    model = Images().eval()
    assert is_inside(Linf(0.1), attack(lambda z: model(z), x, labels, Linf(0.1)), x)


@expected("foolbox", "what cannot be called is no model", attack=ATTACKS)
def _(attack):
    x, labels = images()
    refused(lambda: attack("model", x, labels, Linf(0.1)), "`model`", TypeError)


@expected(
    "cleverhans",
    "a model that gives no logits is refused with a way out",
    attack=ATTACKS,
    output={"dict": lambda z: {"probs": z.softmax(1)}, "tuple": lambda z: (z, z), "text": lambda z: "logits"},
)
def _(attack, output):
    x, labels = images()
    model = Images().eval()
    refused(lambda: attack(lambda z: output(model(z)), x, labels, Linf(0.1)), "must return")


@expected(
    "AutoAttack",
    "a model of one logit is refused with a way out",
    attack={name: ATTACKS[name] for name in ATTACKS if name != "fab"},
)
def _(attack):
    x, labels = images()
    model = Images().eval()
    refused(lambda: attack(lambda z: model(z)[:, :1], x, 0 * labels, Linf(0.1)), "logits|classes")


@expected("cleverhans, foolbox", "inputs must be floating-point numbers", attack=ATTACKS)
def _(attack):
    x, labels = images()
    refused(lambda: attack(Images().eval(), (255 * x).to(torch.uint8), labels, Linf(0.1)), "`x`", TypeError)


@expected("foolbox", "a loss that nobody knows is refused", attack={"pgd": pgd, "apgd": apgd})
def _(attack):
    model, x, labels = flat_case()
    refused(lambda: attack(model, x, labels, Linf(0.1), loss="invalid"), "`loss`")


@expected(
    "foolbox, cleverhans",
    "counts must be positive",
    attack={
        "pgd": partial(pgd, steps=0),
        "apgd": partial(apgd, steps=0),
        "square": partial(square, queries=0),
        "fab": partial(fab, steps=0),
        "restarts": partial(pgd, restarts=0),
        "eot": partial(pgd, eot=0),
    },
)
def _(attack):
    x, labels = images()
    refused(lambda: attack(Images().eval(), x, labels, Linf(0.1)), "must be at least 1", ValueError)


@expected("torchattacks", "an option that does not exist is an error", attack=ATTACKS)
def _(attack):
    x, labels = images()
    refused(lambda: attack(Images().eval(), x, labels, Linf(0.1), alpha=2 / 255), "alpha", TypeError)


@expected(
    "advertorch",
    "a loss of one's own is ascended",
    attack={"pgd": pgd, "apgd": apgd},
    loss={"cross entropy": functional.cross_entropy, "margin": lambda z, y, **_: margin(z, y)},
)
def _(attack, loss):
    model, x, labels = flat_case()
    own = lambda logits, labels: loss(logits, labels, reduction="none")  # noqa: E731
    x_adv = attack(model, x, labels, Linf(0.1), steps=4, loss=own)
    assert bool((own(model(x_adv), labels) > own(model(x), labels)).any())


@expected(
    "advertorch",
    "outputs are moved towards those of a guide",
    criterion={
        "squared": lambda a, b: squared_error(a, b),
        "smooth l1": lambda a, b: functional.smooth_l1_loss(a, b, reduction="none").mean(dim=1),
    },
)
def _(criterion):
    model, x, _ = flat_case()
    guide = model(x.flip(0)).detach()
    towards = lambda outputs, wanted: -criterion(outputs, wanted)  # noqa: E731
    x_adv = pgd(model, x, guide, Linf(0.2), steps=10, loss=towards, start="clean")
    assert bool((criterion(model(x_adv), guide) <= criterion(model(x), guide)).all())


@expected("torchattacks", "the attack of TRADES moves predictions away from the clean ones")
def _():
    model, x, labels = flat_case()
    loss = kl_to(model(x).detach())
    x_adv = pgd(model, x, labels, Linf(0.1), steps=5, loss=loss)
    assert bool((loss(model(x_adv), labels) > 0).all())


@expected("advertorch, torchattacks", "the margin is positive exactly where the class is wrong", dtype=FLOATS)
def _(dtype):
    logits, labels = normals(16, 50, 5, dtype=dtype), torch.arange(50) % 5
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(dim=1) != labels)


@expected(
    "AutoAttack",
    "DLR does not change with scale and shift of the logits",
    loss={"dlr": dlr, "targeted": lambda z, y: targeted_dlr(z, y, (y + 1) % 5)},
)
def _(loss):
    logits, labels = normals(17, 30, 5), torch.arange(30) % 5
    assert_close(loss(7 * logits + 3, labels), loss(logits, labels))


@expected("advertorch", "losses give one value per sample, those of torch")
def _():
    logits, labels = normals(18, 30, 5), torch.arange(30) % 5
    assert_close(cross_entropy(logits, labels), functional.cross_entropy(logits, labels, reduction="none"))


@expected("advertorch", "a step without derivative is attacked through a smooth stand-in")
def _():
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return (8 * z).round() / 8

        @staticmethod
        def backward(ctx, grad):
            return grad

    model, x, _ = flat_case()
    hard, through = (lambda z: model((8 * z).round() / 8)), (lambda z: model(Rounded.apply(z)))
    labels = hard(x).argmax(dim=1)
    left = [still_right(hard, pgd(f, x, labels, Linf(0.2), start="clean"), labels) for f in (hard, through)]
    assert left[1] < left[0] == 8


STATISTICS = {"grey": ((0.1307,), (0.3081,)), "colour": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))}


@expected(
    "advertorch, torchattacks, foolbox", "the normalising layer subtracts and divides by channel", statistics=STATISTICS
)
def _(statistics):
    mean, std = statistics
    x = points(19, 16, len(mean), 8, 8)
    ours = Normalize(mean, std)(x)
    for channel in range(len(mean)):
        assert_close(ours[:, channel], (x[:, channel] - mean[channel]) / std[channel])


@expected("advertorch", "gradients go through the normalising layer")
def _():
    x = points(20, 2, 1, 4, 4).requires_grad_()
    (Normalize((0.0,), (0.5,))(x) ** 2).sum().backward()
    assert_close(x.grad, 8 * x.detach())


@expected(
    "foolbox",
    "means and deviations of different length are refused",
    wrong={"three and two": ((0, 0, 0), (1, 1)), "no deviation": ((0, 0, 0), (0, 0, 0)), "text": ("mean", "std")},
)
def _(wrong):
    refused(lambda: Normalize(*wrong), "Normalize: ")


@expected("torchattacks, foolbox", "a normalised network is attacked in the units of the images", kind=NORMS)
def _(kind):
    network, x = Images().eval(), points(21, 6, 3, 4, 4)
    mean, std = STATISTICS["colour"]
    model = normalized(network, mean, std).eval()
    labels = model(x).argmax(dim=1)
    shift, scale = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (mean, std))
    ours = pgd(model, x, labels, threat_of(kind), steps=4, start="clean")
    by_hand = pgd(lambda z: network((z - shift) / scale), x, labels, threat_of(kind), steps=4, start="clean")
    assert_close(ours, by_hand, rtol=0, atol=1e-5)
    assert is_inside(threat_of(kind), ours, x)


@expected("cleverhans", "wrapped models can be copied and pickled")
def _():
    model = normalized(nn.Flatten(), *STATISTICS["colour"])
    x = points(22, 2, 3, 4, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
