"""The public names, checked in: adding or removing one is an edit of this file, on purpose."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import perceptual_at

NAMES = {
    "perceptual_at": """
        Threat Linf L2 L1
        interpolate draw_beta
        pgd fgsm cw n_fgsm friendly_pgd pure_pgd apgd fab square auto_attack Verdict AutoAttackVerdict Protocol
        SampleGenerator frozen Lane
        margin dlr targeted_dlr kl_to soft_logit_margin
        robust_perception_loss robust_perception_kl_loss dicar_loss trades_loss mart_loss boosted_cross_entropy
        weighted_kl_loss consistency_loss temporal_ensembling_loss distillation_loss max_margin_loss
        interpolation_consistency_loss one_vs_rest_loss normalized_error_loss
        grad_align_loss brier_loss score_loss soft_cross_entropy_loss weighted_mse_loss logit_pairing_loss
        hypersphere_loss smooth_labels
        boundary_partition Partition adaptive_eta
        squared_error prediction_squared_error kl_divergence js_divergence cosine_distance
        snapshot ema_update swa_update refresh_batch_norm call_with
        accuracy mean_score nrr
        evaluate Evaluation compare aggregate wilson_interval mcnemar sanity_checks Check quantize still_adversarial
        objectives theory
    """,
    "perceptual_at.attacks": """
        AutoAttackVerdict Lane Margins Protocol Verdict apgd auto_attack bisect_margins cross_entropy cw dlr fab fgsm
        find_margins frozen kl_to margin pgd pure_pgd soft_logit_margin square targeted_dlr
        friendly_pgd n_fgsm
        segpgd_loss cospgd_loss surrogate_pgd
    """,
    "perceptual_at.losses": """
        boosted_cross_entropy consistency_loss dicar_loss distillation_loss dummy_class_loss
        interpolation_consistency_loss mart_loss max_margin_loss normalized_error_loss one_vs_rest_loss
        robust_perception_kl_loss robust_perception_loss temporal_ensembling_loss trades_loss weighted_kl_loss
        grad_align_loss brier_loss score_loss soft_cross_entropy_loss weighted_mse_loss logit_pairing_loss
        hypersphere_loss
    """,
    "perceptual_at.objectives": """
        adr alp clp consistency_at cure dicar ducat ewat gairat grad_align hat hypersphere ikl kd lbgat mail
        mart mma pgd_at piat preset raat raat_plus_plus raat_sharp random_noise rebat rpat rpat_plus_plus
        rpat_raat score sovr standard te trades
    """,
}
PAIRS = [(module, name) for module, names in NAMES.items() for name in names.split()]
every_name = pytest.mark.parametrize(("module", "name"), PAIRS, ids=[f"{module}.{name}" for module, name in PAIRS])


@pytest.mark.parametrize("module", NAMES)
def test_the_public_names_are_the_ones_listed_here(module):
    assert sorted(importlib.import_module(module).__all__) == sorted(NAMES[module].split())


def test_the_flat_list_is_in_reading_order():
    assert list(perceptual_at.__all__) == NAMES["perceptual_at"].split()


@every_name
def test_the_name_exists_and_is_documented_with_examples(module, name):
    value = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(value)
    assert text
    if inspect.ismodule(value):  # its functions have theirs
        return
    assert re.search(r"^Examples:$", text, re.MULTILINE), f"{name} has no Examples section"
    assert ">>> " in text


@every_name
def test_the_name_says_where_it_lives(module, name):
    value = getattr(importlib.import_module(module), name)
    home = value.__name__ if inspect.ismodule(value) else value.__module__
    assert home.startswith("perceptual_at.")
    assert getattr(importlib.import_module(home), name, value) is value


def test_star_import_gives_exactly_the_public_names():
    namespace = {}
    exec("from perceptual_at import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(perceptual_at.__all__)


def test_the_package_is_typed_and_versioned():
    assert (Path(perceptual_at.__file__).parent / "py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", perceptual_at.__version__)
