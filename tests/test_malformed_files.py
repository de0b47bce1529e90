"""Files and folders that are not what they should be, met by the command line: one line each, and nothing is lost."""

import io
import json
import os
import shutil
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

for needed in ("accelerate", "tyro", "safetensors", "tensorboard", "PIL"):
    pytest.importorskip(needed, reason=f"{needed} is not installed; the extras `vision` and `train` bring it")

from PIL import Image  # noqa: E402

from perceptual_at.checkpoints import save_weights  # noqa: E402
from perceptual_at.models import resnet18  # noqa: E402

from .test_commands import TINY, _alone, call, refused  # noqa: E402, F401

pytestmark = pytest.mark.slow

SMALL = ["--model", "resnet18", "--width", "2", "--stem-stride", "2", "--batch", "4", "--steps", "1",
         "--select-steps", "1", "--test-steps", "1", "--epochs", "1", "--cpu", "--out", "out"]  # fmt: skip
FOLDER = ["--data", "folder", "--root", "images", "--size", "8"]
TARS = ["--data", "tars", "--root", "tars", "--size", "8", "--workers", "0"]
STREAMED = ["--stream", "--workers", "0"]
KINDS = ("ant", "bee")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 10, 3)).astype(np.uint8))


def encoded(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders of six and two images."""
    root = tmp_path_factory.mktemp("whole")
    for split, count in (("train", 6), ("test", 2)):
        for kind in KINDS:
            (root / split / kind).mkdir(parents=True)
            for number in range(count):
                (root / split / kind / f"{number}.png").write_bytes(encoded(number))
    return root


@pytest.fixture
def images(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "images")
    return tmp_path / "images"


def put(name, content):
    """Write a file below the images."""

    def hurt(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return hurt


def draw(name, mode, fill=0, **options):
    """Save an image of some mode."""
    return lambda root: Image.new(mode, (9, 10), fill).save(root / name, **options)


def cut(name, left):
    def hurt(root):
        held = (root / name).read_bytes()
        (root / name).write_bytes(held[:left])

    return hurt


def removed(name):
    return lambda root: shutil.rmtree(root / name)


def renamed(name, other):
    return lambda root: (root / name).rename(root / other)


def bomb(root):
    """A file whose header promises 400 megapixels."""
    held = bytearray((root / FIRST).read_bytes())
    held[16:24] = struct.pack(">II", 20000, 20000)
    held[29:33] = struct.pack(">I", zlib.crc32(held[12:29]))
    (root / FIRST).write_bytes(held)


FIRST, LAST = "train/ant/0.png", "train/bee/5.png"
GIF = {"save_all": True, "append_images": [Image.new("RGB", (9, 10), (255, 0, 0))]}
FOLDERS = [
    (put(FIRST, b"hello"), "`images/train/ant/0.png` cannot be read"),
    (put(FIRST, b""), "`images/train/ant/0.png` cannot be read"),
    (cut(FIRST, 60), "`images/train/ant/0.png` cannot be read"),
    (cut(LAST, -40), "`images/train/bee/5.png` cannot be read"),
    (put("train/ant/a.jpg", b"\xff\xd8\xff\xe0" + b"\0" * 40), "`images/train/ant/a.jpg` cannot be read"),
    (draw(FIRST, "I;16", 40000), "pixels of 16 bits"),
    (draw("train/ant/0.tiff", "F", 0.5), "floating-point pixels"),
    (draw("train/ant/0.jpg", "CMYK"), "the colour space CMYK"),
    (draw("train/ant/0.tif", "LAB"), "the colour space LAB"),
    (draw("train/ant/0.gif", "RGB", **GIF), "2 frames"),
    (draw(FIRST, "RGBA", (1, 2, 3, 100)), "transparent pixels"),
    (bomb, "decompression bomb"),
    (renamed("test/bee", "test/bea"), "differing: bea, bee"),
    (put("test/cow/0.png", encoded(0)), "differing: cow"),
    (removed("test/bee"), "differing: bee"),
    (lambda root: (root / "train/cow").mkdir(), "no images in the class 'cow'"),
    (put("train/cow/notes.txt", b"x"), "no images in the class 'cow'"),
    (removed("test"), "there is no folder 'test'"),
    (lambda root: [removed("test")(root), (root / "test").mkdir()], "no class folders"),
    (lambda root: [removed("train")(root), put("train", b"")(root)], "there is no folder 'train'"),
    (lambda root: [removed("train/bee")(root), removed("test/bee")(root)], "at least two classes"),
    (lambda root: [renamed("train", "a")(root), (root / "train").symlink_to("nothing")], "there is no folder 'train'"),
    (removed("train/ant"), "differing: ant"),
    (lambda root: [(root / f"train/{kind}/{n}.png").unlink() for kind in KINDS for n in range(1, 6)], "--batch 4 is"),
]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("hurt", "message"), FOLDERS, ids=[message for _, message in FOLDERS])
def test_folders_that_are_refused(images, capsys, hurt, message, streamed):
    hurt(images)
    words = [*FOLDER, *(STREAMED if streamed else [])]
    text = refused(capsys, "train", "pgd_at", *SMALL, *words)
    assert message in text
    assert not list(images.parent.glob("out/states/*"))


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_no_image_is_left_out_with_a_count_and_a_name(images, capsys, streamed):
    (images / "train/.git").mkdir()
    (images / "train/ant/.DS_Store").write_bytes(b"")
    (images / "train/ant/loop").symlink_to("..")
    (images / "train/bee/again").symlink_to(".")
    (images / "train/ant/gone.png").symlink_to("nothing")
    (images / "train/ant/notes.txt").write_text("x")
    (images / "train/README").write_text("x")
    if hasattr(os, "mkfifo"):
        os.mkfifo(images / "train/bee/pipe.png")
    words = [*FOLDER, *(STREAMED if streamed else [])]
    assert call("train", "pgd_at", *SMALL, *words) == 0
    said = capsys.readouterr().err
    assert f"left out {8 if hasattr(os, 'mkfifo') else 7} entries of `images/train`" in said
    for kind in ("2 hidden", "2 leading back", "1 linking to nothing", "1 not called an image", "1 beside"):
        assert kind in said
    record = json.loads((images.parent / "out/result.json").read_text())
    assert record["images"] == {"train": 11, "select": 1, "test": 4}
    assert any("left out" in line for line in record["warnings"])


@pytest.mark.parametrize("streamed", [False, True])
def test_damaged_images_are_skipped_by_name_where_that_is_asked_for(images, capsys, streamed):
    put(FIRST, b"hello")(images)
    draw(LAST, "CMYK", format="JPEG")(images)
    words = [*FOLDER, *(STREAMED if streamed else [])]
    assert call("train", "pgd_at", *SMALL, *words, "--skip-damaged") == 0
    said = capsys.readouterr().err
    assert "left out 2 of 12 images that cannot be read: images/train/ant/0.png, images/train/bee/5.png" in said


def test_names_that_are_no_text_are_read_and_reported(images, capsys):
    odd = os.fsdecode(b"b\xffe")
    try:
        for split in ("train", "test"):
            (images / split / "bee").rename(images / split / odd)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    assert call("train", "pgd_at", *SMALL, *FOLDER) == 0
    assert call("evaluate", "--run", "out", "--attacks", "pgd1", "--which", "best", "--cpu") == 0
    assert "b\\udcffe" in capsys.readouterr().out
    put(f"train/{odd}/x.png", b"hello")(images)
    assert "cannot be read" in refused(capsys, "train", "pgd_at", *SMALL, *FOLDER, "--resume")


# Tars -----------------------------------------------------------------------------------------------------------------


def pack(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def members(count, classes=2):
    return [pair for n in range(count) for pair in ((f"{n}.png", encoded(n)), (f"{n}.cls", str(n % classes).encode()))]


def repack(split, held, mode="w"):
    return lambda root: pack(root / f"{split}-0.tar", held, mode)


ARCHIVES = [
    (repack("train", members(8), "w:gz"), "cannot be read as a plain tar archive"),
    (lambda root: cut("train-0.tar", 1000)(root), "cannot be read as a plain tar archive"),
    (put("train-0.tar", b"hello"), "cannot be read as a plain tar archive"),
    (put("train-0.tar", b""), "cannot be read as a plain tar archive"),
    (repack("train", []), "there are no images"),
    (repack("train", [("a.txt", b"x")]), "there are no images"),
    (repack("train", members(8)[:-1]), "1 images in `tars` have no `.cls`"),
    (repack("train", [*members(8), ("9.png", encoded(9)), ("9.cls", b"two")]), "must hold the number of a class"),
    (repack("train", [*members(8), ("9.png", encoded(9)), ("9.cls", b"-1")]), "classes start at 0"),
    (repack("train", [*members(8), *members(1)]), "two images of the name '0'"),
    (repack("train", [(f"{n}.png", encoded(n)) for n in range(8)]), "neither members `.cls` nor folders"),
    (repack("test", members(9, classes=3)), "the test has the label 2"),
    (repack("train", [("0.png", b"hello"), *members(8)[1:]]), "cannot be read as an image"),
    (lambda root: (root / "test-0.tar").unlink(), "there are no archives"),
    (lambda root: [(root / "train-0.tar").unlink(), (root / "train-0.tar").mkdir()], "is no regular file"),
    (lambda root: [(root / "train-0.tar").unlink(), os.mkfifo(root / "train-0.tar")], "is no regular file"),
]


@pytest.mark.parametrize(("hurt", "message"), ARCHIVES, ids=[message for _, message in ARCHIVES])
def test_archives_that_are_refused(tmp_path, capsys, hurt, message):
    (tmp_path / "tars").mkdir()
    for split in ("train", "test"):
        pack(tmp_path / f"tars/{split}-0.tar", members(8))
    hurt(tmp_path / "tars")
    assert message in refused(capsys, "train", "pgd_at", *SMALL, *TARS)
    assert not list(tmp_path.glob("out/states/*"))


# Arrays and weights ---------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
SPOILT = PIXELS / np.float32(255)
SPOILT[3, 3, 3, 1] = np.nan
LABELS = np.arange(24) % 3
ARRAYS = [
    ({"y_train": None}, "must hold the arrays 'x_train' and 'y_train'"),
    ({"x_train": SPOILT}, "must lie in [0, 1], got values from nan"),
    ({"x_train": SPOILT * 0 + np.inf}, "must lie in [0, 1]"),
    ({"x_train": PIXELS.astype(float)}, "Divide pixel values by 255"),
    ({"x_train": PIXELS.astype(np.uint16)}, "must be uint8 or floating point"),
    ({"x_train": PIXELS.astype(complex)}, "not numbers"),
    ({"x_train": PIXELS // 255}, "bytes of 0 and 1 only"),
    ({"x_train": PIXELS[:0], "y_train": LABELS[:0]}, "no images in the part 'train'"),
    ({"x_test": PIXELS[:0], "y_test": LABELS[:0]}, "no images in the part 'test'"),
    ({"x_train": PIXELS[:, :, :, 0]}, "they must be equal"),
    ({"x_train": PIXELS[:, :4]}, "they must be equal"),
    ({"x_train": PIXELS.reshape(24, -1)}, "must have shape (N, C, H, W)"),
    ({"x_train": np.zeros((24, 64, 8, 8), np.uint8)}, "does not tell where the channels are"),
    ({"y_train": LABELS[:-1]}, "got shape (23,)"),
    ({"y_train": LABELS - 1}, "holds the label -1"),
    ({"y_train": LABELS + 0.5}, "must be integer class indices"),
    ({"y_train": LABELS * 0}, "at least two classes"),
    ({"y_train": LABELS * 10**12}, "number the classes from 0 without gaps"),
    ({"y_train": np.array(list("abc" * 8))}, "not numbers"),
    ({"y_train": np.array([None] * 24)}, "cannot be read as an archive of plain NumPy arrays"),
    ({"y_test": np.arange(24) % 4}, "the test has the label 3"),
]


def archive(**changes):
    held = {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS, "y_test": LABELS, **changes}
    np.savez("held.npz", **{name: value for name, value in held.items() if value is not None})
    return ["--data", "npz", "--root", "held.npz"]


@pytest.mark.parametrize(("changes", "message"), ARRAYS, ids=[message for _, message in ARRAYS])
def test_arrays_that_are_refused(tmp_path, capsys, changes, message):
    assert message in refused(capsys, "train", "pgd_at", *SMALL, *archive(**changes))
    assert not (tmp_path / "out").exists()


MORE = [
    ({"x": PIXELS}, [], "cannot be read as an archive with x_train"),
    ({"x_train": PIXELS}, [], "--extra holds no labels"),
    ({"x_train": PIXELS[:0], "y_train": LABELS[:0]}, [], "holds no image"),
    ({"x_train": PIXELS, "y_train": LABELS + 1}, [], "--extra has the label 3"),
    ({"x_train": PIXELS[:, :4], "y_train": LABELS}, [], "images have shape (3, 4, 8)"),
    ({"x_train": SPOILT, "y_train": LABELS}, [], "must lie in [0, 1]"),
    ({"x_train": PIXELS, "y_train": LABELS}, ["--extra-share", "0.01"], "takes 0 of a batch of 4"),
    ({"x_train": PIXELS, "y_train": LABELS}, ["--extra-share", "1"], "takes 4 of a batch of 4"),
]


@pytest.mark.parametrize(("held", "words", "message"), MORE, ids=[message for *_, message in MORE])
def test_second_sources_that_are_refused(tmp_path, capsys, held, words, message):
    np.savez("more.npz", **held)
    assert message in refused(capsys, "train", "pgd_at", *SMALL, *archive(), "--extra", "more.npz", *words)
    assert not (tmp_path / "out").exists()


def network():
    torch.manual_seed(0)
    return resnet18(num_classes=3, width=2, stem_stride=2)


def whole():
    save_weights("weights.safetensors", network())
    return Path("weights.safetensors").read_bytes()


def bytes_of(change):
    def written(path):
        path.write_bytes(change(whole()))

    return written


def pickled(value):
    return lambda path: torch.save(value, path)


def poisoned(path):
    weights = {name: value.clone() for name, value in network().state_dict().items()}
    weights["linear.bias"][1] = float("nan")
    save_weights(path, weights)


HEADER = struct.pack("<Q", 8)
WEIGHTS = [
    ("a.safetensors", bytes_of(lambda raw: raw[:-7]), "is cut off"),
    ("a.safetensors", bytes_of(lambda raw: raw[:50]), "is cut off"),
    ("a.safetensors", bytes_of(lambda raw: raw[:4]), "is no safetensors file"),
    ("a.safetensors", bytes_of(lambda raw: b""), "looks like an empty file"),
    ("a.safetensors", bytes_of(lambda raw: b"hello, world"), "is no safetensors file"),
    ("a.safetensors", bytes_of(lambda raw: struct.pack("<Q", 2**60) + b"{"), "is cut off"),
    ("a.safetensors", bytes_of(lambda raw: HEADER + b'{"a": 1}'), "header"),
    ("a.safetensors", bytes_of(lambda raw: HEADER + b"[[[[[[[["), "is no safetensors file"),
    ("a.safetensors", bytes_of(lambda raw: raw[:2000] + b"\xff" * 8 + raw[2008:]), "header"),
    ("a.safetensors", lambda path: path.mkdir(), "there is no file"),
    ("a.safetensors", os.mkfifo if hasattr(os, "mkfifo") else lambda path: path.mkdir(), "there is no file"),
    ("a.pt", bytes_of(lambda raw: b"\x80\x02hello"), "a.pt"),
    ("a.pt", pickled([1, 2]), "holds no tensors by name"),
    ("a.pt", pickled({"epoch": 3}), "a.pt"),
    ("a.pt", pickled({"other": torch.zeros(3)}), "no name in `a.pt` fits this model"),
    ("a.pt", lambda path: torch.save(network(), path), "more than plain tensors"),
    ("a.safetensors", poisoned, "gives logits that are not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), WEIGHTS, ids=[message for *_, message in WEIGHTS])
def test_first_weights_that_are_refused(tmp_path, capsys, name, make, message):
    make(tmp_path / name)
    assert message in refused(capsys, "train", "pgd_at", *SMALL, *archive(), "--init", name)
    assert not (tmp_path / "out").exists()


# What runs leave behind -----------------------------------------------------------------------------------------------

RUN = ["train", "pgd_at", *TINY, "--save-every", "2", "--out", "run"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its evaluation."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    folder, here = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(folder)
    try:
        assert call(*RUN) == 0
        assert call("evaluate", "--run", "run", "--attacks", "pgd1", "--which", "best", "--cpu") == 0
    finally:
        os.chdir(here)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def every_state(change):
    """Hurt both states."""

    def hurt(run):
        for state in (run / "states").glob("step-*"):
            change(state)

    return hurt


def sealed(change):
    """Change a state's facts, under checksums that fit: what another version might have written."""
    from perceptual_at.commands.training import states

    def hurt(state):
        facts = json.loads((state / "run.json").read_text())
        change(facts)
        (state / "run.json").write_text(json.dumps(facts))
        (state / "manifest.json").unlink()
        states._seal(state)

    return every_state(hurt)


STATES = [
    (every_state(cut("run.json", 40)), "no state in `run/states` is whole"),
    (every_state(cut("manifest.json", 40)), "no state in `run/states` is whole"),
    (every_state(put("manifest.json", b"{}")), "names no file"),
    (every_state(put("manifest.json", b"[]")), "no state in `run/states` is whole"),
    (every_state(put("manifest.json", b"\xff")), "no state in `run/states` is whole"),
    (every_state(lambda state: (state / "model.safetensors").unlink()), "no state in `run/states` is whole"),
    (every_state(put("optimizer.bin", b"x")), "`optimizer.bin` was changed or cut off"),
    (every_state(put("process_0.safetensors", b"")), "`process_0.safetensors` was changed or cut off"),
    (sealed(lambda facts: facts.pop("changes")), "lacks changes"),
    (sealed(lambda facts: facts["data"].update(train="other")), "was trained on other images (train)"),
    (sealed(lambda facts: facts.update(processes=2)), "was saved by 2 processes, not 1"),
    (sealed(lambda facts: facts["settings"].update(lr=3.0)), "has other settings: lr 3.0 -> 0.1"),
]


@pytest.mark.parametrize(("hurt", "message"), STATES, ids=[message for _, message in STATES])
def test_states_that_are_refused_are_kept(run, capsys, hurt, message):
    hurt(run)
    before = {path: path.read_bytes() for path in (run / "states").rglob("*") if path.is_file()}
    assert message in refused(capsys, *RUN, "--resume")
    assert {path: path.read_bytes() for path in (run / "states").rglob("*") if path.is_file()} == before


def rewritten(**changes):
    def hurt(run):
        record = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(record | changes))

    return hurt


EVALUATE = ["evaluate", "--run", "run", "--attacks", "pgd1", "--which", "best", "--cpu"]
LEFT = [
    (put("result.json", b""), EVALUATE, "`run/result.json` is damaged"),
    (put("result.json", b"{"), EVALUATE, "`run/result.json` is damaged"),
    (put("result.json", b"\xff\xfe"), EVALUATE, "`run/result.json` is damaged"),
    (put("result.json", b"[]"), EVALUATE, "`run/result.json` is damaged (it holds list)"),
    (put("result.json", b"{}"), EVALUATE, "`run/result.json` lacks settings"),
    (put("result.json", b"null"), EVALUATE, "`run/result.json` is damaged"),
    (put("result.json", b"[" * 100000), EVALUATE, "`run/result.json` is damaged"),
    (rewritten(settings=[]), EVALUATE, "`run/result.json`"),
    (rewritten(settings={"lr": "fast"}), EVALUATE, "`run/result.json`"),
    (rewritten(settings={"nosuch": 1}), EVALUATE, "unknown settings: nosuch"),
    (rewritten(shape="x"), EVALUATE, "`run/result.json`"),
    (rewritten(shape=[3, 16]), EVALUATE, "`run/result.json`"),
    (rewritten(classes="ten"), EVALUATE, "`run/result.json`"),
    (rewritten(best=None), ["table", "run"], "`run/result.json`"),
    (lambda run: (run / "result.json").unlink(), EVALUATE, "its run is not finished; go on with --resume"),
    (lambda run: (run / "best.safetensors").unlink(), EVALUATE, "there is no file `run/best.safetensors`"),
    (cut("best.safetensors", 99), EVALUATE, "is cut off"),
    (rewritten(classes=7), EVALUATE, "best.safetensors"),
    (put("evaluation/best/report.json", b"{"), ["table", "run"], "is no report of an evaluation"),
    (put("evaluation/best/report.json", b"[]"), ["table", "run"], "is no report of an evaluation"),
    (put("evaluation/best/report.json", b"\xff"), ["compare", *["run/evaluation/best"] * 2], "no report"),
    (rewritten(best={"weights": "other", "test": {"n": 64, "clean": 1.0}}), ["table", "run"], "is of other weights"),
]  # fmt: skip


@pytest.mark.parametrize(("hurt", "words", "message"), LEFT, ids=[f"{n} {m}" for n, (*_, m) in enumerate(LEFT)])
def test_leftovers_of_runs_that_are_refused(run, capsys, hurt, words, message):
    hurt(run)
    assert message in refused(capsys, *words)


@pytest.mark.parametrize("content", [b"hello", b"{}\n", b'{"format":"perceptual_at evaluation record, version 1"}\n'])
def test_records_that_are_no_records_are_left_alone(run, capsys, content):
    (path,) = (run / "evaluation/best").glob("record-*.jsonl")
    path.write_bytes(content)
    assert path.name in refused(capsys, *EVALUATE)
    assert path.read_bytes() == content


def test_a_torn_record_goes_on(run, capsys):
    (path,) = (run / "evaluation/best").glob("record-*.jsonl")
    report, held = (run / "evaluation/best/report.json").read_text(), path.read_bytes()
    path.write_bytes(held[:-20])
    assert call(*EVALUATE) == 0
    now = json.loads((run / "evaluation/best/report.json").read_text())
    assert now["verdicts"] == json.loads(report)["verdicts"]
    capsys.readouterr()


def test_weights_that_are_not_finite_are_never_kept(tmp_path, capsys, monkeypatch):
    from perceptual_at.commands import train

    step = train.take_step

    def spoiling(run, *batch):
        terms = step(run, *batch)
        if run.step == 4:
            next(run.bare.parameters()).data.view(-1)[0] = float("nan")
        return terms

    monkeypatch.setattr(train, "take_step", spoiling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = refused(capsys, *RUN)
    assert "not finite at step" in text
    assert "the newest state, step-000000004, is good" in text
    for state in (tmp_path / "run/states").glob("step-*"):
        from safetensors.torch import load_file

        assert all(bool(value.isfinite().all()) for value in load_file(state / "model.safetensors").values())
