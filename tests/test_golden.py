"""Values of the methods' released codes, reached through public functions and objectives only.

Losses and Linf attacks agree to 1e-9, gradients to 1e-8, Euclidean attacks to 1e-7 (the released codes' shrinking
divides by the norm plus 1e-7). Where a release adds a constant that ours does without, the expected value is first
moved by the exact effect of that constant, and the effect itself is bounded.
"""

import math

import pytest
import torch

from perceptual_at import (
    L2,
    Linf,
    boosted_cross_entropy,
    boundary_partition,
    call_with,
    consistency_loss,
    dicar_loss,
    ema_update,
    interpolate,
    kl_divergence,
    kl_to,
    margin,
    mart_loss,
    objectives,
    pgd,
    robust_perception_kl_loss,
    robust_perception_loss,
    trades_loss,
    weighted_kl_loss,
)
from perceptual_at.divergences import cross_entropy
from tests.golden import GOLDEN, cases, close, grads_match, inputs, tensor
from tests.tiny import Tiny, fixed_attack

# The constants of the releases ------------------------------------------------------------------------------------


def margin_shift(adv_logits, labels):
    """Ours minus the released margin term: log((1.0001 - p + 1e-12) / (1 - p)) for the strongest wrong class."""
    p = adv_logits.softmax(dim=1)
    wrong = p.scatter(1, labels[:, None], -1).amax(dim=1)
    return torch.log1p((1e-4 + 1e-12) / (1 - wrong))


def weighted_kl_shift(clean_logits, adv_logits, labels):
    """Ours minus the released weighted KL: 1e-12 in the logarithm, 1e-7 in the weight."""
    log_p, log_q = clean_logits.log_softmax(dim=1), adv_logits.log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    p_y = p.gather(1, labels[:, None]).squeeze(1)
    released = (p * (log_p - torch.log(q + 1e-12))).sum(dim=1) * (1.0000001 - p_y)
    return (p * (log_p - log_q)).sum(dim=1) * (1 - p_y) - released


def js_shift(logits_1, logits_2, temperature):
    """Ours minus the released JS, which clamps the mixture at 1e-8."""
    p, q = ((z / temperature).softmax(dim=1) for z in (logits_1, logits_2))
    m = (p + q) / 2
    return (m * (m.clamp_min(1e-8).log() - m.log())).sum(dim=1)


def test_the_releases_constants_matter_as_little_as_stated():
    case = next(c for c in GOLDEN["methods"]["mart"] if c["name"] == "loss_A_beta6")
    given = inputs(case)
    p = given["logits_adv"].softmax(dim=1).scatter(1, given["labels"][:, None], -1).amax(dim=1)
    shift = margin_shift(given["logits_adv"], given["labels"])
    assert (shift > 0).all()
    assert (shift <= 1.001e-4 / (1 - p)).all()  # at most 0.01 up to p = 0.99
    kl = kl_divergence(given["logits"], given["logits_adv"])
    wkl = weighted_kl_shift(given["logits"], given["logits_adv"], given["labels"])
    assert (wkl.abs() <= 1.1e-7 * kl + 1e-9).all()
    extreme = next(c for c in GOLDEN["methods"]["consistency"] if c["name"] == "js_C_extreme_T1")
    given = inputs(extreme)
    shift = js_shift(given["logits_1"], given["logits_2"], 1.0)
    classes = given["logits_1"].shape[1]
    assert (shift >= -1e-15).all()
    assert (shift <= classes * 1e-8 / math.e).all()
    assert shift.max() > 1e-9  # the case is one where the clamp acts


# Attacks ----------------------------------------------------------------------------------------------------------


class OffsetL2(L2):
    """Divides the gradient by its length plus 1e-8, as the TRADES and MART copies in Consistency-AT do."""

    def steepest(self, grad):
        return grad / (self.norm(grad) + 1e-8).reshape(-1, 1, 1, 1)


@cases("attack_pgd", only=lambda c: c["name"].startswith("advertorch"))
def test_pgd_of_the_rpat_and_raat_releases(case):
    given, h = inputs(case), case["hyperparameters"]
    model = given["model"]
    if "fc2_scale" in given:
        with torch.no_grad():
            model.fc2.weight.mul_(given["fc2_scale"])
            model.fc2.bias.mul_(given["fc2_scale"])
    # The release divides by at least 1e-6; the smallest gradient of these cases is just above that.
    threat = Linf(h["epsilon"]) if h["ord"] == "inf" else L2(h["epsilon"])
    x_adv = pgd(model, given["x"], given["labels"], threat, steps=h["steps"], step_size=h["step_size"], start="clean")
    close(x_adv, case["expected"]["x_adv"], 1e-9 if h["ord"] == "inf" else 1e-7)


@cases("attack_pgd", only=lambda c: c["name"].startswith("rebat"))
def test_pgd_of_the_rebat_release(case):
    given, h = inputs(case), case["hyperparameters"]
    threat = Linf(h["epsilon"]) if h["norm"] == "l_inf" else L2(h["epsilon"], projection="ball_box")
    x_adv = pgd(given["model"], given["x"], given["labels"], threat, steps=h["steps"], step_size=h["step_size"],
                start="clean")  # fmt: skip
    close(x_adv, case["expected"]["x_adv"], 1e-9 if h["norm"] == "l_inf" else 1e-7)
    close(x_adv - given["x"], case["expected"]["delta"], 1e-9 if h["norm"] == "l_inf" else 1e-7)


@cases("attack_trades")
def test_trades_attack(case):
    given, h = inputs(case), case["hyperparameters"]
    model, x = given["model"], given["x"]
    threat, atol, step_size = Linf(h["epsilon"]), 1e-9, h["step_size"]
    if h["distance"] in ("l_2", "L2"):
        original = h["distance"] == "l_2"  # the original clips before it shrinks and sets its step itself
        threat = L2(h["epsilon"]) if original else OffsetL2(h["epsilon"], projection="ball_box")
        atol = 1e-7
        step_size = 2 * h["epsilon"] / h["perturb_steps"] if original else step_size
    labels = given.get("labels", torch.zeros(x.shape[0], dtype=torch.int64))
    with torch.no_grad():
        reference = model(x)
    x_adv = pgd(model, x, labels, threat, steps=h["perturb_steps"], step_size=step_size, loss=kl_to(reference),
                start=x + h["start_scale"] * given["start_noise"])  # fmt: skip
    close(x_adv, case["expected"]["x_adv"], atol)
    if "total_loss" in case["expected"]:
        loss, terms = objectives.trades(model, (x,), labels, fixed_attack(x_adv), beta=h["beta"])
        close(loss, case["expected"]["total_loss"])
        close(terms["cross_entropy"], case["expected"]["ce"])
        close(terms["kl"], case["expected"]["kl_batchmean"])
        grads_match(loss, case["expected"], fc1_weight=model.fc1.weight, fc1_bias=model.fc1.bias,
                    fc2_weight=model.fc2.weight, fc2_bias=model.fc2.bias)  # fmt: skip


@cases("attack_mart")
def test_mart_attack(case):
    given, h = inputs(case), case["hyperparameters"]
    model, x, labels = given["model"], given["x"], given["labels"]
    linf = h["distance"] == "l_inf"
    threat = Linf(h["epsilon"]) if linf else OffsetL2(h["epsilon"], projection="ball_box")
    x_adv = pgd(model, x, labels, threat, steps=h["perturb_steps"], step_size=h["step_size"],
                start=x + h["start_scale"] * given["start_noise"])  # fmt: skip
    close(x_adv, case["expected"].get("x_adv", x_adv), 1e-9 if linf else 1e-7)
    loss, terms = objectives.mart(model, (x,), labels, fixed_attack(x_adv), beta=h["beta"])
    with torch.no_grad():
        clean, adv = model(x), model(x_adv)
    bce_shift = margin_shift(adv, labels).mean()
    kl_shift = weighted_kl_shift(clean, adv, labels).mean()
    if "total_loss" in case["expected"]:
        close(loss - bce_shift - h["beta"] * kl_shift, case["expected"]["total_loss"])
    else:
        close(terms["boosted_cross_entropy"] - bce_shift, case["expected"]["loss_adv"], 1e-7)
        close(h["beta"] * (terms["weighted_kl"] - kl_shift), case["expected"]["beta_times_weighted_kl"], 1e-7)


# Losses from logits -----------------------------------------------------------------------------------------------


@cases("trades", only=lambda c: "logits" in c["inputs"])
def test_trades_loss(case):
    given, expected = inputs(case), case["expected"]
    clean, adv = given["logits"].requires_grad_(), given["logits_adv"].requires_grad_()
    total = trades_loss(clean, adv, given["labels"], beta=case["hyperparameters"]["beta"])
    close(total, expected["total"])
    close(cross_entropy(clean, given["labels"]), expected["ce_per_sample"])
    close(kl_divergence(clean, adv), expected["kl_per_sample"])
    grads_match(total, expected, logits=clean, logits_adv=adv)


@cases("trades", only=lambda c: "logits" not in c["inputs"])
def test_trades_moves_batch_norm_three_times_as_released(case):
    given, expected = inputs(case), case["expected"]
    model = given["model"].train()
    loss, _ = objectives.trades(
        model, (given["x"],), given["labels"], fixed_attack(given["x_adv"]),
        beta=case["hyperparameters"]["beta"], **objectives.preset("trades", "release"),
    )  # fmt: skip
    close(loss, expected["total"])
    close(model.bn.running_mean, expected["bn_running_mean_after"])
    close(model.bn.running_var, expected["bn_running_var_after"])
    once = inputs(case)["model"].train()
    same, _ = objectives.trades(once, (given["x"],), given["labels"], fixed_attack(given["x_adv"]),
                                beta=case["hyperparameters"]["beta"])  # fmt: skip
    close(same, expected["total"])  # the loss does not notice, the running statistics do
    assert (once.bn.running_mean - model.bn.running_mean).abs().max() > 1e-4


@cases("mart")
def test_mart_loss(case):
    given, expected, beta = inputs(case), case["expected"], case["hyperparameters"]["beta"]
    clean, adv, labels = given["logits"].requires_grad_(), given["logits_adv"].requires_grad_(), given["labels"]
    released = {
        "boosted": boosted_cross_entropy(adv, labels, reduction="none") - margin_shift(adv, labels),
        "weighted": weighted_kl_loss(clean, adv, labels, reduction="none") - weighted_kl_shift(clean, adv, labels),
    }
    close(released["boosted"].mean(), expected["boosted_ce"])
    close(released["weighted"], expected["weighted_kl_per_sample"])
    total = mart_loss(clean, adv, labels, beta=beta)
    total = total - (margin_shift(adv, labels) + beta * weighted_kl_shift(clean, adv, labels)).mean()
    close(total, expected["total"])
    grads_match(total, expected, logits=clean, logits_adv=adv)


@cases("consistency", only=lambda c: "logits_1" in c["inputs"])
def test_consistency_loss(case):
    given, expected, t = inputs(case), case["expected"], case["hyperparameters"]["T"]
    z1, z2 = given["logits_1"].requires_grad_(), given["logits_2"].requires_grad_()
    per_sample = consistency_loss(z1, z2, temperature=t, reduction="none") - js_shift(z1, z2, t)
    close(per_sample, expected["js_per_sample"])
    close(per_sample.mean(), expected["js"])
    grads_match(per_sample.mean(), expected, logits_1=z1, logits_2=z2)


@cases("consistency", only=lambda c: "labels" in c["inputs"])
def test_consistency_at_objective(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    z1, z2, labels = given["logits_adv_1"], given["logits_adv_2"], given["labels"]
    pair = torch.cat([z1, z2]).requires_grad_()
    loss, terms = objectives.consistency_at(
        torch.nn.Identity(), (pair[: len(z1)], pair[len(z1) :]), labels, lambda model, x, labels: x,
        consistency_weight=h["lam"], consistency_temperature=h["T"],
    )  # fmt: skip
    shift = js_shift(z1, z2, h["T"]).mean()
    close(terms["cross_entropy"], expected["ce"])
    close(terms["consistency"] - shift, expected["js"])
    close(loss - h["lam"] * shift, expected["total"])
    adv = pair.detach().requires_grad_()
    both = cross_entropy(adv, labels.repeat(2)).mean() + h["lam"] * consistency_loss(*adv.chunk(2), temperature=h["T"])
    both = both - h["lam"] * js_shift(*adv.chunk(2), h["T"]).mean()
    grads_match(both, expected, logits_adv=adv)


# Robust perception ------------------------------------------------------------------------------------------------


@cases("rpat", only=lambda c: "logits_interp" in c["inputs"] or "logits_interp_pair" in c["inputs"])
def test_robust_perception_from_logits(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    end = "_pair" if "logits_pair" in given else ""
    names = [f"logits{end}", f"logits_adv{end}", f"logits_interp{end}"]
    clean, adv, mid = (given[name].requires_grad_() for name in names)
    labels = given["labels"].repeat(2) if end else given["labels"]
    alpha = h["paper_alpha"]
    assert alpha == pytest.approx(1 - h["code_rate"])
    term = robust_perception_loss(clean, mid, adv, alpha=alpha, form="interpolation")
    close(term, expected["mse_interpolation_form"])
    if "mse_quotient_form_eq3" in expected:
        quotient = robust_perception_loss(clean, mid, adv, alpha=alpha, form="quotient")
        close(quotient, expected["mse_quotient_form_eq3"], 1e-8)
        per_sample = robust_perception_loss(clean, mid, adv, alpha=alpha, form="interpolation", reduction="none")
        close(per_sample, expected["mse_per_sample"])
    total = h["lam"] * term
    if case["name"].startswith("pgdat"):
        total = total + cross_entropy(adv, labels).mean()
    elif case["name"].startswith("trades"):
        total = total + trades_loss(clean, adv, labels, beta=h["beta"])
    else:
        js = consistency_loss(*adv.chunk(2), temperature=h["T"]) - js_shift(*adv.chunk(2), h["T"]).mean()
        total = total + cross_entropy(adv, labels).mean() + h["lam"] * js
    close(total, expected["total"])
    grads_match(total, expected, **dict(zip(names, (clean, adv, mid), strict=True)))


@cases("rpat", only=lambda c: "model" in c["inputs"])
def test_rpat_end_to_end(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model = given["model"].train()
    loss, terms = objectives.rpat(
        model, (given["x"],), given["labels"], fixed_attack(given["x_adv"]), alpha=h["paper_alpha"],
        weight=h["lam"], **objectives.preset("rpat", "release"),
    )  # fmt: skip
    close(loss, expected["total"])
    if "x_interp" in expected:
        close(interpolate(given["x"], given["x_adv"], h["paper_alpha"]), expected["x_interp"])
        close(terms["cross_entropy"], expected["ce_adv"])
        close(terms["robust_perception"], expected["mse_interpolation_form"])
        grads_match(loss, expected, fc1_weight=model.fc1.weight, fc2_weight=model.fc2.weight)
    else:
        close(model.bn.running_mean, expected["bn_running_mean_after"])
        close(model.bn.running_var, expected["bn_running_var_after"])


@cases("rpat_forms")
def test_every_criterion_in_both_forms(case):
    given, expected, alpha = inputs(case), case["expected"], case["hyperparameters"]["paper_alpha"]
    clean, mid, adv = given["logits"], given["logits_interp"], given["logits_adv"]
    target = torch.lerp(clean, adv, alpha)
    for form, prefix in (("interpolation", "interp"), ("quotient", "quot")):
        a, b = (mid, target) if form == "interpolation" else ((mid - clean) / alpha, (adv - mid) / (1 - alpha))
        for criterion, key in (("mse", "mse"), ("kl", "kl"), ("js", "js_T1"), ("cosine", "cosine")):
            key = f"{prefix}_{key}" if (prefix, key) != ("interp", "kl") else "interp_kl_target_mix"
            value = robust_perception_loss(clean, mid, adv, alpha=alpha, criterion=criterion, form=form)
            shift = js_shift(a, b, 1.0).mean() if criterion == "js" else 0.0
            close(value - shift, expected[key], 1e-8 if form == "quotient" else 1e-9)


# Averaged weights -------------------------------------------------------------------------------------------------


@cases("rebat", only=lambda c: "logits_adv" in c["inputs"])
def test_rebat_term(case):
    given, expected, beta = inputs(case), case["expected"], case["hyperparameters"]["beta"]
    adv = given["logits_adv"].requires_grad_()
    per_sample = kl_divergence(given["logits_adv_wa"], adv)
    close(per_sample, expected["kl_per_sample"])
    total = cross_entropy(adv, given["labels"]).mean() + beta * per_sample.mean()
    close(total, expected["total"])
    grads_match(total, expected, logits_adv=adv)


@cases("rebat", only=lambda c: "wa_before" in c["inputs"])
def test_averaged_weights(case):
    before, model = case["inputs"]["wa_before"], case["inputs"]["model"]
    before, model = ({k: v for k, v in w.get("weights", w).items() if "num_batches" not in k} for w in (before, model))
    current = Tiny(model)
    average = {**Tiny(before).state_dict()}
    updated = ema_update(average, current, decay=case["hyperparameters"]["decay"])
    for name, value in case["expected"]["wa_after"].items():
        if "num_batches" not in name:
            close(updated[name], value)


@cases("rpatpp", only=lambda c: "model" not in c["inputs"])
def test_robust_perception_kl_loss(case):
    given, expected, alpha = inputs(case), case["expected"], case["hyperparameters"]["alpha"]
    adv = given["logits_adv"].requires_grad_()
    per_sample = robust_perception_kl_loss(
        given["logits_clean_wa"], given["logits_interp_wa"], adv, alpha=alpha, reduction="none"
    )
    close(per_sample, expected["kl_per_sample"])
    total = cross_entropy(adv, given["labels"]).mean() + case["hyperparameters"]["beta"] * per_sample.mean()
    close(total, expected["total"])
    grads_match(total, expected, logits_adv=adv)


@cases("rpatpp", only=lambda c: "model" in c["inputs"])
def test_rpat_plus_plus_end_to_end(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, average = given["model"], dict(given["wa_model"].state_dict())
    x_adv = (given["x"] + given["delta"]).clamp(0, 1)
    loss, terms = objectives.rpat_plus_plus(
        model, (given["x"],), given["labels"], fixed_attack(x_adv), average=average, alpha=h["alpha"], beta=h["beta"]
    )
    close(loss, expected["total"])
    close(terms["robust_perception_kl"], expected["rpatpp_kl"])
    grads_match(loss, expected, fc1_weight=model.fc1.weight, fc2_weight=model.fc2.weight)


# Robust alignment -------------------------------------------------------------------------------------------------


def views_of(case):
    given = inputs(case)
    return given, (given["x_aug1"], given["x_aug2"]), torch.cat([given["x_adv1"], given["x_adv2"]])


def mixed_js_shift(model, views, x_advs, mix, temperature, pairs):
    """`js_shift` of the DICAR pairs, in logit space."""
    with torch.no_grad():
        mixed = model(interpolate(x_advs[1], x_advs[0], mix)[pairs])
        target = mix * model(views[0])[pairs] + (1 - mix) * model(views[1])[pairs]
    return js_shift(mixed, target, temperature)


@cases("raat", only=lambda c: c["inputs"]["model"] == "tiny_mlp")
def test_raat_end_to_end(case):
    given, views, x_adv = views_of(case)
    expected, h, model, labels = case["expected"], case["hyperparameters"], given["model"], given["labels"]
    x, labels_2 = torch.cat(views), labels.repeat(2)
    with torch.no_grad():
        parts = boundary_partition(model(x), model(interpolate(x, x_adv, h["eta"])), labels_2, adv_logits=model(x_adv))
    assert parts.misclassified.tolist() == expected["misclassified_2B"]
    assert parts.boundary.tolist() == expected["boundary_2B"]
    assert parts.interior.tolist() == expected["non_boundary_2B"] or parts.interior.tolist() == [
        not (m or b) for m, b in zip(expected["misclassified_2B"], expected["boundary_2B"], strict=True)
    ]
    loss, terms = objectives.raat(
        model, views, labels, fixed_attack(x_adv), mix=h["mix_rate"], eta=h["eta"], weight=h["lam"],
        **objectives.preset("raat", "release"),
    )  # fmt: skip
    pairs = tensor(expected["dicar_pair_mask"])
    shift = mixed_js_shift(model, views, x_adv.chunk(2), h["mix_rate"], h["T"], pairs).mean()
    close(terms["cross_entropy"], expected["ce"])
    close(terms["dicar"] - shift, expected["dicar"])
    close(loss - h["lam"] * shift, expected["total"])
    grads_match(loss, expected, fc1_weight=model.fc1.weight, fc2_weight=model.fc2.weight)


@cases("raat", only=lambda c: c["inputs"]["model"] == "tiny_mlp")
def test_raat_as_the_paper_writes_it(case):
    given, views, x_adv = views_of(case)
    expected, h, model, labels = case["expected"], case["hyperparameters"], given["model"], given["labels"]
    paper = expected["paper_form_not_official"]
    loss, terms = objectives.raat(
        model,
        views,
        labels,
        fixed_attack(x_adv),
        mix=h["beta_draw"],
        eta=h["eta"],
        **objectives.preset("raat", "paper"),
    )
    close(terms["cross_entropy"], sum(paper["table4_ce_per_sample_2B"]) / len(x_adv))
    mixed = model(interpolate(*reversed(x_adv.chunk(2)), h["beta_draw"]))
    per_pair = dicar_loss(mixed, model(views[0]), model(views[1]), mix=h["beta_draw"], reduction="none")
    close(per_pair, paper["table4_dicar_probability_mix_per_pair"])
    keep = tensor(expected["dicar_pair_mask"])
    close(terms["dicar"], (torch.where(keep, per_pair, 0).sum() / len(keep)).item())
    close(loss, (terms["cross_entropy"] + terms["dicar"]).item())


@cases("raat", only=lambda c: c["inputs"]["model"] == "tiny_bn")
def test_raat_moves_batch_norm_as_released(case):
    given, views, x_adv = views_of(case)
    expected, h, model = case["expected"], case["hyperparameters"], given["model"].train()
    loss, _ = objectives.raat(
        model, views, given["labels"], fixed_attack(x_adv), mix=h["mix_rate"], eta=h["eta"], weight=h["lam"],
        **objectives.preset("raat", "release"),
    )  # fmt: skip
    close(loss, expected["total"], 1e-8)
    close(model.bn.running_mean, expected["bn_running_mean_after"])
    close(model.bn.running_var, expected["bn_running_var_after"])


@cases("raat_pp")
def test_raat_plus_plus_end_to_end(case):
    given, views, x_adv = views_of(case)
    expected, h, model, labels = case["expected"], case["hyperparameters"], given["model"], given["labels"]
    loss, terms = objectives.raat_plus_plus(
        model, views, labels, fixed_attack(x_adv), mix=h["mix_rate"], eta=h["eta"], weight=h["lam"],
        **{**objectives.preset("raat_plus_plus", "release"), "beta": h["beta"]},
    )  # fmt: skip
    boundary = tensor(expected["boundary_2B"]).reshape(-1, 1, 1, 1)
    x, labels_2 = torch.cat(views), labels.repeat(2)
    supervised = torch.where(boundary, interpolate(x, x_adv, h["eta"]), x_adv)
    bce_shift = margin_shift(model(supervised), labels_2).mean()
    kl_shift = weighted_kl_shift(model(x), model(x_adv), labels_2).mean()
    pairs = tensor(expected["dicar_pair_mask"])
    js = mixed_js_shift(model, views, x_adv.chunk(2), h["mix_rate"], h["T"], pairs).mean()
    close(terms["boosted_cross_entropy"] - bce_shift, expected["boosted_ce"])
    close(terms["weighted_kl"] - kl_shift, expected["weighted_kl"])
    close(terms["dicar"] - js, expected["dicar"])
    released = loss - bce_shift - h["beta"] * kl_shift - h["lam"] * js
    close(released, expected["total"])
    grads_match(released, expected, fc1_weight=model.fc1.weight, fc2_weight=model.fc2.weight)


@cases("raat_sharp")
def test_raat_sharp_end_to_end(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, average = given["model"], dict(given["wa_model"].state_dict())
    views = given["x_aug1"], given["x_aug2"]
    x_advs = tuple((view + given[f"delta{i}"]).clamp(0, 1) for i, view in enumerate(views, start=1))
    loss, terms = objectives.raat_sharp(
        model, views, given["labels"], fixed_attack(*x_advs), average=average, mix=h["mix_rate"], weight=h["beta"],
        eta=h["eta"], **objectives.preset("raat_sharp", "release"),
    )  # fmt: skip
    pairs = tensor(expected["dicar_pair_mask"])
    shift = mixed_js_shift(model, views, x_advs, h["mix_rate"], h["T"], pairs).mean()
    close(terms["cross_entropy"], expected["ce"])
    close(terms["dicar"] - shift, expected["dicar"])
    close(loss - h["beta"] * shift, expected["total"])
    grads_match(loss, expected, fc1_weight=model.fc1.weight, fc2_weight=model.fc2.weight)
    wrong = call_with(given["wa_model"], average, views[0]).argmax(dim=1) != given["labels"]
    assert wrong.tolist() == expected["misclassified_B"]
    assert margin(call_with(given["wa_model"], average, views[0]), given["labels"]).gt(0).tolist() == wrong.tolist()


def test_every_golden_case_of_these_methods_is_used():
    assert {name: len(group) for name, group in GOLDEN["methods"].items()} == {
        "trades": 4, "attack_trades": 6, "mart": 3, "attack_mart": 4, "attack_pgd": 10, "consistency": 6, "rpat": 9,
        "rpat_forms": 3, "rebat": 6, "rpatpp": 4, "raat": 4, "raat_pp": 2, "raat_sharp": 2,
        "awp": 4, "gairat": 7, "mail": 8, "mma": 6, "hat": 5, "te": 6, "kd": 5, "adr": 4, "cure": 4, "ducat": 2,
        "ict": 2, "ewat": 2, "sovr": 4, "piat": 3,
    }  # fmt: skip
