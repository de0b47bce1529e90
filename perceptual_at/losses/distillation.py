"""Knowledge distillation: a student should predict what its teacher does."""

from typing import Literal

from torch import Tensor

from perceptual_at import _check
from perceptual_at._reduce import Reduction, reduce
from perceptual_at._rounding import common, wide
from perceptual_at.divergences import kl_of_logs, log_distribution, times_log


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    form: Literal["cross_entropy", "kl"] = "cross_entropy",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How badly a student describes its teacher's softened prediction.

    $$ \ell = -T^2 \sum_k q_k \log p_k, \qquad
       p = \mathrm{softmax}(z / T),\ q = \mathrm{softmax}(z_{\mathrm{teacher}} / T) $$

    `form="kl"` subtracts the teacher's entropy, so that the smallest value is 0; the student's gradient is the same.

    Args:
        logits: the student's, shape `(B, K)`, or dense `(B, K, *S)`.
        teacher_logits: the teacher's, the same shape; held fixed by the caller.
        temperature: $T$; the factor $T^2$ keeps the gradient's size.
        form: `"cross_entropy"` (the released code of KD+SWA) or `"kl"`.
        reduction: `"none"` gives shape `(B,)`; `"mean"` and `"sum"` reduce over the batch.

    Returns:
        The loss in nats, a scalar unless `reduction="none"`.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes or devices differ, `temperature` is not positive, or `form` is unknown.

    Source:
        Chen et al. 2021 (KD+SWA), Eq. 2, and its released code.

    Examples:
        >>> even = torch.zeros(1, 2)
        >>> distillation_loss(even, even, temperature=1.0)  # log 2
        tensor(0.6931)
        >>> distillation_loss(even, even, form="kl")
        tensor(0.)
    """
    name = "distillation_loss"
    _check.logits(name, logits=logits, teacher_logits=teacher_logits)
    _check.number(name, "temperature", temperature, above=0.0)
    _check.choice(name, "form", form, ("cross_entropy", "kl"))
    dtype = wide(logits, teacher_logits)
    log_p, log_q = (log_distribution(z.to(dtype), temperature) for z in (logits, teacher_logits))
    distance = kl_of_logs(log_q, log_p) if form == "kl" else -times_log(log_q.exp(), log_p).sum(dim=1)
    return reduce(name, (temperature**2 * distance).to(common(logits, teacher_logits)), reduction)
