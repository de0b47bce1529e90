"""Augmentation: every result is one of those allowed, each image draws for itself, draws can be repeated."""

import os
import pickle
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from PIL import Image
from torch.nn.functional import pad
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from perceptual_at.augment import (
    TwoViews,
    auto_augment,
    cutmix,
    cutout,
    random_crop_flip,
    seeded,
    standard,
)
from perceptual_at.data import TensorImages, loader


def numbered(height, width, channels=1):
    """One image in which no two pixels are equal and none is 0."""
    return torch.arange(1, channels * height * width + 1).view(1, channels, height, width)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def crops(image, padding, mode, flips=(False, True)):
    """Slow reference: every result that padding, cropping and mirroring allows, by its bytes."""
    height, width = image.shape[-2:]
    padded = pad(image.double(), (padding,) * 4, mode=mode).to(image.dtype)
    return {
        (crop.flip(-1) if flip else crop).contiguous().numpy().tobytes(): (top, left, flip)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for flip in flips
        for crop in [padded[..., top : top + height, left : left + width]]
    }


# ------------------------------------------------------------------ random_crop_flip


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize(("height", "width", "padding"), [(5, 7, 2), (6, 8, 3)])
def test_every_crop_and_flip_is_one_of_the_padded_image_and_all_are_equally_likely(mode, height, width, padding):
    image = numbered(height, width, channels=2)
    allowed = crops(image, padding, mode)
    options = 2 * (2 * padding + 1) ** 2
    draws = 60 * options
    out = random_crop_flip(image.expand(draws, -1, -1, -1), padding=padding, padding_mode=mode, generator=source())
    found = Counter(one.contiguous().numpy().tobytes() for one in out)
    assert set(found) == set(allowed)
    assert len(allowed) == options
    assert min(found.values()) > 25
    assert max(found.values()) < 110


def test_the_images_of_a_batch_do_not_share_their_crop():
    image = numbered(8, 8)
    out = random_crop_flip(image.expand(32, -1, -1, -1), generator=source())
    assert len(out.unique(dim=0)) > 20
    several = torch.cat([image, image + 1000, image + 2000])
    for before, after in zip(several, random_crop_flip(several, padding_mode="reflect"), strict=True):
        assert before.min() <= after.min() <= after.max() <= before.max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_shape_and_dtype_stay_and_the_input_is_untouched(dtype):
    x = (torch.rand(4, 3, 8, 8) * 255).to(dtype)
    before = x.clone()
    for function in (random_crop_flip, partial(random_crop_flip, padding_mode="reflect"), cutout):
        assert function(x).shape == x.shape
        assert function(x).dtype == dtype
        assert torch.equal(x, before)


def test_nothing_moves_without_padding_and_flip():
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(random_crop_flip(x, padding=0, flip=False), x)
    digit = numbered(8, 8)
    out = random_crop_flip(digit.expand(200, -1, -1, -1), padding=1, flip=False)
    assert {one.contiguous().numpy().tobytes() for one in out} == set(crops(digit, 1, "constant", (False,)))


def test_an_empty_batch_stays_empty():
    for function in (random_crop_flip, cutout):
        assert function(torch.rand(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_gradients_flow_back_to_the_pixels_shown():
    x = torch.rand(16, 1, 6, 6, requires_grad=True)
    out = random_crop_flip(x, padding=2)
    out.sum().backward()
    assert_close(x.grad.sum(dim=(1, 2, 3)), (out != 0).float().sum(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    "function",
    [
        random_crop_flip,
        cutout,
        lambda x, generator: cutmix(x, torch.arange(len(x)), num_classes=8, generator=generator)[0],
        lambda x, generator: seeded(standard(8), generator)(x[0]),
    ],
    ids=["random_crop_flip", "cutout", "cutmix", "seeded"],
)
def test_a_generator_repeats_the_draw_moves_on_and_leaves_the_global_random_state(function):
    x = torch.rand(8, 3, 8, 8)
    before = torch.get_rng_state()
    generator = source(7)
    first, second = function(x, generator=generator), function(x, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(function(x, generator=source(7)), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("function", [random_crop_flip, cutout])
def test_without_a_generator_torchs_global_seed_decides(function):
    x = torch.rand(8, 3, 8, 8)
    torch.manual_seed(3)
    first = function(x)
    torch.manual_seed(3)
    assert torch.equal(function(x), first)
    assert not torch.equal(function(x), first)


# ------------------------------------------------------------------------- cutout


def test_cutout_blackens_a_square_around_any_pixel():
    height, width, length = 5, 6, 4
    allowed = set()
    for row in range(height):
        for column in range(width):
            image = numbered(height, width, channels=2).clone()
            image[..., max(0, row - 2) : row + 2, max(0, column - 2) : column + 2] = 0
            allowed.add(image.numpy().tobytes())
    out = cutout(numbered(height, width, channels=2).expand(3000, -1, -1, -1), length=length, generator=source())
    assert {one.contiguous().numpy().tobytes() for one in out} == allowed


def test_cutout_is_half_the_image_wide_unless_told_otherwise():
    holes = (cutout(torch.ones(500, 1, 32, 32)) == 0).sum(dim=(1, 2, 3))
    assert holes.max() == 16 * 16
    assert holes.min() >= 8 * 8


# ------------------------------------------------------------------------- cutmix


def test_cutmix_takes_a_box_from_the_image_before_and_labels_by_its_share():
    generator, labels = source(), torch.tensor([2, 0, 1])
    base = torch.arange(3.0).view(3, 1, 1, 1)
    for _ in range(20):
        x, soft = cutmix(base.expand(3, 1, 8, 8), labels, num_classes=4, generator=generator)
        for place in range(3):
            share = (x[place] == base[place]).float().mean()
            other = (x[place] == base[place - 1]).float().mean()
            assert_close(share + other, torch.tensor(1.0))
            expected = torch.zeros(4)
            expected[labels[place]] += share
            expected[labels[place - 1]] += other
            assert_close(soft[place], expected)
            box = (x[place, 0] != base[place]).nonzero()
            if len(box):
                sides = box.max(dim=0).values - box.min(dim=0).values + 1
                assert sides.prod() == len(box)
    assert soft.shape == (3, 4)


def test_a_large_alpha_makes_cutmix_cut_half_the_image():
    shares = [
        cutmix(torch.rand(2, 1, 64, 64), torch.tensor([0, 1]), num_classes=2, alpha=1e6, generator=source(s))[1]
        for s in range(20)
    ]
    assert min(soft[0, 0].item() for soft in shares) > 0.45
    spread = [
        cutmix(torch.rand(2, 1, 64, 64), torch.tensor([0, 1]), num_classes=2, generator=source(s))[1][0, 0].item()
        for s in range(60)
    ]
    assert min(spread) < 0.3


# ---------------------------------------------------------------- image transforms


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_the_standard_transform_pads_crops_and_mirrors(mode):
    image = numbered(6, 6)[0].to(torch.uint8)
    allowed = crops(image, 2, mode)
    transform = standard(6, padding=2, padding_mode=mode)
    outs = [transform(image) for _ in range(400)]
    assert all(out.dtype == torch.float32 and out.max() <= 1 for out in outs)
    found = {(out * 255).round().to(torch.uint8).numpy().tobytes() for out in outs}
    assert found <= set(allowed)
    assert len(found) > 40
    still = standard(6, padding=0, flip=False)(image)
    assert_close(still, image / 255)


def test_the_transforms_take_pil_bytes_and_floats_and_give_floats_in_the_unit_range():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=source())
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    for build in (standard, auto_augment):
        outs = [seeded(build(32), source(5))(form) for form in (image, pil, image / 255)]
        for out in outs:
            assert (out.shape, out.dtype) == ((3, 32, 32), torch.float32)
            assert type(out) is torch.Tensor
            assert out.min() >= 0
            assert out.max() <= 1
            assert_close(out, outs[0])


def test_the_images_of_a_data_set_do_not_share_their_crop_in_a_batch():
    images = numbered(8, 8).to(torch.uint8).expand(16, 1, 8, 8).contiguous()
    data = TensorImages(images, torch.zeros(16, dtype=torch.long), transform=standard(8))
    for batches in (loader(data, 16), DataLoader(data, 16)):
        x, _ = next(iter(batches))
        assert len(x.unique(dim=0)) > 8


def test_auto_augment_shows_grey_beyond_the_edges_and_cuts_a_hole_of_half_the_side():
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    transform = seeded(auto_augment(32, padding=0), source())
    outs = torch.stack([transform(white) for _ in range(300)])
    assert_close(outs * 255, (outs * 255).round())
    grey = ((outs * 255).round() == 128).any(dim=1).sum(dim=(1, 2))
    assert (grey > 10).sum() > 20
    holes = (outs == 0).all(dim=1).sum(dim=(1, 2))
    assert (holes >= 8 * 8).all()
    assert holes.mode().values == 16 * 16
    plain = seeded(standard(32, padding=0), source())
    assert not any((plain(white) == 0).any() for _ in range(20))


def test_auto_augment_changes_colours():
    image = 16 * torch.randint(0, 16, (3, 16, 16), dtype=torch.uint8, generator=source())
    allowed = {0, *image.flatten().tolist()}
    transform = seeded(auto_augment(16), source())
    outs = [(transform(image) * 255).round().int().flatten().tolist() for _ in range(50)]
    new = sum(not set(out) <= allowed for out in outs)
    assert new > 10


# -------------------------------------------------------------- two views, seeded


def test_two_views_are_two_draws_from_the_same_input():
    x = torch.rand(4, 3, 8, 8)
    draw = partial(random_crop_flip, generator=source(1))
    x1, x2 = TwoViews(partial(random_crop_flip, generator=source(1)))(x)
    assert torch.equal(x1, draw(x))
    assert torch.equal(x2, draw(x))
    assert not torch.equal(x1, x2)
    assert "TwoViews" in repr(TwoViews(random_crop_flip))


def test_two_views_inside_a_data_set_give_two_batches():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=source())
    data = TensorImages(images, torch.arange(6), transform=TwoViews(standard(8)))
    (x1, x2), labels = next(iter(DataLoader(data, 6)))
    assert x1.shape == x2.shape == (6, 3, 8, 8)
    assert not torch.equal(x1, x2)
    assert labels.tolist() == list(range(6))


def test_a_seeded_transform_without_a_generator_is_the_transform_itself():
    transform = standard(8)
    assert seeded(transform, None) is transform


def test_a_seeded_transform_pickles_for_workers_that_are_spawned():
    image, transform = torch.rand(1, 8, 8), seeded(TwoViews(standard(8)), source(4))
    again = pickle.loads(pickle.dumps(transform))  # with the generator as it stands
    assert torch.equal(torch.stack(again(image)), torch.stack(transform(image)))


class Drawn(Dataset):
    """What a transform draws for each of eight samples."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(torch.zeros(()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_seeded_transform_draws_anew_in_each_worker_and_pass_and_the_same_for_the_same_seeds():
    def passes(seed, transform):
        own = torch.Generator().manual_seed(seed)
        batches = DataLoader(Drawn(transform), 2, num_workers=2, generator=own, multiprocessing_context="fork")
        return [torch.cat(list(batches)).tolist() for _ in range(2)]

    def inherited():
        return seeded(lambda image: image + torch.rand(()), source(4))

    drawn = passes(0, inherited())
    assert len({number for one in drawn for number in one}) == 16
    assert drawn == passes(0, inherited())
    assert drawn != passes(1, inherited())

    def made_there(image):
        return inherited()(image)

    alone = inherited()(torch.zeros(())).item()  # made in the worker it is nobody's copy
    assert passes(0, made_there) == [[alone] * 8] * 2


def test_a_seeded_transform_that_raises_leaves_the_global_random_state():
    def fail(image):
        torch.rand(3)
        raise RuntimeError("no")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        seeded(fail, source())(None)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------- errors

X = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_crop_flip([X]), TypeError, "random_crop_flip: `x` must be a torch.Tensor"),
        (lambda: random_crop_flip(X[0]), ValueError, r"shape \(B, C, H, W\), got \(3, 8, 8\)"),
        (lambda: random_crop_flip(X, padding=-1), ValueError, "`padding` must be at least 0, got -1"),
        (lambda: random_crop_flip(X, padding=1.5), TypeError, "`padding` must be an integer"),
        (lambda: random_crop_flip(X, padding=8, padding_mode="reflect"), ValueError, "below 8 to be reflected"),
        (lambda: random_crop_flip(X, padding_mode="edge"), ValueError, "`padding_mode` must be one of"),
        (lambda: random_crop_flip(X, generator=3), TypeError, "`generator` must be a torch.Generator"),
        (lambda: cutout(X[0]), ValueError, "cutout: `x` must be images"),
        (lambda: cutout(X, length=0), ValueError, "cutout: `length` must be at least 1"),
        (lambda: cutmix(X, torch.rand(2), num_classes=2), TypeError, "cutmix: `labels` must be integer"),
        (lambda: cutmix(X, torch.tensor([0, 2]), num_classes=2), ValueError, r"`labels` must lie in \[0, 1\]"),
        (lambda: cutmix(X, torch.tensor([0]), num_classes=2), ValueError, r"shape \(2,\), got shape \(1,\)"),
        (lambda: cutmix(X, torch.tensor([0, 1]), num_classes=2, alpha=0), ValueError, "`alpha` must lie in"),
        (lambda: standard(0), ValueError, "standard: `size` must be at least 1"),
        (lambda: standard(8, padding_mode="edge"), ValueError, "standard: `padding_mode` must be one of"),
        (lambda: auto_augment(8, padding_mode="edge"), ValueError, "auto_augment: `padding_mode` must be"),
        (lambda: standard(8, padding=-1), ValueError, "standard: `padding` must be at least 0, got -1"),
        (lambda: TwoViews(3), TypeError, "TwoViews: `transform` must be callable, got int"),
        (lambda: seeded(3, source()), TypeError, "seeded: `transform` must be callable, got int"),
        (lambda: seeded(standard(8), 3), TypeError, "seeded: `generator` must be a torch.Generator, got int"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_torchvision_the_transforms_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name, call in {
        "standard": lambda: standard(8),
        "auto_augment": lambda: auto_augment(8),
        "cutmix": lambda: cutmix(X, torch.tensor([0, 1]), num_classes=2),
    }.items():
        with pytest.raises(ImportError, match=rf"{name}: torchvision is needed .*pip install torchvision"):
            call()
    assert random_crop_flip(X).shape == cutout(X).shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64], ids=str)
def test_labels_of_every_kind_of_integer_leave_the_image_as_none(dtype):
    x, labels = torch.rand(8, 1, 6, 6), torch.full((8, 6, 6), 3).to(dtype)
    _, moved = random_crop_flip(x, labels=labels, generator=torch.Generator().manual_seed(0))
    assert moved.dtype == torch.int64
    assert set(moved.unique().tolist()) == {-100, 3}
