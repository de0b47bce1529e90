"""Public functions around training with one argument wrong at a time: an error in the function's name, or none."""

import contextlib
import functools
import inspect
import io
import math
import os
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perceptual_at import augment, averaging, checkpoints, class_predictions, data, memories, models, schedules
from perceptual_at import weight_perturbation as perturbation
from perceptual_at.attacks import pgd
from perceptual_at.data import TensorImages
from perceptual_at.gradient_revision import revise
from perceptual_at.objectives.cure import cure_gradients
from perceptual_at.threats import Linf

FOUR = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(autouse=True, scope="module")
def elsewhere(tmp_path_factory):
    """Some of what is wrong elsewhere is a fine name for a file."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    yield
    os.chdir(before)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


@functools.cache
def folder():
    """Images in class folders and in an archive."""
    import tempfile

    place = tempfile.TemporaryDirectory()
    root = Path(place.name)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.pgm").write_bytes(b"P5 4 4 255\n" + bytes(range(16)))
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    np.savez(root / "a.npz", x_train=pixels, y_train=np.arange(3), x_test=pixels, y_test=np.arange(3))
    checkpoints.save_weights(root / "net.safetensors", net())
    return place


def root():
    return folder().name


def loss_of(model):
    return lambda: model(torch.ones(2, 3)).square().sum()


def moved(model):
    return perturbation.ascend(model, loss_of(model))


# Every function with right arguments, made anew for each call: `model` first where others depend on it.
CALLS = {
    averaging.snapshot: lambda: {"model": net()},
    averaging.ema_update: lambda: {"average": averaging.snapshot(net()), "model": net(), "decay": 0.5},
    averaging.swa_update: lambda: {"average": averaging.snapshot(net()), "model": net(), "count": 1},
    averaging.refresh_batch_norm: lambda: {
        "model": net(), "weights": averaging.snapshot(net()), "batches": [torch.rand(4, 3)]},
    memories.ensemble_update: lambda: {
        "ensemble": torch.zeros(5, 3), "index": torch.tensor([4, 1]), "logits": torch.randn(2, 3)},
    memories.ensemble_targets: lambda: {"ensemble": torch.rand(5, 3), "index": torch.tensor([4, 1])},
    memories.write: lambda: {"memory": torch.zeros(5), "index": torch.tensor([4, 1]), "values": torch.rand(2)},
    perturbation.ascend: lambda: {"model": (model := net()), "loss": loss_of(model)},
    perturbation.restore: lambda: {"model": (model := net()), "perturbation": moved(model), "form": "sam"},
    perturbation.once: lambda: {"attack": pgd},
    schedules.rebat_learning_rate: lambda: {"progress": 1.0},
    schedules.rebat_weight: lambda: {"progress": 1.0},
    schedules.triangular_learning_rate: lambda: {"progress": 1.0, "total": 9},
    schedules.one_cycle_learning_rate: lambda: {"step": 1, "steps": 9},
    schedules.ramped_decay: lambda: {"step": 1},
    schedules.cosine_between: lambda: {"step": 1, "steps": 9, "start": 1.0, "end": 2.0},
    schedules.te_weight: lambda: {"epoch": 1},
    schedules.piat_decay: lambda: {"epoch": 1},
    augment.random_crop_flip: lambda: {"x": FOUR.clone()},
    augment.cutout: lambda: {"x": FOUR.clone()},
    augment.cutmix: lambda: {"x": FOUR.clone(), "labels": LABELS, "num_classes": 3},
    augment.standard: lambda: {"size": 8},
    augment.auto_augment: lambda: {"size": 8},
    augment.TwoViews: lambda: {"transform": torch.clone},
    augment.seeded: lambda: {"transform": torch.clone, "generator": torch.Generator()},
    data.TensorImages: lambda: {"images": FOUR.clone(), "labels": LABELS},
    data.ImageFiles: lambda: {"paths": ["a.png", "b.png"], "labels": torch.tensor([0, 1]), "size": 8},
    data.loader: lambda: {"dataset": TensorImages(FOUR, LABELS), "batch_size": 2},
    data.hold_out: lambda: {"data": (FOUR, LABELS), "amount": 2},
    data.channel_statistics: lambda: {"images": FOUR.clone()},
    data.mixed_rows: lambda: {"real": 9, "generated": 9, "batch_size": 3},
    data.digits: dict,
    data.digit_canvases: lambda: {"count": 1},
    data.npz_images: lambda: {"path": f"{root()}/a.npz"},
    data.image_folder: lambda: {"root": root()},
    data.stream_folder: lambda: {"root": root(), "size": 4},
    data.stream_tars: lambda: {"root": root(), "size": 4},
    data.cifar10: lambda: {"root": root()},
    data.tiny_imagenet: lambda: {"root": root()},
    data.mask_folder: lambda: {"root": root()},
    models.logits_of: lambda: {"model": net(), "output": "logits"},
    models.whole_batches: lambda: {"model": net(), "size": 4},
    models.fold_classes: lambda: {"model": net()},
    models.CosineLinear: lambda: {"in_features": 3, "out_features": 2},
    models.with_cosine_logits: lambda: {"model": net()},
    models.normalized: lambda: {"model": net(), "mean": (0.5,), "std": (0.5,)},
    models.Normalize: lambda: {"mean": (0.5,), "std": (0.5,)},
    models.tap: lambda: {"model": models.DigitsCNN(width=1), "layers": ["pool"]},
    models.perception_taps: lambda: {"model": models.DigitsCNN(width=1)},
    models.perceive_at: lambda: {"model": models.DigitsCNN(width=1), "proxy": "second_to_last"},
    models.trained: lambda: {"name": "none"},
    models.trained_card: lambda: {"name": "none"},
    models.DigitsCNN: lambda: {"width": 1},
    models.ResNet: lambda: {"block": "basic", "depths": (1, 1, 1, 1), "width": 1},
    models.WideResNet: lambda: {"depth": 10, "widen_factor": 1, "width": 1},
    models.VisionTransformer: lambda: {"depth": 1, "width": 6, "heads": 2},
    models.UNet: lambda: {"width": 1},
    checkpoints.save_weights: lambda: {"path": f"{root()}/saved.safetensors", "weights": net()},
    checkpoints.load_weights: lambda: {"model": net(), "path": f"{root()}/net.safetensors"},
    checkpoints.read_weights: lambda: {"path": f"{root()}/net.safetensors"},
    checkpoints.weights_checksum: lambda: {"weights": net()},
    class_predictions.class_table: lambda: {"sums": torch.eye(3)},
    class_predictions.add_class_predictions: lambda: {
        "sums": torch.zeros(3, 3), "logits": torch.randn(4, 3), "labels": LABELS},
    revise: lambda: {name: {"a": torch.rand(3)} for name in ("gradients", "natural", "robust")},
    cure_gradients: lambda: {
        "model": net(), "views": (torch.rand(4, 3),), "labels": LABELS,
        "attack": lambda model, x, labels, loss, start: x.clone(), "average": None},
}  # fmt: skip
NOT_THERE = (
    data.cifar10, data.tiny_imagenet, data.mask_folder, data.stream_tars, models.trained, models.trained_card,
)  # fmt: skip
CALLED = {
    ("ascend", "loss"), ("ascend", "parameters"), ("revise", "layers"),
    *(("cure_gradients", name) for name in ("model", "attack", "layers")),
}  # fmt: skip
"""Functions of the caller's own: what goes wrong inside of them is theirs to say."""
SLOW = (  # also those that import torchvision
    data.digits, data.digit_canvases, cure_gradients, augment.cutmix, augment.standard, augment.auto_augment,
    models.tap, models.perception_taps, models.perceive_at,
)  # fmt: skip


def bad():
    """What no parameter wants, or few; made anew, because some of it is used up."""
    return (
        None, True, -1, 0, 2.5, math.nan, math.inf, 10**30, "text", b"bytes", [], {}, (), object(), len, np.int64(-3),
        [None], {"a": None}, {1: 2}, Linf, iter([1]), torch.tensor([]), torch.zeros(2, 2, 2), torch.tensor(math.nan),
        torch.tensor([0.5, 0.5]), torch.tensor([-1, 7]), torch.ones(4, 3, dtype=torch.complex64),
        torch.eye(3).to_sparse(), (1, 2, 3), ["a", "b"], nn.LazyLinear(2), Path("nowhere"), torch.Generator(),
        Fraction(1, 2),
    )  # fmt: skip


PAIRS = [(function, name) for function in CALLS for name in inspect.signature(function).parameters]


def complaint(function, name, value):
    """What is wrong with a call in which one argument is another; nothing if it is right or refused by name."""
    arguments = CALLS[function]() | {name: value}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            function(**arguments)
        except (ValueError, TypeError, OSError) as error:
            if callable(value) and (function.__name__, name) in CALLED:
                return None
            right = str(error).startswith(f"{function.__name__}: ")
            return None if right else f"{type(error).__name__}: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


@settings(deadline=None)
@given(st.sampled_from([pair for pair in PAIRS if pair[0] not in SLOW]), st.sampled_from(range(len(bad()))))
def test_a_wrong_argument_is_refused_by_name_or_does_no_harm(pair, place):
    assert complaint(*pair, bad()[place]) is None, (pair[0].__name__, pair[1], bad()[place])


@pytest.mark.slow
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_every_wrong_argument_is_refused_by_name_or_does_no_harm(function):
    wrong = [
        f"{name}={value!r:.60}: {said[:140]}"
        for name in inspect.signature(function).parameters
        for value in bad()
        if (said := complaint(function, name, value))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_the_values_that_the_fuzz_takes_for_right_are_right(function):
    with contextlib.nullcontext() if function not in NOT_THERE else pytest.raises((FileNotFoundError, ValueError)):
        function(**CALLS[function]())
