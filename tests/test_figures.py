"""The pictures of the documentation: well-formed, readable on both backgrounds, and true to their captions."""

import importlib
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from perceptual_at import L1, dicar_loss, interpolate, robust_perception_loss
from perceptual_at.published import published

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
NAMES = (
    "attacked",
    "boundaries",
    "curves",
    "dicar",
    "partition",
    "robust_perception",
    "scaling",
    "threats",
    "trade_off",
)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def scripts():
    """Every script as a module, found where it lies and forgotten afterwards."""
    threads, before, bytecode = torch.get_num_threads(), set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # the folder is part of the site
    sys.path.insert(0, str(FIGURES))
    try:
        yield {name: importlib.import_module(name) for name in (*NAMES, "style", "toy")}
    finally:
        sys.path.remove(str(FIGURES))
        sys.dont_write_bytecode = bytecode
        torch.set_num_threads(threads)
        for name in {*NAMES, "style", "toy"} - before:
            sys.modules.pop(name, None)


def described(path):
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return root, root.findtext(f"{SVG}title"), root.findtext(f"{SVG}desc")


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*-*.svg")), ids=lambda path: path.stem)
def test_a_committed_picture_is_plain_svg_with_words_for_screen_readers(path):
    text = path.read_text(encoding="utf-8")
    root, title, description = described(path)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "title desc"
    assert len(title) > 10
    assert len(description) > 50
    assert root.get("width") == "700"
    assert "<image" not in text
    assert "data:" not in text
    outside = re.sub(r' xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", text)
    assert "http" not in outside
    assert len(text) < 400_000


def test_every_picture_has_both_schemes_and_they_differ_in_colours_only():
    stems = {path.stem.rpartition("-")[0] for path in FIGURES.glob("*-*.svg")}
    assert stems >= set(NAMES)
    for stem in stems:
        light, dark = ((FIGURES / f"{stem}-{scheme}.svg").read_text() for scheme in ("light", "dark"))
        assert light != dark
        colour = re.compile(r"#[0-9a-f]{6}\b")
        # The names of clip paths and markers are hashes that may cover a colour.
        name = re.compile(r'(?<=id=")[mp][0-9a-f]{10}(?=")|(?<=#)[mp][0-9a-f]{10}')
        light, dark = (name.sub("", colour.sub("", text)) for text in (light, dark))
        assert light == dark, stem


@pytest.mark.parametrize("name", NAMES)
def test_the_script_writes_the_same_picture_every_time(name, scripts, tmp_path):
    written = scripts[name].main(tmp_path)
    first = {path.name: path.read_bytes() for path in written}
    assert {f"{name}-light.svg", f"{name}-dark.svg"} <= set(first)
    if name != "boundaries":  # once is enough of the largest
        scripts[name].main(tmp_path)
        assert {path.name: path.read_bytes() for path in written} == first
    for path in written:
        committed = FIGURES / path.name
        assert committed.exists(), f"run docs/figures/{name}.py"
        (new, title, description), (old, old_title, old_description) = described(path), described(committed)
        assert title == old_title
        assert new.get("viewBox") == old.get("viewBox")
        number = re.compile(r"\d+(?:\.\d+)?")
        assert number.sub("", description) == number.sub("", old_description)
        # Measured on another machine, accuracies may differ a little.
        for fresh, stored in zip(number.findall(description), number.findall(old_description), strict=True):
            assert float(fresh) == pytest.approx(float(stored), abs=3.0)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["LIGHT", "DARK"])
def test_text_colours_stand_out_from_the_page(scheme, scripts):
    colours = getattr(scripts["style"], scheme)
    paper = luminance(colours.paper)
    for name in ("text", "muted", "blue", "orange", "green", "purple", "red"):
        light, dark = sorted((luminance(getattr(colours, name)), paper), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, name


def test_boundaries_standard_training_is_right_more_often_and_robust_less_often(scripts):
    found = scripts["boundaries"].data()
    standard, trained = found["standard"], [found[name] for name in ("PGD-AT", "PGD-AT+RPAT", "RAAT")]
    assert standard["clean"] > max(one["clean"] for one in trained) + 3
    assert standard["pgd20"] < min(one["pgd20"] for one in trained) - 10
    for key in ("clean", "pgd20"):  # "look much alike"
        values = [one[key] for one in trained]
        assert max(values) - min(values) < 3


def test_boundaries_shows_what_a_search_over_the_ball_finds(scripts):
    for found in scripts["boundaries"].data().values():
        assert not (found["robust"] & ~found["right"]).any()
        # Whatever the attack breaks a search over the ball breaks too, but for a few; and the attack is near it.
        assert found["pgd20"] - 5 < found["fresh_robust"] < found["pgd20"] + 0.5
        # The strong shade: where the nearest grid point of a robust sample is, no other class is within reach.
        cell = (found["x"] * scripts["boundaries"].CELLS).round().long()
        worst = torch.where(
            found["labels"] == 1, found["lowest"][cell[:, 1], cell[:, 0]], -found["highest"][cell[:, 1], cell[:, 0]]
        )
        assert ((worst > 0) == found["robust"]).double().mean() > 0.93


def test_threats_projections_are_allowed_and_the_orders_of_l2_differ(scripts):
    module, found = scripts["threats"], scripts["threats"].data()
    centers = module.CENTER.expand_as(module.OUTSIDE)
    for name, threat in module.THREATS.items():
        points = found[name]["projected"]
        assert (threat.norm(points - centers) <= threat.eps).all()
        assert ((points >= 0) & (points <= 1)).all()
        step = found[name]["stepped"] - module.CENTER
        assert threat.norm(step[None]).item() == pytest.approx(threat.eps)
        assert ((found[name]["stepped"] >= 0) & (found[name]["stepped"] <= 1)).all()
        # No allowed direction gains more along the gradient.
        others = threat.project(
            module.CENTER + torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double(),
            module.CENTER.expand(500, 2),
        )
        assert ((others - module.CENTER) @ module.GRADIENT).max() <= step @ module.GRADIENT + 1e-9
    orders = [found[name]["projected"] for name in module.THREATS if name.startswith("L2")]
    assert (orders[0] - orders[1])[1].norm() > 0.05  # the point beyond the corner


def test_threats_projections_of_linf_and_l1_are_the_nearest_points(scripts):
    module, found = scripts["threats"], scripts["threats"].data()
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 401, dtype=torch.float64)] * 2)
    for name, threat in module.THREATS.items():
        if name.startswith("L2"):
            continue
        allowed = grid[threat.norm(grid - module.CENTER) <= threat.eps]
        best = torch.cdist(module.OUTSIDE, allowed).amin(dim=1)
        drawn = (found[name]["projected"] - module.OUTSIDE).norm(dim=1)
        assert (drawn <= best + 1e-9).all()
        assert (drawn >= best - 0.005).all()
    assert any(isinstance(threat, L1) for threat in module.THREATS.values())


def test_partition_shows_every_group_and_arrows_that_cross_where_they_should(scripts):
    module, found = scripts["partition"], scripts["partition"].data()
    groups = torch.stack([found[name] for name in ("misclassified", "boundary", "interior")])
    assert (groups.sum(dim=0) == 1).all()
    chosen = module.shown()
    assert all(len(rows) >= 3 for rows in chosen.values())
    model = scripts["toy"].trained("PGD-AT")
    with torch.no_grad():
        right, still_right = (model(found[key]).argmax(dim=1) == found["labels"] for key in ("x", "reduced"))
    assert not right[chosen["misclassified"]].any()
    assert right[chosen["boundary"]].all()
    assert not still_right[chosen["boundary"]].any()
    assert (right & still_right)[chosen["interior"]].all()
    assert found["broken"][chosen["interior"]].any()  # the full perturbation alone makes no boundary sample
    assert torch.allclose(found["reduced"], interpolate(found["x"], found["x_adv"], module.ETA))


def test_robust_perception_shows_a_bent_path_and_the_middle_of_its_chord(scripts):
    found = scripts["robust_perception"].data()
    logits = found["all_logits"]
    ends = logits[[0]], logits[[len(logits) // 2]], logits[[-1]]
    loss = robust_perception_loss(*ends, alpha=0.5, form="interpolation")
    assert loss.item() == pytest.approx(found["loss"], rel=1e-3)
    assert found["loss"] > 5 * found["mean_loss"]  # the least even sample, as the caption says
    path = found["path"]
    chord = path[0] + found["alphas"][:, None] * (path[-1] - path[0])
    assert (path - chord).norm(dim=1).max() > 0.1 * (path[-1] - path[0]).norm()


def test_dicar_shows_two_views_predicted_alike_and_a_mixed_one_that_is_not(scripts):
    module, found = scripts["dicar"], scripts["dicar"].data()
    assert (found["clean"].argmax(dim=1) == 0).all()
    assert found["prediction"].argmax() == 2
    assert torch.allclose(found["mixed"], module.MIX * found["x_adv"][0] + (1 - module.MIX) * found["x_adv"][1])
    assert ((found["x_adv"] - module.VIEWS).abs() <= scripts["toy"].EPS + 1e-6).all()
    logs = [found[key].log() for key in ("prediction", "clean")]
    loss = dicar_loss(logs[0][None], logs[1][:1], logs[1][1:], mix=module.MIX)
    assert loss.item() == pytest.approx(found["loss"].item(), rel=1e-3)


def test_trade_off_shows_the_printed_numbers_and_what_the_caption_says_of_them(scripts):
    runs = scripts["trade_off"].data()
    (row,) = published(paper="RPAT", table=1, dataset="CIFAR-10", norm="linf", model="ResNet-18", method="PGD-AT+RPAT")
    assert runs["PGD-AT+RPAT"] == [(float(row.printed["clean"]), float(row.printed["aa"]))]
    gains = {
        base: tuple(after - before for before, after in zip(runs[base][0], runs[f"{base}+RPAT"][0], strict=True))
        for base in scripts["trade_off"].BASES
    }
    assert len(runs) == 2 * len(gains)
    assert min(*gains["PGD-AT"], *gains["Consistency-AT"]) > 0
    assert gains["TRADES"][0] > 0 > gains["TRADES"][1]
    assert gains["MART"][1] > 0 > gains["MART"][0]


def test_trade_off_reads_the_recorded_demo(scripts, tmp_path):
    module, record = scripts["trade_off"], tmp_path / "demo.json"
    record.write_text(json.dumps({"runs": {"PGD-AT": [{"clean": 90.0, "pgd20": 60.0, "mean": 75.0, "nrr": 72.0}]}}))
    assert module.recorded(record) == {"PGD-AT": [(90.0, 60.0)]}
    module.RECORDED, before = record, module.RECORDED
    try:
        names = {path.name for path in module.main(tmp_path)}
    finally:
        module.RECORDED = before
    assert {"trade_off_demo-light.svg", "trade_off_demo-dark.svg"} <= names
