"""The network of a run, by name."""

from typing import Any

import torch
from torch import nn

from perceptual_at import data, models
from perceptual_at.commands.settings import Settings
from perceptual_at.data import TensorImages


def network(settings: Settings, images: TensorImages) -> nn.Module:
    """The network for these images, with its first weights drawn from the seed."""
    chosen = settings.network
    classes = len(images.classes) if images.classes else int(images.labels.max()) + 1
    options: dict[str, Any] = {"num_classes": classes}
    if chosen.model != "digits_cnn":
        options |= {"in_channels": images.images.shape[1], "stem_stride": chosen.stem_stride}
    if chosen.width is not None:
        options["width"] = chosen.width
    kind = models.DigitsCNN if chosen.model == "digits_cnn" else getattr(models, chosen.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.running.seed)
        model: nn.Module = kind(**options)
    if chosen.normalize:
        model = models.normalized(model, data.CIFAR10_MEAN, data.CIFAR10_STD)
    if settings.running.channels_last:
        model.to(memory_format=torch.channels_last)
    return model
