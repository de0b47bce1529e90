"""The images of a run: read, split, told apart from others."""

import hashlib

import torch

from perceptual_at import data
from perceptual_at.commands.settings import Data, Settings
from perceptual_at.data import TensorImages


def images_of(chosen: Data, split: str) -> TensorImages:
    """The images of one split, `train` or `test`, in memory."""
    if chosen.data == "random":
        generator = torch.Generator().manual_seed(0 if split == "train" else 1)
        pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
        return TensorImages(pixels, torch.randint(0, 10, (64,), generator=generator))
    if chosen.data == "digits":
        if split == "test":
            return TensorImages(*data.digits("test"))
        rest, more = data.digits("train"), data.digits("validation")
        return TensorImages(torch.cat([rest[0], more[0]]), torch.cat([rest[1], more[1]]))
    if chosen.data in ("cifar10", "cifar100"):
        read_cifar = data.cifar10 if chosen.data == "cifar10" else data.cifar100
        return read_cifar(chosen.root, "train" if split == "train" else "test", download=chosen.download)
    if chosen.data == "tiny_imagenet":
        return data.tiny_imagenet(chosen.root, "train" if split == "train" else "test")
    return (data.image_folder if chosen.data == "folder" else data.npz_images)(chosen.root, split)


def splits(settings: Settings) -> dict[str, TensorImages]:
    """Images to train on, to select on, and to test on."""
    everything, test = images_of(settings.data, "train"), images_of(settings.data, "test")
    if test.images.shape[1:] != everything.images.shape[1:]:
        shapes = [tuple(part.images.shape[1:]) for part in (everything, test)]
        raise ValueError(f"images for training have shape {shapes[0]}, for the test {shapes[1]}; they must be equal.")
    if settings.evaluation.select_on == "test":
        return {"train": everything, "select": test, "test": test}
    train, held_out = data.hold_out(everything, settings.evaluation.held_out, seed=settings.running.seed)
    return {"train": train, "select": held_out, "test": test}


def fingerprint(parts: dict[str, TensorImages]) -> str:
    """SHA-256 of all images and labels, to notice that a run goes on with other data."""
    digest = hashlib.sha256()
    for part in parts.values():
        for tensor in (part.images, part.labels):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
