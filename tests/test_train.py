"""`perceptual-at train`: killed for real, run in two processes, refused what is wrong, and every recipe tried."""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

for needed in ("accelerate", "tyro", "safetensors", "tensorboard"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; the extra `train` brings it")

from perceptual_at import snapshot  # noqa: E402
from perceptual_at.checkpoints import load_weights, save_weights, weights_checksum  # noqa: E402
from perceptual_at.commands import train  # noqa: E402
from perceptual_at.commands.endings import Stopped  # noqa: E402
from perceptual_at.commands.ingredients import images, networks  # noqa: E402
from perceptual_at.commands.options.method import check, keywords  # noqa: E402
from perceptual_at.commands.options.recipes import FAMILIES, RECIPES  # noqa: E402
from perceptual_at.commands.training import companions, rates, report, splits, steps  # noqa: E402

from .runs import ROOT, assert_same, newest, remains, started  # noqa: E402

runner = pytest.fixture(started, scope="module")

TINY = [
    "--data", "random", "--model", "resnet18", "--width", "2", "--batch", "8", "--held-out", "24", "--steps", "1",
    "--select-steps", "1", "--test-steps", "2", "--eval-batch", "16", "--cpu",
]  # fmt: skip
# Two views, averaged weights, a teacher in train mode and DICAR's draws: everything that has a state.
SHARP = ["raat_sharp", *TINY, "--epochs", "3", "--milestones", "1", "2", "--average-start", "1", "--average-decay",
         "0.5", "--save-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """The run that is never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    runner.run([*SHARP, "--out", out])
    return out


# Killed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_like_the_run_that_was_not(runner, whole, tmp_path):
    draw, out, killed = random.Random(0), tmp_path / "out", 0
    for _ in range(6):
        (pid,) = runner.start([*SHARP, "--out", out, "--resume"])
        until = newest(out) + draw.randint(1, 3)
        while newest(out) < until and not runner.ended():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            os.kill(pid, signal.SIGKILL)
        killed += runner.statuses() == [signal.SIGKILL]
    assert killed >= 3
    printed = runner.run([*SHARP, "--out", out, "--resume"])
    assert "goes on after step" in printed
    assert_same(out, whole)


# Kills itself, with SIGKILL, when a function is called for the n-th time; files are written in half before.
KILLED_AT = """
import os, signal
name, number = {name!r}, {number}
home = commands.training
*path, last = name.split(".")
for part in path:
    home = getattr(home, part)
whole, calls = getattr(home, last), 0

def dying(*args, **options):
    global calls
    calls += 1
    if calls == number:
        if last in ("save_file", "save_weights") and "states" in str(args):
            where = args[1] if last == "save_file" else args[0]
            whole(*args, **options)
            os.truncate(where, os.path.getsize(where) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **options)

setattr(home, last, dying)
command()
"""


@pytest.mark.slow
def test_a_run_killed_while_saving_ends_like_the_run_that_was_not(runner, whole, tmp_path):
    out, torn = tmp_path / "out", 0
    for name, number in (
        ("saving.save_file", 1), ("states._seal", 2), ("saving.save_file", 2), ("saving.save_weights", 2),
        ("states._sync", 3), ("states.Path.rename", 2), ("states._sync", 8), ("states.shutil.rmtree", 3),
        ("logs.write_log", 2),
    ):  # fmt: skip
        runner.start([*SHARP, "--out", out, "--resume"], code=KILLED_AT.format(name=name, number=number))
        assert runner.statuses() == [signal.SIGKILL], (name, runner.log.read_text())
        torn += any((out / "states").glob(".step-*"))
    assert torn >= 5
    runner.run([*SHARP, "--out", out, "--resume"])
    assert not list((out / "states").glob(".step-*"))
    assert_same(out, whole)


@pytest.mark.slow
def test_two_killed_processes_go_on_as_if_nothing_had_happened(runner, tmp_path):
    arguments = ["raat", *TINY, "--epochs", "2", "--save-every", "1"]
    runner.run([*arguments, "--out", tmp_path / "whole"], processes=2)
    pids = runner.start([*arguments, "--out", tmp_path / "out"], processes=2)
    while not (tmp_path / "out/states/step-000000002").exists() and not runner.ended():
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert runner.statuses() == [signal.SIGKILL] * 2
    assert "saved by 2 processes, not 1" in runner.refused([*arguments, "--out", tmp_path / "out", "--resume"])
    printed = runner.run([*arguments, "--out", tmp_path / "out", "--resume"], processes=2)
    assert "goes on after step" in printed
    assert_same(tmp_path / "out", tmp_path / "whole")
    other = [
        sorted(run.glob("states/step-*"))[-1] / "process_1.safetensors"
        for run in (tmp_path / "out", tmp_path / "whole")
    ]
    assert other[0].read_bytes() == other[1].read_bytes()


@pytest.mark.slow
def test_a_finished_run_started_again_reports_the_same(runner, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    runner.run([*SHARP, "--out", tmp_path / "out", "--resume"])
    assert_same(tmp_path / "out", whole)


# Damaged, foreign, full -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest", "half a manifest"])
def test_a_damaged_state_is_not_loaded_and_the_one_before_is(runner, whole, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before, last = sorted((out / "states").glob("step-*"))
    hurt(last, damage)
    printed = runner.run([*SHARP, "--out", out, "--resume"])
    assert f"goes on after step {int(before.name[-9:])}:" in printed
    assert_same(out, whole)


def hurt(state, damage):
    file, manifest = state / "optimizer.bin", state / "manifest.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "changed":
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(bytes(raw))
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])


@pytest.mark.slow
def test_where_no_state_is_whole_nothing_is_started_or_removed(runner, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for state in (out / "states").glob("step-*"):
        hurt(state, "cut")
    printed = runner.refused([*SHARP, "--out", out, "--resume"])
    assert "is whole (step-" in printed
    assert "`optimizer.bin` was changed or cut off" in printed
    assert len(list((out / "states").glob("step-*"))) == 2


@pytest.mark.slow
def test_a_run_is_not_overwritten_nor_continued_with_other_settings_or_images(runner, whole):
    before = remains(whole)
    assert "holds a run already" in runner.refused([*SHARP, "--out", whole])
    printed = runner.refused([*SHARP, "--out", whole, "--resume", "--lr", "0.5", "--seed", "1"])
    assert "lr 0.1 -> 0.5" in printed
    assert "seed 0 -> 1" in printed
    other = "from perceptual_at.commands.training import splits\nold = splits.images_of\n"
    other += "def images_of(chosen, split):\n    held = old(chosen, split)\n    held.images[0] += 1\n    return held\n"
    other += "splits.images_of = images_of\ncommand()"
    assert "was trained on other images" in runner.refused([*SHARP, "--out", whole, "--resume"], code=other)
    assert remains(whole) == before


@pytest.mark.slow
def test_a_full_disk_loses_nothing(runner, whole, tmp_path):
    out = tmp_path / "out"
    full = """
import resource
whole = train.save_run
def save(run):
    if run.step == 3:  # from here on, files end after one page
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    whole(run)
train.save_run = save
command()
"""
    runner.start([*SHARP, "--out", out], code=full)
    (status,) = runner.statuses()
    assert os.waitstatus_to_exitcode(status) == 1, runner.log.read_text()
    assert newest(out) == 2
    assert "could not be saved" in runner.log.read_text()
    assert "start again with --resume" in runner.log.read_text()
    runner.run([*SHARP, "--out", out, "--resume"])
    assert_same(out, whole)


def test_an_unwritable_folder_is_found_out_before_the_first_step(runner, tmp_path):
    (tmp_path / "file").write_text("")
    printed = runner.refused([*SHARP, "--out", tmp_path / "file" / "out"])
    assert "is no folder, or below a file" in printed
    assert "epoch" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cifar10", "--root", "none"], "holds no folder `cifar-10-batches-py`"),
        (["--data", "tiny_imagenet", "--root", "none"], "holds no folder `train`"),
        (["--data", "folder", "--root", "none"], "there is no folder 'train'"),
        (["--data", "npz", "--root", "none.npz"], "there is no file `none.npz`"),
        (["--data", "npz", "--root", str(ROOT / "README.md")], "is no archive as `numpy.savez` writes it"),
        (["--batch", "80"], "--batch 80 is more than the 40 images to train on"),
        (["--held-out", "64"], "hold_out: `amount` 64 holds out 64 of 64 samples"),
        (["--form", "quotient"], "--form has no effect with --objective pgd_at"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--objective", "rebat"], "--average-decay is needed by rebat"),
        (["--eps", "8"], "did you mean"),
        (["--lane", "fp32", "--model-mode", "as_is"], "--lane runs in eval mode"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(runner, tmp_path, options, message):
    assert message in runner.refused(["pgd_at", *TINY, *options, "--out", tmp_path / "out"])


# Two processes --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from perceptual_at.commands.training import companions, rates, report
from perceptual_at import frozen, snapshot
settings = train.settings_of(sys.argv[2:])
run = train.prepare(settings)
rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
test = run.parts.test
with torch.no_grad(), frozen(run.model) as f:  # all right, but barely: verdicts hang on the noise
    f.linear.bias -= f(test[:][0]).mean(dim=0)
    test.labels = f(test[:][0]).argmax(dim=1)
weights = snapshot(run.model)
run.settings = settings.changed(eps=0.5, eval_step_size=2 / 255)
tested = report.measure(run, run.model, weights, test, 3)
run.settings = settings
seen = {"correct": tested.correct, "robust": tested.robust["pgd3"]}

run.model.eval()
rows = rates.rows_of_epoch(0, len(run.parts.train), 8, 0)[0]
x, labels = run.parts.train[rows.chunk(ranks)[rank]]
loss, _ = train.Step(settings, run.sources, x, labels, epoch=0, average=None)(run.model)
run.accelerator.backward(loss)
companions.share_gradients(run)
seen["gradients"] = {name: p.grad.clone() for name, p in run.bare.named_parameters()}
torch.save(seen, f"{settings.running.out}-{ranks}-{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pgd_at", "rpat", "rpat --perceive second_to_last", "consistency_at"])
def test_two_processes_have_the_gradients_and_counts_of_one(runner, tmp_path, recipe):
    still = ["--start", "clean", "--padding", "0", "--no-flip", "--eval-batch", "10", "--out", tmp_path / "seen"]
    for processes in (1, 2):
        runner.run([*recipe.split(), *TINY, *still], processes=processes, code=MEASURE)
    one, *two = (torch.load(tmp_path / f"seen-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for found in two:
        assert torch.equal(found["correct"], one["correct"])  # 64 verdicts: 7 batches, the last one smaller
        assert torch.equal(found["robust"], one["robust"])
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    assert one["correct"].tolist() == [True] * 64
    assert 0 < one["robust"].sum() < 64
    assert any(gradient.abs().max() > 1e-3 for gradient in one["gradients"].values())


LONELY = """
import sys, torch
from perceptual_at import frozen
from perceptual_at.commands.training import steps
settings = train.settings_of(sys.argv[2:])
run = train.prepare(settings)
rank = run.accelerator.process_index
run.model.train()
for step in range(3):
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad(), frozen(run.model) as f:
        labels = f(x).argmax(dim=1)
    if rank == 1:
        labels = (labels + 1) % 10  # here nothing is right, so DICAR has no pair and leaves two passes out
    loss, terms = steps.Step(settings, run.sources, x, labels, epoch=0, average=None)(run.model)
    print("dicar", rank, float(terms["dicar"]) > 0, flush=True)
    run.optimizer.zero_grad()
    run.accelerator.backward(loss)
    run.optimizer.step()
torch.save({name: p.detach() for name, p in run.bare.named_parameters()}, f"{settings.running.out}-{rank}.pt")
"""


@pytest.mark.slow
def test_a_process_without_pairs_does_not_stop_the_other(runner, tmp_path):
    still = ["--padding", "0", "--no-flip", "--out", tmp_path / "weights"]
    printed = runner.run(["raat", *TINY, *still], processes=2, code=LONELY)
    assert "dicar 0 True" in printed
    assert "dicar 1 True" not in printed
    one, other = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)


# Recipes, selection, precision ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the pages' code, say, in the same process
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def parsed(*words):
    return train.settings_of([str(word) for word in words])


def test_every_recipe_is_in_one_family_and_has_a_name_of_its_own():
    named = [name for family in FAMILIES.values() for name in family.RECIPES]
    assert sorted(named) == sorted(RECIPES)


def brought(plain, folder):
    """What a recipe needs beside the images: weights of teachers, generated images; and everything from the start."""
    words = ["--later"] if plain.method.later else []
    teachers = companions.teachers(plain)
    if teachers:
        shape = networks.Task(3, 10, torch.rand(2, 3, 16, 16))
        chosen = dataclasses.replace(plain.network, width=4)
        save_weights(folder / "teacher.safetensors", networks.network(chosen, shape, seed=1))
        words += ["--teacher", *[folder / "teacher.safetensors"] * len(teachers)]
    if plain.data.extra is not None:
        made = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
        np.savez(folder / "generated.npz", x_train=made.numpy(), y_train=(torch.arange(20) % 10).numpy())
        words += ["--extra", folder / "generated.npz"]
    return words


AT_ONCE = ("pgd_at", "rpat", "raat_plus_plus", "te", "free_at")  # the others are marked slow
TRIED = [name for name in RECIPES if not name.endswith(("_200", "_l2"))] + ["rpat_l2"]


@pytest.mark.parametrize(
    "recipe", [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in TRIED]
)
def test_every_recipe_parses_and_runs_two_steps(recipe, tmp_path):
    plain = parsed(recipe)
    assert plain == RECIPES[recipe].settings
    small = ["--width", "4", "--batch", "8", "--held-out", "48", "--epochs", "1", "--cpu"]
    small += [] if recipe in ("free_at", "clp_images") else ["--steps", "1"]  # which have none
    small += brought(plain, tmp_path)
    averaged = plain.optimisation.average_decay is not None
    early = ["--average-start", "0", "--average-decay", "0.1"] if averaged else []  # so that every term is in use
    early += ["--average-start", "0"] if plain.optimisation.averaging == "swa" else []
    settings = parsed(recipe, *small, "--data", "random", *early, "--out", tmp_path)
    run = train.prepare(settings)
    before = snapshot(run.model)
    train.train_epoch(run, None)
    assert run.step == 2
    assert all(map(math.isfinite, run.sums.values()))
    may_vanish = ("robust_perception", "dicar")  # DICAR on what is classified rightly, which may be nothing yet
    assert all(total > 0 for name, total in run.sums.items() if name not in may_vanish)
    expected = {"pgd_at": 1, "rpat_mart": 3, "raat_plus_plus": 3, "rebat": 2, "rpat_plus_plus": 2, "raat_sharp": 2}
    assert len(run.sums) == 1 + expected.get(recipe.removesuffix("_200").removesuffix("_l2"), len(run.sums) - 1)
    after = snapshot(run.model)
    assert any(not torch.equal(after[name], before[name]) for name in after if name.endswith("weight"))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["pgd_at", "trades", "mart", "consistency_at"])
def test_dicar_runs_on_every_base(base, tmp_path):
    run = train.prepare(parsed("pgd_at", *TINY, "--objective", "dicar", "--base", base, "--out", tmp_path))
    train.train_epoch(run, None)
    assert "dicar" in run.sums
    assert len(run.sums) == (3 if base == "pgd_at" else 4)


def test_recipes_hold_the_papers_settings():
    flat = {name: made.settings.flat() for name, made in RECIPES.items()}
    of_the_two_papers = [name for family in ("bases", "RPAT", "RAAT") for name in FAMILIES[family].RECIPES]
    for values in (flat[name] for name in of_the_two_papers):
        assert (values["lr"], values["momentum"], values["weight_decay"]) == (0.1, 0.9, 5e-4)
        assert (values["batch"], values["steps"], values["select_on"]) == (128, 10, "validation")
    assert (flat["rpat"]["epochs"], flat["rpat"]["milestones"]) == (110, [100, 105])
    assert (flat["trades_200"]["epochs"], flat["trades_200"]["milestones"]) == (200, [100, 150])
    assert [flat["raat"][name] for name in ("norm", "eps", "step_size")] == ["linf", 8 / 255, 2 / 255]
    l2 = [flat["raat_l2"][name] for name in ("norm", "eps", "step_size", "epochs")]
    assert l2 == ["l2", 128 / 255, 32 / 255, 110]
    assert keywords(RECIPES["rpat"].settings.method) == {"form": "interpolation"}
    assert keywords(RECIPES["rpat_paper"].settings.method) == {"form": "quotient"}
    assert keywords(RECIPES["rpat_mart"].settings.method) == {"form": "interpolation", "base": "mart"}
    sharp = [flat["raat_sharp"][name] for name in ("model", "average_start", "factor", "model_mode")]
    assert sharp == ["preact_resnet18", 105, 1.5, "as_is"]


def test_learning_rates():
    plain = parsed("pgd_at").optimisation

    def over(steps_per_epoch, count, **changes):
        chosen = dataclasses.replace(plain, **changes)
        return [rates.learning_rate(chosen, step, steps_per_epoch) for step in range(count)]

    assert over(2, 8, milestones=(2, 3)) == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    rebat = over(2, 5, schedule="rebat", factor=1.5, milestones=(1, 2))
    assert rebat == pytest.approx([0.1, 0.1 / 1.5, 0.1 / 1.5, 0.1 / 2.25, 0.1 / 2.25])
    cycle = over(100, 1000, schedule="one_cycle", epochs=10)
    assert 0 < cycle[0] < 0.001
    assert 0 < cycle[-1] < 0.001
    assert max(cycle) == pytest.approx(0.1, rel=0.01)
    assert 0.29 < cycle.index(max(cycle)) / 1000 < 0.31


def test_fractions_are_understood_and_options_of_other_objectives_refused():
    assert parsed("pgd_at", "--eps", "16/255").threat.eps == 16 / 255
    assert keywords(parsed("rpat_trades", "--beta", "4").method)["beta"] == 4
    with pytest.raises(ValueError, match="--eta has no effect with --objective trades"):
        check(RECIPES["trades"].settings.changed(eta=0.2))


def test_every_image_of_an_epoch_comes_once():
    rows = rates.rows_of_epoch(0, 45, 8, 3)
    assert [len(batch) for batch in rows] == [8] * 5
    assert len(set(torch.cat(rows).tolist())) == 40
    assert torch.equal(torch.cat(rows), torch.cat(rates.rows_of_epoch(0, 45, 8, 3)))
    assert not torch.equal(torch.cat(rows), torch.cat(rates.rows_of_epoch(0, 45, 8, 4)))
    assert not torch.equal(torch.cat(rows), torch.cat(rates.rows_of_epoch(1, 45, 8, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("select_on", ["validation", "test"])
def test_what_chose_the_best_weights_is_recorded(runner, tmp_path, select_on):
    out = tmp_path / "out"
    words = [word for word in TINY if select_on == "validation" or word not in ("--held-out", "24")]
    printed = runner.run(["pgd_at", *words, "--epochs", "2", "--select-on", select_on, "--out", out])
    result = json.loads((out / "result.json").read_text())
    assert result["selected_on"] == select_on
    assert ("was chosen on the test set" in printed) == (select_on == "test")
    sizes = (
        {"train": 40, "select": 24, "test": 64}
        if select_on == "validation"
        else dict.fromkeys(("train", "select", "test"), 64)
    )
    assert result["images"] == sizes
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    chosen = max(range(2), key=lambda i: (log[i][select_on]["pgd1"], i)) + 1
    assert result["best"]["epoch"] == chosen
    assert result["final"]["epoch"] == 2
    assert result["best"]["test"]["n"] == 64
    assert {"commit", "versions", "hardware", "seed", "settings", "command", "threat"} <= result.keys()
    assert any((out / "tensorboard").iterdir())


def test_validation_images_are_not_trained_on():
    settings = parsed("pgd_at", *TINY)
    parts = splits.splits(settings)
    everything = {image.numpy().tobytes() for image in images.images_of(settings.data, "train").images}
    train_images, held_out = (
        {image.numpy().tobytes() for image in part.images} for part in (parts.train, parts.select)
    )
    assert (len(train_images), len(held_out)) == (40, 24)
    assert train_images | held_out == everything


def test_the_weights_of_a_run_are_those_that_were_measured(whole, tmp_path):
    result = json.loads((whole / "result.json").read_text())
    settings = parsed(*SHARP)
    run = train.prepare(settings.changed(out=tmp_path))
    model = networks.network(settings.network, networks.Task(3, 10, run.parts.sample()), seed=3)
    assert load_weights(model, whole / "best.safetensors") == ([], [])
    assert weights_checksum(model) == result["best"]["weights"]
    test = images.images_of(settings.data, "test")
    measured = report.measure(run, model, snapshot(model), test, 2)
    assert report.percent(measured) == result["best"]["test"]


class Confident(nn.Module):
    """Right by so much that the gradient of the cross entropy is far below what float16 can hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)
        with torch.no_grad():
            self.linear.weight.mul_(1e-3)
            self.linear.bias.copy_(torch.tensor([12.0, 0.0, 0.0]))

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_float16_leaves_an_attack_its_gradients():
    torch.manual_seed(0)
    model, x, labels = Confident(), torch.full((4, 3, 2, 2), 0.5), torch.zeros(4, dtype=torch.long)
    attack = steps.attack_of(parsed("pgd_at", "--start", "clean").threat, torch.Generator())
    exact = attack(model, x, labels)
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(x).dtype == torch.float16
        kept = attack(model, x, labels)
    assert ((kept - x).abs() > 7 / 255).all()
    assert torch.equal(kept, exact)


def test_bfloat16_reaches_training_and_attack(tmp_path):
    run = train.prepare(parsed("rpat", *TINY, "--precision", "bf16", "--channels-last", "--out", tmp_path))
    seen = []
    linear = run.bare.linear
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = linear.weight.detach().clone()
    train.train_epoch(run, None)
    assert seen == [torch.bfloat16] * 4 * 5  # in each of five steps one pass of the attack and three of RPAT
    assert linear.weight.dtype == torch.float32
    assert not torch.equal(linear.weight, before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_lane_takes_the_attack_and_nothing_else(tmp_path, precision):
    words = ("--lane", "bf16", "--precision", precision, "--out", tmp_path)
    run = train.prepare(parsed("rpat", *TINY, *words))
    seen = []
    run.bare.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    x, labels = run.parts.train[:8]
    plain = steps.Step(run.settings.changed(lane="none"), run.sources, x, labels, epoch=0, average=None)
    plain(run.model)
    assert seen == [False] + [True] * 3  # the attack's step, and RPAT's passes
    seen.clear()
    lane = run.settings.changed(lane="bf16")
    with pytest.warns(UserWarning, match="has forward hooks"):  # those of this test
        steps.Step(lane, run.sources, x, labels, epoch=0, average=None)(run.model)
    assert seen.count(True) == 3


def test_a_step_in_float16_with_scaled_gradients_moves_every_weight():
    settings = parsed("rpat", "--padding", "0")
    settings = settings.changed(precision="fp16", model="resnet18", width=4, steps=2, data="random")
    held = images.images_of(settings.data, "train")
    model = networks.network(settings.network, networks.Task(3, 10, held[:2][0]), seed=0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sources = steps.Sources(torch.Generator(), torch.Generator(), 10)
    step = steps.Step(settings, sources, *held[:8], epoch=0, average=None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _ = step(model)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_float16_is_refused_on_a_cpu_where_it_would_be_float32(runner, tmp_path):
    printed = runner.refused(["pgd_at", *TINY, "--precision", "fp16", "--out", tmp_path / "out"])
    assert "--precision fp16 needs an accelerator" in printed


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = train.prepare(parsed("pgd_at", *TINY, "--lr", "1e30", "--out", tmp_path))
    with pytest.raises(Stopped, match="not finite"):
        train.train_epoch(run, None)


@pytest.mark.slow
def test_resuming_where_nothing_is_starts_from_the_beginning(runner, whole, tmp_path):
    printed = runner.run([*SHARP, "--out", tmp_path / "out", "--resume"])
    assert "raat_sharp starts" in printed
    assert_same(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "updates"), [("release", 13), ("paper", 11)])
def test_the_release_moves_batch_norms_statistics_thirteen_times_a_step(tmp_path, source, updates):
    # Ten steps of the attack and the training pass; the release looks at the attack's result and the batch once more.
    words = ["rebat", *TINY, "--steps", "10", "--average-start", "0", "--average-decay", "0.5", "--source", source]
    run = train.prepare(parsed(*words, "--out", tmp_path))
    x, labels = run.parts.train[:8]
    run.model.train()
    train.take_step(run, x, labels, torch.arange(8))
    assert {int(value) for name, value in run.bare.named_buffers() if "num_batches" in name} == {updates}


@pytest.mark.slow
def test_further_trackers_get_what_tensorboard_gets(tmp_path):
    words = ["pgd_at", *TINY, "--epochs", "1", "--track", "tensorboard", "--out", tmp_path]
    with contextlib.suppress(SystemExit):
        train.command([str(word) for word in words])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own, further = (EventAccumulator(str(tmp_path / name)).Reload() for name in ("tensorboard", "perceptual-at"))
    names = set(own.Tags()["scalars"])
    assert {"train/loss", "epoch/loss", "validation/clean", "groups/misclassified"} <= names
    assert names <= set(further.Tags()["scalars"])
