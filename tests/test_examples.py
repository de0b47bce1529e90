"""Every short example trains on tiny data, is short, and differs from the baseline only where its method does."""

import difflib
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from perceptual_at.models import DigitsCNN, resnet18

EXAMPLES = Path(__file__).parent.parent / "examples"
METHODS = {
    "pgd_at": 1, "trades": 1, "mart": 1, "consistency_at": 2, "rpat": 1, "rpat_trades": 1,
    "raat": 2, "raat_plus_plus": 2, "rebat": 1, "rpat_plus_plus": 1, "raat_sharp": 2,
    "free_at": 1,
    "awp": 1, "hat": 1, "te": 1, "mma": 1,
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load_module(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_module


NUMBERED = ("te", "mma")


def random_batches(views, numbered=False):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(16, 1, 8, 8, generator=generator) for _ in range(views)]
    labels = torch.randint(0, 10, (16,), generator=generator)
    numbers = (torch.arange(16),) if numbered else ()
    return [(images[0] if views == 1 else tuple(images), labels, *numbers)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "views"), METHODS.items())
def test_example_trains_and_moves_the_weights(load, capsys, name, views):
    torch.manual_seed(0)
    model = DigitsCNN(width=4)
    before = model.linear.weight.detach().clone()
    trained = load(name).train(
        model, random_batches(views, name in NUMBERED), torch.Generator().manual_seed(0), epochs=4
    )
    assert not torch.equal(trained.linear.weight, before)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert min(losses[1:]) < losses[0]


@pytest.mark.slow
def test_rpat_on_cifar10_in_one_file_runs_on_folders(load, tmp_path, monkeypatch, capsys):
    for split, count in (("train", 70), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    options = ["--folder", str(tmp_path), "--epochs", "1", "--width", "4", "--tested", "4"]
    monkeypatch.setattr(sys, "argv", ["cifar10_rpat.py", *options])
    load("cifar10_rpat").main()
    said = capsys.readouterr().out
    assert "epoch  1" in said
    assert "averaged: clean" in said


def test_rpat_on_cifar10_is_one_short_file_of_its_own():
    text = (EXAMPLES / "cifar10_rpat.py").read_text()
    assert len(text.splitlines()) <= 120
    assert "import common" not in text
    assert "commands" not in text


@pytest.mark.parametrize("name", METHODS)
def test_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


LOOPS_OF_THEIR_OWN = ("free_at",)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LOOPS_OF_THEIR_OWN])
def test_example_differs_from_the_baseline_only_where_the_method_does(name):
    baseline, other = ((EXAMPLES / f"{n}.py").read_text().splitlines() for n in ("pgd_at", name))
    kept = difflib.SequenceMatcher(None, baseline, other, autojunk=False).get_matching_blocks()
    shared = {line for block in kept for line in baseline[block.a : block.a + block.size]}
    for line in baseline:
        stripped = line.strip()
        if stripped.startswith(("optimizer", "schedule", "loss.backward", "for epoch", "model.train", "print(")):
            assert line in shared, f"{name}.py trains differently: {line!r}"


def test_every_example_is_listed_here():
    others = {"common", "demo", "theory_report", "gaussian_model", "perception_gap", "train", "evaluate"}
    others |= {"segmentation", "cifar10_rpat"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - others == set(METHODS)


def test_batches_cover_the_data_once_and_repeat_with_the_generator(load):
    common = load("common")
    x, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        runs.append(list(common.Batches(x, labels, views=2, batch_size=4, generator=generator)))
    assert sorted(label for _, batch in runs[0] for label in batch.tolist()) == list(range(10))
    for (views, _), (again, _) in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))


def test_report_measures_the_given_threat(load):
    common = load("common")
    torch.manual_seed(0)
    result = common.report(DigitsCNN(width=4))
    assert len(result) == 360
    assert 0 <= result.worst_case <= result.clean_accuracy <= 1


@pytest.mark.slow
def test_the_perception_gap_of_any_run_folder(load, tmp_path, monkeypatch, capsys):
    for needed in ("accelerate", "tyro", "safetensors", "tensorboard"):
        pytest.importorskip(needed, reason=f"{needed} is not installed; the extra `train` brings it")
    from perceptual_at.commands.main import main

    words = ["--data", "random", "--model", "resnet18", "--width", "2", "--normalize", "own", "--norm", "l2", "--eps",
             "0.5", "--step-size", "0.2", "--batch", "8", "--steps", "1", "--epochs", "1", "--select-steps", "1",
             "--test-steps", "1", "--average-decay", "0.5", "--cpu"]  # fmt: skip
    main(["train", "pgd_at", *words, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(
        sys, "argv", ["x", "--run", str(tmp_path / "run"), "--samples", "20", "--out", str(tmp_path / "out")]
    )
    load("perception_gap").main()
    assert "pgd20" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"perception_gap.png", "perception_path.png"}
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"holds no result\.json"):
        load("perception_gap").main()


@pytest.mark.slow
def test_the_perception_gap_of_a_checkpoint_is_measured_on_its_test_images(load, tmp_path, monkeypatch, capsys):
    for name in ("cat", "dog"):
        folder = tmp_path / "test" / name
        folder.mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    torch.save(resnet18(num_classes=2).state_dict(), tmp_path / "model.pt")
    arguments = ["--checkpoint", str(tmp_path / "model.pt"), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["perception_gap.py", *arguments])
    load("perception_gap").main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"perception_gap.png", "perception_path.png"}
    assert "pgd20" in capsys.readouterr().out


@pytest.mark.slow
def test_the_segmentation_example_trains_attacks_and_draws(load, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    out, figure = tmp_path / "numbers.json", tmp_path / "pictures.png"
    arguments = ["segmentation.py", "--steps", "2", "--attack-steps", "2", "--canvases", "3"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out), "--figure", str(figure)])
    load("segmentation").main()
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert list(runs) == ["PGD-AT", "PGD-AT + RPAT", "RAAT, per sample", "RAAT, per place"]
    for (found,) in runs.values():
        assert found["worst pixels"]["value"] <= min(found[f"{name} pixels"]["value"] for name in ("pgd", "segpgd"))
        assert all(0 <= number["interval"][0] <= number["interval"][1] <= 100 for number in found.values())
    with Image.open(figure) as drawn:
        assert drawn.size[0] > 300
    assert "PGD-AT + RPAT: clean pixels" in capsys.readouterr().out
