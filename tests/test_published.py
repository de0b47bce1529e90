"""The papers' tables as data: complete, consistent with themselves except where listed, and easy to filter."""

import itertools
import pickle
from collections import Counter
from decimal import Decimal

import pytest

from perceptual_at.metrics import mean_score, nrr
from perceptual_at.published import METRICS, disagreements, published, uplifts

WRN = "WideResNet-28-10"
# dataset, norm, model, metric: printed, what the rows give
UPLIFTS_THAT_DO_NOT_FOLLOW = {
    ("CIFAR-10", "linf", "ResNet-18", "pgd100"): ("+1.88", 1.9686),
    ("CIFAR-10", "linf", WRN, "pgd100"): ("+0.37", 0.7134),
    ("CIFAR-100", "linf", WRN, "clean"): ("-1.40", -1.5615),
    ("CIFAR-100", "linf", WRN, "aa"): ("+2.56", 1.9664),
    ("Tiny-ImageNet", "linf", "ResNet-18", "clean"): ("+0.01", 0.0428),
    ("Tiny-ImageNet", "linf", WRN, "clean"): ("-1.41", -3.5589),
    ("Tiny-ImageNet", "linf", WRN, "pgd10"): ("+1.13", 1.2591),
    ("Tiny-ImageNet", "linf", WRN, "cw"): ("+2.75", 2.8992),
    ("Tiny-ImageNet", "linf", WRN, "aa"): ("+5.09", 4.9834),
    ("CIFAR-10", "l2", "ResNet-18", "cw"): ("+0.04", 1.4244),
    ("CIFAR-100", "l2", "ResNet-18", "aa"): ("+0.90", 1.1457),
}
UPLIFTS_OFF_BY_ROUNDING = {
    ("CIFAR-10", "linf", WRN, "pgd10"): ("+0.51", 0.4960),
    ("CIFAR-100", "linf", "ResNet-18", "pgd100"): ("+2.62", 2.6394),
    ("CIFAR-100", "linf", WRN, "pgd10"): ("+2.62", 2.6084),
    ("Tiny-ImageNet", "linf", "ResNet-18", "cw"): ("+3.73", 3.7223),
    ("CIFAR-100", "l2", "ResNet-18", "pgd10"): ("+2.34", 2.3452),
}


def test_all_rows_of_all_tables_are_there():
    counts = Counter((row.paper, row.table) for row in published())
    assert counts == {
        ("RPAT", 1): 24, ("RPAT", 2): 24, ("RPAT", 3): 26, ("RPAT", 4): 15, ("RPAT", 5): 4, ("RPAT", 6): 4,
        ("RAAT", 1): 36, ("RAAT", 2): 10, ("RAAT", 3): 24, ("RAAT", 5): 18,
    }  # fmt: skip
    assert sum(counts.values()) == len(published()) == 185
    assert len(uplifts()) == 9


def test_no_printed_number_was_lost():
    numbers = sum(len(row.printed) + len(row.printed_std) + len(row.printed_final) for row in published())
    assert numbers + sum(len(row.printed) for row in uplifts()) == 1249


def test_no_printed_number_was_changed():
    # Sums over the papers' own tables: a single digit typed wrong shows here.
    def total(cells):
        return str(sum(Decimal(number) for row in cells for number in row.values()))

    assert total(row.printed for row in published()) == "42120.967"
    assert total(row.printed_std for row in published()) == "67.30"
    assert total(row.printed_final for row in published()) == "4335.03"
    assert total(row.printed for row in uplifts()) == "66.47"


@pytest.mark.slow
def test_no_row_occurs_twice():
    keys = [(row.paper, row.table, row.dataset, row.norm, row.model, row.method) for row in published()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("metric", ["mean", "nrr"])
def test_summaries_follow_from_their_rows_within_half_a_unit_of_the_last_digit(metric):
    checked = 0
    for row in published():
        if metric not in row.printed:
            continue
        digits = -int(Decimal(row.printed[metric]).as_tuple().exponent)
        error = abs(row[metric] - getattr(row, metric))
        exempt = metric == "nrr" and row.method == "MAIL" and row.table == 3 and row.dataset == "CIFAR-10"
        assert (error <= 0.5 * 10**-digits + 1e-9) != exempt, row
        checked += 1
    assert checked == {"mean": 131, "nrr": 121}[metric]


def test_computed_summaries_are_those_of_the_metrics_module():
    for row in published():
        assert row.mean == mean_score(row.clean, row.aa)
        assert row.nrr == nrr(row.clean, row.aa)


def test_the_list_of_disagreements_is_complete_and_computed():
    found = disagreements()
    assert len(found) == 18
    summaries = [one for one in found if one.metric == "nrr"]
    assert [(one.row.paper, one.row.method, one.printed) for one in summaries] == [
        ("RPAT", "MAIL", "52.867"),
        ("RAAT", "MAIL", "52.867"),
    ]
    assert all(one.explained_by_rounding for one in summaries)
    assert all(one.computed == pytest.approx(52.86649874, abs=1e-8) for one in summaries)
    for explained, expected in ((False, UPLIFTS_THAT_DO_NOT_FOLLOW), (True, UPLIFTS_OFF_BY_ROUNDING)):
        listed = {
            (one.row.dataset, one.row.norm, one.row.model, one.metric): (one.printed, one.computed)
            for one in found
            if one.metric != "nrr" and one.explained_by_rounding == explained
        }
        assert set(listed) == set(expected)
        for key, (printed, computed) in expected.items():
            assert listed[key][0] == printed
            assert listed[key][1] == pytest.approx(computed, abs=5e-5)


def test_uplifts_are_computed_from_the_best_of_each_side():
    (row,) = uplifts(dataset="CIFAR-10", norm="l2")
    ours, base = row.best("cw")
    assert (ours.method, base.method) == ("RAAT++", "Cons-AT")
    assert row.computed("cw") == pytest.approx(1.4244, abs=1e-4)
    (raat,) = published(paper="RAAT", table=5, dataset="CIFAR-10", method="RAAT")
    assert 100 * (raat["cw"] / base["cw"] - 1) == pytest.approx(0.04, abs=0.005)  # what was printed: RAAT's


def test_stronger_attacks_leave_less_accuracy():
    for row in published():
        order = [row[metric] for metric in ("clean", "pgd10", "pgd20", "pgd100", "aa") if metric in row.printed]
        assert all(weaker >= stronger for weaker, stronger in itertools.pairwise(order)), row
        if "cw" in row.printed:
            assert row["clean"] >= row["cw"] >= row["aa"], row
        assert all(0 < float(number) < 100 for number in row.printed.values()), row


def test_what_the_two_papers_say_of_each_other_is_as_documented():
    for method in ("MMA", "SOVR"):
        rows = published(dataset="CIFAR-100", norm="linf", method=method)
        assert {row.model for row in rows} == {"ResNet-18", "PreActResNet-18"}
        assert len({(row.clean, row.aa) for row in rows}) == 1
    for dataset in ("CIFAR-10", "CIFAR-100"):
        (cited,) = published(paper="RAAT", table=3, dataset=dataset, method="RPAT")
        (own,) = published(paper="RPAT", table=3, dataset=dataset, norm="linf", method="RPAT++")
        assert cited.clean < own.clean
        assert cited.aa < own.aa


def test_the_benchmarks_that_both_papers_share_agree_on_the_order_of_pgd_steps():
    shared = 0
    for dataset, norm in itertools.product(("CIFAR-10", "CIFAR-100", "Tiny-ImageNet"), ("linf", "l2")):
        one = published(paper="RPAT", table=1 if norm == "linf" else 2, dataset=dataset, variant="baseline")
        table = 1 if norm == "linf" else 5
        two = published(paper="RAAT", table=table, dataset=dataset, model="ResNet-18", variant="baseline")
        names = {row.method.replace("Consistency", "Cons"): row for row in one}
        for row in two:
            other = names[row.method]
            assert (row.clean, row.aa) == (other.clean, other.aa)
            assert row["pgd10"] >= other["pgd20"] >= row["pgd100"]
            shared += 1
    assert shared == 24


def test_filters_combine_and_take_several_values():
    rows = published(paper="RPAT", dataset="CIFAR-10", norm="linf", model="ResNet-18", table=1)
    assert [row.method for row in rows if row.variant == "baseline"] == ["PGD-AT", "TRADES", "MART", "Consistency-AT"]
    assert [row.method for row in rows if row.variant == "ours"] == [
        "PGD-AT+RPAT", "TRADES+RPAT", "MART+RPAT", "Consistency-AT+RPAT"
    ]  # fmt: skip
    both = published(method=["RPAT++", "ReBAT"])
    assert {row.method for row in both} == {"RPAT++", "ReBAT"}
    assert len(both) == len(published(method="RPAT++")) + len(published(method="ReBAT"))
    assert published(paper="RAAT", model="WideResNet-34-10") == ()


def test_printed_strings_and_deviations_are_kept():
    (row,) = published(paper="RPAT", table=2, dataset="CIFAR-100", method="MART")
    assert row.printed["nrr"] == "47.92"  # two digits, where the others have three
    (row,) = published(paper="RAAT", table=1, dataset="CIFAR-10", model="ResNet-18", method="PGD-AT")
    assert row.printed_std == {"clean": "0.23", "pgd10": "0.15", "pgd100": "0.14", "cw": "0.16", "aa": "0.37"}
    (row,) = published(paper="RPAT", table=6, method="ReBAT")
    assert row.printed_final == {"clean": "82.05", "pgd20": "56.03", "aa": "50.70"}
    assert set(METRICS) >= set(row.printed) - {"mean", "nrr"}


def test_rows_are_frozen_and_can_be_put_in_sets():
    row = published()[0]
    with pytest.raises(AttributeError):
        row.dataset = "MNIST"
    assert len(set(published())) == 185


def test_nobody_changes_what_was_printed():
    for one in (published()[0], uplifts()[0]):
        with pytest.raises(TypeError, match="cannot be changed"):
            one.printed["clean"] = "99.99"
        assert pickle.loads(pickle.dumps(one)) == one


def test_values_of_other_kinds_are_looked_up_or_refused_by_name():
    numpy = pytest.importorskip("numpy")
    assert published(table=numpy.int64(1)) == published(table=1) == published(table=iter([1]))
    for call in (
        lambda: published(table=1.5),
        lambda: published(paper=["RPAT", ["RAAT"]]),
        lambda: uplifts(model=["x"]),
    ):
        with pytest.raises(ValueError, match=r"^(published|uplifts): no row has"):
            call()


def test_unknown_values_are_refused_with_those_that_exist():
    with pytest.raises(
        ValueError, match="published: no row has `dataset` 'CIFAR10'; there are 'CIFAR-10', 'CIFAR-100'"
    ):
        published(dataset="CIFAR10")
    with pytest.raises(ValueError, match="`norm` 'inf'; there are 'linf', 'l2'"):
        published(norm="inf")
    with pytest.raises(ValueError, match="uplifts: no row has `model`"):
        uplifts(model="VGG")
    with pytest.raises(KeyError, match="RPAT Table 1 prints no 'cw' for PGD-AT; it has clean, pgd20, aa"):
        published(paper="RPAT", table=1)[0]["cw"]
