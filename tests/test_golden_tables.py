"""Values of the released codes of the methods that both papers compare with, reached through public functions only.

Values agree to 1e-9 and gradients to 1e-8, as in `test_golden.py`.
"""

import torch
from torch.testing import assert_close

from perceptual_at import (
    distillation_loss,
    interpolation_consistency_loss,
    kl_divergence,
    margin,
    max_margin_loss,
    normalized_error_loss,
    one_vs_rest_loss,
    soft_logit_margin,
    swa_update,
    temporal_ensembling_loss,
)
from perceptual_at.attacks import bisect_margins, cross_entropy
from perceptual_at.losses import dummy_class_loss
from perceptual_at.memories import ensemble_targets, ensemble_update
from perceptual_at.sample_weights import (
    entropy_weights,
    geometric_weights,
    margin_weights,
    probability_margin,
    smallest_margins,
)
from perceptual_at.weight_perturbation import ascend, restore
from tests.golden import GOLDEN, cases, close, grads_match, inputs, tensor
from tests.tiny import Tiny

# AWP --------------------------------------------------------------------------------------------------------------


@cases("awp", only=lambda c: "gamma" in c["hyperparameters"])
def test_awp_moves_weights_and_takes_its_step_as_released(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, x, x_adv, labels = given["model"].train(), given["x"], given["x_adv"], given["labels"]
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def loss():
        if h["beta"] is None:
            return cross_entropy(model(x_adv), labels).mean()
        clean, adv = model(x), model(x_adv)
        return cross_entropy(clean, labels).mean() + h["beta"] * kl_divergence(clean, adv).mean()

    moved = ascend(model, loss, size=h["gamma"])
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])
    for name, diff in expected["diff"].items():
        close(moved.move[name] / h["gamma"], diff)
    assert moved.move.keys() == expected["diff"].keys()
    for name, value in expected["perturbed_weights"].items():
        close(model.state_dict()[name], value)
    close(cross_entropy(model(x_adv), labels).mean(), expected["ce_x_adv_train_mode_at_perturbed_weights"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.001)  # in place of the optimiser's step
    restore(model, moved, form="awp")
    for name, value in expected["restored_weights"].items():
        close(model.state_dict()[name], value)


@cases("awp", only=lambda c: "nb_iter" in c["hyperparameters"])
def test_awps_second_version_takes_steps_as_released(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, x_adv, labels = given["model"].train(), given["x_adv"], given["labels"]
    ascend(model, lambda: cross_entropy(model(x_adv), labels).mean(), size=h["eta"], steps=h["nb_iter"],
           parameters="matrices")  # fmt: skip
    for name, value in expected["perturbed_weights"].items():
        if "num_batches" not in name and "running" not in name:
            close(model.state_dict()[name], value)


# Weights per sample -----------------------------------------------------------------------------------------------


@cases("gairat", only=lambda c: "kappa" in c["inputs"])
def test_gairats_weights(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    weights = geometric_weights(
        given["kappa"].double(), steps=h["num_steps"], offset=h["Lambda"], form=h["func"].lower()
    )
    close(weights, expected["weights"])
    if "total" in expected:
        adv = given["logits_adv"].requires_grad_()
        total = (weights * cross_entropy(adv, given["labels"])).mean()
        close(total, expected["total"])
        grads_match(total, expected, logits_adv=adv)


@cases("mail", only=lambda c: "pm_adv" in c["expected"])
def test_mails_margins_and_weights(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    clean, adv, labels = given["logits"], given["logits_adv"], given["labels"]
    margins = probability_margin(adv, labels)
    close(margins, expected["pm_adv"])
    close(-margins, expected["code_PM_on_adv"])
    close(probability_margin(clean, labels), expected["pm_nat"])
    close(probability_margin(clean, labels, wrong_logits=adv), expected["pm_dif_inferred"])
    options = {"slope": h["slope"], "bias": h["bias"]}
    close(margin_weights(margins, **options), expected["weights_code"])
    close(margin_weights(margins, scale="batch", **options), expected["weights_normalised_to_batch_not_official"])


@cases("ewat")
def test_ewats_candidates(case):
    given, expected = inputs(case), case["expected"]
    adv, labels = given["logits_adv"], given["labels"]
    proportional = entropy_weights(adv, form="proportional")
    close(proportional, expected["entropy_over_batch_mean"])
    close((proportional * cross_entropy(adv, labels)).mean(), expected["loss_proportional"])
    close((entropy_weights(adv) * cross_entropy(adv, labels)).mean(), expected["loss_one_plus"])


@cases("sovr")
def test_sovrs_candidate(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    adv, labels = given["logits_adv"], given["labels"]
    close(-margin(adv, labels), expected["logit_margin"])
    close(one_vs_rest_loss(adv, labels, reduction="none"), expected["ovr_per_sample"])
    switched = smallest_margins(adv, labels, share=h["M_percent"] / 100)
    assert switched.tolist() == tensor(expected["switched"]).bool().tolist()
    per_sample = torch.where(
        switched, h["lam"] * one_vs_rest_loss(adv, labels, reduction="none"), cross_entropy(adv, labels)
    )
    close(per_sample.mean(), expected["total"])


@cases("piat", only=lambda c: "logits" in c["inputs"])
def test_piats_term(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    clean, adv, labels = given["logits"], given["logits_adv"], given["labels"]
    close(normalized_error_loss(clean, adv, reduction="none"), expected["nmse_per_sample"])
    close(h["beta"] * normalized_error_loss(clean, adv, labels=labels), expected["weighted_nmse_times_beta"])


# Terms ------------------------------------------------------------------------------------------------------------


@cases("mma", only=lambda c: "logit_margin" in c["expected"])
def test_mmas_margins(case):
    given, expected = inputs(case), case["expected"]
    soft = soft_logit_margin(given["logits"], given["labels"])
    close(soft, expected["soft_logit_margin"])
    close(margin(given["logits"], given["labels"]), expected["logit_margin"])
    assert (soft < 0).tolist() == expected["slm_treats_as_correct"]


@cases("mma", only=lambda c: "num_search_steps" in c["hyperparameters"])
def test_mmas_bisection(case):
    given, h = inputs(case), case["hyperparameters"]
    found = bisect_margins(
        given["model"], given["x"], given["labels"], directions=given["unit_perturbation"], before=given["start_eps"],
        before_margin=given["start_margin"], largest=h["max_eps"], steps=h["num_search_steps"],
    )  # fmt: skip
    close(found, case["expected"]["eps"])


@cases("mma", only=lambda c: "mma_loss" in c["expected"])
def test_mmas_loss(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    arguments = given["logits"], given["logits_at_margin"], given["labels"]
    options = {"margins": given["margin_eps"], "largest": h["hinge_maxeps"]}
    close(max_margin_loss(*arguments, clean_weight=0.0, **options), expected["mma_loss"])
    close(max_margin_loss(*arguments, clean_weight=1.0, **options), expected["clean_ce"])
    total = max_margin_loss(*arguments, clean_weight=h["clean_loss_coeff"], **options)
    close(total, expected["combined_for_gradient"])


def test_te_ensembles_predictions_call_after_call_as_released():
    ensemble = torch.zeros(8, 5, dtype=torch.float64)
    for case in GOLDEN["methods"]["te"]:
        if "logits_adv" not in case["inputs"]:
            continue
        given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
        adv, labels, index = given["logits_adv"].requires_grad_(), given["labels"], given["sample_index"]
        total = cross_entropy(adv, labels).mean()
        if h["epoch"] >= h["start_epoch"]:
            ensemble = ensemble_update(ensemble, index, given["logits_clean_eval"], momentum=h["momentum"])
            targets = ensemble_targets(ensemble, index)
            close(targets, expected["soft_target_batch"])
            term = temporal_ensembling_loss(adv, targets)
            close(term, expected["mse_reg"])
            total = total + h["weight"] * term
        close(ensemble, expected["soft_labels_after"])
        close(total, expected["total"])
        grads_match(total, expected, logits_adv=adv)


@cases("kd", only=lambda c: "logits_adv" in c["inputs"])
def test_distillation_from_two_teachers(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    adv = given["logits_adv"].requires_grad_()
    standard, robust = (given[f"teacher_{kind}_logits_at_x_adv"] for kind in ("std", "adv"))
    first, second = (distillation_loss(adv, teacher, temperature=h["T"]) for teacher in (standard, robust))
    ce = cross_entropy(adv, given["labels"]).mean()
    close(first, expected["kd1"])
    close(second, expected["kd2"])
    total = h["coef_ce"] * ce + h["coef_kd1"] * first + h["coef_kd2"] * second
    close(total, expected["total"])
    grads_match(total, expected, logits_adv=adv)
    as_kl = distillation_loss(adv, standard, temperature=h["T"], form="kl")
    assert_close(
        torch.autograd.grad(as_kl, adv), torch.autograd.grad(distillation_loss(adv, standard, temperature=h["T"]), adv)
    )


@cases("kd", only=lambda c: "swa_before" in c["inputs"])
def test_swa_averages_parameters_only(case):
    before, current = Tiny(case["inputs"]["swa_before"]), Tiny(case["inputs"]["model"])
    after = swa_update(dict(before.state_dict()), current, count=case["hyperparameters"]["n_averaged"])
    assert case["hyperparameters"]["alpha"] == 1 / (case["hyperparameters"]["n_averaged"] + 1)
    for name, value in case["expected"]["swa_after"].items():
        if "num_batches" not in name:
            close(after[name], value)


@cases("ducat")
def test_ducats_cross_entropy(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    logits, labels = given["logits_clean_then_adv"].requires_grad_(), given["labels"]
    clean, adv = logits.chunk(2)
    total = dummy_class_loss(clean, labels, share=h["w_benign"]) + h["w_alpha"] * dummy_class_loss(
        adv, labels, share=h["w_adv"]
    )
    close(total / 2, expected["total"])
    grads_match(total / 2, expected, logits=logits)


@cases("ict")
def test_icts_term(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    mixed, teacher = given["logits_at_mixed_input"], given["teacher_logits"]
    arguments = mixed, teacher, teacher[given["permutation"]]
    for criterion in ("mse", "kl"):
        close(interpolation_consistency_loss(*arguments, mix=h["lam"], criterion=criterion), expected[criterion])
