"""Composable losses and attacks for adversarial training in PyTorch.

Small pure functions: threat models, attacks, losses, partitions and metrics, which you put together in a
training loop of your own.
"""

from perceptual_at import objectives, theory
from perceptual_at._random import SampleGenerator
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
    frozen,
    kl_to,
    margin,
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
    consistency_loss,
    dicar_loss,
    distillation_loss,
    interpolation_consistency_loss,
    mart_loss,
    max_margin_loss,
    normalized_error_loss,
    one_vs_rest_loss,
    robust_perception_kl_loss,
    robust_perception_loss,
    temporal_ensembling_loss,
    trades_loss,
    weighted_kl_loss,
)
from perceptual_at.metrics import accuracy, mean_score, nrr
from perceptual_at.partitions import Partition, boundary_partition
from perceptual_at.paths import draw_beta, interpolate
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
    "boundary_partition",
    "Partition",
    "squared_error",
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
