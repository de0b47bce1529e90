"""Attacks: functions over threat x loss, safe to call in the middle of training."""

from perceptual_at.attacks.freeze import frozen
from perceptual_at.attacks.gradient import fgsm, pgd
from perceptual_at.attacks.targets import cross_entropy, dlr, kl_to, margin

__all__ = ["cross_entropy", "dlr", "fgsm", "frozen", "kl_to", "margin", "pgd"]
