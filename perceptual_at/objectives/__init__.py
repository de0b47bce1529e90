"""The papers' objectives as visible sums of public terms.

All are called alike, `(model, views, labels, attack, *, ...) -> (loss, terms)`:

    attack = functools.partial(pgd, threat=Linf(8 / 255), steps=10, step_size=2 / 255)
    loss, terms = objectives.raat(model, (x1, x2), labels, attack, mix=draw_beta(fold="max"))

`views` is `(x,)` or `(x1, x2)`, two augmentations of the same images, which are joined to one batch of 2B
rows; `attack` is any function `(model, x, labels) -> x_adv`, which some, TRADES and MART among them, also
give a `start=`, and some, as TRADES, a `loss=`. `terms` maps the name of each term to a detached scalar.
Clean, middle and adversarial inputs go through the model one after the other, not concatenated, because batch
norm in train mode would mix their statistics; a method whose released code concatenates them says so. The
caller owns train mode, the optimiser and the averaging step.

Defaults are the released codes' choices, which produced the published numbers; `preset(name, "paper")` gives
the keywords of the papers' formulas.
"""

from perceptual_at.objectives.bases import consistency_at, mart, pgd_at, trades
from perceptual_at.objectives.cure import cure
from perceptual_at.objectives.ducat import ducat
from perceptual_at.objectives.grad_align import grad_align
from perceptual_at.objectives.hypersphere import hypersphere
from perceptual_at.objectives.ikl import ikl
from perceptual_at.objectives.lbgat import lbgat
from perceptual_at.objectives.mma import mma
from perceptual_at.objectives.pairing import alp, clp
from perceptual_at.objectives.piat import piat
from perceptual_at.objectives.presets import preset
from perceptual_at.objectives.raat import dicar, raat, raat_plus_plus, raat_sharp
from perceptual_at.objectives.rebat import rebat, rpat_plus_plus
from perceptual_at.objectives.rectification import adr
from perceptual_at.objectives.reweighting import ewat, gairat, mail, sovr
from perceptual_at.objectives.rpat import rpat, rpat_raat
from perceptual_at.objectives.score import score
from perceptual_at.objectives.teachers import hat, kd
from perceptual_at.objectives.temporal import te
from perceptual_at.objectives.unattacked import random_noise, standard

__all__ = [
    "adr",
    "alp",
    "clp",
    "consistency_at",
    "cure",
    "dicar",
    "ducat",
    "ewat",
    "gairat",
    "grad_align",
    "hat",
    "hypersphere",
    "ikl",
    "kd",
    "lbgat",
    "mail",
    "mart",
    "mma",
    "pgd_at",
    "piat",
    "preset",
    "raat",
    "raat_plus_plus",
    "raat_sharp",
    "random_noise",
    "rebat",
    "rpat",
    "rpat_plus_plus",
    "rpat_raat",
    "score",
    "sovr",
    "standard",
    "te",
    "trades",
]
