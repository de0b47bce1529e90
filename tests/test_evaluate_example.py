"""The evaluation script: models by name, checkpoints of both kinds, reports that resume and compare."""

import dataclasses
import importlib.util
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from perceptual_at import Evaluation
from perceptual_at.models import DigitsCNN

EXAMPLE = Path(__file__).parents[1] / "examples" / "evaluate.py"
pytest.importorskip("tyro")


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("evaluate_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evaluate_example", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(example, capsys, **options):
    settings = {"model": "perceptual_at.models:DigitsCNN(width=4)", "data": "digits", "eps": "0.15", "samples": 40}
    result = example.main(example.Settings(**settings | {"attacks": ("pgd3",), "device": "cpu"} | options))
    return result, capsys.readouterr().out


def saved(path, seed=0):
    torch.manual_seed(seed)
    model = DigitsCNN(width=4)
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    else:
        torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    return path


def test_it_writes_the_report_and_goes_on_where_it_stopped(example, capsys, tmp_path):
    checkpoint = saved(tmp_path / "model.pt")
    first, text = run(example, capsys, checkpoint=checkpoint, attacks=("pgd3", "cw3", "fgsm"), batch=16)
    folder = tmp_path / "outputs" / "evaluate"
    assert {path.name for path in folder.iterdir()} == {"record.jsonl", "report.json", "report.md"}
    assert (folder / "report.md").read_text() == text.rstrip("\n") + "\n"
    assert "| cw3 | " in text
    assert len(first) == 40
    assert Evaluation.from_json(folder / "report.json").to_dict() == first.to_dict()
    lines = (folder / "record.jsonl").read_text().splitlines()
    again, _ = run(example, capsys, checkpoint=checkpoint, attacks=("pgd3", "cw3", "fgsm"), batch=7)
    assert again.to_dict() == first.to_dict()
    assert (folder / "record.jsonl").read_text().splitlines() == lines
    with pytest.raises(ValueError, match="model was sha256"):
        run(example, capsys, checkpoint=saved(tmp_path / "other.pt", seed=1), attacks=("pgd3", "cw3", "fgsm"))


def test_attacks_run_in_a_lane_and_the_model_judges(example, capsys, tmp_path):
    checkpoint = saved(tmp_path / "model.pt")
    plain, _ = run(example, capsys, checkpoint=checkpoint, out=tmp_path / "plain")
    fast, _ = run(example, capsys, checkpoint=checkpoint, out=tmp_path / "fast", lane="fp32")
    assert fast.to_dict() == plain.to_dict()
    assert "Lane" in fast.provenance["lane"]


def test_checkpoints_of_both_kinds_hold_the_same_weights(example, capsys, tmp_path):
    found = [
        run(example, capsys, checkpoint=saved(tmp_path / name), out=tmp_path / name[-2:])[0].provenance["model"]
        for name in ("model.pt", "model.safetensors")
    ]
    assert found[0] == found[1]


def test_two_reports_are_compared(example, capsys, tmp_path):
    run(example, capsys, checkpoint=saved(tmp_path / "a.pt"), out=tmp_path / "a")
    _, text = run(
        example, capsys, checkpoint=saved(tmp_path / "b.pt", seed=1), out=tmp_path / "b",
        against=tmp_path / "a" / "report.json",
    )  # fmt: skip
    assert "|  | this, % | the other, % | difference | 95 % interval | p |" in text


def test_a_model_of_ones_own_and_images_in_folders(example, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build(sides=16): return nn.Sequential(nn.Flatten(), nn.Linear(3 * sides**2, 2))\n"
    )
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / "test" / name
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    torch.save({"1.weight": torch.randn(2, 768), "1.bias": torch.zeros(2)}, tmp_path / "model.pt")
    result, _ = run(
        example, capsys, model="mine:build", checkpoint=tmp_path / "model.pt", data="folder", root=tmp_path / "images",
        samples=None, eps="8/255", attacks=("pgd2", "apgd5"), checks=True,
    )  # fmt: skip
    assert len(result) == 6
    assert result.attacks["pgd2"]["call"].startswith("pgd(threat=Linf(eps=8/255), steps=2")


def test_every_attack_it_names_is_one(example):
    threat = example.pat.Linf(0.1)
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    model = DigitsCNN(width=4).eval()
    for name in ("fgsm", "pgd2", "cw2", "apgd3"):
        found = example.attack_of(name, threat, None)(model, x, labels)
        assert getattr(found, "x_adv", found).shape == x.shape
    assert example.attack_of("pgd20", threat, 0.01).keywords["step_size"] == 0.01
    for name in ("aa", "fab", "square"):
        assert example.attack_of(name, threat, None).keywords["verdict"]
    assert "steps" not in example.attack_of("cw", threat, None).keywords  # thirty, as `cw` has them
    for name in ("fgsm2", "nosuch", "pgdx"):
        with pytest.raises(SystemExit, match="knows fgsm, pgd, cw, apgd"):
            example.attack_of(name, threat, None)


def test_a_model_of_robustbench_is_asked_for_by_name_and_norm(example, monkeypatch):
    asked = {}

    def load_model(name, **options):
        asked.update(options, name=name)
        return DigitsCNN(width=4)

    zoo = types.ModuleType("robustbench.utils")
    zoo.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", zoo)
    settings = example.Settings(model="robustbench:Wong2020Fast", norm="l2", root=Path("here"))
    assert isinstance(example.model_of(settings), DigitsCNN)
    assert asked == {"name": "Wong2020Fast", "model_dir": "here", "dataset": "cifar10", "threat_model": "L2"}
    with pytest.raises(SystemExit, match="linf or l2"):
        example.model_of(dataclasses.replace(settings, norm="l1"))


def test_a_package_that_is_missing_and_a_name_without_function_are_said(example, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(ImportError, match="needs the package robustbench"):
        run(example, capsys, model="robustbench:Wong2020Fast")
    with pytest.raises(SystemExit, match="module:function"):
        run(example, capsys, model="DigitsCNN")


def test_it_runs_from_the_command_line(example, capsys, monkeypatch, tmp_path):
    arguments = ["--model", "perceptual_at.models:DigitsCNN(width=4)", "--data", "digits", "--eps", "3/20", "--samples"]
    arguments += ["12", "--attacks", "fgsm", "pgd2", "--cascade", "--device", "cpu", "--out", str(tmp_path / "here")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    report = (tmp_path / "here" / "report.md").read_text()
    assert report.startswith("# perceptual_at.models:DigitsCNN(width=4)\n\ndigits, Linf(eps=0.15)\n")
    assert "12 samples." in report
    assert "In cascade" in report
    assert report in capsys.readouterr().out
