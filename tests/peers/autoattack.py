"""AutoAttack and its parts."""

import torch

from perceptual_at import (
    Linf,
    SampleGenerator,
    apgd,
    auto_attack,
    dlr,
    fab,
    square,
)
from perceptual_at.attacks.protocol import composition_of
from perceptual_at.divergences import cross_entropy
from tests.peers.listing import (
    NORMS,
    Images,
    Slab,
    expected,
    flat_case,
    images,
    is_inside,
    points,
    refused,
    threat_of,
)


def heard(model, x, labels, version=("apgd-ce",), threat=None):
    """The warnings of a short AutoAttack."""
    return " ".join(auto_attack(model, x, labels, threat or Linf(0.05), version=list(version), verdict=True).warnings)


@expected("AutoAttack", "an honest model is not warned of")
def _():
    model, x, labels = flat_case(n=40)
    assert heard(model, x, labels) == ""


@expected("AutoAttack", "a random model is warned of")
def _():
    model, x, labels = flat_case()
    assert "the model is random" in heard(lambda z: model(z + 0.1 * torch.randn_like(z)), x, labels)


@expected("AutoAttack", "a softmax in the model is warned of")
def _():
    model, x, labels = flat_case()
    assert "probabilities, not logits" in heard(lambda z: model(z).softmax(dim=1), x, labels)


@expected("AutoAttack", "gradients of exactly zero are warned of, with their number")
def _():
    model, x, labels = flat_case()
    assert "exactly zero for 8 of 8" in heard(lambda z: model(z.detach() + 0 * z), x, labels)


@expected("AutoAttack", "a model that takes gradients in its forward pass is warned of")
def _():
    model, x, labels = flat_case()

    def adapts(z):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(leaf).sum(), leaf)
        return model(z - 0 * slope)

    assert "computes gradients in its forward pass" in heard(adapts, x, labels)


@expected("AutoAttack", "success of Square on a masked model is warned of, with its queries")
def _():
    model = Images().eval()
    x = points(24, 40, 3, 4, 4)
    hidden = lambda z: model(z.detach() + 0 * z)  # noqa: E731
    said = heard(hidden, x, model(x).argmax(dim=1), ("apgd-ce", ("square", {"queries": 60})), Linf(0.3))
    assert "with 60 queries after the attacks before it had failed" in said


@expected(
    "AutoAttack",
    "any number of classes will do, and few are said so",
    classes={str(k): k for k in (2, 3, 4, 5, 9, 10, 30)},
)
def _(classes):
    model, x, labels = flat_case(n=4, classes=classes)
    short = [("apgd-ce", {"steps": 3}), ("apgd-t", {"steps": 3}), ("fab-t", {"steps": 3}), ("square", {"queries": 5})]
    verdict = auto_attack(model, x, labels, Linf(0.05), version=short, verdict=True)
    assert bool(verdict.protocol.notes) == (classes < 10)


@expected(
    "AutoAttack", "a version that does not exist is refused", wrong={"name": "strong", "attack": ["pgd"], "empty": []}
)
def _(wrong):
    model, x, labels = flat_case()
    refused(lambda: auto_attack(model, x, labels, Linf(0.1), version=wrong), "`version`")


@expected("AutoAttack", "attacks run in the order of the list, each on what is left")
def _():
    model, x, labels = flat_case(n=16)
    verdict = auto_attack(
        model, x, labels, Linf(0.1), version=[("apgd-ce", {"steps": 5}), ("fab", {"steps": 5})], verdict=True
    )
    shares = list(verdict.robust_after.values())
    assert list(verdict.robust_after) == ["clean", "apgd-ce", "fab"]
    assert shares == sorted(shares, reverse=True)


@expected("AutoAttack", "the size of the batches does not change a verdict", size={str(n): n for n in (1, 3, 16)})
def _(size):
    model, x, labels = flat_case(n=16, dtype=torch.float64)
    found = [
        auto_attack(
            model,
            x,
            labels,
            Linf(0.05),
            version=[("apgd-ce", {"steps": 5})],
            batch_size=n,
            verdict=True,
            generator=SampleGenerator(0, torch.arange(16)),
        ).success
        for n in (16, size)
    ]
    assert torch.equal(*found)


@expected("AutoAttack", "robust samples come back as they went in", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    verdict = auto_attack(model, x, labels, kind(1e-5), version=[("apgd-ce", {"steps": 3})], verdict=True)
    assert torch.equal(verdict.x_adv[~verdict.success], x[~verdict.success])


@expected(
    "AutoAttack",
    "every norm has its versions",
    kind=NORMS,
    version={"standard": "standard", "plus": "plus", "rand": "rand"},
)
def _(kind, version):
    names = [name for name, _ in composition_of(version, kind.__name__, 10)]
    assert names[0] == "apgd-ce"
    assert ("square" in names) == (version != "rand")


@expected("AutoAttack", "only the published composition bears the name")
def _():
    model, x, labels = flat_case(n=1)
    verdict = auto_attack(model, x, labels, Linf(0.05), version=["apgd-ce"], verdict=True)
    assert verdict.protocol.name.startswith("custom")


@expected("AutoAttack, torchattacks", "the search without gradients keeps to its queries", kind=NORMS)
def _(kind):
    x, labels = images()
    verdict = square(Images().eval(), x, labels, threat_of(kind), queries=30, verdict=True)
    assert int(verdict.forwards.max()) <= 32  # the clean point and the start are looked at too
    assert int(verdict.gradients.max()) == 0


@expected("AutoAttack", "the search without gradients needs none", kind=NORMS)
def _(kind):
    model, x, labels = flat_case()
    with torch.no_grad():
        x_adv = square(lambda z: model(z).detach().round(decimals=2), x, labels, threat_of(kind), queries=30)
    assert is_inside(threat_of(kind), x_adv, x)


@expected(
    "AutoAttack, torchattacks",
    "images need not be square or coloured",
    shape={"tall": (1, 9, 3), "wide": (2, 3, 8), "one": (1, 1, 5)},
)
def _(shape):
    model, x, labels = flat_case(layout=shape)
    assert is_inside(Linf(0.1), square(model, x, labels, Linf(0.1), queries=20), x)


@expected(
    "AutoAttack", "the ascent of APGD keeps the best point it saw", loss={"cross entropy": cross_entropy, "dlr": dlr}
)
def _(loss):
    model, x, labels = flat_case()
    noise = SampleGenerator(0, torch.arange(8))
    few, many = (apgd(model, x, labels, Linf(0.02), loss=loss, steps=steps, generator=noise) for steps in (4, 40))
    assert bool(loss(model(many), labels).mean() >= loss(model(few), labels).mean() - 1e-6)


@expected("AutoAttack", "FAB gives points at the boundary, not at the edge of the ball", kind=NORMS)
def _(kind):
    model = Slab(10)
    x = 0.5 + 0.05 * (0.5 + points(25, 8, 10, dtype=torch.float64))
    threat = kind(0.5 if kind is Linf else 5.0)
    x_adv = fab(model, x, torch.zeros(8, dtype=torch.long), threat, steps=20)
    assert bool((threat.norm(x_adv - x) < 0.9 * threat.eps).all())
