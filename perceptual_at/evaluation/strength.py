"""Which of two attacks is the stronger, from the samples that each of them breaks.

Attacks are compared by the samples that one of them breaks and the other does not. If the stronger were at least as
strong, each of these would be its own with probability one half or more; a check fails when the binomial chance of
what was seen is below `level`. An honest model thus fails each of them with a probability of at most `level`, whatever
the number of samples.
"""

from fractions import Fraction

from torch import Tensor

from perceptual_at import _check
from perceptual_at.evaluation.checks import MASKING, Check
from perceptual_at.evaluation.statistics import binomial_tail

STRONGER = (
    "report the strongest of several attacks (more steps and restarts, `margin` and `dlr` losses, black-box, transfer) "
    "and look for operations without a gradient, saturation and randomness in the model"
)


def check_stronger(
    name: str,
    strong: Tensor,
    weak: Tensor,
    *,
    names: tuple[str, str] = ("the stronger", "the weaker"),
    level: float = 0.01,
) -> Check:
    r"""The attack that should be the stronger of two is so, on the same samples.

    Of the $n$ samples that only one of them breaks, $k$ are broken by the weaker. If that were at most as likely as
    the other way round, the chance of $k$ or more is $\sum_{i \ge k} \binom{n}{i} 2^{-n}$ at most; the check fails
    when this is below `level`.

    Args:
        name: of the check.
        strong: samples that the attack with more steps, restarts, budget or knowledge breaks, boolean `(B,)`, such as
            the `success` of its `Verdict`.
        weak: samples that the other one breaks.
        names: of the two attacks, for the text.
        level: largest probability with which an honest model fails.

    Returns:
        A `Check`; its value is that chance.

    Raises:
        ValueError: if a mask is not boolean or they differ in shape.

    Examples:
        >>> strong, weak = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
        >>> check_stronger("steps", strong, weak).value  # 1 / 2^8
        0.00390625
        >>> check_stronger("steps", strong, weak).passed, check_stronger("steps", strong[:6], weak[:6]).passed
        (False, True)
    """
    _check.mask("check_stronger", "strong", strong, weak=weak)
    _check.mask("check_stronger", "weak", weak, strong=strong)
    only_weak, only_strong = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    chance = binomial_tail(only_weak, only_weak + only_strong, Fraction(1, 2))
    passed = chance >= level
    return Check(
        name, passed, chance,
        f"{names[0]} broke {int(strong.sum())} and {names[1]} {int(weak.sum())} of {len(weak)}, {only_weak} of them "
        f"alone (p = {chance:.2g})",
        "" if passed else MASKING,
        "" if passed else STRONGER,
    )  # fmt: skip


def check_alone(
    name: str,
    known: Tensor,
    other: Tensor,
    *,
    names: tuple[str, str] = ("known attacks", "another"),
    level: float = 0.01,
) -> Check:
    """No attack of another kind breaks what the known ones left: neither more than 1 %, nor more than they do alone.

    On an honest model now and then a sample falls to such an attack alone. The check fails when that happens to more
    samples than would with a chance below `level / 2` if each did with a probability of 1 %, or when `check_stronger`
    fails at `level / 2`.

    Args:
        name: of the check.
        known: samples that the known attacks break, boolean `(B,)`.
        other: samples that the other one breaks.
        names: of both, for the text.
        level: largest probability with which an honest model fails.

    Returns:
        A `Check`; its value is the smaller of the two chances.

    Raises:
        ValueError: if a mask is not boolean or they differ in shape.

    Examples:
        >>> known = torch.arange(200) < 100
        >>> check_alone("black_box", known, torch.arange(200) > 197).passed  # two samples of 200
        True
        >>> check_alone("black_box", known, torch.arange(200) > 189).passed  # ten
        False
    """
    stronger = check_stronger(name, known, other, names=names)
    alone = int((other & ~known).sum())
    chance = min(stronger.value, binomial_tail(alone, len(known), Fraction(1, 100)))
    passed = chance >= level / 2
    return Check(
        name, passed, chance,
        f"{names[0]} broke {int(known.sum())} of {len(known)}, {names[1]} {int(other.sum())}, {alone} of them alone",
        "" if passed else MASKING,
        "" if passed else STRONGER,
    )  # fmt: skip


def check_losses(
    entropy: Tensor, difference: Tensor, *, level: float = 0.01, least: float = 0.03, steps: int = 50
) -> Check:
    r"""The cross entropy leads attacks as well as the margin does, so that its accuracy is not too good.

    Where logits are large, differ in scale from class to class, or lie close together as TRADES leaves them, PGD on the
    cross entropy breaks fewer samples than on the margin. Of the $n$ samples that one of them breaks alone, $k$ fall to
    the margin. The check fails when $k$ or more are a rare event among $n$ fair coins, below `level`, and the
    accuracies differ by `least` or more. The other way round the accuracy under the cross entropy is the smaller one,
    and the check passes.

    Args:
        entropy: samples that PGD on the cross entropy breaks, boolean `(B,)`.
        difference: samples that PGD on the margin breaks.
        level: largest probability with which equally strong attacks fail.
        least: smallest difference that matters, a fraction.
        steps: of both, for the text.

    Returns:
        A `Check`; its value is the accuracy under the cross entropy minus that under the margin.

    Raises:
        ValueError: if a mask is not boolean or they differ in shape.

    Examples:
        >>> entropy, difference = torch.arange(200) < 50, torch.arange(200) < 60
        >>> print(check_losses(entropy, difference).value)
        0.05
        >>> check_losses(entropy, difference).passed, check_losses(difference, entropy).passed
        (False, True)
    """
    _check.mask("check_losses", "entropy", entropy, difference=difference)
    _check.mask("check_losses", "difference", difference, entropy=entropy)
    only_entropy, only_difference = int((entropy & ~difference).sum()), int((difference & ~entropy).sum())
    gap = (only_difference - only_entropy) / max(1, len(entropy))
    chance = binomial_tail(only_difference, only_difference + only_entropy, Fraction(1, 2))
    passed = gap < least or chance >= level
    return Check(
        "losses", passed, gap,
        f"PGD-{steps} leaves {100 * float((~entropy).double().mean()):.2f} % on the cross entropy and "
        f"{100 * float((~difference).double().mean()):.2f} % on the margin (p = {chance:.2g})",
        "" if passed else
        "that the cross entropy misleads attacks: the logits are large, on several scales, or close together",
        "" if passed else "report the smallest accuracy of attacks on several losses; here the margin does better",
    )  # fmt: skip
