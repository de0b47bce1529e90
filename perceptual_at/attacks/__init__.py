"""Attacks: functions over threat x loss, safe to call in the middle of training."""

from perceptual_at.attacks.apgd import apgd
from perceptual_at.attacks.autoattack import AutoAttackVerdict, auto_attack
from perceptual_at.attacks.fab import fab
from perceptual_at.attacks.freeze import frozen
from perceptual_at.attacks.gradient import cw, fgsm, pgd
from perceptual_at.attacks.lanes import Lane
from perceptual_at.attacks.protocol import Protocol
from perceptual_at.attacks.pure import pure_pgd
from perceptual_at.attacks.square import square
from perceptual_at.attacks.targets import dlr, kl_to, margin, targeted_dlr
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.divergences import cross_entropy

__all__ = [
    "AutoAttackVerdict",
    "Lane",
    "Protocol",
    "Verdict",
    "apgd",
    "auto_attack",
    "cross_entropy",
    "cw",
    "dlr",
    "fab",
    "fgsm",
    "frozen",
    "kl_to",
    "margin",
    "pgd",
    "pure_pgd",
    "square",
    "targeted_dlr",
]
