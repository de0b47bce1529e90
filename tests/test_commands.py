"""The command line in this process: runs that become reports and tables, and calls that end in one line."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import typing
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

for needed in ("accelerate", "tyro", "safetensors", "tensorboard"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; the extra `train` brings it")

from perceptual_at import Evaluation, Linf, compare, objectives, pgd  # noqa: E402
from perceptual_at.checkpoints import read_weights, save_weights  # noqa: E402
from perceptual_at.commands import table  # noqa: E402
from perceptual_at.commands.endings import Stopped, locked  # noqa: E402
from perceptual_at.commands.evaluating import targets, wishes  # noqa: E402
from perceptual_at.commands.evaluating.results import report_at  # noqa: E402
from perceptual_at.commands.ingredients import networks  # noqa: E402
from perceptual_at.commands.ingredients.images import images_of  # noqa: E402
from perceptual_at.commands.ingredients.protocol import described, named_attack  # noqa: E402
from perceptual_at.commands.main import COMMANDS, main  # noqa: E402
from perceptual_at.commands.options import trial  # noqa: E402
from perceptual_at.commands.options.effects import calls_an_attack, starts_itself  # noqa: E402
from perceptual_at.commands.options.method import OBJECTIVES, beside, keywords  # noqa: E402
from perceptual_at.commands.options.reading import parse, settings_of  # noqa: E402
from perceptual_at.commands.options.recipes import RECIPES  # noqa: E402
from perceptual_at.commands.options.recipes.rows import DATA, NETWORKS, key_of, settings_of_row  # noqa: E402
from perceptual_at.commands.options.settings import (  # noqa: E402
    GROUP_OF,
    GROUPS,
    Data,
    Optimisation,
    Settings,
    settings_from,
)
from perceptual_at.commands.options.words import amount  # noqa: E402
from perceptual_at.commands.training import report, saving  # noqa: E402
from perceptual_at.models import DigitsCNN, normalized  # noqa: E402
from perceptual_at.objectives.combination import BASES  # noqa: E402
from perceptual_at.published import published  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ["--data", "random", "--width", "2", "--stem-stride", "2", "--batch", "8", "--steps", "1", "--select-steps", "1",
        "--test-steps", "1", "--epochs", "1", "--cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def call(*words):
    """Run a command; gives its exit status."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, *words):
    """The one line that a call ends in."""
    status = call(*words)
    said = capsys.readouterr().err.strip()
    text = said if isinstance(status, int) else str(status)
    assert status != 0, words
    assert text.count("\n") == 0, text
    assert text.startswith("perceptual-at"), text
    assert "Traceback" not in text
    return text


# Settings -----------------------------------------------------------------------------------------------------------


def test_every_option_belongs_to_one_group_and_settings_come_back_from_json():
    assert sum(len(kind.__dataclass_fields__) for kind in GROUPS.values()) == len(GROUP_OF)
    for name, made in RECIPES.items():
        assert settings_from(json.loads(json.dumps(made.settings.flat()))) == made.settings, name
    with pytest.raises(ValueError, match="unknown settings: nosuch"):
        settings_from({"nosuch": 1})


def test_rows_find_their_settings_by_name():
    settings = settings_of(["--row", "RAAT/1/CIFAR-10/linf/ResNet-18/RAAT"])
    flat = settings.flat()
    assert (flat["objective"], flat["model"], flat["data"], flat["select_on"]) == (
        "raat", "resnet26_bottleneck", "cifar10", "test",
    )  # fmt: skip
    tiny = settings_of(["--row", "RPAT/2/Tiny-ImageNet/l2/ResNet-18/TRADES+RPAT", "--seed", "3"]).flat()
    assert (tiny["base"], tiny["norm"], tiny["eps"], tiny["stem_stride"], tiny["seed"]) == (
        "trades", "l2", 128 / 255, 2, 3,
    )  # fmt: skip
    strong = settings_of(["--row", "RPAT/6/CIFAR-10/linf/PreActResNet-18/RPAT++$"]).flat()
    assert (strong["strong_attack_from"], strong["factor"]) == (100, 1.7)
    cut = settings_of(["--row", "RPAT/4/CIFAR-10/linf/WideResNet-34-10/ReBAT*"]).flat()
    assert (cut["cutmix"], cut["beta"], cut["model"]) == (True, 2.0, "wide_resnet34_10")
    assert settings_of(["--row", "RPAT/5/CIFAR-10/linf/ResNet-18/PGD-AT+RPAT[second-to-last]"]).method.perceive


def test_every_row_of_the_result_tables_has_a_recipe():
    for row in published():
        recipe, settings = settings_of_row(row, RECIPES)
        assert settings.threat.norm == row.norm, key_of(row)
        assert recipe in RECIPES
        assert settings.evaluation.select_on == "test"
        flat = settings.flat()
        assert (flat["model"], flat["data"]) == (NETWORKS[row.model], DATA[row.dataset]["data"])
        assert flat["cutmix"] == row.method.endswith("*")
    assert settings_of(["--row=RAAT/1/CIFAR-10/linf/ResNet-18/RAAT"]).method.objective == "raat"
    adr, cure = (
        settings_of(["--row", f"{row}"]).method
        for row in ("RAAT/2/CIFAR-100/linf/ResNet-18/ADR", "RPAT/4/CIFAR-10/linf/WideResNet-34-10/CURE")
    )
    assert keywords(adr)["temperature"] == 1.5
    assert beside(adr) == {"temperature_end": 1.0, "trust_end": 0.95}
    assert (keywords(cure)["weight"], beside(cure)["share"]) == (0.5, 0.5)


def test_recipes_by_the_papers_have_their_networks_and_choices():
    for name, steps in (("rpat_paper", 20), ("raat_paper", 10)):
        settings = RECIPES[name].settings
        assert (settings.network.model, settings.evaluation.select_steps) == ("resnet18", steps)
        assert (settings.optimisation.epochs, settings.optimisation.milestones) == (110, (100, 105))


def test_help_shows_families_groups_and_the_values_that_a_recipe_has(capsys):
    assert call("train", "--help") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert listed.index("bases:") < listed.index("RPAT:") < listed.index("RAAT:")
    assert call("train", "raat_plus_plus", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for group in GROUPS:
        assert f"{group} options" in shown
    assert "(default: 6.0)" in shown
    assert "(default: 0.1)" in shown
    for name in COMMANDS:
        assert call(name, "--help") == 0
    capsys.readouterr()


# Calls that cannot be ------------------------------------------------------------------------------------------------

TRAIN = ["train", "pgd_at", *TINY, "--out", "out"]
ANY = ["train", "pgd_at", "--data", "random", "--batch", "8", "--cpu", "--out", "out"]
MALFORMED = [
    ([], "say which command"),
    (["trian"], "there is no command 'trian'"),
    (["train", "rapt"], "did you mean rpat?"),
    (["train", "--epochs", "3"], "a recipe comes first"),
    (["train", "--row"], "--row needs the name"),
    (["train", "--row", "RAAT/1/CIFAR-10/linf/ResNet-18/RAT"], "did you mean RAAT/1/CIFAR-10/linf/ResNet-18/RAAT?"),
    (["train", "rpat", "--objectiv", "x"], "did you mean --objective?"),
    (["train", "rpat", "extra"], "extra"),
    (["train", "rpat", "--lr"], "--lr"),
    (["train", "rpat", "--lr", "abc"], "abc"),
    (["train", "rpat", "--lr", "-1"], "--lr must be more than 0"),
    (["train", "rpat", "--lr", "nan"], "--lr must be"),
    (["train", "rpat", "--lr", "inf"], "--lr must be"),
    (["train", "rpat", "--factor", "0"], "--factor must be at least 1"),
    (["train", "rpat", "--epochs", "0"], "--epochs must be at least 1"),
    (["train", "rpat", "--batch", "2.5"], "--batch"),
    (["train", "rpat", "--eps", "1/0"], "1/0"),
    (["train", "rpat", "--eps", "0"], "--eps must be more than 0"),
    (["train", "rpat", "--step-size", "2"], "did you mean 2/255?"),
    (["train", "rpat", "--momentum", "1.5"], "--momentum must be at least 0 and at most 1"),
    (["train", "rpat", "--alpha", "1.5"], "--alpha must be"),
    (["train", "rpat", "--alpha", "gamma"], "gamma"),
    (["train", "rpat", "--milestones", "9", "3"], "--milestones must be epochs in order"),
    (["train", "rpat", "--size", "1", "2", "3"], "--size must be one side or height and width"),
    (["train", "rpat", "--extend"], "--extend and --change go with --resume"),
    (["train", "rpat", "--resume", "--change", "learning-rate"], "--change learning_rate: there is no such option"),
    (["train", "rpat", "--resume", "--change", "root"], "--change root has no effect: --root may differ anyway"),
    (["train", "rpat", "--resume", "--change", "lr", "batch"], "cannot go on with another --batch; take another --out"),
    (["train", "rpat", "--resume", "--change", "weight-decay-of"], "cannot go on with another --weight-decay-of"),
    (["train", "rpat", "--nesterov", "--momentum", "0"], "--nesterov needs a --momentum"),
    (["train", "trades", "--eta", "0.2"], "--eta has no effect with --objective trades"),
    (["train", "pgd_at", "--criterion", "kl"], "--criterion has no effect"),
    (["train", "pgd_at", "--perceive", "second_to_last"], "--perceive has no effect"),
    (["train", "pgd_at", "--source", "paper"], "--source paper has no effect"),
    (["train", "pgd_at", "--objective", "rpatt"], "did you mean rpat?"),
    (["train", "rpat", "--base", "tradse"], "did you mean trades?"),
    (["train", "rpat", "--base", "dicar+nope"], "--base knows adr, "),
    (["train", "rpat", "--seed", f"{2**64}"], "--seed must be at least 0 and at most"),
    (["train", "raat", "--boundary-perturbation", "clean"], "go with --objective pgd_at"),
    (["train", "rpat", "--options", "alhpa=1"], "takes no 'alhpa'"),
    (["train", "rpat", "--options", "alpha"], "takes name=value"),
    (["train", "pgd_at", "--objective", "rebat"], "--average-decay is needed by rebat"),
    (["train", "pgd_at", "--average-start", "3"], "no effect without --average-decay"),
    (["train", "pgd_at", "--awp-start", "3"], "no effect without --awp"),
    ([*TRAIN, "--model", "resnet1"], "did you mean"),
    ([*ANY, "--model", "nosuchmodule:f"], "there is no module 'nosuchmodule'"),
    ([*ANY, "--model", "mine:nosuch"], "mine has no 'nosuch'"),
    ([*ANY, "--model", "mine:build(open('x'))"], "with literals"),
    ([*ANY, "--model", "mine:build(1, 2, 3)"], "raised TypeError"),
    ([*ANY, "--model", "mine:text"], "must give a torch.nn.Module, got str"),
    ([*ANY, "--model", "mine:small"], "fails on images of shape (3, 16, 16)"),
    ([*ANY, "--model", "mine:three"], "K of at least 10 classes"),
    ([*ANY, "--model", "mine:pair"], "gives tuple in train mode, not logits"),
    ([*ANY, "--model", "broken:f"], "importing 'broken' failed"),
    ([*ANY, "--model", "script:f"], "importing 'script' ended it (exit status 0); it must only define"),
    ([*ANY, "--model", "mine:leave"], "raised SystemExit: 0"),
    ([*ANY, "--model", "mine:made"], "'made' is no function"),
    ([*ANY, "--model", "mine:fixed"], "--model leaves nothing to train"),
    ([*ANY, "--model", "mine:scripted"], "a scripted `model` runs with its own weights alone"),
    ([*ANY, "--model", "mine:lazy_small"], "fails on images of shape (3, 16, 16)"),
    ([*TRAIN, "--model", "torchvision:resnet18"], "--width is for networks of this package"),
    ([*ANY, "--model", "torchvision:resnet19"], "did you mean resnet18?"),
    ([*TRAIN, "--init", "none.safetensors"], "there is no file `none.safetensors`"),
    ([*TRAIN, "--freeze", "nosuch.*"], "no parameter has such a name"),
    ([*TRAIN, "--freeze", "*"], "leaves nothing to train"),
    ([*TRAIN, "--weight-decay-of", "nosuch=0"], "no parameter has such a name"),
    ([*TRAIN, "--weight-decay-of", "*.weight=-1"], "--weight-decay-of *.weight=-1 must be at least 0"),
    ([*TRAIN, "--weight-decay-of", "*.weight=x"], "--weight-decay-of *.weight: 'x' is no number"),
    ([*TRAIN, "--eps", "10"], "--eps: Linf: `eps`=10.0 exceeds the input range"),
    ([*TRAIN, "--strong-attack-from", "9", "--strong-eps", "10"], "--strong-eps: Linf: `eps`=10.0 exceeds"),
    ([*TRAIN, "--out", "mine.py"], "`mine.py` is no folder, or below a file"),
    ([*TRAIN, "--out", "mine.py/x"], "`mine.py/x` is no folder, or below a file"),
    ([*TRAIN, "--normalize", "own", "--grey"], "--grey has no effect with --data random"),
    ([*TRAIN, "--stream"], "--stream has no effect with --data random"),
    ([*TRAIN, "--held-out", "64"], "holds out 64 of 64"),
    ([*TRAIN, "--extra", "none.npz"], "there is no file `none.npz`"),
    ([*TRAIN, "--track", "nosuchtracker"], "--track nosuchtracker"),
    ([*TRAIN, "--precision", "fp16"], "--precision fp16 needs an accelerator"),
    (["evaluate"], "give either --run FOLDER ... or --model"),
    (["evaluate", "--run", "none"], "there is no folder `none`"),
    (["evaluate", "--run", "."], "holds no result.json"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--attacks", "pgd20x"], "--attacks knows"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--eps", "8"], "--eps: Linf: "),
    (["evaluate", "--model", "mine:build", "--data", "random", "--batch", "0"], "--batch must be at least 1"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--checkpoint", "x.pt"], "there is no file `x.pt`"),
    (["evaluate", "--model", "mine:build", "--data", "folder", "--root", "none"], "there is no folder 'test'"),
    (["evaluate", "--model", "mine:build", "--data", "folder"], "If they are elsewhere, --root says where."),
    (["evaluate", "--model", "mine:build", "--data", "folder", "--stream", "--workers", "-1"], "--workers must be at"),
    (["evaluate", "--model", "mine:build", "--run", "a"], "give either --run FOLDER ... or --model"),
    (["evaluate", "--run", "a", "--checkpoint", "b.pt"], "--checkpoint goes with --model"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--against", "none"], "there is no report `none`"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--step-size", "0"], "--step-size must be above 0"),
    (["evaluate", "--model", "mine:build", "--data", "npz", "--step-size", "2"], "--step-size 2 is more than images"),
    (["evaluate", "--run", "a", "--attacks", "aa", "fgsm", "--step-size", "0.1"], "no effect with --attacks aa fgsm"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--split", "val"], "--split must be train or test"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--root", "x"], "--root has no effect"),
    (["evaluate", "--model", "mine:build", "--data", "random", "--workers", "4"], "--workers has no effect"),
    (
        ["evaluate", "--model", "mine:build", "--data", "random", "--samples", "0"],
        "--samples must be a count of at least 1",
    ),
    (["compare", "a"], "give two reports, got 1"),
    (["compare", "a", "b"], "there is no report `a`"),
    (["table"], "give the folders of finished runs"),
    (["table", "none"], "there is no folder `none`"),
    (["table", "x", "--format", "html"], "html"),
]

MINE = """
import sys, warnings
import torch
from torch import nn
def build(width=2): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
def text(): return "text"
def small(): return nn.Linear(3, 10)
def three(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
class Pair(nn.Module):
    def forward(self, x): return x, x
def pair(): return Pair()
def leave(): sys.exit(0)
made = build()
def fixed(): return build().requires_grad_(False)
def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(build())
def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(10))
def lazy_small(): return nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(10))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), MALFORMED, ids=[" ".join(words)[-60:] for words, _ in MALFORMED])
def test_a_malformed_call_ends_in_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    assert message in refused(capsys, *words)
    left = {path.name for path in tmp_path.iterdir()} - {"mine.py", "broken.py", "script.py", "__pycache__"}
    assert left == set()


@pytest.mark.parametrize(
    ("kind", "words", "path"),
    [
        (Settings, ["--out=~/a"], lambda read: read.running.out),
        (Settings, ["--root", "~/a", "--init=~/b"], lambda read: read.data.root),
        (Settings, ["--extra=~/a"], lambda read: read.data.extra),
        (Settings, ["--teacher", "x", "~/a"], lambda read: read.network.teacher[1]),
        (wishes.Wishes, ["--run", "x", "~/a"], lambda read: read.models.run[1]),
        (wishes.Wishes, ["--checkpoint=~/a"], lambda read: read.models.checkpoint),
        (wishes.Wishes, ["--against=~/a"], lambda read: read.running.against),
        (table.Tabulating, ["--plot=~/a"], lambda read: read.plot),
    ],
)
def test_the_home_folder_is_spelt_out_in_every_path(monkeypatch, tmp_path, kind, words, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert path(parse(words, kind, kind(), "perceptual-at")) == tmp_path / "a"
    nobody = [word.replace("~/a", "~nobody-of-that-name/a") for word in words]
    assert path(parse(nobody, kind, kind(), "perceptual-at")) == Path("~nobody-of-that-name/a")


def test_lazy_layers_have_their_shapes_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    task = networks.Task(3, 10, torch.rand(2, 3, 16, 16))
    first, second = (networks.network(networks.Network(model="mine:lazy"), task, seed=0) for _ in range(2))
    networks.tried(first, task, "mine:lazy")
    assert first.training
    assert first[2].num_batches_tracked == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("words", [("train", "pgd_at", "--out", "out"), ("evaluate", "--model", "resnet18")])
def test_images_that_are_not_there_are_fetched_on_request(capsys, tmp_path, monkeypatch, words):
    datasets = pytest.importorskip("torchvision.datasets")
    asked = []

    def fail(self):
        asked.append(type(self).__name__)
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR100, "download", fail)
    words = (*words, "--data", "cifar100", "--root", tmp_path)
    assert "`--download`" in refused(capsys, *words)
    assert asked == []
    assert "no route to host" in refused(capsys, *words, "--download")
    assert asked == ["CIFAR100"]
    assert "--download has no effect with --data digits" in refused(
        capsys, *words[:-4], "--data", "digits", "--download"
    )


def test_letters_that_the_output_lacks_end_nothing(monkeypatch):
    from perceptual_at.commands import compare

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(compare, "command", lambda words: sys.stdout.write(f"клас ± {words[0]}"))
    monkeypatch.setattr(sys, "argv", ["perceptual-at", "compare", "a"])
    main()
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == "клас ± a".encode("ascii", "backslashreplace")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as where they are closed
    main()
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_repository_around_an_environment_is_not_that_of_the_code(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    place = tmp_path / ".venv" / "report.py"
    place.parent.mkdir()
    place.write_text("")
    (tmp_path / "own.py").write_text("")
    git("init", "--quiet")
    git("add", "own.py")
    git("commit", "--quiet", "--message", "own")
    monkeypatch.setattr(report, "__file__", str(place))
    assert report.commit() is None
    git("add", ".venv")
    git("commit", "--quiet", "--message", "the code")
    assert re.fullmatch("[0-9a-f]{40}", report.commit())
    place.write_text("changed")
    assert report.commit().endswith(" and changes")


@pytest.fixture
def interrupts():
    """Interrupts are heard, also where the tests are a background job of a script, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_signals_end_in_one_line_that_says_how_to_go_on(capsys, monkeypatch):
    from perceptual_at.commands import train

    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        monkeypatch.setattr(train, "train", lambda settings, number=number: os.kill(os.getpid(), number))
        assert call(*TRAIN) == status
        assert "the same command with --resume goes on" in capsys.readouterr().err


def test_a_package_that_is_missing_is_said_and_one_that_fails_is_something_else(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs timm" in refused(capsys, *ANY, "--model", "timm:resnet18")
    monkeypatch.setitem(sys.modules, "tyro", None)
    modules = dict(sys.modules)
    for name in modules:
        package, _, leaf = name.rpartition(".")
        if package.startswith("perceptual_at.commands") and leaf != "main":
            monkeypatch.setattr(modules[package], leaf, modules[name])  # both come back, or they would differ
            monkeypatch.delitem(sys.modules, name)
    assert "`pip install tyro` brings it" in refused(capsys, "train", "rpat")


def test_two_processes_in_one_folder_are_refused(tmp_path):
    out = tmp_path / "out"
    with locked(out, "--out"):
        second = locked(out, "--out")
        with pytest.raises(Stopped, match="another process is at work"), second:
            pass
    with locked(out, "--out"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_lock_does_not_stay_with_the_children_of_who_held_it(tmp_path):
    warnings.filterwarnings("ignore", "This process", DeprecationWarning)  # of forks beside threads
    held, go = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:  # takes the lock, and has a child, as a loader has workers
        with locked(tmp_path, "--out"):
            if os.fork() == 0:
                os.read(go[0], 1)
                os._exit(0)
            os.write(held[1], b"x")
            signal.pause()
    os.read(held[0], 1)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locked(tmp_path, "--out"):
        os.write(go[1], b"x")


# Networks by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("build", ("build", [], {})),
        ("build()", ("build", [], {})),
        ('build("robust")', ("build", ["robust"], {})),
        ("build(-1, 2.5, None, True, wide=False)", ("build", [-1, 2.5, None, True], {"wide": False})),
        ("zoo.make([1, (2, 3)], {'a': b'x'}, 1 + 2j)", ("zoo.make", [[1, (2, 3)], {"a": b"x"}, 1 + 2j], {})),
    ],
)
def test_literals_of_every_kind_are_passed_on(text, expected):
    assert networks.call_of(text) == expected


@pytest.mark.parametrize(
    "text", ["f(x)", "f(**{'a': 1})", "f(open('x'))", "f(", "1", "f() + 1", "f(*[1])", "lambda: 1", ""]
)
def test_what_is_no_call_with_literals_is_refused(text):
    with pytest.raises(ValueError, match="with literals"):
        networks.call_of(text)


def test_first_weights_are_taken_where_they_fit_and_parts_are_frozen(tmp_path, capsys):
    torch.manual_seed(0)
    old, new = DigitsCNN(width=4, num_classes=7), normalized(DigitsCNN(width=4), (0.5,), (0.5,))
    save_weights(tmp_path / "old.safetensors", old)
    line = networks.initialise(new, tmp_path / "old.safetensors")
    assert "tensors taken; left as they were: linear.bias, linear.weight" in line
    kept = dict(new.named_parameters())
    same = [name for name, value in old.named_parameters() if any(torch.equal(own, value) for own in kept.values())]
    assert dict(old.named_parameters()).keys() - set(same) == {"linear.weight", "linear.bias"}
    networks.freeze(new, ("*layer1*", "*.bias"))
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {
        name for name in kept if "layer1" not in name and not name.endswith(".bias")
    }
    chosen = Optimisation(weight_decay=0.1, weight_decay_of=("layer1*=0", "*.weight=0.3"))
    groups = {group["weight_decay"]: len(group["params"]) for group in networks.parameter_groups(DigitsCNN(), chosen)}
    assert set(groups) == {0.0, 0.3, 0.1}
    assert sum(groups.values()) == len(list(DigitsCNN().parameters()))


def test_a_network_of_torchvision_by_name():
    pytest.importorskip("torchvision")
    from perceptual_at.commands.options.settings import Network

    task = networks.Task(3, 4, torch.rand(2, 3, 32, 32))
    model = networks.network(Network(model="torchvision:mobilenet_v3_small(dropout=0.1)"), task, seed=0)
    assert model(task.images).shape == (2, 4)
    again = networks.network(Network(model="torchvision:mobilenet_v3_small(dropout=0.1)"), task, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    networks.tried(model, task, "it")


# From runs to a table -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods with two seeds each, one of them of ReBAT's kind: normalised, averaged."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("runs")
    for recipe, more in (("pgd_at", []), ("rebat", ["--average-start", "0", "--average-decay", "0.5"])):
        for seed in (0, 1):
            AcceleratorState._reset_state(reset_partial_state=True)
            assert call("train", recipe, *TINY, *more, "--seed", seed, "--out", folder / f"{recipe}-{seed}") == 0
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.slow
def test_result_json_holds_effective_values_and_what_columns_mean(runs):
    record = json.loads((runs / "rebat-0/result.json").read_text())
    assert record["settings"]["beta"] == 1.0
    assert record["settings"]["concentration"] == 0.75
    assert "1 steps of 2.5 eps / steps on cross entropy" in record["protocol"]["pgd1"]
    assert record["shape"] == [3, 16, 16]
    assert record["warnings"] == sorted(set(record["warnings"]), key=record["warnings"].index)
    assert record["best"]["per_class"]["0"]["n"] > 0
    assert (runs / "rebat-0/final_model.safetensors").exists()
    groups = record["log"][0]["groups"]
    assert sum(groups.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_a_run_folder_is_enough_and_the_same_call_goes_on(copied, capsys):
    call("evaluate", "--run", copied / "rebat-0", "--attacks", "pgd1", "fgsm", "--batch", "9", "--cpu")
    assert "What the columns mean" in capsys.readouterr().out
    for name in ("best", "final"):
        folder = copied / "rebat-0/evaluation" / name
        result = Evaluation.from_json(folder / "report.json")
        record = json.loads((copied / "rebat-0/result.json").read_text())[name]["test"]
        assert 100 * result.clean_accuracy == pytest.approx(record["clean"], abs=1e-3)
        assert 100 * result.robust_accuracy["pgd1"] == pytest.approx(record["pgd1"], abs=1e-3)  # one meaning of a name
        (record,) = folder.glob("record-*.jsonl")
        lines = record.read_text()
        assert call("evaluate", "--run", copied / "rebat-0", "--attacks", "pgd1", "fgsm", "--cpu") == 0
        assert record.read_text() == lines
        assert Evaluation.from_json(folder / "report.json").to_dict() == result.to_dict()


def test_a_build_for_gpus_evaluates_where_there_is_none(copied, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert call("evaluate", "--run", copied / "pgd_at-0", "--which", "best", "--attacks", "pgd1") == 0


@pytest.mark.slow
def test_other_attacks_are_another_evaluation_and_other_weights_are_noticed(copied, capsys):
    folder = copied / "pgd_at-0/evaluation/best"
    words = ["evaluate", "--run", copied / "pgd_at-0", "--which", "best", "--cpu", "--attacks"]
    for attacks in (["pgd1"], ["pgd1", "fgsm"], ["pgd1"]):
        assert call(*words, *attacks) == 0
        assert list(Evaluation.from_json(folder / "report.json").robust) == attacks
    assert len(list(folder.glob("record-*.jsonl"))) == 2
    assert call("table", copied / "pgd_at-0") == 0
    assert call(*TRAIN[:-2], "--out", copied / "pgd_at-0", "--resume", "--extend", "--epochs", "2") == 0
    capsys.readouterr()
    assert "is of other weights than the run has now" in refused(capsys, "table", copied / "pgd_at-0")
    assert call(*words, "pgd1") == 0
    assert len(list(folder.glob("record-*.jsonl"))) == 3
    assert call("table", copied / "pgd_at-0") == 0


def test_torchrun_takes_no_option_of_ours_for_its_own_behind_two_dashes():
    from torch.distributed.run import get_args_parser

    from perceptual_at.commands.options.settings import option

    kinds = [type(part.default) for part in wishes.Wishes.__dataclass_fields__.values()]
    for name in (*GROUP_OF, *(name for kind in kinds for name in kind.__dataclass_fields__)):
        words = ["--nproc-per-node", "2", "-m", "--", "perceptual_at", "x", option(name), "1"]
        found = get_args_parser().parse_args(words)
        assert (found.training_script, found.training_script_args) == ("perceptual_at", ["x", option(name), "1"])


@pytest.mark.slow
def test_runs_become_a_table_in_every_form(copied, capsys):
    for name in ("pgd_at-0", "pgd_at-1"):
        call("evaluate", "--run", copied / name, "--attacks", "pgd1", "--which", "best", "--cpu")
    capsys.readouterr()
    folders = sorted(copied.iterdir())
    assert call("table", *folders) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "| method | seeds | clean | pgd1 | mean | nrr |"
    assert lines[2].startswith("| pgd_at | 2 | ")
    assert lines[2].count("±") == 4
    assert lines[3].startswith("| rebat | 2 | ")
    assert lines[4].startswith("| rebat - pgd_at |  | ")
    assert "(p " in lines[4]
    assert call("table", *folders, "--format", "csv", "--out", copied / "t.csv", "--plot", copied / "t.png") == 0
    assert capsys.readouterr().out == (copied / "t.csv").read_text()
    assert len({len(row) for row in csv.reader(io.StringIO((copied / "t.csv").read_text()))}) == 1
    assert (copied / "t.png").read_bytes().startswith(b"\x89PNG")
    assert call("table", *folders, "--format", "latex") == 0
    latex = capsys.readouterr().out
    assert r"pgd\_at & 2 & " in latex
    assert r"$\pm$" in latex


@pytest.mark.slow
def test_a_table_says_what_was_not_measured_as_the_run_was(copied, capsys):
    run = copied / "pgd_at-0"
    for words, said in (
        (["--samples", "8"], "8 images (its run: 64 images)"),
        (["--split", "train"], "random, train (its run: random, test)"),
        (["--eps", "4/255"], "Linf(eps=4/255) (its run: Linf(eps=8/255))"),
        ([], None),
    ):
        call("evaluate", "--run", run, "--which", "best", "--attacks", "fgsm", "pgd1", *words, "--cpu")
        capsys.readouterr()
        assert call("table", run) == 0
        shown = capsys.readouterr()
        report = run / "evaluation/best/report.json"
        assert shown.err == ("" if said is None else f"warning: `{report}` is of {said}.\n")
        assert shown.out.startswith("| method |")


@pytest.mark.slow
def test_a_column_of_two_meanings_is_refused(copied, capsys):
    words = ["evaluate", "--which", "best", "--cpu", "--attacks", "pgd1", "--run"]
    assert call(*words, copied / "pgd_at-0", "--step-size", "1/255") == 0
    assert call(*words, copied / "pgd_at-1") == 0
    capsys.readouterr()
    assert "pgd1 has steps of 0.0039" in refused(capsys, "table", copied / "pgd_at-0", copied / "pgd_at-1")


@pytest.mark.slow
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_printed_or_written(copied, capsys):
    for name, attack in (("pgd_at-0", "pgd1"), ("pgd_at-1", "pgd2")):
        assert call("evaluate", "--which", "best", "--cpu", "--run", copied / name, "--attacks", attack) == 0
    capsys.readouterr()
    words = ["table", copied / "pgd_at-0", copied / "pgd_at-1", "--out", copied / "t.csv", "--plot", copied / "t.png"]
    assert call(*words) == 1
    printed, said = capsys.readouterr()
    assert "--plot needs an attack that all runs were evaluated with" in said
    assert not printed
    assert not (copied / "t.csv").exists()


@pytest.mark.slow
def test_what_a_run_goes_on_with_counts_and_what_its_state_lacks_is_refused(copied, capsys):
    words = [*TRAIN[:-2], "--resume", "--extend", "--epochs", "2", "--out"]
    ends = []
    for place, more in enumerate([[], ["--weight-decay", "0.5"], ["--momentum", "0"]]):
        out = shutil.copytree(copied / "pgd_at-0", copied / f"again-{place}")
        changed = ["--change", more[0].lstrip("-"), *more] if more else []
        assert call(*words, out, *changed) == 0
        ends.append(read_weights(out / "final.safetensors")["linear.weight"])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    capsys.readouterr()
    averaged = ["--change", "average-decay", "--average-decay", "0.5"]
    text = refused(capsys, *words, copied / "pgd_at-0", *averaged)
    assert "holds no averaged weights, which the run would need" in text
    remembering = ["--change", "objective", "--objective", "te"]
    assert "holds no ensemble" in refused(capsys, *words, copied / "pgd_at-0", *remembering)


@pytest.mark.parametrize(
    ("words", "epochs", "message"),
    [
        (["--change", "epochs", "--epochs", "3"], 4, "has done 4 epochs already, and --epochs is 3"),
        (["--extend", "--epochs", "6"], 4, "--extend is for more epochs than the run's 9, and --epochs is 6"),
        (["--change", "epochs", "--epochs", "6"], 4, ""),
        (["--extend", "--epochs", "9"], 9, ""),
    ],
)
def test_a_run_is_extended_to_more_epochs_and_never_ends_before_where_it_is(words, epochs, message):
    saved = settings_of(["pgd_at", "--epochs", "9"]).fixed()
    settings = settings_of(["pgd_at", "--resume", *words])
    if message:
        with pytest.raises(Stopped, match=message):
            saving.changed(settings, saved, epochs)
    else:
        saving.changed(settings, saved, epochs)


def test_patterns_of_one_weight_decay_stay_groups_of_their_own():
    patterns = ("layer1*=0", "*.weight=0.3")
    for decay in (0.0, 0.3, 0.1):  # so that a state fits whatever the decays are
        chosen = Optimisation(weight_decay=decay, weight_decay_of=patterns)
        assert len(networks.parameter_groups(DigitsCNN(), chosen)) == 3


def scored(name, seed, scores, **more):
    settings = {**settings_of(["pgd_at"]).flat(), "seed": seed}
    return table.Scored(Path(name), settings, {"clean": 80.0, **scores}, **more)


def test_the_summary_of_a_table_is_of_one_attack_that_all_runs_have():
    runs = table.summarised([scored("a", 0, {"pgd20": 50.0, "aa": 40.0}), scored("b", 1, {"pgd20": 52.0})])
    assert [run.scores["mean"] for run in runs] == [65.0, 66.0]
    runs = table.summarised([scored("a", 0, {"pgd20": 50.0, "aa": 40.0}), scored("b", 1, {"aa": 42.0})])
    assert [run.scores["mean"] for run in runs] == [60.0, 61.0]
    assert "nrr" not in table.summarised([scored("a", 0, {"pgd20": 50.0}), scored("b", 1, {"aa": 42.0})])[0].scores


@pytest.mark.parametrize("other", [(8, None), (16, "sha256:2")])
def test_runs_that_were_measured_on_other_images_are_not_put_into_one_table(other):
    first = scored("a", 0, {"pgd20": 50.0}, images=(16, "sha256:1"))
    table.one_meaning([first, scored("b", 1, {"pgd20": 50.0}, images=(16, None))])
    with pytest.raises(ValueError, match="`a` was measured on 16 images and `b` on"):
        table.one_meaning([first, scored("b", 1, {"pgd20": 50.0}, images=other)])


def finished(folder, **changes):
    """The record of a run, as far as a table reads it."""
    test = {"n": 16, "clean": 80.0, "pgd20": 50.0}
    record = {"settings": settings_of(["pgd_at"]).flat(), "shape": [3, 32, 32], "classes": 10,
              "best": {"test": test}, "final": {"test": test}}  # fmt: skip
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(record | changes))
    return record


def test_records_of_other_versions_are_read_and_damaged_ones_named(tmp_path, capsys):
    settings = finished(tmp_path / "whole")["settings"]
    finished(tmp_path / "older", settings={name: settings[name] for name in settings if name != "smoothing_over"})
    finished(tmp_path / "again", settings=settings | {"seed": 1})
    finished(tmp_path / "newer", settings=settings | {"seed": 2, "tomorrow": True})
    assert call("table", *(tmp_path / name for name in ("older", "again", "newer"))) == 0
    printed = capsys.readouterr().out
    assert "| pgd_at (tomorrow None) | 2 |" in printed  # an option that is left out has its default
    assert "| pgd_at (tomorrow True) | 1 |" in printed
    finished(tmp_path / "wrong", settings=settings | {"norm": "l7"})
    assert "result.json`: the setting 'norm' cannot be 'l7'" in refused(capsys, "table", tmp_path / "wrong")
    for place, test in enumerate([{}, {"n": 16}, {"n": 16, "clean": float("nan")}, {"n": 16, "clean": "80"}]):
        finished(tmp_path / f"{place}", best={"test": test})
        assert "is damaged in best" in refused(capsys, "table", tmp_path / f"{place}")
    text = refused(capsys, "table", tmp_path / "whole", "--out", tmp_path, "--plot", tmp_path / "t.png")
    assert "--out must be a file of its own" in text
    assert not (tmp_path / "t.png").exists()
    text = refused(capsys, "evaluate", "--run", tmp_path / "whole")
    assert "there is no file" in text
    assert "best.safetensors`; `perceptual-at train ... --resume` writes it again" in text


def test_a_flag_that_can_only_say_what_is_so_anyway_is_unknown(capsys):
    assert "--no-grey" in refused(capsys, "evaluate", "--run", "x", "--no-grey")
    assert not settings_of(["pgd_at", "--no-flip"]).data.flip


def test_an_interrupt_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    from perceptual_at.commands import main as entry

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.importlib, "import_module", interrupted)
    assert call("table") == 130
    assert capsys.readouterr().err == "perceptual-at table: interrupted.\n"


def table_of(*runs):
    settings = settings_of(["pgd_at"]).flat()
    found = [
        table.Scored(Path(name), {**settings, "seed": seed}, {"clean": 80.0, "pgd20": 50.0}, threats={"pgd20": threat})
        for name, seed, threat in runs
    ]
    table.one_meaning(found)
    return table.grouped(found)


def test_runs_of_one_seed_or_under_other_budgets_are_no_seeds_of_one_method():
    own, other = "Linf(eps=8/255)", "Linf(eps=4/255)"
    (group,) = table_of(("a", 0, own), ("b", 1, own))
    assert len(group.runs) == 2
    with pytest.raises(ValueError, match="`a` and `b` are of one method and one seed"):
        table_of(("a", 0, own), ("b", 0, own))
    with pytest.raises(ValueError, match=r"pgd20 is under Linf\(eps=8/255\) in `a` and under Linf\(eps=4/255\) in `b`"):
        table_of(("a", 0, own), ("b", 1, other))


@pytest.mark.parametrize(("name", "value"), [("extra", "some/1m.npz"), ("init", "w.safetensors"), ("teacher", ["t"])])
def test_runs_with_files_that_others_have_not_are_another_method(name, value):
    plain, given = settings_of(["pgd_at"]).flat(), settings_of(["pgd_at"]).flat() | {name: value}

    def runs(*chosen):
        scores = {"clean": 80.0, "pgd20": 50.0}
        return [table.Scored(Path(str(seed)), one | {"seed": seed}, scores) for seed, one in chosen]

    first, second = table.grouped(runs((0, plain), (0, given), (1, plain), (1, given)))
    assert [len(group.runs) for group in (first, second)] == [2, 2]
    shown = "1m.npz" if name == "extra" else "given"
    assert (first.name, second.name) == (f"pgd_at ({name} None)", f"pgd_at ({name} {shown})")
    elsewhere = {"extra": "/other/1m.npz", "init": "w1.safetensors", "teacher": ["t1"]}[name]
    (group,) = table.grouped(runs((0, given), (1, given | {name: elsewhere})))
    assert len(group.runs) == 2


def test_runs_with_other_generated_images_are_another_method():
    settings = settings_of(["pgd_at"]).flat()
    runs = [
        table.Scored(Path(name), settings | {"extra": name, "seed": seed}, {"clean": 80.0})
        for seed, name in enumerate(("1m.npz", "50m.npz"))
    ]
    assert [group.name for group in table.grouped(runs)] == ["pgd_at (extra 1m.npz)", "pgd_at (extra 50m.npz)"]


def test_a_budget_of_zero_is_one():
    words = {"models": wishes.Models(model="mine:build"), "images": wishes.Samples(data="random")}
    for eps, expected in ((0.0, 0.0), (None, 8 / 255), (0.1, 0.1)):
        (target,) = targets.targets_of(wishes.Wishes(**words, threat=wishes.Threats(eps=eps)))
        assert target.threat.eps == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_leaves_early_is_no_traceback(copied):
    words = [sys.executable, "-m", "perceptual_at", "table", str(copied / "pgd_at-0")]
    table = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    table.stdout.close()
    said = table.stderr.read()
    table.stderr.close()
    assert table.wait() == 141
    assert said == "perceptual-at table: nobody reads what it prints.\n"


def test_printed_rows_stand_beside_the_methods_they_are_of():
    settings = settings_of(["--row", "RAAT/1/CIFAR-10/linf/ResNet-18/RAAT"]).flat()
    run = table.Scored(Path("x"), settings, {"clean": 80.0, "aa": 50.0, "mean": 65.0, "nrr": 61.54})
    (group,) = table.grouped([run])
    assert {row.method for row in group.rows} == {"RAAT"}
    text = table.table_text(table.cells([group], printed=True), "markdown")
    (row,) = published(paper="RAAT", table=1, dataset="CIFAR-10", model="ResNet-18", method="RAAT")
    assert f"printed: RAAT Table 1, RAAT |  | {row.printed['clean']} ± {row.printed_std['clean']}" in text
    for more in ("extra", "init"):
        (group,) = table.grouped([dataclasses.replace(run, settings={**settings, more: "some"})])
        assert not group.rows


def test_images_that_the_network_of_a_run_cannot_take_are_refused(copied, capsys):
    text = refused(capsys, "evaluate", "--run", copied / "pgd_at-0", "--data", "digits", "--attacks", "pgd1", "--cpu")
    assert "was trained on images of shape (3, 16, 16) and takes none of shape (1, 8, 8)" in text


@pytest.mark.parametrize(
    ("trained", "given", "said"),
    [
        (["cat", "dog"], ["dog", "zebra"], "'dog' for 'cat', 'zebra' for 'dog'. Do labels"),
        (["cat", "dog"], ["cat", "dog", "eel"], "'eel' for None. Do labels"),
        (list("abcd"), list("efgh"), "'e' for 'a', 'f' for 'b', 'g' for 'c', .... Do labels"),
        (["cat", "dog"], ["cat", "dog"], None),
        (["0", "1"], ["cat", "dog"], None),  # of images without names
        (["cat", "dog"], None, None),
        (["cat"], ["cat", "dog"], None),  # of which one was not tested
    ],
)
def test_classes_of_other_names_than_those_of_a_run_are_said(tmp_path, trained, given, said):
    record = {"classes": max(len(trained), 2), "best": {"per_class": {name: {} for name in trained}}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        targets._warn_of_other_classes(types.SimpleNamespace(classes=given), tmp_path, record)
    assert [said in str(warning.message) for warning in caught] == ([] if said is None else [True])


@pytest.mark.parametrize(
    ("model", "random"),
    [
        ("resnet18", True),
        ("torchvision:mobilenet_v3_small", True),
        ("torchvision:mobilenet_v3_small(dropout=0.1)", True),
        ("torchvision:mobilenet_v3_small(weights=None)", False),  # somebody thought of them
        ("torch.nn:Flatten", False),  # may have loaded its own
    ],
)
def test_random_weights_are_said(model, random):
    if model.startswith("torchvision"):
        pytest.importorskip("torchvision")
    chosen = Data(data="random")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        targets._maker(wishes.Wishes(models=wishes.Models(model=model)), chosen)(images_of(chosen, "test"))
    assert [str(one.message) for one in caught] == (
        [f"--model {model} without --checkpoint has random weights."] if random else []
    )


def test_a_run_finds_its_images_from_another_working_folder(tmp_path, monkeypatch, capsys):
    pillow = pytest.importorskip("PIL.Image")
    for place, colour in (("here", 255), ("there", 0)):
        for part in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / place / "data" / part).mkdir(parents=True)
            for number in range(8):
                pillow.new("L", (8, 8), colour).save(tmp_path / place / "data" / part / f"{number}.png")
    monkeypatch.chdir(tmp_path / "here")
    words = [
        "--model", "digits_cnn", "--grey", "--batch", "8", "--steps", "1", "--select-steps", "1", "--test-steps", "1",
    ]  # fmt: skip
    assert call("train", "pgd_at", "--data", "folder", *words, "--epochs", "1", "--cpu", "--out", "run") == 0
    words = ["evaluate", "--run", tmp_path / "here/run", "--which", "best", "--attacks", "fgsm", "--cpu"]

    def seen():
        assert call(*words) == 0
        return report_at(tmp_path / "here/run/evaluation/best").provenance["data"]

    known = seen()
    monkeypatch.chdir(tmp_path / "there")
    assert seen() == known  # not those of that name here
    (tmp_path / "here/data").rename(tmp_path / "here/moved")
    assert seen() != known  # a project that was moved as a whole has them below the working folder
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert "there is no folder 'test' in `data`" in (text := refused(capsys, *words))
    assert "If they are elsewhere, --root says where." in text
    words += ["--root", tmp_path / "here/moved"]
    assert seen() == known


def test_two_reports_are_compared(copied, capsys):
    for name in ("pgd_at-0", "rebat-0"):
        call("evaluate", "--run", copied / name, "--attacks", "pgd1", "--which", "best", "--cpu")
    capsys.readouterr()
    reports = [copied / name / "evaluation/best" for name in ("pgd_at-0", "rebat-0")]
    assert call("compare", *reports, "--names", "a", "b") == 0
    assert "|  | a, % | b, % | difference | 95 % interval | p |" in capsys.readouterr().out


def test_a_report_is_compared_with_the_one_that_it_takes_the_place_of(copied, capsys):
    def evaluated(name, *more):
        words = ["--attacks", "pgd1", "--which", "best", "--cpu", "--out", copied / "shared"]
        assert call("evaluate", "--run", copied / name, *words, *more) == 0
        return Evaluation.from_json(copied / "shared/best/report.json")

    first = evaluated("pgd_at-0")
    second = evaluated("rebat-0", "--against", copied / "shared/best")
    capsys.readouterr()
    assert compare(second, first)["clean"] != compare(second, second)["clean"]
    expected = compare(second, first, names=("this", "the other")).to_markdown()
    assert expected in (copied / "shared/best/report.md").read_text(encoding="utf-8")


def test_an_attack_that_was_called_in_two_ways_is_said_beside_the_comparison(tmp_path, capsys):
    right = torch.tensor([True, False])
    for name, eps in (("a", 8), ("b", 8), ("c", 4)):
        call_of = {"attack 'pgd20'": f"pgd(threat=Linf(eps={eps}/255))"}
        Evaluation(right, {"pgd20": right}, provenance=call_of).to_json(tmp_path / f"{name}.json")
    assert call("compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    assert not capsys.readouterr().err
    assert call("compare", tmp_path / "a.json", tmp_path / "c.json") == 0
    printed, said = capsys.readouterr()
    assert "| pgd20 |" in printed
    assert said.startswith("warning: compare: 'pgd20' is not the same attack in both evaluations: pgd(threat=Linf(")


UNKNOWN = json.dumps({"settings": {"nosuch": 1}, "shape": [3, 1, 1], "classes": 2, "best": 0, "final": 0})


@pytest.mark.parametrize("damage", ["{", "[]", '{"settings": {}}', "", UNKNOWN])
def test_a_damaged_result_is_named(copied, capsys, damage):
    (copied / "pgd_at-0/result.json").write_text(damage)
    text = refused(capsys, "evaluate", "--run", copied / "pgd_at-0", "--cpu")
    assert "result.json" in text or "unknown settings" in text


def test_a_choice_of_samples_has_every_class(tmp_path):
    words = wishes.Wishes(images=wishes.Samples(data="random", samples=20))
    images = images_of(Data(data="random"), "test")
    rows = targets.chosen_rows(images, words)
    assert len(rows) == 20
    counts = torch.bincount(images.labels[rows], minlength=10) - torch.bincount(images.labels, minlength=10) * 20 / 64
    assert counts.abs().max() < 1


def test_models_by_name_are_evaluated_with_checkpoints_of_both_kinds(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    torch.manual_seed(0)
    weights = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "a.pt")
    save_weights(tmp_path / "a.safetensors", weights)
    found = []
    for checkpoint in ("a.pt", "a.safetensors"):
        words = ["--model", "mine:build(width=3)", "--checkpoint", checkpoint, "--data", "random", "--attacks", "pgd2"]
        assert call("evaluate", *words, "--out", checkpoint[-2:], "--cpu") == 0
        found.append(Evaluation.from_json(tmp_path / checkpoint[-2:] / "report.json").to_dict())
    assert found[0] == found[1]
    capsys.readouterr()


def test_a_checkpoint_of_a_network_fits_normalisation_around_it_and_no_part_of_it(tmp_path):
    trained, network = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(2))
    save_weights(tmp_path / "whole", trained)
    save_weights(tmp_path / "part", trained[1])
    networks.load(normalized(network, (0.5,), (0.25,)), tmp_path / "whole")
    assert torch.equal(network[1].weight, trained[1].weight)
    assert torch.equal(network[2].bias, trained[2].bias)
    with pytest.raises(ValueError, match=r"load_weights: .* does not belong|no name in"):
        networks.load(normalized(network, (0.5,), (0.25,)), tmp_path / "part")


def test_a_model_of_robustbench_is_asked_for_by_name_and_norm(monkeypatch):
    asked = {}

    def load_model(name, **options):
        asked.update(options, name=name)
        return DigitsCNN(width=4)

    zoo = types.ModuleType("robustbench.utils")
    zoo.load_model = load_model
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.utils", zoo)
    words = wishes.Wishes(
        models=wishes.Models(model="robustbench:Wong2020Fast"), images=wishes.Samples(root=Path("here")),
        threat=wishes.Threats(norm="l2"),
    )  # fmt: skip
    (target,) = targets.targets_of(words)
    assert isinstance(target.made(None), DigitsCNN)
    assert asked == {"name": "Wong2020Fast", "model_dir": "here", "dataset": "cifar10", "threat_model": "L2"}


def test_every_attack_that_is_named_is_one_and_has_a_meaning():
    threat = Linf(0.1)
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    model = DigitsCNN(width=4).eval()
    for name in ("fgsm", "pgd2", "cw2", "apgd3"):
        found = named_attack(name, threat)(model, x, labels)
        assert getattr(found, "x_adv", found).shape == x.shape
        assert described(name, threat)
    assert named_attack("pgd20", threat, step_size=0.01).keywords["step_size"] == 0.01
    assert "20 steps of 2.5 eps / steps on cross entropy, one random start" in described("pgd20", threat)
    assert "the margin" in described("cw20", threat)
    assert described("apgd3", threat) == "apgd as the library has it by default, but with 3 steps"
    for name in ("fgsm2", "nosuch", "pgdx", "pgd0", "pgd020", ""):
        with pytest.raises(ValueError, match="knows fgsm, pgd, cw, apgd"):
            named_attack(name, threat)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pgd_at", "--strong-steps", "7"], "--strong-steps has no effect without --strong-attack-from"),
        (["pgd_at", "--peak-at", "0.3"], "--peak-at has no effect with --schedule steps"),
        (["pgd_at", "--schedule", "cosine", "--factor", "3"], "--factor has no effect with --schedule cosine"),
        (["pgd_at", "--augment", "none", "--padding", "2"], "--padding has no effect where images are not shifted"),
        (["pgd_at", "--data", "tars", "--padding", "2"], "with --augment resized_crop"),
        (["pgd_at", "--augment", "none", "--no-flip"], "--flip has no effect with --augment none"),
        (["pgd_at", "--smoothing-over", "all"], "--smoothing-over has no effect without --smoothing"),
        (["rpat", "--concentration", "0.3"], "--concentration has no effect with --objective rpat"),
        (["n_fgsm", "--step-size", "0.1"], "--step-size has no effect with --attack n_fgsm"),
        (["free_at", "--lane", "fp32"], "--lane has no effect with --attack free"),
        (
            ["pgd_at", "--objective", "standard", "--eps-ramp", "3"],
            "--eps-ramp has no effect with --objective standard",
        ),
        (["pgd_at", "--objective", "standard", "--steps", "3"], "--steps has no effect .* which attacks nothing"),
        (["clp_images", "--steps", "10"], "--steps has no effect with --objective clp, which attacks nothing"),
        (["trades", "--start", "random"], "--start has no effect with --objective trades, .* PGD-AT use it"),
        (["rpat", "--base", "mart", "--start", "clean"], "--start has no effect with --objective rpat --base mart"),
        (["n_fgsm", "--start", "clean"], "--start has no effect with --attack n_fgsm"),
        (["free_at", "--steps", "3"], "--steps has no effect with --attack free"),
        (["mma", "--step-size", "0.1"], "--step-size has no effect with --objective mma"),
        (
            ["rpat", "--data", "digits", "--root", "here"],
            "--root has no effect with --data digits, which reads no files",
        ),
        (["rpat", "--data", "npz", "--workers", "4"], "--workers has no effect with --data npz, .* it is for streamed"),
        (["rpat", "--data=folder", "--workers=2"], "--workers has no effect with --data folder"),
        (["rpat", "--select-on", "test", "--held-out", "9"], "--held-out has no effect with --select-on test"),
        (["pgd_at", "--extra-share", "0.5"], "--extra-share has no effect without --extra"),
        (["pgd_at", "--padding", "0", "--padding-mode", "reflect"], "--padding-mode has no effect with --padding 0"),
        (["ikl", "--alpha", "0.3"], "--alpha has no effect beside --options alpha=4.0; give it there"),
    ],
)
def test_options_without_effect_beside_others_are_refused(words, message):
    from perceptual_at.commands.options.reading import settings_of

    with pytest.raises(ValueError, match=message):
        settings_of(words)


@pytest.mark.parametrize(
    "words",
    [
        ["rebat", "--augment", "none"],  # reflects at the edge by itself
        ["grad_align", "--schedule", "cosine"],  # says where its own schedule peaks
        ["rpat", "--alpha", "beta", "--concentration", "0.3"],
        ["raat", "--concentration", "0.3"],
        ["pgd_at", "--data", "tars", "--augment", "shift", "--padding", "2"],
        [
            "rpat",
            "--start",
            "clean",
            "--steps",
            "3",
            "--data",
            "folder",
            "--root",
            "here",
            "--stream",
            "--workers",
            "4",
        ],
        ["rpat", "--base", "te", "--start", "clean"],
    ],
)
def test_what_a_recipe_brings_is_not_the_callers(words):
    from perceptual_at.commands.options.reading import settings_of

    assert settings_of(words)


NEEDED = {
    "ducat": {"dummies": True}, "hypersphere": {"cosines": 10.0}, "mma": {"options": ("largest=0.1",)},
    "clp": {"options": ("pairs=attacked",)},
}  # fmt: skip
BASES_OF = {"rpat": BASES, "dicar": BASES} | {
    name: typing.get_args(typing.get_type_hints(getattr(objectives, name))["base"])
    for name in ("adr", "ducat", "hat", "hypersphere", "mail", "score", "te")
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_known_of_attacks_is_so(objective, monkeypatch):
    given = []

    def noted(*inputs, **options):
        given.append(options)
        return pgd(*inputs, **options)

    monkeypatch.setitem(trial.ATTACKS, "pgd", noted)
    for base in (None, *BASES_OF.get(objective, ())):
        chosen = Settings().changed(objective=objective, base=base, **(NEEDED.get(base) or NEEDED.get(objective, {})))
        given.clear()
        try:
            trial.refuse_values(chosen)
        except ValueError:
            assert objective in ("rpat", "dicar")  # cannot have this base
            assert base in ("rpat", "rpat_raat", "dicar", "raat", "raat_plus_plus", "raat_sharp", "te")
            continue
        assert calls_an_attack(chosen.method) == bool(given), base
        assert starts_itself(chosen.method) == any("start" in options for options in given), base


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trades", "--later", "50:beta=-3"], r"--later 50:beta=-3: trades: `beta` must lie in"),
        (["trades", "--later", "50:beta=abc"], r"--later 50:beta=abc: trades: `beta` must be a number"),
        (["trades", "--later", "50:betta=3"], r"--later 50:betta=3: trades takes no 'betta' .did you mean beta"),
        (["trades", "--later", "50:beta="], "--later takes epoch:name=value, got '50:beta='"),
        (["trades", "--later", "5:beta=1", "05:beta=2"], "--later gives 'beta' twice at epoch 05"),
        (["trades", "--options", "beta=1", "beta=2"], "--options gives 'beta' twice"),
        (["mail", "--later", "50:weighted=maybe"], "--later 50:weighted=maybe: mail: `weighted` must be True or False"),
        (["raat", "--later", "50:space=nowhere"], "--later 50:space=nowhere: raat: `space` must be one of"),
        (["rpat", "--base", "trades", "--later", "9:noise=-1"], "--later 9:noise=-1: trades: `noise` must lie in"),
        (["ducat", "--later", "7:dummies=1"], "--later 7:dummies=1: ducat: `dummies` must be True or False"),
        (["raat", "--later", "50:mix=0.5"], "--later 50:mix=0.5 has no effect: the run supplies 'mix'"),
        (["rebat", "--options", "teacher_mode=eval"], "has no effect: the run supplies 'teacher_mode'"),
        (["hypersphere", "--options", "scale=3"], "--options scale=3 has no effect: --cosines says it"),
        (["rpat", "--later", "50:base=trades"], "--later 50:base=trades has no effect: --base says it"),
        (["rpat", "--alpha", "beta", "--later", "9:alpha=1"], "--later 9:alpha=1 has no effect: --alpha beta says it"),
        (["te", "--later", "50:start=3"], "'start' is the same in all epochs; give it in --options"),
        (["te", "--options", "start=1.5"], "--options start=1.5 must be a whole number of at least 0"),
        (["cure", "--options", "decay=2"], "--options decay=2 must be a number from 0 to 1"),
        (["hat", "--cutmix"], "--cutmix: hat: `labels` must be class indices"),
        (["trades", "--attack", "n_fgsm", "--steps", "1"], "--attack n_fgsm: trades: `attack` cannot be called as"),
        (["rpat", "--temperature", "2"], "--temperature: rpat: `temperature`=2.0 has no effect with `criterion`='mse'"),
        (["rpat", "--base", "dicar+raat"], "--base dicar.raat: raat has DICAR's term already"),
    ],
)
def test_values_that_an_objective_does_not_take_are_refused_before_anything_is_trained(words, message):
    with pytest.raises(ValueError, match=message):
        settings_of(words)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("12", 12), ("1.0", 1.0), ("0.5", 0.5), ("1/4", 0.25), ("+3", 3)]
)
def test_one_is_a_count_and_one_point_zero_a_share(text, value):
    read = amount(text)
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("text", ["2.7", "0", "0.0", "-3", "3/2", "many"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match=r"number|share"):
        wishes.check(wishes.Wishes(wishes.Models(model="x"), wishes.Samples(samples=amount(text))))


def test_a_share_of_all_samples_is_all_and_one_is_one():
    images = images_of(Data(data="random"), "test")
    for text, count in (("1.0", 64), ("1", 1), ("64", 64), ("99", 64)):
        chosen = wishes.Wishes(images=wishes.Samples(data="random", samples=amount(text)))
        assert len(targets.chosen_rows(images, chosen)) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": wishes.Models(model="x", which="best")}, "--which has no effect with --model"),
        ({"models": wishes.Models(model="x", checkpoint=Path("y.pt"))}, "--checkpoint: there is no file `y.pt`"),
        ({"evaluation": wishes.Measures(attacks=("pgd2", "cw2", "pgd2"))}, "--attacks names pgd2 twice"),
    ],
)
def test_wishes_are_looked_at_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        wishes.check(wishes.Wishes(**{"models": wishes.Models(model="x"), **changes}))


def test_a_stronger_attack_is_no_weaker_one():
    with pytest.raises(ValueError, match=r"--strong-eps .* is less than --eps"):
        settings_of(["rpat", "--strong-attack-from", "9", "--eps", "16/255"])


def test_results_are_not_written_over(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.json").write_text("{}")
    for words in ([], ["--resume"]):
        text = refused(capsys, "train", "hat", "--data", "random", "--out", "out", *words)
        assert "`out` holds the result of a run, but no state to go on from" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_a_base_keeps_the_preset_of_its_own_where_names_are_shared():
    chosen = keywords(settings_of(["rpat", "--base", "raat", "--source", "paper"]).method)
    assert chosen["form"] == "quotient"
    assert "temperature" not in chosen
    assert chosen["base"].func is objectives.raat
    assert chosen["base"].keywords == {"temperature": 1.0}
    kd = keywords(settings_of(["rpat", "--base", "kd", "--averaging", "swa", "--source", "paper"]).method)["base"]
    assert kd.keywords == {"form": "kl"}


@pytest.mark.parametrize("recipe", ["pgd_at", "raat"])
def test_images_are_shown_as_they_are_on_request(recipe):
    from perceptual_at.commands.options.reading import settings_of
    from perceptual_at.commands.training.steps import Sources, views_of

    x, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    sources = Sources(torch.Generator().manual_seed(0), torch.Generator().manual_seed(0), 4)
    views, _ = views_of(settings_of([recipe, "--augment", "none"]), sources, x, labels)
    assert len(views) == (2 if recipe == "raat" else 1)
    assert all(torch.equal(view, x) for view in views)
    moved, _ = views_of(settings_of([recipe]), sources, x, labels)
    assert not torch.equal(moved[0], x)


def test_a_network_is_normalised_by_images_from_all_over_the_training_set():
    from perceptual_at.commands.ingredients import networks
    from perceptual_at.commands.options.settings import Network
    from perceptual_at.commands.training.splits import Splits
    from perceptual_at.data import TensorImages

    pixels = torch.linspace(0, 1, 1000)[:, None, None, None].expand(-1, 1, 8, 8).clone()
    pixels[[0, -1]] = 0.0  # which alone would have no spread
    images = TensorImages(pixels, torch.arange(1000) % 10)
    parts = Splits(images, images, images, 10, (1, 8, 8))
    task = networks.Task(1, 10, parts.sample())
    made = networks.network(Network(model="digits_cnn", width=2, normalize="own"), task, seed=0)
    assert made.normalize.mean.item() == pytest.approx(0.5, abs=0.02)
    assert made.normalize.std.item() == pytest.approx(12**-0.5, abs=0.02)
    networks.tried(made, task, "digits_cnn")
