"""One file per objective term; every loss takes logits and ends in the same reduction."""

from perceptual_at.losses.consistency import consistency_loss
from perceptual_at.losses.dicar import dicar_loss
from perceptual_at.losses.mart import boosted_cross_entropy, mart_loss, weighted_kl_loss
from perceptual_at.losses.robust_perception import robust_perception_kl_loss, robust_perception_loss
from perceptual_at.losses.trades import trades_loss

__all__ = [
    "boosted_cross_entropy",
    "consistency_loss",
    "dicar_loss",
    "mart_loss",
    "robust_perception_kl_loss",
    "robust_perception_loss",
    "trades_loss",
    "weighted_kl_loss",
]
