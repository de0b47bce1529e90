"""Evaluation: clean and robust accuracy with everything a reader needs to trust them."""

from perceptual_at.evaluation.checks import Check
from perceptual_at.evaluation.comparison import (
    Aggregate,
    Comparison,
    Difference,
    MeanStd,
    PublishedDifference,
    against_published,
    aggregate,
    compare,
)
from perceptual_at.evaluation.loop import evaluate
from perceptual_at.evaluation.masking import sanity_checks
from perceptual_at.evaluation.quantization import quantize, still_adversarial
from perceptual_at.evaluation.report import Cost, Evaluation
from perceptual_at.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    mcnemar,
    mean_interval,
    paired_interval,
    wilson_interval,
)

__all__ = [
    "Aggregate",
    "Check",
    "Comparison",
    "Cost",
    "Difference",
    "Evaluation",
    "Interval",
    "MeanStd",
    "PublishedDifference",
    "against_published",
    "aggregate",
    "bootstrap_interval",
    "compare",
    "evaluate",
    "mcnemar",
    "mean_interval",
    "paired_interval",
    "quantize",
    "sanity_checks",
    "still_adversarial",
    "wilson_interval",
]
