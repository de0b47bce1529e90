"""The papers' statements, corrected, as functions that return both sides.

Use it as `from perceptual_at import theory`, then `theory.segment_residual(h, x, delta, alphas)`. Every function takes
any batched map `h`, a module in eval mode or a plain function, and none forms a Hessian. Tensors of several places, or
of a weight for each sample, are taken as they are: that they lie in [0, 1] is looked at in numbers only.
"""

from perceptual_at.theory._shared import Identity, Inequality, Map
from perceptual_at.theory.curvature import (
    curvature_bound,
    directional_second_derivative,
    mean_jacobian_identity,
    peano_identity,
    residual_certificate,
    second_derivative,
    second_difference,
    slope_variation,
)
from perceptual_at.theory.gaussian import (
    Estimators,
    consistency_estimator,
    critical_noise,
    folded_mean,
    half_error_threshold,
    predicted_error,
    robust_error,
    sample_estimators,
    simulated_half_error_threshold,
    standard_error,
)
from perceptual_at.theory.jacobian import (
    batch_jacobian,
    directional_gap,
    directional_jacobian,
    hessian_identity,
    jacobian_gap,
    power_jacobian_gap,
)
from perceptual_at.theory.lipschitz import (
    jacobian_gap_bound,
    linf_to_l2_norm,
    lipschitz_quotient,
    local_lipschitz_bound,
)
from perceptual_at.theory.mixup import (
    adversarial_first_order_term,
    adversarial_mixup_identity,
    crossover_eps,
    mixup_box,
    mixup_identity,
    mixup_residual,
    taylor_mixup_residual,
)
from perceptual_at.theory.relu import Kinks, count_activation_flips, hessian_is_vacuous, kink_identity, kinks
from perceptual_at.theory.taylor import (
    layer_residuals,
    norm_defect,
    segment_quotient,
    segment_residual,
    stewart_identity,
    taylor_coefficients,
    taylor_residual,
)

__all__ = [  # noqa: RUF022 - in reading order
    # both sides of a statement
    "Identity",
    "Inequality",
    "Map",
    # the residual on a segment, and its Taylor series
    "segment_residual",
    "segment_quotient",
    "norm_defect",
    "stewart_identity",
    "layer_residuals",
    "taylor_coefficients",
    "taylor_residual",
    # second derivatives
    "directional_second_derivative",
    "second_derivative",
    "second_difference",
    "peano_identity",
    "mean_jacobian_identity",
    "curvature_bound",
    "slope_variation",
    "residual_certificate",
    # piecewise-linear networks
    "hessian_is_vacuous",
    "Kinks",
    "kinks",
    "kink_identity",
    "count_activation_flips",
    # the Jacobian along the segment
    "directional_jacobian",
    "batch_jacobian",
    "jacobian_gap",
    "power_jacobian_gap",
    "directional_gap",
    "lipschitz_quotient",
    "jacobian_gap_bound",
    "local_lipschitz_bound",
    "hessian_identity",
    "linf_to_l2_norm",
    # interpolated inputs
    "mixup_residual",
    "taylor_mixup_residual",
    "mixup_identity",
    "adversarial_first_order_term",
    "adversarial_mixup_identity",
    "crossover_eps",
    "mixup_box",
    # the Gaussian model
    "standard_error",
    "robust_error",
    "folded_mean",
    "critical_noise",
    "predicted_error",
    "half_error_threshold",
    "simulated_half_error_threshold",
    "consistency_estimator",
    "Estimators",
    "sample_estimators",
]
