"""Composable losses and attacks for adversarial training in PyTorch.

Small pure functions: threat models, attacks, losses, partitions and metrics, which you put together in a
training loop of your own.
"""

from typing import TYPE_CHECKING

from perceptual_at import objectives, theory
from perceptual_at._random import SampleGenerator
from perceptual_at._submodules import on_first_use
from perceptual_at.attacks import (
    AutoAttackVerdict,
    Lane,
    Protocol,
    Verdict,
    apgd,
    auto_attack,
    cw,
    dlr,
    fab,
    fgsm,
    friendly_pgd,
    frozen,
    kl_to,
    margin,
    n_fgsm,
    pgd,
    pure_pgd,
    square,
    targeted_dlr,
)
from perceptual_at.averaging import call_with, ema_update, refresh_batch_norm, snapshot, swa_update
from perceptual_at.divergences import (
    cosine_distance,
    js_divergence,
    kl_divergence,
    prediction_squared_error,
    soft_logit_margin,
    squared_error,
)
from perceptual_at.evaluation import (
    Check,
    Evaluation,
    aggregate,
    compare,
    evaluate,
    mcnemar,
    quantize,
    sanity_checks,
    still_adversarial,
    wilson_interval,
)
from perceptual_at.losses import (
    boosted_cross_entropy,
    brier_loss,
    consistency_loss,
    dicar_loss,
    distillation_loss,
    grad_align_loss,
    hypersphere_loss,
    interpolation_consistency_loss,
    logit_pairing_loss,
    mart_loss,
    max_margin_loss,
    normalized_error_loss,
    one_vs_rest_loss,
    robust_perception_kl_loss,
    robust_perception_loss,
    score_loss,
    soft_cross_entropy_loss,
    temporal_ensembling_loss,
    trades_loss,
    weighted_kl_loss,
    weighted_mse_loss,
)
from perceptual_at.metrics import accuracy, mean_score, nrr
from perceptual_at.partitions import Partition, adaptive_eta, boundary_partition
from perceptual_at.paths import draw_beta, interpolate
from perceptual_at.soft_labels import smooth_labels
from perceptual_at.threats import L1, L2, Linf, Threat

__version__ = "0.1.0"

# In reading order: how far, along which path, by which attack, with which loss, measured how.
__all__ = [  # noqa: RUF022
    "Threat",
    "Linf",
    "L2",
    "L1",
    "interpolate",
    "draw_beta",
    "pgd",
    "fgsm",
    "cw",
    "n_fgsm",
    "friendly_pgd",
    "pure_pgd",
    "apgd",
    "fab",
    "square",
    "auto_attack",
    "Verdict",
    "AutoAttackVerdict",
    "Protocol",
    "SampleGenerator",
    "frozen",
    "Lane",
    "margin",
    "dlr",
    "targeted_dlr",
    "kl_to",
    "soft_logit_margin",
    "robust_perception_loss",
    "robust_perception_kl_loss",
    "dicar_loss",
    "trades_loss",
    "mart_loss",
    "boosted_cross_entropy",
    "weighted_kl_loss",
    "consistency_loss",
    "temporal_ensembling_loss",
    "distillation_loss",
    "max_margin_loss",
    "interpolation_consistency_loss",
    "one_vs_rest_loss",
    "normalized_error_loss",
    "grad_align_loss",
    "brier_loss",
    "score_loss",
    "soft_cross_entropy_loss",
    "weighted_mse_loss",
    "logit_pairing_loss",
    "hypersphere_loss",
    "smooth_labels",
    "boundary_partition",
    "Partition",
    "adaptive_eta",
    "squared_error",
    "prediction_squared_error",
    "kl_divergence",
    "js_divergence",
    "cosine_distance",
    "snapshot",
    "ema_update",
    "swa_update",
    "refresh_batch_norm",
    "call_with",
    "accuracy",
    "mean_score",
    "nrr",
    "evaluate",
    "Evaluation",
    "compare",
    "aggregate",
    "wilson_interval",
    "mcnemar",
    "sanity_checks",
    "Check",
    "quantize",
    "still_adversarial",
    "objectives",
    "theory",
]

if TYPE_CHECKING:  # a `__getattr__` that they see would have every misspelt name be one
    from perceptual_at import attacks as attacks
    from perceptual_at import augment as augment
    from perceptual_at import averaging as averaging
    from perceptual_at import checkpoints as checkpoints
    from perceptual_at import class_predictions as class_predictions
    from perceptual_at import commands as commands
    from perceptual_at import data as data
    from perceptual_at import diagnostics as diagnostics
    from perceptual_at import divergences as divergences
    from perceptual_at import evaluation as evaluation
    from perceptual_at import gradient_revision as gradient_revision
    from perceptual_at import losses as losses
    from perceptual_at import memories as memories
    from perceptual_at import metrics as metrics
    from perceptual_at import models as models
    from perceptual_at import partitions as partitions
    from perceptual_at import paths as paths
    from perceptual_at import plotting as plotting
    from perceptual_at import published as published
    from perceptual_at import sample_weights as sample_weights
    from perceptual_at import schedules as schedules
    from perceptual_at import soft_labels as soft_labels
    from perceptual_at import threats as threats
    from perceptual_at import victims as victims
    from perceptual_at import weight_perturbation as weight_perturbation
else:
    __getattr__, __dir__ = on_first_use(__name__, __path__)
