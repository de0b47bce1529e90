"""Threat models: how far an adversarial input may be from the clean one, and all geometry that follows.

A threat model is a small frozen value. `pgd` needs five things of it (see `Threat`), so a new one takes
about fifteen lines. Every `project` here returns points that are inside the ball and the box exactly: with
`delta = x_adv - x`, `threat.norm(delta) <= threat.eps` holds with no tolerance in float64, float32, float16
and bfloat16, whether the difference is taken in the dtype of the inputs or in a wider one.

The functions here work for any threat model, also one of the user's own.
"""

from perceptual_at.threats.ball import Ball, as_ball, norm_order
from perceptual_at.threats.entries import Bounds
from perceptual_at.threats.l1 import L1
from perceptual_at.threats.l2 import L2
from perceptual_at.threats.linf import Linf
from perceptual_at.threats.threat import (
    Threat,
    around,
    ascent,
    box,
    budget,
    budgets,
    check_excess,
    check_threat,
    excess,
    is_threat,
    select,
    start,
)

__all__ = [
    "L1",
    "L2",
    "Ball",
    "Bounds",
    "Linf",
    "Threat",
    "around",
    "as_ball",
    "ascent",
    "box",
    "budget",
    "budgets",
    "check_excess",
    "check_threat",
    "excess",
    "is_threat",
    "norm_order",
    "select",
    "start",
]
