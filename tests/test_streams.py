"""Images on the disk: what is refused, what is left out with a word, what streams serve."""

import io
import os
import struct
import tarfile
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from perceptual_at.data import ImageFiles, hold_out, image_folder, loader, npz_images, stream_folder, stream_tars

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed; torchvision brings it")
READERS = {"memory": image_folder, "stream": stream_folder}
every_reader = pytest.mark.parametrize("reader", READERS)


def picture(height=8, width=8, *, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


@pytest.fixture
def root(tmp_path):
    """Two classes of two images each, for training and for the test."""
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                picture(seed=10 * label + number).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def everything(reader, root, split="train", **options):
    """All images of a reader, decoded."""
    found = READERS[reader](root, split, size=8, **options)
    return (
        found.images
        if reader == "memory"
        else torch.stack([image for image, _ in map(found.__getitem__, range(len(found)))])
    )


# Files that are no images of eight bits ---------------------------------------------------------------------------


def tiff(mode, value):
    image = Image.new(mode, (8, 8), value)
    file = io.BytesIO()
    image.save(file, "TIFF")
    return file.getvalue()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def transparent():
    image = picture(mode="RGBA")
    image.putalpha(128)
    return encoded(image, "PNG")


BAD = {
    "empty.png": (b"", "damaged or incomplete"),
    "text.png": (b"not an image", "damaged or incomplete"),
    "cut.png": (encoded(picture(), "PNG")[:60], "damaged or incomplete"),
    "cut.jpg": (encoded(picture(64, 64), "JPEG")[:500], "damaged or incomplete"),
    "half.png": (encoded(picture(64, 64), "PNG")[:3000], "damaged or incomplete"),
    "head.bmp": (encoded(picture(), "BMP")[:20], "damaged or incomplete"),
    "html.jpg": (b"<!DOCTYPE html><html></html>", "damaged or incomplete"),
    "sixteen.png": (encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16)), "PNG"), "16 bits or more"),
    "sixteen.tif": (tiff("I;16", 40000), "16 bits or more"),
    "sixteen.ppm": (b"P6 8 8 65535\n" + bytes([156, 64] * 192), "16 bits or more"),
    "ten.ppm": (b"P6 8 8 1023\n" + bytes([3, 232] * 192), "16 bits or more"),
    "plain.ppm": (b"P3 8 8 65535\n" + b"40000 " * 192, "16 bits or more"),
    "thirtytwo.tif": (tiff("I", 70000), "16 bits or more"),
    "float.tif": (tiff("F", 0.5), "floating-point pixels"),
    "cmyk.jpg": (encoded(picture(mode="CMYK"), "JPEG"), "colour space CMYK"),
    "cmyk.tif": (encoded(picture(mode="CMYK"), "TIFF"), "colour space CMYK"),
    "lab.tif": (encoded(Image.new("LAB", (8, 8)), "TIFF"),
                "colour space LAB"),
    "alpha.png": (transparent(), "transparent pixels"),
    "alpha.gif": (encoded(Image.new("P", (8, 8)), "GIF", transparency=0), "transparent pixels"),
    "moving.gif": (encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]), "2 frames"),
    "moving.png": (encoded(picture(), "PNG", save_all=True, append_images=[picture(seed=1)]), "2 frames"),
}  # fmt: skip


@every_reader
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_of_eight_bits_is_refused_by_name_or_left_out_with_a_count(root, reader, name):
    content, problem = BAD[name]
    good = everything(reader, root)
    path = root / "train/dog" / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(image_folder|ImageFiles): `.*{name}` .*{problem}"):
        everything(reader, root)
    with pytest.warns(UserWarning, match=rf"left out 1 of 5 images that cannot be read: .*{name}"):
        kept = everything(reader, root, skip_damaged=True)
    assert torch.equal(kept, good)


@every_reader
def test_a_decompression_bomb_is_named(root, reader, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ValueError, match=r"`.*0\.png` is a decompression bomb"):
        everything(reader, root)


@every_reader
def test_conversions_that_lose_nothing_are_made(root, reader):
    before = everything(reader, root)
    folder = root / "train/cat"
    picture(seed=0).convert("RGBA").save(folder / "0.png")  # opaque
    grey = picture(mode="L", seed=1)
    grey.save(folder / "1.png")
    found = everything(reader, root)
    assert torch.equal(found[0], before[0])
    assert torch.equal(found[1], torch.from_numpy(np.array(grey)).expand(3, 8, 8))
    palette = picture(seed=2).convert("P")
    palette.save(folder / "0.png", transparency=255)  # a colour that no pixel has
    assert torch.equal(everything(reader, root)[0], torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1))
    upright, exif = picture(8, 8, seed=5), Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.rotate(180).save(folder / "0.png", exif=exif)
    assert torch.equal(everything(reader, root)[0], torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def of_565(pixels):
    """A bitmap of 16 bits per pixel: 5 of red, 6 of green, 5 of blue."""
    fields = (40, 8, len(pixels) // 8, 1, 16, 3, 2 * len(pixels), 0, 0, 0, 0, 0xF800, 0x07E0, 0x001F)
    head = struct.pack("<IiiHHIIiiIIIII", *fields)
    size = 14 + len(head)
    return (
        b"BM"
        + struct.pack("<IHHI", size + 2 * len(pixels), 0, 0, size)
        + head
        + struct.pack(f"<{len(pixels)}H", *pixels)
    )


ORDINARY = {
    "camera.jpg": encoded(picture(), "MPO", save_all=True, append_images=[picture(4, 4, seed=1)]),
    "camera.JPEG": encoded(picture(mode="L"), "MPO", save_all=True, append_images=[picture(seed=1)] * 2),
    "five_six_five.bmp": of_565([0xFFFF, 0xF800, 0x07E0, 0x001F] * 16),
    "fifteen.ppm": b"P6 8 8 15\n" + bytes([15, 0, 7] * 64),
    "bits.pgm": b"P1 8 8\n" + b"1 0 " * 32,
}


@every_reader
@pytest.mark.parametrize("name", ORDINARY)
def test_what_only_looks_like_more_than_bytes_or_one_image_is_read(root, reader, name):
    path = root / "train/cat" / f"0{name}"
    path.write_bytes(ORDINARY[name])
    with Image.open(path) as file:
        shown = file.convert("RGB")
    assert torch.equal(everything(reader, root)[1], torch.from_numpy(np.array(shown)).permute(2, 0, 1))


# Folders ----------------------------------------------------------------------------------------------------------


def test_what_lies_between_images_is_left_out_with_a_word_and_nothing_hangs(root):
    train = root / "train"
    good = everything("memory", root)
    (train / ".git/objects").mkdir(parents=True)
    picture().save(train / ".git/0.png")
    (train / "cat/.hidden.png").write_bytes(b"")
    (train / "cat/loop").symlink_to(train)
    (train / "cat/self").symlink_to(train / "cat")
    (train / "dog/nothing.png").symlink_to(train / "absent.png")
    os.mkfifo(train / "dog/pipe.png")
    (train / "dog/Thumbs.db").write_bytes(b"")
    (train / "README.md").write_text("")
    for reader in READERS:
        with pytest.warns(UserWarning, match="left out 8 entries") as caught:
            found = everything(reader, root)
        assert torch.equal(found, good)
        (message,) = (str(warning.message) for warning in caught)
        for part in ("2 hidden (such as", ".git`", "2 leading back to a folder above", "1 linking to nothing",
                     "1 no regular file", "pipe.png", "1 not called an image", "Thumbs.db",
                     "1 beside the class folders", "README.md"):  # fmt: skip
            assert part in message


@every_reader
def test_classes_that_differ_are_refused_by_name_and_empty_ones_too(root, reader):
    (root / "test/cat").rename(root / "test/cats")
    with pytest.raises(ValueError, match=r"`.*test` has 2 classes but `.*train` has 2.*differing: cat, cats"):
        everything(reader, root, "test")
    (root / "train/empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in the class 'empty'"):
        everything(reader, root)


def test_gifs_and_every_known_suffix_are_images(root):
    for kind in ("gif", "webp", "bmp", "tif", "jpeg"):
        picture().save(root / f"train/cat/more.{kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(stream_folder(root, size=8)) == 9


# Streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_serves_what_memory_holds_also_through_workers(root):
    files, held = stream_folder(root, size=(6, 10)), image_folder(root, size=(6, 10))
    assert files.shape == tuple(held.images.shape[1:]) == (3, 6, 10)
    assert files.classes == held.classes
    for workers in (0, 1):
        batches = DataLoader(files, batch_size=3, num_workers=workers)
        images, labels = zip(*batches, strict=True)
        assert torch.equal(torch.cat(images), held.images)
        assert torch.equal(torch.cat(labels), held.labels)
    grey = stream_folder(root, size=8, grey=True)
    assert grey[0][0].shape == (1, 8, 8)
    with pytest.raises(IndexError, match="index 4 is out of range for 4 images"):
        files[4]


@pytest.mark.parametrize("ask", [lambda files, row: files[row], ImageFiles.whole, ImageFiles.name])
def test_a_stream_is_asked_by_whole_numbers_of_any_kind(root, ask):
    files = stream_folder(root, size=8)
    whole = ask(files, 1)
    for row in (True, np.int64(1), np.uint8(1), torch.tensor(1), -3):
        assert str(ask(files, row)) == str(whole)
    for row in (slice(0, 2), "a", [0, 1], None, 1.0, torch.tensor([0, 1])):
        with pytest.raises(
            TypeError, match=r"ImageFiles: an index must be an integer, got .*`rows\(...\)` takes several"
        ):
            ask(files, row)


def test_the_fingerprint_notices_other_files_and_rows_are_taken(root, monkeypatch):
    files = stream_folder(root, size=8)
    assert files.fingerprint() == stream_folder(root, size=8).fingerprint()
    assert files.fingerprint() != files.rows(torch.tensor([1, 0, 2, 3])).fingerprint()
    moved = root.rename(root.with_name("moved here"))
    assert files.fingerprint() == stream_folder(moved, size=8).fingerprint()
    monkeypatch.chdir(moved)
    assert files.fingerprint() == stream_folder(".", size=8).fingerprint()
    moved.rename(root)
    part = files.rows(torch.tensor([3, 1]))
    assert torch.equal(part[0][0], files[3][0])
    assert part.labels.tolist() == [1, 0]
    assert [files.without([0]).name(row) for row in range(3)] == [files.name(row) for row in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"`labels` must be of shape \(1,\)"):
        ImageFiles(["a.png"], torch.zeros(2), size=8)


def packed(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_archives_are_read_at_any_place_with_labels_of_either_kind(tmp_path):
    pictures = [encoded(picture(seed=seed), "PNG") for seed in range(4)]
    packed(tmp_path / "train-0.tar", {"0.png": pictures[0], "0.cls": b"1", "0.json": b"{}", "1.png": pictures[1],
                                      "1.cls": b"0\n"})  # fmt: skip
    packed(tmp_path / "train-1.tar", {"0.png": pictures[2], "0.cls": b"1"})
    files = stream_tars(tmp_path, "train", size=8)
    assert files.labels.tolist() == [1, 0, 1]
    for row in (2, 0, 1):
        wanted = torch.from_numpy(np.array(Image.open(io.BytesIO(pictures[row])))).permute(2, 0, 1)
        assert torch.equal(files[row][0], wanted)
    assert torch.equal(next(iter(DataLoader(files, batch_size=3, num_workers=1)))[1], files.labels)
    (tmp_path / "test").mkdir()
    packed(tmp_path / "test/a.tar", {"cat/0.png": pictures[0], "./dog/0.png": pictures[1]})
    test = stream_tars(tmp_path, "test", size=8)
    assert test.classes == ("cat", "dog")
    assert test.labels.tolist() == [0, 1]


ARCHIVES = {
    "no archive": (lambda path: path.parent.joinpath("other.tar").write_bytes(b""), "there are no archives"),
    "no images": (lambda path: packed(path, {"a.txt": b"x"}), "there are no images"),
    "empty file": (lambda path: path.write_bytes(b""), "plain tar archive"),
    "no tar": (lambda path: path.write_bytes(b"x" * 2000), "plain tar archive"),
    "compressed": (lambda path: packed(path, {"a.png": b"x", "a.cls": b"0"}, "w:gz"), "If it is compressed"),
    "no number": (lambda path: packed(path, {"a.png": b"x", "a.cls": b"cat"}), "must hold the number of a class"),
    "negative": (lambda path: packed(path, {"a.png": b"x", "a.cls": b"-1"}), "classes start at 0"),
    "one without": (lambda path: packed(path, {"a.png": b"x", "a.cls": b"0", "b.png": b"x"}), "1 images .* no `.cls`"),
    "no classes": (lambda path: packed(path, {"a.png": b"x"}), "neither members `.cls` nor folders"),
    "twice": (lambda path: packed(path, {"a.png": b"x", "a.jpg": b"x", "a.cls": b"0"}), "two images of the name 'a'"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_cannot_be_used_are_refused(tmp_path, name):
    make, message = ARCHIVES[name]
    make(tmp_path / "train.tar")
    with pytest.raises((ValueError, FileNotFoundError), match=f"stream_tars: .*{message}"):
        stream_tars(tmp_path, "train", size=8)


def test_an_archive_that_was_cut_off_is_refused(tmp_path):
    packed(tmp_path / "train.tar", {"a.cls": b"0", "a.png": encoded(picture(64, 64), "PNG")})
    whole = (tmp_path / "train.tar").read_bytes()
    for length in (700, 1200, 3000, 9000):
        (tmp_path / "train.tar").write_bytes(whole[:length])
        with pytest.raises((ValueError, FileNotFoundError), match="stream_tars: "):
            stream_tars(tmp_path, "train", size=8)


# NumPy archives ---------------------------------------------------------------------------------------------------


def archive(path, x, y):
    np.savez(path / "a.npz", x_train=x, y_train=y)
    return path / "a.npz"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 3, 8, 8), np.uint8), [0, 1, 0, 1], "bytes of 0 and 1 only"),
        (np.ones((4, 8, 8), np.uint8), [0, 1, 0, 1], "bytes of 0 and 1 only"),
        (np.full((4, 3, 8, 8), 9, np.uint8), [0, -1, 0, 1], "the label -1"),
        (np.full((4, 5, 8, 64), 9, np.uint8), [0, 1, 0, 1], "does not tell where the channels are"),
        (np.full((4, 3, 8, 3), 9, np.uint8), [0, 1, 0, 1], "does not tell where the channels are"),
        (np.full((4, 3, 8, 8), 9, np.uint8), ["a", "b", "a", "b"], "not numbers"),
        (np.full((4, 3, 8, 8), 9, np.uint8), [0.0, 1.0, 0.0, 1.0], "integer"),
        (np.full((4, 3, 8, 8), 9, np.uint8), [0, 1], r"shape \(4,\)"),
        (np.full((4, 3, 8, 8), 2.0, np.float32), [0, 1, 0, 1], r"must lie in \[0, 1\]"),
        (np.full((4, 3, 8, 8), np.nan, np.float32), [0, 1, 0, 1], r"must lie in \[0, 1\]"),
        (np.full((4, 3, 8, 8), 9, np.int32), [0, 1, 0, 1], "uint8 or floating point"),
        (np.full((4, 8), 9, np.uint8), [0, 1, 0, 1], r"must have shape \(N, C, H, W\)"),
    ],
)
def test_arrays_that_mean_no_images_are_refused(tmp_path, x, y, message):
    with pytest.raises((ValueError, TypeError), match=message):
        npz_images(archive(tmp_path, x, np.array(y)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.float32])
def test_floating_point_arrays_of_any_width_are_served_as_float32(tmp_path, dtype):
    data = npz_images(archive(tmp_path, np.full((4, 64, 8, 8), 0.5, dtype), np.arange(4)), layout="channels_first")
    assert data[:2][0].dtype == torch.float32
    assert data.images.shape == (4, 64, 8, 8)
    last = npz_images(tmp_path / "a.npz", layout="channels_last")
    assert last.images.shape == (4, 8, 64, 8)


# Loaders and splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda a: ConcatDataset([a, a]),
    lambda a: Subset(ConcatDataset([a, a]), [5, 1, 3]),
    lambda a: Subset(Subset(a, [2, 1, 0]), [1, 2]),
    lambda a: [a[i] for i in range(3)],
], ids=["concat", "subset of concat", "subset of subset", "list"])  # fmt: skip
def test_any_map_style_data_set_has_batches(wrap):
    inner = TensorDataset(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]))
    wrapped = wrap(inner)
    batches = list(loader(wrapped, 2))
    x, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    for row in range(len(wrapped)):
        assert torch.equal(x[row], wrapped[row][0])
        assert labels[row] == wrapped[row][1]


def test_the_only_sample_of_a_class_is_not_held_out():
    labels = torch.tensor([0] * 20 + [1] * 20 + [2])
    for seed in range(5):
        for amount in (0.1, 5, 0.5):
            (_, rest), _ = hold_out((torch.rand(41, 1), labels), amount, seed=seed)
            assert 2 in rest
