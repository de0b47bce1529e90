"""N-FGSM: one step from noise that is larger than the ball, for training."""

from torch import Tensor

from perceptual_at import _check
from perceptual_at._random import Generator
from perceptual_at.attacks.pgd import pgd
from perceptual_at.divergences import PerSampleLoss, cross_entropy
from perceptual_at.threats import Threat, budget, check_threat
from perceptual_at.victims import Lane, Model, ModelMode


def n_fgsm(
    model: Model,
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    noise: float = 2.0,
    loss: PerSampleLoss = cross_entropy,
    model_mode: ModelMode = "eval",
    lane: Lane | None = None,
    validate: bool = True,
    generator: Generator | None = None,
) -> Tensor:
    r"""Inputs for single-step training: noise beyond the ball, then one full step, and no way back into the ball.

    $$ \tilde x = \Pi_{\mathrm{box}}\big( x_\eta + \epsilon\, \mathrm{steepest}(\nabla_{x_\eta} \ell) \big), \qquad
       x_\eta = \Pi_{\mathrm{box}}(x + \eta), \quad \eta \text{ uniform within } 2 \epsilon $$

    The result is meant for training and **lies outside the threat model**: up to `1 + noise` budgets from `x`, inside
    the box. Do not evaluate with it. The step is one budget, not the 1.25 of FGSM from a random start, which is
    `pgd(..., steps=1, step_size=1.25 * eps)`.

    Args:
        model: see `pgd`; one forward and one input-gradient pass.
        x: clean inputs inside the bounds.
        labels: class indices `(B,)`.
        threat: the threat model one trains for; the noise is its `random_start`, scaled.
        noise: size of the noise in budgets; 2, and 3 on SVHN at 12/255.
        loss: per-sample function `(logits, labels) -> (B,)`.
        model_mode: see `pgd`. The released code attacks in train mode: `"as_is"`.
        lane: see `pgd`.
        validate: see `pgd`.
        generator: source of the noise; see `pgd`.

    Returns:
        Inputs to train on, shape and dtype of `x`, detached.

    Raises:
        TypeError: see `pgd`.
        ValueError: see `pgd`; if `noise` is not positive.

    Source:
        de Jorge et al. 2022, Algorithm 1, and its released code.

    Examples:
        >>> model = lambda x: torch.cat([x, -x], dim=1)
        >>> x_adv = n_fgsm(model, torch.tensor([[0.5]]), torch.tensor([0]), Linf(0.125))
        >>> bool(((x_adv >= 0.5 - 3 * 0.125) & (x_adv <= 0.5 + 0.125)).all())  # noise of 2, a step down of 1
        True
    """
    _check.floating("n_fgsm", x=x)
    _check.number("n_fgsm", "noise", noise, above=0.0)
    check_threat("n_fgsm", threat)
    start = threat.scaled(noise).random_start(x.detach(), generator=generator)
    return pgd(
        model, x, labels, threat.scaled(noise + 1), steps=1, step_size=budget("n_fgsm", threat), start=start,
        loss=loss, model_mode=model_mode, lane=lane, validate=validate,
    )  # fmt: skip
