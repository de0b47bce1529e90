"""RAAT's Theorem 1: closed forms, the exact sampler, and the number of samples that robustness takes."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import theory
from tests.theory.cases import SEEDS, examples, f64, normal


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.0), ("linf", 0.15), ("l2", 0.4), ("l1", 0.8)])
@pytest.mark.parametrize("seed", range(3))
def test_the_errors_agree_with_counting(norm, eps, seed):
    d, draws, sigma = 6, 200_000, 1.3
    w, theta = normal(seed, 2, d)
    w = w + theta
    y = torch.randint(0, 2, (draws,), generator=generator(seed)) * 2.0 - 1
    x = y[:, None] * theta + sigma * torch.randn(draws, d, generator=generator(seed + 1), dtype=torch.float64)
    # The worst perturbation moves along the dual direction of w, against the label.
    dual = {
        "linf": w.sign(),
        "l2": w / w.norm(),
        "l1": torch.nn.functional.one_hot(w.abs().argmax(), d) * w.sign(),
    }[norm]
    wrong = ((x - eps * y[:, None] * dual) @ w * y < 0).double().mean().item()
    exact = theory.robust_error(w, theta, sigma, eps=eps, norm=norm).item()
    assert abs(wrong - exact) <= 4 * math.sqrt(exact * (1 - exact) / draws)


@given(SEEDS, st.floats(0.1, 5.0), st.sampled_from(["linf", "l2", "l1"]))
@examples(50)
def test_the_errors_ignore_the_length_of_the_classifier_and_grow_with_the_budget(seed, scale, norm):
    w, theta = normal(seed, 2, 10)
    budgets = [0.0, 0.1, 0.5, 2.0]
    errors = torch.stack([theory.robust_error(w, theta, 1.0, eps=eps, norm=norm) for eps in budgets])
    scaled = torch.stack([theory.robust_error(scale * w, theta, 1.0, eps=eps, norm=norm) for eps in budgets])
    assert_close(errors, scaled)
    assert (errors.diff() >= 0).all()
    assert errors[0] == theory.standard_error(w, theta, 1.0)
    best = theory.standard_error(theta, theta, 1.0)
    assert errors[0] >= best
    assert_close(best, torch.special.ndtr(-theta.norm()))


@given(st.floats(1e-3, 50))
@examples(50)
def test_the_mean_size_of_a_noisy_one_is_right(s):
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = (-grid.square() / 2).exp() / math.sqrt(2 * math.pi)
    integral = torch.trapezoid((1 + s * grid).abs() * density, grid).item()
    assert theory.folded_mean(s) == pytest.approx(integral, rel=1e-6)
    assert max(1.0, s * math.sqrt(2 / math.pi)) <= theory.folded_mean(s) * (1 + 1e-12)


@given(st.floats(0.01, 0.99))
@examples(50)
def test_the_critical_noise_cancels_the_signal(eps):
    assert eps * theory.folded_mean(theory.critical_noise(eps)) == pytest.approx(1, rel=1e-9)


# ---- one labelled sample --------------------------------------------------------------------------------------------

C = 0.6
PREDICTED = {  # d: standard, robust at eps = 0.5
    100: (0.0070, 0.365), 1000: (0.0039, 0.859), 10_000: (0.00307, 0.99995), 100_000: (0.00284, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("d", PREDICTED)
def test_one_sample_is_accurate_and_not_robust(d):
    sigma = C * d**0.25
    standard, robust = PREDICTED[d]
    assert theory.predicted_error(d, sigma) == pytest.approx(standard, abs=6e-5)
    assert theory.predicted_error(d, sigma, eps=0.5) == pytest.approx(robust, abs=6e-4)
    if d >= 1000:
        w = theory.sample_estimators(torch.ones(d), sigma, unlabeled=1, runs=100, generator=generator(0)).supervised
        simulated = theory.robust_error(w, torch.ones(d), sigma, eps=0.5).mean().item()
        assert abs(simulated - robust) <= 0.03
        accurate = theory.standard_error(w, torch.ones(d), sigma).mean().item()
        assert abs(accurate - standard) <= 0.005


def test_the_gap_between_the_errors_saturates_below_one_and_does_not_grow_like_the_theorem():
    limit = 1 - theory.standard_error(f64([1.0]), f64([1.0]), C**2).item()  # 1 - Phi(-1 / c^2)
    assert limit == pytest.approx(0.9973, abs=1e-4)
    gaps, printed = [], []
    for d in (10**4, 10**6, 10**8, 10**12):
        sigma = C * d**0.25
        gaps.append(theory.predicted_error(d, sigma, eps=0.5) - theory.predicted_error(d, sigma))
        printed.append(math.sqrt(d) / math.log(d))
    assert all(gap <= limit + 1e-3 for gap in gaps)
    assert gaps[-1] == pytest.approx(limit, abs=1e-4)
    assert printed[-1] / printed[0] > 1000
    assert gaps[-1] / gaps[0] < 1.001


def test_smaller_noise_than_the_equality_leaves_no_gap():
    assert theory.predicted_error(10_000, 0.5) < 1e-200
    assert theory.predicted_error(10_000, 0.5, eps=0.5) < 1e-200


@pytest.mark.parametrize(("eps", "critical"), [(0.5, 2.9e7), (0.9, 6.2e5), (0.25, 6.1e8)])
def test_with_the_constant_of_the_paper_one_sample_is_robust_in_any_practical_dimension(eps, critical):
    assert (32 * theory.critical_noise(eps)) ** 4 == pytest.approx(critical, rel=0.02)
    if eps == 0.5:
        assert theory.predicted_error(10**6, 10**1.5 / 32, eps=eps) < 1e-6


# ---- the sampler ----------------------------------------------------------------------------------------------------


def test_the_estimator_is_the_sum_of_the_definition():
    x, unlabeled = normal(0, 4, 6), normal(1, 9, 6)
    labels = torch.tensor([1, -1, -1, 1])
    theta = sum(y * row for y, row in zip(labels, x, strict=True))
    expected = sum(torch.sign(theta @ row) * row for row in unlabeled)
    assert_close(theory.consistency_estimator(x, labels, unlabeled), expected)


def spread_along(w, t):
    along = (t * w).sum(1) / w.norm(dim=1)
    return (along - along.mean()).square()


def test_the_fast_sampler_has_the_distribution_of_direct_sampling():
    d, m, n, sigma, runs = 40, 12, 3, 2.0, 3000
    theta = normal(0, d)
    fast = theory.sample_estimators(theta, sigma, unlabeled=m, labeled=n, runs=runs, generator=generator(0))
    draw = generator(1)
    direct_w, direct = [], []
    for _ in range(runs):
        y = (torch.randint(0, 2, (n + m,), generator=draw) * 2 - 1).double()
        x = y[:, None] * theta + sigma * torch.randn(n + m, d, generator=draw, dtype=torch.float64)
        direct_w.append(y[:n] @ x[:n])
        direct.append(theory.consistency_estimator(x[:n], y[:n], x[n:]))
    for statistic in (
        lambda w, t: t @ theta,
        lambda w, t: t.square().sum(1),
        lambda w, t: (t * w).sum(1) / w.norm(dim=1),
        lambda w, t: t.abs().sum(1),
        lambda w, t: w @ theta,
        lambda w, t: w.square().sum(1),
        lambda w, t: (t @ theta).square(),
        spread_along,
    ):
        a, b = statistic(*fast), statistic(torch.stack(direct_w), torch.stack(direct))
        spread = (a.var() / runs + b.var() / runs).sqrt()
        assert (a.mean() - b.mean()).abs() <= 4 * spread


def test_the_sampler_reaches_a_hundred_thousand_dimensions_and_repeats_itself():
    theta = torch.ones(100_000)
    first, again = (
        theory.sample_estimators(theta, 10.0, unlabeled=1000, generator=generator(0)).consistency for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.shape == (1, 100_000)


# ---- unlabelled samples ---------------------------------------------------------------------------------------------


def samples_for(target, d, c, eps):
    """The number of unlabelled samples at which the predicted robust error meets the target."""
    low, high = 1e-3, 1e9
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (
            (low, middle)
            if theory.predicted_error(d, c * d**0.25, eps=eps, unlabeled=middle) < target
            else (middle, high)
        )
    return high


def test_at_a_fixed_small_error_the_exponent_one_half_shows_only_in_absurd_dimensions():
    needed = [samples_for(0.01, d, 0.6, 0.5) for d in (1000, 3000, 10_000, 30_000, 100_000)]
    assert needed == pytest.approx([8.7, 10.8, 15.2, 21.9, 34.4], abs=0.06)

    def slope(d):
        return math.log(samples_for(0.01, 2 * d, 0.6, 0.5) / samples_for(0.01, d, 0.6, 0.5)) / math.log(2)

    slopes = [slope(d) for d in (10**4, 10**6, 10**12)]
    assert slopes[0] < 0.4
    assert slopes[1] < 0.46
    assert slopes[2] == pytest.approx(0.5, abs=0.005)


THRESHOLDS = {(0.6, 0.9): [15.0, 26.7, 47.4, 84.2, 149.7], (0.6, 0.8): [8.6, 15.2, 27.1, 48.1, 85.5],
              (0.5, 0.9): [10.3, 18.3, 32.5, 57.8, 102.8]}  # fmt: skip
DIMENSIONS = [1000, 3162, 10_000, 31_623, 100_000]


@pytest.mark.parametrize(("c", "eps"), THRESHOLDS)
def test_the_half_error_threshold_has_its_closed_form(c, eps):
    predicted = [theory.half_error_threshold(d, c, eps) for d in DIMENSIONS]
    assert predicted == pytest.approx(THRESHOLDS[c, eps], rel=0.01)
    ratio = theory.half_error_threshold(10**12, c, eps) / theory.half_error_threshold(10**8, c, eps)
    assert ratio == pytest.approx(100, rel=1e-3)  # sqrt(d)


def test_for_small_budgets_the_threshold_is_quadratic_in_the_budget():
    d, c, eps = 10**12, 0.6, 1e-3
    wrong = theory.predicted_error(d, c * d**0.25)
    expected = 2 / math.pi * eps**2 * c**2 * math.sqrt(d) / (1 - 2 * wrong) ** 2
    assert theory.half_error_threshold(d, c, eps) == pytest.approx(expected, rel=1e-3)


def test_the_simulated_threshold_agrees_with_the_closed_form():
    for d, tolerance in ((1000, 0.1), (10_000, 0.03)):
        simulated = theory.simulated_half_error_threshold(d, 0.6, 0.9, runs=61)
        # The simulation counts whole samples, so it may lie up to one above the real threshold.
        assert simulated == pytest.approx(theory.half_error_threshold(d, 0.6, 0.9), rel=tolerance, abs=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("c", "eps"), THRESHOLDS)
def test_the_simulated_threshold_grows_like_the_root_of_the_dimension(c, eps):
    simulated = [theory.simulated_half_error_threshold(d, c, eps) for d in DIMENSIONS]
    for m, d in zip(simulated, DIMENSIONS, strict=True):
        exact = theory.half_error_threshold(d, c, eps)
        assert m == pytest.approx(exact, rel=0.03 if d >= 10_000 and m >= 40 else 0.1, abs=1.0)
    logs = f64(DIMENSIONS).log(), f64(simulated).log()
    centred = logs[0] - logs[0].mean()
    slope = (centred @ logs[1] / (centred @ centred)).item()
    assert slope == pytest.approx(0.49, abs=0.04)


def robust(w, d, sigma, eps=0.5):
    return theory.robust_error(w, torch.ones(d), sigma, eps=eps)


def test_augmented_copies_of_the_labelled_sample_do_not_help_and_fresh_samples_do():
    d = 10_000
    sigma, draw = 0.6 * d**0.25, generator(0)
    x, y = 1 + sigma * torch.randn(1, d, generator=draw), torch.ones(1)
    assert robust(x[0], d, sigma) > 0.999
    for tau in (0.1, 1.0, 3.0):
        copies = x + tau * torch.randn(1000, d, generator=draw)
        assert robust(theory.consistency_estimator(x, y, copies), d, sigma) > 0.999
    signs = torch.randint(0, 2, (1000, 1), generator=draw) * 2.0 - 1
    fresh = signs + sigma * torch.randn(1000, d, generator=draw)
    assert robust(theory.consistency_estimator(x, y, fresh), d, sigma) < 1e-12


def test_adding_the_labelled_sample_helps_a_little():
    d, m = 3000, 20
    sigma = 0.6 * d**0.25
    drawn = theory.sample_estimators(torch.ones(d), sigma, unlabeled=m, runs=200, generator=generator(0))
    alone = robust(drawn.consistency, d, sigma).mean()
    both = robust(drawn.consistency + drawn.supervised, d, sigma).mean()
    assert both < alone
    assert both > 0.2 * alone


def test_an_unlabelled_sample_is_worth_almost_a_labelled_one():
    d, m = 10_000, 12
    sigma = 0.6 * d**0.25
    weak = theory.sample_estimators(torch.ones(d), sigma, unlabeled=m, runs=200, generator=generator(0)).consistency
    full = theory.sample_estimators(
        torch.ones(d), sigma, unlabeled=1, labeled=m, runs=200, generator=generator(1)
    ).supervised
    unlabelled, labelled = robust(weak, d, sigma).median().item(), robust(full, d, sigma).median().item()
    assert unlabelled == pytest.approx(labelled, rel=0.1)
    wrong = theory.predicted_error(d, sigma)
    assert 1 - (1 - 2 * wrong) ** 2 < 0.02
    assert unlabelled == pytest.approx(theory.predicted_error(d, sigma, eps=0.5, unlabeled=m), abs=0.03)


def test_more_noise_and_a_larger_budget_need_more_samples():
    grid = [[theory.half_error_threshold(10_000, c, eps) for eps in (0.3, 0.6, 0.9)] for c in (0.3, 0.5, 0.7)]
    assert all(a < b for row in grid for a, b in itertools.pairwise(row))
    assert all(a < b for column in zip(*grid, strict=True) for a, b in itertools.pairwise(column))


def test_noise_of_every_size_has_its_limit():
    assert theory.folded_mean(1e-200) == 1.0
    assert theory.folded_mean(1e200) == pytest.approx(1e200 * math.sqrt(2 / math.pi))
    assert theory.predicted_error(10, 1e-200, eps=0.5) == 0.0
    assert theory.predicted_error(10, 1e200) == 0.5
    assert theory.critical_noise(1e-300) == pytest.approx(1e300 * math.sqrt(math.pi / 2))
    assert theory.half_error_threshold(10, 1e-200, 0.5) == 0.0
    # Labels as good as chance: 1 - 2p is sqrt(2 d / pi) / sigma^2, of which one minus twice a half keeps nothing.
    noise = 1e9**3 / math.sqrt(7 * 2 * 4 / math.pi)
    limit = -math.sqrt(4) * 0.5 * math.sqrt(2 / math.pi) / 1e9
    assert theory.predicted_error(4, 1e9, eps=0.5, unlabeled=7) == pytest.approx(0.5 - limit / math.sqrt(2 * math.pi))
    expected = (noise * math.sqrt(7) / theory.critical_noise(0.5)) ** 2
    assert theory.half_error_threshold(4, 1e9 / 4**0.25, 0.5) == pytest.approx(expected)


def test_errors_say_what_came_and_what_was_wanted():
    w = torch.ones(3)
    with pytest.raises(ValueError, match=r"robust_error: `sigma` must lie in \(0, inf\), got 0"):
        theory.robust_error(w, w, 0, eps=0.1)
    with pytest.raises(ValueError, match="`norm` must be one of 'linf', 'l2', 'l1'"):
        theory.robust_error(w, w, 1.0, eps=0.1, norm="linfinity")
    with pytest.raises(ValueError, match=r"`theta` shape \(d,\), got \(3,\) and \(2,\)"):
        theory.robust_error(w, w[:2], 1.0, eps=0.1)
    with pytest.raises(ValueError, match=r"critical_noise: `eps` must lie in \(0, 1\), got 1"):
        theory.critical_noise(1)
    with pytest.raises(ValueError, match="`unlabeled` must lie in"):
        theory.predicted_error(10, 1.0, unlabeled=0)
    with pytest.raises(ValueError, match="`unlabeled` must be at least 1"):
        theory.sample_estimators(w, 1.0, unlabeled=0)
    with pytest.raises(ValueError, match=r"`theta` must have shape \(d,\)"):
        theory.sample_estimators(w[None], 1.0, unlabeled=1)
    with pytest.raises(ValueError, match=r"`unlabeled` \(m, d\)"):
        theory.consistency_estimator(w[None], w[:1], w)
    with pytest.raises(ValueError, match="`s` must lie in"):
        theory.folded_mean(-1.0)
