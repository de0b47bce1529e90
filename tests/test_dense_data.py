"""Images with a label at every pixel: canvases of digits, folders of masks, augmentation that moves both."""

import struct
import zlib

import pytest
import torch

from perceptual_at.augment import random_crop_flip
from perceptual_at.data import digit_canvases, digits, mask_folder
from tests.strategies import generator, integers, uniform

# Canvases ---------------------------------------------------------------------------------------------------------


def test_canvases_are_those_of_their_seed_and_split():
    x, labels = digit_canvases(6, "test", size=20, per_canvas=2, seed=3)
    assert (x.shape, labels.shape) == ((6, 1, 20, 20), (6, 20, 20))
    again, other, trained = (digit_canvases(6, *more, size=20, per_canvas=2, seed=s)[0]
                             for more, s in ((("test",), 3), (("test",), 4), ((), 3)))  # fmt: skip
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert not torch.equal(x, trained)


def test_a_pixel_with_ink_belongs_to_its_digit_and_the_others_to_the_background():
    x, labels = digit_canvases(40, "test", size=30, per_canvas=1)
    assert torch.equal(x[:, 0] > 0, labels < 10)
    pictures, classes = digits("test")
    for canvas, marks in zip(x[:, 0], labels, strict=True):
        (digit,) = marks[marks < 10].unique().tolist()
        rows, columns = (canvas > 0).nonzero().unbind(1)
        ink = canvas[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        found = [
            number for number in (classes == digit).nonzero().flatten().tolist()
            if torch.equal(_trimmed(pictures[number, 0]), ink)
        ]  # fmt: skip
        assert found


def _trimmed(picture):
    rows, columns = (picture > 0).nonzero().unbind(1)
    return picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"count": 0}, ValueError, "`count`"),
        ({"count": 1.5}, TypeError, "`count`"),
        ({"size": 7}, ValueError, "`size` must be at least 8"),
        ({"per_canvas": 0}, ValueError, "`per_canvas`"),
        ({"split": "all"}, ValueError, "`split`"),
    ],
    ids=str,
)
def test_what_no_canvas_can_be_made_of(options, kind, says):
    with pytest.raises(kind, match=f"digit_canvases: {says}"):
        digit_canvases(**{"count": 2, **options})


# Folders ----------------------------------------------------------------------------------------------------------


def written(folder, names=("a", "b"), size=(6, 5), mode="P"):
    """Images and masks of random pixels; gives the indices that were written."""
    from PIL import Image

    indices = []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = integers(number, size[1], size[0], 3, below=256).byte()
        Image.frombytes("RGB", size, bytes(pixels.flatten().tolist())).save(folder / "images" / f"{name}.png")
        marks = integers(10 + number, size[1], size[0], below=3).byte()
        marks[0, 0] = 255
        mask = Image.frombytes("L", size, bytes(marks.flatten().tolist()))
        if mode == "P":
            mask = Image.frombytes("P", size, mask.tobytes())
            mask.putpalette([v for v in range(256) for _ in range(3)])
        mask.save(folder / "masks" / f"{name}.png")
        indices.append((pixels, marks))
    return indices


@pytest.mark.parametrize("mode", ["P", "L"])
def test_images_and_masks_are_read_pair_by_pair(tmp_path, mode):
    stored = written(tmp_path / "train", mode=mode)
    x, labels = mask_folder(tmp_path)
    for image, marks, (pixels, indices) in zip(x, labels, stored, strict=True):
        assert torch.equal(image, pixels.movedim(-1, 0).float() / 255)
        assert torch.equal(marks, indices.long().masked_fill(indices == 255, -100))
    assert mask_folder(tmp_path, ignored=None)[1].max() == 255


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_the_indices_that_were_written(tmp_path, bits, size):
    stored = written(tmp_path / "train", size=(4, 4))
    marks = [integers(20 + row, 4, 4, below=2**bits) for row in range(len(stored))]
    for name, indices in zip("ab", marks, strict=True):
        rows = ["".join(f"{index:0{bits}b}" for index in row.tolist()).ljust(8 * -(-bits // 2), "0") for row in indices]
        raw = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
        (tmp_path / f"train/masks/{name}.png").write_bytes(png(4, 4, bits, raw))
    assert torch.equal(mask_folder(tmp_path, size=size)[1], torch.stack(marks))


def png(width, height, bits, raw):
    """A grey PNG of so many bits per pixel."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(raw),
        b"IEND": b"",
    }
    parts = (struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))
             for kind, held in chunks.items())  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_images_beside_masks_are_taken_as_those_of_class_folders(tmp_path):
    from PIL import Image

    (pixels, _), *_ = written(tmp_path / "train", names=("a",))
    path = tmp_path / "train" / "images" / "a.png"
    with Image.open(path) as file:
        image = file.copy()
    image.convert("RGBA").save(path)  # opaque
    assert torch.equal(mask_folder(tmp_path)[0][0], pixels.movedim(-1, 0).float() / 255)
    image.save(path, save_all=True, append_images=[image.rotate(180)])
    with pytest.raises(ValueError, match=r"mask_folder: `.*a.png` has 2 frames"):
        mask_folder(tmp_path)
    clear = Image.new("P", image.size)
    clear.save(path, transparency=0)
    with pytest.raises(ValueError, match=r"mask_folder: `.*a.png` has transparent pixels"):
        mask_folder(tmp_path)


def test_one_size_for_all_scales_masks_to_indices_that_were_there(tmp_path):
    written(tmp_path / "val", names=("a",), size=(6, 5))
    written(tmp_path / "val", names=("b",), size=(8, 9))
    with pytest.raises(ValueError, match=r"mask_folder: .*b.png.*\(9, 8\).*\(5, 6\).*size="):
        mask_folder(tmp_path, "val")
    x, labels = mask_folder(tmp_path, "val", size=4)
    assert (x.shape, labels.shape) == ((2, 3, 4, 4), (2, 4, 4))
    assert set(labels.unique().tolist()) <= {-100, 0, 1, 2}


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mask_folder: there is no folder"):
        mask_folder(tmp_path)
    written(tmp_path / "train")
    (tmp_path / "train" / "masks" / "b.png").rename(tmp_path / "train" / "masks" / "c.png")
    with pytest.raises(FileNotFoundError, match=r"2 names .* not both, such as 'b'"):
        mask_folder(tmp_path)
    (tmp_path / "train" / "masks" / "c.png").rename(tmp_path / "train" / "masks" / "b.png")
    (tmp_path / "train" / "images" / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b.png` cannot be read as an image"):
        mask_folder(tmp_path)
    written(tmp_path / "train")
    (tmp_path / "train" / "images" / "a.png").replace(tmp_path / "train" / "masks" / "a.png")
    written(tmp_path / "other", names=("a",))
    (tmp_path / "other" / "images" / "a.png").replace(tmp_path / "train" / "images" / "a.png")
    with pytest.raises(ValueError, match=r"must be a mask of class indices .* got mode 'RGB'"):
        mask_folder(tmp_path)


# Augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
def test_labels_move_with_their_pixels(padding_mode):
    labels = integers(0, 16, 9, 7, below=200)
    x = labels[:, None] / 255 + 0.1
    shown, marks = random_crop_flip(x, padding=3, padding_mode=padding_mode, labels=labels, generator=generator(1))
    alone = random_crop_flip(x, padding=3, padding_mode=padding_mode, generator=generator(1))
    assert torch.equal(shown, alone)
    there = marks >= 0
    assert torch.equal(shown[:, 0][there], marks[there] / 255 + 0.1)
    assert (shown[:, 0][~there] == 0).all()
    assert there.all() == (padding_mode == "reflect")


def test_labels_of_another_size_are_refused():
    x = uniform(0, 2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"random_crop_flip: `labels` must be .* \(2, 8, 8\), got shape \(2, 8, 7\)"):
        random_crop_flip(x, labels=integers(0, 2, 8, 7, below=3))
    with pytest.raises(TypeError, match="`labels` must be integer class indices"):
        random_crop_flip(x, labels=x[:, 0])
