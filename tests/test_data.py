"""Data sets: what is read, what is served, how it is split, and what is refused."""

import gzip
import hashlib
import pickle
import sys
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision import datasets

from perceptual_at.data import (
    ImageFiles,
    TensorImages,
    channel_statistics,
    cifar10,
    cifar100,
    digits,
    hold_out,
    image_folder,
    loader,
    npz_images,
    tiny_imagenet,
)


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_image(path, image, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, kind)


# ------------------------------------------------------------------------- digits


def test_digits_are_float_images_in_the_unit_range():
    x, labels = digits("all")
    assert x.shape == (1797, 1, 8, 8)
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert labels[:10].tolist() == list(range(10))
    assert torch.equal(x * 16, (x * 16).round())


def test_the_splits_of_digits_share_no_image_and_cover_all():
    parts = [digits(split) for split in ("train", "validation", "test")]
    assert [len(labels) for _, labels in parts] == [1257, 180, 360]

    def in_order(x):
        return sorted(x.flatten(1).tolist())

    whole = digits("all")[0]
    assert len(whole.unique(dim=0)) == len(whole)  # so that equal images cannot hide a sample in two parts
    assert in_order(torch.cat([x for x, _ in parts])) == in_order(whole)


def test_every_split_of_digits_has_the_same_share_of_each_class():
    shares = digits("all")[1].bincount() / 1797
    for split in ("train", "validation", "test"):
        labels = digits(split)[1]
        assert ((labels.bincount() - shares * len(labels)).abs() <= 1.5).all()


def test_digits_are_split_alike_for_one_seed_and_otherwise_for_another():
    assert torch.equal(digits("test", seed=3)[0], digits("test", seed=3)[0])
    assert not torch.equal(digits("test", seed=3)[0], digits("test", seed=4)[0])
    before = torch.get_rng_state()
    digits("train")
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_refuse_a_split_they_do_not_have_and_name_what_to_install(monkeypatch):
    with pytest.raises(ValueError, match="digits: `split` must be one of 'train', 'validation', 'test', 'all'"):
        digits("val")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"digits: .*pip install scikit-learn"):
        digits()


# ------------------------------------------------------------------- images in memory


def test_stored_bytes_are_served_in_the_unit_range_one_by_one_and_in_batches():
    images, labels = pixels(5, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0], dtype=torch.int32)
    data = TensorImages(images, labels)
    image, label = data[1]
    assert_close(image, images[1] / 255)
    assert (label, type(label), image.dtype) == (1, int, torch.float32)
    assert data[-1][1] == 0
    for index, rows in [
        (slice(1, 4), [1, 2, 3]),
        ([4, 0], [4, 0]),
        (torch.tensor([2, 2]), [2, 2]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        (slice(None), [0, 1, 2, 3, 4]),
        ([True, False, False, True, False], [0, 3]),
        (np.array([4, 1]), [4, 1]),
        ([], []),
    ]:
        x, y = data[index]
        assert_close(x, images[rows] / 255)
        assert_close(y, labels[rows].long())
    assert_close(data[torch.tensor(3)][0], images[3] / 255)
    assert len(data) == 5
    assert "5 images (3, 4, 4), uint8" in repr(data)


def test_floating_point_images_are_served_as_they_are():
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(TensorImages(x, torch.tensor([0, 1]))[:][0], x)


def test_a_transform_sees_each_stored_image_by_itself_also_in_a_batch():
    seen = []

    def transform(image):
        seen.append((tuple(image.shape), image.dtype))
        return image // 2

    images = pixels(4, 1, 2, 2)
    data = TensorImages(images, torch.zeros(4, dtype=torch.long), transform=transform, classes=["only"])
    x, labels = data[[3, 1]]
    assert seen == [((1, 2, 2), torch.uint8)] * 2
    assert_close(x, (images[[3, 1]] // 2) / 255)
    assert labels.shape == (2,)
    plain = data.with_transform(None)
    assert plain.images.data_ptr() == data.images.data_ptr()
    assert plain.classes == ("only",)
    assert_close(plain[0][0], images[0] / 255)


def test_two_views_of_each_image_come_out_as_two_batches():
    data = TensorImages(pixels(4, 1, 2, 2), torch.arange(4), transform=lambda image: (image, 255 - image))
    for batches in (loader(data, 2), DataLoader(data, 2)):
        (x1, x2), labels = next(iter(batches))
        assert x1.shape == (2, 1, 2, 2)
        assert_close(x1 + x2, torch.ones_like(x1))
        assert labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (np.zeros((2, 1, 4, 4)), [0, 1], TypeError, "`images` must be a torch.Tensor"),
        (torch.zeros(2, 4, 4), [0, 1], ValueError, r"shape \(N, C, H, W\), got \(2, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), [0, 1], TypeError, "uint8 or floating point, got torch.int64"),
        (torch.full((2, 1, 4, 4), 255.0), [0, 1], ValueError, r"in \[0, 1\], got values from 255 to 255. Divide"),
        (torch.full((2, 1, 4, 4), -0.1), [0, 1], ValueError, "leave normalisation to the model"),
        (torch.full((2, 1, 4, 4), float("nan")), [0, 1], ValueError, r"in \[0, 1\], got values from nan"),
        (torch.zeros(2, 1, 4, 4), [0.0, 1.0], TypeError, "`labels` must be integer class indices"),
        (torch.zeros(2, 1, 4, 4), [0, 1, 2], ValueError, r"`labels` must be .* got shape \(3,\)"),
        (torch.zeros(2, 1, 4, 4), [0, 5], ValueError, r"`labels` must lie in \[0, 1\]"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, error, message):
    with pytest.raises(error, match=f"TensorImages: .*{message}"):
        TensorImages(images, torch.tensor(labels), classes=["cat", "dog"])


def test_an_index_out_of_range_and_a_transform_that_gives_no_tensor_are_refused():
    data = TensorImages(pixels(2, 1, 4, 4), torch.tensor([0, 1]), transform=lambda image: "image")
    with pytest.raises(IndexError, match="index 2 is out of range for 2 images"):
        data[2]
    with pytest.raises(TypeError, match="`transform` must give tensors, got str"):
        data[0]


# ------------------------------------------------------------------------- loader


def test_the_loader_gives_the_batches_of_a_data_loader():
    data = TensorImages(pixels(7, 1, 2, 2), torch.arange(7))
    for options in ({}, {"drop_last": True}):
        ours, theirs = list(loader(data, 3, **options)), list(DataLoader(data, 3, **options))
        assert len(loader(data, 3, **options)) == len(theirs) == len(ours)
        for (x, labels), (other_x, other_labels) in zip(ours, theirs, strict=True):
            assert_close(x, other_x)
            assert_close(labels, other_labels)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(0, 40, 2))])
def test_the_loader_shuffles_by_its_generator_and_shows_every_sample_once(wrap):
    data = wrap(TensorImages(pixels(40, 1, 2, 2), torch.arange(40)))

    def passes(seed):
        batches = loader(data, 6, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [torch.cat([labels for _, labels in batches]).tolist() for _ in range(2)]

    first, second = passes(0)
    assert [first, second] == passes(0)
    assert passes(1)[0] != first != second
    assert sorted(first) == sorted(data[i][1] for i in range(len(data)))


@pytest.mark.parametrize(
    "data",
    [
        TensorImages(pixels(7, 1, 2, 2), torch.arange(7)),
        Subset(TensorImages(pixels(9, 1, 2, 2), torch.arange(9)), range(1, 8)),
        TensorDataset(torch.rand(7, 2), torch.arange(7)),
        ConcatDataset([TensorDataset(torch.rand(n, 2), torch.arange(n)) for n in (3, 4)]),
    ],
    ids=["images", "subset", "tensors", "one by one"],
)
def test_what_rebuilds_a_loader_from_its_parts_gets_the_same_batches(data):
    def draw():
        return loader(data, 3, shuffle=True, generator=torch.Generator().manual_seed(0))

    expected, given = [labels.tolist() for _, labels in draw()], draw()
    parts = {name: getattr(given, name) for name in ("batch_sampler", "collate_fn", "generator")}
    assert [labels.tolist() for _, labels in DataLoader(given.dataset, **parts)] == expected
    prepared = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(draw())
    assert len(prepared) == 3
    assert [labels.tolist() for _, labels in prepared] == expected
    assert len(prepared.dataset) == 7
    assert prepared.dataset[0][1] == data[0][1]


def test_reading_in_order_leaves_the_global_random_state():
    data = TensorDataset(torch.rand(5, 2), torch.arange(5))
    before = torch.get_rng_state()
    assert torch.cat([labels for _, labels in loader(data, 2)]).tolist() == list(range(5))
    list(loader(data, 2, shuffle=True, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loader_refuses_a_generator_without_effect_and_empty_batches():
    data = TensorImages(pixels(2, 1, 2, 2), torch.arange(2))
    with pytest.raises(ValueError, match="loader: `generator` has no effect without `shuffle=True`"):
        loader(data, 2, generator=torch.Generator())
    with pytest.raises(ValueError, match="loader: `batch_size` must be at least 1"):
        loader(data, 0)


# ------------------------------------------------------------------------- hold_out


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=60),
    st.integers(0, 1000),
    st.integers(0, 2**31),
)
def test_a_held_out_part_is_disjoint_complete_exact_and_stratified(classes, draw, seed):
    labels = torch.tensor(classes)
    held = 1 + draw % (len(labels) - 1)
    places = torch.arange(len(labels))
    (rest, rest_labels), (kept, kept_labels) = hold_out((places, labels), held, seed=seed)
    assert len(kept) == held
    assert torch.equal(torch.cat([rest, kept]).sort().values, places)
    assert torch.equal(labels[rest], rest_labels)
    assert torch.equal(rest, rest.sort().values)
    expected = labels.bincount(minlength=4) * held / len(labels)
    assert ((kept_labels.bincount(minlength=4) - expected).abs() < 1).all()


def test_the_same_seed_holds_out_the_same_samples_and_leaves_the_global_random_state():
    data = torch.arange(100), torch.arange(100) % 5
    before = torch.get_rng_state()
    assert torch.equal(hold_out(data, 0.2, seed=1)[1][0], hold_out(data, 20, seed=1)[1][0])
    assert not torch.equal(hold_out(data, 0.2, seed=1)[1][0], hold_out(data, 0.2, seed=2)[1][0])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_of_a_class_can_be_held_out():
    data = torch.arange(10), torch.zeros(10, dtype=torch.long)
    seen = {place for seed in range(40) for place in hold_out(data, 3, seed=seed)[1][0].tolist()}
    assert seen == set(range(10))


def test_data_sets_are_split_as_what_they_are():
    labels = torch.arange(20) % 2
    images = TensorImages(pixels(20, 1, 2, 2), labels, transform=lambda image: image, classes=["a", "b"])
    rest, held = hold_out(images, 6)
    assert isinstance(held, TensorImages)
    assert held.labels.bincount().tolist() == [3, 3]
    assert held.transform is images.transform
    assert held.classes == ("a", "b")

    class Targets(torch.utils.data.Dataset):
        targets = labels.tolist()

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return index, self.targets[index]

    class Unlabelled(Targets):
        targets = None

        def __getitem__(self, index):
            return index, 0

    for data in (TensorDataset(torch.arange(20), labels), Targets(), Subset(Targets(), range(2, 20))):
        rest, held = hold_out(data, 6)
        assert isinstance(held, Subset)
        assert sum(int(label) for _, label in held) == 3
        assert {int(x) for x, _ in held}.isdisjoint(int(x) for x, _ in rest)
    rest, held = hold_out(Unlabelled(), 6)
    assert (len(rest), len(held)) == (14, 6)


@pytest.mark.parametrize(
    ("data", "amount", "error", "message"),
    [
        ((torch.arange(4), torch.arange(4)), 0, ValueError, "holds out 0 of 4 samples"),
        ((torch.arange(4), torch.arange(4)), 4, ValueError, "holds out 4 of 4 samples"),
        ((torch.arange(4), torch.arange(4)), 0.01, ValueError, "holds out 0 of 4 samples"),
        ((torch.arange(4), torch.arange(4)), 1.0, ValueError, r"`amount` must lie in \(0, 1\), got 1.0"),
        ((torch.arange(4), torch.arange(4)), True, TypeError, "`amount` must be a fraction"),
        ((torch.arange(4), torch.rand(4)), 2, TypeError, "`labels` must be integer class indices"),
        ((torch.arange(4),), 2, ValueError, r"pair `\(x, labels\)`, got a tuple of 1"),
        (3, 2, TypeError, "pair of tensors or a data set with a length, got int"),
    ],
)
def test_splits_that_leave_nothing_or_of_nothing_are_refused(data, amount, error, message):
    with pytest.raises(error, match=f"hold_out: .*{message}"):
        hold_out(data, amount)


# --------------------------------------------------------------- channel statistics


def test_channel_statistics_are_the_mean_and_deviation_over_all_pixels():
    images = pixels(2050, 3, 4, 4)  # more than two chunks
    mean, std = channel_statistics(images)
    exact = images.double() / 255
    assert_close(torch.tensor(mean), exact.mean(dim=(0, 2, 3)), check_dtype=False)
    assert_close(torch.tensor(std), exact.std(dim=(0, 2, 3), correction=0), check_dtype=False)
    data = TensorImages(exact, torch.zeros(2050, dtype=torch.long), transform=lambda image: image * 0)
    assert_close(torch.tensor(channel_statistics(data)[0]), torch.tensor(mean))
    with pytest.raises(ValueError, match="channel_statistics: `images` must have shape"):
        channel_statistics(images[0])


# --------------------------------------------------------------------------- CIFAR


def fake_cifar(root, monkeypatch, kind, per_file=3):
    """A folder in CIFAR's layout with random images, whose checksums torchvision is told to expect."""
    folder = root / kind.base_folder
    folder.mkdir()
    fine = kind is datasets.CIFAR100
    expected = {}
    for place, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        images = pixels(per_file, 3, 32, 32, seed=place)
        labels = [place, 1, 2]
        batch = {"data": images.flatten(1).numpy(), ("fine_labels" if fine else "labels"): labels}
        (folder / name).write_bytes(pickle.dumps(batch))
        expected[name] = images, labels
    meta = {kind.meta["key"]: [f"class {number}" for number in range(100 if fine else 10)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))

    def checksums(files):
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in files]

    monkeypatch.setattr(kind, "train_list", checksums(kind.train_list))
    monkeypatch.setattr(kind, "test_list", checksums(kind.test_list))
    meta_md5 = checksums([[kind.meta["filename"], None]])[0][1]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta_md5})
    return folder, expected


@pytest.mark.parametrize(("read", "kind"), [(cifar10, datasets.CIFAR10), (cifar100, datasets.CIFAR100)])
def test_cifar_is_read_from_torchvisions_layout(tmp_path, monkeypatch, read, kind):
    _, expected = fake_cifar(tmp_path, monkeypatch, kind)
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        data = read(tmp_path, split)
        assert torch.equal(data.images, torch.cat([expected[name][0] for name, _ in files]))
        assert data.labels.tolist() == [label for name, _ in files for label in expected[name][1]]
        assert data.images.is_contiguous()
        assert data.classes[0] == "class 0"
    assert read(str(tmp_path), "test", transform=lambda image: image * 0)[0][0].sum() == 0


def test_the_warning_that_new_numpy_gives_about_the_old_files_is_not_passed_on(tmp_path, monkeypatch):
    folder, expected = fake_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    name = datasets.CIFAR10.test_list[0][0]
    old = (folder / name).read_bytes().replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # False, True as 0, 1
    assert old != (folder / name).read_bytes()
    (folder / name).write_bytes(old)
    md5 = hashlib.md5(old).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[name, md5]])
    assert torch.equal(cifar10(tmp_path, "test").images, expected[name][0])


def test_absent_cifar_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        cifar10(tmp_path)
    for part in ("cifar10: ", str(tmp_path), "cifar-10-batches-py", "data_batch_1", "batches.meta", "MD5", "kriz"):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match="`cifar-100-python`"):
        cifar100(tmp_path, "test")


def test_a_download_that_fails_says_what_to_put_where(tmp_path, monkeypatch):
    def fail(self):
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched .*no route to host.*Put the folder"):
        cifar10(tmp_path, download=True)


def test_incomplete_and_damaged_cifar_is_refused_before_anything_is_unpickled(tmp_path, monkeypatch):
    folder, _ = fake_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    (folder / "data_batch_2").write_bytes((folder / "data_batch_2").read_bytes()[:1000])
    monkeypatch.setattr(pickle, "load", lambda *call, **options: pytest.fail("a damaged file was unpickled"))
    with pytest.raises(ValueError, match=r"cifar10: .*data_batch_2` is damaged, or belongs to another data set"):
        cifar10(tmp_path)
    (folder / "data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_1` is missing"):
        cifar10(tmp_path)


def test_cifar_refuses_other_splits_and_names_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cifar10: `split` must be one of 'train', 'test', got 'validation'"):
        cifar10(tmp_path, "validation")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for read in (cifar10, cifar100):
        with pytest.raises(ImportError, match=r"torchvision is needed .*pip install torchvision"):
            read(tmp_path)


# -------------------------------------------------------------------- image folders


def fake_folder(root, split, classes=("cat", "dog"), per_class=2, size=8):
    """Lossless images in class folders; returns them in the order of their paths."""
    images = []
    for place, name in enumerate(classes):
        for number in range(per_class):
            images.append(pixels(3, size, size, seed=100 * place + number))
            write_image(root / split / name / f"{number}.png", images[-1])
    return torch.stack(images)


def test_an_image_folder_is_read_exactly(tmp_path):
    images = fake_folder(tmp_path, "train")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    with pytest.warns(UserWarning, match=r"left out 1 entries of .*train`: 1 not called an image .*notes\.txt"):
        data = image_folder(tmp_path)
    assert torch.equal(data.images, images)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.classes == ("cat", "dog")
    fake_folder(tmp_path, "held back", per_class=1)
    assert len(image_folder(str(tmp_path), "held back", transform=lambda image: image)) == 2


def test_grey_images_become_colour_images(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "train" / name / "0.png", pixels(3, 4, 4))
    grey = pixels(4, 4)
    Image.fromarray(grey.numpy()).save(tmp_path / "train" / "cat" / "1.png")
    assert torch.equal(image_folder(tmp_path).images[1], grey.expand(3, 4, 4))


def test_images_are_scaled_and_cropped_to_one_size(tmp_path):
    plain = torch.full((3, 8, 24), 7, dtype=torch.uint8)
    plain[:, :, 8:16] = 200  # the middle
    write_image(tmp_path / "train" / "cat" / "0.png", plain)
    square = pixels(3, 4, 4)
    write_image(tmp_path / "train" / "dog" / "0.png", square)
    with pytest.raises(ValueError, match=r"differ in size: .*dog.*4 x 4 pixels.* has 8 x 24. Give one `size=`"):
        image_folder(tmp_path)
    data = image_folder(tmp_path, size=4)
    assert data.images.shape == (2, 3, 4, 4)
    assert torch.equal(data.images[1], square)
    assert (data.images[0][:, :, 1:3] == 200).all()
    with pytest.raises(ValueError, match="image_folder: `size` must be at least 1"):
        image_folder(tmp_path, size=0)


def test_folders_with_other_classes_than_the_training_folder_are_refused(tmp_path):
    fake_folder(tmp_path, "train", classes=("bird", "cat", "dog"))
    fake_folder(tmp_path, "test", classes=("cat", "dog"))
    with pytest.raises(ValueError, match=r"test` has 2 classes but .*train` has 3.*differing: bird"):
        image_folder(tmp_path, "test")


def test_missing_empty_and_foreign_folders_are_refused(tmp_path):
    fake_folder(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"no folder 'test' in .*it holds 'train'"):
        image_folder(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="it is empty, missing or no folder"):
        image_folder(tmp_path / "elsewhere")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is no folder of class folders"):
        image_folder(tmp_path, "flat")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        image_folder(tmp_path)


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda content: b"<html>not found</html>"])
def test_truncated_and_foreign_images_are_refused_by_name(tmp_path, damage):
    fake_folder(tmp_path, "train")
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"image_folder: .*dog.1\.png` cannot be read as an image"):
        image_folder(tmp_path)


def test_without_torchvision_image_folders_say_what_to_install(tmp_path, monkeypatch):
    fake_folder(tmp_path, "train")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"image_folder: pillow is needed .*pip install pillow"):
        image_folder(tmp_path)


# -------------------------------------------------------------------- Tiny-ImageNet

WNIDS = ("n02", "n01", "n03")  # not in order, as in the real wnids.txt
PART = {"classes": 3, "images_per_class": 2}


def fake_tiny(root, kind="JPEG"):
    """The real layout with three classes of two images; returns the validation images' classes by file."""
    for name in WNIDS:
        for number in range(2):
            path = root / "train" / name / "images" / f"{name}_{number}.JPEG"
            write_image(path, torch.full((3, 64, 64), 40 * int(name[1:]), dtype=torch.uint8), kind)
        (root / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t63\t63\n")
    labelled = {f"val_{number}.JPEG": WNIDS[number % 3] for number in range(6)}
    for file, name in labelled.items():
        write_image(root / "val" / "images" / file, torch.full((3, 64, 64), 40 * int(name[1:]), dtype=torch.uint8))
    lines = [f"{file}\t{name}\t0\t0\t63\t63" for file, name in labelled.items()]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return labelled


def check_tiny(data):
    assert data.classes == ("n01", "n02", "n03")
    assert data.labels.bincount().tolist() == [2, 2, 2]
    assert data.images.shape == (6, 3, 64, 64)
    shade = data.images.float().mean(dim=(1, 2, 3))
    assert_close(shade, 40.0 * (data.labels + 1), rtol=0, atol=1)


@pytest.mark.parametrize("below", [False, True])
def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path, below):
    root = tmp_path / "tiny-imagenet-200" if below else tmp_path
    fake_tiny(root)
    before = sorted(tmp_path.rglob("*"))
    for split in ("train", "test"):
        check_tiny(tiny_imagenet(tmp_path, split, **PART))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("inner", ["", "images"])
def test_tiny_imagenet_sorted_into_class_folders_is_read_as_well(tmp_path, inner):
    labelled = fake_tiny(tmp_path)
    for file, name in labelled.items():
        folder = tmp_path / "val" / name / inner
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / "images" / file).rename(folder / file)
    (tmp_path / "val" / "images").rmdir()
    check_tiny(tiny_imagenet(tmp_path, "test", **PART))


def test_all_two_hundred_classes_and_all_their_images_are_demanded(tmp_path):
    fake_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"holds 3 classes, expected 200.*Unpack the archive"):
        tiny_imagenet(tmp_path)
    with pytest.raises(ValueError, match=r"class 'n01' in .*train` has 2 images, expected 500"):
        tiny_imagenet(tmp_path, classes=3)
    with pytest.raises(ValueError, match=r"class 'n01' in .*val` has 2 images, expected 50"):
        tiny_imagenet(tmp_path, "test", classes=3)
    next((tmp_path / "train" / "n03" / "images").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"class 'n03' in .*train` has 1 images, expected 2"):
        tiny_imagenet(tmp_path, **PART)


def test_validation_images_without_their_classes_are_refused(tmp_path):
    fake_tiny(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text.replace("\t", " "))
    with pytest.raises(ValueError, match=r"line 1 of .*val_annotations\.txt` must hold a file name and a class"):
        tiny_imagenet(tmp_path, "test", **PART)
    annotations.write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"0 images are missing, 1 have no class \(such as 'val_0.JPEG'\)"):
        tiny_imagenet(tmp_path, "test", **PART)
    annotations.write_text(text + "val_9.JPEG\tn01\t0\t0\t63\t63\n")
    with pytest.raises(ValueError, match=r"1 images are missing, 0 have no class"):
        tiny_imagenet(tmp_path, "test", **PART)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds `images` but no `val_annotations\.txt`"):
        tiny_imagenet(tmp_path, "test", **PART)


def test_validation_classes_that_are_not_those_of_training_are_refused(tmp_path):
    fake_tiny(tmp_path)
    (tmp_path / "train" / "n02").rename(tmp_path / "train" / "n09")
    with pytest.raises(ValueError, match=r"are not those of .*train` \(2 differ\)"):
        tiny_imagenet(tmp_path, "test", **PART)


def test_absent_tiny_imagenet_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no folder `train`. Unpack `tiny-imagenet-200.zip`"):
        tiny_imagenet(tmp_path)
    with pytest.raises(ValueError, match="tiny_imagenet: `split` must be one of 'train', 'test', got 'val'"):
        tiny_imagenet(tmp_path, "val")


def test_a_tiny_imagenet_image_of_another_size_is_refused(tmp_path):
    fake_tiny(tmp_path)
    write_image(tmp_path / "train" / "n02" / "images" / "n02_1.JPEG", pixels(3, 32, 32), "JPEG")
    with pytest.raises(ValueError, match=r"n02_1.JPEG` has 32 x 32 pixels.*does not belong here"):
        tiny_imagenet(tmp_path, **PART)


# ------------------------------------------------------------------- NumPy archives


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
def test_a_numpy_archive_is_read_in_each_layout(tmp_path, layout):
    images = pixels(4, 1 if layout == "NHW" else 3, 6, 5)
    stored = {"NCHW": images, "NHWC": images.permute(0, 2, 3, 1), "NHW": images[:, 0]}[layout].numpy()
    path = tmp_path / "images.npz"
    np.savez(path, x_test=stored, y_test=np.array([3, 1, 2, 0], dtype=np.uint8))
    data = npz_images(path, "test")
    assert torch.equal(data.images, images)
    assert data.labels.tolist() == [3, 1, 2, 0]
    assert data.images.is_contiguous()


def test_numpy_archives_that_are_absent_incomplete_or_damaged_are_refused(tmp_path):
    path = tmp_path / "images.npz"
    with pytest.raises(FileNotFoundError, match=r"npz_images: there is no file .*images\.npz"):
        npz_images(path)
    np.savez(path, x_test=np.zeros((1, 1, 2, 2), dtype=np.uint8), y_test=np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match=r"must hold the arrays 'x_train' and 'y_train'.*holds 'x_test', 'y_test'"):
        npz_images(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"npz_images: .*is it damaged"):
        npz_images(path, "test")
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"npz_images: .*is it damaged"):
        npz_images(path, "test")


@pytest.mark.parametrize("kind", ["npy", "pickle", "safetensors", "npy.gz"])
def test_what_is_no_numpy_archive_is_named_as_such(tmp_path, kind):
    path, images = tmp_path / f"images.{kind}", np.zeros((2, 1, 2, 2), dtype=np.uint8)
    if kind == "npy":
        np.save(path, images)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"x_train": images}))
    elif kind == "safetensors":
        path.write_bytes((2).to_bytes(8, "little") + b"{}")
    else:
        path.write_bytes(gzip.compress(images.tobytes()))
    with pytest.raises(ValueError, match=r"^npz_images: `.*` is no archive as `numpy\.savez` writes it") as caught:
        npz_images(path)
    assert "unsafe" not in str(caught.value)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_that_are_texts_are_refused_with_what_numbers_them(tmp_path, kind):
    names = np.array(["cat", "dog"], dtype=kind)
    np.savez(tmp_path / "images.npz", x_train=np.zeros((2, 1, 2, 2), dtype=np.uint8), y_train=names)
    with pytest.raises(ValueError, match=r"'y_train' .* not numbers .*return_inverse=True\)\[1\]` numbers texts"):
        npz_images(tmp_path / "images.npz")


def test_without_numpy_archives_say_what_to_install_and_the_rest_works(tmp_path, monkeypatch):
    rows, before = ImageFiles(["a.png", "b.png"], torch.tensor([0, 1]), size=4), []
    before.append(rows.fingerprint())
    monkeypatch.setitem(sys.modules, "numpy", None)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda *args, **options: pytest.fail("needs NumPy"))
    with pytest.raises(ImportError, match=r"^npz_images: numpy is needed to read its archives .* `pip install numpy`"):
        npz_images(tmp_path / "images.npz")
    assert rows.fingerprint() == before[0]


def test_nothing_in_a_numpy_archive_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("something was unpickled",))

    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.array([Bomb()], dtype=object), y_train=np.zeros(1, dtype=np.int64))
    assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"npz_images: .*is it damaged"):
        npz_images(path)


# Numbers of NumPy, and what a function is given ---------------------------------------------------------------------


def test_rows_may_be_numbered_by_numpy():
    dataset = TensorImages(torch.rand(6, 1, 2, 2), torch.arange(6))
    image, label = dataset[np.int64(-2)]
    assert label == 4
    assert torch.equal(image, dataset.images[4])
    subset = Subset(dataset, np.array([5, 0]))  # as of sklearn's train_test_split
    assert subset[0][1] == 5
    assert next(iter(DataLoader(subset, 2)))[1].tolist() == [5, 0]
    assert next(iter(loader(subset, np.int64(2))))[1].tolist() == [5, 0]
    pair = (dataset.images, dataset.labels % 2)
    for amount, seed in [(np.int64(2), np.int64(3)), (np.float32(1 / 3), 3), (torch.tensor(2), torch.tensor(3))]:
        assert torch.equal(hold_out(pair, amount, seed=seed)[1][0], hold_out(pair, 2, seed=3)[1][0])


def test_rows_of_image_files_may_be_a_mask():
    files = ImageFiles(["a.png", "b.png", "c.png"], torch.tensor([0, 1, 2]), size=8)
    chosen = files.rows(torch.tensor([True, False, True]))
    assert [chosen.name(row) for row in range(2)] == ["a.png", "c.png"]
    assert chosen.labels.tolist() == [0, 2]


IMAGES, CLASSES = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: TensorImages(IMAGES, CLASSES, transform="flip"), TypeError, "TensorImages: `transform`"),
        (lambda: TensorImages(IMAGES, CLASSES, classes="ab"), TypeError, "TensorImages: `classes` must be a list"),
        (lambda: cifar10("nowhere", transform=3), TypeError, "cifar10: `transform` must be a function"),
        (lambda: cifar10("nowhere", download="no"), TypeError, "cifar10: `download` must be True or False"),
        (lambda: cifar10(None), TypeError, "cifar10: `root` must be a path"),
        (lambda: image_folder("nowhere", transform=3), TypeError, "image_folder: `transform` must be a function"),
        (lambda: image_folder("nowhere", size=(8, 8, 8)), ValueError, "image_folder: `size` must be one side"),
        (lambda: image_folder("nowhere", size=2.5), TypeError, "image_folder: `size` must be an integer"),
        (lambda: loader((IMAGES, CLASSES), 2), TypeError, "loader: `dataset` must be .* TensorDataset"),
        (lambda: loader(TensorImages(IMAGES, CLASSES), 2, shuffle="no"), TypeError, "loader: `shuffle` must be True"),
        (lambda: loader(TensorImages(IMAGES, CLASSES), 2, shuffle=True, generator=1), TypeError, "loader: `generator`"),
        (lambda: loader(TensorImages(IMAGES[:0], CLASSES[:0]), 2, shuffle=True), ValueError, "`dataset` is empty"),
        (lambda: hold_out((IMAGES, CLASSES), 2, seed="a"), TypeError, "hold_out: `seed` must be an integer"),
        (lambda: channel_statistics((IMAGES * 255).int()), TypeError, "channel_statistics: `images` must be uint8"),
        (lambda: ImageFiles(["a"], torch.tensor([0.5]), size=8), TypeError, "ImageFiles: `labels` must be integer"),
        (lambda: ImageFiles(["a"], torch.tensor([1]), size=8, classes=["x"]), ValueError, "ImageFiles: `labels`"),
        (lambda: ImageFiles(["a"], torch.tensor([1]), size=8, places=torch.tensor([[1, 0, 9]])), ValueError,
         "ImageFiles: `places` must name one of 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_anything_is_read(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_labels_and_pixels_of_any_machine_are_read(tmp_path):
    np = pytest.importorskip("numpy")
    for place, kind in enumerate(("u2", "u4", "u8", ">i4", ">u2", "i1")):
        path = tmp_path / f"{place}.npz"
        np.savez(path, x_train=np.full((3, 2, 2), 0.5, dtype=">f8"), y_train=np.array([0, 2, 1], dtype=kind))
        data = npz_images(path)
        assert data.labels.tolist() == [0, 2, 1]
        assert data.labels.dtype == torch.int64
        assert data.images.unique().tolist() == [0.5]
    np.savez(path, x_train=np.zeros((3, 2, 2), dtype=np.longdouble), y_train=np.arange(3))
    with pytest.raises(ValueError, match=r"^npz_images: 'x_train' .* not numbers of up to 64 bits"):
        npz_images(path)


def test_labels_of_any_integer_type_are_split_and_named():
    labels = (torch.arange(40) % 4).to(torch.uint16)
    (_, rest), (_, held) = hold_out((torch.zeros(40, 1), labels), 8)
    assert held.long().bincount().tolist() == [2, 2, 2, 2]
    assert rest.dtype == torch.uint16
    data = TensorImages(torch.zeros(40, 1, 2, 2), labels, classes=list("abcd"))
    assert data.labels.dtype == torch.int64
    assert ImageFiles(["a.png"] * 40, labels, size=8, classes=list("abcd")).labels.dtype == torch.int64


def test_an_archive_is_named_with_what_is_wrong_in_it(tmp_path):
    np.savez(tmp_path / "far.npz", x_train=np.full((2, 2, 2), 3.5), y_train=np.arange(2))
    with pytest.raises(ValueError, match=r"^npz_images: .*'x_train'.*far.npz`: floating-point `images` must"):
        npz_images(tmp_path / "far.npz")
    np.savez(tmp_path / "soft.npz", x_train=np.zeros((2, 2, 2)), y_train=np.zeros(2))
    with pytest.raises(TypeError, match=r"^npz_images: .*soft.npz`: `labels` must be integer"):
        npz_images(tmp_path / "soft.npz")
    with pytest.raises(ValueError, match="npz_images: `layout` must be one of"):
        npz_images(tmp_path / "far.npz", layout="last")


def test_all_digits_have_no_seed():
    with pytest.raises(ValueError, match="digits: `seed`=1 has no effect with `split`='all'"):
        digits("all", seed=1)
