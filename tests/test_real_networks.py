"""The record of networks that others trained adds up, no attack beats a proof, and the page shows what it holds."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "how-far-from-exact.md"
OWN, OFFICIAL = "AutoAttack standard", "official AutoAttack"


@pytest.fixture(scope="module")
def hook():
    """The step of the build that writes the tables."""
    spec = importlib.util.spec_from_file_location("docs_results_hook", DOCS / "results_hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record():
    return json.loads((DOCS / "results" / "real_networks.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bits(hook):
    """Verdicts image by image."""
    return hook.results_networks.unpacked


def ran(one):
    return {row["name"]: row for row in one["rows"] if not row["missing"]}


def test_verdicts_and_counts_agree(record, bits):
    assert record["quick"] is False
    assert len(record["networks"]) >= 5
    for one in record["networks"]:
        right, certified, robust, open_, marked, resist = (
            bits(text)
            for text in (
                one["right"], one["relaxation"]["verdicts"], one["exact"]["verdicts"], one["exact"]["not_excluded"],
                one["suspicious"]["verdicts"], one["suspicious"]["resist"],
            )
        )  # fmt: skip
        assert {len(verdicts) for verdicts in (right, certified, robust, open_, marked, resist)} == {one["images"]}
        assert sum(right) == one["clean"]
        assert sum(certified) == one["relaxation"]["robust"] >= one["relaxation"]["robust_by_intervals"]
        assert sum(robust) == one["exact"]["robust"]
        assert sum(open_) - sum(robust) == one["exact"]["undecided"]
        kept = [a for a, b in zip(marked, resist, strict=True) if b]
        assert one["suspicious"]["rate"] == pytest.approx(sum(kept) / max(1, len(kept)))
        for row in ran(one).values():
            assert sum(bits(row["verdicts"])) == row["robust"]


def test_no_attack_beats_a_proof_and_ours_stay_inside(record, bits):
    for one in record["networks"]:
        certified, robust, open_ = (
            bits(text)
            for text in (one["relaxation"]["verdicts"], one["exact"]["verdicts"], one["exact"]["not_excluded"])
        )
        assert all(a <= b <= c for a, b, c in zip(certified, robust, open_, strict=True))
        for name, row in ran(one).items():
            assert all(proved <= held for proved, held in zip(robust, bits(row["verdicts"]), strict=True)), name
            assert row["library"] != "perceptual_at" or row["outside"] == 0, name
            assert row["furthest_outside"] < 1e-6, name
        if one["proven"] == "broken":
            assert not any(robust)


def test_the_page_says_what_the_record_holds(record, bits, hook):
    lines = hook.filled("networks_exact").splitlines()
    findings = hook.filled("networks_findings")
    more = fewer = images = points = 0
    for one, line in zip(record["networks"], lines[2:], strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        percent = [
            f"{100 * sum(bits(text)) / one['images']:.1f}" for text in (one["right"], one["relaxation"]["verdicts"])
        ]
        assert [cells[0], cells[1], cells[3], cells[5]] == [one["name"], str(one["images"]), *percent]
        low, high = (sum(bits(one["exact"][name])) for name in ("verdicts", "not_excluded"))
        if one["proven"] is None:
            assert cells[6].split(" to ")[0] == f"{100 * low / one['images']:.1f}"
            assert cells[6].split(" to ")[-1] == f"{100 * high / one['images']:.1f}"
        ours, theirs = (bits(ran(one)[name]["verdicts"]) for name in (OWN, OFFICIAL))
        assert cells[8] == f"{100 * sum(ours) / one['images']:.1f}"
        assert cells[9] == f"{100 * sum(theirs) / one['images']:.1f}"
        more += sum(b and not a for a, b in zip(ours, theirs, strict=True))
        fewer += sum(a and not b for a, b in zip(ours, theirs, strict=True))
        images += one["images"]
        points += one["clean"] * len(ran(one))
    assert (
        f"differ on {more + fewer} of {images:,} images: {more} are broken by the native one alone, {fewer}" in findings
    )
    assert findings.startswith(f"- {points:,} points of ")
    assert f"one of the {sum(one['exact']['robust'] for one in record['networks'])} samples" in findings


def test_the_page_shows_every_table_and_types_no_result_by_hand(hook):
    text = PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- results: (\w+) -->", text))
    assert shown == set(hook.results_networks.TABLES)
    assert re.findall(r"\d+\.\d+ ?%", text) == []


def test_verdicts_are_compared_sample_by_sample(hook):
    tables, packed = hook.results_networks, importlib.import_module("evidence.books").packed

    def row(name, *held):
        return {
            "name": name, "library": "x", "missing": None, "verdicts": packed(held), "outside": 0, "gradients": 6,
            "forwards": 3, "cpu_s": 1.0, "furthest_outside": 0.0, "robust": sum(held), "warnings": [],
        }  # fmt: skip

    one = {
        "name": "net", "images": 4, "clean": 3, "eps": "0.1", "proven": None, "right": packed([1, 1, 1, 0]),
        "rows": [row(OFFICIAL, 1, 1, 0, 0), row("PGD", 1, 0, 1, 0), {"name": "gone", "missing": "not installed"}],
        "relaxation": {"verdicts": packed([1, 0, 0, 0]), "robust": 1, "robust_by_intervals": 0, "cpu_s": 1.0},
        "exact": {"verdicts": packed([1, 0, 0, 0]), "not_excluded": packed([1, 1, 0, 0])},
        "suspicious": {
            "verdicts": packed([0, 1, 1, 0]), "resist": packed([1, 1, 0, 0]), "rate": 0.5,
            "by_reason": {"tie": 1, "only by Square": 1, "not moved": 0},
        },
    }  # fmt: skip
    run = {"networks": [one]}
    assert "| PGD | +1 -1 |" in tables.agreement(run)
    assert f"| {OFFICIAL} | same |" in tables.agreement(run)
    assert "| PGD | 50.0 |" in tables.attacks(run)
    assert "| all of them | 25.0 |" in tables.attacks(run)
    assert "| **exact** | 25.0 to 50.0 |\n\nDid not run: gone (not installed)." in tables.attacks(run)
    assert "| PGD | 2 + 1; 1.0 |" in tables.costs(run)
    assert "| net | 2 | 1 | 50.0 | tie 1, only by Square 1 | 0 | 1 | 1 | 0 |" in tables.suspicious(run)
    assert tables.suspicious(run).endswith("| all networks | 2 | 1 | 50.0 |  | 0 | 1 | 1 | 0 |")
    one["proven"] = "broken"
    assert "| **exact** | 0.0 |" in tables.attacks(run)


def test_the_readme_quotes_the_record(record):
    (one,) = [one for one in record["networks"] if one["name"] == "lpd_mlp_0_3"]
    rows, quoted = ran(one), " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    share = {
        name: f"{100 * rows[name]['robust'] / one['images']:.1f} %" for name in (OWN, OFFICIAL, "AutoAttack thorough")
    }
    assert one["exact"]["undecided"] == 0
    assert share[OWN] == share[OFFICIAL]
    assert (
        f"all of {one['images']:,} images, exactly {100 * one['exact']['robust'] / one['images']:.1f} % are" in quoted
    )
    assert f"says {share[OWN]}, as the official code does, and" in quoted
    assert f'`version="thorough"` {share["AutoAttack thorough"]}.' in quoted
