"""One file per objective term; every loss takes logits and ends in the same reduction."""

from perceptual_at.losses.consistency import consistency_loss
from perceptual_at.losses.dicar import dicar_loss
from perceptual_at.losses.distillation import distillation_loss
from perceptual_at.losses.dummy_class import dummy_class_loss
from perceptual_at.losses.grad_align import grad_align_loss
from perceptual_at.losses.hypersphere import hypersphere_loss
from perceptual_at.losses.ikl import soft_cross_entropy_loss, weighted_mse_loss
from perceptual_at.losses.interpolation_consistency import interpolation_consistency_loss
from perceptual_at.losses.logit_pairing import logit_pairing_loss
from perceptual_at.losses.mart import boosted_cross_entropy, mart_loss, weighted_kl_loss
from perceptual_at.losses.max_margin import max_margin_loss
from perceptual_at.losses.normalized_error import normalized_error_loss
from perceptual_at.losses.one_vs_rest import one_vs_rest_loss
from perceptual_at.losses.robust_perception import robust_perception_kl_loss, robust_perception_loss
from perceptual_at.losses.score import brier_loss, score_loss
from perceptual_at.losses.temporal_ensembling import temporal_ensembling_loss
from perceptual_at.losses.trades import trades_loss

__all__ = [
    "boosted_cross_entropy",
    "brier_loss",
    "consistency_loss",
    "dicar_loss",
    "distillation_loss",
    "dummy_class_loss",
    "grad_align_loss",
    "hypersphere_loss",
    "interpolation_consistency_loss",
    "logit_pairing_loss",
    "mart_loss",
    "max_margin_loss",
    "normalized_error_loss",
    "one_vs_rest_loss",
    "robust_perception_kl_loss",
    "robust_perception_loss",
    "score_loss",
    "soft_cross_entropy_loss",
    "temporal_ensembling_loss",
    "trades_loss",
    "weighted_kl_loss",
    "weighted_mse_loss",
]
