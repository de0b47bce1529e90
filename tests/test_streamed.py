"""Runs on images that stay on the disk: killed anywhere they end the same, and they hold no more for more images."""

import contextlib
import io
import os
import random
import signal
import tarfile
import time

import numpy as np
import pytest
import torch

for needed in ("accelerate", "tyro", "safetensors", "tensorboard", "PIL", "torchvision"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; the extras `vision` and `train` bring it")

from PIL import Image  # noqa: E402

from perceptual_at.commands.ingredients import images  # noqa: E402
from perceptual_at.commands.options.reading import settings_of  # noqa: E402
from perceptual_at.commands.options.settings import Data  # noqa: E402
from perceptual_at.commands.training import batches, splits  # noqa: E402

from .runs import assert_same, newest, remains, started  # noqa: E402

runner = pytest.fixture(started, scope="module")

KILLS = int(os.environ.get("KILLS", "4"))
"""How often the run of the longest test is killed; the numbers on the pages are from 15."""
SMALL = ["--model", "resnet18", "--width", "2", "--batch", "8", "--steps", "1", "--select-steps", "1", "--test-steps",
         "1", "--size", "12", "--cpu"]  # fmt: skip


def encoded(seed, side=(14, 16)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(root, train=24, test=4):
    for split, count in (("train", train), ("test", test)):
        for label, kind in enumerate(("ant", "bee")):
            (root / split / kind).mkdir(parents=True)
            for number in range(count):
                (root / split / kind / f"{number}.png").write_bytes(encoded(2 * number + label))
    return root


def archives(root, train=24, test=4):
    root.mkdir()
    for split, count in (("train", train), ("test", test)):
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as archive:
                for number in range(count):
                    for suffix, content in (("png", encoded(number)), ("cls", b"%d" % (number % 2))):
                        entry = tarfile.TarInfo(f"{number:03d}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("images") / "images")


def drawn(out):
    """What TensorBoard shows of a run: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_streamed_by_two_with_awp_and_averages_killed_anywhere_it_ends_the_same(runner, folders, tmp_path):
    words = ["raat", *SMALL, "--data", "folder", "--root", folders, "--stream", "--workers", "1", "--awp", "0.01",
             "--average-decay", "0.5", "--average-start", "1", "--epochs", "3", "--milestones", "1", "2",
             "--save-every", "1"]  # fmt: skip
    runner.run([*words, "--out", tmp_path / "whole"], processes=2)
    draw, out, killed = random.Random(1), tmp_path / "out", 0
    for _ in range(KILLS):
        pids = runner.start([*words, "--out", out, "--resume"], processes=2)
        until = newest(out) + draw.choice([0, 1, 1, 2])
        while newest(out) < until and not runner.ended():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.5))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed += runner.statuses() == [signal.SIGKILL] * 2
    assert killed >= KILLS / 2
    runner.run([*words, "--out", out, "--resume"], processes=2)
    assert_same(out, tmp_path / "whole")
    other = [sorted(run.glob("states/step-*"))[-1] / "process_1.safetensors" for run in (out, tmp_path / "whole")]
    assert other[0].read_bytes() == other[1].read_bytes()
    assert drawn(out) == drawn(tmp_path / "whole")
    assert {"train/loss", "train/dicar", "epoch/loss", "validation/clean", "groups/boundary"} <= drawn(out).keys()


STOPPED = """
import os, signal
whole, wanted = train.save_run, {step}
def save(run):
    whole(run)
    if run.step == wanted:
        os.kill(os.getpid(), signal.SIGTERM)
train.save_run = save
command()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tars", "extra", "grey"])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_with_what_it_would_have_seen(runner, folders, tmp_path, kind):
    where = ["--data", "folder", "--root", folders, "--stream"]
    more = []
    if kind == "tars":
        where = ["--data", "tars", "--root", archives(tmp_path / "tars")]
    elif kind == "extra":
        pixels = np.random.default_rng(5).integers(0, 256, (30, 12, 12, 3)).astype(np.uint8)
        np.savez(tmp_path / "more.npz", x_train=pixels, y_train=np.arange(30) % 2)
        more = ["--extra", tmp_path / "more.npz", "--extra-share", "0.25"]
    elif kind == "grey":
        more = ["--grey", "--augment", "shift", "--cutmix"]
    recipe = "pgd_at" if kind in ("extra", "grey") else "consistency_at"
    words = [recipe, *SMALL, *where, *more, "--workers", "2", "--epochs", "2", "--milestones", "1", "--save-every", "2"]
    runner.run([*words, "--out", tmp_path / "whole"])
    runner.start([*words, "--out", tmp_path / "out"], code=STOPPED.format(step=2))
    (status,) = runner.statuses()
    assert os.waitstatus_to_exitcode(status) == 1
    assert "told to end (SIGTERM)" in runner.log.read_text()
    printed = runner.run([*words, "--workers", "0", "--out", tmp_path / "out", "--resume"])
    assert "goes on after step 2" in printed
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert drawn(tmp_path / "out") == drawn(tmp_path / "whole")
    sizes = remains(tmp_path / "out")["result"]["images"]
    assert ("extra" in sizes) == (kind == "extra")


def test_what_is_held_does_not_grow_with_the_images(tmp_path):
    def held(count):
        root = tmp_path / str(count)
        for split in ("train", "test"):
            for kind in ("ant", "bee"):
                (root / split / kind).mkdir(parents=True)
                for number in range(count):
                    (root / split / kind / f"{number:04d}.png").write_bytes(FIRST)
        found = images.images_of(Data(data="folder", root=root, stream=True, size=(224,)), "train")
        assert len(found) == 2 * count
        assert found.shape == (3, 224, 224)
        own = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        assert not any(isinstance(value, (list, dict)) for value in vars(found).values())
        return sum(value.numel() * value.element_size() for value in own) - 2 * count * len(str(root))

    few, many = held(4), held(44)
    per_image = (many - few) / 80
    assert per_image < 64  # bytes; one image of 224 x 224 has 150,528


def test_streamed_training_asks_for_images_as_they_are_needed(folders, monkeypatch, tmp_path):
    words = ["pgd_at", *SMALL, "--data", "folder", "--root", str(folders), "--stream", "--workers", "0"]
    settings = settings_of(words)
    parts = splits.splits(settings)
    opened = []
    whole = images.ImageFiles.whole
    monkeypatch.setattr(images.ImageFiles, "whole", lambda self, row: opened.append(row) or whole(self, row))
    served = batches.training_batches(settings, parts, batches.rows_of(parts, settings, 0), epoch=0, pinned=False)
    for number in range(1, 4):
        (x,), labels = next(served)
        assert x.shape == (8, 3, 12, 12)
        assert len(labels) == 8
        assert len(opened) == 8 * number  # nothing is read ahead


FIRST = encoded(0)
