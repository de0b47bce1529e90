"""Intervals and tests of counts against exact sums over all outcomes, and evaluations beside each other."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import pytest
import torch

from perceptual_at import Evaluation, aggregate, compare, mcnemar, wilson_interval
from perceptual_at.evaluation import MeanStd, against_published, bootstrap_interval, paired_interval
from perceptual_at.evaluation.statistics import binomial_tail
from perceptual_at.published import published


def probability(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def evaluation(*digits, names=("a", "b", "c"), **more):
    """From verdicts as texts: clean, then attacks."""
    clean, *robust = (torch.tensor([digit == "1" for digit in text]) for text in digits)
    return Evaluation(clean, dict(zip(names, robust, strict=False)), **more)


# Wilson's interval ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "least"), [(10, 0.83), (50, 0.92), (200, 0.93)])
def test_wilsons_interval_covers_as_often_as_it_says(n, least):
    ends = [wilson_interval(k, n) for k in range(n + 1)]
    coverage = [
        sum(probability(n, k, p) for k, (low, high) in enumerate(ends) if low <= p <= high)
        for p in (i / 200 for i in range(1, 200))
    ]
    inner = coverage[9:-9]  # near 0 and 1 single steps of the count weigh most
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(inner) > least


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (480, 1000)])
def test_the_ends_of_wilsons_interval_solve_its_equation(successes, n):
    z = 1.959963984540054
    for p in wilson_interval(successes, n):
        assert abs(successes - n * p) == pytest.approx(z * math.sqrt(n * p * (1 - p)), abs=1e-9 * n)


def test_wilsons_interval_stays_inside_and_never_shrinks_to_a_point():
    for n in (1, 2, 360, 10_000):
        for k in {0, 1, n // 2, n - 1, n}:
            low, high = wilson_interval(k, n)
            assert 0 <= low <= k / n <= high <= 1
            assert low < high
    assert wilson_interval(0, 5).low == 0.0
    assert wilson_interval(5, 5).high == 1.0


@pytest.mark.parametrize("confidence", [1e-300, 1 - 2**-53])
def test_intervals_are_of_any_confidence_inside_0_and_1(confidence):
    ends = wilson_interval(3, 20, confidence=confidence), paired_interval(3, 0, 20, confidence=confidence)
    for (low, high), share in zip(ends, (3 / 20, 3 / 22), strict=True):
        assert low <= share + 1e-12
        assert high >= share - 1e-12
        assert (high - low > 0.5) == (confidence > 0.5)


def test_wilsons_interval_is_mirrored_and_grows_with_confidence():
    low, high = wilson_interval(3, 20)
    assert wilson_interval(17, 20) == pytest.approx((1 - high, 1 - low))
    wide = wilson_interval(3, 20, confidence=0.99)
    assert wide.low < low < high < wide.high


# McNemar's test and the paired interval -----------------------------------------------------------------------------


def test_mcnemar_is_the_sum_over_all_outcomes_that_are_as_extreme():
    for a, b in itertools.product(range(9), repeat=2):
        n = a + b
        extreme = [k for k in range(n + 1) if abs(2 * k - n) >= abs(a - b)]
        assert mcnemar(a, b) == pytest.approx(min(1.0, sum(math.comb(n, k) for k in extreme) / 2**n))


def test_mcnemar_in_closed_form():
    assert [mcnemar(0, n) for n in (1, 2, 10)] == [1.0, 0.5, 2 / 2**10]
    assert mcnemar(12, 3) == mcnemar(3, 12)
    assert mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(0, 1000) < 1e-290  # no overflow on the way


def test_mcnemar_calls_equal_models_different_in_at_most_one_of_twenty_cases():
    for n in (5, 20, 61):
        assert sum(probability(n, k, 0.5) for k in range(n + 1) if mcnemar(k, n - k) < 0.05) <= 0.05


@pytest.mark.parametrize("n", [30, 60])
def test_the_paired_interval_covers_as_often_as_it_says(n):
    def chance(a, b, p, q):
        ways = math.comb(n, a) * math.comb(n - a, b)
        return ways * p**a * q**b * (1 - p - q) ** (n - a - b)

    ends = {(a, b): paired_interval(a, b, n) for a in range(n + 1) for b in range(n + 1 - a)}
    for p, q in ((0.05, 0.05), (0.1, 0.02), (0.2, 0.1), (0.3, 0.3)):
        covered = sum(chance(a, b, p, q) for (a, b), (low, high) in ends.items() if low <= p - q <= high)
        assert covered > 0.945


def test_the_paired_interval_turns_around_with_the_models_and_stays_inside():
    low, high = paired_interval(12, 5, 100)
    assert paired_interval(5, 12, 100) == pytest.approx((-high, -low))
    assert paired_interval(3, 0, 3).high == 1.0


def test_the_binomial_tail_is_the_exact_sum():
    for n, p in ((1, Fraction(1, 2)), (9, Fraction(1, 10)), (12, Fraction(3, 4))):
        for k in range(n + 1):
            exact = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
            assert binomial_tail(k, n, p) == float(exact)
    assert binomial_tail(1, 5, Fraction(0)) == 0.0
    assert binomial_tail(0, 5, Fraction(0)) == binomial_tail(5, 5, Fraction(1)) == 1.0
    many = sum(
        math.exp(math.lgamma(10_001) - math.lgamma(k + 1) - math.lgamma(10_001 - k) + k * math.log(0.1)
                 + (10_000 - k) * math.log(0.9))
        for k in range(1100, 10_001)
    )  # fmt: skip
    assert binomial_tail(1100, 10_000, Fraction(1, 10)) == pytest.approx(many, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: wilson_interval(3, 0), ValueError, "`n` must be at least 1"),
        (lambda: wilson_interval(4, 3), ValueError, "`successes` must be in [0, 3], got 4"),
        (lambda: wilson_interval(-1, 3), ValueError, "`successes` must be in [0, 3], got -1"),
        (lambda: wilson_interval(0.5, 3), TypeError, "`successes` must be an integer, got float"),
        (lambda: wilson_interval(1, 3, confidence=95), ValueError, "`confidence`"),
        (lambda: mcnemar(-1, 3), ValueError, "`only_a` must be at least 0, got -1"),
        (lambda: mcnemar(1, True), TypeError, "`only_b` must be an integer, got bool"),
        (lambda: paired_interval(3, 3, 5), ValueError, "`only_b` must be in [0, 2], got 3"),
        (lambda: aggregate([]), ValueError, "aggregate: `evaluations` is empty"),
        (lambda: aggregate([evaluation("10", "10"), evaluation("10")]), ValueError, "other attacks"),
        (lambda: against_published(evaluation("10"), ()), ValueError, "`rows` is empty"),
        (lambda: compare(evaluation("10"), evaluation("101")), ValueError, "other samples, 2 and 3"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


# Two evaluations ----------------------------------------------------------------------------------------------------


def test_a_comparison_counts_pairs_per_attack_and_in_the_worst_case():
    a = evaluation("11111100", "11110000", "11011000")
    b = evaluation("11110011", "11000000", "10000011")
    found = compare(a, b)
    assert [row.name for row in found.rows] == ["clean", "a", "b", "worst_case"]
    assert (found["clean"].only_a, found["clean"].only_b) == (2, 2)
    assert (found["a"].only_a, found["a"].only_b) == (2, 0)
    assert (found["worst_case"].a, found["worst_case"].b) == (3 / 8, 1 / 8)
    assert found["worst_case"].difference == 0.25
    assert found["a"].p == mcnemar(2, 0) == 0.5
    assert found["a"].interval == paired_interval(2, 0, 8)


def test_a_comparison_of_a_model_with_itself_finds_nothing():
    one = evaluation("1101", "1000")
    assert {(row.difference, row.p) for row in compare(one, one).rows} == {(0.0, 1.0)}


def test_samples_are_paired_by_index_whatever_the_order():
    order = torch.tensor([2, 0, 3, 1])
    a = evaluation("1100", "1000", index=torch.arange(4), labels=torch.tensor([0, 1, 2, 3]))
    b = Evaluation(a.correct[order], {"a": a.robust["a"][order]}, index=order, labels=a.labels[order])
    assert all(row.only_a == row.only_b == 0 for row in compare(a, b).rows)
    without = Evaluation(b.correct, b.robust)
    assert compare(evaluation("1100", "1000"), without)["clean"].only_a > 0  # so the order did matter


def test_only_shared_attacks_are_compared_and_other_samples_refused():
    a, b = evaluation("110", "100", names=("pgd",)), evaluation("110", "110", "010", names=("pgd", "aa"))
    assert [row.name for row in compare(a, b).rows] == ["clean", "pgd"]
    labelled = [evaluation("110", labels=torch.tensor(labels)) for labels in ([0, 1, 2], [0, 1, 1])]
    with pytest.raises(ValueError, match="other samples"):
        compare(*labelled)
    hashed = [evaluation("110", provenance={"data": data}) for data in ("sha256:1", "sha256:2")]
    with pytest.raises(ValueError, match="other samples"):
        compare(*hashed)
    with pytest.raises(ValueError, match="cascade"):
        compare(evaluation("110", "100"), evaluation("110", "100", cascade=True))


def called(call):
    return Evaluation(torch.tensor([True, False]), {"pgd": torch.tensor([True, False])}, provenance=call)


def test_two_kinds_of_scores_are_said():
    accuracy, top = called({"data": "sha256:1"}), called({"data": "sha256:1", "score": "top2 sha256:2"})
    for function, call in (("compare", compare), ("aggregate", lambda a, b: aggregate([a, b]))):
        with pytest.warns(UserWarning, match=f"^{function}: what counts as right is not .*: whether .* and top2"):
            call(accuracy, top)
        call(top, top)
        call(top, called({}))  # of which nothing is known


def test_attacks_of_one_name_that_were_called_in_two_ways_are_said():
    known = [{"attack 'pgd'": f"pgd(threat=Linf(eps={eps}/255), generator=Generator(seed={eps}))"} for eps in (8, 4)]
    one, other, unknown = map(called, (*known, {}))
    for function, call in (("compare", compare), ("aggregate", lambda a, b: aggregate([a, a, b]))):
        with pytest.warns(UserWarning, match=rf"^{function}: 'pgd' is not the same attack .*8/255.* and .*4/255"):
            call(one, other)
        call(one, unknown)
        call(one, called({"attack 'pgd'": known[0]["attack 'pgd'"].replace("seed=8", "seed=-1")}))


def test_columns_of_cascades_are_compared_only_where_they_count_the_same():
    def cascade(*names, cascade=True):
        verdicts = torch.tensor([True, True, False, False])
        return Evaluation(verdicts, dict.fromkeys(names, verdicts), cascade=cascade)

    for other in (cascade("aa", "pgd"), cascade("aa")):
        with pytest.raises(ValueError, match="counts what withstood"):
            compare(cascade("pgd", "aa"), other)
    assert len(compare(cascade("pgd", "aa"), cascade("pgd", "aa", "square")).rows) == 3
    for other in (cascade("aa", "pgd"), cascade("pgd", "aa", cascade=False)):
        with pytest.raises(ValueError, match=r"aggregate: .* counts what withstood .* `cascade`"):
            aggregate([cascade("pgd", "aa"), other])
    assert aggregate([cascade("pgd", "aa"), cascade("pgd", "aa")]).seeds == 2


def test_a_statistic_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"bootstrap_interval: `statistic` must give one number, got shape \(5,\)"):
        bootstrap_interval(torch.rand(5), statistic=lambda drawn: drawn)


def test_a_comparison_prints_and_saves():
    found = compare(evaluation("1111", "1110"), evaluation("1110", "1000"), names=("mine", "theirs"))
    assert "a 75.00 against 25.00: +50.00 points" in str(found)
    table = found.to_markdown().splitlines()
    assert table[0] == "|  | mine, % | theirs, % | difference | 95 % interval | p |"
    assert table[3].startswith("| a | 75.00 | 25.00 | +50.00 | ")
    assert table[4].startswith("| worst case | ")
    assert r"mine, \% & theirs, \%" in found.to_latex()
    named = dataclasses.replace(found, names=("runs/pgd_at-0", "50% {a & b}"))
    assert r" & runs/pgd\_at-0, \% & 50\% \{a \& b\}, \% & difference & 95 \% interval & p \\" in named.to_latex()
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["a"]["p"] == 0.5
    assert saved["clean"]["difference"] == 0.25


# Several seeds, published rows --------------------------------------------------------------------------------------


def test_an_aggregate_has_the_mean_of_each_number_and_its_sample_deviation():
    runs = [evaluation("1111", "1100"), evaluation("1110", "1110"), evaluation("1110", "1000")]
    found = aggregate(runs)
    assert list(found.numbers) == ["clean", "a", "worst_case", "mean", "nrr"]
    assert found["a"] == pytest.approx((0.5, 0.25))
    assert found["nrr"].mean == pytest.approx(sum(run.nrr for run in runs) / 3)  # not the NRR of the means
    assert found.seeds == 3
    assert found.to_markdown(method="PGD-AT").splitlines()[2].startswith("| PGD-AT | 83.33 ± 14.43 | 50.00 ± 25.00 |")
    assert r"$\pm$" in found.to_latex()
    assert found.to_dict()["a"] == pytest.approx({"mean": 0.5, "std": 0.25})


def test_one_seed_has_no_deviation():
    found = aggregate([evaluation("10")])
    assert math.isnan(found["clean"].std)
    assert str(found["clean"]) == "50.00"
    assert str(MeanStd(0.5, 0.0)) == "50.00 ± 0.00"


def test_rows_of_another_setting_are_not_compared():
    rows = published(method="AWP", dataset="CIFAR-10")
    assert len({row.model for row in rows}) > 1
    with pytest.raises(ValueError, match=r"of one data set, threat and network.*PreActResNet-18.*WideResNet-34-10"):
        against_published(evaluation("10"), rows)
    same = published(method=("AWP", "TE"), dataset="CIFAR-10", model="PreActResNet-18", paper="RPAT")
    assert {found.method for found in against_published(evaluation("10"), same)} == {"AWP", "TE"}


def test_own_numbers_stand_beside_the_printed_ones():
    rows = published(paper="RPAT", table=1, dataset="CIFAR-10", method="PGD-AT")
    (row,) = rows
    own = evaluation("1" * 84 + "0" * 16, "1" * 90 + "0" * 10, "1" * 47 + "0" * 53, names=("mine", "aa"))
    clean, aa = against_published(own, rows)
    assert (clean.metric, clean.printed, aa.metric, aa.printed) == ("clean", row.clean, "aa", row.aa)
    assert clean.own == 84.0
    assert clean.agrees
    low, high = wilson_interval(47, 100)
    assert aa.interval == (100 * low, 100 * high)
    assert not against_published(evaluation("0" * 100), rows)[0].agrees
