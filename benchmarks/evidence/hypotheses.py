"""What was expected before the first run: which difference has which sign in which column."""

from typing import NamedTuple

from evidence.design import REGIMES


class Hypothesis(NamedTuple):
    """The sign that the difference `arm` minus `control` is expected to have in a column.

    Sign 0 says that the term does nothing that counts: the interval lies within a point of zero.
    """

    arm: str
    control: str
    column: str
    sign: int
    regimes: tuple[str, ...]
    why: str


ALL = ("all",)
MARGIN = 1.0
"""Points within which a difference counts as none."""

HYPOTHESES = (
    Hypothesis("rpat_release", "pgd_at", "nrr", 1, REGIMES, "RPAT's claim, as published: passes and term together"),
    Hypothesis("rpat_weight_0", "pgd_at", "clean", 1, REGIMES, "batch norm's statistics also see clean images"),
    Hypothesis("rpat_weight_0", "pgd_at", "pgd20", -1, REGIMES, "and fit adversarial ones less"),
    Hypothesis("rpat_release", "rpat_weight_0", "nrr", 0, REGIMES, "at its released weight the term is too small"),
    Hypothesis("rpat_eq3", "rpat_weight_0", "nrr", 1, REGIMES, "RPAT's claim for Eq. 3, the term alone"),
    Hypothesis("pgd_at_two_views", "pgd_at", "nrr", 1, REGIMES, "twice the images per step"),
    Hypothesis("raat", "pgd_at_two_views", "nrr", 1, REGIMES, "RAAT's claim, at equal attacks"),
    Hypothesis("raat", "pgd_at_two_views", "clean", 1, REGIMES, "smaller perturbations at the boundary"),
    Hypothesis("consistency_at", "pgd_at_two_views", "pgd20", 1, ("small",), "it is made against overfitting"),
    Hypothesis("consistency_at_rpat", "consistency_at", "nrr", 1, REGIMES, "RPAT's claim on Consistency-AT"),
    Hypothesis("raat", "raat_without_bound", "clean", 1, ALL, "BOUND buys clean accuracy"),
    Hypothesis("raat", "raat_without_bound", "pgd20", -1, ALL, "and pays with robustness"),
    Hypothesis("raat", "raat_without_dicar", "pgd20", 1, ALL, "RAAT's claim for DICAR"),
    Hypothesis("trades", "pgd_at", "autoattack", 1, ALL, "the field's experience"),
    Hypothesis("trades", "pgd_at", "clean", -1, ALL, "the field's experience"),
    Hypothesis("mart", "pgd_at", "pgd20", 1, ALL, "the field's experience"),
    Hypothesis("mart", "pgd_at", "clean", -1, ALL, "the field's experience"),
    Hypothesis("pgd_at_awp", "pgd_at", "clean", -1, ALL, "a network that underfits is held back further"),
    Hypothesis("pgd_at_awp", "pgd_at", "pgd20", 1, ("small",), "it is made against overfitting"),
    Hypothesis("pgd_at_average", "pgd_at", "nrr", 0, ALL, "a rate that falls to zero averages already"),
    Hypothesis("pgd_at_average", "pgd_at", "pgd20", 1, ("small",), "it is made against overfitting"),
    Hypothesis("rpat_relative", "rpat_weight_0", "nrr", 0, ALL, "on digits it was inside the noise"),
    Hypothesis("rpat_raat_weight_0", "raat", "clean", 1, ALL, "batch norm's statistics also see clean images"),
    Hypothesis("rpat_raat", "rpat_raat_weight_0", "nrr", 0, ALL, "at its released weight the term is too small"),
    Hypothesis("raat_adaptive", "raat", "nrr", -1, ALL, "on digits it cost"),
)
"""The first seventeen were written before the first run. The eight on later arms (AWP, averaged weights, the relative
form, RPAT with RAAT, adaptive eta) were added when four runs had finished, none of them of these arms; at the same time
"small" was left out for RAAT's two halves, TRADES and MART, of which none had run, to spend its hours on these.

All are about the weights that the held-out images chose, by paired differences over seeds; intervals of 95 %, not
corrected for their number. `nrr` is that of clean accuracy and PGD-20 on the 10,000 test images."""
