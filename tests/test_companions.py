"""What methods keep beside the network, memories, teachers, averages: saved, restored to the last bit."""

import copy
import json
import shutil
from unittest import mock

import pytest
import torch

for package in ("accelerate", "tyro", "safetensors", "tensorboard"):
    pytest.importorskip(package, reason=f"{package} is not installed; the extra `train` brings it")

from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from perceptual_at import ema_update, refresh_batch_norm, snapshot  # noqa: E402
from perceptual_at.checkpoints import read_weights, save_weights, weights_checksum  # noqa: E402
from perceptual_at.commands import train  # noqa: E402
from perceptual_at.commands.endings import Stopped  # noqa: E402
from perceptual_at.commands.evaluating.targets import targets_of  # noqa: E402
from perceptual_at.commands.evaluating.wishes import Models, Wishes  # noqa: E402
from perceptual_at.commands.options import method  # noqa: E402
from perceptual_at.commands.options.recipes import RECIPES  # noqa: E402
from perceptual_at.commands.training import companions  # noqa: E402
from perceptual_at.data import TensorImages  # noqa: E402
from perceptual_at.models import DigitsCNN  # noqa: E402
from perceptual_at.schedules import ramped_decay  # noqa: E402
from tests.runs import started  # noqa: E402

pytestmark = pytest.mark.slow

runner = pytest.fixture(started, scope="module")

TINY = [
    "--data", "digits", "--model", "digits_cnn", "--width", "2", "--batch", "300", "--held-out", "0.3",
    "--select-steps", "1", "--test-steps", "1", "--eval-batch", "500", "--epochs", "2", "--save-every", "1", "--cpu",
    "--no-flip", "--padding", "1",
]  # fmt: skip
# Each method that keeps something or has a step of its own, from its first or second epoch on.
EARLY = {
    "te": ["--options", "start=0", "length=1"],
    "te_trades": ["--options", "start=1", "length=1"],
    "mma": ["--eps", "0.1", "--options", "largest=0.1", "search_steps=3"],
    "hat": [],
    "hat_pgd_at": ["--awp", "0.01"],
    "kd_swa": ["--average-start", "0"],
    "adr": [],
    "adr_trades": ["--averaging", "ramp"],
    "adr_awp": [],
    "cure": ["--options", "update_share=0.5"],
    "ducat": ["--later", "1:dummies=True"],
    "ducat_consistency_at": ["--later", "1:dummies=True"],
    "ikl": ["--awp-start", "0", "--eps-ramp", "2"],
    "gkl": [],
    "lbgat": ["--data", "digits", "--second", "digits_cnn"],
    "lbgat6": ["--data", "digits", "--second", "digits_cnn", "--awp", "0.005"],
    "hypersphere": [],
    "hypersphere_trades": [],
    "n_fgsm": [],
    "fgsm_rs": [],
    "grad_align": [],
    "free_at": ["--replays", "2"],
    "fat": ["--patience", "1"],
    "fat_trades": ["--patience", "1"],
    "clp_attacked": [],
    "clp_images": [],
    "label_smoothing": [],
    "alp": [],
    "alp_kannan": ["--average-decay", "0.5"],
    "score": [],
    "gairat": ["--steps", "3", "--later", "1:offset=-1.0", "--awp", "0.01"],
    "mail": ["--later", "1:weighted=True"],
    "piat": [],
    "ewat": [],
    "sovr": [],
    "awp": [],
    "trades_awp": ["--awp-start", "1", "--awp-form", "sam"],
    "wa": ["--normalize", "own", "--average-start", "1", "--average-decay", "0.5"],
    "rpat_dicar_trades": ["--awp", "0.005", "--averaging", "swa"],
    "rpat_raat": ["--average-decay", "0.5", "--awp", "0.005"],
}
# Combinations that no recipe has: a base with a memory, a teacher or an average of its own.
BUILT = {
    "rpat on te": ["rpat", "--base", "te", "--options", "start=0", "length=1"],
    "rpat on adr": ["rpat", "--base", "adr", "--average-decay", "0.5"],
    "rpat on hat": ["rpat", "--base", "hat", "--awp", "0.005"],
    "both on piat": ["rpat", "--base", "dicar+piat", "--averaging", "swa"],
    "dicar on ikl": ["rpat", "--objective", "dicar", "--base", "ikl"],
    "rpat on ducat": ["rpat", "--base", "ducat", "--dummies", "--average-decay", "0.5"],
    "rpat with both on mart": ["rpat", "--base", "dicar+mart", "--awp", "0.005", "--average-decay", "0.5"],
}
AT_ONCE = ("te", "lbgat")  # the others are marked slow
CASES = {**{name: [name, *words] for name, words in EARLY.items()}, **BUILT}


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def parsed(*words):
    recipe, *others = (str(word) for word in words)
    return train.settings_of([recipe, *map(str, TINY), *one_step(recipe), *others])


def one_step(recipe):
    """The attack's steps, where it has any."""
    return [] if recipe in ("free_at", "clp_images") else ["--steps", "1"]


def ended(settings):
    """Weights, and all of the last state, of a run that is brought to its end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train.train(settings)
    out = settings.running.out
    state = sorted((out / "states").glob("step-*"))[-1]
    optimizer = torch.load(state / "optimizer.bin", weights_only=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "weights": [weights_checksum(read_weights(out / f"{name}.safetensors")) for name in ("best", "final")],
        "model": (state / "model.safetensors").read_bytes(),
        "kept": (state / "process_0.safetensors").read_bytes(),
        "optimizer": [value["momentum_buffer"].tolist() for value in optimizer["state"].values()],
        "scores": [(entry["terms"], entry["validation"]) for entry in log],
    }


class Killed(Exception):
    """What a step ends with."""


@pytest.mark.parametrize("name", [n if n in AT_ONCE else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_a_run_that_was_killed_goes_on_to_the_last_bit(name, tmp_path, monkeypatch, capsys):
    whole = ended(parsed(*CASES[name], "--out", tmp_path / "whole"))
    taken, calls = train.take_step, []

    def dying(run, *batch):
        own = run.settings.running.out.name == "out"  # not a teacher's run
        calls.extend([run.step] if own else [])
        if own and len(calls) == 5:  # in the second of two epochs of three steps
            raise Killed
        return taken(run, *batch)

    monkeypatch.setattr(train, "take_step", dying)
    words = [*CASES[name], "--out", tmp_path / "out"]
    with pytest.raises(Killed):
        ended(parsed(*words))
    assert len(list((tmp_path / "out/states").glob("step-*"))) == 2
    again = ended(parsed(*words, "--resume"))
    assert "goes on after step 4" in capsys.readouterr().out
    assert [part for part, value in whole.items() if again[part] != value] == []


def test_every_method_that_keeps_something_is_killed_above():
    of_recipes = {part for name in EARLY for part in method.parts(RECIPES[name].settings.method)}
    assert of_recipes >= set(companions.COMPANIONS) >= set(method.BESIDE)


# What a state holds --------------------------------------------------------------------------------------------------


def test_a_memory_has_a_row_for_each_sample_seen_and_no_other(tmp_path):
    run = train.prepare(parsed("te", *EARLY["te"], "--out", tmp_path))
    train.train_epoch(run, None)
    seen = run.kept["ensemble"].sum(dim=1)
    rows = torch.cat(train.rows_of(run.parts, run.settings, 0))
    assert seen.shape[0] == len(run.parts.train)
    assert torch.allclose(seen[rows], torch.tensor(0.1), atol=1e-6)
    assert int((seen > 0).sum()) == len(rows) < len(seen)


def test_teachers_are_trained_first_and_are_part_of_the_state(tmp_path):
    train.train(parsed("kd_swa", *EARLY["kd_swa"], "--epochs", "1", "--out", tmp_path / "run"))
    assert {path.parent.name for path in tmp_path.glob("run/*/result.json")} == {"standard_teacher", "robust_teacher"}
    (state,) = (tmp_path / "run/states").glob("step-*3")
    held = load_file(state / "process_0.safetensors")
    for name, by in companions.TEACHERS["kd"].items():
        weights = read_weights(tmp_path / "run" / name / "final.safetensors")
        assert all(torch.equal(held[f"kept/{name}/{key}"], value) for key, value in weights.items())
        assert json.loads((tmp_path / "run" / name / "result.json").read_text())["settings"]["objective"] == by


def test_a_teacher_is_given_and_takes_no_step(tmp_path):
    teacher = DigitsCNN(width=2)
    save_weights(tmp_path / "teacher.safetensors", teacher)
    run = train.prepare(parsed("hat", "--teacher", tmp_path / "teacher.safetensors", "--out", tmp_path / "run"))
    train.train_epoch(run, None)
    weights = run.kept["helper"].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    assert not companions.trained_along(run.kept)


def test_a_second_network_is_trained_along(tmp_path):
    run = train.prepare(parsed("lbgat", *EARLY["lbgat"], "--out", tmp_path))
    before = copy.deepcopy(run.kept["teacher"].state_dict())
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 2 * len(list(run.model.parameters()))
    train.train_epoch(run, None)
    after = run.kept["teacher"].state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))


def test_cure_starts_from_its_teacher_and_averages_now_and_then(tmp_path):
    first = DigitsCNN(width=2)
    save_weights(tmp_path / "first.safetensors", first)
    words = ["cure", "--teacher", tmp_path / "first.safetensors", "--out", tmp_path / "run"]
    run = train.prepare(parsed(*words, "--options", "update_share=0.0"))
    assert all(torch.equal(run.bare.state_dict()[name], value) for name, value in first.state_dict().items())
    train.train_epoch(run, None)
    parameters = dict(first.named_parameters())
    assert all(torch.equal(run.kept["average"][name], value) for name, value in parameters.items())
    assert run.average is None


def test_the_average_of_a_ramp_copies_statistics_and_follows_its_schedule(tmp_path):
    words = ["trades", "--average-decay", "0.995", "--averaging", "ramp", "--average-start", "1", "--out", tmp_path]
    run = train.prepare(parsed(*words))
    for epoch in range(2):
        run.epoch, run.batch = epoch, 0
        before = run.average
        x, labels = run.parts.train[torch.arange(100)]
        train.take_step(run, x, labels, torch.arange(100))
        decay = ramped_decay(0) if epoch else 0.0
        wanted = ema_update(before, run.model, decay=decay, buffers="copy")
        assert all(torch.equal(run.average[name], value) for name, value in wanted.items())


def test_swa_is_the_mean_of_the_epochs_with_its_own_statistics(tmp_path):
    run = train.prepare(parsed("pgd_at", "--averaging", "swa", "--average-start", "0", "--out", tmp_path))
    ends = []
    for _ in range(2):
        train.train_epoch(run, None)
        ends.append(snapshot(run.model))
        train.close_epoch(run, None)
    for name, _ in run.bare.named_parameters():
        torch.testing.assert_close(run.average[name], (ends[0][name] + ends[1][name]) / 2)
    fresh = refresh_batch_norm(run.bare, run.average, run.parts.train[:][0].split(500))
    assert all(torch.allclose(run.average[name], value) for name, value in fresh.items() if value.is_floating_point())


def test_swa_leaves_no_image_alone_in_a_batch(tmp_path):
    settings = parsed("pgd_at", "--averaging", "swa", "--average-start", "0", "--out", tmp_path)
    run = train.prepare(settings)
    many = len(run.parts.train)
    for size in (many - 1, (many - 1) // 2, many, many + 1, 300):
        run.settings = settings.changed(eval_batch=size)
        with mock.patch.object(train.pat, "refresh_batch_norm", lambda model, average, seen: [len(x) for x in seen]):
            sizes = train._averaged_over_epochs(run, run.average)
        assert sum(sizes) == many
        assert min(sizes) > 1
        assert set(sizes[:-1]) <= {size}


def test_dummies_are_folded_for_everybody_but_the_loss(tmp_path):
    settings = parsed("ducat", "--options", "dummies=True", "--later", "--epochs", "1", "--out", tmp_path)
    train.train(settings)
    assert read_weights(tmp_path / "final.safetensors")["model.linear.weight"].shape[0] == 20
    wishes = Wishes(models=Models(run=(tmp_path,), which="final"))
    (target,) = targets_of(wishes)
    images = TensorImages(torch.rand(2, 1, 8, 8), torch.arange(2))
    assert target.made(images)(images.images).shape == (2, 10)


# Two processes --------------------------------------------------------------------------------------------------------

STEPS = """
import sys, torch
from perceptual_at.commands.training import companions
from perceptual_at.commands.training.batches import rows_of
settings = train.settings_of(sys.argv[2:])
run = train.prepare(settings)
rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
run.model.eval()  # batch norm would see other batches
for rows in rows_of(run.parts, settings, 0)[:2]:
    mine = rows.chunk(ranks)[rank]
    train.take_step(run, *run.parts.train[mine], mine)
    run.batch += 1
run.kept = companions.companion_of(settings).closed(run)
seen = {"model": run.bare.state_dict(), "average": run.average or {}, "kept": companions.flat_state(run.kept)}
torch.save(seen, f"{settings.running.out}-{ranks}-{rank}.pt")
"""
STILL = ["--padding", "0", "--batch", "64", "--held-out", "0.5", "--epochs", "1", "--lr", "0.05"]
ALIKE = {
    "te": ["te", "--options", "start=0", "length=1"],
    "mma": ["mma", "--steps", "3", "--eps", "0.1", "--options", "largest=0.1", "search_steps=4"],
    "awp and ema": ["pgd_at", "--awp", "0.01", "--average-decay", "0.5"],
    "rpat on te, awp, ema": ["rpat", "--base", "te", "--awp", "0.01", "--average-decay", "0.5"],
    "ducat": ["ducat", "--options", "dummies=True", "--later"],
    "free_at": ["free_at", "--replays", "2"],
}
DRAWN = {  # starts at random, which each process draws for itself: the two must agree with each other
    "lbgat": ["lbgat", "--data", "digits", "--second", "digits_cnn"],
    "ikl": ["ikl", "--awp-start", "0"],
    "cure": ["cure", "--options", "update_share=0.9"],
    "piat": ["piat"],
}
APART = ("delta", "sums")  # each process has its own


@pytest.mark.parametrize("name", [*ALIKE, *DRAWN])
def test_two_processes_keep_what_one_would(name, runner, tmp_path):
    words = [*(ALIKE | DRAWN)[name], *STILL]
    if name == "cure":
        save_weights(tmp_path / "first.safetensors", DigitsCNN(width=2))
        words += ["--teacher", tmp_path / "first.safetensors"]
    recipe, *others = words
    start = ["--start", "clean"] if name in ALIKE and name != "free_at" else []
    words = [recipe, *TINY, *one_step(recipe), *start, *others, "--out", tmp_path / "seen"]
    runner.run(words, processes=2, code=STEPS)
    one, other = (torch.load(tmp_path / f"seen-2-{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("model", "average", "kept"):
        for key, value in one[part].items():
            apart = key in APART or (part == "kept" and "running_" in key)  # as batch norm's, until the epoch ends
            assert apart or torch.equal(value, other[part][key]), (part, key)
    if name in ALIKE:
        runner.run(words, code=STEPS)
        alone = torch.load(tmp_path / "seen-1-0.pt", weights_only=True)
        for part in ("model", "average", "kept"):
            for key, value in alone[part].items():
                if key not in APART:
                    torch.testing.assert_close(one[part][key], value, rtol=1e-3, atol=1e-5)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("pgd_at", {"objective": "mma"}, "--options largest=VALUE is needed by mma"),
        ("pgd_at", {"objective": "clp"}, "--options pairs=VALUE is needed by clp"),
        ("pgd_at", {"objective": "adr"}, "--average-decay is needed by adr"),
        ("pgd_at", {"objective": "hypersphere"}, "--cosines SCALE goes with hypersphere, which needs it"),
        ("pgd_at", {"objective": "ducat"}, "--dummies goes with ducat, which needs it"),
        ("pgd_at", {"dummies": True}, "--dummies goes with ducat"),
        ("pgd_at", {"second": "resnet18"}, "--second has no effect with --objective pgd_at"),
        ("pgd_at", {"patience": (3,)}, "--patience and --attack-noise go with --attack friendly"),
        ("fat", {"patience": (90, 50)}, "--patience must be epochs in order"),
        ("trades", {"attack": "free"}, "--attack free goes with --objective pgd_at alone"),
        ("pgd_at", {"replays": 2}, "--replays goes with --attack free"),
        ("n_fgsm", {"steps": 10}, "--attack n_fgsm takes one step"),
        ("pgd_at", {"averaging": "ramp"}, "--averaging ramp needs --average-decay"),
        ("wa", {"averaging": "swa"}, "--average-decay has no effect with --averaging swa"),
        ("pgd_at", {"awp_form": "sam"}, "--awp-start and --awp-form have no effect without --awp"),
        ("cure", {"precision": "fp16"}, "--precision fp16 cannot be had with cure"),
        ("pgd_at", {"smoothing": 0.1, "cutmix": True}, "--smoothing has no effect with --cutmix"),
        ("te", {"base": "mart"}, "--base knows pgd_at, trades with --objective te"),
        ("pgd_at", {"base": "trades"}, "--base has no effect with --objective pgd_at"),
        ("rpat", {"base": "mma"}, "--base knows .* not 'mma'"),
        ("rpat", {"base": "trades+dicar"}, "--base is a name, or dicar.NAME with --objective rpat"),
        ("rpat", {"base": "trads"}, "there is no|did you mean trades"),
        ("te", {"options": ("beginn=3",)}, "te takes no 'beginn'"),
        ("gairat", {"later": ("offset=1",)}, "--later takes epoch:name=value"),
        ("gairat", {"later": ("3:ofset=1",)}, "gairat takes no 'ofset' .did you mean offset"),
    ],
)
def test_what_does_not_fit_a_method_is_refused_by_name(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        method.check(RECIPES[recipe].settings.changed(**changes))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pgd_at", "--teacher", "a.safetensors"], "--teacher: pgd_at has no teacher; 1 given"),
        (["kd_swa", "--teacher", "a.safetensors"], "--teacher: kd takes 2: standard_teacher, robust_teacher; 1 given"),
        (["hat", "--teacher", "none.safetensors"], "--teacher: there is no file `none.safetensors`"),
        (["generated"], "--extra: there is no file `generated.npz`"),
    ],
)
def test_what_a_method_lacks_is_named(words, message, tmp_path):
    with pytest.raises(Stopped, match=message):
        train.train(parsed(*words, "--out", tmp_path))


def test_a_teacher_of_another_run_is_not_taken(tmp_path):
    train.train(parsed("hat", "--epochs", "1", "--out", tmp_path / "run"))
    shutil.copytree(tmp_path / "run" / "helper", tmp_path / "other" / "helper")
    with pytest.raises(Stopped, match=r"the helper in .* was trained with other settings: lr 0.21 -> 0.1"):
        train.train(parsed("hat", "--epochs", "1", "--lr", "0.1", "--out", tmp_path / "other"))


def test_recipes_hold_the_settings_of_the_released_codes():
    flat = {name: made.settings.flat() for name, made in RECIPES.items()}
    assert (flat["awp"]["awp"], flat["trades_awp"]["awp"], flat["trades_awp"]["awp_start"]) == (0.01, 0.005, 10)
    assert (flat["adr"]["average_decay"], flat["adr"]["nesterov"], flat["adr"]["model_mode"]) == (0.995, True, "as_is")
    assert method.beside(RECIPES["adr"].settings.method) == {"temperature_end": 2.0, "trust_end": 0.95}
    assert method.beside(RECIPES["te"].settings.method) == {"start": 90, "length": 60, "momentum": 0.9}
    assert (flat["kd_swa"]["averaging"], flat["kd_swa"]["average_start"]) == ("swa", 55)
    assert [flat["free_at"][name] for name in ("replays", "step_size", "lr")] == [8, 8 / 255, 0.04]
    assert [flat["generated"][name] for name in ("extra_share", "batch", "beta")] == [0.7, 512, 5.0]
    gairat = RECIPES["gairat"].settings.method
    assert [method.keywords(gairat, epoch=epoch)["offset"] for epoch in (0, 59, 60)] == [float("inf")] * 2 + [-1.0]
    mail = RECIPES["mail"].settings.method
    assert [method.keywords(mail, epoch=epoch)["weighted"] for epoch in (75, 76)] == [False, True]
    for name in ("ewat", "sovr", "piat"):
        assert "a documented variant whose agreement with the paper nobody has checked" in RECIPES[name].title
