"""ICT's term: the prediction of a mixed input should be the mixture of a teacher's predictions."""

from typing import Literal

from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import kl_of_logs, log_distribution
from perceptual_at.paths import fraction, mixture


def interpolation_consistency_loss(
    mixed_logits: Tensor,
    teacher_logits_1: Tensor,
    teacher_logits_2: Tensor,
    *,
    mix: float | Tensor,
    criterion: Literal["mse", "kl"] = "mse",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far the prediction of a mixed input is from the mixture of a teacher's logits at its two parts.

    $$ \ell = D\big( p(\lambda u_1 + (1 - \lambda) u_2),\
              \mathrm{softmax}(\lambda \bar f(u_1) + (1 - \lambda) \bar f(u_2)) \big) $$

    with $\lambda$ = `mix` and $D$ the mean squared difference over classes, or the KL of the prediction from the
    target. Logits are mixed, then softmax: RAAT's released `dicar_loss(space="logits")` comes from here. The two parts
    are different images, both clean; DICAR takes two views of one image, and mixes their adversarial versions.

    Args:
        mixed_logits: $f(\lambda u_1 + (1 - \lambda) u_2)$, shape `(B, K)`, or dense `(B, K, *S)`.
        teacher_logits_1: $\bar f(u_1)$ of averaged weights, the same shape; held fixed by the caller.
        teacher_logits_2: $\bar f(u_2)$, usually `teacher_logits_1[permutation]`, the same shape.
        mix: weight of part 1 in [0, 1]; a tensor `(B,)` gives each sample its own. ICT draws it from a Beta
            distribution without folding it.
        criterion: `"mse"` or `"kl"`.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, `mix` is outside [0, 1], or `criterion` is unknown.

    Source:
        Verma et al. 2019 (ICT), Eq. 2, and its released code.

    Examples:
        >>> right, left = torch.tensor([[0.0, 9.0]]), torch.tensor([[9.0, 0.0]])
        >>> interpolation_consistency_loss(torch.zeros(1, 2), right, left, mix=0.5)
        tensor(0.)
        >>> interpolation_consistency_loss(torch.zeros(1, 2), right * 9, left, mix=1.0)
        tensor(0.2500)
    """
    name = "interpolation_consistency_loss"
    given = mixed_logits, teacher_logits_1, teacher_logits_2
    _check.logits(name, mixed_logits=mixed_logits, teacher_logits_1=teacher_logits_1, teacher_logits_2=teacher_logits_2)
    _check.choice(name, "criterion", criterion, ("mse", "kl"))
    mixed, teacher_1, teacher_2 = (logits.to(wide(*given)) for logits in given)
    weight = fraction(name, "mix", mix, mixed)
    log_p = log_distribution(mixed)
    log_target = log_distribution(mixture(teacher_1, teacher_2, weight))
    if criterion == "kl":
        distance = kl_of_logs(log_target, log_p)
    else:
        distance = (log_p.exp() - log_target.exp()).square().mean(dim=1)
    return reduce(name, distance.to(common(*given)), reduction)
