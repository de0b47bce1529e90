"""Values of the released codes of the methods that both papers compare with, reached through public functions only.

Values agree to 1e-9 and gradients to 1e-8, as in `test_golden.py`.
"""

import functools

import torch
from torch.testing import assert_close

from perceptual_at import (
    L2,
    Linf,
    distillation_loss,
    interpolation_consistency_loss,
    kl_divergence,
    margin,
    max_margin_loss,
    normalized_error_loss,
    objectives,
    one_vs_rest_loss,
    pgd,
    soft_logit_margin,
    swa_update,
    temporal_ensembling_loss,
)
from perceptual_at.attacks import bisect_margins, cross_entropy
from perceptual_at.gradient_revision import revise
from perceptual_at.losses import dummy_class_loss
from perceptual_at.memories import ensemble_targets, ensemble_update
from perceptual_at.sample_weights import (
    StepsWithstood,
    entropy_weights,
    geometric_weights,
    margin_weights,
    probability_margin,
    smallest_margins,
)
from perceptual_at.schedules import cosine_between, piat_decay
from perceptual_at.soft_labels import rectified_labels
from perceptual_at.weight_perturbation import ascend, restore
from tests.golden import GOLDEN, cases, close, grads_match, inputs, tensor
from tests.test_golden import margin_shift, weighted_kl_shift
from tests.tiny import Tiny, fixed_attack

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
    calls = [case for case in GOLDEN["methods"]["te"] if "logits_adv" in case["inputs"]]
    assert len(calls) > 1
    for case in calls:
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


# Whole objectives -------------------------------------------------------------------------------------------------


@cases("gairat", only=lambda c: "x" in c["inputs"])
def test_gairats_attack_counts_the_steps_withstood(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    withstood = StepsWithstood()
    x_adv = pgd(
        given["model"], given["x"], given["labels"], Linf(h["epsilon"]), steps=h["steps"], step_size=h["step_size"],
        start="clean", loss=withstood,
    )  # fmt: skip
    close(x_adv, expected["x_adv"])
    assert withstood.kappa.tolist() == expected["kappa"]
    attack = functools.partial(
        pgd, threat=Linf(h["epsilon"]), step_size=h["step_size"], start="clean", steps=h["steps"]
    )
    loss, _ = objectives.gairat(given["model"], (given["x"],), given["labels"], attack, steps=h["steps"])
    weights = geometric_weights(withstood.kappa.double(), steps=h["steps"])
    close(loss, (weights * cross_entropy(given["model"](x_adv), given["labels"])).mean().item())


class Outputs(torch.nn.Module):
    """A network that answers with given logits, one tensor a call."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = list(answers)

    def forward(self, x):
        return self.answers.pop(0)


def ready(model, x, labels, **options):
    return x


def anywhere(labels):
    return (torch.zeros(len(labels), 2, dtype=torch.float64),)


@cases("mail", only=lambda c: c["name"].startswith("mail_"))
def test_mail_on_each_base(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    clean, adv, labels = given["logits"].requires_grad_(), given["logits_adv"].requires_grad_(), given["labels"]
    base = {"at": "pgd_at", "trades": "trades", "mart": "mart"}[case["name"].split("_")[1]]
    answers = {"pgd_at": [adv], "trades": [clean.detach(), clean, adv], "mart": [clean, adv]}[base]
    loss, _ = objectives.mail(
        Outputs(*answers), anywhere(labels), labels, ready, base=base, slope=h["slope"], bias=h["bias"], beta=h["beta"]
    )
    if base == "mart":
        weights = tensor(expected["weights"])
        loss = (
            loss
            - (weights * margin_shift(adv, labels)).mean()
            - h["beta"] * weighted_kl_shift(clean, adv, labels).mean()
        )
    close(loss, expected["total"])
    grads = {"logits_adv": adv} if base == "pgd_at" else {"logits": clean, "logits_adv": adv}
    grads_match(loss, expected, **grads)


@cases("hat", only=lambda c: "logits_helper" in c["inputs"])
def test_hat_from_logits(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    clean, adv, beyond = (given[name].requires_grad_() for name in ("logits", "logits_adv", "logits_helper"))
    base = "pgd_at" if case["name"].startswith("at_") else "trades"
    answers = [clean, adv, beyond] if base == "pgd_at" else [clean.detach(), clean, adv, beyond]
    loss, terms = objectives.hat(
        Outputs(*answers), anywhere(given["labels"]), given["labels"], ready, base=base, beta=h["beta"],
        weight=h["gamma"], reach=h["h"], helper=Outputs(given["helper_teacher_logits_at_x_adv"]),
    )  # fmt: skip
    close(loss, expected["total"])
    close(terms["helper_cross_entropy"], expected["ce_helper"])
    grads_match(loss, expected, logits=clean, logits_adv=adv, logits_helper=beyond)


@cases("hat", only=lambda c: "x" in c["inputs"])
def test_hat_end_to_end(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, helper = given["model"], Tiny(GOLDEN["models"][case["inputs"]["helper_model"]])
    loss, _ = objectives.hat(
        model, (given["x"],), given["labels"], fixed_attack(given["x_adv"]), helper=helper, reach=h["h"],
        beta=h["beta"], weight=h["gamma"],
    )  # fmt: skip
    close(loss, expected["total"])
    grads_match(loss, expected, fc1_weight=model.fc1.weight, fc2_weight=model.fc2.weight)


@cases("te", only=lambda c: "start_noise" in c["inputs"])
def test_te_attacks_its_own_loss(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    model, x, labels = given["model"], given["x"], given["labels"]
    index = torch.arange(len(x))
    with torch.no_grad():
        ensemble = ensemble_update(torch.zeros(len(x), 5, dtype=torch.float64), index, model(x), momentum=h["momentum"])
    found = []

    def attack(model, x, labels, loss):
        threat = L2(h["epsilon"], projection="ball_box")
        found.append(pgd(model, x, labels, threat, steps=h["perturb_steps"], step_size=h["step_size"], loss=loss,
                         start=x + 0.001 * given["start_noise"]))  # fmt: skip
        return found[0]

    options = {"targets": ensemble_targets(ensemble, index), "weight": h["weight"]}
    objectives.te(model, (x,), labels, attack, **options)
    close(found[0], expected["x_adv"], 1e-7)
    loss, _ = objectives.te(model, (x,), labels, fixed_attack(tensor(expected["x_adv"])), **options)
    close(loss, expected["total_loss"])


@cases("adr", only=lambda c: "logits_adv" in c["inputs"])
def test_adr_rectifies_labels(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    teacher, labels = given["teacher_logits_clean"], given["labels"]
    rectified = rectified_labels(teacher, labels, temperature=h["temperature"], trust=h["lam"])
    close(rectified, expected["rectified_labels"])
    adv = given["logits_adv"].requires_grad_()
    loss = cross_entropy(adv, rectified).mean()
    close(loss, expected["ce_adv_soft"])
    grads_match(loss, expected, logits_adv=adv)


@cases("adr", only=lambda c: "step" in c["inputs"])
def test_adrs_schedules(case):
    expected, h = case["expected"], case["hyperparameters"]
    steps = h["epochs"] * h["iters_per_epoch"]
    for name, start, end in (("temperature", h["T_high"], h["T_low"]), ("lam", h["lam_low"], h["lam_high"])):
        found = [cosine_between(i, steps=steps, start=start, end=end) for i in case["inputs"]["step"]]
        close(torch.tensor(found, dtype=torch.float64), expected[name])


@cases("piat", only=lambda c: "epoch" in c["inputs"])
def test_piats_schedule(case):
    h = case["hyperparameters"]
    found = [piat_decay(epoch, largest=h["cap"], offset=h["c"]) for epoch in case["inputs"]["epoch"]]
    close(torch.tensor(found, dtype=torch.float64), case["expected"]["weight_of_previous"])


@cases("cure", only=lambda c: "percentile" in c["hyperparameters"])
def test_cure_masks_gradients_as_released(case):
    h = case["hyperparameters"]
    names = case["inputs"]["layer_names"]
    total, natural, robust = (
        {name: tensor(value) for name, value in zip(names, case["inputs"][f"grad_{kind}"], strict=True)}
        for kind in ("total", "natural", "robust")
    )
    revised = revise(total, natural, robust, share=h["percentile"], natural_weight=h["w_nat"], robust_weight=h["w_rob"])
    for name, value in zip(names, case["expected"]["masked_grads"], strict=True):
        close(revised[name], value)


@cases("cure", only=lambda c: "student_logits" in c["inputs"])
def test_cures_term(case):
    given = inputs(case)
    close(kl_divergence(given["ema_logits"], given["student_logits"]).mean(), case["expected"]["kl"])


@cases("ducat")
def test_ducat_runs_both_inputs_in_one_batch(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    logits = given["logits_clean_then_adv"].requires_grad_()
    loss, _ = objectives.ducat(
        Outputs(logits), anywhere(given["labels"]), given["labels"], ready, clean_share=h["w_benign"],
        adv_share=h["w_adv"], adv_weight=h["w_alpha"],
    )  # fmt: skip
    close(loss, expected["total"])
    grads_match(loss, expected, logits=logits)


@cases("kd", only=lambda c: "logits_adv" in c["inputs"])
def test_kd_objective(case):
    given, expected, h = inputs(case), case["expected"], case["hyperparameters"]
    adv = given["logits_adv"].requires_grad_()
    loss, _ = objectives.kd(
        Outputs(adv), anywhere(given["labels"]), given["labels"], ready, temperature=h["T"],
        weights=(h["coef_ce"], h["coef_kd1"], h["coef_kd2"]),
        standard_teacher=Outputs(given["teacher_std_logits_at_x_adv"]),
        robust_teacher=Outputs(given["teacher_adv_logits_at_x_adv"]),
    )  # fmt: skip
    close(loss, expected["total"])
    grads_match(loss, expected, logits_adv=adv)
