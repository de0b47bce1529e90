"""The benchmarks: their miniatures leave whole records, the harness computes what it says. No test looks at a time."""

import functools
import importlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from perceptual_at import Linf, SampleGenerator, auto_attack, objectives, pgd
from perceptual_at.attacks.protocol import composition_of
from tests import second_device

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("attack_passes", "training_steps", "autoattack_time", "evaluation_time", "scaling", "gpu_training")
OTHERS = (
    "autoattack_agreement", "command_overhead", "compiled_pgd", "device_check", "hard_samples", "lane_accuracy",
    "methods_on_digits", "real_networks", "short_examples", "small_models",
)  # fmt: skip
PARTS = (
    "cases", "certificates", "cifar10_subset", "contenders", "exact", "methods_table", "networks", "passes", "peers",
    "record", "releases", "timing", "victims",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripts():
    """Every benchmark as a module, found where it lies and forgotten afterwards."""
    threads, before, path, bytecode = torch.get_num_threads(), set(sys.modules), list(sys.path), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in (*PARTS, *SCRIPTS, *OTHERS)}
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        torch.set_num_threads(threads)
        folders = (str(BENCHMARKS), str(ROOT / "examples"))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(folders):
                del sys.modules[name]


@pytest.fixture(scope="module")
def miniature(scripts, tmp_path_factory):
    """The record of a script's miniature, made once."""
    folder, made = tmp_path_factory.mktemp("records"), {}

    def record(name):
        if name not in made:
            scripts[name].main(["--quick", "--threads", "1", "--device", "cpu", "--out", str(folder / f"{name}.json")])
            made[name] = json.loads((folder / f"{name}.json").read_text())
        return made[name]

    record.folder = folder
    return record


def spreads(part):
    """Every median with its quartiles, wherever it is in a record."""
    if isinstance(part, dict):
        if set(part) == {"median", "q1", "q3"}:
            yield part
        for inner in part.values():
            yield from spreads(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from spreads(inner)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_miniature_says_what_ran_where(miniature, name):
    record = miniature(name)
    assert record["command"] == f"python benchmarks/{name}.py --quick --threads 1 --device cpu"
    assert record["quick"] is True
    assert record["rounds"] == 2
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["hardware"]["threads"] == 1
    assert record["hardware"]["device"] == "cpu"
    assert record["hardware"]["cpu"]
    assert "commit" in record
    found = list(spreads(record))
    assert found
    assert all(0 < one["q1"] <= one["median"] <= one["q3"] for one in found)


def test_compiled_attacks_agree_with_the_plain_one(scripts, tmp_path):
    torch._dynamo.reset()
    out = tmp_path / "compiled_pgd.json"
    scripts["compiled_pgd"].main(
        ["--quick", "--threads", "1", "--device", "cpu", "--backend", "eager", "--out", str(out)]
    )
    torch._dynamo.reset()
    record = json.loads(out.read_text())
    assert record["settings"]["backend"] == "eager"
    for rows, reference in ((record["ways"], "pgd"), (record["starts"], "one after another")):
        assert rows[reference]["ratio_wall"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
        assert all(row["first_call_s"] > 0 for row in rows.values())
        assert all(row["entries_that_differ"] < 0.05 for row in rows.values())
    assert {"pure_pgd", "pure_pgd, one graph"} <= set(record["ways"])


def test_attacks_have_the_passes_that_they_should_and_agree(miniature):
    (table,) = miniature("attack_passes")["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert rows["K (F + Bx)"]["ratio_wall"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    for name in ("K (F + Bx)", "pgd, plain", "pgd, fp32 lane", "pgd, bf16 lane", "MART's loop"):
        assert rows[name]["passes"] == [2, 2, 0], name
    assert rows["releases' PGD"]["passes"] == [2, 2, 2]
    assert rows["TRADES' loop"]["passes"] == [4, 2, 0]
    for name in ("torchattacks", "foolbox", "adv-lib", "art"):
        assert rows[name]["missing"] == "not installed" or rows[name]["same_entries"] > 0.99
    assert rows["releases' PGD"]["same_entries"] == rows["MART's loop"]["same_entries"] == 1
    assert rows["pgd, fp32 lane"]["same_entries"] > 0.95
    assert rows["pgd, bf16 lane"]["same_entries"] > 0.5


def test_steps_compare_with_the_release(miniature):
    record = miniature("training_steps")
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {"rpat", "raat"}
    for row in rows.values():
        assert row["reference"] == "release"
        assert row["ways"]["release"]["ratio_cpu"]["median"] == 1
        assert set(row["ways"]) == {"release", "plain", "fp32 lane", "bf16 lane, channels_last"}
    assert rows["rpat"]["ways"]["release"]["passes"] == [5, 2, 5]
    assert rows["rpat"]["ways"]["plain"]["passes"] == rows["rpat"]["ways"]["fp32 lane"]["passes"] == [5, 2, 3]
    assert all(held["attack"] > 0 < held["training"] for held in record["memory_bytes"].values())


# F / Bx / Bp of two attack steps; s is the share of the joint batch that DICAR's mixed pass sees.
NEEDED = {
    "pgd_at": ((3, 2, 3), (3, 2, 1)),
    "rpat": ((5, 2, 5), (5, 2, 3)),
    "trades": ((7, 2, 3), (5, 2, 2)),
    "rpat, trades": ((7, 2, 4), (6, 2, 3)),
    "mart": ((4, 2, 2), (4, 2, 2)),
    "rpat, mart": ((5, 2, 3), (5, 2, 3)),
    "consistency_at": ((3, 2, 3), (3, 2, 1)),
    "rpat, consistency_at": ((5, 2, 5), (5, 2, 3)),
    "raat": ((7, 2, 4), (7, 2, 2)),
    "raat_plus_plus": ((9, 2, 4), (8, 2, 3)),
}


@pytest.mark.parametrize("name", NEEDED)
def test_release_and_objective_make_the_passes_of_the_page(scripts, name):
    cases, releases, steps = scripts["cases"], scripts["releases"], scripts["training_steps"]
    found = cases.case(8, width=2, side=8)
    share = 0.0
    if name.startswith("raat"):
        found = steps.two_views(found)
        right = found.model(found.x).argmax(dim=1) == found.labels
        share = (right[:4] & right[4:]).sum().item() / 8
        assert share > 0
    for release, expected in zip((True, False), NEEDED[name], strict=True):
        loss = (
            (lambda *given: releases.RELEASES[name](*given, steps=2))
            if release
            else steps.loss_of(name, found.model, 2, None)
        )
        counted = scripts["passes"].passes(steps.step(found, loss), found.model, 8)
        whole = (expected[0] + share, expected[1], expected[2] + share)
        assert counted == pytest.approx(whole), (name, release)


def test_autoattack_has_every_attack_and_its_share_in_the_model(miniature):
    (table,) = miniature("autoattack_time")["tables"]
    names = [name for name, _ in table["attacks"]]
    assert names == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for row in table["rows"]:
        assert list(row["attacks"]) == names
        assert all(0 < part["model_share"] < 1 for part in row["attacks"].values())
        assert row["same_verdicts"] == 1
        assert row["ratio_wall"]["median"] > 0
    assert table["reference"] in ("pyautoattack", "native, plain")
    assert (table["missing"] == []) == (table["reference"] == "pyautoattack")


def test_the_clock_runs_while_the_model_does_forward_and_backward(scripts, monkeypatch):
    ticks = itertools.count()
    script = scripts["autoattack_time"]
    monkeypatch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock = script.Clock(nn.Linear(2, 2), torch.device("cpu"))
    x = torch.rand(1, 2, requires_grad=True)
    logits = clock(x)
    assert clock.seconds == 1
    torch.autograd.grad(logits.sum(), x, retain_graph=True)
    torch.autograd.grad(logits.sum(), x)
    assert clock.seconds == 3


def test_a_part_of_autoattack_keeps_the_shares_of_its_attacks(scripts):
    composition = scripts["autoattack_time"].composition
    assert composition(1) == composition_of("standard", "Linf", 10)
    parts = dict(composition(1 / 30))
    assert parts["apgd-t"]["steps"] * parts["apgd-t"]["target_classes"] == 30  # of 900
    assert parts["fab-t"]["steps"] * parts["fab-t"]["target_classes"] == 30
    assert parts["square"]["queries"] == 167  # of 5000
    assert parts["apgd-ce"]["steps"] == 10


def test_ways_to_evaluate_find_the_same_flags(miniature):
    (table,) = miniature("evaluation_time")["tables"]
    flags = {row["name"]: row["same_flags"] for row in table["rows"]}
    exact = ("pgd on all images", "pgd, early_stop", "evaluate", "evaluate, early_stop")
    assert all(flags[name] == 1 for name in exact)
    assert set(flags) == {*exact, "evaluate, early_stop, fp32 lane", "evaluate, early_stop, bf16 lane"}


def test_curves_have_slopes(miniature, scripts):
    curves = miniature("scaling")["curves"]
    assert [curve["name"] for curve in curves] == ["batch", "steps", "classes", "side", "width"] * 2
    for curve in curves:
        assert set(curve["time"]) == set(curve["memory"]) == {"slope", "r2", "last_slope"}
        assert all(row["peak_bytes"] > 0 for row in curve["rows"])
    fit = scripts["scaling"].fitted([1, 2, 4, 8], [3, 12, 48, 192])
    assert fit == {"slope": 2.0, "r2": 1.0, "last_slope": 2.0}
    assert scripts["scaling"].fitted([1, 2], [5, 5]) == {"slope": 0.0, "r2": 1.0, "last_slope": 0.0}


def test_training_on_a_cpu_is_a_miniature_and_the_arithmetic_is_that_of_the_networks(miniature):
    record = miniature("gpu_training")
    assert record["settings"]["miniature"] is True
    assert record["gflop_per_image"] == {"ResNet-18": 25.55, "WRN-28-10": 241.2, "WRN-34-10": 306.3}
    (table,) = record["tables"]
    assert all(row["images_per_s"] > 0 < row["peak_bytes"] for row in table["rows"])
    assert {"release's passes, fp32", "plain, bf16", "fp32 lane, TF32", "bf16 lane"} <= {
        row["name"] for row in table["rows"]
    }
    assert set(record["rpat_over_pgd_at"]) >= {"plain, fp32", "bf16 lane"}
    assert record["autoattack"]["rows"]


def test_the_page_shows_what_the_records_hold(miniature):
    spec = importlib.util.spec_from_file_location("docs_results_hook", ROOT / "docs" / "results_hook.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    records = {name: miniature(name) for name in SCRIPTS}
    shown = {
        name: hook.filled(name, folder=miniature.folder).replace("\N{NO-BREAK SPACE}", " ")
        for name, (stem, _) in hook.TABLES.items()
        if stem in SCRIPTS
    }
    assert all(hook.MISSING not in table for table in shown.values())
    assert "| releases' PGD | 2 / 2 / 2 |" in shown["attack_passes"]
    assert "| rpat | 5 / 2 / 5 | 5 / 2 / 3 |" in shown["training_steps"]
    ratio = records["evaluation_time"]["tables"][0]["rows"][1]["ratio_wall"]
    assert f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" in shown["evaluation_time"]
    assert "in miniature only" in shown["gpu_training"]
    assert "| ResNet-18 | 25.55 |" in shown["gpu_work"]
    # A record of a GPU, which shows its times.
    run = {**records["gpu_training"], "settings": {"miniature": False}}
    run["tables"][0]["rows"].append({"name": "WRN", "missing": "out of memory"})
    gpu = hook.TABLES["gpu_training"][1](run)
    assert "| WRN | out of memory | - |" in gpu
    assert "images/s" in gpu


# The harness ------------------------------------------------------------------------------------------------------


def test_functions_take_turns_and_every_round_begins_with_the_next(scripts):
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    spent = scripts["timing"].interleaved(functions, rounds=4, device="cpu", warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in spent.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_taken_within_a_round(scripts):
    timing = scripts["timing"]
    spent = {"base": [timing.Spent(wall, 1.0) for wall in (1, 10, 2)],
             "other": [timing.Spent(wall, 3.0) for wall in (2, 20, 4)]}  # fmt: skip
    rows = timing.compared(spent, "base")
    assert rows["other"]["ratio_wall"] == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert rows["other"]["ratio_cpu"]["median"] == 3.0
    assert rows["other"]["wall_s"] == {"median": 4.0, "q1": 3.0, "q3": 12.0}
    assert timing.spread([0.123456]) == {"median": 0.1235, "q1": 0.1235, "q3": 0.1235}


def test_peak_memory_counts_what_is_held_at_once(scripts):
    def call():
        first = torch.empty(1000)  # 4000 bytes
        second = torch.empty(500)  # 2000 more
        del first
        return second, torch.empty(250).size(0)  # 1000, after 4000 were given back

    assert scripts["timing"].peak_memory(call, "cpu") == 6000


def test_passes_are_counted_at_the_first_convolution(scripts):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1))
    x = torch.rand(4, 3, 2, 2)

    def call():
        model(x[:2])
        image = x.clone().requires_grad_()
        torch.autograd.grad(model(image).sum(), image)
        model(x).sum().backward()
        model(image).sum().backward()

    assert scripts["passes"].passes(call, model, 4) == (3.5, 2, 2)


def test_a_record_leaves_the_place_it_was_written_to_out_of_the_command(scripts):
    without = scripts["record"].without
    assert without(["--quick", "--out", "x.json", "--seed", "1"], "--out") == ["--quick", "--seed", "1"]
    assert without(["--out=x.json", "--quick"], "--out") == ["--quick"]


def test_a_peer_that_is_missing_is_listed(scripts):
    peers = scripts["peers"]

    def absent(*_):
        return importlib.import_module("no_such_library")

    assert peers.prepared(absent) == "not installed"
    assert set(peers.peers(nn.Identity(), torch.zeros(1, 2), torch.zeros(1).long())) == {
        "torchattacks", "foolbox", "adv-lib", "art",
    }  # fmt: skip


# Methods on digits ------------------------------------------------------------------------------------------------


def test_methods_on_digits_spend_one_budget_and_are_compared_seed_by_seed(scripts, tmp_path):
    only = ("rpat", "free_at", "raat_awp_wa", "kd", "ikl", "mma", "te", "fat", "cure", "ducat", "piat")
    path = tmp_path / "methods.json"
    scripts["methods_on_digits"].main(
        ["--quick", "--threads", "1", "--device", "cpu", "--out", str(path), "--only", *only]
    )
    found = json.loads(path.read_text())
    assert set(only) <= set(found["runs"]) == set(found["titles"])
    for name, runs in found["runs"].items():
        assert len(runs) == found["settings"]["seeds"]
        for run in runs:
            assert run["spent"] >= found["settings"]["units"], name
            assert 0 <= run["pgd20"] <= run["clean"] <= 100
    for name in only:
        test = found["paired"][name]
        ours, theirs = (statistics.mean(run["nrr"] for run in found["runs"][n]) for n in (name, test["against"]))
        assert test["nrr"]["difference"] == pytest.approx(ours - theirs)
        assert test["nrr"]["low"] <= test["nrr"]["difference"] <= test["nrr"]["high"]


def test_every_objective_has_a_row_among_the_methods(scripts):
    table = scripts["methods_table"].METHODS
    assert {method.against for method in table.values()} <= set(table)
    named = {"clp": "clp_attacked"}  # two methods of one name
    rows = {named.get(name, name) for name in objectives.__all__} - {"preset", "random_noise"}
    assert rows <= set(table)


def test_hard_samples_are_counted_with_their_cost(miniature):
    record = miniature("hard_samples")
    assert record["settings"]["images"] == 3
    assert [row["name"] for row in record["rows"]] == ["PGD-2", "AutoAttack, quick", "surrogate PGD"]
    for row in record["rows"]:
        assert row["broken"] == len(row["samples"]) <= 3
        assert row["forwards"] >= row["gradients"] > 0


# Networks of others -----------------------------------------------------------------------------------------------


def test_networks_of_others_are_measured_against_certificates_and_not_twice(miniature, scripts, monkeypatch):
    record = miniature("real_networks")
    script, unpacked = scripts["real_networks"], importlib.import_module("evidence.books").unpacked
    assert [one["name"] for one in record["networks"]] == ["tiny", "residual"]
    for one in record["networks"]:
        bits = {row["name"]: unpacked(row["verdicts"]) for row in one["rows"] if not row["missing"]}
        assert {"PGD-20", "APGD-T", "FAB-T", "Square", "AutoAttack standard", "AutoAttack thorough"} <= set(bits)
        right, certified, robust, open_ = (
            unpacked(held)
            for held in (
                one["right"], one["relaxation"]["verdicts"], one["exact"]["verdicts"], one["exact"]["not_excluded"],
            )
        )  # fmt: skip
        assert sum(certified) == one["relaxation"]["robust"] <= sum(robust) == one["exact"]["robust"]
        assert sum(open_) - sum(robust) == one["exact"]["undecided"]
        for row in one["rows"]:
            if row["missing"]:
                assert row["missing"] == "not installed"
                continue
            assert len(bits[row["name"]]) == one["images"]
            assert sum(bits[row["name"]]) == row["robust"]
            assert all(held >= proved for held, proved in zip(bits[row["name"]], robust, strict=True))
            assert all(held <= clean for held, clean in zip(bits[row["name"]], right, strict=True))
            assert row["gradients"] + row["forwards"] > 0
            assert row["library"] != "perceptual_at" or row["outside"] == 0
        assert all(b <= a for a, b in zip(bits["AutoAttack standard"], bits["AutoAttack thorough"], strict=True))
        assert {check["name"] for check in one["checks"]} >= {"gradients", "losses", "black_box"}
        assert 0 <= one["suspicious"]["rate"] <= 1

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(script, "measured", never)
    out = miniature.folder / "real_networks.json"
    script.main(["--quick", "--threads", "1", "--device", "cpu", "--out", str(out)])
    with pytest.raises(AssertionError, match="measured again"):
        script.main(["--quick", "--threads", "1", "--device", "cpu", "--seed", "1", "--out", str(out)])


def test_what_a_folder_lacks_is_named_and_left_out(scripts, tmp_path, capsys):
    script, folder = scripts["real_networks"], tmp_path / "there"
    folder.mkdir()
    options = types.SimpleNamespace(quick=False, folder=folder, definitions=None, only=["fast_fgsm", "lpd_mlp_0_3"])
    (folder / "fast_fgsm.safetensors").touch()
    assert script.chosen_definitions(options) == {}
    assert "fast_fgsm: no mnist_test_1000.npz in the folder, left out" in capsys.readouterr().out
    (tmp_path / "mnist_test_1000.npz").touch()  # one folder above will do
    assert list(script.chosen_definitions(options)) == ["fast_fgsm"]
    assert "lpd_mlp_0_3: no lpd_mlp_0_3.safetensors in the folder" in capsys.readouterr().out
    options.only = ["gone"]
    with pytest.raises(SystemExit, match="no definition of gone; known are lpd_mlp_0_3"):
        script.chosen_definitions(options)


def quick_case(scripts, tmp_path):
    script, networks = scripts["real_networks"], scripts["networks"]
    torch.manual_seed(0)
    script.miniature(tmp_path)
    network = networks.loaded("tiny", script.QUICK["tiny"], tmp_path)
    everything = torch.ones(len(network.x), dtype=torch.bool)
    return script.Case(network, everything, network.x, network.labels, 0, True)


def test_an_attack_that_beats_a_certificate_ends_the_run(scripts, tmp_path):
    script, case = scripts["real_networks"], quick_case(scripts, tmp_path)
    proof = script.proved(case)
    script.check_points(case, proof, "nothing", case.x)
    too_high = proof._replace(lowest=proof.lowest + 100)
    with pytest.raises(SystemExit, match="tiny: nothing beats a certificate"):
        script.check_points(case, too_high, "nothing", case.x)
    script.check_points(case, too_high, "nothing", case.x + 0.2)  # outside the box it says nothing


def test_what_the_code_of_others_cannot_do_is_a_row_and_what_ours_cannot_an_error(scripts, tmp_path):
    script, case = scripts["real_networks"], quick_case(scripts, tmp_path)

    def attack():
        raise IndexError("three classes")

    counted = script.Counted(case.network.model)
    row, found = script.run(case, "theirs", "peer", attack, counted)
    assert (row["missing"], found) == ("ended with IndexError: three classes", None)
    with pytest.raises(IndexError):
        script.run(case, "ours", "perceptual_at", attack, counted)


def test_the_thorough_row_is_what_the_version_finds(scripts, tmp_path):
    contenders, case = scripts["contenders"], quick_case(scripts, tmp_path)
    few, numbers = [("apgd-ce", {"steps": 3})], SampleGenerator(0, torch.arange(len(case.x)))
    attack = functools.partial(
        auto_attack, case.network.model, case.x, case.labels, case.threat, verdict=True, generator=numbers
    )
    found = contenders.thorough(case, case.network.model, attack(version=few))
    whole = attack(version=[*few, ("surrogate", {"steps": 3, "probes": 2})])
    assert torch.equal(found.success, whole.success)
    assert torch.equal(found.x_adv, whole.x_adv)


def test_points_outside_ball_or_box_are_seen_to_the_last_bit(scripts):
    outside = scripts["real_networks"].distance_outside
    x = torch.tensor([[0.5], [0.5], [0.9], [0.1]])
    points = torch.tensor([[0.75], [0.75], [1.0], [-1e-9]])
    points[1] = torch.nextafter(points[1], torch.tensor(1.0))
    assert (outside(points, x, 0.25) > 0).tolist() == [False, True, False, True]


def test_definitions_mirror_the_names_of_the_weights_and_others_may_be_given(scripts, tmp_path):
    networks = scripts["networks"]
    model = networks.built(["normalize 3", {"conv1": "conv 3 4 3 2 1", "layer1": ["block 4 8 2", "block_bn 8 8 1"]}])
    names = set(model.state_dict())
    assert {"0.mean", "1.conv1.weight", "1.layer1.0.shortcut.0.bias", "1.layer1.1.bn1.running_mean"} <= names
    assert not any("layer1.1.shortcut" in name for name in names)
    weights = {"0.m": torch.full((1, 3, 1, 1), 0.5), "0.s": torch.full((1, 3, 1, 1), 0.25)}
    assert networks.fitted(weights, model)["0.mean"].shape == (3, 1, 1)
    (tmp_path / "networks.json").write_text(json.dumps({"other": {"like": "fast_fgsm", "eps": "1/4"}}))
    (tmp_path / "more.json").write_text(json.dumps({"more": {"like": "other", "count": 3}}))
    known = networks.definitions(tmp_path, tmp_path / "more.json")
    assert known["other"]["layers"] == networks.DEFINITIONS["fast_fgsm"]["layers"]
    assert (known["more"]["eps"], known["more"]["count"]) == ("1/4", 3)
    for wrong, said in (
        ({"like": "gone"}, "`like` must be one of .*, got 'gone'"),
        ({"like": "bad"}, "`like` must be one of .*, got 'bad'"),
        ({"layers": ["relu"], "epsilon": 1}, "'bad' must hold layers, images, eps, .* got epsilon, no images, no eps"),
        ({"like": "fast_fgsm", "proven": "robust"}, "got robust"),
    ):
        (tmp_path / "more.json").write_text(json.dumps({"bad": wrong}))
        with pytest.raises(ValueError, match=said):
            networks.definitions(tmp_path, tmp_path / "more.json")
    with pytest.raises(ValueError, match=r"a layer must be one of .*, got 'tanh'"):
        networks.built(["tanh"])


@pytest.mark.skipif(second_device.missing() is not None, reason=f"{second_device.missing()} to compile a device with")
def test_the_check_of_a_device_runs_in_miniature_on_the_stand_in(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "device_check.py"), "--miniature", "--only", "lanes", "training"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    record = json.loads((tmp_path / "device_check.json").read_text())
    assert record["device"] == "stand_in"
    for name, step in record["steps"].items():
        assert step["ended"] == 0, (name, step["last_lines"])
    assert json.loads((tmp_path / "attack_passes_on_stand_in.json").read_text())["hardware"]["device"] == "stand_in"


def test_the_check_of_a_device_fits_into_ten_minutes(check, tmp_path):
    steps = check.parts("cuda", tmp_path, miniature=False, root=tmp_path)
    assert list(steps) == ["tests", "lanes", "training", "evidence"]
    assert sum(part.seconds for part in steps.values()) <= 600
    late = check.done(check.Part(("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2), "cpu")
    assert late["ended"] == "out of time"
    assert late["last_lines"] == ["begun"]


@pytest.fixture
def check(scripts):
    return scripts["device_check"]


def test_the_command_is_compared_with_the_bare_loop(miniature):
    record = miniature("command_overhead")
    assert [row["name"] for row in record["rows"]] == ["pgd_at", "rpat"]
    assert all(set(row["ways"]) == {"bare loop", "perceptual-at train"} for row in record["rows"])


# Scripts of one page each ------------------------------------------------------------------------------------------


def test_small_models_are_measured_with_and_without_the_other_libraries(scripts, tmp_path, monkeypatch):
    def theirs(model, steps):
        return lambda x, labels: pgd(model, x, labels, Linf(8 / 255), steps=steps)

    out = tmp_path / "small_models.json"
    found = []
    for stand_ins in ({"torchattacks": None, "foolbox": None}, {
        "torchattacks": types.SimpleNamespace(PGD=lambda model, eps, alpha, steps: theirs(model, steps)),
        "foolbox": types.SimpleNamespace(
            attacks=types.SimpleNamespace(L1PGD=lambda steps: types.SimpleNamespace(
                run=lambda wrapped, x, criterion, epsilon: theirs(wrapped, steps)(x, criterion))),
            PyTorchModel=lambda model, bounds, device: model,
            criteria=types.SimpleNamespace(Misclassification=lambda labels: labels),
        ),
    }):  # fmt: skip
        for name, library in stand_ins.items():
            monkeypatch.setitem(sys.modules, name, library)
        scripts["small_models"].main(["--quick", "--threads", "1", "--device", "cpu", "--out", str(out)])
        found.append(json.loads(out.read_text()))
    without, beside = found
    assert [row["shape"] for row in without["rows"]] == [[20]]
    assert without["rows"][0]["missing"] == without["l1"]["missing"] == "not installed"
    assert "step_ratio" not in without["rows"][0]
    assert "missing" not in beside["rows"][0]
    assert "missing" not in beside["l1"]
    assert beside["rows"][0]["call_ratio"]["median"] > 0 < beside["l1"]["ratio_cpu"]["median"]


def test_both_autoattacks_judge_the_same_samples(scripts, tmp_path):
    pytest.importorskip("pyautoattack", reason="what is compared with")
    script, out = scripts["autoattack_agreement"], tmp_path / "autoattack.json"
    script.main(["--quick", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["command"] == "python benchmarks/autoattack_agreement.py --quick"
    assert [row["threat"] for row in record["rows"]] == [repr(threat) for threat in script.THREATS]
    for row in record["rows"]:
        assert row["version"] == "quick"
        assert len(row["robust_native"]) == len(row["robust_official"]) == len(row["agreement"]) == row["seeds"] == 2
        assert len(row["agreement_of_the_official_with_itself"]) == 1
        assert all(0 <= share <= 1 for share in (*row["robust_native"], *row["robust_official"], *row["agreement"]))


def test_lanes_are_compared_on_models_trained_for_it(scripts, tmp_path, capsys):
    script, out = scripts["lane_accuracy"], tmp_path / "lane_accuracy.json"
    script.main(["--quick", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["command"] == "python benchmarks/lane_accuracy.py --quick"
    assert record["images"] == {"train": 30, "select": 10, "test": 10}
    (one,) = record["attacked"]
    assert list(one) == ["plain", "fp32 lane", "bf16 lane"]
    assert one["plain"]["flips"] == one["plain"]["signs"] == 0
    assert one["fp32 lane"]["signs"] < 5
    assert [len(runs) for runs in record["runs"].values()] == [1, 1]
    assert record["training"]["p"] is None
    for words in ([], ["--quick", "--archive", "a.npz"]):
        with pytest.raises(SystemExit):
            script.main(words)
    assert "give either --archive or --quick" in capsys.readouterr().err


def test_short_examples_are_run_as_they_are(scripts, tmp_path):
    script, out = scripts["short_examples"], tmp_path / "examples.json"
    script.main(["--quick", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["command"] == "python benchmarks/short_examples.py --quick"
    assert list(record["runs"]) == list(script.QUICK)
    for scores in record["runs"].values():
        assert len(scores) == 2
        assert all(set(score) == {"clean", "pgd20", "mean", "nrr"} for score in scores)
    assert set(script.EXAMPLES) | {"awp", "hat", "te", "mma", "free_at"} == {
        path.stem for path in (ROOT / "examples").glob("*.py") if "def train(model, batches" in path.read_text()
    }


def test_words_of_a_run_may_hold_spaces(scripts):
    words = scripts["cifar10_subset"].command("pgd_at", "my archive.npz", 0, "my runs/0")
    assert "my archive.npz" in words
    assert "my runs/0" in words


def test_a_record_of_the_subset_is_made_of_the_runs_that_are_there(scripts, tmp_path, capsys):
    script, out = scripts["cifar10_subset"], tmp_path / "subset.json"
    for place, (name, _) in enumerate({**script.METHODS, **script.OTHERS}.values()):
        for seed in (0, 1):
            test = {"clean": 40.0, "pgd20": 20.0 + place, "mean": 30.0, "nrr": 26.0 + place + seed * place / 8}
            found = {"epoch": 1, "test": test}
            terms = {"cross_entropy": 1.5, "loss": 2.0}
            run = {
                "seed": seed, "best": found, "final": found, "log": [{"terms": terms}], "seconds": 1.0,
                "images": {"train": 3, "select": 2, "test": 1}, "threat": "Linf(eps=8/255)",
                "selected_on": "validation", "settings": {"epochs": 1}, "commit": "0", "versions": {}, "hardware": {},
            }  # fmt: skip
            (tmp_path / f"{name}-{seed}").mkdir()
            (tmp_path / f"{name}-{seed}" / "result.json").write_text(json.dumps(run))
    words = ["--archive", "part.npz", "--seeds", "2", "--workers", "1", "--runs", str(tmp_path), "--out", str(out)]
    script.main(words)
    record = json.loads(out.read_text())
    assert record["command"] == "python benchmarks/cifar10_subset.py --archive part.npz --seeds 2"
    assert [score["nrr"] for score in record["runs"]["RAAT"]] == [29.0, 29.375]
    assert record["runs"]["RAAT"][0]["share"] == 25.0
    assert list(record["weights"])[2:] == ["1/16 (release)", "1 (Eq. 3)", "16", "128"]
    assert "RAAT against PGD-AT: NRR +3.19 (+3.00, +3.38); better beyond the noise" in capsys.readouterr().out
