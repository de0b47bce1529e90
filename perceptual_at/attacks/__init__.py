"""Attacks: functions over threat x loss, safe to call in the middle of training."""

from perceptual_at.attacks.apgd import apgd
from perceptual_at.attacks.autoattack import AutoAttackVerdict, auto_attack
from perceptual_at.attacks.fab import fab
from perceptual_at.attacks.pgd import cw, fgsm, pgd
from perceptual_at.attacks.protocol import Protocol
from perceptual_at.attacks.pure import pure_pgd
from perceptual_at.attacks.square import square
from perceptual_at.attacks.surrogate import surrogate_pgd
from perceptual_at.attacks.targets import cospgd_loss, dlr, kl_to, margin, segpgd_loss, targeted_dlr
from perceptual_at.attacks.training import Margins, bisect_margins, find_margins, friendly_pgd, n_fgsm
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.divergences import cross_entropy, soft_logit_margin
from perceptual_at.victims import Lane, frozen

__all__ = [
    "AutoAttackVerdict",
    "Lane",
    "Margins",
    "Protocol",
    "Verdict",
    "apgd",
    "auto_attack",
    "bisect_margins",
    "cospgd_loss",
    "cross_entropy",
    "cw",
    "dlr",
    "fab",
    "fgsm",
    "find_margins",
    "friendly_pgd",
    "frozen",
    "kl_to",
    "margin",
    "n_fgsm",
    "pgd",
    "pure_pgd",
    "segpgd_loss",
    "soft_logit_margin",
    "square",
    "surrogate_pgd",
    "targeted_dlr",
]
