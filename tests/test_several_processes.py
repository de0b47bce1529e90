"""`perceptual-at` in two processes: they train as one does, and report what one reports."""

import json
import os
import signal
import time

import pytest
import torch

for needed in ("accelerate", "tyro", "safetensors", "tensorboard"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; the extra `train` brings it")

from perceptual_at import Evaluation  # noqa: E402
from perceptual_at.checkpoints import read_weights  # noqa: E402

from .runs import assert_same, started  # noqa: E402

pytestmark = pytest.mark.slow

runner = pytest.fixture(started, scope="module")

TINY = ["--data", "random", "--model", "resnet18", "--width", "2", "--batch", "8", "--held-out", "24", "--steps", "1",
        "--select-steps", "1", "--test-steps", "2", "--eval-batch", "16", "--cpu"]  # fmt: skip

EVALUATE = 'import sys\ncommand(["evaluate", *sys.argv[2:]])'


def test_two_processes_give_the_report_of_one_also_after_a_kill(runner, tmp_path):
    runner.run(["pgd_at", *TINY, "--epochs", "1", "--out", tmp_path / "run"])
    words = ["--run", tmp_path / "run", "--which", "best", "--attacks", "pgd2", "fgsm", "cw2", "--batch", "7", "--cpu"]
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        runner.run([*words, "--out", out], processes=processes, code=EVALUATE)
        found.append(json.loads((out / "best/report.json").read_text()))
        assert len(list((out / "best").glob("record-*.jsonl"))) == 1
    # Two records that were left by killed processes, one of them torn, and one process that goes on from both.
    out = tmp_path / "killed/best"
    out.mkdir(parents=True)
    (record,) = (tmp_path / "1/best").glob("record-*.jsonl")
    head, *lines = record.read_bytes().splitlines(keepends=True)
    for number, kept in enumerate((lines[:5], lines[5:9])):
        part = head + b"".join(kept)
        (out / f"{record.stem}.part-{number + 1}-of-2.jsonl").write_bytes(part[: -5 * number] if number else part)
    runner.run([*words, "--out", tmp_path / "killed"], code=EVALUATE)
    found.append(json.loads((out / "report.json").read_text()))
    assert [path.name for path in out.glob("record-*")] == [record.name]
    for report in found:
        for cost in report["costs"].values():
            cost.pop("seconds")
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_two_calls_on_one_record_do_not_meet(runner, tmp_path):
    from perceptual_at.commands.endings import locked

    runner.run(["pgd_at", *TINY, "--epochs", "1", "--out", tmp_path / "run"])
    words = ["--run", tmp_path / "run", "--which", "best", "--attacks", "pgd2", "--cpu"]
    with locked(tmp_path / "run/evaluation/best", "--out"):
        printed = runner.refused(words, code=EVALUATE)
    assert "another process is at work in" in printed
    assert not list((tmp_path / "run/evaluation/best").glob("re*"))


# Weights shared out (FSDP2) -------------------------------------------------------------------------------------------

SHARDED = """
import sys, torch
from perceptual_at.commands.training import shards
settings = train.settings_of(sys.argv[2:])
run = train.prepare(settings)
rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
if settings.running.shard:
    parts = {name: shards.part_of(value).numel() for name, value in run.bare.named_parameters()}
    assert sum(parts.values()) < 0.75 * sum(value.numel() for value in run.bare.parameters())
    assert type(run.bare.linear).__name__.startswith(("FSDP", "Linear"))
    assert sum(type(part).__name__.startswith("FSDP") for part in run.bare.modules()) > 2
rows = train.rows_of(run.parts, settings, 0)
for batch in rows[:3]:
    run.model.eval()  # so that batch norm's statistics are those of one process
    x, labels = run.parts.train[batch.chunk(ranks)[rank]]
    loss, _ = train.Step(settings, run.sources, x, labels, epoch=0, average=None)(run.model)
    run.optimizer.zero_grad()
    run.accelerator.backward(loss)
    run.optimizer.step()
weights = run.evaluated()
torch.save(weights, f"{settings.running.out}-{rank}.pt")
"""


@pytest.mark.parametrize("recipe", ["rpat", "trades", "consistency_at"])
def test_weights_that_are_shared_out_take_the_steps_of_one_process(runner, tmp_path, recipe):
    still = ["--padding", "0", "--no-flip", *([] if recipe == "trades" else ["--start", "clean"])]
    found = []
    for name, processes, more in (("one", 1, []), ("two", 2, []), ("shards", 2, ["--shard"])):
        words = [recipe, *TINY, *still, *more, "--out", tmp_path / name]
        runner.run(words, processes=processes, code=SHARDED)
        found += [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(processes)]
    one, *others = found
    assert any(not torch.equal(value, torch.zeros_like(value)) for value in one.values())
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_a_sharded_run_killed_goes_on_to_the_last_bit_and_its_folder_is_like_any_other(runner, tmp_path):
    words = ["rpat", *TINY, "--shard", "--average-decay", "0.5", "--epochs", "2", "--milestones", "1", "--save-every",
             "1"]  # fmt: skip
    runner.run([*words, "--out", tmp_path / "whole"], processes=2)
    pids = runner.start([*words, "--out", tmp_path / "out"], processes=2)
    while not (tmp_path / "out/states/step-000000002").exists() and not runner.ended():
        time.sleep(0.002)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert runner.statuses() == [signal.SIGKILL] * 2
    printed = runner.run([*words, "--out", tmp_path / "out", "--resume"], processes=2)
    assert "goes on after step" in printed
    assert_same(tmp_path / "out", tmp_path / "whole")
    final, trained = (read_weights(tmp_path / f"out/{name}.safetensors") for name in ("final", "final_model"))
    assert final["conv1.weight"].shape == trained["conv1.weight"].shape == (2, 3, 3, 3)
    assert not torch.equal(final["conv1.weight"], trained["conv1.weight"])
    runner.run(["--run", tmp_path / "out", "--which", "final", "--attacks", "pgd2", "--cpu"], code=EVALUATE)
    report = Evaluation.from_json(tmp_path / "out/evaluation/final/report.json")
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert 100 * report.clean_accuracy == pytest.approx(result["final"]["test"]["clean"], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["raat"], "a process without pairs would leave out passes"),
        (["rpat", "--awp", "0.01"], "--shard cannot be had with --awp"),
        (["rpat", "--lane", "fp32"], "--shard cannot be had with --lane"),
        (["rebat"], "whose term runs other weights"),
    ],
)
def test_what_shared_weights_cannot_do_is_refused(runner, tmp_path, words, message):
    assert message in runner.refused([*words, *TINY, "--shard", "--out", tmp_path / "out"], processes=2)


def test_one_process_has_nobody_to_share_with(runner, tmp_path):
    assert "there is one; start several" in runner.refused(["rpat", *TINY, "--shard", "--out", tmp_path / "out"])


# DICAR's mean ---------------------------------------------------------------------------------------------------------

UNEVEN = """
import sys, torch
from perceptual_at import frozen
from perceptual_at.commands.training import steps
settings = train.settings_of(sys.argv[2:])
run = train.prepare(settings)
rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
generator = torch.Generator().manual_seed(0)
x = torch.rand(8, 3, 16, 16, generator=generator)
other = (x + 0.2 * torch.rand(x.shape, generator=generator)).clamp(max=1)
run.model.eval()
with torch.no_grad(), frozen(run.model) as f:
    labels = f(x).argmax(dim=1)
    assert torch.equal(f(other).argmax(dim=1), labels)
labels[5:] = (labels[5:] + 1) % 10  # with two processes, all pairs of the first are in use and one of the second
mine = torch.arange(8).chunk(ranks)[rank]
step = steps.Step(settings, run.sources, (x[mine], other[mine]), labels[mine], epoch=0, average=None)
loss, terms = step(run.model)
run.optimizer.zero_grad()
run.accelerator.backward(loss)
torch.save({name: p.grad for name, p in run.bare.named_parameters()}, f"{settings.running.out}-{ranks}-{rank}.pt")
"""


def test_dicars_mean_over_the_pairs_of_all_processes_has_the_gradients_of_one(runner, tmp_path):
    still = [
        "--start",
        "clean",
        "--padding",
        "0",
        "--no-flip",
        "--eps",
        "0.001",
        "--step-size",
        "0.0005",
        "--weight",
        "100",
    ]
    for where in ("selected_everywhere", "selected"):
        for processes in (1, 2):
            words = ["raat", *TINY, *still, "--average-over", where, "--out", tmp_path / where]
            runner.run(words, processes=processes, code=UNEVEN)
    gradients = {
        (where, name): torch.load(tmp_path / f"{where}-{name}.pt")
        for where in ("selected_everywhere", "selected") for name in ("1-0", "2-0", "2-1")
    }  # fmt: skip
    differences = {
        where: max(
            float((gradients[where, "2-0"][name] - gradients[where, "1-0"][name]).abs().max())
            for name in gradients[where, "1-0"]
        )
        for where in ("selected_everywhere", "selected")
    }  # fmt: skip
    assert differences["selected_everywhere"] < 1e-4
    assert differences["selected"] > 10 * differences["selected_everywhere"]  # each process has a mean of its own
