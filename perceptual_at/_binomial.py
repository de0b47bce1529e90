"""The chance of a count, exactly."""

from fractions import Fraction


def binomial_tail(successes: int, n: int, probability: Fraction) -> float:
    """Exact chance of at least `successes` in `n` independent trials.

    Args:
        successes: how many, in `[0, n]`.
        n: trials.
        probability: of a success in each, a fraction in [0, 1].

    Returns:
        The probability, rounded once at the end.

    Examples:
        >>> binomial_tail(2, 3, Fraction(1, 2))  # three of eight, and one of eight
        0.5
    """
    p, q = probability.numerator, probability.denominator - probability.numerator
    if not (p and q):
        return float(successes == 0 or p > 0)
    # Whole numbers, C(n, k) p^k q^(n-k), from the nearer end of the distribution.
    upper = successes > n - successes
    (p, q), terms = ((q, p), n - successes + 1) if upper else ((p, q), successes)
    total, term = 0, q**n
    for k in range(terms):
        total += term
        term = term * (n - k) * p // ((k + 1) * q)
    everything = (p + q) ** n
    share: float = (total if upper else everything - total) / everything
    return share


def rare(count: int, n: int, *, level: float = 0.01) -> bool:
    """Whether more of `n` samples show something than would with a chance of `level` if 1 % of all did.

    Examples:
        >>> rare(2, 100), rare(6, 100)
        (False, True)
    """
    return n > 0 and binomial_tail(count, n, Fraction(1, 100)) < level
