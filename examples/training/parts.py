"""What settings become: images, network, threat, attack, learning rate, and the loss of one step."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import perceptual_at as pat
from perceptual_at import data, models, objectives
from perceptual_at.augment import random_crop_flip
from perceptual_at.data import TensorImages
from perceptual_at.schedules import rebat_learning_rate
from training.settings import ALIGNED, AVERAGED, MIXING, TWO_VIEWS, Settings


def images_of(settings: Settings, split: str) -> TensorImages:
    """The images of one split, `train` or `test`, in memory."""
    if settings.data == "random":
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
        return TensorImages(pixels, torch.randint(0, 10, (64,), generator=generator))
    if settings.data == "digits":
        if split == "test":
            return TensorImages(*data.digits("test"))
        rest, more = data.digits("train"), data.digits("validation")
        return TensorImages(*(torch.cat(pair) for pair in zip(rest, more, strict=True)))
    if settings.data in ("cifar10", "cifar100"):
        return getattr(data, settings.data)(settings.root, split, download=settings.download)
    read = {"tiny_imagenet": data.tiny_imagenet, "folder": data.image_folder, "npz": data.npz_images}[settings.data]
    return read(settings.root, split)


def splits(settings: Settings) -> dict[str, TensorImages]:
    """Images to train on, to select on, and to test on."""
    everything, test = images_of(settings, "train"), images_of(settings, "test")
    if test.images.shape[1:] != everything.images.shape[1:]:
        shapes = [tuple(part.images.shape[1:]) for part in (everything, test)]
        raise ValueError(f"images for training have shape {shapes[0]}, for the test {shapes[1]}; they must be equal.")
    if settings.select_on == "test":
        return {"train": everything, "select": test, "test": test}
    train, held_out = data.hold_out(everything, settings.held_out, seed=settings.seed)
    return {"train": train, "select": held_out, "test": test}


def fingerprint(parts: dict[str, TensorImages]) -> str:
    """SHA-256 of all images and labels, to notice that a run goes on with other data."""
    digest = hashlib.sha256()
    for part in parts.values():
        for tensor in (part.images, part.labels):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def network(settings: Settings, images: TensorImages) -> nn.Module:
    """The network for these images, with its first weights drawn from the seed."""
    classes = len(images.classes) if images.classes else int(images.labels.max()) + 1
    options: dict[str, Any] = {"num_classes": classes}
    if settings.model != "digits_cnn":
        options |= {"in_channels": images.images.shape[1], "stem_stride": settings.stem_stride}
    if settings.width is not None:
        options["width"] = settings.width
    kind = models.DigitsCNN if settings.model == "digits_cnn" else getattr(models, settings.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: nn.Module = kind(**options)
    if settings.normalize:
        model = models.normalized(model, data.CIFAR10_MEAN, data.CIFAR10_STD)
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model


def threat_of(settings: Settings) -> pat.Threat:
    """The threat model."""
    return {"linf": pat.Linf, "l2": pat.L2, "l1": pat.L1}[settings.norm](settings.eps)


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """The rate of one optimiser step, counted from 0 over the whole run."""
    if settings.schedule == "rebat":
        first, second = settings.milestones
        progress = (step + 1) / steps_per_epoch
        return rebat_learning_rate(progress, peak=settings.lr, factor=settings.factor, milestones=(first, second))
    if settings.schedule == "one_cycle":
        done = (step + 1) / (settings.epochs * steps_per_epoch + 1)
        return settings.lr * min(done / 0.3, (1 - done) / 0.7)
    drops = sum(step // steps_per_epoch >= milestone for milestone in settings.milestones)
    return settings.lr / settings.factor**drops


def stream(settings: Settings, what: str, number: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of random numbers of its own for each purpose, all from the one seed."""
    named = hashlib.sha256(f"{settings.seed} {what} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(named[:7], "little"))


def rows_of_epoch(settings: Settings, images: int, epoch: int) -> list[Tensor]:
    """The joint batches of an epoch, the same in every process; what does not fill a batch waits for another epoch."""
    order = torch.randperm(images, generator=stream(settings, "order", epoch))
    return list(order[: images // settings.batch * settings.batch].split(settings.batch))


Attack = Callable[..., Tensor]

LANES = {"none": None, "fp32": pat.Lane(), "bf16": pat.Lane(dtype=torch.bfloat16)}


def attack_of(settings: Settings, generator: torch.Generator, *, size: float = 1.0) -> Attack:
    """The attack in training; `size` scales budget and step."""
    return functools.partial(
        pat.pgd, threat=threat_of(settings).scaled(size), steps=settings.steps, step_size=size * settings.step_size,
        start=settings.start, model_mode=settings.model_mode, lane=LANES[settings.lane], validate=False,
        generator=generator,
    )  # fmt: skip


def objective_of(settings: Settings, noise: torch.Generator, mixes: torch.Generator) -> Callable[..., Any]:
    """`(model, x, labels, *, epoch, average) -> (loss, terms)`: one step's loss, augmentation included.

    `noise` draws for the samples of one process, `mixes` what all processes share.
    """
    function, options = getattr(objectives, settings.objective), settings.options()
    attack = attack_of(settings, noise)
    if settings.objective in ("trades", "mart", "raat_plus_plus") or settings.base in ("trades", "mart"):
        options["generator"] = noise
    if settings.objective in ALIGNED and settings.source == "paper":
        eta = options.pop("eta", 0.1)
        options["reduced_attack"] = attack_of(settings, noise, size=eta)
    fold = "max" if settings.source == "release" else "none"
    two = settings.objective in TWO_VIEWS or settings.base == "consistency_at"

    def loss_of_step(model: nn.Module, x: Tensor, labels: Tensor, *, epoch: int, average: Any) -> Any:
        views = tuple(
            random_crop_flip(
                x, padding=settings.padding, padding_mode=settings.padding_mode, flip=settings.flip, generator=noise
            )
            for _ in range(1 + two)
        )
        if settings.channels_last:
            views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
        changing = dict(options)
        if settings.objective in MIXING:
            changing["mix"] = pat.draw_beta(fold=fold, generator=mixes)
        if settings.objective in AVERAGED:
            began = epoch >= settings.average_start
            # Until the end of the first epoch with averaged weights the released code leaves them in train mode.
            trap = settings.source == "release" and epoch <= settings.average_start
            changing["teacher_mode"] = "as_is" if trap else "eval"
            changing["average"] = average if began or settings.objective == "raat_sharp" else None
            if settings.objective == "raat_sharp" and not began:
                changing["weight"] = 0.0
        return function(model, views, labels, attack, **changing)

    return loss_of_step
