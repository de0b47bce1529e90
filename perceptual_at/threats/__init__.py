"""Threat models: how far an adversarial input may be from the clean one, and all geometry that follows.

A threat model is a small frozen value. `pgd` needs five things of it (see `Threat`), so a new one takes
about fifteen lines. Every `project` here returns points that are inside the ball and the box exactly: with
`delta = x_adv - x`, `threat.norm(delta) <= threat.eps` holds with no tolerance in float64, float32, float16
and bfloat16, whether the difference is taken in the dtype of the inputs or in a wider one.

The functions here work for any threat model, also one of the user's own.
"""

from perceptual_at.threats.ball import Ball
from perceptual_at.threats.kinds import as_ball as as_ball
from perceptual_at.threats.kinds import as_released as as_released
from perceptual_at.threats.kinds import is_ball as is_ball
from perceptual_at.threats.kinds import is_published as is_published
from perceptual_at.threats.kinds import norm_name as norm_name
from perceptual_at.threats.kinds import settings as settings
from perceptual_at.threats.kinds import whole_box as whole_box
from perceptual_at.threats.l1 import L1
from perceptual_at.threats.l2 import L2
from perceptual_at.threats.linf import Linf
from perceptual_at.threats.threat import Ascent, Threat, around, ascent, select
from perceptual_at.threats.threat import box as box
from perceptual_at.threats.threat import budget as budget
from perceptual_at.threats.threat import budgets as budgets
from perceptual_at.threats.threat import check_excess as check_excess
from perceptual_at.threats.threat import check_threat as check_threat
from perceptual_at.threats.threat import is_threat as is_threat
from perceptual_at.threats.threat import projected as projected
from perceptual_at.threats.threat import start as start

__all__ = ["L1", "L2", "Ascent", "Ball", "Linf", "Threat", "around", "ascent", "select"]
