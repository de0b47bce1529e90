"""`perceptual-at` in two processes: they train as one does, and report what one reports."""

import json

import pytest

for needed in ("accelerate", "tyro", "safetensors", "tensorboard"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; the extra `train` brings it")

from .runs import started  # noqa: E402

runner = pytest.fixture(started, scope="module")

TINY = ["--data", "random", "--model", "resnet18", "--width", "2", "--batch", "8", "--held-out", "24", "--steps", "1",
        "--select-steps", "1", "--test-steps", "2", "--eval-batch", "16", "--cpu"]  # fmt: skip

EVALUATE = 'import sys\ncommand(["evaluate", *sys.argv[2:]])'


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_calls_on_one_record_do_not_meet(runner, tmp_path):
    from perceptual_at.commands.endings import locked

    runner.run(["pgd_at", *TINY, "--epochs", "1", "--out", tmp_path / "run"])
    words = ["--run", tmp_path / "run", "--which", "best", "--attacks", "pgd2", "--cpu"]
    with locked(tmp_path / "run/evaluation/best", "--out"):
        printed = runner.refused(words, code=EVALUATE)
    assert "another process is at work in" in printed
    assert not list((tmp_path / "run/evaluation/best").glob("re*"))
