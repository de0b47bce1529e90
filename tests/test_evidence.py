"""The evidence benchmark: runs that go on after a kill, a record that loses nothing, numbers that verdicts give."""

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from perceptual_at import models
from perceptual_at.augment import random_crop_flip
from perceptual_at.checkpoints import weights_checksum
from perceptual_at.models import trained_networks

pytestmark = pytest.mark.slow

pytest.importorskip("torchvision")

ROOT = Path(__file__).parents[1]
PARTS = ("books", "design", "exporting", "hypotheses", "images", "measuring", "numbers", "training")
RUNS = ("all/pgd_at/0", "all/raat/0")


@pytest.fixture(scope="module")
def scripts():
    """The benchmark and its parts as modules, found where they lie and forgotten afterwards."""
    threads, before, path, bytecode = torch.get_num_threads(), set(sys.modules), list(sys.path), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        parts = {name: importlib.import_module(f"evidence.{name}") for name in PARTS}
        yield {**parts, "main": importlib.import_module("cifar10_evidence")}
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        torch.set_num_threads(threads)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("evidence", "cifar10_evidence", "record"):
                sys.modules.pop(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes of noise, each of a brightness of its own."""
    image = pytest.importorskip("PIL.Image")
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in range(10):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 60, (16, 16, 3), generator=generator, dtype=torch.uint8) + 20 * label
                image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return root


def call(scripts, folder, work, *words):
    runs = [word for run in RUNS for word in ("--only", run)]
    scripts["main"].main(
        ["run", "--quick", "--root", str(folder), "--work", str(work), "--record", str(work / "r.json"), *runs, *words]
    )
    return json.loads((work / "r.json").read_text())


@pytest.fixture(scope="module")
def whole(scripts, folder, tmp_path_factory):
    """Two arms from end to end without a break: where they lie, and their record."""
    work = tmp_path_factory.mktemp("whole")
    return work, call(scripts, folder, work)


def without_times(record):
    """What two runs of the same must share."""
    kept = []
    for entry in record["runs"]:
        entry = json.loads(json.dumps(entry))
        entry.pop("seconds")
        for which in ("best", "final"):
            entry[which].get("autoattack", {}).pop("seconds", None)
        kept.append(entry)
    return kept


def test_a_run_is_measured_and_says_where_it_comes_from(whole):
    _, record = whole
    assert [f"{e['regime']}/{e['arm']}/{e['seed']}" for e in record["runs"]] == list(RUNS)
    for entry in record["runs"]:
        assert entry["status"] == "finished"
        assert entry["command"].endswith(f"--only all/{entry['arm']}/0")
        assert entry["commits"]
        assert entry["versions"]["torch"]
        assert entry["hardware"]["threads"] == 1
        assert [line["epoch"] for line in entry["log"]] == [1, 2]
        assert {"test", "train", "batch_norm", "perception_gap", "groups", "autoattack"} <= set(entry["best"])
        assert {"same_as"} <= set(entry["final"]) or {"test", "autoattack"} <= set(entry["final"])
    assert record["runs"][1]["log"][0]["share_of_gradient"] > 0
    assert "share_of_gradient" not in record["runs"][0]["log"][0]


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(whole, scripts, folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(run, state, save=scripts["training"].save):
        save(run, state)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(scripts["training"], "save", killed)
        with pytest.raises(Killed):
            call(scripts, folder, tmp_path)
    begun = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [(entry["arm"], entry["status"]) for entry in begun] == [("pgd_at", "started")]
    assert without_times(call(scripts, folder, tmp_path)) == without_times(whole[1])


def test_what_is_finished_is_not_run_again_and_another_design_is_refused(whole, scripts, folder):
    work, record = whole
    assert call(scripts, folder, work) == record
    with pytest.raises(SystemExit, match="another design"):
        call(scripts, folder, work, "--set", "rate=0.5")
    with pytest.raises(SystemExit, match="no setting 'speed'"):
        call(scripts, folder, work, "--set", "speed=2")


def test_the_list_says_which_runs_wait_for_networks_that_are_elsewhere(whole, scripts, tmp_path, capsys):
    _, record = whole
    entry = json.loads(json.dumps(record["runs"][0]))
    for which in ("best", "final"):
        entry[which].pop("autoattack", None)
    held = tmp_path / "r.json"
    held.write_text(json.dumps({**record, "runs": [entry, record["runs"][1]]}))
    scripts["main"].main(["list", "--quick", "--work", str(tmp_path), "--record", str(held)])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["all/pgd_at/0"] == "finished, its networks are not in WORK: no AutoAttack without them"
    assert said["all/raat/0"] == "with AutoAttack"
    assert said["all/pgd_at/1"] == "to come"


def test_arms_of_a_seed_begin_alike_and_see_the_same_images(scripts, folder, tmp_path):
    images, training = scripts["images"], scripts["training"]
    design = scripts["design"].QUICK
    cache = images.decoded(folder, tmp_path / "images.npz")
    parts = images.split(cache, None, design, "all")
    assert len(parts.train) + len(parts.held_out) == 60
    assert len(images.split(cache, None, design, "small").train) == design.small
    seen = {}
    for arm, views in (("pgd_at", 1), ("raat", 2)):
        run = training.begin(scripts["design"].Job("all", arm, 1), design, parts, "cpu")
        first, shown = {name: value.clone() for name, value in run.model.state_dict().items()}, []

        def spy(x, *, generator, shown=shown, real=random_crop_flip):
            shown.append(real(x, generator=generator))
            return shown[-1]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(training, "random_crop_flip", spy)
            training.train_epoch(run)
        seen[arm] = first, shown[::views]
    (weights, views), (other_weights, other_views) = seen.values()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert len(views) == len(other_views) == 6
    assert all(torch.equal(a, b) for a, b in zip(views, other_views, strict=True))


@pytest.mark.parametrize("name", ["pgd_at_awp", "pgd_at_average", "rpat_relative", "rpat_raat_weight_0", "rpat_raat",
                                  "raat_adaptive"])  # fmt: skip
def test_later_arms_train_and_go_on_after_a_kill(name, scripts, folder, tmp_path):
    design, training = scripts["design"], scripts["training"]
    parts = scripts["images"].split(
        scripts["images"].decoded(folder, tmp_path / "images.npz"), None, design.QUICK, "small"
    )
    job = design.Job("small", name, 0)
    ends = []
    for broken in (False, True):
        run = training.begin(job, design.QUICK, parts, "cpu")
        for _ in range(2):
            training.train_epoch(run)
            scripts["measuring"].select(run)
            if broken:
                training.save(run, tmp_path / "state.pt")
                run = training.begin(job, design.QUICK, parts, "cpu", tmp_path / "state.pt")
        ends.append((run.judged.state_dict(), [line["terms"] for line in run.log]))
    (weights, terms), (again, same) = ends
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert terms == same
    judged, last = (torch.cat([p.flatten() for p in net.parameters()]) for net in (run.judged, run.model))
    assert torch.equal(judged, last) == (name != "pgd_at_average")


def test_steps_at_perturbed_weights_attack_once_and_end_near_where_they_began(scripts, folder, tmp_path):
    design, training = scripts["design"], scripts["training"]
    cache = scripts["images"].decoded(folder, tmp_path / "images.npz")
    parts = scripts["images"].split(cache, None, design.QUICK, "small")
    run = training.begin(design.Job("small", "pgd_at_awp", 0), design.QUICK, parts, "cpu")
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    x, labels, _ = next(scripts["images"].batches(parts.train, size=4))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    seen = []

    def attack(model, x, labels, **_):
        seen.append([value.detach().clone() for value in model.parameters()])
        return x

    training.step(run, (x,), labels, attack, {})
    assert len(seen) == 1
    assert all(torch.equal(*pair) for pair in zip(seen[0], before.values(), strict=True))  # not yet perturbed
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name], rtol=1e-5, atol=1e-6)


def test_the_share_of_the_gradient_is_that_of_the_term(scripts):
    training, design = scripts["training"], scripts["design"]
    torch.manual_seed(0)
    model, x, labels = training.network(design.QUICK), torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    x_adv = (x + 0.1 * torch.rand_like(x)).clamp(0, 1)
    arm = design.ARMS["rpat_eq3"]
    share, _ = training.gradient_share(model.train(), arm, (x,), labels, x_adv, dict(arm.options))
    adv, mid, clean = model(x_adv), model((x + x_adv) / 2), model(x)
    term = scripts["main"].training.pat.robust_perception_loss(clean, mid, adv)
    loss = torch.nn.functional.cross_entropy(adv, labels) + term
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(of, list(model.parameters()), retain_graph=True)]).norm()
        for of in (term, loss)
    ]
    assert share == pytest.approx((norms[0] / norms[1]).item(), rel=1e-4)


# The record -------------------------------------------------------------------------------------------------------


def test_verdicts_are_packed_and_unpacked(scripts):
    books = scripts["books"]
    for verdicts in ([], [False], [True], [False, True] * 9, [False] * 17):
        assert books.unpacked(books.packed(verdicts)) == verdicts


def test_entries_are_added_to_and_never_lost(scripts, tmp_path):
    books, job = scripts["books"], scripts["design"].Job
    path, lock = tmp_path / "r.json", tmp_path / "lock"
    for seed in (0, 1, 0):
        books.change(
            path, lock, lambda record, seed=seed: books.put(record, job("all", "raat", seed), status="started")
        )
    books.change(path, lock, lambda record: books.put(record, job("all", "raat", 1), status="finished", images=3))
    record = books.read(path)
    assert [(entry["seed"], entry["status"]) for entry in record["runs"]] == [(0, "started"), (1, "finished")]
    assert books.entry_of(record, job("all", "raat", 1))["images"] == 3
    assert books.entry_of(record, job("small", "raat", 1)) is None


def test_a_claim_keeps_others_out_until_it_ends(scripts, tmp_path):
    claimed = scripts["books"].claimed
    with claimed(tmp_path / "claim") as mine, claimed(tmp_path / "claim") as theirs:
        assert (mine, theirs) == (True, False)
    with claimed(tmp_path / "claim") as again:
        assert again


def test_every_run_comes_once_and_seeds_before_regimes_before_further_arms(scripts):
    design = scripts["design"]
    blocks = list(design.order(3))
    jobs = [job for block in blocks for job in block]
    assert len(set(jobs)) == len(jobs) == 3 * sum(len(arm.regimes) for arm in design.ARMS.values())
    assert all(set(design.ARMS[arm].regimes) == {"all", "small"} for arm in design.CORE)
    assert (*design.CORE, *design.MORE, *design.LATER) == tuple(design.ARMS)
    assert [(block[0].regime, block[0].seed) for block in blocks[:6]] == [
        (regime, seed) for regime in ("all", "small") for seed in range(3)
    ]
    assert [job.arm for job in blocks[0]] == list(design.CORE)
    work = list(scripts["main"].steps(3))
    trained = [job for kind, job in work if kind == "train"]
    core = 2 * 3 * len(design.CORE)
    assert trained == [*jobs[:core], *design.sweep(), *jobs[core:]]
    assert sorted(job for kind, job in work if kind == "attack") == sorted(jobs)  # the sweep needs none
    for one in scripts["hypotheses"].HYPOTHESES:
        assert all(set(one.regimes) <= set(design.ARMS[name].regimes) for name in (one.arm, one.control))
        assert one.column in scripts["numbers"].COLUMNS


# Statistics -------------------------------------------------------------------------------------------------------


def test_intervals_agree_with_scipy(scripts):
    numbers, stats = scripts["numbers"], pytest.importorskip("scipy.stats")
    assert numbers.t_quantile(0.95, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)  # Cauchy's distribution
    assert numbers.t_quantile(0.9, 2) == pytest.approx(math.sqrt(2 * 0.81 / 0.19), rel=1e-9)
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    assert numbers.t_interval(values) == pytest.approx((7 / 3, low, high))
    assert numbers.t_interval([3.0]) == (3.0, -math.inf, math.inf)
    assert numbers.seeds_for(numbers.detectable(values) + 1e-9, values) == 3
    assert numbers.detectable(values) == pytest.approx(
        (stats.t.ppf(0.975, 2) + stats.t.ppf(0.8, 2)) * stats.sem(values)
    )


def made(scripts, arm, seed, right):
    """An entry whose clean and PGD-20 verdicts are right on so many of ten images."""
    found = {"n": 10, "verdicts": {
        name: scripts["books"].packed([place < count for place in range(10)]) for name, count in right.items()
    }}  # fmt: skip
    return {
        "regime": "all", "arm": arm, "seed": seed, "status": "finished",
        "best": {"epoch": 2, "test": found}, "final": {"epoch": 2, "same_as": "best"},
    }  # fmt: skip


def test_differences_and_tests_follow_from_the_verdicts(scripts):
    numbers, hypotheses = scripts["numbers"], scripts["hypotheses"]
    entries = [
        *(made(scripts, "pgd_at", seed, {"clean": 5, "pgd20": 4}) for seed in range(3)),
        *(made(scripts, "rpat_weight_0", seed, {"clean": 8 + (seed == 1), "pgd20": 4}) for seed in range(3)),
    ]
    record = {"runs": [*entries, {"regime": "all", "arm": "raat", "seed": 0, "status": "started"}]}
    runs = numbers.finished(record)
    assert len(runs) == 6
    pairs = numbers.pairs(runs, "all", "rpat_weight_0", "pgd_at", "clean")
    assert [pair.difference for pair in pairs] == [30, 40, 30]
    assert [pair.p for pair in pairs] == [0.25, 0.125, 0.25]  # three of three, four of four
    assert [pair.p for pair in numbers.pairs(runs, "all", "rpat_weight_0", "pgd_at", "nrr")] == [None] * 3
    assert numbers.scores(runs, "all", "pgd_at", "nrr", "final") == pytest.approx([2 * 50 * 40 / 90] * 3)
    assert numbers.scores(runs, "all", "pgd_at", "autoattack") == []
    above, below = (hypotheses.Hypothesis("rpat_weight_0", "pgd_at", "clean", sign, ("all",), "") for sign in (1, -1))
    assert numbers.judgement(above, [30, 40, 30]) == "borne out"
    assert numbers.judgement(below, [30, 40, 30]) == "refuted"
    assert numbers.judgement(above, [30, -40, 30]) == "open"
    none = above._replace(sign=0)
    assert numbers.judgement(none, [0.1, 0.0, 0.1]) == "borne out"
    assert numbers.judgement(none, [30, 31, 30]) == "refuted"
    assert [numbers.judgement(none, found) for found in ([], [30], [30, 31])] == ["not run yet", *["too early"] * 2]


def test_arms_are_drawn_by_their_differences_to_the_control(scripts):
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "dont_write_bytecode", True)
        patched.syspath_prepend(str(ROOT / "docs" / "figures"))
        places = importlib.import_module("evidence_figure").places
        entries = [
            *(made(scripts, "pgd_at", seed, {"clean": 5 + 2 * seed, "pgd20": 4}) for seed in range(2)),
            *(made(scripts, "rpat_weight_0", seed, {"clean": 6 + 2 * seed, "pgd20": 3 + seed}) for seed in range(2)),
            made(scripts, "rpat_release", 1, {"clean": 9, "pgd20": 5}),
            made(scripts, "consistency_at_rpat", 0, {"clean": 2, "pgd20": 1}),
        ]
        found = places({"runs": entries}, "all")
        assert found["pgd_at"] == ((60, 40), None)
        assert found["rpat_weight_0"].at == (70, 35)
        assert found["rpat_weight_0"].halves == pytest.approx((0, 12.706 * 5), abs=0.01)  # -10 and 0: error 5
        assert found["rpat_release"] == ((80, 45), None)  # 10 and 10 above the seed that both have
        assert found["consistency_at_rpat"] == ((20, 10), None)  # no control: where it stands itself
        assert places({"runs": entries}, "small") == {}
        for name in ("evidence_figure", "style"):
            sys.modules.pop(name, None)


def test_percentages_on_record_are_those_of_the_verdicts(whole, scripts):
    for entry in scripts["numbers"].finished(whole[1]).values():
        for column in ("clean", "pgd20", "margin30"):
            assert scripts["numbers"].score(entry, column) == pytest.approx(entry["best"]["test"][column], abs=1e-4)
        held = entry["best"]["autoattack"]["autoattack"]
        assert scripts["numbers"].score(entry, "autoattack") == pytest.approx(held, abs=1e-4)


def test_tables_and_picture_are_made_of_the_record(whole, scripts, tmp_path):
    docs = ROOT / "docs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "dont_write_bytecode", True)
        patched.syspath_prepend(str(docs / "figures"))
        patched.syspath_prepend(str(docs))
        tables = importlib.import_module("results_evidence").TABLES
        shown = {name: write(whole[1]) for name, (_, write) in tables.items()}
        empty = {name: write({"runs": []}) for name, (_, write) in tables.items()}
        entry = whole[1]["runs"][0]
        assert f"| PGD-AT | 1 | {entry['best']['test']['clean']:.2f} |" in shown["evidence_all_best"]
        assert "| PGD-AT | 1 of 3 | 0 of 3 |" in shown["evidence_progress"]
        assert "| RAAT without BOUND | 0 of 3 | - |" in shown["evidence_progress"]
        assert "2 of 84 declared runs have finished." in shown["evidence_state"]
        assert "| RAAT | all | `dicar` |" in shown["evidence_terms"]
        assert (
            shown["evidence_hypotheses"] == shown["evidence_differences"] == "No run has finished yet."
        )  # no control has
        assert shown["evidence_power"] == "No difference has two seeds yet."
        paired = json.loads(json.dumps(whole[1]))
        paired["runs"][1]["arm"] = "pgd_at_two_views"
        ours, theirs = (scripts["numbers"].score(entry, "nrr") for entry in reversed(paired["runs"]))
        row = f"| PGD-AT, two views minus PGD-AT | NRR | all | above 0 | {ours - theirs:+.2f} | 1 | too early |"
        assert row in tables["evidence_hypotheses"][1](paired)
        paired["runs"][1]["arm"] = "rpat_weight_0"
        p = scripts["numbers"].image_test(*reversed(paired["runs"]), "clean", "best")
        ours, theirs = (scripts["numbers"].score(entry, "clean") for entry in reversed(paired["runs"]))
        row = f"| RPAT's passes, weight 0 minus PGD-AT | all | {ours - theirs:+.2f} ({p:.2g}) |"
        assert row in tables["evidence_differences"][1](paired)
        twice = json.loads(json.dumps(paired))
        twice["runs"] += [{**entry, "seed": 1} for entry in paired["runs"]]
        assert f"({p:.2g}, {p:.2g}) |" in tables["evidence_differences"][1](twice)
        assert "| RPAT's passes, weight 0 minus PGD-AT | clean | all | 0.00 | 2 |" in tables["evidence_power"][1](twice)
        swept = json.loads(json.dumps(whole[1]))
        swept["runs"][1]["arm"] = "rpat_weight_100"
        chosen = scripts["numbers"].held_out(entry := swept["runs"][1])
        assert f"| {chosen['clean']:.2f} | {chosen['pgd10']:.2f} |" in tables["evidence_sweep"][1](swept)
        assert chosen["pgd10"] == max(line["held_out"]["pgd10"] for line in entry["log"])
        assert "1 of 84 declared runs have finished." in tables["evidence_state"][1](swept)
        assert "RPAT, weight 100" not in tables["evidence_all_best"][1](swept)
        assert (
            shown["evidence_sweep"]
            == empty["evidence_all_best"]
            == empty["evidence_terms"]
            == "No run has finished yet."
        )
        if importlib.util.find_spec("matplotlib"):
            draw = importlib.import_module("evidence_figure")
            names = {path.name for path in draw.main(tmp_path, whole[0] / "r.json")}
            assert names == {"evidence_figure-light.svg", "evidence_figure-dark.svg"}
            assert draw.main(tmp_path, tmp_path / "none.json") == []
        for name in ("results_evidence", "results_table", "evidence_figure", "style"):
            sys.modules.pop(name, None)


# The network that comes out of it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in trained_networks.FOLDER.glob("*.json")))
def test_a_network_of_the_package_is_one_of_the_record(name, scripts):
    model, card = models.trained(name), models.trained_card(name)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, len(card["classes"]))
    assert (trained_networks.FOLDER / f"{name}.safetensors").stat().st_size < 3_000_000
    runs = json.loads(scripts["main"].RECORD.read_text(encoding="utf-8"))["runs"]
    (run,) = [one for one in runs if "/".join(str(one[key]) for key in ("regime", "arm", "seed")) == card["run"]]
    assert run["status"] == "finished"
    assert weights_checksum(model.state_dict()) == run["best"]["weights"]
    assert card["scores"]["clean"] == pytest.approx(run["best"]["test"]["clean"], abs=0.01)


def test_a_network_is_exported_and_comes_back(whole, scripts, folder, tmp_path, monkeypatch):
    work, record = whole
    monkeypatch.setattr(scripts["main"], "FOLDER", tmp_path)
    monkeypatch.setattr(trained_networks, "FOLDER", tmp_path)
    where = ["--quick", "--work", str(work), "--record", str(work / "r.json")]
    scripts["main"].main(["export", "all/raat/0", "tiny_raat", *where])
    model, card = models.trained("tiny_raat"), models.trained_card("tiny_raat")
    assert not model.training
    assert card["trained_by"] == "RAAT"
    assert card["scores"]["clean"] == pytest.approx(record["runs"][1]["best"]["test"]["clean"], abs=0.01)
    held = scripts["main"].read_weights(work / "runs" / "all-raat-0" / "best.safetensors")
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    path = tmp_path / "tiny_raat.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"trained: .* SHA-256 .* changed or damaged"):
        models.trained("tiny_raat")
    with pytest.raises(ValueError, match=r"trained: `name` must be one of 'tiny_raat', got 'tiny_rpat'"):
        models.trained("tiny_rpat")
    with pytest.raises(SystemExit, match="not finished"):
        scripts["main"].main(["export", "small/raat/0", "other", *where])
    with pytest.raises(SystemExit, match="small letters"):
        scripts["main"].main(["export", "all/raat/0", "../other", *where])
