"""Attacks on dense outputs and on anything else that a loss can be computed of."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import perceptual_at as pat
from perceptual_at import L2, Linf, fgsm, frozen, margin, pgd, pure_pgd
from perceptual_at.attacks import cospgd_loss, segpgd_loss
from perceptual_at.divergences import cross_entropy
from perceptual_at.evaluation import bootstrap_interval, evaluate
from perceptual_at.metrics import accuracy, confusion_counts, mean_iou, pixel_accuracy
from tests.strategies import generator, integers, normal, uniform

exactly = functools.partial(assert_close, rtol=1e-12, atol=1e-12)
EPS = 0.1


def pixelwise(classes=2):
    """A linear model of each pixel."""
    torch.manual_seed(0)
    return nn.Conv2d(3, classes, 1).double()


def problem(classes=2, size=(4, 5)):
    x, labels = uniform(1, 6, 3, *size, low=0.2, high=0.8), integers(2, 6, *size, below=classes)
    labels[0, 0] = labels[1] = -100
    return x, labels


def convolutional():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)).double()


# The best there is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy, margin, functools.partial(segpgd_loss, wrong_weight=0.3), cospgd_loss])
def test_pgd_reaches_the_closed_form_of_a_linear_model_of_each_pixel(loss):
    model, (x, labels) = pixelwise(), problem()
    weight, bias = model.weight.detach()[..., 0, 0], model.bias.detach()
    right = labels.clamp_min(0)
    logits = torch.einsum("kc,bchw->bkhw", weight, x) + bias[:, None, None]
    gap = (logits.gather(1, 1 - right[:, None]) - logits.gather(1, right[:, None]))[:, 0]
    best = gap + EPS * (weight[0] - weight[1]).abs().sum()  # two classes: every pixel has one best direction
    counted = labels >= 0
    expected = (best * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)
    x_adv = pgd(model, x, labels, Linf(EPS), steps=4, loss=loss, start="clean")
    exactly(margin(model(x_adv), labels), expected)
    assert torch.equal(x_adv[1], x[1])  # nothing is labelled there
    assert torch.equal(x_adv[0, :, 0], x[0, :, 0])


def test_fgsm_and_the_pure_form_agree_with_pgd():
    model, (x, labels) = convolutional().eval(), problem(4)
    once = pgd(model, x, labels, Linf(EPS), steps=1, step_size=EPS, start="clean")
    assert torch.equal(fgsm(model, x, labels, Linf(EPS)), once)
    for threat in (Linf(EPS), L2(0.5)):
        start = threat.random_start(x, generator=generator(0))
        assert torch.equal(
            pure_pgd(model, x, labels, threat, start, steps=3), pgd(model, x, labels, threat, start=start, steps=3)
        )


def test_a_sample_does_not_depend_on_its_batch():
    model, (x, labels) = convolutional(), problem(4)
    together = pgd(model, x, labels, Linf(EPS), start="clean")
    alone = torch.cat([pgd(model, x[i : i + 1], labels[i : i + 1], Linf(EPS), start="clean") for i in range(6)])
    exactly(together, alone)


def test_kl_to_a_dense_reference_moves_labelled_places():
    model, (x, labels) = pixelwise(), problem()
    with torch.no_grad(), frozen(model) as f:
        reference = f(x)
    x_adv = pgd(model, x, labels, Linf(EPS), loss=pat.kl_to(reference), start=x + 0.001)
    with torch.no_grad():
        moved = pat.kl_divergence(reference, model(x_adv), mask=labels >= 0)
    assert (moved[[0, 2, 3, 4, 5]] > 1e-4).all()


def test_targeted_dense_attacks_descend():
    model, (x, labels) = convolutional(), problem(4)
    targets = torch.where(labels >= 0, (labels + 1) % 4, labels)
    x_adv = pgd(model, x, labels, Linf(EPS), targets=targets)
    with torch.no_grad():
        before, after = (cross_entropy(model(v), targets) for v in (x, x_adv))
    assert (after[[0, 2, 3, 4, 5]] < before[[0, 2, 3, 4, 5]]).all()


def test_more_steps_restarts_and_budget_never_help_the_model_on_the_whole():
    model, (x, labels) = convolutional(), problem(4)

    def reached(**options):
        eps = options.pop("eps", EPS)
        x_adv = pgd(model, x, labels, Linf(eps), keep="best", generator=generator(0), **options)
        with torch.no_grad():
            return cross_entropy(model(x_adv), labels).mean()

    assert reached(steps=1) < reached(steps=5) < reached(steps=20) + 1e-9
    assert reached(steps=5) <= reached(steps=5, restarts=3)
    assert reached(eps=0.02) < reached(eps=0.05) < reached(eps=0.1)


# Other tasks ------------------------------------------------------------------------------------------------------


def squared(outputs, labels):
    return (outputs.flatten(1) - labels.flatten(1)).square().mean(dim=1)


def multi_label(outputs, labels):
    return nn.functional.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="none").mean(1)


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (uniform(3, 4, 5), squared), (uniform(3, 4, 5) * 9 - 4, squared), (integers(3, 4, 5, below=2), multi_label),
        (integers(3, 4, 5, below=2).bool(), multi_label), (integers(3, 4, 5, below=2).to(torch.uint16), multi_label),
    ],
    ids=["shares", "numbers", "multi-hot", "truth values", "uint16"],
)  # fmt: skip
@pytest.mark.parametrize("attack", [pgd, fgsm])
def test_a_loss_of_the_users_own_is_all_that_is_needed(attack, labels, loss):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double(), uniform(4, 4, 7)
    x_adv = attack(model, x, labels, Linf(0.1), loss=loss, start="clean")
    with torch.no_grad():
        assert (loss(model(x_adv), labels) > loss(model(x), labels)).all()


def test_outputs_may_be_of_any_kind():
    torch.manual_seed(0)
    body, head = nn.Linear(7, 5).double(), nn.Linear(5, 1).double()

    def model(x):
        features = body(x).tanh()
        return {"features": features, "score": (head(features), features.sum(1))}

    def loss(outputs, labels):
        return (outputs["score"][0][:, 0] - labels).square() + outputs["score"][1]

    x, labels = uniform(4, 4, 7), uniform(5, 4)
    x_adv = pgd(model, x, labels, Linf(0.1), loss=loss, start="clean", steps=3)
    assert torch.equal(pure_pgd(model, x, labels, Linf(0.1), x, loss=loss, steps=3), x_adv)
    assert (loss(model(x_adv), labels) > loss(model(x), labels)).all()


@pytest.mark.parametrize(
    ("labels", "kind", "says"),
    [
        (integers(0, 6, 4, 4, below=4), ValueError, r"`labels` must be .* of shape \(6, 4, 5\) for logits"),
        (
            integers(0, 6, below=4),
            ValueError,
            r"`labels` must be .* of shape \(6, 4, 5\) for logits .* got shape \(6,\)",
        ),
        (
            integers(0, 6, 8, 10, below=4),
            ValueError,
            r"`labels` .* got shape \(6, 8, 10\). Let the model resize its logits",
        ),
        (integers(0, 6, 1, 4, 5, below=4), ValueError, r"`labels` .* `labels.squeeze\(1\)` has it"),
        (integers(0, 6, 4, 4, 5, below=2), ValueError, r"`labels` .* one-hot ones, `labels.argmax\(dim=1\)` has it"),
        (integers(0, 6, 4, 5, below=9), ValueError, r"`labels` must lie in \[0, 3\]"),
        (
            normal(0, 6, 4, 4, 5),
            ValueError,
            r"`labels` .* class probabilities, at least 0 and of sum 1 .* `loss` of your own",
        ),
        (
            uniform(0, 6, 4, 5),
            ValueError,
            r"`labels` .* shape of the logits, .* A mask of class indices .* `.long\(\)`",
        ),
        (uniform(0, 6), TypeError, "`labels` must be integer class indices"),
        (integers(0, 5, 4, 5, below=4), ValueError, "`labels` has 5 rows but `x` has 6 samples"),
    ],
    ids=[
        "size",
        "per sample",
        "resolution",
        "a channel",
        "one-hot",
        "range",
        "numbers",
        "float places",
        "floats",
        "rows",
    ],
)
def test_labels_that_do_not_fit_are_named(labels, kind, says):
    x, _ = problem(4)
    with pytest.raises(kind, match=f"pgd: {says}"):
        pgd(convolutional(), x, labels, Linf(EPS))


def test_one_logit_says_how_to_get_two():
    x, labels = problem()
    with pytest.raises(ValueError, match=r"One logit z for two classes is the pair \[0, z\]"):
        pgd(nn.Conv2d(3, 1, 1).double(), x, labels, Linf(EPS))


# Measured ---------------------------------------------------------------------------------------------------------


def plain_counts(logits, labels, classes):
    counts = torch.zeros(len(labels), classes, classes, dtype=torch.long)
    for row, (z, marks) in enumerate(zip(logits, labels, strict=True)):
        for guess, mark in zip(z.argmax(0).flatten().tolist(), marks.flatten().tolist(), strict=True):
            if mark >= 0:
                counts[row, mark, guess] += 1
    return counts


def test_counts_accuracy_and_iou_are_those_of_a_loop_over_places():
    z, (_, labels) = normal(0, 6, 4, 4, 5), problem(4)
    counts = confusion_counts(z, labels)
    assert torch.equal(counts, plain_counts(z, labels, 4))
    shares = [float(c.diagonal().sum() / c.sum()) if c.sum() else 0.0 for c in counts]
    assert pixel_accuracy(z, labels).tolist() == pytest.approx(shares)
    assert accuracy(z, labels).item() == pytest.approx(sum(shares) / 6)
    total = counts.sum(0)
    ious = [float(total[k, k] / (total[k].sum() + total[:, k].sum() - total[k, k])) for k in range(4)]
    assert mean_iou(total).item() == pytest.approx(sum(ious) / 4)
    assert mean_iou(torch.zeros(3, 3, dtype=torch.long)) == 0
    assert pixel_accuracy(torch.full_like(z, torch.nan), labels).max() == 0
    exactly(mean_iou(counts)[2], mean_iou(counts[2]))


@pytest.mark.slow
def test_the_mean_iou_is_that_of_torchmetrics():
    segmentation = pytest.importorskip("torchmetrics.classification", reason="an independent reference")
    z, (_, labels) = normal(0, 6, 4, 4, 5), problem(4)
    reference = segmentation.MulticlassJaccardIndex(4, ignore_index=-100)
    assert mean_iou(confusion_counts(z, labels).sum(0)).item() == pytest.approx(reference(z, labels).item())


@pytest.mark.slow
def test_the_bootstrap_covers_a_normal_mean_and_takes_any_statistic():
    hits = 0
    for seed in range(60):
        low, high = bootstrap_interval(normal(seed, 80), draws=200, seed=seed)
        hits += low <= 0 <= high
    assert 50 <= hits <= 60
    counts = plain_counts(normal(0, 6, 4, 4, 5), problem(4)[1], 4)
    low, high = bootstrap_interval(counts, statistic=lambda some: mean_iou(some.sum(0)), draws=100)
    assert low < mean_iou(counts.sum(0)) < high
    with pytest.raises(ValueError, match="bootstrap_interval: `values`"):
        bootstrap_interval(torch.zeros(0))


def test_evaluate_reports_pixel_accuracies_and_the_worst_of_each_image():
    model, (x, labels) = convolutional(), problem(4)
    with torch.no_grad():
        labels = torch.where(labels >= 0, model(x).argmax(1), labels)
        labels[3] = (labels[3] + 1) % 4
    attacks = {
        "pgd": functools.partial(pgd, threat=Linf(EPS), steps=3),
        "cospgd": functools.partial(pgd, threat=Linf(EPS), steps=3, loss=cospgd_loss),
    }
    result = evaluate(model, [(x[:4], labels[:4]), (x[4:], labels[4:])], attacks, progress=False)
    with torch.no_grad():
        assert result.clean_accuracy == pytest.approx(pixel_accuracy(model(x), labels).mean().item())
    assert result.worst_case <= min(result.robust_accuracy.values())
    for name in attacks:
        assert 0 <= result.robust_accuracy[name] <= result.clean_accuracy
